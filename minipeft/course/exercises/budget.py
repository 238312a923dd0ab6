"""Assignment `budget`: which numbers train, what bytes and multiply-adds they take, and what a step really holds."""

from __future__ import annotations

from math import prod
from random import Random

from minipeft.course.exercises.budget_bytes import LLAMA_7B, bytes_cases, kept_cases, repair_cases
from minipeft.course.verdict import Case, Exercise, Raises


def random_shapes(rng: Random, n: int) -> list[tuple[int, int]]:
    """(d_in, d_out) of n layers, none of them square."""
    return [tuple(rng.sample(range(8, 900), 2)) for _ in range(n)]


# shapes of the targets -----------------------------------------------------------------------------------------------
def llama_like(rng: Random, blocks: int) -> list[tuple[str, str, int, int]]:
    d, few, ff = rng.sample(range(12, 90), 3)
    attention = {"self_attn.q_proj": (d, d + 3), "self_attn.xq_proj": (d, 7), "self_attn.v_proj": (d, few)}
    found = [("model.embed_tokens", "embedding", 500, d)]
    for i in range(blocks):
        widths = attention | {"mlp.up_proj": (d, ff)}
        found += [(f"model.layers.{i}.{name}", "linear", *shape) for name, shape in widths.items()]
        found.append((f"model.layers.{i}.norm", "norm", d, d))
    return [*found, ("lm_head", "linear", d, 500)]


def gpt2_like(rng: Random, blocks: int) -> list[tuple[str, str, int, int]]:
    d = rng.randint(12, 90)
    widths = {"attn.c_attn": (d, 3 * d), "attn.c_proj": (d, d), "mlp.c_fc": (d, 4 * d), "mlp.c_proj": (4 * d, d)}
    found = [("wte", "embedding", 500, d), ("wpe", "embedding", 60, d)]
    for i in range(blocks):
        found += [(f"h.{i}.{name}", "Conv1D", *shape) for name, shape in widths.items()]
    return [*found, ("lm_head", "linear", d, 500)]


def odd_names(rng: Random) -> list[tuple[str, str, int, int]]:
    a, b, c, d = rng.sample(range(12, 90), 4)
    return [
        ("wrap.proj.table", "linear", a, b),
        ("enc.proj", "embedding", c, d),
        ("enc.0.proj", "linear", b, c),
        ("enc.0.proj_norm", "norm", c, c),
        ("enc.0.out_proj", "linear of torch's attention", c, d),
        ("enc.1.proj", "Conv1D", d, a),
        ("dec.proj", "norm", a, a),
        ("proj", "linear", a, d),
    ]


def shared_blocks(rng: Random) -> list[tuple[str, str, int, int]]:
    a, b, c = rng.sample(range(12, 90), 3)
    return [
        ("block.0.key", "linear", a, b),
        ("block.0.value", "linear", a, c),
        ("block.1.key", "block.0.key", a, b),
        ("block.1.value", "linear", c, a),
        ("block.2.value", "block.0.value", a, c),
    ]


def shape_cases(rng: Random):
    for layers, targets, what in (
        (llama_like(rng, rng.randint(2, 3)), ["q_proj", "v_proj"], "of a LLaMA"),
        (gpt2_like(rng, rng.randint(2, 3)), ["c_proj", "c_attn"], "of a GPT-2, whose Conv1D is (d_in, d_out)"),
        (odd_names(rng), ["proj", "out_proj"], "among odd names"),
        (shared_blocks(rng), ["key", "value"], "where blocks share some"),
        (llama_like(rng, 2), ["lm_head", "up_proj"], "of a LLaMA"),
    ):

        def chosen(
            fits=lambda name, names: name.split(".")[-1] in names,
            kinds=("linear", "linear of torch's attention", "Conv1D"),
            shared=False,
            turned=(),
            layers=tuple(layers),
            targets=tuple(targets),
        ):
            real = {name: kind for name, kind, *_ in layers}
            return [
                (d_out, d_in) if real.get(kind, kind) in turned else (d_in, d_out)
                for name, kind, d_in, d_out in layers
                if fits(name, targets) and (shared if kind in real else kind in kinds)
            ]

        every = ("linear", "linear of torch's attention", "Conv1D", "embedding")
        yield Case(
            f"list (d_in, d_out) of the layers {', '.join(targets)} {what}",
            (layers, targets),
            chosen(),
            wrong={
                "Conv1D is turned round: its weight is (d_in, d_out)": lambda f=chosen: f(turned=("Conv1D",)),
                "d_in and d_out changed places: a linear layer's weight is (d_out, d_in)": lambda f=chosen, e=every: f(
                    turned=e[:2]
                ),
                "everything is turned round: return (d_in, d_out)": lambda f=chosen, e=every: f(turned=e),
                "Conv1D is left out, which is a linear layer too": lambda f=chosen, e=every: f(kinds=e[:2]),
                "a layer that two blocks share is listed twice": lambda f=chosen: f(shared=True),
                "embeddings are listed, which are no linear layers": lambda f=chosen, e=every: f(kinds=e),
                "whatever has a matrix is listed: an embedding is no linear layer": lambda f=chosen, e=every: f(
                    kinds=e, turned=("embedding",)
                ),
                "a name that only ends like a target is taken": lambda f=chosen: f(
                    lambda name, names: name.endswith(names)
                ),
                "a name that holds a target anywhere is taken": lambda f=chosen: f(
                    lambda name, names: any(each in name for each in names)
                ),
                "whole names are compared: only the last part counts": lambda f=chosen: f(
                    lambda name, names: name in names
                ),
                "subclasses of nn.Linear are left out: ask isinstance": lambda f=chosen: f(kinds=("linear", "Conv1D")),
                "all linear layers are listed": lambda f=chosen: f(lambda name, names: True),
                "they are in the order of the targets, not of the model": lambda f=chosen, t=targets: [
                    shape for target in t for shape in f(targets=(target,))
                ],
                "equal shapes are listed once: every layer counts": lambda f=chosen: list(dict.fromkeys(f())),
            },
        )


# counts --------------------------------------------------------------------------------------------------------------
def tensors(method: str, d_in: int, d_out: int, size: int) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor that trains at one layer."""
    low_rank = {"A": (size, d_in), "B": (d_out, size)}
    return {
        "lora": low_rank,
        "adalora": low_rank | {"Λ": (size,)},
        "dora": low_rank | {"m": (d_out,)},
        "vera": {"d": (size,), "b": (d_out,)},
        "adapter": {"down": (size, d_out), "down's bias": (size,), "up": (d_out, size), "up's bias": (d_out,)},
    }[method]


LLAMA_TARGETS = [(4096, 4096)] * 3 + [(4096, 11008), (11008, 4096)]  # q, k, v, up and down of one block
PRINTED = (  # papers' rows with the exact count
    ("lora", [(768, 768)] * 24, 8, 294_912, "RoBERTa-base"),
    ("dora", LLAMA_TARGETS * 32, 16, 28_925_952, "LLaMA-7B"),
    ("vera", [(1024, 1024)] * 48, 256, 61_440, "RoBERTa-large"),
    ("adapter", [(1024, 1024), (4096, 1024)] * 24, 8, 835_968, "RoBERTa-large"),
    ("lora", LLAMA_TARGETS * 32, 32, 56_098_816, "LLaMA-7B"),
)


def count_cases(rng: Random):
    methods = ("lora", "adapter", "vera", "dora", "adalora")
    small = [(method, [(8, 5), (3, 9)], 2, None, "small layers") for method in methods]
    drawn = small + [
        (method, random_shapes(rng, rng.randint(2, 6)), rng.randint(3, 40), None, "layers of random size")
        for method in methods
    ]
    for method, shapes, size, exact, what in (*drawn, *PRINTED):

        def total(without=(), only=None, turned=False, shapes=shapes, method=method, size=size):
            found = 0
            for d_in, d_out in shapes if only is None else shapes[:only]:
                each = tensors(method, d_out, d_in, size) if turned else tensors(method, d_in, d_out, size)
                found += sum(prod(shape) for name, shape in each.items() if name not in without)
            return found

        wrong = {f"{part} is left out": lambda f=total, part=part: f((part,)) for part in tensors(method, 1, 1, 1)}
        wrong |= {
            "adapter": {
                "both biases are left out": lambda f=total: f(("down's bias", "up's bias")),
                "the way down starts from d_in: it stands behind the layer, where the width is d_out": (
                    lambda s=shapes, m=size: sum(i * m + m + m * o + o for i, o in s)
                ),
            },
            "vera": {
                "A and B are counted, which VeRA freezes": lambda f=total, s=shapes, r=size: (
                    f() + sum(r * (i + o) for i, o in s)
                ),
                "each layer's r is counted once in all: only A and B are shared": lambda s=shapes, r=size: (
                    sum(o for _, o in s) + r
                ),
            },
            "dora": {
                "m has d_in numbers: it has one for each output": lambda f=total, s=shapes: (
                    f(("m",)) + sum(i for i, _ in s)
                ),
                "m has one number for each layer: it has one for each output": lambda f=total, s=shapes: (
                    f(("m",)) + len(s)
                ),
            },
            "adalora": {
                "Λ has r² numbers: only its diagonal trains": lambda f=total, s=shapes, r=size: (
                    f(("Λ",)) + len(s) * r * r
                )
            },
            "lora": {},
        }[method]
        wrong |= {
            "d_in and d_out changed places": lambda f=total: f(turned=True),
            "only the first layer is counted": lambda f=total: f(only=1),
            "all layers are taken for copies of the first": lambda f=total, s=shapes: len(s) * f(only=1),
            "all layers are taken for square ones": lambda f=total, s=shapes: f(shapes=[(i, i) for i, _ in s]),
            "r multiplies d_in·d_out: A and B have r·(d_in + d_out)": lambda s=shapes, r=size: sum(
                r * i * o for i, o in s
            ),
            "W is counted, which is frozen": lambda f=total, s=shapes: f() + sum(i * o for i, o in s),
        }
        yield Case(
            f"count what {method!r} of size {size} trains on {len(shapes)} {what if exact is None else f'of {what}'}",
            (method, shapes, size),
            total() if exact is None else exact,
            wrong=wrong,
        )
    shapes = random_shapes(rng, 2)
    yield Case("raise a ValueError that names an unknown method", ("lore", shapes, 4), Raises("ValueError", ("lore",)))


# bytes ---------------------------------------------------------------------------------------------------------------
def products(d_in: int, d_out: int, rank: int | None) -> dict[str, int]:
    """The multiply-adds of each product of a step on one layer, for one token."""
    common = {"W·x": d_out * d_in, "Wᵀ·g": d_in * d_out}
    if rank is None:
        return common | {"g·xᵀ": d_out * d_in}
    low = {"A·x": rank * d_in, "B·(A·x)": d_out * rank, "Bᵀ·g": rank * d_out, "Aᵀ·(Bᵀ·g)": d_in * rank}
    return common | low | {"gradient of A": rank * d_in, "gradient of B": d_out * rank}


FORWARD, FROZEN = {"W·x", "A·x", "B·(A·x)"}, {"W·x", "Wᵀ·g"}


def step_cases(rng: Random):
    square, odd = rng.randint(20, 90), random_shapes(rng, rng.randint(3, 5))
    for shapes, rank, tokens in (
        ([(square, square)], None, 1),
        ([(square, square)], rng.randint(2, 9), 1),
        (odd, None, rng.randint(50, 900)),
        (odd, rng.randint(2, 50), rng.randint(50, 900)),
        (LLAMA_TARGETS * 32, 8, 512),
    ):

        def total(keep=lambda name: True, shapes=shapes, rank=rank, tokens=tokens):
            return sum(
                tokens * n for d_in, d_out in shapes for name, n in products(d_in, d_out, rank).items() if keep(name)
            )

        layers, texts = f"{len(shapes)} layer{'s'[: len(shapes) > 1]}", f"{tokens} token{'s'[: tokens > 1]}"
        adapted = f"a LoRA step of rank {rank}" if rank is not None else "a step of full fine-tuning"
        wrong = {
            "only the forward pass is counted": lambda f=total: f(lambda name: name in FORWARD),
            "only the backward pass is counted": lambda f=total: f(lambda name: name not in FORWARD),
            "the tokens are left out": lambda f=total, t=tokens: f() // t,
            "these are operations: a multiplication with its addition counts once": lambda f=total: 2 * f(),
            "only the first layer is counted": lambda f=total, s=shapes: f(shapes=s[:1]),
            "all layers are taken for square ones": lambda f=total, s=shapes: f(shapes=[(i, i) for i, _ in s]),
            "it is a share of a full step: return a number": lambda f=total: f() / f(rank=None),
            "the gradient with respect to the input is left out": lambda f=total: f(
                lambda name: name not in ("Wᵀ·g", "Bᵀ·g", "Aᵀ·(Bᵀ·g)")
            ),
        }
        if rank is not None:
            wrong |= {
                "freezing W is taken to save its backward pass: g still goes through Wᵀ": lambda f=total: f(
                    lambda name: name != "Wᵀ·g"
                ),
                "the products with W are left out: freezing does not save them": lambda f=total: f(
                    lambda name: name not in FROZEN
                ),
                "the products with A and B are left out": lambda f=total: f(lambda name: name in FROZEN),
                "A and B go through the forward pass only": lambda f=total: f(lambda name: name in FROZEN | FORWARD),
                "A and B have no gradients of their own": lambda f=total: f(
                    lambda name: name not in ("gradient of A", "gradient of B")
                ),
                "W's own gradient is counted: it is frozen": lambda f=total, s=shapes, t=tokens: (
                    f() + t * sum(i * o for i, o in s)
                ),
            }
        yield Case(
            f"count the multiply-adds of {adapted} on {layers} for {texts}",
            (shapes, rank, tokens),
            total(),
            wrong=wrong,
        )


# the largest rank ----------------------------------------------------------------------------------------------------
def affords(base: int, shapes: list, memory: int, width: int, rank: int, each: int = 16) -> bool:
    return width * base + each * sum(rank * (d_in + d_out) for d_in, d_out in shapes) <= memory


def cheaper(shapes: list, rank: int, equal: bool = False) -> bool:
    full, low = (sum(sum(products(*shape, r).values()) for shape in shapes) for r in (None, rank))
    return low <= full if equal else low < full


def last_rank(fits) -> int:
    """One rank after the other, until one does not fit; 0 for none."""
    rank = 0
    while rank < 5000 and fits(rank + 1):
        rank += 1
    return rank


def rank_cases(rng: Random):
    shapes = [*random_shapes(rng, rng.randint(2, 4)), (700, 900)]
    base, one = rng.randint(10**6, 10**7), 16 * sum(d_in + d_out for d_in, d_out in shapes)  # bytes of one rank
    most = last_rank(lambda r: cheaper(shapes, r))
    rank, N = rng.randint(2, most // 5), 6 * rng.randint(5, 15)
    for number, layers, memory, width, what in (
        (base, shapes, 2 * base + rank * one + rng.randint(1, one - 1), 2, "where memory is short"),
        (base, shapes, 4 * base + rank * one, 4, "that fills the memory to the last byte, over a float32 base"),
        (base, shapes, 2 * base + rank * one - 1, 2, "where one byte is missing"),
        (base, shapes, 4 * base + (most + 5) * one, 4, "where the step's multiply-adds set the limit"),
        (base, [(N, N)] * 3, 10**9, 2, f"for {N} × {N} layers, where rank N/6 costs as much as full fine-tuning"),
        (LLAMA_7B, LLAMA_TARGETS * 32, 24 * 10**9, 2, "for LLaMA-7B in 24 GB"),
    ):

        def found(fits=affords, cheap=cheaper, number=number, layers=layers, memory=memory, width=width):
            return last_rank(lambda r: fits(number, layers, memory, width, r) and cheap(layers, r))

        right = found()
        yield Case(
            f"give the largest rank {what}",
            (number, layers, memory, width),
            right,
            wrong={
                "a step that costs the same counts as cheaper": lambda f=found: f(
                    cheap=lambda *a: cheaper(*a, equal=True)
                ),
                "only the adapter's weights are counted: with gradient and moments a number takes 16 bytes": (
                    lambda f=found: f(fits=lambda *a: affords(*a, each=4))
                ),
                "the moments are left out: a number that trains takes 16 bytes": lambda f=found: f(
                    fits=lambda *a: affords(*a, each=8)
                ),
                "one moment is left out: a number that trains takes 16 bytes": lambda f=found: f(
                    fits=lambda *a: affords(*a, each=12)
                ),
                "the adapter has a master copy: it is float32 already, 4 + 4 + 8 bytes": lambda f=found: f(
                    fits=lambda *a: affords(*a, each=20)
                ),
                "the base takes no memory: its weights stay": lambda f=found: f(fits=lambda b, *a: affords(0, *a)),
                "the base always takes 2 bytes a number: they are `width`": lambda f=found: f(width=2),
                "the base always takes 4 bytes a number: they are `width`": lambda f=found: f(width=4),
                "the multiply-adds are left out": lambda f=found: f(cheap=lambda *a: True),
                "memory sets no limit: count the base, and 16 bytes for each number that trains": lambda f=found: f(
                    fits=lambda *a: True
                ),
                "it is the first rank that does not fit": lambda v=right: v + 1,
                "it stops one rank early": lambda v=right: v - 1,
            },
        )
    for number, layers, memory, why in (
        (base, shapes, 2 * base + one - 1, "not even rank 1 fits into the memory"),
        (base, shapes, base, "the base alone does not fit"),
        (50, [(4, 6), (5, 4)], 10**9, "the layers are so small that rank 1 costs more than full fine-tuning"),
    ):
        yield Case(f"raise a ValueError if {why}", (number, layers, memory, 2), Raises("ValueError"))


# bytes of a model ----------------------------------------------------------------------------------------------------
EXERCISES = (
    Exercise(
        "target_shapes", "Shapes of the targets", shape_cases,
        (
            "`model.named_modules()` gives dotted names and modules, each module once; compare a name's last part.",
            "nn.Linear has in_features and out_features; Conv1D's weight lies the other way round. A name's last "
            "part follows its last dot.",
        ),
        ("target_shapes",), "budget.list_shapes",
    ),
    Exercise(
        "count_trainable", "How many numbers train", count_cases,
        (
            "Write down the shape of every tensor that trains at one layer; then add over the layers.",
            "For (6, 4) and size 2: LoRA 12 + 8, AdaLoRA 2 more, DoRA 4 more, VeRA 2 + 4. The adapter reads 4 "
            "numbers: 8 + 2, then 8 + 4.",
        ),
        ("count_trainable",),
    ),
    Exercise(
        "training_bytes", "Bytes that stay", bytes_cases,
        (
            "Three kinds of numbers: frozen ones, the base's own that train, the adapter's. Write a column for each.",
            "base = 100, own = 0, added = 10, width = 2: weights 240, master 0, gradients 40, moments 80. And with "
            "own = 100, added = 0?",
        ),
        ("training_bytes",),
    ),
    Exercise(
        "step_multiply_adds", "Multiply-adds of a step", step_cases,
        (
            "A matrix that trains takes three products: output, gradient of its input, its own. And a frozen one?",
            "One layer (6, 4), one token: 3 · 24 = 72 in full. At rank 2, W takes 2 · 24, A takes 3 · 12 and B 3 · "
            "8: 108.",
        ),
        ("step_multiply_adds",),
    ),
    Exercise(
        "largest_rank", "The largest rank", rank_cases,
        (
            "Each condition by itself sets a largest rank; the smaller one counts. `//` rounds down.",
            "16 bytes a number: how many numbers does one rank add? For the second, put the sum of exercise 4 below "
            "3·P and solve for r. Equal is too much.",
        ),
        ("largest_rank",),
    ),
    Exercise(
        "kept_bytes", "Weighing a real step", kept_cases,
        (
            "A tensor's `nbytes` knows its type. `model.parameters()` names a tied one once; a gradient may be None.",
            "Not everything in the optimizer's state is a tensor, and not every parameter has a gradient. Buffers "
            "weigh too.",
        ),
        ("kept_bytes",), "budget.bytes_after_a_step",
    ),
    Exercise(
        "repaired_memory", "Find the bug", repair_cases,
        (
            "There are four faults: tied matrices, frozen ones, the type of the moments, and who needs a master copy.",
            "Who is asked for twice? Has a frozen one a gradient? What type are Adam's moments? Who is narrower than "
            "float32?",
        ),
        ("repaired_memory",), "budget.bytes_before_training",
    ),
)  # fmt: skip
