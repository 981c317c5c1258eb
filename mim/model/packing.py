"""Several images in one sequence: no padding between them, and none reads another.

Packing changes where tokens stand, not what they read: a token of a packed sequence attends to the
tokens of its own image under the attention mask it had, so that the outputs are those of the
padded batch.

Shapes: B images, L places of a padded row, R packed rows of C places.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mim.core.device import to_device
from mim.model.attention import to_additive


def first_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Distribute images into rows: the longest first, each into the first row with room for it.

    Args:
        lengths: tokens of each image.
        capacity: of a row; at least the longest.

    Returns:
        The images of each row.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for image in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = next((r for r, left in enumerate(room) if left >= lengths[image]), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(capacity)
        rows[place].append(image)
        room[place] -= lengths[image]
    return rows


@dataclass(frozen=True, eq=False)
class Packing:
    """Where each token of a padded batch stands in packed rows.

    Attributes:
        source: (R, C) int64, place in the flattened padded batch (B * L); 0 where nothing stands.
        owner: (R, C) int64, the image of each token; -1 where nothing stands.
        valid: (B, L) bool, False for padding.
        num_keys: how many places of a row are read, the first ones; None where all are.
    """

    source: Tensor
    owner: Tensor
    valid: Tensor
    num_keys: int | None = None

    @classmethod
    def of(cls, valid: Tensor, num_keys: int | None = None) -> Packing:
        """Pack into rows as long as the longest image.

        Where only the first ``num_keys`` places of each image are read, those of all images of a
        row come first in it.
        """
        length = valid.shape[1]
        keys = length if num_keys is None else num_keys
        on_cpu = valid.cpu()
        lengths = on_cpu.sum(dim=1).tolist()
        rows = first_fit(lengths, max(lengths))
        chosen: list[tuple[list[Tensor], list[Tensor]]] = []
        for images in rows:
            places = [on_cpu[i].nonzero()[:, 0] + i * length for i in images]
            read = [p[p % length < keys] for p in places]
            rest = [p[p % length >= keys] for p in places]
            chosen.append((read, rest))
        front = max(sum(map(len, read)) for read, _ in chosen)
        back = max(sum(map(len, rest)) for _, rest in chosen)
        source = torch.full((len(rows), front + back), -1)
        for row, (read, rest) in enumerate(chosen):
            first, second = torch.cat(read), torch.cat(rest)
            source[row, : len(first)] = first
            source[row, front : front + len(second)] = second
        owner = torch.where(source < 0, -1, source // length)
        source, owner = (to_device(x, valid.device) for x in (source.clamp(min=0), owner))
        return cls(source, owner, valid, None if num_keys is None else front)

    def pack(self, tokens: Tensor) -> Tensor:
        """(B, L, D) -> (R, C, D); 0 where nothing stands."""
        packed = tokens.flatten(0, 1)[self.source]
        return packed.masked_fill((self.owner < 0)[..., None], 0.0)

    def unpack(self, packed: Tensor) -> Tensor:
        """(R, C, D) -> (B, L, D); padding is 0."""
        images, length = self.valid.shape
        flat = packed.new_zeros(images * length + 1, packed.shape[-1])
        place = torch.where(self.owner < 0, images * length, self.source)
        flat = flat.index_copy(0, place.flatten(), packed.flatten(0, 1))
        return flat[:-1].view(images, length, -1)

    def bias(self, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Add to attention scores so that no image of a packed row reads another.

        Args:
            bias: what was added in the padded batch, (B or 1, 1, L or 1, L or fewer keys), or None.
            dtype: of the scores.

        Returns:
            (R, 1, C, keys): a token reads what it read before, of its own image alone. Where
            nothing stands, all may be read, so that no row is empty.
        """
        images, length = self.valid.shape
        keys = slice(self.num_keys)
        own = self.owner[:, :, None] == self.owner[:, None, keys]  # (R, C, keys)
        nobody = (self.owner < 0)[:, :, None]
        packed = to_additive((own | nobody)[:, None], dtype)
        if bias is None:
            return packed
        place = self.source % length
        owner = self.owner.clamp(min=0)
        padded = bias.expand(images, 1, length, -1)
        read = place[:, None, keys].clamp(max=padded.shape[-1] - 1)
        before = padded[owner[:, :, None], 0, place[:, :, None], read]  # (R, C, keys)
        return packed + before.masked_fill(nobody, 0.0)[:, None]
