"""Every slider of the lessons in Chromium while a cell computes: `python benchmarks/in_chromium.py [lesson …]`.

For each lesson a notebook of the cells that show a picture with controls, those that these need, and at the end a cell
of Python that computes, in JupyterLab. Every slider of every picture is moved by key and by mouse, every tick is
set by key, and in every drop-down the next entry is chosen.
Printed are the seconds from the last key, movement of the mouse or choice to the last picture of the move, by the
page's own clock.
With `--pictures FOLDER` the page is kept there as it looks then, in both themes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from explorers import ROOT, code, needed, showing
from playwright.sync_api import Error, Locator, Page, sync_playwright

sys.path.insert(0, str(ROOT / "tests"))

from chromium import CHROMIUM, FLAGS, by_mouse, jupyterlab, menu, picture_after  # noqa: E402
from processes import until  # noqa: E402

BUSY = "while True:\n    sum(range(10_000))"
DARK = "document.body.dataset.jpThemeLight = 'false'"


def shortened(lesson: Path) -> dict | None:
    """The notebook of one lesson, if it shows a picture with controls."""
    cells = code(lesson)
    shown = list(showing(cells))
    wanted = {source for i in shown for source in (*needed(cells, i), cells[i])}
    kept = [source for source in cells if source in wanted] + [BUSY]
    new = [
        {"cell_type": "code", "id": f"c{i}", "source": source, "metadata": {}, "outputs": [], "execution_count": None}
        for i, source in enumerate(kept)
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}}
    return {"cells": new, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5} if shown else None


def place(control: Locator) -> str | bool | None:
    """Where a slider or a tick stands."""
    ticked = control.get_attribute("type") == "checkbox"
    return control.is_checked() if ticked else control.get_attribute("aria-valuenow")


def press(page: Page, control: Locator) -> None:
    """The first key that moves it."""
    control.focus()
    before = place(control)
    for key in ("Space",) if isinstance(before, bool) else ("ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
        page.wait_for_timeout(30)
        if place(control) != before:
            return


def drag(page: Page, handle: Locator) -> None:
    """To the side where there is more room."""
    now, least, most = (float(handle.get_attribute(f"aria-value{which}")) for which in ("now", "min", "max"))
    by_mouse(page, handle, -120 if 2 * now > least + most else 120)


def choose(_: Page, control: Locator) -> None:
    """The next entry of a drop-down, after the last one the first."""
    count, now = control.evaluate("select => [select.options.length, select.selectedIndex]")
    control.select_option(index=(now + 1) % count)


MOVES = ((".noUi-handle", (press, drag)), ("input[type=checkbox]", (press,)), ("select", (choose,)))


def waits(page: Page, box: Locator) -> Iterator[tuple[str, float]]:
    """(which control, seconds) for each move in one picture's box that gives a new picture."""
    for kind, ways in MOVES:
        for i in range(box.locator(kind).count()):
            control = box.locator(kind).nth(i)
            for way in ways:
                try:
                    seconds = picture_after(page, box.locator("img"), partial(way, page, control))
                    yield f"{kind} {i + 1} {way.__name__}", seconds
                except Error:  # a move that changes no digit and no pixel
                    print(f"{kind} {i + 1} {way.__name__}: no new picture in 20 s", flush=True)
                page.wait_for_timeout(500)


def measure(page: Page, address: str, name: str, pictures: Path | None) -> list[float]:
    """Prints a line for each picture of the notebook."""
    page.goto(f"{address}/lab/tree/{name}.ipynb?reset")
    page.get_by_text("Python 3 (ipykernel) | Idle").first.wait_for()
    menu(page, "Run", "Run All Cells")
    boxes, running = page.locator(".minipeft-box"), page.locator(".jp-InputPrompt", has_text="[*]")
    until(lambda: running.count() == 1 and boxes.count(), f"all cells of {name} but the last", 300, pause=0.1)
    page.wait_for_timeout(1000)
    found = []
    for i in range(boxes.count()):
        boxes.nth(i).scroll_into_view_if_needed()
        each = list(waits(page, boxes.nth(i)))
        found += [seconds for _, seconds in each]
        said = ", ".join(f"{what} {seconds:.2f}" for what, seconds in each)
        if not each:
            continue
        print(f"{name[:2]}, picture {i + 1}: longest {max(seconds for _, seconds in each):.2f}; {said}", flush=True)
        if pictures is not None:
            page.screenshot(path=pictures / f"{name[:2]}-{i + 1}-light.png")
            page.evaluate(DARK)
            page.wait_for_timeout(200)
            page.screenshot(path=pictures / f"{name[:2]}-{i + 1}-dark.png")
            page.evaluate(DARK.replace("false", "true"))
    menu(page, "Kernel", "Shut Down Kernel")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lessons", nargs="*", help="only these, by their numbers, such as 00 or 10")
    parser.add_argument("--pictures", type=Path, help="a folder for what the pages look like")
    given = parser.parse_args()
    if CHROMIUM is None:
        parser.error("there is no Chromium; install it, with `apt install chromium` for example")
    if given.pictures is not None:
        given.pictures.mkdir(parents=True, exist_ok=True)
    found = []
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        home = Path(folder)
        for lesson in sorted((ROOT / "notebooks").glob("*.ipynb")):
            if (not given.lessons or lesson.stem[:2] in given.lessons) and (notebook := shortened(lesson)):
                (home / lesson.name).write_text(json.dumps(notebook), encoding="utf-8")
        names = sorted(path.stem for path in home.glob("*.ipynb"))
        with jupyterlab(home) as address:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            for name in names:
                page = browser.new_page(viewport={"width": 1300, "height": 1000})
                page.set_default_timeout(120_000)
                found += measure(page, address, name, given.pictures)
                page.close()
            browser.close()
    within = sum(seconds <= 0.3 for seconds in found)
    print(f"{len(found)} moves: median {statistics.median(found):.2f} s, longest {max(found):.2f}, {within} within 0.3")


if __name__ == "__main__":
    main()
