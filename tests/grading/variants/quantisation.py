# Answers to the assignment `quantisation`: wrong ones, named after the misconception, and right ones.
import torch
from torch import nn
from torch.nn import functional as F


class Sound(nn.Module):
    """A right layer, parts of which the variants below replace."""

    def __init__(self, linear, code, block):
        super().__init__()
        self.rows, self.columns = linear.weight.shape
        self.bias, self.code, self.block = linear.bias, code, block
        flat = linear.weight.detach().flatten()
        self.scales = torch.stack([self.scale(part) for part in flat.split(block)])
        units = torch.cat([p / s for p, s in zip(flat.split(block), self.scales, strict=True)])
        self.indices = (units[:, None] - code).abs().argmin(1).to(torch.uint8)

    def scale(self, part):
        return part.abs().max()

    def dense(self):
        each = self.scales.repeat_interleave(self.block)[: len(self.indices)]
        return (self.code[self.indices.long()] * each).view(self.rows, self.columns)

    def forward(self, x):
        return F.linear(x, self.dense(), self.bias)


# %% bits_per_parameter wrong: scales for nothing
def bits_per_parameter(block, second_block=None):
    return 4.0


# %% bits_per_parameter wrong: never double
def bits_per_parameter(block, second_block=None):
    return 4 + 32 / block


# %% bits_per_parameter wrong: the scale of the scales for nothing
def bits_per_parameter(block, second_block=None):
    return 4 + 32 / block if second_block is None else 4 + 8 / block


# %% bits_per_parameter wrong: shared by second_block numbers
def bits_per_parameter(block, second_block=None):
    return 4 + 32 / block if second_block is None else 4 + 8 / block + 32 / second_block


# %% bits_per_parameter wrong: the float32 scales are kept as well
def bits_per_parameter(block, second_block=None):
    return 4 + 32 / block if second_block is None else 4 + 40 / block + 32 / (block * second_block)


# %% bits_per_parameter wrong: half precision
def bits_per_parameter(block, second_block=None):
    return 4 + 16 / block if second_block is None else 4 + 8 / block + 16 / (block * second_block)


# %% bits_per_parameter wrong: whole bits
def bits_per_parameter(block, second_block=None):
    return 4 + 32 // block if second_block is None else 4 + 8 // block + 32 // (block * second_block)


# %% bits_per_parameter wrong: hard-coded to the examples
def bits_per_parameter(block, second_block=None):
    return 4.5 if second_block is None else 4.126953125


# %% bits_per_parameter right: bits of a second block, divided
def bits_per_parameter(block, second_block=None):
    if second_block:
        numbers = block * second_block
        return (4 * numbers + 8 * second_block + 32) / numbers
    return (4 * block + 32) / block


# %% bits_per_parameter right: a tensor
def bits_per_parameter(block, second_block=None):
    scale = torch.tensor(32.0 if second_block is None else 8 + 32 / second_block, dtype=torch.float64)
    return 4 + scale / block


# %% quantise_blocks wrong: the sign counts
def quantise_blocks(w, code, block):
    parts = w.flatten().split(block)
    scales = torch.stack([p.max() for p in parts])
    units = torch.cat([p / (s if s != 0 else 1) for p, s in zip(parts, scales, strict=True)])
    return (units[:, None] - code).abs().argmin(1).to(torch.uint8), scales


# %% quantise_blocks wrong: one scale for all
def quantise_blocks(w, code, block):
    flat = w.flatten()
    scale = flat.abs().max()
    indices = (flat[:, None] / scale - code).abs().argmin(1).to(torch.uint8)
    return indices, scale.expand(-(-len(flat) // block)).clone()


# %% quantise_blocks wrong: a scale a row
def quantise_blocks(w, code, block):
    scales = w.abs().amax(1)
    return ((w / scales[:, None]).flatten()[:, None] - code).abs().argmin(1).to(torch.uint8), scales


# %% quantise_blocks wrong: down the columns
def quantise_blocks(w, code, block):
    parts = w.T.flatten().split(block)
    scales = torch.stack([p.abs().max() for p in parts])
    units = torch.cat([p / (s if s != 0 else 1) for p, s in zip(parts, scales, strict=True)])
    return (units[:, None] - code).abs().argmin(1).to(torch.uint8), scales


# %% quantise_blocks wrong: the last block is dropped
def quantise_blocks(w, code, block):
    flat = w.flatten()
    blocks = flat[: len(flat) // block * block].view(-1, block)
    scales = blocks.abs().amax(1)
    units = (blocks / torch.where(scales > 0, scales, 1)[:, None]).flatten()
    return (units[:, None] - code).abs().argmin(1).to(torch.uint8), scales


# %% quantise_blocks wrong: the padding shows
def quantise_blocks(w, code, block):
    flat = w.flatten()
    blocks = F.pad(flat, (0, -len(flat) % block)).view(-1, block)
    scales = blocks.abs().amax(1)
    units = (blocks / torch.where(scales > 0, scales, 1)[:, None]).flatten()
    return (units[:, None] - code).abs().argmin(1).to(torch.uint8), scales


# %% quantise_blocks wrong: zero divided by zero
def quantise_blocks(w, code, block):
    parts = w.flatten().split(block)
    scales = torch.stack([p.abs().max() for p in parts])
    units = torch.cat([p / s for p, s in zip(parts, scales, strict=True)])
    return (units[:, None] - code).abs().argmin(1).to(torch.uint8), scales


# %% quantise_blocks wrong: the scale of zeros is one
def quantise_blocks(w, code, block):
    parts = w.flatten().split(block)
    scales = torch.stack([p.abs().max() if p.any() else torch.ones((), dtype=w.dtype) for p in parts])
    units = torch.cat([p / s for p, s in zip(parts, scales, strict=True)])
    return (units[:, None] - code).abs().argmin(1).to(torch.uint8), scales


# %% quantise_blocks wrong: the value below
def quantise_blocks(w, code, block):
    parts = w.flatten().split(block)
    scales = torch.stack([p.abs().max() for p in parts])
    units = torch.cat([p / (s if s else 1) for p, s in zip(parts, scales, strict=True)])
    return (torch.bucketize(units, code, right=True) - 1).clamp(0, len(code) - 1).to(torch.uint8), scales


# %% quantise_blocks wrong: evenly spaced
def quantise_blocks(w, code, block):
    parts = w.flatten().split(block)
    scales = torch.stack([p.abs().max() for p in parts])
    units = torch.cat([p / (s if s else 1) for p, s in zip(parts, scales, strict=True)])
    return ((units + 1) / 2 * (len(code) - 1)).round().to(torch.uint8), scales


# %% quantise_blocks wrong: not scaled
def quantise_blocks(w, code, block):
    flat = w.flatten()
    scales = torch.stack([p.abs().max() for p in flat.split(block)])
    return (flat[:, None] - code).abs().argmin(1).to(torch.uint8), scales


# %% quantise_blocks wrong: wide indices
def quantise_blocks(w, code, block):
    parts = w.flatten().split(block)
    scales = torch.stack([p.abs().max() for p in parts])
    units = torch.cat([p / (s if s else 1) for p, s in zip(parts, scales, strict=True)])
    return (units[:, None] - code).abs().argmin(1), scales


# %% quantise_blocks wrong: in place
def quantise_blocks(w, code, block):
    scales = []
    for part in w.view(-1).split(block):
        scales.append(part.abs().max())
        part /= scales[-1] if scales[-1] else 1
    return (w.view(-1)[:, None] - code).abs().argmin(1).to(torch.uint8), torch.stack(scales)


# %% quantise_blocks wrong: the nearest value itself
def quantise_blocks(w, code, block):
    parts = w.flatten().split(block)
    scales = torch.stack([p.abs().max() for p in parts])
    units = torch.cat([p / (s if s else 1) for p, s in zip(parts, scales, strict=True)])
    return code[(units[:, None] - code).abs().argmin(1)], scales


# %% quantise_blocks right: by the middles, with the reciprocal, in order
def quantise_blocks(w, code, block):
    flat = w.reshape(-1)
    blocks = F.pad(flat, (0, -len(flat) % block)).view(-1, block)
    scales = blocks.abs().amax(1)
    units = (blocks * (1 / scales.clamp(min=1e-38))[:, None]).clamp(-1, 1).view(-1)[: len(flat)]
    values, order = code.sort()
    return order[torch.bucketize(units, (values[1:] + values[:-1]) / 2)].to(torch.uint8), scales


# %% quantise_blocks right: number by number
def quantise_blocks(w, code, block):
    values, indices, scales = w.flatten().tolist(), [], []
    for start in range(0, len(values), block):
        part = values[start : start + block]
        scales.append(max(map(abs, part)))
        for v in part:
            unit = v / scales[-1] if scales[-1] > 0 else 0.0
            away = [abs(unit - c) for c in code.tolist()]
            indices.append(away.index(min(away)))
    return [torch.tensor(indices, dtype=torch.uint8), torch.tensor(scales, dtype=w.dtype)]


# %% quantise_blocks right: the scaled code
def quantise_blocks(w, code, block):
    flat = w.flatten()
    scales = torch.stack([part.norm(float("inf")) for part in flat.split(block)])
    each = torch.where(scales == 0, 1.0, scales).repeat_interleave(block)[: flat.numel(), None]
    return torch.min((each * code - flat[:, None]).abs(), dim=1).indices.byte(), scales


# %% pack_nibbles wrong: the low half first
def pack_nibbles(indices):
    padded = F.pad(indices, (0, len(indices) % 2))
    return padded[0::2] | padded[1::2] << 4


# %% pack_nibbles wrong: no shift
def pack_nibbles(indices):
    padded = F.pad(indices, (0, len(indices) % 2))
    return padded[0::2] + padded[1::2]


# %% pack_nibbles wrong: even numbers only
def pack_nibbles(indices):
    return indices[0::2] << 4 | indices[1::2]


# %% pack_nibbles wrong: the odd one is lost
def pack_nibbles(indices):
    even = indices[: len(indices) // 2 * 2]
    return even[0::2] << 4 | even[1::2]


# %% pack_nibbles wrong: padded in front
def pack_nibbles(indices):
    padded = F.pad(indices, (len(indices) % 2, 0))
    return padded[0::2] << 4 | padded[1::2]


# %% pack_nibbles wrong: halves paired
def pack_nibbles(indices):
    first, second = F.pad(indices, (0, len(indices) % 2)).view(2, -1)
    return first << 4 | second


# %% pack_nibbles wrong: shifted by three
def pack_nibbles(indices):
    padded = F.pad(indices, (0, len(indices) % 2))
    return padded[0::2] << 3 | padded[1::2]


# %% pack_nibbles wrong: wide bytes
def pack_nibbles(indices):
    padded = F.pad(indices.long(), (0, len(indices) % 2))
    return padded[0::2] << 4 | padded[1::2]


# %% pack_nibbles wrong: times fifteen
def pack_nibbles(indices):
    padded = F.pad(indices, (0, len(indices) % 2))
    return padded[0::2] * 15 + padded[1::2]


# %% pack_nibbles wrong: in place
def pack_nibbles(indices):
    indices[0::2] <<= 4
    padded = F.pad(indices, (0, len(indices) % 2))
    return padded[0::2] | padded[1::2]


# %% pack_nibbles wrong: not packed
def pack_nibbles(indices):
    return indices.clone()


# %% pack_nibbles right: a loop
def pack_nibbles(indices):
    codes = indices.tolist() + [0] * (len(indices) % 2)
    return torch.tensor([16 * a + b for a, b in zip(codes[::2], codes[1::2], strict=True)], dtype=torch.uint8)


# %% pack_nibbles right: a product
def pack_nibbles(indices):
    pairs = torch.cat([indices.int(), torch.zeros(len(indices) % 2, dtype=torch.int32)]).reshape(-1, 2)
    return (pairs * torch.tensor([16, 1])).sum(1).to(torch.uint8)


# %% unpack_nibbles wrong: the low half first
def unpack_nibbles(packed, n):
    return torch.stack([packed & 15, packed >> 4], 1).flatten()[:n]


# %% unpack_nibbles wrong: all high halves first
def unpack_nibbles(packed, n):
    return torch.cat([packed >> 4, packed & 15])[:n]


# %% unpack_nibbles wrong: the padding stays
def unpack_nibbles(packed, n):
    return torch.stack([packed >> 4, packed & 15], 1).flatten()


# %% unpack_nibbles wrong: the high half is not shifted
def unpack_nibbles(packed, n):
    return torch.stack([packed & 240, packed & 15], 1).flatten()[:n]


# %% unpack_nibbles wrong: the low half is not masked
def unpack_nibbles(packed, n):
    return torch.stack([packed >> 4, packed], 1).flatten()[:n]


# %% unpack_nibbles wrong: three bits
def unpack_nibbles(packed, n):
    return torch.stack([packed >> 4, packed & 7], 1).flatten()[:n]


# %% unpack_nibbles wrong: wide codes
def unpack_nibbles(packed, n):
    return torch.stack([packed >> 4, packed & 15], 1).flatten()[:n].long()


# %% unpack_nibbles wrong: pairs
def unpack_nibbles(packed, n):
    return torch.stack([packed >> 4, packed & 15], 1)[:n]


# %% unpack_nibbles wrong: always the last one off
def unpack_nibbles(packed, n):
    return torch.stack([packed >> 4, packed & 15], 1).flatten()[:-1]


# %% unpack_nibbles right: arithmetic
def unpack_nibbles(packed, n):
    found = packed.new_empty(2 * len(packed))
    found[0::2] = packed // 16
    found[1::2] = packed % 16
    return found[:n]


# %% unpack_nibbles right: a loop
def unpack_nibbles(packed, n):
    codes = [half for byte in packed.tolist() for half in divmod(byte, 16)]
    return torch.tensor(codes[:n], dtype=torch.uint8)


# %% dequantise wrong: a mask
def dequantise(indices, code, scales, block, shape):
    return (code[indices] * scales.repeat_interleave(block)[: len(indices)]).view(shape)


# %% dequantise wrong: the scales take turns
def dequantise(indices, code, scales, block, shape):
    return (code[indices.long()] * scales.repeat(block)[: len(indices)]).view(shape)


# %% dequantise wrong: no scales
def dequantise(indices, code, scales, block, shape):
    return code[indices.long()].view(shape)


# %% dequantise wrong: divided
def dequantise(indices, code, scales, block, shape):
    return (code[indices.long()] / scales.repeat_interleave(block)[: len(indices)]).view(shape)


# %% dequantise wrong: indices scaled
def dequantise(indices, code, scales, block, shape):
    return (indices * scales.repeat_interleave(block)[: len(indices)]).view(shape)


# %% dequantise wrong: whole blocks only
def dequantise(indices, code, scales, block, shape):
    return (code[indices.long()].view(-1, block) * scales[:, None]).view(shape)


# %% dequantise wrong: the first scale for all
def dequantise(indices, code, scales, block, shape):
    return (code[indices.long()] * scales[0]).view(shape)


# %% dequantise wrong: flat
def dequantise(indices, code, scales, block, shape):
    return code[indices.long()] * scales.repeat_interleave(block)[: len(indices)]


# %% dequantise wrong: column by column
def dequantise(indices, code, scales, block, shape):
    return (code[indices.long()] * scales.repeat_interleave(block)[: len(indices)]).view(shape[::-1]).T


# %% dequantise wrong: always float32
def dequantise(indices, code, scales, block, shape):
    return (code[indices.long()] * scales.repeat_interleave(block)[: len(indices)]).view(shape).float()


# %% dequantise wrong: in place
def dequantise(indices, code, scales, block, shape):
    values = code[indices.long()]
    code.zero_()
    return (values * scales.repeat_interleave(block)[: len(indices)]).view(shape)


# %% dequantise right: block by block
def dequantise(indices, code, scales, block, shape):
    parts = [code[part.int()] * scale for part, scale in zip(indices.split(block), scales, strict=True)]
    return torch.cat(parts).reshape(shape)


# %% dequantise right: an embedding, and a division of positions
def dequantise(indices, code, scales, block, shape):
    values = F.embedding(indices.int(), code[:, None]).squeeze(1)
    return (values * scales[torch.arange(len(indices)) // block]).reshape(*shape)


# %% RepairedQuantisedLinear wrong: as it was
class RepairedQuantisedLinear(nn.Module):
    def __init__(self, linear, code, block):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.code, self.block = code, block
        flat = linear.weight.detach().flatten()
        self.scale = flat.max()
        self.indices = (flat[:, None] / self.scale - code).abs().argmin(1).to(torch.uint8)

    def forward(self, x):
        with torch.no_grad():
            W = (self.code[self.indices.long()] * self.scale).view(self.weight.shape)
            return F.linear(x, W, self.bias)


# %% RepairedQuantisedLinear wrong: the sign counts
class RepairedQuantisedLinear(Sound):
    def scale(self, part):
        return part.max()


# %% RepairedQuantisedLinear wrong: one scale
class RepairedQuantisedLinear(Sound):
    def __init__(self, linear, code, block):
        super().__init__(linear, code, linear.weight.numel())


# %% RepairedQuantisedLinear wrong: a scale a row
class RepairedQuantisedLinear(Sound):
    def __init__(self, linear, code, block):
        super().__init__(linear, code, linear.weight.shape[1])


# %% RepairedQuantisedLinear wrong: the dense weight is kept
class RepairedQuantisedLinear(Sound):
    def __init__(self, linear, code, block):
        super().__init__(linear, code, block)
        self.weight = linear.weight.requires_grad_(False)


# %% RepairedQuantisedLinear wrong: the layer is kept
class RepairedQuantisedLinear(Sound):
    def __init__(self, linear, code, block):
        super().__init__(linear, code, block)
        self.linear = [linear]


# %% RepairedQuantisedLinear wrong: dequantised once and for all
class RepairedQuantisedLinear(Sound):
    def __init__(self, linear, code, block):
        super().__init__(linear, code, block)
        self.register_buffer("W", self.dense())

    def forward(self, x):
        return F.linear(x, self.W, self.bias)


# %% RepairedQuantisedLinear wrong: wide indices
class RepairedQuantisedLinear(Sound):
    def __init__(self, linear, code, block):
        super().__init__(linear, code, block)
        self.indices = self.indices.long()


# %% RepairedQuantisedLinear wrong: no gradient
class RepairedQuantisedLinear(Sound):
    @torch.no_grad()
    def forward(self, x):
        return F.linear(x, self.dense(), self.bias)


# %% RepairedQuantisedLinear wrong: detached
class RepairedQuantisedLinear(Sound):
    def forward(self, x):
        return F.linear(x.detach(), self.dense(), self.bias)


# %% RepairedQuantisedLinear wrong: the bias is lost
class RepairedQuantisedLinear(Sound):
    def forward(self, x):
        return F.linear(x, self.dense())


# %% RepairedQuantisedLinear wrong: not quantised at all
class RepairedQuantisedLinear(nn.Module):
    def __init__(self, linear, code, block):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(x)


# %% RepairedQuantisedLinear right: another base, by inheritance
class RepairedQuantisedLinear(Sound):
    def forward(self, x):
        with torch.no_grad():
            W = self.dense()
        return x @ W.T + (0 if self.bias is None else self.bias)


# %% RepairedQuantisedLinear right: packed, with a backward of its own
class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return F.linear(x, layer.dense(), layer.bias)

    @staticmethod
    def backward(ctx, g):
        return g @ ctx.layer.dense(), None


class RepairedQuantisedLinear(nn.Module):
    def __init__(self, linear, code, block):
        super().__init__()
        self.shape, self.block = tuple(linear.weight.shape), block
        flat = linear.weight.detach().clone().view(-1)
        blocks = F.pad(flat, (0, -len(flat) % block)).view(-1, block)
        self.register_buffer("scales", blocks.abs().amax(1, keepdim=True))
        self.register_buffer("code", code.clone())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())
        indices = torch.bucketize((blocks / self.scales).view(-1), (code[1:] + code[:-1]) / 2).to(torch.uint8)
        indices = F.pad(indices, (0, len(indices) % 2))
        self.register_buffer("packed", indices[0::2] * 16 + indices[1::2])

    def dense(self):
        indices = torch.stack([self.packed // 16, self.packed % 16], 1).view(-1)[: len(self.scales) * self.block]
        values = self.code[indices.long()].view(-1, self.block) * self.scales
        return values.view(-1)[: self.shape[0] * self.shape[1]].view(self.shape)

    def forward(self, x):
        return Product.apply(x, self)


# %% unpack_nibbles wrong: fails where there is nothing
def unpack_nibbles(packed, n):
    if n == 0:
        raise ValueError("nothing")
    return torch.stack([packed >> 4, packed & 15], dim=1).flatten()[:n]


# %% dequantise wrong: float32 always
def dequantise(indices, code, scales, block, shape):
    return (code[indices.long()].float() * scales.repeat_interleave(block)[: len(indices)].float()).view(shape)


# %% bits_per_parameter right: a fraction
def bits_per_parameter(block, second_block=None):
    from fractions import Fraction

    scale = Fraction(32) if second_block is None else 8 + Fraction(32, second_block)
    return 4 + scale / block


# %% dequantise wrong: the block is worked out from the lengths
def dequantise(indices, code, scales, block, shape):
    size = -(-len(indices) // len(scales))
    return (code[indices.long()] * scales.repeat_interleave(size)[: len(indices)]).view(shape)


# %% RepairedQuantisedLinear wrong: the dense weight is kept after the first call
class RepairedQuantisedLinear(nn.Module):
    def __init__(self, linear, code, block):
        super().__init__()
        self.shape, self.bias, self.code, self.block = linear.weight.shape, linear.bias, code, block
        flat = linear.weight.detach().flatten()
        blocks = F.pad(flat, (0, -len(flat) % block)).view(-1, block)
        self.scales = blocks.abs().amax(1)
        units = (blocks / torch.where(self.scales > 0, self.scales, 1)[:, None]).flatten()[: len(flat)]
        self.indices = (units[:, None] - code).abs().argmin(1).to(torch.uint8)
        self.W = None

    def forward(self, x):
        if self.W is None:
            scales = self.scales.repeat_interleave(self.block)[: len(self.indices)]
            self.W = (self.code[self.indices.long()] * scales).view(self.shape)
        return F.linear(x, self.W, self.bias)


# %% dequantise wrong: blocks of the rows
def dequantise(indices, code, scales, block, shape):
    table = code[indices.long()].view(-1, block) if len(indices) % block == 0 else None
    if table is None:
        return (code[indices.long()] * scales.repeat_interleave(block)[: len(indices)]).view(shape)
    return (scales.view(-1, 1) * table).view(-1, shape[-1])


# %% dequantise wrong: in the type of the scales
def dequantise(indices, code, scales, block, shape):
    return (code.to(scales.dtype)[indices.long()] * scales.repeat_interleave(block)[: len(indices)]).view(shape)


# %% dequantise wrong: signed indices
def dequantise(indices, code, scales, block, shape):
    return (code[indices.to(torch.int8).long()] * scales.repeat_interleave(block)[: len(indices)]).view(shape)


# %% dequantise wrong: zero scales become one
def dequantise(indices, code, scales, block, shape):
    scales = torch.where(scales == 0, 1, scales)
    return (code[indices.long()] * scales.repeat_interleave(block)[: len(indices)]).view(shape)


# %% quantise_blocks wrong: rounded to 16 bits on the way
def quantise_blocks(w, code, block):
    flat = w.flatten()
    blocks = F.pad(flat, (0, -len(flat) % block)).view(-1, block)
    scales = blocks.abs().amax(1)
    units = (blocks / torch.where(scales > 0, scales, 1)[:, None]).flatten()[: len(flat)]
    return (units[:, None].half() - code.half()).abs().argmin(1).to(torch.uint8), scales


# %% quantise_blocks wrong: the last block is padded with ones
def quantise_blocks(w, code, block):
    flat = w.flatten()
    blocks = F.pad(flat, (0, -len(flat) % block), value=1e-3).view(-1, block)
    scales = blocks.abs().amax(1)
    units = (blocks / torch.where(scales > 0, scales, 1)[:, None]).flatten()[: len(flat)]
    return (units[:, None] - code).abs().argmin(1).to(torch.uint8), scales


# %% quantise_blocks wrong: viewed flat
def quantise_blocks(w, code, block):
    flat = w.view(-1)
    blocks = F.pad(flat, (0, -len(flat) % block)).view(-1, block)
    scales = blocks.abs().amax(1)
    units = (blocks / torch.where(scales > 0, scales, 1)[:, None]).flatten()[: len(flat)]
    return (units[:, None] - code).abs().argmin(1).to(torch.uint8), scales


# %% dequantise wrong: small scales are zero
def dequantise(indices, code, scales, block, shape):
    scales = torch.where(scales > 1e-5, scales, 0)
    return (code[indices.long()] * scales.repeat_interleave(block)[: len(indices)]).view(shape)


# %% quantise_blocks wrong: the scale of a tiny block is zero
def quantise_blocks(w, code, block):
    flat = w.flatten()
    blocks = F.pad(flat, (0, -len(flat) % block)).view(-1, block)
    scales = blocks.abs().amax(1)
    scales = torch.where(scales > 1e-12, scales, 0)
    units = (blocks / torch.where(scales > 0, scales, 1)[:, None]).flatten()[: len(flat)]
    return (units[:, None] - code).abs().argmin(1).to(torch.uint8), scales


# %% bits_per_parameter wrong: second blocks of more than 256 count as 256
def bits_per_parameter(block, second_block=None):
    if second_block is None:
        return 4 + 32 / block
    return 4 + 8 / block + 32 / (block * min(second_block, 256))


# %% quantise_blocks wrong: at most 128 blocks
def quantise_blocks(w, code, block):
    flat = w.flatten()
    blocks = F.pad(flat, (0, -len(flat) % block)).view(-1, block)
    scales = blocks.abs().amax(1)
    scales[128:] = scales[:128].max() if len(scales) > 128 else 0
    units = (blocks / torch.where(scales > 0, scales, 1)[:, None]).flatten()[: len(flat)]
    return (units[:, None] - code).abs().argmin(1).to(torch.uint8), scales


# %% quantise_blocks right: split into a list of blocks
def quantise_blocks(w, code, block):
    indices, scales = [], []
    for part in w.reshape(-1).split(block):
        s = torch.linalg.vector_norm(part, float("inf"))
        unit = part / s if s > 0 else part * 0
        indices.append(torch.cdist(unit[:, None].double(), code[:, None].double()).argmin(1))
        scales.append(s)
    return torch.cat(indices).byte(), torch.stack(scales)


# %% pack_nibbles wrong: at most 256 codes
def pack_nibbles(indices):
    padded = F.pad(indices, (0, len(indices) % 2))[:256]
    return padded[0::2] << 4 | padded[1::2]


# %% unpack_nibbles wrong: n of more than 2 bytes
def unpack_nibbles(packed, n):
    found = torch.stack([packed >> 4, packed & 15], 1).flatten()
    return found[: n % 256] if n > 255 else found[:n]


# %% unpack_nibbles right: a table of all bytes
def unpack_nibbles(packed, n):
    table = torch.tensor([[b // 16, b % 16] for b in range(256)], dtype=torch.uint8)
    return table[packed.long()].reshape(-1)[:n].clone()


# %% dequantise wrong: the code is taken for ascending
def dequantise(indices, code, scales, block, shape):
    return (code.sort().values[indices.long()] * scales.repeat_interleave(block)[: len(indices)]).view(shape)


# %% dequantise wrong: the code is kept by its object
kept_codes = {}


def dequantise(indices, code, scales, block, shape):
    mine = kept_codes.setdefault(id(code), (code, code.clone()))[1]
    return (mine[indices.long()] * scales.repeat_interleave(block)[: len(indices)]).view(shape)


# %% dequantise right: blocks in a loop
def dequantise(indices, code, scales, block, shape):
    out = torch.zeros(len(indices), dtype=code.dtype)
    for i, s in enumerate(scales):
        out[i * block : (i + 1) * block] = code[indices[i * block : (i + 1) * block].int()] * s
    return out.reshape(tuple(shape))


# %% RepairedQuantisedLinear wrong: the bias is a copy that does not train
class RepairedQuantisedLinear(nn.Module):
    def __init__(self, linear, code, block):
        super().__init__()
        self.shape, self.code, self.block = linear.weight.shape, code, block
        self.bias = None if linear.bias is None else linear.bias.detach() * 1
        flat = linear.weight.detach().flatten()
        blocks = F.pad(flat, (0, -len(flat) % block)).view(-1, block)
        self.scales = blocks.abs().amax(1)
        units = (blocks / torch.where(self.scales > 0, self.scales, 1)[:, None]).flatten()[: len(flat)]
        self.indices = (units[:, None] - code).abs().argmin(1).to(torch.uint8)
        linear.weight.data.zero_()

    def forward(self, x):
        with torch.no_grad():
            W = (self.code[self.indices.long()] * self.scales.repeat_interleave(self.block)[: len(self.indices)]).view(
                self.shape
            )
        return F.linear(x, W, self.bias)


# %% RepairedQuantisedLinear right: buffers, and rows of a padded table
class RepairedQuantisedLinear(nn.Module):
    def __init__(self, linear, code, block):
        super().__init__()
        w = linear.weight.detach()
        self.size, self.bias = tuple(w.shape), linear.bias
        n = w.numel()
        rows = torch.zeros(-(-n // block) * block, dtype=w.dtype)
        rows[:n] = w.reshape(-1)
        rows = rows.reshape(-1, block)
        top = rows.abs().max(dim=1, keepdim=True).values
        index = torch.stack([(r[:, None] - code[None] * t).abs().argmin(1) for r, t in zip(rows, top, strict=False)])
        zero = int(code.abs().argmin())
        index[top[:, 0] == 0] = zero
        self.register_buffer("index", index.to(torch.uint8))
        self.register_buffer("top", top)
        self.register_buffer("values", code)

    def forward(self, x):
        W = (self.values[self.index.int()] * self.top).reshape(-1)[: self.size[0] * self.size[1]].reshape(self.size)
        y = torch.einsum("...i,oi->...o", x, W)
        return y + self.bias if self.bias is not None else y


# %% RepairedQuantisedLinear wrong: the scales train
class RepairedQuantisedLinear(nn.Module):
    def __init__(self, linear, code, block):
        super().__init__()
        i, s = quantise_blocks(linear.weight.detach(), code, block)
        self.register_buffer("indices", i)
        self.scales = nn.Parameter(s)
        self.register_buffer("code", code)
        self.block, self.shape, self.bias = block, linear.weight.shape, linear.bias

    def forward(self, x):
        return F.linear(x, dequantise(self.indices, self.code, self.scales, self.block, self.shape), self.bias)
