"""Where a method can go: which modules of a model a pattern names, and which is its output layer."""

from __future__ import annotations

import difflib
import itertools
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

Slot = tuple[str, str]  # (path of the module that owns a parameter, the parameter's name there)
Targets = str | re.Pattern | Sequence[str]


def flipped(module: nn.Module) -> bool:
    """Whether the weight is stored (d_in, d_out): GPT-2's Conv1D, and an embedding seen as a map of one-hot rows."""
    return isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"


def is_matrix(module: nn.Module) -> bool:
    """Whether a weight method can sit on the module: a linear layer, a Conv1D or an embedding.

    A mixture's router that is a linear layer by birth gives choices, not W·x.
    """
    conv1d = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    return (isinstance(module, nn.Linear | nn.Embedding) or conv1d) and "Router" not in type(module).__name__


def is_convolution(module: nn.Module) -> bool:
    """Whether it convolves with a kernel that it holds, and nothing else: a matrix over patches (`convolution.py`)."""
    return type(module).forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


def plain_linear(module: nn.Module) -> bool:
    """Whether it computes x·Wᵀ + b from a weight that it holds, and nothing else."""
    return type(module).forward is nn.Linear.forward or type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def packed(module: nn.Module) -> bool:
    """Whether it is a linear layer whose weight is computed from packed bytes, `QuantizedLinear`."""
    return isinstance(module, nn.Linear) and hasattr(module, "layout")


def foreign(module: nn.Module) -> bool:
    """Whether it is a linear layer of which bitsandbytes packed the weight, into bytes that it alone reads."""
    return isinstance(module, nn.Linear) and type(module).__module__.startswith("bitsandbytes")


def slots(model: nn.Module) -> Iterator[tuple[Slot, nn.Parameter]]:
    """Every place that holds a parameter. A tied parameter has several; a module that is used twice is listed once."""
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield (path, name), parameter


def mixtures(model: nn.Module) -> list[str]:
    """The paths of the mixtures of experts: modules that hold "experts" or the "router" that chooses among them."""
    named = (path.rpartition(".") for path, _ in model.named_modules())
    return list(dict.fromkeys(parent for parent, _, name in named if name in ("experts", "router")))


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path, also where it bears the name of a method, as `type` does, which `get_submodule`
    takes for no module."""
    for name in filter(None, path.split(".")):
        model = model._modules[name]
    return model


def numbers(model: nn.Module) -> int:
    """How many parameters the model has: a tied one once, and a packed weight by what it stands for, not its bytes."""
    sizes = {id(p): p.numel() for _, p in slots(model)}
    for module in (module for module in model.modules() if packed(module) or foreign(module)):
        sizes |= {id(p): 0 for name, p in module._parameters.items() if name != "bias"}
        sizes[id(module)] = module.out_features * module.in_features
    return sum(sizes.values())


def head(model: nn.Module) -> list[str]:
    """The paths of the modules that make up the output layer, as far as the model says which they are.

    A transformers language model names it (`get_output_embeddings`); a transformers model with a task head keeps it
    beside its `base_model`, behind other parts that are models themselves (SigLIP's eye), or has a part that names one
    (BLIP). A plain `nn.Module` says nothing, and a bare model has none: [].
    """
    output, beside = _output(model), _beside_base(model)
    if output is None and beside is None:
        output = next((found for part in model.modules() if (found := _output(part)) is not None), None)
    if output is not None:
        return [path for path, module in model.named_modules() if module is output]
    outside = _behind_parts(model) if beside is None else beside
    return [path for path, module in model.named_modules() if path.split(".")[0] in outside and module._parameters]


def _beside_base(model: nn.Module) -> list[str] | None:
    """The names of what stands beside the `base_model`; None without one. An encoder is none: DINOv3 calls it so."""
    inner = getattr(model, getattr(model, "base_model_prefix", "") or "", None)
    if inner is None:
        return None
    if type(inner).__name__.endswith("Encoder"):
        return []
    return [name for name, child in model.named_children() if child is not inner]


def _behind_parts(model: nn.Module) -> list[str]:
    """The names of what stands behind the last part that is a transformers model itself, unless it holds embeddings or
    a stack of layers; [] for a bare model, which transformers calls "…Model"."""
    parts = [hasattr(child, "base_model_prefix") for child in model.children()]
    if not any(parts) or not hasattr(model, "base_model_prefix") or type(model).__name__.endswith("Model"):
        return []
    behind = list(model.named_children())[len(parts) - parts[::-1].index(True) :]
    more = any(isinstance(m, nn.ModuleList | nn.Embedding) for _, child in behind for m in child.modules())
    return [] if more else [name for name, _ in behind]


def _output(model: nn.Module) -> nn.Module | None:
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None


@dataclass(frozen=True)
class Target:
    """Output rows `start:stop` of the matrix at `path`, or of each in a stack of them (E, d_out, d_in).

    `reader`: where no call of `module` computes W·x, the path of the module that reads the parameter for itself.
    """

    path: str
    module: nn.Module
    start: int
    stop: int
    parameter: str = "weight"
    reader: str | None = None

    @property
    def tensor(self) -> torch.Tensor:
        """The parameter, as the module stores it."""
        return getattr(self.module, self.parameter)

    @property
    def width(self) -> int:
        """All output features of the module."""
        return self._shape[0]

    @property
    def d_in(self) -> int:
        return self._shape[1]

    @property
    def _shape(self) -> tuple[int, int]:
        if packed(self.module) or foreign(self.module):  # its weight would have to be computed
            return self.module.out_features, self.module.in_features
        if self.reader is not None:
            rows, columns = self.tensor.shape[-2:]
            return (columns, rows) if getattr(self.module, "is_transposed", False) else (rows, columns)
        rows, columns = self.module.weight.flatten(1).shape  # of a convolution's kernel: output channels, and a patch
        return (columns, rows) if flipped(self.module) else (rows, columns)

    @property
    def d_out(self) -> int:
        return self.stop - self.start

    @property
    def key(self) -> str:
        name = self.path if self.parameter == "weight" else f"{self.path}.{self.parameter}".lstrip(".")
        whole = (self.start, self.stop) == (0, self.width)
        return name if whole else f"{name}[{self.start}:{self.stop}]"


def projections(module: nn.MultiheadAttention) -> list[str]:
    """The parameters by which attention computes queries, keys and values: one, or three of different widths."""
    names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    return [name for name in names if module._parameters.get(name) is not None]


def read(model: nn.Module) -> list[Target]:
    """The matrices that a module reads for itself, calling no layer: the projections of PyTorch's attention, and stacks
    of matrices, one for each expert. All of them are named by the reader, one by its own name."""
    found = []
    for path, module in model.named_modules():
        if type(module).forward is nn.MultiheadAttention.forward:
            found += [Target(path, module, 0, 0, name, path) for name in projections(module)]
            found.append(Target(f"{path}.out_proj".lstrip("."), module.out_proj, 0, 0, reader=path))
        elif not isinstance(module, nn.MultiheadAttention | nn.modules.conv._ConvNd):
            stacks = [name for name, p in module._parameters.items() if p is not None and p.ndim == 3]
            found += [Target(path, module, 0, 0, name, path) for name in stacks]
    return [replace(target, stop=target.width) for target in found]


def resolve(
    model: nn.Module, targets: Targets, convolutions: bool = False, unread: bool = False, reads: bool = False
) -> list[Target]:
    """The matrices that `targets` names, in the model's order. With `convolutions`, those too where they are named, and
    with `reads` what a module reads for itself (`read`); `unread` says that the method never reads a weight, and so may
    sit on what bitsandbytes packed.

    - `"all-linear"`: every linear layer and Conv1D (GPT-2's) but the output layer (where the model says which that is)
      and what chooses among experts;
    - `"attention"`: those of them with "attn" or "attention" in a component of the path;
    - `"mlp"`: the others that belong to a numbered stack of layers;
    - a sequence of dotted suffixes: "q_proj" matches "layers.0.self_attn.q_proj", not "layers.0.xq_proj"; "experts"
      stands for all that these experts read, "experts.down_proj" for one of it;
      "c_attn[0:768]" means output features 0…767 of a fused projection;
    - a compiled regular expression that matches the whole path.

    Raises ValueError when a pattern matches nothing, with near misses for each such pattern, and for a slice that is
    outside its module or overlaps another.
    """
    # The output projection of nn.MultiheadAttention is read, never called: a hook there would silently do nothing.
    silent = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    suits = {p: is_matrix(m) or (convolutions and is_convolution(m)) for p, m in model.named_modules()}
    matrices = {p: m for p, m in model.named_modules() if suits[p] and id(m) not in silent}
    others = read(model) if reads and not isinstance(targets, str) else []
    names = dict.fromkeys(matrices) | {t.key: t for t in others}
    called = {key: (key, t.reader) if t else (key,) for key, t in names.items()}  # what a pattern may name it by
    ranges: dict[str, set[tuple[int, int]]] = {}
    if isinstance(targets, str):
        ranges = {path: {(0, 0)} for path in _shorthand(model, matrices, targets)}
    elif isinstance(targets, re.Pattern):
        ranges = {path: {(0, 0)} for path in names if any(map(targets.fullmatch, called[path]))}
        if not ranges:
            raise ValueError(
                f"The pattern {targets.pattern!r} matches no whole path; {_near_misses(matrices, targets)}."
            )
    elif not isinstance(targets, Iterable):
        raise TypeError(f"targets is {targets!r}; it takes \"all-linear\" and the like, or a list such as ['q_proj'].")
    else:
        missed = []
        for pattern in targets:
            triple = isinstance(pattern, tuple) and len(pattern) == 3  # (path, start, stop) names one place exactly
            suffix, start, stop = pattern if triple else _parse(pattern)
            ends = "" if triple else "."
            fits = lambda name: name == suffix or (ends and name.endswith(ends + suffix))  # noqa: E731, B023
            found = [path for path in names if any(map(fits, called[path] if ends and not stop else (path,)))]
            missed += [] if found else [f"{suffix!r} ({_near_misses(names, suffix, model)})"]
            for path in found:
                ranges.setdefault(path, set()).add((start, stop))
        if missed or not ranges:
            raise ValueError(f"Nothing was attached, because no layer matches {'; '.join(missed) or 'an empty list'}.")
    if not unread and (few := next((path for path in ranges if not names[path] and foreign(matrices[path])), None)):
        raise ValueError(
            f"{few!r} is packed by bitsandbytes, over which LoRA alone works; use mp.quantize(model) instead."
        )
    every = {path: names[path] or Target(path, matrices[path], 0, 0) for path in names if path in ranges}
    return [target for path, whole in every.items() for target in _cut(whole, ranges[path])]


def _shorthand(model: nn.Module, matrices: dict[str, nn.Module], name: str) -> list[str]:
    if name not in ("all-linear", "attention", "mlp"):
        raise ValueError(f'targets={name!r} is not "all-linear", "attention" or "mlp"; for suffixes write [{name!r}].')
    outputs = set(head(model)) | set(_gates(model, matrices))
    paths = [p for p, m in matrices.items() if is_matrix(m) and p not in outputs and not isinstance(m, nn.Embedding)]
    attention = [p for p in paths if re.search(r"attn|attention", p, re.IGNORECASE)]
    stack = [p for p in paths if p not in attention and re.search(r"(^|\.)\d+(\.|$)", p)]
    found = {"all-linear": paths, "attention": attention, "mlp": stack}[name]
    if not found:
        raise ValueError(f"targets={name!r} matches nothing in {type(model).__name__}; {_near_misses(matrices, name)}.")
    inside = tuple(f"{path}." if path else "" for path in mixtures(model))
    fused = [path for (path, _), p in slots(model) if inside and p.ndim == 3 and path.startswith(inside)]
    if fused and name != "attention":
        share = sum(p.numel() for (path, _), p in slots(model) if path in fused) / numbers(model)
        warnings.warn(
            f"targets={name!r} does not reach {100 * share:.0f} % of the weights: the experts of {fused[0]!r} lie in "
            "three-dimensional parameters, not in linear layers; LoRA reaches them by name, as "
            f"{fused[0].rpartition('.')[2]!r}.",
            stacklevel=5,
        )
    return found


def _gates(model: nn.Module, matrices: dict[str, nn.Module]) -> list[str]:
    """The layers by which a mixture chooses its experts, or Gemma-3n's AltUp mixes its few streams, and layers of a
    transformers model with a single output."""
    inside = tuple(f"{path}." if path else "" for path in mixtures(model))
    chooses = re.compile(r".*(router|gate)(\.\w+)?", re.IGNORECASE)
    single = [p for p, m in matrices.items() if hasattr(model, "config") and Target(p, m, 0, 0).width == 1]
    mixes = tuple(f"{path}." for path, module in model.named_modules() if type(module).__name__.endswith("AltUp"))
    return [p for p in matrices if (p.startswith(inside) and chooses.fullmatch(p)) or p.startswith(mixes)] + single


def _parse(pattern: str) -> tuple[str, int, int]:
    """("c_attn", 0, 768) from "c_attn[0:768]"; a stop of 0 means the end."""
    if not isinstance(pattern, str):
        raise TypeError(f"A target is a dotted suffix such as 'q_proj', not the {type(pattern).__name__} {pattern!r}.")
    match = re.fullmatch(r"(.+?)(?:\[(\d*):(\d*)\])?", pattern)
    if match is None or re.search(r"[\[\]]", match[1]) or match[3] == "0":
        raise ValueError(f"The target {pattern!r} is neither a suffix ('c_attn') nor a slice of one ('c_attn[0:768]').")
    return match[1], int(match[2] or 0), int(match[3] or 0)


def exact(place: str) -> tuple[str, int, int]:
    """(path, start, stop), a target that names one place and no other that ends alike; a stop of 0 is the end."""
    match = re.fullmatch(r"(.+?)(?:\[(\d{1,9}):(\d{1,9})\])?", place)
    return match[1], int(match[2] or 0), int(match[3] or 0)


def _cut(whole: Target, ranges: set[tuple[int, int]]) -> list[Target]:
    path, module, width = whole.path, whole.module, whole.width
    if not foreign(module) and not torch.is_floating_point(whole.tensor):
        raise ValueError(f"{path!r} holds {whole.tensor.dtype} weights; a target needs floating-point weights.")
    if isinstance(module, nn.Embedding) and type(module).forward is not nn.Embedding.forward:
        raise ValueError(f"{path!r} is a {type(module).__name__} with a forward of its own; only nn.Embedding works.")
    stack = whole.reader is not None and whole.tensor.ndim == 3
    if (is_convolution(module) or stack) and ranges != {(0, 0)}:
        what = "a stack of experts" if stack else "a convolution"
        raise ValueError(f"{path!r} is {what}, of which no part can be named; leave the brackets out.")
    cuts = sorted({(start, stop or width) for start, stop in ranges})
    for start, stop in cuts:
        if not start < stop <= width:
            raise ValueError(f"The slice [{start}:{stop}] is outside {path!r}, which has output features 0 to {width}.")
    for (a, b), (c, d) in itertools.pairwise(cuts):
        if c < b:
            raise ValueError(f"The slices [{a}:{b}] and [{c}:{d}] of {path!r} overlap; give each row to one target.")
    return [replace(whole, start=start, stop=stop) for start, stop in cuts]


def _near_misses(matrices: dict[str, object], pattern: str | re.Pattern, model: nn.Module | None = None) -> str:
    """What the pattern could have meant: other kinds of module by that name, else the most similar suffixes."""
    if model is not None:
        found = {type(m).__name__ for p, m in model.named_modules() if p and f".{p}".endswith(f".{pattern}")}
        if found:
            return f"it names {', '.join(sorted(found))}, not a linear, Conv1D or embedding layer to adapt"
    if isinstance(pattern, re.Pattern):
        return f"paths look like {', '.join(list(matrices)[:3]) or 'nothing: the model has no linear layer'}"
    parts = [path.split(".") for path in matrices]
    suffixes = dict.fromkeys(".".join(p[-n:]) for p in parts for n in range(1, len(p) + 1))
    near = difflib.get_close_matches(pattern, suffixes, n=3) or list(dict.fromkeys(p[-1] for p in parts))[:12]
    return f"there is {', '.join(near) or 'no linear layer at all'}"
