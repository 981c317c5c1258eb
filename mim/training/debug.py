"""One step of a run once more, in the weights before it: what is not finite, and where first."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mim.core.config import Config
from mim.core.errors import UserError, setting_error
from mim.core.patches import Patches
from mim.core.rng import image_keys, seed_of
from mim.data import Batch, normalize, open_source, open_weights, steps_per_epoch, train_loader
from mim.masks import PatchMask
from mim.model import MaskedImageModel
from mim.training import checkpoint
from mim.training.nonfinite import RECORD, WEIGHTS, strict
from mim.training.pictures import Pixels, masked_pixels
from mim.training.pretrain import parts, share_of
from mim.training.runtime.machine import pick_device
from mim.training.runtime.precision import autocast, model_on, narrow_weights

SHOWN_IMAGES = 12


@dataclass(frozen=True)
class Seen:
    """Values of a tensor, or of all that a module put out in this step.

    Attributes:
        kind: images, output, gradient of output, parameter or gradient.
        name: of the module or parameter.
        shape: of the first, as text.
        bad: values that are not finite.
        count: values in all.
        low: the least that is finite; NaN where none is.
        high: the greatest.
    """

    kind: str
    name: str
    shape: str
    bad: int
    count: int
    low: float
    high: float

    def joined(self, other: Seen) -> Seen:
        """Both together."""
        lows = [x for x in (self.low, other.low) if not math.isnan(x)]
        highs = [x for x in (self.high, other.high) if not math.isnan(x)]
        return dataclasses.replace(
            self,
            bad=self.bad + other.bad,
            count=self.count + other.count,
            low=min(lows, default=math.nan),
            high=max(highs, default=math.nan),
        )


def _seen(kind: str, name: str, tensor: Tensor) -> Seen:
    values = tensor.detach().float()
    finite = values[values.isfinite()]
    low, high = (finite.min(), finite.max()) if len(finite) else (math.nan, math.nan)
    shape = "x".join(map(str, tensor.shape)) or "1"
    bad = values.numel() - finite.numel()
    return Seen(kind, name, shape, bad, values.numel(), float(low), float(high))


class _Recorder:
    """What modules put out in the forward pass and get back in the backward pass, in order."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: dict[tuple[str, str], Seen] = {}
        self.first: Seen | None = None
        for name, module in model.named_modules():
            if name and next(module.children(), None) is None:
                module.register_forward_hook(self._hook(name))

    def add(self, kind: str, name: str, tensor: Tensor) -> None:
        found = _seen(kind, name, tensor)
        if found.bad and self.first is None:
            self.first = found
        before = self.seen.get((kind, name))
        self.seen[kind, name] = found if before is None else before.joined(found)

    def _hook(self, name: str) -> Callable[..., None]:
        def look(module: nn.Module, given: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or not output.is_floating_point():
                return
            self.add("output", name, output)
            if output.requires_grad:
                output.register_hook(lambda grad: self.add("gradient of output", name, grad))

        return look


@dataclass(frozen=True, eq=False)
class Debugged:
    """What :func:`debug_batch` found.

    Attributes:
        step: counted from 1, as in metrics and messages.
        weights: in which weights the step was computed, in words.
        exact: whether these are the weights that the step had.
        loss: as training counts it.
        bad_images: (sample id, name) of images whose loss is not finite.
        images: how many there are.
        first: the first tensor that is not finite, or None.
        seen: every tensor.
        original: (H, W, C) uint8 each, those with the highest loss, not finite ones first.
        masked: the same under their masks.
        titles: of each.
    """

    step: int
    weights: str
    exact: bool
    loss: float
    bad_images: list[tuple[int, str]]
    images: int
    first: Seen | None
    seen: list[Seen]
    original: list[Pixels]
    masked: list[Pixels]
    titles: list[str]

    def lines(self) -> list[str]:
        """The findings in words."""
        how = "" if self.exact else ", not those that the step had"
        found = [f"step {self.step} in {self.weights}{how}: loss {self.loss:.6g}"]
        named = ", ".join(f"{i} ({name})" for i, name in self.bad_images[:8])
        more = " ..." if len(self.bad_images) > 8 else ""
        count = f"{len(self.bad_images)} of {self.images} images have a loss that is not finite"
        found.append(f"{count}: {named}{more}" if named else count)
        if self.first is None:
            found.append("every tensor is finite")
        else:
            found.append(
                f"first tensor that is not finite: {self.first.kind} {self.first.name}, "
                f"{self.first.bad} of {self.first.count} values"
            )
        return found

    def rows(self) -> list[list[str]]:
        """A row a tensor: what, name, shape, values not finite, least and greatest finite one."""
        return [
            [s.kind, s.name, s.shape, f"{s.bad}", f"{s.low:.4g}", f"{s.high:.4g}"]
            for s in self.seen
        ]

    def as_json(self) -> dict[str, Any]:
        """The findings for a file; what is not finite stands as text."""

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


def debug_batch(run: str | Path, step: int | None = None, device: str | None = None) -> Debugged:
    """Computes a training step of a run again, and looks at every tensor.

    Images, augmentation, masks and dropout are those of the step, whatever the number of
    processes was. The weights are those that the run kept of a step that was not finite; of any
    other step those of the newest checkpoint before it.

    Args:
        run: its folder.
        step: counted from 1; None takes the newest step that was not finite.
        device: where to compute; by default what there is.

    Raises:
        UserError: if there is no such step, or the images are no longer those.
    """
    run = Path(run)
    config, record = checkpoint.read_config(run), _record(run)
    if step is None and not record:
        raise UserError(f"{str(run)!r} has no {RECORD}: no step was not finite; name one by --step")
    step = record["step"] if step is None else step
    record = record if record.get("step") == step else {}
    source = open_source(config.data, "train")
    per_epoch = steps_per_epoch(source, config.data)
    total = int(min(config.train.epochs * per_epoch, config.train.max_steps or math.inf))
    if not 1 <= step <= total:
        raise setting_error("--step", step, f"is not one of 1 to {total}")
    place = torch.device(pick_device(device))
    model = model_on(config, place)
    narrow_weights(model, config.train)
    state, words, exact = _weights(run, step, record)
    if state:
        model.load_state_dict(state)
    (batch,) = train_loader(
        source,
        config.data,
        config.seed,
        start_step=step - 1,
        total_steps=step,
        weigh=open_weights(source, config.data),
        patch_size=model.patch_size,
    )
    ids = batch.sample_ids.tolist()
    if record and record["sample_ids"] != ids:
        differing = sum(a != b for a, b in zip(ids, record["sample_ids"], strict=False))
        raise UserError(
            f"{str(run)!r}: {max(differing, 1)} of the {len(ids)} images of step {step} are no "
            f"longer those in {RECORD}: the images have changed"
        )
    images = normalize(batch.images.to(place), source.mean, source.std)
    keys = image_keys(config.seed, batch.epoch, batch.sample_ids, purpose="mask")
    mask = model.draw_mask(images, keys, epoch=batch.epoch, sample_ids=batch.sample_ids)
    processes = int(record.get("processes", 1))
    recorder, losses, loss = _compute(model, config, batch, images, mask, processes)
    seen = [_seen("images", "images", images.values if isinstance(images, Patches) else images)]
    seen += recorder.seen.values()
    for name, parameter in model.named_parameters():
        seen.append(_seen("parameter", name, parameter))
        if parameter.grad is not None:
            seen.append(_seen("gradient", name, parameter.grad))
    bad = [i for i, value in enumerate(losses.tolist()) if not math.isfinite(value)]
    names = {int(i): place for place, i in enumerate(source.sample_ids.tolist())} if bad else {}
    worst = losses.nan_to_num(nan=math.inf, posinf=math.inf, neginf=math.inf)
    shown = worst.argsort(descending=True, stable=True)[:SHOWN_IMAGES].sort().values
    tiles = []
    for row in shown.tolist():
        one = slice(row, row + 1)
        tiles.append(masked_pixels(model, images[one], mask[one], source))
    return Debugged(
        step=step,
        weights=words,
        exact=exact,
        loss=loss,
        bad_images=[(ids[i], source.describe(names[ids[i]])) for i in bad],
        images=len(ids),
        first=recorder.first,
        seen=seen,
        original=[original[0] for original, _ in tiles],
        masked=[masked[0] for _, masked in tiles],
        titles=[f"{ids[i]}\nloss {losses[i]:.4g}" for i in shown.tolist()],
    )


def _compute(
    model: MaskedImageModel,
    config: Config,
    batch: Batch,
    images: Any,
    mask: PatchMask,
    processes: int,
) -> tuple[_Recorder, Tensor, float]:
    """Forward and backward of all processes' parts, one after the other.

    Returns:
        What was seen, the loss of each image, and the loss that training counts. Gradients are
        left on the model.
    """
    device = next(model.parameters()).device
    model.train()
    recorder = _Recorder(model)
    losses: list[Tensor] = []
    total = torch.zeros((), device=device)
    weight = None if batch.weight is None else batch.weight.to(device)
    size = len(batch) // processes
    for rank in range(processes):
        torch.manual_seed(seed_of(config.seed, "step", batch.step, rank))  # as in training
        begin = rank * size
        for cut in parts(range(size), config.train.accumulate):
            place = slice(begin + cut.start, begin + cut.stop)
            part_weight = None if weight is None else weight[place]
            share = share_of(size, cut, part_weight, batch.total_weight, processes)
            with autocast(config.train.precision, device):
                output = model(images[place], mask[place], part_weight)
            recorder.add("loss of each image", "loss", output.loss_per_image)
            (output.loss * share * strict(output.loss) / processes).backward()
            total += output.reconstruction.detach() * share / processes
            losses.append(output.loss_per_image.detach().float().cpu())
    return recorder, torch.cat(losses), float(total)
