"""What is right, what is wrong, and why: a learner's code against a slow, obvious reference over random shapes.

An exercise yields cases. A case says in words which property it looks at, what to call the learner's code with, what
should come out, and what would come out under well-known misconceptions. `examine` stops at the first case that fails.
"""

from __future__ import annotations

import html
import inspect
import math
import numbers
import random
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module

import torch

# relative to the largest expected number: |got − expected| ≤ tolerance · max(1, max|expected|)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.0, torch.float16: 0.0}
CORRECT, WRONG, NOT_ATTEMPTED, COULD_NOT_RUN = "correct", "wrong", "not attempted", "could not run"
SIGNS = {CORRECT: "✓", WRONG: "✗", NOT_ATTEMPTED: "○", COULD_NOT_RUN: "!"}
READABLE = 400  # characters of a call that is shown
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")


@dataclass(frozen=True)
class Raised:
    """An exception of the learner's code: the names of its classes, most special first, its text, and where."""

    kinds: tuple[str, ...]
    text: str
    where: str = ""

    def __str__(self) -> str:
        return f"{self.kinds[0]}: {self.text}" + (f" ({self.where})" if self.where else "")


@dataclass(frozen=True)
class Raises:
    """Expected: an exception of this class, whose text mentions these words."""

    kind: str
    mentions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """One call. `claim` completes the sentence "Your answer should …".

    `expect` is the value (or Raises) that should come out; or `judge(value)` returns None or says what is wrong.
    `wrong`: {misconception: a function that gives what comes out under it}. `lenses` says whether the lenses use its
    arguments again; `promises` are looked at while it is called (see `drives.promises`), by default the exercise's.
    """

    claim: str
    args: tuple
    expect: object = None
    judge: Callable[[object], str | None] | None = None
    wrong: Mapping[str, Callable[[], object]] = field(default_factory=dict)
    exact: bool = False
    keywords: Mapping[str, object] = field(default_factory=dict)
    promises: tuple[str, ...] | None = None
    lenses: bool = True


@dataclass(frozen=True)
class Exercise:
    """`cases(rng)` yields cases from a `random.Random`; `objects` are the names that the learner defines;
    `drive` names the function of `minipeft.course.drives` that calls them.

    `reference` are right objects in the place of the learner's, which `lenses` compares with, and `edges(rng)` yields
    (claim, arguments) or (claim, arguments, keywords) where answers break. `without`: {lens or promise: why it is off}.
    `constants` are arguments that nobody trains, so that their gradient is left open; `positive` are numbers that
    are neither 0, where they are whole, nor below 0, nor very large. `many` is (of what, arguments of a large case).
    """

    name: str
    title: str
    cases: Callable[[random.Random], Iterator[Case]]
    hints: tuple[str, str]
    objects: tuple[str, ...]
    drive: str = "common.call"
    reference: tuple = ()
    edges: Callable[[random.Random], Iterator[tuple]] = lambda rng: iter(())
    without: Mapping[str, str] = field(default_factory=dict)
    constants: tuple[str, ...] = ()
    positive: tuple[str, ...] = ()
    many: tuple[str, Callable[[random.Random], tuple]] | None = None

    def promises(self) -> tuple[str, ...]:
        return tuple(each for each in ("modes", "again", "memory") if each not in self.without)


@dataclass(frozen=True)
class Verdict:
    """The outcome of an examination, as text and as HTML."""

    exercise: str
    outcome: str
    lines: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return "\n  ".join([f"{SIGNS[self.outcome]} {self.exercise}: {self.outcome}", *self.lines])

    def _repr_html_(self) -> str:
        colour = {CORRECT: "#1a7f37", WRONG: "#b42318", NOT_ATTEMPTED: "#57606a", COULD_NOT_RUN: "#9a6700"}
        head, *rest = (html.escape(line).replace("\n  ", "<br>") for line in [repr(self).splitlines()[0], *self.lines])
        style = f"border-left:4px solid {colour[self.outcome]};padding:.3em .8em;margin:.3em 0"
        return f'<div style="{style}"><b>{head}</b>' + "".join(f"<br>{line}" for line in rest) + "</div>"


@dataclass(frozen=True)
class Shown:
    """What a notebook shows in one of several forms, {type: text}; as plain text anywhere else."""

    forms: Mapping[str, str]

    def __repr__(self) -> str:
        return self.forms["text/plain"]

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        return dict(self.forms)


def examine(exercise: Exercise, run: Callable[..., tuple[object, tuple]], seed: int) -> Verdict:
    """Tries the cases in order. `run(promises, args, keywords)` returns (what came out, the same three afterwards)."""
    done = 0
    for done, case in enumerate(exercise.cases(random.Random(seed)), 1):
        promises = exercise.promises() if case.promises is None else case.promises
        got, after = run(list(promises), case.args, dict(case.keywords))
        if isinstance(got, Raised) and got.kinds[0] == "NotImplementedError" and unwritten(got.text, exercise):
            return Verdict(exercise.name, NOT_ATTEMPTED, (f"{got.text or exercise.name} is still to be written.",))
        if (
            isinstance(got, Raised)
            and got.kinds[0] not in ("NotKept", "TimeoutError")
            and not isinstance(case.expect, Raises)
        ):
            where = f"That was the {ordinal(done)} case: your answer should {case.claim}."
            lines = (str(got), where, *axes(got, exercise, case))
            return Verdict(exercise.name, COULD_NOT_RUN, (*lines, *called(exercise, case)))
        try:
            lines = fault(case, got, after)
        except Exception as error:  # a value of a kind that no case foresaw
            said = f"It returned {short(got)}, which cannot be compared ({type(error).__name__}: {str(error)[:200]})."
            return Verdict(exercise.name, COULD_NOT_RUN, (said,))
        if lines:
            where = f"Fails the {ordinal(done)} case: your answer should"
            return Verdict(exercise.name, WRONG, (f"{where} {case.claim}.", *lines, *called(exercise, case)))
    return Verdict(exercise.name, CORRECT, (f"{done} cases with random sizes and types.",))


def unwritten(text: str, exercise: Exercise) -> bool:
    """Whether a NotImplementedError is the stub's own; torch has some of another kind."""
    return text in ("", exercise.name, *exercise.objects)


def ordinal(number: int) -> str:
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th") if number // 10 % 10 != 1 else "th"
    return ORDINALS[number - 1] if number <= len(ORDINALS) else f"{number}{ending}"


def fault(case: Case, got, after) -> tuple[str, ...]:
    """What is wrong about this outcome, in lines; () for nothing."""
    if isinstance(got, Raised) and got.kinds[0] == "NotKept":
        return (got.text,)
    if isinstance(got, Raised) and got.kinds[0] == "TimeoutError":
        return ("It took too long and was stopped. Is there a loop that never ends?",)
    if case.judge is not None:
        lines = (said,) if (said := case.judge(got)) else ()
    elif lines := differ(got, case.expect, case.exact):
        alike = [misconception for misconception, value in case.wrong.items() if not differ(got, value(), case.exact)]
        if alike:
            return (f"It looks as if {'; or as if '.join(alike[:3])}.", *lines)
    if not lines and differ(after[1], case.args, exact=True):
        return ("The result is right, but it changes its arguments; work on a copy, or out of place.",)
    return lines


def called(exercise: Exercise, case: Case) -> tuple[str, ...]:
    """The call in a line that can be pasted, or what a drive was asked with; () when it is too long to be read."""
    if exercise.drive == "common.call":
        words = [written_out(each) for each in case.args]
        words += [f"{k}={written_out(v)}" for k, v in case.keywords.items()]
        text = f"Called as {exercise.name}({', '.join(words)})"
    else:
        named = [(name, value) for name, value in zip(names_of(exercise), case.args, strict=False) if name != "seed"]
        text = f"Tried with {', '.join(f'{name} = {in_short(value)}' for name, value in named)}."
    return (text,) if len(text) <= READABLE else ()


def in_short(value) -> str:
    """A drive's argument: of a tensor its shape alone, for nobody can paste it."""
    if isinstance(value, list | tuple) and holds_tensors(value):
        return f"[{', '.join(map(in_short, value))}]"
    return f"a tensor {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)


def written_out(value) -> str:
    """The expression that makes this argument: whole if it is small, else one like it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {written_out(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple) and holds_tensors(value):
        inside = ", ".join(map(written_out, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' * (len(value) == 1)})"
    if not isinstance(value, torch.Tensor):
        return repr(value)
    shape, like = tuple(value.shape), "" if value.dtype == torch.float32 else f", dtype={value.dtype}"
    if value.numel() <= 16:
        numbers_ = [float(f"{v:.4g}") if isinstance(v, float) else v for v in value.flatten().tolist()]
        made = f"torch.tensor({numbers_ if value.ndim else numbers_[0]}{like})"
        return made + (f".view{shape}" if value.ndim > 1 else "")
    low, high = value.min().item(), value.max().item()
    if low == high:
        return f"torch.full({shape}, {low}{like})"
    if not value.is_floating_point():
        return f"torch.randint({int(low)}, {int(high) + 1}, {shape}{like})"
    return f"torch.rand{'n' * (not low >= 0)}({', '.join(map(str, shape))}{like})"


def axes(got: Raised, exercise: Exercise, case: Case) -> tuple[str, ...]:
    """What explains an exception: the arguments that are None, and where shapes did not fit, all shapes by name."""
    named = list(zip(names_of(exercise), case.args, strict=False))
    none = [name for name, value in named if value is None]
    if none and "NoneType" in got.text:
        return (f"Here {' and '.join(none)} is None.",)
    if got.kinds[0] == "IndexError" and "mask" in got.text:
        return ("A uint8 or bool tensor as an index is a mask; .long() makes places of it.",)
    if not re.search(r"shape|size|dimension|broadcast|einsum|singleton", got.text):
        return ()
    shapes = dict(list(shapes_of(named))[:8])
    if not shapes:
        return ()
    said = f"It got {', '.join(f'{name} {shape}' for name, shape in shapes.items())}."
    if product := re.search(r"\((\d+)x(\d+) and (\d+)x(\d+)\)", got.text):
        a, b, c, d = map(int, product.groups())
        one, two = (f"{m}×{n}{owner(shapes, (m, n))}" for m, n in ((a, b), (c, d)))
        advice = {b == d: "transpose the second (.T)", a == c: "transpose the first (.T)"}.get(
            True, "is the order right?"
        )
        return (f"{said} A product of {one} with {two} needs {b} = {c}: {advice}.",)
    if sizes := re.search(r"tensor a \((\d+)\) must match the size of tensor b \((\d+)\)", got.text):
        where = [f"{n} is {', '.join(at)}" for n in map(int, sizes.groups()) if (at := places(shapes, n))]
        column = "Axes are lined up from the last one; v[:, None] makes a column of a vector."
        return (f"{said} {'; '.join(where)}{'. ' if where else ''}{column}",)
    return (said,)


def shapes_of(named: Iterable[tuple[str, object]]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of all tensors in these arguments, those in lists as pairs[0][1]."""
    for name, value in named:
        if isinstance(value, torch.Tensor):
            yield name, tuple(value.shape)
        elif isinstance(value, list | tuple):
            yield from shapes_of((f"{name}[{i}]", each) for i, each in enumerate(value))


def owner(shapes: dict[str, tuple[int, ...]], shape: tuple[int, int]) -> str:
    names = [name for name, each in shapes.items() if each == shape]
    turned = [f"{name}.T" for name, each in shapes.items() if each == shape[::-1]]
    return f" ({' or '.join(names or turned)})" if names or turned else ""


def places(shapes: dict[str, tuple[int, ...]], size: int) -> list[str]:
    return [f"axis {i} of {name}" for name, shape in shapes.items() for i, n in enumerate(shape) if n == size]


def names_of(exercise: Exercise) -> list[str]:
    """The names of a case's arguments: those of the drive that calls the learner's function, or of the function."""
    room, _, name = exercise.drive.rpartition(".")
    drive = getattr(import_module(f"minipeft.course.drives.{room}"), name)
    names = list(inspect.signature(drive).parameters)[len(exercise.objects) :]
    if "args" not in names:
        return names
    made = exercise.reference[-1] if exercise.reference else None
    return list(inspect.signature(made).parameters) if callable(made) else []


def differ(got, want, exact: bool = False, at: str = "") -> tuple[str, ...]:
    """() if equal within TOLERANCE, else lines that say how `got` differs from `want`. bool, str: equal or not."""
    place = f" at {at}" if at else ""
    if isinstance(want, Raises):
        if not isinstance(got, Raised):
            return (f"Expected a {want.kind}; it returned {short(got)}.",)
        if want.kind not in got.kinds:
            return (f"Expected a {want.kind}; it raised {got}.",)
        missing = [word for word in want.mentions if word not in got.text]
        return (f"Its {want.kind} should name {', '.join(missing)}, but says: {got.text!r}.",) if missing else ()
    if isinstance(want, torch.Tensor):
        return _differ_tensors(got, want, exact, place)
    if isinstance(want, bool) or want is None or isinstance(want, str):
        same = got == want and isinstance(got, type(want)) if not isinstance(got, torch.Tensor) else False
        return () if same else (f"Expected {want!r}{place}, got {short(got)}.",)
    if isinstance(want, numbers.Number):
        got = got.item() if isinstance(got, torch.Tensor) and got.numel() == 1 else got
        if not isinstance(got, numbers.Number) or isinstance(got, bool):
            return (f"Expected the number {want:g}{place}, got {short(got)}.",)
        close = got == want if exact or isinstance(want, int) else math.isclose(got, want, rel_tol=1e-6, abs_tol=1e-12)
        both_nan = got != got and want != want
        if close or both_nan:
            return ()
        rounded = isinstance(want, float) and math.isclose(got, want, rel_tol=1e-3)
        return (f"Expected {written(want)}{place}, got {written(got)}.", *["Is it rounded?"] * rounded)
    if isinstance(want, dict):
        if not isinstance(got, dict) or set(got) != set(want):
            keys = f"the keys {sorted(map(str, got))}" if isinstance(got, dict) else short(got)
            return (f"Expected the keys {sorted(map(str, want))}{place}, got {keys}.",)
        broken = [key for key in want if want[key] is True and got[key] is False and " " in str(key)]
        if broken:
            return (f"This does not hold: {broken[0]}.",)
        pairs = [(f"{at}[{key!r}]", got[key], want[key]) for key in want]
    else:
        got = got.tolist() if isinstance(got, torch.Tensor) and got.ndim and not holds_tensors(want) else got
        if not isinstance(got, list | tuple) or len(got) != len(want):
            what = f"{values(got)}: {short(got)}" if isinstance(got, list | tuple) else short(got)
            return (f"Expected {values(want)} {short(want)}{place}, got {what}.", *between(got, want))
        if at and isinstance(want, tuple) and all(type(each) is int for each in (*want, *got)):
            return () if tuple(got) == want else (f"Expected {want}{place}, got {tuple(got)}.",)
        pairs = [(f"{at}[{i}]", g, w) for i, (g, w) in enumerate(zip(got, want, strict=True))]
    return next((lines for where, g, w in pairs if (lines := differ(g, w, exact, where))), ())


def _differ_tensors(got, want: torch.Tensor, exact: bool, place: str) -> tuple[str, ...]:
    if not isinstance(got, torch.Tensor):
        return (f"Expected a tensor of shape {tuple(want.shape)}{place}, got {short(got)}.",)
    if got.shape != want.shape:
        return (f"Shape{place}: expected {tuple(want.shape)}, got {tuple(got.shape)}.",)
    if got.dtype != want.dtype:
        return (f"Type{place}: expected {want.dtype}, got {got.dtype}.",)
    if want.dtype not in TOLERANCE:
        wrong = int((got != want).sum())
        if not wrong:
            return ()
        where = first(got, want, got != want)
        return (f"{wrong} of {want.numel()} entries differ{place} (shape {tuple(want.shape)}); {where}.",)
    if _bits(got, want):
        return ()
    difference = (got.double() - want.double()).abs()
    largest = difference.max().item() if bool(torch.isfinite(difference).all()) else math.inf
    bound = 0.0 if exact else TOLERANCE[want.dtype] * max(1.0, want.double().abs().max().item())
    if largest <= bound:
        return ()
    loose = largest <= max(1e-3, 100 * bound)
    kind = "bit for bit" if bound == 0.0 else f"within {bound:.1e}"
    return (
        f"Shapes agree{place}: {tuple(want.shape)}. Equal {kind}: no; roughly (1e-3): {'yes' if loose else 'no'}; "
        f"largest difference {largest:.3g}; {first(got, want, ~(difference <= bound))}.",
        *["NaN comes of 0/0, 0·∞ or ∞ − ∞."] * bool(got.isnan().any() and not want.isnan().any()),
        *alike(got.double(), want.double(), bound),
    )


def alike(got: torch.Tensor, want: torch.Tensor, bound: float) -> Iterator[str]:
    """What two tensors of one shape have in common, though they differ."""
    size = (want * want).sum()
    if not (size > 0 and got.isfinite().all()):
        return
    factor = ((got * want).sum() / size).item()
    if want.numel() > 2 and 1e-6 < abs(factor - 1) and bool(((got - factor * want).abs() <= max(bound, 1e-12)).all()):
        yield f"Every number is {factor:.4g} times what it should be." if factor else "Every number is 0."
    elif got.ndim == 2 and got.shape[0] == got.shape[1] > 1 and bool(((got.T - want).abs() <= bound).all()):
        yield "It is transposed, which a square shape hides."
    elif bound and bool(((got - want).abs() <= 1e-6 * want.abs().max()).all()):
        yield "Six digits are right: was something float32 on the way, or a small number added?"


def first(got: torch.Tensor, want: torch.Tensor, wrong: torch.Tensor) -> str:
    """Where two tensors differ first."""
    at = tuple(wrong.nonzero()[0].tolist())
    return f"at {list(at)} expected {written(want[at].item())}, got {written(got[at].item())}"


def values(several: list | tuple) -> str:
    return f"{len(several)} value{'s' * (len(several) != 1)}"


def between(got, want) -> tuple[str, ...]:
    """What one list has and the other has not."""
    if not isinstance(got, list | tuple) or holds_tensors(want) or holds_tensors(got):
        return ()
    missing, more = [v for v in want if v not in got], [v for v in got if v not in want]
    said = [f"missing: {short(missing)}"] * bool(missing) + [f"too many: {short(more)}"] * bool(more)
    text = "; ".join(said)
    return (f"{text[0].upper()}{text[1:]}.",) if said else ()


def holds_tensors(values) -> bool:
    return any(
        isinstance(v, torch.Tensor | list | tuple | dict) and (isinstance(v, torch.Tensor) or holds_tensors(v))
        for v in (values.values() if isinstance(values, dict) else values)
    )


def _bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    flat = (torch.empty(each.shape, dtype=each.dtype).copy_(each).view(-1).view(torch.uint8) for each in (a, b))
    return torch.equal(*flat)


def written(number: numbers.Number) -> str:
    """A count with all its digits, anything else with seven."""
    if isinstance(number, bool):
        return str(number)
    return f"{number:,}" if isinstance(number, int) else f"{number:,.7g}"


def short(value) -> str:
    """A value in a few words."""
    if isinstance(value, Raised):
        return f"an exception, {value}"
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if value is None:
        return "None (is a return missing?)"
    text = repr(value)
    return text if len(text) <= 160 else f"{text[:150]} …"


def raised(error: BaseException) -> Raised:
    """An exception as data, with the last line of the learner's own code that it went through."""
    kinds = tuple(c.__name__ for c in type(error).__mro__ if c is not object)
    try:
        text = str(error)[:500]
    except BaseException as worse:
        text = f"(its text cannot be read: {type(worse).__name__})"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "ipykernel" in f.filename or "<" in f.filename]
    where = f"line {frames[-1].lineno} of the cell: {frames[-1].line}" if frames and frames[-1].line else ""
    return Raised(kinds, text, where)
