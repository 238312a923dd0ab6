"""The shipped base: as good as its card says, small, offline, and loaded the same way every time."""

import functools
import json
import math
import subprocess
import sys

import pytest
import torch

import minipeft as mp
from minipeft.world import base


@pytest.fixture(scope="module")
def pocket():
    return mp.load("pocket")


def test_the_card_says_what_was_measured_and_how_it_was_trained():
    card = json.loads((base.FOLDER / "card.json").read_text())
    assert card["above the floor in %"] <= 3
    assert card["sampled stories that parse, of 100"] >= 95
    trained = card["trained on"]
    assert {"device", "torch", "python", "date", "seed", "tokens", "wall time in seconds", "phases"} <= set(trained)
    assert trained["wall time in seconds"] < 3600
    assert [(p["steps"], p["learning rate"], p["share of questions"]) for p in trained["phases"]] == list(base.PHASES)


@pytest.mark.slow
def test_held_out_loss_is_within_three_percent_of_the_floor_and_stories_parse(pocket):
    figures = base.measure(*pocket, stories=600)
    assert figures["held-out loss in nats a token"] >= figures["floor in nats a token"] * 0.99
    assert figures["above the floor in %"] <= 3
    assert figures["sampled stories that parse, of 100"] >= 95
    card = json.loads((base.FOLDER / "card.json").read_text())
    assert figures["parameters"] == card["parameters"] and figures["vocabulary"] == card["vocabulary"]
    above = "above the source, story by story, in nats a token"
    assert figures[above] == pytest.approx(card[above], abs=4 * figures["its standard error"])


def test_it_ships_in_less_than_five_megabytes_and_without_pickle():
    files = [path for path in base.FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 5_000_000
    assert {path.suffix for path in files} <= {".safetensors", ".json"}


def test_the_larger_base_was_trained_on_a_gpu_is_better_and_is_as_small_as_promised():
    card, own = (json.loads((folder / "card.json").read_text()) for folder in (base.DESK, base.FOLDER))
    assert "NVIDIA" in card["trained on"]["device"] and len(card["trained on"]["phases"]) == len(base.PHASES)
    assert card["parameters"] > 7 * own["parameters"] and card["vocabulary"] == own["vocabulary"]
    assert card["held-out loss in nats a token"] < own["held-out loss in nats a token"]
    assert card["sampled stories that parse, of 100"] == 100 > own["sampled stories that parse, of 100"]
    files = [path for path in base.DESK.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 14_000_000
    assert {path.suffix for path in files} <= {".safetensors", ".json"}


@pytest.mark.slow
def test_the_larger_base_is_what_its_card_says():
    figures = base.measure(*mp.load("desk"), stories=400, samples=100)
    card = json.loads((base.DESK / "card.json").read_text())
    above = "above the source, story by story, in nats a token"
    assert figures[above] == pytest.approx(card[above], abs=4 * figures["its standard error"])
    assert figures["sampled stories that parse, of 100"] >= 99
    assert figures["parameters"] == card["parameters"]


def test_a_text_in_the_tokenizers_place_is_named(pocket):
    with pytest.raises(TypeError, match="'late on monday' stands in the tokenizer's place"):
        mp.write(pocket[0], "late on monday")
    with pytest.raises(TypeError, match="The prompt is one text, and not"):
        mp.write(*pocket, ["late on monday", "on sunday"])


def test_a_model_that_diverged_says_so_instead_of_writing():
    model, tokenizer = mp.load("pocket")
    tuned = mp.attach(model, mp.LoRA(rank=1))
    next(iter(tuned.adapters.parameters())).data[0] = math.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="is not finite, so the model cannot write"):
            mp.write(tuned, tokenizer, "", temperature=temperature)


def test_the_tokenizer_is_one_word_one_token(pocket):
    _, tokenizer = pocket
    assert tokenizer.get_vocab() == base.build_tokenizer().get_vocab() and len(tokenizer) <= 1000
    ids = tokenizer("Tom went to the lake. He's happy!").input_ids
    words = tokenizer.convert_ids_to_tokens(ids)
    assert words == ["<bos>", "tom", "went", "to", "the", "lake", ".", "<unk>", "happy", "!"]
    for story in mp.world.stories().texts(50, 1):
        ids = tokenizer(story.text + " <eos>").input_ids
        assert len(ids) == len(story.text.split()) + 2
        assert tokenizer.decode(ids, skip_special_tokens=True) == story.text


def test_writing_is_seeded_and_leaves_the_global_generator_alone(pocket):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = mp.write(*pocket, "on sunday", n=3, seed=1)
    assert torch.rand(1) == expected
    assert first == mp.write(*pocket, "on sunday", n=3, seed=1) != mp.write(*pocket, "on sunday", n=3, seed=2)
    assert all(text.startswith("on sunday") for text in first)
    greedy = mp.write(*pocket, "on sunday", n=2, temperature=0)
    assert greedy[0] == greedy[1] and mp.world.stories().log_prob(greedy[0]) > -math.inf


def test_a_classifier_head_is_the_same_every_time_and_labels_are_checked():
    torch.manual_seed(1)
    a, _ = mp.load("pocket", labels=3)
    torch.manual_seed(2)
    b, _ = mp.load("pocket", labels=3)
    assert a.score.weight.shape == (3, 128) and torch.equal(a.score.weight, b.score.weight)
    for labels in (0, 1, 2.0, "two"):
        with pytest.raises(ValueError, match="labels must be"):
            mp.load("pocket", labels=labels)
    with pytest.raises(ValueError, match="encoder"):
        mp.load("minilm")


@pytest.mark.parametrize("name", ["nope", "somebody/nothing"])
def test_a_name_that_nobody_can_look_up_is_told_what_there_is(name, monkeypatch):
    def nobody_answers(*_, **__):
        raise OSError

    monkeypatch.setattr(base.socket, "create_connection", nobody_answers)
    monkeypatch.setattr(base.urllib.request, "getproxies", dict)
    with pytest.raises(ValueError, match=f"no base '{name}' here; there is pocket, minilm and desk, or give a folder"):
        mp.load(name)


@pytest.mark.parametrize(
    "name, error, message",
    [
        (None, TypeError, "name is None; give"),
        ("./no", ValueError, "no folder './no'"),
        ("", ValueError, "no folder ''"),
    ],
)
def test_what_is_no_name_is_said(name, error, message):
    with pytest.raises(error, match=message):
        mp.load(name)


def test_the_course_does_not_say_where_this_machine_keeps_it(pocket):
    model, _ = pocket
    assert model.name_or_path == model.config.name_or_path == "pocket"


@pytest.mark.slow
def test_training_writes_whole_files_that_load(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "measure", functools.partial(base.measure, stories=50, samples=4))
    card = base.train(phases=((3, 1e-3, 0.0), (2, 1e-3, 0.5)), folder=tmp_path / "pocket")
    assert [p["steps"] for p in card["trained on"]["phases"]] == [3, 2] and card["trained on"]["tokens"] > 5000
    again = base.train(phases=((3, 1e-3, 0.0), (2, 1e-3, 0.5)), folder=tmp_path / "pocket")
    assert again["held-out loss in nats a token"] == card["held-out loss in nats a token"]
    assert [path.name for path in tmp_path.iterdir()] == ["pocket"]
    model, tokenizer = mp.load(str(tmp_path / "pocket"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.vocab_size == len(tokenizer)


def test_importing_the_package_pulls_in_nothing_heavy():
    code = (
        "import sys, minipeft as mp; mp.attach, mp.LoRA, mp.Full; "
        "sys.exit(','.join({'transformers', 'datasets', 'matplotlib', 'ipywidgets', 'pandas'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_attach_is_the_function_whatever_was_imported_first():
    code = "import minipeft as mp; method = mp.LoRA(rank=2); import minipeft.attach; assert callable(mp.attach)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    with pytest.raises(AttributeError, match="minipeft has no 'Lora'"):
        mp.Lora  # noqa: B018
