"""Timing whole training steps, interleaved so that a busy machine is unfair to nobody."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any

import torch

from mim.config import Config
from mim.cost import count_flops, environment
from mim.errors import choice_error, setting_error
from mim.keys import image_keys
from mim.model import MaskedImageModel, build_model
from mim.optim import build_optimizer
from mim.regimes import REGIMES
from mim.settings import checked

_WARM_UP = 3  # the first steps pay for page faults and allocation
_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def bench_step(
    config: Config, regimes: list[str], rounds: int = 5, steps: int = 2
) -> dict[str, Any]:
    """Time training steps of one config under several regimes, on noise images.

    Args:
        config: what is timed; its batch size, precision, mask and sizes count.
        regimes: names of regimes.
        rounds: every round times each regime once, in turn.
        steps: steps of one regime in a round.

    Returns:
        ``environment``, and under ``regimes`` for each: images a second (median, lowest, highest
        over rounds), tokens in the encoder, operations an image, the last loss.

    Raises:
        UserError: for an unknown regime, or one that does not fit the config.
    """
    if rounds < 1 or steps < 1:
        raise setting_error("bench", f"rounds={rounds}, steps={steps}", "must be at least 1")
    for name in regimes:
        if name not in REGIMES:
            raise choice_error("--regimes", name, REGIMES)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    height, width = config.data.size
    size = config.data.batch_size
    images = torch.randn(size, config.data.channels, height, width).to(device)
    subjects: dict[str, tuple[MaskedImageModel, torch.optim.Optimizer]] = {}
    figures: dict[str, Any] = {}
    for name in regimes:
        regime = dataclasses.replace(config.model.regime, name=name)
        chosen = checked(
            dataclasses.replace(config, model=dataclasses.replace(config.model, regime=regime))
        )
        model = build_model(chosen).to(device)
        subjects[name] = model, build_optimizer(config.optim, model, 1e-4)
        ids = torch.arange(2)
        forward, backward = count_flops(model, images[:2], ids)
        mask = model.draw_mask(images[:2], image_keys(0, 0, ids), sample_ids=ids)
        tokens = model.regime.encoder_tokens(model.backbone, mask.num_visible)
        figures[name] = {
            "encoder_tokens": tokens,
            "flops_forward": forward,
            "flops_backward": backward,
        }
        if config.train.compile:
            model.compile()
        for number in range(_WARM_UP):
            _step(*subjects[name], config, images, number)
    times: dict[str, list[float]] = {name: [] for name in regimes}
    for number in range(rounds):
        for name in regimes:
            _wait(device)
            began = time.perf_counter()
            for part in range(steps):
                loss = _step(*subjects[name], config, images, number * steps + part)
            _wait(device)
            times[name].append((time.perf_counter() - began) / steps)
            figures[name]["loss"] = float(loss)
    for name, seconds in times.items():
        figures[name]["images_per_second"] = size / statistics.median(seconds)
        figures[name]["slowest"] = size / max(seconds)
        figures[name]["fastest"] = size / min(seconds)
    return {
        "environment": environment(device),
        "batch_size": size,
        "precision": config.train.precision,
        "rounds": rounds,
        "steps": steps,
        "regimes": figures,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _step(
    model: MaskedImageModel,
    optimizer: torch.optim.Optimizer,
    config: Config,
    images: torch.Tensor,
    number: int,
) -> torch.Tensor:
    ids = torch.arange(len(images))
    mask = model.draw_mask(images, image_keys(0, number, ids), epoch=number, sample_ids=ids)
    kind = _AUTOCAST[config.train.precision]
    with torch.autocast(images.device.type, dtype=kind, enabled=kind is not None):
        loss = model(images, mask).loss
    loss.backward()
    optimizer.step()
    model.update_teacher()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def format_table(figures: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    rows = [
        "| regime | images/s (median) | slowest to fastest | encoder tokens "
        "| GFLOPs an image, forward + backward | loss |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, values in figures["regimes"].items():
        flops = (values["flops_forward"] + values["flops_backward"]) / 1e9
        rows.append(
            f"| {name} | {values['images_per_second']:.1f} | {values['slowest']:.1f} to "
            f"{values['fastest']:.1f} | {values['encoder_tokens']:.0f} | {flops:.3f} "
            f"| {values['loss']:.3f} |"
        )
    machine = figures["environment"]
    head = (
        f"{machine['device']}, {machine['cpu']}, {machine['cores']} cores, torch "
        f"{machine['torch']}, {figures['precision']}, batch {figures['batch_size']}, "
        f"{figures['rounds']} rounds of {figures['steps']} steps"
    )
    return "\n".join([head, "", *rows])
