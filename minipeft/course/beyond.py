"""Beyond text, measured once and shipped: `python -m minipeft.course.beyond --folder runs` writes `beyond.json`.

Every part is a list of runs, each with a small file in the folder, so whoever kills the script starts it again and it
goes on. A method's learning rate is the best of a row, half a decade apart, on validation rows, at 20 rows a class and
with a seed that no reported run has; the row grows until its best lies inside.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import re
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

from minipeft.course.notes import Notes
from minipeft.learn.protocol import SEARCH_SEED, SEEDS
from minipeft.whole import write_whole

FILE = Path(__file__).with_name("beyond.json")
SIZES, AT = (5, 20, 100), 20  # rows a class; a rate is chosen at AT
STEPS, BATCH = 30, 16
POINTWISE = ("_expand_conv", "_project_conv", "_conv_head")  # the 1×1 convolutions, which hold most numbers
RANKS = (1, 4, 16)


def on_convolutions(rank: int):
    """LoRA on the 1×1 convolutions of the ImageNet network, and its new output layer."""
    from minipeft.methods.lora import LoRA
    from minipeft.methods.select import Softmax

    return [LoRA(rank=rank, targets=POINTWISE), Softmax()]


def picture_methods() -> dict[str, tuple[object, tuple[float, ...]]]:
    """{name: (method, the rates to begin with)} on the ImageNet network."""
    from minipeft.methods.select import Full, Softmax

    norms = Full(re.compile(r".*_bn\d\.(weight|bias)|_fc\..*"))
    return {
        "output layer": (Softmax(), (1e-2, 3e-2)),
        "norms": (norms, (1e-3, 3e-3)),
        "full": (Full(), (1e-4, 3e-4)),
        **{f"LoRA r={rank}": (on_convolutions(rank), (3e-4, 1e-3)) for rank in RANKS},
    }


def learn(model, method, train, tests: dict, lr: float, seed: int, steps: int = STEPS) -> dict:
    """One run: attach, train on rows (x, y), and the loss and accuracy on each of `tests`."""
    from minipeft.attach import attach
    from minipeft.learn.arrays import evaluate_arrays, fit_arrays
    from minipeft.learn.plan import Plan

    tuned = attach(model, method, seed=seed) if method is not None else model
    started = time.process_time()
    history = fit_arrays(tuned, train.x, train.y, Plan(steps, lr, BATCH, seed, "linear"))
    found = {"lr": lr, "stopped": history.stopped, "cpu_seconds": round(time.process_time() - started, 2)}
    found["trained"] = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    for name, rows in tests.items():
        score = evaluate_arrays(tuned, rows.x, rows.y)
        found[name] = {"loss": score.loss, "accuracy": score.accuracy}
    return found


def compare(notes: Notes, part: str, methods: dict, run: Callable, sizes=SIZES) -> dict:
    """Every method at its own rate, with every number of rows a class and every seed; `run(name, n, lr, seed, on)`."""
    rates, runs = {}, []
    for name, (_, start) in methods.items():
        rates[name] = notes.best_rate(
            f"{part} {name}", lambda lr, m=name: run(m, AT, lr, SEARCH_SEED, "validation")["validation"]["loss"], start
        )
    for n in sizes:
        for name in methods:
            for seed in SEEDS:
                key = f"{part} {name} {n} {seed}"
                found = notes.get(key, lambda m=name, n=n, s=seed: run(m, n, rates[m], s, "test"))
                runs.append({"method": name, "n": n, "seed": seed} | found)
    return {"steps": STEPS, "batch": BATCH, "rates": rates, "runs": runs}


# Pictures: ImageNet's network learns digits --------------------------------------------------------------------------
@functools.cache
def drawn_large() -> dict:
    """MNIST's splits and a part of scikit-learn's digits, as the ImageNet network reads them."""
    from minipeft.world.pictures import Pictures, digits, few, mnist, shown

    splits = mnist() | {"other source": few(digits()["test"], 20)}
    return {name: Pictures(shown(rows.x), rows.y) for name, rows in splits.items()}


def pictures(notes: Notes) -> dict:
    from minipeft.world.pictures import few, imagenet

    methods = picture_methods()

    def run(name, n, lr, seed, on):
        rows = drawn_large()
        tests = {"validation": rows["validation"]} if on == "validation" else {
            "test": rows["test"], "other source": rows["other source"]}  # fmt: skip
        return learn(imagenet(10, seed), methods[name][0], few(rows["train"], n, seed), tests, lr, seed)

    plain = {name: pair for name, pair in methods.items() if not name.startswith("LoRA") or name == "LoRA r=4"}
    found = compare(notes, "pictures", plain, run)
    ranks = {name: pair for name, pair in methods.items() if name not in plain}
    more = compare(notes, "pictures", ranks, run, sizes=(AT,))
    return found | {"rates": found["rates"] | more["rates"], "runs": found["runs"] + more["runs"]}


PARTS: dict[str, Callable[[Notes], dict]] = {"pictures": pictures}


def measure(notes: Notes, parts=PARTS) -> Iterator[tuple[str, dict]]:
    import torch

    torch.set_num_threads(1)
    for name in parts:
        where = {"device": "CPU, 1 thread", "torch": torch.__version__, "python": platform.python_version()}
        yield name, PARTS[name](notes) | {"measured": where | {"date": date.today().isoformat()}}


def measured() -> dict:
    """What `measure` found when the course was made, by part."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where each finished run is kept")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    options = parser.parse_args()
    for name, found in measure(Notes(options.folder, lambda text: print(text, flush=True)), options.parts):
        whole = measured() if FILE.exists() else {}
        write_whole(FILE, json.dumps(whole | {name: found}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
