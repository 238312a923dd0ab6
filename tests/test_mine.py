"""A learner's copy: nothing that they wrote is lost, and nothing new is missed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from minipeft.course.mine import RECORD, copy

LESSON, TASK = "notebooks/00_start.ipynb", "exercises/lora/lora.ipynb"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cells": [text], "metadata": {"language_info": {"name": "python"}}}))


def read(path: Path) -> str:
    return json.loads(path.read_text())["cells"][0]


@pytest.fixture
def course(tmp_path):
    for name, text in ((LESSON, "lesson 1"), (TASK, "task 1")):
        write(tmp_path / name, text)
    return tmp_path


def test_the_first_call_copies_and_the_next_does_nothing(course):
    mine = course / "my"
    assert copy(course, mine) == {TASK: "copied", LESSON: "copied"}
    assert read(mine / LESSON) == "lesson 1"
    before = {path: path.stat().st_mtime_ns for path in mine.rglob("*")}
    assert copy(course, mine) == {} and {path: path.stat().st_mtime_ns for path in mine.rglob("*")} == before


def test_a_copy_opens_without_a_change(course):
    """JupyterLab writes the kernel's language into a notebook that it opens, unless it stands there already."""
    copy(course, course / "my")
    language = json.loads((course / "my" / LESSON).read_text())["metadata"]["language_info"]
    assert language["version"] == sys.version.split()[0] and language["file_extension"] == ".py"


def test_another_python_is_no_new_lesson(course, monkeypatch):
    copy(course, course / "my")
    write(course / "my" / TASK, "my answer")
    monkeypatch.setattr("minipeft.course.mine.opened", lambda text: text.encode() + b" ")
    assert copy(course, course / "my") == {}


def test_what_was_left_alone_is_renewed_and_what_was_changed_stays(course):
    mine = course / "my"
    copy(course, mine)
    write(mine / TASK, "my answer")
    write(course / LESSON, "lesson 2")
    write(course / TASK, "task 2")
    assert copy(course, mine) == {TASK: "offered as lora (new).ipynb", LESSON: "renewed"}
    assert read(mine / LESSON) == "lesson 2" and read(mine / TASK) == "my answer"
    assert read(mine / "exercises/lora/lora (new).ipynb") == "task 2"
    assert copy(course, mine) == {}
    (mine / "exercises/lora/lora (new).ipynb").unlink()  # seen, and thrown away: it does not come back
    assert copy(course, mine) == {} and read(mine / TASK) == "my answer"


def test_a_deleted_copy_comes_back(course):
    """Whoever wants to begin again deletes the file."""
    mine = course / "my"
    copy(course, mine)
    write(mine / LESSON, "a mess")
    (mine / LESSON).unlink()
    assert copy(course, mine) == {LESSON: "copied"} and read(mine / LESSON) == "lesson 1"


@pytest.mark.parametrize("damage", ["", "[]", "{", None])
def test_without_a_record_nothing_of_theirs_is_overwritten(course, damage):
    mine = course / "my"
    copy(course, mine)
    write(mine / TASK, "my answer")
    (mine / RECORD).unlink() if damage is None else (mine / RECORD).write_text(damage)
    copy(course, mine)
    assert read(mine / TASK) == "my answer" and read(mine / LESSON) == "lesson 1"
    assert json.loads((mine / RECORD).read_text()).keys() == {TASK, LESSON}


def test_elsewhere_it_says_so(tmp_path):
    with pytest.raises(ValueError, match="run this in the course's folder"):
        copy(tmp_path, tmp_path / "my")


def test_the_command_copies_this_course_with_links_that_lead(tmp_path):
    root = Path(__file__).parent.parent
    for folder in ("notebooks", "exercises"):
        (tmp_path / folder).symlink_to(root / folder)
    command = [sys.executable, "-m", "minipeft.course.mine"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "new files" in said
    assert (tmp_path / "my/notebooks/00_start_here.ipynb").exists() and (tmp_path / "my" / TASK).exists()
