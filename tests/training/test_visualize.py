"""What the figures show: the masks that training uses, real predictions, true attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from mim import load_config, sample_masks
from mim.core.errors import UserError
from mim.core.rng import image_keys
from mim.data import eval_loader, normalize, open_source
from mim.evaluate.visualize import (
    algebra_figure,
    attention_figure,
    draw_masks,
    mask_figure,
    reconstruction_figure,
    save_figure,
)
from mim.masks import MASKS
from mim.model.backbones import attention_maps
from mim.training.checkpoint import read_config
from mim.training.loading import load

Mim = Callable[..., Any]
Tiny = Callable[..., Path]


def pictures(figure: Figure) -> list[Any]:
    """What is shown, in reading order."""
    return [np.asarray(axis.images[0].get_array()) for axis in figure.axes if axis.images]


def titles(figure: Figure) -> list[str]:
    found = [a.get_title() or a.get_title(loc="left") for a in figure.axes]
    return [text for text in found if text]


def words(figure: Figure) -> str:
    return "\n".join(text.get_text() for axis in figure.axes for text in axis.texts)


def test_masks_are_those_of_training(tiny: Tiny) -> None:
    config = load_config(tiny({"mask.aligned.unit": 4}))
    source = open_source(config.data, "train")
    drawn = draw_masks(config, ["random", "grid", "aligned"], [0.5, 0.75], images=20)
    assert [(item.generator, item.ratio) for item in drawn] == [
        (name, ratio) for name in ("random", "grid", "aligned") for ratio in (0.5, 0.75)
    ]
    ids = source.sample_ids[torch.linspace(0, len(source) - 1, 20).round().long()]
    for item in drawn:
        mask = load_config(
            tiny({"mask.aligned.unit": 4, "mask.name": item.generator, "mask.ratio": item.ratio})
        ).mask
        expected = sample_masks(
            mask, (4, 4), seed=config.seed, epoch=0, sample_ids=ids, patch_size=(2, 2)
        )
        assert item.mask is not None and item.statistics is not None
        assert torch.equal(item.mask.is_masked, expected.is_masked)
        assert item.statistics["ratio_mean"] == item.ratio


def test_the_figure_of_masks(tiny: Tiny, tmp_path: Path) -> None:
    config = load_config(tiny())
    drawn = draw_masks(config, ["random", "column"], [0.5, 0.75], images=30)
    figure = mask_figure(config, images=2, drawn=drawn)
    assert figure.texts[0].get_text().startswith("hidden: how often each patch is")
    shown = pictures(figure)
    assert len(shown) == 2 * (2 * 2 + 2)  # two images and a map at each ratio, in two rows
    for row, item in enumerate(drawn[::2]):
        assert item.mask is not None
        first = shown[row * 6]  # the first image at ratio 0.5
        flags = item.mask.is_masked[0].view(4, 4).numpy().repeat(2, 0).repeat(2, 1)
        original = item.images[0].permute(1, 2, 0).expand(-1, -1, 3).numpy()
        assert (first[flags] == 127).all()
        assert (first[~flags] == original[~flags]).all()
        heat = shown[row * 6 + 4]
        np.testing.assert_allclose(heat, item.mask.is_masked.double().mean(0).view(4, 4))
    assert titles(figure) == ["ratio 0.5", "ratio 0.75", "hidden, 0.5", "hidden, 0.75"]
    assert "0.5: hides 0.500 (0.50 to 0.50)" in words(figure)
    # Columns of four patches: of two neighbours at ratio a half, of one alone, or of more.
    sizes = drawn[2].statistics
    assert sizes is not None
    patches = sorted(s for s, n in sizes["block_sizes"].items() for _ in range(s * n))
    low, middle, high = (patches[math.ceil(q * len(patches)) - 1] for q in (0.1, 0.5, 0.9))
    assert f"blocks of {middle} patches ({low} to {high})" in words(figure)
    path = save_figure(figure, tmp_path / "masks.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_every_generator_is_drawn_or_says_why_not(tiny: Tiny) -> None:
    config = load_config(tiny())
    drawn = draw_masks(config, ratios=[0.5], images=4)
    assert [item.generator for item in drawn] == list(MASKS)
    refused = {item.generator: item.refusal for item in drawn if item.mask is None}
    assert {"aligned", "file"} <= refused.keys()  # a unit of 32 pixels, and no path
    built_in = {name for name in MASKS if MASKS.get(name).__module__.startswith("mim.")}
    assert built_in & refused.keys() == {"aligned", "file", "target_blocks"}
    figure = mask_figure(config, drawn=drawn)  # no blank rows, but a line
    assert len(pictures(figure)) == 3 * (len(drawn) - len(refused))
    said = [text.get_text() for text in figure.texts if "Left out" in text.get_text()]
    assert len(said) == 1 and "aligned, file, target_blocks" in said[0]


@pytest.mark.parametrize("regime", ["drop", "zero", "token"])
def test_attention_is_what_the_run_computes(
    regime: str, tiny: Tiny, tmp_path: Path, mim: Mim
) -> None:
    run = tmp_path / "run"
    depth = {"model.regime.name": regime, "model.backbone_args.depth": 3, "mask.ratio": 0.5}
    assert mim("pretrain", "--config", tiny(depth), "--output", run).code == 0
    figure = attention_figure(run, indices=[4, 9])
    shown = pictures(figure)
    columns = 1 + 3 + 1 + 2
    assert len(shown) == 2 * columns
    config, model = read_config(run), load(run)
    source = open_source(config.data, "val")
    (batch,) = eval_loader(source, config.data, batch_size=2, indices=[4, 9])
    images = normalize(batch.images, source.mean, source.std)
    mask = model.draw_mask(images, image_keys(0, -1, batch.sample_ids))
    with torch.no_grad():
        tokens, bias = model.regime.inputs(model.backbone, images, mask)
        last = attention_maps(model.backbone, replace(tokens, bias=bias))[-1].mean(1)
    for row in range(2):
        seen = shown[row * columns + columns - 1].reshape(-1)
        hidden = mask.is_masked[row].numpy()
        if regime == "drop":
            assert np.isnan(np.ma.filled(seen, np.nan)[hidden]).all()
            np.testing.assert_allclose(seen[~hidden], last[row, 0, 1:].numpy(), rtol=1e-5)
        else:
            queries = [q for q in np.flatnonzero(hidden) if np.allclose(seen, last[row, 1 + q, 1:])]
            assert len(queries) >= 1, "the row of a hidden query"
            assert (seen[hidden] == 0).all() == (regime == "zero")
    assert regime in " ".join(titles(figure))


def test_reconstructions_under_masks_not_seen_in_training(
    tiny: Tiny, tmp_path: Path, mim: Mim
) -> None:
    run = tmp_path / "run"
    assert mim("pretrain", "--config", tiny(), "--output", run).code == 0
    figure = reconstruction_figure(run, indices=[7], generators=["random", "row"], ratios=[0.25])
    shown = pictures(figure)
    assert len(shown) == 1 + 2 * 3
    original, (masked, predicted, composed) = shown[0], shown[4:7]
    hidden = (masked != original).any(-1).reshape(4, 2, 4, 2).any((1, 3))
    rows = hidden.any(1).repeat(2)
    assert 0 < rows.sum() <= 2, "one row of four"
    assert (composed[~rows] == original[~rows]).all()
    assert (composed[rows] == predicted[rows]).all()
    assert "row, 0.25 hidden" in " ".join(titles(figure))
    with pytest.raises(UserError, match="--indices: 99999 is not one of 0 to"):
        reconstruction_figure(run, indices=[99999])
    with pytest.raises(UserError, match=r"mask\.ratio: 1\.0"):
        reconstruction_figure(run, ratios=[1.0])
    with pytest.raises(UserError, match="did you mean 'row'"):
        reconstruction_figure(run, generators=["rows"])


def test_hidden_patches_are_gray_however_an_image_is_stretched(tiny: Tiny, tmp_path: Path) -> None:
    from mim.model import build_model
    from mim.training.pictures import reconstruct

    rng = np.random.default_rng(0)
    (tmp_path / "deep").mkdir()
    for number in range(6):
        values = rng.normal(number, 1, (8, 8, 4)).astype(np.float32)
        np.save(tmp_path / "deep" / f"{number}.npy", values)
    given = {"data.source": "flat", "data.path": str(tmp_path / "deep"), "data.channels": 4}
    config = load_config(tiny({**given, "data.show": [3, 0, 1]}))
    source = open_source(config.data, "train")
    found = reconstruct(build_model(config), config, source, [0, 1])
    hidden = np.asarray(found["is_masked"]).repeat(2, 1).repeat(2, 2)
    assert np.unique(found["masked"][hidden]).tolist() == [128]
    assert (found["masked"][~hidden] == found["original"][~hidden]).all()


def test_the_algebra_as_matrices(tiny: Tiny) -> None:
    config = load_config(tiny({"mask.ratio": 0.5}))
    shown = pictures(algebra_figure(config))
    source = open_source(config.data, "train")
    mask = sample_masks(config.mask, (4, 4), seed=0, epoch=0, sample_ids=source.sample_ids[:1])
    zero = np.concatenate([[True], ~mask.is_masked[0].numpy()])
    order = np.tril(np.ones((17, 17), dtype=bool))
    assert len(shown) == 8
    np.testing.assert_array_equal(shown[1], np.broadcast_to(zero, (17, 17)))
    np.testing.assert_array_equal(shown[2], order)
    np.testing.assert_array_equal(shown[4], order & zero)
    for patches in shown[5:]:
        assert patches.shape == (16, 16)


def test_a_learned_mask_is_drawn_with_its_trained_network(
    tiny: Tiny, tmp_path: Path, mim: Mim
) -> None:
    run = tmp_path / "run"
    changes = {"mask.name": "learned", "mask.learned.sampling": "topk", "mask.learned.width": 8}
    assert mim("pretrain", "--config", tiny(changes), "--output", run).code == 0
    config, model = read_config(run), load(run)
    (trained,) = draw_masks(config, ["learned"], [0.5], images=20, model=model)
    (untrained,) = draw_masks(config, ["learned"], [0.5], images=20)
    assert trained.mask is not None and untrained.mask is not None
    assert not torch.equal(trained.mask.is_masked, untrained.mask.is_masked)
    source = open_source(config.data, "train")
    images = normalize(trained.images, source.mean, source.std)
    assert model.mask_network is not None
    with torch.no_grad():
        scores = model.mask_network(images)
    hidden = scores.argsort(dim=1)[:, :8]  # adamae hides the lowest
    assert trained.mask.is_masked.gather(1, hidden).all()


def test_attention_masks_are_those_of_the_runs_teacher(
    tiny: Tiny, tmp_path: Path, mim: Mim
) -> None:
    run = tmp_path / "run"
    changes = {
        "mask.name": "attention",
        "mask.attention.randomness": 0.0,
        "model.teacher_decay": 0.9,
        "optim.base_lr": 0.1,
    }
    assert mim("pretrain", "--config", tiny(changes), "--output", run).code == 0
    config, model = read_config(run), load(run)
    (drawn,) = draw_masks(config, ["attention"], [0.5], images=40, model=model)
    source = open_source(config.data, "train")
    images = normalize(drawn.images, source.mean, source.std)
    assert model.teacher is not None and drawn.mask is not None
    attended = model.teacher.attention(images).topk(8, dim=1).indices
    assert drawn.mask.is_masked.gather(1, attended).all()
