"""Serving many adapters, measured once and shipped: `python -m minipeft.course.serving`.

The pocket model answers 32 prompts with 1 to 32 adapters at r = 8, in two ways, which every round runs in turn: all
rows in one batch, and one batch for each adapter.
"""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

from minipeft.attach import attach
from minipeft.methods.lora import LoRA
from minipeft.serve.tenants import Bank
from minipeft.targets import numbers
from minipeft.whole import write_whole

FILE = Path(__file__).with_name("serving.json")
ROWS, RANK, PROMPT, WRITTEN, ROUNDS = 32, 8, 8, 12, 5
NUMBERS = (1, 2, 4, 8, 16, 32)


def make(folder: Path, model: torch.nn.Module, number: int) -> list[str]:
    """Writes adapters with random numbers into the folder: what they say costs what sense would cost."""
    names = [f"tenant-{i}" for i in range(number)]
    for seed, name in enumerate(names):
        tuned = attach(model, LoRA(rank=RANK), seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for layer in tuned.adapters["default"].values():
            layer.B.data.normal_(0, 0.02, generator=generator)
        tuned.save(folder / name)
        tuned.detach()
    return names


def prompts(rows: int = ROWS) -> torch.Tensor:
    return torch.randint(5, 400, (rows, PROMPT), generator=torch.Generator().manual_seed(0))


def seconds(work: Callable, *args) -> float:
    """CPU seconds of this process."""
    started = time.process_time()
    work(*args)
    return time.process_time() - started


def one_batch(bank: Bank, ids: torch.Tensor, rows: list[str]) -> torch.Tensor:
    return bank.generate(ids, adapters=rows, attention_mask=torch.ones_like(ids), **GREEDY)


def batch_by_batch(bank: Bank, ids: torch.Tensor, rows: list[str]) -> torch.Tensor:
    """The rows of one adapter after those of another."""
    out = torch.empty(len(rows), ids.shape[1] + WRITTEN, dtype=ids.dtype)
    for name in dict.fromkeys(rows):
        own = [i for i, each in enumerate(rows) if each == name]
        out[own] = one_batch(bank, ids[own], [name] * len(own))
    return out


GREEDY = {"do_sample": False, "min_new_tokens": WRITTEN, "max_new_tokens": WRITTEN, "pad_token_id": 0}


def measure(report: Callable[[str], object] = print) -> dict:
    from minipeft.world import load

    torch.set_num_threads(1)
    model, _ = load("pocket")
    size = 4 * numbers(model)
    ids, found = prompts(), []
    with tempfile.TemporaryDirectory() as folder:
        names = make(Path(folder), model, max(NUMBERS))
        bank = Bank(model, folder)
        assert not bank.check(names)
        for number in NUMBERS:
            rows = [names[i % number] for i in range(ROWS)]
            together, apart = one_batch(bank, ids, rows), batch_by_batch(bank, ids, rows)
            if not torch.equal(together, apart):
                raise RuntimeError("The two ways wrote different tokens.")
            rounds = [[seconds(way, bank, ids, rows) for way in (one_batch, batch_by_batch)] for _ in range(ROUNDS)]
            speed = [[ROWS * WRITTEN / row[way] for row in rounds] for way in (0, 1)]
            resident = sum(bank.resident[name] for name in names[:number])
            found.append({
                "adapters": number,
                "one batch, tokens a CPU second": speed[0],
                "batch by batch, tokens a CPU second": speed[1],
                "bank, bytes": size + resident,
                "merged copies, bytes": number * size,
            })  # fmt: skip
            report(
                f"{number} adapters: {statistics.median(speed[0]):.0f} and {statistics.median(speed[1]):.0f} tokens/s"
            )
        bank.close()
    return {
        "what": f"{ROWS} prompts of {PROMPT} words, {WRITTEN} more each, greedy, r = {RANK}, {ROUNDS} rounds",
        "points": found,
        "measured": {
            "device": "CPU, 1 thread", "torch": torch.__version__, "python": platform.python_version(),
            "date": date.today().isoformat(),
        },
    }  # fmt: skip


def measured() -> dict:
    """What `measure` found when the course was made."""
    return json.loads(FILE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    write_whole(FILE, json.dumps(measure(), indent=1, ensure_ascii=False) + "\n")
