"""Your own text as a task: a folder of `.txt` files, or a CSV file with a column of text and one of labels.

    own("letters/")                                  # whole texts to write like: kind "text"
    own("reviews.csv", text="review", label="stars")  # texts to classify: kind "class"

Which row is for training, validation or testing follows from a hash of what it says, so it is the same on every
machine and in every run, and copies of one text are never on both sides:

    groups (a file, a stretch of one, all rows of the same words or of one author) in the order of their hash
    of each ten: 8 train, 1 validation, 1 test; with labels, label by label
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from minipeft.world.tasks import Task

TENTHS = ("train", "validation", "train", "test", "train", "train", "train", "train", "train", "train")
FILES = 10  # fewer than this are cut into as many stretches each, so that all three splits have some
LEAST = 10  # rows with a label, so that each split has one


def own(
    path: str | os.PathLike,
    text: str = "text",
    label: str | None = None,
    group: str | None = None,
    encoding: str = "utf-8",
    words: int = 90,
) -> Task:
    """The texts at `path`, with splits train, validation and test (80 · 10 · 10 %).

    Args:
        path: a folder of `.txt` files, cut at empty lines and after every `words` words at most, or a CSV file whose
            first line names its columns.
        text: the CSV's column of texts.
        label: the CSV's column of labels, of which each becomes a class; without, the task is to write such texts.
        group: the CSV's column that names what must not be torn apart, such as an author or a whole review: else a test
            row may be the next sentence of a training row. Without, copies of one text are kept together.
        encoding: of the files; a byte-order mark at the beginning is skipped.

    Raises ValueError, in one sentence, for a path that is not there, a folder without text, a file in another encoding,
    a missing column, an empty text, fewer than two labels or fewer than ten rows of one.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"There is no {str(path)!r}: give a folder of .txt files, or a CSV file.")
    if not isinstance(words, int) or words < 1:
        raise ValueError(f"words must be a whole number of at least 1, but is {words!r}.")
    if path.is_dir():
        if label is not None or group is not None:
            raise ValueError(f"{str(path)!r} is a folder, which has no columns; labels and groups come in a CSV file.")
        rows = [{"text": piece, "group": group} for piece, group in pieces(path, encoding, words)]
    else:
        rows = table(path, text, label, group, encoding)
    classes = sorted({row["label"] for row in rows}, key=_natural) if label else []
    if label:
        check_labels(path, label, Counter(row["label"] for row in rows))
        rows = [row | {"label": classes.index(row["label"])} for row in rows]
    kind, metric = ("class", "accuracy") if label else ("text", "loss")
    return Task(path.stem, kind, split(path, rows), metric=metric, classes=tuple(classes))


def pieces(folder: Path, encoding: str, words: int) -> Iterable[tuple[str, str]]:
    """(a piece of a text, the group that it belongs to): the file, or one of ten stretches where files are few."""
    there = sorted(folder.iterdir(), key=lambda file: file.name)  # the same on every system
    files = [f for f in there if f.suffix.lower() == ".txt" and not f.name.startswith(".") and not f.is_dir()]
    found = {file.name: cut(decoded(file, encoding), words) for file in files}
    if not any(found.values()):
        what = "no .txt file" if not files else "nothing but empty .txt files"
        raise ValueError(f"The folder {str(folder)!r} holds {what}: put the texts there, in files that end in .txt.")
    for name, parts in found.items():
        for i, part in enumerate(parts):
            yield part, name if len(files) >= FILES else f"{name}:{i * FILES // len(parts)}"


def cut(text: str, words: int) -> list[str]:
    """Paragraphs, between empty lines, of at most `words` words each; white space becomes one space."""
    paragraphs: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.strip():
            paragraphs[-1] += line.split()
        else:
            paragraphs.append([])
    return [" ".join(p[i : i + words]) for p in paragraphs for i in range(0, len(p), words)]


def decoded(file: Path, encoding: str) -> str:
    try:
        text = file.read_bytes().decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        marked = error.object.startswith((b"\xff\xfe", b"\xfe\xff"))
        likely = 'it begins as "utf-16" does, so try encoding="utf-16"'
        if not marked:
            likely = 'if it was written in Western Europe, try encoding="latin-1" or "cp1252"'
        raise ValueError(
            f"{file.name} is not {encoding}: byte {error.start} is {error.object[error.start]:#x}; {likely}, or save "
            "it as UTF-8."
        ) from error
    except LookupError as error:
        raise ValueError(f'encoding={encoding!r} is none that Python knows; "utf-8" and "latin-1" are two.') from error
    if "\0" in text:
        other = "utf-16-be" if text.startswith("\0") else "utf-16"
        raise ValueError(
            f'{file.name} holds zero bytes, so it is no {encoding} text; try encoding="{other}" if it is one.'
        )
    return text


def table(file: Path, text: str, label: str | None, group: str | None, encoding: str) -> list[dict]:
    """The rows of a CSV: {"text", "group": what stays in one split}, and "label" as it is written there."""
    import csv
    import io

    content, wanted = decoded(file, encoding), [name for name in (text, label, group) if name is not None]
    try:
        for separator in (",", ";", "\t", ","):  # a spreadsheet of half of Europe writes semicolons
            lines = csv.reader(io.StringIO(content, newline=""), delimiter=separator)
            head = next(lines, [])
            if all(name in head for name in wanted):
                break
        if missing := [name for name in wanted if name not in head]:
            there = ", ".join(map(repr, head)) or "none"
            raise ValueError(f"{file.name} has no column {missing[0]!r}: its first line names {there}.")
        rows = []
        for n, line in enumerate(lines, 1):
            if not line:
                continue
            if len(line) != len(head):
                raise ValueError(f"Row {n} of {file.name} has {len(line)} cells, but there are {len(head)} columns.")
            cells = dict(zip(head, line, strict=True))
            for name in wanted:
                if not cells[name].strip():
                    raise ValueError(f"Row {n} of {file.name} has an empty {name}: fill it in or drop the row.")
            row = {"text": cells[text], "group": cells[group] if group else " ".join(cells[text].casefold().split())}
            rows.append(row if label is None else row | {"label": cells[label].strip()})
    except csv.Error as error:
        raise ValueError(f"{file.name} is no CSV that can be read: {error} (line {lines.line_num}).") from error
    if not rows:
        raise ValueError(f"{file.name} has column names but no rows.")
    return rows


def check_labels(file: Path, column: str, counts: Counter) -> None:
    if len(counts) < 2:
        raise ValueError(
            f"All rows of {file.name} have the label {next(iter(counts))!r} in column {column!r}: there is nothing to "
            "tell apart, so add rows of another label."
        )
    rare, n = counts.most_common()[-1]
    if n < LEAST:
        more = f", and so have {others} others" if (others := sum(c < LEAST for c in counts.values()) - 1) else ""
        raise ValueError(
            f"The label {rare!r} stands in {n} of the rows{more}; at least {LEAST} are needed, so that each split has "
            f"one: add rows, merge labels, or name the right column instead of {column!r}."
        )


def split(path: Path, rows: list[dict]):
    """A `DatasetDict` of the three splits; the rows of a split keep their order."""
    from datasets import Dataset, DatasetDict

    by_label: dict[object, dict[str, None]] = {}
    labelled: set[str] = set()
    for row in rows:
        if row["group"] not in labelled:  # copies that disagree about the label stay together, under the first
            labelled.add(row["group"])
            by_label.setdefault(row.get("label"), {})[row["group"]] = None
    places = {}
    for groups in by_label.values():
        ranked = sorted(groups, key=lambda group: hashlib.sha256(group.encode()).digest())
        if len(ranked) < 4:
            of_one = " of one label" if len(by_label) > 1 else ""
            raise ValueError(
                f"{path.name} has {len(ranked)} different texts or groups{of_one}; it takes at least 4 to have some "
                "for training, validation and testing, and hundreds to learn from."
            )
        places |= {group: TENTHS[rank % 10] for rank, group in enumerate(ranked)}
    chosen = {name: [row for row in rows if places[row["group"]] == name] for name in ("train", "validation", "test")}
    columns = [name for name in ("text", "label") if name in rows[0]]
    return DatasetDict(
        {name: Dataset.from_dict({c: [row[c] for row in part] for c in columns}) for name, part in chosen.items()}
    )


def _natural(label: str) -> tuple[bool, float, str]:
    """Numbers by their size, before words."""
    try:
        return False, float(label), label
    except ValueError:
        return True, 0.0, label
