"""The drop regime against Hugging Face's ViTMAEForPreTraining: same weights, same mask."""

from __future__ import annotations

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
    TargetConfig,
    TransformerDecoderConfig,
)
from mim.masks import PatchMask, sample_masks
from mim.model import MaskedImageModel, build_model

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")

IMAGE, PATCH, WIDTH, HEADS, DECODER_WIDTH, CHANNELS = 32, 8, 24, 3, 16, 3
DEPTH, DECODER_DEPTH = 2, 2


def ours(normalize: bool) -> MaskedImageModel:
    config = Config(
        data=DataConfig(image_size=IMAGE, channels=CHANNELS),
        mask=MaskConfig(ratio=0.75),
        model=ModelConfig(
            backbone="vit_tiny_patch16_224",
            backbone_args={
                "patch_size": PATCH,
                "embed_dim": WIDTH,
                "depth": DEPTH,
                "num_heads": HEADS,
            },
            position_embedding="sincos2d",
            decoder=DecoderConfig(
                transformer=TransformerDecoderConfig(DECODER_WIDTH, DECODER_DEPTH, heads=4)
            ),
            target=TargetConfig(name="normalized_pixels" if normalize else "pixels"),
        ),
    )
    model = build_model(config).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # biases of 0 and norms of 1 would prove little
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(
                parameter.shape, generator=generator, dtype=torch.float64
            )
    return model


def block_names(theirs: str, mine: str) -> dict[str, str]:
    """Their name -> ours, but for queries, keys and values, which timm holds in one matrix."""
    pairs = {
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "attention.o_proj": "attn.proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    return {
        f"{theirs}.{a}.{kind}": f"{mine}.{b}.{kind}"
        for a, b in pairs.items()
        for kind in ("weight", "bias")
    }


def names() -> dict[str, str]:
    """Their name -> ours, for every tensor that stands whole in both."""
    found = {
        "vit.embeddings.cls_token": "backbone.cls_token",
        "vit.embeddings.position_embeddings": "backbone.pos_embed",
        "decoder.mask_token": "decoder.mask_token",
        "decoder.decoder_pos_embed": "decoder.pos_embed",
    }
    for theirs, mine in (
        ("vit.embeddings.patch_embeddings.projection", "backbone.patch_embed.proj"),
        ("vit.layernorm", "backbone.norm"),
        ("decoder.decoder_embed", "decoder.embed"),
        ("decoder.decoder_norm", "decoder.norm"),
        ("decoder.decoder_pred", "decoder.head"),
    ):
        for kind in ("weight", "bias"):
            found[f"{theirs}.{kind}"] = f"{mine}.{kind}"
    for theirs, mine in blocks():
        found |= block_names(theirs, mine)
    return found


def blocks() -> list[tuple[str, str]]:
    encoder = [(f"vit.layers.{i}", f"backbone.blocks.{i}") for i in range(DEPTH)]
    return encoder + [
        (f"decoder.decoder_layers.{i}", f"decoder.blocks.{i}") for i in range(DECODER_DEPTH)
    ]


def to_theirs(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights, or gradients, under their names."""
    state = {theirs: tensors[mine] for theirs, mine in names().items() if mine in tensors}
    for theirs, mine in blocks():
        for kind in ("weight", "bias"):
            parts = tensors[f"{mine}.attn.qkv.{kind}"].chunk(3)
            for letter, part in zip("qkv", parts, strict=True):
                state[f"{theirs}.attention.{letter}_proj.{kind}"] = part
    return state


def theirs(model: MaskedImageModel, normalize: bool, attention: str, ratio: float) -> Any:
    config = transformers.ViTMAEConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        layer_norm_eps=1e-6,
        image_size=IMAGE,
        patch_size=PATCH,
        num_channels=CHANNELS,
        decoder_num_attention_heads=4,
        decoder_hidden_size=DECODER_WIDTH,
        decoder_num_hidden_layers=DECODER_DEPTH,
        decoder_intermediate_size=4 * DECODER_WIDTH,
        mask_ratio=ratio,
        norm_pix_loss=normalize,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation=attention,
    )
    oracle = transformers.ViTMAEForPreTraining(config).double()
    state = to_theirs(model.state_dict())
    # Built from a config the oracle is blind to position: its position embeddings must be ours.
    for name in ("vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"):
        assert state[name].abs().sum() > 1
    oracle.load_state_dict(state, strict=True)
    return oracle


def noise_of(mask: PatchMask) -> Tensor:
    """What their argsort turns into our mask: visible patches lowest, ascending."""
    order = torch.cat([mask.visible_ids, mask.masked_ids], dim=1)
    return order.argsort(dim=1).double() / mask.num_patches


@pytest.mark.parametrize("normalize", [False, True], ids=["pixels", "normalized_pixels"])
@pytest.mark.parametrize(
    ("attention", "tolerance"),
    [
        ("sdpa", 1e-10),
        # Their eager attention takes its softmax in float32, whatever the weights are.
        ("eager", 1e-5),
    ],
)
@pytest.mark.parametrize("ratio", [0.75, 0.5])
def test_same_loss_logits_and_gradients(
    ratio: float, attention: str, tolerance: float, normalize: bool
) -> None:
    model = ours(normalize)
    oracle = theirs(model, normalize, attention, ratio)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, CHANNELS, IMAGE, IMAGE, generator=generator, dtype=torch.float64)
    grid = (IMAGE // PATCH, IMAGE // PATCH)
    mask = sample_masks(MaskConfig(ratio=ratio), grid, seed=0, epoch=0, sample_ids=[0, 1, 2])

    output = model(images, mask)
    expected = oracle(images, noise=noise_of(mask))
    assert torch.equal(expected.mask.bool(), mask.is_masked)
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(output.loss, expected.loss, **close)
    torch.testing.assert_close(output.prediction, expected.logits, **close)

    output.loss.backward()
    expected.loss.backward()
    mine = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    mapped = to_theirs(mine)
    others = {n: p.grad for n, p in oracle.named_parameters() if p.grad is not None}
    assert mapped.keys() == others.keys()
    for name, gradient in others.items():
        torch.testing.assert_close(
            mapped[name], gradient, **close, msg=lambda m, n=name: f"{n}: {m}"
        )
        if ".k_proj.bias" not in name:  # a softmax does not see a shift of all keys
            assert gradient.abs().max() > 1e-6, name


def test_the_oracle_sees_positions() -> None:
    """Were it blind to them, the comparison above would not test ours."""
    model = ours(True)
    oracle = theirs(model, True, "sdpa", 0.75)
    images = torch.randn(2, CHANNELS, IMAGE, IMAGE, dtype=torch.float64)
    mask = sample_masks(MaskConfig(), (4, 4), seed=0, epoch=0, sample_ids=[0, 1])
    with torch.no_grad():
        before = oracle(images, noise=noise_of(mask)).logits
        for name in ("vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"):
            parameter = oracle.get_parameter(name)
            kept = parameter.clone()
            parameter[:, 1:] = kept[:, 1:].flip(1)
            after = oracle(images, noise=noise_of(mask)).logits
            assert (before - after).abs().max() > 1e-3, name
            parameter.copy_(kept)
