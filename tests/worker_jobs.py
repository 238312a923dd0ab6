"""Jobs for `test_worker.py`, which the other process imports from this file."""

import os
import sys
import time


def count(n):
    print("what a job prints is no answer")
    yield from range(n)


def threads():
    """How many cores torch takes, again and again."""
    import torch

    while True:
        yield torch.get_num_threads()


def endless():
    while True:
        yield len(os.urandom(1000))


def silent():
    """Says one thing, and then works on without a word: a long test, for one."""
    yield os.getpid()
    while True:
        time.sleep(0.001)


def importing(folder):
    """Imports a module that a process can import once only, as torch is, and takes its time."""
    yield "begun"
    sys.path.insert(0, folder)
    import only_once

    yield only_once.__name__


def careless():
    yield 1
    raise ValueError("A rank of 0 learns nothing; choose 1 or more.")


def odd():
    yield 1 / 0


def echo(what):
    yield type(what).__name__


class Last:
    """Takes half a second to go, and what is raised meanwhile is lost: Python only prints it."""

    def __del__(self):
        for _ in range(500):
            time.sleep(0.001)


def deaf():
    """Loses the interrupt that comes at once, and goes on without a word."""
    yield "begun"
    Last()
    while True:
        time.sleep(0.001)
