"""What a body of /v1/completions asks for, in OpenAI's words: read and judged before anything is written."""

from __future__ import annotations

import json
import math
import uuid
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """`body` bytes, `prompts` and `stops` of one request, and `seconds` until its answer is whole."""

    body: int = 1_000_000
    prompts: int = 64
    stops: int = 4
    seconds: float = 60.0


class Refused(Exception):
    """An answer that is an error: HTTP status, message, the parameter at fault, and a code."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict:
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Order:
    """What a body of /v1/completions asks for; `prompts` are token ids."""

    model: str
    prompts: tuple[tuple[int, ...], ...]
    most: int
    temperature: float
    top_p: float
    seed: int
    stops: tuple[str, ...]
    stream: bool
    usage: bool  # at the end of a stream


DEFAULTS = {  # what OpenAI has and is not done here, by the value that asks for nothing
    "n": 1, "best_of": 1, "echo": False, "logprobs": None, "suffix": None, "presence_penalty": 0,
    "frequency_penalty": 0, "logit_bias": None,
}  # fmt: skip
OURS = ("model", "prompt", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options", "user")


def parse(body: bytes, tokenizer, limits: Limits) -> Order:
    """Raises `Refused` for the first thing that is wrong, before anything is written."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"The body is not JSON: {error}.") from error
    if not isinstance(asked, dict):
        raise Refused(400, f"The body is a JSON {type(asked).__name__}; it must be an object.")
    for name, value in asked.items():
        if name in DEFAULTS and value not in (None, DEFAULTS[name], {}):
            raise Refused(400, f"{name} is not done here; leave it out.", name, "unsupported_parameter")
        if name not in DEFAULTS and name not in OURS:
            raise Refused(400, f"There is no parameter {name!r}.", str(name)[:100], "unknown_parameter")

    def number(name: str, default, low: float, high: float, whole: bool = False):
        value = default if asked.get(name) is None else asked[name]
        fits = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not fits or not math.isfinite(value) or not low <= value <= high:
            what = f"a {'whole ' if whole else ''}number from {low:g} to {high:g}"
            raise Refused(400, f"{name} must be {what}, but is {json.dumps(value)[:100]}.", name)
        return value

    def flag(of: dict, name: str) -> bool:
        value = False if of.get(name) is None else of[name]
        if not isinstance(value, bool):
            raise Refused(400, f"{name} must be true or false.", name)
        return value

    if not isinstance(asked.get("model"), str):
        raise Refused(400, "model must be a string that names the adapter or the base.", "model")
    stops = asked.get("stop") or ()
    stops = (stops,) if isinstance(stops, str) else stops
    if not isinstance(stops, list | tuple) or not all(isinstance(s, str) and s for s in stops):
        raise Refused(400, "stop must be a text or a list of texts.", "stop")
    if len(stops) > limits.stops:
        raise Refused(400, f"stop has {len(stops)} texts; {limits.stops} are read.", "stop")
    options = asked.get("stream_options") or {}
    if not isinstance(options, dict):
        raise Refused(400, "stream_options must be an object.", "stream_options")
    return Order(
        model=asked["model"],
        prompts=prompts(asked.get("prompt"), tokenizer, limits),
        most=number("max_tokens", 16, 1, 1_000_000, whole=True),
        temperature=number("temperature", 1.0, 0, 2),
        top_p=number("top_p", 1.0, 0, 1),
        seed=number("seed", uuid.uuid4().int % 2**31, -(2**63), 2**63 - 1, whole=True),
        stops=tuple(stops),
        stream=flag(asked, "stream"),
        usage=flag(options, "include_usage"),
    )


def prompts(prompt, tokenizer, limits: Limits) -> tuple[tuple[int, ...], ...]:
    """A text, a list of texts, a list of token ids, or a list of such lists, as token ids."""

    def is_ids(value) -> bool:
        return isinstance(value, list) and bool(value) and all(type(i) is int for i in value)

    every = [prompt] if isinstance(prompt, str) or is_ids(prompt) else prompt
    if not isinstance(every, list) or not every or not all(isinstance(p, str) or is_ids(p) for p in every):
        raise Refused(400, "prompt must be a text, a list of token ids, or a list of either.", "prompt")
    if len(every) > limits.prompts:
        raise Refused(400, f"prompt has {len(every)} texts; {limits.prompts} are read at once.", "prompt")
    ids = [begun(tokenizer, p) if isinstance(p, str) else p for p in every]
    for each in ids:
        if not each:
            raise Refused(400, "The prompt has no tokens.", "prompt")
        if not all(0 <= i < len(tokenizer) for i in each):
            raise Refused(400, f"The prompt has a token id outside 0 to {len(tokenizer) - 1}.", "prompt")
    return tuple(map(tuple, ids))


def begun(tokenizer, text: str) -> list[int]:
    """The tokens of a text that will go on: without the end that some tokenizers put there."""
    ids = tokenizer(text).input_ids
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
