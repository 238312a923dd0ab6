"""What a student must not change comes from the source: locked cells, tests and points are put back."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from functools import cache

import nbformat

from minipeft.course import assignments

VALUES, CELLS = 1_000_000, 1_000  # that are read of one file: brackets and commas, and cells
CELL = {
    "code": {"cell_type": "code", "outputs": [], "execution_count": None},
    "markdown": {"cell_type": "markdown"},
    "raw": {"cell_type": "raw"},
}


@cache
def source_text(assignment: str) -> str:
    return assignments.sources()[assignment].read_text(encoding="utf-8")


@cache
def source_of(assignment: str):
    """The notebook in solutions/; nobody changes it."""
    return nbformat.reads(source_text(assignment), as_version=4)


@cache
def released_of(assignment: str):
    """The notebook that is handed out; nobody changes it."""
    return nbformat.reads(assignments.release(assignments.sources()[assignment]), as_version=4)


def source_names(assignment: str) -> set[str]:
    """The names of an assignment's cells."""
    return {name for cell in source_of(assignment).cells if (name := name_of(cell))}


def read(text: str):
    """A notebook of nbformat 4 from a stranger's text of nbformat 3 or 4, without outputs: each cell a kind, a text and
    a dictionary of metadata. ValueError says in one sentence what is wrong with it."""
    if (values := sum(map(text.count, "[{,"))) > VALUES:
        raise ValueError(f"The file is not read: it has {values:,} values, and a notebook no more than {VALUES:,}.")
    try:
        found = json.loads(text)
        sheets = found["worksheets"] if "worksheets" in found else [found]  # the former in nbformat 3
        cells = [taken(cell) for sheet in sheets for cell in sheet["cells"]]
    except Exception as error:  # whatever the parsers meet
        said = str(error)[:120].encode("utf-8", "replace").decode()
        raise ValueError(f"The file is not a notebook ({type(error).__name__}: {said}).") from error
    if len(cells) > CELLS:
        raise ValueError(f"The file is not read: it has {len(cells):,} cells, and a notebook no more than {CELLS:,}.")
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.from_dict(CELL[k] | {"source": s, "metadata": m}) for k, s, m in cells]
    return notebook


def taken(cell: dict) -> tuple[str, str, dict]:
    """(kind, text, metadata) of a cell of nbformat 3 or 4, where code was called input, and headings were cells."""
    kind = cell["cell_type"] if cell["cell_type"] in CELL else "markdown"
    metadata = cell.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise TypeError("a cell's metadata is no dictionary")
    return kind, joined(cell["source"] if "source" in cell else cell["input"]), metadata


def joined(source: str | list[str]) -> str:
    """A cell's text with one kind of line end, and without halves of surrogate pairs, which no file can hold."""
    if not isinstance(source, str | list):
        raise TypeError("a cell has no text")
    text = "".join(source)
    return text.encode("utf-8", "replace").decode().replace("\r\n", "\n").replace("\r", "\n")


def mend(submitted, assignment: str):
    """(a notebook with every cell of the source and all of the student's code, in the student's order; remarks).

    Cells that the student may edit keep the student's text, and so do cells that the student added. Every other cell is
    taken from the source, once: changed ones are restored, deleted ones put back, copies taken out.
    """
    original = {name_of(cell): cell for cell in source_of(assignment).cells if name_of(cell)}
    titles = {cell.source.strip(): name for name, cell in original.items() if locked(cell)}
    released = released_of(assignment)
    titles |= {cell.source.strip(): name_of(cell) for cell in released.cells if name_of(cell) and locked(cell)}
    plain = {cell.source.strip() for cell in released.cells if not name_of(cell)}
    known = {name_of(cell) for cell in submitted.cells}
    cells, seen, remarks = [], [], []
    if not known & set(original):
        remarks.append("The cells have lost their names, and were recognised by what stands in them.")
    for cell in submitted.cells:
        name = name_of(cell) or titles.get(cell.source.strip()) or defines(cell, set(original) - known)
        if cell.source.strip() in plain and cell.cell_type == "markdown":
            continue  # the course's own prose
        if name not in original:
            cells.append(fresh(cell))
        elif name not in seen:
            seen.append(name)
            cells.append(restored(original[name], cell, released, remarks))
        elif locked(original[name]):
            remarks.append(f"A copy of the cell {name} was taken out.")
        else:
            remarks.append(f"A second cell {name} counts as an added cell.")
            cells.append(fresh(cell))
    order = [name for name in original if name in seen]
    if seen != order:
        first, then = next((a, b) for a, b in zip(seen, order, strict=True) if a != b)
        remarks.append(f"The cells stand in another order than they were handed out in: {first} comes before {then}.")
    missing = [name for name in original if name not in seen]
    setup = [n for n in missing if locked(original[n]) and not is_test(original[n])]
    later = [n for n in missing if n not in setup]
    for name in missing:
        remarks.append(f"The cell {name} was missing and has been put back.")
    blank = "# No cell with this name was handed in."
    cells[:0] = [deepcopy(original[n]) for n in setup]
    cells += [deepcopy(original[n]) if locked(original[n]) else blanked(original[n], blank) for n in later]
    mended = nbformat.v4.new_notebook()
    mended.cells = cells
    assignments.tidy(mended)
    return mended, remarks


def restored(original, cell, released, remarks: list[str]):
    """The source's cell, with the student's text if the student may edit it."""
    name, new = name_of(original), deepcopy(original)
    if locked(original):
        given = next(c for c in released.cells if name_of(c) == name)
        if cell.source.strip() not in (given.source.strip(), original.source.strip()):
            remarks.append(f"The cell {name} was changed and has been restored.")
    else:
        new.source = cell.source
    before = cell.metadata.get("nbgrader")
    if isinstance(before, dict) and before.get("points", 0) != original.metadata.nbgrader.get("points", 0):
        remarks.append(f"The marks of the cell {name} were changed and have been restored.")
    return new


def defines(cell, names: set[str]) -> str | None:
    """The one of these names that the cell defines as a function or class, if it is a cell without a name."""
    found = re.findall(r"^(?:def|class) (\w+)", cell.source, re.MULTILINE) if cell.cell_type == "code" else []
    return next((name for name in found if name in names), None)


def fresh(cell):
    new = nbformat.from_dict({k: cell[k] for k in ("cell_type", "source")} | {"metadata": {}})
    if new.cell_type == "code":
        new |= {"outputs": [], "execution_count": None}
    return nbformat.from_dict(new)


def blanked(cell, text: str):
    new = deepcopy(cell)
    new.source = text
    return new


def name_of(cell) -> str | None:
    data = cell.metadata.get("nbgrader")
    name = data.get("grade_id") if isinstance(data, dict) else None
    return name if isinstance(name, str) else None


def locked(cell) -> bool:
    return not cell.metadata.nbgrader.get("solution")


def is_test(cell) -> bool:
    return bool(cell.metadata.get("nbgrader", {}).get("grade"))


def exercise_of(cell) -> str:
    return name_of(cell).removeprefix("test_")
