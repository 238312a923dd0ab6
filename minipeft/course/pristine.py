"""Whether what measures is still what it was: the functions that a drive leans on, written down as numbers.

A submission runs beside the drives that call it, so it can put its own functions in their place. The grader therefore
asks for these numbers after each of its cells and calls, and compares them with those of a process that ran no
submission. Whoever forges the answer to this as well leaves traces in the code, which `suspicion` names.
"""

from __future__ import annotations

import builtins
import hashlib
import re
import sys
import types
from collections.abc import Callable, Iterator
from importlib import import_module
from operator import is_
from pkgutil import iter_modules

import torch
from torch import nn
from torch.utils._device import DeviceContext

from minipeft.course import drives

OURS = (
    *("minipeft.course.wire", "minipeft.course.drives", "minipeft.course.verdict"),
    *(f"minipeft.course.drives.{module.name}" for module in iter_modules(drives.__path__)),
)
THEIRS = (  # beside those that ours import
    *("builtins", "contextlib", "copy", "functools", "importlib", "json", "math", "random", "safetensors.torch"),
    *("torch", "torch.nn", "torch.nn.functional", "torch.autograd", "torch.linalg", "torch.random"),
)
CLASSES = (torch.Tensor, nn.Parameter, nn.Module, nn.Linear, nn.LayerNorm, nn.Embedding)
OTHERS = {"torch.manual_seed"}  # transformers replaces it with its own
UNUSED = {f"minipeft.course.verdict.{name}" for name in ("fault", "differ", "examine", "short", "written")}  # in here
NO_CODE = {"__dict__", "__weakref__", "__doc__", "__annotations__", "__abstractmethods__"}  # of a class
OVERRIDE = re.compile(r"aten/.*/(CPU|Autograd.*|Composite.*)")  # of one of torch's own operators
PLAIN = (str, int, float, bytes, type(None), torch.dtype)
DEEP = 3  # functions that hold functions


class Watch:
    """Notes, before a submission's first cell, what there is to compare; `state` says what became of it."""

    def __init__(self, *classes: type):
        ours = {name: import_module(name) for name in OURS}
        used = {v.__name__ for module in ours.values() for v in vars(module).values() if is_module(v)} - {"sys"}
        self.modules = ours | {name: import_module(name) for name in sorted({*THEIRS, *used})}
        inner = [(n, v) for n, m in ours.items() for v in vars(m).values() if isinstance(v, type) and v.__module__ == n]
        self.classes = {cls.__name__: cls for cls in (*CLASSES, *classes)} | {f"{n}.{v.__name__}": v for n, v in inner}
        self.seen: dict[tuple[Callable, int], tuple] = {}
        names = {f"{label}.{key}": (place, key) for label, place in self.modules.items() for key in dir(place)}
        names = {label: of for label, of in names.items() if label not in OTHERS | UNUSED and leaned_on(*of)}
        names |= {f"{label}.{key}": (cls, key) for label, cls in self.classes.items() for key in own(cls)}
        self.places = {label: (place, key, getattr(place, key, None)) for label, (place, key) in names.items()}
        self.functions: dict[int, Callable] = {}  # all that `made_of` has looked into
        self.parts: list = []  # what they consisted of then
        self.found: dict[str, str] = {}

    def state(self) -> dict[str, str]:
        """{dotted name: what it is made of now}."""
        self.look()
        return self.found | self.around()

    def number(self) -> str:
        """The same as one number."""
        self.look()
        return f"{self.once(digest, self.found)} {digest(self.around())}"

    def look(self) -> None:
        """Writes down what is made of what; again only if an object is another than at the last look."""
        parts = list(self.parts_now())
        if len(parts) == len(self.parts) and all(map(is_, parts, self.parts)):
            return
        self.functions = {}
        self.found = {
            label: self.made_of(getattr(place, key, None), first) for label, (place, key, first) in self.places.items()
        }
        self.parts = list(self.parts_now())

    def parts_now(self) -> Iterator:
        """The objects in the places, and those that their functions consist of."""
        for place, key, _ in self.places.values():
            value = getattr(place, key, None)
            if type(value) is types.MethodType:  # made anew each time
                yield value.__self__
                value = value.__func__
            yield value
        for function in self.functions.values():
            yield function.__code__
            yield function.__defaults__
            for name, value in (function.__kwdefaults__ or {}).items():
                yield name
                yield value
            for cell in function.__closure__ or ():
                yield cell.cell_contents if filled(cell) else None

    def around(self) -> dict[str, str]:
        """Whether modules and classes as a whole are what they were, and what looks on."""
        found = {f"{name} as a whole": str(sys.modules.get(name) is module) for name, module in self.modules.items()}
        found |= {f"the names of {label}": " ".join(own(cls)) for label, cls in self.classes.items()}
        return found | dict(listeners())

    def made_of(self, value, first=None, deep: int = DEEP) -> str:
        """A number of what a function does; of anything else, its names, and whether a module is the `first` one."""
        if is_module(value):
            return f"module {value is first}"
        if isinstance(value, property):
            return f"property {self.made_of(value.fget)} {self.made_of(value.fset)}"
        code = getattr(value, "__code__", None)
        if not isinstance(code, types.CodeType):
            return self.once(named, value)
        self.functions[id(value)] = value
        held = [cell.cell_contents for cell in value.__closure__ or () if deep and filled(cell)]
        inner = [self.made_of(each, None, deep - 1) for each in held if isinstance(each, types.FunctionType)]
        after = digest(sorted(map(constant, (value.__kwdefaults__ or {}).items()))) if value.__kwdefaults__ else ""
        return f"{self.once(instructions, code)} {self.once(constant, value.__defaults__)} {inner} {after}"

    def once(self, what: Callable, value) -> str:
        """The digest of `what(value)`, which never changes for the same value, as it is kept alive here."""
        if (what, id(value)) not in self.seen:
            self.seen[what, id(value)] = value, digest(what(value))
        return self.seen[what, id(value)][1]


def leaned_on(module: types.ModuleType, key: str) -> bool:
    """Whether a name of a module is watched: all of ours, and of others what they have for everybody to use."""
    value = getattr(module, key, None)
    if module.__name__ in OURS or is_module(value):
        return not key.startswith("__")
    public = not key.startswith("_") or (module is builtins and key != "_")  # which IPython sets
    return public and (callable(value) or isinstance(value, torch.dtype))


def own(cls: type) -> list[str]:
    """The names that a class itself has. What it inherits from a class of C stays as it is."""
    return sorted(key for key in vars(cls) if key not in NO_CODE)


def is_module(value) -> bool:
    return isinstance(value, types.ModuleType)


def named(value) -> tuple:
    names = type(value).__name__, getattr(value, "__module__", ""), getattr(value, "__qualname__", "")
    return *map(str, names), constant(value)


def filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def listeners() -> Iterator[tuple[str, str]]:
    """What looks on, and could change, while other code runs, without being put in any function's place."""
    modes = torch.overrides._get_current_function_mode_stack()
    hooks = [v for k, v in vars(nn.modules.module).items() if k.startswith("_global_") and isinstance(v, dict)]
    yield "sys.settrace", str(sys.gettrace())
    yield "sys.setprofile", str(sys.getprofile())
    yield "a mode over torch's functions", str(sum(type(mode) is not DeviceContext for mode in modes))
    yield "a mode over torch's operators", str(torch._C._len_torch_dispatch_stack())
    yield "torch.library", str(sorted(each for each in torch.library._impls if OVERRIDE.fullmatch(each)))
    yield "hooks for every module", str(sum(map(len, hooks)))


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
    return str(value) if isinstance(value, PLAIN) else type(value).__name__


def replaced(now, before: dict[str, str]) -> list[str]:
    """The names that stand for something else in `now`, a stranger's answer, than they did before."""
    return [name for name, what in before.items() if not isinstance(now, dict) or now.get(name) != what]
