"""A cell that is run again runs: of the quickest lessons here, of any by `minipeft.course.notebooks --twice`."""

from pathlib import Path

import pytest

from minipeft.course.notebooks import twice

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["15_beyond_text", "17_claims", "19_recommender", "20_opinion_monitor"])
def test_each_cell_runs_two_times_over(name):
    twice(NOTEBOOKS / f"{name}.ipynb")
