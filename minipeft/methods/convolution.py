"""A convolution seen as a matrix, for LoRA, DoRA and IA3.

    kernel (c_out, c_in/groups, k, k)  =  W (d_out, d_in),   d_out = c_out,   d_in = c_in/groups·k·k: a patch
    B·A * x  =  B·(A * x):  A is a convolution to r channels, and B mixes them at each point, a 1×1 convolution

With groups every output channel reads its own group's patches, and so does B·A.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

MIX = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}  # by the dimensions of the kernel


def convolve(module: nn.Module, x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """W * x with W (rows, d_in), in the steps and with the padding of `module`, without its bias."""
    return module._conv_forward(x, W.view(-1, *module.weight.shape[1:]), None)


def product(module: nn.Module, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """B·A * x with A (r, d_in) and B (d_out, r)."""
    if module.groups > 1:
        return convolve(module, x, B @ A)
    return MIX[module.weight.ndim](convolve(module, x, A), as_kernel(B, module))


def as_kernel(W: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """(rows, columns) as the kernel of a 1×1 convolution, (rows, columns, 1, 1)."""
    return W.view(*W.shape, *[1] * (module.weight.ndim - 2))


def over_channels(values: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """(c,) as (c, 1, 1): one number for each channel of an image or a batch of them."""
    return as_kernel(values[:, None], module)[:, 0]
