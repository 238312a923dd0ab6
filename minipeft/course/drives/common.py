"""What several drives build, and the plain call."""

from __future__ import annotations

import torch
from torch import nn


def call(function, *args):
    value = function(*args)
    return list(value) if isinstance(value, map | filter | zip) else value


class Conv1D(nn.Module):
    """GPT-2's linear layer: y = x·W + b with W of shape (d_in, d_out)."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.nf = weight.shape[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


def layer(weight: torch.Tensor, bias: torch.Tensor, conv1d: bool) -> nn.Module:
    if conv1d:
        return Conv1D(weight.clone(), bias.clone())
    linear = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    linear.weight, linear.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
    return linear


@torch.no_grad()
def descend(model: nn.Module, lr: float) -> None:
    """One step of gradient descent on all that trains."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is not None:
            parameter -= lr * parameter.grad


def gradient(loss: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """∂loss/∂tensor; zeros where nothing reaches it."""
    found = torch.autograd.grad(loss, tensor, allow_unused=True)[0] if loss.requires_grad else None
    return torch.zeros_like(tensor) if found is None else found
