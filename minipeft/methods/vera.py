"""VeRA: one random pair A, B for the whole model, frozen; each layer learns two vectors that scale it (Kopiczko et al.
2024, "VeRA: Vector-based Random Matrix Adaptation", §3).

Layers of any width cut their part out of the pair. At d_out = 4096 and r = 256 a layer trains 4096 + 256 = 4,352
numbers; LoRA of rank 1 would train 8,192.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from minipeft.files import NUMBER, Tensors, WeightLayout, register
from minipeft.layer import Method, WeightLayer
from minipeft.methods.common import check_share, check_whole, freeze, is_number, linear_targets
from minipeft.methods.fused import product, quicker
from minipeft.targets import Target, Targets, exact, flipped, module_at


@dataclass(frozen=True)
class VeRA(Method):
    """W' = W + Λ_b·B·Λ_d·A, with b (d_out,) zero and d (r,) constant at first; A and B are shared, random and frozen.

    `rank`: r; it costs r numbers a layer, so it may be far above LoRA's, and above d_in and d_out.
    `d_initial`: where d starts (§3.2; 0.1 was best, appendix). `dropout`: on the input, while training.
    `projection_seed`: draws A and B, on the CPU, as PEFT's `projection_prng_key` does; `attach`'s seed does not matter.
    `targets`: see `minipeft.targets.resolve`; linear layers only.

    Raises ValueError for a rank below 1, d_initial that is not finite, dropout outside [0, 1), a seed that is no whole
    number from 0 to 2⁶³ − 1.
    """

    rank: int = 256
    _: KW_ONLY
    targets: Targets = "all-linear"
    d_initial: float = 0.1
    dropout: float = 0.0
    projection_seed: int = 0

    formula = "d_out + rank"
    examples = ({"rank": 20},)

    def __post_init__(self) -> None:
        check_whole("rank", self.rank)
        if not is_number(self.d_initial):
            raise ValueError(f"d_initial={self.d_initial!r} is not a finite number, such as 0.1.")
        check_share("dropout", self.dropout)
        seed = self.projection_seed
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
            raise ValueError(f"projection_seed={seed!r} is not a whole number from 0 to 2⁶³ − 1.")
        freeze(self)

    def places(self, model: nn.Module) -> dict[str, Callable[[torch.Generator], VeRALayer]]:
        targets = linear_targets(model, self)
        pair = Pair(targets, self)
        return {t.key: partial(VeRALayer, t, self, pair) for t in targets}


class Pair(nn.Module):
    """A (r, largest d_in) and B (largest d_out, r), U(±√(6/d_in)) and U(±√(6/r)); every layer holds this one module.

    No `state_dict` has them: the seed and the shapes give them again. An adapter's file does, as PEFT's.
    """

    def __init__(self, targets: list[Target], method: VeRA):
        super().__init__()
        weight, r = targets[0].module.weight, method.rank
        dtype = torch.promote_types(weight.dtype, torch.float32)
        generator = torch.Generator().manual_seed(method.projection_seed)
        for name, shape in (("A", (r, max(t.d_in for t in targets))), ("B", (max(t.d_out for t in targets), r))):
            value = torch.empty(shape, device="meta" if weight.is_meta else "cpu")
            if not weight.is_meta:
                bound = math.sqrt(6 / shape[1])  # kaiming_uniform for a ReLU
                value.uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, value.to(weight.device, dtype), persistent=False)


class VeRALayer(WeightLayer):
    """b (d_out,) and d (r,) of one target."""

    def __init__(self, target: Target, method: VeRA, pair: Pair, _: torch.Generator):
        super().__init__(target)
        self.method, self.pair, self.shape = method, pair, (target.d_out, target.d_in)
        self.b = nn.Parameter(torch.zeros(target.d_out, **self.place(target)))
        self.d = nn.Parameter(torch.full((method.rank,), method.d_initial, **self.place(target)))

    @property
    def parts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """This target's A (r, d_in) and B (d_out, r)."""
        d_out, d_in = self.shape
        return self.pair.A[:, :d_in].to(self.d.device), self.pair.B[:d_out].to(self.d.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """b ⊙ (B·(d ⊙ (A·x))), (…, d_in) → (…, d_out)."""
        A, B = self.parts
        x = F.dropout(x.to(self.d.dtype), self.method.dropout, self.training)
        return self.b * F.linear(self.d * F.linear(x, A), B)

    def whole(self, x: torch.Tensor) -> torch.Tensor | None:
        """(W + Λ_b·B·Λ_d·A)·x + b; see `fused.py`."""
        d_out, d_in = self.shape
        if self.training and self.method.dropout:
            return None
        if not quicker(x.numel() // d_in, d_in, d_out):
            return None
        A, B = self.parts
        return product(self, x, self.d[:, None] * A, self.b[:, None] * B)

    def delta(self) -> torch.Tensor:
        # ΔW = Λ_b·B·Λ_d·A
        A, B = self.parts
        return self.b[:, None] * B @ (self.d[:, None] * A)

    def stored(self) -> dict[str, torch.Tensor]:
        return {"vera_lambda_b": self.b, "vera_lambda_d": self.d}


@register
class VeRALayout(WeightLayout):
    """vera_lambda_b (d_out,), vera_lambda_d (r,), and once base_model.vera_A (r, largest d_in) and vera_B."""

    peft_type, layer = "VERA", VeRALayer
    ends, needs = r"vera_lambda_[bd]", "vera_lambda_b and vera_lambda_d"
    kinds = {
        "r": (int,), "projection_prng_key": (int, type(None)), "d_initial": (*NUMBER, type(None)),
        "vera_dropout": (*NUMBER, type(None)), "save_projection": (bool, type(None)),
    }  # fmt: skip
    pair = {"base_model.vera_A": "A", "base_model.vera_B": "B"}

    def config(self, base: nn.Module, layers: list[VeRALayer]) -> dict:
        first = layers[0]
        if any(layer.pair is not first.pair for layer in layers):
            raise ValueError("These VeRA layers have several pairs A, B, and a file has one; use one VeRA(…) for all.")
        return super().config(base, layers) | {
            "r": first.method.rank,
            "projection_prng_key": first.method.projection_seed,
            "save_projection": True,
            "vera_dropout": first.method.dropout,
            "d_initial": first.method.d_initial,
            "fan_in_fan_out": any(flipped(module_at(base, layer.path)) for layer in layers),
            "bias": "none",
        }

    def owns(self, key: str) -> bool:
        return key in self.pair or super().owns(key)

    def build(self, config: dict, places: list[str], tensors: Tensors) -> list[VeRA]:
        held = {tuple(value.shape) for key, value in tensors.items() if key.endswith(".vera_lambda_d")}
        if held != {(config["r"],)} and places:
            raise ValueError(f"r = {config['r']}, but its vera_lambda_d have the shapes {sorted(held)}.")
        values = {"d_initial": "d_initial", "vera_dropout": "dropout", "projection_prng_key": "projection_seed"}
        given = {ours: config[name] for name, ours in values.items() if config.get(name) is not None}
        return [VeRA(rank=config["r"], targets=[exact(place) for place in places], **given)] if places else []

    def tensors(self, layers: list[VeRALayer], config: dict) -> Tensors:
        shared = {key: getattr(layers[0].pair, name) for key, name in self.pair.items()}
        return super().tensors(layers, config) | (shared if config.get("save_projection", True) else {})

    def restore(self, layers: list[VeRALayer], config: dict, tensors: Tensors) -> None:
        super().restore(layers, config, tensors)
        for key, name in self.pair.items():
            if key in tensors:
                getattr(layers[0].pair, name).copy_(tensors[key])
