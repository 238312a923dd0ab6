"""Adapters on disk: what is written comes back, and what is damaged is refused with the model untouched."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import shutil
import stat

import pytest
import tiny
import torch
from architectures import ARCHITECTURES
from safetensors.torch import load_file, save_file
from torch import nn

from minipeft.attach import attach
from minipeft.methods.adalora import AdaLoRA, ranks
from minipeft.methods.dora import DoRA
from minipeft.methods.ia3 import IA3
from minipeft.methods.lora import LoRA
from minipeft.methods.projected import ProjectedLoRA
from minipeft.methods.select import BitFit, Full, Softmax
from minipeft.methods.vera import VeRA
from minipeft.serve import checkpoint
from minipeft.serve.card import CARD
from minipeft.serve.checkpoint import CONFIG, PREFIX, WEIGHTS, load_adapter
from minipeft.targets import head
from minipeft.world.base import load

Q0 = PREFIX + "model.layers.0.self_attn.q_proj"


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny.batch(model)["input_ids"]).logits


@pytest.fixture
def saved(tmp_path):
    """A LoRA on a tiny Llama, on disk."""
    tuned = attach(tiny.llama(), LoRA(rank=2, alpha=3, targets=["q_proj", "v_proj"]))
    tiny.randomise(tuned)
    tuned.save(tmp_path / "adapter")
    return tmp_path / "adapter"


SELECT, OWN, PEFT = "MINIPEFT_SELECT", "MINIPEFT_LORA", "LORA"


@pytest.mark.parametrize(
    "family, method, kind, modules",
    [
        ("llama", LoRA(rank=2), PEFT, None),
        ("llama", LoRA(rank=3, alpha=5, rank_stabilized=True, dropout=0.1), PEFT, None),
        ("llama", LoRA(rank=2, targets=["embed_tokens", "q_proj", "lm_head"]), PEFT, None),
        ("llama", [LoRA(rank=2, targets="mlp"), LoRA(rank=4, gamma=0.3, targets="attention")], PEFT, None),
        ("llama", [LoRA(rank=2), Softmax()], PEFT, ["lm_head"]),
        ("bert", [LoRA(rank=2), Softmax()], PEFT, ["cls.predictions.decoder"]),
        ("classifier", [LoRA(rank=2), Softmax()], PEFT, ["classifier"]),
        ("gpt2", LoRA(rank=2, targets=["c_attn"]), PEFT, None),
        ("gpt2", LoRA(rank=2, targets=["c_attn[0:16]", "c_attn[32:48]"]), OWN, None),
        ("gpt2", [LoRA(rank=2, targets=["c_attn[:16]", "c_proj"]), Softmax()], OWN, ["lm_head"]),
        ("llama", [LoRA(rank=2), BitFit()], OWN, None),
        ("llama", BitFit(), SELECT, None),
        ("llama", Full(), SELECT, None),
        ("llama", Softmax(), SELECT, None),
        ("gpt2", Full(targets=re.compile(r"transformer\.h\.1\..*")), SELECT, None),
    ],
    ids=str,
)
def test_round_trip(family, method, kind, modules, tmp_path):
    tuned = attach(tiny.MODELS[family](), method)
    tiny.randomise(tuned)
    expected, path = logits(tuned), tmp_path / "a b" / "adapter"
    tuned.save(path)
    config = json.loads((path / CONFIG).read_text())
    assert config["peft_type"] == kind and config.get("modules_to_save") == modules
    assert sorted(p.name for p in path.iterdir()) == [CARD, CONFIG, WEIGHTS] and len(list(path.parent.iterdir())) == 1
    model = tiny.MODELS[family]()
    loaded = load_adapter(model, path, name="again")
    assert torch.equal(logits(loaded), expected) and loaded.active == ("again",)
    assert loaded.count() == tuned.count() and all(p.requires_grad for p in loaded.adapters.parameters())
    loaded.save(path)
    assert torch.equal(logits(load_adapter(tiny.MODELS[family](), path)), expected), "and once more, over the old files"
    tied = getattr(model, "lm_head", None) is not None and model.lm_head.weight is model.get_input_embeddings().weight
    assert tied == (tuned.base.get_output_embeddings() is not None and family in ("llama", "gpt2") and not any(
        s[0] == "lm_head" and len(layer.slots) == 1 for layer in tuned.adapters["default"].values() for s in layer.slots
    ))  # fmt: skip


@pytest.mark.parametrize("name", ["StableLM", "Qwen2, tokens", "RoBERTa, classifier", "ViT", "wav2vec 2"])
@pytest.mark.parametrize("method", [LoRA(rank=2), DoRA(rank=2)], ids=["LoRA", "DoRA"])
def test_what_is_trained_whole_and_changed_beside_that_is_a_file_of_our_own(name, method, tmp_path):
    """PEFT leaves out every target inside modules_to_save, and says nothing."""
    one = ARCHITECTURES[name]
    at = head(one.model())[:1]
    tuned = attach(one.model(), [dataclasses.replace(method, targets=at), Softmax()])
    tiny.randomise(tuned)
    tuned.save(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["peft_type"] == OWN
    with torch.no_grad():
        expected, found = (one.hidden(each(**one.batch())) for each in (tuned, load_adapter(one.model(), tmp_path)))
    assert torch.equal(expected, found)


def test_a_loaded_adapter_joins_a_tuned_model(saved):
    tuned = attach(tiny.llama(), Full())
    tiny.randomise(tuned)
    assert load_adapter(tuned, saved, name="second") is tuned and tuned.active == ("second",)
    assert torch.equal(logits(tuned), logits(load_adapter(tiny.llama(), saved)))
    for name in ("second", "a.b"):
        with tiny.untouched(tuned.base), pytest.raises(ValueError, match="name"):
            load_adapter(tuned, saved, name=name)
    with pytest.raises(ValueError, match="Tuned"):
        load_adapter(tuned.base, saved)
    tuned.merge()
    with pytest.raises(ValueError, match="unmerge"):
        load_adapter(tuned, saved, name="third")


def test_what_to_save_must_be_clear(tmp_path):
    tuned = attach(tiny.llama(), LoRA(rank=2))
    tuned.add("b", LoRA(rank=1))
    tuned.use("default", "b")
    with pytest.raises(ValueError, match="2 adapters are active"):
        tuned.save(tmp_path / "x")
    with pytest.raises(ValueError, match="no adapter 'c'"):
        tuned.save(tmp_path / "x", name="c")
    with pytest.raises(ValueError, match="The path is empty"):
        tuned.save("", name="b")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(ValueError, match="file' is a file, and an adapter is a folder of files"):
            tuned.save(path, name="b")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    tuned.save(tmp_path / "x", name="b")
    assert load_file(tmp_path / "x" / WEIGHTS)[f"{Q0}.lora_A.weight"].shape == (1, tiny.D)
    with torch.device("meta"):
        model = tiny.llama()
    with pytest.raises(ValueError, match="meta"):
        attach(model, LoRA(rank=2)).save(tmp_path / "y")


def test_saving_while_merged_or_disabled_writes_the_same(tmp_path):
    for method in (LoRA(rank=2), Full()):
        tuned = attach(tiny.llama(), method)
        tiny.randomise(tuned)
        tuned.save(tmp_path / "a")
        tuned.merge()
        tuned.save(tmp_path / "b")
        with tuned.disabled():
            tuned.save(tmp_path / "c")
        files = [load_file(tmp_path / each / WEIGHTS) for each in "abc"]
        assert tiny.same(files[0], files[1]) and tiny.same(files[0], files[2])


@pytest.mark.parametrize("fail_at", ["save_file", CONFIG])
def test_written_whole_or_not_at_all(saved, tmp_path, monkeypatch, fail_at):
    old = {file: (saved / file).read_bytes() for file in (CONFIG, WEIGHTS)}
    tuned = attach(tiny.llama(), LoRA(rank=4))
    if fail_at == "save_file":
        monkeypatch.setattr("safetensors.torch.save_file", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    else:
        replace = checkpoint.os.replace

        def broken(source, target):
            if str(source).endswith(CONFIG) and "old-" not in str(source) and str(target) == str(saved / CONFIG):
                raise OSError("disk full")
            return replace(source, target)

        monkeypatch.setattr(checkpoint.os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        tuned.save(saved)
    assert {file: (saved / file).read_bytes() for file in (CONFIG, WEIGHTS)} == old
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_other_files_in_the_directory_stay(saved):
    (saved / "notes.txt").write_text("mine")
    attach(tiny.llama(), LoRA(rank=1)).save(saved)
    assert (saved / "notes.txt").read_text() == "mine" and json.loads((saved / CONFIG).read_text())["r"] == 1
    assert stat.S_IMODE(saved.stat().st_mode) & 0o055 == 0o055, "others can read it, unlike a temporary directory"


def test_a_path_that_ends_another_is_not_mistaken_for_it(tmp_path):
    def model():
        torch.manual_seed(0)
        return nn.ModuleDict({"fc": nn.Linear(4, 4), "deep": nn.ModuleDict({"fc": nn.Linear(4, 4)})})

    only = attach(model(), LoRA(rank=2, targets=re.compile("fc")))
    both = attach(model(), [LoRA(1, 0.5, targets=re.compile("fc")), LoRA(1, 3.0, targets=re.compile("deep.fc"))])
    both_again = attach(model(), [LoRA(1, 3.0, targets=re.compile("deep.fc")), LoRA(1, 0.5, targets=re.compile("fc"))])
    for i, tuned in enumerate((only, both, both_again)):
        tiny.randomise(tuned)
        tuned.save(tmp_path / str(i))
        deltas = load_adapter(model(), tmp_path / str(i)).deltas()
        assert tiny.same(dict(sorted(deltas.items())), dict(sorted(tuned.deltas().items())))
    with pytest.raises(ValueError, match="Sequential"):
        attach(nn.Linear(4, 4), LoRA(rank=1)).save(tmp_path / "root")


def family() -> dict:
    """One adapter of every method that has a file format of its own."""
    qv = ["q_proj", "v_proj"]
    return {
        "lora": LoRA(rank=2, alpha=3, targets=qv),
        "slices and biases": [LoRA(rank=2, targets=["q_proj[0:8]"]), BitFit()],
        "lora and head": [LoRA(rank=2, alpha=3, rank_stabilized=True, targets=qv), Softmax()],
        "pissa": LoRA(rank=2, init="pissa", targets=qv),
        "projected": ProjectedLoRA(rank=2, targets=qv),
        "dora": DoRA(rank=2, targets=qv),
        "vera": VeRA(rank=3, targets=qv),
        "adalora": AdaLoRA(rank=1, initial_rank=2, targets=qv),
        "ia3": IA3(),
        "select": Softmax(),
    }


@pytest.mark.parametrize("method", ["lora", "pissa", "projected", "dora", "vera", "adalora", "ia3"])
def test_each_method_comes_back_as_itself(method, tmp_path):
    """The kind of layer, what trains and what is frozen; on slices of a fused projection, too."""
    chosen = family()[method]
    sliced = dataclasses.replace(chosen, targets=["c_attn[0:16]", "c_attn[32:48]"])
    sliced = dataclasses.replace(sliced, feedforward=["mlp.c_proj"]) if method == "ia3" else sliced
    for model, each in ((tiny.llama, chosen), (tiny.gpt2, sliced)):
        tuned = attach(model(), each)
        tiny.randomise(tuned)
        tuned.save(tmp_path / "adapter")
        kind = json.loads((tmp_path / "adapter" / CONFIG).read_text())["peft_type"]
        assert kind.startswith("MINIPEFT_") == (model is tiny.gpt2)
        loaded = load_adapter(model(), tmp_path / "adapter")
        types = [{type(layer) for layer in each.adapters["default"].values()} for each in (tuned, loaded)]
        assert types[0] == types[1] and loaded.count() == tuned.count()
        assert torch.equal(logits(loaded), logits(tuned))
        train = [{n for n, p in each.named_parameters() if p.requires_grad} for each in (tuned, loaded)]
        assert train[0] == train[1]


def test_pruned_triplets_stay_away(tmp_path):
    tuned = attach(tiny.llama(), AdaLoRA(rank=1, initial_rank=3, targets=["q_proj", "v_proj"]))
    tiny.randomise(tuned)
    kept = [(3, [True, False, True]), (0, [False] * 3), (3, [True] * 3), (1, [False, True, False])]
    for layer, (_, mask) in zip(tuned.adapters["default"].values(), kept, strict=True):
        layer.kept.copy_(torch.tensor(mask))
        layer.prune()
    before = logits(tuned)
    tuned.save(tmp_path / "a")
    shapes = [value.shape[0] for key, value in load_file(tmp_path / "a" / WEIGHTS).items() if key.endswith("lora_E")]
    assert sorted(shapes) == [0, 1, 2, 3]
    loaded = load_adapter(tiny.llama(), tmp_path / "a")
    assert (logits(loaded) - before).abs().max() < 1e-6
    assert sorted(ranks(loaded).values()) == [0, 1, 2, 3] and loaded.count().trainable < tuned.count().trainable
    loaded.save(tmp_path / "b")
    assert (logits(load_adapter(tiny.llama(), tmp_path / "b")) - before).abs().max() < 1e-6
    for step in range(1, 61):
        loaded.stepped(step)
    assert sorted(ranks(loaded).values()) == [0, 1, 2, 3], "the schedule of a loaded adapter is over"


def test_one_file_holds_one_method(tmp_path):
    mixed = attach(tiny.llama(), [LoRA(rank=1, targets=["q_proj"]), DoRA(rank=1, targets=["v_proj"])])
    with pytest.raises(ValueError, match="DoRALayer and LoRALayer"):
        mixed.save(tmp_path / "x")
    pairs = attach(tiny.llama(), [VeRA(rank=2, targets=["q_proj"]), VeRA(rank=2, targets=["v_proj"])])
    with pytest.raises(ValueError, match="several pairs"):
        pairs.save(tmp_path / "x")
    gammas = [AdaLoRA(rank=1, gamma=g, targets=[t]) for g, t in ((1.0, "q_proj"), (2.0, "v_proj"))]
    with pytest.raises(ValueError, match="differ in γ"):
        attach(tiny.llama(), gammas).save(tmp_path / "x")
    assert not list(tmp_path.iterdir())


# -- damage -----------------------------------------------------------------------------------------------------------
def edit_config(**changes):
    def edit(path):
        config = json.loads((path / CONFIG).read_text())
        (path / CONFIG).write_text(json.dumps(config | changes))

    return edit


def edit_weights(change):
    def edit(path):
        tensors = load_file(path / WEIGHTS)
        change(tensors)
        save_file(tensors, path / WEIGHTS)

    return edit


def drop_layer(tensors):
    for key in [key for key in tensors if key.startswith(Q0)]:
        del tensors[key]


def rename(tensors):
    for key in list(tensors):
        tensors[key.replace("base_model.model.", "")] = tensors.pop(key)


DAMAGE = {
    "no weights": (lambda p: (p / WEIGHTS).unlink(), "has no adapter_model.safetensors"),
    "no config": (lambda p: (p / CONFIG).unlink(), "has no adapter_config.json"),
    "not json": (lambda p: (p / CONFIG).write_text("{"), "not JSON"),
    "not utf-8": (lambda p: (p / CONFIG).write_bytes(b"\xff\xfe\x00"), "not JSON"),
    "json list": (lambda p: (p / CONFIG).write_text("[]"), "holds a list"),
    "empty": (lambda p: (p / WEIGHTS).write_bytes(b""), "not a safetensors file"),
    "truncated": (lambda p: (p / WEIGHTS).write_bytes((p / WEIGHTS).read_bytes()[:-8]), "not a safetensors file"),
    "corrupt header": (lambda p: (p / WEIGHTS).write_bytes(b"\xff" * 64), "not a safetensors file"),
    "pickle": (lambda p: torch.save({}, p / WEIGHTS), "not a safetensors file"),
    "other method": (edit_config(peft_type="LOHA"), "'LOHA'"),
    "config of IA3": (edit_config(peft_type="IA3"), "no ia3_l for 4 of its targets"),
    "config of VeRA": (edit_config(peft_type="VERA"), "no vera_lambda_b"),
    "config of AdaLoRA": (edit_config(peft_type="ADALORA"), "init_r"),
    "no method": (edit_config(peft_type=None), "None"),
    "odd method": (edit_config(peft_type=["LORA"]), "LORA"),
    "config of DoRA": (edit_config(use_dora=True), "lacks 4 tensors.*lora_magnitude_vector"),
    "config of PiSSA, odd rank": (edit_config(minipeft="PiSSA", r=3), "rank=3 is not twice"),
    "qalora": (edit_config(use_qalora=True), "use_qalora"),
    "pissa": (edit_config(init_lora_weights="pissa"), "pissa"),
    "rank 0": (edit_config(r=0), "rank=0"),
    "rank of words": (edit_config(r="two"), "rank='two'"),
    "another rank": (edit_config(r=4), r"has shape \(2, 16\), but this model needs \(4, 16\)"),
    "alpha NaN": (edit_config(lora_alpha=float("nan")), "nan"),
    "no alpha": (edit_config(lora_alpha=None), "lora_alpha"),
    "alpha of words": (edit_config(lora_alpha="x"), "'x'"),
    "patterns": (edit_config(rank_pattern=[1]), "rank_pattern"),
    "targets": (edit_config(target_modules=3), "target_modules"),
    "bad regex": (edit_config(target_modules="("), "target_modules"),
    "entries": (edit_config(peft_type="MINIPEFT_SELECT", entries=3), "entries"),
    "lost B": (edit_weights(lambda t: t.pop(f"{Q0}.lora_B.weight")), "lacks 1 tensors.*q_proj.lora_B"),
    "lost A": (edit_weights(lambda t: t.pop(f"{Q0}.lora_A.weight")), "lacks 1 tensors.*q_proj.lora_A"),
    "lost layer": (edit_weights(drop_layer), "layers.0.self_attn.q_proj"),
    "nothing": (edit_weights(dict.clear), "no lora_A"),
    "extra": (edit_weights(lambda t: t.update({"x": torch.ones(1)})), "has 1 tensors, such as 'x'"),
    "extra parameter": (edit_weights(lambda t: t.update({PREFIX + "x.bias": torch.ones(1)})), "'x.bias'"),
    "other names": (edit_weights(rename), "no lora_A"),
    "transposed": (edit_weights(lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(16, 2)})), r"shape \(16, 2\)"),
    "NaN": (edit_weights(lambda t: t[f"{Q0}.lora_A.weight"].fill_(float("nan"))), "NaN"),
    "infinite": (edit_weights(lambda t: t[f"{Q0}.lora_A.weight"].fill_(float("inf"))), "infinite"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_and_changes_nothing(damage, saved):
    spoil, message = DAMAGE[damage]
    spoil(saved)
    with tiny.untouched(model := tiny.llama()), pytest.raises(ValueError, match=message) as error:
        load_adapter(model, saved)
    assert str(saved) in str(error.value)
    tuned = attach(model, LoRA(rank=1))
    with tiny.untouched(model), pytest.raises(ValueError, match=message):
        load_adapter(tuned, saved, name="second")
    assert list(tuned.adapters) == ["default"] and tuned.active == ("default",)


def test_another_model_is_refused(saved, tmp_path):
    for other in (tiny.gpt2(), tiny.llama().model):
        with tiny.untouched(other), pytest.raises(ValueError, match="q_proj"):
            load_adapter(other, saved)
    with pytest.raises(ValueError, match="has no adapter_config.json"):
        load_adapter(tiny.llama(), tmp_path / "nowhere")
    full = attach(tiny.llama(tied=True), Full())
    full.save(tmp_path / "full")
    with tiny.untouched(untied := tiny.llama(tied=False)), pytest.raises(ValueError, match="lm_head.weight"):
        load_adapter(untied, tmp_path / "full")


def test_an_adapter_of_another_base_is_refused_with_both_names(tmp_path):
    attach(load("desk")[0], LoRA(rank=1)).save(tmp_path)
    with pytest.raises(ValueError, match="which was made on 'desk', does not load on 'pocket': "):
        load_adapter(load("pocket")[0], tmp_path)


HUGE = torch.full((2, 16), 1e300, dtype=torch.float64)  # finite, until it is float32


@pytest.mark.parametrize(
    "method, spoil, message",
    [
        ("vera", edit_config(r=10**9), "r = 1000000000, but its vera_lambda_d have the shapes"),
        ("vera", edit_config(projection_prng_key=-1), "projection_seed=-1"),
        ("vera", edit_config(save_projection=False), "has 2 tensors, such as 'base_model.vera_A'"),
        ("adalora", edit_config(init_r=10**9), "rank_pattern must hold 1000000000 times"),
        ("adalora", edit_config(init_r=0, lora_alpha=1), "rank_pattern must hold 0 times|above|shape"),
        ("adalora", edit_config(lora_alpha=10**400), "too large"),
        ("adalora", edit_config(tinit=50, tfinal=50), "none of 60 steps to prune in"),
        ("adalora", edit_config(rank_pattern={f"{Q0[len(PREFIX):]}.lora_E": [True]}), "rank_pattern must hold 2"),
        ("ia3", edit_config(feedforward_modules=[]), "down_proj.*shape"),
        ("ia3", edit_config(feedforward_modules="("), "no regular expression"),
        ("dora", edit_weights(lambda t: t.pop(f"{Q0}.lora_magnitude_vector")), "lacks 1 tensors.*magnitude"),
        ("lora", edit_weights(lambda t: t.update({f"{Q0}.lora_A.weight": HUGE})), "infinite"),
    ],
)  # fmt: skip
def test_damage_of_each_method_is_refused_at_once(method, spoil, message, tmp_path):
    attach(tiny.llama(), family()[method]).save(tmp_path / "adapter")
    spoil(tmp_path / "adapter")
    with tiny.untouched(model := tiny.llama()), pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path / "adapter")


JUNK = [
    None, True, False, 0, 1, -1, 2, 3, 10**9, 10**400, 0.0, -0.5, 1e308, float("nan"), float("inf"), "", "x", "(",
    "LORA", "q_proj", "all-linear", [],
    [1], ["q_proj"], [[]], {}, {"q_proj": 4}, {"q_proj": "x"}, {"(": 1}, {"a": {"b": []}},
]  # fmt: skip
TYPES = ["LORA", "VERA", "ADALORA", "IA3", "MINIPEFT_LORA", "MINIPEFT_IA3", "MINIPEFT_SELECT", "PREFIX_TUNING"]


def mutate(path, pick: random.Random, others: list) -> str:
    """Spoils the adapter in `path` in one way, and says how. Some ways do no harm."""
    config, tensors = json.loads((path / CONFIG).read_text()), load_file(path / WEIGHTS)
    key = pick.choice(sorted(tensors))
    value = tensors[key]
    kind = pick.choice(["bytes", "cut", "grow", "config", "config", "config", "key", "shape", "dtype", "value", "swap"])
    if kind in ("bytes", "cut", "grow"):
        file = path / pick.choice([CONFIG, WEIGHTS, WEIGHTS])
        data = bytearray(file.read_bytes())
        at = pick.randrange(min(len(data), pick.choice([8, 2000, 10**9])))
        if kind == "bytes":
            data[at] ^= 1 << pick.randrange(8)
        elif kind == "cut":
            del data[at : at + pick.choice([1, 8, 10**9])]
        else:
            data[at:at] = bytes(pick.randrange(256) for _ in range(pick.choice([1, 8, 100])))
        file.write_bytes(bytes(data))
        return f"{kind} of {file.name} at {at}"
    if kind == "config":
        option = pick.choice([*config, "peft_type", "use_dora", "minipeft", "bias", "init_lora_weights", "entries"])
        config[option] = pick.choice(TYPES if option == "peft_type" else [*JUNK, "PiSSA", "ProjectedLoRA"])
        if pick.random() < 0.2:
            del config[option]
        (path / CONFIG).write_text(json.dumps(config))
        return f"{option} = {config.get(option, 'left out')!r}"[:80]
    if kind == "swap":
        other = pick.choice(others)
        file = pick.choice([CONFIG, WEIGHTS])
        (path / file).write_bytes((other / file).read_bytes())
        return f"{file} of {other.name}"
    if kind == "key":
        new = pick.choice(["x", key + "x", key[1:], key.replace("0", "7"), key.replace("q_proj", "o_proj"), None, key])
        tensors.pop(key) if new != key else tensors.update({key + ".more": value.clone()})
        tensors |= {} if new in (None, key) else {new: value}
    elif kind == "shape":
        shapes = [value.T, value[:0], value[:1], value.flatten(), value[None], torch.cat([value, value]), value.sum()]
        tensors[key] = pick.choice(shapes).contiguous().clone()
    elif kind == "dtype":
        dtypes = [torch.int64, torch.float16, torch.bfloat16, torch.float64, torch.bool, torch.float8_e4m3fn]
        tensors[key] = value.to(pick.choice(dtypes))
    else:
        worst = pick.choice([float("nan"), float("inf"), -float("inf"), 1e38, 1e300])
        value = value.double() if worst == 1e300 else value
        tensors[key] = torch.where(torch.arange(value.numel()).view(value.shape) == 0, worst, value)
    save_file(tensors, path / WEIGHTS)
    return f"{kind} of {key}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_thousand_mutated_files_load_exactly_or_are_refused(tmp_path):
    """No third outcome: one ValueError of one line, or every number of the file in its place; never a changed base."""
    model, pick, sources = tiny.llama(), random.Random(0), []
    for name, method in family().items():
        tuned = attach(model, method)
        tiny.randomise(tuned)
        tuned.save(tmp_path / "whole" / name)
        sources.append(tmp_path / "whole" / name)
        tuned.detach()
    look = tiny.untouched(model)
    before, values, refused = look.look()[:3], tiny.snapshot(model), 0
    for i in range(1000):
        path = tmp_path / "adapter"
        shutil.copytree(sources[i % len(sources)], path, dirs_exist_ok=True)
        how = f"{sources[i % len(sources)].name}: {mutate(path, pick, sources)}"
        try:
            tuned = load_adapter(model, path)
        except ValueError as error:
            message = str(error)
            assert message.startswith(f"The adapter in {str(path)!r} does not load: ") and "\n" not in message, how
            refused += 1
        else:
            config, tensors = checkpoint.read(path)
            held = checkpoint.expected(list(tuned.adapters["default"].values()), config)
            tensors = {key: value for key, value in tensors.items() if not key.endswith(".base_layer.weight")}
            assert held.keys() == tensors.keys(), how
            assert all(torch.equal(held[key], tensors[key].to(held[key].dtype)) for key in held), how
            assert all(p.requires_grad for p in tuned.adapters.parameters()) and tuned.active == ("default",), how
            tuned.detach()
        assert look.look()[:3] == before and tiny.same(tiny.snapshot(model), values), how
    assert 500 < refused < 950


def test_unpickling_never_happens(saved):
    (saved / WEIGHTS).rename(saved / "adapter_model.bin")
    with pytest.raises(ValueError, match="has no adapter_model.safetensors"):
        load_adapter(tiny.llama(), saved)
