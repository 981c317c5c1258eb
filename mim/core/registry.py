"""Named components: a new one is one class in one file, with its settings and its registration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from mim.core.errors import UserError, choice_error, setting_error
from mim.core.fields import add_block, hints

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps the names users write in a config to components.

    Args:
        setting: the dotted key whose value is looked up here; errors name it.
        block: the block of settings that holds this key, and to which each component adds a block
            of its own.
        called: other names of components, and what they are called here; errors say so.
    """

    def __init__(
        self, setting: str, block: type | None = None, called: Mapping[str, str] | None = None
    ) -> None:
        self.setting, self.block, self.called = setting, block, called or {}
        self._prefix = setting if block is None else setting.rpartition(".")[0]
        self._entries: dict[str, T] = {}

    def register(self, name: str, settings: type | None = None) -> Callable[[T], T]:
        """Add the decorated entry under ``name``; a class without a ``name`` gets it, for messages.

        Its ``settings``, a frozen dataclass with a default for each field, then stand under the
        name in the config, in ``--help`` and in the run folder.
        """
        where = f"{self._prefix}.{name}"

        def add(entry: T) -> T:
            if name in self._entries or (self.block is not None and name in hints(self.block)):
                raise UserError(f"{self.setting}: {name!r} is taken; register another name")
            if settings is not None:
                is_frozen = dataclasses.is_dataclass(settings) and settings.__hash__ is not None
                if not is_frozen or not name.isidentifier():
                    raise UserError(f"{where}: its settings must be a frozen dataclass")
                if "where" not in vars(settings):
                    settings.where = where  # type: ignore[attr-defined]
                if self.block is not None:
                    add_block(self.block, name, settings)
                entry.Settings = settings  # type: ignore[attr-defined]
            if isinstance(entry, type) and "name" not in vars(entry):
                entry.name = name  # type: ignore[attr-defined]
            self._entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> T:
        """Look up ``name``; a ``UserError`` lists the valid ones."""
        if name not in self._entries and name.lower() in self.called:
            reason = f"is called {self.called[name.lower()]!r} here"
            raise setting_error(self.setting, name, reason)
        if name not in self._entries:
            raise choice_error(self.setting, name, self._entries)
        return self._entries[name]

    def settings(self, name: str) -> Any:
        """Return the class of the settings of ``name``; of a subclass without any, its parent's."""
        return getattr(self.get(name), "Settings", None)

    def chosen(self, block: Any, name: str) -> Any:
        """Return the settings of ``name`` in a block; None where it has none."""
        kind = self.settings(name)
        keys = [key for key, hint in hints(type(block)).items() if kind and hint is kind]
        return getattr(block, keys[0]) if keys else None

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))
