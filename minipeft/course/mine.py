"""A copy of the course of one's own: `python -m minipeft.course.mine` fills my/ with the lessons and the exercises.

What you changed is never overwritten. When a lesson changes in the course, a copy that you left alone is renewed, and
beside one that you changed the new lesson is put, with "(new)" in its name. A lesson that you delete comes back as new.
`make lab` calls this and opens the copy.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

from minipeft.whole import write_whole

SOURCES = ("notebooks/*.ipynb", "exercises/*/*.ipynb")
RECORD = ".copied.json"  # {name: SHA-256 of the "lesson" that was given out, and of the "copy" that was written}


def copy(course: Path, mine: Path) -> dict[str, str]:
    """{name: "copied", "renewed" or "offered as …"} of every file that this call wrote.

    Raises ValueError where the folder of the course has no lessons, OSError where `mine` cannot be written.
    """
    pages = sorted(page for pattern in SOURCES for page in course.glob(pattern))
    if not pages:
        raise ValueError(f"There are no lessons in {course}: run this in the course's folder.")
    record = recorded(mine)
    done: dict[str, str] = {}
    for page in pages:
        name = page.relative_to(course).as_posix()
        data, target = opened(page.read_text(encoding="utf-8")), mine / name
        lesson, given = digest(page.read_bytes()), record.get(name, {})
        if not target.exists():
            done[name] = "copied"
        elif given.get("lesson") == lesson:  # given out already, and changed or not: it is theirs
            continue
        elif digest(target.read_bytes()) == given.get("copy"):
            done[name] = "renewed"
        elif target.read_bytes() != data:
            target = target.with_stem(f"{target.stem} (new)")
            done[name] = f"offered as {target.name}"
        write_whole(target, data)
        record[name] = {"lesson": lesson, "copy": digest(data)}
    if record != recorded(mine):
        write_whole(mine / RECORD, json.dumps(record, indent=1))
    return done


def recorded(mine: Path) -> dict[str, dict[str, str]]:
    """What was given out; {} where nothing was, or the record is damaged: then every change counts as yours."""
    try:
        found = json.loads((mine / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {name: given for name, given in found.items() if isinstance(given, dict)} if isinstance(found, dict) else {}


def opened(text: str) -> bytes:
    """A notebook as JupyterLab has it once it is opened: its language as this kernel tells it, down to the version of
    Python. Else every lesson would count as changed, and ask to be saved, before anybody has written a word."""
    from ipykernel.ipkernel import IPythonKernel

    notebook = json.loads(text)
    notebook["metadata"]["language_info"] = dict(IPythonKernel.language_info)
    return (json.dumps(notebook, ensure_ascii=False, indent=1) + "\n").encode()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    done = copy(Path(), Path("my"))
    for name, what in done.items():
        if what != "copied":
            print(f"my/{name}: {what}")
    fresh = sum(what == "copied" for what in done.values())
    print(f"Your copy of the course is the folder my/{f': {fresh} new files' if fresh else ''}.")


if __name__ == "__main__":
    main()
