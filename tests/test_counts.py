"""Published parameter counts, exact, on the meta device, for models of the catalogue. See the papers' tables."""

from __future__ import annotations

import re
import time

import pytest
import torch
import transformers as tf

from minipeft.analyze.catalogue import build
from minipeft.attach import attach
from minipeft.methods.adalora import AdaLoRA
from minipeft.methods.adapter import Adapter
from minipeft.methods.dora import DoRA
from minipeft.methods.ia3 import IA3
from minipeft.methods.lora import LoRA
from minipeft.methods.prefix import PrefixTuning
from minipeft.methods.projected import ProjectedLoRA
from minipeft.methods.prompt import PromptTuning, PTuning
from minipeft.methods.select import BitFit, Full, Softmax
from minipeft.methods.vera import VeRA

RE = re.compile


def t5_encoder_large():
    """The half of T5.1.1 Large that Lester et al. put their prompt before."""
    shape = dict(d_model=1024, d_kv=64, d_ff=2816, num_layers=24, num_heads=16, feed_forward_proj="gated-gelu")
    with torch.device("meta"):
        return tf.T5EncoderModel(tf.T5Config(vocab_size=32128, is_encoder_decoder=False, **shape))


d = 12288
Q, K, VALUE = f"c_attn[0:{d}]", f"c_attn[{d}:{2 * d}]", f"c_attn[{2 * d}:{3 * d}]"
O = "attn.c_proj"  # noqa: E741
BERT_QV, LLAMA_QV = ["query", "value"], ["q_proj", "v_proj"]
LLAMA_5 = [*LLAMA_QV, "k_proj", "up_proj", "down_proj"]
DEBERTA_6 = RE(r"encoder\.layer\..*")

ROWS = [  # source, model, method, trainable, total or None
    ("LoRA T2", "roberta-base", LoRA(rank=8, targets=BERT_QV), 294_912, None),
    ("LoRA T2", "roberta-large", LoRA(rank=8, targets=BERT_QV), 786_432, None),
    ("LoRA repo", "deberta-xxl", LoRA(rank=16, targets=["query_proj", "value_proj"]), 4_718_592, None),
    ("LoRA T2", "roberta-base", BitFit(targets=RE(r"encoder\..*")), 101_376, None),
    ("BitFit", "bert-base-uncased", BitFit(targets=RE(r"encoder\..*")), 101_376, 109_482_240),
    ("LoRA T3, last two blocks", "gpt2-medium", Full(RE(r"transformer\.h\.(22|23)\..*")), 25_192_448, None),
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
    ("DoRA", "llama-7b", DoRA(rank=32, targets=LLAMA_5), 56_975_360, 6_738_415_616 + 56_975_360),
    ("DoRA", "llama-7b", DoRA(rank=16, targets=LLAMA_5), 28_925_952, None),
    ("VeRA", "roberta-base", VeRA(rank=1024, targets=BERT_QV), 43_008, None),
    ("VeRA", "roberta-large", VeRA(rank=256, targets=BERT_QV), 61_440, None),
    ("IA3", "t5-v1.1-xl", IA3(targets=["k", "v"], feedforward=["wo"]), 540_672, None),
    ("PiSSA, as LoRA", "llama-7b", LoRA(rank=32, targets=LLAMA_5, init="pissa"), 56_098_816, None),
    ("Σ r·(d_in + d_out + 1)", "deberta-v3-base", AdaLoRA(rank=2, targets=DEBERTA_6), 331_776 * 3 // 2 + 72 * 3, None),
    ("Σ d_out·k", "roberta-base", ProjectedLoRA(rank=8, targets=BERT_QV), 294_912 // 2, None),
    ("PEFT docs", "opt-350m", LoRA(rank=16, targets=LLAMA_QV), 1_572_864, 332_769_280),
    ("PEFT docs", "qwen2.5-3b", LoRA(rank=16, targets=LLAMA_QV), 3_686_400, 3_089_625_088),
    ("PEFT docs", "whisper-large-v2", LoRA(rank=32, targets=LLAMA_QV), 15_728_640, None),
    ("PEFT docs", "bert-base-cased-classifier", [LoRA(rank=8, targets=["query", "key"]), Softmax()], 296_450, None),
    ("LoRA T2, Houlsby", "roberta-large", Adapter(8), 835_968, None),
    ("LoRA T2, Pfeiffer", "roberta-large", Adapter(16, "pfeiffer"), 811_392, None),
    ("LoRA T4, Houlsby", "gpt3-175b", Adapter(1), 7_078_080, None),
    ("LoRA T4, Houlsby", "gpt3-175b", Adapter(8), 40_109_568, None),
    ("Houlsby", "bert-large-uncased", Adapter(64), 6_343_680, None),
    ("Houlsby, blocks in pairs", "bert-large-uncased", Adapter(64, share=2), 6_343_680 // 2, None),
    ("Houlsby, one adapter a block", "bert-large-uncased", Adapter(64, share_within=True), 6_343_680 // 2, None),
    (
        "Houlsby, one adapter a pair",
        "bert-large-uncased",
        Adapter(64, share=2, share_within=True),
        6_343_680 // 4,
        None,
    ),
    (
        "Houlsby, one adapter in all",
        "bert-large-uncased",
        Adapter(64, share=24, share_within=True),
        6_343_680 // 48,
        None,
    ),
    ("Houlsby, top 6 blocks", "bert-large-uncased", Adapter(64, top=6), 6_343_680 // 4, None),
    ("Prefix", "gpt2-medium", PrefixTuning(5), 245_760, None),
    ("PEFT docs, P-tuning", "bloomz-560m", PTuning(20, hidden=128), 300_288, None),
    ("PEFT docs, prefix", "bloomz-560m", PrefixTuning(20), 983_040, None),
    ("PEFT docs, prompt", "bloomz-560m", PromptTuning(8), 8_192, None),
    *[("Lester T4", t5_encoder_large, PromptTuning(n), 1024 * n, None) for n in (1, 5, 20, 50, 100, 150)],
    ("prefix, 2 key-value heads of 128", "qwen2.5-3b", PrefixTuning(10), 10 * 36 * 2 * 2 * 128, None),
    ("GPT-2 M, tied head", "gpt2-medium", Softmax(), 50257 * 1024, 354_823_168 + 50257 * 1024),
]


@pytest.mark.parametrize("source, name, method, trainable, total", ROWS)
def test_published_counts(source, name, method, trainable, total):
    model = build(name) if isinstance(name, str) else name()
    base = sum(p.numel() for p in model.parameters())
    count = attach(model, method).count()
    assert count.trainable == trainable, source
    assert total is None or count.total == total, source
    assert count.total >= base


def test_llm_adapters_share():
    model = build("llama-7b")
    for method, share in ((LoRA(rank=32, targets=LLAMA_5), 0.83), (DoRA(rank=32, targets=LLAMA_5), 0.84)):
        tuned = attach(model, method)
        assert round(100 * tuned.count().share, 2) == share
        tuned.detach()


def test_gpt3_takes_seconds_and_no_memory():
    import resource

    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    tuned = attach(build("gpt3-175b"), LoRA(rank=8, targets=[Q, VALUE]))
    assert tuned.count().total > 174_000_000_000
    assert time.perf_counter() - start < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kilobytes, of 700 GB of weights


def test_houlsby_share():
    """ "2.1 %" of BERT-large is of its 24 blocks."""
    model = build("bert-large-uncased")
    blocks = sum(p.numel() for p in model.encoder.parameters())
    assert round(100 * attach(model, Adapter(64)).count().trainable / blocks, 3) == 2.098
