"""What the stranger draws from: models that are none of transformers, and what each setting of a method may be."""

from __future__ import annotations

import collections
import dataclasses
import math
import random
import re
from collections.abc import Callable

import torch
from architectures import ARCHITECTURES
from test_matrix import FAMILIES, ROWS, normal
from torch import nn

from minipeft.methods import METHODS
from minipeft.targets import is_convolution, is_matrix, slots

LENGTH = 6
NEAR = {"float32": 2e-4, "float64": 1e-6}  # some models compute a part in float32 whatever they are in
NO_GRADIENT = {"RWKV": "transformers changes its state in place, outside training also where gradients are wanted"}
STALE = {
    ("Full", "LeViT")
}  # the bare model, too, keeps the attention biases that it read in eval mode, whatever changes
NOT_ALONE = {"LeViT": "the gradients of its batch norms are wrong for one picture by itself, in the bare model too"}
NO_WORDS = {"Gemma-4": "each layer looks the ids up again, and where a vector stands there is none"}
PEFT_SAYS = (  # in an error that is its own
    "incompatible with Mamba-based models",  # of their out_proj and conv1d, whatever the method
    "is invalid for input of size 0",  # of OFT on a linear layer that reads four dimensions
)
PEFT_CANNOT = {  # what PEFT does not compute from a file of its own format: {(method or "", model): why}
    ("", "net, hostile names"): "it asks get_submodule for a module called `type`, and gets the method",
    (
        "",
        "net, attention",
    ): "where no gradient is asked for, nn.TransformerEncoder goes past PEFT's layers on its fast path",
    **dict.fromkeys(
        [(kind, "CPM-Ant") for kind in ("PromptTuning", "PTuning")],
        "it gives embeddings alone, and this model reads ids",
    ),
    **dict.fromkeys(
        [(kind, "VisualBERT") for kind in ("PromptTuning", "PTuning")],
        "it makes the mask one of floating-point numbers, by which this model looks up a token",
    ),
    **dict.fromkeys(
        [(kind, "Gemma-4") for kind in ("PromptTuning", "PTuning")],
        "it gives embeddings alone, of which this model must be able to tell the tokens",
    ),
}


class Logits(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": x}


class Hostile(nn.Module):
    """Modules that are called as methods are, of a dictionary and of themselves."""

    def __init__(self):
        super().__init__()
        for name in ("keys", "items", "pop", "values", "type", "forward", "base", "adapters"):
            setattr(self, name, nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        for layer in self._modules.values():
            x = x + torch.tanh(layer(x))
        return {"logits": x}


class Shared(nn.Module):
    """One layer called twice, one never, one under two names, a weight that two layers hold, statistics of a batch."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.unused = nn.Embedding(20, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 12), "down": nn.Linear(12, 8)}) for _ in "ab")
        self.twice, self.head = nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
        self.other, self.head.weight = self.twice, self.embed.weight

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embed(x)
        for layer in self.layers:
            x = x + layer["down"](torch.relu(layer["up"](self.other(torch.tanh(self.twice(x))))))
        return {"logits": self.head(self.norm(x.transpose(1, 2)).transpose(1, 2))}


class Attends(nn.Module):
    """PyTorch's own attention, alone and in its encoder, and a stack of matrices that is read."""

    def __init__(self, first: bool):
        super().__init__()
        self.zeta = nn.MultiheadAttention(8, 2, batch_first=first)
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=first)
        self.encoder, self.stack = nn.TransformerEncoder(layer, 2), nn.Parameter(torch.randn(3, 8, 8) / 3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.encoder(x + self.zeta(x, x, x, need_weights=False)[0])
        return {"logits": torch.einsum("...i,eoi->...o", x, self.stack)}


def convolves() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4, padding=1),
        nn.Conv2d(8, 6, 1, bias=False), nn.Flatten(2), nn.Conv1d(6, 6, 4, stride=4), nn.GroupNorm(2, 6), nn.Flatten(),
        nn.Linear(96, 5), Logits(),
    )  # fmt: skip


def chain() -> nn.Module:
    named = collections.OrderedDict(keys=nn.Linear(8, 12), items=nn.Tanh(), update=nn.Linear(12, 8))
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    return nn.Sequential(nn.Linear(8, 8), nn.Sequential(named), nn.LayerNorm(8), normed, nn.Linear(8, 3), Logits())


@dataclasses.dataclass(frozen=True)
class Net:
    """A model that is none of transformers, with what its forward reads."""

    make: Callable[[], nn.Module]
    reads: dict[str, torch.Tensor]
    kind = "net"

    def model(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.make().eval()

    def batch(self, *_) -> dict[str, torch.Tensor]:
        return dict(self.reads)


NETS = {
    "net, hostile names": Net(Hostile, {"x": normal(5, 8)}),
    "net, shared": Net(Shared, {"x": torch.arange(ROWS * 6).view(ROWS, 6)}),
    "net, attention": Net(lambda: Attends(True), {"x": normal(5, 8)}),
    "net, attention over dimension 0": Net(lambda: Attends(False), {"x": normal(5, 8).transpose(0, 1)}),
    "net, convolutions": Net(convolves, {"input": normal(3, 8, 8)}),
    "net, chain": Net(chain, {"input": normal(8)}),
}
MODELS = ARCHITECTURES | FAMILIES | NETS

SHORT, TARGETS = (1, 2, 3), ("all-linear",) * 4 + ("attention", "mlp", "some", "some", "one", "part")
RANK, GAMMA, SHARE, YES = (1, 2, 3, 4, 4, 6, 8, 100), (0.5, 2.0, -1.0, 16.0), (0.0, 0.3), (False, True)
PLACES, ACTS = ("houlsby", "pfeiffer", "parallel", "some"), ("relu", "gelu", "tanh", "silu", "identity")
COMMON = dict(rank=RANK, targets=TARGETS, dropout=SHARE)
OPTIONS = {  # what a setting of each method may be; "some", "one" and "part" stand for names of the model's own modules
    "LoRA": COMMON | dict(gamma=GAMMA, rank_stabilized=YES, lr_ratio=(1.0, 4.0), alpha=(1.0, 8.0),
                          init=("kaiming", "gaussian", "orthogonal", "pissa")),
    "AdaLoRA": COMMON | dict(gamma=(0.5, 2.0), alpha=(1.0, 8.0), initial_rank=(1, 3, 6), steps=(9, 30), warmup=(0, 2),
                             final=(0, 3), interval=(1, 2), beta1=(0.5, 0.85), beta2=(0.5, 0.85),
                             orthogonality=(0.0, 0.5), penalty_form=("paper", "peft")),
    "HiRA": COMMON, "MiSS": COMMON, "SHiRA": dict(rank=RANK, targets=TARGETS),
    "OFT": dict(block=(2, 3, 4, 8, 40), transform=("neumann", "exact"), targets=TARGETS),
    "IA3": dict(targets=("some", "one"), feedforward=("some", "one", ())),
    "ProjectedLoRA": dict(rank=RANK, gamma=GAMMA, targets=TARGETS, basis=("random", "top", "bottom")),
    "VeRA": COMMON | dict(rank=(1, 8, 256), d_initial=(0.1, 1.0), projection_seed=(0, 3)),
    "Subspace": dict(dim=(1, 16, 100), projection=("dense", "fastfood"), targets=TARGETS),
    "Masked": dict(share=(0.001, 0.05, 1.0), by=("largest", "smallest", "random"), targets=TARGETS),
    "Full": dict(targets=("parameters", "pattern", None)), "BitFit": dict(targets=("pattern", None)), "Softmax": {},
    "Adapter": dict(bottleneck=(1, 4, 40), placement=PLACES, activation=ACTS, top=(1, 2), share=(1, 2, 3),
                    share_within=YES),
    "Experts": dict(bottleneck=(1, 4), experts=(1, 2, 4), chosen=(1, 2, 3), placement=PLACES, activation=ACTS,
                    top=(1, 2), balance=(0.0, 0.01)),
    "PromptTuning": dict(length=SHORT, init=("vocabulary", "random", [7, 8])),
    "PTuning": dict(length=SHORT, generator=("mlp", "lstm", "task"), hidden=(1, 4)),
    "PrefixTuning": dict(length=SHORT, hidden=(1, 8), init=("random", [7, 8])),
}  # fmt: skip
OPTIONS["DoRA"] = OPTIONS["LoRA"]
DEFAULTS = dict(rank=2, block=4, length=3, bottleneck=4)  # for what is too large for a tiny model by itself
HOSTILE = (None, -1, 0, "nope", math.nan, math.inf, [], ["nope"], True, 1000, 2.5, object(), {"a": 1}, b"x", [None])


def drawn_dtype(rng: random.Random) -> str:
    return rng.choice(["float32"] * 3 + ["float64"] * 2 + ["bfloat16"])


def draw(rng: random.Random, model: nn.Module) -> tuple[str, dict[str, object]]:
    """A method's name and settings: most of them sound, one in fifteen absurd."""
    kind = rng.choice(list(METHODS))
    options = OPTIONS[kind]
    known = {name: DEFAULTS[name] for name in options if name in DEFAULTS}
    settings = known | {name: rng.choice(values) for name, values in options.items() if rng.random() < 0.4}
    if rng.random() < 0.07 and options:
        settings[rng.choice(list(options))] = rng.choice(HOSTILE)
    for name, value in settings.items():
        if isinstance(value, str) and value in ("some", "one", "part", "parameters", "pattern"):
            settings[name] = named(rng, model, value)
    if {"gamma", "alpha"} <= settings.keys() and rng.random() < 0.9:
        settings.pop(rng.choice(["gamma", "alpha"]))
    return kind, settings


def named(rng: random.Random, model: nn.Module, how: str) -> object:
    """Modules of the model by name: two suffixes, a whole path as an expression, a slice; or parameters."""
    if how in ("parameters", "pattern"):
        names = rng.sample([".".join(slot).lstrip(".") for slot, _ in slots(model)], 2)
        return names if how == "parameters" else re.compile(rf".*{re.escape(names[0].split('.')[-2:][0])}.*|{names[1]}")
    wanted = lambda m: is_matrix(m) or is_convolution(m) or "Attention" in type(m).__name__  # noqa: E731
    fit = [path for path, module in model.named_modules() if wanted(module)]
    paths = [path for path in rng.choices(fit, k=2) if path]
    if how == "one":
        return re.compile(re.escape(paths[0]))
    if how == "part":
        return [f"{paths[0]}[{rng.choice(['0:4', '2:', ':3'])}]"]
    return [".".join(path.split(".")[-rng.choice([1, 1, 2, 3]) :]) for path in paths]
