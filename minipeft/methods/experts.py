"""A mixture of expert adapters: several bottleneck adapters in one place, and a router that chooses among them for each
token (Shazeer et al. 2017, "Outrageously Large Neural Networks", §2; as adapters: Wang et al. 2022, "AdaMix").

    h (…, d) ─┬───────────────────────────────────────────────────┬─ + ──▶ h' (…, d)
              ├─ router R (E, d) ──▶ g, of which the k largest count ┤
              └─ adapters 1 … E ──▶ Σ gₑ·fₑ(h) ────────────────────┘

At d = 128, m = 8 and E = 4 one place holds 4·(2·d·m + m + d) + 4·d = 9,248 numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial

import torch
from torch import nn

from minipeft.files import OURS, SettingsLayout, register
from minipeft.layer import After, Layer, Method
from minipeft.methods.adapter import ACTIVATIONS, Site, check_placement, sites
from minipeft.methods.common import check_choice, check_whole, is_number, like
from minipeft.steps import OnTheWay, going_back
from minipeft.targets import module_at


@dataclass(frozen=True)
class Experts(Method):
    """h' = h + Σ gₑ(h)·fₑ(h) over the k experts with the largest router logits; g is the softmax of those k logits.

    `bottleneck`, `placement`, `activation`, `top`: as in `Adapter`, for each of the E = `experts` adapters f.
    `chosen`: k.
    `balance`: α of the load-balancing loss α·E·Σ fractionₑ·probabilityₑ (Fedus et al. 2021, "Switch Transformers",
        §2.2), a penalty; it is 1·α when every expert gets the same share. 0 turns it off.

    All E experts are computed and the gates choose: at this size that is faster than sorting the tokens, and it saves
    no work. Raises like `Adapter`, and ValueError if `chosen` is above `experts`.
    """

    bottleneck: int = 8
    experts: int = 4
    chosen: int = 2
    placement: str | Sequence[str] = "pfeiffer"
    _: KW_ONLY
    activation: str = "relu"
    top: int | None = None
    balance: float = 0.01

    examples = ({"bottleneck": 4, "activation": "gelu"},)
    of_the_call = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "placement", check_placement(self.placement, self.top))
        for name in ("bottleneck", "experts", "chosen"):
            check_whole(name, getattr(self, name))
        if self.placement == "parallel" or self.chosen > self.experts:
            what = f"chosen={self.chosen} is above experts={self.experts}" if self.chosen > self.experts else "parallel"
            raise ValueError(f"{what}: choose at most all of the experts, after attention or the feed-forward part.")
        check_choice("activation", self.activation, tuple(ACTIVATIONS))
        if not is_number(self.balance, 0):
            raise ValueError(f"balance={self.balance!r} is not a number of at least 0, such as 0.01.")

    def places(self, model: nn.Module) -> dict[str, Callable[[torch.Generator], ExpertsLayer]]:
        found = sites(model, self.placement, self.top)
        return {f"{site.path}.experts": partial(ExpertsLayer, model, self, site) for site in found}

    def penalty(self, layers: Sequence[Layer]) -> torch.Tensor | float:
        """α·Σ imbalance of the last call, once."""
        mine = [layer for layer in layers if isinstance(layer, ExpertsLayer) and layer.method == self]
        found = [layer.uneven for layer in mine if layer.uneven is not None]
        for layer in mine:
            layer.uneven = None
        return self.balance * sum(found, mine[0].router.new_zeros(())) if self.balance and mine else 0.0


class ExpertsLayer(Layer):
    """`router` (E, d); `down` (E, m, d) with bias (E, m); `up` (E, d, m) with bias (E, d), both zero at first.

    `probabilities` (…, E) and `gates` (…, E, zero where not chosen) are kept from the last call, to be looked at."""

    def __init__(self, model: nn.Module, method: Experts, site: Site, generator: torch.Generator):
        super().__init__(f"{site.path}.experts")
        self.site, self.method = site, method
        weight = next(module_at(model, site.path).parameters())
        E, m, d = method.experts, method.bottleneck, site.d
        with like(weight, generator):
            self.router = nn.Parameter(torch.empty(E, d).uniform_(-1 / math.sqrt(d), 1 / math.sqrt(d)))
            self.down = nn.Parameter(torch.empty(E, m, d).uniform_(-1 / math.sqrt(d), 1 / math.sqrt(d)))
            self.down_bias, self.up_bias = nn.Parameter(torch.zeros(E, m)), nn.Parameter(torch.zeros(E, d))
            self.up = nn.Parameter(torch.zeros(E, d, m))
        self.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
        self.probabilities = self.gates = None
        self.uneven: torch.Tensor | None = None  # the imbalance of the last call, for the penalty

    def seats(self) -> dict[str, After]:
        return {self.site.path: self.after}

    def stored(self) -> dict[str, torch.Tensor]:
        return dict(self.named_parameters())

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Σ gₑ·fₑ(h), (…, d) → (…, d)"""
        h = h.to(self.router.dtype)
        logits = h @ self.router.T
        best, who = logits.topk(self.method.chosen, dim=-1)
        # g: the softmax of the k largest logits, 0 elsewhere
        gates = torch.zeros_like(logits).scatter(-1, who, best.softmax(-1))
        probabilities = logits.softmax(-1)
        self.probabilities, self.gates = probabilities.detach(), gates.detach()
        low = torch.einsum("...d,emd->...em", h, self.down) + self.down_bias
        high = torch.einsum("...em,edm->...ed", ACTIVATIONS[self.method.activation](low), self.up) + self.up_bias
        mixed = torch.einsum("...e,...ed->...d", gates, high)
        self.uneven = None
        if self.method.balance and torch.is_grad_enabled():
            uneven = self.imbalance(probabilities, gates)
            if going_back():
                return OnTheWay.apply(mixed, self.method.balance * uneven)
            self.uneven = uneven
        return mixed

    def __getstate__(self) -> dict:
        return self.__dict__ | {"uneven": None}  # a copy has nothing to go back through

    def after(self, output: torch.Tensor, x: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
        return (output + self(output)).to(output.dtype)

    def imbalance(self, probabilities: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """E·Σ fractionₑ·probabilityₑ: 1 if balanced, E/k at worst."""
        E, k = self.method.experts, self.method.chosen
        fraction = (gates > 0).float().flatten(0, -2).mean(0) / k
        return E * (fraction * probabilities.flatten(0, -2).mean(0)).sum()

    def load(self) -> torch.Tensor:
        """(E,): the share of the last call's choices that went to each expert (its padding included)."""
        if self.gates is None:
            raise ValueError("Nothing has gone through these experts yet; call the model once, then ask for the load.")
        return (self.gates > 0).float().flatten(0, -2).mean(0) / self.method.chosen


@register
class ExpertsLayout(SettingsLayout):
    """experts.router (E, d), experts.down (E, m, d), experts.up (E, d, m), and biases"""

    peft_type, layer, method, word = OURS + "EXPERTS", ExpertsLayer, Experts, "experts"

    def fits(self, method: Experts, key: str, value: torch.Tensor) -> bool:
        return key.endswith("experts.down_bias") and value.shape == (method.experts, method.bottleneck)
