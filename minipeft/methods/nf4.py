"""Blockwise quantisation: a weight as short codes and one scale a block (Dettmers et al. 2023, "QLoRA: Efficient
Finetuning of Quantized LLMs", §2 and §3).

    w (64 numbers of a block) ──÷ absmax──▶ [−1, 1] ──nearest of 16 values──▶ 64 codes of 4 bits, two a byte
    absmax: 1 number a block  ──− mean────▶ the same once more, in blocks of 256, with 8-bit codes ("double")

Bits a parameter: 4 + 32/64 = 4.5 with float32 scales; 4 + 8/64 + 32/(64·256) = 4.127 with double quantisation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

Code = tuple[float, ...]  # the values that can be stored: ascending, from −1 to 1, each exact in float32


# ---------------------------------------------------------------------------------------------------------------------
# Which values: a code
# ---------------------------------------------------------------------------------------------------------------------
def normal_float(bits: int = 4) -> Code:
    """NF4 at 4 bits: 2^bits values at quantiles of a normal distribution, scaled into [−1, 1], and an exact zero.

    Eight positive and seven negative quantiles, evenly spaced in probability between ½ and an offset of 0.9677083 =
    1 − ¼(1/15 + 1/16). The paper's Eq. 4 does not give the published values; this rule, from the authors' code, does.
    """
    half = 2 ** (_bits(bits) - 1)
    offset = round(1 - (1 / (2 * half - 1) + 1 / (2 * half)) / 4, 7)

    def quantiles(n: int) -> torch.Tensor:
        # Φ⁻¹ at n probabilities from the offset down to, but without, ½; in float32, as the published table was made
        return torch.special.ndtri(torch.linspace(offset, 0.5, n + 1, device="cpu")[:-1].double()).float()

    values = torch.cat([-quantiles(half - 1), torch.zeros(1, device="cpu"), quantiles(half).flip(0)])
    return tuple((values / values.abs().max()).tolist())


def integer(bits: int = 4) -> Code:
    """Evenly spaced, the same number on both sides of zero: −7/7, …, 7/7 at 4 bits (absmax integers)."""
    steps = 2 ** (_bits(bits) - 1) - 1
    return tuple((torch.arange(-steps, steps + 1, device="cpu") / steps).tolist())


def floating(exponent: int = 2, mantissa: int = 1) -> Code:
    """The floats with a sign, `exponent` and `mantissa` bits (Rouhani et al. 2023, "OCP Microscaling Formats", §5.3),
    scaled into [−1, 1]: FP4 is E2M1, ±(0, ½, 1, 1½, 2, 3, 4, 6)/6; no code is spent on infinity or NaN."""
    _bits(1 + exponent + mantissa)
    if exponent < 1 or mantissa < 0:
        raise ValueError(f"E{exponent}M{mantissa} is no float; it needs an exponent bit, as in floating(2, 1).")
    steps = 2**mantissa
    small = [m / steps for m in range(steps)]  # exponent 0: no leading one
    positive = small + [2 ** (e - 1) * (1 + m / steps) for e in range(1, 2**exponent) for m in range(steps)]
    values = torch.tensor([-v for v in positive[:0:-1]] + positive, device="cpu") / positive[-1]
    return tuple(values.tolist())


def dynamic() -> Code:
    """256 values for scales, dense near zero (Dettmers 2016, "8-Bit Approximations for Parallelism in Deep Learning",
    §3.1): ±10^(i−6) times the middles of 2^i equal parts of [0.1, 1], i = 0…6; and 0 and 1."""
    values = [torch.tensor([0.0, 1.0], device="cpu")]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, device="cpu")
        middles = 10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
        values += [middles, -middles]
    return tuple(torch.cat(values).sort().values.tolist())


def _bits(bits: int) -> int:
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"A code has 2 to 8 bits, but was asked for with {bits!r}.")
    return bits


# ---------------------------------------------------------------------------------------------------------------------
# Codes into bytes
# ---------------------------------------------------------------------------------------------------------------------
def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers below 2^bits, shape (n,), side by side in ⌈n·bits/8⌉ bytes, the first in the highest bits."""
    n, eight = len(codes), torch.arange(7, -1, -1, device=codes.device)
    # Eight codes fill `bits` bytes exactly: put them into one 64-bit word, then cut the word into bytes.
    words = (F.pad(codes.long(), (0, -n % 8)).view(-1, 8) << bits * eight).sum(-1, keepdim=True)
    return (words >> 8 * eight[8 - bits :] & 255).to(torch.uint8).flatten()[: -(-n * bits // 8)].clone()


def unpack(packed: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """The n integers that `pack` put into these bytes."""
    eight = torch.arange(7, -1, -1, device=packed.device)
    groups = F.pad(packed.long(), (0, -len(packed) % bits)).view(-1, bits)
    words = (groups << 8 * eight[8 - bits :]).sum(-1, keepdim=True)
    return (words >> bits * eight & 2**bits - 1).flatten()[:n]


# ---------------------------------------------------------------------------------------------------------------------
# A tensor into codes and scales, and back
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Quantized:
    """A stored tensor x̂ of `shape`: in block b, x̂ = code[packed]·scale_b + offset.

    `packed` uint8 (⌈n·bits/8⌉,); `scale` float32 (blocks,), or itself `Quantized`; `offset` float32 (1,) or None.
    """

    packed: torch.Tensor
    scale: torch.Tensor | Quantized
    offset: torch.Tensor | None
    code: Code
    block: int
    shape: torch.Size
    dtype: torch.dtype

    def dequantize(self) -> torch.Tensor:
        """x̂, of `shape` and `dtype`; computed in float32."""
        scale = self.scale if isinstance(self.scale, torch.Tensor) else self.scale.dequantize()
        n, bits = self.shape.numel(), bits_of(self.code)
        code = torch.tensor(self.code, device=self.packed.device)
        code = F.pad(code, (0, 2**bits - len(code)))  # not all codes need to be in use
        packed, missing = self.packed, len(scale) * self.block * bits // 8 - len(self.packed)
        packed = F.pad(packed, (0, missing)) if missing else packed  # to whole blocks
        if 8 % bits == 0:  # one look-up gives all the values of a byte
            values = F.embedding(packed.int(), torch.cartesian_prod(*[code] * (8 // bits)).view(256, -1))
        else:
            values = code[unpack(packed, bits, len(scale) * self.block)]
        values = values.view(-1, self.block).mul_(scale[:, None])
        values = values if self.offset is None else values + self.offset
        return values.flatten()[:n].view(self.shape).to(self.dtype)

    def bits(self) -> float:
        """Bits stored for each number, scales included: 8·bytes/n."""
        return 8 * sum(tensor.nbytes for tensor in self.tensors().values()) / self.shape.numel()

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that is stored, by name: "packed", "scale" (or "scale_packed", "scale_scale", …), "offset"."""
        double = isinstance(self.scale, Quantized)
        scale = {f"scale_{k}": v for k, v in self.scale.tensors().items()} if double else {"scale": self.scale}
        return {"packed": self.packed, **scale} | ({} if self.offset is None else {"offset": self.offset})

    def over(self, tensors: dict[str, torch.Tensor]) -> Quantized:
        """The same layout, read from other tensors of these names."""
        scale = tensors.get("scale")
        if scale is None:
            scale = self.scale.over({k[6:]: v for k, v in tensors.items() if k.startswith("scale_")})
        return replace(self, packed=tensors["packed"], scale=scale, offset=tensors.get("offset"))


def quantize(
    x: torch.Tensor,
    code: Code | None = None,
    block: int = 64,
    double: bool = True,
    generator: torch.Generator | None = None,
) -> Quantized:
    """Stores x, of any shape, as codes in blocks of `block` consecutive numbers (§3, "Double Quantization").

    Each number becomes the value of `code` (default NF4) that is nearest to x/absmax; with a `generator` it becomes one
    of the two neighbours at random, so that the mean is x ("stochastic rounding", 随机舍入).
    `double` stores the scales as 8-bit codes too: |x̂ − x| ≤ ½·(widest gap of the code)·absmax, plus the scale's error.

    Raises ValueError for NaN or infinite numbers, an empty tensor, and a block that is no multiple of 8.
    """
    code = normal_float() if code is None else code
    if not isinstance(block, int) or block < 8 or block % 8:
        raise ValueError(f"block={block!r} is not a positive multiple of 8, such as 64: a block fills whole bytes.")
    if not x.is_floating_point() or x.numel() == 0:
        raise ValueError(f"A {x.dtype} tensor of shape {tuple(x.shape)} holds no floating-point numbers to quantise.")
    flat = x.detach().flatten().float()
    if not x.is_meta and not flat.isfinite().all():
        raise ValueError("The tensor holds NaN or infinite numbers (in float32), which no scale fits; mend them first.")
    blocks = F.pad(flat, (0, -len(flat) % block)).view(-1, block)
    scale = blocks.abs().amax(1)
    # c = nearest(x / absmax); by the reciprocal, as in bitsandbytes, so that both agree to the last bit
    unit = (blocks * (1 / scale.clamp(min=1e-38))[:, None]).clamp(-1, 1).flatten()[: len(flat)]
    codes = _nearest(unit, code) if generator is None else _stochastic(unit, code, generator)
    if double:
        mean = scale.mean()  # scales are positive: without their mean they use both halves of a signed code
        scale = replace(quantize(scale - mean, dynamic(), 256, double=False), offset=mean.view(1))
    return Quantized(pack(codes, bits_of(code)), scale, None, code, block, x.shape, x.dtype)


def bits_of(code: Code) -> int:
    """⌈log₂ (number of values)⌉."""
    return (len(code) - 1).bit_length()


def _nearest(unit: torch.Tensor, code: Code) -> torch.Tensor:
    values = torch.tensor(code, device=unit.device)
    return torch.bucketize(unit, (values[:-1] + values[1:]) / 2, out_int32=True)  # halfway goes down


def _stochastic(unit: torch.Tensor, code: Code, generator: torch.Generator) -> torch.Tensor:
    values = torch.tensor(code, device=unit.device)
    below = (torch.bucketize(unit, values, right=True) - 1).clamp(0, len(code) - 2)
    low, high = values[below], values[below + 1]
    # P(up) = (u − low)/(high − low), so E[value] = u
    chance = torch.rand(unit.shape, generator=generator, device=generator.device).to(unit.device)
    return below + (chance < (unit - low) / (high - low))
