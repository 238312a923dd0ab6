# Answers to the assignment `select`: wrong ones, named after the misconception, and right ones written differently.
import torch
from torch import nn

from minipeft.targets import is_matrix

NONE = "no such bias"


# %% bitfit_names wrong: bias anywhere in the name
def bitfit_names(model):
    found = [n for n, _ in model.named_parameters() if "bias" in n]
    if not found:
        raise ValueError(NONE)
    return found


# %% bitfit_names wrong: the gate too
def bitfit_names(model):
    found = [n for n, _ in model.named_parameters() if n.endswith("bias")]
    if not found:
        raise ValueError(NONE)
    return found


# %% bitfit_names wrong: without the norms
def bitfit_names(model):
    found = [f"{p}.bias" for p, m in model.named_modules() if is_matrix(m) and getattr(m, "bias", None) is not None]
    if not found:
        raise ValueError(NONE)
    return found


# %% bitfit_names wrong: torch's own norms only
def bitfit_names(model):
    kinds = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
    suits = [(p, m) for p, m in model.named_modules() if is_matrix(m) or isinstance(m, kinds)]
    found = [f"{p}.bias" for p, m in suits if getattr(m, "bias", None) is not None]
    if not found:
        raise ValueError(NONE)
    return found


# %% bitfit_names wrong: nn.Linear and norms only
def bitfit_names(model):
    kinds = (nn.Linear, nn.LayerNorm)
    found = [f"{p}.bias" for p, m in model.named_modules() if isinstance(m, kinds) and m.bias is not None]
    if not found:
        raise ValueError(NONE)
    return found


# %% bitfit_names wrong: biases that are None
def bitfit_names(model):
    found = [f"{p}.bias" for p, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D", "LayerNorm")]
    if not any(getattr(m, "bias", None) is not None for _, m in model.named_modules()):
        raise ValueError(NONE)
    return found


# %% bitfit_names wrong: an empty list and no error
def bitfit_names(model):
    kinds = ("Linear", "Conv1D", "LayerNorm")
    return [f"{p}.bias" for p, m in model.named_modules() if type(m).__name__ in kinds and m.bias is not None]


# %% bitfit_names wrong: modules instead of parameters
def bitfit_names(model):
    kinds = ("Linear", "Conv1D", "LayerNorm")
    found = [p for p, m in model.named_modules() if type(m).__name__ in kinds and m.bias is not None]
    if not found:
        raise ValueError(NONE)
    return found


# %% bitfit_names right: a set
def bitfit_names(model):
    found = set()
    for path, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            if name == "bias" and (is_matrix(module) or "Norm" in type(module).__name__):
                found.add(path + ".bias")
    if len(found) == 0:
        raise ValueError(NONE)
    return found


# %% bitfit_names right: from the parameters' names
def bitfit_names(model):
    def suits(name):
        path, _, last = name.rpartition(".")
        kind = type(model.get_submodule(path)).__name__
        return last == "bias" and (kind in ("Linear", "Conv1D") or "Norm" in kind)

    names = sorted((n for n, _ in model.named_parameters() if suits(n)), reverse=True)
    assert_some = names or None
    if assert_some is None:
        raise ValueError(NONE)
    return names


# %% tune_softmax wrong: still tied
def tune_softmax(model):
    model.requires_grad_(False)
    model.head.weight.requires_grad_(True)
    return 0


# %% tune_softmax wrong: untied by name only
def tune_softmax(model):
    added = 0
    if model.head.weight is model.embed.weight:
        model.head.weight = nn.Parameter(model.head.weight.detach())
        added = model.head.weight.numel()
    model.requires_grad_(False)
    model.head.weight.requires_grad_(True)
    return added


# %% tune_softmax wrong: a fresh head
def tune_softmax(model):
    added = 0
    if model.head.weight is model.embed.weight:
        model.head.weight = nn.Parameter(torch.randn_like(model.embed.weight))
        added = model.head.weight.numel()
    model.requires_grad_(False)
    model.head.weight.requires_grad_(True)
    return added


# %% tune_softmax wrong: the body trains too
def tune_softmax(model):
    added = 0
    if model.head.weight is model.embed.weight:
        model.head.weight = nn.Parameter(model.head.weight.detach().clone())
        added = model.head.weight.numel()
    model.embed.requires_grad_(False)
    return added


# %% tune_softmax wrong: counts a copy that was not needed
def tune_softmax(model):
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    model.requires_grad_(False)
    model.head.weight.requires_grad_(True)
    return model.head.weight.numel()


# %% tune_softmax wrong: everything frozen
def tune_softmax(model):
    added = 0
    if model.head.weight is model.embed.weight:
        model.head.weight = nn.Parameter(model.head.weight.detach().clone())
        added = model.head.weight.numel()
    model.requires_grad_(False)
    return added


# %% tune_softmax wrong: returns nothing
def tune_softmax(model):
    if model.head.weight is model.embed.weight:
        model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    model.requires_grad_(False)
    model.head.weight.requires_grad_(True)


# %% tune_softmax right: the embedding gets the copy
def tune_softmax(model):
    tied = model.head.weight.data_ptr() == model.embed.weight.data_ptr()
    if tied:
        model.embed.weight = nn.Parameter(model.embed.weight.detach().clone())
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name == "head.weight"
    return model.head.weight.numel() if tied else 0


# %% tune_softmax right: a new layer
def tune_softmax(model):
    before = sum(p.numel() for p in model.parameters())
    words, width = model.head.weight.shape
    head = nn.Linear(width, words, bias=False, dtype=model.head.weight.dtype)
    with torch.no_grad():
        head.weight.copy_(model.head.weight)
    model.head = head
    for parameter in (*model.embed.parameters(), *model.body.parameters()):
        parameter.requires_grad_(False)
    return sum(p.numel() for p in model.parameters()) - before


# %% magnitude_mask wrong: each tensor its own share
def magnitude_mask(weights, share):
    masks = {}
    for name, w in weights.items():
        mask = torch.zeros(w.numel(), dtype=torch.bool)
        mask[w.abs().flatten().topk(round(share * w.numel())).indices] = True
        masks[name] = mask.reshape(w.shape)
    return masks


# %% magnitude_mask wrong: the sign counts
def magnitude_mask(weights, share):
    flat = torch.cat([w.flatten() for w in weights.values()])
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[flat.topk(round(share * len(flat))).indices] = True
    parts = mask.split([w.numel() for w in weights.values()])
    return {n: p.reshape(w.shape) for (n, w), p in zip(weights.items(), parts, strict=True)}


# %% magnitude_mask wrong: the smallest
def magnitude_mask(weights, share):
    flat = torch.cat([w.abs().flatten() for w in weights.values()])
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[flat.topk(round(share * len(flat)), largest=False).indices] = True
    parts = mask.split([w.numel() for w in weights.values()])
    return {n: p.reshape(w.shape) for (n, w), p in zip(weights.items(), parts, strict=True)}


# %% magnitude_mask wrong: numbers instead of bools
def magnitude_mask(weights, share):
    flat = torch.cat([w.abs().flatten() for w in weights.values()])
    mask = torch.zeros(len(flat))
    mask[flat.topk(round(share * len(flat))).indices] = 1.0
    parts = mask.split([w.numel() for w in weights.values()])
    return {n: p.reshape(w.shape) for (n, w), p in zip(weights.items(), parts, strict=True)}


# %% magnitude_mask wrong: flat masks
def magnitude_mask(weights, share):
    flat = torch.cat([w.abs().flatten() for w in weights.values()])
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[flat.topk(round(share * len(flat))).indices] = True
    return dict(zip(weights, mask.split([w.numel() for w in weights.values()]), strict=True))


# %% magnitude_mask wrong: one too many
def magnitude_mask(weights, share):
    flat = torch.cat([w.abs().flatten() for w in weights.values()])
    threshold = flat.sort(descending=True).values[min(round(share * len(flat)), len(flat) - 1)]
    return {n: w.abs() >= threshold for n, w in weights.items()}


# %% magnitude_mask wrong: halves are rounded up
def magnitude_mask(weights, share):
    flat = torch.cat([w.abs().flatten() for w in weights.values()])
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[flat.topk(int(share * len(flat) + 0.5)).indices] = True
    parts = chosen.split([w.numel() for w in weights.values()])
    return {name: part.reshape(w.shape) for (name, w), part in zip(weights.items(), parts, strict=True)}


# %% magnitude_mask wrong: fails at the edges
def magnitude_mask(weights, share):
    flat = torch.cat([w.abs().flatten() for w in weights.values()])
    threshold = flat.quantile(1 - share) if share else flat.max()
    return {n: w.abs() >= threshold for n, w in weights.items()}


# %% magnitude_mask wrong: the weights are zeroed
def magnitude_mask(weights, share):
    flat = torch.cat([w.abs().flatten() for w in weights.values()])
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[flat.topk(round(share * len(flat))).indices] = True
    parts = mask.split([w.numel() for w in weights.values()])
    masks = {n: p.reshape(w.shape) for (n, w), p in zip(weights.items(), parts, strict=True)}
    for name, w in weights.items():
        w[~masks[name]] = 0.0
    return masks


# %% magnitude_mask right: ranks
def magnitude_mask(weights, share):
    flat = torch.cat([w.abs().reshape(-1) for w in weights.values()])
    rank = flat.argsort(descending=True).argsort()
    keep, start, masks = rank < round(share * len(flat)), 0, {}
    for name, w in weights.items():
        masks[name] = keep[start : start + w.numel()].view_as(w)
        start += w.numel()
    return masks


# %% magnitude_mask right: a heap
import heapq


def magnitude_mask(weights, share):
    masks = {n: torch.zeros_like(w, dtype=torch.bool) for n, w in weights.items()}
    places = [(v, n, i) for n, w in weights.items() for i, v in enumerate(w.abs().flatten().tolist())]
    for _, n, i in heapq.nlargest(round(share * len(places)), places):
        masks[n].view(-1)[i] = True
    return masks


# %% magnitude_mask wrong: a threshold, which lets all equals in
def magnitude_mask(weights, share):
    values = sorted((abs(v) for w in weights.values() for v in w.flatten().tolist()), reverse=True)
    k = round(share * len(values))
    if k == 0:
        return {n: torch.zeros_like(w, dtype=torch.bool) for n, w in weights.items()}
    return {n: w.abs() >= values[k - 1] for n, w in weights.items()}


# %% magnitude_mask right: a sorted list of places
def magnitude_mask(weights, share):
    places = [(-abs(v), name, i) for name, w in weights.items() for i, v in enumerate(w.flatten().tolist())]
    chosen = {(name, i) for _, name, i in sorted(places)[: round(share * len(places))]}
    return {
        name: torch.tensor([(name, i) in chosen for i in range(w.numel())], dtype=torch.bool).view_as(w)
        for name, w in weights.items()
    }


# %% fisher_importance wrong: the mean gradient squared
def fisher_importance(model, inputs, labels):
    loss = nn.functional.cross_entropy(model(inputs), labels)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return {n: g.square() for (n, _), g in zip(model.named_parameters(), gradients, strict=True)}


# %% fisher_importance wrong: a sum
def fisher_importance(model, inputs, labels):
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for x, y in zip(inputs, labels, strict=True):
        gradients = torch.autograd.grad(model(x).log_softmax(-1)[y], list(model.parameters()))
        for t, g in zip(total.values(), gradients, strict=True):
            t += g.square()
    return total


# %% fisher_importance wrong: not squared
def fisher_importance(model, inputs, labels):
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for x, y in zip(inputs, labels, strict=True):
        gradients = torch.autograd.grad(model(x).log_softmax(-1)[y], list(model.parameters()))
        for t, g in zip(total.values(), gradients, strict=True):
            t += g.abs() / len(inputs)
    return total


# %% fisher_importance wrong: the probability, not its logarithm
def fisher_importance(model, inputs, labels):
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for x, y in zip(inputs, labels, strict=True):
        gradients = torch.autograd.grad(model(x).softmax(-1)[y], list(model.parameters()))
        for t, g in zip(total.values(), gradients, strict=True):
            t += g.square() / len(inputs)
    return total


# %% fisher_importance wrong: the raw logit
def fisher_importance(model, inputs, labels):
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for x, y in zip(inputs, labels, strict=True):
        gradients = torch.autograd.grad(model(x)[y], list(model.parameters()))
        for t, g in zip(total.values(), gradients, strict=True):
            t += g.square() / len(inputs)
    return total


# %% fisher_importance wrong: gradients pile up
def fisher_importance(model, inputs, labels):
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for x, y in zip(inputs, labels, strict=True):
        model(x).log_softmax(-1)[y].backward()
        for n, p in model.named_parameters():
            total[n] += p.grad.square() / len(inputs)
    return total


# %% fisher_importance wrong: the weights are trained on the way
def fisher_importance(model, inputs, labels):
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for x, y in zip(inputs, labels, strict=True):
        gradients = torch.autograd.grad(model(x).log_softmax(-1)[y], list(model.parameters()))
        for t, g in zip(total.values(), gradients, strict=True):
            t += g.square() / len(inputs)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1
    return total


# %% fisher_importance right: backward of the loss
def fisher_importance(model, inputs, labels):
    squares = {n: [] for n, _ in model.named_parameters()}
    for i in range(len(inputs)):
        model.zero_grad()
        nn.functional.cross_entropy(model(inputs[i : i + 1]), labels[i : i + 1]).backward()
        for n, p in model.named_parameters():
            squares[n].append(p.grad.detach().clone() ** 2)
    return {n: torch.stack(several).mean(dim=0) for n, several in squares.items()}


# %% fisher_importance right: vmap
def fisher_importance(model, inputs, labels):
    from torch.func import functional_call, grad, vmap

    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def log_p(parameters, x, y):
        return functional_call(model, parameters, (x,)).log_softmax(-1).gather(-1, y[None])[0]

    each = vmap(grad(log_p), in_dims=(None, 0, 0))(parameters, inputs, labels)
    return {n: g.pow(2).mean(0) for n, g in each.items()}


# %% MaskedAdamW wrong: only the gradient is masked
class MaskedAdamW:
    def __init__(self, params, masks, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        self.params, self.masks = params, masks
        self.inner = torch.optim.AdamW(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def step(self):
        for p, m in zip(self.params, self.masks, strict=True):
            p.grad = torch.where(m, p.grad, torch.zeros_like(p.grad))
        self.inner.step()


# %% MaskedAdamW wrong: the gradient is multiplied by the mask
class MaskedAdamW:
    def __init__(self, params, masks, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        self.params, self.masks, self.start = params, masks, [p.detach().clone() for p in params]
        self.inner = torch.optim.AdamW(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self):
        for p, m in zip(self.params, self.masks, strict=True):
            p.grad *= m
        self.inner.step()
        for p, m, start in zip(self.params, self.masks, self.start, strict=True):
            p.mul_(m).add_(start * ~m)


# %% MaskedAdamW wrong: without weight decay
class MaskedAdamW:
    def __init__(self, params, masks, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        self.params, self.masks = params, masks
        self.entries = [nn.Parameter(p.detach()[m].clone()) for p, m in zip(params, masks, strict=True)]
        self.inner = torch.optim.AdamW(self.entries, lr=lr, betas=betas, eps=eps, weight_decay=0.0)

    @torch.no_grad()
    def step(self):
        for p, m, e in zip(self.params, self.masks, self.entries, strict=True):
            e.grad = p.grad[m]
        self.inner.step()
        for p, m, e in zip(self.params, self.masks, self.entries, strict=True):
            p[m] = e


# %% MaskedAdamW wrong: Adam's weight decay
class MaskedAdamW:
    def __init__(self, params, masks, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        self.params, self.masks = params, masks
        self.entries = [nn.Parameter(p.detach()[m].clone()) for p, m in zip(params, masks, strict=True)]
        self.inner = torch.optim.Adam(self.entries, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self):
        for p, m, e in zip(self.params, self.masks, self.entries, strict=True):
            e.grad = p.grad[m]
        self.inner.step()
        for p, m, e in zip(self.params, self.masks, self.entries, strict=True):
            p[m] = e


# %% MaskedAdamW wrong: the mask is inverted
class MaskedAdamW:
    def __init__(self, params, masks, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        self.params, self.masks = params, [~m for m in masks]
        self.entries = [nn.Parameter(p.detach()[m].clone()) for p, m in zip(params, self.masks, strict=True)]
        self.inner = torch.optim.AdamW(self.entries, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self):
        for p, m, e in zip(self.params, self.masks, self.entries, strict=True):
            e.grad = p.grad[m]
        self.inner.step()
        for p, m, e in zip(self.params, self.masks, self.entries, strict=True):
            p[m] = e


# %% MaskedAdamW wrong: forgets its moments
class MaskedAdamW:
    def __init__(self, params, masks, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        self.params, self.masks = params, masks
        self.settings = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self):
        for p, m in zip(self.params, self.masks, strict=True):
            entries = nn.Parameter(p.detach()[m].clone())
            entries.grad = p.grad[m]
            torch.optim.AdamW([entries], **self.settings).step()
            p[m] = entries


# %% MaskedAdamW wrong: plain gradient descent
class MaskedAdamW:
    def __init__(self, params, masks, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        self.params, self.masks, self.lr = params, masks, lr

    @torch.no_grad()
    def step(self):
        for p, m in zip(self.params, self.masks, strict=True):
            p[m] -= self.lr * p.grad[m]


# %% MaskedAdamW wrong: put back by arithmetic
class MaskedAdamW:
    def __init__(self, params, masks, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        self.params, self.masks = params, masks
        self.inner = torch.optim.AdamW(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.lr, self.decay = lr, weight_decay

    @torch.no_grad()
    def step(self):
        for p, m in zip(self.params, self.masks, strict=True):
            p.grad[~m] = 0.0
        self.inner.step()
        for p, m in zip(self.params, self.masks, strict=True):
            p[~m] /= 1 - self.lr * self.decay


# %% MaskedAdamW right: all of Adam, and the old entries put back
class MaskedAdamW:
    def __init__(self, params, masks, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        self.params, self.masks, self.start = params, masks, [p.detach().clone() for p in params]
        self.inner = torch.optim.AdamW(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self):
        for p, m in zip(self.params, self.masks, strict=True):
            p.grad[~m] = 0.0
        self.inner.step()
        for p, m, start in zip(self.params, self.masks, self.start, strict=True):
            p.copy_(torch.where(m, p, start))


# %% MaskedAdamW right: the formulas of Adam
class MaskedAdamW:
    def __init__(self, params, masks, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        self.all = [(p, m, torch.zeros_like(p[m]), torch.zeros_like(p[m])) for p, m in zip(params, masks, strict=True)]
        self.lr, self.betas, self.eps, self.decay, self.t = lr, betas, eps, weight_decay, 0

    @torch.no_grad()
    def step(self):
        self.t += 1
        b1, b2 = self.betas
        for p, mask, first, second in self.all:
            g, w = p.grad[mask], p[mask]
            first.mul_(b1).add_((1 - b1) * g)
            second.mul_(b2).add_((1 - b2) * g * g)
            m, v = first / (1 - b1**self.t), second / (1 - b2**self.t)
            p[mask] = w * (1 - self.lr * self.decay) - self.lr * m / (v.sqrt() + self.eps)


# %% layer_range wrong: as it was
def layer_range(names, first, last):
    return [name for name in names if any(f".{i}" in name for i in range(first, last))]


# %% layer_range wrong: the last is left out
def layer_range(names, first, last):
    def number(name):
        return next((int(part) for part in name.split(".") if part.isdigit()), -1)

    found = [n for n in names if first <= number(n) < last]
    if not found:
        raise ValueError("none")
    return found


# %% layer_range wrong: one in ten
def layer_range(names, first, last):
    found = [n for n in names if any(f".{i}" in n for i in range(first, last + 1))]
    if not found:
        raise ValueError("none")
    return found


# %% layer_range wrong: any number in the name
def layer_range(names, first, last):
    found = [n for n in names if any(p.isdigit() and first <= int(p) <= last for p in n.split("."))]
    if not found:
        raise ValueError("none")
    return found


# %% layer_range wrong: no error
def layer_range(names, first, last):
    def number(name):
        return next((int(part) for part in name.split(".") if part.isdigit()), -1)

    return [n for n in names if first <= number(n) <= last]


# %% layer_range wrong: compared as text
def layer_range(names, first, last):
    def number(name):
        return next((part for part in name.split(".") if part.isdigit()), "")

    found = [n for n in names if str(first) <= number(n) <= str(last)]
    if not found:
        raise ValueError("none")
    return found


# %% layer_range wrong: one style of names
def layer_range(names, first, last):
    found = [n for n in names for i in range(first, last + 1) if f".layers.{i}." in n]
    if not found:
        raise ValueError("none")
    return found


# %% layer_range right: a regular expression
import re


def layer_range(names, first, last):
    chosen = []
    for name in names:
        match = re.match(r"(?:[^.]*[^.\d][^.]*\.)*?(\d+)(?:\.|$)", name)
        if match and int(match.group(1)) in range(first, last + 1):
            chosen.append(name)
    if not chosen:
        raise ValueError("no layer in that range")
    return chosen


# %% layer_range right: a set of numbers
def layer_range(names, first, last):
    wanted = {str(i) for i in range(first, last + 1)}
    digits = {name: [part for part in name.split(".") if part.isnumeric()][:1] for name in names}
    chosen = tuple(name for name in names if wanted.intersection(digits[name]))
    if len(chosen) == 0:
        raise ValueError
    return list(chosen)


# %% tune_softmax wrong: the grad mode is left off
def tune_softmax(model):
    torch.set_grad_enabled(False)
    added = 0
    if model.head.weight is model.embed.weight:
        model.head.weight = nn.Parameter(model.head.weight.detach().clone())
        added = model.head.weight.numel()
    model.requires_grad_(False)
    model.head.weight.requires_grad_(True)
    return added


# %% layer_range wrong: sorted by number
def layer_range(names, first, last):
    def number(name):
        return next((int(part) for part in name.split(".") if part.isdigit()), -1)

    found = sorted((name for name in names if first <= number(name) <= last), key=number)
    if not found:
        raise ValueError("none")
    return found


# %% layer_range wrong: needs dots on both sides
def layer_range(names, first, last):
    import re

    out = [n for n in names if (m := re.search(r"\.(\d+)\.", n)) and first <= int(m[1]) <= last]
    if not out:
        raise ValueError("none")
    return out


# %% layer_range wrong: names come back in small letters
def layer_range(names, first, last):
    found = []
    for name in map(str.lower, names):
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        if numbers and first <= numbers[0] <= last:
            found.append(name)
    if not found:
        raise ValueError("none")
    return found


# %% tune_softmax wrong: tied is taken for equal numbers
def tune_softmax(model):
    added = 0
    if torch.equal(model.head.weight, model.embed.weight):
        model.head.weight = nn.Parameter(model.head.weight.detach().clone())
        added = model.head.weight.numel()
    for p in model.parameters():
        p.requires_grad = False
    model.head.weight.requires_grad = True
    return added


# %% bitfit_names wrong: norm in the path, not in the class
def bitfit_names(model):
    found = [
        f"{path}.bias"
        for path, m in model.named_modules()
        if (is_matrix(m) or "norm" in path.lower()) and getattr(m, "bias", None) is not None
    ]
    if not found:
        raise ValueError("none")
    return found


# %% bitfit_names wrong: norm with a small letter
def bitfit_names(model):
    found = [
        f"{path}.bias"
        for path, m in model.named_modules()
        if (is_matrix(m) or "norm" in type(m).__name__.lower()) and getattr(m, "bias", None) is not None
    ]
    if not found:
        raise ValueError("none")
    return found


# %% bitfit_names wrong: the class ends in Norm
def bitfit_names(model):
    found = [
        f"{path}.bias"
        for path, m in model.named_modules()
        if (is_matrix(m) or type(m).__name__.endswith("Norm")) and getattr(m, "bias", None) is not None
    ]
    if not found:
        raise ValueError("none")
    return found


# %% magnitude_mask wrong: equal masks are one tensor
def magnitude_mask(weights, share):
    flat = torch.cat([w.abs().flatten() for w in weights.values()])
    k = round(share * len(flat))
    if k in (0, len(flat)):
        whole = torch.full((max(w.numel() for w in weights.values()),), k > 0)
        return {n: whole[: w.numel()].view(w.shape) for n, w in weights.items()}
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[flat.topk(k).indices] = True
    parts = chosen.split([w.numel() for w in weights.values()])
    return {n: p.reshape(w.shape) for (n, w), p in zip(weights.items(), parts, strict=False)}


# %% magnitude_mask wrong: ranked in bfloat16
def magnitude_mask(weights, share):
    flat = torch.cat([w.abs().flatten().bfloat16() for w in weights.values()])
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[flat.topk(round(share * len(flat))).indices] = True
    parts = chosen.split([w.numel() for w in weights.values()])
    return {n: p.reshape(w.shape) for (n, w), p in zip(weights.items(), parts, strict=False)}


# %% magnitude_mask wrong: viewed flat
def magnitude_mask(weights, share):
    flat = torch.cat([w.view(-1).abs() for w in weights.values()])
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[flat.topk(round(share * len(flat))).indices] = True
    parts = chosen.split([w.numel() for w in weights.values()])
    return {n: p.view(w.shape) for (n, w), p in zip(weights.items(), parts, strict=False)}


# %% magnitude_mask right: by ranks of an argsort
def magnitude_mask(weights, share):
    flat = torch.cat([w.detach().double().abs().reshape(-1) for w in weights.values()])
    rank = flat.argsort(descending=True, stable=True).argsort()
    chosen, out, at = rank < round(share * len(flat)), {}, 0
    for n, w in weights.items():
        out[n] = chosen[at : at + w.numel()].reshape(w.shape).clone()
        at += w.numel()
    return out


# %% tune_softmax wrong: leaves the model in evaluation
def tune_softmax(model):
    added = 0
    if model.head.weight is model.embed.weight:
        model.head.weight = nn.Parameter(model.head.weight.detach().clone())
        added = model.head.weight.numel()
    model.eval()
    model.requires_grad_(False)
    model.head.weight.requires_grad_(True)
    return added


# %% fisher_importance wrong: leaves the model in training
def fisher_importance(model, inputs, labels):
    model.train()
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for x, y in zip(inputs, labels, strict=False):
        lp = model(x).log_softmax(-1)[y]
        for g, t in zip(torch.autograd.grad(lp, list(model.parameters())), total.values(), strict=False):
            t += g.square() / len(inputs)
    return total
