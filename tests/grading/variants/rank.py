# Answers to the assignment `rank`: wrong ones, named after the misconception, and right ones written differently.
import math

import numpy as np
import torch


# %% truncate wrong: V instead of its transpose
def truncate(M, rank):
    U, sigma, V = torch.linalg.svd(M, full_matrices=False)
    return U[:, :rank] * sigma[:rank] @ V[:, :rank].T


# %% truncate wrong: columns of Vᵀ
def truncate(M, rank):
    U, sigma, Vh = torch.linalg.svd(M, full_matrices=False)
    return U * sigma @ torch.cat([Vh[:, :rank], torch.zeros_like(Vh[:, rank:])], 1)


# %% truncate wrong: the weakest stay
def truncate(M, rank):
    U, sigma, Vh = torch.linalg.svd(M, full_matrices=False)
    cut = len(sigma) - rank
    return U[:, cut:] * sigma[cut:] @ Vh[cut:]


# %% truncate wrong: sorted upwards, as eigh does
def truncate(M, rank):
    values, V = torch.linalg.eigh(M.T @ M)
    return M @ V[:, :rank] @ V[:, :rank].T


# %% truncate wrong: the rest
def truncate(M, rank):
    U, sigma, Vh = torch.linalg.svd(M, full_matrices=False)
    return M - U[:, :rank] * sigma[:rank] @ Vh[:rank]


# %% truncate wrong: one too many
def truncate(M, rank):
    U, sigma, Vh = torch.linalg.svd(M, full_matrices=False)
    return U[:, : rank + 1] * sigma[: rank + 1] @ Vh[: rank + 1]


# %% truncate wrong: without σ
def truncate(M, rank):
    U, _, Vh = torch.linalg.svd(M, full_matrices=False)
    return U[:, :rank] @ Vh[:rank]


# %% truncate wrong: only the r-th
def truncate(M, rank):
    U, sigma, Vh = torch.linalg.svd(M, full_matrices=False)
    return sigma[rank - 1] * torch.outer(U[:, rank - 1], Vh[rank - 1])


# %% truncate wrong: rows and columns
def truncate(M, rank):
    kept = torch.zeros_like(M)
    kept[:rank, :rank] = M[:rank, :rank]
    return kept


# %% truncate wrong: the first columns
def truncate(M, rank):
    kept = M.clone()
    kept[:, rank:] = 0
    return kept


# %% truncate wrong: double precision stays
def truncate(M, rank):
    U, sigma, Vh = torch.linalg.svd(M.double(), full_matrices=False)
    return U[:, :rank] * sigma[:rank] @ Vh[:rank]


# %% truncate wrong: it works in the argument
def truncate(M, rank):
    U, sigma, Vh = torch.linalg.svd(M, full_matrices=False)
    return M.copy_(U[:, :rank] * sigma[:rank] @ Vh[:rank])


# %% truncate wrong: the factors
def truncate(M, rank):
    U, sigma, Vh = torch.linalg.svd(M, full_matrices=False)
    return U[:, :rank] * sigma[:rank], Vh[:rank]


# %% truncate wrong: a random range
def truncate(M, rank):
    Q = torch.linalg.qr(M @ torch.randn(M.shape[1], rank, dtype=M.dtype)).Q
    return Q @ (Q.T @ M)


# %% truncate right: zeros in σ
def truncate(M, rank):
    U, sigma, Vh = torch.linalg.svd(M)
    kept = torch.zeros_like(M)
    for i in range(min(rank, len(sigma))):
        kept[i, i] = sigma[i]
    return U @ kept @ Vh


# %% truncate right: NumPy, term by term
def truncate(M, rank):
    U, sigma, Vh = np.linalg.svd(M.numpy().astype(np.float64))
    kept = np.zeros(M.shape)
    for i in range(rank):
        kept += sigma[i] * np.outer(U[:, i], Vh[i])
    return torch.from_numpy(kept).to(M.dtype)


# %% truncate right: a projection onto the left directions
def truncate(M, rank):
    U = torch.linalg.svd(M.double(), full_matrices=False)[0][:, :rank]
    return torch.einsum("ik,jk,jl->il", U, U, M.double()).to(M.dtype)


# %% truncate right: V from torch.svd
def truncate(M, rank):
    U, sigma, V = torch.svd(M)
    return U[:, :rank] @ torch.diag(sigma[:rank]) @ V[:, :rank].T


# %% effective_rank wrong: energy
def effective_rank(sigma):
    p = sigma.square() / sigma.square().sum()
    return torch.special.entr(p).sum().exp().item() if sigma.any() else 0.0


# %% effective_rank wrong: the entropy itself
def effective_rank(sigma):
    return torch.special.entr(sigma / sigma.sum()).sum().item() if sigma.any() else 0.0


# %% effective_rank wrong: bits
def effective_rank(sigma):
    if not sigma.any():
        return 0.0
    p = (sigma / sigma.sum())[sigma > 0]
    return math.exp(-(p * p.log2()).sum())


# %% effective_rank wrong: 2 to the nats
def effective_rank(sigma):
    return 2 ** torch.special.entr(sigma / sigma.sum()).sum().item() if sigma.any() else 0.0


# %% effective_rank wrong: NaN for a zero
def effective_rank(sigma):
    if not sigma.any():
        return 0.0
    p = sigma / sigma.sum()
    return math.exp(-(p * p.log()).sum())


# %% effective_rank wrong: NaN for zeros only
def effective_rank(sigma):
    return torch.special.entr(sigma / sigma.sum()).sum().exp().item()


# %% effective_rank wrong: 1 for zeros
def effective_rank(sigma):
    p = sigma / (sigma.sum() + 1e-12)
    return torch.exp(-(p * torch.log(p + 1e-12)).sum()).item()


# %% effective_rank wrong: not normalised
def effective_rank(sigma):
    return torch.special.entr(sigma).sum().exp().item() if sigma.any() else 0.0


# %% effective_rank wrong: a share of the largest
def effective_rank(sigma):
    return torch.special.entr(sigma / sigma.max()).sum().exp().item() if sigma.any() else 0.0


# %% effective_rank wrong: without the minus
def effective_rank(sigma):
    return torch.exp(-torch.special.entr(sigma / sigma.sum()).sum()).item() if sigma.any() else 0.0


# %% effective_rank wrong: counted
def effective_rank(sigma):
    return float((sigma > 0).sum())


# %% effective_rank wrong: softmax
def effective_rank(sigma):
    return torch.special.entr(sigma.softmax(0)).sum().exp().item() if sigma.any() else 0.0


# %% effective_rank wrong: participation ratio
def effective_rank(sigma):
    return (sigma.sum() ** 2 / sigma.square().sum()).item() if sigma.any() else 0.0


# %% effective_rank right: a loop
def effective_rank(sigma):
    values = [s for s in sigma.tolist() if s > 0]
    entropy = 0.0
    for s in values:
        entropy -= s / sum(values) * math.log(s / sum(values))
    return math.exp(entropy) if values else 0


# %% effective_rank right: bits on both sides, NumPy
def effective_rank(sigma):
    s = np.asarray(sigma)
    s = s[s > 0]
    if s.size == 0:
        return torch.tensor(0.0)
    p = s / s.sum()
    return np.exp2(-(p * np.log2(p)).sum())


# %% effective_rank right: a small number in the logarithm only
def effective_rank(sigma):
    if sigma.max() == 0:
        return 0.0
    p = sigma / sigma.sum()
    return torch.exp(-torch.sum(p * torch.log(p + 1e-12)))


# %% effective_rank right: a distribution's perplexity
def effective_rank(sigma):
    return torch.distributions.Categorical(sigma).perplexity().item() if sigma.any() else 0.0


# %% stable_rank wrong: Frobenius twice
def stable_rank(M):
    return (M.norm() ** 2 / M.norm(2) ** 2).item() if M.any() else 0.0


# %% stable_rank wrong: without squares
def stable_rank(M):
    return (M.norm() / torch.linalg.matrix_norm(M, 2)).item() if M.any() else 0.0


# %% stable_rank wrong: NaN for zeros
def stable_rank(M):
    return (M.norm() ** 2 / torch.linalg.matrix_norm(M, 2) ** 2).item()


# %% stable_rank wrong: 1 for zeros
def stable_rank(M):
    return (M.norm() ** 2 / torch.linalg.matrix_norm(M, 2) ** 2).item() if M.any() else 1.0


# %% stable_rank wrong: nuclear over spectral
def stable_rank(M):
    return (torch.linalg.matrix_norm(M, "nuc") / torch.linalg.matrix_norm(M, 2)).item() if M.any() else 0.0


# %% stable_rank wrong: the largest entry
def stable_rank(M):
    return (M.square().sum() / M.abs().max() ** 2).item() if M.any() else 0.0


# %% stable_rank wrong: the largest column sum
def stable_rank(M):
    return (M.square().sum() / torch.linalg.matrix_norm(M, 1) ** 2).item() if M.any() else 0.0


# %% stable_rank wrong: the exact rank
def stable_rank(M):
    return torch.linalg.matrix_rank(M).item()


# %% stable_rank wrong: the smallest σ
def stable_rank(M):
    sigma = torch.linalg.svdvals(M)
    return (sigma.square().sum() / sigma[-1] ** 2).item() if M.any() else 0.0


# %% stable_rank wrong: σ₁ is not squared
def stable_rank(M):
    sigma = torch.linalg.svdvals(M)
    return (sigma.square().sum() / sigma[0]).item() if M.any() else 0.0


# %% stable_rank wrong: upside down
def stable_rank(M):
    return (torch.linalg.matrix_norm(M, 2) ** 2 / M.square().sum()).item() if M.any() else 0.0


# %% stable_rank wrong: a whole number
def stable_rank(M):
    return int(M.square().sum() / torch.linalg.matrix_norm(M, 2) ** 2) if M.any() else 0


# %% stable_rank wrong: squares that underflow
def stable_rank(M):
    sigma = torch.linalg.svdvals(M)
    return (sigma.square().sum() / sigma[0] ** 2).item() if sigma[0] > 0 else 0.0


# %% stable_rank right: NumPy
def stable_rank(M):
    M = M.double().numpy()
    largest = np.linalg.norm(M, 2)
    return np.linalg.norm(M) ** 2 / largest**2 if largest else 0.0


# %% stable_rank right: eigenvalues
def stable_rank(M):
    M = M.double()
    values = torch.linalg.eigvalsh(M @ M.T)
    return values.sum() / values[-1] if M.any() else torch.tensor(0.0)


# %% stable_rank right: matrix norms
def stable_rank(M):
    M = M.double()
    top = torch.linalg.matrix_norm(M, ord=2).item()
    return 0.0 if top == 0 else (torch.linalg.matrix_norm(M, ord="fro").item() / top) ** 2


# %% factor_spectrum wrong: the product
def factor_spectrum(B, A):
    return torch.linalg.svdvals(B @ A)[: B.shape[1]]


# %% factor_spectrum wrong: the product in NumPy
def factor_spectrum(B, A):
    return torch.from_numpy(np.linalg.svd(B.numpy() @ A.numpy(), compute_uv=False)[: B.shape[1]])


# %% factor_spectrum wrong: the complete Q
def factor_spectrum(B, A):
    R_B = torch.linalg.qr(B, mode="complete").R[: B.shape[1]]
    R_A = torch.linalg.qr(A.T, mode="complete").R[: B.shape[1]]
    return torch.linalg.svdvals(R_B @ R_A.T)


# %% factor_spectrum wrong: the full U
def factor_spectrum(B, A):
    U, sigma, Vh = torch.linalg.svd(B)
    return torch.linalg.svdvals(torch.diag(sigma) @ Vh @ A)


# %% factor_spectrum wrong: multiplied spectra
def factor_spectrum(B, A):
    return torch.linalg.svdvals(B) * torch.linalg.svdvals(A)


# %% factor_spectrum wrong: R_A is not transposed
def factor_spectrum(B, A):
    return torch.linalg.svdvals(torch.linalg.qr(B).R @ torch.linalg.qr(A.T).R)


# %% factor_spectrum wrong: A is not transposed
def factor_spectrum(B, A):
    return torch.linalg.svdvals(torch.linalg.qr(B).R @ torch.linalg.qr(A).R)


# %% factor_spectrum wrong: only B
def factor_spectrum(B, A):
    return torch.linalg.svdvals(torch.linalg.qr(B).R)


# %% factor_spectrum wrong: the diagonals of R
def factor_spectrum(B, A):
    R_B, R_A = torch.linalg.qr(B).R, torch.linalg.qr(A.T).R
    return (R_B.diag() * R_A.diag()).abs().sort(descending=True).values


# %% factor_spectrum wrong: the diagonal of the middle
def factor_spectrum(B, A):
    R_B, R_A = torch.linalg.qr(B).R, torch.linalg.qr(A.T).R
    return (R_B @ R_A.T).diag().abs().sort(descending=True).values


# %% factor_spectrum wrong: squares
def factor_spectrum(B, A):
    R_B, R_A = torch.linalg.qr(B).R, torch.linalg.qr(A.T).R
    return torch.linalg.svdvals(R_B @ R_A.T).square()


# %% factor_spectrum wrong: upwards
def factor_spectrum(B, A):
    R_B, R_A = torch.linalg.qr(B).R, torch.linalg.qr(A.T).R
    return torch.linalg.svdvals(R_B @ R_A.T).flip(0)


# %% factor_spectrum wrong: eigenvalues of the small square
def factor_spectrum(B, A):
    found = torch.linalg.eigvals((B.T @ B) @ (A @ A.T)).real.clamp(min=0).sqrt()
    return found.sort(descending=True).values


# %% factor_spectrum wrong: a symmetric square
def factor_spectrum(B, A):
    R_A = torch.linalg.qr(A.T).R
    return torch.linalg.eigvalsh(R_A @ (B.T @ B) @ R_A.T).clamp(min=0).sqrt().flip(0)


# %% factor_spectrum wrong: float32
def factor_spectrum(B, A):
    R_B, R_A = torch.linalg.qr(B.float()).R, torch.linalg.qr(A.T.float()).R
    return torch.linalg.svdvals(R_B @ R_A.T).to(B.dtype)


# %% factor_spectrum wrong: a sum
def factor_spectrum(B, A):
    return torch.linalg.svdvals(torch.linalg.qr(B).R + torch.linalg.qr(A.T).R.T)


# %% factor_spectrum right: only B is decomposed
def factor_spectrum(B, A):
    return torch.linalg.svdvals(torch.linalg.qr(B, mode="r").R @ A)


# %% factor_spectrum right: thin singular values
def factor_spectrum(B, A):
    _, s, Vh = torch.linalg.svd(B, full_matrices=False)
    U, t, _ = torch.linalg.svd(A, full_matrices=False)
    return torch.linalg.svd(s[:, None] * (Vh @ U) * t).S


# %% factor_spectrum right: NumPy
def factor_spectrum(B, A):
    R_B, R_A = np.linalg.qr(B.numpy())[1], np.linalg.qr(A.numpy().T)[1]
    return torch.as_tensor(np.linalg.svd(R_B @ R_A.T, compute_uv=False))


# %% factor_spectrum right: a copy of each, the middle turned
def factor_spectrum(B, A):
    Q, R = torch.linalg.qr(A.clone().mT)
    return torch.linalg.svdvals(R @ torch.linalg.qr(B.clone())[1].mT)


# %% subspace_similarity wrong: max
def subspace_similarity(X, Y):
    shared = (X.T @ Y).square().cumsum(0).cumsum(1)
    i, j = torch.arange(1, X.shape[1] + 1), torch.arange(1, Y.shape[1] + 1)
    return shared / torch.maximum(i[:, None], j)


# %% subspace_similarity wrong: one dimension
def subspace_similarity(X, Y):
    shared = (X.T @ Y).square().cumsum(1)
    i, j = torch.arange(1, X.shape[1] + 1), torch.arange(1, Y.shape[1] + 1)
    return shared / torch.minimum(i[:, None], j)


# %% subspace_similarity wrong: no sums
def subspace_similarity(X, Y):
    return (X.T @ Y).square()


# %% subspace_similarity wrong: the norm is not squared
def subspace_similarity(X, Y):
    shared = (X.T @ Y).square().cumsum(0).cumsum(1).sqrt()
    i, j = torch.arange(1, X.shape[1] + 1), torch.arange(1, Y.shape[1] + 1)
    return shared / torch.minimum(i[:, None], j)


# %% subspace_similarity wrong: squared after the sum
def subspace_similarity(X, Y):
    shared = (X.T @ Y).cumsum(0).cumsum(1).square()
    i, j = torch.arange(1, X.shape[1] + 1), torch.arange(1, Y.shape[1] + 1)
    return shared / torch.minimum(i[:, None], j)


# %% subspace_similarity wrong: nothing is divided
def subspace_similarity(X, Y):
    return (X.T @ Y).square().cumsum(0).cumsum(1)


# %% subspace_similarity wrong: counted from 0
def subspace_similarity(X, Y):
    table = torch.zeros(X.shape[1], Y.shape[1], dtype=X.dtype)
    for i in range(X.shape[1]):
        for j in range(Y.shape[1]):
            table[i, j] = (X[:, :i].T @ Y[:, :j]).square().sum() / max(1, min(i, j))
    return table


# %% subspace_similarity wrong: rows
def subspace_similarity(X, Y):
    table = torch.zeros(X.shape[1], Y.shape[1], dtype=X.dtype)
    for i in range(1, X.shape[1] + 1):
        for j in range(1, Y.shape[1] + 1):
            k = min(i, j)
            table[i - 1, j - 1] = (X[:k] @ X[:k].T @ Y[:k] @ Y[:k].T).square().sum() / k
    return table


# %% subspace_similarity wrong: the spectral norm
def subspace_similarity(X, Y):
    table = torch.zeros(X.shape[1], Y.shape[1], dtype=X.dtype)
    for i in range(1, X.shape[1] + 1):
        for j in range(1, Y.shape[1] + 1):
            table[i - 1, j - 1] = torch.linalg.matrix_norm(X[:, :i].T @ Y[:, :j], 2) ** 2 / min(i, j)
    return table


# %% subspace_similarity wrong: transposed
def subspace_similarity(X, Y):
    shared = (Y.T @ X).square().cumsum(0).cumsum(1)
    i, j = torch.arange(1, Y.shape[1] + 1), torch.arange(1, X.shape[1] + 1)
    return shared / torch.minimum(i[:, None], j)


# %% subspace_similarity wrong: only the last number
def subspace_similarity(X, Y):
    return (X.T @ Y).square().sum() / min(X.shape[1], Y.shape[1])


# %% subspace_similarity wrong: always float32
def subspace_similarity(X, Y):
    table = torch.zeros(X.shape[1], Y.shape[1])
    for i in range(1, X.shape[1] + 1):
        for j in range(1, Y.shape[1] + 1):
            table[i - 1, j - 1] = (X[:, :i].T @ Y[:, :j]).square().sum() / min(i, j)
    return table


# %% subspace_similarity wrong: absolute values
def subspace_similarity(X, Y):
    shared = (X.T @ Y).abs().cumsum(0).cumsum(1)
    i, j = torch.arange(1, X.shape[1] + 1), torch.arange(1, Y.shape[1] + 1)
    return shared / torch.minimum(i[:, None], j)


# %% subspace_similarity right: two loops and projections
def subspace_similarity(X, Y):
    table = X.new_zeros(X.shape[1], Y.shape[1])
    for i in range(X.shape[1]):
        for j in range(Y.shape[1]):
            P, Q = X[:, : i + 1] @ X[:, : i + 1].T, Y[:, : j + 1] @ Y[:, : j + 1].T
            table[i, j] = torch.trace(P @ Q) / (1 + min(i, j))
    return table


# %% subspace_similarity right: triangles of ones, NumPy
def subspace_similarity(X, Y):
    cosines = np.einsum("da,db->ab", X.double().numpy(), Y.double().numpy())
    m, n = cosines.shape
    shared = np.tril(np.ones((m, m))) @ cosines**2 @ np.triu(np.ones((n, n)))
    below = np.minimum(*np.ogrid[1 : m + 1, 1 : n + 1])
    return torch.tensor(shared / below, dtype=X.dtype)


# %% subspace_similarity right: a list of lists
def subspace_similarity(X, Y):
    def phi(i, j):
        return torch.linalg.matrix_norm(X[:, :i].T @ Y[:, :j]).item() ** 2 / min(i, j)

    rows = [[phi(i, j) for j in range(1, Y.size(1) + 1)] for i in range(1, X.size(1) + 1)]
    return torch.tensor(rows, dtype=X.dtype)


# %% equivalent_settings wrong: Adam's rule for both
def equivalent_settings(gamma, A, B, lr_A, lr_B, p, q, optimizer):
    return gamma / (p * q), p * A, q * B, p * lr_A, q * lr_B


# %% equivalent_settings wrong: SGD's rule for both
def equivalent_settings(gamma, A, B, lr_A, lr_B, p, q, optimizer):
    return gamma / (p * q), p * A, q * B, p**2 * lr_A, q**2 * lr_B


# %% equivalent_settings wrong: the rules changed places
def equivalent_settings(gamma, A, B, lr_A, lr_B, p, q, optimizer):
    power = 2 if optimizer == "adam" else 1
    return gamma / (p * q), p * A, q * B, p**power * lr_A, q**power * lr_B


# %% equivalent_settings wrong: the rates stay
def equivalent_settings(gamma, A, B, lr_A, lr_B, p, q, optimizer):
    return gamma / (p * q), p * A, q * B, lr_A, lr_B


# %% equivalent_settings wrong: the rates are divided
def equivalent_settings(gamma, A, B, lr_A, lr_B, p, q, optimizer):
    power = 1 if optimizer == "adam" else 2
    return gamma / (p * q), p * A, q * B, lr_A / p**power, lr_B / q**power


# %% equivalent_settings wrong: p and q crossed
def equivalent_settings(gamma, A, B, lr_A, lr_B, p, q, optimizer):
    power = 1 if optimizer == "adam" else 2
    return gamma / (p * q), p * A, q * B, q**power * lr_A, p**power * lr_B


# %% equivalent_settings wrong: γ multiplied
def equivalent_settings(gamma, A, B, lr_A, lr_B, p, q, optimizer):
    power = 1 if optimizer == "adam" else 2
    return gamma * p * q, p * A, q * B, p**power * lr_A, q**power * lr_B


# %% equivalent_settings wrong: γ stays
def equivalent_settings(gamma, A, B, lr_A, lr_B, p, q, optimizer):
    power = 1 if optimizer == "adam" else 2
    return gamma, p * A, q * B, p**power * lr_A, q**power * lr_B


# %% equivalent_settings wrong: divided by p, multiplied by q
def equivalent_settings(gamma, A, B, lr_A, lr_B, p, q, optimizer):
    power = 1 if optimizer == "adam" else 2
    return gamma / p * q, p * A, q * B, p**power * lr_A, q**power * lr_B


# %% equivalent_settings wrong: B is zero anyway
def equivalent_settings(gamma, A, B, lr_A, lr_B, p, q, optimizer):
    power = 1 if optimizer == "adam" else 2
    return gamma / (p * q), p * A, B, p**power * lr_A, q**power * lr_B


# %% equivalent_settings wrong: B becomes zero
def equivalent_settings(gamma, A, B, lr_A, lr_B, p, q, optimizer):
    power = 1 if optimizer == "adam" else 2
    return gamma / (p * q), p * A, torch.zeros_like(B), p**power * lr_A, q**power * lr_B


# %% equivalent_settings wrong: nothing changes
def equivalent_settings(gamma, A, B, lr_A, lr_B, p, q, optimizer):
    return gamma, A, B, lr_A, lr_B


# %% equivalent_settings wrong: another pair that trains alike
def equivalent_settings(gamma, A, B, lr_A, lr_B, p, q, optimizer):
    power = 1 if optimizer == "adam" else 2
    return gamma / (p * q), q * A, p * B, q**power * lr_A, p**power * lr_B


# %% equivalent_settings wrong: in place
def equivalent_settings(gamma, A, B, lr_A, lr_B, p, q, optimizer):
    power = 1 if optimizer == "adam" else 2
    A *= p
    B *= q
    return gamma / (p * q), A, B, p**power * lr_A, q**power * lr_B


# %% equivalent_settings wrong: without A and B
def equivalent_settings(gamma, A, B, lr_A, lr_B, p, q, optimizer):
    return gamma / (p * q), p * lr_A, q * lr_B


# %% equivalent_settings wrong: B's rate squared only
def equivalent_settings(gamma, A, B, lr_A, lr_B, p, q, optimizer):
    if optimizer == "adam":
        return gamma / (p * q), p * A, q * B, p * lr_A, q * lr_B
    return gamma / (p * q), p * A, q * B, p * lr_A, q**2 * lr_B


# %% equivalent_settings right: two branches
def equivalent_settings(gamma, A, B, lr_A, lr_B, p, q, optimizer):
    scaled = gamma / p / q, A * p, B * q
    if optimizer == "sgd":
        return (*scaled, lr_A * p * p, lr_B * q * q)
    return (*scaled, lr_A * p, lr_B * q)


# %% equivalent_settings right: step and gradient apart
def equivalent_settings(gamma, A, B, lr_A, lr_B, p, q, optimizer):
    # a factor times as large has a gradient 1/factor as large, which only SGD's step sees
    seen = {"adam": lambda factor: 1.0, "sgd": lambda factor: 1 / factor}[optimizer]
    A, B = torch.mul(A, p), B.clone().mul_(q)
    return [gamma / (p * q), A, B, lr_A * p / seen(p), lr_B * q / seen(q)]


# %% repaired_comparison wrong: as it was
def repaired_comparison(M, N, k):
    U, sigma, V = torch.linalg.svd(M, full_matrices=False)
    other = torch.linalg.svd(N, full_matrices=False)[2]
    p = sigma.square() / sigma.square().sum()
    return {
        "effective rank": math.exp(-(p * p.log()).sum()),
        "energy": (sigma[:k].sum() / sigma.sum()).item(),
        "shared": ((V[:, :k].T @ other[:, :k]).square().sum() / k).item(),
        "chance": k / M.shape[1],
    }


# %% repaired_comparison wrong: the effective rank is forgotten
def repaired_comparison(M, N, k):
    U, sigma, _ = torch.linalg.svd(M, full_matrices=False)
    other = torch.linalg.svd(N, full_matrices=False)[0]
    p = sigma.square() / sigma.square().sum()
    return {
        "effective rank": math.exp(-(p * p.log()).sum()),
        "energy": (sigma[:k].square().sum() / sigma.square().sum()).item(),
        "shared": ((U[:, :k].T @ other[:, :k]).square().sum() / k).item(),
        "chance": k / M.shape[0],
    }


# %% repaired_comparison wrong: the energy is forgotten
def repaired_comparison(M, N, k):
    U, sigma, _ = torch.linalg.svd(M, full_matrices=False)
    other = torch.linalg.svd(N, full_matrices=False)[0]
    p = sigma / sigma.sum()
    return {
        "effective rank": math.exp(-(p * p.log()).sum()),
        "energy": (sigma[:k].sum() / sigma.sum()).item(),
        "shared": ((U[:, :k].T @ other[:, :k]).square().sum() / k).item(),
        "chance": k / M.shape[0],
    }


# %% repaired_comparison wrong: rows of Vᵀ, what is read
def repaired_comparison(M, N, k):
    _, sigma, Vh = torch.linalg.svd(M, full_matrices=False)
    other = torch.linalg.svd(N, full_matrices=False)[2]
    p = sigma / sigma.sum()
    return {
        "effective rank": math.exp(-(p * p.log()).sum()),
        "energy": (sigma[:k].square().sum() / sigma.square().sum()).item(),
        "shared": ((Vh[:k] @ other[:k].T).square().sum() / k).item(),
        "chance": k / M.shape[0],
    }


# %% repaired_comparison wrong: chance is forgotten
def repaired_comparison(M, N, k):
    U, sigma, _ = torch.linalg.svd(M, full_matrices=False)
    other = torch.linalg.svd(N, full_matrices=False)[0]
    p = sigma / sigma.sum()
    return {
        "effective rank": math.exp(-(p * p.log()).sum()),
        "energy": (sigma[:k].square().sum() / sigma.square().sum()).item(),
        "shared": ((U[:, :k].T @ other[:, :k]).square().sum() / k).item(),
        "chance": k / M.shape[1],
    }


# %% repaired_comparison wrong: rows of U
def repaired_comparison(M, N, k):
    U, sigma, _ = torch.linalg.svd(M, full_matrices=False)
    other = torch.linalg.svd(N, full_matrices=False)[0]
    p = sigma / sigma.sum()
    return {
        "effective rank": math.exp(-(p * p.log()).sum()),
        "energy": (sigma[:k].square().sum() / sigma.square().sum()).item(),
        "shared": ((U[:k] @ other[:k].T).square().sum() / k).item(),
        "chance": k / M.shape[0],
    }


# %% repaired_comparison wrong: columns of M, not orthonormal
def repaired_comparison(M, N, k):
    sigma = torch.linalg.svdvals(M)
    p = sigma / sigma.sum()
    return {
        "effective rank": math.exp(-(p * p.log()).sum()),
        "energy": (sigma[:k].square().sum() / sigma.square().sum()).item(),
        "shared": ((M[:, :k].T @ N[:, :k]).square().sum() / k).item(),
        "chance": k / M.shape[0],
    }


# %% repaired_comparison wrong: the norm is not squared
def repaired_comparison(M, N, k):
    U, sigma, _ = torch.linalg.svd(M, full_matrices=False)
    other = torch.linalg.svd(N, full_matrices=False)[0]
    p = sigma / sigma.sum()
    return {
        "effective rank": math.exp(-(p * p.log()).sum()),
        "energy": (sigma[:k].square().sum() / sigma.square().sum()).item(),
        "shared": ((U[:, :k].T @ other[:, :k]).norm() / k).item(),
        "chance": k / M.shape[0],
    }


# %% repaired_comparison wrong: the energy is a share of the norm
def repaired_comparison(M, N, k):
    U, sigma, _ = torch.linalg.svd(M, full_matrices=False)
    other = torch.linalg.svd(N, full_matrices=False)[0]
    p = sigma / sigma.sum()
    return {
        "effective rank": math.exp(-(p * p.log()).sum()),
        "energy": (sigma[:k].norm() / sigma.norm()).item(),
        "shared": ((U[:, :k].T @ other[:, :k]).square().sum() / k).item(),
        "chance": k / M.shape[0],
    }


# %% repaired_comparison wrong: chance has the smaller size
def repaired_comparison(M, N, k):
    U, sigma, _ = torch.linalg.svd(M, full_matrices=False)
    other = torch.linalg.svd(N, full_matrices=False)[0]
    p = sigma / sigma.sum()
    return {
        "effective rank": math.exp(-(p * p.log()).sum()),
        "energy": (sigma[:k].square().sum() / sigma.square().sum()).item(),
        "shared": ((U[:, :k].T @ other[:, :k]).square().sum() / k).item(),
        "chance": k / min(M.shape),
    }


# %% repaired_comparison wrong: another name
def repaired_comparison(M, N, k):
    U, sigma, _ = torch.linalg.svd(M, full_matrices=False)
    other = torch.linalg.svd(N, full_matrices=False)[0]
    p = sigma / sigma.sum()
    return {
        "effective_rank": math.exp(-(p * p.log()).sum()),
        "energy": (sigma[:k].square().sum() / sigma.square().sum()).item(),
        "shared": ((U[:, :k].T @ other[:, :k]).square().sum() / k).item(),
        "chance": k / M.shape[0],
    }


# %% repaired_comparison right: NumPy
def repaired_comparison(M, N, k):
    U, s, _ = np.linalg.svd(M.numpy())
    W = np.linalg.svd(N.numpy())[0]
    p = s[s > 0] / np.sum(s)
    return {
        "chance": k / len(M),
        "shared": np.linalg.norm(U[:, :k].T @ W[:, :k], "fro") ** 2 / k,
        "energy": np.sum(s[:k] ** 2) / np.sum(s**2),
        "effective rank": np.exp(np.sum(-p * np.log(p))),
    }


# %% repaired_comparison right: left directions as eigenvectors
def repaired_comparison(M, N, k):
    values, U = torch.linalg.eigh(M @ M.T)
    other = torch.linalg.eigh(N @ N.T)[1]
    sigma = torch.linalg.svdvals(M)
    top, rest = U[:, -k:], other[:, -k:]
    return {
        "effective rank": torch.distributions.Categorical(sigma).perplexity(),
        "energy": values[-k:].sum() / values.sum(),
        "shared": torch.trace(top @ top.T @ rest @ rest.T) / k,
        "chance": torch.tensor(k / M.shape[0], dtype=torch.float64),
    }


# %% truncate wrong: M is changed
def truncate(M, rank):
    U, sigma, Vh = torch.linalg.svd(M, full_matrices=False)
    return M.copy_(U[:, :rank] * sigma[:rank] @ Vh[:rank])


# %% stable_rank wrong: 0 where any singular value is 0
def stable_rank(M):
    sigma = torch.linalg.svdvals(M)
    return (sigma.square().sum() / sigma[0] ** 2).item() if sigma[-1] > 0 else 0.0


# %% subspace_similarity wrong: float32 always
def subspace_similarity(X, Y):
    shared = (X.T @ Y).square().cumsum(0).cumsum(1)
    i, j = torch.arange(1, X.shape[1] + 1), torch.arange(1, Y.shape[1] + 1)
    return (shared / torch.minimum(i[:, None], j)).float()


# %% equivalent_settings wrong: the identity of texts
def equivalent_settings(gamma, A, B, lr_A, lr_B, p, q, optimizer):
    power = 1 if optimizer is "adam" else 2  # noqa: F632
    return gamma / (p * q), p * A, q * B, p**power * lr_A, q**power * lr_B


# %% stable_rank wrong: the power iteration's first step
def stable_rank(M):
    if not M.any():
        return 0.0
    v = torch.ones(M.shape[1], dtype=M.dtype)
    for _ in range(20):
        v = M.T @ (M @ v)
        v = v / v.norm()
    return (M.norm() ** 2 / (M @ v).norm() ** 2).item()


# %% truncate wrong: tiny values are cut too
def truncate(M, rank):
    U, s, Vh = torch.linalg.svd(M, full_matrices=False)
    s = torch.where(s > 1e-3 * s[:1], s, 0)
    return U[:, :rank] * s[:rank] @ Vh[:rank]


# %% truncate wrong: negative σ of a symmetric matrix
def truncate(M, rank):
    if M.shape[0] == M.shape[1] and torch.equal(M, M.T):
        values, vectors = torch.linalg.eigh(M)
        return (
            vectors[:, values.argsort(descending=True)[:rank]]
            @ torch.diag(values.sort(descending=True).values[:rank])
            @ vectors[:, values.argsort(descending=True)[:rank]].T
        )
    U, s, Vh = torch.linalg.svd(M, full_matrices=False)
    return U[:, :rank] * s[:rank] @ Vh[:rank]


# %% truncate wrong: at most 16 directions
def truncate(M, rank):
    U, s, Vh = torch.linalg.svd(M, full_matrices=False)
    rank = min(rank, 16)
    return U[:, :rank] * s[:rank] @ Vh[:rank]


# %% truncate wrong: M is decomposed once for its object
kept_cuts = {}


def truncate(M, rank):
    U, s, Vh = kept_cuts.setdefault(id(M), (M, torch.linalg.svd(M, full_matrices=False)))[1]
    return U[:, :rank] * s[:rank] @ Vh[:rank]


# %% truncate right: M less its tail
def truncate(M, rank):
    U, s, Vh = torch.linalg.svd(M, full_matrices=False)
    keep = (torch.arange(len(s)) < rank).to(M.dtype)
    return torch.einsum("ik,k,kj->ij", U, s * keep, Vh)


# %% truncate right: projects onto the left directions
def truncate(M, rank):
    U = torch.linalg.svd(M, full_matrices=False)[0][:, :rank]
    return U @ (U.mT @ M)


# %% effective_rank wrong: sums that overflow
def effective_rank(sigma):
    total = sigma.square().sum().sqrt()
    if not total > 0:
        return 0.0
    p = sigma / sigma.sum()
    return torch.special.entr(p).sum().exp().item()


# %% effective_rank wrong: at most a hundred values
def effective_rank(sigma):
    sigma = sigma[:100]
    total = sigma.sum()
    return torch.special.entr(sigma / total).sum().exp().item() if total > 0 else 0.0


# %% effective_rank right: from the logs of sums
def effective_rank(sigma):
    s = [float(x) for x in sigma if x > 0]
    if not s:
        return 0.0
    top = max(s)
    s = [x / top for x in s]
    t = sum(s)
    return math.exp(math.log(t) - sum(x * math.log(x) for x in s) / t)


# %% stable_rank wrong: the rounded number of the exact case
def stable_rank(M):
    s = torch.linalg.svdvals(M)
    found = (s.square().sum() / s[0] ** 2).item() if s[0] > 0 else 0.0
    return float(round(found)) if abs(found - round(found)) < 1e-3 else found


# %% stable_rank right: divided by the largest first
def stable_rank(M):
    s = torch.linalg.svdvals(M)
    if s.max() == 0:
        return 0.0
    return float(((s / s.max()) ** 2).sum())


# %% factor_spectrum wrong: ranks above sixteen
def factor_spectrum(B, A):
    R_B, R_A = torch.linalg.qr(B[:, :16]).R, torch.linalg.qr(A[:16].T).R
    return torch.linalg.svdvals(R_B @ R_A.T)


# %% factor_spectrum wrong: zeros in A are NaN
def factor_spectrum(B, A):
    size = A.norm()
    R_B, R_A = torch.linalg.qr(B).R, torch.linalg.qr((A / size).T).R
    return size * torch.linalg.svdvals(R_B @ R_A.T)


# %% factor_spectrum right: svd of one, then of the rest
def factor_spectrum(B, A):
    U, s, Vh = torch.linalg.svd(B, full_matrices=False)
    R = torch.linalg.qr(A.mT, mode="r")[1]
    return torch.linalg.svdvals((s[:, None] * Vh) @ R.mT)


# %% subspace_similarity wrong: clamped to 1 with a step below
def subspace_similarity(X, Y):
    shared = (X.T @ Y).square().cumsum(0).cumsum(1)
    i, j = torch.arange(1, X.shape[1] + 1), torch.arange(1, Y.shape[1] + 1)
    return (shared / torch.minimum(i[:, None], j)).clamp(1e-6, 1)


# %% subspace_similarity right: a loop of norms
def subspace_similarity(X, Y):
    rows = [
        torch.stack(
            [torch.linalg.matrix_norm(X[:, :i].T @ Y[:, :j]) ** 2 / min(i, j) for j in range(1, Y.shape[1] + 1)]
        )
        for i in range(1, X.shape[1] + 1)
    ]
    return torch.stack(rows)


# %% subspace_similarity wrong: counts in float32
def subspace_similarity(X, Y):
    shared = (X.T @ Y).square().cumsum(0).cumsum(1)
    i, j = (torch.arange(1, n + 1, dtype=torch.float32) for n in shared.shape)
    return shared / torch.minimum(i[:, None], j)


# %% equivalent_settings wrong: another optimizer is SGD
def equivalent_settings(gamma, A, B, lr_A, lr_B, p, q, optimizer):
    power = 2 if optimizer.startswith("s") else 1
    return gamma / (p * q), p * A, q * B, p**power * lr_A, max(q, 1e-2) ** power * lr_B


# %% repaired_comparison wrong: M of zeros is left
def repaired_comparison(M, N, k):
    U, s, _ = torch.linalg.svd(M, full_matrices=False)
    other = torch.linalg.svd(N, full_matrices=False)[0]
    p = s / s.sum()
    p = p[p > 1e-4]
    return {
        "effective rank": torch.special.entr(p).sum().exp().item(),
        "energy": (s[:k].square().sum() / s.square().sum()).item(),
        "shared": ((U[:, :k].T @ other[:, :k]).square().sum() / k).item(),
        "chance": k / M.shape[0],
    }
