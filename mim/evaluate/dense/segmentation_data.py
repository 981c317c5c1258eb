"""Images with a label for each pixel: where they come from, their training views, their batches.

A new source is one class and its registration in :data:`SEGMENTATION_SOURCES`.

Shapes: B images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mim.core.config import DataConfig
from mim.core.errors import UserError, setting_error
from mim.core.registry import Registry
from mim.core.rng import name_to_int
from mim.data.images.decode import (
    DECODE_ERRORS,
    EXTENSIONS,
    UnreadableImage,
    decoding,
    open_image,
    open_regular,
    read_file,
    read_picture,
    stored_values,
)
from mim.data.images.deep import Depth
from mim.data.images.transforms import Picture, prepare, size_of, upright
from mim.data.labels import one_spelling
from mim.data.loader import Batch
from mim.data.sources.base import EncodedSource, ImageSource, Split
from mim.evaluate.dense.views import DenseBatches, cover_factor

VOID = -1
"""Label, within the project, of the pixels that never count."""
# Reading them takes some seconds; of larger sets a bad mask shows when it is read.
_MASKS_CHECKED = 2_000
_SETTING = "evaluations.segment"


@dataclass(frozen=True)
class SegmentationSpec:
    """Where images with masks come from: what a source is built from."""

    source: str = "folders"
    """folders, torchvision/VOCSegmentation or torchvision/OxfordIIITPet."""
    path: str = ""
    """Folder of the images and masks, or of torchvision's download."""
    download: bool = True
    """Whether torchvision may download."""
    classes: tuple[str, ...] = ()
    """Names of the classes, in the order of their labels."""
    void: int = 255
    """Label in the masks of pixels that never count."""


F = TypeVar("F", bound="DenseFiles")


class DenseFiles(EncodedSource):
    """Images of a dense task that are files."""

    files: list[Path]
    """The images."""

    def reading(self: F, data: DataConfig) -> F:
        """The same images, read as a config says (``data.range`` and the like)."""
        other = copy(self)
        EncodedSource.__init__(other, data)
        return other

    def read(self, index: int) -> bytes:
        return read_file(self.files[index])

    def describe(self, index: int) -> str:
        return str(self.files[index])


class SegmentationSource(ImageSource):
    """Images with masks. Must pickle, as every source."""

    labels = None
    mean, std = (), ()  # images are normalised as the encoder is used to
    void: int
    """Label in the files that becomes :data:`VOID`."""

    @abstractmethod
    def read_mask(self, index: int) -> NDArray[np.integer[Any]]:
        """(height, width), the labels as they stand in the file."""

    def glance(self, index: int) -> bytes:
        """Of the image and its mask: a state is not used over other masks either."""
        return super().glance(index) + self.read_mask(index).tobytes()

    def subset(self, indices: Tensor) -> SegmentationSource:
        """The images at some positions."""
        return SegmentationSubset(self, indices)

    def describe_mask(self, index: int) -> str:
        """What a message calls the mask at a position."""
        return f"the mask of {self.describe(index)}"

    def mask(self, index: int) -> NDArray[np.int32]:
        """(height, width) with labels 0 to K - 1 and :data:`VOID`.

        Raises:
            UserError: if it holds another label; names the file.
        """
        given = self.read_mask(index).astype(np.int32)
        known = (given >= 0) & (given < len(self.classes))
        is_void = given == self.void
        if not (known | is_void).all():
            label = int(given[~(known | is_void)][0])
            raise UserError(
                f"{_SETTING}.classes: {self.describe_mask(index)} has the label {label}; known are "
                f"0 to {len(self.classes) - 1}, and {self.void} is void (evaluations.segment.void)"
            )
        return np.where(is_void, np.int32(VOID), given)

    def verify(self, split: Split) -> None:
        """Read the masks, 2,000 of them or more until every class of train has been seen.

        Raises:
            UserError: if a class has no pixel in train, or all of val is void.
        """
        unseen = set(range(len(self.classes)))
        for index in range(len(self)):
            if index >= _MASKS_CHECKED and (split == "val" or not unseen):
                return
            mask = self.mask(index)
            self.verify_size(index, (mask.shape[1], mask.shape[0]))
            unseen -= set(np.unique(mask).tolist())
        void = f"{self.void} is void (evaluations.segment.void)"
        if split == "train" and unseen:
            label = min(unseen)
            name = self.classes[label]
            reason = f"no mask of train has a pixel of {name!r}, whose label is {label}; {void}"
            raise UserError(f"{_SETTING}.classes: {reason}")
        if len(unseen) == len(self.classes):
            raise UserError(f"{_SETTING}.void: all pixels of the masks of {split} are void; {void}")

    def verify_size(self, index: int, size: tuple[int, int]) -> None:
        """Compare an image with the (width, height) of its mask, where that is cheap."""


SegmentationFactory: TypeAlias = Callable[[SegmentationSpec, Split], SegmentationSource]
SEGMENTATION_SOURCES: Registry[SegmentationFactory] = Registry(f"{_SETTING}.source")


def open_segmentation(spec: SegmentationSpec, split: Split) -> SegmentationSource:
    """The images and masks that the settings name, checked.

    Raises:
        UserError: for an unknown source, a missing folder, an image without a mask, a mask of
            another size or with an unknown label, or a file that cannot be read.
    """
    source = SEGMENTATION_SOURCES.get(spec.source)(spec, split)
    if len(source.classes) < 2:
        raise setting_error(f"{_SETTING}.classes", spec.classes, "must name 2 classes at least")
    if 0 <= source.void < len(source.classes):
        reason = f"is the label of the class {source.classes[source.void]!r} too"
        raise setting_error(f"{_SETTING}.void", source.void, reason)
    source.verify(split)
    return source


def read_mask(path: Path) -> Image.Image | NDArray[Any]:
    """A decoded mask, or the (height, width, channels) of an array.

    Raises:
        UserError: if it cannot be read; names the file.
    """
    with opened(path) as found:
        if not isinstance(found, Image.Image):
            return found
    try:
        return read_picture(path, str(path), DataConfig().max_pixels, "pil")
    except UnreadableImage as error:
        raise UserError(f"{path} cannot be read as an image: {error.reason}") from error


@contextmanager
def opened(path: Path) -> Iterator[Image.Image | NDArray[Any]]:
    """An image of which the header has been read; as an array where that needs all of the file.

    Raises:
        UserError: if it cannot be read; names the file.
    """
    try:
        with decoding(str(path)), open_regular(path) as file:
            try:
                image = open_image(file)
            except ValueError:
                found = stored_values(read_file(path), str(path), DataConfig().max_pixels, Depth())
                assert found is not None  # no image of 8 bits that PIL opens
                yield found.values
            else:
                yield image
    except UnreadableImage as error:
        raise UserError(f"{path} cannot be read as an image: {error.reason}") from error


def check_file(path: Path, size: tuple[int, int], annotation: str) -> None:
    """:func:`check_annotation` of a file, of which no more than the header is read if possible."""
    with opened(path) as image:
        check_annotation(image, str(path), size, annotation)


def check_annotation(
    image: Picture | NDArray[Any], name: str, size: tuple[int, int], annotation: str
) -> None:
    """Refuse a mask or boxes that do not fit an image as it is seen.

    Args:
        image: as stored.
        name: what a message calls it.
        size: (width, height) of the annotation.
        annotation: what a message calls that.

    Raises:
        UserError: if the sizes differ, or if EXIF turns the image and the annotation may have been
            made on the picture as it is stored.
    """
    seen = upright(image) if isinstance(image, Image.Image) else image
    if isinstance(image, Image.Image) and seen is not image and size == image.size:
        raise UserError(
            f"{name} is turned by its EXIF orientation, and {annotation} may have been made on the "
            "picture as it is stored; store it upright"
        )
    height, width = size_of(seen)
    if size != (width, height):
        raise UserError(f"{name} is {width} x {height} pixels, {annotation} {size[0]} x {size[1]}")


def _labels_of(image: Image.Image | NDArray[Any], name: str) -> NDArray[np.integer[Any]]:
    """(height, width), the labels of a mask's file: gray values, or indices of a palette."""
    if not isinstance(image, Image.Image):
        if image.shape[2] > 1 or image.dtype.kind not in "bui":
            reason = f"{image.shape[2]} channels of {image.dtype}"
            raise UserError(f"{name} has {reason}; a mask holds one whole number a pixel")
        return image[:, :, 0]
    if image.mode not in ("L", "P", "1", "I") and not image.mode.startswith("I;16"):
        raise UserError(
            f"{name} is an image of mode {image.mode}; a mask holds one label a pixel (L or P)"
        )
    return np.asarray(image)


@SEGMENTATION_SOURCES.register("folders")
class SegmentationFolders(SegmentationSource, DenseFiles):
    """``path/images/{train,val}`` and ``path/masks/{train,val}``, paired by equal stem."""

    def __init__(self, spec: SegmentationSpec, split: Split) -> None:
        if not spec.path:
            raise setting_error(f"{_SETTING}.path", spec.path, "is needed by the source folders")
        DenseFiles.__init__(self, DataConfig())
        self.name, self.void, self.classes = "folders", spec.void, list(spec.classes)
        root = Path(spec.path)
        images, masks = (_stems(root / kind / split, spec.path) for kind in ("images", "masks"))
        for kind, here, there in (("mask", images, masks), ("image", masks, images)):
            lone = sorted({*here} - {*there})
            if lone:
                reason = f"holds {here[lone[0]]} but no {kind} of that stem"
                raise setting_error(f"{_SETTING}.path", spec.path, reason)
        stems = sorted(images)
        self.files, self.masks = [images[s] for s in stems], [masks[s] for s in stems]
        names = [path.relative_to(root).as_posix() for path in self.files]
        self.sample_ids = torch.tensor([name_to_int(name) for name in names])
        if not self.classes:
            found = sorted({int(v) for i in range(min(len(self), 50)) for v in self._values(i)})
            reason = f"must name the classes in order; masks hold {', '.join(map(str, found))}"
            raise setting_error(f"{_SETTING}.classes", (), reason)

    def _values(self, index: int) -> NDArray[np.integer[Any]]:
        return np.unique(self.read_mask(index))

    def read_mask(self, index: int) -> NDArray[np.integer[Any]]:
        path = self.masks[index]
        return _labels_of(read_mask(path), str(path))

    def describe_mask(self, index: int) -> str:
        return str(self.masks[index])

    def verify_size(self, index: int, size: tuple[int, int]) -> None:
        check_file(self.files[index], size, f"its mask {self.masks[index]}")


def _stems(folder: Path, given: str) -> dict[str, Path]:
    """Stem -> file, of the images in a folder."""
    if not folder.is_dir():
        raise setting_error(f"{_SETTING}.path", given, f"has no folder {folder}")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in EXTENSIONS or path.name.startswith("."):
            continue
        stem = one_spelling(path.stem)
        if stem in found:
            reason = f"has two files of one stem: {found[stem]} and {path.name}"
            raise setting_error(f"{_SETTING}.path", given, reason)
        found[stem] = path
    if not found:
        raise setting_error(f"{_SETTING}.path", given, f"has no images in {folder}")
    return found


_VOC_CLASSES = [
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
]  # fmt: skip


class _TorchvisionMasks(SegmentationSource):
    """A data set of torchvision that gives an image and a mask by position."""

    def __init__(self, spec: SegmentationSpec, split: Split) -> None:
        if spec.classes and list(spec.classes) != self.classes:
            reason = f"do not match those of {spec.source}: {', '.join(self.classes)}"
            raise setting_error(f"{_SETTING}.classes", spec.classes, reason)
        self.name = spec.source
        root = Path(spec.path) if spec.path else Path.home() / ".cache/mim/torchvision"
        try:
            root.mkdir(parents=True, exist_ok=True)
            self.dataset = self.open(root, split, spec.download)
        except (RuntimeError, OSError) as error:  # URLError is an OSError
            reason = " ".join(str(error).split())
            how = "the download failed" if spec.download else "download is false"
            where = f"is not in {root.as_posix()} and {how}: {reason}"
            raise setting_error(f"{_SETTING}.source", spec.source, where) from error
        self.sample_ids = torch.arange(len(self.dataset))

    @abstractmethod
    def open(self, root: Path, split: Split, download: bool) -> Any:
        """torchvision's data set."""

    def _pair(self, index: int) -> tuple[Image.Image, Image.Image]:
        try:
            image, mask = self.dataset[index]
        except DECODE_ERRORS as error:
            raise UserError(f"{self.name}: image {index} is unreadable: {error}") from error
        return image, mask

    def image(self, index: int) -> Image.Image:
        return self._pair(index)[0]

    def read_mask(self, index: int) -> NDArray[np.integer[Any]]:
        return _labels_of(self._pair(index)[1], self.describe_mask(index))


@SEGMENTATION_SOURCES.register("torchvision/VOCSegmentation")
class VocMasks(_TorchvisionMasks):
    """Pascal VOC 2012: 20 classes and the background; the rims of objects (255) are void."""

    void = 255
    classes = _VOC_CLASSES

    def open(self, root: Path, split: Split, download: bool) -> Any:
        from torchvision.datasets import VOCSegmentation

        return VOCSegmentation(str(root), "2012", split, download=download)


@SEGMENTATION_SOURCES.register("torchvision/OxfordIIITPet")
class PetMasks(_TorchvisionMasks):
    """Oxford-IIIT Pet's trimaps: pet and background; what is not classified (3) is void."""

    void = 2
    classes = ["pet", "background"]  # noqa: RUF012

    def open(self, root: Path, split: Split, download: bool) -> Any:
        from torchvision.datasets import OxfordIIITPet

        part = "trainval" if split == "train" else "test"
        return OxfordIIITPet(str(root), part, "segmentation", download=download)

    def read_mask(self, index: int) -> NDArray[np.integer[Any]]:
        return super().read_mask(index).astype(np.int32) - 1


@dataclass
class MaskedBatch(Batch):
    """Images of one step with their masks."""

    masks: Tensor = field(kw_only=True)
    """(B, H, W) int64, :data:`VOID` where nothing counts."""


def pair(source: SegmentationSource, index: int, channels: int) -> tuple[Picture, Image.Image]:
    """An image and its mask, of mode I.

    Raises:
        UserError: if one cannot be read or used, or their sizes differ.
    """
    stored = source.image(index)
    image = prepare(stored, channels)
    mask = Image.fromarray(source.mask(index))
    check_annotation(stored, source.describe(index), mask.size, source.describe_mask(index))
    return image, mask


def base_factor(original: tuple[int, int], size: tuple[int, int], resize: int) -> float:
    """Factor that brings an image to the short side ``resize``; 0: until it covers ``size``."""
    return resize / min(original) if resize else cover_factor(original, size)


class SegmentationBatches(DenseBatches):
    """Training views with their masks.

    Args:
        source: see :class:`DenseBatches`, as are ``data``, ``seed``, ``scale`` and ``fill``.
        resize: short side of an image at scale 1; 0: it covers the size.
    """

    source: SegmentationSource

    def __init__(
        self,
        source: SegmentationSource,
        data: DataConfig,
        seed: int,
        resize: int,
        scale: tuple[float, float],
        fill: int | tuple[int, ...],
    ) -> None:
        super().__init__(source, data, seed, scale, fill)
        self.resize = resize

    def read(self, index: int, key: Tensor) -> tuple[NDArray[Any], Tensor]:
        image, mask = pair(self.source, index, self.config.channels)
        factor = base_factor(size_of(image), self.config.size, self.resize)
        view = self.view(image, key, factor)
        labels = torch.from_numpy(view.pixels(mask, VOID, Image.Resampling.NEAREST))
        return view.pixels(image, self.fill), labels.long()

    def collate(self, marks: Sequence[Tensor], **images: Any) -> MaskedBatch:
        return MaskedBatch(**images, masks=torch.stack(list(marks)))


class SegmentationSubset(SegmentationSource):
    """Some images of a source."""

    def __init__(self, source: SegmentationSource, indices: Tensor) -> None:
        self.source, self.indices = source, indices
        self.name, self.classes, self.void = source.name, source.classes, source.void
        self.sample_ids = source.sample_ids[indices]

    def image(self, index: int) -> Any:
        return self.source.image(int(self.indices[index]))

    def read_mask(self, index: int) -> NDArray[np.integer[Any]]:
        return self.source.read_mask(int(self.indices[index]))

    def describe(self, index: int) -> str:
        return self.source.describe(int(self.indices[index]))

    def describe_mask(self, index: int) -> str:
        return self.source.describe_mask(int(self.indices[index]))
