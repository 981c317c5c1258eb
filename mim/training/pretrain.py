"""The training loop."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import signal
import time
from collections.abc import Iterator, Sized
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from mim.core.config import Config
from mim.core.cpu.allocator import keep_freed_memory
from mim.core.errors import TrainingError, UserError, setting_error
from mim.core.files import remove_leftovers
from mim.core.keys import image_keys, seed_of
from mim.core.lock import sole_use
from mim.core.progress import RunProgress, note
from mim.core.settings import to_dict
from mim.core.signals import Interrupted, Signals
from mim.data import (
    ImageSource,
    eval_loader,
    normalize,
    open_source,
    open_weights,
    steps_per_epoch,
    train_loader,
    worker_deaths,
    write_list,
)
from mim.model import MaskedImageModel
from mim.model.teacher import follow
from mim.training import checkpoint
from mim.training.metrics import Metrics
from mim.training.nonfinite import Guard, Taken, Watch, strict
from mim.training.online import OnlineProbe
from mim.training.optim import build_optimizer, build_schedule
from mim.training.pictures import (
    fixed_masks,
    reconstruct,
    reconstruct_ratios,
    save_arrays,
    save_reconstructions,
    spread_indices,
)
from mim.training.runtime.cost import count_flops, environment, resident_bytes
from mim.training.runtime.machine import deterministic, memory, refused_precision
from mim.training.runtime.precision import is_emulated, model_on, narrow_weights
from mim.training.runtime.processes import gathering, together
from mim.training.runtime.sharding import Sharded, load_model, load_optimizer, whole
from mim.training.runtime.trackers import start_trackers, tracker_names

PICTURED_IMAGES = 8
ONLINE = "linear_online"
"""How results call the probe that learns during pre-training, among the evaluations."""
_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16", "fp8": "bf16"}


def parts(batch: Sized, count: int) -> Iterator[slice]:
    """Slices that cut a batch into ``count`` nearly equal parts."""
    edges = [round(i * len(batch) / count) for i in range(count + 1)]
    yield from (slice(a, b) for a, b in itertools.pairwise(edges))


@torch.no_grad()
def held_out_loss(
    model: MaskedImageModel, config: Config, source: ImageSource, accelerator: Accelerator
) -> float:
    """The mean loss over the held-out images, each under its one fixed mask, not augmented."""
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    total = torch.zeros(2, dtype=torch.float64, device=device)
    training = model.training
    model.eval()
    size = max(1, config.data.batch_size // world // config.train.accumulate)
    for batch in eval_loader(
        source,
        config.data,
        batch_size=size,
        rank=rank,
        world=world,
        patch_size=model.patch_size,
    ):
        images = normalize(batch.images.to(device), source.mean, source.std)
        mask = fixed_masks(model, images, batch.sample_ids)
        with accelerator.autocast():
            losses = model(images, mask).loss_per_image
        total += torch.stack([losses.double().sum(), losses.new_tensor(len(losses)).double()])
    model.train(training)
    loss, count = accelerator.reduce(total, "sum").tolist()
    return loss / count


def _start_folder(config: Config) -> tuple[dict[str, Any] | None, list[str]]:
    """Look at the run folder.

    Returns:
        The checkpoint to go on from, if there is one, and what is wrong with newer ones.
    """
    run = Path(config.output)
    found = checkpoint.checkpoints(run)
    if config.resume == "never" and (found or (run / "result.json").is_file()):
        reason = "already holds a run; choose another, or resume it with --resume auto"
        raise setting_error("output", str(run), reason)
    state, passed_over = checkpoint.newest_checkpoint(run)
    if state is not None:
        checkpoint.check_same_run(json.loads(state["fingerprint"]), config, run)
    return state, passed_over


def _hold_to(config: Config, seen: str, saved: dict[str, Any] | None) -> Config:
    """The config with the fingerprint of its images.

    Raises:
        UserError: if it, or the checkpoint, asks for other images.
    """
    wanted = config.data.fingerprint
    if saved is not None and saved.get("data") not in (None, seen):
        reason = "is over other images than those that are there now: names or labels have changed"
        raise UserError(f"resume: the run in {config.output!r} {reason}")
    if wanted not in (None, seen):
        reason = f"asks for other images than there are, which have {seen}; null takes these"
        raise setting_error("data.fingerprint", wanted, reason)
    return replace(config, data=replace(config.data, fingerprint=seen))


def _accelerator(config: Config) -> Accelerator:
    if config.train.precision == "fp16" and not torch.cuda.is_available():
        reason = "needs a GPU; choose bf16 or fp32"
        raise setting_error("train.precision", config.train.precision, reason)
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        # Accelerate shards on GPUs alone, by blocks that not every regime calls as a whole.
        reason = "is for mim to do: leave it out and set train.shard=true"
        raise UserError(f"accelerate launch --use_fsdp (ACCELERATE_USE_FSDP): {reason}")
    AcceleratorState._reset_state()  # a second run in one process may choose another precision
    seconds = config.train.timeout
    folder = ProjectConfiguration(config.output, logging_dir=f"{config.output}/logs")
    try:
        with gathering("train.timeout", seconds):
            return Accelerator(
                mixed_precision=_PRECISION[config.train.precision],
                log_with=tracker_names(config) or None,
                project_config=folder,
                kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=seconds))],
            )
    except ValueError as error:
        raise refused_precision(config.train.precision, error) from error


def pretrain(config: Config) -> dict[str, Any]:
    """Pre-train one model; returns what ``result.json`` holds.

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
        checkpoint.prepare_folder(run)
        if rank == 0:  # the first process holds the folder for all
            stack.enter_context(sole_use(run))
        stack.enter_context(memory(config, world))
        stack.enter_context(deterministic(config.train.deterministic))
        return _pretrain(config, accelerator)


def _pretrain(config: Config, accelerator: Accelerator) -> dict[str, Any]:
    """Shapes: B images of this process's share of the batch, C channels, H x W pixels."""
    run = Path(config.output)
    saved, passed_over = _start_folder(config)
    done = checkpoint.read_result(run)
    if saved is not None and done.get("status") == "finished":
        accelerator.end_training()
        return done
    train, val = open_source(config.data, "train", run), open_source(config.data, "val", run)
    seen = f"{train.fingerprint()}-{val.fingerprint()}"
    config = _hold_to(config, seen, saved)
    weigh = open_weights(train, config.data)
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    main = accelerator.is_main_process
    share = config.data.batch_size // (world * config.train.accumulate)
    if share < 1:
        needed = (
            f"must be at least processes * train.accumulate = {world * config.train.accumulate}"
        )
        raise setting_error("data.batch_size", config.data.batch_size, needed)
    per_epoch = steps_per_epoch(train, config.data)
    total = min(config.train.epochs * per_epoch, config.train.max_steps or math.inf)
    total = int(total)
    start = saved["step"] if saved else 0
    if main:
        for folder in (run, run / "checkpoints"):
            remove_leftovers(folder)
        for reason in passed_over:
            note(f"{reason}; going on from step {start}")

    if device.type == "cpu":
        keep_freed_memory()
    model = model_on(config, device)
    if main and is_emulated(config.train.precision, device):
        note("train.precision 'fp8' is emulated here: its numbers, in more time than bf16 takes")
    for source in (train, val):
        _check_masks(model, config, source)
    schedule = build_schedule(config.optim, config.data.batch_size, total, per_epoch)
    ema = ModelEmaV3(model, decay=config.train.ema_decay) if config.train.ema_decay else None
    online = None
    if config.online_probe.enabled:
        online = OnlineProbe(model, train, config, accelerator)
    flops = _measure_flops(model, config, val, device)
    narrow_weights(model, config.train)  # after what stays in float32 has been made of them
    optimizer = build_optimizer(config.optim, model, schedule(start))
    if config.train.compile:
        model.compile()
    shards = config.train.shard and world > 1
    if shards:
        wrapped: nn.Module = Sharded(model, accelerator)
        optimizer = build_optimizer(config.optim, model, schedule(start))
        optimizer = accelerator.prepare_optimizer(optimizer)
    else:
        wrapped, optimizer = accelerator.prepare(model, optimizer)
    watch = Watch(config, accelerator, model, (saved or {}).get("watch"))
    guard = Guard(watch.limit, watch.in_a_row, device)
    pending: list[Tensor] = []  # for each step since the last line (2,): loss, Guard's flag
    elapsed, train_seconds, total_images = 0.0, 0.0, 0
    mean, val_loss, online_accuracy = math.nan, math.nan, math.nan
    if saved:
        load_model(model, saved["model"])
        load_optimizer(optimizer, saved["optimizer"])
        if ema is not None:
            ema.module.load_state_dict(saved["ema"])
        if accelerator.scaler is not None and saved["scaler"]:
            accelerator.scaler.load_state_dict(saved["scaler"])
        if online is not None:
            online.load(saved["online"])
            online_accuracy = saved["online_accuracy"]
        pending = list(_with_flags(saved["pending"]).to(device))
        elapsed, train_seconds = saved["elapsed"], saved["train_seconds"]
        total_images = saved.get("images", start * config.data.batch_size)
        mean, val_loss = saved["train_loss"], saved["val_loss"]
    trackers = start_trackers(accelerator, config, start)
    metrics = Metrics(run / "metrics.jsonl", start) if main else None
    if main and saved is None:
        checkpoint.write_config(run, config)
        if config.data.subset.chooses:
            write_list(run / "subset_train.txt", train)
            write_list(run / "subset_val.txt", val)

    saver = checkpoint.Saver(run, config.train.keep_checkpoints, config.train.async_save)

    def measured() -> MaskedImageModel:
        """What is evaluated; all processes ask for it."""
        if ema is not None:
            return ema.module
        if not shards and config.train.weights == "fp32":
            return model
        copy = model_on(config, device)
        copy.load_state_dict(whole(model.state_dict()))
        return copy

    def log(step: int, **values: float) -> None:
        line = {"step": step, "epoch": step / per_epoch, **values}
        if metrics is not None:
            metrics.write(**line)
        trackers.log(values, step)

    def save(step: int, milestone: bool) -> None:
        probed = {} if online is None else online.state()  # all processes add up what they saw
        weights, moments = whole(model.state_dict()), whole(optimizer.state_dict())
        if not main:
            return
        state = {
            "fingerprint": json.dumps(checkpoint.fingerprint(config)),
            "data": seen,
            "model": weights,
            "optimizer": moments,
            "ema": ema.module.state_dict() if ema is not None else {},
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler else {},
            "online": probed,
            "online_accuracy": None if online is None else online_accuracy,
            "pending": torch.stack(pending).cpu() if pending else torch.zeros(0, 2),
            "watch": watch.state(),
            "elapsed": elapsed + time.monotonic() - began,
            "train_seconds": train_seconds + paused - interval_began,
            "images": total_images + interval_images,
            "train_loss": mean,
            "val_loss": val_loss,
        }
        assert metrics is not None
        metrics.flush()
        saver.save(state, step, milestone)

    def draw(step: int) -> None:
        subject = measured()
        if main:
            arrays = reconstruct(subject, config, val, spread_indices(len(val), PICTURED_IMAGES))
            path = save_reconstructions(run, arrays, f"step_{step:08d}")
            trackers.picture(path, step)

    def draw_ratios() -> None:
        subject = measured()
        if main:
            indices = spread_indices(len(val), PICTURED_IMAGES)
            arrays = reconstruct_ratios(subject, config, val, indices)
            if arrays:
                save_arrays(run / "reconstructions_ratios.npz", arrays)

    def due(every: float, step: int) -> bool:
        """Whether a multiple of ``every`` epochs was passed by this step."""
        if every <= 0:
            return False
        return math.floor(step / per_epoch / every) > math.floor((step - 1) / per_epoch / every)

    began = interval_began = time.monotonic()
    memory_before = resident_bytes()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    interval_images, rate, paused = 0, 0.0, began
    label = run.name
    batches = train_loader(
        train,
        config.data,
        config.seed,
        start_step=start,
        total_steps=total,
        rank=rank,
        world=world,
        weigh=weigh,
        patch_size=model.patch_size,
    )
    unread: list[Taken] = []
    wrapped.train()
    progressing, writing = (
        RunProgress(label, total, start, main),
        metrics or contextlib.nullcontext(),
    )
    with trackers, progressing as progress, Signals() as signals, worker_deaths(), saver, writing:
        for batch in batches:
            step, lr = batch.step, schedule(batch.step)
            torch.manual_seed(seed_of(config.seed, "step", step, rank))  # for dropout alone
            for group in optimizer.param_groups:
                group["lr"] = lr
            keys = image_keys(config.seed, batch.epoch, batch.sample_ids, purpose="mask")
            images = normalize(batch.images.to(device, non_blocking=True), train.mean, train.std)
            mask = model.draw_mask(images, keys, epoch=batch.epoch, sample_ids=batch.sample_ids)
            if mask.num_masked == 0 and config.model.target.loss_on == "masked":
                raise TrainingError(
                    f"mask: no patch of the batch of step {step} is hidden, so "
                    "that its loss counts none; raise mask.ratio or set model.target.loss_on=all"
                )
            weight = None if batch.weight is None else batch.weight.to(device)
            step_loss = torch.zeros((), device=device)
            cuts = list(parts(batch, config.train.accumulate))
            for number, cut in enumerate(cuts):
                last = number == len(cuts) - 1
                with contextlib.nullcontext() if last else accelerator.no_sync(wrapped):
                    part_mask = mask if len(cuts) == 1 else mask[cut]
                    part_weight = None if weight is None else weight[cut]
                    share = share_of(len(batch), cut, part_weight, batch.total_weight, world)
                    output = wrapped(images[cut], part_mask, part_weight)
                    accelerator.backward(output.loss * share * strict(output.loss))
                step_loss += output.reconstruction.detach() * share
            if config.optim.clip_grad is not None:
                accelerator.clip_grad_norm_(wrapped.parameters(), config.optim.clip_grad)
            flag = guard.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
            taken = (flag == 0).float()
            model.update_teacher(taken)
            if ema is not None:
                follow(ema.module, model, (1 - ema.decay) * taken)
                if model.teacher is not None:  # an average already: targets come from itself
                    ema.module.teacher.load_state_dict(model.teacher.state_dict())
            if online is not None:
                assert batch.labels is not None
                online.step(images, batch.labels)
            pending.append(torch.stack([step_loss, flag]))
            unread.append(Taken(step, batch.epoch, lr, batch.sample_ids))
            counted = batch.total_counted
            interval_images += config.data.batch_size if counted is None else counted
            step += 1

            end = step == total
            milestone = due(config.train.milestone_every, step)
            saving = due(config.train.checkpoint_every, step) or milestone or end
            logging = step % config.train.log_every == 0 or end
            # Reading a loss waits for the device: on a GPU only where it is needed anyway.
            reading = logging or saving or device.type == "cpu"
            caught = _caught(signals, accelerator, reading)
            if reading or caught:
                read = accelerator.reduce(torch.stack(pending), "mean").tolist()
                watch.look(unread, read[-len(unread) :])
                latest = unread[-1]
                unread.clear()
            if saving or caught:
                watch.check_weights(latest)
            if logging:
                seconds = time.monotonic() - interval_began
                train_seconds += seconds
                rate = interval_images / seconds
                total_images += interval_images
                losses = [loss for loss, flag in read if flag == 0]
                means = {"loss": sum(losses) / len(losses)} if losses else {}
                mean = means.get("loss", mean)
                pending.clear()
                counted_steps = watch.counts()
                probed = {} if online is None else online.take()
                log(step, **means, lr=lr, images_per_second=rate, **counted_steps, **probed)
                progress.update(step, mean, rate)
                interval_began, interval_images = time.monotonic(), 0
            paused = time.monotonic()
            if due(config.train.validate_every, step) or end:
                val_loss = held_out_loss(measured(), config, val, accelerator)
                log(step, val_loss=val_loss)
                if online is not None:
                    online_accuracy = online.accuracy(val)
                    log(step, online_val_accuracy=online_accuracy)
            if due(config.train.picture_every, step) or end:
                draw(step)
            if end:
                draw_ratios()
            if saving or caught:
                save(step, milestone)
                if caught or end:
                    saver.wait()
                accelerator.wait_for_everyone()
            saver.check()
            if metrics is not None:
                metrics.check()
            interval_began += time.monotonic() - paused  # measuring and saving is not training
            if caught and not end:
                accelerator.end_training()
                raise Interrupted(
                    caught, f"saved step {step} of {str(run)!r}; go on with --resume auto"
                )

    result = {
        "format": checkpoint.FORMAT,
        "kind": "run",
        "name": run.name,
        "status": "finished",
        "seed": config.seed,
        "steps": total,
        "epochs": total / per_epoch,
        "train_loss": mean,
        "val_loss": val_loss,
        "skipped_steps": watch.total,
        **flops,
        "images_per_second": total_images / max(train_seconds, 1e-9),
        "peak_memory_bytes": (
            torch.cuda.max_memory_allocated(device)
            if device.type == "cuda"
            else resident_bytes() - memory_before
        ),
        "wall_seconds": elapsed + time.monotonic() - began,
        "environment": environment(device, world),
        "data": {
            "source": train.name,
            "train_images": len(train),
            "val_images": len(val),
            "fingerprint": seen,
            "unreadable": {
                source.ledger.split: len(source.ledger) for source in (train, val) if source.ledger
            },
        },
        "config": to_dict(config),
    }
    if online is not None:
        result["evaluations"] = {ONLINE: {"accuracy": online_accuracy}}
    state = measured().state_dict()
    if main:
        details = {"backbone": config.model.backbone, "source": train.name}
        weights = checkpoint.backbone_state(state)
        checkpoint.save_encoder(run / "encoder.safetensors", weights, details)
        checkpoint.write_json_atomic(run / "result.json", result)
    accelerator.wait_for_everyone()
    accelerator.end_training()  # leaves the process group: nobody can wait after it
    return result


def _with_flags(pending: Tensor) -> Tensor:
    """(n, 2) of a checkpoint; (n,) losses of steps that were taken in one of an older version."""
    if pending.dim() == 2:
        return pending
    return torch.stack([pending, torch.zeros_like(pending)], dim=1)


def share_of(
    count: int, cut: slice, weight: Tensor | None, total_weight: float | None, world: int
) -> Tensor | float:
    """The factor that turns a part's mean loss into its share of the loss of all processes.

    Gradients are averaged over processes, and so is the loss that is logged.

    Args:
        count: images of this process.
        cut: which of them are the part.
        weight: of the part's images; None where all count alike.
        total_weight: of all images of all processes.
        world: count of processes.
    """
    if weight is None or total_weight is None:
        return (cut.stop - cut.start) / count
    return weight.sum() * (world / total_weight)


def _check_masks(model: MaskedImageModel, config: Config, source: ImageSource) -> None:
    """Refuse masks from files that some images lack, before any training."""
    lacking = model.mask_generator.missing(model.grid, source.sample_ids)
    if not len(lacking):
        return
    first = source.describe(int(lacking[0]))
    reason = f"has no mask for {len(lacking)} of {len(source)} images, the first of them {first}"
    raise setting_error("mask.file.path", config.mask.file.path, reason)


def _measure_flops(
    model: MaskedImageModel, config: Config, val: ImageSource, device: torch.device
) -> dict[str, float]:
    """Cost an image and tokens in the encoder, under masks of held-out images.

    Where the ratio is drawn or moves, they are means over several epochs, and over more images:
    a batch is as long as its longest row.
    """
    moves = len({*itertools.chain(*(config.mask.ratio_at(e) for e in range(config.train.epochs)))})
    images_at_once = 2 if moves == 1 else min(16, config.data.batch_size)
    epochs = [-1]
    if moves > 1:
        last = config.train.epochs - 1
        epochs = sorted({round(last * part / 4) for part in range(5)})
    indices = list(range(min(images_at_once, len(val))))
    (batch,) = eval_loader(
        val,
        config.data,
        batch_size=len(indices),
        indices=indices,
        patch_size=model.patch_size,
    )
    images = normalize(batch.images.to(device), val.mean, val.std)
    found = []
    for epoch in epochs:
        mask = fixed_masks(model, images, batch.sample_ids, epoch)
        visible, patches = float(mask.num_visible), None
        if mask.valid is not None:  # padding is no work that counts
            visible = float(mask.is_visible.sum()) / len(mask)
            patches = float(mask.valid.sum()) / len(mask)
        tokens = model.regime.encoder_tokens(model.backbone, visible, patches)
        found.append((*count_flops(model, images, batch.sample_ids, epoch), tokens))
    forward, backward, tokens = (sum(column) / len(found) for column in zip(*found, strict=True))
    forward, backward = round(forward), round(backward)
    return {"flops_forward": forward, "flops_backward": backward, "encoder_tokens": tokens}


def _caught(signals: Signals, accelerator: Accelerator, reading: bool) -> int | None:
    """The signal on which to stop after this step.

    Several processes must stop at the same step, or they wait for each other for ever: they ask
    each other, in the steps that wait for the device anyway.
    """
    if accelerator.num_processes == 1:
        return signals.caught
    if not reading:
        return None
    flag = torch.tensor(float(signals.caught is not None), device=accelerator.device)
    if accelerator.reduce(flag, "sum").item() == 0:
        return None
    return signals.caught or signal.SIGTERM
