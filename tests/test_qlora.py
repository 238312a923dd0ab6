"""QLoRA: a quantised base against the dense base of the same rounded weights, and what `attach` promises, over it."""

from __future__ import annotations

import copy
import pickle
import re
import warnings

import pytest
import tiny
import torch
from torch import nn

import minipeft as mp
from minipeft.attach import attach
from minipeft.methods import nf4
from minipeft.methods.lora import LoRA
from minipeft.methods.qlora import QuantizedLinear, quantize
from minipeft.methods.select import BitFit, Full, Softmax
from minipeft.serve.checkpoint import load_adapter
from minipeft.targets import flipped, resolve

METHODS = {
    "lora": LoRA(rank=2),
    "lora on attention": LoRA(rank=3, alpha=4, rank_stabilized=True, targets="attention"),
    "lora and head": [LoRA(rank=2), Softmax()],
    "biases": BitFit(),
}


@pytest.fixture(params=tiny.MODELS)
def family(request) -> str:
    return request.param


def logits(model: nn.Module, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(**{k: v for k, v in tiny.batch(model).items() if k != "labels"}, **kwargs).logits


@torch.no_grad()
def rounded(model: nn.Module, **options) -> nn.Module:
    """The dense model whose linear weights went through the code and back: what a quantised model must compute."""
    for target in resolve(model, "all-linear"):
        weight = target.module.weight
        stored = nf4.quantize(weight.T if flipped(target.module) else weight, **options).dequantize()
        weight.copy_(stored.T if flipped(target.module) else stored)
    return model


def gradients(tuned) -> dict[str, torch.Tensor]:
    tuned.zero_grad()
    tuned(**tiny.batch(tuned)).loss.backward()
    return {name: p.grad.clone() for name, p in tuned.named_parameters() if p.grad is not None}


def train(tuned, steps: int = 10) -> list[float]:
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = tuned(**tiny.batch(tuned)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# -- one layer --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("code", [nf4.normal_float(), nf4.integer(3), nf4.normal_float(2), nf4.floating(4, 3)], ids=len)
@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_is_the_dense_layer_of_its_dequantised_weight(code, bias):
    plain = nn.Sequential(nn.Linear(13, 7, bias=bias))
    dense, model = rounded(copy.deepcopy(plain), code=code), quantize(copy.deepcopy(plain), code=code)
    layer = model[0]
    assert isinstance(layer, QuantizedLinear) and torch.equal(layer.weight, dense[0].weight)
    assert not torch.equal(layer.weight, plain[0].weight)
    x = torch.randn(2, 5, 13, requires_grad=True)
    for each in (dense, model):
        each[0].requires_grad_(False)
        if bias:
            each[0].bias.requires_grad_(True)
    g = torch.randn(2, 5, 7)
    inputs = [x, *([dense[0].bias] if bias else [])]
    expected = torch.autograd.grad(dense(x), inputs, g)
    assert torch.equal(model(x), dense(x))
    for mine, theirs in zip(
        torch.autograd.grad(model(x), [x, *([layer.bias] if bias else [])], g), expected, strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_gradcheck():
    layer = quantize(nn.Sequential(nn.Linear(9, 5).double()))[0]
    x = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    layer.bias.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x, bias: layer(x), (x, layer.bias))


def saved_bytes(model: nn.Module, x: torch.Tensor) -> dict[int, int]:
    """{storage: bytes} of all that autograd keeps for backward, whoever owns it."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x).sum().backward()
    return kept


def test_nothing_of_the_dense_size_is_kept_for_backward():
    d_in, d_out = 512, 384
    plain = nn.Sequential(nn.Linear(d_in, d_out))
    x = torch.randn(1, d_in, requires_grad=True)
    dense = d_in * d_out * 4
    assert max(saved_bytes(attach(copy.deepcopy(plain), LoRA(rank=2)), x).values()) == dense, "plain LoRA keeps W"
    tuned = attach(quantize(plain), LoRA(rank=2))
    kept = saved_bytes(tuned, x)
    own = {p.untyped_storage()._cdata for p in tuned.base.parameters()}
    assert max(kept.values()) == d_in * d_out // 2, "the packed codes"
    assert sum(size for storage, size in kept.items() if storage not in own) < dense / 50, "and only x, A and B beside"
    assert not any(p.grad is not None for p in tuned.base.parameters())


def test_a_training_step_never_holds_two_dense_weights():
    from minipeft.learn.peak import PeakMemory

    d, layers = 512, 6
    model = quantize(nn.Sequential(*[nn.Linear(d, d) for _ in range(layers)]))
    tuned = attach(model, LoRA(rank=2))
    x = torch.randn(1, d, requires_grad=True)
    with PeakMemory(tuned.parameters()) as memory:
        start = memory.live
        tuned(x).sum().backward()
    assert d * d * 4 < memory.peak - start < 1.6 * d * d * 4, "one dense weight and the index that looks it up"


# -- a model ----------------------------------------------------------------------------------------------------------
def test_a_quantised_model_computes_what_its_rounded_twin_computes(family):
    twin, model = rounded(tiny.MODELS[family]()), quantize(tiny.MODELS[family]())
    torch.testing.assert_close(logits(model), logits(twin), atol=1e-5, rtol=0)
    assert (logits(model) - logits(tiny.MODELS[family]())).abs().max() > 1e-3, "it is lossy"
    for method in (LoRA(rank=2), [LoRA(rank=2), Softmax() if family == "t5" else BitFit()]):  # T5 has no biases
        tuned = [attach(each, method) for each in (copy.deepcopy(twin), copy.deepcopy(model))]
        for each in tuned:
            tiny.randomise(each)
        expected, found = map(gradients, tuned)
        assert expected.keys() == found.keys() and expected
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:Merging unties", "ignore:Rounding")
@pytest.mark.parametrize("method", METHODS)
def test_invariants(family, method, tmp_path):
    if (family, method) == ("t5", "biases"):
        pytest.skip("T5 has no biases")
    model, method = quantize(tiny.MODELS[family]()), METHODS[method]
    before, base = tiny.snapshot(model), logits(model)
    flags = [p.requires_grad for p in model.parameters()]
    tuned = attach(model, method)
    assert torch.equal(logits(tuned), base), "identity at init"
    losses = train(tuned)
    assert losses[-1] < losses[0]
    tiny.randomise(tuned)
    adapted = logits(tuned)
    assert (adapted - base).abs().max() > 1e-2
    with tuned.disabled():
        assert torch.equal(logits(tuned), base)
        assert tiny.same(tiny.snapshot(model), before), "codes and scales are bit-identical after the steps"
    for clone in (copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned))):
        assert torch.equal(logits(clone), adapted)
    tuned.merge()
    assert not torch.equal(logits(tuned), base)
    with tuned.disabled():
        assert torch.equal(logits(tuned), base)
    tuned.unmerge()
    assert torch.equal(logits(tuned), adapted)
    tuned.save(tmp_path)
    again = load_adapter(quantize(tiny.MODELS[family]()), tmp_path)
    assert torch.equal(logits(again), adapted)
    back = tuned.detach()
    assert back is model and torch.equal(logits(back), base) and tiny.same(tiny.snapshot(back), before)
    assert [p.requires_grad for p in back.parameters()] == flags and tiny.hooks(back) == 0


def test_adapters_move_between_a_quantised_and_a_plain_base(family, tmp_path):
    for first, second in ((quantize, lambda m: m), (lambda m: m, quantize)):
        tuned = attach(first(tiny.MODELS[family]()), LoRA(rank=2))
        tiny.randomise(tuned)
        tuned.save(tmp_path)
        other = load_adapter(second(tiny.MODELS[family]()), tmp_path)
        assert tiny.same(dict(other.deltas()), dict(tuned.deltas()))
        expected = attach(second(tiny.MODELS[family]()), LoRA(rank=2))
        tiny.randomise(expected)
        assert torch.equal(logits(other), logits(expected))


def test_peft_reads_an_adapter_that_was_trained_over_a_quantised_base(family, tmp_path):
    peft = pytest.importorskip("peft")
    tuned = attach(quantize(tiny.MODELS[family]()), LoRA(rank=2))
    train(tuned)
    tuned.save(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(rounded(tiny.MODELS[family]()), tmp_path).eval()
    inputs = tiny.batch(tuned)
    with torch.no_grad():
        torch.testing.assert_close(theirs(**inputs).logits, logits(tuned), atol=1e-5, rtol=0)


def test_rows_stacks_and_switches():
    tuned = attach(quantize(tiny.llama()), LoRA(rank=2))
    tuned.add("pirate", LoRA(rank=3, targets=["q_proj", "down_proj"]), seed=1)
    tiny.randomise(tuned)
    tuned.use("default", "pirate")
    q = "model.layers.0.self_attn.q_proj"
    deltas = tuned.deltas()
    tuned.use("pirate")
    assert not torch.equal(tuned.deltas()[q], deltas[q])
    ids = tiny.batch(tuned)["input_ids"]
    together = logits(tuned, adapters=["pirate", None, "default"])
    for row, name in enumerate(["pirate", None, "default"]):
        tuned.use(*[name] if name else [])
        with torch.no_grad():
            torch.testing.assert_close(together[row], tuned(ids[row : row + 1]).logits[0], atol=1e-5, rtol=0)
    assert tuned.generate(ids, max_new_tokens=2, do_sample=False).shape == (3, 9)


def test_counts_are_those_of_the_plain_base(family):
    for name, method in METHODS.items():
        if (family, name) == ("t5", "biases"):
            continue  # it has none
        plain = attach(tiny.MODELS[family](), method).count()
        assert attach(quantize(tiny.MODELS[family]()), method).count() == plain
    with torch.device("meta"):
        model = tiny.MODELS[family]()
    assert attach(quantize(model), LoRA(rank=2)).count() == attach(tiny.MODELS[family](), LoRA(rank=2)).count()


# -- merging ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scale", [0.003, 1.0])
def test_merging_rounds_again_and_says_what_that_took(scale):
    model = quantize(tiny.llama())
    tuned = attach(model, LoRA(rank=2))
    tiny.randomise(tuned, scale=scale)
    base, deltas = {p: model.get_submodule(p).weight for p in tuned.deltas()}, tuned.deltas()
    with pytest.warns(UserWarning, match=r"loses \d+ % of ΔW at .*keep the adapter apart"):
        lost = tuned.merge()
    assert lost.keys() == deltas.keys()
    for path, delta in deltas.items():
        kept = model.get_submodule(path).weight
        assert torch.equal(kept, nf4.quantize(base[path] + delta).dequantize()), "dequantise, add, requantise"
        assert lost[path] == pytest.approx(((kept - base[path] - delta).norm() / delta.norm()).item(), rel=1e-4)
    worst = max(lost.values())
    assert worst > 0.9 if scale < 0.01 else 0.05 < worst < 0.9, "a ΔW below the code's steps is lost"
    kept = logits(tuned)
    merged = tuned.detach()
    assert torch.equal(logits(merged), kept) and isinstance(merged.model.layers[0].mlp.up_proj, QuantizedLinear)
    assert {p.dtype for p in merged.model.layers[0].mlp.up_proj.parameters()} == {torch.uint8, torch.float32}


# -- living in the ecosystem ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_to_leaves_the_bytes_alone(dtype):
    model = quantize(tiny.llama())
    stored = {n: p.clone() for n, p in model.named_parameters() if p.dtype == torch.uint8}
    output = logits(model)
    tuned = attach(model, LoRA(rank=2)).to(dtype)
    assert len(stored) == 4 * 7 * tiny.L and all(
        torch.equal(dict(model.named_parameters())[n], stored[n]) for n in stored
    )
    assert logits(tuned).dtype == dtype
    torch.testing.assert_close(logits(tuned).float(), output, atol=1e-5 if dtype == torch.float64 else 0.1, rtol=0)


def test_a_bfloat16_base_computes_in_bfloat16():
    model = quantize(tiny.llama().to(torch.bfloat16))
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    tuned = attach(model, LoRA(rank=2))
    assert {p.dtype for p in tuned.adapters.parameters()} == {torch.float32} and logits(tuned).dtype == torch.bfloat16
    losses = train(tuned)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    tuned = attach(quantize(tiny.llama()), LoRA(rank=2))
    tiny.randomise(tuned)
    tuned.train()
    expected = gradients(tuned)
    tuned.gradient_checkpointing_enable({"use_reentrant": reentrant})
    tuned.enable_input_require_grads()
    found = gradients(tuned)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_compiling_gives_the_same_gradients():
    torch._dynamo.reset()
    targets = ["0.mlp.up_proj", "1.self_attn.v_proj"]
    tuned = attach(quantize(tiny.llama(), targets), LoRA(rank=2, targets=targets))
    tiny.randomise(tuned)
    expected = gradients(tuned)
    tuned.zero_grad()
    torch.compile(tuned, backend="aot_eager")(**tiny.batch(tuned)).loss.backward()
    torch._dynamo.reset()
    for name, p in tuned.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, expected[name], atol=1e-5, rtol=0)


def test_state_dict_comes_back_under_other_numbers():
    model, other = quantize(tiny.llama()), quantize(tiny._fresh(type(tiny.llama()), tiny.llama().config))
    for p in other.parameters():
        p.data.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))


def test_a_module_that_is_used_twice_stays_one_module():
    linear = nn.Linear(8, 8)
    model = quantize(nn.ModuleDict({"a": linear, "b": nn.ModuleDict({"c": linear})}), targets=["a"])
    assert isinstance(model["a"], QuantizedLinear) and model["b"]["c"] is model["a"]
    assert quantize(nn.Sequential(nn.Linear(8, 8)).eval())[0].training is False


def test_fit_trains_over_the_quantised_pocket_model():
    model = quantize(tiny.small())
    history = mp.fit(attach(model, mp.LoRA(rank=4)), mp.world.pirate(), steps=8, progress=False)
    assert history.losses[-1] < history.losses[0] and history.peak_memory > 0


def test_its_size():
    model = mp.quantize(tiny.small())
    dense = sum(p.nbytes for p in tiny.small().parameters())
    linear = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    bits = 8 * sum(p.nbytes for m in linear for n, p in m.named_parameters() if n != "bias")
    assert bits / sum(m.in_features * m.out_features for m in linear) == pytest.approx(4.127, abs=0.15)
    assert sum(p.nbytes for p in model.parameters()) < dense
    assert "bits=4.1" in repr(linear[0])


# -- mistakes ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "targets, options, message",
    [
        (["q_porj"], {}, "q_porj"),
        (["embed_tokens"], {}, "is an embedding"),
        (["q_proj[0:8]"], {}, "is a slice"),
        (["q_proj", "lm_head"], {}, "tied to another"),
        ("all-linear", {"block": 12}, "block=12"),
        (["up_proj"], {}, "NaN or infinite"),
    ],
)
def test_a_mistake_leaves_the_model_as_it_was(targets, options, message):
    model = tiny.llama()
    if "NaN" in message:
        model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("inf")
    with tiny.untouched(model), pytest.raises(ValueError, match=message):
        quantize(model, targets, **options)


def test_other_mistakes():
    model = tiny.llama()
    tuned = attach(model, LoRA(rank=1))
    for each in (model, tuned):
        with tiny.untouched(model), pytest.raises(ValueError, match="carries adapters"):
            quantize(each)
    quantize(tuned.detach())
    with tiny.untouched(model), pytest.raises(ValueError, match="quantised already"):
        quantize(model)
    with pytest.raises(ValueError, match="nn.Sequential"):
        quantize(nn.Linear(8, 8))
    with pytest.raises(TypeError, match="Module"):
        quantize("pocket")
    untied = quantize(tiny.llama(tied=False), targets=["lm_head"])
    with tiny.untouched(untied), pytest.raises(ValueError, match="uint8 numbers, which cannot train"):
        attach(untied, Softmax())


def test_full_is_refused_and_what_is_not_quantised_can_be_named():
    base = quantize(tiny.llama())
    with tiny.untouched(base), pytest.raises(ValueError, match="q_proj' is stored in few bits, which have no gradient"):
        attach(base, Full())
    tuned = attach(base, Full(targets=re.compile(r".*(norm|embed_tokens).*")))
    names = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert names and not [name for name in names if re.search("packed|scale", name)]


# -- bitsandbytes -----------------------------------------------------------------------------------------------------
def test_bitsandbytes_computes_the_same_layer():
    bnb = pytest.importorskip("bitsandbytes", reason="needs pip install bitsandbytes")
    plain = nn.Linear(128, 64)
    theirs = bnb.nn.Linear4bit(128, 64, quant_type="nf4", compress_statistics=True, compute_dtype=torch.float32)
    theirs.load_state_dict(plain.state_dict())
    theirs = theirs.to("cpu")
    mine = quantize(nn.Sequential(copy.deepcopy(plain)))[0]
    x = torch.randn(5, 128, requires_grad=True)
    outputs = [layer(x) for layer in (mine, theirs)]
    torch.testing.assert_close(*outputs, atol=1e-6, rtol=0)
    torch.testing.assert_close(*[torch.autograd.grad(y.square().sum(), x)[0] for y in outputs], atol=1e-5, rtol=0)
    assert (mine(x) - plain(x)).abs().max() > 1e-2
