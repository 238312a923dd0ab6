"""One helper draws the mechanism of every lesson: what is frozen, what trains, which shapes, and what flows where.

    schematic("LoRA")

A drawing is data: parts on a grid, and arrows between them. A frozen part is grey and hatched, a trained one orange; a
white one with round corners is a tensor or a text, and a circle is an operation.
"""

from __future__ import annotations

from typing import NamedTuple

import matplotlib.pyplot as plt
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Patch

from minipeft.explore.slider import ORANGE

FROZEN, TRAINED, DATA, STEP = "frozen", "trained", "data", "step"
WIDE, HIGH = 1.8, 0.95  # inches between two places of the grid
WIDTH, HEIGHT = 1.45, 0.7  # inches of a part
FACES, HATCHES = {FROZEN: "#e4e4e4", TRAINED: ORANGE}, {FROZEN: "//", TRAINED: None}


class Part(NamedTuple):
    """`label` at place (`x`, `y`) of the grid, from the left and from below."""

    label: str
    x: float
    y: float
    kind: str = DATA


class Drawing(NamedTuple):
    """`parts` by name, and `arrows`, each from one name to another."""

    title: str
    parts: dict[str, Part]
    arrows: tuple[tuple[str, str], ...]


DRAWINGS = {
    "biases": Drawing(
        "BitFit: of a linear layer y = W·x + b, only b trains",
        {
            "x": Part("x\n(T, d_in)", 0, 0),
            "W": Part("W\n(d_out, d_in)", 1, 0, FROZEN),
            "+": Part("+", 2, 0, STEP),
            "b": Part("b\n(d_out)", 2, 1, TRAINED),
            "y": Part("y\n(T, d_out)", 3, 0),
        },
        (("x", "W"), ("W", "+"), ("b", "+"), ("+", "y")),
    ),
    "adapter": Drawing(
        "Adapter: a small network behind a sublayer, added to what flows past it",
        {
            "h": Part("h\n(T, d)", 0, 1),
            "f": Part("attention\nor MLP", 1, 1, FROZEN),
            "down": Part("W_down\n(m, d)", 1.5, 0, TRAINED),
            "σ": Part("σ", 2.25, 0, STEP),
            "up": Part("W_up\n(d, m)", 3, 0, TRAINED),
            "+": Part("+", 3.5, 1, STEP),
            "y": Part("to the next\nlayer (T, d)", 4.5, 1),
        },
        (("h", "f"), ("f", "+"), ("f", "down"), ("down", "σ"), ("σ", "up"), ("up", "+"), ("+", "y")),
    ),
    "prompt": Drawing(
        "Prompt tuning: n trained vectors stand before the words' own",
        {
            "P": Part("P\n(n, d)", 1, 1, TRAINED),
            "ids": Part("words\n(T)", 0, 0),
            "E": Part("E: words\nto vectors", 1, 0, FROZEN),
            "cat": Part("one\nafter other\n(n + T, d)", 2, 0.5),
            "f": Part("all layers", 3, 0.5, FROZEN),
            "y": Part("next words;\nno loss on\nthe first n", 4, 0.5),
        },
        (("ids", "E"), ("E", "cat"), ("P", "cat"), ("cat", "f"), ("f", "y")),
    ),
    "prefix": Drawing(
        "Prefix tuning: every layer's attention also reads n places that no text wrote",
        {
            "x": Part("x\n(T, d)", 0, 1),
            "W": Part("W_q, W_k, W_v", 1, 1, FROZEN),
            "Q": Part("Q\n(T, d)", 2, 2),
            "KV": Part("K, V\n(n + T, d)", 2, 1),
            "P": Part("P_k, P_v\n(n, d) each", 2, 0, TRAINED),
            "a": Part("softmax\n(Q·Kᵀ)·V", 3, 1.5, FROZEN),
            "y": Part("out\n(T, d)", 4, 1.5),
        },
        (("x", "W"), ("W", "Q"), ("W", "KV"), ("P", "KV"), ("Q", "a"), ("KV", "a"), ("a", "y")),
    ),
    "LoRA": Drawing(
        "LoRA: a product of two thin matrices beside the frozen weight",
        {
            "x": Part("x\n(T, d_in)", 0, 1),
            "W": Part("W\n(d_out, d_in)", 1.5, 1, FROZEN),
            "A": Part("A\n(r, d_in)", 1, 0, TRAINED),
            "B": Part("B\n(d_out, r)", 2, 0, TRAINED),
            "γ": Part("· γ", 3, 0, STEP),
            "+": Part("+", 3, 1, STEP),
            "y": Part("y\n(T, d_out)", 4, 1),
        },
        (("x", "W"), ("W", "+"), ("x", "A"), ("A", "B"), ("B", "γ"), ("γ", "+"), ("+", "y")),
    ),
    "DoRA": Drawing(
        "DoRA: LoRA turns the rows of W, and a trained vector m says how long they are",
        {
            "W": Part("W\n(d_out, d_in)", 0, 1, FROZEN),
            "BA": Part("γ·B·A\n(d_out, d_in)", 0, 0, TRAINED),
            "+": Part("+", 1, 0.5, STEP),
            "n": Part("each row\nover its length", 2, 0.5),
            "·": Part("·", 3, 0.5, STEP),
            "m": Part("m\n(d_out)", 3, 1.6, TRAINED),
            "y": Part("W'\n(d_out, d_in)", 4, 0.5),
        },
        (("W", "+"), ("BA", "+"), ("+", "n"), ("n", "·"), ("m", "·"), ("·", "y")),
    ),
    "QLoRA": Drawing(
        "QLoRA: the frozen weight is stored in four bits and made whole when it is needed",
        {
            "x": Part("x\n(T, d_in)", 0, 1),
            "q": Part("W in NF4\n0.5 byte a number", 1, 2, FROZEN),
            "W": Part("Ŵ, for one\nproduct only", 2, 2),
            "·": Part("Ŵ·x", 2, 1, STEP),
            "BA": Part("γ·B·A·x", 1.5, 0, TRAINED),
            "+": Part("+", 3, 1, STEP),
            "y": Part("y\n(T, d_out)", 4, 1),
        },
        (("q", "W"), ("W", "·"), ("x", "·"), ("x", "BA"), ("BA", "+"), ("·", "+"), ("+", "y")),
    ),
    "distillation": Drawing(
        "Distillation: the student learns the teacher's probabilities, not only the right word",
        {
            "x": Part("text", 0, 0.5),
            "t": Part("teacher", 1, 1, FROZEN),
            "s": Part("student:\nbase + adapter", 1, 0, TRAINED),
            "p": Part("softmax\n(logits / τ)", 2, 1),
            "q": Part("softmax\n(logits / τ)", 2, 0),
            "kl": Part("KL", 3, 0.5, STEP),
            "loss": Part("τ²·KL + loss\non the words", 4, 0.5),
        },
        (("x", "t"), ("x", "s"), ("t", "p"), ("s", "q"), ("p", "kl"), ("q", "kl"), ("kl", "loss")),
    ),
    "serving": Drawing(
        "Serving: one frozen product for all rows, and each row's own thin matrices",
        {
            "x": Part("rows of three\npeople", 0, 1),
            "W": Part("W, once\nfor all rows", 1.5, 2, FROZEN),
            "A": Part("A₁ A₂ A₃\none a row", 1, 0, TRAINED),
            "B": Part("B₁ B₂ B₃\none a row", 2, 0, TRAINED),
            "+": Part("+", 3, 1, STEP),
            "y": Part("three people's\nanswers", 4, 1),
        },
        (("x", "W"), ("x", "A"), ("A", "B"), ("W", "+"), ("B", "+"), ("+", "y")),
    ),
    "feedback": Drawing(
        "Preferences: a reward model learns to choose as you do",
        {
            "pairs": Part("your choices\nof two texts", 0, 1),
            "r": Part("reward model", 1, 1, TRAINED),
            "π": Part("writer:\nbase + adapter", 1, 0, TRAINED),
            "text": Part("its texts", 2, 0),
            "R": Part("reward\nof each", 2, 1),
            "base": Part("base", 3, 0, FROZEN),
            "g": Part("reward − β·KL\nto the base", 3, 1),
        },
        (("pairs", "r"), ("r", "R"), ("π", "text"), ("text", "R"), ("text", "base"), ("base", "g"), ("R", "g")),
    ),
    "sites": Drawing(
        "Federated training: the texts stay where they are, and only the adapters travel",
        {
            "server": Part("adapter\nof this round", 0, 1, TRAINED),
            "1": Part("base + adapter\non texts of site 1", 1.5, 2, TRAINED),
            "2": Part("base + adapter\non texts of site 2", 1.5, 1, TRAINED),
            "3": Part("base + adapter\non texts of site 3", 1.5, 0, TRAINED),
            "mean": Part("mean of what\nthey changed", 3, 1),
            "next": Part("adapter of the\nnext round", 4, 1, TRAINED),
        },
        (
            *(("server", site) for site in "123"),
            *((site, "mean") for site in "123"),
            ("mean", "next"),
        ),
    ),
}  # fmt: skip


def schematic(name: str) -> None:
    """Draws one of `DRAWINGS`. ValueError for a name that is none."""
    if name not in DRAWINGS:
        raise ValueError(f"There is no drawing of {name!r}; there are {', '.join(DRAWINGS)}.")
    draw(DRAWINGS[name])
    plt.show()


def draw(drawing: Drawing) -> plt.Figure:
    """The drawing as a figure, with a legend of the kinds that it holds; one unit of its axes is an inch."""
    parts = drawing.parts.values()
    wide, high = WIDE * (max(p.x for p in parts) + 1), HIGH * (max(p.y for p in parts) + 1)
    figure, axes = plt.subplots(figsize=(wide, high + 0.7))
    figure.subplots_adjust(0, 0.35 / (high + 0.7), 1, 1 - 0.35 / (high + 0.7))
    axes.set(xlim=(0, wide), ylim=(0, high))
    axes.set_axis_off()
    axes.set_title(drawing.title)
    shapes = {name: _shape(axes, part) for name, part in drawing.parts.items()}
    for begin, end in drawing.arrows:
        arrow = FancyArrowPatch(
            _place(drawing.parts[begin]), _place(drawing.parts[end]), patchA=shapes[begin], patchB=shapes[end],
            shrinkA=1, shrinkB=2, arrowstyle="-|>", mutation_scale=14, color="0.35", zorder=1,
        )  # fmt: skip
        axes.add_patch(arrow)
    kinds = [kind for kind in FACES if any(p.kind == kind for p in parts)]
    handles = [Patch(facecolor=FACES[kind], edgecolor="0.3", hatch=HATCHES[kind], label=kind) for kind in kinds]
    figure.legend(handles=handles, loc="lower center", ncols=2, frameon=False)
    return figure


def _place(part: Part) -> tuple[float, float]:
    return WIDE * (part.x + 0.5), HIGH * (part.y + 0.5)


def _shape(axes, part: Part) -> Patch:
    """The shape of a part, with its label in it."""
    x, y = _place(part)
    if part.kind == STEP:
        shape = Circle((x, y), 0.25, facecolor="white", edgecolor="0.3", zorder=2)
    else:
        round_by = 0.15 if part.kind == DATA else 0.03
        shape = FancyBboxPatch(
            (x - WIDTH / 2, y - HEIGHT / 2), WIDTH, HEIGHT, boxstyle=f"round,pad=0,rounding_size={round_by}",
            facecolor=FACES.get(part.kind, "white"), hatch=HATCHES.get(part.kind), edgecolor="0.3", zorder=2,
        )  # fmt: skip
    axes.add_patch(shape)
    behind = {"facecolor": FACES[FROZEN], "edgecolor": "none", "pad": 1} if part.kind == FROZEN else None
    axes.text(x, y, part.label, ha="center", va="center", color="black", zorder=3, bbox=behind)
    return shape
