"""A learner's way through an exercise in JupyterLab: a wrong answer, a hint, the right answer, and where they stand."""

import time

from test_lab import idle_for, lab, page, pytestmark  # noqa: F401


def write(page, cell, code: str) -> None:  # noqa: F811
    cell.locator(".cm-content").click()
    page.keyboard.press("Control+a")
    page.keyboard.insert_text(code)
    page.keyboard.press("Control+Enter")


def run(page, cell) -> None:  # noqa: F811
    cell.locator(".cm-content").click()
    page.keyboard.press("Control+Enter")


ANSWER = "def lora_scale(alpha, rank, rank_stabilized=False):\n    return {}"


def test_wrong_hint_right_progress(lab, page, tmp_path, capsys):  # noqa: F811
    page.goto(f"{lab}/lab/tree/exercises/lora/lora.ipynb?reset")
    page.get_by_text("Python 3 (ipykernel) | Idle").first.wait_for()
    cells = page.locator(".jp-CodeCell")
    setup, answer = cells.filter(has_text="import minipeft as mp"), cells.filter(has_text="def lora_scale")
    check = cells.filter(has_text="check.lora_scale(lora_scale)")
    run(page, setup)
    idle_for(page, 1)
    run(page, answer)
    run(page, check)
    check.get_by_text("lora_scale: not attempted").wait_for()
    page.screenshot(path=tmp_path / "1_not_attempted.png")

    write(page, answer, ANSWER.format("alpha"))
    started = time.perf_counter()
    run(page, check)
    check.get_by_text("lora_scale: wrong").wait_for()
    seconds = time.perf_counter() - started
    assert "divide by the rank" in check.inner_text()
    page.screenshot(path=tmp_path / "2_wrong.png")

    page.keyboard.press("Escape")
    page.keyboard.press("b")  # a new cell below
    hint = page.locator(".jp-CodeCell.jp-mod-active")
    write(page, hint, 'check.hint("lora_scale", 2)')
    page.get_by_text("Hint 2 of 2 for lora_scale").first.wait_for()
    page.screenshot(path=tmp_path / "3_hint.png")

    write(page, answer, ANSWER.format("alpha / rank**(0.5 if rank_stabilized else 1)"))
    run(page, check)
    check.get_by_text("lora_scale: correct").wait_for()
    page.screenshot(path=tmp_path / "4_right.png")

    write(page, page.locator(".jp-CodeCell", has_text="check.hint"), "check.progress()")
    picture = page.locator(".jp-CodeCell", has_text="check.progress()").locator("img").first
    picture.wait_for()
    picture.scroll_into_view_if_needed()
    page.screenshot(path=tmp_path / "5_progress.png")
    with capsys.disabled():
        print(f"\nfrom the key to the verdict {seconds:.2f} s; pictures in {tmp_path}")
