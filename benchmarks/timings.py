"""The waiting times that the course promises, in seconds on this machine: `python benchmarks/timings.py`.

Every other benchmark is a ratio. What a learner waits for is seconds, so these are.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from side_by_side import Figure, figure, in_turn, main

import minipeft as mp


def import_seconds(statement: str) -> float:
    code = f"import time, torch; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def explorer_seconds(moves: int) -> tuple[list[float], list[float], list[float]]:
    """From a move of the rank slider: to the first picture with a point, to the end; and a redraw."""
    from minipeft.explore import LoRAExplorer

    explorer = LoRAExplorer()
    explorer.finish()

    async def move() -> tuple[float, float]:
        started = time.perf_counter()
        pictures = []
        explorer.image.observe(lambda _: pictures.append(time.perf_counter() - started), "value")
        explorer.controls["rank"].value = 16 if explorer.controls["rank"].value == 8 else 8
        await explorer.running
        return pictures[0], time.perf_counter() - started

    firsts, ends = zip(*(asyncio.run(move()) for _ in range(moves)), strict=True)
    return list(firsts), list(ends), in_turn({"redraw": explorer.redraw}, moves)["redraw"]


def seconds(what: str, times: Sequence[float], promised: float) -> Figure:
    return figure(what, "seconds", times, [1.0] * len(times), f"≤ {promised:g}")


def figures(quick: bool = False) -> Iterator[Figure]:
    import transformers  # noqa: F401  so that loading is measured after the imports

    times = 2 if quick else 5
    yield seconds("import minipeft, beyond torch", [import_seconds("import minipeft") for _ in range(times)], 0.3)
    yield seconds("mp.load after the imports", in_turn({"load": lambda: mp.load("pocket")}, times)["load"], 1.0)
    first, end, redraw = explorer_seconds(times)
    yield seconds("a slider's move to the first point", first, 0.5)
    yield seconds("a slider's move to the end of 60 steps and the test", end, 4.0)
    yield seconds("one redraw", redraw, 0.2)


if __name__ == "__main__":
    main(figures, __doc__)
