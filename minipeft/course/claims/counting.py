"""The rows of the ledger that definitions, counts and code decide."""

from __future__ import annotations

import itertools
import tempfile
import warnings
from collections.abc import Callable

import torch
from torch import nn

from minipeft.analyze.budget import budget, training_bytes
from minipeft.attach import attach
from minipeft.course.claims.ledger import CANNOT_TELL, HOLDS, WRONG, claim, only
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


def _cited(f: dict) -> str:
    """One number that belongs to another paper, or to two, refutes it; only all titles known and alike prove it."""
    alike = [len({*f["titles in A"][n], title}) == 1 for n, title in f["title at arXiv"].items() if title]
    one_each = all(len(titles) == 1 for titles in f["titles in A"].values())
    if not one_each or not all(alike):
        return WRONG
    return HOLDS if len(alike) == len(f["titles in A"]) else CANNOT_TELL


@claim("C03", "The arXiv numbers that document A cites belong to the papers that it names", "A §7.3", "exact", _cited)
def _() -> dict:
    """All four numbers, with every title that A gives for each, in its list of reading (§7.3) and its references,
    beside the title at arXiv where we looked it up. A number with two titles contradicts itself."""
    titles = {
        "2103.17239": ["parameter efficient fine-tuning"],
        "2212.13191": [
            "lora: loose refining with large-scale language model",
            "loose rlhf: loose refining with large-scale language model",
        ],
        "2204.02175": ["peft: parameter-efficient training"],
        "2211.00462": ["loose rlhf: a parameter-efficient method for pre-training language models"],
    }
    found = dict.fromkeys(titles) | {"2103.17239": "going deeper with image transformers"}
    return {"titles in A": titles, "title at arXiv": found}


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


def _models() -> dict[str, nn.Module]:
    """Small models of four families; document D's own program speaks of BERT."""
    import transformers as hf

    small = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    ends = dict(bos_token_id=1, eos_token_id=2)
    t5 = hf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    return {
        "BERT": hf.BertForSequenceClassification(hf.BertConfig(**small)),
        "GPT-2": hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, **ends)),
        "LLaMA": hf.LlamaForCausalLM(hf.LlamaConfig(**small)),
        "T5": hf.T5ForConditionalGeneration(t5),
    }


def _selects(f: dict) -> str:
    right = [name for name, each in f.items() if each["of LoRA's"] == each["LoRA's"] and not each["others"]]
    return only(right, len(f), "model")


def _select(chosen: Callable[[str, nn.Parameter], bool]) -> dict:
    figures = {}
    for model, base in _models().items():
        tuned = attach(base, LoRA(rank=4))
        new = {name for layer in tuned.layers() for name in (id(layer.A), id(layer.B))}
        named = dict(tuned.named_parameters())
        picked = {name for name, p in named.items() if chosen(name, p)}
        truth = {name for name, p in named.items() if id(p) in new}
        figures[model] = {"LoRA's": len(truth), "of LoRA's": len(picked & truth), "others": len(picked - truth)}
    return figures


@claim("C08", 'hasattr(parameter, "A") selects LoRA\'s parameters', "D §3.6.2", "code", _selects)
def _() -> dict:
    """Small models of four families with LoRA: how many parameters the condition picks."""
    return _select(lambda name, p: hasattr(p, "A") or hasattr(p, "B"))


@claim("C09", '"A" in name or "B" in name selects LoRA\'s parameters', "D §3.6.2", "code", _selects)
def _() -> dict:
    """Small models of four families with LoRA, BERT among them, of which D speaks: how many parameters the condition
    picks. A module called SelfAttention is enough to pick its frozen weights."""
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


def _queries(f: dict) -> str:
    moved = {where: each["proportions change by"] > 1e-4 for where, each in f.items()}
    if moved["in K and V"]:
        return WRONG
    return only([where for where in ("in front of Q", "added to Q") if moved[where]], 2, "prefix")


@claim("C11", "Prefixes go to K and V because one in Q would change what is attended from", "D §3.3", "code", _queries)
def _() -> dict:
    """One attention layer of random numbers. Three vectors in front of K and V, the same in front of Q, or their mean
    added to Q: how far the output of the text's own tokens moves, and how far the proportions move in which they
    attend to one another (the weights on the text, divided by their sum). The claim says: with Q they move, with K and
    V not."""
    generator = torch.Generator().manual_seed(0)
    Q, K, V = (torch.randn(1, 4, 6, 32, generator=generator) for _ in range(3))
    extra = torch.randn(1, 4, 3, 32, generator=generator)

    def attend(q, k, v):
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        own = weights[:, :, -6:, -6:]
        return (weights @ v)[:, :, -6:], own / own.sum(-1, keepdim=True)

    output, proportions = attend(Q, K, V)
    ways = {
        "in front of Q": attend(torch.cat([extra, Q], 2), K, V),
        "added to Q": attend(Q + extra.mean(2, keepdim=True), K, V),
        "in K and V": attend(Q, torch.cat([extra, K], 2), torch.cat([extra, V], 2)),
    }
    return {
        where: {
            "output changes by": round((o - output).abs().max().item(), 2),
            "proportions change by": round((p - proportions).abs().max().item(), 4),
        }
        for where, (o, p) in ways.items()
    }


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


def _merges(f: dict) -> str:
    whole = f["float32, largest logit difference"]
    lost = [value for name, value in f.items() if name.startswith("bfloat16")]
    if max(whole) > 1e-4:
        return WRONG
    return HOLDS if max(lost) < 0.01 else "holds when the weights are float32"


@claim("C21", "Merging gives the same model", "E §4", "code", _merges)
def _() -> dict:
    """Two trained adapters, merged: the shipped pirate one, and one after ten steps at 1e-4, whose ΔW is small. In
    float32 the largest difference of a logit (the same: below 1e-4); in bfloat16 the mean part of each ΔW that the
    rounding of W + ΔW takes (the same: below a hundredth)."""
    from minipeft.course.shipped import shipped
    from minipeft.learn.fit import fit
    from minipeft.serve.checkpoint import load_adapter, save_adapter
    from minipeft.world import load, pirate

    model, tokenizer = load("pocket")
    ids = tokenizer("on sunday , anna went to the lake .", return_tensors="pt").input_ids
    with tempfile.TemporaryDirectory() as folder:
        tuned = attach(model, LoRA(rank=8))
        fit(tuned, pirate(), steps=10, lr=1e-4, batch=10, progress=False)
        save_adapter(tuned, folder)
        tuned.detach()
        errors, lost = [], {}
        for name, path in (("pirate adapter", shipped("pirate")), ("ten small steps", folder)):
            tuned = load_adapter(model, path)
            with torch.no_grad():
                before = tuned(input_ids=ids).logits
                tuned.merge()
                errors.append(float(f"{(tuned(input_ids=ids).logits - before).abs().max().item():.1e}"))
            tuned.unmerge()
            tuned.detach()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it says what is measured here
                parts = load_adapter(load("pocket")[0].bfloat16(), path).merge().values()
            lost[f"bfloat16, part of ΔW lost, {name}"] = round(sum(parts) / len(parts), 3)
    return {"float32, largest logit difference": errors} | lost


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


def _report(f: dict) -> str:
    if f["with every text in one of the two classes"]:
        return HOLDS
    return "holds when some texts are predicted as a third class" if f["ways to count that fit"] else WRONG


@claim("C30", "The reported table of precision, recall and F1 is consistent with itself", "C §5.4", "exact", _report)
def _() -> dict:
    """All counts of right answers and of predictions in two classes of 1000 and 500 texts are tried: from which do all
    fifteen figures of the table follow, rounded as shown: precision, recall and F1 of both classes and of the micro,
    macro and weighted means? And in how many of those does every text get one of the two classes?"""
    shown = [(0.92, 0.88, 0.90), (0.91, 0.89, 0.90), (0.92, 0.89, 0.90), (0.91, 0.89, 0.90), (0.92, 0.89, 0.90)]

    def fits(found, row):
        return all(abs(value - told) <= 0.005 + 1e-9 for value, told in zip(found, row, strict=True))

    def scores(right, predicted, n):
        p, r = right / predicted, right / n
        return p, r, 2 * p * r / (p + r)

    sizes = (1000, 500)
    each = [
        [(right, predicted, scores(right, predicted, n))
         for right in range(1, n + 1)
         for predicted in range(right, round(right / (row[0] - 0.01)) + 1)
         if fits(scores(right, predicted, n), row)]
        for n, row in zip(sizes, shown, strict=False)
    ]  # fmt: skip
    ways, whole = 0, 0
    for (right, predicted, one), (other_right, other_predicted, other) in itertools.product(*each):
        micro = scores(right + other_right, predicted + other_predicted, sum(sizes))
        macro = [(a + b) / 2 for a, b in zip(one, other, strict=True)]
        weighted = [(1000 * a + 500 * b) / 1500 for a, b in zip(one, other, strict=True)]
        if all(map(fits, (micro, macro, weighted), shown[2:])):
            ways += 1
            whole += predicted + other_predicted == sum(sizes)
    return {"ways to count that fit": ways, "with every text in one of the two classes": whole}


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
