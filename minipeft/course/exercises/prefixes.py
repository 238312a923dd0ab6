"""Assignment `prefixes`: keys and values in front of every layer's own, what they cost, and who looks at them."""

from __future__ import annotations

from itertools import product
from random import Random

import torch

from minipeft.course.exercises.draw import many, normal, padded, padding, whole
from minipeft.course.exercises.prefixes_repair import repair_cases
from minipeft.course.verdict import Case, Exercise


# count ---------------------------------------------------------------------------------------------------------------
def count_cases(rng: Random):
    sizes = [(5, 24, 1024, 16, 16)]
    for kv_heads, group in ((1, 1), (2, 4), (3, 2), (1, 8)):
        head_dim = rng.choice([16, 24, 64])
        heads = kv_heads * group
        sizes.append((rng.randint(2, 40), rng.randint(3, 36), heads * head_dim, heads, kv_heads))
    for n, layers, width, heads, kv_heads in sizes:
        head_dim = width // heads
        # n · L · 2 · (kv heads · head width)
        right = n * layers * 2 * kv_heads * head_dim

        def times(numerator, denominator=1, right=right):
            return lambda: right * numerator // denominator

        yield Case(
            f"count n = {n} places in {layers} layers with {many(heads, 'head')}, {many(kv_heads, 'key-value head')} "
            f"and d = {width}",
            (n, layers, width, heads, kv_heads),
            right,
            wrong={
                "K and V share one vector: each has its own, so there is a factor 2": times(1, 2),
                "every head is counted: with grouped queries only the key-value heads have K and V": times(
                    heads, kv_heads
                ),
                "d stands where heads share keys, and the factor 2 is missing": times(heads, 2 * kv_heads),
                "Q is counted too: a prefix has K and V only": times(3, 2),
                "heads are multiplied by heads: each is d / heads wide": times(heads, head_dim),
                "only one layer is counted": times(1, layers),
                "only one place is counted": times(1, n),
                "only one key-value head is counted": times(1, kv_heads),
                "d is taken for the width of one head: that is d / heads": times(heads),
                "the example's result is written down: work it out from the arguments": lambda: 245_760,
            },
        )


# split ---------------------------------------------------------------------------------------------------------------
def split_cases(rng: Random):
    for layers, rows, dtype in (
        (1, 2, torch.float64),
        (3, 1, torch.float32),
        (4, 3, torch.float64),
        (2, 2, torch.bfloat16),
    ):
        n, kv_heads, head_dim = rng.sample(range(2, 7), 3)
        flat = normal(rng, n, layers * 2 * kv_heads * head_dim, dtype=dtype)
        weights = whole(rng, layers, 2, rows, kv_heads, n, head_dim)
        named = {f"{'KV'[which]} of layer {i}": w for i, pair in enumerate(weights) for which, w in enumerate(pair)}
        sizes = (layers, kv_heads, head_dim)

        def column(layer, which, head, j, sizes=sizes):
            """The column of number j of a head's K (which = 0) or V (1): K of layer 0, V of layer 0, K of layer 1, …"""
            return ((layer * 2 + which) * sizes[1] + head) * sizes[2] + j

        def out(place=column, first=0, texts=slice(None), flat=flat, weights=weights, names=tuple(named)):
            """Filled number by number; `place(layer, which, head, j)` is the column that each is read from."""
            layers, _, rows, heads, n, width = weights.shape
            pairs = torch.zeros(weights.shape, dtype=flat.dtype)
            gradient = torch.zeros(flat.shape, dtype=torch.float64)
            for layer, which, head, j in product(range(layers), range(2), range(heads), range(width)):
                at = place(layer, which, head, j)
                pairs[layer, which ^ first, :, head, :, j] = flat[:, at]
                gradient[:, at] += weights[layer, which ^ first, texts, head, :, j].sum(0)
            return dict(zip(names, pairs.flatten(0, 1), strict=True)) | {"gradient": gradient.to(flat.dtype)}

        def halves(layer, which, head, j, f=column, sizes=sizes):
            """All keys of all layers, then all values."""
            layers = sizes[0]
            return f(0, which * layers + layer, head, j)

        def inside(layer, which, head, j, sizes=sizes):
            """The number of the head runs faster than that within it."""
            return ((layer * 2 + which) * sizes[2] + j) * sizes[1] + head

        def within(layer, which, head, j, sizes=sizes):
            """K and V of one head stand side by side."""
            return ((layer * sizes[1] + head) * 2 + which) * sizes[2] + j

        def scrambled(flat=flat, weights=weights, names=tuple(named)):
            """One view into the final shape, which takes the places' numbers for those of the heads."""
            layers, _, rows, heads, n, width = weights.shape
            pairs = flat.view(2 * layers, 1, heads, n, width).expand(-1, rows, -1, -1, -1)
            gradient = weights.sum(2).reshape(flat.shape).to(flat.dtype)
            return dict(zip(names, pairs, strict=True)) | {"gradient": gradient}

        yield Case(
            f"give K and V of {many(layers, 'layer')}, each of shape (rows, kv heads, n, head width) = "
            f"{(rows, kv_heads, n, head_dim)}, in {dtype}, and let a gradient through",
            (flat, layers, kv_heads, rows, named),
            out(),
            wrong={
                "a row is cut into all keys and all values; it goes K, V, K, V, by layer": lambda o=out, f=halves: o(f),
                "K and V changed places": lambda o=out: o(first=1),
                "the head's number and the place within the head changed places: view as (…, kv heads, head width)": (
                    lambda o=out, f=inside: o(f)
                ),
                "K and V of one head stand side by side: the heads of K come first, then those of V": (
                    lambda o=out, f=within: o(f)
                ),
                "it is viewed as the final shape at once: view as the row is ordered, then move the axes": scrambled,
                "no gradient reaches the prefix: it was detached": lambda o=out: o(texts=slice(0)),
                "only the first text's gradient reaches the prefix": lambda o=out: o(texts=slice(1)),
            },
        )


# attend --------------------------------------------------------------------------------------------------------------
def attend_cases(rng: Random):
    for heads, kv_heads, n, side, dtype, loud in (
        (2, 2, 3, "no", torch.float64, 1),
        (3, 3, 5, "no", torch.float32, 1),
        (6, 2, 2, "no", torch.float64, 1),
        (6, 3, 4, "right", torch.float64, 1),
        (4, 2, 2, "left", torch.float32, 1),
        (2, 1, 0, "no", torch.float64, 1),
        (4, 2, 3, "left", torch.float64, 500),
    ):
        rows, w = 3, rng.choice([5, 7, 8])
        mask = padded(rng, rows, side)
        length = mask.shape[1]
        q = loud * normal(rng, rows, heads, length, w, dtype=dtype)
        k, v = (normal(rng, rows, kv_heads, length, w, dtype=dtype) for _ in range(2))
        prefix_k, prefix_v = (normal(rng, rows, kv_heads, n, w, dtype=dtype) for _ in range(2))
        weights = whole(rng, *q.shape)
        args = (q, k, v, prefix_k, prefix_v, mask, weights)

        def sees(row, i, j, n=n, mask=mask):
            """Whether token i looks at place j of [prefix; text]."""
            return j < n or (j - n <= i and bool(mask[row, j - n]))

        def out(sees=sees, of=None, scale=None, empty=None, swap=False, slope=1, args=args, heads=heads):
            """Token by token and head by head. `empty`: what a place that is not seen has instead of no share."""
            q, k, v, *both, mask, weights = (each.double() for each in args)
            leaf = torch.stack(both).requires_grad_()
            K, V = (torch.cat([a, b], 2) for a, b in zip(leaf.flip(0) if swap else leaf, (k, v), strict=True))
            group = heads // K.shape[1]
            rows, _, length, w = q.shape
            result = torch.zeros_like(q)
            for row, head, i in product(range(rows), range(heads), range(length)):
                if not mask[row, i]:
                    continue
                other = head // group if of is None else of(head)
                seen = torch.tensor([sees(row, i, j) for j in range(K.shape[2])])
                scores = (K[row, other] * q[row, head, i]).sum(-1) * (w**-0.5 if scale is None else scale)
                if empty == "score 0":
                    scores, seen = torch.where(seen, scores, 0 * scores), torch.ones_like(seen)
                e = (scores - scores[seen].max()).clamp(max=600).exp()
                p = torch.where(seen, e, 0 * e) / (e if empty == "share cut" else e[seen]).sum()
                result[row, head, i] = (p[:, None] * V[row, other]).sum(0)
            (found,) = torch.autograd.grad((result * weights).sum(), leaf)
            found = {"output": result.detach(), "gradient": slope * found}
            return {name: each.to(args[0].dtype) for name, each in found.items()}

        yield Case(
            f"let {heads} heads with {many(kv_heads, 'key-value head')} look at {n} places in front, in {dtype}, with "
            + padding(side)
            + (", where scores are so large that exp overflows" if loud > 1 else ""),
            args,
            out(),
            wrong={
                "the prefix is masked like text: every token sees all of it, so the triangle starts n columns later": (
                    lambda o=out, f=sees, n=n: o(lambda r, i, j: j <= i and f(r, i, j))
                ),
                "a token cannot see itself: the triangle includes the diagonal": lambda o=out, f=sees, n=n: o(
                    lambda r, i, j: f(r, i, j) and j - n != i
                ),
                "tokens see what comes after them": lambda o=out, n=n, m=mask: o(
                    lambda r, i, j: j < n or bool(m[r, j - n])
                ),
                "the padding is looked at": lambda o=out, n=n: o(lambda r, i, j: j - n <= i),
                "the ones of the mask stand behind the text's, not before them": lambda o=out, n=n, m=mask: o(
                    lambda r, i, j: j <= i + n and (j >= m.shape[1] or bool(m[r, j]))
                ),
                "the prefix takes no part": lambda o=out, f=sees, n=n: o(lambda r, i, j: j >= n and f(r, i, j)),
                "key-value heads are dealt out in turns; head h belongs to number h // (heads // kv heads)": (
                    lambda o=out, kv=kv_heads: o(of=lambda head: head % kv)
                ),
                "the scores are not divided by the root of the head width": lambda o=out: o(scale=1.0),
                "the scores are divided by the head width, not by its root": lambda o=out, w=w: o(scale=1 / w),
                "the scores are divided by the root of d, the width of all heads": lambda o=out, d=w * heads: o(
                    scale=d**-0.5
                ),
                "what is not seen gets the score 0, and exp(0) = 1: it takes −∞": lambda o=out: o(empty="score 0"),
                "the shares of a token do not sum to 1: mask the scores before the softmax": lambda o=out: o(
                    empty="share cut"
                ),
                "prefix_k and prefix_v changed places": lambda o=out: o(swap=True),
                "no gradient reaches the prefix: it was detached": lambda o=out: o(slope=0),
            },
        )


# share ---------------------------------------------------------------------------------------------------------------
def share_cases(rng: Random):
    for side, n, dtype, mask_dtype in (
        ("no", 2, torch.float64, torch.int64),
        ("right", 3, torch.float32, torch.int64),
        ("left", 8, torch.float64, torch.bool),
    ):
        rows, heads = rng.choice([3, 4]), rng.choice([2, 5])
        mask = padded(rng, rows, side).to(mask_dtype)
        length = mask.shape[1]
        attention = normal(rng, rows, heads, length, n + length, dtype=torch.float64).softmax(-1)
        attention, counted = attention.to(dtype), mask.bool()
        filled = counted.double().mean().item()

        def mean(columns=range(n), real=counted, each=sum, attention=attention):
            """The mean over these tokens of what each makes of a token's shares in these columns."""
            rows, heads, length, _ = attention.shape
            tokens = [(r, i) for r in range(rows) for i in range(length) if real[r, i]]
            found = [
                sum(each([attention[r, h, i, j].item() for j in columns]) for r, i in tokens) / len(tokens)
                for h in range(heads)
            ]
            return torch.tensor(found, dtype=attention.dtype)

        def by_text(mean=mean, mask=counted, dtype=dtype):
            rows = torch.eye(len(mask), dtype=torch.bool)
            return torch.stack([mean(real=mask & row[:, None]).double() for row in rows]).mean(0).to(dtype)

        everyone = torch.ones_like(counted)
        yield Case(
            f"average over the real tokens of {rows} texts with "
            + f"{padding(side)}, for {heads} heads and {n} places in front",
            (attention, n, mask),
            mean(),
            wrong={
                "the padding's own attention is averaged in": lambda m=mean, e=everyone: m(real=e),
                "it is summed over the real tokens and divided by all places": lambda m=mean, f=filled: f * m(),
                "every text counts the same: average over tokens, not over texts first": by_text,
                "the last n columns are taken: the prefix stands in front": lambda m=mean, n=n, t=n + length: m(
                    range(t - n, t)
                ),
                "this is the text's share: the prefix has the rest": lambda m=mean: 1 - m(),
                "this is the mean share of one place: sum over the n places": lambda m=mean, n=n: m() / n,
                "only the first place is counted": lambda m=mean: m(range(1)),
                "the largest share of a place is taken: sum over the n places": lambda m=mean: m(each=max),
                "this is the sum over the tokens: divide by their number": lambda m=mean, c=counted: m() * c.sum(),
                "only the first text is looked at": lambda m=mean, c=counted: m(
                    real=c & (torch.arange(len(c)) < 1)[:, None]
                ),
                "the heads are averaged too": lambda m=mean: m().mean(),
            },
        )


# fold ----------------------------------------------------------------------------------------------------------------
def fold_cases(rng: Random):
    for places, dtype in ((None, torch.float64), (None, torch.float32), (1, torch.float64)):
        n, width, hidden, out = rng.sample(range(2, 13), 4)
        n = places or n
        E, W1, b1 = (normal(rng, *shape, dtype=dtype) for shape in ((n, width), (hidden, width), (hidden,)))
        W2, b2 = normal(rng, out, hidden, dtype=dtype), normal(rng, out, dtype=dtype)

        def written(inner=torch.tanh, outer=lambda x: x, first=1, second=1, E=E, W1=W1, b1=b1, W2=W2, b2=b2):
            """Row by row and number by number: P = W₂·tanh(W₁·E + b₁) + b₂."""
            rows = []
            for e in E.double():
                h = torch.stack([(w * e).sum() + first * b for w, b in zip(W1.double(), b1.double(), strict=True)])
                h = inner(h)
                rows.append(torch.stack([(w * h).sum() + second * b for w, b in zip(W2.double(), b2, strict=True)]))
            return {"file": {"prompt_embeddings": outer(torch.stack(rows)).to(E.dtype)}, "gradient": False}

        yield Case(
            f"hold P of shape ({n}, {out}) under the name prompt_embeddings, and nothing else, without a gradient",
            (E, W1, b1, W2, b2),
            written(),
            wrong={
                "tanh is missing, so that the two layers are one matrix": lambda w=written: w(lambda h: h),
                "tanh stands after the second layer": lambda w=written: w(lambda h: h, torch.tanh),
                "tanh is taken twice: there is none after the second layer": lambda w=written: w(outer=torch.tanh),
                "ReLU stands where tanh belongs": lambda w=written: w(lambda h: h.clamp(min=0)),
                "the sigmoid stands where tanh belongs": lambda w=written: w(torch.sigmoid),
                "b₁ is missing": lambda w=written: w(first=0),
                "b₂ is missing": lambda w=written: w(second=0),
                "both biases are missing": lambda w=written: w(first=0, second=0),
                "P still has a gradient: detach it, a file holds numbers": lambda w=written: w() | {"gradient": True},
            },
        )


# find the bug --------------------------------------------------------------------------------------------------------
EXERCISES = (
    Exercise(
        "count_prefix", "What a prefix costs", count_cases,
        (
            "Every place has a key and a value in every layer. How wide are these, if several heads share them?",
            "16 heads at width 1024 are 64 wide each. With 4 key-value heads K has 4 · 64 numbers at a place, not "
            "1024.",
        ),
        ("count_prefix",),
    ),
    Exercise(
        "split_prefix", "From a row to keys and values", split_cases,
        (
            "A row goes K of layer 0, V of layer 0, K of layer 1, …, and inside each of them head by head. View it so, "
            "with one axis for each of these, and move the axes only after that.",
            "Five axes: places, layers, 2, heads, w. `view` names them in the row's order, `permute` moves them, "
            "`expand` adds the rows.",
        ),
        ("split_prefix",), "prefixes.split",
    ),
    Exercise(
        "attend", "Attention with a prefix", attend_cases,
        (
            "Put the prefix before K and V, repeat each key-value head for its group (repeat_interleave), and let a "
            "token see the whole prefix and the text up to itself, without the padding.",
            "`tril(n)` of a table (T, n + T) is the prefix and the past. Hide before the softmax, by a large "
            "negative number: a row of −∞ alone gives NaN.",
        ),
        ("attend",), "prefixes.look_back",
    ),
    Exercise(
        "prefix_share", "Who looks at the prefix", share_cases,
        (
            "Sum over the first n columns: (rows, heads, T). Then average over the real tokens of all texts.",
            "With T moved beside the rows, a boolean mask (rows, T) picks the real tokens of all texts: (tokens, "
            "heads) is left.",
        ),
        ("prefix_share",),
    ),
    Exercise(
        "fold_prefix", "Fold the network away", fold_cases,
        (
            "F.linear(E, W1, b1) is the first layer, for all places at once; tanh, and the second in the same way.",
            "Two layers with tanh between and nothing after. Weights are (outputs, inputs), as `F.linear` takes "
            "them. What cuts a gradient?",
        ),
        ("fold_prefix",), "prefixes.fold",
    ),
    Exercise(
        "repaired_prefix", "Find the bug", repair_cases,
        (
            "There are four faults: how a row is cut, where the triangle starts, at which end the mask grows, and what "
            "the text's positions are.",
            "A row goes layer by layer. Token 0 sees n places before it. The mask grows where the prefix stands; "
            "where does the text begin?",
        ),
        ("repaired_prefix",), "prefixes.read_behind_prefix",
    ),
)  # fmt: skip
