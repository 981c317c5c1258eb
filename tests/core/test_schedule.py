"""Schedules against the published formulas, worked out here, and against timm's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from timm.scheduler import CosineLRScheduler

import mim
from mim.core.config import MaskConfig, ModelConfig, OptimConfig
from mim.core.errors import UserError
from mim.core.fields import build
from mim.core.schedule import ScheduleSettings
from mim.training.optim import build_schedule

STEPS, PER_EPOCH = 40, 4


def rates(**settings: Any) -> list[float]:
    """A rate of 1 in each of the steps of 10 epochs."""
    config = build(OptimConfig, {"base_lr": 1.0, **settings}, "optim")
    schedule = build_schedule(config, 256, STEPS, PER_EPOCH)
    return [schedule(step) for step in range(STEPS)]


def test_mae_s_rate_starts_at_0() -> None:
    found = rates(warmup_epochs=2, min_lr=0.1, schedule={"warmup_from": 0.0})
    for step, rate in enumerate(found):
        epoch = step / PER_EPOCH
        expected = (
            epoch / 2 if epoch < 2 else 0.1 + 0.45 * (1 + math.cos(math.pi * (epoch - 2) / 8))
        )
        assert rate == pytest.approx(expected, abs=1e-15)


def test_simmim_s_cosine_counts_the_warm_up_as_timm_s_does() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    timm = CosineLRScheduler(
        optimizer, t_initial=STEPS, lr_min=0.2, warmup_t=8, warmup_lr_init=0.05, t_in_epochs=False
    )
    moves = {"warmup_from": 0.05, "counts_warmup": True}
    found = rates(warmup_epochs=2, min_lr=0.2, schedule=moves)
    for step, rate in enumerate(found):
        timm.step_update(step)
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-15)


def test_multistep_falls_at_each_milestone() -> None:
    moves = {"shape": "multistep", "milestones": [5, 9], "warmup_from": 0.0}
    expected = [step / 4 for step in range(4)] + [1.0] * 16 + [0.1] * 16 + [0.01] * 4
    assert rates(warmup_epochs=1, schedule=moves) == pytest.approx(expected)


def test_capi_s_cosine_is_cut_at_a_share_of_its_phase() -> None:
    moves = {"phase": 0.8, "unit": "steps", "warmup": 10, "warmup_from": 0.0}
    found = rates(schedule=moves)
    assert found[:10] == pytest.approx([step / 10 for step in range(10)])
    for step in range(10, STEPS):
        expected = 0.5 * (1 + math.cos(math.pi * 0.8 * (step - 10) / (STEPS - 10)))
        assert found[step] == pytest.approx(expected, abs=1e-15)
    assert found[-1] > 0.09


def test_i_jepa_s_longer_period_is_cut_by_the_end() -> None:
    moves = {"length": 12.5, "warmup_from": 0.2}
    found = rates(warmup_epochs=2, min_lr=0.001, schedule=moves)
    for step in range(8, STEPS):
        half = 0.5 * (1 + math.cos(math.pi * (step - 8) / (1.25 * STEPS - 8)))
        assert found[step] == pytest.approx(0.001 + 0.999 * half, abs=1e-15)


def test_a_constant_rate_cools_down_in_its_last_steps() -> None:
    found = rates(warmup_epochs=1, min_lr=0.1, schedule={"shape": "constant", "cooldown": 0.25})
    assert found[:4] == [0.2, 0.4, 0.6, 0.8]
    assert found[4:31] == [1.0] * 27
    assert found[30:] == pytest.approx([0.1 + 0.9 * left / 10 for left in range(10, 0, -1)])
    # It waits for the end of the warm-up.
    found = rates(warmup_epochs=5, schedule={"shape": "constant", "cooldown": 0.9})
    assert found[19:] == pytest.approx([20 / 21, *(left / 20 for left in range(20, 0, -1))])


def test_a_teacher_s_decay_ends_early_as_data2vec_s() -> None:
    decay = ScheduleSettings(shape="linear", to=0.99999, length=16, unit="steps")
    schedule = decay.build(0.9998, STEPS, PER_EPOCH)
    for step in range(STEPS):
        share = min(step / 16, 1)
        assert schedule(step) == pytest.approx(0.9998 + share * 0.00019, abs=1e-15)


def test_a_teacher_s_decay_moves_away_and_back_as_capi_s() -> None:
    decay = ScheduleSettings(shape="cosine", to=1.0, warmup=2, warmup_from=1.0, phase=0.8)
    schedule = decay.build(0.999, STEPS, PER_EPOCH)
    assert [schedule(step) for step in (0, 4, 8)] == pytest.approx([1.0, 0.9995, 0.999], abs=1e-15)
    expected = 1 - 0.0005 * (1 + math.cos(math.pi * 0.8 * 16 / 32))
    assert schedule(24) == pytest.approx(expected, abs=1e-15)


def test_what_does_not_move_is_the_value_itself() -> None:
    schedule = ScheduleSettings().build(0.04, STEPS, PER_EPOCH)
    assert {schedule(step) for step in range(STEPS)} == {0.04}
    assert not ScheduleSettings().moves and ScheduleSettings(warmup=1).moves


def test_a_mask_ratio_by_the_same_shapes() -> None:
    moves: dict[str, Any] = {"shape": "multistep", "milestones": [2, 4], "factor": 0.5}
    config = build(MaskConfig, {"ratio": 0.8, "schedule": moves}, "mask")
    assert [config.ratio_at(epoch)[0] for epoch in range(6)] == [0.8, 0.8, 0.4, 0.4, 0.2, 0.2]
    assert ("mask.schedule.factor", 0.2) in config.all_ratios()
    moves = {"to": 0.6, "epochs": 10, "shape": "cosine", "phase": 0.5}
    config = build(MaskConfig, {"ratio": 0.8, "schedule": moves}, "mask")
    assert config.ratio_at(10)[0] == pytest.approx(0.7) == config.ratio_at(50)[0]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"optim.schedule.shape": "multistep"}, "optim.schedule.milestones: ()"),
        ({"optim.schedule.milestones": [1]}, "need optim.schedule.shape=multistep"),
        ({"optim.decay_schedule.shape": "cosine"}, "optim.decay_schedule.to: None is needed"),
        ({"optim.decay_schedule.to": 0.4}, "needs optim.decay_schedule.shape"),
        ({"optim.schedule.shape": "constant", "optim.schedule.phase": 0.5}, "linear or cosine"),
        ({"optim.schedule.cooldown": 0.2}, "needs optim.schedule.shape=constant"),
        ({"optim.decay_schedule.cooldown": 0.2}, "needed with optim.decay_schedule.cooldown=0.2"),
        ({"model.teacher_schedule.warmup_from": 1.0}, "needs model.teacher_schedule.warmup"),
        (
            {"model.teacher_schedule.shape": "linear", "model.teacher_schedule.to": 1.5},
            "model.teacher_schedule.to: 1.5 must be at most 1",
        ),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told.replace("(", r"\(").replace(")", r"\)")):
        mim.load_config(None, settings)


def test_a_rate_without_a_schedule_is_what_it_was() -> None:
    assert ModelConfig().teacher_schedule.moves is False
    found = rates(warmup_epochs=1, min_lr=0.1)
    assert found[:4] == [0.2, 0.4, 0.6, 0.8]
    assert found[4] == 1.0
