"""What became of every entry of a file of weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

LOADED, ADAPTED, LEFT_OUT = "loaded", "adapted", "left out"


@dataclass(frozen=True)
class Entry:
    """One entry of the file."""

    key: str
    outcome: str
    """Loaded unchanged, adapted, or left out."""
    target: str = ""
    """The model's key it went to; empty where it was left out."""
    note: str = ""
    """How it was adapted, or why it was left out."""


@dataclass(frozen=True)
class Account:
    """All entries of a file, and what it lacked."""

    family: str
    """Whose layout the file has."""
    entries: tuple[Entry, ...]
    """One for each key of the file."""
    initial: tuple[str, ...] = ()
    """Keys of the model that keep their initial values."""
    notes: tuple[str, ...] = ()
    """What was assumed, and what holds for all entries."""

    def of(self, outcome: str) -> tuple[Entry, ...]:
        """The entries with one outcome."""
        return tuple(entry for entry in self.entries if entry.outcome == outcome)

    @property
    def left_out(self) -> tuple[str, ...]:
        """Keys of the file that no part of the model took."""
        return tuple(entry.key for entry in self.of(LEFT_OUT))

    def lines(self) -> list[str]:
        """The account for a reader: counts, then each adaptation and each key left out."""
        adapted, left_out = self.of(ADAPTED), self.of(LEFT_OUT)
        found = [
            f"{self.family}: {len(self.entries)} entries: {len(self.of(LOADED))} loaded, "
            f"{len(adapted)} adapted, {len(left_out)} left out"
        ]
        for outcome, entries in ((ADAPTED, adapted), (LEFT_OUT, left_out)):
            by_note: dict[str, list[str]] = {}
            for entry in entries:
                by_note.setdefault(entry.note, []).append(entry.key)
            found += [f"{outcome}: {', '.join(keys)} ({note})" for note, keys in by_note.items()]
        if self.initial:
            parts = dict.fromkeys(key.partition(".")[0] for key in self.initial)
            found.append(
                f"initial values: {len(self.initial)} entries of the model's "
                f"{' and '.join(parts)}, which the file does not hold"
            )
        return found + [f"note: {note}" for note in self.notes]


def some(names: Iterable[str], count: int = 3) -> str:
    """The first few names and how many there are besides."""
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
