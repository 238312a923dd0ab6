"""What a submission's process may answer. Everything in a reply is a stranger's: it is taken apart by a schema, cut to
length and cleaned, and what does not fit ends that process with a reason."""

from __future__ import annotations

import re

import nbformat

from minipeft.course.sandbox import Killed
from minipeft.course.verdict import Raised

TEXT = 20_000  # characters of one output
MESSAGE = 2_000  # of an exception's text
OUTPUTS = 50  # of one cell
ROOM = 4 * 2**20  # characters of all outputs of a submission
PICTURE = re.compile(r"[A-Za-z0-9+/]+={0,2}\s*")


def clean(text: str, most: int) -> str:
    """At most so many characters, without those that a file, a page or a terminal cannot take: halves of surrogate
    pairs, and control characters but tabs and ends of lines."""
    text = text if len(text) <= most else f"{text[:most]} …"
    text = text.encode("utf-8", "replace").decode().replace("\r\n", "\n").replace("\r", "\n")
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)  # colours
    return text if text.isprintable() else re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]", "", text)


def outcome(reply, args: tuple) -> tuple[object, tuple]:
    """(the value or the exception, the arguments afterwards) of a call. Raises Killed for a reply of another form."""
    match reply:
        case {"got": {"raised": [list(kinds), str(text), str(where)]}, "after": tuple(after)}:
            kinds = tuple(clean(kind, 200) for kind in kinds[:20] if isinstance(kind, str)) or ("Exception",)
            return Raised(kinds, clean(text, MESSAGE), clean(where, MESSAGE)), after if len(after) == len(
                args
            ) else args
        case {"got": {"value": value}, "after": tuple(after)} if len(after) == len(args):
            return value, after
    raise Killed("it sent a malformed reply")


def outputs_of(reply, room: int) -> list:
    """The outputs of a cell in nbformat's form, as far as there is room. Raises Killed for a reply of another form."""
    match reply:
        case {"outputs": list(outputs)}:
            kept = [new for each in outputs[:OUTPUTS] if (new := output_of(each)) is not None]
            return [each for i, each in enumerate(kept) if sum(map(size, kept[: i + 1])) <= room]
    raise Killed("it sent a malformed reply")


def output_of(output):
    """One output, made anew from its cleaned parts; None if it is of no form that a worker sends."""
    new = nbformat.v4.new_output
    match output:
        case {"output_type": "stream", "name": "stdout" | "stderr" as name, "text": str(text)}:
            return new("stream", name=name, text=clean(text, TEXT))
        case {"output_type": "error", "ename": str(kind), "evalue": str(text), "traceback": list(said)}:
            lines = [clean(line, TEXT) for line in said[:20] if isinstance(line, str)]
            return new("error", ename=clean(kind, 200), evalue=clean(text, MESSAGE), traceback=lines)
        case {"output_type": "display_data", "data": {"image/png": str(picture)}} if PICTURE.fullmatch(picture):
            return new("display_data", data={"image/png": picture})
        case {"output_type": "display_data", "data": {"text/plain": str(text)}}:
            return new("display_data", data={"text/plain": clean(text, TEXT)})
    return None


def size(output) -> int:
    """The characters of an output."""
    data = output.get("data", {})
    texts = [output.get("text", ""), *data.values(), *output.get("traceback", ())]
    return sum(len(text) for text in texts)
