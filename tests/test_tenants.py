"""A bank of adapters: every row gets what it would get alone, whoever else is in the batch or in memory."""

from __future__ import annotations

import os
import shutil
import threading
import time

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minipeft as mp
from minipeft.serve import tenants
from minipeft.serve.checkpoint import WEIGHTS
from minipeft.serve.rows import gather, parts_of
from minipeft.serve.tenants import Bank

METHODS = {  # different ranks, γ and places; names that are not in alphabetical order
    "wide": mp.LoRA(rank=5, gamma=0.5, targets="attention"),
    "all": mp.LoRA(rank=2, gamma=3.0),
    "one": mp.LoRA(rank=1, gamma=-2.0, targets="mlp"),
    "dora": mp.DoRA(rank=3),
    "ia3": mp.IA3(),
}


def adapters(folder, base, methods=METHODS, seed: int = 1, scale: float = 0.3):
    """Writes an adapter for each method into the folder, and gives the Tuned that holds all of them."""
    first, *others = methods
    tuned = mp.attach(base, methods[first], name=first)
    for name in others:
        tuned.add(name, methods[name])
    tiny.randomise(tuned, seed, scale)
    for name in methods:
        tuned.save(folder / name, name)
    return tuned


@pytest.fixture(scope="module", params=["llama", "gpt2", "classifier"])
def house(request, tmp_path_factory):
    """A folder of adapters, a Tuned that has them all, and a bank over the same base."""
    folder = tmp_path_factory.mktemp(request.param)
    tuned = adapters(folder, tiny.MODELS[request.param]())
    return tuned, Bank(tiny.MODELS[request.param](), folder)


def alone(tuned, name, **inputs) -> torch.Tensor:
    tuned.use(*([name] if name else []))
    with torch.no_grad():
        return tuned(**inputs).logits


def left_padded(ids: torch.Tensor, lengths: list[int]) -> dict[str, torch.Tensor]:
    mask = torch.arange(ids.shape[1]) >= ids.shape[1] - torch.tensor(lengths)[:, None]
    return {"input_ids": ids.where(mask, 0), "attention_mask": mask.long()}


rows_of = st.lists(st.sampled_from([None, *METHODS]), min_size=1, max_size=7)


@settings(max_examples=20, deadline=None)
@given(rows=rows_of)
def test_every_row_is_as_if_alone(house, rows):
    tuned, bank = house
    ids = tiny.batch(bank.model, rows=len(rows))["input_ids"]
    got = bank(ids, adapters=rows).logits
    for i, name in enumerate(rows):
        assert (got[i] - alone(tuned, name, input_ids=ids[i : i + 1])[0]).abs().max() < 1e-5
        if name is None and type(bank.model).__name__ != "BertForSequenceClassification":
            assert torch.equal(got[i], bank(ids, adapters=[None] * len(rows)).logits[i])


@settings(max_examples=6, deadline=None)
@given(rows=rows_of, beams=st.sampled_from([1, 3]), returned=st.sampled_from([1, 2]), data=st.data())
def test_generate_with_padding_and_beams(house, rows, beams, returned, data):
    tuned, bank = house
    if not hasattr(bank.model, "generate") or "Bert" in type(bank.model).__name__:
        return
    returned = min(beams, returned)
    ids = tiny.batch(bank.model, rows=len(rows))["input_ids"]
    lengths = data.draw(st.lists(st.integers(1, 7), min_size=len(rows), max_size=len(rows)))
    inputs = left_padded(ids, lengths)
    how = {"max_new_tokens": 4, "num_beams": beams, "num_return_sequences": returned, "do_sample": False}
    got = bank.generate(**inputs, adapters=rows, **how).view(len(rows), returned, -1)
    for i, name in enumerate(rows):
        tuned.use(*([name] if name else []))
        want = tuned.generate(**{key: value[i : i + 1] for key, value in inputs.items()}, **how)
        longest = min(want.shape[1], got.shape[2])
        assert torch.equal(got[i, :, :longest], want[:, :longest])


def test_an_encoder_and_a_decoder(tmp_path):
    tuned = adapters(tmp_path, tiny.t5(), {"b": mp.LoRA(rank=2), "a": mp.LoRA(rank=4, targets="attention")})
    bank, rows = Bank(tiny.t5(), tmp_path), ["a", None, "b", "a"]
    ids = tiny.batch(bank.model, rows=4)["input_ids"]
    got = bank.generate(ids, adapters=rows, max_new_tokens=4, num_beams=2, do_sample=False)
    for i, name in enumerate(rows):
        tuned.use(*([name] if name else []))
        want = tuned.generate(ids[i : i + 1], max_new_tokens=4, num_beams=2, do_sample=False)[0]
        longest = min(len(want), got.shape[1])
        assert torch.equal(got[i, :longest], want[:longest])


def test_embeddings_and_slices(tmp_path):
    methods = {
        "table": mp.LoRA(rank=3, targets=["wte"]),
        "slices": mp.LoRA(rank=2, targets=["c_attn[32:48]", "c_attn[0:16]"]),
        "scaled": mp.IA3(targets=["c_attn[16:48]"], feedforward=()),
        "dora": mp.DoRA(rank=2, targets=["c_attn[16:32]"]),
    }
    tuned = adapters(tmp_path, tiny.gpt2(), methods)
    bank, rows = Bank(tiny.gpt2(), tmp_path), ["slices", "table", None, "scaled", "dora", "table"]
    ids = tiny.batch(bank.model, rows=6)["input_ids"]
    for choice in (rows, ["table"] * 6):
        want = torch.cat([alone(tuned, name, input_ids=ids[i : i + 1]) for i, name in enumerate(choice)])
        torch.testing.assert_close(bank(ids, adapters=choice).logits, want, atol=1e-5, rtol=0)


def test_a_quantised_and_a_half_precision_base(tmp_path):
    for change in (mp.quantize, lambda model: model.bfloat16()):
        tuned = adapters(tmp_path, change(tiny.llama()))
        bank, rows = Bank(change(tiny.llama()), tmp_path), [*METHODS, None]
        ids = tiny.batch(bank.model, rows=len(rows))["input_ids"]
        want = torch.cat([alone(tuned, name, input_ids=ids[i : i + 1]) for i, name in enumerate(rows)])
        got = bank(ids, adapters=rows).logits
        assert (got - want).norm() < (1e-5 if want.dtype == torch.float32 else 0.02) * want.norm()


@pytest.fixture
def bank(tmp_path):
    adapters(tmp_path, tiny.llama())
    return Bank(tiny.llama(), tmp_path)


IDS = tiny.batch(None, rows=2)["input_ids"]


def test_an_adapter_of_infinite_numbers_spoils_its_own_rows_only(bank):
    sane = bank._resolve("one", set()).parts
    spoilt = {path: {key: part * float("nan") for key, part in parts.items()} for path, parts in sane.items()}
    composition = gather([spoilt, sane], [0, 1], torch.device("cpu"))
    for path, parts in composition.parts.items():
        assert all(torch.equal(part[1], sane[path][key]) for key, part in parts.items())


def test_it_gives_no_gradient_and_leaves_the_model_alone(bank):
    assert not bank(IDS, adapters=["all", None]).logits.requires_grad
    plain = tiny.llama()(IDS).logits
    assert torch.equal(bank.model(IDS).logits, plain)
    bank.close()
    assert tiny.hooks(bank.model) == 0
    assert tiny.same(tiny.snapshot(bank.model), tiny.snapshot(tiny.llama()))


def test_what_cannot_be_served_is_named_and_the_rest_is_served(bank):
    folder = bank.folder
    (folder / "half").mkdir()
    (folder / "half" / WEIGHTS).write_bytes(b"nothing")
    shutil.copytree(folder / "all", folder / "damaged")
    (folder / "damaged" / WEIGHTS).write_bytes((folder / "all" / WEIGHTS).read_bytes()[:-100])
    mp.attach(tiny.gpt2(), mp.LoRA(rank=2)).save(folder / "foreign")
    mp.attach(tiny.llama(), mp.VeRA(rank=4)).save(folder / "vera")
    mp.attach(tiny.llama(), mp.BitFit()).save(folder / "biases")
    mp.attach(tiny.llama(), mp.PromptTuning(length=2)).save(folder / "prompt")
    wrong = ["half", "damaged", "foreign", "vera", "biases", "prompt", "nobody", "../all", "", "a\0b", ".", "all/."]
    reasons = bank.check([*wrong, None, "all"])
    assert list(reasons) == wrong
    assert all(reason[-1] == "." for reason in reasons.values())
    before = bank.resident
    with pytest.raises(ValueError, match="'nobody' cannot be served.*'half' cannot be served"):
        bank(IDS.repeat(2, 1), adapters=["nobody", "all", "half", None])
    assert bank.resident == before
    good = [name for name in ["nobody", "all"] if name not in bank.check(["nobody", "all"])]
    assert bank(IDS[:1], adapters=good).logits.isfinite().all()


def test_a_wrong_call_says_so(bank):
    for rows, error, words in (
        ("all", TypeError, "not a list"), ([1, 2], TypeError, "not a list"), (["all"], ValueError, "1 entries"),
        ([], ValueError, "is empty"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            bank(IDS, adapters=rows)
    with pytest.raises(ValueError, match="carries adapters"):
        Bank(mp.attach(tiny.llama(), mp.LoRA()))
    with pytest.raises(ValueError, match="not a directory"):
        Bank(tiny.llama(), bank.folder / "no")
    with pytest.raises(ValueError, match="bytes=0"):
        Bank(tiny.llama(), bytes=0)
    with pytest.raises(ValueError, match="no adapter 'nobody'"):
        bank.remove("nobody")


def test_a_batch_that_a_module_does_not_see_is_refused():
    class Flat(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(x.flatten(0, 1)).view(x.shape)

    torch.manual_seed(0)
    tuned = mp.attach(Flat(), mp.LoRA(rank=2))
    tiny.randomise(tuned)
    bank = Bank(Flat())
    bank.add("a", tuned)
    with pytest.raises(ValueError, match="dimension 0"):
        bank(torch.randn(2, 3, 4), adapters=["a", None])


def test_the_least_recently_used_goes_when_the_bytes_are_spent(bank):
    size = {name: bank.check([name]) or bank.resident[name] for name in METHODS}
    for name, layers in ((n, mp.load_adapter(tiny.llama(), bank.folder / n)) for n in METHODS):
        parts = parts_of(list(layers.adapters["default"].values()))
        assert size[name] == sum(p.numel() * 4 for here in parts.values() for p in here.values())
    small = Bank(tiny.llama(), bank.folder, bytes=size["wide"] + size["all"] + size["one"])
    for name in ("wide", "all", "one"):
        small(IDS, adapters=[name, None])
    small(IDS, adapters=["wide", None])  # so that "all" is the oldest
    assert list(small.resident) == ["all", "one", "wide"]
    small(IDS, adapters=["ia3", None])
    assert list(small.resident) == ["one", "wide", "ia3"]
    assert sum(small.resident.values()) <= small.bytes
    assert torch.equal(small(IDS, adapters=["all", "one"]).logits, bank(IDS, adapters=["all", "one"]).logits)
    with pytest.raises(ValueError, match="Ask for fewer adapters at once"):
        small(IDS.repeat(2, 1), adapters=["wide", "all", "dora", "one"])
    assert sum(small.resident.values()) <= small.bytes
    tuned = mp.load_adapter(tiny.llama(), bank.folder / "wide")
    small.add("kept", tuned)  # from memory: it is never put out
    for name in METHODS:
        small.check([name])
    assert "kept" in small.resident and "kept" in small.names()
    small.remove("kept")
    assert "kept" not in small.names() and small.check(["kept"])


def test_an_adapter_that_was_trained_again_is_never_served_stale(bank):
    """Also where the file has the same size, the same time and the same place on the disk."""
    for seed, names in enumerate((["all", "one"], ["all", None], ["all", "all"]), 5):
        before = bank(IDS, adapters=names).logits
        path = bank.folder / "all" / WEIGHTS
        look = path.stat()
        tuned = mp.load_adapter(tiny.llama(), bank.folder / "all")
        tiny.randomise(tuned, seed)
        tuned.save(bank.folder / f".new-{seed}")
        with path.open("r+b") as file:  # in place
            file.write((bank.folder / f".new-{seed}" / WEIGHTS).read_bytes())
        os.utime(path, ns=(look.st_atime_ns, look.st_mtime_ns))
        after = bank(IDS, adapters=names).logits
        assert not torch.equal(before[0], after[0])
        torch.testing.assert_close(after[:1], alone(tuned, "default", input_ids=IDS[:1]), atol=1e-5, rtol=0)
    shutil.rmtree(bank.folder / "all")
    with pytest.raises(ValueError, match="there is no adapter of this name"):
        bank(IDS, adapters=["all", None])
    assert "all" not in bank.resident


def test_names_and_another_folder(bank, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    tuned = adapters(elsewhere, tiny.llama(), {"x": mp.LoRA(rank=3)}, seed=9)
    bank.add("new", elsewhere / "x")
    assert bank.names() == sorted([*METHODS, "new"])
    torch.testing.assert_close(
        bank(IDS, adapters=["new", None]).logits[:1], alone(tuned, "x", input_ids=IDS[:1]), atol=1e-5, rtol=0
    )
    with pytest.raises(ValueError, match=r"has no adapter_config\.json"):
        bank.add("new", elsewhere)
    assert not bank.check(["new"])
    bank.remove("new")
    assert bank.names() == sorted(METHODS)


def test_hot_swap_while_batches_run(bank):
    """Every result belongs to one version as a whole, and after the last swap to the last one."""
    versions = []
    for seed in range(3):
        tuned = mp.load_adapter(tiny.llama(), bank.folder / "all")
        tiny.randomise(tuned, 20 + seed)
        versions.append((tuned, alone(tuned, "default", input_ids=IDS)))
    bank.add("hot", versions[0][0])
    wanted = [want for _, want in versions]
    steady, other = bank(IDS, adapters=["one", None]).logits, bank(IDS, adapters=["dora", "ia3"]).logits
    wrong, done = [], threading.Event()

    def ask(rows, allowed):
        while not done.is_set():
            got = bank(IDS, adapters=rows).logits
            if not any((got - want).abs().max() < 1e-5 for want in allowed):
                wrong.append(rows)

    threads = [
        threading.Thread(target=ask, args=args, daemon=True)
        for args in ((["hot", "hot"], wanted), (["one", None], [steady]), (["dora", "ia3"], [other]))
    ]
    for thread in threads:
        thread.start()
    for i in range(30):
        bank.add("hot", versions[i % 3][0])
    done.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "In a minute, a thread did not come back from a call of the bank."
    assert not wrong
    assert (bank(IDS, adapters=["hot", "hot"]).logits - wanted[29 % 3]).abs().max() < 1e-5


def test_a_composition_is_gathered_once(bank):
    first = bank.compose(["all", None, "one"])
    assert bank.compose(["all", None, "one"]) is first
    assert bank.compose(["one", None, "all"]) is not first


def test_a_file_written_within_one_tick_of_the_clock(bank, monkeypatch):
    """Its look may be the same as before, so a file that was written just now is read again whatever it looks like."""
    look = ((1, 1, time.time_ns(), time.time_ns()),)
    monkeypatch.setattr(tenants, "stamp", lambda path: look)
    before = bank(IDS, adapters=["all", None]).logits
    tuned = mp.load_adapter(tiny.llama(), bank.folder / "all")
    tiny.randomise(tuned, 5)
    tuned.save(bank.folder / "all")
    assert not torch.equal(bank(IDS, adapters=["all", None]).logits[0], before[0])
