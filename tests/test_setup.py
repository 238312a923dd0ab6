"""The set-up: its three lists of packages agree, and `make` fails in one sentence where it cannot go on."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())
PINS = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
VERSIONS = {canonicalize_name(name): version for name, version in (pin.split("==") for pin in PINS)}
DECLARED = [Requirement(line) for line in [*PROJECT["dependencies"], *sum(EXTRAS.values(), [])]]

# The least project that `pip install -e .[real]` accepts: it builds itself, so nothing is downloaded.
TOY_PROJECT = """
[build-system]
requires = []
build-backend = "toy_backend"
backend-path = ["."]
[project]
name = "minipeft"
version = "0"
"""
TOY_BACKEND = """
import zipfile

def build_editable(folder, config_settings=None, metadata_directory=None):
    wheel, info = "minipeft-0-py3-none-any.whl", "minipeft-0.dist-info"
    with zipfile.ZipFile(f"{folder}/{wheel}", "w") as archive:
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\\nName: minipeft\\nVersion: 0\\n"
                         "Provides-Extra: real\\nProvides-Extra: test\\n" + REQUIRES)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel
"""


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """The real Makefile and setup.sh around an empty project, in a folder whose name has spaces and a quote."""
    folder = tmp_path / "a learner's own folder"
    (folder / "tools").mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", folder)
    shutil.copy(ROOT / "tools" / "setup.sh", folder / "tools")
    (folder / "pyproject.toml").write_text(TOY_PROJECT)
    (folder / "toy_backend.py").write_text(TOY_BACKEND + 'REQUIRES = ""\n')
    (folder / "constraints.txt").write_text("torch==2.13.0\n")
    return folder


def run(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command without the variables of the `make` that runs these tests."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "PORT")}
    settings = {"PYTHON": sys.executable, "PIP_NO_INDEX": "1"} | environment
    return subprocess.run(command, cwd=folder, env=inherited | settings, capture_output=True, text=True, timeout=100)


def sentence(done: subprocess.CompletedProcess[str]) -> str:
    """What a failed `make` said on stderr, apart from make's own closing line: exactly one line."""
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("minipeft: ")
    return lines[0].removeprefix("minipeft: ")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def fake_python(folder: Path, script: str) -> str:
    path = folder / "fake python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("requirement", DECLARED, ids=str)
def test_every_dependency_is_pinned_within_its_bound(requirement):
    version = VERSIONS.get(canonicalize_name(requirement.name))
    assert version, f"constraints.txt does not pin {requirement.name}"
    assert any(bound.operator == ">=" for bound in requirement.specifier), "a lower bound says what the code needs"
    assert requirement.specifier.contains(version)


def test_constraints_pin_each_package_once_and_exactly():
    assert len(PINS) == len(VERSIONS)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", pin) for pin in PINS)
    assert VERSIONS["torch"] == "2.13.0"


def test_constraints_cover_what_the_dependencies_bring_along():
    todo = [*DECLARED, Requirement("minipeft")]
    seen: set[str] = set()
    while todo:
        name = canonicalize_name(todo.pop().name)
        if name in seen:
            continue
        seen.add(name)
        try:
            brought = [Requirement(line) for line in metadata.requires(name) or []]
        except metadata.PackageNotFoundError:
            continue  # an extra that is not installed here
        todo += [one for one in brought if one.marker is None or one.marker.evaluate({"extra": ""})]
    assert seen - VERSIONS.keys() <= {"minipeft"}


def test_conda_environment_installs_the_project_with_the_constraints():
    channels = [line for line in ENVIRONMENT["dependencies"] if isinstance(line, str)]
    (pip,) = (line["pip"] for line in ENVIRONMENT["dependencies"] if isinstance(line, dict))
    assert pip == ["-c constraints.txt", "-e .[real]"]
    assert "pip" in channels
    (python,) = (line.removeprefix("python=") for line in channels if line.startswith("python="))
    assert SpecifierSet(PROJECT["requires-python"]).contains(f"{python}.0")
    assert [line for line in channels if line not in ("pip", f"python={python}")] == []


def test_the_makefile_installs_the_same_extras():
    script = (ROOT / "tools" / "setup.sh").read_text()
    assert '-c constraints.txt -e ".[$1]"' in script
    assert {"real", "test"} <= EXTRAS.keys()


@pytest.mark.parametrize("target", ["help", "lab", "test", "book", "notebooks", "exercises", "grade", "grade-audit"])
def test_make_knows_its_targets_and_help_lists_them(target):
    assert run(ROOT, "make", "-n", target).returncode == 0
    assert re.search(rf"^make {target}\s+\w", run(ROOT, "make").stdout, re.MULTILINE)


def test_python_too_old_is_one_sentence(toy):
    old = fake_python(toy, "echo 3.10")
    said = sentence(run(toy, "make", "lab", f"PORT={free_port()}", PYTHON=old))
    assert "Python 3.11 or newer is needed" in said and "is 3.10" in said and "PYTHON=" in said
    assert not (toy / ".venv").exists()


def test_python_that_does_not_run_is_one_sentence(toy):
    said = sentence(run(toy, "bash", "tools/setup.sh", "real", PYTHON="no-such-python"))
    assert "no-such-python does not run" in said


def test_python_without_venv_is_one_sentence(toy):
    bare = fake_python(toy, 'case "$2" in *version_info*) echo 3.12;; *) exit 1;; esac')
    said = sentence(run(toy, "bash", "tools/setup.sh", "real", PYTHON=bare))
    assert "venv module is missing" in said and "python3-venv" in said


def test_taken_port_is_one_sentence_before_anything_is_installed(toy):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        said = sentence(run(toy, "make", "lab", f"PORT={port}"))
    assert f"port {port} is taken" in said and "make lab PORT=" in said
    assert not (toy / ".venv").exists()
    assert run(toy, "bash", "tools/setup.sh", "--port", str(port)).returncode == 0


def test_flower_stands_on_the_course(toy):
    assert "not there; run make test" in sentence(run(toy, "bash", "tools/setup.sh", "flower"))


@pytest.mark.parametrize("port", ["", "lab", "0", "65536", "-1", "8888; true"])
def test_a_port_that_is_none_is_one_sentence(toy, port):
    assert "PORT must be a number" in sentence(run(toy, "bash", "tools/setup.sh", "--port", port))


@pytest.mark.slow
def test_failed_download_is_one_sentence_and_leaves_no_stamp(toy):
    (toy / "toy_backend.py").write_text(TOY_BACKEND + 'REQUIRES = "Requires-Dist: no-such-package-of-a-learner\\n"\n')
    nowhere = f"http://127.0.0.1:{free_port()}/simple"
    settings = {"PIP_NO_INDEX": "0", "PIP_INDEX_URL": nowhere, "PIP_RETRIES": "1", "PIP_CONFIG_FILE": os.devnull}
    said = sentence(run(toy, "bash", "tools/setup.sh", "real", PIP_EXTRA_INDEX_URL="", PIP_FIND_LINKS="", **settings))
    assert "a download failed" in said and "no-such-package-of-a-learner" in said and "again" in said
    assert not (toy / ".venv" / "installed").exists()


@pytest.mark.slow
def test_set_up_is_done_once_and_again_when_it_has_to_be(toy):
    def setup(extras: str = "real") -> tuple[bool, float]:
        """Whether pip was called, and the seconds that it took."""
        start = time.perf_counter()
        done = run(toy, "bash", "tools/setup.sh", extras)
        assert done.returncode == 0, done.stderr
        return "Installing" in done.stdout, time.perf_counter() - start

    assert setup()[0]
    again, seconds = setup()
    assert not again and seconds < 5
    assert setup("real,test,classroom")[0], "another extra is installed"
    assert not setup()[0], "and brings this one"

    with (toy / "constraints.txt").open("a") as constraints:
        constraints.write("numpy==2.4.6\n")
    assert setup()[0], "other versions are installed"

    (toy / ".venv" / "installed").unlink()
    shutil.rmtree(next((toy / ".venv" / "lib").glob("python*/site-packages/pip")))
    assert setup()[0], "a partial environment is built again"

    toy = toy.rename(toy.with_name("moved"))
    assert setup()[0], "an editable install points at the folder"
