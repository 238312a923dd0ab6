"""The rows of the ledger about time and memory: what is counted stands beside what the clock says."""

from __future__ import annotations

import time
from functools import cache

import torch

from minipeft.analyze.budget import budget, multiply_adds, step_share, training_bytes
from minipeft.attach import attach
from minipeft.course.claims.ledger import CANNOT_TELL, HOLDS, WRONG, claim
from minipeft.learn.protocol import Interval, interval
from minipeft.methods.lora import LoRA
from minipeft.methods.select import Full

WIDTHS = (64, 128, 256, 512, 1024)
RANK, REPEATS = 8, 7


def step_ratios(width: int, rank: int = RANK, repeats: int = REPEATS) -> list[float]:
    """CPU seconds of a LoRA step over those of a full step, AdamW included, for a small LLaMA of two layers of this
    width and 256 tokens. The two take turns, so that what else the machine does meets both."""
    import transformers

    shape = dict(vocab_size=64, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=2)
    config = transformers.LlamaConfig(**shape, num_attention_heads=4)
    ids = torch.randint(3, 64, (4, 64), generator=torch.Generator().manual_seed(0))
    steps = []
    for method in (LoRA(rank=rank), Full()):
        tuned = attach(transformers.LlamaForCausalLM(config), method)
        optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-4)
        steps.append((tuned, optimizer))

    def seconds(tuned, optimizer) -> float:
        started = time.process_time()
        tuned(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - started

    for each in steps:
        seconds(*each)  # the first step makes the moments
    return [seconds(*steps[0]) / seconds(*steps[1]) for _ in range(repeats)]


@cache
def clock() -> dict[str, dict]:
    """By width: the law 2/3 + 2r/N of the square layers, and the ratio that the clock gave, with its interval."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {
            str(width): {
                "law": round(step_share(width, width, RANK), 3),
                "clock, 95 %": [round(x, 3) for x in interval(step_ratios(width))],
            }
            for width in WIDTHS
        }
    finally:
        torch.set_num_threads(threads)


def _times(least: float):
    def rule(f: dict) -> str:
        """The claim needs a step to cost 1/least or less, by the count and by the clock alike."""
        clocks = [Interval(*each["clock, 95 %"]) for each in f["LoRA ÷ full, by width"].values()]
        counted = min(f["full ÷ LoRA, multiply-adds"].values()) >= least
        if counted and all(each.high <= 1 / least for each in clocks):
            return HOLDS
        return WRONG if not counted and all(each.low > 1 / least for each in clocks) else CANNOT_TELL

    return rule


@claim("C15", "LoRA trains 100 to 1000 times faster or cheaper", "E §5a", "measured", _times(100))
def _() -> dict:
    """Multiply-adds of one training step of LLaMA-7B on 512 tokens, LoRA r=8 on all linear layers, counted. And CPU
    seconds of a step, LoRA r=8 over full fine-tuning, on two layers of growing width (one thread, the two in turns,
    seven pairs), beside the law 2/3 + 2r/N."""
    full, lora = (multiply_adds("llama-7b", method, 1, 512).total for method in (None, LoRA(rank=8)))
    return {"full ÷ LoRA, multiply-adds": {"LoRA r=8": round(full / lora, 3)}, "LoRA ÷ full, by width": clock()}


@claim("C16", "PEFT cuts compute 10 to 100 times", "E §3", "measured", _times(10))
def _() -> dict:
    """Full fine-tuning's multiply-adds over each method's, LLaMA-7B, 512 tokens, counted; and CPU seconds of a step as
    in C15, at the widest and the narrowest model only."""
    full = multiply_adds("llama-7b", None, 1, 512).total
    methods = {"LoRA r=1 on q, v": LoRA(rank=1, targets=["q_proj", "v_proj"]), "LoRA r=8": LoRA(rank=8)}
    counted = {name: round(full / multiply_adds("llama-7b", m, 1, 512).total, 3) for name, m in methods.items()}
    return {"full ÷ LoRA, multiply-adds": counted, "LoRA ÷ full, by width": clock()}


def _limited(f: dict) -> str:
    """Limited: the small model saves less than half of what the large one does."""
    memory = f["memory saved, pocket"] < f["memory saved, llama-7b"] / 2
    found, saved = Interval(*f["time of a step saved at width 128, 95 %"]), f["multiply-adds saved, llama-7b"] / 2
    if found.low < saved < found.high:
        return CANNOT_TELL
    slow = found.high <= saved
    if memory == slow:
        return HOLDS if memory else WRONG
    return f"holds when the gain is {'time, not memory' if slow else 'memory, not time'}"


@claim("C29", "LoRA suits large matrices; on small models the gain is limited", "A 9.6, D", "measured", _limited)
def _() -> dict:
    """What LoRA r=8 on all linear layers saves of full fine-tuning, counted alike for both models: bytes of weights,
    gradients and Adam's moments in bfloat16, without activations. And time: CPU seconds of a step at the pocket model's
    width, as in C15, against multiply-adds of LLaMA-7B. Limited: less than half of what the large model saves."""
    from minipeft.world import load

    saved = {}
    for name in ("pocket", "llama-7b"):
        b = budget(load("pocket")[0] if name == "pocket" else name, LoRA(rank=8))
        ours, full = training_bytes(b.base, b.trainable, b.trainable), training_bytes(b.base, b.base)
        saved[f"memory saved, {name}"] = round(1 - sum(ours.values()) / sum(full.values()), 3)
    ours, full = (multiply_adds("llama-7b", method, 1, 512).total for method in (LoRA(rank=8), None))
    mean, low, high = clock()["128"]["clock, 95 %"]
    return saved | {
        "multiply-adds saved, llama-7b": round(1 - ours / full, 3),
        "time of a step saved at width 128, 95 %": [round(1 - x, 3) for x in (mean, high, low)],
    }


def wins_from(figures: dict) -> str | None:
    """The least width from which on the clock's whole interval says that LoRA's step is the faster one."""
    found = None
    for width in sorted(figures, key=int, reverse=True):
        if figures[width]["clock, 95 %"][2] >= 1:
            break
        found = width
    return found
