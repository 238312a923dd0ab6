"""What a lesson's predictions hide: where the learner is asked to predict, the answer's outputs are folded."""

from __future__ import annotations

import re

FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#{1,6} +(.+)$", re.MULTILINE)


def headings(cell) -> list[str]:
    """The headings of a cell; a comment in a block of code is none."""
    return HEADING.findall(FENCE.sub("", cell.source)) if cell.cell_type == "markdown" else []


def asks(cell) -> bool:
    """Whether the cell asks for a prediction."""
    return cell.cell_type == "code" and "Predict(" in cell.source and bool(cell.outputs)


def answers(cells: list) -> list[list]:
    """For each prediction the cells whose outputs hold its answer: those up to the next heading.

    A section without any output holds no answer: then all to the end of the first one with a picture or a table.
    """
    found, current, own, answered = [], None, True, False
    for cell in cells:
        if asks(cell):
            current, own, answered = [], True, False
            found.append(current)
        elif headings(cell):
            current, own = None if answered else current, False
        elif current is not None and cell.cell_type == "code" and cell.outputs:
            current.append(cell)
            shown = any({"image/png", "text/html"} & output.get("data", {}).keys() for output in cell.outputs)
            answered |= own or shown
    return found
