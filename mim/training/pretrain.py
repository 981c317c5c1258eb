"""Pre-training: its task, and the run from a config to a folder."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration
from torch import Tensor, nn

from mim.core.config import Config
from mim.core.cpu.process import tune_process
from mim.core.device import to_device
from mim.core.errors import TrainingError, UserError, setting_error
from mim.core.files import remove_leftovers
from mim.core.fingerprints import check_images, same_images
from mim.core.lock import sole_use
from mim.core.patches import Images
from mim.core.progress import note
from mim.core.rng import image_keys
from mim.core.settings import to_dict
from mim.core.signals import Interrupted
from mim.core.terminal import printable
from mim.data import (
    Batch,
    ImageSource,
    normalize,
    open_source,
    open_weights,
    steps_per_epoch,
    train_loader,
    write_list,
)
from mim.data.detection import FOLDERS, keep_outside
from mim.data.weights import Weigh
from mim.masks import PatchMask
from mim.model import MaskedImageModel
from mim.training import checkpoint
from mim.training.hooks import HOOKS, Checkpoints, HeldOut, Log, Pictures
from mim.training.metrics import Curves, Metrics
from mim.training.nonfinite import RECORD, StepRecord
from mim.training.online import OnlineProbe
from mim.training.optim import build_optimizer, build_schedule
from mim.training.pictures import fixed_masks, read_images
from mim.training.results import UNFINISHED, read_result, update_result
from mim.training.runtime.cost import count_flops, environment, resident_bytes
from mim.training.runtime.machine import (
    deterministic,
    memory,
    pick_device,
    refused_precision,
    settle,
)
from mim.training.runtime.precision import autocast, is_emulated, model_on, narrow_weights
from mim.training.runtime.processes import gathering, together
from mim.training.runtime.sharding import Sharded, gather_full
from mim.training.runtime.trackers import start_trackers, tracker_names
from mim.training.trainer import Hook, Loss, Plan, Task, Trainer, parts

ONLINE = "linear_online"
"""How results call the probe that learns during pre-training, among the evaluations."""
SUBSETS = ("subset_train.txt", "subset_val.txt")
"""Files that list the images of a subset, to train on and held out."""
_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16", "fp8": "bf16"}


@dataclass(frozen=True)
class RunImages:
    """The images of a run, and how many steps it takes over them."""

    train: ImageSource
    val: ImageSource
    fingerprint: str
    """Of both."""
    weigh: Weigh | None
    """How much each training image counts; None where all count alike."""
    per_epoch: int
    """Steps in one pass over the training images."""
    steps: int
    """Steps of the whole run."""


@dataclass(frozen=True)
class Inputs:
    """This process's share of a batch, or a part of it."""

    images: Images
    """(B, C, H, W), normalised, or patches of several sizes."""
    mask: PatchMask
    """(B, N), or (B R, N), R masks of each image."""
    weight: Tensor | None
    """(B,) how much each image counts; None where all count alike."""
    total_weight: float | None
    """Sum over the images of all processes."""


class PretrainTask(Task):
    """Predicts what is hidden in masked images."""

    model: MaskedImageModel

    def __init__(
        self, model: MaskedImageModel, images: RunImages, config: Config, accelerator: Accelerator
    ) -> None:
        super().__init__(model, accelerator, config.train.ema_decay or 0.0)
        self.images, self.config = images, config
        self.teacher_decay = config.model.teacher_schedule.build(
            config.model.teacher_decay, images.steps, images.per_epoch
        )
        self.is_sharded = config.train.shard and accelerator.num_processes > 1

    def batches(self, start: int) -> Iterable[Batch]:
        return train_loader(
            self.images.train,
            self.config.data,
            self.config.seed,
            start_step=start,
            total_steps=self.images.steps,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            weigh=self.images.weigh,
            patch_size=self.model.patch_size,
        )

    def prepare(self, batch: Batch) -> Inputs:
        """Normalises the images and draws their masks."""
        device, train = self.accelerator.device, self.images.train
        keys = image_keys(self.config.seed, batch.epoch, batch.sample_ids, purpose="mask")
        images = normalize(to_device(batch.images, device), train.mean, train.std)
        mask = self.model.draw_mask(
            images,
            keys,
            epoch=batch.epoch,
            sample_ids=batch.sample_ids,
            repeats=self.config.mask.repeats,
        )
        nothing = mask.num_masked == 0 and not self.config.mask.unmasked
        if nothing and self.config.model.target.loss_on == "masked":
            raise TrainingError(
                f"mask: no patch of the batch of step {batch.step} is hidden, so "
                "that its loss counts none; raise mask.ratio or set model.target.loss_on=all"
            )
        weight = None if batch.weight is None else to_device(batch.weight, device)
        return Inputs(images, mask, weight, batch.total_weight)

    def parts(self, inputs: Inputs, count: int) -> Iterator[tuple[Inputs, Tensor | float]]:
        factor: Tensor | float
        for cut in parts(inputs.images, count):
            images = inputs.images[cut]
            repeats = len(inputs.mask) // len(inputs.images)
            rows = slice(cut.start * repeats, cut.stop * repeats)
            mask = inputs.mask if count == 1 else inputs.mask[rows]
            weight, factor = None, len(images) / len(inputs.images)
            if inputs.weight is not None and inputs.total_weight is not None:
                weight = inputs.weight[cut]
                # Gradients, and the loss that is logged, are averaged over processes.
                factor = weight.sum() * (self.accelerator.num_processes / inputs.total_weight)
            yield Inputs(images, mask, weight, inputs.total_weight), factor

    def loss(self, learner: nn.Module, part: Inputs) -> Loss:
        with autocast(self.config.train.precision, self.accelerator.device):
            output = learner(part.images, part.mask, part.weight)
        # Of a sharded model FSDP lets through the two losses alone.
        terms: dict[str, Tensor] = getattr(output, "terms", {})
        named = {f"loss_{name}": term.detach().float() for name, term in terms.items()}
        named |= {name: value.float() for name, value in getattr(output, "metrics", {}).items()}
        return Loss(output.loss, {"loss": output.reconstruction.detach(), **named})

    def clipped(self, learner: nn.Module) -> Iterable[nn.Parameter]:
        """Leaves out a target's own parameters, which its own term of the loss trains alone."""
        apart = set(self.model.target.parameters())
        return (weight for weight in learner.parameters() if weight not in apart)

    def learner(self) -> nn.Module:
        """Wraps the model for the processes, or shards it in place."""
        return Sharded(self.model, self.accelerator) if self.is_sharded else super().learner()

    def after_step(self, batch: Batch, taken: Tensor) -> None:
        """Updates the teacher and the average."""
        self.model.update_teacher(taken, self.teacher_decay(batch.step))
        super().after_step(batch, taken)
        if self.average is not None and self.model.teacher is not None:
            average: Any = self.average  # the teacher is an average already
            average.teacher.load_state_dict(self.model.teacher.state_dict())

    def model_to_evaluate(self) -> nn.Module:
        """Returns the average, the model, or a copy in float32 of what is sharded or narrow."""
        if self.average is not None or (
            not self.is_sharded and self.config.train.weights == "fp32"
        ):
            return super().model_to_evaluate()
        copy = model_on(self.config, self.accelerator.device)
        copy.load_state_dict(gather_full(self.model.state_dict()))
        return copy

    def diverged(self, record: StepRecord, what: str, row: int) -> Exception:
        ids, run = record.sample_ids.tolist(), Path(self.config.output)
        shown = ", ".join(map(str, ids[:8])) + (" ..." if len(ids) > 8 else "")
        many = f" ({row} such steps in a row: train.max_nonfinite)" if row > 1 else ""
        return TrainingError(
            f"{what} at step {record.step + 1}{many}, learning rate {record.lr:.3g}, sample "
            f"ids {shown} (all in {run / RECORD}); the last good checkpoint is kept. Lower "
            f"optim.base_lr or set optim.clip_grad; `mim debug batch {run}` looks into the step"
        )


def pretrain(config: Config, alone: bool = False) -> dict[str, Any]:
    """Pre-trains one model and returns what ``result.json`` holds.

    Args:
        config: of the run.
        alone: whether it is no run of a comparison: it then says what it begins with, and may be
            extended, by a higher ``train.epochs`` than it began with.

    Raises:
        UserError: for a mistake in the config or the data, before any training.
        TrainingError: when the loss is no longer finite, a checkpoint cannot be saved, or the
            memory is too small.
        LostProcess: when another process of the run died, hangs or failed.
        Interrupted: after SIGINT, SIGTERM or SIGUSR1, with everything saved.
    """
    run = Path(config.output)
    accelerator = _accelerator(config)
    rank, world = accelerator.process_index, accelerator.num_processes
    with together(rank, world, config.train.timeout), contextlib.ExitStack() as stack:
        if config.data.source in FOLDERS and not (run / "config.yaml").is_file():
            keep_outside("output", run, config.data.path)
        checkpoint.prepare_folder(run)
        if rank == 0:  # the first process holds the folder for all
            stack.enter_context(sole_use(run))
        stack.enter_context(memory(config, world))
        stack.enter_context(deterministic(config.train.deterministic))
        return _pretrain(config, accelerator, alone)


def _pretrain(config: Config, accelerator: Accelerator, alone: bool) -> dict[str, Any]:
    run = Path(config.output)
    plugged = [HOOKS.get(name) for name in config.train.hooks]
    saved, passed_over, extended = _start_folder(config, alone)
    finished = checkpoint.read_result(run)
    if saved is not None and finished.get("status") == "finished" and not extended:
        accelerator.end_training()
        return finished
    if extended and accelerator.is_main_process:
        _extend(config, extended)
    config, images = _open_images(config, saved, accelerator)
    start = saved["step"] if saved else 0
    if accelerator.is_main_process:
        for folder in (run, run / "checkpoints", run / "pictures"):
            remove_leftovers(folder)
        for reason in passed_over:
            note(f"{reason}; resuming from step {start}")
    task, online, flops = _build_task(config, images, accelerator)
    if alone and accelerator.is_main_process:
        print(printable(_begins(task)), flush=True)
    held_out = HeldOut(config, images.val)
    hooks: list[Hook] = [Log(config.train.log_every, run.name), held_out]
    hooks += [online] if online is not None else []
    hooks += [Pictures(config, images.val), *(hook(config) for hook in plugged)]
    trainer = _build_trainer(task, hooks, saved, start)
    memory_before = resident_bytes()
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(accelerator.device)
    try:
        trainer.fit()
    except Interrupted:
        accelerator.end_training()
        raise
    result = _result(task, trainer, held_out.loss, memory_before) | flops | _origin(run)
    if online is not None:
        result["evaluations"] = {ONLINE: {"accuracy": online.val_accuracy}}
    weights = checkpoint.backbone_state(task.model_to_evaluate().state_dict())
    if accelerator.is_main_process:
        details = {"backbone": config.model.backbone, "source": images.train.name}
        checkpoint.save_encoder(run / "encoder.safetensors", weights, details)
        update_result(run, lambda _: result)
    accelerator.wait_for_everyone()
    accelerator.end_training()  # leaves the process group: nobody can wait after it
    return result


def _accelerator(config: Config) -> Accelerator:
    if config.train.precision == "fp16" and not torch.cuda.is_available():
        reason = "needs a GPU; choose bf16 or fp32"
        raise setting_error("train.precision", config.train.precision, reason)
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        # Accelerate shards only on GPUs, and by blocks that not every regime calls as a unit.
        reason = "is for mim to do: leave it out and set train.shard=true"
        raise UserError(f"accelerate launch --use_fsdp (ACCELERATE_USE_FSDP): {reason}")
    wanted = config.train.device
    device = settle(pick_device(wanted, "train.device"))
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    # A second run in one process may choose another precision or device.
    AcceleratorState._reset_state(reset_partial_state=alone)
    seconds = config.train.timeout
    try:
        with gathering("train.timeout", seconds):
            return Accelerator(
                # By itself Accelerate makes each process of torchrun without a GPU a run alone.
                cpu=device.type == "cpu" and (wanted != "auto" or "WORLD_SIZE" in os.environ),
                mixed_precision=_PRECISION[config.train.precision],
                log_with=tracker_names(config) or None,
                project_config=ProjectConfiguration(
                    config.output, logging_dir=f"{config.output}/logs"
                ),
                kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=seconds))],
            )
    except ValueError as error:
        raise refused_precision(config.train.precision, error) from error


def _start_folder(
    config: Config, alone: bool
) -> tuple[dict[str, Any] | None, list[str], dict[str, float] | None]:
    """Returns the checkpoint to resume from, what is wrong with newer ones, and how far it went.

    Each if any; the last is of a run that is extended.
    """
    run = Path(config.output)
    has_run = checkpoint.checkpoints(run) or (run / "result.json").is_file()
    if config.resume == "never" and has_run:
        reason = "already holds a run; choose another, or resume it with --resume auto"
        raise setting_error("output", str(run), reason)
    state, passed_over = checkpoint.newest_checkpoint(run)
    extended = None
    if state is not None:
        began = json.loads(state["fingerprint"])
        epochs = began.get("train.epochs", 0)
        if alone and state["step"] and 0 < epochs < config.train.epochs:
            extended = {"epochs": epochs, "step": state["step"]}
            began["train.epochs"] = config.train.epochs
        checkpoint.check_same_run(began, config, run)
    elif config.model.weights is not None:
        reason = (
            "is read by mim pretrain, mim compare and mim.pretrain, which begin the run with it"
        )
        raise setting_error("model.weights", config.model.weights, reason)
    return state, passed_over, extended


def _extend(config: Config, reached: dict[str, float]) -> None:
    """Makes a run a longer one, which ``result.json`` says from now on."""
    run = Path(config.output)

    def change(result: dict[str, Any]) -> dict[str, Any]:
        kept = [*result.get("extended", []), reached]
        return {"format": checkpoint.FORMAT, "status": UNFINISHED, "extended": kept}

    update_result(run, change)
    checkpoint.write_config(run, config)
    note(
        f"{run}: extended from {reached['epochs']} to {config.train.epochs} epochs; the learning "
        f"rate follows the longer schedule from step {reached['step']} on"
    )


def _origin(run: Path) -> dict[str, Any]:
    """Returns what a result says of how its run came about: from weights, or extended."""
    found: dict[str, Any] = {}
    if (run / "import.json").is_file():
        account = json.loads((run / "import.json").read_text(encoding="utf-8"))
        kept = ("sha256", "family", "decoder")
        found["started_from"] = {"file": Path(account["file"]).name}
        found["started_from"] |= {key: account[key] for key in kept}
    extended = read_result(run).get("extended")
    return {**found, "extended": extended} if extended else found


def _begins(task: PretrainTask) -> str:
    """Says what a run begins with, in a line."""
    config, images, device = task.config, task.images, task.accelerator.device
    count = task.accelerator.num_processes
    where = f"{count} processes ({device.type})" if count > 1 else f"{device}"
    whole, encoder = (
        sum(p.numel() for p in part.parameters()) / 1e6
        for part in (task.model, task.model.backbone)
    )
    unreadable = sum(len(s.ledger) for s in (images.train, images.val) if s.ledger)
    return (
        f"{config.output}: {config.model.backbone}, {encoder:.1f} M weights, and "
        f"{whole - encoder:.1f} M beside the encoder; {len(images.train):,} images to "
        f"train on, {len(images.val):,} held out, {unreadable} unreadable; "
        f"{images.steps:,} steps of {config.data.batch_size} images on {where}"
    )


def _open_images(
    config: Config, saved: dict[str, Any] | None, accelerator: Accelerator
) -> tuple[Config, RunImages]:
    """Opens the images and writes their fingerprint into the config.

    Raises:
        UserError: if the config, or the checkpoint, asks for others, or the batch does not divide.
    """
    run = Path(config.output)
    train = open_source(config.data, "train", run)
    val = open_source(replace(config.data, measured=train.measured), "val", run)
    present = f"{train.fingerprint()}-{val.fingerprint()}"
    earlier = None if saved is None else saved.get("data")
    if earlier is not None and not same_images(earlier, present):
        reason = "is over other images than those that are there now: their names, labels or "
        reason += "contents have changed"
        raise UserError(f"resume: the run in {config.output!r} {reason}")
    check_images(config.data.fingerprint, present, "; null takes these")
    config = replace(
        config, data=replace(config.data, fingerprint=present, measured=train.measured)
    )
    weigh = open_weights(train, config.data)
    least = accelerator.num_processes * config.train.accumulate
    if config.data.batch_size < least:
        needed = f"must be at least processes * train.accumulate = {least}"
        raise setting_error("data.batch_size", config.data.batch_size, needed)
    per_epoch = steps_per_epoch(train, config.data)
    steps = total_steps(config, per_epoch)
    return config, RunImages(train, val, present, weigh, per_epoch, steps)


def total_steps(config: Config, per_epoch: int) -> int:
    """Returns the steps of a run, given those of an epoch."""
    return int(min(config.train.epochs * per_epoch, config.train.max_steps or math.inf))


def _build_task(
    config: Config, images: RunImages, accelerator: Accelerator
) -> tuple[PretrainTask, OnlineProbe | None, dict[str, float]]:
    """Builds the task and the online probe, and measures what an image costs."""
    device = accelerator.device
    tune_process(device)
    model = model_on(config, device)
    if accelerator.is_main_process and is_emulated(config.train.precision, device):
        note("train.precision 'fp8' is emulated here: its numbers, in more time than bf16 takes")
    for source in (images.train, images.val):  # masks from a file may lack some images
        lacking = model.mask_generator.missing(model.grid, source.sample_ids)
        if len(lacking):
            reason = (
                f"has no mask for {len(lacking)} of {len(source)} images, the first of them "
                f"{source.describe(int(lacking[0]))}"
            )
            raise setting_error("mask.file.path", config.mask.file.path, reason)
    task = PretrainTask(model, images, config, accelerator)  # its average stays in float32
    online = None
    if config.online_probe.enabled:
        online = OnlineProbe(model, images.train, config, accelerator, images.val)
    flops = measure_flops(model, config, images.val)
    narrow_weights(model, config.train)  # after what stays in float32 has been made of them
    if config.train.compile:
        model.compile()
    return task, online, flops


def _build_trainer(
    task: PretrainTask, hooks: list[Hook], saved: dict[str, Any] | None, start: int
) -> Trainer:
    """Builds the trainer, in the state of a checkpoint if there is one."""
    config, images, accelerator = task.config, task.images, task.accelerator
    train, run = config.train, Path(config.output)
    schedule = build_schedule(config.optim, config.data.batch_size, images.steps, images.per_epoch)
    decay = config.optim.decay_schedule.build(
        config.optim.weight_decay, images.steps, images.per_epoch
    )
    identity = {
        "fingerprint": json.dumps(checkpoint.fingerprint(config)),
        "data": images.fingerprint,
    }
    store = checkpoint.RunStore(run, train.keep_checkpoints, identity)
    saver = checkpoint.Saver(store, train.async_save)
    every = (train.checkpoint_every, train.milestone_every)
    learner = task.learner()  # before the optimizer: sharding makes other parameters
    trainer = Trainer(
        task,
        Plan(
            seed=config.seed,
            steps=images.steps,
            steps_per_epoch=images.per_epoch,
            batch_size=config.data.batch_size,
            accumulate=train.accumulate,
            clip_grad=config.optim.clip_grad,
            read_every=train.log_every,
            grad_norm=config.log.grad_norm,
            max_nonfinite=1 if train.on_nonfinite == "stop" else train.max_nonfinite,
            spike_deviations=train.spike_deviations,
            folder=run,
        ),
        build_optimizer(config.optim, task.model, schedule(start)),
        schedule,
        learner,
        [*hooks, Checkpoints(saver, *every, schedule.cools_from)],
        Curves(None, start_trackers(accelerator, config, start)),
        store,
        accelerator.scaler,
        decay if config.optim.decay_schedule.moves else None,
    )
    if saved is not None:
        trainer.load_state_dict(checkpoint.upgraded(saved, config.data.batch_size))
    if accelerator.is_main_process:
        trainer.curves.metrics = Metrics(run / "metrics.jsonl", start)
        if saved is None:
            checkpoint.write_config(run, config)
            if config.data.subset.chooses:
                for name, source in zip(SUBSETS, (images.train, images.val), strict=True):
                    write_list(run / name, source)
    return trainer


def _result(
    task: PretrainTask, trainer: Trainer, val_loss: float, memory_before: int
) -> dict[str, Any]:
    """Returns what ``result.json`` says of a finished run, before its evaluations."""
    config, images, state = task.config, task.images, trainer.state
    device, sources = trainer.accelerator.device, (images.train, images.val)
    peak = resident_bytes() - memory_before
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    return {
        "format": checkpoint.FORMAT,
        "kind": "run",
        "name": Path(config.output).name,
        "status": "finished",
        "seed": config.seed,
        "steps": images.steps,
        "epochs": images.steps / images.per_epoch,
        "train_loss": state.train_loss,
        "val_loss": val_loss,
        "skipped_steps": trainer.watch.total,
        "images_per_second": state.images / max(state.train_seconds, 1e-9),
        "peak_memory_bytes": peak,
        "wall_seconds": state.elapsed,
        "environment": environment(device, trainer.accelerator.num_processes, config.plugins),
        "data": {
            "source": images.train.name,
            "train_images": len(images.train),
            "val_images": len(images.val),
            "fingerprint": images.fingerprint,
            "unreadable": {s.ledger.split: len(s.ledger) for s in sources if s.ledger},
        },
        "config": to_dict(config),
    }


def measure_flops(model: MaskedImageModel, config: Config, val: ImageSource) -> dict[str, float]:
    """Measures operations and encoder tokens an image, under masks of held-out images.

    Where the ratio is drawn or changes, they are means over several epochs, and over more images:
    a batch is as long as its longest row.
    """
    count, epochs = 2, [-1]
    if len({*itertools.chain(*(config.mask.ratio_at(e) for e in range(config.train.epochs)))}) > 1:
        count = min(16, config.data.batch_size)
        epochs = sorted({round((config.train.epochs - 1) * part / 4) for part in range(5)})
    images, sample_ids = read_images(model, config, val, list(range(min(count, len(val)))))
    rows = []
    for epoch in epochs:
        mask = fixed_masks(model, images, sample_ids, epoch)
        visible, patches = float(mask.num_visible), None
        if mask.valid is not None:  # padding does not count
            visible = float(mask.is_visible.sum()) / len(mask)
            patches = float(mask.valid.sum()) / len(mask)
        tokens = model.regime.encoder_tokens(model.backbone, visible, patches)
        tokens *= config.mask.repeats
        flops = count_flops(model, images, sample_ids, epoch, config.mask.repeats)
        rows.append((*flops, tokens))
    forward, backward, tokens = (sum(column) / len(rows) for column in zip(*rows, strict=True))
    return {
        "flops_forward": round(forward),
        "flops_backward": round(backward),
        "encoder_tokens": tokens,
    }
