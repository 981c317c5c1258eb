"""Linear probe by many gradient descents at once, on features that are computed once.

The protocol of DINOv2 (Oquab et al. 2023, https://arxiv.org/abs/2304.07193) and CAPI: a linear
layer for each learning rate and weight decay, all trained on the same batches, the best chosen on
held-out images. DINOv2 chooses on val; here it is a split of train, and what was chosen is trained
again on all of train. ``linear`` solves the same problem to its optimum; this one is for numbers
beside those that papers print.

Shapes: G combinations, b images of a step, D features, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from mim.core.fields import BelowOne, Count, NonNegative, Positive
from mim.core.rng import permutation
from mim.evaluate.base import (
    EVALUATIONS,
    NOT_EMPTY,
    Evaluation,
    Features,
    ProbeSettings,
    check_few_shot,
    classes_to_fit,
    few_shot_measures,
    few_shot_sets,
    labels_of,
    stratified_holdout,
)
from mim.evaluate.predictions import Measured
from mim.training.optim import Schedule


@dataclass(frozen=True)
class LinearGridSettings(ProbeSettings):
    """Settings of the linear probe by gradient descent."""

    few_shot: tuple[Count, ...] = ()
    """Numbers of training images a class; each is measured beside all of the training images."""
    lr: Annotated[tuple[Positive, ...], NOT_EMPTY] = (1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
    """Learning rates to choose from, for a batch of 256; scaled with the batch size."""
    weight_decay: Annotated[tuple[NonNegative, ...], NOT_EMPTY] = (0.0, 1e-4, 1e-3, 1e-2)
    """Weight decays to choose from; ties go to the first combination, learning rates outermost."""
    epochs: Count = 20
    """Passes over the training images."""
    batch_size: Count = 256
    """Images a step; all at once where there are fewer."""
    momentum: BelowOne = 0.9
    """Of the gradient descent."""


@dataclass(frozen=True)
class LinearLayers:
    """One linear layer for each combination, of features as they were given."""

    weight: Tensor  # (G, D, K)
    bias: Tensor  # (G, 1, K)

    def predict(self, features: Tensor) -> Tensor:
        """(n, D) -> (G, n) classes."""
        return torch.stack(
            [(features @ w + b).argmax(1) for w, b in zip(self.weight, self.bias, strict=True)]
        )


def descend(
    features: Tensor,
    labels: Tensor,
    classes: int,
    combinations: list[tuple[float, float]],
    settings: LinearGridSettings,
) -> LinearLayers:
    """Stochastic gradient descent with momentum and a half cosine, for all combinations at once.

    The layers start at 0, and the order of the images follows from the seed.

    Args:
        features: (n, D).
        labels: (n,) int64.
        classes: K.
        combinations: (learning rate, weight decay), G of them. Biases have no decay.
        settings: length, batch size, momentum and seed are read.
    """
    s = settings
    x = features.float()
    mean, std = x.mean(0), x.std(0, unbiased=False)
    inverse = torch.where(std > 1e-6 * mean.abs() + 1e-12, 1 / std, 0.0)  # as fit_softmax
    x = (x - mean) * inverse
    size = min(s.batch_size, len(x))
    per_epoch = len(x) // size
    schedule = Schedule(size / 256, 0.0, 0.0, s.epochs * per_epoch)
    lr = x.new_tensor([c[0] for c in combinations])[:, None, None]  # (G, 1, 1)
    decay = x.new_tensor([c[1] for c in combinations])[:, None, None]
    weight = x.new_zeros(len(combinations), x.shape[1], classes)
    bias = x.new_zeros(len(combinations), 1, classes)
    speeds = torch.zeros_like(weight), torch.zeros_like(bias)
    for epoch in range(s.epochs):
        order = permutation(s.seed, epoch, len(x)).to(x.device)
        for number in range(per_epoch):
            part = order[number * size : (number + 1) * size]
            seen = x[part]  # (b, D)
            error = (seen @ weight + bias).softmax(2)  # (G, b, K)
            index = labels[part][None, :, None].expand(len(combinations), -1, 1)
            error = error.scatter_add(2, index, torch.full_like(index, -1, dtype=x.dtype)) / size
            rate = lr * schedule(epoch * per_epoch + number)
            gradients = seen.T @ error + decay * weight, error.sum(1, keepdim=True)
            for value, speed, gradient in zip((weight, bias), speeds, gradients, strict=True):
                speed.mul_(s.momentum).add_(gradient)
                value.sub_(rate * speed)
    weight = weight * inverse[:, None]
    return LinearLayers(weight, bias - (mean @ weight)[:, None])


@EVALUATIONS.register("linear_grid", LinearGridSettings)
class LinearGrid(Evaluation):
    """Many linear layers trained at once, the best chosen on a split of train."""

    settings: LinearGridSettings
    measures = few_shot_measures

    def _probe(
        self, x: Tensor, y: Tensor, held: Tensor, val_x: Tensor, val_y: Tensor, classes: int
    ) -> tuple[Tensor, float, float]:
        """Chooses on ``held`` (F, n), trains on all of x, and asks val once.

        Returns:
            (n',) right or not on val, the learning rate and the weight decay.
        """
        s = self.settings
        grid = [(lr, decay) for lr in s.lr for decay in s.weight_decay]
        right = torch.zeros(len(grid), dtype=torch.int64, device=x.device)
        for out in held:
            layers = descend(x[~out], y[~out], classes, grid, s)
            right += (layers.predict(x[out]) == y[out]).sum(1)
        chosen = grid[int(right.argmax())]
        final = descend(x, y, classes, [chosen], s)
        return final.predict(val_x)[0] == val_y, *chosen

    def run(self, train: Features, val: Features) -> dict[str, float]:
        s = self.settings
        x, y = train.values, labels_of(train)
        val_x, val_y = val.values, labels_of(val)
        check_few_shot(y, s)
        classes = classes_to_fit(y, self.name)
        held = stratified_holdout(train.sample_ids, y, s.seed)[None]
        right, lr, decay = self._probe(x, y, held, val_x, val_y, classes)
        accuracy = float(right.double().mean())
        numbers = {"accuracy": accuracy, "chosen_lr": lr, "chosen_weight_decay": decay}
        measured = Measured(numbers, val.sample_ids, {"accuracy": right}, val_y)
        for n in s.few_shot:
            found = [
                self._probe(x[part], y[part], folds, val_x, val_y, classes)[0]
                for part, folds in few_shot_sets(train, n, s)
            ]
            measured.add_draws(f"accuracy_{n}_per_class", found)
        return measured
