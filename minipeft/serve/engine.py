"""Continuous batching: one batch of texts that grow together, each row with an adapter and a length of its own.

Between two tokens, texts that are done leave the batch and waiting ones join it, so nobody waits for the longest:

    step 1        step 2        step 3                    cache, padded on the left, so that all rows end together:
    a ▒▒▒▒█       a ▒▒▒▒▒█      b ▒▒█    (a was done)         · · k k k      row 0: 3 tokens so far
                  b ▒█          c ▒▒▒█   (c joined)           k k k k k      row 1: 5
                                                              · · · · k      row 2: 1

The keys and values of all rows are one pair of tensors a layer, (rows, heads, longest, d_head), with a mask (rows,
longest) that hides the padding. A row's tokens are those that its adapter alone would write, up to rounding.

The idea is that of Yu et al. 2022, "Orca: A Distributed Serving System for Transformer-Based Generative Models", §3.
"""

from __future__ import annotations

import logging
import queue
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from minipeft.reading import arguments, is_pair, longest
from minipeft.serve.checkpoint import CONFIG, WEIGHTS, contents

log = logging.getLogger(__name__)


class Full(Exception):
    """As many requests wait as the engine lets wait."""


@dataclass(eq=False)
class Request:
    """One text to go on with. `put` is called from the engine's thread with each new token, then once with why it
    ended: "stop" after a token of `ends` (which is not put), "length" after `most` tokens, or an exception.

    `adapter`: a name, or None for the base. `temperature` 0 takes the likeliest token; else a token is drawn from
    softmax(logits/temperature), cut to the likeliest ones that have `top_p` of the probability together, by `seed`.
    """

    adapter: str | None
    ids: list[int]
    most: int
    put: Callable[[int | str | Exception], None]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    ends: frozenset[int] = frozenset()
    cancelled: bool = False  # set it from any thread: the row leaves before the next token
    version: str | None = field(default=None, init=False)  # the bank's name for the adapter, chosen when it joins
    last: int = field(default=-1, init=False)
    written: int = field(default=0, init=False)
    done: str | Exception | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def draw(self, logits: torch.Tensor) -> int:
        """The next token, from logits (V,), where the temperature is not 0."""
        p, tokens = (logits.cpu().double() / self.temperature).softmax(-1).sort(descending=True, stable=True)
        p = p * (p.cumsum(-1) - p < self.top_p)  # the likeliest, up to the one with which they reach top_p
        return int(tokens[torch.multinomial(p, 1, generator=self.generator)])


class Engine:
    """Writes the texts of many requests at once over `bank` (see `tenants.py`), in batches of at most `rows`.

    `submit` may be called from any thread. `step` does one token for all; `start` runs it in a thread of its own until
    `close`. At most `waiting` requests wait. `adapters` says which version in the bank a name stands for: a text is
    finished with the version that it began with, whatever `swap` puts in its place meanwhile.

    Raises ValueError for a model that does not write one token after another from keys and values.
    """

    def __init__(self, bank, rows: int = 32, waiting: int = 1000):
        model = bank.model
        if not hasattr(model, "generate") or is_pair(model) or getattr(model, "_is_stateful", False):
            raise ValueError(f"{type(model).__name__} keeps no keys and values of a text that it goes on with.")
        for name, value in (("rows", rows), ("waiting", waiting)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, but is {value!r}.")
        self.bank, self.most_rows, self.longest = bank, rows, longest(model)
        self.adapters: dict[str, str] = {}
        self.steps = self.swaps = 0
        self.rows: list[Request] = []
        self._numbered = "position_ids" in arguments(model)
        self._count, self._versions = 0, set()  # of those that `swap` put into the bank
        self._copies = tempfile.TemporaryDirectory(prefix="minipeft-", ignore_cleanup_errors=True)
        self._waiting: deque[Request] = deque()
        self._most_waiting = waiting
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._wake = threading.Condition()
        self.closed = False
        self._thread: threading.Thread | None = None
        self._clear()

    # -- from any thread ----------------------------------------------------------------------------------------------
    def submit(self, request: Request) -> None:
        """Lets the request wait for a row; raises `Full`, or ValueError for one that the model has no positions for."""
        if not request.ids:
            raise ValueError("The prompt has no tokens.")
        if self.longest is not None and len(request.ids) + request.most > self.longest:
            raise ValueError(
                f"The prompt has {len(request.ids)} tokens and {request.most} may follow, but the model reads "
                f"{self.longest} in all."
            )
        with self._wake:
            if self.closed:
                raise RuntimeError("The engine is closed.")
            if len(self._waiting) >= self._most_waiting:
                raise Full(f"{self._most_waiting} requests wait already.")
            self._waiting.append(request)
            self._wake.notify()

    def waiting(self) -> int:
        return len(self._waiting)

    def swap(self, name: str, path) -> None:
        """Lets `name` stand for the adapter at `path` from the next request on, and waits until it does."""
        self._do(lambda: self._swap(name, path))

    def drop(self, name: str) -> None:
        """Forgets `name`; texts that were begun with it are finished."""
        self._do(lambda: self.adapters.pop(name, None))

    def start(self) -> Engine:
        self._thread = threading.Thread(target=self._run, name="minipeft-engine", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """Ends the thread after the token it is at; whoever still waits gets a RuntimeError."""
        with self._wake:
            self.closed = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
        left = [*self.rows, *self._waiting]
        self._waiting.clear()
        self._clear()
        for request in left:
            request.put(RuntimeError("The server is shutting down."))
        self._copies.cleanup()

    # -- between two tokens -------------------------------------------------------------------------------------------
    @torch.no_grad()
    def step(self) -> bool:
        """Lets done texts leave and waiting ones join, and writes one token of each; False if there was none."""
        while not self._tasks.empty():
            self._tasks.get()()
        self._keep([not request.cancelled for request in self.rows])
        self._join()
        if self.rows:
            self._write()
        self._retire()
        self.steps += 1
        return bool(self.rows or self._waiting)

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self.closed or self.rows or self._waiting or not self._tasks.empty())
                if self.closed:
                    return
            self.step()

    def _do(self, task: Callable[[], object]) -> None:
        """Runs `task` between two tokens, in the engine's thread if there is one, and passes on what it raises."""
        if self._thread is None:
            task()
            return
        done, failed = threading.Event(), []

        def run() -> None:
            try:
                task()
            except Exception as error:
                failed.append(error)
            done.set()

        with self._wake:
            if self.closed:
                raise RuntimeError("The engine is closed.")
            self._tasks.put(run)
            self._wake.notify()
        while not done.wait(0.1):
            if self.closed:
                raise RuntimeError("The engine was closed.")
        if failed:
            raise failed[0]

    def _swap(self, name: str, path) -> None:
        self._count += 1
        version = f"{name}@{self._count}"  # of its own, so that the old one can stay while texts are at it
        copy = Path(self._copies.name) / version  # the bank follows its files, and these stay as they are
        try:
            copy.mkdir()
            for file, data in zip((CONFIG, WEIGHTS), contents(Path(path)), strict=True):
                (copy / file).write_bytes(data)
            self.bank.add(version, copy)
        except BaseException:
            shutil.rmtree(copy, ignore_errors=True)
            raise
        self._versions.add(version)
        self.adapters[name] = version
        self.swaps += 1

    def _retire(self) -> None:
        """Takes versions out of the bank for which no name stands and that no row is at."""
        used = {*self.adapters.values(), *(request.version for request in self.rows)}
        for version in self._versions - used:
            self.bank.remove(version)
            shutil.rmtree(Path(self._copies.name) / version, ignore_errors=True)
        self._versions &= used

    # -- the batch ----------------------------------------------------------------------------------------------------
    def _clear(self) -> None:
        self.rows, self._cache, self._mask = [], [], None

    def _join(self) -> None:
        """Reads the prompts of requests for which there is a row, and writes the first token of each."""
        new: list[Request] = []
        while self._waiting and len(self.rows) + len(new) < self.most_rows:
            request = self._waiting.popleft()
            if request.cancelled:
                continue
            if request.adapter is not None and request.adapter not in self.adapters:
                request.put(LookupError(f"The adapter {request.adapter!r} was taken away."))
                continue
            request.version = None if request.adapter is None else self.adapters[request.adapter]
            new.append(request)
        if not new:
            return
        width = max(len(request.ids) for request in new)
        ids = torch.tensor([[0] * (width - len(request.ids)) + request.ids for request in new])
        mask = torch.tensor([[0] * (width - len(request.ids)) + [1] * len(request.ids) for request in new])
        if (result := self._call(new, ids, mask, [])) is None:
            return
        logits, cache = result
        if self.rows:
            width = max(width, self._mask.shape[1])
            mask = torch.cat([pad_left(self._mask, width, 1), pad_left(mask, width, 1)])
            cache = [
                tuple(torch.cat([pad_left(a, width, 2), pad_left(b, width, 2)]) for a, b in zip(old, new, strict=True))
                for old, new in zip(self._cache, cache, strict=True)
            ]
        self._mask, self._cache = mask, cache
        there, self.rows = len(self.rows), self.rows + new
        self._keep([True] * there + self._hand_out(new, logits))

    def _write(self) -> None:
        """One more token of every row."""
        last = torch.tensor([[request.last] for request in self.rows])
        mask = torch.cat([self._mask, torch.ones_like(last)], 1)
        if (result := self._call(self.rows, last, mask, self._cache)) is None:
            self._clear()
            return
        self._mask, (logits, self._cache) = mask, result
        self._keep(self._hand_out(self.rows, logits))

    def _call(self, rows: list[Request], ids: torch.Tensor, mask: torch.Tensor, cache: list) -> tuple | None:
        """Logits (rows, V) behind the last token, and the keys and values of all tokens; None where the model failed,
        and then each of the rows has been told."""
        from transformers import DynamicCache

        device = self.bank.model.device
        more = {}
        if self._numbered:
            more["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :].to(device)
        try:
            out = self.bank(
                ids.to(device), adapters=[request.version for request in rows], attention_mask=mask.to(device),
                past_key_values=DynamicCache(cache or None), use_cache=True, **more,
            )  # fmt: skip
        except Exception as error:  # whatever it is: these texts are lost, the server is not
            log.exception("A batch of %d rows failed.", len(rows))
            for request in rows:
                request.put(error)
            return None
        return out.logits[:, -1], [(layer.keys, layer.values) for layer in out.past_key_values.layers]

    def _hand_out(self, rows: list[Request], logits: torch.Tensor) -> list[bool]:
        """Gives each of the rows its token; which of them go on."""
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        best, broken = logits.argmax(-1).tolist(), logits.isnan().any(-1).tolist()
        for row, request in enumerate(rows):
            if broken[row]:
                request.done = ArithmeticError(f"{request.adapter or 'The base'} gave NaN for a probability.")
            else:
                request.last = best[row] if request.temperature == 0 else request.draw(logits[row])
                request.written += 1
                if request.last in request.ends:
                    request.done = "stop"
                else:
                    request.put(request.last)
                    request.done = "length" if request.written == request.most else None
            if request.done:
                request.put(request.done)
        return [request.done is None for request in rows]

    def _keep(self, kept: list[bool]) -> None:
        """Takes the other rows out of the batch, and the columns that no row needs any longer."""
        if all(kept):
            return
        if not any(kept):
            self._clear()
            return
        rows = torch.tensor(kept).nonzero()[:, 0]
        self.rows = [self.rows[i] for i in rows.tolist()]
        self._mask = self._mask[rows]
        first = int(self._mask.any(0).int().argmax())
        self._mask = self._mask[:, first:]
        self._cache = [tuple(each[rows.to(each.device), :, first:] for each in pair) for pair in self._cache]


def pad_left(x: torch.Tensor, length: int, dim: int) -> torch.Tensor:
    """Zeros in front, so that dimension `dim` has `length` entries."""
    missing = length - x.shape[dim]
    if not missing:
        return x
    shape = [*x.shape]
    shape[dim] = missing
    return torch.cat([x.new_zeros(shape), x], dim)
