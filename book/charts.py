"""The book's sliders: measured runs behind Vega-Lite, and one sentence for each position, written here and not in JavaScript.

    for chart in charts(): chart.spec, chart.controls, chart.says

A chart is one picture in Vega-Lite whose parameters are the values of its controls. Everything shown is a mean over the seeds
of runs in `atlas.parquet` or in one of the JSON files beside it, with the least and the largest as its spread.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq

COURSE = Path(__file__).parents[1] / "minipeft" / "course"
# Of Okabe and Ito those that stand out from white and from black; lines differ in dashes and points as well.
BLUE, RED, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#B8629B", "#808080"
COLOURS = [BLUE, RED, GREEN, PURPLE, GREY]
DASHES = [[1, 0], [6, 3], [2, 2], [8, 2, 2, 2], [4, 4]]
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross"]
LOSS = "test loss (nats a token)"
CONFIG = {  # currentColor: the text's colour in a light and in a dark theme
    "background": None,
    "font": "sans-serif",
    "view": {"stroke": None},
    "axis": {"labelColor": "currentColor", "titleColor": "currentColor", "domainColor": "currentColor"}
    | {"tickColor": "currentColor", "gridColor": "currentColor", "gridOpacity": 0.15, "labelFontSize": 12, "titleFontSize": 12},
    "legend": {"labelColor": "currentColor", "orient": "bottom", "direction": "vertical", "title": None, "labelFontSize": 12}
    | {"labelLimit": 300, "symbolSize": 80, "symbolOpacity": 1},
}


@dataclass(frozen=True)
class Control:
    """A slider over `values`, or a choice among them; `start` is the value at first."""

    name: str
    label: str
    values: list
    start: object
    kind: str = "slider"


@dataclass(frozen=True)
class Chart:
    """One picture with its controls. `says` has a sentence for each position: {"pirate|8": "Rank 8 on pirate: …"}.

    `lesson` and `after` say where it stands: below the first cell of that lesson whose code has `after` in it.
    """

    name: str
    lesson: str
    after: str
    title: str
    alt: str
    source: str
    controls: list[Control]
    says: dict[str, str]
    spec: dict

    @property
    def start(self) -> str:
        return key(*(control.start for control in self.controls))


def key(*values) -> str:
    """The position of all controls as one text, as `book.js` writes it."""
    return "|".join(str(value) for value in values)


def charts() -> list[Chart]:
    """All of them, in the order of the lessons."""
    runs, measured = atlas()
    lora = dict(runs=runs, measured=measured, method="LoRA", knob="rank", fixed={"gamma": 2.0})
    return [
        swept("rank", "06_lora", "LoRAExplorer(", "rank of LoRA", task="pirate", size=8, **lora),
        swept("bottleneck", "03_adapters", "AdapterExplorer(", "width of the bottleneck", task="pirate", size=8,
              runs=runs, measured=measured, method="Adapter", knob="bottleneck"),
        swept("prompt", "04_prompts", "PromptExplorer(", "length of the prompt", task="forecast", size=8,
              runs=runs, measured=measured, method="PromptTuning", knob="length"),
        swept("prefix", "05_prefixes", "PrefixExplorer(", "length of the prefix", task="forecast", size=8,
              runs=runs, measured=measured, method="PrefixTuning", knob="length"),
        rates(read("family")),
        ranks(read("family")),
        forgetting(read("teaching")),
        serving(read("serving")),
        story(read("feedback")["hacking"]),
        drift(read("worlds")["drift"]),
    ]  # fmt: skip


# -- what was measured

def atlas() -> tuple[pd.DataFrame, str]:
    """The runs of the explorers' own length, and where they come from."""
    table = pq.read_table(COURSE / "atlas.parquet")
    p = json.loads(table.schema.metadata[b"provenance"])
    runs = table.to_pandas()
    runs["settings"] = runs.settings.map(json.loads)
    return runs[(runs.steps == 60) & (runs.batch == 10)], when(p) + f", seeds {', '.join(map(str, p['seeds']))}"


def read(name: str) -> dict:
    return json.loads((COURSE / f"{name}.json").read_text(encoding="utf-8"))


def when(p: dict) -> str:
    return f"Measured on {p['date']} with {p['device']}, torch {p['torch']}"


def spread(values) -> dict:
    """Mean, least and largest of one figure over the seeds."""
    return {"mean": round(statistics.fmean(values), 4), "low": round(min(values), 4), "high": round(max(values), 4)}


# -- what they have in common

def base(data: list[dict], controls: list[Control], layer: list[dict], height: int = 260, **rest) -> dict:
    """A picture over `data` whose parameters are the controls' values."""
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "width": 480,
        "height": height,
        "config": CONFIG,
        "params": [{"name": control.name, "value": control.start} for control in controls],
        "data": {"values": data},
        "layer": layer,
    } | rest


def axis(field: str, title: str, log: bool = False, **rest) -> dict:
    scale = {"type": "log", "nice": False, "padding": 12} if log else {"zero": False, "nice": False, "padding": 12}
    return {"field": field, "type": "quantitative", "title": title, "scale": scale} | rest


def styles(labels: list[str], last: str | None = None) -> dict:
    """Colour, dashes and points for up to five labels in one legend: {channel: scale}; `last` is the last one's colour."""
    n = len(labels)
    return {
        "color": {"domain": labels, "range": COLOURS[: n - 1] + [last or COLOURS[n - 1]]},
        "strokeDash": {"domain": labels, "range": DASHES[:n]},
        "shape": {"domain": labels, "range": SHAPES[:n]},
    }


def curve(label: str, look: dict, where: str, x: dict, y: dict, band: bool = False) -> list[dict]:
    """A line through the means of the rows where `where` holds, with a bar (or a band) from the least to the largest seed."""
    transform = [{"filter": where}]
    reach = {"type": "area", "opacity": 0.15} if band else {"type": "rule", "strokeWidth": 1.5}
    bar = {"x": x, "y": y | {"field": "low"}, "y2": {"field": "high"}, "color": {"datum": label, "scale": look["color"]}}
    line = {"x": x, "y": y, "color": bar["color"], "strokeDash": {"datum": label, "scale": look["strokeDash"]}}
    points = {"x": x, "y": y, "color": bar["color"], "shape": {"datum": label, "scale": look["shape"]}}
    return [
        {"transform": transform, "mark": reach, "encoding": bar},
        {"transform": transform, "mark": {"type": "line", "strokeWidth": 2}, "encoding": line},
        {"transform": transform, "mark": {"type": "point", "filled": True, "size": 25 if band else 60, "opacity": 1},
         "encoding": points},
    ]  # fmt: skip


def moving(rows: list[dict], controls: list[Control], labels: list[str], x: str, y: str, log: bool = False, **rest) -> dict:
    """A curve for each label, and an upright line where the slider stands. Rows have x, series, mean, low and high."""
    across, up = axis("x", x, log=log), axis("mean", y)
    here = {"data": {"values": [{}]}, "transform": [{"calculate": controls[0].name, "as": "x"}]}
    layer = [here | {"mark": {"type": "rule", "color": "currentColor", "strokeDash": [3, 3]}, "encoding": {"x": across}}]
    for label in labels:
        layer += curve(label, styles(labels), f"datum.series === {json.dumps(label)}", across, up, band=True)
    return base(rows, controls, layer, **rest)


# -- the charts

def swept(name: str, lesson: str, after: str, label: str, *, runs, measured, method, knob, task, size, fixed=None) -> Chart:
    """Test loss by learning rate for one size of a method, beside its other sizes and full fine-tuning."""
    fixed = fixed or {}
    mine = runs[(runs.method == method) & runs.settings.map(lambda s: s == fixed | {knob: s.get(knob)})]
    mine = mine.assign(size=[s[knob] for s in mine.settings])
    many = mine.groupby("task")["size"].nunique()
    tasks = sorted(many[many > 2].index)
    sizes = sorted(int(n) for n in mine[mine.task.isin(tasks)]["size"].unique())
    whole = runs[(runs.method == "Full") & runs.task.isin(tasks)].assign(size=0)
    rows, says = [], {}
    for (on, n, lr), group in pd.concat([mine[mine.task.isin(tasks)], whole]).groupby(["task", "size", "lr"]):
        rows.append({"task": on, "size": int(n), "lr": lr, **spread(group.loss)})
    floors = [{"task": on, "floor": round(runs[runs.task == on].floor.iloc[0], 4)} for on in tasks]
    for on, n in product(tasks, sizes):
        here = mine[(mine.task == on) & (mine["size"] == n)]
        if here.empty:
            says[key(on, n)] = f"The atlas holds no run of {knob} {n} on {on}."
            continue
        floor = next(row["floor"] for row in floors if row["task"] == on)
        trained, total = int(here.trainable.iloc[0]), int(here.total.iloc[0])
        says[key(on, n)] = (
            f"{knob.capitalize()} {n} on {on}: {trained:,} trained numbers ({trained / total:.2%} of the model);"
            f" {best(rows, on, n)}. Full fine-tuning, {int(whole.trainable.iloc[0]):,} numbers: {best(rows, on, 0)}."
            + (f" The floor is {floor:.2f}." if floor else "")
        )
    controls = [
        Control("task", "task", tasks, task, kind="choice"),
        Control("size", label, sizes, size),
    ]
    chosen, others, full, least = f"the chosen {knob}", f"the other {knob}s", "full fine-tuning", "floor"
    labels = [chosen, full, least, others]
    x = axis("lr", "learning rate", log=True, axis={"format": "~g", "values": sorted({row["lr"] for row in rows})})
    y = axis("mean", LOSS, log=True, axis={"format": "~g", "values": [0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 8, 12]})
    look = styles(labels, last=GREY)
    grey = {
        "transform": [{"filter": "datum.task === task && datum.size > 0 && datum.size != size"}],
        "mark": {"type": "line", "strokeWidth": 1, "opacity": 0.6},
        "encoding": {"x": x, "y": y, "detail": {"field": "size"}, "color": {"datum": others, "scale": look["color"]},
                     "strokeDash": {"datum": others, "scale": look["strokeDash"]}},
    }  # fmt: skip
    ground = {
        "data": {"values": floors},
        "transform": [{"filter": "datum.task === task && datum.floor > 0"}],
        "mark": {"type": "rule", "strokeWidth": 2},
        "encoding": {"y": y | {"field": "floor"}, "color": {"datum": least, "scale": look["color"]},
                     "strokeDash": {"datum": least, "scale": look["strokeDash"]}},
    }  # fmt: skip
    layer = [grey, ground]
    layer += curve(full, look, "datum.task === task && datum.size === 0", x, y)
    layer += curve(chosen, look, "datum.task === task && datum.size == size", x, y)
    return Chart(
        name,
        lesson,
        after,
        title=f"The {label} moves the whole curve of learning rates",
        alt=f"Test loss by learning rate on logarithmic axes: one curve for the chosen {knob} with a bar over the seeds, thin"
        f" grey ones for the other {knob}s, one for full fine-tuning, and the floor.",
        source=f"{measured}; 60 steps of 10 texts on the pocket model."
        + (f" {method} with γ = {fixed['gamma']:g}; no other γ was measured." if "gamma" in fixed else "")
        + " The best rate of each is the one with the least mean loss on the very texts that are scored.",
        controls=controls,
        says=says,
        spec=base(rows, controls, layer),
    )


def best(rows: list[dict], task: str, size: int) -> str:
    """The loss at the best of the rates tried, with its spread, in words."""
    tried = [row for row in rows if (row["task"], row["size"]) == (task, size)]
    least = min(tried, key=lambda row: row["mean"])
    edge = least["lr"] in (tried[0]["lr"], tried[-1]["lr"])
    return (
        f"loss {least['mean']:.2f} at the rate {least['lr']:g} ({least['low']:.2f} to {least['high']:.2f} over the seeds)"
        + ", the last rate that was tried, so a better one may lie beyond" * edge
    )


def rates(family: dict) -> Chart:
    """Lesson 08: what every method reaches at one shared learning rate, beside its own best."""
    rows, says = [], {}
    for method, found in family["sweeps"].items():
        mine = [run for run in found if run["seed"] == 0 and run["loss"] is not None]
        best = min(mine, key=lambda run: run["loss"])
        rows += [{"method": method, "lr": r["lr"], "loss": round(r["loss"], 4), "best": round(best["loss"], 4)} for r in mine]
    grid = sorted({row["lr"] for row in rows})
    for lr in grid:
        here = sorted((row for row in rows if row["lr"] == lr), key=lambda row: row["loss"])
        at_best = sum(row["loss"] == row["best"] for row in here)
        says[key(lr)] = (
            f"At the rate {lr:g}, {here[0]['method']} is lowest with {here[0]['loss']:.2f} and {here[-1]['method']} highest with"
            f" {here[-1]['loss']:.2f}, of the {len(here)} methods that were run there; it is the best rate for {at_best} of them."
        )
    controls = [Control("lr", "learning rate", grid, 0.003)]
    y = {"field": "method", "type": "nominal", "title": None, "sort": {"field": "best", "op": "min"}, "axis": {"labelLimit": 150}}
    x = axis("loss", LOSS + ", one seed", log=True, axis={"format": "~g", "values": [1, 1.5, 2, 3, 5, 7]})
    look = styles(["at this rate", "at its own best rate"])
    layer = [
        {
            "mark": {"type": "tick", "thickness": 3, "size": 12},
            "encoding": {"y": y, "x": x | {"field": "best"}, "color": {"datum": "at its own best rate", "scale": look["color"]}},
        },
        {
            "transform": [{"filter": "datum.lr == lr"}],
            "mark": {"type": "point", "filled": True, "size": 80, "opacity": 1},
            "encoding": {"y": y, "x": x, "color": {"datum": "at this rate", "scale": look["color"]}},
        },
    ]
    return Chart(
        "rates",
        "08_lora_family",
        "Every method has a valley of its own",
        title="One learning rate for all decides who wins",
        alt="One row for each method: a tick at its loss with its own best learning rate, and a point at its loss with the rate"
        " that the slider chooses.",
        source=when(family["measured"]) + f"; {family['task']}, seed 0.",
        controls=controls,
        says=says,
        spec=base(rows, controls, layer, height=330),
    )


def ranks(family: dict) -> Chart:
    """Lesson 08: AdaLoRA's rank in each layer while it prunes."""
    rows, says = [], {}
    for budget, run in family["budgets"].items():
        for step, kept in zip(run["steps"], run["ranks"], strict=True):
            for layer, rank in zip(family["layers"], kept, strict=True):
                block, kind = layer.split(".")[2], layer.rsplit(".", 1)[1]
                rows.append({"budget": int(budget), "step": step, "block": int(block), "kind": kind, "rank": rank})
            here = {kind: [r["rank"] for r in rows[-len(kept) :] if r["kind"] == kind] for kind in dict.fromkeys(
                r["kind"] for r in rows[-len(kept) :])}  # fmt: skip
            means = {kind: statistics.fmean(found) for kind, found in here.items()}
            most, least = max(means, key=means.get), min(means, key=means.get)
            says[key(budget, step)] = (
                f"Step {step}, budget {budget} on average: {sum(kept)} directions are left in {len(kept)} layers."
                + (f" {most} keeps most ({means[most]:.1f} a block), {least} least ({means[least]:.1f})." if len(set(kept)) > 1 else
                   f" Every layer has {kept[0]}.")
            )  # fmt: skip
    steps, budgets = sorted({row["step"] for row in rows}), sorted({row["budget"] for row in rows})
    controls = [Control("budget", "budget", budgets, 4, kind="choice"), Control("step", "optimizer step", steps, steps[0])]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    place = {
        "x": {"field": "block", "type": "ordinal", "title": "block", "axis": {"labelAngle": 0}},
        "y": {"field": "kind", "type": "nominal", "title": None, "sort": kinds},
    }
    shown = [{"filter": "datum.budget == budget && datum.step == step"}]
    shade = {"field": "rank", "type": "quantitative", "scale": {"scheme": "blues", "domain": [0, 12]}, "legend": None}
    black = {"condition": {"test": "datum.rank < 7", "value": "black"}, "value": "white"}
    layer = [
        {"transform": shown, "mark": {"type": "rect", "stroke": GREY}, "encoding": place | {"color": shade}},
        {"transform": shown, "mark": {"type": "text", "fontSize": 13},
         "encoding": place | {"text": {"field": "rank"}, "color": black}},
    ]  # fmt: skip
    return Chart(
        "ranks",
        "08_lora_family",
        'found["budgets"]',
        title="AdaLoRA moves its rank to the layers that use it",
        alt="A table of squares, one for each layer, with its rank as a number and as a shade: blocks from left to right, kinds of"
        " layer from top to bottom.",
        source=when(family["measured"]) + f"; {family['task']}, seed 0.",
        controls=controls,
        says=says,
        spec=base(rows, controls, layer, height=240),
    )


def forgetting(teaching: dict) -> Chart:
    """Lesson 11: what is learnt and what is lost, step by step."""
    rows, at = [], {}
    for side, found in teaching["sides"].items():
        runs = found["runs"]
        steps = set.intersection(*(set(run["steps"]) for run in runs))
        for step in sorted(steps):
            new, old = (spread([run[what][run["steps"].index(step)] for run in runs]) for what in ("task", "old"))
            rows.append({"side": side, "step": step, "task": new["mean"], **old})
            at.setdefault(step, []).append(f"{side} {new['mean']:.2f} and {old['mean']:.2f}")
    steps = sorted(at)
    seeds = len(next(iter(teaching["sides"].values()))["runs"])
    says = {key(n): f"After {n} steps, loss on the task and on the old stories: {'; '.join(at[n])}." for n in steps}
    controls = [Control("step", "step", steps, 30)]
    labels = list(teaching["sides"])
    x, y = axis("task", "loss on the task (nats a token)"), axis("mean", "loss on the old stories (nats a token)")
    look, layer = styles(labels), []
    for label in labels:
        mine = f"datum.side === {json.dumps(label)}"
        colour = {"datum": label, "scale": look["color"]}
        layer += [
            {"transform": [{"filter": mine}], "mark": {"type": "line", "strokeWidth": 1.5, "opacity": 0.6},
             "encoding": {"x": x, "y": y, "order": {"field": "step"}, "color": colour,
                          "strokeDash": {"datum": label, "scale": look["strokeDash"]}}},
            {"transform": [{"filter": f"{mine} && datum.step == step"}], "mark": {"type": "rule", "strokeWidth": 1.5},
             "encoding": {"x": x, "y": y | {"field": "low"}, "y2": {"field": "high"}, "color": colour}},
            {"transform": [{"filter": f"{mine} && datum.step == step"}],
             "mark": {"type": "point", "filled": True, "size": 110, "opacity": 1},
             "encoding": {"x": x, "y": y, "color": colour, "shape": {"datum": label, "scale": look["shape"]}}},
        ]  # fmt: skip
    return Chart(
        "forgetting",
        "11_distillation",
        "At the same task loss",
        title="Step by step the task is learnt and the old stories are lost",
        alt="Paths of five ways to train: the loss on the task from right to left, the loss on the old stories upwards. A point on"
        " each path shows where it is after the chosen number of steps, with a bar over the seeds.",
        source=f"{when(teaching['measured'])}; pirate on the pocket model, means over {seeds} seeds, each way at its own rate."
        " A path ends where the first of its seeds does.",
        controls=controls,
        says=says,
        spec=base(rows, controls, layer, height=280),
    )


def serving(found: dict) -> Chart:
    """Lesson 12: tokens a second by the number of adapters in one batch."""
    rows, says = [], {}
    ways = {"one batch": "one batch, tokens a CPU second", "batch by batch": "batch by batch, tokens a CPU second"}
    for point in found["points"]:
        n = point["adapters"]
        mine = [{"x": n, "series": way, **spread(point[name])} for way, name in ways.items()]
        rows += mine
        says[key(n)] = (
            f"{n} adapter{'s' * (n > 1)}: {mine[0]['mean']:,.0f} tokens a CPU second in one batch, {mine[1]['mean']:,.0f} batch by"
            f" batch; the bank holds {point['bank, bytes'] / 2**20:.1f} MiB, merged copies"
            f" {point['merged copies, bytes'] / 2**20:.1f} MiB."
        )
    counts = [point["adapters"] for point in found["points"]]
    controls = [Control("adapters", "adapters", counts, counts[-1])]
    return Chart(
        "serving",
        "12_serving",
        "One batch keeps most of its speed",
        title="One batch keeps its speed while adapters are added",
        alt="Tokens a CPU second by the number of adapters, in one batch and batch by batch, with a bar over the rounds.",
        source=f"{when(found['measured'])}; {found['what']}.",
        controls=controls,
        says=says,
        spec=moving(rows, controls, list(ways), "adapters", "tokens a CPU second", log=True),
    )


def story(hacking: dict) -> Chart:
    """Lesson 13: the score's share, the truth's share, and a story of that very step."""
    runs = [run for run in hacking["runs"] if run["setting"] == "30 pairs"]
    stories = next(run["stories"] for run in runs if "stories" in run)
    columns = {"says that it was a good day": 1, "ends happily": 2, "is grammatical": 3}
    rows, says = [], {}
    for step in range(len(stories)):
        at = {name: spread([run["trace"][step][column] for run in runs]) for name, column in columns.items()}
        rows += [{"x": step, "series": name, **values} for name, values in at.items()]
        score = spread([run["trace"][step][0] for run in runs])
        says[key(step)] = (
            f"Step {step}: mean score {score['mean']:.1f} over {len(runs)} seeds ({score['low']:.1f} to {score['high']:.1f})."
            f" One story of this step: “{stories[step]}”"
        )
    controls = [Control("step", "step of the policy gradient", list(range(len(stories))), 0)]
    return Chart(
        "story",
        "13_feedback",
        "The score rises; what it stood for falls",
        title="Read a story of every step while its score rises",
        alt="Shares of the stories by step of the policy gradient, with a bar over the seeds, and an upright line at the chosen step.",
        source=f"{when(hacking['measured'])}; a reward model from 30 pairs, no price for leaving the base.",
        controls=controls,
        says=says,
        spec=moving(rows, controls, list(columns), "step", "share of the stories"),
    )


def drift(found: dict) -> Chart:
    """Lesson 14: the loss of four ways to follow a stream."""
    frame = pd.DataFrame(found["runs"])
    ways = list(dict.fromkeys(frame.way))
    rows, says = [], {}
    for i in range(sum(found["lengths"])):
        at = {way: spread([losses[i] for losses in frame[frame.way == way].losses]) for way in ways}
        rows += [{"x": i + 1, "series": way, **values} for way, values in at.items()]
        said = "; ".join(f"{way} {v['mean']:.2f} ({v['low']:.2f} to {v['high']:.2f})" for way, v in at.items())
        says[key(i + 1)] = f"Batch {i + 1}, loss in nats a token over {frame.seed.nunique()} seeds: {said}."
    controls = [Control("batch", "batch of the stream", list(range(1, sum(found["lengths"]) + 1)), 1)]
    ends = ", ".join(str(sum(found["lengths"][: n + 1]) + 1) for n in range(len(found["lengths"]) - 1))
    return Chart(
        "drift",
        "14_changing_worlds",
        "One adapter learns every world, and forgets it",
        title="Follow four adapters along a stream that drifts",
        alt="Loss by batch of the stream for four ways to follow it, with a bar over the seeds, and an upright line at the batch.",
        source=f"{when(found['measured'])}; the world changes at batches {ends}; {found['batch']} texts a batch.",
        controls=controls,
        says=says,
        spec=moving(rows, controls, ways, "batch", "loss (nats a token)"),
    )
