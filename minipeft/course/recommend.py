"""Films for people, from text and from what others liked: `python -m minipeft.course.recommend --folder runs`.

Everything is chosen on validation likes: neighbours, factors, learning rates. The test has two parts: films that others
have liked before ("known"), and films of which nobody's taste is known ("new"). The encoder is MiniLM, its last layer
tuned by LoRA; its five seeds vary LoRA's start and the samples. A personal adapter is LoRA of rank 1 on a small network
that scores a film for everybody; HEADS people have one each.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from minipeft.attach import Tuned, attach
from minipeft.course.notes import Notes
from minipeft.course.notes import measure as measure_parts
from minipeft.learn.protocol import SEARCH_SEED, SEEDS
from minipeft.learn.recommend import choice_loss, profiles, ranking
from minipeft.methods.lora import LoRA
from minipeft.world.movies import Movies
from minipeft.world.movies import movies as load_movies

FILE = Path(__file__).with_name("recommend.json")
STEPS, SAMPLE, RANK = 40, 256, 8
NEIGHBOURS, FACTORS = (20, 50, 100, 200, 400, 800), (4, 8, 16, 32)
HEADS, HIDDEN, HEAD_STEPS, AGAINST = 100, 64, 40, 4  # people with an adapter; films not liked to one liked

movies = cache(load_movies)


def judged(scores: torch.Tensor, split: str, people: slice = slice(None)) -> dict[str, float]:
    """recall@10 and nDCG@10 of known and of new films, means over the people, and the standard errors over them."""
    data, found = movies(), {}
    seen = data.liked["train"] | (data.liked["validation"] & data.known if split == "test" else False)
    for name, shown in (("known", data.known & ~seen), ("new", data.new[split].expand_as(seen))):
        values = ranking(scores[people], data.liked[split][people], shown[people])
        for metric, each in zip(("recall", "ndcg"), values, strict=True):
            found[f"{name} {metric}"] = round(each.mean().item(), 4)
            found[f"{name} {metric} se"] = round(each.std().item() / len(each) ** 0.5, 4)
    return found


# What others liked ----------------------------------------------------------------------------------------------------
def popular(data: Movies) -> torch.Tensor:
    return data.liked["train"].sum(0).float().expand(len(data.liked["train"]), -1)


def neighbours(data: Movies, k: int) -> torch.Tensor:
    """Σ over the films that a person liked of their cosine to this one, if it is among its k nearest (scikit-learn)."""
    from sklearn.neighbors import NearestNeighbors

    by_film = data.liked["train"].T.float().numpy()
    far, near = NearestNeighbors(n_neighbors=k + 1, metric="cosine").fit(by_film).kneighbors(by_film)
    alike = torch.zeros(len(by_film), len(by_film))
    alike.scatter_(1, torch.from_numpy(near), 1 - torch.from_numpy(far).float()).fill_diagonal_(0)
    return data.liked["train"].float() @ alike.T


def factors(data: Movies, rank: int, seed: int) -> torch.Tensor:
    """The matrix of likes cut down to its first singular vectors (scikit-learn; Cremonesi et al. 2010, "PureSVD")."""
    from sklearn.decomposition import TruncatedSVD

    svd = TruncatedSVD(rank, random_state=seed)
    people = svd.fit_transform(data.liked["train"].float().numpy())
    return torch.from_numpy(people @ svd.components_).float()


# What the text says ---------------------------------------------------------------------------------------------------
@cache
def encoder():
    """(MiniLM up to the mean of its last states, ids and mask of every film's text)."""
    from minipeft.course.upper import Upper

    upper = Upper(below=5)
    upper.classifier = nn.Identity()
    upper.requires_grad_(False)
    inputs = upper.tokenizer(movies().films, return_tensors="pt", padding=True)
    return upper.eval(), inputs["input_ids"], inputs["attention_mask"]


def read(model: nn.Module, films: torch.Tensor) -> torch.Tensor:
    """z of length 1 (films, 384) of the films with these numbers."""
    _, ids, mask = encoder()
    width = int(mask[films].sum(1).max())
    return F.normalize(model(ids[films, :width], mask[films, :width]).logits, dim=1)


@torch.no_grad()
def everything(model: nn.Module) -> torch.Tensor:
    return torch.cat([read(model, part) for part in torch.arange(len(movies().films)).split(256)])


def by_text(z: torch.Tensor) -> torch.Tensor:
    return profiles(z, movies().liked["train"]) @ z.T


def learn(lr: float, seed: int, steps: int = STEPS) -> tuple[torch.Tensor, list[float], int]:
    """(z of all films from an encoder that learnt from the likes of known films, its losses, the numbers trained)."""
    data, (upper, *_) = movies(), encoder()
    tuned = attach(upper, LoRA(rank=RANK, targets=re.compile(r"above\..*(query|key|value|dense)")), seed=seed)
    try:
        optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
        generator, known, losses = torch.Generator().manual_seed(seed), data.known.nonzero()[:, 0], []
        for _ in range(steps):
            films = known[torch.randperm(len(known), generator=generator)[:SAMPLE]]
            loss = choice_loss(read(tuned, films), data.liked["train"][:, films])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return everything(tuned), losses, tuned.count().trainable
    finally:
        tuned.detach()


# An adapter for each person -------------------------------------------------------------------------------------------
def for_all(z: torch.Tensor, seed: int, steps: int = 300) -> nn.Module:
    """A network that scores a film for everybody: how likely is it that a person likes it, by its text alone?"""
    data = movies()
    share = data.liked["train"].float().mean(0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = nn.Sequential(nn.Linear(z.shape[1], HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 1))
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    for _ in range(steps):
        loss = F.binary_cross_entropy_with_logits(head(z[data.known])[:, 0], share[data.known])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head.requires_grad_(False).eval()


def personal(head: nn.Module, z: torch.Tensor, person: int, lr: float, seed: int) -> Tuned:
    """LoRA of rank 1 on the network: this person's films against others, AGAINST to one, drawn anew each step."""
    data = movies()
    liked = data.liked["train"][person].nonzero()[:, 0]
    others = (data.known & ~data.liked["train"][person]).nonzero()[:, 0]
    tuned = attach(head, LoRA(rank=1), seed=seed)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed * 1009 + person)
    for _ in range(HEAD_STEPS):
        drawn = others[torch.randint(len(others), (AGAINST * len(liked),), generator=generator)]
        right = (tuned(z[liked])[:, 0, None] - tuned(z[drawn])[:, 0].view(len(liked), AGAINST)).flatten()
        loss = -F.logsigmoid(right).mean()  # Bayesian personalised ranking (Rendle et al. 2009)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return tuned.eval()


def with_adapters(z: torch.Tensor, lr: float, seed: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(scores of the first HEADS people for all films, everybody's scores, numbers of one adapter)."""
    head, found, count = for_all(z, seed), [], 0
    for person in range(HEADS):
        tuned = personal(head, z, person, lr, seed)
        with torch.no_grad():
            found.append(tuned(z)[:, 0])
        count = tuned.count().trainable
        tuned.detach()
    return torch.stack(found), head(z)[:, 0].expand(HEADS, -1), count


# The parts ------------------------------------------------------------------------------------------------------------
def measure(notes: Notes) -> dict:
    data = movies()

    def best(make: Callable, grid: tuple[int, ...]) -> int:
        return max(grid, key=lambda n: judged(make(n), "validation")["known ndcg"])

    k, rank = best(lambda n: neighbours(data, n), NEIGHBOURS), best(lambda n: factors(data, n, SEARCH_SEED), FACTORS)
    runs = [{"method": "popularity"} | judged(popular(data), "test"), {"method": "item-kNN", "k": k}]
    runs[-1] |= judged(neighbours(data, k), "test")
    runs += [{"method": "SVD", "rank": rank, "seed": s} | judged(factors(data, rank, s), "test") for s in SEEDS]
    luck = torch.rand(data.liked["test"].shape, generator=torch.Generator().manual_seed(SEARCH_SEED))
    runs.append({"method": "chance"} | judged(luck, "test"))
    still = everything(encoder()[0])
    runs.append({"method": "text, frozen"} | judged(by_text(still), "test"))

    def lost(found: dict) -> float:
        return -statistics.fmean(found[f"{name} ndcg"] for name in ("known", "new"))

    lr = notes.best_rate(
        "text", lambda lr: lost(judged(by_text(learn(lr, SEARCH_SEED)[0]), "validation")), (1e-3, 3e-3)
    )
    first, zs = slice(0, HEADS), {}

    def adapted(seed: int) -> torch.Tensor:
        if seed not in zs:
            zs[seed] = learn(lr, seed)[0]
        return zs[seed]

    def personally(head_lr: float, seed: int, split: str) -> dict:
        z = adapted(seed)
        mine, all_alike, count = with_adapters(z, head_lr, seed)
        ways = {"one network": all_alike, "adapters": mine, "profile": by_text(z)[first]}
        return {way: padded(scores, split) for way, scores in ways.items()} | {"numbers": count}

    def padded(scores: torch.Tensor, split: str) -> dict:
        whole = torch.zeros_like(popular(data))
        whole[first] = scores
        return judged(whole, split, first)

    head_lr = notes.best_rate(
        "head", lambda lr: lost(personally(lr, SEARCH_SEED, "validation")["adapters"]), (1e-2, 3e-2)
    )
    people = []
    for seed in SEEDS:
        runs.append(
            {"method": "text, adapted", "seed": seed}
            | notes.get(f"text {seed}", lambda s=seed: judged(by_text(adapted(s)), "test"))
        )
        people.append({"seed": seed} | notes.get(f"heads {seed}", lambda s=seed: personally(head_lr, s, "test")))
    counts = {split: int(liked.sum()) for split, liked in data.liked.items()}
    size = {
        "people": len(data.liked["train"]),
        "films": len(data.films),
        "known": int(data.known.sum()),
        "liked": counts,
    }
    size |= {"new": {split: int(new.sum()) for split, new in data.new.items()}}
    return {"runs": runs, "people": people, "rate": lr, "head rate": head_lr, "size": size}


def measured() -> dict:
    """What `measure` found when the course was made."""
    return json.loads(FILE.read_text(encoding="utf-8"))["films"]


if __name__ == "__main__":
    measure_parts(FILE, {"films": measure}, __doc__.splitlines()[0])
