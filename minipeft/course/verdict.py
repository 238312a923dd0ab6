"""What is right, what is wrong, and why: a learner's code against a slow, obvious reference over random shapes.

An exercise yields cases. A case says in words which property it looks at, what to call the learner's code with, what
should come out, and what would come out under well-known misconceptions. `examine` stops at the first case that fails.
"""

from __future__ import annotations

import html
import math
import numbers
import random
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

# relative to the largest expected number: |got − expected| ≤ tolerance · max(1, max|expected|)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.0, torch.float16: 0.0}
CORRECT, WRONG, NOT_ATTEMPTED, COULD_NOT_RUN = "correct", "wrong", "not attempted", "could not run"
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
    """One call. `claim` completes the sentence "Your answer …".

    `expect` is the value (or Raises) that should come out; or `judge(value)` returns None or says what is wrong.
    `wrong`: {misconception: a function that gives what comes out under it}. `keeps`: arguments must not be changed.
    """

    claim: str
    args: tuple
    expect: object = None
    judge: Callable[[object], str | None] | None = None
    wrong: Mapping[str, Callable[[], object]] = field(default_factory=dict)
    keeps: bool = True
    exact: bool = False


@dataclass(frozen=True)
class Exercise:
    """`cases(rng)` yields cases from a `random.Random`; `objects` are the names that the learner defines;
    `drive` names the function of `minipeft.course.drives` that calls them."""

    name: str
    title: str
    cases: Callable[[random.Random], Iterator[Case]]
    hints: tuple[str, str]
    objects: tuple[str, ...]
    drive: str = "common.call"


@dataclass(frozen=True)
class Verdict:
    """The outcome of an examination, as text and as HTML."""

    exercise: str
    outcome: str
    lines: tuple[str, ...] = ()

    def __repr__(self) -> str:
        sign = {CORRECT: "✓", WRONG: "✗", NOT_ATTEMPTED: "○", COULD_NOT_RUN: "!"}[self.outcome]
        return "\n  ".join([f"{sign} {self.exercise}: {self.outcome}", *self.lines])

    def _repr_html_(self) -> str:
        colour = {CORRECT: "#1a7f37", WRONG: "#b42318", NOT_ATTEMPTED: "#57606a", COULD_NOT_RUN: "#9a6700"}
        head, *rest = (html.escape(line).replace("\n  ", "<br>") for line in [repr(self).splitlines()[0], *self.lines])
        style = f"border-left:4px solid {colour[self.outcome]};padding:.3em .8em;margin:.3em 0"
        return f'<div style="{style}"><b>{head}</b>' + "".join(f"<br>{line}" for line in rest) + "</div>"


def examine(exercise: Exercise, run: Callable[..., tuple[object, tuple]], seed: int) -> Verdict:
    """Tries the cases in order. `run(*args)` returns (what came out, the arguments afterwards)."""
    done = 0
    for done, case in enumerate(exercise.cases(random.Random(seed)), 1):
        got, after = run(*case.args)
        if isinstance(got, Raised) and got.kinds[0] == "NotImplementedError":
            return Verdict(exercise.name, NOT_ATTEMPTED, (f"{got.text or exercise.name} is still to be written.",))
        if isinstance(got, Raised) and not isinstance(case.expect, Raises):
            return Verdict(exercise.name, COULD_NOT_RUN, (str(got), f"It was asked for the claim “{case.claim}”."))
        try:
            lines = fault(case, got, after)
        except Exception as error:  # a value of a kind that no case foresaw
            said = f"It returned {short(got)}, which cannot be compared ({type(error).__name__}: {str(error)[:200]})."
            return Verdict(exercise.name, COULD_NOT_RUN, (said,))
        if lines:
            where = f"Fails the {ORDINALS[done - 1] if done <= 10 else f'{done}th'} case: your answer should"
            return Verdict(exercise.name, WRONG, (f"{where} {case.claim}.", *lines))
    return Verdict(exercise.name, CORRECT, (f"{done} cases with random sizes and types.",))


def fault(case: Case, got, after) -> tuple[str, ...]:
    """What is wrong about this outcome, in lines; () for nothing."""
    if case.judge is not None:
        said = case.judge(got)
        return (said,) if said else ()
    if lines := differ(got, case.expect, case.exact):
        for misconception, value in case.wrong.items():
            if not differ(got, value(), case.exact):
                return (f"It looks as if {misconception}.", *lines)
        return lines
    if case.keeps and any(differ(a, b, exact=True) for a, b in zip(after, case.args, strict=True)):
        return ("The result is right, but it changes its arguments; work on a copy, or out of place.",)
    return ()


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
        return () if close else (f"Expected {written(want)}{place}, got {written(got)}.",)
    if isinstance(want, dict):
        if not isinstance(got, dict) or set(got) != set(want):
            keys = f"the keys {sorted(map(str, got))}" if isinstance(got, dict) else short(got)
            return (f"Expected the keys {sorted(map(str, want))}{place}, got {keys}.",)
        pairs = [(f"{at}[{key!r}]", got[key], want[key]) for key in want]
    else:
        if not isinstance(got, list | tuple) or len(got) != len(want):
            what = f"{len(got)} values: {short(got)}" if isinstance(got, list | tuple) else short(got)
            return (f"Expected {len(want)} values {short(want)}{place}, got {what}.",)
        pairs = [(f"{at}[{i}]", g, w) for i, (g, w) in enumerate(zip(got, want, strict=True))]
    return next((lines for where, g, w in pairs if (lines := differ(g, w, exact, where))), ())


def _differ_tensors(got, want: torch.Tensor, exact: bool, place: str) -> tuple[str, ...]:
    if not isinstance(got, torch.Tensor):
        return (f"Expected a tensor of shape {tuple(want.shape)}{place}, got {short(got)}.",)
    if got.shape != want.shape:
        return (f"Shape{place}: expected {tuple(want.shape)}, got {tuple(got.shape)}.",)
    if got.dtype != want.dtype:
        return (f"Type{place}: expected {want.dtype}, got {got.dtype}.",)
    if want.dtype in (torch.bool, torch.int64, torch.int32):
        wrong = int((got != want).sum())
        return (f"{wrong} of {want.numel()} entries differ{place} (shape {tuple(want.shape)}).",) if wrong else ()
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
        f"largest difference {largest:.3g}.",
    )


def _bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.contiguous().reshape(-1).view(torch.uint8).equal(b.contiguous().reshape(-1).view(torch.uint8))


def written(number: numbers.Number) -> str:
    """A count with all its digits, anything else with seven."""
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
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "ipykernel" in f.filename or "<" in f.filename]
    where = f"line {frames[-1].lineno} of the cell: {frames[-1].line}" if frames and frames[-1].line else ""
    return Raised(kinds, str(error)[:500], where)
