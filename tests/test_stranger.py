"""A few cases of the stranger's, and what it found."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from architectures import ARCHITECTURES
from drawn import DEFAULTS, HOSTILE, MODELS, OPTIONS
from stranger import play
from test_matrix import FAMILIES
from torch import nn
from trials import TRIALS, refused

import minipeft as mp
from minipeft.analyze.spectrum import spectra
from minipeft.methods import METHODS


def test_every_setting_of_every_method_is_drawn():
    assert OPTIONS.keys() == METHODS.keys()
    for kind, options in OPTIONS.items():
        assert options.keys() == set(METHODS[kind].__dataclass_fields__) - {"_"}, kind


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_a_few_cases():
    done = [play(4, number) for number in range(20)]
    assert {name for case in done for name, why in case.items() if not why} == {"attach", "call", *TRIALS}


ABSURD = (*HOSTILE, (), ((),), [[]], [1], {1}, "", 1j, lambda: 0, 10**400)


@pytest.mark.parametrize("kind", METHODS)
def test_an_absurd_setting_is_refused_in_one_sentence(kind):
    """At the latest by `attach`, or it is none, and then the method can be shown and compared."""
    model = tiny.llama()
    fitting = {name: DEFAULTS[name] for name in OPTIONS[kind].keys() & DEFAULTS.keys()}

    def attach(**settings: object) -> None:
        method = METHODS[kind](**fitting | settings)
        if settings.keys() & {"targets", "feedforward", "placement", "init"}:
            mp.attach(model, method).detach()
        assert name == "by" or hash(method)  # scores of each target are a mapping, which has no hash

    for name in OPTIONS[kind]:
        for value in ABSURD:
            refused(lambda: attach(**{name: value}))  # noqa: B023


@pytest.mark.parametrize("method", [mp.LoRA(2), mp.DoRA(2), mp.OFT(4), mp.Full(), mp.IA3(["type", "forward"], [])])
def test_a_module_may_bear_the_name_of_a_method(method, tmp_path):
    """`get_submodule` asks for the attribute, and finds the method."""
    one = MODELS["net, hostile names"]
    model, batch = one.model(), one.batch()
    before = tiny.snapshot(model)
    tuned = mp.attach(model, method)
    tiny.randomise(tuned)
    found = tuned(**batch)["logits"]
    assert {layer.path for layer in tuned.layers()} >= {"type", "forward"} or method == mp.Full()
    assert spectra(tuned).keys()
    tuned.merge()
    assert (tuned(**batch)["logits"] - found).abs().max() < 1e-5
    tuned.unmerge()
    tuned.save(tmp_path)
    assert tiny.same(tiny.snapshot(tuned.detach()), before)
    assert torch.equal(mp.load_adapter(model, tmp_path)(**batch)["logits"], found)


def test_measuring_a_prefix_moves_no_generator():
    """NLLB-MoE draws whether to skip a layer in each call, and then does not skip it."""
    model, before = ARCHITECTURES["NLLB-MoE"].model(), torch.random.get_rng_state()
    mp.attach(model, mp.PrefixTuning(2))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_prompt_stands_behind_what_a_model_puts_before_its_text():
    """CPM-Ant has a prompt of its own, of which ours overwrote the beginning."""
    one = FAMILIES["CPM-Ant"]
    ids, words = one.batch()["input_ids"], torch.tensor([7, 9, 8])
    with torch.no_grad():
        longer = one.model()(input_ids=torch.cat([words.expand(len(ids), -1), ids], 1)).logits[:, 3:]
        found = mp.attach(one.model(), mp.PromptTuning(3, words.tolist()))(input_ids=ids).logits
    torch.testing.assert_close(found, longer, rtol=0, atol=1e-5)


def test_rows_choose_no_adapter_where_a_module_gives_no_rows():
    """Llama-4's experts read (rows, tokens, width) and give (rows · tokens, width)."""
    tuned = mp.attach(FAMILIES["Llama-4"].model(), mp.Adapter(4))
    batch = FAMILIES["Llama-4"].batch()
    with pytest.raises(ValueError, match="a Llama4TextMoe gave a batch of 14; per-row choice works where dimension 0"):
        tuned(**batch, adapters=["default", None])
    tuned(**batch)


def test_padding_on_the_left_stays_out_of_a_prefix_that_the_numbering_knows_not_of():
    """EuroBERT hands its layers the prefix on and numbers its tokens from 0, with padding and all."""
    tuned = mp.attach(ARCHITECTURES["EuroBERT"].model(), mp.PrefixTuning(3)).eval()
    tiny.randomise(tuned)
    ids = ARCHITECTURES["EuroBERT"].batch()["input_ids"]
    padded, mask = (nn.functional.pad(each, (2, 0)) for each in (ids, torch.ones_like(ids)))
    with torch.no_grad():
        found = tuned(input_ids=ids).logits
        assert (tuned(input_ids=padded, attention_mask=mask).logits[:, 2:] - found).abs().max() < 1e-5


def test_a_file_holds_both_sides_of_a_tie_to_a_table_of_the_models_own(tmp_path):
    """I-BERT's embedding is none of PyTorch's; PEFT's `modules_to_save` would change the decoder alone."""
    tuned = mp.attach(FAMILIES["I-BERT"].model(), [mp.VeRA(2, targets=["lm_head.dense"]), mp.Softmax()]).eval()
    tiny.randomise(tuned)
    tuned.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "MINIPEFT_VERA" and len(config["entries"]) > 2
