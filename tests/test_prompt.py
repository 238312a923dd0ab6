"""Prompts and prefixes: nobody who calls the model needs to know that something stands before the tokens."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn
from transformers import DynamicCache, StaticCache

from minipeft.attach import attach
from minipeft.learn.fit import evaluate, fit
from minipeft.methods.adapter import Adapter
from minipeft.methods.experts import Experts
from minipeft.methods.lora import LoRA
from minipeft.methods.prefix import PrefixTuning
from minipeft.methods.prompt import PromptTuning, PTuning, nearest, verbalize
from minipeft.methods.select import Softmax
from minipeft.serve.checkpoint import load_adapter
from minipeft.world import mood, pirate

METHODS = {
    "prompt": PromptTuning(3),
    "p-tuning": PTuning(2, "lstm", hidden=4),
    "prefix": PrefixTuning(3),
    "prompt, prefix, lora": [PromptTuning(2), PrefixTuning(3), LoRA(rank=2)],
}
EVERY = METHODS | {"adapter": Adapter(4), "parallel adapter": Adapter(4, "parallel"), "experts": Experts(3)}
LENGTHS = (7, 4, 2)
BASES = {"llama": lambda: tiny.llama(tied=False), "gpt2": tiny.gpt2}  # a tied tiny Llama repeats its last token
CAUSAL = list(BASES)


def tuned_for(family: str, method: str, scale: float = 1.0):
    tuned = attach(BASES[family](), EVERY[method])
    tiny.randomise(tuned, scale=scale)
    return tuned


def padded(ids: torch.Tensor, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The first LENGTHS[i] tokens of each row, padded with 0, and their mask."""
    out, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, n in enumerate(LENGTHS):
        where = slice(ids.shape[1] - n, None) if left else slice(0, n)
        out[i, where], mask[i, where] = ids[i, :n], 1
    return out, mask


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("left", [True, False])
def test_rows_of_unequal_length_equal_each_row_alone(family, method, left):
    tuned = tuned_for(family, method).double()  # in float32 the rounding of another batch shape is seen
    ids = tiny.batch(tuned)["input_ids"]
    batch, mask = padded(ids, left)
    with torch.no_grad():
        together = tuned(input_ids=batch, attention_mask=mask).logits
        for i, n in enumerate(LENGTHS):
            own = together[i, -n:] if left else together[i, :n]
            torch.testing.assert_close(own, tuned(ids[i : i + 1, :n]).logits[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize("cache", [True, False])
def test_generate_in_a_padded_batch_equals_the_argmax_step_by_step(family, method, cache):
    tuned = tuned_for(family, method)
    ids = tiny.batch(tuned)["input_ids"]
    batch, mask = padded(ids, left=True)
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=cache)
    found = tuned.generate(batch, attention_mask=mask, **options)
    assert found.shape == (3, 13) and torch.equal(found[:, :7], batch)
    for i, n in enumerate(LENGTHS):
        text = ids[i : i + 1, :n]
        for _ in range(6):
            with torch.no_grad():
                odds = tuned(input_ids=text).logits[:, -1]
            odds[:, 2] = -torch.inf  # min_new_tokens forbids the end
            text = torch.cat([text, odds.argmax(-1, keepdim=True)], 1)
        assert torch.equal(found[i, 7:], text[0, n:])
    with tuned.disabled():
        plain = BASES[family]().generate(batch, attention_mask=mask, **options)
        assert torch.equal(tuned.generate(batch, attention_mask=mask, **options), plain)
    assert not torch.equal(found, plain)


@pytest.mark.parametrize("method", METHODS)
def test_beams_and_other_caches(method):
    tuned = tuned_for("llama", method)
    ids = tiny.batch(tuned)["input_ids"]
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=5, min_new_tokens=5)
    beams = [tuned.generate(ids, num_beams=3, use_cache=cache, **options) for cache in (True, False)]
    assert torch.equal(*beams)
    greedy = tuned.generate(ids, do_sample=False, **options)
    own = tuned.generate(ids, do_sample=False, past_key_values=DynamicCache(config=tuned.config), **options)
    assert torch.equal(greedy, own)
    static = StaticCache(config=tuned.config, max_cache_len=32)
    with torch.no_grad():
        torch.testing.assert_close(tuned(ids, past_key_values=static).logits, tuned(ids).logits, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="default, dynamic cache"):
        tuned.generate(ids, cache_implementation="static", **options)


@pytest.mark.parametrize("method", METHODS)
def test_a_cache_goes_with_what_it_was_begun_with(method):
    tuned = tuned_for("llama", method)
    ids = tiny.batch(tuned)["input_ids"]
    with torch.no_grad():
        whole = tuned(ids).logits
        cache = tuned(ids[:, :4], use_cache=True).past_key_values
        torch.testing.assert_close(tuned(ids[:, 4:], past_key_values=cache).logits, whole[:, 4:], atol=1e-5, rtol=0)
        foreign = tiny.llama()(ids[:, :4], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="start with an empty cache"):
            tuned(ids[:, 4:], past_key_values=foreign)


@pytest.mark.parametrize("family", CAUSAL)
def test_a_prompt_of_words_is_the_words_themselves(family):
    """The embeddings of tokens as prompt, and their keys and values as prefix: both read as if the words were there."""
    words, ids = [9, 4, 17], tiny.batch(tiny.MODELS[family]())["input_ids"]
    with torch.no_grad():
        text = torch.cat([torch.tensor([words]).expand(3, -1), ids], 1)
        expected = tiny.MODELS[family]()(text).logits[:, 3:]
        for method in (PromptTuning(3, init=words), PrefixTuning(3, init=words)):
            found = attach(tiny.MODELS[family](), method)(ids).logits
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_the_loss_is_that_of_the_text_alone():
    tuned = tuned_for("llama", "prompt")
    batch = tiny.batch(tuned)
    output = tuned(**batch, output_hidden_states=True)
    expected = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    assert all(h.shape[1] == 7 for h in output.hidden_states)
    assert tuned(**batch, return_dict=False)[1].shape == output.logits.shape


def test_positional_arguments_and_given_embeddings():
    tuned = tuned_for("llama", "prompt, prefix, lora")
    ids = tiny.batch(tuned)["input_ids"]
    with torch.no_grad():
        expected = tuned(input_ids=ids).logits
        assert torch.equal(tuned(ids, torch.ones_like(ids)).logits, expected)
        embeds = tuned.get_input_embeddings()(ids)
        torch.testing.assert_close(tuned(inputs_embeds=embeds).logits, expected, atol=1e-6, rtol=0)
        for keep, where in ((2, [5, 6]), (torch.tensor([1, 3]), [1, 3])):
            torch.testing.assert_close(tuned(ids, logits_to_keep=keep).logits, expected[:, where], atol=1e-6, rtol=0)


def test_several_stand_one_after_the_other():
    tuned = attach(tiny.llama(), PromptTuning(2, init=[5, 6]))
    tuned.add("b", PromptTuning(1, init=[7]))
    ids = tiny.batch(tuned)["input_ids"]
    tuned.use("default", "b")
    with torch.no_grad():
        text = torch.cat([torch.tensor([[5, 6, 7]]).expand(3, -1), ids], 1)
        torch.testing.assert_close(tuned(ids).logits, tiny.llama()(text).logits[:, 3:], atol=1e-5, rtol=0)


def test_a_classifier_that_looks_for_its_padding_still_finds_it():
    model = tiny.small(labels=2)
    tuned = attach(model, PromptTuning(3))
    ids = torch.randint(3, 50, (3, 7), generator=torch.Generator().manual_seed(0))
    batch, mask = padded(ids, left=False)
    with torch.no_grad():
        together = tuned(input_ids=batch, attention_mask=mask).logits
        for i, n in enumerate(LENGTHS):
            torch.testing.assert_close(together[i], tuned(ids[i : i + 1, :n]).logits[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", [PromptTuning(4), PrefixTuning(4), PTuning(4, hidden=16)], ids=str)
def test_fit_and_evaluate_need_not_know(method):
    tuned = attach(tiny.small(), method)
    task = pirate()
    before = evaluate(tuned, task, n=20).loss
    fit(tuned, task, steps=5, lr=0.05, progress=False)
    assert evaluate(tuned, task, n=20).loss < before


# -- p-tuning and prefixes as networks --------------------------------------------------------------------------------
def test_what_was_generated_loads_as_a_plain_prompt_that_trains_on(tmp_path):
    for method, end in ((PTuning(3, hidden=4), "prompt"), (PrefixTuning(3, hidden=4), "prefix")):
        tuned = attach(tiny.llama(), method)
        tuned.save(tmp_path / end)
        loaded = load_adapter(tiny.llama(), tmp_path / end)
        [layer] = loaded.adapters["default"].values()
        assert list(layer._parameters) == ["value"] and layer.value.requires_grad
        loaded.save(tmp_path / f"{end} again")
        ids = tiny.batch(tuned)["input_ids"]
        with torch.no_grad():
            again = load_adapter(tiny.llama(), tmp_path / f"{end} again")
            assert torch.equal(loaded(ids).logits, tuned(ids).logits) and torch.equal(
                again(ids).logits, tuned(ids).logits
            )


# -- mistakes ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: PromptTuning(0), "length=0"),
        (lambda: PromptTuning(3, "words"), "'vocabulary' or 'random'"),
        (lambda: PromptTuning(3, []), "no token ids"),
        (lambda: PTuning(3, "gru"), "generator='gru'"),
        (lambda: PTuning(3, hidden=0), "hidden=0"),
        (lambda: PrefixTuning(3, hidden=4, init=[1]), "hidden="),
        (lambda: attach(tiny.llama(), PromptTuning(3, init=[99])), "outside the 61 tokens"),
        (lambda: attach(nn.Linear(2, 2), PromptTuning(3)), "Linear names none"),
        (lambda: attach(nn.Linear(2, 2), PrefixTuning(3)), "Linear names none"),
        (lambda: attach(tiny.llama(), [PromptTuning(3), PTuning(3)]), "'prompt'"),
        (lambda: attach(tiny.llama(), PromptTuning(60))(torch.ones(1, 7, dtype=torch.long)), "the 64 positions"),
    ],
)
def test_a_mistake_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# -- hard prompts and neighbours --------------------------------------------------------------------------------------
def test_hard_prompts_score_the_words_of_each_class():
    model = tiny.small()
    words = {"sad": ["sad", "lonely"], "glad": ["happy"]}
    texts = ["tom went to the river .", "anna ran ."]
    found = verbalize(model, model.tokenizer, texts, "{text} tom felt", words)
    assert found.shape == (2, 2) and torch.allclose(found.sum(1), torch.ones(2))
    for i, text in enumerate(texts):
        ids = model.tokenizer(f"{text} tom felt", return_tensors="pt").input_ids
        with torch.no_grad():
            p = model(ids).logits[0, -1].softmax(-1)
        odds = [sum(p[model.tokenizer.convert_tokens_to_ids(w)] for w in several) for several in words.values()]
        torch.testing.assert_close(found[i, 0] / found[i, 1], odds[0] / odds[1], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="no place for the text"):
        verbalize(model, model.tokenizer, texts, "tom felt", words)
    with pytest.raises(ValueError, match="'zzz'"):
        verbalize(model, model.tokenizer, texts, "{text}", {"a": ["zzz"]})


def test_nearest_words_of_a_prompt_of_words_are_the_words():
    model = tiny.small()
    ids = model.tokenizer("anna went home", add_special_tokens=False).input_ids
    prompt = attach(model, PromptTuning(3, init=ids)).adapters["default"]["prompt"].value
    found = nearest(model, model.tokenizer, prompt.detach())
    assert [row[0][0] for row in found] == ["anna", "went", "home"] and all(row[0][1] > 0.999 for row in found)


def test_a_hard_prompt_reads_the_mood_as_well_as_can_be_and_a_bad_one_does_not():
    from minipeft.world import load
    from minipeft.world.tasks import mood_words

    model, tokenizer = load("pocket")
    task = mood()
    rows = task.data["test"].select(range(200))
    right = {}
    for template in ("{text} tom felt", "{text}"):
        found = verbalize(model, tokenizer, rows["text"], template, mood_words())
        right[template] = (found.argmax(1) == torch.tensor(rows["label"])).float().mean().item()
    assert right["{text}"] < 0.6 < task.ceiling - 0.05 < right["{text} tom felt"], right


def test_softmax_and_prompt_together_save_as_peft_does(tmp_path):
    tuned = attach(tiny.bert("SequenceClassification"), [PromptTuning(2), Softmax()])
    tuned.save(tmp_path)
    assert load_adapter(tiny.bert("SequenceClassification"), tmp_path).count() == tuned.count()
