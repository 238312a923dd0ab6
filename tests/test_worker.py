"""The process that trains for the kernel: it answers, stops between any two lines, and ends with whoever started it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from worker_jobs import careless, count, deaf, echo, endless, importing, odd, silent, threads

from minipeft.explore import worker
from minipeft.explore.worker import Elsewhere, Failed, Stopped, Worker


@pytest.fixture(scope="module")
def process():
    started = Worker()
    yield started
    if started.process is not None:
        started.process.kill()


def gone(pid: int) -> bool:
    """Whether this process ends within half a minute."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


def test_jobs_are_answered_one_after_the_other(process):
    first, second = process.submit(count, 3), process.submit(count, 2)
    assert list(second) == [0, 1] and list(first) == [0, 1, 2] and not process.jobs


@pytest.mark.parametrize("kernels, left", [(1, 1), (2, 1)])
def test_a_cell_that_runs_gets_a_core_of_it(monkeypatch, kernels, left):
    monkeypatch.setattr("torch.get_num_threads", lambda: kernels)
    started = Worker()

    def sees(expected: int, answers: Iterator[int]) -> None:
        assert next(each for each in answers if each == expected), "else this waits for ever"

    try:
        for runs, expected in ((True, left), (False, kernels), (True, left)):
            started.cell(runs)
            sees(expected, iter(job := started.submit(threads)))
            job.cancel()
        sees(left, answers := iter(started.submit(threads)))
        started.cell(False)  # in the middle of a job
        sees(kernels, answers)
    finally:
        started.process.kill()


def test_a_cancelled_job_wakes_whoever_waits_and_makes_way(process):
    job = process.submit(silent)
    answers = iter(job)
    next(answers)
    waiting = process.submit(count, 1)
    waiting.cancel()  # before it has begun
    job.cancel()
    for each in (answers, iter(waiting)):
        with pytest.raises(Stopped):
            next(each)
    assert list(process.submit(count, 2)) == [0, 1] and not process.jobs


def test_answers_stay_whole_when_jobs_are_cancelled_while_they_are_written(process):
    for _ in range(30):
        job = process.submit(endless)
        next(iter(job))
        job.cancel()
    assert list(process.submit(count, 2)) == [0, 1]


def test_a_job_that_misses_its_interrupt_gets_another(process):
    job = process.submit(deaf)
    next(iter(job))
    job.cancel()
    assert list(process.submit(count, 2)) == [0, 1]


def test_a_process_that_hangs_is_ended_and_that_is_said(process, monkeypatch):
    answers = iter(process.submit(silent))
    os.kill(next(answers), signal.SIGSTOP)
    monkeypatch.setattr(worker, "SILENCE", 0.2)
    with pytest.raises(Failed, match="has ended .status -9.; move a control to start a new one"):
        next(answers)
    monkeypatch.undo()
    assert list(process.submit(count, 2)) == [0, 1]


def test_a_spare_job_gives_way_to_any_other(process):
    spare = iter(process.submit(silent, spare=True))
    next(spare)
    assert list(process.submit(count, 2)) == [0, 1]
    with pytest.raises(Stopped):
        next(spare)


def test_an_error_is_one_sentence_and_the_next_job_runs(process):
    with pytest.raises(Failed, match="^A rank of 0 learns nothing; choose 1 or more.$"):
        list(process.submit(careless))
    with pytest.raises(Failed, match="^ZeroDivisionError: division by zero$"):
        list(process.submit(odd))
    assert list(process.submit(count, 1)) == [0]


def test_what_the_other_process_cannot_have_is_refused(process, monkeypatch):
    import __main__

    with pytest.raises(Elsewhere):
        process.submit(echo, lambda: 1)  # does not pickle
    monkeypatch.setattr(__main__, "Own", type("Own", (), {"__module__": "__main__"}), raising=False)
    with pytest.raises(Elsewhere, match="Own"):
        list(process.submit(echo, __main__.Own()))  # pickles, but the class is the notebook's
    assert list(process.submit(echo, "text")) == ["str"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_the_kernels_interrupt_is_not_for_it_and_its_death_is_said(process):
    answers = iter(process.submit(silent))
    pid = next(answers)
    os.kill(pid, signal.SIGINT)
    time.sleep(0.1)
    assert process.process.poll() is None
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(Failed, match="has ended .status -9.; move a control to start a new one"):
        next(answers)
    assert list(process.submit(count, 2)) == [0, 1] and process.process.pid != pid


def test_a_job_for_a_new_process_is_not_lost_with_the_old_one(process):
    next(iter(process.submit(silent)))
    with process.lock:  # so that the end is heard only after the next job was sent
        process.process.kill()
        process.process.wait()
        job = process.submit(count, 2)
    assert list(job) == [0, 1]


def test_an_import_is_done_before_its_job_is_cancelled(process, tmp_path):
    text = "import builtins, time\nassert not hasattr(builtins, 'once')\nbuiltins.once = True\n"
    (tmp_path / "only_once.py").write_text(text + "for _ in range(300): time.sleep(0.001)\n")
    job = process.submit(importing, str(tmp_path))
    next(iter(job))
    time.sleep(0.1)
    job.cancel()
    assert list(process.submit(importing, str(tmp_path))) == ["begun", "only_once"]


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks at /proc")
@pytest.mark.parametrize("how", ["ends", "is killed"])
def test_it_ends_with_the_kernel_however_that_ends(how):
    """The kernel here is a program that has nothing but this one file, in the middle of a job."""
    program = f"""
import importlib.util, os, signal, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
spec = importlib.util.spec_from_file_location("worker", {worker.__file__!r})
worker = sys.modules["worker"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)
import worker_jobs
job = worker.Worker().submit(worker_jobs.silent)
print(next(iter(job)), flush=True)
if {how == "is killed"}:
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == (-9 if how == "is killed" else 0)
    assert gone(int(done.stdout))
