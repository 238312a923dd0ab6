"""How a learner's answers to the assignment `rank` are called."""

from __future__ import annotations


def factor_values(function, B, A, times: int):
    """The answer for B with its rows, and A with its columns, repeated `times`; a text if memory did not suffice."""
    try:
        return function(B.repeat(times, 1), A.repeat(1, times)) if times > 1 else function(B, A)
    except (MemoryError, RuntimeError) as error:
        if "alloc" not in str(error):
            raise
        return f"asked for too much memory: {str(error)[:200]}"
