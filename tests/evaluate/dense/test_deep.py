"""Dense tasks on images of more than 8 bits, or of 4 channels: one reader from training to files.

The pictures are those of the other tests, as 16-bit numbers that are all below 256, of which a
reader of the upper byte sees nothing, or as floats of four channels with a pixel that is no number.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mim.core.config import Config
from mim.core.errors import UserError
from mim.evaluate import Detect, Encoder, Segment, build_evaluation
from mim.evaluate.dense.segment import intersection_over_union
from mim.evaluate.dense.training import found_range, read_as, with_range

SEGMENT: dict[str, Any] = {
    **{"classes": ["dark", "light"], "void": 9, "image_size": [16, 24], "epochs": 12},
    **{"batch_size": 4, "lr": 1e-2, "width": 16, "layer_decay": 1.0, "drop_path": 0.0},
    **{"held_out": 0.25, "pictures": 2, "head": "linear"},
}
DETECT: dict[str, Any] = {
    **{"image_size": [32, 48], "epochs": 1, "batch_size": 4, "lr": 3e-3, "width": 16},
    **{"scales": [2, 1], "anchor": 3.0, "proposals": 50, "samples": 16, "held_out": 0.2},
    **{"layer_decay": 1.0, "drop_path": 0.0, "pictures": 2, "scale": [0.9, 1.1]},
}


@pytest.fixture(params=["sixteen bits", "four channels"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def config(config: Config, kind: str) -> Config:
    if kind == "sixteen bits":
        return config
    data = replace(config.data, channels=4, nonfinite=0.0, mean=(0.5,) * 4, std=(0.25,) * 4)
    return replace(config, data=data)


def rewrite(image: Path, kind: str) -> Path:
    """The image of a file in another file in its place."""
    pixels = np.asarray(Image.open(image))
    image.unlink()
    if kind == "sixteen bits":
        deep = pixels.astype(np.uint16)
    else:
        deep = np.moveaxis(pixels[:, :, [0, 1, 2, 0]], 2, 0) / np.float32(10)
        deep[0, 0, 0] = np.nan
    np.save(image.with_suffix(".npy"), deep)
    return image.with_suffix(".npy")


@pytest.fixture
def deep_scenes(scenes: Path, kind: str, tmp_path: Path) -> Path:
    root = Path(shutil.copytree(scenes, tmp_path / "deep"))
    for image in sorted((root / "images").rglob("*.png")):
        if kind == "sixteen bits":
            pixels = np.asarray(Image.open(image))[:, :, 0]
            Image.fromarray(pixels.astype(np.uint16)).save(image)
        else:
            rewrite(image, kind)
    if kind == "four channels":
        for mask in sorted((root / "masks").rglob("*.png")):
            np.save(mask.with_suffix(".npy"), np.asarray(Image.open(mask)))
            mask.unlink()
    return root


def mask_of(path: Path) -> np.ndarray[Any, Any]:
    return np.asarray(np.load(path) if path.suffix == ".npy" else Image.open(path))


def test_segmentation_reads_all_bits_and_so_does_prediction(
    encoder: Encoder,
    new_run: Callable[[str], Path],
    deep_scenes: Path,
    kind: str,
    tmp_path: Path,
    mim: Callable[..., Any],
) -> None:
    run, maps = new_run("run"), tmp_path / "maps"
    given = [f"{key}={json.dumps(value)}" for key, value in SEGMENT.items()]
    outcome = mim("evaluate", "segment", run, "--set", f"path={deep_scenes}", *given)
    assert outcome.code == 0, outcome.err
    top = 255 if kind == "sixteen bits" else 20.9
    assert f"data.range=auto: 0 to {top} become 0 to 1" in outcome.err
    numbers = json.loads((run / "result.json").read_text())["evaluations"]["segment"]
    assert numbers["miou"] > 0.7, numbers
    with Image.open(run / "pictures/segment.png") as picture:
        assert picture.width > picture.height > 100
    outcome = mim("predict", run, deep_scenes / "images" / "val", "--output", maps)
    assert outcome.code == 0, outcome.err
    assert "become 0 to 1" not in outcome.err, "the range is the head's"
    confusion = torch.zeros(2, 2, dtype=torch.int64)
    for file in sorted((deep_scenes / "masks" / "val").iterdir()):
        truth = torch.from_numpy(mask_of(file).copy()).long()
        found = torch.from_numpy(np.array(Image.open(maps / f"{file.stem}.png"))).long()
        for label in (0, 1):
            confusion[label] += found[truth == label].bincount(minlength=2)
    assert float(intersection_over_union(confusion).mean()) == pytest.approx(numbers["miou"])
    if kind == "sixteen bits":
        old = replace(encoder, data=replace(encoder.data, range="high_byte"))
        evaluation = build_evaluation("segment", {**SEGMENT, "path": str(deep_scenes)})
        assert isinstance(evaluation, Segment)
        assert evaluation.run(old)["miou"] < 0.6, "the upper byte is black"


def test_detection_sees_what_8_bits_show(
    encoder: Encoder,
    new_run: Callable[[str], Path],
    squares: Path,
    kind: str,
    tmp_path: Path,
    mim: Callable[..., Any],
) -> None:
    pytest.importorskip("pycocotools")
    from mim.evaluate.dense.detection_data import whole_images

    root = Path(shutil.copytree(squares, tmp_path / "deep"))
    for part in ("train", "val"):
        listed = root / f"annotations/instances_{part}.json"
        content = json.loads(listed.read_text())
        for image in content["images"]:
            image["file_name"] = rewrite(root / part / image["file_name"], kind).name
        listed.write_text(json.dumps(content))
    plain, deep = (
        build_evaluation("detect", {**DETECT, "path": str(path)}) for path in (squares, root)
    )
    assert isinstance(plain, Detect) and isinstance(deep, Detect)
    span = found_range(encoder.data, deep.sources[0])
    assert span == pytest.approx((0, 255 if kind == "sixteen bits" else 25.5))
    source = read_as(deep.sources[0], with_range(encoder.data, span))
    data = replace(encoder.data, image_size=(40, 40))
    seen, _ = whole_images(source, [0, 1], data, 7)
    plainly = replace(data, channels=3, mean=None, std=None)
    expected, _ = whole_images(plain.sources[0], [0, 1], plainly, 7)
    assert seen.dtype == torch.float32 and seen.shape == (2, encoder.data.channels, 40, 40)
    # One pixel of the first of four channels was NaN; PIL rounds bytes twice.
    assert (seen[:, 1:3] * 255 - expected[:, 1:]).abs().max() <= 2

    run = new_run("run")
    given = [f"{key}={json.dumps(value)}" for key, value in DETECT.items()]
    outcome = mim("evaluate", "detect", run, "--set", f"path={root}", *given)
    assert outcome.code == 0, outcome.err
    assert (run / "pictures/detect.png").is_file()
    boxes = tmp_path / "boxes.json"
    outcome = mim("predict", run, root / "val", "--output", boxes)
    assert outcome.code == 0, outcome.err
    assert {box["file"] for box in json.loads(boxes.read_text())} <= {f"{n}.npy" for n in range(6)}


@pytest.mark.parametrize("kind", ["four channels"])  # whose masks are arrays
def test_a_mask_of_numbers_with_a_point_is_refused(deep_scenes: Path, encoder: Encoder) -> None:
    mask = deep_scenes / "masks/train/0.npy"
    np.save(mask, np.load(mask).astype(np.float32))
    evaluation = build_evaluation("segment", {**SEGMENT, "path": str(deep_scenes)})
    assert isinstance(evaluation, Segment)
    with pytest.raises(UserError, match=r"0\.npy has 1 channels of float32; a mask holds one"):
        evaluation.run(encoder)
