"""What every test may count on: one thread, fixed seeds, no network, no screen."""

import os
import random

os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
matplotlib.use("Agg")  # here only: the kernels of the lessons choose for themselves, as at home


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Draws the same numbers in a test whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=20, help="how often test_kills.py kills a process that saves")


@pytest.fixture
def kills(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--kills")


SLOW = """
    add_a_method advice base benchmarks beyond corpus distill doctor entries explore export federated fit gpu_kit
    kills memory mine notebook_tools policy real robust server setup stream sweep tasks worker yours
""".split()  # test files that train, start processes or read real texts throughout


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Graders, browser and the files of SLOW are slow as a whole; elsewhere a slow test says so itself."""
    for item in items:
        if item.path.parent.name in ("grading", "browser") or item.path.stem.removeprefix("test_") in SLOW:
            item.add_marker(pytest.mark.slow)
