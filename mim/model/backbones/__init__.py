"""The encoder: a timm model, used through timm's own modules; its state dict stays timm's.

``family.py`` says what a kind of backbone must tell; each kind has a file; ``build.py`` makes a
model and loads its weights.
"""

from mim.model.backbones.build import (
    build_backbone,
    check_arguments,
    fixed_grid,
    grid_of,
    load_backbone,
    load_weights,
    misfit_of,
    patch_size_of,
    resize_positions,
    set_norm_eps,
    sincos_position_embedding,
    supports_split,
)
from mim.model.backbones.capi import CapiFamily
from mim.model.backbones.family import (
    FAMILIES,
    UNIT,
    Embedded,
    Family,
    attention_maps,
    block_outputs,
    family_of,
    patch_attention,
    register_family,
    resample_positions,
)
from mim.model.backbones.hiera import HieraFamily
from mim.model.backbones.naflex import NaFlexViT
from mim.model.backbones.plain import PlainViT, block_at
from mim.model.backbones.relative import BeitFamily, RelativeViT, RelPosViT
from mim.model.backbones.rotary import RotaryViT
from mim.model.backbones.swin import Swin

__all__ = [
    "FAMILIES",
    "UNIT",
    "BeitFamily",
    "CapiFamily",
    "Embedded",
    "Family",
    "HieraFamily",
    "NaFlexViT",
    "PlainViT",
    "RelPosViT",
    "RelativeViT",
    "RotaryViT",
    "Swin",
    "attention_maps",
    "block_at",
    "block_outputs",
    "build_backbone",
    "check_arguments",
    "family_of",
    "fixed_grid",
    "grid_of",
    "load_backbone",
    "load_weights",
    "misfit_of",
    "patch_attention",
    "patch_size_of",
    "register_family",
    "resample_positions",
    "resize_positions",
    "set_norm_eps",
    "sincos_position_embedding",
    "supports_split",
]
