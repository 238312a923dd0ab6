"""Federated LoRA: clients train on data that never leave them, and send only the numbers that they trained.

    round t:   server ──▶ every client:  A, B, and what has moved into the base (McMahan et al. 2017, "FedAvg")
               client k trains for a few steps on its own n_k rows ──▶ server: the factors that trained
               server:  the next A, B by one of six rules, with weights n_k / Σ n        (`averaging.py`)

Numbers that are no LoRA factor (a classifier's head, a prompt) are averaged one by one. A client that drops out, comes
late, diverges or sends NaN is left out of the round by name; one whose adapter has another shape stops it.

Privacy: with `Privacy(clip=C, noise=σ)` a client cuts its change to length C and adds N(0, (σ·C)²) to every number
*before* sending, so that the server sees nothing else:  Δ̃ = Δ·min(1, C/‖Δ‖) + N(0, σ²C²)  (Abadi et al. 2016, §3.1;
McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models"). `epsilon` says what that promises.
"""

from __future__ import annotations

import copy
import warnings
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, wait
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from minipeft.attach import Tuned, attach
from minipeft.layer import Method
from minipeft.learn.averaging import Next, Rule, mean, mean_product, rule_of, shares
from minipeft.learn.fit import History, training
from minipeft.learn.plan import Plan
from minipeft.learn.rows import as_task
from minipeft.methods.lora import LoRALayer

Numbers = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Client:
    """`data` is what `fit` takes, or a function without arguments that returns it where the client is."""

    name: str
    data: object


@dataclass(frozen=True)
class State:
    """What the server holds before round `number`: the adapter's `numbers` by name ("layers/0/q_proj.A"), and for each
    target what has `moved` into its weight, (d_out, d_in), of the target's own rows."""

    numbers: Numbers
    moved: Numbers = field(default_factory=dict)
    number: int = 0


@dataclass(frozen=True)
class Update:
    """What a client sends in round `number`: the `numbers` that trained, and how many `rows` it has."""

    name: str
    rows: int
    numbers: Numbers
    number: int
    stopped: str = "finished"

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.numbers.values())


@dataclass(frozen=True)
class Privacy:
    """`clip`: C, the longest change that a client may send; `noise`: σ, in units of C. The noise follows from `seed`,
    so that a lesson can be repeated; None draws it from the system, as it must be where privacy depends on it.
    """

    clip: float
    noise: float
    seed: int | None = 0

    def __post_init__(self) -> None:
        if not (self.clip > 0 and self.noise >= 0 and torch.tensor([self.clip, self.noise]).isfinite().all()):
            raise ValueError(f"clip must be positive and noise 0 or more, but they are {self.clip} and {self.noise}.")

    def hide(self, change: Numbers, client: str, number: int) -> Numbers:
        """Δ·min(1, C/‖Δ‖) + N(0, σ²C²), where ‖Δ‖ goes over all numbers of the change."""
        length = torch.cat([t.flatten().double() for t in change.values()]).norm().item()
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(zlib.crc32(f"{self.seed}/{number}/{client}".encode()))
        factor = min(1.0, self.clip / length) if length else 1.0
        std = self.noise * self.clip
        return {n: t * factor + std * torch.randn(t.shape, generator=generator).to(t) for n, t in change.items()}


@dataclass(frozen=True)
class Round:
    """What happened: whose updates were `used`, who was `refused` and why, the bytes that each client sent (`up`) and
    was sent (`down`, one figure for all), and `missed`: ‖what was averaged − ΔW*‖ / ‖ΔW*‖ over all targets."""

    number: int
    used: tuple[str, ...]
    refused: dict[str, str]
    up: dict[str, int]
    down: int
    missed: float


@dataclass(frozen=True)
class Federation:
    """The server's `state` after the last round, and what happened in each of the `rounds`."""

    method: Method | Sequence[Method]
    state: State
    rounds: tuple[Round, ...]

    def tuned(self, model: nn.Module) -> Tuned:
        """A copy of `model` with what the clients learnt; `model` stays as it is."""
        return seated(model, self.method, self.state)


def federate(
    model: nn.Module,
    method: Method | Sequence[Method],
    clients: Sequence[Client],
    rule: str = "fedit",
    rounds: int = 5,
    plan: Plan = Plan(steps=10),  # noqa: B008  frozen
    executor: Executor | None = None,
    deadline: float | None = None,
    privacy: Privacy | None = None,
    watch: Callable[[Federation], object] | None = None,
) -> Federation:
    """Trains one adapter on the rows of all clients, none of which leave their client.

    In each of `rounds` every client follows `plan` from the server's numbers, with a seed that follows from the plan's
    and the round; `rule` is one of `averaging.RULES`. `executor`: any `concurrent.futures.Executor`, such as a process
    pool or Dask's; None runs here, to the same numbers bit for bit. `deadline`: with an executor, the seconds after
    which a round goes on without those that are late. `watch(federation)` is called after each round.

    Raises ValueError for clients of one name or without rows, an unknown rule, and a round in which nobody is left.
    """
    chosen = rule_of(rule)
    names = [client.name for client in clients]
    if not clients or len(set(names)) < len(names):
        raise ValueError(f"A federation needs clients with names of their own, but they are {names}.")
    if deadline is not None and executor is None:
        raise ValueError("A deadline needs an executor: without one, clients train one after the other.")
    Plan(rounds)  # says when that is no number of rounds
    done = Federation(method, begin(model, method, chosen, plan.seed), ())
    for number in range(rounds):
        jobs = [(model, method, done.state, client, chosen, plan, privacy) for client in clients]
        updates, lost = gather(jobs, executor, deadline)
        state, happened = aggregate(done.state, updates, chosen, lost, lambda n=number: fresh(model, method, n + 1))
        done = Federation(method, state, (*done.rounds, happened))
        if watch is not None:
            watch(done)
    return done


# The server ----------------------------------------------------------------------------------------------------------
def fresh(model: nn.Module, method: Method | Sequence[Method], seed: int) -> Numbers:
    """The numbers of an adapter that has not been trained; the model is given back as it was."""
    tuned = attach(model, method, seed=seed)
    try:
        return {name: p.detach().clone() for name, p in tuned.adapters["default"].named_parameters()}
    finally:
        tuned.detach()


def begin(model: nn.Module, method: Method | Sequence[Method], rule: Rule, seed: int = 0) -> State:
    """The state before the first round. Raises ValueError for a method or a model that `rule` cannot average."""
    tuned = attach(model, method, seed=seed)
    try:
        for key, layer in tuned.adapters["default"].items():
            if hasattr(layer, "A") and type(layer) is not LoRALayer and rule.name != "fedit":
                raise ValueError(f"{rule.name} averages γ·B·A, and {key!r} is a {type(layer).__name__}; use LoRA.")
            if type(layer) is LoRALayer and rule.trains(0) == "B" and not layer.A.any():
                raise ValueError(f"{rule.name} trains B over a fixed A, and the A of {key!r} is zero; leave it out.")
            if type(layer) is LoRALayer and rule.widens and not isinstance(layer.owner[0].weight, nn.Parameter):
                raise ValueError(f"{rule.name} adds to the weight of {key!r}, which is packed; use another rule.")
    finally:
        tuned.detach()
    return State(fresh(model, method, seed))


def aggregate(
    state: State,
    updates: Sequence[Update],
    rule: Rule,
    lost: dict[str, str] | None = None,
    restart: Callable[[], Numbers] | None = None,
) -> tuple[State, Round]:
    """The next state, of the updates that can be used; `lost` says who sent nothing and why, `restart()` gives the
    numbers of a fresh adapter, which only `flora` asks for. Clients count by their rows, in the order of their names.

    Raises ValueError, naming the client, for an update of other targets or another rank, and when none can be used.
    """
    lost, sent = dict(lost or {}), sending(state, rule)
    refused = lost | {u.name: why for u in updates if (why := fault(u, state.number))}
    used = sorted((u for u in updates if u.name not in refused), key=lambda u: u.name)
    for update in used:
        check_alike(update, state, sent)
    if not used:
        why = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise ValueError(f"No client's update can be used in round {state.number} ({why}).")
    weights = shares([u.rows for u in used])
    whole = [state.numbers | u.numbers for u in used]
    numbers, moved = dict(state.numbers), dict(state.moved)
    for name in sent:
        numbers[name] = mean([each[name] for each in whole], weights).to(state.numbers[name])
    numerator = denominator = 0.0
    for key in pairs(state.numbers):
        A, B = f"{key}.A", f"{key}.B"
        several = [(each[A], each[B]) for each in whole]
        found = rule.combine(several, weights, len(state.numbers[A]))
        wanted = mean_product(several, weights)
        if found.moved is not None:
            moved[key] = moved.get(key, 0.0) + found.moved
        if found.A is None:
            again = restart()
            numbers |= {name: again[name] for name in (A, B)}
        else:
            new = {A: found.A, B: found.B}
            numbers |= {name: new[name].to(state.numbers[name]) for name in (A, B) if name in sent}
        numerator += (made(found, wanted) - wanted).square().sum().item()
        denominator += wanted.square().sum().item()
    happened = Round(
        state.number, tuple(u.name for u in used), refused, {u.name: u.bytes for u in used},
        received(state, rule, len(used)), (numerator / denominator) ** 0.5 if denominator else 0.0,
    )  # fmt: skip
    return State(numbers, moved, state.number + 1), happened


def pairs(numbers: Numbers) -> list[str]:
    """The targets with two factors."""
    return [name[:-2] for name in numbers if name.endswith(".A") and f"{name[:-2]}.B" in numbers]


def sending(state: State, rule: Rule) -> set[str]:
    """The names of the numbers that train in the state's round: all but the factors that rest."""
    resting = {"A", "B"} - set(rule.trains(state.number))
    return state.numbers.keys() - {f"{key}.{factor}" for key in pairs(state.numbers) for factor in resting}


def made(found: Next, wanted: torch.Tensor) -> torch.Tensor:
    """The change of the weight that the next round begins with."""
    product = torch.zeros_like(wanted) if found.A is None else found.B @ found.A
    return product if found.moved is None else product + found.moved


def fault(update: Update, number: int) -> str | None:
    """Why this update cannot be used in round `number`."""
    if update.number != number:
        return f"late: it belongs to round {update.number}"
    if update.stopped == "diverged":
        return "its training diverged"
    bad = [name for name, t in update.numbers.items() if not t.isfinite().all()]
    return f"{bad[0]} holds NaN or infinite numbers" if bad else None


def check_alike(update: Update, state: State, sent: set[str]) -> None:
    """Raises ValueError for an update that does not fit the server's adapter."""
    if update.rows < 1:
        raise ValueError(f"Client {update.name!r} has no rows, so there is nothing that it could have learnt from.")
    if other := sent ^ update.numbers.keys():
        verb = "lacks" if sorted(other)[0] in sent else "also has"
        raise ValueError(f"Client {update.name!r} has other targets than the server: it {verb} {sorted(other)[0]!r}.")
    for name, t in update.numbers.items():
        if t.shape != state.numbers[name].shape:
            mine, its = tuple(state.numbers[name].shape), tuple(t.shape)
            raise ValueError(f"Client {update.name!r} sent {name!r} of shape {its}, not {mine}: is its rank another?")


def received(state: State, rule: Rule, clients: int) -> int:
    """The bytes that each client is sent after the round."""
    sent, total = sending(state, rule), 0
    for key in pairs(state.numbers):
        A, B = state.numbers[f"{key}.A"], state.numbers[f"{key}.B"]
        total += rule.sent((len(B), A.shape[1]), len(A), clients, state.number)[1] * A.element_size()
    factors = {f"{key}.{factor}" for key in pairs(state.numbers) for factor in "AB"}
    return total + sum(state.numbers[n].numel() * state.numbers[n].element_size() for n in sent - factors)


def gather(jobs: Sequence[tuple], executor: Executor | None, deadline: float | None) -> tuple[list[Update], dict]:
    """The updates that arrive, and who sent none: {name: why}."""
    updates, lost = [], {}

    def take(name: str, result: Callable[[], Update]) -> None:
        try:
            updates.append(result())
        except (OSError, BrokenExecutor) as error:  # a lost connection, a file that is gone, a dead process
            lost[name] = f"dropped out: {type(error).__name__} {error}".rstrip()

    if executor is None:
        for job in jobs:
            take(job[3].name, lambda job=job: train(*job))
        return updates, lost
    futures: dict[Future, str] = {executor.submit(train, *job): job[3].name for job in jobs}
    done, _ = wait(futures, timeout=deadline)
    for future, name in futures.items():
        if future in done:
            take(name, future.result)
        else:
            future.cancel()
            lost[name] = f"late: it took more than {deadline:g} s"
    return updates, lost


# A client ------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def seated(model: nn.Module, method: Method | Sequence[Method], state: State) -> Tuned:
    """A copy of `model` with the state's adapter, over weights to which is added what has moved into the base."""
    tuned = attach(copy.deepcopy(model), method)
    layers = tuned.adapters["default"]
    for name, p in layers.named_parameters():
        p.copy_(state.numbers[name])
    for key, moved in state.moved.items():
        layer = layers[key]
        layer.weight.add_((layer.gamma * moved).to(layer.weight))  # W ← W + γ·(what moved), a view of the copy's weight
    return tuned


def train(
    model: nn.Module,
    method: Method | Sequence[Method],
    state: State,
    client: Client,
    rule: Rule,
    plan: Plan,
    privacy: Privacy | None = None,
) -> Update:
    """One client's part of a round, on one CPU thread or where the model is. The model is left alone.

    Raises ValueError, naming the client, when it has no rows.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        data = client.data() if callable(client.data) else client.data
        rows = len(data.data["train"]) if hasattr(data, "data") and hasattr(data, "kind") else count(data)
        if not rows:
            raise ValueError(f"Client {client.name!r} has no rows to train on; leave it out.")
        tuned, sent, history = seated(model, method, state), sending(state, rule), History()
        for name, p in tuned.adapters["default"].named_parameters():
            p.requires_grad_(name in sent)
        seed = plan.seed * 1_009 + state.number
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a run that diverged says so in `stopped`
            for _ in training(tuned, as_task(data), history, replace(plan, seed=seed)):
                pass
        numbers = {n: p.detach().cpu() for n, p in tuned.adapters["default"].named_parameters() if n in sent}
        if privacy is not None:
            old = {name: state.numbers[name].cpu() for name in numbers}
            change = privacy.hide({n: t - old[n] for n, t in numbers.items()}, client.name, state.number)
            numbers = {name: old[name] + t for name, t in change.items()}
        return Update(client.name, rows, numbers, state.number, history.stopped)
    finally:
        torch.set_num_threads(threads)


def parted(pools: tuple, clients: int, difference: float, rows: int, seed: int = 0) -> list[Client]:
    """Clients with `rows` rows each, none in two, of two pools (`Dataset`s) that they mix in different shares.

    Client k of K takes the share 1/2 + difference·(k/(K−1) − 1/2) from the second pool: at 0 all are alike, at 1 the
    first has only the first pool and the last only the second. Two dialects, or the glad and the sad, are such pools.

    Raises ValueError for fewer than 2 clients, a difference outside [0, 1], and pools with too few rows.
    """
    from datasets import concatenate_datasets

    if clients < 2 or not 0 <= difference <= 1:
        raise ValueError(f"It takes 2 clients and a difference from 0 to 1, not {clients} and {difference}.")
    shares = [0.5 + difference * (k / (clients - 1) - 0.5) for k in range(clients)]
    second = [round(share * rows) for share in shares]
    takes = [[rows - n for n in second], second]
    for pool, take in zip(pools, takes, strict=True):
        if len(pool) < sum(take):
            raise ValueError(f"A pool has {len(pool)} rows, and the clients need {sum(take)}.")
    shuffled = [pool.shuffle(seed=seed) for pool in pools]
    found = []
    for k in range(clients):
        starts = [sum(take[:k]) for take in takes]
        parts = [p.select(range(s, s + t[k])) for p, s, t in zip(shuffled, starts, takes, strict=True)]
        found.append(Client(f"site {k + 1}", concatenate_datasets(parts)))
    return found


def count(data) -> int:
    """The training rows of a list of texts, a `Dataset` or a `DatasetDict`."""
    return len(data["train"]) if isinstance(data, dict) else len(data)


def epsilon(noise: float, rounds: int, delta: float = 1e-5) -> float:
    """ε of (ε, δ)-differential privacy for a client that takes part in all `rounds`, against whoever sees its updates:
    what it sends, or a change of zero in their place, are told apart no better than that. Rényi accounting by `opacus`
    (Mironov 2017). It covers one run with these settings; what was tried before it to choose them spends as well.

    Raises ModuleNotFoundError without `opacus`, and ValueError for noise of 0, which promises nothing.
    """
    if not noise > 0:
        raise ValueError(f"noise={noise} hides nothing: ε is infinite.")
    Plan(rounds)
    try:
        from opacus.accountants.analysis import rdp
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('ε is computed by opacus: run `pip install "minipeft[private]"`.') from error
    orders = [1 + x / 20 for x in range(1, 400)] + list(range(22, 512))
    spent = rdp.compute_rdp(q=1.0, noise_multiplier=noise, steps=rounds, orders=orders)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the best order is the largest, for noise that is hardly needed
        return float(rdp.get_privacy_spent(orders=orders, rdp=spent, delta=delta)[0])
