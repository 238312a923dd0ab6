"""What a method author reads: a `Method` says where its layers go, a `Layer` holds the trainable numbers of one place.

The path of a call through a module of the base that a layer has a seat on:

    x ──▶ module of the base, frozen ──▶ plain ──▶ Seat.hook ──▶ Layer.after(output, x, plain) ──▶ new output
                                                                  │  a WeightLayer's asks for
                                                                  └─ extra(x, plain)  (…, d_out), which asks for
                                                                      └─ forward(x)   (…, d_out): you write this

A WeightLayer that is alone on a linear layer may go a shorter way, x ──▶ whole(x) ──▶ new output, to the same numbers.

`attach` freezes the base, seats the layers and switches them (`attach.py`, `hook.py`). A method that changes a weight
subclasses `WeightLayer` and writes two things: `forward(x)`, the extra output, and `delta()`, ΔW. Merging, spectra,
counting and saving follow from them. `docs/add_a_method.md` goes through it step by step.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from minipeft.targets import Slot, Target, flipped

After = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # (output, x, plain) -> output


PEFT_NAMES = {
    "r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "targets",
    "target_parameters": "targets", "use_rslora": "rank_stabilized", "init_lora_weights": "init",
    "num_virtual_tokens": "length", "target_r": "rank", "init_r": "initial_rank",
    "feedforward_modules": "feedforward", "oft_block_size": "block", "encoder_hidden_size": "hidden",
}  # fmt: skip


class Method:
    """A frozen dataclass that says *what to train*; `attach` does it.

    `examples`: settings that fit even a tiny model; the tests try the method with each of them.
    `formula`: how many numbers a target takes, in Python, of d_in, d_out and the settings; "" where no formula says it.
    `of_the_call`: whether the penalty is about the call that was made; it then comes along outside training, too.
    """

    def __new__(cls, *_, **settings: object):
        """A setting by another name is told about the right one, PEFT's names too."""
        if unknown := [name for name in settings if name not in cls.__dataclass_fields__]:
            known = [name for name in cls.__dataclass_fields__ if name != "_"]
            meant = PEFT_NAMES.get(unknown[0]) or next(iter(difflib.get_close_matches(unknown[0], known)), None)
            hint = f"{unknown[0]!r} is {meant} here" if meant in known else f"there is {', '.join(known) or 'none'}"
            raise TypeError(f"{cls.__name__} has no setting {unknown[0]!r}; {hint}.")
        return super().__new__(cls)

    examples: tuple[dict[str, object], ...] = ({},)
    formula: str = ""
    of_the_call: bool = False

    def places(self, model: nn.Module) -> dict[str, Callable[[torch.Generator], Layer]]:
        """Says where layers go, as {key: maker}; raises ValueError, with the model untouched, when they cannot.

        A key is a dotted path. A maker draws its random numbers from the generator that it is given, and only there.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say where its layers go")

    def penalty(self, layers: Sequence[Layer]) -> torch.Tensor | float:
        """What the method adds to the loss; `layers` are all layers of the adapter, of this method or not."""
        return 0.0

    def stepped(self, layers: Sequence[Layer]) -> None:
        """Called after each optimizer step, while the gradients of that step are still there."""


class Layer(nn.Module):
    """The trainable numbers of one adapter in one place. `path` names the place in `Tuned.deltas()`."""

    slots: tuple[Slot, ...] = ()  # the parameters that this layer replaces; () for a layer that works through a hook
    reader: str | None = None  # the path of a module that computes with W + ΔW itself, so that there is nothing to hook
    front: str | None = None  # "prompt" or "prefix": the layer stands before the tokens, see `front.py`

    def __init__(self, path: str):
        super().__init__()
        self.path = path

    def seats(self) -> dict[str, After]:
        """{path of a module: what gives its new output, called with the output so far, the module's first input, and
        its plain output, before any layer of this kind}."""
        return {}

    def added(self) -> int:
        """How many numbers the model has more than before."""
        return sum(p.numel() for p in self.parameters())

    def delta(self) -> torch.Tensor:
        """ΔW, of shape (d_out, d_in), against the weight that is in place when `Tuned` calls it."""
        raise ValueError(
            f"{type(self).__name__} at {self.path!r} changes no weight, so there is no ΔW to merge or show."
        )

    def changes(self) -> dict[str, torch.Tensor]:
        """{name of a parameter of the module: its change}, a weight's of shape (width of the module, d_in)."""
        return {"weight": self.delta()}

    def rates(self) -> list[tuple[nn.Parameter, float]]:
        """The parameters that train at another learning rate than the rest, each with its factor."""
        return []

    def reached(self) -> bool:
        """Whether the gradient of the loss has come here, after a backward pass."""
        return any(p.grad is not None for p in self.parameters())

    def stored(self) -> dict[str, torch.Tensor]:
        """{end of the key: numbers} in an adapter file; see `minipeft.files`."""
        raise ValueError(f"A {type(self).__name__} has no file format, so it cannot be saved.")

    def restore(self, numbers: dict[str, torch.Tensor]) -> None:
        """Takes over what `stored` gave; names and shapes are checked already."""
        for key, mine in self.stored().items():
            mine.data.copy_(numbers[key])


class WeightLayer(Layer):
    """A layer that adds ΔW to the weight of `target`: provide `forward(x)`, the extra output, and `delta()`.

    Both speak about the target's own rows only: shapes (…, d_out) and (d_out, d_in), where d_out is the length of the
    slice if the target is a slice of a fused projection. Padding to the module's full width happens here. A layer whose
    extra output needs the bare module's (DoRA, IA3) overrides `extra` instead of `forward`.

    `place`: dtype and device of what trains, float32 (float64 over a float64 base) where the weight is.
    """

    def __init__(self, target: Target):
        super().__init__(target.path)
        self.key, self.parameter, self.reader = target.key, target.parameter, target.reader
        self.rows = slice(target.start, target.stop)
        self.padding = (target.start, target.width - target.stop)
        self.owner = (target.module,)  # in a tuple, so that the base is no submodule of the layer

    @staticmethod
    def place(target: Target) -> dict[str, object]:
        weight = target.tensor
        return {"dtype": torch.promote_types(weight.dtype, torch.float32), "device": weight.device}

    def seats(self) -> dict[str, After]:
        return {self.path: self.after} if self.reader is None else {}

    @property
    def weight(self) -> torch.Tensor:
        """The target's own rows of the weight that is in place, (d_out, d_in)."""
        weight = getattr(self.owner[0], self.parameter)
        return (weight.T if flipped(self.owner[0]) else weight.flatten(1))[self.rows]

    def extra(self, x: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
        """What the target's own rows get added; `plain` is the bare module's output, in full width."""
        return self(x)

    def after(self, output: torch.Tensor, x: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
        extra = self.extra(x, plain)
        extra = F.pad(extra, self.padding) if any(self.padding) else extra
        return (output + extra).to(output.dtype)

    def bare(self, x: torch.Tensor) -> torch.Tensor:
        """The plain output for another x."""
        return type(self.owner[0]).forward(self.owner[0], x)

    def whole(self, x: torch.Tensor) -> torch.Tensor | None:
        """The module's new output without its plain one, where that is quicker; None: `after` it is."""
        return None

    def __init_subclass__(cls, **kwargs):
        """Whoever changes what a layer adds does not inherit a `whole` that computes something else."""
        super().__init_subclass__(**kwargs)
        if vars(cls).keys() & {"forward", "extra", "after"} and "whole" not in vars(cls):
            cls.whole = WeightLayer.whole

    def changes(self) -> dict[str, torch.Tensor]:
        return {self.parameter: F.pad(self.delta(), (0, 0, *self.padding))}  # zero rows outside the slice
