"""What docs/scale.md says of several processes: they learn what one process learns from the same batches."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STEPS, BATCH, LR = 6, 6, 3e-3
TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def printed(*command: str) -> list[tuple[int, list[float]]]:
    """(processes, losses) as often as a script in tools/scale/ prints them."""
    command += ("--steps", str(STEPS), "--batch", str(BATCH), "--lr", str(LR))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"processes"')]
    return [(each["processes"], each["losses"]) for each in found]


@pytest.mark.slow
def test_two_processes_learn_what_one_does():
    """The same global batches: every loss to 1e-5, and that of `fit`, which knows nothing of processes; also where each
    process holds a share of the weights only, and under accelerate."""
    import minipeft as mp

    ways = printed(*TWO_PROCESSES, "tests/scale_ways.py", "tools/scale/ddp.py", ",--shard,--accelerate")
    assert [count for count, _ in ways] == [2, 2, 2]
    tuned = mp.attach(mp.load("pocket")[0], mp.LoRA(rank=8))
    alone = mp.fit(tuned, mp.world.pirate(), steps=STEPS, batch=BATCH, lr=LR, progress=False)
    for _, losses in ways:
        assert len(losses) == STEPS and losses[-1] < losses[0] and losses == pytest.approx(alone.losses, abs=1e-5)


@pytest.mark.slow
def test_the_trainer_divides_a_batch_over_two_processes(monkeypatch, capsys):
    ((count, two),) = printed(*TWO_PROCESSES, "tools/scale/trainer.py")
    monkeypatch.setattr(sys, "argv", ["trainer.py", "--steps", str(STEPS), "--batch", str(BATCH), "--lr", str(LR)])
    runpy.run_path(str(ROOT / "tools/scale/trainer.py"), run_name="__main__")
    one = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (count, one["processes"], len(two)) == (2, 1, STEPS) and two == pytest.approx(one["losses"], abs=1e-5)
