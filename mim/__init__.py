"""mim: one ViT under interchangeable masking regimes; what is each worth, and what does it cost?

Names are imported when first used, so that ``import mim`` and ``mim --help`` do not wait for torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mim import moved

if TYPE_CHECKING:
    from mim.api import compare as compare
    from mim.api import embed as embed
    from mim.api import evaluate as evaluate
    from mim.api import predict as predict
    from mim.api import pretrain as pretrain
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
    "compare": "mim.api",
    "Config": "mim.training.settings",
    "MIMFeatures": "mim.sklearn",
    "PatchMask": "mim.masks",
    "UserError": "mim.core.errors",
    "build_model": "mim.model.model",
    "embed": "mim.api",
    "encode": "mim.model",
    "evaluate": "mim.api",
    "export_run": "mim.interop",
    "finetune": "mim.evaluate.finetune",
    "import_model": "mim.interop",
    "import_run": "mim.interop",
    "load": "mim.training.loading",
    "load_config": "mim.training.settings",
    "predict": "mim.api",
    "pretrain": "mim.api",
    "sample_masks": "mim.masks",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mim' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


class _Callable(ModuleType):
    """A module that is also the function of its name, as ``mim.compare`` is."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(import_module("mim.api"), self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Package(ModuleType):
    """Makes sub-modules callable that have the name of a function, as they are imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOME and type(value) is ModuleType:
            value.__class__ = _Callable
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
