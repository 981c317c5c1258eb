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

from mim.core import progress
from mim.core.fields import Count, Positive
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
    spread,
    stratified_holdout,
)
from mim.evaluate.predictions import Measured
from mim.evaluate.probes.linear_grid import LinearGrid, LinearGridSettings
from mim.evaluate.probes.softmax import SoftmaxFit, fit_softmax, side_by_side

_STRENGTHS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
_FEW_SHOT_STRENGTHS = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4)
_ONE_SHOT_STRENGTH = 1e-2
MOST_CLASSES = 5000
"""Classes up to which the optimum is computed; beyond, its matrices of weights fill the memory."""
_Problem = tuple[slice | Tensor, Tensor, tuple[float, ...]]
"""Positions of the images, what each fold holds out of them, and the strengths to choose from."""


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
    measures = few_shot_measures

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
                guess = grid.problem(fold).answers(x[out])  # (S, n')
                score += (guess == y[out]).sum(1)
            strength = descending[int(score.argmax())]  # the first best is the strongest
            converged = bool(grid.converged.all())
        final = self._fit(x, y, [strength], classes)
        return final, strength, converged and bool(final.converged.all())

    def fit(self, train: Features) -> SoftmaxFit:
        """The probe of all training images, its strength chosen on a split of them.

        Raises:
            UserError: if they are of one class only.
        """
        y = labels_of(train)
        classes = classes_to_fit(y, self.name)
        held = stratified_holdout(train.sample_ids, y, self.settings.seed)[None]
        return self._chosen(train.values, y, held, self.settings.strengths, classes)[0]

    def _handed_over(self, train: Features, val: Features, classes: int) -> dict[str, float]:
        """The numbers of ``linear_grid``, whose steps need no memory for each strength's fit."""
        s = self.settings
        progress.note(
            f"evaluations.linear: {classes:,} classes are more than the {MOST_CLASSES:,} whose "
            "optimum it computes; linear_grid measures instead, as chosen_lr in the result shows"
        )
        settings = LinearGridSettings(few_shot=s.few_shot, draws=s.draws, seed=s.seed, pool=s.pool)
        return LinearGrid(settings).run(train, val)

    def run(self, train: Features, val: Features) -> dict[str, float]:
        s = self.settings
        x, y = train.values, labels_of(train)
        val_x, val_y = val.values, labels_of(val)
        check_few_shot(y, s)
        classes = classes_to_fit(y, self.name)
        if classes > MOST_CLASSES:
            return self._handed_over(train, val, classes)

        def probed(problem: _Problem) -> tuple[Tensor, float, bool]:
            """Asks val once: (n',) right or not, the strength, whether all fits converged."""
            part, held, strengths = problem
            chosen = self._chosen(x[part], y[part], held, strengths, classes)
            final, strength, converged = chosen
            return final.answers(val_x)[0] == val_y, strength, converged

        def work(problem: _Problem) -> int:
            """Multiplications of a product of its largest fits, at the most."""
            part, held, strengths = problem
            images = len(x[part])
            return max(len(held), 1) * images * min(images, x.shape[1]) * len(strengths) * classes

        held = stratified_holdout(train.sample_ids, y, s.seed)[None]
        problems: list[_Problem] = [(slice(None), held, s.strengths)]
        for n in s.few_shot:
            problems += [(*drawn, s.few_shot_strengths) for drawn in few_shot_sets(train, n, s)]
        (right, strength, converged), *few = side_by_side(probed, problems, work, x.device)
        numbers = {
            "accuracy": float(right.double().mean()),
            "chosen_strength": strength,
            "converged": float(converged),
        }
        measured = Measured(numbers, val.sample_ids, {"accuracy": right}, val_y)
        for place, n in enumerate(s.few_shot):
            results = few[place * s.draws : (place + 1) * s.draws]
            measured.add_draws(f"accuracy_{n}_per_class", [r[0] for r in results])
            logs = torch.tensor([r[1] for r in results], dtype=torch.float64).log()
            measured[f"mean_strength_{n}_per_class"] = float(logs.mean().exp())
            measured[f"converged_{n}_per_class"] = spread([float(r[2]) for r in results])[0]
        return measured
