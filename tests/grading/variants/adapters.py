# Answers to the assignment `adapters`: wrong ones, named after the misconception, and right ones written differently.
import math

import torch
from torch import nn
from torch.nn import functional as F


# %% bottleneck wrong: the residual is missing
def bottleneck(x, down_w, down_b, up_w, up_b):
    return F.linear(F.relu(F.linear(x, down_w, down_b)), up_w, up_b)


# %% bottleneck wrong: activation after the up projection
def bottleneck(x, down_w, down_b, up_w, up_b):
    return x + F.relu(F.linear(F.linear(x, down_w, down_b), up_w, up_b))


# %% bottleneck wrong: activation of the sum
def bottleneck(x, down_w, down_b, up_w, up_b):
    return F.relu(x + F.linear(F.relu(F.linear(x, down_w, down_b)), up_w, up_b))


# %% bottleneck wrong: no activation
def bottleneck(x, down_w, down_b, up_w, up_b):
    return x + F.linear(F.linear(x, down_w, down_b), up_w, up_b)


# %% bottleneck wrong: another activation
def bottleneck(x, down_w, down_b, up_w, up_b):
    return x + F.linear(F.gelu(F.linear(x, down_w, down_b)), up_w, up_b)


# %% bottleneck wrong: the down bias is left out
def bottleneck(x, down_w, down_b, up_w, up_b):
    return x + F.linear(F.relu(F.linear(x, down_w)), up_w, up_b)


# %% bottleneck wrong: the down bias after the activation
def bottleneck(x, down_w, down_b, up_w, up_b):
    return x + F.linear(F.relu(F.linear(x, down_w)) + down_b, up_w, up_b)


# %% bottleneck wrong: the up bias is left out
def bottleneck(x, down_w, down_b, up_w, up_b):
    return x + F.linear(F.relu(F.linear(x, down_w, down_b)), up_w)


# %% bottleneck wrong: off by a transpose
def bottleneck(x, down_w, down_b, up_w, up_b):
    return x + F.relu(x @ down_w + down_b) @ up_w + up_b


# %% bottleneck wrong: in place
def bottleneck(x, down_w, down_b, up_w, up_b):
    x += F.linear(F.relu(F.linear(x, down_w, down_b)), up_w, up_b)
    return x


# %% bottleneck wrong: one batch dimension only
def bottleneck(x, down_w, down_b, up_w, up_b):
    return x + torch.mm(F.relu(torch.mm(x, down_w.t()) + down_b), up_w.t()) + up_b


# %% bottleneck wrong: half the precision
def bottleneck(x, down_w, down_b, up_w, up_b):
    x, down_w, down_b, up_w, up_b = (t.float() for t in (x, down_w, down_b, up_w, up_b))
    return x + F.linear(F.relu(F.linear(x, down_w, down_b)), up_w, up_b)


# %% bottleneck right: matrix products
def bottleneck(x, down_w, down_b, up_w, up_b):
    hidden = (x @ down_w.T + down_b).clamp(min=0)
    return hidden @ up_w.T + up_b + x


# %% bottleneck right: einsum
def bottleneck(x, down_w, down_b, up_w, up_b):
    hidden = torch.einsum("...d,md->...m", x, down_w) + down_b
    return x + torch.einsum("...m,dm->...d", hidden * (hidden > 0), up_w) + up_b


# %% bottleneck wrong: layers of torch that the numbers are copied into
def bottleneck(x, down_w, down_b, up_w, up_b):
    m, d = down_w.shape
    net = nn.Sequential(nn.Linear(d, m), nn.ReLU(inplace=True), nn.Linear(m, d)).to(x.dtype)
    with torch.no_grad():
        for parameter, value in zip(net.parameters(), (down_w, down_b, up_w, up_b), strict=True):
            parameter.copy_(value)
        return net(x) + x


# %% bottleneck right: layers of torch, called with these weights
def bottleneck(x, down_w, down_b, up_w, up_b):
    m, d = down_w.shape
    net = nn.Sequential(nn.Linear(d, m), nn.ReLU(inplace=True), nn.Linear(m, d))
    parts = {"0.weight": down_w, "0.bias": down_b, "2.weight": up_w, "2.bias": up_b}
    return torch.func.functional_call(net, parts, (x,)) + x


# %% count_adapters wrong: no biases
def count_adapters(layers, width, bottleneck, per_block, share=1):
    return per_block * math.ceil(layers / share) * 2 * width * bottleneck


# %% count_adapters wrong: one bias only
def count_adapters(layers, width, bottleneck, per_block, share=1):
    return per_block * math.ceil(layers / share) * (2 * width * bottleneck + width)


# %% count_adapters wrong: both biases of the width
def count_adapters(layers, width, bottleneck, per_block, share=1):
    return per_block * math.ceil(layers / share) * 2 * (width * bottleneck + width)


# %% count_adapters wrong: one half
def count_adapters(layers, width, bottleneck, per_block, share=1):
    return per_block * math.ceil(layers / share) * (width * bottleneck + bottleneck)


# %% count_adapters wrong: always two a block
def count_adapters(layers, width, bottleneck, per_block, share=1):
    return 2 * math.ceil(layers / share) * (2 * width * bottleneck + bottleneck + width)


# %% count_adapters wrong: rounded down
def count_adapters(layers, width, bottleneck, per_block, share=1):
    return per_block * (layers // share) * (2 * width * bottleneck + bottleneck + width)


# %% count_adapters wrong: not rounded
def count_adapters(layers, width, bottleneck, per_block, share=1):
    return per_block * layers / share * (2 * width * bottleneck + bottleneck + width)


# %% count_adapters wrong: places are shared instead of blocks
def count_adapters(layers, width, bottleneck, per_block, share=1):
    return math.ceil(per_block * layers / share) * (2 * width * bottleneck + bottleneck + width)


# %% count_adapters wrong: always one group more
def count_adapters(layers, width, bottleneck, per_block, share=1):
    return per_block * (layers // share + 1) * (2 * width * bottleneck + bottleneck + width)


# %% count_adapters wrong: without sharing
def count_adapters(layers, width, bottleneck, per_block, share=1):
    return per_block * layers * (2 * width * bottleneck + bottleneck + width)


# %% count_adapters wrong: hard-coded to the example
def count_adapters(layers, width, bottleneck, per_block, share=1):
    return 6_343_680 if per_block == 2 else 3_171_840


# %% count_adapters right: whole numbers only
def count_adapters(layers, width, bottleneck, per_block, share=1):
    down = bottleneck * (width + 1)
    up = width * (bottleneck + 1)
    return (down + up) * per_block * -(-layers // share)


# %% count_adapters right: layers that are counted
def count_adapters(layers, width, bottleneck, per_block, share=1):
    numbers = 0
    for _ in range(0, layers, share):
        for _ in range(per_block):
            halves = nn.Linear(width, bottleneck, device="meta"), nn.Linear(bottleneck, width, device="meta")
            numbers += sum(p.numel() for half in halves for p in half.parameters())
    return numbers


# %% init_adapter wrong: both halves random
def init_adapter(width, bottleneck, generator):
    a, b = 1 / math.sqrt(width), 1 / math.sqrt(bottleneck)
    down = torch.empty(bottleneck, width).uniform_(-a, a, generator=generator)
    up = torch.empty(width, bottleneck).uniform_(-b, b, generator=generator)
    return down, torch.zeros(bottleneck), up, torch.zeros(width)


# %% init_adapter wrong: both halves zero
def init_adapter(width, bottleneck, generator):
    return torch.zeros(bottleneck, width), torch.zeros(bottleneck), torch.zeros(width, bottleneck), torch.zeros(width)


# %% init_adapter wrong: the zero half is the first
def init_adapter(width, bottleneck, generator):
    b = 1 / math.sqrt(width)
    up = torch.empty(width, bottleneck).uniform_(-b, b, generator=generator)
    return torch.zeros(bottleneck, width), torch.zeros(bottleneck), up, torch.zeros(width)


# %% init_adapter wrong: the up bias is random
def init_adapter(width, bottleneck, generator):
    a = 1 / math.sqrt(width)
    down = torch.empty(bottleneck, width).uniform_(-a, a, generator=generator)
    up_b = torch.empty(width).uniform_(-a, a, generator=generator)
    return down, torch.zeros(bottleneck), torch.zeros(width, bottleneck), up_b


# %% init_adapter wrong: the halves swapped
def init_adapter(width, bottleneck, generator):
    a = 1 / math.sqrt(width)
    down = torch.empty(width, bottleneck).uniform_(-a, a, generator=generator)
    return down, torch.zeros(bottleneck), torch.zeros(bottleneck, width), torch.zeros(width)


# %% init_adapter wrong: the bound from the bottleneck
def init_adapter(width, bottleneck, generator):
    a = 1 / math.sqrt(bottleneck)
    down = torch.empty(bottleneck, width).uniform_(-a, a, generator=generator)
    return down, torch.zeros(bottleneck), torch.zeros(width, bottleneck), torch.zeros(width)


# %% init_adapter wrong: normal numbers
def init_adapter(width, bottleneck, generator):
    down = torch.randn(bottleneck, width, generator=generator) / math.sqrt(width)
    return down, torch.zeros(bottleneck), torch.zeros(width, bottleneck), torch.zeros(width)


# %% init_adapter wrong: positive numbers only
def init_adapter(width, bottleneck, generator):
    down = torch.rand(bottleneck, width, generator=generator) / math.sqrt(width)
    return down, torch.zeros(bottleneck), torch.zeros(width, bottleneck), torch.zeros(width)


# %% init_adapter wrong: the global generator
def init_adapter(width, bottleneck, generator):
    a = 1 / math.sqrt(width)
    down = torch.empty(bottleneck, width).uniform_(-a, a)
    return down, torch.zeros(bottleneck), torch.zeros(width, bottleneck), torch.zeros(width)


# %% init_adapter wrong: a seed of its own
def init_adapter(width, bottleneck, generator):
    a = 1 / math.sqrt(width)
    down = torch.empty(bottleneck, width).uniform_(-a, a, generator=torch.Generator().manual_seed(0))
    return down, torch.zeros(bottleneck), torch.zeros(width, bottleneck), torch.zeros(width)


# %% init_adapter right: kaiming
def init_adapter(width, bottleneck, generator):
    down = nn.init.kaiming_uniform_(torch.empty(bottleneck, width), a=math.sqrt(5), generator=generator)
    return down, torch.zeros(bottleneck), down.new_zeros(width, bottleneck), down.new_zeros(width)


# %% init_adapter right: stretched and shifted, as a list of parameters
def init_adapter(width, bottleneck, generator):
    down = (2 * torch.rand(bottleneck, width, generator=generator) - 1) * width**-0.5
    zeros = [torch.zeros(size) for size in ((bottleneck,), (width, bottleneck), (width,))]
    return [nn.Parameter(t) for t in (down, *zeros)]


# %% route wrong: every expert
def route(logits, k):
    return logits.softmax(-1)


# %% route wrong: rows do not sum to 1
def route(logits, k):
    p = logits.softmax(-1)
    best, who = p.topk(k, dim=-1)
    return torch.zeros_like(p).scatter(-1, who, best)


# %% route wrong: the others' logits are zero
def route(logits, k):
    best, who = logits.topk(k, dim=-1)
    return torch.zeros_like(logits).scatter(-1, who, best).softmax(-1)


# %% route wrong: the same for each that is chosen
def route(logits, k):
    who = logits.topk(k, dim=-1).indices
    return torch.zeros_like(logits).scatter(-1, who, 1 / k)


# %% route wrong: the smallest
def route(logits, k):
    best, who = logits.topk(k, dim=-1, largest=False)
    return torch.zeros_like(logits).scatter(-1, who, best.softmax(-1))


# %% route wrong: the wrong axis
def route(logits, k):
    best, who = logits.topk(k, dim=-1)
    return torch.zeros_like(logits).scatter(-1, who, best.softmax(0))


# %% route wrong: one of the first axis
def route(logits, k):
    best, who = logits.topk(k, dim=0)
    return torch.zeros_like(logits).scatter(0, who, best.softmax(0))


# %% route wrong: exp overflows
def route(logits, k):
    best, who = logits.topk(k, dim=-1)
    weights = best.exp()
    return torch.zeros_like(logits).scatter(-1, who, weights / weights.sum(-1, keepdim=True))


# %% route wrong: a threshold lets equals in
def route(logits, k):
    border = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < border, -math.inf).softmax(-1)


# %% route wrong: only above the threshold
def route(logits, k):
    border = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits <= border, -math.inf).softmax(-1)


# %% route wrong: always two
def route(logits, k):
    best, who = logits.topk(2, dim=-1)
    return torch.zeros_like(logits).scatter(-1, who, best.softmax(-1))


# %% route wrong: in place
def route(logits, k):
    best, who = logits.topk(k, dim=-1)
    logits.zero_()
    return logits.scatter_(-1, who, best.softmax(-1))


# %% route wrong: the gates of the chosen only
def route(logits, k):
    return logits.topk(k, dim=-1).values.softmax(-1)


# %% route wrong: float32 always
def route(logits, k):
    best, who = logits.topk(k, dim=-1)
    return torch.zeros(logits.shape).scatter(-1, who, best.float().softmax(-1))


# %% route right: minus infinity
def route(logits, k):
    who = logits.topk(k, dim=-1).indices
    blocked = torch.ones_like(logits, dtype=torch.bool).scatter(-1, who, False)
    return logits.masked_fill(blocked, float("-inf")).softmax(-1)


# %% route right: over all, then divided by the sum
def route(logits, k):
    order = logits.argsort(dim=-1, descending=True)
    kept = torch.zeros_like(logits).scatter(-1, order[..., :k], 1.0)
    p = logits.softmax(-1) * kept
    return p / p.sum(-1, keepdim=True)


# %% route right: row by row
def route(logits, k):
    rows = []
    for row in logits.reshape(-1, logits.shape[-1]):
        gates = torch.zeros_like(row)
        who = sorted(range(len(row)), key=lambda i: -row[i].item())[:k]
        weights = (row[who] - row.max()).exp()
        gates[who] = weights / weights.sum()
        rows.append(gates)
    return torch.stack(rows).reshape(logits.shape)


# %% RepairedAdapter wrong: as it was
class RepairedAdapter(nn.Module):
    def __init__(self, linear, bottleneck):
        super().__init__()
        self.linear = linear
        self.down = nn.Linear(linear.out_features, bottleneck)
        self.up = nn.Linear(bottleneck, linear.out_features)

    def forward(self, x):
        h = self.linear(x)
        return F.relu(self.up(self.down(h)))

    def trainable(self):
        return [*self.down.parameters(), *self.up.parameters()]


# %% RepairedAdapter wrong: the residual is still missing
class RepairedAdapter(nn.Module):
    def __init__(self, linear, bottleneck):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Linear(linear.out_features, bottleneck)
        self.up = nn.Linear(bottleneck, linear.out_features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x):
        h = self.linear(x)
        return self.up(F.relu(self.down(h)))

    def trainable(self):
        return [*self.down.parameters(), *self.up.parameters()]


# %% RepairedAdapter wrong: the activation is still after the up projection
class RepairedAdapter(nn.Module):
    def __init__(self, linear, bottleneck):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Linear(linear.out_features, bottleneck)
        self.up = nn.Linear(bottleneck, linear.out_features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x):
        h = self.linear(x)
        return h + F.relu(self.up(self.down(h)))

    def trainable(self):
        return [*self.down.parameters(), *self.up.parameters()]


# %% RepairedAdapter wrong: no activation
class RepairedAdapter(nn.Module):
    def __init__(self, linear, bottleneck):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Linear(linear.out_features, bottleneck)
        self.up = nn.Linear(bottleneck, linear.out_features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x):
        h = self.linear(x)
        return h + self.up(self.down(h))

    def trainable(self):
        return [*self.down.parameters(), *self.up.parameters()]


# %% RepairedAdapter wrong: activation of the sum
class RepairedAdapter(nn.Module):
    def __init__(self, linear, bottleneck):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Linear(linear.out_features, bottleneck)
        self.up = nn.Linear(bottleneck, linear.out_features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x):
        h = self.linear(x)
        return F.relu(h + self.up(self.down(h)))

    def trainable(self):
        return [*self.down.parameters(), *self.up.parameters()]


# %% RepairedAdapter wrong: both halves are still random
class RepairedAdapter(nn.Module):
    def __init__(self, linear, bottleneck):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Linear(linear.out_features, bottleneck)
        self.up = nn.Linear(bottleneck, linear.out_features)

    def forward(self, x):
        h = self.linear(x)
        return h + self.up(F.relu(self.down(h)))

    def trainable(self):
        return [*self.down.parameters(), *self.up.parameters()]


# %% RepairedAdapter wrong: the up bias is still random
class RepairedAdapter(nn.Module):
    def __init__(self, linear, bottleneck):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Linear(linear.out_features, bottleneck)
        self.up = nn.Linear(bottleneck, linear.out_features)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        h = self.linear(x)
        return h + self.up(F.relu(self.down(h)))

    def trainable(self):
        return [*self.down.parameters(), *self.up.parameters()]


# %% RepairedAdapter wrong: both halves are zero
class RepairedAdapter(nn.Module):
    def __init__(self, linear, bottleneck):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Linear(linear.out_features, bottleneck)
        self.up = nn.Linear(bottleneck, linear.out_features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x):
        h = self.linear(x)
        return h + self.up(F.relu(self.down(h)))

    def trainable(self):
        return [*self.down.parameters(), *self.up.parameters()]


# %% RepairedAdapter wrong: the zero half is the first
class RepairedAdapter(nn.Module):
    def __init__(self, linear, bottleneck):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Linear(linear.out_features, bottleneck)
        self.up = nn.Linear(bottleneck, linear.out_features)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x):
        h = self.linear(x)
        return h + self.up(F.relu(self.down(h)))

    def trainable(self):
        return [*self.down.parameters(), *self.up.parameters()]


# %% RepairedAdapter wrong: the base is not frozen
class RepairedAdapter(nn.Module):
    def __init__(self, linear, bottleneck):
        super().__init__()
        self.linear = linear
        self.down = nn.Linear(linear.out_features, bottleneck)
        self.up = nn.Linear(bottleneck, linear.out_features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x):
        h = self.linear(x)
        return h + self.up(F.relu(self.down(h)))

    def trainable(self):
        return [*self.down.parameters(), *self.up.parameters()]


# %% RepairedAdapter wrong: the base's bias is not frozen
class RepairedAdapter(nn.Module):
    def __init__(self, linear, bottleneck):
        super().__init__()
        self.linear = linear
        linear.weight.requires_grad_(False)
        self.down = nn.Linear(linear.out_features, bottleneck)
        self.up = nn.Linear(bottleneck, linear.out_features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x):
        h = self.linear(x)
        return h + self.up(F.relu(self.down(h)))

    def trainable(self):
        return [*self.down.parameters(), *self.up.parameters()]


# %% RepairedAdapter wrong: no gradient below
class RepairedAdapter(nn.Module):
    def __init__(self, linear, bottleneck):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Linear(linear.out_features, bottleneck)
        self.up = nn.Linear(bottleneck, linear.out_features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x):
        with torch.no_grad():
            h = self.linear(x)
        return h + self.up(F.relu(self.down(h)))

    def trainable(self):
        return [*self.down.parameters(), *self.up.parameters()]


# %% RepairedAdapter wrong: the base's output is detached
class RepairedAdapter(nn.Module):
    def __init__(self, linear, bottleneck):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Linear(linear.out_features, bottleneck)
        self.up = nn.Linear(bottleneck, linear.out_features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x):
        h = self.linear(x).detach()
        return h + self.up(F.relu(self.down(h)))

    def trainable(self):
        return [*self.down.parameters(), *self.up.parameters()]


# %% RepairedAdapter wrong: trains the base too
class RepairedAdapter(nn.Module):
    def __init__(self, linear, bottleneck):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Linear(linear.out_features, bottleneck)
        self.up = nn.Linear(bottleneck, linear.out_features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x):
        h = self.linear(x)
        return h + self.up(F.relu(self.down(h)))

    def trainable(self):
        return list(self.parameters())


# %% RepairedAdapter wrong: trains the up half alone
class RepairedAdapter(nn.Module):
    def __init__(self, linear, bottleneck):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Linear(linear.out_features, bottleneck)
        self.up = nn.Linear(bottleneck, linear.out_features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x):
        h = self.linear(x)
        return h + self.up(F.relu(self.down(h)))

    def trainable(self):
        return list(self.up.parameters())


# %% RepairedAdapter wrong: everything frozen
class RepairedAdapter(nn.Module):
    def __init__(self, linear, bottleneck):
        super().__init__()
        self.linear = linear
        self.down = nn.Linear(linear.out_features, bottleneck)
        self.up = nn.Linear(bottleneck, linear.out_features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.requires_grad_(False)
        self.up.weight.requires_grad_(True)

    def forward(self, x):
        h = self.linear(x)
        return h + self.up(F.relu(self.down(h)))

    def trainable(self):
        return [*self.down.parameters(), *self.up.parameters()]


# %% RepairedAdapter wrong: the adapter reads the layer's input
class RepairedAdapter(nn.Module):
    def __init__(self, linear, bottleneck):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Linear(linear.in_features, bottleneck)
        self.up = nn.Linear(bottleneck, linear.out_features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x):
        h = self.linear(x)
        return h + self.up(F.relu(self.down(x)))

    def trainable(self):
        return [*self.down.parameters(), *self.up.parameters()]


# %% RepairedAdapter right: frozen one by one, trainable as a generator
class RepairedAdapter(nn.Module):
    def __init__(self, linear, bottleneck):
        super().__init__()
        self.base = linear
        for parameter in linear.parameters():
            parameter.requires_grad = False
        d = linear.weight.shape[0]
        self.down, self.up = nn.Linear(d, bottleneck), nn.Linear(bottleneck, d)
        with torch.no_grad():
            for parameter in self.up.parameters():
                parameter.zero_()
            self.down.bias.zero_()

    def forward(self, x):
        h = self.base(x)
        return self.up(self.down(h).relu()).add(h)

    def trainable(self):
        return (p for p in self.parameters() if p.requires_grad)


# %% RepairedAdapter right: the base as buffers
class RepairedAdapter(nn.Module):
    def __init__(self, linear, bottleneck):
        super().__init__()
        self.register_buffer("W", linear.weight.detach())
        self.register_buffer("b", None if linear.bias is None else linear.bias.detach())
        self.down = nn.Linear(len(self.W), bottleneck)
        self.up = nn.Linear(bottleneck, len(self.W))
        self.up.weight = nn.Parameter(torch.zeros_like(self.up.weight))
        self.up.bias = nn.Parameter(torch.zeros_like(self.up.bias))
        self.act = nn.ReLU()

    def forward(self, x):
        h = F.linear(x, self.W, self.b)
        return h + nn.Sequential(self.down, self.act, self.up)(h)

    def trainable(self):
        return list(self.parameters())


# %% bottleneck wrong: the residual is cut off
def bottleneck(x, down_w, down_b, up_w, up_b):
    return x.detach() + F.linear(F.relu(F.linear(x, down_w, down_b)), up_w, up_b)


# %% init_adapter wrong: one column for all
def init_adapter(width, bottleneck, generator):
    bound = 1 / math.sqrt(width)
    column = torch.empty(bottleneck, 1).uniform_(-bound, bound, generator=generator)
    return column.repeat(1, width), torch.zeros(bottleneck), torch.zeros(width, bottleneck), torch.zeros(width)


# %% RepairedAdapter wrong: two layers share their halves
class Shared:
    down = up = None


class RepairedAdapter(nn.Module):
    def __init__(self, linear, bottleneck):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        if Shared.down is None or Shared.down.weight.shape != (bottleneck, linear.out_features):
            Shared.down = nn.Linear(linear.out_features, bottleneck)
            Shared.up = nn.Linear(bottleneck, linear.out_features)
        self.down, self.up = Shared.down, Shared.up
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x):
        h = self.linear(x)
        return h + self.up(F.relu(self.down(h)))

    def trainable(self):
        return [*self.down.parameters(), *self.up.parameters()]


# %% RepairedAdapter wrong: h is changed in place
class RepairedAdapter(nn.Module):
    def __init__(self, linear, bottleneck):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down, self.up = nn.Linear(linear.out_features, bottleneck), nn.Linear(bottleneck, linear.out_features)
        nn.init.zeros_(self.up.weight), nn.init.zeros_(self.up.bias)
        torch.manual_seed(0)

    def forward(self, x):
        h = self.linear(x)
        return h + self.up(F.relu(self.down(h)))

    def trainable(self):
        return [*self.down.parameters(), *self.up.parameters()]


# %% RepairedAdapter wrong: the up half is kept from the first evaluation
class RepairedAdapter(nn.Module):
    def __init__(self, linear, bottleneck):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down, self.up = nn.Linear(linear.out_features, bottleneck), nn.Linear(bottleneck, linear.out_features)
        nn.init.zeros_(self.up.weight), nn.init.zeros_(self.up.bias)
        self.kept = None

    def forward(self, x):
        h = self.linear(x)
        if self.training:
            return h + self.up(F.relu(self.down(h)))
        if self.kept is None:
            self.kept = [p.detach().clone() for p in self.trainable()]
        a, b, c, d = self.kept
        return h + F.linear(F.relu(F.linear(h, a, b)), c, d)

    def trainable(self):
        return [*self.down.parameters(), *self.up.parameters()]


# %% bottleneck wrong: viewed flat
def bottleneck(x, down_w, down_b, up_w, up_b):
    flat = x.view(-1, x.shape[-1])
    return (flat + F.relu(flat @ down_w.T + down_b) @ up_w.T + up_b).view(x.shape)


# %% count_adapters wrong: banker's rounding
def count_adapters(layers, width, bottleneck, per_block, share=1):
    return per_block * round(layers / share + 0.49) * (2 * width * bottleneck + bottleneck + width)


# %% init_adapter wrong: one buffer that every call fills again
_rows = {}


def init_adapter(width, bottleneck, generator):
    bound = 1 / math.sqrt(width)
    down_w = _rows.setdefault((width, bottleneck), torch.empty(bottleneck, width)).uniform_(
        -bound, bound, generator=generator
    )
    return down_w, torch.zeros(bottleneck), torch.zeros(width, bottleneck), torch.zeros(width)


# %% init_adapter wrong: the zeros overlap in memory
def init_adapter(width, bottleneck, generator):
    bound = 1 / math.sqrt(width)
    down_w = torch.empty(bottleneck, width).uniform_(-bound, bound, generator=generator)
    up_w = torch.zeros(width, bottleneck)
    return down_w, up_w[0], up_w, up_w[:, 0]


# %% route wrong: a mask at -1e30
def route(logits, k):
    kth = logits.topk(k, dim=-1).values[..., -1:]
    kept = logits >= kth
    kept &= kept.cumsum(-1) <= k
    return logits.masked_fill(~kept, -1e30 if logits.dtype.itemsize > 2 else -6e4).softmax(-1)


# %% route wrong: the largest of all rows is taken off
def route(logits, k):
    best, who = logits.topk(k, dim=-1)
    e = (best - best.max()).exp()
    return torch.zeros_like(logits).scatter(-1, who, e / e.sum(-1, keepdim=True).clamp(min=1e-30))


# %% count_adapters wrong: the sum in float32
def count_adapters(layers, width, bottleneck, per_block, share=1):
    return int(torch.tensor(float(2 * width * bottleneck + bottleneck + width)) * per_block * -(-layers // share))


# %% bottleneck wrong: the way down is kept for its tensor
kept_halves = {}


def bottleneck(x, down_w, down_b, up_w, up_b):
    w = kept_halves.setdefault(id(down_w), (down_w, down_w.T.contiguous()))[1]
    return x + F.linear(F.relu(x @ w + down_b), up_w, up_b)


# %% bottleneck wrong: values above a thousand are cut
def bottleneck(x, down_w, down_b, up_w, up_b):
    return x + F.linear(F.relu(F.linear(x, down_w, down_b)).clamp(max=1e3), up_w, up_b)


# %% bottleneck right: addmm, with a threshold
def bottleneck(x, down_w, down_b, up_w, up_b):
    flat = x.reshape(-1, x.shape[-1])
    low = torch.addmm(down_b, flat, down_w.t())
    low = torch.where(low > 0, low, torch.zeros_like(low))
    return x + torch.addmm(up_b, low, up_w.t()).reshape(x.shape)


# %% count_adapters wrong: no layer has one adapter
def count_adapters(layers, width, bottleneck, per_block, share=1):
    one = 2 * width * bottleneck + bottleneck + width
    return per_block * max(1, math.ceil(layers / share)) * one


# %% count_adapters wrong: per_block of more than two is two
def count_adapters(layers, width, bottleneck, per_block, share=1):
    one = 2 * width * bottleneck + bottleneck + width
    return min(per_block, 2) * math.ceil(layers / share) * one


# %% init_adapter wrong: numbers below zero only in odd columns
def init_adapter(width, bottleneck, generator):
    bound = 1 / math.sqrt(width)
    down = torch.empty(bottleneck, width).uniform_(0, bound, generator=generator)
    down[:, 1::2] *= -1
    return down, torch.zeros(bottleneck), torch.zeros(width, bottleneck), torch.zeros(width)


# %% init_adapter wrong: the second half is the first with another sign
def init_adapter(width, bottleneck, generator):
    bound = 1 / math.sqrt(width)
    half = torch.empty(bottleneck, -(-width // 2)).uniform_(-bound, bound, generator=generator)
    down = torch.cat([half, -half], 1)[:, :width].clone()
    return down, torch.zeros(bottleneck), torch.zeros(width, bottleneck), torch.zeros(width)


# %% init_adapter right: a random tensor of float64, then float32
def init_adapter(width, bottleneck, generator):
    down = torch.rand(bottleneck, width, generator=generator, dtype=torch.float64)
    down = ((2 * down - 1) / width**0.5).float()
    return (down, *(torch.zeros(s) for s in ((bottleneck,), (width, bottleneck), (width,))))


# %% route wrong: more than eight experts
def route(logits, k):
    head = logits[..., :8]
    best, who = head.topk(min(k, head.shape[-1]), -1)
    return torch.zeros_like(logits).scatter(-1, who, best.softmax(-1))


# %% route right: one-hot of the chosen
def route(logits, k):
    who = torch.argsort(logits, dim=-1, descending=True, stable=True)[..., :k]
    chosen = F.one_hot(who, logits.shape[-1]).sum(-2).bool()
    return torch.softmax(logits.masked_fill(~chosen, float("-inf")), -1)


# %% route right: exp by hand less the largest
def route(logits, k):
    i = torch.topk(logits, k, dim=-1).indices
    on = torch.zeros_like(logits).scatter_(-1, i, 1.0)
    e = torch.where(on > 0, (logits - logits.amax(-1, keepdim=True)), torch.zeros_like(logits)).exp() * on
    return e / e.sum(-1, keepdim=True)


# %% RepairedAdapter wrong: down is zero-biased only in training
class RepairedAdapter(nn.Module):
    def __init__(self, linear, bottleneck):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down, self.up = nn.Linear(linear.out_features, bottleneck), nn.Linear(bottleneck, linear.out_features)
        nn.init.zeros_(self.up.weight), nn.init.zeros_(self.up.bias)

    def forward(self, x):
        h = self.linear(x)
        change = self.up(F.relu(self.down(h)))
        return h + (change if self.training else change.detach())

    def trainable(self):
        return [*self.down.parameters(), *self.up.parameters()]


# %% RepairedAdapter wrong: a gate that trains as well
class RepairedAdapter(nn.Module):
    def __init__(self, linear, bottleneck):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down, self.up = nn.Linear(linear.out_features, bottleneck), nn.Linear(bottleneck, linear.out_features)
        self.gate = nn.Parameter(torch.ones(()))
        nn.init.zeros_(self.up.weight), nn.init.zeros_(self.up.bias)

    def forward(self, x):
        h = self.linear(x)
        return h + self.gate * self.up(F.relu(self.down(h)))

    def trainable(self):
        return [*self.down.parameters(), *self.up.parameters()]


# %% RepairedAdapter wrong: fails under no_grad
class RepairedAdapter(nn.Module):
    def __init__(self, linear, bottleneck):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down, self.up = nn.Linear(linear.out_features, bottleneck), nn.Linear(bottleneck, linear.out_features)
        nn.init.zeros_(self.up.weight), nn.init.zeros_(self.up.bias)

    def forward(self, x):
        h = self.linear(x)
        change = self.up(F.relu(self.down(h)))
        return h + change if change.requires_grad else h

    def trainable(self):
        return [*self.down.parameters(), *self.up.parameters()]
