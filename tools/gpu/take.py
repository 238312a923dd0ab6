"""Installs what the kit brought back: `python tools/gpu/take.py results`. Each thing whole, or not at all and why."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2])]

import torch  # noqa: E402
from safetensors import SafetensorError, safe_open  # noqa: E402

from minipeft.course import atlas, larger  # noqa: E402
from minipeft.course.grid import grid  # noqa: E402
from minipeft.learn.protocol import SEEDS  # noqa: E402
from minipeft.learn.sweep import Point  # noqa: E402
from minipeft.methods import METHODS  # noqa: E402
from minipeft.whole import write_whole  # noqa: E402
from minipeft.world import base  # noqa: E402

EXCESS, PARSED = "above the source, story by story, in nats a token", "sampled stories that parse, of 100"
AGAIN = {
    "pocket": [
        "python -m minipeft.world.base --measure", "python -m minipeft.course.shipped",
        "python -m minipeft.course.grid --folder runs --out minipeft/course/atlas.parquet --workers 2",
        "python -m minipeft.course.claims --write", "make notebooks", "make test",
    ],
    "desk": ["make test"],
    "larger": ["python -m minipeft.course.notebooks notebooks/10_lora_vs_full.ipynb", "make test"],
    "atlas": ["python -m minipeft.course.claims --write", "make notebooks", "make test"],
}  # fmt: skip


def read_base(path: Path):
    """(model, tokenizer, card) of a base that the kit trained. ValueError says what is wrong with the file."""
    try:
        with safe_open(path, "pt") as file:
            notes = file.metadata() or {}
            weights = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118  no dictionary
        card, shape = json.loads(notes["card"]), json.loads(notes["shape"])
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise ValueError(f"{path.name} is not a base that the kit wrote ({error}); run the kit again.") from error
    tokenizer = base.build_tokenizer()
    model = base.build_model(len(tokenizer), **shape).eval()
    left, unknown = model.load_state_dict(weights, strict=False)
    if unknown or set(left) - {"lm_head.weight"} or not all(w.isfinite().all() for w in weights.values()):
        raise ValueError(f"The weights in {path.name} do not fill its model; run the kit again.")
    return model, tokenizer, card


def take_base(name: str, path: Path, quick: bool) -> str:
    """Measures the base on this machine; in the place of a better one it is refused."""
    model, tokenizer, card = read_base(path)
    sizes = {"stories": 20, "samples": 4} if quick else {}
    card |= base.measure(model, tokenizer, **sizes)
    folder = {"pocket": base.FOLDER, "desk": base.DESK}[name]
    # a desk base must not be worse than pocket either
    for here in {base.FOLDER, folder if folder.exists() else base.FOLDER}:
        now = base.measure(*base.load(str(here)), **sizes)
        if card[EXCESS] > now[EXCESS] or card[PARSED] < now[PARSED]:
            raise ValueError(
                f"{path.name} is worse than the {here.name} base that is here: {card[EXCESS]} nats a token above the "
                f"source and {card[PARSED]} of 100 stories parse, against {now[EXCESS]} and {now[PARSED]}; "
                "nothing was changed."
            )
    base.save(model.to(torch.bfloat16) if name == "desk" else model, tokenizer, card, folder)
    return f"{name}: {card[EXCESS]} nats a token above the source, {card[PARSED]} of 100 stories parse"


def take_atlas(path: Path) -> str:
    """The whole grid, or nothing: an atlas with holes would leave sliders without their runs."""
    try:
        runs = atlas.load(path)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path.name} is not an atlas that the kit wrote ({error}); run the kit again.") from error
    fields = list(Point.__dataclass_fields__)
    have = {Point(**row) for row in runs[fields].to_dict("records")}
    if missing := set(grid()) - have:
        raise ValueError(
            f"{path.name} has {len(have):,} runs and lacks {len(missing):,} of the grid's; give the kit more seconds, "
            "or run it again into the same folder, where it goes on."
        )
    write_whole(atlas.PATH, path.read_bytes())
    return f"atlas: {len(have):,} runs, {runs.attrs['provenance']['device']}"


def take_larger(path: Path) -> str:
    """Every method on every task at its best rate with all seeds, or nothing."""
    try:
        runs = atlas.load(path)
        for task in larger.TASKS:
            for method, settings in larger.SETTINGS:
                found = len(atlas.losses(runs, task, METHODS[method](**settings)))
                if found < len(SEEDS):
                    raise ValueError(f"{method} {settings} on {task} has {found} runs at its best rate")
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path.name} is not whole ({error}); give the kit more seconds.") from error
    write_whole(larger.PATH, path.read_bytes())
    return f"larger: {len(runs)} runs, {runs.attrs['provenance']['device']}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--quick", action="store_true", help="measure on a few stories only")
    options = parser.parse_args()
    if not options.results.is_dir():
        print(f"{options.results} is no folder; name the one that run.py wrote.", file=sys.stderr)
        return 2
    try:
        report = json.loads((options.results / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        print(
            f"{options.results} has no report of the kit ({error}); name the folder that run.py wrote.", file=sys.stderr
        )
        return 2
    if report.get("dry run") is not False:
        print("These are the results of a dry run, in miniature; nothing was taken.", file=sys.stderr)
        return 2
    failed, again = False, []
    whole = {"atlas.parquet": take_atlas, "larger.parquet": take_larger}
    for name in ("pocket", "desk", "larger", "atlas"):
        path = options.results / f"{name}.{'safetensors' if name in ('pocket', 'desk') else 'parquet'}"
        if not path.exists():
            continue
        try:
            print(whole[path.name](path) if path.name in whole else take_base(name, path, options.quick))
            again += AGAIN[name]
        except ValueError as error:
            failed = True
            print(f"Not taken: {error}", file=sys.stderr)
    cards = Path(__file__).parent / "results"
    for name in ("report", "agree", "memory", "bench"):
        if (options.results / f"{name}.json").exists():
            write_whole(cards / f"{name}.json", (options.results / f"{name}.json").read_bytes())
    if again:
        print("Run again, in this order, what depends on them:", *dict.fromkeys(again), sep="\n  ")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
