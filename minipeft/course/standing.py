"""Where a learner stands: the last outcome of each exercise and the answers that were tried, in one JSON file.

A try is a wrong answer that is not the one tried just before, so that Run All counts nothing twice.
"""

from __future__ import annotations

import hashlib
import html
import inspect
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from minipeft.course.exercises import exercises
from minipeft.course.verdict import CORRECT, NOT_ATTEMPTED, SIGNS, Exercise, Shown
from minipeft.whole import write_whole


@dataclass(frozen=True)
class Standing:
    outcome: str = NOT_ATTEMPTED
    tries: int = 0
    last: str = ""  # a number of the answer that was tried last


def store() -> Path:
    """The file, in the user's data folder."""
    from platformdirs import user_data_path

    return Path(os.environ.get("MINIPEFT_PROGRESS") or user_data_path("minipeft") / "progress.json")


def standings() -> dict[str, Standing]:
    """{exercise: where it stands}; {} when nothing is known, or the file is damaged."""
    try:
        found = json.loads(store().read_text(encoding="utf-8"))
        return {str(name): standing(value) for name, value in found.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def standing(value: dict | str) -> Standing:
    """Of one entry of the file, which once held the outcome alone."""
    if isinstance(value, str):
        return Standing(value, int(value not in (CORRECT, NOT_ATTEMPTED)))
    return Standing(str(value["outcome"]), int(value["tries"]), str(value["last"]))


def remember(name: str, outcome: str, objects: tuple = ()) -> Standing:
    """Keeps an outcome and counts the try; a learner who may not write there does without."""
    known = standings()
    before, answer = known.get(name, Standing()), number(objects)
    failed = outcome not in (CORRECT, NOT_ATTEMPTED)
    tries = before.tries + (failed and (not answer or answer != before.last))
    now = Standing(outcome, tries, answer if failed else before.last)
    try:
        write_whole(store(), json.dumps({k: asdict(v) for k, v in (known | {name: now}).items()}, indent=1))
    except OSError:
        pass
    return now


def number(objects: tuple) -> str:
    """A number of the text of an answer; "" where Python does not know it."""
    try:
        return hashlib.sha256("\0".join(map(inspect.getsource, objects)).encode()).hexdigest()[:16]
    except (OSError, TypeError):
        return ""


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------
def table(assignment: str | None = None) -> Shown:
    """The exercises of one assignment with their outcomes, and how many of each assignment are right; as text and HTML.

    ValueError for an assignment that there is not.
    """
    every, known = exercises(), standings()
    if assignment is not None and assignment not in every:
        raise ValueError(f"There is no assignment {assignment!r}; there is {', '.join(every)}.")
    here = every[assignment].values() if assignment else ()
    links = links_in(Path(f"{assignment}.ipynb"))
    rows = [row(f"{i} · {each.title}", known.get(each.name, Standing()), links) for i, each in enumerate(here, 1)]
    counts = [count(name, several, known) for name, several in every.items()]
    parts = [(("Exercise", "Outcome", "Wrong answers"), rows)] if assignment else []
    parts += [(("Assignment", "Correct", ""), counts)]
    text = [f"{cells[0][0]:<42} {cells[1]:<16} {cells[2]}".rstrip() for _, lines in parts for cells in lines]
    return Shown({"text/plain": "\n".join(text), "text/html": "".join(as_html(*part) for part in parts)})


def links_in(notebook: Path) -> dict[str, str]:
    """{heading: a link to its cell, as JupyterLab follows it} of the notebook beside the kernel; {} without one."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        first = {"".join(cell["source"]).partition("\n")[0]: cell.get("id") for cell in cells}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}
    return {line[3:]: f"{notebook}#cell-id={name}" for line, name in first.items() if line.startswith("## ") and name}


def row(heading: str, now: Standing, links: dict[str, str]) -> tuple[tuple[str, str], str, str]:
    return (heading, links.get(heading, "")), f"{SIGNS.get(now.outcome, '!')} {now.outcome}", str(now.tries or "")


def count(name: str, several: dict[str, Exercise], known: dict[str, Standing]) -> tuple[tuple[str, str], str, str]:
    right = sum(known.get(each, Standing()).outcome == CORRECT for each in several)
    file = Path("..", name, f"{name}.ipynb")
    link = file.as_posix() if file.is_file() else ""
    return (name, link), f"{right} of {len(several)}", "●" * right + "○" * (len(several) - right)


def as_html(head: tuple[str, ...], lines: list[tuple[tuple[str, str], str, str]]) -> str:
    def cell(kind: str, text: str) -> str:
        return f'<{kind} style="text-align:left">{text}</{kind}>'

    def linked(text: str, link: str) -> str:
        text = html.escape(text)
        return f'<a href="{html.escape(link)}">{text}</a>' if link else text

    top = "".join(cell("th", text) for text in head)
    body = "".join(f"<tr>{cell('td', linked(*a))}{cell('td', b)}{cell('td', c)}</tr>" for a, b, c in lines)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
