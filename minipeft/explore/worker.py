"""Training beside the kernel, in one warm process that all explorers share, so that cells and sliders stay free.

    kernel ── number, (function, arguments) ──▶ process      a job: a generator function, pickled
    kernel ◀─ number, kind, what ────────────── process      what it yields, and how it ended
    kernel ── 0, how many cores ──────────────▶ process      all, or one less while a cell runs

The pickles go over the pipes between these two processes and nowhere else. The process ends when its input does, that
is when the kernel ends, however it ends. This file is also the program of that process and imports
little: what a job needs is imported when it comes, and while that lasts the pipe is read.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from _thread import interrupt_main
from collections.abc import Callable, Iterator
from types import FrameType

SILENCE = 600.0  # seconds without a word from the process, after which it is taken for dead
AGAIN = 1.0  # seconds after which a cancelled job that went on is interrupted once more


class Stopped(Exception):
    """The job was cancelled."""


class Elsewhere(Exception):
    """The process cannot have this job, since it does not know a class that the job speaks of."""


class Failed(Exception):
    """The job raised an error, or its process ended; the message is a sentence for the learner."""


def sentence(error: Exception) -> str:
    """What a learner reads of an error: ours are sentences already, the others say what they are."""
    return str(error) if isinstance(error, ValueError | TypeError | Failed) else f"{type(error).__name__}: {error}"


class Packed:
    """An object that is pickled once, and of which each job gets a new copy."""

    def __init__(self, given: object):
        self.blob = pickle.dumps(given)

    def __reduce__(self) -> tuple:
        return pickle.loads, (self.blob,)


# -- in the kernel -----------------------------------------------------------------------------------------------------
class Job:
    """What a job yields, as it comes; raises Stopped after `cancel`, Elsewhere, and Failed."""

    def __init__(self, worker: Worker, number: int):
        self.worker, self.number = worker, number
        self.answers: queue.SimpleQueue[tuple[str, object]] = queue.SimpleQueue()

    def __iter__(self) -> Iterator:
        while True:
            try:
                kind, what = self.answers.get(timeout=SILENCE)
            except queue.Empty:
                self.worker.end_if_silent()
                continue
            if kind == "more":
                yield what
            elif kind == "end":
                return
            else:
                raise {"stopped": Stopped, "unknown": Elsewhere, "error": Failed}[kind](what)

    def cancel(self) -> None:
        """Ends the job, wherever it is; whoever waits for it wakes at once."""
        self.worker.jobs.pop(self.number, None)
        self.answers.put(("stopped", ""))
        self.worker.send(self.number, None)


class Worker:
    """The process, started when it is first wanted, and again when it has died."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None
        self.jobs: dict[int, Job] = {}  # of this process
        self.number, self.spare = 0, None  # of the last job, and a job that gives way to any other
        self.heard = time.monotonic()  # when the process last said something
        self.computing = False  # whether a cell runs: two that count on the same core wait for each other all the time
        self.lock = threading.RLock()

    def start(self) -> None:
        """Starts the process, unless it is there."""
        with self.lock:
            if self.process is not None and self.process.poll() is None:
                return
            import torch  # which a kernel has, and this file as a program does without

            paths = os.pathsep.join(path or os.getcwd() for path in sys.path)  # what the kernel can import
            self.cores = torch.get_num_threads()
            self.process = subprocess.Popen(
                [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": str(self.share())},
            )  # fmt: skip
            self.jobs, self.heard = {}, time.monotonic()
            threading.Thread(target=self._listen, args=(self.process, self.jobs), daemon=True).start()

    def submit(self, function: Callable[..., Iterator], *args, spare: bool = False) -> Job:
        """Has the process run `function(*args)` after what it runs now; a `spare` job ends when another comes.

        Raises Elsewhere where the job does not pickle.
        """
        try:
            body = pickle.dumps((function, args))
        except Exception as error:  # whatever a class of the learner's raises
            raise Elsewhere(str(error)) from error
        with self.lock:
            self.start()
            if self.spare is not None:
                self.spare.cancel()
            self.number += 1
            job = self.jobs[self.number] = Job(self, self.number)
            self.spare = job if spare else None
            self.send(job.number, body)
        return job

    def share(self) -> int:
        """How many cores the process has."""
        return max(1, self.cores - 1) if self.computing else self.cores

    def cell(self, runs: bool) -> None:
        """A cell begins or ends."""
        with self.lock:
            self.computing = runs
            if self.process is not None:
                self.send(0, self.share())

    def send(self, number: int, body: bytes | int | None) -> None:
        with self.lock:
            try:
                pickle.dump((number, body), self.process.stdin)
                self.process.stdin.flush()
            except OSError:
                pass  # the process is dead, as the listener says

    def end_if_silent(self) -> None:
        """Ends a process that hangs; its listener says so to all who wait."""
        if time.monotonic() - self.heard >= SILENCE:
            self.process.kill()

    def _listen(self, process: subprocess.Popen, jobs: dict[int, Job]) -> None:
        try:
            while True:
                number, kind, what = pickle.load(process.stdout)
                self.heard = time.monotonic()
                job = jobs.get(number) if kind == "more" else jobs.pop(number, None)
                if job is not None:
                    job.answers.put((kind, what))
        except Exception:  # it has ended, or said what cannot be read
            process.kill()
            status = process.wait()
        said = f"The process that trains has ended (status {status}); move a control to start a new one."
        with self.lock:
            for job in jobs.values():
                job.answers.put(("error", said))
            jobs.clear()


WORKER = Worker()


# -- in the process ----------------------------------------------------------------------------------------------------
class Cancelled(BaseException):
    """Raised in the job that is cancelled, between any two of its lines but those of an import."""


def importing(frame: FrameType | None) -> bool:
    """Whether this frame, or one that waits for it, imports a module."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


class Server:
    """Runs the jobs from its standard input one after the other, until the input ends."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)  # what a job prints does not get among the answers
        self.jobs: queue.SimpleQueue[tuple[int, bytes]] = queue.SimpleQueue()
        self.cancelled: set[int] = set()
        self.current: int | None = None  # the job that may be interrupted
        self.cores: int | None = None  # if it is to have others than it has
        signal.signal(signal.SIGINT, self.interrupted)  # the kernel's own interrupts are none of ours
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self) -> None:
        while True:
            try:
                number, body = pickle.load(sys.stdin.buffer)
            except Exception:  # the kernel has ended, be it in the middle of a job that it sent
                os._exit(0)
            if number == 0:
                self.cores = body
                interrupt_main()
            elif body is not None:
                self.jobs.put((number, body))
            else:
                self.cancelled.add(number)
                interrupt_main()

    def interrupted(self, _signal: int = 0, frame: FrameType | None = None) -> None:
        if self.cores is not None and "torch" in sys.modules and not importing(frame):
            self.cores, cores = None, self.cores
            sys.modules["torch"].set_num_threads(cores)  # of this thread, in which the jobs run
        if self.current not in self.cancelled:
            return
        if importing(frame):  # later: half a module would stay, which nobody can import again
            self.interrupt_in(0.05)
            return
        self.interrupt_in(AGAIN)  # if this one is lost, as what is raised in a __del__ or a callback is
        raise Cancelled

    def interrupt_in(self, seconds: float) -> None:
        timer = threading.Timer(seconds, interrupt_main)
        timer.daemon = True
        timer.start()

    def answer(self, number: int, kind: str, what: object) -> None:
        blob = pickle.dumps((number, kind, what))
        self.current = None  # an answer is written whole
        self.out.write(blob)
        self.out.flush()
        if kind == "more":
            self.current = number
            self.interrupted()

    def serve(self) -> None:
        while True:
            self.current = None
            number, body = self.jobs.get()
            with contextlib.suppress(Cancelled):
                self.current = number
                self.interrupted()
                self.work(number, body)

    def work(self, number: int, body: bytes) -> None:
        try:
            function, args = pickle.loads(body)
        except Exception as error:
            return self.answer(number, "unknown", str(error))
        try:
            for what in function(*args):
                self.answer(number, "more", what)
        except Exception as error:
            return self.answer(number, "error", sentence(error))
        self.answer(number, "end", "")


if __name__ == "__main__":
    server = Server()
    while True:
        with contextlib.suppress(Cancelled):  # a second one, while the first was on its way out
            server.serve()
