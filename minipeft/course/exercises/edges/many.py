"""A large case of each exercise: hundreds of rows, names, layers, values; or why there is none."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import torch

from minipeft.course.exercises.draw import normal, orthonormal, whole
from minipeft.course.exercises.prefixes_repair import decoder

DOUBLE = torch.float64
NUMBERS = "it takes a few numbers"
DRAWN = "what it draws is judged by its own cases, which are large"


def double(rng: Random, *shape: int) -> torch.Tensor:
    return normal(rng, *shape, dtype=DOUBLE)


def drawn(rng: Random, below: int, *shape: int) -> torch.Tensor:
    """Whole numbers from 0 to below − 1."""
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    return torch.randint(below, shape, generator=generator)


def names(number: int) -> list[str]:
    """Names whose order is not that of the alphabet."""
    return [f"layers.{(7 * i) % number}.{'zqa'[i % 3]}_proj" for i in range(number)]


def shapes(rng: Random) -> list[tuple[int, int]]:
    return [(rng.randint(1, 90), rng.randint(1, 90)) for _ in range(300)]


def pairs(rng: Random) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(double(rng, 12, 9), double(rng, 7, 12)) for _ in range(20)]


def layered(rng: Random) -> tuple:
    """Weight, bias and x of a layer, for which a rank of 17 is small."""
    return normal(rng, 30, 40), normal(rng, 30), normal(rng, 130, 40)


# prompts and prefixes ------------------------------------------------------------------------------------------------
def texts(rng: Random, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask and positions of texts that are padded on the left."""
    empty = drawn(rng, length - 2, rows, 1)
    places = torch.arange(length) - empty
    return (places >= 0).long(), places.clamp(min=0)


def verbalizer(rng: Random) -> tuple:
    return double(rng, 70, 300).log_softmax(-1), {f"{'zam'[i % 3]}{i}": list(range(i, 300, 13)) for i in range(12)}


def labels(rng: Random) -> torch.Tensor:
    """Those of 20 texts of at most 30 tokens, of nine words."""
    return drawn(rng, 9, 20, 30).masked_fill(texts(rng, 20, 30)[0] == 0, -100)


def before_texts(rng: Random) -> tuple:
    rows, n, length, d = 70, 20, 30, 3
    given = texts(rng, rows, length)[0], drawn(rng, 99, rows, length), whole(rng, rows, n + length, d)
    return normal(rng, n, d), normal(rng, rows, length, d), *given


def soft_prompt(rng: Random) -> tuple:
    words, n, rows, length, d = 30, 12, 20, 18, 5
    ids, positions = drawn(rng, words, rows, length), torch.arange(length).expand(rows, -1).clone()
    table, places, prompt = double(rng, words, d), double(rng, n + length, d), double(rng, n, d)
    return table, places, prompt, table[ids], torch.ones_like(ids), positions, ids


def split(rng: Random) -> tuple:
    layers, kv_heads, n, w, rows = 20, 3, 12, 2, 10
    named = {f"{kind} of layer {i}": whole(rng, rows, kv_heads, n, w) for i in range(layers) for kind in "KV"}
    return normal(rng, n, layers * 2 * kv_heads * w), layers, kv_heads, rows, named


def attention(rng: Random) -> tuple:
    rows, heads, kv_heads, n, length, w = 2, 10, 5, 10, 12, 3
    own = [double(rng, rows, kv_heads, m, w) for m in (length, length, n, n)]
    q = double(rng, rows, heads, length, w)
    return q, *own, texts(rng, rows, length)[0], whole(rng, *q.shape)


def prefix(rng: Random) -> tuple:
    layers, n, rows, length, words = 15, 12, 5, 18, 20
    model = decoder(rng, layers, 4, 2, 2, words, n + length)
    mask, positions = texts(rng, rows, length)
    tensors = 0.1 * double(rng, n, layers * 8), drawn(rng, words, rows, length), mask, positions
    return model.embed, model.places, model.maps, 2, *tensors, whole(rng, rows, length, words)


# models of many parts ------------------------------------------------------------------------------------------------
def parts(rng: Random) -> tuple[list, list, list]:
    kinds, types = ("frozen", "trains", "still"), ("float32", "bfloat16", "float64", "float16")
    named = [(f"a.b.{i}.c.d.w", (i % 7 + 1, 3), types[i % 4], kinds[i % 3]) for i in range(120)]
    ties = [("head.weight", named[3][0])]
    return named, ties, [(f"a.b.{i}.c.e.f.table", (4,), types[i % 4], bool(i % 2)) for i in range(40)]


def adam(rng: Random) -> tuple:
    sizes = [(i % 5 + 1, 3) for i in range(12)]
    masks = [drawn(rng, 2, *size).bool() for size in sizes]
    steps = [[double(rng, *size) for size in sizes] for _ in range(12)]
    return [double(rng, *size) for size in sizes], masks, steps, {"lr": 0.02, "weight_decay": 0.1}


# the others ----------------------------------------------------------------------------------------------------------
def adapters(rng: Random, rank: int = 3) -> tuple[list, list, list]:
    """A, B and γ of twenty adapters."""
    ranks = [i % rank + 1 for i in range(20)]
    return [double(rng, r, 4) for r in ranks], [double(rng, 5, r) for r in ranks], [i / 4 - 2 for i in range(20)]


def rows(rng: Random) -> tuple:
    own = [None if i % 7 == 3 else rng.randrange(20) for i in range(90)]
    return double(rng, 90, 2, 4), *adapters(rng), own


def beams(rng: Random) -> tuple:
    return double(rng, 20 * 7, 4), double(rng, 15, 2, 4), double(rng, 15, 5, 2), drawn(rng, 16, 20) - 1, 7


def requests(rng: Random) -> tuple:
    return [(f"{'zam'[i % 3]}{i}", 5 + i) for i in (rng.randrange(60) for _ in range(400))], 900


def policy(rng: Random) -> tuple:
    own = (double(rng, 20, 40) > 0).double()
    return *(0.3 * double(rng, 20, 40) - 2 for _ in range(3)), own, double(rng, 20), 0.2, 0.3


def subtasks(rng: Random) -> tuple:
    base = {name: double(rng, 2, 2) for name in names(30)}
    deltas = {f"{'zam'[i % 3]}{i}": {name: double(rng, 2, 2) for name in rng.sample(list(base), 9)} for i in range(20)}
    return base, deltas, {name: rng.uniform(-2, 3) for name in list(deltas)[1:]}


def clients(rng: Random) -> tuple:
    updates = {f"{'zam'[i % 3]}{i}": double(rng, 3, 2) for i in range(40)}
    for name in list(updates)[5::6]:
        updates[name][2, 1] = torch.nan
    return updates, {name: rng.randint(1, 99) for name in reversed(updates)}


def grid(rng: Random) -> tuple:
    """Rates of which the twelfth is the best, by its later runs."""
    losses = {10.0**i: [rng.uniform(1.4, 1.6) for _ in range(12)] for i in range(-9, 12)}
    return (losses | {100.0: [2.5] * 6 + [0.1] * 6},)


def unsure(rng: Random) -> tuple:
    """Probabilities that are too low where they are low, and too high where they are high; and the truth."""
    P = (2 * double(rng, 400, 5)).softmax(-1)
    return P, torch.where(torch.arange(400) % 3 > 0, P.argmax(-1), drawn(rng, 5, 400)), 40


def methods(rng: Random) -> tuple:
    scores = {f"m{i}": [0.8 + 0.1 * (i == 7) + rng.uniform(-0.01, 0.01) for _ in range(12)] for i in range(25)}
    scores["m23"] = [score - 0.001 for score in scores["m7"]]
    return scores, {name: 50.0 - i for i, name in enumerate(scores)}, 0.02, 2.2


def looks(rng: Random) -> list[float]:
    return [10 - i / 60 + rng.uniform(0, 0.5) for i in range(400)]


def keep(rng: Random) -> tuple:
    layers = {name: tuple(double(rng, *s).abs() for s in ((4, 6), (6,), (6, 5))) for name in names(40)}
    return layers, 90


def layer_of(rng: Random) -> tuple:
    """x, W and b in float64."""
    return tuple(double(rng, *shape) for shape in ((130, 40), (30, 40), (30,)))


MANY: dict[str, str | tuple[str, Callable[[Random], tuple]]] = {
    "lora_scale": NUMBERS,
    "init_lora": DRAWN,
    "lora_forward": ("rows at a high rank", lambda r: (*layer_of(r), double(r, 17, 40), double(r, 30, 17), 0.5)),
    "lora_delta": ("ranks", lambda r: (double(r, 70, 90), double(r, 80, 70), 0.5)),
    "count_lora": ("matrices", lambda r: (shapes(r), 17)),
    "merge": ("ranks", lambda r: (*layered(r)[:2], normal(r, 17, 40), normal(r, 30, 17), 0.5, False)),
    "unmerge": ("ranks", lambda r: (*layered(r)[:2], normal(r, 17, 40), normal(r, 30, 17), 0.5, False)),
    "freeze": ("names", lambda r: ([f"a.{i}.b.c.lora_{'ABC'[i % 3]}" for i in range(300)], [True, False, True] * 100)),
    "find_targets": ("names and patterns", lambda r: (names(300), [f"{i}.q_proj" for i in range(1, 250, 9)])),
    "RepairedLoRA": (
        "rows at a high rank",
        lambda r: (*layered(r), 17, 8.0, normal(r, 17, 40), normal(r, 30, 17), 5),
    ),
    "bottleneck": (
        "rows and a wide bottleneck",
        lambda r: tuple(double(r, *s) for s in ((130, 9), (70, 9), (70,), (9, 70), (9,))),
    ),
    "count_adapters": NUMBERS,
    "init_adapter": DRAWN,
    "route": ("tokens and experts", lambda r: (double(r, 130, 40), 17)),
    "RepairedAdapter": (
        "rows and a wide bottleneck",
        lambda r: (*layered(r), 17, [normal(r, *s) for s in ((17, 30), (17,), (30, 17), (30,))], 5),
    ),
    "bitfit_names": ("blocks", lambda r: ("deep", 3, 5)),
    "tune_softmax": ("words", lambda r: (normal(r, 300, 20), None, drawn(r, 300, 60), 5, False)),
    "magnitude_mask": ("tensors", lambda r: ({name: double(r, 20, 30) for name in names(40)}, 0.37)),
    "fisher_importance": (
        "examples", lambda r: ([double(r, 12, 10), double(r, 9, 12)], double(r, 40, 10), drawn(r, 9, 40)),
    ),
    "MaskedAdamW": ("tensors and steps", adam),
    "layer_range": ("layers", lambda r: (names(300), 95, 205)),
    "bits_per_parameter": ("numbers in a block", lambda r: (4096, 1000)),
    "quantise_blocks": ("blocks", lambda r: (double(r, 70, 60), torch.linspace(-1, 1, 9, dtype=DOUBLE) ** 3, 8)),
    "pack_nibbles": ("codes", lambda r: (drawn(r, 16, 777).byte(),)),
    "unpack_nibbles": ("bytes", lambda r: (drawn(r, 256, 400).byte(), 799)),
    "dequantise": (
        "blocks",
        lambda r: (drawn(r, 9, 4200).byte(), torch.linspace(-1, 1, 9, dtype=DOUBLE), double(r, 525).abs(), 8, (70, 60)),
    ),
    "RepairedQuantisedLinear": "its drive weighs what a layer holds, and its edges have a large one",
    "dora_weight": ("ranks", lambda r: (*(double(r, *s) for s in ((50, 60), (40, 60), (50, 40), (50,))), 0.5)),
    "vera_delta": ("ranks", lambda r: tuple(double(r, *s) for s in ((130, 9), (7, 130), (130,), (7,)))),
    "adalora_budget": ("steps", lambda r: (4321, 10_000, 1000, 2000, 5000, 1234)),
    "adalora_keep": ("layers", keep),
    "RepairedDoRA": (
        "rows at a high rank",
        lambda r: (*layered(r), 17, 0.7, normal(r, 17, 40), normal(r, 30, 17), normal(r, 30), 5),
    ),
    "fill_template": ("places", lambda r: ("a {text} {b}" * 40, "some text")),
    "score_verbalizer": ("rows, classes and words", verbalizer),
    "prepend": ("rows and places", before_texts),
    "init_from_vocabulary": DRAWN,
    "nearest_words": ("vectors and words", lambda r: (double(r, 70, 16), double(r, 300, 16), 40)),
    "repaired_prompt": ("texts and places", soft_prompt),
    "count_prefix": NUMBERS,
    "split_prefix": ("layers and texts", split),
    "attend": ("heads, tokens and places", attention),
    "prefix_share": (
        "texts, heads and places",
        lambda r: (double(r, 40, 12, 30, 42).softmax(-1), 12, texts(r, 40, 30)[0]),
    ),
    "fold_prefix": ("places", lambda r: tuple(double(r, *s) for s in ((40, 20), (30, 20), (30,), (60, 30), (60,)))),
    "repaired_prefix": ("layers, texts and places", prefix),
    "target_shapes": (
        "layers",
        lambda r: ([(f"m.h.{i}.x.y.{'zqa'[i % 3]}", "linear", i + 1, 3) for i in range(300)], ["q", "a"]),
    ),
    "count_trainable": ("layers", lambda r: ("dora", shapes(r), 17)),
    "training_bytes": NUMBERS,
    "step_multiply_adds": ("layers", lambda r: (shapes(r), 17, 999)),
    "largest_rank": ("layers", lambda r: (1000, shapes(r), 10**8, 2)),
    "kept_bytes": ("tensors", lambda r: (*parts(r), "Adam", {"lr": 0.1})),
    "repaired_memory": ("tensors", parts),
    "truncate": ("directions", lambda r: (double(r, 40, 50), 25)),
    "effective_rank": ("values", lambda r: (double(r, 300).abs(),)),
    "stable_rank": ("directions", lambda r: (double(r, 60, 50),)),
    "factor_spectrum": ("directions", lambda r: (double(r, 60, 25), double(r, 25, 50), 1)),
    "subspace_similarity": ("directions", lambda r: (orthonormal(r, 60, 25), orthonormal(r, 60, 30))),
    "equivalent_settings": NUMBERS,
    "repaired_comparison": ("directions", lambda r: (double(r, 40, 30), double(r, 40, 30), 20)),
    "soft_loss": ("rows and classes", lambda r: (double(r, 130, 300), double(r, 130, 300), 1.5)),
    "masked_soft_loss": ("texts and places", lambda r: (double(r, 20, 30, 9), double(r, 20, 30, 9), labels(r), 1.5)),
    "teach_itself": (
        "rows",
        lambda r: (normal(r, 9, 12), normal(r, 4, 12), normal(r, 9, 4), normal(r, 130, 12), 1.5, 0.0, True, 5),
    ),
    "fgm_gradients": (
        "texts",
        lambda r: (double(r, 60, 5), double(r, 9, 5), drawn(r, 60, 40, 20), drawn(r, 9, 40), 0.7, 1.0),
    ),
    "mixed_loss": ("rows and classes", lambda r: (double(r, 130, 30), double(r, 130, 30), drawn(r, 30, 130), 1.5, 0.3)),
    "mixed_rows": ("rows and adapters", rows),
    "concatenated": ("adapters", lambda r: (*adapters(r), [i / 8 - 1 for i in range(20)])),
    "elected": ("changes", lambda r: (double(r, 40, 5, 6),)),
    "least_recent": ("requests and names", requests),
    "repaired_rows": ("rows, beams and adapters", beams),
    "preference_loss": ("pairs", lambda r: (double(r, 300), double(r, 300))),
    "leave_one_out": ("groups and texts", lambda r: (double(r, 40, 30),)),
    "priced_reward": (
        "texts and tokens",
        lambda r: (double(r, 70), double(r, 70, 90), double(r, 70, 90), texts(r, 70, 90)[0].double(), 0.3),
    ),
    "group_relative_loss": ("texts and tokens", policy),
    "integrate": ("subtasks and weights", subtasks),
    "own_tokens": ("texts and tokens", lambda r: (drawn(r, 60, 70, 130), 2)),
    "average_factors": ("clients", lambda r: (pairs(r), [r.randint(1, 99) for _ in range(20)])),
    "average_product": ("clients", lambda r: (pairs(r), [r.randint(1, 999_999) for _ in range(20)])),
    "cut_back": ("directions", lambda r: (double(r, 40, 50), 25)),
    "stack": ("clients", lambda r: (pairs(r), [r.randint(1, 99) for _ in range(20)])),
    "page_hinkley": ("values", lambda r: ([i // 40 % 3 + r.uniform(0, 0.5) for i in range(600)], 0.05, 2.0, 5)),
    "robust_average": ("clients", clients),
    "macro_f1": (
        "rows and classes",
        lambda r: ([r.randrange(30) for _ in range(500)], [r.randrange(30) for _ in range(500)], 30),
    ),
    "calibration_error": ("rows and bins", unsure),
    "stop_early": ("looks", lambda r: (looks(r), 100)),
    "choose_rate": ("rates and seeds", grid),
    "recipe": "it is trained in its drive, on pictures",
    "cheapest_alike": ("methods and seeds", methods),
}  # fmt: skip
