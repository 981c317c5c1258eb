"""Supervised training on a part of train, its best epoch chosen on the rest.

Fine-tuning and the probes that are trained by gradient steps share this loop. What it computes
does not depend on workers, on the number of processes or on where it was stopped: the order, the
augmentation and whatever a recipe draws follow from keys, so that a state is weights, moments and
a step, and no state of a generator.

Shapes: H heads trained side by side, B images of this process's share of the batch, K classes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from mim.core.config import FREE, DataConfig
from mim.core.cpu.allocator import keep_freed_memory
from mim.core.cpu.linear import use_linear
from mim.core.errors import UserError, choice_error, setting_error
from mim.core.fields import Between, Count, Natural, NonNegative, Share, SpanToOne, at_least
from mim.core.keys import seed_of
from mim.core.progress import RunProgress
from mim.core.signals import Interrupted, Signals
from mim.data import Batch, ImageSource, Subset, eval_loader, normalize, train_loader, worker_deaths
from mim.data.loader import Augment
from mim.evaluate.base import EvaluationSettings, holdout, low_shot
from mim.evaluate.encoders import Encoder
from mim.evaluate.features import AUTOCAST
from mim.training.checkpoint import FORMAT, read_checkpoint, snapshot, write_atomic
from mim.training.optim import Schedule
from mim.training.runtime.processes import gathering, together

logger = logging.getLogger(__name__)

_TOP = 5
_ASK_EVERY = 20
"""Steps after which several processes ask each other whether one of them was told to stop."""


BatchSize = Annotated[int, at_least(2)]


@dataclass(frozen=True)
class TrainedSettings(EvaluationSettings):
    """Settings that everything trained by gradient steps shares."""

    epochs: Count = 100
    """Passes over the training images."""
    batch_size: BatchSize = 128
    """Images a step, over all processes; fewer, and an even number, where there are fewer."""
    min_lr: NonNegative = 0.0
    """Where the half cosine ends."""
    warmup_epochs: NonNegative = 5.0
    """Epochs of linear warm-up, at most half of all."""
    weight_decay: NonNegative = 0.0
    """The optimizer's."""
    crop_scale: SpanToOne = (0.08, 1.0)
    """Share of the image's area a random crop covers, from and to; mirrored as data.flip says."""
    held_out: Between = 0.1
    """Share of each class of the training images on which the best epoch is chosen."""
    fraction: Share = 1.0
    """Share of each class of the training images that is used at all (low-shot: 0.1, 0.01)."""
    checkpoint_every: Natural = field(default=1, metadata=FREE)
    """Epochs between two states from which an interrupted evaluation goes on; 0 keeps none. They
    need a run folder."""


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
    held = holdout(ids[used], labels[used], settings.seed, settings.held_out)
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
    if len(parts[1]) == 0:
        reason = f"of each class holds none of the {len(parts[0])} training images out"
        raise setting_error(f"evaluations.{name}.held_out", settings.held_out, reason)
    if len(parts[0]) < 2:
        reason = f"leaves {len(parts[0])} training images; at least 2 are needed"
        raise setting_error(f"evaluations.{name}.held_out", settings.held_out, reason)


TIMEOUT = 600.0
"""Seconds after which a process that others wait for counts as lost, as in ``train.timeout``."""


def start_accelerator(device: torch.device | str, timeout: float = TIMEOUT) -> Accelerator:
    """The processes that ``accelerate launch`` started, or this one, on ``device``.

    Precision is the caller's: an evaluation may autocast a part of what it computes only.

    Args:
        device: where it computes.
        timeout: seconds that an operation of all processes waits; those that work in
            :func:`several` have begun with theirs.
    """
    device = torch.device(device)
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    AcceleratorState._reset_state(reset_partial_state=alone)
    if device.type == "cpu":
        keep_freed_memory()
    waits = InitProcessGroupKwargs(timeout=timedelta(seconds=timeout))
    return Accelerator(cpu=device.type == "cpu", mixed_precision="no", kwargs_handlers=[waits])


@contextmanager
def several(device: torch.device | str, timeout: float = TIMEOUT) -> Iterator[None]:
    """Measure with the other processes that a launcher started; when one is lost, all end.

    All of them enter it, and wait for each other at its end.

    Args:
        device: where it computes.
        timeout: seconds after which a process that others wait for is lost.

    Raises:
        LostProcess: see :func:`mim.training.runtime.processes.together`.
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


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Autocast in a precision; none for fp32.

    Raises:
        UserError: for an unknown precision.
    """
    if precision not in AUTOCAST:
        raise choice_error("precision", precision, AUTOCAST)
    dtype = AUTOCAST[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


@dataclass(eq=False)
class Training:
    """What is trained, and by which recipe."""

    label: str
    """What the progress line calls it."""
    settings: TrainedSettings
    """Length and split."""
    data: DataConfig
    """How images are read; its batch size is that of a step."""
    model: nn.Module
    """What is trained and kept, on its device."""
    forward: Callable[[nn.Module, Tensor], Tensor]
    """(the model, images (B, C, H, W)) -> logits (H, B, K)."""
    prepare: Callable[[Batch, Tensor], tuple[Tensor, Tensor]]
    """(batch, normalised images) -> the images to learn from and their targets (B, K)."""
    optimizer: torch.optim.Optimizer
    """Its groups have an ``lr_scale`` each."""
    schedule: Schedule
    """Learning rate of each step, for an ``lr_scale`` of 1."""
    scaler: torch.amp.GradScaler
    """Switched off, but for float16."""
    rate: str = "base_lr"
    """The setting to lower where it diverges."""
    augment: Augment | None = None
    """Of the cut images."""
    ema: float = 0.0
    """Decay of an average of the weights that is measured in their stead; 0 is none."""
    identity: str = ""
    """What else, besides settings and images, decides what is computed: the encoder, above all."""


@dataclass
class Trained:
    """The best epoch."""

    state: dict[str, Tensor] = field(default_factory=dict)
    """The model's weights."""
    epoch: int = 0
    """Which, from 1."""
    head: int = 0
    """The best of the heads."""
    accuracy: float = -1.0
    """On the held-out part of train."""
    loss: float = math.nan
    """Mean training loss of the epoch."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Training loss and held-out accuracy of each epoch, of its best head."""

    @property
    def numbers(self) -> dict[str, float]:
        """What an evaluation reports of the choice."""
        return {
            "train_loss": self.loss,
            "chosen_epoch": float(self.epoch),
            "chosen_accuracy": self.accuracy,
        }


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


@torch.no_grad()
def accuracies(
    training: Training, model: nn.Module, source: ImageSource, accelerator: Accelerator
) -> Tensor:
    """(2, H) float64: the share of right answers, and of those among the best five."""
    model.eval()
    device = accelerator.device
    right = torch.zeros((), dtype=torch.float64, device=device)
    count = right.clone()  # unreadable images are left out
    rank, world = accelerator.process_index, accelerator.num_processes
    for batch in eval_loader(source, training.data, rank=rank, world=world):
        images = normalize(batch.images.to(device), source.mean, source.std)
        logits = training.forward(model, images)  # (H, B, K)
        assert batch.labels is not None
        wanted = batch.labels.to(device)[None, :, None]
        best = logits.topk(min(_TOP, logits.shape[2]), dim=2).indices == wanted  # (H, B, 5)
        found = torch.stack([best[..., 0], best.any(2)])  # (2, H, B)
        right = right + found.double().sum(2)
        count += len(batch)
    total, counted = accelerator.reduce(right, "sum"), accelerator.reduce(count, "sum")
    return (total / counted).cpu()


def measured(found: Tensor, head: int, classes: int) -> dict[str, float]:
    """Named numbers of a head, from what :func:`accuracies` returned."""
    numbers = {"accuracy": float(found[0, head])}
    if classes > _TOP:
        numbers[f"accuracy_top{_TOP}"] = float(found[1, head])
    return numbers


class State:
    """The file from which an interrupted training goes on.

    Args:
        path: where it stands; None keeps none.
        fingerprint: what decides what is computed. A state with another one is not used.
    """

    def __init__(self, path: Path | None, fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint

    def read(self) -> dict[str, Any] | None:
        """What was written last; None where there is nothing, or of another computation."""
        if self.path is None or not self.path.is_file():
            return None
        saved = read_checkpoint(self.path)
        if saved["fingerprint"] != self.fingerprint:
            logger.warning("%s is of other settings, images or weights: begun anew", self.path)
            return None
        return saved

    def write(self, content: dict[str, Any]) -> None:
        """Writes tensors and plain values in the place of what was there."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = {"format": FORMAT, "fingerprint": self.fingerprint, **content}
        write_atomic(self.path, lambda temporary: torch.save(whole, temporary))

    def remove(self) -> None:
        """Once what it was for has been measured."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _stopped(signals: Signals, accelerator: Accelerator, step: int, last: bool) -> int | None:
    """The signal on which all processes stop after this step."""
    if accelerator.num_processes == 1:
        return signals.caught
    if step % _ASK_EVERY and not last:
        return None
    flag = torch.tensor(float(signals.caught is not None), device=accelerator.device)
    asked: Tensor = accelerator.reduce(flag, "sum")
    return (signals.caught or signal.SIGTERM) if asked.item() else None


def run_training(
    training: Training, train: ImageSource, accelerator: Accelerator, state: Path | None = None
) -> Trained:
    """Trains; ``training.model`` has the weights of the best epoch afterwards.

    Args:
        training: see there.
        train: labelled images, which ``training.settings`` splits.
        accelerator: of :func:`start_accelerator`.
        state: file from which it goes on where it was interrupted; the caller removes it.

    Raises:
        UserError: for a loss that is not finite, of every head.
        Interrupted: after SIGINT or SIGTERM where there is a state, which then has been written.
    """
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        return _run(training, train, accelerator, state)


def _run(
    training: Training, train: ImageSource, accelerator: Accelerator, state: Path | None
) -> Trained:
    s, model, optimizer = training.settings, training.model, training.optimizer
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    main = accelerator.is_main_process
    fit_on, held = (Subset(train, part) for part in split(train, s))
    per_epoch = len(fit_on) // training.data.batch_size
    total = s.epochs * per_epoch
    use_linear(model, "auto", device)
    ema = ModelEmaV3(model, decay=training.ema) if training.ema else None
    subject = model if ema is None else ema.module
    wrapped: nn.Module = accelerator.prepare_model(model)
    settings = {key: value for key, value in asdict(s).items() if key != "checkpoint_every"}
    known = json.dumps([settings, train.fingerprint(), training.identity], sort_keys=True)
    keeper = State(state, known)

    best, losses, start = Trained(snapshot(subject.state_dict())), [], 0
    saved = keeper.read()
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        training.scaler.load_state_dict(saved["scaler"])
        if ema is not None:
            ema.module.load_state_dict(saved["ema"])
        best, start = Trained(**saved["best"]), saved["step"]
        losses = list(saved["losses"].to(device))

    def save(step: int) -> None:
        if main:
            content = {
                "step": step,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": training.scaler.state_dict(),
                "ema": {} if ema is None else ema.module.state_dict(),
                "best": {f: getattr(best, f) for f in Trained.__dataclass_fields__},
                "losses": torch.stack(losses).cpu() if losses else torch.zeros(0),
            }
            keeper.write(content)
        accelerator.wait_for_everyone()

    batches = train_loader(
        fit_on,
        training.data,
        s.seed,
        start_step=start,
        total_steps=total,
        rank=rank,
        world=world,
        augment=training.augment,
    )
    began = time.monotonic()
    # Without a state there is nothing to save: a signal then does what it always does.
    noting = nullcontext(Signals()) if state is None else Signals()
    shown = RunProgress(training.label, total, start, main)
    with shown as progress, noting as signals, worker_deaths():
        wrapped.train()
        for batch in batches:
            lr = training.schedule(batch.step)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            torch.manual_seed(seed_of(s.seed, "step", batch.step, rank))  # for dropout alone
            images = normalize(batch.images.to(device), train.mean, train.std)
            images, targets = training.prepare(batch, images)
            logits = training.forward(wrapped, images)  # (H, B, K)
            each = -(targets * logits.float().log_softmax(2)).sum(2).mean(1)  # (H,)
            optimizer.zero_grad(set_to_none=True)
            training.scaler.scale(each.sum()).backward()
            training.scaler.step(optimizer)
            training.scaler.update()
            if ema is not None:
                ema.update(model)
            losses.append(each.detach())
            step = batch.step + 1
            ends = step % per_epoch == 0
            if ends:
                mean = accelerator.reduce(torch.stack(losses), "mean").mean(0).cpu()  # (H,)
                losses.clear()
                if not mean.isfinite().any():
                    at = f"gives a loss of {float(mean[0])} in epoch {batch.epoch + 1}"
                    raise s.error(training.rate, f"{at}; lower it")
                found = accuracies(training, subject, held, accelerator)[0]  # (H,)
                found[~mean.isfinite()] = -1.0
                head = int(found.argmax())
                line = {"train_loss": float(mean[head]), "held_out_accuracy": float(found[head])}
                best.history.append(line)
                if found[head] > best.accuracy:
                    weights = snapshot(subject.state_dict())
                    history = best.history
                    chosen = (batch.epoch + 1, head, float(found[head]), float(mean[head]))
                    best = Trained(weights, *chosen, history)
                wrapped.train()
                rate = (step - start) * training.data.batch_size / (time.monotonic() - began)
                progress.update(step, float(mean[head]), rate)
            caught = _stopped(signals, accelerator, step, ends)
            every = s.checkpoint_every * per_epoch
            if state is not None and (caught or (every and step % every == 0)):
                save(step)
            if caught:
                raise Interrupted(caught, f"saved step {step} in {str(state)!r}; do the same again")
    model.load_state_dict(best.state)
    model.eval()
    return best
