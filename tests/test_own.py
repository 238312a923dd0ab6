"""A learner's own text, the baseline without a model, and early stopping."""

from __future__ import annotations

import csv
import math

import pytest
import tiny
import torch

import minipeft as mp
from minipeft.learn.early import EarlyStop
from minipeft.learn.fit import History
from minipeft.learn.trivial import trivial
from minipeft.world.own import cut, own
from minipeft.world.tasks import Task


def written(path, rows, head=("text", "label"), encoding="utf-8"):
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file).writerows([head, *rows])
    return path


def rows(n, labels=("no", "yes")):
    return [(f"sentence number {i}, with a comma", labels[i % len(labels)]) for i in range(n)]


def everything(task):
    return {name: list(part["text"]) for name, part in task.data.items()}


def test_a_csv_becomes_classes_in_three_splits(tmp_path):
    task = own(written(tmp_path / "mine.csv", rows(200)), label="label")
    assert (task.name, task.kind, task.metric, task.classes) == ("mine", "class", "accuracy", ("no", "yes"))
    assert {name: len(part) for name, part in task.data.items()} == {"train": 160, "validation": 20, "test": 20}
    for part in task.data.values():  # label by label, so that each split has the shares of the whole
        assert sum(part["label"]) * 2 == len(part)
        assert [int(text.split()[2].strip(",")) % 2 for text in part["text"]] == list(part["label"])


def test_numbers_as_labels_keep_their_order(tmp_path):
    task = own(written(tmp_path / "stars.csv", rows(60, ("10", "9", "2"))), label="label")
    assert task.classes == ("2", "9", "10")


def test_no_text_is_on_both_sides_and_order_and_copies_do_not_matter(tmp_path):
    some = rows(80)
    one = everything(own(written(tmp_path / "a.csv", some), label="label"))
    copies = [(text.upper(), label) for text, label in some]
    other = everything(own(written(tmp_path / "b.csv", [*copies, *some[::-1]]), label="label"))
    for name, texts in one.items():
        assert {text.lower() for text in other[name]} == set(texts)
    assert len(set.union(*map(set, one.values()))) == sum(map(len, one.values())) == 80


def test_a_group_is_not_torn_apart(tmp_path):
    grouped = [(text, label, f"author {i // 4}") for i, (text, label) in enumerate(rows(160))]
    task = own(written(tmp_path / "a.csv", grouped, ("text", "label", "who")), label="label", group="who")
    who = {text: author for text, _, author in grouped}
    found = {name: {who[text] for text in part["text"]} for name, part in task.data.items()}
    assert {name: len(authors) for name, authors in found.items()} == {"train": 32, "validation": 4, "test": 4}
    assert len(set.union(*found.values())) == 40


def test_a_folder_of_texts_is_cut_at_empty_lines_and_neighbours_stay_together(tmp_path):
    for name in ("zebra", "apple"):
        text = "\n\n".join(f"{name} {i}\n goes on" for i in range(50))
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8-sig")
    task = own(tmp_path)
    parts = everything(task)
    assert task.kind == "text" and sorted(sum(parts.values(), [])) == sorted(
        f"{name} {i} goes on" for name in ("zebra", "apple") for i in range(50)
    )
    for texts in parts.values():  # whole tenths of a file: five neighbours each
        assert len({(text.split()[0], int(text.split()[1]) // 5) for text in texts}) * 5 == len(texts)


def test_what_systems_leave_in_a_folder_is_no_text(tmp_path):
    lines = [f"line {i}" for i in range(40)]
    (tmp_path / "x.TXT").write_bytes("\r\n\r\n".join(lines).encode())
    (tmp_path / "old.txt").mkdir()
    for name in ("._x.txt", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7 Mac OS X \xff\xfe")
    assert sorted(text for part in own(tmp_path).data.values() for text in part["text"]) == sorted(lines)


def test_whole_files_stay_together_where_there_are_many(tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text("\n\n".join(f"file {i}, part {j}" for j in range(3)))
    parts = everything(own(tmp_path))
    files = {name: {text.split(",")[0] for text in texts} for name, texts in parts.items()}
    assert {name: len(found) for name, found in files.items()} == {"train": 16, "validation": 2, "test": 2}
    assert len(set.union(*files.values())) == 20


def test_long_paragraphs_are_cut():
    assert cut("a b c d e\n\n\n f", 2) == ["a b", "c d", "e", "f"]
    assert cut("", 2) == cut(" \n\n ", 2) == []


@pytest.mark.parametrize("separator", [";", "\t"])
def test_a_spreadsheet_writes_other_separators(separator, tmp_path):
    file = written(tmp_path / "a.csv", [(f"text {i}", "yes" if i % 2 else "no") for i in range(40)])
    want = own(file, label="label").data["train"]["text"]
    file.write_text(file.read_text().replace(",", separator))
    assert own(file, label="label").data["train"]["text"] == want


MISTAKES = {
    "path": (lambda f: own(f / "nothing"), "There is no "),
    "empty folder": (lambda f: own(f), "holds no .txt file"),
    "empty files": (lambda f: ((f / "a.txt").write_text(" \n"), own(f)), "nothing but empty .txt files"),
    "folder with labels": (lambda f: own(f, label="label"), "is a folder, which has no columns"),
    "few texts": (lambda f: ((f / "a.txt").write_text("one\n\ntwo"), own(f)), "2 different texts or groups"),
    "column": (lambda f: own(written(f / "a.csv", rows(40), ("body", "label"))), "no column 'text'.*'body', 'label'"),
    "label column": (lambda f: own(written(f / "a.csv", rows(40)), label="stars"), "no column 'stars'"),
    "no rows": (lambda f: own(written(f / "a.csv", [])), "column names but no rows"),
    "empty file": (lambda f: own(written(f / "a.csv", [], ())), "no column 'text': its first line names none"),
    "one label": (lambda f: own(written(f / "a.csv", rows(40, ("yes",))), label="label"), "All rows .* label 'yes'"),
    "rare": (lambda f: own(written(f / "a.csv", [*rows(40), ("x", "odd")]), label="label"), "'odd' stands in 1 of"),
    "empty text": (lambda f: own(written(f / "a.csv", [*rows(3), (" ", "no")])), "Row 4 of a.csv has an empty text"),
    "cells": (lambda f: own(written(f / "a.csv", [("one",)])), "Row 1 of a.csv has 1 cells, but there are 2"),
    "Latin-1": (
        lambda f: own(written(f / "a.csv", [("café", "no")], encoding="latin-1")),
        r'a.csv is not utf-8: byte \d+ is 0xe9; .*encoding="latin-1"',
    ),
    "UTF-16": (
        lambda f: own(written(f / "a.csv", rows(40), encoding="utf-16")),
        r'a.csv is not utf-8: byte 0 is 0xf[ef]; it begins as "utf-16" does',
    ),
    "UTF-16 without a mark": (
        lambda f: own(written(f / "a.csv", rows(40), encoding="utf-16-le")),
        'a.csv holds zero bytes, so it is no utf-8 text; try encoding="utf-16"',
    ),
    "no text": (lambda f: ((f / "a.txt").write_bytes(b"PK\3\4\0\0"), own(f)), "a.txt holds zero bytes"),
    "encoding": (lambda f: own(written(f / "a.csv", rows(40)), encoding="klingon"), "none that Python knows"),
    "NUL": (lambda f: own(written(f / "a.csv", [("a" * 200_000, "no")])), "no CSV that can be read"),
    "words": (lambda f: own(f, words=0), "words must be"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_input_gets_one_sentence(mistake, tmp_path):
    call, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message) as caught:
        call(tmp_path)
    assert "\n" not in str(caught.value)


def test_latin_1_is_read_when_asked_for(tmp_path):
    file = written(tmp_path / "a.csv", [(f"café {i}", "x") for i in range(20)], encoding="latin-1")
    task = own(file, encoding="latin-1")
    assert all(text.startswith("café") for text in task.data["train"]["text"])


def test_a_text_longer_than_the_model_reads_is_named(tmp_path):
    model, _ = mp.load("pocket")
    task = own(written(tmp_path / "a.csv", [(f"the {i} " * 100, "x") for i in range(20)]))
    with pytest.raises(ValueError, match="Row 0 has 2.. tokens but the model reads at most 128: shorten or drop it"):
        mp.evaluate(model, task)


def test_a_folder_that_is_not_there_is_no_name_of_the_hub():
    with pytest.raises(ValueError, match="There is no folder '/not/there', and a name of the Hugging Face hub looks"):
        mp.load("/not/there")


def test_a_folder_without_a_model_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="transformers cannot load") as caught:
        mp.load(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_trivial_counts_classes(tmp_path):
    """Three quarters of one label: the closed forms are 0.75 and the cross-entropy of the (smoothed) shares."""
    task = own(written(tmp_path / "a.csv", rows(400, ("b", "a", "a", "a"))), label="label")
    score = trivial(task)
    assert (score.accuracy, score.n, set(score.predictions)) == (0.75, 40, {0})
    p = (240 + 1) / (320 + 2)
    assert score.loss == pytest.approx(-0.75 * math.log(p) - 0.25 * math.log(1 - p), rel=1e-6)
    assert mp.report(score, task).loc["b", "f1-score"] == 0


def test_trivial_scores_the_tokens_that_evaluate_scores():
    """A model whose logits are the logarithm of the counts gives the same loss: another way to the same number."""
    model, tokenizer = mp.load("pocket")
    task = mp.world.pirate(train=50, test=20)
    counts = torch.ones(len(tokenizer))
    for text in task.data["train"]["text"]:
        for token in [*tokenizer(text).input_ids[1:], tokenizer.eos_token_id]:
            counts[token] += 1

    class Counting(torch.nn.Module):
        config, tokenizer, get_output_embeddings = model.config, model.tokenizer, model.get_output_embeddings
        get_input_embeddings = model.get_input_embeddings

        def __init__(self):
            super().__init__()
            self.one = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, attention_mask=None, labels=None):
            logits = counts.log().expand(*input_ids.shape, -1)
            return type("Out", (), {"logits": logits})

    assert trivial(task, tokenizer).loss == pytest.approx(mp.evaluate(Counting(), task).loss, rel=1e-5)
    answers = mp.world.answer(train=50, test=20)
    assert trivial(answers, tokenizer).loss < 7 and trivial(answers, tokenizer).accuracy is None


def test_trivial_mistakes():
    with pytest.raises(ValueError, match="needs a tokenizer"):
        trivial(mp.world.pirate(train=50, test=20))
    with pytest.raises(ValueError, match="no split 'validation'"):
        trivial(mp.world.pirate(train=50, test=20), split="validation")


@pytest.fixture
def small():
    """A tiny classifier that carries LoRA, and a task for it."""
    from datasets import Dataset, DatasetDict

    part = Dataset.from_dict({"text": ["a b", "b c", "c d", "d e"] * 8, "label": [0, 1, 0, 1] * 8})
    task = Task("small", "class", DatasetDict(train=part, validation=part, test=part), metric="accuracy")
    model = tiny.bert("SequenceClassification", labels=2)

    class Letters:
        pad_token_id = eos_token_id = 0
        unk_token_id = None

        def __len__(self):
            return tiny.V

        def __call__(self, texts, **_):
            return type("Ids", (), {"input_ids": [[ord(c) - 90 for c in text if c != " "] for text in texts]})

    model.tokenizer = Letters()
    return mp.attach(model, [mp.LoRA(rank=2), mp.Softmax()]), task


def test_early_stopping_stops_and_gives_the_best_back(small, monkeypatch):
    """The losses are planted: 5, 3, 4, 4.5 with patience 2 stops after the third look behind the start."""
    tuned, task = small
    planted = iter([5.0, 3.0, 4.0, 4.5, 1.0])
    monkeypatch.setattr("minipeft.learn.early.evaluate", lambda *_: type("S", (), {"loss": next(planted)}))
    early, seen = EarlyStop(tuned, task, every=2, patience=2), {}

    def watch(step, history):
        seen[step + 1] = [p.detach().clone() for p in tuned.parameters() if p.requires_grad]
        return early(step, history)

    history = mp.fit(tuned, task, steps=50, lr=1e-2, batch=4, callback=watch, progress=False)
    assert early.losses == {0: 5.0, 2: 3.0, 4: 4.0, 6: 4.5} and len(history.losses) == 6
    assert history.stopped == "cancelled"
    assert early.restore() == early.best == 2
    now = [p for p in tuned.parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(now, seen[2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(now, seen[6], strict=True))


def test_looking_does_not_change_the_training(small):
    """With and without looks the same losses; and a loss that is no number is never the best."""
    tuned, task = small
    start = [p.detach().clone() for p in tuned.parameters() if p.requires_grad]
    early = EarlyStop(tuned, task, every=1, patience=9)
    with_looks = mp.fit(tuned, task, steps=6, lr=1e-2, batch=4, callback=early, progress=False).losses
    for p, value in zip((p for p in tuned.parameters() if p.requires_grad), start, strict=True):
        p.data.copy_(value)
    assert mp.fit(tuned, task, steps=6, lr=1e-2, batch=4, progress=False).losses == with_looks
    early.losses[99] = math.inf
    assert early.best != 99


@pytest.mark.parametrize("how", [{"every": 0}, {"patience": 0}, {"every": True}])
def test_early_stopping_mistakes(how, small):
    with pytest.raises(ValueError, match="whole number of at least 1"):
        EarlyStop(*small, **how)


def test_early_stopping_needs_validation_rows():
    model, _ = mp.load("pocket")
    with pytest.raises(ValueError, match="no split 'validation'"):
        EarlyStop(mp.attach(model, mp.LoRA(rank=1)), mp.world.pirate(train=50, test=20))
    assert History().losses == []
