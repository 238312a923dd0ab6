"""Bottleneck adapters and experts: where they sit, what they compute, what sharing shares."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F

from minipeft.attach import attach
from minipeft.methods.adapter import ACTIVATIONS, Adapter
from minipeft.methods.experts import Experts
from minipeft.methods.lora import LoRA
from minipeft.methods.prefix import PrefixTuning
from minipeft.methods.prompt import PromptTuning
from minipeft.methods.select import BitFit, Softmax
from minipeft.serve.checkpoint import load_adapter

ATTENTION = {"llama": "self_attn.o_proj", "gpt2": "attn.c_proj", "bert": "attention.output.dense"}
FEED_FORWARD = {"llama": "mlp.down_proj", "gpt2": "mlp.c_proj", "bert": "{}.output.dense"}
READS = {"llama": "mlp", "gpt2": "mlp", "bert": "intermediate"}
BLOCKS = {"llama": "model.layers.{}", "gpt2": "transformer.h.{}", "bert": "bert.encoder.layer.{}"}


def logits(model: nn.Module, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny.batch(model)["input_ids"], **kwargs).logits


def weights(m: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * 0.3 for shape in ((m, tiny.D), (m,), (tiny.D, m), (tiny.D,))]


def by_hand(w: list[torch.Tensor], x: torch.Tensor, activation: str) -> torch.Tensor:
    down, b, up, c = w
    return F.linear(ACTIVATIONS[activation](F.linear(x, down, b)), up, c)


@pytest.mark.parametrize("family", BLOCKS)
@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "parallel"])
def test_the_same_as_plain_hooks_on_the_model(family, placement):
    """An adapter written down again, with PyTorch hooks at places named by hand."""
    tuned = attach(tiny.MODELS[family](), Adapter(5, placement, activation="gelu"))
    plain = tiny.MODELS[family]()
    heard = {}
    for i in range(tiny.L):
        block = BLOCKS[family].format(i)
        for kind, end in (("a", ATTENTION[family]), ("f", FEED_FORWARD[family])):
            path = f"{block}.{end}".replace(f"{block}.{{}}", block)
            layer = tuned.adapters["default"]._modules.get(f"{path}.adapter".replace(".", "/"))
            assert (layer is not None) == (kind == "f" or placement == "houlsby")
            if layer is None:
                continue
            w = weights(5, 2 * i + (kind == "f"))
            numbers = (layer.down.weight, layer.down.bias, layer.up.weight, layer.up.bias)
            for mine, value in zip(numbers, w, strict=True):
                mine.data.copy_(value)

            def after(module, args, output, w=w, i=i):
                return output + by_hand(w, heard[i] if placement == "parallel" else output, "gelu")

            plain.get_submodule(path).register_forward_hook(after)
        reads = plain.get_submodule(f"{block}.{READS[family]}")
        reads.register_forward_pre_hook(lambda module, args, i=i: heard.update({i: args[0]}))
    base = logits(tiny.MODELS[family]())
    assert (logits(tuned) - base).abs().max() > 1e-2
    torch.testing.assert_close(logits(tuned), logits(plain), atol=1e-6, rtol=0)


def test_a_shared_adapter_is_one_and_gets_the_sum_of_the_gradients():
    apart, shared = attach(tiny.llama(), Adapter(4)), attach(tiny.llama(), Adapter(4, share=2, share_within=True))
    tiny.randomise(shared)
    [one] = shared.adapters["default"].values()
    for layer in apart.adapters["default"].values():
        layer.load_state_dict(one.state_dict())
    assert torch.equal(logits(apart), logits(shared))
    for tuned in (apart, shared):
        tuned(**tiny.batch(tuned)).loss.backward()
    four = list(apart.adapters["default"].values())
    assert len(four) == 4 and apart.count().trainable == 4 * shared.count().trainable
    for name, parameter in one.named_parameters():
        torch.testing.assert_close(sum(x.get_parameter(name).grad for x in four), parameter.grad, atol=1e-5, rtol=1e-4)


def test_only_the_top_blocks():
    tuned = attach(tiny.llama(), Adapter(4, top=1))
    assert (
        all(key.startswith("model/layers/1/") for key in tuned.adapters["default"])
        and len(tuned.adapters["default"]) == 2
    )


def test_an_adapter_on_any_model_by_name():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    tuned = attach(model, Adapter(2, ["0"]))
    tiny.randomise(tuned)
    layer = tuned.adapters["default"]["0/adapter"]
    hidden = F.linear(x, model[0].weight, model[0].bias)
    torch.testing.assert_close(tuned(x), F.linear((hidden + layer(hidden)).relu(), model[2].weight, model[2].bias))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Adapter(0), "bottleneck=0"),
        (lambda: Adapter(2, "o_proj"), r"\['o_proj'\]"),
        (lambda: Adapter(2, activation="swish"), "relu, gelu"),
        (lambda: Adapter(2, share=0), "share=0"),
        (lambda: Adapter(2, ["o_proj"], top=1), "give one"),
        (lambda: attach(tiny.llama(), Adapter(2, top=9)), "2 numbered blocks"),
        (lambda: attach(tiny.llama(), Adapter(2, ["x_proj"])), "no layer matches"),
        (lambda: attach(tiny.gpt2(), Adapter(2, ["c_attn[0:16]"])), "slice"),
        (lambda: attach(nn.Sequential(nn.Linear(2, 2)), Adapter(2)), "no numbered blocks"),
        (lambda: attach(tiny.llama(), Adapter(2, ["o_proj", "up_proj"], share=9, share_within=True)), "several widths"),
        (lambda: Experts(experts=2, chosen=3), "chosen=3 is above experts=2"),
        (lambda: Experts(placement="parallel"), "parallel"),
        (lambda: Experts(balance=-1), "balance=-1"),
    ],
)
def test_a_mistake_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# -- experts ----------------------------------------------------------------------------------------------------------
def test_experts_are_a_gated_sum_of_adapters():
    tuned = attach(tiny.llama(), Experts(3, experts=4, chosen=2, activation="gelu"))
    tiny.randomise(tuned, scale=0.5)
    layer = next(iter(tuned.adapters["default"].values()))
    h = torch.randn(6, tiny.D)
    with torch.no_grad():
        found = layer(h)
        for row, x in enumerate(h):
            odds = (layer.router @ x).tolist()
            best = sorted(range(4), key=lambda e: -odds[e])[:2]
            gates = torch.tensor([odds[e] for e in best]).softmax(0)
            numbers = [(layer.down[e], layer.down_bias[e], layer.up[e], layer.up_bias[e]) for e in best]
            expected = sum(g * by_hand(w, x, "gelu") for g, w in zip(gates, numbers, strict=True))
            torch.testing.assert_close(found[row], expected, atol=1e-6, rtol=1e-5)
            assert set(layer.gates[row].nonzero().flatten().tolist()) == set(best)


def test_the_balance_loss_evens_out_the_load_and_leaves_the_reported_loss_alone():
    loads = {}
    for balance in (0.0, 1.0):
        tuned = attach(tiny.llama(), Experts(3, experts=4, chosen=1, top=1, balance=balance))
        [layer] = tuned.adapters["default"].values()
        layer.router.data[0] = 3 * (layer.router.data[0] + 0.3)  # at first most of it goes to one expert
        first = tuned(**tiny.batch(tuned, rows=8)).loss.item()
        assert first == tiny.llama()(**tiny.batch(tuned, rows=8)).loss.item()
        optimizer = torch.optim.Adam([layer.router], lr=0.03)
        for _ in range(60):
            optimizer.zero_grad()
            tuned(**tiny.batch(tuned, rows=8)).loss.backward()
            optimizer.step()
        loads[balance] = layer.load().max().item()
    # without the loss the router does not move: the experts are all zero, so the model does not care
    assert loads[1.0] < 0.35 < 0.5 < loads[0.0], loads


def test_the_load_before_any_call_says_what_to_do():
    layer = next(iter(attach(tiny.llama(), Experts()).adapters["default"].values()))
    with pytest.raises(ValueError, match="call the model once"):
        layer.load()


# -- together with other methods --------------------------------------------------------------------------------------
COMBINATIONS = {
    "adapter, lora": [Adapter(4), LoRA(rank=2)],
    "lora, adapter": [LoRA(rank=2), Adapter(4)],
    "adapter, softmax": [Adapter(4), Softmax()],
    "bitfit, prompt": [BitFit(), PromptTuning(2)],
    "prefix, prompt, lora": [PrefixTuning(2), PromptTuning(2), LoRA(rank=2)],
    "experts, adapter": [Experts(2), Adapter(2, "parallel")],
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_combinations_train_together_and_come_off(name):
    model = tiny.llama()
    base, before = logits(model), tiny.snapshot(model)
    tuned = attach(model, COMBINATIONS[name])
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = tuned(**tiny.batch(tuned)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with tuned.disabled():
        assert torch.equal(logits(tuned), base)
    assert tuned.detach() is model and tiny.same(tiny.snapshot(model), before) and tiny.hooks(model) == 0


def test_an_adapter_sees_the_changed_weight_whichever_came_first():
    """Otherwise merging the LoRA would change what the adapter reads."""
    outputs = []
    for order in ("adapter, lora", "lora, adapter"):
        tuned = attach(tiny.llama(), COMBINATIONS[order])
        for i, (_, parameter) in enumerate(sorted(tuned.adapters.named_parameters())):
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
        outputs.append(logits(tuned))
    assert torch.equal(*outputs)


def test_adapters_can_be_chosen_per_row_and_prompts_say_that_they_cannot():
    tuned = attach(tiny.llama(), Adapter(4))
    tuned.add("other", Adapter(3, "parallel"), seed=1)
    tuned.add("prompt", PromptTuning(2))
    tiny.randomise(tuned)
    ids = tiny.batch(tuned, rows=3)["input_ids"]
    choice = ["other", None, "default"]
    with torch.no_grad():
        together = tuned(ids, adapters=choice).logits
        for row, name in enumerate(choice):
            tuned.use(*[name] if name else [])
            torch.testing.assert_close(together[row], tuned(ids[row : row + 1]).logits[0], atol=1e-5, rtol=0)
        tuned.use("prompt")  # an active prompt steps aside for the call
        assert torch.equal(tuned(ids, adapters=choice).logits, together)
        with pytest.raises(ValueError, match="'prompt' puts tokens in front"):
            tuned(ids, adapters=["prompt", None, None])


@pytest.mark.parametrize("cache", [True, False])
def test_generate_equals_the_argmax_step_by_step(cache):
    for method in (Adapter(4), Adapter(4, "parallel"), Experts(3)):
        tuned = attach(tiny.llama(), method)
        tiny.randomise(tuned, scale=1.0)
        ids = tiny.batch(tuned, rows=2)["input_ids"]
        found = tuned.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=cache)
        for _ in range(5):
            with torch.no_grad():
                odds = tuned(ids).logits[:, -1]
            odds[:, 2] = -torch.inf  # min_new_tokens forbids the end
            ids = torch.cat([ids, odds.argmax(-1, keepdim=True)], 1)
        assert torch.equal(found, ids)


# -- files ------------------------------------------------------------------------------------------------------------
def test_several_settings_in_one_file(tmp_path):
    tuned = attach(tiny.llama(), [Adapter(4, "pfeiffer"), Adapter(2, ["o_proj"], activation="tanh")])
    tiny.randomise(tuned)
    tuned.save(tmp_path)
    assert torch.equal(logits(load_adapter(tiny.llama(), tmp_path)), logits(tuned))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(bottleneck=10**9), "no numbers of the size"),
        (dict(bottleneck="four"), "bottleneck='four'"),
        (dict(placement=3), "wrong type|placement"),
        (dict(colour="red"), "settings of Adapter"),
        (dict(top=1), "no place"),
    ],
)
def test_damaged_settings_are_refused(change, message, tmp_path):
    import json

    attach(tiny.llama(), Adapter(4)).save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["methods"][0] |= change
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with tiny.untouched(model := tiny.llama()), pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
