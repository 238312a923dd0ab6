"""A small table for a notebook: it takes its colours from the page, so that it reads in a light and in a dark theme."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def table(caption: str, rows: Iterable[Sequence[object]], head: Sequence[str] = ()) -> str:
    """HTML; the first cell of each row is its name, and what stands in the others is aligned to the right."""
    style = 'style="text-align:{}"'
    names = "".join(
        f'<th scope="col" {style.format("right" if i else "left")}>{escape(h)}</th>' for i, h in enumerate(head)
    )
    body = "".join(
        f'<tr><th scope="row" {style.format("left")}>{escape(str(first))}</th>'
        + "".join(f"<td {style.format('right')}>{escape(str(cell))}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    top = f"<thead><tr>{names}</tr></thead>" if head else ""
    return f"<table><caption {style.format('left')}>{escape(caption)}</caption>{top}<tbody>{body}</tbody></table>"
