"""The peak of the memory that some work takes, counted by watching every tensor that it makes."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minipeft.attach import Tuned


class PeakMemory(TorchDispatchMode):
    """Count the bytes of all live tensors that some work holds or makes; `peak` is the most at any one moment.

        with PeakMemory(model.parameters()) as memory: loss.backward()
        memory.peak                                            # bytes

    peak = max over operations of Σ bytes of the storages alive, starting from those of `held`. A storage counts once,
    however many views it has. Scratch space inside an operation is not seen. It works on every device, since it counts
    tensors and asks no allocator; on a GPU `torch.cuda.max_memory_allocated` says a little more, being rounded up.
    """

    def __init__(self, held: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()
        for tensor in held:
            self._count(tensor)

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf)
        return result


def kept(model: nn.Module, optimizer) -> dict[str, list[torch.Tensor]]:
    """What stays from step to step, each storage in one part only."""
    trained = list(model.adapters.parameters()) if isinstance(model, Tuned) else []
    beside = {id(p) for p in trained}
    originals = model.originals if isinstance(model, Tuned) else []
    return {
        "weights": [t for t in (*model.parameters(), *model.buffers(), *originals) if id(t) not in beside],
        "trained": [*trained, *getattr(optimizer, "masters", {}).values()],
        "gradients": [p.grad for p in model.parameters() if p.grad is not None],
        "moments": [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)],
    }
