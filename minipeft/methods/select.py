"""Training entries that exist already: all of them, the biases, or the output layer.

No new structure: a trainable copy of each chosen parameter takes the original's place, and the original is kept. So
these methods can be switched off, merged and shipped like any other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from minipeft.layer import Layer, Method
from minipeft.targets import Slot, flipped, foreign, head, is_matrix, module_at, packed, slots


class Selected(Layer):
    """`value`: a trainable copy of one parameter, in its dtype. `slots`: every place that points to the copy.

    ΔW = new − old, for a matrix of shape (d_out, d_in).
    """

    def __init__(self, model: nn.Module, group: tuple[Slot, ...], breaks_tie: bool, _: torch.Generator):
        path, name = group[0]
        owner = module_at(model, path)
        original = owner._parameters[name]
        super().__init__(path if name == "weight" and original.ndim > 1 else parameter_name(group[0]))
        self.value = nn.Parameter(original.detach().clone())
        self.slots, self.breaks_tie = group, breaks_tie
        self.owner, self.name = (owner,), name  # in a tuple, so that the base is no submodule of the layer

    def added(self) -> int:
        return self.value.numel() if self.breaks_tie else 0

    def delta(self) -> torch.Tensor:
        old = self.owner[0]._parameters[self.name]
        delta = self.value.detach() - old.detach()
        return delta.T if self.name == "weight" and flipped(self.owner[0]) else delta


def parameter_name(slot: Slot) -> str:
    return ".".join(part for part in slot if part)


def copies(model: nn.Module, chosen: Sequence[Slot]) -> dict[str, Callable[[torch.Generator], Selected]]:
    """One copy for each parameter among the chosen slots, shared by the slots that share the parameter."""
    wanted, groups, every = set(chosen), {}, {}
    for slot, parameter in slots(model):
        every.setdefault(id(parameter), []).append(slot)
        if slot in wanted:
            if not parameter.is_floating_point():
                raise ValueError(f"{parameter_name(slot)!r} holds {parameter.dtype} numbers, which cannot train.")
            if parameter.dtype == torch.float16:
                raise ValueError(
                    f"{parameter_name(slot)!r} is float16, in which Adam's ε is 0 and one step gives NaN; load the "
                    "model in bfloat16 or float32, or train an adapter, whose numbers are float32."
                )
            groups.setdefault(id(parameter), []).append(slot)
    return {
        parameter_name(group[0]): partial(Selected, model, tuple(group), len(group) < len(every[i]))
        for i, group in groups.items()
    }


@dataclass(frozen=True)
class Full(Method):
    """Full fine-tuning: every floating-point parameter trains. Tied weights stay tied: they share one copy.

    `targets` restricts it: a compiled regular expression that matches whole parameter names
    (`re.compile(r"transformer\\.h\\.(22|23)\\..*")` for the last two of 24 blocks), or exact parameter names. A tied
    weight of which only one place is named is untied.

    Raises ValueError, at `attach`, when a name or the expression matches nothing.
    """

    targets: re.Pattern | Sequence[str] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.targets, str):
            raise TypeError(f"targets={self.targets!r} is a string; use re.compile(…), or a list of parameter names.")
        if isinstance(self.targets, list | set):
            object.__setattr__(self, "targets", tuple(self.targets))
        names = isinstance(self.targets, Sequence) and all(isinstance(name, str) for name in self.targets)
        if not (names or self.targets is None or isinstance(self.targets, re.Pattern)):
            raise TypeError(f"targets={self.targets!r} is neither re.compile(…) nor a list of parameter names.")

    def places(self, model: nn.Module) -> dict[str, Callable[[torch.Generator], Selected]]:
        every = {parameter_name(slot): slot for slot, p in slots(model) if p.is_floating_point()}
        few = next((path for path, m in model.named_modules() if packed(m) or foreign(m)), None)
        if self.targets is None and few:
            raise ValueError(
                f"{few!r} is stored in few bits, which have no gradient; attach LoRA, or load it unpacked."
            )
        if isinstance(self.targets, re.Pattern):
            chosen = [name for name in every if self.targets.fullmatch(name)]
        else:
            chosen = list(every) if self.targets is None else list(self.targets)
        missing = [name for name in chosen if name not in every]
        if missing or not chosen:
            what = ", ".join(map(repr, missing)) or (repr(self.targets.pattern) if self.targets else "everything")
            raise ValueError(
                f"No floating-point parameter of {type(model).__name__} matches {what}; "
                f"names look like {', '.join(list(every)[:3]) or 'nothing: it has none'}."
            )
        return copies(model, [every[name] for name in chosen])


@dataclass(frozen=True)
class BitFit(Method):
    """Train the biases only (Ben Zaken et al. 2022, "BitFit", §3): y = W·x + b with W frozen and b trained.

    Every parameter called `bias` of a linear layer, a Conv1D or a norm; a block of BERT has 11·d of them.
    `targets`: a compiled regular expression that the path of the *module* must match as a whole.

    Raises ValueError, at `attach`, when there are none: many recent language models have no biases.
    """

    targets: re.Pattern | None = None

    def __post_init__(self) -> None:
        if self.targets is not None and not isinstance(self.targets, re.Pattern):
            raise TypeError(f"targets={self.targets!r} is not a compiled regular expression; use re.compile(…).")

    def places(self, model: nn.Module) -> dict[str, Callable[[torch.Generator], Selected]]:
        modules = dict(model.named_modules())
        biases = {id(p) for (path, name), p in slots(model) if name == "bias" and self._wants(path, modules[path])}
        if not biases:
            where = f" at {self.targets.pattern!r}" if self.targets else ""
            raise ValueError(
                f"{type(model).__name__} has no biases in linear and norm layers{where}; use LoRA, or another pattern."
            )
        return copies(model, [slot for slot, p in slots(model) if id(p) in biases])

    def _wants(self, path: str, module: nn.Module) -> bool:
        norm = re.search("norm", type(module).__name__, re.IGNORECASE)
        return bool((is_matrix(module) or norm) and (self.targets is None or self.targets.fullmatch(path)))


@dataclass(frozen=True)
class Softmax(Method):
    """Softmax tuning: train the output layer only, p(y|x) = softmax(W·h + b).

    The output layer is what `get_output_embeddings()` of a transformers language model gives; else everything beside
    the `base_model` (`classifier`, `score`); in a plain `nn.Module`, the last `nn.Linear`.

    In many language models the output weight *is* the input embedding ("tied"). Training it in both places would change
    every token's input as well, so only the output's pointer moves: the embedding stays frozen and the model now has
    V·d more numbers, which `count()` includes. After `merge()` and `detach()` the two are no longer tied.

    Raises ValueError, at `attach`, when the model has no output layer.
    """

    def places(self, model: nn.Module) -> dict[str, Callable[[torch.Generator], Selected]]:
        modules = dict(model.named_modules())
        paths = head(model)
        if not paths and not hasattr(model, "base_model_prefix"):
            paths = [path for path, module in modules.items() if isinstance(module, nn.Linear)][-1:]
        own = {id(p) for (path, _), p in slots(model) if path in paths}
        chosen = [s for s, p in slots(model) if id(p) in own and not isinstance(modules[s[0]], nn.Embedding)]
        if not chosen:
            raise ValueError(f"{type(model).__name__} has no output layer; load the model with a head, or use Full().")
        return copies(model, chosen)
