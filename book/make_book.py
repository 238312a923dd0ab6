"""Build the book, a static site, from the committed notebooks: `python book/make_book.py [--out build/book]`.

The notebooks stay as they are. Their copies get folds after predictions, alternative texts, a link to JupyterLab, and
below a slider that needs a kernel the same question over measured runs (`charts.py`). Sphinx stops at any warning, and
so at a wrong link.
"""

from __future__ import annotations

import argparse
import ast
import html
import json
import os
import re
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import nbformat
from charts import charts
from fold import FENCE, answers, asks, headings
from pictures import Chart

BOOK = Path(__file__).parent
ROOT = BOOK.parent
LAB = "http://localhost:8888/lab/tree/my"  # where `make lab` answers, with the learner's own copy
# A link, or code, in which nothing is one.
LINK = re.compile(FENCE.pattern + r"|`[^`\n]+`|\[([^\]]+)\]\(([^)\s]+)\)", FENCE.flags)
TITLES, AXES = {"set_title", "suptitle", "title"}, {"set_xlabel", "set_ylabel", "xlabel", "ylabel"}


def prepared(path: Path, mine: list[Chart], pictures: dict[str, str], root: Path = ROOT):
    """The copy of a notebook that goes into the book, with its charts.

    Raises ValueError where a chart has lost its place, or a link leads to no file of the course.
    """
    notebook = nbformat.read(path, as_version=4)
    cells, heading, waiting = [], path.stem, list(mine)
    folded = {id(cell) for cells in answers(notebook.cells) for cell in cells}
    for cell in notebook.cells:
        cells.append(cell)
        if cell.cell_type == "markdown":
            heading = (headings(cell) or [heading])[-1]
            cell.source = linked(cell.source, path, root)
        elif cell.cell_type == "code":
            tags = cell.metadata.setdefault("tags", [])
            tags += ["hide-output"] * (id(cell) in folded) + ["hide-input"] * asks(cell)
            if any("image/png" in output.get("data", {}) for output in cell.outputs):
                cell.metadata["mystnb"] = {"image": {"alt": alternative(cell, heading)}}
            for chart in [chart for chart in waiting if chart.places[path.stem] in cell.source]:
                waiting.remove(chart)
                cells.append(
                    nbformat.v4.new_markdown_cell(raw(figure(chart, pictures[chart.name], id(cell) in folded)))
                )
    for chart in waiting:
        raise ValueError(f"{path.name} has no code with {chart.places[path.stem]!r}, where {chart.name!r} stands.")
    notebook.cells = cells
    opened(cells[0], path.relative_to(root))
    return notebook


def linked(source: str, path: Path, root: Path) -> str:
    """Markdown whose links to files that are not in the book name the file instead."""

    def replace(match: re.Match) -> str:
        text, target = match.groups()
        if target is None or re.match(r"[a-z]+:|#", target):
            return match.group()
        file = Path(os.path.normpath(path.parent / target.split("#")[0]))
        if not file.exists() or not file.is_relative_to(root):
            raise ValueError(f"{path.name} links to {target}, and no such file is in the course.")
        name = file.relative_to(root)
        inside = name.suffix == ".ipynb" and name.parts[0] in ("notebooks", "exercises")
        return match.group() if inside else f"{text} (`{name.as_posix()}` in the course's folder)"

    return LINK.sub(replace, source)


def opened(cell, name: Path) -> None:
    """Below the title: a link that opens the page where its code runs."""
    title, _, rest = cell.source.partition("\n")
    link = f'<p class="open"><a href="{LAB}/{name.as_posix()}">Open this page in JupyterLab</a></p>'
    cell.source = f"{title}\n\n{link}\n{rest}"


def alternative(cell, heading: str) -> str:
    """What a picture shows, for who cannot see it: the texts that its code writes on it, or the widget's own line."""
    titles, axes = [], []
    for call in (node for node in ast.walk(parsed(cell.source)) if isinstance(node, ast.Call)):
        name = getattr(call.func, "attr", "")
        given = [(name, value) for value in call.args[:1]] + [(k.arg, k.value) for k in call.keywords if name == "set"]
        for what, value in given:
            if isinstance(value, ast.Constant) and isinstance(value.value, str) and what in TITLES | AXES:
                (titles if what in TITLES else axes).append(value.value)
    said = titles + [f"axis {name}" for name in axes]
    plain = next(output.data.get("text/plain", "<") for output in cell.outputs if "image/png" in output.get("data", {}))
    if not plain.startswith("<"):  # as in <Figure size 640x480 with 1 Axes>
        said.append(f"with {plain}")
    return f"Picture in “{re.sub('[*`$]', '', heading)}”" + (f": {'; '.join(dict.fromkeys(said))}" if said else "")


def parsed(source: str) -> ast.AST:
    try:
        return ast.parse(source)
    except SyntaxError:  # a magic command
        return ast.Module([], [])


def figure(chart: Chart, picture: str, folded: bool = False) -> str:
    """A chart as HTML: a picture, a sentence and a table without JavaScript, controls and a live picture with it."""
    given = {"spec": chart.spec, "controls": [vars(control) for control in chart.controls], "says": chart.says}
    data = json.dumps(given, ensure_ascii=False).replace("</", "<\\/")
    rows = "".join(f"<li>{html.escape(said)}</li>" for said in chart.says.values())
    body = (
        f'<figure class="chart" id="slider-{chart.name}"><p class="title">{html.escape(chart.title)}</p>'
        f'<script type="application/json">{data}</script><div class="controls"></div>'
        f'<div class="picture" role="img" aria-label="{html.escape(chart.alt)}">{picture}</div>'
        f'<p class="says" role="status">{html.escape(chart.says[chart.start])}</p>'
        f"<figcaption>{html.escape(chart.source)}</figcaption>"
        f"<details><summary>Every position in words</summary><ul>{rows}</ul></details></figure>"
    )
    return f'<details class="fold"><summary>Show the measured slider</summary>{body}</details>' if folded else body


def raw(text: str) -> str:
    return f"```{{raw}} html\n{text}\n```"


def drawn(chart: Chart) -> str:
    """The chart at its first position as SVG, in the colours of the page."""
    import vl_convert

    svg = vl_convert.vegalite_to_svg(json.dumps(chart.spec))
    return re.sub(r"\bclip(\d+)\b", rf"{chart.name}-clip\1", svg)


def write_source(folder: Path) -> None:
    """Everything that Sphinx reads."""
    import vl_convert

    shutil.copytree(BOOK / "_static", folder / "_static")
    shutil.copy(BOOK / "conf.py", folder)
    shutil.copy(BOOK / "index.md", folder)
    every = charts()
    pictures = {chart.name: drawn(chart) for chart in every}
    sliders = [(BOOK / "sliders.md").read_text(encoding="utf-8")]
    for chart in every:
        lessons = " and ".join(f"[lesson {lesson[:2]}](notebooks/{lesson}.ipynb)" for lesson in chart.places)
        heading = f"## {max(chart.places)[:2]} · {chart.controls[-1].label}\n\nIt belongs to {lessons}."
        sliders += [heading, raw(figure(chart, pictures[chart.name]))]
    (folder / "sliders.md").write_text("\n\n".join(sliders) + "\n", encoding="utf-8")
    for path in [*sorted(ROOT.glob("notebooks/*.ipynb")), *sorted(ROOT.glob("exercises/*/*.ipynb"))]:
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        mine = [chart for chart in every if path.stem in chart.places]
        nbformat.write(prepared(path, mine, pictures), target)
    (folder / "_static" / "vega.js").write_text(f"(() => {{{vl_convert.javascript_bundle()}}})();", encoding="utf-8")
    for file in metadata.files("sphinx-mathjax-offline"):
        name = file.as_posix().partition("static/mathjax/")[2]
        if name == "tex-mml-chtml.js" or name.startswith("output/chtml/fonts/"):
            target = folder / "_static" / "mathjax" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file.locate(), target)


def build(out: Path) -> int:
    """Write the site into `out`, whole or not at all; returns Sphinx's exit status.

    Raises ValueError where `out` holds something else than a book.
    """
    from sphinx.cmd.build import build_main

    if out.exists() and not (out / "searchindex.js").exists():
        raise ValueError(f"{out} is there and is no book, so it is left alone; name another folder with --out.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        source, site = Path(folder, "source"), Path(folder, "site")
        source.mkdir()
        write_source(source)
        status = build_main(["-W", "-n", "-q", "--keep-going", "-d", f"{folder}/doctrees", str(source), str(site)])
        if status == 0:
            shutil.rmtree(out, ignore_errors=True)
            site.rename(out)
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "book", help="the folder of the site")
    out = parser.parse_args().out.absolute()
    try:
        status = build(out)
    except ModuleNotFoundError as error:
        sys.exit(f"book: the package {error.name} is missing; `make book` installs what the book needs.")
    except ValueError as error:
        sys.exit(f"book: {error}")
    if status:
        sys.exit("book: Sphinx found what is listed above, so no book was written.")
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) / 1e6
    print(f"The book is in {out} ({size:.0f} MB): open {out / 'index.html'} in a browser.")
    print("To publish it, copy the folder to a web server or to GitHub Pages; it needs nothing else.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
