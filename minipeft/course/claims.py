"""The claims ledger: what the course's source documents say, the check that was run, what came out, and the verdict.

    python -m minipeft.course.claims            # recomputes every row and prints the table (some minutes)
    python -m minipeft.course.claims --quick    # only the rows that take seconds
    python -m minipeft.course.claims --write    # and stores the figures and verdicts in claims.json

A row is a *check*, which returns figures, and a *rule*, which makes a verdict of them: holds, holds when …, wrong.
`claims.json` keeps the figures; the verdict must follow from them by the rule, or a test fails.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from minipeft.analyze.budget import budget, multiply_adds, training_bytes
from minipeft.analyze.spectrum import random_spectrum, spectra, truncated
from minipeft.attach import attach
from minipeft.methods.lora import LoRA
from minipeft.methods.select import Full

PATH = Path(__file__).with_name("claims.json")
HOLDS, WRONG = "holds", "wrong"


@dataclass(frozen=True)
class Claim:
    """`kind`: "exact" and "code" rows are recomputed by the tests, "measured" rows (training) by the command only,
    "atlas" rows from the shipped runs."""

    id: str
    text: str
    source: str
    kind: str
    check: Callable[[], dict]
    rule: Callable[[dict], str]


CLAIMS: dict[str, Claim] = {}


def claim(id: str, text: str, source: str, kind: str, rule: Callable[[dict], str]):
    """Registers the decorated check under `id`."""

    def register(check: Callable[[], dict]) -> Callable[[], dict]:
        CLAIMS[id] = Claim(id, text, source, kind, check, rule)
        return check

    return register


def load() -> list[dict]:
    """The stored ledger: rows with id, claim, source, kind, figures, verdict."""
    return json.loads(PATH.read_text(encoding="utf-8"))


def row(each: Claim, figures: dict) -> dict:
    return {
        "id": each.id, "claim": each.text, "source": each.source, "kind": each.kind, "check": each.check.__doc__,
        "figures": figures, "verdict": each.rule(figures),
    }  # fmt: skip


def recompute(quick: bool = False) -> list[dict]:
    """All rows anew; with `quick` the measured ones keep their stored figures."""
    stored = {r["id"]: r["figures"] for r in load()} if PATH.exists() else {}
    keep = {c.id for c in CLAIMS.values() if quick and c.kind == "measured"}
    return [row(c, stored[c.id] if c.id in keep else c.check()) for _, c in sorted(CLAIMS.items())]


# ---------------------------------------------------------------------------------------------------------------------
# Definitions, counts, code
# ---------------------------------------------------------------------------------------------------------------------
TITLE = "LoRA: Low-Rank Adaptation of Large Language Models"


def _named(f: dict) -> str:
    return HOLDS if f["claimed"].lower() in f["title"].lower() else WRONG


@claim(
    "C01", "LoRA stands for “loose RLHF” and works by subtasks and reinforcement learning", "A §2.2", "exact", _named
)
def _() -> dict:
    """The expansion is looked for in the title of the paper that named the method."""
    return {"claimed": "loose RLHF", "title": TITLE}


@claim("C02", "LoRA stands for a low-rank orthogonal adjoint matrix", "C §1.2", "exact", _named)
def _() -> dict:
    """The expansion is looked for in the title of the paper that named the method."""
    return {"claimed": "low-rank orthogonal adjoint", "title": TITLE}


def _square(d: int) -> dict:
    with torch.device("meta"):
        layer = nn.Sequential(nn.Linear(d, d, bias=False))
    b = budget(layer, LoRA(rank=8))
    return {"full": b.base, "LoRA": b.trainable, "saved in %": round(100 * (1 - b.trainable / b.base), 1)}


@claim(
    "C04",
    "1024×1024 at r=8 goes from 1,048,576 parameters to 16,384",
    "D §3.6",
    "exact",
    lambda f: HOLDS if (f["full"], f["LoRA"]) == (1_048_576, 16_384) else WRONG,
)
def _() -> dict:
    """Attached on the meta device and counted."""
    return _square(1024)


@claim(
    "C05",
    "4096×4096 at r=8 needs about 65 thousand parameters against 16 million, 99.6 % less",
    "E §4",
    "exact",
    lambda f: HOLDS if round(f["LoRA"], -3) in (65_000, 66_000) and f["saved in %"] == 99.6 else WRONG,
)
def _() -> dict:
    """Attached on the meta device and counted."""
    return _square(4096)


@claim(
    "C06",
    "ResNet-18 has 11.7 M parameters",
    "D §1",
    "exact",
    lambda f: HOLDS if round(f["parameters"] / 1e6, 1) == 11.7 else WRONG,
)
def _() -> dict:
    """Built on the meta device with 1000 classes and counted."""
    from minipeft.analyze.catalogue import build

    return {"parameters": sum(p.numel() for p in build("resnet-18").parameters())}


def _t5():
    import transformers

    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    return attach(transformers.T5ForConditionalGeneration(config), LoRA(rank=4))


def _selects(f: dict) -> str:
    return HOLDS if f["of LoRA's"] == f["LoRA's"] and not f["others"] else WRONG


def _select(chosen: Callable[[str, nn.Parameter], bool]) -> dict:
    named = dict(_t5().named_parameters())
    picked = {name for name, p in named.items() if chosen(name, p)}
    truth = {name for name, p in named.items() if p.requires_grad}
    return {"LoRA's": len(truth), "of LoRA's": len(picked & truth), "others": len(picked - truth)}


@claim("C08", 'hasattr(parameter, "A") selects LoRA\'s parameters', "D §3.6.2", "code", _selects)
def _() -> dict:
    """A small T5 with LoRA: how many parameters the condition picks."""
    return _select(lambda name, p: hasattr(p, "A") or hasattr(p, "B"))


@claim("C09", '"A" in name or "B" in name selects LoRA\'s parameters', "D §3.6.2", "code", _selects)
def _() -> dict:
    """A small T5 with LoRA: how many parameters the condition picks."""
    return _select(lambda name, p: "A" in name or "B" in name)


@claim(
    "C10",
    "One d-wide prefix cut into halves fits the attention's K and V",
    "D §3.3",
    "code",
    lambda f: HOLDS if f["half"] == f["K needs"] else WRONG,
)
def _() -> dict:
    """The widths of a half and of K, read off the pocket model's projection."""
    from minipeft.world.base import load

    attention = load("pocket")[0].model.layers[0].self_attn
    return {"half": attention.q_proj.in_features // 2, "K needs": attention.k_proj.out_features}


@claim(
    "C15",
    "LoRA trains 100 to 1000 times faster or cheaper",
    "E §5a",
    "exact",
    lambda f: HOLDS if f["full ÷ LoRA"] >= 100 else WRONG,
)
def _() -> dict:
    """Multiply-adds of one training step of LLaMA-7B on 512 tokens, LoRA r=8 on all linear layers, counted."""
    full, lora = (multiply_adds("llama-7b", method, 1, 512).total for method in (None, LoRA(rank=8)))
    return {"full": full, "LoRA": lora, "full ÷ LoRA": round(full / lora, 3)}


@claim(
    "C16",
    "PEFT cuts compute 10 to 100 times",
    "E §3",
    "exact",
    lambda f: HOLDS if min(v for k, v in f.items() if k.startswith("÷")) >= 10 else WRONG,
)
def _() -> dict:
    """Full fine-tuning's multiply-adds over each method's, LLaMA-7B, 512 tokens, counted."""
    full = multiply_adds("llama-7b", None, 1, 512).total
    methods = {"LoRA r=1 on q, v": LoRA(rank=1, targets=["q_proj", "v_proj"]), "LoRA r=8": LoRA(rank=8)}
    return {f"÷ {name}": round(full / multiply_adds("llama-7b", m, 1, 512).total, 3) for name, m in methods.items()}


@claim(
    "C19",
    "B starts at zero, so the first update does not disturb the model",
    "E §4",
    "code",
    lambda f: HOLDS if f["largest difference"] == 0 else WRONG,
)
def _() -> dict:
    """Logits of the pocket model with a fresh adapter against the base's."""
    from minipeft.world.base import load

    model, tokenizer = load("pocket")
    ids = tokenizer("on sunday , anna went to the lake .", return_tensors="pt").input_ids
    with torch.no_grad():
        before = model(input_ids=ids).logits
        after = attach(model, LoRA(rank=8))(input_ids=ids).logits
    return {"largest difference": (after - before).abs().max().item()}


@claim(
    "C21",
    "Merging gives the same model",
    "E §4",
    "code",
    lambda f: (
        "wrong"
        if f["float32, largest logit difference"] > 1e-4
        else HOLDS
        if f["bfloat16, part of ΔW lost"] < 0.01
        else "holds when the weights are float32"
    ),
)
def _() -> dict:
    """The shipped pirate adapter merged in float32; and an update of 0.3 % of ‖W‖ merged in bfloat16."""
    from minipeft.course.shipped import shipped
    from minipeft.serve.checkpoint import load_adapter
    from minipeft.world.base import load

    model, tokenizer = load("pocket")
    tuned = load_adapter(model, shipped("pirate"))
    ids = tokenizer("on sunday , anna went to the lake .", return_tensors="pt").input_ids
    with torch.no_grad():
        before = tuned(input_ids=ids).logits
        tuned.merge()
        error = (tuned(input_ids=ids).logits - before).abs().max().item()
    tuned.detach()
    weight = load("pocket")[0].model.layers[0].mlp.up_proj.weight.detach().bfloat16().float()
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(weight.shape[0], 4, generator=generator) @ torch.randn(4, weight.shape[1], generator=generator)
    delta *= 0.003 * weight.norm() / delta.norm()
    lost = ((weight + delta).bfloat16().float() - weight - delta).norm() / delta.norm()
    return {
        "float32, largest logit difference": float(f"{error:.1e}"),
        "bfloat16, part of ΔW lost": round(lost.item(), 2),
    }


@claim(
    "C23",
    "Full fine-tuning needs an order of magnitude more memory than sampling, LoRA only slightly more",
    "E §5c",
    "exact",
    lambda f: (
        "holds when only weights, gradients and optimizer state are counted, not activations"
        if f["full ÷ sampling"] >= 8 and f["LoRA ÷ sampling"] < 1.2
        else WRONG
    ),
)
def _() -> dict:
    """Bytes for LLaMA-7B in bfloat16 with Adam, LoRA r=8 on all linear layers, activations left out."""
    b = budget("llama-7b", LoRA(rank=8))
    sampling = 2 * b.base
    full = sum(training_bytes(b.base, b.base).values())
    lora = sum(training_bytes(b.base, b.trainable, b.trainable).values())
    return {"full ÷ sampling": full / sampling, "LoRA ÷ sampling": round(lora / sampling, 3)}


@claim(
    "C24",
    "Adapters are under 100 MB",
    "E §5d",
    "exact",
    lambda f: (
        HOLDS
        if max(f.values()) < 100
        else "holds when the rank is small for the model's size"
        if min(f.values()) < 100
        else WRONG
    ),
)
def _() -> dict:
    """Megabytes of the float32 adapter file, foretold to the byte."""
    qv = ["q_proj", "v_proj"]
    cases = [
        ("llama-7b", 8, qv),
        ("llama-7b", 16, "all-linear"),
        ("llama-7b", 64, "all-linear"),
        ("llama-3-70b", 8, qv),
    ]
    return {
        f"{name} r={r} {'q, v' if t is qv else t}": round(budget(name, LoRA(rank=r, targets=t)).file_bytes / 1e6, 1)
        for name, r, t in cases
    }


@claim(
    "C30",
    "The reported table of precision, recall and F1 is consistent with itself",
    "C §5.4",
    "exact",
    lambda f: HOLDS if f["most predictions that fit"] >= f["texts"] else WRONG,
)
def _() -> dict:
    """A class with n texts, recall R and precision P was predicted n·R/P times. A classifier predicts one class for
    every text, so the predictions must add up to the texts; the most that the table's rounding allows is counted."""
    classes = ((0.92, 0.88, 1000), (0.91, 0.89, 500))  # precision, recall, support
    most = sum(n * (recall + 0.005) / (precision - 0.005) for precision, recall, n in classes)
    return {"texts": sum(n for *_, n in classes), "most predictions that fit": int(most)}


# ---------------------------------------------------------------------------------------------------------------------
# From the atlas
# ---------------------------------------------------------------------------------------------------------------------
def _best(runs, task: str, method: str, rank: int | None = None) -> tuple[float, float]:
    """(learning rate, mean loss over the seeds) of the best rate."""
    from minipeft.course.atlas import curve

    means = curve(runs, task, method, rank)["mean"]
    return float(means.idxmin()), float(means.min())


LANGUAGE = ("pirate", "cipher", "flip")


def _only(tasks: list[str], of: int) -> str:
    """The verdict of a claim that came out on some of the tasks."""
    return HOLDS if len(tasks) == of else f"holds when the task is {' or '.join(tasks)}" if tasks else WRONG


@claim(
    "C14",
    "PEFT reaches 90–100 % of full fine-tuning's gain with 0.1–1 % of the parameters",
    "E §2",
    "atlas",
    lambda f: _only([t for t in LANGUAGE if f[f"{t}, r=1 of full"] >= 0.9], len(LANGUAGE)),
)
def _() -> dict:
    """Gain of LoRA over full fine-tuning's after 30 steps, each at its best rate, on the pocket model. Rank 1 is the
    least there is, and just above 1 % of so small a model."""
    from minipeft.course import atlas
    from minipeft.learn.fit import evaluate
    from minipeft.learn.sweep import task_of
    from minipeft.world.base import load

    runs, model, figures = atlas.load(), load("pocket")[0], {}
    for task in LANGUAGE:
        before = evaluate(model, task_of(task), n=50).loss
        full = before - _best(runs, task, "Full")[1]
        for rank in (1, 16):
            figures[f"{task}, r={rank} of full"] = round((before - _best(runs, task, "LoRA", rank)[1]) / full, 2)
    lora = runs[(runs.method == "LoRA") & (runs["rank"] == 1)].iloc[0]
    return figures | {"trainable share at r=1 in %": round(float(100 * lora.trainable / lora.total), 2)}


@claim(
    "C28",
    "Low rank hurts, high rank costs more for little",
    "D §3.6.5, E",
    "atlas",
    lambda f: _only([t for t in LANGUAGE if f[f"{t}, r=1 − r=16"] > 0.1], len(LANGUAGE)),
)
def _() -> dict:
    """Loss at rank 1 minus loss at rank 16 after 30 steps, each at its best rate, in nats a token. So few steps do not
    tell a missing rank from a slower start: cipher is far from its floor at any rank."""
    from minipeft.course import atlas

    runs = atlas.load()
    return {
        f"{t}, r=1 − r=16": round(_best(runs, t, "LoRA", 1)[1] - _best(runs, t, "LoRA", 16)[1], 3) for t in LANGUAGE
    }


@claim(
    "C33",
    "The best learning rate of LoRA is about ten times full fine-tuning's",
    "the article that E retells",
    "atlas",
    lambda f: _only([t for t, ratio in f.items() if 5 <= ratio <= 20], len(f)),
)
def _() -> dict:
    """Best rate of LoRA r=16 over that of full fine-tuning after 30 steps. The rates tried are a factor 3 apart; on
    pirate full fine-tuning's best is the largest tried, so the true ratio can only be smaller."""
    from minipeft.course import atlas

    runs = atlas.load()
    tasks = (*LANGUAGE, "facts(64)")
    return {t: round(_best(runs, t, "LoRA", 16)[0] / _best(runs, t, "Full")[0], 1) for t in tasks}


# ---------------------------------------------------------------------------------------------------------------------
# Measured
# ---------------------------------------------------------------------------------------------------------------------
@claim(
    "C07",
    "Both A and B drawn at random is a fine initialisation",
    "D §3.6.2",
    "measured",
    lambda f: WRONG if min(f["A and B random"]) > f["B = 0"] + 0.5 else HOLDS,
)
def _() -> dict:
    """Loss of the untrained model on its own stories, standard normal A and B, r=8, γ=1, three seeds."""
    from minipeft.learn.fit import evaluate
    from minipeft.world import load, plain

    model = load("pocket")[0]
    tuned = attach(model, LoRA(rank=8, gamma=1.0))
    losses = [evaluate(tuned, plain(), n=50).loss]
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for layer in tuned.adapters["default"].values():
            layer.A.data = torch.randn(layer.A.shape, generator=generator)
            layer.B.data = torch.randn(layer.B.shape, generator=generator)
        losses.append(evaluate(tuned, plain(), n=50).loss)
    return {"B = 0": round(losses[0], 3), "A and B random": [round(x, 2) for x in losses[1:]]}


def _low(f: dict) -> str:
    tasks, chance = [f[t] for t in LANGUAGE], f["random"]
    energy = all(t["gain kept at r=8"] >= 0.85 and t["stable rank"] < chance["stable rank"] / 4 for t in tasks)
    wide = any(t["effective rank"] > chance["effective rank"] / 4 for t in tasks)
    if energy and wide:
        return "holds when rank means energy or loss; by effective rank the updates are wide"
    return HOLDS if energy else WRONG


@claim("C18", "Fine-tuning updates are low-rank", "E §4", "measured", _low)
def _() -> dict:
    """Full fine-tuning, 60 steps: median ranks of the linear layers' ΔW beside a random matrix's, and the share of the
    gain in loss that stays when each ΔW is cut to its best rank 8 (vectors keep their whole change)."""
    from minipeft.learn.fit import evaluate, fit
    from minipeft.learn.sweep import task_of
    from minipeft.world import load

    model, figures = load("pocket")[0], {}
    for name in LANGUAGE:
        task, before = task_of(name), evaluate(model, task_of(name), n=50).loss
        tuned = attach(model, Full())
        fit(tuned, task, steps=60, lr=1e-3, batch=10, progress=False)
        found, whole = spectra(tuned), evaluate(tuned, task, n=50).loss
        with truncated(tuned, 8, found):
            cut = evaluate(tuned, task, n=50).loss
        tuned.detach()
        linear = [s for path, s in found.items() if "layers" in path]
        figures[name] = {
            "stable rank": round(statistics.median(s.stable_rank for s in linear), 1),
            "effective rank": round(statistics.median(s.effective_rank for s in linear), 1),
            "gain kept at r=8": round((before - cut) / (before - whole), 3),
        }
    sigma = random_spectrum((128, 128), 1.0)
    share = sigma / sigma.sum()
    figures["random"] = {
        "stable rank": round(float((sigma**2).sum() / sigma[0] ** 2), 1),
        "effective rank": round(float(2 ** -(share * torch.tensor(share).log2().numpy()).sum()), 1),
    }
    return figures


def _less(f: dict) -> str:
    if max(f["LoRA r=16"]) < min(f["full"]):
        return HOLDS
    fewer = statistics.fmean(f["LoRA r=16"]) < statistics.fmean(f["full"])
    return "holds when averaged over seeds" if fewer else WRONG


@claim("C22", "Full fine-tuning forgets; PEFT forgets less", "E §2", "measured", _less)
def _() -> dict:
    """Rise of the loss on the base's own stories once the loss on pirate speech is 1.35 (floor 0.794); pocket model,
    two seeds, one task."""
    from minipeft.analyze.forgetting import forgetting
    from minipeft.world import load, pirate

    model, found = load("pocket")[0], {}
    methods = {"LoRA r=16": (LoRA(rank=16), 3e-3), "full": (Full(), 1e-3)}
    for seed in (0, 1):
        for each in forgetting(model, methods, pirate(), target=1.35, steps=120, seed=seed, n=50):
            found.setdefault(each.method, []).append(round(each.forgot, 3))
    return found


def table(rows: list[dict]) -> str:
    """The ledger as text: id, verdict, claim, figures."""
    lines = []
    for each in rows:
        lines.append(f"{each['id']}  {each['verdict'].upper() if each['verdict'] == WRONG else each['verdict']}")
        lines.append(f"     {each['claim']} ({each['source']})")
        lines.append(f"     {each['figures']}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="keep the stored figures of the measured rows")
    parser.add_argument("--write", action="store_true", help="store what came out")
    options = parser.parse_args()
    rows = recompute(options.quick)
    print(table(rows))
    if options.write:
        PATH.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
