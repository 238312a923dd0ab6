"""The book's sliders: measured runs behind Vega-Lite, and a sentence for each position, written here.

    for chart in charts(): chart.spec, chart.controls, chart.says

Everything shown is a mean over the seeds of runs in `atlas.parquet` or in a JSON file beside it, with the least and the
largest as its spread, or a single run that is named as one.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from itertools import product
from pathlib import Path

import pandas as pd
from pictures import GREY, Chart, Control, axis, bar, curve, key, layer, looks, moving, picture

from minipeft.course import atlas
from minipeft.learn.sweep import method_of

COURSE = Path(__file__).parents[1] / "minipeft" / "course"
LOSS = "test loss (nats a token)"


def charts() -> list[Chart]:
    """All of them, in the order of the lessons."""
    runs, measured = explored()
    explorer = {"00_start_here": "LoRAExplorer(", "06_lora": "LoRAExplorer("}
    return [
        swept("rank", explorer, "rank of LoRA", runs, measured, "LoRA", "rank", "pirate", {"gamma": 2.0}),
        swept("bottleneck", {"03_adapters": "AdapterExplorer("}, "width of the bottleneck", runs, measured, "Adapter",
              "bottleneck", "pirate"),
        swept("prompt", {"04_prompts": "PromptExplorer("}, "length of the prompt", runs, measured, "PromptTuning",
              "length", "forecast"),
        swept("prefix", {"05_prefixes": "PrefixExplorer("}, "length of the prefix", runs, measured, "PrefixTuning",
              "length", "forecast"),
        gammas(runs, measured),
        rates(read("family")),
        ranks(read("family")),
        forgetting(read("teaching")),
        serving(read("serving")),
        story(read("feedback")["hacking"]),
        drift(read("worlds")["drift"]),
    ]  # fmt: skip


def explored() -> tuple[pd.DataFrame, str]:
    """The runs of the atlas that are as long as an explorer's own, and where they come from."""
    runs = atlas.load()
    p = runs.attrs["provenance"]
    runs["given"] = runs.settings.map(json.loads)
    return runs[(runs.steps == 60) & (runs.batch == 10)], when(p) + f", seeds {', '.join(map(str, p['seeds']))}"


def read(name: str) -> dict:
    return json.loads((COURSE / f"{name}.json").read_text(encoding="utf-8"))


def when(p: dict) -> str:
    return f"Measured on {p['date']} with {p['device']}, torch {p['torch']}"


def spread(values) -> dict:
    """Mean, least and largest of one figure over the seeds."""
    return {"mean": round(statistics.fmean(values), 6), "low": round(min(values), 6), "high": round(max(values), 6)}


def swept(name, places, label, runs, measured, method, knob, start, fixed=None) -> Chart:
    """Lessons 00 to 06: test loss by learning rate for one size of a method, beside its other sizes and full tuning.

    The sizes are those of runs of `method` with the settings `fixed` and the `knob`, on tasks with three sizes or more.
    """
    fixed = fixed or {}
    mine = runs[(runs.method == method) & runs.given.map(lambda s: s == fixed | {knob: s.get(knob)})]
    mine = mine.assign(size=mine.given.map(lambda s: s[knob]))
    many = mine.groupby("task")["size"].nunique()
    tasks = sorted(many[many > 2].index)
    mine = mine[mine.task.isin(tasks)]
    sizes = sorted(int(n) for n in mine["size"].unique())
    whole = runs[(runs.method == "Full") & runs.task.isin(tasks)].assign(size=0)
    both = pd.concat([mine, whole])
    rows = [
        {"task": task, "size": int(size), "lr": lr, **spread(group.loss)}
        for (task, size, lr), group in both[~both.seed.isin(atlas.CHOOSERS)].groupby(["task", "size", "lr"])
    ]
    rates = {at: chosen(runs, tried) for at, tried in both.groupby(["task", "size"])}
    floors = {task: round(runs[runs.task == task].floor.iloc[0], 4) for task in tasks}
    says = {}
    for task, size in product(tasks, sizes):
        here = mine[(mine.task == task) & (mine["size"] == size)]
        if here.empty:
            says[key(task, size)] = f"The atlas holds no run of {knob} {size} on {task}."
            continue
        trained, total = int(here.trainable.iloc[0]), int(here.total.iloc[0])
        says[key(task, size)] = (
            f"{knob.capitalize()} {size} on {task}: {trained:,} trained numbers ({trained / total:.2%} of the model);"
            f" {best(rows, task, size, rates[task, size])}."
            f" Full fine-tuning, {int(whole.trainable.iloc[0]):,} numbers:"
            f" {best(rows, task, 0, rates[task, 0])}." + (f" The floor is {floors[task]:.2f}." if floors[task] else "")
        )
    controls = [Control("task", "task", tasks, start, kind="choice"), Control("size", label, sizes, 8)]
    this, full, floor, others = f"the chosen {knob}", "full fine-tuning", "floor", f"the other {knob}s"
    look = looks([this, full, floor, others], last=GREY)
    x = axis("lr", "learning rate", sorted({row["lr"] for row in rows}), log=True)
    y = axis("mean", LOSS, [0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 8, 12], log=True)
    thin = layer("line", look[others], "datum.task === task && datum.size > 0 && datum.size != size",
                 {"x": x, "y": y, "detail": {"field": "size"}}, strokeWidth=1, opacity=0.6)  # fmt: skip
    ground = layer(
        "rule", look[floor], "datum.task === task && datum.floor > 0", {"y": y | {"field": "floor"}}, strokeWidth=2
    )
    ground["data"] = {"values": [{"task": task, "floor": value} for task, value in floors.items()]}
    curves = [
        *curve(look[full], "datum.task === task && datum.size === 0", x, y),
        *curve(look[this], "datum.task === task && datum.size == size", x, y),
    ]
    gamma = f" {method} with γ = {fixed['gamma']:g}; lesson 06 has other γ." if "gamma" in fixed else ""
    return Chart(
        name,
        places,
        title=f"Move the {label}, and see the whole curve of learning rates move",
        alt=f"Test loss by learning rate on logarithmic axes: one curve for the chosen {knob} with a bar over seeds,"
        f" thin grey ones for the other {knob}s, one for full fine-tuning, and the floor.",
        source=f"{measured}; 60 steps of 10 texts on the pocket model.{gamma} The best rate of each was chosen"
        " on validation rows, by a seed that is not shown.",
        controls=controls,
        says=says,
        spec=picture(rows, controls, [thin, ground, *curves]),
    )


def chosen(runs: pd.DataFrame, tried: pd.DataFrame) -> float | None:
    """The learning rate that was chosen for the method and the task of `tried`; None where no run chose one."""
    row = tried.iloc[0]
    rate, by = atlas.chosen(runs, row.task, method_of(row.method, row.settings))
    return None if by == "test" else rate


def best(rows: list[dict], task: str, size: int, lr: float) -> str:
    """The loss at the rate that was chosen, with its spread, in words."""
    at = next(row for row in rows if (row["task"], row["size"], row["lr"]) == (task, size, lr))
    return f"loss {at['mean']:.2f} at the rate {lr:g} ({at['low']:.2f} to {at['high']:.2f} over the seeds)"


def gammas(runs: pd.DataFrame, measured: str) -> Chart:
    """Lesson 06: what γ does at one learning rate, and at the best rate of each γ, which validation rows chose."""
    mine = runs[(runs.method == "LoRA") & (runs.task == "pirate")]
    mine = mine[mine.given.map(lambda s: s.keys() == {"rank", "gamma"})]
    mine = mine.assign(rank=mine.given.map(lambda s: s["rank"]), gamma=mine.given.map(lambda s: s["gamma"]))
    mine = mine[mine.groupby("rank").gamma.transform("nunique") > 1]
    rows, says, one, own = [], {}, "at one rate, 0.01", "at its own best rate"
    for (rank, gamma), tried in mine.groupby(["rank", "gamma"]):
        if (rate := chosen(runs, tried)) is None:
            continue
        found = {one: tried[tried.lr == 1e-2], own: tried[(tried.lr == rate) & ~tried.seed.isin(atlas.CHOOSERS)]}
        rows += [
            {"rank": int(rank), "gamma": gamma, "series": label, "rate": rate, **spread(which.loss)}
            for label, which in found.items()
        ]
    controls = [Control("rank", "rank, with γ along the axis", sorted({row["rank"] for row in rows}), 16)]
    for rank in controls[0].values:
        means = {label: [r["mean"] for r in rows if (r["rank"], r["series"]) == (rank, label)] for label in (one, own)}
        rates = ", ".join(f"{r['rate']:g}" for r in rows if (r["rank"], r["series"]) == (rank, own))
        says[key(rank)] = (
            f"Rank {rank}: over these γ the loss goes from {min(means[one]):.2f} to {max(means[one]):.2f} {one}, and"
            f" from {min(means[own]):.2f} to {max(means[own]):.2f} {own}. Those rates, from the least γ on: {rates}."
        )
    look = looks([one, own])
    x = axis("gamma", "γ", sorted({row["gamma"] for row in rows}), log=True)
    y = axis("mean", LOSS, [1, 1.5, 2, 3, 5], log=True)
    layers = [
        mark for label in (one, own)
        for mark in curve(look[label], f"datum.rank == rank && datum.series === {json.dumps(label)}", x, y)
    ]  # fmt: skip
    return Chart(
        "gamma",
        {"06_lora": "gammas = list("},
        title="Move the rank: at one learning rate γ decides, at its own best rate it hardly does",
        alt="Test loss by γ on logarithmic axes: one line at the learning rate 0.01 and one at each γ's own best rate,"
        " with a bar over seeds.",
        source=f"{measured}; LoRA on pirate, 60 steps of 10 texts on the pocket model. Validation rows and another seed"
        " chose the rates; 0.01 was run with that seed as well. A point without a bar is one run.",
        controls=controls,
        says=says,
        spec=picture(rows, controls, layers),
    )


def rates(family: dict) -> Chart:
    """Lesson 08: what every method reaches at one shared learning rate, beside its own best. One seed."""
    rows, says = [], {}
    for method, found in family["sweeps"].items():
        mine = {run["lr"]: round(run["loss"], 4) for run in found if run["seed"] == 0 and run["loss"] is not None}
        rows += [{"method": method, "lr": lr, "loss": loss, "best": min(mine.values())} for lr, loss in mine.items()]
    grid = sorted({row["lr"] for row in rows})
    for lr in grid:
        here = sorted((row for row in rows if row["lr"] == lr), key=lambda row: row["loss"])
        own = sum(row["loss"] == row["best"] for row in here)
        says[key(lr)] = (
            f"At the rate {lr:g}, {len(here)} methods were run. Lowest is {here[0]['method']} with"
            f" {here[0]['loss']:.2f}, highest {here[-1]['method']} with {here[-1]['loss']:.2f}."
            f" For {own} of them it is the best of the rates tried."
        )
    controls = [Control("lr", "learning rate", grid, 0.003)]
    look = looks(["at this rate", "at its own best rate"])
    methods = {"field": "method", "type": "nominal", "title": None, "sort": {"field": "best", "op": "min"}}
    y = methods | {"axis": {"labelLimit": 150}}
    x = axis("loss", LOSS, [1, 1.5, 2, 3, 5, 7], log=True)
    layers = [
        layer("tick", look["at its own best rate"], "true", {"y": y, "x": x | {"field": "best"}}, thickness=3, size=12),
        layer("point", look["at this rate"], "datum.lr == lr", {"y": y, "x": x}, size=80),
    ]
    return Chart(
        "rates",
        {"08_lora_family": "Every method has a valley of its own"},
        title="Move the learning rate, and see who wins when all share it",
        alt="One row for each method: a tick at its loss with its own best learning rate, and a point at its loss with"
        " the rate that the slider chooses.",
        source=f"{when(family['measured'])}; {family['task']}, one run each (seed 0).",
        controls=controls,
        says=says,
        spec=picture(rows, controls, layers, height=330),
    )


def ranks(family: dict) -> Chart:
    """Lesson 08: AdaLoRA's rank in each layer while it prunes. One seed."""
    rows, says = [], {}
    for budget, run in family["budgets"].items():
        for step, kept in zip(run["steps"], run["ranks"], strict=True):
            kinds = defaultdict(list)
            for name, rank in zip(family["layers"], kept, strict=True):
                block, kind = int(name.split(".")[2]), name.rsplit(".", 1)[1]
                rows.append({"budget": int(budget), "step": step, "block": block, "kind": kind, "rank": rank})
                kinds[kind].append(rank)
            means = {kind: statistics.fmean(found) for kind, found in kinds.items()}
            most, least = max(means, key=means.get), min(means, key=means.get)
            says[key(budget, step)] = (
                f"Step {step}, budget {budget} on average: {sum(kept)} directions are left in {len(kept)} layers."
                f" {most} has most ({means[most]:.1f} a block), {least} has least ({means[least]:.1f})."
                if len(set(kept)) > 1
                else f"Step {step}, budget {budget} on average: each of {len(kept)} layers has {kept[0]} directions."
            )
    steps, budgets = (sorted({row[name] for row in rows}) for name in ("step", "budget"))
    controls = [
        Control("budget", "budget", budgets, 4, kind="choice"),
        Control("step", "optimizer step", steps, steps[-1]),
    ]
    order = list(dict.fromkeys(row["kind"] for row in rows))
    place = {
        "x": {"field": "block", "type": "ordinal", "title": "block", "axis": {"labelAngle": 0}},
        "y": {"field": "kind", "type": "nominal", "title": None, "sort": order},
    }
    largest = max(row["rank"] for row in rows)
    blues = {"scheme": "blues", "domain": [0, largest]}
    shade = {"field": "rank", "type": "quantitative", "scale": blues, "legend": None}
    letters = {"condition": {"test": f"datum.rank < {0.6 * largest}", "value": "black"}, "value": "white"}
    where = "datum.budget == budget && datum.step == step"
    layers = [
        layer("rect", {"color": shade}, where, place, stroke=GREY),
        layer("text", {"color": letters}, where, place | {"text": {"field": "rank"}}, fontSize=13),
    ]
    return Chart(
        "ranks",
        {"08_lora_family": 'found["budgets"]'},
        title="Watch AdaLoRA take rank away, layer by layer",
        alt="A square for each layer with its rank as a number and as a shade: blocks from left to right, kinds of"
        " layer from top to bottom.",
        source=f"{when(family['measured'])}; {family['task']}, one run for each budget (seed 0).",
        controls=controls,
        says=says,
        spec=picture(rows, controls, layers, height=240),
    )


def forgetting(teaching: dict) -> Chart:
    """Lesson 11: what is learnt and what is lost, step by step."""
    rows, at = [], defaultdict(list)
    for side, found in teaching["sides"].items():
        runs = found["runs"]
        for step in sorted(set.intersection(*(set(run["steps"]) for run in runs))):
            new, old = (spread([run[what][run["steps"].index(step)] for run in runs]) for what in ("task", "old"))
            rows.append({"side": side, "step": step, "task": new["mean"], **old})
            at[step].append(f"{side}, {new['mean']:.2f} and {old['mean']:.2f}")
    says = {
        key(n): f"After {n} steps, loss on the task and on the old stories: {'; '.join(at[n])}." for n in sorted(at)
    }
    controls = [Control("step", "step", sorted(at), 30)]
    seeds = {len(side["runs"]) for side in teaching["sides"].values()}
    labels = list(teaching["sides"])
    x, y = axis("task", "loss on the task (nats a token)"), axis("mean", "loss on the old stories (nats a token)")
    layers = []
    for label, look in looks(labels).items():
        all_steps = f"datum.side === {json.dumps(label)}"
        now = f"{all_steps} && datum.step == step"
        path = {"x": x, "y": y, "order": {"field": "step"}}
        layers += [
            layer("line", look, all_steps, path, strokeWidth=1.5, opacity=0.6),
            layer("rule", look, now, {"x": x} | bar(y)),
            layer("point", look, now, {"x": x, "y": y}, size=110),
        ]
    return Chart(
        "forgetting",
        {"11_distillation": "At the same task loss"},
        title="Step by step the task is learnt and the old stories are lost",
        alt="Paths of five ways to train: the loss on the task from right to left, the loss on the old stories upward."
        " A point on each path shows where it is after the chosen number of steps, with a bar over the seeds.",
        source=f"{when(teaching['measured'])}; pirate on the pocket model, means over {min(seeds)} seeds, each way at"
        " its own rate. A path ends where the first of its seeds does.",
        controls=controls,
        says=says,
        spec=picture(rows, controls, layers, height=280),
    )


def serving(found: dict) -> Chart:
    """Lesson 12: tokens a CPU second by the number of adapters in one batch."""
    rows, says = [], {}
    ways = {"one batch": "one batch, tokens a CPU second", "batch by batch": "batch by batch, tokens a CPU second"}
    for point in found["points"]:
        n = point["adapters"]
        one, many = (spread(point[name]) for name in ways.values())
        rows += [{"x": n, "series": way, **values} for way, values in zip(ways, (one, many), strict=True)]
        bank, merged = (point[name] / 2**20 for name in ("bank, bytes", "merged copies, bytes"))
        says[key(n)] = (
            f"{n} adapter{'s' * (n > 1)}, tokens a CPU second: {one['mean']:,.0f} in one batch ({one['low']:,.0f} to"
            f" {one['high']:,.0f}), {many['mean']:,.0f} batch by batch ({many['low']:,.0f} to {many['high']:,.0f})."
            f" The bank holds {bank:.1f} MiB, merged copies {merged:.1f} MiB."
        )
    counts = [point["adapters"] for point in found["points"]]
    control = Control("adapters", "adapters", counts, counts[-1])
    x, y = axis("x", "adapters", counts, log=True), axis("mean", "tokens a CPU second")
    return Chart(
        "serving",
        {"12_serving": "One batch keeps most of its speed"},
        title="Add adapters, and compare one batch with batch by batch",
        alt="Tokens a CPU second by the number of adapters, in one batch and batch by batch, with a band over the"
        " rounds.",
        source=f"{when(found['measured'])}; {found['what']}.",
        controls=[control],
        says=says,
        spec=moving(rows, control, list(ways), x, y),
    )


def story(hacking: dict) -> Chart:
    """Lesson 13: shares of the stories by step, and a story of that very step."""
    runs = [run for run in hacking["runs"] if run["setting"] == "30 pairs"]
    stories = next(run["stories"] for run in runs if "stories" in run)
    columns = {"ends happily": 1, "can be read": 3, "both: what was wanted": 2}
    rows, says = [], {}
    for step, text in enumerate(stories):
        for name, column in columns.items():
            rows.append({"x": step, "series": name, **spread([run["trace"][step][column] for run in runs])})
        score = spread([run["trace"][step][0] for run in runs])
        says[key(step)] = (
            f"Step {step}: mean score {score['mean']:z.1f}, {score['low']:z.1f} to {score['high']:z.1f} over"
            f" {len(runs)} seeds. One story of this step: “{text}”"
        )
    control = Control("step", "step of the policy gradient", list(range(len(stories))), 0)
    return Chart(
        "story",
        {"13_feedback": "The score rises; what it stood for falls"},
        title="Read a story of every step while the score rises",
        alt="Shares of the stories by step of the policy gradient, with a band over the seeds, and an upright line at"
        " the chosen step.",
        source=f"{when(hacking['measured'])}; a reward model from 30 pairs, no price for leaving the base.",
        controls=[control],
        says=says,
        spec=moving(rows, control, list(columns), axis("x", "step"), axis("mean", "share of the stories")),
    )


def drift(found: dict) -> Chart:
    """Lesson 14: the loss of four ways to follow a stream."""
    runs = pd.DataFrame(found["runs"])
    ways = list(dict.fromkeys(runs.way))
    rows, says = [], {}
    batches = list(range(1, sum(found["lengths"]) + 1))
    for batch in batches:
        at = {way: spread([losses[batch - 1] for losses in runs[runs.way == way].losses]) for way in ways}
        rows += [{"x": batch, "series": way, **values} for way, values in at.items()]
        said = "; ".join(f"{way} {v['mean']:.2f} ({v['low']:.2f} to {v['high']:.2f})" for way, v in at.items())
        says[key(batch)] = f"Batch {batch}, loss in nats a token over {runs.seed.nunique()} seeds: {said}."
    changes = ", ".join(str(sum(found["lengths"][:n]) + 1) for n in range(1, len(found["lengths"])))
    control = Control("batch", "batch of the stream", batches, 1)
    return Chart(
        "drift",
        {"14_changing_worlds": "One adapter learns every world, and forgets it"},
        title="Follow four adapters along a stream that drifts",
        alt="Loss by batch of the stream for four ways to follow it, with a band over the seeds, and an upright line at"
        " the chosen batch.",
        source=f"{when(found['measured'])}; the world changes at batches {changes}; {found['batch']} texts a batch.",
        controls=[control],
        says=says,
        spec=moving(rows, control, ways, axis("x", "batch"), axis("mean", "loss (nats a token)")),
    )
