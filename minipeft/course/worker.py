"""The process that runs a submission: `python -m minipeft.course.worker READ WRITE`, two file descriptors.

It does what it is told by messages (see `wire`): run a cell, or call what the cells defined. It knows no answers, so
there is nothing in it to read; and whatever it replies is checked elsewhere.
"""

from __future__ import annotations

import os
import signal
import sys
import types

from minipeft.course import pristine, wire

TEXT = 20_000  # characters that are kept of one output
PICTURES = 2 * 2**20  # and of all pictures of a cell


def restrict(memory: int, disk: int, processes: int, seconds: int) -> None:
    """Limits that the kernel keeps for this process and its children; nothing in here can raise them again."""
    import resource

    wanted = {"AS": memory, "FSIZE": disk, "NPROC": processes, "CORE": 0, "NOFILE": 256, "CPU": seconds}
    for name, value in wanted.items():
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is None:
            continue
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(kind, (value, value))
        except (ValueError, OSError):  # macOS refuses some; the grader watches memory and processes as well
            continue


class Silent(types.ModuleType):
    """Stands in for `minipeft.course.check`: a submission may call it, and it says nothing."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


def out_of_time(signum, frame):
    raise TimeoutError("it took too long")


class Worker:
    def __init__(self, seconds: float):
        from IPython.core.interactiveshell import InteractiveShell

        self.seconds = seconds
        self.watch = pristine.Watch(type(self))
        self.shell = InteractiveShell.instance(colors="nocolor" if _new_ipython() else "NoColor")
        self.shell.history_manager.enabled = False

    def cell(self, source: str) -> dict:
        """Runs a cell; its outputs in nbformat's form, text and pictures only."""
        from IPython.utils.capture import capture_output

        with capture_output() as captured:
            result = self.shell.run_cell(source)
        error = result.error_before_exec or result.error_in_exec
        outputs, room = [], PICTURES
        streams = {"stdout": "" if error else captured.stdout, "stderr": captured.stderr}
        for name, text in streams.items():
            if text:
                outputs.append({"output_type": "stream", "name": name, "text": cut(text)})
        for rich in captured.outputs[:20]:
            text, picture = rich.data.get("text/plain"), rich.data.get("image/png")
            data = {"text/plain": cut(text)} if isinstance(text, str) else {}
            picture = base64(picture) if isinstance(picture, bytes) else picture
            if isinstance(picture, str) and len(picture) <= room:
                room -= len(picture)
                data["image/png"] = picture
            if data:
                outputs.append({"output_type": "display_data", "metadata": {}, "data": data})
        if error:
            printed = [cut(captured.stdout)] if captured.stdout else []
            kind = type(error).__name__
            outputs.append({"output_type": "error", "ename": kind, "evalue": said(error), "traceback": printed})
        return {"outputs": outputs}

    def call(self, objects: list, drive: str, args: tuple) -> dict:
        from minipeft.course.drives import perform
        from minipeft.course.verdict import Raised

        missing = [name for name in objects if name not in self.shell.user_ns]
        if missing:
            got, after = Raised(("NotImplementedError",), missing[0]), args
        else:
            got, after = perform(drive, tuple(self.shell.user_ns[name] for name in objects), args)
        return {"got": as_data(got), "after": after}

    def state(self, whole: bool) -> dict:
        """What the functions that measure are made of (see `pristine`): a number for all, or each by name."""
        return {"state": self.watch.state() if whole else self.watch.number()}

    def serve(self, read: int, write: int) -> None:
        signal.signal(signal.SIGALRM, out_of_time)
        while True:
            message = wire.receive(read)
            number = message.pop("number")
            signal.setitimer(signal.ITIMER_REAL, self.seconds)
            try:
                try:
                    reply = wire.encode(getattr(self, message.pop("do"))(**message) | {"number": number})
                except TypeError as error:
                    reply = failed("TypeError", f"it returned {said(error)}, which a grader cannot look at", number)
                except BaseException as error:
                    reply = failed(type(error).__name__, said(error), number)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            wire.write(write, reply)


def as_data(got):
    from minipeft.course.verdict import Raised

    return {"raised": [list(got.kinds), got.text, got.where]} if isinstance(got, Raised) else {"value": got}


def failed(kind: str, text: str, number: str) -> bytes:
    error = {"output_type": "error", "ename": kind, "evalue": text, "traceback": [f"{kind}: {text}"]}
    reply = {"got": {"raised": [[kind], text, ""]}, "after": (), "outputs": [error], "number": number}
    return wire.encode(reply)


def said(error: BaseException) -> str:
    """The text of a stranger's exception, which may itself raise one."""
    try:
        return cut(str(error))
    except Exception:
        return "(its text cannot be shown)"


def cut(text: str) -> str:
    return text if len(text) <= TEXT else f"{text[:TEXT]}\n… ({len(text) - TEXT:,} characters more)"


def base64(data: bytes) -> str:
    import base64

    return base64.b64encode(data).decode()


def _new_ipython() -> bool:
    import IPython

    return IPython.version_info[0] >= 9


def main(arguments: list[str]) -> None:
    read, write, memory, disk, processes, seconds, each = (int(a) for a in arguments)
    restrict(memory, disk, processes, seconds)
    for fd in (read, write):
        os.set_inheritable(fd, False)
    os.register_at_fork(after_in_child=lambda: [os.close(fd) for fd in (read, write)])  # a child has no say here
    import torch

    import minipeft.course

    torch.set_num_threads(1)
    silent = Silent("minipeft.course.check")
    sys.modules["minipeft.course.check"] = minipeft.course.check = silent
    worker = Worker(each)
    wire.send(write, {"ready": True})
    try:
        worker.serve(read, write)
    except wire.Broken:
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
