"""Tiny random models of the families that the tests need, from hand-written configurations: no download."""

from __future__ import annotations

import torch
from torch import nn

V, D, L = 61, 16, 2  # vocabulary, width, layers


def llama(tied: bool = True, **changes) -> nn.Module:
    """Grouped-query attention (4 heads, 2 key-value heads), with biases."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=24, num_hidden_layers=L, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True, mlp_bias=True, tie_word_embeddings=tied, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, **changes,
    )  # fmt: skip
    return _fresh(LlamaForCausalLM, config)


def gpt2() -> nn.Module:
    """Conv1D layers (weights stored (d_in, d_out)), a fused q, k, v projection, a tied head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=V, n_embd=D, n_layer=L, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return _fresh(GPT2LMHeadModel, config)


def bert(task: str = "MaskedLM", labels: int = 3) -> nn.Module:
    """`task`: "MaskedLM" (a tied head with a tied bias) or "SequenceClassification"."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=V, hidden_size=D, num_hidden_layers=L, num_attention_heads=4, intermediate_size=24,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=labels,
    )  # fmt: skip
    return _fresh(getattr(transformers, f"BertFor{task}"), config)


def t5() -> nn.Module:
    """Encoder and decoder, cross-attention, no biases, one shared embedding, tied to the head."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=V, d_model=D, d_kv=4, num_heads=4, d_ff=24, num_layers=L, dropout_rate=0.0, pad_token_id=0,
        eos_token_id=2, decoder_start_token_id=0, feed_forward_proj="gated-gelu", tie_word_embeddings=True,
    )  # fmt: skip
    return _fresh(T5ForConditionalGeneration, config)


MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert, "classifier": lambda: bert("SequenceClassification"), "t5": t5}


def _fresh(cls: type, config) -> nn.Module:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = cls(config)
    for parameter in model.parameters():  # biases and norms too: nothing may be hidden by a zero or a one
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def batch(model: nn.Module, rows: int = 3, length: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    """Token ids and labels that the model accepts."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, V, (rows, length), generator=generator)
    kind = type(getattr(model, "base", model)).__name__
    more = {"decoder_input_ids": ids.flip(1)} if "T5" in kind else {}
    return {"input_ids": ids, **more, "labels": torch.arange(rows) % 3 if "Classification" in kind else ids}


def randomise(tuned, seed: int = 1, scale: float = 0.1) -> None:
    """Moves every trainable number, so that the adapter has an effect."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in tuned.adapters.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def hooks(model: nn.Module) -> int:
    """How many hooks there are, and forwards that stand in for a module's own."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m)) for m in model.modules())


class untouched:
    """`with untouched(model):` — afterwards the model must be as it was: values, pointers, flags, hooks, marker."""

    def __init__(self, model: nn.Module):
        self.model = model

    def look(self):
        flags = {name: (id(p), p.requires_grad) for name, p in self.model.named_parameters(remove_duplicate=False)}
        return flags, hooks(self.model), sorted(self.model.__dict__), torch.random.get_rng_state().tolist()

    def __enter__(self):
        self.before, self.values = self.look(), snapshot(self.model)

    def __exit__(self, *error):
        assert self.look() == self.before
        assert same(snapshot(self.model), self.values)


def small(labels: int | None = None) -> nn.Module:
    """A tiny untrained model of the pocket family with its tokenizer."""
    from minipeft.world.base import build_model, build_tokenizer

    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer), hidden=32, layers=2, heads=2, ff=48)
    if labels:
        from transformers import LlamaForSequenceClassification

        model.config.num_labels = labels
        model = LlamaForSequenceClassification(model.config)
    model.tokenizer = tokenizer
    return model.eval()
