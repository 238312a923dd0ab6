"""What a method costs, before anything is trained: numbers, bytes and multiply-adds, exact on the meta device.

    b = budget("llama-7b", mp.LoRA(rank=8))        # or a configuration of transformers, or any module
    b.trainable, b.total, b.file_bytes
    print(b.latex())                               # the count as a formula with the numbers put in
    FORMULAS["dora"](n=32, r=16, d_in=4096, d_out=4096)

`FORMULAS` holds the closed formulas of the methods' papers; `PUBLISHED` what the papers print, beside the exact value.
"""

from __future__ import annotations

import copy
import json
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from minipeft.analyze.catalogue import build
from minipeft.attach import attach
from minipeft.layer import Method
from minipeft.methods.common import check_whole
from minipeft.targets import numbers

SYMBOLS = {
    "d_in": r"d_\mathrm{in}", "d_out": r"d_\mathrm{out}", "h_kv": r"h_\mathrm{kv}", "d_h": r"d_\mathrm{head}",
    "f": r"d_\mathrm{ff}", "copies": "c", "p": r"n_\mathrm{prefix}", "i": r"n_\mathrm{infix}",
}  # fmt: skip


@dataclass(frozen=True)
class Formula:
    """A closed formula for the number of trainable parameters.

    `template`: LaTeX with {r} where the number r goes. `compute`: the same in Python. `source`: paper and section.
    """

    name: str
    template: str
    compute: Callable[..., int]
    source: str

    @property
    def symbols(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(field for _, field, _, _ in string.Formatter().parse(self.template) if field))

    def latex(self, **numbers: int) -> str:
        """The formula in symbols, or with `numbers` put in and the result after "="."""
        if not numbers:
            return self.template.format(**{s: SYMBOLS.get(s, s) for s in self.symbols})
        return f"{self.template.format(**numbers)}={grouped(self(**numbers))}"

    def __call__(self, **numbers: int) -> int:
        if set(numbers) != set(self.symbols):
            raise ValueError(
                f"{self.name} needs {', '.join(self.symbols)}; it was given {', '.join(numbers) or 'none'}."
            )
        return self.compute(**numbers)


def grouped(number: int) -> str:
    """12{,}288, as LaTeX sets it."""
    return f"{number:,}".replace(",", "{,}")


FORMULAS = {
    f.name: f
    for f in (
        Formula("lora", r"{n}\cdot {r}\,({d_in}+{d_out})", lambda n, r, d_in, d_out: n * r * (d_in + d_out),
                "Hu et al. 2021, §4.2: n matrices of one shape"),
        Formula("dora", r"{n}\,({r}\,({d_in}+{d_out})+{d_out})",
                lambda n, r, d_in, d_out: n * (r * (d_in + d_out) + d_out),
                "Liu et al. 2024, DoRA, §4: LoRA and a magnitude for each output"),
        Formula("adalora", r"{n}\cdot {r}\,({d_in}+{d_out}+1)", lambda n, r, d_in, d_out: n * r * (d_in + d_out + 1),
                "Zhang et al. 2023, AdaLoRA, §3.1: P, Λ, Q"),
        Formula("vera", r"{n}\,({d_out}+{r})", lambda n, r, d_out: n * (d_out + r),
                "Kopiczko et al. 2023, VeRA, §3.2: b and d; the shared pair A, B is frozen"),
        Formula("houlsby", r"2\cdot {L}\,(2\cdot {d}\cdot {m}+{m}+{d})", lambda L, d, m: 2 * L * (2 * d * m + m + d),
                "Houlsby et al. 2019, §2.1: two adapters a block"),
        Formula("pfeiffer", r"{L}\,(2\cdot {d}\cdot {m}+{m}+{d})", lambda L, d, m: L * (2 * d * m + m + d),
                "Pfeiffer et al. 2020, §3: one adapter a block"),
        Formula("prefix", r"{n}\cdot {L}\cdot 2\cdot {h_kv}\cdot {d_h}", lambda n, L, h_kv, d_h: n * L * 2 * h_kv * d_h,
                "Li and Liang 2021, §4.2, flat"),
        Formula("prompt", r"{copies}\cdot {n}\cdot {d}", lambda copies, n, d: copies * n * d,
                "Lester et al. 2021, §2"),
        Formula("p-tuning", r"{n}\cdot {d}+({d}\cdot {h}+{h})+({h}\cdot {h}+{h})+({h}\cdot {d}+{d})",
                lambda n, d, h: n * d + (d * h + h) + (h * h + h) + (h * d + d),
                "Liu et al. 2021, with a three-layer MLP as in PEFT"),
        Formula("bitfit", r"11\cdot {d}\cdot {L}", lambda d, L: 11 * d * L, "Ben Zaken et al. 2022, §3, BERT's blocks"),
        Formula("bitfit-gpt3", r"12\cdot {d}\cdot {L}", lambda d, L: 12 * d * L,
                "what reproduces LoRA's table 4; 11·d·L + d is what GPT-3 has"),
        Formula("ia3", r"{L}\,({k}+{v}+{f})", lambda L, k, v, f: L * (k + v + f), "Liu et al. 2022, §3.3"),
        Formula("ia3-decoder", r"{L}\,(2\cdot {k}+2\cdot {v}+{f})", lambda L, k, v, f: L * (2 * k + 2 * v + f),
                "the same with cross-attention"),
        Formula("prelayer", r"{L}\cdot {d}\,({p}+{i})", lambda L, d, p, i: L * d * (p + i), "Hu et al. 2021, §5.1"),
        Formula("block", r"{n}\,(12\cdot {d}\cdot {d}+13\cdot {d})", lambda n, d: n * (12 * d * d + 13 * d),
                "whole GPT-2 blocks"),
        Formula("head", r"{d}\cdot {V}+{V}", lambda d, V: d * V + V, "a classifier's output layer"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A printed count: the sum of `terms` (formula name, numbers) is exact, `printed` is what the paper says.

    `reproduces`: whether the exact number, rounded, is the printed one.
    """

    source: str
    configuration: str
    terms: tuple[tuple[str, dict], ...]
    printed: str
    reproduces: bool = True

    @property
    def exact(self) -> int:
        return sum(FORMULAS[name](**numbers) for name, numbers in self.terms)

    def latex(self) -> str:
        return "+".join(FORMULAS[name].template.format(**numbers) for name, numbers in self.terms) + (
            f"={grouped(self.exact)}"
        )


def _lora(n: int, r: int, d_in: int, d_out: int | None = None, kind: str = "lora") -> tuple[str, dict]:
    return kind, dict(n=n, r=r, d_in=d_in, d_out=d_out or d_in)


def _prompt(source: str, n: int, d: int, printed: str, reproduces: bool = True) -> Published:
    return Published(source, f"d={d}, prompt {n}", (("prompt", dict(copies=1, n=n, d=d)),), printed, reproduces)


LLAMA_7B = ((4, 4096, 4096), (2, 4096, 11008), (1, 11008, 4096))  # matrices a layer, d_in, d_out


def _llama_7b(r: int, squares: int, ups: int, kind: str = "lora") -> tuple[tuple[str, dict], ...]:
    return (
        _lora(32 * squares, r, 4096, kind=kind),
        _lora(32 * ups, r, 4096, 11008, kind=kind),
        _lora(32, r, 11008, 4096, kind=kind),
    )


GPT3, GPT3_L = 12288, 96
PUBLISHED = (
    Published("LoRA T2", "RoBERTa-base q,v r8, no head", (_lora(24, 8, 768),), "0.3M"),
    Published("LoRA T2", "RoBERTa-large q,v r8", (_lora(48, 8, 1024),), "0.8M"),
    Published("LoRA repository", "DeBERTa-XXL q,v r16", (_lora(96, 16, 1536),), "4.7M"),
    Published("LoRA T2", "RoBERTa-base BitFit", (("bitfit", dict(d=768, L=12)),), "0.1M"),
    Published("LoRA T2", "RoBERTa-large Houlsby m=8", (("houlsby", dict(L=24, d=1024, m=8)),), "0.8M"),
    Published("LoRA T2", "RoBERTa-large Pfeiffer m=16", (("pfeiffer", dict(L=24, d=1024, m=16)),), "0.8M"),
    Published("LoRA T3", "GPT-2 M, last two blocks", (("block", dict(n=2, d=1024)),), "25.19M"),
    Published("LoRA T4", "GPT-3 q,v r1", (_lora(2 * GPT3_L, 1, GPT3),), "4.7M"),
    Published("LoRA T4", "GPT-3 q,v r8", (_lora(2 * GPT3_L, 8, GPT3),), "37.7M"),
    Published("LoRA T5", "GPT-3, one matrix r8", (_lora(GPT3_L, 8, GPT3),), "18M"),
    Published("LoRA T5", "GPT-3, two matrices r4", (_lora(2 * GPT3_L, 4, GPT3),), "18M"),
    Published("LoRA T5", "GPT-3, four matrices r2", (_lora(4 * GPT3_L, 2, GPT3),), "18M"),
    Published("LoRA T4", "GPT-3 Houlsby m=1", (("houlsby", dict(L=GPT3_L, d=GPT3, m=1)),), "7.1M"),
    Published("LoRA T4", "GPT-3 Houlsby m=8", (("houlsby", dict(L=GPT3_L, d=GPT3, m=8)),), "40.1M"),
    Published("Houlsby", "BERT-large m=64", (("houlsby", dict(L=24, d=1024, m=64)),), "2.1 %"),
    Published("BitFit", "BERT-base encoder biases", (("bitfit", dict(d=768, L=12)),), "0.09 %"),
    *(_prompt("Lester T4", n, 1024, f"{n * 1024:,}") for n in (1, 5, 20, 50, 100, 150)),
    Published("Prefix tuning", "GPT-2 M n=5", (("prefix", dict(n=5, L=24, h_kv=16, d_h=64)),), "250K"),
    *(
        Published("AdaLoRA", f"DeBERTaV3-base LoRA r{r} on six matrices",
                  (_lora(48, r, 768), _lora(12, r, 768, 3072), _lora(12, r, 3072, 768)), printed)
        for r, printed in ((2, ".33M"), (8, "1.33M"))
    ),
    Published("LLM-Adapters", "LLaMA-7B LoRA r32 q,k,v,up,down", _llama_7b(32, 3, 1), "0.83 %"),
    Published("DoRA", "LLaMA-7B r32 q,k,v,up,down", _llama_7b(32, 3, 1, "dora"), "0.84 %"),
    Published("DoRA", "LLaMA-7B r16 q,k,v,up,down", _llama_7b(16, 3, 1, "dora"), "0.43 %"),
    Published("VeRA", "RoBERTa-base r1024 q,v", (("vera", dict(n=24, r=1024, d_out=768)),), ".043M"),
    Published("VeRA", "RoBERTa-large r256 q,v", (("vera", dict(n=48, r=256, d_out=1024)),), ".061M"),
    Published("VeRA", "LLaMA-7B LoRA r64, all linear", _llama_7b(64, 4, 2), "159.9M"),
    Published("(IA)³", "T0-3B", (("ia3", dict(L=24, k=2048, v=2048, f=5120)),
                                ("ia3-decoder", dict(L=24, k=2048, v=2048, f=5120))), "540K"),
    Published("PEFT docs", "opt-350m r16 q,v", (_lora(48, 16, 1024),), "1,572,864"),
    Published("PEFT docs", "bloomz-560m P-tuning 20, h 128", (("p-tuning", dict(n=20, d=1024, h=128)),), "300,288"),
    Published("PEFT docs", "bloomz-560m prefix 20", (("prefix", dict(n=20, L=24, h_kv=16, d_h=64)),), "983,040"),
    _prompt("PEFT docs", 8, 1024, "8,192"),
    Published("PEFT docs", "Qwen2.5-3B r16 q,v", (_lora(36, 16, 2048), _lora(36, 16, 2048, 256)), "3,686,400"),
    Published("PEFT docs", "whisper-large-v2 r32 q,v", (_lora(2 * 96, 32, 1280),), "15,728,640"),
    Published("PEFT docs", "bert-base-cased r8 q,k, head", (_lora(24, 8, 768), ("head", dict(d=768, V=2))), "296,450"),
    # What the papers print, and the architecture does not give:
    Published("LoRA T3", "GPT-2 M q,v r4", (_lora(48, 4, 1024),), "0.35M", False),
    Published("LoRA T3", "GPT-2 L q,v r4", (_lora(72, 4, 1280),), "0.77M", False),
    Published("LoRA T4", "GPT-3 PreLayer 8+8", (("prelayer", dict(L=GPT3_L, d=GPT3, p=8, i=8)),), "20.2M", False),
    Published("LoRA T4", "GPT-3 BitFit: 11·d·L and the last norm's d",
              (("bitfit", dict(d=GPT3, L=GPT3_L)), ("prompt", dict(copies=1, n=1, d=GPT3))), "14.2M", False),
    _prompt("Lester T4", 20, 512, "10,420", False),
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# A model and a method
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Line:
    """What one place trains: `path`, and the trained tensors there, {name: shape}."""

    path: str
    parts: dict[str, tuple[int, ...]]

    @property
    def trainable(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.parts.values())

    def latex(self) -> str:
        r"""Each tensor's size over its name: \underbrace{8\cdot 768}_{A}+\underbrace{768\cdot 8}_{B}."""
        dot = r"\cdot "
        return "+".join(
            rf"\underbrace{{{dot.join(map(str, shape)) or '1'}}}_{{\mathrm{{{name}}}}}"
            for name, shape in self.parts.items()
        )


@dataclass(frozen=True)
class Budget:
    """Exact counts of a method on a model. `base`: parameters without it; `total`: with it; `lines`: place by place.

    `file_bytes`: the adapter's safetensors file in float32: exact for LoRA, whose names are PEFT's, and within a few
    bytes a tensor for the others.
    """

    base: int
    trainable: int
    total: int
    lines: tuple[Line, ...]
    file_bytes: int

    @property
    def share(self) -> float:
        """trainable / total."""
        return self.trainable / self.total

    def latex(self) -> str:
        """The count as one formula: equal places are put together, n·(…)."""
        same = Counter(line.latex() for line in self.lines)
        return "+".join(rf"{n}\,({term})" for term, n in same.items()) + f"={grouped(self.trainable)}"

    def table(self):
        """One row a place: path, shapes of what trains, how many. A pandas DataFrame."""
        import pandas as pd

        rows = [(line.path, " + ".join(f"{n} {'×'.join(map(str, s))}" for n, s in line.parts.items()), line.trainable)
                for line in self.lines]  # fmt: skip
        return pd.DataFrame(rows, columns=["place", "trains", "numbers"])

    def __str__(self) -> str:
        size = f"{self.file_bytes / 1e6:,.1f} MB" if self.file_bytes >= 1e5 else f"{self.file_bytes / 1e3:,.1f} kB"
        return f"{self.trainable:,} of {self.total:,} ({100 * self.share:.3g} %), adapter file {size}"


def budget(model, method: Method | Sequence[Method]) -> Budget:
    """What `method` trains on `model`: a name in the catalogue, a configuration of transformers, or a module.

    Names and configurations are built on the meta device: shapes without memory. A module is used where it is and given
    back as it was. Raises like `attach`, and ValueError for an unknown name.
    """
    tuned = attach(on_meta(model), method)
    try:
        count, lines, seen, keys = tuned.count(), [], set(), {}
        for layer in tuned.layers():
            parts = {}
            for name, parameter in layer.named_parameters():
                if id(parameter) not in seen and parameter.requires_grad:
                    seen.add(id(parameter))
                    parts[name] = tuple(parameter.shape)
                    suffix = {"A": ".lora_A.weight", "B": ".lora_B.weight"}.get(name, f".{name}")
                    keys[f"base_model.model.{getattr(layer, 'key', layer.path)}{suffix}"] = parts[name]
            if parts:
                lines.append(Line(layer.path, parts))
        with tuned.disabled():
            base = numbers(tuned.base)
    finally:
        tuned.detach()
    return Budget(base, count.trainable, count.total, tuple(lines), safetensors_bytes(keys))


def on_meta(model) -> nn.Module:
    """The module itself, or what a catalogue name or a transformers configuration describes, on the meta device."""
    if isinstance(model, str):
        return build(model)
    if isinstance(model, nn.Module):
        return model
    import transformers

    if not isinstance(model, transformers.PretrainedConfig):
        raise TypeError(f"model is a {type(model).__name__}; give a catalogue name, a transformers config or a module.")
    kind = getattr(transformers, (model.architectures or [""])[0], None)
    if kind is None:  # a configuration made by hand: a language model, where there is one
        writes = type(model) in transformers.AutoModelForCausalLM._model_mapping
        kind = transformers.AutoModelForCausalLM if writes else transformers.AutoModel
    with torch.device("meta"):
        return kind(model) if isinstance(kind, type) and issubclass(kind, nn.Module) else kind.from_config(model)


def safetensors_bytes(tensors: dict[str, tuple[int, ...]]) -> int:
    """The size of a safetensors file of float32 tensors: 8 + the header, padded to 8 bytes, + 4 bytes a number."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for key, shape in sorted(tensors.items()):
        size = 4 * torch.Size(shape).numel()
        header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + at


# ---------------------------------------------------------------------------------------------------------------------
# Multiply-adds
# ---------------------------------------------------------------------------------------------------------------------
def check_counts(least: int = 1, **counts: int) -> None:
    for name, number in counts.items():
        check_whole(name, number, least)


def step_share(d_in: int, d_out: int, rank: float) -> float:
    """The multiply-adds of a LoRA step on one linear layer, as a share of full fine-tuning's, for each token.

    Full: W·x, Wᵀ·g and g·xᵀ, three products of d_in·d_out. LoRA: the first two, and three with A and three with B:
        (2·d_in·d_out + 3·r·(d_in + d_out)) / (3·d_in·d_out),   for a square layer 2/3 + 2r/N
    Attention's own products (queries with keys, weights with values) are the same for both and left out.
    """
    check_counts(d_in=d_in, d_out=d_out)
    if not rank > 0:
        raise ValueError(
            f"rank={rank!r} is not a positive number; between whole ranks it says where a step breaks even."
        )
    return (2 * d_in * d_out + 3 * rank * (d_in + d_out)) / (3 * d_in * d_out)


def break_even_rank(d_in: int, d_out: int) -> float:
    """The rank at which a LoRA step costs as much as a full one: d_in·d_out / (3·(d_in + d_out)), N/6 for a square."""
    check_counts(d_in=d_in, d_out=d_out)
    return d_in * d_out / (3 * (d_in + d_out))


@dataclass(frozen=True)
class MultiplyAdds:
    """Of one training step: `linear` in layers with weights, `attention` in products of activations with each other."""

    linear: int
    attention: int

    @property
    def total(self) -> int:
        return self.linear + self.attention


def _grouped(a: tuple[int, ...], b: tuple[int, ...], *_, **__) -> int:
    """The operations of a product whose rows, or whose terms, are dealt out to the experts of a mixture."""
    return 2 * a[0] * a[1] * b[-1]


def multiply_adds(model, method: Method | Sequence[Method] | None, rows: int = 1, length: int = 128) -> MultiplyAdds:
    """Counts a forward and backward pass of `method` on `rows` texts of `length` tokens, operation by operation.

    `model`: as for `budget`; it runs on its device, so on the meta device nothing is computed. `method` None is full
    fine-tuning. Nothing is assumed about a method: products that autograd skips are not counted (with LoRA, the
    gradient for the first block's input). Elementwise work is left out.
    """
    from torch.utils.flop_counter import FlopCounterMode

    from minipeft.methods.select import Full

    check_counts(rows=rows, length=length)
    module = on_meta(model)
    config = getattr(module, "config", None)
    if next(module.parameters()).is_meta and getattr(config, "_experts_implementation", None) == "grouped_mm":
        module = copy.deepcopy(module).to(torch.bfloat16)  # without numbers, the grouped product knows no other type
    # Fused attention is one operation that hides its products from the counter.
    before = getattr(config, "_attn_implementation", None)
    if before is not None:
        module.set_attn_implementation("eager")
    tuned = attach(module, Full() if method is None else method)
    try:
        device = next(tuned.base.parameters()).device
        ids = torch.zeros(rows, length, dtype=torch.long, device=device)
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: _grouped}) as counter:
            output = tuned(input_ids=ids)
            output[0].float().sum().backward()
    finally:
        tuned.detach()
        if before is not None:
            module.set_attn_implementation(before)
    counts = {op.__name__: n // 2 for op, n in counter.get_flop_counts()["Global"].items()}
    attention = sum(n for op, n in counts.items() if op.startswith(("bmm", "baddbmm")))
    return MultiplyAdds(sum(counts.values()) - attention, attention)


# ---------------------------------------------------------------------------------------------------------------------
# Bytes
# ---------------------------------------------------------------------------------------------------------------------
PRECISIONS = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "nf4": 4.126953125 / 8}
MOMENTS = {"sgd": 0, "momentum": 1, "adam": 2}


def training_bytes(
    base: int, trainable: int, added: int = 0, precision: str = "bfloat16", optimizer: str = "adam"
) -> dict[str, int]:
    """Bytes that stay in memory while training, without activations: {"weights", "gradients", "moments"}.

    `base` numbers are stored in `precision`; `added` of the `trainable` ones are an adapter's own, stored in float32
    with float32 gradients. Those of the base that train have a gradient as wide as their weights and, if those are not
    float32, a float32 master copy. `optimizer`'s moments ("sgd" 0, "momentum" 1, "adam" 2) are float32.
    Full fine-tuning with Adam takes 16 bytes a number in float32 (4 + 4 + 8) and in bfloat16 (2 + 4 + 2 + 8).

    Raises ValueError for an unknown name, for counts that are none or do not go together, and for training the base's
    own numbers in 8 or 4 bits.
    """
    check_counts(0, base=base, trainable=trainable, added=added)
    if precision not in PRECISIONS or optimizer not in MOMENTS:
        raise ValueError(
            f"precision={precision!r} must be one of {', '.join(PRECISIONS)}, and optimizer={optimizer!r} one of "
            f"{', '.join(MOMENTS)}."
        )
    if not 0 <= added <= trainable <= base + added:
        raise ValueError(
            f"base={base:,}, trainable={trainable:,}, added={added:,} do not go together: of what trains, `added` are "
            "an adapter's own, and the rest is part of the base."
        )
    own, width = trainable - added, PRECISIONS[precision]
    if own and width < 2:
        raise ValueError(f"Weights in {precision} have no gradient, so they cannot train; use bfloat16, or an adapter.")
    return {
        "weights": round(base * width) + 4 * added + (4 * own if width < 4 else 0),
        "gradients": round(own * width) + 4 * added,
        "moments": 4 * MOMENTS[optimizer] * trainable,
    }
