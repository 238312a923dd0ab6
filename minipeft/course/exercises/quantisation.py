"""Assignment `quantisation`: a weight as 4-bit codes with a scale for each block, and back."""

from __future__ import annotations

import math
from random import Random

import torch

from minipeft.course.exercises.draw import normal
from minipeft.course.verdict import Case, Exercise


# The reference: one number at a time ---------------------------------------------------------------------------------
def some_code(rng: Random, size: int, dtype=torch.float32) -> torch.Tensor:
    """`size` ascending values from −1 to 1, unevenly spaced, with a zero that is not in the middle."""
    steps = sorted(rng.sample([i for i in range(-48, 49) if i], size - 3))
    return torch.tensor([-1.0, *(i / 50 for i in sorted([*steps, 0])), 1.0], dtype=dtype)


def some_weight(rng: Random, rows: int, columns: int, block: int, dtype=torch.float32) -> torch.Tensor:
    """Normal numbers whose spread differs from block to block; the largest of the first block is negative."""
    flat = normal(rng, rows * columns, dtype=dtype)
    for start in range(0, len(flat), block):
        flat[start : start + block] *= 10 ** rng.uniform(-1, 1)
    largest = flat[:block].abs().argmax()
    flat[largest] = -flat[largest].abs()
    return flat.view(rows, columns)


def absmax(w: torch.Tensor, block: int) -> torch.Tensor:
    flat = w.flatten().tolist()
    scales = [max(abs(v) for v in flat[start : start + block]) for start in range(0, len(flat), block)]
    return torch.tensor(scales, dtype=w.dtype)


def spread(indices: torch.Tensor, code: torch.Tensor, scales: torch.Tensor, block: int, shape: tuple) -> torch.Tensor:
    # x̂_i = code[index_i] · scale of the block i // block
    values = [code[k].item() * scales[i // block].item() for i, k in enumerate(indices.tolist())]
    return torch.tensor(values, dtype=code.dtype).view(shape)


def nearest(w: torch.Tensor, code: torch.Tensor, scales: torch.Tensor, block: int) -> torch.Tensor:
    units = [v / (scales[i // block].item() or 1.0) for i, v in enumerate(w.flatten().tolist())]
    values = code.tolist()
    return torch.tensor([min(range(len(values)), key=lambda k, u=u: abs(u - values[k])) for u in units])


# bits ----------------------------------------------------------------------------------------------------------------
def bits_cases(rng: Random):
    plain, double = (rng.choice([16, 24, 48]), None), (rng.choice([32, 40, 128]), rng.randint(70, 500))
    for block, second in ((64, None), (64, 256), plain, double):
        if second is None:
            # 4 bits of code, and 32 bits of scale shared by the block
            right, how = 4 + 32 / block, "with a float32 scale for each block"
            other = 4 + 8 / block
        else:
            # the scale has 8 bits now; 32 bits more for `second` blocks together
            right, how = 4 + 8 / block + 32 / (block * second), "with double quantisation"
            other = 4 + 32 / block
        pair = second or 1
        yield Case(
            f"count the bits of a parameter {how} (block {block}, second block {second})",
            (block, second),
            right,
            wrong={
                "the scales are not counted": lambda: 4.0,
                "double quantisation comes with a second_block, and only then": lambda v=other: v,
                "the scale of the scales is not counted": lambda b=block: 4 + 8 / b,
                "the scales of the scales are not shared by second_block blocks": lambda b=block: 4 + 8 / b + 32 / b,
                "32/second_block is added: a second block holds block·second_block numbers": lambda b=block, s=pair: (
                    4 + 8 / b + 32 / s
                ),
                "a scale is taken to have 16 bits": lambda b=block: 4 + 16 / b,
                "bytes are counted": lambda v=right: v / 8,
            },
        )


# quantise ------------------------------------------------------------------------------------------------------------
def quantise_cases(rng: Random):
    plans = (
        (torch.float32, 16, "whole"),
        (torch.float64, 16, "short"),
        (torch.float32, 8, "short"),
        (torch.float32, 16, "zero"),
        (torch.float64, 5, "one"),
    )
    for dtype, size, kind in plans:
        block, rows = rng.randint(4, 9), rng.randint(3, 6)
        columns = 2 * block if kind in ("whole", "zero") else 2 * block + rng.randint(1, block - 1)
        rows += kind == "short" and rows * columns % block == 0
        columns += kind == "short" and rows * columns % block == 0
        block = rows * columns + 3 if kind == "one" else block
        w, code = some_weight(rng, rows, columns, block, dtype), some_code(rng, size, dtype)
        if kind == "zero":
            w.view(-1)[block : 2 * block] = 0.0
        what = {
            "whole": "for whole blocks",
            "short": "when the last block is short",
            "zero": "when a block holds nothing but zeros",
            "one": "when the block is longer than the tensor",
        }[kind]

        def scales(seen, w=w, block=block):
            want, got = absmax(w, block), seen["scales"]
            if not isinstance(got, torch.Tensor) or got.shape != want.shape:
                found = f"shape {tuple(got.shape)}" if isinstance(got, torch.Tensor) else f"type {type(got).__name__}"
                return f"{w.numel()} numbers in blocks of {block} have {len(want)} scales; yours have the {found}."
            if got.dtype != want.dtype:
                return f"The scales are {got.dtype}; w is {want.dtype}."
            if torch.allclose(got, want, rtol=1e-5, atol=1e-30):
                return None
            parts = w.flatten().split(block)
            known = {
                "The sign counts there: take the largest |w|. ": torch.stack([p.max() for p in parts]),
                "There is one scale for the whole tensor. ": w.abs().max().expand(len(parts)),
                "It is the mean of |w|, not the largest. ": torch.stack([p.abs().mean() for p in parts]),
                "It is the norm of the block. ": torch.stack([p.norm() for p in parts]),
                "It goes down the columns; blocks follow the rows. ": absmax(w.T, block),
                "It is one over the largest |w|. ": 1 / want,
            }
            why = next((text for text, value in known.items() if torch.allclose(got, value, rtol=1e-4)), "")
            i = int((got - want).abs().nan_to_num(math.inf).argmax())
            return f"{why}The scale of block {i} is {got[i].item():.5g}; its largest |w| is {want[i].item():.5g}."

        def indices(seen, w=w, code=code, block=block):
            got = seen["indices"]
            if not isinstance(got, torch.Tensor) or got.dtype != torch.uint8:
                found = got.dtype if isinstance(got, torch.Tensor) else type(got).__name__
                return f"The indices should be torch.uint8, a byte each; they are {found}."
            if got.shape != (w.numel(),):
                return f"The indices have shape {tuple(got.shape)}; one for each number is ({w.numel()},)."
            if int(got.max()) >= len(code):
                return f"There is an index {int(got.max())}, but the code has {len(code)} values: 0 … {len(code) - 1}."
            scales = absmax(w, block).clamp(min=1e-30)
            units = w.flatten().double() / scales.double().repeat_interleave(block)[: w.numel()]
            away = (units[:, None] - code.double()).abs()
            late = away.gather(1, got.long()[:, None])[:, 0] - away.min(1).values
            # a number in the middle between two values may go either way
            if (wrong := late > (1e-5 if w.dtype == torch.float32 else 1e-9)).any():
                i = int(late.argmax())
                zero = "" if w.flatten()[i] else "A block of zeros was divided by its scale, 0: that is NaN. "
                return (
                    f"{zero}{int(wrong.sum())} of {w.numel()} numbers do not get the nearest value: {units[i]:.3f} "
                    f"(after scaling) gets {code[int(got[i])]:.3f}, but {code[int(away[i].argmin())]:.3f} is nearer."
                )

        def kept(seen):
            return None if seen["arguments kept"] else "It changes w or the code; work out of place."

        args = (w, code, block)
        yield Case(f"give the largest |w| of each block as its scale {what} ({dtype})", args, judge=scales)
        yield Case(f"give each number the index of the nearest value {what}", args, judge=indices)
        yield Case("leave its arguments as they were", args, judge=kept)


# pack, unpack --------------------------------------------------------------------------------------------------------
def nibbles(rng: Random):
    """(codes, bytes): written as hexadecimal digits, two of which are a byte."""
    for n in (2, 8, 7, rng.randrange(30, 60, 2), rng.randrange(31, 61, 2), 1):
        codes = [rng.randrange(16) for _ in range(n)]
        codes[:2] = [rng.randint(9, 15), rng.randint(1, 8)][:n]
        digits = "".join(f"{c:x}" for c in codes) + "0" * (n % 2)
        yield torch.tensor(codes, dtype=torch.uint8), torch.tensor(list(bytes.fromhex(digits)), dtype=torch.uint8)


def pack_cases(rng: Random):
    for codes, packed in nibbles(rng):
        n = len(codes)
        high, low = packed >> 4, packed & 15
        yield Case(
            f"put {n} code{'s' * (n > 1)} into {len(packed)} byte{'s' * (n > 2)}, the first in the high half"
            + (", then a 0" if n % 2 else ""),
            (codes,),
            packed,
            exact=True,
            wrong={
                "the first of each pair stands in the low half": lambda h=high, o=low: h | o << 4,
                "the two codes are added without a shift": lambda h=high, o=low: h + o,
                "the last code is lost when their number is odd": lambda p=packed, n=n: p[: n // 2],
                "the first half of the codes is paired with the second": lambda c=codes, p=packed: (
                    torch.cat([c, c[:0].new_zeros(len(c) % 2)]).view(2, -1)[0] << 4
                    | torch.cat([c, c[:0].new_zeros(len(c) % 2)]).view(2, -1)[1]
                ),
                "the bytes are not uint8": lambda p=packed: p.long(),
            },
        )


def unpack_cases(rng: Random):
    for codes, packed in nibbles(rng):
        n = len(codes)
        both = torch.stack([packed & 15, packed >> 4], 1).flatten()
        yield Case(
            f"get the {n} code{'s' * (n > 1)} out of {len(packed)} byte{'s' * (n > 2)} again",
            (packed, n),
            codes,
            exact=True,
            wrong={
                "the low half comes first": lambda b=both, n=n: b[:n],
                "the padding is still there: only n codes were stored": lambda c=codes: torch.cat([c, c[:1] * 0]),
                "first come all the high halves, then all the low ones": lambda p=packed, n=n: torch.cat(
                    [p >> 4, p & 15]
                )[:n],
                "the high half is not shifted down": lambda p=packed, n=n: torch.stack([p & 240, p & 15], 1).flatten()[
                    :n
                ],
                "the codes are not uint8": lambda c=codes: c.long(),
            },
        )


# dequantise ----------------------------------------------------------------------------------------------------------
def dequantise_cases(rng: Random):
    for dtype, size, rest in ((torch.float32, 16, 0), (torch.float64, 16, 2), (torch.float32, 7, 1)):
        block = rng.randint(4, 9)
        d_out, d_in = rng.randint(3, 6), 2 * block + rest
        d_out += rest > 0 and d_out * d_in % block == 0
        n = d_out * d_in
        code = some_code(rng, size, dtype)
        indices = torch.tensor([rng.randrange(size) for _ in range(n)], dtype=torch.uint8)
        scales = normal(rng, -(-n // block), dtype=dtype).abs() + 0.1
        right = spread(indices, code, scales, block, (d_out, d_in))
        plain, turns, each = code[indices.long()], scales.repeat(block)[:n], scales.repeat_interleave(block)[:n]

        def shaped(values, shape=(d_out, d_in), dtype=dtype):
            return lambda: values.to(dtype).view(shape)

        short = ", with a short last block" if n % block else ""
        yield Case(
            f"give code[index]·scale in the shape {(d_out, d_in)}{short} ({dtype})",
            (indices, code, scales, block, (d_out, d_in)),
            right,
            wrong={
                "the scales are left out": shaped(plain),
                "the scales take turns, but a scale belongs to numbers that follow each other": shaped(plain * turns),
                "it divides by the scale": shaped(plain / each),
                "every block gets the first scale": shaped(plain * scales[0]),
                "the matrix is filled column by column": lambda r=right: r.flatten().view(r.shape[::-1]).T,
                "the indices themselves are scaled; look them up in the code": shaped(indices * each),
            },
        )


# find the bug --------------------------------------------------------------------------------------------------------
def clear(rng: Random, d_out: int, d_in: int, code: torch.Tensor, block: int) -> torch.Tensor:
    """A weight none of whose numbers lies (almost) in the middle between two values, where rounding decides."""
    while True:
        w = some_weight(rng, d_out, d_in, block)
        units = w.flatten() / absmax(w, block).repeat_interleave(block)[: w.numel()]
        if (units[:, None] - (code[1:] + code[:-1]) / 2).abs().min() > 1e-6:
            return w


def layer_cases(rng: Random):
    for rest in (0, 1, 3):
        block = rng.randint(5, 9)
        d_out, d_in = rng.randint(5, 8), 2 * block + rest
        d_out += rest > 0 and d_out * d_in % block == 0
        code = some_code(rng, 16)
        W, b = clear(rng, d_out, d_in, code, block), normal(rng, d_out)
        x, g = normal(rng, 2, 3, d_in), normal(rng, 2, 3, d_out)
        scales = absmax(W, block)
        stored = spread(nearest(W, code, scales, block), code, scales, block, (d_out, d_in))
        n, least = d_out * d_in, d_out * d_in + 4 * len(scales)
        small = least + n / 2 + 4 * len(code) + 8 * d_out + 64
        args = (W, b, code, block, x, g)

        def output(seen, W=W, b=b, x=x, code=code, stored=stored, block=block):
            got, want = seen["output"], x @ stored.T + b
            if got.shape != want.shape:
                return f"The output has shape {tuple(got.shape)} instead of {tuple(want.shape)}."
            if torch.allclose(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item()):
                return None
            one = W.abs().max().view(1)
            whole = spread(nearest(W, code, one, W.numel()), code, one, W.numel(), W.shape)
            signed = torch.stack([part.max() for part in W.flatten().split(block)])
            known = {
                "It multiplies by the dense W. ": x @ W.T + b,
                "There is one scale for the whole matrix. ": x @ whole.T + b,
                "The sign counts in the scales: take |w|. ": x
                @ spread(nearest(W, code, signed, block), code, signed, block, W.shape).T
                + b,
                "The bias is missing. ": want - b,
            }
            why = next((text for text, value in known.items() if torch.allclose(got, value, rtol=1e-3, atol=1e-3)), "")
            return f"{why}The largest difference from x·Ŵᵀ + b is {(got - want).abs().max().item():.3g}."

        def size(seen, n=n, small=small, least=least):
            if seen["bytes"] > small:
                return (
                    f"The layer holds {seen['bytes']:,} bytes of tensors, {seen['bytes'] / n:.1f} a weight; indices of "
                    f"uint8 and the scales are {least / n:.1f} a weight. Is a dense weight, or a wide index, kept?"
                )

        def gradient(seen, g=g, stored=stored, W=W):
            got, want = seen["gradient"], g @ stored
            if not isinstance(got, torch.Tensor):
                return "No gradient reaches x, so nothing below this layer can train: `no_grad` covers the product."
            if got.shape == want.shape and torch.allclose(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item()):
                return None
            dense = got.shape == want.shape and torch.allclose(got, g @ W, rtol=1e-3, atol=1e-3)
            return f"The gradient of x is not g·Ŵ{': it is that of the dense W' if dense else ''}."

        yield Case("compute x·Ŵᵀ + b with a scale for each block of W", args, judge=output)
        yield Case("hold indices and scales, and no dense weight", args, judge=size)
        yield Case("let the gradient through to x", args, judge=gradient)


EXERCISES = (
    Exercise(
        "bits_per_parameter", "Bits a parameter", bits_cases,
        (
            "A scale of 32 bits is shared by the `block` numbers of its block.",
            "32 bits for 64 numbers are half a bit each. Doubly quantised, a scale costs 8 bits: how many *numbers* "
            "share the 32?",
        ),
        ("bits_per_parameter",),
    ),
    Exercise(
        "quantise_blocks", "Quantising block by block", quantise_cases,
        (
            "Pad the flat tensor with zeros to whole blocks, view as (blocks, block), then cut the padding off.",
            "The largest |w| of a row is one `amax`; where it is 0, divide by 1. The nearest value has the least "
            "distance: broadcast (n, 1) against the code.",
        ),
        ("quantise_blocks",), "quantisation.quantise",
    ),
    Exercise(
        "pack_nibbles", "Two codes a byte", pack_cases,
        (
            "`indices[0::2]` are the first of each pair, `indices[1::2]` the second. Add a 0 first if one is missing.",
            "163 is 10·16 + 3: four bits to the left multiply by 16. uint8 stays uint8 if you never leave it.",
        ),
        ("pack_nibbles",),
    ),
    Exercise(
        "unpack_nibbles", "And out again", unpack_cases,
        (
            "`packed >> 4` is the high half of each byte, `packed & 15` the low half.",
            "Two columns (bytes, 2), read row by row, are the codes in order: does `cat` or `stack` make them? Then "
            "drop the padding.",
        ),
        ("unpack_nibbles",),
    ),
    Exercise(
        "dequantise", "Back to numbers", dequantise_cases,
        (
            "A uint8 tensor used as an index is taken for a mask: convert it with .long().",
            "`repeat_interleave` gives each number the scale of its block. The last block may be short, so some are "
            "left over.",
        ),
        ("dequantise",),
    ),
    Exercise(
        "RepairedQuantisedLinear", "Find the bug", layer_cases,
        (
            "There are four faults: the sign, the number of scales, what is kept, and what is in the no_grad block.",
            "Your quantise_blocks mends two. Then: what keeps W alive, and which line does the gradient of x have to "
            "pass?",
        ),
        ("RepairedQuantisedLinear",), "quantisation.quantised_layer",
    ),
)  # fmt: skip
