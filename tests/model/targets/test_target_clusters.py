"""Online clusters: Sinkhorn, what trains what, and CAPI's losses from its description."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mim import load_config
from mim.core.config import TargetConfig
from mim.core.errors import UserError
from mim.core.rng import image_keys
from mim.masks import PatchMask
from mim.model import MaskedImageModel, build_model, check_config
from mim.model.targets import Target
from mim.model.targets.clusters import (
    ClustersSettings,
    NormalizedLinear,
    participation_ratio,
    sinkhorn,
)

Make = Callable[..., Target]
CAPI: dict[str, Any] = {
    "data.image_size": 16,
    "mask.ratio": 0.5,
    "model.backbone": "vit_large_patch14_capi",
    "model.backbone_args": {
        "patch_size": 4,
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
        "num_reg_tokens": 4,
    },
    "model.decoder.name": "rotary",
    "model.decoder.rotary.width": 16,
    "model.decoder.rotary.depth": 1,
    "model.decoder.rotary.heads": 2,
    "model.decoder.rotary.share": 0.5,
    "model.target.name": "clusters",
    "model.target.clusters.clusters": 6,
}


def step(**changes: Any) -> tuple[MaskedImageModel, Tensor, PatchMask]:
    """A model in training in float64, 8 images, and their masks."""
    model = build_model(load_config(None, {**CAPI, **changes})).double().train()
    ids = torch.arange(8)
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    return model, images, model.draw_mask(images, image_keys(0, 0, ids), epoch=0, sample_ids=ids)


# --- Sinkhorn ------------------------------------------------------------------------------------


def test_rows_sum_to_1_and_columns_alike() -> None:
    scores = 3 * torch.randn(5, 12, 6, generator=torch.Generator().manual_seed(0)).double()
    few, many = sinkhorn(scores, 3), sinkhorn(scores, 200)
    for shares in (few, many):
        torch.testing.assert_close(shares.sum(-1), torch.ones(5, 12).double(), rtol=0, atol=1e-7)
    torch.testing.assert_close(many.sum(-2), torch.full((5, 6), 2.0).double(), rtol=0, atol=1e-5)
    assert (few.sum(-2) - 2).abs().max() > 1e-3  # so the number of iterations matters


def test_three_iterations_by_hand() -> None:
    scores = np.array([[0.0, 1.0, 2.0], [1.0, 0.0, 0.5]])
    shares = np.exp(scores - scores.max(axis=0) + 50)
    for _ in range(3):
        shares = shares / shares.sum(axis=0)
        shares = shares / shares.sum(axis=1, keepdims=True)
    got = sinkhorn(torch.from_numpy(scores), 3)
    np.testing.assert_allclose(got.numpy(), shares, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_scores_stay_finite(dtype: torch.dtype) -> None:
    scores = torch.tensor([[400.0, -400.0], [-400.0, 400.0]], dtype=dtype)
    shares = sinkhorn(scores, 3)
    torch.testing.assert_close(shares, torch.eye(2, dtype=dtype), rtol=0, atol=1e-6)


def test_each_position_is_balanced_by_itself(make: Make, teach: Any, images_of: Any) -> None:
    target = make(
        "clusters", clusters=ClustersSettings(2, target_temperature=1.0, iterations=300)
    ).double()
    images = images_of(target, 6)
    by_position = target(images, teach(target))  # (6, 4, 2)
    torch.testing.assert_close(
        by_position.sum(0), torch.full((4, 2), 3.0).double(), rtol=0, atol=1e-4
    )
    settings = ClustersSettings(2, target_temperature=1.0, iterations=300, balance="batch")
    together = make("clusters", clusters=settings).double()
    together.load_state_dict(target.state_dict())
    over_all = together(images, teach(target))
    torch.testing.assert_close(
        over_all.sum((0, 1)), torch.full((2,), 12.0).double(), rtol=0, atol=1e-4
    )
    assert (over_all.sum(0) - 3).abs().max() > 0.1


# --- The losses ----------------------------------------------------------------------------------


@pytest.mark.parametrize("regime", ["drop", "zero", "token"])
def test_the_losses_are_capis(regime: str) -> None:
    model, images, mask = step(**{"model.regime.name": regime})
    assert isinstance(model.decoder.head, NormalizedLinear)
    output = model(images, mask)
    ids, _ = mask.masked_share(0.5)
    with torch.no_grad():
        assert model.teacher is not None
        tokens = model.teacher.encoder.forward_features(images)[:, 4:].numpy()  # registers first
        hidden = model.decoder(model.latents(images, mask), ids).numpy()  # (B, M, E)
    weight, bias = (p.detach().numpy() for p in model.target.parameters())
    units = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
    logits = units @ weight.T + bias  # (B, N, K)
    assigned = np.zeros_like(logits)
    for place in range(16):
        shares = np.exp((logits[:, place] - logits[:, place].max(axis=0)) / 0.06 + 50)
        for _ in range(3):
            shares = shares / (shares.sum(axis=0) + 1e-8)
            shares = shares / (shares.sum(axis=1, keepdims=True) + 1e-8)
        assigned[:, place] = shares

    def cross_entropy(wanted: Any, scores: Any) -> Any:
        spread = np.exp(scores / 0.12)
        return -(wanted * np.log(spread / spread.sum(-1, keepdims=True))).sum(-1).mean()

    head = model.decoder.head
    directions, lengths = head.direction.detach().numpy(), head.length.detach().numpy()
    matrix = directions / np.linalg.norm(directions, axis=1, keepdims=True) * lengths
    predicted = hidden / np.linalg.norm(hidden, axis=-1, keepdims=True) @ matrix.T
    wanted = np.take_along_axis(assigned, ids.numpy()[..., None], axis=1)
    reconstruction = cross_entropy(wanted, predicted)
    clustering = cross_entropy(assigned, logits)
    assert output.reconstruction.item() == pytest.approx(reconstruction, abs=1e-6)
    assert output.terms["clustering"].item() == pytest.approx(clustering, abs=1e-6)
    assert output.loss.item() == pytest.approx(reconstruction + clustering, abs=1e-6)


def test_the_clustering_trains_its_map_alone_and_nothing_else_trains_it() -> None:
    model, images, mask = step()
    output = model(images, mask)
    own = dict(model.target.named_parameters())
    output.reconstruction.backward(retain_graph=True)
    assert all(weight.grad is None for weight in own.values())
    learnt = {n for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    output.terms["clustering"].backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        "target.layer.weight",
        "target.layer.bias",
    }
    assert "backbone.reg_token" in learnt and "decoder.head.length" in learnt


def test_its_gradient_does_not_change_how_the_others_are_clipped() -> None:
    from mim.training.pretrain import PretrainTask

    model, *_ = step()
    task = PretrainTask.__new__(PretrainTask)
    task.model = model
    clipped = set(task.clipped(model))
    assert clipped == set(model.parameters()) - set(model.target.parameters())


def test_without_training_an_image_needs_no_other(make: Make, teach: Any, images_of: Any) -> None:
    target = make("clusters", clusters=ClustersSettings(5)).double().eval()
    images = images_of(target, 3)
    whole, alone = target(images, teach(target)), target(images[1:2], teach(target))
    torch.testing.assert_close(whole[1:2], alone, rtol=0, atol=1e-12)
    assert not whole.requires_grad
    torch.testing.assert_close(whole.sum(-1), torch.ones(3, 4).double())


def test_metrics_by_hand(make: Make) -> None:
    model, images, mask = step()
    assert set(model(images, mask).metrics) == {
        "effective_rank",
        "clusters_used",
        "cluster_perplexity",
        "assignment_entropy",
    }
    flat = torch.zeros(40, 5).double()
    flat[:20, 0], flat[20:30, 1], flat[30:, 1] = 1.0, 1.0, -1.0
    flat[:10, 0] = -1.0
    assert participation_ratio(flat).item() == pytest.approx(2)  # two directions of equal spread
    flat[:, 1] = 0
    assert participation_ratio(flat).item() == pytest.approx(1)
    assert participation_ratio(torch.ones(3, 4)).item() == 0  # no spread at all


def test_a_step_counts_the_clusters_in_use() -> None:
    model, images, mask = step()
    with torch.no_grad():  # one cluster is nearest to all
        model.target.layer.bias[2] += 100
    metrics = model(images, mask).metrics
    assert metrics["clusters_used"] == 1
    assert metrics["cluster_perplexity"].item() == pytest.approx(1)


# --- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.accumulate": 2}, r"train\.accumulate: 2 must be 1 with .*'clusters'"),
        ({"model.target.loss": "mse"}, r"model\.target\.loss: 'mse' must be auto .*clusters"),
        ({"model.decoder.rotary.heads": 8}, r"rotary\.heads: 8 must give each head a width"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_config(load_config(None, {**CAPI, **changes}))


def test_weights_follow_from_the_seed() -> None:
    one, same = (build_model(load_config(None, CAPI)) for _ in range(2))
    other = build_model(load_config(None, {**CAPI, "seed": 1}))
    assert torch.equal(one.target.layer.weight, same.target.layer.weight)
    assert not torch.equal(one.target.layer.weight, other.target.layer.weight)
    assert TargetConfig(name="clusters").clusters.temperature == 0.12
