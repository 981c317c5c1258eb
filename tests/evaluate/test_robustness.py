"""Robustness: clean is the plain evaluation, folders agree with what is made, mCE by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from mim.core.config import Config, DataConfig, ModelConfig
from mim.core.errors import UserError
from mim.data import Corrupted, ImageSource, Subset, eval_loader, match_classes, open_source
from mim.evaluate import Encoder, evaluate, open_encoder
from mim.evaluate import robustness as module
from mim.evaluate.finetune import load_classifier
from mim.evaluate.predictions import Measured
from mim.evaluate.robustness import (
    ALEXNET,
    corrupted_folders,
    mean_corruption_error,
    read_baseline,
    right_answers,
)
from mim.evaluate.training import start_accelerator

ARGS = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
DATA = DataConfig(source="digits", image_size=8, channels=1, batch_size=64)
CONFIG = Config(data=DATA, model=ModelConfig(backbone="vit_tiny_patch16_224", backbone_args=ARGS))
FEW: dict[str, Any] = {
    "classifier": "linear",
    "corruptions": ["gaussian_noise", "contrast"],
    "severities": [1, 5],
}


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return open_encoder("untrained", CONFIG)


@pytest.fixture(scope="module")
def train() -> ImageSource:
    return Subset(open_source(DATA, "train"), range(200))


@pytest.fixture(scope="module")
def val() -> ImageSource:
    return open_source(DATA, "val")


@pytest.fixture
def measure(
    encoder: Encoder, train: ImageSource, val: ImageSource
) -> Callable[..., dict[str, float]]:
    def run(folder: Path | None = None, **settings: Any) -> dict[str, float]:
        given = {"robustness": {**FEW, **settings}}
        return evaluate(encoder, given, train=train, val=val, folder=folder)["robustness"]

    return run


def test_mean_corruption_error_by_hand() -> None:
    errors = {"fog": [0.2, 0.4], "snow": [0.5, 0.7]}
    baseline = {"fog": 0.6, "snow": 0.8}
    # (0.6 / 1.2 + 1.2 / 1.6) / 2
    assert mean_corruption_error(errors, baseline) == pytest.approx(0.625)
    itself = {name: [value] * 5 for name, value in ALEXNET.items()}
    assert mean_corruption_error(itself, ALEXNET) == pytest.approx(1)
    assert len(ALEXNET) == 15 and sum(ALEXNET.values()) / 15 == pytest.approx(0.789, abs=1e-4)


def test_without_corruption_it_is_the_plain_evaluation(
    encoder: Encoder, train: ImageSource, val: ImageSource
) -> None:
    given = {"robustness": FEW, "linear": {"few_shot": []}}
    numbers = evaluate(encoder, given, train=train, val=val)
    assert list(numbers) == ["robustness", "linear"]
    assert numbers["robustness"]["clean_accuracy"] == numbers["linear"]["accuracy"]
    r = numbers["robustness"]
    each = {name: [r[f"error_{name}_severity_{s}"] for s in (1, 5)] for name in FEW["corruptions"]}
    assert r["error_contrast"] == pytest.approx(sum(each["contrast"]) / 2)
    assert r["mean_error"] == pytest.approx(sum(map(sum, each.values())) / 4)
    assert each["contrast"][1] > 1 - r["clean_accuracy"]  # a seventh of the contrast
    assert "mce" not in r and next(iter(r)) == "mean_error"


def test_the_fine_tuned_classifier_of_the_run_is_measured(
    encoder: Encoder, train: ImageSource, val: ImageSource, tmp_path: Path
) -> None:
    short = {"epochs": 2, "batch_size": 32, "base_lr": 3e-2, "layer_decay": 1.0, "pool": "cls"}
    given = {"robustness": {**FEW, "classifier": "finetune"}, "finetune": short}
    numbers = evaluate(encoder, given, train=train, val=val, folder=tmp_path)
    clean = numbers["robustness"]["clean_accuracy"]
    assert clean == numbers["finetune"]["accuracy"]
    assert (tmp_path / "pictures" / "robustness.png").stat().st_size > 1000
    file = tmp_path / "finetune.safetensors"
    again = {"robustness": {**FEW, "classifier": str(file)}}
    named = evaluate(encoder, again, train=train, val=val)["robustness"]
    assert named == numbers["robustness"]
    loaded = load_classifier(file, encoder, "file")
    assert loaded.pool == "cls" and loaded.numbers["accuracy"] == clean
    fewer = Subset(train, range(len(train)))
    fewer.classes = ["a", "b", *train.classes[2:]]
    with pytest.raises(UserError, match=r"has 10 classes \(0, 1, 2, \.\.\.\), the images 10 \(a,"):
        evaluate(encoder, again, train=fewer, val=val)
    deep = ModelConfig(CONFIG.model.backbone, backbone_args={**ARGS, "depth": 2})
    other = open_encoder("untrained", Config(data=DATA, model=deep))
    with pytest.raises(UserError, match=r"robustness\.classifier: .* lacks blocks\.1"):
        load_classifier(file, other, "evaluations.robustness.classifier")


def save(source: ImageSource, folder: Path, names: list[str]) -> None:
    """The images as evaluations see them, as PNG files in one folder a class."""
    for number, batch in enumerate(eval_loader(source, DATA, batch_size=1)):
        below = folder / names[int(batch.labels[0])]
        below.mkdir(parents=True, exist_ok=True)
        pixels = batch.images[0].permute(1, 2, 0).numpy()
        Image.fromarray(pixels[:, :, 0]).save(below / f"{number:04d}.png")


def test_a_folder_of_the_same_images_gives_the_same_errors(
    measure: Callable[..., dict[str, float]], val: ImageSource, tmp_path: Path
) -> None:
    few = Subset(val, range(60))
    for name in FEW["corruptions"]:
        group = "noise" if "noise" in name else "."
        for severity in (1, 5):
            folder = tmp_path / group / name / str(severity)
            save(Corrupted(few, DATA, name, severity, seed=0), folder, val.classes)
    assert set(corrupted_folders(tmp_path)) == set(FEW["corruptions"])
    found = measure(imagenet_c=str(tmp_path))
    accelerator = start_accelerator("cpu")
    predict: list[Any] = []
    real = module.right_answers

    def spy(*args: Any, **kwargs: Any) -> Any:
        predict.append(args[0])
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "right_answers", spy)
        measure(severities=[1], corruptions=["contrast"])
    for name in FEW["corruptions"]:
        for severity in (1, 5):
            made = Corrupted(few, DATA, name, severity, seed=0)
            made.mean, made.std = val.mean, val.std
            ids, answers = right_answers(predict[0], made, DATA, 16, accelerator)
            assert torch.equal(ids, made.sample_ids)
            right = float(answers.double().mean())
            assert found[f"error_{name}_severity_{severity}"] == pytest.approx(1 - right)
    # All fifteen are there, or those that are.
    assert set(measure(imagenet_c=str(tmp_path), corruptions=[])) == set(found)


def test_the_answers_to_each_image_are_those_of_the_numbers(
    measure: Callable[..., dict[str, float]], val: ImageSource
) -> None:
    found = measure(severities=[1, 3], corruptions=["contrast", "brightness"], images=0)
    assert isinstance(found, Measured)
    assert found.arrays["sample_ids"].tolist() == val.sample_ids.tolist()
    for name in ("mean_error", "clean_accuracy"):
        assert found.arrays[name].mean() == pytest.approx(found[name])
    assert set(np.unique(found.arrays["mean_error"])) <= {0, 0.25, 0.5, 0.75, 1}
    few = measure(severities=[1], corruptions=["contrast"], images=20)
    assert isinstance(few, Measured)
    assert len(few.arrays["mean_error"]) == 20 and "clean_accuracy" not in few.arrays


def test_predictions_are_restricted_to_the_classes_of_a_folder(
    measure: Callable[..., dict[str, float]], val: ImageSource, tmp_path: Path
) -> None:
    assert val.labels is not None
    some = Subset(val, ((val.labels == 7) | (val.labels == 3)).nonzero()[:, 0])
    save(some, tmp_path / "a", val.classes)
    plain = measure(corruptions=["contrast"], severities=[1])["clean_accuracy"]
    folders = {"two": str(tmp_path / "a")}
    found = measure(corruptions=["contrast"], severities=[1], folders=folders)
    assert found["accuracy_two"] > plain  # two classes are easier than ten

    accelerator = start_accelerator("cpu")
    small = Subset(some, range(4))
    assert small.labels is not None
    small.labels = torch.tensor([0, 1, 1, 0])  # of the folder's: 0 is class 3, 1 is class 7

    def predict(images: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(images), 10)
        logits[:, 9] = 5.0  # the most likely of all is not there
        logits[:, 7] = 1.0
        return logits

    ids, right = right_answers(predict, small, DATA, 3, accelerator, [3, 7])
    assert torch.equal(ids, small.sample_ids) and right.tolist() == [False, True, True, False]
    assert not right_answers(predict, small, DATA, 3, accelerator)[1].any()

    (tmp_path / "a" / "dragon").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "a" / "dragon" / "1.png")
    with pytest.raises(UserError, match=r"folders\.two: .* has 1 of 3 classes .* 'dragon'; it kno"):
        measure(folders=folders)
    left = measure(
        corruptions=["contrast"], severities=[1], folders=folders, unknown_classes="leave_out"
    )
    assert left["accuracy_two"] == found["accuracy_two"]


def test_wordnet_ids_stand_for_their_words() -> None:
    assert match_classes(["n01440764", "b", "x"], ["b", "tench"]) == [1, 0, None]
    assert match_classes(["tench"], ["n01440764"]) == [0]


def test_processes_share_the_images(val: ImageSource) -> None:
    @dataclass
    class Share:
        process_index: int
        num_processes: int
        device: str = "cpu"

    def predict(images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, 20:30]

    def answers(batch_size: int, rank: int, world: int) -> dict[int, bool]:
        share: Any = Share(rank, world)
        ids, right = right_answers(predict, val, DATA, batch_size, share)
        return dict(zip(ids.tolist(), right.tolist(), strict=True))

    one, other, whole = answers(32, 0, 2), answers(32, 1, 2), answers(50, 0, 1)
    assert one and other and not one.keys() & other.keys()
    assert one | other == whole and len(whole) == len(val)
    assert 0 < sum(whole.values()) < len(whole)


def test_baselines(measure: Callable[..., dict[str, float]], tmp_path: Path) -> None:
    file = tmp_path / "errors.yaml"
    file.write_text(yaml.safe_dump({"gaussian_noise": 0.5, "contrast": 0.8}))
    found = measure(baseline=str(file))
    by_hand = (found["error_gaussian_noise"] / 0.5 + found["error_contrast"] / 0.8) / 2
    assert found["mce"] == pytest.approx(by_hand) and next(iter(found)) == "mce"
    assert found["ce_contrast"] == pytest.approx(found["error_contrast"] / 0.8)
    run = tmp_path / "run"
    run.mkdir()
    content = {"format": 1, "evaluations": {"robustness": found}}
    (run / "result.json").write_text(json.dumps(content))
    assert measure(baseline=str(run))["mce"] == pytest.approx(1)
    part = read_baseline(str(run), ["contrast"], [5])
    assert part["contrast"] == found["error_contrast_severity_5"]


def test_some_images_are_the_same_for_all(measure: Callable[..., dict[str, float]]) -> None:
    some = measure(images=30)
    assert some == measure(images=30, batch_size=7)
    assert (30 * some["error_contrast_severity_5"]) % 1 == pytest.approx(0, abs=1e-9)
    assert some["clean_accuracy"] == measure()["clean_accuracy"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"corruptions": ["frost"]}, r"corruptions: 'frost' is not one of"),
        ({"severities": [6]}, r"severities: \(6,\) must be some of \(1, 2, 3, 4, 5\)"),
        ({"severities": []}, r"severities: \(\) must not be empty"),
        ({"images": -1}, r"images: -1 must be at least 0"),
        ({"folders": [1]}, r"folders: \[1\] must be a mapping"),
        ({"folders": {"a": "nowhere"}}, r"folders\.a: 'nowhere' is no folder"),
        ({"imagenet_c": "nowhere"}, r"imagenet_c: 'nowhere' is no folder"),
        ({"classifier": "nowhere"}, r"classifier: 'nowhere' is not finetune, linear or a file"),
        ({"classifier": "finetune"}, r"needs a fine-tuned classifier, and there is no run folder"),
        ({"baseline": "alexnet"}, r"baseline: 'alexnet' is for ImageNet-C's own images"),
        ({"baseline": "nowhere"}, r"baseline: 'nowhere' is not alexnet, a run folder or a file"),
        ({"unknown_classes": "drop"}, r"unknown_classes: 'drop' is not one of leave_out, refuse"),
        ({"pool": "both", "classifier": "finetune"}, r"pool: 'both' is not one of cls, mean"),
    ],
)
def test_bad_settings_are_told(
    measure: Callable[..., dict[str, float]], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        measure(**settings)


def test_bad_folders_and_baselines_are_told(
    measure: Callable[..., dict[str, float]], tmp_path: Path
) -> None:
    file = tmp_path / "errors.yaml"
    for content, message in (
        ({"contrast": 0.5}, "has no error for gaussian_noise"),
        ({"contrast": 0.5, "gaussian_noise": 50}, "the error 50 for gaussian_noise; it must be"),
        ([1], "does not map corruptions"),
    ):
        file.write_text(yaml.safe_dump(content))
        with pytest.raises(UserError, match=message):
            measure(baseline=str(file))
    with pytest.raises(UserError, match="is a folder without the evaluation robustness"):
        measure(baseline=str(tmp_path))
    root = tmp_path / "c"
    root.mkdir()
    with pytest.raises(UserError, match=r"imagenet_c: .* holds no CORRUPTION/SEVERITY/CLASS"):
        measure(imagenet_c=str(root), corruptions=[])
    (root / "contrast" / "1" / "0").mkdir(parents=True)
    with pytest.raises(UserError, match=r"lacks contrast/5"):
        measure(imagenet_c=str(root), corruptions=["contrast"])
    with pytest.raises(UserError, match=r"corruptions: 'fog' is not one of contrast"):
        measure(imagenet_c=str(root), corruptions=["fog"])
    with pytest.raises(UserError, match=r"imagenet_c: .*has an empty class: no image in .*1/0"):
        measure(imagenet_c=str(root), corruptions=["contrast"], severities=[1])


def test_from_the_command_line(
    mim: Callable[..., Any], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert mim("pretrain", "--config", tiny(), "--output", run).code == 0
    refused = mim("evaluate", "robustness", run)
    assert refused.code == 2 and "has no finetune.safetensors: evaluate finetune" in refused.line
    few = ["classifier=linear", "corruptions=[fog]", "severities=[3]", "images=20"]
    done = mim("evaluate", "robustness", run, "--set", *few, "--device", "cpu")
    assert done.code == 0 and "mean error (%)" in done.out and "_severity_" not in done.out
    result = json.loads((run / "result.json").read_text())
    assert 0 <= result["evaluations"]["robustness"]["error_fog_severity_3"] <= 1
    assert result["evaluation_settings"]["robustness"]["corruptions"] == ["fog"]
    pixels = mim("evaluate", "robustness", "pixels", "--like", run, "--set", *few)
    assert pixels.code == 2 and "needs an encoder" in pixels.line


def test_a_comparison_without_a_classifier_is_refused(
    mim: Callable[..., Any], tiny_tree: Callable[..., Any], tmp_path: Path
) -> None:
    evaluations = {"robustness": {}}
    config = {"output": str(tmp_path / "c"), "evaluations": evaluations, "base": tiny_tree({})}
    file = tmp_path / "compare.yaml"
    file.write_text(yaml.safe_dump(config))
    refused = mim("compare", "--config", file)
    assert refused.code == 2 and "needs a fine-tuned classifier" in refused.line


@pytest.mark.slow
def test_in_a_comparison(
    mim: Callable[..., Any], tiny_tree: Callable[..., Any], tmp_path: Path
) -> None:
    few = {"corruptions": ["fog", "contrast"], "severities": [1, 3], "images": 40}
    config = {
        "output": str(tmp_path / "compare"),
        "axes": {"model.regime.name": ["drop"]},
        "evaluations": {
            "robustness": few,
            "finetune": {"epochs": 1, "batch_size": 32, "fraction": 0.1},
        },
        "base": tiny_tree({"train.max_steps": 2}),
    }
    file = tmp_path / "compare.yaml"
    file.write_text(yaml.safe_dump(config))
    done = mim("compare", "--config", file)
    assert done.code == 0, done.err
    folder = tmp_path / "compare"
    report = (folder / "report.md").read_text()
    assert "Robustness: mean error (%)" in report and "## Robustness" in report
    lines = (folder / "tables" / "robustness.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 2  # corruptions by the run and the untrained encoder
    results = [json.loads(p.read_text()) for p in folder.glob("regime=drop*/result.json")]
    errors = [r["evaluations"]["robustness"]["error_fog_severity_3"] for r in results]
    cell = f"{100 * sum(errors):.1f}"
    assert any("fog" in line and "drop" in line and cell in line for line in lines)
    assert (folder / "figures" / "robustness.svg").is_file()
    page = (folder / "report.html").read_text()
    assert 'id="robustness"' in page and "at severity %{x:.3g}" in page
