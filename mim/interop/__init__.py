"""Weights in and out: timm, facebookresearch/mae, Hugging Face, SimMIM, DeiT, DINOv2, ONNX.

``import_run`` makes a run folder from a file, ``export_run`` a file from a run folder. Names are in
``layouts``, reading without running code in ``files``, and what may be resized in ``adapt``.
"""

from __future__ import annotations

from mim.interop.account import Account, Entry
from mim.interop.exports import FORMATS, Exported, export_run
from mim.interop.files import Weights, read_weights
from mim.interop.imports import Imported, dotted_arguments, import_model, import_run
from mim.interop.layouts import FAMILIES, Converted, Piece, convert, to_hf, to_mae, to_timm

__all__ = [
    "FAMILIES",
    "FORMATS",
    "Account",
    "Converted",
    "Entry",
    "Exported",
    "Imported",
    "Piece",
    "Weights",
    "convert",
    "dotted_arguments",
    "export_run",
    "import_model",
    "import_run",
    "read_weights",
    "to_hf",
    "to_mae",
    "to_timm",
]
