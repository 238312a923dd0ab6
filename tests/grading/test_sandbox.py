"""The process that runs a stranger's code: what it may use, see, and send."""

import math
import os
import sys
import time

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minipeft.course import wire
from minipeft.course.sandbox import Killed, Limits, Sandbox, bubblewrap, isolation

apart = pytest.mark.skipif(bubblewrap() is None, reason="bubblewrap is not on this machine (apt install bubblewrap)")


@pytest.fixture(scope="module")
def box():
    with Sandbox(Limits(each=5)) as box:
        yield box


def output(box, source: str) -> str:
    return str(box.ask(do="cell", source=source))


def test_a_cell_runs_and_its_outputs_come_back(box):
    assert "text': '4\\n" in output(box, "print(2 + 2)")
    assert "ZeroDivisionError" in output(box, "1 / 0")
    assert box.ask(do="cell", source="1 / 0")["outputs"][0]["output_type"] == "error"


def test_a_call_returns_values_and_the_arguments_afterwards(box):
    box.ask(do="cell", source="def double(x):\n    x *= 2\n    return [x.sum().item(), x]")
    args = ([], (torch.ones(3, dtype=torch.bfloat16),), {})  # no promises, the arguments, no keywords
    reply = box.ask(do="call", objects=["double"], drive="common.call", args=args)
    _, (after,), _ = reply["after"]
    assert reply["got"]["value"][0] == 6.0 and after.equal(torch.full((3,), 2.0, dtype=torch.bfloat16))


def test_a_value_that_cannot_travel_is_an_error_and_not_the_end(box):
    box.ask(do="cell", source="def odd(x):\n    return open")
    assert "raised" in box.ask(do="call", objects=["odd"], drive="common.call", args=([], (1,), {}))["got"]
    assert "text': '1\\n" in output(box, "print(1)")


def test_a_loop_is_interrupted_and_the_next_cell_runs(box):
    started = time.monotonic()
    assert "TimeoutError" in output(box, "while True:\n    pass")
    assert time.monotonic() - started < 9 and "text': '1\\n" in output(box, "print(1)")


def test_the_environment_is_empty(box):
    os.environ["A_SECRET_OF_THE_GRADER"] = "token"
    text = output(box, "import os; print(sorted(os.environ), os.listdir(os.path.expanduser('~')))")
    assert "SECRET" not in text and "ipython" in text


def test_input_finds_nobody(box):
    assert "Error" in output(box, "input('name? ')")


@apart
@pytest.mark.parametrize(
    "source",
    [
        "import minipeft.course.exercises.lora",
        "import minipeft; open(minipeft.__path__[0] + '/course/exercises/lora.py')",
        "import minipeft, os; os.listdir(minipeft.__path__[0] + '/../solutions')",
        "open('/was_here', 'w')",
        "open('/dev/shm/was_here', 'w')",
        "import minipeft; open(minipeft.__path__[0] + '/was_here', 'w')",
        "import socket; socket.create_connection(('127.0.0.1', PORT), timeout=2)",
        "import os, signal; os.kill(GRADER, signal.SIGTERM)",
    ],
)
def test_answers_files_network_and_processes_of_others_are_out_of_reach(box, source):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        source = source.replace("PORT", str(server.getsockname()[1])).replace("GRADER", str(os.getpid()))
        assert box.ask(do="cell", source=source)["outputs"][0]["output_type"] == "error"


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("import os; os._exit(3)", "its process ended"),
        ("import time\nwhile True:\n  try:\n    time.sleep(60)\n  except BaseException: pass", "took too long"),
        ("import time, subprocess\nfor _ in range(99): subprocess.Popen(['sleep', '60'])\ntime.sleep(9)", "processes"),
    ],
)
def test_what_cannot_be_survived_ends_with_a_reason_and_leaves_no_process(source, why):
    with Sandbox(Limits(each=3, processes=40)) as box:
        pid = box.process.pid
        with pytest.raises(Killed, match=why):
            box.ask(do="cell", source=source)
        family = psutil.Process(pid).children(recursive=True) if psutil.pid_exists(pid) else []
    deadline = time.monotonic() + 5
    while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_the_memory_is_limited():
    with Sandbox(Limits(memory=2**30)) as box:
        text = output(box, "x = bytes(2 * 10**9)")
        assert "MemoryError" in text


def test_the_report_of_isolation_claims_nothing_that_is_not_there(monkeypatch):
    assert set(isolation()) >= {"time", "memory", "processes", "disk", "files", "network"}
    monkeypatch.setattr("minipeft.course.sandbox.bubblewrap", lambda: None)
    assert all(isolation()[name].startswith("NO:") for name in ("disk", "files", "network"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_it_also_works_without_bubblewrap(monkeypatch):
    monkeypatch.setattr("minipeft.course.sandbox.bubblewrap", lambda: None)
    with Sandbox(Limits(each=3, disk=10**7)) as box:
        assert "text': '4\\n" in output(box, "print(2 + 2)")
        with pytest.raises(Killed, match="wrote more than"):
            box.ask(
                do="cell",
                source="import time\nfor i in range(9): open(f'f{i}', 'wb').write(bytes(5 * 10**6))\ntime.sleep(2)",
            )
    assert not os.path.exists(box.home)


# The wire ------------------------------------------------------------------------------------------------------------
trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


def through(value):
    read, write = os.pipe()
    try:
        wire.send(write, value)
        return wire.receive(read, 5)
    finally:
        os.close(read)
        os.close(write)


@settings(deadline=None, max_examples=50)
@given(trees)
def test_values_arrive_as_they_were_sent(value):
    assert through(value) == value


def test_tensors_arrive_bit_for_bit():
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.bool, torch.int64):
        sent = torch.tensor([0, 1, 1]).to(dtype)
        assert through({"x": (sent, [sent[::2]])})["x"][0].equal(sent)
    assert math.isnan(through([float("nan")])[0])


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=60))
def test_rubbish_is_refused_in_one_way(data):
    read, write = os.pipe()
    os.write(write, data)
    os.close(write)
    try:
        with pytest.raises(wire.Broken):
            wire.receive(read, 5)
    finally:
        os.close(read)
