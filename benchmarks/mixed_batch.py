"""32 rows spread over 1, 4, 16 and 32 adapters in one batch: `python benchmarks/mixed_batch.py`.

Our gathered products, the same by groups of rows, HF PEFT's `adapter_names`, one call for each adapter's rows, and one
adapter for all rows (PEFT's `set_adapter`), at r = 8. `decode` is one token on a cache of 20, `forward` 20 tokens; on
the pocket model and on a random Llama of 110 million numbers.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import torch
import transformers
from side_by_side import DEVICE, Figure, figure, in_turn, main

import minipeft as mp
from minipeft.serve.tenants import Bank

ROWS, RANK = 32, 8
ASKED = {("pocket", "decode"): "≥ 5", ("pocket", "forward"): "≥ 2", ("110 M", "decode"): "≥ 1.5"}  # with 16 adapters


def large() -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=32_000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


def write_adapters(folder: Path, base: torch.nn.Module, number: int) -> None:
    """Writes adapters that all do something, a0, a1, …"""
    tuned = mp.attach(base, mp.LoRA(rank=RANK), name="a0")
    for i in range(number):
        if i:
            tuned.add(f"a{i}", mp.LoRA(rank=RANK), seed=i)
        for layer in tuned.adapters[f"a{i}"].values():
            layer.B.data.normal_(0, 0.02)
        tuned.save(folder / f"a{i}", f"a{i}")
    tuned.detach()


class Grouped:
    """The other way: the rows of each adapter go through that adapter's two products."""

    def __init__(self, bank: Bank, model: torch.nn.Module, rows: list[str]):
        for path, parts in bank.compose([f"a{i}" for i in range(len(set(rows)))] + [None]).parts.items():
            groups = [torch.tensor([i for i, row in enumerate(rows) if row == name]) for name in dict.fromkeys(rows)]
            own = [(index.to(DEVICE), parts["A"][k], parts["B"][k]) for k, index in enumerate(groups)]
            model.get_submodule(path).register_forward_hook(self.hook(own))

    def hook(self, own: list):
        def act(module, args, y):
            (x,) = args
            for index, A, B in own:
                y.index_add_(0, index, x[index] @ A.T @ B.T)
            return y

        return act


@torch.no_grad()
def sides(base: torch.nn.Module, number: int, folder: Path) -> Iterator[tuple[str, dict[str, Callable[[], object]]]]:
    """("decode" or "forward", {side: what it does}), once all sides have given the same logits."""
    rows = [f"a{i % number}" for i in range(ROWS)]
    bank = Bank(copy.deepcopy(base).to(DEVICE), folder)
    plain = copy.deepcopy(base).to(DEVICE)
    Grouped(bank, plain, rows)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder / "a0", adapter_name="a0").eval().to(DEVICE)
    for i in range(1, number):
        theirs.load_adapter(folder / f"a{i}", adapter_name=f"a{i}")
    theirs.to(DEVICE)
    ids = torch.randint(5, 400, (ROWS, 20), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    alone = {name: [i for i, row in enumerate(rows) if row == name] for name in dict.fromkeys(rows)}
    calls = {
        "ours": lambda **inputs: bank(adapters=rows, **inputs),
        "by groups": plain.__call__,
        "PEFT's": lambda **inputs: theirs(adapter_names=rows, **inputs),
        "PEFT's with one adapter": lambda **inputs: theirs(**inputs),
    }

    def one_by_one(ids: torch.Tensor) -> torch.Tensor:
        out = []
        for name, own in alone.items():
            theirs.set_adapter(name)
            out.append(theirs(input_ids=ids[own]).logits)
        theirs.set_adapter("a0")
        return torch.cat(out)[torch.tensor(sum(alone.values(), [])).argsort()]

    want = theirs(input_ids=ids, adapter_names=rows).logits
    for got in (bank(ids, adapters=rows).logits, plain(ids).logits, one_by_one(ids)):
        assert (got - want).abs().max() < 1e-3, "the sides disagree"
    caches = {name: call(input_ids=ids, use_cache=True).past_key_values for name, call in calls.items()}

    def decode(name: str) -> None:
        for _ in range(4):
            calls[name](input_ids=ids[:, :1], past_key_values=caches[name], use_cache=True)
        caches[name].crop(-4)

    yield "decode", {name: lambda name=name: decode(name) for name in calls}
    forward = {name: lambda call=call: call(input_ids=ids) for name, call in calls.items()}
    yield "forward", forward | {"one adapter after another": lambda: one_by_one(ids)}


@torch.no_grad()
def figures(quick: bool = False) -> Iterator[Figure]:
    for model, base in (("pocket", mp.load("pocket")[0]), *([] if quick else [("110 M", large())])):
        with tempfile.TemporaryDirectory() as folder:
            write_adapters(Path(folder), base, 32 if model == "pocket" else 16)
            for number in (4,) if quick else (1, 4, 16, 32) if model == "pocket" else (16,):
                for what, works in sides(base, number, Path(folder)):
                    if (model, what) == ("110 M", "forward"):  # minutes, for a figure that the pocket model has too
                        continue
                    times = in_turn(works, 3 if quick else 15 if model == "pocket" else 7)
                    label = f"{what} of 32 rows over {number} adapters, {model}"
                    asked = ASKED.get((model, what), "") if number == 16 else ""
                    for other in [each for each in works if each not in ("ours", "PEFT's with one adapter")]:
                        bound = asked if other == "PEFT's" else ""
                        yield figure(label, f"{other} / ours", times[other], times["ours"], bound)
                    one, bound = "PEFT's with one adapter", "≤ 1.3" if (model, number) == ("pocket", 16) else ""
                    yield figure(label, f"ours / {one}", times["ours"], times[one], bound)


if __name__ == "__main__":
    main(figures, __doc__)
