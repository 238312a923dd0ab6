"""What one student hands in neither stops nor harms the others: names, formats, forged replies, a full disk."""

import codecs
import concurrent.futures
import errno
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from stub import ASSIGNMENT, EXERCISES, cheap, notebook, worth

from minipeft.course import grade as grading
from minipeft.course import submission
from minipeft.course.assignments import ROOT
from minipeft.course.exercises import exercises
from minipeft.course.grade import grade
from minipeft.course.handed_in import discover
from minipeft.course.sandbox import Limits

pytest.importorskip("nbgrader", reason="the classroom extra is not installed")


# 500 submissions -----------------------------------------------------------------------------------------------------
def older(made) -> str:
    """The notebook in nbformat 3."""
    return nbformat.writes(nbformat.convert(made, 3), version=3)


def reversed_order(made) -> str:
    made.cells.reverse()
    return nbformat.writes(made)


HONEST = {  # {what a program makes of the file that is handed in: the same in bytes}
    "as it is": lambda made: nbformat.writes(made).encode(),
    "with a byte order mark": lambda made: codecs.BOM_UTF8 + nbformat.writes(made).encode(),
    "UTF-16": lambda made: nbformat.writes(made).encode("utf-16"),
    "UTF-16 without a mark": lambda made: nbformat.writes(made).encode("utf-16-be"),
    "UTF-32": lambda made: nbformat.writes(made).encode("utf-32"),
    "CRLF": lambda made: nbformat.writes(made).replace("\n", "\r\n").encode(),
    "CRLF inside": lambda made: nbformat.writes(made).replace("\\n", "\\r\\n").encode(),
    "nbformat 3": lambda made: older(made).encode(),
    "one line": lambda made: json.dumps(made, ensure_ascii=False).encode(),
}
BROKEN = {
    "nothing": b"",
    "spaces": b" \n\n",
    "half": nbformat.writes(notebook()).encode()[:3000],
    "a zip": b"PK\x03\x04" + bytes(range(256)),
    "deep": b"[" * 50_000 + b"]" * 50_000,
    "a long list": b'{"cells": [' + b"[]," * 700_000 + b"[]]}",
    "many cells": json.dumps({"cells": [{"cell_type": "raw", "source": ""}] * 2000}).encode(),
    "a number": b"5",
    "cells is a number": b'{"cells": 5}',
    "metadata is a list": b'{"cells": [{"cell_type": "code", "source": "1", "metadata": [1]}]}',
    "source is a list of numbers": b'{"cells": [{"cell_type": "code", "source": [1], "metadata": {}}]}',
    "old and wrong": b'{"worksheets": 5, "nbformat": 3}',
    "an infinite number": b'{"cells": [], "nbformat": 1e999}',
    "bytes": bytes(range(256)),
}
ODD = [
    *(b"=1+1", b"+41", b"@SUM(A1)", b"-x", b"a,b", b'"', b"'", b"[x]", b"*", b"a+b", b"..", b"new\nline", b"tab\t"),
    *(b"caf\xe9", b"\xff\xfe", b"x" * 220, "ж".encode() * 100, b"C:", b"~", b"$HOME", b"%s", b"lora", b"<script>"),
    *("ana\u0308".encode(), "\u202egpj".encode(), b" ", b"a.", b"{text}", b"\\"),
]
TEXT = st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=30)
NAMES = st.one_of(TEXT.map(lambda text: text.encode("utf-8", "replace")), st.sampled_from(ODD))
ENDINGS = st.sampled_from(
    [b".ipynb", b".IPYNB", b".ipynb.txt", b".ipynb.json", b"/a.ipynb", b"/quantisation/a b.ipynb"]
)
SETTINGS = settings(
    deadline=None, max_examples=25, phases=[Phase.generate], suppress_health_check=list(HealthCheck), print_blob=True
)

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3) | st.tuples(inner)
    ),
    max_leaves=6,
)
LONG = "\ud800\x00" + "y" * 10**6
OUTPUT = st.fixed_dictionaries(
    {
        "output_type": st.sampled_from(["stream", "error", "display_data", "x"]) | plain,
        "name": st.just("stdout") | plain,
        "text": st.just("LONG") | plain,
        "ename": st.text(st.characters()) | plain,
        "evalue": st.just("LONG") | plain,
        "traceback": st.lists(st.text(st.characters())) | plain,
        "data": st.fixed_dictionaries({"image/png": st.sampled_from(["iVBORw0KGgo=", 'x" onload="', "LONG"])}) | plain,
    }
)
GOT = st.fixed_dictionaries({"value": plain}) | st.fixed_dictionaries({"raised": st.lists(plain)}) | plain
REPLY = st.fixed_dictionaries(
    {"outputs": st.lists(OUTPUT, max_size=2) | plain, "got": GOT, "after": st.tuples(plain, plain)}
)
HONESTLY = st.tuples(NAMES, ENDINGS, st.sampled_from(list(HONEST)), st.sets(st.sampled_from(EXERCISES)))


def made_long(tree):
    """The reply with LONG in its places."""
    if isinstance(tree, dict):
        return {key: made_long(value) for key, value in tree.items()}
    return [made_long(each) for each in tree] if isinstance(tree, list) else LONG if tree == "LONG" else tree


@SETTINGS
@given(
    st.lists(HONESTLY, min_size=10, max_size=10),
    st.lists(st.tuples(NAMES, st.sampled_from(list(BROKEN))), min_size=5, max_size=5),
    st.lists(REPLY | plain, min_size=5, max_size=5),
)
def test_five_hundred_submissions(honest, broken, forged):
    """Twenty at a time: every honest score is right, and every student has a row."""
    scores = {}
    with tempfile.TemporaryDirectory() as folder:
        place = os.fsencode(folder) + b"/in"
        os.mkdir(place)
        for i, (name, ending, saved, wrong) in enumerate(honest):
            put(place, name + b"_%d" % i + ending, HONEST[saved](notebook(wrong)))
            scores[i] = worth(wrong)
        for i, (name, what) in enumerate(broken, len(scores)):
            put(place, name + b"_%d.ipynb" % i, BROKEN[what])
            scores[i] = 0
        for i, _ in enumerate(forged, len(scores)):
            put(place, b"forger_%d.ipynb" % i, nbformat.writes(notebook(forged=f"r{i}")).encode())
        replies = {f"r{i}": made_long(reply) for i, reply in enumerate(forged, len(scores))}
        with cheap(replies):
            table = grade(Path(folder, "in"), Path(folder, "out"), ASSIGNMENT, progress=False)
        written = pd.read_csv(Path(folder, "out", "grades.csv"))
        sizes = sum(path.stat().st_size for path in Path(folder, "out").rglob("*.json"))
    found = dict(zip((int(re.search(r"_(\d+)$", name)[1]) for name in table.student), table.score, strict=True))
    assert sorted(found) == list(range(20)) and {i: found[i] for i in scores} == scores
    assert written.score.tolist() == table.score.tolist() and sizes < 20 * 2**20
    assert not any(
        str(cell).startswith(("=", "+", "-", "@")) for cell in written[["student", "lost", "remarks"]].values.flat
    )


def put(folder: bytes, name: bytes, data: bytes) -> None:
    path = os.path.join(folder, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "xb") as file:
        file.write(data)


# What was handed in --------------------------------------------------------------------------------------------------
def hand_in(folder: Path, *names: str, made=None) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(nbformat.writes(made or notebook()), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["dora.IPYNB"], "It was handed in as dora.IPYNB."),
        (["dora.ipynb.txt"], "It was handed in as dora.ipynb.txt."),
        (["dora.ipynb.json"], "It was handed in as dora.ipynb.json."),
        (["dora.txt"], "It was handed in as dora.txt."),
        (["dora.ipynb", "dora/quantisation.ipynb"], "dora/quantisation.ipynb was graded, and not dora.ipynb."),
        (["dora/a.ipynb", "dora/b (1).ipynb"], "dora/a.ipynb was graded, and not dora/b (1).ipynb."),
        (["dora/quantisation/x.ipynb", "dora/.ipynb_checkpoints/x-checkpoint.ipynb"], ""),
        (["dora/lora.ipynb", "dora/quantisation.ipynb"], ""),
    ],
)
def test_whatever_it_is_called_it_is_graded_and_the_row_says_what_was_done(tmp_path, names, said):
    (one,) = discover(hand_in(tmp_path, *names), ASSIGNMENT)
    assert (one.student, one.remark) == ("dora", said) and one.path is not None


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: p.joinpath("dora.ipynb.zip").write_bytes(b"PK\3\4"), "dora.ipynb.zip is a ZIP archive"),
        (lambda p: p.joinpath("dora.tar.gz").write_bytes(b"\x1f\x8b\0"), "dora.tar.gz is a gzip archive"),
        (lambda p: p.joinpath("dora.pdf").write_bytes(b"%PDF-1.7"), "dora.pdf is a PDF"),
        (lambda p: p.joinpath("dora.ipynb").symlink_to("/etc/hosts"), "dora.ipynb is a link"),
        (lambda p: os.mkfifo(p / "dora.ipynb"), "dora.ipynb is no plain file"),
        (lambda p: p.joinpath("dora").symlink_to("/etc"), "dora is a link"),
        (lambda p: p.joinpath("dora").mkdir(), ""),
        (lambda p: hand_in(p, "dora/lora.ipynb"), ""),
    ],
)
def test_nobody_disappears_who_handed_in_something_else(tmp_path, make, said):
    make(tmp_path)
    (one,) = discover(tmp_path, ASSIGNMENT)
    assert one.student == "dora" and one.path is None and one.problem.startswith("No notebook") and said in one.remark


def test_a_notebook_that_does_not_say_which_assignment_it_is_is_known_by_its_cells(tmp_path):
    hand_in(tmp_path, "ada.ipynb")
    hand_in(tmp_path, "bob.ipynb", made=nbformat.v4.new_notebook())
    ada, bob = discover(tmp_path)
    assert ada.assignment == ASSIGNMENT and bob.assignment == "" and "does not say which assignment" in bob.problem
    with cheap():
        table = grade(tmp_path, tmp_path.parent / "out", progress=False).set_index("student")
    assert table.score["ada"] == worth() and "does not say" in table.remarks["bob"]


def test_a_file_that_is_too_large_is_said(tmp_path):
    with open(tmp_path / "ada.ipynb", "wb") as file:
        file.truncate(30 * 2**20)
    with cheap():
        table = grade(tmp_path, tmp_path.parent / "out", ASSIGNMENT, progress=False)
    assert table.score[0] == 0 and "30 MiB, and no more than 20 are read" in table.remarks[0]


def test_a_reversed_notebook_is_named(tmp_path):
    made = notebook()
    made.cells.reverse()
    with cheap():
        table = grade(hand_in(tmp_path / "in", "ada.ipynb", made=made), tmp_path / "out", ASSIGNMENT, progress=False)
    assert "another order" in table.remarks[0]


# Again ---------------------------------------------------------------------------------------------------------------
def test_new_checks_and_new_limits_give_new_reports_and_a_new_outside_does_not(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(grading, "report", lambda *args: calls.append(args) or submission.report(*args))
    folder = hand_in(tmp_path / "in", "ada.ipynb")
    known = exercises()[ASSIGNMENT]

    def again(**options) -> int:
        before = len(calls)
        grade(folder, tmp_path / "out", ASSIGNMENT, progress=False, **options)
        return len(calls) - before

    with cheap():
        assert [again(), again(), again(limits=Limits(seconds=80)), again()] == [1, 0, 1, 1]
        made = notebook()
        made.cells[0].metadata["collapsed"] = True
        path = folder / "ada.ipynb"
        path.write_bytes(nbformat.writes(made).replace("\n", "\r\n").encode("utf-16"))
        assert again() == 0
        monkeypatch.setitem(known, EXERCISES[0], replace(known[EXERCISES[0]], cases=lambda rng: iter(())))
        assert again() == 1
        submission.checks.cache_clear()
        monkeypatch.setattr(submission, "checks", lambda: "a file was mended")
        assert again() == 1


def test_only_the_student_who_handed_in_again_is_graded_again(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(grading, "report", lambda *args: calls.append(args) or submission.report(*args))
    folder = hand_in(tmp_path / "in", "ada.ipynb", "bob.ipynb", made=notebook({EXERCISES[0]}))
    with cheap():
        grade(folder, tmp_path / "out", ASSIGNMENT, progress=False)
        hand_in(folder, "bob.ipynb")
        table = grade(folder, tmp_path / "out", ASSIGNMENT, progress=False)
    assert len(calls) == 3 and table.score.tolist() == [worth({EXERCISES[0]}), worth()]


def test_an_executor_that_fails_costs_no_grade(tmp_path):
    class Broken(concurrent.futures.Executor):
        def submit(self, function, /, *args, **kwargs):
            future = concurrent.futures.Future()
            future.set_exception(concurrent.futures.BrokenExecutor("gone"))
            return future

    with cheap():
        table = grade(hand_in(tmp_path / "in", "ada.ipynb"), tmp_path / "out", ASSIGNMENT, Broken(), progress=False)
    assert table.score[0] == worth()


def test_a_file_on_which_the_grader_itself_fails_costs_no_other_a_grade(tmp_path, monkeypatch):
    def failing(text, *args):
        if text.count("RuntimeError"):
            raise RuntimeError("a fault of ours")
        return submission.report(text, *args)

    made = notebook()
    made.cells.append(nbformat.v4.new_markdown_cell("RuntimeError"))
    folder = hand_in(hand_in(tmp_path / "in", "ada.ipynb", made=made), "bob.ipynb")
    monkeypatch.setattr(grading, "report", failing)
    with cheap():
        table = grade(folder, tmp_path / "out", ASSIGNMENT, progress=False)
    assert table.score.tolist() == [0, worth()] and "a fault of ours): look at it by hand" in table.remarks[0]


def test_two_runs_on_one_out_the_second_says_so(tmp_path):
    folder = hand_in(tmp_path / "in", "ada.ipynb")
    with grading.alone_in(tmp_path / "out"):
        with pytest.raises(ValueError, match="Another run is grading into .*wait for it"):
            grade(folder, tmp_path / "out", ASSIGNMENT, progress=False)
    with cheap():
        assert grade(folder, tmp_path / "out", ASSIGNMENT, progress=False).score[0] == worth()


# The command ---------------------------------------------------------------------------------------------------------
def command(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["grade", *words])
    return grading.main()


def test_without_bubblewrap_it_asks_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(grading, "bubblewrap", lambda: None)
    folder = hand_in(tmp_path / "in", "ada.ipynb")
    words = [str(folder), "--out", str(tmp_path / "out"), "--assignment", ASSIGNMENT]
    assert command(monkeypatch, *words) == 2 and not (tmp_path / "out").exists()
    assert "--unsandboxed" in capsys.readouterr().err
    with cheap():
        assert command(monkeypatch, *words, "--unsandboxed") == 0


def test_a_full_disk_is_one_sentence_and_the_next_run_goes_on(tmp_path, monkeypatch, capsys):
    folder = hand_in(tmp_path / "in", *(f"s{i}.ipynb" for i in range(4)))
    words = [str(folder), "--out", str(tmp_path / "out"), "--assignment", ASSIGNMENT, "--unsandboxed"]
    whole, left = grading.write_whole, iter(range(2))

    def full(path, data):
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        whole(path, data)

    with cheap():
        monkeypatch.setattr(grading, "write_whole", full)
        assert command(monkeypatch, *words) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("No space left on device") and said.endswith("the same command goes on.")
        monkeypatch.setattr(grading, "write_whole", whole)
        made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "reports").rglob("*.json")}
        assert command(monkeypatch, *words) == 0
    assert len(made) == 2 and all(path.stat().st_mtime_ns == stamp for path, stamp in made.items())
    assert len(pd.read_csv(tmp_path / "out" / "grades.csv")) == 4


def test_ctrl_c_stops_within_seconds_with_one_sentence(tmp_path):
    made = notebook()
    made.cells.insert(1, nbformat.v4.new_code_cell("import time\ntime.sleep(60)"))
    folder = hand_in(tmp_path / "in", "ada.ipynb", "bob.ipynb", made=made)
    words = [str(folder), "--out", str(tmp_path / "out"), "--assignment", ASSIGNMENT, "--unsandboxed"]
    run = subprocess.Popen(
        [sys.executable, "-m", "minipeft.course.grade", *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    while not (tmp_path / "out" / "recorded" / f"{ASSIGNMENT}.txt").is_file() and run.poll() is None:
        time.sleep(0.1)
    time.sleep(1)
    started = time.monotonic()
    run.send_signal(signal.SIGINT)
    said = run.communicate(timeout=60)[1].strip().splitlines()
    assert run.returncode == 130 and said[-1].startswith("Stopped.") and time.monotonic() - started < 15
    assert "Traceback" not in "".join(said)
