"""The server under load: many requests over many adapters that are exchanged meanwhile. None may be lost or mixed up.

    python benchmarks/load.py                       10,000 requests over 32 adapters, 64 at a time

Every adapter has two versions, and every version writes another text to each prompt, so a text tells which version of
which adapter wrote it, and a text that two of them wrote is like no other. The base is in float64, in which no rounding
makes a token another one. Times are those of this machine, with the client on the same cores.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import shutil
import socket
import tempfile
import threading
import time
from pathlib import Path

import torch
import uvicorn
from openai import AsyncOpenAI

import minipeft as mp
from minipeft.serve.engine import Engine
from minipeft.serve.folder import Folder
from minipeft.serve.server import Service, application
from minipeft.serve.tenants import Bank

PROMPTS = ["anna went to the", "the dog ran to", "ben saw a red", "it was a dark"]  # of one length: no padding
TOKENS = 8


def base():
    model, tokenizer = mp.load("pocket")
    return model.double(), tokenizer


def write_versions(folder: Path, names: list[str]) -> dict[str, list[list[str]]]:
    """Writes two versions of each adapter; {name: what each version writes alone to each prompt}. Random adapters of
    which a text is like one that is there already are passed over."""
    model, tokenizer = base()
    tuned, seeds, seen = mp.attach(model, mp.LoRA(rank=4)), itertools.count(), set()
    ids = tokenizer(PROMPTS, return_tensors="pt").input_ids
    begun = [len(text) for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def fresh() -> list[str]:
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            for layer in tuned.layers():
                layer.A.data.uniform_(-0.1, 0.1, generator=generator)
                layer.B.data.normal_(0, 1.0, generator=generator)
            out = tuned.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)
            whole = tokenizer.batch_decode(out, skip_special_tokens=True)
            if len({*whole} | seen) == len(whole) + len(seen):
                seen.update(whole)
                return [text[n:] for text, n in zip(whole, begun, strict=True)]

    texts = {}
    for name in names:
        texts[name] = []
        for version in range(2):
            texts[name].append(fresh())
            tuned.save(folder / name / str(version))
    return texts


async def ask(address: str, texts: dict, requests: int, at_once: int, stop: threading.Event) -> dict:
    """Sends the requests, `at_once` at a time, every other one streamed; what became of them."""
    pick, gate = random.Random(0), asyncio.Semaphore(at_once)
    jobs = [(pick.choice(list(texts)), pick.randrange(len(PROMPTS)), pick.random() < 0.5) for _ in range(requests)]
    found = {"lost": 0, "mixed": 0, "seconds": [], "versions": [0, 0], "why": None}
    async with AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120) as client:

        async def one(name: str, prompt: int, stream: bool) -> None:
            async with gate:
                begun = time.perf_counter()
                try:
                    answer = await client.completions.create(
                        model=name, prompt=PROMPTS[prompt], max_tokens=TOKENS, temperature=0, stream=stream
                    )
                    pieces = [piece.choices[0].text async for piece in answer] if stream else [answer.choices[0].text]
                except Exception as error:  # whatever it was, the request is lost
                    found["lost"] += 1
                    found["why"] = repr(error)
                    return
                found["seconds"].append(time.perf_counter() - begun)
                right = [version[prompt] for version in texts[name]]
                if (text := "".join(pieces)) in right:
                    found["versions"][right.index(text)] += 1
                else:
                    found["mixed"] += 1

        await asyncio.gather(*(one(*job) for job in jobs))
    stop.set()
    return found


def exchange(store: Path, served: Path, names: list[str], stop: threading.Event, pause: float) -> None:
    """Puts the other version of a random adapter in place, again and again, as a training run would."""
    pick, now = random.Random(1), dict.fromkeys(names, 0)
    while not stop.wait(pause):
        name = pick.choice(names)
        now[name] = 1 - now[name]
        source = store / name / str(now[name])
        for file in sorted(source.iterdir()):  # as `cp` would: not at once
            shutil.copyfile(file, served / name / file.name)


def run(requests: int = 10_000, adapters: int = 32, at_once: int = 64, rows: int = 32, pause: float = 0.2) -> dict:
    names = [f"adapter-{k}" for k in range(adapters)]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        store, served = Path(folder) / "store", Path(folder) / "served"
        texts = write_versions(store, names)
        for name in names:
            shutil.copytree(store / name / "0", served / name)
        model, tokenizer = base()
        engine = Engine(Bank(model), rows)
        shelf = Folder(engine, served, reserved="base")
        shelf.look(settled=False)
        service = Service(engine.start(), tokenizer, shelf.watch(0.1), "base")
        stack.callback(engine.close)
        stack.callback(shelf.close)
        line = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(application(service), log_level="error"))
        web = threading.Thread(target=server.run, kwargs={"sockets": [line]}, daemon=True)
        web.start()
        stop = threading.Event()
        swapping = threading.Thread(target=exchange, args=(store, served, names, stop, pause), daemon=True)
        swapping.start()
        begun = time.perf_counter()
        try:
            found = asyncio.run(ask(f"http://127.0.0.1:{line.getsockname()[1]}", texts, requests, at_once, stop))
        finally:
            stop.set()
            swapping.join()
            server.should_exit = True
            web.join()
        took, times = time.perf_counter() - begun, sorted(found.pop("seconds"))
        return found | {
            "requests": requests,
            "adapters": adapters,
            "swaps": engine.swaps - adapters,
            "left in the batch": len(engine.rows) + engine.waiting(),
            "tokens a second": round(len(times) * TOKENS / took),
            "median seconds": round(times[len(times) // 2], 3) if times else None,
            "99th percentile": round(times[int(0.99 * len(times))], 3) if times else None,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--rows", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(run(options.requests, options.adapters, options.at_once, options.rows), indent=2))


if __name__ == "__main__":
    main()
