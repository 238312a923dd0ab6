"""Tiny random models of many architectures of transformers, from hand-written configurations: no download.

one = ARCHITECTURES["Mistral"]
one.model()                 in eval mode, with the same numbers every time; built in less than a tenth of a second
one.batch()                 what its forward needs; one.batch(labels=True) has a loss too, if the model has one
one.kind                    "causal", "encoder", "pair" (an encoder and a decoder), "image" or "sound"
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import transformers
from torch import nn

V, D = 61, 16  # vocabulary, width


@dataclass(frozen=True)
class Architecture:
    """`head`: the class in transformers. `settings`: of its configuration, beside the vocabulary and special tokens."""

    kind: str
    head: str
    settings: dict = field(repr=False)

    def model(self) -> nn.Module:
        torch.set_num_threads(1)
        cls = getattr(transformers, self.head)
        general = {} if self.kind == "image" or "Canine" in self.head else IDS
        random = torch.random.get_rng_state()
        torch.manual_seed(0)
        model = cls(cls.config_class(**general | self.settings)).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # biases and norms too: nothing may be hidden by a zero or a one
                parameter += 0.2 * torch.randn_like(parameter)
        torch.random.set_rng_state(random)
        return model

    def batch(self, rows: int = 2, length: int = 7, labels: bool = False) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        if self.kind == "image":
            batch = {"pixel_values": torch.randn(rows, 3, 16, 16, generator=generator)}
        elif self.kind == "sound":
            name, shape = SOUNDS.get(self.head, ("input_values", (400,)))
            batch = {name: torch.randn(rows, *shape, generator=generator)}
        else:
            batch = {"input_ids": torch.randint(6, V, (rows, length), generator=generator)}
        if self.head.startswith(("LayoutLM", "Lilt")):
            batch["bbox"] = torch.randint(0, 20, (rows, length, 4), generator=generator).sort(-1).values
        if self.kind == "pair" or self.head in SOUNDS:
            batch["decoder_input_ids"] = torch.randint(6, V, (rows, 5), generator=generator)
        return batch | (self._labels(batch, rows) if labels else {})

    def _labels(self, batch: dict[str, torch.Tensor], rows: int) -> dict[str, torch.Tensor]:
        several = torch.arange(rows) % 3
        if "QuestionAnswering" in self.head:
            return {"start_positions": several, "end_positions": several + 2}
        if "TokenClassification" in self.head:
            return {"labels": batch["input_ids"] % 3}
        if "Classification" in self.head:
            return {"labels": several}
        if self.head.endswith("Model"):
            return {}
        if "CTC" in self.head:
            return {"labels": several[:, None] + 6}
        return {"labels": batch.get("decoder_input_ids", batch.get("input_ids"))}

    def hidden(self, output) -> torch.Tensor:
        """What there is of logits, starts of an answer, or hidden states."""
        return next(output[key] for key in ("logits", "start_logits", "last_hidden_state") if key in output)


IDS = {"vocab_size": V, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FROM_PAD = {"pad_token_id": 1, "bos_token_id": 0}  # positions begin at the padding's id + 1
BODY = dict(hidden_size=D, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, max_position_embeddings=64)
FEW = BODY | {"num_key_value_heads": 2}
WIDE = FEW | {"head_dim": 8}
GPT = dict(n_embd=D, n_layer=2, n_head=4, n_positions=64)
T5 = dict(d_model=D, d_kv=4, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=4, decoder_start_token_id=0)
BART = dict(
    d_model=D, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=64, decoder_start_token_id=2,
)  # fmt: skip
LATENT = dict(kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=6)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, shared_expert_intermediate_size=8)
STATE = dict(hidden_size=D, num_hidden_layers=2, state_size=4)
IMAGE = dict(image_size=16, patch_size=8, num_labels=3)
WAVES = dict(
    conv_dim=(16, 16), conv_stride=(4, 4), conv_kernel=(8, 4), num_feat_extract_layers=2, num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=4, mask_time_prob=0.0, apply_spec_augment=False,
)  # fmt: skip
SPOKEN = BART | dict(max_source_positions=40, max_target_positions=40)
SOUNDS = {  # what encoders of sound read, when a decoder writes down what they hear
    "WhisperForConditionalGeneration": ("input_features", (8, 80)),
    "Speech2TextForConditionalGeneration": ("input_features", (20, 8)),
}

# fmt: off
CAUSAL = {
    "Llama": ("LlamaForCausalLM", FEW),
    "Llama, classifier": ("LlamaForSequenceClassification", FEW | dict(num_labels=3)),
    "GPT-2": ("GPT2LMHeadModel", GPT),
    "GPT-2, classifier": ("GPT2ForSequenceClassification", GPT | dict(num_labels=3)),
    "OPT": ("OPTForCausalLM", dict(hidden_size=D, num_hidden_layers=2, num_attention_heads=4, ffn_dim=24,
                                   max_position_embeddings=64, word_embed_proj_dim=8)),
    "GPT-Neo": ("GPTNeoForCausalLM", dict(hidden_size=D, num_layers=2, num_heads=4, window_size=4, intermediate_size=24,
                                          attention_types=[[["global", "local"], 1]], max_position_embeddings=64)),
    "GPT-NeoX": ("GPTNeoXForCausalLM", BODY),
    "GPT-J": ("GPTJForCausalLM", GPT | dict(rotary_dim=4)),
    "CodeGen": ("CodeGenForCausalLM", GPT | dict(rotary_dim=4)),
    "Bloom": ("BloomForCausalLM", dict(hidden_size=D, n_layer=2, n_head=4)),
    "MPT": ("MptForCausalLM", dict(d_model=D, n_heads=4, n_layers=2, max_seq_len=64, expansion_ratio=2)),
    "Falcon, one key-value head": ("FalconForCausalLM", dict(
        hidden_size=D, num_hidden_layers=2, num_attention_heads=4)),
    "Falcon, grouped": ("FalconForCausalLM", dict(hidden_size=D, num_hidden_layers=2, num_attention_heads=4,
                                                  new_decoder_architecture=True, num_kv_heads=2, alibi=False)),
    "Phi": ("PhiForCausalLM", BODY),
    "Phi-3": ("Phi3ForCausalLM", FEW),
    "Phi-MoE": ("PhimoeForCausalLM", FEW | dict(num_local_experts=4)),
    "Gemma": ("GemmaForCausalLM", WIDE),
    "Gemma-2": ("Gemma2ForCausalLM", WIDE | dict(sliding_window=4)),
    "Gemma-3": ("Gemma3ForCausalLM", WIDE | dict(
        sliding_window=4, layer_types=["sliding_attention", "full_attention"])),
    "Qwen2": ("Qwen2ForCausalLM", FEW),
    "Qwen2, tokens": ("Qwen2ForTokenClassification", FEW | dict(num_labels=3)),
    "Qwen3": ("Qwen3ForCausalLM", WIDE),
    "Mistral": ("MistralForCausalLM", FEW | dict(sliding_window=4)),
    "Mixtral": ("MixtralForCausalLM", FEW | dict(num_local_experts=4)),
    "Qwen2-MoE": ("Qwen2MoeForCausalLM", FEW | MOE),
    "OLMoE": ("OlmoeForCausalLM", FEW | dict(num_experts=4, num_experts_per_tok=2)),
    "OLMo-2": ("Olmo2ForCausalLM", FEW),
    "Cohere": ("CohereForCausalLM", FEW),
    "StableLM": ("StableLmForCausalLM", FEW | dict(partial_rotary_factor=0.5)),
    "StarCoder2": ("Starcoder2ForCausalLM", FEW),
    "Granite": ("GraniteForCausalLM", FEW),
    "GPT-BigCode, one key-value head": ("GPTBigCodeForCausalLM", GPT),
    "XGLM": ("XGLMForCausalLM", dict(
        d_model=D, num_layers=2, attention_heads=4, ffn_dim=24, max_position_embeddings=64)),
    "BioGPT": ("BioGptForCausalLM", BODY),
    "Persimmon": ("PersimmonForCausalLM", BODY),
    "Nemotron": ("NemotronForCausalLM", FEW),
    "GLM": ("GlmForCausalLM", FEW | dict(head_dim=4)),
    "SmolLM3": ("SmolLM3ForCausalLM", FEW),
    "Helium": ("HeliumForCausalLM", FEW | dict(head_dim=4)),
    "DiffLlama": ("DiffLlamaForCausalLM", FEW),
    "JetMoe": ("JetMoeForCausalLM", dict(hidden_size=D, num_hidden_layers=2, num_key_value_heads=2, kv_channels=4,
                                         intermediate_size=24, num_local_experts=4, max_position_embeddings=64)),
    "gpt-oss": ("GptOssForCausalLM", WIDE | dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=4,
                                                 rope_parameters={"rope_type": "default", "rope_theta": 1e4})),
    "ModernBERT, decoder": ("ModernBertDecoderForCausalLM", BODY | dict(
        local_attention=4, global_attn_every_n_layers=2)),
    "RoBERTa, decoder": ("RobertaForCausalLM", BODY | FROM_PAD | dict(is_decoder=True)),
    "CTRL": ("CTRLLMHeadModel", GPT | dict(dff=24)),
    "GPT": ("OpenAIGPTLMHeadModel", GPT),
    "DeepSeek-V3": ("DeepseekV3ForCausalLM", BODY | LATENT | dict(
        num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, n_group=1,
        topk_group=1, first_k_dense_replace=1)),
    "MiniCPM-3": ("MiniCPM3ForCausalLM", BODY | LATENT | dict(num_key_value_heads=4)),
    "Jamba": ("JambaForCausalLM", FEW | dict(
        attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, num_experts=2,
        mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False)),
    "Bamba": ("BambaForCausalLM", FEW | dict(
        attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4, mamba_n_groups=1)),
    "LFM2": ("Lfm2ForCausalLM", FEW | dict(layer_types=["conv", "full_attention"])),
    "Qwen3-Next": ("Qwen3NextForCausalLM", WIDE | MOE | dict(
        linear_key_head_dim=4, linear_value_head_dim=4, linear_num_key_heads=2, linear_num_value_heads=4,
        layer_types=["linear_attention", "full_attention"])),
    "Mamba": ("MambaForCausalLM", STATE | dict(time_step_rank=4)),
    "Mamba-2": ("Mamba2ForCausalLM", STATE | dict(num_heads=4, head_dim=8, n_groups=1)),
    "FalconMamba": ("FalconMambaForCausalLM", STATE | dict(time_step_rank=4)),
    "RecurrentGemma": ("RecurrentGemmaForCausalLM", dict(
        hidden_size=D, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=1, intermediate_size=24,
        lru_width=D, attention_window_size=8)),
    "RWKV": ("RwkvForCausalLM", dict(
        hidden_size=D, num_hidden_layers=2, attention_hidden_size=D, intermediate_size=24, context_length=64)),
    "XLNet": ("XLNetLMHeadModel", dict(d_model=D, n_layer=2, n_head=4, d_inner=24)),
}
ENCODER = {
    "BERT": ("BertForMaskedLM", BODY),
    "BERT, classifier": ("BertForSequenceClassification", BODY | dict(num_labels=3)),
    "BERT, answers": ("BertForQuestionAnswering", BODY),
    "BERT, tokens": ("BertForTokenClassification", BODY | dict(num_labels=3)),
    "RoBERTa": ("RobertaForMaskedLM", BODY | FROM_PAD),
    "RoBERTa, classifier": ("RobertaForSequenceClassification", BODY | FROM_PAD | dict(num_labels=3)),
    "RoBERTa, norm first": ("RobertaPreLayerNormForMaskedLM", BODY | FROM_PAD),
    "XLM-R": ("XLMRobertaForMaskedLM", BODY | FROM_PAD),
    "XLM-R XL": ("XLMRobertaXLForMaskedLM", BODY | FROM_PAD),
    "X-MOD": ("XmodForMaskedLM", BODY | FROM_PAD | dict(default_language="en_XX", languages=["en_XX"])),
    "CamemBERT, tokens": ("CamembertForTokenClassification", BODY | FROM_PAD | dict(num_labels=3)),
    "Longformer": ("LongformerForMaskedLM", BODY | FROM_PAD | dict(attention_window=4, sep_token_id=2)),
    "MPNet": ("MPNetForMaskedLM", BODY | FROM_PAD),
    "Data2Vec": ("Data2VecTextForMaskedLM", BODY | FROM_PAD),
    "ESM": ("EsmForMaskedLM", BODY | dict(pad_token_id=1, mask_token_id=3, token_dropout=True)),
    "LUKE": ("LukeForMaskedLM", BODY | FROM_PAD | dict(entity_vocab_size=8, entity_emb_size=8)),
    "LiLT, tokens": ("LiltForTokenClassification", BODY | FROM_PAD | dict(
        hidden_size=24, max_2d_position_embeddings=64, channel_shrink_ratio=2, num_labels=3)),
    "LayoutLM": ("LayoutLMForMaskedLM", BODY | dict(max_2d_position_embeddings=64)),
    "LayoutLMv3, tokens": ("LayoutLMv3ForTokenClassification", BODY | FROM_PAD | dict(
        max_2d_position_embeddings=64, coordinate_size=2, shape_size=4, visual_embed=False, num_labels=3,
        has_relative_attention_bias=False, has_spatial_attention_bias=False)),
    "MarkupLM, tokens": ("MarkupLMForTokenClassification", BODY | dict(num_labels=3)),
    "ELECTRA": ("ElectraForMaskedLM", BODY | dict(embedding_size=8)),
    "ELECTRA, discriminator": ("ElectraForPreTraining", BODY | dict(embedding_size=8)),
    "DistilBERT": ("DistilBertForMaskedLM", dict(
        dim=D, n_layers=2, n_heads=4, hidden_dim=24, max_position_embeddings=64)),
    "ALBERT": ("AlbertForMaskedLM", BODY | dict(embedding_size=8)),
    "DeBERTa": ("DebertaForMaskedLM", BODY | dict(relative_attention=True, pos_att_type=["p2c", "c2p"])),
    "DeBERTa-v2": ("DebertaV2ForMaskedLM", BODY | dict(
        relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, share_att_key=True,
        norm_rel_ebd="layer_norm", position_biased_input=False)),
    "ModernBERT": ("ModernBertForMaskedLM", BODY | dict(
        local_attention=4, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2)),
    "BigBird": ("BigBirdForMaskedLM", BODY | dict(attention_type="original_full", sep_token_id=2)),
    "MobileBERT": ("MobileBertForMaskedLM", BODY | dict(
        embedding_size=8, intra_bottleneck_size=8, true_hidden_size=8)),
    "SqueezeBERT": ("SqueezeBertForMaskedLM", BODY | dict(embedding_size=16)),
    "FNet": ("FNetForMaskedLM", dict(
        hidden_size=D, num_hidden_layers=2, intermediate_size=24, max_position_embeddings=64)),
    "Funnel": ("FunnelForMaskedLM", dict(d_model=D, block_sizes=[1, 1], n_head=4, d_head=4, d_inner=24,
                                         num_decoder_layers=1)),
    "Nystromformer": ("NystromformerForMaskedLM", BODY | dict(num_landmarks=8, segment_means_seq_len=8)),
    "MRA": ("MraForMaskedLM", BODY),
    "YOSO": ("YosoForMaskedLM", BODY),
    "RemBERT": ("RemBertForMaskedLM", BODY | dict(input_embedding_size=8, output_embedding_size=8)),
    "RoFormer": ("RoFormerForMaskedLM", BODY | dict(embedding_size=8)),
    "ConvBERT": ("ConvBertForMaskedLM", BODY | dict(embedding_size=8, head_ratio=2)),
    "XLM": ("XLMWithLMHeadModel", dict(emb_dim=D, n_layers=2, n_heads=4, max_position_embeddings=64, pad_index=0,
                                       unk_index=3, mask_index=4)),
    "Megatron-BERT": ("MegatronBertForMaskedLM", BODY),
    "ERNIE": ("ErnieForMaskedLM", BODY),
    "RoCBert": ("RoCBertForMaskedLM", BODY | dict(pronunciation_vocab_size=8, shape_vocab_size=8,
                                                  pronunciation_embed_dim=4, shape_embed_dim=4)),
    "EuroBERT": ("EuroBertForMaskedLM", FEW),
    "NomicBERT": ("NomicBertForMaskedLM", BODY),
    "T5, encoder": ("T5EncoderModel", T5),
    "UMT5, encoder": ("UMT5EncoderModel", T5),
    "CANINE": ("CanineForSequenceClassification", BODY | dict(local_transformer_stride=8, num_hash_buckets=16,
                                                              num_labels=3)),
}
PAIR = {
    "T5": ("T5ForConditionalGeneration", T5),
    "T5, three layers": ("T5ForConditionalGeneration", T5 | dict(num_layers=3, num_decoder_layers=3)),
    "UMT5": ("UMT5ForConditionalGeneration", T5),
    "mT5": ("MT5ForConditionalGeneration", T5),
    "LongT5": ("LongT5ForConditionalGeneration", T5 | dict(local_radius=3)),
    "Switch": ("SwitchTransformersForConditionalGeneration", T5 | dict(
        num_experts=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1)),
    "BART": ("BartForConditionalGeneration", BART | dict(scale_embedding=True)),
    "mBART": ("MBartForConditionalGeneration", BART),
    "Pegasus": ("PegasusForConditionalGeneration", BART),
    "Pegasus-X": ("PegasusXForConditionalGeneration", BART | dict(block_size=4, num_global_tokens=2)),
    "Marian": ("MarianMTModel", BART | dict(decoder_vocab_size=V)),
    "Blenderbot": ("BlenderbotForConditionalGeneration", BART),
    "Blenderbot, small": ("BlenderbotSmallForConditionalGeneration", BART),
    "M2M-100": ("M2M100ForConditionalGeneration", BART | FROM_PAD),
    "NLLB-MoE": ("NllbMoeForConditionalGeneration", BART | FROM_PAD | dict(
        num_experts=2, encoder_sparse_step=2, decoder_sparse_step=2)),
    "PLBart": ("PLBartForConditionalGeneration", BART),
    "MVP": ("MvpForConditionalGeneration", BART),
    "LED": ("LEDForConditionalGeneration", BART | dict(
        attention_window=4, max_encoder_position_embeddings=64, max_decoder_position_embeddings=64)),
    "BigBird-Pegasus": ("BigBirdPegasusForConditionalGeneration", BART | dict(attention_type="original_full")),
    "ProphetNet": ("ProphetNetForConditionalGeneration", dict(
        hidden_size=D, num_encoder_layers=2, num_decoder_layers=2, num_encoder_attention_heads=4,
        num_decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=64,
        decoder_start_token_id=2)),
    "T5Gemma": ("T5GemmaForConditionalGeneration", dict(
        encoder=FEW | IDS | dict(head_dim=4), decoder=FEW | IDS | dict(head_dim=4), decoder_start_token_id=1,
        dropout_rate=0.0)),
}
IMAGES = {
    "ViT": ("ViTForImageClassification", BODY | IMAGE),
    "DeiT": ("DeiTForImageClassification", BODY | IMAGE),
    "BEiT": ("BeitForImageClassification", BODY | IMAGE),
    "DINOv2": ("Dinov2ForImageClassification", BODY | IMAGE | dict(mlp_ratio=2)),
    "Swin": ("SwinForImageClassification", dict(
        embed_dim=8, depths=[1, 1], num_heads=[2, 4], window_size=2, image_size=16, patch_size=4, num_labels=3)),
    "ConvNeXt": ("ConvNextForImageClassification", dict(
        num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], patch_size=4, num_labels=3)),
    "ResNet": ("ResNetForImageClassification", dict(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)),
}
SOUND = {
    "wav2vec 2": ("Wav2Vec2ForCTC", BODY | WAVES),
    "HuBERT": ("HubertForCTC", BODY | WAVES),
    "WavLM, classifier": ("WavLMForSequenceClassification", BODY | WAVES | dict(num_labels=3)),
    "Whisper": ("WhisperForConditionalGeneration", SPOKEN | dict(
        num_mel_bins=8, suppress_tokens=None, begin_suppress_tokens=None)),
    "Speech2Text": ("Speech2TextForConditionalGeneration", SPOKEN | dict(
        input_feat_per_channel=8, conv_channels=8, conv_kernel_sizes=(3,), num_conv_layers=1)),
}
# fmt: on

KINDS = {"causal": CAUSAL, "encoder": ENCODER, "pair": PAIR, "image": IMAGES, "sound": SOUND}
ARCHITECTURES = {name: Architecture(kind, *what) for kind, all_ in KINDS.items() for name, what in all_.items()}

# Who refuses a prompt or a prefix at `attach`, and what the sentence says.
NO_PROMPT = {
    "CANINE": "token embeddings",  # it hashes characters
    **dict.fromkeys(("ELECTRA, discriminator", "XLNet"), "single places"),
    **dict.fromkeys(("Whisper", "Speech2Text"), "embeds none"),
}
NO_PREFIX = {
    "CANINE": "token embeddings",
    # no argument for a cache, or one that no layer reads
    **dict.fromkeys(
        ("GPT", "XLNet", "Longformer", "MPNet", "ESM", "LUKE", "LiLT, tokens", "LayoutLM", "LayoutLMv3, tokens")
        + ("MarkupLM, tokens", "DistilBERT", "ALBERT", "DeBERTa", "DeBERTa-v2", "ModernBERT", "MobileBERT", "YOSO")
        + ("SqueezeBERT", "FNet", "Funnel", "Nystromformer", "MRA", "RemBERT", "ConvBERT", "XLM", "Megatron-BERT")
        + ("NomicBERT", "T5, encoder", "UMT5, encoder"),
        "keeps none there",
    ),
    # a recurrent state, alone or among layers of attention
    **dict.fromkeys(
        ("Mamba", "Mamba-2", "FalconMamba", "RWKV", "RecurrentGemma", "Jamba", "Bamba", "LFM2", "Qwen3-Next"),
        "keeps none there",
    ),
    "ProphetNet": "keeps none there",  # its decoder goes on from a cache one token at a time only
    **dict.fromkeys(("DeepSeek-V3", "MiniCPM-3"), "one size"),  # a latent instead of K and V
}
