"""Probes that are trained by gradient steps on augmented images, before a frozen encoder.

Several heads, with a learning rate each, are trained on the same tokens at once: the encoder, which
is what costs, runs once for all of them. The best epoch and head are chosen on a split of train.

Shapes: H heads, B images, L tokens, D width, K classes.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor, nn

from mim.core.fields import Positive
from mim.core.keys import seed_of
from mim.data import Batch, ImageSource
from mim.evaluate.base import NOT_EMPTY, EncoderEvaluation
from mim.evaluate.encoders import Encoder
from mim.evaluate.features import check_pool
from mim.evaluate.training import (
    TrainedSettings,
    Training,
    accuracies,
    autocast,
    check_learnable,
    class_count,
    global_batch,
    identity_of,
    measured,
    run_training,
    split,
    start_accelerator,
)
from mim.training.optim import Schedule


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
        """Logits of each."""
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

    @abstractmethod
    def optimizer(self, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
        """The optimizer of groups with ``lr_scale``, one for each head."""

    def check_encoder(self, encoder: Encoder) -> None:
        """See :meth:`EncoderEvaluation.check_encoder`."""
        super().check_encoder(encoder)
        check_pool(encoder.vit, self.settings.pool)

    def check(self, train: ImageSource, val: ImageSource) -> None:
        """See :meth:`AnyEvaluation.check`.

        Raises:
            UserError: see :func:`mim.evaluate.training.check_learnable`.
        """
        super().check(train, val)
        check_learnable(train, val, self.settings)

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
        """See :meth:`EncoderEvaluation.run`."""
        s = self.settings
        autocast(torch.device(device), precision)  # an unknown precision is told at once
        accelerator = start_accelerator(device)
        place = accelerator.device
        assert encoder.vit is not None
        encoder.vit.to(place)
        classes = class_count(train)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(s.seed, "head"))
            first = self.head(encoder, classes)
        heads = [first, *(self._again(first, encoder, classes) for _ in s.base_lr[1:])]
        model = Heads(heads).to(place)

        images = len(split(train, s)[0])
        size = global_batch(s, images, accelerator.num_processes)
        data = replace(
            encoder.data,
            batch_size=size,
            augment="mae",
            crop_scale=(s.crop_scale[0], s.crop_scale[1]),
        )
        total = s.epochs * (images // size)
        warmup = min(s.warmup_epochs * (images // size), total / 2)
        peak = s.base_lr[0] * size / 256
        groups: list[dict[str, object]] = [
            {"params": list(head.parameters()), "lr_scale": lr / s.base_lr[0], "lr": peak}
            for head, lr in zip(heads, s.base_lr, strict=True)
        ]

        def prepare(batch: Batch, images: Tensor) -> tuple[Tensor, Tensor]:
            assert batch.labels is not None
            hot = nn.functional.one_hot(batch.labels.to(place), classes)
            return images, hot.float()

        def forward(model: nn.Module, images: Tensor) -> Tensor:
            with torch.no_grad(), autocast(place, precision):
                tokens = self.tokens(encoder, images)
            logits: Tensor = model(tokens.float())
            return logits

        training = Training(
            label=f"{s.name} {encoder.name}",
            settings=s,
            data=data,
            model=model,
            forward=forward,
            prepare=prepare,
            optimizer=self.optimizer(groups),
            schedule=Schedule(peak, s.min_lr, warmup, total),
            scaler=torch.amp.GradScaler(place.type, enabled=False),
            identity=identity_of(encoder, precision),
        )
        state = None
        if folder is not None and s.checkpoint_every:
            state = folder / "evaluations" / f"{s.name}.pt"
        trained = run_training(training, train, accelerator, state)
        found = accuracies(training, model, val, accelerator)
        if state is not None and accelerator.is_main_process:
            state.unlink(missing_ok=True)
        numbers = measured(found, trained.head, classes) | trained.numbers
        if len(s.base_lr) > 1:
            numbers["chosen_base_lr"] = s.base_lr[trained.head]
        return numbers

    def _again(self, first: nn.Module, encoder: Encoder, classes: int) -> nn.Module:
        """Another head with the same initial weights: heads differ in the learning rate alone."""
        head = self.head(encoder, classes)
        head.load_state_dict(first.state_dict())
        return head
