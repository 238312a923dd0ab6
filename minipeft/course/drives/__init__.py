"""How a learner's code is called: it gets models and optimisers to work on, and what it did is written down as data.

One file an assignment, as in `course/exercises`; but these know nothing of what is right: the same functions run in the
learner's notebook and in the process of a submission, which does not see the answers. `promises` looks at what is asked
of every answer, whatever it computes; `plain` turns what came out into data.
"""

from __future__ import annotations

import copy
from importlib import import_module

import torch

from minipeft.course.drives import promises
from minipeft.course.verdict import raised


def perform(drive: str, objects: tuple, args: tuple) -> tuple[object, tuple]:
    """(what came out, the arguments afterwards) of a drive such as "lora.merge"; an exception comes out as `Raised`.

    `args` is (promises, arguments, keywords): see `promises.look`.
    """
    room, _, name = drive.rpartition(".")
    act = getattr(import_module(f"minipeft.course.drives.{room}"), name)
    asked, given, keywords = promises.replaced(copy.deepcopy(tuple(args)), lambda t: t)  # no text is told by `is`
    try:
        with torch.random.fork_rng(devices=[]):
            return promises.look(act, objects, asked, given, keywords), (asked, given, keywords)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return raised(error), (asked, given, keywords)
