"""CAPI's encoder and predictor: against a plain form of their description, and across regimes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mim import load_config
from mim.core.rng import image_keys
from mim.masks import PatchMask
from mim.model import MaskedImageModel, build_model
from mim.model.backbones.capi import border_places, residual
from tests.model.targets.test_target_clusters import CAPI

GRID, WIDTH, HEADS = 4, 16, 2


def model_of(**changes: Any) -> MaskedImageModel:
    return build_model(load_config(None, {**CAPI, **changes})).double()


def batch(model: MaskedImageModel, ratio: Any = None) -> tuple[Tensor, PatchMask]:
    ids = torch.arange(6)
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(2)).double()
    return images, model.draw_mask(images, image_keys(0, 0, ids), epoch=0, sample_ids=ids)


# --- The plain form, in NumPy --------------------------------------------------------------------


def turned(x: Any, places: Any) -> Any:
    """Channels (L, d) of a head at places (L, 2)."""
    d = x.shape[-1]
    cycles = [7 * (7 / 7e-4) ** (-j / (d // 4 - 1) if d > 4 else 0) for j in range(d // 4)]
    out = np.empty_like(x)
    for j in range(d):
        axis, place = (0, j) if j < d // 2 else (1, j - d // 2)
        angle = 2 * math.pi * cycles[place % (d // 4)] * places[:, axis]
        partner = -x[:, j + d // 2] if j < d // 2 else x[:, j - d // 2]
        out[:, j] = x[:, j] * np.cos(angle) + partner * np.sin(angle)
    return out


def rms(x: Any, weight: Any = 1.0) -> Any:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight


def attended(queries: Any, memory: Any, at: Any, memory_at: Any, q: Any, k: Any, v: Any) -> Any:
    heads = []
    for head in range(HEADS):
        part = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
        one = turned(queries @ q[part].T, at)
        scores = one @ turned(memory @ k[part].T, memory_at).T / math.sqrt(WIDTH // HEADS)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        heads.append(shares / shares.sum(-1, keepdims=True) @ (memory @ v[part].T))
    return np.concatenate(heads, axis=-1)


def gelu(x: Any) -> Any:
    return torch.nn.functional.gelu(torch.from_numpy(x)).numpy()


def registers_at(places: Any, count: int = 4) -> Any:
    """On the border of the box around places: corner, then clockwise, down the rows first."""
    low, high = places.min(axis=0), places.max(axis=0)
    corners = {4: [(0, 0), (1, 0), (1, 1), (0, 1)]}[count]
    return low + np.array(corners) * (high - low)


def weights(module: torch.nn.Module) -> dict[str, Any]:
    return {name: value.detach().numpy() for name, value in module.state_dict().items()}


def plain(model: MaskedImageModel, image: Tensor, visible: Any, asked: Any) -> tuple[Any, Any]:
    """Latents of registers and visible patches, and hidden vectors at ``asked``, of one image."""
    w = weights(model.backbone)
    places = np.array([(r / 3, c / 3) for r in range(GRID) for c in range(GRID)])
    pixels = image.unflatten(1, (4, 4)).unflatten(3, (4, 4)).numpy()  # (C, r, p, c, q)
    kernel = w["patch_embed.proj.weight"]
    x = np.einsum("crpsq,dcpq->rsd", pixels, kernel).reshape(16, -1) + w["patch_embed.proj.bias"]
    x = np.concatenate([w["reg_token"][0], x[visible]])
    at = np.concatenate([registers_at(places[visible]), places[visible]])
    for index in range(2):
        b = {k.removeprefix(f"blocks.{index}."): v for k, v in w.items()}
        y = rms(x, b["norm1.weight"])
        qkv = (b[f"attn.{name}_proj.weight"] for name in "qkv")
        x = x + attended(y, y, at, at, *qkv) @ b["attn.proj.weight"].T
        y = gelu(rms(x, b["norm2.weight"]) @ b["mlp.fc1.weight"].T)
        x = x + y @ b["mlp.fc2.weight"].T
    latents = rms(x)
    w = weights(model.decoder)
    query = np.repeat(w["mask_token"][0], len(asked), axis=0)
    b = {k.removeprefix("blocks.0."): v for k, v in w.items()}
    normed = rms(query, b["norm1.weight"])
    maps = (b[f"{name}.weight"] for name in "qkv")
    read = attended(normed, latents, places[asked], at, *maps)
    query = query + read @ b["proj.weight"].T
    y = gelu(rms(query, b["norm2.weight"]) @ b["mlp.fc1.weight"].T)
    return latents, rms(query + y @ b["mlp.fc2.weight"].T)


def test_encoder_and_predictor_are_what_they_are_said_to_be() -> None:
    model = model_of()
    with torch.no_grad():  # norms that are not 1
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    images, mask = batch(model)
    latents = model.latents(images, mask)
    hidden = model.decoder(latents, mask.masked_ids).detach().numpy()
    for row in range(len(images)):
        visible, asked = mask.visible_ids[row].numpy(), mask.masked_ids[row].numpy()
        expected, predicted = plain(model, images[row], visible, asked)
        got = latents.tokens[row].detach().numpy()
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)
        np.testing.assert_allclose(hidden[row], predicted, rtol=0, atol=1e-6)


# --- Across regimes ------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["split", "dense"])
@pytest.mark.parametrize("ratio", [0.5, [0.2, 0.8]])
def test_zero_computes_what_drop_does(attention: str, ratio: Any) -> None:
    """Registers lie on the border of the visible patches' box in both."""
    drop = model_of(**{"mask.ratio": ratio})
    zero = model_of(
        **{"mask.ratio": ratio, "model.regime.name": "zero", "model.regime.zero.at": "pixels"},
        **{"model.regime.zero.attention": attention},
    )
    images, mask = batch(drop)
    few, many = drop.latents(images, mask), zero.latents(images, mask)
    torch.testing.assert_close(few.prefix, many.prefix, rtol=0, atol=1e-10)
    for row in range(len(images)):
        ids = torch.nonzero(mask.is_visible[row]).flatten()
        torch.testing.assert_close(
            few.patches[row, : len(ids)], many.patches[row, ids], rtol=0, atol=1e-10
        )


def test_without_a_mask_it_is_timms_own_forward() -> None:
    model = model_of().eval()
    images, _ = batch(model)
    own = model.backbone.forward_features(images)
    torch.testing.assert_close(model.encode(images), own, rtol=0, atol=1e-12)


@pytest.mark.parametrize("regime", ["drop", "zero"])
def test_hidden_pixels_reach_nothing(regime: str) -> None:
    model = model_of(**{"model.regime.name": regime})
    images, mask = batch(model)
    other = images.clone()
    for row in range(len(images)):
        for patch in mask.masked_ids[row].tolist():
            r, c = divmod(patch, GRID)
            other[row, :, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4] += 5
    one, two = model.latents(images, mask), model.latents(other, mask)
    assert torch.equal(one.tokens, two.tokens)
    assert torch.equal(model.decoder(one), model.decoder(two))


def test_a_query_reads_no_other() -> None:
    model = model_of()
    images, mask = batch(model)
    latents = model.latents(images, mask)
    few = mask.masked_ids[:, 2:5]
    all_of_them = model.decoder(latents)
    picked = all_of_them.gather(1, few[..., None].expand(-1, -1, WIDTH))
    torch.testing.assert_close(model.decoder(latents, few), picked, rtol=0, atol=1e-12)


# --- Parts ---------------------------------------------------------------------------------------


def test_registers_stand_around_the_patches() -> None:
    places = torch.tensor([[[0.25, 0.5], [0.75, 0.5], [0.5, 1.0], [9, 9]]]).double()
    valid = torch.tensor([[True, True, True, False]])
    got = border_places(8, places, valid)[0].tolist()
    assert got == [
        *([0.25, 0.5], [0.5, 0.5]),  # left side, downwards
        *([0.75, 0.5], [0.75, 0.75]),
        *([0.75, 1.0], [0.5, 1.0]),
        *([0.25, 1.0], [0.25, 0.75]),
    ]
    nothing = border_places(4, places, torch.zeros(1, 4, dtype=torch.bool))[0]
    assert nothing.tolist() == [[0, 0], [1, 0], [1, 1], [0, 1]]


def test_a_residual_leaves_images_out_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    x = torch.zeros(10, 2, 3).double()
    shares = []
    for _ in range(400):
        out = residual(x, lambda of: torch.ones_like(of(x)), 0.25)
        rows = out[:, 0, 0]
        assert (rows > 0).sum() == 7  # int(10 * 0.75)
        assert rows[rows > 0].tolist() == [10 / 7] * 7
        shares.append(rows)
    assert (torch.stack(shares).mean(0) - 1).abs().max() < 0.15
    assert torch.equal(residual(x, lambda of: torch.ones_like(of(x)), 0.0), torch.ones_like(x))


def test_initial_weights() -> None:
    model = model_of(
        **{"model.backbone_args": {**CAPI["model.backbone_args"], "embed_dim": 128}},
        **{"model.decoder.rotary.width": 128},
    )
    for name, weight in [*model.backbone.named_parameters(), *model.decoder.named_parameters()]:
        if name.endswith(("proj.weight", "fc1.weight", "fc2.weight", ".q.weight", ".v.weight")):
            rows, columns = weight.flatten(1).shape
            bound = math.sqrt(6 / (rows + columns))  # Xavier, uniform
            assert 0.97 * bound < weight.abs().max() < 1.001 * bound, name
    tokens = torch.cat([model.backbone.reg_token.flatten(), model.decoder.mask_token.flatten()])
    assert 0.015 < tokens.std() < 0.025
    biases = [n for n, _ in model.backbone.named_parameters() if n.endswith("bias")]
    assert biases == ["patch_embed.proj.bias"]
