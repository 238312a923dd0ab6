"""What docs/scale.md says of several processes: they learn what one process learns from the same batches."""

from __future__ import annotations

import json
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
from processes import ended

ROOT = Path(__file__).parent.parent
STEPS, BATCH, LR = 6, 6, 3e-3
OPTIONS = ("--steps", str(STEPS), "--batch", str(BATCH), "--lr", str(LR))
TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def printed(*arguments: str) -> list[tuple[int, list[float]]]:
    """(processes, losses) as often as a script prints them that torchrun starts twice."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    status, said = ended([sys.executable, *TWO_PROCESSES, *arguments], 300, cwd=ROOT, env=environment)
    assert status == 0, said
    found = map(json.loads, re.findall(r'\{"processes".*?\]\}', said))  # among words of those who warn
    return [(each["processes"], each["losses"]) for each in found]


@pytest.mark.slow
def test_two_processes_learn_what_one_does():
    """The same global batches: every loss to 1e-5, and that of `fit`, which knows nothing of processes; also where each
    process holds a share of the weights only, and under accelerate."""
    import minipeft as mp

    ways = printed("tests/scale_ways.py", "tools/scale/ddp.py", ",--shard,--accelerate", *OPTIONS)
    assert [count for count, _ in ways] == [2, 2, 2]
    tuned = mp.attach(mp.load("pocket")[0], mp.LoRA(rank=8))
    alone = mp.fit(tuned, mp.world.pirate(), steps=STEPS, batch=BATCH, lr=LR, progress=False)
    for _, losses in ways:
        assert len(losses) == STEPS and losses[-1] < losses[0] and losses == pytest.approx(alone.losses, abs=1e-5)


@pytest.mark.slow
def test_the_trainer_divides_a_batch_over_two_processes(monkeypatch, capsys):
    ((count, two),) = printed("tools/scale/trainer.py", *OPTIONS)
    monkeypatch.setattr(sys, "argv", ["trainer.py", *OPTIONS])
    runpy.run_path(str(ROOT / "tools/scale/trainer.py"), run_name="__main__")
    one = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (count, one["processes"], len(two)) == (2, 1, STEPS) and two == pytest.approx(one["losses"], abs=1e-5)
