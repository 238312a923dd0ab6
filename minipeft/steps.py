"""What a method does while a model trains, in anybody's loop: its penalty comes along with the model's loss, and it
hears of each optimizer step. `fit`, a loop of one's own, gradient accumulation, loss scaling and transformers' Trainer
need nothing more."""

from __future__ import annotations

import weakref

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

_LISTENING: weakref.WeakSet = weakref.WeakSet()  # the models of which a method wants to hear


def listen(tuned: torch.nn.Module) -> None:
    """From now on, in training, `tuned` hears of each step of an optimizer that holds its active parameters."""
    _LISTENING.add(tuned)


def _after_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for tuned in list(_LISTENING):
        layers = tuned.layers() if tuned.training and tuned.hears() else ()
        if any(p.requires_grad and id(p) in held for layer in layers for p in layer.parameters()):
            tuned.told = False
            tuned.stepped()
            tuned.told = True


class Along(torch.autograd.Function):
    """The loss unchanged; on the way back, `penalty` gets the same gradient, as if it had been added to the loss."""

    walking: torch.Tensor | None = None  # the gradient of the loss from which a backward pass is on its way

    @staticmethod
    def forward(ctx, loss: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
        ctx.like = penalty.dtype, penalty.device
        return loss.clone()  # a view could not be changed in place, as the Trainer does

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dtype, device = ctx.like
        if not torch.compiler.is_compiling():
            Along.walking = gradient
            torch.autograd.Variable._execution_engine.queue_callback(lambda: setattr(Along, "walking", None))
        return gradient, gradient.to(device, dtype)


class OnTheWay(torch.autograd.Function):
    """y unchanged, `penalty` as in `Along`: for what is computed only on the way back, by a checkpoint."""

    @staticmethod
    def forward(ctx, y: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
        ctx.penalty = penalty.detach()
        return y.view_as(y)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        one = torch.ones_like(ctx.penalty)
        return gradient, one if Along.walking is None else one * Along.walking.to(one.device, one.dtype)


def going_back() -> bool:
    """Whether a backward pass is computing this, again, for a checkpoint."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


register_optimizer_step_post_hook(_after_step)  # one for all: it looks whose parameters the optimizer holds
