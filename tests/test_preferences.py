"""The preference widget without a browser: keys and buttons in, pairs and a file out."""

from __future__ import annotations

import pytest

from minipeft.explore.preferences import Preferences
from minipeft.learn.reward import Pair, read_pairs, self_agreement

DRAFTS = [("on sunday , tom", f"sang <b>{i}</b> .", f"wept {i} .") for i in range(4)]


def widget(**settings):
    return Preferences(DRAFTS, **({"repeats": 2} | settings))


def test_keys_and_buttons_are_the_same(tmp_path):
    by_key, by_mouse = widget(), widget(path=tmp_path / "pairs.jsonl")
    by_key.keys.value = "1201"
    for key in "1201":
        by_mouse.buttons[key].click()
    assert by_key.pairs == by_mouse.pairs == read_pairs(tmp_path / "pairs.jsonl")
    assert [pair.better for pair in by_key.pairs] == ["first", "second", "tie", "first"]
    assert by_key.pairs[1] == Pair(*DRAFTS[1], "second")


def test_undo_takes_back_the_last_answer_and_the_file_follows(tmp_path):
    asked = widget(path=tmp_path / "p")
    asked.keys.value = "12"
    asked.buttons[""].click()
    assert [p.better for p in asked.pairs] == ["first"] and len(read_pairs(tmp_path / "p")) == 1
    asked.buttons[""].click()
    assert asked.pairs == [] and asked.buttons[""].disabled and read_pairs(tmp_path / "p") == []


def test_other_keys_are_dropped_and_nothing_comes_after_the_last():
    asked = widget()
    asked.keys.value = "1x 2"
    assert asked.keys.value == "12" and asked.bar.value == 2
    asked.keys.value = "1" * 99
    assert len(asked.pairs) == len(asked.drafts) == 6 and "last pair" in asked.shown.value
    assert asked.buttons["1"].disabled and not asked.buttons[""].disabled
    asked.press("2")
    assert asked.keys.value == "1" * 6


def test_repeated_pairs_change_sides_and_agreement_is_by_text():
    asked = widget()
    again = asked.drafts[4:]
    assert all((p, b, a) in DRAFTS for p, a, b in again)
    asked.keys.value = "1111" + "22"  # the same texts again
    assert self_agreement(asked.pairs) == 1.0 and "100%" in asked.said.value
    asked.keys.value = "1111" + "12"  # once the same place, which is the other text
    assert self_agreement(asked.pairs) == 0.5
    asked.keys.value = "1111"
    assert self_agreement(asked.pairs) is None and "agree" not in asked.said.value


def test_what_is_shown_is_escaped_and_stays_without_a_kernel(monkeypatch):
    asked = widget()
    shown = []
    monkeypatch.setattr("minipeft.explore.preferences.display", lambda data, raw: shown.append(data))
    asked._ipython_display_()
    assert "On Sunday, Tom" in shown[0]["text/html"] and "&lt;b&gt;" in shown[0]["text/html"]
    assert "6 pairs, 0 answered" in shown[0]["text/plain"]
    assert "application/vnd.jupyter.widget-view+json" in shown[0]


@pytest.mark.parametrize(("drafts", "repeats", "said"), [([], 0, "nothing to compare"), (DRAFTS, 5, "repeats says")])
def test_settings_that_do_not_fit(drafts, repeats, said):
    with pytest.raises(ValueError, match=said):
        Preferences(drafts, repeats)
