"""The rows of the ledger that definitions, counts and code decide."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from minipeft.analyze.budget import budget, multiply_adds, training_bytes
from minipeft.attach import attach
from minipeft.course.claims.ledger import HOLDS, WRONG, claim
from minipeft.methods.lora import LoRA

TITLE = "LoRA: Low-Rank Adaptation of Large Language Models"


def _named(f: dict) -> str:
    return HOLDS if f["claimed"].lower() in f["title"].lower() else WRONG


@claim(
    "C01", "LoRA stands for “loose RLHF” and works by subtasks and reinforcement learning", "A §2.2", "exact", _named
)
def _() -> dict:
    """The expansion is looked for in the title of the paper that named the method."""
    return {"claimed": "loose RLHF", "title": TITLE}


@claim("C02", "LoRA stands for a low-rank orthogonal adjoint matrix", "C §1.2", "exact", _named)
def _() -> dict:
    """The expansion is looked for in the title of the paper that named the method."""
    return {"claimed": "low-rank orthogonal adjoint", "title": TITLE}


@claim(
    "C03",
    "The arXiv numbers that document A cites belong to the papers that it names",
    "A §7.3",
    "exact",
    lambda f: HOLDS if all(a.lower() == b.lower() for a, b in f.values()) else WRONG,
)
def _() -> dict:
    """The title that A gives beside the title that arXiv has under the number. (A second number, 2212.13191, is cited
    for a paper on “loose RLHF”; we found it in no other publication, so it is not compared.)"""
    return {"2103.17239": ["PEFT: Parameter Efficient Fine-tuning", "Going deeper with Image Transformers"]}


def _square(d: int) -> dict:
    with torch.device("meta"):
        layer = nn.Sequential(nn.Linear(d, d, bias=False))
    b = budget(layer, LoRA(rank=8))
    return {"full": b.base, "LoRA": b.trainable, "saved in %": round(100 * (1 - b.trainable / b.base), 1)}


@claim(
    "C04",
    "1024×1024 at r=8 goes from 1,048,576 parameters to 16,384",
    "D §3.6",
    "exact",
    lambda f: HOLDS if (f["full"], f["LoRA"]) == (1_048_576, 16_384) else WRONG,
)
def _() -> dict:
    """Attached on the meta device and counted."""
    return _square(1024)


@claim(
    "C05",
    "4096×4096 at r=8 needs about 65 thousand parameters against 16 million, 99.6 % less",
    "E §4",
    "exact",
    lambda f: HOLDS if round(f["LoRA"], -3) in (65_000, 66_000) and f["saved in %"] == 99.6 else WRONG,
)
def _() -> dict:
    """Attached on the meta device and counted."""
    return _square(4096)


@claim(
    "C06",
    "ResNet-18 has 11.7 M parameters",
    "D §1",
    "exact",
    lambda f: HOLDS if round(f["parameters"] / 1e6, 1) == 11.7 else WRONG,
)
def _() -> dict:
    """Built on the meta device with 1000 classes and counted."""
    from minipeft.analyze.catalogue import build

    return {"parameters": sum(p.numel() for p in build("resnet-18").parameters())}


def _t5():
    import transformers

    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    return attach(transformers.T5ForConditionalGeneration(config), LoRA(rank=4))


def _selects(f: dict) -> str:
    return HOLDS if f["of LoRA's"] == f["LoRA's"] and not f["others"] else WRONG


def _select(chosen: Callable[[str, nn.Parameter], bool]) -> dict:
    named = dict(_t5().named_parameters())
    picked = {name for name, p in named.items() if chosen(name, p)}
    truth = {name for name, p in named.items() if p.requires_grad}
    return {"LoRA's": len(truth), "of LoRA's": len(picked & truth), "others": len(picked - truth)}


@claim("C08", 'hasattr(parameter, "A") selects LoRA\'s parameters', "D §3.6.2", "code", _selects)
def _() -> dict:
    """A small T5 with LoRA: how many parameters the condition picks."""
    return _select(lambda name, p: hasattr(p, "A") or hasattr(p, "B"))


@claim("C09", '"A" in name or "B" in name selects LoRA\'s parameters', "D §3.6.2", "code", _selects)
def _() -> dict:
    """A small T5 with LoRA: how many parameters the condition picks."""
    return _select(lambda name, p: "A" in name or "B" in name)


@claim(
    "C10",
    "One d-wide prefix cut into halves fits the attention's K and V",
    "D §3.3",
    "code",
    lambda f: HOLDS if f["half"] == f["K needs"] else WRONG,
)
def _() -> dict:
    """The widths of a half and of K, read off the pocket model's projection."""
    from minipeft.world.base import load

    attention = load("pocket")[0].model.layers[0].self_attn
    return {"half": attention.q_proj.in_features // 2, "K needs": attention.k_proj.out_features}


@claim(
    "C11",
    "Prefixes go to K and V because one in Q would change what is attended from",
    "D §3.3",
    "code",
    lambda f: (
        HOLDS
        if f["in Q, the output changes by"] > 0
        else "holds when only the conclusion is read: in Q it does nothing"
    ),
)
def _() -> dict:
    """One attention layer, three random vectors put in front of Q, and in front of K and V: how far the output of the
    text's own tokens moves, and the largest gradient that the vectors get."""
    generator = torch.Generator().manual_seed(0)
    Q, K, V = (torch.randn(1, 4, 6, 32, generator=generator) for _ in range(3))
    extra = torch.randn(1, 4, 3, 32, generator=generator, requires_grad=True)
    attend, figures = nn.functional.scaled_dot_product_attention, {}
    outputs = {
        "in Q": attend(torch.cat([extra, Q], 2), K, V)[:, :, 3:],
        "in K and V": attend(Q, torch.cat([extra, K], 2), torch.cat([extra, V], 2)),
    }
    for where, output in outputs.items():
        (gradient,) = torch.autograd.grad(output.square().sum(), extra)
        figures[f"{where}, the output changes by"] = round((output - attend(Q, K, V)).abs().max().item(), 2)
        figures[f"{where}, gradient"] = round(gradient.abs().max().item(), 2)
    return figures


@claim(
    "C12",
    "P-tuning is more expressive than prompt tuning",
    "D §3.4",
    "code",
    lambda f: WRONG if f["largest difference of the logits"] < 1e-5 else HOLDS,
)
def _() -> dict:
    """P-tuning's vectors as its generator gives them, then the same vectors in plain prompt tuning: the same logits. So
    the generator changes how vectors are reached, not which there are. Lesson 04 compares their losses."""
    from minipeft.methods.prompt import PromptTuning, PTuning
    from minipeft.world.base import load

    model, tokenizer = load("pocket")
    ids = tokenizer("on sunday , anna went to the lake .", return_tensors="pt").input_ids
    tuned, logits, vectors = attach(model, PTuning(4)), [], None
    for method in (PTuning(4), PromptTuning(4)):
        tuned.detach()
        tuned = attach(model, method)
        [layer] = tuned.adapters["default"].values()
        with torch.no_grad():
            if vectors is None:
                vectors = layer.prompt().clone()
            else:
                layer.restore({key: vectors for key in layer.stored()})
            logits.append(tuned(input_ids=ids).logits)
    tuned.detach()
    return {
        "vectors": list(vectors.shape),
        "largest difference of the logits": (logits[0] - logits[1]).abs().max().item(),
    }


@claim(
    "C15",
    "LoRA trains 100 to 1000 times faster or cheaper",
    "E §5a",
    "exact",
    lambda f: HOLDS if f["full ÷ LoRA"] >= 100 else WRONG,
)
def _() -> dict:
    """Multiply-adds of one training step of LLaMA-7B on 512 tokens, LoRA r=8 on all linear layers, counted."""
    full, lora = (multiply_adds("llama-7b", method, 1, 512).total for method in (None, LoRA(rank=8)))
    return {"full": full, "LoRA": lora, "full ÷ LoRA": round(full / lora, 3)}


@claim(
    "C16",
    "PEFT cuts compute 10 to 100 times",
    "E §3",
    "exact",
    lambda f: HOLDS if min(v for k, v in f.items() if k.startswith("÷")) >= 10 else WRONG,
)
def _() -> dict:
    """Full fine-tuning's multiply-adds over each method's, LLaMA-7B, 512 tokens, counted."""
    full = multiply_adds("llama-7b", None, 1, 512).total
    methods = {"LoRA r=1 on q, v": LoRA(rank=1, targets=["q_proj", "v_proj"]), "LoRA r=8": LoRA(rank=8)}
    return {f"÷ {name}": round(full / multiply_adds("llama-7b", m, 1, 512).total, 3) for name, m in methods.items()}


@claim(
    "C19",
    "B starts at zero, so the first update does not disturb the model",
    "E §4",
    "code",
    lambda f: HOLDS if f["largest difference"] == 0 else WRONG,
)
def _() -> dict:
    """Logits of the pocket model with a fresh adapter against the base's."""
    from minipeft.world.base import load

    model, tokenizer = load("pocket")
    ids = tokenizer("on sunday , anna went to the lake .", return_tensors="pt").input_ids
    with torch.no_grad():
        before = model(input_ids=ids).logits
        after = attach(model, LoRA(rank=8))(input_ids=ids).logits
    return {"largest difference": (after - before).abs().max().item()}


@claim(
    "C21",
    "Merging gives the same model",
    "E §4",
    "code",
    lambda f: (
        "wrong"
        if f["float32, largest logit difference"] > 1e-4
        else HOLDS
        if f["bfloat16, part of ΔW lost"] < 0.01
        else "holds when the weights are float32"
    ),
)
def _() -> dict:
    """The shipped pirate adapter merged in float32; and an update of 0.3 % of ‖W‖ merged in bfloat16."""
    from minipeft.course.shipped import shipped
    from minipeft.serve.checkpoint import load_adapter
    from minipeft.world.base import load

    model, tokenizer = load("pocket")
    tuned = load_adapter(model, shipped("pirate"))
    ids = tokenizer("on sunday , anna went to the lake .", return_tensors="pt").input_ids
    with torch.no_grad():
        before = tuned(input_ids=ids).logits
        tuned.merge()
        error = (tuned(input_ids=ids).logits - before).abs().max().item()
    tuned.detach()
    weight = load("pocket")[0].model.layers[0].mlp.up_proj.weight.detach().bfloat16().float()
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(weight.shape[0], 4, generator=generator) @ torch.randn(4, weight.shape[1], generator=generator)
    delta *= 0.003 * weight.norm() / delta.norm()
    lost = ((weight + delta).bfloat16().float() - weight - delta).norm() / delta.norm()
    return {
        "float32, largest logit difference": float(f"{error:.1e}"),
        "bfloat16, part of ΔW lost": round(lost.item(), 2),
    }


@claim(
    "C23",
    "Full fine-tuning needs an order of magnitude more memory than sampling, LoRA only slightly more",
    "E §5c",
    "exact",
    lambda f: (
        "holds when only weights, gradients and optimizer state are counted, not activations"
        if f["full ÷ sampling"] >= 8 and f["LoRA ÷ sampling"] < 1.2
        else WRONG
    ),
)
def _() -> dict:
    """Bytes for LLaMA-7B in bfloat16 with Adam, LoRA r=8 on all linear layers, activations left out."""
    b = budget("llama-7b", LoRA(rank=8))
    sampling = 2 * b.base
    full = sum(training_bytes(b.base, b.base).values())
    lora = sum(training_bytes(b.base, b.trainable, b.trainable).values())
    return {"full ÷ sampling": full / sampling, "LoRA ÷ sampling": round(lora / sampling, 3)}


@claim(
    "C24",
    "Adapters are under 100 MB",
    "E §5d",
    "exact",
    lambda f: (
        HOLDS
        if max(f.values()) < 100
        else "holds when the rank is small for the model's size"
        if min(f.values()) < 100
        else WRONG
    ),
)
def _() -> dict:
    """Megabytes of the float32 adapter file, foretold to the byte."""
    qv = ["q_proj", "v_proj"]
    cases = [
        ("llama-7b", 8, qv),
        ("llama-7b", 16, "all-linear"),
        ("llama-7b", 64, "all-linear"),
        ("llama-3-70b", 8, qv),
    ]
    return {
        f"{name} r={r} {'q, v' if t is qv else t}": round(budget(name, LoRA(rank=r, targets=t)).file_bytes / 1e6, 1)
        for name, r, t in cases
    }


@claim(
    "C30",
    "The reported table of precision, recall and F1 is consistent with itself",
    "C §5.4",
    "exact",
    lambda f: HOLDS if f["most predictions that fit"] >= f["texts"] else WRONG,
)
def _() -> dict:
    """A class with n texts, recall R and precision P was predicted n·R/P times. A classifier predicts one class for
    every text, so the predictions must add up to the texts; the most that the table's rounding allows is counted."""
    classes = ((0.92, 0.88, 1000), (0.91, 0.89, 500))  # precision, recall, support
    most = sum(n * (recall + 0.005) / (precision - 0.005) for precision, recall, n in classes)
    return {"texts": sum(n for *_, n in classes), "most predictions that fit": int(most)}


@claim(
    "C31",
    "The losses shown for A's second program come from that code",
    "A §5",
    "code",
    lambda f: WRONG if f["errors"] or f["losses that are float32 numbers"] < f["losses shown"] else HOLDS,
)
def _() -> dict:
    """The program's steps on its own layers: the loss is computed without a graph and then differentiated, and a
    container is asked for sub-layers by name. And whether the three losses shown are numbers that float32 has."""
    model = nn.Sequential(nn.Linear(10, 100), nn.ReLU(), nn.Linear(100, 10))
    with torch.no_grad():
        loss = nn.CrossEntropyLoss()(model(torch.randn(4, 10)), torch.zeros(4, dtype=torch.long))
    errors = []
    for step in (lambda: torch.autograd.grad(loss, model.parameters()), lambda: model.get_sub_layer("task1")):
        try:
            step()
        except (RuntimeError, AttributeError) as error:
            errors.append(type(error).__name__)
    shown = (0.4799563933854785, 0.3640653192446289, 0.28667558426953125)
    fit = sum(torch.tensor(x, dtype=torch.float32).item() == x for x in shown)
    return {"errors": errors, "losses shown": len(shown), "losses that are float32 numbers": fit}


@claim(
    "C32",
    "One server holds many adapters over one base and samples from them in one batch",
    "E §5b",
    "code",
    lambda f: HOLDS if f["texts as one by one"] == f["texts"] and f["copies of the base"] == 1 else WRONG,
)
def _() -> dict:
    """Eight random adapters on the pocket model, one text each in one batch, against the same texts one by one; and how
    often the base's numbers are in memory. (Its speed belongs to serving, and is not measured here.)"""
    from minipeft.world.base import load

    model, tokenizer = load("pocket")
    tuned, names = attach(model, LoRA(rank=4), name="0"), [str(i) for i in range(8)]
    for name in names[1:]:
        tuned.add(name, LoRA(rank=4))
    generator = torch.Generator().manual_seed(0)
    for layers in tuned.adapters.values():
        for layer in layers.values():
            layer.B.data = 0.3 * torch.randn(layer.B.shape, generator=generator)
    ids = tokenizer(["on sunday , anna went to the"] * len(names), return_tensors="pt").input_ids
    settings = dict(max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    together = tuned.generate(input_ids=ids, adapters=names, **settings)
    same = 0
    for i, name in enumerate(names):
        tuned.use(name)
        alone = tuned.generate(input_ids=ids[:1], **settings)[0]
        same += torch.equal(alone, together[i][: len(alone)])
    kept = {p.data_ptr(): p.numel() for p in tuned.base.parameters()}
    base = sum(p.numel() for p in load("pocket")[0].parameters())
    tuned.detach()
    return {"texts": len(names), "texts as one by one": same, "different": len({tuple(t.tolist()) for t in together}),
            "copies of the base": round(sum(kept.values()) / base, 3)}  # fmt: skip
