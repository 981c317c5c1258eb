"""Multinomial logistic regression, many fits at once.

A probe's grid is dozens of fits (strengths x folds) of one small convex problem, so they are
solved together: the fits' weights lie side by side in one matrix product, and L-BFGS runs on all
of them with a step length of each. It works in the eigenbasis of the features' second moments,
scaled so that Boehning's bound on the Hessian is the identity: features of a ViT are so
correlated that without this a weakly regularised fit needs about ten times the iterations.

Shapes: P problems, n samples, D features, K classes, S strengths, R = rank kept <= min(n, D).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")

_HISTORY = 20
_SMALL = 1 << 26  # multiplications of one product below which a second thread may not pay
_CHUNK = 1 << 21  # elements of one block of logits: bounds the memory and stays near the cache


@contextmanager
def _threads_for(multiplications: int) -> Iterator[None]:
    """One thread for small products: thousands of them, each waiting for a second thread on a
    busy machine, were measured to take 40 times as long.
    """
    before = torch.get_num_threads()
    if multiplications < _SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def side_by_side(
    fit: Callable[[Item], Result],
    items: Sequence[Item],
    work: Callable[[Item], int],
    device: torch.device,
) -> list[Result]:
    """Independent fits; those too small for more than one thread run one on each thread.

    Every fit is computed as it is alone, so that its numbers are the same.

    Args:
        fit: called with each item.
        items: what is fitted; the longest first is best.
        work: multiplications of one product of an item's fits, at the most.
        device: where they run; elsewhere than on a CPU, one after the other.

    Returns:
        What each item's fit returned, in their order.
    """
    threads = torch.get_num_threads()
    small = [item for item in items if work(item) < _SMALL]
    if threads == 1 or len(small) < 2 or device.type != "cpu":
        return [fit(item) for item in items]
    with _threads_for(0), ThreadPoolExecutor(threads) as pool:
        found = iter(list(pool.map(fit, small)))
    return [next(found) if work(item) < _SMALL else fit(item) for item in items]


@dataclass(frozen=True)
class SoftmaxFit:
    """Weights of P x S fits, for features as they were given."""

    weight: Tensor  # (P, S, D, K)
    bias: Tensor  # (P, S, K)
    converged: Tensor  # (P, S) bool
    iterations: int

    def problem(self, index: int) -> SoftmaxFit:
        """The fits of one problem."""
        part = slice(index, index + 1)
        return SoftmaxFit(self.weight[part], self.bias[part], self.converged[part], self.iterations)

    def logits(self, features: Tensor) -> Tensor:
        """(P, n, D) or (n, D) -> (P, S, n, K)."""
        x = features.to(self.weight.dtype)
        x = x.expand(len(self.weight), *x.shape[-2:])
        return torch.einsum("pnd,psdk->psnk", x, self.weight) + self.bias[:, :, None]

    def answers(self, features: Tensor) -> Tensor:
        """(n, D) -> (S, n) classes by the fits of the first problem, some images at a time."""
        step = max(1, _CHUNK // self.bias.numel())
        parts = [self.logits(part)[0].argmax(2) for part in features.split(step)]
        return torch.cat(parts, 1)


def _objective(
    x: Tensor, labels: Tensor, share: Tensor, strengths: Tensor, scale: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss (P, S) and gradient (P, S, R+1, K) at the scaled weights ``v`` (P, S, R+1, K)."""
    problems, n, width = x.shape
    s, k = v.shape[1], v.shape[3]
    w = v * scale
    flat = w.permute(0, 2, 1, 3).reshape(problems, width, s * k)
    penalised = w[:, :, :-1]  # the last row is the bias
    loss = 0.5 * strengths * penalised.square().sum((2, 3))
    grad = torch.zeros_like(flat)
    step = max(1, _CHUNK // (problems * s * k))
    for start in range(0, n, step):
        part = slice(start, start + step)
        logits = (x[:, part] @ flat).unflatten(2, (s, k))  # (P, n', S, K)
        log_p = logits.log_softmax(-1)
        index = labels[:, part, None, None].expand(-1, -1, s, 1)
        loss = loss - torch.einsum("pns,pn->ps", log_p.gather(3, index)[..., 0], share[:, part])
        error = log_p.exp_()
        error.scatter_add_(3, index, torch.full_like(index, -1, dtype=error.dtype))
        error *= share[:, part, None, None]
        grad += x[:, part].mT @ error.flatten(2)
    grad_w = grad.unflatten(2, (s, k)).permute(0, 2, 1, 3).clone()
    grad_w[:, :, :-1] += strengths[..., None, None] * penalised
    return loss, grad_w * scale


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((2, 3))


def _direction(grad: Tensor, history: deque[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """L-BFGS's two loops, for all fits at once (Nocedal and Wright, algorithm 7.4)."""
    q = grad.clone()
    alphas = []
    for s, y, rho in reversed(history):
        alpha = rho * _dot(s, q)
        q -= alpha[..., None, None] * y
        alphas.append(alpha)
    if history:
        s, y, rho = history[-1]
        sy, yy = _dot(s, y), _dot(y, y)
        q *= torch.where(rho > 0, sy / yy.clamp_min(1e-300), 1.0)[..., None, None]
    for (s, y, rho), alpha in zip(history, reversed(alphas), strict=True):
        q += (alpha - rho * _dot(y, q))[..., None, None] * s
    return q.neg_()


def fit_softmax(
    features: Tensor,
    labels: Tensor,
    strengths: Tensor,
    classes: int,
    *,
    fit_on: Tensor | None = None,
    tolerance: float = 1e-4,
    max_iterations: int = 1000,
) -> SoftmaxFit:
    """Fits every strength of every problem.

    Minimises, on features standardised by the mean and deviation of the samples fitted,
    ``mean cross-entropy + strength / 2 * |W|^2``; the bias is free. It is scikit-learn's
    ``LogisticRegression(C=1 / (strength * n))``.

    Args:
        features: (P, n, D).
        labels: (P, n) int64 in [0, classes).
        strengths: (S,) above 0.
        classes: K.
        fit_on: (P, n) bool, which samples are fitted; all by default.
        tolerance: a fit has converged where no component of the gradient, in the scaled
            coordinates, is larger.
        max_iterations: where fits that have not converged stop.

    Returns:
        The fits; ``converged`` says which reached the tolerance.
    """
    problems, n, width = features.shape
    work = problems * n * min(n, width) * len(strengths) * classes
    with _threads_for(work):
        return _fit(features, labels, strengths, classes, fit_on, tolerance, max_iterations)


@dataclass(frozen=True)
class _Ready:
    """Features in the basis in which they are fitted, and what leads back from it."""

    x: Tensor  # (P, n, R+1), the last column is the bias's 1
    share: Tensor  # (P, n), each sample's part in the mean loss
    moments: Tensor  # (P, R), second moments along the basis
    basis: Tensor  # (P, D, R)
    mean: Tensor  # (P, D)
    inverse_std: Tensor  # (P, D), 0 for a feature without spread


def _prepare(features: Tensor, fit_on: Tensor | None) -> _Ready:
    """Standardises the features by the samples that are fitted, and rotates them."""
    problems, n, width = features.shape
    device = features.device
    most = max(1, _CHUNK // (problems * width))
    cuts = [slice(start, start + most) for start in range(0, n, most)]
    fit_on = torch.ones(problems, n, dtype=torch.bool, device=device) if fit_on is None else fit_on
    share = fit_on.double() / fit_on.sum(1, keepdim=True)  # (P, n), sums to 1
    # One copy in float64, whose last column is the bias's 1, and changed in place.
    x = torch.ones(problems, n, width + 1, dtype=torch.float64, device=device)
    mean = torch.zeros(problems, width, dtype=torch.float64, device=device)
    for piece in cuts:
        x[:, piece, :-1] = features[:, piece]
        mean += torch.einsum("pn,pnd->pd", share[:, piece], x[:, piece, :-1])
    variance = torch.zeros_like(mean)
    for piece in cuts:
        x[:, piece, :-1] -= mean[:, None]
        variance += torch.einsum("pn,pnd->pd", share[:, piece], x[:, piece, :-1].square())
    std = variance.sqrt()
    # A feature without spread tells nothing; dividing by ~0 would turn rounding into signal.
    inverse_std = torch.where(std > 1e-6 * mean.abs() + 1e-12, 1 / std, 0.0)
    x[..., :-1] *= inverse_std[:, None]

    basis = torch.eye(width, dtype=x.dtype, device=device).expand(problems, -1, -1)
    if n < width:  # the solution lies in the span of the samples
        basis = torch.linalg.qr(x[..., :-1].mT).Q  # (P, D, n)
        x = torch.cat([x[..., :-1] @ basis, x[..., -1:]], 2)
    second = x.new_zeros(problems, x.shape[2] - 1, x.shape[2] - 1)
    for piece in cuts:
        part = x[:, piece, :-1]
        second += part.mT @ (share[:, piece, None] * part)
    moments, rotation = torch.linalg.eigh(second)
    basis = basis @ rotation  # (P, D, R)
    for piece in cuts:
        x[:, piece, :-1] = x[:, piece, :-1] @ rotation  # (P, n, R+1)
    return _Ready(x, share, moments.clamp_min(0), basis, mean, inverse_std)


def _fit(
    features: Tensor,
    labels: Tensor,
    strengths: Tensor,
    classes: int,
    fit_on: Tensor | None,
    tolerance: float,
    max_iterations: int,
) -> SoftmaxFit:
    problems, device = len(features), features.device
    ready = _prepare(features, fit_on)
    x, share, moments = ready.x, ready.share, ready.moments

    lam = strengths.to(device, torch.float64).expand(problems, -1)  # (P, S)
    bound = 0.5 * moments[:, None] + lam[..., None]  # (P, S, R), Boehning 1992
    scale = F.pad(bound, (0, 1), value=0.5).rsqrt()[..., None]  # (P, S, R+1, 1)

    solution = torch.zeros(problems, len(strengths), x.shape[2], classes, dtype=x.dtype).to(device)
    converged = torch.zeros(problems, len(strengths), dtype=torch.bool, device=device)
    # What is still worked on: rows and columns of the P x S table leave it once all converged.
    rows = torch.arange(problems, device=device)
    cols = torch.arange(len(strengths), device=device)
    data = (x, labels, share)
    v = solution.clone()
    loss, grad = _objective(*data, lam, scale, v)
    history: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=_HISTORY)
    stuck = torch.zeros_like(converged)
    iteration = 0
    while True:
        small = grad.abs().amax((2, 3)) <= tolerance
        solution[rows[:, None], cols] = v * scale
        converged[rows[:, None], cols] = small
        active = ~(small | stuck)
        if iteration == max_iterations or not active.any():
            break
        iteration += 1
        keep_p, keep_s = active.any(1), active.any(0)
        if not (keep_p.all() and keep_s.all()):

            def cut(t: Tensor, p: Tensor = keep_p, s: Tensor = keep_s) -> Tensor:
                return t[p][:, s]

            rows, cols = rows[keep_p], cols[keep_s]
            data = (data[0][keep_p], data[1][keep_p], data[2][keep_p])
            history = deque(((cut(a), cut(b), cut(r)) for a, b, r in history), maxlen=_HISTORY)
            v, loss, grad, lam, scale = cut(v), cut(loss), cut(grad), cut(lam), cut(scale)
            active, stuck = cut(active), cut(stuck)
        direction = _direction(grad, history) * active[..., None, None]
        slope = _dot(direction, grad)
        uphill = slope > 0
        direction = torch.where(uphill[..., None, None], -grad, direction)
        slope = torch.where(uphill, -_dot(grad, grad), slope)
        step = torch.ones_like(loss)
        for _ in range(30):
            new_v = v + step[..., None, None] * direction
            new_loss, new_grad = _objective(*data, lam, scale, new_v)
            slack = 1e-12 * loss.abs()  # below it a decrease is rounding
            failed = active & ~(new_loss <= loss + 1e-4 * step * slope + slack)
            if not failed.any():
                break
            step = torch.where(failed, step * 0.5, step)
        ok = (active & ~failed)[..., None, None]
        stuck = stuck | (active & failed)
        s = torch.where(ok, new_v - v, 0.0)
        y = torch.where(ok, new_grad - grad, 0.0)
        sy = _dot(s, y)
        rho = torch.where(sy > 1e-14 * _dot(y, y), 1 / sy.clamp_min(1e-300), 0.0)
        history.append((s, y, rho))
        v = v + s
        loss = torch.where(ok[..., 0, 0], new_loss, loss)
        grad = grad + y

    weight = torch.einsum("pdr,psrk->psdk", ready.basis, solution[:, :, :-1])
    weight = weight * ready.inverse_std[:, None, :, None]
    bias = solution[:, :, -1] - torch.einsum("pd,psdk->psk", ready.mean, weight)
    return SoftmaxFit(weight, bias, converged, iteration)
