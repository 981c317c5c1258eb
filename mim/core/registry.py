"""Named components: a new one is one class in one file plus its registration beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from mim.core.errors import choice_error

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps the names users write in a config to what they mean.

    Args:
        setting: the dotted key whose value is looked up here; errors name it.
    """

    def __init__(self, setting: str) -> None:
        self.setting = setting
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds an entry under ``name``; a name is taken once."""

        def add(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.setting}: {name!r} is already registered")
            self._entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> T:
        """The entry of ``name``.

        Raises:
            UserError: if there is none; lists the valid names.
        """
        if name not in self._entries:
            raise choice_error(self.setting, name, self._entries)
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))
