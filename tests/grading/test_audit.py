"""The audit's tables hold: the same that `make grade-audit` prints, mutants as a sample."""

import audit
import mutants
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


def test_small_changes_to_the_solutions_are_found():
    table, survived, _ = mutants.report(share=0.04)
    assert table.changes.sum() > 40 and len(survived) <= (1 - mutants.KILLED) * table.changes.sum(), survived
