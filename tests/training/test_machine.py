"""What a machine cannot do is one line: memory, devices, precisions, determinism."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from mim.core.config import Config, DataConfig, TrainConfig
from mim.core.errors import TrainingError, UserError, WorkerError
from mim.model import MaskedImageModel
from mim.training import pretrain as training
from mim.training.runtime.machine import deterministic, memory, pick_device

Mim = Callable[..., Any]
Tiny = Callable[..., Path]

CPU = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 137438953472 bytes. Error code 12 (Cannot allocate memory)"
)
GPU = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.80 GiB"


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError(GPU), RuntimeError(CPU), MemoryError()],
    ids=["gpu", "cpu", "py"],
)
def test_too_little_memory_says_what_to_set(
    error: Exception, tmp_path: Path, mim: Mim, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = MaskedImageModel.forward, 0

    def forward(self: MaskedImageModel, images: torch.Tensor, *rest: Any) -> Any:
        nonlocal calls
        calls += len(images) >= 32  # the cost is measured on two
        if calls == 3 and len(images) > 16:
            raise error
        return real(self, images, *rest)

    monkeypatch.setattr(MaskedImageModel, "forward", forward)
    run, config = tmp_path / "run", tiny({"train.accumulate": 2, "train.checkpoint_every": 0.04})
    train = ("pretrain", "--config", config, "--output", run, "--resume", "auto")
    outcome = mim(*train)
    assert outcome.code == 1
    assert outcome.line.startswith("mim: error: out of memory")
    assert "data.batch_size 64 and train.accumulate 2 are 32 images at once" in outcome.line
    assert "Set train.accumulate to 4 (16 at once, the same batch" in outcome.line
    assert "or data.batch_size to 32 (another run)" in outcome.line
    assert "train.gradient_checkpointing to true" in outcome.line
    # What it says works.
    assert mim(*train, "--train.accumulate", 4).code == 0


def test_a_real_allocation_that_cannot_be() -> None:
    with pytest.raises(TrainingError, match=r"out of memory \(.*allocate"), memory(Config(), 1):
        torch.empty(1 << 60, dtype=torch.uint8)


def test_the_advice_counts_processes_and_ends_at_one_image() -> None:
    config = Config(
        data=DataConfig(batch_size=4), train=TrainConfig(accumulate=2, gradient_checkpointing=True)
    )
    with pytest.raises(TrainingError) as found, memory(config, 2):
        raise MemoryError
    assert str(found.value) == (
        "out of memory: data.batch_size 4 over 2 processes and train.accumulate 2 are 1 images "
        "at once. Choose a smaller model or smaller images"
    )


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes"), WorkerError("out of memory"), UserError("out of memory")]
)
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)), memory(Config(), 1):
        raise error


def test_devices_that_are_not_there(mim: Mim, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device(None) == "cpu" and pick_device("cpu") == "cpu"
    for wanted, reason in {
        "cuda": "is not there: torch sees no GPU; choose cpu",
        "cuda:3": "is not there",
        "bogus": "is no device; choose auto, cpu, cuda, cuda:1 or mps",
        "mps": "cannot be used: ",
    }.items():
        outcome = mim("evaluate", "knn", "untrained", "--device", wanted)
        assert outcome.code == 2 and f"--device: '{wanted}' {reason}" in outcome.line
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device(None) == "cuda"
    with pytest.raises(UserError, match="sees 2 GPUs here"):
        pick_device("cuda:2")


def test_a_precision_that_the_device_refuses(
    tmp_path: Path, mim: Mim, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> Accelerator:
        raise ValueError("bf16 mixed precision requires PyTorch >= 1.10 and a supported device.")

    monkeypatch.setattr(training, "Accelerator", refuse)
    config = tiny({"train.precision": "bf16"})
    outcome = mim("pretrain", "--config", config, "--output", tmp_path / "run")
    assert outcome.code == 2
    assert "train.precision: 'bf16' is not for this device: bf16 mixed prec" in outcome.line


def state() -> tuple[bool, bool, bool]:
    cudnn = torch.backends.cudnn
    return torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark


@pytest.mark.parametrize("wanted", [True, False])
def test_a_run_is_deterministic_where_asked(
    wanted: bool, tmp_path: Path, mim: Mim, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before, seen, real = state(), [], MaskedImageModel.forward

    def forward(self: MaskedImageModel, *args: Any) -> Any:
        seen.append(state())
        return real(self, *args)

    monkeypatch.setattr(MaskedImageModel, "forward", forward)
    config = tiny({"train.deterministic": wanted, "train.max_steps": 2})
    assert mim("pretrain", "--config", config, "--output", tmp_path / "run").code == 0
    assert set(seen) == {(True, True, False) if wanted else before}
    assert state() == before, "the next run is as it wishes"


def test_the_operation_that_is_not_deterministic_is_named(
    tmp_path: Path, mim: Mim, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = MaskedImageModel.forward

    def forward(self: MaskedImageModel, images: torch.Tensor, *rest: Any) -> Any:
        images.clone().put_(torch.zeros(2, dtype=torch.long), torch.ones(2))  # it is not
        return real(self, images, *rest)

    monkeypatch.setattr(MaskedImageModel, "forward", forward)
    config = tiny({"train.deterministic": True})
    outcome = mim("pretrain", "--config", config, "--output", tmp_path / "run")
    assert outcome.code == 2
    assert "train.deterministic: True cannot be held: put_ " in outcome.line
    assert "has no deterministic implementation here" in outcome.line
    with pytest.raises(RuntimeError, match="another"), deterministic(True):
        raise RuntimeError("another")
