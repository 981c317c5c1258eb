"""Images with boxes: both layouts, masks, views, and every bad input."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mim.core.config import DataConfig
from mim.core.errors import UserError
from mim.data import BatchLoader
from mim.evaluate.dense.detection_data import (
    DetectionBatches,
    DetectionSpec,
    ObjectBatch,
    open_detection,
    whole_images,
)

Box = tuple[str, float, float, float, float]
BOXES: list[list[Box]] = [
    [("cat", 2, 3, 12, 13), ("dog", 20, 4, 30, 24)],
    [("dog", 0, 0, 40, 30)],
    [],
    [("cat", 5, 5, 15, 25)],
]


def picture(path: Path, boxes: Sequence[Box], size: tuple[int, int] = (30, 40)) -> None:
    """White rectangles on black."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((*size, 3), np.uint8)
    for _, left, top, right, bottom in boxes:
        pixels[int(top) : int(bottom), int(left) : int(right)] = 255
    Image.fromarray(pixels).save(path)


def voc(root: Path, part: str, images: Sequence[Sequence[Box]], difficult: str = "") -> None:
    (root / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
    (root / "Annotations").mkdir(exist_ok=True)
    stems = [f"{part}_{number}" for number in range(len(images))]
    (root / f"ImageSets/Main/{part}.txt").write_text("\n".join(stems) + "\n")
    for stem, boxes in zip(stems, images, strict=True):
        picture(root / f"JPEGImages/{stem}.png", boxes)
        objects = "".join(
            f"<object><name>{name}</name><difficult>{int(name == difficult)}</difficult><bndbox>"
            f"<xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>"
            for name, a, b, c, d in boxes
        )
        size = "<size><width>40</width><height>30</height><depth>3</depth></size>"
        text = f"<annotation><filename>{stem}.png</filename>{size}{objects}</annotation>"
        (root / f"Annotations/{stem}.xml").write_text(text)


def coco(root: Path, part: str, images: Sequence[Sequence[Box]], masks: bool = True) -> Path:
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [
            {"id": 0, "name": "animals"},
            {"id": 7, "name": "dog"},
            {"id": 3, "name": "cat"},
        ],
    }
    for number, boxes in enumerate(images):
        name = f"{part}_{number}.png"
        picture(root / part / name, boxes)
        content["images"].append({"id": number, "file_name": name, "height": 30, "width": 40})
        for kind, a, b, c, d in boxes:
            item = {
                "image_id": number,
                "category_id": {"cat": 3, "dog": 7}[kind],
                "bbox": [a, b, c - a, d - b],
                "iscrowd": 0,
            }
            if masks:
                item["segmentation"] = [[a, b, c, b, c, d, a, d]]
            content["annotations"].append(item)
    path = root / f"annotations/instances_{part}2017.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def both(tmp_path: Path) -> Path:
    for part in ("train", "val"):
        voc(tmp_path / "voc", part, BOXES)
        coco(tmp_path / "coco", part, BOXES)
    return tmp_path


def spec(root: Path, source: str, **changes: Any) -> DetectionSpec:
    return DetectionSpec(source, **{"path": str(root / source), **changes})


def test_both_layouts_say_the_same(both: Path) -> None:
    one, other = (open_detection(spec(both, source), "val") for source in ("voc", "coco"))
    assert one.classes == other.classes == ["cat", "dog"] and len(one) == len(other) == 4
    for a, b, boxes in zip(one.objects, other.objects, BOXES, strict=True):
        assert a.boxes.tolist() == b.boxes.tolist() == [list(box[1:]) for box in boxes]
        assert a.labels.tolist() == b.labels.tolist()
        assert a.labels.tolist() == [["cat", "dog"].index(box[0]) for box in boxes]
    assert other.has_masks and not one.has_masks
    few = other.subset(torch.tensor([3, 0]))
    assert few.objects[0] is other.objects[3] and few.describe(1) == other.describe(0)


def test_masks_of_polygons_and_run_lengths(both: Path) -> None:
    pytest.importorskip("pycocotools")
    source = open_detection(spec(both, "coco"), "train")
    masks = source.objects[0].masks()
    assert masks.shape == (2, 30, 40)
    expected = torch.zeros(30, 40, dtype=torch.bool)
    expected[3:13, 2:12] = True
    assert torch.equal(masks[0], expected)
    from pycocotools import mask

    flat = expected.numpy().astype(np.uint8)
    packed = mask.encode(np.asfortranarray(flat))
    columns = flat.T.flatten()
    changes = np.flatnonzero(np.diff(columns)) + 1
    counts = np.diff([0, *changes.tolist(), len(columns)]).tolist()
    packed["counts"] = packed["counts"].decode()
    source.objects[0].outlines = [packed, {"size": [30, 40], "counts": counts}]
    again = source.objects[0].masks()
    assert torch.equal(again[0], expected) and torch.equal(again[1], expected)


def test_views_keep_boxes_masks_and_pixels_together(both: Path) -> None:
    pytest.importorskip("pycocotools")
    source = open_detection(spec(both, "coco"), "train")
    data = DataConfig(image_size=(32, 32), batch_size=4)
    batches = DetectionBatches(source, data, 0, (0.5, 2.0), (0, 0, 0), masks=True)
    objects = 0
    for step in range(8):
        batch = batches.batch(step)
        assert isinstance(batch, ObjectBatch) and batch.images.shape == (4, 3, 32, 32)
        for image, target in zip(batch.images, batch.targets, strict=True):
            assert set(target["labels"].tolist()) <= {1, 2}
            for box, mask in zip(target["boxes"], target["masks"], strict=True):
                objects += 1
                rows, columns = mask.nonzero().T
                found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert [int(v) for v in found] == pytest.approx(box.tolist(), abs=1.01)
                assert image[0][mask.bool()].float().mean() > 200
    assert objects > 16


def test_batches_do_not_depend_on_workers_or_batch_size(both: Path) -> None:
    source = open_detection(spec(both, "voc"), "train")

    def drawn(batch_size: int, workers: int) -> dict[tuple[int, int], Any]:
        data = DataConfig(image_size=16, batch_size=batch_size, workers=workers)
        batches = DetectionBatches(source, data, 3, (0.5, 2.0), (0, 0, 0), masks=False)
        found = {}
        for batch in BatchLoader(batches, range(8 // batch_size), workers=workers):
            assert isinstance(batch, ObjectBatch)
            for row, sample in enumerate(batch.sample_ids.tolist()):
                found[batch.epoch, sample] = batch.images[row], batch.targets[row]["boxes"]
        return found

    one, other = drawn(2, 0), drawn(4, 1)
    assert one.keys() == other.keys() and len(one) == 8
    for key, values in one.items():
        assert all(torch.equal(a, b) for a, b in zip(values, other[key], strict=True))


def test_difficult_objects_are_not_trained_on(tmp_path: Path) -> None:
    voc(tmp_path / "voc", "train", BOXES, difficult="dog")
    source = open_detection(spec(tmp_path, "voc"), "train")
    assert source.objects[0].crowd.tolist() == [False, True]
    data = DataConfig(image_size=(30, 40), batch_size=4)
    batch = DetectionBatches(source, data, 0, (1.0, 1.0), (0, 0, 0), masks=False).batch(0)
    assert {label for t in batch.targets for label in t["labels"].tolist()} == {1}


def test_whole_images_fit(both: Path) -> None:
    source = open_detection(spec(both, "voc"), "val")
    images, views = whole_images(source, [1, 0], DataConfig(image_size=(20, 20)), (9, 9, 9))
    assert images.shape == (2, 3, 20, 20) and views[0].kept == (15, 20)
    assert (images[0, :, :15] == 255).all() and (images[0, :, 15:] == 9).all()


BAD: list[tuple[Box, str]] = [
    (("cat", 30, 5, 50, 9), "of a cat lies outside its image of 40 x 30 pixels"),
    (("cat", 9, -4, 12, 9), "9, -4, 12, 9 of a cat lies outside"),
    (("dog", 9, 4, 9, 8), "of a dog has no area"),
    (("dog", 9, 8, 12, 4), "has no area"),
]


@pytest.mark.parametrize("source", ["voc", "coco"])
@pytest.mark.parametrize(("box", "message"), BAD)
def test_bad_boxes(tmp_path: Path, source: str, box: Box, message: str) -> None:
    write = voc if source == "voc" else coco
    write(tmp_path / source, "train", [BOXES[0], [box, ("cat", 1, 1, 5, 5)]])
    with pytest.raises(UserError) as caught:
        open_detection(spec(tmp_path, source), "train")
    line = str(caught.value)
    assert message in line and "train_1" in line and "bad_boxes=mend" in line and "\n" not in line
    mended = open_detection(spec(tmp_path, source, bad_boxes="mend"), "train")
    assert mended.mended == 1
    boxes = mended.objects[1].boxes.tolist()
    assert boxes[-1] == [1, 1, 5, 5]
    if "area" in message:
        assert len(boxes) == 1 == len(mended.objects[1].labels)
    else:
        assert boxes[0] == [max(box[1], 0), max(box[2], 0), min(box[3], 40), min(box[4], 30)]


def test_a_rim_of_one_pixel_is_no_fault(tmp_path: Path) -> None:
    voc(tmp_path / "voc", "train", [[("cat", 1, 1, 41, 31)]])
    source = open_detection(spec(tmp_path, "voc"), "train")
    assert source.mended == 0 and source.objects[0].boxes.tolist() == [[1, 1, 40, 30]]


def test_bad_files(both: Path) -> None:
    def message(source: str, part: Any = "val", **changes: Any) -> str:
        with pytest.raises(UserError) as caught:
            open_detection(spec(both, source, **changes), part)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "evaluations.detect.source" in message("yolo")
    assert "is needed: the folder of the data" in message("voc", path="")
    assert "nowhere/ImageSets/Main/val.txt" in message("voc", path="nowhere")
    assert "it holds none" in message("coco", path="nowhere")
    assert "'dog' is not one of cat, bird" in message("voc", classes=("cat", "bird"))
    voc(both / "voc", "val", [[("bird", 1, 1, 5, 5)]])
    assert "'bird' is not one of cat, dog" in message("voc")
    xml = both / "voc/Annotations/val_0.xml"
    xml.write_text(xml.read_text().replace("<xmin>1<", "<xmin>one<").replace("bird", "cat"))
    assert "bndbox/xmin is 'one', not a number" in message("voc")
    xml.write_text("<annotation>")
    assert "cannot be read as XML" in message("voc")

    path = both / "coco/annotations/instances_val2017.json"
    content = json.loads(path.read_text())
    image, box = content["images"][0], content["annotations"][0]

    def first(**changes: Any) -> dict[str, Any]:
        return {"images": [{**image, **changes}, *content["images"][1:]]}

    for change, expected in (
        ({"annotations": 3}, "has no list 'annotations'"),
        ({"images": [{"id": 0}]}, "an entry of 'images' has no 'file_name'"),
        (first(file_name=None), "an entry of 'images' has no 'file_name'"),
        (first(file_name="../x.png"), "'../x.png' leads out of its folder"),
        (first(file_name="/x.png"), "'/x.png' leads out of its folder"),
        (first(height="tall"), "height is 'tall', not a size"),
        ({"annotations": [{**box, "bbox": [1, None, 3, 4]}]}, "not 4 numbers"),
        ({"annotations": [{**box, "bbox": None}]}, "an entry of 'annotations' has no 'bbox'"),
        ({"annotations": [{**box, "image_id": [0]}]}, "has [0] for its 'image_id'"),
        (first(file_name=7), "an entry of 'images' has 7 for its 'file_name'"),
        ({"categories": [{"id": 1, "name": ["cat"]}]}, "has ['cat'] for its 'name'"),
        ({"annotations": [{**box, "segmentation": [[1, 2, 3, 4]]}]}, "is neither polygons of 3"),
        ({"annotations": [{**box, "segmentation": "round"}]}, "is neither polygons of 3"),
        (
            {"annotations": [{**box, "segmentation": {"size": [30, 40], "counts": [9]}}]},
            "nor run lengths of the image",
        ),
        ({"images": content["images"][:1]}, "annotates the unknown image 1"),
        ({"categories": content["categories"][:2]}, "category 3 is not among its categories"),
    ):
        path.write_text(json.dumps({**content, **change}))
        assert expected in message("coco")
    path.write_text(json.dumps(content))
    (both / "coco/val/val_1.png").unlink()
    assert "has no image val_1.png" in message("coco")
    path.write_text("{")
    assert "cannot be read as JSON" in message("coco")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks(both: Path, encoding: str) -> None:
    for name in ("coco/annotations/instances_val2017.json", "voc/ImageSets/Main/val.txt"):
        (both / name).write_text((both / name).read_text(), encoding)
    for layout in ("coco", "voc"):
        assert len(open_detection(spec(both, layout), "val")) == len(BOXES)


def test_ids_may_be_numbers_and_words(both: Path) -> None:
    path = both / "coco/annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    before = open_detection(spec(both, "coco"), "train")
    for row in [c for c in content["categories"] if c["id"] == 3] + content["annotations"]:
        key = "id" if "name" in row else "category_id"
        row[key] = "three" if row[key] == 3 else row[key]
    path.write_text(json.dumps(content))
    after = open_detection(spec(both, "coco"), "train")
    assert sorted(after.classes) == sorted(before.classes)
    for one, other in zip(after.objects, before.objects, strict=True):
        names = [[s.classes[i] for i in o.labels] for s, o in ((after, one), (before, other))]
        assert names[0] == names[1]


def test_an_image_of_another_size_than_annotated(both: Path) -> None:
    picture(both / "voc/JPEGImages/train_1.png", [], size=(20, 20))
    with pytest.raises(UserError, match=r"train_1\.png is 20 x 20 pixels, its annotation 40 x 30"):
        open_detection(spec(both, "voc"), "train")


def test_an_image_that_exif_turns(both: Path) -> None:
    path = both / "coco/train/train_0.png"
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.open(path).save(path, exif=exif)
    with pytest.raises(UserError, match=r"train_0\.png is turned by its EXIF orientation"):
        open_detection(spec(both, "coco"), "train")


def test_voc_files_as_tools_write_them(both: Path) -> None:
    """Names with spaces, flags behind names, sizes left at 0; but no way out of the folder."""
    root = both / "voc"
    for old, new in (("train_0", "my train 1"), ("train_1", "plain")):
        (root / f"Annotations/{old}.xml").rename(root / f"Annotations/{new}.xml")
        (root / f"JPEGImages/{old}.png").rename(root / f"JPEGImages/{new}.png")
        xml = root / f"Annotations/{new}.xml"
        text = xml.read_text().replace(old, new)
        xml.write_text(text.replace("<width>40", "<width>0").replace("<height>30", "<height>0"))
    names = root / "ImageSets/Main/train.txt"
    names.write_text("my train 1\nplain  -1\n\n")
    source = open_detection(spec(both, "voc"), "train")
    assert [path.stem for path in source.files] == ["my train 1", "plain"]
    assert [marked.size for marked in source.objects] == [(30, 40)] * 2
    assert source.objects[0].boxes[0].tolist() == list(BOXES[0][0][1:])
    xml.write_text(xml.read_text().replace("plain.png", "../plain.png"))
    with pytest.raises(UserError, match=r"'\.\./plain\.png' leads out of its folder"):
        open_detection(spec(both, "voc"), "train")
    names.write_text("../plain\n")
    with pytest.raises(UserError, match=r"'\.\./plain\.xml' leads out of its folder"):
        open_detection(spec(both, "voc"), "train")
