"""Components add named terms to the loss, and a target weighs patches by what they show."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mim.core.config import Config, DataConfig, MaskConfig, ModelConfig, RegimeConfig
from mim.core.rng import image_keys
from mim.model import MaskedImageModel, build_model
from mim.model.terms import Forward

VIT: dict[str, Any] = {"patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}
IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(3)


def make(mask: str = "random") -> MaskedImageModel:
    config = Config(
        data=DataConfig(image_size=16),
        mask=MaskConfig(mask),
        model=ModelConfig(backbone_args=VIT, regime=RegimeConfig("drop")),
    )
    return build_model(config)


def output_of(model: MaskedImageModel, weight: Tensor | None = None) -> Any:
    return model(IMAGES, model.draw_mask(IMAGES, image_keys(0, 0, IDS)), weight)


def test_terms_are_summed_by_name_and_weighted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    each = torch.tensor([1.0, 2.0, 5.0])

    def of_regime(forward: Forward) -> dict[str, Tensor]:
        assert forward.ids is not None
        assert forward.distance.shape == forward.ids.shape == forward.prediction.shape[:2]
        return {"spread": forward.latents.tokens.mean() * 0 + 0.5}

    monkeypatch.setattr(model.regime, "terms", of_regime)
    monkeypatch.setattr(model.target, "terms", lambda forward: {"each": each})
    output = output_of(model)
    assert {name: float(term) for name, term in output.terms.items()} == pytest.approx(
        {"spread": 0.5, "each": 8 / 3}
    )
    assert all(term.ndim == 0 for term in output.terms.values())
    torch.testing.assert_close(output.loss, output.reconstruction + 0.5 + 8 / 3)
    weighted = output_of(model, torch.tensor([1.0, 1.0, 0.0]))
    assert float(weighted.terms["each"]) == 1.5
    assert output_of(model.eval()).terms == {}
    monkeypatch.setattr(model.decoder, "terms", lambda forward: {"each": each})
    with pytest.raises(ValueError, match="each"):
        output_of(model.train())


def test_without_terms_the_loss_is_the_reconstruction() -> None:
    output = output_of(make())
    assert output.terms == {} and output.loss is output.reconstruction


def test_the_mask_network_gives_a_term() -> None:
    output = output_of(make("learned"))
    assert list(output.terms) == ["mask_network"]
    torch.testing.assert_close(output.loss - output.reconstruction, output.terms["mask_network"])


def test_a_target_weighs_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make().eval()
    plain = output_of(model)
    whole = type(model.target).distance

    def first_row_counts(prediction: Tensor, target: Tensor, **seen: Any) -> Tensor:
        assert seen["images"] is IMAGES and seen["mask"].num_patches == 16
        return whole(model.target, prediction, target, **seen) * (seen["ids"] < 4)

    monkeypatch.setattr(model.target, "distance", first_row_counts)
    mask = model.draw_mask(IMAGES, image_keys(0, 0, IDS))
    ids = mask.masked_ids
    distance = (plain.prediction - plain.target).square().mean(-1).gather(1, ids)
    expected = (distance * (ids < 4)).mean(1)
    torch.testing.assert_close(output_of(model).loss_per_image, expected)
