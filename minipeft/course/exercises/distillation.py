"""Assignment `distillation`: a teacher's loss, its mask, the base as a teacher, and a step that is taken back."""

from __future__ import annotations

import math
from random import Random

import torch

from minipeft.course.drives.distillation import Reader
from minipeft.course.exercises.draw import holds, normal
from minipeft.course.verdict import Case, Exercise, differ

IGNORE = -100


def probabilities(logits: list[float], T: float) -> list[float]:
    """softmax(logits / T), a number at a time."""
    powers = [math.exp(v / T) for v in logits]
    return [p / sum(powers) for p in powers]


def wasted(student: list[float], teacher: list[float], T: float) -> float:
    """KL(teacher_T ‖ student_T) in nats."""
    pairs = zip(probabilities(teacher, T), probabilities(student, T), strict=True)
    return sum(q * math.log(q / p) for q, p in pairs)


def rows_of(logits: torch.Tensor) -> list[list[float]]:
    return logits.double().reshape(-1, logits.shape[-1]).tolist()


def mean_wasted(student: torch.Tensor, teacher: torch.Tensor, T: float) -> float:
    each = [wasted(z, t, T) for z, t in zip(rows_of(student), rows_of(teacher), strict=True)]
    return sum(each) / len(each)


def crossed(student: torch.Tensor, teacher: torch.Tensor, T: float) -> float:
    """−Σ q·ln p, the mean over the rows."""
    p, q = ([probabilities(row, T) for row in rows_of(logits)] for logits in (student, teacher))
    return -sum(b * math.log(a) for x, y in zip(p, q, strict=True) for a, b in zip(x, y, strict=True)) / len(p)


# soft loss -----------------------------------------------------------------------------------------------------------
def soft_cases(rng: Random):
    for T in (1.0, 2.0, 0.5, 4.0):
        n, classes = rng.randint(2, 6), rng.randint(3, 9)
        z, t = (3 * normal(rng, n, classes, dtype=torch.float64) for _ in range(2))

        def tensor(value):
            return torch.tensor(value, dtype=torch.float64)

        right = T * T * mean_wasted(z, t, T)
        yield Case(
            f"be T² times the mean KL of {n} rows at temperature {T:g}",
            (z, t, T),
            tensor(right),
            wrong={
                "T² is missing": lambda r=right, T=T: tensor(r / T**2),
                "it is multiplied by T, not by T²": lambda r=right, T=T: tensor(r / T),
                "the direction is reversed: it is KL(student ‖ teacher)": lambda z=z, t=t, T=T: tensor(
                    T * T * mean_wasted(t, z, T)
                ),
                "logits are multiplied by T": lambda z=z, t=t, T=T: tensor(T * T * mean_wasted(z, t, 1 / T)),
                "it adds over the rows: take the mean": lambda r=right, n=n: tensor(r * n),
                "it takes the mean over the classes too": lambda r=right, c=classes: tensor(r / c),
                "it is the cross-entropy: the teacher's own −Σ q·ln q is not taken off": lambda z=z, t=t, T=T: tensor(
                    T * T * crossed(z, t, T)
                ),
                "only the teacher is softened": lambda z=z, t=t, T=T: tensor(T * T * mean_wasted(z * T, t, T)),
                "the sign is wrong": lambda r=right: tensor(-r),
            },
        )


# masked --------------------------------------------------------------------------------------------------------------
def masked_cases(rng: Random):
    for T, kind in ((2.0, "a prompt"), (1.0, "padding"), (3.0, "both"), (2.0, "nothing")):
        rows, length, classes = rng.randint(2, 4), rng.randint(5, 8), rng.randint(3, 7)
        z, t = (2 * normal(rng, rows, length, classes, dtype=torch.float64) for _ in range(2))
        labels = torch.tensor([[rng.randrange(classes) for _ in range(length)] for _ in range(rows)])
        for i in range(rows):
            if kind in ("a prompt", "both"):
                labels[i, : rng.randint(1, 3)] = IGNORE
            if kind in ("padding", "both"):
                labels[i, length - rng.randint(0, 1) - (i == 0) :] = IGNORE
        each = [
            (wasted(z[i, j].tolist(), t[i, j].tolist(), T), labels[i, j + 1].item(), labels[i, j].item(), i)
            for i in range(rows)
            for j in range(length - 1)
        ]
        kept = [value for value, label, *_ in each if label != IGNORE]
        here = [value for value, _, label, _ in each if label != IGNORE]
        by_row = [[v for v, label, _, r in each if label != IGNORE and r == i] for i in range(rows)]

        def tensor(value, T=T):
            return torch.tensor(T * T * value, dtype=torch.float64)

        wrong = {
            "padding and prompt count": lambda e=each, f=tensor: f(sum(v for v, *_ in e) / len(e)),
            "labels are not shifted: logits at one place speak of the next": lambda h=here, f=tensor: f(
                sum(h) / len(h)
            ),
            "the sum is divided by all places": lambda k=kept, e=each, f=tensor: f(sum(k) / len(e)),
            "each text counts the same, however many labels it has": lambda b=by_row, f=tensor: f(
                sum(sum(r) / len(r) for r in b) / len(b)
            ),
            "a label 0 is left out: 0 is a word, and −100 alone means no loss": lambda e=each, f=tensor: f(
                sum(v for v, label, *_ in e if label > 0) / max(1, sum(label > 0 for _, label, *_ in e))
            ),
            "T² is missing": lambda k=kept: torch.tensor(sum(k) / len(k), dtype=torch.float64),
        }
        claim = f"be the mean over the places whose next token has a label, with {kind} left out"
        yield Case(claim, (z, t, labels, T), tensor(sum(kept) / len(kept)), wrong=wrong)


# self-distillation ---------------------------------------------------------------------------------------------------
def itself_cases(rng: Random):
    for T, share, training in ((1.0, 0.0, False), (2.0, 0.5, True), (3.0, 0.5, False), (2.0, 0.3, True)):
        classes, d, r, n, seed = rng.randint(3, 6), rng.randint(4, 7), 2, rng.randint(3, 6), rng.randrange(10**6)
        weight, A, B = (normal(rng, *shape) for shape in ((classes, d), (r, d), (classes, r)))
        x = normal(rng, n, d)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            seen = torch.nn.functional.dropout(x, share, training)  # what the student reads
        a, b = A.double().requires_grad_(), B.double().requires_grad_()
        z, t = seen.double() @ (weight.double() + b @ a).T, x.double() @ weight.double().T
        value = T * T * mean_wasted(z.detach(), t, T)
        slope = T * ((z / T).softmax(-1) - (t / T).softmax(-1)).detach() / n  # the closed form
        slopes = torch.autograd.grad(z, (a, b), slope)

        def judge(got, value=value, slopes=slopes, t=t, z=z, T=T, weight=weight, seen=seen):
            if set(got) == {"loss"}:
                return f"It returns {type(got['loss']).__name__}; it should return the loss, a tensor without axes."
            if said := holds(got):
                return said
            if lines := differ(got["loss"], torch.tensor(value, dtype=torch.float32)):
                heard = seen.double() @ weight.double().T
                turned = torch.tensor(T * T * mean_wasted(t, z.detach(), T), dtype=torch.float32)
                if not differ(got["loss"], turned):
                    return "It looks as if KL is reversed: the base teaches, the adapted model learns."
                if not torch.equal(heard, t):
                    return "The loss is not that of a teacher who reads without dropout. " + " ".join(lines)
                return " ".join(lines)
            for name, slope in zip("AB", slopes, strict=True):
                if lines := differ(got[name], slope.float()):
                    return f"The gradient of {name} is not the student's. {' '.join(lines)}"

        mode = f"in {'training' if training else 'evaluation'} with dropout {share:g}"
        yield Case(f"have the base teach its adapter, {mode}", (weight, A, B, x, T, share, training, seed), judge=judge)


# FGM -----------------------------------------------------------------------------------------------------------------
def shaken(table, head, ids, labels, epsilon: float) -> tuple[list, list]:
    """Gradients (embed, head) of the clean loss, and of the loss with the table moved by ε·g/‖g‖."""

    def gradients(now):
        model = Reader(now, head)
        loss = torch.nn.functional.cross_entropy(model(ids), labels)
        return torch.autograd.grad(loss, [model.embed.weight, model.head.weight])

    clean = gradients(table)
    size = math.sqrt(sum(v * v for v in clean[0].flatten().tolist()))
    return clean, gradients(table + epsilon * clean[0] / size if size else table)


def shake_cases(rng: Random):
    for epsilon, earlier in ((0.5, 0.0), (2.0, 0.0), (1.0, 3.0), (0.1, 0.0)):
        words, d, classes, rows = rng.randint(8, 14), rng.randint(3, 5), rng.randint(2, 4), rng.randint(2, 5)
        table = normal(rng, words, d, dtype=torch.float64)
        head = normal(rng, classes, d, dtype=torch.float64)
        ids = torch.tensor([[rng.randrange(words) for _ in range(4)] for _ in range(rows)])
        labels = torch.tensor([rng.randrange(classes) for _ in range(rows)])
        clean, moved = shaken(table, head, ids, labels, epsilon)

        def judge(got, clean=clean, moved=moved, earlier=earlier):
            if said := holds(got):
                return said
            for name, c, m in zip(("embed", "head"), clean, moved, strict=True):
                if got[name] is None:
                    return f"{name}.weight has no gradient afterwards."
                if lines := differ(got[name], c + m + earlier):
                    for words_, value in (
                        ("the clean loss's alone", c + earlier), ("the moved loss's alone", m + earlier),
                        ("without what it held before", c + m), ("the moved loss's alone, which replaced all", m),
                        ("twice the clean loss's: the table did not move", 2 * c + earlier),
                    ):  # fmt: skip
                        if not differ(got[name], value):
                            return f"The gradient of {name}.weight is {words_}."
                    return f"The gradient of {name}.weight is not the sum of both. {' '.join(lines)}"

        held = f", on top of gradients of {earlier:g}" if earlier else ""
        claim = f"add the gradients of the clean and the moved loss, ε = {epsilon:g}{held}, and put the table back"
        yield Case(claim, (table, head, ids, labels, epsilon, earlier), judge=judge)


# find the bug --------------------------------------------------------------------------------------------------------
def mixed_cases(rng: Random):
    for T, w in ((2.0, 0.3), (4.0, 0.75), (1.0, 0.5), (3.0, 0.0), (2.0, 1.0)):
        n, classes = rng.randint(2, 6), rng.randint(3, 8)
        z, t = (2 * normal(rng, n, classes, dtype=torch.float64) for _ in range(2))
        labels = torch.tensor([rng.randrange(classes) for _ in range(n)])

        def hard(z=z, labels=labels, T=1.0):
            p = [probabilities(row, T) for row in rows_of(z)]
            return -sum(math.log(row[y]) for row, y in zip(p, labels.tolist(), strict=True)) / len(p)

        def mixed(soft, weight=w, hard=hard, T=1.0):
            return torch.tensor((1 - weight) * hard(T=T) + weight * soft, dtype=torch.float64)

        soft = T * T * mean_wasted(z, t, T)
        yield Case(
            f"be {1 - w:g} of the labels' loss and {w:g} of the teacher's, at temperature {T:g}",
            (z, t, labels, T, w),
            mixed(soft),
            wrong={
                "the labels' loss is softened: T is for the teacher's half": lambda m=mixed, s=soft, T=T: m(s, T=T),
                "T² is missing": lambda m=mixed, s=soft, T=T: m(s / T**2),
                'KL is a mean over the classes too: reduction="batchmean" takes it over the rows': (
                    lambda m=mixed, s=soft, c=classes: m(s / c)
                ),
                "KL is reversed": lambda m=mixed, z=z, t=t, T=T: m(T * T * mean_wasted(t, z, T)),
                "the weights are exchanged": lambda m=mixed, s=soft, w=w: m(s, weight=1 - w),
            },
        )


EXERCISES = (
    Exercise(
        "soft_loss", "The loss of a teacher", soft_cases,
        (
            "Divide both logits by T, take log_softmax of both, and write KL down: Σ q·(log q − log p).",
            "`log_softmax` stays finite where the logarithm of a softmax does not. Sum over V, mean over rows. Which "
            "one is detached?",
        ),
        ("soft_loss",),
    ),
    Exercise(
        "masked_soft_loss", "Only where there is a label", masked_cases,
        (
            "The logits at place j speak of token j + 1: drop the last logits and the first label.",
            "A mask of the shifted labels picks (places, V) from the shifted logits. With no place left, divide by "
            "1, not by 0.",
        ),
        ("masked_soft_loss",),
    ),
    Exercise(
        "teach_itself", "The base as its adapter's teacher", itself_cases,
        (
            "`with tuned.disabled():` is the base; a teacher needs no gradient and no dropout.",
            "Four steps: keep the mode, read the teacher, put the mode back, read the student. Which need eval(), "
            "no_grad, disabled()?",
        ),
        ("teach_itself",), "distillation.teach_itself",
    ),
    Exercise(
        "fgm_gradients", "A step that is taken back", shake_cases,
        (
            "The gradient of the table from the clean loss alone is needed: torch.autograd.grad gives it by itself.",
            "By hand: keep a copy of the table, move it, copy back. Two losses call backward; the step must not come "
            "from `.grad`.",
        ),
        ("fgm_gradients",), "distillation.shake",
    ),
    Exercise(
        "mixed_loss", "Find the bug", mixed_cases,
        (
            "Four things are wrong: try weight = 0, weight = 1, and a student that agrees with its teacher.",
            "Which half may see T at all? In `F.kl_div(input, target)` it is the *target* that weighs. What pays "
            "back the 1/T²?",
        ),
        ("mixed_loss",),
    ),
)  # fmt: skip
