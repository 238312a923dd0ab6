"""Lessons are run, normalised and written whole or not at all."""

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from minipeft.course.notebooks import WIDGET, execute, normalise, twice


def notebook(*sources):
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])


def test_running_a_lesson_twice_gives_the_same_bytes(tmp_path):
    path = tmp_path / "lesson.ipynb"
    nbformat.write(notebook("import random; random.Random(1).random()", "print('two')"), path)
    execute(path)
    first = path.read_bytes()
    execute(path)
    assert path.read_bytes() == first
    cells = nbformat.read(path, as_version=4).cells
    assert [cell.id for cell in cells] == ["cell-0", "cell-1"]
    assert [cell.execution_count for cell in cells] == [1, 2]


def test_a_lesson_that_fails_is_left_as_it_was(tmp_path):
    path = tmp_path / "lesson.ipynb"
    nbformat.write(notebook("1 / 0"), path)
    before = path.read_bytes()
    with pytest.raises(CellExecutionError):
        execute(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_every_cell_runs_two_times_over_and_nothing_is_written(tmp_path):
    path = tmp_path / "lesson.ipynb"
    nbformat.write(notebook("x = 1", "x += 1", "assert x == 3, x"), path)
    before = path.read_bytes()
    ran = twice(path).cells
    assert [cell.source for cell in ran] == ["x = 1", "x = 1", "x += 1", "x += 1", *["assert x == 3, x"] * 2]
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    nbformat.write(notebook("made = []", "assert not made\nmade.append(1)"), path)
    with pytest.raises(CellExecutionError, match="assert not made"):
        twice(path)


def test_views_and_progress_bars_go_and_pictures_stay():
    book = notebook("x", "y", "z")
    bar, plot = {WIDGET: {}, "text/plain": "0%"}, {WIDGET: {}, "image/png": "…", "text/plain": "r = 8"}
    data = [bar, plot, {"text/plain": "5"}]
    for cell, bundle in zip(book.cells, data, strict=True):
        cell.outputs = [nbformat.v4.new_output("display_data", data=bundle)]
    book.cells[0].outputs.append(nbformat.v4.new_output("stream", name="stderr", text=" 10%| 1/10 [00:01, 9it/s]"))
    book.metadata["widgets"] = {"state": {}}
    normalise(book)
    assert [len(cell.outputs) for cell in book.cells] == [0, 1, 1]
    assert set(book.cells[1].outputs[0].data) == {"image/png", "text/plain"}
    assert "widgets" not in book.metadata


def test_a_text_that_came_in_pieces_is_one():
    book = notebook("x")
    pieces = [("stdout", "a\n"), ("stdout", "b\n"), ("stderr", "c\n"), ("stdout", "d\n")]
    book.cells[0].outputs = [nbformat.v4.new_output("stream", name=name, text=text) for name, text in pieces]
    normalise(book)
    assert [(o.name, o.text) for o in book.cells[0].outputs] == [
        ("stdout", "a\nb\n"),
        ("stderr", "c\n"),
        ("stdout", "d\n"),
    ]
