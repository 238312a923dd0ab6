"""Everything that the course wants from a GPU, in stages that each leave their results: see README.md beside this."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
sys.path.append(str(HERE / "standin"))  # last: a `datasets` package that is installed wins

SHARES = {"agree": 0.06, "bases": 0.37, "memory": 0.02, "bench": 0.07, "larger": 0.41, "atlas": 0.07}  # of the seconds
LARGEST = 16 * 2**20  # bytes of a file


@dataclass(frozen=True)
class Run:
    """What a stage is told: where it works, where it writes, how long it may take, and whether in miniature."""

    device: str
    out: Path
    seconds: float
    dry: bool

    def write(self, name: str, value: object) -> None:
        from minipeft.whole import write_whole

        write_whole(self.out / name, json.dumps(value, indent=1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the folder that the results go to")
    parser.add_argument("--seconds", type=float, default=480, help="the budget of all stages together")
    parser.add_argument("--only", nargs="+", choices=list(SHARES), default=list(SHARES), help="these stages")
    parser.add_argument("--dry-run", action="store_true", help="all of it in miniature, on the CPU")
    options = parser.parse_args()
    import datasets
    import stages
    import torch

    if not options.dry_run and not torch.cuda.is_available():
        print("This machine's torch sees no GPU (CUDA); --dry-run tries the kit on the CPU.", file=sys.stderr)
        return 2
    device = "cpu" if options.dry_run else "cuda"
    options.out.mkdir(parents=True, exist_ok=True)
    report = {"device": stages.name_of(device), "dry run": options.dry_run, "stages": {}} | stages.versions()
    report |= {"python": platform.python_version(), "datasets": getattr(datasets, "__version__", "stand-in")}
    started = time.monotonic()
    for stage in [name for name in SHARES if name in options.only]:
        left = options.seconds - (time.monotonic() - started)
        share = SHARES[stage] / sum(SHARES[name] for name in options.only if name not in report["stages"])
        run = Run(device, options.out, max(1.0, left * share), options.dry_run)
        begun = time.monotonic()
        try:
            said = getattr(stages, stage)(run)
        except Exception as error:
            traceback.print_exc()
            said = {"failed": f"{type(error).__name__}: {error}"}
        report["stages"][stage] = {"seconds": round(time.monotonic() - begun, 1)} | said
        run.write("report.json", report)  # after each stage: whoever is cut off has what was done
        print(f"{stage:8} {report['stages'][stage]}", flush=True)
    too_large = [path.name for path in options.out.iterdir() if path.stat().st_size > LARGEST]
    if too_large:
        print(f"Larger than 16 MiB: {', '.join(too_large)}", file=sys.stderr)
    return int(bool(too_large) or any("failed" in each for each in report["stages"].values()))


if __name__ == "__main__":
    sys.exit(main())
