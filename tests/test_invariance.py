"""LoRA's scale, start and learning rates under Adam: what "LoRA Without Regret" says cannot matter, does not."""

from __future__ import annotations

import pytest
import tiny
import torch

from minipeft.attach import attach
from minipeft.methods.lora import LoRA


def trajectory(gamma: float, init_a: float, lr_a: float, lr_b: float, steps: int = 50) -> torch.Tensor:
    """The logits (steps, …) before each of `steps` Adam steps, in float64."""
    model = tiny.llama().double()
    tuned = attach(model, LoRA(rank=3, gamma=gamma))
    layers = list(tuned.adapters["default"].values())
    for layer in layers:
        layer.A.data *= init_a
    # ε = 0 means 0/0 where a gradient is exactly zero, as A's is in the first step; 1e-300 only decides that case.
    groups = [{"params": [x.A for x in layers], "lr": lr_a}, {"params": [x.B for x in layers], "lr": lr_b}]
    optimizer = torch.optim.Adam(groups, eps=1e-300)
    batch, seen = tiny.batch(model), []
    for _ in range(steps):
        output = tuned(**batch)
        seen.append(output.logits.detach())
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    return torch.stack(seen)


@pytest.mark.parametrize("p, q", [(4.0, 0.5), (3.7, 1.0), (1.0, 0.3), (0.1, 13.0)])
def test_scale_start_and_rates_can_be_traded_for_each_other(p, q):
    """(α, init_A, LR_A, LR_B) and (α/pq, p·init_A, p·LR_A, q·LR_B) train identically.

    Adam without ε moves every entry by the same amount whatever its gradient's scale. So pA and qB stay p and q times A
    and B, and γ/(pq) makes the product the same.
    """
    plain = trajectory(2.0, 1.0, 3e-3, 2e-3)
    traded = trajectory(2.0 / (p * q), p, p * 3e-3, q * 2e-3)
    assert (plain[-1] - plain[0]).abs().max() > 0.5, "it has learnt something"
    assert (plain - traded).abs().max() < 1e-6


@pytest.mark.parametrize("change", [dict(gamma=0.5), dict(lr_a=6e-3), dict(init_a=2.0), dict(lr_b=1e-3)])
def test_one_of_them_alone_does_matter(change):
    settings = dict(gamma=2.0, init_a=1.0, lr_a=3e-3, lr_b=2e-3)
    assert (trajectory(**settings, steps=10) - trajectory(**settings | change, steps=10)).abs().max() > 1e-3
