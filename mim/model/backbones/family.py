"""Kinds of timm backbones: how each embeds patches, places them and runs them under a mask.

A family looks at a timm model it does not own and has no weights, so that the state dict stays
timm's. A new kind is one subclass of :class:`Family` and its registration with the timm class.

Shapes: B images, C channels, H x W pixels, N patches of the grid that a mask hides, T tokens of
which each belongs to a patch, P prefix tokens, L = P + T, D width of a latent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mim.core.errors import setting_error
from mim.core.patches import Patches, values_at

Grid = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Embedded:
    """What the blocks work on, and who reads whom.

    Attributes:
        tokens: (B, L, D), prefix tokens first; of windowed backbones as their blocks take it.
        rotation: sines and cosines that turn each patch's queries and keys; None without rotary
            position embeddings. (T, R), the same for all images, or (B, 1, T, R); with a rotation
            of each block and head one dimension more in front.
        bias: added to the attention scores of every layer, broadcasts to (B, heads, L, L); None
            where all may read all.
        num_keys: how many tokens are read (keys and values), the first ones; None reads all.
        places: (B, L) int64, which of all tokens each is, for biases by place; None: all in order.
    """

    tokens: Tensor
    rotation: Tensor | None = None
    bias: Tensor | None = None
    num_keys: int | None = None
    places: Tensor | None = None


class RegimeTraits(Protocol):
    """What a backbone asks of a :class:`mim.model.regimes.Regime`."""

    @property
    def name(self) -> str: ...
    @property
    def keeps_all_tokens(self) -> bool: ...
    @property
    def hides_keys(self) -> bool: ...
    @property
    def hidden_by(self) -> tuple[str, object] | None: ...
    @property
    def order(self) -> str: ...
    @property
    def takes_merging(self) -> bool: ...


class Family(ABC):
    """A view of a timm model as an encoder of masked images; the model is kept, not copied."""

    is_uniform: bool = True
    """Whether every block returns a token for each patch, as wide as the last block does."""
    takes_padding: bool = True
    """Whether images of a batch may show different numbers of patches under ``drop``."""
    has_one_grid: bool = False
    """Whether it is a ViT with one grid of patches from the first block to the last."""
    takes_sizes: bool = False
    """Whether images of different sizes may share a batch (:class:`mim.core.patches.Patches`)."""
    packs: bool = False
    """Whether several images may stand in one sequence."""
    takes_fixed_positions: bool = False
    """Whether its position embedding can be replaced by fixed sines and cosines."""
    prefix_on_border: bool = False
    """Whether prefix tokens have places on the border of the image."""

    def __init__(self, vit: Any) -> None:
        self.vit = vit

    @property
    def kind(self) -> str:
        """Name of timm's class."""
        return type(self.vit).__name__

    @property
    @abstractmethod
    def grid(self) -> Grid:
        """(rows, columns) of patches: of what a mask hides and a latent stands for."""

    @property
    @abstractmethod
    def patch_size(self) -> Grid:
        """(height, width) in pixels of such a patch."""

    @property
    def num_prefix(self) -> int:
        """P, class and register tokens in front of the patches."""
        return 0

    @property
    def has_class_token(self) -> bool:
        """Whether the first prefix token is a class token."""
        return False

    @property
    @abstractmethod
    def width(self) -> int:
        """D, of the latents."""

    @property
    def token_width(self) -> int:
        """Width of an embedded patch, by default that of a latent."""
        return self.width

    @property
    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, first to last."""

    @property
    def pool_norm(self) -> nn.Module:
        """The norm that follows pooling; an ``nn.Identity`` where there is none."""
        return nn.Identity()

    @property
    def splits(self) -> bool:
        """Whether queries, keys and values of each block can be projected apart."""
        return False

    def length(self, patches: float) -> float:
        """Tokens in the first block, given the number of patches in the encoder."""
        return self.num_prefix + patches

    def refusal(self) -> str | None:
        """Why a model of this kind cannot be used after all; None where it can."""
        return None

    def check(self, regime: RegimeTraits) -> None:  # noqa: B027 (most refuse nothing)
        """Raise a ``UserError`` for a regime that this kind of backbone cannot follow."""

    @abstractmethod
    def embed(self, images: Tensor, is_masked: Tensor | None = None) -> Tensor:
        """Embed the patches of (B, C, H, W) images, without positions.

        Args:
            images: normalised.
            is_masked: (B, N) patches whose pixels must reach no other; matters only where embedded
                patches overlap.
        """

    def hide(self, patches: Tensor, is_masked: Tensor, fill: Tensor | float) -> Tensor:
        """Put ``fill``, a (D,) token or a number, in the place of hidden patches.

        ``patches`` are those of :meth:`embed`, (B, N, D) or (B, rows, columns, D).
        """
        flags = is_masked.view(*patches.shape[:-1], 1)
        return torch.where(flags, torch.as_tensor(fill, dtype=patches.dtype), patches)

    def hide_pixels(self, images: Tensor, is_masked: Tensor) -> Tensor:
        """Set hidden patches, (B, N) bool, of (B, C, H, W) images to 0."""
        (rows, columns), (height, width) = self.grid, self.patch_size
        flags = is_masked.view(-1, 1, rows, columns)
        flags = flags.repeat_interleave(height, 2).repeat_interleave(width, 3)
        return images.masked_fill(flags, 0.0)

    @abstractmethod
    def place(self, patches: Tensor) -> Embedded:
        """Add positions by timm's own rule, and prefix tokens in front."""

    def embed_patches(self, images: Patches) -> Tensor:
        """:meth:`embed` for images of different sizes: (B, N, D)."""
        raise NotImplementedError(f"{self.kind} takes images of one size")  # see takes_sizes

    def place_patches(self, patches: Tensor, images: Patches) -> Embedded:
        """:meth:`place` for the (B, N, D) of :meth:`embed_patches`, each image on its own grid."""
        raise NotImplementedError(f"{self.kind} takes images of one size")  # see takes_sizes

    def frame(self, embedded: Embedded, is_visible: Tensor) -> Embedded:
        """Place prefix tokens by the patches, (B, N) bool, that are visible, if they have places.

        All patches are there; a regime that keeps hidden ones from being read calls this.
        """
        return embedded

    def take(self, embedded: Embedded, ids: Tensor, valid: Tensor | None = None) -> Embedded:
        """Leave prefix tokens and the patches ``ids`` (B, T), each with its rotation.

        Padding, ``valid`` (B, T) False, becomes zeros.
        """
        raise NotImplementedError(f"{self.kind} keeps every token")  # refused by check

    def embed_at(self, images: Tensor, ids: Tensor) -> Embedded | None:
        """:meth:`embed`, :meth:`place` and :meth:`take` in one, computing the patches ``ids`` only.

        None where all patches must be embedded to know some.
        """
        return None

    @abstractmethod
    def run(
        self,
        embedded: Embedded,
        *,
        checkpointing: bool = False,
        layers: list[Tensor] | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> Tensor:
        """Run the transformer blocks and the final norm: (B, L, D).

        Args:
            embedded: what they work on.
            checkpointing: compute each block again in the backward pass instead of storing it.
                timm's own switch is not used because it is off whenever a mask is given.
            layers: receives the output of every block, (B, L, D), before the final norm.
            start: the first block; above 0, ``embedded`` holds what the one before it returned.
            stop: the block before which to stop, without the final norm; None runs all.
        """

    def attention(self, index: int, x: Tensor, embedded: Embedded) -> Tensor:
        """Attention weights of a block whose input is ``x`` (B, L, D); only where it splits.

        Returns:
            (B, heads, L, L); rows are queries and sum to 1.
        """
        raise NotImplementedError(f"{self.kind} does not show its attention")

    def mlp_output(self, index: int, x: Tensor, embedded: Embedded) -> Tensor:
        """What the MLP of a block whose input is ``x`` gives, (B, L, D); only where it splits."""
        raise NotImplementedError(f"{self.kind} does not show its MLPs")

    def step(self, index: int, x: Tensor, embedded: Embedded) -> Tensor:
        """The output (B, L, D) of a block whose input is ``x``; only where blocks stand alone."""
        raise NotImplementedError(f"{self.kind} does not run its blocks one by one")

    def before_blocks(self, tokens: Tensor) -> Tensor:
        """Apply what stands between the positions and the first block."""
        return tokens

    def features(self, images: Tensor) -> Tensor:
        """timm's own ``forward_features`` of full images: (B, C, H, W) -> (B, P + N, D)."""
        return self.vit.forward_features(images)

    def classifier_args(self, mean: bool) -> dict[str, Any]:
        """Arguments of timm for a classifier on the mean patch (``mean``) or the class token."""
        return {"global_pool": "avg" if mean else "token"}


FAMILIES: dict[type[nn.Module], type[Family]] = {}


def register_family(*kinds: type[nn.Module]) -> Callable[[type[Family]], type[Family]]:
    """Decorator: the family of these timm classes and of what inherits from them."""

    def add(family: type[Family]) -> type[Family]:
        FAMILIES.update(dict.fromkeys(kinds, family))
        return family

    return add


def family_of(vit: nn.Module) -> Family:
    """The family's view of a model.

    Raises:
        TypeError: if it belongs to none; :func:`mim.model.backbones.build_backbone` tells users.
    """
    for kind in type(vit).__mro__:
        if kind in FAMILIES:
            return FAMILIES[kind](vit)
    names = ", ".join(kind.__name__ for kind in FAMILIES)
    raise TypeError(f"a {type(vit).__name__} is none of {names}")


class Transformer(Family):
    """Blocks of one width in a row, each of which reads all tokens: ViTs of any kind."""

    takes_fixed_positions = True

    @property
    def grid(self) -> Grid:
        rows, columns = self.vit.patch_embed.grid_size
        return int(rows), int(columns)

    @property
    def patch_size(self) -> Grid:
        height, width = self.vit.patch_embed.patch_size
        return int(height), int(width)

    @property
    def num_prefix(self) -> int:
        return int(self.vit.num_prefix_tokens)

    @property
    def has_class_token(self) -> bool:
        return self.vit.cls_token is not None

    @property
    def width(self) -> int:
        return int(self.vit.embed_dim)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.vit.blocks)

    @property
    def pool_norm(self) -> nn.Module:
        return self.vit.fc_norm

    def refusal(self) -> str | None:
        if isinstance(self.vit.patch_embed, PatchEmbed):
            return None
        return f"embeds patches by {type(self.vit.patch_embed).__name__}, which may mix patches"

    def embed(self, images: Tensor, is_masked: Tensor | None = None) -> Tensor:
        return self.vit.patch_embed(images)  # patches do not overlap

    def take(self, embedded: Embedded, ids: Tensor, valid: Tensor | None = None) -> Embedded:
        tokens, prefix = embedded.tokens, self.num_prefix
        taken = values_at(tokens[:, prefix:], ids)  # (B, T, D)
        if valid is not None:
            taken = taken.masked_fill(~valid[..., None], 0.0)
        return Embedded(torch.cat([tokens[:, :prefix], taken], dim=1))

    def before_blocks(self, tokens: Tensor) -> Tensor:
        return self.vit.norm_pre(tokens)

    @abstractmethod
    def step(self, index: int, x: Tensor, embedded: Embedded) -> Tensor:
        """Run one block: (B, L, D) -> (B, L, D)."""

    def run(
        self,
        embedded: Embedded,
        *,
        checkpointing: bool = False,
        layers: list[Tensor] | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> Tensor:
        x = embedded.tokens if start else self.before_blocks(embedded.tokens)
        for index in range(len(self.vit.blocks))[start:stop]:
            if checkpointing and torch.is_grad_enabled():
                x = checkpoint(self.step, index, x, embedded, use_reentrant=False)
            else:
                x = self.step(index, x, embedded)
            if layers is not None:
                layers.append(x)
        return self.vit.norm(x) if stop is None else x


class Merging(Family):
    """Blocks that merge patches on their way, and read them without any mask but their own."""

    is_uniform = False

    @property
    def width(self) -> int:
        return int(self.vit.num_features)

    @property
    def token_width(self) -> int:
        return int(self.vit.patch_embed.proj.out_channels)

    def check(self, regime: RegimeTraits) -> None:
        """Refuse a regime that counts on one embedded patch for each of the mask's."""
        if not regime.takes_merging:
            reason = f"works on one token for each patch of the mask, and a {self.kind} embeds "
            reason += "smaller ones; choose another backbone (a regime of your own that hides "
            reason += "patches by Family.hide says takes_merging = True)"
            raise setting_error("model.regime.name", regime.name, reason)

    @property
    def stages(self) -> list[nn.Module]:
        """What runs, first to last: the blocks, and what merges patches between them."""
        return self.blocks

    def run(
        self,
        embedded: Embedded,
        *,
        checkpointing: bool = False,
        layers: list[Tensor] | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> Tensor:
        # See check and is_uniform.
        assert embedded.bias is None and embedded.num_keys is None and layers is None
        x = embedded.tokens
        for part in self.stages[start:stop]:
            if checkpointing and torch.is_grad_enabled():
                x = checkpoint(part, x, use_reentrant=False)
            else:
                x = part(x)
        return x

    def classifier_args(self, mean: bool) -> dict[str, Any]:
        return {"global_pool": "avg"}  # there is no class token


def as_unit(block: nn.Module, work: Callable[..., Tensor], *args: Any) -> Tensor:
    """``work(*args)``, which reads parts of a block without calling it.

    Where weights are shared out block by block (``train.shard``), a block's are gathered only
    while it is called; this counts as a call of it.
    """
    call = getattr(block, UNIT, None)
    return work(*args) if call is None else call(work, *args)


UNIT = "call_as_unit"
"""A block's method under which ``train.shard`` gathers its weights."""


def resample_positions(table: Tensor, new: Grid, old: Grid, prefix: int = 0) -> Tensor:
    """Resample positions (1, P + n, D) from an old grid to a new one, bicubic, as timm does.

    timm 1.0.28 returns them as they are where the new grid is square and
    has as many patches as the old one, 2 x 8 into 4 x 4.
    """
    if new == old:
        return table
    maps = table[:, prefix:].float().unflatten(1, old).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    maps = F.interpolate(maps, size=new, mode="bicubic", antialias=True)
    patches = maps.flatten(2).transpose(1, 2).to(table.dtype)
    return torch.cat([table[:, :prefix], patches], dim=1)


def block_outputs(vit: nn.Module, embedded: Embedded) -> list[Tensor]:
    """Output of every block, each (B, L, D)."""
    layers: list[Tensor] = []
    family_of(vit).run(embedded, layers=layers)
    return layers


def attention_maps(vit: nn.Module, embedded: Embedded) -> list[Tensor]:
    """What each token reads in each block, where the family of ``vit`` splits.

    Returns:
        For each block (B, heads, L, L); rows are queries and sum to 1.
    """
    family = family_of(vit)
    inputs = [family.before_blocks(embedded.tokens), *block_outputs(vit, embedded)[:-1]]
    return [family.attention(index, x, embedded) for index, x in enumerate(inputs)]


def patch_attention(vit: nn.Module, embedded: Embedded) -> Tensor:
    """How much the last block attends to each patch, where the family of ``vit`` splits.

    Returns:
        (B, N), the mean over heads: of the class token's query where there is one, else the mean
        over all queries.
    """
    family = family_of(vit)
    assert isinstance(family, Transformer)  # no other splits
    last = len(family.blocks) - 1
    x = family.run(embedded, stop=last)
    weights = family.attention(last, x, embedded).mean(dim=1)  # (B, L, L)
    rows = weights[:, 0] if family.has_class_token else weights.mean(dim=1)
    return rows[:, family.num_prefix :]
