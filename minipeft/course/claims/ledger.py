"""What a row of the ledger is, and how rows are kept, made anew and shown."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

PATH = Path(__file__).with_name("ledger.json")
INTERVALS = re.compile("95 %|above|less|ratio|−")  # where three figures are a mean and its 95 % interval, not seeds
HOLDS, WRONG, CANNOT_TELL = "holds", "wrong", "cannot tell"


@dataclass(frozen=True)
class Claim:
    """`kind`: "exact" and "code" rows, and "atlas" rows from the shipped runs, are recomputed by the tests, "measured"
    rows (training) by the command only."""

    id: str
    text: str
    source: str
    kind: str
    check: Callable[[], dict]
    rule: Callable[[dict], str]


CLAIMS: dict[str, Claim] = {}


def claim(id: str, text: str, source: str, kind: str, rule: Callable[[dict], str]):
    """Registers the decorated check under `id`."""

    def register(check: Callable[[], dict]) -> Callable[[], dict]:
        CLAIMS[id] = Claim(id, text, source, kind, check, rule)
        return check

    return register


def load() -> list[dict]:
    """The stored ledger: rows with id, claim, source, kind, figures, verdict."""
    return json.loads(PATH.read_text(encoding="utf-8"))


def row(each: Claim, figures: dict) -> dict:
    return {
        "id": each.id, "claim": each.text, "source": each.source, "kind": each.kind, "check": each.check.__doc__,
        "figures": figures, "verdict": each.rule(figures),
    }  # fmt: skip


def recompute(quick: bool = False) -> list[dict]:
    """All rows anew; with `quick` the measured ones keep their stored figures."""
    stored = {r["id"]: r["figures"] for r in load()} if PATH.exists() else {}
    keep = {c.id for c in CLAIMS.values() if quick and c.kind == "measured"}
    return [row(c, stored[c.id] if c.id in keep else c.check()) for _, c in sorted(CLAIMS.items())]


def only(cases: Sequence[str], of: int, what: str = "task") -> str:
    """The verdict of a claim that came out in these of `of` cases."""
    return HOLDS if len(cases) == of else f"holds when the {what} is {' or '.join(cases)}" if cases else WRONG


def over(verdicts: dict[str, str], what: str) -> str:
    """One verdict of several: that of all, the cases in which the claim holds, or that none can be told."""
    if HOLDS in verdicts.values():
        return only([name for name, said in verdicts.items() if said == HOLDS], len(verdicts), what)
    return CANNOT_TELL if CANNOT_TELL in verdicts.values() else WRONG


def table(rows: list[dict]) -> str:
    """The ledger as text: of each row id and verdict, the claim with its source, and the figures."""
    return "\n".join(shown(each, f"     {each['claim']} ({each['source']})") for each in rows)


def shown(row: dict, *between: str) -> str:
    """One row as text: id and verdict, the lines `between`, and its figures; an interval reads mean [low, high]."""
    verdict = row["verdict"].upper() if row["verdict"] == WRONG else row["verdict"]
    return "\n".join([f"{row['id']}  {verdict}", *between, *_lines(row["figures"], "     ")])


def _lines(figures: dict, indent: str, above: str = "") -> list[str]:
    """A line for the figures that stand alone, and one or more for each group; `above` has the names of the groups."""
    alone = [f"{name}: {_said(value, above + name)}" for name, value in figures.items() if not isinstance(value, dict)]
    found = textwrap.wrap("; ".join(alone), 118, initial_indent=indent, subsequent_indent=indent + "  ")
    for name, group in figures.items():
        if isinstance(group, dict):
            first, *more = _lines(group, indent + "  ", above + name)
            found += [f"{indent}{name}", first, *more] if more else [f"{indent}{name} | {first.strip()}"]
    return found


def _said(value, name: str) -> str:
    if not isinstance(value, list):
        return str(value)
    if len(value) == 3 and INTERVALS.search(name):
        return f"{value[0]} [{value[1]}, {value[2]}]"
    return ", ".join(map(str, value))
