"""The ledger: every stored verdict follows from its figures, and quick rows are computed again."""

from __future__ import annotations

import json

import pytest

from minipeft.course import claims
from minipeft.course.claims import CLAIMS, load

STORED = {row["id"]: row for row in load()}


def test_every_check_is_stored_and_every_stored_row_has_a_check():
    assert STORED.keys() == CLAIMS.keys() and list(STORED) == sorted(STORED)


@pytest.mark.parametrize("id", CLAIMS)
def test_a_stored_verdict_follows_from_its_figures(id):
    stored = STORED[id]
    fresh = claims.row(CLAIMS[id], stored["figures"])
    assert fresh == stored
    assert stored["verdict"].startswith(("holds", "wrong", "cannot tell")) and stored["check"]


@pytest.mark.slow
@pytest.mark.parametrize("id", [id for id, c in CLAIMS.items() if c.kind in ("exact", "code", "atlas")])
def test_quick_rows_come_out_as_stored(id):
    fresh = json.loads(json.dumps(CLAIMS[id].check()))
    figures = STORED[id]["figures"]
    assert CLAIMS[id].rule(fresh) == STORED[id]["verdict"]
    assert fresh.keys() == figures.keys()
    for name, value in figures.items():
        if "float32" not in name:  # a rounding error differs between kinds of CPU
            assert fresh[name] == (pytest.approx(value, abs=0.011) if isinstance(value, float) else value), name


def test_rules_can_come_out_otherwise():
    """A rule that always says the same is no rule."""
    flipped = {
        "C04": {"full": 1_048_576, "LoRA": 8_192},
        "C07": {"B = 0": 1.0, "A and B random": [1.0, 1.1, 1.0]},
        "C15": {"full ÷ LoRA": 250.0},
        "C30": {"texts": 1500, "most predictions that fit": 1510},
    }
    for id, figures in flipped.items():
        assert CLAIMS[id].rule(figures) != STORED[id]["verdict"], id


def test_what_runs_decide_can_come_out_each_way():
    less = {"LoRA": [0.2, 0.1, 0.3], "adapter": [0.2, 0.02, 0.3]}
    none = {"LoRA": [0.0, -0.1, 0.04], "adapter": [-0.2, -0.3, -0.1]}
    for id, key in (("C22", "full − this, 95 %"), ("C26", "harm, 95 %")):
        rule = CLAIMS[id].rule
        assert rule({key: {"a": less["LoRA"]}}) == "holds" and rule({key: {"a": [0.0, -0.1, 0.01]}}) == "wrong"
        assert rule({key: {"a": [0.1, 0.0, 0.2]}}) == "cannot tell"
        assert rule({key: {"a": [0.1, 0.0, 0.2], "b": less["LoRA"]}}).endswith(" is b")
    assert CLAIMS["C22"].rule({"full − this, 95 %": less}) == "holds when the method is LoRA"
    assert CLAIMS["C22"].rule({"full − this, 95 %": none}) == "wrong"
