"""Parquet files read in place, on disk or by URL, a row group at a time.

A row of a parquet file cannot be reached alone: the least that can be read is the column of a row
group, some hundred images as a rule, one request of a server. So an epoch goes through the row
groups in a keyed order and shuffles the rows of several together (``ImageSource.order``); each
loader process holds the row groups of such a pool. Any step's rows follow from seed and step, and a
resume reads the row groups of its own steps alone.

Footers and labels are read when a run starts, and kept for later runs on the same files.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mim.core.config import DataConfig
from mim.core.errors import UserError, setting_error
from mim.data.images.decode import DECODE_ERRORS
from mim.data.places.kept import keep, recall, shown
from mim.data.places.places import Place
from mim.data.places.remote import RemoteFile, in_parallel
from mim.data.sources.base import Split
from mim.data.sources.tables import (
    HuggingFaceSettings,
    TableSource,
    image_column,
    label_column,
)


@dataclass
class Table:
    """A parquet file, without its images."""

    place: Place
    footer: Any
    """Its pyarrow.parquet.FileMetaData."""
    labels: NDArray[Any] | None
    """(n,) numbers or words, or None without a column of labels."""

    @property
    def schema(self) -> Any:
        """Its pyarrow.Schema."""
        return self.footer.schema.to_arrow_schema()

    @property
    def rows(self) -> list[int]:
        """Of each row group."""
        return [
            self.footer.row_group(number).num_rows for number in range(self.footer.num_row_groups)
        ]


@contextmanager
def _damage(place: Place) -> Iterator[None]:
    """Says of which file it is that pyarrow cannot read it."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, *DECODE_ERRORS) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{shown(place)!r} is no parquet file, or damaged: {reason}") from error


def _source(place: Place) -> Any:
    return place.unbuffered() if isinstance(place, RemoteFile) else str(place)


def _column(place: Place, footer: Any, group: int, column: str) -> Any:
    """A column of a row group, as pyarrow's ChunkedArray."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(_source(place), metadata=footer) as file:
        return file.read_row_group(group, columns=[column], use_threads=False).column(0)


def _labels(part: tuple[Place, Any, int, str]) -> NDArray[Any]:
    place, _, _, column = part
    with _damage(place):
        values = _column(*part)
    if values.null_count:
        reason = f"lacks {values.null_count} labels in a row group of {shown(place)!r}"
        raise setting_error("data.huggingface.label", column, reason)
    found = values.to_numpy()
    return found.astype(np.str_) if found.dtype.kind == "O" else found


def read_tables(places: Sequence[Place], settings: HuggingFaceSettings) -> list[Table]:
    """Footers and labels of parquet files: kept from an earlier look, or read now.

    Raises:
        UserError: for a file that is missing or damaged, a column that is not there, or a row
            without a label.
    """
    import pyarrow.parquet as pq

    what = f"parquet 1/{settings.label}"

    def look(place: Place) -> tuple[Table, bool]:
        known = recall(place, what)
        if known is not None:
            footer = pq.read_metadata(io.BytesIO(known.pop("footer").tobytes()))
            return Table(place, footer, known.get("labels")), False
        with _damage(place):
            source = place.open() if isinstance(place, RemoteFile) else str(place)
            return Table(place, pq.read_metadata(source), None), True

    looked = in_parallel(look, places)
    new = [
        (table, label_column(settings, table.schema.names)) for table, is_new in looked if is_new
    ]
    parts = [
        (table.place, table.footer, group, column)
        for table, column in new
        if column is not None
        for group in range(table.footer.num_row_groups)
    ]
    values = iter(in_parallel(_labels, parts))
    for table, column in new:
        told = io.BytesIO()
        table.footer.write_metadata_file(told)
        arrays: dict[str, NDArray[Any]] = {"footer": np.frombuffer(told.getvalue(), np.uint8)}
        if column is not None:
            found = [next(values) for _ in range(table.footer.num_row_groups)]
            table.labels = np.concatenate(found) if found else np.zeros(0, np.int64)
            arrays["labels"] = table.labels
        keep(table.place, what, arrays)
    return [table for table, _ in looked]


class RowGroups(TableSource):
    """The rows of parquet files; see the head of this file.

    Args:
        settings: of the source huggingface.
        config: max_pixels and decode are read.
        split: "train" or "val".
        train: files of train, in order.
        val: files of val; with none, ``has_val`` is False.
        features: of ``datasets``, which name the classes where the files do not.
    """

    def __init__(
        self,
        settings: HuggingFaceSettings,
        config: DataConfig,
        split: Split,
        train: Sequence[Place],
        val: Sequence[Place],
        features: Any = None,
    ) -> None:
        tables = read_tables([*train, *val], settings)
        self.has_val = bool(val)
        part = "val" if split == "val" and self.has_val else "train"
        chosen = tables[len(train) :] if part == "val" else tables[: len(train)]
        self._tables = [(table.place, table.footer) for table in chosen]
        rows = torch.tensor([rows for table in chosen for rows in table.rows], dtype=torch.int64)
        super().__init__(config, part, int(rows.sum()))
        where = [(n, group) for n, table in enumerate(chosen) for group in range(len(table.rows))]
        self._where = torch.tensor(where, dtype=torch.int64).reshape(-1, 2)  # file, row group
        self._begins = rows.cumsum(0) - rows
        self._group = torch.arange(len(rows)).repeat_interleave(rows)  # of each row
        self.groups = self._group
        mean_rows = max(1, len(self) // max(1, len(rows)))
        self.groups_mixed = -(-settings.pool // mean_rows)
        self._set_columns(settings, tables, tables[: len(train)], chosen, features)
        self._held: OrderedDict[int, Any] = OrderedDict()
        self._next: list[int] = []

    def _set_columns(
        self,
        settings: HuggingFaceSettings,
        tables: list[Table],
        train: list[Table],
        chosen: list[Table],
        features: Any,
    ) -> None:
        import datasets
        import pyarrow as pa

        schema = tables[0].schema
        for table in tables:
            column = image_column(settings, table.schema.names)
            kind = table.schema.field(column).type
            is_struct = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
            if not (is_struct or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
                reason = f"holds {kind} in {shown(table.place)!r}, not image files"
                raise setting_error("data.huggingface.image", column, reason)
            # Of image files beside their paths, the files alone.
            self._leaf = f"{column}.bytes" if is_struct else column
        label = label_column(settings, schema.names)
        if label is None or not chosen:
            return
        missing = [table for table in tables if table.labels is None]
        if missing:
            reason = f"is not among the columns of {shown(missing[0].place)!r}"
            raise setting_error("data.huggingface.label", label, reason)
        known = datasets.Features.from_arrow_schema(schema) | dict(features or {})
        names = getattr(known.get(label), "names", None)
        self._label(label, _values(chosen), _values(train), names)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": OrderedDict(), "_next": []}  # a worker reads its own

    def ahead(self, indices: torch.Tensor) -> None:
        self._next = list(dict.fromkeys(self._group[indices].tolist()))

    def _value(self, index: int) -> bytes | None:
        group = int(self._group[index])
        if group not in self._held:
            self._hold(group)
        self._held.move_to_end(group)
        column = self._held[group]
        if isinstance(column, Exception):
            raise column
        value: bytes | None = column[index - int(self._begins[group])].as_py()
        return value

    def _hold(self, group: int) -> None:
        """Reads a row group, and at once those that are wanted after it, as many as are mixed."""
        at = self._next.index(group) if group in self._next else len(self._next)
        wanted = [group, *self._next[at + 1 : at + self.groups_mixed]]
        new = [number for number in wanted if number not in self._held]
        self._held.update(zip(new, in_parallel(self._read, new), strict=True))
        for number in reversed(wanted):
            self._held.move_to_end(number)
        while len(self._held) > max(self.groups_mixed, 1):
            self._held.popitem(last=False)

    def _read(self, group: int) -> Any:
        """The files of a row group, or what is wrong with it."""
        import pyarrow as pa
        import pyarrow.compute as pc

        file, number = self._where[group].tolist()
        place, footer = self._tables[file]
        try:
            column = _column(place, footer, number, self._leaf)
            return pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column
        except (pa.ArrowException, *DECODE_ERRORS) as error:
            return OSError(f"the row group cannot be read: {error}")


def _values(tables: Sequence[Table]) -> NDArray[Any]:
    return np.concatenate([table.labels for table in tables if table.labels is not None])
