"""One frozen base, many adapters, one batch: each row of the batch chooses its own (Chen et al. 2023, "Punica:
Multi-Tenant LoRA Serving", §4; Sheng et al. 2023, "S-LoRA: Serving Thousands of Concurrent LoRA Adapters", §4).

    y_i = W·x_i + b + γ·B[own_i]·A[own_i]·x_i        for row i, whose adapter is own_i

W·x is one product for the whole batch. A[own] of shape (n, r, d_in) and B[own] of shape (n, d_out, r) are gathered once
for each composition of the batch, ranks filled up with zeros; two batched products do the rest. So the cost follows
the rows, however many adapters they spread over.

    bank = Bank(model, folder="adapters", bytes=10_000_000)
    bank.generate(ids, attention_mask=mask, adapters=["pirate", None, "forecast"])
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
from torch.nn import functional as F

from minipeft.attach import Tuned
from minipeft.build import carries_adapters
from minipeft.layer import Layer
from minipeft.methods.dora import DoRALayer
from minipeft.methods.ia3 import IA3Layer
from minipeft.methods.lora import LoRALayer
from minipeft.serve.checkpoint import CONFIG, WEIGHTS, contents, packed, parsed, unpacked
from minipeft.targets import is_matrix, mixtures

RACY = 2.0  # seconds: a file that was written so recently may change again and keep its times

# What an adapter does at one module, y' = s ⊙ (W·(l ⊙ x) + b) + c + B·A·x, by the parts that it has: A (r, d_in),
# B (d_out, r) with γ in it, s and c (d_out,), l (d_in,); for an embedding T (V, r) instead of A.
Parts = dict[str, torch.Tensor]
NEUTRAL = {"A": 0.0, "B": 0.0, "T": 0.0, "c": 0.0, "s": 1.0, "l": 1.0}


def product(y: torch.Tensor, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """y_i + B_i·A_i·x_i for each row i: x (n, t, d_in), A (n, r, d_in), B (n, d_out, r), y (n, t, d_out)."""
    return torch.baddbmm(y, torch.bmm(x, A.mT), B.mT)


@dataclass(frozen=True)
class Resident:
    """An adapter in memory: {path of a module: its parts}. `stamp`: how its files looked; None if it has none."""

    parts: dict[str, Parts]
    size: int
    digest: str = ""
    stamp: tuple | None = None


@dataclass(frozen=True)
class Composition:
    """The adapters of a batch, gathered by row: {path: {"A": (n, r, d_in), …}}; T is (distinct, V, r) and not gathered,
    for `own` (n,) says which of the distinct adapters each row has. n is 1 where the whole batch has one adapter."""

    parts: dict[str, Parts]
    own: torch.Tensor


def gather(distinct: Sequence[Resident | None], own: Sequence[int], device: torch.device) -> Composition:
    """Row i gets the parts of `distinct[own[i]]`; where an adapter has no such part, what changes nothing."""
    index = torch.tensor([0] if len(distinct) == 1 else own, device=device)
    by_path: dict[str, Parts] = {}
    for path in dict.fromkeys(path for each in distinct if each for path in each.parts):
        here = [each.parts.get(path, {}) if each else {} for each in distinct]
        for key in dict.fromkeys(key for parts in here for key in parts):
            like = max((parts[key] for parts in here if key in parts), key=torch.Tensor.numel)  # of the highest rank
            stacked = torch.stack([widened(parts.get(key), like, NEUTRAL[key]) for parts in here])
            by_path.setdefault(path, {})[key] = stacked if key == "T" else stacked[index]
    return Composition(by_path, index)


def widened(part: torch.Tensor | None, like: torch.Tensor, neutral: float) -> torch.Tensor:
    if part is None:
        return torch.full_like(like, neutral)
    missing = [w for n, full in zip(reversed(part.shape), reversed(like.shape), strict=True) for w in (0, full - n)]
    return F.pad(part, missing) if any(missing) else part


def act(module: nn.Module, x: torch.Tensor, y: torch.Tensor, parts: Parts, own: torch.Tensor) -> torch.Tensor:
    """The module's output with each row's adapter at work; `y` is its plain output. A row and its beams lie together,
    so (rows·beams, …) is (rows, beams·…) to the adapters."""
    n = len(own)
    if "l" in parts:
        scaled = x.reshape(n, -1, x.shape[-1]) * parts["l"][:, None]
        y = type(module).forward(module, scaled.to(x.dtype).view(x.shape))
    new = y.reshape(n, -1, y.shape[-1])
    if "s" in parts:
        new = torch.addcmul(parts["c"][:, None], parts["s"][:, None], new.to(parts["s"].dtype))
    if "T" in parts:
        new = torch.baddbmm(new.to(parts["B"].dtype), parts["T"][own[:, None], x.reshape(n, -1)], parts["B"].mT)
    elif "A" in parts:
        A, B = parts["A"], parts["B"]
        new = product(new.to(B.dtype), x.reshape(n, -1, x.shape[-1]).to(A.dtype), A, B)
    return new.view(y.shape).to(y.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# From a method's layer to parts
# ---------------------------------------------------------------------------------------------------------------------
def lora_parts(layer: LoRALayer) -> Parts:
    return (
        {"T": layer.A.T, "B": layer.gamma * layer.B} if layer.embedding else {"A": layer.A, "B": layer.gamma * layer.B}
    )


def dora_parts(layer: DoRALayer) -> Parts:
    # W'·x + b = s ⊙ (W·x + b) + (1 − s) ⊙ b + s ⊙ γ·B·A·x
    s, bias = layer.scale(), getattr(layer.owner[0], "bias", None)
    c = torch.zeros_like(s) if bias is None else (1 - s) * bias[layer.rows]
    return {"A": layer.A, "B": s[:, None] * layer.gamma * layer.B, "s": s, "c": c}


def ia3_parts(layer: IA3Layer) -> Parts:
    l = layer.l.flatten()  # noqa: E741
    return {"l": l} if layer.feedforward else {"s": l, "c": torch.zeros_like(l)}


PARTS = {LoRALayer: lora_parts, DoRALayer: dora_parts, IA3Layer: ia3_parts}


@torch.no_grad()
def parts_of(layers: Sequence[Layer]) -> dict[str, Parts]:
    """{path: parts} of an adapter; the slices of one module together, in its full width."""
    found: dict[str, Parts] = {}
    for layer in layers:
        if type(layer) not in PARTS:
            raise ValueError(f"it holds a {type(layer).__name__}; a bank serves LoRA, DoRA and (IA)³ per row.")
        new, here = {key: part.detach() for key, part in PARTS[type(layer)](layer).items()}, found.get(layer.path)
        if any(layer.padding):
            if "l" in new:
                raise ValueError(f"it scales the inputs of a slice of {layer.path!r}, which is not done per row.")
            for key in new.keys() - {"A", "T"}:
                sides = (0, 0, *layer.padding) if key == "B" else layer.padding
                new[key] = F.pad(new[key], sides, value=NEUTRAL[key])
        if here is not None:  # the ranks of slices lie side by side; s is 1 and c is 0 outside a slice
            joined = {"A": lambda a, b: torch.cat([a, b]), "s": torch.mul, "c": torch.add}
            joined["B"] = joined["T"] = lambda a, b: torch.cat([a, b], dim=1)
            new = {key: joined[key](here[key], part) for key, part in new.items()}
        found[layer.path] = {key: part.contiguous() for key, part in new.items()}
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The files
# ---------------------------------------------------------------------------------------------------------------------
def check_component(name: str) -> None:
    """A name comes from outside: it must not lead out of the folder."""
    if not isinstance(name, str) or not re.fullmatch(r"[^./\\\0:][^/\\\0:]{0,199}", name):
        raise ValueError(f"{name!r} cannot name an adapter; use a word without slashes that begins with no dot.")


def stamp(path: Path) -> tuple:
    """How the two files look from outside; another content shows, except in files that are `racy`."""
    looks = [os.stat(path / file) for file in (CONFIG, WEIGHTS) if (path / file).exists()]
    return tuple((look.st_ino, look.st_size, look.st_mtime_ns, look.st_ctime_ns) for look in looks)


def racy(seen: tuple) -> bool:
    return any(time.time() - changed / 1e9 < RACY for *_, changed in seen)


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
        self._last: tuple[list[dict[str, Parts] | None], list[int], Composition] = [], [], None
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
        """Forgets an adapter; one in the folder is read again when it is next asked for. ValueError if there is none."""
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
            found: dict[str | None, Resident | None] = {None: None}
            wrong = {}
            for name in names:
                try:
                    found[name] = None if name is None else self._resolve(name, set(names))
                except (ValueError, OSError) as error:
                    wrong[name] = str(error)
            if wrong:
                raise ValueError("; ".join(f"{name!r} cannot be served: {why}" for name, why in wrong.items()))
            distinct, own = [found[name] for name in names], [names.index(name) for name in adapters]
            content = [each and each.parts for each in distinct]
            before, rows, last = self._last
            if rows != own or len(before) != len(content) or any(a is not b for a, b in zip(before, content)):
                device = next(self.model.parameters()).device
                self._last = content, own, last = content, own, gather(distinct, own, device)
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
    """The length of the first tensor, which a model's batch has."""
    return next((len(value) for value in values if isinstance(value, torch.Tensor) and value.ndim), None)
