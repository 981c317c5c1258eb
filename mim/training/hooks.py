"""What runs now and then during a training: lines of the curves, measurements, checkpoints.

A plug-in adds a hook by ``@HOOKS.register("name")`` on a subclass of
:class:`mim.training.trainer.Hook`, which is constructed with the run's config. The setting
``train.hooks`` names the hooks of a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mim.core.config import Config
from mim.core.device import to_device
from mim.core.progress import RunProgress
from mim.core.registry import Registry
from mim.data import Batch, ImageSource, eval_loader, normalize
from mim.data.sources.base import spread_indices
from mim.model import MaskedImageModel
from mim.training.checkpoint import Saver, snapshot
from mim.training.pictures import (
    fixed_masks,
    reconstruct,
    reconstruct_ratios,
    save_arrays,
    save_reconstructions,
)
from mim.training.runtime.precision import autocast
from mim.training.trainer import Hook, Trainer

HOOKS: Registry[Callable[[Config], Hook]] = Registry("train.hooks")
PICTURED_IMAGES = 8


class Log(Hook):
    """Writes mean losses, learning rate and images a second every few steps; shows progress."""

    def __init__(self, every: int, label: str) -> None:
        self.every, self.label = every, label

    def running(self, trainer: Trainer) -> AbstractContextManager[Any]:
        state, main = trainer.state, trainer.accelerator.is_main_process
        self._images, self._seconds = state.images, state.train_seconds
        self._progress = RunProgress(self.label, trainer.plan.steps, state.step, main)
        return self._progress

    def after_step(self, trainer: Trainer, batch: Batch, inputs: Any) -> None:
        self._progress.alive(batch.step + 1)

    def due(self, trainer: Trainer) -> bool:
        return trainer.state.step % self.every == 0 or trainer.done

    def run(self, trainer: Trainer) -> None:
        state = trainer.state
        images, seconds = state.images - self._images, state.train_seconds - self._seconds
        self._images, self._seconds = state.images, state.train_seconds
        taken = [row for row in state.rows if row["flag"] == 0]
        names = [name for name in taken[0] if name != "flag"] if taken else []
        state.means = {name: sum(row[name] for row in taken) / len(taken) for name in names}
        state.train_loss = state.means.get("loss", state.train_loss)
        state.rows.clear()
        assert state.latest is not None
        line = {**state.means, "lr": state.latest.lr, "images_per_second": images / seconds}
        line |= trainer.watch.counts()
        for hook in trainer.hooks:
            line |= hook.metrics(trainer)
        trainer.log(**line)
        self._progress.update(state.step, state.train_loss, images / seconds)


class HeldOut(Hook):
    """Measures the mean loss of held-out images, not augmented, each under one fixed mask."""

    name, kept = "held_out", ("loss",)

    def __init__(self, config: Config, source: ImageSource) -> None:
        self.config, self.source = config, source
        self.loss = math.nan

    def due(self, trainer: Trainer) -> bool:
        return trainer.passed(self.config.train.validate_every) or trainer.done

    @torch.no_grad()
    def run(self, trainer: Trainer) -> None:
        model: Any = trainer.task.model_to_evaluate()
        config, source, accelerator = self.config, self.source, trainer.accelerator
        whole = replace(config.data, eval_crop=1.0)
        device, world = accelerator.device, accelerator.num_processes
        total = torch.zeros(2, dtype=torch.float64, device=device)
        training = model.training
        model.eval()
        for batch in eval_loader(
            source,
            whole,
            max(1, config.data.batch_size // world // config.train.accumulate),
            trainer.rank,
            world,
            patch_size=model.patch_size,
        ):
            images = normalize(to_device(batch.images, device), source.mean, source.std)
            mask = fixed_masks(model, images, batch.sample_ids)
            with autocast(config.train.precision, device):
                losses = model(images, mask).loss_per_image
            total += torch.stack([losses.double().sum(), total.new_full((), len(losses))])
        model.train(training)
        loss, count = accelerator.reduce(total, "sum").tolist()
        self.loss = loss / count
        trainer.log(val_loss=self.loss)


class Pictures(Hook):
    """Draws reconstructions of held-out images; at the end also under other ratios."""

    def __init__(self, config: Config, source: ImageSource) -> None:
        self.config, self.source = config, source
        self.indices = spread_indices(len(source), PICTURED_IMAGES)

    def due(self, trainer: Trainer) -> bool:
        return trainer.passed(self.config.train.picture_every) or trainer.done

    def run(self, trainer: Trainer) -> None:
        model = trainer.task.model_to_evaluate()
        if not trainer.accelerator.is_main_process:
            return
        assert isinstance(model, MaskedImageModel)
        run, chosen, step = Path(self.config.output), self.indices, trainer.state.step
        arrays = reconstruct(model, self.config, self.source, chosen)
        trainer.curves.picture(save_reconstructions(run, arrays, f"step_{step:08d}"), step)
        if trainer.done:
            arrays = reconstruct_ratios(model, self.config, self.source, chosen)
            if arrays:
                save_arrays(run / "reconstructions_ratios.npz", arrays)


class Checkpoints(Hook):
    """Saves checkpoints; also at the end, and when a signal ends the training.

    Args:
        saver: writes them.
        every: epochs between two; 0 saves only at the end.
        milestone_every: epochs between two that are never deleted.
        cools_from: step after which one is never deleted, since a longer run may begin with it.
    """

    at_stop: ClassVar[bool] = True

    def __init__(
        self,
        saver: Saver,
        every: float,
        milestone_every: float = 0.0,
        cools_from: int | None = None,
    ) -> None:
        self.saver, self.every, self.milestone_every = saver, every, milestone_every
        self.cools_from = cools_from

    def running(self, trainer: Trainer) -> AbstractContextManager[Any]:
        return self.saver

    def after_step(self, trainer: Trainer, batch: Batch, inputs: Any) -> None:
        """Ends the run if an earlier checkpoint could not be written."""
        self.saver.check()

    def due(self, trainer: Trainer) -> bool:
        return trainer.done or trainer.passed(self.every) or self._stays(trainer)

    def _stays(self, trainer: Trainer) -> bool:
        return trainer.passed(self.milestone_every) or trainer.state.step == self.cools_from

    def run(self, trainer: Trainer) -> None:
        assert trainer.state.latest is not None
        trainer.watch.check_weights(trainer.state.latest)
        state = trainer.state_dict()
        if trainer.accelerator.is_main_process:
            trainer.curves.flush()
            self.saver.save(state, trainer.state.step, self._stays(trainer))
            if trainer.stopped or trainer.done:
                self.saver.wait()
        trainer.accelerator.wait_for_everyone()


class BestEpoch(Hook):
    """Measures at the end of epochs and keeps the best weights.

    Args:
        measure: scores each of the heads that are trained side by side, higher is better; all
            processes call it together.
        every: epochs between two measurements; the last epoch is always measured.
        called: what the best score is called in the curves; empty keeps the last epoch instead.
    """

    name = "best"
    kept = ("weights", "epoch", "head", "score", "loss", "history")

    def __init__(self, measure: Callable[[nn.Module], Tensor], every: int, called: str) -> None:
        self.measure, self.every, self.called = measure, every, called
        self.weights: dict[str, Tensor] = {}
        self.epoch, self.head, self.score, self.loss = 0, 0, -math.inf, math.nan
        self.history: list[dict[str, float]] = []

    def due(self, trainer: Trainer) -> bool:
        return trainer.passed(self.every) or trainer.done

    def run(self, trainer: Trainer) -> None:
        model = trainer.task.model_to_evaluate()
        scores = self.measure(model)
        trainer.learner.train()
        losses = trainer.state.means
        names = ["loss", *(f"loss_{head}" for head in range(1, len(scores)))]
        each = [losses.get(name, math.nan) for name in names]
        if not any(map(math.isfinite, each)):
            assert trainer.state.latest is not None
            raise trainer.task.diverged(trainer.state.latest, f"loss is {each[0]}", 1)
        scores[~torch.tensor(each).isfinite()] = -1.0
        head = int(scores.argmax())
        score = float(scores[head])
        found = {self.called: score} if self.called else {}
        self.history.append({"train_loss": each[head], **found})
        trainer.log(**found)
        if score > self.score if self.called else trainer.done:
            self.weights = snapshot(model.state_dict())
            self.epoch, self.head = round(trainer.epoch), head
            self.score, self.loss = score, each[head]

    def numbers(self, called: str) -> dict[str, float]:
        """Returns what an evaluation reports of the choice; ``called`` names the score."""
        chosen = {f"chosen_{called}": self.score} if self.called else {"chosen_last": 1.0}
        return {"train_loss": self.loss, "chosen_epoch": float(self.epoch), **chosen}
