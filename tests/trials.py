"""What the stranger tries with a tuned model: `TRIALS`, each of which leaves it as it found it."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import random
import re
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import tiny
import torch
from drawn import LENGTH, NO_WORDS, NOT_ALONE, PEFT_CANNOT, PEFT_SAYS, draw
from test_matrix import FRONTS, ROWS, gap, outputs
from torch import nn

import minipeft as mp
from minipeft.layer import WeightLayer
from minipeft.methods import METHODS

if TYPE_CHECKING:
    from stranger import Case


class Fault(Exception):
    """A promise that was broken."""


class Left(Exception):
    """Nothing to hold the package to: the bare model does not do it either."""


def require(holds: object, what: str) -> None:
    if not holds:
        raise Fault(what)


def same(found: list[torch.Tensor], expected: list[torch.Tensor], what: str) -> None:
    require(len(found) == len(expected) and all(map(torch.equal, found, expected)), f"{what}: not to the bit")


@torch.no_grad()
def given(model: nn.Module, batch: dict[str, torch.Tensor], **more) -> list[torch.Tensor]:
    return outputs(model, batch | more)


@contextlib.contextmanager
def quietly(what: str) -> Iterator[None]:
    """Within it no global generator moves."""
    look = lambda: (torch.random.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())  # noqa: E731
    before = look()
    yield
    require(look() == before, f"{what} moves a global generator")


def refused(act: Callable[[], object]) -> str:
    """What the package says when it does not do this, "" where it does it; any other error is let through."""
    try:
        act()
    except (ValueError, TypeError) as error:
        if "/minipeft/" not in traceback.extract_tb(error.__traceback__)[-1].filename:
            raise
        said = str(error)
        require(re.fullmatch(r"[A-Z'\"\w(\[{<][^\n]*[.?!]", said), f"refused, but not in one sentence: {said!r}")
        return said
    return ""


TRIALS: dict[str, Callable[[Case], None]] = {}


def trial(function: Callable[[Case], None]) -> Callable[[Case], None]:
    TRIALS[function.__name__] = function
    return function


@trial
def refusing(case: Case) -> None:
    tuned, model = case.tuned, case.model
    for what, act in {
        "attach": lambda: mp.attach(model, mp.LoRA(1)), "attach again": lambda: mp.attach(tuned, mp.Full()),
        "add": lambda: tuned.add("default", mp.LoRA(1)), "use": lambda: tuned.use("nobody"),
        "delete": lambda: tuned.delete("nobody"), "unmerge": lambda: tuned.unmerge(),
        "rows": lambda: tuned(**case.batch, adapters=["nobody"] * ROWS),
        **({"resize": lambda: model.resize_token_embeddings(80)} if hasattr(model, "resize_token_embeddings") else {}),
    }.items():  # fmt: skip
        require(refused(act), f"{what} is not refused")


@trial
def one_step(case: Case) -> None:
    """Training moves what trains and nothing else; along its slope the loss falls."""
    case.must_have_gradients()
    tuned, kept = case.tuned, copy.deepcopy(case.tuned.state_dict())
    own = {id(p) for p in tuned.adapters.parameters()}
    require(not any(p.requires_grad for p in tuned.base.parameters() if id(p) not in own), "the base trains")
    loss = lambda batch: sum((v.double() * (1 + i)).sin().sum() for i, v in enumerate(outputs(tuned, batch)))  # noqa: E731
    tuned.train(training := case.rng.random() < 0.5)
    value = loss(case.labelled() if training else case.batch)
    if not value.requires_grad:
        tuned.eval()
        raise Left("the output does not depend on what trains")
    value.backward()
    trained = [p for p in tuned.adapters.parameters() if p.grad is not None]
    if not trained:  # MRA, as in `gradients`
        tuned.eval()
        raise Left("the output does not depend on what trains")
    slope = sum(p.grad.double().square().sum() for p in trained).sqrt().item()
    require(value.isfinite() and math.isfinite(slope), "the loss or its slope is no number")
    torch.optim.SGD(trained, lr=1e-4 / max(slope, 1e-9)).step()
    tuned.zero_grad()
    tuned.eval()
    with torch.no_grad():
        after = loss(case.batch)
    if case.dtype == "float64" and not training and not tuned.hears():
        require(after <= value + 1e-9 * abs(value), f"the loss rises from {value:.9g} to {after:.9g} along its slope")
    case.is_the_base_when_disabled()
    tuned.load_state_dict(kept)


@trial
def accumulating(case: Case) -> None:
    """The rows' gradients, one after the other, add up to the batch's."""
    if case.name in NOT_ALONE:
        raise Left(NOT_ALONE[case.name])
    rows = [case.row(i) for i in range(ROWS)]
    case.near(case.gradients(case.tuned, *rows), case.gradients(case.tuned, case.batch), "gradients do not add up", 20)


@trial
def checkpointing(case: Case) -> None:
    """What is computed again on the way back gives the same gradients."""
    if not getattr(case.model, "supports_gradient_checkpointing", False):
        raise Left("no checkpoints")
    twin, bare = case.copied(), case.fresh()
    for model in (twin, bare):
        model.train()
        for module in model.modules():  # dropout draws, and a mixture's router shakes
            module.training &= not isinstance(module, nn.Dropout)
    bare.gradient_checkpointing_enable()
    try:
        outputs(bare, case.batch)
        sum(v.sum() for v in outputs(bare.requires_grad_(True), case.batch)).backward()
    except RuntimeError as error:
        raise Left("the bare model has no checkpoints") from error
    before = case.gradients(twin, case.batch)
    twin.base.gradient_checkpointing_enable()
    case.near(case.gradients(twin, case.batch), before, "with checkpoints the gradients are others", 20)


@trial
def merging(case: Case) -> None:
    """What changes weights is merged, whole and in part, and taken out again; nothing else is."""
    tuned = case.tuned
    if not all(isinstance(layer, WeightLayer) or layer.slots for layer in tuned.layers()):
        require("changes no weight" in refused(tuned.merge), "what changes no weight is merged")
        return
    with quietly("merge"):
        tuned.merge()
    case.near(case.outputs(), case.found, "merged, it computes something else", 5)
    case.is_the_base_when_disabled()
    tuned.unmerge()
    share = case.rng.choice([0.5, -0.3])
    if not refused(lambda: tuned.use({"default": share})):
        part = case.outputs()
        tuned.merge()
        case.near(case.outputs(), part, f"{share:g} of it, merged, is something else", 5)
        tuned.unmerge()
        tuned.use("default")


@trial
def saving(case: Case) -> None:
    """A file comes back, under another name, and PEFT reads what is in a format of its own."""
    with tempfile.TemporaryDirectory() as folder:
        with quietly("save"):
            case.tuned.save(folder)
        kinds = {path.suffix for path in Path(folder).iterdir()}
        require(kinds <= {".json", ".safetensors", ".md"}, f"a file holds {kinds}")
        fresh = case.fresh()
        case.outputs(fresh)  # some are set up by their first call
        with quietly("load_adapter"):
            again = mp.load_adapter(fresh, folder, name="other").eval()
        require(gap(case.outputs(again), case.found) <= 1e-6, "saved and loaded, it computes something else")
        kind = json.loads((Path(folder) / "adapter_config.json").read_text())["peft_type"]
        if (
            case.dtype != "float32"
            or kind.startswith("MINIPEFT")
            or {("", case.name), (case.kind, case.name)} & {*PEFT_CANNOT}
        ):
            return
        if case.kind in ("PromptTuning", "PTuning") and ("bbox" in case.batch or not read_alike(case)):
            return  # PEFT puts no boxes before those of the tokens
        import peft

        try:
            theirs = given(peft.PeftModel.from_pretrained(case.fresh(), folder).eval(), case.batch)
        except (ValueError, RuntimeError) as error:
            if any(own in str(error) for own in PEFT_SAYS):
                return
            raise
        cut = [v if v.shape == w.shape else v[:, -w.shape[1] :] for v, w in zip(theirs, case.found, strict=True)]
        case.near(cut, case.found, "PEFT computes something else from our file", 5)


def read_alike(case: Case) -> bool:
    """Whether the bare model says the same to tokens and to their embeddings, which are what PEFT puts a prompt before:
    FSMT scales, and ESM masks, what it reads as tokens alone."""
    batch, model = dict(case.batch), case.fresh()
    embedded = model.get_input_embeddings()(batch.pop("input_ids"))
    try:
        return gap(given(model, batch | {"inputs_embeds": embedded}), case.bare.gives) <= 1e-5
    except (ValueError, RuntimeError, TypeError):  # CLIP's text reads nothing but tokens
        return False


@trial
def state(case: Case) -> None:
    """state_dict goes back into the same model, and into another that was drawn with another seed."""
    kept = copy.deepcopy(case.tuned.state_dict())
    tiny.randomise(case.tuned, seed=2)
    case.tuned.load_state_dict(kept)
    same(case.outputs(), case.found, "state_dict does not come back")
    twin = mp.attach(case.fresh(), case.method, seed=case.seed if case.kind == "Subspace" else 77).eval()
    case.outputs(twin)
    if twin.state_dict().keys() == kept.keys():  # other entries may have been chosen, in other places
        twin.load_state_dict(kept)
        case.near(case.outputs(twin), case.found, "state_dict in another model computes something else")


@trial
def copying(case: Case) -> None:
    twin = case.copied()
    same(case.outputs(twin), case.found, "a copy computes something else")
    if case.dtype == "float32":
        same(case.outputs(twin.double().float()), case.found, "to float64 and back it is another")
    tiny.randomise(twin, seed=3)
    same(case.outputs(), case.found, "a copy shares its numbers")
    same(case.outputs(twin.detach()), case.bare.gives, "a copy detached is not the base")


@trial
def several(case: Case) -> None:
    """Another adapter comes, is used alone, beside the first and in part, and goes."""
    tuned, (kind, settings) = case.tuned, draw(case.rng, case.model)
    with quietly("add"):
        tuned.add("second", METHODS[kind](**settings), seed=5)
    same(case.outputs(), case.found, "an adapter that is not used acts")
    tuned.use("second")
    tiny.randomise(SimpleNamespace(adapters=tuned.adapters["second"]), seed=6)
    if not (why := refused(case.outputs)) and all(v.isfinite().all() for v in case.outputs()):
        alone = case.outputs()
        if not refused(lambda: tuned.use({"default": 1.0, "second": 0.5})) and not refused(case.outputs):
            part = case.outputs()
            if all(v.isfinite().all() for v in part) and not refused(tuned.merge):
                case.near(case.outputs(), part, "one and half of another, merged", 5)
                tuned.unmerge()
        if not refused(lambda: tuned.use("default", "second")):
            refused(case.outputs)
        tuned.use("second")
        same(case.outputs(), alone, f"{kind}{settings}, put aside, comes back as another")
    tuned.use("default")
    tuned.delete("second")
    require(not why or kind in (*FRONTS, "Adapter", "Experts"), f"{kind} is attached and refuses each call: {why}")


@trial
def rows(case: Case) -> None:
    """Each row with its own adapter is what the row gives with that adapter alone."""
    case.row(0)
    mixed = given(case.tuned, case.batch, adapters=["default", None])
    want = [torch.cat([a[:1], b[1:]]) for a, b in zip(case.found, case.bare.gives, strict=True)]
    case.near(mixed, want, "rows with adapters of their own")


@trial
def padding(case: Case) -> None:
    """Padding on either side changes nothing, where it changes nothing in the bare model."""
    if case.batch.keys() != {"input_ids"}:
        raise Left("no text alone")
    ids, more = case.batch["input_ids"], 3
    pad = torch.full((ROWS, more), case.model.config.get_text_config().pad_token_id or 0)
    for side in ("right", "left"):
        both = lambda a, b: torch.cat([a, b] if side == "right" else [b, a], 1)  # noqa: E731, B023
        batch = {"input_ids": both(ids, pad), "attention_mask": both(torch.ones_like(ids), torch.zeros_like(pad))}
        own = slice(None, -more) if side == "right" else slice(more, None)
        cut = lambda found: [v[:, own] if v.shape[1:2] == (LENGTH + more,) else v for v in found]  # noqa: E731, B023
        with case.tuned.disabled():
            bare = cut(given(case.model, batch))
        alike = [v.shape for v in bare] == [v.shape for v in case.bare.gives]
        # a bare model that computes a part in float32 has an error of its own, which an adapter enlarges
        if alike and gap(bare, case.bare.gives) < 100 * torch.finfo(getattr(torch, case.dtype)).eps:
            if not refused(lambda: given(case.tuned, batch)):  # noqa: B023
                case.near(cut(given(case.tuned, batch)), case.found, f"padding on the {side}", 2)


@trial
def words(case: Case) -> None:
    """A prompt that starts as words is these words, whatever the case's own method."""
    if case.batch.keys() - {"decoder_input_ids"} != {"input_ids"} or not case.exact:
        raise Left("no text alone")
    if case.name in NO_WORDS:
        raise Left(NO_WORDS[case.name])
    ids, said = case.batch["input_ids"], torch.tensor([7, 9, 8])
    with case.tuned.disabled():
        longer = case.batch | {"input_ids": torch.cat([said.expand(ROWS, -1), ids], 1)}
        bare = [v[:, 3:] if v.shape[1:2] == (LENGTH + 3,) else v for v in given(case.model, longer)]
    found = given(mp.attach(case.fresh(), mp.PromptTuning(3, said.tolist())).eval(), case.batch)
    case.near(found, bare, "a prompt of words is not these words")


@trial
def generating(case: Case) -> None:
    """A cache changes no token, nor do the other rows."""
    ids = case.batch.get("input_ids")
    if not hasattr(case.model, "generate") or case.one.kind not in ("causal", "pair") or ids is None or not case.exact:
        raise Left("nothing to generate")
    how = dict(attention_mask=torch.ones_like(ids), max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    how |= dict(output_logits=True, return_dict_in_generate=True)
    both = lambda: [case.tuned.generate(ids, use_cache=cache, **how) for cache in (True, False)]  # noqa: E731
    try:
        with case.tuned.disabled():
            bare, anew = both()
    except Exception as error:
        raise Left("the bare model does not generate") from error
    if gap(bare.logits, anew.logits) > 1e-4:
        raise Left("the bare model's cache changes what it says")
    found, anew = both()
    require(torch.equal(found.sequences, anew.sequences), "a cache changes tokens")
    if not refused(lambda: case.tuned(**case.batch, adapters=["default", None])):
        mixed = case.tuned.generate(ids, adapters=["default", None], **how).sequences
        require(torch.equal(mixed, torch.cat([found.sequences[:1], bare.sequences[1:]])), "rows generate other tokens")
