"""Several adapters on one model: weighted, deleted, and chosen per row from several threads."""

from __future__ import annotations

import copy
import threading

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

import minipeft as mp

METHODS = {
    "a": mp.LoRA(rank=2),
    "b": mp.DoRA(rank=2, targets="mlp"),
    "c": mp.IA3(),
    "d": mp.VeRA(rank=4, targets="attention"),
}


def model():
    return tiny.llama(tied=False)


def several(**extra):
    base = model()
    names = METHODS | extra
    first, *others = names
    tuned = mp.attach(base, names[first], name=first)
    for name in others:
        tuned.add(name, names[name])
    generator = torch.Generator().manual_seed(3)
    for p in tuned.adapters.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=generator)
    return tuned, tiny.batch(base)


def logits(tuned, batch, **kwargs):
    with torch.no_grad():
        return tuned(**batch, **kwargs).logits


weights = st.dictionaries(st.sampled_from(list(METHODS)), st.floats(-2, 2, width=16), min_size=1)


@settings(max_examples=15, deadline=None)
@given(weights)
def test_a_weighted_sum_is_the_sum_of_the_weighted_changes(given):
    tuned, batch = several()
    apart = {}
    for name in given:
        tuned.use(name)
        apart[name] = tuned.deltas()
    tuned.use(given)
    together = tuned.deltas()
    for path in together:
        expected = sum(given[name] * apart[name][path] for name in given if path in apart[name])
        torch.testing.assert_close(together[path], expected, atol=1e-5, rtol=1e-5)
    out = logits(tuned, batch)
    tuned.merge()
    torch.testing.assert_close(logits(tuned, batch), out, atol=1e-4, rtol=1e-4)


def test_weights_of_zero_and_one():
    tuned, batch = several()
    tuned.use("a", "b")
    both = logits(tuned, batch)
    tuned.use({"a": 1, "b": 1.0})
    assert torch.equal(logits(tuned, batch), both)
    tuned.use({"b": 1.0, "a": 0.0})
    near = logits(tuned, batch)
    tuned.use("b")
    torch.testing.assert_close(near, logits(tuned, batch), atol=1e-6, rtol=0)
    tuned.use({"a": 0.5})
    tuned.use("a")  # a later use counts in full again
    with tuned.disabled():
        base = logits(tuned, batch)
    a = tuned.deltas()
    tuned.use({"a": -0.5})
    assert all(torch.equal(-0.5 * a[path], delta) for path, delta in tuned.deltas().items())
    tuned.use()
    assert torch.equal(logits(tuned, batch), base)


def test_a_bottleneck_may_count_in_part():
    tuned, batch = several(e=mp.Adapter(bottleneck=4))
    with tuned.disabled():
        base = logits(tuned, batch)
    tuned.use("e")
    whole = logits(tuned, batch)
    tuned.use({"e": 0.0})
    assert torch.equal(logits(tuned, batch), base)
    tuned.use({"e": 0.5})
    assert 0 < (logits(tuned, batch) - base).norm() < (whole - base).norm()


@pytest.mark.parametrize(
    ("given", "said"),
    (
        ({"a": float("nan")}, "finite"),
        ({"a": True}, "finite"),
        ({"a": "much"}, "finite"),
        ({"x": 0.5}, "no adapter 'x'"),
        ({"full": 0.5}, "no change that could be weighted"),
        ({"prompt": 2}, "no change that could be weighted"),
    ),
)
def test_a_weight_that_cannot_be_changes_nothing(given, said):
    tuned, batch = several(full=mp.BitFit(), prompt=mp.PromptTuning(length=2))
    tuned.use("a", "full")
    before = logits(tuned, batch)
    with pytest.raises(ValueError, match=said):
        tuned.use(given)
    assert tuned.active == ("a", "full") and torch.equal(logits(tuned, batch), before)


def test_weights_are_copied_and_trained():
    tuned, batch = several()
    tuned.use({"a": 0.25, "c": 2.0})
    again = copy.deepcopy(tuned)
    assert torch.equal(logits(again, batch), logits(tuned, batch))
    tuned(**batch).logits.sum().backward()
    assert all(p.grad is not None for name in ("a", "c") for p in tuned.adapters[name].parameters())
    assert all(p.grad is None for p in tuned.adapters["b"].parameters())


def test_what_counts_in_part_is_saved_in_full_and_said_and_what_counts_for_nothing_does_not_train(tmp_path):
    tuned, batch = several()
    tuned.use({"a": 0.5})
    with pytest.warns(UserWarning, match="'a' counts with 0.5 here; a file holds it in full"):
        tuned.save(tmp_path)
    tuned.use("a")
    assert torch.equal(mp.load_adapter(model(), tmp_path)(**batch).logits, tuned(**batch).logits)
    tuned.use({"a": 0.0, "c": 0.0})
    with pytest.raises(ValueError, match=r"\['a', 'c'\] count with 0, so fit would see the bare base"):
        mp.fit(tuned, ["a text"], steps=1, progress=False)


def test_a_small_weight_is_not_rounded_away_in_bfloat16():
    """Half of a small change in bfloat16: nearer to half of float32's than the base is."""
    wide = mp.attach(model(), mp.LoRA(rank=2))
    tiny.randomise(wide, scale=0.2)
    narrow = copy.deepcopy(wide)
    narrow.base.to(torch.bfloat16)
    batch = tiny.batch(wide.base)
    found = {}
    for name, tuned in (("wide", wide), ("narrow", narrow)):
        with tuned.disabled():
            base = tuned(**batch).logits.float()
        with tuned.using({"default": 0.25}):
            found[name] = tuned(**batch).logits.float() - base
        assert tuned.weights == {"default": 1.0}
    assert (found["narrow"] - found["wide"]).norm() < 0.3 * found["wide"].norm()


# -- delete -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("gone", [*METHODS, "full", "prompt", "adapter", "prefix"])
def test_what_is_deleted_leaves_no_trace(gone):
    extra = {
        "full": mp.BitFit(),
        "prompt": mp.PromptTuning(length=2),
        "adapter": mp.Adapter(bottleneck=2),
        "prefix": mp.PrefixTuning(length=2),
    }
    tuned, batch = several(**extra)
    base = tuned.base
    outputs = {}
    for name in tuned.adapters:
        tuned.use(name)
        outputs[name] = logits(tuned, batch)
    tuned.use(gone)
    tuned.delete(gone)
    with tuned.disabled():
        bare = logits(tuned, batch)
    assert tuned.active == () and torch.equal(logits(tuned, batch), bare)
    assert gone not in tuned.adapters and not any(f".{gone}." in key for key in tuned.state_dict())
    for name in tuned.adapters:
        tuned.use(name)
        assert torch.equal(logits(tuned, batch), outputs[name])
    with pytest.raises(ValueError, match="no adapter"):
        tuned.use(gone)
    tuned.add(gone, extra.get(gone) or METHODS[gone])  # the name is free again
    for name in list(tuned.adapters):
        tuned.delete(name)
    assert torch.equal(logits(tuned, batch), bare) and tuned.count().trainable == 0
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m)) for m in base.modules()]
    assert sum(hooks) == 0, "no hook is left once no adapter is"
    tuned.add("new", mp.LoRA(rank=1))
    tuned.use("new")
    assert torch.equal(logits(tuned, batch), bare)
    assert torch.equal(logits(tuned.detach(), batch), bare)


def test_deleting_keeps_what_is_active_and_how_much_it_counts():
    tuned, batch = several()
    tuned.use({"a": 0.5, "b": 1.0})
    before = logits(tuned, batch)
    tuned.delete("c")
    assert tuned.active == ("a", "b") and torch.equal(logits(tuned, batch), before)
    tuned.use({"a": 0.5})
    alone = logits(tuned, batch)
    tuned.use({"a": 0.5, "b": 1.0})
    tuned.delete("b")
    assert tuned.active == ("a",) and torch.equal(logits(tuned, batch), alone)
    tuned.merge()
    with pytest.raises(ValueError, match="merged"):
        tuned.delete("a")
    with pytest.raises(ValueError, match="no adapter"):
        tuned.unmerge() or tuned.delete("b")


# -- threads -----------------------------------------------------------------------------------------------
def test_threads_do_not_mix_their_rows():
    tuned, _ = several()
    ids = torch.randint(3, tiny.V, (4, 9), generator=torch.Generator().manual_seed(0))
    tuned.use("a")
    choices = [["a", "b", None, "c"], ["d", "d", "a", "b"], [None] * 4, ["c", "a", "b", "a"], None]
    alone = [logits(tuned, {"input_ids": ids}, adapters=choice) for choice in choices]
    wrong, start = [], threading.Barrier(len(choices))

    def ask(i: int) -> None:
        torch.set_num_threads(1)
        start.wait()
        for _ in range(30):
            if not torch.equal(logits(tuned, {"input_ids": ids}, adapters=choices[i]), alone[i]):
                wrong.append(i)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(choices))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("asked", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.t5], ids=["llama", "gpt2", "t5"])
def test_each_prompt_keeps_its_adapter_through_its_beams(make, asked):
    """Each row as if it were alone; T5's encoder sees the prompts, its decoder their beams."""
    tuned = mp.attach(make(), mp.LoRA(rank=2))
    tuned.add("b", mp.LoRA(rank=3))
    for name in ("b", "default"):
        tuned.use(name)
        tiny.randomise(tuned, scale=0.5)
    ids = tiny.batch(tuned.base, rows=3, length=5)["input_ids"]
    asked = asked | {"max_new_tokens": 4, "min_new_tokens": 4}
    rows = ["b", None, "default"]
    for said in (asked, {"generation_config": GenerationConfig(**asked, decoder_start_token_id=0)}):
        got = tuned.generate(ids, adapters=rows, **said).unflatten(0, (3, -1))
        for row, name in enumerate(rows):
            tuned.use(*[name] * (name is not None))
            assert torch.equal(got[row], tuned.generate(ids[row : row + 1], **said))


def test_use_says_how_several_are_named():
    tuned = mp.attach(model(), mp.LoRA(rank=2))
    with pytest.raises(TypeError, match="one by one"):
        tuned.use(["a", "b"])


def test_what_is_attached_in_inference_mode_trains():
    base = model()
    with torch.inference_mode():
        tuned = mp.attach(base, mp.LoRA(rank=2))
    inputs = tiny.batch(base)
    tuned(input_ids=inputs["input_ids"], labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in tuned.parameters() if p.requires_grad)
