"""What works on which architecture of transformers, tried one by one: `python tests/parity/table.py` writes
`docs/architectures.md`. A cell is "yes", "no" with a reason below, or "wrong", of which there must be none."""

from __future__ import annotations

import inspect
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from architectures import ARCHITECTURES, Architecture  # noqa: E402
from tiny import randomise  # noqa: E402

import minipeft as mp  # noqa: E402
from minipeft.targets import mixtures, read  # noqa: E402

KINDS = {"causal": "decoder", "encoder": "encoder", "pair": "encoder–decoder", "image": "pictures", "sound": "sound"}


class Wrong(Exception):
    """It went through, and did something else."""


class Nothing(Exception):
    """The model has nothing of the kind."""


def outputs(one: Architecture, model, **more) -> torch.Tensor:
    with torch.no_grad():
        return one.hidden(model(**one.batch(**more)))


def same(a: torch.Tensor, b: torch.Tensor, what: str, bound: float = 1e-4) -> None:
    if a.shape != b.shape or (a - b).abs().max() > bound * max(1.0, b.abs().max().item()):
        raise Wrong(f"{what}: the outputs differ")


def moved(one: Architecture, method) -> mp.Tuned:
    """Attached, and away from where it starts."""
    bare = outputs(one, one.model())
    tuned = mp.attach(one.model(), method)
    randomise(tuned)
    if torch.equal(outputs(one, tuned.eval()), bare):
        raise Wrong("no effect")
    return tuned


def attach(one: Architecture) -> None:
    tuned = moved(one, mp.LoRA(2))
    with tuned.disabled():
        same(outputs(one, tuned), outputs(one, one.model()), "disabled", 2e-6)


def file_in(one: Architecture) -> None:
    targets = [layer.path for layer in mp.attach(one.model(), mp.LoRA(2)).layers()]
    torch.manual_seed(0)
    theirs = peft.get_peft_model(one.model(), peft.LoraConfig(r=2, target_modules=targets)).eval()
    with torch.no_grad():
        for parameter in (p for p in theirs.parameters() if p.requires_grad):
            parameter += 0.1 * torch.randn_like(parameter)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        same(outputs(one, mp.load_adapter(one.model(), folder)), outputs(one, theirs), "PEFT's file here")


def file_out(one: Architecture) -> None:
    tuned = moved(one, mp.LoRA(2))
    with tempfile.TemporaryDirectory() as folder:
        tuned.save(folder)
        if "MINIPEFT_" in (Path(folder) / "adapter_config.json").read_text(encoding="utf-8"):
            same(outputs(one, mp.load_adapter(one.model(), folder)), outputs(one, tuned), "our file here")
            raise ValueError("PEFT would read the layers as those of other modules, so the file is of a kind of ours.")
        theirs = peft.PeftModel.from_pretrained(one.model(), folder).eval()
        same(outputs(one, theirs), outputs(one, tuned), "our file in PEFT")


def train(one: Architecture) -> None:
    batch = one.batch(labels=True)
    if "labels" not in batch and "labels" in inspect.signature(one.model().forward).parameters:
        batch["labels"] = batch.get("decoder_input_ids", batch.get("input_ids"))
    try:
        one.hidden(one.model()(**batch)).sum().backward()
    except RuntimeError as error:
        raise ValueError(f"The bare model has no gradients: {error}"[:120]) from None
    tuned = mp.attach(one.model(), mp.LoRA(4))
    if tuned(**batch).get("loss") is None:
        raise ValueError("This model computes no loss.")
    optimizer, losses = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=1e-2), []
    for _ in range(12):
        loss = tuned(**batch).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if not losses[-1] < losses[0]:
        raise Wrong(f"loss {losses[0]:.3f} → {losses[-1]:.3f}")


def generate(one: Architecture) -> None:
    tuned = moved(one, mp.LoRA(2))
    if not tuned.base.can_generate():
        raise ValueError("This model writes no text.")
    batch = {key: value[:1] for key, value in one.batch().items() if key != "decoder_input_ids"}
    how = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
    written = tuned.generate(**batch, **how)
    merged = moved(one, mp.LoRA(2))
    merged.merge()
    if not torch.equal(written, merged.detach().generate(**batch, **how)):
        raise Wrong("another text than the merged model's")


def stands(method) -> Callable[[Architecture], None]:
    return lambda one: moved(one, method) and None


def merge(one: Architecture) -> None:
    tuned = moved(one, mp.LoRA(2))
    before = outputs(one, tuned)
    tuned.merge()
    same(outputs(one, tuned), before, "merged", 1e-3)
    same(outputs(one, tuned.detach()), before, "detached", 1e-3)


def experts(one: Architecture) -> None:
    """LoRA on the stacks of matrices, by name: its effect, merged, in PEFT, and from PEFT."""
    inside = tuple(f"{path}." for path in mixtures(one.model()))
    stacks = [target for target in read(one.model()) if target.tensor.ndim == 3]
    named = [target.key for target in stacks if inside and target.path.startswith(inside)]
    if not named:
        raise Nothing
    merged, tuned = moved(one, mp.LoRA(2, targets=named)), moved(one, mp.LoRA(2, targets=named))
    merged.merge()
    same(outputs(one, merged), outputs(one, tuned), "merged")
    with tempfile.TemporaryDirectory() as folder:
        tuned.save(folder)
        theirs = peft.PeftModel.from_pretrained(one.model(), folder).eval()
        same(outputs(one, theirs), outputs(one, tuned), "our file in PEFT")
        theirs.save_pretrained(f"{folder}/theirs")
        same(outputs(one, mp.load_adapter(one.model(), f"{folder}/theirs")), outputs(one, tuned), "PEFT's file here")


COLUMNS = {
    "attach": attach, "PEFT's file in": file_in, "our file in PEFT": file_out, "train": train, "generate": generate,
    "prompt": stands(mp.PromptTuning(3, init="random")), "prefix": stands(mp.PrefixTuning(3)),
    "bottleneck": stands(mp.Adapter(4)), "merge": merge, "stacked experts": experts,
}  # fmt: skip


def main() -> int:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    reasons: dict[str, int] = {}
    lines, wrong = [], 0
    for name, one in ARCHITECTURES.items():
        cells = []
        for column, work in COLUMNS.items():
            try:
                work(one)
                cells.append("yes")
            except Nothing:
                cells.append("–")
            except (ValueError, TypeError) as error:
                said = re.sub(r"'/\S*/tmp\w+'", "FOLDER", " ".join(str(error).split()))
                said = said.replace(type(one.model()).__name__, "the model")
                cells.append(f"no [{reasons.setdefault(said, len(reasons) + 1)}]")
            except Exception as error:
                wrong += 1
                cells.append(f"wrong: {type(error).__name__} {' '.join(str(error).split())[:60]}")
                print(f"{name}, {column}: {cells[-1]}", file=sys.stderr)
        lines.append(f"| {name} | {KINDS[one.kind]} | {' | '.join(cells)} |")
    text = [
        "# What works on which architecture\n",
        f"Written by `tests/parity/table.py` with transformers {transformers.__version__}, PEFT {peft.__version__} and "
        f"PyTorch {torch.__version__.split('+')[0]}, on tiny random models: LoRA on all linear layers, files to and "
        "from PEFT (equal outputs), twelve steps of training, greedy text against the merged model's, a soft prompt, a "
        "prefix, Houlsby's bottlenecks, merging; and, where experts lie in stacks of matrices, LoRA on those, merged "
        'and both ways with PEFT (– where there are none). "no" is a refusal in one sentence, below.\n',
        f"| architecture | kind | {' | '.join(COLUMNS)} |",
        "|" + " --- |" * (len(COLUMNS) + 2),
        *lines,
        "\n## Refusals, word for word\n",
        *(f"{number}. {said}" for said, number in reasons.items()),
    ]
    (ROOT / "docs" / "architectures.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
