"""The memory of training: predicted without allocating anything, and measured, in the same parts.

    predict(model, LoRA(rank=8), batch=16, length=48)     # Memory(weights 3.7 MiB + … = 41.9 MiB at the peak)
    measure(attach(model, LoRA(rank=8)), batch=16, length=48)

A prediction *runs* a training step, on tensors that have a shape, a dtype and a device but no memory (`FakeTensor`),
and counts the bytes that they would take. So it needs no formula for each family of models, and no fudge factor.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from itertools import chain

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from minipeft.analyze.budget import on_meta
from minipeft.attach import Tuned, attach
from minipeft.layer import Method
from minipeft.learn.master import adamw
from minipeft.learn.peak import PeakMemory, kept
from minipeft.methods.qlora import quantize
from minipeft.reading import longest


@dataclass(frozen=True)
class Memory:
    """Bytes of one training step. All but `working` are alive together at the end of the forward pass.

    `weights`: the base as it is stored (with `Full`, which trains copies, the originals too); `trained`: the trainable
    numbers that `attach` put beside it; `gradients` and `moments` (of the optimizer): from the step before;
    `activations`: what autograd keeps for the backward pass; `working`: what the peak needs beyond these.
    """

    weights: int
    trained: int
    gradients: int
    moments: int
    activations: int
    working: int

    @property
    def peak(self) -> int:
        return sum(astuple(self))

    def __repr__(self) -> str:
        parts = " + ".join(f"{field.name} {getattr(self, field.name) / 2**20:,.1f}" for field in fields(self))
        return f"Memory({parts} = {self.peak / 2**20:,.1f} MiB at the peak)"


def predict(
    model,
    method: Method | list[Method] | None = None,
    batch: int = 16,
    length: int = 48,
    dtype: torch.dtype | None = None,
    quantized: bool = False,
    optimizer: Callable = adamw,
) -> Memory:
    """The memory of training `method` on `model` with batches of (batch, length) tokens; nothing is allocated.

    `model`: a transformers model (also on the meta device, also a `Tuned`, then without `method`), or a configuration.
    None as `method` trains what requires a gradient. `dtype`: of the base; the layers of an adapter stay float32.
    `quantized`: whether `quantize` is applied first. `optimizer`: a class from `torch.optim`; `fit`'s own
    without, which keeps float32 masters of what trains in bfloat16.

    It is the sum over tensors, which an allocator rounds up; scratch space inside an operation is not seen.
    Raises ValueError when the model's forward gives no loss, and for more tokens than its context.
    """
    model = _copy(on_meta(model), lambda t: torch.empty_like(t, device="meta"))
    model = model if dtype is None else model.to(dtype)
    model = quantize(model) if quantized else model
    model = model if method is None else attach(model, method)
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        with mode:  # says that it is on the CPU, where attention then takes the path of a real step
            return torch.empty_like(tensor, device="cpu")

    model = _copy(model, fake)
    try:
        with mode:
            return measure(model, batch, length, optimizer)
    except DataDependentOutputException as error:
        raise ValueError(
            f"{optimizer.__name__} looks at numbers while it steps, so its memory cannot be foretold without any; call "
            "measure() on the real model."
        ) from error
    except RuntimeError as error:
        if "Expected inputs of BF16" not in str(error):
            raise
        raise ValueError(
            "Without numbers, the product of a mixture's experts is known in bfloat16 only: give dtype=torch.bfloat16, "
            "or call measure() on the real model."
        ) from error


def measure(model: nn.Module, batch: int = 16, length: int = 48, optimizer: Callable = adamw) -> Memory:
    """The memory of a real training step, as `fit` takes it, once the optimizer has its moments.

    The learning rate is 0, so that the model comes out as it went in. Raises like `predict`.
    """
    inputs = _inputs(model, batch, length)
    trained = [p for p in model.parameters() if p.requires_grad]
    was_training = model.training
    model.train()
    try:
        with torch.random.fork_rng(devices=[]):
            found = _later_step(model, inputs, optimizer(trained, lr=0.0), trained)
            reached = [p for p in trained if p.grad is not None]
            if len(reached) < len(trained):  # what no gradient reaches has no moments
                found = _later_step(model, inputs, optimizer(trained, lr=0.0), reached)
    finally:
        for parameter in trained:
            parameter.grad = None
        model.train(was_training)
    return found


def _later_step(model: nn.Module, inputs: dict, optimizer, reached: list[nn.Parameter]) -> Memory:
    """The memory of a step after one that gave each of `reached` a gradient, and with it moments."""
    optimizer.zero_grad(set_to_none=True)
    for parameter in reached:
        parameter.grad = torch.ones_like(parameter)
    _update(optimizer)
    parts = kept(model, optimizer)
    sizes = {name: PeakMemory(tensors).live for name, tensors in parts.items()}
    memory = PeakMemory(chain(*parts.values()))
    held = memory.live
    del parts  # it would keep the old gradients alive
    with memory:
        after_forward = _step(model, inputs, optimizer, memory)
    return Memory(**sizes, activations=after_forward - held, working=memory.peak - after_forward)


def _step(model: nn.Module, inputs: dict, optimizer, memory: PeakMemory | None = None) -> int:
    """One step in the order of `fit`; returns the bytes alive after its forward pass."""
    try:
        loss = getattr(model(**inputs), "loss", None)
    except DataDependentOutputException as error:
        raise ValueError(
            f"{type(getattr(model, 'base', model)).__name__} looks at numbers on the way (it may drop whole layers at "
            "random), so its memory cannot be foretold without any; call measure() on the real model."
        ) from error
    if loss is None:
        raise ValueError(f"{type(model).__name__} gives no loss to train on; take its class with a head for a task.")
    live = memory.live if memory else 0
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    _update(optimizer)
    return live


def _update(optimizer) -> None:
    try:
        optimizer.step()
    except TypeError as error:
        raise ValueError(f"{type(optimizer).__name__} takes no plain step ({error}); use one such as AdamW.") from error


def _copy(model: nn.Module, new: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """The model over new tensors; no number is read, and what was shared is shared."""
    memo: dict[int, torch.Tensor] = {}
    originals = model.originals if isinstance(model, Tuned) else []
    for tensor in (*model.parameters(), *model.buffers(), *originals):
        with torch.no_grad():
            fresh = new(tensor)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(fresh, requires_grad=tensor.requires_grad) if is_parameter else fresh
    return copy.deepcopy(model, memo)


def _inputs(model: nn.Module, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Tokens, one of them padding as in nearly every batch, and labels: a token each, or a class a row."""
    config = getattr(model, "config", None)
    if config is None or "input_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"{type(model).__name__} is no transformers model of text, so it is not known what to feed it."
        )
    context = longest(model) or length
    if not 0 < length <= context or batch < 1:
        raise ValueError(f"Batches of {batch} × {length} tokens do not fit: the model reads 1 to {context} tokens.")
    device = next(model.parameters()).device
    ids = torch.ones(batch, length, dtype=torch.long, device=device)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    writes = model.get_output_embeddings() is not None
    return {"input_ids": ids, "attention_mask": mask, "labels": ids if writes else ids[:, 0]}
