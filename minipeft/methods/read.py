"""Weights that a module reads for itself, for LoRA, DoRA and IA3: no layer is called for them, so that there is no
output to add to, and the module computes with W' = W + ΔW instead.

    attention (`nn.MultiheadAttention`)   [q k v] = W_in·x + b,  y = W_out·(…) + b     W_in (3·d, d), W_out (d, d)
    the experts of a mixture              y = W[e]·x for the tokens of expert e        W (E, d_out, d_in)

For E experts LoRA has E pairs, ΔW[e] = γ·B_e·A_e, of E·r·(d_in + d_out) numbers together.

W' is formed at each call and has W's dtype: over a base in bfloat16 it is rounded as merging rounds it. An input of the
module is no input of A, so dropout has no place. The seat is `ReadingSeat` in `hook.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from minipeft.targets import Target


def check_read(targets: Sequence[Target], method: str, dropout: float = 0.0, stacks: bool = False) -> None:
    """Raises ValueError for a stack of experts, unless the method works on `stacks`, and for dropout where nothing can
    be dropped."""
    for target in (target for target in targets if target.reader is not None):
        if target.tensor.ndim == 3 and not stacks:
            raise ValueError(f"{method} works on single matrices, and {target.key!r} is a stack of them; use LoRA.")
        if dropout:
            raise ValueError(
                f"{target.key!r} is read by {target.reader!r} itself, where no input can be dropped; use dropout=0."
            )


def bias(module: nn.Module, parameter: str, rows: slice) -> tuple[str, slice]:
    """The name of the bias that is added to these rows of W·x, and where they are in it."""
    if not isinstance(module, nn.MultiheadAttention):
        return "bias", rows
    before = {"k_proj_weight": 1, "v_proj_weight": 2}.get(parameter, 0) * module.embed_dim
    return "in_proj_bias", slice(before + rows.start, before + rows.stop)
