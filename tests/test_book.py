"""The book without Sphinx: sliders say what was measured; a prepared notebook hides, names and links what it should."""

import importlib.util
import itertools
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest

import minipeft as mp
from minipeft.course import atlas, grid

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "book"))

import charts  # noqa: E402
import make_book  # noqa: E402
import pictures  # noqa: E402

CHARTS = {chart.name: chart for chart in charts.charts()}
LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAKES = {
    "rank": lambda n: mp.LoRA(rank=n, gamma=2.0),
    "bottleneck": mp.Adapter,
    "prompt": mp.PromptTuning,
    "prefix": mp.PrefixTuning,
}


@pytest.mark.parametrize("chart", CHARTS.values(), ids=CHARTS)
def test_each_position_of_the_controls_has_one_sentence_and_one_parameter(chart):
    positions = itertools.product(*(control.values for control in chart.controls))
    assert {pictures.key(*position) for position in positions} == chart.says.keys()
    assert chart.start in chart.says
    assert [each["name"] for each in chart.spec["params"]] == [control.name for control in chart.controls]
    assert all(control.values == sorted(control.values) for control in chart.controls if control.kind == "slider")
    used = json.dumps(chart.spec["layer"])
    assert all(re.search(rf"\b{control.name}\b", used) for control in chart.controls), "a control moves something"
    assert chart.alt and chart.title and re.search(r"\d{4}-\d\d-\d\d", chart.source)


@pytest.mark.parametrize("name", MAKES)
def test_the_sliders_over_a_size_say_what_the_atlas_says(name):
    runs, chart = atlas.load(), CHARTS[name]
    full = {task: atlas.best(runs, task, mp.Full()) for task in chart.controls[0].values}
    missing = 0
    for task, size in itertools.product(*(control.values for control in chart.controls)):
        said = chart.says[pictures.key(task, size)]
        try:
            best, numbers = (f(runs, task, MAKES[name](size)) for f in (atlas.best, atlas.of))
        except ValueError:
            missing += 1
            assert said.startswith("The atlas holds no run"), said
            continue
        assert f"{numbers.trainable.iloc[0]:,} trained numbers" in said
        for each in (best, full[task]):
            figures = (
                f"{each['mean']:.2f} at the rate {each['lr']:g} ({each['min']:.2f} to {each['max']:.2f} over the seeds)"
            )
            assert figures in said
        rows = [row for row in chart.spec["data"]["values"] if (row["task"], row["size"]) == (task, size)]
        curve = atlas.curve(runs, task, MAKES[name](size))
        assert [row["lr"] for row in rows] == list(curve.index)
        for row, (_, means) in zip(rows, curve.iterrows(), strict=True):
            assert [row[k] for k in ("mean", "low", "high")] == pytest.approx(
                list(means[["mean", "min", "max"]]), abs=1e-4
            )
    assert missing < len(chart.says) / 4


def test_the_picture_of_gamma_says_what_the_atlas_says():
    runs, chart = atlas.load(), CHARTS["gamma"]
    for rank in chart.controls[0].values:
        rates, means, said = {}, [], chart.says[str(rank)]
        for row in chart.spec["data"]["values"]:
            if row["rank"] == rank and row["series"] == "at its own best rate":
                method = mp.LoRA(rank=rank, gamma=row["gamma"])
                rates[row["gamma"]] = rate = atlas.chosen(runs, "pirate", method)[0]
                every, reported = atlas.all_of(runs, "pirate", method), atlas.of(runs, "pirate", method)
                found = reported if (reported.lr == rate).any() else every
                means.append(found[found.lr == rate].loss.mean())
                assert row["mean"] == pytest.approx(means[-1], abs=1e-4)
        assert set(rates) == set(grid.GAMMAS["pirate"][rank])
        assert f"from {min(means):.2f} to {max(means):.2f} at its own best rate" in said
        assert said.endswith(": " + ", ".join(f"{rates[gamma]:g}" for gamma in sorted(rates)) + ".")


def test_the_best_rate_is_the_one_that_was_chosen_elsewhere():
    rows = [
        {"task": "t", "size": 1, "lr": lr, "mean": loss, "low": loss, "high": loss} for lr, loss in ((1, 2), (2, 1))
    ]
    assert charts.best(rows, "t", 1, 1) == "loss 2.00 at the rate 1 (2.00 to 2.00 over the seeds)"


def test_the_other_sliders_say_what_their_files_hold():
    family, teaching, feedback, worlds, serving = (
        charts.read(name) for name in ("family", "teaching", "feedback", "worlds", "serving")
    )
    for budget, run in family["budgets"].items():
        for step, kept in zip(run["steps"], run["ranks"], strict=True):
            said = CHARTS["ranks"].says[f"{budget}|{step}"]
            assert f"{sum(kept)} directions" in said or (len(set(kept)) == 1 and f"has {kept[0]} directions" in said)
            shown = [r["rank"] for r in CHARTS["ranks"].spec["data"]["values"]
                     if (r["budget"], r["step"]) == (int(budget), step)]  # fmt: skip
            assert shown == kept
    for method, found in family["sweeps"].items():
        first = {run["lr"]: run["loss"] for run in found if run["seed"] == 0}
        shown = {r["lr"]: r["loss"] for r in CHARTS["rates"].spec["data"]["values"] if r["method"] == method}
        assert shown == pytest.approx({lr: loss for lr, loss in first.items() if loss is not None}, abs=1e-4)
    for side, found in teaching["sides"].items():
        at = [run["old"][run["steps"].index(30)] for run in found["runs"] if 30 in run["steps"]]
        assert (
            f"{side}, " in CHARTS["forgetting"].says["30"]
            and f" and {sum(at) / len(at):.2f}" in CHARTS["forgetting"].says["30"]
        )
    hacked = [run for run in feedback["hacking"]["runs"] if run["setting"] == "30 pairs"]
    for step, text in enumerate(next(run["stories"] for run in hacked if "stories" in run)):
        assert f"“{text}”" in CHARTS["story"].says[str(step)]
    for series, column in (("ends happily", 1), ("can be read", 3), ("both: what was wanted", 2)):
        (shown,) = (r["mean"] for r in CHARTS["story"].spec["data"]["values"] if (r["x"], r["series"]) == (9, series))
        assert shown == pytest.approx(sum(run["trace"][9][column] for run in hacked) / len(hacked), abs=1e-4)
    losses = [run["losses"][20] for run in worlds["drift"]["runs"] if run["way"] == "replay"]
    assert (
        f"replay {sum(losses) / len(losses):.2f} ({min(losses):.2f} to {max(losses):.2f})" in CHARTS["drift"].says["21"]
    )
    for point in serving["points"]:
        assert f"{point['bank, bytes'] / 2**20:.1f} MiB" in CHARTS["serving"].says[str(point["adapters"])]


# -- notebooks


def text(source: str):
    return nbformat.v4.new_markdown_cell(source)


def code(source: str, *outputs):
    made = [nbformat.v4.new_output("display_data", data=data) for data in outputs]
    return nbformat.v4.new_code_cell(source, outputs=made)


PRINTED, PICTURE = {"text/plain": "42"}, {"image/png": "iVBORw0KGgo=", "text/plain": "<Figure size 10x10 with 1 Axes>"}


@pytest.fixture
def course(tmp_path):
    """A course of one lesson: course(cell, …) writes it and gives its prepared copy."""

    def prepare(*cells, charts=()):
        path = tmp_path / "notebooks" / "01_one.ipynb"
        path.parent.mkdir(exist_ok=True)
        nbformat.write(nbformat.v4.new_notebook(cells=[text("# 01 · One\n\nWhy?"), *cells]), path)
        before = path.read_bytes()
        drawn = {chart.name: "<svg></svg>" for chart in charts}
        copy = make_book.prepared(path, list(charts), drawn, tmp_path)
        assert path.read_bytes() == before, "the notebook itself stays as it is"
        return copy.cells

    return prepare


def folded(cells) -> list[str]:
    return [cell.source for cell in cells if "hide-output" in cell.metadata.get("tags", [])]


def test_outputs_are_folded_from_a_prediction_to_the_next_heading(course):
    cells = course(
        code("before", PRINTED),
        code("mp.Predict(…)", PRINTED),
        code("silent"),
        code("answer", PRINTED),
        text("Look.\n\n```python\n# a comment is no heading\n```"),
        code("picture", PICTURE),
        text("## Next"),
        code("after", PICTURE),
    )
    assert folded(cells) == ["answer", "picture"]
    assert [cell.source for cell in cells if "hide-input" in cell.metadata.get("tags", [])] == ["mp.Predict(…)"]


def test_an_answer_that_stands_in_a_later_section_is_folded_too(course):
    cells = course(
        code("mp.Predict(…)", PRINTED),
        text("## The mechanism"),
        code("source", PRINTED),
        text("## The measurement"),
        code("answer", PICTURE),
        text("## Where it breaks"),
        code("after", PICTURE),
    )
    assert folded(cells) == ["source", "answer"]


def test_a_picture_is_described_by_what_its_code_writes_on_it(course):
    plotted = 'axes.set(xlabel="rate", ylabel=name)\naxes.set_title("A U")\naxes.set_title(f"{n}")'
    widget = PICTURE | {"text/plain": "rank = 8 · γ = 2"}
    cells = course(
        text("## 1 · The *curves*"), code(plotted, PICTURE), code("%time explorer", widget), code("x", PICTURE)
    )
    alts = [cell.metadata["mystnb"]["image"]["alt"] for cell in cells if "mystnb" in cell.metadata]
    assert alts == [
        "Picture in “1 · The curves”: A U; axis rate",
        "Picture in “1 · The curves”: with rank = 8 · γ = 2",
        "Picture in “1 · The curves”",
    ]


def test_links_that_leave_the_book_name_the_file_and_wrong_ones_stop_the_build(course, tmp_path):
    (tmp_path / "README.md").write_text("")
    cells = course(
        text("[the map](../README.md), [itself](01_one.ipynb#why), [out](https://example.org), [here](#why)")
    )
    assert cells[1].source == (
        "the map (`README.md` in the course's folder), [itself](01_one.ipynb#why), [out](https://example.org),"
        " [here](#why)"
    )
    source = "`f[0](x)` and [`f`](../README.md)\n\n```python\n[f][0](x)\n```"
    assert course(text(source))[1].source == source.replace(
        "[`f`](../README.md)", "`f` (`README.md` in the course's folder)"
    )
    with pytest.raises(ValueError, match="01_one.ipynb links to 02_two.ipynb, and no such file"):
        course(text("[two](02_two.ipynb)"))


def test_a_page_says_where_it_can_be_run(course):
    assert course()[0].source == (
        '# 01 · One\n\n<p class="open"><a href="http://localhost:8888/lab/tree/my/notebooks/01_one.ipynb">'
        "Open this page in JupyterLab</a></p>\n\nWhy?"
    )


def chart(says: str) -> pictures.Chart:
    control = pictures.Control("n", "number", [1], 1)
    return pictures.Chart("one", {"01_one": "Explorer("}, "T", "a", "s", [control], {"1": says}, {"params": []})


def test_a_chart_stands_below_its_cell_folded_where_the_answer_is(course):
    open_one = course(code("mp.Explorer(model)", PICTURE), text("after"), charts=[chart("so")])
    assert open_one[2].source.startswith("```{raw} html\n<figure")
    hidden = course(code("mp.Predict(…)", PRINTED), code("mp.Explorer(model)", PICTURE), charts=[chart("so")])
    assert hidden[3].source.startswith('```{raw} html\n<details class="fold">')
    with pytest.raises(ValueError, match="01_one.ipynb has no code with 'Explorer\\(', where 'one' stands"):
        course(text("nothing"), charts=[chart("so")])


def test_what_a_chart_says_cannot_end_its_script():
    class Scripts(HTMLParser):
        found, inside = "", False

        def handle_starttag(self, tag, attrs):
            self.inside = tag == "script"

        def handle_endtag(self, tag):
            self.inside = False

        def handle_data(self, data):
            self.found += data if self.inside else ""

    page = Scripts()
    page.feed(make_book.figure(chart('</script><b>"'), "<svg></svg>"))
    assert json.loads(page.found)["says"] == {"1": '</script><b>"'}


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_every_lesson_can_be_prepared_and_every_picture_has_words(lesson):
    mine = [chart for chart in CHARTS.values() if lesson.stem in chart.places]
    cells = make_book.prepared(lesson, mine, dict.fromkeys(CHARTS, "")).cells
    for cell in cells:
        if cell.cell_type == "code" and any("image/png" in output.get("data", {}) for output in cell.outputs):
            assert len(cell.metadata["mystnb"]["image"]["alt"]) > len("Picture in “”")
    predictions = [cell for cell in cells if "hide-input" in cell.metadata.get("tags", [])]
    assert not predictions or folded(cells), "a prediction hides something"


def test_charts_are_those_of_lessons_that_exist():
    assert {lesson for chart in CHARTS.values() for lesson in chart.places} <= {path.stem for path in LESSONS}


def test_a_folder_that_is_no_book_is_left_alone(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sphinx", reason="Sphinx is not installed: make book")
    (tmp_path / "thesis.tex").write_text("years of work")
    monkeypatch.setattr(sys, "argv", ["make_book.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="is no book, so it is left alone"):
        make_book.main()
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize("status", [0, 1])
def test_a_book_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch, status):
    sphinx = pytest.importorskip("sphinx.cmd.build", reason="Sphinx is not installed: make book")
    out = tmp_path / "book"
    out.mkdir()
    (out / "searchindex.js").write_text("old")
    monkeypatch.setattr(make_book, "write_source", lambda folder: None)

    def builds(arguments):
        Path(arguments[-1]).mkdir()
        Path(arguments[-1], "searchindex.js").write_text("new")
        return status

    monkeypatch.setattr(sphinx, "build_main", builds)
    assert make_book.build(out) == status
    assert (out / "searchindex.js").read_text() == ("old" if status else "new")
    assert list(tmp_path.iterdir()) == [out]


def test_a_missing_package_is_one_sentence(tmp_path, monkeypatch):
    def gone(out):
        raise ModuleNotFoundError("No module named 'sphinx'", name="sphinx")

    monkeypatch.setattr(make_book, "build", gone)
    monkeypatch.setattr(sys, "argv", ["make_book.py", "--out", str(tmp_path / "book")])
    with pytest.raises(SystemExit, match="^book: the package sphinx is missing; `make book` installs"):
        make_book.main()


def test_the_book_imports_of_the_package_only_what_reads_the_atlas():
    found = {
        (file.stem, name)
        for file in (ROOT / "book").glob("*.py")
        for name in re.findall(r"^\s*(?:import|from) (minipeft.*)", file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    reads = {
        "minipeft.course import atlas",
        "minipeft.learn.sweep import method_of",
    }
    assert found == {("charts", name) for name in reads}


@pytest.mark.skipif(
    importlib.util.find_spec("vl_convert") is None, reason="vl-convert-python is not installed: make book"
)
@pytest.mark.parametrize("chart", CHARTS.values(), ids=CHARTS)
def test_vega_lite_draws_every_chart_in_the_colours_of_the_page(chart):
    drawn = make_book.drawn(chart)
    assert drawn.startswith("<svg") and "currentColor" in drawn and "<path" in drawn
    assert not re.search(r'="clip\d|#clip\d', drawn), "two pictures of one page share no ids"
