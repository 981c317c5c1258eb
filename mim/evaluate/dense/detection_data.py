"""Images with boxes, and masks of objects where there are any: sources, views, batches.

A new source is one class and its registration in :data:`DETECTION_SOURCES`.

Shapes: B images, C channels, H x W pixels, n objects of an image. Boxes are left, top, right,
bottom in pixels.
"""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from copy import copy
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
from mim.core.files import decode_text
from mim.core.registry import Registry
from mim.core.rng import name_to_int
from mim.data.images.transforms import Picture, prepare, size_of
from mim.data.loader import Batch
from mim.data.sources.base import Split
from mim.evaluate.dense.segmentation_data import DenseFiles, check_annotation, check_file, opened
from mim.evaluate.dense.views import DenseBatches, View, fit_factor, fitted_view, stack_pixels

_SETTING = "evaluations.detect"
_FILES_CHECKED = 2_000
_RIM = 1.0  # pixels by which formats that count from 1 may lie outside
_ID = (int, str)
_COCO: dict[str, dict[str, Any]] = {
    "images": {"id": _ID, "file_name": str, "height": object, "width": object},
    "annotations": {"image_id": _ID, "category_id": _ID, "bbox": object},
    "categories": {"id": _ID, "name": str},
}
"""Lists of COCO's JSON -> what each entry must have, and of which type."""


@dataclass(frozen=True)
class DetectionSpec:
    """Where images with boxes come from: what a source is built from."""

    source: str = "coco"
    """coco or voc."""
    path: str = ""
    """Folder of the data."""
    classes: tuple[str, ...] = ()
    """Names of the classes; by default those that the training annotations name."""
    bad_boxes: str = "refuse"
    """refuse or mend."""


def coco_tools() -> Any:
    """``pycocotools.mask``.

    Raises:
        UserError: if the package is not installed.
    """
    try:
        from pycocotools import mask
    except ImportError as error:
        raise UserError("detect needs pycocotools: pip install -e '.[detect]'") from error
    return mask


@dataclass
class Objects:
    """What is marked in one image."""

    boxes: Tensor
    """(n, 4) float32."""
    labels: Tensor
    """(n,) int64, positions in the classes."""
    crowd: Tensor
    """(n,) bool: a group, or hard to see; not trained on, and no error if found or missed."""
    size: tuple[int, int]
    """(height, width) of the image."""
    outlines: list[Any] | None = None
    """COCO's polygons or run lengths of each object; None without masks."""

    def masks(self) -> Tensor:
        """(n, height, width) bool, of the outlines.

        Raises:
            UserError: if pycocotools is not installed.
        """
        tools = coco_tools()
        height, width = self.size
        found = np.zeros((len(self.labels), height, width), dtype=bool)
        for row, outline in enumerate(self.outlines or []):
            runs = outline
            if isinstance(outline, list):
                runs = tools.merge(tools.frPyObjects(outline, height, width))
            elif isinstance(outline["counts"], list):
                runs = tools.frPyObjects(outline, height, width)
            found[row] = tools.decode(runs)
        return torch.from_numpy(found)


class DetectionSource(DenseFiles):
    """Images with objects. Must pickle, as every source."""

    labels = None
    mean, std = (), ()  # images are normalised as the encoder is used to
    objects: list[Objects]
    """What is marked in each."""
    mended: int = 0
    """How many boxes were cut at the image's rim or, having no area, left out."""

    @property
    def has_masks(self) -> bool:
        """Whether every object has an outline."""
        return any(len(o.labels) for o in self.objects) and all(
            o.outlines is not None for o in self.objects
        )

    def subset(self, indices: Tensor) -> DetectionSource:
        """The images at some positions."""
        part = copy(self)
        part.files = [self.files[i] for i in indices.tolist()]
        part.objects = [self.objects[i] for i in indices.tolist()]
        part.sample_ids = self.sample_ids[indices]
        return part

    def verify(self) -> None:
        """See that the files are there and, of 2,000 at most, that the annotations fit them."""
        for path, objects in zip(self.files, self.objects, strict=True):
            if not path.is_file():
                raise setting_error(f"{_SETTING}.path", str(path), "is annotated but no file")
            if len(self.files) <= _FILES_CHECKED:
                height, width = objects.size
                check_file(path, (width, height), "its annotation")

    def _add(self, root: Path, items: list[tuple[Path, Objects, str]], bad_boxes: str) -> None:
        """Takes images with their objects, and where each was written, for messages."""
        DenseFiles.__init__(self, DataConfig())
        self.files = [path for path, _, _ in items]
        self.objects = [self._checked(o, where, bad_boxes) for _, o, where in items]
        names = [path.relative_to(root).as_posix() for path in self.files]
        self.sample_ids = torch.tensor([name_to_int(name) for name in names], dtype=torch.int64)
        if not items:
            raise setting_error(f"{_SETTING}.path", str(root), "has no annotated images")

    def _checked(self, objects: Objects, where: str, bad_boxes: str) -> Objects:
        height, width = objects.size
        limit = torch.tensor([width, height, width, height], dtype=torch.float32)
        boxes = objects.boxes
        cut = boxes.maximum(torch.zeros(4)).minimum(limit)
        outside = ((boxes - cut).abs() > _RIM).any(1)
        # What a format's rim cuts away says nothing about the box.
        empty = (cut[:, 2:] <= cut[:, :2]).any(1)
        for bad, reason in ((outside, "lies outside its image"), (empty, "has no area")):
            if bad_boxes == "refuse" and bad.any():
                first = int(bad.nonzero()[0])
                shown = ", ".join(f"{value:g}" for value in boxes[first].tolist())
                name = self.classes[int(objects.labels[first])]
                raise UserError(
                    f"{_SETTING}.path: {where}: the box {shown} of a {name} {reason} of "
                    f"{width} x {height} pixels; bad_boxes=mend cuts such boxes, or leaves them out"
                )
        self.mended += int((outside | empty).sum())
        keep = ~empty
        outlines = objects.outlines
        if outlines is not None:
            outlines = [outlines[i] for i in keep.nonzero()[:, 0].tolist()]
        return Objects(cut[keep], objects.labels[keep], objects.crowd[keep], objects.size, outlines)


DetectionFactory: TypeAlias = Callable[[DetectionSpec, Split], DetectionSource]
DETECTION_SOURCES: Registry[DetectionFactory] = Registry(f"{_SETTING}.source")


def open_detection(spec: DetectionSpec, split: Split) -> DetectionSource:
    """The images and boxes that the settings name, checked.

    Raises:
        UserError: for an unknown source, a missing or broken file, a class that is not known, or
            a box outside its image or without an area.
    """
    if not spec.path:
        raise setting_error(f"{_SETTING}.path", spec.path, "is needed: the folder of the data")
    source = DETECTION_SOURCES.get(spec.source)(spec, split)
    source.verify()
    return source


def _inside(folder: Path, name: str, where: str) -> Path:
    """A file of a folder by a name that an annotation gives.

    Raises:
        UserError: if the name leads out of the folder.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"{_SETTING}.path: {where}: the name {name!r} leads out of its folder")
    return folder / name


def _class_index(classes: list[str], name: str, where: str) -> int:
    if name not in classes:
        known = ", ".join(classes)
        raise UserError(f"{_SETTING}.classes: {where}: {name!r} is not one of {known}")
    return classes.index(name)


@DETECTION_SOURCES.register("voc")
class VocBoxes(DetectionSource):
    """Pascal VOC's layout: ``Annotations/*.xml``, ``JPEGImages/``, ``ImageSets/Main/SPLIT.txt``.

    Boxes are taken as written; ``difficult`` ones count as VOC counts them, neither way.
    """

    def __init__(self, spec: DetectionSpec, split: Split) -> None:
        self.name = "voc"
        root = Path(spec.path)
        stems = self._stems(root, split)
        trees = [self._tree(root / "Annotations" / f"{stem}.xml") for stem in stems]
        self.classes = list(spec.classes)
        if not self.classes:
            of_train = trees
            if split != "train":
                names = self._stems(root, "train")
                of_train = [self._tree(root / "Annotations" / f"{stem}.xml") for stem in names]
            found = {o.findtext("name", "") for tree in of_train for o in tree.iter("object")}
            self.classes = sorted(found)
        items = []
        for stem, tree in zip(stems, trees, strict=True):
            where = str(root / "Annotations" / f"{stem}.xml")
            image = _inside(root / "JPEGImages", tree.findtext("filename") or f"{stem}.jpg", where)
            if not image.is_file():
                image = root / "JPEGImages" / f"{stem}.jpg"
            items.append((image, self._objects(tree, image, where), where))
        self._add(root, items, spec.bad_boxes)

    def _stems(self, root: Path, split: str) -> list[str]:
        path = root / "ImageSets" / "Main" / f"{split}.txt"
        if not path.is_file():
            raise setting_error(f"{_SETTING}.path", str(root), f"has no {path}")
        stems = []
        for line in filter(str.strip, decode_text(path.read_bytes()).splitlines()):
            stem = line.strip()
            if not _inside(root / "Annotations", f"{stem}.xml", str(path)).is_file():
                stem = re.sub(r"\s+(-1|0|1)$", "", stem)  # as in the lists of one class
            stems.append(stem)
        return stems

    def _tree(self, path: Path) -> ElementTree.Element:
        try:
            return ElementTree.parse(path).getroot()
        except (OSError, ElementTree.ParseError) as error:
            raise UserError(f"{_SETTING}.path: {path} cannot be read as XML: {error}") from error

    def _objects(self, tree: ElementTree.Element, image: Path, where: str) -> Objects:
        def number(node: ElementTree.Element, key: str) -> float:
            text = node.findtext(key)
            try:
                value = float(text or "")
            except ValueError:
                value = math.nan
            if not math.isfinite(value):
                raise UserError(f"{_SETTING}.path: {where}: {key} is {text!r}, not a number")
            return value

        boxes, labels, crowd = [], [], []
        for node in tree.iter("object"):
            corners = ("xmin", "ymin", "xmax", "ymax")
            boxes.append([number(node, f"bndbox/{corner}") for corner in corners])
            labels.append(_class_index(self.classes, node.findtext("name", ""), where))
            crowd.append(node.findtext("difficult", "0").strip() == "1")
        size = int(number(tree, "size/height")), int(number(tree, "size/width"))
        if min(size) <= 0 and image.is_file():  # some tools leave it at 0 x 0
            with opened(image) as picture:
                size = size_of(picture)
        return Objects(
            torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            torch.tensor(labels, dtype=torch.int64),
            torch.tensor(crowd, dtype=torch.bool),
            size,
        )


@DETECTION_SOURCES.register("coco")
class CocoBoxes(DetectionSource):
    """COCO's JSON: ``annotations/instances_SPLIT*.json`` or ``SPLIT/_annotations.coco.json``.

    Images lie beside the JSON, in ``SPLIT/``, ``SPLIT2017/``, ``images/``, ``images/SPLIT/`` or in
    the folder itself.
    """

    def __init__(self, spec: DetectionSpec, split: Split) -> None:
        self.name = "coco"
        root = Path(spec.path)
        path = self._json(root, split)
        content = self._read(path)
        train = content if split == "train" else self._read(self._json(root, "train"))
        self.classes = list(spec.classes) or self._names(train)
        names = {c["id"]: c["name"] for c in content["categories"]}
        marked: dict[int, list[dict[str, Any]]] = {}
        for item in content["annotations"]:
            marked.setdefault(item["image_id"], []).append(item)
        unknown = sorted({*marked} - {image["id"] for image in content["images"]})
        if unknown:
            raise UserError(f"{_SETTING}.path: {path}: annotates the unknown image {unknown[0]}")
        items = []
        for image in content["images"]:
            where = f"{path}, image {image['file_name']}"
            objects = self._objects(image, marked.get(image["id"], []), names, where)
            items.append((self._find(root, path, split, image["file_name"]), objects, where))
        self._add(root, items, spec.bad_boxes)

    @staticmethod
    def _names(content: dict[str, Any]) -> list[str]:
        used = {item["category_id"] for item in content["annotations"]}
        # Exports often name a supercategory that nothing is marked as.
        return [c["name"] for c in sorted(content["categories"], key=_id_of) if c["id"] in used]

    @staticmethod
    def _json(root: Path, split: str) -> Path:
        folders = ("train",) if split == "train" else ("val", "valid")
        found = sorted(root.glob(f"annotations/instances_{split}*.json"))
        found += [p for f in folders if (p := root / f / "_annotations.coco.json").is_file()]
        if len(found) != 1:
            shown = ", ".join(map(str, found)) or "none"
            reason = f"must hold one annotations/instances_{split}*.json or "
            reason += f"{folders[-1]}/_annotations.coco.json; it holds {shown}"
            raise setting_error(f"{_SETTING}.path", str(root), reason)
        return found[0]

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        try:
            content = json.loads(decode_text(path.read_bytes()))
        except (OSError, ValueError) as error:
            raise UserError(f"{_SETTING}.path: {path} cannot be read as JSON: {error}") from error
        for key, fields in _COCO.items():
            rows = content.get(key) if isinstance(content, dict) else None
            if not isinstance(rows, list):
                raise UserError(f"{_SETTING}.path: {path} is not COCO's: it has no list {key!r}")
            for row in rows:
                given = row if isinstance(row, dict) else {}
                for name, kinds in fields.items():
                    if (value := given.get(name)) is None or not isinstance(value, kinds):
                        shown = "no" if value is None else f"{value!r} for its"
                        reason = f"an entry of {key!r} has {shown} {name!r}"
                        raise UserError(f"{_SETTING}.path: {path}: {reason}")
        return content

    @staticmethod
    def _find(root: Path, json_path: Path, split: str, name: str) -> Path:
        places = (split, f"{split}2017", f"images/{split}", "images", ".")
        for folder in (json_path.parent, *(root / place for place in places)):
            if (file := _inside(folder, name, str(json_path))).is_file():
                return file
        raise setting_error(f"{_SETTING}.path", str(root), f"has no image {name}")

    def _objects(
        self,
        image: dict[str, Any],
        marked: Sequence[dict[str, Any]],
        names: dict[int, str],
        where: str,
    ) -> Objects:
        for key in ("height", "width"):
            if not (_is_number(image[key]) and image[key] >= 1):
                raise UserError(f"{_SETTING}.path: {where}: {key} is {image[key]!r}, not a size")
        boxes, labels, outlines = [], [], []
        for item in marked:
            if item["category_id"] not in names:
                reason = f"the category {item['category_id']} is not among its categories"
                raise UserError(f"{_SETTING}.classes: {where}: {reason}")
            box = item["bbox"]
            if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
                raise UserError(f"{_SETTING}.path: {where}: bbox is {box!r}, not 4 numbers")
            left, top, width, height = box
            boxes.append([left, top, left + width, top + height])
            labels.append(_class_index(self.classes, names[item["category_id"]], where))
            outlines.append(_outline(item.get("segmentation"), image, where))
        return Objects(
            torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            torch.tensor(labels, dtype=torch.int64),
            torch.tensor([bool(item.get("iscrowd", 0)) for item in marked], dtype=torch.bool),
            (int(image["height"]), int(image["width"])),
            None if None in outlines else outlines,
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _id_of(category: dict[str, Any]) -> tuple[bool, Any]:
    return isinstance(category["id"], str), category["id"]


def _outline(given: Any, image: dict[str, Any], where: str) -> Any:
    """COCO's polygons, or run lengths of the whole image; None without any."""
    if not given:
        return None
    if isinstance(given, list):
        is_sound = all(
            isinstance(part, list)
            and len(part) >= 6
            and len(part) % 2 == 0
            and all(map(_is_number, part))
            for part in given
        )
    else:
        runs = given if isinstance(given, dict) else {}
        size, counts = [image["height"], image["width"]], runs.get("counts")
        is_sound = runs.get("size") == size and isinstance(counts, (str, list))
        if isinstance(counts, list):
            is_sound &= all(map(_is_number, counts)) and sum(counts) == math.prod(size)
    if not is_sound:
        reason = "is neither polygons of 3 points or more nor run lengths of the image"
        raise UserError(f"{_SETTING}.path: {where}: the segmentation {str(given)[:60]} {reason}")
    return given


@dataclass
class ObjectBatch(Batch):
    """Images of one step with the objects in them."""

    targets: list[dict[str, Tensor]] = field(kw_only=True)
    """For each image boxes (n, 4), labels (n,) from 1, and masks (n, H, W) uint8 if wanted."""


def picture_of(source: DetectionSource, index: int, channels: int) -> Picture:
    """An image in the wanted channels.

    Raises:
        UserError: if it cannot be read, or has another size than its annotation says.
    """
    stored = source.image(index)
    image = prepare(stored, channels)
    height, width = source.objects[index].size
    check_annotation(stored, source.describe(index), (width, height), "its annotation")
    return image


def target_of(objects: Objects, view: View, with_masks: bool) -> dict[str, Tensor]:
    """The objects of a training view; those of which less than a pixel is left are left out."""
    moved = view.boxes(objects.boxes, objects.size)
    keep = ((moved[:, 2:] - moved[:, :2]) >= 1).all(1) & ~objects.crowd
    target = {"boxes": moved[keep], "labels": objects.labels[keep] + 1}
    if with_masks:
        masks: list[NDArray[np.generic]] = [
            view.pixels(Image.fromarray(m.numpy().astype(np.uint8)), 0, Image.Resampling.NEAREST)
            for m in objects.masks()[keep]
        ]
        stacked = np.stack(masks) if masks else np.zeros((0, *view.size), dtype=np.uint8)
        target["masks"] = torch.from_numpy(stacked)
    return target


class DetectionBatches(DenseBatches):
    """Training views with their objects.

    Args:
        source: see :class:`DenseBatches`, as are ``data``, ``seed`` and ``fill``.
        scale: from and to of the scale; at 1 the image fits into the size (large-scale jitter).
        masks: whether masks of the objects are wanted.
    """

    source: DetectionSource

    def __init__(
        self,
        source: DetectionSource,
        data: DataConfig,
        seed: int,
        scale: tuple[float, float],
        fill: int | tuple[int, ...],
        masks: bool,
    ) -> None:
        super().__init__(source, data, seed, scale, fill)
        self.masks = masks

    def read(self, index: int, key: Tensor) -> tuple[NDArray[Any], dict[str, Tensor]]:
        image = picture_of(self.source, index, self.config.channels)
        view = self.view(image, key, fit_factor(size_of(image), self.config.size))
        return view.pixels(image, self.fill), target_of(
            self.source.objects[index], view, self.masks
        )

    def collate(self, marks: Sequence[dict[str, Tensor]], **images: Any) -> ObjectBatch:
        return ObjectBatch(**images, targets=list(marks))


def whole_images(
    source: DetectionSource, indices: Sequence[int], data: DataConfig, fill: int | tuple[int, ...]
) -> tuple[Tensor, list[View]]:
    """Whole images, scaled until they fit, as (B, C, H, W), and how each was moved."""
    pixels, views = [], []
    for index in indices:
        image = picture_of(source, index, data.channels)
        views.append(fitted_view(size_of(image), data.size))
        pixels.append(views[-1].pixels(image, fill))
    return stack_pixels(pixels), views
