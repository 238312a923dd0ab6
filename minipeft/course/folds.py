"""What is folded below a verdict until the learner asks: two hints, and then the solution with its explanation.

The solution opens once the answer is right, after `TRIES` wrong answers, or, where a teacher has set a deadline in
`exercises/deadlines.json`, after that and not before. It is a fold and no lock: solutions/ lies beside the package.
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from functools import cache

from minipeft.course import assignments
from minipeft.course.exercises import assignment_of, exercise
from minipeft.course.standing import Standing
from minipeft.course.verdict import CORRECT, Shown

TRIES = 10
# what a solution's cell holds beside the answer: nbgrader's marks, and behind them what ends the stub
MARKS = r"^ *### BEGIN SOLUTION\n|^( *return\n)? *### END SOLUTION\n?( *raise \w+\(.*\)\n?)?"


def folds(name: str, now: Standing) -> Shown:
    """What follows a verdict, as text and as Markdown."""
    hints = {} if now.outcome == CORRECT else dict(zip(("Hint 1", "Hint 2"), exercise(name).hints, strict=True))
    closed = why_closed(name, now)
    text = f'Stuck? check.hint("{name}", 1), then check.hint("{name}", 2).' if hints else ""
    if not closed:
        hints["The solution, explained"] = solution(name)
        text = f'{text} The solution is open: check.solution("{name}").'.strip()
    elif now.tries >= TRIES // 2 and now.outcome != CORRECT:
        text += f" {closed}"
    folded = "\n\n".join(f"<details><summary>{what}</summary>\n\n{said}\n\n</details>" for what, said in hints.items())
    note = f"\n\n{closed}" if closed and closed in text else ""
    return Shown({"text/plain": text, "text/markdown": folded + note})


def why_closed(name: str, now: Standing) -> str:
    """When the solution opens; "" if it is open."""
    try:
        due = assignments.deadlines().get(assignment_of(name))
        assignments.sources()
    except ValueError as error:
        return str(error)
    if due is not None:
        left = datetime.now(due.tzinfo) < due
        return f"The solution opens after the deadline, {due:%Y-%m-%d %H:%M %Z}." if left else ""
    if now.outcome == CORRECT or now.tries >= TRIES:
        return ""
    return f"The solution opens after {TRIES} different wrong answers; {now.tries} so far."


@cache
def solution(name: str) -> str:
    """The solution's cell and its explanation in Markdown, from the notebook in solutions/."""
    cells = json.loads(assignments.sources()[assignment_of(name)].read_text(encoding="utf-8"))["cells"]
    ids = [cell["metadata"].get("nbgrader", {}).get("grade_id") for cell in cells]
    texts = ["".join(cell["source"]) for cell in cells]
    code = re.sub(MARKS, "", texts[ids.index(name)], flags=re.MULTILINE).strip()
    after = texts[ids.index(f"test_{name}") + 1]
    explained = re.search(r"<summary>The solution, explained</summary>\s*(.*?)\s*</details>", after, re.DOTALL)
    return f"```python\n{code}\n```\n\n{explained[1] if explained else ''}".strip()
