"""K LoRA runs at once. The base is frozen, so its products can serve all of them in one call:

    x (K·batch, T, d_in) ──▶ W, frozen ──────────────────────────────────────┐
        └─ as (K, batch·T, d_in) ──▶ Aᵀ (K, d_in, r) ──▶ γ·Bᵀ (K, r, d_out) ──+──▶ y (K·batch, T, d_out)

Run k has the k-th block of rows, A_k, B_k and learning rate of its own; all read the same rows of the task, in the same
order. A rank below the largest is filled up with zeros, which stay: A gets no gradient where B is 0, nor B where A is.

    tuned, histories = fit_many(model, [LoRA(rank=r) for r in (1, 4, 16)], task, lr=[1e-2, 1e-2, 3e-3])
    tuned.use("run2")
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from minipeft.attach import Tuned, attach
from minipeft.front import IGNORE
from minipeft.learn.fit import History
from minipeft.learn.plan import Plan
from minipeft.learn.rows import as_task, collate, order, padding, read, warn_of_unknown
from minipeft.methods.lora import LoRA, LoRALayer
from minipeft.reading import is_pair
from minipeft.targets import module_at


def fit_many(
    model: nn.Module,
    methods: LoRA | Sequence[LoRA],
    task,
    steps: int = 60,
    lr: float | Sequence[float] = 1e-2,
    batch: int = 16,
    seed: int = 0,
    schedule: str = "constant",
    starts: int | Sequence[int] = 0,
    tokenizer=None,
    progress: bool = True,
) -> tuple[Tuned, list[History]]:
    """Trains K LoRA adapters, "run0" to "run{K−1}", on the training rows of `task`; see `fit` for the other arguments.

    `methods`, `lr` and `starts` (the seeds of the initial values, `attach`'s `seed`) are one for all, or one for each
    run; at least one of them is a sequence. `seed` gives the order of the rows, which all runs share.

    Each run is the one that `attach` and `fit` give it alone, but for rounding, which training amplifies. Over ten
    steps on the pocket model its numbers differ by 1e-5 at lr=3e-3 and by 1e-4 at 1e-2, where `fit` with the two ways
    that it has to compute W'·x differs from itself as much; over forty, by 1e-2 (`benchmarks/many.py`). What else runs
    beside it changes nothing. Where the base itself drops activations, the masks are drawn for all runs at once, so a
    run equals its own `fit` in distribution only. A run whose loss is not finite leaves the batch; the others go on.

    Returns the `Tuned` with "run0" active, and a `History` for each run; its `seconds` are those of all runs together,
    and its `peak_memory` is 0.

    Raises ValueError for sequences of different lengths, for methods other than LoRA without dropout on linear layers
    and embeddings, and for whatever `attach` and `fit` refuse; the model is as it was then.
    """
    from tqdm.auto import tqdm

    runs = together(methods, lr, starts)
    plans = [Plan(steps, rate, batch, seed, schedule) for _, rate, _ in runs]
    tokenizer, task = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None), as_task(task)
    tuned = attach(model, runs[0][0], "run0", runs[0][2])
    try:
        for k, (method, _, start) in enumerate(runs[1:], 1):
            tuned.add(f"run{k}", method, start)
        blocks = blocks_of(tuned)
        encoded = read(tuned, task, task.data["train"], tokenizer)
    except BaseException:
        tuned.detach()
        raise
    warn_of_unknown(encoded, tokenizer)
    histories = [History() for _ in runs]
    tuned.use()  # the hooks of the runs are silent, those of the blocks act
    tuned.adapters.requires_grad_(True)
    hooks = [module_at(tuned.base, path).register_forward_hook(block.hook) for path, block in blocks.items()]
    try:
        with tqdm(total=steps, disable=not progress, leave=False, desc=task.name) as bar:
            for _ in train(tuned, list(blocks.values()), task.kind, encoded, tokenizer, histories, plans):
                bar.update()
                bar.set_postfix_str(f"losses {' '.join(f'{h.losses[-1]:.2f}' for h in histories[:6] if h.losses)}")
    except KeyboardInterrupt:
        for history in histories:
            history.stopped = "interrupted" if history.stopped == "cancelled" else history.stopped
    finally:
        for hook in hooks:
            hook.remove()
        tuned.zero_grad(set_to_none=True)
        tuned.eval()
        tuned.use("run0")
    return tuned, histories


def together(methods, lr, starts) -> list[tuple[LoRA, float, int]]:
    """(method, learning rate, seed of the start) of each run."""
    given = {"methods": methods, "lr": lr, "starts": starts}
    lengths = {name: len(value) for name, value in given.items() if isinstance(value, Sequence)}
    if not lengths or len(set(lengths.values())) > 1 or not min(lengths.values()):
        found = ", ".join(f"{name} {n}" for name, n in lengths.items()) or "none"
        raise ValueError(
            f"methods, lr and starts say how many runs there are, in sequences of one length; got {found}."
        )
    count = next(iter(lengths.values()))
    columns = [value if isinstance(value, Sequence) else [value] * count for value in given.values()]
    if odd := next((m for m in columns[0] if type(m) is not LoRA), None):
        raise ValueError(f"fit_many trains LoRA alone, and got {odd!r}; use fit, run by run.")
    if any(method.dropout for method in columns[0]):
        raise ValueError(
            "A mask of dropout is drawn for all runs at once, so no run would equal its own: use dropout=0."
        )
    return list(zip(*columns, strict=True))


def blocks_of(tuned: Tuned) -> dict[str, Block]:
    """{path of a module: what all runs do there}."""
    found: dict[str, list[list[LoRALayer]]] = {}
    for k, layers in enumerate(tuned.adapters.values()):
        for layer in layers.values():
            if type(layer) is not LoRALayer:
                raise ValueError(
                    f"{layer.path!r} carries a {type(layer).__name__}; only plain LoRA layers run together."
                )
            found.setdefault(layer.path, [[] for _ in tuned.adapters])[k].append(layer)
    return {path: Block(layers) for path, layers in found.items()}


class Block:
    """The layers of all runs on one module; `alive` says which runs have rows in the batch, of `rows` each."""

    def __init__(self, layers: list[list[LoRALayer]]):
        self.layers, self.alive, self.rows = layers, list(range(len(layers))), 0
        self.rank = max(sum(layer.rank for layer in each) for each in layers)
        self.one = next(layer for each in layers for layer in each)

    def stacked(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A (K, r, d_in) and γ·B (K, width, r): a run's layers one below the other, then zeros."""
        A, B = [], []
        width = self.one.padding[0] + len(self.one.B) + self.one.padding[1]
        for layers in (self.layers[k] for k in self.alive):
            rank = self.rank - sum(layer.rank for layer in layers)
            A.append(torch.cat([*(layer.A for layer in layers), self.one.A.new_zeros(rank, self.one.A.shape[1])]))
            whole = [F.pad(layer.gamma * layer.B, (0, 0, *layer.padding)) for layer in layers]
            B.append(torch.cat([*whole, self.one.B.new_zeros(width, rank)], 1))
        return torch.stack(A), torch.stack(B)

    def hook(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        """y_k = W·x_k + γ·B_k·A_k·x_k for the rows of each run k."""
        x, K = args[0], len(self.alive)
        if x.shape[0] != K * self.rows:
            raise ValueError(
                f"{self.one.path!r} got {x.shape[0]} rows for a batch of {K} runs with {self.rows} rows each; runs go "
                "together where dimension 0 of every adapted module's input is the batch."
            )
        A, B = self.stacked()
        if self.one.embedding:
            low = A.mT[torch.arange(K, device=x.device)[:, None], x.reshape(K, -1)]  # the columns A_k[:, ids]
        else:
            low = torch.bmm(x.reshape(K, -1, x.shape[-1]).to(A.dtype), A.mT)
        plain = output.reshape(K, -1, output.shape[-1])
        if plain.dtype == B.dtype:
            return torch.baddbmm(plain, low, B.mT).view(output.shape)
        return (plain + torch.bmm(low, B.mT)).to(output.dtype).view(output.shape)


def train(
    tuned: Tuned, blocks: list[Block], kind: str, encoded, tokenizer, histories: list[History], plans: list[Plan]
):
    """Yields after each step, like the loop inside `fit`."""
    plan, alive, started = plans[0], list(range(len(plans))), time.perf_counter()
    groups = [group for k, each in enumerate(plans) for group in groups_of(tuned.adapters[f"run{k}"], each.lr)]
    # one call for the many small tensors; it gives what the default gives, to rounding
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, plan.share)
    rows, pad = order([len(ids) for ids, _ in encoded], plan.batch, plan.seed), padding(tuned, tokenizer)
    device = next(tuned.adapters.parameters()).device
    tuned.train()
    for step in range(plan.steps):
        inputs = collate(kind, [encoded[i] for i in next(rows)], tokenizer, device, pad)
        for block in blocks:
            block.alive, block.rows = alive, plan.batch
        with torch.random.fork_rng():  # as in `fit`
            torch.manual_seed(plan.seed * 1_000_003 + step)
            losses = losses_of(tuned, inputs, kind, len(alive), check=step == 0)
        optimizer.zero_grad(set_to_none=True)
        finite = losses.isfinite()
        torch.where(finite, losses, 0.0).sum().backward()
        for k, loss in zip(alive, losses.tolist(), strict=True):
            if not math.isfinite(loss):
                histories[k].stopped = "diverged"
                warnings.warn(f"The loss of run {k} became {loss} at step {step}, so it left the batch.", stacklevel=3)
                for parameter in tuned.adapters[f"run{k}"].parameters():
                    parameter.grad = None  # which the optimizer passes over
            else:
                histories[k].losses.append(loss)
                histories[k].tokens += int(inputs["attention_mask"].sum())
                histories[k].seconds.append(time.perf_counter() - started)
        optimizer.step()
        scheduler.step()
        alive = [k for k, good in zip(alive, finite.tolist(), strict=True) if good]
        yield step
        if not alive:
            return
    for k in alive:
        histories[k].stopped = "finished"


def groups_of(layers: nn.ModuleDict, lr: float) -> list[dict]:
    """AdamW's parameter groups of one run, by learning rate; see `fit`."""
    faster = {id(p): factor for layer in layers.values() for p, factor in layer.rates()}
    found: dict[float, list[nn.Parameter]] = {}
    for parameter in layers.parameters():
        found.setdefault(faster.get(id(parameter), 1.0), []).append(parameter)
    return [{"params": parameters, "lr": lr * factor} for factor, parameters in found.items()]


def losses_of(tuned: Tuned, inputs: dict, kind: str, count: int, check: bool) -> torch.Tensor:
    """The loss of each run, (count,): the mean over its tokens, or over its rows where the task has classes."""
    inputs = {name: value.repeat(count, *[1] * (value.ndim - 1)) for name, value in inputs.items()}
    labels, pair = inputs["labels"], is_pair(tuned.base)
    if not (check or pair):  # of which the decoder's input is made
        del inputs["labels"]
    out = tuned(**inputs)
    logits = out.logits.float() if out.logits.dtype in (torch.float16, torch.bfloat16) else out.logits
    if kind != "class" and not pair:
        logits, labels = logits[:, :-1], labels[:, 1:]
    each = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE, reduction="none")
    losses = each.view(count, -1).sum(1) / (labels != IGNORE).view(count, -1).sum(1)
    if check and not torch.isclose(
        out.loss.detach(), losses.detach().mean().to(out.loss.dtype), rtol=1e-3, equal_nan=True
    ):
        raise ValueError(
            f"{type(tuned.base).__name__} computes another loss ({out.loss:.4g}) than the mean of −log p "
            f"({losses.mean():.4g}), so its runs cannot be told apart; use fit, run by run."
        )
    return losses
