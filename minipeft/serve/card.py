"""The card beside an adapter: a README.md that says what the two files hold and how to load them, as on the hub.

---                                            front matter, which the hub and huggingface_hub read
base_model: pocket
library_name: peft
---
# LoRA for pocket …                            a table of what was measured when it was written, and code
<!-- minipeft wrote this card: 5f3a… -->       of the text above: a card that a person has changed is theirs
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import torch

from minipeft.files import OURS

CARD = "README.md"
HIDDEN = ("peft_type", "task_type", "inference_mode", "base_model_name_or_path", "target_modules", "entries")


def card(config: dict, tensors: dict[str, torch.Tensor]) -> str:
    """The text of the card of an adapter with this configuration and these numbers."""
    from huggingface_hub import ModelCardData

    kind, base = config["peft_type"], hub_name(config.get("base_model_name_or_path"))
    ours = kind.startswith(OURS)
    method = kind.removeprefix(OURS)
    front = ModelCardData(
        base_model=base, library_name="minipeft" if ours else "peft", tags=["minipeft", method.lower()]
    ).to_yaml()
    numbers = sum(t.numel() for t in tensors.values())
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    dtypes = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}))
    rows = [("numbers", f"{numbers:,} in {len(tensors)} tensors, {dtypes}, {size:,} bytes")]
    rows += [("where", where) for where in [places(config)] if where]
    rows += [(name, f"`{config[name]}`") for name in sorted(config.keys() - HIDDEN) if shown(config[name])]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    load = f'model, tokenizer = mp.load("{base}")' if base else "model = ...  # the base that it was trained on"
    peft = (
        "PEFT has no such adapter, or computes something else with these numbers; minipeft alone loads it."
        if ours
        else "Or with PEFT, on the same base:\n\n"
        '```python\nfrom peft import PeftModel\ntuned = PeftModel.from_pretrained(model, "path of this folder")\n```'
    )
    text = f"""---
{front}
---

# {method} for {base or "a base of yours"}

An adapter: what fine-tuning changed, without the base.

| setting | value |
|---|---|
{table}

```python
import minipeft as mp
{load}
tuned = mp.load_adapter(model, "path of this folder")
```

{peft}
"""
    return text + mark(text)


def hub_name(name: str | None) -> str | None:
    """The name, unless it is a folder of this machine, which is nobody else's business."""
    fits = name and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) and not Path(name).exists()
    return name if fits else None


def places(config: dict) -> str:
    """The names of the modules that the adapter sits on, each once: "q_proj, v_proj in 8 places"."""
    paths = config.get("target_modules") or config.get("entries") or []
    paths = re.sub(r"\\(.)", r"\1", paths).split("|") if isinstance(paths, str) else paths
    names = sorted({path.rpartition(".")[2] for path in paths})
    return f"{', '.join(f'`{name}`' for name in names)} in {len(paths)} places" if paths else ""


def shown(value: object) -> bool:
    """Whether a setting says anything, in the space of a table's cell."""
    return value not in (None, {}, [], "") and len(str(value)) <= 80 and "|" not in str(value)


def mark(text: str) -> str:
    return f"<!-- minipeft wrote this card: {hashlib.sha256(text.encode()).hexdigest()[:16]} -->\n"


def is_ours(path: Path) -> bool:
    """Whether there is no card at `path` yet, or one that is as minipeft wrote it."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False
    head, last = text[: text.rstrip("\n").rfind("\n") + 1], text[text.rstrip("\n").rfind("\n") + 1 :]
    return last == mark(head)
