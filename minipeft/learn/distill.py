"""A teacher: the student learns its probabilities, not only the labels (Hinton, Vinyals and Dean 2015).

    L = (1 − w)·CE(labels, p)  +  w·T²·KL(q_T ‖ p_T)          p_T = softmax(z / T), q_T = softmax(t / T)

z are the student's logits, t the teacher's, T the temperature; the mean goes over the places that have a label. The
gradient of the second term by z is w·T·(p_T − q_T) a place: T² keeps its size where T flattens both (section 2).

    mp.fit(student, task, objective=mp.Distil(teacher, temperature=2, weight=0.5))
    mp.fit(tuned, task, objective=mp.Distil(weight=0.5))       # self-distillation: its own frozen base is the teacher

The frozen base is the same weights with the adapter off, so self-distillation keeps no second model in memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from minipeft.attach import Tuned
from minipeft.front import IGNORE
from minipeft.reading import is_pair


class _Divergence(torch.autograd.Function):
    """T²·KL(q_T ‖ p_T) for each row of logits (n, V), with the gradient T·(p_T − q_T) written down.

    It is zero to the last bit where student and teacher agree. Left to autograd it would be about 1e-9, of which Adam,
    dividing by the gradient's own size, makes steps.
    """

    @staticmethod
    def forward(ctx, student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
        log_p, log_q = (torch.log_softmax(logits / temperature, -1) for logits in (student, teacher))
        p, q = log_p.exp(), log_q.exp()
        ctx.save_for_backward(temperature * (p - q))
        return temperature**2 * torch.where(q > 0, q * (log_q - log_p), 0.0).sum(-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: torch.Tensor):
        (slope,) = ctx.saved_tensors
        return upstream.unsqueeze(-1) * slope, None, None


def divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Mean of T²·KL(softmax(teacher/T) ‖ softmax(student/T)) over rows of logits (n, V), in nats; a scalar.

    Raises ValueError for a temperature that is not positive, for other shapes, and for teacher's logits that are NaN.
    """
    _check_temperature(temperature)
    if student.shape != teacher.shape:
        raise ValueError(
            f"The student's logits are {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}: both must "
            "choose among the same tokens or classes, at the same places."
        )
    if torch.isnan(teacher).any():
        raise ValueError("The teacher's logits hold NaN, so it can teach nothing: run it in float32, or take another.")
    wide = torch.promote_types(student.dtype, torch.float32)  # a divergence of two bfloat16 is mostly rounding
    return _Divergence.apply(student.to(wide), teacher.detach().to(wide), float(temperature)).mean()


@dataclass(frozen=True)
class Distil:
    """An objective for `fit`: (1 − weight)·CE + weight·T²·KL(teacher ‖ student), at the places that have a label.

    `teacher`: any model with the student's tokens or classes; None means the student's own base with the adapters off
    (self-distillation). It reads without dropout and gets no gradient.
    `rehearsal`: batches as `mp.batches` makes them, of which each step draws one; the student then follows the teacher
    there, and the labels on the task. () means that it follows the teacher on the task's own rows.

    Raises ValueError for a temperature that is not positive and a weight outside 0 … 1; when called, for a teacher that
    is the student, or has other tokens, or NaN among its logits. No step has been taken then.
    """

    teacher: nn.Module | None = None
    temperature: float = 2.0
    weight: float = 0.5
    rehearsal: Sequence[Mapping[str, torch.Tensor]] = ()

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)
        if not (isinstance(self.weight, int | float) and 0 <= self.weight <= 1):
            raise ValueError(f"weight is the teacher's share of the loss, from 0 to 1, but is {self.weight!r}.")

    def __call__(self, student: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The loss of one batch: a scalar, in nats."""
        self._check(student)
        labelled = student(**inputs) if self.weight < 1 or not self.rehearsal else None
        shown, heard = inputs, labelled
        if self.rehearsal:
            shown = self.rehearsal[int(torch.randint(len(self.rehearsal), ()))]
            heard = student(**shown)
        teacher = self._teach(student, shown)
        places, pair = shown["labels"], is_pair(student)
        z, t = heard.logits, teacher
        if places.ndim > 1 and not pair:  # the logits at one token speak of the next
            z, t, places = z[:, :-1], t[:, :-1], places[:, 1:]
        kept = places != IGNORE
        if z.shape[-1] != t.shape[-1]:
            raise ValueError(
                f"The teacher chooses among {t.shape[-1]:,} and the student among {z.shape[-1]:,}: distillation "
                "compares them one by one, so take a teacher with the student's tokens or classes."
            )
        soft = divergence(z[kept], t[kept], self.temperature)
        return soft if self.weight == 1 else (1 - self.weight) * labelled.loss + self.weight * soft

    @torch.no_grad()
    def _teach(self, student: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The teacher's logits, read in evaluation mode; its mode, or the student's, is put back."""
        teacher = student if self.teacher is None else self.teacher
        was_training = teacher.training
        teacher.eval()
        try:
            if self.teacher is not None:
                return teacher(**inputs).logits
            with student.disabled():
                return student(**inputs).logits
        finally:
            teacher.train(was_training)

    def _check(self, student: nn.Module) -> None:
        if self.teacher is None and not isinstance(student, Tuned):
            raise ValueError("Only a model with adapters has a base to learn from: attach one, or give a teacher.")
        if self.teacher is student or (isinstance(student, Tuned) and self.teacher is student.base):
            raise ValueError(
                "The teacher is the student itself: leave teacher out, and its base, adapters off, teaches."
            )
        known, needed = (_words(model) for model in (self.teacher, student))
        if known is not None and needed is not None and known < needed:
            raise ValueError(
                f"The teacher knows {known:,} tokens and the student {needed:,}, so it cannot read the student's "
                "texts: take a teacher with the student's tokenizer."
            )
        mine, theirs = (getattr(model, "tokenizer", None) for model in (student, self.teacher))
        if self.teacher is not None and mine is not None and theirs is not None and not _alike(mine, theirs):
            raise ValueError(
                "Teacher and student have different vocabularies, so the same number means another token to each: "
                "take a teacher with the student's tokenizer."
            )


def _words(model: nn.Module | None) -> int | None:
    """How many tokens a model has embeddings for, where it says so."""
    return model.get_input_embeddings().num_embeddings if hasattr(model, "get_input_embeddings") else None


@functools.lru_cache(maxsize=8)
def _alike(one, other) -> bool:
    """Whether two tokenizers give every token the same number."""
    return one is other or one.get_vocab() == other.get_vocab()


def _check_temperature(temperature: float) -> None:
    if not (isinstance(temperature, int | float) and math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be a positive number, such as 2, but is {temperature!r}.")
