"""Detection: mAP of known predictions, training, masks, files of models, bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchmetrics.detection import MeanAveragePrecision

pytest.importorskip("pycocotools")

from mim.core.config import Config, DataConfig
from mim.core.errors import UserError
from mim.evaluate import Detect, Encoder, build_evaluation, evaluate
from mim.evaluate.dense.detect import Detector, _original
from mim.evaluate.dense.detection_data import DetectionBatches
from mim.evaluate.dense.training import encoder_at_size, parameter_groups
from mim.evaluate.dense.views import View
from mim.evaluate.predictions import Measured
from mim.evaluate.training import start_accelerator

SHORT: dict[str, Any] = {
    "image_size": [32, 48],
    "epochs": 1,
    "batch_size": 4,
    "lr": 3e-3,
    "width": 16,
    "scales": [2, 1],
    "anchor": 3.0,
    "proposals": 50,
    "samples": 16,
    "layer_decay": 1.0,
    "drop_path": 0.0,
    "held_out": 0.2,
    "pictures": 2,
    "scale": [0.9, 1.1],
}


@pytest.fixture
def config(config: Config) -> Config:
    """Two blocks, which learn faster."""
    args = {**config.model.backbone_args, "depth": 2}
    return replace(config, model=replace(config.model, backbone_args=args))


def detect(squares: Path, **changes: Any) -> Detect:
    built = build_evaluation("detect", {**SHORT, "path": str(squares), **changes})
    assert isinstance(built, Detect)
    return built


def known(monkeypatch: pytest.MonkeyPatch, shift: float, labels_off: int = 0) -> None:
    """Predictions that are the truth, moved."""

    def predict(self: Detect, model: Any, source: Any, indices: list[int], *args: Any) -> Any:
        return [
            {
                "boxes": source.objects[i].boxes + shift,
                "labels": (source.objects[i].labels + labels_off) % 2,
                "scores": torch.ones(len(source.objects[i].labels)),
                "masks": source.objects[i].masks(),
            }
            for i in indices
        ]

    monkeypatch.setattr(Detect, "predict", predict)


def measured(squares: Path, encoder: Encoder) -> dict[str, float]:
    evaluation = detect(squares)
    s = evaluation.settings
    model = Detector(encoder_at_size(encoder, s), s, ["red", "green"], (0.5,) * 3, (1.0,) * 3, True)
    return evaluation.measure(model, evaluation.sources[1], start_accelerator("cpu"), "fp32")


def test_map_of_known_predictions(
    squares: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    known(monkeypatch, 0.0)
    numbers = measured(squares, encoder)
    assert numbers["map"] == numbers["map_50"] == numbers["mask_map"] == pytest.approx(1)
    assert numbers["map_class_red"] == numbers["map_class_green"] == pytest.approx(1)
    # 18 x 16 moved by 2 both ways overlaps 16 x 14: IoU 224 / (2 * 288 - 224) = 0.636, which
    # passes at 0.5, 0.55 and 0.6 of COCO's ten thresholds.
    known(monkeypatch, 2.0)
    numbers = measured(squares, encoder)
    assert numbers["map"] == pytest.approx(0.3) and numbers["map_75"] == 0
    assert numbers["mask_map"] == pytest.approx(1)
    known(monkeypatch, 0.0, labels_off=1)
    assert measured(squares, encoder)["map"] == 0


def test_each_image_with_objects_has_an_answer(
    squares: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    known(monkeypatch, 2.0)
    evaluation = detect(squares)
    source, s = evaluation.sources[1], evaluation.settings
    whole = Detect.predict

    def predict(self: Detect, model: Any, source: Any, indices: list[int], *args: Any) -> Any:
        found = whole(self, model, source, indices, *args)
        for index, own in zip(indices, found, strict=True):
            own["boxes"] = own["boxes"] - 2.0 * (index == 1)  # exactly the truth
        return found

    monkeypatch.setattr(Detect, "predict", predict)
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "outlines": []}
    empty = replace(source.objects[2], **nothing, crowd=torch.zeros(0).bool())
    monkeypatch.setattr(source, "objects", [*source.objects[:2], empty, *source.objects[3:]])
    model = Detector(encoder_at_size(encoder, s), s, ["red", "green"], (0.5,) * 3, (1.0,) * 3, True)
    numbers = evaluation.measure(model, source, start_accelerator("cpu"), "fp32")
    assert isinstance(numbers, Measured)
    expected = [0.3, 1.0, *[0.3] * (len(source) - 3)]
    assert numbers.arrays["image_map"].tolist() == pytest.approx(expected)
    assert numbers.arrays["mask_image_map"].tolist() == pytest.approx([1.0] * len(expected))
    ids = source.sample_ids.tolist()
    assert numbers.arrays["sample_ids"].tolist() == ids[:2] + ids[3:]
    assert numbers["image_map"] == pytest.approx(sum(expected) / len(expected))
    assert numbers["map"] < numbers["image_map"]  # over all images at once


def test_found_objects_return_to_the_images_pixels() -> None:
    view = View(scaled=(16, 24), corner=(0, 0), size=(16, 32))
    masks = torch.zeros(1, 1, 16, 32)
    masks[..., 4:8, 6:12] = 1
    found = {
        "boxes": torch.tensor([[6.0, 4.0, 12.0, 8.0]]),
        "labels": torch.tensor([2]),
        "scores": torch.tensor([0.9]),
        "masks": masks,
    }
    result = _original(found, view, (32, 48))
    assert result["boxes"].tolist() == [[12, 8, 24, 16]] and result["labels"].tolist() == [1]
    rows, columns = result["masks"][0].nonzero().T
    assert (columns.min(), columns.max() + 1, rows.min(), rows.max() + 1) == (12, 24, 8, 16)


def test_boxes_and_masks_from_training_to_file(
    squares: Path, encoder: Encoder, tmp_path: Path
) -> None:
    assert encoder.vit is not None
    before = {k: v.clone() for k, v in encoder.vit.state_dict().items()}
    numbers = detect(squares).run(encoder, folder=tmp_path)
    assert {"map", "mask_map", "chosen_map", "train_loss"} <= {*numbers}
    assert numbers["chosen_epoch"] == 1
    assert all(torch.equal(v, before[k]) for k, v in encoder.vit.state_dict().items())
    with Image.open(tmp_path / "pictures/detect.png") as picture:
        assert picture.width > 400
    again = detect(squares, weights=str(tmp_path / "detect.safetensors")).run(encoder)
    assert again == {k: v for k, v in numbers.items() if k in again} and "map" in again
    with pytest.raises(UserError, match="has the head of detect; segment needs its own"):
        given = {"weights": str(tmp_path / "detect.safetensors"), "classes": ["a", "b"]}
        shape = {"image_size": [32, 48], "width": 16, "path": str(_scene(tmp_path))}
        evaluate(encoder, {"segment": {**given, **shape}})


@pytest.mark.slow
def test_it_learns(squares: Path, encoder: Encoder) -> None:
    numbers = detect(squares, epochs=20, measure_every=10).run(encoder)
    assert numbers["map_50"] > 0.4 and numbers["mask_map_50"] > 0.3, numbers
    assert numbers["chosen_epoch"] in (10, 20)


def test_a_batch_can_be_learnt(squares: Path, encoder: Encoder) -> None:
    evaluation = detect(squares, masks=False)
    s = evaluation.settings
    classes = ["red", "green"]
    vit = encoder_at_size(encoder, s)
    model = Detector(vit, s, classes, (0.5,) * 3, (0.25,) * 3, False).train()
    data = DataConfig(image_size=(32, 48), batch_size=4)
    source = evaluation.sources[0]
    batch = DetectionBatches(source, data, 0, (1.0, 1.0), (0, 0, 0), False).batch(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for step in range(25):
        loss = model.loss(replace(batch, epoch=step))  # other regions are drawn
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0], losses
    assert all(p.grad is not None for p in model.parameters())


def _scene(root: Path) -> Path:
    for kind in ("images", "masks"):
        for part in ("train", "val"):
            (root / "scene" / kind / part).mkdir(parents=True)
            for name in ("a", "b"):
                pixels = Image.new("L", (48, 32))
                pixels.putpixel((0, 0), 1)
                pixels.save(root / "scene" / kind / part / f"{name}.png")
    return root / "scene"


def test_a_frozen_encoder_stays(squares: Path, encoder: Encoder, tmp_path: Path) -> None:
    assert encoder.vit is not None
    evaluation = detect(squares, freeze=True, masks=False, pictures=0)
    numbers = evaluation.run(encoder, folder=tmp_path)
    assert not any(key.startswith("mask_") for key in numbers)
    s = evaluation.settings
    vit = encoder_at_size(encoder, s)
    model = Detector(vit, s, ["red", "green"], (0.5,) * 3, (0.25,) * 3, False)
    own = {id(p) for g in parameter_groups(model, s) for p in g["params"]}
    assert not own & {id(p) for p in vit.parameters()}
    model.load(tmp_path / "detect.safetensors")
    for key, value in encoder.vit.state_dict().items():
        if key != "pos_embed":
            assert torch.equal(vit.state_dict()[key], value), key
    assert not (tmp_path / "pictures").exists()
    model.train()
    assert not vit.training and model.network.training


def test_killed_and_gone_on_it_computes_the_same(
    squares: Path, encoder: Encoder, tmp_path: Path
) -> None:
    """16 images, 4 steps an epoch; what the heads sample is drawn by seed and step."""
    recipe: dict[str, Any] = {"epochs": 2, "drop_path": 0.5, "masks": False, "pictures": 0}
    whole = detect(squares, **recipe).run(encoder, folder=tmp_path / "whole")
    steps: list[int] = []
    real = Detector.loss

    def loss(self: Detector, batch: Any) -> torch.Tensor:
        steps.append(batch.step)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return real(self, batch)

    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Detector, "loss", loss)
        with pytest.raises(KeyboardInterrupt):
            detect(squares, **recipe).run(encoder, folder=run)
        assert (run / "evaluations" / "detect.pt").is_file()
        torch.manual_seed(7)
        again = detect(squares, **recipe).run(encoder, folder=run)
    assert steps == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7] and again == whole
    assert not list((run / "evaluations").glob("*.pt"))


def test_the_same_seed_gives_the_same_numbers(squares: Path, encoder: Encoder) -> None:
    torch.manual_seed(1)
    first = detect(squares, masks=False).run(encoder)
    torch.manual_seed(2)
    assert detect(squares, masks=False).run(encoder) == first


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"bad_boxes": "drop"}, "evaluations.detect.bad_boxes: 'drop' is not one of mend, refuse"),
        ({"anchor": 0.0}, "evaluations.detect.anchor: 0.0 must be above 0"),
        ({"source": "cocoo"}, "did you mean 'coco'?"),
        ({"path": ""}, "is needed: the folder of the data"),
        ({"image_size": [30, 48]}, "is not divisible by the patch, 4 x 4"),
        ({"classes": ["red"]}, "'green' is not one of red"),
    ],
)
def test_bad_settings(squares: Path, encoder: Encoder, changes: Any, line: str) -> None:
    with pytest.raises(UserError) as caught:
        evaluate(encoder, {"detect": {**SHORT, "path": str(squares), **changes}})
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_without_pycocotools_one_line_says_so(
    squares: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[detect\]'"):
        evaluate(encoder, {"detect": {**SHORT, "path": str(squares)}})


def test_from_the_command_line(
    mim: Callable[..., Any], squares: Path, new_run: Callable[[str], Path]
) -> None:
    run = new_run("run")
    pairs = [f"{key}={json.dumps(value)}" for key, value in SHORT.items()]
    outcome = mim("evaluate", "detect", run, "--set", *pairs, f"path={squares}", "masks=false")
    assert outcome.code == 0 and "Detection, mAP (%)" in outcome.out
    result = json.loads((run / "result.json").read_text())
    assert "map_50" in result["evaluations"]["detect"]
    assert (run / "pictures/detect.png").is_file() and (run / "detect.safetensors").is_file()
    boxes = run.parent / "boxes.json"
    outcome = mim("predict", run, squares / "val", "--output", boxes)
    assert outcome.code == 0, outcome.err
    source = detect(squares).sources[1]
    metric = MeanAveragePrecision()
    for index, objects in enumerate(source.objects):
        name = Path(source.describe(index)).name
        found = [item for item in json.loads(boxes.read_text()) if item["file"] == name]
        corners = torch.tensor([item["bbox"] for item in found]).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        labels = torch.tensor([source.classes.index(item["class"]) for item in found]).long()
        scores = torch.tensor([item["score"] for item in found])
        predicted = {"boxes": corners, "labels": labels, "scores": scores}
        metric.update([predicted], [{"boxes": objects.boxes, "labels": objects.labels}])
    measured = float(metric.compute()["map_50"])
    assert measured == pytest.approx(result["evaluations"]["detect"]["map_50"], abs=0.01)
