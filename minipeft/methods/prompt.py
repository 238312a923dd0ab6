"""Prompts: hard ones, written in words and scored without training, and soft ones, whose embeddings are trained.

    p(y | x):   hard     [template with x in it]            → probability of the words that stand for y
                soft     [p₁ … pₙ] x₁ … x_L                 p trained, of shape (n, d), the model frozen

At n = 20 and d = 1024 a soft prompt holds 20,480 numbers, whatever the size of the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from minipeft.files import register
from minipeft.layer import Layer, Method
from minipeft.methods.common import check_choice, check_whole, like
from minipeft.methods.fronts import FrontLayout, check_front, check_prompt, embedding, repeated
from minipeft.reading import embedders


# ---------------------------------------------------------------------------------------------------------------------
# Hard prompts
# ---------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def verbalize(
    model: nn.Module, tokenizer, texts: Sequence[str], template: str, verbalizer: Mapping[str, Sequence[str]]
) -> torch.Tensor:
    """p(class | text) of a language model that was never trained to classify, (texts, classes), rows summing to 1.

        p(c | x) ∝ Σ over the words w of c of p(w | template(x))        (Schick and Schütze 2021, "PET", §3)

    `template` has `{text}` where the text goes, as in "{text} i felt"; what is scored is the next word, or the one at
    `{mask}` for a masked language model. `verbalizer` is {class: the words that stand for it}, each one token.

    Raises ValueError for a template without `{text}` and for words that are not one token.
    """
    if "{text}" not in template:
        raise ValueError(f"The template {template!r} has no place for the text; write {{text}} where it goes.")
    words = [_one_token(tokenizer, word) for several in verbalizer.values() for word in several]
    filled = [template.format(text=text, mask=tokenizer.mask_token or "") for text in texts]
    found = []
    for start in range(0, len(filled), 64):
        batch = tokenizer(filled[start : start + 64], return_tensors="pt", padding=True, padding_side="right")
        batch = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
        if "{mask}" in template:
            place = (batch["input_ids"] == tokenizer.mask_token_id).int().argmax(1)
        else:
            place = batch["attention_mask"].sum(1) - 1
        logits = model(**batch).logits
        found.append(logits[torch.arange(len(place)), place].float().softmax(-1)[:, words])
    by_class = torch.split(torch.cat(found), [len(several) for several in verbalizer.values()], dim=1)
    odds = torch.stack([each.sum(1) for each in by_class], 1)
    return odds / odds.sum(1, keepdim=True)


def _one_token(tokenizer, word: str) -> int:
    """The word's token as it stands within a text, so with a space before it where the tokenizer marks that."""
    ids = tokenizer(f" {word}", add_special_tokens=False).input_ids
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise ValueError(f"{word!r} is {len(ids)} tokens, or unknown to this tokenizer; choose words of one token.")
    return ids[0]


# ---------------------------------------------------------------------------------------------------------------------
# Soft prompts
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class PromptTuning(Method):
    """Train n embeddings before the text, nothing else (Lester et al. 2021, "The Power of Scale for
    Parameter-Efficient Prompt Tuning", §2): n·d numbers.

    `length`: n, the paper uses 1 to 150 (§3.2).
    `init`: "vocabulary" copies the embeddings of random tokens; "random" draws from N(0, 1); or token ids, such as
        `tokenizer("tell it like a pirate").input_ids`, repeated or cut to n (§3.2 compares them).

    Raises ValueError for a length below 1 or an unknown init; and, at `attach`, for a model without token embeddings,
    and a head that speaks about single places of the text, such as the beams of XLM's answers.
    """

    length: int = 8
    init: str | Sequence[int] = "vocabulary"

    examples = ({"length": 3},)

    def __post_init__(self) -> None:
        object.__setattr__(self, "init", check_front(self.length, self.init, ("vocabulary", "random")))

    def places(self, model: nn.Module) -> dict[str, Callable[[torch.Generator], SoftPrompt]]:
        check_prompt(model)
        return {"prompt": partial(SoftPrompt, model, self)}


class SoftPrompt(Layer):
    """`value` (n, d): trainable embeddings, in float32 (float64 over a float64 base)."""

    front = "prompt"

    def __init__(self, model: nn.Module, method: PromptTuning, generator: torch.Generator):
        super().__init__("prompt")
        table = embedding(model, "A prompt").weight
        dtype = torch.promote_types(table.dtype, torch.float32)
        n, d = method.length, table.shape[1]
        self.value = nn.Parameter(torch.zeros(n, d, dtype=dtype, device=table.device))
        if table.device.type != "meta":
            if method.init == "random":
                start = torch.empty(n, d, dtype=dtype).normal_(generator=generator)
            else:
                chance = torch.randint(len(table), (n,), generator=generator).tolist()
                ids = chance if method.init == "vocabulary" else repeated(method.init, n, len(table))
                start = embed(model, ids)
            self.value.data.copy_(start)

    def prompt(self) -> torch.Tensor:
        """(n, d)"""
        return self.value

    def stored(self) -> dict[str, torch.Tensor]:
        return {"prompt_embeddings": self.value}


@dataclass(frozen=True)
class PTuning(Method):
    """Train a network that writes the prompt (Liu et al. 2021, "GPT Understands, Too", §3.2): p = G(E).

    `generator`: "mlp"  pᵢ = W₃·relu(W₂·relu(W₁·eᵢ)), one vector at a time; "lstm", a bidirectional LSTM over e₁ … eₙ
        and two layers on top, so that the vectors know of one another; "task", one task embedding z of `hidden`
        numbers that W₂·relu(W₁·z) turns into the whole prompt.
    `hidden`: the width within the generator.

    The generator is needed for training only: a file holds the (n, d) prompt that it wrote.
    Raises like `PromptTuning`.
    """

    length: int = 8
    generator: str = "mlp"
    hidden: int = 128

    examples = tuple({"length": 3, "generator": each, "hidden": 4} for each in ("mlp", "lstm", "task"))

    def __post_init__(self) -> None:
        check_front(self.length, "random", ("random",))
        check_choice("generator", self.generator, ("mlp", "lstm", "task"))
        check_whole("hidden", self.hidden)

    def places(self, model: nn.Module) -> dict[str, Callable[[torch.Generator], GeneratedPrompt]]:
        check_prompt(model)
        return {"prompt": partial(GeneratedPrompt, model, self)}


class GeneratedPrompt(Layer):
    """`E` (n, d), or z (hidden,), and the networks that turn it into the prompt."""

    front = "prompt"

    def __init__(self, model: nn.Module, method: PTuning, generator: torch.Generator):
        super().__init__("prompt")
        table = embedding(model, "A prompt").weight
        n, d, h = method.length, table.shape[1], method.hidden
        self.kind, self.shape = method.generator, (n, d)
        with like(table, generator):
            self.E = nn.Parameter(torch.randn(h) if self.kind == "task" else torch.randn(n, d))
            if self.kind == "mlp":
                sizes = (d, h, h, d)
            elif self.kind == "lstm":
                self.lstm = nn.LSTM(d, h, bidirectional=True, num_layers=2, batch_first=True)
                sizes = (2 * h, 2 * h, d)
            else:
                sizes = (h, h, n * d)
            linears = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
            self.layers = nn.Sequential(*(x for each in linears for x in (each, nn.ReLU())))[:-1]
        self.to(table.device, torch.promote_types(table.dtype, torch.float32))

    def prompt(self) -> torch.Tensor:
        """(n, d)"""
        with torch.backends.cudnn.flags(enabled=False):  # on a GPU it takes no gradient of an LSTM in evaluation mode
            start = self.lstm(self.E)[0] if self.kind == "lstm" else self.E
        return self.layers(start).view(self.shape)

    @torch.no_grad()  # PyTorch's LSTM has another last digit where it keeps what the way back needs
    def stored(self) -> dict[str, torch.Tensor]:
        return {"prompt_embeddings": self.prompt()}


@torch.no_grad()
def embed(model: nn.Module, ids: list[int]) -> torch.Tensor:
    """(n, d): the embeddings of these tokens as the model computes with them; Gemma's are √d times the table's rows."""
    module = embedders(model)[-1]
    return module(torch.tensor(ids, device=module.weight.device))


@register
class PromptLayout(FrontLayout):
    """prompt_embeddings (n, d)"""

    peft_type, layer = "PROMPT_TUNING", SoftPrompt

    def config(self, base: nn.Module, layers: list[Layer]) -> dict:
        text = base.config.get_text_config()  # PEFT asks for layers and heads, also where a prompt has no use for them
        return super().config(base, layers) | {
            "token_dim": self.width(base),
            "num_attention_heads": getattr(text, "num_attention_heads", None) or 1,
            "num_layers": getattr(text, "num_hidden_layers", None) or 1,
        }

    def width(self, base: nn.Module) -> int:
        return embedding(base, "A prompt").weight.shape[1]

    def plain(self, length: int) -> Method:
        return PromptTuning(length, init="random")


@register
class PTuningLayout(PromptLayout):
    """prompt_embeddings (n, d): what the generator wrote"""

    peft_type, layer = "P_TUNING", GeneratedPrompt

    def config(self, base: nn.Module, layers: list[Layer]) -> dict:
        return super().config(base, layers) | {"encoder_hidden_size": PTuning.hidden}


@torch.no_grad()
def nearest(model: nn.Module, tokenizer, prompt: torch.Tensor, k: int = 3) -> list[list[tuple[str, float]]]:
    """For each row of a prompt (n, d), the k tokens whose embeddings have the largest cosine with it."""
    table = nn.functional.normalize(model.get_input_embeddings().weight.float(), dim=-1)
    cosines, ids = (nn.functional.normalize(prompt.float(), dim=-1) @ table.T).topk(k)
    words = [tokenizer.convert_ids_to_tokens(row) for row in ids.tolist()]
    return [list(zip(row, values, strict=True)) for row, values in zip(words, cosines.tolist(), strict=True)]
