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


def losses(*command: str, script: str = "ddp", more: tuple[str, ...] = ()) -> tuple[int, list[float]]:
    """(processes, losses) that a script in tools/scale/ prints."""
    arguments = [f"tools/scale/{script}.py", "--steps", str(STEPS), "--batch", str(BATCH), "--lr", str(LR), *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return found["processes"], found["losses"]


@pytest.mark.slow
def test_two_processes_learn_what_one_does():
    """The same global batches: every loss to 1e-5, and that of `fit`, which knows nothing of processes; also where each
    process holds a share of the weights only, and under accelerate."""
    import minipeft as mp

    count, two = losses(*TWO_PROCESSES)
    assert count == 2 and len(two) == STEPS and two[-1] < two[0]
    for engine in ("--shard", "--accelerate"):
        count, other = losses(*TWO_PROCESSES, more=(engine,))
        assert count == 2 and other == pytest.approx(two, abs=1e-5), engine
    tuned = mp.attach(mp.load("pocket")[0], mp.LoRA(rank=8))
    alone = mp.fit(tuned, mp.world.pirate(), steps=STEPS, batch=BATCH, lr=LR, progress=False)
    assert two == pytest.approx(alone.losses, abs=1e-5)


@pytest.mark.slow
def test_the_trainer_divides_a_batch_over_two_processes(monkeypatch, capsys):
    count, two = losses(*TWO_PROCESSES, script="trainer")
    monkeypatch.setattr(sys, "argv", ["trainer.py", "--steps", str(STEPS), "--batch", str(BATCH), "--lr", str(LR)])
    runpy.run_path(str(ROOT / "tools/scale/trainer.py"), run_name="__main__")
    one = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (count, one["processes"], len(two)) == (2, 1, STEPS) and two == pytest.approx(one["losses"], abs=1e-5)
