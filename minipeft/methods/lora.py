"""LoRA: learn the change of a weight as a product of two thin matrices (Hu et al. 2021, "LoRA: Low-Rank Adaptation of
Large Language Models", §4.1).

                 ┌─────────── W (d_out, d_in), frozen ───────────┐
    x (…, d_in) ─┤                                               + ──▶ y (…, d_out)
                 └── A (r, d_in) ──▶ r numbers ──▶ B (d_out, r) ─┘ × γ

At d_out = d_in = 4096 and r = 8, A and B hold 8·(4096 + 4096) = 65,536 numbers; W holds 16,777,216.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import KW_ONLY, InitVar, dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from minipeft.files import (
    MAPPING,
    NUMBER,
    WORDS,
    Tensors,
    WeightLayout,
    by_pattern,
    exactly,
    register,
    target_modules,
)
from minipeft.layer import Method, WeightLayer
from minipeft.methods import convolution
from minipeft.methods.common import (
    check_flag,
    check_gamma,
    check_share,
    check_whole,
    fitting,
    freeze,
    is_number,
    no_embedding,
    too_small,
)
from minipeft.methods.fused import product
from minipeft.methods.read import Name, check_read, from_peft, peft_has, peft_names, to_peft
from minipeft.targets import Target, Targets, exact, flipped, is_convolution, module_at, read, resolve


class LoRALayer(WeightLayer):
    """A (r, d_in) and B (d_out, r) of one target, on its device, in float32 (float64 over a float64 base)."""

    embeddings = True  # an embedding can be the target

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """γ·B·A·x, (…, d_in) → (…, d_out); for an embedding γ·B·A[:, ids], (…) → (…, d_out)."""
        if self.embedding:
            low = F.embedding(x, self.A.T)
        else:
            low = F.linear(F.dropout(x.to(self.A.dtype), self.dropout, self.training), self.A)
        return F.linear(low, self.B) * self.gamma

    def whole(self, x: torch.Tensor) -> torch.Tensor | None:
        """(W + γ·B·A)·x + b: the same, with fewer passes over x and y; see `fused.py`."""
        own = self._parameters  # past the look-up of `nn.Module`, which takes as long as a small product
        if (self.training and self.dropout) or "A" not in own or "B" not in own:
            return None
        return product(self, x, own["A"], own["B"], self.gamma)

    def delta(self) -> torch.Tensor:
        # ΔW = γ·B·A, of rank at most r
        return self.gamma * (self.B @ self.A)

    def __init__(self, target: Target, method: LoRA, generator: torch.Generator):
        super().__init__(target)
        self.rank, self.gamma, self.dropout = method.rank, method.gamma, method.dropout
        self.rank_stabilized = method.rank_stabilized  # already in γ; a checkpoint says it again
        self.lr_ratio = method.lr_ratio
        self.embedding = isinstance(target.module, nn.Embedding)
        A, B = self.shapes(target)
        self.A = nn.Parameter(torch.zeros(A, **self.place(target)))
        self.B = nn.Parameter(torch.zeros(B, **self.place(target)))
        if not self.A.is_meta:
            self.start(method.init, generator)

    def shapes(self, target: Target) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (self.rank, target.d_in), (target.d_out, self.rank)

    def start(self, init: str, generator: torch.Generator) -> None:
        """A random and B zero, so that B·A = 0 and the model is still the base."""
        # The input of an embedding is one-hot: a random A would be one small random column per token. So the authors'
        # code swaps the roles there, A = 0 and B ~ N(0, 1), and so does this.
        if not self.embedding:
            for A in self.A.data.view(-1, *self.A.shape[-2:]):  # one, or one for each matrix of a stack
                A.copy_(draw(init, *A.shape, A.dtype, generator))
        if self.embedding or init == "both-random":
            self.B.data.copy_(torch.empty(self.B.shape, dtype=self.B.dtype).normal_(generator=generator))

    def rates(self) -> list[tuple[nn.Parameter, float]]:
        return [(self.B, self.lr_ratio)] if self.lr_ratio != 1 and not self.embedding else []

    def stored(self) -> dict[str, torch.Tensor]:
        name = "lora_embedding_{}" if self.embedding else "lora_{}.weight"
        return {name.format("A"): self.A, name.format("B"): self.B}


class ConvolutionLoRALayer(LoRALayer):
    """The same for a kernel (d_out, c_in/groups, k, k): A reads patches of d_in = c_in/groups·k·k numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """γ·B·A * x, (…, c_in, h, w) → (…, d_out, h', w')."""
        x = F.dropout(x.to(self.A.dtype), self.dropout, self.training)
        return convolution.product(self.owner[0], x, self.A, self.B) * self.gamma

    def stored(self) -> dict[str, torch.Tensor]:
        module = self.owner[0]
        A = self.A.view(-1, *module.weight.shape[1:])
        return {"lora_A.weight": A, "lora_B.weight": convolution.as_kernel(self.B, module)}


class ReadLoRALayer(LoRALayer):
    """The same for a matrix that a module reads for itself; see `read.py`."""


class StackLoRALayer(ReadLoRALayer):
    """The same for each of E matrices: A (E, r, d_in), and B (d_out, r, E), which PEFT stores in this order."""

    def __init__(self, target: Target, method: LoRA, generator: torch.Generator):
        super().__init__(target, method, generator)
        self.turned = getattr(target.module, "is_transposed", False)  # gpt-oss stores (E, d_in, d_out)

    def shapes(self, target: Target) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (len(target.tensor), self.rank, target.d_in), (target.d_out, self.rank, len(target.tensor))

    def delta(self) -> torch.Tensor:
        """ΔW[e] = γ·B_e·A_e, (E, d_out, d_in)."""
        return self.gamma * torch.einsum("ore,eri->eoi", self.B, self.A)

    def changes(self) -> dict[str, torch.Tensor]:
        return {self.parameter: self.delta().mT if self.turned else self.delta()}

    def stored(self) -> dict[str, torch.Tensor]:
        return {"lora_A.weight": self.A.flatten(0, 1), "lora_B.weight": self.B.flatten(1)}


FAULTS = ("both-random",)


@dataclass(frozen=True)
class LoRA(Method):
    """W' = W + γ·B·A with A (r, d_in) random, B (d_out, r) zero, W frozen.

    `rank`: r, from 1 to min(d_in, d_out) of every target (§7.2 asks how small it can be).
    `gamma`: γ, 2.0 if nothing is said. `alpha` is the papers' way to say it: γ = α/r (§4.1), or γ = α/√r with
        `rank_stabilized` (Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", §3).
    `targets`: see `minipeft.targets.resolve`; convolutions, PyTorch's attention and stacks of experts, too, where they
        are named.
    `init` of A: "kaiming" U(−1/√d_in, 1/√d_in), as in the authors' code; "gaussian" N(0, 1/r²), as in PEFT;
        "orthogonal": orthonormal rows. "pissa": A and B from the largest singular directions of W, see `pissa.py`.
        "both-random" is a fault that is in circulation, A and B both N(0, 1): it is here to be shown, and warns.
    `dropout`: the probability that an input of A is dropped while training; embeddings have no such input.
    `lr_ratio`: B's learning rate as a multiple of A's (Hayou et al. 2024, "LoRA+", §5: about 16); `fit` obeys it. On an
        embedding, where B is the random one, it changes nothing.

    Raises ValueError for a rank below 1, γ that is not finite, γ and α both, dropout outside [0, 1), an unknown init;
    and, at `attach`, for a rank above min(d_in, d_out) and for targets that match nothing.
    """

    rank: int = 8
    gamma: float | None = None
    alpha: InitVar[float | None] = None
    _: KW_ONLY
    rank_stabilized: bool = False
    targets: Targets = "all-linear"
    init: str = "kaiming"
    dropout: float = 0.0
    lr_ratio: float = 1.0

    formula = "rank * (d_in + d_out)"
    layers = dict.fromkeys(("kaiming", "gaussian", "orthogonal", *FAULTS), LoRALayer)  # {init: what it starts}
    on_convolutions, on_read, on_stacks = ConvolutionLoRALayer, ReadLoRALayer, StackLoRALayer
    examples = (
        {"rank": 2},
        {"rank": 3, "alpha": 4.0, "rank_stabilized": True, "targets": "attention"},
        {"rank": 2, "lr_ratio": 4.0, "targets": "mlp"},
        {"rank": 2, "init": "pissa"},
    )

    def places(self, model: nn.Module) -> dict[str, Callable[[torch.Generator], LoRALayer]]:
        layer = self.layers[self.init]
        targets = resolve(model, self.targets, convolutions=True, unread=layer is LoRALayer, reads=True)
        targets = targets if layer.embeddings else no_embedding(targets, self)
        targets = fitting(model, self, targets, too_small(self.rank))
        check_read(targets, type(self).__name__, self.dropout, stacks=self.on_stacks is not None)
        others = {t.key: self.elsewhere(t) for t in targets if self.elsewhere(t) is not None}
        if others and self.init == "pissa":
            key, kind = next(iter(others.items()))
            what = "is a convolution" if kind is self.on_convolutions else "is read by its module itself"
            raise ValueError(f'init="pissa" splits the weight of a linear layer, and {key!r} {what}.')
        if self.init in FAULTS:
            warnings.warn(f"init={self.init!r} changes the model before training begins: a fault, shown.", stacklevel=4)
        return {t.key: partial(others.get(t.key, layer), t, self) for t in targets}

    def elsewhere(self, target: Target) -> type[LoRALayer] | None:
        """The kind of layer for what is no linear layer."""
        if target.reader is not None:
            return self.on_read if target.tensor.ndim == 2 else self.on_stacks
        return self.on_convolutions if is_convolution(target.module) else None

    def __post_init__(self, alpha: float | None) -> None:
        check_whole("rank", self.rank)
        check_flag("rank_stabilized", self.rank_stabilized)
        if self.gamma is not None and alpha is not None:
            raise ValueError(f"gamma={self.gamma} and alpha={alpha} both set the scale γ; give one of them.")
        if self.rank_stabilized and self.gamma is None and alpha is None:
            raise ValueError("rank_stabilized=True says how alpha becomes γ = α/√r, so it needs alpha.")
        for name, value in (("gamma", self.gamma), ("alpha", alpha)):
            if isinstance(value, bool) or not isinstance(value, int | float | None):
                raise ValueError(f"{name}={value!r} is not a number, such as 2.0.")
        gamma = 2.0 if self.gamma is None else self.gamma
        if alpha is not None:
            check_gamma(alpha)
            # γ = α/r,  or  γ = α/√r
            gamma = alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)
        check_share("dropout", self.dropout)
        if not isinstance(self.init, str) or self.init not in self.layers:
            raise ValueError(
                f"init={self.init!r} is not one of {', '.join(i for i in self.layers if i not in FAULTS)}."
            )
        check_gamma(gamma)
        if self.init == "pissa" and gamma <= 0:
            raise ValueError(f'init="pissa" splits a part of W into γ·B·A, so γ must be positive, but is {gamma}.')
        if not (is_number(self.lr_ratio) and self.lr_ratio > 0):
            raise ValueError(f"lr_ratio={self.lr_ratio!r} is not a positive number, such as 16.0.")
        object.__setattr__(self, "gamma", float(gamma))
        freeze(self)


def draw(init: str, rank: int, d_in: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """A fresh A (r, d_in), on the CPU."""
    A = torch.empty(rank, d_in, dtype=dtype)
    if init == "kaiming":
        # kaiming_uniform with a = √5:  U(±√(6 / ((1 + a²)·d_in))) = U(±1/√d_in)
        return A.uniform_(-1 / math.sqrt(d_in), 1 / math.sqrt(d_in), generator=generator)
    if init in ("gaussian", "both-random"):
        return A.normal_(0, 1 / rank if init == "gaussian" else 1.0, generator=generator)
    # A·Aᵀ = I:  the rows of Qᵀ in the QR decomposition of a random (d_in, r) matrix
    return torch.linalg.qr(A.normal_(generator=generator).T).Q.T


@register
class LoRALayout(WeightLayout):
    """lora_A.weight (r, d_in), lora_B.weight (d_out, r); on an embedding lora_embedding_A (r, V) and _B (d, r).

    lora_alpha = γ·r, or γ·√r with use_rslora.
    """

    peft_type, layer, method = "LORA", LoRALayer, LoRA
    others = ConvolutionLoRALayer, ReadLoRALayer, StackLoRALayer
    ends, needs = r"lora_(?:embedding_[AB]|[AB]\.weight)", "lora_A and lora_B"
    kinds = {
        "lora_alpha": NUMBER, "lora_dropout": (*NUMBER, type(None)), "use_rslora": (bool, type(None)),
        "rank_pattern": MAPPING, "alpha_pattern": MAPPING, "target_parameters": WORDS,
    }  # fmt: skip
    foreign = (
        *("use_dora", "lora_bias", "trainable_token_indices", "layer_replication", "use_qalora"),
        *("use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config", "monteclora_config"),
    )

    def config(self, base: nn.Module, layers: list[LoRALayer]) -> dict:
        first = layers[0]
        scale = math.sqrt if first.rank_stabilized else float
        config = super().config(base, layers)
        names: dict[str, Name] = {}
        if config["peft_type"] == self.peft_type and any(x.reader is not None for x in layers):
            stacks = [x for x in layers if isinstance(x, StackLoRALayer)]
            modules = {x.path if x.reader is None else x.reader for x in layers if x not in stacks}
            config["target_modules"] = target_modules(base, sorted(modules))
            config["target_parameters"] = [f"{x.path}.{x.parameter}" for x in stacks] or None
            names = peft_names(base, config)
        matched = lambda x: exactly(names[x.key].matched if x.key in names else x.key)  # noqa: E731
        return config | {
            "r": first.rank,
            "lora_alpha": first.gamma * scale(first.rank),
            "use_rslora": first.rank_stabilized,
            "lora_dropout": max(x.dropout for x in layers),
            "bias": "none",
            "fan_in_fan_out": any(flipped(module_at(base, x.path)) and not x.embedding for x in layers),
            "rank_pattern": {matched(x): x.rank for x in layers if x.rank != first.rank},
            "alpha_pattern": {
                matched(x): x.gamma * scale(x.rank) for x in layers if (x.rank, x.gamma) != (first.rank, first.gamma)
            },
        }

    def peft_reads(self, layers: list[LoRALayer]) -> bool:
        return not self.flag and peft_has(layers)

    def written(self, base: nn.Module, config: dict, tensors: Tensors) -> Tensors:
        return to_peft(self.names(base, config), tensors)

    def names(self, base: nn.Module, config: dict) -> dict[str, Name]:
        return peft_names(base, config) if config["peft_type"] == self.peft_type else {}

    def methods(self, base: nn.Module, config: dict, tensors: Tensors) -> list[Method]:
        names = self.names(base, config)
        if names:
            from_peft(base, names, config, tensors)
        found = {place for key in tensors if (match := self.split(key)) and (place := match[1])}
        still = {target.key for target in read(base)}  # there, PEFT drops nothing either
        patterns = {"dropout_pattern": {exactly(place): 0.0 for place in found if exact(place)[0] in still}}
        for option, default in {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}.items():
            theirs = config.get(option) or {}
            mine = {n: by_pattern(theirs, name.matched, config.get(default), option) for n, name in names.items()}
            patterns[option] = {exactly(place): value for place, value in mine.items()} | theirs
        return super().methods(base, config | patterns, tensors)

    def build(self, config: dict, places: list[str], tensors: Tensors) -> list[LoRA]:
        """One method for each combination of rank and γ."""
        if config.get("init_lora_weights") not in (None, True, False, "gaussian", "orthogonal", "eva"):
            init = config["init_lora_weights"]  # PiSSA, OLoRA and others change the base as well
            raise ValueError(f"it was initialised by {init!r}, which changes the base; only plain LoRA loads.")
        groups: dict[tuple, list[tuple[str, int, int]]] = {}
        for place in places:
            rank = by_pattern(config.get("rank_pattern"), place, config.get("r"), "rank_pattern")
            alpha = by_pattern(config.get("alpha_pattern"), place, config.get("lora_alpha"), "alpha_pattern")
            if isinstance(rank, bool) or not isinstance(rank, int):
                raise ValueError(f"rank={rank!r} is not a whole number.")
            if isinstance(alpha, bool) or not isinstance(alpha, int | float):
                raise ValueError(f"lora_alpha = {alpha!r} is not a number.")
            dropout = by_pattern(config["dropout_pattern"], place, config.get("lora_dropout") or 0.0, "dropout_pattern")
            groups.setdefault((rank, alpha, dropout), []).append(exact(place))
        return [self.make(config, *settings, targets) for settings, targets in groups.items()]

    def make(self, config: dict, rank: int, alpha: float, dropout: float, targets: list) -> LoRA:
        stable = bool(config.get("use_rslora"))
        return self.method(rank=rank, alpha=alpha, rank_stabilized=stable, dropout=dropout, targets=targets)
