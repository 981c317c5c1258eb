"""Parquet files read in place, on disk or by URL, a row group at a time.

A row of a parquet file cannot be read alone: the smallest unit is the column of a row group, some
hundred images as a rule, one request to a server. So an epoch reads the row groups in a keyed order
and shuffles the rows of a pool of them together (``ImageSource.order``); each loader process holds
the row groups of one pool. Any step's rows follow from seed and step, and a resume reads the row
groups of its own steps alone.

Footers and labels are read when a run starts, and stored for later runs on the same files.
"""

from __future__ import annotations

import hashlib
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
from mim.data.places.kept import keep, recall, shown, version_of
from mim.data.places.places import Place
from mim.data.places.remote import RemoteFile, in_parallel
from mim.data.sources.base import Split
from mim.data.sources.tables import (
    HuggingFaceSettings,
    TableSource,
    image_column,
    label_column,
)

_ROWS = 8  # of a table read at once
_MOST_BYTES = 1 << 32  # that a row group may unpack to
_FREE_BYTES, _MOST_RATIO = 1 << 28, 100  # in a small file: this, and this many times its size
_MOST_ROWS = 64  # for each byte of a file
_MOST_WORD = 1_000  # bytes of a label
_SOUND = "parquet sizes 1"


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


def _file_size(place: Place) -> int:
    return place.size if isinstance(place, RemoteFile) else place.stat().st_size


def _column(place: Place, footer: Any, group: int, column: str) -> Any:
    """A column of a row group, as pyarrow's ChunkedArray, read a few rows at a time.

    Raises:
        ValueError: if it unpacks to far more than lies in the file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    most = min(_MOST_BYTES, _FREE_BYTES + _MOST_RATIO * _file_size(place))
    stated = footer.row_group(group)
    size = sum(
        stated.column(number).total_uncompressed_size for number in range(stated.num_columns)
    )
    batches, unpacked = [], 0
    source = place.unbuffered() if isinstance(place, RemoteFile) else str(place)
    with pq.ParquetFile(source, metadata=footer) as file:
        for batch in file.iter_batches(
            _ROWS, row_groups=[group] if size <= most else [], columns=[column], use_threads=False
        ):
            values = batch.column(0)
            if pa.types.is_dictionary(values.type):
                values = values.dictionary_decode()
            batches.append(values)
            size = unpacked = unpacked + values.nbytes
            if size > most:
                break
    if size > most:
        raise ValueError(f"row group {group} unpacks to more than {most:,} bytes")
    kind = None if batches else footer.schema.to_arrow_schema().field(column.split(".")[0]).type
    return pa.chunked_array(batches, kind)


def _read_footer(place: Place) -> Any:
    """Raises UserError for a file that is damaged, or promises more rows than it can hold."""
    import pyarrow.parquet as pq

    with _damage(place):
        footer = pq.read_metadata(place.open() if isinstance(place, RemoteFile) else str(place))
        size = _file_size(place)
        if footer.num_rows > _MOST_ROWS * size:
            raise ValueError(f"it promises {footer.num_rows:,} rows in {size:,} bytes")
    return footer


def check_tables(places: Sequence[Place]) -> None:
    """Read parquet files once, in search of rows that unpack to far more than the file's size.

    Raises:
        UserError: for such a file, or a damaged one.
    """
    for place in places:
        if recall(place, _SOUND) is not None:
            continue
        footer = _read_footer(place)
        names = footer.schema.to_arrow_schema().names
        for group in range(footer.num_row_groups):
            for column in names:
                with _damage(place):
                    _column(place, footer, group, column)
        keep(place, _SOUND, {})


def _labels(part: tuple[Place, Any, int, str]) -> NDArray[Any]:
    """(n,) numbers or words; -1 where all of a row group are missing."""
    import pyarrow as pa
    import pyarrow.compute as pc

    place, _, _, column = part
    with _damage(place):
        values = _column(*part)
        kind = values.type
    where = f"in a row group of {shown(place)!r}"
    if values.null_count == len(values):
        return np.full(len(values), -1)
    if values.null_count:
        reason = f"lacks {values.null_count} labels {where}"
        raise setting_error("data.huggingface.label", column, reason)
    is_word = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or kind == pa.bool_()
    if not (is_word or is_number):
        reason = f"holds {kind} {where}; a label is one number or word"
        raise setting_error("data.huggingface.label", column, reason)
    if is_word and pc.max(pc.binary_length(values)).as_py() > _MOST_WORD:
        reason = f"holds a label of more than {_MOST_WORD:,} bytes {where}"
        raise setting_error("data.huggingface.label", column, reason)
    found: NDArray[Any] = values.to_numpy()
    return found.astype(np.str_) if found.dtype.kind == "O" else found


def read_tables(places: Sequence[Place], settings: HuggingFaceSettings) -> list[Table]:
    """Footers and labels of parquet files, stored by an earlier run or read now.

    Raises:
        UserError: for a missing or damaged file, a missing column, or a row without a label.
    """
    import pyarrow.parquet as pq

    what = f"parquet 2/{settings.label}"

    def look(place: Place) -> tuple[Table, bool]:
        known = recall(place, what)
        if known is not None:
            footer = pq.read_metadata(io.BytesIO(known.pop("footer").tobytes()))
            return Table(place, footer, known.get("labels")), False
        return Table(place, _read_footer(place), None), True

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
        footer = io.BytesIO()
        table.footer.write_metadata_file(footer)
        arrays: dict[str, NDArray[Any]] = {"footer": np.frombuffer(footer.getvalue(), np.uint8)}
        if column is not None:
            found = [next(values) for _ in range(table.footer.num_row_groups)]
            table.labels = np.concatenate(found) if found else np.zeros(0, np.int64)
            arrays["labels"] = table.labels
        keep(table.place, what, arrays)
    return [table for table, _ in looked]


class RowGroups(TableSource):
    """The rows of parquet files, see the top of this file.

    ``train`` and ``val`` are their files; without any of val, ``has_val`` is False. ``features`` of
    ``datasets`` name the classes where the files do not.
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

    def content_digest(self) -> str:
        """Digest of the sizes in the footers: sample images would cost whole row groups."""
        digest = hashlib.blake2b(digest_size=8)
        for file, number in self._where.tolist():
            group = self._tables[file][1].row_group(number)
            columns = (group.column(place) for place in range(group.num_columns))
            names = (self._leaf, f"{self._leaf}.bytes")
            column = next(column for column in columns if column.path_in_schema in names)
            sizes = (group.num_rows, column.total_compressed_size, column.total_uncompressed_size)
            digest.update(np.array(sizes, dtype="<i8"))
        return digest.hexdigest()

    def stamp(self, index: int) -> str:
        group = int(self._group[index])
        place = self._tables[int(self._where[group, 0])][0]
        return f"{version_of(place)}/{index - int(self._begins[group])}"

    def _hold(self, group: int) -> None:
        """Read a row group, and in parallel those that follow it in its pool."""
        at = self._next.index(group) if group in self._next else len(self._next)
        pool = [group, *self._next[at + 1 : at + self.groups_mixed]]
        new = [number for number in pool if number not in self._held]
        self._held.update(zip(new, in_parallel(self._read, new), strict=True))
        for number in reversed(pool):
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
