"""What changed between two checkpoints, tensor by tensor: ‖B − A‖ / ‖A‖.

python -m minipeft diff runs/step-100 runs/step-200
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import NamedTuple

from minipeft.serve.checkpoint import WEIGHTS, current

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Change(NamedTuple):
    """One tensor: its shape in each checkpoint, None where it is in one alone, and ‖B − A‖ / ‖A‖ where both have it in
    one shape: 0 where nothing changed, ∞ where A is 0, NaN where a number is."""

    a: tuple[int, ...] | None
    b: tuple[int, ...] | None
    relative: float | None


def difference(a: str | os.PathLike, b: str | os.PathLike) -> dict[str, Change]:
    """{name of a tensor: its change} between the checkpoints at `a` and `b`, one tensor in memory at a time.

    Each is a folder with an adapter or with a model in safetensors, in one file or several, or one safetensors file.
    Raises ValueError where there is no such file, or one that is damaged.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        files = [tensors_of(Path(each)) for each in (a, b)]
        found = {}
        for name in sorted(files[0].keys() | files[1].keys()):
            both = []
            for file in files:
                if name in file:
                    with safe_open(file[name], "pt") as opened:
                        both.append(opened.get_tensor(name))
                else:
                    both.append(None)
            old, new = both
            relative = None
            if old is not None and new is not None and old.shape == new.shape:
                wide = torch.complex128 if old.is_complex() else torch.float64
                size, moved = (t.norm().item() for t in (old.to(wide), new.to(wide) - old.to(wide)))
                relative = moved / size if size else math.inf if moved else moved
            found[name] = Change(*(None if t is None else tuple(t.shape) for t in both), relative)
        return found
    except SafetensorError as error:
        raise ValueError(f"One of the two is no safetensors file ({error}); save it again.") from error


def tensors_of(path: Path) -> dict[str, Path]:
    """{name of a tensor: the file that it is in}."""
    from safetensors import safe_open

    if path.is_file():
        files = [path]
    elif (path / INDEX).is_file():
        files = sorted({path / name for name in json.loads((path / INDEX).read_text())["weight_map"].values()})
    else:
        files = [file for file in (current(path, WEIGHTS), path / WHOLE) if file.is_file()][:1]
    if not files:
        raise ValueError(f"{str(path)!r} holds no checkpoint: there is no {WEIGHTS}, no {WHOLE} and no {INDEX}.")
    found = {}
    for file in files:
        if not file.is_file():
            raise ValueError(f"{str(path)!r} lacks {file.name}, one of its files; copy it again.")
        with safe_open(file, "pt") as opened:
            found |= dict.fromkeys(opened.keys(), file)
    return found


def table(changes: dict[str, Change]) -> str:
    """What `difference` found, the largest change first, and how many tensors are the same."""

    lines = []
    for name, (a, b, relative) in sorted(changes.items(), key=lambda item: -(item[1].relative or 0)):
        if relative is None:
            where = "only in A" if b is None else "only in B" if a is None else f"shape {a} became {b}"
            lines.append(f"{where:>12}  {name}")
        elif relative != 0:
            lines.append(f"{relative:>12.3e}  {name}  {'×'.join(map(str, a))}")
    same = sum(change.relative == 0 for change in changes.values())
    return "\n".join([*lines, f"{same} of {len(changes)} tensors are the same"])
