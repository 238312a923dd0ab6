"""The benchmarks' figures and tables; what they measure is not tested by time."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def rooms():
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("side_by_side"), importlib.import_module("table")
    sys.path.remove(str(FOLDER))


def test_a_figure_is_the_median_of_the_rounds_ratios(rooms):
    side, _ = rooms
    found = side.figure("a step", "ours / theirs", [1, 4, 9], [1, 2, 3], "≤ 2")
    assert (found.median, found.kept()) == (2, True)
    assert side.figure("a step", "ours / theirs", [1, 5, 9], [1, 2, 3], "≤ 2").kept() is False
    assert side.figure("throughput", "many / one", [1, 5, 9], [1, 2, 3], "≥ 2.5").kept() is True
    assert side.figure("a step", "ours / theirs", [1, 5], [1, 2]).kept() is None


def test_the_sides_run_in_turn_and_the_first_rounds_do_not_count(rooms):
    order = []
    times = rooms[0].in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b"] * 5 and [len(each) for each in times.values()] == [3, 3]


def test_new_rows_take_the_place_of_the_same_benchmark_and_threads(rooms):
    row = lambda name, threads, median: {"benchmark": name, "threads": threads, "median": median}  # noqa: E731
    old = [row("merged", 1, 1.0), row("timings", 2, 2.0), row("merged", 2, 3.0)]
    assert rooms[1].merged(old, [row("merged", 2, 4.0), row("many", 1, 5.0)]) == [
        row("many", 1, 5.0), row("merged", 1, 1.0), row("merged", 2, 4.0), row("timings", 2, 2.0),
    ]  # fmt: skip


def test_every_benchmark_of_figures_is_in_the_table(rooms):
    have = {path.stem for path in FOLDER.glob("*.py") if "def figures(" in path.read_text(encoding="utf-8")}
    assert have == set(rooms[1].THREADS)


def test_the_tables_are_those_of_the_figures(rooms):
    """Nobody wrote a figure into them by hand."""
    held = json.loads((FOLDER / "figures.json").read_text(encoding="utf-8"))
    assert {row["benchmark"] for row in held["rows"]} == set(rooms[1].THREADS)
    for path, section in rooms[1].sections(held).items():
        text = path.read_text(encoding="utf-8")
        assert rooms[1].between(text, section) == text, (
            f"{path.name} is not from figures.json: benchmarks/table.py --tables"
        )


def test_a_benchmark_in_small_runs_from_the_table():
    """The smallest one, the whole way; it writes nothing."""
    before = (FOLDER / "figures.json").read_bytes()
    command = [sys.executable, "benchmarks/table.py", "--quick", "merged"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("merged, forward") == 4 and (FOLDER / "figures.json").read_bytes() == before
    wrong = subprocess.run([*command[:2], "nope"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert wrong.returncode == 2 and "there is no benchmark nope" in wrong.stderr
