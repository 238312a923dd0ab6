"""Lessons in JupyterLab in a real Chromium: a slider is moved by key and by mouse, and the picture changes.

Skipped, with the reason, where there is no Chromium. The last screenshots are kept in the folder that pytest names.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from chromium import CHROMIUM, FLAGS

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab with its own settings, over a copy of the lessons and exercises."""
    home = tmp_path_factory.mktemp("lab")
    for folder in ("notebooks", "exercises"):
        shutil.copytree(ROOT / folder, home / folder)
    for lesson in (home / "notebooks").glob("*.ipynb"):
        up_to_the_explorer(lesson)
    settings = home / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    quiet = {"fetchNews": "false", "checkForUpdates": False}
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(quiet))
    names = ["JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "JUPYTERLAB_WORKSPACES_DIR"]
    env = os.environ | {name: str(home / name.lower()) for name in names}
    env |= {
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "OMP_NUM_THREADS": "1",  # two threads on cores that other tests use wait for each other, and for very long
        "MINIPEFT_PROGRESS": str(home / "progress.json"),
    }
    env.pop("MPLBACKEND", None)  # the kernel chooses for itself, as at home
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1"]
    command += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token="]
    command += [f"--ServerApp.root_dir={home}"]
    log = (home / "log").open("wb")
    server = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, cwd=home)
    address = f"http://127.0.0.1:{port}"
    for _ in range(240):
        try:
            urllib.request.urlopen(f"{address}/api", timeout=1).read()
            break
        except OSError:
            assert server.poll() is None, (home / "log").read_text()
            time.sleep(0.25)
    yield address
    server.terminate()
    server.wait(20)


def up_to_the_explorer(lesson: Path) -> None:
    """Leaves out what follows the first explorer of a lesson, so that the kernel is soon free for it."""
    notebook = json.loads(lesson.read_text(encoding="utf-8"))
    shows = [i for i, cell in enumerate(notebook["cells"]) if "Explorer(" in "".join(cell["source"])]
    notebook["cells"] = notebook["cells"][: shows[0] + 1] if shows else notebook["cells"]
    lesson.write_text(json.dumps(notebook), encoding="utf-8")


@pytest.fixture(scope="module")
def page(lab):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        page.set_default_timeout(120_000)
        yield page
        browser.close()


def picture_after(page, image, before: str, seconds: float) -> tuple[str, float]:
    """Wait until the image's source is no longer `before`: (the new source, seconds that it took)."""
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        now = image.get_attribute("src")
        if now != before:
            return now, time.perf_counter() - started
        page.wait_for_timeout(40)
    raise AssertionError(f"the picture did not change within {seconds} s")


def idle_for(page, seconds: float) -> None:
    """Wait until no cell has been waiting or running, and the kernel has been idle, for some seconds."""
    since = time.perf_counter()
    while time.perf_counter() - since < seconds:
        page.wait_for_timeout(200)
        waiting = page.locator(".jp-InputPrompt", has_text="[*]").count()
        if waiting or "Python 3 (ipykernel) | Idle" not in page.inner_text("body"):
            since = time.perf_counter()


def settled(page, text, seconds: float) -> None:
    """Wait until the explorer's text reports the test after training."""
    started = time.perf_counter()
    while "test loss" not in text.inner_text():
        assert time.perf_counter() - started < seconds, text.inner_text()
        page.wait_for_timeout(50)


# the rank of LoRA, the bottleneck of adapters: both begin at 8, and one step to the right is 16
@pytest.mark.parametrize("lesson", ["00_start_here", "03_adapters"])
def test_the_slider_moves_by_key_and_by_mouse_and_the_picture_follows(lab, page, tmp_path, capsys, lesson):
    page.goto(f"{lab}/lab/tree/notebooks/{lesson}.ipynb?reset")
    page.get_by_text("Python 3 (ipykernel) | Idle").first.wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    cell = page.locator(".jp-CodeCell", has=page.locator("img.widget-image")).first
    image, text = cell.locator("img.widget-image").first, cell.locator(".widget-html").last
    image.wait_for(state="attached")
    idle_for(page, 3)
    image.scroll_into_view_if_needed()
    settled(page, text, 60)

    handle = cell.locator(".noUi-handle").first
    before = image.get_attribute("src")
    handle.focus()
    page.keyboard.press("ArrowRight")
    by_key, first = picture_after(page, image, before, 20)
    settled_at = time.perf_counter()
    settled(page, text, 60)
    whole = first + time.perf_counter() - settled_at
    assert "16" in cell.locator(".widget-readout").first.inner_text()
    page.screenshot(path=tmp_path / "after_key.png")

    finished = image.get_attribute("src")
    box = handle.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] - 60, box["y"] + box["height"] / 2, steps=5)
    page.mouse.up()
    picture_after(page, image, finished, 20)
    handle.focus()
    page.keyboard.press("ArrowLeft")  # a second move while the first run is under way
    settled(page, text, 60)
    page.screenshot(path=tmp_path / "after_mouse.png")
    readout = cell.locator(".widget-readout").first.inner_text()
    assert readout in ("1", "2", "4")
    with capsys.disabled():
        print(f"\nkey to first picture {first:.2f} s, to the end of the run {whole:.1f} s; pictures in {tmp_path}")
