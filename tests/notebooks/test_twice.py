"""A cell that is run again runs: of the quickest lessons here, of any by `minipeft.course.notebooks --twice`."""

from pathlib import Path

import pytest

from minipeft.course.notebooks import twice

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["15_beyond_text", "17_claims", "19_recommender", "20_opinion_monitor"])
def test_each_cell_runs_two_times_over_and_shows_as_much(name):
    ran = twice(NOTEBOOKS / f"{name}.ipynb").cells
    assert [cell.execution_count for cell in ran] == list(range(1, len(ran) + 1))
    for first, second in zip(ran[::2], ran[1::2], strict=True):
        assert first.source == second.source and shown(first) == shown(second), first.source


def shown(cell) -> set[str]:
    """The kinds of output, without warnings, which are given once."""
    return {output.output_type for output in cell.outputs if output.get("name") != "stderr"}
