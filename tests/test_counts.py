"""Published parameter counts, exact, on the meta device, from hand-written configurations. See the papers' tables."""

from __future__ import annotations

import re
import time

import pytest
import torch
import transformers as tf

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


def roberta(hidden: int, layers: int, heads: int, ff: int):
    shape = dict(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=ff)
    config = tf.RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, **shape)
    return tf.RobertaModel(config)


def roberta_base():
    return roberta(768, 12, 12, 3072)


def roberta_large():
    return roberta(1024, 24, 16, 4096)


def deberta_xxl():
    shape = dict(hidden_size=1536, num_hidden_layers=48, num_attention_heads=24, intermediate_size=6144)
    return tf.DebertaV2Model(tf.DebertaV2Config(vocab_size=128100, **shape))


def deberta_base():
    shape = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
    return tf.DebertaV2Model(tf.DebertaV2Config(vocab_size=128100, **shape))


def bert_base_uncased():
    return tf.BertModel(tf.BertConfig())


def bert_base_cased_classifier():
    return tf.BertForSequenceClassification(tf.BertConfig(vocab_size=28996, num_labels=2))


def bert_large():
    return tf.BertModel(
        tf.BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    )


def bloomz_560m():
    return tf.BloomForCausalLM(tf.BloomConfig(hidden_size=1024, n_layer=24, n_head=16, vocab_size=250880))


def t5_encoder_large():
    """The half of T5.1.1 Large that Lester et al. put their prompt before."""
    shape = dict(d_model=1024, d_kv=64, d_ff=2816, num_layers=24, num_heads=16, feed_forward_proj="gated-gelu")
    return tf.T5EncoderModel(tf.T5Config(vocab_size=32128, is_encoder_decoder=False, **shape))


def gpt2_medium():
    return tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=1024, n_layer=24, n_head=16))


def gpt3():
    return tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=12288, n_layer=96, n_head=96, n_positions=2048))


def llama_7b():
    shape = dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008)
    return tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=32000, tie_word_embeddings=False, **shape))


def opt_350m():
    config = tf.OPTConfig(
        hidden_size=1024, word_embed_proj_dim=512, num_hidden_layers=24, num_attention_heads=16, ffn_dim=4096,
        vocab_size=50272, max_position_embeddings=2048, do_layer_norm_before=False,
    )  # fmt: skip
    return tf.OPTForCausalLM(config)


def qwen2_5_3b():
    config = tf.Qwen2Config(
        hidden_size=2048, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2, intermediate_size=11008,
        vocab_size=151936, tie_word_embeddings=True,
    )  # fmt: skip
    return tf.Qwen2ForCausalLM(config)


def whisper_large_v2():
    config = tf.WhisperConfig(
        d_model=1280, encoder_layers=32, decoder_layers=32, encoder_attention_heads=20, decoder_attention_heads=20,
        encoder_ffn_dim=5120, decoder_ffn_dim=5120, vocab_size=51865, num_mel_bins=80,
    )  # fmt: skip
    return tf.WhisperForConditionalGeneration(config)


def t0_3b():
    config = tf.T5Config(
        vocab_size=32128, d_model=2048, d_kv=64, d_ff=5120, num_layers=24, num_heads=32,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    return tf.T5ForConditionalGeneration(config)


d = 12288
Q, K, VALUE = f"c_attn[0:{d}]", f"c_attn[{d}:{2 * d}]", f"c_attn[{2 * d}:{3 * d}]"
O = "attn.c_proj"  # noqa: E741
BERT_QV, LLAMA_QV = ["query", "value"], ["q_proj", "v_proj"]
LLAMA_5 = [*LLAMA_QV, "k_proj", "up_proj", "down_proj"]
DEBERTA_6 = RE(r"encoder\.layer\..*")

ROWS = [  # source, model, method, trainable, total or None
    ("LoRA T2", roberta_base, LoRA(rank=8, targets=BERT_QV), 294_912, None),
    ("LoRA T2", roberta_large, LoRA(rank=8, targets=BERT_QV), 786_432, None),
    ("LoRA repo", deberta_xxl, LoRA(rank=16, targets=["query_proj", "value_proj"]), 4_718_592, None),
    ("LoRA T2", roberta_base, BitFit(targets=RE(r"encoder\..*")), 101_376, None),
    ("BitFit", bert_base_uncased, BitFit(targets=RE(r"encoder\..*")), 101_376, 109_482_240),
    ("LoRA T3, last two blocks", gpt2_medium, Full(targets=RE(r"transformer\.h\.(22|23)\..*")), 25_192_448, None),
    ("LoRA T4, q and v", gpt3, LoRA(rank=1, targets=[Q, VALUE]), 4_718_592, None),
    ("LoRA T4, q and v", gpt3, LoRA(rank=8, targets=[Q, VALUE]), 37_748_736, None),
    ("LoRA T5, q", gpt3, LoRA(rank=8, targets=[Q]), 18_874_368, None),
    ("LoRA T5, k", gpt3, LoRA(rank=8, targets=[K]), 18_874_368, None),
    ("LoRA T5, o", gpt3, LoRA(rank=8, targets=[O]), 18_874_368, None),
    ("LoRA T5, q and k", gpt3, LoRA(rank=4, targets=[Q, K]), 18_874_368, None),
    ("LoRA T5, q, k, v, o", gpt3, LoRA(rank=2, targets=[Q, K, VALUE, O]), 18_874_368, None),
    ("AdaLoRA", deberta_base, LoRA(rank=2, targets=RE(r"encoder\.layer\..*")), 331_776, None),
    ("AdaLoRA", deberta_base, LoRA(rank=8, targets=RE(r"encoder\.layer\..*")), 1_327_104, None),
    ("LLM-Adapters", llama_7b, LoRA(rank=32, targets=[*LLAMA_QV, "k_proj", "up_proj", "down_proj"]), 56_098_816, None),
    ("VeRA", llama_7b, LoRA(rank=64, targets="all-linear"), 159_907_840, 6_738_415_616 + 159_907_840),
    ("DoRA", llama_7b, DoRA(rank=32, targets=LLAMA_5), 56_975_360, 6_738_415_616 + 56_975_360),
    ("DoRA", llama_7b, DoRA(rank=16, targets=LLAMA_5), 28_925_952, None),
    ("VeRA", roberta_base, VeRA(rank=1024, targets=BERT_QV), 43_008, None),
    ("VeRA", roberta_large, VeRA(rank=256, targets=BERT_QV), 61_440, None),
    ("IA3", t0_3b, IA3(targets=["k", "v"], feedforward=["wo"]), 540_672, None),
    ("PiSSA, as LoRA", llama_7b, LoRA(rank=32, targets=LLAMA_5, init="pissa"), 56_098_816, None),
    ("Σ r·(d_in + d_out + 1)", deberta_base, AdaLoRA(rank=2, targets=DEBERTA_6), 331_776 * 3 // 2 + 72 * 3, None),
    ("Σ d_out·k", roberta_base, ProjectedLoRA(rank=8, targets=BERT_QV), 294_912 // 2, None),
    ("PEFT docs", opt_350m, LoRA(rank=16, targets=LLAMA_QV), 1_572_864, 332_769_280),
    ("PEFT docs", qwen2_5_3b, LoRA(rank=16, targets=LLAMA_QV), 3_686_400, 3_089_625_088),
    ("PEFT docs", whisper_large_v2, LoRA(rank=32, targets=LLAMA_QV), 15_728_640, None),
    ("PEFT docs", bert_base_cased_classifier, [LoRA(rank=8, targets=["query", "key"]), Softmax()], 296_450, None),
    ("LoRA T2, Houlsby", roberta_large, Adapter(8), 835_968, None),
    ("LoRA T2, Pfeiffer", roberta_large, Adapter(16, "pfeiffer"), 811_392, None),
    ("LoRA T4, Houlsby", gpt3, Adapter(1), 7_078_080, None),
    ("LoRA T4, Houlsby", gpt3, Adapter(8), 40_109_568, None),
    ("Houlsby", bert_large, Adapter(64), 6_343_680, None),
    ("Houlsby, blocks in pairs", bert_large, Adapter(64, share=2), 6_343_680 // 2, None),
    ("Houlsby, one adapter a block", bert_large, Adapter(64, share_within=True), 6_343_680 // 2, None),
    ("Houlsby, one adapter a pair", bert_large, Adapter(64, share=2, share_within=True), 6_343_680 // 4, None),
    ("Houlsby, one adapter in all", bert_large, Adapter(64, share=24, share_within=True), 6_343_680 // 48, None),
    ("Houlsby, top 6 blocks", bert_large, Adapter(64, top=6), 6_343_680 // 4, None),
    ("Prefix", gpt2_medium, PrefixTuning(5), 245_760, None),
    ("PEFT docs, P-tuning", bloomz_560m, PTuning(20, hidden=128), 300_288, None),
    ("PEFT docs, prefix", bloomz_560m, PrefixTuning(20), 983_040, None),
    ("PEFT docs, prompt", bloomz_560m, PromptTuning(8), 8_192, None),
    *[("Lester T4", t5_encoder_large, PromptTuning(n), 1024 * n, None) for n in (1, 5, 20, 50, 100, 150)],
    ("prefix, 2 key-value heads of 128", qwen2_5_3b, PrefixTuning(10), 10 * 36 * 2 * 2 * 128, None),
    ("GPT-2 M, tied head", gpt2_medium, Softmax(), 50257 * 1024, 354_823_168 + 50257 * 1024),
]


@pytest.mark.parametrize("source, build, method, trainable, total", ROWS, ids=lambda v: getattr(v, "__name__", None))
def test_published_counts(source, build, method, trainable, total):
    with torch.device("meta"):
        model = build()
    base = sum(p.numel() for p in model.parameters())
    count = attach(model, method).count()
    assert count.trainable == trainable, source
    assert total is None or count.total == total, source
    assert count.total >= base


def test_llm_adapters_share():
    with torch.device("meta"):
        model = llama_7b()
    for method, share in ((LoRA(rank=32, targets=LLAMA_5), 0.83), (DoRA(rank=32, targets=LLAMA_5), 0.84)):
        tuned = attach(model, method)
        assert round(100 * tuned.count().share, 2) == share
        tuned.detach()


def test_gpt3_takes_seconds_and_no_memory():
    import resource

    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with torch.device("meta"):
        model = gpt3()
    tuned = attach(model, LoRA(rank=8, targets=[Q, VALUE]))
    assert tuned.count().total > 174_000_000_000
    assert time.perf_counter() - start < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kilobytes, of 700 GB of weights


def test_houlsby_share():
    """ "2.1 %" of BERT-large is of its 24 blocks."""
    with torch.device("meta"):
        model = bert_large()
    blocks = sum(p.numel() for p in model.encoder.parameters())
    assert round(100 * attach(model, Adapter(64)).count().trainable / blocks, 3) == 2.098
