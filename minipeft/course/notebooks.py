"""Run every lesson from top to bottom and keep what it shows: `python -m minipeft.course.notebooks [lesson …]`.

`--twice` runs each cell two times over instead, as a learner may, and writes nothing.

The committed lesson is the only source. It is run in a fresh kernel and normalised, so that running it twice gives the
same file wherever its figures reproduce: cell ids by number, no widget state, no progress bars, no version of Python.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from minipeft.course import lessons
from minipeft.whole import write_whole

WIDGET = "application/vnd.jupyter.widget-view+json"
METADATA = {  # of every notebook of the course: nothing that depends on who saved it, and with what
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def normalise(notebook) -> None:
    """Drop from an executed notebook what differs from run to run, or cannot be shown without a kernel."""
    notebook.metadata = METADATA
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{i}"
        cell.metadata = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
        if cell.cell_type == "code":
            cell.outputs = _joined([output for output in cell.outputs if _stays(output)])
            for output in cell.outputs:
                output.get("data", {}).pop(WIDGET, None)  # its picture stays: a view needs a kernel


def _joined(outputs: list) -> list:
    """Pieces of one printed text as one: how a text is cut up depends on how busy the machine was."""
    result = []
    for output in outputs:
        if output.output_type == "stream" and result and result[-1].get("name") == output.name:
            result[-1].text += output.text
        else:
            result.append(output)
    return result


def _stays(output) -> bool:
    if output.output_type == "stream":
        return not (output.name == "stderr" and "it/s]" in output.text)
    data = output.get("data", {})
    return WIDGET not in data or "image/png" in data or "text/html" in data  # else it is a progress bar


def execute(path: Path, timeout: int = 600) -> float:
    """Run one lesson in its folder and write it back, whole or not at all; returns the seconds that it took.

    Raises `nbclient.exceptions.CellExecutionError` when a cell fails; the file is then as it was.
    """
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    started = time.perf_counter()
    _run(notebook, path.parent, timeout)
    seconds = time.perf_counter() - started
    normalise(notebook)
    if (lesson := lessons.of(path)) is not None:
        lessons.signpost(notebook, lesson)
    write_whole(path, nbformat.writes(notebook).rstrip("\n") + "\n")
    return seconds


def twice(path: Path, timeout: int = 600):
    """Run each cell of one lesson two times over and write nothing; returns the notebook of all that ran, the first and
    the second time of a cell one after the other.

    Raises `nbclient.exceptions.CellExecutionError` when a cell fails, the first time or the second.
    """
    import nbformat

    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    cells = [nbformat.v4.new_code_cell(cell.source) for cell in code for _ in range(2)]
    return _run(nbformat.v4.new_notebook(cells=cells), path.parent, timeout)


def _run(notebook, folder: Path, timeout: int):
    from nbclient import NotebookClient

    return NotebookClient(notebook, timeout=timeout, resources={"metadata": {"path": str(folder)}}).execute()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "paths", metavar="lesson", nargs="*", type=Path, help="notebook files; all in notebooks/ if none is named"
    )
    parser.add_argument("--twice", action="store_true", help="run each cell two times over, and write nothing")
    options = parser.parse_args()
    paths = options.paths or sorted(Path("notebooks").glob("*.ipynb"))
    if not paths:
        print("There is no notebook in ./notebooks: run this from the project's root, or name the files.")
        return 1
    for path in paths:
        if options.twice:
            print(f"{path}: {len(twice(path).cells) // 2} cells, each run two times over", flush=True)
        else:
            print(f"{path}: {execute(path):.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
