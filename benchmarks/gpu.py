"""What a GPU must tell of a config: it computes the CPU's masks and losses, and no step waits."""

from __future__ import annotations

import datetime
import itertools
import subprocess
import tempfile
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mim.core.config import Config
from mim.core.rng import image_keys
from mim.masks import MASKS
from mim.model.regimes import REGIMES
from mim.training.metrics import Curves
from mim.training.online import OnlineProbe
from mim.training.optim import build_optimizer, build_schedule
from mim.training.pretrain import PretrainTask, _accelerator, _open_images
from mim.training.runtime.cost import environment
from mim.training.runtime.precision import autocast, model_on, narrow_weights
from mim.training.trainer import Hook, Plan, Trainer

IMAGES = 8  # whose losses are compared
TOLERANCE = 1e-3  # of a loss in bfloat16, relative
_GIVEN = ("file",)  # no generator draws them


def trainer_of(config: Config, *, fp16: bool = False) -> Trainer:
    """A trainer as ``mim pretrain`` builds it, without the hooks that log and save."""
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
        read_every=images.steps,
        grad_norm=config.log.grad_norm,
    )
    scaler = torch.amp.GradScaler(accelerator.device.type) if fp16 else None
    optimizer = build_optimizer(config.optim, model, schedule(0))
    learner = task.learner().train()
    return Trainer(task, plan, optimizer, schedule, learner, hooks, Curves(), None, scaler)


def check_gpu(config: Config, steps: int) -> dict[str, Any]:
    """Compares the device with the CPU, and counts what waits in steps.

    Args:
        config: of pre-training; images are noise where losses are compared.
        steps: that are watched for waits.

    Returns:
        ``masks``: for each generator the share of images whose mask is the CPU's; ``losses``: for
        each regime the loss on the CPU, and the relative difference on the device in fp32 and
        bf16; ``waits``: for each place how often a step waits there.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "environment": environment(device) | {"driver": _driver()},
        "date": datetime.date.today().isoformat(),
        "masks": {name: _same_masks(config, name, device) for name in MASKS if name not in _GIVEN},
        "losses": {name: _losses(config, name, device) for name in REGIMES},
        "waits": _waits(config, steps),
        "steps": steps,
    }


def _driver() -> str:
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "none"


def _noise(config: Config) -> Tensor:
    shape = (IMAGES, config.data.channels, *config.data.size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(config.seed))


def _same_masks(config: Config, generator: str, device: torch.device) -> float:
    """Drawn with the keys on the device, where the generator looks at no image."""
    config = replace(config, mask=replace(config.mask, name=generator))
    cpu, there = (model_on(config, place) for place in (torch.device("cpu"), device))
    images = _noise(config)
    keys, ids = image_keys(0, 0, torch.arange(IMAGES)), torch.arange(IMAGES)
    expected = cpu.draw_mask(images, keys, epoch=0, sample_ids=ids).is_masked
    drawing = there.mask_generator
    if drawing.needs_images or drawing.needs_attention or drawing.is_trained:
        mask = there.draw_mask(images.to(device), keys, epoch=0, sample_ids=ids)
    else:
        mask = drawing(there.grid, keys.to(device), epoch=0, sample_ids=ids)
    return float((mask.is_masked.cpu() == expected).all(dim=1).float().mean())


def _losses(config: Config, regime: str, device: torch.device) -> dict[str, float]:
    settings = replace(config.model, regime=replace(config.model.regime, name=regime))
    config = replace(config, model=settings)
    images, keys = _noise(config), image_keys(0, 0, torch.arange(IMAGES))

    @torch.no_grad()
    def loss(device: torch.device, precision: str) -> float:
        model = model_on(config, device).eval()
        mask = model.draw_mask(images.to(device), keys, sample_ids=torch.arange(IMAGES))
        with autocast(precision, device):
            return float(model(images.to(device), mask).loss)

    expected = loss(torch.device("cpu"), "fp32")
    found = {name: abs(loss(device, name) / expected - 1) for name in ("fp32", "bf16")}
    return {"cpu": expected, **found}


def _waits(config: Config, steps: int) -> dict[str, float]:
    """How often a step waits at each place, by torch's own watch and by the profiler."""
    with tempfile.TemporaryDirectory() as folder:
        total = 2 * steps + 3
        train = replace(config.train, max_steps=total, log_every=total)
        trainer = trainer_of(replace(config, output=folder, train=train))
        batches = iter(trainer.task.batches(0))
        for batch in itertools.islice(batches, 3):  # the first allocate
            trainer.train_step(batch)
        cuda = torch.cuda.is_available()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if cuda:
                torch.cuda.set_sync_debug_mode("warn")
            for batch in itertools.islice(batches, steps):
                trainer.train_step(batch)
            if cuda:
                torch.cuda.set_sync_debug_mode("default")
        told = [warning for warning in caught if "synchroniz" in str(warning.message)]
        places = [f"{Path(warning.filename).name}:{warning.lineno}" for warning in told]
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        with profile(activities=kinds) as watched:
            for batch in itertools.islice(batches, steps):
                trainer.train_step(batch)
        calls = [e.key for e in watched.events() if "Synchronize" in e.key or e.key == "cudaMemcpy"]
    return {name: count / steps for name, count in Counter(places + calls).items()}


def format_check_gpu(figures: dict[str, Any]) -> str:
    """The figures as Markdown, with the machine in front."""
    machine = figures["environment"]
    lines = [
        f"{figures['date']}: {machine['device']}, driver {machine['driver']}, {machine['cpu']}, "
        f"{machine['cores']} cores, torch {machine['torch']}, timm {machine['timm']}",
        "",
        "| what | on the CPU | fp32, relative | bf16, relative |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, found in figures["losses"].items():
        flag = "" if found["bf16"] <= TOLERANCE else " (too far)"
        lines.append(
            f"| loss, {name} | {found['cpu']:.5f} | {found['fp32']:.1e} "
            f"| {found['bf16']:.1e}{flag} |"
        )
    lines += ["", "| generator | masks as on the CPU |", "| --- | ---: |"]
    lines += [f"| {name} | {100 * share:.0f} % |" for name, share in figures["masks"].items()]
    lines += ["", f"| place | waits a step, of {figures['steps']} steps |", "| --- | ---: |"]
    lines += [f"| {name} | {count:.2f} |" for name, count in figures["waits"].items()]
    return "\n".join(lines if figures["waits"] else [*lines, "| none | 0 |"])
