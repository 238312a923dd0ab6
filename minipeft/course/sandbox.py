"""A process for a stranger's code: what it may use up, what it can see, and how it is ended.

Limits that any system keeps are set inside (`worker.restrict`) and watched from outside. With bubblewrap on the machine
(`apt install bubblewrap`) the process also gets namespaces of its own: no network, no other process, an empty home on a
disk in memory, and of the files only Python, the course's package without its answers, and the system's libraries.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from minipeft.course import wire

PACKAGE = Path(__file__).resolve().parents[1]
ANSWERS = PACKAGE / "course" / "exercises"
HOME = "/submission"  # inside bubblewrap; nothing of the grader's can lie below it, as it could below /tmp


@dataclass(frozen=True)
class Limits:
    """`seconds` for a whole submission and `each` for one cell or call; `memory` and `disk` in bytes; `processes`."""

    seconds: int = 90
    each: int = 10
    memory: int = 3 * 2**30
    disk: int = 64 * 2**20
    processes: int = 64


LIMITS = Limits()


class Killed(Exception):
    """The process ended, or was ended; the text says why."""


class CannotStart(RuntimeError):
    """The process does not even start, before it has seen a submission: the machine's fault, and no student's."""


@functools.cache
def bubblewrap() -> str | None:
    """The path of a bubblewrap that works here, or None."""
    program = shutil.which("bwrap")
    if program is None:
        return None
    try:
        probe = [program, "--unshare-all", "--ro-bind", "/", "/", "--size", "4096", "--tmpfs", "/tmp", "true"]
        return program if subprocess.run(probe, capture_output=True, timeout=20).returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired):
        return None


def isolation(limits: Limits = LIMITS) -> dict[str, str]:
    """What is in force here, in words."""
    linux, apart = sys.platform.startswith("linux"), bubblewrap() is not None
    root = os.geteuid() == 0
    without = "NO: install bubblewrap (Linux), or grade in a container without network"
    return {
        "time": f"{limits.each} s a cell or call, {limits.seconds} s a submission; then killed",
        "memory": f"{limits.memory / 2**30:.1f} GiB, "
        + ("kept by the kernel and watched" if linux else "watched every 0.05 s"),
        "processes": f"{limits.processes}, watched every 0.05 s"
        + ("" if root else ", and kept by the kernel")
        + (", all ended together" if apart else "; one that leaves its session may survive"),
        "one file": f"{limits.disk >> 20} MiB, kept by the kernel",
        "disk": f"{limits.disk >> 20} MiB of its own, nothing else can be written" if apart else without,
        "files": "Python and the package without answers, read only; an empty home" if apart else without,
        "network": "none" if apart else without,
    }


class Stopped(RuntimeError):
    """Somebody asked the grader to stop."""


class Sandbox:
    """`with Sandbox() as box: box.ask(do="cell", source="1 + 1")`. Raises Killed when the process ends or must end, and
    Stopped when `stop` is set."""

    def __init__(self, limits: Limits = LIMITS, stop: threading.Event | None = None):
        self.limits = limits
        self.stop = stop
        self.peak = 0
        self.started = time.monotonic()

    def __enter__(self) -> Sandbox:
        self.home = tempfile.mkdtemp(prefix="submission-")
        to_read, self.write = os.pipe()
        self.read, to_write = os.pipe()
        limits = self.limits
        numbers = (to_read, to_write, limits.memory, limits.disk, limits.processes, limits.seconds, limits.each)
        command = [sys.executable, "-m", "minipeft.course.worker", *map(str, numbers)]
        apart = bubblewrap() is not None
        home = HOME if apart else self.home
        environment = {
            "HOME": home,
            "TMPDIR": home,
            "IPYTHONDIR": home + "/ipython",
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(PACKAGE.parent),
            "PYTHONDONTWRITEBYTECODE": "1",
            "MPLBACKEND": "Agg",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "LANG": "C.UTF-8",
        }
        self.process = subprocess.Popen(
            [*walls(), *command] if apart else command,
            env=environment,
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(to_read, to_write),
            start_new_session=True,
        )
        os.close(to_read)
        os.close(to_write)
        self.watched = psutil.Process(self.process.pid)
        self.looked = 0.0
        try:
            if self._exchange(None, 60) != {"ready": True}:
                raise Killed("it did not start")
        except Killed as killed:
            self.__exit__()
            raise CannotStart(
                f"The process that runs submissions does not start ({killed}); is disk or memory full, and "
                "does .venv/bin/python -m minipeft doctor find all? Nobody lost a point: run the same command again."
            ) from killed
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error) -> None:
        family = []
        with contextlib.suppress(psutil.Error):
            family = descendants(self.watched)
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for child in family:
            with contextlib.suppress(psutil.Error):
                child.kill()
        self.process.wait()
        os.close(self.write)
        os.close(self.read)
        shutil.rmtree(self.home, ignore_errors=True)

    def ask(self, **message):
        """Sends a message and waits for the reply, which must bear the message's number: none can be sent ahead."""
        left = self.limits.seconds - (time.monotonic() - self.started)
        if left <= 0:
            raise Killed(f"the submission took longer than {self.limits.seconds} s")
        number = secrets.token_hex(8)
        reply = self._exchange(message | {"number": number}, min(self.limits.each + 3, left))
        if not isinstance(reply, dict) or reply.pop("number", None) != number:
            raise Killed("it sent a malformed reply")
        return reply

    def _exchange(self, message: dict | None, seconds: float):
        try:
            if message is not None:
                wire.send(self.write, message, seconds, self._watch)
            return wire.receive(self.read, seconds, self._watch)
        except TimeoutError as error:
            if time.monotonic() - self.started >= self.limits.seconds:
                raise Killed(f"the submission took longer than {self.limits.seconds} s") from error
            raise Killed("it took too long and did not let itself be interrupted") from error
        except wire.Broken as error:
            raise Killed(str(error)) from error

    def _watch(self) -> None:
        if time.monotonic() - self.looked < 0.05:
            return
        self.looked = time.monotonic()
        if self.stop is not None and self.stop.is_set():
            raise Stopped("The grader was stopped.")
        family, used = [self.watched], 0
        with contextlib.suppress(psutil.Error):
            family += descendants(self.watched)
        for process in family[: 2 * self.limits.processes]:
            with contextlib.suppress(psutil.Error):
                used += process.memory_info().rss
        self.peak = max(self.peak, used)
        if len(family) > self.limits.processes:
            raise Killed(f"it started more than {self.limits.processes} processes")
        if used > self.limits.memory:
            raise Killed(f"it used more than {self.limits.memory / 2**30:.1f} GiB of memory")
        if bubblewrap() is None and folder_size(self.home) > self.limits.disk:
            raise Killed(f"it wrote more than {self.limits.disk >> 20} MiB")


def descendants(process: psutil.Process) -> list[psutil.Process]:
    """All that came of a process. Linux keeps a list of them; psutil looks through every process of the machine."""
    if not os.path.exists("/proc/thread-self/children"):
        return process.children(recursive=True)
    found, todo = [], [process.pid]
    for pid in todo:  # which grows
        for path in glob.glob(f"/proc/{pid}/task/*/children"):
            with contextlib.suppress(OSError):
                todo += map(int, Path(path).read_text().split())
    for pid in todo[1:]:
        with contextlib.suppress(psutil.Error):
            found.append(psutil.Process(pid))
    return found


def folder_size(path: str) -> int:
    total = 0
    for folder, _, files in os.walk(path):
        for file in files:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(folder, file)).st_size
    return total


@functools.cache
def walls() -> tuple[str, ...]:
    """bubblewrap's arguments: what the process sees, all of it read only but its home."""
    seen = [
        "/usr",
        "/bin",
        "/lib",
        "/lib64",
        "/lib32",
        "/sbin",
        "/etc/ld.so.cache",
        "/etc/ld.so.conf",
        "/etc/ld.so.conf.d",
    ]
    seen += [sys.base_prefix, sys.prefix, str(PACKAGE)]
    real = os.path.realpath(sys.executable)
    seen += [] if any(real.startswith(path + "/") for path in seen) else [os.path.dirname(os.path.dirname(real))]
    words = [bubblewrap(), "--unshare-all", "--die-with-parent", "--new-session"]
    for path in dict.fromkeys(seen):
        if os.path.islink(path) and path.count("/") == 1:
            words += ["--symlink", os.readlink(path), path]
        elif os.path.exists(path):
            words += ["--ro-bind", path, path]
    words += ["--tmpfs", str(ANSWERS), "--remount-ro", str(ANSWERS)]
    words += ["--proc", "/proc", "--dev", "/dev"]
    words += ["--size", str(LIMITS.disk), "--tmpfs", HOME, "--chdir", HOME]
    words += ["--remount-ro", "/dev", "--remount-ro", "/"]
    return tuple(words)
