"""The preference widget in JupyterLab: answered by mouse and by keyboard, taken back, and written to its file."""

from test_lab import idle_for, lab, page, pytestmark  # noqa: F401

from minipeft.learn.reward import read_pairs

CODE = """from minipeft.explore import Preferences
drafts = [("on sunday , tom", f"sang {{i}} .", f"wept {{i}} .") for i in range(3)]
asked = Preferences(drafts, repeats=1, path={path!r})
asked"""


def test_pairs_are_answered_by_mouse_and_keyboard(lab, page, tmp_path):  # noqa: F811
    file = tmp_path / "pairs.jsonl"
    page.goto(f"{lab}/lab/tree/exercises/feedback/feedback.ipynb?reset")
    page.get_by_text("Python 3 (ipykernel) | Idle").first.wait_for()
    number = [
        i for i, text in enumerate(page.locator(".jp-CodeCell").all_inner_texts()) if "def preference_loss" in text
    ]
    cell = page.locator(".jp-CodeCell").nth(number[0])  # a cell that may be written in
    cell.locator(".cm-content").click()
    page.keyboard.press("Control+a")
    page.keyboard.insert_text(CODE.format(path=str(file)))
    page.keyboard.press("Control+Enter")
    said = cell.get_by_text("pairs answered")
    said.wait_for(timeout=60_000)
    idle_for(page, 1)
    assert "On Sunday, Tom …" in cell.inner_text() and "0 of 4 pairs answered" in said.inner_text()

    cell.get_by_role("button", name="1 · the first").click()  # the mouse
    cell.get_by_text("1 of 4 pairs answered").wait_for()
    assert "wept 1" in cell.inner_text()

    cell.get_by_role("button", name="2 · the second").focus()  # the keyboard, on a button
    page.keyboard.press("Space")
    cell.get_by_text("2 of 4 pairs answered").wait_for()
    field = cell.locator("input[type=text]")
    field.focus()  # and in the field
    page.keyboard.press("End")
    page.keyboard.type("0")
    cell.get_by_text("3 of 4 pairs answered").wait_for()
    assert [pair.better for pair in read_pairs(file)] == ["first", "second", "tie"]

    page.keyboard.press("Backspace")
    cell.get_by_text("2 of 4 pairs answered").wait_for()
    cell.get_by_role("button", name="undo").click()
    cell.get_by_text("1 of 4 pairs answered").wait_for()
    field.focus()
    page.keyboard.press("End")
    page.keyboard.type("211", delay=50)
    cell.get_by_text("That was the last pair").wait_for()
    assert field.input_value() == "1211" and len(read_pairs(file)) == 4
    assert "You agree with yourself in" in cell.inner_text()
    assert cell.get_by_role("button", name="1 · the first").is_disabled()
    page.screenshot(path=tmp_path / "answered.png")
