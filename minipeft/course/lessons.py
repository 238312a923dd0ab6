"""The lessons in their order, and what each says of itself: where you are, how long it takes, what comes next.

One list, from which the strip at the top of a lesson, the links at its end and the README's table are written, so that
they agree. `python -m minipeft.course.lessons` writes them again; so does executing a lesson.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from minipeft.whole import write_whole

WHERE, NEXT, MAP = "where-you-are", "where-next", "map"  # the tags of the cells that are written from here
FURTHER, FOLDED = "## Going further", "jp-MarkdownHeadingCollapsed"  # a heading, and what makes JupyterLab fold it
WEEKEND = ("00", "01", "06", "10", "16", "18")  # the short way through
WORDS, LINES, KNOB = 130, 12, 3  # read in a minute, of text and of code; minutes that a slider or a prediction takes


@dataclass(frozen=True)
class Lesson:
    file: str
    title: str
    question: str
    needs: str  # what to have read before
    assignments: tuple[str, ...] = ()

    @property
    def number(self) -> str:
        return self.file[:2]


LESSONS = (
    Lesson(
        "00_start_here",
        "Start here",
        "What does an adapter change, and what does it leave alone?",
        "PyTorch's `nn.Linear` and a training loop",
    ),
    Lesson(
        "01_why_peft",
        "Why PEFT",
        "What does full fine-tuning cost, and what do few parameters save?",
        "00",
        ("budget",),
    ),
    Lesson(
        "02_choose_parameters", "Choosing parameters", "Which of a model's own numbers should move?", "00", ("select",)
    ),
    Lesson(
        "03_adapters",
        "Adapters",
        "How small can a network between the layers be, and where should it sit?",
        "00",
        ("adapters",),
    ),
    Lesson("04_prompts", "Prompts", "How far do words, or vectors, before the text get you?", "00", ("prompts",)),
    Lesson(
        "05_prefixes", "Prefixes", "What if every layer had something of its own to look back at?", "04", ("prefixes",)
    ),
    Lesson("06_lora", "LoRA", "How much of an update do you need, and what do rank and γ do?", "00", ("lora",)),
    Lesson(
        "07_rank_and_svd",
        "Rank and SVD",
        "Is what fine-tuning changes low-rank, and does the model agree?",
        "06, and what a singular value is",
        ("rank",),
    ),
    Lesson(
        "08_lora_family",
        "The LoRA family",
        "Which of LoRA's descendants earns its keep at its own best learning rate?",
        "06",
        ("lora_family",),
    ),
    Lesson(
        "09_quantisation",
        "Quantisation",
        "What do four bits a number lose, and what does QLoRA save?",
        "06",
        ("quantisation",),
    ),
    Lesson("10_lora_vs_full", "LoRA against full", "At which learning rate is a comparison fair?", "06", ()),
    Lesson("11_distillation", "Distillation", "What can a teacher give that labels do not?", "06", ("distillation",)),
    Lesson("12_serving", "Serving", "One base, many adapters: one batch, or one after another?", "06", ("serving",)),
    Lesson("13_feedback", "What LoRA is not", "When a score rises, do the texts get better?", "06", ("feedback",)),
    Lesson(
        "14_changing_worlds",
        "Changing worlds",
        "What does an adapter do when the data drift, differ, or may not leave home?",
        "06",
        ("worlds",),
    ),
    Lesson("15_beyond_text", "Beyond text", "Does the same `attach` work on pictures and on speech?", "03 and 06"),
    Lesson(
        "16_capstone",
        "Capstone",
        "Which of four methods would you ship for real reviews?",
        "02, 03 and 06",
        ("capstone",),
    ),
    Lesson("17_claims", "The claims ledger", "Which statements of five documents hold?", "any of the others"),
    Lesson(
        "18_your_model", "Your own model", "What do you try first, and how do you know that it worked?", "06 and 10"
    ),
    Lesson(
        "19_recommender",
        "Recommending from text",
        "What does a text know that other people's taste does not?",
        "06, 12 and 16",
    ),
    Lesson(
        "20_opinion_monitor",
        "Opinion monitor",
        "When has opinion turned, and how often is the alarm a false one?",
        "14 and 16",
    ),
)


KNOBS = re.compile(r"mp\.\w*Explorer\(|mp\.Predict\(|MemoryCalculator\(|mp\.Preferences\(")


def unfolded(cells) -> list:
    """The cells that JupyterLab shows of an opened lesson: all but those between FURTHER and the next `##`."""
    shown, folded = [], False
    for cell in cells:
        heading = re.search(r"^##? .*", cell.source, re.MULTILINE) if cell.cell_type == "markdown" else None
        starts = heading is not None and heading[0].startswith(FURTHER)
        folded = folded and heading is None
        if not folded:
            shown.append(cell)
        folded |= starts
    return shown


def minutes(cells) -> int:
    """How long a lesson takes without what is folded, to five minutes: words, lines of code, sliders, predictions."""
    total = 0.0
    for cell in unfolded(cells):
        if set(cell.metadata.get("tags", ())) & {WHERE, NEXT, MAP}:
            continue
        if cell.cell_type == "markdown":
            shown = re.sub(r"<details>.*?</details>", "", cell.source, flags=re.DOTALL)
            total += len(shown.split()) / WORDS
        else:
            total += len(cell.source.splitlines()) / LINES
            total += KNOB * len(KNOBS.findall(cell.source))
    return max(5, 5 * round(total / 5))


def link(lesson: Lesson) -> str:
    return f"[{lesson.number} · {lesson.title}]({lesson.file}.ipynb)"


def strip(lesson: Lesson, cells) -> str:
    """The cell under the title."""
    at = LESSONS.index(lesson)
    around = [f"← {link(LESSONS[at - 1])}"] if at else []
    around += [f"**{minutes(cells)} minutes**", f"you need {lesson.needs}"]
    around += ["exercises " + " and ".join(map(exercise, lesson.assignments))] if lesson.assignments else []
    around += [f"{link(LESSONS[at + 1])} →"] if at + 1 < len(LESSONS) else []
    return " | ".join(around)


def exercise(name: str) -> str:
    return f"[{name}](../exercises/{name}/{name}.ipynb)"


def footer(lesson: Lesson) -> str:
    """The last cell."""
    at = LESSONS.index(lesson)
    lines = [f"**Write it yourself:** {' and '.join(map(exercise, lesson.assignments))}."] if lesson.assignments else []
    if at + 1 < len(LESSONS):
        after = LESSONS[at + 1]
        lines.append(f"**Next:** {link(after)}. {after.question}")
    else:
        lines.append(f"**Back to the start:** {link(LESSONS[0])}.")
    return "\n\n".join(lines)


def of(path: Path) -> Lesson | None:
    return next((lesson for lesson in LESSONS if lesson.file == path.stem), None)


def signpost(notebook, lesson: Lesson) -> None:
    """Writes both cells of the notebook, folds FURTHER, and hides what a prediction would have to be made without: the
    outputs from a `Predict` to the end of its section or, where that has none, of the first with a picture or a table.
    They come back when their cells are run."""
    import nbformat

    cells = [cell for cell in notebook.cells if not set(cell.metadata.get("tags", ())) & {WHERE, NEXT}]
    new = nbformat.v4.new_markdown_cell
    first = new(strip(lesson, cells), metadata={"tags": [WHERE]})
    last = new(footer(lesson), metadata={"tags": [NEXT]})
    notebook.cells = [cells[0], first, *cells[1:], last]
    asked = here = answered = False  # here: still in the section of the question
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{i}"
        cell.metadata.pop("jupyter", None)
        cell.metadata.pop(FOLDED, None)
        if cell.cell_type == "markdown":
            if cell.source.startswith(FURTHER):
                cell.metadata[FOLDED] = True
            if re.search(r"^#", cell.source, re.MULTILINE):
                asked, here = asked and not answered, False
        elif "mp.Predict(" in cell.source:
            asked, here, answered = True, True, False
        elif asked and cell.outputs and "Explorer(" not in cell.source:
            cell.metadata["jupyter"] = {"outputs_hidden": True}
            seen = any({"image/png", "text/html"} & output.get("data", {}).keys() for output in cell.outputs)
            answered = answered or here or seen


def measured_minutes() -> dict[str, int]:
    """{file: minutes} of all lessons."""
    import nbformat

    cells = {lesson.file: nbformat.read(f"notebooks/{lesson.file}.ipynb", as_version=4).cells for lesson in LESSONS}
    return {name: minutes(each) for name, each in cells.items()}


def table() -> str:
    """The README's."""
    took = measured_minutes()
    rows = ["| lesson | question | minutes |", "|---|---|---|"]
    for lesson in LESSONS:
        name = f"[{lesson.number} · {lesson.title}](notebooks/{lesson.file}.ipynb)"
        rows.append(f"| {name} | {lesson.question} | {took[lesson.file]} |")
    return "\n".join(rows)


def course_map() -> str:
    """The first lesson's: every lesson with what it asks and needs, and two ways through."""
    took = measured_minutes()
    rows = ["| lesson | question | minutes | you need | exercises |", "|---|---|---|---|---|"]
    for lesson in LESSONS:
        written = " and ".join(map(exercise, lesson.assignments))
        rows.append(f"| {link(lesson)} | {lesson.question} | {took[lesson.file]} | {lesson.needs} | {written} |")
    short = [lesson for lesson in LESSONS if lesson.number in WEEKEND]
    hours = [round(sum(took[lesson.file] for lesson in some) / 60) for some in (short, LESSONS)]
    return "\n\n".join(
        [
            "## The map",
            "\n".join(rows),
            f"**A weekend**, about {hours[0]} hours: {' → '.join(map(link, short))}. Write the exercises "
            f"{exercise('lora')} and {exercise('capstone')} on the way.",
            f"**A term**, about {hours[1]} hours of lessons: one lesson a week in the order of the table, and its "
            "exercises in the week after it.",
        ]
    )


def main() -> None:
    import nbformat

    for lesson in LESSONS:
        path = Path("notebooks") / f"{lesson.file}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        signpost(notebook, lesson)
        for cell in notebook.cells:
            if MAP in cell.metadata.get("tags", ()):
                cell.source = course_map()
        write_whole(path, nbformat.writes(notebook).rstrip("\n") + "\n")
    readme = Path("README.md")
    text = readme.read_text(encoding="utf-8")
    write_whole(readme, re.sub(r"\| lesson \| question.*?\n\n", lambda _: table() + "\n\n", text, flags=re.DOTALL))


if __name__ == "__main__":
    main()
