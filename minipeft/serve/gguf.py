"""A tuned model in one GGUF file, the format of llama.cpp: W' = W + ΔW, rounded once, to `kind`.

    F32, BF16      as they are
    Q8_0, Q4_0     blocks of 32 numbers with one float16 scale d each: w ≈ d·q, q in −127…127 or −8…7

Names, rounding and the file itself are the `gguf` package's (extra `serve`). The file has the model and no vocabulary:
a tokenizer of words, as the course's, has no place there. Whoever loads it brings token ids.
"""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path

import torch

from minipeft.attach import Tuned
from minipeft.serve.export import check, logits, state, untied

KINDS = ("F32", "BF16", "Q8_0", "Q4_0")
ARCHITECTURES = ("llama", "qwen2")
ALSO = {"attention_bias", "mlp_bias", "tie_word_embeddings"}  # said by the weights that are there
FREE = ALSO | {"architectures", "dtype", "model_type", "transformers_version", "use_cache", "initializer_range"}


@torch.no_grad()
def export_gguf(tuned: Tuned, path: str | os.PathLike, ids: torch.Tensor, kind: str = "F32") -> float:
    """Writes the base with the active adapters merged to the new file `path`, whole or not at all.

    Returns the error of merging and rounding: the largest |Δlogit| on the token ids `ids` (rows, T) between `tuned` and
    what transformers' `from_pretrained(folder, gguf_file=name)` gives. Raises ValueError for what `export` refuses, a
    model that is no Llama or Qwen2, a setting that GGUF has no word for, another `kind`, or rows of a matrix that are
    no multiple of 32 long where `kind` works in blocks; ImportError without the package.
    """
    path, base = Path(path), getattr(tuned, "base", None)
    if path.exists():
        raise ValueError(f"{str(path)!r} is there already; give a new file.")
    check(tuned, path, ids, torch.float32)
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it is one of {', '.join(KINDS)}.")
    if base.config.model_type not in ARCHITECTURES or not hasattr(base, "lm_head"):
        raise ValueError(f"{type(base).__name__} is no language model of {' or '.join(ARCHITECTURES)}'s kind.")
    try:
        import gguf
    except ImportError:
        raise ImportError('GGUF files need the package gguf: pip install -e ".[serve]"') from None
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        fresh = Path(folder) / "model.gguf"
        write(gguf, tuned, fresh, kind)
        check_settings(base.config.to_dict(), type(base.config).from_pretrained(folder, gguf_file=fresh.name).to_dict())
        again = type(base).from_pretrained(folder, gguf_file=fresh.name, config=base.config, dtype=torch.float32)
        error = (logits(tuned, ids) - logits(again.to(ids.device).eval(), ids)).abs().max().item()
        os.replace(fresh, path)
    return error


def write(gguf, tuned: Tuned, path: Path, kind: str) -> None:
    """The settings and the weights, by GGUF's names."""
    base, config, weights = tuned.base, tuned.base.config, state(tuned)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[config.model_type.upper()], config.num_hidden_layers)
    with tuned.disabled():
        tied = config.tie_word_embeddings and not untied(base, weights)
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_name("minipeft")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(heads := config.num_attention_heads)
    writer.add_head_count_kv(groups := config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(getattr(config, "head_dim", None) or config.hidden_size // heads)
    writer.add_tokenizer_model("no_vocab")
    for key in ("bos", "eos", "pad"):
        if isinstance(token := getattr(config, f"{key}_token_id"), int):
            getattr(writer, f"add_{key}_token_id")(token)
    for name, weight in weights.items():
        if name == "lm_head.weight" and tied:
            continue
        if config.model_type == "llama" and name.split(".")[-2] in ("q_proj", "k_proj"):
            weight = interleaved(weight, heads if "q_proj" in name else groups)
        stored = kind if weight.ndim == 2 else "F32"
        block, _ = gguf.GGML_QUANT_SIZES[type_ := gguf.GGMLQuantizationType[stored]]
        if weight.shape[-1] % block:
            raise ValueError(f"the rows of {name!r} have {weight.shape[-1]} numbers; {kind} takes {block} at a time.")
        numbers = gguf.quants.quantize(weight.float().cpu().contiguous().numpy(), type_)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), numbers, raw_dtype=type_)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Llama's rotation turns row i of a head with row i + w/2 in transformers, and neighbours 2i, 2i + 1 in GGUF.

    weight (heads·w, d_in), or a bias (heads·w,).
    """
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def check_settings(config: dict, again: dict) -> None:
    """Whether what was read back is the model that was written: a setting without a word in GGUF comes back changed."""
    for key, value in config.items():
        if key.startswith("_") or key.endswith("_token_id") or key in FREE:
            continue
        same = math.isclose(value, again[key], rel_tol=1e-6) if isinstance(value, float) else value == again[key]
        if not same:
            raise ValueError(f"GGUF has no word for this model's {key}: {value!r} comes back as {again[key]!r}.")
