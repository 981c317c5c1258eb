"""The data sets of torchvision, by the names of their classes."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mim.core.config import DataConfig
from mim.core.errors import choice_error, setting_error
from mim.data.images.decode import decoding
from mim.data.sources.base import IMAGENET, SOURCES, ImageSource, Split

_BY_TRAIN: tuple[dict[str, Any], dict[str, Any]] = {"train": True}, {"train": False}


def _by_split(train: str, val: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"split": train}, {"split": val}


# Class in torchvision.datasets -> arguments for train and for val; None: it is not divided.
_TORCHVISION: dict[str, tuple[dict[str, Any], dict[str, Any]] | None] = {
    **dict.fromkeys(("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "KMNIST", "USPS"), _BY_TRAIN),
    **dict.fromkeys(("SVHN", "STL10", "Flowers102"), _by_split("train", "test")),
    "OxfordIIITPet": _by_split("trainval", "test"),
    **dict.fromkeys(("Food101", "DTD"), _by_split("train", "test")),
    "FGVCAircraft": _by_split("trainval", "test"),
    "GTSRB": _by_split("train", "test"),
    "Imagenette": _by_split("train", "val"),
    "EuroSAT": None,
    "Caltech101": None,
}
# Mean and standard deviation; of others, ImageNet's.
_STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "CIFAR10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "CIFAR100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "MNIST": ((0.1307,), (0.3081,)),
    "FashionMNIST": ((0.2860,), (0.3530,)),
    "KMNIST": ((0.1918,), (0.3483,)),
    "USPS": ((0.2469,), (0.2989,)),
    "SVHN": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "STL10": ((0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)),
}


@SOURCES.register("torchvision/NAME")
class TorchvisionSource(ImageSource):
    """A data set of torchvision by the name of its class: ``torchvision/CIFAR10``.

    Its test part stands for val. Ids are positions in the part. Files go to ``data.path``, by
    default ``~/.cache/mim/torchvision``.
    """

    def __init__(self, config: DataConfig, split: Split) -> None:
        from torchvision import datasets  # slow to import, and few need it

        name = config.source.removeprefix("torchvision/")
        if name not in _TORCHVISION:
            names = [f"torchvision/{known}" for known in _TORCHVISION]
            raise choice_error("data.source", config.source, names)
        parts = _TORCHVISION[name]
        self.mean, self.std = _STATISTICS.get(name, IMAGENET)
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
        with decoding(f"{self.name}: image {index}"):
            image: Image.Image = self.dataset[index][0]
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
