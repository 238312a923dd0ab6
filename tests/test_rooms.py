"""The house: arrows between the package's files run one way, and every file can be read in a sitting."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "minipeft"
FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# From the bottom up. An arrow may stay on its floor or run down, never up.
FLOORS = (
    ("whole", "table", "targets", "reading", "calls"),
    ("layer", "hook", "files", "front", "merging", "build", "stand_in", "steps"),
    ("attach", "methods"),
    ("world",),
    ("learn", "serve", "analyze"),
    ("explore", "course"),
    ("doctor", "__main__"),
)


def arrows(name: str) -> set[str]:
    """The files of the package that this one imports, inside functions too; a name of a package may be its file."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in FILES else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {each for each in found if each in FILES and each != name}


GRAPH = {name: arrows(name) for name in FILES}


def floor(name: str) -> int:
    """Where a file stands; the front door `minipeft` knows every room."""
    room = name.split(".")[1] if "." in name else ""
    return next((i for i, rooms in enumerate(FLOORS) if room in rooms), len(FLOORS) if name == "minipeft" else -1)


def test_every_file_has_a_floor():
    assert [name for name in FILES if floor(name) < 0] == []


def test_no_circle():
    """Peels off, again and again, the files that import nothing which is left."""
    left = dict(GRAPH)
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert left == {}, f"these import one another in a circle: {sorted(left)}"


def test_no_arrow_runs_up():
    up = [f"{a} -> {b}" for a, needs in GRAPH.items() for b in needs if floor(b) > floor(a)]
    # A lesson's cell says `minipeft`, which stands above all rooms; the sweep finds its methods there by name.
    assert [each for each in up if not each.endswith("-> minipeft")] == []


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_in_a_sitting(name):
    lines = len(FILES[name].read_text(encoding="utf-8").splitlines())
    assert lines <= 450, f"{name} has {lines} lines; split it along its jobs"
