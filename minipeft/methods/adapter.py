"""Bottleneck adapters: small networks between the layers of a frozen model (Houlsby et al. 2019, "Parameter-Efficient
Transfer Learning for NLP", §2.1).

    h (…, d) ─┬──────────────────────────────────────────────────────────┬─ + ──▶ h' (…, d)
              └─ W_down (m, d) ──▶ m numbers ──▶ σ ──▶ W_up (d, m) ──────┘

At d = 1024 and m = 64 one adapter holds 2·d·m + m + d = 132,160 numbers, its biases included.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from minipeft.calls import calls
from minipeft.files import OURS, SettingsLayout, register
from minipeft.layer import After, Layer, Method
from minipeft.methods.common import check_choice, check_flag, check_whole, like
from minipeft.targets import Target, head, is_matrix, mixtures, module_at, resolve

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
        check_flag("share_within", self.share_within)
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
        weight = next(module_at(model, group[0].path).parameters())
        with like(weight, generator):
            self.down, self.up = nn.Linear(group[0].d, method.bottleneck), nn.Linear(method.bottleneck, group[0].d)
        self.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
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
        return (output + self.fitted(self(h), output)).to(output.dtype)

    def over(self, output: torch.Tensor, x: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
        """Where one module is the whole feed-forward part, a parallel adapter reads what it reads."""
        return (output + self.fitted(self(x), output)).to(output.dtype)

    def fitted(self, update: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The update in the output's shape, for a mixture may lay its tokens in one row."""
        if update.numel() != output.numel():
            raise ValueError(
                f"The parallel adapter at {self.sites[0].path!r} reads {tuple(update.shape)} and would be added to "
                f"{tuple(output.shape)}, for other tokens stand there; use another placement."
            )
        return update.view_as(output)


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
    if not isinstance(placement, Iterable):
        raise TypeError(f"placement={placement!r} is neither {', '.join(PLACEMENTS)} nor a list of suffixes.")
    if isinstance(placement, str) and placement not in PLACEMENTS:
        raise ValueError(f"placement={placement!r} is not {', '.join(PLACEMENTS)}; for suffixes write [{placement!r}].")
    if top is not None:
        check_whole("top", top)
        if not isinstance(placement, str):
            raise ValueError("top= counts blocks, and suffixes name the places themselves; give one of the two.")
    return placement if isinstance(placement, str) else tuple(placement)


def sites(model: nn.Module, placement: str | Sequence[str], top: int | None = None) -> list[Site]:
    """The places of a placement, in the model's order.

    A block is a numbered part of the model ("layers.3"), the innermost that has attention and other layers. Attention
    is what lies under "attn" or "attention", or what mixes a sequence otherwise (Mamba's convolution); the feed-forward
    part is the linear layers called after it, or all others. Both end with the linear layer or mixture of experts that
    is called last. Where the model cannot be tried, the order in which they stand is taken for that of the calls.
    """
    if not isinstance(placement, str):
        chosen = resolve(model, placement, unread=True)
        if sliced := [t.key for t in chosen if t.d_out != t.width]:
            raise ValueError(f"An adapter sits after a whole layer, and {sliced[0]!r} is a slice of one.")
        return [Site(t.path, t.width, i) for i, t in enumerate(chosen)]
    outputs = set(head(model))
    # PyTorch's attention reads the linear layer that it holds and does not call it
    whole = mixtures(model) + [path for path, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    inside = tuple(f"{each}." for each in whole)
    plain = (p for p, m in model.named_modules() if is_matrix(m) and not isinstance(m, nn.Embedding))
    layers = (set(plain) - outputs) | set(whole)
    parts = in_parts(model, [p for p, _ in model.named_modules() if p in layers and not p.startswith(inside)])
    stacks: dict[str, list[str]] = {}
    for block, _ in parts:
        stack = stacks.setdefault(block.rsplit(".", 1)[0], [])
        stack += [] if block in stack else [block]
    kept = [block for stack in stacks.values() for block in stack[-(top or len(stack)) :]]
    found = []
    for (block, mixer), paths in parts.items():
        if block in kept and (placement == "houlsby" or not mixer):
            path, last = paths[-1], module_at(model, paths[-1])
            source = paths[0] if placement == "parallel" else None
            d = last.embed_dim if isinstance(last, nn.MultiheadAttention) else None
            d = d or (Target(path, last, 0, 0).width if is_matrix(last) else model.config.hidden_size)
            first = module_at(model, paths[0])
            if source and is_matrix(first) and (read := Target(source, first, 0, 0).d_in) != d:
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


def in_parts(model: nn.Module, paths: list[str]) -> dict[tuple[str, str], list[str]]:
    """{(block, its attention, or "" for its feed-forward part): the paths of the layers, in the order of the calls}."""
    convolving = tuple(f"{path}." for path, module in model.named_modules() if mixes(module))
    attention = {p: found[0] if (found := re.match(r".*?(?:attn|attention)[^.]*", p, re.I)) else "" for p in paths}
    mixer = {p: name or next((each for each in convolving if p.startswith(each)), "") for p, name in attention.items()}
    numbered = {p: [p[: found.end()] for found in re.finditer(r"(?:^|\.)\d+(?=\.)", p)] for p in paths}
    holds: dict[str, set[bool]] = {}  # whether there is attention, whether there is something else
    for path in paths:
        for block in numbered[path]:
            holds.setdefault(block, set()).add(bool(mixer[path]))
    both = [block for block, kinds in holds.items() if len(kinds) == 2]
    blocks = [block for block in both if not any(other.startswith(f"{block}.") for other in both)]
    when = {path: i for i, path in enumerate(calls(model))}
    parts: dict[tuple[str, str], list[str]] = {}
    for path in (path for path in paths if numbered[path]):
        outermost, block = numbered[path][0], next((each for each in numbered[path] if each in blocks), None)
        if block or not any(each.startswith(f"{outermost}.") for each in blocks):  # else it stands between blocks
            name = mixer[path] if block else attention[path]  # with nothing else, Mamba is the feed-forward part
            parts.setdefault((block or outermost, name), []).append(path)
    for part, own in parts.items():
        parts[part] = sorted((path for path in own if path in when), key=when.__getitem__) or own
    for (block, name), own in parts.items():
        ends = [when[p] for (at, other), more in parts.items() if at == block and other for p in more if p in when]
        after = [path for path in own if ends and when.get(path, -1) > max(ends)]
        parts[block, name] = own if name else after or own
    return parts


def mixes(module: nn.Module) -> bool:
    """Whether it mixes a sequence by a convolution between linear layers, as Mamba does in attention's place."""
    children = list(module.children())
    return any(isinstance(each, nn.Conv1d) for each in children) and any(map(is_matrix, children))
