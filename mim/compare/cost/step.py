"""Timing whole training steps, interleaved so that a busy machine is unfair to nobody.

Each subject (a regime of ours, a peer) lives in a process of its own, with its own allocator; the
parent lets one of them work at a time, in turn, round after round.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mim.compare.cost.memory import bytes_added, bytes_of
from mim.compare.launchers import server_context
from mim.core.config import Config
from mim.core.cpu.linear import has_onednn, onednn_linear
from mim.core.cpu.process import tune_process
from mim.core.errors import UserError, choice_error, setting_error
from mim.core.rng import image_keys
from mim.core.signals import end_at_once
from mim.model import MaskedImageModel
from mim.model.regimes import REGIMES
from mim.training.checkpoint import write_text_atomic
from mim.training.optim import build_optimizer
from mim.training.pretrain import parts
from mim.training.runtime.cost import count_flops, environment, flops_of, wait_for
from mim.training.runtime.precision import autocast, autocast_dtype, model_on, narrow_weights
from mim.training.settings import checked

_WARM_UP = 3  # the first steps pay for page faults and allocation
_COMPILED = "-compiled"  # after the name of a peer: torch.compile of its model
LR = 1e-4
# A peer whose loss differs from ours by more than this factor does not do the same work.
_SAME_LOSS = 2.0


class _Work(NamedTuple):
    """A training step in its two parts, and what stays in memory between two steps."""

    learn: Callable[[int], Tensor]
    """Forward and backward of a step, by its number; returns the loss."""
    model: nn.Module
    optimizer: torch.optim.Optimizer
    images: Tensor

    def step(self, number: int) -> Tensor:
        loss = self.learn(number)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if isinstance(self.model, MaskedImageModel):
            self.model.update_teacher()
        return loss

    def kept_tensors(self) -> list[Tensor]:
        """Weights, moments and images."""
        states = self.optimizer.state.values()
        moments = (value for state in states for value in state.values())
        found = [*self.model.parameters(), *self.model.buffers(), *moments, self.images]
        return [value for value in found if isinstance(value, Tensor)]


@dataclasses.dataclass(frozen=True)
class _Subject:
    """What one process times: a regime of ours, or a peer built to the sizes of the config."""

    name: str
    config: Config
    is_peer: bool
    mae_path: Path | None
    threads: int


def bench_step(
    config: Config,
    regimes: Sequence[str],
    rounds: int = 5,
    steps: int = 2,
    *,
    peers: Sequence[str] = (),
    mae_path: Path | None = None,
    variants: Mapping[str, Config] | None = None,
) -> dict[str, Any]:
    """Time training steps of one config under several regimes, on noise images.

    Args:
        config: what is timed; its batch size, precision, mask and sizes count.
        regimes: names of regimes.
        rounds: every round times each subject once, in turn.
        steps: steps of one subject in a round.
        peers: masked autoencoders of other codebases at the same sizes, by their names in
            ``benchmarks/peers.py``; with ``-compiled`` behind the name, under torch.compile.
        mae_path: a checkout of facebookresearch/mae, for the peer ``mae``.
        variants: more to be timed, by a name of their own; they stand under ``regimes`` too.

    Returns:
        ``environment``, and under ``regimes`` and ``peers`` a row each: images and tokens a
        second, seconds a step, operations an image, bytes of torch's tensors between two steps
        (``kept_memory``) and at the peak of one, the last loss, and the share of
        ``matrix_flops_per_second`` that its operations came to. ``ratio_to_first`` is its speed
        over that of the first row, ``ratio_to_fastest_peer`` that of a regime over the fastest
        peer's; a ratio is the median over rounds of the ratio within a round.

    Raises:
        UserError: for an unknown regime or peer, one that does not fit the config, a package that
            is missing, or a peer whose loss shows that it does other work.
    """
    if rounds < 1 or steps < 1:
        raise setting_error("bench", f"rounds={rounds}, steps={steps}", "must be at least 1")
    for name in regimes:
        if name not in REGIMES:
            raise choice_error("--regimes", name, REGIMES)
    for name in peers:
        known = _peers().PEERS
        if name.removesuffix(_COMPILED) not in known:
            raise choice_error("--peer", name, known)
    threads = torch.get_num_threads()
    subjects = []
    for name in regimes:
        chosen = checked(with_regime(config, name))
        subjects.append(_Subject(name, chosen, False, mae_path, threads))
    for name, varied in (variants or {}).items():
        if name in (*regimes, *peers):
            raise setting_error("--variants", name, "is the name of another row; choose another")
        subjects.append(_Subject(name, checked(varied), False, mae_path, threads))
    if not subjects:
        raise setting_error("--regimes", "", "names nothing to be timed")
    ours_first = [subject.name for subject in subjects]
    subjects += [_Subject(name, config, True, mae_path, threads) for name in peers]
    figures, times, rates = _interleave(subjects, rounds, steps)
    sizes = {subject.name: subject.config.data.batch_size for subject in subjects}
    first = ours_first[0]
    for name, seconds in times.items():
        row, size, typical = figures[name], sizes[name], statistics.median(seconds)
        speed = size / typical
        row |= {"seconds_per_step": typical, "images_per_second": speed}
        row |= {"slowest": size / max(seconds), "fastest": size / min(seconds)}
        row["tokens_per_second"] = speed * row["encoder_tokens"]
        flops = row["flops_forward"] + row["flops_backward"]
        row["utilisation"] = speed * flops / statistics.median(rates)
        row["ratio_to_first"] = _faster(times, sizes, name, first)
    ours = {name: figures[name] for name in ours_first}
    theirs = {name: figures[name] for name in peers}
    if theirs:
        _check_losses(ours, theirs)
        best = min(peers, key=lambda name: statistics.median(times[name]))
        for name in ours_first:
            ours[name]["ratio_to_fastest_peer"] = _faster(times, sizes, name, best)
    return {
        "date": datetime.date.today().isoformat(),
        "environment": environment(_device()),
        "threads": threads,
        "batch_size": config.data.batch_size,
        "precision": config.train.precision,
        "rounds": rounds,
        "steps": steps,
        "matrix_flops_per_second": statistics.median(rates),
        "regimes": ours,
        "peers": theirs,
    }


def time_step(config: Config, steps: int = 2) -> float:
    """Time a training step on noise images, in this process: a first look, within seconds."""
    plain = dataclasses.replace(config, train=dataclasses.replace(config.train, compile=False))
    device = _device()
    work, _ = _regime(_Subject("", plain, False, None, torch.get_num_threads()), device)
    work.step(0)
    wait_for(device)
    began = time.perf_counter()
    for number in range(steps):
        work.step(number)
    wait_for(device)
    return (time.perf_counter() - began) / steps


def with_regime(config: Config, name: str) -> Config:
    """The config under another regime."""
    regime = dataclasses.replace(config.model.regime, name=name)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, regime=regime))


@functools.cache
def _peers() -> ModuleType:
    """``benchmarks/peers.py``, which stands beside the package in a clone.

    Raises:
        UserError: where the package was installed without it.
    """
    file = Path(__file__).resolve().parents[3] / "benchmarks" / "peers.py"
    spec = importlib.util.spec_from_file_location("mim_peers", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except FileNotFoundError as error:
        reason = "other codebases are timed from a clone of the project (pip install -e CLONE)"
        raise UserError(f"--peer: {reason}; there is no file {str(file)!r}") from error
    return module


def _faster(times: dict[str, list[float]], sizes: dict[str, int], name: str, other: str) -> float:
    """Images a second of one over those of another: the median over rounds."""
    images = sizes[name] / sizes[other]
    rounds = zip(times[name], times[other], strict=True)
    return statistics.median(images * theirs / own for own, theirs in rounds)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _check_losses(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """On noise every masked autoencoder begins near the variance of the target, which is 1."""
    name, first = next(iter(ours.items()))
    for peer, row in theirs.items():
        if not 1 / _SAME_LOSS < row["loss"] / first["loss"] < _SAME_LOSS:
            raise UserError(
                f"--peer {peer}: its loss is {row['loss']:.3f} and that of {name} is "
                f"{first['loss']:.3f}, so they do not do the same work; nothing can be compared"
            )


def _interleave(
    subjects: Sequence[_Subject], rounds: int, steps: int
) -> tuple[dict[str, dict[str, Any]], dict[str, list[float]], list[float]]:
    """Figures of each subject, its seconds a step in every round, and each round's matrix rate."""
    context = server_context()  # a fork of this process would share its threads
    lines: dict[str, Connection] = {}
    processes = []
    figures: dict[str, dict[str, Any]] = {}
    try:
        for subject in subjects:
            name = subject.name
            lines[name], far = context.Pipe()
            process = context.Process(target=_serve, args=(far, subject), daemon=True)
            process.start()
            far.close()
            processes.append(process)
            # One after the other, so that each warms up on a free machine.
            figures[name] = _answer(lines[name], name)
        times: dict[str, list[float]] = {name: [] for name in lines}
        rates = []
        for number in range(rounds):
            rates.append(_matrix_rate(subjects[0].config))
            for name, line in lines.items():
                line.send((number * steps, steps))
                measured = _answer(line, name)
                times[name].append(measured.pop("seconds"))
                figures[name] |= measured
        for name, line in lines.items():
            line.send(None)
            figures[name].update(_answer(line, name))
    finally:
        for line in lines.values():
            line.close()  # its process then ends
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.terminate()
    return figures, times, rates


def _answer(line: Connection, name: str) -> dict[str, Any]:
    try:
        kind, content = line.recv()
    except EOFError as error:
        reason = "its process ended without an answer; it may have run out of memory"
        raise UserError(f"mim bench step: {name}: {reason}") from error
    if kind == "mistake":
        raise UserError(content)
    return content


def _serve(line: Connection, subject: _Subject) -> None:
    """Run a subject's process: build, warm up, then step whenever the parent asks."""
    end_at_once()
    torch.set_num_threads(subject.threads)
    device = _device()
    try:
        work, figures = (_peer if subject.is_peer else _regime)(subject, device)
    except UserError as error:
        line.send(("mistake", str(error)))
        return
    except Exception as error:
        if not subject.is_peer:
            raise
        reason = f"does not run as installed: {type(error).__name__}: {error}"
        line.send(("mistake", f"--peer {subject.name}: it {reason}"))
        return
    for number in range(_WARM_UP):
        work.step(number)
    line.send(("ready", figures))
    with contextlib.suppress(EOFError):  # the parent is gone
        while (request := line.recv()) is not None:
            first, steps = request
            wait_for(device)
            began = time.perf_counter()
            for number in range(first, first + steps):
                loss = work.step(number)
            wait_for(device)
            seconds = (time.perf_counter() - began) / steps
            line.send(("done", {"seconds": seconds, "loss": float(loss)}))
        # Last, since the count itself changes what the C library keeps.
        kept = bytes_of(work.kept_tensors())
        peak = kept + bytes_added(lambda: work.step(0), device)
        line.send(("done", {"kept_memory": kept, "peak_memory": peak}))


def _noise(config: Config, device: torch.device) -> Tensor:
    """(B, C, H, W) of a normal distribution, the same in every process."""
    generator = torch.Generator().manual_seed(config.seed)
    shape = (config.data.batch_size, config.data.channels, *config.data.size)
    return torch.randn(shape, generator=generator).to(device)


def _regime(subject: _Subject, device: torch.device) -> tuple[_Work, dict[str, Any]]:
    config = checked(subject.config)  # imports the plugins, which this process has not seen
    tune_process(device)
    images = _noise(config, device)
    model = model_on(config, device)
    few = torch.arange(2)
    forward, backward = count_flops(model, images[:2], few)
    mask = model.draw_mask(images[:2], image_keys(0, 0, few), sample_ids=few)
    figures = {
        "encoder_tokens": model.regime.encoder_tokens(model.backbone, mask.num_visible),
        "flops_forward": forward,
        "flops_backward": backward,
    }
    narrow_weights(model, config.train)
    optimizer = build_optimizer(config.optim, model, LR)
    if config.train.compile:
        model.compile()
    ids = torch.arange(len(images))

    cuts = list(parts(images, config.train.accumulate))

    def learn(number: int) -> Tensor:
        mask = model.draw_mask(images, image_keys(0, number, ids), epoch=number, sample_ids=ids)
        total = torch.zeros((), device=device)
        for cut in cuts:
            with autocast(config.train.precision, device):
                loss = model(images[cut], mask if len(cuts) == 1 else mask[cut]).loss
            loss = loss * (len(images[cut]) / len(images))
            loss.backward()
            total += loss.detach()
        return total

    return _Work(learn, model, optimizer, images), figures


def _peer(subject: _Subject, device: torch.device) -> tuple[_Work, dict[str, Any]]:
    config = checked(subject.config)
    images = _noise(config, device)
    torch.manual_seed(config.seed)
    name = subject.name.removesuffix(_COMPILED)
    peer = _peers().build_peer(name, config, subject.mae_path)
    model: nn.Module = peer.model.to(device).train()
    optimizer = torch.optim.AdamW(
        (weight for weight in model.parameters() if weight.requires_grad),
        lr=LR,
        betas=config.optim.betas,
        weight_decay=config.optim.weight_decay,
    )
    forward, backward = flops_of(model, lambda: model(images[:2]))
    figures = {
        "encoder_tokens": peer.encoder_tokens,
        "flops_forward": forward // 2,
        "flops_backward": backward // 2,
    }
    if name != subject.name:
        model.compile()

    def learn(number: int) -> Tensor:
        with autocast(config.train.precision, device):
            loss: Tensor = model(images)
        loss.backward()
        return loss.detach()

    return _Work(learn, model, optimizer, images), figures


def _matrix_rate(config: Config) -> float:
    """Operations a second of square matrix products alone, by the faster library."""
    device = _device()
    kind = autocast_dtype(config.train.precision) or torch.float32
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device).to(kind)
    b = torch.randn(side, side, device=device).to(kind)
    ways: list[Callable[[], Tensor]] = [lambda: a @ b]
    if device.type == "cpu" and kind == torch.float32 and has_onednn():
        ways.append(lambda: onednn_linear(a, b))
    return 2 * side**3 / min(statistics.median(_seconds(way, device)) for way in ways)


def _seconds(way: Callable[[], Tensor], device: torch.device) -> list[float]:
    for _ in range(_WARM_UP):
        way()
    seconds = []
    for _ in range(10):
        wait_for(device)
        began = time.perf_counter()
        way()
        wait_for(device)
        seconds.append(time.perf_counter() - began)
    return seconds


_COLUMNS = (
    "| subject | images/s (median) | slowest to fastest | to the first | to the fastest peer "
    "| encoder tokens | GFLOPs an image | of the matrix rate | peak memory, GiB | loss |",
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
)


def _rows(figures: dict[str, Any]) -> list[str]:
    rows = list(_COLUMNS)
    for kind in ("regimes", "peers"):
        for name, values in figures[kind].items():
            flops = (values["flops_forward"] + values["flops_backward"]) / 1e9
            ratio = values.get("ratio_to_fastest_peer")
            rows.append(
                f"| {name if kind == 'regimes' else 'peer ' + name} "
                f"| {values['images_per_second']:.1f} "
                f"| {values['slowest']:.1f} to {values['fastest']:.1f} "
                f"| {values['ratio_to_first']:.2f} "
                f"| {'' if ratio is None else f'{ratio:.2f}'} "
                f"| {values['encoder_tokens']:.0f} | {flops:.3f} "
                f"| {100 * values['utilisation']:.0f} % "
                f"| {values['peak_memory'] / 2**30:.2f} | {values['loss']:.3f} |"
            )
    return rows


def describe(figures: dict[str, Any]) -> str:
    """The machine and what was timed on it, in a line."""
    machine = figures["environment"]
    batch = "" if figures.get("over") == "data.batch_size" else f", batch {figures['batch_size']}"
    return (
        f"{figures['date']}: {machine['device']}, {machine['cpu']}, {figures['threads']} threads, "
        f"torch {machine['torch']}, timm {machine['timm']}, {figures['precision']}{batch}, "
        f"{figures['rounds']} rounds of {figures['steps']} steps, "
        f"matrix products {figures['matrix_flops_per_second'] / 1e9:,.0f} GFLOP/s"
    )


def format_table(figures: dict[str, Any]) -> str:
    """The figures as a Markdown table, with the machine in front."""
    return "\n".join([describe(figures), "", *_rows(figures)])


def append_table(file: Path, command: str, table: str) -> None:
    """Add a table and the command that made it to the end of a Markdown file."""
    old = file.read_text(encoding="utf-8").rstrip() if file.exists() else ""
    new = f"`{command}`\n\n{table}\n"
    write_text_atomic(file, f"{old}\n\n{new}" if old else new)
