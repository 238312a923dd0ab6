"""How a test runs a program that starts others, and waits for what it does: both end in bounded time, and so does
whatever was started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable


def ended(command: list, seconds: float, **how) -> tuple[int, str]:
    """(status, what it said on both streams). Raises subprocess.TimeoutExpired with what it had said until then.

    The words go into a file: a pipe would be held open by processes that live on when the program is killed.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        streams = {"stdin": subprocess.DEVNULL, "stdout": said, "stderr": subprocess.STDOUT}
        run = subprocess.Popen(command, start_new_session=True, **streams, **how)
        try:
            run.wait(seconds)
        except subprocess.TimeoutExpired as late:
            said.seek(0)
            raise subprocess.TimeoutExpired(late.cmd, seconds, said.read()[-6000:]) from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
            run.wait(10)
        said.seek(0)
        return run.returncode, said.read()


def until(condition: Callable[[], object], what: str, seconds: float = 120, pause: float = 0.01) -> object:
    """What `condition` gives when it is true at last; a hang fails, and says `what` did not happen."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"In {seconds} seconds, {what} did not happen."
        time.sleep(pause)
    return found
