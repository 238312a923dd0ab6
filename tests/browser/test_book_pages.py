"""The built book in a real Chromium, on a phone and on a desk: sliders, folds, search, theme, no network, no dead link.

Skipped, with the reason, where Sphinx or Chromium is missing. The book is built once.
"""

import importlib.util
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from chromium import CHROMIUM, FLAGS
from processes import ended

ROOT = Path(__file__).parents[2]
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(importlib.util.find_spec("myst_nb") is None, reason="Sphinx is not installed: make book"),
]
chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("book") / "a folder with spaces"
    command = [sys.executable, str(ROOT / "book" / "make_book.py"), "--out", str(out)]
    status, said = ended(command, 1800)
    assert status == 0, said
    assert [path.name for path in out.parent.iterdir()] == [out.name], "nothing else is left"
    assert f"open {out / 'index.html'} in a browser" in said and "To publish it" in said
    return out


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def read(browser, site):
    """read(page, size, theme): the page of the book, opened from its folder; nothing may come from elsewhere."""
    opened, wrong = [], []

    def read(name: str, size: dict, theme: str = "light"):
        context = browser.new_context(viewport=size, color_scheme=theme)
        opened.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: wrong.append(request.url) if request.url.startswith("http") else None)
        page.goto((site / name).as_uri())
        page.wait_for_load_state("load")
        return page

    yield read
    for context in opened:
        context.close()
    assert not wrong


class Page(HTMLParser):
    """The ids and the links of a page, and its pictures."""

    def __init__(self, text: str):
        super().__init__()
        self.ids, self.links, self.pictures, self.text = set(), [], [], text
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids |= {given[name] for name in ("id", "name") if given.get(name)}
        self.links += [given[name] for name in ("href", "src") if given.get(name)]
        if tag == "img":
            self.pictures.append(given)


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    return {
        path: Page(path.read_text(encoding="utf-8"))
        for path in sorted(site.rglob("*.html"))
        if "_static" not in path.parts
    }


def test_every_notebook_is_a_page_and_the_whole_is_small(site, pages):
    notebooks = [*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("exercises/*/*.ipynb")]
    assert {site / path.relative_to(ROOT).with_suffix(".html") for path in notebooks} <= pages.keys()
    assert (site / ".nojekyll").exists(), "or GitHub Pages leaves out folders like _static"
    assert sum(file.stat().st_size for file in site.rglob("*") if file.is_file()) < 30e6


def test_every_link_leads_somewhere(site, pages):
    for path, page in pages.items():
        for link in page.links:
            target, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", link):
                assert link.startswith(("http://localhost:8888/lab/tree/my/", "https:", "data:")), link
                if "/lab/tree/my/" in link:
                    assert (ROOT / link.partition("/lab/tree/my/")[2]).exists(), link
                continue
            file = (path.parent / unquote(target.partition("?")[0])).resolve() if target else path
            assert file.exists(), f"{path.name} links to {link}"
            if anchor and file in pages and path.name != "search.html":
                assert unquote(anchor) in pages[file].ids, f"{path.name} links to {link}"


def test_every_picture_has_words(pages):
    pictures = [given for page in pages.values() for given in page.pictures]
    assert len(pictures) > 40
    assert all(given.get("alt") for given in pictures)
    assert not any(re.search(r"\.png$", given["alt"]) for given in pictures)


def test_nothing_of_this_machine_is_in_it(site):
    for file in site.rglob("*"):
        if file.suffix in (".html", ".js", ".json", ".inv", ".txt"):
            assert str(ROOT) not in file.read_text(encoding="utf-8", errors="ignore"), file.name


def points(chart) -> list[str]:
    """Where the chart's points stand."""
    return chart.locator(".picture svg .mark-symbol path").evaluate_all(
        "all => all.map(p => p.getAttribute('transform'))"
    )


@chromium
@pytest.mark.parametrize(("size", "theme"), [(PHONE, "dark"), (DESK, "light")], ids=["phone", "desk"])
def test_a_slider_moves_by_key_and_by_mouse(read, size, theme):
    page = read("sliders.html", size, theme)
    chart = page.locator("#slider-rank")
    given = json.loads(chart.locator("script").text_content())
    slider, said = chart.get_by_label("rank of LoRA"), chart.locator(".says")
    slider.wait_for()
    assert said.text_content() == given["says"]["pirate|8"]
    assert slider.get_attribute("aria-valuetext") == "rank of LoRA 8"
    before = points(chart)

    slider.focus()
    page.keyboard.press("ArrowRight")
    assert said.text_content() == given["says"]["pirate|16"]
    assert slider.get_attribute("aria-valuetext") == "rank of LoRA 16" and chart.locator("output").inner_text() == "16"
    page.wait_for_timeout(200)
    after = points(chart)
    assert after != before and len(after) == len(before)

    box = slider.bounding_box()
    page.mouse.click(box["x"] + 3, box["y"] + box["height"] / 2)
    assert said.text_content() == given["says"]["pirate|1"]
    chart.get_by_label("task").select_option("flip")
    assert said.text_content() == given["says"]["flip|1"]

    svg, room = (chart.locator(where).bounding_box()["width"] for where in (".picture svg", ".picture"))
    assert abs(svg - room) <= 1
    page.set_viewport_size({"width": 1000, "height": 800})
    page.wait_for_timeout(300)
    svg, room = (chart.locator(where).bounding_box()["width"] for where in (".picture svg", ".picture"))
    assert abs(svg - room) <= 1, "a chart has the width of its frame"


# Moves a slider through all of its positions: what the chart says at each.
EVERY_POSITION = """slider => Array.from({length: +slider.max + 1}, (_, i) => {
    slider.value = i;
    slider.dispatchEvent(new Event("input"));
    return slider.closest("figure").querySelector(".says").textContent;
})"""


@chromium
def test_every_slider_starts_and_has_a_sentence_everywhere(read):
    page = read("sliders.html", DESK)
    for chart in page.locator("figure.chart").all():
        chart.scroll_into_view_if_needed()
        given = json.loads(chart.locator("script").text_content())
        slider = chart.locator("input")
        slider.wait_for()
        heard = slider.evaluate(EVERY_POSITION)
        assert len(set(heard)) == len(given["controls"][-1]["values"]) and set(heard) <= set(given["says"].values())


@chromium
def test_an_answer_is_folded_until_it_is_opened_and_the_slider_in_it_starts_then(read):
    page = read("notebooks/00_start_here.html", PHONE)
    fold = page.locator("details.fold").first
    assert fold.locator(".picture").is_hidden()
    answer = page.locator(".cell.tag_hide-output details").first
    assert answer.locator("img").first.is_hidden()
    answer.locator("summary").click()
    assert answer.locator("img").first.is_visible()
    fold.locator("summary").first.click()
    fold.get_by_label("rank of LoRA").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"], "nothing sticks out of a phone"
    page.get_by_role("link", name=re.compile("01 · ")).last.click()
    assert page.title().startswith("01 · ")


@chromium
def test_going_further_is_folded_and_a_link_or_a_search_opens_it(read):
    lesson, inside = "notebooks/09_quantisation.html", "Nearest is best if you store a weight once."
    page = read(lesson, DESK)
    fold, after = page.locator("details.further"), page.locator("#remember")
    assert fold.get_by_text(inside).is_hidden() and after.is_visible()
    assert page.locator("#going-further > p").is_visible(), "what it holds is said above the fold"
    page.get_by_role("link", name="Round to nearest, or at random?").click()
    fold.get_by_text(inside).wait_for()
    page = read(lesson, PHONE)
    page.goto(f"{page.url}#ever-smaller-changes")
    page.locator("#ever-smaller-changes").wait_for()
    page = read("search.html", DESK)
    page.goto(f"{page.url}?q=thesaurus")
    page.locator("#search-results a", has_text="11 · Distillation").first.click()
    page.locator("details.further[open]", has_text="thesaurus").wait_for()


@chromium
def test_search_finds_a_lesson_and_the_theme_is_kept(read):
    page = read("index.html", DESK)
    page.locator("button.theme-switch-button:visible").first.click()
    page.locator("button.theme-change-button:visible", has_text="Dark").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.keyboard.press("Control+k")
    page.keyboard.type("Bradley")
    page.keyboard.press("Enter")
    page.wait_for_url("**/search.html*")
    hit = page.locator("#search-results a", has_text="13 · What LoRA is not").first
    hit.wait_for()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    hit.click()
    page.wait_for_url("**/13_feedback.html*")


@chromium
@pytest.mark.parametrize(("name", "size", "theme"), [
    ("sliders.html", PHONE, "dark"), ("sliders.html", DESK, "light"), ("notebooks/00_start_here.html", PHONE, "dark"),
])  # fmt: skip
def test_axe_finds_no_serious_fault(read, name, size, theme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page = read(name, size, theme)
    if name == "sliders.html":
        page.get_by_label("rank of LoRA").wait_for()
    page.wait_for_timeout(500)
    found = axe.Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
    serious = [
        (fault["id"], node["html"][:200], node.get("failureSummary", "")[:300])
        for fault in found
        if fault["impact"] in ("serious", "critical")
        for node in fault["nodes"][:3]
    ]
    assert not serious
