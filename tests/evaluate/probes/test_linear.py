"""The linear probe: its protocol against scikit-learn, and who may choose the strength."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from mim.core.errors import UserError
from mim.evaluate import Features, Linear, LinearGrid, LinearSettings, build_evaluation
from mim.evaluate.base import few_shot_draw, stratified_holdout

QUICK = {"strengths": [0.1, 1e-3], "few_shot_strengths": [1.0, 0.1], "few_shot": [5], "draws": 2}


def digits() -> tuple[Features, Features]:
    x, y = load_digits(return_X_y=True)
    values, labels = torch.from_numpy(x).float(), torch.from_numpy(y).long()
    ids = torch.arange(len(y)) * 7
    return (
        Features(values[:600], labels[:600], ids[:600]),
        Features(values[600:900], labels[600:900], ids[600:900]),
    )


def by_scikit_learn(
    x: torch.Tensor, y: torch.Tensor, ask: torch.Tensor, want: torch.Tensor, strength: float
) -> float:
    scaler = StandardScaler().fit(x.numpy())
    model = LogisticRegression(C=1 / (strength * len(x)), tol=1e-8, max_iter=10000)
    model.fit(scaler.transform(x.numpy()), y.numpy())
    return float(model.score(scaler.transform(ask.numpy()), want.numpy()))


def test_protocol_equals_scikit_learn() -> None:
    train, val = digits()
    assert train.labels is not None and val.labels is not None
    strengths = (1.0, 0.1, 1e-2, 1e-3)
    settings = LinearSettings(strengths=strengths, few_shot=(), tolerance=1e-6)
    numbers = Linear(settings).run(train, val)
    held = stratified_holdout(train.sample_ids, train.labels, 0)
    x, y = train.values, train.labels
    scores = [by_scikit_learn(x[~held], y[~held], x[held], y[held], s) for s in strengths]
    best = strengths[scores.index(max(scores))]
    assert len(set(scores)) > 1
    assert numbers["chosen_strength"] == best
    assert numbers["accuracy"] == pytest.approx(
        by_scikit_learn(x, y, val.values, val.labels, best), abs=1e-9
    )
    assert numbers["converged"] == 1


def test_few_shot_equals_scikit_learn() -> None:
    train, val = digits()
    assert train.labels is not None and val.labels is not None
    settings = LinearSettings(few_shot_strengths=(0.01,), few_shot=(5,), draws=2, tolerance=1e-6)
    numbers = Linear(settings).run(train, val)
    expected = []
    for draw in range(2):
        part = few_shot_draw(train.sample_ids, train.labels, 5, 0, draw)
        x, y = train.values[part], train.labels[part]
        # scikit-learn's scaler keeps constant columns where a test image may vary; so do not we.
        varies = x.std(0) > 0
        expected.append(by_scikit_learn(x[:, varies], y, val.values[:, varies], val.labels, 0.01))
    mean = sum(expected) / 2
    assert numbers["accuracy_5_per_class"] == pytest.approx(mean, abs=1e-9)
    std = math.sqrt(sum((e - mean) ** 2 for e in expected))
    assert numbers["accuracy_5_per_class_std"] == pytest.approx(std, abs=1e-9)
    assert std > 0


def test_val_has_no_say_in_the_choice() -> None:
    train, val = digits()
    assert val.labels is not None
    probe = build_evaluation("linear", QUICK)
    numbers = probe.run(train, val)
    other = probe.run(train, val._replace(values=val.values.flip(1), labels=val.labels.roll(1)))
    rest = {key for key in numbers if "accuracy" not in key}
    assert {key: numbers[key] for key in rest} == {key: other[key] for key in rest}
    assert numbers["accuracy"] > 0.8 > other["accuracy"]
    assert numbers == probe.run(train, val)


def test_strength_is_chosen_by_what_generalises() -> None:
    # Few noisy images and many useless features: the strong penalty must win, in both protocols.
    generator = torch.Generator().manual_seed(0)

    def noisy(n: int, start: int) -> Features:
        labels = torch.arange(n) % 2
        values = torch.randn(n, 100, generator=generator)
        values[:, :10] += labels[:, None] * 0.6
        return Features(values, labels, torch.arange(start, start + n))

    train, val = noisy(240, 0), noisy(500, 1000)
    grid = [1e-6, 0.3]
    settings = {"strengths": grid, "few_shot_strengths": grid, "few_shot": [40], "draws": 3}
    numbers = build_evaluation("linear", settings).run(train, val)
    assert numbers["chosen_strength"] == 0.3
    assert numbers["mean_strength_40_per_class"] > 1e-2


def test_scale_and_offset_of_a_feature_do_not_matter() -> None:
    train, val = digits()
    probe = build_evaluation("linear", {**QUICK, "tolerance": 1e-6})
    scale = torch.logspace(-2, 2, 64)
    moved = [s._replace(values=s.values * scale + 5 * scale) for s in (train, val)]
    assert probe.run(*moved)["accuracy"] == pytest.approx(
        probe.run(train, val)["accuracy"], abs=0.004
    )


def test_non_convergence_is_a_number_and_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    train, val = digits()
    numbers = build_evaluation("linear", {**QUICK, "max_iterations": 2}).run(train, val)
    assert numbers["converged"] == 0
    assert numbers["converged_5_per_class"] == 0
    assert not recwarn.list


def test_one_image_a_class() -> None:
    train, val = digits()
    numbers = build_evaluation("linear", {"few_shot": [1], "draws": 2}).run(train, val)
    assert numbers["mean_strength_1_per_class"] == pytest.approx(1e-2)
    assert numbers["accuracy_1_per_class"] > 0.2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"strengths": []}, "evaluations.linear.strengths"),
        ({"strengths": [0.0]}, "must be above 0"),
        ({"tolerance": 0}, "evaluations.linear.tolerance"),
    ],
)
def test_bad_settings(settings: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_evaluation("linear", settings)


def test_one_class_is_refused() -> None:
    train, val = digits()
    with pytest.raises(UserError, match="at least 2 classes"):
        Linear().run(train._replace(labels=torch.zeros(600, dtype=torch.int64)), val)


def test_many_classes_are_handed_over_with_a_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mim.evaluate.probes.linear.MOST_CLASSES", 9)
    train, val = digits()
    settings = LinearSettings(few_shot=())
    numbers = Linear(settings).run(train, val)
    assert numbers == LinearGrid().run(train, val)
    assert "10 classes are more than the 9" in capfd.readouterr().err


def test_answers_are_those_of_the_logits_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    train, _ = digits()
    fit = Linear(LinearSettings(few_shot=(), strengths=(0.1, 0.01))).fit(train)
    wanted = fit.logits(train.values)[0].argmax(2)
    monkeypatch.setattr("mim.evaluate.probes.softmax._CHUNK", 300)
    assert torch.equal(fit.answers(train.values), wanted)
    again = Linear(LinearSettings(few_shot=(), strengths=(0.1, 0.01))).fit(train)
    torch.testing.assert_close(again.weight, fit.weight, atol=1e-6, rtol=1e-4)
