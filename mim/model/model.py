"""Images and a mask to a loss and a prediction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from mim.core.config import Config
from mim.core.device import to_device
from mim.core.errors import setting_error
from mim.core.patches import Images, Patches
from mim.masks import MaskGenerator, PatchMask, build_mask_generator, repeat_keys
from mim.model.backbones import (
    Family,
    build_backbone,
    family_of,
    grid_of,
    patch_size_of,
    set_norm_eps,
)
from mim.model.decoders import Decoder, DecoderContext, build_decoder
from mim.model.regimes import Latents, Regime, build_regime
from mim.model.targets import TARGETS, Target, TargetContext, build_target, per_image_loss
from mim.model.teacher import Teacher
from mim.model.terms import Forward


@dataclass(eq=False)
class Output:
    """What the model returns.

    Attributes:
        loss: scalar, what training minimises: ``reconstruction`` and all ``terms``.
        reconstruction: scalar, the weighted mean of ``loss_per_image`` alone.
        terms: in training, what components add to the loss, by name, each a scalar; mask_network is
            the loss of a mask generator that is trained.
        loss_per_image: (B,).
        metrics: in training, what components measure, by name, each a scalar without a gradient.
    """

    loss: Tensor
    reconstruction: Tensor
    terms: dict[str, Tensor]
    loss_per_image: Tensor
    latents: Latents
    metrics: dict[str, Tensor]
    _readable: Latents = field(repr=False)
    _decoder: Decoder = field(repr=False)
    _target: Callable[[], Tensor] = field(repr=False)

    @property
    def prediction(self) -> Tensor:
        """(B, N, dim) at every patch; computed on access, since the loss needs only a part."""
        hidden = self._decoder(self._readable)
        return self._decoder.project(hidden.to(next(self._decoder.parameters()).dtype))

    @property
    def target(self) -> Tensor:
        """(B, N, dim) at every patch; computed on access."""
        return self._target()


class MaskedImageModel(nn.Module):
    """A backbone pre-trained by predicting what a mask hides.

    Args:
        backbone: a timm model of one of the families of :mod:`mim.model.backbones`.
        regime: how hidden patches meet it.
        decoder: what predicts them.
        target: what must be predicted.
        mask_generator: what draws the masks of :meth:`draw_mask`.
        mask_network: the network of a generator that is trained.
        teacher: an EMA copy of the backbone, where the generator or the target reads one.
    """

    def __init__(
        self,
        backbone: nn.Module,
        regime: Regime,
        decoder: Decoder,
        target: Target,
        mask_generator: MaskGenerator,
        mask_network: nn.Module | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.regime = regime
        self.decoder = decoder
        self.target = target
        self.mask_generator = mask_generator
        self.mask_network = mask_network
        self.teacher = teacher

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return grid_of(self.backbone)

    @property
    def patch_size(self) -> tuple[int, int]:
        """(height, width) of a patch in pixels."""
        return patch_size_of(self.backbone)

    @torch.no_grad()
    def draw_mask(
        self,
        images: Images,
        keys: Tensor,
        *,
        epoch: int = -1,
        sample_ids: Tensor | None = None,
        repeats: int = 1,
    ) -> PatchMask:
        """Draw masks by the model's generator, on the device of the images.

        Those that need no image are drawn on the host, where nothing must be read back to know how
        many patches are visible: 4,096 masks of 196 patches take one CPU core 59 ms (``random``),
        7 (``column``) to 93 ms (``block``). The copy to the device does not wait.

        Args:
            images: (B, C, H, W), normalised, or patches of images of different sizes.
            keys, epoch, sample_ids: as :meth:`mim.masks.MaskGenerator.__call__` takes them.
            repeats: masks of each image, one after another; the first is that of a single one.
        """
        generator = self.mask_generator
        if repeats > 1:
            keys = repeat_keys(keys, repeats)
            sample_ids = None if sample_ids is None else sample_ids.repeat_interleave(repeats)

        def each(values: Tensor) -> Tensor:
            return values.repeat_interleave(repeats, dim=0) if repeats > 1 else values

        if isinstance(images, Patches):
            mask = generator.draw_sizes(images, keys, epoch=epoch, sample_ids=sample_ids)
            return to_device(mask, images.device)
        teacher, network = self.teacher, self.mask_network
        with torch.autocast(images.device.type, enabled=False):  # ranks must not hang on rounding
            mask = generator(
                self.grid,
                keys,
                epoch=epoch,
                sample_ids=sample_ids,
                images=each(images) if generator.sees_images else None,
                attention=None if teacher is None else lambda _: each(teacher.attention(images)),
                network=None if network is None else lambda _: each(network(images)),
            )
        return to_device(mask, images.device)

    def update_teacher(self, taken: Tensor | float = 1.0, decay: float | None = None) -> None:
        """Move the teacher, where there is one, after a step; not at all where ``taken`` is 0.

        ``decay`` is this step's, by default the teacher's own.
        """
        if self.teacher is not None:
            self.teacher.update(self.backbone, taken, decay)

    def latents(self, images: Images, mask: PatchMask | None = None) -> Latents:
        """Encode normalised images under a mask; None hides nothing."""
        if isinstance(images, Patches):
            mask = PatchMask.empty_of(images.valid) if mask is None else mask
            latents = self.regime(self.backbone, images, mask)
            return replace(latents, coords=images.coords, patch_valid=mask.valid)
        if mask is None:
            count = self.grid[0] * self.grid[1]
            mask = PatchMask.empty(len(images), count, images.device)
        return self.regime(self.backbone, images, mask)

    def encode(self, images: Images, mask: PatchMask | None = None) -> Tensor:
        """Return the tokens of :meth:`latents`, prefix first, (B, P + T, D).

        Without a mask they equal timm's own ``backbone.forward_features(images)`` up to rounding,
        a map laid out row by row. With one, ``drop`` returns the visible patches only; the other
        regimes return all, in order.
        """
        return self.latents(images, mask).tokens

    def forward(self, images: Images, mask: PatchMask, weight: Tensor | None = None) -> Output:
        """Encode, predict, and compute the loss.

        Args:
            images: (B, C, H, W), normalised, or patches of images of different sizes.
            mask: (B, N), what is hidden; or (B R, N), R masks of each image one after another.
            weight: (B,) how much each image counts; 0 leaves it out, whatever its pixels hold.
        """
        repeats = len(mask) // len(images)
        if weight is not None:
            # Not only its loss: a NaN anywhere in the forward pass makes 0 * NaN in the backward.
            out = weight == 0
            if isinstance(images, Patches):
                images = images.left_out(out)
            else:
                images = images.masked_fill(out.view(-1, 1, 1, 1), 0.0)
        full_target, of_images = partial(self._target, images, repeats), weight
        if repeats > 1:
            assert isinstance(images, Tensor)  # see _check_sizes
            images = images.repeat_interleave(repeats, dim=0)
            weight = None if weight is None else weight.repeat_interleave(repeats)
        latents = self.latents(images, mask)
        readable = latents
        norm = family_of(self.backbone).pool_norm
        if not isinstance(norm, nn.Identity):
            # Models that norm after pooling have no norm on tokens; here each token is a pool.
            readable = replace(latents, tokens=norm(latents.tokens))
        if self.decoder.predicts_blocks:
            readable = replace(readable, mask=mask)
        if self.target.context.loss_on == "all":
            ids, valid = None, mask.valid
        elif self.decoder.predicts_blocks and mask.target_ids is not None:
            ids = mask.target_ids.flatten(1)  # (B, T A)
            valid = None if mask.target_valid is None else mask.target_valid.flatten(1)
        else:
            # The parts do not both take a share.
            share = (
                min(self.decoder.share_at(mask), self.regime.predict_share)
                if self.training
                else 1.0
            )
            ids, valid = mask.masked_share(share)
        target = full_target(ids)  # (B, M, dim)
        predicted = self.decoder.project(self.decoder(readable, ids))  # (B, M, dim)
        distance = self.target.distance(predicted, target, images=images, ids=ids, mask=mask)
        losses = per_image_loss(distance, valid)  # of (B, M)
        reconstruction = loss = _weighted_mean(losses, weight)
        terms: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        if self.training:
            forward = Forward(images, mask, latents, ids, valid, predicted, target, distance)
            for name, term in self._terms(forward):
                if name in terms:
                    raise ValueError(f"two components give a term of the loss the name {name!r}")
                # A term may be of images, whatever the number of their masks.
                counts = of_images if len(losses) != term.numel() else weight
                terms[name] = term if term.ndim == 0 else _weighted_mean(term, counts)
                loss = loss + terms[name]
            for part in (self.regime, self.decoder, self.target):
                metrics |= part.metrics(forward)
        losses = losses.view(-1, repeats).mean(dim=1)
        parts = (readable, self.decoder, full_target)
        return Output(loss, reconstruction, terms, losses, latents, metrics, *parts)

    def _target(self, images: Images, repeats: int, ids: Tensor | None = None) -> Tensor:
        """Compute the target once for each image, at the patches ``ids`` (B R, M) of its masks.

        Returns:
            (B R, M, dim), or (B R, N, dim) at every patch.
        """
        if ids is None:
            target = self.target(images, self.teacher)
            return target if repeats == 1 else target.repeat_interleave(repeats, dim=0)
        if repeats == 1:
            return self.target.at(images, ids, self.teacher)
        target = self.target.at(images, ids.reshape(len(images), -1), self.teacher)
        return target.view(*ids.shape, -1)

    def _terms(self, forward: Forward) -> Iterator[tuple[str, Tensor]]:
        """Collect what the parts of the model add to the loss."""
        for part in (self.regime, self.decoder, self.target):
            yield from part.terms(forward).items()
        if self.mask_network is not None:
            ids, valid, distance = forward.ids, forward.valid, forward.distance
            if ids is None:
                ids, valid = forward.mask.masked_ids, forward.mask.masked_valid
                distance = distance.gather(1, ids)
            logits = self.mask_network(forward.images)  # (B, N)
            yield "mask_network", self.mask_generator.objective(logits, ids, distance, valid)


def _weighted_mean(values: Tensor, weight: Tensor | None) -> Tensor:
    """Average over images; a weight of 0 leaves one out, whatever its value."""
    if weight is None:
        return values.mean()
    counted = torch.where(weight > 0, values * weight, 0.0)
    return counted.sum() / weight.sum().clamp(min=torch.finfo(values.dtype).tiny)


def build_model(config: Config) -> MaskedImageModel:
    """Build the model that ``config`` describes; all weights follow from the seed alone.

    Raises:
        UserError: if a name is unknown or the parts do not fit together.
    """
    data, model = config.data, config.model
    vit = build_backbone(model, data.size, data.channels, config.seed)
    family = family_of(vit)
    grid, patch = family.grid, family.patch_size
    # Where image sizes differ, masks are checked on the grid of each image.
    generator = build_mask_generator(config.mask, None if data.keeps_aspect else grid, patch)
    regime = build_regime(model.regime, vit, config.seed)
    if not regime.keeps_all_tokens and not family.takes_padding:
        _refuse_ratios(config)
    regime.checkpointing = config.train.gradient_checkpointing
    regime.packs = data.batching == "packed"
    shape = (patch, data.channels, grid, family.width, len(family.blocks))
    context = TargetContext(*shape, data.mean, data.std, family.has_class_token)
    target = build_target(model.target, context, config.seed)
    on_border = family.prefix_on_border
    needs = DecoderContext(
        family.width, target.dim, grid, regime, family.num_prefix, on_border, target.build_head
    )
    decoder = build_decoder(model.decoder, needs, config.seed)
    decoder.packs = regime.packs
    if data.keeps_aspect:
        _check_sizes(config, family, generator, regime, target)
        if not decoder.takes_sizes:
            reason = "works on one grid of patches, and data.aspect is keep"
            raise setting_error("model.decoder.name", model.decoder.name, reason)
    if decoder.predicts_blocks and target.context.loss_on == "all":
        reason = "predicts target blocks, and model.target.loss_on is all"
        raise setting_error("model.decoder.name", model.decoder.name, reason)
    if target.reads_batch and config.train.accumulate > 1:
        reason = f"must be 1 with model.target.name={model.target.name!r}, which compares all "
        reason += "images of a batch"
        raise setting_error("train.accumulate", config.train.accumulate, reason)
    set_norm_eps(decoder, model.norm_eps)
    if target.context.loss_on == "all":
        reason = "must be 1 with model.target.loss_on=all: a share is one of the hidden patches"
        if decoder.share < 1:
            raise setting_error(f"model.decoder.{model.decoder.name}.share", decoder.share, reason)
        if regime.predict_share < 1:
            setting = "model.regime.zero.predict_share"
            raise setting_error(setting, regime.predict_share, reason)
    if decoder.needs_layers and not family.is_uniform:
        reason = f"needs blocks of one width, and {model.backbone} has several; choose last"
        setting = f"model.decoder.{model.decoder.name}.layers"
        raise setting_error(setting, decoder.settings.layers, reason)
    regime.collects_layers, regime.collects_input = decoder.needs_layers, decoder.needs_input
    if decoder.needs_input:  # what nobody reads has no gradient, which processes would wait for
        vit.norm.requires_grad_(False)
    if generator.is_trained and config.train.weights != "fp32":
        reason = "does not work with a trained mask generator; choose fp32"
        raise setting_error("train.weights", config.train.weights, reason)
    network = generator.network(data.channels, config.seed) if generator.is_trained else None
    teacher = None
    if generator.needs_attention or target.needs_teacher:
        if generator.needs_attention and not family.splits:
            reason = f"needs plain timm blocks, and {model.backbone} has others"
            raise setting_error("mask.name", config.mask.name, reason)
        if target.needs_mlps and not family.splits:
            reason = f"needs plain timm blocks, and {model.backbone} has others; choose block"
            raise setting_error(f"model.target.{model.target.name}.layers", "mlp", reason)
        if target.needs_teacher and not family.is_uniform:
            reason = f"needs blocks of one width, and {model.backbone} has several"
            raise setting_error("model.target.name", model.target.name, reason)
        teacher = Teacher(vit, model.teacher_decay)
    return MaskedImageModel(vit, regime, decoder, target, generator, network, teacher)


def _refuse_ratios(config: Config) -> None:
    """Refuse ratios drawn for each image, where all must show equally many patches."""
    if config.mask.unmasked:
        reason = f"shows all patches of some images, and {config.model.backbone} takes no padding "
        reason += f"with model.regime.name={config.model.regime.name!r}: choose 0"
        raise setting_error("mask.unmasked", config.mask.unmasked, reason)
    to = config.mask.schedule.to
    for setting, ratio in (("mask.ratio", config.mask.ratio), ("mask.schedule.to", to)):
        if isinstance(ratio, tuple) and ratio[0] != ratio[1]:
            reason = "draws one for each image, and with model.regime.name="
            reason += f"{config.model.regime.name!r} {config.model.backbone} takes no padding: "
            reason += "give one ratio"
            raise setting_error(setting, ratio, reason)


def _check_sizes(
    config: Config, family: Family, generator: MaskGenerator, regime: Regime, target: Target
) -> None:
    """Refuse parts that take images of one size only, or that cannot share a sequence."""
    name = config.model.backbone
    if not family.takes_sizes:
        able = "takes images of one size, and data.aspect is keep; choose a naflexvit or a "
        raise setting_error("model.backbone", name, f"{able}ViT with a position embedding")
    if config.data.batching == "packed" and not family.packs:
        reason = f"packs plain timm blocks, and {name} has others; choose padded"
        raise setting_error("data.batching", "packed", reason)
    generator.check_sizes()
    if config.mask.repeats > 1:
        reason = "takes images of one size, and data.aspect is keep; choose 1"
        raise setting_error("mask.repeats", config.mask.repeats, reason)
    if not regime.takes_sizes:
        reason = "takes images of one size, and data.aspect is keep"
        raise setting_error("model.regime.name", config.model.regime.name, reason)
    if not target.takes_sizes:
        able = ", ".join(target for target in TARGETS if TARGETS.get(target).takes_sizes)
        reason = f"is made of images of one size, and data.aspect is keep; choose {able}"
        raise setting_error("model.target.name", config.model.target.name, reason)


def check_config(config: Config) -> None:
    """Refuse a config whose parts do not fit, without allocating the weights.

    Raises:
        UserError: as :func:`build_model`, and where training needs a package that is not there.
    """
    if config.train.precision == "fp8" and find_spec("torchao") is None:
        reason = "needs torchao: pip install -e '.[float8]'; or choose bf16"
        raise setting_error("train.precision", config.train.precision, reason)
    with torch.device("meta"):
        build_model(config)
