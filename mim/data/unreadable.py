"""Unreadable images: counted, recorded in a file, and replaced.

In training, another image replaces an unreadable one: positions are drawn from the image's id alone
until one can be read, so that it is the same in every epoch, process and run. It comes with its own
label and id. Evaluations leave unreadable images out, since an image that counts twice falsifies a
mean.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mim.core.errors import UserError, setting_error

FILE = "unreadable.txt"
_SHOWN = 5
_SHARE, _FEW = 0.001, 3  # that may be unreadable


@dataclass(frozen=True)
class Fault:
    """An image that could not be read."""

    name: str
    reason: str


def allowed(count: int, limit: float | None) -> int:
    """How many of ``count`` images may be unreadable, see ``data.max_unreadable``."""
    if limit is not None:
        return int(limit * count)
    return max(int(_SHARE * count), min(_FEW, count // 10))


class Ledger:
    """The unreadable images of one split, over all processes of a run.

    Args:
        split: "train" or "val".
        count: images of the source.
        limit: ``data.max_unreadable``, the fraction of them that may be unreadable, or None.
        folder: where each process of a run adds lines to ``unreadable.txt``: split, name and
            reason, with tabs between them. None keeps them in memory.
    """

    def __init__(
        self, split: str, count: int, limit: float | None, folder: Path | None = None
    ) -> None:
        self.split = split
        self.count = count
        self.limit = limit
        self.path = None if folder is None else folder / FILE
        self._known: dict[str, str] = {}
        self._earlier = set(self._read())  # by an earlier start: counted only when met again

    @property
    def allowed(self) -> int:
        """How many of them may be unreadable."""
        return allowed(self.count, self.limit)

    def _read(self) -> dict[str, str]:
        if self.path is None or not self.path.is_file():
            return {}
        lines = self.path.read_text(encoding="utf-8").splitlines()
        fields = [line.split("\t", 2) for line in lines]
        return {f[1]: f[2] for f in fields if len(f) == 3 and f[0] == self.split}

    def __len__(self) -> int:
        return len(self._known)

    def faults(self) -> list[Fault]:
        """All that were recorded."""
        return [Fault(name, reason) for name, reason in self._known.items()]

    def add(self, faults: Iterable[Fault]) -> None:
        """Record faults.

        Raises:
            UserError: if there are now more than ``limit`` allows; names the first.
        """
        new = [fault for fault in faults if fault.name not in self._known]
        if not new:
            return
        self._known.update((fault.name, fault.reason) for fault in new)
        if self.path is not None:
            written = self._read()
            fresh = [fault for fault in new if fault.name not in written]
            text = "".join(f"{self.split}\t{fault.name}\t{fault.reason}\n" for fault in fresh)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
            # What other processes met counts too.
            self._known |= {k: v for k, v in self._read().items() if k not in self._earlier}
        self.check()

    def check(self) -> None:
        """Raises UserError if there are more unreadable images than may be."""
        if len(self._known) <= self.allowed:
            return
        shown = [f"{name} ({reason})" for name, reason in list(self._known.items())[:_SHOWN]]
        more = f" and {len(self._known) - _SHOWN} more" if len(self._known) > _SHOWN else ""
        where = "" if self.path is None else f"; all in {self.path}"
        reason = (
            f"allows {self.allowed} unreadable of {self.count} {self.split} images,"
            f" and there are {len(self._known)}: {', '.join(shown)}{more}{where}"
        )
        if self.limit is None:
            raise UserError(f"data.max_unreadable: by default {reason}")
        raise setting_error("data.max_unreadable", self.limit, reason)
