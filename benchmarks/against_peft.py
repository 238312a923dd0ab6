"""A training step and a short forward pass here and in HF PEFT, on the same model: `python benchmarks/against_peft.py`.

All that is compared runs in turn, round after round; printed are medians of the rounds' ratios, so that a change of the
machine's speed cancels, and in brackets the middle half of them. Then LoRA's step against full fine-tuning's, by width.
"""

import copy
import statistics
import time
from collections.abc import Callable

import peft
import torch

import minipeft as mp
from minipeft.learn.rows import collate, encode
from minipeft.world.base import build_model

ROUNDS = 40
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {r: peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=LINEAR) for r in (1, 8, 64)}
PAIRS = {  # {label: (ours, theirs)}
    **{f"LoRA r = {r}": (mp.LoRA(rank=r), config) for r, config in LORA.items()},
    "QLoRA r = 8": (mp.LoRA(rank=8), LORA[8]),
    "DoRA r = 8": (mp.DoRA(rank=8), peft.LoraConfig(r=8, lora_alpha=16, use_dora=True, target_modules=LINEAR)),
    "VeRA r = 256": (mp.VeRA(), peft.VeraConfig(r=256, target_modules=LINEAR)),
    "IA3": (
        mp.IA3(),
        peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
}


def step_of(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def forward_of(model: torch.nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    model.eval()

    @torch.no_grad()
    def forward() -> None:
        for _ in range(5):
            model(input_ids=ids)

    return forward


def ratios(first: Callable[[], None], *others: Callable[[], None], rounds: int = ROUNDS) -> list[str]:
    """How long each of `others` takes, in the time of `first`."""
    works, times = (first, *others), []
    for round_ in range(-2, rounds):
        row = []
        for work in works:
            started = time.perf_counter()
            work()
            row.append(time.perf_counter() - started)
        if round_ >= 0:
            times.append(row)
    found = []
    for i in range(1, len(works)):
        low, middle, high = statistics.quantiles([row[i] / row[0] for row in times], n=4)
        found.append(f"{middle:.2f} ({low:.2f}–{high:.2f})")
    return found


def main() -> None:
    base, tokenizer = mp.load("pocket")
    rows = mp.world.pirate().data["train"].select(range(16))
    inputs = collate("text", encode("text", rows, tokenizer, 128), tokenizer, "cpu")
    ids = inputs["input_ids"]
    print(f"torch {torch.__version__}, peft {peft.__version__}, {torch.get_num_threads()} threads\n")
    step, whole, forward = f"step {ids.shape[0]}×{ids.shape[1]} / PEFT's", "step / full's", "forward 1×20 / PEFT's"
    print(f"{'':14}{step:>24}{whole:>24}{forward:>24}")
    for label, (method, config) in PAIRS.items():
        start = mp.quantize(copy.deepcopy(base)) if label.startswith("QLoRA") else base
        ours, theirs = mp.attach(copy.deepcopy(start), method), peft.get_peft_model(copy.deepcopy(start), config)
        full = copy.deepcopy(base).requires_grad_(True)
        mine = step_of(ours, inputs)
        cells = ratios(step_of(theirs, inputs), mine) + ratios(step_of(full, inputs), mine)
        cells += ratios(forward_of(theirs, ids[:1, :20]), forward_of(ours, ids[:1, :20]), rounds=4 * ROUNDS)
        print(f"{label:14}" + "".join(f"{cell:>24}" for cell in cells), flush=True)
    print("\nLoRA's step at r = 8 / full fine-tuning's, 16×64 tokens, two blocks, by width")
    for width in (64, 128, 256, 512):
        wide = build_model(len(tokenizer), hidden=width, layers=2, ff=3 * width)
        batch = {"input_ids": ids[:, :64], "labels": ids[:, :64]}
        tuned = mp.attach(copy.deepcopy(wide), mp.LoRA(rank=8))
        print(f"{width:14}{ratios(step_of(wide, batch), step_of(tuned, batch))[0]:>24}", flush=True)


if __name__ == "__main__":
    main()
