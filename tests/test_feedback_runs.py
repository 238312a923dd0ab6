"""The shipped measurements of the feedback lesson: complete, and still what the script gives."""

from __future__ import annotations

import pytest

from minipeft.course import feedback

FOUND = feedback.measured()


def test_every_setting_has_every_seed_and_every_step():
    hacking = FOUND["hacking"]
    for name in hacking["settings"]:
        runs = [run for run in hacking["runs"] if run["setting"] == name]
        assert tuple(run["seed"] for run in runs) == feedback.SEEDS
        assert all(len(run["trace"]) == feedback.STEPS and run["stopped"] == "finished" for run in runs)
    for part in ("judges", "sums", "clicks"):
        assert {run["seed"] for run in FOUND[part]["runs"]} == set(feedback.SEEDS)
    assert feedback.CHOOSING not in feedback.SEEDS


def test_shares_fit_together():
    """What is wanted is happy and readable, so it is never more than either; the base is no nat from itself."""
    for run in FOUND["hacking"]["runs"]:
        for _, happy, true, parses, kl in run["trace"]:
            assert true <= min(happy, parses) and happy + parses - 1 <= true + 1e-3 and kl >= -1e-3
        assert run["trace"][0][-1] == 0.0
    corners = [run for run in FOUND["sums"]["runs"] if run["α"] == [0.0, 0.0]]
    assert all(run["kl"] == 0.0 for run in corners)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "seed"), [("30 pairs, β = 1", 3), ("30 pairs", 5)])
def test_a_run_begins_as_it_is_stored(monkeypatch, name, seed):
    monkeypatch.setattr(feedback, "STEPS", 4)
    setting = FOUND["hacking"]["settings"][name]
    judge = feedback.judge(feedback.rated(setting["pairs"], seed), seed, setting["lr"], setting["rank"])
    _, _, seen, _ = feedback.policy(judge.score, seed, 1e-2, beta=setting["beta"])
    stored = next(r["trace"] for r in FOUND["hacking"]["runs"] if (r["setting"], r["seed"]) == (name, seed))
    for mine, theirs in zip(seen, stored, strict=False):
        assert mine == pytest.approx(theirs, abs=0.02)  # another kind of CPU rounds otherwise
