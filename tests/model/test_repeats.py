"""Several masks of one image in a step, and images left unmasked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mim
from mim.core.errors import UserError
from mim.core.rng import image_keys
from mim.model import MaskedImageModel

SMALL: dict[str, Any] = {
    "data.source": "digits",
    "data.image_size": 16,
    "data.channels": 1,
    "model.backbone_args": {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2},
    "model.decoder.transformer": {"width": 16, "depth": 1, "heads": 2},
    "model.decoder.cross_attention": {"width": 16, "depth": 1, "heads": 2, "share": 0.5},
}
IMAGES = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(3)


def built(**changes: Any) -> MaskedImageModel:
    return mim.build_model(mim.load_config(None, {**SMALL, **changes})).double()


def drawn(model: MaskedImageModel, repeats: int = 1, epoch: int = 0) -> Any:
    keys = image_keys(0, 0, IDS, purpose="mask")
    images = IMAGES.double()
    return model.draw_mask(images, keys, epoch=epoch, sample_ids=IDS, repeats=repeats)


def gradients(model: MaskedImageModel, loss: Tensor) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("target", ["normalized_pixels", "ema_features", "frequency"])
@pytest.mark.parametrize(
    ("regime", "decoder", "ratio"),
    [
        ("drop", "transformer", 0.6),
        ("drop", "cross_attention", [0.4, 0.8]),
        ("zero", "linear", [0.4, 0.8]),
        ("token", "linear", 0.6),
    ],
)
def test_the_loss_is_the_mean_over_the_masks(
    regime: str, decoder: str, ratio: Any, target: str
) -> None:
    names = {"model.regime.name": regime, "model.decoder.name": decoder}
    model = built(**names, **{"model.target.name": target, "mask.ratio": ratio})
    images, weight = IMAGES.double(), torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    mask = drawn(model, 4)
    assert len(mask) == 12 and len(mask.is_masked.unique(dim=0)) > 3
    assert torch.equal(mask.is_masked[::4], drawn(model).is_masked), "the first is the only one's"
    together = model(images, mask, weight)
    found = gradients(model, together.loss)
    apart = []
    for repeat in range(4):
        rows = slice(repeat, None, 4)
        apart.append(model(images, mask[rows], weight))
    mean = sum(output.loss for output in apart) / 4
    torch.testing.assert_close(together.loss, mean)
    each = torch.stack([output.loss_per_image for output in apart]).mean(dim=0)
    torch.testing.assert_close(together.loss_per_image, each)
    for one, other in zip(found, gradients(model, mean), strict=True):
        torch.testing.assert_close(one, other)


def test_the_teacher_sees_each_image_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(**{"model.target.name": "ema_features", "mask.name": "attention"})
    assert model.teacher is not None
    seen: list[int] = []
    model.teacher.encoder.patch_embed.register_forward_hook(lambda *args: seen.append(len(args[2])))
    model(IMAGES.double(), drawn(model, 5))
    assert seen == [3, 3], "once for the masks, once for the target"


def test_repeats_do_not_depend_on_the_batch() -> None:
    model = built(**{"mask.name": "block"})
    keys = image_keys(0, 0, IDS, purpose="mask")
    together = model.draw_mask(IMAGES.double(), keys, sample_ids=IDS, repeats=3)
    alone = model.draw_mask(IMAGES[1:2].double(), keys[1:2], sample_ids=IDS[1:2], repeats=3)
    assert torch.equal(together.is_masked[3:6], alone.is_masked)


def test_images_of_several_sizes_take_one_mask() -> None:
    changes = {"mask.repeats": 2, "data.aspect": "keep", "data.source": "photos"}
    with pytest.raises(UserError, match=r"mask\.repeats: 2 takes images of one size"):
        built(**changes, **{"data.channels": 3})


def test_a_share_of_the_images_is_left_unmasked() -> None:
    config = mim.load_config(None, {**SMALL, "mask.unmasked": 0.3})
    from mim.masks import sample_masks

    ids = list(range(4000))
    masks = [sample_masks(config.mask, (4, 4), seed=0, epoch=e, sample_ids=ids) for e in (0, 1, -1)]
    full = [mask.is_masked.sum(dim=1) == 0 for mask in masks]
    for none in full[:2]:
        assert abs(none.double().mean() - 0.3) < 4 * (0.21 / 4000) ** 0.5
    assert not torch.equal(full[0], full[1]), "others in each epoch"
    assert not full[2].any(), "held-out images are all masked"
    plain = sample_masks(mim.load_config(None, SMALL).mask, (4, 4), seed=0, epoch=0, sample_ids=ids)
    assert torch.equal(masks[0].is_masked, plain.is_masked & ~full[0][:, None])


@pytest.mark.parametrize("regime", ["drop", "zero", "token"])
def test_an_unmasked_image_costs_nothing_and_trains(regime: str) -> None:
    decoder = "transformer" if regime == "drop" else "linear"
    names = {"model.regime.name": regime, "model.decoder.name": decoder}
    model = built(**names, **{"mask.unmasked": 0.99})
    mask = drawn(model)
    assert mask.num_masked == 0, "by this key none of the three is masked"
    output = model(IMAGES.double(), mask)
    output.loss.backward()
    assert output.loss == 0
