"""DoRA, VeRA, AdaLoRA, (IA)³, PiSSA against Hugging Face PEFT: logits, gradients, merged weights, each other's files.

As for LoRA: random tiny models, every trainable number moved first, float64 to 1e-12 and float32 to 1e-6.
"""

from __future__ import annotations

import copy
import json
import random
import re
from dataclasses import replace

import pytest
import tiny
import torch

from minipeft.attach import attach
from minipeft.methods.adalora import AdaLoRA, ranks
from minipeft.methods.dora import DoRA
from minipeft.methods.ia3 import IA3
from minipeft.methods.lora import LoRA
from minipeft.methods.miss import MiSS
from minipeft.methods.oft import OFT
from minipeft.methods.projected import ProjectedLoRA
from minipeft.methods.select import Softmax
from minipeft.methods.vera import VeRA
from minipeft.serve.checkpoint import load_adapter

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "bert": ["query", "key", "value", "dense"],
    "classifier": ["query", "value"],
    "t5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
}
SCALED = {
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "bert": (["key", "value", "output.dense"], ["output.dense"]),
    "classifier": (["key", "value"], []),
    "t5": (["k", "v", "wo"], ["wo"]),
}


def configuration(method: str, family: str, save: list[str] | None = None):
    """PEFT's configuration of a method for a family of models."""
    common = dict(fan_in_fan_out=family == "gpt2", modules_to_save=save)
    linear = dict(target_modules=TARGETS[family], **common)
    if method == "ia3":
        targets, feedforward = SCALED[family]
        return peft.IA3Config(target_modules=targets, feedforward_modules=feedforward, **common)
    return {
        "lora": lambda: peft.LoraConfig(r=3, lora_alpha=5, **linear),
        "rslora": lambda: peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True, **linear),
        "dora": lambda: peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, **linear),
        "vera": lambda: peft.VeraConfig(r=12, **linear),
        "adalora": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, total_step=20, **linear),
    }[method]()


METHODS = ("lora", "rslora", "dora", "vera", "adalora", "ia3")


def theirs(method: str, family: str, dtype=torch.float32, save: list[str] | None = None):
    """PEFT's model with every trainable number moved. PEFT inserts wrapper modules, so its base is built anew."""
    model = peft.get_peft_model(tiny.MODELS[family]().to(dtype), configuration(method, family, save)).eval()
    settle(model, dtype)
    generator = torch.Generator().manual_seed(1)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data = parameter.data.to(dtype)
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).to(dtype)
    return model


def settle(model, dtype) -> None:
    """PEFT 0.21 over float64: AdaLoRA's divisor becomes trainable (and is never saved), VeRA's pair stays float32."""
    for name, parameter in model.named_parameters():
        if "ranknum" in name:
            parameter.requires_grad_(False).data = parameter.data.to(dtype)
    for name in ("vera_A", "vera_B"):
        for key, value in dict(getattr(model.base_model, name, {})).items():
            getattr(model.base_model, name)[key] = value.to(dtype)


def outcome(model, batch: dict, mine: bool) -> dict[str, torch.Tensor]:
    """Logits, loss, gradients, under PEFT's names."""
    output = model(**batch) if mine else model.base_model(**batch)  # PEFT adds AdaLoRA's penalty in the latter only
    if mine:
        (output.loss + model.penalty()).backward()
    else:
        output.loss.backward()
    result = {"logits": output.logits.detach()}
    return result | {f"grad {common(n)}": p.grad for n, p in model.named_parameters() if p.requires_grad}


def common(name: str) -> str:
    """One spelling for `base_model.model.….q_proj.lora_A.default.weight` and `adapters.default.…/q_proj.A`."""
    name = name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight")
    for theirs, ours in (
        *(("lora_magnitude_vector", "m"), ("vera_lambda_b", "b"), ("vera_lambda_d", "d"), ("ia3_l", "l")),
        *(("lora_A", "A"), ("lora_B", "B"), (".modules_to_save", "")),
    ):
        name = name.replace(theirs, ours)
    name = re.sub(r"^adapters\.default\.|\.?value$", "", name.replace("adapters.", "adapters.default."))
    name = name.replace("/", ".").removesuffix(".weight")
    return re.sub(r"\.(P|lam|Q)$", lambda m: {"P": ".B", "lam": ".lora_E", "Q": ".A"}[m[1]], name)


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["f32", "f64"])
def test_logits_and_gradients_agree(method, family, dtype, tolerance, tmp_path):
    save = ["classifier"] if family == "classifier" else None
    reference = theirs(method, family, dtype, save)
    reference.save_pretrained(tmp_path)
    base = tiny.MODELS[family]().to(dtype)
    batch, plain = tiny.batch(base), None
    with torch.no_grad():
        plain = base(**batch).logits
    tuned = load_adapter(base, tmp_path)
    if method == "adalora":  # PEFT's penalty, which its forward adds to the loss
        config = reference.peft_config["default"]
        penalty = AdaLoRA(rank=4, initial_rank=4, penalty_form="peft", orthogonality=config.orth_reg_weight)
        layers = list(tuned.adapters["default"].values())
        for layer in layers:
            layer.method = penalty if hasattr(layer, "lam") else None
        tuned.methods["default"] = (penalty,)
    expected, found = outcome(reference, batch, mine=False), outcome(tuned, batch, mine=True)
    assert expected.keys() == found.keys() and len(found) > 4
    assert (found["logits"] - plain).abs().max() > 1e-2, "it has an effect"
    for key in expected:
        scale = max(1.0, expected[key].abs().max().item())
        assert (expected[key] - found[key]).abs().max() <= tolerance * scale, key
    assert tuned.count().trainable == reference.get_nb_trainable_parameters()[0]


def drawn(family: str, pick: random.Random):
    """A tiny model whose widths, heads and layers are drawn."""
    import transformers as tf

    heads, wide, layers, V = (
        pick.choice([2, 4]),
        pick.choice([4, 6, 10]),
        pick.choice([1, 2, 3]),
        pick.randrange(20, 70),
    )
    d, ff = heads * wide, pick.randrange(9, 40)
    if family == "llama":
        shape = dict(hidden_size=d, intermediate_size=ff, num_hidden_layers=layers, num_attention_heads=heads)
        bias, kv = pick.random() < 0.5, pick.choice([1, 2])
        shape |= dict(num_key_value_heads=kv, attention_bias=bias, mlp_bias=bias, vocab_size=V)
        return tf.LlamaForCausalLM, tf.LlamaConfig(max_position_embeddings=32, **shape)
    if family == "gpt2":
        drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        shape = dict(n_embd=d, n_layer=layers, n_head=heads, n_inner=ff, vocab_size=V)
        return tf.GPT2LMHeadModel, tf.GPT2Config(n_positions=32, bos_token_id=1, eos_token_id=2, **shape, **drop)
    if family == "bert":
        drop = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
        shape = dict(hidden_size=d, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=ff)
        return tf.BertForMaskedLM, tf.BertConfig(vocab_size=V, max_position_embeddings=32, **shape, **drop)
    shape = dict(d_model=d, d_kv=wide, num_heads=heads, d_ff=ff, num_layers=layers, vocab_size=V, dropout_rate=0.0)
    gated = dict(feed_forward_proj="gated-gelu", decoder_start_token_id=0, pad_token_id=0, eos_token_id=2)
    return tf.T5ForConditionalGeneration, tf.T5Config(**shape, **gated)


@pytest.mark.parametrize("seed", range(12))
def test_agreement_on_drawn_shapes(seed, tmp_path, monkeypatch):
    pick = random.Random(seed)
    family, method = list(TARGETS)[seed % 3] if seed % 4 else "t5", METHODS[seed % len(METHODS)]
    cls, config = drawn(family, pick)
    monkeypatch.setitem(tiny.MODELS, family, lambda: tiny._fresh(cls, copy.deepcopy(config)))
    reference = theirs(method, family, torch.float64)
    reference.save_pretrained(tmp_path)
    tuned = load_adapter(tiny.MODELS[family]().double(), tmp_path)
    batch = {k: v % config.vocab_size for k, v in tiny.batch(tuned).items()}
    assert tuned.count().trainable == reference.get_nb_trainable_parameters()[0]
    if method == "adalora":  # its penalty is compared above
        reference.peft_config["default"].orth_reg_weight = 0.0
        tuned.methods["default"] = ()
    expected, found = outcome(reference, batch, mine=False), outcome(tuned, batch, mine=True)
    assert expected.keys() == found.keys()
    for key in expected:
        assert (expected[key] - found[key]).abs().max() <= 1e-12 * max(1.0, expected[key].abs().max().item()), key


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("method", METHODS)
def test_merged_weights_agree(method, family, tmp_path):
    reference = theirs(method, family)
    reference.save_pretrained(tmp_path)
    tuned = load_adapter(tiny.MODELS[family](), tmp_path)
    tuned.merge()
    mine, merged = tuned.detach().state_dict(), reference.merge_and_unload().state_dict()
    assert mine.keys() == merged.keys()
    before = tiny.MODELS[family]().state_dict()
    assert sum(not torch.equal(before[key], mine[key]) for key in mine) >= tiny.L
    for key in mine:
        assert (mine[key] - merged[key]).abs().max() <= 2e-6, key


def ours(method: str, family: str):
    linear = dict(targets=TARGETS[family])
    targets, feedforward = SCALED[family]
    return {
        "lora": lambda: LoRA(rank=3, gamma=0.7, **linear),
        "rslora": lambda: LoRA(rank=3, alpha=4, rank_stabilized=True, **linear),
        "lora+": lambda: LoRA(rank=3, gamma=0.7, lr_ratio=8, **linear),
        "pissa": lambda: LoRA(rank=3, gamma=0.7, init="pissa", **linear),
        "projected": lambda: ProjectedLoRA(rank=3, gamma=0.7, **linear),
        "dora": lambda: DoRA(rank=3, gamma=0.7, **linear),
        "vera": lambda: VeRA(rank=12, projection_seed=5, **linear),
        "adalora": lambda: AdaLoRA(rank=2, initial_rank=4, gamma=0.7, **linear),
        "ia3": lambda: IA3(targets=[t for t in targets if t not in feedforward], feedforward=feedforward),
    }[method]()


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("method", [*METHODS, "lora+", "pissa", "projected"])
def test_peft_loads_what_is_saved_here(method, family, tmp_path, recwarn):
    chosen = [ours(method, family), Softmax()] if family == "classifier" else ours(method, family)
    tuned = attach(tiny.MODELS[family](), chosen)
    tiny.randomise(tuned, scale=0.3)
    tuned.save(tmp_path)
    other = peft.PeftModel.from_pretrained(tiny.MODELS[family](), tmp_path).eval()
    texts = [str(w.message).lower() for w in recwarn]
    marked = method in ("pissa", "projected")  # PEFT says that it ignores our mark, and loads the same numbers as LoRA
    assert not [t for t in texts if "missing" in t or ("unexpected" in t and not (marked and "['minipeft']" in t))]
    batch = tiny.batch(tuned)
    tuned, other = tuned.double(), other.double()  # in float32 PiSSA's difference of large products rounds differently
    with torch.no_grad():
        mine, plain = tuned(**batch).logits, tiny.MODELS[family]().double()(**batch).logits
        assert (mine - other(**batch).logits).abs().max() <= 1e-6 * max(1.0, mine.abs().max().item())
        assert (mine - plain).abs().max() > 1e-2
    other.save_pretrained(tmp_path / "back")
    with torch.no_grad():
        again = load_adapter(tiny.MODELS[family](), tmp_path / "back").double()(**batch).logits
    assert (mine - again).abs().max() <= 1e-6 * max(1.0, mine.abs().max().item())


def test_one_seed_gives_the_same_vera_as_peft():
    reference = peft.get_peft_model(tiny.llama(), peft.VeraConfig(r=7, target_modules="all-linear"))
    tuned = attach(tiny.llama(), VeRA(rank=7), seed=99)
    pair = next(iter(tuned.adapters["default"].values())).pair
    assert torch.equal(pair.A, reference.base_model.vera_A["default"])
    assert torch.equal(pair.B, reference.base_model.vera_B["default"])
    assert tuple(reference.get_nb_trainable_parameters()) == (tuned.count().trainable, tuned.count().total)


@pytest.mark.parametrize("kept", [True, False])
def test_vera_without_its_pair_in_the_file(kept, tmp_path):
    """`save_projection=False`: the pair follows from the seed. With it, numbers in the file win over the seed."""
    config = peft.VeraConfig(r=7, target_modules=["q_proj"], save_projection=kept, projection_prng_key=3)
    reference = peft.get_peft_model(tiny.llama(), config).eval()
    for name, p in reference.named_parameters():
        if "lambda_b" in name:
            p.data += 0.5
    if kept:
        reference.base_model.vera_A["default"] += 0.25
    reference.save_pretrained(tmp_path)
    tuned = load_adapter(tiny.llama(), tmp_path)
    ids = tiny.batch(tuned)["input_ids"]
    with torch.no_grad():
        assert (tuned(ids).logits - reference(input_ids=ids).logits).abs().max() <= 1e-6


def test_pissa_starts_and_trains_as_in_peft():
    """PEFT subtracts the principal part from W; here W stays. Same start, same gradients, same model after 5 steps."""
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS["llama"], init_lora_weights="pissa")
    reference = peft.get_peft_model(tiny.llama(), config).eval()
    tuned = attach(tiny.llama(), LoRA(rank=3, alpha=6, init="pissa"))
    batch = tiny.batch(tuned)
    for step in range(5):
        losses = []
        for model in (reference, tuned):
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert abs(losses[0] - losses[1]) < 1e-5, step
    with torch.no_grad():
        assert (reference(**batch).logits - tuned(**batch).logits).abs().max() < 1e-4


def test_pissa_as_peft_converts_it_loads_as_lora_of_twice_the_rank(tmp_path):
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS["llama"], init_lora_weights="pissa")
    reference = peft.get_peft_model(tiny.llama(), config).eval()
    reference.peft_config["default"].init_lora_weights = True
    reference.save_pretrained(tmp_path / "start")
    for name, p in reference.named_parameters():
        if "lora_" in name:
            p.data += 0.1
    reference.peft_config["default"].init_lora_weights = "pissa"
    reference.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    tuned = load_adapter(tiny.llama(), tmp_path / "end")
    batch = tiny.batch(tuned)
    with torch.no_grad():
        assert (reference(**batch).logits - tuned(**batch).logits).abs().max() <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("targets", [["q_proj", "v_proj", "down_proj"], TARGETS["llama"]], ids=["three", "all"])
@pytest.mark.parametrize("interval", [1, 7])
def test_adalora_allocates_the_same_ranks_in_200_steps(targets, interval, tmp_path):
    """Same start, data, optimizer and penalty: the same triplets must be pruned, and the files say so."""
    schedule = dict(total_step=200, tinit=20, tfinal=50, deltaT=interval)
    config = peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, target_modules=targets, **schedule)
    reference = peft.get_peft_model(tiny.llama().double(), config)
    settle(reference, torch.float64)
    method = AdaLoRA(
        rank=2, initial_rank=4, gamma=6 / (4 + 1e-5), steps=200, warmup=20, final=50, interval=interval,
        targets=targets, penalty_form="peft",
    )  # fmt: skip
    tuned = attach(tiny.llama().double(), method)
    start = dict(reference.named_parameters())
    for key, layer in tuned.adapters["default"].items():
        for name, p in (("lora_B", layer.P), ("lora_E", layer.lam), ("lora_A", layer.Q)):
            theirs = start[f"base_model.model.{key.replace('/', '.')}.{name}.default"]
            theirs.data = theirs.data.double()
            p.data.copy_(theirs.data)
    seen = []
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in (reference, tuned)
    ]
    for step in range(1, 201):
        batch = tiny.batch(tuned, seed=step % 11)
        for optimizer, model in zip(optimizers, (reference, tuned), strict=True):
            optimizer.zero_grad()
            loss = model(**batch).loss + model.penalty() if model is tuned else model.base_model(**batch).loss
            loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step) if model is reference else model.stepped(step)
        seen.append(sum(ranks(tuned).values()))
        if config.rank_pattern:
            kept = {name.replace(".lora_E.default", ""): kept for name, kept in config.rank_pattern.items()}
            layers = tuned.adapters["default"].values()
            assert {layer.key: layer.kept.tolist() for layer in layers} == kept, f"the same triplets at step {step}"
    pattern = {path: sum(each) for path, each in kept.items()}
    assert ranks(tuned) == pattern and sum(pattern.values()) == 2 * len(pattern)
    assert len(set(pattern.values())) > 1, "the budget was moved"
    assert seen[19] == 4 * len(pattern) and sorted(seen, reverse=True) == seen and seen[149] == seen[-1]
    reference.save_pretrained(tmp_path / "theirs")
    tuned.save(tmp_path / "ours")
    written = [json.loads((tmp_path / each / "adapter_config.json").read_text()) for each in ("theirs", "ours")]
    assert written[0]["rank_pattern"] == written[1]["rank_pattern"]
    ids = tiny.batch(tuned)["input_ids"]
    with torch.no_grad():
        expected = reference.eval()(input_ids=ids).logits
        assert (tuned.eval()(ids).logits - expected).abs().max() < 1e-3, "Adam magnifies rounding, but not by much"
        assert (load_adapter(tiny.llama().double(), tmp_path / "theirs")(ids).logits - expected).abs().max() < 1e-12
        other = peft.PeftModel.from_pretrained(tiny.llama().double(), tmp_path / "ours").eval().double()
        assert (other(input_ids=ids).logits - tuned(ids).logits).abs().max() < 1e-6


class Deep(torch.nn.Module):
    """Two blocks, in each a module of no adaptable kind under `name`, and a head of that name."""

    def __init__(self, name: str):
        super().__init__()
        for block in "ab":
            part = torch.nn.ModuleDict(
                {"dense": torch.nn.Linear(8, 8), name: torch.nn.Sequential(torch.nn.Linear(8, 8))}
            )
            self.add_module(block, part)
        self.add_module(name, torch.nn.Linear(8, 8))
        self.name = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in (self.a, self.b):
            x = part[self.name](part["dense"](x))
        return getattr(self, self.name)(x)


@pytest.mark.parametrize("name", ("output", "head", "classifier", "proj", "fc"))
@pytest.mark.parametrize("method", (LoRA(rank=2), IA3(feedforward=()), OFT(4), MiSS(2)), ids=repr)
def test_peft_finds_no_more_than_was_adapted_where_a_block_has_the_heads_name(name, method, tmp_path):
    method = replace(method, targets=re.compile(name))
    torch.manual_seed(0)
    base, x = Deep(name), torch.randn(3, 8)
    tuned = attach(copy.deepcopy(base), method, seed=0)
    with torch.no_grad():
        for p in tuned.adapters.parameters():
            p += 0.1 * torch.randn(p.shape)
    tuned.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(theirs(x), tuned(x), rtol=1e-6, atol=1e-6)
