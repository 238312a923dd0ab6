"""What an answer returned, as data that a check and a grader see alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from decimal import Decimal
from fractions import Fraction
from itertools import islice
from types import GeneratorType

import torch

MANY = 100_000  # entries of one list
DIGITS = 4_000  # of a whole number
LAZY = (
    map,
    filter,
    zip,
    GeneratorType,
    enumerate,
    range,
    reversed,
    type({}.keys()),
    type({}.values()),
    type({}.items()),
)


def plain(value, depth: int = 0):
    """Numbers, texts, tensors, and lists, tuples, sets and dicts of them. TypeError says what cannot be looked at."""
    if value is None or type(value) in (bool, float, str):
        return value
    if depth > 20:
        raise TypeError("It returned lists within lists, more than twenty deep, which cannot be looked at.")
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or value.is_quantized or value.is_meta or value.is_complex():
            kind = "a tensor on the meta device" if value.is_meta else f"a {value.dtype} tensor, {value.layout}"
            raise TypeError(f"It returned {kind}, which cannot be looked at.")
        return value.detach()
    if type(value).__module__ == "numpy":
        return plain(torch.as_tensor(value) if getattr(value, "ndim", 0) else value.item(), depth + 1)
    if isinstance(value, Fraction | Decimal):
        return int(value) if value == int(value) else float(value)
    if isinstance(value, int):
        if value.bit_length() > DIGITS:
            raise TypeError(f"It returned a whole number of more than {DIGITS} bits, which cannot be looked at.")
        return int(value)
    if isinstance(value, float | str):
        return float(value) if isinstance(value, float) else str.__str__(value)
    if isinstance(value, Mapping):
        return {plain(k, depth + 1): plain(v, depth + 1) for k, v in value.items()}
    if isinstance(value, tuple | set | frozenset):
        return (tuple if isinstance(value, tuple) else set)(entries(value, depth))
    if isinstance(value, (list, *LAZY)):
        return entries(value, depth)
    raise TypeError(f"It returned an object of the class {type(value).__name__}, which cannot be looked at.")


def entries(value: Iterable, depth: int) -> list:
    found = list(islice(value, MANY + 1))
    if len(found) > MANY:
        raise TypeError(f"It returned more than {MANY:,} values, which cannot be looked at.")
    return [plain(each, depth + 1) for each in found]
