"""What each lesson says of itself and of the others comes from one list, and every link leads somewhere."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import nbformat
import pytest

from minipeft.course import lessons
from minipeft.course.exercises import ASSIGNMENTS

ROOT = Path(__file__).parent.parent
NAMES = [lesson.file for lesson in lessons.LESSONS]
PAGES = sorted([*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("exercises/*/*.ipynb")])


def read(name: str):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def test_the_list_is_the_folder():
    assert NAMES == [path.stem for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    asked = [name for lesson in lessons.LESSONS for name in lesson.assignments]
    assert sorted(asked) == sorted(ASSIGNMENTS), "each assignment belongs to one lesson"


@pytest.mark.parametrize("name", NAMES)
def test_signposts_are_written_from_the_list_and_answers_are_hidden(name):
    """Writing them again changes nothing: python -m minipeft.course.lessons"""
    notebook = read(name)
    again = copy.deepcopy(notebook)
    lessons.signpost(again, lessons.of(Path(f"{name}.ipynb")))
    assert again == notebook
    own = re.search(r"(In|About) \d+ minutes|You need|Before:|After:", notebook.cells[0].source)
    assert not own, "what the strip below the title says is said there alone"


@pytest.mark.parametrize("name", NAMES)
def test_a_lesson_ends_in_the_form(name):
    text = "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
    assert text.startswith("# ") and "After this" in text
    for part in ("## Remember", "**Sources.**", "<details>"):
        assert part in text, part
    assert text.index("## Remember") < text.index("**Sources.**")
    assert text.count("<summary>") == text.count("</summary>") >= 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_leads_to_a_file(page):
    for cell in nbformat.read(page, as_version=4).cells:
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", cell.source):
                assert target.startswith("http") or (page.parent / target).exists(), target


@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_an_exercise_leads_back_to_its_lesson(name):
    (lesson,) = [each for each in lessons.LESSONS if name in each.assignments]
    first = nbformat.read(ROOT / "exercises" / name / f"{name}.ipynb", as_version=4).cells[0].source
    assert f"../../notebooks/{lesson.file}.ipynb" in first


def test_the_readme_has_the_same_table(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert lessons.table() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_first_lesson_has_the_map(monkeypatch):
    monkeypatch.chdir(ROOT)
    (cell,) = [cell for cell in read(NAMES[0]).cells if lessons.MAP in cell.metadata.get("tags", ())]
    assert cell.source == lessons.course_map()
    assert all(f"({name}.ipynb)" in cell.source for name in NAMES)


def test_outputs_are_hidden_from_a_prediction_to_the_next_heading():
    new = nbformat.v4
    out = [new.new_output("stream", text="0.8")]
    sources = ["# 00 · Start", "x = mp.Predict(", "measured", "mp.LoRAExplorer(", "text", "more", "## Next", "measured"]
    cells = [
        new.new_markdown_cell(each) if each[0] in "#t" else new.new_code_cell(each, outputs=copy.deepcopy(out))
        for each in sources
    ]
    notebook = new.new_notebook(cells=cells)
    lessons.signpost(notebook, lessons.LESSONS[0])
    hidden = [cell.source for cell in notebook.cells if cell.metadata.get("jupyter", {}).get("outputs_hidden")]
    assert hidden == ["measured", "more"] and notebook.cells[-2].source == "measured"
    assert notebook.cells[1].metadata.tags == [lessons.WHERE] and notebook.cells[-1].metadata.tags == [lessons.NEXT]


def test_going_further_is_folded_to_the_next_section_and_takes_no_minutes():
    new = nbformat.v4.new_markdown_cell
    texts = ["# 00 · Start", "## Going further", "### More\n\n" + "word " * 5000, "More.", "## Remember", "That."]
    notebook = nbformat.v4.new_notebook(cells=[new(each) for each in texts])
    lessons.signpost(notebook, lessons.LESSONS[0])
    assert [cell.source for cell in notebook.cells if cell.metadata.get(lessons.FOLDED)] == ["## Going further"]
    shown = [cell.source for cell in lessons.unfolded(notebook.cells)]
    assert [each for each in texts if each in shown] == [*texts[:2], *texts[4:]]
    assert lessons.minutes(notebook.cells) == 5


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_run_below_what_is_folded(name):
    """So a learner who leaves it folded misses no name."""
    cells = read(name).cells
    shown = {cell.id for cell in lessons.unfolded(cells)}
    last = max((i for i, cell in enumerate(cells) if cell.id not in shown), default=len(cells))
    assert not [cell.id for cell in cells[last + 1 :] if cell.cell_type == "code"]


def glossary() -> list[list[str]]:
    lines = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][1:]


def test_the_glossary_leads_to_where_a_term_stands():
    """The Chinese names stand there alone: a reader without the font would see boxes in the text."""
    terms = glossary()
    assert len(terms) > 70 and [t[0] for t in terms] == sorted(
        [t[0] for t in terms], key=lambda term: term.lower().replace("γ", "gamma")
    )
    for term, chinese, meaning, link in terms:
        (target,) = re.findall(r"\]\(\.\./notebooks/(\w+)\.ipynb\)", link)
        text = "\n".join(cell.source for cell in read(target).cells).lower()
        stems = [word[:5] for word in re.findall(r"[\w/γ-]+", term.lower()) if len(word) > 1 or word == "γ"]
        assert any(stem in text for stem in stems), (term, target)
        assert chinese and meaning.endswith(".")
    for page in PAGES:
        assert not re.search(r"[\u4e00-\u9fff]", page.read_text(encoding="utf-8")), page.name
