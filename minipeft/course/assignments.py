"""From `solutions/` to `exercises/`: `python -m minipeft.course.assignments [--check]`.

The notebook in solutions/ is the only source. nbgrader's own preprocessors take the solutions, the hidden tests and the
explanations out of it. Every cell's id is its nbgrader name or its number, so that building twice gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import datetime
from pathlib import Path

from minipeft.course.notebooks import METADATA

ROOT = Path(__file__).resolve().parents[2]
SOLUTIONS, EXERCISES = ROOT / "solutions", ROOT / "exercises"
PREPROCESSORS = (
    *("LockCells", "ClearSolutions", "ClearOutput", "CheckCellMetadata", "ClearHiddenTests", "ClearMarkScheme"),
    "ComputeChecksums",
)


def settings():
    """nbgrader's configuration of the course, as `nbgrader_config.py` in the project's root has it."""
    from traitlets.config import PyFileConfigLoader

    return PyFileConfigLoader("nbgrader_config.py", path=str(ROOT)).load_config()


def sources() -> dict[str, Path]:
    """{assignment: its notebook in solutions/}. ValueError when the folder is not beside the package."""
    found = {path.stem: path for path in sorted(SOLUTIONS.glob("*/*.ipynb")) if path.parent.name == path.stem}
    if not found:
        raise ValueError(f"There is no solutions/ beside {ROOT.name}/minipeft: run this from a clone of the course.")
    return found


def deadlines() -> dict[str, datetime]:
    """{assignment: when it is due}, from exercises/deadlines.json: {"lora": "2026-12-01 13:00+01:00"}; {} without it.

    The one place where a teacher sets them: solutions stay folded until then, and the gradebook counts from then on
    what is late. ValueError for a file that cannot be read, an unknown name, and a time without an offset from UTC.
    """
    path = EXERCISES / "deadlines.json"
    if not path.is_file():
        return {}
    try:
        found = {name: datetime.fromisoformat(when) for name, when in json.loads(path.read_bytes()).items()}
        if unknown := set(found) - set(sources()):
            raise ValueError(f"there is no assignment {', '.join(sorted(unknown))}")
        if bare := [name for name, when in found.items() if when.tzinfo is None]:
            raise ValueError(f"the time of {', '.join(bare)} has no offset")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        example = '{"lora": "2026-12-01 13:00+01:00"}'
        raise ValueError(f"exercises/deadlines.json cannot be used ({error}): it looks like {example}.") from error
    return found


def release(source: Path) -> str:
    """The text of the learner's notebook."""
    import nbformat
    from nbgrader import preprocessors

    notebook = nbformat.read(source, as_version=4)
    resources = {"nbgrader": {"assignment": source.stem, "notebook": source.stem}}
    for name in PREPROCESSORS:
        notebook, resources = getattr(preprocessors, name)(config=settings()).preprocess(notebook, resources)
    tidy(notebook)
    return nbformat.writes(notebook) + "\n"


def tidy(notebook) -> None:
    """Ids and metadata that do not depend on who saved the file, and with what."""
    notebook.metadata = METADATA
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{i}"
        cell.metadata = {
            k: cell.metadata[k] for k in ("deletable", "editable", "nbgrader", "tags") if k in cell.metadata
        }
        cell.source = cell.source.rstrip()


def build() -> list[Path]:
    """Writes exercises/<assignment>/<assignment>.ipynb for every assignment."""
    built = []
    for name, source in sources().items():
        target = EXERCISES / name / f"{name}.ipynb"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(release(source), encoding="utf-8")
        built.append(target)
    return built


def outdated() -> list[str]:
    """The names of the committed exercises that do not come out of solutions/."""
    names = sources()
    extra = {path.stem for path in EXERCISES.glob("*/*.ipynb")} - set(names)
    different = [n for n, s in names.items() if not same(EXERCISES / n / f"{n}.ipynb", release(s))]
    return sorted(extra) + different


def same(path: Path, text: str) -> bool:
    return path.is_file() and json.loads(path.read_text(encoding="utf-8")) == json.loads(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if exercises/ is not what comes out")
    if parser.parse_args().check:
        if names := outdated():
            print(f"exercises/ differs from what solutions/ gives for {', '.join(names)}: run make exercises.")
        return bool(names)
    for path in build():
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
