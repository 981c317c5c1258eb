"""Training: exact resumes after a kill, signals, accumulation, faults, what a run leaves behind."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import keystr, tree_flatten_with_path

import mim as package
from mim.cli.main import main
from mim.compare.runner import SERVER_MODULES
from mim.core.errors import UserError
from mim.model import MaskedImageModel
from mim.training import checkpoint
from mim.training import pretrain as training
from mim.training.metrics import Metrics
from mim.training.pretrain import parts

Mim = Callable[..., Any]
Tiny = Callable[..., Path]

# Waits in every step, so that a kill finds the run in the middle.
SLOW = """
import multiprocessing
import time
import mim.training.pretrain

# As in a process that no fork server has started: workers notice when their parent is killed.
multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)

real = mim.training.pretrain.image_keys

def slow(*args, **kwargs):
    time.sleep(0.2)
    return real(*args, **kwargs)

mim.training.pretrain.image_keys = slow
"""
EXACT = {
    "model.regime.name": "zero",
    "model.backbone_args.attn_drop_rate": 0.1,
    "model.backbone_args.proj_drop_rate": 0.1,
    "data.workers": 2,
    "train.accumulate": 2,
    "train.ema_decay": 0.9,
    "data.batch_size": 128,
    "train.max_steps": 18,  # an epoch and a half
    "train.log_every": 3,
    "train.validate_every": 0.8,
    "train.checkpoint_every": 0.16,  # every two steps: most fall between two logged lines
}


def lines(run: Path, *without: str) -> list[dict[str, Any]]:
    text = (run / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in row.items() if k not in without} for row in rows]


def losses(run: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in lines(run) if "loss" in row}


def final(run: Path) -> dict[str, Any]:
    state = checkpoint.read_checkpoint(checkpoint.checkpoints(run)[-1])
    del state["state"]["elapsed"], state["state"]["train_seconds"]
    return state


def leaves(value: Any) -> dict[str, Any]:
    return {keystr(path): leaf for path, leaf in tree_flatten_with_path(value)[0]}


def assert_identical(left: Any, right: Any) -> None:
    ones, others = leaves(left), leaves(right)
    assert ones.keys() == others.keys()
    for name, one in ones.items():
        other = others[name]
        same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
        assert same, name


def start(*args: object) -> multiprocessing.process.BaseProcess:
    """The command line in a process of its own, which has the libraries loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SERVER_MODULES)
    process = context.Process(target=main, args=([str(arg) for arg in args],))
    process.start()
    return process


def wait_for(found: Callable[[], bool], process: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert process.is_alive(), f"it ended with {process.exitcode} before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def sending(monkeypatch: pytest.MonkeyPatch) -> Callable[..., AbstractContextManager[None]]:
    """``with sending(signal.SIGTERM, 3):`` sends a signal to this process in its third step."""
    real = training.image_keys

    @contextmanager
    def context(number: int, step: int) -> Iterator[None]:
        calls = itertools.count(1)

        def send(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == step:
                os.kill(os.getpid(), number)
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(training, "image_keys", send)
            yield

    return context


def test_a_kill_and_a_resume_change_no_bit(tmp_path: Path, mim: Mim, tiny: Tiny) -> None:
    config, straight, killed = tiny(EXACT), tmp_path / "straight", tmp_path / "killed"
    assert mim("pretrain", "--config", config, "--output", straight).code == 0

    plugin = tmp_path / "slow.py"
    plugin.write_text(SLOW)
    process = start("pretrain", "--config", config, "--output", killed, "--plugins", f"[{plugin}]")
    wait_for(lambda: any(step_of(path) >= 4 for path in checkpoint.checkpoints(killed)), process)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    steps = [step_of(path) for path in checkpoint.checkpoints(killed)]
    assert 4 <= max(steps) < 12, f"killed in the first epoch: {steps}"
    assert not (killed / "result.json").exists()

    assert mim("pretrain", "--config", config, "--output", killed, "--resume", "auto").code == 0
    assert_identical(final(straight), final(killed))
    assert lines(straight, "images_per_second") == lines(killed, "images_per_second")
    names = ("train_loss", "val_loss", "steps", "epochs")
    one, other = (checkpoint.read_result(run) for run in (straight, killed))
    assert {name: one[name] for name in names} == {name: other[name] for name in names}
    assert_identical(*(checkpoint.encoder_weights(run) for run in (straight, killed)))
    # The test would say little if dropout or the average did nothing.
    state = final(straight)
    assert_differs(state["model"], state["ema"])
    assert (
        mim("pretrain", "--config", config, "--output", tmp_path / "plain", *NO_DROPOUT).code == 0
    )
    assert losses(tmp_path / "plain") != losses(straight)


NO_DROPOUT = ("--model.backbone_args.attn_drop_rate=0", "--model.backbone_args.proj_drop_rate=0")


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def assert_differs(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert any(not torch.equal(left[name], right[name]) for name in left)


ATTENTION = {
    "mask.name": "attention",
    "mask.ratio": 0.5,
    "mask.schedule.to": 0.75,
    "mask.schedule.epochs": 1,
    "model.target.name": "ema_features",
    "model.decoder.name": "cross_attention",
    "model.decoder.cross_attention.width": 16,
    "model.decoder.cross_attention.depth": 1,
    "model.decoder.cross_attention.heads": 2,
    "model.teacher_decay": 0.5,
}
LEARNED = {"mask.name": "learned", "mask.learned.width": 8, "train.ema_decay": 0.5}
MOVING = {
    "mask.repeats": 3,
    "mask.unmasked": 0.2,
    "train.accumulate": 2,
    "model.target.name": "ema_features",
    "model.teacher_schedule.shape": "linear",
    "model.teacher_schedule.to": 1.0,
    "optim.schedule.shape": "multistep",
    "optim.schedule.milestones": [2, 4],
    "optim.schedule.unit": "steps",
    "optim.decay_schedule.shape": "cosine",
    "optim.decay_schedule.to": 0.4,
    "optim.scales": [{"names": "backbone.patch_embed.*", "lr": 0.2, "decay": 3.0}],
}
NARROW = {"train.precision": "bf16", "train.weights": "bf16", "train.ema_decay": 0.5}


@pytest.mark.parametrize(
    ("number", "code", "changes"),
    [
        (signal.SIGINT, 130, {}),
        (signal.SIGTERM, 143, {}),
        (signal.SIGUSR1, 138, {}),
        (signal.SIGTERM, 143, ATTENTION),
        (signal.SIGTERM, 143, LEARNED),
        (signal.SIGTERM, 143, NARROW),
        (signal.SIGTERM, 143, MOVING),
    ],
    ids=["SIGINT", "SIGTERM", "SIGUSR1", "teacher", "learned mask", "bf16", "schedules, repeats"],
)
def test_a_signal_ends_the_step_saves_and_exits(
    number: signal.Signals,
    code: int,
    changes: dict[str, Any],
    tmp_path: Path,
    mim: Mim,
    tiny: Tiny,
    sending: Callable[..., AbstractContextManager[None]],
) -> None:
    config, straight, stopped = tiny(changes), tmp_path / "straight", tmp_path / "stopped"
    assert mim("pretrain", "--config", config, "--output", straight).code == 0
    before = signal.getsignal(number)
    with sending(number, 3):
        outcome = mim("pretrain", "--config", config, "--output", stopped)
    assert outcome.code == code
    assert "saved step 3" in outcome.line and number.name in outcome.line
    assert "--resume auto" in outcome.line
    assert [step_of(path) for path in checkpoint.checkpoints(stopped)] == [3]
    assert signal.getsignal(number) is before, "the handler is put back"
    assert mim("pretrain", "--config", config, "--output", stopped, "--resume", "auto").code == 0
    assert_identical(final(straight), final(stopped))
    assert lines(straight, "images_per_second") == lines(stopped, "images_per_second")


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, mim: Mim, tiny: Tiny) -> None:
    config, straight, run = tiny({"train.checkpoint_every": 0.12}), tmp_path / "a", tmp_path / "b"
    assert mim("pretrain", "--config", config, "--output", straight).code == 0
    assert mim("pretrain", "--config", config, "--output", run).code == 0
    older, newest = checkpoint.checkpoints(run)[-2:]
    flip_bit(newest)
    (run / "result.json").unlink()  # as if it had been killed
    outcome = mim("pretrain", "--config", config, "--output", run, "--resume", "auto")
    assert outcome.code == 0
    told = " ".join(outcome.err.split())
    assert newest.name in told and f"resuming from step {step_of(older)}" in told
    assert_identical(final(straight), final(run))
    assert lines(straight, "images_per_second") == lines(run, "images_per_second")


SMALL_FILES = """
import os
import resource

# What is said goes to a file: the process comes from a server with a stderr of its own.
os.dup2(os.open({told!r}, os.O_CREAT | os.O_WRONLY), 2)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
"""


def test_a_checkpoint_that_does_not_fit(tmp_path: Path, mim: Mim, tiny: Tiny) -> None:
    """A limit on the size of files stands for a full disk: the write fails half way."""
    changes = {"train.checkpoint_every": 0.12, "log.tensorboard": False}
    config, straight, run = tiny(changes), tmp_path / "straight", tmp_path / "run"
    assert mim("pretrain", "--config", config, "--output", straight).code == 0
    assert mim("pretrain", "--config", config, "--output", run).code == 0
    older, newest = checkpoint.checkpoints(run)[-2:]
    limit = newest.stat().st_size * 2 // 3
    for path in (newest, checkpoint.digest_file(newest), run / "result.json"):
        path.unlink()
    plugin = tmp_path / "small.py"
    told = tmp_path / "told.txt"
    plugin.write_text(SMALL_FILES.format(limit=limit, told=str(told)))
    again = ("pretrain", "--config", config, "--output", run, "--resume", "auto")
    process = start(*again, "--plugins", f"[{plugin}]")
    process.join(timeout=120)
    last = told.read_text().strip().splitlines()[-1]
    assert "cannot be saved" in last and "the last good one is kept" in last
    assert not newest.exists() and checkpoint.read_checkpoint(older)["step"] == step_of(older)
    assert not list(run.rglob("*.tmp"))
    assert mim(*again).code == 0
    assert_identical(final(straight), final(run))


def test_the_teacher_follows_the_encoder(tmp_path: Path, mim: Mim, tiny: Tiny) -> None:
    config, run = tiny(ATTENTION), tmp_path / "run"
    assert mim("pretrain", "--config", config, "--output", run).code == 0
    after = final(run)["model"]
    before = package.build_model(package.load_config(config)).state_dict()
    name = "blocks.0.attn.qkv.weight"
    encoder, teacher = after[f"backbone.{name}"], after[f"teacher.encoder.{name}"]
    start = before[f"backbone.{name}"]
    assert torch.equal(before[f"teacher.encoder.{name}"], start)
    # Between the start and the encoder, and on its way.
    assert 0 < (teacher - start).norm() < (encoder - start).norm()
    assert 0 < (encoder - teacher).norm() < (encoder - start).norm()


def test_the_ratio_moves_with_the_epoch_in_training_and_not_on_held_out_images(
    tmp_path: Path, mim: Mim, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, set[int]] = {}
    real = MaskedImageModel.draw_mask

    def note(model: MaskedImageModel, *args: Any, epoch: int = -1, **kwargs: Any) -> Any:
        mask = real(model, *args, epoch=epoch, **kwargs)
        seen.setdefault(epoch, set()).add(mask.num_masked)
        return mask

    monkeypatch.setattr(MaskedImageModel, "draw_mask", note)
    # The pictures at the end are of ratios that the run did not see, on purpose.
    monkeypatch.setattr("mim.training.hooks.reconstruct_ratios", lambda *_: {})
    changes = {
        "mask.ratio": 0.25,
        "mask.schedule.to": 0.75,
        "mask.schedule.epochs": 2,
        "data.batch_size": 512,  # three steps an epoch
        "train.epochs": 3,
        "train.max_steps": None,
    }
    assert mim("pretrain", "--config", tiny(changes), "--output", tmp_path / "run").code == 0
    assert seen == {-1: {4}, 0: {4}, 1: {8}, 2: {12}}
    # Tokens are counted by the mean share over the epochs: (12 + 8 + 4) / 3 and a class token.
    assert checkpoint.read_result(tmp_path / "run")["encoder_tokens"] == pytest.approx(9)


def test_a_stop_between_the_last_checkpoint_and_the_result(
    tmp_path: Path, mim: Mim, tiny: Tiny
) -> None:
    run = tmp_path / "run"
    args = ("pretrain", "--config", tiny(), "--output", run, "--resume", "auto")
    assert mim(*args).code == 0
    before = checkpoint.read_result(run)
    (run / "result.json").unlink()
    (run / "encoder.safetensors").unlink()
    assert mim(*args).code == 0
    after = checkpoint.read_result(run)
    assert (run / "encoder.safetensors").is_file()
    for name in ("train_loss", "val_loss", "steps"):
        assert math.isfinite(after[name]), name
        assert after[name] == before[name], name
    assert after["images_per_second"] == pytest.approx(before["images_per_second"], rel=0.01)


def test_accumulated_parts_are_the_whole_batch(tmp_path: Path, mim: Mim, tiny: Tiny) -> None:
    config = tiny({"train.log_every": 1, "data.batch_size": 50, "mask.ratio": [0.4, 0.8]})
    found = []
    for count in (1, 2, 3):  # 50 images do not divide by 3
        run = tmp_path / str(count)
        args = ("--output", run, "--train.accumulate", count)
        assert mim("pretrain", "--config", config, *args).code == 0
        found.append(losses(run))
    assert list(found[0]) == [1, 2, 3, 4, 5, 6]
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=1e-5)
    assert found[0][6] < found[0][1], "it learns"


def test_parts_cover_the_batch_once() -> None:
    for size, count in ((50, 3), (8, 4), (5, 5)):
        cuts = list(parts(range(size), count))  # type: ignore[arg-type]
        covered = [index for cut in cuts for index in range(size)[cut]]
        assert covered == list(range(size))
        lengths = [cut.stop - cut.start for cut in cuts]
        assert len(cuts) == count and max(lengths) - min(lengths) <= 1


NAN = """
import torch
from mim.model.targets import TARGETS, NormalizedPixels

calls = 0

@TARGETS.register("broken")
class Broken(NormalizedPixels):
    def forward(self, images, teacher=None):
        global calls
        calls += self.training
        return super().forward(images, teacher) * (float("nan") if calls == {call} else 1.0)
"""


def test_nan_stops_the_run_and_names_the_images(tmp_path: Path, mim: Mim, tiny: Tiny) -> None:
    plugin = tmp_path / "broken_target.py"
    plugin.write_text(NAN.format(call=6))  # one call measures the cost: this is step 5
    run = tmp_path / "run"
    changes = {"model.target.name": "broken", "plugins": [str(plugin)], "train.log_every": 10}
    changes |= {"train.checkpoint_every": 0.04}
    outcome = mim("pretrain", "--config", tiny(changes), "--output", run)
    assert outcome.code == 1
    assert "step 5" in outcome.line and "nonfinite.json" in outcome.line
    details = json.loads((run / "nonfinite.json").read_text())
    assert details["step"] == 5 and details["loss"] == "nan"
    config = package.load_config(tiny(changes))
    from mim.data import open_source, train_loader

    source = open_source(config.data, "train")
    (batch,) = train_loader(source, config.data, 0, start_step=4, total_steps=5)
    assert details["sample_ids"] == batch.sample_ids.tolist()
    from mim.training.optim import build_schedule

    rate = build_schedule(config.optim, 64, total=6, steps_per_epoch=25)
    assert details["lr"] == pytest.approx(rate(4))
    assert [step_of(path) for path in checkpoint.checkpoints(run)][-1] == 4
    model = package.load(run)
    assert all(p.isfinite().all() for p in model.parameters())
    assert not (run / "result.json").exists()


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, mim: Mim, tiny: Tiny) -> None:
    """A loss can be finite while its gradient is not: the weights would spoil the checkpoint."""
    plugin = tmp_path / "broken_gradient.py"
    plugin.write_text(
        "import torch, mim.training.pretrain\n"
        "real = mim.training.pretrain.build_optimizer\n"
        "def build(config, model, lr):\n"
        "    optimizer = real(config, model, lr)\n"
        "    def spoil(*args):\n"
        "        spoil.calls += 1\n"
        "        if spoil.calls == 4:\n"
        "            next(model.parameters()).grad.fill_(float('inf'))\n"
        "    spoil.calls = 0\n"
        "    optimizer.register_step_pre_hook(spoil)\n"
        "    mim.training.pretrain.build_optimizer = real\n"
        "    return optimizer\n"
        "mim.training.pretrain.build_optimizer = build\n"
    )
    run = tmp_path / "run"
    changes = {"train.checkpoint_every": 0.04, "plugins": [str(plugin)]}
    outcome = mim("pretrain", "--config", tiny(changes), "--output", run)
    assert outcome.code == 1
    assert "step 4" in outcome.line
    assert [step_of(path) for path in checkpoint.checkpoints(run)][-1] == 3
    assert all(p.isfinite().all() for p in package.load(run).parameters())
    assert json.loads((run / "nonfinite.json").read_text())["step"] == 4


def test_what_a_run_leaves(tmp_path: Path, mim: Mim, tiny: Tiny) -> None:
    run = tmp_path / "run"
    changes = {"train.picture_every": 0.08, "train.validate_every": 0.12, "log.tensorboard": True}
    outcome = mim("pretrain", "--config", tiny(changes), "--output", run, "--seed", 3)
    assert outcome.code == 0 and str(run) in outcome.out
    rows = lines(run)
    logged = [row for row in rows if "loss" in row]
    assert [row["step"] for row in logged] == [2, 4, 6]
    assert {"step", "epoch", "loss", "lr", "images_per_second"} <= set(logged[0])
    assert logged[0]["epoch"] == pytest.approx(2 / 25)
    assert [row["step"] for row in rows if "val_loss" in row] == [3, 6]
    result = checkpoint.read_result(run)
    assert result["status"] == "finished" and result["kind"] == "run" and result["steps"] == 6
    assert result["val_loss"] == rows[-1]["val_loss"]
    assert result["train_loss"] == logged[-1]["loss"]
    assert result["encoder_tokens"] == 1 + 4  # the class token, and a quarter of 16 patches
    assert result["flops_backward"] > result["flops_forward"] > 0
    assert result["data"]["train_images"] == 1617 and result["data"]["val_images"] == 180
    assert sorted(p.name for p in (run / "pictures").iterdir()) == [
        f"step_{step:08d}.png" for step in (2, 4, 6)
    ]
    assert (run / "reconstructions.npz").is_file()
    # The config alone runs it again.
    again = tmp_path / "again"
    assert mim("pretrain", "--config", run / "config.yaml", "--output", again).code == 0
    assert losses(again) == losses(run)
    # TensorBoard holds the same curves.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {path.parent for path in (run / "logs").rglob("events*") if curves(path)}
    events = EventAccumulator(str(folder)).Reload()
    shown = {event.step: event.value for event in events.Scalars("loss")}
    assert shown == pytest.approx(losses(run))
    assert [event.step for event in events.Scalars("val_loss")] == [3, 6]
    assert [event.step for event in events.Images("reconstructions")] == [2, 4, 6]


def curves(path: Path) -> bool:
    return b"images_per_second" in path.read_bytes()


def test_a_finished_run_is_not_trained_again(tmp_path: Path, mim: Mim, tiny: Tiny) -> None:
    run = tmp_path / "run"
    args = ("pretrain", "--config", tiny(), "--output", run)
    assert mim(*args).code == 0
    stamps = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    outcome = mim(*args)
    assert outcome.code == 2 and "already holds a run" in outcome.line
    assert mim(*args, "--resume", "auto").code == 0
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()} == stamps


def test_another_seed_is_another_run(tmp_path: Path, mim: Mim, tiny: Tiny) -> None:
    run = tmp_path / "run"
    args = ("pretrain", "--config", tiny(), "--output", run, "--resume", "auto")
    assert mim(*args).code == 0
    outcome = mim(*args, "--seed", 5)
    assert outcome.code == 2
    assert "seed was 0 and is 5" in outcome.line
    # What does not change the numbers may differ.
    assert mim(*args, "--data.workers", 1, "--train.log_every", 5).code == 0


def test_metrics_forget_what_a_checkpoint_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 2, "loss": 1.0}, {"step": 2, "val_loss": 2.0}, {"step": 4, "loss": 0.5}]
    lines = [json.dumps(row).encode() for row in rows]
    damaged = [b"\xff\xfe\x00", b"[1]", b'{"loss": 1.0}', b'{"step": "two"}']
    path.write_bytes(b"\n".join([*damaged, *lines, b'{"step": 6, "lo']))
    with Metrics(path, 2) as metrics:
        metrics.write(step=4, loss=0.25)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        *rows[:2],
        {"step": 4, "loss": 0.25},
    ]


def test_the_held_out_loss_is_the_mean_over_the_images(
    tmp_path: Path, mim: Mim, tiny: Tiny
) -> None:
    """One mask an image, no augmentation, whatever the batch size."""
    run = tmp_path / "run"
    config_file = tiny({"train.max_steps": 1, "mask.ratio": [0.3, 0.9]})
    assert mim("pretrain", "--config", config_file, "--output", run).code == 0
    from mim.data import eval_loader, normalize, open_source

    config, model = checkpoint.read_config(run), package.load(run)
    source = open_source(config.data, "val")
    single = []
    for batch in eval_loader(source, config.data, batch_size=1):
        mask = package.sample_masks(
            config.mask, model.grid, seed=0, epoch=-1, sample_ids=batch.sample_ids
        )
        with torch.no_grad():
            single.append(model(normalize(batch.images, source.mean, source.std), mask).loss.item())
    assert len(single) == 180
    expected = sum(single) / len(single)
    assert checkpoint.read_result(run)["val_loss"] == pytest.approx(expected, rel=1e-5)


def test_bf16_and_gradient_checkpointing_and_clipping_train(
    tmp_path: Path, mim: Mim, tiny: Tiny
) -> None:
    run, plain = tmp_path / "run", tmp_path / "plain"
    config = tiny({"train.log_every": 1})
    assert mim("pretrain", "--config", config, "--output", plain).code == 0
    args = ("--train.precision", "bf16", "--train.gradient_checkpointing", "true")
    args += ("--optim.clip_grad", "1e9")
    assert mim("pretrain", "--config", config, "--output", run, *args).code == 0
    assert losses(run) == pytest.approx(losses(plain), rel=0.03)
    assert losses(run) != losses(plain)
    small = tmp_path / "small"
    assert (
        mim("pretrain", "--config", config, "--output", small, "--optim.clip_grad=1e-9").code == 0
    )
    assert losses(small) != losses(plain)


@pytest.mark.slow
def test_compiled_training_is_the_plain_one_and_resumes(
    tmp_path: Path, mim: Mim, tiny: Tiny, sending: Callable[..., AbstractContextManager[None]]
) -> None:
    changes = {"model.regime.name": "zero", "train.max_steps": 20, "train.log_every": 1}
    plain, compiled = tmp_path / "plain", tmp_path / "compiled"
    assert mim("pretrain", "--config", tiny(changes), "--output", plain).code == 0
    args = ("pretrain", "--config", tiny(changes), "--output", compiled, "--train.compile", True)
    with sending(signal.SIGTERM, 8):
        assert mim(*args).code == 143
    assert mim(*args, "--resume", "auto").code == 0
    one, other = final(plain), final(compiled)
    assert list(one["model"]) == list(other["model"])
    assert losses(plain).keys() == losses(compiled).keys()
    for step, loss in losses(plain).items():
        assert losses(compiled)[step] == pytest.approx(loss, rel=1e-5), step


def test_fp16_needs_a_gpu(tmp_path: Path, mim: Mim, tiny: Tiny) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    args = ("--train.precision", "fp16", "--output", tmp_path / "run")
    outcome = mim("pretrain", "--config", tiny(), *args)
    assert outcome.code == 2 and "needs a GPU" in outcome.line


def test_from_python(tmp_path: Path, tiny: Tiny) -> None:
    config = package.load_config(tiny(), {"output": str(tmp_path / "run"), "mask.ratio": 0.5})
    result = training.pretrain(config)
    assert result["steps"] == 6
    model = package.load(tmp_path / "run")
    assert not model.training
    older = package.load(tmp_path / "run" / "checkpoints" / "step_00000006.pt")
    images = torch.randn(3, 1, 8, 8)
    mask = package.sample_masks(config.mask, (4, 4), seed=0, epoch=0, sample_ids=[1, 2, 3])
    output = model(images, mask)
    assert output.loss.ndim == 0 and output.prediction.shape == (3, 16, 4)
    assert output.latents.tokens.shape == (3, 1 + 8, 16)
    assert torch.equal(output.loss, older(images, mask).loss)
    # Up to rounding: drop projects the patches by a product, timm by a convolution.
    expected = model.backbone.forward_features(images)
    torch.testing.assert_close(model.encode(images), expected, rtol=1e-5, atol=1e-6)
    features = package.encode(model, images)
    assert torch.equal(features, model.encode(images)[:, 1:].mean(1))
    with pytest.raises(UserError, match="no run folder"):
        package.load(tmp_path)


@pytest.mark.slow
def test_wandb_offline_holds_the_curves_and_is_off_otherwise(tmp_path: Path, tiny: Tiny) -> None:
    run = tmp_path / "run"
    code = (
        # timm imports wandb, where there is one, but nobody may start a run unasked.
        "import sys, wandb\n"
        "real, started = wandb.init, []\n"
        "wandb.init = lambda *a, **k: (started.append(k), real(*a, **k))[1]\n"
        "from mim.cli.main import main\n"
        f"assert main(['pretrain', '--config', {str(tiny())!r}, *sys.argv[1:]]) == 0\n"
        "print([k['mode'] for k in started])\n"
    )
    env = {**os.environ, "WANDB_SILENT": "true"}

    def call(*args: str) -> str:
        command = [sys.executable, "-c", code, *args]
        done = subprocess.run(
            command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
        return [line for line in done.stdout.splitlines() if line.startswith("[")][-1]

    assert call("--output", str(tmp_path / "plain")) == "[]"
    assert not list(tmp_path.rglob("*.wandb"))
    assert call("--output", str(run), "--log.wandb", "offline") == "['offline']"
    (file,) = run.rglob("*.wandb")
    content = file.read_bytes()
    for name in (b"loss", b"val_loss", b"images_per_second", b"model.regime.name"):
        assert name in content, name


HOOK = """
from mim.training.hooks import HOOKS
from mim.training.trainer import Hook

@HOOKS.register("largest_weight")
class LargestWeight(Hook):
    name = "largest_weight"

    def __init__(self, config):
        self.count = 0

    def due(self, trainer):
        return trainer.state.step % 2 == 0

    def run(self, trainer):
        self.count += 1
        weights = trainer.task.model.parameters()
        largest = max(float(weight.detach().abs().max()) for weight in weights)
        trainer.log(largest_weight=largest, measured=self.count)

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]
"""


def test_a_hook_of_a_plug_in_and_the_norm_of_the_gradient(
    tmp_path: Path, mim: Mim, tiny: Tiny, sending: Callable[..., AbstractContextManager[None]]
) -> None:
    plugin, run = tmp_path / "largest.py", tmp_path / "run"
    plugin.write_text(HOOK)
    changes = {"plugins": [str(plugin)], "log.grad_norm": True, "train.log_every": 1}
    args = ("pretrain", "--config", tiny(changes), "--output", run)
    args = (*args, "--train.hooks", '["largest_weight"]')
    with sending(signal.SIGTERM, 3):
        assert mim(*args).code == 143
    assert mim(*args, "--resume", "auto").code == 0
    found = [row for row in lines(run) if "largest_weight" in row]
    assert [(row["step"], row["measured"]) for row in found] == [(2, 1), (4, 2), (6, 3)]
    assert all(row["largest_weight"] > 0 for row in found)
    norms = [row["grad_norm"] for row in lines(run) if "loss" in row]
    assert len(norms) == 6 and all(norm > 0 for norm in norms)
    plain = tmp_path / "plain"
    assert mim("pretrain", "--config", tiny({"train.log_every": 1}), "--output", plain).code == 0
    assert losses(plain) == losses(run), "neither changes what is computed"
    refused = mim(*args[:-1], '["nobody"]', "--resume", "auto")
    assert (
        refused.code == 2 and "train.hooks: 'nobody' is not one of largest_weight" in refused.line
    )
