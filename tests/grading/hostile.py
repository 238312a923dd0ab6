"""Submissions that a grader meets sooner or later: {name: (how the notebook's text is made, what must come of it)}.

What must come of it: "full" marks, "zero", or "rest" (full marks but for the exercise that was touched).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import nbformat

FIRST = "lora_scale"  # the exercise whose cell is touched


def cell_named(notebook, name: str):
    return next(c for c in notebook.cells if c.metadata.get("nbgrader", {}).get("grade_id") == name)


def added(code: str, before: bool = True) -> Callable:
    """A cell of the student's own, at the top or at the end."""

    def make(notebook):
        notebook.cells.insert(1 if before else len(notebook.cells), nbformat.v4.new_code_cell(code))

    return make


def inside(code: str) -> Callable:
    """The first exercise's answer, replaced."""

    def make(notebook):
        cell_named(notebook, FIRST).source = code

    return make


def broken_text(change: Callable[[str], str]) -> Callable:
    def make(notebook):
        return change(nbformat.writes(notebook))

    return make


def strip_metadata(notebook) -> None:
    for cell in notebook.cells:
        cell.metadata = {}


def duplicate(name: str) -> Callable:
    def make(notebook):
        at = notebook.cells.index(cell_named(notebook, name))
        notebook.cells.insert(at + 1, copy.deepcopy(notebook.cells[at]))

    return make


def delete(name: str) -> Callable:
    def make(notebook):
        notebook.cells.remove(cell_named(notebook, name))

    return make


def edit_test(notebook) -> None:
    cell_named(notebook, FIRST).source = "def lora_scale(alpha, rank, rank_stabilized=False):\n    return 0.0"
    cell_named(notebook, f"test_{FIRST}").source = "print('all is well')"


def edit_points(notebook) -> None:
    cell_named(notebook, FIRST).source = "def lora_scale(alpha, rank, rank_stabilized=False):\n    return 0.0"
    cell_named(notebook, "test_lora_delta").metadata.nbgrader.points = 1000


def deep(notebook) -> str:
    return "[" * 100_000 + "]" * 100_000


def forged(notebook) -> str:
    notebook.cells[3].source = {"not": "text"}
    return json.dumps(notebook)


READS = """
import glob, os
found = [f for top in ("/", os.getcwd(), os.path.expanduser("~")) for pattern in ("*/solutions/*", "**/solutions/**")
         for f in glob.glob(os.path.join(top, pattern))]
import minipeft
root = os.path.dirname(os.path.dirname(minipeft.__file__))
for path in (root + "/solutions/lora/lora.ipynb", root + "/minipeft/course/exercises/lora.py", root + "/README.md"):
    try:
        open(path).read()
        found.append(path)
    except OSError:
        pass
print("FOUND", found)
"""
WRITES = """
import os, minipeft
root = os.path.dirname(os.path.dirname(minipeft.__file__))
written = []
for folder in (root, root + "/minipeft", os.path.dirname(os.__file__), "/", "/etc", "/usr", "/root", "/dev/shm"):
    try:
        with open(os.path.join(folder, "was_here.txt"), "w") as file:
            file.write("x")
        written.append(folder)
    except OSError:
        pass
print("WRITTEN", written)
"""
NETWORK = """
import socket
reached = []
for address in (("127.0.0.1", PORT),):
    try:
        socket.create_connection(address, timeout=1).close()
        reached.append(address)
    except OSError:
        pass
print("REACHED", reached)
"""
FORGED_REPLY = """
import os
from minipeft.course import wire
for fd in range(3, 64):
    try:
        for _ in range(3):
            os.write(fd, wire.encode({"got": {"value": 4.0}, "after": (), "outputs": []}))
    except OSError:
        pass
def lora_scale(alpha, rank, rank_stabilized=False):
    return 4.0
"""

HOSTILE: dict[str, tuple[Callable, str]] = {
    "infinite loop at top level": (added("while True:\n    pass"), "full"),
    "infinite loop in an answer": (inside("def lora_scale(a, r, s=False):\n    while True: pass"), "rest"),
    "loop that swallows interrupts": (
        added("import time\nwhile True:\n    try:\n        time.sleep(60)\n    except BaseException:\n        pass"),
        "full",
    ),
    "the alarm turned off": (
        added("import signal\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\nwhile True:\n    pass"),
        "full",
    ),
    "os._exit at top level": (added("import os; os._exit(0)"), "full"),
    "os._exit in an answer": (inside("import os\ndef lora_scale(a, r, s=False):\n    os._exit(0)"), "rest"),
    "sys.exit in an answer": (inside("import sys\ndef lora_scale(a, r, s=False):\n    sys.exit()"), "rest"),
    "fork bomb": (
        added("import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"),
        "full",
    ),
    "filling the disk": (
        added("i = 0\nwhile True:\n    open(f'file{i}', 'wb').write(bytes(10**7)); i += 1"),
        "full",
    ),
    "10 GB allocation": (added("import torch\nx = torch.ones(10 * 2**30, dtype=torch.uint8)"), "full"),
    "10 GB in small pieces": (added("x = []\nwhile True:\n    x.append(bytes(10**7))"), "full"),
    "300,000 prints": (added("for i in range(300_000):\n    print(i)"), "full"),
    "input()": (added("name = input('who? ')"), "full"),
    "syntax error": (inside("def lora_scale(alpha, rank:\n    return"), "rest"),
    "a warning on stderr": (
        added("import sys, warnings\nprint('careful', file=sys.stderr)\nwarnings.warn('hm')"),
        "full",
    ),
    "bad JSON": (broken_text(lambda text: text[: len(text) // 2]), "zero"),
    "an empty file": (broken_text(lambda text: ""), "zero"),
    "not a notebook": (broken_text(lambda text: '{"cells": 3}'), "zero"),
    "deeply nested JSON": (deep, "zero"),
    "a cell that is no text": (forged, "zero"),
    "stripped metadata": (strip_metadata, "full"),
    "duplicated answer": (duplicate(FIRST), "full"),
    "duplicated test": (duplicate(f"test_{FIRST}"), "full"),
    "deleted answer": (delete(FIRST), "rest"),
    "deleted test": (delete(f"test_{FIRST}"), "full"),
    "edited test": (edit_test, "rest"),
    "edited points": (edit_points, "rest"),
    "reading the solutions": (added(READS), "full"),
    "writing into the grader's files": (added(WRITES), "full"),
    "calling home": (added(NETWORK), "full"),
    "forged replies": (inside(FORGED_REPLY), "rest"),
    "a patched check": (
        inside(
            "from minipeft.course import check, drives, verdict\n"
            "verdict.fault = verdict.differ = lambda *a, **k: ()\n"
            "check.grade = check.verdict = lambda *a, **k: None\n"
            "def lora_scale(alpha, rank, rank_stabilized=False):\n    return 4.0"
        ),
        "rest",
    ),
}
