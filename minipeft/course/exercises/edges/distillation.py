"""The edges of the assignment `distillation`."""

from __future__ import annotations

from random import Random

import torch
from torch.nn import functional as F

from minipeft.course.exercises.draw import normal


def soft_loss(student, teacher, temperature=2.0):
    log_p = (student / temperature).log_softmax(-1)
    log_q = (teacher.detach() / temperature).log_softmax(-1)
    return temperature**2 * (log_q.exp() * (log_q - log_p)).sum(-1).mean()


def soft_edges(rng: Random):
    for n, classes in ((1, 4), (3, 1), (1, 1), (2, 50)):
        z, t = normal(rng, n, classes, dtype=torch.float64), normal(rng, n, classes, dtype=torch.float64)
        yield f"hold for {n} × {classes} logits", (z, t, 1.5)
    z = normal(rng, 3, 5, dtype=torch.float64)
    yield "be 0 where student and teacher agree", (z, z + 3.0, 2.0)
    far = torch.tensor([[500.0, -500.0, 0.0]], dtype=torch.float64)
    yield "stay a number where logits are far apart", (far, far.flip(1), 1.0)


def masked_soft_loss(student, teacher, labels, temperature=2.0):
    kept = labels[:, 1:] != -100
    z, t = student[:, :-1][kept], teacher[:, :-1][kept]
    log_p, log_q = (z / temperature).log_softmax(-1), (t.detach() / temperature).log_softmax(-1)
    return temperature**2 * (log_q.exp() * (log_q - log_p)).sum() / kept.sum().clamp(min=1)


def masked_edges(rng: Random):
    def drawn(rows, length, classes=4):
        return tuple(normal(rng, rows, length, classes, dtype=torch.float64) for _ in range(2))

    yield "hold for one text of two tokens", (*drawn(1, 2), torch.tensor([[3, 2]]), 2.0)
    none = torch.full((2, 4), -100)
    yield "be 0 where no place has a label", (*drawn(2, 4), none, 2.0)
    square = torch.tensor([[1, 2, -100], [-100, -100, 3], [0, -100, -100]])
    yield "hold for as many texts as tokens", (*drawn(3, 3), square, 2.0)
    first = torch.tensor([[1, -100, -100], [2, 0, -100]])
    yield "leave a text out whose only label is the first token's", (*drawn(2, 3), first, 2.0)


def teach_itself(tuned, x, temperature):
    training = tuned.training
    tuned.eval()
    with torch.no_grad(), tuned.disabled():
        teacher = tuned(x)
    tuned.train(training)
    return soft_loss(tuned(x), teacher, temperature)


def teach_edges(rng: Random):
    W, A, B, x = (normal(rng, *s) for s in ((3, 4), (2, 4), (3, 2), (5, 4)))
    for T in (0.5, 3.0):
        yield f"take T = {T}", (W, A, B, x, T, 0.0, True, 7)
    yield "be 0 where the adapter changes nothing", (W, A, 0 * B, x, 2.0, 0.5, False, 7)


def fgm_gradients(model, ids, labels, epsilon):
    table = model.embed.weight
    loss = F.cross_entropy(model(ids), labels)
    (slope,) = torch.autograd.grad(loss, table, retain_graph=True)
    loss.backward()
    kept, size = table.detach().clone(), slope.norm()
    with torch.no_grad():
        if size > 0:
            table += epsilon * slope / size
    F.cross_entropy(model(ids), labels).backward()
    with torch.no_grad():
        table.copy_(kept)


def shake_edges(rng: Random):
    table, head = normal(rng, 6, 3, dtype=torch.float64), normal(rng, 2, 3, dtype=torch.float64)
    ids, labels = torch.tensor([[1, 1, 5]]), torch.tensor([1])
    yield "hold for one text with a repeated token", (table, head, ids, labels, 0.7, 0.0)
    still = torch.zeros_like(head)
    yield "stand still where the gradient is 0: 0/0 is no number", (table, still, ids, labels, 0.7, 0.0)
    yield "take the whole step where the gradient is tiny", (table, 1e-7 * head, ids, labels, 0.7, 0.0)
    yield "hold for a text of one token", (table, head, ids[:, :1], labels, 0.7, 1.0)


def mixed_loss(student, teacher, labels, temperature=2.0, weight=0.5):
    return (1 - weight) * F.cross_entropy(student, labels) + weight * soft_loss(student, teacher, temperature)


def mixed_edges(rng: Random):
    z, t = normal(rng, 1, 3, dtype=torch.float64), normal(rng, 1, 3, dtype=torch.float64)
    yield "hold for one row", (z, t, torch.tensor([2]), 2.0, 0.5)
    yield "be the labels' loss alone at weight 0", (z, t, torch.tensor([0]), 5.0, 0.0)
    yield "be the teacher's alone at weight 1", (z, t, torch.tensor([0]), 5.0, 1.0)


MODEL = "the model is built from plain tensors in the drive"
EDGES = {
    "soft_loss": {"positive": ("temperature",), "reference": (soft_loss,), "edges": soft_edges},
    "masked_soft_loss": {"positive": ("temperature",), "reference": (masked_soft_loss,), "edges": masked_edges},
    "teach_itself": {
        "positive": ("temperature", "share"),
        "reference": (teach_itself,),
        "edges": teach_edges,
        "without": {
            "strided": MODEL,
            "types": "adapters are float32 or float64 by their base, and the cases compare float32",
            "gradient": "its drive takes the gradients of the adapter",
        },
    },
    "fgm_gradients": {
        "positive": ("epsilon",),
        "reference": (fgm_gradients,),
        "edges": shake_edges,
        "without": {
            "strided": MODEL,
            "types": "gradients are compared in float64",
            "gradient": "it returns nothing",
            "memory": "it returns nothing",
        },
    },
    "mixed_loss": {"positive": ("temperature", "weight"), "reference": (mixed_loss,), "edges": mixed_edges},
}
