"""Faster ways to the same numbers, and what measures them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mim import build_model, load_config
from mim.core.cpu.kernels import tune
from mim.model.backbones import family_of

Mim = Callable[..., Any]
Tiny = Callable[..., Path]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def noise() -> Tensor:
    return torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("precision, atol", [("fp32", 1e-4), ("bf16", 2e-2)])
@pytest.mark.parametrize("regime", ["drop", "zero", "token"])
def test_plain_attention_learns_as_fused_does(
    regime: str, precision: str, atol: float, tiny: Tiny, losses_of: Callable[..., list[float]]
) -> None:
    path = tiny({"model.backbone_args": {"qk_norm": True, "depth": 2, "patch_size": 2}})
    config = load_config(path, {"model.regime.name": regime})

    def losses(kind: str) -> list[float]:
        model = build_model(config)
        tune(model, CPU, precision, attention=kind, linear="torch")
        return losses_of(model, config, precision)

    plain, fused, auto = (losses(kind) for kind in ("plain", "fused", "auto"))
    assert plain == pytest.approx(fused, abs=atol)
    assert plain != fused, "both took one way"
    assert auto == (plain if precision == "bf16" else fused)
    assert fused[-1] < fused[0]


def test_what_auto_chooses(tiny: Tiny) -> None:
    model = build_model(load_config(tiny()))
    for device, precision, is_fused in (
        (CPU, "fp32", True),
        (CPU, "bf16", False),
        (CUDA, "bf16", True),
        (CUDA, "fp16", True),
    ):
        tune(model, device, precision)
        flags = [m.fused_attn for m in model.modules() if hasattr(m, "fused_attn")]
        assert flags == [is_fused] * 2, "one block in the encoder and one in the decoder"


@pytest.mark.parametrize(
    "args",
    [{}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 2}, {"no_embed_class": True}],
    ids=["class token", "no prefix", "registers", "no_embed_class"],
)
def test_visible_patches_are_embedded_as_among_all(args: dict[str, Any], tiny: Tiny) -> None:
    changes = {f"model.backbone_args.{name}": value for name, value in args.items()}
    vit = build_model(load_config(tiny(changes))).double().backbone
    nn.init.normal_(vit.pos_embed)
    family, images = family_of(vit), noise().double()
    ids = torch.stack([torch.randperm(16)[:5] for _ in range(8)])
    some = family.embed_at(images, ids)
    among = family.take(family.place(family.embed(images)), ids)
    assert some is not None
    torch.testing.assert_close(some.tokens, among.tokens, rtol=1e-12, atol=1e-12)
    # The same gradient in the weights, too.
    names = ["patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed"]
    weights = [vit.get_parameter(name) for name in names]
    ones, others = (torch.autograd.grad(x.tokens.pow(3).sum(), weights) for x in (some, among))
    for name, one, other in zip(names, ones, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10, msg=name)


def test_dropped_positions_go_the_long_way(tiny: Tiny) -> None:
    vit = build_model(load_config(tiny({"model.backbone_args.pos_drop_rate": 0.1}))).backbone
    ids = torch.zeros(8, 2, dtype=torch.int64)
    assert family_of(vit.train()).embed_at(noise(), ids) is None
    assert family_of(vit.eval()).embed_at(noise(), ids) is not None


@pytest.mark.slow
def test_a_peer_can_be_compiled(tmp_path: Path, mim: Mim, tiny: Tiny) -> None:
    pytest.importorskip("transformers")
    changes = {"model.position_embedding": "sincos2d", "data.channels": 3, "data.source": "photos"}
    config, numbers = tiny(changes), tmp_path / "numbers.json"
    call = ("bench", "step", "--config", config, "--rounds", 1, "--steps", 1, "--regimes", "drop")
    done = mim(*call, "--data.batch_size", 4, "--peer", "hf,hf-compiled", "--json", numbers)
    assert done.code == 0, done.err
    peers = json.loads(numbers.read_text())["peers"]
    assert peers["hf"]["loss"] == pytest.approx(peers["hf-compiled"]["loss"], abs=0.1)


def test_beside_a_peer(tmp_path: Path, mim: Mim, tiny: Tiny) -> None:
    pytest.importorskip("transformers")
    changes = {"model.position_embedding": "sincos2d", "data.channels": 3, "data.source": "photos"}
    config, numbers, table = tiny(changes), tmp_path / "numbers.json", tmp_path / "table.md"
    call = ("bench", "step", "--config", config, "--rounds", 2, "--steps", 1, "--regimes", "drop")
    settings = ("--train.precision", "bf16", "--data.batch_size", 4)
    done = mim(*call, *settings, "--peer", "hf", "--json", numbers, "--append", table)
    assert done.code == 0, done.err
    figures = json.loads(numbers.read_text())
    assert figures["precision"] == "bf16" and figures["batch_size"] == 4
    ours, peer = figures["regimes"]["drop"], figures["peers"]["hf"]
    assert ours["ratio_to_fastest_peer"] > 0 and "ratio_to_fastest_peer" not in peer
    assert ours["encoder_tokens"] == peer["encoder_tokens"] == 5
    assert 0 < ours["flops_forward"] < peer["flops_forward"], "it embeds hidden patches too"
    for row in (ours, peer):
        assert row["utilisation"] > 0 and 0.5 < row["loss"] < 2
    assert "| peer hf |" in table.read_text() and "--peer hf" in table.read_text()
    assert "'nobody'" in mim(*call, "--peer", "nobody").line


def test_variants_of_a_config_are_timed_beside_its_regimes(
    tmp_path: Path, mim: Mim, tiny: Tiny
) -> None:
    call = ("bench", "step", "--config", tiny({"data.batch_size": 8}), "--rounds", 1, "--steps", 1)
    call = (*call, "--regimes", "drop", "--json", tmp_path / "numbers.json")
    few = {"model.regime.name": "zero", "model.regime.zero.predict_share": 0.25}
    few["model.decoder.name"] = "mlp"
    variants = {"few": few, "half": {"data.batch_size": 4}}
    done = mim(*call, "--variants", json.dumps(variants))
    assert done.code == 0, done.err
    rows = json.loads((tmp_path / "numbers.json").read_text())["regimes"]
    assert list(rows) == ["drop", "few", "half"]
    assert rows["drop"]["ratio_to_first"] == 1.0
    assert rows["few"]["encoder_tokens"] > rows["drop"]["encoder_tokens"]
    for row in rows.values():  # one round: a ratio of speeds, whatever the batch
        speed = row["images_per_second"] / rows["drop"]["images_per_second"]
        assert row["ratio_to_first"] == pytest.approx(speed)
    for bad in ("[", '{"x": 1}'):
        refused = mim(*call, "--variants", bad)
        assert refused.code == 2 and "--variants" in refused.line and "mapping" in refused.line
    assert "--variants" in mim(*call, "--variants", '{"drop": {}}').line
