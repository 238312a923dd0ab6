"""How a grader and a submission in another process speak: trees of plain values and tensors, never pickle.

A message is a JSON text and the tensors that it refers to, in safetensors format, each preceded by its length. What
comes back is data from a stranger: it is parsed with limits, and nothing in it is run.
"""

from __future__ import annotations

import json
import os
import select
import struct
import time

import torch

TEXT, TENSORS = 4 * 2**20, 16 * 2**20  # bytes of one message; honest replies have a twentieth of it
VALUES = 200_000  # brackets and commas of a message: Python takes a hundred times as much for [] as JSON does
PLAIN = (str, int, float, bool, type(None))


class Broken(Exception):
    """The other side ended, or said something that is no message. The text says what happened."""


def pack(value, tensors: dict[str, torch.Tensor]):
    """`value` as JSON can hold it; each tensor goes to `tensors` under a number. TypeError names what cannot travel."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            raise TypeError(f"a {value.layout} tensor")
        key = str(len(tensors))
        tensors[key] = value.contiguous().clone()
        return {"tensor": key}
    if isinstance(value, bool | str | type(None)) or type(value) in (int, float):
        return value
    if isinstance(value, list | tuple):
        return {"list" if isinstance(value, list) else "tuple": [pack(v, tensors) for v in value]}
    if isinstance(value, set | frozenset):
        return {"set": [pack(v, tensors) for v in sorted(value, key=repr)]}
    if isinstance(value, dict):
        return {"dict": [[pack(k, tensors), pack(v, tensors)] for k, v in value.items()]}
    if type(value).__module__ == "numpy":
        return pack(torch.as_tensor(value) if getattr(value, "ndim", 0) else value.item(), tensors)
    if isinstance(value, int | float):
        return value.__class__.__mro__[-2](value)  # a subclass of int or float
    raise TypeError(f"a {type(value).__name__}")


def unpack(tree, tensors: dict[str, torch.Tensor]):
    """The value that `pack` took. Raises Broken for a tree that `pack` cannot have made."""
    if isinstance(tree, PLAIN):
        return tree
    try:
        ((kind, body),) = tree.items()
        if kind == "tensor":
            return tensors[body]
        if kind == "dict":
            return {unpack(k, tensors): unpack(v, tensors) for k, v in body}
        return {"list": list, "tuple": tuple, "set": set}[kind](unpack(v, tensors) for v in body)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise Broken("it sent a malformed message") from error


def encode(value) -> bytes:
    """The message. TypeError names what cannot travel, ValueError says that it is too large."""
    from safetensors.torch import save

    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(pack(value, tensors)).encode()
    blob = save(tensors) if tensors else b""
    check(len(text), len(blob), text, ValueError)
    return struct.pack(">QQ", len(text), len(blob)) + text + blob


def check(text_size: int, blob_size: int, text: bytes, kind: type[Exception]) -> None:
    if text_size > TEXT or blob_size > TENSORS:
        raise kind(f"it sent more than {TEXT >> 20} MiB of text or {TENSORS >> 20} MiB of tensors at once")
    if sum(text.count(sign) for sign in b"[{,") > VALUES:
        raise kind(f"it sent more than {VALUES:,} values at once")


def send(fd: int, value, seconds: float | None = None, watch=None) -> None:
    """Write one message to a file descriptor. Raises Broken when nobody reads it any more, TimeoutError after `seconds`
    in which nobody does; `watch()` is called while waiting, and may raise."""
    write(fd, encode(value), seconds, watch)


def write(fd: int, message: bytes, seconds: float | None = None, watch=None) -> None:
    deadline = None if seconds is None else time.monotonic() + seconds
    view = memoryview(message)
    while view:
        if not _ready([], [fd], deadline, watch):
            continue
        try:
            view = view[os.write(fd, view[: select.PIPE_BUF]) :]  # as much as surely fits
        except OSError as error:
            raise Broken("its process ended") from error


def receive(fd: int, seconds: float | None = None, watch=None):
    """Read one message. TimeoutError after `seconds`; `watch()` is called while waiting, and may raise."""
    from safetensors.torch import load

    deadline = None if seconds is None else time.monotonic() + seconds
    sizes = struct.unpack(">QQ", _read(fd, 16, deadline, watch))
    check(*sizes, b"", Broken)
    text, blob = _read(fd, sizes[0], deadline, watch), _read(fd, sizes[1], deadline, watch)
    check(0, 0, text, Broken)
    try:
        return unpack(json.loads(text), load(blob) if blob else {})
    except Exception as error:  # whatever the parsers meet in bytes that a stranger chose
        raise Broken("it sent a malformed message") from error


def _read(fd: int, count: int, deadline: float | None, watch) -> bytes:
    found = bytearray()
    while len(found) < count:
        if not _ready([fd], [], deadline, watch):
            continue
        chunk = os.read(fd, min(count - len(found), 2**20))
        if not chunk:
            raise Broken("its process ended")
        found += chunk
    return bytes(found)


def _ready(read: list[int], write: list[int], deadline: float | None, watch) -> bool:
    """Waits a moment for a file descriptor. TimeoutError after the deadline."""
    if watch is not None:
        watch()
    if deadline is not None and time.monotonic() > deadline:
        raise TimeoutError
    wait = 0.05 if watch is not None or deadline is not None else None
    return any(select.select(read, write, [], wait)[:2])
