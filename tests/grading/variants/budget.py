# Answers to the assignment `budget`: wrong ones, named after the misconception, and right ones written differently.
import math

import torch
from torch import nn


# %% target_shapes wrong: the weight's shape as it is
def target_shapes(model, targets):
    return [
        tuple(layer.weight.shape)
        for name, layer in model.named_modules()
        if name.split(".")[-1] in targets and (isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D")
    ]


# %% target_shapes wrong: every weight is turned round
def target_shapes(model, targets):
    return [
        tuple(layer.weight.shape)[::-1]
        for name, layer in model.named_modules()
        if name.split(".")[-1] in targets and (isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D")
    ]


# %% target_shapes wrong: Conv1D is left out
def target_shapes(model, targets):
    return [
        (layer.in_features, layer.out_features)
        for name, layer in model.named_modules()
        if name.split(".")[-1] in targets and isinstance(layer, nn.Linear)
    ]


# %% target_shapes wrong: a name that ends so
def target_shapes(model, targets):
    found = []
    for name, layer in model.named_modules():
        if name.endswith(tuple(targets)):
            if isinstance(layer, nn.Linear):
                found.append((layer.in_features, layer.out_features))
            elif type(layer).__name__ == "Conv1D":
                found.append(tuple(layer.weight.shape))
    return found


# %% target_shapes wrong: a name that holds it
def target_shapes(model, targets):
    found = []
    for name, layer in model.named_modules():
        if any(target in name for target in targets):
            if isinstance(layer, nn.Linear):
                found.append((layer.in_features, layer.out_features))
            elif type(layer).__name__ == "Conv1D":
                found.append(tuple(layer.weight.shape))
    return found


# %% target_shapes wrong: the whole name
def target_shapes(model, targets):
    found = []
    for name, layer in model.named_modules():
        if name in targets:
            if isinstance(layer, nn.Linear):
                found.append((layer.in_features, layer.out_features))
            elif type(layer).__name__ == "Conv1D":
                found.append(tuple(layer.weight.shape))
    return found


# %% target_shapes wrong: anything with a matrix
def target_shapes(model, targets):
    found = []
    for name, layer in model.named_modules():
        weight = getattr(layer, "weight", None)
        if name.split(".")[-1] in targets and weight is not None and weight.dim() == 2:
            shape = tuple(weight.shape)
            found.append(shape if type(layer).__name__ == "Conv1D" else shape[::-1])
    return found


# %% target_shapes wrong: a shared layer twice
def target_shapes(model, targets):
    found = []
    for name, layer in model.named_modules(remove_duplicate=False):
        if name.split(".")[-1] in targets:
            if isinstance(layer, nn.Linear):
                found.append((layer.in_features, layer.out_features))
            elif type(layer).__name__ == "Conv1D":
                found.append(tuple(layer.weight.shape))
    return found


# %% target_shapes wrong: subclasses are left out
def target_shapes(model, targets):
    found = []
    for name, layer in model.named_modules():
        if name.split(".")[-1] in targets:
            if type(layer).__name__ == "Linear":
                found.append((layer.in_features, layer.out_features))
            elif type(layer).__name__ == "Conv1D":
                found.append(tuple(layer.weight.shape))
    return found


# %% target_shapes wrong: sorted by target
def target_shapes(model, targets):
    found = []
    for target in targets:
        for name, layer in model.named_modules():
            if name.split(".")[-1] == target:
                if isinstance(layer, nn.Linear):
                    found.append((layer.in_features, layer.out_features))
                elif type(layer).__name__ == "Conv1D":
                    found.append(tuple(layer.weight.shape))
    return found


# %% target_shapes wrong: each shape once
def target_shapes(model, targets):
    found = []
    for name, layer in model.named_modules():
        if name.split(".")[-1] in targets:
            shape = None
            if isinstance(layer, nn.Linear):
                shape = (layer.in_features, layer.out_features)
            elif type(layer).__name__ == "Conv1D":
                shape = tuple(layer.weight.shape)
            if shape and shape not in found:
                found.append(shape)
    return found


# %% target_shapes right: by the weight
def target_shapes(model, targets):
    found = []
    for name, layer in model.named_modules():
        conv1d = type(layer).__name__ == "Conv1D"
        if name.rpartition(".")[2] in set(targets) and (conv1d or isinstance(layer, nn.Linear)):
            rows, columns = layer.weight.shape
            found.append([rows, columns] if conv1d else [columns, rows])
    return found


# %% target_shapes right: transformers' own class, with a walk by hand
def target_shapes(model, targets):
    from transformers.pytorch_utils import Conv1D

    seen, found = set(), []

    def walk(module):
        for name, child in module.named_children():
            if id(child) in seen:
                continue
            seen.add(id(child))
            if name in targets and isinstance(child, nn.Linear | Conv1D):
                shape = child.weight.shape
                found.append(shape if isinstance(child, Conv1D) else shape[::-1])
            walk(child)

    walk(model)
    return found


# %% count_trainable wrong: the product instead of the sum
def count_trainable(method, shapes, size):
    if method not in ("lora", "adalora", "dora", "vera", "adapter"):
        raise ValueError(method)
    return sum(size * d_in * d_out for d_in, d_out in shapes)


# %% count_trainable wrong: square layers
def count_trainable(method, shapes, size):
    one = {
        "lora": lambda i, o: 2 * size * i,
        "adalora": lambda i, o: 2 * size * i + size,
        "dora": lambda i, o: 2 * size * i + i,
        "vera": lambda i, o: i + size,
        "adapter": lambda i, o: 2 * i * size + size + i,
    }
    if method not in one:
        raise ValueError(method)
    return sum(one[method](i, o) for i, o in shapes)


# %% count_trainable wrong: the adapter reads d_in
def count_trainable(method, shapes, size):
    one = {
        "lora": lambda i, o: size * (i + o),
        "adalora": lambda i, o: size * (i + o + 1),
        "dora": lambda i, o: size * (i + o) + o,
        "vera": lambda i, o: o + size,
        "adapter": lambda i, o: i * size + size + size * o + o,
    }
    if method not in one:
        raise ValueError(method)
    return sum(one[method](i, o) for i, o in shapes)


# %% count_trainable wrong: the adapter has no biases
def count_trainable(method, shapes, size):
    one = {
        "lora": lambda i, o: size * (i + o),
        "adalora": lambda i, o: size * (i + o + 1),
        "dora": lambda i, o: size * (i + o) + o,
        "vera": lambda i, o: o + size,
        "adapter": lambda i, o: 2 * o * size,
    }
    if method not in one:
        raise ValueError(method)
    return sum(one[method](i, o) for i, o in shapes)


# %% count_trainable wrong: VeRA's pair trains
def count_trainable(method, shapes, size):
    one = {
        "lora": lambda i, o: size * (i + o),
        "adalora": lambda i, o: size * (i + o + 1),
        "dora": lambda i, o: size * (i + o) + o,
        "vera": lambda i, o: o + size + size * (i + o),
        "adapter": lambda i, o: 2 * o * size + size + o,
    }
    if method not in one:
        raise ValueError(method)
    return sum(one[method](i, o) for i, o in shapes)


# %% count_trainable wrong: VeRA's r once in all
def count_trainable(method, shapes, size):
    one = {
        "lora": lambda i, o: size * (i + o),
        "adalora": lambda i, o: size * (i + o + 1),
        "dora": lambda i, o: size * (i + o) + o,
        "vera": lambda i, o: o,
        "adapter": lambda i, o: 2 * o * size + size + o,
    }
    if method not in one:
        raise ValueError(method)
    return sum(one[method](i, o) for i, o in shapes) + (size if method == "vera" else 0)


# %% count_trainable wrong: DoRA's magnitude of the inputs
def count_trainable(method, shapes, size):
    one = {
        "lora": lambda i, o: size * (i + o),
        "adalora": lambda i, o: size * (i + o + 1),
        "dora": lambda i, o: size * (i + o) + i,
        "vera": lambda i, o: o + size,
        "adapter": lambda i, o: 2 * o * size + size + o,
    }
    if method not in one:
        raise ValueError(method)
    return sum(one[method](i, o) for i, o in shapes)


# %% count_trainable wrong: one magnitude a layer
def count_trainable(method, shapes, size):
    one = {
        "lora": lambda i, o: size * (i + o),
        "adalora": lambda i, o: size * (i + o + 1),
        "dora": lambda i, o: size * (i + o) + 1,
        "vera": lambda i, o: o + size,
        "adapter": lambda i, o: 2 * o * size + size + o,
    }
    if method not in one:
        raise ValueError(method)
    return sum(one[method](i, o) for i, o in shapes)


# %% count_trainable wrong: Λ is a whole matrix
def count_trainable(method, shapes, size):
    one = {
        "lora": lambda i, o: size * (i + o),
        "adalora": lambda i, o: size * (i + o + size),
        "dora": lambda i, o: size * (i + o) + o,
        "vera": lambda i, o: o + size,
        "adapter": lambda i, o: 2 * o * size + size + o,
    }
    if method not in one:
        raise ValueError(method)
    return sum(one[method](i, o) for i, o in shapes)


# %% count_trainable wrong: copies of the first layer
def count_trainable(method, shapes, size):
    (i, o), n = shapes[0], len(shapes)
    one = {
        "lora": size * (i + o),
        "adalora": size * (i + o + 1),
        "dora": size * (i + o) + o,
        "vera": o + size,
        "adapter": 2 * o * size + size + o,
    }
    if method not in one:
        raise ValueError(method)
    return n * one[method]


# %% count_trainable wrong: an unknown method is a KeyError
def count_trainable(method, shapes, size):
    one = {
        "lora": lambda i, o: size * (i + o),
        "adalora": lambda i, o: size * (i + o + 1),
        "dora": lambda i, o: size * (i + o) + o,
        "vera": lambda i, o: o + size,
        "adapter": lambda i, o: 2 * o * size + size + o,
    }
    return sum(one[method](i, o) for i, o in shapes)


# %% count_trainable wrong: the last branch takes what is left
def count_trainable(method, shapes, size):
    total = 0
    for i, o in shapes:
        if method in ("lora", "adalora", "dora"):
            total += size * (i + o) + {"lora": 0, "adalora": size, "dora": o}[method]
        elif method == "vera":
            total += o + size
        else:
            total += 2 * o * size + size + o
    return total


# %% count_trainable right: tensors that are really made
def count_trainable(method, shapes, size):
    total = 0
    for i, o in shapes:
        with torch.device("meta"):
            pair = [torch.empty(size, i), torch.empty(o, size)]
            match method:
                case "lora":
                    parts = pair
                case "adalora":
                    parts = [*pair, torch.empty(size)]
                case "dora":
                    parts = [*pair, torch.empty(o, 1)]
                case "vera":
                    parts = [torch.empty(size), torch.empty(o)]
                case "adapter":
                    parts = [*nn.Linear(o, size).parameters(), *nn.Linear(size, o).parameters()]
                case _:
                    raise ValueError(f"unknown: {method}")
        total += sum(part.numel() for part in parts)
    return total


# %% count_trainable right: sums first, as a tensor
def count_trainable(method, shapes, size):
    if method not in {"lora", "adalora", "dora", "vera", "adapter"}:
        raise ValueError(f"{method} is no method")
    i, o = torch.tensor(shapes).view(-1, 2).sum(0)
    n = len(shapes)
    if method == "vera":
        return o + n * size
    if method == "adapter":
        return 2 * size * o + n * size + o
    return size * (i + o) + {"lora": 0, "adalora": n * size, "dora": o}[method]


# %% training_bytes wrong: everything has gradients
def training_bytes(base, own, added, width, moments=2):
    return {
        "weights": width * base + 4 * added,
        "master": 4 * own if width < 4 else 0,
        "gradients": width * base + 4 * added,
        "moments": 4 * moments * (own + added),
    }


# %% training_bytes wrong: everything has moments
def training_bytes(base, own, added, width, moments=2):
    return {
        "weights": width * base + 4 * added,
        "master": 4 * own if width < 4 else 0,
        "gradients": width * own + 4 * added,
        "moments": 4 * moments * (base + added),
    }


# %% training_bytes wrong: no master copies
def training_bytes(base, own, added, width, moments=2):
    return {
        "weights": width * base + 4 * added,
        "master": 0,
        "gradients": width * own + 4 * added,
        "moments": 4 * moments * (own + added),
    }


# %% training_bytes wrong: master copies in float32 too
def training_bytes(base, own, added, width, moments=2):
    return {
        "weights": width * base + 4 * added,
        "master": 4 * own,
        "gradients": width * own + 4 * added,
        "moments": 4 * moments * (own + added),
    }


# %% training_bytes wrong: a master copy of the whole base
def training_bytes(base, own, added, width, moments=2):
    return {
        "weights": width * base + 4 * added,
        "master": 4 * base if width < 4 else 0,
        "gradients": width * own + 4 * added,
        "moments": 4 * moments * (own + added),
    }


# %% training_bytes wrong: a master copy of the adapter
def training_bytes(base, own, added, width, moments=2):
    return {
        "weights": width * base + 4 * added,
        "master": 4 * (own + added) if width < 4 else 0,
        "gradients": width * own + 4 * added,
        "moments": 4 * moments * (own + added),
    }


# %% training_bytes wrong: the adapter is as narrow as the base
def training_bytes(base, own, added, width, moments=2):
    return {
        "weights": width * (base + added),
        "master": 4 * own if width < 4 else 0,
        "gradients": width * (own + added),
        "moments": 4 * moments * (own + added),
    }


# %% training_bytes wrong: the adapter's weights are forgotten
def training_bytes(base, own, added, width, moments=2):
    return {
        "weights": width * base,
        "master": 4 * own if width < 4 else 0,
        "gradients": width * own + 4 * added,
        "moments": 4 * moments * (own + added),
    }


# %% training_bytes wrong: what trains is no weight of the base
def training_bytes(base, own, added, width, moments=2):
    return {
        "weights": width * (base - own) + 4 * added,
        "master": 4 * own if width < 4 else 0,
        "gradients": width * own + 4 * added,
        "moments": 4 * moments * (own + added),
    }


# %% training_bytes wrong: gradients in float32
def training_bytes(base, own, added, width, moments=2):
    return {
        "weights": width * base + 4 * added,
        "master": 4 * own if width < 4 else 0,
        "gradients": 4 * (own + added),
        "moments": 4 * moments * (own + added),
    }


# %% training_bytes wrong: narrow moments
def training_bytes(base, own, added, width, moments=2):
    return {
        "weights": width * base + 4 * added,
        "master": 4 * own if width < 4 else 0,
        "gradients": width * own + 4 * added,
        "moments": moments * (width * own + 4 * added),
    }


# %% training_bytes wrong: always Adam
def training_bytes(base, own, added, width, moments=2):
    return {
        "weights": width * base + 4 * added,
        "master": 4 * own if width < 4 else 0,
        "gradients": width * own + 4 * added,
        "moments": 8 * (own + added),
    }


# %% training_bytes wrong: numbers instead of bytes
def training_bytes(base, own, added, width, moments=2):
    return {
        "weights": base + added,
        "master": own if width < 4 else 0,
        "gradients": own + added,
        "moments": moments * (own + added),
    }


# %% training_bytes wrong: master copies among the weights
def training_bytes(base, own, added, width, moments=2):
    return {
        "weights": width * base + 4 * added + (4 * own if width < 4 else 0),
        "gradients": width * own + 4 * added,
        "moments": 4 * moments * (own + added),
    }


# %% training_bytes right: three kinds of numbers, one after the other
def training_bytes(base, own, added, width, moments=2):
    kinds = (  # how many, bytes of weight, master, gradient, moments
        (base - own, width, 0, 0, 0),
        (own, width, 4 * (width < 4), width, 4 * moments),
        (added, 4, 0, 4, 4 * moments),
    )
    total = [sum(n * sizes[i] for n, *sizes in kinds) for i in range(4)]
    return dict(zip(("weights", "master", "gradients", "moments"), total, strict=True))


# %% training_bytes right: the other order, in floats
def training_bytes(base, own, added, width, moments=2):
    trained = float(own + added)
    result = {"moments": trained * moments * 4.0, "gradients": own * float(width) + added * 4.0}
    result["master"] = own * 4.0 if width in (1, 2, 3) else 0.0
    result["weights"] = base * float(width) + added * 4.0
    return result


# %% step_multiply_adds wrong: only the forward pass
def step_multiply_adds(shapes, rank, tokens):
    return tokens * sum(i * o + (rank or 0) * (i + o) for i, o in shapes)


# %% step_multiply_adds wrong: freezing saves the way back
def step_multiply_adds(shapes, rank, tokens):
    if rank is None:
        return tokens * sum(3 * i * o for i, o in shapes)
    return tokens * sum(i * o + 3 * rank * (i + o) for i, o in shapes)


# %% step_multiply_adds wrong: only the adapter
def step_multiply_adds(shapes, rank, tokens):
    if rank is None:
        return tokens * sum(3 * i * o for i, o in shapes)
    return tokens * sum(3 * rank * (i + o) for i, o in shapes)


# %% step_multiply_adds wrong: W has its gradient
def step_multiply_adds(shapes, rank, tokens):
    if rank is None:
        return tokens * sum(3 * i * o for i, o in shapes)
    return tokens * sum(3 * i * o + 3 * rank * (i + o) for i, o in shapes)


# %% step_multiply_adds wrong: operations
def step_multiply_adds(shapes, rank, tokens):
    if rank is None:
        return 2 * tokens * sum(3 * i * o for i, o in shapes)
    return 2 * tokens * sum(2 * i * o + 3 * rank * (i + o) for i, o in shapes)


# %% step_multiply_adds wrong: no tokens
def step_multiply_adds(shapes, rank, tokens):
    if rank is None:
        return sum(3 * i * o for i, o in shapes)
    return sum(2 * i * o + 3 * rank * (i + o) for i, o in shapes)


# %% step_multiply_adds wrong: rank 0 is full
def step_multiply_adds(shapes, rank, tokens):
    if not rank:
        return tokens * sum(3 * a * b for a, b in shapes)
    return tokens * sum(2 * a * b + 3 * rank * (a + b) for a, b in shapes)


# %% step_multiply_adds wrong: square layers
def step_multiply_adds(shapes, rank, tokens):
    if rank is None:
        return tokens * sum(3 * i * i for i, _ in shapes)
    return tokens * sum(2 * i * i + 6 * rank * i for i, _ in shapes)


# %% step_multiply_adds wrong: no gradients of A and B
def step_multiply_adds(shapes, rank, tokens):
    if rank is None:
        return tokens * sum(3 * i * o for i, o in shapes)
    return tokens * sum(2 * i * o + 2 * rank * (i + o) for i, o in shapes)


# %% step_multiply_adds wrong: the first layer only
def step_multiply_adds(shapes, rank, tokens):
    for i, o in shapes:
        return tokens * (3 * i * o if rank is None else 2 * i * o + 3 * rank * (i + o))


# %% step_multiply_adds wrong: a share
def step_multiply_adds(shapes, rank, tokens):
    if rank is None:
        return 1.0
    return sum(2 * i * o + 3 * rank * (i + o) for i, o in shapes) / sum(3 * i * o for i, o in shapes)


# %% step_multiply_adds right: product by product
def step_multiply_adds(shapes, rank, tokens):
    def product(rows, inner, columns):
        return rows * inner * columns

    total = 0
    for d_in, d_out in shapes:
        total += product(tokens, d_in, d_out) + product(tokens, d_out, d_in)
        if rank is None:
            total += product(d_out, tokens, d_in)
            continue
        for a, b in ((d_in, rank), (rank, d_out)):
            total += product(tokens, a, b) + product(tokens, b, a) + product(b, tokens, a)
    return total


# %% step_multiply_adds right: sums first
def step_multiply_adds(shapes, rank, tokens):
    area = sum(math.prod(shape) for shape in shapes)
    edges = sum(map(sum, shapes))
    return tokens * (3 * area if rank is None else 2 * area + 3 * rank * edges)


# %% largest_rank wrong: equal counts as cheaper
def largest_rank(base, shapes, memory, width=2):
    S, P = sum(i + o for i, o in shapes), sum(i * o for i, o in shapes)
    rank = min((memory - width * base) // (16 * S), P // (3 * S))
    if rank < 1:
        raise ValueError("no rank")
    return rank


# %% largest_rank wrong: rounded up
def largest_rank(base, shapes, memory, width=2):
    S, P = sum(i + o for i, o in shapes), sum(i * o for i, o in shapes)
    rank = min(-(-(memory - width * base) // (16 * S)), (P - 1) // (3 * S))
    if rank < 1:
        raise ValueError("no rank")
    return rank


# %% largest_rank wrong: fewer bytes than memory
def largest_rank(base, shapes, memory, width=2):
    S, P = sum(i + o for i, o in shapes), sum(i * o for i, o in shapes)
    rank = min((memory - width * base - 1) // (16 * S), (P - 1) // (3 * S))
    if rank < 1:
        raise ValueError("no rank")
    return rank


# %% largest_rank wrong: memory only
def largest_rank(base, shapes, memory, width=2):
    rank = (memory - width * base) // (16 * sum(i + o for i, o in shapes))
    if rank < 1:
        raise ValueError("no rank")
    return rank


# %% largest_rank wrong: multiply-adds only
def largest_rank(base, shapes, memory, width=2):
    rank = (sum(i * o for i, o in shapes) - 1) // (3 * sum(i + o for i, o in shapes))
    if rank < 1:
        raise ValueError("no rank")
    return rank


# %% largest_rank wrong: the larger of the two
def largest_rank(base, shapes, memory, width=2):
    S, P = sum(i + o for i, o in shapes), sum(i * o for i, o in shapes)
    rank = max((memory - width * base) // (16 * S), (P - 1) // (3 * S))
    if rank < 1:
        raise ValueError("no rank")
    return rank


# %% largest_rank wrong: the adapter's weights alone
def largest_rank(base, shapes, memory, width=2):
    S, P = sum(i + o for i, o in shapes), sum(i * o for i, o in shapes)
    rank = min((memory - width * base) // (4 * S), (P - 1) // (3 * S))
    if rank < 1:
        raise ValueError("no rank")
    return rank


# %% largest_rank wrong: no moments
def largest_rank(base, shapes, memory, width=2):
    S, P = sum(i + o for i, o in shapes), sum(i * o for i, o in shapes)
    rank = min((memory - width * base) // (8 * S), (P - 1) // (3 * S))
    if rank < 1:
        raise ValueError("no rank")
    return rank


# %% largest_rank wrong: the base is free
def largest_rank(base, shapes, memory, width=2):
    S, P = sum(i + o for i, o in shapes), sum(i * o for i, o in shapes)
    rank = min(memory // (16 * S), (P - 1) // (3 * S))
    if rank < 1:
        raise ValueError("no rank")
    return rank


# %% largest_rank wrong: always 16 bits
def largest_rank(base, shapes, memory, width=2):
    S, P = sum(i + o for i, o in shapes), sum(i * o for i, o in shapes)
    rank = min((memory - 2 * base) // (16 * S), (P - 1) // (3 * S))
    if rank < 1:
        raise ValueError("no rank")
    return rank


# %% largest_rank wrong: powers of two
def largest_rank(base, shapes, memory, width=2):
    S, P = sum(i + o for i, o in shapes), sum(i * o for i, o in shapes)
    rank = min((memory - width * base) // (16 * S), (P - 1) // (3 * S))
    if rank < 1:
        raise ValueError("no rank")
    return 2 ** (rank.bit_length() - 1)


# %% largest_rank wrong: 0 instead of an error
def largest_rank(base, shapes, memory, width=2):
    S, P = sum(i + o for i, o in shapes), sum(i * o for i, o in shapes)
    return max(0, min((memory - width * base) // (16 * S), (P - 1) // (3 * S)))


# %% largest_rank wrong: an error for the memory only
def largest_rank(base, shapes, memory, width=2):
    S, P = sum(i + o for i, o in shapes), sum(i * o for i, o in shapes)
    if memory < width * base + 16 * S:
        raise ValueError("no rank")
    return min((memory - width * base) // (16 * S), (P - 1) // (3 * S))


# %% largest_rank wrong: N/6 of the first layer
def largest_rank(base, shapes, memory, width=2):
    S = sum(i + o for i, o in shapes)
    rank = min((memory - width * base) // (16 * S), (shapes[0][0] - 1) // 6)
    if rank < 1:
        raise ValueError("no rank")
    return rank


# %% largest_rank wrong: one step too far in the loop
def largest_rank(base, shapes, memory, width=2):
    S, P = sum(i + o for i, o in shapes), sum(i * o for i, o in shapes)
    rank = 1
    if width * base + 16 * S > memory or 3 * S >= P:
        raise ValueError("no rank")
    while width * base + 16 * rank * S <= memory and 3 * rank * S < P:
        rank += 1
    return rank


# %% largest_rank right: one rank after the other
def largest_rank(base, shapes, memory, width=2):
    def possible(rank):
        numbers = sum(rank * i + rank * o for i, o in shapes)
        step = sum(2 * i * o + 3 * rank * (i + o) for i, o in shapes)
        return base * width + 4 * numbers + 4 * numbers + 8 * numbers <= memory and step < sum(
            3 * i * o for i, o in shapes
        )

    rank = 0
    while possible(rank + 1):
        rank += 1
    if rank == 0:
        raise ValueError("not even rank 1")
    return rank


# %% largest_rank right: halving
def largest_rank(base, shapes, memory, width=2):
    def bytes_of(rank):
        return width * base + 16 * sum(rank * (i + o) for i, o in shapes)

    def products_of(rank):
        return sum(2 * i * o + 3 * rank * (i + o) for i, o in shapes)

    full, low, high = 3 * sum(i * o for i, o in shapes), 0, 1 + max(max(shape) for shape in shapes)
    while high - low > 1:
        middle = (low + high) // 2
        fits = bytes_of(middle) <= memory and products_of(middle) < full
        low, high = (middle, high) if fits else (low, middle)
    if not low:
        raise ValueError("no rank is possible")
    return low


# %% kept_bytes wrong: from the state_dict
def kept_bytes(model, optimizer):
    return {
        "weights": sum(t.nbytes for t in model.state_dict().values()),
        "gradients": sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
        "optimizer": sum(v.nbytes for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)),
    }


# %% kept_bytes wrong: no buffers
def kept_bytes(model, optimizer):
    return {
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
        "optimizer": sum(v.nbytes for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)),
    }


# %% kept_bytes wrong: saved buffers only
def kept_bytes(model, optimizer):
    saved = [t for name, t in model.state_dict().items() if name in dict(model.named_buffers())]
    return {
        "weights": sum(t.nbytes for t in (*model.parameters(), *saved)),
        "gradients": sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
        "optimizer": sum(v.nbytes for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)),
    }


# %% kept_bytes wrong: tied matrices twice
def kept_bytes(model, optimizer):
    parameters = [p for _, p in model.named_parameters(remove_duplicate=False)]
    return {
        "weights": sum(t.nbytes for t in (*parameters, *model.buffers())),
        "gradients": sum(p.grad.nbytes for p in parameters if p.grad is not None),
        "optimizer": sum(v.nbytes for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)),
    }


# %% kept_bytes wrong: four bytes a number
def kept_bytes(model, optimizer):
    return {
        "weights": sum(4 * t.numel() for t in (*model.parameters(), *model.buffers())),
        "gradients": sum(4 * p.grad.numel() for p in model.parameters() if p.grad is not None),
        "optimizer": sum(
            4 * v.numel() for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)
        ),
    }


# %% kept_bytes wrong: numbers
def kept_bytes(model, optimizer):
    return {
        "weights": sum(t.numel() for t in (*model.parameters(), *model.buffers())),
        "gradients": sum(p.grad.numel() for p in model.parameters() if p.grad is not None),
        "optimizer": sum(
            v.numel() for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)
        ),
    }


# %% kept_bytes wrong: every parameter has a gradient
def kept_bytes(model, optimizer):
    return {
        "weights": sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
        "gradients": sum(p.nbytes for p in model.parameters()),
        "optimizer": sum(v.nbytes for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)),
    }


# %% kept_bytes wrong: a gradient wherever one is required
def kept_bytes(model, optimizer):
    return {
        "weights": sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
        "gradients": sum(p.nbytes for p in model.parameters() if p.requires_grad),
        "optimizer": sum(v.nbytes for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)),
    }


# %% kept_bytes wrong: two moments of what trains
def kept_bytes(model, optimizer):
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    return {
        "weights": sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
        "gradients": gradients,
        "optimizer": 2 * gradients,
    }


# %% kept_bytes wrong: two moments by name
def kept_bytes(model, optimizer):
    names = ("step", "exp_avg", "exp_avg_sq")
    return {
        "weights": sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
        "gradients": sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
        "optimizer": sum(s[name].nbytes for s in optimizer.state.values() for name in names if name in s),
    }


# %% kept_bytes wrong: no step counters
def kept_bytes(model, optimizer):
    return {
        "weights": sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
        "gradients": sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
        "optimizer": sum(
            v.nbytes
            for s in optimizer.state.values()
            for name, v in s.items()
            if isinstance(v, torch.Tensor) and name != "step"
        ),
    }


# %% kept_bytes wrong: gradients after zero_grad
def kept_bytes(model, optimizer):
    optimizer.zero_grad()
    return {
        "weights": sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
        "gradients": sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
        "optimizer": sum(v.nbytes for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)),
    }


# %% kept_bytes right: storages, each once
def kept_bytes(model, optimizer):
    def weigh(tensors):
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    parameters = [p for m in model.modules() for p in m._parameters.values() if p is not None]
    buffers = [b for m in model.modules() for b in m._buffers.values() if b is not None]
    state = [v for each in optimizer.state.values() for v in each.values() if torch.is_tensor(v)]
    gradients = [p.grad for p in parameters if p.grad is not None]
    return {"gradients": weigh(gradients), "optimizer": weigh(state), "weights": weigh([*parameters, *buffers])}


# %% kept_bytes right: from the optimizer's own state_dict
def kept_bytes(model, optimizer):
    found = {"weights": 0, "gradients": 0, "optimizer": 0}
    for _, tensor in (*model.named_parameters(), *model.named_buffers()):
        found["weights"] += tensor.numel() * tensor.element_size()
        if tensor.grad is not None:
            found["gradients"] += tensor.grad.numel() * tensor.grad.element_size()
    for each in optimizer.state_dict()["state"].values():
        for value in each.values():
            if isinstance(value, torch.Tensor):
                found["optimizer"] += value.numel() * value.element_size()
    return found


# %% repaired_memory wrong: as it was
def repaired_memory(model):
    parameters = [p for _, p in model.named_parameters(remove_duplicate=False)]
    return {
        "weights": sum(p.nbytes for p in parameters) + sum(b.nbytes for b in model.buffers()),
        "master": sum(4 * p.numel() for p in parameters),
        "gradients": sum(p.nbytes for p in parameters),
        "moments": sum(2 * p.nbytes for p in parameters),
    }


# %% repaired_memory wrong: tied matrices twice
def repaired_memory(model):
    parameters = [p for _, p in model.named_parameters(remove_duplicate=False)]
    trained = [p for p in parameters if p.requires_grad]
    return {
        "weights": sum(p.nbytes for p in parameters) + sum(b.nbytes for b in model.buffers()),
        "master": sum(4 * p.numel() for p in trained if p.element_size() < 4),
        "gradients": sum(p.nbytes for p in trained),
        "moments": sum(8 * p.numel() for p in trained),
    }


# %% repaired_memory wrong: tied only mended for the weights
def repaired_memory(model):
    trained = [p for _, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    return {
        "weights": sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers()),
        "master": sum(4 * p.numel() for p in trained if p.element_size() < 4),
        "gradients": sum(p.nbytes for p in trained),
        "moments": sum(8 * p.numel() for p in trained),
    }


# %% repaired_memory wrong: what is frozen has gradients
def repaired_memory(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    return {
        "weights": sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
        "master": sum(4 * p.numel() for p in trained if p.element_size() < 4),
        "gradients": sum(p.nbytes for p in model.parameters()),
        "moments": sum(8 * p.numel() for p in trained),
    }


# %% repaired_memory wrong: what is frozen has a master copy
def repaired_memory(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    return {
        "weights": sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
        "master": sum(4 * p.numel() for p in model.parameters() if p.element_size() < 4),
        "gradients": sum(p.nbytes for p in trained),
        "moments": sum(8 * p.numel() for p in trained),
    }


# %% repaired_memory wrong: float32 has a master copy
def repaired_memory(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    return {
        "weights": sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
        "master": sum(4 * p.numel() for p in trained),
        "gradients": sum(p.nbytes for p in trained),
        "moments": sum(8 * p.numel() for p in trained),
    }


# %% repaired_memory wrong: no master copies
def repaired_memory(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    return {
        "weights": sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
        "master": 0,
        "gradients": sum(p.nbytes for p in trained),
        "moments": sum(8 * p.numel() for p in trained),
    }


# %% repaired_memory wrong: narrow moments
def repaired_memory(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    return {
        "weights": sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
        "master": sum(4 * p.numel() for p in trained if p.element_size() < 4),
        "gradients": sum(p.nbytes for p in trained),
        "moments": sum(2 * p.nbytes for p in trained),
    }


# %% repaired_memory wrong: gradients in float32
def repaired_memory(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    return {
        "weights": sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
        "master": sum(4 * p.numel() for p in trained if p.element_size() < 4),
        "gradients": sum(4 * p.numel() for p in trained),
        "moments": sum(8 * p.numel() for p in trained),
    }


# %% repaired_memory wrong: the buffers were lost
def repaired_memory(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    return {
        "weights": sum(p.nbytes for p in model.parameters()),
        "master": sum(4 * p.numel() for p in trained if p.element_size() < 4),
        "gradients": sum(p.nbytes for p in trained),
        "moments": sum(8 * p.numel() for p in trained),
    }


# %% repaired_memory wrong: the base's first type for all
def repaired_memory(model):
    width = next(model.parameters()).element_size()
    trained = [p for p in model.parameters() if p.requires_grad]
    return {
        "weights": sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
        "master": sum(4 * p.numel() for p in trained) if width < 4 else 0,
        "gradients": sum(width * p.numel() for p in trained),
        "moments": sum(8 * p.numel() for p in trained),
    }


# %% repaired_memory wrong: one sum
def repaired_memory(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers())) + sum(12 * p.numel() for p in trained)


# %% repaired_memory right: by identity
def repaired_memory(model):
    found = dict.fromkeys(("weights", "master", "gradients", "moments"), 0)
    for p in {id(p): p for _, p in model.named_parameters(remove_duplicate=False)}.values():
        n, width = p.numel(), p.element_size()
        found["weights"] += n * width
        if p.requires_grad:
            found["gradients"] += n * width
            found["moments"] += n * 4 + n * 4
            found["master"] += n * 4 if width < 4 else 0
    found["weights"] += sum(b.numel() * b.element_size() for b in model.buffers())
    return found


# %% repaired_memory right: counted by torch, in floats
def repaired_memory(model):
    trained = list(filter(lambda p: p.requires_grad, model.parameters()))
    sizes = torch.tensor(
        [[p.numel(), p.nbytes, 4 * p.numel() * (p.itemsize < 4)] for p in trained], dtype=torch.float64
    )
    numbers, gradients, master = sizes.view(-1, 3).sum(0)
    weights = sum(map(lambda t: t.nbytes, [*model.parameters(), *model.buffers()]))
    return {"weights": float(weights), "master": master, "gradients": gradients, "moments": 8 * numbers.item()}


# %% step_multiply_adds wrong: equal layers once
def step_multiply_adds(shapes, rank, tokens):
    if rank is None:
        return tokens * sum(3 * a * b for a, b in set(shapes))
    return tokens * sum(2 * a * b + 3 * rank * (a + b) for a, b in set(shapes))


# %% step_multiply_adds wrong: added up in float32
def step_multiply_adds(shapes, rank, tokens):
    total = torch.zeros((), dtype=torch.float32)
    for d_in, d_out in shapes:
        total += tokens * (3 * d_in * d_out if rank is None else 2 * d_in * d_out + 3 * rank * (d_in + d_out))
    return int(total)


# %% kept_bytes wrong: gradients that do not exist are made
def kept_bytes(model, optimizer):
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None and p.requires_grad else p.grad
    state = [value for each in optimizer.state.values() for value in each.values()]
    return {
        "weights": sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
        "gradients": sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
        "optimizer": sum(value.nbytes for value in state if isinstance(value, torch.Tensor)),
    }


# %% target_shapes right: a generator
def target_shapes(model, targets):
    for name, layer in model.named_modules():
        if name.split(".")[-1] in targets and (isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"):
            shape = tuple(layer.weight.shape)
            yield shape[::-1] if isinstance(layer, nn.Linear) else shape


# %% largest_rank wrong: a loop that ends at the smallest side
def largest_rank(base, shapes, memory, width=2):
    best = 0
    for r in range(1, min(min(s) for s in shapes) + 1):
        added = sum(r * (i + o) for i, o in shapes)
        cheaper = sum(2 * i * o + 3 * r * (i + o) for i, o in shapes) < sum(3 * i * o for i, o in shapes)
        if width * base + 16 * added <= memory and cheaper:
            best = r
    if not best:
        raise ValueError("no rank")
    return best


# %% count_trainable wrong: sums in float32
def count_trainable(method, shapes, size):
    one = {
        "lora": lambda i, o: size * (i + o),
        "adalora": lambda i, o: size * (i + o + 1),
        "dora": lambda i, o: size * (i + o) + o,
        "vera": lambda i, o: o + size,
        "adapter": lambda i, o: 2 * o * size + size + o,
    }
    if method not in one:
        raise ValueError(method)
    return int(torch.tensor([float(one[method](i, o)) for i, o in shapes]).sum())


# %% count_trainable wrong: the rank is at most a side
def count_trainable(method, shapes, size):
    one = {
        "lora": lambda i, o: min(size, i, o) * (i + o),
        "adalora": lambda i, o: size * (i + o + 1),
        "dora": lambda i, o: size * (i + o) + o,
        "vera": lambda i, o: o + size,
        "adapter": lambda i, o: 2 * o * size + size + o,
    }
    if method not in one:
        raise ValueError(method)
    return sum(one[method](i, o) for i, o in shapes)


# %% kept_bytes wrong: gradients of zeros are left out
def kept_bytes(model, optimizer):
    state = [v for each in optimizer.state.values() for v in each.values()]
    return {
        "weights": sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
        "gradients": sum(p.grad.nbytes for p in model.parameters() if p.grad is not None and p.grad.any()),
        "optimizer": sum(v.nbytes for v in state if isinstance(v, torch.Tensor)),
    }


# %% kept_bytes wrong: plain numbers have bytes
def kept_bytes(model, optimizer):
    held = [*model.parameters(), *model.buffers()]
    return {
        "weights": sum(t.nbytes for t in held),
        "gradients": sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
        "optimizer": sum(v.nbytes for state in optimizer.state.values() for v in state.values()),
    }


# %% largest_rank wrong: at most a thousand
def largest_rank(base, shapes, memory, width=2):
    S, P = sum(a + b for a, b in shapes), sum(a * b for a, b in shapes)
    best = 0
    for r in range(1, 1001):
        if width * base + 16 * r * S <= memory and 2 * P + 3 * r * S < 3 * P:
            best = r
    if not best:
        raise ValueError("none")
    return best


# %% largest_rank wrong: float32 arithmetic
def largest_rank(base, shapes, memory, width=2):
    S, P = sum(a + b for a, b in shapes), sum(a * b for a, b in shapes)
    room = torch.tensor(float(memory)) - torch.tensor(float(width * base))
    r = min(int(room // (16 * S)), (P - 1) // (3 * S))
    if r < 1:
        raise ValueError("none")
    return r


# %% target_shapes wrong: targets joined to one text
def target_shapes(model, targets):
    text = " ".join(targets)
    return [
        (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else tuple(layer.weight.shape)
        for name, layer in model.named_modules()
        if name.split(".")[-1] in text and (isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D")
    ]


# %% target_shapes wrong: targets in small letters
def target_shapes(model, targets):
    wanted, found = {target.lower() for target in targets}, []
    for name, layer in model.named_modules():
        if name.split(".")[-1] in wanted and (isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"):
            shape = tuple(layer.weight.shape)
            found.append(shape[::-1] if isinstance(layer, nn.Linear) else shape)
    return found


# %% largest_rank wrong: tries ranks one by one and stops at 4096
def largest_rank(base, shapes, memory, width=2):
    S = sum(a + b for a, b in shapes)
    P = sum(a * b for a, b in shapes)
    best = 0
    for r in range(1, 4097):
        if width * base + 16 * r * S <= memory and 3 * r * S < P:
            best = r
    if not best:
        raise ValueError("none")
    return best


# %% largest_rank wrong: no shape is a ZeroDivisionError
def largest_rank(base, shapes, memory, width=2):
    S = sum(a + b for a, b in shapes)
    P = sum(a * b for a, b in shapes)
    r = min((memory - width * base) // (16 * S), (P - 1) // (3 * S))
    if r < 1:
        raise ValueError("none")
    return r


# %% largest_rank right: bisection
def largest_rank(base, shapes, memory, width=2):
    S = sum(a + b for a, b in shapes)
    P = sum(a * b for a, b in shapes)

    def fits(r):
        return width * base + 16 * r * S <= memory and 2 * P + 3 * r * S < 3 * P

    if not fits(1) or not S:
        raise ValueError("not even rank 1")
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        mid = (low + high) // 2
        low, high = (mid, high) if fits(mid) else (low, mid)
    return low
