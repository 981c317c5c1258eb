"""Causal order in the encoder: no later patch reaches an earlier one, in any regime."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mim.core.config import Config, DataConfig, ModelConfig, RegimeConfig, ZeroConfig
from mim.core.errors import UserError
from mim.masks import PatchMask
from mim.model import MaskedImageModel, build_model

DENSE = ZeroConfig(attention="dense")


def make(regime: str, prefix: int = 0, zero: ZeroConfig = DENSE, **args: Any) -> MaskedImageModel:
    vit = {"patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2, **args}
    config = Config(
        data=DataConfig(image_size=16),
        model=ModelConfig(
            backbone_args=vit,
            regime=RegimeConfig(regime, zero=zero, order="causal", causal_prefix=prefix),
        ),
    )
    return build_model(config).double().eval()


def rows(*texts: str) -> PatchMask:
    return PatchMask(torch.tensor([[c == "x" for c in text] for text in texts]))


EQUAL = rows("xxxx.xx.x...xxx.", "x.x.x.x.xxxxxx..")
UNEQUAL = rows("xxxxxxxxxxxxxxx.", "x.x.x.x.x.x.x.x.")
ANY_MASK = pytest.mark.parametrize("mask", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("prefix", [0, 6])
@pytest.mark.parametrize("regime", ["drop", "zero", "token"])
@ANY_MASK
def test_no_later_patch_reaches_an_earlier_one(mask: PatchMask, regime: str, prefix: int) -> None:
    model = make(regime, prefix)
    images = IMAGES.clone().requires_grad_()
    latents = model.latents(images, mask)
    for row in range(2):
        ids = torch.arange(16)
        if latents.patch_ids is not None:
            count = 16 if latents.valid is None else int(latents.valid[row].sum())
            ids = latents.patch_ids[row, :count]
        for place, patch in enumerate(ids.tolist()):
            token = latents.patches[row, place].square().sum()
            (grad,) = torch.autograd.grad(token, images, retain_graph=True)
            assert grad.isfinite().all()
            seen = grad[row].view(3, 4, 4, 4, 4).abs().sum((0, 2, 4)).view(16) > 0
            allowed = torch.arange(16) <= patch
            if patch < prefix:
                allowed = torch.arange(16) < prefix
            allowed &= ~mask.is_masked[row]
            assert torch.equal(seen, allowed), (row, patch)


@pytest.mark.parametrize("prefix", [0, 5])
@ANY_MASK
def test_zero_and_drop_agree_at_visible_patches(mask: PatchMask, prefix: int) -> None:
    drop, zero = make("drop", prefix), make("zero", prefix)
    with torch.no_grad():
        a, b = drop.latents(IMAGES, mask), zero.latents(IMAGES, mask)
    torch.testing.assert_close(a.prefix, b.prefix, rtol=0, atol=1e-10)
    for row, visible in enumerate(~mask.is_masked):
        count = int(visible.sum())
        torch.testing.assert_close(
            a.patches[row, :count], b.patches[row, visible], rtol=0, atol=1e-10
        )


def test_order_matters_and_can_be_all_of_it() -> None:
    """With every patch in the prefix nothing is ordered but the class token, which comes first."""
    plain = Config(
        data=DataConfig(image_size=16),
        model=ModelConfig(
            backbone_args={"patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2}
        ),
    )
    model = build_model(plain).double().eval()

    def tokens(other: MaskedImageModel) -> Tensor:
        with torch.no_grad():
            return other.encode(IMAGES, EQUAL)

    torch.testing.assert_close(tokens(make("drop", 16)), tokens(model), rtol=0, atol=1e-10)
    assert (tokens(make("drop", 3)) - tokens(model)).abs().max() > 1e-3


@pytest.mark.parametrize("regime", ["drop", "token"])
def test_without_prefix_tokens(regime: str) -> None:
    model = make(regime, class_token=False, global_pool="avg")
    for mask in (EQUAL, UNEQUAL):
        output = model(IMAGES, mask)
        output.loss.backward()
        assert all(
            p.grad is not None and p.grad.isfinite().all()
            for p in model.parameters()
            if p.requires_grad
        )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: make("zero", zero=ZeroConfig()), "model.regime.zero.attention: 'split'"),
        (
            lambda: make("zero", class_token=False, global_pool="avg"),
            "model.regime.order: 'causal' needs a class or register token",
        ),
        (lambda: make("drop", 17), "model.regime.causal_prefix: 17 is more than the 16 patches"),
        (lambda: RegimeConfig(order="raster"), "model.regime.order: 'raster' is not one of"),
        (lambda: RegimeConfig(causal_prefix=2), "needs model.regime.order=causal"),
        (lambda: RegimeConfig(causal_prefix=-1), "model.regime.causal_prefix: -1"),
    ],
)
def test_what_does_not_fit_is_named(build: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        build()
    assert message in str(caught.value)
