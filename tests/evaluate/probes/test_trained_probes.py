"""MAE's linear probe, the attentive probe and the grid: against references and by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.optim import Lars

from mim.core.config import Config, DataConfig, ModelConfig
from mim.core.errors import UserError
from mim.core.rng import permutation
from mim.data import open_source
from mim.evaluate import (
    Attentive,
    AttentiveSettings,
    Encoder,
    Features,
    LinearGrid,
    LinearGridSettings,
    LinearMae,
    LinearMaeSettings,
    evaluate,
    extract_features,
    open_encoder,
)
from mim.evaluate.probes.attentive import AttentivePool
from mim.evaluate.probes.linear_grid import descend
from mim.evaluate.training import split
from mim.model.standardize import Standardize

ARGS = {"patch_size": 2, "embed_dim": 16, "depth": 1, "num_heads": 2}
DATA = DataConfig(source="digits", image_size=8, channels=1, batch_size=64, flip=False)
CONFIG = Config(data=DATA, model=ModelConfig(backbone="vit_tiny_patch16_224", backbone_args=ARGS))
MAE = LinearMaeSettings(epochs=2, fraction=0.1, batch_size=32, warmup_epochs=0.5)
ATTENTIVE = AttentiveSettings(epochs=2, fraction=0.1, batch_size=32, base_lr=(3e-2,))


@pytest.fixture
def encoder() -> Encoder:
    return open_encoder("untrained", CONFIG)


@pytest.fixture
def seeing() -> Encoder:
    """Its one patch is the whole image: without training, it tells digits apart."""
    args = {"patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 2}
    model = replace(CONFIG.model, backbone_args=args)
    return open_encoder("untrained", replace(CONFIG, model=model))


def test_standardize_is_batch_norm_without_weights() -> None:
    # In the first ten steps the running statistics are the mean over batches.
    theirs = torch.nn.BatchNorm1d(5, eps=1e-6, affine=False, momentum=None)
    ours = Standardize(5)
    for _ in range(3):
        x = torch.randn(7, 5) * 3 + 1
        assert torch.allclose(ours(x), theirs(x), atol=1e-5)
    tokens = torch.randn(2, 4, 5)
    flat = theirs(tokens.flatten(0, 1)).view(2, 4, 5)
    assert torch.allclose(ours(tokens), flat, atol=1e-5)
    x = torch.randn(3, 5)
    assert torch.allclose(ours.eval()(x), theirs.eval()(x), atol=1e-5)
    assert not list(ours.parameters())
    ours.train().seen += 20
    before, batch = ours.mean.clone(), torch.randn(4, 5)
    ours(batch)
    assert torch.allclose(ours.mean, 0.9 * before + 0.1 * batch.mean(0))


def test_attentive_pool_by_hand() -> None:
    torch.manual_seed(0)
    pool = AttentivePool(6, 2, 4).eval()
    tokens = torch.randn(3, 5, 6)
    k, v = tokens @ pool.key.weight.T, tokens @ pool.value.weight.T  # running statistics: 0 and 1
    found = torch.zeros(3, 6)
    for image in range(3):
        for part in (slice(0, 3), slice(3, 6)):
            scores = k[image, :, part] @ pool.query[part] / 3**0.5
            found[image, part] = scores.softmax(0) @ v[image, :, part]
    assert torch.allclose(pool(tokens), pool.head(found), atol=1e-5)
    shuffled = tokens[:, torch.randperm(5)]
    assert torch.allclose(pool(shuffled), pool(tokens), atol=1e-5)


def test_which_tokens_the_query_reads(encoder: Encoder) -> None:
    assert encoder.vit is not None
    images = torch.randn(2, 1, 8, 8)
    tokens = encoder.vit.forward_features(images)
    assert torch.equal(Attentive(ATTENTIVE).tokens(encoder, images), tokens[:, 1:])
    both = Attentive(replace(ATTENTIVE, pool="both"))
    assert torch.equal(both.tokens(encoder, images), tokens)


@pytest.mark.parametrize("probe", [LinearMae(MAE), Attentive(ATTENTIVE)])
def test_the_encoder_stays_and_something_is_learned(seeing: Encoder, probe: Any) -> None:
    encoder = seeing
    assert encoder.vit is not None
    before = {k: v.clone() for k, v in encoder.vit.state_dict().items()}
    # LARS takes small steps, whatever the gradient.
    rate, epochs = {"linear_mae": (10.0, 30), "attentive": (0.1, 3)}[probe.settings.name]
    longer = replace(probe.settings, epochs=epochs, fraction=0.5, base_lr=(rate,))
    train, val = open_source(DATA, "train"), open_source(DATA, "val")
    numbers = type(probe)(longer).run(encoder, train, val)
    assert numbers["accuracy"] > 0.6
    assert numbers["train_loss"] < 2.3
    assert all(torch.equal(v, before[k]) for k, v in encoder.vit.state_dict().items())
    assert not any(p.requires_grad for p in encoder.vit.parameters())
    assert val.labels is not None
    val.labels = 9 - val.labels  # does not choose
    again = type(probe)(longer).run(encoder, train, val)
    assert again["accuracy"] != numbers["accuracy"]
    assert again["chosen_accuracy"] == numbers["chosen_accuracy"]


def test_mae_trains_by_lars_with_its_schedule(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = Lars.step

    def spy(self: Lars, *args: Any) -> Any:
        seen.append(
            [
                (g["lr"], g["momentum"], g["weight_decay"], [tuple(p.shape) for p in g["params"]])
                for g in self.param_groups
            ]
        )
        return real(self, *args)

    monkeypatch.setattr(Lars, "step", spy)
    settings = replace(MAE, momentum=0.8, weight_decay=0.01, base_lr=(0.4,))
    LinearMae(settings).run(encoder, open_source(DATA, "train"), open_source(DATA, "val"))
    # 162 images less a tenth: 4 steps an epoch of 32; the peak is 0.4 * 32 / 256.
    peak = 0.05
    assert [s[0][0] for s in seen[:3]] == pytest.approx([peak / 3, 2 * peak / 3, peak])
    assert seen[5][0][0] == pytest.approx(peak / 2)
    assert len(seen) == 8
    for weight, bias in seen:
        assert weight[1:] == (0.8, 0.01, [(10, 16)]) and bias[1:] == (0.8, 0.0, [(10,)])
        assert weight[0] == bias[0]


@pytest.mark.parametrize("weight_decay", [LinearMaeSettings().weight_decay, 0.01])
def test_mae_lars_is_lars_worked_by_hand(weight_decay: float) -> None:
    """Three steps of You et al. (arXiv:1708.03888), with the settings that users have by default.

    A matrix moves by its norm over its gradient's, times 0.001; a bias by plain momentum.
    """
    settings = LinearMaeSettings(weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    bias = torch.randn(5, generator=generator, dtype=torch.float64)
    layer = torch.nn.Linear(7, 5).double()
    layer.load_state_dict({"weight": weight, "bias": bias})
    lr = 6.4
    group = {"params": list(layer.parameters()), "lr": lr, "lr_scale": 1.0}
    optimizer = LinearMae(settings).optimizer([group])
    velocity = {"weight": torch.zeros_like(weight), "bias": torch.zeros_like(bias)}
    for _ in range(3):
        slopes = {
            "weight": torch.randn(5, 7, generator=generator, dtype=torch.float64),
            "bias": torch.randn(5, generator=generator, dtype=torch.float64),
        }
        layer.weight.grad, layer.bias.grad = slopes["weight"].clone(), slopes["bias"].clone()
        optimizer.step()
        decayed = slopes["weight"] + weight_decay * weight
        scaled = decayed * 0.001 * weight.norm()
        scaled /= slopes["weight"].norm() + weight_decay * weight.norm()
        velocity["weight"] = settings.momentum * velocity["weight"] + scaled
        velocity["bias"] = settings.momentum * velocity["bias"] + slopes["bias"]
        weight = weight - lr * velocity["weight"]
        bias = bias - lr * velocity["bias"]
        torch.testing.assert_close(layer.weight.detach(), weight, rtol=0, atol=1e-9)
        torch.testing.assert_close(layer.bias.detach(), bias, rtol=0, atol=1e-9)


def test_heads_side_by_side_are_heads_alone(encoder: Encoder) -> None:
    train, val = open_source(DATA, "train"), open_source(DATA, "val")
    rates = (1e-3, 0.1)
    together = Attentive(replace(ATTENTIVE, base_lr=rates)).run(encoder, train, val)
    alone = [Attentive(replace(ATTENTIVE, base_lr=(r,))).run(encoder, train, val) for r in rates]
    chosen = max(alone, key=lambda numbers: numbers["chosen_accuracy"])
    assert alone[0]["train_loss"] != alone[1]["train_loss"]
    assert together.pop("chosen_base_lr") == rates[alone.index(chosen)]
    assert together == pytest.approx(chosen, abs=1e-6)


def test_the_grid_is_gradient_descent() -> None:
    """Against torch's SGD, one combination at a time."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=generator) * 3 + 1
    y = torch.randint(0, 3, (50,), generator=generator)
    settings = LinearGridSettings(epochs=3, batch_size=16)
    combinations = [(0.1, 0.0), (1.0, 0.1), (3.0, 0.01)]
    layers = descend(x, y, 3, combinations, settings)
    z = (x - x.mean(0)) / x.std(0, unbiased=False)
    for place, (lr, decay) in enumerate(combinations):
        linear = torch.nn.Linear(6, 3)
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
        groups = [{"params": [linear.weight], "weight_decay": decay}, {"params": [linear.bias]}]
        optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
        total = 3 * 3
        for step in range(total):
            order = permutation(0, step // 3, 50)
            part = order[step % 3 * 16 : (step % 3 + 1) * 16]
            optimizer.zero_grad()
            F.cross_entropy(linear(z[part]), y[part]).backward()
            rate = lr * 16 / 256 * 0.5 * (1 + torch.cos(torch.tensor(step / total * torch.pi)))
            for group in optimizer.param_groups:
                group["lr"] = float(rate)
            optimizer.step()
        expected = linear(z)
        found = x @ layers.weight[place] + layers.bias[place]
        assert torch.allclose(found, expected, atol=1e-4)


def test_the_grid_chooses_on_train(seeing: Encoder) -> None:
    train, val = (extract_features(seeing, open_source(DATA, s)) for s in ("train", "val"))
    settings = LinearGridSettings(epochs=5, lr=(1e-4, 1.0), weight_decay=(0.0,), few_shot=(5,))
    numbers = LinearGrid(replace(settings, draws=2)).run(train, val)
    assert numbers["accuracy"] > 0.7 and numbers["chosen_lr"] == 1.0
    assert 0.3 < numbers["accuracy_5_per_class"] < numbers["accuracy"]
    assert val.labels is not None
    wrong = Features(val.values, 9 - val.labels, val.sample_ids)
    assert LinearGrid(replace(settings, draws=2)).run(train, wrong)["chosen_lr"] == 1.0


def test_nothing_held_out_trains_on_all_and_measures_the_last_epoch(encoder: Encoder) -> None:
    images = {
        "all": replace(MAE, held_out=0.0, fraction=1.0),
        "most": replace(MAE, held_out=0.1, fraction=1.0),
    }
    train = open_source(DATA, "train")
    counts = {name: [len(p) for p in split(train, s)] for name, s in images.items()}
    assert counts["all"] == [len(train), 0] and counts["most"][0] < len(train)
    numbers = evaluate(encoder, {"linear_mae": {"held_out": 0.0, "epochs": 2, "fraction": 0.1}})
    found = numbers["linear_mae"]
    assert found["chosen_epoch"] == 2 and found["chosen_last"] == 1
    assert "chosen_accuracy" not in found and 0 < found["accuracy"] < 1


def test_capis_head_and_its_grid(encoder: Encoder) -> None:
    torch.manual_seed(0)
    pool = AttentivePool(128, 2, 4, "capi")
    names = {name for name, _ in pool.named_parameters()}
    assert {"key.bias", "value.bias"} < names and not any(n.startswith("norm") for n in names)
    assert float(pool.key.bias.detach().abs().sum()) == 0
    assert float(pool.value.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    tokens = torch.randn(1, 7, 128)
    shifted = pool(tokens + 5)  # nothing standardises: the mean of tokens reaches the logits
    assert not torch.allclose(shifted, pool(tokens), atol=1e-3)
    capi = Attentive(replace(ATTENTIVE, form="capi", decays=(5e-4, 5e-2)))
    assert capi.decays() == (5e-4, 5e-2)
    group = {"params": list(pool.parameters()), "weight_decay": 0.3, "lr_scale": 1.0}
    optimizer = capi.optimizer([group])
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert len(decay) == len(names)
    for name, parameter in pool.named_parameters():
        assert decay[id(parameter)] == (0.0 if name.endswith("bias") else 0.3), name
    assert {g["betas"] for g in optimizer.param_groups} == {(0.9, 0.95)}
    given = {"form": "capi", "base_lr": [1e-3, 3e-2], "decays": [5e-4, 5e-2], "epochs": 1}
    found = evaluate(encoder, {"attentive": {**given, "fraction": 0.1}})["attentive"]
    assert found["chosen_base_lr"] in (1e-3, 3e-2) and found["chosen_weight_decay"] in (5e-4, 5e-2)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("linear_mae", {"base_lr": [0.0]}, r"linear_mae\.base_lr: 0\.0|base_lr: \(0\.0,\) must be"),
        ("linear_mae", {"momentum": 1.0}, r"linear_mae\.momentum: 1\.0 must be at least 0"),
        ("attentive", {"pool": "cls"}, r"attentive\.pool: 'cls' is not one of both, mean"),
        ("attentive", {"heads": 3}, r"attentive\.heads: 3 does not divide .* width, 16"),
        ("attentive", {"held_out": 1.0}, r"attentive\.held_out: 1\.0 must be at least 0 and below"),
        ("attentive", {"held_out": 0.0}, r"attentive\.held_out: 0\.0 needs one base_lr and one"),
        ("attentive", {"base_lr": [1e30], "epochs": 2}, r"base_lr: .* loss is nan in"),
        ("linear_grid", {"lr": []}, r"linear_grid\.lr: \(\) must not be empty"),
        ("linear_grid", {"weight_decay": [-1]}, r"linear_grid\.weight_decay: .* at least 0"),
        ("linear_grid", {"few_shot": [500]}, r"linear_grid\.few_shot: .* asks for 500 images"),
    ],
)
def test_bad_settings_are_told(
    encoder: Encoder, name: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(encoder, {name: settings})
