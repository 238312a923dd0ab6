"""Plants twenty bugs, one at a time, in a copy of the package, and says which the tests notice.

    python tests/planted.py

Most of them were shipped once, by a library of this field. A bug is one text that is exchanged for another, wherever in
the package it stands now. The exit status is 0 when each is caught by the tests that it names, which pass without it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Bug(NamedTuple):
    """`right` stands once in the package; with `wrong` in its place, `tests` fail."""

    what: str
    right: str
    wrong: str
    tests: str


BUGS = (
    Bug(
        "γ is left out of ΔW, so a merged model differs from the adapted one",
        "# ΔW = γ·B·A, of rank at most r\n        return self.gamma * (self.B @ self.A)",
        "return self.B @ self.A",
        "tests/test_lora.py::test_the_equation_on_a_non_square_layer",
    ),
    Bug(
        "the scale is α instead of α/r",
        "gamma = alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)",
        "gamma = alpha",
        "tests/test_lora.py::test_gamma_is_alpha_over_r_or_over_its_root",
    ),
    Bug(
        "LoRA+ speeds up A instead of B",
        "return [(self.B, self.lr_ratio)]",
        "return [(self.A, self.lr_ratio)]",
        "tests/test_family.py::test_lora_plus_gives_b_its_own_rate",
    ),
    Bug(
        "DoRA scales the bias along with the weight",
        "plain = plain[..., self.rows] - (0.0 if bias is None else bias[self.rows])",
        "plain = plain[..., self.rows]",
        "tests/test_family.py::test_dora",
    ),
    Bug(
        "AdaLoRA's budget falls by the square, not by the cube",
        "* max(0.0, share) ** 3",
        "* max(0.0, share) ** 2",
        "tests/test_family.py::test_adalora_budget_follows_the_cubic_schedule",
    ),
    Bug(
        "IA3 is merged without the bias that its scale takes along",
        "(self.l.flatten() - 1) * bias[rows]",
        "0.0 * bias[rows]",
        "tests/test_attach.py::test_invariants",
    ),
    Bug(
        "an adapter starts with a random upper matrix, so the model is not the base at first",
        "for zero in (self.down.bias, self.up.weight, self.up.bias):",
        "for zero in (self.down.bias, self.up.bias):",
        "tests/test_attach.py::test_invariants",
    ),
    Bug(
        "a mask by size trains the smallest entries where the largest are asked for",
        'return size if self.by == "largest" else -size',
        "return -size",
        "tests/test_masked.py::test_largest_and_smallest_are_the_order_statistics_over_all_matrices",
    ),
    Bug(
        "weight decay moves what has no gradient",
        "adamw(groups(model, plan.lr), lr=plan.lr, weight_decay=0.0)",
        "adamw(groups(model, plan.lr), lr=plan.lr, weight_decay=0.1)",
        "tests/test_fit.py::test_fit_is_adam_on_its_batches_without_weight_decay",
    ),
    Bug(
        "the mean of the scales is lost on the way back from four bits",
        "values = values if self.offset is None else values + self.offset",
        "values = values",
        "tests/test_nf4.py::test_the_round_trip_stays_within_its_bound",
    ),
    Bug(
        "a number becomes the next larger value of the code, not the nearest",
        "(values[:-1] + values[1:]) / 2, out_int32=True",
        "values[:-1] + 1e-6, out_int32=True",
        "tests/test_nf4.py::test_the_nearest_value_is_taken",
    ),
    Bug(
        "a merge forgets that GPT-2 stores its weights transposed",
        'delta = share * (delta.T if name == "weight" and flipped(owner) else delta).to(wide)',
        "delta = share * delta.to(wide)",
        "tests/test_attach.py::test_invariants",
    ),
    Bug(
        "a merge is computed in the base's own bfloat16",
        "wide = torch.promote_types(getattr(owner, name).dtype, torch.float32)",
        "wide = getattr(owner, name).dtype",
        "tests/test_attach.py::test_merge_says_what_rounding_took",
    ),
    Bug(
        "the hooks go on adding after a merge, so the change counts twice",
        "self._state.silent = self._disabled or self._merged is not None",
        "self._state.silent = self._disabled",
        "tests/test_attach.py::test_invariants",
    ),
    Bug(
        "an adapter that is switched to, or loaded, stays frozen",
        "layers.requires_grad_(name in names)",
        "layers.requires_grad_(False)",
        "tests/test_attach.py::test_use_switches_stacks_and_says_what_trains",
    ),
    Bug(
        "a target matches names that only end alike",
        "name.endswith(ends + suffix)",
        "name.endswith(suffix)",
        "tests/test_lora.py::test_targets",
    ),
    Bug(
        "a prompt does not move the positions of the text behind it",
        "given], -1) + n",
        "given], -1) + seen",
        "tests/test_prompt.py::test_rows_of_unequal_length_equal_each_row_alone",
    ),
    Bug(
        "the text's first token is scored from the prompt, which the base does not do",
        "call[name][:, n] = IGNORE",
        "pass",
        "tests/test_prompt.py::test_the_loss_is_that_of_the_text_alone",
    ),
    Bug(
        "numbers of a file for which the model has no place are dropped without a word",
        '("has", tensors.keys() - places.keys())',
        '("has", set())',
        "tests/test_checkpoint.py::test_damage_is_refused_and_changes_nothing",
    ),
    Bug(
        "a word is scored by what the model says after it, not before",
        "logits, labels = logits[:, :-1], labels[:, 1:]\n        kept =",
        "kept =",
        "tests/test_fit.py::test_evaluate_agrees_with_the_plain_loss_and_leaves_the_mode_alone",
    ),
)


def pytest(folder: Path, *tests: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--no-header", *tests]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def verdict(bug: Bug, folder: Path) -> str:
    """ "caught", or why not; the copy in `folder` is put back."""
    files = [path for path in (folder / "minipeft").rglob("*.py") if bug.right in path.read_text(encoding="utf-8")]
    if len(files) != 1 or (text := files[0].read_text(encoding="utf-8")).count(bug.right) != 1:
        return "NOT PLANTED: its text stands in " + (", ".join(path.name for path in files) or "no file")
    files[0].write_text(text.replace(bug.right, bug.wrong), encoding="utf-8")
    try:
        status = pytest(folder, bug.tests).returncode
    finally:
        files[0].write_text(text, encoding="utf-8")
    return {0: "MISSED", 1: "caught"}.get(status, f"NOT TRIED: pytest ended with status {status}")


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="planted-") as temporary:
        folder = Path(temporary)
        for name in ("minipeft", "tests"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        clean = pytest(folder, *dict.fromkeys(bug.tests for bug in BUGS))
        if clean.returncode:
            print(f"The tests fail without any bug:\n{clean.stdout[-2000:]}")
            return 1
        caught = 0
        for number, bug in enumerate(BUGS, 1):
            found = verdict(bug, folder)
            caught += found == "caught"
            print(f"{number:2} {found}: {bug.what}", flush=True)
    print(f"{caught} of {len(BUGS)} planted bugs are caught.")
    return int(caught < len(BUGS))


if __name__ == "__main__":
    sys.exit(main())
