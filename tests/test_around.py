"""What stands around a Tuned or inside its base: wrappers, batch norms, files with the marks of a training set-up."""

from __future__ import annotations

import copy

import peft
import pytest
import tiny
import torch
from architectures import ARCHITECTURES
from safetensors.torch import load_file, save_file
from torch import nn

import minipeft as mp
from minipeft.attach import attach
from minipeft.methods.adalora import ranks


def mixed(norm) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), norm(8), nn.Linear(8, 3)).eval()


NORMS = [
    nn.BatchNorm1d,
    lambda d: nn.BatchNorm1d(d, momentum=None),
    lambda d: nn.Sequential(nn.Unflatten(1, (d, 1)), nn.InstanceNorm1d(d, track_running_stats=True), nn.Flatten(1)),
    lambda d: nn.Sequential(nn.Unflatten(1, (d, 1, 1)), nn.BatchNorm2d(d), nn.Flatten(1)),
    lambda d: nn.Sequential(nn.Dropout(0.0), nn.BatchNorm1d(d)),
]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", [mp.LoRA(2, targets=["0", "2"]), mp.Full()], ids=["lora", "full"])
def test_a_frozen_base_keeps_the_statistics_of_its_norms(norm, method, tmp_path):
    x = torch.randn(16, 6) * 3 + 5
    base, before = mixed(norm), tiny.snapshot(mixed(norm))
    tuned = attach(base, method).train()
    for _ in range(3):
        tuned(x + torch.randn(16, 6))
    tuned.eval()
    tuned.save(tmp_path)
    again = mp.load_adapter(mixed(norm), tmp_path).eval()
    assert torch.equal(again(x), tuned(x)) and tiny.same(tiny.snapshot(tuned.detach()), before)


WRAPS = {
    "Sequential": lambda tuned: nn.Sequential(tuned, nn.Linear(3, 2)),
    "compile": lambda tuned: torch.compile(tuned, backend="eager"),
    "DataParallel": nn.DataParallel,
    "ModuleDict": lambda tuned: nn.ModuleDict({"student": tuned, "head": nn.Linear(3, 3)}),
    "two": lambda tuned: nn.ModuleList([tuned, attach(mixed(nn.LayerNorm), mp.LoRA(1))]),
}


@pytest.mark.parametrize("method", [mp.LoRA(2), mp.Full(), [mp.IA3(targets=["0"], feedforward=()), mp.BitFit()]])
@pytest.mark.parametrize("wrap", WRAPS)
def test_a_module_around_a_tuned_loads_what_it_saved(wrap, method):
    x = torch.randn(5, 6)
    tuned, other = (attach(mixed(nn.LayerNorm), method) for _ in range(2))
    tiny.randomise(tuned)
    state = WRAPS[wrap](tuned).state_dict()
    assert not [key for key in state if ".base." in key]
    around = WRAPS[wrap](other)
    around.load_state_dict(state)
    assert torch.equal(other(x), tuned(x))
    missing = {key: value for key, value in state.items() if "adapters" not in key}
    with pytest.raises(RuntimeError, match="Missing key"):
        around.load_state_dict(missing)
    other.merge()
    with pytest.raises(ValueError, match="are merged; call unmerge"):
        around.load_state_dict(state)
    assert copy.deepcopy(tuned).train().state_dict().keys() == tuned.state_dict().keys()


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel])
def test_a_wrapped_model_is_refused_with_what_to_do(wrap):
    model = wrap(tiny.llama())
    with tiny.untouched(model), pytest.raises(ValueError, match="attach to model.(module|_orig_mod), then wrap what"):
        attach(model, mp.LoRA(2))


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------
def trained_by_peft(name: str, folder, **options):
    torch.manual_seed(0)
    theirs = peft.get_peft_model(ARCHITECTURES[name].model(), peft.LoraConfig(r=2, **options)).eval()
    with torch.no_grad():
        for parameter in (p for p in theirs.parameters() if p.requires_grad):
            parameter += 0.2 * torch.randn_like(parameter)
    theirs.save_pretrained(folder)
    return theirs


def apart(one, other, name: str) -> float:
    """The largest difference of the two models' outputs, as a share of the largest output."""
    batch = ARCHITECTURES[name].batch()
    with torch.no_grad():
        a, b = (next(iter(model(**batch).values())) for model in (one, other))
    return ((a - b).abs().max() / max(1, a.abs().max())).item()


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("name, targets", [("OPT", ["q_proj"]), ("GPT-2", ["c_attn"]), ("BERT", ["query"]),
                                           ("Phi", ["fc1"]), ("BART", ["v_proj"]), ("Qwen2", ["k_proj"])])  # fmt: skip
def test_biases_that_peft_trained_along(name, targets, bias, tmp_path):
    theirs = trained_by_peft(name, tmp_path, target_modules=targets, bias=bias)
    tuned = mp.load_adapter(ARCHITECTURES[name].model(), tmp_path)
    assert apart(theirs, tuned, name) <= 2e-6 < 1e-3 < apart(theirs, ARCHITECTURES[name].model(), name)
    assert tuned.count().trainable == sum(p.numel() for p in theirs.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["RoBERTa, classifier", "BERT, classifier", "Llama, classifier"])
def test_a_saved_module_takes_what_is_inside_it_along(name, tmp_path):
    theirs = trained_by_peft(name, tmp_path, target_modules="all-linear", task_type="SEQ_CLS")
    tuned = mp.load_adapter(ARCHITECTURES[name].model(), tmp_path)
    assert apart(theirs, tuned, name) <= 2e-6 < 1e-3 < apart(theirs, ARCHITECTURES[name].model(), name)
    assert tuned.count().trainable == sum(p.numel() for p in theirs.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["GPT-NeoX", "Qwen3", "ELECTRA", "T5", "ViT"])
@pytest.mark.parametrize("mark", ["_orig_mod.", "module.", "default"])
def test_marks_of_wrappers_in_the_keys_are_read_over(name, mark, tmp_path):
    theirs = trained_by_peft(name, tmp_path, target_modules="all-linear")
    file = tmp_path / "adapter_model.safetensors"
    if mark == "default":
        marked = {key.replace(".weight", ".default.weight"): value for key, value in load_file(file).items()}
    else:
        marked = {key.replace("model.", f"model.{mark}", 1): value for key, value in load_file(file).items()}
    assert marked.keys().isdisjoint(load_file(file)), "every key carries the mark"
    save_file(marked, file)
    tuned = mp.load_adapter(ARCHITECTURES[name].model(), tmp_path)
    assert apart(theirs, tuned, name) <= 2e-6 < 1e-3 < apart(theirs, ARCHITECTURES[name].model(), name)


# ---------------------------------------------------------------------------------------------------------------------
# AdaLoRA over several runs
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("runs", [(8, 8), (3, 5, 4), (20, 6), (1,) * 9])
def test_adalora_s_schedule_goes_on_over_runs(runs):
    """Cut into runs, training keeps the ranks that one run keeps after as many steps, and what is pruned stays so."""
    method = mp.AdaLoRA(rank=2, initial_rank=4, steps=8, warmup=1, final=2, targets=["q_proj", "v_proj"])
    tuned = attach(mp.load("pocket")[0], method)
    seen = []
    for steps in runs:
        mp.fit(tuned, mp.world.pirate(), steps=steps, batch=2, progress=False,
               callback=lambda *_: seen.append(sum(ranks(tuned).values())))  # fmt: skip
    layers, budgets = len(tuned.layers()), []
    for step in range(1, sum(runs) + 1):
        budgets.append(method.budget(min(step, 6), layers) if step > 1 else 4 * layers)
    assert seen == budgets[: len(seen)] and seen[-1] == 2 * layers


def test_adalora_gives_nothing_to_a_place_that_the_loss_never_reaches():
    """Its penalty alone moves P and Q there, which is no importance; the first step says which place it is."""
    base = mp.load("pocket")[0]
    base.model.layers[-1].mlp.act_fn.register_forward_hook(lambda *call: call[-1].detach())  # of what gate_proj gives
    method = mp.AdaLoRA(rank=1, initial_rank=2, steps=6, warmup=1, final=2, targets=["gate_proj"])
    tuned = attach(base, method)
    with pytest.warns(UserWarning, match="1 of 4 places got no gradient in the first step, '.*3.mlp.gate_proj'"):
        mp.fit(tuned, mp.world.pirate(), steps=6, batch=2, progress=False)
    kept = ranks(tuned)
    assert kept["model.layers.3.mlp.gate_proj"] == 0 and sum(kept.values()) == 4
