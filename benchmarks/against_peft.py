"""One LoRA training step here and in HF PEFT, on the same model and batch: `python benchmarks/against_peft.py`.

The two run in turn; printed are ratios of step times, pair by pair, so a change of the machine's speed cancels.
"""

import copy
import statistics
import time

import peft
import torch

import minipeft as mp
from minipeft.learn.fit import collate, encode

RANKS = (1, 8, 64)
PAIRS = 30


def step_of(model, inputs):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> float:
        started = time.perf_counter()
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - started

    return step


def main() -> None:
    base, tokenizer = mp.load("pocket")
    rows = mp.world.pirate().data["train"].select(range(16))
    inputs = collate("text", encode("text", rows, tokenizer, 128), tokenizer, "cpu")
    print(f"torch {torch.__version__}, peft {peft.__version__}, {torch.get_num_threads()} threads, batch 16 × ", end="")
    print(f"{inputs['input_ids'].shape[1]}; median of {PAIRS} pairs (smallest to largest)")
    frozen = copy.deepcopy(base).requires_grad_(False)
    frozen.model.norm.weight.requires_grad_(True)  # something must train for a backward pass to run
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    for rank in RANKS:
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
        ours = step_of(mp.attach(copy.deepcopy(base), mp.LoRA(rank=rank)).train(), inputs)
        theirs = step_of(peft.get_peft_model(copy.deepcopy(base), config).train(), inputs)
        bare = step_of(frozen.train(), inputs)
        for step in (ours, theirs, bare):
            step()
        times = [(ours(), theirs(), bare()) for _ in range(PAIRS)]
        for label, ratios in (
            ("minipeft / PEFT", [a / b for a, b, _ in times]),
            ("minipeft / only the last norm trains", [a / c for a, _, c in times]),
        ):
            low, high = min(ratios), max(ratios)
            print(f"rank {rank:3}: {label:38} {statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
