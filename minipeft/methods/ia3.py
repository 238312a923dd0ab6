"""(IA)³: rescale keys, values and the feed-forward's inner activations, one number each (Liu et al. 2022, "Few-Shot
Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", §3.3).

    k' = l_k ⊙ k,   v' = l_v ⊙ v,   y = W_down·(l_ff ⊙ h);   every l starts at one
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from minipeft.files import WORDS, Tensors, WeightLayout, compiled, register
from minipeft.layer import Method, WeightLayer
from minipeft.methods import convolution
from minipeft.methods.adapter import sites
from minipeft.methods.common import freeze, no_embedding
from minipeft.methods.read import bias as bias_of
from minipeft.methods.read import check_read
from minipeft.targets import Target, Targets, exact, flipped, is_convolution, module_at, resolve

KEYS = re.compile(r".*\.(k|v|key|value|kv|qkv|wk|wv|wqkv|query_key_value|c_attn)(_?(proj|lin|linear))?", re.IGNORECASE)


@dataclass(frozen=True)
class IA3(Method):
    """y' = l ⊙ (W·x + b) on `targets`, y' = W·(l ⊙ x) + b on `feedforward`: d_out and d_in numbers a layer.

    `targets`: the layers whose outputs are scaled, keys and values in the paper.
        The projections of PyTorch's attention, too, where they are named ("v_proj_weight", "in_proj_weight[16:48]").
    `feedforward`: the layers whose inputs are scaled, the second of the feed-forward; () for none.
    The names are Llama's. Left as they are, they stand in other families for the layers of the same roles; where one
    layer computes queries, keys and values, its whole output is scaled, as PEFT does.

    Raises ValueError, at `attach`, when a pattern matches nothing, and for a layer in both.
    """

    targets: Targets = ("k_proj", "v_proj")
    feedforward: Targets = ("down_proj",)

    def __post_init__(self) -> None:
        freeze(self, "targets", "feedforward")
        if self.targets == () and self.feedforward == ():
            raise ValueError("targets and feedforward are both empty, so IA3 would train nothing; name some layers.")

    def places(self, model: nn.Module) -> dict[str, Callable[[torch.Generator], IA3Layer]]:
        named = (self.targets, self.feedforward)
        default = named == (IA3.targets, IA3.feedforward)  # which leaves stacks of experts alone
        outputs, inputs = (
            {t.key: t for t in resolve(model, which, convolutions=True, reads=not default)} if which != () else {}
            for which in (roles(model) if default else named)
        )
        if both := outputs.keys() & inputs.keys():
            raise ValueError(f"{min(both)!r} is in targets and in feedforward; scale its output or its input.")
        no_embedding([*outputs.values(), *inputs.values()], self)
        every = (outputs | inputs).values()
        check_read(every, "IA3")
        kinds = {True: ConvolutionIA3Layer, False: IA3Layer}
        layers = {t.key: kinds[is_convolution(t.module)] if t.reader is None else ReadIA3Layer for t in every}
        return {t.key: partial(layers[t.key], t, t.key in inputs) for t in every}


def roles(model: nn.Module) -> tuple[Targets, Targets]:
    """The layers that give keys and values, and those that end the feed-forward parts, whatever they are called."""
    paths = [t.path for t in resolve(model, "all-linear")]
    if all(any(path.endswith(f".{name}") for path in paths) for name in (*IA3.targets, *IA3.feedforward)):
        return IA3.targets, IA3.feedforward
    keys = [path for path in paths if KEYS.fullmatch(path)]
    if not keys:
        return IA3.targets, IA3.feedforward  # which says what there is
    ends = {site.path for site in sites(model, "pfeiffer")}
    return tuple(exact(path) for path in keys if path not in ends), tuple(exact(path) for path in paths if path in ends)


class IA3Layer(WeightLayer):
    """l: (d_out, 1), or (1, d_in) if it scales the input."""

    def __init__(self, target: Target, feedforward: bool, _: torch.Generator):
        super().__init__(target)
        self.feedforward = feedforward
        shape = (1, target.d_in) if feedforward else (target.d_out, 1)
        self.l = nn.Parameter(torch.ones(shape, **self.place(target)))

    def extra(self, x: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
        """W·(l ⊙ x) + b less the plain output, or (l − 1) ⊙ the plain output."""
        l = self.l.flatten()  # noqa: E741
        if self.feedforward:
            return (self.bare((l * x).to(x.dtype)) - plain)[..., self.rows]
        return (l - 1) * plain[..., self.rows]

    def whole(self, x: torch.Tensor) -> torch.Tensor | None:
        """W·(l ⊙ x) + b, or l ⊙ (W·x + b)."""
        if any(self.padding):
            return None
        l = self.l.flatten()  # noqa: E741
        if self.feedforward:
            return self.bare((l * x).to(x.dtype))
        plain = self.bare(x)
        return (l * plain).to(plain.dtype)

    def delta(self) -> torch.Tensor:
        # ΔW = (l − 1) ⊙ W, by rows or by columns
        return (self.l - 1) * self.weight.to(self.l.dtype)

    def changes(self) -> dict[str, torch.Tensor]:
        name, rows = bias_of(self.owner[0], self.parameter, self.rows)
        bias = getattr(self.owner[0], name, None)
        if self.feedforward or bias is None:
            return super().changes()
        change = torch.zeros(bias.shape, dtype=self.l.dtype, device=bias.device)
        change[rows] = (self.l.flatten() - 1) * bias[rows]  # an output's scale takes the bias along
        return super().changes() | {name: change}

    def stored(self) -> dict[str, torch.Tensor]:
        return {"ia3_l": self.l}


class ReadIA3Layer(IA3Layer):
    """The same for a matrix that a module reads for itself; see `read.py`."""


class ConvolutionIA3Layer(IA3Layer):
    """l: (1, c_out, 1, 1), or (1, c_in, 1, 1) if it scales the input: a number for each channel."""

    def __init__(self, target: Target, feedforward: bool, _: torch.Generator):
        super().__init__(target, feedforward, _)
        channels = target.module.in_channels if feedforward else target.d_out
        kernel = (1, channels, *[1] * (target.module.weight.ndim - 2))
        self.l = nn.Parameter(torch.ones(kernel, **self.place(target)))

    def extra(self, x: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
        l = self.l[0]  # noqa: E741
        return self.bare((l * x).to(x.dtype)) - plain if self.feedforward else (l - 1) * plain

    def delta(self) -> torch.Tensor:
        module, scale = self.owner[0], self.l.flatten() - 1
        W = module.weight.to(self.l.dtype)
        if not self.feedforward:
            return scale[:, None] * W.flatten(1)
        own = scale.view(module.groups, -1).repeat_interleave(len(W) // module.groups, 0)  # (d_out, c_in/groups)
        return (convolution.as_kernel(own, module) * W).flatten(1)


@register
class IA3Layout(WeightLayout):
    """ia3_l: (d_out, 1), or (1, d_in) for a layer in feedforward_modules."""

    peft_type, layer, others = "IA3", IA3Layer, (ConvolutionIA3Layer, ReadIA3Layer)
    ends, needs = "ia3_l", "ia3_l"
    kinds = {"feedforward_modules": (str, *WORDS)}

    def config(self, base: nn.Module, layers: list[IA3Layer]) -> dict:
        names = {layer.key: exact(layer.key)[0] for layer in layers}
        inputs = sorted({names[layer.key] for layer in layers if layer.feedforward})
        mistaken = any(names[layer.key].endswith(tuple(inputs)) for layer in layers if not layer.feedforward)
        return super().config(base, layers) | {
            "feedforward_modules": "|".join(map(re.escape, inputs)) if mistaken else inputs,
            "fan_in_fan_out": any(flipped(module_at(base, layer.path)) for layer in layers),
        }

    def build(self, config: dict, places: list[str], tensors: Tensors) -> list[IA3]:
        inputs = config.get("feedforward_modules") or []
        if isinstance(inputs, str):
            scaled = compiled(inputs, "feedforward_modules").fullmatch
        else:
            scaled = lambda path: path.endswith(tuple(inputs))  # noqa: E731
        groups: dict[bool, list[tuple[str, int, int]]] = {False: [], True: []}
        for place in map(exact, places):
            groups[bool(scaled(place[0]))].append(place)
        return [IA3(targets=groups[False], feedforward=groups[True])] if places else []
