"""The pocket world: a probabilistic grammar whose every text comes with its exact log-probability.

Because the source of the text is known, so is the best loss that any model can reach on it: the entropy of the source.
Every loss plot of the course draws that floor. The rules themselves are data: read `pocket.grammar` beside this file.

A derivation works on a *stack* of symbols still to be said and an *environment* of remembered words:

    p(text) = Π p(alternative chosen)         floor = H(text) / E[tokens] = E[−log p(text)] / E[tokens]   (nats a token)
"""

from __future__ import annotations

import math
import random
import re
from bisect import bisect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

END = "<eos>"  # the end of a text counts as a token: a model must predict it too


class Symbol(NamedTuple):
    """One symbol of a rule. `kind` is "word", "copy" ($v), "rule" (NAME), "bind" (v=NAME) or "hide" (v~NAME)."""

    kind: str
    name: str
    variable: str = ""


@dataclass(frozen=True)
class Text:
    """A sampled text: words separated by single spaces, its log-probability in nats, and what was remembered."""

    text: str
    log_p: float
    memory: Mapping[str, str]


Stack = tuple | None  # (symbol, rest of the stack), or None when nothing is left to say
Rules = dict[str, list[tuple[float, list[Symbol]]]]


def parse_rules(source: str) -> Rules:
    """Read grammar notation (explained at the top of `pocket.grammar`) into {name: [(probability, symbols)]}."""
    lines = [line for line in source.splitlines() if line.strip() and not line.startswith("#")]
    statements = re.split(r"\n(?=[A-Z][\w.]*\s*=)", "\n".join(lines))
    rules: Rules = {}
    for statement in statements:
        name, _, body = statement.partition("=")
        alternatives = []
        for alternative in re.split(r"(?:^|\s)\|(?=\s)", body.strip()):
            weight, words = re.fullmatch(r"\s*(?:(\d+):)?(.*)", alternative, re.DOTALL).groups()
            alternatives.append((int(weight or 1), [_symbol(word) for word in words.split()]))
        total = sum(weight for weight, _ in alternatives)
        rules[name.strip()] = [(weight / total, symbols) for weight, symbols in alternatives]
    return rules


def _symbol(token: str) -> Symbol:
    if match := re.fullmatch(r"(\w+)([=~])([A-Z][\w.$]*)", token):
        return Symbol("bind" if match[2] == "=" else "hide", match[3], match[1])
    if token.startswith("$"):
        return Symbol("copy", "", token[1:])
    return Symbol("rule" if re.match(r"[A-Z]", token) else "word", token)


class Grammar:
    """A probabilistic grammar with memory.

    `rules` is {name: [(probability, symbols)]}; `start` is the rule of a whole text. Every text has exactly one
    derivation (a test checks this with another parser), so the probability of a derivation is that of its text.
    """

    def __init__(self, rules: Rules, start: str):
        self.rules, self.start = rules, start
        self._cumulative = {name: list(accumulate(p for p, _ in alts)) for name, alts in rules.items()}
        self._needs = cache(self._needs)
        self._measure = cache(self._measure)

    # ------------------------------------------------------------------ changing the world
    def replace(self, source: str) -> Grammar:
        """The same grammar with the rules in `source` (grammar notation) put in the place of those of their names."""
        return Grammar(self.rules | parse_rules(source), self.start)

    def relabel(self, mapping: Mapping[str, str]) -> Grammar:
        """The same grammar with each word w said as mapping.get(w, w). An injective mapping keeps every probability.

        Words that a later rule name depends on (moods, places' kinds, …) are chosen silently and keep their names.
        """
        silent = {
            s.name.partition(".")[0] for alts in self.rules.values() for _, a in alts for s in a if s.kind == "hide"
        }

        def said(name: str, symbol: Symbol) -> Symbol:
            loud = symbol.kind == "word" and name.partition(".")[0] not in silent
            return Symbol("word", mapping.get(symbol.name, symbol.name)) if loud else symbol

        return Grammar(
            {name: [(p, [said(name, s) for s in a]) for p, a in alts] for name, alts in self.rules.items()}, self.start
        )

    def vocabulary(self) -> list[str]:
        """Every word that some text can contain, sorted."""
        said, seen, todo = set(), set(), [self.start]
        while todo:
            name = todo.pop()
            if name in seen:
                continue
            seen.add(name)
            for _, alternative in self.rules[name]:
                for symbol in alternative:
                    if symbol.kind == "word":
                        said.add(symbol.name)
                    elif symbol.kind in ("rule", "bind"):
                        todo += self._family(symbol.name)
        return sorted(said)

    def _family(self, name: str) -> list[str]:
        """All rules that a possibly open name such as "MOOD.$p.$q" can stand for."""
        if "$" not in name:
            return [name]
        pattern = re.compile(re.sub(r"\\\$\w+", r"[^.]+", re.escape(name)))
        return [rule for rule in self.rules if pattern.fullmatch(rule)]

    # ------------------------------------------------------------------ sampling
    def sample(self, rng: random.Random) -> Text:
        """Draw one text: expand the stack from the left, choosing each alternative with its probability."""
        stack, memory, words, log_p = [Symbol("rule", self.start)], {}, [], 0.0
        while stack:
            kind, name, variable = stack.pop()
            if kind == "word":
                words.append(name)
                continue
            if kind == "copy":
                words.append(memory[variable])
                continue
            name = _fill(name, memory)
            cumulative = self._cumulative[name]
            p, alternative = self.rules[name][min(bisect(cumulative, rng.random()), len(cumulative) - 1)]
            log_p += math.log(p)
            if kind == "rule":
                stack.extend(reversed(alternative))
            else:
                memory[variable] = alternative[0].name
                if kind == "bind":
                    words.append(alternative[0].name)
        return Text(" ".join(words), log_p, memory)

    def texts(self, n: int, seed: int) -> list[Text]:
        """`n` independent texts; the same seed gives the same texts."""
        rng = random.Random(seed)
        return [self.sample(rng) for _ in range(n)]

    # ------------------------------------------------------------------ exact probabilities of given words
    def _follow(self, stack: Stack, memory: frozenset) -> tuple[tuple[str, float, Stack, frozenset], ...]:
        """Every way to say one more word: (word, probability, stack after it, memory after it)."""
        if stack is None:
            return ((END, 1.0, None, memory),)
        (kind, name, variable), rest = stack
        if kind == "word":
            return ((name, 1.0, rest, memory),)
        known = dict(memory)
        if kind == "copy":
            return ((known[variable], 1.0, rest, memory),)
        found = []
        for p, alternative in self.rules[_fill(name, known)]:
            if kind == "bind":
                word = alternative[0].name
                found.append((word, p, rest, frozenset((known | {variable: word}).items())))
                continue
            if kind == "hide":
                after = self._follow(rest, frozenset((known | {variable: alternative[0].name}).items()))
            else:
                after = self._follow(_push(alternative, rest), memory)
            found += [(word, p * q, s, m) for word, q, s, m in after]
        return tuple(found)

    def _states(self) -> dict:
        """{(stack, memory): probability}: where the derivation can be, before the first word."""
        return {((Symbol("rule", self.start), None), frozenset()): 1.0}

    def _advance(self, states: dict, word: str) -> tuple[float, dict]:
        """p(word | words before it), and the states after it (none when it is impossible)."""
        after: dict = {}
        for (stack, memory), p in states.items():
            for said, q, *state in self._follow(stack, memory):
                if said == word:
                    after[tuple(state)] = after.get(tuple(state), 0.0) + p * q
        mass = sum(after.values())
        return mass, {state: p / mass for state, p in after.items()}

    def surprisals(self, text: str) -> list[float]:
        """−log p(word | words before it) in nats for each word of `text` and its end; inf once it is impossible.

        Their sum is −log p(text). They are the floor of a model's loss token by token.
        """
        states, result = self._states(), []
        for word in [*text.split(), END]:
            p, states = self._advance(states, word)
            result.append(-math.log(p) if p else math.inf)
        return result

    def log_prob(self, text: str) -> float:
        """Exact log p(text) in nats; −inf for a text that the grammar cannot say."""
        return -sum(self.surprisals(text))

    def next_words(self, prefix: str) -> dict[str, float]:
        """The source's own distribution of the next word, most likely first; empty after an impossible prefix."""
        states = self._states()
        for word in prefix.split():
            _, states = self._advance(states, word)
        odds: dict[str, float] = {}
        for (stack, memory), p in states.items():
            for word, q, _, _ in self._follow(stack, memory):
                odds[word] = odds.get(word, 0.0) + p * q
        return dict(sorted(odds.items(), key=lambda item: -item[1]))

    # ------------------------------------------------------------------ exact expectations
    def _needs(self, stack: Stack) -> frozenset[str]:
        """The variables on which rule names in the stack, or in anything it can expand to, depend."""
        if stack is None:
            return frozenset()
        (kind, name, variable), rest = stack
        need = self._needs(rest) - ({variable} if kind in ("bind", "hide") else set())
        if kind in ("rule", "bind", "hide"):
            need |= set(re.findall(r"\$(\w+)", name))
        if kind == "rule":
            for rule in self._family(name):
                for _, alternative in self.rules[rule]:
                    need |= self._needs(_push(alternative, None))
        return need

    def _measure(self, stack: Stack, memory: frozenset) -> tuple[float, float]:
        """(entropy in nats, expected number of words) of everything still to be said."""
        if stack is None:
            return 0.0, 0.0
        (kind, name, variable), rest = stack
        if kind in ("word", "copy"):
            entropy, length = self._measure(rest, memory)
            return entropy, length + 1
        known, entropy, length = dict(memory), 0.0, 0.0
        for p, alternative in self.rules[_fill(name, known)]:
            after = _push(alternative, rest) if kind == "rule" else rest
            needed, kept = self._needs(after), memory
            if kind != "rule" and variable in needed:
                kept = frozenset((known | {variable: alternative[0].name}).items())
            if not needed.issuperset([v for v, _ in kept]):
                kept = frozenset([each for each in kept if each[0] in needed])
            h, n = self._measure(after, kept)
            entropy += p * (h - math.log(p))
            length += p * (n + (kind == "bind"))
        return entropy, length

    def entropy(self) -> float:
        """H = E[−log p(text)] in nats a text, by exact recursion over the rules (no sampling)."""
        return self._measure((Symbol("rule", self.start), None), frozenset())[0]

    def length(self) -> float:
        """Expected tokens a text, its end included."""
        return self._measure((Symbol("rule", self.start), None), frozenset())[1] + 1

    def floor(self) -> float:
        """The least possible loss in nats a token: entropy of a text / expected tokens of a text."""
        return self.entropy() / self.length()


def _fill(name: str, memory: Mapping[str, str]) -> str:
    return re.sub(r"\$(\w+)", lambda match: memory[match[1]], name) if "$" in name else name


def _push(symbols: list[Symbol], rest: Stack) -> Stack:
    for symbol in reversed(symbols):
        rest = (symbol, rest)
    return rest


def _read(file: str, start: str) -> Grammar:
    return Grammar(parse_rules(Path(__file__).with_name(file).read_text(encoding="utf-8")), start)


@cache
def stories() -> Grammar:
    """The grammar of the pocket world's stories, on which the base model is trained."""
    return _read("pocket.grammar", "STORY")


@cache
def forecasts() -> Grammar:
    """Weather forecasts: another domain over the same vocabulary."""
    return _read("forecast.grammar", "FORECAST")


def pretty(text: str) -> str:
    """The text as a person would write it: capitals, closed quotes, no space before punctuation."""
    text = re.sub(r'" (.*?) "', r'"\1"', text)
    text = re.sub(r" ([.,?!:])", r"\1", text)
    text = re.sub(r"(^|[.?!:]\"? |, \")([a-z])", lambda match: match[1] + match[2].upper(), text)
    return re.sub(r"[\w']+", lambda match: match[0].capitalize() if match[0] in _proper_names() else match[0], text)


@cache
def _proper_names() -> frozenset[str]:
    proper = [
        alts for name, alts in stories().rules.items() if name.split(".")[0] in ("NAME", "FRIEND", "DAY", "MONTH")
    ]
    return frozenset(symbols[0].name for alts in proper for _, symbols in alts) - {"may"} | {"i"}
