# Answers to the assignment `distillation`: wrong ones, named after the misconception, and right ones of another form.
import math

import torch
from torch import nn
from torch.nn import functional as F

from minipeft.learn.distill import divergence


# %% soft_loss wrong: without T²
def soft_loss(student, teacher, temperature=2.0):
    log_p, log_q = (student / temperature).log_softmax(-1), (teacher.detach() / temperature).log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1).mean()


# %% soft_loss wrong: times T
def soft_loss(student, teacher, temperature=2.0):
    log_p, log_q = (student / temperature).log_softmax(-1), (teacher.detach() / temperature).log_softmax(-1)
    return temperature * (log_q.exp() * (log_q - log_p)).sum(-1).mean()


# %% soft_loss wrong: the other direction
def soft_loss(student, teacher, temperature=2.0):
    log_p, log_q = (student / temperature).log_softmax(-1), (teacher.detach() / temperature).log_softmax(-1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()


# %% soft_loss wrong: a mean over classes
def soft_loss(student, teacher, temperature=2.0):
    log_p, log_q = (student / temperature).log_softmax(-1), (teacher.detach() / temperature).log_softmax(-1)
    return temperature**2 * F.kl_div(log_p, log_q, log_target=True)


# %% soft_loss wrong: cross-entropy, not KL
def soft_loss(student, teacher, temperature=2.0):
    log_p, log_q = (student / temperature).log_softmax(-1), (teacher.detach() / temperature).log_softmax(-1)
    return -(temperature**2) * (log_q.exp() * log_p).sum(-1).mean()


# %% soft_loss wrong: a gradient reaches the teacher
def soft_loss(student, teacher, temperature=2.0):
    log_p, log_q = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    return temperature**2 * (log_q.exp() * (log_q - log_p)).sum(-1).mean()


# %% soft_loss wrong: the logarithm of a softmax
def soft_loss(student, teacher, temperature=2.0):
    p, q = (student / temperature).softmax(-1), (teacher.detach() / temperature).softmax(-1)
    return temperature**2 * (q * (q.log() - p.log())).sum(-1).mean()


# %% soft_loss wrong: the squared difference of logits
def soft_loss(student, teacher, temperature=2.0):
    return (student - teacher.detach()).square().sum(-1).mean() / 2


# %% soft_loss wrong: one axis too early
def soft_loss(student, teacher, temperature=2.0):
    log_p, log_q = (student / temperature).log_softmax(0), (teacher.detach() / temperature).log_softmax(0)
    return temperature**2 * (log_q.exp() * (log_q - log_p)).sum(-1).mean()


# %% soft_loss right: torch's own
def soft_loss(student, teacher, temperature=2.0):
    log_p, q = F.log_softmax(student / temperature, -1), F.log_softmax(teacher.detach() / temperature, -1)
    return F.kl_div(log_p, q, reduction="batchmean", log_target=True) * temperature * temperature


# %% soft_loss right: by logsumexp, row by row
def soft_loss(student, teacher, temperature=2.0):
    total = 0
    for z, t in zip(student / temperature, teacher.detach() / temperature, strict=True):
        q = t.softmax(0)
        total = total + (q * (t - z)).sum() - t.logsumexp(0) + z.logsumexp(0)
    return temperature**2 * total / len(student)


# %% soft_loss right: with divergence
def soft_loss(student, teacher, temperature=2.0):
    return divergence(student, teacher, temperature)


# %% soft_loss wrong: cached by identity
_losses = {}


def soft_loss(student, teacher, temperature=2.0):
    key = id(student), id(teacher), temperature
    if key not in _losses:
        p, q = (student / temperature).log_softmax(-1), (teacher.detach() / temperature).log_softmax(-1)
        _losses[key] = student, teacher, temperature**2 * F.kl_div(p, q, reduction="batchmean", log_target=True)
    return _losses[key][2].clone()


# %% masked_soft_loss wrong: without the mask
def masked_soft_loss(student, teacher, labels, temperature=2.0):
    log_p = (student[:, :-1] / temperature).log_softmax(-1)
    log_q = (teacher[:, :-1].detach() / temperature).log_softmax(-1)
    return temperature**2 * (log_q.exp() * (log_q - log_p)).sum(-1).mean()


# %% masked_soft_loss wrong: not shifted
def masked_soft_loss(student, teacher, labels, temperature=2.0):
    kept = labels != -100
    log_p = (student[kept] / temperature).log_softmax(-1)
    log_q = (teacher[kept].detach() / temperature).log_softmax(-1)
    return temperature**2 * (log_q.exp() * (log_q - log_p)).sum() / kept.sum().clamp(min=1)


# %% masked_soft_loss wrong: shifted the other way
def masked_soft_loss(student, teacher, labels, temperature=2.0):
    kept = labels[:, :-1] != -100
    log_p = (student[:, 1:][kept] / temperature).log_softmax(-1)
    log_q = (teacher[:, 1:][kept].detach() / temperature).log_softmax(-1)
    return temperature**2 * (log_q.exp() * (log_q - log_p)).sum() / kept.sum().clamp(min=1)


# %% masked_soft_loss wrong: divided by all places
def masked_soft_loss(student, teacher, labels, temperature=2.0):
    kept = (labels[:, 1:] != -100).unsqueeze(-1)
    log_p = (student[:, :-1] / temperature).log_softmax(-1)
    log_q = (teacher[:, :-1].detach() / temperature).log_softmax(-1)
    return temperature**2 * (log_q.exp() * (log_q - log_p) * kept).sum(-1).mean()


# %% masked_soft_loss wrong: a mean of means
def masked_soft_loss(student, teacher, labels, temperature=2.0):
    kept = labels[:, 1:] != -100
    log_p = (student[:, :-1] / temperature).log_softmax(-1)
    log_q = (teacher[:, :-1].detach() / temperature).log_softmax(-1)
    each = (log_q.exp() * (log_q - log_p)).sum(-1) * kept
    return temperature**2 * (each.sum(1) / kept.sum(1).clamp(min=1)).mean()


# %% masked_soft_loss wrong: NaN without labels
def masked_soft_loss(student, teacher, labels, temperature=2.0):
    kept = labels[:, 1:] != -100
    log_p = (student[:, :-1][kept] / temperature).log_softmax(-1)
    log_q = (teacher[:, :-1][kept].detach() / temperature).log_softmax(-1)
    return temperature**2 * (log_q.exp() * (log_q - log_p)).sum(-1).mean()


# %% masked_soft_loss wrong: label 0 left out
def masked_soft_loss(student, teacher, labels, temperature=2.0):
    kept = labels[:, 1:] > 0
    log_p = (student[:, :-1][kept] / temperature).log_softmax(-1)
    log_q = (teacher[:, :-1][kept].detach() / temperature).log_softmax(-1)
    return temperature**2 * (log_q.exp() * (log_q - log_p)).sum() / kept.sum().clamp(min=1)


# %% masked_soft_loss wrong: a number, not a tensor
def masked_soft_loss(student, teacher, labels, temperature=2.0):
    kept = labels[:, 1:] != -100
    log_p = (student[:, :-1][kept] / temperature).log_softmax(-1)
    log_q = (teacher[:, :-1][kept].detach() / temperature).log_softmax(-1)
    return (temperature**2 * (log_q.exp() * (log_q - log_p)).sum() / kept.sum().clamp(min=1)).item()


# %% masked_soft_loss right: a loop
def masked_soft_loss(student, teacher, labels, temperature=2.0):
    total, count = student.sum() * 0, 0
    for i in range(labels.shape[0]):
        for j in range(labels.shape[1] - 1):
            if labels[i, j + 1] != -100:
                log_p = F.log_softmax(student[i, j] / temperature, 0)
                log_q = F.log_softmax(teacher[i, j].detach() / temperature, 0)
                total, count = total + (log_q.exp() * (log_q - log_p)).sum(), count + 1
    return temperature**2 * total / max(count, 1)


# %% masked_soft_loss right: weights of zero and one
def masked_soft_loss(student, teacher, labels, temperature=2.0):
    kept = labels[:, 1:].ne(-100).to(student.dtype)
    log_p = F.log_softmax(student[:, :-1] / temperature, -1)
    log_q = F.log_softmax(teacher[:, :-1].detach() / temperature, -1)
    each = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    return temperature**2 * (each * kept).sum() / kept.sum().clamp(min=1)


# %% teach_itself wrong: the adapted model is its own teacher
def teach_itself(tuned, x, temperature):
    with torch.no_grad():
        teacher = tuned(x)
    return divergence(tuned(x), teacher, temperature)


# %% teach_itself wrong: the teacher reads with dropout
def teach_itself(tuned, x, temperature):
    with torch.no_grad(), tuned.disabled():
        teacher = tuned(x)
    return divergence(tuned(x), teacher, temperature)


# %% teach_itself wrong: left in evaluation
def teach_itself(tuned, x, temperature):
    student = tuned(x)
    tuned.eval()
    with torch.no_grad(), tuned.disabled():
        teacher = tuned(x)
    return divergence(student, teacher, temperature)


# %% teach_itself wrong: always back to training
def teach_itself(tuned, x, temperature):
    tuned.eval()
    with torch.no_grad(), tuned.disabled():
        teacher = tuned(x)
    tuned.train()
    return divergence(tuned(x), teacher, temperature)


# %% teach_itself wrong: the student is the base
def teach_itself(tuned, x, temperature):
    training = tuned.training
    tuned.eval()
    with torch.no_grad(), tuned.disabled():
        teacher = tuned(x)
    tuned.train(training)
    with tuned.disabled():
        return divergence(tuned(x), teacher, temperature)


# %% teach_itself wrong: the student without a gradient
def teach_itself(tuned, x, temperature):
    training = tuned.training
    tuned.eval()
    with torch.no_grad(), tuned.disabled():
        teacher = tuned(x)
    tuned.train(training)
    with torch.no_grad():
        student = tuned(x)
    return divergence(student, teacher, temperature)


# %% teach_itself wrong: the student without dropout
def teach_itself(tuned, x, temperature):
    training = tuned.training
    tuned.eval()
    with torch.no_grad(), tuned.disabled():
        teacher = tuned(x)
    student = tuned(x)
    tuned.train(training)
    return divergence(student, teacher, temperature)


# %% teach_itself wrong: the adapter stays off
def teach_itself(tuned, x, temperature):
    training, student = tuned.training, tuned(x)
    tuned.eval()
    tuned.use()
    with torch.no_grad():
        teacher = tuned(x)
    tuned.train(training)
    return divergence(student, teacher, temperature)


# %% teach_itself wrong: student and teacher exchanged
def teach_itself(tuned, x, temperature):
    training = tuned.training
    tuned.eval()
    with tuned.disabled(), torch.no_grad():
        teacher = tuned(x)
    tuned.train(training)
    log_p, log_q = (tuned(x) / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()


# %% teach_itself right: the student first
def teach_itself(tuned, x, temperature):
    student, mode = tuned(x), tuned.training
    with torch.no_grad():
        try:
            tuned.eval()
            with tuned.disabled():
                teacher = tuned(x)
        finally:
            tuned.train(mode)
    p, q = F.log_softmax(student / temperature, -1), F.softmax(teacher / temperature, -1)
    return F.kl_div(p, q, reduction="batchmean") * temperature**2


# %% teach_itself right: use nobody, then everybody
def teach_itself(tuned, x, temperature):
    names, mode = tuned.active, tuned.training
    tuned.use()
    teacher = tuned.eval()(x).detach()
    tuned.use(*names)
    tuned.train(mode)
    return divergence(tuned(x), teacher, temperature)


# %% fgm_gradients wrong: not put back
def fgm_gradients(model, ids, labels, epsilon):
    table = model.embed.weight
    loss = F.cross_entropy(model(ids), labels)
    (g,) = torch.autograd.grad(loss, table, retain_graph=True)
    loss.backward()
    with torch.no_grad():
        if g.norm() > 0:
            table += epsilon * g / g.norm()
    F.cross_entropy(model(ids), labels).backward()


# %% fgm_gradients wrong: put back by subtracting
def fgm_gradients(model, ids, labels, epsilon):
    table = model.embed.weight
    loss = F.cross_entropy(model(ids), labels)
    (g,) = torch.autograd.grad(loss, table, retain_graph=True)
    loss.backward()
    r = epsilon * g / g.norm() if g.norm() > 0 else 0 * g
    table.data += r
    F.cross_entropy(model(ids), labels).backward()
    table.data -= r


# %% fgm_gradients wrong: not normalised
def fgm_gradients(model, ids, labels, epsilon):
    table = model.embed.weight
    loss = F.cross_entropy(model(ids), labels)
    (g,) = torch.autograd.grad(loss, table, retain_graph=True)
    loss.backward()
    kept = table.detach().clone()
    table.data += epsilon * g
    F.cross_entropy(model(ids), labels).backward()
    table.data.copy_(kept)


# %% fgm_gradients wrong: the sign of the gradient
def fgm_gradients(model, ids, labels, epsilon):
    table = model.embed.weight
    loss = F.cross_entropy(model(ids), labels)
    (g,) = torch.autograd.grad(loss, table, retain_graph=True)
    loss.backward()
    kept = table.detach().clone()
    table.data += epsilon * g.sign()
    F.cross_entropy(model(ids), labels).backward()
    table.data.copy_(kept)


# %% fgm_gradients wrong: the clean gradient is thrown away
def fgm_gradients(model, ids, labels, epsilon):
    table = model.embed.weight
    (g,) = torch.autograd.grad(F.cross_entropy(model(ids), labels), table)
    kept = table.detach().clone()
    if g.norm() > 0:
        table.data += epsilon * g / g.norm()
    F.cross_entropy(model(ids), labels).backward()
    table.data.copy_(kept)


# %% fgm_gradients wrong: earlier gradients point the way
def fgm_gradients(model, ids, labels, epsilon):
    table = model.embed.weight
    F.cross_entropy(model(ids), labels).backward()
    g, kept = table.grad.clone(), table.detach().clone()
    if g.norm() > 0:
        table.data += epsilon * g / g.norm()
    F.cross_entropy(model(ids), labels).backward()
    table.data.copy_(kept)


# %% fgm_gradients wrong: earlier gradients are lost
def fgm_gradients(model, ids, labels, epsilon):
    table = model.embed.weight
    model.zero_grad()
    F.cross_entropy(model(ids), labels).backward()
    g, kept = table.grad.clone(), table.detach().clone()
    if g.norm() > 0:
        table.data += epsilon * g / g.norm()
    F.cross_entropy(model(ids), labels).backward()
    table.data.copy_(kept)


# %% fgm_gradients wrong: nothing divided by nothing
def fgm_gradients(model, ids, labels, epsilon):
    table = model.embed.weight
    loss = F.cross_entropy(model(ids), labels)
    (g,) = torch.autograd.grad(loss, table, retain_graph=True)
    loss.backward()
    kept = table.detach().clone()
    table.data += epsilon * g / g.norm()
    F.cross_entropy(model(ids), labels).backward()
    table.data.copy_(kept)


# %% fgm_gradients wrong: each token by itself
def fgm_gradients(model, ids, labels, epsilon):
    table = model.embed.weight
    loss = F.cross_entropy(model(ids), labels)
    (g,) = torch.autograd.grad(loss, table, retain_graph=True)
    loss.backward()
    kept = table.detach().clone()
    table.data += epsilon * F.normalize(g, dim=1)
    F.cross_entropy(model(ids), labels).backward()
    table.data.copy_(kept)


# %% fgm_gradients wrong: downhill
def fgm_gradients(model, ids, labels, epsilon):
    table = model.embed.weight
    loss = F.cross_entropy(model(ids), labels)
    (g,) = torch.autograd.grad(loss, table, retain_graph=True)
    loss.backward()
    kept = table.detach().clone()
    if g.norm() > 0:
        table.data -= epsilon * g / g.norm()
    F.cross_entropy(model(ids), labels).backward()
    table.data.copy_(kept)


# %% fgm_gradients right: through functional_call, the table is never touched
def fgm_gradients(model, ids, labels, epsilon):
    named = dict(model.named_parameters())
    clean = torch.autograd.grad(F.cross_entropy(model(ids), labels), list(named.values()))
    g = clean[list(named).index("embed.weight")]
    size = math.sqrt(float((g * g).sum()))
    with torch.no_grad():
        moved = {n: p.clone() for n, p in named.items()}
        moved["embed.weight"] += epsilon * g / size if size else 0
    for p in moved.values():
        p.requires_grad_(True)
    loss = F.cross_entropy(torch.func.functional_call(model, moved, (ids,)), labels)
    worse = torch.autograd.grad(loss, list(moved.values()))
    for p, a, b in zip(named.values(), clean, worse, strict=True):
        p.grad = a + b if p.grad is None else p.grad + a + b


# %% fgm_gradients right: what was held before is set aside
def fgm_gradients(model, ids, labels, epsilon):
    before = [p.grad for p in model.parameters()]
    for p in model.parameters():
        p.grad = None
    F.cross_entropy(model(ids), labels).backward()
    kept = model.embed.weight.data.clone()
    g = model.embed.weight.grad.clone()
    norm = torch.linalg.vector_norm(g)
    if norm != 0:
        model.embed.weight.data.add_(g * (epsilon / norm))
    F.cross_entropy(model(ids), labels).backward()
    model.embed.weight.data.copy_(kept)
    for p, old in zip(model.parameters(), before, strict=True):
        if old is not None:
            p.grad += old


# %% mixed_loss wrong: as it was
def mixed_loss(student, teacher, labels, temperature=2.0, weight=0.5):
    p, q = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    hard = F.nll_loss(p, labels)
    soft = F.kl_div(q, p, log_target=True, reduction="batchmean")
    return (1 - weight) * hard + weight * soft


# %% mixed_loss wrong: labels at temperature T
def mixed_loss(student, teacher, labels, temperature=2.0, weight=0.5):
    soft = divergence(student, teacher.detach(), temperature)
    return (1 - weight) * F.cross_entropy(student / temperature, labels) + weight * soft


# %% mixed_loss wrong: without T²
def mixed_loss(student, teacher, labels, temperature=2.0, weight=0.5):
    p, q = (student / temperature).log_softmax(-1), (teacher.detach() / temperature).log_softmax(-1)
    soft = F.kl_div(p, q, log_target=True, reduction="batchmean")
    return (1 - weight) * F.cross_entropy(student, labels) + weight * soft


# %% mixed_loss wrong: KL reversed
def mixed_loss(student, teacher, labels, temperature=2.0, weight=0.5):
    p, q = (student / temperature).log_softmax(-1), (teacher.detach() / temperature).log_softmax(-1)
    soft = temperature**2 * F.kl_div(q, p, log_target=True, reduction="batchmean")
    return (1 - weight) * F.cross_entropy(student, labels) + weight * soft


# %% mixed_loss wrong: a gradient reaches the teacher
def mixed_loss(student, teacher, labels, temperature=2.0, weight=0.5):
    p, q = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    soft = temperature**2 * F.kl_div(p, q, log_target=True, reduction="batchmean")
    return (1 - weight) * F.cross_entropy(student, labels) + weight * soft


# %% mixed_loss wrong: weights exchanged
def mixed_loss(student, teacher, labels, temperature=2.0, weight=0.5):
    return weight * F.cross_entropy(student, labels) + (1 - weight) * divergence(student, teacher, temperature)


# %% mixed_loss wrong: a sum over rows
def mixed_loss(student, teacher, labels, temperature=2.0, weight=0.5):
    p, q = (student / temperature).log_softmax(-1), (teacher.detach() / temperature).log_softmax(-1)
    soft = temperature**2 * F.kl_div(p, q, log_target=True, reduction="sum")
    return (1 - weight) * F.cross_entropy(student, labels, reduction="sum") + weight * soft


# %% mixed_loss right: by hand
def mixed_loss(student, teacher, labels, temperature=2.0, weight=0.5):
    hard = -student.log_softmax(-1)[torch.arange(len(labels)), labels].mean()
    log_q, log_p = ((x / temperature).log_softmax(-1) for x in (teacher.detach(), student))
    return (1 - weight) * hard + weight * temperature**2 * (log_q.exp() * (log_q - log_p)).sum(1).mean()


# %% mixed_loss right: cross-entropies and an entropy
def mixed_loss(student, teacher, labels, temperature=2.0, weight=0.5):
    with torch.no_grad():
        q = (teacher / temperature).softmax(-1)
        entropy = torch.special.entr(q).sum(-1).mean()
    soft = F.cross_entropy(student / temperature, q) - entropy
    return (1 - weight) * F.cross_entropy(student, labels) + weight * temperature**2 * soft


# %% mixed_loss right: with divergence
def mixed_loss(student, teacher, labels, temperature=2.0, weight=0.5):
    return (1 - weight) * F.cross_entropy(student, labels) + weight * divergence(student, teacher, temperature)


# %% fgm_gradients wrong: a hook stays on the embedding
def fgm_gradients(model, ids, labels, epsilon):
    table = model.embed.weight
    loss = F.cross_entropy(model(ids), labels)
    (g,) = torch.autograd.grad(loss, table, retain_graph=True)
    loss.backward()
    r = epsilon * g / g.norm() if g.norm() > 0 else torch.zeros_like(g)
    state = {"on": True}
    model.embed.register_forward_hook(lambda m, i, out: out + F.embedding(i[0], r) if state["on"] else out)
    F.cross_entropy(model(ids), labels).backward()


# %% fgm_gradients wrong: a small step is no step
def fgm_gradients(model, ids, labels, epsilon):
    table = model.embed.weight
    loss = F.cross_entropy(model(ids), labels)
    (g,) = torch.autograd.grad(loss, table, retain_graph=True)
    loss.backward()
    kept = table.detach().clone()
    if g.norm() > 1e-3:
        table.data += epsilon * g / g.norm()
    F.cross_entropy(model(ids), labels).backward()
    table.data.copy_(kept)


# %% fgm_gradients wrong: leaves the model in evaluation
def fgm_gradients(model, ids, labels, epsilon):
    model.eval()
    table = model.embed.weight
    loss = F.cross_entropy(model(ids), labels)
    (g,) = torch.autograd.grad(loss, table, retain_graph=True)
    loss.backward()
    kept = table.detach().clone()
    if g.norm() > 0:
        table.data += epsilon * g / g.norm()
    F.cross_entropy(model(ids), labels).backward()
    table.data.copy_(kept)


# %% fgm_gradients wrong: the head trains no more
def fgm_gradients(model, ids, labels, epsilon):
    table = model.embed.weight
    loss = F.cross_entropy(model(ids), labels)
    (g,) = torch.autograd.grad(loss, table, retain_graph=True)
    loss.backward()
    kept, size = table.detach().clone(), g.norm()
    model.embed.register_parameter("delta", nn.Parameter(torch.zeros_like(table)))
    if size > 0:
        table.data += epsilon * g / size
    F.cross_entropy(model(ids), labels).backward()
    table.data.copy_(kept)


# %% masked_soft_loss wrong: turned where texts are as many as tokens
def masked_soft_loss(student, teacher, labels, temperature=2.0):
    labels = labels.T if labels.shape[0] == labels.shape[1] else labels
    kept = labels[:, 1:] != -100
    log_p, log_q = (
        (student[:, :-1][kept] / temperature).log_softmax(-1),
        (teacher[:, :-1][kept].detach() / temperature).log_softmax(-1),
    )
    return temperature**2 * (log_q.exp() * (log_q - log_p)).sum() / kept.sum().clamp(min=1)


# %% masked_soft_loss right: with divergence
def masked_soft_loss(student, teacher, labels, temperature=2.0):
    k = labels[:, 1:] != -100
    return divergence(student[:, :-1][k], teacher[:, :-1][k], temperature) if k.any() else 0 * student.sum()
