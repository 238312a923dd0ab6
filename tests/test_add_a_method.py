"""`docs/add_a_method.md` is followed as it stands, in a copy of the project."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "add_a_method.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)


def test_the_steps_of_the_guide_work(tmp_path):
    for folder in ("minipeft", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (kind, source), (_, line), (shell, command) = BLOCKS
    assert (kind, shell) == ("python", "bash") and line.count("\n") == 1, "a file, one line, a command"
    path = re.search(r"Save this as `(.+?)`", PAGE)[1]
    (tmp_path / path).write_text(source, encoding="utf-8")
    registry = tmp_path / re.search(r"In `(.+?)`, among the others", PAGE)[1]
    first = "from minipeft.methods.adalora"
    registry.write_text(registry.read_text(encoding="utf-8").replace(first, line + first), encoding="utf-8")

    python, *arguments = shlex.split(command)
    assert python == "python"
    arguments += ["-p", "no:cacheprovider", "-o", "addopts=", "-q"]
    run = subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:]
    passed = int(re.search(r"(\d+) passed", run.stdout)[1])
    assert passed > 20, run.stdout[-500:]

    asked = (
        "import minipeft as mp, torch; from torch import nn; model = nn.Sequential(nn.Linear(6, 4));"
        "tuned = mp.attach(model, mp.Scale()); print(tuned.count().trainable, 'Scale' in dir(mp), mp.__file__)"
    )
    run = subprocess.run(
        [sys.executable, "-c", asked], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.stdout.split()[:2] == ["6", "True"] and str(tmp_path) in run.stdout, run.stdout + run.stderr
