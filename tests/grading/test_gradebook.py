"""nbgrader's part, with answers that need no process: pages, late penalties, and gradebooks that cannot be used."""

import datetime
import shutil
import sqlite3
import sys

import nbformat
import pandas as pd
import pytest
from stub import ASSIGNMENT, EXERCISES, cheap, notebook, worth

from minipeft.course import assignments, gradebook
from minipeft.course import grade as grading
from minipeft.course.grade import grade
from minipeft.course.gradebook import Gradebook

pytest.importorskip("nbgrader", reason="the classroom extra is not installed")


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """An OUT in which the gradebook knows the assignment and nobody yet."""
    out = tmp_path_factory.mktemp("begun")
    Gradebook(out, reveal=False).start({ASSIGNMENT})
    return out


@pytest.fixture
def course(tmp_path, begun):
    """(the folder of submissions, OUT, a function that grades)."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    shutil.copytree(begun, out)

    def graded(**options) -> pd.DataFrame:
        with cheap(gradebook=Gradebook):
            return grade(folder, out, ASSIGNMENT, progress=False, **options).set_index("student")

    return folder, out, graded


def hand_in(folder, student: str, wrong: set[str] = frozenset(), at: str | None = None, note: str = "") -> None:
    place = folder / student / ASSIGNMENT
    place.mkdir(parents=True, exist_ok=True)
    made = notebook(wrong)
    made.cells.append(nbformat.v4.new_markdown_cell(note))
    nbformat.write(made, place / f"{ASSIGNMENT}.ipynb")
    if at is not None:
        (place / "timestamp.txt").write_text(at)


def book(out):
    from nbgrader.api import Gradebook as Book

    return Book(f"sqlite:///{out / 'gradebook.db'}")


def test_the_pages_follow_the_flag_and_a_deleted_page_comes_back(course):
    folder, out, graded = course
    hand_in(folder, "ada", note="My notes <script>alert('from ada')</script>")
    page = out / "feedback" / "ada" / ASSIGNMENT / f"{ASSIGNMENT}.html"
    for reveal in (True, False, True):
        graded(reveal=reveal)
        assert ("HIDDEN TESTS" in page.read_text()) == (">grade<" in page.read_text()) == reveal
        assert "My notes" in page.read_text() and "<script>alert('from ada')" not in page.read_text()
    stamp = page.stat().st_mtime_ns
    graded(reveal=True)
    assert page.stat().st_mtime_ns == stamp
    page.unlink()
    graded()
    assert "HIDDEN TESTS" not in page.read_text()


def test_late_penalties_extensions_and_time_zones_are_nbgraders(course, monkeypatch, tmp_path):
    folder, out, graded = course
    hand_in(folder, "ada", at="2026-12-01 12:30:00 Europe/Berlin")  # half an hour before it is due
    hand_in(folder, "bob", {EXERCISES[0]}, at="2026-12-01 12:30:00 UTC")  # half an hour after it
    hand_in(folder, "cem", at="no time at all")
    hand_in(folder, "dee")
    config = assignments.settings()
    config.LateSubmissionPlugin.penalty_method = "zero"
    monkeypatch.setattr(gradebook.assignments, "settings", lambda: config.copy())
    assert graded()["late penalty"].tolist() == [0, 0, 0, 0]
    monkeypatch.setattr(gradebook.assignments, "EXERCISES", tmp_path)
    (tmp_path / "deadlines.json").write_text(f'{{"{ASSIGNMENT}": "2026-12-01 13:00"}}')
    with pytest.raises(ValueError, match="has no offset"):
        graded()
    (tmp_path / "deadlines.json").write_text(f'{{"{ASSIGNMENT}": "2026-12-01 13:00+01:00"}}')
    table = graded()
    right = worth({EXERCISES[0]})
    assert table.score.to_dict() == {"ada": worth(), "bob": 0, "cem": worth(), "dee": worth()}
    assert table["late penalty"].to_dict() == {"ada": 0, "bob": right, "cem": 0, "dee": 0}
    assert "0:30:00 late" in table.remarks["bob"] and "no time" in table.remarks["cem"]
    with book(out) as opened:
        found = opened.find_submission(ASSIGNMENT, "bob")
        assert (found.score, found.late_submission_penalty) == (right, right)
        assert found.timestamp == datetime.datetime(2026, 12, 1, 12, 30)
        opened.grant_extension(ASSIGNMENT, "bob", hours=1)
    assert graded().score["bob"] == right
    assert pd.read_csv(out / "grades.csv").set_index("student")["late penalty"]["bob"] == 0


@pytest.mark.parametrize("spoil", [
    lambda path: path.write_bytes(b"no database" * 200),
    lambda path: sqlite3.connect(path).executescript("DROP TABLE grade; CREATE TABLE grade (id INTEGER); "
                                                      "ALTER TABLE assignment RENAME COLUMN duedate TO due;"),
], ids=["rubbish", "another nbgrader's"])  # fmt: skip
def test_a_gradebook_that_nbgrader_cannot_use_is_one_sentence_and_the_next_run_goes_on(
    course, spoil, monkeypatch, capsys
):
    folder, out, graded = course
    hand_in(folder, "ada")
    graded()
    spoil(out / "gradebook.db")
    monkeypatch.setattr(
        sys, "argv", ["grade", str(folder), "--out", str(out), "--assignment", ASSIGNMENT, "--unsandboxed"]
    )
    with cheap(gradebook=Gradebook):
        assert grading.main() == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said.startswith("nbgrader cannot use ") and "move it away" in said
    (out / "gradebook.db").rename(out / "old.db")
    assert graded().score["ada"] == worth()
    with book(out) as opened:
        assert opened.find_submission(ASSIGNMENT, "ada").score == worth()


def test_odd_names_reach_the_gradebook(course):
    folder, out, graded = course
    for name in ("=1+1", "[x]*", "ж", "n" * 240, "new\nline"):
        hand_in(folder, name)
    table = graded()
    assert (table.score == worth()).all() and not table.remarks.str.contains("failed").any()
    with book(out) as opened:
        assert sorted(s.score for s in opened.assignment_submissions(ASSIGNMENT)) == [worth()] * 5
    assert len(list(out.glob(f"feedback/*/{ASSIGNMENT}/*.html"))) == len(list(out.glob("gradescope/*/*.json"))) == 5


def test_one_student_whom_nbgrader_cannot_take_costs_no_other_a_grade(course, monkeypatch):
    folder, out, graded = course
    hand_in(folder, "ada")
    hand_in(folder, "bob")
    whole = Gradebook.enter

    def enter(self, each, found, stamp):
        if each.student == "ada":
            raise UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates")
        whole(self, each, found, stamp)

    monkeypatch.setattr(Gradebook, "enter", enter)
    table = graded()
    assert table.score.tolist() == [worth()] * 2 and "surrogates" in table.remarks["ada"] and table.remarks["bob"] == ""


def test_ctrl_c_is_not_swallowed_by_nbgrader(course, monkeypatch):
    folder, out, graded = course
    hand_in(folder, "ada")
    graded()
    hand_in(folder, "ada", {EXERCISES[0]})

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("nbgrader.preprocessors.LimitOutput.preprocess", interrupted)
        with pytest.raises(KeyboardInterrupt):
            graded()
    assert graded().score["ada"] == worth({EXERCISES[0]})
