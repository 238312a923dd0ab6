"""Whether what measures is still what it was: the functions that a drive leans on, written down as numbers.

A submission runs beside the drives that call it, so it can put its own functions in their place. The grader therefore
asks for these numbers after each of its cells and calls, and compares them with those of a process that ran no
submission. Whoever forges the answer to this as well leaves traces in the code, which `suspicion` names.
"""

from __future__ import annotations

import hashlib
import sys
import types
from importlib import import_module
from pkgutil import iter_modules

import torch
from torch import nn

from minipeft.course import drives

MODULES = (
    *("minipeft.course.wire", "minipeft.course.drives", "minipeft.course.verdict", "safetensors.torch"),
    *(f"minipeft.course.drives.{module.name}" for module in iter_modules(drives.__path__)),
    *("builtins", "copy", "math", "random", "importlib", "contextlib", "functools", "json"),
    *("torch", "torch.autograd", "torch.linalg", "torch.random", "torch.nn.functional"),
)
CLASSES = (torch.Tensor, torch.Generator, nn.Parameter, nn.Module, nn.Linear, nn.LayerNorm, nn.Embedding)
OTHERS = {"torch.manual_seed"}  # transformers replaces it with its own
UNUSED = {f"minipeft.course.verdict.{name}" for name in ("fault", "differ", "examine", "short", "written")}  # in here


class Watch:
    """Notes, before a submission's first cell, what there is to compare; `state` says what became of it."""

    def __init__(self, *classes: type):
        modules = {name: import_module(name) for name in MODULES}
        places = modules | {cls.__name__: cls for cls in (*CLASSES, *classes)}
        for name, module in modules.items():
            inner = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == name]
            places |= {f"{name}.{cls.__name__}": cls for cls in inner if name.startswith("minipeft.")}
        self.modules, self.seen = modules, {}
        self.names = [
            (place, key, f"{label}.{key}")
            for label, place in places.items()
            for key in dir(place)
            if (label.startswith("minipeft.") or key.startswith("__") or not key.startswith("_"))
            and callable(getattr(place, key, None))
            and f"{label}.{key}" not in OTHERS | UNUSED
        ]

    def state(self) -> dict[str, str]:
        """{dotted name: what it is made of now}."""
        found = {label: self.made_of(getattr(place, key, None)) for place, key, label in self.names}
        return found | {f"{n} as a whole": str(sys.modules.get(n) is module) for n, module in self.modules.items()}

    def made_of(self, value) -> str:
        """A number of what a function does; of anything else, its names."""
        code = getattr(value, "__code__", None)
        if not isinstance(code, types.CodeType):
            return f"{type(value).__name__} {getattr(value, '__module__', '')} {getattr(value, '__qualname__', '')}"
        if id(code) not in self.seen:  # a code object never changes
            self.seen[id(code)] = code, digest(instructions(code))
        return f"{self.seen[id(code)][1]} {constant(value.__defaults__)}"


def digest(whole) -> str:
    return hashlib.sha256(repr(whole).encode("utf-8", "replace")).hexdigest()[:16]


def instructions(code: types.CodeType) -> tuple:
    return code.co_code, code.co_names, [constant(each) for each in code.co_consts]


def constant(value):
    """A constant as every process writes it: no addresses, no order of a set."""
    if isinstance(value, types.CodeType):
        return instructions(value)
    if isinstance(value, tuple):
        return [constant(each) for each in value]
    if isinstance(value, frozenset):
        return sorted(map(repr, value))
    return value if isinstance(value, str | int | float | bytes | type(None)) else type(value).__name__


def replaced(now, before: dict[str, str]) -> list[str]:
    """The names that stand for something else in `now`, a stranger's answer, than they did before."""
    return [name for name, what in before.items() if not isinstance(now, dict) or now.get(name) != what]
