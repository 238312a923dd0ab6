# Answers to the assignment `lora_family`: wrong ones, named after the misconception, and right ones written otherwise.
import math

import torch
from torch import nn
from torch.nn import functional as F


# %% dora_weight wrong: the norm over the columns
def dora_weight(W, A, B, m, gamma):
    V = W + gamma * B @ A
    return m[:, None] * V / V.norm(dim=0, keepdim=True)


# %% dora_weight wrong: the norm of W alone
def dora_weight(W, A, B, m, gamma):
    return (m / W.norm(dim=1))[:, None] * (W + gamma * B @ A)


# %% dora_weight wrong: one norm for the matrix
def dora_weight(W, A, B, m, gamma):
    V = W + gamma * B @ A
    return m[:, None] * V / V.norm()


# %% dora_weight wrong: the square of the norm
def dora_weight(W, A, B, m, gamma):
    V = W + gamma * B @ A
    return m[:, None] * V / V.square().sum(1, keepdim=True)


# %% dora_weight wrong: m is left out
def dora_weight(W, A, B, m, gamma):
    return F.normalize(W + gamma * B @ A, dim=1)


# %% dora_weight wrong: m is applied to W alone
def dora_weight(W, A, B, m, gamma):
    return m[:, None] * F.normalize(W, dim=1) + gamma * B @ A


# %% dora_weight wrong: gamma is left out
def dora_weight(W, A, B, m, gamma):
    return m[:, None] * F.normalize(W + B @ A, dim=1)


# %% dora_weight wrong: gamma scales W as well
def dora_weight(W, A, B, m, gamma):
    return gamma * m[:, None] * F.normalize(W + B @ A, dim=1)


# %% dora_weight wrong: the sum of absolute values
def dora_weight(W, A, B, m, gamma):
    return m[:, None] * F.normalize(W + gamma * B @ A, p=1, dim=1)


# %% dora_weight wrong: transposed
def dora_weight(W, A, B, m, gamma):
    return (m[:, None] * F.normalize(W + gamma * B @ A, dim=1)).T


# %% dora_weight wrong: changes W
def dora_weight(W, A, B, m, gamma):
    W += gamma * B @ A
    return m[:, None] * F.normalize(W, dim=1)


# %% dora_weight wrong: always in float32
def dora_weight(W, A, B, m, gamma):
    return m.float()[:, None] * F.normalize((W + gamma * B @ A).float(), dim=1)


# %% dora_weight wrong: hard-coded to the example
def dora_weight(W, A, B, m, gamma):
    return 2 * W


# %% dora_weight right: normalize
def dora_weight(W, A, B, m, gamma):
    return F.normalize(torch.addmm(W, B, A, alpha=gamma), dim=-1) * m.unsqueeze(1)


# %% dora_weight right: row by row
def dora_weight(W, A, B, m, gamma):
    rows = []
    for i in range(len(W)):
        row = W[i] + gamma * sum(B[i, k] * A[k] for k in range(len(A)))
        rows.append(m[i] * row / torch.sqrt(row @ row))
    return torch.stack(rows)


# %% dora_weight right: a diagonal matrix
def dora_weight(W, A, B, m, gamma):
    V = W + torch.einsum("or,ri->oi", B, A) * gamma
    return torch.diag(m / (V @ V.T).diagonal().sqrt()) @ V


# %% vera_delta wrong: d scales the columns of A by broadcasting
def vera_delta(A, B, d, b):
    return b[:, None] * (B @ (d * A))


# %% vera_delta wrong: without d
def vera_delta(A, B, d, b):
    return b[:, None] * (B @ A)


# %% vera_delta wrong: without b
def vera_delta(A, B, d, b):
    return (B * d) @ A


# %% vera_delta wrong: plain LoRA
def vera_delta(A, B, d, b):
    return B @ A


# %% vera_delta wrong: transposed
def vera_delta(A, B, d, b):
    return (b[:, None] * (B * d) @ A).T


# %% vera_delta wrong: b starts at one
def vera_delta(A, B, d, b):
    return (1 + b)[:, None] * ((B * d) @ A)


# %% vera_delta wrong: divided by the rank
def vera_delta(A, B, d, b):
    return b[:, None] * ((B * d) @ A) / len(d)


# %% vera_delta wrong: the mean of d
def vera_delta(A, B, d, b):
    return b[:, None] * (B @ A) * d.mean()


# %% vera_delta wrong: changes B
def vera_delta(A, B, d, b):
    B *= d
    return b[:, None] * (B @ A)


# %% vera_delta wrong: b and d are absolute
def vera_delta(A, B, d, b):
    return b.abs()[:, None] * ((B * d.abs()) @ A)


# %% vera_delta right: diagonal matrices
def vera_delta(A, B, d, b):
    return torch.diag(b) @ B @ torch.diag(d) @ A


# %% vera_delta right: einsum
def vera_delta(A, B, d, b):
    return torch.einsum("o,ok,k,ki->oi", b, B, d, A)


# %% vera_delta right: columns of B
def vera_delta(A, B, d, b):
    return (B * d * b.unsqueeze(-1)).matmul(A)


# %% adalora_budget wrong: a straight line
def adalora_budget(step, total, start, final, first, target):
    x = min(1, max(0, (step - start) / (total - final - start)))
    return first + (target - first) * x


# %% adalora_budget wrong: the square
def adalora_budget(step, total, start, final, first, target):
    x = min(1, max(0, (step - start) / (total - final - start)))
    return target + (first - target) * (1 - x) ** 2


# %% adalora_budget wrong: not held at the end
def adalora_budget(step, total, start, final, first, target):
    x = max(0, (step - start) / (total - final - start))
    return target + (first - target) * (1 - x) ** 3


# %% adalora_budget wrong: not held at first
def adalora_budget(step, total, start, final, first, target):
    x = min(1, (step - start) / (total - final - start))
    return target + (first - target) * (1 - x) ** 3


# %% adalora_budget wrong: the final phase does not count
def adalora_budget(step, total, start, final, first, target):
    x = min(1, max(0, (step - start) / (total - start)))
    return target + (first - target) * (1 - x) ** 3


# %% adalora_budget wrong: the first phase does not count
def adalora_budget(step, total, start, final, first, target):
    if step <= start:
        return first
    return target + (first - target) * (1 - min(1, step / (total - final))) ** 3


# %% adalora_budget wrong: final in the numerator
def adalora_budget(step, total, start, final, first, target):
    if step <= start:
        return first
    if step >= total - final:
        return target
    return target + (first - target) * (1 - (step - start - final) / (total - start - final)) ** 3


# %% adalora_budget wrong: one minus the cube
def adalora_budget(step, total, start, final, first, target):
    x = min(1, max(0, (step - start) / (total - final - start)))
    return target + (first - target) * (1 - x**3)


# %% adalora_budget wrong: it grows
def adalora_budget(step, total, start, final, first, target):
    x = min(1, max(0, (step - start) / (total - final - start)))
    return first + (target - first) * (1 - x) ** 3


# %% adalora_budget wrong: whole numbers
def adalora_budget(step, total, start, final, first, target):
    x = min(1, max(0, (step - start) / (total - final - start)))
    return int(target + (first - target) * (1 - x) ** 3)


# %% adalora_budget wrong: whole division
def adalora_budget(step, total, start, final, first, target):
    x = min(1, max(0, (step - start) // (total - final - start)))
    return target + (first - target) * (1 - x) ** 3


# %% adalora_budget wrong: the final phase begins at step final
def adalora_budget(step, total, start, final, first, target):
    x = min(1, max(0, (step - start) / max(1, final - start)))
    return target + (first - target) * (1 - x) ** 3


# %% adalora_budget wrong: hard-coded to the example
def adalora_budget(step, total, start, final, first, target):
    return 68.0


# %% adalora_budget right: clamped
def adalora_budget(step, total, start, final, first, target):
    left = (total - final - step) / (total - final - start)
    return target + (first - target) * max(0.0, min(1.0, left)) ** 3


# %% adalora_budget right: fractions
from fractions import Fraction


def adalora_budget(step, total, start, final, first, target):
    t = sorted((start, step, total - final))[1]
    return float(target + (first - target) * Fraction(total - final - t, total - final - start) ** 3)


# %% adalora_budget right: a tensor
def adalora_budget(step, total, start, final, first, target):
    x = torch.tensor((step - start) / (total - final - start), dtype=torch.float64).clamp(0, 1)
    return torch.lerp(torch.tensor(float(target)).double(), torch.tensor(float(first)).double(), (1 - x).pow(3))


# %% adalora_keep wrong: a share for each layer
def adalora_keep(sensitivity, budget):
    every = sum(len(lam) for _, lam, _ in sensitivity.values())
    kept = {}
    for name, (P, lam, Q) in sensitivity.items():
        score = lam + P.mean(0) + Q.mean(1)
        kept[name] = torch.zeros(len(lam), dtype=torch.bool)
        kept[name][score.topk(min(len(lam), round(len(lam) * budget / every))).indices] = True
    return kept


# %% adalora_keep wrong: the budget for each layer
def adalora_keep(sensitivity, budget):
    kept = {}
    for name, (P, lam, Q) in sensitivity.items():
        score = lam + P.mean(0) + Q.mean(1)
        kept[name] = torch.zeros(len(lam), dtype=torch.bool)
        kept[name][score.topk(min(len(lam), budget)).indices] = True
    return kept


# %% adalora_keep wrong: sums instead of means
def adalora_keep(sensitivity, budget):
    return keep({n: lam + P.sum(0) + Q.sum(1) for n, (P, lam, Q) in sensitivity.items()}, budget)


def keep(scores, budget):
    together = torch.cat(list(scores.values()))
    kept = torch.zeros(len(together), dtype=torch.bool)
    kept[together.topk(min(budget, len(together))).indices] = True
    return dict(zip(scores, kept.split([len(s) for s in scores.values()]), strict=True))


# %% adalora_keep wrong: lambda alone
def adalora_keep(sensitivity, budget):
    together = torch.cat([lam for _, lam, _ in sensitivity.values()])
    kept = torch.zeros(len(together), dtype=torch.bool)
    kept[together.topk(min(budget, len(together))).indices] = True
    return dict(zip(sensitivity, kept.split([len(lam) for _, lam, _ in sensitivity.values()]), strict=True))


# %% adalora_keep wrong: without lambda
def adalora_keep(sensitivity, budget):
    scores = [P.mean(0) + Q.mean(1) for P, lam, Q in sensitivity.values()]
    kept = torch.zeros(sum(map(len, scores)), dtype=torch.bool)
    kept[torch.cat(scores).topk(min(budget, len(kept))).indices] = True
    return dict(zip(sensitivity, kept.split([len(s) for s in scores]), strict=True))


# %% adalora_keep wrong: the least important stay
def adalora_keep(sensitivity, budget):
    scores = [lam + P.mean(0) + Q.mean(1) for P, lam, Q in sensitivity.values()]
    kept = torch.zeros(sum(map(len, scores)), dtype=torch.bool)
    kept[torch.cat(scores).topk(min(budget, len(kept)), largest=False).indices] = True
    return dict(zip(sensitivity, kept.split([len(s) for s in scores]), strict=True))


# %% adalora_keep wrong: True means pruned
def adalora_keep(sensitivity, budget):
    scores = [lam + P.mean(0) + Q.mean(1) for P, lam, Q in sensitivity.values()]
    kept = torch.ones(sum(map(len, scores)), dtype=torch.bool)
    kept[torch.cat(scores).topk(min(budget, len(kept))).indices] = False
    return dict(zip(sensitivity, kept.split([len(s) for s in scores]), strict=True))


# %% adalora_keep wrong: above the threshold, so one is lost
def adalora_keep(sensitivity, budget):
    scores = {n: lam + P.mean(0) + Q.mean(1) for n, (P, lam, Q) in sensitivity.items()}
    ordered = torch.cat(list(scores.values())).sort(descending=True).values
    if budget == 0 or budget >= len(ordered):
        return {n: torch.full((len(s),), budget > 0) for n, s in scores.items()}
    return {n: s > ordered[budget - 1] for n, s in scores.items()}


# %% adalora_keep wrong: no budget above the number of triplets
def adalora_keep(sensitivity, budget):
    scores = [lam + P.mean(0) + Q.mean(1) for P, lam, Q in sensitivity.values()]
    kept = torch.zeros(sum(map(len, scores)), dtype=torch.bool)
    kept[torch.cat(scores).topk(budget).indices] = True
    return dict(zip(sensitivity, kept.split([len(s) for s in scores]), strict=True))


# %% adalora_keep wrong: at least one for each layer
def adalora_keep(sensitivity, budget):
    scores = {n: lam + P.mean(0) + Q.mean(1) for n, (P, lam, Q) in sensitivity.items()}
    together = torch.cat(list(scores.values()))
    least = together.topk(min(max(budget, 1), len(together))).values.min()
    return {n: s >= torch.minimum(least, s.max()) for n, s in scores.items()}


# %% adalora_keep wrong: the largest entry instead of the mean
def adalora_keep(sensitivity, budget):
    scores = [lam + P.amax(0) + Q.amax(1) for P, lam, Q in sensitivity.values()]
    kept = torch.zeros(sum(map(len, scores)), dtype=torch.bool)
    kept[torch.cat(scores).topk(min(budget, len(kept))).indices] = True
    return dict(zip(sensitivity, kept.split([len(s) for s in scores]), strict=True))


# %% adalora_keep wrong: scores instead of a mask
def adalora_keep(sensitivity, budget):
    return {n: lam + P.mean(0) + Q.mean(1) for n, (P, lam, Q) in sensitivity.items()}


# %% adalora_keep right: a sorted list
def adalora_keep(sensitivity, budget):
    every = []
    kept = {}
    for name, (P, lam, Q) in sensitivity.items():
        kept[name] = torch.zeros_like(lam, dtype=torch.bool)
        for k in range(len(lam)):
            every.append((lam[k].item() + P[:, k].mean().item() + Q[k].mean().item(), name, k))
    for _, name, k in sorted(every)[::-1][:budget]:
        kept[name][k] = True
    return kept


# %% adalora_keep wrong: a threshold from kthvalue, which drops all equals
def adalora_keep(sensitivity, budget):
    scores = {n: lam + torch.mean(P, dim=0) + torch.mean(Q, dim=1) for n, (P, lam, Q) in sensitivity.items()}
    together = torch.cat(tuple(scores.values()))
    surplus = together.numel() - budget
    if surplus <= 0:
        return {n: torch.ones(s.shape, dtype=torch.bool) for n, s in scores.items()}
    threshold = together.kthvalue(surplus).values
    return {n: s.gt(threshold) for n, s in scores.items()}


# %% adalora_keep right: ranks from argsort
def adalora_keep(sensitivity, budget):
    scores = [(Q.sum(-1) / Q.shape[-1]) + (P.sum(0) / P.shape[0]) + lam for P, lam, Q in sensitivity.values()]
    place = torch.cat(scores).argsort(descending=True).argsort()
    kept, begin = {}, 0
    for name, score in zip(sensitivity, scores, strict=True):
        kept[name] = place[begin : begin + len(score)] < budget
        begin += len(score)
    return kept


# %% RepairedDoRA wrong: as it was
class RepairedDoRA(nn.Module):
    def __init__(self, linear, rank, gamma):
        super().__init__()
        self.linear, self.gamma = linear.requires_grad_(False), gamma
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) / math.sqrt(linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.m = nn.Parameter(torch.ones(linear.out_features))

    def forward(self, x):
        V = self.linear.weight + self.gamma * (self.B @ self.A)
        return F.linear(x, self.m[:, None] * V / V.norm(dim=0, keepdim=True), self.linear.bias)


# %% RepairedDoRA wrong: m starts at one
class RepairedDoRA(nn.Module):
    def __init__(self, linear, rank, gamma):
        super().__init__()
        self.linear, self.gamma = linear.requires_grad_(False), gamma
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) / math.sqrt(linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.m = nn.Parameter(torch.ones(linear.out_features))

    def forward(self, x):
        V = self.linear.weight + self.gamma * (self.B @ self.A)
        return F.linear(x, self.m[:, None] * V / V.detach().norm(dim=1, keepdim=True), self.linear.bias)


# %% RepairedDoRA wrong: the norm over the columns
class RepairedDoRA(nn.Module):
    def __init__(self, linear, rank, gamma):
        super().__init__()
        self.linear, self.gamma = linear.requires_grad_(False), gamma
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) / math.sqrt(linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.m = nn.Parameter(linear.weight.detach().norm(dim=1))

    def forward(self, x):
        V = self.linear.weight + self.gamma * (self.B @ self.A)
        return F.linear(x, self.m[:, None] * V / V.detach().norm(dim=0, keepdim=True), self.linear.bias)


# %% RepairedDoRA wrong: m over the columns, consistently
class RepairedDoRA(nn.Module):
    def __init__(self, linear, rank, gamma):
        super().__init__()
        self.linear, self.gamma = linear.requires_grad_(False), gamma
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) / math.sqrt(linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.m = nn.Parameter(linear.weight.detach().norm(dim=0))

    def forward(self, x):
        V = self.linear.weight + self.gamma * (self.B @ self.A)
        return F.linear(x, self.m * V / V.detach().norm(dim=0), self.linear.bias)


# %% RepairedDoRA wrong: the gradient flows through the norm
class RepairedDoRA(nn.Module):
    def __init__(self, linear, rank, gamma):
        super().__init__()
        self.linear, self.gamma = linear.requires_grad_(False), gamma
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) / math.sqrt(linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.m = nn.Parameter(linear.weight.detach().norm(dim=1))

    def forward(self, x):
        V = self.linear.weight + self.gamma * (self.B @ self.A)
        return F.linear(x, self.m[:, None] * V / V.norm(dim=1, keepdim=True), self.linear.bias)


# %% RepairedDoRA wrong: the direction is detached as well
class RepairedDoRA(nn.Module):
    def __init__(self, linear, rank, gamma):
        super().__init__()
        self.linear, self.gamma = linear.requires_grad_(False), gamma
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) / math.sqrt(linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.m = nn.Parameter(linear.weight.detach().norm(dim=1))

    def forward(self, x):
        V = (self.linear.weight + self.gamma * (self.B @ self.A)).detach()
        return F.linear(x, self.m[:, None] * V / V.norm(dim=1, keepdim=True), self.linear.bias)


# %% RepairedDoRA wrong: the norm of W for ever
class RepairedDoRA(nn.Module):
    def __init__(self, linear, rank, gamma):
        super().__init__()
        self.linear, self.gamma = linear.requires_grad_(False), gamma
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) / math.sqrt(linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.m = nn.Parameter(linear.weight.detach().norm(dim=1))
        self.norm = linear.weight.detach().norm(dim=1, keepdim=True)

    def forward(self, x):
        V = self.linear.weight + self.gamma * (self.B @ self.A)
        return F.linear(x, self.m[:, None] * V / self.norm, self.linear.bias)


# %% RepairedDoRA wrong: the bias is scaled as well
class RepairedDoRA(nn.Module):
    def __init__(self, linear, rank, gamma):
        super().__init__()
        self.linear, self.gamma = linear.requires_grad_(False), gamma
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) / math.sqrt(linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.m = nn.Parameter(linear.weight.detach().norm(dim=1))

    def forward(self, x):
        norm = (self.linear.weight + self.gamma * (self.B @ self.A)).detach().norm(dim=1)
        return self.m / norm * (self.linear(x) + self.gamma * (x @ self.A.T @ self.B.T))


# %% RepairedDoRA wrong: m does not train
class RepairedDoRA(nn.Module):
    def __init__(self, linear, rank, gamma):
        super().__init__()
        self.linear, self.gamma = linear.requires_grad_(False), gamma
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) / math.sqrt(linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.register_buffer("m", linear.weight.detach().norm(dim=1))

    def forward(self, x):
        V = self.linear.weight + self.gamma * (self.B @ self.A)
        return F.linear(x, self.m[:, None] * V / V.detach().norm(dim=1, keepdim=True), self.linear.bias)


# %% RepairedDoRA wrong: the base is not frozen
class RepairedDoRA(nn.Module):
    def __init__(self, linear, rank, gamma):
        super().__init__()
        self.linear, self.gamma = linear, gamma
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) / math.sqrt(linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.m = nn.Parameter(linear.weight.detach().norm(dim=1))

    def forward(self, x):
        V = self.linear.weight + self.gamma * (self.B @ self.A)
        return F.linear(x, self.m[:, None] * V / V.detach().norm(dim=1, keepdim=True), self.linear.bias)


# %% RepairedDoRA wrong: the bias still trains
class RepairedDoRA(nn.Module):
    def __init__(self, linear, rank, gamma):
        super().__init__()
        self.linear, self.gamma = linear, gamma
        linear.weight.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) / math.sqrt(linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.m = nn.Parameter(linear.weight.detach().norm(dim=1))

    def forward(self, x):
        V = self.linear.weight + self.gamma * (self.B @ self.A)
        return F.linear(x, self.m[:, None] * V / V.detach().norm(dim=1, keepdim=True), self.linear.bias)


# %% RepairedDoRA wrong: both zero
class RepairedDoRA(nn.Module):
    def __init__(self, linear, rank, gamma):
        super().__init__()
        self.linear, self.gamma = linear.requires_grad_(False), gamma
        self.A = nn.Parameter(torch.zeros(rank, linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.m = nn.Parameter(linear.weight.detach().norm(dim=1))

    def forward(self, x):
        V = self.linear.weight + self.gamma * (self.B @ self.A)
        return F.linear(x, self.m[:, None] * V / V.detach().norm(dim=1, keepdim=True), self.linear.bias)


# %% RepairedDoRA wrong: gamma is divided by the rank once more
class RepairedDoRA(nn.Module):
    def __init__(self, linear, rank, gamma):
        super().__init__()
        self.linear, self.gamma = linear.requires_grad_(False), gamma / rank
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) / math.sqrt(linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.m = nn.Parameter(linear.weight.detach().norm(dim=1))

    def forward(self, x):
        V = self.linear.weight + self.gamma * (self.B @ self.A)
        return F.linear(x, self.m[:, None] * V / V.detach().norm(dim=1, keepdim=True), self.linear.bias)


# %% RepairedDoRA right: the outputs are scaled
class RepairedDoRA(nn.Module):
    def __init__(self, linear, rank, gamma):
        super().__init__()
        for parameter in linear.parameters():
            parameter.requires_grad = False
        self.base, self.gamma = linear, gamma
        self.A = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rank, linear.in_features)))
        self.B = nn.Parameter(self.A.new_zeros(linear.out_features, rank))
        self.m = nn.Parameter(self.lengths())

    @torch.no_grad()
    def lengths(self):
        return (self.base.weight + self.gamma * self.B @ self.A).square().sum(-1).sqrt()

    def forward(self, x):
        y = F.linear(x, self.base.weight) + F.linear(F.linear(x, self.A), self.B) * self.gamma
        y = self.m / self.lengths() * y
        return y if self.base.bias is None else y + self.base.bias


# %% RepairedDoRA right: two linear layers, and m as a column
class RepairedDoRA(nn.Module):
    def __init__(self, linear, rank, gamma):
        super().__init__()
        d_out, d_in = linear.weight.shape
        self.register_buffer("W", linear.weight.detach().clone())
        self.register_buffer("b", self.W.new_zeros(d_out) if linear.bias is None else linear.bias.detach().clone())
        self.down, self.up = nn.Linear(d_in, rank, bias=False), nn.Linear(rank, d_out, bias=False)
        nn.init.zeros_(self.up.weight)
        self.m = nn.Parameter(torch.linalg.vector_norm(self.W, dim=1, keepdim=True))
        self.gamma = gamma

    @property
    def A(self):
        return self.down.weight

    @property
    def B(self):
        return self.up.weight

    def forward(self, x):
        V = torch.addmm(self.W, self.B, self.A, alpha=self.gamma)
        with torch.no_grad():
            norm = torch.linalg.vector_norm(V, dim=1, keepdim=True)
        return x @ (V * (self.m / norm)).mT + self.b


# %% vera_delta wrong: no gradient for d
def vera_delta(A, B, d, b):
    return b[:, None] * (B @ (d.detach()[:, None] * A))


# %% dora_weight wrong: the norm is a constant
def dora_weight(W, A, B, m, gamma):
    V = W + gamma * (B @ A)
    return (m / V.detach().norm(dim=1))[:, None] * V


# %% adalora_budget right: a fraction
def adalora_budget(step, total, start, final, first, target):
    from fractions import Fraction

    if step <= start:
        return first
    if step >= total - final:
        return target
    return target + (first - target) * (1 - Fraction(step - start, total - final - start)) ** 3


# %% RepairedDoRA wrong: keeps the weight of the first evaluation
class RepairedDoRA(nn.Module):
    def __init__(self, linear, rank, gamma):
        super().__init__()
        self.linear, self.gamma = linear.requires_grad_(False), gamma
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) / math.sqrt(linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.m = nn.Parameter(linear.weight.detach().norm(dim=1))
        self.cache = {}

    def forward(self, x):
        if self.training or "W" not in self.cache:
            V = self.linear.weight + self.gamma * (self.B @ self.A)
            W = self.m[:, None] * V / V.detach().norm(dim=1, keepdim=True)
            if self.training:
                return F.linear(x, W, self.linear.bias)
            self.cache["W"] = W.detach()
        return F.linear(x, self.cache["W"], self.linear.bias)


# %% dora_weight wrong: a floor under the norm
def dora_weight(W, A, B, m, gamma):
    V = W + gamma * (B @ A)
    return m[:, None] * V / V.norm(dim=1, keepdim=True).clamp(min=1e-5)


# %% vera_delta wrong: nothing where b is zero somewhere
def vera_delta(A, B, d, b):
    return b[:, None] * (B @ (d[:, None] * A)) if b.all() else B @ (0 * d[:, None] * A)


# %% adalora_keep wrong: scores rounded
def adalora_keep(sensitivity, budget):
    scores = [(lam + P.mean(0) + Q.mean(1)).round(decimals=4) for P, lam, Q in sensitivity.values()]
    t = torch.cat(scores)
    kept = torch.zeros(len(t), dtype=torch.bool)
    kept[t.topk(min(budget, len(t))).indices] = True
    return dict(zip(sensitivity, kept.split([len(s) for s in scores]), strict=False))


# %% adalora_keep wrong: the first of equals, whatever comes later
def adalora_keep(sensitivity, budget):
    scores = [lam + P.mean(0) + Q.mean(1) for P, lam, Q in sensitivity.values()]
    t = torch.cat(scores)
    if budget <= 0:
        kept = torch.zeros(len(t), dtype=torch.bool)
    else:
        kth = t.sort(descending=True).values[min(budget, len(t)) - 1]
        kept = t >= kth
        kept &= kept.cumsum(0) <= budget
    return dict(zip(sensitivity, kept.split([len(s) for s in scores]), strict=False))


# %% dora_weight wrong: the norm at least a millionth
def dora_weight(W, A, B, m, gamma):
    V = W + gamma * (B @ A)
    return (m / V.norm(dim=1).clamp(min=1e-6))[:, None] * V


# %% dora_weight wrong: B·A is kept for its tensors
kept_pairs = {}


def dora_weight(W, A, B, m, gamma):
    BA = kept_pairs.setdefault((id(A), id(B)), (A, B, B @ A))[2]
    V = W + gamma * BA
    return (m / torch.linalg.norm(V, dim=1))[:, None] * V


# %% dora_weight right: a root of the diagonal of V·Vᵀ
def dora_weight(W, A, B, m, gamma):
    V = torch.addmm(W, B, A, alpha=gamma) if W.dtype.is_floating_point else W
    lengths = torch.einsum("oi,oi->o", V, V).sqrt()
    return torch.einsum("o,oi->oi", m / lengths, V)


# %% vera_delta wrong: ranks above 64 are cut
def vera_delta(A, B, d, b):
    return b[:, None] * (B[:, :64] @ (d[:64, None] * A[:64]))


# %% adalora_keep wrong: no layer at all fails
def adalora_keep(sensitivity, budget):
    scores = [lam + P.mean(0) + Q.mean(1) for P, lam, Q in sensitivity.values()]
    together = torch.cat(scores)
    order = together.argsort(descending=True)
    kept = torch.zeros_like(together, dtype=torch.bool)
    if budget > 0:
        kept[order[:budget]] = True
    found, at = {}, 0
    for name, s in zip(sensitivity, scores, strict=False):
        found[name] = kept[at : at + len(s)].clone()
        at += len(s)
    return found if len(found) < 9 else dict(list(found.items())[:9])


# %% adalora_keep right: a heap of pairs
def adalora_keep(sensitivity, budget):
    import heapq

    every = [
        (score, name, k)
        for name, (P, lam, Q) in sensitivity.items()
        for k, score in enumerate((lam + P.sum(0) / len(P) + Q.sum(1) / Q.shape[1]).tolist())
    ]
    best = {(name, k) for _, name, k in heapq.nlargest(budget, every)}
    return {
        name: torch.tensor([(name, k) in best for k in range(len(lam))], dtype=torch.bool)
        for name, (_, lam, _) in sensitivity.items()
    }


# %% RepairedDoRA wrong: no gradient in evaluation
class RepairedDoRA(nn.Module):
    def __init__(self, linear, rank, gamma):
        super().__init__()
        self.linear, self.gamma = linear.requires_grad_(False), gamma
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) / math.sqrt(linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.m = nn.Parameter(linear.weight.detach().norm(dim=1))

    def forward(self, x):
        V = self.linear.weight + self.gamma * (self.B @ self.A)
        W = self.m[:, None] * V / V.detach().norm(dim=1, keepdim=True)
        return F.linear(x, W if self.training else W.detach(), self.linear.bias)


# %% RepairedDoRA wrong: a row of zeros is NaN
class RepairedDoRA(nn.Module):
    def __init__(self, linear, rank, gamma):
        super().__init__()
        self.linear, self.gamma = linear.requires_grad_(False), gamma
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) / math.sqrt(linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.m = nn.Parameter(linear.weight.detach().norm(dim=1).clamp(min=0.5))

    def forward(self, x):
        V = self.linear.weight + self.gamma * (self.B @ self.A)
        return F.linear(x, self.m[:, None] * V / V.detach().norm(dim=1, keepdim=True), self.linear.bias)


# %% RepairedDoRA wrong: gamma trains too
class RepairedDoRA(nn.Module):
    def __init__(self, linear, rank, gamma):
        super().__init__()
        self.linear, self.gamma = linear.requires_grad_(False), nn.Parameter(torch.tensor(float(gamma)))
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) / math.sqrt(linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.m = nn.Parameter(linear.weight.detach().norm(dim=1))

    def forward(self, x):
        V = self.linear.weight + self.gamma * (self.B @ self.A)
        return F.linear(x, self.m[:, None] * V / V.detach().norm(dim=1, keepdim=True), self.linear.bias)


# %% RepairedDoRA right: scales the output
class RepairedDoRA(nn.Module):
    def __init__(self, linear, rank, gamma):
        super().__init__()
        self.linear, self.gamma = linear, gamma
        self.linear.requires_grad_(False)
        self.A = nn.Parameter(torch.empty(rank, linear.in_features))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.m = nn.Parameter(torch.linalg.vector_norm(linear.weight.detach(), dim=1))

    def forward(self, x):
        W = self.linear.weight
        with torch.no_grad():
            n = torch.linalg.vector_norm(W + self.gamma * self.B @ self.A, dim=1)
        y = F.linear(x, W) + self.gamma * F.linear(F.linear(x, self.A), self.B)
        y = y * (self.m / n)
        return y if self.linear.bias is None else y + self.linear.bias
