"""Linear layers by another library: the same numbers, weights and steps, up to rounding."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mim.core.cpu.kernels
import mim.core.cpu.linear
from mim import Config, build_model, load_config
from mim.core.config import DataConfig
from mim.core.cpu.kernels import tune
from mim.core.cpu.linear import (
    Linear,
    has_onednn,
    linear_of,
    mkl_lacks_avx512,
    onednn_linear,
)
from mim.data import open_source
from mim.evaluate import Encoder, extract_features
from mim.model.backbones import family_of
from mim.training.runtime.cost import count_flops

Mim = Callable[..., Any]
Tiny = Callable[..., Path]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")

needs_onednn = pytest.mark.skipif(not has_onednn(), reason="torch has no oneDNN on this machine")


@pytest.fixture(autouse=True)
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small products, too, go by oneDNN."""
    monkeypatch.setattr(mim.core.cpu.linear, "_LEAST", 0)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def calls(work: Callable[[], Any]) -> int:
    """How often oneDNN's product is called."""
    with torch.profiler.profile() as profile:
        work()
    return sum(e.count for e in profile.key_averages() if e.key == "mkldnn::_linear_pointwise")


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inner, outer", [(7, 30), (30, 7)])  # either operand may be copied
@pytest.mark.parametrize("front", [(11,), (3, 5), (2, 3, 4)])
def test_values_and_gradients(front: tuple[int, ...], inner: int, outer: int, bias: bool) -> None:
    found = []
    for linear in (onednn_linear, F.linear):
        x, weight = random(*front, inner).requires_grad_(), random(outer, inner).requires_grad_()
        offset = random(outer).requires_grad_() if bias else None
        out = linear(x, weight, offset)
        out.backward(random(*front, outer, seed=1))
        grads = [value.grad for value in (x, weight, offset) if value is not None]
        found.append([out.detach(), *grads])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    x = random(*front, inner)
    assert calls(lambda: onednn_linear(x, random(outer, inner))) == 1, "it did not go by oneDNN"


@needs_onednn
def test_operands_that_are_not_contiguous() -> None:
    x, weight = random(9, 5, 12).transpose(0, 1)[:, ::2], random(12, 8).t()
    assert not x.is_contiguous() and not weight.is_contiguous()
    torch.testing.assert_close(onednn_linear(x, weight), F.linear(x, weight), rtol=1e-5, atol=1e-5)


@needs_onednn
def test_gradients_that_nobody_asks_for_are_not_computed() -> None:
    x, weight = random(6, 4), random(5, 4).requires_grad_()
    assert calls(lambda: onednn_linear(x, weight).sum().backward()) == 2
    weight.grad = None
    assert calls(lambda: onednn_linear(x.requires_grad_(), weight).sum().backward()) == 3


@needs_onednn
def test_a_gradient_of_the_gradient() -> None:
    found = []
    for linear in (onednn_linear, F.linear):
        x, weight = random(6, 4).requires_grad_(), random(5, 4).requires_grad_()
        (first,) = torch.autograd.grad(linear(x, weight).pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [x, weight]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@needs_onednn
def test_what_goes_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = random(6, 4), random(5, 4)
    assert calls(lambda: onednn_linear(x, weight)) == 1
    assert calls(lambda: onednn_linear(x.double(), weight.double())) == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert calls(lambda: onednn_linear(x, weight)) == 0
        assert onednn_linear(x, weight).dtype == torch.bfloat16
    monkeypatch.setattr(mim.core.cpu.linear, "_LEAST", 6 * 4 * 5 + 1)
    assert calls(lambda: onednn_linear(x, weight)) == 0
    assert onednn_linear(x.to("meta"), weight.to("meta")).shape == (6, 5)


@needs_onednn
def test_a_model_keeps_its_weights_and_their_names(tiny: Tiny) -> None:
    model = build_model(load_config(tiny()))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tune(model, CPU, linear="onednn")
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert layers and all(type(layer) is Linear for layer in layers)
    for same in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in same.modules()] == [type(m) for m in model.modules()]
        after = same.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], value) for name, value in before.items())
    tune(model, CPU, linear="torch")
    assert all(type(layer) is nn.Linear for layer in layers)


def test_what_auto_chooses(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(load_config(tiny()))
    block, conv = model.backbone.blocks[0], model.backbone.patch_embed.proj
    for able, pays, kind, device, precision, chosen in (
        (True, True, "auto", CPU, "fp32", True),
        (True, False, "auto", CPU, "fp32", False),
        (True, False, "onednn", CPU, "fp32", True),
        (True, True, "torch", CPU, "fp32", False),
        (True, True, "auto", CPU, "bf16", False),
        (True, True, "onednn", CUDA, "fp32", False),
        (False, True, "onednn", CPU, "fp32", False),
    ):
        monkeypatch.setattr(mim.core.cpu.linear, "has_onednn", lambda able=able: able)
        monkeypatch.setattr(mim.core.cpu.linear, "mkl_lacks_avx512", lambda pays=pays: pays)
        tune(model, device, precision, linear=kind)
        case = (able, pays, kind, device, precision)
        assert (type(block.mlp.fc1) is Linear) == chosen, case
        assert (linear_of(block.attn.qkv) is onednn_linear) == chosen, case
        assert (linear_of(conv) is onednn_linear) == chosen, case


@needs_onednn
def test_visible_patches_are_embedded_so(tiny: Tiny) -> None:
    vit, found = build_model(load_config(tiny())).backbone, []
    family, ids = family_of(vit), torch.tensor([[0, 3, 5]] * 8)
    for kind in ("onednn", "torch"):
        tune(vit, CPU, linear=kind)
        count = calls(lambda: found.append(family.embed_at(random(8, 1, 8, 8), ids)))
        assert count == (kind == "onednn")
    torch.testing.assert_close(found[0].tokens, found[1].tokens, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "capability, vendor, wanted",
    [
        ("AVX512", "AuthenticAMD", True),
        ("AVX512", "GenuineIntel", False),
        ("AVX2", "AuthenticAMD", False),
    ],
)
def test_which_processors(
    capability: str, vendor: str, wanted: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told = tmp_path / "cpuinfo"
    told.write_text(f"processor : 0\nvendor_id : {vendor}\n")
    monkeypatch.setattr(mim.core.cpu.linear, "_CPUINFO", told)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert mkl_lacks_avx512.__wrapped__() == wanted
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert not mkl_lacks_avx512.__wrapped__(), "without MKL, torch has another library to choose"


Losses = Callable[..., list[float]]


def losses(losses_of: Losses, config: Config, kind: str, compiled: bool = False) -> list[float]:
    model = build_model(config)
    tune(model, CPU, linear=kind)
    if compiled:
        model.compile()
    return losses_of(model, config)


_SPLIT = {"model.regime.name": "zero", "model.decoder.name": "mlp"}


@needs_onednn
@pytest.mark.parametrize(
    "changes",
    [
        {"model.regime.name": "drop"},
        {"model.regime.name": "zero"},
        {**_SPLIT, "model.regime.zero.predict_share": 0.25},
        {"model.regime.name": "token"},
        {"model.decoder.name": "cross_attention"},
    ],
    ids=["drop", "zero", "a share of zero", "token", "cross-attention"],
)
def test_it_learns_as_torch_does(changes: dict[str, Any], tiny: Tiny, losses_of: Losses) -> None:
    config = load_config(tiny({"model.backbone_args": {"depth": 2, "patch_size": 2}}), changes)
    one, other = (losses(losses_of, config, kind) for kind in ("onednn", "torch"))
    assert one == pytest.approx(other, rel=1e-4)
    assert one != other, "both took one way"
    assert one[-1] < one[0]


@needs_onednn
@pytest.mark.slow
def test_it_learns_as_torch_does_also_compiled(tiny: Tiny, losses_of: Losses) -> None:
    config = load_config(tiny({"model.backbone_args": {"depth": 2, "patch_size": 2}}))
    compiled: list[float] = []
    assert calls(lambda: compiled.extend(losses(losses_of, config, "onednn", compiled=True))) > 0
    assert compiled == pytest.approx(losses(losses_of, config, "torch"), rel=1e-4)


@needs_onednn
def test_operations_are_counted_alike(tiny: Tiny) -> None:
    """By torch's counter, in a whole step and by hand."""
    counts = []
    for kind in ("onednn", "torch"):
        model = build_model(load_config(tiny()))
        tune(model, CPU, linear=kind)
        counts.append(count_flops(model, random(8, 1, 8, 8), torch.arange(8)))
    assert counts[0] == counts[1]
    x, layer = random(11, 3), nn.Linear(3, 5)
    tune(layer, CPU, linear="onednn")
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 11 * 3 * 5)


@needs_onednn
def test_a_run_trains_so_and_goes_on_the_other_way(tmp_path: Path, mim: Mim, tiny: Tiny) -> None:
    """The setting reaches the steps, and is no part of what a run is: only rounding differs."""

    def curve(run: Path) -> list[float]:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [row["loss"] for row in rows if "loss" in row]

    config = tiny({"train.log_every": 1, "train.checkpoint_every": 0.1})
    runs = {}
    for kind in ("onednn", "torch"):
        runs[kind] = tmp_path / kind
        args = ("pretrain", "--config", config, "--output", runs[kind], "--train.linear", kind)
        codes: list[int] = []
        count = calls(lambda args=args, codes=codes: codes.append(mim(*args).code))
        assert codes == [0] and (count > 0) == (kind == "onednn")
    one, other = (curve(run) for run in runs.values())
    assert one == pytest.approx(other, rel=1e-4)
    last = sorted((runs["onednn"] / "checkpoints").glob("*.pt"))[-1]
    last.unlink()
    assert len(list((runs["onednn"] / "checkpoints").glob("*.pt"))) == 1
    args = ("pretrain", "--config", config, "--output", runs["onednn"], "--resume", "auto")
    assert mim(*args, "--train.linear", "torch").code == 0
    assert curve(runs["onednn"]) == pytest.approx(other, rel=1e-4)
    refused = mim(*args, "--train.linear", "mkl")
    assert refused.code == 2 and "train.linear" in refused.line and "onednn" in refused.line


@needs_onednn
def test_features_are_computed_so(monkeypatch: pytest.MonkeyPatch) -> None:
    data = DataConfig(source="digits", image_size=8, channels=1)
    sizes = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 24, "depth": 2}
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, num_heads=2, **sizes).eval()
    source, found = open_source(data, "val"), []
    for takes in (True, False):
        monkeypatch.setattr(mim.core.cpu.kernels, "takes_onednn", lambda kind, takes=takes: takes)
        values: list[Tensor] = []

        def extract(values: list[Tensor] = values) -> None:
            values.append(extract_features(Encoder("a ViT", "timm", data, vit), source).values)

        assert (calls(extract) > 0) == takes
        found += values
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
