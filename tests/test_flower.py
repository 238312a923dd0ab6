"""Flower runs our strategy to the same numbers as one process does. It has an environment of its own, in which this
file is run again; see `minipeft/learn/flower.py`."""

from __future__ import annotations

import os
import subprocess
from importlib import util
from pathlib import Path

import pytest
import tiny
from processes import ended

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

    def again(marker: str, seconds: float) -> str:
        """What pytest says of this file's tests with that marker in Flower's environment."""
        if not (ROOT / ".venv-flower" / "installed").exists():
            pytest.skip("Flower is not installed: run bash tools/setup.sh flower, which needs a network once")
        command = [PYTHON, "-m", "pytest", "-p", "no:cacheprovider", "-m", marker, __file__]
        settings = os.environ | {"PYTHONPATH": str(ROOT)}
        return ended(command, seconds, cwd=ROOT, env=settings)[1][-6000:]

    @pytest.mark.slow
    def test_strategy_and_apps_in_an_environment_of_its_own():
        said = again("not slow", 500)
        assert "4 passed" in said, said

    @pytest.mark.slow
    def test_the_engine_in_an_environment_of_its_own():
        """Ray gives its engine 30 s to start, which a busy machine may not keep: that is said, and skipped."""
        try:
            said = again("slow", 120)
        except subprocess.TimeoutExpired:
            pytest.skip("Flower's simulation engine, Ray, did not finish within two minutes on this machine")
        if "node timed out during startup" in said:
            pytest.skip("Flower's simulation engine, Ray, did not start within its 30 s on this machine")
        assert "1 passed" in said, said

else:
    from flwr.app import Context, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    from minipeft.learn.flower import Averaging, client_app, packed, simulate, unpacked

    class Here:
        """Flower's grid without an engine: every message goes to the app of its node in this process."""

        def __init__(self, app, nodes: int):
            self.app, self.nodes = app, range(1, nodes + 1)

        def get_node_ids(self):
            return self.nodes

        def send_and_receive(self, messages, timeout=None):
            for message in messages:
                node = message.metadata.dst_node_id
                yield self.app(message, Context(1, node, {"partition-id": node - 1}, RecordDict(), {}))

    def same(here, there) -> None:
        assert tiny.same(here.state.numbers, there.state.numbers) and tiny.same(here.state.moved, there.state.moved)
        assert here.rounds == there.rounds and here.rounds[1].refused == {
            "far": "dropped out: ConnectionError no route to the site"
        }

    @pytest.mark.parametrize("rule", ["fedit", "rolora", "flora", "fedex"])
    def test_flowers_strategy_and_apps_equal_one_process(rule, monkeypatch):
        """Four clients, one of whom is never reached, and two rounds; so what moves into the base is sent as well."""
        for name in ("task", "run", "node"):  # whose messages these are, which an engine says
            monkeypatch.setattr(TaskIdentity, f"_{name}_id", 1)
        model = tiny.small()
        here = federate(model, METHOD, clients(), rule, 2, PLAN)
        strategy = Averaging(model, METHOD, rule, 4, PLAN.seed)
        grid = Here(client_app(model, METHOD, clients(), strategy.rule, PLAN), 4)
        strategy.start(grid, packed(strategy.done.state), num_rounds=2)
        same(here, strategy.done)
        assert tiny.same(unpacked(packed(here.state), 2).moved, here.state.moved)

    @pytest.mark.slow
    def test_a_simulation_equals_one_process():
        model = tiny.small()
        same(*(run(model, METHOD, clients(), "fedex", 2, PLAN) for run in (federate, simulate)))
