"""Assignment `prompts`: words before a text, then vectors before its embeddings."""

from __future__ import annotations

import math
from collections import Counter
from random import Random

import torch
from torch.nn import functional as F

from minipeft.course.drives.prompts import Reader
from minipeft.course.exercises.draw import normal
from minipeft.course.verdict import Case, Exercise, Raises

IGNORE = -100


# template ------------------------------------------------------------------------------------------------------------
TEXTS = ("ben lost a coin .", "x", "  two spaces  ", "a set {1, 2} of {text}", "mia said , ' { ' .")


def template_cases(rng: Random):
    for template in ("{text} he felt", "so {text}", "{text} or {text} ?", "{text} was {mask} .", "{0} {} {text} {{ }"):
        text = TEXTS[2] if template.startswith("so") else rng.choice(TEXTS)
        before, *rest = template.split("{text}")
        yield Case(
            f"put the text wherever {template!r} says {{text}}",
            (template, text),
            before + "".join(text + part for part in rest),
            wrong={
                "the text always goes to the front": lambda t=template, x=text: (
                    f"{x} {t.replace('{text}', '')}".strip()
                ),
                "only the first place is filled": lambda t=template, x=text: t.replace("{text}", x, 1),
                "spaces are cut from the text": lambda t=template, x=text: t.replace("{text}", x.strip()),
                "the template comes back as it was": lambda t=template: t,
            },
        )
    for template in ("he felt", "text", "{ text }", "{}"):
        yield Case(
            f"raise a ValueError for the template {template!r}, which has no place for the text",
            (template, TEXTS[0]),
            Raises("ValueError"),
        )


# verbalizer ----------------------------------------------------------------------------------------------------------
def verbalizer_cases(rng: Random):
    for dtype, depth in ((torch.float64, 0), (torch.float32, 0), (torch.float64, 0), (torch.float32, 150)):
        rows, words = rng.randint(1, 4), rng.randint(12, 20)
        z = 2 * normal(rng, rows, words, dtype=torch.float64)
        ids = rng.sample(range(1, words), words - 1)
        if depth:  # every word but the first is so unlikely that exp(log p) is 0 in float32
            z[:, 0] += depth
            z[:, ids[0]] -= 30.0
        log_p = z.log_softmax(-1).to(dtype).double()
        cuts = [0, 1, rng.randint(3, 4), rng.randint(6, 9)]
        verbalizer = {f"class {c}": ids[a:b] for c, (a, b) in enumerate(zip(cuts, cuts[1:], strict=False))}

        def each(combine, normalise=True, log_p=log_p, verbalizer=verbalizer, dtype=dtype):
            """A number for each row and class out of the list of its words' log-probabilities."""
            table = [[combine(row[ids].tolist()) for ids in verbalizer.values()] for row in log_p]
            scores = torch.tensor(table, dtype=torch.float64)
            return (scores.log_softmax(-1) if normalise else scores).to(dtype)

        def log_sum(logs):
            # log Σ p(w), the largest taken out first, so that nothing underflows
            return max(logs) + math.log(sum(math.exp(v - max(logs)) for v in logs))

        yield Case(
            "give log p(class | text), where a class has the summed probability of its words"
            + (", also where these are tiny" if depth else ""),
            (log_p.to(dtype), verbalizer),
            each(log_sum),
            wrong={
                "the logarithms are summed: that multiplies the probabilities": lambda e=each: e(sum),
                "it takes the mean of the logarithms": lambda e=each: e(lambda v: sum(v) / len(v)),
                "it takes the mean probability: classes have different numbers of words": lambda e=each, f=log_sum: e(
                    lambda v: f(v) - math.log(len(v))
                ),
                "only the likeliest word of a class counts": lambda e=each: e(max),
                "only the first word of a class counts": lambda e=each: e(lambda v: v[0]),
                "the classes do not sum to 1": lambda e=each, f=log_sum: e(f, normalise=False),
                "these are probabilities: take the logarithm": lambda e=each, f=log_sum: e(f).exp(),
            },
        )


# prepend -------------------------------------------------------------------------------------------------------------
def prepend_cases(rng: Random):
    for dtype, mask_dtype in (
        (torch.float32, torch.int64),
        (torch.float64, torch.int64),
        (torch.bfloat16, torch.int64),
        (torch.float32, torch.bool),
        (torch.float64, torch.int32),
    ):
        rows, n, length, d = rng.randint(2, 4), *rng.sample(range(2, 9), 3)
        prompt, embeds = normal(rng, n, d), normal(rng, rows, length, d, dtype=dtype)
        mask = torch.tensor([[int(i < rng.randint(1, length)) for i in range(length)] for _ in range(rows)])
        mask = mask.to(mask_dtype)
        labels = torch.tensor([[rng.choice([IGNORE, *range(9)]) for _ in range(length)] for _ in range(rows)])
        labels = labels.int() if mask_dtype == torch.int32 else labels
        # small whole numbers, whose sums are exact in bfloat16 too
        weights = (2 * normal(rng, rows, n + length, d, dtype=torch.float64)).round()

        def out(ahead=1, label=IGNORE, first=prompt, embeds=embeds, mask=mask, labels=labels, n=n, w=weights, **other):
            """Filled place by place."""
            rows, length, d = embeds.shape
            found = {
                "embeds": torch.zeros(rows, n + length, d, dtype=embeds.dtype),
                "mask": torch.zeros(rows, n + length, dtype=mask.dtype),
                "labels": torch.zeros(rows, n + length, dtype=labels.dtype),
                "gradient": w[:, :n].sum(0).float(),
            }
            for row in range(rows):
                for i in range(n):
                    found["embeds"][row, i], found["mask"][row, i], found["labels"][row, i] = first[i], ahead, label
                for i in range(length):
                    found["embeds"][row, n + i] = embeds[row, i]
                    found["mask"][row, n + i], found["labels"][row, n + i] = mask[row, i], labels[row, i]
            return found | other

        def after(embeds=embeds, mask=mask, labels=labels, prompt=prompt, n=n, w=weights):
            rows = len(embeds)
            return {
                "embeds": torch.cat([embeds, prompt.to(embeds.dtype).expand(rows, -1, -1)], 1),
                "mask": torch.cat([mask, mask.new_ones(rows, n)], 1),
                "labels": torch.cat([labels, labels.new_full((rows, n), IGNORE)], 1),
                "gradient": w[:, -n:].sum(0).float(),
            }

        yield Case(
            f"put {n} vectors before {length} embeddings in {dtype}, ones before the mask ({mask_dtype}), −100 before "
            "the labels, and let a gradient through",
            (prompt, embeds, mask, labels, weights),
            out(),
            wrong={
                "the prompt stands after the text": after,
                "the mask is 0 at the prompt, so nobody reads it": lambda out=out: out(ahead=0),
                "the labels are 0 at the prompt, and 0 is a word: use −100": lambda out=out: out(label=0),
                "the labels are −1 at the prompt: PyTorch leaves out −100": lambda out=out: out(label=-1),
                "the labels are 1 at the prompt: use −100": lambda out=out: out(label=1),
                "no gradient reaches the prompt: it was detached": lambda out=out, p=prompt: out(gradient=0 * p),
            },
        )


# the start from words ------------------------------------------------------------------------------------------------
def start_cases(rng: Random):
    for dtype in (torch.float32, torch.float64):
        words, d = rng.randint(14, 24), rng.randint(3, 7)
        n = rng.randint(words // 2, words - 2)
        table = normal(rng, words, d, dtype=dtype)
        args = (table, n, rng.randrange(10**6))

        def rows(draw, table=table):
            """Which row of the table each vector is; −1 for none."""
            return [next((i for i, row in enumerate(table) if torch.equal(row, v)), -1) for v in draw]

        def shape(seen, n=n, d=d, rows=rows, dtype=dtype):
            if (found := tuple(seen["draws"][0].shape)) != (n, d):
                return f"The shape is {found} instead of {(n, d)}."
            if -1 in rows(seen["draws"][0]):
                return "Some of the vectors are no rows of the table."
            if seen["draws"][0].dtype != dtype:
                return f"The prompt is {seen['draws'][0].dtype}; the table is {dtype}."

        def distinct(seen, rows=rows, n=n, words=words):
            for draw in seen["draws"][1:]:
                if len(set(rows(draw))) < n:
                    return "A row was drawn twice: torch.randint draws with replacement."
            missed = set(range(words)).difference(*(rows(draw) for draw in seen["draws"]))
            if missed:
                return f"In forty draws of {n} rows, row {min(missed)} of {words} never came up."
            share, drawn = n / words, Counter(i for draw in seen["draws"] for i in rows(draw))
            unequal = sum((drawn[i] / len(seen["draws"]) - share) ** 2 for i in range(words))
            if unequal * len(seen["draws"]) > (words + 10 * math.sqrt(2 * words)) * share * (1 - share):
                return f"In forty draws some rows came far more often than others: {dict(sorted(drawn.items()))}."
            ends = [sum((i + 1) % words not in rows(draw) for i in rows(draw)) for draw in seen["draws"]]
            if n > 1 and max(ends) == 1:  # of each run of neighbours, where the first follows the last
                return "In forty draws the rows were neighbours each time: draw each of them, not where a run begins."

        def seeded(seen):
            first, again, *others = seen["draws"]
            if not torch.equal(first, again):
                return "The same seed gave two different prompts: draw from `generator`, not from the global one."
            if not any(not torch.equal(first, other) for other in others):
                return "Different seeds gave the same prompt: draw from `generator`."
            one, later, used = seen["one generator"]
            if torch.equal(one, later) and torch.equal(one, used):
                return "Two calls with one generator gave the same prompt: draw from its stream, not from its seed."
            if not seen["global"]:
                return "It moves the global generator of random numbers: draw from `generator` only."

        def copied(seen):
            if seen["gradient in table"]:
                return "The gradient runs on into the table: detach what you took from it."
            if not seen["table kept"]:
                return "Changing the prompt changed the table: they share memory, so make a copy."

        yield Case(f"be {n} rows of the table, of shape ({n}, {d})", args, judge=shape)
        yield Case("take its random numbers from `generator`", args, judge=seeded)
        yield Case("hold distinct rows, any of the table's", args, judge=distinct)
        yield Case("be a copy: training it leaves the table alone", args, judge=copied)
    yield Case("hold the whole table, if n is its length", (table, words, args[2]), judge=distinct_all(words))
    yield Case("raise a ValueError for more rows than there are", (table, words + 1, args[2]), Raises("ValueError"))


def distinct_all(words: int):
    def judge(seen):
        found = len(seen["draws"][0].unique(dim=0))
        return None if found == words else f"It holds {found} different rows of {words}."

    return judge


# nearest words -------------------------------------------------------------------------------------------------------
def nearest_cases(rng: Random):
    for dtype, padding in ((torch.float64, False), (torch.float32, False), (torch.float64, True)):
        n, words, d, k = rng.randint(3, 6), rng.randint(20, 30), rng.randint(4, 7), rng.randint(2, 5)
        prompt = normal(rng, n, d, dtype=dtype)
        lengths = torch.tensor([[math.exp(rng.uniform(-2, 2))] for _ in range(words)], dtype=dtype)
        table = normal(rng, words, d, dtype=dtype) * lengths
        if padding:
            table[rng.randrange(words)] = 0.0

        def best(score, reverse=True, prompt=prompt, table=table, k=k):
            order = [
                sorted(range(len(table)), key=lambda i: score(p, table[i].tolist()), reverse=reverse)
                for p in prompt.tolist()
            ]
            return torch.tensor(order)[:, :k]

        def dot(p, e):
            return sum(a * b for a, b in zip(p, e, strict=True))

        def cosine(p, e, dot=dot):
            return dot(p, e) / (math.hypot(*p) * math.hypot(*e)) if any(e) else 0.0

        yield Case(
            f"name the {k} words of highest cosine for each vector, best first"
            + (", where the padding's embedding is zero" if padding else ""),
            (prompt, table, k),
            best(cosine),
            wrong={
                "it compares dot products, which favour long embeddings": lambda b=best, f=dot: b(f),
                "it compares distances": lambda b=best: b(math.dist, False),
                "it takes the lowest cosine": lambda b=best, f=cosine: b(f, False),
                "it ignores the sign of the cosine": lambda b=best, f=cosine: b(lambda p, e: abs(f(p, e))),
                "the best comes last": lambda b=best, f=cosine: b(f).flip(1),
                "rows are sorted by number, not by cosine": lambda b=best, f=cosine: b(f).sort(1).values,
            },
        )


# find the bug --------------------------------------------------------------------------------------------------------
def repair_cases(rng: Random):
    for side in ("right", "left", "right"):
        words, d, rows, n = rng.randint(9, 15), rng.randint(4, 7), rng.randint(2, 4), rng.randint(2, 5)
        lengths = [rng.randint(3, 7) for _ in range(rows)]
        length = max(lengths) + 1
        table, places, prompt = (normal(rng, m, d, dtype=torch.float64) for m in (words, length + n + 1, n))
        ids = torch.tensor([[rng.randrange(words) for _ in range(length)] for _ in range(rows)])
        real = [range(m) if side == "right" else range(length - m, length) for m in lengths]
        mask = torch.tensor([[int(i in places) for i in range(length)] for places in real])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        labels = torch.where(mask.bool(), ids, IGNORE)
        if side == "left":  # what stands before the first token is padding, which predicts nothing
            for row, where in zip(labels, real, strict=True):
                row[where[0]] = IGNORE
        args = (table, places, prompt, table[ids], mask, positions, labels)

        def alone(model, first, ids=ids, real=real, n=n):
            """Each row by itself, with no padding: logits of its tokens, and the mean loss of all next tokens."""
            each, losses = [], []
            for row, where in zip(ids, real, strict=True):
                tokens = row[list(where)]
                h = torch.cat([first, model.table[tokens]])[None]
                logits = model(h, torch.ones(h.shape[:2]), torch.arange(h.shape[1])[None])[0, n:]
                each.append(logits)
                losses += [F.cross_entropy(z, y) for z, y in zip(logits[:-1], tokens[1:], strict=True)]
            return each, sum(losses) / len(losses)

        leaf = prompt.clone().requires_grad_()
        want, loss = alone(Reader(table, places), leaf)
        (slope,) = torch.autograd.grad(loss, leaf)
        want, loss = [z.detach() for z in want], loss.item()

        def shape(seen, right=(rows, length, words), n=n):
            if (found := tuple(seen["logits"].shape)) != right:
                return f"The logits have the shape {found} instead of {right}: the text's tokens, without the prompt's."

        def logits(seen, want=want, real=real):
            errors = [(z[list(w)] - v).abs().max().item() for z, w, v in zip(seen["logits"], real, want, strict=True)]
            if not max(errors) <= 1e-8:
                return (
                    f"The largest difference is {max(errors):.3g}. Look at what is read where: embeddings, mask, "
                    "positions, and which logits are cut off."
                )

        def mean(seen, loss=loss):
            if not abs(seen["loss"].item() - loss) <= 1e-8:
                return (
                    f"It is {seen['loss'].item():.6f} instead of {loss:.6f}: the logits of token i predict token i+1."
                )

        def slopes(seen, slope=slope):
            if not (error := (seen["gradient"] - slope).abs().max().item()) <= 1e-8:
                nothing = "None reaches it. " if not seen["gradient"].any() else ""
                return f"{nothing}The largest difference is {error:.3g}."

        yield Case("return logits for the text's tokens only", args, judge=shape)
        yield Case(f"answer in a batch padded on the {side} as for each text alone", args, judge=logits)
        yield Case("take the mean loss of the next token", args, judge=mean)
        yield Case("give the prompt its gradient", args, judge=slopes)


EXERCISES = (
    Exercise(
        "fill_template", "A template", template_cases,
        (
            "Only `{text}` has a meaning here; other braces are letters like any others.",
            "`str.format` reads every brace; another method of str exchanges just what you name. Look for the place "
            "before you fill it.",
        ),
        ("fill_template",),
    ),
    Exercise(
        "score_verbalizer", "A verbalizer", verbalizer_cases,
        (
            "Add probabilities, not their logarithms. `torch.logsumexp` does that without leaving the logarithms.",
            "`log_probs[:, ids]` has a class's columns: one number a row comes of them. What then makes a row's "
            "classes sum to 1?",
        ),
        ("score_verbalizer",),
    ),
    Exercise(
        "prepend", "Vectors before the text", prepend_cases,
        (
            "`prompt.expand(rows, -1, -1)` repeats it for every row without a copy; torch.cat(…, dim=1) joins along L.",
            "`new_ones` and `new_full` keep their owner's type. Cast the prompt before you join, and leave its "
            "gradient on.",
        ),
        ("prepend",), "prompts.put_before",
    ),
    Exercise(
        "init_from_vocabulary", "A start from words", start_cases,
        (
            "A permutation never names a number twice: `torch.randperm(m, generator=generator)`.",
            "The first n of a permutation are n distinct places. A copy through which no gradient runs takes two "
            "calls. Check n first.",
        ),
        ("init_from_vocabulary",), "prompts.draw_rows",
    ),
    Exercise(
        "nearest_words", "The nearest words", nearest_cases,
        (
            "A cosine is the dot product of two vectors of length 1. F.normalize copes with a row of zeros.",
            "All cosines at once are one product of two matrices with rows of length 1, (n, words). `topk` sorts, "
            "best first.",
        ),
        ("nearest_words",), "prompts.name_rows",
    ),
    Exercise(
        "repaired_prompt", "Find the bug", repair_cases,
        (
            "There are four faults: the mask, the positions, which logits come back, and what they are compared with.",
            "May the vectors be seen? Where does the text begin to count? Which places come out first? Which token "
            "does place j foretell?",
        ),
        ("repaired_prompt",), "prompts.read_with_prompt",
    ),
)  # fmt: skip
