"""What a learner sees: the four outcomes, why, the hints, and where they stand."""

import itertools
import json
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from fractions import Fraction

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from torch.nn import functional as F

import minipeft as mp
from minipeft.course import assignments, check, folds, worker
from minipeft.course.assignments import EXERCISES, ROOT, outdated, sources
from minipeft.course.exercises import ASSIGNMENTS, exercises
from minipeft.course.mend import exercise_of, is_test
from minipeft.course.standing import Standing, remember, standings, table
from minipeft.course.submission import report, seed_of
from minipeft.course.verdict import COULD_NOT_RUN, NOT_ATTEMPTED, WRONG
from minipeft.learn.fit import evaluate

ALL = [exercise for several in exercises().values() for exercise in several.values()]


@pytest.fixture(autouse=True)
def own_progress(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIPEFT_PROGRESS", str(tmp_path / "progress.json"))


def test_a_wrong_answer_names_property_misconception_and_distance():
    found = check.verdict("lora_forward", lambda x, W, b, A, B, gamma: F.linear(x, W, b) + x @ A.T @ B.T)
    text = repr(found)
    assert found.outcome == WRONG
    assert "W·x" in text and "γ was left out" in text and "largest difference" in text and "Shapes agree" in text


def test_a_wrong_shape_is_told_with_both_shapes():
    found = check.verdict("lora_delta", lambda A, B, gamma: gamma * (B @ A).T)
    assert found.outcome == WRONG and "expected (" in repr(found) and "transposed" in repr(found)


def test_an_unwritten_answer_is_not_attempted():
    def lora_delta(A, B, gamma):
        raise NotImplementedError("lora_delta")

    assert check.verdict("lora_delta", lora_delta).outcome == NOT_ATTEMPTED


def test_an_answer_that_raises_could_not_run():
    found = check.verdict("lora_delta", lambda A, B, gamma: A @ B @ A)
    assert found.outcome == COULD_NOT_RUN and "RuntimeError" in repr(found)


def test_a_result_that_is_right_but_changes_its_arguments_is_wrong():
    def lora_delta(A, B, gamma):
        B *= gamma
        return B @ A

    found = check.verdict("lora_delta", lora_delta)
    assert found.outcome == WRONG and "changes its arguments" in repr(found)


def test_a_wrong_count_is_told_with_all_its_digits():
    found = check.verdict("count_lora", lambda shapes, rank: sum(rank * (a + b) for a, b in shapes) + 10**9)
    assert "Expected 36, got 1,000,000,036." in repr(found)


def test_a_forgotten_return_is_named():
    assert "is a return missing?" in repr(check.verdict("count_lora", lambda shapes, rank: None))


@pytest.mark.parametrize("value", [None, "text", object(), [torch.ones(2)], {"a": 1}, float("nan"), torch.ones(3)])
@pytest.mark.parametrize("exercise", [e for e in ALL if e.drive == "common.call"], ids=lambda e: e.name)
def test_no_value_breaks_a_check(exercise, value):
    assert check.verdict(exercise.name, lambda *args: value).outcome in (WRONG, COULD_NOT_RUN)


class Mute(Exception):
    def __str__(self):
        raise Mute


class Shy(list):
    def __repr__(self):
        raise ValueError


def fails(*args):
    raise Mute


def leaves(*args):
    raise SystemExit(3)


@pytest.mark.parametrize("answer", [fails, leaves, lambda: 1, None, Mute], ids=lambda a: getattr(a, "__name__", "None"))
@pytest.mark.parametrize("name", ["lora_scale", "target_shapes", "init_lora", "RepairedLoRA"])
def test_whatever_an_answer_raises_is_a_verdict(name, answer):
    found = check.verdict(name, answer)
    assert found.outcome == COULD_NOT_RUN and found.lines[0] and found._repr_html_()


VALUES = [
    *(Shy(), [Shy([1])], 10**6000, Fraction(1, 7), Decimal("NaN"), range(10**9), itertools.count(), b"x", [[[]]]),
    *(np.array(["a"]), torch.ones(2).to_sparse(), torch.ones(2, device="meta"), torch.ones(2) * 1j, Mute(), Mute),
]


@pytest.mark.parametrize("name", ["lora_scale", "lora_delta", "adalora_keep", "target_shapes", "init_lora"])
def test_whatever_an_answer_returns_is_a_verdict(name):
    for value in VALUES:
        found = check.verdict(name, lambda *args, value=value: value)
        assert found.outcome in (WRONG, COULD_NOT_RUN) and found.lines[0] and found._repr_html_()


def test_a_loop_that_never_ends_is_stopped_with_a_sentence(monkeypatch):
    def loop(*args):
        while True:
            try:
                time.sleep(0.01)
            except KeyError:
                pass

    monkeypatch.setattr(check, "SECONDS", 0.2)
    found = check.verdict("lora_scale", loop)
    assert found.outcome == WRONG and "stopped" in repr(found) and "loop" in repr(found)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_check_in_another_thread_has_no_limit_and_the_same_verdict():
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(check.verdict, "lora_scale", lambda alpha, rank, rank_stabilized=False: alpha).result()
    assert found == check.verdict("lora_scale", lambda alpha, rank, rank_stabilized=False: alpha)


def test_a_call_with_other_objects_is_shown_and_the_notebook_goes_on(capsys):
    check.unmerge(len)
    assert "needs merge, unmerge" in capsys.readouterr().out


SEVERAL = {
    "lora": """
import numpy as np
from fractions import Fraction
def lora_scale(alpha, rank, rank_stabilized=False):
    return np.float32(alpha) / np.float64(rank) ** 0.5 if rank_stabilized else Fraction(alpha) / rank
def lora_delta(A, B, gamma):
    return np.asarray(gamma, dtype=A.numpy().dtype) * (B.numpy() @ A.numpy())
def lora_forward(x, W, b, A, B, gamma):
    return (x @ W.T + (0 if b is None else b) + gamma * (x @ A.T @ B.T)).numpy()
def count_lora(shapes, rank):
    return Fraction(sum(rank * (a + b) for a, b in shapes))
def find_targets(names, patterns):
    missed = [p for p in patterns if not any(("." + n).endswith("." + p) for n in names)]
    if missed or not patterns:
        raise ValueError(f"{missed}")
    return (n for n in names if any(("." + n).endswith("." + p) for p in patterns))
""",
    "prompts": """
def nearest_words(prompt, table, k):
    return (F.normalize(prompt) @ F.normalize(table).T).topk(k).indices.int()
def score_verbalizer(log_probs, verbalizer):
    return np.zeros((len(log_probs), len(verbalizer)))
""",
}

# numpy has no gradient, and the merge of the solution adds lora_delta's array to a tensor
REFUSED = {"lora": {"lora_forward", "merge", "unmerge"}, "prompts": {"score_verbalizer"}}


@pytest.mark.parametrize("assignment", SEVERAL)
def test_check_and_grade_say_the_same_of_values_of_other_kinds(assignment):
    """Fractions, numpy's numbers and arrays, generators, int32: both take them, or both refuse with one sentence."""
    notebook = nbformat.read(sources()[assignment], as_version=4)
    answers = {}
    for source in re.split(r"(?=^def )", SEVERAL[assignment], flags=re.MULTILINE)[1:]:
        name = source[4 : source.index("(")]
        cell = next(c for c in notebook.cells if c.metadata.get("nbgrader", {}).get("grade_id") == name)
        cell.source = f"import numpy as np\nfrom fractions import Fraction\n{source}"
        namespace = {"torch": torch, "F": F}
        exec(cell.source, namespace)
        answers[name] = namespace[name]
    notebook.cells = [
        c for c in notebook.cells if not c.metadata.get("nbgrader", {}).get("grade_id", "").startswith("my_")
    ]
    text = nbformat.writes(notebook)
    verdicts = report(text, assignment)["verdicts"]
    seed = seed_of(text, assignment)
    for name, answer in answers.items():
        here, there = check.verdict(name, answer, seed=seed), verdicts[name]
        told = [re.sub(r" \(line \d+ of the cell: .*\)$", "", line) for line in there["lines"]]
        assert (here.outcome, list(here.lines)) == (there["outcome"], told)
    assert {name for name, found in verdicts.items() if found["outcome"] != "correct"} == REFUSED[assignment]


def test_the_verdict_is_shown_and_remembered(capsys):
    check.lora_scale(lambda alpha, rank, rank_stabilized=False: alpha / rank)
    check.count_lora(lambda shapes, rank: sum(rank * (a + b) for a, b in shapes))
    assert {k: v.outcome for k, v in standings().items()} == {"lora_scale": "wrong", "count_lora": "correct"}
    said = capsys.readouterr().out
    assert "✗ lora_scale" in said and 'check.hint("lora_scale", 1)' in said


def test_the_verdict_as_html_escapes_what_the_learner_wrote():
    found = check.verdict("lora_delta", lambda A, B, gamma: "<script>alert(1)</script>")
    assert "<script>" not in found._repr_html_() and "&lt;script&gt;" in found._repr_html_()


@pytest.mark.parametrize("text", ["[1, 2", "[]", '{"lora_scale": {"tries": []}}', '{"lora_scale": null}'])
def test_a_damaged_progress_file_counts_as_none(tmp_path, text):
    (tmp_path / "progress.json").write_text(text)
    assert standings() == {}
    remember("lora_scale", "correct")
    assert standings() == {"lora_scale": Standing("correct")}


def test_a_file_that_held_outcomes_alone_is_read(tmp_path):
    (tmp_path / "progress.json").write_text('{"lora_scale": "wrong", "lora_delta": "correct"}')
    assert standings() == {"lora_scale": Standing("wrong", 1), "lora_delta": Standing("correct")}


def answers(count: int, tmp_path) -> list:
    """Wrong answers that differ, in a file, as a notebook's cells are for Python."""
    (tmp_path / "answers.py").write_text("".join(f"def f{i}(*args):\n    return {i}.25\n" for i in range(count)))
    return [runpy.run_path(str(tmp_path / "answers.py"))[f"f{i}"] for i in range(count)]


def test_ten_different_wrong_answers_open_the_solution_and_a_restart_forgets_none(tmp_path, capsys):
    wrong = answers(10, tmp_path)
    for answer in wrong[:9]:
        check.lora_scale(answer)
        check.lora_scale(answer)  # Run All tries it again
    assert standings()["lora_scale"].tries == 9
    said = capsys.readouterr().out
    assert "alpha / math.sqrt" not in said and "opens after 10 different wrong answers; 9 so far" in said
    run = "import runpy, sys; from minipeft.course import check; check.lora_scale(runpy.run_path(sys.argv[1])['f9'])"
    said = subprocess.run([sys.executable, "-c", run, tmp_path / "answers.py"], capture_output=True, text=True).stdout
    assert 'The solution is open: check.solution("lora_scale")' in said
    check.solution("lora_scale")
    said = capsys.readouterr().out
    assert "return alpha / math.sqrt(rank) if rank_stabilized else alpha / rank" in said
    assert "At rank 4 and α = 16" in said and "SOLUTION" not in said and "NotImplementedError" not in said


def test_a_deadline_decides_alone_when_the_solution_opens(tmp_path, monkeypatch):
    now = datetime.now(timezone(timedelta(hours=5)))
    monkeypatch.setattr(assignments, "EXERCISES", tmp_path)
    file = tmp_path / "deadlines.json"
    file.write_text(json.dumps({"lora": str(now + timedelta(minutes=1)), "select": str(now - timedelta(minutes=1))}))
    assert "opens after the deadline" in folds.why_closed("lora_scale", Standing("correct", 10))
    assert folds.why_closed("bitfit_names", Standing()) == ""
    assert "10 different" in folds.why_closed("route", Standing()) and not folds.why_closed(
        "route", Standing("wrong", 10)
    )


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"lore": "2026-12-01 13:00+01:00"}', '{"lora": "2026-12-01 13:00"}', '{"lora": 3}']
)
def test_a_deadline_that_cannot_be_read_is_told_with_an_example(tmp_path, monkeypatch, text):
    monkeypatch.setattr(assignments, "EXERCISES", tmp_path)
    (tmp_path / "deadlines.json").write_text(text)
    with pytest.raises(ValueError, match="it looks like"):
        assignments.deadlines()
    assert "it looks like" in folds.why_closed("lora_scale", Standing())


def test_a_deadline_of_another_system_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(assignments, "EXERCISES", tmp_path)
    for coding in ("utf-8-sig", "utf-16"):
        for when in ("2026-12-01T12:00:00Z", "2026-12-01 13:00+01:00"):
            (tmp_path / "deadlines.json").write_bytes(f'{{\r\n "lora": "{when}"\r\n}}\r\n'.encode(coding))
            assert assignments.deadlines() == {"lora": datetime(2026, 12, 1, 12, tzinfo=UTC)}


@pytest.mark.parametrize("exercise", ALL, ids=lambda e: e.name)
def test_what_a_solution_shows_is_the_answer_and_runs_alone(exercise):
    shown = folds.solution(exercise.name)
    code = re.fullmatch(r"```python\n(.*)\n```\n\n(.+)", shown, flags=re.DOTALL)[1]
    compile(code, exercise.name, "exec")
    for mark in ("SOLUTION", "NotImplementedError", "<details>", "MARK SCHEME"):
        assert mark not in shown
    assert not re.search(r"^ *return\s*(\n\n|\Z)", code, flags=re.MULTILINE)  # it kept the solution from the stub's end


def test_hints_and_solution_are_folded_below_a_verdict():
    shown = folds.folds("lora_scale", Standing("wrong", 3))._repr_mimebundle_()["text/markdown"]
    assert shown.count("<details><summary>Hint") == 2 and "open>" not in shown and "explained" not in shown
    assert "<summary>The solution, explained" in folds.folds("lora_scale", Standing("correct")).forms["text/markdown"]


def words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


@pytest.mark.parametrize("exercise", ALL, ids=lambda e: e.name)
def test_the_second_hint_stops_short_of_the_solution(exercise):
    """No eight pieces of it in a row stand in the solution, its docstring (which the stub has as well) aside."""
    code = re.sub(r'""".*?"""', "", folds.solution(exercise.name).split("```")[1], flags=re.DOTALL)
    hint, whole = words(exercise.hints[1]), "\0".join(["", *words(code), ""])
    runs = ["\0".join(["", *hint[i : i + 8], ""]) for i in range(len(hint) - 7)]
    assert not [run for run in runs if run in whole]


def test_progress_is_a_table_with_a_link_to_each_exercise_and_assignment(tmp_path, monkeypatch):
    remember("lora_scale", "correct")
    for name in ("lora", "select"):
        shutil.copytree(EXERCISES / name, tmp_path / name)
    monkeypatch.chdir(tmp_path / "lora")
    text, page = table("lora").forms["text/plain"], table("lora").forms["text/html"]
    assert re.search(r"1 · The scale γ +✓ correct\n2 · .* ○ not attempted", text) and re.search(r"lora +1 of 10", text)
    headings = {c.id: c.source.splitlines()[0] for c in nbformat.read("lora.ipynb", as_version=4).cells}
    linked = re.findall('href="lora.ipynb#cell-id=(.*?)">(.*?)<', page)
    assert len(linked) == len(exercises()["lora"]) and all(headings[name] == f"## {title}" for name, title in linked)
    assert re.findall('href="(\\.\\..*?)"', page) == ["../lora/lora.ipynb", "../select/select.ipynb"]
    with pytest.raises(ValueError, match="There is no assignment 'lore'"):
        table("lore")
    for text in ("[1", "[]", '{"cells": [1]}', '{"cells": [{"source": 3}]}'):
        (tmp_path / "lora" / "lora.ipynb").write_text(text)
        assert "lora.ipynb#" not in table("lora").forms["text/html"]  # no link that leads nowhere


def test_unknown_names_and_numbers_say_what_there_is():
    with pytest.raises(AttributeError, match="lora_scale"):
        check.lora_scales  # noqa: B018
    with pytest.raises(ValueError, match="2 hints"):
        check.hint("lora_scale", 3)
    with pytest.raises(ValueError, match="merge, unmerge"):
        check.verdict("unmerge", len)


@pytest.mark.parametrize("exercise", ALL, ids=lambda e: e.name)
def test_two_hints_that_differ(exercise, capsys):
    for number in (1, 2):
        check.hint(exercise.name, number)
    assert len(set(exercise.hints)) == 2 and f"Hint 2 of 2 for {exercise.name}" in capsys.readouterr().out


# The notebooks -------------------------------------------------------------------------------------------------------
def test_the_committed_exercises_come_out_of_the_solutions():
    assert outdated() == [], "run make exercises"
    assert set(sources()) == set(ASSIGNMENTS)


@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_the_learners_notebook_holds_no_answer(name):
    text = (EXERCISES / name / f"{name}.ipynb").read_text()
    for mark in ("BEGIN SOLUTION", "HIDDEN TESTS", "MARK SCHEME", "check.grade", "explained"):
        assert mark not in text


@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_each_exercise_has_its_parts(name):
    cells = nbformat.read(EXERCISES / name / f"{name}.ipynb", as_version=4).cells
    named = {c.metadata.nbgrader.grade_id: i for i, c in enumerate(cells) if "nbgrader" in c.metadata}
    for exercise in exercises()[name]:
        stub, test = cells[named[exercise]], cells[named[f"test_{exercise}"]]
        assert f'raise NotImplementedError("{exercise}")' in stub.source
        assert test.source.startswith(f"check.{exercise}(") and test.metadata.nbgrader.points > 0
        before = "\n".join(c.source for c in cells[: named[exercise]] if c.cell_type == "markdown").split("\n## ")[-1]
        assert "Objective:" in before and "minutes" in before and "point" in before
        after = cells[named[f"test_{exercise}"] + 1].source
        assert "<details><summary>Symptom</summary>" in after and f'check.hint("{exercise}", 1)' in after
        title = next(line for line in before.splitlines() if line)
        assert title.split(" · ", 1)[1] == exercises()[name][exercise].title  # where the table's link goes
    assert cells[named["where"]].source == f'check.progress("{name}")'
    code = [c for c in cells if c.cell_type == "code" and c is not cells[named["setup"]]]
    assert all("raises-exception" in c.metadata.tags for c in code), "Run All stops there"
    assert any("Find the bug" in c.source for c in cells)


def code_of(name: str) -> Iterator[tuple[str, str, bool]]:
    """(source, the exercise that it tests or "", whether it takes long and earns nothing) of the solution's cells."""
    for cell in nbformat.read(sources()[name], as_version=4).cells:
        if cell.cell_type == "code":
            tested = exercise_of(cell) if is_test(cell) else ""
            yield cell.source, tested, "at-home" in cell.metadata.get("tags", ())


TEST = """check.{name}({objects})
### BEGIN HIDDEN TESTS
check.grade("{name}", {objects})
### END HIDDEN TESTS"""


@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_every_check_of_the_solution_is_right_within_two_seconds(name):
    """At its place in the notebook, with what the cells above it define."""
    namespace: dict = {}
    for source, tested, at_home in code_of(name):
        if tested:
            exercise = exercises()[name][tested]
            assert source == TEST.format(name=tested, objects=", ".join(exercise.objects))
            started = time.process_time()
            found = check.verdict(tested, *(namespace[each] for each in exercise.objects))
            assert found.outcome == "correct", found
            assert time.process_time() - started < 2
        elif not at_home:
            exec(source, namespace)


SHOWN = {  # what the last cell of an assignment shows that draws no loss curve of its own
    "distillation": "seen[-1][0] < seen[0][0] - 0.5",
    "serving": "torch.allclose(mine, y, atol=1e-5)",
    "feedback": "sum(shares[-4:]) > sum(shares[:4])",
    "worlds": "(B @ A - wanted).norm() > 0.1 * wanted.norm() and page_hinkley(losses, 0.05, 1.0, 5)[0] in (12, 13)",
    "capstone": "mine > 0.7 and looks[best] < looks[0] and macro_f1(truth, said, 10) > 0.7",
}


@pytest.fixture
def run_whole(tmp_path, monkeypatch):
    """A function that runs a solution from top to bottom but for its tests and gives what an expression is then: with
    twenty steps for sixty or forty, and scores on twenty rows, for it shall run and learn, not arrive."""
    monkeypatch.setattr(
        mp, "evaluate", lambda model, task, split="test", n=20: evaluate(model, task, split, min(n, 20))
    )
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    monkeypatch.chdir(tmp_path)

    def run(name: str, asked: str):
        namespace: dict = {}
        for source, tested, at_home in code_of(name):
            if not tested:
                exec(re.sub(r"\b[46]0\b", "20", source) if at_home else source, namespace)
        return eval(asked, namespace)

    return run


@pytest.mark.parametrize("name", [name for name in ASSIGNMENTS if name not in SHOWN])
def test_the_solution_trains_the_pocket_model_with_the_learners_code(name, run_whole):
    """Every cell runs, and the curve that they draw falls towards the floor."""
    losses, floor = run_whole(name, f"({'history.losses' if name == 'lora' else 'losses'}, task.floor)")
    first, end = losses[0], sum(losses[-5:]) / 5
    assert floor < end < first and end - floor < 0.75 * (first - floor)


@pytest.mark.parametrize("name", SHOWN)
def test_the_solution_shows_what_it_is_about(name, run_whole):
    assert run_whole(name, SHOWN[name])


def test_a_solution_runs_in_a_kernel_with_its_tests(tmp_path, monkeypatch):
    """As a learner has it: the checks show verdicts, the hidden tests are silent, and no cell raises."""
    from nbclient import NotebookClient

    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # another test runs beside this one
    notebook = nbformat.read(sources()["capstone"], as_version=4)
    for cell in notebook.cells:
        cell.metadata.pop("tags", None)  # an error ends this run
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = "".join(str(cell.outputs) for cell in notebook.cells if cell.cell_type == "code")
    for exercise in exercises()["capstone"].values():
        assert f"✓ {exercise.name}: correct" in shown
    assert f"{len(exercises()['capstone'])} of {len(exercises()['capstone'])}" in shown


def test_the_classroom_extra_is_not_the_learners():
    code = "import sys, minipeft.course.check; print('nbgrader' in sys.modules, 'ipywidgets' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.split() == ["False", "False"]


def test_the_workers_silent_check_says_nothing():
    assert worker.Silent("check").lora_scale(1) is None


def test_the_margin_of_a_recipe_is_no_lottery():
    """By how much a recipe beats a new head, over twenty lights: four standard errors of a mean over as many lights as
    the grader draws, one chance in thirty thousand, lie between right recipes and the margin, and wrong ones and it."""
    from minipeft.course.drives import capstone as drive
    from minipeft.course.exercises.capstone import DRAWS, MARGIN, SHAPES, lights, new_heads

    x, y, hidden, truth = lights(random.Random(1), 20)
    heads = torch.tensor([new_heads(*(each[i : i + 1] for each in (x, y, hidden, truth))) for i in range(len(x))])
    for right, layer, rank, lr in (
        (True, "lower", 4, 2e-2), (True, "lower", 4, 1e-2), (False, "lower", 2, 2e-2), (False, "upper", 4, 2e-2),
    ):  # fmt: skip
        plan = {"method": "LoRA", "settings": {"rank": rank, "targets": [layer]}, "lr": lr, "steps": drive.STEPS}
        classes = drive.adapt(lambda *_, plan=plan: plan, SHAPES, 0, drive.base(), x, y, hidden)["classes"]
        gains = (torch.tensor(classes) == truth).double().mean(1) - heads
        away = (gains.mean() - MARGIN) / (gains.std() / DRAWS**0.5)
        assert (away if right else -away) > 4, (layer, rank, lr, gains.mean(), gains.std())
    text = "".join(cell.source for cell in nbformat.read(sources()["capstone"], as_version=4).cells)
    assert f"**{100 * MARGIN:.0f} points above**" in text and DRAWS == 5 and "does so five times" in text
