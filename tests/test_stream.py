"""A drifting stream: the detector beside river's, and what each way of meeting it remembers."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minipeft as mp
from minipeft.learn.stream import WAYS, Following, PageHinkley, follow, forgetting, regimes
from minipeft.world import corpus, tasks

METHOD = mp.LoRA(rank=2)


def alarms(detector, values) -> list[int]:
    return [i for i, x in enumerate(values) if detector.update(x)]


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-5, 5), max_size=120),
    delta=st.floats(0, 0.5),
    threshold=st.floats(0.2, 9),
    least=st.integers(1, 20),
)
def test_page_hinkley_is_rivers(values, delta, threshold, least):
    """river forgets a little unless alpha is 1, and watches for falls too unless told."""
    drift = pytest.importorskip("river.drift")
    theirs = drift.PageHinkley(min_instances=least, delta=delta, threshold=threshold, alpha=1.0, mode="up")

    def update(x):
        theirs.update(x)
        return theirs.drift_detected

    wanted = [i for i, x in enumerate(values) if update(x)]
    found = alarms(PageHinkley(delta, threshold, least), values)
    margins = [v for v in values if abs(v) < 1e-9]  # where rounding decides, either may be first
    assert found == wanted or len(margins) < len(values) and near_a_tie(values, delta, threshold, least)


def near_a_tie(values, delta, threshold, least) -> bool:
    """Whether an alarm hangs on the last digits."""
    both = [alarms(PageHinkley(delta, threshold + e, least), values) for e in (-1e-9, 1e-9)]
    return both[0] != both[1]


def test_page_hinkley_by_hand():
    """0, 0, 0, 1, 1 with δ = 0.1, λ = 1: means 0, 0, 0, 1/4, 2/5; m = −0.1, −0.2, −0.3, 0.35, 0.85; the last rings."""
    assert alarms(PageHinkley(0.1, 1.0, 2), [0, 0, 0, 1, 1]) == [4]
    assert alarms(PageHinkley(0.1, 1.2, 2), [0, 0, 0, 1, 1]) == []
    assert alarms(PageHinkley(0.1, 1.0, 6), [0, 0, 0, 1, 1]) == []
    assert alarms(PageHinkley(0.0, 0.5, 1), [9.0] * 50 + [0.0] * 50) == []  # a fall is no alarm


def test_page_hinkley_finds_a_rise_soon_and_seldom_errs():
    generator = torch.Generator().manual_seed(0)
    false = late = 0
    for _ in range(200):
        noise = 0.2 * torch.randn(60, generator=generator)
        false += bool(alarms(PageHinkley(0.1, 2.0), noise.tolist()))
        first = alarms(PageHinkley(0.1, 2.0), (noise + torch.arange(60).ge(40)).tolist())
        late += not first or not 40 <= first[0] <= 45
    assert false <= 2 and late <= 4


def test_wrong_settings_say_what_to_do():
    model = tiny.small()
    texts = tasks.plain(60, 8).data["train"]["text"][:4]
    for call, message in (
        (lambda: PageHinkley(-0.1), "delta must be 0 or more"),
        (lambda: PageHinkley(0.1, 0.0), "threshold positive"),
        (lambda: PageHinkley().update(math.nan), "watches numbers"),
        (lambda: follow(model, METHOD, [texts], "forget"), "no way 'forget'"),
        (lambda: follow(model, METHOD, [texts], lr=-1.0), "lr must be"),
        (lambda: follow(model, METHOD, []), "ended before its first batch"),
        (lambda: follow(model, METHOD, iter([texts, []])), "Batch 1 of the stream has no rows"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
        assert not hasattr(model, "_tuned"), message
    assert len(follow(model, METHOD, iter([texts, texts[:1]])).losses) == 2


@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_scored_before_it_learns(way):
    model = tiny.small()
    before = tiny.snapshot(model)
    stream = list(regimes([corpus.stories()], [3], batch=4))
    found = follow(model, METHOD, stream, way, lr=3e-2, steps=2)
    assert isinstance(found, Following) and len(found.losses) == len(found.used) == 3
    first = found.losses[0]
    found.tuned.use()
    assert first == mp.evaluate(found.tuned, stream[0]).loss
    if way == "frozen":
        assert found.losses == [mp.evaluate(model, rows).loss for rows in stream] and set(found.used) == {"base"}
        assert not any(layer.B.any() for layer in found.tuned.adapters["world-0"].values())
    else:
        found.tuned.use("world-0")
        assert mp.evaluate(found.tuned, stream[0]).loss < first - 0.02
    again = follow_again(model, found, stream, way)
    assert again.losses == found.losses
    again.tuned.detach()
    assert tiny.same(tiny.snapshot(model), before)


def follow_again(model, found, stream, way):
    found.tuned.detach()
    return follow(model, METHOD, stream, way, lr=3e-2, steps=2)


def test_one_is_steps_of_adamw():
    """Without replay, following a stream is AdamW on its batches, one after the other."""
    model = tiny.small()
    stream = list(regimes([corpus.stories()], [3], batch=4))
    found = follow(model, METHOD, stream, "one")
    kept = {n: p.detach().clone() for n, p in found.tuned.adapters["world-0"].named_parameters()}
    found.tuned.detach()
    tuned = mp.attach(model, METHOD)
    optimizer = torch.optim.AdamW(tuned.adapters["default"].parameters(), lr=1e-2, weight_decay=0.0)
    for texts in stream:
        inputs = next(mp.batches(tuned, texts, 1, len(texts)))
        optimizer.zero_grad()
        tuned(**inputs).loss.backward()
        optimizer.step()
    for name, p in tuned.adapters["default"].named_parameters():
        assert torch.allclose(p, kept[name], atol=2e-5)


class Alarm(PageHinkley):
    """Rings at the given batches."""

    def update(self, x):
        self.count += 1
        return self.count - 1 in (2, 4)


def test_a_world_that_comes_back_finds_its_adapter():
    """pirate, pirate | forecast, forecast | pirate: two alarms, two adapters; without alarms one adapter."""
    model = mp.load("pocket")[0]
    stream = list(regimes([tasks.pirates(), corpus.forecasts(), tasks.pirates()], [2, 2, 1], batch=6))
    found = follow(model, METHOD, stream, "fresh", lr=3e-2, steps=3, detector=Alarm())
    assert found.alarms == [2, 4]
    assert found.used == ["world-0", "world-0", "world-1", "world-1", "world-0"]
    bare = mp.evaluate(mp.load("pocket")[0], stream[2]).loss
    assert abs(found.losses[2] - bare) < 1e-5 and found.losses[4] < found.losses[0]
    kept = forgetting(found, {"pirate": stream[0], "forecast": stream[3]})
    assert found.tuned.active == ("world-0",)
    assert kept["pirate"] < found.losses[0] and kept["forecast"] < found.losses[2]


def test_replay_remembers():
    """After a new world, the old one is kept better with replay: more rows of it are seen."""
    model = mp.load("pocket")[0]
    stream = list(regimes([tasks.pirates(), corpus.forecasts()], [4, 4], batch=6))
    old = tasks.pirate().data["test"].select(range(16))
    kept = {}
    for way in ("one", "replay"):
        found = follow(model, METHOD, stream, way, lr=1e-2, steps=2)
        kept[way] = forgetting(found, {"pirate": old})["pirate"]
        found.tuned.detach()
    assert kept["replay"] < kept["one"] - 0.1
