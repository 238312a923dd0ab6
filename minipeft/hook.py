"""How a layer acts on a module of the base: a forward hook that changes the module's output, a forward in its place
that computes the changed output in one go, or one that runs the module's own with W + ΔW in W's place."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from minipeft.layer import After, Layer
from minipeft.targets import module_at, plain_linear


class Rows(NamedTuple):
    """A choice per row: the size of the batch, {adapter: its rows}, and the beams or samples that `generate` makes of
    each row, side by side."""

    batch: int
    of: dict[str, torch.Tensor]
    copies: int = 1


def rows_of(adapters: Sequence[str | None], copies: int = 1) -> Rows:
    """The choice that a list with a name, or None for the bare base, for each row makes."""
    names = dict.fromkeys(name for name in adapters if name is not None)
    own = {name: torch.tensor([i for i, each in enumerate(adapters) if each == name]) for name in names}
    return Rows(len(adapters), own, copies)


class State:
    """What all seats of one model look at when called. Plain attributes, so that `torch.compile` guards them."""

    def __init__(self) -> None:
        self.active: tuple[str, ...] = ()
        self.weights: dict[str, float] = {}  # of those active adapters that do not count in full
        self.silent = False  # disabled or merged: the seats add nothing
        self.rows: dict[int, Rows] = {}  # the choice of each thread that is in a call with one

    def chosen(self) -> Rows | None:
        """The choice per row of the call that this thread is in."""
        return self.rows.get(threading.get_ident()) if self.rows else None


def in_part(after: After, weight: float, output: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
    """output + weight·(new output − output), in at least float32, so that little of little is not rounded away."""
    wide = output.to(torch.promote_types(output.dtype, torch.float32))
    return torch.lerp(wide, after(wide, *rest), weight).to(output.dtype)


class Seat:
    """The hook on one module of the base, and what the layers that sit there do to its output: {adapter name: …}."""

    first = False  # whether its hook comes before the others'
    passed = False  # whether PyTorch's encoder layers go past the module on a fast path, unless they see a hook

    def __init__(self, state: State, module: nn.Module):
        self.state = state
        self.module = module
        self.layers: dict[str, list[tuple[Layer, After]]] = {}
        self.acted = False  # whether the module was ever called with an adapter at work

    def heed(self) -> None:
        """A seat that is silent takes off the hook that keeps PyTorch from its fast path, so that the base computes to
        the bit as it would by itself."""
        if self.passed:
            forget(self.module, {id(self)})
            if not self.state.silent:
                self.module.register_forward_hook(self.hook, with_kwargs=True, prepend=self.first)

    def hook(self, module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> torch.Tensor:
        state = self.state
        if state.silent:
            return output
        self.acted = True
        if isinstance(output, tuple):  # a block's output, and what it says beside it
            return self.hook(module, args, kwargs, output[0]), *output[1:]
        x, plain = args[0] if args else next(iter(kwargs.values())), output
        if (rows := state.chosen()) is None:
            for name in state.active:
                weight = state.weights.get(name, 1.0)
                for _, after in self.layers.get(name, ()):
                    output = after(output, x, plain) if weight == 1 else in_part(after, weight, output, x, plain)
            return output
        for did, each in ("got", x), ("gave", output):  # Llama-4's experts give all tokens of all rows as one list
            if each.shape[0] not in (rows.batch, rows.batch * rows.copies):
                raise ValueError(
                    f"adapters= has {rows.batch} entries, but a {type(module).__name__} {did} a batch of "
                    f"{each.shape[0]}; per-row choice works where dimension 0 of what every adapted module reads and "
                    "gives is the batch."
                )
        times = x.shape[0] // rows.batch
        for name, own in rows.of.items():
            own = own if times == 1 else (own[:, None] * times + torch.arange(times)).flatten()
            own = own.to(output.device)
            for _, after in self.layers.get(name, ()):
                output = output.index_copy(0, own, after(output[own], x[own], plain[own]))
        return output

    def unnested(self, encoder: nn.TransformerEncoder, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Before an encoder of PyTorch's is called: given a padding mask alone it may go over to nested tensors, which
        have no gradients and few operations. Given a mask that hides nothing as well, it does not."""
        given = dict(zip(("src", "mask", "src_key_padding_mask", "is_causal"), args, strict=False)) | kwargs
        padding, x = given.get("src_key_padding_mask"), given.get("src")
        if self.state.silent or padding is None or given.get("mask") is not None or x.ndim < 3:
            return None
        length = x.shape[1 if encoder.layers[0].self_attn.batch_first else 0]
        return (), given | {"mask": torch.zeros(length, length, dtype=padding.dtype, device=padding.device)}


class WeightSeat(Seat):
    """The seat of the layers that change the weight of a linear layer. It stands in for the module's own forward, so
    that a layer which is alone there can do without the plain output."""

    def forward(self, *args, **kwargs) -> torch.Tensor:
        state = self.state
        if not (state.silent or state.weights or state.rows):
            names, layers = state.active, self.layers
            here = layers.get(names[0], ()) if len(names) == 1 else [x for name in names for x in layers.get(name, ())]
            x = args[0] if args else next(iter(kwargs.values()))
            if len(here) == 1 and (output := here[0][0].whole(x)) is not None:
                self.acted = True
                return output
        return self.hook(self.module, args, kwargs, type(self.module).forward(self.module, *args, **kwargs))


class ReadingSeat(Seat):
    """The seat of the layers that change what a module reads for itself. It stands in for the module's forward, and
    calls it on a double of the module that holds W + ΔW, rounded to what W is stored in, where the module holds W.

    The module itself is not written to, so calls from several threads do not meet.
    """

    def forward(self, *args, **kwargs) -> object:
        state, module = self.state, self.module
        if not state.silent and state.chosen() is None:
            active = {name: state.weights.get(name, 1.0) for name in state.active}
            shares = ((layer, share) for name, share in active.items() for layer, _ in self.layers.get(name, ()))
            changed: dict[tuple[nn.Module, str], torch.Tensor] = {}
            for layer, share in shares:
                owner = layer.owner[0]
                for name, delta in layer.changes().items():
                    changed[owner, name] = changed.get((owner, name), owner._parameters[name]) + share * delta
            if changed:
                self.acted = True
                module = double(module, changed)
        return type(self.module).forward(module, *args, **kwargs)

    def hook(self, *_) -> None:
        """Does nothing, but without a hook `nn.TransformerEncoderLayer` would not call the module."""


def double(module: nn.Module, changed: Mapping[tuple[nn.Module, str], torch.Tensor]) -> nn.Module:
    """A module that is the same, and shares everything, but for `changed`: {(it or a child, parameter): value}."""
    new = object.__new__(type(module))
    own = {
        name: value.to(module._parameters[name].dtype) for (owner, name), value in changed.items() if owner is module
    }
    rest = {slot: value for slot, value in changed.items() if slot[0] is not module}
    children = {
        name: double(child, rest) for name, child in module._modules.items() if any(child is o for o, _ in rest)
    }
    vars(new).update(vars(module), _parameters=module._parameters | own, _modules=module._modules | children)
    vars(new).pop("forward", None)
    return new


def seat_on(base: nn.Module, path: str, weight: bool, state: State) -> Seat:
    """Puts a seat on the module at `path`. A change of the weight comes first, whatever was attached first: an adapter
    sees what W' gives. A forward that somebody replaced already is left alone, and so is one of which
    `nn.TransformerEncoderLayer` reads the weight without a call, unless it sees a hook."""
    module, read = module_at(base, path), any(above(base, path, nn.TransformerEncoderLayer))
    if weight and plain_linear(module) and "forward" not in vars(module) and not read:
        seat = WeightSeat(state, module)
        module.forward = seat.forward
    else:
        seat = Seat(state, module)
        seat.first, seat.passed = weight, read
        module.register_forward_hook(seat.hook, with_kwargs=True, prepend=weight)
        seat.heed()
    keep_dense(base, path, seat)
    return seat


def above(base: nn.Module, path: str, kind: type[nn.Module]) -> Iterator[nn.Module]:
    """The module at `path` and those around it, as far as they are of this kind."""
    paths = ("", *itertools.accumulate(path.split("."), "{}.{}".format))
    return (module for module in (module_at(base, each) for each in paths) if isinstance(module, kind))


def keep_dense(base: nn.Module, path: str, seat: Seat) -> None:
    for encoder in above(base, path, nn.TransformerEncoder):
        if type(encoder).forward is nn.TransformerEncoder.forward:
            encoder.register_forward_pre_hook(seat.unnested, with_kwargs=True)


def reading_seat(base: nn.Module, path: str, state: State) -> ReadingSeat:
    """Puts a seat on the module at `path`, which reads parameters for itself."""
    module = module_at(base, path)
    seat = ReadingSeat(state, module)
    module.forward = seat.forward
    seat.passed = any(above(base, path, nn.TransformerEncoderLayer))
    seat.heed()
    keep_dense(base, path, seat)
    return seat


def seats(model: nn.Module) -> Iterator[object]:
    """Whatever acts on the modules of the model by a hook, or by a forward that stands in for theirs."""
    for module in model.modules():
        acting = [*module._forward_hooks.values(), *module._forward_pre_hooks.values(), vars(module).get("forward")]
        yield from (act.__self__ for act in acting if hasattr(act, "__self__"))


def check_rows(
    base: nn.Module, adapters: Sequence[str | None], known: Mapping[str, nn.ModuleDict], args: tuple, kwargs: dict
) -> None:
    """Whether `adapters` can choose an adapter for each row of the batch that a call with these arguments has."""
    if base.training and torch.is_grad_enabled() and getattr(base, "is_gradient_checkpointing", False):
        raise ValueError(
            "Gradient checkpointing runs layers again after the call, when the choice per row is forgotten; turn it "
            "off with gradient_checkpointing_disable()."
        )
    if isinstance(adapters, str) or not all(name is None or isinstance(name, str) for name in adapters):
        raise TypeError(f"adapters={adapters!r} is not a list with one adapter name or None per row of the batch.")
    for name in known.keys() & set(adapters):
        layers = list(known[name].values())
        if any(layer.slots or layer.front for layer in layers):
            what = "replaces parameters of" if any(layer.slots for layer in layers) else "puts tokens in front of"
            raise ValueError(f"{name!r} {what} the base, so it cannot be chosen per row; use({name!r}).")
        if reader := next((layer.reader for layer in layers if layer.reader is not None), None):
            raise ValueError(
                f"{name!r} changes what {reader!r} reads for itself, the same for all rows, so it cannot be chosen per "
                f"row; use({name!r})."
            )
    tensors = (v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.ndim)
    batch = len(next(tensors, adapters))
    if batch != len(adapters):
        raise ValueError(
            f"adapters= has {len(adapters)} entries for a batch of {batch}; give one name or None per row."
        )


def copies(base: nn.Module, kwargs: Mapping[str, object]) -> int:
    """How many rows `generate`, called with these arguments, makes of each prompt: its beams or samples."""
    given = kwargs.get("generation_config")
    said = {} if given is None else {name: value for name, value in vars(given).items() if value is not None}
    asked = vars(base.generation_config) | said | kwargs
    return max(asked.get("num_beams") or 1, asked.get("num_return_sequences") or 1)


def forget(module: nn.Module, owners: set[int]) -> None:
    """Takes every hook that is a method of one of `owners`, which are given by id, off this one module."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, hook in hooks.items() if id(getattr(hook, "__self__", None)) in owners]:
            del hooks[key]
            module._forward_hooks_with_kwargs.pop(key, None)
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def remove_hooks(model: nn.Module, owners: Sequence[object]) -> None:
    """Takes every hook and every forward that is a method of one of `owners` off the model."""
    ours = {id(owner) for owner in owners if owner is not None}
    for module in model.modules():
        forget(module, ours)
        if id(getattr(vars(module).get("forward"), "__self__", None)) in ours:
            del module.forward
