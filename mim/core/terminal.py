"""Tables for people and for pipes: aligned on a terminal, separated by tabs elsewhere."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

_STYLES = {
    "finished": "green", "ok": "green", "running": "cyan", "waiting": "dim", "stopped": "yellow",
    "warning": "yellow", "failed": "red", "problem": "red", "unreadable": "red",
}  # fmt: skip


# Escape sequences, tabs, line ends; what turns the direction of writing; halves of a character.
_OBEYED = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Spell out what a terminal would obey."""
    return _OBEYED.sub(lambda found: repr(found[0])[1:-1], text)


def console(stream: TextIO | None = None) -> Console:
    """A console on a stream, by default stdout; it colours only terminals (and obeys NO_COLOR)."""
    return Console(file=stream or sys.stdout, highlight=False, soft_wrap=False)


def grid(heads: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> Table:
    """A table; columns whose cells are numbers are set to the right."""
    named = Text(printable(title)) if title else None
    table = Table(box=box.SIMPLE_HEAD, title=named, title_justify="left", pad_edge=False)
    for column, head in enumerate(heads):
        cells = [row[column] for row in rows if row[column] not in ("", "\u2013")]
        numeric = bool(cells) and all(cell[:1] in "+-\u2212.0123456789" for cell in cells)
        table.add_column(
            Text(printable(head)), justify="right" if numeric else "left", overflow="fold"
        )
    for row in rows:
        # Text, not markup: a name in brackets is a name.
        table.add_row(*(Text(printable(cell), style=_STYLES.get(cell, "")) for cell in row))
    return table


def show_table(heads: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Print to stdout: a table on a terminal, in a pipe lines with tabs, the heads first."""
    out = console()
    if out.is_terminal:
        out.print(grid(heads, rows, title))
        return
    for row in (heads, *rows):
        line = "\t".join(printable(" ".join(str(cell).split())) for cell in row)
        sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def show_json(value: Any) -> None:
    """Print to stdout as JSON."""
    sys.stdout.write(json.dumps(value, indent=1) + "\n")
    sys.stdout.flush()
