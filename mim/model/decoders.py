"""What predicts the hidden patches from the latents.

A decoder works in two parts: ``forward`` gives a hidden vector at the patches asked for, and
``project`` turns them into predictions, so that the last projection runs only where it is wanted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from timm.layers import Mlp, freq_bands
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mim.core.config import DecoderConfig
from mim.core.errors import setting_error
from mim.core.fields import Count, Positive, Settings, Share
from mim.core.patches import values_at
from mim.core.registry import Registry
from mim.core.rng import seed_of
from mim.model.attention import key_bias, with_prefix
from mim.model.backbones import block_at, sincos_position_embedding
from mim.model.packing import Packing
from mim.model.regimes import Latents, Regime, scatter_tokens
from mim.model.terms import WithTerms


@dataclass(frozen=True, eq=False)
class DecoderContext:
    """What a decoder is built for."""

    width: int
    """D, of the latents."""
    output: int
    """Values predicted for a patch."""
    grid: tuple[int, int]
    """(rows, columns) of patches."""
    regime: Regime
    num_prefix: int
    """P, tokens in front of the patches."""


class Decoder(WithTerms, nn.Module, ABC):
    """Base class; its ``settings`` are those registered with it, None without any."""

    name: ClassVar[str] = ""
    """As registered."""
    needs_all_tokens: bool
    """Whether it reads a latent at every patch and so cannot follow a regime that drops some."""
    needs_layers: bool = False
    """Whether it reads the output of every encoder block, not of the last alone."""
    share: float = 1.0
    """Share of the hidden patches that it predicts in training."""
    packs: bool = False
    """Whether images of different sizes share a sequence."""
    head: nn.Module

    def __init__(self, settings: Any, context: DecoderContext) -> None:
        super().__init__()
        self.settings = settings

    @abstractmethod
    def forward(self, latents: Latents, ids: Tensor | None = None) -> Tensor:
        """Compute hidden vectors (B, M, E) at the patches ``ids`` (B, M); None: all N in order."""

    def project(self, hidden: Tensor) -> Tensor:
        """Turn hidden vectors into predictions, by ``self.head``: (..., E) -> (..., output)."""
        return self.head(hidden)


DECODERS: Registry[type[Decoder]] = Registry(
    "model.decoder.name",
    DecoderConfig,
    {"mae": "transformer", "crossmae": "cross_attention", "simmim": "linear"},
)


def _at(hidden: Tensor, ids: Tensor | None) -> Tensor:
    return hidden if ids is None else values_at(hidden, ids)


def _positions(table: Tensor, latents: Latents, num_prefix: int = 0) -> Tensor:
    """Fixed positions: ``table`` (1, P + N, E), or (B, P + N, E) where image sizes differ.

    Prefix tokens have zeros.
    """
    if latents.coords is None:
        return table
    bands = freq_bands(table.shape[-1] // 4, temperature=10000.0, step=1, device=table.device)
    angles = latents.coords[..., None] * bands  # (B, N, 2, E / 4)
    patches = torch.cat([angles.sin(), angles.cos()], dim=-2).flatten(-2)  # (B, N, E)
    return F.pad(patches.to(table.dtype), (0, 0, num_prefix, 0))


def _latents_at(latents: Latents, ids: Tensor | None) -> Tensor:
    """Latents (B, M, D) of the patches ``ids``; zeros where a patch has none."""
    patches = latents.patches  # (B, T, D)
    if latents.patch_ids is not None:
        fill = patches.new_zeros(len(patches), latents.num_patches, patches.shape[-1])
        patches = scatter_tokens(patches, latents.patch_ids, latents.valid, fill)
    return _at(patches, ids)


def _xavier(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


@dataclass(frozen=True)
class BlocksSettings(Settings):
    """Sizes of a decoder of blocks."""

    width: Count = 512
    """Width of a token in the decoder."""
    depth: Count = 8
    """Number of blocks."""
    heads: Count = 16
    """Attention heads; must divide the width."""
    mlp_ratio: Positive = 4.0
    """Hidden width of a block's MLP over the decoder's width."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads:
            raise self.error("width", f"is not divisible by {self.where}.heads={self.heads}")
        if self.width % 4:
            reason = "must be divisible by 4 for its 2-D sin-cos position embedding"
            raise self.error("width", reason)


@dataclass(frozen=True)
class TransformerSettings(BlocksSettings):
    """MAE's decoder."""


@DECODERS.register("transformer", TransformerSettings)
class TransformerDecoder(Decoder):
    """MAE's decoder: mask tokens where no latent is, fixed positions, transformer blocks.

    With a regime that keeps every token it reads those and has no mask token of its own.
    He et al. 2021, arXiv:2111.06377.
    """

    needs_all_tokens = False

    def __init__(self, settings: TransformerSettings, context: DecoderContext) -> None:
        super().__init__(settings, context)
        self.embed = nn.Linear(context.width, settings.width)
        positions = sincos_position_embedding(context.grid, settings.width, context.num_prefix)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)  # (1, P + N, E)
        self.blocks = nn.ModuleList(
            Block(settings.width, settings.heads, settings.mlp_ratio, qkv_bias=True)
            for _ in range(settings.depth)
        )
        self.norm = nn.LayerNorm(settings.width, eps=1e-6)
        self.head = nn.Linear(settings.width, context.output)
        _xavier(self)
        # Last, so that the weights above are the same whether or not there is a mask token.
        self.mask_token: nn.Parameter | None = None
        if not context.regime.keeps_all_tokens:
            self.mask_token = nn.Parameter(torch.randn(1, 1, settings.width) * 0.02)

    def forward(self, latents: Latents, ids: Tensor | None = None) -> Tensor:
        x = self.embed(latents.tokens)  # (B, P + T, E)
        if latents.patch_ids is not None:
            assert self.mask_token is not None
            prefix, patches = x[:, : latents.num_prefix], x[:, latents.num_prefix :]
            fill = self.mask_token.expand(len(x), latents.num_patches, -1).to(x.dtype)
            patches = scatter_tokens(patches, latents.patch_ids, latents.valid, fill)
            x = torch.cat([prefix, patches], dim=1)  # (B, P + N, E)
        x = x + _positions(self.pos_embed, latents, latents.num_prefix)
        return self.norm(self._run(x, latents, ids))

    def _run(self, x: Tensor, latents: Latents, ids: Tensor | None) -> Tensor:
        """Run the blocks, (B, P + N, E) -> (B, M, E); nobody reads padding."""
        bias, packing, prefix = None, None, latents.num_prefix
        if latents.patch_valid is not None:
            bias = key_bias(latents.patch_valid, x.dtype, prefix)
            if self.packs:
                packing = Packing.of(with_prefix(latents.patch_valid, prefix))
                x, bias = packing.pack(x), packing.bias(None, x.dtype)
        *earlier, last = self.blocks
        for block in earlier:
            x = block(x, attn_mask=bias)
        if ids is not None and packing is None:
            assert isinstance(last, Block)
            return block_at(last, x, ids + prefix, bias)  # nobody reads the other places
        x = last(x, attn_mask=bias)
        if packing is not None:
            x = packing.unpack(x)
        return _at(x[:, prefix:], ids)


@DECODERS.register("linear")
class LinearDecoder(Decoder):
    """One linear map of each latent (SimMIM, arXiv:2111.09886)."""

    needs_all_tokens = True

    def __init__(self, settings: None, context: DecoderContext) -> None:
        super().__init__(settings, context)
        self.head = nn.Linear(context.width, context.output)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, latents: Latents, ids: Tensor | None = None) -> Tensor:
        return _latents_at(latents, ids)


@dataclass(frozen=True)
class MlpSettings(Settings):
    """A multilayer perceptron on each latent."""

    width: Count = 512
    """Width of a hidden layer."""
    depth: Count = 1
    """Number of hidden layers."""


@DECODERS.register("mlp", MlpSettings)
class MlpDecoder(Decoder):
    """A multilayer perceptron on each latent; between SimMIM's linear map and a transformer."""

    needs_all_tokens = True

    def __init__(self, settings: MlpSettings, context: DecoderContext) -> None:
        super().__init__(settings, context)
        layers: list[nn.Module] = []
        for index in range(settings.depth):
            inner = settings.width if index else context.width
            layers += [nn.Linear(inner, settings.width), nn.GELU()]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(settings.width, context.output)
        _xavier(self)

    def forward(self, latents: Latents, ids: Tensor | None = None) -> Tensor:
        return self.layers(_latents_at(latents, ids))


class CrossBlock(nn.Module):
    """Queries of ``width`` E read a memory, then an MLP; they do not read each other."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor, memory: Tensor, bias: Tensor | None) -> Tensor:
        """Map queries (B, M, E) and a memory (B, L, E) to (B, M, E); bias adds to the scores."""
        q = self.q(self.norm1(x)).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, h, M, d)
        kv = self.kv(memory).unflatten(2, (2, self.heads, -1))  # (B, L, 2, h, d)
        k, v = kv.permute(2, 0, 3, 1, 4)  # (B, h, L, d)
        bias = None if bias is None else bias.to(q.dtype)
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = x + self.proj(read.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


@dataclass(frozen=True)
class CrossAttentionSettings(BlocksSettings):
    """CrossMAE's decoder."""

    share: Share = 0.25
    """Share of the hidden patches that is decoded in training, drawn for each image and epoch; must
    be 1 with model.target.loss_on=all."""
    layers: Literal["last", "weighted"] = "weighted"
    """What the blocks read: last (the encoder's output) or weighted (each block its own learned
    sum of the outputs of the encoder's blocks)."""


@DECODERS.register("cross_attention", CrossAttentionSettings)
class CrossAttentionDecoder(Decoder):
    """Mask tokens read the latents and not each other (CrossMAE, Fu et al. 2024, 2401.14391).

    Since no prediction depends on another, any subset can be computed alone: in training a
    ``share`` of the hidden patches is, drawn by key, which leaves the loss unbiased. With
    ``layers: weighted`` each block reads its own learned sum of the encoder's blocks.
    """

    needs_all_tokens = False

    def __init__(self, settings: CrossAttentionSettings, context: DecoderContext) -> None:
        super().__init__(settings, context)
        self.share = settings.share
        self.needs_layers = settings.layers == "weighted"
        self.embed = nn.Linear(context.width, settings.width)
        positions = sincos_position_embedding(context.grid, settings.width)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)  # (1, N, E)
        self.blocks = nn.ModuleList(
            CrossBlock(settings.width, settings.heads, settings.mlp_ratio)
            for _ in range(settings.depth)
        )
        self.norm = nn.LayerNorm(settings.width, eps=1e-6)
        self.head = nn.Linear(settings.width, context.output)
        _xavier(self)
        self.mask_token = nn.Parameter(torch.randn(1, 1, settings.width) * 0.02)
        if self.needs_layers:
            # The last block alone, to begin with.
            weights = torch.zeros(settings.depth, context.regime.num_layers)
            weights[:, -1] = 1.0
            self.layer_weights = nn.Parameter(weights)  # (blocks, encoder blocks)
            self.layer_norms = nn.ModuleList(
                nn.LayerNorm(context.width, eps=1e-6) for _ in range(settings.depth)
            )

    def forward(self, latents: Latents, ids: Tensor | None = None) -> Tensor:
        tokens = latents.tokens  # (B, P + T, D)
        places = _positions(self.pos_embed, latents).expand(len(tokens), -1, -1)  # (B, N, E)
        x = self.mask_token + _at(places, ids)  # (B, M, E)
        bias = None
        if latents.valid is not None:
            bias = key_bias(latents.valid, tokens.dtype, latents.num_prefix)
        layers = (*latents.layers[:-1], tokens)  # the last with the encoder's final norm
        memory = None if self.needs_layers else self.embed(tokens)  # (B, P + T, E)
        for index, block in enumerate(self.blocks):
            if self.needs_layers:
                weights = self.layer_weights[index].to(tokens.dtype)
                mixed = sum(w * layer for w, layer in zip(weights, layers, strict=True))
                memory = self.embed(self.layer_norms[index](mixed))
            x = block(x, memory, bias)
        return self.norm(x)


def build_decoder(config: DecoderConfig, context: DecoderContext, seed: int = 0) -> Decoder:
    """Build the decoder that ``config`` names; its weights follow from ``seed`` alone.

    Raises:
        UserError: if the name is unknown, or the decoder needs tokens that the regime drops.
    """
    kind = DECODERS.get(config.name)
    regime = context.regime
    if kind.needs_all_tokens and not regime.keeps_all_tokens:
        able = ", ".join(name for name in DECODERS if not DECODERS.get(name).needs_all_tokens)
        reason = (
            f"needs a token at every patch, and model.regime.name={regime.name!r} drops "
            f"the masked ones; with that regime choose {able}"
        )
        raise setting_error("model.decoder.name", config.name, reason)
    if regime.predict_share < 1 and not kind.needs_all_tokens:
        able = ", ".join(name for name in DECODERS if DECODERS.get(name).needs_all_tokens)
        reason = f"must be 1 with model.decoder.name={config.name!r}, whose predictions read each "
        reason += f"other's latents; below 1 choose {able}"
        raise setting_error("model.regime.zero.predict_share", regime.predict_share, reason)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "decoder"))
        return kind(DECODERS.chosen(config, config.name), context)
