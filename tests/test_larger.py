"""The larger base: its runs follow the protocol, are of the base that is shipped, and a search grows until it ends."""

from __future__ import annotations

import json

import pytest

import minipeft as mp
from minipeft.course import atlas, larger
from minipeft.learn.protocol import SEARCH_SEED, SEEDS, half_decade
from minipeft.learn.sweep import Point, method_of, run


@pytest.fixture(scope="module")
def runs():
    return atlas.load(larger.PATH)


def test_every_best_rate_lies_inside_its_search_and_has_all_seeds(runs):
    assert runs.attrs["provenance"]["model"] == "desk"
    for task in larger.TASKS:
        for name, settings in larger.SETTINGS:
            method = method_of(name, json.dumps(settings))
            found = atlas.searches(runs, task, method)[0][SEARCH_SEED]
            best = min(found, key=found.__getitem__)
            assert {half_decade(best, up) for up in (False, True)} <= set(found), (task, method)
            assert best == atlas.chosen(runs, task, method)[0]
            assert len(atlas.losses(runs, task, method)) == len(SEEDS)


@pytest.mark.slow
def test_a_run_comes_back_on_this_machine_with_the_base_that_is_shipped(runs):
    """Measured on a GPU, run again on a CPU: the figures are the shipped base's, and the two devices agree."""
    stored = atlas.of(runs, "flip", mp.LoRA(rank=1, gamma=2.0)).iloc[0].to_dict()
    again = run(Point(**{name: stored[name] for name in Point.__dataclass_fields__}), model="desk")
    assert atlas.came_back(stored, again, stored["lr"], stored["loss"]) == "same"


@pytest.mark.slow
def test_a_search_grows_until_its_best_lies_inside_and_one_that_is_cut_off_goes_on(tmp_path, monkeypatch):
    least = {0.03: 1.0, 0.1: 0.5, 0.3: 0.7}  # beyond the rates that it begins with
    tried = []

    def fake(point, device, model):
        tried.append(point)
        return vars(point) | {"stopped": "finished", "valid_loss": least.get(point.lr, 2.0), "loss": 0.0, "seconds": 0}

    monkeypatch.setattr("minipeft.learn.sweep.run", fake)
    some = {"tasks": ("flip",), "settings": larger.SETTINGS[1:2]}
    with pytest.raises(larger.OutOfTime, match="no time for the last of 4 runs"):
        larger.measure(tmp_path / "runs", tmp_path / "out.parquet", seconds=-1, **some)
    assert not tried and not (tmp_path / "out.parquet").exists()
    count = larger.measure(tmp_path / "runs", tmp_path / "out.parquet", **some)
    chose = [point.lr for point in tried if point.seed == SEARCH_SEED]
    assert chose == [0.001, 0.003, 0.01, 0.03, 0.1, 0.3]
    assert [(p.lr, p.seed) for p in tried if p.seed != SEARCH_SEED] == [(0.1, seed) for seed in SEEDS]
    assert count == len(tried) == len(atlas.load(tmp_path / "out.parquet"))
    larger.measure(tmp_path / "runs", tmp_path / "out.parquet", **some)
    assert count == len(tried), "what is done is not run again"
