"""A million names in a few tensors: workers share them, and copy no Python objects."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor


class Names:
    """Strings in one buffer.

    A list of a million strings costs twice as much, and is copied into every worker, page by page,
    as reference counts change. Tensors stay in shared memory, however workers start.

    ``text`` (bytes,) uint8 holds the names as the file system has them, and ``ends`` (n,) int64
    where each ends.
    """

    def __init__(self, text: Tensor, ends: Tensor) -> None:
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        """Takes names one by one: they need not all be there at once."""
        text, ends = bytearray(), array("q")
        for name in names:
            text += os.fsencode(name)
            ends.append(len(text))
        return cls(_tensor(text, np.uint8), _tensor(ends, np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        begin = int(self.ends[index - 1]) if index else 0
        return os.fsdecode(self.text[begin : int(self.ends[index])].numpy().tobytes())

    def __iter__(self) -> Iterator[str]:
        text, begin = self.text.numpy(), 0
        for end in map(int, self.ends.numpy()):
            yield os.fsdecode(text[begin:end].tobytes())
            begin = end


def _tensor(values: bytearray | array[int], dtype: type[np.generic]) -> Tensor:
    return torch.from_numpy(np.frombuffer(values, dtype=dtype))
