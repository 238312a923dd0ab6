"""The card beside an adapter, and what differs between two checkpoints."""

from __future__ import annotations

import json
import math

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from minipeft.__main__ import main
from minipeft.attach import attach
from minipeft.methods.adapter import Adapter
from minipeft.methods.lora import LoRA
from minipeft.serve.card import CARD
from minipeft.serve.checkpoint import CONFIG, WEIGHTS, load_adapter
from minipeft.serve.difference import difference, table


def saved(path, seed: int = 1, method=None, name: str = "org/tiny"):
    model = tiny.llama()
    model.config.name_or_path = name
    tuned = attach(model, method or LoRA(rank=2, alpha=3, targets=["q_proj", "v_proj"]))
    tiny.randomise(tuned, seed)
    tuned.save(path)
    return path


# -- the card ---------------------------------------------------------------------------------------------------------
def test_the_hub_reads_the_card(tmp_path):
    from huggingface_hub import ModelCard

    card = ModelCard.load(saved(tmp_path / "a") / CARD)
    assert card.data.to_dict() == {"base_model": "org/tiny", "library_name": "peft", "tags": ["minipeft", "lora"]}
    tensors = load_file(tmp_path / "a" / WEIGHTS).values()
    numbers = sum(t.numel() for t in tensors)
    assert f"| numbers | {numbers:,} in 8 tensors, float32, {4 * numbers:,} bytes |" in card.text
    assert "| where | `q_proj`, `v_proj` in 4 places |" in card.text
    assert "| r | `2` |" in card.text and "| lora_alpha | `3.0` |" in card.text


def test_what_the_card_says_to_do_works(tmp_path):
    """Both of its pieces of code, with the base that it leaves to the reader."""
    import peft

    import minipeft as mp

    path = saved(tmp_path / "a", name="")
    text = (path / CARD).read_text()
    blocks = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    assert len(blocks) == 2
    outputs = []
    for block in blocks:
        space = {"mp": mp}
        block = block.replace("model = ...", "").replace('"path of this folder"', repr(str(path)))
        exec(block, space | {"model": tiny.llama()}, space)
        with torch.no_grad():
            outputs.append(space["tuned"](tiny.batch(tiny.llama())["input_ids"]).logits)
    assert torch.allclose(*outputs, atol=1e-6) and peft.__name__ in blocks[1]


def test_a_card_of_ours_alone_does_not_name_peft(tmp_path):
    from huggingface_hub import ModelCard

    card = ModelCard.load(saved(tmp_path / "a", method=Adapter(bottleneck=2)) / CARD)
    assert card.data.library_name == "minipeft" and "minipeft alone loads it" in card.text
    assert "from peft" not in card.text


@pytest.mark.parametrize("name", ["", "/somewhere/secret", "models/mine/really", "./here", "my folder", "x\ny: z"])
def test_a_folder_of_this_machine_is_not_named(name, tmp_path):
    text = (saved(tmp_path / "a", name=name) / CARD).read_text()
    assert "base_model" not in text.split("---")[1] and (not name or name not in text)
    assert "model = ..." in text


def test_a_card_that_a_person_wrote_stays(tmp_path):
    path = saved(tmp_path / "a")
    ours = (path / CARD).read_text()
    saved(path, method=LoRA(rank=3, targets=["q_proj"]))
    newer = (path / CARD).read_text()
    assert newer != ours and "| r | `3` |" in newer, "ours is written anew"
    for theirs in (newer.replace("An adapter", "My adapter"), newer + "\nMore.\n", "# Mine\n", "", "\xff"):
        (path / CARD).write_bytes(theirs.encode("latin-1", errors="replace"))
        before = (path / CARD).read_bytes()
        saved(path)
        assert (path / CARD).read_bytes() == before and json.loads((path / CONFIG).read_text())["r"] == 2


def test_peft_and_load_adapter_do_not_mind(tmp_path):
    import peft

    path = saved(tmp_path / "a")
    (path / CARD).write_text("---\nnot: [yaml\n---\n")
    theirs, mine = peft.PeftModel.from_pretrained(tiny.llama(), path), load_adapter(tiny.llama(), path)
    batch = tiny.batch(tiny.llama())
    assert torch.allclose(theirs.eval()(**batch).logits, mine(**batch).logits, atol=1e-6)


# -- the difference ---------------------------------------------------------------------------------------------------
def test_difference_is_the_norm_of_each_change(tmp_path):
    a, b = saved(tmp_path / "a"), saved(tmp_path / "b", seed=2)
    found = difference(a, b)
    old, new = load_file(a / WEIGHTS), load_file(b / WEIGHTS)
    assert found.keys() == old.keys()
    for name, change in found.items():
        x, y = old[name].double(), new[name].double()
        assert change.relative == pytest.approx(((y - x).square().sum() / x.square().sum()).sqrt().item(), rel=1e-12)
        assert change.a == change.b == tuple(x.shape)
    assert {change.relative for change in difference(a, a).values()} == {0.0}


def test_what_is_in_one_alone_or_of_another_shape(tmp_path):
    one = {
        "both": torch.ones(2, 3),
        "gone": torch.ones(1),
        "shape": torch.ones(2),
        "zero": torch.zeros(2),
        "none": torch.zeros(0),
    }
    two = {
        "both": torch.full((2, 3), 1.5),
        "new": torch.ones(1),
        "shape": torch.ones(3),
        "zero": torch.ones(2),
        "none": torch.zeros(0),
    }
    save_file(one, tmp_path / "one.safetensors")
    save_file({name: t.bfloat16() for name, t in two.items()}, tmp_path / "two.safetensors")
    found = difference(tmp_path / "one.safetensors", tmp_path / "two.safetensors")
    assert found["both"].relative == 0.5 and found["zero"].relative == math.inf and found["none"].relative == 0.0
    assert found["gone"] == ((1,), None, None) and found["new"] == (None, (1,), None)
    assert found["shape"] == ((2,), (3,), None)
    lines = table(found).splitlines()
    assert lines[0].split() == ["inf", "zero", "2"] and lines[1].split() == ["5.000e-01", "both", "2×3"]
    assert any("only in A  gone" in line for line in lines) and lines[-1] == "1 of 6 tensors are the same"
    save_file({"x": torch.tensor([math.nan])}, tmp_path / "nan.safetensors")
    assert math.isnan(difference(tmp_path / "nan.safetensors", tmp_path / "nan.safetensors")["x"].relative)


def test_whole_models_in_one_file_or_several(tmp_path):
    model = tiny.llama()
    model.save_pretrained(tmp_path / "one")
    model.model.norm.weight.data *= 2
    model.save_pretrained(tmp_path / "many", max_shard_size="5KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    found = difference(tmp_path / "one", tmp_path / "many")
    changed = {name: change.relative for name, change in found.items() if change.relative}
    assert changed == {"model.norm.weight": 1.0} and len(found) > 20


def test_the_command(tmp_path, capsys):
    a, b = saved(tmp_path / "a"), saved(tmp_path / "b", seed=2)
    assert main(["diff", str(a), str(b)]) == 1
    assert "0 of 8 tensors are the same" in capsys.readouterr().out
    assert main(["diff", str(a), str(a)]) == 0
    for bad in (tmp_path, tmp_path / "nowhere", a / CONFIG):
        assert main(["diff", str(a), str(bad)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("minipeft: ") and error.count("\n") == 1
