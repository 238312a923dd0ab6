"""Assignment `adapters`: a bottleneck, its start and its cost, a router for several, and a layer to repair."""

from __future__ import annotations

import math
from functools import partial
from random import Random

import torch

from minipeft.course.exercises.draw import holds, normal, stream, uniform
from minipeft.course.verdict import Case, Exercise


def sizes(rng: Random) -> tuple[int, int]:
    """A width and a bottleneck below it."""
    width = rng.randint(6, 20)
    return width, rng.randint(3, width - 1)


def halves(rng: Random, width: int, bottleneck: int, dtype=torch.float32) -> tuple[torch.Tensor, ...]:
    """down_w (m, d), down_b (m,), up_w (d, m), up_b (d,), all random."""
    shapes = ((bottleneck, width), (bottleneck,), (width, bottleneck), (width,))
    return tuple(normal(rng, *shape, dtype=dtype) for shape in shapes)


# forward -------------------------------------------------------------------------------------------------------------
def relu(v: torch.Tensor) -> torch.Tensor:
    return torch.where(v > 0, v, torch.zeros_like(v))


def map_by_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """One output at a time: y_i = Σ_j W_ij x_j + b_i."""
    return torch.stack([(x * row).sum(-1) + b for row, b in zip(weight, bias, strict=True)], -1)


def bottleneck_cases(rng: Random):
    for batch, dtype in (
        ((4,), torch.float32),
        ((2, 3), torch.float64),
        ((), torch.float64),
        ((2, 1, 5), torch.float32),
    ):
        width, m = sizes(rng)
        down_w, down_b, up_w, up_b = halves(rng, width, m, dtype)
        x = normal(rng, *batch, width, dtype=dtype)

        def out(
            inner=relu,
            outer=lambda v: v,
            last=lambda v: v,
            skip=1,
            b=1,
            c=1,
            x=x,
            parts=(down_w, down_b, up_w, up_b),
        ):
            """The adapter, and what it becomes when its pieces are moved or left out."""
            low = map_by_rows(x, parts[0], b * parts[1])
            return last(skip * x + outer(map_by_rows(inner(low), parts[2], c * parts[3])))

        def first(x=x, parts=(down_w, down_b, up_w, up_b)):
            return x + map_by_rows(map_by_rows(relu(x), *parts[:2]), *parts[2:])

        def plain(v):
            return v

        yield Case(
            f"give x + up(ReLU(down(x))) for x of shape {tuple(x.shape)} in {dtype}",
            (x, down_w, down_b, up_w, up_b),
            out(),
            wrong={
                "the residual is missing: add x": lambda out=out: out(skip=0),
                "the activation stands after the up projection": lambda out=out, plain=plain: out(plain, relu),
                "the activation takes the sum with x": lambda out=out, plain=plain: out(plain, last=relu),
                "an activation too many follows the sum": lambda out=out: out(last=relu),
                "the activation stands before the down projection": first,
                "there is no activation, so both halves are one matrix of low rank": lambda out=out, plain=plain: out(
                    plain
                ),
                "the activation is not ReLU": lambda out=out: out(torch.nn.functional.gelu),
                "the bias of the down projection is left out": lambda out=out: out(b=0),
                "the bias of the up projection is left out": lambda out=out: out(c=0),
                "both biases are left out": lambda out=out: out(b=0, c=0),
                "x is added twice": lambda out=out: out(skip=2),
            },
        )


# count ---------------------------------------------------------------------------------------------------------------
def count_cases(rng: Random):
    fixed = [(24, 1024, 64, 2, 1), (24, 1024, 64, 1, 1), (12, 768, 48, 2, 3), (7, 96, 8, 2, 3), (13, 60, 5, 2, 4)]
    drawn = []
    for per_block in (1, 2):
        share = rng.randint(3, 6)
        layers = share * rng.randint(2, 5) + rng.randint(1, share - 1)
        drawn.append((layers, rng.randint(40, 900), rng.randint(3, 32), per_block, share))
    for layers, d, m, per_block, share in fixed + drawn:
        # one adapter: down (m, d) and m biases, up (d, m) and d biases
        one = m * d + m + d * m + d
        groups = sum(1 for block in range(layers) if block % share == 0)
        n = per_block

        def times(number, one=one):
            return lambda: number * one

        def each(numbers, count=n * groups):
            return lambda: count * numbers

        where = "attention and feed-forward part" if n == 2 else "the feed-forward part"
        shared = f", each shared by {share} blocks" if share > 1 else ""
        yield Case(
            f"count the adapters after {where} of {layers} blocks (d = {d}, m = {m}){shared}",
            (layers, d, m, n, share),
            n * groups * one,
            wrong={
                "the biases are left out": each(2 * d * m),
                "the bias of the down projection, of size m, is left out": each(2 * d * m + d),
                "the bias of the up projection, of size d, is left out": each(2 * d * m + m),
                "both biases are taken for d numbers": each(2 * d * m + 2 * d),
                "only one of the two halves is counted": each(d * m + m + d),
                "sharing is left out": times(n * layers),
                "the last, smaller group of blocks has no adapter: round up": times(n * (layers // share)),
                "the number of groups is not a whole number: round up": lambda v=n * layers / share * one: v,
                "places are shared instead of blocks: round up first, then multiply by per_block": times(
                    math.ceil(n * layers / share)
                ),
                "there is always one adapter more than needed": times(n * (layers // share + 1)),
                "per_block is left out": times(groups),
                "only one block is counted": times(n),
                "sharing multiplies instead of dividing": times(n * layers * share),
            },
        )


# init ----------------------------------------------------------------------------------------------------------------
PARTS = ("down_w", "down_b", "up_w", "up_b")


def init_cases(rng: Random):
    for width, m in ((210, 60), (rng.randint(130, 300), rng.randint(40, 64)), (5, 1), (1, 1), (60, 60)):
        args, bound = (width, m, rng.randrange(10**6)), 1 / math.sqrt(width)

        def shapes(seen, width=width, m=m):
            found = [tuple(t.shape) for t in seen["first"]]
            if found != [(m, width), (m,), (width, m), (width,)]:
                swapped = " Did the two halves change places?" if found[0] == (width, m) else ""
                said = ", ".join(f"{n} {s}" for n, s in zip(PARTS, found, strict=False))
                return f"For width {width} and bottleneck {m} the shapes are {said}.{swapped}"

        def identity(seen, rng_seed=args[2]):
            down_w, down_b, up_w, up_b = (t.double() for t in seen["first"])
            x = torch.randn(5, down_w.shape[1], generator=torch.Generator().manual_seed(rng_seed), dtype=torch.float64)
            moved = map_by_rows(relu(map_by_rows(x, down_w, down_b)), up_w, up_b).abs().max().item()
            if moved or up_w.any() or up_b.any():
                which = "up_w" if up_w.any() else "up_b"
                return f"{which} is not zero: before training the adapter changes x by up to {moved:.2g}."

        def alive(seen):
            down_w, down_b = seen["first"][:2]
            if not down_w.any():
                return "down_w is zero too: then ReLU gives zero, up_w gets no gradient, and only up_b ever learns."
            if down_b.any():
                return "down_b is not zero."

        yield Case("return down_w (m, d), down_b (m,), up_w (d, m) and up_b (d,)", args, judge=shapes)
        yield Case("be the identity before training", args, judge=identity)
        yield Case("be able to learn: down_w random, down_b zero", args, judge=alive)
        yield Case("draw down_w from U(−1/√width, 1/√width)", args, judge=partial(uniform, "down_w", bound))
        yield Case("take its random numbers from `generator`", args, judge=partial(stream, "down_w"))


# router --------------------------------------------------------------------------------------------------------------
def by_rows(function, logits: torch.Tensor) -> torch.Tensor:
    """`function` maps a list of E numbers to a list of E numbers; it is called for each row."""
    rows = [function(row) for row in logits.double().reshape(-1, logits.shape[-1]).tolist()]
    return torch.tensor(rows, dtype=torch.float64).reshape(logits.shape).to(logits.dtype)


def exps(row: list[float], places) -> list[float]:
    """The softmax of the numbers at these places, and 0 elsewhere."""
    top = max(row[i] for i in places)
    total = sum(math.exp(row[i] - top) for i in places)
    return [math.exp(v - top) / total if i in places else 0.0 for i, v in enumerate(row)]


def largest(row: list[float], k: int) -> list[int]:
    return sorted(range(len(row)), key=lambda i: row[i], reverse=True)[:k]


def route_cases(rng: Random):
    for shape, dtype, choice, far in (
        ((5,), torch.float32, 2, 0),
        ((2, 4), torch.float64, 3, 0),
        ((6,), torch.float64, 2, -20),
        ((), torch.float32, 2, 0),
        ((3, 2), torch.float32, 1, 0),
        ((4,), torch.float64, None, 0),
        ((4,), torch.float64, 2, 1000),
    ):
        E = rng.randint(5, 9)
        k = choice or E
        logits = normal(rng, *shape, E, dtype=dtype) * 2 + far

        def rows(function, logits=logits):
            return lambda: by_rows(function, logits)

        def forced(row, k=k):
            kept = largest(row, k)
            values = [v if i in kept else 0.0 for i, v in enumerate(row)]
            return exps(values, range(len(row)))

        def columns(logits=logits, k=k):
            gates = by_rows(lambda row: [1.0 if i in largest(row, k) else 0.0 for i in range(len(row))], logits)
            return (logits.masked_fill(gates == 0, -math.inf).softmax(0)).nan_to_num(0.0)

        yield Case(
            f"give the softmax of the {k} largest of {E} logits and 0 elsewhere, for shape {tuple(logits.shape)}"
            + (f", with logits about {far}" if far else ""),
            (logits, k),
            by_rows(lambda row, k=k: exps(row, largest(row, k)), logits),
            wrong={
                "all experts take part: k is left out": rows(lambda row: exps(row, range(len(row)))),
                "the softmax runs over all experts, so that a row's sum is below 1": rows(
                    lambda row, k=k: [
                        p if i in largest(row, k) else 0.0 for i, p in enumerate(exps(row, range(len(row))))
                    ]
                ),
                "the others' logits are set to 0, which is a logit like any other: take −∞": rows(forced),
                "every chosen expert gets 1/k": rows(
                    lambda row, k=k: [1 / k if i in largest(row, k) else 0.0 for i in range(len(row))]
                ),
                "the smallest logits are chosen": rows(
                    lambda row, k=k: exps(row, largest([-v for v in row], k)),
                ),
                "the logits themselves are divided by their sum": rows(
                    lambda row, k=k: [
                        v / sum(row[j] for j in largest(row, k)) if i in largest(row, k) else 0.0
                        for i, v in enumerate(row)
                    ]
                ),
                "the softmax runs over the tokens, not over the experts": columns,
                "the chosen logits come out as they are: take their softmax": rows(
                    lambda row, k=k: [v if i in largest(row, k) else 0.0 for i, v in enumerate(row)]
                ),
            },
        )
    for shape, level in (((3,), 0.0), ((2, 2), 0.0), ((3,), -1e12)):
        E = rng.randint(5, 8)
        k = rng.randint(2, E - 2)
        logits = torch.full((*shape, E), level)
        if shape != (3,):  # two levels: 1 for k + 1 experts at least, so that the border runs through equal ones
            for row in logits.view(-1, E):
                row[torch.tensor(rng.sample(range(E), rng.randint(k + 1, E)))] = 1.0

        def judge(gates, logits=logits, k=k, E=E):
            if not isinstance(gates, torch.Tensor) or gates.shape != logits.shape or gates.dtype != logits.dtype:
                return f"It does not give a {logits.dtype} tensor of shape {tuple(logits.shape)}."
            for row, gate in zip(logits.view(-1, E).tolist(), gates.reshape(-1, E).tolist(), strict=True):
                chosen = [i for i, g in enumerate(gate) if g != 0]
                if len(chosen) != k:
                    return (
                        f"For the logits {row} it chooses {len(chosen)} experts instead of {k}: ≥ lets all equals in."
                    )
                if sorted(row[i] for i in chosen) != sorted(row, reverse=True)[:k][::-1]:
                    return f"For the logits {row} it chooses the experts {chosen}, which have not the largest logits."
                if max(abs(g - p) for g, p in zip(gate, exps(row, chosen), strict=True)) > 1e-5:
                    return f"For the logits {row} the gates are {[round(g, 4) for g in gate]}."

        claim = f"choose exactly {k} of {E} experts where logits are equal, whichever"
        yield Case(claim, (logits, k), judge=judge, lenses=False)


# find the bug --------------------------------------------------------------------------------------------------------
def repair_cases(rng: Random):
    for _ in range(3):
        d, d_in = rng.sample(range(6, 20), 2)
        m = rng.choice([n for n in range(3, d) if n != d_in])
        W, b, x = normal(rng, d, d_in), normal(rng, d), normal(rng, 7, d_in)
        parts = list(halves(rng, d, m))
        h = map_by_rows(x, W, b)
        up, low = map_by_rows(relu(map_by_rows(h, *parts[:2])), *parts[2:]), map_by_rows(h, *parts[:2])
        args = (W, b, x, m, parts, rng.randrange(10**6))

        def shapes(seen, parts=parts):
            right = [tuple(part.shape) for part in parts]
            if list(map(tuple, seen["shapes"])) != right:
                found = ", ".join(str(tuple(s)) for s in seen["shapes"])
                return (
                    f"down and up, weights and biases, have the shapes {found} instead of {', '.join(map(str, right))}."
                )

        def start(seen, h=h):
            first = seen["at first"]
            if first.shape != h.shape:
                return f"The output has shape {tuple(first.shape)} instead of {tuple(h.shape)}."
            if not torch.allclose(first, h, atol=1e-5):
                missing = " It is zero: is the residual missing?" if not first.any() else ""
                return f"Before any training the output is off by {(first - h).abs().max().item():.2g}.{missing}"

        def use(seen, h=h, up=up, low=low, parts=parts):
            right, got = h + up, seen["in use"]
            if not torch.allclose(got, right, rtol=1e-4, atol=1e-4):
                flat = map_by_rows(low, *parts[2:])
                known = {
                    "The residual is missing.": up,
                    "The activation stands after the up projection.": h + relu(flat),
                    "The residual is missing, and the activation stands after the up projection.": relu(flat),
                    "The activation is missing.": h + flat,
                }
                said = [text for text, v in known.items() if torch.allclose(got, v, rtol=1e-3, atol=1e-3)]
                distance = (got - right).abs().max().item()
                return f"{' '.join(said)} The largest difference from h + up(ReLU(down(h))) is {distance:.3g}.".strip()

        def train(seen, size=2 * d * m + m + d):
            if not seen["the halves train"] or seen["numbers trained"] != size:
                return f"trainable() gives {seen['numbers trained']} numbers; down and up have {size}."

        yield Case("have down and up as linear layers d → m and m → d, d being the output's width", args, judge=shapes)
        yield Case("leave the layer's output as it was before training", args, judge=start)
        yield Case("be h + up(ReLU(down(h))), h being the layer's output", args, judge=use)
        yield Case("give the parameters of down and up from trainable(), and nothing else", args, judge=train)
        yield Case("train down and up from a random down, and keep the base frozen, its bias too", args, judge=holds)


EXERCISES = (
    Exercise(
        "bottleneck", "The bottleneck", bottleneck_cases,
        (
            "Three steps and a sum: down to m numbers, ReLU, up to d numbers, plus x.",
            "`F.linear(x, W, b)` is W·x + b for any number of axes. Use it twice; ReLU stands between them, the sum "
            "after both.",
        ),
        ("bottleneck",),
    ),
    Exercise(
        "count_adapters", "How many numbers train", count_cases,
        (
            "Count one adapter first, its two biases too; then count the adapters.",
            "At d = 3 and m = 2 one adapter has 6 + 2 numbers on the way down and 6 + 3 up. 7 blocks in threes are 3 "
            "groups.",
        ),
        ("count_adapters",),
    ),
    Exercise(
        "init_adapter", "The start: the identity", init_cases,
        (
            "The up half must be zero, its bias too; the down half must not.",
            "`uniform_` takes the two ends and `generator=`. Is it d or m that counts the inputs of the way down?",
        ),
        ("init_adapter",), "adapters.start_adapter",
    ),
    Exercise(
        "route", "The router", route_cases,
        (
            "`logits.topk(k, dim=-1)` gives the k largest and where they are. Take the softmax of those alone.",
            "`topk` gives values *and* places, exactly k, whatever is equal. `scatter` writes values to places in a "
            "tensor of zeros.",
        ),
        ("route",),
    ),
    Exercise(
        "RepairedAdapter", "Find the bug", repair_cases,
        (
            "There are four faults: the start, the residual, the place of the activation, and what stays frozen.",
            "With `up` at zero, is the output h? On which side of `up` is ReLU? And no_grad would cut off the layers "
            "below.",
        ),
        ("RepairedAdapter",), "adapters.adapter_after",
    ),
)  # fmt: skip
