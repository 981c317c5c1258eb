"""`zero.predict_share`: a keyed part of the masked queries, computed alone and exactly.

And the transformer decoder, whose last block works at the predicted patches only.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from mim.core.config import (
    Config,
    DataConfig,
    DecoderConfig,
    MaskConfig,
    ModelConfig,
    RegimeConfig,
    TargetConfig,
    TransformerDecoderConfig,
    ZeroConfig,
)
from mim.core.errors import UserError
from mim.masks import PatchMask, sample_masks
from mim.model import MaskedImageModel, build_model
from mim.training.runtime.cost import count_flops

SHARE = 0.25


def model(share: float = SHARE, decoder: str = "linear", **zero: Any) -> MaskedImageModel:
    config = Config(
        data=DataConfig(image_size=32),
        model=ModelConfig(
            backbone_args={"patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2},
            regime=RegimeConfig("zero", zero=ZeroConfig(predict_share=share, **zero)),
            decoder=DecoderConfig(decoder, transformer=TransformerDecoderConfig(16, 2, 2)),
        ),
    )
    return build_model(config).double()


def images(count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 32, 32, generator=generator, dtype=torch.float64)


def masks(count: int = 3, ratio: Any = 0.75, epoch: int = 0) -> PatchMask:
    ids = list(range(count))
    return sample_masks(MaskConfig(ratio=ratio), (8, 8), seed=0, epoch=epoch, sample_ids=ids)


@pytest.mark.parametrize("decoder", ["linear", "mlp"])
@pytest.mark.parametrize("ratio", [0.75, (0.3, 0.9)])
def test_what_is_computed_equals_the_dense_form(decoder: str, ratio: Any) -> None:
    part, dense = model(decoder=decoder), model(1.0, decoder, attention="dense")
    mask = masks(ratio=ratio)
    ids, valid = mask.masked_share(SHARE)
    got = part.train().latents(images(), mask)
    wanted = dense.train().latents(images(), mask)
    assert got.patch_ids is not None and got.patch_ids.shape[1] == mask.num_visible + ids.shape[1]
    assert torch.allclose(got.prefix, wanted.prefix, rtol=0, atol=1e-12)
    at = wanted.patches.gather(1, got.patch_ids[..., None].expand_as(got.patches))
    counted = torch.ones_like(got.patch_ids, dtype=torch.bool) if valid is None else got.valid
    assert counted is not None
    assert torch.allclose(got.patches[counted], at[counted], rtol=0, atol=1e-12)
    # The loss is that of the dense form over those patches, gradients too.
    output = part(images(), mask)
    target = dense.target(images(), None).gather(1, ids[..., None].expand(-1, -1, 48))
    predicted = dense.decoder.project(dense.decoder(wanted, ids))
    squares = (predicted - target).square().mean(dim=-1)
    weights = torch.ones_like(squares) if valid is None else valid.double()
    loss = ((squares * weights).sum(dim=1) / weights.sum(dim=1)).mean()
    assert torch.allclose(output.loss, loss, rtol=0, atol=1e-12)
    for one, other in ((part, output.loss), (dense, loss)):
        other.backward()
        assert all(p.grad is not None for p in one.decoder.parameters())
    left = dict(part.backbone.named_parameters())
    for name, parameter in dense.backbone.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(left[name].grad, parameter.grad, rtol=0, atol=1e-12), name


def test_evaluation_computes_all() -> None:
    part, whole = model().eval(), model(1.0).eval()
    assert torch.equal(part(images(), masks()).loss, whole(images(), masks()).loss)
    assert torch.equal(part(images(), masks()).prediction, whole(images(), masks()).prediction)


@torch.no_grad()
def test_the_loss_is_unbiased() -> None:
    """The mean over many keys of the same hidden patches is the loss over all of them."""
    part, whole = model().train(), model(1.0).train()
    mask, pictures = masks(1), images(1)
    wanted = float(whole(pictures, mask).loss)
    losses = []
    for key in range(300):
        drawn = PatchMask(mask.is_masked, keys=torch.tensor([key * 7919 + 1]))
        losses.append(float(part(pictures, drawn).loss))
    found = torch.tensor(losses)
    assert found.std() > 0
    assert abs(float(found.mean()) - wanted) < 4 * float(found.std()) / 300**0.5


def test_it_costs_less() -> None:
    def cost(made: MaskedImageModel) -> int:
        return count_flops(made, images(), torch.arange(3))[0]

    part, split, dense = cost(model()), cost(model(1.0)), cost(model(1.0, attention="dense"))
    assert 2 * part < dense and part < split < dense
    tokens = [model(share).regime.encoder_tokens(model().backbone, 16) for share in (SHARE, 1.0)]
    assert tokens == [1 + 16 + 12, 1 + 64]


@pytest.mark.parametrize("regime", ["drop", "zero", "token"])
@pytest.mark.parametrize("ratio", [0.75, (0.3, 0.9)])
def test_the_last_block_of_the_decoder_works_where_it_is_asked(regime: str, ratio: Any) -> None:
    config = Config(
        data=DataConfig(image_size=32),
        model=ModelConfig(
            backbone_args={"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2},
            regime=RegimeConfig(regime),
            decoder=DecoderConfig(transformer=TransformerDecoderConfig(16, 2, 2)),
        ),
    )
    made, mask = build_model(config).double(), masks(ratio=ratio)
    latents = made.latents(images(), mask)
    ids, _ = mask.masked_share(0.5)
    everywhere = made.decoder(latents)
    asked = made.decoder(latents, ids)
    expected = everywhere.gather(1, ids[..., None].expand_as(asked))
    assert torch.allclose(asked, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("zero", "change", "parts"),
    [
        ({"predict_share": 0.0}, {}, ["zero.predict_share: 0.0", "above 0"]),
        ({"predict_share": 1.5}, {}, ["zero.predict_share: 1.5", "at most 1"]),
        ({"predict_share": 0.5, "attention": "dense"}, {}, ["predict_share: 0.5", "split"]),
        ({"predict_share": 0.5, "attend_mask": False}, {}, ["predict_share: 0.5", "attend_mask"]),
        (
            {"predict_share": 0.5},
            {"decoder": DecoderConfig("transformer")},
            ["zero.predict_share: 0.5", "linear, mlp"],
        ),
        (
            {"predict_share": 0.5},
            {"decoder": DecoderConfig("cross_attention")},
            ["zero.predict_share: 0.5", "linear, mlp"],
        ),
        (
            {"predict_share": 0.5},
            {"target": TargetConfig(loss_on="all")},
            ["zero.predict_share: 0.5", "loss_on=all"],
        ),
    ],
)
def test_what_cannot_be(zero: dict[str, Any], change: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        part = ModelConfig(
            backbone_args={"patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2},
            regime=RegimeConfig("zero", zero=ZeroConfig(**zero)),
            decoder=DecoderConfig("linear"),
        )
        config = Config(data=DataConfig(image_size=32), model=dataclasses.replace(part, **change))
        build_model(config)
    assert all(part in str(caught.value) for part in parts), caught.value
