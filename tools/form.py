"""Which elements of a lesson's form each lesson has: `python tools/form.py [lesson …]`; status 1 where one is missing.

Only what a machine can see is looked at. Whether the question is a good one, a prediction has one answer, and the three
sentences are worth remembering, a reader says.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "book"))

from fold import FENCE, answers, asks, headings  # noqa: E402

from minipeft.course.lessons import unfolded  # noqa: E402

MOST_CELLS, MOST_WORDS = 32, 20  # of a lesson; of its median sentence
LINK = re.compile(r"\]\(([^)\s]+)\)")
NO_SENTENCE = re.compile(r"\$\$.*?\$\$|^(?:#|\||    |\*\*Sources).*?(?=\n\n|\Z)|<[^>]+>", re.MULTILINE | re.DOTALL)


@dataclass
class Lesson:
    """A notebook with the views of it that the elements ask for."""

    path: Path
    cells: list

    @classmethod
    def read(cls, path: Path) -> Lesson:
        return cls(path.resolve(), nbformat.read(path, as_version=4).cells)

    @property
    def opening(self) -> str:
        return self.cells[0].source

    @property
    def prose(self) -> str:
        """All markdown, without what stands in blocks of code."""
        return "\n\n".join(FENCE.sub("", cell.source) for cell in self.cells if cell.cell_type == "markdown")

    @property
    def code(self) -> str:
        return "\n".join(cell.source for cell in self.cells if cell.cell_type == "code")

    def section(self, name: str) -> str:
        """The prose below the last heading that contains `name`; "" where there is none."""
        pattern = rf"^#+ [^\n]*{name}[^\n]*\n(.*?)(?=^#|\Z)"
        return ([""] + re.findall(pattern, self.prose, re.MULTILINE | re.DOTALL | re.IGNORECASE))[-1]

    def links(self, text: str) -> list[Path]:
        """The files that relative links lead to, whether they exist or not."""
        found = [link.partition("#")[0] for link in LINK.findall(text)]
        return [(self.path.parent / link).resolve() for link in found if link and not re.match(r"[a-z]+:", link)]


def neighbours(lesson: Lesson) -> bool:
    """The title's cell or the next one links to the lessons that stand before and after in the folder."""
    every = [path.resolve() for path in sorted(lesson.path.parent.glob("*.ipynb"))]
    here = every.index(lesson.path)
    return {*every[max(here - 1, 0) : here], *every[here + 1 : here + 2]} <= set(
        lesson.links("".join(cell.source for cell in lesson.cells[:2]))
    )


def three_goals(lesson: Lesson) -> bool:
    listed = lesson.opening.partition("you can")[2].strip().partition("\n\n")[0]
    return len(re.findall(r"^[-*] ", listed, re.MULTILINE)) == 3


def hidden(lesson: Lesson) -> bool:
    """Each prediction has an answer, and Lab opens the lesson with all of them hidden, sliders apart."""
    found = [[cell for cell in cells if "Explorer(" not in cell.source] for cells in answers(lesson.cells)]
    marked = [cell.metadata.get("jupyter", {}).get("outputs_hidden") for cells in found for cell in cells]
    return bool(found) and all(marked)


def compared(lesson: Lesson) -> bool:
    """Below “came out here” a table of three columns or more without an empty field, written or computed."""
    lines = re.findall(r"^\|(.+)\|\s*$", lesson.section("came out"), re.MULTILINE)
    rows = [[field.strip() for field in line.split("|")] for line in lines]
    written = len(rows) > 2 and all(len(row) >= 3 and all(row) for row in rows)
    below, computed = False, False
    for cell in lesson.cells:
        below = "came out" in headings(cell)[-1] if headings(cell) else below
        computed |= below and any("text/html" in output.get("data", {}) for output in cell.get("outputs", []))
    return written or computed


def there_and_back(lesson: Lesson) -> bool:
    """A link to an exercise whose notebook links to this lesson."""
    found = [Lesson.read(path) for path in lesson.links(lesson.prose) if "exercises" in path.parts and path.exists()]
    return any(lesson.path in exercise.links(exercise.prose) for exercise in found)


def three_sentences(lesson: Lesson) -> bool:
    """Below “Remember”, before questions, sources and whatever else is set in bold."""
    words = re.split(r"<details>|^\*\*", lesson.section("remember"), flags=re.MULTILINE)[0]
    return len(re.findall(r"[.!?](?=\s|\Z)", re.sub(r"^\d+\. ", "", words, flags=re.MULTILINE))) == 3


def sentences(lesson: Lesson) -> list[str]:
    """Of the prose, without headings, tables, code, displayed formulas and sources; a formula in a line is one word."""
    cells = [
        cell for cell in lesson.cells if not {"where-you-are", "where-next", "map"} & {*cell.metadata.get("tags", ())}
    ]
    text = re.sub(r"\$[^$]+\$", "x", NO_SENTENCE.sub("\n\n", Lesson(lesson.path, cells).prose))
    found = re.split(r"(?<=[.!?:])[*\"”)]*\s+(?=[A-ZΑ-Ω*`\"“(])|\n\n+|^ *(?:[-*]|\d+\.) ", text, flags=re.MULTILINE)
    return [sentence for sentence in found if re.search(r"\w", sentence)]


def plain(lesson: Lesson) -> bool:
    lengths = [len(sentence.split()) for sentence in sentences(lesson)]
    return not lengths or statistics.median(lengths) <= MOST_WORDS


def unexplained(lesson: Lesson) -> list[str]:
    """The terms for which the glossary leads to this lesson and which do not stand in bold in it."""
    path = lesson.path.parents[1] / "docs" / "glossary.md"
    rows = re.findall(
        r"^\| (.+?) \|.*/(\w+)\.ipynb\) \|$", path.read_text("utf-8") if path.exists() else "", re.MULTILINE
    )
    bold = re.sub(r"\s+", " ", "|".join(re.findall(r"\*\*(.+?)\*\*", lesson.prose, re.DOTALL))).lower()
    return [
        term for term, stem in rows if stem == lesson.path.stem and not any(w in bold for w in term.lower().split(", "))
    ]


ELEMENTS: dict[str, tuple[str, Callable[[Lesson], bool]]] = {
    "question": ("the title ends with a question", lambda at: at.opening.partition("\n")[0].rstrip().endswith("?")),
    "around": ("the lessons before and after are linked at the top", neighbours),
    "goals": ("three lines say what you can do afterwards", three_goals),
    "see": ("something comes out in the first six cells", lambda at: any(cell.get("outputs") for cell in at.cells[:6])),
    "predict": ("a prediction is asked for", lambda at: any(asks(cell) for cell in at.cells)),
    "hidden": ("the answers of the predictions are committed with their outputs hidden", hidden),
    "source": ("the package's own code is shown", lambda at: "getsource" in at.code),
    "knob": ("a slider", lambda at: bool(re.search(r"(Explorer|SliderPlot|Calculator|Monitor)\(", at.code))),
    "table": ("a filled table of what was reported, expected, and came out here", compared),
    "breaks": ("a section “Where it breaks”", lambda at: bool(at.section("where it breaks"))),
    "exercise": ("a link to an exercise that links back", there_and_back),
    "remember": ("three sentences to remember", three_sentences),
    "check": (
        "two questions whose answers unfold",
        lambda at: len(re.findall(r"<summary>(?:(?!</summary>).)*\?", at.prose)) >= 2,
    ),
    "sources": ("the sources are named", lambda at: "**Sources" in at.prose),
    "links": ("every link leads to a file", lambda at: all(path.exists() for path in at.links(at.prose))),
    "sentences": (f"the median sentence has at most {MOST_WORDS} words", plain),
    "terms": ("each term for which the glossary leads here stands in bold", lambda at: not unexplained(at)),
    "cells": (f"at most {MOST_CELLS} cells, without what is folded", lambda at: len(unfolded(at.cells)) <= MOST_CELLS),
}


# Where an element makes no sense, and why.
NOT_HERE = {
    ("17_claims", "knob"): "a list of verdicts has nothing that moves; sliders stand where the claims were measured",
    ("17_claims", "table"): "the ledger itself is that table: the claim, what was measured, and the verdict",
    ("17_claims", "exercise"): "each claim is exercised in the assignment of the lesson that measures it",
}


def missing(lesson: Lesson) -> list[str]:
    """The names of the elements that this lesson lacks."""
    return [name for name, (_, has) in ELEMENTS.items() if (lesson.path.stem, name) not in NOT_HERE and not has(lesson)]


def main(paths: list[Path]) -> int:
    lacks = {path.stem: missing(Lesson.read(path)) for path in paths}
    width = max(map(len, lacks))
    print(" " * width, *ELEMENTS)
    for stem, names in lacks.items():
        signs = {name: "–" if name in names else "○" if (stem, name) in NOT_HERE else "✓" for name in ELEMENTS}
        print(f"{stem:{width}}", *(f"{sign:^{len(name)}}" for name, sign in signs.items()))
    print()
    for name, (what, _) in ELEMENTS.items():
        without = [stem[:2] for stem, names in lacks.items() if name in names]
        print(f"{name}: {what}.", f"Missing in {', '.join(without)}." if without else "All have it.")
    for path in paths:
        if terms := unexplained(Lesson.read(path)):
            print(f"{path.stem[:2]} does not explain: {', '.join(terms)}.")
    for (stem, name), why in NOT_HERE.items():
        if stem in lacks:
            print(f"○ {stem[:2]} needs no {name}: {why}.")
    whole = [stem for stem, names in lacks.items() if not names]
    print(f"\n{len(whole)} of {len(lacks)} lessons have every element{': ' * bool(whole)}{', '.join(whole)}.")
    return int(len(whole) < len(lacks))


if __name__ == "__main__":
    sys.exit(main([Path(name) for name in sys.argv[1:]] or sorted(ROOT.glob("notebooks/*.ipynb"))))
