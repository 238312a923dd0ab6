"""Where to begin with a model and a text of one's own, computed from what the course has measured.

    advice = advise(model, "class", batch=16, length=64, memory=4 * 2**30)
    advice                  # a line for each method: trained numbers, memory, does it fit, a rate, what was measured
    advice.first            # the Option to begin with; .method for attach, .rate for fit, .why in words

Memory comes from `analyze/memory.py`, which runs a step on tensors without numbers. Quality and rates come from the
nearest table that was measured: for classes the capstone's board (a real encoder on real reviews), for words the atlas
(the pocket model). What has no measurement, such as a base in 4 bits, says so.

    the rate        η = η* · min(1, w* / w), to half decades; η*: the best rate of the table, whose model has width w*
    the method      the best of those that fit, or the one with the least memory that is not worse by what matters

The first is what Adam asks for where matrices become wider (Yang et al. 2022, "Tensor Programs V", table 3). No run of
this course tests it beyond a width of 384, so `rates` has the half decades on both sides too: validation rows choose.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

from minipeft.analyze.budget import budget, on_meta
from minipeft.analyze.memory import Memory, predict
from minipeft.attach import Tuned
from minipeft.course import atlas, board
from minipeft.layer import Method
from minipeft.learn.protocol import half_decade, paired
from minipeft.methods.dora import DoRA
from minipeft.methods.ia3 import IA3
from minipeft.methods.lora import LoRA
from minipeft.methods.select import BitFit, Full, Softmax
from minipeft.reading import longest

ROOM = 1.3  # a process was seen to grow by 1.28 times the sum over its tensors, with LoRA on 100 M parameters
MATTERS = {"class": 0.02, "text": 0.1, "answer": 0.1}  # of accuracy; in nats a token
NEAREST = {"text": "pirate", "answer": "facts(64)"}  # the atlas's task that is most like it
OTHERS = ("pirate", "cipher", "flip", "facts(64)")
WIDTHS = {"class": 384, "text": 128, "answer": 128}  # of the model that was measured
WORDS: dict[str, Method] = {
    "output layer": Softmax(),
    "BitFit": BitFit(),
    "IA3": IA3(),
    "LoRA r=8": LoRA(rank=8, gamma=2.0),
    "DoRA r=8": DoRA(rank=8, gamma=2.0),
    "full fine-tuning": Full(),
}


@dataclass(frozen=True)
class Measured:
    """A method in the nearest table: its best `rate`, its scores there by seed (accuracy, or loss in nats a token), and
    the best rates of all tables, the nearest one's included."""

    rate: float
    scores: tuple[float, ...]
    rates: tuple[float, ...]


@dataclass(frozen=True)
class Option:
    """One method on one storage of the base. `memory` is None and `why` says it where the model does not take it.

    `fits`: "fits", "tight" (the tensors alone do; see ROOM), "too large" or "cannot". `rate`: to begin with; `rates`:
    to try, of which validation rows choose. `file`: bytes of the adapter. `measured` is None without a measurement.
    """

    name: str
    method: Method | list[Method]
    storage: str
    trainable: int
    file: int
    memory: Memory | None
    fits: str
    rate: float
    rates: tuple[float, ...]
    measured: Measured | None
    why: str


@dataclass(frozen=True)
class Advice:
    """What `advise` found: all `options`, and the `first` to try (None where none fits)."""

    options: tuple[Option, ...]
    first: Option | None
    kind: str

    def table(self):
        """One row an option, as a pandas DataFrame. Memory in MiB, the file in MB, the score as the table has it."""
        import pandas as pd

        score = "accuracy there" if self.kind == "class" else "loss there"
        rows = {
            f"{o.name}, {o.storage}": {
                "trains": o.trainable,
                "memory, MiB": o.memory.peak / 2**20 if o.memory else math.nan,
                "fits?": o.fits,
                "file, MB": o.file / 1e6,
                "begin at": o.rate,
                score: statistics.fmean(o.measured.scores) if o.measured else math.nan,
            }
            for o in self.options
        }
        return pd.DataFrame(rows).T

    def __repr__(self) -> str:
        table = self.table().to_string(
            formatters={
                "trains": "{:,}".format, "memory, MiB": "{:,.0f}".format, "file, MB": "{:,.2f}".format,
                "begin at": "{:g}".format, "accuracy there": "{:.3f}".format, "loss there": "{:.3f}".format,
            }, na_rep="–",
        )  # fmt: skip
        if self.first:
            why = self.first.why
        elif all(o.fits == "cannot" for o in self.options):
            why = self.options[-1].why
        else:
            why = "Nothing fits: take a smaller batch, shorter texts or a smaller model."
        return f"{table}\n\n{why}"


@cache
def measured(kind: str) -> dict[str, Measured]:
    """{method: what the nearest table says of it}."""
    if kind == "class":
        found = board.board()
        return {name: Measured(each["rate"], tuple(each["accuracy"]), (each["rate"],)) for name, each in found.items()}
    runs, result = atlas.load(), {}
    for name, method in WORDS.items():
        best = {}
        for task in OTHERS:
            own = atlas.of(runs, task, method) if (runs.task.eq(task) & runs.attached.eq(repr(method))).any() else None
            if own is not None:
                best[task] = atlas.best(runs, task, method)["lr"], own
        if NEAREST[kind] in best:
            rate, own = best[NEAREST[kind]]
            scores = own[own.lr == rate].sort_values("seed").loss
            result[name] = Measured(rate, tuple(scores), tuple(sorted({each for each, _ in best.values()})))
    return result


def advise(
    model,
    kind: str = "text",
    batch: int = 16,
    length: int = 64,
    memory: float | None = None,
    file: float = math.inf,
) -> Advice:
    """What to begin with on `model`, for a task of this `kind` and batches of (batch, length) tokens.

    Args:
        model: a module of transformers, its configuration, or a name of `minipeft.analyze.catalogue`; only its shapes
            are used. For classes, one with a classifier.
        kind: "class", "text" or "answer", as a `Task` has it.
        memory: bytes that training may take; None is what is free now, on the GPU if the model is on one.
        file: bytes that an adapter's file may take.

    Raises ValueError for another kind, for limits that are not positive, and as `analyze.memory.predict` does.
    """
    if kind not in MATTERS:
        raise ValueError(f'kind is "class", "text" or "answer", as a task has it, but is {kind!r}.')
    if isinstance(model, Tuned):
        raise ValueError("This model carries adapters already: advise on the base, tuned.detach().")
    memory = free(model) if memory is None else memory
    if not (memory > 0 and file > 0):
        raise ValueError(f"memory={memory!r} and file={file!r} are bytes, so each must be more than 0.")
    model = check(model, kind, batch, length)
    candidates = {name: method for name, (method, _) in board.METHODS.items()} if kind == "class" else WORDS
    table, options = measured(kind), []
    for name, method in candidates.items():
        storages = ("float32", "bfloat16", "4 bits") if name == "LoRA r=8" else ("float32",)
        for storage in storages:
            options.append(option(model, kind, name, method, storage, table[name], batch, length, memory, file))
    return Advice(tuple(options), choose(options, kind, file), kind)


def check(model, kind: str, batch: int, length: int):
    """The model, or its shapes alone; ValueError where it does not do what a task asks for, or reads no such batch."""
    shapes = on_meta(model)
    writes = getattr(shapes, "get_output_embeddings", lambda: None)() is not None
    if not isinstance(shapes.get_input_embeddings(), torch.nn.Embedding):
        raise ValueError(f"{type(shapes).__name__} reads no words, and this advice was measured on words alone.")
    if kind == "class" and writes:
        raise ValueError("The task asks for a class but the model predicts words: load it with labels=….")
    if kind != "class" and not writes:
        raise ValueError(
            f"The task asks for words but the model, {type(shapes).__name__}, has no output layer over words: load "
            "it as a language model, without labels=…."
        )
    most = longest(shapes) or length
    if batch < 1 or not 1 <= length <= most:
        raise ValueError(f"Batches of {batch} × {length} tokens do not fit: the model reads 1 to {most} tokens.")
    return shapes


def option(model, kind, name, method, storage, known, batch, length, memory, file) -> Option:
    """One line of the table."""
    how = {"float32": {}, "bfloat16": {"dtype": torch.bfloat16}, "4 bits": {"quantized": True}}[storage]
    start, *others = (scaled(rate, WIDTHS[kind], width(model)) for rate in (known.rate, *known.rates))
    rates = tuple(sorted({half_decade(start, False), start, half_decade(start, True), *others}))
    told = known if storage == "float32" else None
    try:
        count = budget(model, method)
        need = predict(model, method, batch, length, **how)
    except ValueError as error:
        return Option(name, method, storage, 0, 0, None, "cannot", start, rates, told, f"{name}: {error}")
    fits = "fits" if need.peak * ROOM <= memory else "tight" if need.peak <= memory else "too large"
    size = f"{name} over a base in {storage} needs {need.peak * ROOM / 2**30:.2f} GiB of {memory / 2**30:.2f}"
    return Option(
        name, method, storage, count.trainable, count.file_bytes, need, fits, start, rates, told,
        f"{size} ({fits}), and its file takes {count.file_bytes / 1e6:,.2f} MB.",
    )  # fmt: skip


def choose(options: Sequence[Option], kind: str, file: float = math.inf) -> Option | None:
    """The best measured option that fits; or, of those that are surely not worse by `MATTERS`, the one with the least
    memory. Without a measured one that fits: the smallest of the rest that does."""
    fitting = [o for o in options if o.fits == "fits" and o.file <= file]
    told = [o for o in fitting if o.measured]
    if not told:
        first = min(fitting, key=lambda o: o.memory.peak, default=None)
        return first and replace(first, why=f"{first.why} No run of this course says how well it learns.")
    sign = -1 if kind == "class" else 1
    best = min(told, key=lambda o: sign * statistics.fmean(o.measured.scores))
    alike = [o for o in told if o is best or lost(o, best, sign).high <= MATTERS[kind]]
    first = min(alike, key=lambda o: o.memory.peak)
    where = "film reviews with a real encoder" if kind == "class" else f"{NEAREST[kind]} with the pocket model"
    unit = "of accuracy" if kind == "class" else "nats a token"
    if first is best:
        reason = f"Of what fits, it came out best on {where}"
    else:
        gap = lost(first, best, sign)
        reason = (
            f"On {where} it lost {gap.mean:.3f} {unit} to {best.name}, at most {gap.high:.3f} with 95 % confidence, "
            f"and it needs {first.memory.peak / best.memory.peak:.2f} times the memory"
        )
    return replace(first, why=f"Begin with {first.name} at {first.rate:g}. {reason}. {first.why}")


def lost(one: Option, best: Option, sign: int):
    """The interval of how much worse `one` was than `best`, over the seeds that both have, from the first on."""
    both = list(zip(one.measured.scores, best.measured.scores, strict=False))
    return paired([sign * a for a, _ in both], [sign * b for _, b in both])


def scaled(rate: float, measured_width: int, width: int) -> float:
    """The rate for a model of `width`: η · min(1, w* / w), on the grid of half decades (1, 3, 10 …)."""
    exact = rate * min(1.0, measured_width / width)
    power = 10.0 ** math.floor(math.log10(exact))
    nearest = min((power, 3 * power, 10 * power), key=lambda each: abs(math.log(each / exact)))
    return float(f"{nearest:.0e}")


def width(model) -> int:
    """How many numbers stand for a token between the layers."""
    return on_meta(model).get_input_embeddings().embedding_dim


def free(model) -> int:
    """Bytes that are free where the model is."""
    device = next(iter(model.parameters())).device if isinstance(model, torch.nn.Module) else torch.device("cpu")
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available
