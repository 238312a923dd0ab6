"""What comes out of a submission's process, whatever it sends; and that its measuring has not been replaced."""

import os
import struct
import tracemalloc

import nbformat
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minipeft.course import pristine, replies, wire
from minipeft.course.sandbox import Killed, Limits, Sandbox
from minipeft.course.verdict import Raised

anything = st.recursive(
    st.none() | st.integers() | st.floats() | st.text(st.characters(), max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.sampled_from(["got", "after", "value", "raised", "outputs", "output_type", "text"]), inner)
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=200)
@given(anything)
def test_any_reply_is_taken_apart_or_ends_the_process(reply):
    for take in (lambda: replies.outcome(reply, (1, 2)), lambda: replies.outputs_of(reply, 10**6)):
        try:
            found = take()
        except Killed as killed:
            assert str(killed) == "it sent a malformed reply"
        else:
            assert isinstance(found, list) or len(found[1]) == 2


def test_lengths_are_cut_outside():
    sent = [{"output_type": "error", "ename": "x" * 10**6, "evalue": "y" * 10**7, "traceback": ["z" * 10**7] * 50}] * 99
    outputs = replies.outputs_of({"outputs": sent}, replies.ROOM)
    assert len(outputs) <= replies.OUTPUTS and sum(map(replies.size, outputs)) <= replies.ROOM
    assert len(outputs[0].evalue) < 2100 and len(outputs[0].ename) < 300
    got, after = replies.outcome({"got": {"raised": [["E" * 999], "t" * 10**7, "w" * 10**7]}, "after": ()}, (1,))
    assert isinstance(got, Raised) and len(str(got)) < 5000 and after == (1,)


def test_texts_come_out_as_any_file_page_and_terminal_can_take_them():
    text = replies.clean("half \ud800, bell \x07, \x1b[31mred\x1b[0m, end\r\n\tof line\u2028", 99)
    assert text == "half ?, bell , red, end\n\tof line" and text.encode()


def test_a_picture_that_is_none_does_not_reach_the_page():
    sent = [{"output_type": "display_data", "data": {"image/png": 'x"><script>', "text/plain": "a figure"}}]
    (output,) = replies.outputs_of({"outputs": sent}, replies.ROOM)
    assert output.data == {"text/plain": "a figure"}
    nbformat.validate(output, ref="output", version=4)


@pytest.mark.parametrize(
    "message",
    [
        struct.pack(">QQ", 2**62, 0),
        struct.pack(">QQ", 0, 2**62),
        struct.pack(">QQ", 4 * 2**20 - 1, 0) + b"[" + b"[]," * (2**20 + 2**18) + b"[]]",
        struct.pack(">QQ", 40_000, 0) + b"[" * 40_000,
    ],
    ids=["a long text", "a long tensor", "many small values", "deep"],
)
def test_a_large_message_is_refused_in_bounded_memory(message):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        wire.write(write, message[: 2**24])
        os._exit(0)
    os.close(write)
    tracemalloc.start()
    try:
        with pytest.raises(wire.Broken):
            wire.receive(read, 20)
        assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
    finally:
        tracemalloc.stop()
        os.close(read)
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def test_a_process_that_reads_nothing_does_not_hold_up_the_grader():
    with Sandbox(Limits(each=1)) as box:
        box.ask(
            do="cell", source="import os, signal, threading\nthreading.Timer(.5, os.kill, (os.getpid(), 19)).start()"
        )
        box.ask(do="cell", source="import time; time.sleep(0.4)")
        with pytest.raises(Killed, match="took too long"):
            while True:  # until it is stopped, which a quick machine would reach after many calls only
                box.ask(do="call", objects=["x"], drive="common.call", args=(torch.ones(2**20),))


# Measuring -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def box():
    with Sandbox(Limits(each=5)) as box:
        yield box


PATCHES = {  # {what is replaced: (how, and how it is put back)}
    "lora.merge": ("import minipeft.course.drives.lora as m; old = m.merge; m.merge = print", "m.merge = old"),
    "drives.perform": (
        "from minipeft.course.drives import perform as f; old = f.__code__\n"
        "f.__code__ = (lambda *a: (4.0, a)).__code__",
        "f.__code__ = old",
    ),
    "torch.equal": ("import torch; old = torch.equal; torch.equal = lambda *a: True", "torch.equal = old"),
    "Tensor.detach": (
        "import torch; old = torch.Tensor.detach; torch.Tensor.detach = lambda self: self",
        "torch.Tensor.detach = old",
    ),
    "Tensor": ("torch.Tensor.shape = property(lambda self: torch.Size([2, 2]))", "del torch.Tensor.shape"),
    "Module._call_impl": (
        "M = torch.nn.Module; old = M._call_impl; M._call_impl = lambda *a, **k: old(*a, **k)",
        "M._call_impl = old",
    ),
    "quantisation.torch": (
        "import minipeft.course.drives.quantisation as m; m.torch = type(m)('torch')",
        "m.torch = torch",
    ),
    "common.descend": (
        "from minipeft.course.drives.common import descend as f\n"
        "cell = next(c for c in f.__closure__ if c.cell_contents is f.__wrapped__); old = cell.cell_contents\n"
        "cell.cell_contents = lambda *a: None",
        "cell.cell_contents = old",
    ),
    "sys.settrace": ("import sys; sys.settrace(lambda *a: None)", "sys.settrace(None)"),
    "a mode over torch's functions": (
        "class Mode(torch.overrides.TorchFunctionMode):\n"
        "    def __torch_function__(self, f, types, args=(), kwargs=None): return f(*args, **(kwargs or {}))\n"
        "mode = Mode(); mode.__enter__()",
        "mode.__exit__(None, None, None)",
    ),
    "torch.library": (
        "lib = torch.library.Library('aten', 'IMPL'); lib.impl('trace', lambda x: x[0, 0], 'CPU')",
        "lib._destroy()",
    ),
    "hooks for every module": (
        "hook = torch.nn.modules.module.register_module_forward_hook(lambda *a: None)",
        "hook.remove()",
    ),
    "builtins.id": ("import builtins; old = builtins.id; builtins.id = lambda x: 1", "builtins.id = old"),
    "copy.deepcopy": ("import copy; old = copy.deepcopy; copy.deepcopy = lambda x: x", "copy.deepcopy = old"),
    "lora as a whole": (
        "import sys; n = 'minipeft.course.drives.lora'; old = sys.modules[n]; sys.modules[n] = type(sys)(n)",
        "sys.modules[n] = old",
    ),
    "Worker.call": (
        "import gc; W = next(o for o in gc.get_objects() if isinstance(o, type) and o.__name__ == 'Worker')\n"
        "old = W.call; W.call = lambda self, **k: {}",
        "W.call = old",
    ),
}


@pytest.mark.parametrize("what", PATCHES)
def test_what_replaces_a_function_that_measures_is_seen(box, what):
    patch, back = PATCHES[what]
    before = box.ask(do="state", whole=False), box.ask(do="state", whole=True)["state"]
    box.ask(do="cell", source=patch)
    assert box.ask(do="state", whole=False) != before[0]
    assert any(what in name for name in pristine.replaced(box.ask(do="state", whole=True)["state"], before[1]))
    box.ask(do="cell", source=back)
    assert box.ask(do="state", whole=False) == before[0]


def test_two_processes_agree_and_honest_imports_change_nothing(box):
    with Sandbox() as other:
        assert box.ask(do="state", whole=True) == other.ask(do="state", whole=True)
        other.ask(do="cell", source="import numpy, pandas, matplotlib.pyplot, transformers.pytorch_utils, tqdm.auto")
        assert box.ask(do="state", whole=True) == other.ask(do="state", whole=True)
