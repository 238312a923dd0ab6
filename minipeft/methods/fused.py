"""W'·x + b in fewer passes over x and y, for a change ΔW = γ·B·A of low rank.

The plain form, W·x + b and γ·B·A·x on top, goes over the n rows of x and of y several times more than W·x + b alone.
Here W' = W + γ·B·A is formed first, and is the only factor. With g = ∂L/∂y, of shape (n, d_out):

    y = x·W'ᵀ + b      ∂L/∂x = g·W'      ∂L/∂A = γ·Bᵀ·gᵀ·x      ∂L/∂B = γ·gᵀ·x·Aᵀ = γ·((A·xᵀ)·g)ᵀ

Only x is kept for the backward pass, as a trained linear layer does; W' is formed there again. For few rows, where no
gradient is asked for, y = W·x + b is formed first, and γ·(x·Aᵀ)·Bᵀ is added to it in place.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from minipeft.layer import WeightLayer
from minipeft.targets import flipped

SMALL = 64 * 64  # below it either form takes no time, and the plain one rounds as PEFT does, to the bit


def quicker(n: int, d_in: int, d_out: int) -> bool:
    """Whether one product with W' takes less time than two forms added, for n rows; measured on CPUs, 2026-11.

    Forming W' goes over d_in·d_out numbers, the other way over n·(d_in + d_out) more.
    """
    return SMALL <= d_in * d_out <= n * (d_in + d_out)


def transformed() -> bool:
    """Whether PyTorch traces or transforms the formula itself (torch.compile, torch.func, forward mode)."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def product(
    layer: WeightLayer, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, gamma: float = 1.0
) -> torch.Tensor | None:
    """(…, d_in) → (…, d_out) for the module that `layer` sits on; None where the plain form is quicker or needed."""
    module, learning = layer.owner[0], torch.is_grad_enabled()
    d_out, d_in = B.shape[0], A.shape[1]
    one = quicker(x.numel() // d_in, d_in, d_out)
    if not one and (learning or d_in * d_out < SMALL):
        return None
    try:  # past the module's own look-up, which takes as long as all that is asked below
        W, b = module._parameters["weight"], module._parameters["bias"]
    except KeyError:  # one of them is computed from others
        return None
    if (
        not x.dtype == W.dtype == A.dtype  # a W' in bfloat16 would lose what is small beside W,
        or not x.is_cpu  # in TensorFloat-32, too,
        or torch.is_autocast_enabled("cpu")  # and here
        or (learning and (W.requires_grad or (b is not None and b.requires_grad)))
        or layer.padding != (0, 0)
        or layer._forward_hooks  # somebody wants to see γ·B·A·x
        or layer._forward_pre_hooks
        or transformed()
    ):
        return None
    W = W.T if flipped(module) else W
    if not one:
        rows = x.reshape(-1, d_in)
        y = F.linear(rows, W, b).addmm_(F.linear(rows, A), B.T, alpha=gamma)
        return y.view(*x.shape[:-1], d_out)
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
            dA = (B.T @ dW).mul_(gamma) if to_A else None
            dB = (dW @ A.T).mul_(gamma) if to_B else None
        else:
            dA = (B.T @ g.T @ x).mul_(gamma) if to_A else None  # the r numbers of each row as columns: half the time
            dB = (A @ x.T @ g).mul_(gamma).T if to_B else None
        return dx, None, None, dA, dB, None
