"""The claims ledger: what the course's source documents say, the check that was run, what came out, and the verdict.

    python -m minipeft.course.claims            # recomputes every row and prints the table (some minutes)
    python -m minipeft.course.claims --quick    # only the rows that take seconds
    python -m minipeft.course.claims --write    # and stores the figures and verdicts in ledger.json

A row is a *check*, which returns figures, and a *rule*, which makes a verdict of them: holds, holds when …, wrong,
cannot tell. `ledger.json` keeps the figures; the verdict must follow from them by the rule, or a test fails. `counting`
has the rows that definitions, counts and code decide, `comparing` those that the atlas's runs decide, `measuring` those
that train anew, `timing` those about seconds and bytes.
"""

from minipeft.course.claims import comparing, counting, measuring, timing  # noqa: F401  they fill CLAIMS
from minipeft.course.claims.ledger import CLAIMS, HOLDS, PATH, WRONG, Claim, load, recompute, row, shown, table

__all__ = ["CLAIMS", "HOLDS", "PATH", "WRONG", "Claim", "load", "recompute", "row", "shown", "table"]
