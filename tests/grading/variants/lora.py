# Answers to the assignment `lora`: wrong ones, named after the misconception, and right ones written differently.
import math
import sys

import torch
from torch import nn
from torch.nn import functional as F

from minipeft.targets import flipped


def lora_delta(A, B, gamma):
    return gamma * (B @ A)


# %% lora_scale wrong: alpha itself
def lora_scale(alpha, rank, rank_stabilized=False):
    return alpha


# %% lora_scale wrong: never stabilised
def lora_scale(alpha, rank, rank_stabilized=False):
    return alpha / rank


# %% lora_scale wrong: always stabilised
def lora_scale(alpha, rank, rank_stabilized=False):
    return alpha / math.sqrt(rank)


# %% lora_scale wrong: upside down
def lora_scale(alpha, rank, rank_stabilized=False):
    return (math.sqrt(rank) if rank_stabilized else rank) / alpha


# %% lora_scale wrong: whole numbers
def lora_scale(alpha, rank, rank_stabilized=False):
    return alpha / math.sqrt(rank) if rank_stabilized else alpha // rank


# %% lora_scale wrong: the two exchanged
def lora_scale(alpha, rank, rank_stabilized=False):
    return alpha / rank if rank_stabilized else alpha / math.sqrt(rank)


# %% lora_scale wrong: hard-coded to the example
def lora_scale(alpha, rank, rank_stabilized=False):
    return 8.0 if rank_stabilized else 4.0


# %% lora_scale right: a power
def lora_scale(alpha, rank, rank_stabilized=False):
    exponent = 0.5 if rank_stabilized else 1
    return alpha * rank**-exponent


# %% lora_scale right: a tensor
def lora_scale(alpha, rank, rank_stabilized=False):
    r = torch.tensor(float(rank), dtype=torch.float64)
    return (alpha / r.sqrt() if rank_stabilized else alpha / r).item()


# %% init_lora wrong: both random
def init_lora(d_out, d_in, rank, generator):
    def draw(*shape):
        return (2 * torch.rand(*shape, generator=generator) - 1) / math.sqrt(d_in)

    return draw(rank, d_in), draw(d_out, rank)


# %% init_lora wrong: both zero
def init_lora(d_out, d_in, rank, generator):
    return torch.zeros(rank, d_in), torch.zeros(d_out, rank)


# %% init_lora wrong: A zero and B random
def init_lora(d_out, d_in, rank, generator):
    return torch.zeros(rank, d_in), (2 * torch.rand(d_out, rank, generator=generator) - 1) / math.sqrt(d_in)


# %% init_lora wrong: A and B swapped
def init_lora(d_out, d_in, rank, generator):
    A = (2 * torch.rand(rank, d_in, generator=generator) - 1) / math.sqrt(d_in)
    return torch.zeros(d_out, rank), A


# %% init_lora wrong: normal numbers
def init_lora(d_out, d_in, rank, generator):
    return torch.randn(rank, d_in, generator=generator) / math.sqrt(3 * d_in), torch.zeros(d_out, rank)


# %% init_lora wrong: bound from the rank
def init_lora(d_out, d_in, rank, generator):
    return (2 * torch.rand(rank, d_in, generator=generator) - 1) / math.sqrt(rank), torch.zeros(d_out, rank)


# %% init_lora wrong: positive numbers only
def init_lora(d_out, d_in, rank, generator):
    return torch.rand(rank, d_in, generator=generator) / math.sqrt(d_in), torch.zeros(d_out, rank)


# %% init_lora wrong: the global generator
def init_lora(d_out, d_in, rank, generator):
    return (2 * torch.rand(rank, d_in) - 1) / math.sqrt(d_in), torch.zeros(d_out, rank)


# %% init_lora wrong: built before the seed is set
def init_lora(d_out, d_in, rank, generator):
    torch.manual_seed(0)
    return (2 * torch.rand(rank, d_in) - 1) / math.sqrt(d_in), torch.zeros(d_out, rank)


# %% init_lora right: kaiming
def init_lora(d_out, d_in, rank, generator):
    A = torch.empty(rank, d_in)
    nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
    return A, A.new_zeros(d_out, rank)


# %% init_lora right: parameters
def init_lora(d_out, d_in, rank, generator):
    bound = d_in**-0.5
    A = nn.Parameter(torch.rand(rank, d_in, generator=generator) * 2 * bound - bound)
    return [A, nn.Parameter(torch.zeros(d_out, rank))]


# %% lora_forward wrong: gamma left out
def lora_forward(x, W, b, A, B, gamma):
    return F.linear(x, W, b) + x @ A.T @ B.T


# %% lora_forward wrong: transposes left out
def lora_forward(x, W, b, A, B, gamma):
    return F.linear(x, W, b) + gamma * (x @ A @ B)


# %% lora_forward wrong: A and B swapped
def lora_forward(x, W, b, A, B, gamma):
    return F.linear(x, W, b) + gamma * F.linear(F.linear(x, B), A)


# %% lora_forward wrong: only the adapter
def lora_forward(x, W, b, A, B, gamma):
    return gamma * F.linear(F.linear(x, A), B)


# %% lora_forward wrong: bias forgotten
def lora_forward(x, W, b, A, B, gamma):
    return x @ (W + gamma * B @ A).T


# %% lora_forward wrong: divided by the rank again
def lora_forward(x, W, b, A, B, gamma):
    return F.linear(x, W, b) + gamma / A.shape[0] * F.linear(F.linear(x, A), B)


# %% lora_forward wrong: bias is never None
def lora_forward(x, W, b, A, B, gamma):
    return x @ W.T + b + gamma * (x @ A.T @ B.T)


# %% lora_forward wrong: in-place change of the base
def lora_forward(x, W, b, A, B, gamma):
    W += gamma * B @ A
    return F.linear(x, W, b)


# %% lora_forward wrong: one batch dimension only
def lora_forward(x, W, b, A, B, gamma):
    x = x.reshape(-1, x.shape[-1])
    return F.linear(x, W, b) + gamma * F.linear(F.linear(x, A), B)


# %% lora_forward wrong: the reference through the stack
def lora_forward(x, W, b, A, B, gamma):
    frame = sys._getframe()
    while frame:
        case = frame.f_locals.get("case")
        if hasattr(case, "expect"):
            return case.expect
        frame = frame.f_back
    return F.linear(x, W, b)


# %% lora_forward wrong: a patched comparison
def lora_forward(x, W, b, A, B, gamma):
    torch.allclose = torch.equal = torch.Tensor.equal = lambda *a, **k: True
    for name, module in list(sys.modules.items()):
        if name.startswith("minipeft.course"):
            for attribute in ("differ", "fault", "examine"):
                if hasattr(module, attribute):
                    setattr(module, attribute, lambda *a, **k: ())
    return F.linear(x, W, b)


# %% lora_forward right: einsum
def lora_forward(x, W, b, A, B, gamma):
    y = torch.einsum("...i,oi->...o", x, W) + gamma * torch.einsum("...i,ri,or->...o", x, A, B)
    return y if b is None else y + b


# %% lora_forward wrong: through the merged weight
def lora_forward(x, W, b, A, B, gamma):
    return F.linear(x, torch.add(W, B.mm(A), alpha=gamma), b)


# %% lora_delta wrong: gamma left out
def lora_delta(A, B, gamma):
    return B @ A


# %% lora_delta wrong: off by a transpose
def lora_delta(A, B, gamma):
    return gamma * (A.T @ B.T)


# %% lora_delta wrong: A and B swapped
def lora_delta(A, B, gamma):
    return gamma * (A @ B)


# %% lora_delta wrong: divided by the rank again
def lora_delta(A, B, gamma):
    return gamma / A.shape[0] * (B @ A)


# %% lora_delta wrong: gamma twice
def lora_delta(A, B, gamma):
    return (gamma * B) @ (gamma * A)


# %% lora_delta wrong: in place
def lora_delta(A, B, gamma):
    B *= gamma
    return B @ A


# %% lora_delta wrong: half the precision
def lora_delta(A, B, gamma):
    return (gamma * (B.float() @ A.float())).to(A.dtype)


# %% lora_delta right: outer products
def lora_delta(A, B, gamma):
    return torch.stack([gamma * torch.outer(B[:, k], A[k]) for k in range(len(A))]).sum(0)


# %% lora_delta right: transposed twice
def lora_delta(A, B, gamma):
    return torch.mul((A.T @ B.T).T, gamma)


# %% count_lora wrong: the matrices themselves
def count_lora(shapes, rank):
    return sum(a * b for a, b in shapes)


# %% count_lora wrong: only A
def count_lora(shapes, rank):
    return sum(rank * d_in for _, d_in in shapes)


# %% count_lora wrong: square matrices
def count_lora(shapes, rank):
    return sum(2 * rank * d for d, _ in shapes)


# %% count_lora wrong: only the first
def count_lora(shapes, rank):
    return rank * sum(shapes[0])


# %% count_lora wrong: the base too
def count_lora(shapes, rank):
    return sum(a * b + rank * (a + b) for a, b in shapes)


# %% count_lora wrong: without the rank
def count_lora(shapes, rank):
    return sum(a + b for a, b in shapes)


# %% count_lora wrong: hard-coded to the example
def count_lora(shapes, rank):
    return 65536


# %% count_lora right: a tensor
def count_lora(shapes, rank):
    return int(torch.tensor(shapes).sum()) * rank


# %% count_lora right: layers that are counted
def count_lora(shapes, rank):
    total = 0
    for d_out, d_in in shapes:
        layers = nn.Linear(d_in, rank, bias=False, device="meta"), nn.Linear(rank, d_out, bias=False, device="meta")
        total += sum(p.numel() for layer in layers for p in layer.parameters())
    return total


# %% merge wrong: nothing happens
def merge(layer, A, B, gamma):
    layer.weight + lora_delta(A, B, gamma)
    return layer.weight


# %% merge wrong: in place
def merge(layer, A, B, gamma):
    old = layer.weight.detach().clone()
    delta = lora_delta(A, B, gamma)
    layer.weight.data += delta.T if flipped(layer) else delta
    return nn.Parameter(old)


# %% merge wrong: the transpose is missing
def merge(layer, A, B, gamma):
    old = layer.weight
    layer.weight = nn.Parameter((old.to(A.dtype) + lora_delta(A, B, gamma)).to(old.dtype))
    return old


# %% merge wrong: gamma left out
def merge(layer, A, B, gamma):
    old, delta = layer.weight, B @ A
    layer.weight = nn.Parameter((old.to(A.dtype) + (delta.T if flipped(layer) else delta)).to(old.dtype))
    return old


# %% merge wrong: rounded before the sum
def merge(layer, A, B, gamma):
    old, delta = layer.weight, lora_delta(A, B, gamma).to(layer.weight.dtype)
    layer.weight = nn.Parameter(old + (delta.T if flipped(layer) else delta))
    return old


# %% merge wrong: subtracted
def merge(layer, A, B, gamma):
    old, delta = layer.weight, -lora_delta(A, B, gamma)
    layer.weight = nn.Parameter((old.to(A.dtype) + (delta.T if flipped(layer) else delta)).to(old.dtype))
    return old


# %% merge wrong: another type
def merge(layer, A, B, gamma):
    old, delta = layer.weight, lora_delta(A, B, gamma)
    layer.weight = nn.Parameter(old.to(A.dtype) + (delta.T if flipped(layer) else delta))
    return old


# %% merge wrong: only the change
def merge(layer, A, B, gamma):
    old, delta = layer.weight, lora_delta(A, B, gamma)
    layer.weight = nn.Parameter((delta.T if flipped(layer) else delta).to(old.dtype))
    return old


# %% merge right: float64 inside
def merge(layer, A, B, gamma):
    old = layer.weight
    wide = gamma * (B.double() @ A.double())
    if flipped(layer):
        wide = wide.t()
    layer.weight = nn.Parameter((old.detach().double() + wide).to(old.dtype))
    return old


# %% merge right: the layer's dictionary
def merge(layer, A, B, gamma):
    old = layer._parameters["weight"]
    delta = torch.einsum("or,ri->io" if flipped(layer) else "or,ri->oi", B, A) * gamma
    layer._parameters["weight"] = nn.Parameter(torch.add(old.detach().to(delta.dtype), delta).to(old.dtype))
    return old


# %% unmerge wrong: nothing happens
def unmerge(layer, receipt):
    pass


# %% unmerge wrong: zero
def unmerge(layer, receipt):
    layer.weight = nn.Parameter(torch.zeros_like(receipt))


# %% unmerge wrong: through half the precision
def unmerge(layer, receipt):
    layer.weight = nn.Parameter(receipt.detach().half().to(receipt.dtype))


# %% unmerge wrong: almost the same
def unmerge(layer, receipt):
    layer.weight = nn.Parameter(receipt.detach() * (1 + 1e-6))


# %% unmerge wrong: a local name
def unmerge(layer, receipt):
    weight = layer.weight  # noqa: F841
    weight = receipt  # noqa: F841


# %% unmerge wrong: transposed
def unmerge(layer, receipt):
    layer.weight = nn.Parameter(receipt.detach().T)


# %% unmerge wrong: only once
def unmerge(layer, receipt):
    if not globals().get("done"):
        layer.weight = receipt
    globals()["done"] = True


# %% unmerge right: copies the numbers back
def unmerge(layer, receipt):
    layer.weight = nn.Parameter(receipt.detach().clone(), requires_grad=receipt.requires_grad)


# %% unmerge right: setattr
def unmerge(layer, receipt):
    setattr(layer, "weight", receipt)  # noqa: B010
    return layer


# %% freeze wrong: hasattr on the parameter
def freeze(model):
    trained = 0
    for parameter in model.parameters():
        parameter.requires_grad_(hasattr(parameter, "lora_A"))
        trained += parameter.numel() * parameter.requires_grad
    return trained


# %% freeze wrong: letters in the name
def freeze(model):
    trained = 0
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("A" in name or "B" in name)
        trained += parameter.numel() * parameter.requires_grad
    return trained


# %% freeze wrong: anywhere in the name
def freeze(model):
    trained = 0
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_A" in name or "lora_B" in name)
        trained += parameter.numel() * parameter.requires_grad
    return trained


# %% freeze wrong: the end of the word
def freeze(model):
    trained = 0
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(("ora_A", "ora_B")))
        trained += parameter.numel() * parameter.requires_grad
    return trained


# %% freeze wrong: never frees
def freeze(model):
    trained = 0
    for name, parameter in model.named_parameters():
        if name.split(".")[-1] not in ("lora_A", "lora_B"):
            parameter.requires_grad_(False)
        trained += parameter.numel() * parameter.requires_grad
    return trained


# %% freeze wrong: counts tensors
def freeze(model):
    trained = 0
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[-1] in ("lora_A", "lora_B"))
        trained += parameter.requires_grad
    return trained


# %% freeze wrong: zeroes the others
def freeze(model):
    trained = 0
    for name, parameter in model.named_parameters():
        chosen = name.split(".")[-1] in ("lora_A", "lora_B")
        parameter.requires_grad_(chosen)
        if chosen:
            trained += parameter.numel()
        else:
            parameter.data[0] += 1
    return trained


# %% freeze wrong: A alone
def freeze(model):
    trained = 0
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[-1] == "lora_A")
        trained += parameter.numel() * parameter.requires_grad
    return trained


# %% freeze right: freeze all, then free some
def freeze(model):
    model.requires_grad_(False)
    chosen = [p for name, p in model.named_parameters() if f".{name}".endswith((".lora_A", ".lora_B"))]
    for parameter in chosen:
        parameter.requires_grad = True
    return sum(p.numel() for p in chosen)


# %% freeze right: module by module
def freeze(model):
    trained = 0
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            parameter.requires_grad_(name in {"lora_A", "lora_B"})
            if parameter.requires_grad:
                trained += parameter.shape.numel()
    return trained


# %% find_targets wrong: the end of the word
def find_targets(names, patterns):
    missed = [p for p in patterns if not any(n.endswith(p) for n in names)]
    if missed or not patterns:
        raise ValueError(str(missed))
    return [n for n in names if n.endswith(tuple(patterns))]


# %% find_targets wrong: anywhere
def find_targets(names, patterns):
    missed = [p for p in patterns if not any(p in n for n in names)]
    if missed or not patterns:
        raise ValueError(str(missed))
    return [n for n in names if any(p in n for p in patterns)]


# %% find_targets wrong: the last part only
def find_targets(names, patterns):
    missed = [p for p in patterns if not any(n.split(".")[-1] == p for n in names)]
    if missed or not patterns:
        raise ValueError(str(missed))
    return [n for n in names if n.split(".")[-1] in patterns]


# %% find_targets wrong: a typo passes unnoticed
def find_targets(names, patterns):
    found = [n for n in names if any(("." + n).endswith("." + p) for p in patterns)]
    if not found:
        raise ValueError(f"nothing matches {patterns}")
    return found


# %% find_targets wrong: no error at all
def find_targets(names, patterns):
    return [n for n in names if any(("." + n).endswith("." + p) for p in patterns)]


# %% find_targets wrong: in the order of the patterns
def find_targets(names, patterns):
    found = {p: [n for n in names if ("." + n).endswith("." + p)] for p in patterns}
    if not patterns or not all(found.values()):
        raise ValueError(str([p for p in found if not found[p]]))
    return [n for p in patterns for n in found[p]]


# %% find_targets wrong: an error that names nothing
def find_targets(names, patterns):
    if not patterns or not all(any(("." + n).endswith("." + p) for n in names) for p in patterns):
        raise ValueError("a pattern matches nothing")
    return [n for n in names if any(("." + n).endswith("." + p) for p in patterns)]


# %% find_targets right: parts
def find_targets(names, patterns):
    def fits(name, pattern):
        parts, ends = name.split("."), pattern.split(".")
        return parts[-len(ends) :] == ends

    unused = set(patterns) - {p for p in patterns for n in names if fits(n, p)}
    if unused or len(patterns) == 0:
        raise ValueError("no module for " + ", ".join(sorted(unused)))
    return list(filter(lambda n: any(fits(n, p) for p in patterns), names))


# %% find_targets right: a regular expression, and a special error
import re


class NoMatch(ValueError):
    pass


def find_targets(names, patterns):
    expressions = {p: re.compile(r"(.*\.)?" + re.escape(p)) for p in patterns}
    missed = [p for p, expression in expressions.items() if not any(expression.fullmatch(n) for n in names)]
    if missed:
        raise NoMatch(f"no module matches {' or '.join(missed)}")
    if not expressions:
        raise NoMatch("no pattern")
    return tuple(n for n in names if any(e.fullmatch(n) for e in expressions.values()))


# %% RepairedLoRA wrong: as it was
class RepairedLoRA(nn.Module):
    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear, self.scale = linear, alpha
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) * 0.01)
        self.B = nn.Parameter(torch.randn(linear.out_features, rank) * 0.01)

    def forward(self, x):
        return self.linear(x) + self.scale * (x @ self.A.T @ self.B.T)

    def trainable(self):
        return [p for name, p in self.named_parameters() if "A" in name or "B" in name or "bias" in name]


# %% RepairedLoRA wrong: scaled by alpha
class RepairedLoRA(nn.Module):
    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear, self.scale = linear.requires_grad_(False), alpha
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) * 0.01)
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x):
        return self.linear(x) + self.scale * (x @ self.A.T @ self.B.T)

    def trainable(self):
        return [self.A, self.B]


# %% RepairedLoRA wrong: the base is not frozen
class RepairedLoRA(nn.Module):
    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear, self.scale = linear, alpha / rank
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) * 0.01)
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x):
        return self.linear(x) + self.scale * (x @ self.A.T @ self.B.T)

    def trainable(self):
        return [self.A, self.B]


# %% RepairedLoRA wrong: B is still random
class RepairedLoRA(nn.Module):
    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear, self.scale = linear.requires_grad_(False), alpha / rank
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) * 0.01)
        self.B = nn.Parameter(torch.randn(linear.out_features, rank) * 0.01)

    def forward(self, x):
        return self.linear(x) + self.scale * (x @ self.A.T @ self.B.T)

    def trainable(self):
        return [self.A, self.B]


# %% RepairedLoRA wrong: both zero
class RepairedLoRA(nn.Module):
    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear, self.scale = linear.requires_grad_(False), alpha / rank
        self.A = nn.Parameter(torch.zeros(rank, linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x):
        return self.linear(x) + self.scale * (x @ self.A.T @ self.B.T)

    def trainable(self):
        return [self.A, self.B]


# %% RepairedLoRA wrong: the bias still trains
class RepairedLoRA(nn.Module):
    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear, self.scale = linear, alpha / rank
        linear.weight.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) * 0.01)
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x):
        return self.linear(x) + self.scale * (x @ self.A.T @ self.B.T)

    def trainable(self):
        return [p for p in self.parameters() if p.requires_grad]


# %% RepairedLoRA wrong: trains A alone
class RepairedLoRA(nn.Module):
    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear, self.scale = linear.requires_grad_(False), alpha / rank
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) * 0.01)
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x):
        return self.linear(x) + self.scale * (x @ self.A.T @ self.B.T)

    def trainable(self):
        return [self.A]


# %% RepairedLoRA right: two linear layers
class RepairedLoRA(nn.Module):
    def __init__(self, linear, rank, alpha):
        super().__init__()
        d_out, d_in = linear.weight.shape
        self.down, self.up = nn.Linear(d_in, rank, bias=False), nn.Linear(rank, d_out, bias=False)
        nn.init.zeros_(self.up.weight)
        self.base, self.alpha, self.rank = linear, alpha, rank
        for parameter in linear.parameters():
            parameter.requires_grad = False

    @property
    def A(self):
        return self.down.weight

    @property
    def B(self):
        return self.up.weight

    def forward(self, x):
        return self.base(x) + self.up(self.down(x)) * self.alpha / self.rank

    def trainable(self):
        return iter([self.down.weight, self.up.weight])


# %% RepairedLoRA right: the weight is summed first
class RepairedLoRA(nn.Module):
    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.register_buffer("W", linear.weight.detach())
        self.b = linear.bias if linear.bias is None else linear.bias.detach()
        self.A = nn.Parameter(torch.nn.init.kaiming_uniform_(torch.empty(rank, linear.in_features)))
        self.B = nn.Parameter(self.A.new_zeros(linear.out_features, rank))
        self.gamma = alpha / rank

    def forward(self, x):
        return F.linear(x, self.W + self.gamma * self.B @ self.A, self.b)

    def trainable(self):
        return list(self.parameters())


# %% lora_forward wrong: a detached result
def lora_forward(x, W, b, A, B, gamma):
    return F.linear(x, W, b) + gamma * F.linear(F.linear(x, A), B).detach()


# %% init_lora wrong: the seed of the generator, not its stream
def init_lora(d_out, d_in, rank, generator):
    own = torch.Generator().manual_seed(generator.initial_seed())
    bound = 1 / math.sqrt(d_in)
    return torch.empty(rank, d_in).uniform_(-bound, bound, generator=own), torch.zeros(d_out, rank)


# %% count_lora wrong: equal shapes once
def count_lora(shapes, rank):
    return sum(rank * (d_out + d_in) for d_out, d_in in set(shapes))


# %% find_targets right: a generator
def find_targets(names, patterns):
    missed = [p for p in patterns if not any(("." + n).endswith("." + p) for n in names)]
    if missed or not patterns:
        raise ValueError(f"no match: {missed}")
    return (n for n in names if any(("." + n).endswith("." + p) for p in patterns))


# %% RepairedLoRA wrong: fails without a bias
class RepairedLoRA(nn.Module):
    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear, self.scale = linear.requires_grad_(False), alpha / rank
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) * 0.01)
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x):
        return x @ self.linear.weight.T + self.linear.bias + self.scale * (x @ self.A.T @ self.B.T)

    def trainable(self):
        return [self.A, self.B]


# %% count_lora wrong: the rank is cut to the smaller side
def count_lora(shapes, rank):
    return sum(min(rank, o, i) * (o + i) for o, i in shapes)


# %% RepairedLoRA wrong: keeps the merged weight of the first evaluation
class RepairedLoRA(nn.Module):
    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.scale = alpha / rank
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) * 0.01)
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.kept = None

    def forward(self, x):
        W = self.linear.weight + self.scale * self.B @ self.A
        if not self.training:
            if self.kept is None:
                self.kept = W.detach()
            W = self.kept
        return F.linear(x, W, self.linear.bias)

    def trainable(self):
        return [self.A, self.B]


# %% count_lora wrong: float16 sum
def count_lora(shapes, rank):
    return (
        float(torch.tensor([rank * (o + i) for o, i in shapes], dtype=torch.float32).sum())
        if len(shapes) > 1
        else sum(rank * (o + i) for o, i in shapes)
    )


# %% find_targets wrong: fnmatch
from fnmatch import fnmatchcase


def find_targets(names, patterns):
    def hit(n, p):
        return fnmatchcase("." + n, "*." + p)

    missed = [p for p in patterns if not any(hit(n, p) for n in names)]
    if missed or not patterns:
        raise ValueError(f"{missed}")
    return [n for n in names if any(hit(n, p) for p in patterns)]


# %% freeze wrong: leaves the model in evaluation
def freeze(model):
    model.eval()
    n = 0
    for name, p in model.named_parameters():
        p.requires_grad = name.split(".")[-1] in ("lora_A", "lora_B")
        n += p.numel() * p.requires_grad
    return n


# %% init_lora wrong: one buffer that every call fills again
_buffer = torch.empty(300 * 300)


def init_lora(d_out, d_in, rank, generator):
    A = _buffer[: rank * d_in].view(rank, d_in)
    A.uniform_(-1 / math.sqrt(d_in), 1 / math.sqrt(d_in), generator=generator)
    return A, torch.zeros(d_out, rank)


# %% lora_delta wrong: gamma 0 gives a number
def lora_delta(A, B, gamma):
    return gamma * (B @ A) if gamma else 0.0


# %% lora_forward wrong: requires_grad is set on x
def lora_forward(x, W, b, A, B, gamma):
    if not x.requires_grad:
        x.requires_grad_()
    return F.linear(x, W, b) + gamma * F.linear(F.linear(x, A), B)


# %% lora_forward wrong: x is viewed flat
def lora_forward(x, W, b, A, B, gamma):
    flat = x.view(-1, x.shape[-1])
    y = flat @ W.T + gamma * (flat @ A.T) @ B.T
    if b is not None:
        y = y + b
    return y.view(*x.shape[:-1], -1)


# %% lora_scale wrong: a cache keyed by the rank alone
_seen = {}


def lora_scale(alpha, rank, rank_stabilized=False):
    key = rank, rank_stabilized
    if key not in _seen:
        _seen[key] = alpha / (math.sqrt(rank) if rank_stabilized else rank)
    return _seen[key]


# %% merge wrong: a buffer for what was
def merge(layer, A, B, gamma):
    old = layer.weight
    layer.register_buffer("before", old.detach().clone())
    delta = gamma * (B @ A)
    delta = delta.T if flipped(layer) else delta
    layer.weight = nn.Parameter((old.to(A.dtype) + delta).to(old.dtype), requires_grad=False)
    return old


# %% merge wrong: freezes the bias on the way
def merge(layer, A, B, gamma):
    old = layer.weight
    delta = gamma * (B @ A)
    delta = delta.T if flipped(layer) else delta
    layer.weight = nn.Parameter((old.to(A.dtype) + delta).to(old.dtype))
    layer.requires_grad_(False)
    return old


# %% merge wrong: leaves the layer in evaluation
def merge(layer, A, B, gamma):
    layer.eval()
    old = layer.weight
    delta = gamma * (B @ A)
    delta = delta.T if flipped(layer) else delta
    layer.weight = nn.Parameter((old.to(A.dtype) + delta).to(old.dtype), requires_grad=False)
    return old


# %% unmerge wrong: the weight is new and trains if the receipt does, the bias always
def unmerge(layer, receipt):
    layer.weight = receipt
    layer.requires_grad_(receipt.requires_grad)
    if not receipt.requires_grad:
        layer.bias.requires_grad_(True)


# %% lora_forward wrong: gamma 0 is 1
def lora_forward(x, W, b, A, B, gamma):
    return F.linear(x, W, b) + (gamma or 1.0) * F.linear(F.linear(x, A), B)


# %% merge wrong: gamma 0 merges nothing
def merge(layer, A, B, gamma):
    old = layer.weight
    delta = (gamma or 1.0) * (B @ A)
    delta = delta.T if flipped(layer) else delta
    layer.weight = nn.Parameter((old.to(A.dtype) + delta).to(old.dtype), requires_grad=False)
    return old


# %% lora_scale right: divided twice by the fourth root
def lora_scale(alpha, rank, rank_stabilized=False):
    for _ in range(2 if rank_stabilized else 4):
        alpha = alpha / rank**0.25
    return alpha


# %% init_lora wrong: the generator gets the next seed
def init_lora(d_out, d_in, rank, generator):
    bound = 1 / math.sqrt(d_in)
    A = torch.empty(rank, d_in).uniform_(-bound, bound, generator=generator)
    generator.manual_seed(generator.initial_seed() + 1)
    return A, torch.zeros(d_out, rank)


# %% lora_forward wrong: B·A is kept for a pair of tensors, also when they have changed
kept_products = {}


def lora_forward(x, W, b, A, B, gamma):
    if (id(A), id(B)) not in kept_products:
        kept_products[id(A), id(B)] = (A, B, B @ A)
    return F.linear(x, W, b) + gamma * F.linear(x, kept_products[id(A), id(B)][2])


# %% lora_forward wrong: at most 64 rows
def lora_forward(x, W, b, A, B, gamma):
    low = F.linear(x, A)
    if x.ndim > 1 and len(x) > 64:
        low = torch.cat([low[:64], torch.zeros_like(low[64:])])
    return F.linear(x, W, b) + gamma * F.linear(low, B)


# %% lora_forward right: one product of wider matrices
def lora_forward(x, W, b, A, B, gamma):
    return F.linear(torch.cat([x, x @ A.T], -1), torch.cat([W, gamma * B], 1), b)


# %% lora_forward right: einsum over rows in float64
def lora_forward(x, W, b, A, B, gamma):
    z = torch.einsum("...i,ri->...r", x.double(), A.double())
    y = torch.einsum("...i,oi->...o", x.double(), W.double()) + gamma * torch.einsum("...r,or->...o", z, B.double())
    return (y if b is None else y + b.double()).to(x.dtype)


# %% lora_delta wrong: kept for a pair of tensors, also when they have changed
kept_deltas = {}


def lora_delta(A, B, gamma):
    key = id(A), id(B), gamma
    if key not in kept_deltas:
        kept_deltas[key] = A, B, gamma * (B @ A)
    return kept_deltas[key][2].clone()


# %% lora_delta wrong: outer of squeezed vectors at rank 1
def lora_delta(A, B, gamma):
    return gamma * torch.outer(B.squeeze(), A.squeeze()) if len(A) == 1 else gamma * B @ A


# %% count_lora wrong: whole numbers of 32 bits
def count_lora(shapes, rank):
    return int(
        (torch.tensor([d_out + d_in for d_out, d_in in shapes], dtype=torch.int32) * rank).sum(dtype=torch.int32)
    )


# %% merge wrong: fails without a bias
def merge(layer, A, B, gamma):
    old, trains = layer.weight, layer.bias.requires_grad
    delta = gamma * (B @ A)
    delta = delta.T if flipped(layer) else delta
    layer.weight = nn.Parameter((old.to(A.dtype) + delta).to(old.dtype), requires_grad=False)
    layer.bias.requires_grad_(trains)
    return old


# %% merge wrong: whatever is not nn.Linear itself is turned
def merge(layer, A, B, gamma):
    old = layer.weight
    delta = gamma * (B @ A)
    delta = delta if type(layer) is nn.Linear else delta.T
    layer.weight = nn.Parameter((old.to(A.dtype) + delta).to(old.dtype), requires_grad=False)
    return old


# %% merge right: a new tensor is filled, then added to in place
def merge(layer, A, B, gamma):
    old = layer.weight
    new = old.detach().clone().to(A.dtype)
    (new.T if flipped(layer) else new).add_(B @ A, alpha=gamma)
    layer.weight = nn.Parameter(new.to(old.dtype))
    return old


# %% merge right: addmm on a fresh copy
def merge(layer, A, B, gamma):
    old = layer.weight
    with torch.no_grad():
        wide = (old.T if flipped(layer) else old).to(A.dtype, copy=True)
        wide.addmm_(B, A, alpha=gamma)
        wide = (wide.T if flipped(layer) else wide).to(old.dtype).contiguous()
    del layer.weight
    layer.register_parameter("weight", nn.Parameter(wide, requires_grad=old.requires_grad))
    return {"weight": old}


# %% find_targets wrong: spaces around a pattern are cut off
def find_targets(names, patterns):
    patterns = [p.strip() for p in patterns]
    missed = [p for p in patterns if not any(("." + n).endswith("." + p) for n in names)]
    if missed or not patterns:
        raise ValueError(f"nothing for {missed}")
    return [n for n in names if any(("." + n).endswith("." + p) for p in patterns)]


# %% find_targets wrong: the first hundred names
def find_targets(names, patterns):
    names = names[:100]
    missed = [p for p in patterns if not any(("." + n).endswith("." + p) for n in names)]
    if missed or not patterns:
        raise ValueError(f"nothing for {missed}")
    return [n for n in names if any(("." + n).endswith("." + p) for p in patterns)]


# %% find_targets right: suffixes in a set
def find_targets(names, patterns):
    def ends(name):
        parts = name.split(".")
        return {".".join(parts[i:]) for i in range(len(parts))}

    every = {name: ends(name) for name in names}
    missed = set(patterns).difference(*every.values()) if every else set(patterns)
    if missed or not patterns:
        raise ValueError("Without a match: " + " ".join(sorted(missed)))
    return [name for name, found in every.items() if found & set(patterns)]


# %% RepairedLoRA wrong: no gradient in evaluation
class RepairedLoRA(nn.Module):
    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear, self.scale = linear.requires_grad_(False), alpha / rank
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) * 0.01)
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x):
        low = x @ self.A.T @ self.B.T
        return self.linear(x) + self.scale * (low if self.training else low.detach())

    def trainable(self):
        return [self.A, self.B]


# %% RepairedLoRA wrong: the scale trains too
class RepairedLoRA(nn.Module):
    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear, self.scale = linear.requires_grad_(False), nn.Parameter(torch.tensor(alpha / rank))
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) * 0.01)
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x):
        return self.linear(x) + self.scale * (x @ self.A.T @ self.B.T)

    def trainable(self):
        return [self.A, self.B]
