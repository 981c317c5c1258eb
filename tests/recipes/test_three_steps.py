"""Three steps of each recipe that has no file of its own, beside the paper's arithmetic.

Each method says which tokens are encoded, what is predicted, the target and the distance, its
rates, its decays and its averages, all from its paper and its authors' settings. ``by_hand.py``
takes the steps. MAE's are in ``tests/training/test_mae_arithmetic.py``, SimMIM's in
``tests/interop/test_relative.py``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from mim.core.rng import seed_of
from mim.training import pretrain as pretraining
from tests.recipes.by_hand import Method, Step, in_float64, three_steps

VIT = {"patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "drop_path_rate": 0.0}
SMALL: dict[str, Any] = {"data.image_size": 16, "model.backbone_args": VIT}  # 4 x 4 patches


@pytest.fixture(autouse=True)
def _float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretraining, "normalize", in_float64)


def agrees(method: Method, folder: Path) -> None:
    assert three_steps(method, folder) < 1e-10


def decoder(kind: str, **sizes: int) -> dict[str, int]:
    return {f"model.decoder.{kind}.{name}": value for name, value in sizes.items()}


# --- Parts of several methods --------------------------------------------------------------------


def cosine(done: float) -> float:
    """Half a period, from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * done))


def warmed(step: float, warmup: float, first: float, peak: float, after: float) -> float:
    return first + (peak - first) * step / warmup if step < warmup else after


def mae_rate(epoch: int) -> float:
    """1.5e-4 for 256 images, here 4,096; 40 of 800 epochs from 0, then a cosine to 0."""
    return warmed(epoch, 40, 0.0, 2.4e-3, 2.4e-3 * cosine((epoch - 40) / 760))


def of_matrices(name: str, weight: Tensor, step: int) -> float:
    """MAE's: tokens decay, vectors do not."""
    return 0.05 if weight.ndim > 1 else 0.0


def of_matrices_but_class(name: str, weight: Tensor, step: int) -> float:
    """BEiT's."""
    return 0.05 if weight.ndim > 1 and "cls_token" not in name else 0.0


def patches_of(images: Tensor, side: int) -> Tensor:
    """(B, N, pixels x channels): row, column, channel."""
    tiles = F.unfold(images, side, stride=side).transpose(1, 2)
    return tiles.unflatten(2, (images.shape[1], -1)).transpose(2, 3).flatten(2)


def standardized(patches: Tensor) -> Tensor:
    centred = patches - patches.mean(-1, keepdim=True)
    return centred / (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def of_rows(values: Tensor, flags: Tensor) -> Tensor:
    """What is flagged in each row, (B, M, D); rows have equally many."""
    return values[flags].unflatten(0, (len(values), -1))


def visible_layers(vit: Any, images: Tensor, hidden: Tensor) -> list[Tensor]:
    """MAE's encoder: what enters the blocks, and what each returns, (B, 1 + K, D)."""
    tokens = of_rows(vit.patch_embed(images) + vit.pos_embed[:, 1:], ~hidden)
    first = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(tokens), -1, -1)
    layers = [torch.cat([first, tokens], dim=1)]
    for block in vit.blocks:
        layers.append(block(layers[-1]))
    return layers


def mae_predicted(net: Any, images: Tensor, hidden: Tensor) -> Tensor:
    """What MAE's decoder predicts at the hidden patches."""
    part = net.decoder
    x = part.embed(net.backbone.norm(visible_layers(net.backbone, images, hidden)[-1]))
    full = part.mask_token.expand(*hidden.shape, -1).clone()
    full[~hidden] = x[:, 1:].flatten(0, 1)
    x = torch.cat([x[:, :1], full], dim=1) + part.pos_embed
    for block in part.blocks:
        x = block(x)
    return of_rows(part.head(part.norm(x))[:, 1:], hidden)


def distance_to_standardized(predicted: Tensor, images: Tensor, hidden: Tensor) -> Tensor:
    return (predicted - of_rows(standardized(patches_of(images, 4)), hidden)).square().mean()


def twice(loss: Tensor) -> tuple[Tensor, Tensor]:
    """What is reported is what is minimised."""
    return loss, loss


# --- Methods on MAE's decoder --------------------------------------------------------------------

MAE: dict[str, Any] = {
    "sizes": {**SMALL, **decoder("transformer", width=16, depth=2, heads=2)},
    "steps": (20, 40, 400),
    "rate": mae_rate,
    "betas": (0.9, 0.95),
    "decay": of_matrices,
}


def zero_loss(step: Step) -> tuple[Tensor, Tensor]:
    """Zero-and-attend: hidden pixels are 0, and nobody reads a hidden place."""
    vit, part, hidden = step.net.backbone, step.net.decoder, step.mask.is_masked
    tiles = F.fold(
        hidden[:, None].expand(-1, 16, -1).double(), (16, 16), kernel_size=4, stride=4
    )  # (B, 1, H, W)
    x = vit.patch_embed(torch.where(tiles > 0, 0.0, step.images))
    x = torch.cat([vit.cls_token.expand(len(x), -1, -1), x], dim=1) + vit.pos_embed
    unread = F.pad(hidden, (1, 0), value=False)[:, None, None]  # of keys, in all heads
    bias = torch.zeros(unread.shape).double().masked_fill(unread, -torch.inf)
    for block in vit.blocks:
        x = block(x, attn_mask=bias)
    x = part.embed(vit.norm(x)) + part.pos_embed
    for block in part.blocks:
        x = block(x)
    predicted = of_rows(part.head(part.norm(x))[:, 1:], hidden)
    return twice(distance_to_standardized(predicted, step.images, hidden))


def test_zero_and_attend(tmp_path: Path) -> None:
    agrees(Method("zero-vit-b", loss=zero_loss, **MAE), tmp_path)


def attmask_loss(step: Step) -> tuple[Tensor, Tensor]:
    """AttMask on MAE: of 16 patches the 12 that the teacher's class token reads most are hidden."""
    vit = step.teacher
    with torch.no_grad():
        x = vit.patch_embed(step.images)
        x = torch.cat([vit.cls_token.expand(len(x), -1, -1), x], dim=1) + vit.pos_embed
        for block in vit.blocks[:-1]:
            x = block(x)
        last = vit.blocks[-1]
        q, k, _ = last.attn.qkv(last.norm1(x)).chunk(3, dim=-1)
        q, k = (part.unflatten(2, (3, 8)).transpose(1, 2) for part in (q, k))  # (B, h, L, d)
        read = (q[:, :, :1] @ k.transpose(2, 3) / math.sqrt(8)).softmax(-1)
        most = read[:, :, 0, 1:].mean(1).argsort(descending=True)[:, :12]
    hidden = torch.zeros_like(step.mask.is_masked).scatter(1, most, True)
    assert torch.equal(hidden, step.mask.is_masked)
    predicted = mae_predicted(step.net, step.images, hidden)
    return twice(distance_to_standardized(predicted, step.images, hidden))


def test_attmask_on_mae(tmp_path: Path) -> None:
    method = Method("attmask-mae-vit-b", loss=attmask_loss, average=lambda step: 0.999, **MAE)
    agrees(method, tmp_path)


def low_passed(images: Tensor) -> Tensor:
    """PixMIM's filter: the frequencies within 40 of 112 around the middle of the spectrum."""
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64)[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64)[:, None, None]
    place = torch.arange(16) - 7.5
    kept = place[:, None] ** 2 + place**2 <= (40 / 224 * 16) ** 2
    spectrum = torch.fft.fftshift(torch.fft.fft2(images * std + mean), dim=(-2, -1))
    return (torch.fft.ifft2(spectrum * kept).abs() - mean) / std


def pixmim_loss(step: Step) -> tuple[Tensor, Tensor]:
    """MAE's loss, of the filtered image."""
    hidden = step.mask.is_masked
    predicted = mae_predicted(step.net, step.images, hidden)
    return twice(distance_to_standardized(predicted, low_passed(step.images), hidden))


def test_pixmim(tmp_path: Path) -> None:
    agrees(Method("pixmim-vit-b", loss=pixmim_loss, **MAE), tmp_path)


def crossmae_loss(step: Step) -> tuple[Tensor, Tensor]:
    """A quarter of all patches is predicted; each block reads its own sum of the encoder's maps."""
    vit, part, hidden = step.net.backbone, step.net.decoder, step.mask.is_masked
    ids, _ = step.mask.masked_share(4 / 12)  # handed on, as the mask is
    assert ids.shape == (4, 4) and hidden.gather(1, ids).all()
    maps = visible_layers(vit, step.images, hidden)
    x = part.mask_token + part.pos_embed[0, ids]
    for block, norm, weights in zip(part.blocks, part.layer_norms, part.map_weights, strict=True):
        memory = norm(sum(w * one for w, one in zip(weights, maps, strict=True)))
        q, (k, v) = block.q(block.norm1(x)), block.kv(memory).chunk(2, dim=-1)
        read = []
        for one, two, three in zip(*(y.chunk(2, dim=-1) for y in (q, k, v)), strict=True):
            shares = (one @ two.transpose(1, 2) / math.sqrt(8)).softmax(-1)  # of a head
            read.append(shares @ three)
        x = x + block.proj(torch.cat(read, dim=-1))
        x = x + block.mlp(block.norm2(x))
    predicted = part.head(part.norm(x))
    rows = torch.arange(len(ids))[:, None]
    target = standardized(patches_of(step.images, 4))[rows, ids]
    return twice((predicted - target).square().mean())


def test_crossmae(tmp_path: Path) -> None:
    sizes = {**SMALL, **decoder("cross_attention", width=16, depth=2, heads=2)}
    agrees(Method("crossmae-vit-b", loss=crossmae_loss, **{**MAE, "sizes": sizes}), tmp_path)


# --- Mask tokens in the encoder ------------------------------------------------------------------


def maskfeat_rate(epoch: int) -> float:
    """2e-4 for 256 images, here 2,048; 30 of 1,600 epochs from 1e-6, then a cosine to 1e-6."""
    after = 8e-6 + (1.6e-3 - 8e-6) * cosine((epoch - 30) / 1570)
    return warmed(epoch, 30, 8e-6, 1.6e-3, after)


def oriented_gradients(images: Tensor) -> Tensor:
    """Sobel's gradients in 9 bins of half a turn, cells of 8 pixels, each histogram of length 1.

    (B, N, 4 cells x 3 channels x 9 bins) for patches of 16 pixels.
    """
    batch, channels, height, width = images.shape
    sobel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]]).double()
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect").flatten(0, 1)[:, None]
    across = F.conv2d(padded, sobel[None, None])[:, 0]
    down = F.conv2d(padded, sobel.T[None, None])[:, 0]
    bins = (torch.atan2(across, down) / math.pi * 9).floor().long() % 9
    votes = F.one_hot(bins, 9) * (across**2 + down**2).sqrt()[..., None]  # (B C, H, W, 9)
    cells = votes.view(batch, channels, height // 8, 8, width // 8, 8, 9).sum((3, 5))
    cells = cells / cells.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    in_patches = cells.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (B, C, r, 2, c, 2, 9)
    return in_patches.permute(0, 2, 4, 3, 5, 1, 6).flatten(3).flatten(1, 2)


def maskfeat_loss(step: Step) -> tuple[Tensor, Tensor]:
    vit, hidden = step.net.backbone, step.mask.is_masked
    x = torch.where(hidden[..., None], step.net.regime.mask_token, vit.patch_embed(step.images))
    x = torch.cat([vit.cls_token.expand(len(x), -1, -1), x], dim=1) + vit.pos_embed
    for block in vit.blocks:
        x = block(x)
    predicted = step.net.decoder.head(vit.norm(x)[:, 1:])[hidden]
    return twice((predicted - oriented_gradients(step.images)[hidden]).square().mean())


def test_maskfeat(tmp_path: Path) -> None:
    method = Method(
        "maskfeat-vit-b",
        {"data.image_size": 64, "model.backbone_args": {**VIT, "patch_size": 16}},
        (15, 30, 800),
        maskfeat_loss,
        maskfeat_rate,
        (0.9, 0.999),
        of_matrices,  # positions too
        clip=0.02,
    )
    agrees(method, tmp_path)


def beit_rate(epoch: int, peak: float) -> float:
    """Of 800 epochs 10 from 0, then a cosine to 1e-5."""
    return warmed(epoch, 10, 0.0, peak, 1e-5 + (peak - 1e-5) * cosine((epoch - 10) / 790))


def beit_layers(vit: Any, x: Tensor) -> list[Tensor]:
    """What each of BEiT's blocks returns of embedded patches; one bias of positions for all."""
    layers = [torch.cat([vit.cls_token.expand(len(x), -1, -1), x], dim=1)]
    for block in vit.blocks:
        layers.append(block(layers[-1], shared_rel_pos_bias=vit.rel_pos_bias()))
    return layers[1:]


def beit_predicted(net: Any, images: Tensor, hidden: Tensor) -> Tensor:
    """At every patch."""
    embedded = net.backbone.patch_embed(images)
    x = torch.where(hidden[..., None], net.regime.mask_token, embedded)
    return net.decoder.head(net.backbone.norm(beit_layers(net.backbone, x)[-1])[:, 1:])


BEIT: dict[str, Any] = {
    "steps": (5, 10, 400),
    "betas": (0.9, 0.999),
    "decay": of_matrices_but_class,
    "clip": 3.0,
}


def codebook() -> Tensor:
    return torch.randn(20, 48, generator=torch.Generator().manual_seed(3))


def beit_loss(step: Step) -> tuple[Tensor, Tensor]:
    """Cross-entropy on the nearest entry, a mean over each image's hidden patches."""
    hidden = step.mask.is_masked
    distances = torch.cdist(patches_of(step.images, 4), codebook().double())
    shares = beit_predicted(step.net, step.images, hidden).log_softmax(-1)
    each = -shares.gather(2, distances.argmin(2, keepdim=True))[..., 0]  # (B, N)
    return twice(((each * hidden).sum(1) / hidden.sum(1)).mean())


def test_beit(tmp_path: Path) -> None:
    file = tmp_path / "codebook.safetensors"
    save_file({"codebook": codebook()}, file)
    method = Method(
        "beit-vit-b",
        {**SMALL, "model.target.codes.codebook": str(file)},
        loss=beit_loss,
        rate=lambda epoch: beit_rate(epoch, 1.5e-3),
        **BEIT,
    )
    agrees(method, tmp_path / "run")


def data2vec_loss(step: Step) -> tuple[Tensor, Tensor]:
    """Smooth L1 (beta 2) to the mean of the teacher's last blocks, all of them layer-normed."""
    hidden = step.mask.is_masked
    with torch.no_grad():
        layers = beit_layers(step.teacher, step.teacher.patch_embed(step.images))[-2:]
        target = torch.stack([F.layer_norm(one[:, 1:], (24,)) for one in layers]).mean(0)
        target = F.layer_norm(target, (24,))
    far = (beit_predicted(step.net, step.images, hidden) - target)[hidden].abs()
    return twice(torch.where(far < 2, far**2 / 4, far - 1).mean())


def test_data2vec(tmp_path: Path) -> None:
    method = Method(
        "data2vec-vit-b",
        {
            **{"data.image_size": 16, "model.backbone_args": {**VIT, "attn_drop_rate": 0.0}},
            "model.target.ema_features.top": 2,
        },
        loss=data2vec_loss,
        rate=lambda epoch: beit_rate(epoch, 2e-3),
        average=lambda step: 0.9998,
        **BEIT,
    )
    agrees(method, tmp_path)


# --- Teachers under drop -------------------------------------------------------------------------


def data2vec2_loss(step: Step) -> tuple[Tensor, Tensor]:
    """Each image under three masks, one teacher; convolutions over latents and noise.

    The class token predicts the mean of the target over all patches: 0.01 x 256 images.
    """
    net, hidden = step.net, step.mask.is_masked  # (3 B, N)
    with torch.no_grad():
        vit = step.teacher
        x = vit.patch_embed(step.images)
        x = torch.cat([vit.cls_token.expand(len(x), -1, -1), x], dim=1) + vit.pos_embed
        outputs = []
        for block in vit.blocks:
            x = x + block.attn(block.norm1(x))
            outputs.append(block.mlp(block.norm2(x)))
            x = x + outputs[-1]
        target = torch.zeros(len(x), 16, 24).double()
        for out in outputs[-2:]:
            patches = out[:, 1:]
            centred = patches - patches.mean(1, keepdim=True)
            target += centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() / 2
        target = F.layer_norm(target, (24,)).repeat_interleave(3, 0)
    x = visible_layers(net.backbone, step.images.repeat_interleave(3, 0), hidden)[-1]
    x = net.backbone.norm(x)
    torch.manual_seed(seed_of(0, "step", step.number, 0))
    full = (torch.randn(len(x), 16, 24) * 0.01).double()
    full[~hidden] = x[:, 1:].flatten(0, 1)
    maps = full.transpose(1, 2).unflatten(2, (4, 4))
    for convolution in net.decoder.blocks:
        out = F.layer_norm(convolution(maps).permute(0, 2, 3, 1), (24,))
        maps = maps + F.gelu(out).permute(0, 3, 1, 2)
    predicted = net.decoder.head(maps.flatten(2).transpose(1, 2))
    loss = (predicted - target)[hidden].square().mean()
    return loss, loss + 2.56 * (x[:, 0] - target.mean(1)).square().mean()


def test_data2vec2(tmp_path: Path) -> None:
    method = Method(
        "data2vec2-vit-b",
        {
            **SMALL,
            **decoder("convolutional", width=24, depth=2, groups=4),
            **{"model.target.ema_features.top": 2, "mask.repeats": 3},
        },
        (25_000, 50_040, 200_000),
        data2vec2_loss,
        lambda n: warmed(n, 50_040, 0.0, 1e-3, 1e-3 * cosine((n - 50_040) / (375_300 - 50_040))),
        (0.9, 0.95),
        of_matrices,
        clip=0.14434,  # 4 / sqrt(768): of a sum over channels / sqrt(768), not of their mean
        average=lambda n: 0.9998 + (0.99999 - 0.9998) * min(n / 100_000, 1),
        per_epoch=5004,
    )
    agrees(method, tmp_path)


def ijepa_loss(step: Step) -> tuple[Tensor, Tensor]:
    """Each image and each target block alone: smooth L1 to the teacher's normed output."""
    vit, part, mask = step.net.backbone, step.net.decoder, step.mask
    assert mask.target_ids is not None
    with torch.no_grad():
        x = step.teacher.patch_embed(step.images) + step.teacher.pos_embed
        for block in step.teacher.blocks:
            x = block(x)
        targets = F.layer_norm(step.teacher.fc_norm(x), (24,))
    losses = []
    for row, image in enumerate(step.images):
        context = (~mask.is_masked[row]).nonzero()[:, 0]
        x = (vit.patch_embed(image[None]) + vit.pos_embed)[:, context]
        for block in vit.blocks:
            x = block(x)
        seen = part.embed(vit.fc_norm(x)) + part.pos_embed[:, context]
        far = []
        for number, asked in enumerate(mask.target_ids[row]):
            if mask.target_valid is not None:
                asked = asked[mask.target_valid[row, number]]
            assert mask.is_masked[row, asked].all()
            x = torch.cat([seen, part.mask_token + part.pos_embed[:, asked]], dim=1)
            for block in part.blocks:
                x = block(x)
            predicted = part.head(part.norm(x)[0, -len(asked) :])
            far.append((predicted - targets[row, asked]).abs())
        each = torch.cat(far)
        losses.append(torch.where(each < 1, each**2 / 2, each - 0.5).mean())
    return twice(torch.stack(losses).mean())


def test_ijepa(tmp_path: Path) -> None:
    sizes = {**decoder("block_predictor", width=16, depth=2, heads=2), "data.image_size": 24}
    method = Method(
        "i-jepa-vit-h",
        {**SMALL, **sizes, "mask.target_blocks.min_keep": 3},
        (20, 40, 150),
        ijepa_loss,
        lambda n: warmed(n, 40, 2e-4, 1e-3, 1e-6 + (1e-3 - 1e-6) * cosine((n - 40) / 260)),
        (0.9, 0.999),
        lambda name, w, n: 0.4 - 0.36 * cosine(n / 300) if w.ndim > 1 else 0.0,
        average=lambda n: 0.996 + 0.004 * n / 300,
    )
    agrees(method, tmp_path)


def turned(x: Tensor, places: Tensor) -> Tensor:
    """CAPI's rotation of a head's channels (L, d) at places (L, 2)."""
    quarter = x.shape[-1] // 4
    cycles = [7 * (7 / 7e-4) ** (-j / (quarter - 1)) for j in range(quarter)]
    speed = 2 * math.pi * torch.tensor([*cycles, *cycles], dtype=torch.float64)
    angle = torch.cat([places[:, :1] * speed, places[:, 1:] * speed], dim=1)
    one, other = x.chunk(2, dim=-1)
    return x * angle.cos() + torch.cat([-other, one], dim=-1) * angle.sin()


def rotary_attention(maps: Any, x: Tensor, at: Tensor, memory: Tensor, memory_at: Tensor) -> Tensor:
    """Two heads of 8; ``maps`` are those of query, key, value and output."""
    q, k, v = maps[0](x), maps[1](memory), maps[2](memory)
    heads = []
    for part in (slice(0, 8), slice(8, 16)):
        scores = turned(q[:, part], at) @ turned(k[:, part], memory_at).T / math.sqrt(8)
        heads.append(scores.softmax(-1) @ v[:, part])
    return maps[3](torch.cat(heads, dim=-1))


def capi_encoded(vit: Any, image: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Registers and the patches ``seen`` of an image, (8 + K, 16), and their places."""
    line = torch.linspace(0, 1, 4, dtype=torch.float64)
    places = torch.cartesian_prod(line, line)[seen]
    low, high = places.amin(0), places.amax(0)
    around = [(0, 0), (0.5, 0), (1, 0), (1, 0.5), (1, 1), (0.5, 1), (0, 1), (0, 0.5)]
    registers_at = low + torch.tensor(around, dtype=torch.float64) * (high - low)
    at = torch.cat([registers_at, places])
    x = torch.cat([vit.reg_token[0], vit.patch_embed(image[None])[0, seen]])
    for block in vit.blocks:
        maps, normed = block.attn, block.norm1(x)
        four = (maps.q_proj, maps.k_proj, maps.v_proj, maps.proj)
        x = x + rotary_attention(four, normed, at, normed, at)
        x = x + block.mlp(block.norm2(x))
    return F.rms_norm(x, (16,), eps=1e-5), at


def balanced(logits: Tensor) -> Tensor:
    """Assignments of (images, clusters) at one position: three times columns, then rows."""
    scores = logits / 0.06
    shares = (scores - scores.amax(0) + 50).exp()
    for _ in range(3):
        shares = shares / (shares.sum(0) + 1e-8)
        shares = shares / (shares.sum(1, keepdim=True) + 1e-8)
    return shares


def capi_loss(step: Step) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the teacher's balanced clusters: of the student, and of the clustering."""
    net, part = step.net, step.net.decoder
    everything = torch.arange(16)
    with torch.no_grad():
        tokens = [capi_encoded(step.teacher, image, everything)[0][8:] for image in step.images]
        units = torch.stack(tokens)
        units = units / units.norm(dim=-1, keepdim=True)
    logits = units @ net.target.layer.weight.T + net.target.layer.bias  # (B, N, K)
    assigned = torch.stack([balanced(logits[:, place].detach()) for place in everything], dim=1)
    clustering = -(assigned * (logits / 0.12).log_softmax(-1)).sum(-1).mean()

    ids, _ = step.mask.masked_share(0.3)  # handed on, as the mask is
    assert ids.shape == (4, 3) and step.mask.is_masked.gather(1, ids).all()
    line = torch.linspace(0, 1, 4, dtype=torch.float64)
    direction, length = part.head.direction, part.head.length
    matrix = direction * length / (direction.norm(dim=1, keepdim=True) + 1e-8)
    losses = []
    for row, image in enumerate(step.images):
        seen = (~step.mask.is_masked[row]).nonzero()[:, 0]
        memory, memory_at = capi_encoded(net.backbone, image, seen)
        at = torch.cartesian_prod(line, line)[ids[row]]
        x = part.mask_token[0].expand(3, -1)
        for block in part.blocks:
            four = (block.q, block.k, block.v, block.proj)
            x = x + rotary_attention(four, block.norm1(x), at, memory, memory_at)
            x = x + block.mlp(block.norm2(x))
        x = F.rms_norm(x, (16,), eps=1e-5)
        shares = (x / x.norm(dim=-1, keepdim=True) @ matrix.T / 0.12).log_softmax(-1)
        losses.append(-(assigned[row, ids[row]] * shares).sum(-1).mean())
    loss = torch.stack(losses).mean()
    return loss, loss + clustering


def capi_decay(name: str, weight: Tensor, step: int) -> float:
    """The clusters' optimizer decays by 0.01, norms by a tenth of 0.1, tokens by all of it."""
    if name.startswith("target.") or "norm" in name:
        return 0.01
    return 0.0 if name.endswith("bias") else 0.1


def capi_rate_of(name: str) -> float:
    """The clusters' optimizer has half the rate."""
    if name.startswith("target."):
        return 0.5
    return 0.2 if "patch_embed" in name else 1.0


def after_capis_warmup(step: int) -> float:
    """From 1, a cosine that stops at 0.8 of its phase."""
    return cosine(0.8 * (step - 50_000) / 450_000)


def test_capi(tmp_path: Path) -> None:
    vit = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_reg_tokens": 8}
    method = Method(
        "capi-vit-l",
        {
            **{"data.image_size": 16, "model.backbone_args": {**vit, "drop_path_rate": 0.0}},
            **decoder("rotary", width=16, depth=2, heads=2),
            **{"model.decoder.rotary.share": 0.3, "model.decoder.rotary.drop_path": 0.0},
            "model.target.clusters.clusters": 6,
        },
        (25_000, 50_000, 300_000),
        capi_loss,
        lambda n: warmed(n, 50_000, 0.0, 1e-3, 1e-3 * after_capis_warmup(n)),
        (0.9, 0.95),
        capi_decay,
        average=lambda n: warmed(n, 50_000, 1.0, 0.999, 1 - 0.001 * after_capis_warmup(n)),
        rate_of=capi_rate_of,
        per_epoch=78,
    )
    agrees(method, tmp_path)
