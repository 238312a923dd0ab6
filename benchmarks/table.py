"""All benchmarks, and the tables that are made of them: `make bench`, or `python benchmarks/table.py [name …]`.

Each benchmark runs in a process of its own, at one and at two threads. What it found replaces what `figures.json` held
of it, and the tables of README.md (what is promised) and docs/benchmarks.md (everything) are written again. It takes
some twenty minutes on two cores that do nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from side_by_side import DEVICE, Figure, line, read

from minipeft.whole import write_whole

HERE = Path(__file__).parent
ROOT = HERE.parent
FILE = HERE / "figures.json"
THREADS = {  # what is an engine with threads of its own, or a whole browser's wait, is measured once
    "against_peft": (1, 2),
    "mixed_batch": (1, 2),
    "many": (1, 2),
    "merged": (1, 2),
    "throughput": (1,),
    "timings": (2,),
}
BEGIN, END = "<!-- written by benchmarks/table.py -->", "<!-- until here -->"


def measure(name: str, threads: int, quick: bool) -> list[dict]:
    """The figures of one benchmark, in a process of its own."""
    command = [sys.executable, str(HERE / f"{name}.py"), "--json", "--threads", str(threads)] + ["--quick"] * quick
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}.py failed; nothing of it is written.\n{done.stderr[-2000:]}")
    found = list(read(done.stdout))
    print(*map(line, found), sep="\n", flush=True)
    return [{"benchmark": name, "threads": threads} | vars(each) for each in found]


def machine() -> dict:
    packages = ("torch", "transformers", "peft", "minipeft")
    versions = {name: version(name) for name in packages}
    return {"date": date.today().isoformat(), "device": processor(), "cores": os.cpu_count(), "versions": versions}


def processor() -> str:
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((each.split(":", 1)[1].strip() for each in lines if each.startswith("model name")), platform.machine())


def table(rows: Iterable[dict]) -> str:
    """Markdown: a row a figure, a column for each number of threads."""
    cells: dict[tuple, dict[int, Figure]] = {}
    for row in rows:
        found = Figure(**{key: row[key] for key in Figure.__dataclass_fields__})
        cells.setdefault((found.what, found.of, found.asked), {})[row["threads"]] = found
    lines = ["| measured | what is divided | 1 thread | 2 threads | asked |", "|---|---|---|---|---|"]
    for (what, of, asked), by in cells.items():
        lines.append(f"| {what} | {of} | {cell(by.get(1))} | {cell(by.get(2))} | {asked} |")
    return "\n".join(lines)


def cell(found: Figure | None) -> str:
    if found is None:
        return ""
    missed = " missed" if found.kept() is False else ""
    return f"{found.median:.2f} ({found.low:.2f}–{found.high:.2f}){missed}"


def about(held: dict) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in held["versions"].items() if name != "minipeft")
    return f"{held['device']}, {held['cores']} cores; {versions}; {held['date']}."


def sections(held: dict) -> dict[Path, str]:
    """{file: the text between its marks}"""
    note = "Medians of ratios taken in turn in one run, the middle half of them in brackets."
    asked = table(row for row in held["rows"] if row["asked"])
    return {
        ROOT
        / "README.md": f"{note} {about(held)}\n\n{asked}\n\nAll of them: [docs/benchmarks.md](docs/benchmarks.md).",
        ROOT / "docs" / "benchmarks.md": f"{note} {about(held)}\n\n{table(held['rows'])}",
    }


def between(text: str, section: str) -> str:
    """`text` with another section between the marks."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{section}\n{END}{rest.split(END)[1]}"


def merged(old: list[dict], new: list[dict]) -> list[dict]:
    """The rows in the order of the benchmarks, the new ones in the place of those of the same benchmark and threads."""
    measured = {(row["benchmark"], row["threads"]) for row in new}
    rows = [row for row in old if (row["benchmark"], row["threads"]) not in measured] + new
    return sorted(rows, key=lambda row: (list(THREADS).index(row["benchmark"]), row["threads"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"only some of {', '.join(THREADS)}; what is not measured stays")
    parser.add_argument(
        "--quick", action="store_true", help="little work, to see that all of it runs; nothing is written"
    )
    parser.add_argument("--tables", action="store_true", help="only write the tables again, from figures.json")
    options = parser.parse_args()
    if unknown := set(options.names) - THREADS.keys():
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}")
    held = json.loads(FILE.read_text()) if FILE.exists() else {"rows": []}
    for name in [] if options.tables else options.names or THREADS:
        for threads in THREADS[name]:
            rows = measure(name, threads, options.quick)
            if not options.quick:  # written at once: whoever stops it keeps what is done
                held = machine() | {"rows": merged(held["rows"], rows)}
                write_whole(FILE, json.dumps(held, indent=1, ensure_ascii=False) + "\n")
    if not options.quick:
        for path, section in sections(held).items():
            write_whole(path, between(path.read_text(encoding="utf-8"), section))


if __name__ == "__main__":
    main()
