"""What `fit` and `evaluate` take, how rows become batches, and what is refused before anything has changed."""

from __future__ import annotations

import dataclasses

import pandas
import pytest
import torch
from architectures import ARCHITECTURES
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import minipeft as mp
from minipeft.learn.rows import as_task, encode, padding, read

WORDS = [f"w{i}" for i in range(50)]


def tokenizer(appends_end: bool = False, **special: str | None) -> PreTrainedTokenizerFast:
    """A word a token: 0 padding, 1 begin, 2 end, 3 unknown."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if appends_end:
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
        )
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{k: v for k, v in names.items() if v})


PAIRS = Dataset.from_list([{"prompt": f"w{i} w1", "completion": f"w{i + 1} w{i + 2}"} for i in range(8)])
LABELLED = Dataset.from_list([{"text": "w1 w2 " * (1 + 3 * i), "label": i % 3} for i in range(4)])


# ---------------------------------------------------------------------------------------------------------------------
# What people have
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "data, kind",
    [
        (["w1 w2", "w3"], "text"),
        (Dataset.from_dict({"text": ["w1"], "source": ["a"]}), "text"),
        (PAIRS, "answer"),
        ([{"prompt": "w1", "completion": "w2"}] * 2, "answer"),
        (LABELLED, "class"),
        (DatasetDict(train=LABELLED, test=LABELLED), "class"),
    ],
)
def test_what_people_have_becomes_a_task(data, kind):
    task = as_task(data)
    assert task.kind == kind and {"train", "test"} <= task.data.keys() and as_task(task) is task


@pytest.mark.parametrize(
    "data, error, message",
    [
        ([], TypeError, "an empty list; give a Task, a list of texts, or a datasets.Dataset"),
        ([1, 2], TypeError, "Row 0 is '1', not a text"),
        (["w1", None], TypeError, "Row 1 is 'None', not a text"),
        ([{"text": "w1"}, {"txt": "w1"}], TypeError, r"Row 1 is .*, not a row with \['text'\] as row 0"),
        ({"text": ["w1"]}, TypeError, "a dict; give"),
        (pandas.DataFrame({"text": ["w1"]}), TypeError, "a DataFrame; give"),
        ("w1 w2", TypeError, "a str; give"),
        (
            Dataset.from_dict({"sentence": ["w1"]}),
            ValueError,
            r"columns \['sentence'\]; it needs text, text and label, or",
        ),
    ],
)
def test_what_is_no_data_is_refused(data, error, message):
    with pytest.raises(error, match=message):
        as_task(data)


def test_texts_train_as_a_task_of_them_does():
    model, _ = mp.load("pocket")
    texts = mp.world.pirate().data["train"]["text"][:40]
    losses = []
    for data in (list(texts), mp.world.Task("t", "text", DatasetDict(train=Dataset.from_dict({"text": list(texts)})))):
        tuned = mp.attach(model, mp.LoRA(2))
        losses.append(mp.fit(tuned, data, steps=3, batch=4, progress=False).losses)
        tuned.detach()
    assert losses[0] == losses[1]


# ---------------------------------------------------------------------------------------------------------------------
# Rows into batches
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("appends_end", [False, True])
def test_the_end_stands_once_and_last(appends_end):
    words = tokenizer(appends_end)
    texts = encode("text", Dataset.from_dict({"text": ["w1 w2", "w3"]}), words, None)
    for pair in (False, True):
        for ids, labels in [*texts, *encode("answer", PAIRS, words, None, pair=pair)]:
            assert ids.count(2) == labels.count(2) == 1 and ids[-1] == labels[-1] == 2


@pytest.mark.parametrize("own", [0, 5, 11, 2])
@pytest.mark.parametrize("name", ["Llama, classifier", "GPT-2, classifier", "BERT, classifier", "RoBERTa, classifier"])
def test_a_class_has_one_loss_however_it_is_batched(name, own):
    """A decoder's classifier reads the last token that is not the *model's* padding."""
    model = ARCHITECTURES[name].model()
    model.config.pad_token_id = own
    together = mp.evaluate(model, LABELLED, tokenizer=tokenizer()).loss
    alone = [mp.evaluate(model, LABELLED.select([i]), tokenizer=tokenizer()).loss for i in range(len(LABELLED))]
    assert abs(together - sum(alone) / len(alone)) < 1e-5 and max(alone) - min(alone) > 1e-3


@pytest.mark.parametrize("name", ["T5", "UMT5", "BART", "Pegasus", "Marian", "LED", "M2M-100"])
def test_a_pair_reads_the_prompt_and_writes_the_completion(name):
    model, words, seen = ARCHITECTURES[name].model(), tokenizer(), []
    tuned = mp.attach(model, mp.LoRA(2, targets="attention"))
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    history = mp.fit(tuned, PAIRS, steps=30, lr=3e-2, batch=8, tokenizer=words, progress=False)
    handle.remove()
    for ids, labels in zip(seen[0]["input_ids"].tolist(), seen[0]["labels"].tolist(), strict=True):
        prompt, answer = words.decode(ids).split(), words.decode(labels).split()
        assert prompt[1:] == ["w1", "<eos>"] and answer[-1] == "<eos>" and len(answer) == 3
        assert int(answer[0][1:]) == int(prompt[0][1:]) + 1, "the answer belongs to the prompt"
    assert history.losses[-1] < history.losses[0] - 0.2
    score = mp.evaluate(tuned, PAIRS, tokenizer=words)
    with torch.no_grad():
        loss = tuned(**{k: v for k, v in seen[0].items()}).loss.item()  # all 8 rows, as transformers takes the mean
    assert abs(score.loss - loss) < 1e-4
    with pytest.raises(ValueError, match="reads one text and writes another: give prompt and completion"):
        mp.fit(tuned, ["w1 w2"], tokenizer=words)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "columns, message",
    [
        ({"text": ["w1", None]}, "text of row 1 is None and no text"),
        ({"text": ["w1", "  "]}, "text of row 1 is empty"),
        ({"text": [3, 4]}, "text of row 0 is 3 and no text"),
        ({"prompt": ["w1", "w2"], "completion": ["w1", ""]}, "completion of row 1 is empty"),
        ({"text": ["w1", "w2"], "label": [0, -1]}, "Row 1 has the label -1, which is no class"),
        ({"text": ["w1", "w2"], "label": [0.5, 1.0]}, "Row 0 has the label 0.5, which is no class"),
        ({"text": ["w1", "w2"], "label": ["bad", "good"]}, "Row 0 has the label 'bad', which is no class"),
        ({"text": ["w1", "w2"], "label": [True, False]}, "Row 0 has the label True, which is no class"),
        ({"text": ["w1", "w2"], "label": [0, 7]}, "has 8 classes but the model only 3"),
    ],
)
def test_rows_that_cannot_be_read_are_named_before_anything_changes(columns, message):
    kind = "Llama, classifier" if "label" in columns else "Llama"
    tuned = mp.attach(ARCHITECTURES[kind].model(), mp.LoRA(2))
    before = {key: value.clone() for key, value in tuned.state_dict().items()}
    for work in (mp.fit, mp.evaluate):
        with pytest.raises(ValueError, match=message):
            work(tuned, Dataset.from_dict(columns), tokenizer=tokenizer())
    assert all(torch.equal(value, before[key]) for key, value in tuned.state_dict().items())


@pytest.mark.parametrize("name", ["RoBERTa, classifier", "BERT, classifier", "GPT-2, classifier"])
def test_a_row_may_be_as_long_as_the_model_has_positions_and_no_longer(name):
    model = ARCHITECTURES[name].model()
    limit = model.config.max_position_embeddings - (model.config.pad_token_id + 1 if "RoBERTa" in name else 0)
    row = {"text": ["w1 " * limit], "label": [0]}
    assert mp.evaluate(model, Dataset.from_dict(row), tokenizer=tokenizer()).n == 1
    with pytest.raises(ValueError, match=f"Row 0 has {limit + 1} tokens but the model reads at most {limit}: shorten"):
        mp.evaluate(model, Dataset.from_dict(row | {"text": ["w1 " * (limit + 1)]}), tokenizer=tokenizer())


@pytest.mark.parametrize("method", [mp.PromptTuning(8), mp.PrefixTuning(8)], ids=["prompt", "prefix"])
def test_what_stands_in_front_takes_room(method):
    model, words = mp.load("pocket")
    tuned = mp.attach(model, method)
    texts = ["the fox " * 3] * 40 + ["the " * 119]
    with pytest.raises(ValueError, match="Row 40 has 121 tokens but the model reads at most 120 behind the 8 vectors"):
        mp.fit(tuned, texts, steps=1, progress=False)
    assert len(read(tuned, as_task([*texts[:-1], "the " * 118]), Dataset.from_dict({"text": texts[:-1]}), words)) == 40


def test_tokenizers_without_an_end_or_padding_are_named():
    model = ARCHITECTURES["Llama"].model()
    with pytest.raises(ValueError, match="no token for the end of a text; set tokenizer.eos_token"):
        mp.evaluate(model, ["w1"], tokenizer=tokenizer(eos_token=None))
    model.config.pad_token_id = None
    assert padding(model, tokenizer(pad_token=None)) == 2
    classifier = ARCHITECTURES["BERT, classifier"].model()
    classifier.config.pad_token_id = None
    with pytest.raises(ValueError, match="has a token for padding; set tokenizer.pad_token"):
        mp.evaluate(classifier, LABELLED, tokenizer=tokenizer(eos_token=None, pad_token=None))


def test_unknown_words_are_counted():
    tuned = mp.attach(ARCHITECTURES["Llama"].model(), mp.LoRA(2))
    with pytest.warns(UserWarning, match=r"33 % of the tokens are words that the tokenizer lacks \(row 1 has 2\)"):
        mp.fit(tuned, ["w1 w2", "no nay"], steps=1, batch=1, tokenizer=tokenizer(), progress=False)


def test_a_task_without_its_column_is_refused():
    model, _ = mp.load("pocket")
    task = dataclasses.replace(mp.world.flip(), data=DatasetDict(test=Dataset.from_dict({"prompt": ["the"]})))
    with pytest.raises(ValueError, match="of kind 'answer', so its rows need a column 'completion'"):
        mp.evaluate(model, task)
