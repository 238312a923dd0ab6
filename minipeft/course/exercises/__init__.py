"""What the assignments ask for, one file each: for every exercise its cases with reference values, and two hints.

These files hold the answers' behaviour, so the process that runs a submission does not see them.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module

from minipeft.course.verdict import Exercise

ASSIGNMENTS = ("lora", "select", "quantisation", "adapters", "lora_family", "prompts", "prefixes", "budget", "rank")


@cache
def exercises() -> dict[str, dict[str, Exercise]]:
    """{assignment: {exercise: Exercise}}, in the order of the course."""
    modules = {name: import_module(f"minipeft.course.exercises.{name}") for name in ASSIGNMENTS}
    return {name: {each.name: each for each in module.EXERCISES} for name, module in modules.items()}


def exercise(name: str) -> Exercise:
    """The exercise of that name. ValueError lists those that there are."""
    every = {each.name: each for several in exercises().values() for each in several.values()}
    if name not in every:
        raise ValueError(f"There is no exercise {name!r}; there is {', '.join(every)}.")
    return every[name]
