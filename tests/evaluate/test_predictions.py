"""The answers kept for each test image: their means are the measures, and nothing is lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mim.core.errors import UserError
from mim.evaluate.base import EVALUATIONS, Evaluation, Features, build_evaluation
from mim.evaluate.predictions import FILE, Measured, read_predictions, save_predictions


def _features(n: int, shift: int) -> Features:
    generator = torch.Generator().manual_seed(shift)
    labels = torch.arange(n) % 3
    values = torch.randn(n, 4, generator=generator) + 1.2 * labels[:, None]
    return Features(values, labels, torch.arange(n) + 1000 * shift)


@pytest.mark.parametrize("name", ["knn", "linear", "linear_grid"])
def test_the_mean_of_the_answers_is_the_measure(name: str) -> None:
    evaluation = build_evaluation(name, {"few_shot": [4], "draws": 3})
    assert isinstance(evaluation, Evaluation)
    val = _features(40, 2)
    measured = evaluation.run(_features(60, 1), val)
    assert isinstance(measured, Measured)
    arrays = measured.arrays
    assert arrays["sample_ids"].tolist() == val.sample_ids.tolist()
    assert val.labels is not None and arrays["labels"].tolist() == val.labels.tolist()
    assert arrays["accuracy"].shape == (40,) and arrays["accuracy_4_per_class"].shape == (3, 40)
    assert evaluation.measures() == ("accuracy", "accuracy_4_per_class")
    for key in evaluation.measures():
        assert arrays[key].mean() == pytest.approx(measured[key])
    draws = arrays["accuracy_4_per_class"].mean(1)
    assert draws.std(ddof=1) == pytest.approx(measured["accuracy_4_per_class_std"])
    assert 0.4 < measured["accuracy"] < 1


def _measured(right: list[bool]) -> Measured:
    answers = {"accuracy": torch.tensor(right)}
    return Measured({"accuracy": 0.0}, torch.arange(len(right)), answers)


def test_a_second_evaluation_keeps_the_first_and_replaces_its_own(tmp_path: Path) -> None:
    save_predictions(tmp_path, {"knn": _measured([True, False]), "analysis": {"rank": 3.0}})
    save_predictions(tmp_path, {"linear": _measured([True, True])})
    save_predictions(tmp_path, {"knn": _measured([False, False, True])})
    found = read_predictions(tmp_path)
    assert list(found) == ["linear", "knn"]
    assert found["knn"]["accuracy"].tolist() == [False, False, True]
    assert found["linear"]["accuracy"].dtype == np.bool_
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_variants_on_the_same_images_stand_beside_each_other() -> None:
    whole = _measured([True, True])
    whole.include(_measured([True, False]), "_of_1_percent")
    assert list(whole) == ["accuracy", "accuracy_of_1_percent"]
    assert whole.arrays["accuracy_of_1_percent"].tolist() == [True, False]


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"PK no zip")
    with pytest.raises(UserError, match=f"{FILE}: cannot be read as predictions"):
        read_predictions(tmp_path)
    assert "knn" in EVALUATIONS
