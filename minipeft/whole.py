"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

HALF = ".half-"  # how a file begins whose writer died; nobody reads it


def write_whole(path: str | os.PathLike, data: bytes | str) -> None:
    """Puts `data` (text as UTF-8) into the file at `path`: whoever reads it, and whenever the process dies, finds the
    old file or the new one, never a part. The folder is made if there is none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, half = tempfile.mkstemp(dir=path.parent, prefix=HALF)  # beside it: a rename across file systems is a copy
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(half, 0o666 & ~_umask())
        os.replace(half, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(half)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
