"""One frozen base, many adapters, one batch: each row chooses its own (Sheng et al. 2023, "S-LoRA: Serving Thousands of
Concurrent LoRA Adapters"); what a row's adapter does is in `rows.py`.

    bank = Bank(model, folder="adapters", bytes=10_000_000)
    bank.generate(ids, attention_mask=mask, adapters=["pirate", None, "forecast"])

The folder holds more adapters than memory. Those that were used last stay, up to a number of bytes; what a name stands
for is its files' content, so an adapter that was trained again is read again.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from minipeft.attach import Tuned
from minipeft.build import carries_adapters
from minipeft.serve.checkpoint import CONFIG, WEIGHTS, contents, packed, parsed, unpacked
from minipeft.serve.rows import Composition, Parts, act, gather, parts_of
from minipeft.targets import is_matrix, mixtures

RACY = 2.0  # seconds: a file that was written so recently may change again and keep its times

BARE: dict[str, Parts] = {}  # what None chooses


@dataclass(frozen=True)
class Resident:
    """An adapter in memory: {path of a module: its parts}. `stamp`: how its files looked; None if it has none."""

    parts: dict[str, Parts]
    size: int
    digest: str = ""
    stamp: tuple | None = None


@dataclass
class Call:
    """What the hooks look at: the adapters of the rows, and how many rows the model is called with."""

    composition: Composition
    batch: int  # rows that have an adapter each
    rows: int  # `generate` repeats each for its beams


class Bank:
    """Serves many LoRA, DoRA and (IA)³ adapters over one base.

    `folder`: its subfolders are adapters by name, read when they are first asked for, and again when they changed.
    `bytes`: how much memory adapters read from files may take; the one that was used least recently goes first.

    The model is put into eval mode, and gets hooks that do nothing outside the bank's calls; `close` takes them off.
    Calls may run in several threads at once, while adapters are added, removed and written anew: a batch computes with
    the numbers that it began with. No gradients are kept.
    """

    def __init__(self, model: nn.Module, folder: str | os.PathLike | None = None, bytes: int | None = None):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}; a bank needs a torch.nn.Module.")
        if carries_adapters(model):
            raise ValueError("This model carries adapters already; give the bank the bare base, tuned.detach().")
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"folder={str(folder)!r} is not a directory; make it, or leave it out.")
        if bytes is not None and (isinstance(bytes, bool) or not isinstance(bytes, int) or bytes < 1):
            raise ValueError(f"bytes={bytes!r} is not a whole number of at least 1, such as 10_000_000.")
        self.model, self.folder, self.bytes = model.eval(), None if folder is None else Path(folder), bytes
        self._lock = threading.RLock()
        self._paths: dict[str, Path] = {}  # what add() was given a path for
        self._resident: OrderedDict[str, Resident] = OrderedDict()  # the least recently used first
        self._last: tuple[list[dict[str, Parts]], list[int], Composition] = [], [], Composition({}, torch.empty(0))
        self._running: ContextVar[Call | None] = ContextVar("running", default=None)
        self._hooks = [model.register_forward_pre_hook(self._listen, with_kwargs=True)]
        for path, module in model.named_modules():
            if is_matrix(module):
                self._hooks.append(module.register_forward_hook(partial(self._hook, path), with_kwargs=True))

    # -- which adapters there are -------------------------------------------------------------------------------------
    def add(self, name: str, adapter: str | os.PathLike | Tuned) -> None:
        """Serves the adapter in a directory, or a copy of the one that is active in a `Tuned`, under `name`.

        A name that is in use gets the new adapter; batches that run keep the old one. Raises ValueError when it does
        not load, does not fit the base, or (from a `Tuned`, which cannot be read again) exceeds the byte budget.
        """
        check_component(name)
        if isinstance(adapter, Tuned):
            if len(adapter.active) != 1:
                raise ValueError(f"{len(adapter.active)} adapters are active; use() the one that {name!r} shall be.")
            resident, path = self._build(*packed(adapter, adapter.active[0])), None
        elif isinstance(adapter, str | os.PathLike):
            resident, path = self._read(Path(adapter)), Path(adapter)
        else:
            raise TypeError(f"adapter is a {type(adapter).__name__}; add() takes a path or a Tuned.")
        with self._lock:
            self._keep(name, resident, {name})
            self._paths.pop(name, None)
            if path is not None:
                self._paths[name] = path

    def remove(self, name: str) -> None:
        """Forgets an adapter; one in the folder is read again when it is next asked for.

        Raises ValueError if there is none of this name in memory."""
        with self._lock:
            if self._resident.pop(name, None) is None and name not in self._paths:
                raise ValueError(f"There is no adapter {name!r} in memory; the bank has {self.names()}.")
            self._paths.pop(name, None)

    def names(self) -> list[str]:
        """Every name that a row can choose: what was added, and what lies in the folder."""
        with self._lock:
            found = {*self._paths, *(name for name, each in self._resident.items() if each.stamp is None)}
        if self.folder is not None:
            found |= {path.parent.name for path in self.folder.glob(f"*/{CONFIG}") if path.parent.name[0] != "."}
        return sorted(found)

    def check(self, names: Sequence[str | None]) -> dict[str, str]:
        """{name: why it cannot be served} for those of `names` that cannot; {} when all can."""
        wrong = {}
        for name in dict.fromkeys(names):
            try:
                if name is not None:
                    self._resolve(name, set())
            except (ValueError, OSError) as error:
                wrong[name] = str(error)
        return wrong

    @property
    def resident(self) -> dict[str, int]:
        """{name: bytes} of the adapters in memory, the least recently used first."""
        with self._lock:
            return {name: each.size for name, each in self._resident.items()}

    # -- calling ------------------------------------------------------------------------------------------------------
    def __call__(self, input_ids: torch.Tensor | None = None, *, adapters: Sequence[str | None], **kwargs):
        """The base's forward; row i of the batch is seen through adapter `adapters[i]`, or None, the bare base.

        Raises ValueError, before anything is computed, that names every adapter that cannot be served, and why.
        """
        return self._run(self.model, input_ids, adapters, kwargs)

    def generate(self, input_ids: torch.Tensor | None = None, *, adapters: Sequence[str | None], **kwargs):
        """The base's `generate`, with the same `adapters`: one for each prompt, however many beams or samples."""
        return self._run(self.model.generate, input_ids, adapters, kwargs)

    def close(self) -> None:
        """Takes the hooks off the model, which is then as it was, in eval mode."""
        for hook in self._hooks:
            hook.remove()

    def _run(self, work: Callable, input_ids: torch.Tensor | None, adapters: Sequence[str | None], kwargs: dict):
        if isinstance(adapters, str) or not all(name is None or isinstance(name, str) for name in adapters):
            raise TypeError(f"adapters={adapters!r} is not a list with one adapter name or None per row of the batch.")
        batch = first_length((input_ids, *kwargs.values()))
        if not len(adapters):
            raise ValueError("adapters= is empty; a batch has at least one row.")
        if batch is not None and batch != len(adapters):
            raise ValueError(
                f"adapters= has {len(adapters)} entries for a batch of {batch}; give one name or None per row."
            )
        token = self._running.set(Call(self.compose(adapters), len(adapters), len(adapters)))
        try:
            with torch.no_grad():
                return work(**kwargs) if input_ids is None else work(input_ids, **kwargs)
        finally:
            self._running.reset(token)

    def _listen(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if call := self._running.get():
            call.rows = first_length((*args, *kwargs.values())) or call.rows

    def _hook(self, path: str, module: nn.Module, args: tuple, kwargs: dict, y: torch.Tensor) -> torch.Tensor:
        call = self._running.get()
        if call is None or path not in call.composition.parts:
            return y
        x = args[0] if args else next(iter(kwargs.values()))
        if len(x) != call.rows or call.rows % call.batch:
            raise ValueError(
                f"{path!r} got a batch of {len(x)}, but {call.batch} adapters were chosen; per-row choice works where "
                "dimension 0 of every adapted module's input is the batch."
            )
        return act(module, x, y, call.composition.parts[path], call.composition.own)

    def compose(self, adapters: Sequence[str | None]) -> Composition:
        """The adapters of these rows, gathered; the last composition is kept for a next batch that has the same.

        Raises ValueError that names every adapter that cannot be served, and why.
        """
        names = list(dict.fromkeys(adapters))
        with self._lock:
            found, wrong = {None: BARE}, {}
            for name in filter(None.__ne__, names):
                try:
                    found[name] = self._resolve(name, set(names)).parts
                except (ValueError, OSError) as error:
                    wrong[name] = str(error)
            if wrong:
                raise ValueError("; ".join(f"{name!r} cannot be served: {why}" for name, why in wrong.items()))
            distinct, own = [found[name] for name in names], [names.index(name) for name in adapters]
            before, rows, last = self._last
            if rows != own or [*map(id, before)] != [*map(id, distinct)]:
                last = gather(distinct, own, next(self.model.parameters()).device)
                self._last = distinct, own, last
            return last

    # -- memory -------------------------------------------------------------------------------------------------------
    def _resolve(self, name: str, needed: set[str]) -> Resident:
        """The adapter as it is now: from memory, or from its files if they changed. `needed` ones are not put out."""
        with self._lock:
            check_component(name)
            held = self._resident.get(name)
            path = self._paths.get(name) or (self.folder / name if self.folder is not None else None)
            if held is not None and held.stamp is None:
                self._resident.move_to_end(name)
                return held
            if path is None or (name not in self._paths and not path.is_dir()):
                self._resident.pop(name, None)
                raise ValueError(f"there is no adapter of this name; the bank has {', '.join(self.names()) or 'none'}.")
            if held is None or held.stamp != stamp(path) or racy(held.stamp):
                try:
                    fresh = self._read(path, held)
                except (ValueError, OSError):
                    self._resident.pop(name, None)  # what is not there any more is not served
                    raise
                self._keep(name, fresh, needed | {name})
            self._resident.move_to_end(name)
            return self._resident[name]

    def _keep(self, name: str, resident: Resident, needed: set[str]) -> None:
        """Puts an adapter into memory, and the least recently used ones out that can be read again."""
        others = {n: each for n, each in self._resident.items() if n != name}
        if self.bytes is not None:
            total = resident.size + sum(each.size for each in others.values())
            for other, each in others.items():
                if total > self.bytes and each.stamp is not None and other not in needed:
                    del self._resident[other]
                    total -= each.size
            if total > self.bytes:
                raise ValueError(
                    f"it takes {resident.size:,} bytes, and with what this batch needs {total:,}; the bank has "
                    f"{self.bytes:,}. Ask for fewer adapters at once, or give the bank more."
                )
        self._resident[name] = resident

    def _read(self, path: Path, held: Resident | None = None) -> Resident:
        """The adapter in the directory `path`; `held`, if its content is that."""
        for _ in range(10):
            before = stamp(path)
            files = contents(path)
            if before == stamp(path):  # else somebody was writing
                break
        digest = hashlib.sha256(b"".join(hashlib.sha256(file).digest() for file in files)).hexdigest()
        if held is not None and held.digest == digest:
            return replace(held, stamp=before)
        return replace(self._build(*parsed(*files)), digest=digest, stamp=before)

    def _build(self, config: dict, tensors: dict[str, torch.Tensor]) -> Resident:
        _, layers = unpacked(self.model, config, tensors)
        inside = tuple(f"{path}." if path else "" for path in mixtures(self.model))
        if mixed := [layer.path for layer in layers.values() if inside and layer.path.startswith(inside)]:
            raise ValueError(f"it changes {mixed[0]!r}, in a mixture of experts, where rows of the batch are mixed up.")
        parts = parts_of(list(layers.values()))
        return Resident(parts, sum(each.nbytes for here in parts.values() for each in here.values()))


def first_length(values: Iterable[object]) -> int | None:
    """The length of the batch: of the first tensor of several dimensions (a position alone has one), else the first."""
    tensors = [value for value in values if isinstance(value, torch.Tensor) and value.ndim]
    return next((len(value) for value in sorted(tensors, key=lambda value: value.ndim == 1)), None)


def check_component(name: str) -> None:
    """A name comes from outside: it must not lead out of the folder."""
    if not isinstance(name, str) or not re.fullmatch(r"[^./\\\0:][^/\\\0:]{0,199}", name):
        raise ValueError(f"{name!r} cannot name an adapter; use a word without slashes that begins with no dot.")


def stamp(path: Path) -> tuple:
    """How the two files look from outside; another content shows, except in files that are `racy`."""
    try:
        looks = [os.stat(path / file) for file in (CONFIG, WEIGHTS)]
    except FileNotFoundError:
        return ()
    return tuple((look.st_ino, look.st_size, look.st_mtime_ns, look.st_ctime_ns) for look in looks)


def racy(seen: tuple) -> bool:
    return any(time.time() - changed / 1e9 < RACY for *_, changed in seen)
