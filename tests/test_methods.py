"""What follows from a method's one line in `minipeft/methods/__init__.py`: its name, its count, its file, its place in
a sweep and in the formulas. What it must do to a model is in `test_attach.py`, and PEFT's opinion in `parity/`."""

from __future__ import annotations

import dataclasses
import json

import pytest
import tiny
import torch

import minipeft as mp
from minipeft.analyze.budget import budget
from minipeft.attach import attach
from minipeft.files import LAYOUTS
from minipeft.learn.sweep import method_of, point
from minipeft.methods import METHODS
from minipeft.serve.checkpoint import load_adapter
from minipeft.targets import resolve

EXAMPLES = [(name, settings) for name, kind in METHODS.items() for settings in kind.examples]
FAMILIES = {"llama": tiny.llama, "gpt2": tiny.gpt2, "bert": tiny.bert}
IDS = [f"{name} {settings}" for name, settings in EXAMPLES]


def attached(name: str, settings: dict, family: str = "llama"):
    """The method on a tiny model; skipped, with its own sentence, where its defaults name layers of another family."""
    try:
        return attach(FAMILIES[family](), METHODS[name](**settings))
    except ValueError as error:
        if family == "llama":
            raise
        pytest.skip(f"{family}: {str(error)[:100]}")


@pytest.mark.parametrize("name", METHODS)
def test_it_is_public_under_its_name(name):
    assert getattr(mp, name) is METHODS[name] and name in mp.__all__ and name in mp.methods.__all__
    assert METHODS[name].__name__ == name and dataclasses.is_dataclass(METHODS[name]) and METHODS[name].examples
    assert METHODS[name].__doc__.strip() and METHODS[name].__dataclass_params__.frozen


@pytest.mark.parametrize("name, settings", EXAMPLES, ids=IDS)
def test_its_formula_counts_what_trains(name, settings):
    method = METHODS[name](**settings)
    if not method.formula:
        pytest.skip(f"no formula in d_in and d_out says what {name} trains")
    tuned = attached(name, settings)
    with tuned.disabled():
        targets = resolve(tuned.base, method.targets)
    known = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    wanted = sum(eval(method.formula, known | {"d_in": t.d_in, "d_out": t.d_out}) for t in targets)
    assert tuned.count().trainable == wanted
    assert tuned.count().total == sum(p.numel() for p in tiny.llama().parameters()) + wanted
    assert budget(tiny.llama(), method).trainable == wanted


@pytest.mark.parametrize("name, settings", EXAMPLES, ids=IDS)
def test_a_sweep_builds_it_from_json(name, settings):
    plain = json.loads(json.dumps(settings))
    made = point(name, "pirate", 1e-2, 0, **plain)
    assert repr(method_of(made.method, made.settings)) == repr(METHODS[name](**settings))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name, settings", EXAMPLES, ids=IDS)
def test_its_file_comes_back(name, settings, family, tmp_path):
    tuned = attached(name, settings, family)
    tiny.randomise(tuned)
    batch = tiny.batch(tuned)
    if not any(layout.layer is type(tuned.layers()[0]) for layout in LAYOUTS) and not tuned.layers()[0].slots:
        with pytest.raises(ValueError, match="has no file format"):
            tuned.save(tmp_path)
        return
    tuned.save(tmp_path)
    again = load_adapter(FAMILIES[family](), tmp_path, name="other")
    with torch.no_grad():
        mine, theirs = tuned(**batch).logits, again(**batch).logits
        assert not torch.equal(mine, FAMILIES[family]()(**batch).logits), "the adapter has an effect"
    torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)
    assert all(p.requires_grad for p in again.adapters["other"].parameters()), "a loaded adapter trains on"
    again.save(tmp_path / "again")
    third = load_adapter(FAMILIES[family](), tmp_path / "again")
    with torch.no_grad():
        torch.testing.assert_close(mine, third(**batch).logits, atol=1e-6, rtol=0)
