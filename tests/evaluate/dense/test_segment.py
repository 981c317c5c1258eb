"""Segmentation: mIoU by hand, windows, frozen and trained encoders, files of models, bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import load_file
from torchmetrics.classification import MulticlassJaccardIndex

from mim.core.config import Config, DataConfig
from mim.core.errors import UserError
from mim.core.signals import Interrupted
from mim.evaluate import Encoder, Segment, build_evaluation, evaluate, open_encoder
from mim.evaluate.dense.pictures import paint
from mim.evaluate.dense.pyramid import Pyramid, layer_maps, quarter_layers
from mim.evaluate.dense.segment import (
    Segmenter,
    UperHead,
    _confusion_metric,
    intersection_over_union,
    window_starts,
)
from mim.evaluate.dense.segmentation_data import VOID, MaskedBatch
from mim.evaluate.dense.training import encoder_at_size, parameter_groups
from mim.evaluate.predictions import Measured
from mim.model.backbones import block_outputs, family_of, resize_positions
from mim.training.checkpoint import save_encoder

SHORT: dict[str, Any] = {
    "classes": ["dark", "light"],
    "void": 9,
    "image_size": [16, 24],
    "epochs": 3,
    "batch_size": 4,
    "lr": 1e-2,
    "width": 16,
    "layer_decay": 1.0,
    "drop_path": 0.0,
    "held_out": 0.25,
    "pictures": 2,
}


def segment(scenes: Path, **changes: Any) -> Segment:
    built = build_evaluation("segment", {**SHORT, "path": str(scenes), **changes})
    assert isinstance(built, Segment)
    return built


def test_iou_by_hand_and_against_torchmetrics() -> None:
    # class 0: 3 hits of 3 + 4 - 3 = 4; class 1: 1 of 2; class 2 is in neither
    confusion = torch.tensor([[3, 0, 0], [1, 1, 0], [0, 0, 0]])
    iou = intersection_over_union(confusion)
    assert iou[:2].tolist() == [0.75, 0.5] and iou[2].isnan()
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(-1, 5, (3, 20, 20), generator=generator)
    guess = torch.randint(0, 5, (3, 20, 20), generator=generator)
    metric = _confusion_metric(5)
    for t, g in zip(truth, guess, strict=True):
        metric.update(g, t)
    other = MulticlassJaccardIndex(5, average="none", ignore_index=VOID)
    assert intersection_over_union(metric.compute()).tolist() == pytest.approx(
        other(guess, truth).tolist()
    )


def test_void_counts_neither_in_loss_nor_in_numbers(encoder: Encoder, scenes: Path) -> None:
    evaluation = segment(scenes)
    s = evaluation.settings
    model = Segmenter(encoder_at_size(encoder, s), s, ["a", "b"], (0.5,) * 3, (0.25,) * 3).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 16, 24), generator=generator).byte()
    masks = torch.randint(0, 2, (2, 16, 24), generator=generator)
    masks[0, :9] = VOID
    batch = MaskedBatch(images, None, torch.arange(2), 0, 0, masks=masks)
    loss = model.loss(batch)
    logits = model((images / 255 - 0.5) / 0.25).permute(0, 2, 3, 1)
    assert torch.allclose(loss, F.cross_entropy(logits[masks >= 0], masks[masks >= 0]), atol=1e-6)
    batch.masks = torch.full_like(masks, VOID)
    assert model.loss(batch).item() == 0.0
    numbers = evaluation.run(encoder)
    assert set(numbers) > {"miou", "pixel_accuracy", "class_accuracy", "iou_dark", "iou_light"}
    assert isinstance(numbers, Measured)
    assert numbers.arrays["image_miou"].mean() == pytest.approx(numbers["image_miou"])


def test_windows_cover_and_are_averaged(encoder: Encoder, scenes: Path) -> None:
    assert window_starts(10, 10, 0.5) == [0]
    assert window_starts(25, 10, 0.5) == [0, 5, 10, 15]
    assert window_starts(21, 10, 1.0) == [0, 10, 11]
    s = segment(scenes).settings
    model = Segmenter(encoder_at_size(encoder, s), s, ["a", "b"], (0.5,) * 3, (0.25,) * 3)
    images = torch.randn(1, 3, 37, 55)
    model.forward = lambda x: x[:, :2] * 3  # type: ignore[method-assign,assignment]
    assert torch.allclose(model.predict(images, 0.4), images[:, :2] * 3, atol=1e-5)
    small = images[..., :9, :30]
    assert torch.allclose(model.predict(small, 0.4), small[:, :2] * 3, atol=1e-5)
    model.forward = lambda x: (  # type: ignore[method-assign,assignment]
        torch.arange(len(x)).float()[:, None, None, None].expand(-1, 2, 16, 24)
    )
    # Two windows, 0 to 16 and 8 to 24, overlap in the middle third.
    rows = model.predict(torch.zeros(1, 3, 24, 24), 0.5)[0, 0, :, 0]
    assert rows.tolist() == [0.0] * 8 + [0.5] * 8 + [1.0] * 8


def test_maps_are_the_blocks_outputs(encoder: Encoder) -> None:
    assert quarter_layers(12) == [2, 5, 8, 11] and quarter_layers(24) == [5, 11, 17, 23]
    assert quarter_layers(1) == [0, 0, 0, 0] and quarter_layers(4) == [0, 1, 2, 3]
    assert encoder.vit is not None
    images = torch.randn(2, 3, 8, 8)
    maps = layer_maps(encoder.vit, images, [1, 1, 3])
    family = family_of(encoder.vit)
    blocks = block_outputs(encoder.vit, family.place(family.embed(images)))
    for found, block in zip(maps, (1, 1, 3), strict=True):
        expected = encoder.vit.norm(blocks[block])[:, 1:].reshape(2, 2, 2, 16)
        assert torch.allclose(found.permute(0, 2, 3, 1), expected, atol=1e-6)


def test_pyramid_scales() -> None:
    maps = [torch.randn(1, 16, 5, 6)] * 5
    sizes = [m.shape[1:] for m in Pyramid(16, 8, (4, 2, 1, 0.5, 0.25))(maps)]
    assert sizes == [(8, 20, 24), (8, 10, 12), (8, 5, 6), (8, 3, 3), (8, 2, 2)]
    head = UperHead(16, 8, (4.0, 2.0, 1.0, 0.5), 3)
    logits = head(maps[:4])
    assert logits.shape == (1, 3, 20, 24)
    logits.sum().backward()
    assert all(p.grad is not None for p in head.parameters())


def test_position_embeddings_follow_the_size(encoder: Encoder, scenes: Path) -> None:
    s = segment(scenes).settings
    vit = encoder.vit
    assert vit is not None and vit.pos_embed is not None
    before = {k: v.clone() for k, v in vit.state_dict().items()}
    larger = encoder_at_size(encoder, s)
    assert larger.pos_embed is not None and larger.pos_embed.shape == (1, 1 + 4 * 6, 16)
    assert torch.equal(larger.pos_embed[:, 0], vit.pos_embed[:, 0])  # the class token's
    assert torch.equal(larger.blocks[0].attn.qkv.weight, vit.blocks[0].attn.qkv.weight)
    same = encoder_at_size(encoder, replace(s, image_size=(8, 8)))
    assert all(torch.equal(v, before[k]) for k, v in same.state_dict().items())
    # What is the same at every patch stays so; a ramp from left to right stays one.
    vit.pos_embed.data[:, 1:] = torch.tensor([0.0, 1.0, 0.0, 1.0])[None, :, None]
    resized = resize_positions(vit, larger)["pos_embed"][0, 1:, 0].reshape(4, 6)
    assert torch.allclose(resized, resized[:1].expand(4, 6), atol=1e-5)
    assert (resized[0].diff() >= 0).all() and resized[0, 0] < 0.1 and resized[0, -1] > 0.9


def test_groups_hold_each_parameter_once(encoder: Encoder, scenes: Path) -> None:
    s = segment(scenes, layer_decay=0.5, weight_decay=0.3).settings
    model = Segmenter(encoder_at_size(encoder, s), s, ["a", "b"], (0.5,) * 3, (0.25,) * 3)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {
        names[id(p)]: (group["lr_scale"], group["weight_decay"])
        for group in parameter_groups(model, s)
        for p in group["params"]
    }
    assert set(found) == set(names.values())
    assert found["encoder.pos_embed"] == (0.5**5, 0.0)
    assert found["encoder.blocks.3.mlp.fc1.weight"] == (0.5, 0.3)
    assert found["head.classifier.weight"] == (1.0, 0.3)
    assert found["head.classifier.bias"] == (1.0, 0.0)
    frozen = replace(s, freeze=True)
    model = Segmenter(encoder_at_size(encoder, frozen), frozen, ["a", "b"], (0.5,) * 3, (1.0,) * 3)
    inside = sum(len(group["params"]) for group in parameter_groups(model, frozen))
    assert inside == len(list(model.head.parameters()))


@pytest.mark.parametrize("head", ["linear", "upernet"])
@pytest.mark.parametrize("freeze", [True, False])
def test_it_learns_and_leaves_the_encoder(
    encoder: Encoder, scenes: Path, tmp_path: Path, head: str, freeze: bool
) -> None:
    assert encoder.vit is not None
    before = {k: v.clone() for k, v in encoder.vit.state_dict().items()}
    evaluation = segment(scenes, epochs=12, head=head, freeze=freeze)
    numbers = evaluation.run(encoder, folder=tmp_path)
    assert numbers["miou"] > 0.7 and numbers["iou_light"] > 0.6, numbers
    assert next(iter(numbers)) == "miou" and {*evaluation.measures()} <= {*numbers}
    assert all(torch.equal(v, before[k]) for k, v in encoder.vit.state_dict().items())
    model = Segmenter(
        encoder_at_size(encoder, evaluation.settings),
        evaluation.settings,
        ["dark", "light"],
        (0.5,) * 3,
        (0.25,) * 3,
    )
    model.load(tmp_path / "segment.safetensors")
    moved = not torch.equal(
        model.encoder.blocks[0].mlp.fc1.weight, before["blocks.0.mlp.fc1.weight"]
    )
    assert moved is not freeze
    with Image.open(tmp_path / "pictures/segment.png") as picture:
        assert picture.width > picture.height > 100


def test_val_is_asked_once_and_held_out_images_are_not_trained_on(
    encoder: Encoder, scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    trained: set[int] = set()
    real_labels, real_loss = Segment.labels, Segmenter.loss

    def labels(self: Segment, model: Any, source: Any, index: int, *args: Any) -> Any:
        asked.append(int(source.sample_ids[index]))
        return real_labels(self, model, source, index, *args)

    def loss(self: Segmenter, batch: Any) -> Any:
        trained.update(batch.sample_ids.tolist())
        return real_loss(self, batch)

    monkeypatch.setattr(Segment, "labels", labels)
    monkeypatch.setattr(Segmenter, "loss", loss)
    numbers = segment(scenes, pictures=0).run(encoder)
    held, val = asked[:-4], asked[-4:]
    assert len(held) == 3 * 3 and not {*held} & trained and not {*val} & ({*held} | trained)
    assert len(trained) == 9  # all of the rest, over three epochs of two batches of 4
    assert 1 <= numbers["chosen_epoch"] <= 3 and 0 <= numbers["chosen_miou"] <= 1


def test_the_same_seed_gives_the_same_numbers(encoder: Encoder, scenes: Path) -> None:
    torch.manual_seed(1)
    first = segment(scenes, drop_path=0.3).run(encoder)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert segment(scenes, drop_path=0.3).run(encoder) == first
    assert torch.equal(state, torch.get_rng_state())
    assert segment(scenes, drop_path=0.3, seed=1).run(encoder) != first


@pytest.mark.parametrize("head", ["linear", "upernet"])
def test_stopped_and_gone_on_it_computes_the_same(
    encoder: Encoder, scenes: Path, tmp_path: Path, head: str
) -> None:
    """9 images, 2 steps an epoch: stopped in the middle of one; batch norm and drop path too."""
    recipe: dict[str, Any] = {"head": head, "drop_path": 0.5, "pictures": 0}
    whole = segment(scenes, **recipe).run(encoder, folder=tmp_path / "whole")
    assert not list((tmp_path / "whole" / "evaluations").glob("*.pt"))
    steps: list[int] = []
    real = Segmenter.loss

    def loss(self: Segmenter, batch: Any) -> torch.Tensor:
        steps.append(batch.step)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch)

    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Segmenter, "loss", loss)
        with pytest.raises(Interrupted, match=r"SIGTERM: saved step 3 in .*segment\.pt") as caught:
            segment(scenes, **recipe).run(encoder, folder=run)
        assert caught.value.code == 143
        torch.manual_seed(7)  # a new process is at another place of its generators
        again = segment(scenes, **recipe, checkpoint_every=2).run(encoder, folder=run)
    assert steps == list(range(6)) and again == whole
    files = [load_file(folder / "segment.safetensors") for folder in (tmp_path / "whole", run)]
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    assert not list((run / "evaluations").glob("*.pt"))


def test_a_state_of_other_settings_is_not_used(
    encoder: Encoder, scenes: Path, tmp_path: Path
) -> None:
    steps: list[int] = []
    real = Segmenter.loss

    def loss(self: Segmenter, batch: Any) -> torch.Tensor:
        steps.append(batch.step)
        if len(steps) == 2:
            raise KeyboardInterrupt  # killed, with the state of no epoch, and then of the first
        if len(steps) == 5:
            raise KeyboardInterrupt
        return real(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Segmenter, "loss", loss)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                segment(scenes).run(encoder, folder=tmp_path)
        assert steps == [0, 1, 0, 1, 2] and (tmp_path / "evaluations" / "segment.pt").is_file()
        segment(scenes, lr=1e-3, pictures=0).run(encoder, folder=tmp_path)
    assert steps[5:] == list(range(6))


def test_a_file_is_measured_again_and_others_are_refused(
    encoder: Encoder, scenes: Path, tmp_path: Path
) -> None:
    trained = segment(scenes, epochs=1).run(encoder, folder=tmp_path)
    path = tmp_path / "segment.safetensors"
    again = segment(scenes, weights=str(path)).run(encoder)
    assert again == {k: v for k, v in trained.items() if k in again} and "miou" in again

    def message(file: Path, **changes: Any) -> str:
        with pytest.raises(UserError) as caught:
            segment(scenes, weights=str(file), **changes).run(encoder)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "does not fit the settings: lacks head." in message(path, head="linear")
    assert "does not fit the settings: has head." in message(path, width=24)
    assert encoder.vit is not None
    bare, other, torn = (tmp_path / f"{n}.safetensors" for n in ("bare", "other", "torn"))
    save_encoder(bare, encoder.vit.state_dict(), {})
    assert "is an encoder without a head; segment needs its own" in message(bare)
    save_encoder(other, encoder.vit.state_dict(), {"classifier": "{}"})
    assert "has the head of finetune; segment needs its own" in message(other)
    torn.write_bytes(path.read_bytes()[:99])
    assert "cannot be read" in message(torn)
    own = Path(shutil.copytree(scenes, tmp_path / "scenes"))
    Image.new("L", (48, 32), 2).save(own / "masks/train/0.png")
    more = {"path": str(own), "classes": ["dark", "light", "x"]}
    assert "has 2 classes (dark, light), the data 3" in message(path, **more)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"head": "uper"}, "evaluations.segment.head: 'uper' is not one of linear, upernet"),
        ({"image_size": [17, 24]}, "is not divisible by the patch, 4 x 4"),
        ({"image_size": [16]}, "must have 2 values"),
        ({"scales": [1, 2, 4, 0.5]}, "descending"),
        ({"scales": [2, 1]}, "must be 4, one for each quarter"),
        ({"classes": ["a", "a"]}, "names a class twice"),
        ({"classes": [1, 2]}, "must be a text"),
        ({"scale": [2.0, 1.0]}, "must be 0 < from <= to"),
        ({"stride": 0.0}, "must be above 0"),
        ({"held_out": 1.0}, "must lie between 0 and 1"),
        ({"weights": "none.safetensors"}, "is no file"),
        ({"mean": [0.5], "std": [0.5]}, "must have 3 values"),
        ({"mean": [0.5]}, "as many values as std"),
        ({"pool": "mean"}, "evaluations.segment: 'pool' is not one of"),
        ({"lr": 1e12}, "evaluations.segment.lr"),
    ],
)
def test_bad_settings(encoder: Encoder, scenes: Path, changes: Any, line: str) -> None:
    with pytest.raises(UserError) as caught:
        evaluate(encoder, {"segment": {**SHORT, "path": str(scenes), **changes}})
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_an_image_that_would_be_scaled_to_too_many_pixels(
    encoder: Encoder, scenes: Path, tmp_path: Path
) -> None:
    """Its short side becomes resize: a strip of 1 pixel, thousands of times as long."""
    own = Path(shutil.copytree(scenes, tmp_path / "scenes"))
    Image.new("RGB", (60_000, 1)).save(own / "images/val/0.png")
    Image.new("L", (60_000, 1), 1).save(own / "masks/val/0.png")
    given = {**SHORT, "path": str(own), "resize": 256, "epochs": 1}
    with pytest.raises(UserError) as caught:
        evaluate(encoder, {"segment": given})
    line = str(caught.value)
    assert line.startswith("evaluations.segment.resize: 256 scales") and "leave it out" in line
    assert "1 x 60000 pixels to 256 x 15360000" in line


def test_raw_pixels_are_refused_and_gone_images_are_named(
    config: Config, scenes: Path, tmp_path: Path
) -> None:
    given = {**SHORT, "path": str(scenes)}
    with pytest.raises(UserError, match="segment needs an encoder, and pixels has none"):
        evaluate(open_encoder("pixels", config), {"segment": given})
    gone = DataConfig(source="imagefolder", path=str(tmp_path / "gone"), image_size=8)
    with pytest.raises(UserError, match=r"segment\.mean: must be given, with std"):
        evaluate(open_encoder("untrained", replace(config, data=gone)), {"segment": given})


def test_painted_labels() -> None:
    colours = np.array([[1.0, 0, 0], [0, 1.0, 0]])
    painted = paint(np.array([[0, 1, -1]]), colours)
    assert painted[0].tolist() == [[1, 0, 0], [0, 1, 0], [0.85, 0.85, 0.85]]


def test_from_the_command_line(
    mim: Callable[..., Any], new_run: Callable[[str], Path], scenes: Path, tmp_path: Path
) -> None:
    run = new_run("run")
    settings = tmp_path / "settings.yaml"
    settings.write_text(yaml.safe_dump({"segment": {**SHORT, "epochs": 1}}))
    asked = ("evaluate", "segment", run, "--settings", settings, "--set")
    outcome = mim(*asked, f"path={scenes}", "head=linear", "freeze=true")
    assert outcome.code == 0 and "Segmentation, mIoU (%)" in outcome.out
    result = json.loads((run / "result.json").read_text())
    assert 0 <= result["evaluations"]["segment"]["miou"] <= 1
    used = result["evaluation_settings"]["segment"]
    assert used["head"] == "linear" and used["void"] == 9 and used["image_size"] == [16, 24]
    assert (run / "pictures/segment.png").is_file() and (run / "segment.safetensors").is_file()
    maps = tmp_path / "maps"
    outcome = mim("predict", run, scenes / "images" / "val", "--output", maps)
    assert outcome.code == 0, outcome.err
    confusion = torch.zeros(2, 2, dtype=torch.int64)
    for file in sorted((scenes / "masks" / "val").iterdir()):
        truth = torch.from_numpy(np.array(Image.open(file))).long()
        found = torch.from_numpy(np.array(Image.open(maps / file.name))).long()
        for label in (0, 1):
            confusion[label] += found[truth == label].bincount(minlength=2)
    measured = float(intersection_over_union(confusion).mean())
    assert measured == pytest.approx(result["evaluations"]["segment"]["miou"])
    assert json.loads((maps / "classes.json").read_text())["1"]["class"] == "light"
    outcome = mim(*asked, "path=nowhere")
    assert outcome.code == 2 and "has no folder" in outcome.line
    settings.write_text(yaml.safe_dump({"detect": {}}))
    outcome = mim(*asked, f"path={scenes}")
    assert (
        outcome.code == 2 and "--settings: 'detect' has settings, but only segment" in outcome.line
    )
    settings.write_text("- 1")
    assert "does not map evaluations" in mim(*asked, f"path={scenes}").line
