"""Images and a mask to a loss and a prediction."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mim.backbone import build_backbone, grid_of, patch_size_of, set_norm_eps
from mim.config import Config
from mim.decoders import Decoder, build_decoder
from mim.masks import PatchMask, build_mask_generator
from mim.regimes import Latents, Regime, build_regime
from mim.targets import Target, build_target, loss_positions, per_image_loss


@dataclass(eq=False)
class Output:
    """What the model returns.

    Attributes:
        loss: scalar, the weighted mean of ``loss_per_image``.
        loss_per_image: (B,).
        target: (B, N, dim).
        latents: of the encoder.
        hidden: (B, N, E), what the decoder's last projection reads.
    """

    loss: Tensor
    loss_per_image: Tensor
    target: Tensor
    latents: Latents
    hidden: Tensor
    _decoder: Decoder = field(repr=False)

    @property
    def prediction(self) -> Tensor:
        """(B, N, dim) at every patch; projected when asked for, since the loss needs but a part."""
        return self._decoder.project(self.hidden.to(_dtype_of(self._decoder)))


def _dtype_of(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


class MaskedImageModel(nn.Module):
    """A backbone pre-trained by predicting what a mask hides.

    Args:
        backbone: a timm VisionTransformer.
        regime: how hidden patches meet it.
        decoder: what predicts them.
        target: what must be predicted.
    """

    def __init__(
        self, backbone: VisionTransformer, regime: Regime, decoder: Decoder, target: Target
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.regime = regime
        self.decoder = decoder
        self.target = target

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return grid_of(self.backbone)

    @property
    def patch_size(self) -> tuple[int, int]:
        """(height, width) of a patch in pixels."""
        return patch_size_of(self.backbone)

    def latents(self, images: Tensor, mask: PatchMask | None = None) -> Latents:
        """Encode under a mask.

        Args:
            images: (B, C, H, W), normalised.
            mask: what is hidden; None hides nothing.
        """
        if mask is None:
            count = self.grid[0] * self.grid[1]
            mask = PatchMask.empty(len(images), count, images.device)
        return self.regime(self.backbone, images, mask)

    def encode(self, images: Tensor, mask: PatchMask | None = None) -> Tensor:
        """Features: the tokens of :meth:`latents`, prefix first, (B, P + T, D).

        Without a mask they equal timm's own ``backbone.forward_features(images)``. With one,
        ``drop`` returns the visible patches only; the other regimes return all, in order.
        """
        return self.latents(images, mask).tokens

    def forward(self, images: Tensor, mask: PatchMask, weight: Tensor | None = None) -> Output:
        """One forward pass.

        Args:
            images: (B, C, H, W), normalised.
            mask: (B, N), what is hidden.
            weight: (B,) how much each image counts; 0 leaves it out. None counts all alike.
        """
        latents = self.latents(images, mask)
        tokens = latents.tokens
        if not isinstance(self.backbone.fc_norm, nn.Identity):
            # Models that norm after pooling have no norm on tokens; here each token is a pool.
            tokens = self.backbone.fc_norm(tokens)
        readable = Latents(
            tokens, latents.num_prefix, latents.num_patches, latents.patch_ids, latents.valid
        )
        hidden = self.decoder(readable)  # (B, N, E)
        target = self.target(images)  # (B, N, dim)
        ids, valid = loss_positions(self.target.config, mask)
        chosen, wanted = hidden, target
        if ids is not None:
            chosen = hidden.gather(1, ids[..., None].expand(-1, -1, hidden.shape[-1]))
            wanted = target.gather(1, ids[..., None].expand(-1, -1, target.shape[-1]))
        distance = self.target.distance(self.decoder.project(chosen), wanted)  # (B, M)
        losses = per_image_loss(distance, valid)
        if weight is None:
            loss = losses.mean()
        else:
            counted = torch.where(weight > 0, losses * weight, 0.0)
            loss = counted.sum() / weight.sum().clamp(min=torch.finfo(losses.dtype).tiny)
        return Output(loss, losses, target, latents, hidden, self.decoder)


def build_model(config: Config) -> MaskedImageModel:
    """The model that ``config`` describes; every part's weights follow from the seed alone.

    Raises:
        UserError: if a name is unknown or the parts do not fit together.
    """
    data, model = config.data, config.model
    vit = build_backbone(model, data.size, data.channels, config.seed)
    build_mask_generator(config.mask, grid_of(vit))
    regime = build_regime(model.regime, vit, config.seed)
    regime.checkpointing = config.train.gradient_checkpointing
    target = build_target(model.target, patch_size_of(vit), data.channels)
    decoder = build_decoder(
        model.decoder,
        width=vit.embed_dim,
        output=target.dim,
        grid=grid_of(vit),
        regime=regime,
        num_prefix=vit.num_prefix_tokens,
        seed=config.seed,
    )
    set_norm_eps(decoder, model.norm_eps)
    return MaskedImageModel(vit, regime, decoder, target)


def check_config(config: Config) -> None:
    """Refuse a config whose parts do not fit, without allocating the weights.

    Raises:
        UserError: as :func:`build_model`.
    """
    with torch.device("meta"):
        build_model(config)
