"""The batched logistic regression against scikit-learn's, fit by fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from mim.evaluate.probes.softmax import fit_softmax, side_by_side

STRENGTHS = torch.tensor([1.0, 1e-2, 1e-3], dtype=torch.float64)


def digits(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = load_digits(return_X_y=True)
    return torch.from_numpy(x[:n]), torch.from_numpy(y[:n]).long()


def sklearn_logits(x: np.ndarray, y: np.ndarray, ask: np.ndarray, strength: float) -> np.ndarray:
    scaler = StandardScaler().fit(x)
    model = LogisticRegression(C=1 / (strength * len(x)), tol=1e-10, max_iter=20000)
    model.fit(scaler.transform(x), y)
    logits = model.decision_function(scaler.transform(ask))
    return logits - logits.mean(1, keepdims=True)


@pytest.mark.parametrize("n", [40, 400])  # fewer and more samples than the 64 features
def test_equals_scikit_learn(n: int) -> None:
    x, y = digits(n)
    ask = digits(600)[0][400:]
    fit = fit_softmax(x[None], y[None], STRENGTHS, 10, tolerance=1e-8)
    assert fit.converged.all()
    for i, strength in enumerate(STRENGTHS.tolist()):
        ours = fit.logits(ask)[0, i]
        ours = ours - ours.mean(1, keepdim=True)
        theirs = sklearn_logits(x.numpy(), y.numpy(), ask.numpy(), strength)
        torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=1e-4, atol=1e-4)


def test_problems_solved_together_are_those_solved_alone() -> None:
    x, y = digits(300)
    fit_on = torch.rand(3, 300, generator=torch.Generator().manual_seed(0)) < 0.5
    both = fit_softmax(
        x.expand(3, -1, -1), y.expand(3, -1), STRENGTHS, 10, fit_on=fit_on, tolerance=1e-8
    )
    for p in range(3):
        alone = fit_softmax(x[None, fit_on[p]], y[None, fit_on[p]], STRENGTHS, 10, tolerance=1e-8)
        torch.testing.assert_close(both.problem(p).logits(x), alone.logits(x), rtol=1e-4, atol=1e-4)


def test_what_is_not_fitted_on_has_no_influence() -> None:
    x, y = digits(200)
    fit_on = torch.arange(200)[None] < 150
    fit = fit_softmax(x[None], y[None], STRENGTHS, 10, fit_on=fit_on, tolerance=1e-8)
    other_x, other_y = x.clone(), y.clone()
    other_x[150:] *= -3
    other_y[150:] = 0
    other = fit_softmax(other_x[None], other_y[None], STRENGTHS, 10, fit_on=fit_on, tolerance=1e-8)
    torch.testing.assert_close(fit.logits(x), other.logits(x), rtol=1e-5, atol=1e-5)


def test_stops_and_says_so() -> None:
    x, y = digits(300)
    fit = fit_softmax(x[None], y[None], STRENGTHS, 10, max_iterations=3)
    assert fit.iterations == 3
    assert not fit.converged.any()


def test_survives_constant_and_repeated_features() -> None:
    x, y = digits(300)
    x = torch.cat([x, x, torch.full((300, 2), 0.1, dtype=x.dtype)], 1)
    fit = fit_softmax(x[None], y[None], STRENGTHS, 10)
    assert fit.converged.all()
    assert fit.logits(x).isfinite().all()
    assert (fit.weight[:, :, -2:] == 0).all()


@pytest.mark.parametrize("threads", [1, 3])
def test_fits_side_by_side_are_those_one_after_the_other(threads: int) -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(5, 40, 12, generator=rng, dtype=torch.float64)
    y = torch.randint(0, 4, (5, 40), generator=rng)
    strengths = torch.tensor([1e-3, 1e-1], dtype=torch.float64)
    seen: set[int] = set()

    def fit(number: int) -> Tensor:
        seen.add(torch.get_num_threads())
        part = slice(number, number + 1)
        return fit_softmax(x[part], y[part], strengths, 4).weight

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        alone = [fit(number) for number in range(5)]
        seen.clear()
        together = side_by_side(fit, range(5), lambda number: 1000, x.device)
        assert seen == {1} and torch.get_num_threads() == threads, "a thread each"
        seen.clear()
        large = side_by_side(fit, range(5), lambda number: 1 << 40, x.device)
        assert seen == {threads}, "large fits are given all threads"
        seen.clear()
        mixed = side_by_side(fit, range(5), lambda number: 1 << 40 * (number == 1), x.device)
        assert seen == {1, threads}
    finally:
        torch.set_num_threads(before)
    for one, *others in zip(alone, together, large, mixed, strict=True):
        assert all(torch.equal(one, other) for other in others), "and each in its place"
