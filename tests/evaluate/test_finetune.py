"""Fine-tuning: each setting of the recipe takes effect, nothing depends on workers, val is kept."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open

import mim as package
from mim.core.config import Config, DataConfig, ModelConfig
from mim.core.errors import UserError
from mim.core.rng import image_keys
from mim.data import Subset, eval_loader, normalize, open_source
from mim.evaluate import Encoder, Finetune, FinetuneSettings, evaluate, open_encoder
from mim.evaluate.base import low_shot
from mim.evaluate.finetune import (
    RandAugment,
    build_classifier,
    erase,
    fit,
    mix_images,
    parameter_groups,
)
from mim.evaluate.training import split

ARGS = {"patch_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 2}
DATA = DataConfig(source="digits", image_size=8, channels=1, batch_size=64, flip=False)
CONFIG = Config(data=DATA, model=ModelConfig(backbone="vit_tiny_patch16_224", backbone_args=ARGS))
PLAIN: dict[str, Any] = {
    "mixup": 0.0,
    "cutmix": 0.0,
    "erasing": 0.0,
    "drop_path": 0.0,
    "rand_augment": "",
    "crop_scale": (0.8, 1.0),
}
CHANGES: dict[str, Any] = {
    "rand_augment": "rand-m9-mstd0.5-inc1",
    "erasing": 0.9,
    "drop_path": 0.5,
    "mixup": 0.8,
    "cutmix": 1.0,
    "smoothing": 0.5,
    "weight_decay": 0.9,
    "crop_scale": (0.1, 0.4),
}
SHORT = FinetuneSettings(epochs=2, fraction=0.1, batch_size=32, base_lr=3e-2, layer_decay=1.0)


@pytest.fixture
def encoder() -> Encoder:
    return open_encoder("untrained", CONFIG)


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_learning_rate_and_weight_decay_of_each_layer(encoder: Encoder) -> None:
    settings = FinetuneSettings(layer_decay=0.5, weight_decay=0.3)
    model = build_classifier(encoder, 10, settings).model
    names = {id(p): name for name, p in model.named_parameters()}
    found = {
        names[id(p)]: (group["lr_scale"], group["weight_decay"])
        for group in parameter_groups(model, settings)
        for p in group["params"]
    }
    assert len(found) == len(names)
    assert found["pos_embed"] == found["cls_token"] == (0.125, 0.0)
    assert found["patch_embed.proj.weight"] == (0.125, 0.3)
    assert found["patch_embed.proj.bias"] == (0.125, 0.0)
    assert found["blocks.0.attn.qkv.weight"] == (0.25, 0.3)
    assert found["blocks.0.norm1.weight"] == (0.25, 0.0)
    assert found["blocks.1.mlp.fc2.weight"] == (0.5, 0.3)
    assert found["fc_norm.weight"] == (1.0, 0.0)
    assert found["head.weight"] == (1.0, 0.3)
    assert found["head.bias"] == (1.0, 0.0)


def test_the_optimizer_gets_the_schedule_times_the_layers_scale(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[float, float]] = []
    betas = []
    real = torch.optim.AdamW.step

    def spy(self: torch.optim.AdamW, *args: Any) -> Any:
        seen.append({g["lr_scale"]: g["lr"] for g in self.param_groups})
        betas.append(self.param_groups[0]["betas"])
        return real(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    settings = replace(
        SHORT,
        layer_decay=0.5,
        base_lr=0.08,
        min_lr=0.004,
        warmup_epochs=0.5,
        betas=(0.8, 0.9),
        held_out=0.2,
    )
    fit(encoder, open_source(DATA, "train"), settings)
    # 162 images, 129 without what is held out: 4 steps an epoch of 32; the peak is 0.08 * 32 / 256.
    assert len(seen) == 8 and set(betas) == {(0.8, 0.9)}
    head = [lrs[1.0] for lrs in seen]
    middle = 0.004 + (0.01 - 0.004) * 0.5  # half way down the cosine
    assert head[:3] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01])
    assert head[5] == pytest.approx(middle)
    for lrs in seen:
        assert lrs == pytest.approx({scale: scale * lrs[1.0] for scale in (0.125, 0.25, 0.5, 1.0)})


def test_drop_path_of_each_block() -> None:
    model = replace(CONFIG.model, backbone_args={**ARGS, "depth": 3})
    encoder = open_encoder("untrained", replace(CONFIG, model=model))
    vit: Any = build_classifier(encoder, 10, FinetuneSettings(drop_path=0.2)).model
    assert isinstance(vit.blocks[0].drop_path1, torch.nn.Identity)
    for block, rate in ((vit.blocks[1], 0.1), (vit.blocks[2], 0.2)):
        assert block.drop_path1.drop_prob == pytest.approx(rate)
        assert block.drop_path2.drop_prob == pytest.approx(rate)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixed_labels_are_soft_and_sum_to_one(mixup: float, cutmix: float) -> None:
    settings = FinetuneSettings(mixup=mixup, cutmix=cutmix, smoothing=0.1)
    # Every image is 0 or 1 as its label is, so that the mixed image tells its share.
    labels = torch.tensor([0, 1, 1, 0, 1, 0])  # each one's partner, from the end, is of the other
    images = labels[:, None, None, None].expand(-1, 1, 32, 32).float()
    kinds = set()
    for step in range(12):
        mixed, targets = mix_images(images.clone(), labels, 2, settings, step)
        assert torch.allclose(targets.sum(1), torch.ones(6))
        assert ((targets > 0) & (targets < 1)).all()
        share = mixed.mean((1, 2, 3))  # of class 1
        assert torch.allclose(targets[:, 1], 0.05 + 0.9 * share, atol=1e-5)
        kinds.add("cutmix" if set(mixed.unique().tolist()) <= {0.0, 1.0} else "mixup")
    wanted = {name for name, alpha in (("mixup", mixup), ("cutmix", cutmix)) if alpha}
    assert kinds == wanted


def test_label_smoothing_by_hand() -> None:
    images, labels = torch.zeros(2, 1, 4, 4), torch.tensor([2, 0])
    same, targets = mix_images(
        images, labels, 4, FinetuneSettings(**{**PLAIN, "smoothing": 0.2}), 0
    )
    assert torch.equal(same, images)
    expected = torch.tensor([[0.05, 0.05, 0.85, 0.05], [0.85, 0.05, 0.05, 0.05]])
    assert torch.allclose(targets, expected)
    _, hard = mix_images(images, labels, 4, FinetuneSettings(**{**PLAIN, "smoothing": 0.0}), 0)
    assert torch.equal(hard, F.one_hot(labels, 4).float())


def test_erasing_changes_its_share_of_images_by_key() -> None:
    images = torch.zeros(400, 1, 16, 16)
    keys = image_keys(0, 0, range(400), purpose="erase")
    erased = erase(images.clone(), keys, 0.25)
    changed = (erased != 0).flatten(1).any(1)
    assert 0.18 < changed.float().mean() < 0.32
    assert torch.equal(erase(images.clone(), keys, 0.0), images)
    # Alone or in a batch, and whatever the global generators are at.
    order = torch.arange(399, -1, -1)
    torch.manual_seed(5)
    assert torch.equal(erase(images.clone(), keys[order], 0.25)[order], erased)


@pytest.mark.parametrize("channels", [1, 3])
def test_rand_augment_follows_the_key(channels: int) -> None:
    augment = RandAugment("rand-m9-mstd0.5-inc1", (16, 16), [0.5] * channels)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (300, channels, 16, 16), generator=generator).byte()
    keys = image_keys(0, 0, range(300), purpose="augment")
    strongest = RandAugment("rand-m10-inc1", (16, 16), [0.5] * channels)
    strongest(images, keys)  # 0 bits of posterization, which Pillow refuses
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    changed = augment(images, keys)
    assert (changed != images).flatten(1).any(1).float().mean() > 0.5
    order = torch.arange(299, -1, -1)
    assert torch.equal(augment(images[order], keys[order])[order], changed)
    assert not torch.equal(augment(images, keys + 1), changed)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert before[:2] == after[:2] and torch.equal(before[2], after[2])


@pytest.mark.parametrize("setting", list(CHANGES))
def test_each_setting_changes_the_training(encoder: Encoder, setting: str) -> None:
    train = open_source(DATA, "train")
    plain = replace(SHORT, **PLAIN)
    changed = replace(plain, **{setting: CHANGES[setting]})
    first, second = fit(encoder, train, plain), fit(encoder, train, changed)
    assert first.history[0]["train_loss"] != second.history[0]["train_loss"]


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("rand_augment", ("rand-m9-mstd0.5-inc1", "rand-m2-n1")),
        ("erasing", (0.3, 0.9)),
        ("drop_path", (0.2, 0.6)),
        ("crop_scale", ((0.1, 0.4), (0.5, 0.6))),
    ],
)
def test_the_value_counts_and_not_only_whether_there_is_one(
    encoder: Encoder, setting: str, values: tuple[Any, Any]
) -> None:
    train = open_source(DATA, "train")
    plain = replace(SHORT, **{**PLAIN, "epochs": 1, "fraction": 0.05, "batch_size": 16})
    found = [fit(encoder, train, replace(plain, **{setting: value})).history for value in values]
    assert found[0][0]["train_loss"] != found[1][0]["train_loss"]


@pytest.mark.parametrize("ema", [0.0, 0.99])
def test_what_is_kept_is_what_was_measured(encoder: Encoder, ema: float) -> None:
    """The accuracy by which the epoch is chosen is that of the weights that are returned."""
    train = open_source(DATA, "train")
    settings = replace(SHORT, **{**PLAIN, "epochs": 4, "base_lr": 0.1, "ema": ema})
    classifier = fit(encoder, train, settings)
    held = Subset(train, split(train, settings)[1])
    (batch,) = eval_loader(held, DATA, batch_size=len(held))
    with torch.no_grad():
        logits = classifier.model(normalize(batch.images, train.mean, train.std))
    right = (logits.argmax(1) == batch.labels).double().mean()
    assert classifier.numbers["chosen_accuracy"] == pytest.approx(float(right))


def test_ema_is_what_is_measured(encoder: Encoder) -> None:
    train = open_source(DATA, "train")
    start = weights(build_classifier(encoder, 10, SHORT).model)
    plain = weights(fit(encoder, train, SHORT).model)
    slow = weights(fit(encoder, train, replace(SHORT, ema=0.999)).model)
    assert 0 < (slow - start).norm() < 0.05 * (plain - start).norm()


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_pool(encoder: Encoder, pool: str) -> None:
    vit: Any = build_classifier(encoder, 10, FinetuneSettings(pool=pool)).model.eval()
    torch.nn.init.normal_(vit.head.weight)
    images = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        tokens = vit.forward_features(images)
        pooled = tokens[:, 1:].mean(1) if pool == "mean" else tokens[:, 0]
        assert torch.allclose(vit(images), vit.head(vit.fc_norm(pooled)))
        assert encoder.vit is not None
        if pool == "cls":  # nothing is lost: the encoder's own norm
            assert torch.allclose(tokens, encoder.vit.forward_features(images))
        else:  # a new norm, behind the pooling
            assert isinstance(vit.norm, torch.nn.Identity)
            assert isinstance(vit.fc_norm, torch.nn.LayerNorm)


def test_it_starts_from_the_encoder_and_leaves_it(encoder: Encoder) -> None:
    assert encoder.vit is not None
    torch.nn.init.normal_(encoder.vit.pos_embed)
    before = {k: v.clone() for k, v in encoder.vit.state_dict().items()}
    started = build_classifier(encoder, 10, SHORT).model.state_dict()
    same = [k for k in before if not k.startswith("norm.")]
    assert all(torch.equal(started[k], before[k]) for k in same)
    trained = fit(encoder, open_source(DATA, "train"), SHORT).model
    assert not any(torch.equal(trained.state_dict()[k], before[k]) for k in same)
    assert all(torch.equal(v, before[k]) for k, v in encoder.vit.state_dict().items())
    assert not any(p.requires_grad for p in encoder.vit.parameters())


def test_fixed_position_embeddings_learn_too() -> None:
    model = replace(CONFIG.model, position_embedding="sincos2d")
    encoder = open_encoder("untrained", replace(CONFIG, model=model))
    assert build_classifier(encoder, 10, SHORT).model.pos_embed.requires_grad


def test_the_same_twice_and_with_workers(encoder: Encoder) -> None:
    train = open_source(DATA, "train")
    settings = replace(SHORT, epochs=1)
    first = fit(encoder, train, settings)
    torch.manual_seed(99)
    np.random.seed(99)
    again = fit(encoder, train, settings)
    with_worker = replace(encoder, data=replace(DATA, workers=1))
    other = fit(with_worker, train, settings)
    assert first.history == again.history == other.history
    assert torch.equal(weights(first.model), weights(again.model))
    assert torch.equal(weights(first.model), weights(other.model))
    assert not torch.equal(
        weights(fit(encoder, train, replace(settings, seed=1)).model), weights(first.model)
    )


def test_val_is_asked_once_and_does_not_choose(encoder: Encoder) -> None:
    train, val = open_source(DATA, "train"), open_source(DATA, "val")
    evaluation = Finetune(replace(SHORT, epochs=3))
    asked: list[int] = []
    real = val.image
    val.image = lambda index: (asked.append(index), real(index))[1]  # type: ignore[method-assign]
    first = evaluation.run(encoder, train, val)
    assert asked == list(range(len(val)))
    assert val.labels is not None
    val.labels = 9 - val.labels
    second = evaluation.run(encoder, train, val)
    assert first["accuracy"] != second["accuracy"]
    chosen = ("chosen_epoch", "chosen_accuracy", "train_loss")
    assert [first[k] for k in chosen] == [second[k] for k in chosen]


def test_the_best_epoch_is_kept(encoder: Encoder) -> None:
    classifier = fit(encoder, open_source(DATA, "train"), replace(SHORT, epochs=4))
    accuracies = [line["held_out_accuracy"] for line in classifier.history]
    assert len(accuracies) == 4
    assert classifier.numbers["chosen_accuracy"] == max(accuracies)
    assert classifier.numbers["chosen_epoch"] == 1 + accuracies.index(max(accuracies))


def test_the_epoch_is_chosen_on_images_that_are_not_fitted() -> None:
    train = open_source(DATA, "train")
    fitted, held = split(train, FinetuneSettings(held_out=0.25))
    assert sorted([*fitted.tolist(), *held.tolist()]) == list(range(len(train)))
    assert train.labels is not None
    shares = train.labels[held].bincount() / train.labels.bincount()
    assert ((shares - 0.25).abs() < 0.01).all()


def test_digits_are_learned(encoder: Encoder) -> None:
    settings = FinetuneSettings(
        epochs=6, batch_size=32, base_lr=3e-2, warmup_epochs=1, layer_decay=0.9, **PLAIN
    )
    numbers = Finetune(settings).run(encoder, open_source(DATA, "train"), open_source(DATA, "val"))
    assert numbers["accuracy"] > 0.4
    assert numbers["accuracy_top5"] > numbers["accuracy"]
    assert numbers["train_loss"] < 2.1


def test_low_shot_takes_a_share_of_each_class() -> None:
    labels = torch.tensor([0] * 100 + [1] * 10)
    ids = torch.arange(110)
    few, more = (low_shot(ids, labels, share, seed=0) for share in (0.01, 0.2))
    assert labels[few].bincount().tolist() == [1, 1]
    assert labels[more].bincount().tolist() == [20, 2]
    assert set(few.tolist()) <= set(more.tolist())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, r"finetune\.epochs: 0 must be at least 1"),
        ({"layer_decay": 1.5}, r"finetune\.layer_decay: 1\.5 must be above 0 and at most 1"),
        ({"layer_decay": 0}, r"finetune\.layer_decay"),
        ({"drop_path": 1}, r"finetune\.drop_path: 1\.0 must be at least 0 and below 1"),
        ({"mixup": -1}, r"finetune\.mixup: -1\.0 must be at least 0"),
        ({"rand_augment": "m9"}, r"finetune\.rand_augment: 'm9' is no policy"),
        ({"pool": "both"}, r"finetune\.pool: 'both' is not one of cls, mean"),
        ({"betas": [0.9]}, r"finetune\.betas: \[0\.9\] must have 2 values"),
        ({"crop_scale": [0.5, 0.1]}, r"finetune\.crop_scale"),
        ({"smoothing": 1}, r"finetune\.smoothing"),
        ({"batch_size": 1}, r"finetune\.batch_size: 1 must be at least 2"),
        ({"learning_rate": 1.0}, r"finetune: 'learning_rate' is not one of"),
        ({"epochs": "many"}, r"finetune\.epochs: 'many' must be a whole number"),
        ({"held_out": 0.001}, r"finetune\.held_out: 0\.001 of each class holds none of the 1617"),
    ],
)
def test_bad_settings_are_told(encoder: Encoder, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(encoder, {"finetune": settings})


def test_bad_images_are_told(encoder: Encoder) -> None:
    train, val = open_source(DATA, "train"), open_source(DATA, "val")
    assert train.labels is not None
    one = Subset(train, (train.labels == 3).nonzero()[:, 0])
    with pytest.raises(UserError, match="needs at least 2 classes; train has 1"):
        evaluate(encoder, {"finetune": {}}, train=one, val=val)
    fewer = Subset(train, (train.labels != 3).nonzero()[:, 0])
    with pytest.raises(UserError, match="class '3' is in val but not in train"):
        evaluate(encoder, {"finetune": {}}, train=fewer, val=val)
    with pytest.raises(UserError, match="evaluation finetune needs an encoder, and pixels has"):
        evaluate(open_encoder("pixels", CONFIG), {"finetune": {}})
    with pytest.raises(UserError, match=r"base_lr: .* loss is nan in epoch"):
        evaluate(encoder, {"finetune": {"base_lr": 1e30, "epochs": 2, "warmup_epochs": 0}})
    train.labels = None
    with pytest.raises(UserError, match="has no labels; evaluation finetune needs them"):
        evaluate(encoder, {"finetune": {}}, train=train, val=val)


def test_timm_loads_the_saved_classifier(encoder: Encoder, tmp_path: Path) -> None:
    assert encoder.model is not None
    encoder = replace(encoder, model=replace(encoder.model, norm_eps=1e-3))
    train = open_source(DATA, "train")
    for pool in ("mean", "cls"):
        classifier = fit(encoder, train, replace(SHORT, epochs=1, pool=pool))
        path = classifier.save(tmp_path / f"{pool}.safetensors")
        names: dict[str, Any] = {}
        *lines, last = classifier.usage(path).splitlines()
        exec("\n".join([*lines, f"model = {last}"]), names)
        images = torch.randn(2, 1, 8, 8)
        with torch.no_grad():
            assert torch.equal(names["model"].eval()(images), classifier.model(images))
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["classifier"])["classes"] == [str(k) for k in range(10)]


def test_a_folder_of_photographs(encoder: Encoder, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for shade, name in ((40, "dark"), (210, "light")):
        (tmp_path / "all" / name).mkdir(parents=True)
        for number in range(30):
            pixels = generator.normal(shade, 10, (12, 10, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "all" / name / f"{number}.png")
    file = tmp_path / "out.safetensors"
    recipe = {**PLAIN, "base_lr": 0.1, "epochs": 4, "batch_size": 8, "layer_decay": 1.0}
    classifier = package.finetune(encoder, tmp_path / "all", output=file, device="cpu", **recipe)
    assert classifier.classes == ["dark", "light"]
    assert classifier.numbers["accuracy"] == 1 and "accuracy_top5" not in classifier.numbers
    paths = [tmp_path / "all" / name / "0.png" for name in ("light", "dark")]
    assert classifier.predict(paths) == ["light", "dark"]
    loaded = timm.create_model(
        "vit_tiny_patch16_224",
        num_classes=2,
        checkpoint_path=file,
        img_size=8,
        in_chans=1,
        **classifier.built.backbone_args,
    )
    assert loaded.head.out_features == 2
    with pytest.raises(UserError, match="lies in a folder that does not exist"):
        package.finetune(encoder, output=tmp_path / "none" / "x.safetensors")


QUICK = ["epochs=1", "batch_size=32", "fraction=0.1"]


def test_from_the_command_line(
    mim: Callable[..., Any], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert mim("pretrain", "--config", tiny(), "--output", run).code == 0
    done = mim("evaluate", "finetune", run, "--set", *QUICK, "--device", "cpu")
    assert done.code == 0 and "Fine-tuning, accuracy (%)" in done.out
    result = json.loads((run / "result.json").read_text())
    assert 0 <= result["evaluations"]["finetune"]["accuracy"] <= 1
    assert result["evaluation_settings"]["finetune"]["layer_decay"] == 0.65
    assert (run / "finetune.safetensors").is_file()
    assert "epochs: 0 must be" in mim("evaluate", "finetune", run, "--set", "epochs=0").line
    refused = mim("evaluate", "finetune", "pixels", "--like", run)
    assert refused.code == 2 and "needs an encoder" in refused.line
    file = tmp_path / "numbers.json"
    scratch = ("evaluate", "finetune", "untrained", "--like", run, "--json", file)
    assert mim(*scratch, "--set", *QUICK).code == 0
    (found,) = json.loads(file.read_text()).values()
    assert found["finetune"]["chosen_epoch"] == 1  # what the table leaves out


def test_in_a_comparison(
    mim: Callable[..., Any], tiny_tree: Callable[..., Any], tmp_path: Path
) -> None:
    import yaml

    settings = {"epochs": 1, "batch_size": 32, "fraction": 0.1, "save": False}
    config = {
        "output": str(tmp_path / "compare"),
        "axes": {"model.regime.name": ["drop"]},
        "evaluations": {"finetune": settings, "knn": {"few_shot": [5], "draws": 1}},
        "base": tiny_tree({"train.max_steps": 2}),
    }
    file = tmp_path / "compare.yaml"
    file.write_text(yaml.safe_dump(config))
    done = mim("compare", "--config", file)
    assert done.code == 0, done.err
    folders = {path.name: path for path in (tmp_path / "compare").iterdir() if path.is_dir()}
    results = {
        name: json.loads((path / "result.json").read_text())
        for name, path in folders.items()
        if (path / "result.json").is_file()
    }
    kinds = {result["kind"]: result for result in results.values()}
    for kind in ("run", "untrained"):
        assert "accuracy" in kinds[kind]["evaluations"]["finetune"]
    assert list(kinds["pixels"]["evaluations"]) == ["knn"]
    reason = kinds["pixels"]["evaluations_left_out"]["finetune"]
    assert "raw pixels have none" in reason and reason in done.err
    assert not list((tmp_path / "compare").rglob("finetune.safetensors"))
    report = (tmp_path / "compare" / "report.md").read_text()
    assert "Fine-tuning" in report


def test_precision(encoder: Encoder) -> None:
    train, val = open_source(DATA, "train"), open_source(DATA, "val")
    evaluation = Finetune(replace(SHORT, epochs=1))
    full = evaluation.run(encoder, train, val)
    for precision in ("bf16", "fp16"):
        half = evaluation.run(encoder, train, val, precision=precision)
        assert half["train_loss"] != full["train_loss"]
        assert half["train_loss"] == pytest.approx(full["train_loss"], abs=0.05)
    with pytest.raises(UserError, match="precision: 'fp8' is not one of"):
        evaluation.run(encoder, train, val, precision="fp8")
