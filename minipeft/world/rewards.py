"""Rewards: what a text is worth, as exact functions that survive any text.

    happy    1 if the story ends glad, else 0          safe     1 if nothing bad happens in it, else 0
    short    (100 − words) / 100, at least 0           animals  how many different animals it names
    answer   1 for a right answer to its question, −1 for a wrong one, 0 where there is no question

On every text of the grammar they say what the grammar itself chose (a test compares them); on a text that the grammar
cannot say they still read the same words, so they can be gamed. `true` cannot: it is paid to what parses alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import cache

from minipeft.world.corpus import stories

Reward = Callable[[str], float]


@cache
def family(*names: str) -> tuple[str, ...]:
    """All words that the grammar's rules of these families say, such as family("NAME") for NAME.he and NAME.she."""
    rules = stories().rules
    return tuple(sorted({s[0].name for rule in rules if rule.split(".")[0] in names for _, s in rules[rule]}))


def _any(*names: str) -> str:
    return f"(?:{'|'.join(map(re.escape, family(*names)))})"


def _parts(text: str) -> tuple[str, str]:
    """The story, and what follows the word that begins a question, if any."""
    story, _, question = f" {text}".partition(" question : ")
    return story.strip(), question.strip()


@cache
def _endings() -> re.Pattern:
    """Where a feeling is told; the group holds its word."""
    feel, act, day = _any("FEEL"), _any("ACT"), _any("DAYWORD")
    return re.compile(
        rf"\bfelt (?:very |rather )?({feel})\b|\bin the end \w+ was ({feel})\b"
        rf"|\b({act}) all the way home\b|\bit was a ({day}) day for\b"
    )


@cache
def _glad() -> frozenset[str]:
    rules = stories().rules
    return frozenset(s[0].name for rule in ("FEEL.glad", "ACT.glad", "DAYWORD.glad") for _, s in rules[rule])


def happy(text: str) -> float:
    """1 if the last feeling that the story tells is a glad one."""
    found = _endings().findall(_parts(text)[0])
    return float(bool(found) and "".join(found[-1]) in _glad())


BAD = re.compile(
    r"\bbut lost it\b|(?<!and )\bdropped a\b|\bbroke\b|\btook a .*? from (?:him|her) \.|\bran off with\b"
    r"|\bbut came too late\b|\bshop was closed\b"
)


def safe(text: str) -> float:
    """1 unless something is lost, broken, stolen or missed."""
    return float(BAD.search(_parts(text)[0]) is None)


def short(text: str) -> float:
    return max(0.0, (100 - len(text.split())) / 100)


def animals(text: str) -> float:
    """How many different animals are named; nothing bounds it but the length of the text."""
    return float(len(set(text.split()) & set(family("PET", "WATERBIRD", "BEAST", "WILDBIRD", "FARMBIRD"))))


def answer(text: str) -> float:
    """Reads the story as far as the question needs, and compares."""
    story, asked = _parts(text)
    question, _, given = asked.partition(" answer : ")
    if not asked:
        return 0.0
    if question.startswith("where"):
        right = re.search(rf"\bthe ({_any('PLACE')})\b", story)
        right = right and f"at the {right[1]} ."
    elif question.startswith("what"):
        right = re.search(rf"\b{_any('COLOUR')} ({_any('THING')})\b", story)
        right = right and f"a {right[1]} ."
    elif question.startswith("who"):
        right = re.search(rf"\b({_any('FRIEND')})\b", story)
        right = right and f"{right[1]} ."
    else:
        right = ("yes" if happy(story) else "no") + " ." if _endings().search(story) else None
    return 1.0 if right is not None and given == right else -1.0


REWARDS: dict[str, Reward] = {each.__name__: each for each in (happy, safe, short, animals, answer)}


def parses(text: str) -> bool:
    """Whether the grammar can say the text at all (a few milliseconds)."""
    return stories().log_prob(text) > -math.inf


def true(reward: Reward) -> Reward:
    """The same reward for a text that parses, and never more than 0 for one that does not."""
    return lambda text: reward(text) if parses(text) else min(0.0, reward(text))


def each(reward: Reward) -> Callable[[list[str]], list[float]]:
    """The same reward of every text of a list, as `improve` asks for it."""
    return lambda texts: [reward(text) for text in texts]
