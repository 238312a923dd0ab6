"""W'·x + b in one product, for a change ΔW = γ·B·A of low rank.

The plain form, W·x + b and γ·B·A·x on top, goes over the n rows of x and of y several times more than W·x + b alone.
Here W' = W + γ·B·A is formed first. With g = ∂L/∂y, of shape (n, d_out):

    y = x·W'ᵀ + b      ∂L/∂x = g·W'      ∂L/∂A = γ·Bᵀ·(gᵀ·x) = γ·(g·B)ᵀ·x      ∂L/∂B = γ·(gᵀ·x)·Aᵀ = γ·gᵀ·(x·Aᵀ)

Only x is kept for the backward pass, as a trained linear layer does; W' is formed there again.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from minipeft.layer import WeightLayer
from minipeft.targets import flipped


def quicker(n: int, d_in: int, d_out: int, r: int, learning: bool) -> bool:
    """Whether one product with W' takes less time than the plain form, for n rows; measured on a CPU, 2026-11.

    Forming W' goes over d_in·d_out numbers, the plain form over n·(d_in + d_out) more; both take r multiplications for
    each and as long as 16 for moving it. Without gradients the plain form's calls cost as much as 1.5 million more.
    Below 64 × 64 either takes no time, and the plain form rounds as PEFT does, to the bit.
    """
    calls = 0 if learning else 1_500_000
    return 64 * 64 <= d_in * d_out <= n * (d_in + d_out) + calls / (r + 16)


def transformed() -> bool:
    """Whether PyTorch traces or transforms the formula itself (torch.compile, torch.func, forward mode)."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def one_product(
    layer: WeightLayer, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, gamma: float = 1.0
) -> torch.Tensor | None:
    """(…, d_in) → (…, d_out) for the module that `layer` sits on; None where the plain form is quicker or needed."""
    module = layer.owner[0]
    W, b = module.weight, module.bias
    (d_out, r), d_in, learning = B.shape, A.shape[1], torch.is_grad_enabled()
    if (
        not quicker(x.numel() // d_in, d_in, d_out, r, learning)
        or not x.dtype == W.dtype == A.dtype  # a W' in bfloat16 would lose what is small beside W,
        or x.device.type != "cpu"  # in TensorFloat-32, too,
        or torch.is_autocast_enabled("cpu")  # and here
        or W.requires_grad
        or (b is not None and b.requires_grad)
        or any(layer.padding)
        or layer._forward_hooks  # somebody wants to see γ·B·A·x
        or layer._forward_pre_hooks
        or transformed()
    ):
        return None
    W = W.T if flipped(module) else W
    return OneProduct.apply(x, W, b, A, B, gamma) if learning else F.linear(x, torch.addmm(W, B, A, alpha=gamma), b)


class OneProduct(torch.autograd.Function):
    """x (…, d_in), W (d_out, d_in), b (d_out,) or None, A (r, d_in), B (d_out, r), γ → y (…, d_out)."""

    @staticmethod
    def forward(ctx, x, W, b, A, B, gamma):
        ctx.save_for_backward(x, W, A, B)
        ctx.gamma = gamma
        return F.linear(x, torch.addmm(W, B, A, alpha=gamma), b)

    @staticmethod
    def backward(ctx, g):
        x, W, A, B = ctx.saved_tensors
        gamma, (to_x, _, _, to_A, to_B, _) = ctx.gamma, ctx.needs_input_grad
        dx = g @ torch.addmm(W, B, A, alpha=gamma) if to_x else None
        x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        (d_out, r), d_in = B.shape, A.shape[1]
        if 2 * r * (d_in + d_out) > d_in * d_out:  # gᵀ·x takes less than the four thin products
            dW = g.T @ x
            dA = gamma * (B.T @ dW) if to_A else None
            dB = gamma * (dW @ A.T) if to_B else None
        else:
            dA = (gamma * (g @ B)).T @ x if to_A else None
            dB = gamma * ((x @ A.T).T @ g).T if to_B else None
        return dx, None, None, dA, dB, None
