"""Masked autoencoders of other codebases, built to a config's sizes, to be timed beside ours.

Each peer is built from what its package publishes, in the way its own example shows, with the
encoder, decoder, patch, mask ratio and target of the config as far as it knows them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mim.core.config import Config
from mim.core.errors import UserError, setting_error
from mim.core.registry import Registry
from mim.model.backbones import build_backbone


class Sizes(NamedTuple):
    """What a peer is built to.

    Attributes:
        image: side of the square image in pixels.
        patch: side of the square patch in pixels.
        channels: of the image.
        width, depth, heads: of the encoder.
        decoder_width, decoder_depth, decoder_heads: of the decoder.
        mlp_ratio: hidden width of an MLP over the width, in the encoder; the decoder's is the same.
        ratio: share of patches that is hidden.
        normalised: whether the target is each patch normalised by its own mean and deviation.
    """

    image: int
    patch: int
    channels: int
    width: int
    depth: int
    heads: int
    decoder_width: int
    decoder_depth: int
    decoder_heads: int
    mlp_ratio: float
    ratio: float
    normalised: bool


def sizes_of(config: Config) -> Sizes:
    """The sizes that a peer must have to do the work of ``config`` under ``drop``.

    Raises:
        UserError: where no masked autoencoder has that shape.
    """
    height, width = config.data.size
    decoder, target = config.model.decoder, config.model.target
    if height != width:
        raise setting_error("data.image_size", config.data.image_size, "must be square for a peer")
    if decoder.name != "transformer":
        raise setting_error("model.decoder.name", decoder.name, "must be transformer for a peer")
    if target.name not in ("pixels", "normalized_pixels"):
        reason = "must be pixels or normalized_pixels for a peer"
        raise setting_error("model.target.name", target.name, reason)
    if isinstance(config.mask.ratio, (list, tuple)):
        raise setting_error("mask.ratio", config.mask.ratio, "must be one number for a peer")
    with torch.device("meta"):
        vit: Any = build_backbone(config.model, config.data.size, config.data.channels)
    block = vit.blocks[0]
    transformer = decoder.transformer
    return Sizes(
        image=height,
        patch=int(vit.patch_embed.patch_size[0]),
        channels=config.data.channels,
        width=vit.embed_dim,
        depth=len(vit.blocks),
        heads=block.attn.num_heads,
        decoder_width=transformer.width,
        decoder_depth=transformer.depth,
        decoder_heads=transformer.heads,
        mlp_ratio=block.mlp.fc1.out_features / vit.embed_dim,
        ratio=float(config.mask.ratio),
        normalised=target.name == "normalized_pixels",
    )


class Peer(NamedTuple):
    """A masked autoencoder of another codebase.

    Attributes:
        model: images (B, C, H, W), normalised -> the scalar loss.
        encoder_tokens: class token and visible patches of an image.
    """

    model: nn.Module
    encoder_tokens: int


PeerBuilder = Callable[[Sizes, Path | None], nn.Module]
"""Sizes and the folder of a checkout -> a module that maps images (B, C, H, W) to their loss."""

PEERS: Registry[PeerBuilder] = Registry("--peer")


def _imported(module: str, peer: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        reason = f"needs the package {package} (pip install -e '.[bench]'): {error}"
        raise setting_error("--peer", peer, reason) from error


class _HuggingFace(nn.Module):
    def __init__(self, sizes: Sizes, attention: str) -> None:
        super().__init__()
        transformers = _imported("transformers", "hf", "transformers")
        config = transformers.ViTMAEConfig(
            hidden_size=sizes.width,
            num_hidden_layers=sizes.depth,
            num_attention_heads=sizes.heads,
            intermediate_size=int(sizes.width * sizes.mlp_ratio),
            image_size=sizes.image,
            patch_size=sizes.patch,
            num_channels=sizes.channels,
            decoder_hidden_size=sizes.decoder_width,
            decoder_num_hidden_layers=sizes.decoder_depth,
            decoder_num_attention_heads=sizes.decoder_heads,
            decoder_intermediate_size=int(sizes.decoder_width * sizes.mlp_ratio),
            mask_ratio=sizes.ratio,
            norm_pix_loss=sizes.normalised,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attn_implementation=attention,
        )
        self.model = transformers.ViTMAEForPreTraining(config)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images).loss


@PEERS.register("hf")
def _hugging_face(sizes: Sizes, path: Path | None) -> nn.Module:
    """ViTMAE of transformers with torch's fused attention, its default."""
    return _HuggingFace(sizes, "sdpa")


@PEERS.register("hf-eager")
def _hugging_face_eager(sizes: Sizes, path: Path | None) -> nn.Module:
    """ViTMAE of transformers with attention as plain matrix products."""
    return _HuggingFace(sizes, "eager")


class _Lightly(nn.Module):
    """lightly's parts, put together as in its published MAE example."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        timm_vit = importlib.import_module("timm.models.vision_transformer")
        modules = _imported("lightly.models.modules", "lightly", "lightly")
        self.parts = _imported("lightly.models.utils", "lightly", "lightly")
        vit = timm_vit.VisionTransformer(
            img_size=sizes.image,
            patch_size=sizes.patch,
            in_chans=sizes.channels,
            num_classes=0,
            embed_dim=sizes.width,
            depth=sizes.depth,
            num_heads=sizes.heads,
            mlp_ratio=sizes.mlp_ratio,
        )
        self.sizes = sizes
        self.backbone = modules.MaskedVisionTransformerTIMM(vit=vit)
        self.decoder = modules.MAEDecoderTIMM(
            num_patches=vit.patch_embed.num_patches,
            patch_size=sizes.patch,
            in_chans=sizes.channels,
            embed_dim=sizes.width,
            decoder_embed_dim=sizes.decoder_width,
            decoder_depth=sizes.decoder_depth,
            decoder_num_heads=sizes.decoder_heads,
            mlp_ratio=sizes.mlp_ratio,
        )

    def forward(self, images: Tensor) -> Tensor:
        length = self.backbone.sequence_length
        keep, hidden = self.parts.random_token_mask(
            size=(len(images), length), mask_ratio=self.sizes.ratio, device=images.device
        )
        latents = self.decoder.embed(self.backbone.encode(images=images, idx_keep=keep))
        tokens = self.parts.repeat_token(self.decoder.mask_token, (len(images), length))
        tokens = self.parts.set_at_index(tokens, keep, latents.type_as(tokens))
        decoded = self.parts.get_at_index(self.decoder.decode(tokens), hidden)
        patches = self.parts.patchify(images, self.sizes.patch)
        target = self.parts.get_at_index(patches, hidden - 1)  # the class token is not a patch
        if self.sizes.normalised:
            target = self.parts.normalize_mean_var(target)
        return F.mse_loss(self.decoder.predict(decoded), target)


@PEERS.register("lightly")
def _lightly(sizes: Sizes, path: Path | None) -> nn.Module:
    """lightly's MAE modules on a timm ViT."""
    return _Lightly(sizes)


@PEERS.register("vit-pytorch")
def _vit_pytorch(sizes: Sizes, path: Path | None) -> nn.Module:
    """lucidrains' MAE; it has no class token in pre-training and predicts raw pixels."""
    package = _imported("vit_pytorch", "vit-pytorch", "vit-pytorch")
    encoder = package.ViT(
        image_size=sizes.image,
        patch_size=sizes.patch,
        channels=sizes.channels,
        num_classes=1,
        dim=sizes.width,
        depth=sizes.depth,
        heads=sizes.heads,
        dim_head=sizes.width // sizes.heads,
        mlp_dim=int(sizes.width * sizes.mlp_ratio),
    )
    positions = encoder.pos_embedding.detach()
    # Its ViT came to keep (N, D), and its MAE still reads (1, N, D).
    encoder.pos_embedding = nn.Parameter(positions.reshape(1, *positions.shape[-2:]))
    return package.MAE(
        encoder=encoder,
        masking_ratio=sizes.ratio,
        decoder_dim=sizes.decoder_width,
        decoder_depth=sizes.decoder_depth,
        decoder_heads=sizes.decoder_heads,
        decoder_dim_head=sizes.decoder_width // sizes.decoder_heads,
    )


class _FacebookResearch(nn.Module):
    def __init__(self, sizes: Sizes, path: Path) -> None:
        super().__init__()
        sys.path.insert(0, str(path))
        try:
            module = importlib.import_module("models_mae")
            self.model = module.MaskedAutoencoderViT(
                img_size=sizes.image,
                patch_size=sizes.patch,
                in_chans=sizes.channels,
                embed_dim=sizes.width,
                depth=sizes.depth,
                num_heads=sizes.heads,
                decoder_embed_dim=sizes.decoder_width,
                decoder_depth=sizes.decoder_depth,
                decoder_num_heads=sizes.decoder_heads,
                mlp_ratio=sizes.mlp_ratio,
                norm_layer=partial(nn.LayerNorm, eps=1e-6),
                norm_pix_loss=sizes.normalised,
            )
        except (ImportError, AttributeError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(
                f"--mae-path {path}: this checkout does not run with timm and numpy as installed "
                f"({reason}); it was written for timm 0.3.2: drop the argument qk_scale and "
                "replace np.float by float"
            ) from error
        finally:
            sys.path.remove(str(path))
        self.ratio = sizes.ratio

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images, mask_ratio=self.ratio)[0]


@PEERS.register("mae")
def _facebook_research(sizes: Sizes, path: Path | None) -> nn.Module:
    """The model of a checkout of facebookresearch/mae."""
    if path is None or not (path / "models_mae.py").is_file():
        reason = "is not a checkout of facebookresearch/mae: it has no models_mae.py"
        raise setting_error("--mae-path", None if path is None else str(path), reason)
    return _FacebookResearch(sizes, path)


def build_peer(name: str, config: Config, path: Path | None = None) -> Peer:
    """A peer of the sizes of ``config``.

    Args:
        name: one of :data:`PEERS`.
        config: what it is timed beside.
        path: the checkout, for ``mae``.

    Raises:
        UserError: for an unknown peer, one whose package is missing, or a config that no masked
            autoencoder can follow.
    """
    builder = PEERS.get(name)
    sizes = sizes_of(config)
    patches = (sizes.image // sizes.patch) ** 2
    return Peer(builder(sizes, path), 1 + patches - int(sizes.ratio * patches))
