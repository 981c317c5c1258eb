"""From a file of weights to a model, and to a run folder that every verb takes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from timm import create_model, list_models
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mim.core.config import Config
from mim.core.errors import UserError, choice_error, setting_error
from mim.core.fields import fit
from mim.core.files import file_digest
from mim.core.settings import dotted, flatten, read_mapping, to_dict
from mim.interop.account import ADAPTED, LEFT_OUT, LOADED, Account, Entry
from mim.interop.adapt import (
    adapt_bias_table,
    adapt_patch_embedding,
    adapt_positions,
    square_grid,
)
from mim.interop.files import Weights, read_weights
from mim.interop.layouts import Converted, Kind, convert
from mim.model import MaskedImageModel, build_model
from mim.model.backbones import (
    check_arguments,
    fixed_grid,
    grid_of,
    misfit_of,
    patch_size_of,
    sincos_position_embedding,
)
from mim.model.teacher import Teacher
from mim.training import checkpoint
from mim.training.optim import build_optimizer
from mim.training.results import update_result
from mim.training.runtime.cost import environment
from mim.training.settings import load_config

PARTS = ("model", "encoder")
ACCOUNT = "import.json"
IMPORTED = "imported"
"""``status`` in the ``result.json`` of a run folder that was imported and not trained on."""

# (width, depth) -> timm's name for it; the sizes of ViT, DeiT, MAE and DINOv2.
_SIZES = {
    (192, 12): "tiny",
    (384, 12): "small",
    (768, 12): "base",
    (1024, 24): "large",
    (1280, 32): "huge",
}
# width -> heads, for the sizes above and DINOv2's giant: weights do not say how they are cut.
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1536: 24}
_MAE_DECODER_HEADS = {512: 16}
_CLASSES: dict[Kind, type[nn.Module]] = {
    "plain": VisionTransformer,
    "beit": Beit,
    "swin": SwinTransformer,
}
_PATCH = "backbone.patch_embed.proj.weight"
_DECODER_PIXELS = ("decoder.head.weight", "decoder.head.bias")


@dataclass(frozen=True, eq=False)
class Imported:
    """A model with a file's weights."""

    config: Config
    """Describes the model."""
    model: MaskedImageModel
    """In eval mode, on the CPU."""
    account: Account
    """What became of every entry of the file."""
    source: Path
    """The file."""

    @property
    def has_decoder(self) -> bool:
        """Whether the decoder's weights came from the file."""
        return not any(key.startswith("decoder.") for key in self.account.initial)


def import_model(
    file: str | Path,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    backbone: str | None = None,
    style: str | None = None,
    part: str = "model",
    key: str | None = None,
    config: str | Path | None = None,
) -> Imported:
    """A model with the weights of a file of any known layout.

    What the file says (sizes, heads, regime, decoder, target) is the config; ``config`` and then
    ``overrides`` change it, and the weights are adapted to another image size, patch size or
    number of channels.

    Args:
        file: see :func:`mim.interop.read_weights`.
        overrides: as of :func:`mim.load_config`.
        backbone: timm's name of the encoder, where the weights alone do not tell enough; its
            width, depth, heads and patch size are then the model's.
        style: key style the file must have, one of ``FAMILIES``.
        part: ``model``, or ``encoder`` to leave a decoder and a mask token out.
        key: under which name a torch file holds the weights.
        config: a YAML file whose settings stand above what the file says.

    Raises:
        UserError: for a file that cannot be read or is of no known layout, weights that are
            missing, unknown or of another architecture, or an adaptation that is not sound.
    """
    if part not in PARTS:
        raise choice_error("--part", part, PARTS)
    weights = read_weights(file, key)
    found = convert(weights.tensors, style)
    left_out = {**weights.left_out, **found.left_out}
    pieces = dict(found.pieces)
    if part == "encoder":
        for target in [target for target in pieces if not target.startswith("backbone.")]:
            for source in pieces.pop(target).sources:
                left_out[source] = "the encoder alone was asked for (--part encoder)"
    state = {target: piece.value for target, piece in pieces.items()}
    user_settings = {} if config is None else flatten(read_mapping(config))
    user_settings |= dotted(overrides)
    if backbone is not None:
        user_settings["model.backbone"] = backbone
    reader = _Reader(weights, found, state, backbone, user_settings)
    resolved = load_config(None, reader.config(user_settings))
    model = build_model(resolved).eval()
    own = model.state_dict()
    fitted, notes = _fit(state, own, model, reader)

    entries = [Entry(source, LEFT_OUT, "", reason) for source, reason in left_out.items()]
    for source in weights.tensors:
        if source in left_out:
            continue
        targets = [piece for piece in pieces.values() if source in piece.sources]
        how = [n for p in targets for n in (p.note, notes.get(p.target, "")) if n]
        outcome = ADAPTED if how else LOADED
        names = ", ".join(piece.target for piece in targets)
        entries.append(Entry(source, outcome, names, "; ".join(dict.fromkeys(how))))
    account = Account(
        family=found.family,
        entries=tuple(entries),
        initial=tuple(key for key in own if key not in fitted),
        notes=(*weights.notes, *reader.notes),
    )
    model.load_state_dict({**own, **fitted})
    if model.teacher is not None and not any(key.startswith("teacher.") for key in fitted):
        # It is an average of the encoder, and so begins as the imported one.
        model.teacher = Teacher(model.backbone, resolved.model.teacher_decay)
    return Imported(resolved, model, account, weights.path)


def settings_of(file: str | Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The dotted settings of a model with the weights of a file, ``given`` above them.

    Raises:
        UserError: as :func:`import_model`.
    """
    weights = read_weights(file)
    found = convert(weights.tensors)
    backbone = given.get("model.backbone")
    return _Reader(weights, found, found.state, backbone, given).config(given)


class _Reader:
    """What weights and the files beside them say of the model.

    ``state`` holds the tensors by this package's names, and ``backbone`` is timm's name, where the
    user gave one.
    """

    def __init__(
        self,
        weights: Weights,
        found: Converted,
        state: dict[str, Tensor],
        backbone: str | None,
        given: Mapping[str, Any],
    ) -> None:
        self.weights, self.found, self.state = weights, found, state
        # timm's own config.json beside the file names the model and what departs from it.
        named = weights.config.get("architecture")
        is_named = backbone is None and isinstance(named, str) and named in list_models()
        self.backbone = named if is_named else backbone
        self.named_args = _named_args(weights.config) if is_named else {}
        self.notes: list[str] = []
        self.own = self._own_config()
        patch = state[_PATCH]
        if patch.ndim != 4:
            raise UserError(f"{_PATCH}: has {patch.ndim} dimensions; a convolution's 4 are read")
        self.width, self.channels = int(patch.shape[0]), int(patch.shape[1])
        self.patch = (int(patch.shape[2]), int(patch.shape[3]))
        self.prefix = sum(
            int(state[f"backbone.{name}"].shape[1])
            for name in ("cls_token", "dist_token", "reg_token")
            if f"backbone.{name}" in state
        )
        self.grid, self.position_prefix = self._grid(self._wanted_grid(given))

    def _own_config(self) -> dict[str, Any]:
        """The config that this package's own files carry, flat; empty for others."""
        text = self.weights.metadata.get("mim_config")
        if not text:
            return {}
        try:
            return {k: v for k, v in flatten(json.loads(text)).items() if v is not None}
        except (ValueError, AttributeError) as error:
            raise UserError(f"{self.weights.path}: its config cannot be read: {error}") from error

    def _stated_grid(self) -> tuple[int, int] | None:
        """The grid by what stands beside the weights: a config, or a script's arguments."""
        size = self.own.get("data.image_size") or self.weights.config.get("image_size")
        simmim = self._simmim_data.get("IMG_SIZE")
        return self._grid_of(size or self.weights.arguments.get("input_size", simmim))

    @property
    def _simmim_data(self) -> Mapping[str, Any]:
        """The block of data in SimMIM's own config; empty for other files."""
        found = self.weights.arguments.get("DATA")
        return found if isinstance(found, Mapping) else {}

    def _wanted_grid(self, given: Mapping[str, Any]) -> tuple[int, int] | None:
        """The grid of the size that the user asks for, which may be that of the file."""
        size = given.get("data.image_size")
        return self._grid_of(fit("data.image_size", size, Any) if isinstance(size, str) else size)

    def _grid_of(self, size: Any) -> tuple[int, int] | None:
        sides = (size, size) if isinstance(size, int) else size
        is_pair = isinstance(sides, (list, tuple)) and len(sides) == 2
        if not is_pair or not all(isinstance(side, int) for side in sides):
            return None
        return sides[0] // self.patch[0], sides[1] // self.patch[1]

    def _shown_grid(self) -> tuple[int, int] | None:
        """The grid that fixed positions, of the encoder or of its decoder, were built for."""
        for key in ("backbone.pos_embed", "decoder.pos_embed"):
            table = self.state.get(key)
            if table is None or table.ndim != 3:
                continue
            for prefix in dict.fromkeys((self.prefix, 0)):
                grid = fixed_grid(table[0, prefix:])
                if grid is not None:
                    return grid
        return None

    def _grid(self, wanted: tuple[int, int] | None) -> tuple[tuple[int, int], int]:
        """(rows, columns) of the position embeddings, and how many belong to prefix tokens.

        What the positions show counts first, then what stands beside them, then the size that the
        user wants where it has as many, and at last a square.
        """
        positions = self.state.get("backbone.pos_embed")
        stated = self._stated_grid()
        if positions is None:
            usual = (224 // self.patch[0], 224 // self.patch[1])
            return stated or self._biased_grid() or usual, 0
        if positions.ndim != 3:
            raise UserError(f"backbone.pos_embed: has {positions.ndim} dimensions instead of 3")
        count = int(positions.shape[1])
        shown = self._shown_grid()
        for grid in (shown, stated, wanted):
            for prefix in dict.fromkeys((self.prefix, 0)):
                if grid is None or grid[0] * grid[1] != count - prefix:
                    continue
                if stated not in (None, grid) and math.prod(stated or ()) == count - prefix:
                    raise UserError(
                        f"{str(self.weights.path)!r}: its positions are those of {grid[0]} x "
                        f"{grid[1]} patches, but what stands beside them says {stated}"
                    )
                if grid not in (shown, stated):
                    self.notes.append(
                        f"learned positions do not show their grid: {grid[0]} x {grid[1]}, that "
                        "of data.image_size, is taken"
                    )
                return grid, prefix
        for prefix in dict.fromkeys((self.prefix, 0)):
            square = square_grid(count - prefix)
            if square is not None:
                return square, prefix
        raise UserError(
            f"backbone.pos_embed: {count} positions are no square grid, with {self.prefix} prefix "
            "tokens or without, and nothing beside the file says which grid they are; it cannot "
            "be read"
        )

    def _biased_grid(self) -> tuple[int, int] | None:
        """The square grid that BEiT's tables, or the masks of Swin's shifted windows, are for."""
        if self.found.kind == "beit":
            side = math.isqrt(len(self._table()) - 3)  # three offsets are of the class token
            return square_grid(((side + 1) // 2) ** 2)
        for key, value in self.weights.tensors.items():
            if key.endswith("layers.0.blocks.1.attn_mask"):  # (windows, places, places)
                return square_grid(value.shape[0] * value.shape[1])
        return None

    def _table(self, stage: str = "") -> Tensor:
        """The first table of relative position biases, (offsets, heads)."""
        place, name = f"backbone.{stage}", "relative_position_bias_table"
        for key, value in self.state.items():
            if key.startswith(place) and key.endswith(name):
                return value
        raise UserError(f"the file is not whole: it lacks each {place}*.{name}")

    # --- the config ---

    def config(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Dotted settings: what the file says, then what the user gave."""
        settings = dict(self.own) if self.own else {**self._encoder(given), **self._rest(given)}
        for name in ("output", "resume", "seed", "plugins"):
            settings.pop(name, None)
        args = "model.backbone_args"
        if isinstance(given.get(args), Mapping):  # a block replaces the single settings
            settings = {k: v for k, v in settings.items() if not k.startswith(f"{args}.")}
        if "data.image_size" in given or "data.channels" in given:
            for name in ("data.mean", "data.std"):
                values = settings.get(name)
                channels = _number(given.get("data.channels", self.channels))
                if isinstance(values, (list, tuple)) and len(values) != channels:
                    del settings[name]
        settings |= {key: value for key, value in given.items() if value is not None}
        return settings

    def _encoder(self, given: Mapping[str, Any]) -> dict[str, Any]:
        of_kind = {"plain": self._plain, "beit": self._beit, "swin": self._swin}
        name, args = of_kind[self.found.kind](given)
        settings: dict[str, Any] = {"model.backbone": name}
        settings |= {f"model.backbone_args.{key}": value for key, value in args.items()}
        rows, columns = self.grid
        sides = (rows * self.patch[0], columns * self.patch[1])
        settings["data.image_size"] = sides[0] if sides[0] == sides[1] else list(sides)
        settings["data.channels"] = self.channels
        if self._has_fixed_positions():
            settings["model.position_embedding"] = "sincos2d"
        settings |= self._norm_eps()
        return settings

    def _plain(self, given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """timm's VisionTransformer that the weights are of, and its arguments."""
        state, depth = self.state, self._depth("backbone")
        block = "backbone.blocks.0"
        hidden = self._size(f"{block}.mlp.fc1.weight", 0)
        args: dict[str, Any] = {}
        name = self.backbone
        swiglu = hidden == 2 * self._size(f"{block}.mlp.fc2.weight", 1)
        if name is None:
            name = self._name(depth, swiglu)
            if not self.weights.config:
                self.notes.append(
                    "weights do not show an activation or the order of norms: those of the plain "
                    f"ViT are taken ({name}); name another by --backbone"
                )
            base = _meta_model(name)
            if patch_size_of(base) != self.patch:
                args["patch_size"] = self._patch_size
            heads = self._heads(given)
            size = {"embed_dim": self.width, "depth": depth, "num_heads": heads}
            had = (base.embed_dim, len(base.blocks), base.blocks[0].attn.num_heads)
            args |= {k: v for (k, v), old in zip(size.items(), had, strict=True) if v != old}
            ratio = _ratio(hidden, self.width)
            if int(base.blocks[0].mlp.fc1.out_features) != hidden or self.width != base.embed_dim:
                args["mlp_ratio"] = ratio
        else:
            base = _meta_model(name, self.named_args)
            args |= self.named_args
        has_class = "backbone.cls_token" in state
        pooled = "backbone.fc_norm.weight" in state
        registers = "backbone.reg_token" in state
        if not has_class and base.cls_token is not None:
            args |= {"class_token": False, "global_pool": "avg"}
        if pooled and isinstance(base.fc_norm, torch.nn.Identity):
            args["global_pool"] = "avg"
        elif not pooled and args.get("global_pool") == "avg":
            args["fc_norm"] = False
        if registers and getattr(base, "num_reg_tokens", 0) == 0:
            args["reg_tokens"] = int(state["backbone.reg_token"].shape[1])
        if "backbone.pos_embed" not in state:
            args["pos_embed"] = "none"
        elif self.prefix and self.position_prefix == 0 and not base.no_embed_class:
            args["no_embed_class"] = True
        if f"{block}.ls1.gamma" in state and isinstance(base.blocks[0].ls1, torch.nn.Identity):
            args["init_values"] = 1e-5
        if f"{block}.attn.qkv.bias" not in state:
            args["qkv_bias"] = False
        if f"{block}.attn.proj.bias" not in state:
            args["proj_bias"] = False
        if f"{block}.attn.q_norm.weight" in state:
            args["qk_norm"] = True
        if "backbone.norm_pre.weight" in state:
            args["pre_norm"] = True
        if "backbone.norm.weight" not in state and not pooled:
            args["final_norm"] = False
        return name, args

    def _beit(self, given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """timm's Beit that the weights are of (BEiT, SimMIM's ViT), and its arguments."""
        block, table = "backbone.blocks.0", "relative_position_bias_table"
        name = self.backbone or f"beit_{'large' if self.width == 1024 else 'base'}_patch16_224"
        _meta_model(name, self.named_args, "beit")
        return name, {
            **self.named_args,
            "patch_size": self._patch_size,
            "embed_dim": self.width,
            "depth": len(self.found.blocks[0]),
            "num_heads": int(self._table().shape[1]),
            "mlp_ratio": _ratio(self._size(f"{block}.mlp.fc1.weight", 0), self.width),
            "qkv_bias": f"{block}.attn.q_bias" in self.state,
            "init_values": 0.1 if f"{block}.gamma_1" in self.state else None,
            "use_rel_pos_bias": f"{block}.attn.{table}" in self.state,
            "use_shared_rel_pos_bias": f"backbone.rel_pos_bias.{table}" in self.state,
            "use_abs_pos_emb": "backbone.pos_embed" in self.state,
            "global_pool": "avg" if "backbone.fc_norm.weight" in self.state else "token",
        }

    def _swin(self, given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """timm's SwinTransformer that the weights are of, and its arguments."""
        size = {96: "tiny", 192: "large"}.get(self.width, "base")
        name = self.backbone or f"swin_{size}_patch4_window7_224"
        _meta_model(name, self.named_args, "swin")
        stages = sorted(self.found.blocks)
        return name, {
            **self.named_args,
            "patch_size": self._patch_size,
            "embed_dim": self.width,
            "depths": [len(self.found.blocks[stage]) for stage in stages],
            "num_heads": [int(self._table(f"layers.{stage}.").shape[1]) for stage in stages],
            "window_size": (math.isqrt(len(self._table("layers.0."))) + 1) // 2,
        }

    @property
    def _patch_size(self) -> int | list[int]:
        return self.patch[0] if self.patch[0] == self.patch[1] else list(self.patch)

    def _depth(self, part: str) -> int:
        pattern = re.compile(rf"{part}\.blocks\.\d+\.norm1\.weight")
        return sum(pattern.fullmatch(key) is not None for key in self.state)

    def _size(self, key: str, dim: int) -> int:
        if key not in self.state:
            raise UserError(f"the file is not whole: it lacks what {key} needs")
        return int(self.state[key].shape[dim])

    def _name(self, depth: int, swiglu: bool) -> str:
        if "backbone.dist_token" in self.state:
            return "deit_base_distilled_patch16_224"
        if swiglu:
            return "vit_giant_patch14_dinov2"
        size = _SIZES.get((self.width, depth), "base")
        exact = f"vit_{size}_patch{self.patch[0]}_224"
        return exact if exact in list_models() else f"vit_{size}_patch16_224"

    def _heads(self, given: Mapping[str, Any]) -> int:
        setting = "model.backbone_args.num_heads"
        if setting in given:
            return _number(given[setting])
        beside = self.weights.config.get("num_attention_heads")
        if isinstance(beside, int):
            return beside
        if self.width in _HEADS:
            return _HEADS[self.width]
        raise UserError(
            f"{setting}: a width of {self.width} does not say into how many attention heads it is "
            f"cut, and no config.json beside the file does; give --{setting}, or --backbone"
        )

    def _has_fixed_positions(self) -> bool:
        """Whether the position embeddings are MAE's sines and cosines, in its order or in ours."""
        positions = self.state.get("backbone.pos_embed")
        if positions is None or self.width % 4 or self.position_prefix not in (0, self.prefix):
            return False
        if positions.shape[2] != self.width:
            return False
        ours = sincos_position_embedding(self.grid, self.width, self.position_prefix)
        quarter = ours.split(self.width // 4, dim=2)  # sin row, sin column, cos row, cos column
        by_row = torch.cat([quarter[0], quarter[2], quarter[1], quarter[3]], dim=2)
        by_column = torch.cat([quarter[1], quarter[3], quarter[0], quarter[2]], dim=2)
        return any(
            torch.allclose(positions, candidate, atol=1e-3, rtol=0)
            for candidate in (ours, by_row, by_column)
        )

    def _norm_eps(self) -> dict[str, Any]:
        if self.found.style != "hf":
            return {}
        eps = self.weights.config.get("layer_norm_eps")
        if eps is None:
            eps = 1e-6 if "DINOv2" in self.found.family else 1e-12
            self.notes.append(
                f"no config.json beside the file says layer_norm_eps: Hugging Face's {eps:g} is "
                "assumed; set model.norm_eps"
            )
        return {} if eps == 1e-6 else {"model.norm_eps": eps}

    def _rest(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of regime, decoder, target, mask and normalisation."""
        settings: dict[str, Any] = {}
        beside, arguments = self.weights.config, self.weights.arguments
        activation = beside.get("hidden_act", "gelu")
        if activation != "gelu":
            raise UserError(f"config.json: hidden_act {activation!r} is not timm's gelu")
        if "regime.mask_token" in self.state or self.found.kind == "swin":
            settings["model.regime.name"] = "token"
        if "decoder.embed.weight" in self.state:
            settings |= self._transformer(given)
            normalized = beside.get("norm_pix_loss", arguments.get("norm_pix_loss"))
            if normalized is None:
                normalized = False
                if "model.target.name" not in given:
                    self.notes.append(
                        "the file does not say whether its loss normalised patches: model.target."
                        "name is pixels, facebookresearch/mae's default"
                    )
            settings["model.target.name"] = "normalized_pixels" if normalized else "pixels"
        elif "decoder.head.weight" in self.state:
            settings |= {
                "model.decoder.name": "linear",
                "model.target.name": "pixels",
                "model.target.loss": "l1",
            }
        simmim = self._simmim_data.get("MASK_RATIO")
        ratio = beside.get("mask_ratio", arguments.get("mask_ratio", simmim))
        if isinstance(ratio, float) and 0 < ratio < 1:
            settings["mask.ratio"] = ratio
        settings |= self._normalisation(given)
        return settings

    def _normalisation(self, given: Mapping[str, Any]) -> dict[str, Any]:
        timm_config = self.weights.config.get("pretrained_cfg") or {}
        mean = self.weights.processor.get("image_mean", timm_config.get("mean"))
        std = self.weights.processor.get("image_std", timm_config.get("std"))
        if isinstance(mean, list) and isinstance(std, list) and len(mean) == self.channels:
            return {"data.mean": mean, "data.std": std}
        if self.channels != 3:
            return {}
        if not {"data.mean", "data.std"} & set(given):
            self.notes.append(
                "images are normalised by ImageNet's mean and deviation, as in MAE, DeiT, DINOv2 "
                "and SimMIM; set data.mean and data.std where that is not so"
            )
        return {"data.mean": list(IMAGENET_DEFAULT_MEAN), "data.std": list(IMAGENET_DEFAULT_STD)}

    def _transformer(self, given: Mapping[str, Any]) -> dict[str, Any]:
        depth = self._depth("decoder")
        width = self._size("decoder.embed.weight", 0)
        place = "model.decoder.transformer"
        heads = given.get(f"{place}.heads", self.weights.config.get("decoder_num_attention_heads"))
        heads = heads or _MAE_DECODER_HEADS.get(width)
        if heads is None:
            raise UserError(
                f"{place}.heads: a decoder of width {width} does not say into how many attention "
                f"heads it is cut, and no config.json beside the file does; give --{place}.heads"
            )
        ratio = 4.0
        if depth:
            ratio = _ratio(self._size("decoder.blocks.0.mlp.fc1.weight", 0), width)
        return {
            "model.decoder.name": "transformer",
            f"{place}.width": width,
            f"{place}.depth": depth,
            f"{place}.heads": _number(heads),
            f"{place}.mlp_ratio": ratio,
        }


def _named_args(config: Mapping[str, Any]) -> dict[str, Any]:
    """A timm model's arguments in its ``config.json``, but for those that are settings of data."""
    args = config.get("model_args") or {}
    if not isinstance(args, Mapping):
        raise setting_error("model_args", args, "must be a mapping (config.json beside the file)")
    data = ("img_size", "in_chans", "num_classes", "dynamic_img_size")
    args = {key: value for key, value in args.items() if key not in data}
    return check_arguments(args, "model_args")


def _meta_model(name: str, args: Mapping[str, Any] | None = None, kind: Kind = "plain") -> Any:
    """A timm model on the meta device, to read its sizes."""
    if name not in list_models():
        raise choice_error("--backbone", name, list_models("vit_*patch16_224"))
    with torch.device("meta"):
        model = create_model(name, num_classes=0, **(args or {}))
    if not isinstance(model, _CLASSES[kind]):
        reason = f"is a {type(model).__name__}; these weights go into a timm "
        reason += f"{_CLASSES[kind].__name__} (mim evaluate reads {name}@FILE)"
        raise setting_error("model.backbone", name, reason)
    return model


def _number(value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{value!r} is not a whole number") from error


def _ratio(hidden: int, width: int) -> float:
    """A ratio that gives exactly ``hidden`` where timm computes ``int(width * ratio)``."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def _fit(
    state: dict[str, Tensor],
    own: Mapping[str, Tensor],
    model: MaskedImageModel,
    reader: _Reader,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights in the model's shapes, and what was done to which.

    Raises:
        UserError: for weights that are missing, unknown, or of another shape that cannot be
            adapted.
    """
    fitted, notes = dict(state), {}
    grid = grid_of(model.backbone)
    channels, *patch = map(int, own[_PATCH].shape[1:])
    if state[_PATCH].shape[0] == own[_PATCH].shape[0]:  # else it is a misfit, below
        fitted[_PATCH], notes[_PATCH] = adapt_patch_embedding(
            state[_PATCH], channels, (patch[0], patch[1])
        )
        changed = notes[_PATCH]
        if changed and any(key in state for key in _DECODER_PIXELS):
            raise UserError(
                f"{str(reader.weights.path)!r}: its decoder predicts patches of "
                f"{reader.channels} channels and {reader.patch[0]} x {reader.patch[1]} pixels and "
                "cannot predict others; keep data.channels and the patch size, or leave it out "
                "with --part encoder"
            )
    _move_prefix_positions(fitted, own, model, reader, notes)
    for key in ("backbone.pos_embed", "decoder.pos_embed"):
        if key not in fitted or key not in own or fitted[key].shape[2:] != own[key].shape[2:]:
            continue  # a misfit, below
        prefix = own[key].shape[1] - grid[0] * grid[1]
        if fitted[key].shape[1] == prefix + reader.grid[0] * reader.grid[1]:
            fitted[key], note = adapt_positions(fitted[key], reader.grid, grid, prefix, key)
            notes[key] = "; ".join(filter(None, [notes.get(key, ""), note]))
    for key, table in state.items():
        shape = tuple(own[key].shape) if key in own else ()
        resizes = key.endswith("relative_position_bias_table") and shape[1:] == table.shape[1:]
        if resizes and shape != table.shape:
            part: Any = model.get_submodule(key.rpartition(".")[0])
            fitted[key], notes[key] = adapt_bias_table(table, part.window_size, shape, key)
    whole = {
        part
        for part in ("decoder.", "regime.", "target.", "teacher.", "mask_network.")
        if not any(key.startswith(part) for key in fitted)
    }
    required = {key: own[key] for key in own if not key.startswith(tuple(whole))}
    misfit = misfit_of(fitted, required)
    if misfit:
        raise UserError(f"{str(reader.weights.path)!r} is no such model: it {misfit}")
    return fitted, notes


def _move_prefix_positions(
    fitted: dict[str, Tensor],
    own: Mapping[str, Tensor],
    model: MaskedImageModel,
    reader: _Reader,
    notes: dict[str, str],
) -> None:
    """Where only one of file and model has positions for prefix tokens, keep the sums the same.

    The positions are added to the tokens themselves, or are zero.
    """
    key, vit = "backbone.pos_embed", model.backbone
    if key not in fitted or key not in own or not reader.prefix:
        return
    if not isinstance(vit, VisionTransformer):
        return  # a Beit has positions for all tokens
    positions = fitted[key]
    positioned = 0 if vit.no_embed_class else vit.num_prefix_tokens
    if positioned == reader.position_prefix or reader.prefix != vit.num_prefix_tokens:
        return
    if positioned:
        zeros = positions.new_zeros(1, positioned, positions.shape[2])
        fitted[key] = torch.cat([zeros, positions], dim=1)
        notes[key] = "zeros put in for the prefix tokens, which have no position"
        return
    fitted[key], start = positions[:, reader.prefix :], 0
    notes[key] = "positions of prefix tokens are added to the tokens"
    for name in ("cls_token", "dist_token", "reg_token"):
        token = f"backbone.{name}"
        if token in fitted:
            count = fitted[token].shape[1]
            fitted[token] = fitted[token] + positions[:, start : start + count]
            notes[token], start = "its position is added to it", start + count


def import_run(
    file: str | Path,
    output: str | Path,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    **options: Any,
) -> Imported:
    """Make a run folder from a file of weights.

    The folder holds ``config.yaml``, ``encoder.safetensors``, a checkpoint at step 0 (from which
    ``mim pretrain --config OUTPUT/config.yaml --resume auto`` continues with a new optimiser),
    ``result.json`` and ``import.json``, the account of every entry.

    Args:
        file: as of :func:`import_model`, as are ``overrides`` and ``options``.
        output: the run folder; it must not hold a run.
        overrides: see there.
        options: see there.

    Raises:
        UserError: as :func:`import_model`, and where ``output`` holds a run or cannot be written.
    """
    output = Path(output)
    # An import that was killed has its account and no result: it is done again.
    is_half = (output / ACCOUNT).is_file() and not (output / "result.json").exists()
    for name in ("config.yaml", "result.json", "encoder.safetensors"):
        if (output / name).is_file() and not is_half:
            raise setting_error("--output", str(output), "already holds a run; choose another")
    imported = import_model(file, overrides, **options)
    config = load_config(None, {**_flat(imported.config), "output": str(output)})
    checkpoint.prepare_folder(output, "--output")
    state = imported.model.state_dict()
    details = {"backbone": config.model.backbone, "source": str(imported.source.name)}
    origin = {
        "file": str(imported.source),
        "sha256": file_digest(imported.source),
        "family": imported.account.family,
        "decoder": imported.has_decoder,
    }
    account = {**origin, **asdict(imported.account)}
    checkpoint.write_json_atomic(output / ACCOUNT, account)  # first: see is_half
    checkpoint.write_config(output, config)
    optimizer = build_optimizer(config.optim, imported.model, 0.0)
    counters = {"elapsed": 0.0, "train_seconds": 0.0, "train_loss": float("nan")}
    start = {
        "fingerprint": json.dumps(checkpoint.fingerprint(config)),
        "model": state,
        "optimizer": optimizer.state_dict(),
        "ema": state if config.train.ema_decay else {},
        "scaler": {},
        "watch": {},
        "state": {**counters, "images": 0, "rows": []},
        "hooks": {},
    }
    checkpoint.save_checkpoint(output, start, 0, config.train.keep_checkpoints)
    backbone = checkpoint.backbone_state(state)
    checkpoint.save_encoder(output / "encoder.safetensors", backbone, details)
    result = {
        "format": checkpoint.FORMAT,
        "kind": "run",
        "name": output.name,
        "status": IMPORTED,
        "seed": config.seed,
        "steps": 0,
        "epochs": 0,
        "imported": origin,
        "environment": environment(torch.device("cpu"), 1),
        "config": to_dict(config),
    }
    update_result(output, lambda _: result)
    return Imported(config, imported.model, imported.account, imported.source)


def _flat(config: Config) -> dict[str, Any]:
    return {key: value for key, value in flatten(to_dict(config)).items() if value is not None}


_ARGUMENT = re.compile(r"--([a-z_]+(?:\.[a-z_0-9]+)*)(?:=(.*))?", re.DOTALL)


def dotted_arguments(args: Sequence[str]) -> dict[str, str]:
    """``--data.source photos --mask.ratio=0.6`` as settings.

    Raises:
        UserError: for anything else.
    """
    settings: dict[str, str] = {}
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        match = _ARGUMENT.fullmatch(arg)
        if match is None or ("." not in match[1] and match[1] not in ("seed", "plugins")):
            raise UserError(f"mim import: unrecognized argument {arg!r}")
        if match[2] is None and not rest:
            raise UserError(f"mim import: {arg} needs a value")
        settings[match[1]] = match[2] if match[2] is not None else rest.pop(0)
    return settings
