"""Tasks over the pocket world.

Each is a `Task`: a `datasets.DatasetDict`, what is measured on it, and the best possible value of that measure, known
exactly because the source of every text is known.

| task | what changes | the loss is taken over | floor of the loss | metric and its ceiling |
|---|---|---|---|---|
| pirate | words and sentence ends | whole texts | entropy of the source | – |
| forecast | the domain | whole texts | entropy of the source | – |
| cipher | every word, by a permutation | whole texts | that of the stories | – |
| flip | which events make people glad | the mood word | entropy of the mood word | accuracy of the mood, Bayes |
| answer | a new kind of question | the answer | 0 | exact match, 1 |
| facts(n) | n random facts to learn by heart | the fact's value | 0 | exact match, 1 |
| mood | classify: will the story end glad? | the class | entropy of the class | accuracy, Bayes |
| stream | plain stories turn into pirate ones | whole texts | entropy at that time | – |
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from minipeft.world import corpus

if TYPE_CHECKING:
    from datasets import DatasetDict


@dataclass(frozen=True)
class Task:
    """Data with a known best.

    `kind` says what a model is asked for and which columns there are: "text" (column `text`: the loss of every word),
    "answer" (`prompt`, `completion`: the loss of the completion) or "class" (`text`, `label`: the loss of the label).
    Pocket rows also carry `log_p`, in nats: the exact log-probability of the text, of the completion given the
    prompt, or of the label given the text.

    `data` may be given as a function, which is called when rows are first asked for: the floor is known without them.

    `floor` is the least possible mean loss, in nats a token (a class is one token); None where nobody knows it.
    `metric` is "loss" or "accuracy" (of the label, of the whole completion, or of the mood for `flip`); `ceiling` the
    best possible accuracy. `bits` is the information that `facts` asks a model to store. `classes` names the labels;
    `synonyms` the words that count as the same answer (accuracy then compares their total probabilities).
    """

    name: str
    kind: str
    data: DatasetDict | Callable[[], DatasetDict]
    floor: float | None = None
    metric: str = "loss"
    ceiling: float | None = None
    bits: float | None = None
    classes: tuple[str, ...] = ()
    synonyms: Mapping[str, tuple[str, ...]] | None = None

    def __post_init__(self) -> None:
        if callable(self.data):
            vars(self)["make"] = vars(self).pop("data")

    def __getattr__(self, name: str):
        """Only called for what is not there, so for `data` once at most."""
        if name != "data" or "make" not in vars(self):
            raise AttributeError(f"A Task has no {name!r}.")
        return vars(self).setdefault("data", self.make())

    def __getstate__(self) -> dict:
        return {field: getattr(self, field) for field in self.__dataclass_fields__}  # a function may not pickle

    def __repr__(self) -> str:
        sizes = ", ".join(f"{len(rows):,} {split}" for split, rows in self.data.items())
        known = "" if self.floor is None else f", floor {self.floor:.3f} nats a token"
        known += "" if self.ceiling is None else f", best accuracy {self.ceiling:.3f}"
        return f"Task {self.name!r} ({self.kind}: {sizes}{known})"


@dataclass(frozen=True)
class Splits:
    """`rows(n, seed)` drawn twice, when it is called; training rows whose text is also tested are dropped, so the test
    stays unbiased."""

    rows: Callable[[int, int], list[dict]]
    train: int
    test: int
    seed: int
    key: str = "text"

    def __post_init__(self) -> None:
        for name, least in (("train", 0), ("test", 1)):
            number = getattr(self, name)
            if not isinstance(number, int) or isinstance(number, bool) or number < least:
                raise ValueError(f"{name} must be a whole number of rows of at least {least}, but is {number!r}.")

    def __call__(self) -> DatasetDict:
        from datasets import Dataset, DatasetDict

        tested = self.rows(self.test, 2 * self.seed + 1)
        seen = {row[self.key] for row in tested}
        trained = [row for row in self.rows(self.train, 2 * self.seed) if row[self.key] not in seen]
        return DatasetDict(train=Dataset.from_list(trained), test=Dataset.from_list(tested))

    def first(self) -> dict:
        """The first training row alone, before any are dropped: `datasets` takes half a second to import."""
        return self.rows(1, 2 * self.seed)[0]


def _language(name: str, grammar: corpus.Grammar, train: int, test: int, seed: int) -> Task:
    def rows(n, seed):
        return [{"text": t.text, "log_p": t.log_p} for t in grammar.texts(n, seed)]

    return Task(name, "text", Splits(rows, train, test, seed), floor=grammar.floor())


@cache
def plain(train: int = 2000, test: int = 300, seed: int = 0) -> Task:
    """The pocket world's own stories, on which the base was trained: what forgetting is measured on."""
    return _language("plain", corpus.stories(), train, test, seed)


PIRATE_WORDS = dict(
    pair.split(":")
    for pair in (
        "the:th' and:an' of:o' to:t' with:wi' was:be had:'ad his:'is her:'er he:'e you:ye said:growled went:sailed "
        "walked:swaggered ran:scurried took:plundered saw:spied happy:jolly small:wee big:mighty sad:woeful good:grand "
        "morning:dawn evening:dusk night:midnight coins:doubloons"
    ).split()
)
PIRATE_STOP = "STOP = 4: . | 2: , arr ! | 2: , matey ! | 1: , yo ho ! | 1: , ye scurvy dog !"


@cache
def pirates() -> corpus.Grammar:
    """The stories as a pirate tells them: common words changed one for one, and sentences that end as they may."""
    return corpus.stories().relabel(PIRATE_WORDS).replace(PIRATE_STOP)


@cache
def pirate(train: int = 2000, test: int = 300, seed: int = 0) -> Task:
    """Style transfer: the same stories in pirate speech."""
    return _language("pirate", pirates(), train, test, seed)


@cache
def forecast(train: int = 2000, test: int = 300, seed: int = 0) -> Task:
    """Another domain: weather forecasts, in words that the base knows from the radio."""
    return _language("forecast", corpus.forecasts(), train, test, seed)


def permutation(seed: int = 0) -> dict[str, str]:
    """The cipher: a random permutation of all words of the stories."""
    words = corpus.stories().vocabulary()
    shuffled = words.copy()
    random.Random(seed).shuffle(shuffled)
    return dict(zip(words, shuffled, strict=True))


@cache
def cipher(train: int = 2000, test: int = 300, seed: int = 0) -> Task:
    """Every word replaced by another, one for one: as predictable as before, but no low-rank change away."""
    key = permutation()

    def rows(n, seed):
        texts = corpus.stories().texts(n, seed)
        return [{"text": " ".join(key[w] for w in t.text.split()), "log_p": t.log_p} for t in texts]

    return Task("cipher", "text", Splits(rows, train, test, seed), floor=corpus.stories().floor())


def _flipped() -> str:
    """The MOOD rules with glad and sad exchanged, in grammar notation."""
    other = {"glad": "sad", "sad": "glad"}
    lines = []
    for name, alternatives in corpus.stories().rules.items():
        if name.startswith("MOOD."):
            odds = [f"{round(1000 * p)}: {other[symbols[0].name]}" for p, symbols in alternatives]
            lines.append(f"{name} = " + " | ".join(odds))
    return "\n".join(lines)


BEFORE_THE_MOOD = "STORY = g~SEX k~KIND OPENING SKY ASIDE PLOT"


@cache
def flip(train: int = 2000, test: int = 300, seed: int = 0) -> Task:
    """One attribute reversed: what made people glad now makes them sad. A rank-one change of the model is enough."""
    prompts = corpus.stories().replace(f"{BEFORE_THE_MOOD} $who felt")
    whole = corpus.stories().replace(_flipped()).replace(f"{BEFORE_THE_MOOD} $who felt m~MOOD.$p.$q FEEL.$m .")

    odds = {
        name: {symbols[0].name: p for p, symbols in alternatives}
        for name, alternatives in whole.rules.items()
        if name.startswith(("MOOD.", "FEEL."))
    }

    def rows(n, seed):
        found = []
        for t in whole.texts(n, seed):
            *prompt, word, stop = t.text.split()
            kept = t.memory
            p = odds[f"MOOD.{kept['p']}.{kept['q']}"][kept["m"]] * odds[f"FEEL.{kept['m']}"][word]
            row = {"prompt": " ".join(prompt), "completion": f"{word} {stop}", "log_p": math.log(p), "text": t.text}
            found.append(row)
        return found

    floor = (whole.entropy() - prompts.entropy()) / 3  # the mood word, the full stop and the end
    return Task("flip", "answer", Splits(rows, train, test, seed), floor, "accuracy", _bayes(), synonyms=mood_words())


def mood_words() -> dict[str, tuple[str, ...]]:
    """The words for each mood: {"sad": (…), "glad": (…)}."""
    rules = corpus.stories().rules
    return {m: tuple(s[0].name for _, s in rules[f"FEEL.{m}"]) for m in ("sad", "glad")}


@cache
def _bayes() -> float:
    """Accuracy of the best possible guess of a story's mood before it is told: E[max p(mood | polarity, weather)]."""
    rules = corpus.stories().rules
    return sum(
        p * q * max(r for r, _ in rules[f"MOOD.{polarity[0].name}.{quality[0].name}"])
        for p, polarity in rules["POLARITY"]
        for q, quality in rules["QUALITY"]
    )


@cache
def mood(train: int = 2000, test: int = 300, seed: int = 0) -> Task:
    """Classification: read a story up to its feeling and say whether it ends sad (0) or glad (1).

    The odds are the grammar's own, in column `p_glad`; so the best accuracy and the least loss are known.
    """
    grammar = corpus.stories().replace(f"{BEFORE_THE_MOOD} m~MOOD.$p.$q")
    rules = grammar.rules

    def rows(n, seed):
        found = []
        for t in grammar.texts(n, seed):
            odds = {s[0].name: p for p, s in rules[f"MOOD.{t.memory['p']}.{t.memory['q']}"]}
            mood = t.memory["m"]
            label, log_p = int(mood == "glad"), math.log(odds[mood])
            found.append({"text": t.text, "label": label, "p_glad": odds["glad"], "log_p": log_p})
        return found

    floor = grammar.entropy() - corpus.stories().replace(BEFORE_THE_MOOD).entropy()
    return Task("mood", "class", Splits(rows, train, test, seed), floor, "accuracy", _bayes(), classes=("sad", "glad"))


QUESTIONS = """
QUESTION = question : ask~NEWASK QUESTION.$ask
NEWASK = colour | friend | weather
QUESTION.colour = what colour was the $t ? answer : $col .
QUESTION.friend = who else was there ? answer : $fr .
QUESTION.weather = how was the weather ? answer : GOODNESS.$q .
GOODNESS.fine = good
GOODNESS.foul = bad
"""


@cache
def answer(train: int = 2000, test: int = 300, seed: int = 0) -> Task:
    """Question answering: three kinds of question that the base never saw (a colour, a person, the weather)."""
    grammar = corpus.stories().replace(QUESTIONS)

    def rows(n, seed):
        found = []
        for t in grammar.texts(n, seed):
            *prompt, word, stop = t.text.split()
            found.append({"prompt": " ".join(prompt), "completion": f"{word} {stop}", "log_p": 0.0, "text": t.text})
        return found

    return Task("answer", "answer", Splits(rows, train, test, seed), 0.0, "accuracy", 1.0)


def facts(n: int, seed: int = 0) -> Task:
    """`n` random facts to be learnt by heart: "at the river , tom has a" → "small red compass .".

    Keys (person, place) are distinct; size, colour and thing are drawn uniformly and independently, so a fact holds
    log2(sizes · colours · things) bits and the task `n` times that. Test and training rows are the same facts: what is
    measured is how many of them a model can say.

    Raises:
        ValueError: for fewer than 1 fact, or more than there are keys.
    """
    from datasets import Dataset, DatasetDict

    def words(*families):
        rules = corpus.stories().rules
        return sorted({s[0].name for name in rules if name.split(".")[0] in families for _, s in rules[name]})

    people, places = words("NAME", "FRIEND"), words("PLACE")
    sizes, colours, things = words("SIZE"), words("COLOUR"), words("THING")
    keys = [(person, place) for person in people for place in places]
    if not isinstance(n, int) or not 1 <= n <= len(keys):
        raise ValueError(f"facts(n) needs a whole n from 1 to {len(keys):,} (people × places), but n is {n!r}.")
    rng = random.Random(seed)
    rows = []
    for person, place in rng.sample(keys, n):
        prompt = f"at the {place} , {person} has a"
        completion = f"{rng.choice(sizes)} {rng.choice(colours)} {rng.choice(things)} ."
        log_p = -math.log(len(sizes) * len(colours) * len(things))
        rows.append({"prompt": prompt, "completion": completion, "log_p": log_p, "text": f"{prompt} {completion}"})
    data = DatasetDict(train=Dataset.from_list(rows), test=Dataset.from_list(rows))
    bits = n * math.log2(len(sizes) * len(colours) * len(things))
    return Task(f"facts({n})", "answer", data, 0.0, "accuracy", 1.0, bits=bits)


@cache
def stream(train: int = 4000, test: int = 400, seed: int = 0) -> Task:
    """A drifting stream: at time t (0 to 1, column `time`) a share t of the stories is told by a pirate.

    Rows are in order of time. `log_p` is exact for the mixture at that time: log(share) + log p by the teller's
    grammar, since no text can come from both. `stream_floor(t)` is the floor at time t; the task has its mean.
    """
    tellers = (corpus.stories(), pirates())

    def rows(n, seed):
        rng, found = random.Random(seed), []
        for i in range(n):
            time = (i + 0.5) / n
            who = int(rng.random() < time)
            t = tellers[who].sample(rng)
            found.append({"text": t.text, "time": time, "log_p": t.log_p + math.log(time if who else 1 - time)})
        return found

    times = [(i + 0.5) / test for i in range(test)]
    return Task("stream", "text", Splits(rows, train, test, seed), floor=sum(map(stream_floor, times)) / test)


def stream_floor(time: float) -> float:
    """Floor of `stream` at time t in nats a token: (h(t) + (1−t)·H_plain + t·H_pirate) / expected tokens."""
    if not 0 <= time <= 1:
        raise ValueError(f"time runs from 0 to 1, but is {time!r}.")
    choice = -sum(p * math.log(p) for p in (time, 1 - time) if p)
    a, b = corpus.stories(), pirates()
    return (choice + (1 - time) * a.entropy() + time * b.entropy()) / ((1 - time) * a.length() + time * b.length())
