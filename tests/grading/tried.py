"""A folder of answers whose worth is known, tried in check and in grade: `python tests/grading/tried.py FOLDER`.

Each file is one answer: `wrong_….py` or `right_….py`, whose first line says which exercise it answers, as in
`# …: lora/merge: loses the bias`. `check_….py` are programs, which print what escapes from a check.
"""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path

import audit
import mutants
import nbformat
from hostile import cell_named

from minipeft.course import check
from minipeft.course.exercises import exercises


def answers(folder: Path) -> dict[str, tuple[str, str, str, str]]:
    """{file name: ("wrong" or "right", assignment, exercise, code)}."""
    found = {}
    for path in sorted(folder.glob("*.py")):
        code = path.read_text(encoding="utf-8")
        named = re.search(r"(\w+)/(\w+): ", code.split("\n", 1)[0])
        if path.name.startswith(("wrong_", "right_")) and named and named[1] in exercises():
            found[path.stem] = (path.name[:5], named[1], named[2], code)
    return found


def main() -> int:
    check.SECONDS, faults, known = mutants.SECONDS, [], answers(Path(sys.argv[1]))
    for assignment in exercises():
        mine = {name: each for name, each in known.items() if each[1] == assignment}
        namespace, _ = mutants.workshop(assignment)
        files = {}
        for i, (_, _, exercise, code) in enumerate(mine.values()):
            notebook = copy.deepcopy(audit.solved(assignment))
            cell_named(notebook, exercise).source = code
            files[f"a{i:03d}"] = nbformat.writes(notebook)
        table = audit.graded(files, assignment) if files else None
        for i, (name, (kind, _, exercise, code)) in enumerate(mine.items()):
            wrong = kind == "wrong"
            if mutants.judged(mutants.Mutant(exercise, name, code), namespace) != wrong:
                faults.append(f"check: {name}")
            full = table.loc[f"a{i:03d}", exercise] == audit.points(assignment)[exercise]
            if full == wrong:
                faults.append(f"grade: {name}: {audit.verdict(table, f'a{i:03d}', exercise, True)}")
    for path in sorted(Path(sys.argv[1]).glob("check_*.py")):
        if said := subprocess.run([sys.executable, str(path)], capture_output=True, text=True).stderr:
            faults.append(f"{path.name}: {said}")
    kinds = [each[0] for each in known.values()]
    print(*(f"FAULT  {fault}" for fault in faults), sep="\n")
    print(f"{kinds.count('wrong')} wrong and {kinds.count('right')} right answers, {len(faults)} faults")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
