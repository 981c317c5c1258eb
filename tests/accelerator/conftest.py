"""The pretend device under Accelerate, and a trainer on it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator

from mim.training.trainer import Trainer
from tests.accelerator.pretend import Pretend, device, pretending
from tests.evaluate.dense.conftest import scenes, squares  # noqa: F401  (fixtures)

device()  # while tests are collected: autograd knows the devices there were at its first backward


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretend]:
    """The device in use, by whatever asks Accelerate for one."""
    monkeypatch.setattr(Accelerator, "device", property(lambda self: device()))
    # A tensor subclass in inference mode is not allowed what a tensor of CUDA is.
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)
    with pretending() as found:
        yield found


def steps(trainer: Trainer, count: int) -> None:
    """Takes steps, whose losses are left on the device."""
    for batch in itertools.islice(trainer.task.batches(0), count):
        trainer.train_step(batch)
