"""The stages of the kit: each takes a `Run`, leaves its file, and returns what the report says of it."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import math
import statistics
import time
import warnings
from collections import Counter

import torch
from safetensors.torch import save_file

import minipeft as mp
from minipeft.analyze import memory as memory_of
from minipeft.course import atlas as shipped_atlas
from minipeft.course import larger as larger_base
from minipeft.course.grid import grid
from minipeft.learn.many import fit_many
from minipeft.learn.rows import collate, encode
from minipeft.learn.sweep import Point, collect, method_of, sweep
from minipeft.methods import METHODS
from minipeft.world import base, tasks

TINY = {"hidden": 32, "layers": 2, "heads": 2, "ff": 48}
DESK = {"hidden": 256, "layers": 8, "heads": 8, "ff": 736}  # 6.8 M numbers, 13.7 MB in bfloat16


def versions() -> dict[str, str]:
    import peft
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}


def name_of(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"


# ---------------------------------------------------------------------------------------------------------------------
# (a) The same numbers on both devices
# ---------------------------------------------------------------------------------------------------------------------
def agree(run) -> dict:
    """Every method with every example: the largest differences to the CPU, relative to the largest value there."""
    found, failed = {}, {}
    started = time.monotonic()
    for name, kind in METHODS.items():
        for settings in kind.examples if not run.dry else kind.examples[:1]:
            if time.monotonic() - started > run.seconds:
                break
            label = f"{name} {settings}"
            try:
                here, there = measured(kind(**settings), "cpu"), measured(kind(**settings), run.device)
            except Exception as error:
                failed[label] = f"{type(error).__name__}: {str(error)[:300]}"
                continue
            tokens = here.pop("tokens"), there.pop("tokens")
            found[label] = {
                what: (value - there[what]).abs().max().item() / max(1.0, value.abs().max().item())
                for what, value in here.items()
            } | {"same tokens": torch.equal(*tokens)}
            run.write("agree.json", {"device": name_of(run.device), "relative differences": found, "failed": failed})
    worst = max((v for each in found.values() for k, v in each.items() if k != "same tokens"), default=math.nan)
    said = {"methods": len(found), "largest relative difference": worst}
    return said | ({"failed": failed} if failed else {})


def measured(method, device: str) -> dict[str, torch.Tensor]:
    """Logits, gradients, merged logits and generated tokens of a tiny model with this method, every number moved."""
    torch.manual_seed(0)
    tokenizer = base.build_tokenizer()
    model = base.build_model(len(tokenizer), **TINY).eval()
    tuned = mp.attach(model.to(device), method)  # on the device, where the same numbers are to be drawn
    generator = torch.Generator().manual_seed(1)
    for parameter in tuned.adapters.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(device)
    ids = torch.arange(3, 27, device=device).view(2, 12)
    result = tuned(input_ids=ids, labels=ids)
    result.loss.backward()
    found = {"logits": result.logits.detach().cpu()}
    found["gradients"] = torch.cat([p.grad.flatten().cpu() for p in tuned.adapters.parameters() if p.grad is not None])
    with torch.no_grad():
        out = tuned.generate(ids, max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(ids))
        found["tokens"] = out.cpu()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tuned.merge()
            found["merged"] = tuned(input_ids=ids).logits.cpu()
        except ValueError as error:
            if "changes no weight" not in str(error):
                raise
    return found


# ---------------------------------------------------------------------------------------------------------------------
# (b) The bases
# ---------------------------------------------------------------------------------------------------------------------
def bases(run) -> dict:
    """Trains pocket and desk side by side: neither keeps a GPU busy."""
    with torch_processes(2) as executor:
        both = {
            "pocket": executor.submit(trained, run, "pocket", TINY if run.dry else {}, torch.float32, 1.0),
            "desk": executor.submit(trained, run, "desk", TINY if run.dry else DESK, torch.bfloat16, 0.5),
        }
        return {name: future.result() for name, future in both.items()}


def trained(run, name: str, shape: dict[str, int], dtype: torch.dtype, slower: float) -> dict:
    """Trains a base through all phases in about `run.seconds`, and leaves weights and card in one file, and the base as
    `mp.load` takes it in a folder beside the results. `slower`: its rates as a share of the shipped base's, since a
    wider model takes smaller ones."""
    started = time.monotonic()
    torch.set_float32_matmul_precision("high")
    tokenizer = base.build_tokenizer()
    tokens, workers = (512, 0) if run.dry else (16384, 6)

    def train(*phases) -> tuple[torch.nn.Module, list[dict]]:
        torch.manual_seed(0)
        model = base.build_model(len(tokenizer), **shape).to(run.device)
        return model, [
            base.train_phase(model, tokenizer, max(2, steps), slower * lr, share, seed, tokens, workers)
            for steps, lr, share, seed in phases
        ]

    _, (probe,) = train((3 if run.dry else 200, 1e-3, 0.0, 99))
    left = run.seconds - (time.monotonic() - started)
    steps = 6 if run.dry else 0.75 * left / probe["seconds a step"]  # the rest is for the processes and for measuring
    total = sum(each for each, _, _ in base.PHASES)
    model, phases = train(
        *((round(steps * part / total), lr, share, 1 + i) for i, (part, lr, share) in enumerate(base.PHASES))
    )
    torch.set_float32_matmul_precision("highest")
    model = model.to(dtype).to(torch.float32).eval()  # what is measured is what is stored
    sizes = {"stories": 20, "samples": 4} if run.dry else {}
    card = base.card_of(model, tokenizer, phases, name_of(run.device), seed=0, **sizes)
    model = model.cpu()
    weights = {k: v.to(dtype).contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}  # tied
    save_file(weights, run.out / f"{name}.safetensors", {"card": json.dumps(card), "shape": json.dumps(shape)})
    base.save(model, tokenizer, card, beside(run, name))
    told = ("above the floor in %", "above the source, story by story, in nats a token",
            "sampled stories that parse, of 100", "the same with no unlikely word left out")  # fmt: skip
    return {key: card[key] for key in told} | {"phases": phases}


def beside(run, name: str):
    return run.out.parent / f"{run.out.name}-{name}"


# ---------------------------------------------------------------------------------------------------------------------
# (c) The atlas
# ---------------------------------------------------------------------------------------------------------------------
def atlas(run) -> dict:
    """The grid's runs, in an order in which every prefix is useful, several side by side on one device."""
    points = grid(seeds=1 if run.dry else 5)[: 2 if run.dry else None]
    folder = beside(run, "runs")
    with torch_processes(1 if run.dry else 14) as executor:
        missing = sweep(points, folder, executor, run.seconds, device=run.device)
    done = [point for point in points if (folder / f"{point.key}.json").exists()]
    collect(done, folder, run.out / "atlas.parquet", device=name_of(run.device))
    return {"runs": len(done), "missing": missing} | came_back(done, folder)


def came_back(done: list, folder) -> dict:
    """The runs beside those of the atlas that the course ships, by the rule of `atlas.came_back`."""
    shipped = shipped_atlas.load()
    stored = {Point(**{f: row[f] for f in Point.__dataclass_fields__}): row for row in shipped.to_dict("records")}
    found, worst = Counter(), 0.0
    for each in done:
        if each not in stored:
            continue
        again = json.loads((folder / f"{each.key}.json").read_bytes())
        which, shape = (each.task, method_of(each.method, each.settings)), {"steps": each.steps, "batch": each.batch}
        best, alike = shipped_atlas.chosen(shipped, *which, **shape)[0], shipped_atlas.all_of(shipped, *which, **shape)
        how = shipped_atlas.came_back(stored[each], again, best, alike[alike.lr == best].loss.min())
        found[how] += 1
        if how == "same":
            worst = max(worst, abs(again["loss"] - stored[each]["loss"]))
    return {"beside the shipped atlas": dict(found), "largest difference of the same": round(worst, 4)}


def larger(run) -> dict:
    """LoRA and full fine-tuning on the desk base that `bases` has just trained."""
    few = {"tasks": ("facts(8)",), "settings": larger_base.SETTINGS[:1]} if run.dry else {}
    with torch_processes(1 if run.dry else 14) as executor:
        runs = larger_base.measure(
            beside(run, "larger"), run.out / "larger.parquet", str(beside(run, "desk")), run.device, executor,
            run.seconds, named=name_of(run.device), **few,
        )  # fmt: skip
    return {"runs": runs}


def torch_processes(n: int):
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    return ProcessPoolExecutor(n, multiprocessing.get_context("spawn"))  # a fork of a process that uses CUDA fails


# ---------------------------------------------------------------------------------------------------------------------
# (d) Memory
# ---------------------------------------------------------------------------------------------------------------------
def memory(run) -> dict:
    """The most that a step allocates beyond what lay there before, against the prediction, in bytes."""
    shape = TINY if run.dry else DESK
    rows = []
    started = time.monotonic()
    for label, method in (("full", mp.Full()), ("LoRA r=8", mp.LoRA(rank=8)), ("BitFit", mp.BitFit())):
        for batch, length in ((2, 16),) if run.dry else ((4, 48), (16, 96), (64, 96)):
            if time.monotonic() - started > run.seconds:
                break
            tuned = mp.attach(base.build_model(684, **shape), method).train().to(run.device)
            foretold = memory_of.predict(tuned, batch=batch, length=length).peak
            peak = memory_of.measure(tuned, batch, length).peak  # on a GPU cuBLAS takes its workspace in this step
            if run.device == "cuda":
                tuned = tuned.cpu()
                gc.collect()
                before = torch.cuda.memory_allocated()
                tuned = tuned.to(run.device)
                torch.cuda.reset_peak_memory_stats()
                memory_of.measure(tuned, batch, length)
                peak = torch.cuda.max_memory_allocated() - before
            rows.append({"method": label, "batch": batch, "length": length, "predicted": foretold, "measured": peak})
            run.write("memory.json", {"device": name_of(run.device), "shape": shape, "rows": rows})
    return {"measured / predicted": [round(row["measured"] / row["predicted"], 3) for row in rows]}


# ---------------------------------------------------------------------------------------------------------------------
# (e) Benchmarks
# ---------------------------------------------------------------------------------------------------------------------
def bench(run) -> dict:
    """Medians of ratios of step times, taken in turn: LoRA here against PEFT, a frozen backward pass, and full."""
    import peft

    rows = []
    started = time.monotonic()
    model, task = mp.load("pocket")[0].to(run.device), tasks.pirate(600, 100)
    for count in (2,) if run.dry else (4, 16, 64):
        if time.monotonic() - started > run.seconds:
            break
        settings = {"steps": 4 if run.dry else 30, "batch": 2 if run.dry else 10, "progress": False}
        _, histories = fit_many(model, [mp.LoRA(rank=8)] * count, task, lr=1e-2, **settings)
        alone = pace(mp.fit(mp.attach(mp.load("pocket")[0].to(run.device), mp.LoRA(rank=8)), task, lr=1e-2, **settings))
        model = mp.load("pocket")[0].to(run.device)
        rows.append({"runs at once": count, "one by one / at once": count * alone / pace(histories[0])})
        run.write("bench.json", {"device": name_of(run.device), "rows": rows} | versions())
    for width in (32,) if run.dry else (128, 256, 512, 1024):
        shape = {"hidden": width, "layers": 2 if run.dry else 4, "heads": max(2, width // 64), "ff": 3 * width}
        model, tokenizer = base.build_model(684, **shape), base.build_tokenizer()
        texts = tasks.pirate(40, 4).data["train"].select(range(16))
        inputs = collate("text", encode("text", texts, tokenizer, 128), tokenizer, run.device)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        frozen = copy.deepcopy(model).requires_grad_(False)
        frozen.model.norm.weight.requires_grad_(True)
        for rank in (8, 64):
            if time.monotonic() - started > run.seconds:
                break
            config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
            sides = {
                "minipeft": mp.attach(copy.deepcopy(model), mp.LoRA(rank=min(rank, width))),
                "PEFT": peft.get_peft_model(copy.deepcopy(model), config),
                "frozen": frozen,
                "full": copy.deepcopy(model),
            }
            steps = {name: step_of(side.train().to(run.device), inputs, run.device) for name, side in sides.items()}
            for _ in range(2):
                [step() for step in steps.values()]
            times = [{name: step() for name, step in steps.items()} for _ in range(3 if run.dry else 15)]
            ratios = {
                f"minipeft / {name}": statistics.median(each["minipeft"] / each[name] for each in times)
                for name in ("PEFT", "frozen", "full")
            }
            rows.append({"width": width, "rank": rank, "tokens": inputs["input_ids"].numel()} | ratios)
            run.write("bench.json", {"device": name_of(run.device), "rows": rows} | versions())
    return {"rows": rows}


def pace(history) -> float:
    """Seconds a step, the median."""
    return statistics.median(b - a for a, b in itertools.pairwise(history.seconds))


def step_of(model, inputs: dict, device: str):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> float:
        started = time.perf_counter()
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    return step
