"""32 rows spread over 1, 4, 16 and 32 adapters in one batch: `python benchmarks/mixed_batch.py`.

Our gathered products, the same by groups of rows, HF PEFT's `adapter_names`, and one adapter for all rows (PEFT's
`set_adapter`), on the pocket model at r = 8. All of them run in turn, round after round; printed are medians of the
rounds' ratios of CPU time, in brackets the middle half. `decode` is one token on a cache of 20, `forward` 20 tokens.
"""

import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch

import minipeft as mp
from minipeft.serve.tenants import Bank

ROWS, RANK, ROUNDS = 32, 8, 15
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapters(folder: Path, base: torch.nn.Module, number: int) -> None:
    """Writes adapters that all do something, a0, a1, …"""
    tuned = mp.attach(base, mp.LoRA(rank=RANK), name="a0")
    for i in range(number):
        if i:
            tuned.add(f"a{i}", mp.LoRA(rank=RANK), seed=i)
        for layer in tuned.adapters[f"a{i}"].values():
            layer.B.data.normal_(0, 0.02)
        tuned.save(folder / f"a{i}", f"a{i}")
    tuned.detach()


def seconds(works: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """CPU seconds of each work, round by round, after two rounds that do not count."""
    times = {name: [] for name in works}
    for round_ in range(-2, rounds):
        for name, work in works.items():
            started = time.process_time()
            work()
            if round_ >= 0:
                times[name].append(time.process_time() - started)
    return times


def ratio(times: dict[str, list[float]], above: str, below: str) -> str:
    low, middle, high = statistics.quantiles([a / b for a, b in zip(times[above], times[below], strict=True)], n=4)
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


class Grouped:
    """The other way: the rows of each adapter go through that adapter's two products."""

    def __init__(self, bank: Bank, model: torch.nn.Module, rows: list[str]):
        self.hooks = []
        for path, parts in bank.compose([f"a{i}" for i in range(len(set(rows)))] + [None]).parts.items():
            groups = [torch.tensor([i for i, row in enumerate(rows) if row == name]) for name in dict.fromkeys(rows)]
            own = [(index, parts["A"][k], parts["B"][k]) for k, index in enumerate(groups)]
            self.hooks.append(model.get_submodule(path).register_forward_hook(self.hook(own)))

    def hook(self, own: list):
        def act(module, args, y):
            (x,) = args
            for index, A, B in own:
                y.index_add_(0, index, x[index] @ A.T @ B.T)
            return y

        return act


@torch.no_grad()
def measure(number: int, folder: Path) -> dict[str, dict[str, list[float]]]:
    base, _ = mp.load("pocket")
    rows = [f"a{i % number}" for i in range(ROWS)]
    bank = Bank(copy.deepcopy(base), folder)
    plain = copy.deepcopy(base)
    Grouped(bank, plain, rows)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder / "a0", adapter_name="a0").eval()
    for i in range(1, number):
        theirs.load_adapter(folder / f"a{i}", adapter_name=f"a{i}")
    ids = torch.randint(5, 400, (ROWS, 20), generator=torch.Generator().manual_seed(0))
    want = theirs(input_ids=ids, adapter_names=rows).logits
    for got in (bank(ids, adapters=rows).logits, plain(ids).logits):
        assert (got - want).abs().max() < 1e-3, "the ways disagree"
    calls = {
        "gathered": lambda **inputs: bank(adapters=rows, **inputs),
        "grouped": plain.__call__,
        "PEFT mixed": lambda **inputs: theirs(adapter_names=rows, **inputs),
        "PEFT one": lambda **inputs: theirs(**inputs),
    }
    caches = {name: call(input_ids=ids, use_cache=True).past_key_values for name, call in calls.items()}

    def decode(name: str) -> None:
        for _ in range(4):
            calls[name](input_ids=ids[:, :1], past_key_values=caches[name], use_cache=True)
        caches[name].crop(-4)

    return {
        "decode": seconds({name: lambda name=name: decode(name) for name in calls}),
        "forward": seconds({name: lambda call=call: call(input_ids=ids) for name, call in calls.items()}),
    }


def main() -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, peft {peft.__version__}, 1 thread, {ROWS} rows, r = {RANK}\n")
    print(f"{'':26}{'PEFT mixed / ours':>22}{'grouped / ours':>22}{'ours / PEFT one':>22}")
    with tempfile.TemporaryDirectory() as folder:
        adapters(Path(folder), mp.load("pocket")[0], 32)
        for number in (1, 4, 16, 32):
            for what, times in measure(number, Path(folder)).items():
                cells = [("PEFT mixed", "gathered"), ("grouped", "gathered"), ("gathered", "PEFT one")]
                row = "".join(f"{ratio(times, *pair):>22}" for pair in cells)
                print(f"{what:9}{number:3} adapters     {row}", flush=True)


if __name__ == "__main__":
    main()
