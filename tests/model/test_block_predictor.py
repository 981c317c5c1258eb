"""Each target block is predicted from the context and itself alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mim
from mim.core.errors import UserError
from mim.masks import PatchMask
from mim.model import MaskedImageModel
from mim.model.backbones import sincos_position_embedding

SMALL: dict[str, Any] = {
    "data.source": "digits",
    "data.image_size": 32,
    "data.channels": 1,
    "mask.name": "target_blocks",
    "model.backbone_args": {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2},
    "model.decoder.name": "block_predictor",
    "model.decoder.block_predictor": {"width": 24, "depth": 2, "heads": 3},
}
IMAGES = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(0)).double()
REGIME = pytest.mark.parametrize("regime", ["drop", "zero", "token"])


def built(regime: str = "drop", **changes: Any) -> MaskedImageModel:
    config = mim.load_config(None, {**SMALL, "model.regime.name": regime, **changes})
    return mim.build_model(config).double()


def of_one_image(mask: PatchMask, image: int, blocks: list[int]) -> PatchMask:
    """The mask of an image with some of its target blocks, unpadded."""
    assert mask.target_ids is not None
    flags = torch.zeros(1, len(blocks), mask.num_patches, dtype=torch.bool)
    for place, number in enumerate(blocks):
        ids = mask.target_ids[image, number]
        if mask.target_valid is not None:
            ids = ids[mask.target_valid[image, number]]
        flags[0, place, ids] = True
    return PatchMask(mask.is_masked[image : image + 1], targets=flags)


@REGIME
def test_padding_and_other_blocks_change_nothing(regime: str) -> None:
    model = built(regime)
    mask = model.draw_mask(IMAGES, torch.arange(4) * 7)
    assert mask.target_valid is not None and mask.visible_valid is not None
    loss = model(IMAGES, mask).loss_per_image
    for image in range(4):
        here = IMAGES[image : image + 1]
        together = model(here, of_one_image(mask, image, [0, 1, 2, 3])).loss
        torch.testing.assert_close(loss[image], together)
        apart = [model(here, of_one_image(mask, image, [block])).loss for block in range(4)]
        torch.testing.assert_close(together, torch.stack(apart).mean())


@REGIME
def test_the_loss_reads_no_pixel_outside_context_and_targets(regime: str) -> None:
    model = built(regime, **{"model.target.name": "pixels"})
    mask = model.draw_mask(IMAGES, torch.arange(4))
    assert mask.target_ids is not None and mask.target_valid is not None
    target = torch.zeros(4, 64, dtype=torch.int64)
    target = target.scatter_add(1, mask.target_ids.flatten(1), mask.target_valid.flatten(1).long())
    neither = (mask.is_masked & (target == 0)).view(4, 1, 8, 8)
    assert neither.any(), "I-JEPA leaves some patches aside"
    other = torch.where(neither.repeat_interleave(4, 2).repeat_interleave(4, 3), 9.0, IMAGES)
    assert torch.equal(model(IMAGES, mask).loss, model(other, mask).loss)


def test_the_predictor_by_hand() -> None:
    """One image, one block of the predictor, worked with plain products."""
    model = built(**{"model.decoder.block_predictor.depth": 1})
    mask = of_one_image(model.draw_mask(IMAGES, torch.arange(4)), 2, [0, 3])
    predictor: Any = model.decoder
    tokens = model.latents(IMAGES[2:3], mask).tokens[0]  # class token and context
    places = sincos_position_embedding(model.grid, 24)[0].double()
    context = tokens @ predictor.embed.weight.T + predictor.embed.bias
    context[1:] += places[mask.visible_ids[0]]
    assert mask.target_ids is not None
    losses = []
    target = model.target(IMAGES[2:3])[0]
    for ids in mask.target_ids[0]:
        x = torch.cat([context, predictor.mask_token[0] + places[ids]])
        block = predictor.blocks[0]
        q, k, v = block.attn.qkv(block.norm1(x)).view(-1, 3, 3, 8).permute(1, 2, 0, 3)
        read = ((q @ k.mT) / 8**0.5).softmax(-1) @ v
        x = x + block.attn.proj(read.transpose(0, 1).flatten(1))
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
        predicted = predictor.head(F.layer_norm(x, (24,), eps=1e-6))[-len(ids) :]
        losses.append((predicted - target[ids]).square().mean())
    torch.testing.assert_close(model(IMAGES[2:3], mask).loss, torch.stack(losses).mean())


def test_a_mask_without_target_blocks_is_one_block() -> None:
    model = built(**{"mask.name": "random", "mask.ratio": (0.4, 0.8)})
    mask = model.draw_mask(IMAGES, torch.arange(4))
    losses: Tensor = model(IMAGES, mask).loss_per_image
    for image in range(4):
        alone = PatchMask(mask.is_masked[image : image + 1])
        torch.testing.assert_close(losses[image], model(IMAGES[image : image + 1], alone).loss)
    assert model(IMAGES, mask).prediction.shape == (4, 64, 16)


def test_its_defaults_are_i_jepa_s() -> None:
    settings = mim.Config().model.decoder.block_predictor
    assert (settings.width, settings.depth, settings.heads) == (384, 12, 12)


def test_a_loss_on_all_patches_is_refused() -> None:
    with pytest.raises(UserError, match=r"block_predictor' predicts target blocks, and .* is all"):
        built(**{"model.target.loss_on": "all"})
