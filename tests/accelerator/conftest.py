"""The pretend device under Accelerate, and a trainer on it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator

from mim.core.config import Config
from mim.training.metrics import Curves
from mim.training.online import OnlineProbe
from mim.training.optim import build_optimizer, build_schedule
from mim.training.pretrain import PretrainTask, _accelerator, _open_images
from mim.training.runtime.precision import model_on, narrow_weights
from mim.training.trainer import Hook, Plan, Trainer
from tests.accelerator.pretend import Pretend, device, pretending
from tests.evaluate.dense.conftest import scenes, squares  # noqa: F401  (fixtures)


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretend]:
    """The device in use, by whatever asks Accelerate for one."""
    monkeypatch.setattr(Accelerator, "device", property(lambda self: device()))
    # A tensor subclass in inference mode is not allowed what a tensor of CUDA is.
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)
    with pretending() as found:
        yield found


def trainer_of(config: Config, *, fp16: bool = False) -> Trainer:
    """A trainer as ``mim pretrain`` builds it, but for hooks that log and save."""
    accelerator = _accelerator(config)
    config, images = _open_images(config, None, accelerator)
    model = model_on(config, accelerator.device)
    task = PretrainTask(model, images, config, accelerator)
    hooks: list[Hook] = []
    if config.online_probe.enabled:
        hooks.append(OnlineProbe(model, images.train, config, accelerator, images.val))
    narrow_weights(model, config.train)
    schedule = build_schedule(config.optim, config.data.batch_size, images.steps, images.per_epoch)
    plan = Plan(
        seed=config.seed,
        steps=images.steps,
        steps_per_epoch=images.per_epoch,
        batch_size=config.data.batch_size,
        accumulate=config.train.accumulate,
        clip_grad=config.optim.clip_grad,
        read_every=10**6,
        grad_norm=config.log.grad_norm,
    )
    scaler = torch.amp.GradScaler(accelerator.device.type) if fp16 else None
    optimizer = build_optimizer(config.optim, model, schedule(0))
    learner = task.learner().train()
    return Trainer(
        task, plan, optimizer, schedule, learner, hooks, Curves(None, None), None, scaler
    )


def steps(trainer: Trainer, count: int) -> None:
    """Takes steps, whose losses are left on the device."""
    for batch in itertools.islice(trainer.task.batches(0), count):
        trainer.train_step(batch)
