"""The exact rewards say what the grammar itself chose, and survive any text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minipeft.world import corpus, rewards

STORIES = corpus.stories().texts(600, seed=5)


@pytest.mark.parametrize(
    ("reward", "chosen"),
    [
        (rewards.happy, lambda t: t.memory["m"] == "glad"),
        (rewards.safe, lambda t: t.memory["p"] != "bad"),
        (rewards.answer, lambda t: "question :" in t.text),  # the grammar's own answers are all right
        (rewards.short, lambda t: 1 - len(t.text.split()) / 100),
    ],
)
def test_on_every_story_the_reward_is_what_the_grammar_chose(reward, chosen):
    assert [reward(t.text) for t in STORIES] == [pytest.approx(float(chosen(t))) for t in STORIES]


def test_animals_counts_each_kind_once():
    assert rewards.animals("tom and his dog saw a dog . a fox ran .") == 2


def test_a_wrong_answer_costs_and_none_is_free():
    asked = next(t for t in STORIES if "where was" in t.text)
    head, _, _ = asked.text.rpartition(" the ")
    assert rewards.answer(f"{head} the moon .") == -1.0
    assert rewards.answer(asked.text.partition(" question :")[0]) == 0.0


def test_the_last_feeling_decides():
    story = next(t.text for t in STORIES if t.memory["m"] == "glad" and "question" not in t.text)
    assert rewards.happy(f"{story} tom felt sad .") == 0.0
    assert rewards.happy("in the end tom was sad . tom felt very proud .") == 1.0


def test_true_pays_only_what_parses():
    story = next(t.text for t in STORIES if t.memory["m"] == "glad")
    true = rewards.true(rewards.happy)
    assert true(story) == 1.0
    assert true("the sky felt happy .") == 0.0 < rewards.happy("the sky felt happy .")
    assert rewards.true(rewards.answer)("question : who spoke ? answer : a moon .") == -1.0
    assert rewards.each(true)([story, ""]) == [1.0, 0.0]


@given(st.lists(st.sampled_from([*corpus.stories().vocabulary(), "question", ":", "answer", "<pad>", "(", "\\", ""])))
@settings(max_examples=200, deadline=None)
def test_any_words_have_a_finite_reward(words):
    text = " ".join(words)
    values = {name: reward(text) for name, reward in rewards.REWARDS.items()}
    assert all(isinstance(v, float) and -1 <= v <= 1 for name, v in values.items() if name != "animals")
    assert 0 <= values["animals"] <= len(words)
