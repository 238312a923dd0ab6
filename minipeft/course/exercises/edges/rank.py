"""The edges of the assignment `rank`."""

from __future__ import annotations

from random import Random

import torch

from minipeft.course.exercises.draw import assemble, falling, normal, orthonormal


def truncate(M, rank):
    U, sigma, Vh = torch.linalg.svd(M, full_matrices=False)
    return U[:, :rank] * sigma[:rank] @ Vh[:rank]


def truncate_edges(rng: Random):
    for d_out, d_in in ((5, 5), (1, 6), (6, 1), (1, 1), (4, 7)):
        M = normal(rng, d_out, d_in, dtype=torch.float64)
        for rank in sorted({0, 1, min(d_out, d_in)}):
            yield f"approximate a {d_out}×{d_in} matrix at rank {rank}", (M, rank)
    thin = normal(rng, 5, 1, dtype=torch.float64) @ normal(rng, 1, 4, dtype=torch.float64)
    yield "give back a matrix of rank 1 at rank 3", (thin, 3)
    turned = torch.tensor([[-3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    yield "take the strongest direction of a symmetric matrix whatever its sign", (turned, 1)
    yield "give back zeros", (torch.zeros(3, 4, dtype=torch.float64), 2)
    yield "hold for tiny numbers", (1e-9 * thin, 1)
    U, V = orthonormal(rng, 5, 3), orthonormal(rng, 4, 3)
    steep = assemble(U, torch.tensor([1.0, 1e-4, 1e-7], dtype=torch.float64), V)
    for rank in (2, 3):
        yield f"keep what is weak among the {rank} strongest", (steep, rank)


def effective_rank(sigma):
    total = sigma.sum()
    return torch.special.entr(sigma / total).sum().exp().item() if total > 0 else 0.0


def effective_edges(rng: Random):
    values = torch.tensor([3.0, 1.5, 0.4, 0.1], dtype=torch.float64)
    for scale in (1e-30, 1e-12, 1e12):
        yield f"be the same for values that are {scale:g} times as large", (scale * values,)
    yield "be 1 for a single value", (values[:1],)
    yield "take values in any order", (values[[2, 0, 3, 1]],)
    yield "take float32", (values.float(),)
    yield "take tiny float32", (1e-30 * values.float(),)
    yield "ignore zeros among them", (torch.tensor([3.0, 0.0, 1.0, 0.0]),)
    yield "take a zero in front of others", (torch.tensor([0.0, 3.0, 1.0]),)
    yield "be 0 for a single zero", (torch.zeros(1),)


def stable_rank(M):
    sigma = torch.linalg.svdvals(M)
    return (sigma / sigma[0]).square().sum().item() if sigma[0] > 0 else 0.0


def stable_edges(rng: Random):
    M = normal(rng, 4, 6, dtype=torch.float64)
    for scale in (1e-30, 1e-9, 1e12):
        yield f"be the same for a matrix that is {scale:g} times as large", (scale * M,)
    yield "be 1 for a single row", (M[:1],)
    yield "be 1 for a single column", (M[:, :1],)
    yield "be 1 for a single number", (M[:1, :1],)
    yield "take a square matrix", (M[:, :4],)
    yield "find the strongest direction wherever it points", (torch.tensor([[1.0, -1.0], [0.1, 0.1]]).double(),)
    yield "be the size of an identity", (torch.eye(5),)
    yield "take float32", (M.float(),)
    yield "take tiny float32", (1e-30 * M.float(),)
    yield "count a little besides the strongest direction", (torch.diag(torch.tensor([1.0, 0.02])).double(),)
    yield "be 0 for a single zero", (torch.zeros(1, 1),)
    yield "take a matrix of low rank, whose other σ are 0", (torch.diag(torch.tensor([3.0, 2.0, 0.0])),)


def factor_spectrum(B, A):
    return torch.linalg.svdvals(torch.linalg.qr(B).R @ torch.linalg.qr(A.T).R.T)


def factor_edges(rng: Random):
    for d_out, d_in, r in ((5, 7, 1), (4, 4, 4), (1, 1, 1), (6, 6, 2), (3, 9, 3)):
        B, A = normal(rng, d_out, r, dtype=torch.float64), normal(rng, r, d_in, dtype=torch.float64)
        yield f"give the spectrum of {d_out}×{r} times {r}×{d_in}", (B, A, 1)
    yield "give zeros while B is zero", (0 * B, A, 1)
    yield "give zeros while A is zero", (B, 0 * A, 1)


def subspace_similarity(X, Y):
    shared = (X.T @ Y).square().cumsum(0).cumsum(1)
    i, j = torch.arange(1, X.shape[1] + 1), torch.arange(1, Y.shape[1] + 1)
    return shared / torch.minimum(i[:, None], j)


def similarity_edges(rng: Random):
    for d, m, n in ((6, 1, 1), (6, 1, 4), (6, 4, 1), (6, 3, 3), (5, 5, 5), (6, 5, 2), (1, 1, 1)):
        yield f"compare {m} with {n} directions in {d} dimensions", (orthonormal(rng, d, m), orthonormal(rng, d, n))
    E = torch.eye(6, dtype=torch.float64)
    yield "be 0 for directions that share nothing", (E[:, :3], E[:, 3:])


def equivalent_settings(gamma, A, B, lr_A, lr_B, p, q, optimizer):
    power = 1 if optimizer == "adam" else 2
    return gamma / (p * q), p * A, q * B, p**power * lr_A, q**power * lr_B


def equivalent_edges(rng: Random):
    for optimizer in ("adam", "sgd"):
        for p, q in ((1.0, 1.0), (2.0, 1.0), (1.0, 0.25), (0.5, 0.5), (4.0, 0.25), (3, 2), (1e-3, 1e-4)):
            A, B = normal(rng, 1, 4, dtype=torch.float64), normal(rng, 3, 1, dtype=torch.float64)
            yield f"trade p = {p} and q = {q} under {optimizer}", (2.0, A, B, 0.01, 0.03, p, q, optimizer)


def repaired_comparison(M, N, k):
    U, sigma, _ = torch.linalg.svd(M, full_matrices=False)
    other = torch.linalg.svd(N, full_matrices=False)[0]
    return {
        "effective rank": torch.special.entr(sigma / sigma.sum()).sum().exp().item(),
        "energy": (sigma[:k].square().sum() / sigma.square().sum()).item(),
        "shared": ((U[:, :k].T @ other[:, :k]).square().sum() / k).item(),
        "chance": k / M.shape[0],
    }


def repair_edges(rng: Random):
    def made(d_out, d_in, n, zeros=0):
        sigma = torch.cat([falling(rng, n), torch.zeros(zeros, dtype=torch.float64)])
        U, V = orthonormal(rng, d_out, n + zeros), orthonormal(rng, d_in, n + zeros)
        return U * sigma @ V.T

    yield "compare square matrices", (made(6, 6, 6), made(6, 6, 6), 2)
    yield "compare single directions", (made(6, 8, 5), made(6, 8, 5), 1)
    yield "compare all directions that there are", (made(5, 8, 5), made(5, 8, 5), 5)
    yield (
        "take a matrix of low rank, whose other σ are 0",
        (diagonal(3.0, 1.0, 0.0, 0.0), diagonal(1.0, 2.0, 0.0, 0.0), 2),
    )
    yield "take tiny numbers", (1e-9 * made(6, 8, 5), made(6, 8, 5), 2)
    yield "count directions that are weak", (diagonal(1.0, 1e-5, 1e-5), diagonal(1.0, 2.0, 3.0), 2)
    yield "take two matrices that are alike", (made(7, 4, 4), made(7, 4, 4), 2)


def diagonal(*sigma: float) -> torch.Tensor:
    return torch.cat([torch.diag(torch.tensor(sigma, dtype=torch.float64)), torch.zeros(2, len(sigma)).double()])


MEASURED = "a measurement: nothing trains through it"
SVD = "torch.linalg has no 16-bit decompositions"
EDGES = {
    name: {"reference": (reference,), "edges": edges, "without": {"gradient": MEASURED, "types": SVD}}
    for name, reference, edges in (
        ("truncate", truncate, truncate_edges),
        ("effective_rank", effective_rank, effective_edges),
        ("stable_rank", stable_rank, stable_edges),
        ("factor_spectrum", factor_spectrum, factor_edges),
        ("subspace_similarity", subspace_similarity, similarity_edges),
        ("equivalent_settings", equivalent_settings, equivalent_edges),
        ("repaired_comparison", repaired_comparison, repair_edges),
    )
}
EDGES["subspace_similarity"]["without"] = {"gradient": MEASURED}
EDGES["equivalent_settings"]["positive"] = ("lr_A", "lr_B", "p", "q")
