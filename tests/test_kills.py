"""A process that is killed while it saves leaves the old files or the new ones, never a mixture. `--kills 100` tries
more often."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time

import pytest
import tiny
import torch
from transformers.utils import logging

from minipeft.attach import attach
from minipeft.methods.lora import LoRA
from minipeft.serve.checkpoint import CONFIG, SAVING, load_adapter
from minipeft.serve.export import export
from minipeft.whole import write_whole

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs os.fork, to start a process in a millisecond")


def adapters() -> dict[int, object]:
    """{k: an adapter of rank k and γ = k in which every number is k}: ranks 1 to 3 differ in the configuration as well
    as in the weights, and so would a mixture of two."""
    found = {}
    for k in (1, 2, 3):
        found[k] = attach(tiny.llama(), LoRA(rank=k, gamma=float(k), targets=["q_proj", "v_proj"]))
        for parameter in found[k].adapters.parameters():
            parameter.data.fill_(k)
    return found


def killed(work, seconds: float) -> None:
    """Runs `work` in a process of its own, again and again, and kills it after so many seconds."""
    process = multiprocessing.get_context("fork").Process(target=forever, args=(work,))
    process.start()
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL, "it was still at work"


def forever(work) -> None:
    logging.disable_progress_bar()  # its lock is one for both processes, and whoever dies with it holds it for ever
    for turn in range(10**9):
        work(turn)


def which(path) -> int:
    """The k of the adapter at `path`; an AssertionError if it is not of one piece."""
    (layer, *_), *_ = [list(load_adapter(tiny.llama(), path).adapters["default"].values())]
    assert set(layer.A.flatten().tolist()) == set(layer.B.flatten().tolist()) == {layer.rank} == {layer.gamma}
    return layer.rank


@pytest.mark.slow
def test_an_adapter_is_the_old_or_the_new_one(tmp_path, kills):
    pick, path, every = random.Random(0), tmp_path / "adapter", adapters()
    every[1].save(path)
    seen = set()
    for _ in range(kills):
        killed(lambda turn: every[1 + turn % 3].save(path), pick.uniform(0.005, 0.05))
        seen.add(which(path))
        text = (path / "README.md").read_text()
        assert text.startswith("---\n") and text.endswith("-->\n")
    assert kills < 20 or len(seen) > 1, "the kills came at different moments"
    every[2].save(path)
    assert which(path) == 2 and not (path / SAVING).exists(), "the next save clears up"


@pytest.mark.parametrize("cut", range(5))
def test_whatever_the_last_step_was(cut, tmp_path, monkeypatch):
    """The process dies before each of the moves, one after the other."""
    path, every = tmp_path / "adapter", adapters()
    every[1].save(path)
    done, replace = [], os.replace

    class Dies(BaseException):
        pass

    def dying(source, target):
        if len(done) == cut:
            raise Dies
        done.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("minipeft.serve.checkpoint.os.replace", dying)
        patch.setattr("minipeft.serve.checkpoint.shutil.rmtree", lambda *_, **__: None)
        if cut < 4:
            with pytest.raises(Dies):
                every[3].save(path)
        else:
            every[3].save(path)
    assert which(path) == (1 if cut == 0 else 3)
    every[2].save(path)
    assert which(path) == 2 and json.loads((path / CONFIG).read_text())["r"] == 2 and not (path / SAVING).exists()


def test_an_exported_model_is_there_or_not(tmp_path, kills):
    pick, tuned = random.Random(1), adapters()[2]
    ids = tiny.batch(tuned)["input_ids"]
    for i in range(max(1, kills // 4)):
        folder = tmp_path / str(i)
        killed(lambda turn, folder=folder: export(tuned, folder / str(turn), ids), pick.uniform(0.05, 0.3))
        for path in folder.glob("[0-9]*"):
            plain = type(tuned.base).from_pretrained(path)
            assert torch.isfinite(plain(ids).logits).all()


def test_a_whole_file_is_the_old_or_the_new_one(tmp_path, kills):
    pick, path = random.Random(2), tmp_path / "file"
    write_whole(path, "0" * 100_000)
    for _ in range(kills):
        killed(lambda turn: write_whole(path, str(turn % 10) * 100_000), pick.uniform(0.001, 0.02))
        text = path.read_text()
        assert len(text) == 100_000 and len(set(text)) == 1


def test_two_processes_that_save_to_one_place(tmp_path):
    """Neither fails, and what is there at the end is one of them."""
    path, every = tmp_path / "adapter", adapters()
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=lambda k=k: [every[k].save(path) for _ in range(25)]) for k in (1, 2, 3)]
    for process in processes:
        process.start()
    seen, end = set(), time.monotonic() + 120
    while any(process.is_alive() for process in processes):
        assert time.monotonic() < end, "In two minutes, three processes did not save 25 times each."
        if path.exists():
            seen.add(which(path))  # whoever reads meanwhile sees one piece as well
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert which(path) in (1, 2, 3) and sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]
    assert not [p for p in path.iterdir() if p.name.startswith(".")]
