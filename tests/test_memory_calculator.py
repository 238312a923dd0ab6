"""The memory calculator draws the bytes that the arithmetic gives."""

import pytest
from matplotlib.figure import Figure

from minipeft.analyze.budget import training_bytes
from minipeft.analyze.catalogue import SIZES
from minipeft.explore.budget import MODELS, MemoryCalculator


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


@pytest.mark.parametrize("model", MODELS)
def test_before_a_model_is_counted_the_picture_has_what_its_publisher_says(model):
    plot, figure = MemoryCalculator(model), Figure()
    text, axes = plot.draw(figure, **plot.values), figure.axes[0]
    said = [t.get_text() for t in axes.texts]
    assert not plot.budgets and text == "LoRA trains …" and " …" in said
    if model in SIZES:
        assert f"{SIZES[model]:,}" in axes.get_title() and f" {2 * SIZES[model] / 1e9:,.1f} GB" in said
