"""The audit's tables hold: the same that `make grade-audit` prints, mutants as a sample."""

import audit
import mutants
import pytest
import torch
from torch import nn

from minipeft.course.drives.promises import rehearsed
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


def test_what_is_rehearsed_gets_its_own_arguments_back():
    seen = []

    def answer(x, names, model, generator):
        drawn = torch.rand(1, generator=generator).item()
        seen.append((x.tolist(), list(names), model.weight.tolist(), model.training, x.grad, x.requires_grad, drawn))
        model.eval()
        x.requires_grad_(False).grad = torch.ones(3)

    x, model, generator = torch.rand(3, requires_grad=True), nn.Linear(2, 2), torch.Generator().manual_seed(0)
    right = x.tolist(), ["b", "a", "c"], model.weight.tolist(), True, None, True
    rehearsed(answer)(x, ["b", "a", "c"], model, generator)
    assert len(seen) == 3 and seen[2][:6] == right and len({each[6] for each in seen}) == 1
    assert all(before[i] != right[i] for before in seen[:2] for i in range(3))
