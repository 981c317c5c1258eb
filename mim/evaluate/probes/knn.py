"""Weighted nearest-neighbour classification of frozen features.

The vote of Wu et al. 2018 (https://arxiv.org/abs/1805.01978) as DINO uses it (Caron et al. 2021,
https://arxiv.org/abs/2104.14294): the k training images of highest cosine similarity vote for
their class with weight exp(similarity / T). DINO reports the best k on the test set; here k and
T are chosen on a split of train.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from mim.core.fields import Count, Positive
from mim.evaluate.base import (
    EVALUATIONS,
    NOT_EMPTY,
    Evaluation,
    Features,
    ProbeSettings,
    check_few_shot,
    few_shot_draw,
    few_shot_folds,
    labels_of,
    spread,
    stratified_holdout,
)
from mim.evaluate.predictions import Measured

_QUERIES = 1024  # images compared with the training set at once


@dataclass(frozen=True)
class KnnSettings(ProbeSettings):
    """Settings of the nearest-neighbour evaluation."""

    k: Annotated[tuple[Count, ...], NOT_EMPTY] = (1, 2, 5, 10, 20, 50, 100, 200)
    """Numbers of neighbours to choose from; those above the number of images are left out."""
    temperature: Annotated[tuple[Positive, ...], NOT_EMPTY] = (0.02, 0.07, 0.2)
    """Temperatures of the vote to choose from."""


def knn_predict(
    queries: Tensor,
    features: Tensor,
    labels: Tensor,
    k: Iterable[int],
    temperature: Iterable[float],
) -> Tensor:
    """Classes by weighted vote, for every k and temperature at once.

    Args:
        queries: (m, D).
        features: (n, D), the images that vote; n >= max(k).
        labels: (n,) int64.
        k: numbers of neighbours.
        temperature: temperatures of the vote.

    Returns:
        (len(k), len(temperature), m) int64.
    """
    ks, temperatures = list(k), list(temperature)
    bank = F.normalize(features.float(), dim=1)
    classes = int(labels.max()) + 1
    parts = []
    for query in queries.split(_QUERIES):
        similarity = F.normalize(query.float(), dim=1) @ bank.mT  # (m', n)
        top, index = similarity.topk(max(ks), dim=1)  # (m', max k)
        voted = labels[index]
        # Relative to the nearest neighbour: the same winner, and no overflow at a small T.
        distance = (top - top[:, :1]).double()
        part = torch.empty(len(ks), len(temperatures), len(query), dtype=torch.int64)
        for i, number in enumerate(ks):
            for j, t in enumerate(temperatures):
                votes = distance.new_zeros(len(query), classes)
                votes.scatter_add_(1, voted[:, :number], (distance[:, :number] / t).exp())
                part[i, j] = votes.argmax(1).cpu()
        parts.append(part)
    return torch.cat(parts, 2)


@EVALUATIONS.register("knn", KnnSettings)
class Knn(Evaluation):
    """DINO's nearest-neighbour classifier, k and temperature chosen on a split of train."""

    settings: KnnSettings

    def _grid(self, images: int) -> list[int]:
        """The k that so many images allow; all of them where every k is too large."""
        return [k for k in self.settings.k if k <= images] or [images]

    def _choose(self, correct: Tensor, ks: list[int]) -> tuple[int, float]:
        """The first best of ``correct`` (len(ks), len(temperature)), counts of right answers."""
        best = int(correct.flatten().argmax())
        columns = len(self.settings.temperature)
        return ks[best // columns], self.settings.temperature[best % columns]

    def run(self, train: Features, val: Features) -> dict[str, float]:
        """See :meth:`Evaluation.run`."""
        s = self.settings
        x, y, ids = train.values, labels_of(train), train.sample_ids
        val_y = labels_of(val).cpu()
        check_few_shot(y, s)

        def right(subset: Tensor, k: int, t: float) -> Tensor:
            return knn_predict(val.values, x[subset], y[subset], [k], [t])[0, 0] == val_y

        held = stratified_holdout(ids, y, s.seed)
        everything = torch.arange(len(y), device=x.device)
        if held.any():
            ks = self._grid(int((~held).sum()))
            guess = knn_predict(x[held], x[~held], y[~held], ks, s.temperature)
            k, t = self._choose((guess == y[held].cpu()).sum(2), ks)
        else:
            k, t = 1, s.temperature[0]
        answers = {"accuracy": right(everything, k, t)}
        numbers: dict[str, float] = {
            "accuracy": float(answers["accuracy"].double().mean()),
            "chosen_k": k,
            "chosen_temperature": t,
        }
        for n in s.few_shot:
            found, chosen_k, chosen_t = [], [], []
            for draw in range(s.draws):
                part = few_shot_draw(ids, y, n, s.seed, draw)
                folds = few_shot_folds(ids[part], y[part], n, s.seed, draw)
                k, t = 1, s.temperature[0]  # one image a class leaves nothing to choose on
                if len(folds):
                    ks = self._grid(int((~folds).sum(1).min()))
                    correct = torch.zeros(len(ks), len(s.temperature), dtype=torch.int64)
                    for out in folds:
                        fit, ask = part[~out], part[out]
                        guess = knn_predict(x[ask], x[fit], y[fit], ks, s.temperature)
                        correct += (guess == y[ask].cpu()).sum(2)
                    k, t = self._choose(correct, ks)
                found.append(right(part, k, t))
                chosen_k.append(float(k))
                chosen_t.append(t)
            answers[f"accuracy_{n}_per_class"] = torch.stack(found)
            mean, std = spread([float(answer.double().mean()) for answer in found])
            numbers[f"accuracy_{n}_per_class"] = mean
            numbers[f"accuracy_{n}_per_class_std"] = std
            numbers[f"mean_k_{n}_per_class"] = spread(chosen_k)[0]
            numbers[f"mean_temperature_{n}_per_class"] = spread(chosen_t)[0]
        return Measured(numbers, val.sample_ids, answers, val_y)
