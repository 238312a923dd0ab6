"""Wrong answers made by a machine: every solution with one small change, and what the checks say about it.

    mutmut and cosmic-ray change a package's files and run its test suite once for each change; here a test is a cell of
    a notebook and a second is long, so this does the same to the syntax tree of each solution, and asks `check` in a
    fork of one process. A grader says the same as a check (test_check), so what is killed here loses its points there.

A change that alters nothing that the exercise asks for stands in EQUIVALENT with its reason. `make grade-audit` tries
all; the tests try a sample.
"""

from __future__ import annotations

import ast
import copy
import os
import random
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import nbformat
import pandas as pd

from minipeft.course import assignments, check
from minipeft.course.exercises import exercises
from minipeft.course.verdict import CORRECT

KILLED = 0.99  # the least share of changes, without the equivalent ones, that the checks must find
SECONDS = 5  # that one call may take
EQUIVALENT = {  # a pattern of "exercise: old → new", and why it alters nothing that is asked for
    r": return → pass": "nothing stands behind this return but the stub's exception",
    r"strict=\w+\).* → (?!.*strict=True.*strict=True)": "the lists are equally long",
    r"^merge: return old → pass": "what merge returns is asked for by unmerge, which is another exercise",
    r"^merge: .*(requires_grad=True\)|\(old.dtype\)\))$": "whether a merged weight can train is left open",
    r"^merge: .*\(old \+ delta\)": "torch adds bfloat16 and float32 in float32 by itself",
    r"^RepairedLoRA: self.A = ": "the size of A's start is left open",
    r"^RepairedDoRA: self.A = ": "the size of A's start is left open",
    r"^RepairedDoRA: self.m = .*linear.weight.norm": "nn.Parameter cuts the graph off by itself",
    r"^tune_softmax: .*weight.clone": "nn.Parameter cuts the graph off by itself",
    r"^MaskedAdamW: .* → .*(p\[m\].clone|p.detach\(\)\[m\]\))": "indexing copies, and nn.Parameter cuts the graph off",
    r"^init_from_vocabulary: .*detach\(\)$": "indexing copies",
    r"^fisher_importance: .*log_softmax\(-0\)": "there is one dimension, and −0 is 0",
    r"^layer_range: .*, -2\)$": "a name without a number lies in no range either way",
    r"scales (> 0|>= 0|> -1), (self.)?scales, [012]\)[^→]*$": "a block of zeros is 0 by its scale",
    r"^pack_nibbles: .*padded\[::2\] <<": "a slice begins at 0 by itself",
    r"^route: .*topk\(k\)$": "the last dimension is torch's default",
    r"^adalora_budget: if step": "the curve is continuous, so both formulas agree at the ends",
    r": .*\b(min|torch.minimum)\([^→]* → [^→]*\b(min|torch.minimum)\((len\(together\)|cheaper|j), ": "the least of two",
    r"^score_verbalizer: .* → .*(logsumexp|log_softmax)\(1\)": "there are two dimensions, so the last is 1",
    r"^nearest_words: .* → .*normalize\((prompt|table)(, dim=1)?\)": "there are two dimensions, so the last is 1",
    r"^count_prefix: .*width / heads": "heads divide the width, and a whole number may be a float",
    r": .*transpose\([^→]* → .*transpose\((-2, -1|-1, 2|2, 1)\)": "the same two dimensions change places",
    r"^repaired_prefix: .*mask\], 1\)$": "the model takes whole numbers in the place of booleans",
    r"^repaired_memory: .*element_size\(\) < 3": "no type has three bytes",
    r": .* → .*svd\([MN](, full_matrices=True)?\)": "what lies beyond the k strongest is cut off, or not used",
    r"^(effective|stable)_rank: .* → .*(\.exp|square\(\)\.sum)\(\) if": "one number may be a tensor",
    r"^(soft_loss|masked_soft_loss|mixed_loss): .* → .*(softmax|sum)\(1\)": "the last of two dimensions is 1",
    r"^fgm_gradients: .*kept, size = \(table.clone": "the copy is only written back",
    r"^repaired_rows: .*low\)\[:, :, -1\]": "there is one column",
    r"^group_relative_loss: surrogate = .*minimum\(ratio.clamp": "the least of two",
    r"^cut_back: .*svd\(delta(, full_matrices=True)?\)": "what lies beyond the r strongest is cut off",
    r"^stack: A = .*for A_k, _ in pairs\]\)$": "the first dimension is torch's default",
    r"^page_hinkley: .*(mean, m, lowest = \(.*1\.0|min\(m, lowest)": "only m - lowest counts",
    r"^repaired_comparison: .*(exp\(\)|square\(\).sum\(\)| / k), ": "one number may be a tensor",
    r"^largest_rank: (fits|cheaper) = .*if shapes else 1$": "the least of two, of which the other is 0",
    r"^calibration_error: place = .* → .*ceil\(\)(\.long\(\))?( [+-] [012])?$": "bins only get other numbers",
    r"^calibration_error: error \+= ": "one number may be a tensor",
    r"^calibration_error: .*probabilities.max\(1\)": "there are two dimensions, so the last is 1",
    r"^calibration_error: gap = .*confidence\[inside\].mean\(\)$": "a bin's mean has six digits in float32 too",
    r"^stop_early: best, least = \(0, math.inf\) → ": "the first loss is finite, and so is less",
    r"^choose_rate: (if not finite: → if False:|raise ValueError.* → pass$)": "`min` of nothing is a ValueError",
    r"^cheapest_alike: near = .* → .*in scores if worst_loss": "the best is worse than itself by 0, which matters less",
    r"^recipe: ": "a recipe is judged by what it reads, however it is written",
}


@dataclass(frozen=True)
class Mutant:
    exercise: str
    change: str
    code: str


# ---------------------------------------------------------------------------------------------------------------------
# Changes
# ---------------------------------------------------------------------------------------------------------------------
SWAPS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div, ast.Mod: ast.Add,
    ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


def changes(node: ast.AST) -> Iterator[ast.AST | None]:
    """What may stand in the place of this node; None for nothing at all."""
    if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in SWAPS:
        yield changed(node, op=SWAPS[type(node.op)]())
        if isinstance(node, ast.BinOp):
            yield node.left
            yield node.right
        else:
            yield from node.values
    elif isinstance(node, ast.BinOp):
        yield changed(node, left=node.right, right=node.left)
    elif isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            yield changed(node, ops=[*node.ops[:i], SWAPS[type(op)](), *node.ops[i + 1 :]])
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield from (ast.Constant(node.value + 1), ast.Constant(node.value - 1))
    elif isinstance(node, ast.Constant) and isinstance(node.value, float):
        yield from (ast.Constant(node.value * 1.01), ast.Constant(0.0 if node.value else 1.0))
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value:
        yield from (ast.Constant(node.value + "x"), ast.Constant(""))
    elif isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute):
            yield node.func.value
        for i in range(len(node.keywords)):
            yield changed(node, keywords=node.keywords[:i] + node.keywords[i + 1 :])
        if len(node.args) > 1:
            for i in range(len(node.args)):
                yield changed(node, args=node.args[:i] + node.args[i + 1 :])
            yield changed(node, args=[node.args[1], node.args[0], *node.args[2:]])
    elif isinstance(node, ast.Attribute) and node.attr in ("T", "mT"):
        yield node.value
    elif isinstance(node, ast.Slice):
        yield from (changed(node, **{part: None}) for part in ("lower", "upper", "step") if getattr(node, part))
    elif isinstance(node, ast.IfExp):
        yield from (node.body, node.orelse)
    elif isinstance(node, ast.If):
        yield from (changed(node, test=ast.Constant(True)), changed(node, test=ast.Constant(False)))
    elif isinstance(node, ast.comprehension):
        yield from (changed(node, ifs=[]) for _ in node.ifs[:1])
    elif isinstance(node, ast.Raise):
        yield None
        yield ast.parse("raise RuntimeError('no')").body[0]
    elif isinstance(node, ast.Expr | ast.Assign | ast.AugAssign | ast.Return):
        yield None
    elif isinstance(node, ast.FunctionDef) and node.decorator_list:
        yield changed(node, decorator_list=[])
    elif isinstance(node, ast.arguments) and node.defaults:
        yield changed(node, defaults=[])


def changed(node: ast.AST, **parts) -> ast.AST:
    other = copy.copy(node)
    for name, value in parts.items():
        setattr(other, name, value)
    return other


class Put(ast.NodeTransformer):
    """Puts `new` in the place of `old`."""

    def __init__(self, old: ast.AST, new: ast.AST | None):
        self.old, self.new = old, new

    def visit(self, node):
        if node is not self.old:
            return self.generic_visit(node)
        return ast.Pass() if self.new is None else self.new


class Bare(ast.NodeTransformer):
    """Without annotations, docstrings, the stub's own exception, and what exceptions say."""

    def visit_arg(self, node):
        return ast.arg(node.arg)

    def visit_FunctionDef(self, node):
        node.returns = None
        return self.generic_visit(node)

    def visit_Expr(self, node):
        return None if isinstance(node.value, ast.Constant) else self.generic_visit(node)

    def visit_Raise(self, node):
        return None if "NotImplementedError" in ast.unparse(node) else node


def mutants(name: str, source: str) -> Iterator[Mutant]:
    tree = ast.parse(ast.unparse(Bare().visit(ast.parse(source))))
    kept = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.Raise) for inner in ast.iter_child_nodes(node)}
    kept |= {id(deep) for node in ast.walk(tree) if id(node) in kept for deep in ast.walk(node)}
    seen = {ast.unparse(tree)}
    for i, node in enumerate(ast.walk(tree)):
        if id(node) in kept:
            continue
        for new in changes(node):
            other = copy.deepcopy((tree, new))
            old = next(each for j, each in enumerate(ast.walk(other[0])) if j == i)
            code = ast.unparse(ast.fix_missing_locations(Put(old, other[1]).visit(other[0])))
            if code not in seen:
                seen.add(code)
                yield Mutant(name, difference(ast.unparse(tree), code), code)


def difference(before: str, after: str) -> str:
    """The lines that differ, as "old → new"."""
    old, new = before.splitlines(), after.splitlines()
    while old and new and old[0] == new[0]:
        old, new = old[1:], new[1:]
    while old and new and old[-1] == new[-1]:
        old, new = old[:-1], new[:-1]
    return " → ".join("; ".join(line.strip() for line in lines) for lines in (old, new))


# ---------------------------------------------------------------------------------------------------------------------
# Verdicts
# ---------------------------------------------------------------------------------------------------------------------
def workshop(assignment: str) -> tuple[dict, dict[str, str]]:
    """(what the solution's cells define, {exercise: the source of its answer})."""
    namespace, sources = {}, {}
    for cell in nbformat.read(assignments.sources()[assignment], as_version=4).cells:
        data = cell.metadata.get("nbgrader", {})
        if data.get("solution") and data["grade_id"] in exercises()[assignment]:
            sources[data["grade_id"]] = cell.source
        if data.get("grade_id") == "setup" or data.get("solution"):
            exec(cell.source, namespace)
    return namespace, sources


def judged(mutant: Mutant, namespace: dict) -> bool:
    """Whether the check finds it. In a fork, so that nothing that it does is left."""
    exercise = next(several[mutant.exercise] for several in exercises().values() if mutant.exercise in several)
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        found = 1
        try:
            own = dict(namespace)
            exec(mutant.code, own)
            found = check.verdict(mutant.exercise, *(own[each] for each in exercise.objects)).outcome != CORRECT
        except BaseException:  # the cell itself does not run
            found = 1
        os._exit(int(found))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0


def every() -> Iterator[tuple[str, dict, Mutant]]:
    for assignment in exercises():
        namespace, sources = workshop(assignment)
        for name, source in sources.items():
            for mutant in mutants(name, source):
                yield assignment, namespace, mutant


def report(share: float = 1.0, seed: int = 0) -> tuple[pd.DataFrame, list[str], dict[str, str]]:
    """(a row for each assignment, what survived, {what is equivalent: why}) of this share of all changes."""
    check.SECONDS, rng, rows, survived, seen = SECONDS, random.Random(seed), {}, [], {}
    for assignment, namespace, mutant in every():
        row = rows.setdefault(assignment, {"changes": 0, "killed": 0, "equivalent": 0, "survived": 0})
        if rng.random() > share:
            continue
        row["changes"] += 1
        told = f"{mutant.exercise}: {mutant.change}"
        reason = next((why for pattern, why in EQUIVALENT.items() if re.search(pattern, told)), None)
        if judged(mutant, namespace):
            row["killed"] += 1
        elif reason:
            row["equivalent"] += 1
            seen[told] = reason
        else:
            row["survived"] += 1
            survived.append(told)
    return pd.DataFrame(rows).T, survived, seen


def main() -> int:
    started = time.perf_counter()
    table, survived, equivalent = report()
    total = table.sum()
    rate = total.killed / (total.changes - total.equivalent)
    print(table.to_string(), "", sep="\n")
    print(*(f"SURVIVED    {each}" for each in survived), sep="\n")
    print(*(f"EQUIVALENT  {each}: {reason}" for each, reason in equivalent.items()), sep="\n")
    print(f"{rate:.1%} of {total.changes - total.equivalent} changes are found ({time.perf_counter() - started:.0f} s)")
    return rate < KILLED


if __name__ == "__main__":
    sys.exit(main())
