"""The images on which groups disagree: chosen by their answers, kept as a screen shows them."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch

from mim.compare.disagreement import (
    FILE,
    image_statistics,
    most_disputed,
    thumbnails,
    write_disagreement,
)
from mim.core.config import DataConfig
from mim.data import open_source
from mim.evaluate.predictions import Measured, save_predictions


def test_the_most_disputed_images_come_first_and_agreed_ones_not_at_all() -> None:
    shares = np.array([[1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.5, 0.0]])
    assert most_disputed(shares, np.array([4, 3, 2, 1])) == [3, 1, 2]


def test_equally_disputed_images_stand_by_their_ids() -> None:
    """The variance of three thirds depends on their order, by a rounding error."""
    thirds = np.array(list(itertools.permutations([0, 2 / 3, 1]))).T  # (3 groups, 6 images)
    assert len(set(thirds.var(axis=0))) > 1
    assert most_disputed(thirds, np.array([3, 5, 0, 4, 1, 2])) == [2, 4, 5, 0, 3, 1]


def test_thumbnails_of_any_range() -> None:
    screen = thumbnails(torch.full((1, 3, 200, 100), 0.5))
    assert screen.shape == (1, 96, 48, 3) and np.abs(screen.astype(int) - 128).max() <= 1
    raw = torch.linspace(-2000, 4000, 64 * 64).reshape(1, 1, 64, 64)
    assert thumbnails(raw).min() == 0 and thumbnails(raw).max() == 255
    assert thumbnails(torch.zeros(1, 5, 8, 8, dtype=torch.uint8)).shape == (1, 8, 8, 1)


def test_what_an_image_looks_like_by_hand() -> None:
    flat = torch.full((3, 4, 4), 10.0)
    board = torch.arange(16).reshape(4, 4).add(torch.arange(4)[:, None]).remainder(2) * 8.0
    red = torch.zeros(3, 4, 4)
    red[0] = 6
    found = image_statistics(torch.stack([flat, board.expand(3, -1, -1), red]))
    expected = [[10, 0, 0, 0], [4, 4, 0, 4], [2, 0, 8**0.5, 0]]
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64))


def test_the_pictures_are_those_of_the_test_images(tmp_path: Path) -> None:
    data = DataConfig(source="photos", image_size=32, channels=3)
    source = open_source(data, "val")
    for name, wrong in (("a", 7), ("b", 20)):
        right = torch.ones(len(source), dtype=torch.bool)
        right[wrong] = False
        (tmp_path / name).mkdir()
        numbers = Measured({}, source.sample_ids, {"accuracy": right}, source.labels)
        save_predictions(tmp_path / name, {"knn": numbers})
    groups = {name: [tmp_path / name] for name in ("a", "b")}
    assert write_disagreement(tmp_path, groups, "knn", data)
    with np.load(tmp_path / FILE) as file:
        assert sorted(file["sample_ids"]) == sorted(source.sample_ids[[7, 20]].tolist())
        first = int((source.sample_ids == int(file["sample_ids"][0])).nonzero()[0, 0])
        expected = np.asarray(source.image(first))
        assert np.array_equal(file["images"][0], expected[..., :3])
        assert file["classes"].tolist() == list(source.classes)
        assert file["measured_ids"].tolist() == source.sample_ids.tolist()
        own = image_statistics(torch.tensor(expected).permute(2, 0, 1)[None])
        assert np.allclose(file["statistics"][first], own[0].numpy(), rtol=1e-12)
    assert not write_disagreement(tmp_path, {"a": [tmp_path / "a"]}, "knn", data)
    assert not write_disagreement(tmp_path, groups, "linear", data)
