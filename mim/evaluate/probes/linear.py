"""Linear probe: multinomial logistic regression on frozen, standardised features.

The strength of the L2 penalty is chosen on a split of train, then all of train is fitted again;
in few-shot it is chosen by stratified cross-validation inside the few-shot set. The optimum of a
convex problem is the measure: there is no learning rate and no schedule to favour an encoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from mim.core.errors import UserError
from mim.core.fields import Count, Positive
from mim.evaluate.base import (
    EVALUATIONS,
    FOLDS,
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
from mim.evaluate.probes.softmax import SoftmaxFit, fit_softmax, side_by_side

_STRENGTHS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
_FEW_SHOT_STRENGTHS = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4)
_ONE_SHOT_STRENGTH = 1e-2


@dataclass(frozen=True)
class LinearSettings(ProbeSettings):
    """Settings of the linear probe."""

    strengths: Annotated[tuple[Positive, ...], NOT_EMPTY] = _STRENGTHS
    """Strengths of the L2 penalty to choose from, on the mean loss; ties go to the stronger."""
    few_shot_strengths: Annotated[tuple[Positive, ...], NOT_EMPTY] = _FEW_SHOT_STRENGTHS
    """The same for few-shot sets, which are separable: weaker penalties only cost time."""
    tolerance: Positive = 1e-4
    """Largest component of the gradient at which a fit counts as converged."""
    max_iterations: Count = 1000
    """L-BFGS iterations after which a fit stops; ``converged`` in the result then is below 1."""


@EVALUATIONS.register("linear", LinearSettings)
class Linear(Evaluation):
    """Logistic regression, its L2 strength chosen on a split of train."""

    settings: LinearSettings

    def _fit(
        self,
        x: Tensor,
        y: Tensor,
        strengths: list[float],
        classes: int,
        held: Tensor | None = None,
    ) -> SoftmaxFit:
        """Fits ``x`` (n, D), once for each row of ``held`` (F, n) without what that holds out."""
        if held is not None and len(held) == 1:  # a large set: do not drag along what is held out
            x, y, held = x[~held[0]], y[~held[0]], None
        problems = 1 if held is None else len(held)
        return fit_softmax(
            x.expand(problems, -1, -1),
            y.expand(problems, -1),
            torch.tensor(strengths, dtype=torch.float64),
            classes,
            fit_on=None if held is None else ~held,
            tolerance=self.settings.tolerance,
            max_iterations=self.settings.max_iterations,
        )

    def _chosen(
        self, x: Tensor, y: Tensor, held: Tensor, strengths: tuple[float, ...], classes: int
    ) -> tuple[SoftmaxFit, float, bool]:
        """Chooses the strength on ``held`` (F, n) and fits all of x.

        Returns:
            The fit, the strength, and whether every fit of the grid converged.
        """
        descending = sorted(strengths, reverse=True)
        converged = True
        if len(held) == 0 or not held.any():
            strength = min(descending, key=lambda s: abs(s - _ONE_SHOT_STRENGTH))
        else:
            grid = self._fit(x, y, descending, classes, held)
            score = torch.zeros(len(descending), dtype=torch.int64, device=x.device)
            for fold, out in enumerate(held):
                guess = grid.problem(fold).logits(x[out])[0].argmax(2)  # (S, n')
                score += (guess == y[out]).sum(1)
            strength = descending[int(score.argmax())]  # the first best is the strongest
            converged = bool(grid.converged.all())
        final = self._fit(x, y, [strength], classes)
        return final, strength, converged and bool(final.converged.all())

    def _probe(
        self,
        x: Tensor,
        y: Tensor,
        held: Tensor,
        strengths: tuple[float, ...],
        val_x: Tensor,
        val_y: Tensor,
        classes: int,
    ) -> tuple[Tensor, float, bool]:
        """The same, and asks val once: (n',) right or not, the strength, whether all converged."""
        final, strength, converged = self._chosen(x, y, held, strengths, classes)
        guess = final.logits(val_x)[0, 0].argmax(1)
        return guess == val_y, strength, converged

    def fit(self, train: Features) -> SoftmaxFit:
        """The probe of all training images, its strength chosen on a split of them.

        Raises:
            UserError: if they are of one class only.
        """
        y = labels_of(train)
        if len(y.unique()) < 2:
            raise UserError("evaluation linear needs at least 2 classes; train has 1")
        held = stratified_holdout(train.sample_ids, y, self.settings.seed)[None]
        classes = int(y.max()) + 1
        return self._chosen(train.values, y, held, self.settings.strengths, classes)[0]

    def run(self, train: Features, val: Features) -> dict[str, float]:
        """See :meth:`Evaluation.run`.

        Raises:
            UserError: if the training images are of one class only.
        """
        s = self.settings
        x, y, ids = train.values, labels_of(train), train.sample_ids
        val_x, val_y = val.values, labels_of(val)
        check_few_shot(y, s)
        if len(y.unique()) < 2:
            raise UserError("evaluation linear needs at least 2 classes; train has 1")
        classes = int(y.max()) + 1

        held = stratified_holdout(ids, y, s.seed)[None]

        def probed(item: tuple[int, int] | None) -> tuple[Tensor, float, bool]:
            """Of all training images, or of a draw of so many a class."""
            if item is None:
                return self._probe(x, y, held, s.strengths, val_x, val_y, classes)
            part = few_shot_draw(ids, y, item[0], s.seed, item[1])
            folds = few_shot_folds(ids[part], y[part], item[0], s.seed, item[1])
            return self._probe(x[part], y[part], folds, s.few_shot_strengths, val_x, val_y, classes)

        def work(item: tuple[int, int] | None) -> int:
            """Multiplications of a product of its largest fits, at the most."""
            images, folds, fits = len(x), 1, len(s.strengths)
            if item is not None:
                images, folds, fits = item[0] * classes, FOLDS, len(s.few_shot_strengths)
            return folds * images * min(images, x.shape[1]) * fits * classes

        draws = [(n, draw) for n in s.few_shot for draw in range(s.draws)]
        (right, strength, converged), *few = side_by_side(probed, [None, *draws], work, x.device)
        answers = {"accuracy": right}
        numbers = {
            "accuracy": float(right.double().mean()),
            "chosen_strength": strength,
            "converged": float(converged),
        }
        for n in s.few_shot:
            results = [result for item, result in zip(draws, few, strict=True) if item[0] == n]
            answers[f"accuracy_{n}_per_class"] = torch.stack([r[0] for r in results])
            mean, std = spread([float(r[0].double().mean()) for r in results])
            numbers[f"accuracy_{n}_per_class"] = mean
            numbers[f"accuracy_{n}_per_class_std"] = std
            logs = torch.tensor([r[1] for r in results], dtype=torch.float64).log()
            numbers[f"mean_strength_{n}_per_class"] = float(logs.mean().exp())
            numbers[f"converged_{n}_per_class"] = spread([float(r[2]) for r in results])[0]
        return Measured(numbers, val.sample_ids, answers, val_y)
