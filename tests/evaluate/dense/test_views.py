"""Views: image, mask and boxes move alike, by key alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mim.core.rng import image_keys
from mim.evaluate.dense.views import (
    View,
    cover_factor,
    fit_factor,
    fitted_view,
    training_view,
    whole_view,
)


def keys(count: int) -> torch.Tensor:
    return image_keys(0, 0, torch.arange(count), purpose="augment")


def views(count: int, original: tuple[int, int] = (60, 80)) -> list[View]:
    return [
        training_view(key[None], original, (48, 48), 0.9, (0.5, 2.0), True) for key in keys(count)
    ]


def test_image_mask_and_box_stay_together() -> None:
    pixels = np.zeros((60, 80), np.uint8)
    pixels[22:47, 31:66] = 255
    box = torch.tensor([[31.0, 22.0, 66.0, 47.0]])
    image, mask = Image.fromarray(pixels), Image.fromarray((pixels // 255).astype(np.int32))
    seen = 0
    for view in views(60):
        moved = view.pixels(image, 0)
        labels = view.pixels(mask, -1, Image.Resampling.NEAREST)
        # The two differ at most where smoothing meets the rim of the rectangle.
        assert ((moved > 127) != (labels == 1)).mean() < 0.05
        left, top, right, bottom = view.boxes(box, (60, 80))[0].tolist()
        rows, columns = np.nonzero(labels == 1)
        if right - left < 2 or bottom - top < 2:
            assert len(rows) < 200
            continue
        seen += 1
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert found == pytest.approx([left, top, right, bottom], abs=1.01)
    assert seen > 40


def test_a_mirrored_view_by_hand() -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    view = View(scaled=(3, 4), corner=(1, 1), size=(3, 2), mirrored=True)
    assert view.kept == (2, 2)
    expected = [[6, 5], [10, 9], [99, 99]]
    assert view.pixels(Image.fromarray(pixels), 99).tolist() == expected
    boxes = view.boxes(torch.tensor([[0.0, 0.0, 2.0, 2.0], [3.0, 0.0, 4.0, 1.0]]), (3, 4))
    # The first keeps its last column, which the mirror brings to the right; nothing is left of
    # the second.
    assert boxes.tolist() == [[1.0, 0.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0]]


def test_a_view_follows_its_key_alone() -> None:
    drawn = views(400)
    assert drawn == views(400)
    mirrored = sum(view.mirrored for view in drawn) / 400
    assert 0.4 < mirrored < 0.6
    heights = sorted(view.scaled[0] for view in drawn)
    assert heights[0] == pytest.approx(60 * 0.9 * 0.5, abs=2)
    assert heights[-1] == pytest.approx(60 * 0.9 * 2.0, abs=2)
    for view in drawn:
        assert all(0 < kept <= side for kept, side in zip(view.kept, view.size, strict=True))
    assert len({view.corner for view in drawn}) > 100
    plain = training_view(keys(1), (60, 80), (48, 48), 0.9, (1.0, 1.0), False)
    assert plain.scaled == (54, 72) and not plain.mirrored


def test_factors_and_whole_views() -> None:
    assert cover_factor((60, 80), (30, 30)) == 0.5
    assert fit_factor((60, 80), (30, 30)) == 0.375
    assert whole_view((60, 80), 0.5) == View((30, 40), (0, 0), (30, 40))
    fitted = fitted_view((60, 80), (30, 30))
    assert fitted.scaled == (22, 30) and fitted.size == (30, 30) and fitted.kept == (22, 30)


def test_boxes_come_back() -> None:
    view = fitted_view((60, 80), (32, 32))
    boxes = torch.tensor([[3.0, 5.0, 40.0, 59.0], [0.0, 0.0, 80.0, 60.0]])
    there = view.boxes(boxes, (60, 80))
    assert torch.allclose(view.original_boxes(there, (60, 80)), boxes, atol=1e-4)
    beyond = torch.tensor([[-5.0, -5.0, 100.0, 100.0]])
    assert view.original_boxes(beyond, (60, 80)).tolist() == [[0.0, 0.0, 80.0, 60.0]]


def test_channels_and_padding_colour() -> None:
    image = Image.new("RGB", (4, 4), (10, 20, 30))
    padded = fitted_view((4, 4), (4, 6)).pixels(image, (1, 2, 3))
    assert padded.shape == (4, 6, 3)
    assert padded[0, 3].tolist() == [10, 20, 30] and padded[0, 4].tolist() == [1, 2, 3]


@pytest.mark.parametrize("mode", ["L", "RGB", "I"])
def test_a_part_is_scaled_as_if_the_whole_were(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mim.evaluate.dense.views._MOST", 0)
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    places = Image.fromarray(np.arange(60 * 80, dtype=np.int32).reshape(60, 80))
    image = places if mode == "I" else Image.fromarray(pixels).convert(mode)
    resample = Image.Resampling.NEAREST if mode == "I" else Image.Resampling.BILINEAR
    for view in views(30):
        height, width = view.scaled
        (top, left), (rows, columns) = view.corner, view.kept
        whole = np.array(image.resize((width, height), resample)).astype(int)
        part = np.array(view.move(image, 0, resample)).astype(int)
        part = part[:, ::-1] if view.mirrored else part
        wanted, part = whole[top : top + rows, left : left + columns], part[:rows, :columns]
        if mode != "I":
            assert abs(part - wanted).max() <= 2
            continue
        # A tie may take the row or column beside, of the original.
        assert abs(part // 80 - wanted // 80).max() <= 1
        assert abs(part % 80 - wanted % 80).max() <= 1


@pytest.mark.parametrize("original", [(30_000, 1), (1, 30_000), (20_000, 2)])
def test_a_thin_picture_needs_no_memory(original: tuple[int, int]) -> None:
    image = Image.new("RGB", original[::-1], (10, 20, 30))
    mask = Image.fromarray(np.full(original, 3, np.int32))
    factor = cover_factor(original, (512, 512))
    for key in keys(3):
        view = training_view(key[None], original, (512, 512), factor, (0.5, 2.0), True)
        assert view.scaled[0] * view.scaled[1] > 1e9, "the whole would take gigabytes"
        rows, columns = view.kept
        moved = view.pixels(image, 0)
        moved = moved[:, ::-1] if view.mirrored else moved
        assert (moved[:rows, :columns] == (10, 20, 30)).all()
        labels = view.pixels(mask, 255, Image.Resampling.NEAREST)
        assert set(np.unique(labels)) <= {3, 255} and (labels == 3).sum() == rows * columns
