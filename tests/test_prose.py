"""Figures in the lessons' sentences: a cell near them prints or writes each, or it is a constant that is named here."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat.v4 as new
import pytest

LESSONS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
BELOW = 3  # code cells after a sentence that may hold its figure: those that it announces

# What no cell of the lesson computes, and where it comes from.
EVERYWHERE = {"95": "per cent, the width of all intervals"}
CITED = {
    "00_start_here": {"0.125": "a position of the slider", "2.16": "e^0.77, a loss as a perplexity"},
    "01_why_peft": {
        "11.7": "million, the claim about ResNet-18, counted in the ledger (C06)",
        "1.5": "3/2, the law 2/3 + 2r/N at the least rank",
        "0.05": "nats, the smallest effect that matters, in the ledger's rule (C22)",
        "0.03": "a rate to try",
    },
    "07_rank_and_svd": {"21.6": "Hu et al. 2021, §7.3", "1.88": "Hu et al. 2021, §7.3"},
    "08_lora_family": {"0.02": "nats, the smallest effect that matters, in the ledger's rule (C27)"},
    "09_quantisation": {"0.37": "Dettmers et al. 2023, §3"},
    "11_distillation": {"2,000": "rows of the task"},
    "12_serving": {"2,000": "rows of the task"},
    "13_feedback": {"3.7": "a mark that nobody can give", "0.001": "a rate that was set beforehand"},
    "15_beyond_text": {
        "5,000": "pictures in the package of MNIST", "4,300": "of them to train on",
        "12.5": "ms, one column of a spectrogram",
    },
    "16_capstone": {"80": "per cent, an example of calibration"},
    "18_your_model": {"1.3": "the factor of `mp.advise`"},
    "19_recommender": {"20": "per cent, the rows of the test"},
    "20_opinion_monitor": {"0.3": "a position of the slider", "55": "per cent, a position of the slider"},
}  # fmt: skip


def figures(markdown: str) -> list[str]:
    """Decimals, shares in per cent and numbers above 999 in the text, without code, formulas, links and years."""
    text = re.sub(r"```.*?```|\$\$.*?\$\$", " ", markdown, flags=re.S)
    text = re.sub(r"`[^`]*`|\$[^$]*\$|\]\([^)]*\)|<[^>]*>", " ", text)
    return re.findall(r"(?<![\w.,§])(?:\d{1,3}(?:,\d{3})+|\d+\.\d+|\d+(?=(?:\.\d+)? %))(?![\w]|\.\d)", text)


def numbers(text: str) -> set[float]:
    return {float(x.replace(",", "")) for x in re.findall(r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?", text)}


def written(cell: dict) -> str:
    """What a code cell says: its source and the text of its outputs."""
    parts = [cell["source"]]
    for output in cell["outputs"]:
        parts.append(output.get("text", ""))
        parts += [text for kind, text in output.get("data", {}).items() if kind.startswith("text/")]
    return "\n".join("".join(part) for part in parts)


def unwritten(cells: list[dict]) -> list[tuple[int, str]]:
    """(cell, figure) for each figure that no code cell above, nor one of the next three below, holds or rounds to."""
    missing = []
    found = {i: numbers(written(cell)) for i, cell in enumerate(cells) if cell["cell_type"] == "code"}
    for i, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            continue
        near = [j for j in found if j < i] + [j for j in found if j > i][:BELOW]
        known = set().union(*(found[j] for j in near))
        for figure in figures("".join(cell["source"])):
            value, places = float(figure.replace(",", "")), len(figure.partition(".")[2])
            same = {round(x, places) for x in known} | {round(100 * x, places) for x in known if x <= 1}
            if value not in same:
                missing.append((i, figure))
    return missing


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_every_figure_in_a_sentence_is_written_by_a_cell_near_it(path):
    cited = EVERYWHERE | CITED.get(path.stem, {})
    missing = unwritten(json.loads(path.read_bytes())["cells"])
    assert [each for each in missing if each[1] not in cited] == []


def test_what_counts_as_a_figure():
    assert figures("loss 1.06, 90 % of 1,984 runs, `0.3` and $0.7$ [here](a/3.5) in 2024, §7.3, r = 16, C06") == [
        "1.06", "90", "1,984",
    ]  # fmt: skip


def test_a_figure_that_no_cell_writes_is_found():
    out = [new.new_output("stream", text="loss 1.0613, share 0.894")]
    code = new.new_code_cell("print()", outputs=out)
    for sentence, wrong in (("It is 1.06.", []), ("It is 1.07.", ["1.07"]), ("That is 89 %.", []), ("72 %", ["72"])):
        below, above = [new.new_markdown_cell(sentence), code], [code, new.new_markdown_cell(sentence)]
        assert [f for _, f in unwritten(below)] == [f for _, f in unwritten(above)] == wrong
    far = [new.new_markdown_cell("It is 1.06."), *[new.new_code_cell("pass")] * BELOW, code]
    assert unwritten(far) == [(0, "1.06")]
