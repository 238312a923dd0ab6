"""Assignment `lora`: eight pieces of LoRA, and a layer to repair."""

from __future__ import annotations

import math
from functools import partial
from random import Random

import torch

from minipeft.course.exercises.draw import holds, normal, sizes, stream, uniform
from minipeft.course.exercises.lora_repair import repair_cases
from minipeft.course.verdict import Case, Exercise, Raises


def scale_cases(rng: Random):
    # α = 16 at r = 4 shows every slip: γ is 4 or 8, and α·r, r², α and 1/γ are other numbers
    fixed, drawn = [(16, 4)] * 2, [(rng.choice([1, 6, 10, 14, 18, 0.5]), rng.choice([4, 8, 32, 48])) for _ in range(2)]
    for (alpha, rank), stable in zip(fixed + drawn, (False, True, False, True), strict=True):
        # γ = α/r,  or  γ = α/√r
        gamma, other = alpha / rank, alpha / math.sqrt(rank)
        right, left = (other, gamma) if stable else (gamma, other)
        yield Case(
            f"give γ = {'α/√r' if stable else 'α/r'} with rank_stabilized={stable}",
            (alpha, rank, stable),
            right,
            wrong={
                "γ is α itself: divide by the rank": lambda a=alpha: a,
                "α/r and α/√r changed places": lambda v=left: v,
                "the fraction is upside down": lambda v=right: 1 / v,
                "r² stands where √r belongs": lambda a=alpha, r=rank: a / r**2,
            },
        )


# init ----------------------------------------------------------------------------------------------------------------
def init_cases(rng: Random):
    for d_out, d_in, rank in (
        (130, 210, 60),
        (rng.randint(90, 120), rng.randint(130, 300), rng.randint(40, 64)),
        (1, 3, 1),
        (70, 70, 1),
        (40, 90, 150),
    ):
        args, bound = (d_out, d_in, rank, rng.randrange(10**6)), 1 / math.sqrt(d_in)

        def shapes(seen, d_out=d_out, d_in=d_in, rank=rank):
            found = tuple(tuple(t.shape) for t in seen["first"])
            if found == ((rank, d_in), (d_out, rank)):
                return None
            swapped = " It looks as if A and B changed places." if found == ((d_out, rank), (rank, d_in)) else ""
            return f"For d_out={d_out}, d_in={d_in}, rank={rank} the shapes are {found}.{swapped}"

        def zero(seen):
            A, B = seen["first"]
            if B.any():
                return (
                    f"{'Both are' if A.any() else 'B is'} random; then B·A is not zero, or A learns nothing at first."
                )

        yield Case("return A of shape (rank, d_in) and B of shape (d_out, rank)", args, judge=shapes)
        yield Case("start with B = 0, so that the model is unchanged", args, judge=zero)
        yield Case("draw A from U(−1/√d_in, 1/√d_in)", args, judge=partial(uniform, "A", bound))
        yield Case("take its random numbers from `generator`", args, judge=partial(stream, "A"))


# forward -------------------------------------------------------------------------------------------------------------
def forward_cases(rng: Random):
    for batch, dtype, biased in (
        ((4,), torch.float32, True),
        ((2, 3), torch.float64, True),
        ((), torch.float64, False),
        ((2, 1, 5), torch.float32, False),
    ):
        d_out, d_in, rank = sizes(rng)
        W, b = normal(rng, d_out, d_in, dtype=dtype), normal(rng, d_out, dtype=dtype) if biased else None
        A, B = normal(rng, rank, d_in, dtype=dtype), normal(rng, d_out, rank, dtype=dtype)
        x, gamma = normal(rng, *batch, d_in, dtype=dtype), round(rng.uniform(0.2, 3.0), 3)

        def out(W, x=x, b=b):
            # one output at a time: y_i = Σ_j W_ij x_j + b_i
            y = torch.stack([(x * row).sum(-1) for row in W], -1)
            return y if b is None else y + b

        change = torch.einsum("or,ri->oi", B, A)
        yield Case(
            f"give W·x{' + b' if biased else ''} + γ·B·A·x for x of shape {tuple(x.shape)} in {dtype}",
            (x, W, b, A, B, gamma),
            out(W + gamma * change),
            wrong={
                "γ was left out": lambda W=W, c=change, out=out: out(W + c),
                "γ scales the base as well": lambda W=W, c=change, g=gamma, out=out: out(g * (W + c)),
                "γ was divided by the rank once more": lambda W=W, c=change, g=gamma, r=rank, out=out: out(
                    W + g / r * c
                ),
                "only the change is returned: add W·x": lambda c=change, g=gamma, x=x: g * (x @ c.T),
                "the adapter is left out": lambda W=W, out=out: out(W),
                "the bias is left out": lambda W=W, c=change, g=gamma, x=x: x @ (W + g * c).T,
                "the bias is added twice": lambda W=W, c=change, g=gamma, out=out, b=b: (
                    out(W + g * c) if b is None else out(W + g * c) + b
                ),
            },
        )


# delta ---------------------------------------------------------------------------------------------------------------
def delta_cases(rng: Random):
    for dtype in (torch.float32, torch.float64, torch.float64):
        d_out, d_in, rank = sizes(rng)
        A, B = normal(rng, rank, d_in, dtype=dtype), normal(rng, d_out, rank, dtype=dtype)
        gamma = round(rng.uniform(0.2, 3.0), 3)
        # ΔW = γ·Σ_k b_k a_kᵀ: one outer product for each rank
        change = sum(torch.outer(B[:, k], A[k]) for k in range(rank))
        yield Case(
            f"be γ·B·A, of shape (d_out, d_in) = ({d_out}, {d_in})",
            (A, B, gamma),
            gamma * change,
            wrong={
                "γ was left out": lambda c=change: c,
                "it is transposed": lambda c=change, g=gamma: g * c.T,
                "γ is divided by the rank once more": lambda c=change, g=gamma, r=rank: g * c / r,
                "γ is applied twice": lambda c=change, g=gamma: g * g * c,
            },
        )


# count ---------------------------------------------------------------------------------------------------------------
def count_cases(rng: Random):
    lists = [[(5, 7)], [(4096, 4096)]] + [
        [(rng.randint(8, 5000), rng.randint(8, 5000)) for _ in range(n)] for n in (1, 4, 7)
    ]
    matrices = {1: "one matrix"}
    for shapes, rank in zip(lists, (3, 8, *(rng.randint(1, 7) for _ in range(3))), strict=True):
        # Σ r·(d_in + d_out)
        yield Case(
            f"count the numbers in A and B for {matrices.get(len(shapes), f'{len(shapes)} matrices')} at rank {rank}",
            (shapes, rank),
            sum(rank * d_out + rank * d_in for d_out, d_in in shapes),
            wrong={
                "it counts W, or ΔW, instead of A and B": lambda s=shapes: sum(o * i for o, i in s),
                "r multiplies d_out·d_in, but A has r·d_in numbers and B d_out·r": lambda s=shapes, r=rank: sum(
                    r * o * i for o, i in s
                ),
                "r multiplies d_out alone: A has r·d_in numbers, so put brackets around the sum": (
                    lambda s=shapes, r=rank: sum(r * o + i for o, i in s)
                ),
                "r multiplies d_in alone: B has d_out·r numbers, so put brackets around the sum": (
                    lambda s=shapes, r=rank: sum(o + r * i for o, i in s)
                ),
                "the rank is left out: A has r rows and B r columns": lambda s=shapes: sum(map(sum, s)),
                "only A is counted": lambda s=shapes, r=rank: sum(r * i for _, i in s),
                "only B is counted": lambda s=shapes, r=rank: sum(r * o for o, _ in s),
                "every matrix is taken for a square one": lambda s=shapes, r=rank: sum(2 * r * i for _, i in s),
                "only the first matrix is counted": lambda s=shapes, r=rank: r * sum(s[0]),
                "the frozen W is counted too": lambda s=shapes, r=rank: sum(o * i + r * (o + i) for o, i in s),
            },
        )


# merge, unmerge ------------------------------------------------------------------------------------------------------
def places(rng: Random):
    for dtype, conv1d, form in (
        (torch.float32, False, "oblong"),
        (torch.float64, True, "oblong"),
        (torch.bfloat16, False, "oblong"),
        (torch.float32, True, "square"),
        (torch.float16, True, "rank 1"),
        (torch.float64, False, "rank 1"),
        (torch.float32, False, "γ = 0"),
    ):
        d_out, d_in, rank = sizes(rng)
        d_in, rank = d_out if form == "square" else d_in, 1 if form == "rank 1" else rank
        W = normal(rng, *((d_in, d_out) if conv1d else (d_out, d_in)), dtype=dtype)
        wide = torch.promote_types(dtype, torch.float32)
        A, B = normal(rng, rank, d_in, dtype=wide), normal(rng, d_out, rank, dtype=wide)
        # the sum in at least float32, rounded once
        change = B @ A
        gamma = 0.0 if form == "γ = 0" else round(rng.uniform(0.2, 3.0), 3)
        yield dtype, conv1d, (W, normal(rng, d_out, dtype=dtype), A, B, gamma, conv1d), change


def merged(args: tuple, change: torch.Tensor, gamma: float | None = None, turn: bool = True) -> torch.Tensor:
    W, _, A, _, g, conv1d = args
    change = (g if gamma is None else gamma) * change
    return (W.to(A.dtype) + (change.T if conv1d and turn else change)).to(W.dtype)


def merge_cases(rng: Random):
    for dtype, conv1d, args, change in places(rng):
        W, what = args[0], "a Conv1D, whose weight is (d_in, d_out)" if conv1d else "a Linear"

        def judge(seen, args=args, change=change, W=W):
            return close(seen["merged"], merged(args, change), args, change)

        yield Case(f"make the weight W + γ·B·A in {what} in {dtype}", args, judge=judge)
        yield Case(
            "leave the tensor that was the weight as it was, since another model may share it",
            args,
            judge=lambda seen, W=W: (
                None if torch.equal(seen["old weight"], W) else "The old weight has changed: `+=` writes in place."
            ),
        )
        yield Case("put a new nn.Parameter into the layer, and touch nothing else of it", args, judge=holds)


def close(got: torch.Tensor, want: torch.Tensor, args: tuple, change: torch.Tensor) -> str | None:
    """None, or what is wrong with a merged weight. In bfloat16 a float32 sum may round the last bit either way."""
    if got.shape != want.shape:
        return f"The new weight has shape {tuple(got.shape)} instead of {tuple(want.shape)}."
    if got.dtype != want.dtype:
        return f"The new weight is {got.dtype}; the layer was {want.dtype}."
    difference = (got.double() - want.double()).abs()
    if want.dtype in (torch.bfloat16, torch.float16):
        if (share := (difference > 0).double().mean().item()) > 0.02:
            return f"{share:.0%} of the numbers are rounded differently: add in float32, then round once."
        return None
    if difference.max() <= (1e-5 if want.dtype == torch.float32 else 1e-10) * want.abs().max():
        return None
    W = args[0]
    known = {
        "The weight is unchanged: was the new one put into the layer?": W,
        "γ was left out.": merged(args, change, 1.0),
        "The change was subtracted.": merged(args, -change),
    }
    said = [text for text, value in known.items() if torch.allclose(got.double(), value.double(), atol=1e-4)]
    return f"{' '.join(said)} The largest difference from W + γ·B·A is {difference.max().item():.3g}.".strip()


def unmerge_cases(rng: Random):
    for dtype, _, args, change in places(rng):
        W = args[0]

        def judge(seen, W=W, args=args, change=change):
            for i in (1, 2):
                if said := close(seen[f"merged {i}"], merged(args, change), args, change):
                    return f"merge, called for the {('first', 'second')[i - 1]} time: {said}"
                if not torch.equal(seen[f"restored {i}"], W):
                    largest = (seen[f"restored {i}"].double() - W.double()).abs().max().item()
                    return f"The weight differs by up to {largest:.1e}. Subtracting ΔW rounds: keep the old one."

        yield Case(f"give back the {dtype} weight bit for bit, as often as one likes", args, judge=judge)
        yield Case("serve several layers at once, and keep what was trainable", args, judge=holds)


# freeze --------------------------------------------------------------------------------------------------------------
PLAIN = (
    "embed_A.weight",
    "Attention.q_proj.weight",
    "Block.0.mlp.B.weight",
    "layers.0.attn.q_proj.weight",
    "layers.0.attn.q_proj.bias",
    "layers.1.lora_A.scale",
    "layers.1.explora_A",
    "lora_B_head.weight",
    "A",
)
ADAPTERS = ("layers.0.attn.q_proj.lora_A", "layers.0.attn.q_proj.lora_B", "layers.3.mlp.up.lora_A", "lora_B")


def freeze_cases(rng: Random):
    for i in range(5):
        found = rng.sample(ADAPTERS, rng.randint(2, len(ADAPTERS))) if i else []
        names = rng.sample(PLAIN, rng.randint(4, len(PLAIN))) + found
        rng.shuffle(names)
        order = [name for name in parameter_order(names)]
        flags = [rng.random() < 0.5 for _ in names]
        chosen = [name for name in order if name.split(".")[-1] in ("lora_A", "lora_B")]
        count = sum(names.index(name) + 1 for name in chosen)

        def judge(seen, chosen=chosen, count=count, names=names):
            missing = [n for n in chosen if n not in seen["trainable"]]
            extra = [n for n in seen["trainable"] if n not in chosen]
            if chosen and not seen["trainable"]:
                return "Nothing trains. (A parameter has no attribute A: its *name* says what it is.)"
            if extra:
                return f"{extra[0]!r} trains, but is no lora_A or lora_B: look at the last part of the name only."
            if missing:
                return f"{missing[0]!r} does not train: set requires_grad to True as well as to False."
            if not seen["values kept"]:
                return "It changes the parameters' values."
            if seen["returned"] != count or isinstance(seen["returned"], bool):
                return f"It returns {seen['returned']!r}; {count} numbers train (parameters have several numbers)."
            return holds(seen)

        yield Case(
            "let lora_A and lora_B train, nothing else, and return how many numbers that is",
            (names, flags),
            judge=judge,
        )


def parameter_order(names: list[str]) -> list[str]:
    from minipeft.course.drives.lora import tree

    return [name for name, _ in tree(names).named_parameters()]


# targets -------------------------------------------------------------------------------------------------------------
PATHS = [
    *(f"model.layers.{i}.self_attn.{p}" for i in (0, 1, 10) for p in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"model.layers.{i}.mlp.{p}" for i in (0, 1, 10) for p in ("up_proj", "down_proj", "xq_proj")),
    "lm_head",
    "q_proj",
]


def target_cases(rng: Random):
    for _ in range(3):
        names = rng.sample(PATHS, len(PATHS))
        for patterns in (
            ["q_proj"],
            rng.sample(["self_attn.v_proj", "mlp.up_proj", "lm_head", "k_proj"], 3),
            ["layers.1.mlp.down_proj", "o_proj"],
        ):
            right = [n for n in names if any(("." + n).endswith("." + p) for p in patterns)]
            yield Case(
                f"find the modules that end in {patterns}, in the order of the names",
                (names, patterns),
                right,
                wrong={
                    "it matches in the middle of a word: 'xq_proj' is not 'q_proj'": lambda n=names, p=patterns: [
                        x for x in n if any(x.endswith(s) for s in p)
                    ],
                    "it matches anywhere in the path": lambda n=names, p=patterns: [
                        x for x in n if any(s in x for s in p)
                    ],
                    "only the last part of the path is compared": lambda n=names, p=patterns: [
                        x for x in n if x.split(".")[-1] in p
                    ],
                    "the order is the patterns', not the names'": lambda n=names, p=patterns: [
                        x for s in p for x in n if ("." + x).endswith("." + s)
                    ],
                    "the names are sorted": lambda v=right: sorted(v),
                    "a match stands there twice": lambda v=right: [x for x in v for _ in (0, 1)],
                },
            )
        typo = rng.choice(["qproj", "q_prjo", "attn.q"])
        yield Case(
            "raise a ValueError that names the pattern that matches nothing, even beside a good one",
            (names, ["v_proj", typo]),
            Raises("ValueError", (typo,)),
        )
    yield Case("raise a ValueError for an empty list of patterns", (PATHS, []), Raises("ValueError"))


# find the bug --------------------------------------------------------------------------------------------------------
EXERCISES = (
    Exercise(
        "lora_scale", "The scale γ", scale_cases,
        (
            "Two formulas: the flag says which. The task gives both results for α = 16 and r = 4.",
            "`math.sqrt` gives √r. Only what α is divided by depends on the flag.",
        ),
        ("lora_scale",),
    ),
    Exercise(
        "init_lora", "The start: A random, B zero", init_cases,
        (
            "`torch.rand(rank, d_in, generator=generator)` is uniform on [0, 1). Stretch and shift it.",
            "Stretch by the length of the interval, 2/√d_in, then move its left end to −1/√d_in. B needs no random "
            "number.",
        ),
        ("init_lora",), "lora.initialise",
    ),
    Exercise(
        "lora_forward", "The forward pass", forward_cases,
        (
            "Never form B·A: send x through A first, to r numbers, then through B.",
            "`F.linear(x, M)` is x·Mᵀ, with any number of axes, and takes a bias that is None. Which of A and B does "
            "x meet first?",
        ),
        ("lora_forward",),
    ),
    Exercise(
        "lora_delta", "The change of the weight", delta_cases,
        (
            "It has the shape of W: (d_out, d_in).",
            "An (a, b) matrix times a (b, c) matrix is (a, c). Which order of A and B puts d_out first and d_in last?",
        ),
        ("lora_delta",),
    ),
    Exercise(
        "count_lora", "How many numbers train", count_cases,
        (
            "Count A and B of one matrix first.",
            "One matrix of (4, 6) at rank 2: A is (2, 6) and B is (4, 2), 12 + 8 numbers. Write this with letters.",
        ),
        ("count_lora",),
    ),
    Exercise(
        "merge", "Merging", merge_cases,
        (
            "Put a new tensor into the layer as a new `nn.Parameter`; `flipped(layer)` says if it is a Conv1D.",
            "Bring W to A's type before the sum, and go back after it. Turn ΔW, not W, where the layer is flipped.",
        ),
        ("merge",), "lora.merge",
    ),
    Exercise(
        "unmerge", "Unmerging", unmerge_cases,
        (
            "What merge returned is handed to you as `receipt`: the numbers that were there need not be computed "
            "again.",
            "A tensor that nobody wrote into still has every bit. If merge returned the old parameter, where does it "
            "belong?",
        ),
        ("merge", "unmerge"), "lora.unmerge",
    ),
    Exercise(
        "freeze", "Freezing", freeze_cases,
        (
            "`for name, parameter in model.named_parameters()` gives dotted names.",
            "`'layers.0.attn.lora_A'.split('.')` gives the parts: compare the last one as a whole, and set the flag "
            "both ways.",
        ),
        ("freeze",), "lora.freeze",
    ),
    Exercise(
        "find_targets", "Targets", target_cases,
        (
            "A match may begin only at a dot, or at the start of the name.",
            "With a dot before both the name and the pattern, `endswith` is safe. Collect what matched nothing "
            "before you answer.",
        ),
        ("find_targets",),
    ),
    Exercise(
        "RepairedLoRA", "Find the bug", repair_cases,
        (
            "There are four faults: the start, the scale, what trains, and what stays frozen.",
            "Four questions: what comes out before training? Is α divided? Who is caught by a letter in its name? "
            "Who stops W?",
        ),
        ("RepairedLoRA",), "lora.adapted_layer",
    ),
)  # fmt: skip
