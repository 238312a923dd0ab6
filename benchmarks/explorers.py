"""What a learner waits for at each explorer, in seconds on this machine: `python benchmarks/explorers.py [name …]`.

Each explorer is made and shown in a process of its own, where minipeft is imported and what its lesson computes before
it is there, but nothing has been drawn. Then its first control is moved to every other place, as on a page. A picture
that lacks measurements comes first, and then they are made. Medians of wall time until either, and of the processor's
time in brackets, for a machine that does other things as well.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

import torch
import transformers  # noqa: F401  so that displays are measured after the imports

import minipeft as mp
from minipeft.explore import slider
from minipeft.explore.slider import SliderPlot
from minipeft.explore.training import options

Make = Callable[[], SliderPlot]
ROUNDS = 5


def training(kind: type[SliderPlot]) -> Make:
    model = mp.load("pocket")[0]
    return lambda: kind(model)


def rank() -> Make:
    tuned, task = mp.attach(mp.load("pocket")[0], mp.Full()), mp.world.pirate()
    mp.fit(tuned, task, steps=3, lr=1e-3, batch=10, progress=False)
    return lambda: mp.RankExplorer(tuned, task)


def mixture() -> Make:
    both = mp.load_adapter(mp.load("pocket")[0], mp.shipped("pirate"), "pirate")
    both = mp.load_adapter(both, mp.shipped("forecast"), "forecast")
    tasks = {"stories": mp.world.plain(), "pirate": mp.world.pirate(), "forecast": mp.world.forecast()}
    return lambda: mp.MixtureExplorer(both, tasks, {"pirate": 1.0, "forecast": 1.0})


def quantisation() -> Make:
    encoder = mp.load("minilm", labels=2)[0]
    return lambda: mp.QuantisationExplorer(encoder)


def sites() -> Make:
    from minipeft.learn.averaging import RULES
    from minipeft.learn.federated import State, fresh, parted, train
    from minipeft.learn.plan import Plan

    model, method = mp.load("pocket")[0], mp.LoRA(rank=4)
    clients = parted([task.data["train"] for task in (mp.world.pirate(), mp.world.forecast())], 4, 1.0, 40, seed=1)
    start, plan = State(fresh(model, method, 0)), Plan(steps=2, lr=1e-2, batch=8)
    sent = [train(model, method, start, client, RULES["fedit"], plan) for client in clients]
    return lambda: mp.SitesExplorer({"one dialect each": sent, "again": sent})


def privacy() -> Make:
    from minipeft.course import worlds

    measured = worlds.measured()
    return lambda: mp.PrivacyExplorer(measured["privacy"], measured["sites"]["before"], 0.8)


def memory() -> Make:
    mp.load("pocket")  # with which transformers' classes are imported
    return mp.MemoryCalculator


def opinions() -> Make:
    from minipeft.course import monitor
    from minipeft.explore.monitor import OpinionMonitor

    scores, test = monitor.measured()["runs"][0]["test"], monitor.tweets()["test"]
    return lambda: OpinionMonitor(scores, test["label"], test["text"])


EXPLORERS: dict[str, Callable[[], Make]] = {
    **{
        kind.__name__: lambda kind=kind: training(kind)
        for kind in (mp.LoRAExplorer, mp.AdapterExplorer, mp.PromptExplorer, mp.PrefixExplorer, mp.TemplateExplorer)
    },
    "RankExplorer": rank,
    "MixtureExplorer": mixture,
    "MemoryCalculator": memory,
    "QuantisationExplorer": quantisation,
    "SitesExplorer": sites,
    "PrivacyExplorer": privacy,
    "PicturesExplorer": lambda: mp.PicturesExplorer,
    "OpinionMonitor": opinions,
}


def clock() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def since(started: tuple[float, float]) -> tuple[float, float]:
    return tuple(now - then for now, then in zip(clock(), started, strict=True))


def waits(prepare: Callable[[], Make]) -> list[list[tuple[float, float]]]:
    """(wall, processor) seconds from the cell to its pictures, and from each move to its pictures."""
    make, pictures = prepare(), []
    slider.watched, slider.display = lambda: True, lambda *_, **__: pictures.append(since(started))
    started = clock()
    explorer = make()
    explorer._ipython_display_()
    found = [[pictures[-1], since(started)]]  # the picture is what is displayed last
    explorer.cancel()
    explorer.image.observe(lambda _: pictures.append(since(started)), "value")
    control = next(iter(explorer.controls.values()))
    places = options(control) if hasattr(control, "options") else [control.min, control.max, control.min + 1]
    for place in places:
        if place == control.value:
            continue
        if explorer.last is not None:
            explorer.last.join()  # of the move before
        pictures.clear()
        started = clock()
        control.value = place
        while not pictures:
            time.sleep(0.001)
        found.append([pictures[0], since(started)])
        explorer.cancel()
    return found


def apart(prepare: Callable[[], Make]) -> list[list[tuple[float, float]]]:
    """`waits` in a copy of this process."""
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writes, json.dumps(waits(prepare)).encode())
        finally:
            os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    return json.loads(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"only some of {', '.join(EXPLORERS)}")
    names = parser.parse_args().names or EXPLORERS
    torch.set_num_threads(1)
    print(" " * 24 + "".join(f"{title:>16}" for title in ("first display", "its measures", "a move", "its measures")))
    for name in names:
        rounds = [apart(EXPLORERS[name]) for _ in range(ROUNDS)]
        shown, moves = [each[0] for each in rounds], [move for each in rounds for move in each[1:]]
        columns = [[each[i] for each in several] for several in (shown, moves) for i in range(2)]
        cells = [" {:.2f} ({:.2f})".format(*map(statistics.median, zip(*each, strict=True))) for each in columns]
        print(f"{name:24}" + "".join(f"{cell:>16}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
