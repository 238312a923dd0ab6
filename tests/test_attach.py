"""What must hold for every method on every model, and what the mechanism promises beyond it."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import nn

from minipeft import methods
from minipeft.attach import Tuned, attach
from minipeft.build import Count
from minipeft.layer import Layer
from minipeft.methods.adalora import AdaLoRA
from minipeft.methods.adapter import Adapter
from minipeft.methods.common import like
from minipeft.methods.dora import DoRA
from minipeft.methods.experts import Experts
from minipeft.methods.ia3 import IA3
from minipeft.methods.lora import LoRA
from minipeft.methods.masked import Masked
from minipeft.methods.prefix import PrefixTuning
from minipeft.methods.projected import ProjectedLoRA
from minipeft.methods.prompt import PromptTuning, PTuning
from minipeft.methods.select import BitFit, Full, Softmax
from minipeft.methods.vera import VeRA
from minipeft.serve.checkpoint import load_adapter

METHODS = {
    "lora": LoRA(rank=2),
    "lora on attention, rank-stabilized": LoRA(rank=3, alpha=4, rank_stabilized=True, targets="attention"),
    "lora on embedding": LoRA(rank=2, targets=["embed_tokens", "wte", "word_embeddings"]),
    "lora and head": [LoRA(rank=2), Softmax()],
    "lora and biases": [LoRA(rank=2, targets="mlp"), BitFit()],
    "full": Full(),
    "bitfit": BitFit(),
    "softmax": Softmax(),
    "pissa": LoRA(rank=2, init="pissa"),
    "lora+": LoRA(rank=2, lr_ratio=4.0),
    "projected": ProjectedLoRA(rank=3),
    "projected, top": ProjectedLoRA(rank=3, basis="top"),
    "dora": DoRA(rank=2),
    "vera": VeRA(rank=20),
    "adalora": AdaLoRA(rank=2, initial_rank=3),
    "ia3": IA3(),
    "dora and biases": [DoRA(rank=2, targets="attention"), BitFit()],
    "ia3 and full": [IA3(), Full(targets=re.compile(r".*(proj|query|wi_0|norm).*"))],
    "masked": Masked(share=0.05),
    "masked at random, with biases": [Masked(share=0.05, by="random", targets="mlp"), BitFit()],
}
WEIGHTLESS = {  # they change no weight, so they do not merge
    "adapter": Adapter(4),
    "adapter, parallel": Adapter(4, "parallel", activation="gelu"),
    "adapter, shared": Adapter(4, share=2, share_within=True, activation="tanh"),
    "adapter and head": [Adapter(4, "pfeiffer", top=1, activation="silu"), Softmax()],
    "experts": Experts(4, activation="gelu"),
}
FRONTS = {  # they stand before the tokens, so even the first output differs
    "prompt": PromptTuning(3),
    "prompt and head": [PromptTuning(2), Softmax()],
    "p-tuning": PTuning(3, hidden=8),
    "p-tuning, lstm": PTuning(3, "lstm", hidden=4),
    "p-tuning, task": PTuning(3, "task", hidden=8),
    "prefix": PrefixTuning(3),
    "prefix, reparametrised": PrefixTuning(3, hidden=8),
}


def registered():
    """{name: method} of the methods that no line above names, from their own examples."""
    above = [each for m in (METHODS | WEIGHTLESS | FRONTS).values() for each in (m if isinstance(m, list) else [m])]
    fresh = {name: kind for name, kind in methods.METHODS.items() if not any(type(each) is kind for each in above)}
    return {f"{name} {settings}": kind(**settings) for name, kind in fresh.items() for settings in kind.examples}


for name, method in registered().items():
    layers = attach(tiny.llama(), method).layers()
    weightless = all(type(layer).delta is Layer.delta for layer in layers)
    (FRONTS if layers[0].front else WEIGHTLESS if weightless else METHODS)[name] = method
MERGEABLE = list(METHODS)
WEIGHTLESS |= FRONTS
METHODS |= WEIGHTLESS
EMBEDDING = {
    "llama": "embed_tokens", "gpt2": "wte", "bert": "word_embeddings", "classifier": "word_embeddings",
    "t5": "embed_tokens",
}  # fmt: skip
IA3_OF = {
    "llama": IA3(),
    "gpt2": IA3(targets=["c_attn"], feedforward=["mlp.c_proj"]),
    "bert": IA3(targets=["key", "value"], feedforward=["output.dense"]),
    "classifier": IA3(targets=["key", "value"], feedforward=["output.dense"]),
    "t5": IA3(targets=["k", "v"], feedforward=["wo"]),
}


def method_for(name: str, model: str):
    if model == "t5" and "bias" in name or (model, name) == ("t5", "bitfit"):
        pytest.skip("T5 has no biases")
    if name == "lora on embedding":
        return LoRA(rank=2, targets=[EMBEDDING[model]])
    several = METHODS[name] if isinstance(METHODS[name], list) else [METHODS[name]]
    found = [IA3_OF[model] if isinstance(method, IA3) else method for method in several]
    return found if isinstance(METHODS[name], list) else found[0]


@pytest.fixture(params=tiny.MODELS)
def family(request) -> str:
    return request.param


@pytest.fixture(params=METHODS)
def method_name(request) -> str:
    return request.param


def logits(model: nn.Module, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(**{k: v for k, v in tiny.batch(model).items() if k != "labels"}, **kwargs).logits


def train(model: nn.Module, steps: int = 8) -> list[float]:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(**tiny.batch(model)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


CASES = [  # the classifier is the bert again, but for its head and what its head reads
    (family, name)
    for family in tiny.MODELS
    for name in METHODS
    if family != "classifier" or re.search("head|softmax|full|masked|prompt|prefix", name)
]


@pytest.mark.filterwarnings("ignore:Merging unties")
@pytest.mark.parametrize("family, method_name", CASES)
def test_invariants(family, method_name, tmp_path):
    model, method = tiny.MODELS[family](), method_for(method_name, family)
    pointers = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    names, flags = list(dict(model.named_modules())), [p.requires_grad for p in model.parameters()]
    before, base = tiny.snapshot(model), logits(model)

    tuned = attach(model, method)
    assert torch.equal(logits(tuned), base) != (method_name in FRONTS), "identity at init"
    assert list(dict(model.named_modules())) == names and model.state_dict().keys() == before.keys()
    trainable = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert trainable and all(name.startswith("adapters.") for name in trainable)

    start = {name: p.detach().clone() for name, p in tuned.named_parameters()}
    losses = train(tuned)
    assert losses[-1] < losses[0]
    changed = {n for n, p in tuned.named_parameters() if not torch.equal(p, start[n])}
    unused = {
        n for n in trainable if re.search(r"k_proj/bias|/key/bias|pooler", n)
    }  # softmax does not see a key's bias
    assert changed <= set(trainable) and set(trainable) - changed <= unused, "only, and all of, what should change"

    tiny.randomise(tuned)
    adapted = logits(tuned)
    assert (adapted - base).abs().max() > 1e-2, "the adapter has an effect"
    with tuned.disabled():
        assert torch.equal(logits(tuned), base)
        assert tiny.same(tiny.snapshot(model), before), "base bit-identical after training"
    assert torch.equal(logits(tuned), adapted)

    if method_name in WEIGHTLESS:
        for refused in (tuned.merge, tuned.deltas):
            with pytest.raises(ValueError, match="changes no weight"):
                refused()
    else:
        tuned.merge()
        assert (logits(tuned) - adapted).abs().max() < 1e-5
        with tuned.disabled():
            assert torch.equal(logits(tuned), base)
        with pytest.raises(ValueError, match="unmerge"):
            tuned.merge()
        assert (logits(tuned) - adapted).abs().max() < 1e-5
        tuned.unmerge()
    assert torch.equal(logits(tuned), adapted)
    with pytest.raises(ValueError, match="not merged"):
        tuned.unmerge()

    if "Subspace" in method_name:  # an instrument of measurement, with no file of its own
        with pytest.raises(ValueError, match="no file format"):
            tuned.save(tmp_path / "adapter")
        tuned.detach()
        return
    tuned.save(tmp_path / "adapter")
    other = attach(tiny.MODELS[family](), method, name="other", seed=7)
    assert torch.equal(logits(load_adapter(other, tmp_path / "adapter")), adapted), "save and load under another seed"
    assert torch.equal(logits(load_adapter(tiny.MODELS[family](), tmp_path / "adapter")), adapted)

    back = tuned.detach()
    assert back is model and torch.equal(logits(back), base) and tiny.hooks(back) == 0
    assert {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)} == pointers
    assert [p.requires_grad for p in model.parameters()] == flags
    attach(model, method)


@pytest.mark.filterwarnings("ignore:Merging unties")
@pytest.mark.parametrize("method_name", MERGEABLE)
def test_deltas_are_what_a_merge_changes(family, method_name):
    model = tiny.MODELS[family]()
    before = tiny.snapshot(model)
    tuned = attach(model, method_for(method_name, family))
    tiny.randomise(tuned)
    deltas = tuned.deltas()
    tuned.merge()
    base = tuned.detach()
    changed = {name for name, value in base.state_dict().items() if not torch.equal(value, before[name])}
    assert deltas
    for path, delta in deltas.items():
        name = path if path in before else f"{path}.weight"
        module = base.get_submodule(path) if path not in before else None
        turn = delta.T if isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D" else delta
        torch.testing.assert_close(base.state_dict()[name], before[name] + turn, atol=1e-6, rtol=0)
        changed.discard(name)
    aliases = {"lm_head.weight", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    aliases |= {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    assert changed <= aliases, "nothing else changed"


def test_deepcopy_and_pickle_give_independent_models(method_name):
    tuned = attach(tiny.llama(), method_for(method_name, "llama"))
    tiny.randomise(tuned)
    output = logits(tuned)
    for clone in (copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned))):
        assert torch.equal(logits(clone), output)
        train(clone, 2)
        assert torch.equal(logits(tuned), output) and not torch.equal(logits(clone), output)
        trained = logits(clone)
        clone_again = copy.deepcopy(clone)
        train(clone_again, 2)
        assert torch.equal(logits(clone), trained)
        with clone.disabled():
            assert torch.equal(logits(clone), logits(tiny.llama()))
        assert torch.equal(logits(tuned), output)


def test_one_seed_one_initialisation_and_the_global_generator_is_left_alone():
    models = [tiny.llama() for _ in range(3)]
    before = torch.random.get_rng_state()
    a, b, c = (attach(m, LoRA(rank=2), seed=seed).state_dict() for m, seed in zip(models, (3, 3, 4), strict=True))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert tiny.same(a, b) and not tiny.same(a, c)


def test_initial_values_are_drawn_on_the_cpu_whatever_the_device():
    """Here no GPU is at hand: what `like` builds beside a weight that lies on one is drawn as beside one that does not;
    the kit of tools/gpu asks the device itself."""
    drawn = []
    for device in ("cpu", "cuda"):
        weight = SimpleNamespace(device=torch.device(device))
        with like(weight, torch.Generator().manual_seed(3)):
            drawn += [torch.randn(2), nn.Linear(2, 3).weight]
    assert torch.equal(drawn[0], drawn[2]) and torch.equal(drawn[1], drawn[3])


# -- several adapters -------------------------------------------------------------------------------------------------
def three() -> Tuned:
    tuned = attach(tiny.llama(), LoRA(rank=2))
    tuned.add("pirate", LoRA(rank=3, targets=["q_proj", "down_proj"]), seed=1)
    tuned.add("head", Softmax())
    tiny.randomise(tuned)
    return tuned


def test_use_switches_stacks_and_says_what_trains():
    tuned = three()
    alone = {}
    for name in ("default", "pirate", "head"):
        tuned.use(name)
        alone[name] = (logits(tuned), tuned.deltas())
        assert {n.split(".")[1] for n, p in tuned.named_parameters() if p.requires_grad} == {name}
    assert not torch.equal(alone["default"][0], alone["pirate"][0])
    tuned.use("default", "pirate", "head")
    q = "model.layers.0.self_attn.q_proj"
    assert torch.equal(tuned.deltas()[q], alone["default"][1][q] + alone["pirate"][1][q])
    stacked = logits(tuned)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tuned.merge()
    assert len(caught) == 1 and "lm_head.weight" in str(caught[0].message)
    assert (logits(tuned) - stacked).abs().max() < 1e-5
    tuned.unmerge()
    tuned.use()
    assert torch.equal(logits(tuned), logits(tiny.llama()))


def test_an_added_adapter_waits_until_it_is_used_and_starts_from_the_original():
    tuned = attach(tiny.llama(), Full())
    tiny.randomise(tuned)
    tuned.add("other", Full())
    assert tuned.active == ("default",)
    tuned.use("other")
    assert torch.equal(logits(tuned), logits(tiny.llama()))


def test_two_owners_of_one_parameter():
    tuned = attach(tiny.llama(), Full())
    tuned.add("head", Softmax())
    output = logits(tuned)
    with pytest.raises(ValueError, match="both replace lm_head.weight"):
        tuned.use("default", "head")
    assert tuned.active == ("default",) and torch.equal(logits(tuned), output)
    with tiny.untouched(model := tiny.llama()), pytest.raises(ValueError, match="lm_head.weight"):
        attach(model, [Full(), Softmax()])


def test_a_choice_per_row_equals_running_each_row_alone():
    tuned = three()
    tuned.use("default")
    ids = tiny.batch(tuned, rows=4)["input_ids"]
    choice = ["pirate", None, "default", "pirate"]
    with torch.no_grad():
        together = tuned(ids, adapters=choice).logits
        for row, name in enumerate(choice):
            tuned.use(*[name] if name else [])
            torch.testing.assert_close(together[row], tuned(ids[row : row + 1]).logits[0], atol=1e-5, rtol=0)
        tuned.use("head")  # an installed copy steps aside for the call
        assert torch.equal(tuned(ids, adapters=choice).logits, together)
        head = tuned(ids).logits
        assert not torch.equal(head, together)
        with tuned.disabled():
            assert torch.equal(tuned(ids, adapters=choice).logits, tuned(ids).logits)
        tokens = tuned.generate(ids, adapters=choice, max_new_tokens=3, do_sample=False)
        tuned.use("pirate")
        assert torch.equal(tokens[:1], tuned.generate(ids[:1], max_new_tokens=3, do_sample=False))


def test_every_hooked_method_can_be_chosen_per_row_and_the_others_say_that_they_cannot(method_name):
    tuned = attach(tiny.llama(), LoRA(rank=1))
    tuned.add("other", method_for(method_name, "llama"))
    tiny.randomise(tuned)
    if any(layer.slots or layer.front for layer in tuned.adapters["other"].values()):
        with pytest.raises(ValueError, match="cannot be chosen per row"):
            logits(tuned, adapters=["other", None, None])
        return
    ids = tiny.batch(tuned, rows=4)["input_ids"]
    with torch.no_grad():
        together = tuned(ids, adapters=[None, "other", "default", "other"]).logits
        for row, names in enumerate([(), ("other",), ("default",), ("other",)]):
            tuned.use(*names)
            torch.testing.assert_close(together[row], tuned(ids[row : row + 1]).logits[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("method_name", MERGEABLE)
def test_looking_at_the_deltas_changes_nothing(method_name):
    tuned = attach(tiny.llama(), method_for(method_name, "llama"))
    tiny.randomise(tuned)
    base, adapted = logits(tiny.llama()), logits(tuned)
    deltas = tuned.deltas()
    with tuned.disabled():
        assert tiny.same(tuned.deltas(), deltas) and torch.equal(logits(tuned), base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned.merge()
    merged = logits(tuned)
    assert tiny.same(tuned.deltas(), deltas) and torch.equal(logits(tuned), merged)
    tuned.unmerge()
    assert torch.equal(logits(tuned), adapted)


def test_stacked_changes_are_taken_against_the_same_weight():
    """Two DoRAs add up: each measures the bare W, in the forward and in the merge."""
    tuned = attach(tiny.llama(), DoRA(rank=2))
    tuned.add("second", DoRA(rank=2, targets=["q_proj", "down_proj"]), seed=1)
    tuned.add("third", IA3())
    tiny.randomise(tuned)
    tuned.use("default", "second", "third")
    stacked = logits(tuned)
    tuned.merge()
    assert (logits(tuned) - stacked).abs().max() < 1e-5


def test_gradients_per_row_reach_only_the_chosen_adapters():
    tuned = three()
    tuned.use("default", "pirate")
    tuned(tiny.batch(tuned)["input_ids"], adapters=["pirate", None, "pirate"]).logits.sum().backward()
    grads = {n.split(".")[1] for n, p in tuned.named_parameters() if p.grad is not None and p.grad.any()}
    assert grads == {"pirate"}


@pytest.mark.parametrize(
    "adapters, message",
    [
        (["pirate"], "1 entries for a batch of 3"),
        (["pirate", None, "prate"], "no adapter 'prate'"),
        (["pirate", None, "head"], "cannot be chosen per row"),
        ("pirate", "not a list"),
    ],
)
def test_a_bad_choice_per_row_changes_nothing(adapters, message):
    tuned = three()
    tuned.use("default")
    output = logits(tuned)
    with pytest.raises((ValueError, TypeError), match=message):
        logits(tuned, adapters=adapters)
    assert torch.equal(logits(tuned), output)


def test_the_choice_per_row_ends_with_the_call_even_when_it_raises():
    tuned = three()
    tuned.use("default")
    output = logits(tuned)
    with pytest.raises(IndexError):
        tuned(torch.full((1, 3), 999), adapters=["pirate"])
    assert torch.equal(logits(tuned), output)
    tuned.base.gradient_checkpointing_enable()
    tuned.train()
    with pytest.raises(ValueError, match="checkpointing"):
        tuned(**tiny.batch(tuned), adapters=["pirate", None, None])


# -- mistakes ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "method, error, message",
    [
        (
            LoRA(rank=17),
            ValueError,
            r"rank=17 is above min\(d_in, d_out\) of 'model.layers.0.self_attn.q_proj', a 16×16",
        ),
        (LoRA(rank=9), ValueError, "k_proj', a 8×16"),
        (LoRA(rank=2, targets=["q_proj", "v_porj"]), ValueError, "v_porj.*v_proj"),
        (LoRA(rank=2, targets=["x_proj"]), ValueError, "v_proj|q_proj"),
        (LoRA(rank=2, targets=["self_attn"]), ValueError, "LlamaAttention"),
        (LoRA(rank=2, targets=[]), ValueError, "empty"),
        (LoRA(rank=2, targets="q_proj"), ValueError, r"\['q_proj'\]"),
        (LoRA(rank=2, targets=re.compile("q_proj")), ValueError, "whole path"),
        (LoRA(rank=2, targets=["q_proj[0:99]"]), ValueError, "outside"),
        (LoRA(rank=2, targets=["q_proj[8:8]"]), ValueError, "outside"),
        (LoRA(rank=2, targets=["q_proj[0:9]", "q_proj[8:]"]), ValueError, "overlap"),
        (LoRA(rank=2, targets=["q_proj", "q_proj[8:]"]), ValueError, "overlap"),
        (LoRA(rank=2, targets=["q_proj[1:2:3]"]), ValueError, "slice"),
        (LoRA(rank=2, targets=[3]), TypeError, "int"),
        ([LoRA(rank=2), LoRA(rank=4, targets=["q_proj"])], ValueError, "q_proj"),
        ([], TypeError, "LoRA"),
        ("lora", TypeError, "LoRA"),
        (LoRA, TypeError, "LoRA"),
        (BitFit(targets=re.compile("nowhere")), ValueError, "no biases"),
        (Full(targets=re.compile("nowhere")), ValueError, "nowhere"),
        (Full(targets=["model.norm.weight", "nowhere"]), ValueError, "'nowhere'"),
    ],
)
def test_a_mistake_leaves_the_model_as_it_was(method, error, message):
    model = tiny.llama()
    with tiny.untouched(model), pytest.raises(error, match=message):
        attach(model, method)
    tuned = attach(model, LoRA(rank=1))
    with tiny.untouched(model), pytest.raises(error, match=message):
        tuned.add("second", method)
    assert list(tuned.adapters) == ["default"]


@pytest.mark.parametrize("name", ["", "a.b", "keys", "train", "training", 3])
def test_names_that_cannot_be_used(name):
    with tiny.untouched(model := tiny.llama()), pytest.raises(ValueError, match="name"):
        attach(model, LoRA(rank=1), name=name)


def test_attaching_twice_and_other_misuse():
    model = tiny.llama()
    tuned = attach(model, LoRA(rank=2))
    for again in (model, tuned, model.model, nn.Sequential(model)):
        with tiny.untouched(model), pytest.raises(ValueError, match="tuned.add"):
            attach(again, LoRA(rank=2))
    with pytest.raises(ValueError, match="in use"):
        tuned.add("default", LoRA(rank=2))
    with pytest.raises(ValueError, match=r"no adapter 'x'.*default"):
        tuned.use("x")
    tuned.merge()
    for refused in (
        lambda: tuned.use("default"),
        lambda: tuned.add("b", LoRA(rank=1)),
        lambda: logits(tuned, adapters=[]),
    ):
        with pytest.raises(ValueError, match="unmerge"):
            refused()
    tuned.detach()
    for refused in (tuned.merge, tuned.detach, lambda: tuned.use("default")):
        with pytest.raises(ValueError, match="detached"):
            refused()
    with pytest.raises(TypeError, match="Module"):
        attach("model", LoRA(rank=2))
    empty = attach(tiny.llama(), LoRA(rank=2))
    empty.use()
    with pytest.raises(ValueError, match="No adapter is active"):
        empty.merge()


# -- merged for good --------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:Merging unties")
@pytest.mark.parametrize("method", [LoRA(rank=2), LoRA(rank=2, targets=["embed_tokens"]), Softmax(), Full()], ids=str)
def test_detach_keeps_merged_weights_and_they_survive_save_pretrained(method, tmp_path):
    model = tiny.llama(tied=True)
    tuned = attach(model, method)
    tiny.randomise(tuned)
    adapted = logits(tuned)
    tuned.merge()
    base = tuned.detach()
    assert (logits(base) - adapted).abs().max() < 1e-5 and tiny.hooks(base) == 0
    assert all(p.requires_grad for p in base.parameters())
    tied = base.lm_head.weight is base.model.embed_tokens.weight
    assert tied == base.config.tie_word_embeddings == (method in (LoRA(rank=2), Full()))
    base.save_pretrained(tmp_path)
    assert (logits(type(base).from_pretrained(tmp_path)) - adapted).abs().max() < 1e-5


def test_merging_a_tied_weight_in_one_place_warns():
    tuned = attach(tiny.llama(), LoRA(rank=2, targets=["embed_tokens"]))
    with pytest.warns(UserWarning, match="unties model.embed_tokens.weight"):
        tuned.merge()
    full = attach(tiny.llama(), Full())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        full.merge()


# -- living in the ecosystem ------------------------------------------------------------------------------------------
def test_importing_attach_does_not_import_transformers():
    code = (
        "import sys, minipeft.attach, minipeft.methods; sys.exit(bool({'transformers', 'peft'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_attributes_fall_through_and_missing_ones_are_named():
    tuned = attach(tiny.llama(), LoRA(rank=2))
    assert tuned.config is tuned.base.config and tuned.device.type == "cpu"
    with pytest.raises(AttributeError, match="nonsense"):
        _ = tuned.nonsense
    columns = list(inspect.signature(tuned.forward).parameters)
    assert {"input_ids", "labels", "attention_mask", "adapters"} <= set(columns) and "self" not in columns


def test_generate_and_disabled():
    tuned = attach(tiny.llama(), LoRA(rank=2))
    ids = tiny.batch(tuned)["input_ids"]
    plain = tiny.llama().generate(ids, max_new_tokens=5, do_sample=False)
    tiny.randomise(tuned, scale=1.0)
    adapted = tuned.generate(ids, max_new_tokens=5, do_sample=False)
    assert not torch.equal(adapted, plain)
    with tuned.disabled(), tuned.disabled():
        assert torch.equal(tuned.generate(ids, max_new_tokens=5, do_sample=False), plain)
    with pytest.raises(RuntimeError), tuned.disabled():
        raise RuntimeError
    assert torch.equal(tuned.generate(ids, max_new_tokens=5, do_sample=False), adapted)


@pytest.mark.parametrize("method", ["lora and head", "full", "bitfit"])
def test_trainer(method, tmp_path):
    from datasets import Dataset
    from safetensors.torch import load_file
    from transformers import Trainer, TrainingArguments

    model = tiny.llama(tied=True)
    before = tiny.snapshot(model)
    tuned = attach(model, METHODS[method])
    ids = tiny.batch(model, rows=8)["input_ids"].tolist()
    data = Dataset.from_dict({"input_ids": ids, "labels": ids, "text": ["not a column of forward"] * 8})
    settings = dict(max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], disable_tqdm=True)
    arguments = TrainingArguments(tmp_path, save_steps=2, use_cpu=True, gradient_checkpointing=True, **settings)
    trainer = Trainer(tuned, arguments, train_dataset=data, eval_dataset=data)
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < start
    trainer.save_model(tmp_path / "final")
    saved = load_file(tmp_path / "final" / "model.safetensors")
    assert saved.keys() == tuned.state_dict().keys() and all(key.startswith("adapters.default.") for key in saved)
    with tuned.disabled():
        assert tiny.same(tiny.snapshot(model), before)
    fresh = attach(tiny.llama(tied=True), METHODS[method], seed=9)
    fresh.load_state_dict(saved)
    assert torch.equal(logits(fresh), logits(tuned.eval()))
    resumed = Trainer(attach(tiny.llama(), METHODS[method], seed=9), arguments, train_dataset=data)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(logits(resumed.model.eval()), logits(tuned), atol=1e-5, rtol=0)


def test_state_dict_is_strict():
    tuned = attach(tiny.llama(), LoRA(rank=2))
    with pytest.raises(RuntimeError, match="Missing"):
        tuned.load_state_dict({})
    assert nn.Sequential(tuned).state_dict().keys() == {f"0.{key}" for key in tuned.state_dict()}


def compiled(method: str) -> tuple[nn.Module, Tuned, nn.Module]:
    """A base of one layer, what is attached to it, with random numbers, and that compiled."""
    torch._dynamo.reset()
    base = tiny.llama()
    del base.model.layers[1:]
    tuned = attach(copy.deepcopy(base), METHODS[method])
    tuned.add("pirate", LoRA(rank=1))
    tiny.randomise(tuned)
    return base, tuned, torch.compile(tuned, backend="aot_eager")


@pytest.mark.slow
def test_compile_follows_every_switch():
    base, tuned, fast = compiled("lora")

    def close(expected):
        torch.testing.assert_close(logits(fast), expected, atol=1e-5, rtol=0)

    close(logits(tuned))
    with tuned.disabled():
        close(logits(base))
    close(logits(tuned))
    with torch.no_grad():
        for p in tuned.adapters.parameters():
            p *= 2
    close(logits(tuned))
    tuned.use("pirate")
    close(logits(tuned))
    tuned.use("default")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned.merge()
    close(logits(tuned))
    tuned.unmerge()
    close(logits(tuned, adapters=["default"] * 3))
    torch.testing.assert_close(logits(fast, adapters=[None] * 3), logits(base), atol=1e-5, rtol=0)
    tuned.detach()
    close(logits(base))
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "dora", "experts", "prompt", "prefix"])
def test_compile(method):
    """One of each kind: a pointer, a hook that needs the plain output, one that chooses, and both kinds of front."""
    base, tuned, fast = compiled(method)
    torch.testing.assert_close(logits(fast), logits(tuned), atol=1e-5, rtol=0)
    with tuned.disabled():
        torch.testing.assert_close(logits(fast), logits(base), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(fast), logits(tuned), atol=1e-5, rtol=0)
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_training_gives_the_same_gradients():
    torch._dynamo.reset()
    tuned = attach(tiny.llama(), METHODS["lora and head"])
    tiny.randomise(tuned)
    grads = []
    for model in (tuned, torch.compile(tuned, backend="aot_eager")):
        tuned.zero_grad()
        model(**tiny.batch(tuned)).loss.backward()
        grads.append([p.grad.clone() for p in tuned.adapters.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    torch._dynamo.reset()


AGAIN = ("lora and head", "adapter, shared", "experts", "p-tuning, lstm")  # a pointer and hooks, a network, a front


@pytest.mark.parametrize("method_name, reentrant", [(name, name in AGAIN) for name in METHODS] + [(AGAIN[0], False)])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant, method_name):
    tuned = attach(tiny.llama(), method_for(method_name, "llama"))
    tiny.randomise(tuned)
    tuned.train()
    grads = []
    if method_name.startswith("prefix"):
        tuned.gradient_checkpointing_enable()
        with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
            tuned(**tiny.batch(tuned))
        return
    for checkpointing in (False, True):
        if checkpointing:
            tuned.gradient_checkpointing_enable({"use_reentrant": reentrant})
            tuned.enable_input_require_grads()
        tuned.zero_grad()
        tuned(**tiny.batch(tuned)).loss.backward()
        grads.append([torch.zeros(()) if p.grad is None else p.grad.clone() for p in tuned.adapters.parameters()])
    assert any(grad.any() for grad in grads[0])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "method_name, merged", [(name, False) for name in METHODS] + [(name, True) for name in MERGEABLE]
)
def test_to_moves_the_originals_too(method_name, merged):
    tuned = attach(tiny.llama(), method_for(method_name, "llama"))
    tiny.randomise(tuned)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _ = merged and tuned.merge()
    adapted = logits(tuned)
    tuned.to(torch.float64)
    assert logits(tuned).dtype == torch.float64
    torch.testing.assert_close(logits(tuned), adapted.double(), atol=1e-5, rtol=0)
    with tuned.disabled():
        assert torch.equal(logits(tuned), logits(tiny.llama().double()))
    assert all(p.dtype == torch.float64 for p in tuned.detach().parameters())


def test_layers_are_float32_over_a_bfloat16_base():
    model = tiny.llama().to(torch.bfloat16)
    base = logits(model)
    tuned = attach(model, [LoRA(rank=2), Softmax()])
    assert torch.equal(logits(tuned), base) and base.dtype == torch.bfloat16
    dtypes = {n.rsplit(".", 1)[1]: p.dtype for n, p in tuned.adapters.named_parameters()}
    assert dtypes == {"A": torch.float32, "B": torch.float32, "value": torch.bfloat16}
    train(tuned, 3)
    assert not torch.equal(logits(tuned), base)
    assert {p.dtype for p in attach(tiny.llama().double(), LoRA(rank=2)).adapters.parameters()} == {torch.float64}


def test_every_method_works_over_a_bfloat16_base(method_name):
    model = tiny.llama().to(torch.bfloat16)
    base = logits(model)
    tuned = attach(model, method_for(method_name, "llama"))
    assert torch.equal(logits(tuned), base) != (method_name in FRONTS), "identity at init"
    hooked = [layer for layer in tuned.adapters["default"].values() if not layer.slots]
    assert all(p.dtype == torch.float32 for layer in hooked for p in layer.parameters())
    tiny.randomise(tuned)
    adapted = logits(tuned)
    assert adapted.dtype == torch.bfloat16 and not torch.equal(adapted, base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _ = method_name in MERGEABLE and tuned.merge()
    assert (logits(tuned) - adapted).abs().max() < 0.05 * adapted.abs().max()
    with tuned.disabled():
        assert torch.equal(logits(tuned), base)


def test_merge_says_what_rounding_took():
    """The smaller ΔW beside W, the more of it bfloat16 swallows; float32 keeps it (peft #1388)."""

    def lost(size: float, dtype: torch.dtype) -> float:
        model = nn.Sequential(nn.Linear(64, 64)).to(dtype)
        tuned = attach(model, LoRA(rank=4))
        layer = tuned.adapters["default"]["0"]
        layer.B.data.normal_()
        layer.B.data *= size * model[0].weight.float().norm() / layer.delta().norm()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            report = tuned.merge()
        assert list(report) == ["0"] and [str(w.message)[:8] for w in caught] == ["Rounding"] * (report["0"] > 0.1)
        stored = tuned.base[0].weight.float()
        with tuned.disabled():
            change = stored - tuned.base[0].weight.float()
        expected = (change - layer.delta()).norm() / layer.delta().norm()
        assert abs(report["0"] - expected) < 1e-3 * report["0"] + 1e-7
        return report["0"]

    assert lost(0.1, torch.float32) < 1e-5 and lost(0.001, torch.float32) < 1e-3
    errors = [lost(size, torch.bfloat16) for size in (0.3, 0.03, 0.003)]
    assert errors[0] < 0.03 < errors[1] < 0.3 < errors[2] < 1.0
    assert attach(tiny.llama(), Full()).merge() == {}


def test_meta_device(method_name):
    method = method_for(method_name, "llama")
    real = attach(tiny.llama(), method)
    with torch.device("meta"):
        model = tiny.llama()
    before = torch.random.get_rng_state()
    tuned = attach(model, method)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(p.is_meta for p in tuned.parameters())
    assert tuned.count() == real.count()
    if method_name in MERGEABLE:
        assert {n: d.shape for n, d in tuned.deltas().items()} == {n: d.shape for n, d in real.deltas().items()}
    assert tuned(**{k: v.to("meta") for k, v in tiny.batch(real).items()}).logits.is_meta


# -- counting ---------------------------------------------------------------------------------------------------------
def test_counts_follow_the_formulas():
    d, kv, ff, L, V = tiny.D, 8, 24, tiny.L, tiny.V
    base = sum(p.numel() for p in tiny.llama().parameters())
    shapes = [(d, d), (kv, d), (kv, d), (d, d), (ff, d), (ff, d), (d, ff)]
    lora = L * sum(2 * (o + i) for o, i in shapes)
    biases = L * sum(o for o, _ in shapes)
    expected = {
        "lora": Count(lora, base + lora),
        "lora and head": Count(lora + V * d, base + lora + V * d),
        "full": Count(base, base),
        "bitfit": Count(biases, base),
        "softmax": Count(V * d, base + V * d),
        "pissa": Count(lora, base + lora),
        "dora": Count(lora + biases, base + lora + biases),
        "projected": Count(3 * biases, base + 3 * biases),
        "vera": Count(biases + 20 * 7 * L, base + biases + 20 * 7 * L),
        "adalora": Count(3 * lora // 2 + 3 * 7 * L, base + 3 * lora // 2 + 3 * 7 * L),
        "ia3": Count(L * (2 * kv + ff), base + L * (2 * kv + ff)),
    }
    for name, count in expected.items():
        assert attach(tiny.llama(tied=True), METHODS[name]).count() == count, name
    untied = sum(p.numel() for p in tiny.llama(tied=False).parameters())
    assert attach(tiny.llama(tied=False), Softmax()).count() == Count(V * d, untied)
    assert str(Count(28_672, 1_021_440)) == "trainable 28,672 of 1,021,440 (2.81 %)"
