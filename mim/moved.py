"""Modules and names that have moved: code written for the old ones, such as plug-ins, still works.

Nothing in the package uses this. An entry stays for as long as run folders may name it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "mim.backbone": "mim.model.backbones",
    "mim.checkpoint": "mim.training.checkpoint",
    "mim.config": "mim.core.config",
    "mim.decoders": "mim.model.decoders",
    "mim.errors": "mim.core.errors",
    "mim.estimator": "mim.sklearn",
    "mim.keys": "mim.core.rng",
    "mim.masks.attention": "mim.model.attention",
    "mim.patches": "mim.core.patches",
    "mim.pretrain": "mim.training.pretrain",
    "mim.regimes": "mim.model.regimes",
    "mim.registry": "mim.core.registry",
    "mim.settings": "mim.core.settings",
    "mim.targets": "mim.model.targets",
    "mim.teacher": "mim.model.teacher",
    "mim.visualize": "mim.evaluate.visualize",
}

NAMES = {
    "mim.compare": {"compare": "mim.api"},
    "mim.compare.runner": {
        "compare": "mim.api",
        "read_compare_config": "mim.compare.plan",
        "server_context": "mim.compare.launchers",
        "SERVER_MODULES": "mim.compare.launchers",
    },
    "mim.core.config": {
        "AlignedMaskConfig": "mim.masks.patterns:AlignedSettings",
        "AttentionMaskConfig": "mim.masks.guided:AttentionSettings",
        "BlockMaskConfig": "mim.masks.patterns:BlockSettings",
        "CrossDecoderConfig": "mim.model.decoders:CrossAttentionSettings",
        "EmaFeaturesConfig": "mim.model.targets.features:EmaFeaturesSettings",
        "FeaturesConfig": "mim.model.targets.features:FeaturesSettings",
        "FileMaskConfig": "mim.masks.file:FileSettings",
        "FrequencyConfig": "mim.model.targets.frequency:FrequencySettings",
        "HogConfig": "mim.model.targets.hog:HogSettings",
        "HuggingFaceConfig": "mim.data.sources.tables:HuggingFaceSettings",
        "InverseBlockMaskConfig": "mim.masks.patterns:InverseBlockSettings",
        "LearnedMaskConfig": "mim.masks.guided:LearnedSettings",
        "LowPassConfig": "mim.model.targets.pixels:LowPassSettings",
        "MlpDecoderConfig": "mim.model.decoders:MlpSettings",
        "MultiblockMaskConfig": "mim.masks.patterns:MultiblockSettings",
        "TransformerDecoderConfig": "mim.model.decoders:TransformerSettings",
        "ZeroConfig": "mim.model.regimes:ZeroSettings",
    },
    "mim.core.settings": {
        "checked": "mim.training.settings",
        "load_config": "mim.training.settings",
    },
}
"""Names that have left a module which is still there; it asks :func:`attribute`."""


def attribute(module: str, name: str) -> Any:
    """Find what a module had under this name, where it is now; else an ``AttributeError``."""
    home, _, renamed = NAMES.get(module, {}).get(name, "").partition(":")
    if not home:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    return getattr(import_module(home), renamed or name)


class _Moved(MetaPathFinder, Loader):
    """Finds the present module for an old name."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        head = next((old for old in MOVED if name == old or name.startswith(f"{old}.")), None)
        return None if head is None else ModuleSpec(name, self, origin=MOVED[head])

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        head = next(old for old in MOVED if spec.name == old or spec.name.startswith(f"{old}."))
        return _Placeholder(import_module(MOVED[head] + spec.name.removeprefix(head)))

    def exec_module(self, module: ModuleType) -> None:
        assert isinstance(module, _Placeholder)
        sys.modules[module.old] = module.now


class _Placeholder(ModuleType):
    """Stands in until the import system has registered the module it found."""

    def __init__(self, now: ModuleType) -> None:
        super().__init__(now.__name__)
        self.now = now

    @property
    def old(self) -> str:
        assert self.__spec__ is not None
        return self.__spec__.name


def install() -> None:
    """Let old names be imported from now on."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
