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

LIMIT = 64 * 2**20  # bytes of one message
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
    from safetensors.torch import save

    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(pack(value, tensors)).encode()
    blob = save(tensors) if tensors else b""
    return struct.pack(">QQ", len(text), len(blob)) + text + blob


def send(fd: int, value) -> None:
    """Write one message to a file descriptor. Raises Broken when nobody reads it any more."""
    view = memoryview(encode(value))
    try:
        while view:
            view = view[os.write(fd, view) :]
    except OSError as error:
        raise Broken("its process ended") from error


def receive(fd: int, seconds: float | None = None, watch=None):
    """Read one message. TimeoutError after `seconds`; `watch()` is called while waiting, and may raise."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    deadline = None if seconds is None else time.monotonic() + seconds
    sizes = struct.unpack(">QQ", _read(fd, 16, deadline, watch))
    if sum(sizes) > LIMIT:
        raise Broken(f"it sent more than {LIMIT >> 20} MiB at once")
    text, blob = _read(fd, sizes[0], deadline, watch), _read(fd, sizes[1], deadline, watch)
    try:
        return unpack(json.loads(text), load(blob) if blob else {})
    except (ValueError, RecursionError, SafetensorError, KeyError) as error:
        raise Broken("it sent a malformed message") from error


def _read(fd: int, count: int, deadline: float | None, watch) -> bytes:
    found = bytearray()
    while len(found) < count:
        if watch is not None:
            watch()
        wait = 0.05 if watch is not None or deadline is not None else None
        if deadline is not None and time.monotonic() > deadline:
            raise TimeoutError
        if not select.select([fd], [], [], wait)[0]:
            continue
        chunk = os.read(fd, min(count - len(found), 2**20))
        if not chunk:
            raise Broken("its process ended")
        found += chunk
    return bytes(found)
