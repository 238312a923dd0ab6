"""The GPU kit, in miniature on the CPU: every stage leaves its file, and what comes back is taken whole or refused."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minipeft.course import atlas
from minipeft.world import base

KIT = Path(__file__).parent.parent / "tools" / "gpu"
STAGES = ("agree", "bases", "memory", "bench", "larger", "atlas")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("kit") / "results"
    command = [sys.executable, str(KIT / "run.py"), "--out", str(out), "--dry-run", "--seconds", "60"]
    bare = os.environ | {"PYTHONPATH": str(KIT / "standin")}  # before the package itself, as if it were not there
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, env=bare)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return out


@pytest.fixture
def take(monkeypatch, tmp_path):
    """`take.py` with the course's bases and atlas in a folder of its own."""
    spec = importlib.util.spec_from_file_location("take", KIT / "take.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shutil.copytree(base.FOLDER, tmp_path / "pocket")
    shutil.copy(atlas.PATH, tmp_path / "atlas.parquet")
    monkeypatch.setattr(base, "FOLDER", tmp_path / "pocket")
    monkeypatch.setattr(base, "DESK", tmp_path / "desk")
    monkeypatch.setattr(atlas, "PATH", tmp_path / "atlas.parquet")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "take.py"))

    def call(folder: Path) -> int:
        monkeypatch.setattr(sys, "argv", ["take.py", str(folder), "--quick"])
        return module.main()

    return call


def write_base(path: Path, spoil: float = 0.0) -> None:
    """The shipped base as the kit would have written it, with noise on its weights."""
    model, _ = base.load("pocket")
    torch.manual_seed(0)
    weights = {k: v + spoil * torch.randn_like(v) for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(weights, path, {"card": json.dumps({"trained on": {"device": "a GPU"}}), "shape": "{}"})


def test_every_stage_leaves_its_file_and_says_what_it_did(results):
    report = json.loads((results / "report.json").read_text())
    assert list(report["stages"]) == list(STAGES) and not any("failed" in each for each in report["stages"].values())
    assert report["dry run"] is True and {"device", "torch", "transformers", "peft", "python"} <= set(report)
    files = list(results.iterdir())
    assert len(files) <= 8 and all(file.stat().st_size <= 16 * 2**20 for file in files)
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".parquet"}, "no pickle"
    agreed = json.loads((results / "agree.json").read_text())["relative differences"]
    assert agreed and all(each["same tokens"] and each["logits"] == each["gradients"] == 0 for each in agreed.values())
    assert all(row["measured"] == row["predicted"] for row in json.loads((results / "memory.json").read_text())["rows"])
    assert len(atlas.load(results / "atlas.parquet")) >= 1


def test_without_a_gpu_it_says_so_in_a_sentence(tmp_path):
    command = [sys.executable, str(KIT / "run.py"), "--out", str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2 and "sees no GPU" in run.stderr and not (tmp_path / "out").exists()


def test_it_needs_no_datasets_package():
    """The stand-in gives a task the same rows."""
    code = (
        f"import sys; sys.path.insert(0, {str(KIT / 'standin')!r});"
        "import minipeft as mp; rows = mp.world.pirate(40, 8).data;"
        "print(sys.modules['datasets'].__file__, rows['train'][3]['text'], list(rows['test']['text'])[:2])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=KIT.parents[1])
    assert run.returncode == 0, run.stderr[-800:]
    import minipeft as mp

    task = mp.world.pirate(40, 8)
    file = KIT / "standin" / "datasets" / "__init__.py"
    assert run.stdout.strip() == f"{file} {task.data['train'][3]['text']} {list(task.data['test']['text'])[:2]}"


def test_a_dry_run_is_not_taken(results, take, capsys):
    assert take(results) == 2 and "dry run" in capsys.readouterr().err
    assert not base.DESK.exists()


def test_results_are_taken_whole_or_refused_with_the_figures(take, tmp_path, capsys):
    folder = tmp_path / "results"
    folder.mkdir()
    assert take(folder) == 2 and "no report" in capsys.readouterr().err
    (folder / "report.json").write_text(json.dumps({"dry run": False}))

    write_base(folder / "desk.safetensors")  # as good as pocket
    assert take(folder) == 0
    model, _ = base.load("desk")
    assert model.config.name_or_path == "desk" and (tmp_path / "results" / "report.json").exists()

    before = {path.name: path.read_bytes() for path in base.FOLDER.iterdir()}
    write_base(folder / "pocket.safetensors", spoil=0.2)
    assert take(folder) == 1
    assert "worse than the pocket base" in capsys.readouterr().err
    (folder / "pocket.safetensors").write_bytes(b"no tensors")
    assert take(folder) == 1 and "not a base that the kit wrote" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in base.FOLDER.iterdir()} == before

    (folder / "pocket.safetensors").unlink()
    (folder / "desk.safetensors").unlink()
    shutil.copy(atlas.PATH, folder / "atlas.parquet")
    atlas.PATH.write_bytes(b"another")
    assert take(folder) == 0 and len(atlas.load()) > 1000
    runs = atlas.load().head(5).drop(columns=["attached", "size"])
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pandas(runs, preserve_index=False)
    pq.write_table(table.replace_schema_metadata({"provenance": json.dumps(atlas.load().attrs["provenance"])}),
                   folder / "atlas.parquet")  # fmt: skip
    whole = atlas.PATH.read_bytes()
    assert take(folder) == 1 and "lacks" in capsys.readouterr().err and atlas.PATH.read_bytes() == whole


def test_what_the_readme_says_of_a_run_is_in_its_results():
    text = " ".join((KIT / "README.md").read_text(encoding="utf-8").split())
    agree, bench, memory, report = (
        json.loads((KIT / "results" / f"{name}.json").read_text()) for name in ("agree", "bench", "memory", "report")
    )
    found = list(agree["relative differences"].values())
    assert f"{len(found)} settings" in text and not agree["failed"] and all(each["same tokens"] for each in found)
    assert max(v for each in found for k, v in each.items() if k != "same tokens") < 7.05e-7
    many = [round(row["one by one / at once"], 1) for row in bench["rows"] if "runs at once" in row]
    assert f"{many[0]}, {many[1]} and {many[2]} times less time" in text
    full = [row["minipeft / full"] for row in bench["rows"] if "width" in row]
    assert f"{min(full):.1f} to {max(full):.1f} times as long as a full one" in text
    beyond = [(row["measured"] - row["predicted"]) / 2**20 for row in memory["rows"]]
    assert f"{min(beyond):.0f} to {max(beyond):.0f} MiB beyond the prediction" in text
    steps = sum(phase["steps"] for phase in report["stages"]["bases"]["pocket"]["phases"])
    assert report["device"] in text and steps / sum(steps for steps, *_ in base.PHASES) == pytest.approx(0.25, abs=0.03)


def test_a_desk_that_nobody_trained_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(base, "DESK", tmp_path / "desk")
    with pytest.raises(ValueError, match='no "desk" base yet'):
        base.load("desk")


def test_the_excess_is_paired_text_by_text():
    """The source's own score on the same texts is taken off before anything is averaged."""
    tokens = torch.tensor([10, 20, 30])
    log_p = torch.tensor([-12.0, -19.0, -33.0])
    assert base.excess(-log_p + 0.25 * tokens, tokens, log_p) == pytest.approx((0.25, 0.0), abs=1e-9)
    above, error = base.excess(-log_p + torch.tensor([0.0, 20.0, 0.0]), tokens, log_p)
    assert above == pytest.approx(20 / 60) and error > 0.1
