"""A server for the tests: a small base and adapters whose texts tell them apart."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import tiny
import torch

from minipeft.attach import attach
from minipeft.methods.lora import LoRA

NAMES = ["zoe", "b", "Ada", "x-1"]
PROMPTS = ["Anna went to the", "The dog", "Ben saw a red hat . Ben", "It was"]


def base():
    """In float64, where no rounding makes a token another one."""
    return tiny.small().double()


def write_adapter(path: Path, seed: int) -> None:
    tuned = attach(base(), LoRA(rank=2))
    tiny.randomise(tuned, seed, scale=1.0)
    tuned.save(path)


def alone(path: Path | None, prompt: str, tokens: int) -> str:
    """What the adapter at `path`, or the base, writes on its own with `generate`."""
    from minipeft.serve.checkpoint import load_adapter

    model = base()
    tokenizer = model.tokenizer
    model = model if path is None else load_adapter(model, path)
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(
        input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=tokens, do_sample=False
    )
    before = tokenizer.decode(inputs.input_ids[0], skip_special_tokens=True)
    return tokenizer.decode(out[0], skip_special_tokens=True)[len(before) :]


@contextlib.contextmanager
def served(folder: Path, rows: int = 8, waiting: int = 1000, token: str | None = None, watch: float = 0.05, **limits):
    """A running server: (address, engine, service)."""
    import uvicorn

    from minipeft.serve.engine import Engine
    from minipeft.serve.folder import Folder
    from minipeft.serve.server import Limits, Service, application
    from minipeft.serve.tenants import Bank

    torch.set_num_threads(1)
    model = base()
    engine = Engine(Bank(model), rows, waiting)
    shelf = Folder(engine, folder, reserved="base")
    shelf.look(settled=False)
    service = Service(engine.start(), model.tokenizer, shelf.watch(watch), "base", Limits(**limits))
    server = uvicorn.Server(uvicorn.Config(application(service, token), port=0, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.01)
    try:
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", engine, service
    finally:
        server.should_exit = True
        thread.join()
        shelf.close()
        engine.close()
