"""How a learner's code is called: it gets models and optimisers to work on, and what it did is written down as data.

One file an assignment, as in `course/exercises`; but these know nothing of what is right: the same functions run in the
learner's notebook and in the process of a submission, which does not see the answers.
"""

from __future__ import annotations

import copy
from importlib import import_module

import torch

from minipeft.course.verdict import raised


def perform(drive: str, objects: tuple, args: tuple) -> tuple[object, tuple]:
    """(what came out, the arguments afterwards) of a drive such as "lora.merge"; an exception comes out as `Raised`."""
    room, _, name = drive.rpartition(".")
    function = getattr(import_module(f"minipeft.course.drives.{room}"), name)
    args = copy.deepcopy(args)
    try:
        with torch.random.fork_rng(devices=[]):
            return function(*objects, *args), args
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        return raised(error), args
