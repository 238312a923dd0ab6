"""Published parameter counts, exact, on the meta device, for models of the catalogue. See the papers' tables."""

from __future__ import annotations

import re
import time

import pytest

from minipeft.analyze.catalogue import build
from minipeft.attach import attach
from minipeft.methods.lora import LoRA
from minipeft.methods.select import BitFit, Full, Softmax

RE = re.compile


d = 12288
Q, K, VALUE = f"c_attn[0:{d}]", f"c_attn[{d}:{2 * d}]", f"c_attn[{2 * d}:{3 * d}]"
O = "attn.c_proj"  # noqa: E741
BERT_QV, LLAMA_QV = ["query", "value"], ["q_proj", "v_proj"]

ROWS = [  # source, model, method, trainable, total or None
    ("LoRA T2", "roberta-base", LoRA(rank=8, targets=BERT_QV), 294_912, None),
    ("LoRA T2", "roberta-large", LoRA(rank=8, targets=BERT_QV), 786_432, None),
    ("LoRA repo", "deberta-xxl", LoRA(rank=16, targets=["query_proj", "value_proj"]), 4_718_592, None),
    ("LoRA T2", "roberta-base", BitFit(targets=RE(r"encoder\..*")), 101_376, None),
    ("BitFit", "bert-base-uncased", BitFit(targets=RE(r"encoder\..*")), 101_376, 109_482_240),
    ("LoRA T3, last two blocks", "gpt2-medium", Full(targets=RE(r"transformer\.h\.(22|23)\..*")), 25_192_448, None),
    ("LoRA T4, q and v", "gpt3-175b", LoRA(rank=1, targets=[Q, VALUE]), 4_718_592, None),
    ("LoRA T4, q and v", "gpt3-175b", LoRA(rank=8, targets=[Q, VALUE]), 37_748_736, None),
    ("LoRA T5, q", "gpt3-175b", LoRA(rank=8, targets=[Q]), 18_874_368, None),
    ("LoRA T5, k", "gpt3-175b", LoRA(rank=8, targets=[K]), 18_874_368, None),
    ("LoRA T5, o", "gpt3-175b", LoRA(rank=8, targets=[O]), 18_874_368, None),
    ("LoRA T5, q and k", "gpt3-175b", LoRA(rank=4, targets=[Q, K]), 18_874_368, None),
    ("LoRA T5, q, k, v, o", "gpt3-175b", LoRA(rank=2, targets=[Q, K, VALUE, O]), 18_874_368, None),
    ("AdaLoRA", "deberta-v3-base", LoRA(rank=2, targets=RE(r"encoder\.layer\..*")), 331_776, None),
    ("AdaLoRA", "deberta-v3-base", LoRA(rank=8, targets=RE(r"encoder\.layer\..*")), 1_327_104, None),
    (
        "LLM-Adapters",
        "llama-7b",
        LoRA(rank=32, targets=[*LLAMA_QV, "k_proj", "up_proj", "down_proj"]),
        56_098_816,
        None,
    ),
    ("VeRA", "llama-7b", LoRA(rank=64, targets="all-linear"), 159_907_840, 6_738_415_616 + 159_907_840),
    ("PEFT docs", "opt-350m", LoRA(rank=16, targets=LLAMA_QV), 1_572_864, 332_769_280),
    ("PEFT docs", "qwen2.5-3b", LoRA(rank=16, targets=LLAMA_QV), 3_686_400, 3_089_625_088),
    ("PEFT docs", "whisper-large-v2", LoRA(rank=32, targets=LLAMA_QV), 15_728_640, None),
    ("PEFT docs", "bert-base-cased-classifier", [LoRA(rank=8, targets=["query", "key"]), Softmax()], 296_450, None),
    ("GPT-2 M, tied head", "gpt2-medium", Softmax(), 50257 * 1024, 354_823_168 + 50257 * 1024),
]


@pytest.mark.parametrize("source, name, method, trainable, total", ROWS)
def test_published_counts(source, name, method, trainable, total):
    model = build(name)
    base = sum(p.numel() for p in model.parameters())
    count = attach(model, method).count()
    assert count.trainable == trainable, source
    assert total is None or count.total == total, source
    assert count.total >= base


def test_llm_adapters_share():
    count = attach(build("llama-7b"), LoRA(rank=32, targets=[*LLAMA_QV, "k_proj", "up_proj", "down_proj"])).count()
    assert round(100 * count.share, 2) == 0.83


def test_gpt3_takes_seconds_and_no_memory():
    import resource

    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    tuned = attach(build("gpt3-175b"), LoRA(rank=8, targets=[Q, VALUE]))
    assert tuned.count().total > 174_000_000_000
    assert time.perf_counter() - start < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kilobytes, of 700 GB of weights
