"""The edges of the assignment `prompts`."""

from __future__ import annotations

import math
from random import Random

import torch
from torch.nn import functional as F

from minipeft.course.exercises.draw import normal, whole


def fill_template(template, text):
    if "{text}" not in template:
        raise ValueError(f"The template {template!r} has no place for the text.")
    return text.join(template.split("{text}"))


TEXTS = (
    "",
    "{text}",
    "a {text} b",
    r"\1 \g<0> \n",
    "100 % %s %d",
    "$ $text ${text} $1",
    "größer – 好 é",
    "{0} {mask} {}",
    "a\nb",
    " \ta\u00a0 \n",
    "X",
    "\0",
    "a longer text that says {text} twice, {text}, and goes on",
)


def template_edges(rng: Random):
    for text in TEXTS:
        for template in (
            "{text}",
            "it costs $5, 100 %s: {text} \\1",
            "{text}{text} über {mask} {x!r} {{text}}",
            "\0{text}X",
        ):
            yield "take every character of text and template as it is", (template, text)
    for template in ("", "{Text}", "{text", "text}", "{ text}", "{texts}", "$text"):
        yield f"raise a ValueError for {template!r}, even if the text is {TEXTS[1]!r}", (template, TEXTS[1])


def score_verbalizer(log_probs, verbalizer):
    scores = [torch.stack([log_probs[:, i] for i in ids], 1).logsumexp(-1) for ids in verbalizer.values()]
    return torch.stack(scores, 1).log_softmax(-1)


def verbalizer_edges(rng: Random):
    z = normal(rng, 4, 9, dtype=torch.float64).log_softmax(-1)
    yield "follow the order of the classes, not of their names", (z, {"z": [1, 5], "a": [3], "m": [0, 2, 8]})
    yield "give log 1 to the only class", (z, {"only": [4, 7]})
    yield "take one row", (z[:1], {"b": [1], "a": [2]})
    yield "take as many rows as words", (normal(rng, 5, 5).log_softmax(-1), {"b": [1, 4], "a": [2]})
    yield "take the first and the last word", (z, {"b": [0], "a": [8]})
    low = z.clone()
    low[:, 2] = -math.inf
    yield "take a word of probability 0 beside another", (low, {"b": [2, 3], "a": [1]})
    yield "take two classes that share a word", (z, {"b": [1, 2], "a": [2, 3]})


def prepend(prompt, embeds, mask, labels):
    rows, n = len(embeds), len(prompt)
    embeds = torch.cat([prompt.to(embeds.dtype).expand(rows, -1, -1), embeds], 1)
    mask = torch.cat([torch.ones(rows, n, dtype=mask.dtype), mask], 1)
    return embeds, mask, torch.cat([torch.full((rows, n), -100, dtype=labels.dtype), labels], 1)


def prepend_edges(rng: Random):
    for what, rows, n, length, d in (
        ("one place", 2, 1, 3, 4),
        ("one row", 1, 3, 2, 4),
        ("one token", 2, 3, 1, 4),
        ("embeddings of one number", 2, 3, 2, 1),
        ("no place at all", 2, 0, 3, 4),
        ("as many rows as places as tokens", 3, 3, 3, 3),
    ):
        for dtype in (torch.int32, torch.int64):
            mask, labels = torch.ones(rows, length, dtype=dtype), torch.full((rows, length), 7, dtype=dtype)
            weights = normal(rng, rows, n + length, d, dtype=torch.float64).round()
            args = normal(rng, n, d), normal(rng, rows, length, d), mask, labels, weights
            yield f"hold for {what}, with labels and mask in {dtype}", args
    mask = torch.tensor([[0, 0, 1], [0, 1, 1]])
    args = normal(rng, 2, 4), normal(rng, 2, 3, 4), mask, torch.tensor([[7, 2**40, 1], [5, 6, 2**40 + 1]])
    yield "hold for padding on the left, and for labels of any size", (*args, whole(rng, 2, 5, 4))


def init_from_vocabulary(table, n, generator):
    if n > len(table):
        raise ValueError(f"There are {len(table)} words, so {n} distinct ones cannot be drawn.")
    return table[torch.randperm(len(table), generator=generator)[:n]].detach().clone()


def nearest_words(prompt, table, k):
    long = table.norm(dim=1, keepdim=True)
    return (prompt @ (table / torch.where(long > 0, long, 1)).T).topk(k).indices


def nearest_edges(rng: Random):
    def spread(words, d):
        return normal(rng, words, d, dtype=torch.float64)

    for scale in (1e-7, 1e-3, 1e6):
        table = spread(9, 4)
        table[::2] *= scale
        yield f"compare embeddings that are {scale:g} times as long as others", (spread(3, 4), table, 3)
        yield f"take a prompt that is {scale:g} times as long", (scale * spread(3, 4), spread(9, 4), 3)
    away = torch.cat([-spread(8, 4).abs(), torch.zeros(1, 4, dtype=torch.float64)])
    yield "name a word of zeros first where every other points away", (spread(3, 4).abs(), away, 2)
    turn = torch.tensor([0.3, -0.2, 0.05, 0.0, 0.1, -0.4], dtype=torch.float64) / 100
    fan = torch.stack([turn.cos(), turn.sin(), 0 * turn], 1)
    yield "tell words apart whose directions are nearly the same", (torch.eye(3, dtype=torch.float64)[:1], fan, 4)
    yield "name the single nearest word", (spread(3, 4), spread(9, 4), 1)
    yield "put all words in order", (spread(3, 4), spread(9, 4), 9)
    yield "take a single vector", (spread(1, 4), spread(9, 4), 2)
    yield "take as many words as vectors as numbers", (spread(4, 4), spread(4, 4), 2)


def repaired_prompt(model, prompt, embeds, mask, positions, labels):
    rows, n = len(embeds), len(prompt)
    logits = model(
        inputs_embeds=torch.cat([prompt.expand(rows, -1, -1), embeds], 1),
        attention_mask=torch.cat([torch.ones(rows, n, dtype=mask.dtype), mask], 1),
        position_ids=torch.cat([torch.arange(n).expand(rows, -1), positions + n], 1),
    )[:, n:]
    return logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def repair_edges(rng: Random):
    for what, rows, n, length in (
        ("a prompt of one place", 2, 1, 4),
        ("one text", 1, 3, 4),
        ("texts of two tokens", 2, 3, 2),
        ("as many texts as places as tokens", 3, 3, 3),
    ):
        words, d = 7, 4
        table, places, prompt = (normal(rng, m, d, dtype=torch.float64) for m in (words, n + length, n))
        ids = torch.tensor([[rng.randrange(words) for _ in range(length)] for _ in range(rows)])
        positions, mask = torch.arange(length).expand(rows, -1).clone(), torch.ones(rows, length, dtype=torch.int64)
        yield f"hold for {what}", (table, places, prompt, table[ids], mask, positions, ids)


EDGES = {
    "fill_template": {"reference": (fill_template,), "edges": template_edges},
    "score_verbalizer": {"reference": (score_verbalizer,), "edges": verbalizer_edges},
    "prepend": {
        "reference": (prepend,),
        "edges": prepend_edges,
        "without": {"types": "its cases have three types, and a prompt in float32 before each"},
    },
    "init_from_vocabulary": {
        "reference": (init_from_vocabulary,),
        "without": {
            "types": "its cases have two types, and compare rows",
            "strided": "an embedding's table is contiguous",
            "gradient": "its drive looks at the gradient of the table itself",
        },
    },
    "nearest_words": {
        "reference": (nearest_words,),
        "edges": nearest_edges,
        "without": {
            "types": "rounded to 16 bits, cosines become equal",
            "gradient": "places in a table have none",
            "sizes": "torch's own cosine has a floor under lengths; edges have embeddings that are short",
        },
    },
    "repaired_prompt": {
        "reference": (repaired_prompt,),
        "edges": repair_edges,
        "without": {
            "types": "all arguments come from one model in one type, and 16 bits round its attention",
            "gradient": "its drive looks at the prompt's gradient; the model's own weights see padding too",
        },
    },
}
