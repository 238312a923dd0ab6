"""Sweeps: killed and restarted, here or in processes, they give one and the same table; damage is said."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pyarrow.parquet as pq
import pytest

import minipeft as mp
from minipeft.course import atlas
from minipeft.learn import sweep as s

POINTS = [
    s.point(method, task, lr, seed, steps=3, batch=2, **settings)
    for method, settings in (("LoRA", {"rank": 2}), ("BitFit", {}))
    for task, lr, seed in (("facts(4)", 1e-2, 0), ("facts(4)", 1e-3, 1))
]


def table(path):
    found = pq.read_table(path)
    about = json.loads(found.schema.metadata[b"provenance"])
    return found.drop_columns(list(s.WALL_TIME)).to_pylist(), {k: v for k, v in about.items() if k != "seconds"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert s.sweep(POINTS, folder / "runs") == 0
    s.collect(POINTS, folder / "runs", folder / "atlas.parquet")
    return folder


@pytest.mark.slow
def test_a_sweep_killed_at_random_and_restarted_gives_the_same_table(whole, tmp_path):
    script = (
        "from minipeft.learn import sweep as s\n"
        f"s.sweep([s.Point(*p) for p in {[tuple(vars(p).values()) for p in POINTS]!r}], {str(tmp_path / 'runs')!r})"
    )
    rng = random.Random(os.getpid())
    done, tries = 0, 0
    while done < len(POINTS) and tries < 2:
        child = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
        before = done
        while child.poll() is None and done == before:  # let it finish a run, then kill it in the next
            time.sleep(0.02)
            done = len(list((tmp_path / "runs").glob("*.json")))
        time.sleep(rng.random() * 0.3)
        child.send_signal(signal.SIGKILL)
        child.wait()
        tries += 1
    finished = {f: f.stat().st_mtime_ns for f in (tmp_path / "runs").glob("*.json")}
    assert finished
    assert s.sweep(POINTS, tmp_path / "runs") == 0
    assert all(f.stat().st_mtime_ns == t for f, t in finished.items()), "what was finished is not run again"
    s.collect(POINTS, tmp_path / "runs", tmp_path / "atlas.parquet")
    assert table(tmp_path / "atlas.parquet") == table(whole / "atlas.parquet")


def test_an_executor_and_another_order_give_the_same_table(whole, tmp_path):
    with ThreadPoolExecutor(1) as executor:
        assert s.sweep(POINTS[::-1] + POINTS, tmp_path / "runs", executor) == 0
    s.collect(POINTS, tmp_path / "runs", tmp_path / "atlas.parquet")
    assert table(tmp_path / "atlas.parquet") == table(whole / "atlas.parquet")


def test_time_can_run_out_and_a_missing_or_damaged_run_is_said(whole, tmp_path):
    assert s.sweep(POINTS, tmp_path / "runs", seconds=-1) == len(POINTS)
    with pytest.raises(ValueError, match="missing or damaged"):
        s.collect(POINTS, tmp_path / "runs", tmp_path / "atlas.parquet")
    assert not (tmp_path / "atlas.parquet").exists()
    good = (whole / "runs" / f"{POINTS[0].key}.json").read_text()
    for bad in (good[:40], json.dumps(json.loads(good) | {"lr": 5.0})):
        (tmp_path / "runs" / f"{POINTS[0].key}.json").write_text(bad)
        with pytest.raises(ValueError, match="missing or damaged"):
            s.collect(POINTS[:1], tmp_path / "runs", tmp_path / "atlas.parquet")


def test_an_error_in_a_run_is_raised_and_leaves_no_half_file(tmp_path):
    bad = replace(POINTS[0], settings='{"rank": 4096}')
    with pytest.raises(ValueError, match="rank=4096"):
        s.sweep([bad], tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_field_of_a_point_names_another_file():
    changes = dict(method="Full", settings="{}", task="flip", lr=0.5, seed=9, steps=4, batch=3)
    assert len({POINTS[0].key, *(replace(POINTS[0], **{k: v}).key for k, v in changes.items())}) == 1 + len(changes)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: s.point("Lora", "flip", 1e-2, 0), "no method"),
        (lambda: s.point("fit", "flip", 1e-2, 0), "no method"),
        (lambda: s.point("LoRA", "flop", 1e-2, 0), "no task"),
        (lambda: s.point("LoRA", "facts", 1e-2, 0), "no task"),
        (lambda: s.point("LoRA", "flip", 1e-2, 0, bottleneck=3), "does not take"),
        (lambda: s.collect([], "x", "y"), "no points"),
    ],
)
def test_mistakes_are_said(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_grid_has_more_than_1500_runs_and_the_explorers_own():
    points = s.grid()
    assert len(points) == len(set(points)) >= 1500
    from minipeft.explore import training

    assert (s.Point.steps, s.Point.batch) == (training.STEPS, training.BATCH)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")
def test_a_sweep_that_is_killed_leaves_no_worker_behind(tmp_path):
    import psutil

    command = [sys.executable, "-m", "minipeft.learn.sweep", "--folder", str(tmp_path), "--workers", "2"]
    parent = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("*.json")):
        assert parent.poll() is None
        time.sleep(0.1)
    workers = psutil.Process(parent.pid).children(recursive=True)
    assert len(workers) >= 2
    parent.kill()
    parent.wait()
    assert not psutil.wait_procs(workers, timeout=30)[1]


def test_the_shipped_atlas_is_small_quick_and_says_where_it_comes_from():
    runs = atlas.load()
    assert atlas.PATH.stat().st_size < 5 * 2**20
    started = time.process_time()
    atlas.load()
    assert time.process_time() - started < 0.2
    about = runs.attrs["provenance"]
    assert about["runs"] == len(runs) and about["seeds"] == sorted(set(runs.seed))
    assert {"date", "torch", "device", "seconds"} <= about.keys() and about["date"] in atlas.describe(runs)
    lora = partial(mp.LoRA, gamma=2.0)
    points = s.grid(seeds=len(about["seeds"]))
    assert [tuple(row) for row in runs[list(vars(points[0]))].itertuples(index=False)] == [
        tuple(vars(p).values()) for p in points
    ], "every run of the grid, and no other"
    assert atlas.curve(runs, "pirate", lora(16))["count"].eq(len(about["seeds"])).all()
    assert atlas.curve(runs, "pirate", lora(16, targets="mlp")).index.tolist() == [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
    best, full = atlas.best(runs, "pirate", mp.Full()), atlas.curve(runs, "pirate", mp.Full())
    assert best["mean"] == full["mean"].min() == full["mean"][best["lr"]] and best["max"] == full["max"][best["lr"]]
    with pytest.raises(ValueError, match="no runs of LoRA.rank=5.*it has LoRA.rank=1,"):
        atlas.curve(runs, "pirate", lora(5))


def test_learning_rates_are_tried_until_more_or_less_brings_nothing():
    """Each setting's best rate has tried neighbours on both sides, or the one that it has is as good, to 0.05 nats."""
    runs = atlas.load()
    runs = runs[runs.schedule == "constant"]
    for which, rows in runs.groupby(["attached", "task", "steps", "batch"]):
        means = rows.groupby("lr").loss.mean()
        beside = {0: 1, len(means) - 1: len(means) - 2}.get(means.argmin())
        assert beside is None or means.iloc[beside] - means.min() < 0.05, (which, means)


def test_something_else_is_no_atlas(tmp_path):
    (tmp_path / "x.parquet").write_text("no")
    with pytest.raises(ValueError, match="no atlas"):
        atlas.load(tmp_path / "x.parquet")


def test_a_shipped_run_can_be_run_again():
    """The quickest run of the atlas; another kind of CPU may differ in late digits, and training enlarges them."""
    runs = atlas.load()
    row = runs[(runs.task == "facts(64)") & (runs.method == "LoRA") & (runs["size"] == 1) & (runs.lr == 1e-3)].iloc[0]
    again = s.run(s.point("LoRA", "facts(64)", 1e-3, int(row.seed), rank=1, gamma=2.0))
    assert again["loss"] == pytest.approx(row.loss, rel=0.02) and again["trainable"] == row.trainable
