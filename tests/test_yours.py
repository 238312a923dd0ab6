"""Lesson 18: what it says of the shipped runs, its code for `peft`, and that its one cell of settings is enough."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import pytest
import torch

import minipeft as mp
from minipeft.course import board, yours
from minipeft.learn.protocol import SEARCH_SEED, SEEDS, interval, paired

LESSON = Path(__file__).parents[1] / "notebooks" / "18_your_model.ipynb"


def cells(kind: str) -> list[str]:
    return [cell.source for cell in nbformat.read(LESSON, as_version=4).cells if cell.cell_type == kind]


def test_the_runs_are_those_that_the_lesson_speaks_of():
    found = yours.measured()
    for name in yours.ADVISED:
        mine = [each for each in found["runs"] if each["method"] == name and each["seed"] != SEARCH_SEED]
        assert [each["seed"] for each in mine] == list(SEEDS)
        assert {each["rate"] for each in mine} == {board.board()[name]["rate"]}, "the advised rate, unchanged"
    searched = {e["rate"]: min(e["validation loss"].values()) for e in found["runs"] if e["seed"] == SEARCH_SEED}
    best = min(searched, key=searched.__getitem__)
    assert min(searched) < best < max(searched), "the best rate of the search lies inside"
    for each in found["runs"]:
        looks = {int(step): loss for step, loss in each["validation loss"].items()}
        assert each["best step"] == min(looks, key=looks.__getitem__)
        assert all(later - each["best step"] <= yours.PATIENCE * yours.EVERY for later in looks)


def test_the_verdicts_in_words():
    """More than five points over counted words; LoRA and full fine-tuning within two points of each other."""
    over = interval([each - yours.measured()["counts of words"] for each in yours.scores("LoRA r=8")])
    assert over.low > 0.05
    gap = paired(yours.scores("LoRA r=8"), yours.scores("full fine-tuning"))
    assert -0.02 < gap.low < gap.high < 0.02


@pytest.mark.slow
def test_the_lesson_code_for_peft_runs_and_minipeft_reads_what_it_writes(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    (code,) = [block for text in cells("markdown") for block in re.findall(r"```python\n(.+?)```", text, re.DOTALL)]
    monkeypatch.chdir(tmp_path)
    rows = ["text,label"] + [f"at the river it was {'cold' if i % 2 else 'warm'} {i} times,{i % 2}" for i in range(80)]
    Path("a.csv").write_text("\n".join(rows))
    task = mp.world.own("a.csv", label="label")
    model, tokenizer = mp.load("pocket", labels=2)
    scope = {"model": model, "tokenizer": tokenizer, "task": task, "STEPS": 4, "BATCH": 4, "EVERY": 2}
    exec(code, scope | {"first": type("First", (), {"rate": 1e-3})}, scope)
    assert isinstance(scope["adapted"], peft.PeftModel) and scope["trainer"].state.global_step == 4
    again = mp.load_adapter(mp.load("pocket", labels=2)[0], "adapter")
    ids = tokenizer("at the river it was cold", return_tensors="pt").input_ids
    with torch.no_grad():
        theirs, ours = scope["adapted"].eval()(input_ids=ids).logits, again(input_ids=ids).logits
        assert torch.allclose(theirs, ours, atol=1e-5)
        assert not torch.allclose(theirs, mp.load("pocket", labels=2)[0](input_ids=ids).logits, atol=1e-5)


@pytest.mark.slow
def test_the_cell_of_settings_is_the_only_one_to_change(tmp_path, capsys):
    """A language model and a folder of texts instead of an encoder and a CSV, through every cell up to the card."""
    for i, row in enumerate(mp.world.pirate().data["train"].select(range(60))):
        (tmp_path / f"{i}.txt").write_text(row["text"])
    code = cells("code")
    settings = next(i for i, source in enumerate(code) if source.startswith("MODEL ="))
    code[settings] = (
        f"MODEL, TEXT, COLUMNS, MEMORY, LENGTH = 'pocket', {str(tmp_path)!r}, {{}}, 2**30, 48\n"
        "STEPS, BATCH, EVERY, PATIENCE = 4, 8, 2, 2"
    )
    skipped = ("from transformers import Qwen2", "import ipywidgets", "torch.manual_seed(0)\nheavy", "import time")
    scope: dict = {"display": lambda *_: None, "get_ipython": lambda: None}
    import matplotlib

    matplotlib.use("Agg")
    for source in code[settings:]:
        if not source.startswith(skipped):
            exec(compile(source, "lesson", "exec"), scope)
    said = capsys.readouterr().out
    assert "it scores the same: True" in said and "less than 0.0001: True" in said
    card = (scope["adapter"] / "README.md").read_text()
    assert "model-index" in card and f"{scope['after'].loss:.3f}" in card and "no model at all" in card
    assert json.loads((scope["adapter"].parent / "merged" / "config.json").read_text())["model_type"] == "llama"
