"""Batches: step -> images, as a pure function.

A batch is computed from its step alone: the step gives the epoch, the keyed order of the epoch
gives the images, and their keys give the augmentation. Hence batches do not depend on workers,
processes or where a run was resumed, and skipping to a step costs nothing.

Shapes: B images, C channels, H x W pixels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from mim.core.config import DataConfig
from mim.core.cpu.process import tune_process
from mim.core.errors import UserError, WorkerError, setting_error
from mim.core.patches import Grid, Images, Patches
from mim.core.rng import image_keys
from mim.data.images.own_sizes import cat_images, eval_patches, same_scale, train_patches
from mim.data.images.transforms import Picture, dtype_of, eval_transform, train_transform
from mim.data.sources.base import ImageSource
from mim.data.sources.reading import read_images
from mim.data.storage.cache import device_reader
from mim.data.unreadable import Fault
from mim.data.weights import Weigh, batch_weights

Augment: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Images (B, C, H, W) uint8 and their keys (B,) -> images; must pickle."""

# Photographs are decoded in parts, so that memory never holds a large batch at full size.
_DECODED_AT_ONCE = 64
_KEPT_BYTES = 1 << 28
_SIGNAL_SECONDS = 1.0  # within which torch tells of a worker that died


@dataclass
class Batch:
    """Images of one step."""

    images: Any
    """(B, C, H, W) uint8, or float32 from 0 to 1 where an image has more than 8 bits;
    :class:`mim.core.patches.Patches` where images keep their own sizes."""
    labels: Tensor | None
    """(B,) int64, or None where the source has none."""
    sample_ids: Tensor
    """(B,) int64, from which masks get their keys."""
    epoch: int
    """The pass over the images; -1 in evaluations."""
    step: int
    """The step of training, or the number of the batch in an evaluation."""
    faults: tuple[Fault, ...] = ()
    """Images that could not be read."""
    weight: Tensor | None = None
    """(B,) float32, how much each image counts; None where all count alike."""
    total_weight: float | None = None
    """Sum of the weights over all processes."""
    total_counted: int | None = None
    """Images with a weight above 0, over all processes."""

    def __len__(self) -> int:
        return len(self.images)

    def __getstate__(self) -> dict[str, Any]:
        """Give numpy arrays in the place of small tensors: each would go through a file of its own,
        which takes longer than sending its few numbers."""
        return {
            name: value.numpy()
            if name != "images" and isinstance(value, Tensor) and value.device.type == "cpu"
            else value
            for name, value in self.__dict__.items()
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, torch.from_numpy(value) if isinstance(value, np.ndarray) else value)

    def _moved(self, move: Callable[[Any], Any]) -> Batch:
        values: dict[str, Any] = {
            field.name: move(value) if isinstance(value, (Tensor, Patches)) else value
            for field in fields(self)
            if (value := getattr(self, field.name)) is not None
        }
        return replace(self, **values)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on ``device``."""
        return self._moved(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; torch's DataLoader calls this."""
        return self._moved(lambda value: value.pin_memory())


@dataclass
class _Failure:
    """A user's mistake met in a worker: DataLoader would bury it in a traceback."""

    message: str

    def pin_memory(self) -> _Failure:
        return self


class StepBatches(Dataset[Any]):
    """Maps a number to its batch; a mistake of the user becomes a :class:`_Failure`."""

    def __init__(
        self,
        source: ImageSource,
        config: DataConfig,
        augment: Augment | None = None,
        patch_size: Grid | None = None,
    ) -> None:
        if config.keeps_aspect and patch_size is None:
            raise ValueError("data.aspect=keep cuts patches: pass patch_size")
        self.source = source
        self.config = config
        self.augment = augment
        self.patch_size = patch_size
        # Images of sizes of their own are cut one by one.
        self.reader = device_reader(source, config) if not config.keeps_aspect else None

    def __getitem__(self, number: int) -> Batch | _Failure:
        try:
            return self.batch(number)
        except UserError as error:
            return _Failure(str(error))

    def batch(self, number: int) -> Batch:
        raise NotImplementedError

    def gather(
        self,
        indices: Tensor,
        *,
        seed: int | None,
        epoch: int,
        step: int,
        stand_in: bool = True,
    ) -> Batch:
        """Read the images at positions (B,) and cut them.

        Without a seed they are cut as evaluations see them. An unreadable image is replaced by
        another, or with ``stand_in=False`` left out.
        """
        parts, positions, faults = [], [], []
        room: Tensor | None = None
        filled = 0
        for part in indices.split(_DECODED_AT_ONCE):
            images: list[Picture] = []
            if self.reader is None or not self.reader.can_read(part):
                images, part, missing = read_images(self.source, part, replace=stand_in)
                faults += missing
            positions.append(part)
            keys = None
            if seed is not None:
                keys = image_keys(seed, epoch, self.source.sample_ids[part], purpose="augment")
            room = self._room(len(indices), images, room, filled)
            out = None if room is None else room[filled : filled + len(part)]
            filled += len(part)
            parts.append(self._cut(images, part, keys, out))
        found = torch.cat(positions)
        labels = self.source.labels
        return Batch(
            images=cat_images(parts) if room is None else room[:filled],
            labels=None if labels is None else labels[found],
            sample_ids=self.source.sample_ids[found],
            epoch=epoch,
            step=step,
            faults=tuple(faults),
        )

    def _room(
        self, count: int, images: Sequence[Picture], room: Tensor | None, filled: int
    ) -> Tensor | None:
        """(count, C, H, W) for a batch, or None where its images are not cut one by one.

        A loader process takes shared memory, so that nothing is copied on the way to the run.

        Args:
            count: images of the batch.
            images: the next ones, whose bits decide the type.
            room: of the images before them; it becomes float32 where these have more bits.
            filled: how many there are in it.
        """
        if self.config.keeps_aspect or self.reader is not None or self.augment is not None:
            return None
        dtype = dtype_of(images)
        if room is not None and room.dtype.itemsize >= dtype.itemsize:
            return room
        shape = (count, self.config.channels, *self.config.size)
        if get_worker_info() is None:
            found = torch.empty(shape, dtype=dtype)
        else:
            size = math.prod(shape) * dtype.itemsize
            shared = torch.UntypedStorage._new_shared(size)  # as in torch's own collate
            found = torch.empty(0, dtype=dtype).set_(shared).reshape(shape)
        if room is not None:
            found[:filled] = same_scale(room[:filled], dtype)
        return found

    def _cut(
        self, images: list[Picture], indices: Tensor, keys: Tensor | None, out: Tensor | None
    ) -> Images:
        """The model's images at positions, as evaluations see them without keys.

        Where ``out`` is given, they are written there.
        """
        if self.config.keeps_aspect:
            assert self.patch_size is not None
            names = [self.source.describe(index) for index in indices.tolist()]
            if keys is None:
                return eval_patches(images, self.config, self.patch_size, names)
            return train_patches(images, keys, self.config, self.patch_size, names)
        if keys is None:
            if self.reader is not None:
                return self.reader.eval(indices, self.config)
            return eval_transform(images, self.config, out)
        if self.reader is not None:
            cut = self.reader.train(indices, keys, self.config)
        else:
            cut = train_transform(images, keys, self.config, out)
        return cut if self.augment is None else self.augment(cut, keys)


class _TrainBatches(StepBatches):
    def __init__(
        self,
        source: ImageSource,
        config: DataConfig,
        seed: int,
        rank: int,
        world: int,
        augment: Augment | None,
        weigh: Weigh | None = None,
        patch_size: Grid | None = None,
    ) -> None:
        super().__init__(source, config, augment, patch_size)
        self.weigh = weigh
        self.seed = seed
        self.per_epoch = steps_per_epoch(source, config)
        self.share = config.batch_size // world
        self.offset = rank * self.share
        self._order: tuple[int, Tensor] | None = None  # the epoch last asked for, and its order

    def batch(self, number: int) -> Batch:
        epoch, position = divmod(number, self.per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self.source.order(self.seed, epoch)
        start = position * self.config.batch_size
        everywhere = self._order[1][start : start + self.config.batch_size]
        mine = slice(self.offset, self.offset + self.share)
        indices = everywhere[mine]  # (B,)
        batch = self.gather(indices, seed=self.seed, epoch=epoch, step=number)
        if self.weigh is None:
            return batch
        given = self.config.weights
        weights = batch_weights(self.weigh, self.source, everywhere, epoch, number, given)
        own = weights[mine].clone()
        for row in (batch.sample_ids != self.source.sample_ids[indices]).nonzero()[:, 0]:
            # A replaced image counts as the one that it replaces, unless its own weight is 0.
            place = (self.source.sample_ids == batch.sample_ids[row]).nonzero()[:, 0]
            own[row] *= bool(self.weigh(self.source, place, epoch)[0] > 0)
        return replace(
            batch,
            weight=own.float(),
            total_weight=float(weights.sum()),
            total_counted=int((weights > 0).sum()),
        )


class _EvalBatches(StepBatches):
    def __init__(
        self,
        source: ImageSource,
        config: DataConfig,
        indices: Tensor,
        batch_size: int,
        stand_in: bool,
        patch_size: Grid | None = None,
    ) -> None:
        super().__init__(source, config, patch_size=patch_size)
        self.stand_in = stand_in
        self.parts = indices.split(batch_size) if len(indices) else ()

    def batch(self, number: int) -> Batch:
        part = self.parts[number]
        return self.gather(part, seed=None, epoch=-1, step=number, stand_in=self.stand_in)


def _keep_freed_memory(worker: int) -> None:
    """Let a loader process reuse the memory of one image for the next."""
    tune_process(kept=_KEPT_BYTES)


def _identity(batch: Any) -> Any:
    """Collate nothing: the data set already gives batches."""
    return batch


@contextmanager
def worker_deaths(workers: Callable[[], Sequence[Any]] = tuple) -> Iterator[None]:
    """Report in one line that a loader process was killed.

    torch raises this from a signal handler, hence anywhere in the loop over the batches; where
    that is a finalizer, Python ignores it, and all that is seen is a torn pipe. ``workers``
    returns the processes, of which a dead one tells the same.

    Raises:
        WorkerError: in place of torch's RuntimeError.
    """
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        found: BaseException = error
        if not isinstance(error, RuntimeError):  # a torn pipe is seen before the signal
            try:
                time.sleep(_SIGNAL_SECONDS)
            except RuntimeError as signalled:
                found = signalled
        what = " ".join(str(found).split())
        if "DataLoader worker" not in what:
            dead = [str(worker.pid) for worker in workers() if not worker.is_alive()]
            if not dead:
                raise
            what = f"DataLoader worker (pid {', '.join(dead)}) exited unexpectedly."
        raise WorkerError(
            f"{what} Too little memory is the usual cause: lower data.workers or data.batch_size. "
            "What was saved is kept; go on with --resume auto"
        ) from error


class BatchLoader:
    """Iterates over the batches of ``steps``; may be iterated more than once.

    Unreadable images are recorded in the source's ledger, which ends the run at too many of them. A
    user's mistake that a worker process meets raises :class:`UserError` here; a worker that was
    killed raises :class:`WorkerError`.
    """

    def __init__(
        self,
        batches: StepBatches,
        steps: range,
        *,
        workers: int,
    ) -> None:
        self.steps = steps
        self._ledger = batches.source.ledger
        # Batches that are made on the accelerator are not sent through processes.
        resident = batches.reader is not None
        workers = 0 if resident else min(workers, len(steps))
        self._loader: DataLoader[Any] = DataLoader(
            batches,
            batch_size=None,
            sampler=steps,
            num_workers=workers,
            collate_fn=_identity,
            pin_memory=torch.cuda.is_available() and not resident,
            persistent_workers=workers > 0,
            worker_init_fn=_keep_freed_memory,
            # Without its own, DataLoader draws a number from the global generator.
            generator=torch.Generator().manual_seed(0),
        )

    def __len__(self) -> int:
        return len(self.steps)

    def _workers(self) -> Sequence[Any]:
        return getattr(self._loader._iterator, "_workers", ())

    def __iter__(self) -> Iterator[Batch]:
        with worker_deaths(self._workers):
            for batch in self._loader:
                if isinstance(batch, _Failure):
                    raise UserError(batch.message)
                if batch.faults and self._ledger is not None:
                    self._ledger.add(batch.faults)
                if len(batch):  # an evaluation may have left out all of it
                    yield batch


def steps_per_epoch(source: ImageSource, config: DataConfig) -> int:
    """Full batches in one pass over the images; an incomplete last one is dropped.

    Raises:
        UserError: if there are fewer images than one batch has.
    """
    if source.epoch_size < config.batch_size:
        reason = f"is more than the {source.epoch_size} training images of {source.name}"
        raise setting_error("data.batch_size", config.batch_size, reason)
    return source.epoch_size // config.batch_size


def _check_rank(rank: int, world: int) -> None:
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is not one of the {world} processes")


def train_loader(
    source: ImageSource,
    config: DataConfig,
    seed: int,
    *,
    start_step: int,
    total_steps: int,
    rank: int = 0,
    world: int = 1,
    augment: Augment | None = None,
    weigh: Weigh | None = None,
    patch_size: Grid | None = None,
) -> BatchLoader:
    """This process's part of the training batches of steps ``start_step`` to ``total_steps``.

    Step s belongs to epoch ``s // steps_per_epoch``. A process takes a contiguous part of the
    global batch, so the parts of all ranks, one after the other, are the batch of one process.

    Args:
        config: batch_size is global; workers are for each process.
        seed: the run's seed; order and augmentation follow from it.
        start_step: the first step to give; earlier ones are not read.
        total_steps: the step to stop before.
        augment: follows the crop and the mirror; what it draws must follow from the keys.
        weigh: how much each image counts, from :func:`mim.data.open_weights`.
        patch_size: (height, width) of a patch in pixels; needed where images keep their aspect.

    Raises:
        UserError: if the batch is larger than the data set or does not divide among processes.
    """
    _check_rank(rank, world)
    if config.batch_size % world:
        reason = f"does not divide among {world} processes"
        raise setting_error("data.batch_size", config.batch_size, reason)
    batches = _TrainBatches(source, config, seed, rank, world, augment, weigh, patch_size)
    steps = range(start_step, max(start_step, total_steps))
    return BatchLoader(batches, steps, workers=config.workers)


def eval_loader(
    source: ImageSource,
    config: DataConfig,
    batch_size: int | None = None,
    rank: int = 0,
    world: int = 1,
    indices: Sequence[int] | Tensor | None = None,
    *,
    patch_size: Grid | None = None,
) -> BatchLoader:
    """Every image once, in order, under the evaluation transform.

    A process takes a contiguous part: the parts of all ranks, one after the other, are the images
    in order. Parts differ by one image at most, and no image is dropped or repeated, except that an
    unreadable one is left out. Where ``indices`` choose images to show, another replaces it.

    Args:
        config: batch_size is a default.
        batch_size: images a batch of one process; by default this process's part of
            ``data.batch_size``.
        indices: positions in the source, in their order; by default all.
        patch_size: (height, width) of a patch in pixels; needed where images keep their aspect.
    """
    _check_rank(rank, world)
    chosen = torch.as_tensor(range(len(source)) if indices is None else indices).long()
    part = chosen.tensor_split(world)[rank]
    size = max(1, config.batch_size // world) if batch_size is None else batch_size
    batches = _EvalBatches(source, config, part, size, indices is not None, patch_size)
    steps = range(len(batches.parts))
    return BatchLoader(batches, steps, workers=config.workers)
