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
    few_shot_measures,
    few_shot_sets,
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
    measures = few_shot_measures

    def _chosen(self, x: Tensor, y: Tensor, held: Tensor) -> tuple[int, float]:
        """The first best k and temperature on what the folds (F, n) hold out.

        Too large a k is left out. Without a fold there is nothing to choose on: k is 1.
        """
        s = self.settings
        if not len(held):
            return 1, s.temperature[0]
        smallest = int((~held).sum(1).min())
        ks = [k for k in s.k if k <= smallest] or [smallest]
        correct = torch.zeros(len(ks), len(s.temperature), dtype=torch.int64)
        for out in held:
            guess = knn_predict(x[out], x[~out], y[~out], ks, s.temperature)
            correct += (guess == y[out].cpu()).sum(2)
        row, column = divmod(int(correct.flatten().argmax()), len(s.temperature))
        return ks[row], s.temperature[column]

    def run(self, train: Features, val: Features) -> dict[str, float]:
        s = self.settings
        x, y = train.values, labels_of(train)
        val_y = labels_of(val).cpu()
        check_few_shot(y, s)

        def right(subset: Tensor, k: int, t: float) -> Tensor:
            return knn_predict(val.values, x[subset], y[subset], [k], [t])[0, 0] == val_y

        held = stratified_holdout(train.sample_ids, y, s.seed)
        k, t = self._chosen(x, y, held[None] if held.any() else held.new_zeros(0, len(y)))
        answers = right(torch.arange(len(y), device=x.device), k, t)
        numbers: dict[str, float] = {
            "accuracy": float(answers.double().mean()),
            "chosen_k": k,
            "chosen_temperature": t,
        }
        measured = Measured(numbers, val.sample_ids, {"accuracy": answers}, val_y)
        for n in s.few_shot:
            found, chosen = [], []
            for part, folds in few_shot_sets(train, n, s):
                chosen.append(self._chosen(x[part], y[part], folds))
                found.append(right(part, *chosen[-1]))
            measured.add_draws(f"accuracy_{n}_per_class", found)
            measured[f"mean_k_{n}_per_class"] = spread([float(k) for k, _ in chosen])[0]
            measured[f"mean_temperature_{n}_per_class"] = spread([t for _, t in chosen])[0]
        return measured
