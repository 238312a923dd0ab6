"""A training step and a short forward pass here and in HF PEFT, on the same model: `python benchmarks/against_peft.py`.

Then LoRA's step against full fine-tuning's by width, beside the ratio of their multiply-adds, 2/3 + 2r/N in a square
layer.
"""

import copy
from collections.abc import Callable, Iterator

import peft
import torch
from side_by_side import DEVICE, Figure, figure, in_turn, main

import minipeft as mp
from minipeft.learn.rows import collate, encode
from minipeft.world.base import build_model

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {r: peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=LINEAR) for r in (1, 8, 64)}
PAIRS = {  # {label: (ours, theirs, what is asked of a step)}
    "LoRA r = 1": (mp.LoRA(rank=1), LORA[1], ""),
    "LoRA r = 8": (mp.LoRA(rank=8), LORA[8], "≤ 0.82"),
    "LoRA r = 64": (mp.LoRA(rank=64), LORA[64], "≤ 0.75"),
    "QLoRA r = 8": (mp.LoRA(rank=8), LORA[8], ""),
    "DoRA r = 8": (mp.DoRA(rank=8), peft.LoraConfig(r=8, lora_alpha=16, use_dora=True, target_modules=LINEAR), ""),
    "VeRA r = 256": (mp.VeRA(), peft.VeraConfig(r=256, target_modules=LINEAR), ""),
    "IA3": (
        mp.IA3(),
        peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "",
    ),
}


def step_of(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    model.train().to(DEVICE)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def forward_of(model: torch.nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    model.eval().to(DEVICE)

    @torch.no_grad()
    def forward() -> None:
        for _ in range(5):
            model(input_ids=ids)

    return forward


def figures(quick: bool = False) -> Iterator[Figure]:
    rounds = 3 if quick else 40
    base, tokenizer = mp.load("pocket")
    rows = mp.world.pirate().data["train"].select(range(16))
    inputs = collate("text", encode("text", rows, tokenizer, 128), tokenizer, DEVICE)
    ids = inputs["input_ids"]
    for label, (method, config, asked) in PAIRS.items():
        start = mp.quantize(copy.deepcopy(base)) if label.startswith("QLoRA") else base
        ours, theirs = mp.attach(copy.deepcopy(start), method), peft.get_peft_model(copy.deepcopy(start), config)
        full = copy.deepcopy(base).requires_grad_(True)
        sides = {"ours": ours, "PEFT": theirs, "full": full}
        times = in_turn({name: step_of(side, inputs) for name, side in sides.items()}, rounds)
        yield figure(f"{label}, a step", "ours / PEFT's", times["ours"], times["PEFT"], asked)
        yield figure(f"{label}, a step", "ours / full fine-tuning's", times["ours"], times["full"])
        sides = {"ours": ours, "PEFT": theirs}
        times = in_turn({name: forward_of(side, ids[:1, :20]) for name, side in sides.items()}, 4 * rounds)
        wanted = "≤ 0.80" if label == "LoRA r = 8" else ""
        yield figure(f"{label}, forward 1×20", "ours / PEFT's", times["ours"], times["PEFT"], wanted)
    for width in (64, 128) if quick else (64, 128, 256, 512, 1024):
        wide = build_model(len(tokenizer), hidden=width, layers=2, ff=3 * width)
        batch = {"input_ids": ids[:, :64], "labels": ids[:, :64]}
        sides = {"full": wide, "LoRA": mp.attach(copy.deepcopy(wide), mp.LoRA(rank=8))}
        few = max(5, rounds * 64 // width)
        times = in_turn({name: step_of(side, batch) for name, side in sides.items()}, few)
        law = f"LoRA r = 8, a step at width {width:,}; 2/3 + 2r/N = {2 / 3 + 16 / width:.2f}"
        yield figure(law, "ours / full fine-tuning's", times["LoRA"], times["full"], "≤ 1" if width >= 256 else "")


if __name__ == "__main__":
    main(figures, __doc__)
