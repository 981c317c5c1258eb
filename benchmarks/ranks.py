"""Predicted beside measured: two or more processes on this machine's CPU, connected by gloo."""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.scale import Machine, count_work, predict
from mim.compare.cost.memory import bytes_added, bytes_of, without_talk
from mim.compare.cost.step import LR
from mim.compare.launchers import server_context
from mim.core.config import Config
from mim.core.cpu.process import tune_process
from mim.core.errors import UserError, setting_error
from mim.core.rng import image_keys
from mim.core.signals import end_at_once
from mim.training.optim import build_optimizer
from mim.training.runtime.precision import autocast, model_on, narrow_weights
from mim.training.runtime.sharding import Sharded

_WARM_UP = 2
_SIZES = (2**18, 2**20, 2**22, 25 * 2**20)  # bytes that are exchanged to find the links' rate
Span = tuple[float, float]


def check_scale(config: Config, processes: int = 2, rounds: int = 5) -> dict[str, Any]:
    """Predict the step of some processes from one process's and the links', and measure it.

    Every process has one thread; ``data.batch_size`` is what each of them takes. The rates that go
    into the prediction are those of a step without any exchange, all processes at work, and of
    exchanges without a step.

    Returns:
        ``processes``, ``images``; under ``ddp`` and ``fsdp`` seconds ``measured``, ``predicted``
        and ``predicted_exposed`` (nothing hidden); ``memory`` of one process without exchange,
        ``measured`` and ``predicted`` in bytes; ``hidden_share``, of the time that DDP's
        all-reduces take what passes while gradients are computed; ``link_rate`` in bytes/s,
        ``latency`` and ``bare`` in seconds.

    Raises:
        UserError: for fewer than two processes or no rounds.
    """
    if processes < 2:
        raise setting_error("--check", processes, "must be at least 2")
    if rounds < 1:
        raise setting_error("--rounds", rounds, "must be at least 1")
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = server_context()
    lines, children = [], []
    for rank in range(processes):
        line, far = context.Pipe()
        child = context.Process(
            target=_serve, args=(far, rank, processes, port, config, rounds), daemon=True
        )
        child.start()
        far.close()
        lines.append(line)
        children.append(child)
    try:
        told = [line.recv() for line in lines]
    except EOFError as error:
        raise UserError("--check: one of the processes ended without a word") from error
    finally:
        for child in children:
            child.join(timeout=10)
            if child.is_alive():
                child.terminate()
    # A step ends when the slowest process has ended it.
    seconds = {
        name: statistics.median(max(each) for each in zip(*(t[name] for t in told), strict=True))
        for name in ("forward", "backward", "optimizer", "ddp", "fsdp")
    }
    images, work = config.data.batch_size, count_work(config)
    bare = seconds["forward"] + seconds["backward"]
    latency, link_rate = _links(told, processes)
    machine = Machine(
        matrix_rate=(work.flops_forward + work.flops_backward) * images / bare,
        utilisation=1.0,
        memory_rate=work.touched * work.weight_bytes / seconds["optimizer"],
        node=processes,
        node_rate=link_rate,
        link_share=1.0,
        latency=latency,
    )
    found: dict[str, Any] = {
        "processes": processes,
        "images": images,
        "bare": bare + seconds["optimizer"],
        "link_rate": link_rate,
        "latency": latency,
        "hidden_share": told[0]["hidden_share"],
        "memory": {
            "measured": told[0]["memory"],
            "predicted": predict(work, machine, 1, images, "ddp")["memory"],
        },
    }
    for how in ("ddp", "fsdp"):
        row = predict(work, machine, processes, images, how)
        # FSDP2 hands each exchange to a stream of the GPU, and on a CPU waits for it.
        step = row["step" if how == "ddp" else "step_exposed"]
        found[how] = {
            "measured": seconds[how],
            "predicted": step,
            "predicted_exposed": row["step_exposed"],
            "exchange": row["exchange"],
        }
    return found


def _links(told: list[dict[str, Any]], processes: int) -> tuple[float, float]:
    """(seconds of an empty exchange, bytes/s) that best explain the all-reduces alone."""
    times = [
        statistics.median(
            max(each) for each in zip(*(t["exchanges"][n] for t in told), strict=True)
        )
        for n in range(len(_SIZES))
    ]
    sent = [2 * (processes - 1) / processes * size for size in _SIZES]
    # Relative errors: the small exchanges count as much as the large one.
    rows = torch.tensor([[1 / t, s / t] for s, t in zip(sent, times, strict=True)]).double()
    latency, per_byte = torch.linalg.lstsq(rows, torch.ones(len(rows), 1).double()).solution[:, 0]
    return max(float(latency), 0.0), 1 / max(float(per_byte), 1e-15)


def _serve(line: Connection, rank: int, world: int, port: int, config: Config, rounds: int) -> None:
    end_at_once()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world), "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    tune_process()
    accelerator = Accelerator(cpu=True)
    try:
        line.send(_measure(accelerator, config, rounds))
    finally:
        accelerator.end_training()


class _Steps:
    """Steps of one model, wrapped or not."""

    def __init__(self, config: Config, rank: int) -> None:
        self.config, self.device = config, torch.device("cpu")
        self.model = model_on(config, self.device).train()
        narrow_weights(self.model, config.train)
        self.wrapped: Any = self.model
        self.optimizer: Any = None
        count = config.data.batch_size
        shape = (count, config.data.channels, *config.data.size)
        self.images = torch.randn(shape, generator=torch.Generator().manual_seed(rank))
        self.ids = torch.arange(count) + rank * count

    def forward(self) -> Tensor:
        keys = image_keys(0, 0, self.ids)
        mask = self.model.draw_mask(self.images, keys, epoch=0, sample_ids=self.ids)
        with autocast(self.config.train.precision, self.device):
            return self.wrapped(self.images, mask).loss

    def descend(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        self.forward().backward()
        self.descend()


def _measure(accelerator: Accelerator, config: Config, rounds: int) -> dict[str, Any]:
    rank = accelerator.process_index
    bare, ddp, fsdp = (_Steps(config, rank) for _ in range(3))
    bare.optimizer = build_optimizer(config.optim, bare.model, LR)
    ddp.wrapped = accelerator.prepare_model(ddp.model)
    ddp.optimizer = build_optimizer(config.optim, ddp.model, LR)
    fsdp.wrapped = Sharded(fsdp.model, accelerator)
    fsdp.optimizer = build_optimizer(config.optim, fsdp.model, LR)
    for _ in range(_WARM_UP):
        for steps in (bare, ddp, fsdp):
            steps.step()
    state = [v for s in bare.optimizer.state.values() for v in s.values()]
    kept = bytes_of([*bare.model.parameters(), *bare.model.buffers(), bare.images, *state])
    times: dict[str, list[float]] = {
        name: [] for name in ("forward", "backward", "optimizer", "ddp", "fsdp")
    }
    pieces = [torch.ones(size // 4) for size in _SIZES]
    exchanges: list[list[float]] = [[] for _ in _SIZES]
    losses: list[Tensor] = []
    for _ in range(rounds):
        times["forward"].append(_timed(lambda: losses.append(bare.forward())))
        times["backward"].append(_timed(losses.pop().backward))
        times["optimizer"].append(_timed(bare.descend))
        times["ddp"].append(_timed(ddp.step))
        times["fsdp"].append(_timed(fsdp.step))
        for number, piece in enumerate(pieces):
            exchanges[number].append(_timed(partial(dist.all_reduce, piece)))
    return {
        **times,
        "exchanges": exchanges,
        "hidden_share": hidden_share(*overlap_of(ddp.forward)),
        "memory": kept + bytes_added(bare.step, bare.device),
    }


def _timed(work: Callable[[], Any]) -> float:
    dist.barrier()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def overlap_of(forward: Callable[[], Tensor]) -> tuple[list[Span], list[Span]]:
    """The spans of the all-reduces of a step, and those in which its gradients are computed.

    Args:
        forward: gives the loss of a model that :class:`DistributedDataParallel` holds.
    """
    loss = forward()
    with without_talk(), profile(activities=[ProfilerActivity.CPU]) as on:
        loss.backward()
    exchanges, gradients = [], []
    for event in on.events():
        span = (float(event.time_range.start), float(event.time_range.end))
        if event.name.startswith("gloo:all_reduce"):
            exchanges.append(span)
        elif event.name.startswith("autograd::engine::evaluate_function"):
            gradients.append(span)
    return exchanges, gradients


def hidden_share(exchanges: list[Span], gradients: list[Span]) -> float:
    """Of the time that exchanges take, the share in which gradients are computed."""
    whole = sum(end - start for start, end in _joined(exchanges))
    both = sum(
        max(0.0, min(end, other_end) - max(start, other_start))
        for start, end in _joined(exchanges)
        for other_start, other_end in _joined(gradients)
    )
    return both / whole if whole else 0.0


def _joined(spans: list[Span]) -> Iterator[Span]:
    """Spans without overlaps, in order."""
    current: Span | None = None
    for start, end in sorted(spans):
        if current is not None and start <= current[1]:
            current = (current[0], max(current[1], end))
            continue
        if current is not None:
            yield current
        current = (start, end)
    if current is not None:
        yield current


def format_check(found: dict[str, Any]) -> str:
    """Predicted beside measured, as a Markdown table."""
    lines = [
        f"{found['processes']} processes of one thread, gloo, {found['images']} images each: a "
        f"step without exchange {1e3 * found['bare']:.0f} ms, links "
        f"{found['link_rate'] / 1e9:.2f} GB/s and {1e6 * found['latency']:.0f} µs; "
        f"of the time of DDP's all-reduces {100 * found['hidden_share']:.0f} % "
        "passes while gradients are computed.",
        "",
        "| | measured | predicted | error | predicted, nothing hidden |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for how, name in (("ddp", "DDP, ms a step"), ("fsdp", "FSDP2, ms a step")):
        row = found[how]
        lines.append(
            f"| {name} | {1e3 * row['measured']:.0f} | {1e3 * row['predicted']:.0f} "
            f"| {100 * (row['predicted'] / row['measured'] - 1):+.0f} % "
            f"| {1e3 * row['predicted_exposed']:.0f} |"
        )
    row = found["memory"]
    lines.append(
        f"| memory of one process alone, MiB | {row['measured'] / 2**20:.1f} "
        f"| {row['predicted'] / 2**20:.1f} "
        f"| {100 * (row['predicted'] / row['measured'] - 1):+.0f} % | |"
    )
    return "\n".join(lines)
