"""Flower runs our strategy to the same numbers as one process does. It has an environment of its own, in which this file
is run again; see `minipeft/learn/flower.py`."""

from __future__ import annotations

import os
import subprocess
from importlib import util
from pathlib import Path

import pytest
import tiny

import minipeft as mp
from minipeft.learn.federated import Client, federate
from minipeft.learn.plan import Plan
from minipeft.world import tasks

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".venv-flower" / "bin" / "python"
PLAN, METHOD = Plan(steps=2, lr=1e-2, batch=4), mp.LoRA(rank=2)


def gone():
    raise ConnectionError("no route to the site")


def clients() -> list[Client]:
    several = (tasks.pirate(60, 8), tasks.forecast(60, 8), tasks.plain(60, 8))
    names, sizes = ("zoë", "b", "Amt 10"), (9, 5, 7)
    found = [t.data["train"].select(range(n)) for t, n in zip(several, sizes, strict=True)]
    return [*(Client(name, rows) for name, rows in zip(names, found, strict=True)), Client("far", gone)]


if util.find_spec("flwr") is None:

    @pytest.mark.slow
    def test_under_flower_in_an_environment_of_its_own():
        if not (ROOT / ".venv-flower" / "installed").exists():
            pytest.skip("Flower is not installed: run bash tools/setup.sh flower, which needs a network once")
        command = [PYTHON, "-m", "pytest", "-p", "no:cacheprovider", __file__]
        settings = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]

else:

    @pytest.mark.slow
    def test_flower_equals_one_process():
        """Four clients, one of whom is never reached, and two rounds; so what moves into the base is sent as well."""
        from minipeft.learn.flower import packed, simulate, unpacked

        model = tiny.small()
        here, there = (run(model, METHOD, clients(), "fedex", 2, PLAN) for run in (federate, simulate))
        assert tiny.same(here.state.numbers, there.state.numbers) and tiny.same(here.state.moved, there.state.moved)
        assert here.rounds == there.rounds and here.rounds[1].refused == {
            "far": "dropped out: ConnectionError no route to the site"
        }
        assert tiny.same(unpacked(packed(here.state), 2).moved, here.state.moved)
