"""The memory calculator draws the bytes that the arithmetic gives."""

import pytest

from minipeft.analyze.budget import training_bytes
from minipeft.explore.budget import MemoryCalculator


def test_the_bars_are_the_bytes():
    plot = MemoryCalculator("gpt2-xl")
    plot.redraw()
    n, lora = 1_557_611_200, plot.budget("gpt2-xl", 8)
    bars = [bar.get_width() for bar in plot.figure.axes[0].patches]
    full = training_bytes(n, n)
    expected = [full[k] for k in ("weights", "gradients", "moments")]
    expected += [training_bytes(n, lora.trainable, lora.trainable)[k] for k in ("weights", "gradients", "moments")]
    assert bars == pytest.approx([x / 1e9 for x in [*expected, 2 * n, 0, 0]])
    plot.controls["precision"].value = "nf4"
    assert "full, bfloat16" in [t.get_text() for t in plot.figure.axes[0].get_yticklabels()], "4 bits cannot train"
    plot.controls["rank"].value = 64
    assert plot.budget("gpt2-xl", 64).trainable == 8 * lora.trainable and f"{8 * lora.trainable:,}" in plot.text.value
