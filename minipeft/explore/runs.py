"""What an explorer has trained, wherever it is trained: in the kernel, or in the process of `worker.py`."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from minipeft.analyze.spectrum import spectra
from minipeft.attach import Tuned, attach
from minipeft.layer import Method
from minipeft.learn.fit import History, Score, evaluate, training
from minipeft.learn.many import fit_many
from minipeft.learn.plan import Plan
from minipeft.methods.lora import LoRA
from minipeft.world import tasks
from minipeft.world.base import write
from minipeft.world.corpus import pretty
from minipeft.world.tasks import Task

ROWS = 100  # of the test
PAUSE = 0.4  # seconds between two moments that are sent from one process to the other


@dataclass(frozen=True)
class Moment:
    """How far a run is: `history`, and at its end the test and what the model writes then, unless it diverged.

    `state`: a copy of the adapter's numbers, at the end and where another process trains, and `seen` what a `look` at
    the adapter gave there. `together`: whether it was one run of `fit_many`.
    """

    history: History
    score: Score | None = None
    sample: str = ""
    state: dict[str, torch.Tensor] | None = None
    seen: object = None
    together: bool = False

    @property
    def over(self) -> bool:
        """Whether it is the last moment of the run."""
        return self.score is not None or self.history.stopped == "diverged"


Look = Callable[[Tuned], object]


def nothing(_: Tuned) -> None:
    """The look of who needs none."""


def singular_values(tuned: Tuned) -> torch.Tensor:
    """Those of every ΔW, (matrices, r); NaN where there are none, since the adapter is not finite."""
    if not all(p.isfinite().all() for layer in tuned.layers() for p in layer.parameters()):
        return torch.full((1, 1), torch.nan)
    return torch.stack([each.sigma.cpu() for each in spectra(tuned).values()])


def ready() -> Iterator[Moment]:
    """A job that only prepares for the others: whoever reads it has imported what they need, and the texts of a task
    are drawn. All this stays, so Python need not look for garbage in it, which takes a quarter of a second."""
    tasks.pirate()
    gc.freeze()
    yield from ()


def run(tuned: Tuned, task: Task, plan: Plan, look: Look) -> Iterator[Moment]:
    """Trains and tests: a moment after each step and one at the end."""
    history = History()
    for _ in training(tuned, task, history, plan):
        yield Moment(history)
    yield last(tuned, task, history, look)


def last(tuned: Tuned, task: Task, history: History, look: Look, together: bool = False) -> Moment:
    """The last moment; a model whose loss is not finite can be neither tested nor made to write."""
    [name] = tuned.active
    end = Moment(history, state=state(tuned, name), seen=look(tuned), together=together)
    if end.over:
        return end
    return replace(end, score=evaluate(tuned, task, n=ROWS), sample=sample(tuned, task.name))


def fresh(model: nn.Module, method: Method, task: Callable[[], Task], plan: Plan, look: Look) -> Iterator[Moment]:
    """`run` for a new adapter on `model`: its moments carry the adapter's numbers, and some steps have none."""
    tuned, sent = attach(model, method), 0.0
    for moment in run(tuned, task(), plan, look):
        if moment.over:
            yield moment
        elif time.monotonic() - sent > PAUSE:
            yield replace(moment, state=state(tuned), seen=look(tuned))
            sent = time.monotonic()


def beside(
    model: nn.Module, methods: Sequence[LoRA], task: Callable[[], Task], plan: Plan, look: Look
) -> Iterator[tuple[int, Moment]]:
    """Those of `methods` that fit the model, trained together: the place of each, and its moment at the end."""
    fitting = {}
    for i, method in enumerate(methods):
        try:
            attach(model, method).detach()
            fitting[i] = method
        except ValueError:  # a rank above the width of the model
            pass
    if not fitting:
        return
    given = list(fitting.values())
    tuned, histories = fit_many(model, given, task(), plan.steps, plan.lr, plan.batch, plan.seed, progress=False)
    for k, (i, history) in enumerate(zip(fitting, histories, strict=True)):
        tuned.use(f"run{k}")
        yield i, last(tuned, task(), history, look, together=True)


def state(tuned: Tuned, name: str = "default") -> dict[str, torch.Tensor]:
    """A copy of the numbers of one adapter."""
    return {key: value.clone() for key, value in tuned.adapters[name].state_dict().items()}


def sample(tuned: Tuned, task: str) -> str:
    """What the tuned model says now, as a reader would want to see it for this task."""
    tokenizer = tuned.tokenizer
    if task == "flip":
        prompt = "on sunday , anna went to the lake . the sun was hot . anna won a red boat in a race . anna felt"
        ids = tokenizer(prompt, return_tensors="pt").to(tuned.device)
        with torch.no_grad():
            p = tuned(**ids).logits[0, -1].softmax(-1)
        words = {
            m: sum(p[tokenizer.convert_tokens_to_ids(w)].item() for w in ws) for m, ws in tasks.mood_words().items()
        }
        return f"{pretty(prompt)} … glad {words['glad']:.2f}, sad {words['sad']:.2f}"
    if task == "cipher":
        key = tasks.permutation()
        back = {secret: word for word, secret in key.items()}
        [text] = write(tuned, tokenizer, f"{key['one']} {key['morning']}")
        return f"{text} — deciphered: {pretty(' '.join(back.get(w, w) for w in text.split()))}"
    return pretty(write(tuned, tokenizer, "on sunday")[0])
