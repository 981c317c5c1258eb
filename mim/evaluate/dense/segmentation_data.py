"""Images with a label for each pixel: where they come from, their training views, their batches.

A new source is one class and its registration in :data:`SEGMENTATION_SOURCES`.

Shapes: B images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mim.core.config import DataConfig
from mim.core.errors import UserError, setting_error
from mim.core.keys import image_keys, name_to_int, permutation
from mim.core.registry import Registry
from mim.data.images.decode import (
    DECODE_ERRORS,
    EXTENSIONS,
    UnreadableImage,
    open_image,
    open_regular,
    read_picture,
)
from mim.data.images.transforms import prepare
from mim.data.loader import Batch, StepBatches, steps_per_epoch
from mim.data.sources.base import ImageSource, Split
from mim.evaluate.dense.views import cover_factor, stack_pixels, training_view

VOID = -1
"""Label, within the project, of the pixels that never count."""
# Reading so many masks takes some seconds; of larger sets a bad mask shows when it is read.
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


class SegmentationSource(ImageSource):
    """Images with masks. Must pickle, as every source."""

    labels = None
    mean, std = (), ()  # images are normalised as the encoder is used to
    void: int
    """Label in the files that becomes :data:`VOID`."""

    @abstractmethod
    def read_mask(self, index: int) -> NDArray[np.integer[Any]]:
        """(height, width), the labels as they stand in the file."""

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

    def verify(self) -> None:
        """Reads every mask, if they are 2,000 at most."""
        if len(self) <= _MASKS_CHECKED:
            for index in range(len(self)):
                self.mask(index)


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
    source.verify()
    return source


def read_image(path: Path) -> Image.Image:
    """A decoded image.

    Raises:
        UserError: if it cannot be read; names the file.
    """
    try:
        image = read_picture(path, str(path), DataConfig().max_pixels, "pil")
    except UnreadableImage as error:
        raise UserError(f"{path} cannot be read as an image: {error.reason}") from error
    if not isinstance(image, Image.Image):
        raise UserError(f"{path} is an array, which has no masks or boxes")
    return image


def _labels_of(image: Image.Image, name: str) -> NDArray[np.integer[Any]]:
    """(height, width), the labels of a mask's file: gray values, or indices of a palette."""
    if image.mode not in ("L", "P", "1", "I") and not image.mode.startswith("I;16"):
        raise UserError(
            f"{name} is an image of mode {image.mode}; a mask holds one label a pixel (L or P)"
        )
    return np.asarray(image)


@SEGMENTATION_SOURCES.register("folders")
class SegmentationFolders(SegmentationSource):
    """``path/images/{train,val}`` and ``path/masks/{train,val}``, paired by equal stem."""

    def __init__(self, spec: SegmentationSpec, split: Split) -> None:
        if not spec.path:
            raise setting_error(f"{_SETTING}.path", spec.path, "is needed by the source folders")
        self.name, self.void, self.classes = "folders", spec.void, list(spec.classes)
        root = Path(spec.path)
        images, masks = (_stems(root / kind / split, spec.path) for kind in ("images", "masks"))
        for kind, here, there in (("mask", images, masks), ("image", masks, images)):
            lone = sorted({*here} - {*there})
            if lone:
                reason = f"holds {here[lone[0]]} but no {kind} of that stem"
                raise setting_error(f"{_SETTING}.path", spec.path, reason)
        stems = sorted(images)
        self.images, self.masks = [images[s] for s in stems], [masks[s] for s in stems]
        names = [path.relative_to(root).as_posix() for path in self.images]
        self.sample_ids = torch.tensor([name_to_int(name) for name in names])
        if not self.classes:
            found = sorted({int(v) for i in range(min(len(self), 50)) for v in self._values(i)})
            reason = f"must name the classes in order; masks hold {', '.join(map(str, found))}"
            raise setting_error(f"{_SETTING}.classes", (), reason)

    def _values(self, index: int) -> NDArray[np.integer[Any]]:
        return np.unique(self.read_mask(index))

    def image(self, index: int) -> Image.Image:
        return read_image(self.images[index])

    def read_mask(self, index: int) -> NDArray[np.integer[Any]]:
        path = self.masks[index]
        return _labels_of(read_image(path), str(path))

    def describe(self, index: int) -> str:
        return str(self.images[index])

    def describe_mask(self, index: int) -> str:
        return str(self.masks[index])

    def verify(self) -> None:
        """Compares the sizes of images and masks, and reads every mask, as far as they are few."""
        super().verify()
        for index in range(len(self)) if len(self) <= _MASKS_CHECKED else ():
            try:
                with (
                    open_regular(self.images[index]) as one,
                    open_regular(self.masks[index]) as two,
                ):
                    sizes = open_image(one).size, open_image(two).size
            except DECODE_ERRORS as error:
                raise UserError(f"{self.images[index]} cannot be read as an image") from error
            _check_sizes(self, index, *sizes)


def _check_sizes(
    source: SegmentationSource, index: int, image: tuple[int, int], mask: tuple[int, int]
) -> None:
    if image != mask:
        raise UserError(
            f"{source.describe_mask(index)} is {mask[0]} x {mask[1]} pixels, its image "
            f"{image[0]} x {image[1]}"
        )


def _stems(folder: Path, given: str) -> dict[str, Path]:
    """Stem -> file, of the images in a folder."""
    if not folder.is_dir():
        raise setting_error(f"{_SETTING}.path", given, f"has no folder {folder}")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in EXTENSIONS or path.name.startswith("."):
            continue
        if path.stem in found:
            reason = f"has two files of one stem: {found[path.stem]} and {path.name}"
            raise setting_error(f"{_SETTING}.path", given, reason)
        found[path.stem] = path
    if not found:
        raise setting_error(f"{_SETTING}.path", given, f"has no images in {folder}")
    return found


_VOC_CLASSES = [
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
]


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


def pair(source: SegmentationSource, index: int, channels: int) -> tuple[Image.Image, Image.Image]:
    """An image and its mask, of mode I.

    Raises:
        UserError: if one cannot be read or used, or their sizes differ.
    """
    image = prepare(source.image(index), channels)
    if not isinstance(image, Image.Image):
        raise setting_error("data.channels", channels, "must be 1 or 3 for images with masks")
    mask = Image.fromarray(source.mask(index))
    _check_sizes(source, index, image.size, mask.size)
    return image, mask


def base_factor(original: tuple[int, int], size: tuple[int, int], resize: int) -> float:
    """Factor that brings an image to the short side ``resize``; 0: until it covers ``size``."""
    return resize / min(original) if resize else cover_factor(original, size)


class SegmentationBatches(StepBatches):
    """Step -> training views with their masks, a pure function.

    Args:
        source: the training images.
        data: size, channels, batch_size and flip are read.
        seed: order and views follow from it.
        resize: short side of an image at scale 1; 0: it covers the size.
        scale: from and to of the scale.
        fill: value of each channel, 0 to 255, of the padding.
    """

    def __init__(
        self,
        source: SegmentationSource,
        data: DataConfig,
        seed: int,
        resize: int,
        scale: tuple[float, float],
        fill: Sequence[int],
    ) -> None:
        super().__init__(source, data)
        self.pairs, self.seed, self.resize, self.scale = source, seed, resize, scale
        self.fill = tuple(fill) if len(fill) > 1 else fill[0]
        self.per_epoch = steps_per_epoch(source, data)

    def batch(self, number: int) -> MaskedBatch:
        epoch, position = divmod(number, self.per_epoch)
        order = permutation(self.seed, epoch, len(self.pairs))
        size, count = self.config.size, self.config.batch_size
        indices = order[position * count : (position + 1) * count]
        ids = self.pairs.sample_ids[indices]
        keys = image_keys(self.seed, epoch, ids, purpose="augment")
        images, masks = [], []
        for index, key in zip(indices.tolist(), keys, strict=True):
            image, mask = pair(self.pairs, index, self.config.channels)
            original = image.height, image.width
            factor = base_factor(original, size, self.resize)
            view = training_view(key[None], original, size, factor, self.scale, self.config.flip)
            images.append(view.pixels(image, self.fill))
            masks.append(torch.from_numpy(view.pixels(mask, VOID, Image.Resampling.NEAREST)))
        return MaskedBatch(
            images=stack_pixels(images),
            labels=None,
            sample_ids=ids,
            epoch=epoch,
            step=number,
            masks=torch.stack(masks).long(),
        )


class SegmentationSubset(SegmentationSource):
    """Some images of a source.

    Args:
        source: what to choose from.
        indices: (m,) positions in it.
    """

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
