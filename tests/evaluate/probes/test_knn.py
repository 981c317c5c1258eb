"""Nearest neighbours: hand-computed votes, scikit-learn's, and what may choose k."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from mim.core.errors import UserError
from mim.evaluate import Features, Knn, KnnSettings, build_evaluation, knn_predict


def at(*degrees: float) -> torch.Tensor:
    """Points on circles of different radii: only the angle may matter."""
    angle = torch.tensor(degrees) * math.pi / 180
    radius = torch.arange(1.0, len(degrees) + 1)
    return torch.stack([angle.cos(), angle.sin()], 1) * radius[:, None]


def test_weighted_vote_by_hand() -> None:
    # From 0 degrees: cosines 1 (class 0), 0.866, 0.866 (class 1 twice), 0 (class 0).
    bank, labels = at(0, 30, -30, 90), torch.tensor([0, 1, 1, 0])
    query = torch.tensor([[5.0, 0.0]])
    # k = 3: exp(1/T) against 2 exp(0.866/T). T = 0.1: e^10 = 22026 > 2 e^8.66 = 11535; T = 1:
    # 2.718 < 4.755. k = 1: class 0. k = 4, T = 1: 2.718 + 1 = 3.718 < 4.755.
    guess = knn_predict(query, bank, labels, [1, 3, 4], [0.1, 1.0])
    assert guess[..., 0].tolist() == [[0, 0], [0, 1], [0, 1]]


def test_small_temperature_does_not_overflow() -> None:
    bank, labels = at(0, 40, 50), torch.tensor([1, 0, 0])
    assert knn_predict(at(1), bank, labels, [3], [1e-3])[0, 0].tolist() == [1]


def test_equals_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(200, 8, generator=generator)
    labels = torch.randint(0, 4, (200,), generator=generator)
    query = torch.randn(60, 8, generator=generator)
    for k in (1, 7, 50):
        model = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
        )
        expected = model.fit(bank.numpy(), labels.numpy()).predict(query.numpy())
        guess = knn_predict(query, bank, labels, [k], [0.07])[0, 0]
        assert guess.tolist() == expected.tolist()


def blobs(n: int, seed: int, noise: float = 1.0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 4
    centres = torch.eye(4, 6) * 1.5
    values = centres[labels] + noise * torch.randn(n, 6, generator=generator)
    return Features(values, labels, torch.arange(n) + 1000 * seed)


def chosen(numbers: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in numbers.items() if "accuracy" not in key}


def test_val_has_no_say_in_the_choice() -> None:
    train, val = blobs(400, 1), blobs(200, 2)
    knn = Knn()
    numbers = knn.run(train, val)
    other = knn.run(train, val._replace(values=val.values.flip(0), labels=val.labels.roll(1)))
    assert chosen(numbers) == chosen(other)
    assert numbers["accuracy"] != other["accuracy"]
    assert numbers == knn.run(train, val)


def test_choice_is_the_best_on_held_out_training_images() -> None:
    # Classes that overlap: one neighbour is a gamble, many are an average.
    numbers = Knn(KnnSettings(k=(1, 50))).run(blobs(800, 1, noise=1.5), blobs(400, 2, noise=1.5))
    assert numbers["chosen_k"] == 50
    # Every image twice under the same label: its twin is always right, others seldom.
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(300, 16, generator=generator).repeat(3, 1)
    labels = torch.randint(0, 4, (300,), generator=generator).repeat(3)
    twins = Features(values, labels, torch.arange(900))
    numbers = Knn(KnnSettings(k=(50, 1), temperature=(1.0,))).run(twins, twins)
    assert numbers["chosen_k"] == 1
    assert numbers["accuracy"] == 1.0


def test_numbers_of_few_shot() -> None:
    knn = build_evaluation("knn", {"few_shot": [1, 20], "draws": 3})
    numbers = knn.run(blobs(400, 1), blobs(400, 2))
    assert numbers["mean_k_1_per_class"] == 1  # nothing to choose on
    assert 0.25 < numbers["accuracy_1_per_class"] < numbers["accuracy_20_per_class"]
    assert numbers["accuracy_20_per_class"] <= numbers["accuracy"] + 0.03
    assert numbers["accuracy_20_per_class_std"] > 0
    single = build_evaluation("knn", {"few_shot": [20], "draws": 1})
    assert single.run(blobs(400, 1), blobs(400, 2))["accuracy_20_per_class_std"] == 0


def test_k_above_the_images_falls_back() -> None:
    numbers = Knn(KnnSettings(k=(500,), few_shot=(2,))).run(blobs(40, 1), blobs(40, 2))
    assert numbers["chosen_k"] == 32  # all of the images that were not held out
    assert numbers["mean_k_2_per_class"] == 4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"k": [0]}, "evaluations.knn.k"),
        ({"k": []}, "evaluations.knn.k"),
        ({"temperature": [-1.0]}, "evaluations.knn.temperature"),
        ({"k": 5}, "must be a list"),
        ({"k": ["five"]}, "'five' must be a whole number"),
    ],
)
def test_bad_settings(settings: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_evaluation("knn", settings)
