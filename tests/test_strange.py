"""Every method with its defaults on architectures that it was not written for: what attaches keeps every promise, and
what does not is listed here with its reason."""

from __future__ import annotations

import contextlib
import dataclasses
import re

import pytest
import tiny
import torch
import transformers
from architectures import ARCHITECTURES

import minipeft as mp
from minipeft.attach import attach
from minipeft.calls import unheard
from minipeft.layer import WeightLayer
from minipeft.targets import is_matrix

NAMES = (
    *("Bloom", "CodeGen", "MPT", "Phi-3", "Gemma-2", "Mixtral", "Qwen2-MoE", "OLMoE", "Phi-MoE", "gpt-oss", "JetMoe"),
    *("DeepSeek-V3", "Jamba", "Qwen3-Next", "LFM2", "Mamba", "Mamba-2", "RecurrentGemma", "XLNet"),
    "GPT-BigCode, one key-value head",
    *("XLM-R XL", "LUKE", "MobileBERT", "DeBERTa-v2", "ConvBERT", "FNet", "Longformer", "ESM", "CANINE"),
    *("UMT5", "Switch", "NLLB-MoE", "Marian", "ProphetNet"),
    *("Swin", "ConvNeXt", "WavLM, classifier", "Whisper"),
)  # fmt: skip
METHODS = {
    "LoRA": mp.LoRA(rank=2),
    "DoRA": mp.DoRA(rank=2),
    "AdaLoRA": mp.AdaLoRA(rank=2, steps=10),
    "VeRA": mp.VeRA(rank=4),
    "MiSS": mp.MiSS(rank=2),
    "HiRA": mp.HiRA(rank=2),
    "SHiRA": mp.SHiRA(rank=1),
    "OFT": mp.OFT(block=4),
    "IA3": mp.IA3(),
    "Adapter": mp.Adapter(4),
    "parallel Adapter": mp.Adapter(4, "parallel"),
    "Experts": mp.Experts(4),
    "BitFit": mp.BitFit(),
    "Full": mp.Full(),
}

NO_BIASES = ("MPT", "Phi-3", "Gemma-2", "Mixtral", "OLMoE", "JetMoe", "DeepSeek-V3", "Qwen3-Next", "LFM2", "Mamba-2")
NO_BIASES += ("UMT5", "Switch")
NO_KEYS = {  # one layer gives more than keys and values, or none does
    "DeepSeek-V3": "kv_b_proj", "Mamba": "x_proj", "Mamba-2": "in_proj", "XLNet": "layer_1", "FNet": "word_embeddings",
    "ConvNeXt": "pwconv1",
}  # fmt: skip
REFUSED = {("BitFit", name): "has no biases in linear and norm layers" for name in NO_BIASES}
REFUSED |= {("IA3", name): f"no layer matches 'k_proj' .*{there}" for name, there in NO_KEYS.items()}
REFUSED["parallel Adapter", "MobileBERT"] = "as wide as its output, but .* reads 8 numbers and .* gives 16"
REFUSED["IA3", "WavLM, classifier"] = "k_proj' would have no effect, because the model reads its weight"
# What gets no gradient: the outputs of two rows of text need no global attention, entities, pooler.
RESTS = {
    "Longformer": "_global$", "LUKE": "entity|e2|2e|pooler", "ESM": "contact_head", "CANINE": "pooler|final_char",
    "NLLB-MoE": "expert", "MobileBERT": "pooler", "Switch": "expert", "FNet": "pooler",
}  # fmt: skip


def outputs(model, batch) -> list[torch.Tensor]:
    return [value for value in model(**batch).values() if isinstance(value, torch.Tensor) and value.is_floating_point()]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.filterwarnings("ignore")
def test_promises(kind, name):
    model, batch = ARCHITECTURES[name].model().requires_grad_(False), ARCHITECTURES[name].batch()
    with torch.no_grad():  # WavLM's first call leaves hooks of its own
        bare, before, hooks = outputs(model, batch), tiny.snapshot(model), tiny.hooks(model)
    if reason := REFUSED.get((kind, name)):
        with tiny.untouched(model), pytest.raises(ValueError, match=reason):
            attach(model, METHODS[kind])
        return
    tuned = attach(model, METHODS[kind])
    with torch.no_grad():
        for a, b in zip(
            outputs(tuned, batch), bare, strict=True
        ):  # to the bit, unless PyTorch multiplies otherwise by a
            assert (a - b).abs().max() <= (2e-6 if kind == "Full" else 0), "it starts as the base"  # weight that trains
    tiny.randomise(tuned)
    found = outputs(tuned, batch)
    assert max((a - b).abs().max() for a, b in zip(found, bare, strict=True)) > 0, "it has an effect"
    sum(value.square().sum() for value in found).backward()
    silent = [x.path for x in tuned.layers() if not x.slots and all(p.grad is None for p in x.parameters())]
    assert [path for path in silent if not re.search(RESTS.get(name, "^$"), path)] == [], "every layer learns"
    with torch.no_grad(), tuned.disabled():
        assert all(map(torch.equal, outputs(tuned, batch), bare)), "disabled, it is the base"
    if all(isinstance(layer, WeightLayer) or layer.slots for layer in tuned.layers()):
        tuned.merge()
        for a, b in zip(outputs(tuned, batch), found, strict=True):
            assert (a - b).abs().max() < 1e-3 * max(1, b.abs().max()), "merged, it computes the same"
        tuned.unmerge()
    base = tuned.detach()
    assert tiny.same(tiny.snapshot(base), before) and tiny.hooks(base) == hooks
    with torch.no_grad():
        assert all(map(torch.equal, outputs(base.requires_grad_(False), batch), bare)), "detached, it is the base"


# ---------------------------------------------------------------------------------------------------------------------
# Modules that are never called
# ---------------------------------------------------------------------------------------------------------------------
def matrices(model) -> list[str]:
    return [path for path, module in model.named_modules() if path and is_matrix(module)]


@pytest.mark.parametrize(
    "name", ["Mamba", "FalconMamba", "Jamba", "MobileBERT", "WavLM, classifier", "T5", "BART", "LED"]
)
def test_what_is_never_called_is_found_refused_and_never_merged(name):
    """The oracle is the gradient that an adapter there would get: none."""
    one = ARCHITECTURES[name]
    model = one.model()
    quiet = unheard(model, matrices(model))
    called = set()
    for path in matrices(model):
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: called.add(path))
    model(**one.batch())
    assert quiet and not called & quiet.keys()
    for path, why in quiet.items():
        fresh = one.model()
        fresh(**one.batch())  # transformers sets WavLM up in its first call
        with tiny.untouched(fresh), pytest.raises(ValueError, match="no effect, because the model|forward of its own"):
            attach(fresh, mp.LoRA(1, targets=re.compile(re.escape(path))))
        assert "reads its weight" in why or "which shares its weight" in why
    assert not {layer.path for layer in attach(model, mp.LoRA(1)).layers()} & quiet.keys(), "all-linear leaves them out"


def test_a_file_from_elsewhere_may_hold_such_a_layer_and_is_not_merged(tmp_path):
    import peft

    torch.manual_seed(0)
    one = ARCHITECTURES["Mamba"]
    theirs = peft.get_peft_model(one.model(), peft.LoraConfig(r=2, target_modules=["dt_proj", "in_proj"]))
    for parameter in (p for n, p in theirs.named_parameters() if "lora_" in n):
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path)
    tuned = mp.load_adapter(one.model(), tmp_path)
    with torch.no_grad():
        expected, found = outputs(theirs, one.batch())[0], outputs(tuned, one.batch())[0]
    assert (expected - found).abs().max() <= 1e-5 * expected.abs().max()
    with pytest.raises(
        ValueError, match="dt_proj' has no effect, because the model reads its weight.*merging would give"
    ):
        tuned.merge()
    assert torch.equal(outputs(tuned, one.batch())[0], found)


EYE = dict(
    hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=24, image_size=16, patch_size=8
)
READS_PICTURES = {  # what of the eye its picture goes through in vain
    "Llava": (dict(vision_config=EYE | dict(model_type="clip_vision_model")), "tower.encoder.layers.2."),
    "VipLlava": (
        dict(vision_config=EYE | dict(model_type="clip_vision_model"), vision_feature_layers=[-2, 1]),
        "tower.encoder.layers.2.",
    ),
    "VideoLlava": (
        dict(vision_config=EYE | dict(model_type="clip_vision_model"), video_token_id=59),
        "image_tower.encoder.layers.2.",
    ),
    "PaliGemma": (
        dict(vision_config=EYE | dict(model_type="siglip_vision_model", projection_dim=16), projection_dim=16),
        "tower.head.mlp.",
    ),
}


@pytest.mark.parametrize("name", READS_PICTURES)
def test_layers_that_a_picture_goes_through_in_vain_are_left_out(name):
    settings, where = READS_PICTURES[name]
    text = tiny.llama().config.to_dict()
    text |= dict(model_type="gemma", head_dim=4, hidden_size=16) if name == "PaliGemma" else {}
    cls = getattr(transformers, f"{name}ForConditionalGeneration")
    model = cls(cls.config_class(text_config=text, image_token_id=60, **settings)).eval()
    vain = [path for path in matrices(model) if where in path]
    with tiny.untouched(model), pytest.raises(ValueError, match="no effect, because the model leaves its output alone"):
        attach(model, mp.LoRA(2, targets=vain[:1]))
    tuned = attach(model, mp.LoRA(2))
    adapted = {layer.path: layer for layer in tuned.layers() if "tower" in layer.path}
    assert vain and adapted and not set(vain) & set(adapted)
    tiny.randomise(tuned)
    seen = model.get_image_features(torch.randn(1, 3, 16, 16)).pooler_output
    sum(each.sum() for each in seen).backward()
    assert all(layer.reached() for path, layer in adapted.items() if "video_tower" not in path), "and no others are"


def test_a_model_of_one_s_own_is_asked_when_it_is_merged():
    class Reads(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, x):
            return self.a(x) @ self.b.weight.T

    tuned = attach(Reads(), mp.LoRA(2))
    tiny.randomise(tuned)
    y = tuned(torch.ones(2, 8))
    with pytest.raises(ValueError, match="'b' has no effect, because it was not called, though the model was"):
        tuned.merge()
    assert torch.equal(tuned(torch.ones(2, 8)), y)


def test_trying_the_model_leaves_no_trace():
    model = ARCHITECTURES["BART"].model().train()
    model.model.encoder.eval()
    modes = {path: module.training for path, module in model.named_modules()}
    with tiny.untouched(model):
        assert "model.shared" in unheard(model, matrices(model))
    assert modes == {path: module.training for path, module in model.named_modules()}


def test_fit_says_what_the_first_step_did_not_reach():
    model, tokenizer = mp.load("pocket")
    model.unused = torch.nn.Linear(8, 8)
    tuned = mp.attach(model, mp.LoRA(2, targets=["unused", "q_proj"]))
    # called, its output left alone, as is that of the last layer of LLaVA's eye
    model.register_forward_hook(lambda model, *_: [model.unused(torch.ones(1, 8))].clear())
    with pytest.warns(UserWarning, match="1 of 5 places .* 'unused' for one: the loss of this batch does not depend"):
        mp.fit(tuned, mp.world.pirate(), steps=1, progress=False)


@pytest.mark.parametrize("method", [mp.LoRA(2, targets=["unused"]), mp.AdaLoRA(2, steps=9, targets=["unused"])])
def test_fit_says_that_nothing_which_trains_was_reached(method):
    model, _ = mp.load("pocket")
    model.unused = torch.nn.Linear(8, 8)
    with pytest.raises(ValueError, match="The loss of this batch depends on no number that trains"):
        mp.fit(mp.attach(model, method), mp.world.pirate(), steps=1, progress=False)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "HiRA", "AdaLoRA", "MiSS", "SHiRA"])
def test_what_is_left_out_may_be_too_small(kind):
    """Mamba's dt_proj reads 4 numbers, and is never called."""
    method = {"AdaLoRA": mp.AdaLoRA(6, steps=9), "SHiRA": mp.SHiRA(4)}.get(kind) or getattr(mp, kind)(8)
    model = ARCHITECTURES["Mamba"].model()
    with tiny.untouched(model), pytest.raises(ValueError, match="rank=.*dt_proj"):
        attach(model, dataclasses.replace(method, targets=["dt_proj"]))
    assert len(attach(model, method).layers()) == 6


def test_a_model_that_records_its_hidden_states_goes_on_doing_so():
    """transformers puts its recorders in place in the first call, which here is the trial of `attach`."""
    model = tiny.llama()
    model.config.output_hidden_states = True
    tuned = attach(model, mp.LoRA(rank=2))
    assert len(tuned(**tiny.batch(model)).hidden_states) == 1 + model.config.num_hidden_layers


def test_all_linear_leaves_the_mixer_of_streams_alone():
    """Gemma-3n's AltUp reads its small matrices in ways of its own."""
    config = transformers.Gemma3nTextConfig(
        vocab_size=61, vocab_size_per_layer_input=61, hidden_size=16, hidden_size_per_layer_input=8,
        num_hidden_layers=2, intermediate_size=[24, 24], num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        laurel_rank=4, num_kv_shared_layers=0, activation_sparsity_pattern=[0.0, 0.0],
        layer_types=["full_attention"] * 2,
    )  # fmt: skip
    tuned = attach(transformers.Gemma3nForCausalLM(config), mp.LoRA(rank=2))
    assert tuned.layers() and not [layer.path for layer in tuned.layers() if ".altup." in layer.path]


@pytest.mark.parametrize("name", ["OPT", "Gemma", "BERT", "BART", "Bloom"])
@pytest.mark.parametrize("method", [mp.Softmax(), mp.LoRA(rank=2), mp.Full()], ids=lambda m: type(m).__name__)
def test_the_vocabulary_does_not_change_behind_an_adapter(method, name):
    """A trained copy of a tied head would be lost, and detach would leave two sizes in one model."""
    model, batch = ARCHITECTURES[name].model(), ARCHITECTURES[name].batch()
    own = vars(model).keys() - {"_tuned"}
    tuned = attach(model, method)
    tiny.randomise(tuned)
    before = outputs(tuned, batch)
    with pytest.raises(ValueError, match="resize it before attach, or after detach"):
        model.resize_token_embeddings(70)
    assert all(map(torch.equal, outputs(tuned, batch), before))
    assert tuned.detach() is model and vars(model).keys() == own
    model.resize_token_embeddings(70, mean_resizing=False)
    assert model.get_input_embeddings().weight.shape[0] == 70


# ---------------------------------------------------------------------------------------------------------------------
# Mixtures of experts
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name", ["Qwen2-MoE", "OLMoE", "Phi-MoE", "JetMoe", "Qwen3-Next", "NLLB-MoE", "Switch", "Jamba"]
)
def test_adapters_leave_what_chooses_the_experts_alone(name):
    model = ARCHITECTURES[name].model()
    fused = [p.numel() for path, p in model.named_parameters() if re.search("expert|mlp", path) and p.ndim == 3]
    share = 100 * sum(fused) / sum(p.numel() for p in model.parameters())
    said = pytest.warns(UserWarning, match=f"does not reach {share:.0f} % of the weights: the experts of")
    with said if fused else contextlib.nullcontext():
        tuned = attach(model, mp.LoRA(2))
    assert not [layer.path for layer in tuned.layers() if re.search(r"router|\bgate\b|expert_gate", layer.path)]
    tuned.detach()
    for placement in ("pfeiffer", "parallel"):
        sites = [site.path for layer in attach(model, mp.Adapter(2, placement)).layers() for site in layer.sites]
        assert len(sites) == len(set(sites)) and not [path for path in sites if re.search("expert|gate$|router", path)]
        model = ARCHITECTURES[name].model()
