"""What a module reads for itself: PyTorch's attention and stacks of experts compute with W + ΔW, on whatever way."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from architectures import ARCHITECTURES
from tiny import randomise
from torch import nn

import minipeft as mp
from minipeft.analyze.spectrum import base_weight, spectra, truncated

pytestmark = pytest.mark.filterwarnings("ignore:.*nested tensors|.*does not reach|.*enable_nested_tensor")
METHODS = {
    "LoRA": lambda names: mp.LoRA(rank=2, targets=names),
    "orthogonal LoRA": lambda names: mp.LoRA(rank=1, gamma=-0.5, init="orthogonal", targets=names),
    "DoRA": lambda names: mp.DoRA(rank=2, targets=names),
    "IA3, outputs": lambda names: mp.IA3(targets=names, feedforward=()),
    "IA3, inputs": lambda names: mp.IA3(targets=(), feedforward=names),
}
KINDS = {
    "batch first": dict(batch_first=True),
    "time first": dict(),
    "no bias": dict(bias=False),
    "other widths": dict(kdim=6, vdim=5, batch_first=True),
    "other widths, no bias": dict(kdim=6, vdim=5, bias=False),
    "more keys": dict(add_bias_kv=True, add_zero_attn=True),
    "one head": dict(num_heads=1),
}


def seeded(build):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


class Cross(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.zeta = nn.MultiheadAttention(**dict(embed_dim=8, num_heads=2) | settings)
        self.alpha = nn.Linear(8, 3)

    def forward(self, q, k, v, **more):
        return self.alpha(self.zeta(q, k, v, **more)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_attention_computes_with_what_merging_gives(method, kind, tmp_path):
    """In every way of calling it; the base comes back to the bit, and so does the file."""
    model = seeded(lambda: Cross(**KINDS[kind]))
    a, b, c = drawn(3, 3, 8), drawn(3, 3, model.zeta.kdim), drawn(3, 3, model.zeta.vdim)
    hidden = torch.tensor([[False, False, True]] * 3)
    ways = {
        "plain": ((a, b, c), {}),
        "no weights": ((a, b, c), dict(need_weights=False)),
        "padding": ((a, b, c), dict(key_padding_mask=hidden)),
        "mask": ((a, b, c), dict(attn_mask=torch.full((3, 3), -1.5).triu(1))),
        "by name": ((), dict(q=a, k=b, v=c)),
        "unbatched": ((a[0], b[0], c[0]), {}),
    } | ({"self": ((a, a, a), {})} if model.zeta._qkv_same_embed_dim else {})
    before = {way: model(*args, **how) for way, (args, how) in ways.items()}
    tuned = mp.attach(model, METHODS[method](["zeta"]))
    randomise(tuned, scale=0.4)
    tuned.save(tmp_path)
    out = {way: tuned(*args, **how) for way, (args, how) in ways.items()}
    with torch.no_grad():
        quick = {way: tuned(*args, **how) for way, (args, how) in ways.items()}
    tuned.merge()
    for way, (args, how) in ways.items():
        assert (out[way] - before[way]).abs().max() > 1e-3, way
        torch.testing.assert_close(tuned(*args, **how), out[way], atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(quick[way], out[way], atol=2e-6, rtol=1e-5)
    tuned.unmerge()
    sum(y.square().sum() for y in out.values()).backward()
    assert all(p.grad is not None and p.grad.any() for p in tuned.adapters.parameters())
    base = tuned.detach()
    for way, (args, how) in ways.items():
        torch.testing.assert_close(base(*args, **how), before[way], atol=0, rtol=0)
    again = mp.load_adapter(base, tmp_path)
    assert torch.equal(again(a, b, c), out["plain"])


@pytest.mark.parametrize("kind", ["more keys", "other widths"])
def test_ia3_scales_what_it_says(kind):
    """k' = l ⊙ (W_k·x + b_k) and so on, each with its own part of the bias, put there by hand."""
    model = seeded(lambda: Cross(**KINDS[kind]))
    a, b, c = drawn(2, 3, 8), drawn(2, 3, model.zeta.kdim), drawn(2, 3, model.zeta.vdim)
    for part, name in enumerate(("q", "k", "v")):
        rows, scale = slice(8 * part, 8 * part + 8), drawn(8)
        whole = model.zeta._qkv_same_embed_dim
        tuned = mp.attach(
            model, mp.IA3([f"in_proj_weight[{8 * part}:{8 * part + 8}]" if whole else f"{name}_proj_weight"], ())
        )
        tuned.layers()[0].l.data.copy_(scale[:, None])
        found = tuned(a, b, c)
        tuned.detach()
        by_hand = copy.deepcopy(model)
        with torch.no_grad():
            weight = by_hand.zeta.in_proj_weight[rows] if whole else getattr(by_hand.zeta, f"{name}_proj_weight")
            weight *= scale[:, None]
            by_hand.zeta.in_proj_bias[rows] *= scale
        torch.testing.assert_close(found, by_hand(a, b, c), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", ["LoRA", "DoRA", "IA3, outputs"])
def test_no_fast_path_goes_past_an_adapter(method):
    """An encoder of PyTorch's, with a padding mask and without, learning or not, alone or compiled."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    model = seeded(lambda: nn.TransformerEncoder(layer, 2))
    padding = torch.tensor([[False] * 4, [False, False, True, True]])
    x, real = drawn(2, 4, 8), ~padding
    for names in (["self_attn"], ["self_attn", "linear1"], ["linear2"]):
        tuned = mp.attach(copy.deepcopy(model), METHODS[method](names))
        randomise(tuned, scale=0.3)
        for mask in (None, padding):
            out = tuned(x, src_key_padding_mask=mask)
            assert (out - model(x, src_key_padding_mask=mask))[real].abs().max() > 1e-3
            with torch.no_grad():
                quick = tuned(src=x, src_key_padding_mask=mask)
            torch.testing.assert_close(quick[real], out[real], atol=2e-6, rtol=1e-5)
            out.square().sum().backward()
            assert all(p.grad.any() for p in tuned.adapters.parameters())
        tuned.merge()
        torch.testing.assert_close(tuned(x, src_key_padding_mask=padding)[real], out[real], atol=2e-6, rtol=1e-5)
        tuned.unmerge()
        base = tuned.detach()
        assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in base.modules())


@pytest.mark.parametrize(
    "method",
    [mp.LoRA(2, targets=["self_attn"]), mp.LoRA(2, targets=["linear2"]), mp.Adapter(2), mp.Experts(2)],
    ids=lambda method: type(method).__name__,
)
def test_disabled_the_base_takes_its_fast_path_again(method):
    """Where it gives other bits than the way that an adapter needs, and is taken by weights that require no gradient,
    or when none is recorded."""
    layer = nn.TransformerEncoderLayer(96, 2, 12, dropout=0.0, batch_first=True)
    model = seeded(lambda: nn.TransformerEncoder(layer, 2)).requires_grad_(False)
    short = torch.tensor([[False] * 4, [False, False, True, True]])
    x, masks = drawn(2, 4, 96), (None, short, short.flip(1))
    tuned = mp.attach(copy.deepcopy(model), method)
    randomise(tuned, scale=0.3)

    def outputs(of: nn.Module) -> list[torch.Tensor]:
        return [of(x, src_key_padding_mask=mask).nan_to_num() for mask in masks]

    adapted = outputs(tuned)
    sum(y.square().sum() for y in adapted).backward()
    assert all(p.grad is not None and p.grad.any() for p in tuned.adapters.parameters()), "all of it acts"
    for gradients in (True, False):
        with tuned.disabled(), torch.set_grad_enabled(gradients):
            tuned.add(f"another {gradients}", method)
            assert all(map(torch.equal, outputs(tuned), outputs(model)))
    assert all(map(torch.equal, outputs(tuned), adapted)), "the hooks are back"


def test_several_adapters_of_attention():
    """They add up as their weights say, come and go, and calls from several threads do not meet."""
    model = seeded(Cross)
    a, b = drawn(4, 2, 8), drawn(4, 2, 8).flip(0)
    bare = model(a, b, b)
    tuned = mp.attach(model, mp.LoRA(rank=2, targets=["zeta"]))
    tuned.add("queries", mp.DoRA(rank=1, targets=["in_proj_weight[0:8]", "alpha"]))
    randomise(tuned, scale=0.4)
    tuned.use({"default": 0.7, "queries": -0.5})
    found = spectra(tuned)
    for name, delta in tuned.deltas().items():
        torch.testing.assert_close(found[name].truncate(8).matrix(), delta, atol=1e-5, rtol=0)
        assert base_weight(tuned, name).shape == delta.shape
    with pytest.raises(ValueError, match="read by 'zeta' itself"), truncated(tuned, 1):
        pass
    W = {name: 0.7 * d for name, d in tuned.deltas().items()}
    out = tuned(a, b, b)
    tuned.merge()
    torch.testing.assert_close(tuned(a, b, b), out, atol=2e-6, rtol=1e-5)
    tuned.unmerge()
    assert W.keys() == {"zeta.in_proj_weight", "zeta.out_proj", "alpha"}
    results: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: results.extend(tuned(a, b, b) for _ in range(20))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80 and all(torch.equal(each, out) for each in results)
    with pytest.raises(ValueError, match="the same for all rows"):
        tuned(a, b, b, adapters=["default"] * 4)
    tuned.delete("default")
    tuned.delete("queries")
    assert torch.equal(model(a, b, b), bare) and "forward" not in vars(model.zeta)


@pytest.mark.parametrize("name", ["Mixtral", "gpt-oss", "DeepSeek-V3", "Phi-MoE", "Qwen3-Next", "JetMoe"])
def test_experts_compute_with_what_merging_gives(name):
    """Each token of each expert, whatever way transformers multiplies; a bf16 base, too, within its rounding."""
    one = ARCHITECTURES[name]
    model, ids = one.model(), one.batch()["input_ids"]
    stacks = ["experts"] if name != "JetMoe" else ["experts.input_linear", "experts.output_linear"]
    bare = model(ids).logits
    tuned = mp.attach(model, mp.LoRA(rank=2, targets=stacks))
    count = sum(2 * len(layer.A) * sum(getattr(layer.owner[0], layer.parameter).shape[1:]) for layer in tuned.layers())
    assert tuned.count().trainable == count and torch.equal(tuned(ids).logits, bare)
    randomise(tuned, scale=0.3)
    ways = ("eager", "batched_mm", "grouped_mm") if name != "JetMoe" else (None,)
    for way in ways:
        if way:
            model.set_experts_implementation(way)
        out = tuned(ids).logits
        assert (out - bare).abs().max() > 1e-3
        tuned.merge()
        torch.testing.assert_close(tuned(ids).logits, out, atol=2e-5, rtol=1e-4)
        tuned.unmerge()
    tuned(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in tuned.adapters.parameters())
    found = spectra(tuned)
    stack, delta = next(iter(tuned.deltas().items()))
    torch.testing.assert_close(found[f"{stack}[3]"].truncate(2).matrix(), delta[3], atol=1e-5, rtol=0)
    assert name == "JetMoe" or torch.equal(base_weight(tuned, f"{stack}[3]"), model.get_parameter(stack)[3])
    shapes = {f"{path}.weight".removesuffix("_proj.weight"): delta.shape for path, delta in tuned.deltas().items()}
    assert shapes.items() <= {n.removesuffix("_proj"): p.shape for n, p in one.model().named_parameters()}.items()
    base = tuned.detach()
    if ways[0]:
        base.set_experts_implementation(one.model().config._experts_implementation)
    assert torch.equal(base(ids).logits, bare)


def test_what_cannot_be_exact_is_refused():
    model = seeded(Cross)
    mixture = ARCHITECTURES["Mixtral"].model()
    replaced = seeded(Cross)
    replaced.zeta.forward = lambda *args, **kwargs: nn.MultiheadAttention.forward(replaced.zeta, *args, **kwargs)
    for where, method, said in (
        (model, mp.LoRA(rank=2, dropout=0.1, targets=["zeta"]), "no input can be dropped"),
        (model, mp.LoRA(rank=2, init="pissa", targets=["zeta"]), "read by its module itself"),
        (model, mp.LoRA(rank=9, targets=["zeta"]), "use at most 8"),
        (model, mp.LoRA(rank=2, targets=["zeta[0:8]"]), "no layer matches"),
        (model, mp.LoRA(rank=2, targets=["in_proj_weight[0:25]"]), "outside"),
        (model, mp.VeRA(rank=2, targets=["zeta"]), "MultiheadAttention"),
        (replaced, mp.LoRA(rank=2, targets=["zeta"]), "replaced the forward"),
        (mixture, mp.DoRA(rank=2, targets=["experts"]), "a stack of them; use LoRA"),
        (mixture, mp.IA3(targets=["experts"], feedforward=()), "a stack of them; use LoRA"),
        (mixture, mp.LoRA(rank=2, targets=["gate_up_proj[0:4]"]), "no part can be named"),
    ):
        with pytest.raises(ValueError, match=said):
            mp.attach(where, method)
        assert all(p.requires_grad for p in where.parameters())
    with pytest.warns(UserWarning, match="LoRA reaches them by name"):
        mp.attach(mixture, mp.LoRA(rank=2))
    assert list(mp.attach(model, mp.LoRA(rank=2)).deltas()) == ["alpha"], "attention is named, or left alone"
