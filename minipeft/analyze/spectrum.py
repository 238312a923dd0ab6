"""What a ΔW looks like from inside: its singular values, what random matrices of its size would show, and what the
model loses when only the strongest directions of ΔW stay.

    found = spectra(tuned)                              # {path: Spectrum}; low-rank factors are never multiplied out
    found[path].effective_rank                          # how many directions share the change
    with truncated(tuned, rank=4): mp.evaluate(tuned, task)

ΔW = Σᵢ σᵢ·uᵢ·vᵢᵀ with σ₁ ≥ σ₂ ≥ … ≥ 0. Its best rank-r approximation: the sum of the first r terms (Eckart–Young 1936).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from minipeft.attach import Tuned
from minipeft.layer import Layer
from minipeft.merging import rounded
from minipeft.methods.common import check_whole
from minipeft.methods.lora import LoRALayer
from minipeft.targets import Slot, flipped, module_at


@dataclass(frozen=True)
class Spectrum:
    """The thin singular value decomposition of a matrix M (d_out, d_in): M = U·diag(sigma)·Vᵀ.

    `U` (d_out, k), `sigma` (k,) falling, `V` (d_in, k); k ≤ min(d_out, d_in), and for M = B·A at most the rank of A.
    """

    U: torch.Tensor
    sigma: torch.Tensor
    V: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.U.shape[0], self.V.shape[0]

    @property
    def norm(self) -> float:
        """‖M‖_F = √Σσ²."""
        return self.sigma.norm().item()

    @property
    def energy(self) -> torch.Tensor:
        """(k,): the share of ‖M‖²_F that the first i directions hold, Σ_{j≤i} σⱼ² / Σσ²; zeros for M = 0."""
        squares = self.sigma.double().square()
        return squares.cumsum(0) / squares.sum().clamp_min(torch.finfo(torch.double).tiny)

    @property
    def effective_rank(self) -> float:
        """exp(entropy(σ/Σσ)): k if all σ are alike, 1 for one direction, 0 for M = 0 (Roy and Vetterli 2007)."""
        total = self.sigma.double().sum()
        return torch.special.entr(self.sigma.double() / total).sum().exp().item() if total > 0 else 0.0

    @property
    def stable_rank(self) -> float:
        """‖M‖²_F / ‖M‖²₂ = Σσ²/σ₁²: at most the rank, and small noise hardly moves it; 0 for M = 0."""
        largest = self.sigma[0].double()
        return (self.sigma.double().square().sum() / largest.square()).item() if largest > 0 else 0.0

    @property
    def numerical_rank(self) -> int:
        """How many σ are above σ₁·max(d_out, d_in)·ε, with ε of the dtype, as in `numpy.linalg.matrix_rank`."""
        return int((self.sigma > self.sigma[0] * max(self.shape) * torch.finfo(self.sigma.dtype).eps).sum())

    def rank_for(self, share: float) -> int:
        """The least r whose energy is at least `share`, in (0, 1]."""
        if not 0 < share <= 1:
            raise ValueError(f"share={share!r} is outside (0, 1]; 0.9 asks for nine tenths of the energy.")
        enough = self.energy >= share - 1e-12
        return int(enough.int().argmax()) + 1 if enough.any() else len(self.sigma)

    def truncate(self, rank: int) -> Spectrum:
        """The best approximation of rank `rank` (0 gives the zero matrix): error √Σ_{i>r} σᵢ² in Frobenius norm."""
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:
            raise ValueError(f"rank={rank!r} is not a whole number of at least 0.")
        return Spectrum(self.U[:, :rank], self.sigma[:rank], self.V[:, :rank])

    def matrix(self) -> torch.Tensor:
        """M itself, (d_out, d_in)."""
        return self.U * self.sigma @ self.V.T


def decompose(left: torch.Tensor, right: torch.Tensor | None = None) -> Spectrum:
    """The spectrum of `left` (d_out, d_in), or of `left @ right` for B (d_out, r) and A (r, d_in).

    B·A with r ≤ min(d_out, d_in) is never formed: B = Q_B·R_B and Aᵀ = Q_A·R_A, so B·A = Q_B·(R_B·R_Aᵀ)·Q_Aᵀ, and the
    middle is r × r. 4096 × 4096 at r = 16 takes milliseconds. At least float32 is used inside.
    """
    for name, matrix in (("left", left), ("right", right)):
        if matrix is not None and (matrix.ndim != 2 or not torch.isfinite(matrix).all()):
            what = f"has {matrix.ndim} dimensions" if matrix.ndim != 2 else "holds numbers that are not finite"
            raise ValueError(f"{name} {what}; a spectrum needs a matrix of finite numbers.")
    left = left.detach().to(torch.promote_types(left.dtype, torch.float32))
    if right is None:
        U, sigma, Vh = torch.linalg.svd(left, full_matrices=False)
        return Spectrum(U, sigma, Vh.mT)
    right = right.detach().to(left)
    if left.shape[1] != right.shape[0]:
        raise ValueError(f"left is {tuple(left.shape)} and right {tuple(right.shape)}; the inner sizes must agree.")
    if left.shape[1] > min(left.shape[0], right.shape[1]):
        return decompose(left @ right)
    Q_B, R_B = torch.linalg.qr(left)
    Q_A, R_A = torch.linalg.qr(right.mT)
    U, sigma, Vh = torch.linalg.svd(R_B @ R_A.mT)
    return Spectrum(Q_B @ U, sigma, Q_A @ Vh.mT)


@torch.no_grad()
def spectra(tuned: Tuned) -> dict[str, Spectrum]:
    """{path: spectrum of ΔW} of the active adapters, for every matrix that they change; summed where several meet.

    LoRA's come from its factors: γ₁B₁A₁ + γ₂B₂A₂ = [γ₁B₁ γ₂B₂]·[A₁; A₂]. Changes of vectors (biases, norms) have no
    spectrum and are left out; each expert of a stack has its own, "path[0]" and so on. Raises ValueError for a method
    that changes no weight.
    """
    if not isinstance(tuned, Tuned):
        raise TypeError(f"tuned is a {type(tuned).__name__}; spectra are those of what attach returned.")
    found: dict[str, Spectrum] = {}
    with tuned.disabled():
        for path, layers in _by_path(tuned).items():
            if all(type(layer) is LoRALayer for layer in layers):
                left = torch.cat([F.pad(layer.gamma * layer.B, (0, 0, *layer.padding)) for layer in layers], 1)
                found[path] = decompose(left, torch.cat([layer.A for layer in layers]))
    if len(found) < len(_by_path(tuned)):
        rest = {path: delta for path, delta in tuned.deltas().items() if path not in found}
        found |= {path: decompose(delta) for path, delta in rest.items() if delta.ndim == 2}
        stacks = {path: delta for path, delta in rest.items() if delta.ndim == 3}
        found |= {f"{path}[{e}]": decompose(delta[e]) for path, delta in stacks.items() for e in range(len(delta))}
    return found


def _by_path(tuned: Tuned) -> dict[str, list[Layer]]:
    found: dict[str, list[Layer]] = {}
    for layer in tuned.layers():
        found.setdefault(layer.path, []).append(layer)
    return found


def base_weight(tuned: Tuned, path: str) -> torch.Tensor:
    """W (d_out, d_in) of the base at `path`, turned like ΔW whatever way the module stores it."""
    with tuned.disabled():
        owner, _, name = path.partition("[")[0].rpartition(".")
        if name in module_at(tuned.base, owner)._parameters:  # what a module reads for itself, as it stores it
            weight = module_at(tuned.base, owner)._parameters[name].detach()
            return weight[int(path.partition("[")[2][:-1])] if "[" in path else weight
        module = module_at(tuned.base, path)
        return (module.weight.T if flipped(module) else module.weight).detach()


@contextlib.contextmanager
def truncated(tuned: Tuned, rank: int, found: Mapping[str, Spectrum] | None = None) -> Iterator[Tuned]:
    """Within it each matrix carries W + (best rank-r approximation of its ΔW); vectors keep their whole change.

    This is the best case for a rank, not what LoRA of that rank learns: it starts from a ΔW that was learnt without the
    limit, and picks the directions afterwards. LoRA must *find* its r directions while it trains. Nor is it a bound on
    LoRA: best means nearest to ΔW, and another ΔW of that rank may serve the loss better.

    `found`: what `spectra(tuned)` returned, so that a slider need not decompose again.
    """
    tuned.check_open("truncated")
    if reading := next((layer for layer in tuned.layers() if layer.reader is not None), None):
        raise ValueError(f"{reading.key!r} is read by {reading.reader!r} itself, which truncated() does not reach.")
    found = spectra(tuned) if found is None else found
    new: dict[Slot, torch.Tensor] = {}
    with torch.no_grad(), tuned.disabled():
        for path, layers in _by_path(tuned).items():
            places = layers[0].slots or ((path, "weight"),)
            if path not in found:  # the copy of a vector
                new |= dict.fromkeys(places, layers[0].value.detach())
                continue
            (owner_path, name), *aliases = places
            owner = module_at(tuned.base, owner_path)
            old, delta = getattr(owner, name), found[path].truncate(rank).matrix()
            stored, kept = rounded(owner, name, old.to(delta) + (delta.T if flipped(owner) else delta))
            new |= {(owner_path, part): value for part, value in stored.items()} | dict.fromkeys(aliases, kept)
            for layer in (layer for layer in layers if not layer.slots):  # a bias that a layer changes (IA3) as it is
                for part, change in layer.changes().items():
                    if part != "weight":
                        so_far = new.get((path, part), getattr(owner, part))
                        new[path, part] = (so_far.to(change) + change).to(so_far.dtype)
    shared = {id(v): nn.Parameter(v, requires_grad=False) for v in new.values()}  # what is tied stays tied
    new = {slot: shared[id(value)] for slot, value in new.items()}
    with tuned.installed(new):
        yield tuned


# ---------------------------------------------------------------------------------------------------------------------
# What chance alone would show
# ---------------------------------------------------------------------------------------------------------------------
def marchenko_pastur(shape: tuple[int, int], norm: float) -> np.ndarray:
    """The singular values (min(shape),), falling, that a matrix of independent random entries has for large sizes.

    With p ≤ q the two sizes, λ = p/q and s² = norm²/(p·q) the variance of an entry, y = σ/√q has the density
        f(y) = √((b² − y²)(y² − a²)) / (π·s²·λ·y)   on   a = s(1 − √λ) ≤ y ≤ b = s(1 + √λ)
    (Marchenko and Pastur 1967). The i-th value returned is its (1 − (i − ½)/p) quantile, times √q; so the largest is
    close to s(√p + √q). ‖·‖_F is `norm` up to the discretisation.
    """
    p, q = sorted(shape)
    if p < 1 or norm < 0:
        raise ValueError(
            f"shape={shape} and norm={norm} describe no matrix; sizes are at least 1, the norm at least 0."
        )
    s, root = norm / math.sqrt(p * q), math.sqrt(p / q)
    a, b = 1 - root, 1 + root
    # y = mid − half·cos t is dense where the density ends in a square root
    t = (np.arange(20_000) + 0.5) * math.pi / 20_000
    y = (a + b) / 2 - (b - a) / 2 * np.cos(t)
    mass = np.sqrt((b**2 - y**2) * (y**2 - a**2)) / y * np.sin(t)
    below = np.cumsum(mass) - mass / 2
    quantiles = 1 - (np.arange(p) + 0.5) / p
    return s * math.sqrt(q) * np.interp(quantiles, below / mass.sum(), y)


def random_spectrum(shape: tuple[int, int], norm: float, rank: int | None = None, seed: int = 0) -> np.ndarray:
    """The singular values of a drawn Gaussian matrix scaled to ‖·‖_F = norm; with `rank`, of a product of two Gaussian
    factors (d_out, r)·(r, d_in), which is the fair comparison for a LoRA of that rank: (r,) values, falling."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    drawn = decompose(draw(*shape)) if rank is None else decompose(draw(shape[0], rank), draw(rank, shape[1]))
    return (drawn.sigma * (norm / drawn.norm)).numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Comparing directions
# ---------------------------------------------------------------------------------------------------------------------
def similarity(X: torch.Tensor, Y: torch.Tensor) -> torch.Tensor:
    """φ(i, j) for all i, j at once, of two sets of orthonormal columns X (d, m) and Y (d, n): a matrix (m, n).

        φ(X, Y, i, j) = ‖Xᵢᵀ·Yⱼ‖²_F / min(i, j),   with Xᵢ the first i columns   (Hu et al. 2021, §7.2 and appendix G)

    1 where the smaller subspace lies in the larger, 0 where they are orthogonal; `random_similarity` says what chance
    gives. Take `V` to compare what two updates read, `U` to compare what they write.
    """
    if X.ndim != 2 or Y.ndim != 2 or X.shape[0] != Y.shape[0]:
        raise ValueError(f"X is {tuple(X.shape)} and Y {tuple(Y.shape)}; both need columns of the same length.")
    for name, Z in (("X", X), ("Y", Y)):
        if (Z.mT @ Z - torch.eye(Z.shape[1]).to(Z)).abs().max() > 1e-3:
            raise ValueError(f"The columns of {name} are not orthonormal; take U or V of a Spectrum.")
    overlaps = (X.double().mT @ Y.double()).square().cumsum(0).cumsum(1)
    i, j = (torch.arange(1, n + 1, device=overlaps.device) for n in overlaps.shape)
    return overlaps / torch.minimum(i[:, None], j)


def random_similarity(m: int, n: int, d: int) -> torch.Tensor:
    """The mean of φ(i, j) over random subspaces of a d-dimensional space, max(i, j)/d: (m, n).

    E‖Xᵢᵀ·Yⱼ‖²_F = i·j/d, and i·j/min(i, j) = max(i, j).
    """
    return torch.maximum(torch.arange(1, m + 1)[:, None], torch.arange(1, n + 1)).double() / d


@dataclass(frozen=True)
class Amplification:
    """How much ΔW amplifies directions that W hardly uses (Hu et al. 2021, §7.3).

    `delta` = ‖ΔW‖_F; `along` = ‖UᵀWV‖_F, what W does in ΔW's directions; `random` = ‖W‖_F·r/√(d_out·d_in), what W does
    in r random directions (root mean square).
    """

    delta: float
    along: float
    random: float

    @property
    def factor(self) -> float:
        """‖ΔW‖_F / ‖UᵀWV‖_F."""
        return self.delta / self.along if self.along else math.inf


def amplification(delta: Spectrum, weight: torch.Tensor) -> Amplification:
    """ΔW's amplification over `weight` W (d_out, d_in) along all directions of `delta`; truncate first to choose r.

    Directions with σ = 0 count, since U and V hold them: `delta.truncate(delta.numerical_rank)` leaves them out.
    """
    if delta.shape != tuple(weight.shape):
        raise ValueError(f"ΔW is {delta.shape} but W is {tuple(weight.shape)}; give W as (d_out, d_in).")
    weight, r = weight.detach().to(delta.U), len(delta.sigma)
    along = (delta.U.mT @ weight @ delta.V).norm().item()
    return Amplification(delta.norm, along, weight.norm().item() * r / math.sqrt(weight.numel()))


def intruders(weight: torch.Tensor, delta: torch.Tensor, k: int = 10, epsilon: float = 0.5) -> list[int]:
    """Which of the k strongest left singular vectors of W + ΔW are new: indices from 0.

    uᵢ(W + ΔW) is an *intruder dimension* if maxⱼ |cos(uᵢ(W + ΔW), uⱼ(W))| < ε over all of W's left singular vectors
    (Shuttleworth et al. 2024, "LoRA vs Full Fine-tuning: An Illusion of Equivalence", §3).

    ε means something only where chance stays below it: a random direction has a largest |cos| with d others near
    √(2·ln d/d), which is 0.28 at d = 128 and 0.06 at d = 4096.
    """
    if weight.shape != delta.shape:
        raise ValueError(f"ΔW is {tuple(delta.shape)} but W is {tuple(weight.shape)}; both are (d_out, d_in).")
    check_whole("k", k)
    base, tuned = decompose(weight), decompose(weight + delta.to(weight))
    largest = (tuned.U[:, :k].mT @ base.U).abs().amax(1)
    return torch.where(largest < epsilon)[0].tolist()
