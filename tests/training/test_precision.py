"""Weights in bfloat16 whose small updates are kept, and linear layers in float8."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mim import Config, build_model, load_config
from mim.core.config import OptimConfig, TrainConfig
from mim.core.errors import UserError
from mim.training import checkpoint
from mim.training.optim import CompensatedAdamW, build_optimizer
from mim.training.runtime.cost import count_flops
from mim.training.runtime.precision import autocast, model_on, narrow_weights

Mim = Callable[..., Any]
Tiny = Callable[..., Path]
Launch = Callable[..., Any]
Losses = Callable[..., list[float]]
CPU = torch.device("cpu")
NARROW = {"train.precision": "bf16", "train.weights": "bf16"}
# Sides of a float8 product are multiples of 16.
DEEP = {"model.backbone_args": {"depth": 2, "patch_size": 2}}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trained(kind: type[torch.optim.AdamW], start: Tensor, steps: int, **how: Any) -> Any:
    """A parameter after steps along gradients that bfloat16 can hold, and its optimizer."""
    weight = nn.Parameter(start.clone())
    optimizer = kind([weight], fused=True, **how)
    for step in range(steps):
        weight.grad = random(*start.shape, seed=step + 1).bfloat16().to(start.dtype)
        optimizer.step()
    return weight.detach().float(), optimizer


def whole_weight(weight: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    (state,) = optimizer.state.values()
    return weight + state["remainder"].float()


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999)])
def test_small_updates_are_kept(betas: tuple[float, float]) -> None:
    """They end within 3 % of the way of AdamW's in float32; plain bfloat16 loses them."""
    start = (1 + random(64, 8).abs()).bfloat16().float()
    how = {"lr": 1e-4, "betas": betas, "weight_decay": 0.05}
    exact, _ = trained(torch.optim.AdamW, start, 200, **how)
    ours, optimizer = trained(CompensatedAdamW, start.bfloat16(), 200, **how)
    rounded, _ = trained(torch.optim.AdamW, start.bfloat16(), 200, **how)
    way = (exact - start).norm()
    assert (whole_weight(ours, optimizer) - exact).norm() < 0.03 * way
    assert torch.equal(ours, whole_weight(ours, optimizer).bfloat16().float()), "it is the nearest"
    assert (rounded - exact).norm() > 0.9 * way, "the test would say little otherwise"


def test_weight_decay_and_one_step_by_hand() -> None:
    """A gradient of 0 leaves the decay alone, 1 - lr * 0.1 of the weight a step."""
    weight = nn.Parameter(torch.tensor([2.0], dtype=torch.bfloat16))
    optimizer = CompensatedAdamW([weight], lr=1e-3, weight_decay=0.1, fused=True)
    for _ in range(10):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    assert weight.item() == 2.0, "0.002 is less than half of the way to the next bfloat16"
    assert whole_weight(weight.float(), optimizer).item() == pytest.approx(2 * 0.9999**10, abs=1e-5)
    # A first step of Adam goes by lr along the gradient's sign.
    weight = nn.Parameter(torch.tensor([2.0], dtype=torch.bfloat16))
    optimizer = CompensatedAdamW([weight], lr=1e-3, weight_decay=0.0, fused=True)
    weight.grad = torch.full_like(weight, -3.0)
    optimizer.step()
    assert whole_weight(weight.float(), optimizer).item() == pytest.approx(2.001, abs=1e-6)


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    weight = nn.Parameter(random(8, 8).bfloat16())
    optimizer = CompensatedAdamW([weight], lr=1e-3, fused=True)
    for step in range(3):
        weight.grad = random(8, 8, seed=step).bfloat16()
        optimizer.step()
    (state,) = optimizer.state.values()
    before = [value.clone() for value in (weight.detach(), *state.values())]
    weight.grad = torch.full_like(weight, torch.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    for one, other in zip(before, (weight.detach(), *state.values()), strict=True):
        assert torch.equal(one, other)


def test_what_is_narrow_and_what_it_takes(tiny: Tiny) -> None:
    changes = {**NARROW, "model.target.name": "ema_features", "model.teacher_decay": 0.999}
    config = load_config(tiny(changes))
    model = model_on(config, CPU)
    ids = torch.arange(4)
    narrow_weights(model, config.train)
    kinds = {name.split(".")[0]: p.dtype for name, p in model.named_parameters()}
    assert kinds.pop("teacher") == torch.float32, "its steps of 0.001 would be lost"
    assert set(kinds) == {"backbone", "decoder"} and set(kinds.values()) == {torch.bfloat16}
    optimizer = build_optimizer(OptimConfig(), model, 1e-3)
    images = random(4, 1, 8, 8)
    mask = model.draw_mask(images, ids, sample_ids=ids)
    with autocast("bf16", CPU):
        model(images, mask).loss.backward()
    optimizer.step()
    teacher = model.teacher
    assert teacher is not None
    before = teacher.encoder.blocks[0].mlp.fc1.weight.clone()
    model.update_teacher()
    after, new = teacher.encoder.blocks[0].mlp.fc1.weight, model.backbone.blocks[0].mlp.fc1.weight
    torch.testing.assert_close(after, before.lerp(new.float(), 0.001), rtol=0, atol=1e-7)
    assert not torch.equal(after, before)
    for parameter, state in optimizer.state.items():
        tensors = [parameter, parameter.grad, *(v for k, v in state.items() if k != "step")]
        size = parameter.numel()
        assert sum(v.numel() * v.element_size() for v in tensors) == 12 * size


@pytest.mark.parametrize(
    "changes, precision, tolerance",
    [
        ({"train.weights": "bf16"}, "bf16", 0.02),
        ({}, "fp8", 0.05),
        ({"train.weights": "bf16", "model.regime.name": "zero"}, "fp8", 0.05),
        ({"model.regime.name": "token"}, "fp8", 0.05),
    ],
    ids=["bf16 weights", "fp8", "zero, both", "token, fp8"],
)
def test_it_learns_as_float32_does(
    changes: dict[str, Any], precision: str, tolerance: float, tiny: Tiny, losses_of: Losses
) -> None:
    config = load_config(tiny(DEEP), {**changes, "train.precision": precision})
    model = model_on(config, CPU)
    narrow_weights(model, config.train)
    found = losses_of(model, config, precision)
    plain = load_config(tiny(DEEP), {"model.regime.name": config.model.regime.name})
    wide = losses_of(model_on(plain, CPU), plain)
    assert found == pytest.approx(wide, rel=tolerance) and found != wide
    assert found[-1] < found[0]


def test_float8_is_in_the_blocks_alone(tiny: Tiny) -> None:
    config = load_config(tiny(DEEP), {"train.precision": "fp8"})
    model, plain = model_on(config, CPU), build_model(config)
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert {name for name, kind in kinds.items() if kind == "Float8Linear"} == {
        f"{block}.{layer}"
        for block in ("backbone.blocks.0", "backbone.blocks.1", "decoder.blocks.0")
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert kinds["decoder.embed"] == kinds["decoder.head"] == "Linear"
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in model.state_dict().items())
    images, ids = random(8, 1, 8, 8), torch.arange(8)
    assert count_flops(model, images, ids) == count_flops(plain, images, ids)
    # Rows of 24 do not fit the products of a GPU, so they are left as they are.
    odd = {"model.backbone_args": {"depth": 1, "patch_size": 2, "embed_dim": 24}}
    vit = model_on(load_config(tiny(odd), {"train.precision": "fp8"}), CPU).backbone
    assert not any(type(module).__name__ == "Float8Linear" for module in vit.modules())


def test_a_float8_product_by_hand(tiny: Tiny) -> None:
    """Three bits behind the leading one: 448 and 26 are exact, 27 is rounded to 28."""
    model = model_on(load_config(tiny(DEEP), {"train.precision": "fp8"}), CPU)
    layer = model.backbone.blocks[0].attn.proj
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[0, 0], layer.weight[1, 1], layer.weight[2, 2] = 448.0, 1.0, 1.0
        layer.bias.fill_(0.5)
    x = torch.zeros(1, layer.in_features)
    x[0, :4] = torch.tensor([448.0, 26.0, 27.0, 1.0])
    found = layer(x)[0, :4].tolist()  # the largest value is 448, so that nothing is scaled
    assert found == [448.0 * 448.0 + 0.5, 26.5, 28.5, 0.5]


def test_a_run_with_both(tmp_path: Path, mim: Mim, tiny: Tiny) -> None:
    """It says what is emulated, logs, and leaves an encoder in float32 that others read."""
    run = tmp_path / "run"
    args = ("--train.precision", "fp8", "--train.weights", "bf16", "--train.validate_every", 0.16)
    outcome = mim("pretrain", "--config", tiny(), "--output", run, *args)
    assert outcome.code == 0 and outcome.err.count("emulated here") == 1
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len([row for row in rows if "val_loss" in row]) == 2
    encoder = load_file(run / "encoder.safetensors")
    saved = checkpoint.read_checkpoint(checkpoint.checkpoints(run)[-1])["model"]
    assert all(value.dtype == torch.float32 for value in encoder.values())
    for name, value in encoder.items():
        assert torch.equal(value, saved[f"backbone.{name}"].float()), name
    assert saved["backbone.norm.weight"].dtype == torch.bfloat16
    assert mim("evaluate", "knn", run).code == 0
    assert mim("visualize", "reconstruct", run, "--output", tmp_path / "pictures").code == 0


@pytest.mark.parametrize("shard", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_processes_keep_narrow_weights_alike(
    shard: bool, tmp_path: Path, mim: Mim, tiny: Tiny, ranks: Launch
) -> None:
    often = {"train.log_every": 1, "train.checkpoint_every": 0.08}
    config = tiny({**NARROW, **often, "train.shard": shard})
    one, two = tmp_path / "one", tmp_path / "two"
    assert mim("pretrain", "--config", config, "--output", one).code == 0
    started = ranks(["pretrain", "--config", config, "--output", two])
    assert started.wait() == [0, 0], started.texts()
    results = [checkpoint.read_result(run) for run in (one, two)]
    assert results[1]["val_loss"] == pytest.approx(results[0]["val_loss"], rel=2e-3)
    states = [checkpoint.read_checkpoint(checkpoint.checkpoints(r)[-1]) for r in (one, two)]
    for number, state in states[0]["optimizer"]["state"].items():
        for name, value in state.items():
            other = states[1]["optimizer"]["state"][number][name]
            assert other.shape == value.shape and other.dtype == value.dtype
    # One process goes on from step 4 of what two have written.
    (two / "result.json").unlink()
    checkpoint.checkpoints(two)[-1].unlink()
    assert checkpoint.read_checkpoint(checkpoint.checkpoints(two)[-1])["step"] == 4
    assert mim("pretrain", "--config", config, "--output", two, "--resume", "auto").code == 0
    again = checkpoint.read_result(two)
    assert again["steps"] == 6
    assert again["val_loss"] == pytest.approx(results[0]["val_loss"], rel=2e-3)


def test_mistakes(tiny: Tiny, mim: Mim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("pretrain", "--config", tiny(), "--output", tmp_path / "run")
    for given, told in (
        (
            ("--train.precision", "fp4"),
            "train.precision: 'fp4' is not one of bf16, fp16, fp32, fp8",
        ),
        (("--train.weights", "fp16"), "train.weights: 'fp16' is not one of bf16, fp32"),
        (("--train.weights", "bf16"), "train.weights: 'bf16' needs train.precision bf16 or fp8"),
        (
            ("--train.weights=bf16", "--train.precision=bf16", "--mask.name=learned"),
            "does not work with a trained mask generator",
        ),
    ):
        outcome = mim(*args, *given)
        assert outcome.code == 2 and told in outcome.line, outcome.err
    monkeypatch.setitem(sys.modules, "torchao", None)
    outcome = mim(*args, "--train.precision", "fp8")
    assert outcome.code == 2 and "needs torchao: pip install -e '.[float8]'" in outcome.line
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_an_older_gpu_has_no_float8(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    import mim.training.runtime.precision as subject

    model = build_model(load_config(tiny()))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an A100")
    with pytest.raises(UserError, match=r"capability 8\.9 or more, which an A100 is not"):
        subject._use_float8(model, torch.device("cuda"))


def test_defaults_keep_everything_wide(tiny: Tiny) -> None:
    assert TrainConfig().weights == "fp32" and Config().train.precision == "fp32"
    config = load_config(tiny({"train.precision": "bf16"}))
    model = model_on(config, CPU)
    narrow_weights(model, config.train)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert type(build_optimizer(OptimConfig(), model, 1e-3)) is torch.optim.AdamW
