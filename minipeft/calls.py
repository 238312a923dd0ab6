"""Which modules a call of the model calls. An adapter acts on a module's output, so on one that is never called it does
nothing, and where the model reads its weight all the same (Mamba's `dt_proj`), merging changes what the model computes.

A transformers model is tried once, on a few tokens, or on a picture, a film or a sound; of others nothing is known
beforehand.
"""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn

from minipeft.reading import is_pair, placeholder
from minipeft.targets import Slot, module_at, slots

Run = Callable[[], list[torch.Tensor]]


def unheard(model: nn.Module, paths: Iterable[str]) -> dict[str, str]:
    """{path: why} for those of the linear layers and embeddings at `paths` on whose output no adapter can act.

    A module that this one try did not need, an expert of a mixture or the part for pictures, is not named: the output
    must depend on its weight, or the weight must belong to a module that is called.
    """
    places = dict(slots(model))
    weights = {path: places[path, "weight"] for path in paths if (path, "weight") in places}
    sharing: dict[int, list[str]] = {}
    for (path, _), parameter in places.items():
        sharing.setdefault(id(parameter), []).append(path)
    called: set[str] = set()
    with _trial(model) as run:
        for path in {other for weight in weights.values() for other in sharing[id(weight)]} if run else ():
            module_at(model, path).register_forward_hook(lambda *_, at=path: called.add(at))
        if not weights or not run or not (before := run()):
            return {}
        idle = [path for path in weights if path not in called]
        found = {path: "the model reads its weight and does not call it" for path in _read(model, idle, run, before)}
        for path in idle:
            if other := next((other for other in sharing[id(weights[path])] if other in called), None):
                found[path] = f"the model calls {other!r} instead, which shares its weight"
        return found


def unseen(model: nn.Module, paths: Iterable[str]) -> dict[str, str]:
    """{path: why} for those of the layers at `paths` that a picture goes through in vain: LLaVA reads the states before
    the last layer of its eye. {} where the model makes nothing of a picture, or wants more than that."""
    with _trial(model) as run:
        config = getattr(getattr(model, "config", None), "vision_config", None)
        if not run or config is None or not hasattr(model, "get_image_features"):
            return {}
        like = next(model.parameters())
        probes: dict[str, torch.Tensor] = {}

        def probe(output: torch.Tensor, at: str) -> torch.Tensor:
            probes[at] = torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
            return output + probes[at]

        for path in paths:
            module_at(model, path).register_forward_hook(lambda _, __, output, at=path: probe(output, at))
        with contextlib.suppress(Exception), torch.enable_grad():
            seen = model.get_image_features(_picture(config, like)).pooler_output
            total = sum(each.float().sum() for each in (seen if isinstance(seen, list | tuple) else [seen]))
            gradients = torch.autograd.grad(total, list(probes.values()), allow_unused=True)
            reached = zip(probes, gradients, strict=True)
            return {path: "the model leaves its output alone" for path, gradient in reached if gradient is None}
        return {}


def calls(model: nn.Module) -> list[str]:
    """The paths of the modules in the order in which a call of the model is through with them; [] where it cannot be
    tried."""
    ends: list[str] = []
    with _trial(model) as run:
        for path, module in model.named_modules() if run else ():
            module.register_forward_hook(lambda *_, at=path: ends.append(at))
        return list(dict.fromkeys(ends)) if run and run() else []


def _read(model: nn.Module, paths: Sequence[str], run: Run, before: list[torch.Tensor]) -> list[str]:
    """Those of the modules with other weights in which the output is another one; halves are tried while it is."""
    if not paths:
        return []
    kept: dict[Slot, nn.Parameter] = {(path, "weight"): module_at(model, path).weight for path in paths}
    try:
        for (path, name), weight in kept.items():
            module_at(model, path)._parameters[name] = nn.Parameter(1.5 * weight + 0.1, requires_grad=False)
        after = run()
    finally:
        for (path, name), weight in kept.items():
            module_at(model, path)._parameters[name] = weight
    if all(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
        return []
    if len(paths) == 1:
        return list(paths)
    half = len(paths) // 2
    return _read(model, paths[:half], run, before) + _read(model, paths[half:], run, before)


@contextlib.contextmanager
def _trial(model: nn.Module) -> Iterator[Run | None]:
    """What calls the model and returns its output's tensors, [] where it cannot be called so; None where there is
    nothing to call. Hooks, modes, generators and the log are left as they were."""
    parameter = next(model.parameters(), None)
    if not hasattr(model, "main_input_name") or parameter is None or type(parameter.data) is not torch.Tensor:
        yield None
        return
    from transformers.utils import logging

    training, loud = [module for module in model.modules() if module.training], logging.get_verbosity()
    hooks = [(module, module._forward_hooks, module._forward_pre_hooks) for module in model.modules()]
    recording = "_output_capturing_hooks_installed"  # transformers' note that it has hooks in place, made in a call
    noted = [module for module, *_ in hooks if vars(module).pop(recording, False)]

    def run() -> list[torch.Tensor]:
        with contextlib.suppress(Exception):  # it may want more than its main input
            return [value for value in model(**_inputs(model, parameter)).values() if isinstance(value, torch.Tensor)]
        return []

    try:
        logging.set_verbosity_error()
        for module, *_ in hooks:  # whoever listens to the model does not hear of it
            module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()
        model.eval()
        with torch.no_grad(), torch.random.fork_rng():
            yield None if parameter.is_meta else run
    finally:
        logging.set_verbosity(loud)
        for module in training:
            module.training = True
        for module, after, before in hooks:
            module._forward_hooks, module._forward_pre_hooks = after, before
            vars(module).pop(recording, None)
        for module in noted:
            setattr(module, recording, True)


def _inputs(model: nn.Module, like: torch.Tensor) -> dict[str, torch.Tensor]:
    config, name = model.config, model.main_input_name
    if name == "input_ids":
        ids = torch.full((1, 6), placeholder(model), device=like.device)
        return {"input_ids": ids} | ({"decoder_input_ids": ids[:, :3]} if is_pair(model) else {})
    if name == "pixel_values":
        return {name: _picture(config, like)}
    if hasattr(config, "max_source_positions"):  # the bands of a sound's spectrum, over time
        shape = (1, config.num_mel_bins, 2 * config.max_source_positions)
    else:  # a second of sound
        shape = (1, 16_000)
    return {name: _waves(shape, like)}


def _picture(config, like: torch.Tensor) -> torch.Tensor:
    """One picture, or one film, of the size that the configuration says."""
    size = getattr(config, "image_size", 64)  # some take pictures of any size
    size = size if isinstance(size, list | tuple) else (size, size)
    film = (config.num_frames,) if hasattr(config, "num_frames") else ()
    return _waves((1, *film, getattr(config, "num_channels", 3), *size), like)


def _waves(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-1, 1, math.prod(shape)).view(shape).to(like.device, like.dtype)
