"""The pocket world's probabilities, held against a second reader and parser that share no code with the package."""

import itertools
import math
import random
import re
from collections import Counter
from pathlib import Path

import pytest

import minipeft.world.corpus as corpus
from minipeft.world import tasks

FILES = Path(corpus.__file__).parent


def read(file: str) -> dict[str, list[tuple[float, list[str]]]]:
    """A reader of the grammar notation of its own: {name: [(probability, tokens)]}."""
    rules, name = {}, None
    for line in (FILES / file).read_text(encoding="utf-8").splitlines():
        line = line.split("#")[0] if line.startswith("#") else line
        if not line.strip():
            continue
        tokens = line.split()
        if len(tokens) > 1 and tokens[1] == "=":
            name, tokens = tokens[0], tokens[2:]
            rules[name] = [[]]
        for token in tokens:
            if token == "|":
                rules[name].append([])
            else:
                rules[name][-1].append(token)
    weighed = {}
    for name, alternatives in rules.items():
        pairs = []
        for alternative in alternatives:
            weighted = alternative and re.fullmatch(r"\d+:", alternative[0])
            pairs.append((int(alternative[0][:-1]) if weighted else 1, alternative[1:] if weighted else alternative))
        total = sum(weight for weight, _ in pairs)
        weighed[name] = [(weight / total, tokens) for weight, tokens in pairs]
    return weighed


def derivations(rules, tokens: list[str], words: list[str], memory: dict, p: float = 1.0):
    """Depth first, by backtracking: the probability of every derivation of exactly `words` from `tokens`."""
    if not tokens:
        if not words:
            yield p
        return
    token, rest = tokens[0], tokens[1:]
    bound = re.fullmatch(r"([a-z]+)([=~])([A-Z].*)", token)
    if token.startswith("$"):
        if words and words[0] == memory[token[1:]]:
            yield from derivations(rules, rest, words[1:], memory, p)
    elif bound or token[0].isupper():
        variable, how, name = bound.groups() if bound else (None, None, token)
        name = ".".join(memory[part[1:]] if part.startswith("$") else part for part in name.split("."))
        for q, alternative in rules[name]:
            if how == "~":
                yield from derivations(rules, rest, words, memory | {variable: alternative[0]}, p * q)
            elif how == "=":
                if words and words[0] == alternative[0]:
                    yield from derivations(rules, rest, words[1:], memory | {variable: alternative[0]}, p * q)
            else:
                yield from derivations(rules, alternative + rest, words, memory, p * q)
    elif words and words[0] == token:
        yield from derivations(rules, rest, words[1:], memory, p)


@pytest.mark.parametrize(
    ("file", "start", "grammar"),
    [("pocket.grammar", "STORY", corpus.stories()), ("forecast.grammar", "FORECAST", corpus.forecasts())],
)
def test_an_independent_parser_finds_one_derivation_with_the_sampled_probability(file, start, grammar):
    rules = read(file)
    for text in grammar.texts(300, seed=11):
        found = list(derivations(rules, [start], text.text.split(), {}))
        assert len(found) == 1, text.text
        assert math.log(found[0]) == pytest.approx(text.log_p, abs=1e-9)
        assert grammar.log_prob(text.text) == pytest.approx(text.log_p, abs=1e-9)


def test_changed_words_and_texts_cut_short_are_impossible():
    grammar, rng = corpus.stories(), random.Random(0)
    vocabulary = grammar.vocabulary()
    for text in grammar.texts(50, seed=12):
        words = text.text.split()
        assert grammar.log_prob(" ".join(words[:-1])) == -math.inf
        words[rng.randrange(len(words))] = "zebra"
        assert grammar.log_prob(" ".join(words)) == -math.inf
    assert "zebra" not in vocabulary


def every_text(rules, tokens, memory, p=1.0, said=()):
    """All (text, probability) that `tokens` can say."""
    if not tokens:
        yield " ".join(said), p
        return
    token, rest = tokens[0], tokens[1:]
    bound = re.fullmatch(r"([a-z]+)([=~])([A-Z].*)", token)
    if bound or token[0].isupper():
        variable, how, name = bound.groups() if bound else (None, None, token)
        name = ".".join(memory[part[1:]] if part.startswith("$") else part for part in name.split("."))
        for q, alternative in rules[name]:
            kept = memory | {variable: alternative[0]} if bound else memory
            yield from every_text(rules, rest if how == "~" else alternative + rest, kept, p * q, said)
    else:
        yield from every_text(rules, rest, memory, p, (*said, memory[token[1:]] if token[0] == "$" else token))


def test_the_probabilities_of_a_small_world_sum_to_one_and_give_its_entropy():
    start = "t~TEMPER SKIES.$t in the WAY , OUTLOOK.$t OUTLOOKDAY STOP WIND.$t STOP LEVELS.$t"
    small = corpus.forecasts().replace(f"FORECAST = {start}")
    rules = read("forecast.grammar")
    odds = Counter()
    for text, p in every_text(rules, start.split(), {}):
        odds[text] += p
    assert len(odds) > 1000
    assert sum(odds.values()) == pytest.approx(1, abs=1e-12)
    assert small.entropy() == pytest.approx(-sum(p * math.log(p) for p in odds.values()), abs=1e-9)
    assert small.length() == pytest.approx(sum(p * (len(t.split()) + 1) for t, p in odds.items()), abs=1e-9)
    for text, p in itertools.islice(odds.items(), 0, None, 97):
        assert small.log_prob(text) == pytest.approx(math.log(p), abs=1e-9)


@pytest.mark.parametrize("grammar", [corpus.stories(), corpus.forecasts(), tasks.pirates()])
def test_the_exact_entropy_and_length_agree_with_the_mean_over_samples(grammar):
    texts = grammar.texts(20_000, seed=13)
    surprise = [-t.log_p for t in texts]
    mean = sum(surprise) / len(texts)
    error = (sum((s - mean) ** 2 for s in surprise) / len(texts)) ** 0.5 / len(texts) ** 0.5
    assert abs(mean - grammar.entropy()) < 4 * error
    lengths = [len(t.text.split()) + 1 for t in texts]
    assert sum(lengths) / len(texts) == pytest.approx(grammar.length(), rel=0.005)
    assert grammar.floor() == pytest.approx(grammar.entropy() / grammar.length())


def test_next_words_is_the_distribution_behind_the_surprisals():
    grammar = corpus.stories()
    [text] = grammar.texts(1, seed=14)
    words = text.text.split()
    surprisals = grammar.surprisals(text.text)
    assert len(surprisals) == len(words) + 1
    for i in range(len(words)):
        odds = grammar.next_words(" ".join(words[:i]))
        assert sum(odds.values()) == pytest.approx(1)
        assert -math.log(odds[words[i]]) == pytest.approx(surprisals[i], abs=1e-9)
    assert grammar.next_words(text.text)[corpus.END] == pytest.approx(math.exp(-surprisals[-1]))


def test_the_vocabulary_is_small_and_holds_every_word_that_is_ever_said():
    words = set(corpus.stories().vocabulary())
    assert 500 < len(words) <= 1000
    assert set(corpus.forecasts().vocabulary()) <= words
    assert set(tasks.pirates().vocabulary()) <= words
    said = {w for t in corpus.stories().texts(20_000, seed=15) for w in t.text.split()}
    assert said <= words
    assert len(words - said) < 5


def test_relabelling_keeps_probabilities_and_does_not_touch_silent_choices():
    mapping = {"he": "'e", "she": "she", "the": "th'", "glad": "GLAD", "found": "FOUND"}
    grammar = corpus.stories().relabel(mapping)
    for a, b in zip(corpus.stories().texts(50, seed=16), grammar.texts(50, seed=16), strict=True):
        assert b.text == " ".join(mapping.get(w, w) for w in a.text.split())
        assert a.log_p == b.log_p


def test_the_same_seed_gives_the_same_stories():
    assert corpus.stories().texts(20, seed=3) == corpus.stories().texts(20, seed=3)
    assert corpus.stories().texts(20, seed=3) != corpus.stories().texts(20, seed=4)


def test_pretty_text_reads_as_a_person_would_write_it():
    text = 'on sunday , tom and i went to the lake . ben said , " what a lovely boat ! " it may rain .'
    assert corpus.pretty(text) == 'On Sunday, Tom and I went to the lake. Ben said, "What a lovely boat!" It may rain.'
