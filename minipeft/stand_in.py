"""What makes a `Tuned` behave as the model that it wraps: attributes, moving, copying, state, signature."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from minipeft.steps import listen
from minipeft.table import table

ELSEWHERE = {  # what transformers calls otherwise than a Tuned
    "save_pretrained": "use tuned.save(path), or detach() after merge() and save what that returns",
    "push_to_hub": "use tuned.save(path) and upload the folder",
    "add_adapter": "use tuned.add(name, method)",
    "load_adapter": "use mp.load_adapter(tuned, path, name)",
    "set_adapter": "use tuned.use(name)",
    "enable_adapters": "leave tuned.disabled(), or use tuned.use(name)",
    "disable_adapters": "use the context tuned.disabled(), or tuned.use() without a name",
    "delete_adapter": "use tuned.delete(name)",
    "resize_token_embeddings": "resize the base before attach, or after detach()",
    "active_adapters": "use tuned.active",
    "active_adapter": "use tuned.active",
}


class StandIn(nn.Module):
    """A module around `base` that holds `adapters` and nothing else of its own.

    `state_dict()` holds the adapters only, so a checkpoint is small and tied weights of the base do not matter.
    """

    adapters: nn.ModuleDict
    base: nn.Module

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "base" not in self.__dict__.get("_modules", ()):
                raise
            if name in ELSEWHERE:
                raise AttributeError(
                    f"A Tuned has no {name}, which would act on the bare base; {ELSEWHERE[name]}."
                ) from None
            return getattr(self.base, name)

    def __setattr__(self, name: str, value: object) -> None:
        """What only the base has is set there, where it is read: `tuned.generation_config = …`."""
        base = self.__dict__.get("_modules", {}).get("base")
        own = name in self.__dict__ or name in self.__dict__.get("_modules", ()) or hasattr(type(self), name)
        if base is None or own or name.startswith("_") or not hasattr(base, name):
            super().__setattr__(name, value)
        else:
            setattr(base, name, value)

    def _repr_html_(self) -> str:
        """{adapter: methods, whether it acts, how many numbers it trains, their share}."""
        total = self.count().total
        rows = []
        for name, layers in self.adapters.items():
            n = sum({id(p): p.numel() for p in layers.parameters()}.values())
            how = f"{self.weights[name]:g}" if name in self.active else "no"
            how = "merged" if self._merged is not None and name in self.active else how
            methods = " + ".join(map(repr, self.methods[name]))
            rows.append((name, methods, len(layers), how, f"{n:,}", f"{100 * n / total:.3g} %" if total else "–"))
        head = ("adapter", "method", "places", "acts with weight", "numbers", "share")
        return table(f"{type(self.base).__name__} of {total:,} numbers, with adapters", rows, head)

    def __reduce__(self):  # copy and pickle: the class is made at run time, see stand_in_for
        return _empty, (type(self).__bases__[0], type(self.base)), self.__dict__

    def _apply(self, fn: Callable, recurse: bool = True) -> StandIn:
        with self.disabled():  # the originals must move too; merged weights are computed again
            super()._apply(fn, recurse)
        if self._merged is not None:
            self._merged, _ = self._merge()
        self._refresh()
        return self

    def state_dict(self, *args, destination: dict | None = None, prefix: str = "", keep_vars: bool = False) -> dict:
        return self.adapters.state_dict(
            *args, destination=destination, prefix=f"{prefix}adapters.", keep_vars=keep_vars
        )

    def load_state_dict(self, state_dict: dict, strict: bool = True, assign: bool = False):
        self.check_open("load_state_dict")
        result = self.adapters.load_state_dict(
            {key.removeprefix("adapters."): value for key, value in state_dict.items()}, strict=strict, assign=assign
        )
        self._refresh()
        return result

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        """What a module around this one calls, such as `nn.Sequential` or `torch.compile`."""
        self.check_open("load_state_dict")
        self._prefix = prefix
        super()._load_from_state_dict(state_dict, prefix, *args)

    def train(self, mode: bool = True) -> StandIn:
        """Training or not; what collects statistics in the base keeps those that it has, for the base is frozen."""
        super().train(mode)
        listen(self)  # a copy, too
        for module in filter(collects, self.base.modules()):
            module.eval()
        return self


def mark(base: nn.Module) -> None:
    """Notes that the model carries adapters, and that its vocabulary therefore stays as large as it is."""
    base._tuned = True
    if hasattr(base, "resize_token_embeddings"):
        base.resize_token_embeddings = _refuse_to_resize


def unmark(base: nn.Module) -> None:
    for name in ("_tuned", "resize_token_embeddings"):
        vars(base).pop(name, None)


def _refuse_to_resize(*_, **__) -> None:
    raise ValueError("This model carries adapters that fit its vocabulary; resize it before attach, or after detach().")


def collects(module: nn.Module) -> bool:
    """Whether it changes its own buffers in training: a batch norm, and what has numbers in the state dict and trains
    none, as the ranges of a quantiser (I-BERT's) or the vectors of a spectral norm."""
    kept = module._buffers.keys() - module._non_persistent_buffers_set
    numbers = [module._buffers[name] for name in kept if module._buffers[name] is not None]
    alone = isinstance(module, nn.modules.batchnorm._NormBase) or not (module._parameters or module._modules)
    return alone and any(value.is_floating_point() for value in numbers)


def without_base(tuned: StandIn, keys: NamedTuple) -> None:
    """After loading: the base was not in the file, and is not missed."""
    start = f"{tuned._prefix}base."
    keys.missing_keys[:] = [key for key in keys.missing_keys if not key.startswith(start)]
    tuned._refresh()


@functools.cache
def stand_in_for(kind: type[StandIn], base: type[nn.Module]) -> type[StandIn]:
    """`kind` with the signature of the base's forward, which `transformers.Trainer` reads to choose its columns."""

    def forward(self, *args, adapters=None, **kwargs):
        return kind.forward(self, *args, adapters=adapters, **kwargs)

    signature = inspect.signature(base.forward)
    parameters = list(signature.parameters.values())
    last = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    parameters.insert(last, inspect.Parameter("adapters", inspect.Parameter.KEYWORD_ONLY, default=None))
    forward.__signature__ = signature.replace(parameters=parameters)
    forward.__doc__ = kind.forward.__doc__
    return type(
        f"{kind.__name__}{base.__name__}",
        (kind,),
        {"forward": forward, "__doc__": kind.__doc__, "__module__": kind.__module__},
    )


def _empty(kind: type[StandIn], base: type[nn.Module]) -> StandIn:
    cls = stand_in_for(kind, base)
    return cls.__new__(cls)
