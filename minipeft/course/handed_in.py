"""What was handed in: every file and folder of every student, whatever it is called and whatever is in it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from minipeft.course import assignments
from minipeft.course.mend import name_of, read, source_names

LARGEST = 20 * 2**20  # bytes of a submitted file
NOTEBOOK = re.compile(r"(.*?)\.ipynb(\.txt|\.json|\.download)?", re.IGNORECASE | re.DOTALL)
TEACHERS = (".txt", ".md", ".csv", ".json", ".log", ".yml", ".yaml", ".toml", ".ini", ".xlsx")  # unless notebooks
JUNK = {"Thumbs.db", "desktop.ini", "__MACOSX", ".ipynb_checkpoints", ".git", ".venv"}
KIND = {b"PK": "a ZIP archive", b"\x1f\x8b": "a gzip archive", b"7z": "a 7z archive", b"Rar!": "a RAR archive",
        b"%PDF": "a PDF", b"<": "a web page"}  # fmt: skip


@dataclass(frozen=True)
class Submission:
    """What one student handed in for one assignment: the file that counts, or None and why there is none.

    `assignment` is "" where nothing says which it is. `remark` says what else there was.
    """

    student: str
    assignment: str
    path: Path | None
    problem: str = ""
    remark: str = ""

    @property
    def folder(self) -> str:
        """The student's name where files are named after it: itself, or a short one when no file can bear it."""
        if (
            re.fullmatch(r"\w[\w.@ -]*", self.student)
            and len(self.student.encode()) <= 100
            and self.student[-1] not in ". "
        ):
            return self.student
        plain = re.sub(r"[^\w.-]+", "_", self.student).strip("._")[:40] or "student"
        return f"{plain}-{hashlib.sha256(self.student.encode()).hexdigest()[:8]}"


def discover(folder: Path, assignment: str | None = None) -> list[Submission]:
    """What was handed in: <student>.ipynb, <student>/<any>.ipynb or nbgrader's <student>/<assignment>/<any>.ipynb.

    Without `assignment`, the file's or folder's name, or else the names of its cells, say which it is. Nobody is left
    out: who handed in something else gets a submission with a problem. ValueError when there is nothing.
    """
    known = list(assignments.sources())
    if assignment is not None and assignment not in known:
        raise ValueError(f"There is no assignment {assignment!r}; there is {', '.join(known)}.")
    if not folder.is_dir():
        raise ValueError(f"There is no folder {str(folder)!r} with submissions.")
    students: dict[str, list[Path]] = {}
    for entry in sorted(folder.iterdir(), key=os.fsencode):
        if counts(entry):
            students.setdefault(student_of(entry), []).append(entry)
    found = [each for student, entries in students.items() for each in sorted_out(student, entries, folder, assignment)]
    if not found:
        raise ValueError(f"There is no notebook in {str(folder)!r}, neither <student>.ipynb nor <student>/….ipynb.")
    return sorted(found, key=lambda each: (each.student, each.assignment))


def counts(entry: Path) -> bool:
    """Whether a student may be behind this: not a system's file, and not the teacher's notes."""
    if entry.name in JUNK or entry.name.startswith("._"):
        return False
    if entry.name.startswith("."):
        return any(NOTEBOOK.fullmatch(file.name) for file in files_below(entry))
    notes = entry.suffix.lower() in TEACHERS and NOTEBOOK.fullmatch(entry.name) is None and not entry.is_dir()
    return not notes or cells_of(entry) is not None


def student_of(entry: Path) -> str:
    """The student's name, from that of a file or folder."""
    name = printable(entry.name)
    if entry.is_symlink() or not entry.is_dir():
        match = re.match(r"(.+?)\.ipynb", name, re.IGNORECASE | re.DOTALL)
        name = match[1] if match else re.sub(r"(?<=.)(\.tar)?\.\w{1,5}$", "", name)
    return name


def sorted_out(student: str, entries: list[Path], folder: Path, assignment: str | None) -> list[Submission]:
    """One submission for each assignment of which the student handed in anything."""
    notebooks: dict[str, list[Path]] = {}
    others, elsewhere = [], False
    for file in (each for entry in entries for each in files_below(entry)):
        if is_regular(file) and (NOTEBOOK.fullmatch(file.name) or cells_of(file) is not None):
            which = assignment_of(file, folder, assignment)
            if assignment is None or which == assignment:
                notebooks.setdefault(which, []).append(file)
            else:
                elsewhere = True
        elif not is_regular(file) or file.parent == folder or ".ipynb" in file.name.lower() or archived(file):
            others.append(f"{shown(file, folder)} is {what_is(file)} and was not opened.")
    found = []
    for which, files in notebooks.items():
        first = next((f for f in files if f.stem == which), files[0])
        left = [shown(f, folder) for f in files if f != first]
        said = [f"{shown(first, folder)} was graded, and not {', '.join(left)}."] if left else []
        said += [f"It was handed in as {printable(first.name)}."] if first.suffix != ".ipynb" else []
        problem = (
            "" if which else f"{shown(first, folder)} does not say which assignment it is; name it or give ASSIGNMENT=."
        )
        found.append(Submission(student, which, first if which else None, problem, brief([*said, *others])))
    if not found:
        problem = "No notebook was handed in" + (f" for {assignment}." if elsewhere else ".")
        found.append(Submission(student, assignment or "", None, problem, brief(others)))
    return found


def files_below(entry: Path) -> list[Path]:
    """The entry itself, or all files of a folder but hidden ones; links are listed, and not followed."""
    if entry.is_symlink() or not entry.is_dir():
        return [entry]
    found = []
    for place, folders, files in os.walk(entry):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in JUNK)
        found += [Path(place, name) for name in sorted([*files, *links]) if not name.startswith(".")]
    return found


def assignment_of(file: Path, folder: Path, assignment: str | None) -> str:
    """The assignment that a path names, or the one that was asked for, or the one that most of its cells belong to."""
    known = assignments.sources()
    parts = [*file.relative_to(folder).parts[1:-1], NOTEBOOK.sub(r"\1", file.name)]
    if named := next((part for part in parts if part in known), assignment):
        return named
    names = set(cells_of(file) or ())
    best, most = max(((each, len(names & source_names(each))) for each in known), key=lambda pair: pair[1])
    return best if most else ""


def is_regular(file: Path) -> bool:
    try:
        return stat.S_ISREG(file.lstat().st_mode)
    except OSError:
        return False


def cells_of(file: Path) -> list[str | None] | None:
    """The names of a notebook's cells; None for a file that is no notebook."""
    try:
        return [name_of(cell) for cell in read(text_of(file)).cells] if is_regular(file) else None
    except ValueError:
        return None


def archived(file: Path) -> bool:
    return "archive" in what_is(file)


def what_is(file: Path) -> str:
    """In two words, what a file that is no notebook is."""
    if file.is_symlink():
        return "a link"
    if not is_regular(file):
        return "no plain file"
    try:
        with open(file, "rb") as opened:
            start = opened.read(8)
    except OSError as error:
        return f"not readable ({error.strerror})"
    return next((kind for sign, kind in KIND.items() if start.startswith(sign)), "no notebook")


def shown(file: Path, folder: Path) -> str:
    return printable(str(file.relative_to(folder)))


def printable(name: str) -> str:
    """A file's name as any table can show it; bytes that are no UTF-8 and what does not print stand as escapes."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def brief(remarks: list[str]) -> str:
    more = f" And {len(remarks) - 9} more such files." if len(remarks) > 9 else ""
    return " ".join(remarks[:9]) + more


# ---------------------------------------------------------------------------------------------------------------------
# What is in the file
# ---------------------------------------------------------------------------------------------------------------------
def submitted_text(submission: Submission) -> str:
    """The file's text. ValueError says in one sentence why there is none."""
    if submission.path is None:
        raise ValueError(submission.problem)
    return text_of(submission.path)


def text_of(file: Path) -> str:
    try:
        size = file.stat().st_size
        data = file.read_bytes() if size <= LARGEST else b""
    except OSError as error:
        raise ValueError(f"The file cannot be read ({error.strerror}).") from error
    if size > LARGEST:
        raise ValueError(f"The file has {size / 2**20:.0f} MiB, and no more than {LARGEST >> 20} are read.")
    if not data.strip():
        raise ValueError("The file is empty.")
    if kind := next((kind for sign, kind in KIND.items() if data.startswith(sign)), None):
        raise ValueError(f"The file is {kind}, and no notebook.")
    return decoded(data)


def decoded(data: bytes) -> str:
    """UTF-8, UTF-16 or UTF-32, with a byte order mark or without."""
    return data.decode(json.detect_encoding(data), "replace").removeprefix("\ufeff")


def timestamp_of(path: Path | None) -> str:
    """What nbgrader's timestamp.txt beside a notebook says; "" where there is none. ValueError if it is no time."""
    from nbgrader.utils import parse_utc

    file = path and path.with_name("timestamp.txt")
    if not file or not is_regular(file):
        return ""
    text = ""
    try:
        with open(file, "rb") as opened:
            text = opened.read(200).decode("utf-8", "replace").strip()
        parse_utc(text or None)
    except Exception as error:  # dateutil raises several kinds
        raise ValueError(
            f"Its timestamp.txt says {text[:60]!r}, which is no time, so lateness was not looked at."
        ) from error
    return text
