"""What an adapter costs when a model is used: `python benchmarks/merged.py`.

A merged model is the base with other numbers, so it should cost what the base costs; beside it stand the same adapter
kept apart, and two that cannot be merged.
"""

import copy
from collections.abc import Iterator
from functools import partial

import torch
from side_by_side import DEVICE, Figure, figure, in_turn, main

import minipeft as mp

APART = {
    "LoRA r = 8": mp.LoRA(rank=8),
    "a bottleneck of 16": mp.Adapter(bottleneck=16),
    "a prefix of 8": mp.PrefixTuning(8),
}


@torch.no_grad()
def figures(quick: bool = False) -> Iterator[Figure]:
    base, _ = mp.load("pocket")
    merged = mp.attach(copy.deepcopy(base), mp.LoRA(rank=8))
    for layer in merged.layers():
        layer.B.data.normal_(0, 0.02)
    merged.merge()
    apart = {label: mp.attach(copy.deepcopy(base), method) for label, method in APART.items()}
    sides = {"base": base, "merged": merged, **apart}
    for shape in ((1, 20), (32, 20)):
        ids = torch.randint(5, 400, shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        works = {name: partial(side.eval().to(DEVICE), input_ids=ids) for name, side in sides.items()}
        times = in_turn(works, 5 if quick else 200 if shape[0] == 1 else 60)
        for name in list(sides)[1:]:
            asked = "≤ 1.03" if name == "merged" else ""
            yield figure(f"{name}, forward {shape[0]}×{shape[1]}", "ours / the base", times[name], times["base"], asked)


if __name__ == "__main__":
    main(figures, __doc__)
