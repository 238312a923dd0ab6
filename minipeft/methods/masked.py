"""Training chosen entries of the weights: a mask that the optimizer cannot leak through.

    W' = W + ΔW,   ΔW = 0 but at k chosen entries        the k changes are trained, as a vector of length k

Multiplying gradients by a 0/1 mask is not enough: weight decay and Adam's moments move entries whose gradient is zero,
and a full gradient is what clipping measures. Here the other entries are no parameters at all: nothing can move them,
Adam keeps 2·k moments, and a file holds k numbers and their places.

Which entries? `Masked` ranks them by size; `gradient`, `fisher` and `lasso` score them by what a task asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from minipeft.attach import attach
from minipeft.files import OURS, PREFIX, Tensors, WeightLayout, register
from minipeft.layer import Method, WeightLayer
from minipeft.methods.common import freeze, is_number
from minipeft.methods.select import Full
from minipeft.targets import Target, Targets, exact, flipped, resolve

Batches = Iterable[dict[str, torch.Tensor]]  # each what the model is called with, labels included


@dataclass(frozen=True)
class Masked(Method):
    """Train the share of the entries of `targets` that scores highest, over all of them together.

    `by`: "largest" or "smallest" |W|, "random", or scores {key: (d_out, d_in)}, which `gradient`, `fisher` and `lasso`
        give.

    The extra output x·ΔWᵀ is computed with a full ΔW: a mask saves optimizer memory and storage, not time.
    Raises ValueError for a share outside (0, 1], an unknown `by`; and, at `attach`, for scores of other shapes.
    """

    share: float = 0.005
    by: str | Mapping[str, torch.Tensor] = "largest"
    targets: Targets = "all-linear"

    examples = ({"share": 0.05}, {"share": 0.05, "by": "random", "targets": "mlp"})

    def __post_init__(self) -> None:
        if not (is_number(self.share) and 0 < self.share <= 1):
            raise ValueError(f"share={self.share!r} is outside (0, 1]; 0.005 trains one entry in 200.")
        if not isinstance(self.by, Mapping) and self.by not in ("largest", "smallest", "random"):
            raise ValueError(f'by={self.by!r} is not "largest", "smallest" or "random", nor scores of each target.')
        freeze(self)

    def places(self, model: nn.Module) -> dict[str, Callable[[torch.Generator], MaskedLayer]]:
        targets = resolve(model, self.targets)
        if not isinstance(self.by, str):
            check_scores(self.by, targets)
        sizes = [t.d_out * t.d_in for t in targets]
        total = max(1, round(self.share * sum(sizes)))
        if self.by == "random" or targets[0].module.weight.is_meta:
            ends = [round(total * sum(sizes[: i + 1]) / sum(sizes)) for i in range(len(sizes))]
            counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
            chosen = [partial(drawn, n, k) if k else None for n, k in zip(sizes, counts, strict=True)]
        else:
            scores = torch.cat([self.score(t).flatten().cpu() for t in targets])
            best = torch.zeros(sum(sizes), dtype=torch.bool)
            best[scores.topk(total).indices] = True
            chosen = [partial(given, part.nonzero().flatten()) if part.any() else None for part in best.split(sizes)]
        both = zip(targets, chosen, strict=True)  # a matrix of which no entry was chosen gets no layer
        return {t.key: partial(MaskedLayer, t, entries) for t, entries in both if entries}

    def score(self, target: Target) -> torch.Tensor:
        if not isinstance(self.by, str):
            return self.by[target.key].float()
        size = own(target, target.module.weight).detach().float().abs()
        return size if self.by == "largest" else -size


@dataclass(frozen=True)
class Entries(Method):
    """Train exactly these entries, {key of a target: flat places in (d_out, d_in)}: what an adapter file names."""

    entries: Mapping[str, torch.Tensor]

    def places(self, model: nn.Module) -> dict[str, Callable[[torch.Generator], MaskedLayer]]:
        found = {t.key: t for t in resolve(model, [exact(key) for key in self.entries])}
        for key, index in self.entries.items():
            size = found[key].d_out * found[key].d_in if key in found else 0
            if index.ndim != 1 or index.is_floating_point() or len(index.unique()) != len(index):
                raise ValueError(f"The places in {key!r} are not a list of different whole numbers.")
            if len(index) and not 0 <= index.min() <= index.max() < size:
                raise ValueError(f"{key!r} has {size:,} entries, and a place outside of them is named.")
        return {key: partial(MaskedLayer, found[key], partial(given, i.long())) for key, i in self.entries.items()}


def drawn(n: int, k: int, generator: torch.Generator, meta: bool) -> torch.Tensor:
    """k different numbers below n, in order; zeros on the meta device, where nothing is drawn."""
    return torch.zeros(k, dtype=torch.long) if meta else torch.randperm(n, generator=generator)[:k].sort().values


def given(index: torch.Tensor, generator: torch.Generator, meta: bool) -> torch.Tensor:
    return index


class MaskedLayer(WeightLayer):
    """`value` (k,): the changes, 0 at first; `index` (k,): their places in the flattened ΔW."""

    def __init__(self, target: Target, entries: Callable, generator: torch.Generator):
        super().__init__(target)
        weight = target.module.weight
        self.shape, self.embedding = (target.d_out, target.d_in), isinstance(target.module, nn.Embedding)
        self.register_buffer("index", entries(generator, weight.is_meta).to(weight.device))
        self.value = nn.Parameter(torch.zeros(len(self.index), **self.place(target)))

    def delta(self) -> torch.Tensor:
        # ΔW[index] = value, 0 elsewhere
        empty = self.value.new_zeros(self.shape[0] * self.shape[1])
        return empty.scatter(0, self.index, self.value).view(self.shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x·ΔWᵀ, (…, d_in) → (…, d_out); for an embedding ΔW[:, ids], (…) → (…, d_out)"""
        return F.embedding(x, self.delta().T) if self.embedding else F.linear(x.to(self.value.dtype), self.delta())

    def stored(self) -> dict[str, torch.Tensor]:
        return {"mask_index": self.index.int(), "mask_value": self.value}

    def restore(self, numbers: dict[str, torch.Tensor]) -> None:
        self.value.data.copy_(numbers["mask_value"])  # the places were given when the layer was built


@register
class MaskedLayout(WeightLayout):
    """mask_index (k,), places in the flattened (d_out, d_in), and mask_value (k,), the changes there"""

    peft_type, layer = OURS + "MASK", MaskedLayer
    ends, needs = "mask_(?:index|value)", "mask_index and mask_value"

    def build(self, config: dict, places: list[str], tensors: Tensors) -> list[Method]:
        keys = {place: f"{PREFIX}{place}.mask_index" for place in places}
        if lost := [place for place, key in keys.items() if key not in tensors]:
            raise ValueError(f"it lacks the mask_index of {lost[0]!r}; it was saved incompletely.")
        return [Entries({place: tensors[key] for place, key in keys.items()})] if places else []


# ---------------------------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------------------------
def gradient(model: nn.Module, batches: Batches, targets: Targets = "all-linear") -> dict[str, torch.Tensor]:
    """|Σ ∂loss/∂W| over the batches, {key: (d_out, d_in)}: where a first step of gradient descent would go."""
    return {key: total.abs() for key, total in _summed(model, batches, targets, lambda g: g).items()}


def fisher(model: nn.Module, batches: Batches, targets: Targets = "all-linear") -> dict[str, torch.Tensor]:
    """Σ (∂lossᵢ/∂W)² over single rows i, {key: (d_out, d_in)}: the diagonal of the empirical Fisher information
    (Sung et al. 2021, "Training Neural Networks with Fixed Sparse Masks", §3.1)."""
    rows = ({k: v[i : i + 1] for k, v in batch.items()} for batch in batches for i in range(len(batch["labels"])))
    return _summed(model, rows, targets, torch.square)


def lasso(
    model: nn.Module, batches: Batches, targets: Targets = "all-linear", penalty: float = 1e-4, lr: float = 1e-3
) -> dict[str, torch.Tensor]:
    """|ΔW| after training all of W under `penalty`·‖ΔW‖₁, one Adam step a batch, {key: (d_out, d_in)}.

    After each step every change is pulled towards 0 by `lr`·`penalty`, and those that would cross it stay at exactly 0:
    ΔW ← sign(ΔW)·max(|ΔW| − lr·penalty, 0) (soft thresholding; under Adam's own scale, so not the exact minimiser).
    """
    chosen = resolve(model, targets)
    tuned = attach(model, Full(targets=[f"{t.path}.weight" for t in {t.path: t for t in chosen}.values()]))
    try:
        layers = list(tuned.adapters["default"].values())
        before = [layer.value.detach().clone() for layer in layers]
        optimizer = torch.optim.Adam([layer.value for layer in layers], lr=lr)
        for batch in batches:
            optimizer.zero_grad(set_to_none=True)
            tuned(**batch).loss.backward()
            optimizer.step()
            for layer, old in zip(layers, before, strict=True):
                layer.value.data = old + F.softshrink(layer.value.data - old, lr * penalty)
        changed = {layer.slots[0][0]: (layer.value - old).detach() for layer, old in zip(layers, before, strict=True)}
        return {t.key: own(t, changed[t.path]).abs() for t in chosen}
    finally:
        tuned.detach()


def _summed(
    model: nn.Module, batches: Batches, targets: Targets, each: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Σ each(∂loss/∂W) over the batches."""
    chosen = resolve(model, targets)
    weights = {t.path: t.module.weight for t in chosen}
    flags = {path: weight.requires_grad for path, weight in weights.items()}
    sums: dict[str, torch.Tensor] = {}
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        for batch in batches:
            grads = dict(zip(weights, torch.autograd.grad(model(**batch).loss, list(weights.values())), strict=True))
            for t in chosen:
                value = each(own(t, grads[t.path]).to(torch.promote_types(grads[t.path].dtype, torch.float32)))
                sums[t.key] = sums[t.key] + value if t.key in sums else value
    finally:
        for path, weight in weights.items():
            weight.requires_grad_(flags[path])
    if not sums:
        raise ValueError("There are no batches to score the entries by; give at least one.")
    return sums


def own(target: Target, tensor: torch.Tensor) -> torch.Tensor:
    """The target's own rows of a tensor that is stored as its weight is, as (d_out, d_in)."""
    return (tensor.T if flipped(target.module) else tensor)[target.start : target.stop]


def check_scores(scores: Mapping[str, torch.Tensor], targets: list[Target]) -> None:
    for t in targets:
        shape = tuple(scores[t.key].shape) if t.key in scores else None
        if shape != (t.d_out, t.d_in):
            raise ValueError(
                f"The scores for {t.key!r} have shape {shape}, and its entries {(t.d_out, t.d_in)}; score this model, "
                "with these targets."
            )
