"""What is asked of every answer beside its result: each promise is looked at in every case that does not do without.

"again"     a second call with the same arguments gives the same
"modes"     the grad mode, the default type and the seed stay as they were (a new layer may draw from it)
"memory"    no number of the result lies in an argument's memory, or stands for several; a second call writes elsewhere
"gradient"  what comes out is the gradient that reaches each tensor, instead of the result
"strided"   the tensors are slices of larger ones, which are not contiguous
"changed"   what comes out is that of a second call, before which the tensors got other numbers in place
"rehearsed" the answer is called with its very arguments before, while these hold something else
"no_grad"   it is called while gradients are switched off
"products"  what comes out is how many multiply-adds its matrix products take, instead of the result

Whatever is promised, an argument's `requires_grad` stays as it was.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from minipeft.course.drives.plain import MANY, plain


class NotKept(Exception):
    """A promise that an answer does not keep; the text says which, in a sentence."""


def look(act: Callable, objects: tuple, asked: list[str], given: tuple, keywords: dict):
    """What `act(*objects, *given, **keywords)` returns, having looked at what is asked. NotKept says what is not."""
    if "strided" in asked:
        given = tuple(replaced(given, scattered))
    if "gradient" in asked:
        return slopes(act, objects, given)
    if "products" in asked:
        with FlopCounterMode(display=False) as counter:
            listed(act(*objects, *given, **keywords))
        return counter.get_total_flops() // 2
    if "no_grad" in asked:
        with torch.no_grad():
            return look(act, objects, [each for each in asked if each != "no_grad"], given, keywords)
    if "changed" in asked:
        given = tuple(replaced(given, torch.clone))
        act(*objects, *given, **keywords)
        for tensor in tensors(given):
            tensor.copy_(turned(tensor))
    if "rehearsed" in asked:
        objects = (*objects[:-1], rehearsed(objects[-1]))
    fresh = copy.deepcopy((given, keywords))
    modes, flags = state_of_torch(), [t.requires_grad for t in tensors(given)]
    value = plain(listed(act(*objects, *given, **keywords)))
    if "modes" in asked:
        for what, before, after in zip(MODES, modes, state_of_torch(), strict=True):
            if not same(before, after):
                restore(modes)
                raise NotKept(f"It leaves {what} changed: put it back, or do not touch it.")
    if flags != [t.requires_grad for t in tensors(given)]:
        raise NotKept("It changes requires_grad of an argument: take `detach()` of it, and change that.")
    if "memory" in asked:
        owned(value, given)
    if "again" in asked:
        kept = replaced(value, lambda tensor: tensor.detach().clone())
        second = plain(listed(act(*objects, *fresh[0], **fresh[1])))
        if not same(second, kept):
            raise NotKept(
                "A second call with the same arguments gives something else: does it remember the first, or draw "
                "random numbers that the arguments do not decide?"
            )
        if "memory" in asked and overlap([*tensors(value), *tensors(second)]):
            raise NotKept(OVERWRITTEN)
        return kept
    return value


def listed(value):
    """Generators run dry, so they are read once, and not without end."""
    return list(islice(value, MANY + 1)) if isinstance(value, Iterator | range) else value


# ---------------------------------------------------------------------------------------------------------------------
# The state of torch
# ---------------------------------------------------------------------------------------------------------------------
MODES = ("the grad mode", "the default type", "the seed of torch's random numbers")


def state_of_torch() -> tuple:
    grad = torch.is_grad_enabled()
    return grad, torch.get_default_dtype(), torch.initial_seed()


def restore(modes: tuple) -> None:
    torch.set_grad_enabled(modes[0])
    torch.set_default_dtype(modes[1])


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------
def tensors(value) -> Iterator[torch.Tensor]:
    """Every tensor in lists, tuples and dictionaries; numpy's arrays too."""
    if isinstance(value, torch.Tensor):
        yield value
    elif type(value).__module__ == "numpy" and getattr(value, "ndim", 0):
        yield torch.as_tensor(value)
    elif isinstance(value, nn.Module):
        yield from value.parameters()
        yield from value.buffers()
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from tensors(each)


def owned(value, given: tuple) -> None:
    theirs = {t.untyped_storage().data_ptr() for t in tensors(given) if t.numel()}
    for each in tensors(value):
        if each.layout is not torch.strided or not each.numel():
            continue
        if each.untyped_storage().data_ptr() in theirs:
            raise NotKept("The result is a view into an argument's memory, so changing one changes the other: copy it.")
    if overlap(tensors(value)):
        raise NotKept(SHARED)


SHARED = "Several numbers of the result share one place in memory (expand, views): make them numbers of their own."
OVERWRITTEN = "A second call returns tensors in the memory of the first's: make new ones in each call."


def overlap(several: Iterable[torch.Tensor]) -> bool:
    """Whether any place in memory stands for two numbers of these tensors, within one or in two of them."""
    taken: dict[int, list[torch.Tensor]] = {}
    for each in several:
        if each.layout is torch.strided and each.numel():
            places = torch.zeros(1, dtype=torch.long)
            for size, step in zip(each.shape, each.stride(), strict=True):
                places = (places[:, None] + step * torch.arange(size)).flatten()
            start = each.data_ptr() - each.untyped_storage().data_ptr()
            taken.setdefault(each.untyped_storage().data_ptr(), []).append(start + each.element_size() * places)
    together = (torch.cat(several) for several in taken.values())
    return any(len(places.unique()) < len(places) for places in together)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients
# ---------------------------------------------------------------------------------------------------------------------
def slopes(act: Callable, objects: tuple, given: tuple) -> dict:
    """{argument: gradient that reaches it from Σ weight · result}; zeros where nothing reaches it."""
    leaves: dict[str, torch.Tensor] = {}

    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        own = nn.Parameter(tensor.detach().clone())
        leaves[str(len(leaves))] = own
        return own

    value = listed(act(*objects, *replaced(given, leaf)))
    total = 0
    for each in tensors(value):
        if each.is_floating_point() and each.requires_grad:
            total = total + (each.double() * weights(each)).sum()
    if not isinstance(total, torch.Tensor):
        return {name: torch.zeros_like(own) for name, own in leaves.items()}
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(own) if slope is None else slope
        for (name, own), slope in zip(leaves.items(), found, strict=True)
    }


def weights(tensor: torch.Tensor) -> torch.Tensor:
    """Whole numbers from −4 to 4 that follow no axis, so that their sums are exact in bfloat16 too."""
    return (4 * torch.cos(torch.arange(tensor.numel(), dtype=torch.float64) * math.e)).round().view(tensor.shape)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------
def replaced(value, change: Callable[[torch.Tensor], torch.Tensor]):
    """The same lists, tuples and dictionaries with other tensors in them, and with texts and numbers made anew."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {replaced(k, change): replaced(v, change) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return (list if isinstance(value, list) else tuple)(replaced(v, change) for v in value)
    if type(value) in (str, int, float):
        return "".join(list(value)) if isinstance(value, str) else type(value)(repr(value))
    if type(value).__module__ == "numpy" and getattr(value, "ndim", 0):
        return value.copy()
    return value


def rehearsed(function: Callable) -> Callable:
    """The same function, called with its very arguments before: while tensors hold other numbers, and lists and
    dictionaries fewer entries, then in another order."""

    def last(*args, **keywords):
        for numbers, entries in ((grown, lambda several: several[: len(several) // 2]), (turned, reversed)):
            undo = list(disturbed((args, keywords), numbers, entries))
            try:
                with torch.random.fork_rng(devices=[]):
                    listed(function(*args, **keywords))
            except TimeoutError:
                raise
            except Exception:  # what they hold meanwhile may make no sense
                pass
            finally:
                for back in undo:
                    back()
        return function(*args, **keywords)

    return last


def disturbed(value, numbers: Callable, entries: Callable) -> Iterator[Callable[[], None]]:
    """Changes what these objects hold, in place, and gives what undoes it."""
    if isinstance(value, torch.Tensor) and not overlap([value]):
        kept, grad = value.detach().clone(), None if not value.is_leaf or value.grad is None else value.grad.clone()
        flag = value.requires_grad
        value.data.copy_(numbers(kept))

        def back():
            value.data.copy_(kept)
            if value.is_leaf:
                value.requires_grad_(flag).grad = grad

        yield back
    elif isinstance(value, torch.Generator):
        yield partial(value.set_state, value.get_state())
    elif isinstance(value, nn.Module):
        yield from (partial(setattr, each, "training", each.training) for each in value.modules())
        for each in (*value.parameters(), *value.buffers()):
            yield from disturbed(each, numbers, entries)
    elif isinstance(value, dict | list | tuple):
        held = list(value.items() if isinstance(value, dict) else value)
        for each in held:
            yield from disturbed(each, numbers, entries)
        if not isinstance(value, tuple):
            refill(value, entries(held))
            yield partial(refill, value, held)


def refill(several: dict | list, held: Iterable) -> None:
    several.clear()
    (several.update if isinstance(several, dict) else several.extend)(held)


def turned(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, the last row first."""
    return tensor.flip(0) if tensor.ndim else tensor.clone()


def grown(tensor: torch.Tensor) -> torch.Tensor:
    """Each number times another one from 1 to 2; what is whole, and may be a place, is turned."""
    if not tensor.is_floating_point():
        return turned(tensor)
    return tensor * torch.linspace(1, 2, tensor.numel(), dtype=tensor.dtype, device=tensor.device).view(tensor.shape)


def scattered(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers as a slice of a larger tensor: with a gap after each, each row, each table of rows, …"""
    if not tensor.ndim:
        return tensor
    wide = tensor.new_zeros(*(size + 1 for size in tensor.shape), 2)[..., 0]
    slice_ = wide[tuple(slice(size) for size in tensor.shape)]
    return slice_.copy_(tensor)


def same(a, b) -> bool:
    """Equal to the last bit, NaN beside NaN."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        alike = (
            isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape and a.dtype == b.dtype
        )
        return alike and (a.is_meta or bool(((a == b) | ((a != a) & (b != b))).all()))
    if type(a).__module__ == "numpy" and getattr(a, "ndim", 0):
        return type(b).__module__ == "numpy" and same(torch.as_tensor(a), torch.as_tensor(b))
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b) or (a != a and b != b) or (type(a) is type(b) and type(a).__eq__ is object.__eq__)


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------
def keeping(function: Callable, model: nn.Module, *rest, gradients: bool = True):
    """`function(model, …)`, after which the model is as it was: numbers, flags, mode. NotKept says what is not."""
    before = portrait(model, gradients)
    value = listed(function(model, *rest))
    after = portrait(model, gradients)
    if list(before) != list(after):
        raise NotKept(
            f"It leaves the model with other parts: {', '.join(sorted(set(before) ^ set(after))) or 'another order'}."
        )
    for name, entries in before.items():
        for what, then in entries.items():
            if not same(then, after[name][what]):
                raise NotKept(f"It changes the model: {what} of {name or 'the model'} is not what it was.")
    return value


def portrait(model: nn.Module, gradients: bool) -> dict[str, dict]:
    found: dict[str, dict] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found[f"{name} ({type(module).__name__})"] = {"the mode (train or eval)": module.training}
    for name, p in model.named_parameters(remove_duplicate=False):
        grad = p.grad.clone() if gradients and p.grad is not None else None
        found[name] = {
            "the value": p.detach().clone(),
            "requires_grad": p.requires_grad,
            "the gradient": grad,
            "the tensor": id(p),
        }
    for name, b in model.named_buffers():
        found[name] = {"the value": b.clone()}
    return found
