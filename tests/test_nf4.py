"""Blockwise quantisation: the published code, bounds that hold for any numbers, and bitsandbytes to the last bit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minipeft.methods import nf4

PUBLISHED = "-1 -.69619 -.52507 -.39492 -.28444 -.18477 -.09105 0 .07958 .16093 .24611 .33792 .44071 .56262 .72296 1"
CODES = {
    "nf2": nf4.normal_float(2),
    "nf3": nf4.normal_float(3),
    "nf4": nf4.normal_float(4),
    "nf5": nf4.normal_float(5),
    "int4": nf4.integer(4),
    "int6": nf4.integer(6),
    "int7": nf4.integer(7),
    "fp4": nf4.floating(2, 1),
    "fp8": nf4.floating(4, 3),
    "dynamic": nf4.dynamic(),
}


def gap(code: nf4.Code) -> float:
    """Half of the widest distance between neighbours: the worst that rounding to the nearest can do in [−1, 1]."""
    return max(b - a for a, b in zip(code, code[1:], strict=False)) / 2


# -- codes ------------------------------------------------------------------------------------------------------------
def test_nf4_is_the_published_code():
    code = nf4.normal_float()
    assert len(code) == 16 and [round(v, 5) for v in code] == [float(v) for v in PUBLISHED.split()]


def test_nf4_from_scipys_quantiles():
    from scipy.stats import norm

    positive = norm.ppf(torch.linspace(0.9677083, 0.5, 9).double()[:8].numpy())
    negative = -norm.ppf(torch.linspace(0.9677083, 0.5, 8).double()[:7].numpy())
    expected = sorted([*positive / positive[0], 0.0, *negative / positive[0]])
    assert torch.allclose(torch.tensor(nf4.normal_float()).double(), torch.tensor(expected), atol=1e-7)


@pytest.mark.parametrize("name", CODES)
def test_every_code_ascends_from_minus_one_to_one_with_an_exact_zero(name):
    code = CODES[name]
    assert list(code) == sorted(set(code)) and code[-1] == 1.0 and 0.0 in code
    assert code[0] == (-1.0 if name != "dynamic" else code[0]) and code[0] <= -0.99
    assert torch.tensor(code).double().tolist() == list(code), "exact in float32"


def test_sizes_and_values_of_the_other_codes():
    assert [len(nf4.normal_float(bits)) for bits in range(2, 9)] == [2**bits for bits in range(2, 9)]
    assert [len(nf4.integer(bits)) for bits in range(2, 9)] == [2**bits - 1 for bits in range(2, 9)]
    assert torch.tensor(nf4.integer(4)).mul(7).tolist() == pytest.approx(range(-7, 8))
    assert torch.tensor(nf4.floating(2, 1)).mul(6).tolist()[7:] == pytest.approx([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    assert len(nf4.dynamic()) == 256


@pytest.mark.parametrize("dtype, exponent, mantissa", [(torch.float8_e5m2, 5, 2), (torch.float8_e4m3fn, 4, 3)])
def test_floating_is_torchs_float8_where_that_is_finite(dtype, exponent, mantissa):
    every = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    theirs = every[every.isfinite()].unique()  # these formats give a few large codes to infinity and NaN
    mine = torch.tensor(nf4.floating(exponent, mantissa)).double()
    mine = mine / mine[mine > 0].min() * theirs[theirs > 0].min()
    distance = (mine - theirs[:, None]).abs().amin(1)
    assert (distance <= 1e-6 * theirs.abs()).all() and len(theirs) > 240


@pytest.mark.parametrize("make", [nf4.normal_float, nf4.integer])
@pytest.mark.parametrize("bits", [1, 9, 4.0, "4"])
def test_bits_that_cannot_be(make, bits):
    with pytest.raises(ValueError, match="2 to 8 bits"):
        make(bits)


def test_floats_that_cannot_be():
    with pytest.raises(ValueError, match="E0M3"):
        nf4.floating(0, 3)
    with pytest.raises(ValueError, match="2 to 8 bits"):
        nf4.floating(5, 3)


# -- bytes ------------------------------------------------------------------------------------------------------------
@settings(deadline=None)
@given(st.integers(1, 8), st.lists(st.integers(0, 255), min_size=1, max_size=40))
def test_pack_and_unpack(bits, numbers):
    codes = torch.tensor(numbers) % 2**bits
    packed = nf4.pack(codes, bits)
    assert packed.dtype == torch.uint8 and len(packed) == math.ceil(len(codes) * bits / 8)
    assert packed.untyped_storage().nbytes() == len(packed), "no more is held than is used"
    assert torch.equal(nf4.unpack(packed, bits, len(codes)), codes)
    written = "".join(f"{code:0{bits}b}" for code in codes.tolist()).ljust(8 * len(packed), "0")
    assert packed.tolist() == [int(written[i : i + 8], 2) for i in range(0, len(written), 8)], "one bit after another"


def test_two_codes_a_byte():
    assert nf4.pack(torch.tensor([1, 2, 15, 0, 7]), 4).tolist() == [0x12, 0xF0, 0x70]


# -- size -------------------------------------------------------------------------------------------------------------
def test_bits_per_parameter_of_a_4096_layer():
    w = torch.randn(4096, 4096)
    double, single = nf4.quantize(w), nf4.quantize(w, double=False)
    assert abs(double.bits() - 4.127) < 0.01 and single.bits() == 4.5
    stored = sum(t.untyped_storage().nbytes() for t in double.tensors().values())
    assert 8 * stored / w.numel() == double.bits(), "the storages hold no more than what is counted"
    assert {name: t.dtype for name, t in double.tensors().items()} == {
        "packed": torch.uint8, "scale_packed": torch.uint8, "scale_scale": torch.float32, "scale_offset": torch.float32,
    }  # fmt: skip
    error = (double.dequantize() - w).norm() / w.norm()
    assert 0.08 < error < 0.10 and (single.dequantize() - w).norm() / w.norm() < error


# -- any numbers ------------------------------------------------------------------------------------------------------
@st.composite
def tensors(draw) -> torch.Tensor:
    """Odd sizes, blocks of zeros, constant blocks, huge and tiny scales, every dtype."""
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    shape = draw(st.sampled_from([(1,), (7,), (64,), (65,), (3, 43), (16, 16), (2, 3, 50), (33, 100)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = torch.randn(shape, generator=generator) * 10.0 ** draw(st.integers(-30, 30))
    kind = draw(st.sampled_from(["normal", "zeros", "constant", "outlier", "half zero"]))
    if kind == "zeros":
        x = torch.zeros(shape)
    elif kind == "constant":
        x = torch.full(shape, x.flatten()[0].item())
    elif kind == "outlier":
        x.view(-1)[0] *= 1000
    elif kind == "half zero":
        x.view(-1)[: x.numel() // 2] = 0
    return x.to(dtype)


def scales(x: torch.Tensor, block: int) -> torch.Tensor:
    """The largest absolute value of the block that each number is in."""
    flat = x.flatten().double()
    return torch.cat([part.abs().max().expand(len(part)) for part in flat.split(block)]).view(x.shape)


@settings(deadline=None, max_examples=150)
@given(tensors(), st.sampled_from(sorted(CODES)), st.sampled_from([8, 64, 128]), st.booleans())
def test_the_round_trip_stays_within_its_bound(x, name, block, double):
    q = nf4.quantize(x, CODES[name], block, double)
    back = q.dequantize()
    assert back.shape == x.shape and back.dtype == x.dtype
    scale = scales(x.float(), block)
    bound = gap(CODES[name]) * scale
    if CODES[name][0] > -1:
        bound = torch.maximum(bound, (1 + CODES[name][0]) * scale)  # the dynamic code has no −1
    if double:
        deviation = [part.abs().max().expand(len(part)) for part in block_deviations(x, block).split(256)]
        worst = torch.cat(deviation) * max(gap(nf4.dynamic()), 1 + nf4.dynamic()[0])
        bound = bound + worst.repeat_interleave(block)[: x.numel()].view(x.shape)
    rounding = torch.finfo(x.dtype if x.dtype == torch.bfloat16 else torch.float32).eps
    assert ((back.double() - x.double()).abs() <= bound * (1 + 1e-5) + 4 * rounding * scale + 1e-37).all()
    assert (back[x == 0] == 0).all(), "zero is stored exactly"


def block_deviations(x: torch.Tensor, block: int) -> torch.Tensor:
    largest = torch.stack([part.abs().max() for part in x.flatten().float().split(block)])
    return (largest - largest.mean()).double()


@settings(deadline=None, max_examples=50)
@given(tensors(), st.sampled_from(["nf4", "int4", "fp4", "int6"]))
def test_what_was_stored_once_is_stored_without_further_loss(x, name):
    once = nf4.quantize(x.float(), CODES[name], double=False)
    again = nf4.quantize(once.dequantize(), CODES[name], double=False)
    if (scales(x.float(), 64) > 1e-37).all():
        assert torch.equal(again.packed, once.packed) and torch.equal(again.scale, once.scale)


@settings(deadline=None, max_examples=50)
@given(tensors(), st.sampled_from(sorted(CODES)))
def test_the_nearest_value_is_taken(x, name):
    """Against the slow way: all distances."""
    q, code = nf4.quantize(x, CODES[name], double=False), torch.tensor(CODES[name]).double()
    scale = scales(x.float(), 64).clamp(min=1e-38)
    unit = (x.float().double() / scale).flatten()
    found = code[nf4.unpack(q.packed, nf4.bits_of(q.code), x.numel())]
    best = (unit[:, None] - code).abs().amin(1)
    assert ((unit - found).abs() <= best + 1e-6).all()


@pytest.mark.parametrize("name", ["nf4", "int4", "int6"])
def test_stochastic_rounding_is_unbiased_and_nearest_rounding_is_closer(name):
    x = torch.linspace(-1, 1, 64)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack(
        [nf4.quantize(x, CODES[name], double=False, generator=generator).dequantize() for _ in range(2000)]
    )
    nearest = nf4.quantize(x, CODES[name], double=False).dequantize()
    width = 2 * gap(CODES[name])
    assert (draws.mean(0) - x).abs().max() < 5 * width / 2 / math.sqrt(2000)
    assert (nearest - x).abs().max() > 5 * width / 2 / math.sqrt(2000), "nearest rounding is biased, point by point"
    assert (draws - x).square().mean() > 1.5 * (nearest - x).square().mean()
    assert ((draws - x).abs() <= width * (1 + 1e-6)).all(), "one of the two neighbours"
    again = nf4.quantize(x, CODES[name], generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.packed, nf4.quantize(x, CODES[name], generator=torch.Generator().manual_seed(0)).packed)


def test_normal_numbers_prefer_the_normal_code_and_smaller_blocks():
    w = torch.randn(512, 512)
    error = {name: (nf4.quantize(w, CODES[name]).dequantize() - w).norm().item() for name in ("nf4", "int4", "fp4")}
    assert error["nf4"] < min(error["int4"], error["fp4"])
    by_block = [(nf4.quantize(w, block=b).dequantize() - w).norm().item() for b in (16, 64, 256, 1024)]
    assert by_block == sorted(by_block)


def test_stored_tensors_can_be_exchanged():
    a, b = nf4.quantize(torch.randn(5, 77)), nf4.quantize(torch.randn(5, 77))
    assert torch.equal(a.over(b.tensors()).dequantize(), b.dequantize())
    assert not torch.equal(a.dequantize(), b.dequantize())


# -- mistakes ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "x, block, message",
    [
        (torch.tensor([1.0, float("nan")]), 64, "NaN or infinite"),
        (torch.tensor([1.0, -float("inf")]), 64, "NaN or infinite"),
        (torch.tensor([1e300], dtype=torch.float64), 64, "in float32"),
        (torch.tensor([1, 2]), 64, "int64"),
        (torch.ones(0), 64, r"shape \(0,\)"),
        (torch.ones(4), 0, "block=0"),
        (torch.ones(4), 12, "block=12"),
        (torch.ones(4), 64.0, "block=64.0"),
    ],
)
def test_what_cannot_be_quantised(x, block, message):
    with pytest.raises(ValueError, match=message):
        nf4.quantize(x, block=block)


def test_meta_device():
    q = nf4.quantize(torch.empty(4096, 4096, device="meta"))
    assert abs(q.bits() - 4.127) < 0.01 and q.dequantize().shape == (4096, 4096) and q.dequantize().is_meta


# -- the explorer -----------------------------------------------------------------------------------------------------
def test_the_explorer_shows_what_is_stored_and_the_error():
    import tiny

    from minipeft.explore import QuantisationExplorer

    model = tiny.gpt2()
    explorer = QuantisationExplorer(model, "transformer.h.1.mlp.c_fc")
    weight = model.transformer.h[1].mlp.c_fc.weight.T.detach()
    assert torch.equal(explorer.weight, weight), "Conv1D stores it the other way round"
    for bits, code in ((3, "normal float"), (8, "integer"), (2, "float"), (7, "float")):
        explorer.controls["bits"].value, explorer.controls["code"].value = bits, code
        make = {"normal float": nf4.normal_float, "integer": nf4.integer}.get(code)
        q = nf4.quantize(weight, make(bits) if make else nf4.floating(*{2: (1, 0), 7: (3, 3)}[bits]))
        error = (q.dequantize() - weight).norm() / weight.norm()
        assert f"{q.bits():.3f} bits a parameter" in explorer.text.value and f"{error:.4f}" in explorer.text.value
        assert len(explorer.figure.axes[0].collections[0].get_segments()) == len(q.code), "a tick for each value"
    with pytest.raises(ValueError, match="no linear layer"):
        QuantisationExplorer(model, "transformer.wte")


# -- bitsandbytes -----------------------------------------------------------------------------------------------------
@pytest.fixture
def bnb():
    return pytest.importorskip("bitsandbytes", reason="needs pip install bitsandbytes").functional


def sixteen_bits(x: torch.Tensor) -> torch.Tensor:
    """bitsandbytes' 8-bit CPU kernel first rounds x/absmax to a grid of 2^16 points, for a look-up table."""
    return ((x + 1) * 0.5 * 65535 + 0.5).floor() / 65535 * 2 - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64), (7, 130), (3, 43), (1000,), (1,)])
@pytest.mark.parametrize("seed", range(5))
def test_bitsandbytes_agrees_to_the_last_bit(bnb, dtype, shape, seed):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)
    theirs, state = bnb.quantize_4bit(x, blocksize=64, quant_type="nf4")
    mine = nf4.quantize(x, double=False)
    assert torch.equal(torch.tensor(mine.code), state.code)
    codes = [nf4.unpack(packed, 4, x.numel()) for packed in (mine.packed, theirs.flatten())]
    assert len(mine.packed) == len(theirs) and torch.equal(*codes) and torch.equal(mine.scale, state.absmax)
    assert torch.equal(mine.dequantize(), bnb.dequantize_4bit(theirs, state).view(shape))


@pytest.mark.parametrize("shape", [(64, 64), (300, 257), (128, 1024)])
@pytest.mark.parametrize("seed", range(5))
def test_bitsandbytes_agrees_with_double_quantisation(bnb, shape, seed, monkeypatch):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    theirs, state = bnb.quantize_4bit(x, blocksize=64, quant_type="nf4", compress_statistics=True)
    mine = nf4.quantize(x)
    assert torch.equal(torch.tensor(nf4.dynamic()), state.state2.code)
    assert torch.equal(mine.packed, theirs.flatten()) and torch.equal(mine.scale.offset, state.offset.view(1))
    assert torch.equal(mine.scale.scale, state.state2.absmax)
    differ = (mine.scale.packed != state.absmax).float().mean()
    assert differ < 0.01, "only where a scale is within 2⁻¹⁶ of the middle between two codes"
    stored = {"packed": theirs.flatten(), "scale_packed": state.absmax} | {
        "scale_scale": state.state2.absmax, "scale_offset": state.offset.view(1),
    }  # fmt: skip
    assert torch.equal(mine.over(stored).dequantize(), bnb.dequantize_4bit(theirs, state)), "their file, read here"
    nearest = nf4._nearest
    grid = lambda unit, code: nearest(sixteen_bits(unit) if len(code) == 256 else unit, code)  # noqa: E731
    monkeypatch.setattr(nf4, "_nearest", grid)
    assert torch.equal(nf4.quantize(x).scale.packed, state.absmax), "with their grid, to the last bit"
