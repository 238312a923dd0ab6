"""DoRA: learn how long each row of a weight is and where it points, apart (Liu et al. 2024, "DoRA: Weight-Decomposed
Low-Rank Adaptation", §4).

    W = m ⊙ V/‖V‖   with V = W, m = ‖W‖ (d_out,) at first;   W' = m ⊙ (W + γ·B·A)/‖W + γ·B·A‖

‖·‖ is the norm over the inputs of one output feature (the paper stores weights transposed and says "column").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from minipeft.files import register
from minipeft.methods import convolution
from minipeft.methods.lora import ConvolutionLoRALayer, LoRA, LoRALayer, LoRALayout
from minipeft.targets import Target


class DoRALayer(LoRALayer):
    """LoRA's A and B, and m (d_out,)."""

    embeddings = False

    def __init__(self, target: Target, method: DoRA, generator: torch.Generator):
        super().__init__(target, method, generator)
        self.m = nn.Parameter(self.norm())

    @torch.no_grad()
    def norm(self) -> torch.Tensor:
        """‖W + γ·B·A‖ of each row, (d_out,); a constant for the gradient (§4.3, which halves the memory)."""
        directions = torch.addmm(self.weight.to(self.A.dtype), self.B, self.A, alpha=self.gamma)
        return torch.linalg.norm(directions, dim=1)

    def scale(self) -> torch.Tensor:
        # m / ‖W + γ·B·A‖;  a row of zeros has no direction, and stays zero
        return self.m / self.norm().clamp_min(torch.finfo(self.m.dtype).tiny)

    def extra(self, x: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
        """W'·x − W·x = (s − 1)·W·x + s·γ·B·A·x with s = m/‖W + γ·B·A‖; W·x is the module's output less its bias."""
        x = F.dropout(x.to(self.A.dtype), self.dropout, self.training)
        if self.training and self.dropout:  # the authors' code drops inputs of W as well, here and only here
            plain = F.linear(x, self.weight.to(x.dtype))
        else:
            bias = getattr(self.owner[0], "bias", None)
            plain = plain[..., self.rows] - (0.0 if bias is None else bias[self.rows])
        s = self.scale()
        return (s - 1) * plain + s * F.linear(F.linear(x, self.A), self.B) * self.gamma

    def whole(self, x: torch.Tensor) -> torch.Tensor | None:
        """The same with y = (W + γ·B·A)·x + b as the only product: y + (s − 1)·(y − b)."""
        if (y := super().whole(x)) is None:
            return None
        bias = self.owner[0].bias
        return torch.addcmul(y, self.scale() - 1, y if bias is None else y - bias)

    def delta(self) -> torch.Tensor:
        weight = self.weight.to(self.A.dtype)
        return self.scale()[:, None] * (weight + self.gamma * (self.B @ self.A)) - weight

    def stored(self) -> dict[str, torch.Tensor]:
        return super().stored() | {"lora_magnitude_vector": self.m}


class ConvolutionDoRALayer(DoRALayer, ConvolutionLoRALayer):
    """The same for a kernel, whose rows are its output channels."""

    def extra(self, x: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
        module = self.owner[0]
        x = F.dropout(x.to(self.A.dtype), self.dropout, self.training)
        if self.training and self.dropout:
            plain = convolution.convolve(module, x, self.weight.to(x.dtype))
        elif module.bias is not None:
            plain = plain - convolution.over_channels(module.bias, module)
        s = convolution.over_channels(self.scale(), module)
        return (s - 1) * plain + s * convolution.product(module, x, self.A, self.B) * self.gamma

    def stored(self) -> dict[str, torch.Tensor]:
        m = convolution.as_kernel(self.m[None], self.owner[0])
        return ConvolutionLoRALayer.stored(self) | {"lora_magnitude_vector": m}


class ReadDoRALayer(DoRALayer):
    """The same for a matrix that a module reads for itself; see `read.py`."""


@dataclass(frozen=True)
class DoRA(LoRA):
    """W' = m ⊙ (W + γ·B·A)/‖W + γ·B·A‖: LoRA gives the direction, m (d_out,) the magnitude; all three train.

    The arguments are LoRA's. It holds Σ r·(d_in + d_out) + d_out numbers. Embeddings and init="pissa" are refused.
    """

    layers = dict.fromkeys(("kaiming", "gaussian", "orthogonal"), DoRALayer)
    on_convolutions, on_read, on_stacks = ConvolutionDoRALayer, ReadDoRALayer, None
    formula = "rank * (d_in + d_out) + d_out"
    examples = ({"rank": 2},)

    def __post_init__(self, alpha: float | None) -> None:
        if isinstance(self.init, str) and self.init in LoRA.layers.keys() - self.layers.keys():
            raise ValueError(f"init={self.init!r} is for LoRA; DoRA starts from {', '.join(self.layers)}.")
        super().__post_init__(alpha)


@register
class DoRALayout(LoRALayout):
    """LoRA's two, and lora_magnitude_vector (d_out,)."""

    layer, method, flag, others = DoRALayer, DoRA, {"use_dora": True}, (ConvolutionDoRALayer, ReadDoRALayer)
    foreign = (*LoRALayout.foreign, "target_parameters")
    ends, needs = r"lora_(?:[AB]\.weight|magnitude_vector)", "lora_A, lora_B and lora_magnitude_vector"
