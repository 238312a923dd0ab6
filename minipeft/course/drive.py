"""How a learner's code is called: it gets models and optimisers to work on, and what it did is written down as data.

Nothing here knows what is right. The same functions run in the learner's notebook and in the process of a submission.
"""

from __future__ import annotations

import copy
import random

import torch
from torch import nn

from minipeft.course.verdict import raised


def perform(drive: str, objects: tuple, args: tuple) -> tuple[object, tuple]:
    """(what came out, the arguments afterwards); an exception comes out as `Raised`."""
    args = copy.deepcopy(args)
    try:
        with torch.random.fork_rng(devices=[]):
            return globals()[drive](*objects, *args), args
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        return raised(error), args


def call(function, *args):
    value = function(*args)
    return list(value) if isinstance(value, map | filter | zip) else value


def initialise(function, d_out: int, d_in: int, rank: int, seed: int) -> dict:
    """Draws three times: with a seed, with the same one, with another."""
    draws = []
    before = torch.random.get_rng_state()
    for each in (seed, seed, seed + 1):
        A, B = function(d_out, d_in, rank, torch.Generator().manual_seed(each))
        draws.append((A.detach().clone(), B.detach().clone()))
    untouched = torch.equal(before, torch.random.get_rng_state())
    return {"A": draws[0][0], "B": draws[0][1], "again": draws[1][0], "other": draws[2][0], "global": untouched}


class Conv1D(nn.Module):
    """GPT-2's linear layer: y = x·W + b with W of shape (d_in, d_out)."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.nf = weight.shape[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


def layer(weight: torch.Tensor, bias: torch.Tensor, conv1d: bool) -> nn.Module:
    if conv1d:
        return Conv1D(weight.clone(), bias.clone())
    linear = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    linear.weight, linear.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
    return linear


@torch.no_grad()
def descend(model: nn.Module, lr: float) -> None:
    """One step of gradient descent on all that trains."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is not None:
            parameter -= lr * parameter.grad


def merge(function, weight, bias, A, B, gamma: float, conv1d: bool) -> dict:
    linear = layer(weight, bias, conv1d)
    old = linear.weight
    function(linear, A, B, gamma)
    return {"merged": linear.weight.detach().clone(), "old weight": old.detach().clone()}


def unmerge(merge, unmerge, weight, bias, A, B, gamma: float, conv1d: bool) -> dict:
    """Twice there and back, as someone does who compares two adapters."""
    linear = layer(weight, bias, conv1d)
    seen = {}
    for i in (1, 2):
        receipt = merge(linear, A, B, gamma)
        seen[f"merged {i}"] = linear.weight.detach().clone()
        unmerge(linear, receipt)
        seen[f"restored {i}"] = linear.weight.detach().clone()
    return seen


def tree(names: list[str], tied: tuple[str, str] | None = None) -> nn.Module:
    """A model whose parameters have these dotted names, each of one number of its own size."""
    root = nn.Module()
    for i, name in enumerate(names):
        *path, last = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_parameter(last, nn.Parameter(torch.full((i + 1,), float(i))))
    return root


def freeze(function, names: list[str], trainable: list[bool]) -> dict:
    model = tree(names)
    for parameter, flag in zip(model.parameters(), trainable, strict=True):
        parameter.requires_grad_(flag)
    returned = function(model)
    return {
        "returned": returned,
        "trainable": [name for name, p in model.named_parameters() if p.requires_grad],
        "values kept": all(bool((p == p.detach().flatten()[0]).all()) for p in model.parameters()),
    }


def adapted_layer(cls, weight, bias, x, rank: int, alpha: float, A, B, seed: int) -> dict:
    """A LoRA layer from birth to use: untrained, with given A and B, and after a step of SGD."""
    torch.manual_seed(seed)
    linear = layer(weight, bias, conv1d=False)
    lora = cls(linear, rank, alpha)
    seen = {"at first": lora(x).detach().clone(), "shape of A": tuple(lora.A.shape), "shape of B": tuple(lora.B.shape)}
    seen["A is random"] = bool(lora.A.detach().abs().sum() > 0)
    with torch.no_grad():
        lora.A.copy_(A)
        lora.B.copy_(B)
    seen["in use"] = lora(x).detach().clone()
    trained = [p for p in lora.trainable()]
    seen["numbers trained"] = sum(p.numel() for p in trained)
    seen["A and B train"] = {id(p) for p in trained} == {id(lora.A), id(lora.B)}
    loss = lora(x).square().mean()
    loss.backward()
    descend(lora, 0.1)
    seen["base after a step"] = linear.weight.detach().clone()
    return seen


# ---------------------------------------------------------------------------------------------------------------------
# Choosing parameters
# ---------------------------------------------------------------------------------------------------------------------
class RMSNorm(nn.Module):
    """A norm with a scale and no bias."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class Gate(nn.Module):
    """Neither linear nor a norm, but it has a parameter called bias."""

    def __init__(self, width: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))


def network(kind: str, width: int, seed: int) -> nn.Module:
    """ "biases": linear, Conv1D and LayerNorm with biases, and decoys; "none": a model without biases."""
    rng = random.Random(seed)
    model = nn.Module()
    for i in range(rng.randint(2, 3)):
        block = nn.Module()
        if kind == "biases":
            block.bias_proj = nn.Linear(width, 2 * width, bias=rng.random() < 0.5)
            block.c_fc = Conv1D(torch.zeros(width, 3), torch.zeros(3))
            block.norm = nn.LayerNorm(width)
            block.gate = Gate(width)
            block.relative_attention_bias = nn.Embedding(4, width)
        else:
            block.proj = nn.Linear(width, width, bias=False)
            block.norm = RMSNorm(width)
            block.gate = Gate(width)
        model.add_module(f"block{i}", block)
    return model


def name_biases(function, kind: str, width: int, seed: int) -> list:
    return sorted(function(network(kind, width, seed)))


class LanguageModel(nn.Module):
    def __init__(self, table: torch.Tensor, head: torch.Tensor | None):
        super().__init__()
        self.embed = nn.Embedding(*table.shape, dtype=table.dtype)
        self.embed.weight = nn.Parameter(table.clone())
        self.body = nn.Linear(table.shape[1], table.shape[1], dtype=table.dtype)
        self.head = nn.Linear(table.shape[1], table.shape[0], bias=False, dtype=table.dtype)
        self.head.weight = self.embed.weight if head is None else nn.Parameter(head.clone())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(ids)).tanh())


def tune_softmax(function, table, head, ids, seed: int) -> dict:
    """Prepares the model, then trains one step of SGD on all that requires a gradient."""
    torch.manual_seed(seed)
    model = LanguageModel(table, head)
    before = model(ids).detach().clone()
    added = function(model)
    after = model(ids)
    seen = {"added": added, "trainable": sorted(n for n, p in model.named_parameters() if p.requires_grad)}
    seen["same output at first"] = torch.equal(before, after)
    body = model.body.weight.detach().clone()
    start = model.head.weight.detach().clone()
    nn.functional.cross_entropy(after, ids).backward()
    descend(model, 1.0)
    seen["embedding kept"] = torch.equal(model.embed.weight.detach(), table)
    seen["body kept"] = torch.equal(model.body.weight.detach(), body)
    seen["head moved"] = not torch.equal(model.head.weight.detach(), start)
    return seen


def classifier(weights: list[torch.Tensor]) -> nn.Module:
    first, second = (nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype) for w in weights)
    first.weight, second.weight = nn.Parameter(weights[0].clone()), nn.Parameter(weights[1].clone())
    return nn.Sequential(first, nn.Tanh(), second)


def importance(function, weights: list, inputs, labels) -> dict:
    model = classifier(weights)
    found = function(model, inputs, labels)
    kept = all(torch.equal(p.detach(), w) for p, w in zip(model.parameters(), weights, strict=True))
    return {"importance": dict(found), "weights kept": kept}


def optimise(cls, values: list, masks: list, gradients: list, settings: dict) -> list:
    """The parameters after each step."""
    parameters = [nn.Parameter(value.clone()) for value in values]
    optimizer = cls(parameters, masks, **settings)
    history = []
    for several in gradients:
        for parameter, gradient in zip(parameters, several, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        history.append([p.detach().clone() for p in parameters])
    return history


# ---------------------------------------------------------------------------------------------------------------------
# Quantisation
# ---------------------------------------------------------------------------------------------------------------------
def quantise(function, weight, code, block: int) -> dict:
    before = weight.clone(), code.clone()
    indices, scales = function(weight, code, block)
    kept = torch.equal(weight, before[0]) and torch.equal(code, before[1])
    return {"indices": indices, "scales": scales, "arguments kept": kept}


def held_bytes(value, seen: set) -> int:
    """The bytes of all tensors that an object holds, through attributes, lists and dictionaries; each storage once."""
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        key, size, inside = ("storage", storage.data_ptr()), storage.nbytes(), []
    else:
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
        if not inside and hasattr(value, "__dict__") and not isinstance(value, type) and not hasattr(value, "__code__"):
            inside = vars(value).values()
        key, size = id(value), 0
    if key in seen:
        return 0
    seen.add(key)
    return size + sum(held_bytes(each, seen) for each in inside)


def quantised_layer(cls, weight, bias, code, block: int, x, g) -> dict:
    """A quantised layer: what it holds, its output, and the gradient of x when that of the output is g."""
    made = cls(layer(weight, bias, conv1d=False), code, block)
    seen = {"bytes": held_bytes(made, set())}
    x = x.clone().requires_grad_()
    y = made(x)
    seen["output"] = y.detach().clone()
    if y.requires_grad:
        y.backward(g)
    return seen | {"gradient": x.grad}


# ---------------------------------------------------------------------------------------------------------------------
# Adapters
# ---------------------------------------------------------------------------------------------------------------------
def start_adapter(function, width: int, bottleneck: int, seed: int) -> dict:
    """Draws three times: with a seed, with the same one, with another."""
    before = torch.random.get_rng_state()
    draws = []
    for each in (seed, seed, seed + 1):
        down_w, down_b, up_w, up_b = function(width, bottleneck, torch.Generator().manual_seed(each))
        draws.append([tensor.detach().clone() for tensor in (down_w, down_b, up_w, up_b)])
    untouched = torch.equal(before, torch.random.get_rng_state())
    return {"first": draws[0], "again": draws[1][0], "other": draws[2][0], "global": untouched}


def adapter_after(cls, weight, bias, x, bottleneck: int, halves: list, seed: int) -> dict:
    """A layer with an adapter behind it: untrained, with given weights, and after a step of SGD."""
    torch.manual_seed(seed)
    linear = layer(weight, bias, conv1d=False)
    adapter = cls(linear, bottleneck)
    parts = [adapter.down.weight, adapter.down.bias, adapter.up.weight, adapter.up.bias]
    seen = {"at first": adapter(x).detach().clone(), "shapes": [tuple(part.shape) for part in parts]}
    seen["down is random"] = bool(parts[0].detach().std() > 0)
    with torch.no_grad():
        for part, value in zip(parts, halves, strict=True):
            part.copy_(value)
    seen["in use"] = adapter(x).detach().clone()
    trained = list(adapter.trainable())
    seen["numbers trained"] = sum(p.numel() for p in trained)
    seen["the halves train"] = {id(p) for p in trained} == {id(p) for p in parts}
    seen["gradients on"] = all(p.requires_grad for p in trained)
    x = x.clone().requires_grad_(True)
    adapter(x).square().mean().backward()
    descend(adapter, 0.1)
    seen["gradient below"] = x.grad is not None and bool(x.grad.any())
    seen["base after a step"] = [linear.weight.detach().clone(), linear.bias.detach().clone()]
    return seen


# ---------------------------------------------------------------------------------------------------------------------
# The LoRA family
# ---------------------------------------------------------------------------------------------------------------------
def dora_layer(cls, weight, bias, x, rank: int, gamma: float, A, B, m, G, seed: int) -> dict:
    """A DoRA layer from birth to use: untrained, with given A, B and m, its gradients for ∂L/∂y = G, after a step."""
    torch.manual_seed(seed)
    linear = layer(weight, bias, conv1d=False)
    dora = cls(linear, rank, gamma)
    seen = {"at first": dora(x).detach().clone(), "A is random": bool(dora.A.detach().abs().sum() > 0)}
    seen |= {"shape of A": tuple(dora.A.shape), "shape of B": tuple(dora.B.shape), "numbers in m": dora.m.numel()}
    if (dora.A.shape, dora.B.shape, dora.m.numel()) != (A.shape, B.shape, m.numel()):
        return seen
    with torch.no_grad():
        for own, given in ((dora.A, A), (dora.B, B), (dora.m, m)):
            own.copy_(given.reshape(own.shape))
    dora.zero_grad()
    y = dora(x)
    seen["in use"] = y.detach().clone()
    (y * G).sum().backward()
    for name in ("A", "B", "m"):
        gradient = getattr(dora, name).grad
        seen[f"gradient of {name}"] = None if gradient is None else gradient.clone()
    descend(dora, 0.1)
    seen["weight after a step"] = linear.weight.detach().clone()
    seen["bias after a step"] = linear.bias.detach().clone()
    return seen


# ---------------------------------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------------------------------
def put_before(function, prompt, embeds, mask, labels, weights) -> dict:
    """What comes out, and the gradient that reaches the prompt from Σ weights · embeddings."""
    prompt = prompt.clone().requires_grad_()
    found = dict(zip(("embeds", "mask", "labels"), function(prompt, embeds, mask, labels), strict=True))
    return found | {"gradient": gradient((found["embeds"].double() * weights).sum(), prompt)}


def gradient(loss: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """∂loss/∂tensor; zeros where nothing reaches it."""
    found = torch.autograd.grad(loss, tensor, allow_unused=True)[0] if loss.requires_grad else None
    return torch.zeros_like(tensor) if found is None else found


def draw_rows(function, table, n: int, seed: int) -> dict:
    """Draws with a seed, with the same one and with forty others; then trains what was drawn."""
    weight = nn.Parameter(table.clone())
    before = torch.random.get_rng_state()
    draws = [function(weight, n, torch.Generator().manual_seed(s)) for s in (seed, *range(seed, seed + 41))]
    seen = {"draws": [each.detach().clone() for each in draws]}
    seen["global"] = torch.equal(before, torch.random.get_rng_state())
    if draws[0].requires_grad:
        draws[0].square().sum().backward()
    seen["gradient in table"] = weight.grad is not None
    draws[0].data.add_(1.0)
    seen["table kept"] = torch.equal(weight.detach(), table)
    return seen


class Reader(nn.Module):
    """A causal model of one attention layer: logits (rows, L, words) from embeddings, a mask and positions."""

    def __init__(self, table: torch.Tensor, places: torch.Tensor):
        super().__init__()
        self.register_buffer("table", table)
        self.register_buffer("places", places)

    def forward(self, inputs_embeds, attention_mask, position_ids) -> torch.Tensor:
        h = inputs_embeds + self.places[position_ids]
        length, width = h.shape[-2:]
        seen = torch.ones(length, length, dtype=torch.bool).tril() & attention_mask.bool()[:, None, :]
        scores = (h @ h.transpose(-1, -2) / width**0.5).masked_fill(~seen, -1e9)
        return (h + scores.softmax(-1) @ h) @ self.table.T


def read_with_prompt(function, table, places, prompt, embeds, mask, positions, labels) -> dict:
    prompt = prompt.clone().requires_grad_()
    logits, loss = function(Reader(table, places), prompt, embeds, mask, positions, labels)
    return {"logits": logits.detach().clone(), "loss": loss.detach().clone(), "gradient": gradient(loss, prompt)}


# ---------------------------------------------------------------------------------------------------------------------
# Rank
# ---------------------------------------------------------------------------------------------------------------------
def factor_values(function, B, A, times: int):
    """The answer for B with its rows, and A with its columns, repeated `times`; a text if memory did not suffice."""
    try:
        return function(B.repeat(times, 1), A.repeat(1, times)) if times > 1 else function(B, A)
    except (MemoryError, RuntimeError) as error:
        if "alloc" not in str(error):
            raise
        return f"asked for too much memory: {str(error)[:200]}"


# ---------------------------------------------------------------------------------------------------------------------
# Prefixes
# ---------------------------------------------------------------------------------------------------------------------
def split(function, flat, layers: int, kv_heads: int, rows: int, weights: dict) -> dict:
    """K and V of each layer, and the gradient that reaches the flat prefix from Σ weights · (K, V)."""
    flat = flat.clone().requires_grad_()
    states = {}
    for i, (K, V) in enumerate(function(flat, layers, kv_heads, rows)):
        states |= {f"K of layer {i}": K, f"V of layer {i}": V}
    found = {name: each.detach().clone() for name, each in states.items()} | {"gradient": None}
    if {name: each.shape for name, each in states.items()} == {name: each.shape for name, each in weights.items()}:
        loss = sum((states[name].double() * each).sum() for name, each in weights.items())
        found["gradient"] = gradient(loss, flat)
    return found


def look_back(function, q, k, v, prefix_k, prefix_v, mask, weights) -> dict:
    """What real tokens get, and the gradient that reaches (prefix_k, prefix_v) from Σ weights · output."""
    prefix = torch.stack([prefix_k, prefix_v]).requires_grad_()
    output = function(q, k, v, *prefix, mask)
    found = {"output": output.detach().clone(), "gradient": None}
    if output.shape == q.shape:
        output = output.masked_fill(~mask.bool()[:, None, :, None], 0.0)
        found = {"output": output.detach().clone(), "gradient": gradient((output.double() * weights).sum(), prefix)}
    return found


def fold(function, E, W1, b1, W2, b2) -> dict:
    """What goes to the file, and whether a gradient hangs on it."""
    file = function(*(nn.Parameter(each.clone()) for each in (E, W1, b1, W2, b2)))
    tensors = [each for each in file.values() if isinstance(each, torch.Tensor)] if isinstance(file, dict) else []
    return {"file": file, "gradient": any(each.requires_grad for each in tensors)}


class Decoder(nn.Module):
    """A causal model with grouped queries, and with keys and values in front of its own.

    It gives logits (rows, T, words) for token ids and positions (rows, T). `visible` (rows, T, n + T) says what each
    token sees of [prefix; text], and `past` has (K, V) of each layer, both of shape (rows, kv_heads, n, head_dim).
    """

    def __init__(self, embed: torch.Tensor, places: torch.Tensor, maps: list, head_dim: int):
        super().__init__()
        self.embed, self.places, self.maps, self.head_dim = embed, places, maps, head_dim
        self.layers, self.kv_heads = len(maps), len(maps[0][1]) // head_dim

    def states(self, ids, positions, visible, past=None) -> tuple[torch.Tensor, list]:
        """Hidden states (rows, T, d), and (K, V) of the text itself in each layer."""
        h, own = self.embed[ids] + self.places[positions], []
        bias = torch.zeros(visible.shape, dtype=h.dtype).masked_fill(~visible.bool(), -1e9).unsqueeze(-3)
        for (Wq, Wk, Wv), front in zip(self.maps, past or [None] * self.layers, strict=True):
            q, k, v = ((h @ W.T).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for W in (Wq, Wk, Wv))
            own.append((k, v))
            K, V = (torch.cat(pair, 2) for pair in zip(front, own[-1], strict=True)) if front else own[-1]
            each = nn.functional.scaled_dot_product_attention(q, K, V, attn_mask=bias, enable_gqa=True)
            h = h + each.transpose(1, 2).flatten(2)
        return h, own

    def forward(self, ids, positions, visible, past) -> torch.Tensor:
        return self.states(ids, positions, visible, past)[0] @ self.embed.T


def read_behind_prefix(function, embed, places, maps, head_dim: int, prefix, ids, mask, positions, weights) -> dict:
    """The logits of real tokens, and the gradient that reaches the prefix from Σ weights · logits."""
    prefix = prefix.clone().requires_grad_()
    logits = function(Decoder(embed, places, maps, head_dim), prefix, ids, mask, positions)
    found = {"logits": logits.detach().clone(), "gradient": None}
    if logits.shape == weights.shape:
        logits = logits.masked_fill(~mask.bool()[..., None], 0.0)
        found = {"logits": logits.detach().clone(), "gradient": gradient((logits * weights).sum(), prefix)}
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Budget
# ---------------------------------------------------------------------------------------------------------------------
def owner(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds what has this dotted name, made where it is missing, and the last part of the name."""
    *path, last = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    return root, last


def list_shapes(function, layers: list, targets: list) -> object:
    """`layers`: (dotted name, kind, d_in, d_out), on the meta device; the name of an earlier one as kind shares it."""
    from transformers.pytorch_utils import Conv1D

    make = {
        "linear": nn.Linear,
        "linear of torch's attention": nn.modules.linear.NonDynamicallyQuantizableLinear,
        "Conv1D": lambda d_in, d_out: Conv1D(d_out, d_in),
        "embedding": nn.Embedding,
        "norm": lambda d_in, _: nn.LayerNorm(d_in),
    }
    model = nn.Module()
    with torch.device("meta"):
        for name, kind, d_in, d_out in layers:
            module, last = owner(model, name)
            module.add_module(last, make[kind](d_in, d_out) if kind in make else model.get_submodule(kind))
    return call(function, model, targets)


def holding(parameters: list, ties: list, buffers: list) -> nn.Module:
    """A model of `parameters` (name, shape, type, part), `ties` (a second name, of what) and `buffers` (name, shape,
    type, whether it is saved). The part that a parameter plays is "frozen", "trains", or "idle": it could train."""
    model = nn.Module()
    for name, shape, dtype, part in parameters:
        module, last = owner(model, name)
        value = torch.ones(shape, dtype=getattr(torch, dtype))
        module.register_parameter(last, nn.Parameter(value, requires_grad=part != "frozen"))
    for name, other in ties:
        module, last = owner(model, name)
        module.register_parameter(last, model.get_parameter(other))
    for name, shape, dtype, saved in buffers:
        module, last = owner(model, name)
        module.register_buffer(last, torch.ones(shape, dtype=getattr(torch, dtype)), persistent=saved)
    return model


def bytes_before_training(function, parameters: list, ties: list, buffers: list) -> object:
    return function(holding(parameters, ties, buffers))


def bytes_after_a_step(function, parameters: list, ties: list, buffers: list, optimizer: str, settings: dict) -> object:
    """One step of training on the sum of squares of all that is not idle; then the function is called."""
    model = holding(parameters, ties, buffers)
    used = [model.get_parameter(name) for name, _, _, part in parameters if part != "idle"]
    steps = getattr(torch.optim, optimizer)([p for p in model.parameters() if p.requires_grad], **settings)
    sum(p.float().square().sum() for p in used).backward()
    steps.step()
    return function(model, steps)
