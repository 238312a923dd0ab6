"""The waiting times that the course promises, measured on this machine: `python benchmarks/timings.py`.

Each row is the median of several runs, beside its promise.
"""

import asyncio
import statistics
import subprocess
import sys
import time


def median(work, runs: int = 5) -> float:
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def import_seconds(statement: str) -> float:
    code = f"import time, torch; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def explorer_seconds() -> tuple[float, float, float]:
    """From a move of the rank slider: to the first picture with a point, to the end; and one redraw."""
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

    moves = [asyncio.run(move()) for _ in range(5)]
    return (*(statistics.median(column) for column in zip(*moves, strict=True)), median(explorer.redraw))


def main() -> None:
    import torch
    import transformers  # noqa: F401  so that loading is measured after the imports

    import minipeft as mp

    mp.load("pocket")
    imported = statistics.median(import_seconds("import minipeft") for _ in range(5))
    rows = [("import minipeft, beyond torch", imported, 0.3)]
    rows.append(('mp.load("pocket"), after the imports', median(lambda: mp.load("pocket")), 1.0))
    first, whole, redraw = explorer_seconds()
    rows.append(("slider move to the first point", first, 0.5))
    rows.append(("slider move to the end of 60 steps and the test", whole, 4.0))
    rows.append(("one redraw", redraw, 0.2))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for label, seconds, promise in rows:
        verdict = "kept" if seconds <= promise else "missed"
        print(f"{label:50} {seconds:7.3f} s   promised {promise:g} s   {verdict}")


if __name__ == "__main__":
    main()
