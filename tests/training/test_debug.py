"""A step computed again: its loss is the one that was logged, and what spoiled it is found."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mim.core.errors import UserError
from mim.training import pretrain as training
from mim.training.debug import debug_batch

Mim = Callable[..., Any]
Tiny = Callable[..., Path]

EXACT = {
    "model.backbone_args.attn_drop_rate": 0.2,
    "model.backbone_args.proj_drop_rate": 0.2,
    "mask.name": "learned",
    "train.accumulate": 2,
    "train.log_every": 1,
    "train.checkpoint_every": 0.04,  # every step
    "train.keep_checkpoints": 20,
    "optim.base_lr": 4.0e-2,  # so that every step's weights give another loss
}


def losses(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.mark.parametrize("sizes", ["one", "own"])
def test_a_step_computed_again_has_the_loss_that_was_logged(
    sizes: str, tmp_path: Path, mim: Mim, tiny: Tiny, own_sizes: dict[str, Any]
) -> None:
    weights = tmp_path / "weights.csv"
    changes = EXACT
    if sizes == "own":
        drop = {key: EXACT[key] for key in EXACT if key not in ("mask.name",)}
        own_sizes["model.backbone_args"] |= {"proj_drop_rate": 0.2}
        changes = {k: v for k, v in drop.items() if "backbone_args" not in k} | own_sizes
        rows = [f"train/a/{n}.png,{n % 3}" for n in range(24)] + [
            f"train/b/{n}.png,1" for n in range(24)
        ]
        weights.write_text("image,weight\n" + "\n".join(rows) + "\n")
        changes = changes | {"data.weights": str(weights)}
    run = tmp_path / "run"
    assert mim("pretrain", "--config", tiny(changes), "--output", run).code == 0
    logged = losses(run)
    last = max(logged)
    for step in (1, 2, last):
        found = debug_batch(run, step, "cpu")
        assert found.exact and found.step == step
        assert found.loss == pytest.approx(logged[step], abs=1e-7)
        assert found.first is None and not found.bad_images
        assert all(seen.bad == 0 for seen in found.seen)
        assert abs(found.loss - logged[step - 1 or last]) > 1e-4, "another step's differs"


@pytest.fixture
def spoiled(tmp_path: Path, mim: Mim, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that stopped at step 4, where the embedding of two images overflows."""
    real = torch.nn.Conv2d.forward
    bad: set[bytes] = set()

    def forward(self: torch.nn.Conv2d, images: torch.Tensor) -> torch.Tensor:
        output = real(self, images)
        rows = [i for i, image in enumerate(images) if image.numpy().tobytes() in bad]
        if not rows:
            return output
        factor = torch.ones(len(output), 1, 1, 1)
        factor[rows] = math.inf
        return output * factor

    monkeypatch.setattr(torch.nn.Conv2d, "forward", forward)
    real_normalize = training.normalize
    step = 0

    def normalize(images: Any, mean: Any, std: Any) -> Any:
        nonlocal step
        found = real_normalize(images, mean, std)
        step += len(images) == 64  # the cost is measured on other batches
        if step == 4 and not bad:
            bad.update(found[row].numpy().tobytes() for row in (5, 40))
        return found

    monkeypatch.setattr(training, "normalize", normalize)
    changes = {"train.checkpoint_every": 0.12, "model.regime.name": "token"}
    outcome = mim("pretrain", "--config", tiny(changes), "--output", tmp_path / "run")
    assert outcome.code == 1 and "at step 4" in outcome.line
    return tmp_path / "run"


def test_what_spoiled_a_step_is_found(spoiled: Path, mim: Mim, tmp_path: Path) -> None:
    record = json.loads((spoiled / "nonfinite.json").read_text())
    outcome = mim("debug", "batch", spoiled, "--device", "cpu", "--json", tmp_path / "found.json")
    assert outcome.code == 0
    *_, told, images, first, picture = outcome.out.splitlines()
    assert told == "step 4 in the weights of nonfinite.pt: loss nan"
    assert images.startswith("2 of 64 images have a loss that is not finite: ")
    for row in (5, 40):
        assert f"{record['sample_ids'][row]} (" in images
    assert first.startswith("first tensor that is not finite: output backbone.patch_embed.proj, ")
    values = int(first.split(", ")[1].split(" of ")[0])
    assert 0 < values <= 2 * 16 * 16, "two images of 16 patches, 16 wide"
    rows = [line.split("\t") for line in outcome.out.splitlines() if "\t" in line]
    assert rows[0] == ["what", "name", "shape", "not finite", "least", "greatest"]
    by_name = {(row[0], row[1]): row for row in rows[1:]}
    assert by_name["images", "images"][2:4] == ["64x1x8x8", "0"]
    assert int(by_name["gradient", "backbone.patch_embed.proj.weight"][3]) > 0
    assert int(by_name["gradient of output", "backbone.blocks.0.norm1"][3]) > 0
    assert by_name["parameter", "backbone.patch_embed.proj.weight"][3] == "0"
    content = json.loads((tmp_path / "found.json").read_text())
    assert content["loss"] == "nan" and content["exact"] is True
    assert [image["sample_id"] for image in content["bad_images"]] == [
        record["sample_ids"][row] for row in (5, 40)
    ]
    assert Path(picture) == spoiled / "debug_4.png"
    with Image.open(picture) as sheet:
        assert sheet.width > sheet.height > 100


def test_the_sheet_shows_the_spoiled_images_and_their_masks(spoiled: Path) -> None:
    from mim.core.rng import image_keys
    from mim.core.settings import load_config
    from mim.data import open_source, train_loader

    found = debug_batch(spoiled, device="cpu")
    config = load_config(spoiled / "config.yaml")
    source = open_source(config.data, "train")
    (batch,) = train_loader(source, config.data, 0, start_step=3, total_steps=4)
    from mim.model import build_model

    keys = image_keys(0, 0, batch.sample_ids, purpose="mask")
    model = build_model(config)
    mask = model.draw_mask(batch.images.float(), keys, epoch=0).is_masked.view(-1, 4, 4)
    place = [title.partition("\n")[0] for title in found.titles]
    for row in (5, 40):
        shown = place.index(str(int(batch.sample_ids[row])))
        assert found.titles[shown].endswith("loss nan")
        pixels = torch.from_numpy(found.original[shown])[..., 0]
        assert (pixels.int() - batch.images[row, 0].int()).abs().max() <= 1
        changed = torch.from_numpy(found.masked[shown])[..., 0] != pixels
        patches = changed.view(4, 2, 4, 2).any(3).any(1)
        assert not (patches & ~mask[row]).any(), "only hidden patches are gray"
        assert (patches & mask[row]).any()


def test_mistakes_of_debug(spoiled: Path, mim: Mim, tmp_path: Path) -> None:
    assert "--step: 99 is not one of 1 to 6" in mim("debug", "batch", spoiled, "--step", 99).line
    other = debug_batch(spoiled, 6, "cpu")
    assert not other.exact and "step_00000003.pt, not those" in other.lines()[0]
    path = spoiled / "nonfinite.json"
    record = json.loads(path.read_text())
    record["sample_ids"][:3] = record["sample_ids"][1:4]
    path.write_text(json.dumps(record))
    line = mim("debug", "batch", spoiled).line
    assert "3 of the 64 images of step 4 are no longer those in nonfinite.json" in line
    path.write_text("{")
    assert "cannot be read" in mim("debug", "batch", spoiled).line
    path.unlink()
    with pytest.raises(UserError, match=r"has no nonfinite\.json"):
        debug_batch(spoiled)
    assert mim("debug", "batch", tmp_path).code == 2
