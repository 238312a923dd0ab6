"""Every method on architectures that no other test uses: what attaches keeps every promise, and what does not is listed
here with its reason."""

from __future__ import annotations

import dataclasses
import re

import pytest
import tiny
import torch
from architectures import BART, BODY, FEW, IDS, LATENT, T5, WAVES, WIDE, Architecture, D, V
from torch import nn

import minipeft as mp
from minipeft.attach import Tuned, attach
from minipeft.layer import WeightLayer
from minipeft.methods import METHODS
from minipeft.methods.adapter import sites
from minipeft.targets import head

ROWS, LENGTH = 2, 6
WINDOW = dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"])
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
ROUTED = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, n_shared_experts=1, n_group=1,
              topk_group=1, first_k_dense_replace=1)  # fmt: skip
DELTA = dict(linear_key_head_dim=4, linear_value_head_dim=4, linear_num_key_heads=4, linear_num_value_heads=4)
SCAN = dict(mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4, mamba_n_groups=1, mamba_chunk_size=8)
SEEN = dict(
    hidden_size=D, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, image_size=16, patch_size=8
)
IMAGE = SEEN | dict(num_labels=3)
STAGES = dict(depths=[1, 1], num_encoder_blocks=2, sr_ratios=[2, 1], patch_sizes=[3, 3], strides=[4, 2],
              num_attention_heads=[2, 4], mlp_ratios=[2, 2], num_labels=3)  # fmt: skip
HEARD = BODY | WAVES | dict(layerdrop=0.0)
SERIES = dict(num_input_channels=2, context_length=16, patch_length=4, patch_stride=4, d_model=D, prediction_length=4)

# fmt: off
CAUSAL = {
    "Cohere-2": ("Cohere2ForCausalLM", FEW | WINDOW),
    "OLMo": ("OlmoForCausalLM", FEW | dict(clip_qkv=0.5)),
    "OLMo-3": ("Olmo3ForCausalLM", FEW | WINDOW),
    "OLMo, hybrid": ("OlmoHybridForCausalLM", FEW | DELTA | dict(layer_types=["linear_attention", "full_attention"])),
    "GLM-4": ("Glm4ForCausalLM", FEW | dict(head_dim=4)),
    "EXAONE-4": ("Exaone4ForCausalLM", FEW | WINDOW | dict(sliding_window_pattern=2)),
    "Hunyuan": ("HunYuanDenseV1ForCausalLM", WIDE),
    "ERNIE-4.5, experts": ("Ernie4_5_MoeForCausalLM", FEW | dict(
        moe_intermediate_size=8, moe_num_experts=4, moe_k=2, moe_num_shared_experts=1, moe_layer_start_index=1)),
    "Apertus": ("ApertusForCausalLM", FEW),
    "Arcee": ("ArceeForCausalLM", FEW),
    "Doge": ("DogeForCausalLM", BODY | dict(num_key_value_heads=4)),
    "NanoChat": ("NanoChatForCausalLM", FEW),
    "BitNet": ("BitNetForCausalLM", FEW),
    "GPT-NeoX, Japanese": ("GPTNeoXJapaneseForCausalLM", dict(
        hidden_size=D, num_hidden_layers=2, num_attention_heads=4, intermediate_multiple_size=2,
        max_position_embeddings=64)),
    "VaultGemma": ("VaultGemmaForCausalLM", WIDE | WINDOW),
    "Llama-4": ("Llama4ForCausalLM", WIDE | dict(
        intermediate_size_mlp=24, num_local_experts=2, interleave_moe_layer_step=2, attention_chunk_size=4)),
    "Granite, experts": ("GraniteMoeForCausalLM", FEW | dict(num_local_experts=4, num_experts_per_tok=2)),
    "Granite, hybrid": ("GraniteMoeHybridForCausalLM", FEW | SCAN | dict(
        num_local_experts=0, shared_intermediate_size=24, layer_types=["mamba", "attention"])),
    "Falcon-H1": ("FalconH1ForCausalLM", FEW | SCAN | dict(mamba_d_ssm=32)),
    "Nemotron-H": ("NemotronHForCausalLM", FEW | dict(
        head_dim=4, layers_block_type=["mamba", "attention"], mamba_num_heads=4, mamba_head_dim=4, ssm_state_size=4,
        n_groups=1, chunk_size=8)),
    "Zamba-2": ("Zamba2ForCausalLM", dict(
        hidden_size=D, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4, intermediate_size=24,
        max_position_embeddings=64, mamba_d_state=4, n_mamba_heads=4, mamba_headdim=8, mamba_ngroups=1, chunk_size=8,
        use_mamba_kernels=False, layers_block_type=["mamba", "mamba", "hybrid"], num_mem_blocks=1, use_mem_rope=True,
        adapter_rank=4)),
    "MiniMax": ("MiniMaxForCausalLM", FEW | dict(
        layer_types=["linear_attention", "full_attention"], num_local_experts=4, num_experts_per_tok=2, block_size=4)),
    "dots-1": ("Dots1ForCausalLM", FEW | ROUTED),
    "AFMoE": ("AfmoeForCausalLM", WIDE | WINDOW | EXPERTS | dict(num_dense_layers=1)),
    "LFM2, experts": ("Lfm2MoeForCausalLM", FEW | EXPERTS | dict(
        layer_types=["conv", "full_attention"], num_dense_layers=1)),
    "FlexOlmo": ("FlexOlmoForCausalLM", FEW | dict(num_experts=4, num_experts_per_tok=2)),
    "Qwen3.5": ("Qwen3_5ForCausalLM", WIDE | DELTA | dict(layer_types=["linear_attention", "full_attention"])),
    "DeepSeek-V2": ("DeepseekV2ForCausalLM", BODY | LATENT | ROUTED | dict(num_key_value_heads=4)),
    "Gemma-4": ("Gemma4ForCausalLM", WIDE | WINDOW | dict(
        global_head_dim=8, hidden_size_per_layer_input=4, vocab_size_per_layer_input=V, num_kv_shared_layers=0,
        num_global_key_value_heads=2)),
    "CPM-Ant": ("CpmAntForCausalLM", dict(
        hidden_size=D, num_attention_heads=4, dim_head=4, dim_ff=24, num_hidden_layers=2, position_bias_num_buckets=8,
        position_bias_max_distance=16, prompt_types=8, prompt_length=4, segment_types=8)),
    "ImageGPT": ("ImageGPTForCausalImageModeling", dict(n_embd=D, n_layer=2, n_head=4, n_positions=64)),
    "BERT, decoder": ("BertGenerationDecoder", BODY | dict(is_decoder=True)),
    "GIT": ("GitForCausalLM", BODY | dict(vision_config=SEEN)),
}
ENCODER = {
    "FlauBERT": ("FlaubertWithLMHeadModel", dict(
        emb_dim=D, n_layers=2, n_heads=4, max_position_embeddings=64, pad_index=0, unk_index=3, mask_index=4)),
    "Splinter": ("SplinterForQuestionAnswering", BODY),
    "TAPAS": ("TapasForMaskedLM", BODY | dict(type_vocab_sizes=[3, 8, 8, 2, 8, 8, 10])),
    "Jina-3": ("JinaEmbeddingsV3ForMaskedLM", BODY),
    "I-BERT": ("IBertForMaskedLM", BODY),
    "DPR": ("DPRQuestionEncoder", BODY),
    "CLIP, text": ("CLIPTextModel", BODY),
    "Perceiver": ("PerceiverForMaskedLM", dict(
        d_model=D, d_latents=D, num_latents=8, num_blocks=1, num_self_attends_per_block=2, num_self_attention_heads=4,
        num_cross_attention_heads=4, max_position_embeddings=16, qk_channels=D, v_channels=D)),
    "VisualBERT": ("VisualBertForQuestionAnswering", BODY | dict(visual_embedding_dim=8, num_labels=3)),
    "LXMERT": ("LxmertModel", BODY | dict(l_layers=1, r_layers=1, x_layers=1, visual_feat_dim=8)),
    "ViLT": ("ViltForQuestionAnswering", BODY | IMAGE),
}
PAIR = {
    "FSMT": ("FSMTForConditionalGeneration", BART | dict(langs=["en", "de"], src_vocab_size=V, tgt_vocab_size=V)),
    "UDOP": ("UdopForConditionalGeneration", T5 | dict(image_size=16, patch_size=8, max_2d_position_embeddings=64)),
    "SeamlessM4T": ("SeamlessM4TForTextToText", BART | dict(hidden_size=D)),
    "Moonshine": ("MoonshineForConditionalGeneration", dict(
        hidden_size=D, intermediate_size=24, encoder_num_hidden_layers=2, decoder_num_hidden_layers=2,
        encoder_num_attention_heads=2, decoder_num_attention_heads=2, max_position_embeddings=64,
        decoder_start_token_id=1)),
}
OTHER = {  # pictures, films, series, and pictures beside text
    "Swin-2": ("Swinv2ForImageClassification", dict(
        embed_dim=8, depths=[1, 1], num_heads=[2, 4], window_size=2, image_size=16, patch_size=4, num_labels=3)),
    "PVT-2": ("PvtV2ForImageClassification", STAGES | dict(image_size=16, hidden_sizes=[8, 16])),
    "SegFormer": ("SegformerForImageClassification", STAGES | dict(hidden_sizes=[8, 16])),
    "Hiera": ("HieraForImageClassification", dict(
        image_size=[16, 16], patch_size=[3, 3], patch_stride=[2, 2], patch_padding=[1, 1], embed_dim=8, depths=[1, 1],
        num_heads=[1, 2], num_query_pool=1, query_stride=[2, 2], masked_unit_size=[4, 4],
        masked_unit_attention=[True, False], num_labels=3)),
    "FocalNet": ("FocalNetForImageClassification", dict(
        image_size=16, patch_size=4, embed_dim=8, depths=[1, 1], hidden_sizes=[8, 16], focal_levels=[1, 1],
        focal_windows=[3, 3], num_labels=3)),
    "LeViT": ("LevitForImageClassification", dict(
        image_size=128, hidden_sizes=[D, D, D], num_attention_heads=[2, 2, 2], depths=[1, 1, 1], key_dim=[4, 4, 4],
        num_labels=3)),
    "DINOv3": ("DINOv3ViTModel", SEEN),
    "SigLIP": ("SiglipForImageClassification", dict(
        vision_config=SEEN, text_config=IDS | BODY | dict(projection_size=D), num_labels=3)),
    "I-JEPA": ("IJepaForImageClassification", IMAGE),
    "MAE": ("ViTMAEModel", SEEN | dict(mask_ratio=0.0)),
    "YOLOS": ("YolosForObjectDetection", IMAGE | dict(image_size=[16, 16], num_detection_tokens=3)),
    "VideoMAE": ("VideoMAEForVideoClassification", IMAGE | dict(num_frames=4, tubelet_size=2)),
    "TimeSformer": ("TimesformerForVideoClassification", IMAGE | dict(num_frames=2)),
    "CLIP": ("CLIPModel", dict(text_config=IDS | BODY | dict(projection_dim=D), projection_dim=D,
                               vision_config=SEEN | dict(projection_dim=D))),
    "PatchTST": ("PatchTSTForPrediction", SERIES | dict(num_attention_heads=4, num_hidden_layers=2, ffn_dim=24)),
    "PatchTSMixer": ("PatchTSMixerForPrediction", SERIES | dict(num_layers=2)),
}
SOUND = {
    "AST": ("ASTForAudioClassification", IMAGE | dict(
        patch_size=4, max_length=16, num_mel_bins=8, frequency_stride=4, time_stride=4)),
    "SEW": ("SEWForCTC", HEARD | dict(squeeze_factor=2)),
    "SEW-D": ("SEWDForCTC", HEARD | dict(squeeze_factor=2, position_buckets=8)),
    "UniSpeech": ("UniSpeechForCTC", HEARD),
    "wav2vec 2, Conformer": ("Wav2Vec2ConformerForCTC", HEARD | dict(conv_depthwise_kernel_size=3)),
    "wav2vec 2, BERT": ("Wav2Vec2BertForCTC", HEARD | dict(
        feature_projection_input_dim=8, conv_depthwise_kernel_size=3, add_adapter=False)),
    "Data2Vec, sound": ("Data2VecAudioForCTC", HEARD | dict(num_conv_pos_embeddings=2, conv_pos_kernel_size=3)),
}
# fmt: on
KINDS = {"causal": CAUSAL, "encoder": ENCODER, "pair": PAIR, "image": OTHER, "sound": SOUND}
FAMILIES = {name: Architecture(kind, *what) for kind, all_ in KINDS.items() for name, what in all_.items()}


def ids(length: int = LENGTH) -> torch.Tensor:
    return torch.randint(6, V, (ROWS, length), generator=torch.Generator().manual_seed(0))


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(0))


READ = {  # what these read beside what `Architecture.batch` gives, or in its place
    "GIT": dict(pixel_values=normal(3, 16, 16)),
    "Perceiver": dict(inputs=ids(), input_ids=None),
    "VisualBERT": dict(visual_embeds=normal(3, 8), attention_mask=torch.ones(ROWS, LENGTH, dtype=torch.long)),
    "LXMERT": dict(visual_feats=normal(3, 8), visual_pos=normal(3, 4)),
    "ViLT": dict(pixel_values=normal(3, 16, 16)),
    "FSMT": dict(use_cache=False),  # with a cache it takes the last of the decoder's tokens only
    "UDOP": dict(bbox=torch.arange(4.0).expand(ROWS, LENGTH, 4) / 4),
    "Moonshine": dict(input_values=normal(2000), input_ids=None),
    "VideoMAE": dict(pixel_values=normal(4, 3, 16, 16)),
    "TimeSformer": dict(pixel_values=normal(2, 3, 16, 16)),
    "LeViT": dict(pixel_values=normal(3, 128, 128)),
    "CLIP": dict(input_ids=ids().sort().values),  # it looks at the last of the largest ids
    "PatchTST": dict(past_values=normal(16, 2), pixel_values=None),
    "PatchTSMixer": dict(past_values=normal(16, 2), pixel_values=None),
    "AST": dict(input_values=normal(16, 8)),
    "wav2vec 2, BERT": dict(input_features=normal(10, 8), input_values=None),
}
OTHERWISE = ("Doge", "CPM-Ant", "GIT")  # generate other tokens with their cache than without, also bare
KEYS = {  # what IA3 scales where none of its own names is there
    "DeepSeek-V2": dict(targets=["kv_b_proj"], feedforward=["mlp.down_proj"]),
    "CPM-Ant": dict(targets=["project_k", "project_v"], feedforward=["w_out"]),
    "LeViT": dict(targets=["queries_keys_values.linear", "keys_values.linear"], feedforward=["linear_down.linear"]),
    "FocalNet": dict(targets=["projection_in"], feedforward=["fc2"]),
    "PatchTSMixer": dict(targets=["fc1"], feedforward=["fc2"]),
    "wav2vec 2, Conformer": dict(targets=["linear_k", "linear_v"], feedforward=["output_dense"]),
    "wav2vec 2, BERT": dict(targets=["linear_k", "linear_v"], feedforward=["output_dense"]),
}
FRONTS = ("PromptTuning", "PTuning", "PrefixTuning")
SPOKEN = [name for name, one in FAMILIES.items() if one.kind in ("image", "sound")]
REFUSED = (  # methods, where, and what the sentence says
    (("BitFit",), (
        "Cohere-2", "OLMo", "OLMo-3", "OLMo, hybrid", "EXAONE-4", "Hunyuan", "ERNIE-4.5, experts", "Apertus", "Arcee",
        "Doge", "NanoChat", "BitNet", "VaultGemma", "Llama-4", "Granite, experts", "Granite, hybrid", "Falcon-H1",
        "Nemotron-H", "Zamba-2", "MiniMax", "dots-1", "AFMoE", "LFM2, experts", "FlexOlmo", "Qwen3.5", "DeepSeek-V2",
        "Gemma-4", "CPM-Ant", "UDOP",
    ), "has no biases in linear and norm layers"),
    (FRONTS, (*SPOKEN, "I-BERT", "Perceiver"), "names none with get_input_embeddings"),
    (FRONTS[:2], ("Moonshine",), "embeds none"),
    (("PrefixTuning",), (  # a recurrent state, or no cache at all
        "OLMo, hybrid", "Granite, hybrid", "Falcon-H1", "Nemotron-H", "Zamba-2", "MiniMax", "LFM2, experts", "Qwen3.5",
        "FlauBERT", "Splinter", "TAPAS", "Jina-3", "DPR", "CLIP, text", "VisualBERT", "LXMERT", "ViLT", "FSMT",
    ), "keeps none there"),
    (("PrefixTuning",), ("DeepSeek-V2",), "of one size"),
    (("PrefixTuning",), ("CPM-Ant",), "behind 2 tokens it answers"),  # which reads its whole text again
    (("Softmax",), ("CLIP", "CLIP, text", "DINOv3", "DPR", "FSMT", "LXMERT", "MAE"), "has no output layer"),
    (("Adapter", "parallel Adapter", "Experts"), ("I-BERT",), "no numbered blocks with linear"),  # QuantLinear is none
    (("IA3",), ("I-BERT",), "no layer matches 'k_proj'"),
    (("AdaLoRA", "MiSS", "ProjectedLoRA", "SHiRA"), ("Swin-2",), "a 512×2 weight|the 2 inputs"),
    (("parallel Adapter",), ("PatchTSMixer",), "as wide as its output, but .* reads 4 numbers and .* gives"),
)  # fmt: skip
RESTS = {  # the parameters that no gradient reaches, for the output does not depend on them
    "ERNIE-4.5, experts": "correction_bias", "AFMoE": "expert_bias", "LXMERT": "token_type_embeddings",
    "UDOP": "patch|relative_bias", "SigLIP": r"vision_model\.head", "DINOv3": "mask_token|register_tokens",
    "wav2vec 2, Conformer": "pos_conv_embed", "VisualBERT": "pooler",
}  # fmt: skip
SETTINGS = {kind: (kind, cls.examples[0]) for kind, cls in METHODS.items()}
SETTINGS["parallel Adapter"] = "Adapter", METHODS["Adapter"].examples[1]


@dataclasses.dataclass
class Bare:
    """A model before anything was attached to it, its batch, and what it gives."""

    model: nn.Module
    batch: dict[str, torch.Tensor]

    def __post_init__(self) -> None:
        self.outputs(self.model)  # some leave hooks of their own in the first call
        self.gives, self.held, self.looks = self.outputs(self.model), self.holds(), self.look()

    @torch.no_grad()
    def outputs(self, model: nn.Module) -> list[torch.Tensor]:
        return outputs(model, self.batch)

    def holds(self) -> dict[str, tuple[int, torch.Tensor]]:
        """Every parameter and buffer, the same one or another, and its numbers."""
        named = (
            *self.model.named_parameters(remove_duplicate=False),
            *self.model.named_buffers(remove_duplicate=False),
        )
        return {name: (id(each), each.detach().clone()) for name, each in named}

    def look(self) -> tuple:
        return tiny.hooks(self.model), sorted(vars(self.model)), [p.requires_grad for p in self.model.parameters()]

    def is_as_it_was(self) -> bool:
        now = self.holds()
        same = all(now[name][0] == at and torch.equal(now[name][1], value) for name, (at, value) in self.held.items())
        return now.keys() == self.held.keys() and same and self.look() == self.looks


def outputs(model: nn.Module, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    torch.manual_seed(0)  # MAE and ViLT choose patches, and in training there is dropout
    found = {key: value for key, value in model(**batch).items() if isinstance(value, torch.Tensor)}
    found.pop("encoder_last_hidden_state", None)  # a prompt stays in it, for the decoder reads it
    return [value for value in found.values() if value.is_floating_point() and value.numel()]


def gap(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest difference, relative where the numbers are above 1."""
    pairs = zip(found, expected, strict=True)
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in pairs)


def generated(tuned: Tuned, ids: torch.Tensor, **more) -> torch.Tensor:
    how = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    return tuned.generate(ids, attention_mask=torch.ones_like(ids), **how, **more)


# A part for text and one for pictures stand in one block, and the adapter would lead from the one to the other.
# LeViT's second kind of layer has fewer places for its answers than it reads.
REFUSED_WHEN_CALLED = dict.fromkeys(
    (("parallel Adapter", "LXMERT"), ("parallel Adapter", "LeViT")), "for other tokens stand there"
)


def keeps_its_promises(name: str, bare: Bare, method: mp.methods.Method, path) -> None:
    kind = type(method).__name__
    tuned = attach(bare.model, method)
    try:
        layers = tuned.layers()
        if not any(layer.front for layer in layers):  # a weight that trains may be multiplied in another way
            assert gap(bare.outputs(tuned), bare.gives) <= (2e-6 if layers[0].slots else 0), "it starts as the base"
        tiny.randomise(tuned)
        step(name, tuned, bare.batch)
        found = bare.outputs(tuned)
        assert all(value.isfinite().all() for value in found) and gap(found, bare.gives) > 0, "it has an effect"
        with tuned.disabled():
            assert all(map(torch.equal, bare.outputs(tuned), bare.gives)), "disabled, it is the base"
        if all(isinstance(layer, WeightLayer) or layer.slots for layer in layers):
            tuned.merge()
            assert gap(bare.outputs(tuned), found) <= 1e-5, "merged, it computes the same"
            tuned.unmerge()
            assert all(map(torch.equal, bare.outputs(tuned), found)), "unmerged, it is as before"
        else:
            with pytest.raises(ValueError, match="changes no weight"):
                tuned.merge()
        if FAMILIES[name].kind == "causal" and name not in OTHERWISE:
            cached, anew = (generated(tuned, bare.batch["input_ids"], use_cache=use) for use in (True, False))
            assert torch.equal(cached, anew), "a cache changes no token"
        if kind == "Subspace":
            with pytest.raises(ValueError, match="no file format"):
                tuned.save(path)
            return
        tuned.save(path)
        assert tuned.detach() is bare.model and bare.is_as_it_was(), "detached, it is the base"
        tuned = mp.load_adapter(bare.model, path)
        assert gap(bare.outputs(tuned), found) <= 1e-6, "loaded, it computes the same"
    finally:
        if hasattr(bare.model, "_tuned"):
            tuned.eval().detach()
    assert all(map(torch.equal, bare.outputs(bare.model), bare.gives)) and bare.is_as_it_was()


def step(name: str, tuned: Tuned, batch: dict[str, torch.Tensor]) -> None:
    """One step of training, on a loss in which every number of the output counts."""
    tuned.train()
    loss = sum((value * torch.randn(value.shape)).sum() for value in outputs(tuned, batch) if value.requires_grad)
    loss.backward()
    trained = {n.replace("/", "."): p for n, p in tuned.adapters["default"].named_parameters()}
    silent = [n for n, p in trained.items() if p.grad is None or not p.grad.any() or not p.grad.isfinite().all()]
    silent = [n for n in silent if not re.search(RESTS.get(name, "^$"), n)]
    assert not silent, f"every number learns, but not {silent}"
    torch.optim.SGD(trained.values(), lr=1e-3).step()
    tuned.zero_grad()
    tuned.eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_every_method_keeps_every_promise(name, subtests, tmp_path):
    one = FAMILIES[name]
    batch = one.batch(ROWS, LENGTH) | READ.get(name, {})
    bare = Bare(one.model().requires_grad_(False), {key: value for key, value in batch.items() if value is not None})
    for label, (kind, settings) in SETTINGS.items():
        method = METHODS[kind](**settings | (KEYS.get(name, {}) if kind == "IA3" else {}))
        with subtests.test(method=label):
            if reason := next((why for kinds, names, why in REFUSED if label in kinds and name in names), None):
                with pytest.raises(ValueError, match=reason):
                    attach(bare.model, method)
                assert bare.is_as_it_was()
            elif reason := REFUSED_WHEN_CALLED.get((label, name)):
                tuned = attach(bare.model, method)
                with pytest.raises(ValueError, match=reason):
                    bare.outputs(tuned)
                assert tuned.detach() is bare.model and bare.is_as_it_was()
            else:
                keeps_its_promises(name, bare, method, tmp_path / label)


# ---------------------------------------------------------------------------------------------------------------------
# What the matrix found
# ---------------------------------------------------------------------------------------------------------------------
def places(name: str, placement: str) -> list[tuple[str, str | None]]:
    """Where adapters sit in the last block, and what they read if that is something else, from the block on."""
    found = sites(FAMILIES[name].model(), placement)
    last = [site for site in found if site.block == found[-1].block]
    return [tuple(path and re.split(r"\d+\.", path)[-1] for path in (site.path, site.source)) for site in last]


def test_an_adapter_sits_behind_the_layer_that_is_called_last():
    """Each of these models holds its layers in another order than it calls them, or has more in a block than two."""
    assert places("AFMoE", "houlsby") == [("self_attn.o_proj", None), ("mlp", None)]
    assert places("Qwen3.5", "houlsby") == [("self_attn.o_proj", None), ("mlp.down_proj", None)]
    attention = [site.path for site in sites(FAMILIES["Qwen3.5"].model(), "houlsby") if "linear_attn" in site.path]
    assert attention == ["model.layers.0.linear_attn.out_proj"]
    assert places("TimeSformer", "parallel") == [("output.dense", "intermediate.dense")]


def test_a_block_has_its_mixer_and_its_feed_forward_part():
    """Mamba beside attention, and the layers between the stages of a model that sees."""
    assert ("feed_forward.down_proj", "feed_forward.up_proj") in places("Falcon-H1", "parallel")
    assert set(places("Granite, hybrid", "houlsby")) == {("self_attn.o_proj", None), ("shared_mlp.output_linear", None)}
    for name in ("Swin-2", "Hiera", "PVT-2"):
        found = sites(FAMILIES[name].model(), "pfeiffer")
        assert len(found) == 2 and all(re.search(r"(blocks|layers)\.0\.(output|mlp)\.", site.path) for site in found)


@pytest.mark.parametrize(
    "name, found",
    [
        ("SigLIP", ["classifier"]),
        ("SEW-D", ["lm_head"]),
        ("DINOv3", []),
        ("CLIP", []),
        ("AST", ["classifier.layernorm"]),
    ],
)
def test_the_output_layer_is_found_where_no_name_leads_to_the_base(name, found):
    assert head(FAMILIES[name].model())[: len(found) or None] == found


def test_t5_s_answers_come_from_the_layer_behind_its_decoder():
    import transformers

    model = transformers.T5ForQuestionAnswering(transformers.T5Config(**IDS | T5))
    assert head(model) == ["qa_outputs"]
    assert not [layer.path for layer in attach(model, mp.LoRA(2)).layers() if layer.path == "qa_outputs"]


def test_training_moves_no_range_of_a_quantiser():
    """I-BERT's keep what they saw last, and this is the base's."""
    model = FAMILIES["I-BERT"].model()
    before = tiny.snapshot(model)
    tuned = attach(model, mp.BitFit()).train()
    tuned(**FAMILIES["I-BERT"].batch())
    assert any(name.endswith("x_max") for name in before) and tiny.same(tiny.snapshot(tuned.detach()), before)
