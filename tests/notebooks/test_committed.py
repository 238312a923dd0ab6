"""Every committed lesson was run from top to bottom and kept its outputs (nbval passes one that has none)."""

import ast
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:home|Users|root|tmp|opt|work|mnt)/[\w.-]+|\b[A-Z]:\\Users\\")


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def texts(notebook: nbformat.NotebookNode) -> list[str]:
    """Sources, printed text and tracebacks; pictures are left out, because base64 spells anything."""
    found = [cell.source for cell in notebook.cells]
    for output in (output for cell in code_cells(notebook) for output in cell.outputs):
        found += [output.get("text", ""), *output.get("traceback", [])]
        found += [str(value) for kind, value in output.get("data", {}).items() if not kind.startswith("image/")]
    return found


def prints(source: str) -> bool:
    """Whether a statement of the cell itself (not of a function or branch in it) prints or displays something."""
    plain = "\n".join(line for line in source.splitlines() if not line.lstrip().startswith(("%", "!")))
    calls = (node.value for node in ast.parse(plain).body if isinstance(node, ast.Expr))
    return any(isinstance(call, ast.Call) and getattr(call.func, "id", "") in {"print", "display"} for call in calls)


def test_the_course_has_lessons():
    assert LESSONS, "notebooks/ holds no lesson"


@pytest.fixture(params=LESSONS, ids=lambda path: path.stem)
def lesson(request: pytest.FixtureRequest) -> nbformat.NotebookNode:
    return nbformat.read(request.param, as_version=4)


def test_ran_in_order_from_a_fresh_kernel(lesson):
    counts = [cell.execution_count for cell in code_cells(lesson)]
    assert counts == list(range(1, len(counts) + 1)), "run `make notebooks`"


def test_kept_its_outputs_and_a_picture(lesson):
    cells = code_cells(lesson)
    silent = [cell.id for cell in cells if prints(cell.source) and not cell.outputs]
    assert not silent, f"these cells print, and hold no output: {silent}"
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs), "no picture"


def test_holds_no_error(lesson):
    errors = [output.evalue for cell in code_cells(lesson) for output in cell.outputs if output.output_type == "error"]
    assert not errors


def test_is_normalised(lesson):
    nbformat.validate(lesson)
    assert [cell.id for cell in lesson.cells] == [f"cell-{i}" for i in range(len(lesson.cells))], "run `make notebooks`"
    assert "widgets" not in lesson.metadata, "widget state makes every execution differ"
    assert "version" not in lesson.metadata.get("language_info", {})


def test_names_no_path_of_a_machine(lesson):
    found = [match.group() for text in texts(lesson) for match in MACHINE_PATH.finditer(text)]
    assert not found
