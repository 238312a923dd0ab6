"""QLoRA: LoRA over a base that is stored in 4 bits (Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized
LLMs", §3, Eq. 5 and 6).

    y = x·dequantize(Q)ᵀ + γ·x·Aᵀ·Bᵀ        Q: codes and scales of W, frozen;  A, B: float32, trained

    model = quantize(model)                     # lossy, in place: the base *is* now the quantised one
    tuned = attach(model, LoRA(rank=8))         # as over any base; the adapter's file fits the plain base too

A dense W exists only while one layer computes, forward or backward: autograd keeps the codes instead.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from minipeft.build import carries_adapters
from minipeft.methods.nf4 import Code, Quantized, normal_float
from minipeft.methods.nf4 import quantize as quantize_tensor
from minipeft.targets import Target, Targets, flipped, module_at, packed, resolve, slots


class PackedProduct(torch.autograd.Function):
    """y = x·Ŵᵀ + b with Ŵ = dequantize(Q) of shape (d_out, d_in); saved for backward: Q, neither Ŵ nor x."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, bias: torch.Tensor | None, base: QuantizedLinear, *stored: torch.Tensor):
        ctx.base = base
        ctx.save_for_backward(*stored)
        return F.linear(x, base.dense(stored).to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: torch.Tensor):
        # ∂L/∂x = g·Ŵ,  ∂L/∂b = Σ g;  Q is frozen
        to_x, to_bias = ctx.needs_input_grad[:2]
        stored = ctx.saved_tensors
        grad_x = g @ ctx.base.dense(stored).to(g.dtype) if to_x else None
        grad_bias = g.flatten(0, -2).sum(0) if to_bias else None
        return grad_x, grad_bias, None, *[None] * len(stored)


class QuantizedLinear(nn.Linear):
    """A linear layer that holds its weight as `Quantized`: y = x·dequantize(Q)ᵀ + b, in the dtype of x.

    Everything that is stored is a frozen parameter of *bytes*, so `model.to(dtype)` cannot round the scales and no
    optimizer can move them. `weight` dequantises anew each time that it is read; nothing can be assigned to it.
    """

    def __init__(self, quantized: Quantized, bias: nn.Parameter | None):
        nn.Module.__init__(self)
        self.out_features, self.in_features = quantized.shape
        self.layout = quantized.over({name: t.to("meta") for name, t in quantized.tensors().items()})
        for name, tensor in quantized.tensors().items():
            self.register_parameter(name, nn.Parameter(tensor.view(torch.uint8), requires_grad=False))
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> torch.Tensor:
        return self.dense([self._parameters[name] for name in self.layout.tensors()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, d_in) → (…, d_out)"""
        return PackedProduct.apply(x, self.bias, self, *(self._parameters[name] for name in self.layout.tensors()))

    def dense(self, stored: list[torch.Tensor]) -> torch.Tensor:
        """Ŵ (d_out, d_in) from the bytes of codes and scales."""
        kinds = self.layout.tensors().items()
        return self.layout.over(
            {name: bytes_.view(kind.dtype) for (name, kind), bytes_ in zip(kinds, stored, strict=True)}
        ).dequantize()

    def stored(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """The bytes that would hold `weight` instead, by parameter name; see `Tuned.merge`."""
        layout = self.layout
        new = quantize_tensor(weight, layout.code, layout.block, isinstance(layout.scale, Quantized))
        return {name: tensor.view(torch.uint8) for name, tensor in new.tensors().items()}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.layout.bits():.3f}"


def quantize(
    model: nn.Module, targets: Targets = "all-linear", code: Code | None = None, block: int = 64, double: bool = True
) -> nn.Module:
    """Stores the weights of the linear layers that `targets` names in few bits, in place, and returns the model.

    NF4 in blocks of 64 with double quantisation by default: 4.127 bits a parameter. Embeddings, norms, biases and, with
    "all-linear", the output layer stay as they are. This is lossy, and the dense weights are gone: load the model again
    to have them back. GPT-2's Conv1D becomes a linear layer.

    Raises ValueError, and leaves the model as it was, when `targets` match nothing, name an embedding, a slice, a layer
    that is quantised already, a weight that is tied to another or not finite, and when the model carries adapters.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; quantize needs a torch.nn.Module.")
    if carries_adapters(model):
        raise ValueError("This model carries adapters; quantise the base first, then attach.")
    code = normal_float() if code is None else code
    quantize_tensor(torch.ones(1), code, block, double)  # a wrong block raises here, not halfway through the model
    places: dict[int, list[str]] = {}  # every place of a module; one that is used twice has several
    for path, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(path)
    holders = [id(parameter) for _, parameter in slots(model)]
    chosen = resolve(model, targets)
    for target in chosen:
        _check(target, tied=holders.count(id(target.module._parameters.get("weight"))) > 1)
    for paths in [places[id(target.module)] for target in chosen]:
        chosen.pop(0)  # the last reference to the dense layer is in the model
        module = module_at(model, paths[0])
        weight = module.weight.T if flipped(module) else module.weight
        new = QuantizedLinear(quantize_tensor(weight, code, block, double), module.bias).train(module.training)
        for path in paths:
            parent, _, name = path.rpartition(".")
            setattr(module_at(model, parent), name, new)
    return model


def _check(target: Target, tied: bool) -> None:
    path, module = target.path, target.module
    if isinstance(module, nn.Embedding):
        raise ValueError(f"{path!r} is an embedding, whose rows are looked up; quantise linear layers only.")
    if packed(module):
        raise ValueError(f"{path!r} is quantised already; load the model again for another code.")
    if target.d_out != target.width:
        raise ValueError(f"{target.key!r} is a slice; quantise the whole layer {path!r}.")
    if not path:
        raise ValueError("The model is itself the linear layer, so nothing can hold its place; use nn.Sequential.")
    if tied:
        raise ValueError(f"The weight of {path!r} is tied to another module's; leave {path!r} out of targets.")
    if not module.weight.is_meta and not module.weight.isfinite().all():
        raise ValueError(f"{path!r} holds NaN or infinite weights; load the model again.")
