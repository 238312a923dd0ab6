"""What the book's charts have in common: a chart, its controls, and the few pieces of Vega-Lite that it is made of."""

from __future__ import annotations

import json
from dataclasses import dataclass

# Of Okabe and Ito those that stand out from white and from black; lines differ in dashes and points as well.
BLUE, RED, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#B8629B", "#808080"
COLOURS = [BLUE, RED, GREEN, PURPLE, GREY]
DASHES = [[1, 0], [6, 3], [2, 2], [8, 2, 2, 2], [4, 4]]
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross"]
INK = "currentColor"  # the text's colour in a light and in a dark theme
CONFIG = {
    "background": None,
    "font": "sans-serif",
    "view": {"stroke": None},
    "axis": {name: INK for name in ("labelColor", "titleColor", "domainColor", "tickColor", "gridColor")}
    | {"gridOpacity": 0.15, "labelFontSize": 12, "titleFontSize": 12},
    "legend": {"labelColor": INK, "labelFontSize": 12, "labelLimit": 300, "symbolSize": 80, "symbolOpacity": 1}
    | {"orient": "bottom", "direction": "vertical", "title": None},
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

    `places` says where it stands: {lesson: a piece of code}, below the first cell of that lesson with that piece in it.
    """

    name: str
    places: dict[str, str]
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
    """The position of all controls as one text, as `book.js` writes it: JavaScript's 1.0 is "1"."""
    return "|".join(str(value).removesuffix(".0") for value in values)


def picture(data: list[dict], controls: list[Control], layers: list[dict], height: int = 260) -> dict:
    """A picture over `data` whose parameters are the controls' values."""
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "width": 480,
        "height": height,
        "config": CONFIG,
        "params": [{"name": control.name, "value": control.start} for control in controls],
        "data": {"values": data},
        "layer": layers,
    }


def axis(field: str, title: str, values: list | None = None, log: bool = False) -> dict:
    """A quantitative channel; `values` are where its ticks stand."""
    scale = {"nice": False, "padding": 12} | ({"type": "log"} if log else {"zero": False})
    ticks = {"format": "~g", "values": values} if values else {}
    return {"field": field, "type": "quantitative", "title": title, "scale": scale, "axis": ticks}


def looks(labels: list[str], last: str | None = None) -> dict[str, dict]:
    """Colour, dashes and points of up to five labels in one legend: {label: {channel: …}}; `last` colours the last."""
    n = len(labels)
    ranges = {"color": COLOURS[: n - 1] + [last or COLOURS[n - 1]], "strokeDash": DASHES[:n], "shape": SHAPES[:n]}
    scales = {channel: {"domain": labels, "range": found} for channel, found in ranges.items()}
    return {label: {channel: {"datum": label, "scale": scales[channel]} for channel in scales} for label in labels}


def layer(kind: str, look: dict, where: str, encoding: dict, **mark) -> dict:
    """One mark for the rows where `where` holds: lines take a label's dashes, points its shape."""
    wanted = {"line": ("color", "strokeDash"), "point": ("color", "shape")}.get(kind, ("color",))
    style = {"line": {"strokeWidth": 2}, "point": {"filled": True, "opacity": 1}, "rule": {"strokeWidth": 1.5}}
    return {
        "transform": [{"filter": where}],
        "mark": {"type": kind} | style.get(kind, {}) | mark,
        "encoding": encoding | {channel: look[channel] for channel in wanted},
    }


def bar(y: dict) -> dict:
    """From the least to the largest of the seeds."""
    return {"y": y | {"field": "low"}, "y2": {"field": "high"}}


def curve(look: dict, where: str, x: dict, y: dict, band: bool = False) -> list[dict]:
    """A line through the means of some rows, with a bar (or a band) from the least to the largest of the seeds."""
    reach = (
        layer("area", look, where, {"x": x} | bar(y), opacity=0.15)
        if band
        else layer("rule", look, where, {"x": x} | bar(y))
    )
    place = {"x": x, "y": y}
    return [reach, layer("line", look, where, place), layer("point", look, where, place, size=25 if band else 60)]


def moving(rows: list[dict], control: Control, labels: list[str], x: dict, y: dict) -> dict:
    """A curve for each label, and an upright line where the slider stands. Rows have x, series, mean, low and high."""
    upright = {
        "data": {"values": [{}]},
        "transform": [{"calculate": control.name, "as": "x"}],
        "mark": {"type": "rule", "color": INK, "strokeDash": [3, 3]},
        "encoding": {"x": x},
    }
    look = looks(labels)
    curves = [curve(look[label], f"datum.series === {json.dumps(label)}", x, y, band=True) for label in labels]
    return picture(rows, [control], [upright, *sum(curves, [])])
