"""Compute one step of a run again, in the weights before it: which tensor is not finite first."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mim.core.errors import UserError, setting_error
from mim.core.patches import Patches
from mim.core.rng import seed_of
from mim.data import Batch, open_source, open_weights, steps_per_epoch
from mim.training import checkpoint
from mim.training.nonfinite import RECORD, WEIGHTS, strict
from mim.training.pictures import Pixels, masked_pixels
from mim.training.pretrain import Inputs, PretrainTask, RunImages, total_steps
from mim.training.runtime.machine import pick_device
from mim.training.runtime.precision import model_on, narrow_weights

SHOWN_IMAGES = 12


@dataclass(frozen=True)
class TensorSummary:
    """The values of a tensor, or of everything that a module put out in this step."""

    kind: str
    """images, output, gradient of output, parameter or gradient."""
    name: str
    shape: str
    bad: int
    """Number of values that are not finite."""
    count: int
    low: float
    """The least finite value; NaN if there is none."""
    high: float

    def joined(self, other: TensorSummary) -> TensorSummary:
        """Summarises both together."""
        return dataclasses.replace(
            self,
            bad=self.bad + other.bad,
            count=self.count + other.count,
            low=float(np.fmin(self.low, other.low)),  # NaN only where both are
            high=float(np.fmax(self.high, other.high)),
        )


def _summary(kind: str, name: str, tensor: Tensor) -> TensorSummary:
    values = tensor.detach().float()
    finite = values[values.isfinite()]
    low, high = (finite.min(), finite.max()) if len(finite) else (math.nan, math.nan)
    shape = "x".join(map(str, tensor.shape)) or "1"
    bad = values.numel() - finite.numel()
    return TensorSummary(kind, name, shape, bad, values.numel(), float(low), float(high))


class _Recorder:
    """Records what modules put out in the forward pass and get back in the backward pass."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors: dict[tuple[str, str], TensorSummary] = {}
        self.first: TensorSummary | None = None
        self.losses: list[Tensor] = []
        for name, module in model.named_modules():
            if name and next(module.children(), None) is None:
                module.register_forward_hook(self._record_output(name))
        model.register_forward_hook(self._record_losses)

    def add(self, kind: str, name: str, tensor: Tensor) -> None:
        summary = _summary(kind, name, tensor)
        if summary.bad and self.first is None:
            self.first = summary
        earlier = self.tensors.get((kind, name))
        self.tensors[kind, name] = summary if earlier is None else earlier.joined(summary)

    def _record_output(self, name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or not output.is_floating_point():
                return
            self.add("output", name, output)
            if output.requires_grad:
                output.register_hook(lambda grad: self.add("gradient of output", name, grad))

        return record

    def _record_losses(self, module: nn.Module, args: Any, output: Any) -> None:
        self.add("loss of each image", "loss", output.loss_per_image)
        self.losses.append(output.loss_per_image.detach().float().cpu())


@dataclass(frozen=True, eq=False)
class DebuggedStep:
    """What :func:`debug_batch` found."""

    step: int
    """Counted from 1, as in metrics and messages."""
    weights: str
    """The weights in which the step was computed, in words."""
    exact: bool
    """Whether the step had these weights."""
    loss: float
    bad_images: list[tuple[int, str]]
    """(sample id, name) of images whose loss is not finite."""
    images: int
    """Number of images of the step."""
    first: TensorSummary | None
    """The first tensor that is not finite."""
    seen: list[TensorSummary]
    original: list[Pixels]
    """(H, W, C) uint8 each: the images with the highest loss."""
    masked: list[Pixels]
    titles: list[str]

    def lines(self) -> list[str]:
        """Returns the findings in words."""
        how = "" if self.exact else ", not those that the step had"
        count = f"{len(self.bad_images)} of {self.images} images have a loss that is not finite"
        named = ", ".join(f"{i} ({name})" for i, name in self.bad_images[:8])
        more = " ..." if len(self.bad_images) > 8 else ""
        first = "every tensor is finite"
        if self.first is not None:
            first = (
                f"first tensor that is not finite: {self.first.kind} {self.first.name}, "
                f"{self.first.bad} of {self.first.count} values"
            )
        return [
            f"step {self.step} in {self.weights}{how}: loss {self.loss:.6g}",
            f"{count}: {named}{more}" if named else count,
            first,
        ]

    def rows(self) -> list[list[str]]:
        """Returns a row a tensor: kind, name, shape, values not finite, least, greatest."""
        return [
            [s.kind, s.name, s.shape, f"{s.bad}", f"{s.low:.4g}", f"{s.high:.4g}"]
            for s in self.seen
        ]

    def as_json(self) -> dict[str, Any]:
        """Returns the findings for a file; numbers that are not finite become text."""

        def plain(value: Any) -> Any:
            return str(value) if isinstance(value, float) and not math.isfinite(value) else value

        tensors = [{k: plain(v) for k, v in dataclasses.asdict(s).items()} for s in self.seen]
        return {
            "step": self.step,
            "weights": self.weights,
            "exact": self.exact,
            "loss": plain(self.loss),
            "bad_images": [{"sample_id": i, "name": name} for i, name in self.bad_images],
            "first": None if self.first is None else f"{self.first.kind} {self.first.name}",
            "tensors": tensors,
        }


def _record(run: Path) -> dict[str, Any]:
    """``nonfinite.json``; empty where there is none."""
    path = run / RECORD
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {**record, "step": int(record["step"]), "sample_ids": list(record["sample_ids"])}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{str(path)!r} cannot be read: {error}") from error


def _weights(run: Path, step: int, record: dict[str, Any]) -> tuple[dict[str, Any], str, bool]:
    """The weights before a step (counted from 1), or the newest older ones there are."""
    if record.get("weights") == WEIGHTS:
        return checkpoint.read_checkpoint(run / WEIGHTS)["model"], f"the weights of {WEIGHTS}", True
    for path in reversed(checkpoint.checkpoints(run)):
        state = checkpoint.read_checkpoint(path)
        if state["step"] < step:
            words = f"the weights of checkpoint {path.name}"
            return state["model"], words, state["step"] == step - 1
    return {}, "the weights of the start", step == 1


@dataclass
class _Processes:
    """Stands in for Accelerate: this process takes the part of each process of the run in turn."""

    device: torch.device
    num_processes: int
    process_index: int = 0


def debug_batch(
    run: str | Path, step: int | None = None, device: str | None = None
) -> DebuggedStep:
    """Computes a training step of a run again and summarises every tensor.

    Images, augmentation, masks and dropout are those of the step, for any number of processes.
    The weights are those that the run saved before a non-finite step. For any other step they
    are those of the newest checkpoint before it.

    Args:
        run: its folder.
        step: counted from 1; None takes the newest step that was not finite.
        device: where to compute; None takes a GPU where there is one.

    Raises:
        UserError: if there is no such step, or the images have changed.
    """
    run = Path(run)
    config, record = checkpoint.read_config(run), _record(run)
    if step is None and not record:
        raise UserError(f"{str(run)!r} has no {RECORD}: no step was not finite; name one by --step")
    step = record["step"] if step is None else step
    record = record if record.get("step") == step else {}
    source = open_source(config.data, "train")
    per_epoch = steps_per_epoch(source, config.data)
    total = total_steps(config, per_epoch)
    if not 1 <= step <= total:
        raise setting_error("--step", step, f"is not one of 1 to {total}")
    processes = _Processes(torch.device(pick_device(device)), int(record.get("processes", 1)))
    model = model_on(config, processes.device)
    narrow_weights(model, config.train)
    weights, described, exact = _weights(run, step, record)
    if weights:
        model.load_state_dict(weights)
    # The batches end with this step.
    images = RunImages(source, source, "", open_weights(source, config.data), per_epoch, step)
    task = PretrainTask(model, images, config, cast(Accelerator, processes))
    batches: list[Batch] = []
    for rank in range(processes.num_processes):
        processes.process_index = rank
        batches += task.batches(step - 1)
    ids = torch.cat([batch.sample_ids for batch in batches]).tolist()
    if record and record["sample_ids"] != ids:
        differing = sum(a != b for a, b in zip(ids, record["sample_ids"], strict=False))
        raise UserError(
            f"{str(run)!r}: {max(differing, 1)} of the {len(ids)} images of step {step} are no "
            f"longer those in {RECORD}: the images have changed"
        )
    recorder, inputs, loss = _compute(task, batches)
    summaries = list(recorder.tensors.values())
    for name, parameter in model.named_parameters():
        summaries.append(_summary("parameter", name, parameter))
        if parameter.grad is not None:
            summaries.append(_summary("gradient", name, parameter.grad))
    losses = torch.cat(recorder.losses)
    bad = [i for i, value in enumerate(losses.tolist()) if not math.isfinite(value)]
    indices = {sample: index for index, sample in enumerate(source.sample_ids.tolist())}
    worst = losses.nan_to_num(nan=math.inf, posinf=math.inf, neginf=math.inf)
    shown = worst.argsort(descending=True, stable=True)[:SHOWN_IMAGES].sort().values.tolist()
    tiles = []
    for position in shown:
        rank, row = divmod(position, len(batches[0]))
        image, first = inputs[rank].images[row : row + 1], row * config.mask.repeats
        mask = inputs[rank].mask[first : first + 1]
        tiles.append(masked_pixels(model, image, mask, source))
    return DebuggedStep(
        step=step,
        weights=described,
        exact=exact,
        loss=loss,
        bad_images=[(ids[i], source.describe(indices[ids[i]])) for i in bad],
        images=len(ids),
        first=recorder.first,
        seen=summaries,
        original=[original[0] for original, _ in tiles],
        masked=[masked[0] for _, masked in tiles],
        titles=[f"{ids[i]}\nloss {losses[i]:.4g}" for i in shown],
    )


def _compute(task: PretrainTask, batches: list[Batch]) -> tuple[_Recorder, list[Inputs], float]:
    """Runs forward and backward as training does, one process's share after another.

    Returns:
        What was recorded, the inputs of each process, and the loss that training counts.
        Gradients are left on the model.
    """
    config, world = task.config, len(batches)
    task.model.train()
    recorder = _Recorder(task.model)
    inputs = []
    total = torch.zeros((), device=task.accelerator.device)
    for rank, batch in enumerate(batches):
        torch.manual_seed(seed_of(config.seed, "step", batch.step, rank))
        share = task.prepare(batch)
        values = share.images.values if isinstance(share.images, Patches) else share.images
        recorder.add("images", "images", values)
        for part, weight in task.parts(share, config.train.accumulate):
            loss = task.loss(task.model, part)
            (loss.objective * weight * strict(loss.objective) / world).backward()
            total += loss.reported["loss"] * weight / world
        inputs.append(share)
    return recorder, inputs, float(total)
