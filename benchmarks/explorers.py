"""What a learner waits for at each picture with controls, in seconds: `python benchmarks/explorers.py [lesson …]`.

The cells of every lesson that show such a picture are taken from the lesson, with the cells that they need. Each is run
in a process of its own, where what it needs is there, but nothing has been drawn. Then each control is moved
to other places, as on a page, and in another process while a cell of Python computes. A picture that lacks measurements
comes first, and then they are made; "complete" says when. Medians, and the longest wait while a cell computes. The
browser's share is not in these figures; `tests/browser/test_lab.py` prints waits with it.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import json
import os
import re
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers  # noqa: F401  so that displays are measured after the imports

from minipeft.explore import page, slider
from minipeft.explore.slider import SliderPlot
from minipeft.explore.training import options

ROOT = Path(__file__).parents[1]
MAKES = re.compile(r"(mp\.)?(SliderPlot|[A-Z]\w*(Explorer|Calculator|Monitor))\(")
ROUNDS = 3


def code(lesson: Path) -> list[str]:
    cells = json.loads(lesson.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def names(source: str) -> tuple[set[str], set[str]]:
    """The names that code binds, and those that it reads."""
    bound, read = set(), set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Name(name, ast.Load()):
                read.add(name)
            case ast.Name(name) | ast.FunctionDef(name) | ast.ClassDef(name):
                bound.add(name)
            case ast.alias(name, given):
                bound.add(given or name.split(".")[0])
    return bound, read


def needed(cells: list[str], shown: int) -> list[str]:
    """The cells before this one that bind what it reads, and what these read."""
    wanted, found = names(cells[shown])[1], []
    for source in reversed(cells[:shown]):
        bound, read = names(source)
        if bound & wanted:
            wanted |= read
            found.append(source)
    return found[::-1]


def showing(cells: list[str]) -> Iterator[int]:
    """Where a cell's last line is a picture with controls, or the name that one was given."""
    named = set()
    for i, source in enumerate(cells):
        lines = ast.parse(source).body
        given = [line for line in lines if isinstance(line, ast.Assign)]
        named |= {line.targets[0].id for line in given if MAKES.match(ast.unparse(line.value))}
        last = ast.unparse(lines[-1])
        if last in named or MAKES.match(last):
            yield i


def shown_by(source: str, space: dict) -> SliderPlot:
    """The picture that the cell shows, whose last line is the picture or `name = picture` and `name`."""
    *lines, last = ast.parse(source).body
    exec(compile(ast.Module(lines, []), "cell", "exec"), space)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), space)


def places(control) -> list:
    """Where a control can be moved, four of them at most."""
    if hasattr(control, "options"):
        every = options(control)
        return every[:: max(1, len(every) // 3)]
    return [control.min, control.max, control.min + control.step] if hasattr(control, "min") else [False, True]


def moves(explorer: SliderPlot, pictures: list[float]) -> Iterator[tuple[float, float]]:
    """Seconds from each move to its first picture, and to the one that is complete."""
    for control in explorer.controls.values():
        for place in (*places(control), control.value):
            if place == control.value:
                continue
            if explorer.last is not None:
                explorer.last.join()  # of the move before
            pictures.clear()
            started = time.perf_counter()
            control.value = place
            done = time.perf_counter()
            while not pictures:
                time.sleep(0.001)
            yield pictures[0] - started, max(done, pictures[0]) - started
            explorer.cancel()


def waits(source: str, space: dict, busy: bool) -> list[tuple[float, float]]:
    """Seconds as in `moves`, first of the cell, then of each move, while a cell computes if `busy`."""
    pictures = []
    slider.watched, slider.display = lambda: True, lambda *_, **__: pictures.append(time.perf_counter())
    sys.setswitchinterval(page.TURN)
    page.let_cells_wait()
    started = time.perf_counter()
    explorer = shown_by(source, space)
    explorer._ipython_display_()
    found = [(pictures[-1] - started, time.perf_counter() - started)]  # the picture is what is displayed last
    while explorer.run is not None and explorer.bar.value < 0.2:
        time.sleep(0.01)  # until the process that trains has begun, as on a page
    explorer.cancel()
    explorer.image.observe(lambda _: pictures.append(time.perf_counter()), "value")
    moving = threading.Thread(target=lambda: found.extend(moves(explorer, pictures)))
    moving.start()
    while busy and moving.is_alive():
        sum(range(10_000))
    moving.join()
    return found


def apart(*given) -> list[tuple[float, float]]:
    """`waits(*given)` in a copy of this process."""
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writes, json.dumps(waits(*given)).encode())
        finally:
            os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    return json.loads(told)


def measure(lesson: Path) -> None:
    """Prints a line for each picture of the lesson."""
    cells = code(lesson)
    for i in showing(cells):
        space = {"__name__": "__main__", "display": lambda *_, **__: None}
        for before in needed(cells, i):
            exec(compile(before, f"{lesson.stem}", "exec"), space)
        quiet, busy = ([apart(cells[i], space, busy) for _ in range(ROUNDS)] for busy in (False, True))
        shown = [each[0] for each in quiet + busy]
        moved, while_busy = ([wait for each in rounds for wait in each[1:]] for rounds in (quiet, busy))
        columns = [column for kind in (shown, moved, while_busy) for column in zip(*kind, strict=True)]
        figures = [*map(statistics.median, columns), max(columns[-2])]
        print(f"{lesson.stem[:2]}, cell {i + 1:<14}" + "".join(f"{figure:12.2f}" for figure in figures), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lessons", nargs="*", help="only these, by their numbers, such as 00 or 10")
    wanted = parser.parse_args().lessons
    lessons = [path for path in sorted((ROOT / "notebooks").glob("*.ipynb")) if not wanted or path.stem[:2] in wanted]
    torch.set_num_threads(1)
    builtins.print, said = (lambda *_, **__: None), print  # what the lessons' cells print is theirs
    os.chdir(ROOT / "notebooks")
    titles = ("first", "complete", "a move", "complete", "cell runs", "complete", "longest")
    globals()["print"] = said
    print(" " * 24 + "".join(f"{title:>12}" for title in titles))
    for lesson in lessons:
        measure(lesson)


if __name__ == "__main__":
    main()
