"""How hidden patches meet the encoder: drop, zero or token.

Shapes: B images, C channels, H x W pixels, N patches, K visible patches, P prefix tokens, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mim.core.config import RegimeConfig
from mim.core.errors import UserError, setting_error
from mim.core.fields import Settings, Share
from mim.core.patches import Images, Patches
from mim.core.registry import Registry
from mim.core.rng import seed_of
from mim.masks import PatchMask
from mim.model.attention import causal, key_bias, to_additive, with_prefix
from mim.model.backbones import Embedded, Family, family_of
from mim.model.packing import Packing
from mim.model.terms import WithTerms


@dataclass(frozen=True, eq=False)
class Latents:
    """What the encoder returns.

    Attributes:
        tokens: (B, P + T, D), prefix tokens first.
        num_prefix: P.
        num_patches: N.
        patch_ids: (B, T) int64, the patch of each token after the prefix; None: all N in order.
        valid: (B, T) bool, False where a shorter row is padded; None: no padding.
        layers: the output of every block, each as ``tokens``; empty unless the regime collects.
        coords: (B, N, 2) int64, row and column of each patch, where image sizes differ.
        patch_valid: (B, N) bool, False where an image has fewer than N patches; None: all have N.
        mask: the mask they were encoded under, for decoders that predict target blocks.
    """

    tokens: Tensor
    num_prefix: int
    num_patches: int
    patch_ids: Tensor | None = None
    valid: Tensor | None = None
    layers: tuple[Tensor, ...] = ()
    coords: Tensor | None = None
    patch_valid: Tensor | None = None
    mask: PatchMask | None = None

    @property
    def prefix(self) -> Tensor:
        """(B, P, D)."""
        return self.tokens[:, : self.num_prefix]

    @property
    def patches(self) -> Tensor:
        """(B, T, D)."""
        return self.tokens[:, self.num_prefix :]


def scatter_tokens(tokens: Tensor, ids: Tensor, valid: Tensor | None, fill: Tensor) -> Tensor:
    """Put tokens (B, T, D) at their patches ``ids`` (B, T) of ``fill`` (B, N, D).

    Padding, ``valid`` (B, T) False, goes nowhere.
    """
    count = fill.shape[1]
    if valid is not None:  # padding goes to a place behind the last patch, cut off below
        ids = torch.where(valid, ids, count)
        fill = torch.cat([fill, fill[:, :1]], dim=1)
    index = ids[..., None].expand(-1, -1, tokens.shape[-1])
    return fill.scatter(1, index, tokens.to(fill.dtype))[:, :count]


@dataclass(frozen=True, eq=False)
class RegimeContext:
    """What a regime is built for.

    Attributes:
        vit: the backbone, for its width and shapes; not kept.
        order, causal_prefix: as :class:`RegimeConfig` has them.
        seed: own weights follow from it.
    """

    vit: nn.Module
    order: str = "bidirectional"
    causal_prefix: int = 0
    seed: int = 0


class Regime(WithTerms, nn.Module, ABC):
    """Encodes images under a mask with a backbone it does not own.

    A new regime defines :meth:`inputs` and says by its flags what it does to the tokens. Its
    ``settings`` are those registered with it; None without any.
    """

    name: ClassVar[str] = ""
    """As registered."""
    keeps_all_tokens: bool
    """Whether there is a token at every patch, so that any decoder can be used."""
    hides_keys: bool = False
    """Whether it adds a mask of its own to the attention in every layer."""
    hidden_by: tuple[str, object] | None = None
    """The setting by which it does so, and its value, for messages; else it is the name."""
    takes_merging: bool = False
    """Whether it hides patches by ``Family.hide`` alone, so that backbones can be used that embed
    smaller ones and merge them."""
    takes_sizes: bool = False
    """Whether image sizes may differ (:class:`mim.core.patches.Patches`)."""
    predict_share: float = 1.0
    """Share of the hidden patches that have a latent in training (``PatchMask.masked_share``)."""

    def __init__(self, settings: Any, context: RegimeContext) -> None:
        super().__init__()
        self.settings = settings
        self.order, self.causal_prefix = context.order, context.causal_prefix
        self.checkpointing = False
        self.collects_layers = self.collects_input = False
        self.packs = False
        family = family_of(context.vit)
        family.check(self)
        self.num_layers = len(family.blocks)
        patches = family.grid[0] * family.grid[1]
        if self.causal_prefix > patches:
            reason = f"is more than the {patches} patches of the grid"
            raise setting_error("model.regime.causal_prefix", self.causal_prefix, reason)

    def order_bias(
        self, bias: Tensor | None, tokens: Tensor, num_prefix: int, ids: Tensor | None = None
    ) -> Tensor | None:
        """Add the order of the tokens (B, L, D), where there is one, to an attention mask.

        Args:
            bias: (B, 1, 1, L), or None.
            tokens: prefix tokens first.
            num_prefix: P; prefix tokens come before all patches.
            ids: (B, L - P) patch of each token; None: all patches in order.

        Returns:
            (B or 1, 1, L, L), or ``bias`` unchanged where tokens read in both directions.
        """
        if self.order == "bidirectional":
            return bias
        both_ways = num_prefix + self.causal_prefix
        if ids is None:
            allowed = causal(tokens.shape[1], both_ways, tokens.device)
        else:
            prefix = torch.arange(num_prefix, device=ids.device).expand(len(ids), -1)
            places = torch.cat([prefix, ids + num_prefix], dim=1)  # (B, L)
            before = places[:, None, :] <= places[:, :, None]
            inside = places < both_ways
            allowed = (before | (inside[:, None, :] & inside[:, :, None]))[:, None]
        order = to_additive(allowed, tokens.dtype)
        return order if bias is None else order + bias

    def encode(
        self, family: Family, embedded: Embedded, valid: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run the encoder; also return the output of every block where they are collected.

        Where :attr:`collects_input` is set, the first block's input comes before them.

        Where :attr:`packs` is set, it runs on the tokens that are ``valid`` (B, L) alone.
        """
        layers: list[Tensor] | None = [] if self.collects_layers else None
        packing = None
        if self.packs and valid is not None:
            packing = Packing.of(valid, embedded.num_keys)
            bias = packing.bias(embedded.bias, embedded.tokens.dtype)
            tokens = packing.pack(embedded.tokens)
            embedded = Embedded(tokens, bias=bias, num_keys=packing.num_keys)
        if layers is not None and self.collects_input:
            layers.append(family.before_blocks(embedded.tokens))
        tokens = family.run(embedded, checkpointing=self.checkpointing, layers=layers)
        if packing is not None:
            return packing.unpack(tokens), tuple(packing.unpack(layer) for layer in layers or ())
        return tokens, tuple(layers or ())

    @abstractmethod
    def inputs(
        self, vit: nn.Module, images: Images, mask: PatchMask
    ) -> tuple[Embedded, Tensor | None]:
        """Embed the images (B, C, H, W), normalised, or patches of images of different sizes.

        Returns:
            Tokens (B, P + T, D), and what is added to the attention scores of every layer, or None.
        """

    def forward(self, vit: nn.Module, images: Images, mask: PatchMask) -> Latents:
        """Encode (B, C, H, W) normalised images of which only the visible patches count."""
        family = family_of(vit)
        embedded, bias = self.inputs(vit, images, mask)
        kept = self.kept(mask)
        valid = None if kept is None else with_prefix(kept, family.num_prefix)
        tokens, layers = self.encode(family, replace(embedded, bias=bias), valid)
        return Latents(tokens, family.num_prefix, mask.num_patches, valid=kept, layers=layers)

    def kept(self, mask: PatchMask) -> Tensor | None:
        """(B, T) bool, False where a token of the encoder is padding; None where none is."""
        return mask.valid

    def encoder_tokens(self, vit: nn.Module, visible: float, patches: float | None = None) -> float:
        """Count the tokens a block of the encoder works on.

        Args:
            vit: the backbone.
            visible: visible patches of an image.
            patches: all patches of an image; by default those of the backbone's grid.
        """
        family = family_of(vit)
        rows, columns = family.grid
        return family.length(rows * columns if patches is None else patches)


REGIMES: Registry[type[Regime]] = Registry(
    "model.regime.name",
    RegimeConfig,
    {"mae": "drop", "deit": "zero", "simmim": "token", "beit": "token"},
)


def _refuse_empty_rows(family: Family, mask: PatchMask) -> None:
    if family.num_prefix == 0 and mask.least_visible == 0:
        raise UserError(
            "mask: an image has every patch masked and the backbone has no prefix token, "
            "so nothing is left to attend to; lower mask.ratio or add a class token"
        )


def _embed(family: Family, images: Images, is_masked: Tensor | None = None) -> Tensor:
    if isinstance(images, Patches):
        return family.embed_patches(images)
    return family.embed(images, is_masked)


def _place(family: Family, patches: Tensor, images: Images) -> Embedded:
    if isinstance(images, Patches):
        return family.place_patches(patches, images)
    return family.place(patches)


def _hide_pixels(family: Family, images: Images, is_masked: Tensor) -> Images:
    if isinstance(images, Patches):
        return images.with_values(images.values.masked_fill(is_masked[..., None], 0.0))
    return family.hide_pixels(images, is_masked)


@REGIMES.register("drop")
class Drop(Regime):
    """Only visible patches are encoded (MAE's encoder, He et al. 2021, arXiv:2111.06377)."""

    keeps_all_tokens = False
    takes_merging = True
    takes_sizes = True

    def inputs(
        self, vit: nn.Module, images: Images, mask: PatchMask
    ) -> tuple[Embedded, Tensor | None]:
        family = family_of(vit)
        _refuse_empty_rows(family, mask)
        prefix, ids, valid = family.num_prefix, mask.visible_ids, mask.visible_valid  # (B, K)
        embedded = None
        hides = ids.shape[1] < mask.num_patches  # else timm's own way, to the last bit
        if hides and valid is None and isinstance(images, Tensor):
            embedded = family.embed_at(images, ids)
        if embedded is None:
            embedded = _place(family, _embed(family, images, mask.is_masked), images)
            embedded = family.frame(embedded, mask.is_visible)
            # Padding holds zeros, so that not even an unread place depends on a masked patch.
            embedded = family.take(embedded, ids, valid)
        tokens, bias = embedded.tokens, None  # (B, P + K, D)
        if valid is not None:
            bias = key_bias(valid, tokens.dtype, prefix)
            # As a query padding comes last, so that it has something to read.
            ids = ids.masked_fill(~valid, mask.num_patches)
        return embedded, self.order_bias(bias, tokens, prefix, ids)

    def forward(self, vit: nn.Module, images: Images, mask: PatchMask) -> Latents:
        return replace(super().forward(vit, images, mask), patch_ids=mask.visible_ids)

    def kept(self, mask: PatchMask) -> Tensor | None:
        return mask.visible_valid

    def encoder_tokens(self, vit: nn.Module, visible: float, patches: float | None = None) -> float:
        return family_of(vit).length(visible)


@dataclass(frozen=True)
class ZeroSettings(Settings):
    """The zero-and-attend-mask regime."""

    at: Literal["pixels", "embedding"] = "pixels"
    """Where hidden patches are set to 0: pixels (after normalisation) or embedding."""
    attend_mask: bool = True
    """Whether hidden patches' keys get -inf in every layer; false is the ablation."""
    attention: Literal["split", "dense"] = "split"
    """split projects keys of visible tokens only and needs no mask; dense is the literal form."""
    predict_share: Share = 1.0
    """Share of the hidden patches, drawn by key, whose latents are computed and predicted in
    training; the loss stays unbiased. Below 1 only with attention split and decoder linear or
    mlp."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.predict_share < 1 and not (self.attend_mask and self.attention == "split"):
            reason = "needs model.regime.zero.attend_mask=true and attention=split: only then do "
            reason += "hidden patches not read each other"
            raise self.error("predict_share", reason)


@REGIMES.register("zero", ZeroSettings)
class Zero(Regime):
    """Masked patches are set to zero and nobody attends to them (DeiT-style, full length).

    At prefix and visible positions its latents are those of ``drop``; in addition each masked
    position has a latent, computed by a query that reads prefix and visible tokens only.
    ``attention: split`` projects no keys of masked patches; ``dense`` adds -inf to their scores.
    Masked queries never see each other, so with ``predict_share`` training computes a keyed subset
    of them alone, exactly.
    """

    keeps_all_tokens = True
    takes_merging = True
    takes_sizes = True
    settings: ZeroSettings
    hidden_by = ("model.regime.zero.attend_mask", True)

    @property
    def hides_keys(self) -> bool:  # type: ignore[override]
        return self.settings.attend_mask

    def __init__(self, settings: ZeroSettings, context: RegimeContext) -> None:
        super().__init__(settings, context)
        self.predict_share = settings.predict_share
        family = family_of(context.vit)
        if self.order == "causal" and settings.attend_mask:
            if settings.attention == "split":
                reason = "takes no order of the tokens, and model.regime.order=causal; choose dense"
                raise setting_error("model.regime.zero.attention", "split", reason)
            if family.num_prefix == 0:
                reason = (
                    "needs a class or register token with zero: a hidden patch with none visible "
                    "before it would have nothing to read"
                )
                raise setting_error("model.regime.order", "causal", reason)
        self.is_split = settings.attend_mask and settings.attention == "split"
        if self.is_split and not family.splits:
            kind = type(family.blocks[0]).__name__
            reason = f"needs plain timm blocks and this backbone has {kind}; choose dense"
            raise setting_error("model.regime.zero.attention", "split", reason)

    def inputs(
        self, vit: nn.Module, images: Images, mask: PatchMask
    ) -> tuple[Embedded, Tensor | None]:
        family = family_of(vit)
        _refuse_empty_rows(family, mask)
        if self.settings.at == "pixels":
            patches = _embed(family, _hide_pixels(family, images, mask.is_masked))
        else:
            patches = _embed(family, images, mask.is_masked)
            patches = family.hide(patches, mask.is_masked, 0.0)
        embedded = _place(family, patches, images)  # (B, P + N, D)
        if self.hides_keys:
            embedded = family.frame(embedded, mask.is_visible)
        dtype, bias = embedded.tokens.dtype, None
        readable = mask.is_visible if self.hides_keys else mask.valid
        if readable is not None:
            bias = key_bias(readable, dtype, family.num_prefix)
        return embedded, self.order_bias(bias, embedded.tokens, family.num_prefix)

    def forward(self, vit: nn.Module, images: Images, mask: PatchMask) -> Latents:
        if not self.is_split:
            return super().forward(vit, images, mask)
        family = family_of(vit)
        embedded, _ = self.inputs(vit, images, mask)
        return self._split(family, embedded, mask)

    def _split(self, family: Family, embedded: Embedded, mask: PatchMask) -> Latents:
        """Order prefix, visible, masked, so that the keys are a slice; then order back."""
        prefix, dtype = family.num_prefix, embedded.tokens.dtype
        share = self.predict_share if self.training else 1.0
        masked_ids, masked_valid = mask.masked_share(share)  # (B, M')
        ids = torch.cat([mask.visible_ids, masked_ids], dim=1)  # (B, K + M')
        ordered = family.take(embedded, ids)
        bias = valid = None
        if mask.visible_valid is not None:
            bias = key_bias(mask.visible_valid, dtype, prefix)
        if not mask.is_equal:
            parts = ((mask.visible_ids, mask.visible_valid), (masked_ids, masked_valid))
            flags = [torch.ones_like(i, dtype=torch.bool) if v is None else v for i, v in parts]
            valid = torch.cat(flags, dim=1)  # (B, K + M')

        def back(ordered: Tensor) -> Tensor:
            out = ordered[:, prefix:]
            fill = out.new_zeros(len(out), mask.num_patches, out.shape[-1])
            return torch.cat([ordered[:, :prefix], scatter_tokens(out, ids, valid, fill)], dim=1)

        ordered = replace(ordered, bias=bias, num_keys=prefix + mask.num_visible)
        encoded = None if valid is None else with_prefix(valid, prefix)
        tokens, layers = self.encode(family, ordered, encoded)
        if share < 1:
            return Latents(tokens, prefix, mask.num_patches, ids, valid, layers)
        layers = tuple(back(layer) for layer in layers)
        return Latents(back(tokens), prefix, mask.num_patches, valid=mask.valid, layers=layers)

    def encoder_tokens(self, vit: nn.Module, visible: float, patches: float | None = None) -> float:
        all_tokens = super().encoder_tokens(vit, visible, patches)
        if self.predict_share == 1:
            return all_tokens
        seen = family_of(vit).length(visible)
        return seen + self.predict_share * (all_tokens - seen)


@REGIMES.register("token")
class Token(Regime):
    """Masked patches become a learned token that all attend to (SimMIM, arXiv:2111.09886)."""

    keeps_all_tokens = True
    takes_merging = True
    takes_sizes = True

    def __init__(self, settings: None, context: RegimeContext) -> None:
        super().__init__(settings, context)
        generator = torch.Generator().manual_seed(seed_of(context.seed, "regime.mask_token"))
        width = family_of(context.vit).token_width
        values = torch.randn(1, 1, width, generator=generator) * 0.02
        self.mask_token = nn.Parameter(values)  # (1, 1, D)

    def inputs(
        self, vit: nn.Module, images: Images, mask: PatchMask
    ) -> tuple[Embedded, Tensor | None]:
        family = family_of(vit)
        patches = _embed(family, images, mask.is_masked)
        hidden = family.hide(patches, mask.is_masked, self.mask_token[0, 0])
        embedded, bias = _place(family, hidden, images), None
        if mask.valid is not None:
            bias = key_bias(mask.valid, embedded.tokens.dtype, family.num_prefix)
        return embedded, self.order_bias(bias, embedded.tokens, family.num_prefix)


def build_regime(config: RegimeConfig, vit: nn.Module, seed: int = 0) -> Regime:
    """Build the regime that ``config`` names.

    Raises:
        UserError: if the name is unknown or the backbone does not fit.
    """
    kind, settings = REGIMES.get(config.name), REGIMES.chosen(config, config.name)
    return kind(settings, RegimeContext(vit, config.order, config.causal_prefix, seed))
