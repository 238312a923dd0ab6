"""What Sphinx reads; `make_book.py` copies it beside the prepared notebooks. A page needs no network."""

from docutils import nodes

project = html_title = "minipeft"
author = "the minipeft authors"
copyright = author
language = "en"

extensions = ["myst_nb", "sphinx.ext.mathjax", "sphinx.ext.githubpages"]
exclude_patterns = ["_static"]

nb_execution_mode = "off"  # the committed outputs are what is shown
nb_merge_streams = True
nb_ipywidgets_js = {}  # a static picture stays where a widget was
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3
mathjax_path = "mathjax/tex-mml-chtml.js"

html_theme = "sphinx_book_theme"
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_js_files = [("vega.js", {"defer": "defer"}), ("book.js", {"defer": "defer"})]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_show_search_summary = False  # summaries are fetched, which a page opened from a folder may not do
html_theme_options = {
    "home_page_in_toc": True,
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "use_repository_button": False,
    "navbar_persistent": [],
    "navbar_start": [],
    "navbar_center": [],
    "navbar_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_context = {"default_mode": "auto"}


def fold(app, doctree, docname) -> None:
    """“Going further” is folded as it is in JupyterLab, below the sentence that says what it holds."""
    for section in list(doctree.findall(nodes.section)):
        if section[0].astext() == "Going further":
            first = next(i for i, part in enumerate(section) if not isinstance(part, nodes.title | nodes.paragraph))
            start = '<details class="fold further"><summary>Show what goes further</summary>'
            section.insert(first, nodes.raw("", start, format="html"))
            section.append(nodes.raw("", "</details>", format="html"))


def setup(app) -> None:
    app.connect("doctree-resolved", fold)
