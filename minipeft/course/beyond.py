"""Beyond text, measured once and shipped: `python -m minipeft.course.beyond --folder runs` writes `beyond.json`.

Every part is a list of runs, each with a small file in the folder, so whoever kills the script starts it again and it
goes on. A method's learning rate is the best of a row, half a decade apart, on validation rows, at 20 rows a class and
with a seed that no reported run has; the row grows until its best lies inside.
"""

from __future__ import annotations

import copy
import functools
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

from minipeft.course.notes import Notes, measure
from minipeft.learn.protocol import SEARCH_SEED, SEEDS
from minipeft.whole import write_whole

FILE = Path(__file__).with_name("beyond.json")
SIZES, AT = (5, 20, 100), 20  # rows a class; a rate is chosen at AT
STEPS, SMALL_STEPS, BATCH = 30, 60, 16  # the second for the two small transformers
POINTWISE = ("_expand_conv", "_project_conv", "_conv_head")  # the 1×1 convolutions, which hold most numbers
RANKS = (1, 4, 16)
BLOCKS, LARGEST = 4, 120  # of the tail; pictures a class whose features are kept
TEST_SEED = 900  # of what is spoken for the test, which no training row is drawn with


def on_convolutions(rank: int):
    """LoRA on the 1×1 convolutions of the ImageNet network, and its new output layer."""
    from minipeft.methods.lora import LoRA
    from minipeft.methods.select import Softmax

    return [LoRA(rank=rank, targets=POINTWISE), Softmax()]


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
    return {"rates": rates, "runs": runs}


# Pictures: the last blocks of ImageNet's network learn digits; what the blocks before them give is kept --------------
@functools.cache
def pool():
    """The pictures of MNIST that a run on the tail draws from."""
    from minipeft.world.pictures import few, mnist

    return few(mnist()["train"], LARGEST, 0)


@functools.cache
def kept(rows: str = "train"):
    """MNIST's pictures of one split as the tail of the network reads them: what the blocks before it give."""
    from minipeft.world.pictures import Pictures, Tail, imagenet, mnist, shown

    found = pool() if rows == "train" else mnist()[rows]
    return Pictures(Tail(imagenet(), BLOCKS).features(shown(found.x)), found.y)


def tail(seed: int):
    """The last blocks of the ImageNet network with a new output layer."""
    from minipeft.world.pictures import Tail, imagenet

    return Tail(imagenet(10, seed), BLOCKS).eval()


def on_tail(rank: int):
    """LoRA on the 1×1 convolutions of the tail, and its output layer."""
    from minipeft.methods.lora import LoRA
    from minipeft.methods.select import Softmax

    return [LoRA(rank=rank, targets=("_expand_conv", "_project_conv", "conv")), Softmax()]


def tail_methods() -> dict[str, tuple[object, tuple[float, ...]]]:
    """{name: (method, the rates to begin with)} on the tail."""
    from minipeft.methods.select import Full, Softmax

    return {
        "output layer": (Softmax(), (3e-3, 1e-2)),
        "norms": (Full(re.compile(r".*_bn\d\..*|(norm|output)\..*")), (3e-3, 1e-2)),
        **{f"LoRA r={rank}": (on_tail(rank), (1e-3, 3e-3)) for rank in RANKS},
        "full": (Full(), (3e-4, 1e-3)),
    }


def tails(notes: Notes) -> dict:
    from minipeft.world.pictures import few

    methods = tail_methods()

    def run(name, n, lr, seed, on):
        return learn(tail(seed), methods[name][0], few(kept(), n, seed), {on: kept(on)}, lr, seed)

    return compare(notes, "tail", methods, run, SIZES)


# Attention: two small transformers that know one world learn another -------------------------------------------------
def attention_methods() -> dict[str, tuple[object, tuple[float, ...]]]:
    """{name: (method, the rates to begin with)} on a classifier of transformers; all but BitFit train the head too."""
    from minipeft.methods.adapter import Adapter
    from minipeft.methods.lora import LoRA
    from minipeft.methods.select import BitFit, Full, Softmax

    return {
        "output layer": (Softmax(), (1e-2, 3e-2)),
        "BitFit": (BitFit(), (1e-2, 3e-2)),
        "LoRA r=4": ([LoRA(rank=4), Softmax()], (3e-3, 1e-2)),
        "adapter m=8": ([Adapter(8), Softmax()], (3e-3, 1e-2)),
        "full": (Full(), (1e-3, 3e-3)),
        "from scratch": (None, (1e-3, 3e-3)),
    }


def base(folder: Path, name: str, make: Callable, rows, steps: int):
    """The model trained on `rows`, once: its numbers are kept in the folder."""
    from safetensors.torch import load_file, save

    from minipeft.learn.arrays import fit_arrays
    from minipeft.learn.plan import Plan

    model, path = make(0), folder / f"{name}.safetensors"
    if not path.exists():
        fit_arrays(model, rows.x, rows.y, Plan(steps, 1e-3, 32, 0, "linear"))
        write_whole(path, save(model.state_dict()))
    model.load_state_dict(load_file(path))
    return model.eval()


def carried(notes: Notes, part: str, make: Callable, trained, draw: Callable, tests: dict, sizes) -> dict:
    """What a trained base gives as it is, and every method on it; `draw(n, seed)` gives training rows."""
    from minipeft.learn.arrays import evaluate_arrays

    methods = attention_methods()

    def run(name, n, lr, seed, on):
        model = make(seed) if name == "from scratch" else copy.deepcopy(trained)
        return learn(model, methods[name][0], draw(n, seed), {on: tests[on]}, lr, seed, SMALL_STEPS)

    frozen = evaluate_arrays(trained, tests["test"].x, tests["test"].y)
    found = compare(notes, part, methods, run, sizes)
    return found | {"frozen": {"loss": frozen.loss, "accuracy": frozen.accuracy}}


def attention(notes: Notes) -> dict:
    from minipeft.learn.arrays import evaluate_arrays
    from minipeft.world.pictures import digits, few, mnist, vit

    one, other = mnist(), digits()
    trained = base(notes.folder, "vit", vit, one["train"], 1000)
    home = evaluate_arrays(trained, one["test"].x, one["test"].y).accuracy
    found = carried(notes, "attention", vit, trained, lambda n, seed: few(other["train"], n, seed), other, SIZES[:2])
    return found | {"home": home}


def speech(notes: Notes) -> dict:
    from minipeft.learn.arrays import evaluate_arrays
    from minipeft.world.speech import WORLDS, ast, spoken

    trained = base(notes.folder, "ast", ast, spoken("English", 60, SEARCH_SEED), 600)
    home = evaluate_arrays(trained, *spoken("English", 30, TEST_SEED)).accuracy
    found = {}
    for world in (name for name in WORLDS if name != "English"):
        tests = {"validation": spoken(world, 15, SEARCH_SEED + 1), "test": spoken(world, 30, TEST_SEED)}
        draw = functools.cache(lambda n, seed, w=world: spoken(w, n, seed))
        found[world] = carried(notes, f"speech {world}", ast, trained, draw, tests, (AT,))
    return {"home": home, "worlds": found}


PARTS: dict[str, Callable[[Notes], dict]] = {
    "speech": speech,
    "tail": tails,
    "attention": attention,
}


def measured() -> dict:
    """What was found when the course was made, by part."""
    return json.loads(FILE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    measure(FILE, PARTS, __doc__.splitlines()[0])
