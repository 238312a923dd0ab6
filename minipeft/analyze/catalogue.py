"""Real models by their shapes alone: hand-written `transformers` configurations, built on the meta device, no download.

    model = build("gpt3-175b")               # 174.6 billion numbers with shapes and no memory, in seconds
    SIZES["llama-7b"]                        # 6,738,415,616: what the built model must hold

`SIZES` holds the sizes that their publishers' files have, where they are known exactly; a test builds every entry.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def _make(model: str, config: str, **shape) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**shape))

    return make


def _bert(hidden: int, layers: int, heads: int, ff: int) -> dict:
    return dict(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=ff)


def _roberta(*shape: int) -> Callable[[], nn.Module]:
    more = dict(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
    return _make("RobertaModel", "RobertaConfig", **more, **_bert(*shape))


def _deberta(vocabulary: int, *shape: int, **more) -> Callable[[], nn.Module]:
    return _make("DebertaV2Model", "DebertaV2Config", vocab_size=vocabulary, **more, **_bert(*shape))


def _gpt2(width: int, layers: int, heads: int, positions: int = 1024) -> Callable[[], nn.Module]:
    shape = dict(n_embd=width, n_layer=layers, n_head=heads, n_positions=positions)
    return _make("GPT2LMHeadModel", "GPT2Config", **shape)


def _llama(vocabulary: int, *shape: int, kv: int | None = None, kind: str = "Llama", tied: bool = False) -> Callable:
    more = dict(vocab_size=vocabulary, num_key_value_heads=kv or shape[2], tie_word_embeddings=tied)
    return _make(f"{kind}ForCausalLM", f"{kind}Config", **more, **_bert(*shape))


def _t5(width: int, layers: int, heads: int, ff: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        config = transformers.T5Config(
            vocab_size=32128, d_model=width, d_kv=64, d_ff=ff, num_layers=layers, num_heads=heads,
            feed_forward_proj="gated-gelu", decoder_start_token_id=0,
        )  # fmt: skip
        model = transformers.T5ForConditionalGeneration(config)
        # Version 1.1 shares the embedding between encoder and decoder, and has an output layer of its own; the
        # configuration can only tie all three or none.
        model.lm_head = nn.Linear(width, 32128, bias=False)
        return model

    return make


def _whisper(width: int, layers: int, heads: int) -> Callable[[], nn.Module]:
    return _make(
        "WhisperForConditionalGeneration", "WhisperConfig", d_model=width, encoder_layers=layers, decoder_layers=layers,
        encoder_attention_heads=heads, decoder_attention_heads=heads, encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width, vocab_size=51865, num_mel_bins=80,
    )  # fmt: skip


CATALOGUE: dict[str, Callable[[], nn.Module]] = {
    "resnet-18": _make(
        "ResNetForImageClassification",
        "ResNetConfig",
        hidden_sizes=[64, 128, 256, 512],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        num_labels=1000,
    ),  # fmt: skip
    "bert-base-uncased": _make("BertModel", "BertConfig"),
    "bert-large-uncased": _make("BertModel", "BertConfig", **_bert(1024, 24, 16, 4096)),
    "bert-base-cased-classifier": _make("BertForSequenceClassification", "BertConfig", vocab_size=28996, num_labels=2),
    "roberta-base": _roberta(768, 12, 12, 3072),
    "roberta-large": _roberta(1024, 24, 16, 4096),
    "deberta-v3-base": _deberta(
        128100,
        768,
        12,
        12,
        3072,
        type_vocab_size=0,
        relative_attention=True,
        position_buckets=256,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
    ),  # fmt: skip
    "deberta-xxl": _deberta(128100, 1536, 48, 24, 6144),
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "gpt3-175b": _gpt2(12288, 96, 96, positions=2048),
    "opt-350m": _make(
        "OPTForCausalLM",
        "OPTConfig",
        hidden_size=1024,
        word_embed_proj_dim=512,
        num_hidden_layers=24,
        num_attention_heads=16,
        ffn_dim=4096,
        vocab_size=50272,
        max_position_embeddings=2048,
        do_layer_norm_before=False,
    ),  # fmt: skip
    "bloomz-560m": _make("BloomForCausalLM", "BloomConfig", vocab_size=250880, hidden_size=1024, n_layer=24, n_head=16),
    "llama-7b": _llama(32000, 4096, 32, 32, 11008),
    "llama-13b": _llama(32000, 5120, 40, 40, 13824),
    "llama-65b": _llama(32000, 8192, 80, 64, 22016),
    "llama-2-70b": _llama(32000, 8192, 80, 64, 28672, kv=8),
    "llama-3-8b": _llama(128256, 4096, 32, 32, 14336, kv=8),
    "llama-3-70b": _llama(128256, 8192, 80, 64, 28672, kv=8),
    "llama-3.1-405b": _llama(128256, 16384, 126, 128, 53248, kv=8),
    "mistral-7b": _llama(32000, 4096, 32, 32, 14336, kv=8, kind="Mistral"),
    "qwen2.5-0.5b": _llama(151936, 896, 24, 14, 4864, kv=2, kind="Qwen2", tied=True),
    "qwen2.5-3b": _llama(151936, 2048, 36, 16, 11008, kv=2, kind="Qwen2", tied=True),
    "qwen2.5-7b": _llama(152064, 3584, 28, 28, 18944, kv=4, kind="Qwen2"),
    # Its 256 routed experts a layer are stacked in one parameter, no linear layer; so LoRA reaches the dense parts:
    # attention, the shared expert, and the feed-forward part of the first three layers.
    "deepseek-v3": _make("DeepseekV3ForCausalLM", "DeepseekV3Config"),
    "t5-v1.1-small": _t5(512, 8, 6, 1024),
    "t5-v1.1-large": _t5(1024, 24, 16, 2816),
    "t5-v1.1-xl": _t5(2048, 24, 32, 5120),
    "vit-base": _make("ViTForImageClassification", "ViTConfig", num_labels=1000),
    "whisper-tiny": _whisper(384, 4, 6),
    "whisper-large-v2": _whisper(1280, 32, 20),
}

SIZES = {
    "resnet-18": 11_689_512,
    "bert-base-uncased": 109_482_240,
    "bert-large-uncased": 335_141_888,
    "roberta-base": 124_645_632,
    "roberta-large": 355_359_744,
    "deberta-v3-base": 183_831_552,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "opt-350m": 331_196_416,
    "bloomz-560m": 559_214_592,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-65b": 65_285_660_672,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "t5-v1.1-small": 76_961_152,
    "t5-v1.1-large": 783_150_080,
    "t5-v1.1-xl": 2_849_757_184,
    "vit-base": 86_567_656,
    "whisper-large-v2": 1_543_304_960,
}


def build(name: str) -> nn.Module:
    """The model of that name on the meta device. Raises ValueError, naming the entries, for another name."""
    if name not in CATALOGUE:
        raise ValueError(f"The catalogue has no {name!r}; it has {', '.join(CATALOGUE)}.")
    with torch.device("meta"):
        return CATALOGUE[name]()
