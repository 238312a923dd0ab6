"""Recommending by text: who liked some films is shown films whose texts are near to theirs.

    z_i = encoder(text of film i), of length 1          p_u = mean of z over what u liked, less the mean over all films
    score(u, i) = cos(p_u, z_i)                         rank the films that u has not seen by their score

The encoder learns from a sample of films: each film that a person liked must be picked out of the sample by that
person's other films (sampled softmax, Covington et al. 2016, §3.2):

    loss = −mean over (u, i) of log softmax_j( cos(p_u without i, z_j)/τ )_i,    j = i and the films that u did not like
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

TAU = 0.1


def profiles(z: torch.Tensor, liked: torch.Tensor) -> torch.Tensor:
    """p_u of length 1 (people, d) from the films' z (films, d) and `liked` (people, films); zero for who liked none."""
    weight = liked.to(z.dtype)
    mean = weight @ z / weight.sum(1, keepdim=True).clamp(min=1)
    return F.normalize(torch.where(liked.any(1, keepdim=True), mean - z.mean(0), 0.0), dim=1)


def choice_loss(z: torch.Tensor, liked: torch.Tensor, tau: float = TAU) -> torch.Tensor:
    """The loss above, in nats a choice, for a sample of films: z (films, d), `liked` (people, films), bool.

    Raises ValueError where nobody liked two films of the sample, for then nothing can be left out.
    """
    weight = liked.to(z.dtype)
    count = weight.sum(1, keepdim=True)
    person, film = (liked & (count >= 2)).nonzero(as_tuple=True)
    if not len(person):
        raise ValueError(
            "Nobody liked two films of the sample, so no film can be guessed from another: take more films."
        )
    others = ((weight @ z)[person] - z[film]) / (count[person] - 1)
    logits = F.normalize(others - z.mean(0), dim=1) @ z.T / tau
    also = liked[person].clone()
    also[torch.arange(len(person)), film] = False
    return F.cross_entropy(logits.masked_fill(also, -math.inf), film)


def ranking(
    scores: torch.Tensor, wanted: torch.Tensor, shown: torch.Tensor, k: int = 10
) -> tuple[torch.Tensor, torch.Tensor]:
    """(recall@k, nDCG@k) of each person who wants something, from scores, `wanted` and `shown` (people, films).

        recall@k = |top k ∩ wanted| / min(k, |wanted|)      nDCG@k = Σ 1/log₂(r + 1) over its most, of ranks r that hit

    Only films that are `shown` are ranked; ties count in the order of the films. Raises ValueError for a score that is
    no number, and where nobody wants a film that is shown. Source: Liang et al. 2018, §4.2.
    """
    if scores.isnan().any():
        raise ValueError("A score is no number, so nothing can be ranked: look for NaN in the encoder.")
    wanted = wanted & shown
    who = wanted.any(1)
    if not who.any():
        raise ValueError("Nobody wants any of the films that are shown: there is nothing to find.")
    scores, wanted, shown = scores[who].masked_fill(~shown[who], -math.inf), wanted[who], shown[who]
    top = scores.sort(stable=True, dim=1, descending=True).indices[:, :k]
    hits = wanted.gather(1, top).double()
    discount = 1 / torch.arange(2, hits.shape[1] + 2, dtype=torch.float64).log2()
    most = wanted.sum(1).clamp(max=k)
    best = discount.cumsum(0)[most.clamp(max=hits.shape[1]) - 1]
    return hits.sum(1) / most, (hits * discount).sum(1) / best
