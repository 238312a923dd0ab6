"""The audit's table holds: the same that `make grade-audit` prints."""

import audit
import pytest

from minipeft.course.exercises import ASSIGNMENTS


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_unsolved_solved_wrong_and_right_answers(assignment):
    table, faults = audit.audit_answers(assignment)
    assert faults == [] and table.killed.sum() >= audit.KILLED * table.wrong.sum()
    assert (table.passed == table.right).all()


def test_hostile_and_broken_submissions():
    table, faults = audit.audit_hostile()
    assert faults == [] and len(table) >= len(audit.HOSTILE)
