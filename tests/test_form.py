"""The form of lessons: one that has everything lacks nothing, and each element that is taken away is missed alone."""

import re
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import form  # noqa: E402

OPENING = """# 02 · Two: what is in the middle?

After this lesson you can
- see;
- say;
- do.

Before: [one](01_one.ipynb). After: [three](03_three.ipynb)."""
CLOSING = """## Reported, expected, came out here

| reported | expected | came out here |
|---|---|---|
| a | b | c |
| d | e | f |

## Where it breaks

At 2.5 of three.

## Now write it

The assignment [two](../exercises/two/two.ipynb).

## Remember

1. First 0.5.
2. Second: `x.y`.
3. Third!

<details><summary>Why?</summary>Because. It is.</details>
<details><summary>And <b>how</b>?</summary>So.</details>

**Sources.** Somebody 2020."""
PICTURE = {"image/png": "iVBORw0KGgo="}
CODE = ["mp.Predict(…)", "mp.evaluate(model)", "mp.LoRAExplorer(model)", "print(inspect.getsource(LoRALayer))"]


@pytest.fixture
def lesson(tmp_path):
    """lesson(old, new): a whole lesson in which `old` is replaced, everywhere, by `new`; what it then lacks."""

    def write(name: str, *cells) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nbformat.v4.new_notebook(cells=list(cells)), path)
        return path

    def lacks(old="", new="", hide=True, back="../../notebooks/02_two.ipynb", more=0, folded=0):
        def text(source: str):
            return nbformat.v4.new_markdown_cell(source.replace(old, new) if old else source)

        cells = []
        for source in CODE:
            output = nbformat.v4.new_output("display_data", data=PICTURE)
            cells.append(nbformat.v4.new_code_cell(source.replace(old, new) if old else source, outputs=[output]))
        cells[1].metadata["jupyter"] = {"outputs_hidden": hide}
        write("exercises/two/two.ipynb", nbformat.v4.new_markdown_cell(f"[two]({back})"))
        for other in ("01_one", "03_three"):
            write(f"notebooks/{other}.ipynb", nbformat.v4.new_markdown_cell(f"# {other}"))
        looked = [*cells[:2], text("## The mechanism"), *cells[2:], *(text("More.") for _ in range(more))]
        looked += [text("## Going further")] * bool(folded) + [text("### And further") for _ in range(folded)]
        path = write("notebooks/02_two.ipynb", text(OPENING), *looked, text(CLOSING))
        return form.missing(form.Lesson.read(path))

    return lacks


def test_a_whole_lesson_lacks_nothing(lesson):
    assert lesson() == []
    assert lesson(more=form.MOST_CELLS - 7) == []


@pytest.mark.parametrize(("old", "new", "element"), [
    ("middle?", "middle", "question"), ("[three](03_three.ipynb)", "three", "around"), ("- do.", "do.", "goals"),
    ("LoRAExplorer(model)", "evaluate(model)", "knob"), ("getsource", "getfile", "source"), ("| f |", "| |", "table"),
    ("| f |", "|", "table"), ("Where it breaks", "Limits", "breaks"), ("Third!", "Third", "remember"),
    ("Third!", "Third! Fourth.", "remember"), ("Why?", "Why.", "check"), ("**Sources.** ", "", "sources"),
    ("At 2.5", "At [2.5](../gone.md)", "links"),
])  # fmt: skip
def test_what_is_taken_away_is_missed_alone(lesson, old, new, element):
    assert lesson(old, new) == [element]


def test_answers_exercises_and_length_are_looked_at(lesson):
    assert lesson(hide=False) == ["hidden"]
    assert lesson("mp.evaluate(", "mp.AdapterExplorer(", hide=False) == [], "a slider is there to be moved"
    assert lesson("Predict(", "Say(") == ["predict", "hidden"]
    assert lesson(back="../../notebooks/01_one.ipynb") == ["exercise"]
    assert lesson("../exercises/two/two.ipynb", "../notebooks/01_one.ipynb") == ["exercise"]
    assert lesson(more=form.MOST_CELLS - 6) == ["cells"]
    assert lesson(more=form.MOST_CELLS - 8, folded=50) == []
    assert lesson(more=form.MOST_CELLS - 7, folded=50) == ["cells"], "the heading itself is seen"


def test_what_is_said_to_make_no_sense_is_not_there():
    for (stem, name), why in form.NOT_HERE.items():
        lesson = form.Lesson.read(ROOT / "notebooks" / f"{stem}.ipynb")
        assert why and not form.ELEMENTS[name][1](lesson), (stem, name)
        assert name not in form.missing(lesson)


def test_it_prints_a_row_for_each_lesson_and_says_who_lacks_what(lesson, tmp_path, capsys):
    lesson("Third!", "Third")
    assert form.main(sorted(tmp_path.glob("notebooks/02*.ipynb"))) == 1
    said = capsys.readouterr().out
    assert re.search(r"^02_two +✓.*–.*✓ *$", said, re.MULTILINE)
    assert "three sentences to remember. Missing in 02." in said and "0 of 1 lessons" in said


@pytest.mark.parametrize("path", sorted(ROOT.glob("notebooks/*.ipynb")), ids=lambda path: path.stem)
def test_no_lesson_lacks_anything(path):
    assert form.missing(form.Lesson.read(path)) == []


LONG = "This " + "very " * 20 + "long sentence ends."


def test_the_median_sentence_is_short_and_only_sentences_count(lesson):
    assert lesson("At 2.5 of three.", " ".join([LONG] * 20)) == ["sentences"]
    assert lesson("At 2.5 of three.", " ".join([LONG] * 3)) == [], "a few long ones leave the median where it is"
    row, listed = "| " + LONG + " |", "- Short.\n- Short too.\n"
    for other in (f"{row}\n\n" * 20, f"```\n{LONG}\n```\n\n" * 20, f"$$ {LONG} $$\n\n" * 20, f"# {LONG}\n\n" * 20):
        assert lesson("At 2.5 of three.", "At 2.5 of three.\n\n" + other) == []
    assert lesson("Somebody 2020.", " ".join([LONG] * 20)) == [], "sources are a list"
    assert lesson("At 2.5 of three.", listed * 12 + " ".join([LONG] * 20)) == [], "an entry of a list is a sentence"


def test_a_term_of_the_glossary_stands_in_bold_where_it_leads(lesson, tmp_path, capsys):
    glossary = tmp_path / "docs" / "glossary.md"
    glossary.parent.mkdir()
    row = "| {} | 秩 | What it is. | [02](../notebooks/{}.ipynb) |\n"
    glossary.write_text(row.format("rank, of a matrix", "02_two") + row.format("mask", "03_three"), encoding="utf-8")
    assert lesson() == ["terms"], "the other lesson's term is not asked for"
    assert lesson("At 2.5 of three.", "It is **not** the rank and **never** was.") == ["terms"], (
        "between two bold words"
    )
    assert form.main([tmp_path / "notebooks" / "02_two.ipynb"]) == 1
    assert "02 does not explain: rank, of a matrix." in capsys.readouterr().out
    assert lesson("At 2.5 of three.", "The **whole\nrank** of three.") == []
