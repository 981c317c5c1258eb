"""What evaluations that are trained by gradient steps share: settings, task, and the best epoch.

All of them run in :mod:`mim.training.trainer`, on any number of processes. The best epoch is chosen
on a part of train. Order, augmentation and whatever a recipe draws follow from keys, so that
nothing depends on workers, processes or on where the training was stopped.

Shapes: H heads trained side by side, B images of this process's share of the batch, K classes.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import TensorBoardTracker
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn

from mim.core.config import FREE, DataConfig
from mim.core.cpu.kernels import tune
from mim.core.cpu.process import tune_process
from mim.core.device import to_device
from mim.core.errors import UserError, setting_error
from mim.core.fields import (
    BelowOne,
    Count,
    Natural,
    NonNegative,
    Share,
    SpanToOne,
    at_least,
    is_free,
)
from mim.data import Batch, ImageSource, Subset, eval_loader, normalize, train_loader
from mim.data.loader import Augment
from mim.evaluate.base import AnySettings, EvaluationSettings, low_shot, stratified_holdout
from mim.evaluate.encoders import Encoder
from mim.evaluate.features import check_finite
from mim.evaluate.predictions import Measured, gather_rows
from mim.training.checkpoint import FileStore, Saver, prepare_folder
from mim.training.hooks import BestEpoch, Checkpoints, Log
from mim.training.metrics import Curves, Metrics
from mim.training.nonfinite import StepRecord
from mim.training.optim import Schedule
from mim.training.runtime.machine import settle
from mim.training.runtime.processes import gathering, together
from mim.training.runtime.trackers import Trackers
from mim.training.trainer import Hook, Loss, Plan, Task, Trainer, parts

_TOP = 5
MEASURES = ("accuracy", f"accuracy_top{_TOP}")
_TRACKER_SECONDS = 120.0
BatchSize = Annotated[int, at_least(2)]


@dataclass(frozen=True)
class StepSettings(AnySettings):
    """How steps are taken and kept, in every evaluation that takes any."""

    accumulate: Count = field(default=1, metadata=FREE)
    """Parts a process cuts its share of a batch into, to save memory; a batch norm, and the
    regions that detection draws, see a part at a time."""
    clip_grad: NonNegative = 0.0
    """Largest norm of the gradient; 0 clips nothing."""
    max_nonfinite: Count = field(default=1, metadata=FREE)
    """Steps in a row, whose loss or gradient is not finite, that end the training; those before
    are skipped. Where several heads are trained side by side, one that diverges is left out."""
    checkpoint_every: Natural = field(default=1, metadata=FREE)
    """Epochs between two states from which an interrupted evaluation resumes; 0 keeps none. They
    need a run folder."""
    async_save: bool = field(default=False, metadata=FREE)
    """Whether a state is copied to host memory and written while training continues."""
    tensorboard: bool = field(default=False, metadata=FREE)
    """Whether the curves go to TensorBoard, too, beside the states."""


@dataclass(frozen=True)
class TrainedSettings(StepSettings, EvaluationSettings):
    """Settings that everything trained by gradient steps shares."""

    epochs: Count = 100
    """Passes over the training images."""
    batch_size: BatchSize = 128
    """Images a step, over all processes; fewer, and an even number, where there are fewer."""
    min_lr: NonNegative = 0.0
    """Where the half cosine ends."""
    warmup_epochs: NonNegative = 5.0
    """Epochs of linear warm-up, at most half of all."""
    warmup_from: NonNegative | None = None
    """Absolute learning rate of the first step; by default, with W steps of warm-up, 1 / (W + 1) of
    the peak. MAE's is 0."""
    counts_warmup: bool = False
    """Whether the cosine begins with the first step, as in SimMIM; else after the warm-up."""
    weight_decay: NonNegative = 0.0
    """The optimizer's."""
    crop_scale: SpanToOne = (0.08, 1.0)
    """Share of the image's area a random crop covers, from and to; mirrored as data.flip says."""
    crop_fit: Literal["redraw", "clamp"] = field(default="redraw", metadata={"before": "redraw"})
    """As data.crop_fit."""
    held_out: BelowOne = 0.1
    """Share of each class of the training images on which the best epoch is chosen. 0 trains on all
    of them and measures the last epoch, as papers' numbers are; nothing is chosen then."""
    fraction: Share = 1.0
    """Share of each class of the training images that is used at all (low-shot: 0.1, 0.01)."""


def labels_of_source(source: ImageSource) -> Tensor:
    """(n,) int64; the caller has checked that there are labels."""
    assert source.labels is not None
    return torch.as_tensor(source.labels).long()


def class_count(train: ImageSource) -> int:
    """K: how many classes the images may have."""
    return max(len(train.classes), int(labels_of_source(train).max()) + 1)


def split(train: ImageSource, settings: TrainedSettings) -> tuple[Tensor, Tensor]:
    """Positions of the images to fit, and of those on which the epoch is chosen."""
    ids, labels = torch.as_tensor(train.sample_ids), labels_of_source(train)
    used = torch.arange(len(ids))
    if settings.fraction < 1:
        used = low_shot(ids, labels, settings.fraction, settings.seed)
    if settings.held_out == 0:
        return used, used[:0]
    held = stratified_holdout(ids[used], labels[used], settings.seed, settings.held_out)
    return used[~held], used[held]


def check_learnable_classes(train: ImageSource, val: ImageSource, name: str) -> None:
    """Refuses images of which no classifier can be made.

    Raises:
        UserError: if train has one class only, or val a class that train has not.
    """
    present = labels_of_source(train).unique()
    if len(present) < 2:
        raise UserError(f"evaluation {name} needs at least 2 classes; train has {len(present)}")
    unknown = [k for k in labels_of_source(val).unique().tolist() if k not in present.tolist()]
    if unknown:
        of_class = repr(val.classes[unknown[0]]) if val.classes else unknown[0]
        raise UserError(f"evaluation {name}: class {of_class} is in val but not in train")


def check_learnable(train: ImageSource, val: ImageSource, settings: TrainedSettings) -> None:
    """Refuses images from which no classifier can be trained and chosen.

    Raises:
        UserError: see :func:`check_learnable_classes`; or for too few images to choose an epoch on.
    """
    name = settings.name
    check_learnable_classes(train, val, name)
    parts = split(train, settings)
    if len(parts[1]) == 0 and settings.held_out > 0:
        reason = f"of each class holds none of the {len(parts[0])} training images out"
        raise setting_error(f"evaluations.{name}.held_out", settings.held_out, reason)
    if len(parts[0]) < 2:
        reason = f"leaves {len(parts[0])} training images; at least 2 are needed"
        raise setting_error(f"evaluations.{name}.held_out", settings.held_out, reason)


TIMEOUT = 600.0
"""Seconds after which a process that others wait for counts as lost, as in ``train.timeout``."""


def start_accelerator(device: torch.device | str, timeout: float = TIMEOUT) -> Accelerator:
    """The processes that ``accelerate launch`` started, or this one, on ``device``.

    Precision is the caller's: an evaluation may autocast a part of what it computes only. The
    timeout, in seconds, is that of an operation of all processes, unless they work in
    :func:`several`, which has set its own.
    """
    device = settle(device)
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    AcceleratorState._reset_state(reset_partial_state=alone)
    tune_process(device)
    waits = InitProcessGroupKwargs(timeout=timedelta(seconds=timeout))
    return Accelerator(cpu=device.type == "cpu", mixed_precision="no", kwargs_handlers=[waits])


@contextmanager
def several(device: torch.device | str, timeout: float = TIMEOUT) -> Iterator[None]:
    """Measure with the other processes that a launcher started; when one is lost, all end.

    All of them enter it, and wait for each other at its end.

    Raises:
        LostProcess: for a process that the others waited for longer than ``timeout`` seconds.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    with gathering("--timeout", timeout):
        accelerator = start_accelerator(device, timeout)
    with together(accelerator.process_index, accelerator.num_processes, timeout):
        yield
        accelerator.wait_for_everyone()  # the first holds what the others look into


def global_batch(settings: TrainedSettings, count: int, world: int) -> int:
    """Images a step, in shares of an even number for each process.

    Raises:
        UserError: if they do not divide so; rounding would make the result depend on the processes.
    """
    size = min(settings.batch_size, count) // 2 * 2
    if size % (2 * world):
        reason = f"must divide into even shares for {world} processes"
        if size < settings.batch_size:
            reason += f"; the training images allow {size}"
        raise settings.error("batch_size", reason)
    return size


def augmented(data: DataConfig, settings: TrainedSettings, batch_size: int) -> DataConfig:
    """How images are read for training: random crops, batches of this size."""
    scale = (settings.crop_scale[0], settings.crop_scale[1])
    return replace(
        data,
        batch_size=batch_size,
        augment="mae",
        crop_scale=scale,
        crop_fit=settings.crop_fit,
        color_jitter=0.0,
    )


class SupervisedTask(Task):
    """What the tasks of evaluations share; a batch is that of all processes together."""

    rate = "base_lr"
    """The setting to lower where it diverges."""
    precision = "fp32"
    guarded = True
    """Whether a step that is not finite ends the training, or is skipped."""

    def __init__(
        self,
        model: nn.Module,
        accelerator: Accelerator,
        settings: StepSettings,
        batch_size: int,
        per_epoch: int,
        epochs: int,
        decay: float = 0.0,
    ) -> None:
        super().__init__(model, accelerator, decay)
        self.settings, self.batch_size = settings, batch_size
        self.per_epoch, self.steps = per_epoch, epochs * per_epoch

    def diverged(self, record: StepRecord, what: str, row: int) -> Exception:
        value, epoch = getattr(self.settings, self.rate), record.epoch + 1
        setting = f"evaluations.{self.settings.name}.{self.rate}"
        advice = "lower it"
        if self.precision == "fp16":
            advice += ", or choose precision bf16 or fp32 if the encoder overflows in fp16"
        return setting_error(setting, value, f"is too high: {what} in epoch {epoch}; {advice}")


def warmup_and_cosine(
    task: SupervisedTask, peak: float, least: float, warmup_epochs: float, **moves: Any
) -> Schedule:
    """Linear warm-up, at most half of all steps, and half a cosine; ``moves`` as of Schedule."""
    warmup = min(warmup_epochs * task.per_epoch, task.steps / 2)
    return Schedule(peak, least, warmup, task.steps, **moves)


def train_epochs(
    task: SupervisedTask,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    best: BestEpoch,
    label: str,
    store: FileStore | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Trains; the model has the weights of the best epoch afterwards.

    Args:
        task: what is trained.
        optimizer: its groups have an ``lr_scale``.
        schedule: learning rate of each step, for an ``lr_scale`` of 1.
        best: measures, and keeps the best.
        label: what the progress is called.
        store: file from which an interrupted training resumes; the caller removes it. The curves
            stand beside it.
        scaler: of the gradients in fp16.

    Raises:
        UserError: for losses that are not finite.
        Interrupted: after a signal where there is a store, which then has been written.
    """
    s, device = task.settings, task.accelerator.device
    plan = Plan(
        seed=s.seed,
        steps=task.steps,
        steps_per_epoch=task.per_epoch,
        batch_size=task.batch_size,
        accumulate=s.accumulate,
        clip_grad=s.clip_grad or None,
        max_nonfinite=s.max_nonfinite if task.guarded else 0,
    )
    hooks: list[Hook] = [Log(task.per_epoch, label), best]
    if store is not None:
        hooks.append(Checkpoints(Saver(store, s.async_save), s.checkpoint_every))
    learner = task.learner()
    trainer = Trainer(task, plan, optimizer, schedule, learner, hooks, Curves(), store, scaler)
    saved = None if store is None else store.read()
    if saved is not None:
        trainer.load_state_dict(saved)
    if store is not None and task.accelerator.is_main_process:
        trainer.curves = _curves(store.path, s, trainer.state.step)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        trainer.fit()
    if trainer.stopped:
        raise trainer.interrupted()
    if best.weights:
        task.model.load_state_dict(best.weights)
    task.model.eval()


def _curves(state: Path, settings: StepSettings, step: int) -> Curves:
    """A file of curves beside a state, and TensorBoard's where asked."""
    prepare_folder(state.parent)
    trackers = []
    if settings.tensorboard:
        tracker = TensorBoardTracker(state.stem, state.parent / "logs")
        tracker.start()
        trackers.append(tracker)
    metrics = Metrics(state.with_suffix(".jsonl"), step)
    return Curves(metrics, Trackers(trackers, _TRACKER_SECONDS))


class Labelled(NamedTuple):
    """This process's share of a batch, or a part of it.

    Attributes:
        images: (B, C, H, W), normalised, to learn from.
        targets: (B, K), which sum to 1.
        draws: (B, drop paths) in [0, 1); see :class:`mim.evaluate.drop_path.DropPathDraws`.
    """

    images: Tensor
    targets: Tensor
    draws: Tensor | None = None


class ClassificationTask(SupervisedTask):
    """Labelled images, one or more heads; cross-entropy.

    Args:
        train: labelled images, which the settings split.
        data: how they are read; its batch size is that of a step.
        augment: of the cut images.
        heads: H.
    """

    settings: TrainedSettings

    def __init__(
        self,
        model: nn.Module,
        settings: TrainedSettings,
        train: ImageSource,
        data: DataConfig,
        accelerator: Accelerator,
        *,
        augment: Augment | None = None,
        heads: int = 1,
        ema: float = 0.0,
    ) -> None:
        self.train, self.data, self.augment, self.heads = train, data, augment, heads
        self.fitted, self.held = (Subset(train, part) for part in split(train, settings))
        tune(model, accelerator.device)
        size, per_epoch = data.batch_size, len(self.fitted) // data.batch_size
        super().__init__(model, accelerator, settings, size, per_epoch, settings.epochs, ema)

    @abstractmethod
    def logits(self, learner: nn.Module, images: Tensor) -> Tensor:
        """(B, C, H, W) normalised -> (H, B, K) float32."""

    @abstractmethod
    def targets(self, batch: Batch, images: Tensor) -> Labelled:
        """What is learnt from normalised images on the device."""

    def schedule(self, base_lr: float) -> Schedule:
        """Linear warm-up and half a cosine, from a learning rate for a batch of 256."""
        s, peak = self.settings, base_lr * self.batch_size / 256
        moves = {"start": s.warmup_from, "counts_warmup": s.counts_warmup}
        return warmup_and_cosine(self, peak, s.min_lr, s.warmup_epochs, **moves)

    def batches(self, start: int) -> Iterable[Batch]:
        return train_loader(
            self.fitted,
            self.data,
            self.settings.seed,
            start_step=start,
            total_steps=self.steps,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            augment=self.augment,
        )

    def prepare(self, batch: Batch) -> Labelled:
        images = to_device(batch.images, self.accelerator.device)
        return self.targets(batch, normalize(images, self.train.mean, self.train.std))

    def parts(self, inputs: Labelled, count: int) -> Iterator[tuple[Labelled, float]]:
        for cut in parts(inputs.images, count):
            draws = None if inputs.draws is None else inputs.draws[cut]
            part = Labelled(inputs.images[cut], inputs.targets[cut], draws)
            yield part, len(part.images) / len(inputs.images)

    def loss(self, learner: nn.Module, part: Labelled) -> Loss:
        """Minimises the losses of all heads together."""
        logits = self.logits(learner, part.images)  # (H, B, K)
        each = -(part.targets * logits.float().log_softmax(2)).sum(2).mean(1)  # (H,)
        names = ["loss", *(f"loss_{head}" for head in range(1, len(each)))]
        return Loss(each.sum(), dict(zip(names, each.detach(), strict=True)))

    def choose(
        self,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        label: str,
        state: Path | None,
        identity: str,
        scaler: torch.amp.GradScaler | None = None,
    ) -> BestEpoch:
        """Trains, by :func:`train_epochs`, and returns the best epoch, or the last (held_out 0).

        Args:
            optimizer: its groups have an ``lr_scale``.
            schedule: of the learning rate, for an ``lr_scale`` of 1.
            label: what the progress is called.
            state: file from which an interrupted training resumes.
            identity: what decides what is computed besides settings and images: the encoder.
            scaler: of the gradients in fp16.
        """
        store = None
        if state is not None:
            kind = type(self.settings)
            kept = {k: v for k, v in asdict(self.settings).items() if not is_free(kind, k)}
            known = json.dumps([kept, self.train.fingerprint(), identity], sort_keys=True)
            store = FileStore(state, known)
        if len(self.held):
            measure, called = lambda m: accuracies(self, m, self.held).accuracy, "held_out_accuracy"
        else:
            measure, called = lambda _: torch.zeros(self.heads), ""
        best = BestEpoch(measure, 1, called)
        train_epochs(self, optimizer, schedule, best, label, store, scaler)
        return best


def state_file(folder: Path | None, settings: StepSettings, name: str) -> Path | None:
    """Where an interrupted training is kept; None where none is."""
    if folder is None or settings.checkpoint_every == 0:
        return None
    return folder / "evaluations" / f"{name}.pt"


def identity_of(encoder: Encoder, precision: str) -> str:
    """Tells encoders apart by their weights, and what they read by its settings."""
    assert encoder.vit is not None
    digest = hashlib.blake2b(digest_size=16)
    for name, value in encoder.vit.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    read = asdict(encoder.data)
    for free in ("workers", "path", "download", "batch_size"):
        del read[free]
    return json.dumps([digest.hexdigest(), read, precision], sort_keys=True)


class Answered(NamedTuple):
    """Which test images each head answered right, those of all processes."""

    right: Tensor  # (2, I, H) bool: by the best guess, and among the best five
    sample_ids: Tensor  # (I,)
    labels: Tensor  # (I,)

    @property
    def accuracy(self) -> Tensor:
        """(H,) float64: the share of right answers."""
        return self.right[0].double().mean(0)


@torch.no_grad()
def accuracies(task: ClassificationTask, model: nn.Module, source: ImageSource) -> Answered:
    """Classifies every readable image of a source with every head.

    All processes call it together; each reads its share of the images, which may be none.
    """
    model.eval()
    accelerator = task.accelerator
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    right = [torch.zeros(0, 2, task.heads, dtype=torch.bool)]
    ids, labels = ([torch.zeros(0, dtype=torch.int64)] for _ in range(2))
    for batch in eval_loader(source, task.data, rank=rank, world=world):
        images = normalize(to_device(batch.images, device), source.mean, source.std)
        logits = task.logits(model, images)  # (H, B, K)
        if task.guarded:  # else a head may diverge alone
            check_finite(logits[0], task.precision, "answers")
        assert batch.labels is not None
        wanted = to_device(batch.labels, device)[None, :, None]
        best = logits.topk(min(_TOP, logits.shape[2]), dim=2).indices == wanted  # (H, B, 5)
        found = torch.stack([best[..., 0], best.any(2)])  # (2, H, B)
        right.append(found.permute(2, 0, 1).cpu())
        ids.append(torch.as_tensor(batch.sample_ids, dtype=torch.int64))
        labels.append(torch.as_tensor(batch.labels, dtype=torch.int64))
    rows = [gather_rows(torch.cat(part)) for part in (right, ids, labels)]
    return Answered(rows[0].transpose(0, 1), rows[1], rows[2])


def measured(
    found: Answered, head: int, classes: int, more: Mapping[str, float] | None = None
) -> Measured:
    """Named numbers of a head and its answers, from what :func:`accuracies` returned."""
    answers = {"accuracy": found.right[0, :, head]}
    if classes > _TOP:
        answers[f"accuracy_top{_TOP}"] = found.right[1, :, head]
    numbers = {name: float(answer.double().mean()) for name, answer in answers.items()}
    return Measured({**numbers, **(more or {})}, found.sample_ids, answers, found.labels)
