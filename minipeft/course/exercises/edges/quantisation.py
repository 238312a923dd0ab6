"""The edges of the assignment `quantisation`."""

from __future__ import annotations

from random import Random

import torch
from torch import nn
from torch.nn import functional as F

from minipeft.course.exercises.draw import holds, normal
from minipeft.course.verdict import Case, differ


def bits_per_parameter(block, second_block=None):
    return 4 + 32 / block if second_block is None else 4 + 8 / block + 32 / (block * second_block)


def bits_edges(rng: Random):
    yield "count for blocks of a single number", (1, None)
    yield "count for a second block of 1", (64, 1)
    yield "count where both are 1", (1, 1)


def quantise_blocks(w, code, block):
    flat = w.flatten()
    blocks = F.pad(flat, (0, -len(flat) % block)).view(-1, block)
    scales = blocks.abs().amax(1)
    units = (blocks / torch.where(scales > 0, scales, 1)[:, None]).flatten()[: len(flat)]
    return (units[:, None] - code).abs().argmin(1).to(torch.uint8), scales


def spread_code(size: int, dtype=torch.float64) -> torch.Tensor:
    return torch.linspace(-1, 1, size, dtype=dtype)


def quantise_edges(rng: Random):
    code = torch.tensor([-1.0, -0.7, -0.31, 0.0, 0.17, 0.52, 1.0], dtype=torch.float64)

    def w(*shape, scale=1.0):
        return scale * normal(rng, *shape, dtype=torch.float64)

    yield "take a vector", (w(11), code, 4)
    yield "take three dimensions", (w(2, 3, 4), code, 5)
    yield "take a single number", (w(1), code, 4)
    yield "take blocks of a single number", (w(3, 3), code, 1)
    yield "take a square weight, in blocks as long as a row", (w(4, 4), code, 4)
    yield "take tiny numbers", (w(3, 4, scale=1e-9), code, 4)
    yield "take the tiniest numbers", (w(3, 4, scale=1e-30), code, 4)
    yield "take large numbers", (w(3, 4, scale=1e9), code, 4)
    yield "take a code of 256 values", (w(3, 8), spread_code(256), 4)
    yield "take a code whose values are not in order", (w(3, 8), code[[3, 0, 6, 1, 5, 2, 4]], 4)
    yield "take a code without a zero", (w(3, 8) + torch.eye(3, 8), torch.tensor([-1.0, -0.4, 0.3, 1.0]).double(), 4)
    yield "give zeros the value nearest to 0, in a code without a zero", (
        torch.zeros(2, 4, dtype=torch.float64), torch.tensor([-1.0, -0.4, 0.3, 1.0]).double(), 4,
    )  # fmt: skip
    yield "take a block of zeros beside others", (torch.cat([w(4), 0 * w(4), w(3)]), code, 4)
    yield "take a code of one value", (w(5), code[-1:], 2)
    near = torch.tensor([1.0, 0.08501, 0.08499, -0.15499, -0.15501, 0.34501, 0.34499], dtype=torch.float64)
    yield "choose the nearest where two are almost as near", (near, code, 7)
    yield "take a last block that is short, of tiny numbers", (w(9, scale=1e-7), code, 4)


def pack_nibbles(indices):
    padded = F.pad(indices, (0, len(indices) % 2))
    return padded[0::2] << 4 | padded[1::2]


def unpack_nibbles(packed, n):
    return torch.stack([packed >> 4, packed & 15], dim=1).flatten()[:n]


def bytes_of(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)


def pack_edges(rng: Random):
    yield "make no byte of no code", (bytes_of(),)
    yield "keep the largest codes", (bytes_of(15, 15, 15),)
    yield "keep zeros", (bytes_of(0, 0, 0, 9),)
    yield "keep a single code", (bytes_of(7),)


def unpack_edges(rng: Random):
    yield "get nothing out of nothing", (bytes_of(), 0)
    yield "get the largest codes out again", (bytes_of(255, 240), 3)
    yield "get a single code out", (bytes_of(0x70), 1)
    yield "get zeros out", (bytes_of(0, 9), 4)


def dequantise(indices, code, scales, block, shape):
    return (code[indices.long()] * scales.repeat_interleave(block)[: len(indices)]).reshape(tuple(shape))


def dequantise_edges(rng: Random):
    def args(shape, block, size=7):
        n = torch.Size(shape).numel()
        indices = torch.tensor([rng.randrange(size) for _ in range(n)], dtype=torch.uint8)
        return indices, spread_code(size) ** 3, normal(rng, -(-n // block), dtype=torch.float64).abs(), block, shape

    for what, each in {
        "a vector": args((11,), 4),
        "a last block of one number": args((9,), 4),
        "three dimensions": args((2, 3, 4), 5),
        "a single number": args((1,), 4),
        "blocks of a single number": args((3, 3), 1),
        "a block longer than the tensor": args((3, 3), 20),
        "a code of 256 values": args((5, 8), 4, 256),
        "a square shape": args((4, 4), 4),
        "a shape of dimensions of 1": args((1, 5, 1), 2),
        "a code of 200 values": args((9, 8), 4, 200),
        "three dimensions in whole blocks": args((2, 3, 4), 4),
        "a vector in whole blocks": args((8,), 4),
    }.items():
        yield f"give back {what}", each
    indices, code, scales, *rest = args((3, 5), 4)
    yield "give zeros where the scale of a block is 0, whatever its indices", (indices, code, 0 * scales, *rest)
    yield "take tiny scales", (indices, code, 1e-6 * scales, *rest)
    yield "have the type of the code, where scales are stored in less", (indices, code, scales.float(), *rest)


class RepairedQuantisedLinear(nn.Module):
    def __init__(self, linear, code, block):
        super().__init__()
        self.shape, self.bias, self.code, self.block = linear.weight.shape, linear.bias, code, block
        self.indices, self.scales = quantise_blocks(linear.weight.detach(), code, block)

    def forward(self, x):
        W = dequantise(self.indices, self.code, self.scales, self.block, self.shape)
        return F.linear(x, W, self.bias)


def layer_edges(rng: Random):
    code = torch.tensor([-1.0, -0.7, -0.31, 0.0, 0.17, 0.52, 1.0])
    for what, (d_out, d_in), block, batch, bias, zero in (
        ("no bias", (5, 7), 4, (3,), False, False),
        ("a single vector", (5, 7), 4, (), True, False),
        ("a square weight", (6, 6), 6, (3,), True, False),
        ("a block of zeros", (5, 8), 8, (3,), True, True),
        ("a block longer than the weight", (5, 7), 99, (3,), True, False),
        ("one output", (1, 7), 3, (2, 2), True, False),
        ("many rows and blocks", (40, 50), 8, (130,), True, False),
    ):
        W = normal(rng, d_out, d_in)
        W[1:2] *= 0.0 if zero else 1.0
        b = normal(rng, d_out) if bias else None
        x, g = normal(rng, *batch, d_in), normal(rng, *batch, d_out)
        indices, scales = quantise_blocks(W, code, block)
        stored = dequantise(indices, code, scales, block, W.shape)
        wanted = {"output": F.linear(x, stored, b), "gradient": g @ stored}

        def judge(seen, wanted=wanted):
            lines = differ({name: seen[name] for name in wanted}, wanted)
            return " ".join(lines) or holds(seen)

        yield Case(f"serve {what}", (W, b, code, block, x, g), judge=judge)


FROZEN = "a quantised weight is frozen: no gradient is asked for"
CODES = {each: "codes are bytes" for each in ("types", "gradient")}
EDGES = {
    "bits_per_parameter": {"reference": (bits_per_parameter,), "edges": bits_edges},
    "quantise_blocks": {
        "reference": (quantise_blocks,),
        "edges": quantise_edges,
        "without": {"types": "in 16 bits two values may be equally near", "gradient": FROZEN},
    },
    "pack_nibbles": {"reference": (pack_nibbles,), "edges": pack_edges, "without": CODES},
    "unpack_nibbles": {"reference": (unpack_nibbles,), "edges": unpack_edges, "without": CODES},
    "dequantise": {"reference": (dequantise,), "edges": dequantise_edges, "without": {"gradient": FROZEN}},
    "RepairedQuantisedLinear": {
        "reference": (RepairedQuantisedLinear,),
        "edges": layer_edges,
        "without": {
            "strided": "a layer's weight is contiguous, and x goes into a linear layer",
            "types": "in 16 bits two values may be equally near",
            "gradient": "its drive looks at the gradient of x itself",
        },
    },
}
