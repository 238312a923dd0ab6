"""The drawings of the lessons: every arrow leads somewhere, no part covers another, and every word has room."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest
from matplotlib.patches import Circle, FancyBboxPatch

from minipeft.explore import schematic
from minipeft.explore.schematic import DRAWINGS


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_drawing_can_be_read(name):
    drawing = DRAWINGS[name]
    assert {end for arrow in drawing.arrows for end in arrow} == set(drawing.parts), "a part without an arrow"
    figure = schematic.draw(drawing)
    (axes,) = figure.axes
    renderer = figure.canvas.get_renderer()
    shapes = [p.get_window_extent(renderer) for p in axes.patches if isinstance(p, Circle | FancyBboxPatch)]
    labels = [text.get_window_extent(renderer) for text in axes.texts]
    assert len(shapes) == len(labels) == len(drawing.parts)
    for shape, label in zip(shapes, labels, strict=True):
        assert shape.x0 < label.x0 and label.x1 < shape.x1 and shape.y0 < label.y0 and label.y1 < shape.y1
    assert not any(a.overlaps(b) for i, a in enumerate(shapes) for b in shapes[:i])
    whole, title = figure.bbox, axes.title.get_window_extent(renderer)
    assert all(whole.x0 <= each.x0 and each.x1 <= whole.x1 and each.y1 <= whole.y1 for each in (*shapes, title))
    plt.close(figure)


def test_an_unknown_name_is_told_the_known_ones():
    with pytest.raises(ValueError, match="no drawing of 'lora'; there are biases, adapter, .*LoRA"):
        schematic.schematic("lora")
