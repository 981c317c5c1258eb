"""Probes that are trained by gradient steps on augmented images, before a frozen encoder.

Several heads, with a learning rate each, are trained on the same tokens at once: the encoder, which
is what costs, runs once for all of them. The best epoch and head are chosen on a split of train.

Shapes: H heads, B images, L tokens, D width, K classes.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mim.core.config import DataConfig
from mim.core.device import to_device
from mim.core.fields import Positive
from mim.core.rng import seed_of
from mim.data import Batch, ImageSource
from mim.evaluate.base import NOT_EMPTY, EncoderEvaluation
from mim.evaluate.encoders import Encoder
from mim.evaluate.features import check_finite, check_pool, check_precision
from mim.evaluate.training import (
    MEASURES,
    ClassificationTask,
    Labelled,
    TrainedSettings,
    accuracies,
    augmented,
    check_learnable,
    class_count,
    global_batch,
    identity_of,
    measured,
    split,
    start_accelerator,
    state_file,
)
from mim.training.runtime.precision import autocast


@dataclass(frozen=True)
class FrozenSettings(TrainedSettings):
    """Settings that the trained probes share."""

    base_lr: Annotated[tuple[Positive, ...], NOT_EMPTY] = (0.1,)
    """Peak learning rates for a batch of 256, scaled with the batch size: a head is trained with
    each, and the best is chosen."""


class Heads(nn.Module):
    """Heads that read the same tokens: (B, L, D) -> (H, B, K)."""

    def __init__(self, heads: list[nn.Module]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.stack([head(tokens) for head in self.heads])


class FrozenProbe(EncoderEvaluation):
    """Trained heads before a frozen encoder; a subclass says which, and by which optimizer."""

    settings: FrozenSettings

    @abstractmethod
    def tokens(self, encoder: Encoder, images: Tensor) -> Tensor:
        """What a head reads of (B, C, H, W) normalised images; no gradient is wanted."""

    @abstractmethod
    def head(self, encoder: Encoder, classes: int) -> nn.Module:
        """A new head, of :meth:`tokens` to (B, K) logits; torch's generator is seeded."""

    def decays(self) -> tuple[float, ...]:
        """The weight decays; a head is trained with each learning rate and each of them."""
        return (self.settings.weight_decay,)

    @abstractmethod
    def optimizer(self, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
        """The optimizer of groups with ``lr_scale`` and ``weight_decay``, one for each head."""

    def measures(self) -> tuple[str, ...]:
        return MEASURES

    def check_encoder(self, encoder: Encoder) -> None:
        super().check_encoder(encoder)
        check_pool(encoder.vit, self.settings.pool)

    def check(self, train: ImageSource, val: ImageSource) -> None:
        super().check(train, val)
        check_learnable(train, val, self.settings)
        if self.settings.held_out == 0 and len(self.settings.base_lr) * len(self.decays()) > 1:
            reason = "needs one base_lr and one decay: no images are left to choose by"
            raise self.settings.error("held_out", reason)

    def run(
        self,
        encoder: Encoder,
        train: ImageSource,
        val: ImageSource,
        *,
        device: torch.device | str = "cpu",
        precision: str = "fp32",
        folder: Path | None = None,
    ) -> dict[str, float]:
        s = self.settings
        check_precision(precision)
        accelerator = start_accelerator(device)
        assert encoder.vit is not None
        encoder.vit.to(accelerator.device)
        classes = class_count(train)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(s.seed, "head"))
            first = self.head(encoder, classes)
        # Heads differ in the learning rate and the decay alone.
        grid = list(itertools.product(s.base_lr, self.decays()))
        heads = [first, *(deepcopy(first) for _ in grid[1:])]
        size = global_batch(s, len(split(train, s)[0]), accelerator.num_processes)
        data = augmented(encoder.data, s, size)
        task = ProbeTask(self, encoder, heads, train, data, accelerator, precision)
        schedule = task.schedule(s.base_lr[0])
        groups: list[dict[str, object]] = [
            {
                "params": list(head.parameters()),
                "lr_scale": lr / s.base_lr[0],
                "lr": schedule.peak,
                "weight_decay": decay,
            }
            for head, (lr, decay) in zip(heads, grid, strict=True)
        ]
        state = state_file(folder, s, s.name)
        label, identity = f"{s.name} {encoder.name}", identity_of(encoder, precision)
        best = task.choose(self.optimizer(groups), schedule, label, state, identity)
        found = accuracies(task, task.model, val)
        if state is not None and accelerator.is_main_process:
            state.unlink(missing_ok=True)
        more = dict(best.numbers("accuracy"))
        if len(s.base_lr) > 1:
            more["chosen_base_lr"] = grid[best.head][0]
        if len(self.decays()) > 1:
            more["chosen_weight_decay"] = grid[best.head][1]
        return measured(found, best.head, classes, more)


class ProbeTask(ClassificationTask):
    """The heads of a probe trained on the tokens of its encoder, which stays as it is.

    A head whose learning rate is too high diverges alone, and is never chosen. The encoder is on
    the device; the precision is the encoder's.
    """

    def __init__(
        self,
        probe: FrozenProbe,
        encoder: Encoder,
        heads: list[nn.Module],
        train: ImageSource,
        data: DataConfig,
        accelerator: Accelerator,
        precision: str,
    ) -> None:
        model = Heads(heads).to(accelerator.device)
        super().__init__(model, probe.settings, train, data, accelerator, heads=len(heads))
        self.probe, self.encoder, self.precision = probe, encoder, precision
        self.classes = class_count(train)
        self.guarded = False

    def targets(self, batch: Batch, images: Tensor) -> Labelled:
        assert batch.labels is not None
        hot = nn.functional.one_hot(to_device(batch.labels, images.device), self.classes)
        return Labelled(images, hot.float())

    def logits(self, learner: nn.Module, images: Tensor) -> Tensor:
        with torch.no_grad(), autocast(self.precision, images.device):
            tokens = self.probe.tokens(self.encoder, images)
        if not learner.training:  # a training step does not wait for the device
            check_finite(tokens, self.precision, "tokens")
        logits: Tensor = learner(tokens.float())
        return logits
