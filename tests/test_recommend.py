"""Recommending by text: the profile, the loss and the two measures, against definitions and scikit-learn; the ratings
as they come out of the package; and the shipped runs."""

from __future__ import annotations

import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score
from torch.nn import functional as F

from minipeft.course import recommend as course
from minipeft.learn.protocol import SEEDS, half_decade
from minipeft.learn.recommend import choice_loss, profiles, ranking
from minipeft.world import movies as world
from minipeft.world.real import SourceError


def made_up(people: int, films: int, seed: int, share: float = 0.3):
    generator = torch.Generator().manual_seed(seed)
    z = F.normalize(torch.randn(films, 5, generator=generator), dim=1)
    return z, torch.rand(people, films, generator=generator) < share


# The mathematics ------------------------------------------------------------------------------------------------------
@settings(max_examples=25, deadline=None)
@given(people=st.integers(1, 6), films=st.integers(1, 30), seed=st.integers(0, 99), k=st.integers(1, 12))
def test_the_measures_are_their_definitions(people, films, seed, k):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randperm(people * films, generator=generator).view(people, films).double()
    wanted, shown = (torch.rand(people, films, generator=generator) < p for p in (0.4, 0.7))
    found = wanted & shown
    if not found.any():
        with pytest.raises(ValueError, match="nothing to find"):
            ranking(scores, wanted, shown, k)
        return
    recall, ndcg = ranking(scores, wanted, shown, k)
    mine = iter(zip(recall.tolist(), ndcg.tolist(), strict=True))
    for person in range(people):
        if not found[person].any():
            continue
        best = sorted(shown[person].nonzero()[:, 0].tolist(), key=lambda film, p=person: -scores[p, film].item())[:k]
        hits = sum(found[person, film].item() for film in best)
        got = next(mine)
        assert got[0] == pytest.approx(hits / min(k, found[person].sum().item()))
        truth, said = (t[person][shown[person]][None].double().numpy() for t in (found, scores))
        if truth.shape[1] > 1:  # of one film scikit-learn says that there is nothing to rank
            assert got[1] == pytest.approx(ndcg_score(truth, said, k=k))
    assert next(mine, None) is None, "who wants nothing is left out"


def test_a_score_that_is_no_number_is_no_rank():
    with pytest.raises(ValueError, match="no number"):
        ranking(torch.tensor([[0.0, float("nan")]]), *torch.ones(2, 1, 2, dtype=torch.bool))


def test_the_loss_leaves_out_the_film_that_is_guessed_and_forgives_the_others():
    z, liked = made_up(6, 9, seed=1)
    wanted, count = 0.0, 0
    for person in range(6):
        own = liked[person].nonzero()[:, 0].tolist()
        for film in own if len(own) > 1 else ():
            p = F.normalize(z[[other for other in own if other != film]].mean(0) - z.mean(0), dim=0)
            against = [j for j in range(9) if j == film or not liked[person, j]]
            logits = (z @ p / 0.1)[against]
            wanted, count = wanted - logits.log_softmax(0)[against.index(film)], count + 1
    assert choice_loss(z, liked).item() == pytest.approx((wanted / count).item(), rel=1e-5)
    with pytest.raises(ValueError, match="take more films"):
        choice_loss(z, torch.eye(9, dtype=torch.bool)[:6])


def test_a_profile_is_the_mean_of_what_was_liked_and_nothing_for_nobody():
    z, liked = made_up(4, 8, seed=2)
    liked[2] = False
    p = profiles(z, liked)
    for person in (0, 1, 3):
        wanted = F.normalize(z[liked[person]].mean(0) - z.mean(0), dim=0)
        assert torch.allclose(p[person], wanted, atol=1e-6)
    assert not p[2].any()


# The ratings ----------------------------------------------------------------------------------------------------------
def wheel(path, item: str, inter: str):
    with zipfile.ZipFile(path, "w") as made:
        for name, text in (("item", item), ("inter", inter)):
            made.writestr(f"{world.INSIDE}.{name}", "heading\n" + text)
    return path


def test_a_small_wheel_is_read_and_a_broken_one_is_named(tmp_path, monkeypatch):
    item = "7\tUsual Suspects, The\t1995\tCrime Thriller\n3\tBabe\t1995\tComedy\n"
    path = wheel(tmp_path / "w.whl", item, "2\t7\t5\t0\n10\t3\t4\t0\n10\t7\t3\t0\n")
    monkeypatch.setattr(world, "fetch", lambda *_: path)
    found = world.movies()
    assert sorted(found.films) == ["Babe (1995): Comedy", "The Usual Suspects (1995): Crime Thriller"]
    everything = sum(liked.int() for liked in found.liked.values())
    suspects = found.films.index("The Usual Suspects (1995): Crime Thriller")
    assert everything[0, suspects] == 1 and everything[1, suspects] == 0 and everything.sum() == 2, (
        "3 stars are no like"
    )
    wheel(path, item, "2\t99\t5\t0\n")
    with pytest.raises(SourceError, match="delete that file and try again"):
        world.movies()
    path.write_bytes(b"no wheel")
    with pytest.raises(SourceError, match="delete that file and try again"):
        world.movies()


def test_nothing_of_the_test_is_in_training():
    pairs = [(person, film) for person in range(30) for film in range(60) if (person * film) % 3]
    found = world.parted([str(i) for i in range(60)], pairs, 30)
    assert sum(liked.int() for liked in found.liked.values()).sum() == len(pairs), "each like is in one split"
    assert not found.liked["train"][:, ~found.known].any(), "nobody's taste for a new film is known"
    assert not (found.new["test"] & found.new["validation"]).any() and found.known.sum() > 35
    share = (found.liked["test"] & found.known).sum() / (len(pairs) * found.known.float().mean())
    assert 0.15 < share < 0.25


@pytest.fixture(scope="module")
def real():
    try:
        return course.movies()
    except SourceError as error:
        if "No matching distribution" in str(error) and "from versions: none" in str(error):
            pytest.skip(f"offline: {error}")
        raise


def test_the_real_ratings(real):
    assert real.liked["train"].shape == (943, 1682) and sum(x.sum() for x in real.liked.values()) == 55_375
    assert "Toy Story (1995): Animation Children's Comedy" in real.films and len(real.films) == 1682


# What is shipped ------------------------------------------------------------------------------------------------------
def test_every_learning_method_has_every_seed_and_says_its_size():
    found = course.measured()
    for method in ("SVD", "text, adapted"):
        assert [run["seed"] for run in found["runs"] if run["method"] == method] == list(SEEDS)
    assert [run["seed"] for run in found["people"]] == list(SEEDS)
    assert half_decade(half_decade(found["rate"], True), False) == found["rate"]
    best = next(run["k"] for run in found["runs"] if run["method"] == "item-kNN")
    assert course.NEIGHBOURS[0] < best < course.NEIGHBOURS[-1], "chosen inside its grid"
    best = next(run["rank"] for run in found["runs"] if run["method"] == "SVD")
    assert course.FACTORS[0] < best < course.FACTORS[-1]


def test_what_needs_no_encoder_comes_out_again(real):
    runs = {run["method"]: run for run in course.measured()["runs"] if run.get("seed", 0) == 0}
    for method, scores in (
        ("popularity", course.popular(real)),
        ("item-kNN", course.neighbours(real, runs["item-kNN"]["k"])),
        ("SVD", course.factors(real, runs["SVD"]["rank"], 0)),
    ):
        for name, value in course.judged(scores, "test").items():
            assert value == pytest.approx(runs[method][name], abs=2e-3), (method, name)
