"""What is asked of every exercise, beside what it computes: each lens looks at an exercise's own cases once more.

A lens takes arguments of the cases, changes them or asks for a promise (see `drives.promises`), and compares with what
comes out of the exercise's reference. An exercise does without a lens only with a reason, which the audit prints.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from random import Random

import torch

from minipeft.course.drives import perform
from minipeft.course.drives.promises import replaced, tensors
from minipeft.course.verdict import Case, Exercise, Raised, Raises, differ, names_of

LENSES = {
    "gradient": "let the gradient through to each argument that the formula depends on, with the right value",
    "strided": "work on tensors that are not contiguous in memory",
    "types": "keep the type of its arguments, from float64 to bfloat16",
    "defaults": "take the default arguments of the stub, and its arguments by name",
    "others": "give what these tensors ask for, and not what others of the same sizes gave",
    "zeros": "take 0 for a number like any other (`x or …` is not `x is None`)",
    "order": "follow the order of what it is given",
    "edges": "hold at the edges: sizes of 1 and 0, ties, boundaries, odd names and texts",
    "memory": "return numbers that lie in memory of their own",
    "again": "give the same in a second call",
    "modes": "leave torch's modes and seed as they were",
}
FIRST = 3  # of an exercise's own inputs are looked at through each lens
LOOSE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.06, torch.float16: 0.01}


def through_lenses(exercise: Exercise) -> Exercise:
    """The same exercise, whose cases are followed by those of every lens that it does not do without."""
    if unknown := set(exercise.without) - set(LENSES):
        raise ValueError(f"{exercise.name} does without {', '.join(unknown)}; the lenses are {', '.join(LENSES)}.")

    def cases(rng: Random) -> Iterator[Case]:
        own = []
        for case in exercise.cases(rng):
            own.append(case)
            yield case
        usual = {id(case.args): case for case in own if case.lenses and not isinstance(case.expect, Raises)}
        known = list(islice(usual.values(), FIRST))
        for case in edges(exercise, rng):
            yield case
            known += [case] * (case.lenses and not isinstance(case.expect, Raises))
        for name, lens in CASES.items():
            if name not in exercise.without:
                yield from lens(exercise, known)

    return replace(exercise, cases=cases)


def right(exercise: Exercise, args: tuple, keywords=(), promises: tuple[str, ...] = ()) -> object:
    """What comes out of the reference; Raises if it raises."""
    found = perform(exercise.drive, exercise.reference, (list(promises), args, dict(keywords)))[0]
    return Raises(found.kinds[0]) if isinstance(found, Raised) else found


def edges(exercise: Exercise, rng: Random) -> Iterator[Case]:
    for edge in exercise.edges(rng):
        if isinstance(edge, Case):
            yield edge
            continue
        claim, args, *keywords = edge
        yield Case(claim, args, right(exercise, args, *keywords), keywords=keywords[0] if keywords else {})


def gradient(exercise: Exercise, known: list[Case]) -> Iterator[Case]:
    for case in known:
        floats = [t for t in tensors(case.args) if t.is_floating_point()]
        if not floats or not all(t.numel() for t in floats):
            continue
        args = replaced(case.args, lambda t: t.double() if t.dtype == torch.float32 else t)  # a slope of 0 is 0 there
        wanted = right(exercise, args, promises=("gradient",))
        if not all(each.isfinite().all() for each in wanted.values()):
            continue
        labels = [name for name, arg in zip(names_of(exercise), case.args, strict=False)
                  for t in tensors((arg,)) if t.is_floating_point()]  # fmt: skip

        def judge(got, wanted=wanted, labels=labels):
            for want, have, label in zip(wanted.values(), got.values(), labels, strict=False):
                if label not in exercise.constants and (lines := differ(have, want)):
                    if want.any() and not have.any():
                        cut = "`no_grad`, `detach`, `.data`, `.item()` and numpy cut it off"
                        return f"No gradient reaches {label}: {cut}."
                    if have.any() and not want.any():
                        return f"A gradient reaches {label}, which should have none: detach the result."
                    return f"The gradient of {label} is not that of the formula. {' '.join(lines)}"

        yield Case(
            f"{LENSES['gradient']} (its tensors require a gradient here)",
            args,
            judge=judge,
            promises=("gradient",),
        )


def strided(exercise: Exercise, known: list[Case]) -> Iterator[Case]:
    for case in known[:2]:
        if any(t.ndim for t in tensors(case.args)):
            yield replace(case, claim=f"{LENSES['strided']} (`reshape` where `view` cannot)", promises=("strided",))


def types(exercise: Exercise, known: list[Case]) -> Iterator[Case]:
    for case in known[:1]:
        if not any(t.is_floating_point() for t in tensors(case.args)):
            return
        for dtype in LOOSE:
            if dtype == torch.bfloat16 and "gradient" in exercise.without:
                continue  # numpy, which will do where no gradient is asked for, does not know it
            args = replaced(case.args, lambda t, d=dtype: t.to(d) if t.is_floating_point() else t)
            wanted = right(exercise, args)
            if isinstance(wanted, Raises):
                raise ValueError(f"The reference of {exercise.name} cannot do {dtype}: say why it does without.")

            def judge(got, wanted=wanted, dtype=dtype):
                return "" if near(got, wanted, LOOSE[dtype]) else " ".join(differ(got, wanted)) or None

            yield Case(f"{LENSES['types']}, here {dtype}", args, judge=judge)


def near(got, want, loose: float) -> bool:
    """Equal in form and type, and roughly in value."""
    if isinstance(want, torch.Tensor):
        alike = isinstance(got, torch.Tensor) and got.shape == want.shape and got.dtype == want.dtype
        if not alike or not want.is_floating_point():
            return alike and torch.equal(got, want)
        size = loose * max(1.0, want.double().abs().max().item() if want.numel() else 1.0)
        return bool(((got.double() - want.double()).abs() <= size).all())
    if isinstance(want, dict):
        return isinstance(got, dict) and set(got) == set(want) and all(near(got[k], want[k], loose) for k in want)
    if isinstance(want, list | tuple):
        return (
            isinstance(got, list | tuple) and len(got) == len(want) and all(map(near, got, want, [loose] * len(want)))
        )
    if isinstance(want, float):
        return isinstance(got, float | int) and abs(got - want) <= loose * max(1.0, abs(want))
    return not differ(got, want)


def defaults(exercise: Exercise, known: list[Case]) -> Iterator[Case]:
    if exercise.drive != "common.call":
        return
    parameters = inspect.signature(exercise.reference[0]).parameters.values()
    optional = [p.name for p in parameters if p.default is not p.empty]
    for case in known[:2] if optional else ():
        count = len(parameters) - len(optional)
        shorter, named = case.args[:count], dict(zip(optional, case.args[count:], strict=False))
        given = ", ".join(optional)
        yield Case(f"do without {given}, which has the stub's default", shorter, right(exercise, shorter))
        yield Case(f"take {given} by name", shorter, right(exercise, shorter, named), keywords=named)


def order(exercise: Exercise, known: list[Case]) -> Iterator[Case]:
    for case in known[:2]:
        args = tuple(backwards(each) for each in case.args)
        if any(list(a) != list(b) for a, b in zip(args, case.args, strict=True) if isinstance(a, list | dict)):
            yield Case(f"{LENSES['order']}, here backwards", args, right(exercise, args, case.keywords))


def backwards(value):
    if isinstance(value, dict):
        return dict(reversed(value.items()))
    if isinstance(value, list) and all(isinstance(each, str | tuple) for each in value):
        return value[::-1]
    return value


def others(exercise: Exercise, known: list[Case]) -> Iterator[Case]:
    for case in known[:2]:
        args = tuple(replaced(case.args, turned))
        if case.judge is None and differ(args, case.args, exact=True):
            yield Case(LENSES["others"], args, right(exercise, args, case.keywords), keywords=case.keywords)


def turned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flip(0) if tensor.ndim > 1 else tensor


def zeros(exercise: Exercise, known: list[Case]) -> Iterator[Case]:
    """0 for each float in turn; where the formula has no value, and where a rule chooses by it, nothing is asked."""
    for case in known[:1]:
        for i, given in enumerate(case.args):
            several = isinstance(given, list) and given and all(type(each) is float for each in given)
            if case.judge is None and (several or type(given) is float):
                args = (*case.args[:i], [0.0, *given[1:]] if several else 0.0, *case.args[i + 1 :])
                wanted = right(exercise, args, case.keywords)
                found = [wanted] if isinstance(wanted, float) else list(tensors(wanted))
                if found and all(map(math.isfinite, (t for each in found for t in torch.as_tensor(each).flatten()))):
                    name = names_of(exercise)[i]
                    yield Case(f"{LENSES['zeros']}, here in {name}", args, wanted, keywords=case.keywords)


CASES = {
    "defaults": defaults, "order": order, "others": others, "zeros": zeros, "gradient": gradient,
    "strided": strided, "types": types,
}  # fmt: skip
