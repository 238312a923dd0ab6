"""Every task is a DatasetDict whose floor, ceiling and bits are what they are said to be."""

import copy
import math
import pickle

import pytest
from datasets import DatasetDict

from minipeft.world import corpus, tasks
from minipeft.world.base import build_tokenizer

MAKERS = [tasks.plain, tasks.pirate, tasks.forecast, tasks.cipher, tasks.flip, tasks.mood, tasks.answer, tasks.stream]
ALL = [*MAKERS, lambda: tasks.facts(100)]
COLUMNS = {"text": {"text"}, "answer": {"prompt", "completion"}, "class": {"text", "label"}}


@pytest.mark.parametrize("maker", ALL)
def test_a_task_is_a_dataset_with_metric_and_known_best(maker):
    task = maker()
    assert isinstance(task.data, DatasetDict) and set(task.data) == {"train", "test"}
    assert COLUMNS[task.kind] <= set(task.data["train"].column_names)
    assert task.metric in ("loss", "accuracy")
    assert task.floor is not None and task.floor >= 0
    assert (task.ceiling is not None) == (task.metric == "accuracy")
    assert task.name in repr(task)


def test_rows_are_drawn_when_they_are_first_asked_for_and_once():
    drawn = []

    def make():
        drawn.append(len(drawn))
        return DatasetDict()

    task = tasks.Task("mine", "text", make, floor=1.0)
    assert task.floor == 1.0 and not drawn
    copies = copy.copy(task), pickle.loads(pickle.dumps(task))
    assert drawn == [0] and all(each.data is task.data or each.data == {} for each in copies)
    assert task.data is task.data and drawn == [0] and not hasattr(task, "nothing")

    rows = tasks.Splits(lambda n, seed: drawn.append("rows") or [{"text": f"{seed} {i}"} for i in range(n)], 3, 2, 0)
    task = tasks.Task("mine", "text", rows, floor=1.0)
    assert "rows" not in drawn and len(task.data["train"]) == 3 and drawn.count("rows") == 2
    with pytest.raises(ValueError, match="train must be a whole number"):
        tasks.pirate(train=-1)


@pytest.mark.parametrize("maker", MAKERS)
def test_no_test_text_occurs_in_training(maker):
    data = maker().data
    assert not set(data["train"]["text"]) & set(data["test"]["text"])
    assert len(data["train"]) > 1900


@pytest.mark.parametrize("maker", [tasks.pirate, tasks.forecast, tasks.flip])
def test_the_first_training_row_can_be_had_alone(maker):
    task = maker()
    assert task.make.first() == task.data["train"][0]


@pytest.mark.parametrize("maker", ALL)
def test_every_word_has_a_token_and_every_text_fits_the_context(maker):
    tokenizer = build_tokenizer()
    for split in maker().data.values():
        for ids in tokenizer(list(split["text"])).input_ids:
            assert tokenizer.unk_token_id not in ids
            assert len(ids) < 128


@pytest.mark.parametrize("maker", [tasks.plain, tasks.pirate, tasks.forecast, tasks.cipher, tasks.stream])
def test_the_floor_is_the_mean_surprise_a_token(maker):
    task = maker(train=10, test=4000, seed=5)
    rows = task.data["test"]
    tokens = sum(len(text.split()) + 1 for text in rows["text"])
    assert -sum(rows["log_p"]) / tokens == pytest.approx(task.floor, rel=0.015)


def test_the_stream_drifts_from_plain_to_pirate():
    rows = tasks.stream(train=10, test=2000, seed=6).data["test"]
    told = [tasks.pirates().log_prob(text) > -math.inf for text in rows["text"][:60] + rows["text"][-60:]]
    assert sum(told[:60]) < 10 and sum(told[60:]) > 50
    assert tasks.stream_floor(0) == pytest.approx(corpus.stories().floor())
    assert tasks.stream_floor(1) == pytest.approx(tasks.pirates().floor())
    row = rows[1000]
    plain, pirate = (g.log_prob(row["text"]) for g in (corpus.stories(), tasks.pirates()))
    expected = math.log((1 - row["time"]) * math.exp(plain) + row["time"] * math.exp(pirate))
    assert row["log_p"] == pytest.approx(expected)
    with pytest.raises(ValueError, match="from 0 to 1"):
        tasks.stream_floor(1.5)


def test_flip_and_mood_have_the_entropy_and_the_ceiling_of_their_answers():
    for task, tokens in ((tasks.flip(10, 4000, 7), 3), (tasks.mood(10, 4000, 7), 1)):
        surprise = -sum(task.data["test"]["log_p"]) / 4000 / tokens
        assert surprise == pytest.approx(task.floor, rel=0.03)
    rows = tasks.mood(10, 4000, 7).data["test"]
    best = sum(label == (p > 0.5) for label, p in zip(rows["label"], rows["p_glad"], strict=True)) / 4000
    assert best == pytest.approx(tasks.mood().ceiling, abs=0.02)
    assert sum(max(p, 1 - p) for p in rows["p_glad"]) / 4000 == pytest.approx(tasks.mood().ceiling, abs=0.01)


def test_flip_reverses_the_moods_and_nothing_else():
    """The flipped completion is as likely under the stories' grammar as its opposite mood is under the flip."""
    odds = {True: 0, False: 0}
    before = corpus.stories().replace(f"{tasks.BEFORE_THE_MOOD} $who felt m~MOOD.$p.$q FEEL.$m .")
    for row in tasks.flip(10, 400, 8).data["test"]:
        next_word = before.next_words(row["prompt"])
        glad = sum(next_word.get(w, 0) for w in tasks.mood_words()["glad"])
        odds[(glad > 0.5) == (row["completion"].split()[0] in tasks.mood_words()["glad"])] += 1
    assert odds[False] > 3 * odds[True]


def test_facts_hold_the_stated_bits():
    task = tasks.facts(200)
    rows = task.data["train"]
    sizes, colours, things = (set(words) for words in zip(*(c.split()[:3] for c in rows["completion"]), strict=True))
    every = {family: set() for family in ("SIZE", "COLOUR", "THING")}
    for name, alternatives in corpus.stories().rules.items():
        if (family := name.split(".")[0]) in every:
            every[family] |= {symbols[0].name for _, symbols in alternatives}
    assert sizes <= every["SIZE"] and colours <= every["COLOUR"] and things <= every["THING"]
    values = len(every["SIZE"]) * len(every["COLOUR"]) * len(every["THING"])
    assert task.bits == pytest.approx(200 * math.log2(values))
    assert len(set(rows["prompt"])) == 200
    assert -sum(rows["log_p"]) / math.log(2) == pytest.approx(task.bits)
    assert tasks.facts(200, seed=1).data["train"]["completion"] != rows["completion"]
    assert list(task.data["test"]["text"]) == list(rows["text"])


@pytest.mark.parametrize("n", [0, -1, 10**6, 2.5])
def test_facts_say_how_many_there_can_be(n):
    with pytest.raises(ValueError, match="from 1 to"):
        tasks.facts(n)


def test_answers_follow_from_the_story():
    for row in tasks.answer().data["test"].select(range(50)):
        word, stop = row["completion"].split()
        assert stop == "."
        if "what colour" in row["prompt"] or "who else" in row["prompt"]:
            assert word in row["prompt"].split("question")[0].split()
        else:
            assert word in ("good", "bad")


def test_the_cipher_is_a_permutation_that_changes_nearly_every_word():
    key = tasks.permutation()
    assert sorted(key) == sorted(key.values())
    assert sum(a == b for a, b in key.items()) < 10


@pytest.mark.parametrize("rows, name", [({"train": -1}, "train"), ({"test": 0}, "test"), ({"train": 2.5}, "train")])
def test_numbers_of_rows_are_checked(rows, name):
    with pytest.raises(ValueError, match=f"{name} must be a whole number of rows"):
        tasks.pirate(**rows)
