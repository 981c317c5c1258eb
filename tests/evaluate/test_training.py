"""The shared training loop: stopped and gone on, or on two processes, it computes the same."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from timm.scheduler import CosineLRScheduler

import mim.evaluate.finetune
from mim.compare.runner import SERVER_MODULES
from mim.core.config import Config, DataConfig, ModelConfig
from mim.core.errors import UserError
from mim.core.recipes import evaluations_of, recipe_file
from mim.core.settings import read_mapping
from mim.core.signals import Interrupted
from mim.data import Subset, open_source
from mim.evaluate import (
    Attentive,
    AttentiveSettings,
    Encoder,
    Finetune,
    FinetuneSettings,
    build_evaluation,
    open_encoder,
)
from mim.evaluate.drop_path import KeyedDropPath
from mim.evaluate.finetune import build_classifier, fit
from mim.evaluate.training import ClassificationTask, accuracies, global_batch

ARGS = {"patch_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 2}
DATA = DataConfig(source="digits", image_size=8, channels=1, batch_size=64, flip=False)
CONFIG = Config(data=DATA, model=ModelConfig(backbone="vit_tiny_patch16_224", backbone_args=ARGS))
# All of the recipe at once: 4 steps an epoch.
RECIPE = FinetuneSettings(
    epochs=3,
    fraction=0.1,
    batch_size=32,
    base_lr=3e-2,
    drop_path=0.5,
    erasing=0.5,
    ema=0.5,
)


@pytest.fixture
def encoder() -> Encoder:
    return open_encoder("untrained", CONFIG)


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def at_call(number: int, do: Callable[[], None], patch: pytest.MonkeyPatch) -> list[int]:
    """``do`` happens in the step of that number; returns the steps that were computed."""
    real, steps = mim.evaluate.finetune.mix_images, []

    def mix(images: Any, labels: Any, classes: Any, settings: Any, step: int) -> Any:
        if len(steps) + 1 == number:
            do()
        steps.append(step)
        return real(images, labels, classes, settings, step)

    patch.setattr(mim.evaluate.finetune, "mix_images", mix)
    return steps


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class Killed(Exception):
    pass


def kill() -> None:
    raise Killed


@pytest.mark.parametrize("number", [1, 6, 8])
def test_stopped_by_a_signal_and_gone_on(encoder: Encoder, tmp_path: Path, number: int) -> None:
    """In the middle of an epoch, and at its end; steps count from 1."""
    train = open_source(DATA, "train")
    whole = fit(encoder, train, RECIPE)
    state = tmp_path / "evaluations" / "state.pt"
    with pytest.MonkeyPatch.context() as patch:
        at_call(number, stop, patch)
        with pytest.raises(Interrupted, match=f"SIGTERM: saved step {number} in") as caught:
            fit(encoder, train, RECIPE, state=state)
        assert caught.value.code == 143
    torch.manual_seed(7)  # a new process is at another place of its generators
    with pytest.MonkeyPatch.context() as patch:
        steps = at_call(0, stop, patch)
        again = fit(encoder, train, RECIPE, state=state)
    assert steps == list(range(number, 12))
    assert torch.equal(weights(again.model), weights(whole.model))
    assert again.history == whole.history and again.numbers == whole.numbers


def test_killed_and_gone_on_from_the_last_epoch(encoder: Encoder, tmp_path: Path) -> None:
    train = open_source(DATA, "train")
    whole = fit(encoder, train, RECIPE)
    state = tmp_path / "state.pt"
    with pytest.MonkeyPatch.context() as patch:
        at_call(7, kill, patch)
        with pytest.raises(Killed):
            fit(encoder, train, RECIPE, state=state)
    with pytest.MonkeyPatch.context() as patch:
        steps = at_call(0, stop, patch)
        again = fit(encoder, train, replace(RECIPE, checkpoint_every=2), state=state)
    assert steps == list(range(4, 12))
    assert torch.equal(weights(again.model), weights(whole.model))
    assert again.history == whole.history


def test_a_state_of_other_settings_or_weights_is_not_used(encoder: Encoder, tmp_path: Path) -> None:
    train = open_source(DATA, "train")
    short, state = replace(RECIPE, epochs=1), tmp_path / "state.pt"
    fit(encoder, train, short, state=state)
    other = open_encoder("untrained", replace(CONFIG, seed=1))
    for changed, settings in ((encoder, replace(short, mixup=0.1)), (other, replace(short))):
        begun = fit(changed, train, settings, state=state)
        assert torch.equal(weights(begun.model), weights(fit(changed, train, settings).model))


def test_parts_of_a_batch_are_the_batch(encoder: Encoder) -> None:
    """Mixing, erasing and drop path are those of the whole batch; the gradient is clipped once."""
    train = open_source(DATA, "train")
    recipe = replace(RECIPE, epochs=1, clip_grad=0.05)
    whole = fit(encoder, train, recipe)
    cut = fit(encoder, train, replace(recipe, accumulate=3))
    assert cut.history[0]["train_loss"] == pytest.approx(whole.history[0]["train_loss"], abs=1e-6)
    assert torch.allclose(weights(cut.model), weights(whole.model), atol=1e-5)
    free = fit(encoder, train, replace(recipe, clip_grad=0.0))
    assert not torch.allclose(weights(free.model), weights(whole.model), atol=1e-5)


def test_a_step_that_is_not_finite_is_skipped(encoder: Encoder) -> None:
    train, recipe = open_source(DATA, "train"), replace(RECIPE, epochs=1)
    real = mim.evaluate.finetune.mix_images

    def mix(images: Any, labels: Any, classes: Any, settings: Any, step: int) -> Any:
        mixed, targets = real(images, labels, classes, settings, step)
        return (mixed * float("nan") if step == 1 else mixed), targets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mim.evaluate.finetune, "mix_images", mix)
        with pytest.raises(UserError, match=r"finetune.base_lr: .* loss is nan in epoch 1"):
            fit(encoder, train, recipe)
        skipped = fit(encoder, train, replace(recipe, max_nonfinite=2))
    assert weights(skipped.model).isfinite().all()


def test_a_process_without_images_takes_part_in_what_all_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One image among two processes: the rows that both gather fit together."""
    alone = Subset(open_source(DATA, "train"), torch.arange(1))
    gathered: list[torch.Tensor] = []
    monkeypatch.setattr(
        "mim.evaluate.training.gather_rows", lambda rows: (gathered.append(rows), rows)[1]
    )
    for rank in (0, 1):
        given = {"process_index": rank, "num_processes": 2, "device": torch.device("cpu")}
        task = SimpleNamespace(
            accelerator=SimpleNamespace(**given),
            data=DATA,
            heads=3,
            guarded=False,
            logits=lambda model, images: torch.zeros(3, len(images), 10),
        )
        accuracies(task, torch.nn.Identity(), alone)  # type: ignore[arg-type]
    rows, others = gathered[:3], gathered[3:]
    assert len(rows) == len(others) and {len(rows[0]), len(others[0])} == {0, 1}
    for row, other in zip(rows, others, strict=True):
        assert torch.cat([row, other]).dtype == row.dtype == other.dtype


def test_the_state_goes_when_the_evaluation_ends(encoder: Encoder, tmp_path: Path) -> None:
    train, val = open_source(DATA, "train"), open_source(DATA, "val")
    settings = replace(RECIPE, epochs=1, low_shot=(0.05,))
    with pytest.MonkeyPatch.context() as patch:
        at_call(6, stop, patch)  # in the second, low-shot training
        with pytest.raises(Interrupted):
            Finetune(settings).run(encoder, train, val, folder=tmp_path)
    folder = tmp_path / "evaluations"
    states = sorted(path.name for path in folder.glob("*.pt"))
    assert states == ["finetune_0.05.pt", "finetune_0.1.pt"]
    with pytest.MonkeyPatch.context() as patch:
        steps = at_call(0, stop, patch)
        numbers = Finetune(settings).run(encoder, train, val, folder=tmp_path)
    assert steps == [], "both were trained to the end, val had not been asked"
    assert numbers == Finetune(settings).run(encoder, train, val)
    assert not list(folder.glob("*.pt"))
    alone = Finetune(replace(settings, fraction=0.05, low_shot=())).run(encoder, train, val)
    assert numbers["accuracy_of_5_percent"] == alone["accuracy"] != numbers["accuracy"]


def test_a_probe_goes_on_too(encoder: Encoder, tmp_path: Path) -> None:
    train, val = open_source(DATA, "train"), open_source(DATA, "val")
    settings = AttentiveSettings(epochs=2, fraction=0.1, batch_size=32, base_lr=(1e-2, 3e-2))
    whole = Attentive(settings).run(encoder, train, val)
    with pytest.MonkeyPatch.context() as patch:
        real, calls = Attentive.tokens, []

        def tokens(self: Attentive, encoder: Encoder, images: torch.Tensor) -> torch.Tensor:
            calls.append(len(images))
            if len(calls) == 3:
                stop()
            return real(self, encoder, images)

        patch.setattr(Attentive, "tokens", tokens)
        with pytest.raises(Interrupted, match="saved step 3"):
            Attentive(settings).run(encoder, train, val, folder=tmp_path)
    assert Attentive(settings).run(encoder, train, val, folder=tmp_path) == whole
    assert not list((tmp_path / "evaluations").glob("*.pt"))


def test_drop_path_follows_the_images(encoder: Encoder) -> None:
    model: Any = build_classifier(encoder, 10, FinetuneSettings(drop_path=0.5)).model.train()
    paths = [m for m in model.modules() if isinstance(m, KeyedDropPath)]
    assert len(paths) == 2 and len({id(p.draws) for p in paths}) == 1  # the second block's two
    paths[0].draws.values = torch.tensor([[0.49, 0.51], [0.51, 0.49], [0.1, 0.1]])
    x = torch.ones(3, 4, 8)
    assert [float(row.mean()) for row in paths[0](x)] == [2, 0, 2]
    assert [float(row.mean()) for row in paths[1](x)] == [0, 2, 2]
    model.eval()
    assert torch.equal(paths[0](x), x)


@pytest.mark.parametrize(
    ("width", "expected"),
    [(768, (100, 5e-4, 0.65, 0.1)), (1024, (50, 1e-3, 0.75, 0.2)), (1280, (50, 1e-3, 0.75, 0.3))],
)
def test_the_recipe_follows_the_size(
    encoder: Encoder, width: int, expected: tuple[float, ...]
) -> None:
    assert encoder.vit is not None
    encoder.vit.embed_dim = width

    def recipe(**given: Any) -> tuple[float, ...]:
        s: Any = build_evaluation("finetune", given, encoder).settings
        return s.epochs, s.base_lr, s.layer_decay, s.drop_path

    assert recipe() == expected
    assert recipe(epochs=7) == (7, *expected[1:])
    assert recipe(recipe="large", drop_path=0.0) == (50, 1e-3, 0.75, 0.0)
    with pytest.raises(UserError, match=r"recipe: 'tiny' is not one of auto, base, huge, large"):
        build_evaluation("finetune", {"recipe": "tiny"})


def test_the_batch_divides_into_even_shares() -> None:
    settings = FinetuneSettings(batch_size=32)
    assert [global_batch(settings, count, 1) for count in (100, 32, 31)] == [32, 32, 30]
    assert global_batch(settings, 100, 4) == 32
    with pytest.raises(UserError, match=r"batch_size: 32 must divide into even shares for 2 .* 30"):
        global_batch(settings, 31, 2)


SCRIPT = """
import os, sys

rank = {rank}
os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="{port}", ACCELERATE_USE_CPU="true")
from mim.cli.main import main

sys.exit(main({args}))
"""


def pair(folder: Path, args: list[object]) -> list[int | None]:
    """The command line in two processes; returns their exit codes."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = int(place.getsockname()[1])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SERVER_MODULES)
    processes = []
    for rank in (0, 1):
        script = folder / f"rank_{rank}_{port}.py"
        script.write_text(SCRIPT.format(rank=rank, port=port, args=[str(arg) for arg in args]))
        process = context.Process(target=runpy.run_path, args=(str(script), None, "__main__"))
        process.start()
        processes.append(process)
    for process in processes:
        process.join(120)
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
    assert not hanging, "a process waits for the other"
    return [process.exitcode for process in processes]


def test_two_processes_are_one(
    mim: Callable[..., Any], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """All of the recipe, mixing and drop path above all, and the probes' batch norm."""
    one, two = tmp_path / "one", tmp_path / "two"
    deep = {"model.backbone_args": {**ARGS, "embed_dim": 16}}
    assert mim("pretrain", "--config", tiny(deep), "--output", one).code == 0
    shutil.copytree(one, two)
    names = "finetune,linear_mae,attentive"
    settings = ["--set", "epochs=1", "batch_size=32", "fraction=0.1", "--device", "cpu"]
    assert mim("evaluate", names, one, *settings).code == 0
    assert pair(tmp_path, ["evaluate", names, two, *settings]) == [0, 0]
    found, other = (
        json.loads((run / "result.json").read_text())["evaluations"] for run in (one, two)
    )
    for name in names.split(","):
        assert other[name] == pytest.approx(found[name], abs=1e-5), name
    state, twice = (load_file(run / "finetune.safetensors") for run in (one, two))
    for name, value in state.items():
        assert twice[name].numpy() == pytest.approx(value.numpy(), abs=1e-5), name


def rates(recipe: str, name: str = "finetune") -> tuple[Any, list[float]]:
    """The settings of a recipe's evaluation, and its rate in each of four steps an epoch."""
    given = evaluations_of(read_mapping(recipe_file(recipe)))[name]
    settings: Any = build_evaluation(name, given).settings
    steps = 4 * settings.epochs
    task: Any = SimpleNamespace(
        settings=settings, batch_size=settings.batch_size, per_epoch=4, steps=steps
    )
    base_lr = settings.base_lr if name == "finetune" else settings.base_lr[0]
    schedule = ClassificationTask.schedule(task, base_lr)
    return settings, [schedule(step) for step in range(steps)]


@pytest.mark.parametrize(
    "name, epochs, warmup, peak, least",
    [("finetune", 100, 5, 5e-4 * 4, 1e-6), ("linear_mae", 90, 10, 0.1 * 64, 0.0)],
)
def test_mae_s_rates_start_at_0(
    name: str, epochs: int, warmup: int, peak: float, least: float
) -> None:
    """By its formula, from the fraction of an epoch that has passed."""
    _, found = rates("mae-vit-b", name)
    for step, rate in enumerate(found):
        epoch = step / 4
        cosine = 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))
        expected = peak * epoch / warmup if epoch < warmup else least + (peak - least) * cosine
        assert rate == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("recipe", ["simmim-vit-b", "simmim-swin-b"])
def test_simmim_s_rates_are_timm_s(recipe: str) -> None:
    """1.25e-3 from and to 2.5e-7 for 512 images, the cosine from the first step on."""
    settings, found = rates(recipe)
    scale = settings.batch_size / 512
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.25e-3 * scale)
    timm = CosineLRScheduler(
        optimizer,
        t_initial=400,
        lr_min=2.5e-7 * scale,
        warmup_t=80,
        warmup_lr_init=2.5e-7 * scale,
        t_in_epochs=False,
    )
    assert len(found) == 400
    for step, rate in enumerate(found):
        timm.step_update(step)
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-15)
