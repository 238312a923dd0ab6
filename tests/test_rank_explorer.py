"""The rank explorer shows the loss that the truncated model has, and measures each rank once."""

import pytest
import tiny
from tiny import small

import minipeft as mp
from minipeft.analyze.spectrum import decompose, truncated
from minipeft.explore.rank import RankExplorer, draw_similarity


def test_the_slider_cuts_and_the_picture_shows_the_measured_loss():
    tuned = mp.attach(small(), mp.LoRA(rank=4))
    tiny.randomise(tuned)
    task = mp.world.pirate()
    explorer = RankExplorer(tuned, task, n=10)
    for rank in (2, 0, 2):
        explorer.controls["rank"].value = rank
    with truncated(tuned, 2):
        loss = mp.evaluate(tuned, task, n=10).loss
    assert explorer.losses[2] == loss and set(explorer.losses) == {2, 0}
    assert f"loss {loss:.3f}" in explorer.text.value and "effective rank" in explorer.text.value
    measured = explorer.figure.axes[1].get_lines()[0]
    assert list(measured.get_xdata()) == [0.5, 2] and measured.get_ydata()[1] == loss
    assert explorer.whole == mp.evaluate(tuned, task, n=10).loss, "the model is whole again"
    sigma = explorer.figure.axes[0].get_lines()[0].get_ydata()
    assert len(sigma) == 4


def test_a_method_without_matrices_is_refused():
    with pytest.raises(ValueError, match="no matrix"):
        RankExplorer(mp.attach(small(), mp.BitFit()), mp.world.pirate(), n=5)


def test_heat_maps_show_phi():
    import torch
    from matplotlib.figure import Figure

    X = decompose(torch.randn(6, 9))
    figure = Figure()
    draw_similarity(figure, [("itself", X, X), ("other", X, decompose(torch.randn(6, 9)))])
    shown = figure.axes[0].images[0].get_array()
    assert shown.min() > 0.999 and figure.axes[1].images[0].get_array().min() < 0.9
