"""Lines that a teacher may want to look at, and submissions that are nearly the same."""

import copy
import re
import time

import nbformat
import pytest
from hostile import cell_named

from minipeft.course import mend, suspicion
from minipeft.course.assignments import sources

SOLVED = nbformat.read(sources()["lora"], as_version=4)


def submitted(code: str):
    made = copy.deepcopy(SOLVED)
    cell_named(made, "lora_scale").source = code
    return made


def looked_at(code: str) -> list[str]:
    return suspicion.lines_to_look_at(mend.mend(submitted(code), "lora")[0], "lora")


@pytest.mark.parametrize(
    "line",
    [
        *("import gc", "from gc import get_objects", "import sys; sys.modules['x']", "import sys as s; s.modules"),
        *("from sys import modules", "import sys; sys._getframe(1)", "import inspect", "x = (lambda: 0).__code__"),
        *(
            "torch.equal = print",
            "setattr(torch, 'equal', print)",
            "torch.Tensor.detach = None",
            "nn.Linear.forward = None",
        ),
        *("import minipeft.methods.lora", "from minipeft.methods.lora import LoRA", "import minipeft; minipeft.attach"),
        *("eval('1')", "__import__('gc')", "object.__subclasses__()", "!ls", "import builtins", "import ctypes"),
        *("import sys; getattr(sys, 'modules')", "getattr(print, '__self__').__dict__", "vars(torch)['equal'] = print"),
        *("getattr(check.grade, '__globals__')", "torch.library.Library('aten', 'IMPL')", "import threading"),
        *("from minipeft.course.check import exercises", "check.exercise.__globals__"),
    ],
)
def test_a_line_that_reaches_behind_an_exercise_is_named(line):
    (said,) = looked_at(f"\n# a comment\n{line}\ndef lora_scale(alpha, rank, rank_stabilized=False):\n    return 1")
    assert re.fullmatch(rf"To look at: cell \d+, line 3: `{re.escape(line)}`\.", said)


@pytest.mark.parametrize(
    "line",
    [
        *("import numpy as np", "np = torch", "for m in nn.Linear(1, 1).modules(): pass", "nn.Linear(1, 1).eval()"),
        *("%matplotlib inline", "%timeit 1 + 1", "torch.compile(print)", "check.lora_scale(print)", "def ("),
        *("x = nn.Linear(1, 1); x.weight = nn.Parameter(x.weight)", "check.progress()", "import sys; sys.version"),
        *("check.hint('merge', 1)", "getattr(nn, 'Linear')(1, 1)", "getattr(nn.Linear(1, 1), 'bias')"),
    ],
)
def test_what_a_learner_does_is_not(line):
    assert looked_at(line) == []


def test_no_solution_and_no_handout_has_such_a_line():
    for name, path in sources().items():
        for notebook in (nbformat.read(path, as_version=4), mend.released_of(name)):
            assert suspicion.lines_to_look_at(mend.mend(notebook, name)[0], name) == []


def test_many_such_lines_are_counted():
    assert looked_at("\n".join(["import gc"] * 40))[5:] == ["To look at: 35 more lines of this kind."]


@pytest.mark.parametrize(
    "code", ["%%bash\nls | grep x && ls", "x = !ls", "def f():\n    %run other.py", "%%writefile a.py\nx = 1"]
)
def test_what_is_no_python_is_looked_at_too(code):
    assert looked_at(code)


@pytest.mark.parametrize("code", ["%%time\nx = 1", "print?", "?print", "x = (5\n     % 2)", '"""\n%run\n!ls\n"""'])
def test_what_asks_for_help_or_the_time_is_not(code):
    assert looked_at(code) == []


@pytest.mark.parametrize(
    "code",
    [
        *(
            "x = 1," * 10**6,
            "(" * 10**5,
            "x" + ".y" * 10**5,
            "-" * 10**5 + "1",
            "def (\n" + " " * 10**5 + "x",
            "%x\n" * 20_000,
        ),
        *(
            "'" * 10**5,
            "x\n" * 30_000 + "?",
            "\\" * 10**5,
            "getattr(torch, 5)",
            "\x0c\x1c\u2028\nimport os",
            "f'{" * 99,
        ),
    ],
    ids=range(12),
)
def test_code_that_nobody_can_read_holds_nobody_up(code):
    started = time.process_time()
    assert all(len(said) < 200 for said in looked_at(code))
    suspicion.pieces(mend.mend(submitted(code), "lora")[0], "lora")
    assert time.process_time() - started < 5


def test_what_is_too_long_is_said():
    (said,) = looked_at("import gc\n" + "x = 1\n" * 40_000)
    assert said == "To look at: from cell 2 on, the code is too long to be looked through."


def test_renamed_and_commented_code_is_nearly_the_same_and_another_answer_is_not():
    renamed, other = copy.deepcopy(SOLVED), copy.deepcopy(SOLVED)
    for cell in renamed.cells:
        if cell.cell_type == "code" and mend.name_of(cell) and not mend.locked(cell):
            cell.source = re.sub(r"\b(gamma|names|rank|delta|A|B)\b(?!=)", r"\1_of_mine", cell.source) + "  # mine"
    for cell in other.cells:
        if cell.cell_type == "code" and "def " in cell.source:
            cell.source = cell.source.replace("return ", "answer = 1; return 2 * ").replace("(", "( 0 + ")
    made = {
        "ada": SOLVED,
        "bob": renamed,
        "cem": other,
        "dee": mend.released_of("lora"),
        "eva": mend.released_of("lora"),
    }
    several = {name: suspicion.pieces(mend.mend(each, "lora")[0], "lora") for name, each in made.items()}
    assert suspicion.nearly_the_same(several) == {"ada": ["bob"], "bob": ["ada"]}
