"""Splits and few-shot sets: keyed, balanced, checked; and the settings of evaluations."""

from __future__ import annotations

import pytest
import torch

from mim.core.errors import UserError
from mim.evaluate import ProbeSettings, build_evaluation
from mim.evaluate.base import check_few_shot, few_shot_draw, few_shot_folds, stratified_holdout

IDS = torch.arange(300) * 13 + 5
LABELS = torch.randint(0, 5, (300,), generator=torch.Generator().manual_seed(0))


def ids_of(mask_or_index: torch.Tensor, ids: torch.Tensor) -> set[int]:
    return set(ids[mask_or_index].tolist())


def test_holdout_is_a_fifth_of_each_class_and_keyed() -> None:
    held = stratified_holdout(IDS, LABELS, 0)
    for label in range(5):
        of_class = label == LABELS
        assert int(held[of_class].sum()) == round(0.2 * int(of_class.sum()))
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    assert ids_of(held, IDS) == ids_of(stratified_holdout(IDS[order], LABELS[order], 0), IDS[order])
    assert ids_of(held, IDS) != ids_of(stratified_holdout(IDS, LABELS, 1), IDS)


def test_few_shot_sets_are_balanced_keyed_and_nested() -> None:
    part = few_shot_draw(IDS, LABELS, 10, seed=0, draw=0)
    assert LABELS[part].bincount().tolist() == [10] * 5
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    shuffled = few_shot_draw(IDS[order], LABELS[order], 10, seed=0, draw=0)
    assert ids_of(part, IDS) == ids_of(shuffled, IDS[order])
    for seed, draw in ((0, 1), (1, 0)):
        assert ids_of(part, IDS) != ids_of(few_shot_draw(IDS, LABELS, 10, seed, draw), IDS)
    assert ids_of(few_shot_draw(IDS, LABELS, 4, 0, 0), IDS) < ids_of(part, IDS)


@pytest.mark.parametrize(("n", "count"), [(1, 0), (3, 3), (10, 5)])
def test_folds_hold_out_each_image_once_and_each_class_evenly(n: int, count: int) -> None:
    part = few_shot_draw(IDS, LABELS, n, 0, 0)
    folds = few_shot_folds(IDS[part], LABELS[part], n, 0, 0)
    assert folds.shape == (count, 5 * n)
    if count:
        assert (folds.sum(0) == 1).all()
        for fold in folds:
            assert LABELS[part][fold].bincount(minlength=5).tolist() == [n // count] * 5


def test_a_class_too_small_is_named() -> None:
    labels = torch.tensor([0] * 9 + [2] * 4)
    with pytest.raises(UserError, match=r"few_shot.*5 images a class, but class 'cat' has 4"):
        check_few_shot(labels, ProbeSettings(few_shot=(2, 5)), ("dog", "cow", "cat"))
    check_few_shot(labels, ProbeSettings(few_shot=(4,)))


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("nearest", {}, r"evaluations: 'nearest' is not one of .*knn, label_free, linear"),
        ("knn", {"poool": "mean"}, r"evaluations.knn: 'poool' is not one of .*did you mean 'pool'"),
        ("linear", {"pool": "max"}, r"evaluations.linear.pool: 'max' is not one of both, cls"),
        ("linear", {"draws": 0}, r"evaluations.linear.draws: 0 must be at least 1"),
        ("linear", {"few_shot": [10, 0]}, r"evaluations.linear.few_shot"),
        ("linear", {"few_shot": 10}, r"evaluations.linear.few_shot: 10 must be a list"),
        ("linear", {"seed": "one"}, r"evaluations.linear.seed: 'one' must be a whole number"),
        ("linear", {"draws": True}, r"True must be a whole number"),
    ],
)
def test_bad_settings(name: str, settings: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_evaluation(name, settings)


def test_settings_from_yaml() -> None:
    built = build_evaluation("linear", {"few_shot": [5, 10], "strengths": [1, 0.1]})
    assert built.settings == type(built.settings)(few_shot=(5, 10), strengths=(1.0, 0.1))
