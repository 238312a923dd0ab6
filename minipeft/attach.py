"""The one mechanism: `attach(model, method) -> Tuned`.

Every method in this package is a recipe for *layers*: small modules that hold the trainable numbers. Three things carry
them into a model, and none touches its module tree or the names in its `state_dict`:

- a **hook**: a `Seat` on a module of the base changes its output by the layers that sit there (LoRA, adapters);
- a **front**: what stands before the tokens, as embeddings or as keys and values (prompts, prefixes; see `front.py`);
- a **pointer swap**: a `Selected` layer holds a trainable copy of one parameter, and the owner's pointer is moved to
  the copy (full fine-tuning, BitFit, softmax tuning). Merged weights are installed the same way.

The original tensors are never written to. `disabled()`, `unmerge()` and `detach()` only move pointers back, so they
return the base bit for bit.
"""

from __future__ import annotations

import contextlib
import math
import threading
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from minipeft.build import Count, build, carries_adapters, check_name, claimed_twice, slashed
from minipeft.calls import unheard
from minipeft.front import Front, front, generating
from minipeft.hook import Seat, State, check_rows, copies, reading_seat, remove_hooks, rows_of, seat_on
from minipeft.layer import Layer, Method, WeightLayer
from minipeft.merging import broken_ties, installed, merged, unrounded
from minipeft.stand_in import StandIn, mark, stand_in_for, unmark, without_base
from minipeft.steps import Along, listen
from minipeft.targets import Slot, module_at, numbers, slots


def attach(model: nn.Module, method: Method | Sequence[Method], name: str = "default", seed: int = 0) -> Tuned:
    """Freezes `model`, adds what `method` trains, and returns a `Tuned` that stands in for the model.

    `method` may be a sequence, such as `[LoRA(rank=8), Softmax()]`: all of it becomes one adapter. The random numbers
    are drawn on the CPU, in path order, from a generator of their own: one seed gives one initialisation on any device,
    and the global generator is left alone. On the meta device nothing is drawn.

    All or nothing: ValueError or TypeError leaves the model as it was.
    """
    if isinstance(model, Tuned) or (isinstance(model, nn.Module) and carries_adapters(model)):
        raise ValueError("This model already carries adapters; use tuned.add(name, method), or tuned.detach() first.")
    methods, layers = build(model, method, seed)
    return wrap(model, name, methods, layers)


def wrap(model: nn.Module, name: str, methods: tuple[Method, ...], layers: dict[str, Layer]) -> Tuned:
    check_name(name, ())
    tuned = stand_in_for(Tuned, type(model))(model)
    tuned.seat(name, methods, layers)
    tuned.use(name)
    return tuned


class Tuned(StandIn):
    """A frozen base with one or more named adapters; it behaves like the base (attributes fall through to it).

    `adapters`: {name: {path with "/" for ".": layer}}; `base`: the model itself; `methods`: {name: methods}.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.base = base
        self.methods: dict[str, tuple[Method, ...]] = {}
        self._state = State()
        self._seats: dict[tuple[str, bool], Seat] = {}  # by path, and whether weights are changed there
        self._front: Front | None = None
        self._originals: dict[Slot, nn.Parameter] = {}  # what the installed pointers replaced
        self._merged: dict[Slot, nn.Parameter] | None = None
        self._disabled = False
        self._brings = True  # the penalty, along with the model's own loss
        self.told = False  # of the last optimizer step, by the optimizer itself
        self._required = {slot: p.requires_grad for slot, p in slots(base)}
        self.training = base.training
        self.register_load_state_dict_post_hook(without_base)
        base.requires_grad_(False)
        mark(base)

    # -- calling -----------------------------------------------------------------------------------------------------
    def forward(self, *args, adapters: Sequence[str | None] | None = None, **kwargs):
        """The base's forward; `adapters` gives each row of the batch its own adapter, None meaning the bare base."""
        if adapters is None:
            output = self.base(*args, **kwargs)
            if self._brings and torch.is_grad_enabled() and getattr(output, "loss", None) is not None:
                output.loss = self.along(output.loss)
            return output
        with self._per_row(adapters, args, kwargs):
            return self.base(*args, **kwargs)

    def generate(self, *args, adapters: Sequence[str | None] | None = None, **kwargs):
        """The base's generate, with the same `adapters`: one for each prompt, however many beams or samples."""
        if adapters is None:
            chosen = generating(self.base, self._front)
        else:
            chosen = self._per_row(adapters, args, kwargs, copies(self.base, kwargs))
        with chosen:
            return self.base.generate(*args, **kwargs)

    # -- adapters -----------------------------------------------------------------------------------------------------
    def add(self, name: str, method: Method | Sequence[Method], seed: int = 0) -> None:
        """Adds another adapter, inactive until `use(name)`. Raises like `attach`, and if the name is in use."""
        self.check_open("add")
        check_name(name, list(self.adapters))
        with self.disabled():
            methods, layers = build(self.base, method, seed)
        self.seat(name, methods, layers)

    def seat(self, name: str, methods: tuple[Method, ...], layers: dict[str, Layer]) -> None:
        """Puts built layers under a free name, inactive."""
        self.adapters[name] = nn.ModuleDict({slashed(key): layer for key, layer in layers.items()})
        self.adapters[name].train(self.training).requires_grad_(False)
        self.methods[name] = methods
        for layer in layers.values():
            if layer.front:
                self._front = self._front or front(self.base, self._state)
                self._front.layers.setdefault(name, []).append(layer)
            if layer.reader is not None:
                if (layer.reader, True) not in self._seats:
                    self._seats[layer.reader, True] = reading_seat(self.base, layer.reader, self._state)
                self._seats[layer.reader, True].layers.setdefault(name, []).append((layer, None))
            for path, after in layer.seats().items():
                weight = isinstance(layer, WeightLayer)
                if (path, weight) not in self._seats:
                    self._seats[path, weight] = seat_on(self.base, path, weight, self._state)
                self._seats[path, weight].layers.setdefault(name, []).append((layer, after))

    def use(self, *names: str | Mapping[str, float]) -> None:
        """Activates these adapters, together if several (their changes add up), and only them; none is the bare base.

        `use({"pirate": 0.7, "happy": 0.3})` adds that much of each change: W' = W + 0.7·ΔW₁ + 0.3·ΔW₂. Only the active
        adapters' parameters require gradients. Raises ValueError for an unknown name, for two adapters that both
        replace one parameter, and for a weight that is no number or that an adapter cannot have.
        """
        self.check_open("use")
        if any(isinstance(each, list | tuple | set) for each in names):
            raise TypeError(
                f'use takes names one by one, as in use("a", "b"), or one {{name: weight}}, not {names[0]!r}.'
            )
        weights = names[0] if len(names) == 1 and isinstance(names[0], Mapping) else dict.fromkeys(names, 1.0)
        names = self._known(tuple(weights))
        if clash := claimed_twice({name: self.adapters[name].values() for name in names}):
            a, b, slot = clash
            raise ValueError(f"{a!r} and {b!r} both replace {'.'.join(slot)}, so they cannot be active together.")
        for name, weight in weights.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                raise ValueError(f"The weight of {name!r} is {weight!r}; it must be a finite number, such as 0.5.")
            if weight != 1 and any(layer.slots or layer.front for layer in self.adapters[name].values()):
                raise ValueError(f"{name!r} adds no change that could be weighted by {weight:g}; use({name!r}).")
        self._state.active, self._state.weights = names, {n: float(w) for n, w in weights.items() if w != 1}
        for name, layers in self.adapters.items():
            layers.requires_grad_(name in names)
        listen(self)
        self._refresh()

    @contextlib.contextmanager
    def using(self, weights: Mapping[str, float]):
        """Within it, `use(weights)`; afterwards what was active before, as much as it counted then."""
        before = self.weights
        self.use(weights)
        try:
            yield self
        finally:
            self.use(before)

    def delete(self, name: str) -> None:
        """Takes one adapter off; the others stay as they are. ValueError for an unknown name, and when merged."""
        self.check_open("delete")
        (name,) = self._known((name,))
        self.use({other: weight for other, weight in self.weights.items() if other != name})
        del self.adapters[name], self.methods[name]
        for seat in self._seats.values():
            seat.layers.pop(name, None)
        empty = [key for key, seat in self._seats.items() if not seat.layers]
        remove_hooks(self.base, [self._seats.pop(key) for key in empty])
        if self._front and self._front.layers.pop(name, None) and not self._front.layers:
            remove_hooks(self.base, [self._front])
            self._front = None

    @property
    def active(self) -> tuple[str, ...]:
        """The names of the active adapters."""
        return self._state.active

    @property
    def weights(self) -> dict[str, float]:
        """{name: how much of it counts} of the active adapters; 1.0 unless `use` said otherwise."""
        return {name: self._state.weights.get(name, 1.0) for name in self.active}

    @contextlib.contextmanager
    def disabled(self):
        """Within it, the model is the base, bit for bit, as it computes with frozen weights.

        Where gradients are recorded, PyTorch takes another way to the same result for weights that require them.
        """
        before, self._disabled = self._disabled, True
        self._refresh()
        try:
            yield self
        finally:
            self._disabled = before
            self._refresh()

    # -- looking ------------------------------------------------------------------------------------------------------
    def layers(self) -> list[Layer]:
        """The layers of the active adapters, in the model's order for each."""
        return [layer for name in self.active for layer in self.adapters[name].values()]

    @property
    def in_front(self) -> int:
        """How many vectors the active adapters put before the tokens of a text, for which it has fewer positions."""
        return 0 if self._front is None else self._front.count()

    @property
    def originals(self) -> list[nn.Parameter]:
        """The base's own parameters for which a trained copy or a merged weight stands in."""
        return list(self._originals.values())

    def count(self) -> Count:
        """Exact also on the meta device. A trained copy replaces a parameter, so it adds nothing to the total, except
        where it breaks a tie (softmax tuning of a tied head adds V·d)."""
        with self.disabled():
            base = numbers(self.base)
        trained = {id(p): p.numel() for layer in self.layers() for p in layer.parameters() if p.requires_grad}
        return Count(sum(trained.values()), base + sum(layer.added() for layer in self.layers()))

    @torch.no_grad()
    def deltas(self) -> dict[str, torch.Tensor]:
        """{path: ΔW} of the active adapters, summed where several meet; a weight's ΔW has shape (d_out, d_in).

        A changed bias is listed under its own name. A ΔW that depends on W is taken against the W in use: the trained
        copy where another method replaced it.
        """
        result: dict[str, torch.Tensor] = {}

        def add(path: str, delta: torch.Tensor) -> None:
            result[path] = result[path] + delta if path in result else delta

        with self.disabled():
            for layer in (layer for layer in self.layers() if layer.slots):
                add(layer.path, layer.delta())
        with self._unmerged():
            for layer, share in self._shares():
                for name, delta in () if layer.slots else layer.changes().items():
                    add(layer.path if name == "weight" else f"{layer.path}.{name}", share * delta)
        return result

    # -- training -----------------------------------------------------------------------------------------------------
    def penalty(self) -> torch.Tensor | float:
        """What the active methods add to the loss (AdaLoRA's orthogonality, the balance of experts); 0.0 for most.

        In training, the loss that a transformers model returns brings its gradient along, and shows the task's loss
        alone. Where the loss is one's own, made from logits, this must be added to it.
        """
        every = [(method, list(self.adapters[name].values())) for name in self.active for method in self.methods[name]]
        return sum((method.penalty(layers) for method, layers in every), 0.0)

    def along(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss, unchanged, which in training brings the penalty's gradient along on the way back."""
        names = () if self._state.silent else self.active
        methods = [(m, list(self.adapters[name].values())) for name in names for m in self.methods[name]]
        penalty = sum((m.penalty(layers) for m, layers in methods if self.training or m.of_the_call), 0.0)
        # a loss on which nothing that trains has an effect stays one, for the penalty alone teaches nothing
        return Along.apply(loss, penalty) if torch.is_tensor(penalty) and loss.requires_grad else loss

    @contextlib.contextmanager
    def by_itself(self):
        """Within it, the model's loss brings nothing along: for an objective that is made of several, or of none."""
        before, self._brings = self._brings, False
        try:
            yield
        finally:
            self._brings = before

    def stepped(self, step: int | None = None) -> None:
        """An optimizer step was taken, and its gradients are still there: AdaLoRA moves its ranks here.

        In training, torch's optimizers make it known by themselves, and a call right after such a step changes nothing.
        `step` is not needed: the methods count.
        """
        told, self.told = self.told, False
        if not told:
            for name in self.active:
                for method in self.methods[name]:
                    method.stepped(list(self.adapters[name].values()))

    def hears(self) -> bool:
        """Whether an active method does something after an optimizer step."""
        active = (method for name in self.active for method in self.methods[name])
        return any(type(method).stepped is not Method.stepped for method in active)

    # -- merging ------------------------------------------------------------------------------------------------------
    def merge(self) -> dict[str, float]:
        """W' = W + ΔW, computed in float32 and stored in W's dtype, replaces W; the hooks fall silent.

        In bfloat16 the sum is rounded to 8 bits, which swallows a ΔW that is small beside W. Returns how much was lost,
        {path: ‖(W' − W) − ΔW‖ / ‖ΔW‖}, and warns when it is over a tenth ({} for methods that train W itself).
        Raises ValueError when merged already, and for adapters that change no weight.
        """
        self.check_open("merge")
        if not self.active:
            raise ValueError(f"No adapter is active, so there is nothing to merge; use() one of {list(self.adapters)}.")
        self._must_act()
        self._merged, lost = self._merge()
        if ties := self._broken_ties():
            warnings.warn(f"Merging unties {', '.join(ties)} from a weight that stays as it was.", stacklevel=2)
        self._refresh()
        if lost and (worst := max(lost, key=lost.get)) and lost[worst] > 0.1:
            warnings.warn(
                f"Rounding to what the base stores loses {100 * lost[worst]:.0f} % of ΔW at {worst}; keep the adapter "
                "apart, or merge into a float32 copy of the base.",
                stacklevel=2,
            )
        return lost

    def unrounded(self) -> dict[Slot, torch.Tensor]:
        """{(path, name): W'} of each parameter that `merge` would replace, dense and in at least float32; raises like
        `merge`."""
        self.check_open("merge")
        self._must_act()
        with self._unmerged():
            return unrounded(self.base, self._shares())

    def unmerge(self) -> None:
        """Puts the original weights back, bit for bit."""
        if self._merged is None:
            raise ValueError("The adapters are not merged, so there is nothing to unmerge; call merge() first.")
        self._merged = None
        self._refresh()

    def detach(self) -> nn.Module:
        """Takes everything off and returns the base: with merged weights if merged, else as it was before `attach`."""
        self._must_be_attached("detach")
        merged, untied = self._merged or {}, self._broken_ties()
        self._disabled = True
        self._refresh()
        for (path, name), flag in self._required.items():
            owner = module_at(self.base, path)
            owner._parameters[name] = merged.get((path, name), owner._parameters[name]).requires_grad_(flag)
        remove_hooks(self.base, [*self._seats.values(), self._front])
        if untied and hasattr(self.base, "config"):
            self.base.config.tie_word_embeddings = False
        unmark(self.base)
        self.adapters, self.methods, self._seats, self._front, self._merged = nn.ModuleDict(), {}, {}, None, None
        self._state.active = ()
        return self.base

    # -- inside -------------------------------------------------------------------------------------------------------
    def _known(self, names: Sequence[str]) -> tuple[str, ...]:
        for name in names:
            if name not in self.adapters:
                raise ValueError(f"There is no adapter {name!r}; this model carries {list(self.adapters)}.")
        return tuple(dict.fromkeys(names))

    def _shares(self) -> list[tuple[Layer, float]]:
        """The layers of the active adapters, each with the weight that `use` gave its adapter."""
        return [(layer, weight) for name, weight in self.weights.items() for layer in self.adapters[name].values()]

    def _must_act(self) -> None:
        """Raises ValueError for a changed weight whose module is never called: merged, it would begin to count."""
        paths = [layer.path for layer in self.layers() if isinstance(layer, WeightLayer)]
        with self.disabled():
            silent = unheard(self.base, paths)
        if not hasattr(self.base, "main_input_name") and any(seat.acted for seat in self._seats.values()):
            seated = {layer.path: layer.path if layer.reader is None else layer.reader for layer in self.layers()}
            idle = [path for path in paths if not self._seats[seated[path], True].acted]
            silent |= dict.fromkeys(idle, "it was not called, though the model was")
        deltas = self.deltas() if silent else {}
        for path, why in silent.items():
            if deltas[path].any():
                raise ValueError(f"The adapter at {path!r} has no effect, because {why}; merging would give it one.")

    def _must_be_attached(self, verb: str) -> None:
        if not hasattr(self.base, "_tuned"):
            raise ValueError(f"This Tuned is detached, so it cannot {verb}; call attach(model, method) again.")

    def check_open(self, verb: str) -> None:
        """Raises ValueError when detached or merged: `verb` needs the adapters apart from the base."""
        self._must_be_attached(verb)
        if self._merged is not None:
            raise ValueError(f"The adapters {list(self.active)} are merged; call unmerge() before {verb}.")

    def _refresh(self) -> None:
        """Makes the base's pointers agree with what is active, merged and disabled."""
        bare = self._disabled or bool(self._state.rows)
        self._state.silent = self._disabled or self._merged is not None
        for seat in self._seats.values():
            seat.heed()
        merged = self._merged or {slot: layer.value for layer in self.layers() for slot in layer.slots}
        self._originals = installed(self.base, self._originals, {} if bare else merged)

    def check_acting(self, verb: str) -> None:
        """Like `check_open`, and neither disabled nor of weight 0: `verb` needs the adapters at work."""
        self.check_open(verb)
        if self._disabled:
            raise ValueError(f"The adapters are disabled, so {verb} would see the bare base; leave disabled() first.")
        if self.active and not any(self.weights.values()):
            raise ValueError(
                f"{list(self.active)} count with 0, so {verb} would see the bare base; use() them in full."
            )

    @contextlib.contextmanager
    def installed(self, weights: Mapping[Slot, nn.Parameter]):
        """Within it, the base computes with these parameters in these places, and no adapter acts."""
        self.check_open("install weights")
        self._merged = dict(weights)
        self._refresh()
        try:
            yield self
        finally:
            self._merged = None
            self._refresh()

    @contextlib.contextmanager
    def _unmerged(self):
        """Within it, the base's own parameters and the trained copies of the active adapters are in place."""
        before, self._merged, self._disabled = (self._merged, self._disabled), None, False
        self._refresh()
        try:
            yield
        finally:
            self._merged, self._disabled = before
            self._refresh()

    def _merge(self) -> tuple[dict[Slot, nn.Parameter], dict[str, float]]:
        with self._unmerged():
            return merged(self.base, self._shares())

    def _broken_ties(self) -> list[str]:
        """Merged parameters of which another alias in the base stays as it was."""
        with self.disabled():
            return broken_ties(self.base, self._merged or {})

    @contextlib.contextmanager
    def _per_row(self, adapters: Sequence[str | None], args: tuple, kwargs: dict, times: int = 1):
        self.check_open("choosing adapters per row")
        check_rows(self.base, adapters, self.adapters, args, kwargs)
        self._known([name for name in adapters if name is not None])
        self._state.rows[threading.get_ident()] = rows_of(adapters, times)
        self._refresh()
        try:
            yield
        finally:
            del self._state.rows[threading.get_ident()]
            self._refresh()
