"""The opinion monitor: streams have the shares that they are drawn with, a threshold keeps to what is allowed, the rate's
interval is Poisson's, and the page says what the streams do."""

from __future__ import annotations

import pytest
from scipy.stats import poisson

from minipeft.course import monitor
from minipeft.explore.monitor import OpinionMonitor
from minipeft.learn.protocol import SEEDS

LABELS = [0, 1, 1, 0, 1, 1]
PEOPLE = [float(label) for label in LABELS]  # a reader who is always right


def test_a_stream_has_the_shares_that_it_is_drawn_with():
    share = [0.9] * 300 + [0.2] * 300
    stream = monitor.drawn(LABELS, share, seed=3)
    assert len(stream) == 600 and all(len(batch) == monitor.SIZE for batch in stream)
    x = monitor.values(PEOPLE, stream)
    assert sum(x[:300]) / 300 == pytest.approx(0.1, abs=0.03) and sum(x[300:]) / 300 == pytest.approx(0.8, abs=0.03)
    assert monitor.drawn(LABELS, share, seed=3) == stream != monitor.drawn(LABELS, share, seed=4)
    assert {i for batch in stream for i in batch} == set(range(6)), "every sentence may come"
    with pytest.raises(ValueError, match="one class has none"):
        monitor.drawn([1, 1], share, seed=3)


def test_alarms_delays_and_the_threshold_by_hand():
    quiet, turned = [0.3] * 60, [0.3] * monitor.TURN + [0.9] * 30
    assert monitor.alarms(quiet, 0.2) == [] and monitor.alarms(turned, 0.5)[0] == monitor.TURN
    assert monitor.delays([turned, quiet], 0.5) == [0, None]
    early = [0.3] * 10 + [0.9] + [0.3] * 49
    assert monitor.false_alarms([early, quiet], 0.3) == 1 and monitor.false_alarms([early], 2.0) == 0
    assert monitor.chosen([quiet]) == monitor.THRESHOLDS[0], "where nothing happens the least will do"
    least = monitor.chosen([early])
    assert monitor.false_alarms([early], least) == 0
    assert all(monitor.false_alarms([early], t) > 0 for t in monitor.THRESHOLDS if t < least)


@pytest.mark.parametrize("count", [0, 1, 7])
def test_the_interval_of_a_rate_is_poissons(count):
    rate, low, high = (value * 5 for value in monitor.rate(count, 5000))
    assert rate == count and poisson.cdf(count, high) == pytest.approx(0.025)
    assert low == 0 if count == 0 else poisson.sf(count - 1, low) == pytest.approx(0.025)


def test_the_page_draws_what_has_come_and_escapes_it():
    texts = [f"<b>{i}</b>" for i in range(6)]
    page = OpinionMonitor(PEOPLE, LABELS, texts)
    page.redraw()
    assert "&lt;b&gt;" in page.text.value and "<b>" not in page.text.value and page.image.value
    page.controls["now"].value = 12
    (axes,) = page.figure.axes
    line = axes.lines[0]
    x = monitor.values(PEOPLE, monitor.drawn(LABELS, monitor.turning(), 1))
    assert list(line.get_ydata()) == x[:12], "what is to come is not shown"
    page.controls["now"].value = monitor.LENGTH
    page.controls["threshold"].value = 0.2
    raised = monitor.alarms(x, 0.2)
    (axes,) = page.figure.axes
    assert axes.get_title() == f"Alarms at batch {', '.join(map(str, raised))}" and raised
    count = monitor.false_alarms([monitor.values(PEOPLE, s) for s in monitor.streams(LABELS, monitor.calm())], 0.2)
    assert f"raises {count / 6:.1f} false alarms" in page.text.value
    with pytest.raises(ValueError, match="give one for each"):
        OpinionMonitor(PEOPLE, LABELS, texts[:-1])


def test_what_is_shipped_is_whole():
    runs = monitor.measured()["runs"]
    assert [run["seed"] for run in runs] == list(SEEDS)
    for run in runs:
        assert (len(run["validation"]), len(run["test"]), len(run["other"])) == (404, 808, 400)
        assert all(0 <= p <= 1 for p in run["test"]) and 0.8 < run["accuracy"] < 1
