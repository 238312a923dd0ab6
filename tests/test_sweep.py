"""Sweeps: killed and restarted, here or in processes, they give one and the same table; damage is said."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pyarrow.parquet as pq
import pytest
import torch
from processes import until

import minipeft as mp
from minipeft.course import atlas, grid
from minipeft.learn import sweep as s
from minipeft.learn.protocol import CHOOSERS, SEARCH_SEED, VOTERS, half_decade, quarter_decade
from minipeft.world import base

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
    child = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)

    def wrote() -> bool:
        assert child.poll() is None
        return any((tmp_path / "runs").glob("*.json"))

    until(wrote, "a first run of the sweep")  # then it is killed in the next
    time.sleep(random.Random(os.getpid()).random() * 0.3)
    child.send_signal(signal.SIGKILL)
    child.wait()
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
        (lambda: s.point("LoRA", "flip", 0, 0), "lr must be"),
        (lambda: s.point("LoRA", "flip", "1e-2", 0), "lr must be"),
        (lambda: s.collect([], "x", "y"), "no points"),
    ],
)
def test_mistakes_are_said(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_grid_has_four_thousand_runs_and_the_explorers_own():
    points = grid.grid()
    assert len(points) == len(set(points)) >= 4000
    from minipeft.explore import training

    assert (s.Point.steps, s.Point.batch) == (training.STEPS, training.BATCH)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")
def test_a_sweep_that_is_killed_leaves_no_worker_behind(tmp_path):
    import psutil

    command = [sys.executable, "-m", "minipeft.course.grid", "--folder", str(tmp_path), "--workers", "2"]
    parent = psutil.Popen(command, stderr=subprocess.DEVNULL)

    def workers() -> list[psutil.Process]:
        assert parent.poll() is None
        found = [p for p in parent.children(recursive=True) if "--multiprocessing-fork" in p.cmdline()]
        return found if len(found) >= 2 else []

    started = until(workers, "the start of two workers", pause=0.1)
    parent.kill()
    parent.wait()
    assert not psutil.wait_procs(started, timeout=120)[1], "they end, be it before their first run"


def test_the_shipped_atlas_is_small_quick_and_says_where_it_comes_from():
    runs = atlas.load()
    assert atlas.PATH.stat().st_size < 5 * 2**20
    started = time.process_time()
    atlas.load()
    assert time.process_time() - started < 0.2
    about = runs.attrs["provenance"]
    assert about["runs"] == len(runs) and about["seeds"] == sorted(set(runs.seed) - set(CHOOSERS))
    assert {"date", "torch", "device", "seconds"} <= about.keys() and about["date"] in atlas.describe(runs)
    lora = partial(mp.LoRA, gamma=2.0)
    points = grid.grid()
    assert [tuple(row) for row in runs[list(vars(points[0]))].itertuples(index=False)] == [
        tuple(vars(p).values()) for p in points
    ], "every run of the grid, and no other"
    assert atlas.curve(runs, "pirate", lora(16, targets="mlp")).index.tolist() == [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
    assert not set(CHOOSERS) & set(about["seeds"]), "they report nothing"
    with pytest.raises(ValueError, match="no runs of LoRA.rank=5.*it has LoRA.rank=1,"):
        atlas.curve(runs, "pirate", lora(5))


def test_every_best_rate_was_chosen_on_validation_rows_and_lies_inside():
    """For every method, size and task, and every seed that reports is there; only what shows each fact 500 times, and
    bounds from below, has no rate of its own. 0.01 is there for every γ."""
    runs = atlas.load()
    shape = ["attached", "task", "steps", "batch"]
    under = set()
    for method, settings, task, (steps, batch), best in grid.searched():
        made = s.method_of(method, json.dumps(settings))
        under.add((repr(made), task, steps, batch))
        found = atlas.all_of(runs, task, made, steps=steps, batch=batch)
        search = found[found.seed == SEARCH_SEED].set_index("lr").sort_index()
        assert set(search.index) == set(grid.beside(best, settings))
        assert search.index[0] < best < search.index[-1]
        loss = search.loss if s.task_of(task).bits else search.valid_loss
        assert loss[search.stopped == "finished"].idxmin() == best, (method, settings, task)
        chosen = atlas.best(runs, task, made, steps=steps, batch=batch)
        assert chosen["lr"] == best and chosen["chosen on"] in ("validation", "the facts") and chosen["count"] >= 5
        if method == "LoRA" and task == "pirate" and steps == 60:
            assert grid.FIXED in set(found.lr)
    left = {which for which, _ in runs.groupby(shape)} - under
    assert {(task.split("(")[0], steps) for _, task, steps, _ in left} == {("facts", 2000)}


def test_every_vote_lies_inside_where_the_rate_is_what_is_asked_for():
    runs = atlas.load()
    for (method, settings), task, (steps, batch), votes in grid.VOTES:
        made = s.method_of(method, json.dumps(settings))
        by_seed, where = atlas.searches(runs, task, made, steps=steps, batch=batch)
        assert where == ("the facts" if s.task_of(task).bits else "validation")
        rates = atlas.best_rates(runs, task, made, steps=steps, batch=batch)
        for seed, vote, rate in zip(VOTERS, votes, rates, strict=True):
            found = by_seed[seed]
            coarse = {half_decade(vote, False), vote, half_decade(vote, True)}
            assert set(found) <= coarse | {quarter_decade(vote, up) for up in (False, True)}
            assert min(coarse & found.keys(), key=found.get) == vote
            assert half_decade(vote, False) < rate < half_decade(vote, True)
    with pytest.raises(ValueError, match="Only one seed chose a rate for LoRA.rank=2,.*VOTES"):
        atlas.best_rates(runs, "pirate", mp.LoRA(rank=2, gamma=2.0))


def test_an_explorer_finds_the_runs_of_every_gamma():
    """It looks up every position of rank and γ; on pirate those are all that its sliders have."""
    found, _ = atlas.measured()
    for task, ranks in grid.GAMMAS.items():
        for rank, each in ranks.items():
            for gamma, best in each.items():
                method = mp.LoRA(rank=rank, gamma=gamma)
                assert len(found[repr(method), task, best][1]) >= 5
                for lr in grid.beside(best, {"gamma": gamma}):
                    assert found[repr(method), task, lr][1], "where no other run is, the one that searched stands alone"
    controls = mp.LoRAExplorer(task="pirate").controls
    ranks, gammas = (set(controls[name].options) for name in ("rank", "gamma"))
    at_two = {each["rank"] for method, each, task, *_ in grid.searched() if (method, task) == ("LoRA", "pirate")}
    assert ranks <= at_two and all(gammas - {2.0} <= grid.GAMMAS["pirate"][rank].keys() for rank in ranks)


def test_no_run_beats_the_source_of_its_rows():
    """By more than three standard errors of its loss: whatever does has seen its test rows, or is scored wrongly."""
    runs = atlas.load()
    for task, rows in runs[runs.steps <= 120].groupby("task"):
        if not s.task_of(task).bits:
            least = rows.loc[rows.loss.idxmin()]
            assert least.loss >= atlas.source(task) - 3 * rows.loss_se.min(), (task, least.attached, least.loss)
    assert atlas.source("pirate") == pytest.approx(mp.world.pirate().floor, rel=0.1), "100 stories are near the mean"
    assert atlas.source("answer") == atlas.source("facts(64)") == 0
    model, flip = mp.load("pocket")[0], mp.world.flip()  # the task whose source is reached: here row by row
    tuned = mp.attach(model, mp.Adapter(2))
    mp.fit(tuned, flip, steps=60, lr=1e-2, batch=10, progress=False)
    rows = flip.data["test"]
    mean, error = base.excess(*s.row_losses(tuned, flip, rows), torch.tensor(rows["log_p"], dtype=torch.float64))
    assert mean > -3 * error


def made_up(**columns):
    """A table of runs of LoRA r=2 on pirate."""
    import pandas as pd

    shape = dict(method="LoRA", task="pirate", steps=60, batch=10, stopped="finished", attached=repr(mp.LoRA(rank=2)))
    return pd.DataFrame(columns).assign(**shape)


def test_validation_rows_of_another_seed_choose_the_rate_and_test_rows_report():
    new = made_up(
        seed=[100, 100, 100, 0, 1, 0, 1],
        lr=[0.01, 0.03, 0.1, 0.01, 0.01, 0.03, 0.03],
        loss=[1.0, 2.0, 0.5, 1.0, 1.2, 2.0, 2.4],  # on the test rows 0.01 is the better one
        valid_loss=[2.0, 1.0, 0.5, 1.0, 1.0, 1.0, 1.0],
    )
    new.loc[2, "stopped"] = "diverged"
    best = atlas.best(new, "pirate", mp.LoRA(rank=2))
    assert (best["lr"], best["mean"], best["chosen on"]) == (0.03, pytest.approx(2.2), "validation")
    assert (best["min"], best["max"], best["count"]) == (2.0, 2.4, 2)
    facts = atlas.best(new.assign(valid_loss=math.nan), "pirate", mp.LoRA(rank=2))
    assert (facts["lr"], facts["chosen on"]) == (0.01, "the facts")
    old = atlas.best(new[new.seed < 100], "pirate", mp.LoRA(rank=2))
    assert (old["lr"], old["mean"], old["chosen on"]) == (0.01, pytest.approx(1.1), "test")
    with pytest.raises(ValueError, match="that chose 0.03, and it reports nothing"):
        atlas.best(new[(new.seed == 100) | (new.lr != 0.03)], "pirate", mp.LoRA(rank=2))


def test_a_run_that_came_back_and_one_that_did_not():
    good = {"stopped": "finished", "trainable": 5, "loss": 1.0, "lr": 1e-2}
    for best in (1e-2, 1e-3):  # at the best rate, and above it
        assert atlas.came_back(good, good | {"loss": 1.02}, best, 0.8) == "same"
        assert atlas.came_back(good, good | {"trainable": 6}, best, 0.8) == "OTHER"
        assert atlas.came_back(good, good | {"loss": 0.7}, best, 0.8) == "OTHER", "no overshooting is better than best"
        for other in ({"loss": 1.04}, {"loss": 0.79}, {"loss": 5.0}, {"stopped": "diverged"}):
            assert atlas.came_back(good, good | other, best, 0.8) == ("unsteady" if best < 1e-2 else "OTHER")
    runs = atlas.load()
    kinds = runs[runs.steps <= 120].method.nunique()
    drawn = atlas.sample(runs, kinds, 1)
    same, other = ([(row["method"], row["lr"], row["seed"]) for row in atlas.sample(runs, kinds, n)] for n in (1, 2))
    assert len({row["method"] for row in drawn}) == kinds
    assert [(row["method"], row["lr"], row["seed"]) for row in drawn] == same != other


def test_losses_row_by_row_give_the_loss_and_its_error():
    """For texts and for answers: the same mean as `evaluate`, and the error of a ratio."""
    model = mp.load("pocket")[0]
    for name in ("pirate", "flip"):
        task = s.task_of(name)
        rows = task.data["test"].select(range(12))
        nats, tokens = s.row_losses(model, task, rows)
        assert (nats.sum() / tokens.sum()).item() == pytest.approx(mp.evaluate(model, task, n=12).loss, rel=1e-5)
        one = mp.evaluate(model, replace(task, data={"test": rows.select([5])})).loss
        assert (nats[5] / tokens[5]).item() == pytest.approx(one, rel=1e-4)
        held = set(s.validation(name)["text"])
        assert len(s.validation(name)) == 200 and not held & {*task.data["train"]["text"], *task.data["test"]["text"]}
    assert s.validation("facts(4)") is None


def test_older_runs_lack_the_newer_columns(whole, tmp_path):
    folder = tmp_path / "runs"
    shutil.copytree(whole / "runs", folder)
    file = folder / f"{POINTS[0].key}.json"
    newer = ("valid_loss", "loss_se", "n", "delta_norm")
    old = {name: value for name, value in json.loads(file.read_text()).items() if name not in newer}
    file.write_text(json.dumps(old))
    s.collect(POINTS, folder, tmp_path / "atlas.parquet")
    first, second, *_ = pq.read_table(tmp_path / "atlas.parquet").to_pylist()
    assert first["delta_norm"] is None and first["loss"] == old["loss"] and second["delta_norm"] > 0


def test_something_else_is_no_atlas(tmp_path):
    (tmp_path / "x.parquet").write_text("no")
    with pytest.raises(ValueError, match="no atlas"):
        atlas.load(tmp_path / "x.parquet")


def test_a_shipped_run_can_be_run_again(monkeypatch):
    """The quickest run of the atlas; another kind of CPU may differ in late digits, and training enlarges them."""
    runs = atlas.load()
    row = runs[(runs.task == "facts(64)") & (runs.method == "LoRA") & (runs["size"] == 1) & (runs.lr == 1e-3)].iloc[:1]
    monkeypatch.setattr(atlas, "load", lambda: row)
    said = []
    assert atlas.rerun(1, 0, said.append) == 0 and said[-1].startswith("1 of 1 runs came back; 0 more")
    monkeypatch.setattr(atlas, "load", lambda: row.assign(loss=row.loss + 0.2))
    monkeypatch.setattr(atlas, "run", lambda point: row.iloc[0].to_dict())
    assert atlas.rerun(1, 0, said.append) == 1 and "OTHER" in said[-2]
