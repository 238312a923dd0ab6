"""The waiting times that the course promises, in seconds on this machine: `python benchmarks/timings.py`.

Every other benchmark is a ratio. What a learner waits for is seconds, so these are.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from side_by_side import Figure, figure, in_turn, main

import minipeft as mp


def import_seconds(statement: str) -> float:
    code = f"import time, torch; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def explorer_seconds(moves: int) -> dict[str, list[float]]:
    """From a move of the rank slider, as on a page: to the first picture, to the loss of a first step in it, and to the
    end of the run; to the picture of a position that has been trained; and a redraw."""
    from minipeft.explore import LoRAExplorer, slider
    from minipeft.explore.runs import ready
    from minipeft.explore.worker import WORKER

    slider.watched = lambda: True
    WORKER.submit(ready)
    explorer = LoRAExplorer()
    explorer.afterwards = lambda: ()  # the rest of the row would compete with the next run

    def move(rank: int) -> tuple[float, float, float]:
        started, pictures, points = time.perf_counter(), [], []

        def shown(_) -> None:
            pictures.append(time.perf_counter() - started)
            points.extend(pictures[-1:] if explorer.history.losses else ())

        explorer.image.observe(shown, "value")
        explorer.controls["rank"].value = rank
        explorer.running.join()
        explorer.image.unobserve_all("value")
        return pictures[0], points[0], time.perf_counter() - started

    move(1)  # which starts the process
    move(8)
    found: dict[str, list[float]] = {"picture": [], "point": [], "end": [], "known": []}
    for _ in range(moves):
        explorer.trained = {key: run for key, run in explorer.trained.items() if key[2] == 8}
        for name, took in zip(("picture", "point", "end"), move(16), strict=True):
            found[name].append(took)
        found["known"].append(move(8)[-1])
    return found | in_turn({"redraw": explorer.redraw}, moves)


def seconds(what: str, times: Sequence[float], promised: float) -> Figure:
    return figure(what, "seconds", times, [1.0] * len(times), f"≤ {promised:g}")


def figures(quick: bool = False) -> Iterator[Figure]:
    import transformers  # noqa: F401  so that loading is measured after the imports

    times = 2 if quick else 5
    yield seconds("import minipeft, beyond torch", [import_seconds("import minipeft") for _ in range(times)], 0.3)
    yield seconds("mp.load after the imports", in_turn({"load": lambda: mp.load("pocket")}, times)["load"], 1.0)
    explorer = explorer_seconds(times)
    yield seconds("a slider's move to a picture", explorer["picture"], 0.2)
    yield seconds("a slider's move to the first point of the run", explorer["point"], 0.5)
    yield seconds("a slider's move to the end of 60 steps and the test", explorer["end"], 4.0)
    yield seconds("a move to a position that has been trained", explorer["known"], 0.2)
    yield seconds("one redraw", explorer["redraw"], 0.2)


if __name__ == "__main__":
    main(figures, __doc__)
