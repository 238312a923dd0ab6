"""A class graded: mending, gradebook, feedback, resuming, other executors, and the real nbgrader on the tree."""

import concurrent.futures
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import Popen

import nbformat
import pandas as pd
import pytest
from hostile import FIRST, cell_named
from processes import until

from minipeft.course.assignments import EXERCISES, ROOT, sources
from minipeft.course.grade import discover, grade
from minipeft.course.handed_in import Submission
from minipeft.course.mend import mend, name_of
from minipeft.course.sandbox import CannotStart, Limits
from minipeft.course.submission import report, seed_of

pytest.importorskip("nbgrader", reason="the classroom extra is not installed")
SOLVED = nbformat.read(sources()["lora"], as_version=4)
TOTAL = sum(c.metadata.nbgrader.get("points", 0) for c in SOLVED.cells if "nbgrader" in c.metadata)


def submission(**answers: str):
    """The solution, with these answers in place of its own."""
    notebook = copy.deepcopy(SOLVED)
    for name, code in answers.items():
        cell_named(notebook, name).source = code
    return notebook


WRONG = submission(lora_scale="def lora_scale(alpha, rank, rank_stabilized=False):\n    return alpha")


def hand_in(folder: Path, **notebooks) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for student, notebook in notebooks.items():
        nbformat.write(notebook, folder / f"{student}.ipynb")
    return folder


# Mending -------------------------------------------------------------------------------------------------------------
def test_mending_keeps_all_of_the_students_code_and_none_of_their_tests():
    notebook = copy.deepcopy(WRONG)
    cell_named(notebook, f"test_{FIRST}").source = "pass"
    notebook.cells.insert(2, nbformat.v4.new_code_cell("helper = 1"))
    mended, remarks = mend(notebook, "lora")
    assert "return alpha" in cell_named(mended, FIRST).source and any(c.source == "helper = 1" for c in mended.cells)
    assert "check.grade" in cell_named(mended, f"test_{FIRST}").source
    assert any("changed and has been restored" in remark for remark in remarks)


def test_mending_gives_each_cell_of_the_source_exactly_once():
    notebook = copy.deepcopy(SOLVED)
    for name in (FIRST, f"test_{FIRST}", "setup"):
        notebook.cells.insert(9, copy.deepcopy(cell_named(notebook, name)))
    notebook.cells.remove(cell_named(notebook, "test_merge"))
    mended, _ = mend(notebook, "lora")
    names = [name_of(c) for c in mended.cells if name_of(c)]
    assert sorted(names) == sorted(name_of(c) for c in SOLVED.cells if name_of(c))


def test_mending_what_is_whole_changes_nothing_and_says_nothing():
    learner = nbformat.read(EXERCISES / "lora" / "lora.ipynb", as_version=4)
    mended, remarks = mend(learner, "lora")
    assert remarks == []
    again, remarks = mend(mended, "lora")
    assert remarks == [] and again == mended


def test_a_learner_without_metadata_is_graded_all_the_same():
    notebook = copy.deepcopy(WRONG)
    for cell in notebook.cells:
        cell.metadata = {}
    found = report(nbformat.writes(notebook), "lora")
    assert sum(found["points"].values()) == TOTAL - 1


# One submission ------------------------------------------------------------------------------------------------------
def test_the_numbers_that_a_submission_is_tried_on_follow_from_what_its_cells_say():
    text = nbformat.writes(WRONG)
    spaced = json.dumps(json.loads(text), indent=7) + " \n"
    assert seed_of(text, "lora") == seed_of(spaced, "lora") == seed_of(text.replace("\n", "\r\n"), "lora")
    assert seed_of(text, "lora") != seed_of(nbformat.writes(submission()), "lora")


def test_a_syntax_error_is_no_blank_page():
    found = report(nbformat.writes(submission(lora_scale="def lora_scale(alpha, rank:\n    pass")), "lora")
    assert found["verdicts"]["lora_scale"]["outcome"] == "could not run"
    assert "SyntaxError" in found["verdicts"]["lora_scale"]["lines"][0]


def test_all_the_time_used_up_is_said():
    sleepy = submission(lora_scale="import time\ntime.sleep(4)")
    sleepy.cells.insert(1, nbformat.v4.new_code_cell("import time\ntime.sleep(4)"))
    found = report(nbformat.writes(sleepy), "lora", Limits(seconds=5))
    assert sum(found["points"].values()) == 0 and "longer than 5 s" in " ".join(found["remarks"])


def test_a_machine_that_cannot_run_submissions_costs_nobody_a_point(monkeypatch):
    monkeypatch.setattr("minipeft.course.sandbox.subprocess.Popen", lambda *args, **kwargs: Popen("false"))
    monkeypatch.setattr("minipeft.course.submission.RESTARTS", 0)
    with pytest.raises(CannotStart, match="Nobody lost a point"):
        report(nbformat.writes(submission()), "lora")


# What was handed in --------------------------------------------------------------------------------------------------
def test_three_layouts_are_understood(tmp_path):
    nbformat.write(SOLVED, tmp_path / "ada.ipynb")
    for path in ("bob/homework (1).ipynb", "cem/lora/lora.ipynb", "dee/lora/renamed.ipynb"):
        (tmp_path / path).parent.mkdir(parents=True)
        nbformat.write(SOLVED, tmp_path / path)
    (tmp_path / "eva").mkdir()
    (tmp_path / "notes.txt").write_text("not a submission")
    found = discover(tmp_path, "lora")
    assert [(s.student, s.path is not None) for s in found] == [
        *(("ada", True), ("bob", True), ("cem", True), ("dee", True), ("eva", False)),
    ]


@pytest.mark.parametrize(
    ("folder", "name", "said"), [("no", "lora", "no folder"), (".", "lara", "no assignment 'lara'")]
)
def test_what_is_not_there_is_said(tmp_path, folder, name, said):
    with pytest.raises(ValueError, match=said):
        discover(tmp_path / folder, name)


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    (tmp_path / "in" / "eve").mkdir(parents=True)
    nbformat.write(SOLVED, tmp_path / "secret.ipynb")
    (tmp_path / "in" / "eve" / "lora.ipynb").symlink_to(tmp_path / "secret.ipynb")
    said = "eve/lora.ipynb is a link and was not opened."
    assert discover(tmp_path / "in", "lora") == [Submission("eve", "lora", None, "No notebook was handed in.", said)]


# The class -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("class")
    hand_in(folder / "in", ada=submission(), bob=WRONG)
    (folder / "in" / "cem.ipynb").write_text("{")
    table = grade(folder / "in", folder / "out", "lora", progress=False)
    return folder, table.set_index("student")


def test_scores_reach_the_table_the_gradebook_and_gradescope(graded):
    from nbgrader.api import Gradebook

    folder, table = graded
    scores = {"ada": TOTAL, "bob": TOTAL - 1, "cem": 0}
    assert table.score.to_dict() == scores
    assert pd.read_csv(folder / "out" / "grades.csv").set_index("student").score.to_dict() == scores
    with Gradebook(f"sqlite:///{folder / 'out' / 'gradebook.db'}") as book:
        for student, score in scores.items():
            found = book.find_submission("lora", student)
            assert found.score == score and found.max_score == TOTAL
    for student, score in scores.items():
        tests = json.loads((folder / "out" / "gradescope" / "lora" / f"{student}.json").read_text())["tests"]
        assert sum(test["score"] for test in tests) == score
        assert {"name", "score", "max_score", "visibility", "output"} == set(tests[0])


def test_feedback_tells_why_and_hides_the_hidden_tests(graded):
    folder, _ = graded
    page = (folder / "out" / "feedback" / "bob" / "lora" / "lora.html").read_text()
    assert "divide by the rank" in page and "HIDDEN TESTS" not in page and ">grade<" not in page


def test_a_dask_cluster_whose_worker_is_killed_half_way_loses_nothing(tmp_path):
    distributed = pytest.importorskip("distributed", reason="dask.distributed is not installed")
    students = {f"s{i}": submission() if i % 2 else WRONG for i in range(4)}
    hand_in(tmp_path / "in", **students)
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        with distributed.Client(cluster) as client, client.get_executor() as executor:
            with concurrent.futures.ThreadPoolExecutor(1) as aside:
                going = aside.submit(grade, tmp_path / "in", tmp_path / "out", "lora", executor, progress=False)
                reports = tmp_path / "out" / "reports" / "lora"
                until(lambda: any(reports.glob("*.json")), "a first report", 300, pause=0.05)
                os.kill(next(iter(cluster.workers.values())).pid, signal.SIGKILL)
                table = going.result(300)
    assert table.score.tolist() == [TOTAL if i % 2 else TOTAL - 1 for i in range(4)]


def test_killed_at_any_moment_it_goes_on_where_it_stopped(tmp_path):
    """SIGKILL while nbgrader makes its gradebook, and while it enters the first report, then to the end: nothing is
    lost, and no finished report is made again."""
    hand_in(tmp_path / "in", **{f"s{i}": submission() if i % 2 else WRONG for i in range(4)})
    out, made = tmp_path / "out", {}
    command = [sys.executable, "-m", "minipeft.course.grade", "in", "--out", "out", "--assignment", "lora"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for moment in ("gradebook.db", "submitted/*/lora/lora.ipynb", ""):
        run = subprocess.Popen(
            [*command, "--unsandboxed"],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        while moment and run.poll() is None and not list(out.glob(moment)):
            time.sleep(0.02)
        if moment:
            assert run.poll() is None, "it was over before it could be killed"
            os.killpg(run.pid, signal.SIGKILL)
        said = run.communicate(timeout=300)[0]
        for path in out.glob("reports/lora/[!.]*.json"):
            stamp = path.stat().st_mtime_ns
            assert made.setdefault(path.name, stamp) == stamp, "a finished submission was graded again"
        assert moment == "gradebook.db" or made
    assert run.returncode == 0 and "4 submissions" in said
    table = pd.read_csv(out / "grades.csv")
    assert table.score.tolist() == [TOTAL if i % 2 else TOTAL - 1 for i in range(4)]
    assert len(list(out.glob("feedback/*/lora/lora.html"))) == 4


# nbgrader itself -----------------------------------------------------------------------------------------------------
def test_the_tree_is_an_nbgrader_course_as_it_stands(tmp_path):
    """generate_assignment, autograde, export and generate_feedback, as a teacher types them."""
    for name in ("solutions", "exercises"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "nbgrader_config.py", tmp_path)
    hand_in(tmp_path / "submitted" / "ada" / "lora", lora=submission())
    hand_in(tmp_path / "submitted" / "bob" / "lora", lora=WRONG)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": path, "HOME": str(tmp_path)}

    def nbgrader(*words: str) -> str:
        command = [sys.executable, "-m", "nbgrader", *words]
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-3000:]
        return run.stdout

    nbgrader("generate_assignment", "lora", "--force")
    made = nbformat.read(tmp_path / "exercises" / "lora" / "lora.ipynb", as_version=4)
    ours = nbformat.read(EXERCISES / "lora" / "lora.ipynb", as_version=4)
    assert [c.source.strip() for c in made.cells] == [c.source.strip() for c in ours.cells]
    nbgrader("autograde", "lora")
    nbgrader("export", "--to", "grades.csv")
    nbgrader("generate_feedback", "lora")
    table = pd.read_csv(tmp_path / "grades.csv").query("assignment == 'lora'").set_index("student_id")
    assert table.score.to_dict() == {"ada": TOTAL, "bob": TOTAL - 1}
    page = (tmp_path / "feedback" / "bob" / "lora" / "lora.html").read_text()
    assert "divide by the rank" in page and "HIDDEN TESTS" not in page and ">grade<" not in page
