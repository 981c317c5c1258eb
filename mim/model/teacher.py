"""An encoder that follows the trained one as an exponential moving average (EMA)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from mim.model.backbones import block_outputs, family_of, patch_attention


@torch.no_grad()
def ema_update(average: nn.Module, model: nn.Module, weight: Tensor | float) -> None:
    """Move all of an average's parameters and buffers by ``weight`` towards the model's.

    0 changes nothing, 1 copies; a 0-d tensor on their device is not read here.
    """
    pairs = zip(average.state_dict().values(), model.state_dict().values(), strict=True)
    for mine, new in pairs:
        if mine.is_floating_point():
            mine.lerp_(new.to(mine.dtype), weight)
        else:
            mine.copy_(new)


class Teacher(nn.Module):
    """A frozen copy of the encoder; each update keeps the share ``decay`` of its old weights.

    It sees full images. Generators read its attention (AttMask, arXiv:2203.12719), targets its
    features (data2vec, arXiv:2202.03555). It is part of the model's state, so a resume is exact.
    """

    def __init__(self, vit: nn.Module, decay: float) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(vit).requires_grad_(False).eval()
        self.decay = decay

    def train(self, mode: bool = True) -> Teacher:
        """Keep the encoder in eval mode: no dropout, no drop path."""
        super().train(mode)
        self.encoder.eval()
        return self

    @torch.no_grad()
    def update(
        self, vit: nn.Module, taken: Tensor | float = 1.0, decay: float | None = None
    ) -> None:
        """Move a step towards ``vit``; none where ``taken`` is 0.

        ``decay`` is this step's, by default the teacher's own.
        """
        decay = self.decay if decay is None else decay
        for mine, new in zip(self.encoder.parameters(), vit.parameters(), strict=True):
            mine.lerp_(new.to(mine.dtype), (1 - decay) * taken)
        for buffer, now in zip(self.encoder.buffers(), vit.buffers(), strict=True):
            buffer.copy_(now)

    @torch.no_grad()
    def layers(self, images: Tensor) -> list[Tensor]:
        """Return the patch tokens (B, N, D) after each block."""
        family = family_of(self.encoder)
        outputs = block_outputs(self.encoder, family.place(family.embed(images)))
        return [tokens[:, family.num_prefix :] for tokens in outputs]

    @torch.no_grad()
    def mlp_outputs(self, images: Tensor) -> list[Tensor]:
        """Return what each block's MLP gives for the patches, (B, N, D), before it is added."""
        family = family_of(self.encoder)
        embedded = family.place(family.embed(images))
        x = family.before_blocks(embedded.tokens)
        found = []
        for index in range(len(family.blocks)):
            found.append(family.mlp_output(index, x, embedded)[:, family.num_prefix :])
            x = family.step(index, x, embedded)
        return found

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """Return the patch tokens (B, N, D) after the final norm."""
        family = family_of(self.encoder)
        return family.features(images)[:, family.num_prefix :]

    @torch.no_grad()
    def output(self, images: Tensor) -> Tensor:
        """Return :meth:`tokens`, also where timm norms after pooling: each token is a pool."""
        return family_of(self.encoder).pool_norm(self.tokens(images))

    @torch.no_grad()
    def attention(self, images: Tensor) -> Tensor:
        """Return how much the last block attends to each patch, (B, N)."""
        family = family_of(self.encoder)
        return patch_attention(self.encoder, family.place(family.embed(images)))
