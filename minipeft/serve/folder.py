"""A folder of adapters that is watched: what is put there is served, what changes is exchanged, what goes is forgotten.

folder/pirate/adapter_config.json, adapter_model.safetensors     is served as "pirate"
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from minipeft.serve.checkpoint import CONFIG, WEIGHTS

log = logging.getLogger(__name__)
Print = tuple[tuple[int, int, int], ...]  # (inode, size, time of the last change) of both files


def print_of(path: Path) -> Print | None:
    """What changes when either file of the adapter in `path` does; None where one is missing."""
    try:
        stats = [(path / file).stat() for file in (CONFIG, WEIGHTS)]
    except OSError:
        return None
    return tuple((s.st_ino, s.st_size, s.st_mtime_ns) for s in stats)


class Folder:
    """Keeps what `engine` serves equal to what lies in the folder at `path`.

    `refused` says of each adapter that is not served, or not in its newest form, why: {name: reason}.
    """

    def __init__(self, engine, path: str | Path, reserved: str = ""):
        self.engine, self.path, self.reserved = engine, Path(path), reserved
        if not self.path.is_dir():
            raise ValueError(f"{str(path)!r} is no folder; give one that holds a folder for each adapter.")
        self.refused: dict[str, str] = {}
        self._seen: dict[str, Print] = {}  # at the last look
        self._tried: dict[str, Print] = {}  # loaded, or refused
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def look(self, settled: bool = True) -> None:
        """Loads what is new or has changed and forgets what is gone. `settled`: only files that are as they were at
        the last look, so that nothing is read while it is being copied there."""
        there = {each.name: mark for each in sorted(self.path.iterdir()) if (mark := print_of(each)) is not None}
        for name in self._tried.keys() - there.keys():
            del self._tried[name]
            self.refused.pop(name, None)
            self.engine.drop(name)
        for name, mark in there.items():
            if name.startswith(".") or self._tried.get(name) == mark or (settled and self._seen.get(name) != mark):
                continue
            self.refused.pop(name, None)
            try:
                if name == self.reserved:
                    raise ValueError(f"{name!r} is the name of the base.")
                self.engine.swap(name, self.path / name)
            except (ValueError, OSError) as error:
                self.refused[name] = str(error)
                log.warning("%s is not served: %s", name, error)
            if print_of(self.path / name) == mark:  # else it changed while it was read, and is read again
                self._tried[name] = mark
        self._seen = there

    def watch(self, seconds: float = 1.0) -> Folder:
        """Looks again and again, in a thread of its own, until `close`."""

        def run() -> None:
            while not self._stop.wait(seconds):
                try:
                    self.look()
                except Exception:  # the folder may be unreadable for a moment; what is loaded stays
                    log.exception("The folder %s could not be read.", self.path)

        self._thread = threading.Thread(target=run, name="minipeft-folder", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
