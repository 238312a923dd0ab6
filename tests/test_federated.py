"""Federated LoRA: every rule against its definition in numpy, refusals by name, and executors that change nothing."""

from __future__ import annotations

import math
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minipeft as mp
from minipeft.learn import averaging
from minipeft.learn.averaging import RULES
from minipeft.learn.federated import (
    Client,
    Privacy,
    State,
    Update,
    aggregate,
    epsilon,
    federate,
    fresh,
    parted,
    seated,
    train,
)
from minipeft.learn.plan import Plan
from minipeft.world import tasks

PLAN = Plan(steps=2, lr=1e-2, batch=4)
METHOD = mp.LoRA(rank=2)


def clients(sizes=(9, 5, 7)) -> list[Client]:
    several = (tasks.pirate(60, 8), tasks.forecast(60, 8), tasks.plain(60, 8))
    names = ("zoë", "Amt 10", "b")
    return [
        Client(name, task.data["train"].select(range(n))) for name, task, n in zip(names, several, sizes, strict=True)
    ]


def drawn(seed: int, ranks: tuple[int, ...], d_out: int, d_in: int) -> list[averaging.Pair]:
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(r, d_in, generator=g), torch.randn(d_out, r, generator=g)) for r in ranks]


def as_numpy(pairs, weights):
    """Every definition once more, in numpy and float64: (Ā, B̄, ΔW*); one rank for all, but for ΔW*."""
    A, B = ([np.asarray(p[i], dtype=np.float64) for p in pairs] for i in (0, 1))
    total = sum(w * b @ a for w, a, b in zip(weights, A, B, strict=True))
    if len({a.shape for a in A}) > 1:
        return None, None, total
    return np.tensordot(weights, np.stack(A), 1), np.tensordot(weights, np.stack(B), 1), total


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    k=st.integers(1, 5),
    r=st.integers(1, 4),
    d_out=st.integers(4, 9),
    d_in=st.integers(4, 9),
)
def test_each_rule_is_its_definition(seed, k, r, d_out, d_in):
    pairs, rows = drawn(seed, (r,) * k, d_out, d_in), np.random.default_rng(seed).integers(1, 50, k).tolist()
    weights = averaging.shares(rows)
    A, B, total = as_numpy(pairs, np.array(rows) / np.sum(rows))
    size = 1e-6 * max(1.0, np.abs(total).max())
    for rule in RULES.values():
        found = rule.combine(pairs, weights, r)
        product = 0 if found.A is None else np.asarray(found.B @ found.A)
        whole = product + (0 if found.moved is None else np.asarray(found.moved))
        if rule.name in ("fedit", "ffa", "rolora"):
            assert np.abs(np.asarray(found.A) - A).max() < 1e-6 and np.abs(np.asarray(found.B) - B).max() < 1e-6
            assert found.moved is None
        elif rule.name == "flexlora":
            U, sigma, Vt = np.linalg.svd(total)
            assert np.abs(whole - U[:, :r] * sigma[:r] @ Vt[:r]).max() < size
        else:
            assert np.abs(whole - total).max() < size
    A, B = averaging.stacked(pairs, weights)
    assert A.shape == (k * r, d_in) and np.abs(np.asarray(B @ A) - total).max() < size


def test_which_rules_are_exact_is_measured():
    """`exact` says of a rule what its rounds say of themselves: with A shared where it rests, nothing is missed."""
    pairs, weights = drawn(0, (2, 2, 2), 7, 6), averaging.shares([3, 1, 2])
    shared = [(pairs[0][0], B) for _, B in pairs]
    for rule in RULES.values():
        given_ = shared if "A" not in rule.trains(0) else pairs
        found, wanted = rule.combine(given_, weights, 2), averaging.mean_product(given_, weights)
        product = 0 if found.A is None else found.B @ found.A
        missed = (product + (0 if found.moved is None else found.moved) - wanted).norm() / wanted.norm()
        assert (missed < 1e-12) == rule.exact, rule.name


def test_svd_at_full_rank_is_exact_and_ranks_may_differ():
    pairs, weights = drawn(1, (1, 3, 2), 5, 8), averaging.shares([4, 4, 1])
    total = as_numpy(pairs, weights)[2]
    A, B = averaging.cut(averaging.mean_product(pairs, weights), 5)
    assert A.shape == (5, 8) and np.abs(np.asarray(B @ A) - total).max() < 1e-12
    for rank in (0, 6):
        with pytest.raises(ValueError, match="between 1 and 5"):
            averaging.cut(averaging.mean_product(pairs, weights), rank)
    with pytest.raises(ValueError, match="one shape"):
        averaging.mean_factors(pairs, weights)
    with pytest.raises(ValueError, match="at least one row"):
        averaging.shares([3, 0])
    with pytest.raises(ValueError, match="fedit, ffa"):
        averaging.rule_of("fedavg")


def test_bytes_of_a_round():
    """At 4096×4096, r=8, four clients: A and B are 65,536 numbers; a stack of four is four times that."""
    sent = {name: rule.sent((4096, 4096), 8, 4, 0) for name, rule in RULES.items()}
    assert sent["fedit"] == sent["flexlora"] == (65_536, 65_536)
    assert sent["ffa"] == sent["rolora"] == (32_768, 32_768)
    assert sent["flora"] == sent["fedex"] == (65_536, 262_144)
    assert RULES["rolora"].sent((10, 6), 2, 4, 1) == (12, 12)
    assert RULES["flora"].sent((10, 6), 2, 40, 0) == (32, 60) and RULES["fedex"].sent((10, 6), 2, 40, 0) == (32, 92)


def made_up(state: State, names=("b", "a", "c"), rows=(3, 5, 1)) -> list[Update]:
    g = torch.Generator().manual_seed(5)
    return [
        Update(name, n, {k: torch.randn(t.shape, generator=g) for k, t in state.numbers.items()}, state.number)
        for name, n in zip(names, rows, strict=True)
    ]


@pytest.mark.parametrize("name", ("llama", "gpt2", "classifier"))
@pytest.mark.parametrize("rule", ("fedit", "flexlora", "flora", "fedex"))
def test_what_the_model_becomes(name, rule):
    """The next round's model computes with W + γ·(mean of the products), whichever rule says so exactly: on Conv1D
    (stored the other way round), on grouped queries, on slices of a fused projection, and with a head beside."""
    model, head = tiny.MODELS[name](), [mp.Softmax()] if name == "classifier" else []
    method = [mp.LoRA(rank=2, gamma=0.5), *head]
    before = tiny.snapshot(model)
    state = State(fresh(model, method, 0))
    updates = made_up(state)
    state, happened = aggregate(state, updates, RULES[rule], restart=lambda: fresh(model, method, 1))
    tuned = seated(model, method, state)
    weights = np.array([u.rows for u in updates]) / 9
    for key, layer in tuned.adapters["default"].items():
        if layer.slots:
            wanted = sum(w * u.numbers[f"{key}.value"] for w, u in zip(weights, updates, strict=True))
            assert torch.allclose(layer.value, wanted.float(), atol=1e-6)
            continue
        pairs = [(u.numbers[f"{key}.A"], u.numbers[f"{key}.B"]) for u in updates]
        A, B, total = as_numpy(pairs, weights)
        old = mp.attach(model, method)
        was = old.adapters["default"][key].weight.detach().clone()
        old.detach()
        got = np.asarray((layer.weight - was).detach() + layer.delta().detach())
        U, sigma, Vt = np.linalg.svd(total)
        wanted = {"fedit": B @ A, "flexlora": U[:, :2] * sigma[:2] @ Vt[:2]}.get(rule, total)
        assert np.abs(got - 0.5 * wanted).max() < 1e-5 * max(1.0, np.abs(wanted).max()), (key, rule)
    assert tiny.same(tiny.snapshot(model), before)
    assert (happened.missed < 1e-6) == RULES[rule].exact and happened.used == ("a", "b", "c")


def test_order_of_clients_and_of_rounds():
    model = tiny.small()
    state = State(fresh(model, METHOD, 0))
    updates = made_up(state)
    one, two = (aggregate(state, each, RULES["fedex"])[0] for each in (updates, updates[::-1]))
    assert tiny.same(one.numbers, two.numbers) and tiny.same(one.moved, two.moved) and one.number == 1
    assert not tiny.same(aggregate(state, made_up(state, rows=(3, 5, 2)), RULES["fedit"])[0].numbers, one.numbers)


def test_a_resting_factor_is_neither_sent_nor_moved():
    model, many = tiny.small(), clients()
    for rule, rests in (("ffa", ".A"), ("rolora", ".A")):
        start = fresh(model, METHOD, PLAN.seed)
        seen = []
        federate(model, METHOD, many, rule, 2, PLAN, watch=lambda done, seen=seen: seen.append(done.state.numbers))
        first, second = seen
        assert all(torch.equal(first[n], start[n]) == n.endswith(rests) for n in start)
        moves = ".B" if rule == "ffa" else ".A"
        assert all(torch.equal(second[n], first[n]) != n.endswith(moves) for n in start)
    half = sum(t.numel() * 4 for n, t in start.items() if n.endswith(".B"))
    update = train(model, METHOD, State(start), many[0], RULES["ffa"], PLAN)
    assert update.bytes == half and {n[-2:] for n in update.numbers} == {".B"}


def test_one_client_alone_is_fit():
    """One client, one round, averaged with nobody, is what `fit` does with the same rows and seed."""
    model, client = tiny.small(), clients()[0]
    done = federate(model, METHOD, [client], rounds=1, plan=PLAN)
    tuned = mp.attach(model, METHOD, seed=PLAN.seed)
    mp.fit(tuned, client.data, steps=2, lr=1e-2, batch=4, seed=PLAN.seed * 1009, progress=False)
    for name, p in tuned.adapters["default"].named_parameters():
        assert torch.equal(done.state.numbers[name], p)
    tuned.detach()


def gone():
    raise ConnectionError("no route to the site")


def slow():
    time.sleep(1.0)
    return clients()[0].data


def test_who_cannot_be_used_is_refused_by_name():
    model, many = tiny.small(), clients()
    state = State(fresh(model, METHOD, 0), number=3)
    updates = made_up(state)
    key = next(iter(state.numbers))
    updates[0].numbers[key][0, 0] = math.nan
    updates[1] = replace(updates[1], number=2)
    after, happened = aggregate(state, updates, RULES["fedit"], {"d": "dropped out: ConnectionError"})
    assert happened.used == ("c",) and set(happened.refused) == {"a", "b", "d"}
    assert happened.refused["b"] == f"{key} holds NaN or infinite numbers"
    assert happened.refused["a"] == "late: it belongs to round 2"
    assert all(torch.equal(after.numbers[n], t) for n, t in updates[2].numbers.items())
    with pytest.raises(ValueError, match="No client's update.*round 3.*b: .*NaN"):
        aggregate(state, updates[:2], RULES["fedit"])
    with pytest.raises(ValueError, match="'c' has no rows"):
        aggregate(state, [replace(updates[2], rows=0)], RULES["fedit"])
    other = State(fresh(model, mp.LoRA(rank=3), 0), number=3)
    with pytest.raises(ValueError, match="'a' sent .* is its rank another"):
        aggregate(state, made_up(other), RULES["fedit"])
    fewer = State(fresh(model, mp.LoRA(rank=2, targets="attention"), 0), number=3)
    with pytest.raises(ValueError, match="'a' has other targets.*lacks"):
        aggregate(state, made_up(fewer), RULES["fedit"])
    done = federate(model, METHOD, [*many, Client("far", gone)], rounds=1, plan=PLAN)
    assert done.rounds[0].refused == {"far": "dropped out: ConnectionError no route to the site"}
    with ThreadPoolExecutor(4) as pool:
        done = federate(
            model, METHOD, [many[1], Client("slow", slow)], rounds=1, plan=PLAN, executor=pool, deadline=0.8
        )
    assert done.rounds[0].refused == {"slow": "late: it took more than 0.8 s"}
    with pytest.raises(ValueError, match="far: dropped out"):
        federate(model, METHOD, [Client("far", gone)], rounds=1, plan=PLAN)


def test_wrong_settings_say_what_to_do():
    model, many = tiny.small(), clients()
    for call, message in (
        (lambda: federate(model, METHOD, []), "names of their own"),
        (lambda: federate(model, METHOD, [many[0], many[0]]), "names of their own"),
        (lambda: federate(model, METHOD, many, deadline=1.0), "needs an executor"),
        (lambda: federate(model, METHOD, many, "avg"), "no rule 'avg'"),
        (lambda: federate(model, METHOD, many, rounds=0), "at least 1"),
        (lambda: federate(model, METHOD, [Client("e", many[0].data.select([]))], rounds=1), "'e' has no rows"),
        (lambda: federate(model, mp.DoRA(rank=2), many, "fedex"), "averages γ·B·A"),
        (lambda: federate(model, mp.LoRA(rank=2, targets=["embed_tokens"]), many, "ffa"), "zero; leave it out"),
        (lambda: federate(mp.quantize(tiny.small()), METHOD, many, "flora"), "packed"),
        (lambda: Privacy(0.0, 1.0), "clip must be positive"),
        (lambda: epsilon(0.0, 3), "infinite"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not hasattr(model, "_tuned")


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_learns_and_leaves_the_model_alone(rule):
    model, many = mp.load("pocket")[0], clients((12, 12, 12))
    before = tiny.snapshot(model)
    done = federate(model, METHOD, many, rule, rounds=2, plan=Plan(steps=4, lr=1e-2, batch=4))
    assert tiny.same(tiny.snapshot(model), before)
    tuned = done.tuned(model)
    assert mp.evaluate(tuned, many[0].data).loss < mp.evaluate(model, many[0].data).loss - 0.3
    assert [r.number for r in done.rounds] == [0, 1] and all(len(r.used) == 3 for r in done.rounds)
    assert (max(r.missed for r in done.rounds) < 1e-6) == RULES[rule].exact


def test_other_methods_are_averaged_number_by_number():
    model, many = tiny.small(), clients()
    done = federate(model, mp.Adapter(2), many[:2], rounds=1, plan=PLAN)
    start = State(fresh(model, mp.Adapter(2), 0))
    a, b = (train(model, mp.Adapter(2), start, c, RULES["fedit"], PLAN) for c in many[:2])
    for name, got in done.state.numbers.items():
        wanted = (9 * a.numbers[name].double() + 5 * b.numbers[name].double()) / 14
        assert torch.allclose(got, wanted.float(), atol=1e-7)


@pytest.mark.slow
def test_executors_change_nothing():
    """Threads, processes and Dask: the same numbers, bit for bit."""
    distributed = pytest.importorskip("distributed")
    model, many = tiny.small(), clients()
    here = federate(model, METHOD, many, "fedex", 2, PLAN).state

    def check(executor):
        there = federate(model, METHOD, many, "fedex", 2, PLAN, executor).state
        assert tiny.same(there.numbers, here.numbers) and tiny.same(there.moved, here.moved)

    with ThreadPoolExecutor(3) as pool:
        check(pool)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        check(pool)
    with distributed.Client(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None) as cluster:
        check(cluster.get_executor())


def test_parted_by_dialect_and_by_mood():
    pirate, plain = tasks.pirate(60, 8).data["train"], tasks.plain(60, 8).data["train"]
    for difference, wanted in ((0.0, [5, 5, 5]), (0.5, [2, 5, 8]), (1.0, [0, 5, 10])):
        found = parted((plain, pirate), 3, difference, 10, seed=1)
        texts = [set(c.data["text"]) for c in found]
        assert [len(t & set(pirate["text"])) for t in texts] == wanted and {len(c.data) for c in found} == {10}
        assert not texts[0] & texts[1] and not texts[1] & texts[2]
    mood = tasks.mood(60, 8).data["train"]
    sad, glad = (mood.filter(lambda row, m=m: row["label"] == m) for m in (0, 1))
    assert [sum(c.data["label"]) for c in parted((sad, glad), 2, 1.0, 6)] == [0, 6]
    for settings_, message in (
        ((1, 0.5, 4), "2 clients"),
        ((2, 1.5, 4), "from 0 to 1"),
        ((3, 1.0, 900), "has 6. rows|need"),
    ):
        with pytest.raises(ValueError, match=message):
            parted((plain, pirate), *settings_)


def test_privacy_clips_and_hides():
    change = {"a": torch.full((40, 50), 3.0), "b": torch.ones(7)}
    length = math.sqrt(9 * 2000 + 7)
    cut = Privacy(2.0, 0.0).hide(change, "x", 0)
    assert torch.allclose(cut["a"], change["a"] * 2 / length) and torch.allclose(cut["b"], change["b"] * 2 / length)
    assert torch.equal(Privacy(1e6, 0.0).hide(change, "x", 0)["a"], change["a"])
    zero = {"a": torch.zeros(200, 300)}
    noise = Privacy(2.0, 1.5).hide(zero, "x", 0)["a"]
    assert abs(noise.std().item() / 3.0 - 1) < 0.02 and abs(noise.mean().item()) < 0.05
    same = Privacy(2.0, 1.5).hide(zero, "x", 0)["a"]
    others = [Privacy(2.0, 1.5).hide(zero, *who)["a"] for who in (("y", 0), ("x", 1))]
    others += [Privacy(2.0, 1.5, s).hide(zero, "x", 0)["a"] for s in (1, None, None)]
    assert torch.equal(noise, same)
    assert not any(torch.equal(p, q) for i, p in enumerate([noise, *others]) for q in others[i:])


def test_a_private_round_sends_only_what_was_clipped():
    model, client = tiny.small(), clients()[0]
    start = State(fresh(model, METHOD, 0))
    sent = train(model, METHOD, start, client, RULES["ffa"], PLAN, Privacy(0.01, 0.0))
    change = torch.cat([(t - start.numbers[n]).flatten().double() for n, t in sent.numbers.items()])
    assert abs(change.norm().item() - 0.01) < 1e-5


def test_epsilon_against_the_closed_form():
    """T rounds of noise σ are one of σ/√T, whose exact δ(ε) is Balle and Wang's (2018, Theorem 8); Rényi's bound lies
    above it, and not far."""
    pytest.importorskip("opacus")
    from scipy.optimize import brentq
    from scipy.stats import norm

    for noise, rounds, delta in ((1.0, 1, 1e-5), (4.0, 10, 1e-5), (2.0, 30, 1e-6)):
        mu = math.sqrt(rounds) / noise

        def spent(e, mu=mu):
            return norm.cdf(mu / 2 - e / mu) - math.exp(e) * norm.cdf(-mu / 2 - e / mu)

        exact = brentq(lambda e, delta=delta: spent(e) - delta, 0.01, 200)
        assert exact <= epsilon(noise, rounds, delta) <= 1.12 * exact
    assert epsilon(1.0, 5) > epsilon(2.0, 5) > epsilon(2.0, 2)
