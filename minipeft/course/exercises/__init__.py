"""What the assignments ask for, one file each: for every exercise its cases with reference values, and two hints.

`edges/` has the inputs where answers break, and right objects to compare with; `lenses` looks at every exercise through
the properties that all of them share.

These files hold the answers' behaviour, so the process that runs a submission does not see them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from importlib import import_module

from minipeft.course.exercises.edges.many import MANY
from minipeft.course.exercises.lenses import through_lenses
from minipeft.course.verdict import Exercise

ASSIGNMENTS = (
    *("lora", "select", "quantisation", "adapters", "lora_family", "prompts", "prefixes", "budget", "rank"),
    *("distillation", "serving", "feedback", "worlds", "capstone"),
)


@cache
def exercises() -> dict[str, dict[str, Exercise]]:
    """{assignment: {exercise: Exercise}}, in the order of the course."""
    found: dict[str, dict[str, Exercise]] = {}
    for name in ASSIGNMENTS:
        edges = import_module(f"minipeft.course.exercises.edges.{name}").EDGES
        listed = import_module(f"minipeft.course.exercises.{name}").EXERCISES
        found[name] = {each.name: through_lenses(with_many(replace(each, **edges[each.name]))) for each in listed}
    return found


def with_many(exercise: Exercise) -> Exercise:
    """The same exercise with its large case, or with the reason why there is none."""
    case = MANY[exercise.name]
    if isinstance(case, str):
        return replace(exercise, without={**exercise.without, "many": case})
    return replace(exercise, many=case)


def exercise(name: str) -> Exercise:
    """The exercise of that name. ValueError lists those that there are."""
    every = {each.name: each for several in exercises().values() for each in several.values()}
    if name not in every:
        raise ValueError(f"There is no exercise {name!r}; there is {', '.join(every)}.")
    return every[name]


def assignment_of(name: str) -> str:
    """The assignment that an exercise belongs to. ValueError lists the exercises that there are."""
    return next(a for a, several in exercises().items() if exercise(name).name in several)
