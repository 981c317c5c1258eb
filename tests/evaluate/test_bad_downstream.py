"""Bad input of downstream tasks, by the command line: one line that names it, exit code 2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from mim.core.config import Config, DataConfig, ModelConfig
from mim.core.settings import to_yaml
from mim.evaluate import build_evaluation, open_encoder
from mim.evaluate.dense.segment import Segmenter
from mim.evaluate.dense.training import encoder_at_size
from mim.evaluate.finetune import FinetuneSettings, build_classifier
from mim.training.checkpoint import save_encoder

ARGS = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
MODEL = ModelConfig(backbone="vit_tiny_patch16_224", backbone_args=ARGS)
STATISTICS: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
SEGMENT: dict[str, Any] = {
    "classes": ["sky", "road"],
    "image_size": [16, 16],
    "epochs": 1,
    "batch_size": 2,
    "head": "linear",
}
Weights = dict[str, Tensor]


def picture(path: Path, value: int = 90, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (16, 16), (value,) * 3 if mode == "RGB" else value).save(path)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A run on two classes of photographs; scenes of two classes; boxes of two kinds."""
    for part in ("train", "val"):
        for number in range(4):
            for name in ("cat", "dog"):
                picture(tmp_path / "photos" / part / name / f"{number}.png", 40 * number)
            picture(tmp_path / "scenes" / "images" / part / f"{number}.png")
            picture(tmp_path / "scenes" / "masks" / part / f"{number}.png", number % 2, "L")
            picture(tmp_path / "boxes" / part / f"{number}.png")
        files = [{"id": n, "file_name": f"{n}.png", "height": 16, "width": 16} for n in range(4)]
        kinds = [{"id": 1, "name": "cup"}]
        marked = [
            {"id": n, "image_id": n, "category_id": 1, "bbox": [2, 2, 8, 8]} for n in range(4)
        ]
        content = {"images": files, "categories": kinds, "annotations": marked}
        path = tmp_path / "boxes" / "annotations" / f"instances_{part}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    data = DataConfig(
        source="imagefolder",
        path=str(tmp_path / "photos"),
        image_size=8,
        batch_size=2,
        **STATISTICS,
    )
    run = tmp_path / "run"
    run.mkdir()
    config = Config(data=data, model=MODEL, output=str(run))
    (run / "config.yaml").write_text(to_yaml(config))
    vit = open_encoder("untrained", config).vit
    assert vit is not None
    save_encoder(run / "encoder.safetensors", vit.state_dict(), {})
    settings = tmp_path / "segment.yaml"
    settings.write_text(yaml.safe_dump({"segment": {**SEGMENT, "path": str(tmp_path / "scenes")}}))
    return tmp_path


@pytest.fixture
def refused(mim: Callable[..., Any]) -> Callable[..., str]:
    def call(*args: object) -> str:
        outcome = mim("evaluate", *args)
        assert outcome.code == 2, outcome.out
        line: str = outcome.line
        return line

    return call


def classifier_file(place: Path, classes: list[str]) -> Path:
    encoder = open_encoder(place / "run")
    classifier = build_classifier(encoder, len(classes), FinetuneSettings())
    classifier.classes, classifier.mean, classifier.std = classes, (0.5,) * 3, (0.25,) * 3
    return classifier.save(place / "classifier.safetensors")


def segmenter_file(place: Path, change: Callable[[Weights], object] = lambda state: None) -> Path:
    settings: Any = build_evaluation("segment", SEGMENT).settings
    vit = encoder_at_size(open_encoder(place / "run"), settings)
    model = Segmenter(vit, settings, SEGMENT["classes"], (0.5,) * 3, (0.25,) * 3)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    change(state)
    path = place / "segmenter.safetensors"
    metadata = {"mim_task": "segment", "classes": json.dumps(SEGMENT["classes"]), "numbers": "{}"}
    save_file(state, path, metadata)
    return path


def test_numbers_of_classes_that_do_not_match(place: Path, refused: Callable[..., str]) -> None:
    segment = ("segment", place / "run", "--settings", place / "segment.yaml", "--set")
    file = segmenter_file(place)
    picture(place / "scenes" / "masks" / "train" / "3.png", 2, "L")
    line = refused(*segment, f"weights={file}", "classes=[sky, road, car]")
    assert "segment.weights" in line and "has 2 classes (sky, road), the data 3" in line
    robustness = ("robustness", place / "run", "--set")
    line = refused(*robustness, f"classifier={classifier_file(place, ['a', 'b', 'c'])}")
    assert "robustness.classifier" in line and "has 3 classes (a, b, c), the images 2" in line
    picture(place / "photos" / "val" / "horse" / "1.png")
    for name in ("finetune", "linear", "robustness"):
        line = refused(name, place / "run", *(["--set", "classifier=linear"] * (name[0] == "r")))
        assert "has the class 'horse' in val but not in train" in line


def test_masks_with_unknown_labels(place: Path, refused: Callable[..., str]) -> None:
    picture(place / "scenes" / "masks" / "val" / "3.png", 77, "L")
    line = refused("segment", place / "run", "--settings", place / "segment.yaml")
    assert "77" in line and "3.png" in line


def test_boxes_outside_the_image(place: Path, refused: Callable[..., str]) -> None:
    pytest.importorskip("pycocotools")
    path = place / "boxes" / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    content["annotations"][2]["bbox"] = [10, 4, 12, 5]
    path.write_text(json.dumps(content))
    line = refused(
        "detect", place / "run", "--set", f"path={place / 'boxes'}", "image_size=[16, 16]"
    )
    assert "2.png" in line and "bad_boxes" in line


def test_a_checkpoint_with_missing_keys(place: Path, refused: Callable[..., str]) -> None:
    run = place / "run"
    vit = open_encoder(run).vit
    assert vit is not None
    state = dict(vit.state_dict())
    del state["blocks.0.mlp.fc1.weight"]
    torch.save(state, place / "weights.pth")
    line = refused("knn", f"vit_tiny_patch16_224@{place / 'weights.pth'}", "--like", run)
    assert "weights.pth" in line and "blocks.0.mlp.fc1.weight" in line
    file = segmenter_file(place, lambda state: state.pop("head.classifier.bias"))
    segment = ("segment", run, "--settings", place / "segment.yaml", "--set", f"weights={file}")
    assert "does not fit the settings: lacks head.classifier.bias" in refused(*segment)
    save_encoder(run / "encoder.safetensors", state, {})
    for name in ("knn", "finetune"):
        line = refused(name, run, *(["--set", "few_shot=[]"] if name == "knn" else []))
        assert "lacks blocks.0.mlp.fc1.weight" in line and "run" in line


def test_the_head_of_another_task(place: Path, refused: Callable[..., str]) -> None:
    pytest.importorskip("pycocotools")
    run = place / "run"
    classifier, segmenter = classifier_file(place, ["cat", "dog"]), segmenter_file(place)
    segment = ("segment", run, "--settings", place / "segment.yaml", "--set")
    assert "has the head of finetune; segment needs its own" in refused(
        *segment, f"weights={classifier}"
    )
    detect = ("detect", run, "--set", f"path={place / 'boxes'}", "image_size=[16, 16]")
    assert "has the head of segment; detect needs its own" in refused(
        *detect, f"weights={segmenter}"
    )
    robustness = ("robustness", run, "--set")
    assert "has the head of segment; a fine-tuned classifier" in refused(
        *robustness, f"classifier={segmenter}"
    )
    assert "is an encoder without a head; a fine-tuned classifier" in refused(
        *robustness, f"classifier={run / 'encoder.safetensors'}"
    )
    # What a head stands on may be an encoder: the head is left out, as elsewhere.
    line = refused("knn", f"vit_tiny_patch16_224@{segmenter}", "--like", run)
    assert "segmenter.safetensors" in line
    line = refused(*robustness, f"classifier={place / 'segment.yaml'}")
    assert "cannot be read" in line


def test_the_same_input_mended_is_taken(place: Path, mim: Callable[..., Any]) -> None:
    """So that none of the refusals above are of something else."""
    segment = ("segment", place / "run", "--settings", place / "segment.yaml", "--set")
    done = mim("evaluate", *segment, f"weights={segmenter_file(place)}", "pictures=0")
    assert done.code == 0 and "mIoU" in done.out, done.err
    file = classifier_file(place, ["cat", "dog"])
    few = ["corruptions=[contrast]", "severities=[1]"]
    done = mim("evaluate", "robustness", place / "run", "--set", f"classifier={file}", *few)
    assert done.code == 0 and "mean error" in done.out, done.err


def spoil(run: Path, value: float) -> None:
    """Makes an encoder whose tokens overflow in float16, or hold NaN in any precision."""
    vit = open_encoder(run).vit
    assert vit is not None
    state = {key: tensor.clone() for key, tensor in vit.state_dict().items()}
    state["blocks.0.mlp.fc2.bias"] += value
    save_encoder(run / "encoder.safetensors", state, {})


QUICK = {
    "knn": ("few_shot=[]",),
    "linear": ("few_shot=[]",),
    "linear_grid": ("epochs=1",),
    "linear_mae": ("epochs=1", "batch_size=4", "held_out=0.25"),
    "attentive": ("epochs=1", "batch_size=4", "held_out=0.25"),
    "analysis": ("train_images=4", "attention_images=2"),
    "finetune": ("epochs=1", "batch_size=4", "held_out=0.25"),
    "robustness": ("classifier=linear", "corruptions=[contrast]", "severities=[1]"),
    "segment": ("epochs=1",),
    "detect": ("epochs=1", "batch_size=2", "image_size=[16, 16]"),
}


@pytest.mark.parametrize("name", [name for name in QUICK if name != "analysis"])
def test_tokens_that_overflow_give_no_number(
    name: str, place: Path, mim: Callable[..., Any]
) -> None:
    spoil(place / "run", 1e6)
    settings = list(QUICK[name])
    if name in ("segment", "detect"):
        settings.append(f"path={place / {'segment': 'scenes', 'detect': 'boxes'}[name]}")
    if name == "segment":
        settings += ["classes=[sky, road]", "image_size=[16, 16]", "batch_size=2"]
    if name == "detect":
        pytest.importorskip("pycocotools")
    outcome = mim("evaluate", name, place / "run", "--precision", "fp16", "--set", *settings)
    line = outcome.err.strip().splitlines()[-1]  # behind those of the progress
    assert outcome.code == 2 and "Traceback" not in outcome.err
    assert "fp16" in line and "bf16 or fp32" in line, line
    result = place / "run" / "result.json"
    assert not result.exists() or "evaluations" not in json.loads(result.read_text())


def test_weights_that_are_not_finite_give_no_number(place: Path, mim: Callable[..., Any]) -> None:
    spoil(place / "run", float("nan"))
    for name in ("knn", "linear", "attentive", "analysis"):
        given = QUICK[name]
        outcome = mim("evaluate", name, place / "run", "--set", *given)
        line = outcome.err.strip().splitlines()[-1]
        assert outcome.code == 2
        assert "precision: 'fp32'" in line and "not finite" in line, line


def test_the_precision_stands_in_the_result(place: Path, mim: Callable[..., Any]) -> None:
    for name, precision in (("knn", "fp16"), ("linear", "bf16"), ("analysis", "bf16")):
        given = ("--precision", precision, "--set", *QUICK[name])
        assert mim("evaluate", name, place / "run", *given).code == 0
    found = json.loads((place / "run" / "result.json").read_text())["evaluation_precision"]
    assert found == {"knn": "fp16", "linear": "bf16", "analysis": "fp32"}


def test_every_photograph_has_its_label_map(place: Path, mim: Callable[..., Any]) -> None:
    segment = ("segment", place / "run", "--settings", place / "segment.yaml", "--set")
    assert mim("evaluate", *segment, "pictures=0").code == 0
    for name in ("1.jpg", "1.png", "2.jpeg", "deep/1.jpg"):
        picture(place / "new" / name)
    predict = ("predict", place / "run", place / "new", "--task", "segment", "--output")
    done = mim(*predict, place / "maps")
    assert done.code == 0, done.err
    found = {str(path.relative_to(place / "maps")) for path in (place / "maps").rglob("*.png")}
    assert found == {"1.jpg.png", "1.png.png", "2.png", "deep/1.png"}
    before = (place / "new" / "1.png").read_bytes()
    assert "lies among the images" in mim(*predict, place / "new").line
    assert (place / "new" / "1.png").read_bytes() == before
