"""Flower runs our strategy to the same numbers as one process does. It has an environment of its own; see
`minipeft/learn/flower.py`."""

from __future__ import annotations

import pytest
import tiny

pytest.importorskip("flwr", reason="Flower is not installed here: minipeft/learn/flower.py says how to get it")
pytest.importorskip("ray", reason="Flower's simulation engine is not installed here")

import minipeft as mp  # noqa: E402
from minipeft.learn.federated import Client, federate  # noqa: E402
from minipeft.learn.flower import packed, simulate, unpacked  # noqa: E402
from minipeft.learn.plan import Plan  # noqa: E402
from minipeft.world import tasks  # noqa: E402

PLAN, METHOD = Plan(steps=2, lr=1e-2, batch=4), mp.LoRA(rank=2)


def gone():
    raise ConnectionError("no route to the site")


def clients() -> list[Client]:
    several = (tasks.pirate(60, 8), tasks.forecast(60, 8), tasks.plain(60, 8))
    names, sizes = ("zoë", "b", "Amt 10"), (9, 5, 7)
    found = [t.data["train"].select(range(n)) for t, n in zip(several, sizes, strict=True)]
    return [*(Client(name, rows) for name, rows in zip(names, found, strict=True)), Client("far", gone)]


@pytest.mark.slow
def test_flower_equals_one_process():
    """Four clients, one of whom is never reached, and two rounds; so what moves into the base is sent as well."""
    model = tiny.small()
    here, there = (run(model, METHOD, clients(), "fedex", 2, PLAN) for run in (federate, simulate))
    assert tiny.same(here.state.numbers, there.state.numbers) and tiny.same(here.state.moved, there.state.moved)
    assert here.rounds == there.rounds and here.rounds[1].refused == {
        "far": "dropped out: ConnectionError no route to the site"
    }
    assert tiny.same(unpacked(packed(here.state), 2).moved, here.state.moved)
