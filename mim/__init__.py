"""mim: one ViT under interchangeable masking regimes; what is each worth, and what does it cost?

Names are imported when first used, so that ``import mim`` and ``mim --help`` do not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mim import moved

if TYPE_CHECKING:
    from mim.core.config import Config as Config
    from mim.core.errors import UserError as UserError
    from mim.evaluate.finetune import finetune as finetune
    from mim.interop import export_run as export_run
    from mim.interop import import_model as import_model
    from mim.interop import import_run as import_run
    from mim.masks import PatchMask as PatchMask
    from mim.masks import sample_masks as sample_masks
    from mim.model import build_model as build_model
    from mim.model.encode import encode as encode
    from mim.sklearn import MIMFeatures as MIMFeatures
    from mim.training.loading import load as load
    from mim.training.settings import load_config as load_config

__version__ = "0.1.0"

moved.install()

_HOME = {
    "Config": "mim.training.settings",
    "MIMFeatures": "mim.sklearn",
    "PatchMask": "mim.masks",
    "UserError": "mim.core.errors",
    "build_model": "mim.model.model",
    "encode": "mim.model",
    "export_run": "mim.interop",
    "finetune": "mim.evaluate.finetune",
    "import_model": "mim.interop",
    "import_run": "mim.interop",
    "load": "mim.training.loading",
    "load_config": "mim.training.settings",
    "sample_masks": "mim.masks",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mim' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
