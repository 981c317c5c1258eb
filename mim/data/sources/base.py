"""Where images come from: the base of every source, and their registry.

A source gives images by position and names each by a stable id, from which masks and
augmentations follow. A new source is one class, its settings and its registration, in a file of its
own::

    @SOURCES.register("mine", MySettings)
    class Mine(ImageSource):
        def __init__(self, settings: MySettings, config: DataConfig, split: Split) -> None: ...

Without settings of its own it is constructed with ``config`` and ``split`` alone. It sets the
attributes of :class:`ImageSource`. A source without a val split sets ``has_val = False`` and gives
all its images; ``open_source`` then holds some of them out.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mim.core.config import DataConfig, MeasuredConfig
from mim.core.errors import UserError, setting_error
from mim.core.registry import Registry
from mim.core.rng import image_keys, permutation
from mim.data.images.decode import UnreadableImage, decode, decoding, is_deep, stored_values
from mim.data.images.deep import Depth, Pixels, depth_of
from mim.data.images.transforms import Picture
from mim.data.places.kept import found_once
from mim.data.unreadable import Fault, Ledger

Split: TypeAlias = Literal["train", "val"]

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's channels."""
_SAMPLED, _DECODED = 32, 8  # images of which the header, or the pixels, tell their bits
_GLANCES = 128  # images whose bytes a fingerprint samples
_GLANCED = 1 << 16  # bytes read at the beginning, in the middle and at the end of a larger file


class ImageSource(ABC):
    """Images with labels and stable ids. Must pickle, so that worker processes can have it."""

    name: str
    """As in ``data.source``."""
    labels: Tensor | None = None
    """(n,) int64 positions in ``classes``, or None."""
    classes: list[str]
    """Names of the classes; empty without labels."""
    sample_ids: Tensor
    """(n,) int64, unique, the same on every machine."""
    mean: tuple[float, ...] = IMAGENET[0]
    """Mean of each channel on the scale 0 to 1. ``open_source`` fits it to the config."""
    std: tuple[float, ...] = IMAGENET[1]
    """Standard deviation of each channel, likewise."""
    reads_path: bool = True
    """Whether ``data.path`` says where its images are; if not, a path is refused."""
    has_val: bool = True
    """Whether the set comes divided; if not, ``open_source`` holds some images out."""
    ledger: Ledger | None = None
    """Where loaders record unreadable images; set by ``open_source``."""
    groups: Tensor | None = None
    """(n,) int64: images with the same number are stored together and read at once. None where
    every image can be read alone."""
    groups_mixed: int = 1
    """How many groups are shuffled together in an epoch's order."""
    weights: Tensor | None = None
    """(n,) how much each image counts in training, or None where all count alike."""
    measured: MeasuredConfig = MeasuredConfig()
    """What ``open_source`` found by looking at the training images."""
    left_out: Mapping[str, int] = MappingProxyType({})
    """Ending -> files that are not read as images."""
    deep: bool = False
    """Whether images have more than 8 bits, so that pictures stretch their contrast; likewise."""
    show: tuple[int, int, int] | None = None
    """``data.show``; set by ``open_source``."""

    def __len__(self) -> int:
        return len(self.sample_ids)

    @property
    def epoch_size(self) -> int:
        """Images in one epoch of training."""
        return len(self)

    def order(self, seed: int, epoch: int) -> Tensor:
        """(epoch_size,) positions of the images of an epoch, in their order.

        A keyed permutation. With ``groups``, the groups follow in a keyed order, and each
        ``groups_mixed`` consecutive ones are shuffled together, so that each is read once.
        """
        shuffled = permutation(seed, epoch, len(self))
        if self.groups is None:
            return shuffled
        present, place = self.groups.unique(return_inverse=True)
        keys = image_keys(seed, epoch, present, purpose="order groups")
        turn = torch.argsort(torch.argsort(keys, stable=True))  # of each group
        pool = (turn // self.groups_mixed)[place[shuffled]]
        return shuffled[torch.argsort(pool, stable=True)]

    @abstractmethod
    def image(self, index: int) -> Picture:
        """Image at a position: PIL of any mode, or (height, width, channels) uint8, or float32 from
        0 to 1 where it has more than 8 bits.

        Raises:
            UnreadableImage: if it cannot be decoded; loaders replace it by another.
        """

    def ahead(self, indices: Tensor) -> None:
        """Announce the positions read next; a remote source may fetch them together."""
        return

    def describe(self, index: int) -> str:
        """What a message calls the image at a position."""
        return f"image {int(self.sample_ids[index])}"

    def encoded(self, index: int) -> bytes | None:
        """The content of an image's file; None where images are not files.

        Raises:
            UnreadableImage: if it cannot be read.
        """
        return None

    def raw(self, index: int) -> Pixels | None:
        """The values of an image before ``data.range``; None for one of 8 bits, or already scaled.

        Raises:
            UnreadableImage: if it cannot be read.
        """
        return None

    def has_deep(self) -> bool:
        """Whether images have more than 8 bits, from some of them."""
        return any(map(self.is_deep, spread_indices(len(self), _DECODED)))

    def is_deep(self, index: int) -> bool:
        """Whether an image has more than 8 bits; an unreadable one has not."""
        try:
            image = self.image(index)
        except UnreadableImage:
            return False
        return isinstance(image, np.ndarray) and image.dtype == np.float32

    def glance(self, index: int) -> bytes:
        """Sample bytes of the file, or the pixels: they differ, as a rule, when the image does.

        The same on every machine.

        Raises:
            UnreadableImage: if it cannot be read.
        """
        return np.asarray(self.image(index)).tobytes()

    def file_sizes(self) -> Sequence[int] | None:
        """Bytes of each image's file; None where finding out is expensive."""
        return None

    def stamp(self, index: int) -> str:
        """Identify this version of an image without reading it, by path, size and time.

        It may differ between machines. Empty where the images cannot change.
        """
        return ""

    def check(self, indices: Tensor | None = None) -> list[Fault]:
        """Find unreadable images cheaply, at (m,) positions or all; ``open_source`` calls this."""
        return []

    def fingerprint(self) -> str:
        """Digest of ids and labels, then a dot and :meth:`content_digest`.

        Two runs with the same fingerprint saw the same images.
        """
        digest = hashlib.blake2b(digest_size=16)
        digest.update(self.name.encode())
        for values in (self.sample_ids, self.labels):
            digest.update(b"/")
            if values is not None:
                digest.update(np.ascontiguousarray(values.numpy(), dtype="<i8"))
        return f"{digest.hexdigest()}.{self.content_digest()}"

    def content_digest(self) -> str:
        """Digest of all file sizes where they are cheap, and of sample bytes of 128 images."""
        digest = hashlib.blake2b(digest_size=8)
        sizes = self.file_sizes()
        if sizes is not None:
            digest.update(np.asarray(sizes, dtype="<i8"))
        chosen = torch.linspace(0, len(self) - 1, min(len(self), _GLANCES)).long()
        self.ahead(chosen)
        for index in chosen.tolist():
            try:
                digest.update(hashlib.blake2b(self.glance(index), digest_size=16).digest())
            except UnreadableImage:
                digest.update(b"unreadable")
        return digest.hexdigest()

    def stamps(self) -> str:
        """Digest of the fingerprint and of the stamps of all images."""
        digest = hashlib.blake2b(self.fingerprint().encode(), digest_size=16)
        for index in range(len(self)):
            digest.update(f"{self.stamp(index)}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()


def spread_indices(count: int, images: int) -> list[int]:
    """Positions of ``images`` images spread evenly over ``count``."""
    return torch.linspace(0, count - 1, min(images, count)).round().long().tolist()


def some_bytes(size: int, read: Callable[[int, int], bytes]) -> bytes:
    """The size of a file, and its beginning, middle and end; ``read(offset, size)`` gives bytes."""
    header = size.to_bytes(8, "little")
    if size <= 3 * _GLANCED:
        return header + read(0, size)
    offsets = (0, (size - _GLANCED) // 2, size - _GLANCED)
    return header + b"".join(read(offset, _GLANCED) for offset in offsets)


class EncodedSource(ImageSource):
    """Images that are stored as image files, of which :meth:`read` gives the bytes."""

    def __init__(self, config: DataConfig) -> None:
        self._max_pixels, self._decoder = config.max_pixels, config.decode
        self._depth = depth_of(config)
        self._streams = config.streaming
        self._has_deep: bool | None = None

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The bytes of an image's file; raises one of ``DECODE_ERRORS`` where there are none."""

    def encoded(self, index: int) -> bytes:
        with decoding(self.describe(index)):
            return self.read(index)

    def image(self, index: int) -> Picture:
        name, depth = self.describe(index), self._depth
        return decode(self.encoded(index), name, self._max_pixels, self._decoder, depth)

    def raw(self, index: int) -> Pixels | None:
        if self._depth is None:
            return None
        name = self.describe(index)
        return stored_values(self.encoded(index), name, self._max_pixels, self._depth)

    def has_deep(self) -> bool:
        if self._depth is None:
            return False
        if self._has_deep is None:
            self._has_deep = self._look(self._depth)
        return self._has_deep

    def _look(self, depth: Depth) -> bool:
        """Whether some of the images have more than 8 bits; kept for later runs that stream."""
        chosen = torch.tensor(spread_indices(len(self), _SAMPLED))
        if self.groups is not None:  # stored together: one read, not many
            chosen = (self.groups == self.groups[0]).nonzero()[:_SAMPLED, 0]

        def look() -> list[bool | None]:
            self.ahead(chosen)
            return [self._bits(index) for index in chosen.tolist()]

        stamps = [self.stamp(index) for index in chosen.tolist()] if self._streams else [""]
        if any(stamp.startswith(("/", "None/")) or not stamp for stamp in stamps):
            return any(look())  # nothing tells one version of the files from the next
        parts = [*stamps, str(replace(depth, range=None)), self._max_pixels]
        # An image that could not be read now may be read next time.
        return any(found_once(parts, look, lambda found: any(found) or None not in found))

    def _bits(self, index: int) -> bool | None:
        """Whether an image has more than 8 bits; None for an unreadable one."""
        try:
            name = self.describe(index)
            return is_deep(self.encoded(index), name, self._max_pixels, self._depth)
        except UnreadableImage:
            return None

    def is_deep(self, index: int) -> bool:
        return bool(self._bits(index))

    def glance(self, index: int) -> bytes:
        data = self.encoded(index)
        return some_bytes(len(data), lambda offset, size: data[offset : offset + size])


class View(ImageSource):
    """Images of other sources under positions of its own."""

    def _take(self, source: ImageSource) -> None:
        """What holds for all images of a source."""
        self.source = source
        self.name, self.classes = source.name, source.classes
        self.mean, self.std = source.mean, source.std
        self.ledger, self.measured = source.ledger, source.measured
        self.deep, self.show, self.left_out = source.deep, source.show, dict(source.left_out)

    @abstractmethod
    def _find(self, index: int) -> tuple[ImageSource, int]:
        """The source of the image at a position, and its position there."""

    def image(self, index: int) -> Picture:
        source, position = self._find(index)
        return source.image(position)

    def describe(self, index: int) -> str:
        source, position = self._find(index)
        return source.describe(position)

    def encoded(self, index: int) -> bytes | None:
        source, position = self._find(index)
        return source.encoded(position)

    def raw(self, index: int) -> Pixels | None:
        source, position = self._find(index)
        return source.raw(position)

    def is_deep(self, index: int) -> bool:
        source, position = self._find(index)
        return source.is_deep(position)

    def glance(self, index: int) -> bytes:
        source, position = self._find(index)
        return source.glance(position)

    def stamp(self, index: int) -> str:
        source, position = self._find(index)
        return source.stamp(position)


class Subset(View):
    """The images of a source at ``indices`` (m,), in their order."""

    def __init__(self, source: ImageSource, indices: Tensor | Sequence[int]) -> None:
        self._take(source)
        self.indices = torch.as_tensor(indices).long()
        self.labels = None if source.labels is None else source.labels[self.indices]
        self.sample_ids = source.sample_ids[self.indices]
        self.weights = None if source.weights is None else source.weights[self.indices]
        self.groups = None if source.groups is None else source.groups[self.indices]
        self.groups_mixed = source.groups_mixed

    def _find(self, index: int) -> tuple[ImageSource, int]:
        return self.source, int(self.indices[index])

    def ahead(self, indices: Tensor) -> None:
        self.source.ahead(self.indices[indices])

    def file_sizes(self) -> Sequence[int] | None:
        sizes = self.source.file_sizes()
        return None if sizes is None else [sizes[index] for index in self.indices.tolist()]

    def check(self, indices: Tensor | None = None) -> list[Fault]:
        return self.source.check(self.indices if indices is None else self.indices[indices])

    def has_deep(self) -> bool:
        return self.source.has_deep()


SourceFactory: TypeAlias = Callable[..., ImageSource]
SOURCES: Registry[SourceFactory] = Registry("data.source", DataConfig)


def holdout(sample_ids: Tensor, fraction: float, split: Split) -> Tensor:
    """Positions (m,), ascending, of one part of a keyed division of n >= 2 images.

    "val" is the ``fraction`` with the smallest keys, rounded, at least 1 and at most n - 1 images.
    Keys depend on the ids (n,) alone, so the division is the same on any machine and for any seed.
    """
    count = len(sample_ids)
    held = min(max(round(count * fraction), 1), count - 1)
    keys = image_keys(0, -1, sample_ids, purpose="holdout")
    order = torch.argsort(keys, stable=True)
    part = order[:held] if split == "val" else order[held:]
    return part.sort().values


def required_path(config: DataConfig) -> str:
    """``data.path`` of a source that cannot do without.

    Raises:
        UserError: if it is not set.
    """
    if config.path is None:
        raise setting_error("data.path", None, f"is needed by data.source={config.source}")
    return config.path


def needs_package(source: str, package: str) -> UserError:
    """The error for a source whose package is not installed."""
    reason = f"needs the package {package}: pip install {package}"
    return setting_error("data.source", source, reason)


class InMemory(ImageSource):
    """Images of one size as one array; ids are positions in the whole set."""

    def __init__(
        self, name: str, pixels: NDArray[np.uint8], labels: NDArray[np.int64], classes: list[str]
    ) -> None:
        self.name = name
        self.pixels = pixels  # (n, H, W) or (n, H, W, 3)
        self.labels = torch.from_numpy(labels)
        self.classes = classes
        self.sample_ids = torch.arange(len(pixels))

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])

    def is_deep(self, index: int) -> bool:
        return False
