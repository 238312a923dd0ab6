"""Lesson 13's measurements, run once and shipped: `python -m minipeft.course.feedback [part …]`.

One budget everywhere: policies take STEPS steps on BATCH stories, reward models JUDGE's steps. Seeds 1 to 5 are
reported; seed 100 only shows what other learning rates would give. The reward is a happy ending, exact or learnt from
pairs of stories that a simulated rater compared.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

from minipeft.attach import Tuned, attach
from minipeft.learn.feedback import integrated
from minipeft.learn.plan import Plan
from minipeft.learn.policy import Trail, improve
from minipeft.learn.reward import Pair, RewardModel, agreement, fit_reward, renamed, simulate
from minipeft.learn.rollouts import divergence, log_probs, roll_out
from minipeft.methods.lora import LoRA
from minipeft.whole import write_whole
from minipeft.world import corpus, load, rewards, write

FILE = Path(__file__).with_name("feedback.json")
SEEDS, CHOOSING = (1, 2, 3, 4, 5), 100
STEPS, BATCH, FRESH = 24, 24, 128
JUDGE = {"steps": 30, "batch": 12}


def drafts(n: int, seed: int) -> list[tuple[str, str, str]]:
    """`n` pairs of independent stories of the grammar, still to be rated."""
    texts = [t.text for t in corpus.stories().texts(2 * n, seed)]
    return [("", *texts[i : i + 2]) for i in range(0, 2 * n, 2)]


def rated(n: int, seed: int, noise: float = 0.0) -> list[Pair]:
    """`n` pairs of which one story ends glad and one sad."""
    return simulate(rewards.happy, drafts(4 * n + 40, seed), noise, seed)[:n]


def beginnings(n: int, seed: int) -> list[str]:
    """Stories up to where somebody is about to feel something."""
    grammar = corpus.stories().replace("STORY = g~SEX k~KIND OPENING SKY ASIDE PLOT")
    return [t.text for t in grammar.texts(n, seed)]


def continued(model, n: int, seed: int) -> list[tuple[str, str, str]]:
    """`n` beginnings, each with two continuations that the model wrote."""
    found = []
    for i, prompt in enumerate(beginnings(n, seed)):
        first, second = (
            text.removeprefix(prompt).strip() for text in write(model, model.tokenizer, prompt, 2, seed + i)
        )
        found.append((prompt, first, second))
    return found


def judge(pairs: list[Pair], seed: int, lr: float = 3e-3, rank: int = 8) -> RewardModel:
    return fit_reward(load("pocket")[0], pairs, Plan(lr=lr, seed=seed, **JUDGE), LoRA(rank=rank))[0]


@torch.no_grad()
def look(tuned: Tuned, seed: int, n: int = FRESH) -> dict[str, float]:
    """What `n` fresh stories of the model are worth: means of the exact rewards, and nats from the base."""
    written = roll_out(tuned, [""], n, 900_000 + seed)
    _, every = log_probs(tuned, written)
    with tuned.disabled():
        _, base = log_probs(tuned, written)
    texts = written.texts
    found = {name: sum(map(rewards.REWARDS[name], texts)) / n for name in ("happy", "safe", "animals")}
    found |= {f"true {name}": sum(map(rewards.true(rewards.REWARDS[name]), texts)) / n for name in ("happy", "animals")}
    found |= {"parses": sum(map(rewards.parses, texts)) / n, "kl": divergence(every, base, written.mask).mean().item()}
    return {name: round(value, 4) for name, value in found.items()}


def policy(
    reward: Callable, seed: int, lr: float, rank: int = 8, beta: float = 0.1, tuned: Tuned | None = None
) -> tuple[Tuned, Trail, list[list[float]], list[str]]:
    """(the tuned model, its trail, what each step's stories are truly worth, the first story of each step)."""
    tuned, seen, stories = tuned or attach(load("pocket")[0], LoRA(rank=rank), seed=seed), [], []

    def callback(step, trail, rollouts):
        texts = rollouts.texts
        mean = [sum(map(f, texts)) / len(texts) for f in (rewards.happy, rewards.true(rewards.happy), rewards.parses)]
        seen.append([round(v, 4) for v in (trail.rewards[-1], *mean, trail.kl[-1])])
        stories.append(texts[0])

    trail = improve(tuned, reward, plan=Plan(STEPS, lr, BATCH, seed), beta=beta, callback=callback, progress=False)
    return tuned, trail, seen, stories


# the parts -----------------------------------------------------------------------------------------------------------
def judges(report: Callable) -> dict:
    """Agreement of reward models with held-out pairs, by number of pairs and the rater's noise; and calibration."""
    held_out, noisy = rated(150, 50_000), rated(300, 60_000, noise=0.2)
    rates = {}
    for rank in (8, 64):
        by_rate = {lr: agreement(judge(rated(30, CHOOSING), CHOOSING, lr, rank), held_out) for lr in (1e-3, 3e-3, 1e-2)}
        rates[str(rank)] = {f"{lr:g}": value for lr, value in by_rate.items()}
        report(f"judge r={rank}: {rates[str(rank)]}")
    runs, points = [], []
    for n, noise in ((30, 0.0), (300, 0.2)):
        for seed in SEEDS:
            model = judge(rated(n, seed, noise), seed)
            runs.append({"pairs": n, "noise": noise, "seed": seed, "agreement": round(agreement(model, held_out), 4)})
            report(runs[-1])
            if n == 300:
                points.append({"seed": seed, "differences": [round(d, 3) for d in model.differences(noisy)]})
    return {"rates": rates, "runs": runs, "calibration": points, "first": [p.better == "first" for p in noisy]}


def hacking(report: Callable) -> dict:
    """Proxy against truth, step by step: [proxy, happy, happy and parses, parses, KL] of each step's stories."""
    settings = {
        "30 pairs": {"pairs": 30, "rank": 8, "lr": 3e-3, "beta": 0.0},
        "30 pairs, β = 0.1": {"pairs": 30, "rank": 8, "lr": 3e-3, "beta": 0.1},
        "30 pairs, β = 1": {"pairs": 30, "rank": 8, "lr": 3e-3, "beta": 1.0},
        "30 pairs, larger judge": {"pairs": 30, "rank": 64, "lr": 1e-3, "beta": 0.0},
        "300 pairs": {"pairs": 300, "rank": 8, "lr": 3e-3, "beta": 0.0},
    }
    runs = []
    for seed in SEEDS:
        known: dict[tuple, RewardModel] = {}
        for name, s in settings.items():
            key = (s["pairs"], s["rank"])
            if key not in known:
                known[key] = judge(rated(s["pairs"], seed), seed, s["lr"], s["rank"])
            _, trail, seen, stories = policy(known[key].score, seed, 1e-2, beta=s["beta"])
            runs.append({"setting": name, "seed": seed, "stopped": trail.stopped, "trace": seen})
            if (name, seed) == ("30 pairs", SEEDS[0]):
                runs[-1]["stories"] = stories
            report(f"{name}, seed {seed}: {seen[len(seen) // 2]} {seen[-1]}")
    return {"settings": settings, "runs": runs}


def sums(report: Callable) -> dict:
    """Two subtasks, their sum under every α, and one adapter trained for both rewards at once."""
    grid = [(a, b) for a in (0.0, 1.0, 1.5) for b in (0.0, 1.0, 1.5)]
    corners = [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)]

    def both(texts: list[str]) -> list[float]:
        return [rewards.happy(text) + rewards.animals(text) for text in texts]

    runs, cosines = [], []
    for seed in SEEDS:
        tuned = attach(load("pocket")[0], LoRA(rank=8), name="both", seed=seed)
        policy(both, seed, 3e-3, tuned=tuned)
        runs.append({"seed": seed, "α": "joint"} | look(tuned, seed))
        report(runs[-1])
        for name, reward in (("happy", rewards.happy), ("animals", rewards.animals)):
            tuned.add(name, LoRA(rank=8), seed=seed)
            tuned.use(name)
            policy(rewards.each(reward), seed, 3e-3, tuned=tuned)
        one, two = deltas(tuned, "happy"), deltas(tuned, "animals")
        cosines.append(round((one @ two / one.norm() / two.norm()).item(), 4))
        for alphas in grid if seed == SEEDS[0] else corners:
            with integrated(tuned, dict(zip(("happy", "animals"), alphas, strict=True))):
                runs.append({"seed": seed, "α": list(alphas)} | look(tuned, seed))
            report(runs[-1])
    return {"runs": runs, "cosines": cosines}


def deltas(tuned: Tuned, name: str) -> torch.Tensor:
    """Δθ of one adapter as one long vector."""
    tuned.use(name)
    return torch.cat([delta.flatten() for delta in tuned.deltas().values()])


def clicks(report: Callable) -> dict:
    """Ten preferences between two continuations of one beginning, or between two unrelated stories."""
    base, held_out, runs = load("pocket")[0], rated(300, 50_000), []
    for seed in SEEDS:
        same = simulate(rewards.happy, continued(base, 40, 7000 * seed), seed=seed)[:10]
        for kind, pairs in (("one beginning", same), ("unrelated", rated(10, seed))):
            more = pairs + [renamed(pair, 100 * seed + i) for i in range(6) for pair in pairs]
            model = judge(more, seed)
            found = {"pairs": kind, "seed": seed, "agreement": round(agreement(model, held_out), 4)}
            if kind == "one beginning":
                tuned, trail, *_ = policy(model.score, seed, 3e-3)
                found |= {"stopped": trail.stopped} | look(tuned, seed)
            runs.append(found)
            report(runs[-1])
    return {"runs": runs}


PARTS = {each.__name__: each for each in (judges, hacking, sums, clicks)}


def measured() -> dict:
    """What the parts found when the course was made."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    found = measured() if FILE.exists() else {}
    for name in names or PARTS:
        started = time.process_time()
        found[name] = PARTS[name](lambda line: print(line, flush=True))
        found[name]["measured"] = {
            "device": f"CPU, 1 thread ({platform.machine()})",
            "torch": torch.__version__,
            "python": platform.python_version(),
            "date": date.today().isoformat(),
            "CPU seconds": round(time.process_time() - started),
        }
        write_whole(FILE, json.dumps(found, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
