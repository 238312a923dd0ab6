"""Bottleneck adapters: small networks between the layers of a frozen model (Houlsby et al. 2019, "Parameter-Efficient
Transfer Learning for NLP", §2.1).

    h (…, d) ─┬──────────────────────────────────────────────────────────┬─ + ──▶ h' (…, d)
              └─ W_down (m, d) ──▶ m numbers ──▶ σ ──▶ W_up (d, m) ──────┘

At d = 1024 and m = 64 one adapter holds 2·d·m + m + d = 132,160 numbers, its biases included.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from minipeft.files import OURS, SettingsLayout, register
from minipeft.layer import After, Layer, Method
from minipeft.methods.common import check_choice, check_whole, like
from minipeft.targets import Target, head, is_matrix, mixtures, resolve

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "tanh": torch.tanh, "silu": F.silu, "identity": lambda x: x}
PLACEMENTS = ("houlsby", "pfeiffer", "parallel")


class Site(NamedTuple):
    """Where an adapter can sit: after the module at `path`, of width d, in a block of the model. A parallel adapter
    reads the input of the module at `source`."""

    path: str
    d: int
    block: int
    source: str | None = None


@dataclass(frozen=True)
class Adapter(Method):
    """h' = h + W_up·σ(W_down·h + b_down) + b_up, with W_up and both biases zero at first, so h' = h.

    `bottleneck`: m (§3.2 tries 2 to 256; 64 is common for d = 1024).
    `placement`: "houlsby", after attention and after the feed-forward part of every block, before the residual is added
        (§2.1, two adapters a block); "pfeiffer", after the feed-forward part only (Pfeiffer et al. 2021,
        "AdapterFusion", §3); "parallel", from the input of the feed-forward part to its output (He et al. 2022,
        "Towards a Unified View", §4.6); or dotted suffixes of the linear layers to sit after.
    `activation`: σ, one of "relu", "gelu", "tanh", "silu", "identity".
    `top`: only in the last so many blocks; None means all.
    `share`: so many consecutive blocks share one adapter ("group-wise"); `share_within`: the two adapters of a block
        are one ("layer-wise"). Numbers to train fall by the product of the two.

    Raises ValueError for settings that are none of these; and, at `attach`, where the model has no such places.
    """

    bottleneck: int = 16
    placement: str | Sequence[str] = "houlsby"
    _: KW_ONLY
    activation: str = "relu"
    top: int | None = None
    share: int = 1
    share_within: bool = False

    examples = (
        {"bottleneck": 4},
        {"bottleneck": 4, "placement": "parallel", "activation": "gelu"},
        {"bottleneck": 4, "share": 2, "share_within": True, "activation": "tanh"},
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "placement", check_placement(self.placement, self.top))
        for name in ("bottleneck", "share"):
            check_whole(name, getattr(self, name))
        check_choice("activation", self.activation, tuple(ACTIVATIONS))

    def places(self, model: nn.Module) -> dict[str, Callable[[torch.Generator], AdapterLayer]]:
        groups: dict[tuple, list[Site]] = {}
        found = sites(model, self.placement, self.top)
        for site in found:
            number = sum(other.block == site.block for other in found[: found.index(site)])  # 0, 1 within its block
            groups.setdefault((site.block // self.share, 0 if self.share_within else number), []).append(site)
        for group in groups.values():
            if len({site.d for site in group}) > 1:
                widths = ", ".join(f"{site.path} ({site.d})" for site in group)
                raise ValueError(f"One adapter cannot serve outputs of several widths: {widths}; share fewer of them.")
        return {f"{group[0].path}.adapter": partial(AdapterLayer, model, self, group) for group in groups.values()}


class AdapterLayer(Layer):
    """`down` (d → m) and `up` (m → d) of one adapter, which sits in one place or, if shared, in several."""

    def __init__(self, model: nn.Module, method: Adapter, group: list[Site], generator: torch.Generator):
        super().__init__(f"{group[0].path}.adapter")
        self.sites, self.method = group, method
        weight = next(model.get_submodule(group[0].path).parameters())
        with like(weight, generator):
            self.down, self.up = nn.Linear(group[0].d, method.bottleneck), nn.Linear(method.bottleneck, group[0].d)
        self.to(torch.promote_types(weight.dtype, torch.float32))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)
        self.heard: torch.Tensor | None = None  # what a parallel adapter read, until it writes

    def seats(self) -> dict[str, After]:
        sources = {site.source: self.hear for site in self.sites if site.source}
        return sources | {site.path: self.over if site.source == site.path else self.after for site in self.sites}

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """W_up·σ(W_down·h + b_down) + b_up, (…, d) → (…, d)"""
        return self.up(ACTIVATIONS[self.method.activation](self.down(h.to(self.down.weight.dtype))))

    def stored(self) -> dict[str, torch.Tensor]:
        return dict(self.named_parameters())

    def hear(self, output: torch.Tensor, x: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
        self.heard = x
        return output

    def after(self, output: torch.Tensor, x: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
        h, self.heard = output if self.heard is None else self.heard, None
        return (output + self(h)).to(output.dtype)

    def over(self, output: torch.Tensor, x: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
        """Where one module is the whole feed-forward part, a parallel adapter reads what it reads."""
        return (output + self(x)).to(output.dtype)


@register
class AdapterLayout(SettingsLayout):
    """adapter.down.weight (m, d), adapter.up.weight (d, m), and their biases"""

    peft_type, layer, method, word = OURS + "ADAPTER", AdapterLayer, Adapter, "adapter"

    def fits(self, method: Adapter, key: str, value: torch.Tensor) -> bool:
        return key.endswith("adapter.down.bias") and value.shape == (method.bottleneck,)


# ---------------------------------------------------------------------------------------------------------------------
# Places
# ---------------------------------------------------------------------------------------------------------------------
def check_placement(placement: str | Sequence[str], top: int | None) -> str | tuple[str, ...]:
    if isinstance(placement, str) and placement not in PLACEMENTS:
        raise ValueError(f"placement={placement!r} is not {', '.join(PLACEMENTS)}; for suffixes write [{placement!r}].")
    if top is not None:
        check_whole("top", top)
        if not isinstance(placement, str):
            raise ValueError("top= counts blocks, and suffixes name the places themselves; give one of the two.")
    return placement if isinstance(placement, str) else tuple(placement)


def sites(model: nn.Module, placement: str | Sequence[str], top: int | None = None) -> list[Site]:
    """The places of a placement, in the model's order.

    A block is a numbered part of the model ("layers.3"). Its attention is what lies under "attn" or "attention", its
    feed-forward part the other linear layers; both end with their last linear layer, or with a mixture of experts.
    """
    if not isinstance(placement, str):
        chosen = resolve(model, placement, unread=True)
        if sliced := [t.key for t in chosen if t.d_out != t.width]:
            raise ValueError(f"An adapter sits after a whole layer, and {sliced[0]!r} is a slice of one.")
        return [Site(t.path, t.width, i) for i, t in enumerate(chosen)]
    outputs = set(head(model))
    # PyTorch's attention reads the linear layer that it holds and does not call it
    whole = mixtures(model) + [path for path, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    parts: dict[tuple[str, str], list[tuple[str, nn.Module]]] = {}  # (block, part) -> its linear layers and the whole
    for path, module in model.named_modules():
        block = re.match(r"(?:.*?\.)?\d+(?=\.)", path)
        plain = is_matrix(module) and not isinstance(module, nn.Embedding) and path not in outputs
        if block and (plain or path in whole) and not path.startswith(tuple(f"{each}." for each in whole)):
            attention = re.match(r".*?(?:attn|attention)[^.]*", path, re.IGNORECASE)
            parts.setdefault((block[0], attention[0] if attention else ""), []).append((path, module))
    stacks: dict[str, list[str]] = {}
    for block, _ in parts:
        stack = stacks.setdefault(block.rsplit(".", 1)[0], [])
        stack += [] if block in stack else [block]
    kept = [block for stack in stacks.values() for block in stack[-(top or len(stack)) :]]
    found = []
    for (block, part), layers in parts.items():
        if block in kept and (placement == "houlsby" or not part):
            path, last = layers[-1]
            source = layers[0][0] if placement == "parallel" else None
            d = last.embed_dim if isinstance(last, nn.MultiheadAttention) else None
            d = d or (Target(path, last, 0, 0).width if is_matrix(last) else model.config.hidden_size)
            if source and is_matrix(layers[0][1]) and (read := Target(*layers[0], 0, 0).d_in) != d:
                raise ValueError(
                    f"A parallel adapter's input is as wide as its output, but {source!r} reads {read} numbers and "
                    f"{path!r} gives {d}; use another placement."
                )
            found.append(Site(path, d, kept.index(block), source))
    longest = max((len(stack) for stack in stacks.values()), default=0)
    if not found or (top or 0) > longest:
        what = f"{longest} numbered blocks" if found else "no numbered blocks with linear layers"
        advice = "use at most that many" if found else 'name the layers to sit after, as in placement=["fc1"]'
        raise ValueError(f"{type(model).__name__} has {what}; {advice}.")
    return found
