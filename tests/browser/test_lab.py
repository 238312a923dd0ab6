"""A lesson in JupyterLab in a real Chromium: sliders are moved by key and by mouse while a cell runs, and answer.

Skipped, with the reason, where there is no Chromium. The last screenshots are kept in the folder that pytest names.
"""

import json
import re
import shutil
import time
from pathlib import Path

import pytest
from chromium import CHROMIUM, FLAGS, by_mouse, jupyterlab, menu, picture_after
from processes import until

ROOT = Path(__file__).parents[2]
FIRST = "00_start_here"

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab with its own settings, over a copy of the lessons and exercises."""
    home = tmp_path_factory.mktemp("lab")
    for folder in ("notebooks", "exercises"):
        shutil.copytree(ROOT / folder, home / folder)
    for lesson in (home / "notebooks").glob("*.ipynb"):
        up_to_the_explorer(lesson)
    with jupyterlab(home) as address:
        yield address


def up_to_the_explorer(lesson: Path) -> None:
    """Leaves out what follows the first explorer of a lesson. In the first lesson a second explorer comes instead, and
    a cell that computes until it is interrupted."""
    notebook = json.loads(lesson.read_text(encoding="utf-8"))
    shows = [i for i, cell in enumerate(notebook["cells"]) if "Explorer(" in "".join(cell["source"])]
    notebook["cells"] = notebook["cells"][: shows[0] + 1] if shows else notebook["cells"]
    if lesson.stem == FIRST:
        for name, code in (("second", "mp.AdapterExplorer(model)"), ("busy", "while True:\n    sum(range(10_000))")):
            notebook["cells"].append(notebook["cells"][shows[0]] | {"id": name, "source": code, "outputs": []})
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


def idle_for(page, seconds: float, limit: float = 1800) -> None:
    """Wait until no cell has been waiting or running, and the kernel has been idle, for some seconds."""
    since = started = time.perf_counter()
    while time.perf_counter() - since < seconds:
        assert time.perf_counter() - started < limit, f"In {limit:g} seconds the kernel was not idle."
        page.wait_for_timeout(200)
        waiting = page.locator(".jp-InputPrompt", has_text="[*]").count()
        if waiting or "Python 3 (ipykernel) | Idle" not in page.inner_text("body"):
            since = time.perf_counter()


def settled(page, box, seconds: float) -> None:
    """Wait until the explorer's text reports the test after training."""
    started = time.perf_counter()
    while "test loss" not in box.inner_text():
        assert time.perf_counter() - started < seconds, box.inner_text()
        page.wait_for_timeout(50)


def test_sliders_answer_by_key_and_mouse_while_a_cell_runs(lab, page, tmp_path, capsys):
    page.goto(f"{lab}/lab/tree/notebooks/{FIRST}.ipynb?reset")
    page.get_by_text("Python 3 (ipykernel) | Idle").first.wait_for()
    menu(page, "Run", "Run All Cells")
    first, second = (page.locator(".minipeft-box", has=page.locator("img")).nth(i) for i in range(2))
    second.locator("img").wait_for(state="attached")
    running = page.locator(".jp-InputPrompt", has_text="[*]")
    until(lambda: running.count() <= 1, "the end of all cells but the busy one", 600, pause=0.05)

    # the rank of LoRA and the bottleneck of adapters begin at 8, and one step to the right is 16
    waited = []
    for box in (first, second):
        box.scroll_into_view_if_needed()
        image, handle = box.locator("img"), box.locator(".noUi-handle").first
        handle.focus()
        waited.append(picture_after(page, image, lambda: page.keyboard.press("ArrowRight")))
        assert box.locator(".widget-readout").first.inner_text() == "16"
        until(lambda: "= 16 ·" in image.get_attribute("title"), "a picture that is named by the move", 20, pause=0.05)  # noqa: B023
        box.get_by_role("button", name="stop").click()
        box.get_by_text("Stopped; move a control").wait_for()
    waited.append(picture_after(page, image, lambda: by_mouse(page, handle, -60)))
    handle.focus()
    page.keyboard.press("ArrowLeft")  # a second move while the first run is under way
    assert box.locator(".widget-readout").first.inner_text() in ("1", "2", "4")
    box.get_by_text(re.compile(r"step [1-9]\d* of 60")).wait_for()
    assert running.count() == 1, "and all this while the cell went on"
    wide = "e => [...document.querySelectorAll('.jp-OutputArea-output')].every(e => e.scrollWidth <= e.clientWidth)"
    assert page.evaluate(wide)
    page.screenshot(path=tmp_path / "light.png")

    page.evaluate("document.body.dataset.jpThemeLight = 'false'")  # what the dark theme sets
    page.wait_for_function("getComputedStyle(document.querySelector('.minipeft-box img')).filter.includes('invert')")
    page.screenshot(path=tmp_path / "dark.png")
    menu(page, "Kernel", "Interrupt Kernel")
    until(lambda: not running.count(), "the end of the interrupted cell", 120, pause=0.05)
    settled(page, box, 300)  # the interrupt was for the cell alone
    menu(page, "Kernel", "Restart Kernel…")
    page.locator(".jp-Dialog button", has_text="Restart").first.click()
    notice = "getComputedStyle(document.querySelector('.minipeft-box'), '::after').content"
    page.wait_for_function(f"{notice}.includes('run this cell again')")
    page.screenshot(path=tmp_path / "restarted.png")
    with capsys.disabled():
        print(f"\nfrom a move to the picture: {', '.join(f'{t:.2f}' for t in waited)} s; pictures in {tmp_path}")


def test_going_further_opens_folded_and_unfolds(lab, page):
    page.goto(f"{lab}/lab/tree/notebooks/11_distillation.ipynb?reset")
    page.get_by_text("Python 3 (ipykernel) | Idle").first.wait_for()
    more = page.locator(".jp-showHiddenCellsButton")
    for _ in range(200):  # cells far below are made only when they are scrolled to
        if not more.count():
            page.locator(".jp-WindowedPanel-outer").evaluate("e => e.scrollBy(0, 500)")
            page.wait_for_timeout(100)
    more.scroll_into_view_if_needed()
    inside = page.get_by_role("heading", name="Small changes that should not matter")
    page.get_by_text("4 cells hidden").wait_for()
    assert not inside.is_visible()
    assert page.get_by_role("heading", name="Now write it").is_visible(), "the next section is seen"
    more.click()
    inside.wait_for()
