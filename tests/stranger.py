"""A stranger on tap: draws a tiny random model, a method and its options, and holds the package to what it promises.

    python tests/stranger.py --minutes 10 --seed 1     # as many cases as there is time for
    python tests/stranger.py --case 1:37               # one of them again, with its traceback

A case attaches the method, tries a few of `TRIALS` in random order, and detaches it. After each of them the model must
compute what it did before, to the bit. A refusal, which is a ValueError or TypeError of one sentence that the package
itself raised, is no fault, but is counted; everything else that breaks a promise is one, and then the exit status is 1.

What the bare model does not do, a tuned one need not: rows that depend on each other, padding that counts, a cache that
changes tokens are asked of the bare model first. In bfloat16 only what must be the same to the bit is compared.
"""

from __future__ import annotations

import argparse
import collections
import copy
import random
import sys
import time
import traceback
import warnings
from pathlib import Path

import tiny
import torch
from architectures import ARCHITECTURES
from drawn import LENGTH, MODELS, NEAR, NO_GRADIENT, STALE, draw, drawn_dtype
from test_matrix import FAMILIES, FRONTS, READ, ROWS, Bare, gap, outputs
from torch import nn
from trials import TRIALS, Left, given, quietly, refused, require, same

import minipeft as mp
from minipeft.methods import METHODS


class Case:
    """One model, what it reads, a method with its settings, and a generator for whatever else is drawn."""

    def __init__(self, seed: int, number: int):
        self.rng = random.Random(f"{seed}:{number}")
        self.name, self.dtype = self.rng.choice(list(MODELS)), drawn_dtype(self.rng)
        self.one = MODELS[self.name]
        self.model = self.fresh()
        batch = self.one.batch(ROWS, LENGTH) | (READ.get(self.name, {}) if self.name in FAMILIES else {})
        floating = lambda v: isinstance(v, torch.Tensor) and v.is_floating_point()  # noqa: E731
        cast = {k: v.to(getattr(torch, self.dtype)) if floating(v) else v for k, v in batch.items()}
        self.batch = {key: value for key, value in cast.items() if value is not None}
        self.kind, self.settings = draw(self.rng, self.model)
        self.beside = self.rng.choice(["Softmax", "BitFit", "LoRA", *[None] * 12])  # a second method of one adapter
        self.chosen = self.rng.sample(list(TRIALS), 4)
        self.exact = self.dtype in NEAR
        what = f"{self.name} · {self.kind}{self.settings} {self.beside or ''} · {self.dtype}"
        self.label = f"{seed}:{number} {what} · {', '.join(self.chosen)}"

    def fresh(self) -> nn.Module:
        return self.one.model().requires_grad_(False).to(getattr(torch, self.dtype))

    def outputs(self, model: nn.Module | None = None) -> list[torch.Tensor]:
        return self.bare.outputs(self.tuned if model is None else model)

    def near(self, found: list[torch.Tensor], expected: list[torch.Tensor], what: str, times: float = 1.0) -> None:
        if self.exact:
            off = gap(found, expected)
            require(off <= times * NEAR[self.dtype], f"{what}: off by {off:.1e}")

    def play(self) -> dict[str, str]:
        """{what was tried: what was refused or left there, or ""}"""
        try:
            self.bare = Bare(self.model, self.batch)
        except (RuntimeError, TypeError, NotImplementedError) as error:
            raise Left("the bare model does not run") from error
        if not all(map(torch.equal, self.outputs(self.model), self.bare.gives)):
            raise Left("the bare model gives two answers, or none")
        if (self.kind, self.name) in STALE:
            raise Left("the bare model computes with what it remembers")
        if why := refused(self.attach):
            require(self.bare.is_as_it_was(), f"refused ({why}), but the model is changed")
            return {"attach": why}
        self.tuned.eval()
        done = {"attach": "", "call": refused(self.outputs)}
        if not done["call"]:
            if self.kind not in FRONTS:
                self.starts_as_the_base()
            tiny.randomise(self.tuned)
            self.found = self.outputs()
            if not all(value.isfinite().all() for value in self.found):
                self.chosen = []  # shaken too hard
            for name in self.chosen:
                try:
                    done[name] = refused(lambda name=name: TRIALS[name](self))
                except Left as left:
                    done[name] = f"left: {left}"
                same(self.outputs(), self.found, f"after {name} it computes something else")
                self.is_the_base_when_disabled()
        require(self.tuned.detach() is self.model and self.bare.is_as_it_was(), "detach() leaves something behind")
        same(self.outputs(self.model), self.bare.gives, "detach() does not give the base back")
        return done

    def attach(self) -> None:
        with quietly("attach"):
            self.method, self.seed = METHODS[self.kind](**self.settings), self.rng.randrange(9)
            if self.beside:
                self.method = [self.method, METHODS[self.beside]()]
            self.tuned = mp.attach(self.model, self.method, seed=self.seed)

    def starts_as_the_base(self) -> None:
        """To the bit, but a weight that trains may be multiplied in another way, and PiSSA takes a difference."""
        if any(layer.slots for layer in self.tuned.layers()) or self.settings.get("init") == "pissa":
            self.near(self.outputs(), self.bare.gives, "it does not start as the base", 0.1)
        else:
            same(self.outputs(), self.bare.gives, "it does not start as the base")

    def is_the_base_when_disabled(self) -> None:
        with self.tuned.disabled():
            same(self.outputs(), self.bare.gives, "disabled() is not the base")

    def row(self, i: int) -> dict[str, torch.Tensor]:
        """One row of the batch; Left where rows are no rows, or depend on each other in the bare model."""
        if "dimension 0" in self.name or any(not isinstance(v, bool) and len(v) != ROWS for v in self.batch.values()):
            raise Left("no rows")
        alone = {key: v if isinstance(v, bool) else v[i : i + 1] for key, v in self.batch.items()}
        with self.tuned.disabled():
            found = given(self.model, alone)
        if any(len(v) != ROWS for v in self.bare.gives) or gap(found, [v[i : i + 1] for v in self.bare.gives]) > 1e-5:
            raise Left("the bare model's rows depend on each other")
        return alone

    def gradients(self, tuned: nn.Module, *batches: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        self.must_have_gradients()
        tuned.zero_grad()
        for batch in batches:
            loss = sum(v.sin().sum() for v in outputs(tuned, batch) if v.requires_grad)
            if not torch.is_tensor(loss):
                raise Left("the output does not depend on what trains")
            loss.backward()
        found = [p.grad.clone() for p in tuned.adapters.parameters() if p.grad is not None and p.numel()]
        tuned.zero_grad()
        if not found:  # MRA without its CUDA kernel attends to nothing, and gives zeros that ask for a gradient
            raise Left("the output does not depend on what trains")
        return found

    def labelled(self) -> dict[str, torch.Tensor]:
        """The batch with labels, with which a model gives its own loss, which brings a method's penalty along."""
        if self.name not in ARCHITECTURES:
            return self.batch
        every = self.one.batch(ROWS, LENGTH, labels=True)
        return self.batch | {key: every[key] for key in every.keys() - self.batch.keys()}

    def must_have_gradients(self) -> None:
        if self.name in NO_GRADIENT:
            raise Left(NO_GRADIENT[self.name])

    def copied(self) -> nn.Module:
        try:
            copy.deepcopy(self.fresh())
        except (RuntimeError, TypeError) as error:
            raise Left("the bare model cannot be copied") from error
        return copy.deepcopy(self.tuned)


def play(seed: int, number: int) -> dict[str, str]:
    """{what was tried: what was refused or left there, or ""}; raises whatever breaks a promise."""
    torch.set_num_threads(1)
    try:
        return Case(seed, number).play()
    except Left as left:
        return {"the bare model": f"left: {left}"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", help="SEED:NUMBER")
    options = parser.parse_args()
    if options.case:
        seed, number = map(int, options.case.split(":"))
        print(Case(seed, number).label, play(seed, number), sep="\n")
        return 0
    end, number, faults = time.time() + 60 * options.minutes, 0, 0
    tally: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    while time.time() < end:
        try:
            for what, why in play(options.seed, number).items():
                tally[what]["left" if why.startswith("left") else "refused" if why else "kept"] += 1
        except Exception as error:
            at, faults = traceback.extract_tb(error.__traceback__)[-1], faults + 1
            said = f"{type(error).__name__}: {str(error)[:300]} ({Path(at.filename).name}:{at.lineno})"
            print(Case(options.seed, number).label, f"    {said}", sep="\n", flush=True)
        number += 1
    print(f"seed {options.seed}: {number} cases, {faults} faults")
    for what, counts in tally.items():
        print(f"  {what}: " + ", ".join(f"{n} {how}" for how, n in counts.items()))
    return bool(faults)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
