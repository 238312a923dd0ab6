"""The last exercise of the assignment `prefixes`: find the bug."""

from __future__ import annotations

from random import Random

import torch

from minipeft.course.drives.prefixes import Decoder
from minipeft.course.exercises.draw import many, normal, padded, padding, whole
from minipeft.course.verdict import Case


def decoder(rng: Random, layers: int, heads: int, kv_heads: int, head_dim: int, words: int, places: int) -> Decoder:
    d = heads * head_dim

    def matrix(out):
        return normal(rng, out, d, dtype=torch.float64) / d**0.5

    maps = [(matrix(d), matrix(kv_heads * head_dim), matrix(kv_heads * head_dim)) for _ in range(layers)]
    return Decoder(*(normal(rng, m, d, dtype=torch.float64) for m in (words, places)), maps, head_dim)


def causal(length: int, n: int, diagonal: int | None = None) -> torch.Tensor:
    """(T, n + T): token i sees n places in front and the tokens up to its own."""
    return torch.tensor(
        [[j <= i + (n if diagonal is None else diagonal) for j in range(n + length)] for i in range(length)]
    )


def alone(model: Decoder, prefix: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Each text by itself, with no padding: logits (rows, T, words), zeros at the padding."""
    n, size = len(prefix), model.kv_heads * model.head_dim
    # a row holds K of layer 0, V of layer 0, K of layer 1, …, each of `size` numbers
    parts = [prefix[:, i * size : (i + 1) * size] for i in range(2 * model.layers)]
    parts = [part.view(1, n, model.kv_heads, model.head_dim).transpose(1, 2) for part in parts]
    logits = []
    for tokens, real in zip(ids, mask.bool(), strict=True):
        length = int(real.sum())
        positions = torch.arange(n, n + length)[None]
        past = list(zip(parts[::2], parts[1::2], strict=True))
        z = model(tokens[real][None], positions, causal(length, n)[None], past)[0]
        logits.append(torch.zeros(len(tokens), z.shape[-1], dtype=z.dtype).masked_scatter(real[:, None], z))
    return torch.stack(logits)


def together(
    model: Decoder, prefix, ids, mask, positions, order="layers", diagonal=None, ones="before", shift=None
) -> torch.Tensor:
    """All texts at once, with what somebody may do wrong; only to name it."""
    (rows, length), n = ids.shape, len(prefix)
    if order == "halves":
        states = prefix.view(n, 2, model.layers, model.kv_heads, model.head_dim).permute(2, 1, 3, 0, 4)
    elif order == "at once":
        states = prefix.view(model.layers, 2, model.kv_heads, n, model.head_dim)
    else:
        states = prefix.view(n, model.layers, 2, model.kv_heads, model.head_dim).permute(1, 2, 3, 0, 4)
    past = [tuple(each.expand(rows, -1, -1, -1) for each in pair) for pair in states]
    front = mask.new_full((rows, n), int(ones != "none"))
    real = torch.cat([mask, front] if ones == "behind" else [front, mask], 1).bool()
    visible = causal(length, n, diagonal) & (real[:, None] if ones != "padding too" else True)
    if shift == "padding too":
        positions, shift = torch.arange(length).expand(rows, -1), n
    places = positions + (n if shift is None else shift)
    logits = model(ids, places, visible.expand(rows, -1, -1), past)
    return logits.masked_fill(~mask.bool()[..., None], 0.0)


def repair_cases(rng: Random):
    for layers, side, from_words in (
        (1, "no", False),
        (2, "no", False),
        (3, "right", False),
        (2, "left", False),
        (2, "left", True),
    ):
        kv_heads, head_dim, words, rows, n = 2, rng.randint(2, 4), rng.randint(9, 15), 3, rng.randint(2, 4)
        mask = padded(rng, rows, side)
        length = mask.shape[1]
        model = decoder(rng, layers, 2 * kv_heads, kv_heads, head_dim, words, n + length)
        ids, front = (
            torch.tensor([[rng.randrange(words) for _ in range(m)] for _ in range(rows)]) for m in (length, n)
        )
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        prefix = normal(rng, n, layers * 2 * kv_heads * head_dim, dtype=torch.float64)
        if from_words:
            ahead = front[:1]
            states = model.states(ahead, torch.arange(n)[None], causal(n, 0)[None])[1]
            prefix = torch.cat([each[0].transpose(0, 1).flatten(1) for pair in states for each in pair], 1)
        weights = whole(rng, rows, length, words)
        tensors = (prefix, ids, mask, positions)
        args = (model.embed, model.places, model.maps, head_dim, *tensors, weights)

        def out(read, slope=1, prefix=prefix, weights=weights):
            """The logits, and the prefix's gradient of Σ weights · logits."""
            leaf = prefix.clone().requires_grad_()
            logits = read(leaf)
            (found,) = torch.autograd.grad((logits * weights).sum(), leaf)
            return {"logits": logits.detach(), "gradient": slope * found}

        def fault(o=out, model=model, ids=ids, mask=mask, positions=positions, **faults):
            return lambda: o(lambda leaf: together(model, leaf, ids, mask, positions, **faults))

        claim = (
            f"give, with {many(layers, 'layer')} and {padding(side)}, the logits of each text alone behind the prefix"
        )
        if from_words:
            claim = "do what words do, when the prefix holds the keys and values of these words"
        right = out(lambda leaf, m=model, i=ids, k=mask: alone(m, leaf, i, k))
        yield Case(
            claim,
            args,
            right,
            wrong={
                "the prefix is masked like text, and the text's positions start at 0": fault(diagonal=0, shift=0),
                "the prefix is masked like text: the triangle starts n columns later": fault(diagonal=0),
                "the text's positions start at 0: the prefix stands at 0 … n−1": fault(shift=0),
                "a row is cut into all keys and all values; it goes K, V, K, V, by layer": fault(order="halves"),
                "a row is viewed as (…, kv heads, n, head width) at once: move the axes after the view": fault(
                    order="at once"
                ),
                "the ones of the mask stand behind the text's, not before them": fault(ones="behind"),
                "the mask hides the prefix": fault(ones="none"),
                "the padding is looked at": fault(ones="padding too"),
                "the positions count the padding": fault(shift="padding too"),
                "a token cannot see itself: the triangle includes the diagonal": fault(diagonal=n - 1),
                "tokens see what comes after them": fault(diagonal=n + length),
                "the text's first token stands at n − 1, where the prefix's last place is": fault(shift=n - 1),
                "no gradient reaches the prefix: it was detached": lambda r=right: r | {"gradient": 0 * r["gradient"]},
            },
        )
