"""The opinion monitor as Voilà serves it: a page without a notebook, whose slider changes picture and text."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from chromium import CHROMIUM, FLAGS
from processes import until

ROOT = Path(__file__).parents[2]
pytest.importorskip("voila", reason='needs `pip install "minipeft[page]"`')
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]


def answers(port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        return True
    return False


@pytest.fixture
def address(tmp_path):
    names = ["JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"]
    env = os.environ | {name: str(tmp_path / name.lower()) for name in names} | {"OMP_NUM_THREADS": "1"}
    env.pop("MPLBACKEND", None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "voila", "--no-browser", f"--port={port}", "--Voila.ip=127.0.0.1"]
    log = (tmp_path / "log").open("wb")
    page = [*command, str(ROOT / "docs" / "opinion_monitor.ipynb")]
    server = subprocess.Popen(page, env=env, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
    try:
        until(lambda: server.poll() is not None or answers(port), "Voilà's answer", 300, pause=0.25)
        assert server.poll() is None, (tmp_path / "log").read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)


def test_the_page_shows_the_monitor_and_answers_a_key(address, tmp_path):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(120_000)
        page.goto(address)
        image = page.locator("img.widget-image")
        image.wait_for()
        said = page.get_by_text("false alarms in 1,000 calm batches")
        said.wait_for()
        before, text = image.get_attribute("src"), said.inner_text()
        assert "def " not in page.inner_text("body"), "the page shows no code"
        handle = page.locator(".noUi-handle").nth(2)  # λ
        handle.focus()
        page.keyboard.press("ArrowLeft")
        page.wait_for_function("text => !document.body.innerText.includes(text)", arg=text)
        assert image.get_attribute("src") != before and said.inner_text() != text
        page.screenshot(path=tmp_path / "page.png")
        browser.close()
