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
from minipeft.course.drives.promises import replaced, tensors, turned
from minipeft.course.verdict import Case, Exercise, Raised, Raises, differ, names_of

LENSES = {
    "gradient": "let the gradient through to each argument that the formula depends on, with the right value",
    "strided": "work on tensors that are not contiguous in memory",
    "types": "keep the type of its arguments, from float64 to bfloat16",
    "defaults": "take the default arguments of the stub, and its arguments by name",
    "others": "give what its arguments hold now, and not what they, or others of their sizes, held before",
    "zeros": "take 0, negative and large numbers for numbers like any other (`x or …` is not `x is None`)",
    "whole": "take 0, and numbers far above 2³², for whole numbers like any other",
    "sizes": "give right numbers however large or small those are that it gets",
    "many": "hold for many",
    "no_grad": "give the same under `torch.no_grad()`",
    "order": "follow the order of what it is given",
    "edges": "hold at the edges: sizes of 1 and 0, ties, boundaries, odd names and texts",
    "memory": "return numbers that lie in memory of their own",
    "again": "give the same in a second call",
    "modes": "leave torch's modes and seed as they were",
}
FIRST = 3  # of an exercise's own inputs are looked at through each lens
LARGE, EXACT = 2**32, 2**53  # whole numbers from here on need more than four bytes; up to here floats have them too
ROUGH = 1e-6  # of the largest number
ROUNDING = 1e-13  # of numbers about 1 in float64, where they cancel
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
                if dtype.itemsize == 2 and isinstance(got, torch.Tensor) and not got.ndim:
                    got = got.to(dtype) if got.dtype == torch.float32 else got  # as autocast returns a loss
                return "" if near(got, wanted, LOOSE[dtype]) else " ".join(differ(got, wanted)) or None

            yield Case(f"{LENSES['types']}, here {dtype}", args, judge=judge)


def near(got, want, loose: float, floor: float | None = None) -> bool:
    """Equal in form and type, and roughly in value: to `loose` of the largest number, but no closer than to `floor`, by
    default `loose`."""
    floor = loose if floor is None else floor
    if isinstance(want, torch.Tensor):
        alike = isinstance(got, torch.Tensor) and got.shape == want.shape and got.dtype == want.dtype
        if not alike or not want.is_floating_point():
            return alike and torch.equal(got, want)
        size = max(floor, loose * want.double().abs().max().item() if want.numel() else 0.0)
        return bool(((got.double() - want.double()).abs() <= size).all())
    if isinstance(want, dict):
        return (
            isinstance(got, dict) and set(got) == set(want) and all(near(got[k], want[k], loose, floor) for k in want)
        )
    if isinstance(want, list | tuple):
        return (
            isinstance(got, list | tuple)
            and len(got) == len(want)
            and all(near(g, w, loose, floor) for g, w in zip(got, want, strict=True))
        )
    if isinstance(want, float):
        got = got.item() if isinstance(got, torch.Tensor) and got.numel() == 1 else got
        return isinstance(got, float | int) and abs(got - want) <= max(floor, loose * abs(want))
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
        holds = any(True for _ in tensors(case.args)) or any(isinstance(each, list | dict) for each in case.args)
        if holds and not isinstance(exercise.reference[-1], type):
            yield replace(case, claim=LENSES["others"], promises=("rehearsed",))
        if case.judge is None and any(differ(turned(t), t, exact=True) for t in tensors(case.args)):
            wanted = right(exercise, case.args, case.keywords, ("changed",))
            yield Case(LENSES["others"], case.args, wanted, keywords=case.keywords, promises=("changed",))


def zeros(exercise: Exercise, known: list[Case]) -> Iterator[Case]:
    """0, a negative and a large number for each float in turn, and a large one for each whole number among numbers
    alone; where the formula has no value, and where a rule chooses by it, nothing is asked."""
    for case in known[:1]:
        if case.judge is not None or not (isinstance(case.expect, float) or list(tensors(case.expect))):
            return
        kinds = (float,) if list(tensors(case.args)) else (float, int)
        for i, given in enumerate(case.args):
            several = isinstance(given, list) and given and all(type(each) is float for each in given)
            if not (several or type(given) in kinds):
                continue
            name, first = names_of(exercise)[i], given[0] if several else given
            for value in (0.0, -first, 1e3 * first) if type(first) is float else (1000 * first,):
                if value and name in exercise.positive:
                    continue
                args = (*case.args[:i], [value, *given[1:]] if several else value, *case.args[i + 1 :])
                wanted = right(exercise, args, case.keywords)
                found = [wanted] if isinstance(wanted, float) else list(tensors(wanted))
                if found and all(map(math.isfinite, (t for each in found for t in torch.as_tensor(each).flatten()))):
                    said = f"{LENSES['zeros']}, here {value:g} in {name}"
                    yield Case(said, args, wanted, keywords=case.keywords)


def whole(exercise: Exercise, known: list[Case]) -> Iterator[Case]:
    """0 for each whole number in turn, and all of them so many times as large that the result needs five bytes, where
    whole numbers come out of whole numbers."""
    for case in known[:1]:
        wholes = [i for i, given in enumerate(case.args) if differ(times(given, 0), given, exact=True)]
        if case.judge is not None or not counts(right(exercise, case.args, case.keywords)):
            return
        for i in (i for i in wholes if names_of(exercise)[i] not in exercise.positive):
            args = (*case.args[:i], times(case.args[i], 0), *case.args[i + 1 :])
            if counts(wanted := right(exercise, args, case.keywords)):
                said = f"{LENSES['whole']}, here 0 in {names_of(exercise)[i]}"
                yield Case(said, args, wanted, keywords=case.keywords)
        for power in range(1, 7):
            factor = 10**power + 1
            args = tuple(times(given, factor) for given in case.args)
            wanted = right(exercise, args, case.keywords)
            found = torch.tensor(counts(wanted) or [0])
            if LARGE < found.max() < EXACT and (found.float().long() != found).any():  # for float32 has some of them
                said = f"{LENSES['whole']}, here {factor:,} times as large"
                yield Case(said, args, wanted, keywords=case.keywords)
                return


def times(value, factor: int):
    """The whole number, or the first number of each pair, so many times as large."""
    if isinstance(value, list) and all(isinstance(each, tuple) and type(each[0]) is int for each in value):
        return [(factor * first, *rest) for first, *rest in value]
    return factor * value if type(value) is int else value


def counts(value) -> list[int]:
    """The whole numbers of a result that holds nothing else; none of another."""
    found = list(value.values()) if isinstance(value, dict) else [value]
    return found if all(type(each) is int for each in found) else []


def sizes(exercise: Exercise, known: list[Case]) -> Iterator[Case]:
    """All numbers but masks of 0 and 1 a billion times as large, and as small, and the first row alone, in float64."""
    for case in known[:1]:
        for factor, last in ((1e-9, None), (1e9, None), (1e6, 1)):

            def scaled(tensor, factor=factor, last=last):
                if not tensor.is_floating_point() or bool(((tensor == 0) | (tensor == 1)).all()):
                    return tensor
                tensor = tensor.double()
                return torch.cat([factor * tensor[:last], tensor[last:]]) if last and tensor.ndim else factor * tensor

            args = tuple(replaced(case.args, scaled))
            if case.judge is not None or not differ(args, case.args, exact=True):
                continue
            wanted = right(exercise, args, case.keywords)
            found = [wanted] if isinstance(wanted, float) else list(tensors(wanted))
            if found and all(torch.as_tensor(each).isfinite().all() for each in found):

                def judge(got, wanted=wanted):
                    return (
                        None
                        if near(got, wanted, ROUGH, ROUNDING)
                        else " ".join(differ(got, wanted)) or "The numbers are right to some digits only."
                    )

                said = f"{LENSES['sizes']}, here {factor:g} times as large{' in the first row' if last else ''}"
                yield Case(said, args, judge=judge, keywords=case.keywords)


def many(exercise: Exercise, known: list[Case]) -> Iterator[Case]:
    what, make = exercise.many
    args = make(Random(0))
    yield Case(f"{LENSES['many']} {what}", args, right(exercise, args))


def no_grad(exercise: Exercise, known: list[Case]) -> Iterator[Case]:
    for case in known[:1]:
        if case.judge is None and any(t.is_floating_point() for t in tensors(case.args)):
            wanted = right(exercise, case.args, case.keywords, ("no_grad",))
            if not isinstance(wanted, Raises):
                promises = (*exercise.promises(), "no_grad")
                yield Case(LENSES["no_grad"], case.args, wanted, keywords=case.keywords, promises=promises)


CASES = {
    "defaults": defaults, "order": order, "others": others, "zeros": zeros, "whole": whole, "sizes": sizes,
    "many": many, "no_grad": no_grad, "gradient": gradient, "strided": strided, "types": types,
}  # fmt: skip
