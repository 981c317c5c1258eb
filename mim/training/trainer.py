"""The one training loop: a task says what is learnt, hooks say what happens now and then.

Pre-training, fine-tuning, trained probes, segmentation and detection all run through
:meth:`Trainer.fit`. Start reading there.

What a step computes follows from its number alone: the batch, the learning rate and the seed of
dropout. Hence a checkpoint is weights, moments and counters, and no state of a generator.
"""

from __future__ import annotations

import copy
import itertools
import math
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from mim.core.rng import seed_of
from mim.core.schedule import Schedule
from mim.core.signals import Interrupted, Signals
from mim.data import Batch, worker_deaths
from mim.model.teacher import ema_update
from mim.training.checkpoint import FileStore, RunStore
from mim.training.metrics import Curves
from mim.training.nonfinite import Guard, StepRecord, Watch, strict
from mim.training.runtime.sharding import gather_full, load_model, load_optimizer


class Loss(NamedTuple):
    """The loss of a part of a batch."""

    objective: Tensor
    """Scalar that is minimised: a mean over the part."""
    reported: dict[str, Tensor]
    """Named scalars without a gradient, for the curves; the first is ``loss``."""


class Task(ABC):
    """What is trained, and on what.

    Args:
        model: is trained and saved.
        accelerator: its processes share the batches.
        decay: of an average of the weights, which is evaluated instead of them; 0 keeps none.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator, decay: float = 0.0) -> None:
        self.model, self.accelerator, self.decay = model, accelerator, decay
        self.average: nn.Module | None = None
        if decay:
            self.average = copy.deepcopy(model).requires_grad_(False).eval()

    @abstractmethod
    def batches(self, start: int) -> Iterable[Batch]:
        """Yields this process's shares of the batches from step ``start`` to the end."""

    @abstractmethod
    def prepare(self, batch: Batch) -> Any:
        """Brings a batch to the device and draws masks, mixes images, or adds boxes."""

    @abstractmethod
    def parts(self, inputs: Any, count: int) -> Iterable[tuple[Any, Tensor | float]]:
        """Cuts inputs into ``count`` parts, each with the weight of its loss in the batch's."""

    @abstractmethod
    def loss(self, learner: nn.Module, part: Any) -> Loss:
        """Computes the loss of a part through ``learner``."""

    @abstractmethod
    def diverged(self, record: StepRecord, what: str, row: int) -> Exception:
        """Builds the error that ends the run after ``row`` non-finite steps in succession."""

    def clipped(self, learner: nn.Module) -> Iterable[nn.Parameter]:
        """Returns the parameters whose gradients have their norm limited."""
        return learner.parameters()

    def learner(self) -> nn.Module:
        """Wraps the model for the processes."""
        wrapped: nn.Module = self.accelerator.prepare_model(self.model)
        return wrapped

    def after_step(self, batch: Batch, taken: Tensor) -> None:
        """Updates averages of the weights; ``taken`` is 0 if the step changed nothing."""
        if self.average is not None:
            ema_update(self.average, self.model, (1 - self.decay) * taken)

    def model_to_evaluate(self) -> nn.Module:
        """Returns the model with its full weights; all processes call it together."""
        return self.model if self.average is None else self.average


class Hook:
    """Acts after some of the steps; a subclass overrides what it needs."""

    name: ClassVar[str] = ""
    """Names its state in a checkpoint."""
    kept: ClassVar[tuple[str, ...]] = ()
    """Attributes that are its state."""
    at_stop: ClassVar[bool] = False
    """Whether it also runs when a signal ends the training."""

    def running(self, trainer: Trainer) -> AbstractContextManager[Any]:
        """Returns the context in which the whole training runs."""
        return nullcontext()

    def after_step(self, trainer: Trainer, batch: Batch, inputs: Any) -> None:
        """Acts after every step; must not wait for the device."""

    def due(self, trainer: Trainer) -> bool:
        """Tells whether to call :meth:`run` after the current step."""
        return False

    def run(self, trainer: Trainer) -> None:
        """Acts; the losses of all steps have been read."""

    def metrics(self, trainer: Trainer) -> dict[str, float]:
        """Returns its numbers for a line of the curves; all processes call it together."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Returns its state for a checkpoint; all processes call it together."""
        return {name: getattr(self, name) for name in self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state of a checkpoint."""
        for name in self.kept:
            setattr(self, name, state[name])


@dataclass(frozen=True)
class Plan:
    """How long a training lasts, and how its steps are taken."""

    seed: int
    """Of dropout."""
    steps: int
    steps_per_epoch: int
    batch_size: int
    """Images a step, over all processes."""
    accumulate: int = 1
    """Parts into which a process cuts its share of a batch."""
    clip_grad: float | None = None
    """Largest norm of the gradient."""
    read_every: int = 20
    """Steps between two reads of the losses on a GPU; a CPU reads them after every step."""
    grad_norm: bool = False
    """Whether to report the norm of the gradient."""
    max_nonfinite: int = 1
    """Consecutive non-finite steps that end the training; 0 guards nothing."""
    spike_deviations: float = 0.0
    """See :class:`mim.training.nonfinite.Spikes`."""
    folder: Path | None = None
    """Where non-finite steps are recorded."""


@dataclass
class TrainState:
    """How far a training is."""

    step: int = 0
    """Steps done."""
    images: int = 0
    """Images seen in them."""
    elapsed: float = 0.0
    """Seconds of training and hooks, over all resumes."""
    train_seconds: float = 0.0
    """Those without the hooks."""
    train_loss: float = math.nan
    """Mean in the last line of the curves."""
    means: dict[str, float] = field(default_factory=dict)
    """Means of everything reported, likewise."""
    rows: list[dict[str, float]] = field(default_factory=list)
    """What each step since that line reported, and its ``flag``."""
    unread: list[tuple[StepRecord, Tensor]] = field(default_factory=list)
    """Steps whose losses are still on the device."""
    latest: StepRecord | None = None
    """The newest step that was read."""
    _since: float = 0.0

    def start(self) -> None:
        """Starts the clocks."""
        self._since = time.monotonic()

    def tick(self, training: bool) -> None:
        """Counts the time since the last tick, as training or as hooks."""
        now = time.monotonic()
        self.elapsed += now - self._since
        self.train_seconds += (now - self._since) * training
        self._since = now

    def state_dict(self) -> dict[str, Any]:
        """Returns plain values; every step must have been read."""
        assert not self.unread
        names = ("images", "elapsed", "train_seconds", "train_loss", "means", "rows")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        """Restores the state after ``step``."""
        self.step = step
        for name, value in state.items():
            setattr(self, name, value)


def parts(batch: Sized, count: int) -> Iterator[slice]:
    """Yields slices that cut a batch into ``count`` nearly equal parts."""
    edges = [round(i * len(batch) / count) for i in range(count + 1)]
    yield from (slice(a, b) for a, b in itertools.pairwise(edges))


class Trainer:
    """Trains a task.

    Args:
        task: what is trained.
        plan: how long, in what steps.
        optimizer: its groups may have an ``lr_scale``.
        schedule: learning rate of each step.
        learner: of the task.
        hooks: run in the order of their list.
        curves: where numbers go.
        store: where checkpoints go; without one, signals are not caught.
        scaler: of the gradients in fp16.
        decay: weight decay of each step, where it moves; groups then have a ``decay_scale``.
    """

    def __init__(
        self,
        task: Task,
        plan: Plan,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        learner: nn.Module,
        hooks: Sequence[Hook],
        curves: Curves,
        store: RunStore | FileStore | None = None,
        scaler: torch.amp.GradScaler | None = None,
        decay: Schedule | None = None,
    ) -> None:
        self.task, self.plan, self.accelerator = task, plan, task.accelerator
        self.optimizer, self.schedule, self.scaler = optimizer, schedule, scaler
        self.decay = decay
        self.learner, self.hooks, self.curves, self.store = learner, list(hooks), curves, store
        self.guard = Guard(plan.max_nonfinite, 0, self.accelerator.device)
        self.watch = Watch(
            task.model,
            self.accelerator,
            plan.max_nonfinite,
            task.diverged,
            plan.spike_deviations,
            plan.folder,
            plan.seed,
        )
        self.state = TrainState()
        self.stopped: int | None = None

    def fit(self) -> TrainState:
        """Trains to the end.

        Raises:
            Interrupted: after a signal, with everything saved; not after the last step.
        """
        self.state.start()
        with self.supervised():
            self.learner.train()
            for batch in self.task.batches(self.state.step):
                self.train_step(batch)
                self.after_step()
                if self.stopped and not self.done:
                    raise self.interrupted()
        return self.state

    def train_step(self, batch: Batch) -> None:
        """Takes one step; never waits for the device."""
        lr = self.schedule(batch.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
            if self.decay is not None:
                group["weight_decay"] = self.decay(batch.step) * group["decay_scale"]
        torch.manual_seed(seed_of(self.plan.seed, "step", batch.step, self.rank))  # for dropout
        inputs = self.task.prepare(batch)
        reported = self._gradients(inputs)
        if self.plan.clip_grad is not None or self.plan.grad_norm:
            norm = self._clip_gradients()
            reported |= {"grad_norm": norm} if self.plan.grad_norm else {}
        flag = self.guard.step(self.optimizer, self.scaler)
        self.optimizer.zero_grad(set_to_none=True)
        self.task.after_step(batch, (flag == 0).float())
        for hook in self.hooks:
            hook.after_step(self, batch, inputs)
        record = StepRecord(batch.step, batch.epoch, lr, batch.sample_ids, tuple(reported))
        self.state.unread.append((record, torch.stack([*reported.values(), flag])))
        counted = batch.total_counted
        self.state.images += self.plan.batch_size if counted is None else counted
        self.state.step = batch.step + 1

    def _gradients(self, inputs: Any) -> dict[str, Tensor]:
        """Computes the gradients of a batch, part by part; returns what the losses report."""
        reported: dict[str, Tensor] = {}
        cut = list(self.task.parts(inputs, self.plan.accumulate))
        for number, (part, weight) in enumerate(cut, start=1):
            is_last = number == len(cut)
            with nullcontext() if is_last else self.accelerator.no_sync(self.learner):
                loss = self.task.loss(self.learner, part)
                objective = loss.objective * weight
                if self.guard.limit:
                    objective = objective * strict(objective)
                (objective if self.scaler is None else self.scaler.scale(objective)).backward()
            for name, value in loss.reported.items():
                reported[name] = value * weight + reported.get(name, 0.0)
        return reported

    def _clip_gradients(self) -> Tensor:
        """Clips the gradients and returns the norm that they had."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        limit = math.inf if self.plan.clip_grad is None else self.plan.clip_grad
        norm: Tensor = gather_full(clip_grad_norm_(self.task.clipped(self.learner), limit))
        return norm.float()

    def after_step(self) -> None:
        """Reads the losses where that is needed or free, and runs the hooks that are due."""
        due = [hook for hook in self.hooks if hook.due(self)]
        on_cpu = self.accelerator.device.type == "cpu"
        reading = on_cpu or bool(due) or self.state.step % self.plan.read_every == 0 or self.done
        self.stopped = self._signal(reading)
        if reading or self.stopped:
            self._read()
        self.state.tick(training=True)
        for hook in self.hooks:
            if hook in due or (self.stopped and hook.at_stop):
                hook.run(self)
        self.curves.check()
        self.state.tick(training=False)  # measuring and saving is not training

    @property
    def rank(self) -> int:
        """This process's rank."""
        return self.accelerator.process_index

    @property
    def done(self) -> bool:
        """Whether the last step is taken."""
        return self.state.step == self.plan.steps

    @property
    def epoch(self) -> float:
        """Passes over the images so far."""
        return self.state.step / self.plan.steps_per_epoch

    def passed(self, every: float) -> bool:
        """Whether the current step passed a multiple of ``every`` epochs; never if it is 0."""
        if every <= 0:
            return False
        before = (self.state.step - 1) / self.plan.steps_per_epoch
        return math.floor(self.epoch / every) > math.floor(before / every)

    def log(self, **values: float) -> None:
        """Writes a line of the curves."""
        self.curves.log(self.state.step, self.epoch, values)

    def interrupted(self) -> Interrupted:
        """Builds the exception that ends the training after a signal."""
        assert self.store is not None and self.stopped is not None
        where = f"saved step {self.state.step} {self.store.place}"
        return Interrupted(self.stopped, f"{where}; {self.store.again}")

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that a resume needs; all processes call it together."""
        average = self.task.average
        return {
            "model": gather_full(self.task.model.state_dict()),
            "optimizer": gather_full(self.optimizer.state_dict()),
            "ema": {} if average is None else average.state_dict(),
            "scaler": {} if self.scaler is None else self.scaler.state_dict(),
            "watch": self.watch.state_dict(),
            "state": self.state.state_dict(),
            "hooks": {hook.name: hook.state_dict() for hook in self.hooks if hook.name},
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restores a checkpoint; a hook that it does not hold starts afresh."""
        load_model(self.task.model, saved["model"])
        load_optimizer(self.optimizer, saved["optimizer"])
        if self.task.average is not None:
            self.task.average.load_state_dict(saved["ema"])
        if self.scaler is not None and saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        self.watch.load_state_dict(saved["watch"])
        self.guard.in_a_row.fill_(self.watch.in_a_row)
        self.state.load_state_dict(saved["state"], saved["step"])
        for hook in self.hooks:
            if hook.name in saved["hooks"]:
                hook.load_state_dict(saved["hooks"][hook.name])

    @contextmanager
    def supervised(self) -> Iterator[None]:
        """Catches signals, names loader processes that die, and closes what hooks opened."""
        with ExitStack() as stack:
            stack.enter_context(self.curves)
            self._signals = Signals()
            if self.store is not None:
                stack.enter_context(self._signals)
            for hook in self.hooks:
                stack.enter_context(hook.running(self))
            stack.enter_context(worker_deaths())
            yield

    def _read(self) -> None:
        """Reads what was reported, as the mean over the processes, and checks that it is finite."""
        records = [record for record, _ in self.state.unread]
        if not records:
            return
        values = torch.stack([value for _, value in self.state.unread])
        self.state.unread.clear()
        read = self.accelerator.reduce(values, "mean").tolist()
        self.state.rows += [
            dict(zip((*record.names, "flag"), row, strict=True))
            for record, row in zip(records, read, strict=True)
        ]
        self.state.latest = records[-1]
        self.watch.look(records, [(row[0], row[-1]) for row in read])

    def _signal(self, reading: bool) -> int | None:
        """Returns the signal on which to stop after this step, if any.

        All processes must stop at the same step, or they wait for each other for ever. So they
        agree, in the steps that wait for the device anyway.
        """
        caught = self._signals.caught
        if self.accelerator.num_processes == 1 or self.store is None:
            return caught
        if not reading:
            return None
        flag = torch.tensor(float(caught is not None), device=self.accelerator.device)
        if self.accelerator.reduce(flag, "sum").item() == 0:
            return None
        return caught or signal.SIGTERM
