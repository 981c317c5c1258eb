"""Generators that look at the image: attention and a trained network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mim.core.config import (
    AttentionMaskConfig,
    Config,
    DataConfig,
    DecoderConfig,
    LearnedMaskConfig,
    MaskConfig,
    ModelConfig,
    OptimConfig,
    RegimeConfig,
    TransformerDecoderConfig,
)
from mim.core.errors import UserError
from mim.core.rng import image_keys
from mim.masks import PatchMask, build_mask_generator, sample_masks
from mim.masks.guided import gumbel
from mim.model import MaskedImageModel, build_model
from mim.model.backbones import attention_maps, patch_attention
from mim.training.optim import build_optimizer

IDS = torch.arange(6)


def make(mask: MaskConfig, regime: str = "drop", **args: Any) -> MaskedImageModel:
    config = Config(
        data=DataConfig(image_size=32),
        mask=mask,
        model=ModelConfig(
            backbone_args={"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, **args},
            regime=RegimeConfig(regime),
            decoder=DecoderConfig(transformer=TransformerDecoderConfig(16, 1, 2)),
            teacher_decay=0.9,
        ),
    )
    return build_model(config)


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def keys(epoch: int = 0, ids: Tensor = IDS) -> Tensor:
    return image_keys(0, epoch, ids)


BOTH = pytest.mark.parametrize(
    "mask",
    [
        MaskConfig("attention", ratio=0.5),
        MaskConfig("attention", ratio=0.5, attention=AttentionMaskConfig("least", 0.0)),
        MaskConfig("learned", ratio=0.5),
        MaskConfig("learned", ratio=0.5, learned=LearnedMaskConfig("adversarial", "topk")),
    ],
    ids=["attention", "attention least", "learned", "learned adversarial"],
)


@BOTH
@pytest.mark.parametrize("ratio", [0.3, 0.75, (0.2, 0.8)], ids=str)
def test_counts_are_exact(mask: MaskConfig, ratio: Any) -> None:
    changed = MaskConfig(mask.name, ratio=ratio, attention=mask.attention, learned=mask.learned)
    drawn = make(changed).draw_mask(images(), keys())
    expected = sample_masks(MaskConfig(ratio=ratio), (4, 4), seed=0, epoch=0, sample_ids=IDS)
    assert torch.equal(drawn.is_masked.sum(1), expected.is_masked.sum(1))


@BOTH
def test_masks_do_not_depend_on_the_batch_and_follow_the_keys(mask: MaskConfig) -> None:
    model = make(mask)
    whole = model.draw_mask(images(), keys()).is_masked
    for row in range(6):
        one = slice(row, row + 1)
        alone = model.draw_mask(images()[one], keys(ids=IDS[one])).is_masked
        assert torch.equal(alone[0], whole[row])
    assert torch.equal(model.draw_mask(images(), keys()).is_masked, whole)
    noisy = mask.attention.randomness > 0 and mask.learned.sampling == "gumbel"
    assert torch.equal(model.draw_mask(images(), keys(1)).is_masked, whole) != noisy


@BOTH
def test_no_global_generator_and_no_gradient(mask: MaskConfig) -> None:
    model = make(mask)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batch = images().requires_grad_()
    drawn = model.draw_mask(batch, keys())
    assert torch.equal(torch.get_rng_state(), before)
    assert not drawn.is_masked.requires_grad


@pytest.mark.parametrize("name", ["attention", "learned"])
def test_without_images_they_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"mask\.name: '\w+' looks at the images"):
        sample_masks(MaskConfig(name), (4, 4), seed=0, epoch=0, sample_ids=[0])
    generator = build_mask_generator(MaskConfig(name), (4, 4), (8, 8))
    with pytest.raises(UserError, match="looks at the images"):
        generator((4, 4), keys(), images=images())  # neither teacher nor network
    with pytest.raises(TypeError):
        generator((4, 4))  # type: ignore[call-arg]


# --- Attention -----------------------------------------------------------------------------------


def test_strict_attention_hides_the_most_or_the_least_attended() -> None:
    most = make(MaskConfig("attention", ratio=0.25, attention=AttentionMaskConfig("most", 0.0)))
    least = make(MaskConfig("attention", ratio=0.25, attention=AttentionMaskConfig("least", 0.0)))
    assert most.teacher is not None
    seen = most.teacher.attention(images())
    for model, largest in ((most, True), (least, False)):
        flags = model.draw_mask(images(), keys()).is_masked
        expected = torch.zeros_like(flags)
        expected.scatter_(1, seen.topk(4, dim=1, largest=largest).indices, True)
        assert torch.equal(flags, expected)


def test_randomness_1_samples_in_proportion_to_the_attention() -> None:
    """One hidden patch of 16: it is each with the probability that is its share."""
    share = torch.tensor([8.0, 4.0, 2.0, 1.0] + [1 / 12] * 12).double()
    share = share / share.sum()
    generator = build_mask_generator(
        MaskConfig("attention", ratio=1 / 16, attention=AttentionMaskConfig("most", 1.0)), (4, 4)
    )
    count = 4000
    drawn = generator(
        (4, 4),
        image_keys(0, 0, torch.arange(count)),
        images=torch.zeros(count, 1),
        attention=lambda x: share.expand(len(x), -1),
    )
    hits = drawn.is_masked.double().mean(dim=0)
    deviation = (share * (1 - share) / count).sqrt()
    assert ((hits - share).abs() < 5 * deviation).all()


def test_gumbel_noise_has_its_mean_and_variance() -> None:
    noise = gumbel(image_keys(0, 0, torch.arange(500)), 200, stream=2)
    assert abs(float(noise.mean()) - 0.5772) < 0.02
    assert abs(float(noise.var()) - torch.pi**2 / 6) < 0.05
    assert noise.isfinite().all()


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"reg_tokens": 2},
        {"class_token": False, "global_pool": "avg"},
        {"qk_norm": True, "pre_norm": True, "init_values": 0.1},
    ],
    ids=["class token", "registers", "no prefix", "pre-norm"],
)
def test_attention_maps_are_what_the_blocks_compute(args: dict[str, Any]) -> None:
    """Weights times values, projected, are the attention's own output."""
    model = make(MaskConfig(), **args).double().eval()
    vit = model.backbone
    tokens, _ = model.regime.inputs(vit, images().double(), PatchMask.empty(6, 16))
    seen: list[tuple[Tensor, Tensor]] = []
    for block in vit.blocks:
        block.attn.register_forward_hook(lambda _, ins, out: seen.append((ins[0], out)))
    with torch.no_grad():
        maps = attention_maps(vit, tokens)
        for block, weights, (x, out) in zip(vit.blocks, maps, seen, strict=True):
            torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
            v = block.attn.qkv(x)[..., 2 * 24 :].unflatten(2, (2, 12)).transpose(1, 2)
            again = block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
            torch.testing.assert_close(again, out, rtol=0, atol=1e-10)
        last = maps[-1].mean(1)
        prefix = vit.num_prefix_tokens
        rows = last[:, 0] if prefix else last.mean(1)
        torch.testing.assert_close(patch_attention(vit, tokens), rows[:, prefix:])


def test_the_teacher_follows_slowly_and_is_not_trained() -> None:
    model = make(MaskConfig("attention", ratio=0.5))
    teacher = model.teacher
    assert teacher is not None
    first = {k: v.clone() for k, v in teacher.encoder.state_dict().items()}
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(first[key], value)
    optimizer = build_optimizer(OptimConfig(), model, 1e-2)
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not owned & {id(p) for p in teacher.parameters()}
    model.train()
    assert not teacher.encoder.training
    model(images(), model.draw_mask(images(), keys())).loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    optimizer.step()
    model.update_teacher()
    new = model.backbone.state_dict()
    for key, value in teacher.encoder.state_dict().items():
        torch.testing.assert_close(value, 0.9 * first[key] + 0.1 * new[key])


def test_only_those_who_need_a_teacher_have_one() -> None:
    assert make(MaskConfig("random")).teacher is None
    assert make(MaskConfig("learned", ratio=0.5)).teacher is None
    assert make(MaskConfig("random")).mask_network is None


# --- Learned -------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["adamae", "adversarial"])
def test_the_scores_loss_reaches_the_network_alone(objective: str) -> None:
    model = make(MaskConfig("learned", ratio=0.5, learned=LearnedMaskConfig(objective))).train()
    mask = model.draw_mask(images(), keys())
    output = model(images(), mask)
    network = model.mask_network
    assert network is not None
    (output.loss - output.reconstruction).backward(retain_graph=True)
    for name, parameter in model.named_parameters():
        belongs = name.startswith("mask_network.")
        grad = parameter.grad
        assert (grad is not None and bool(grad.abs().max() > 0)) == belongs, name
    model.zero_grad()
    output.reconstruction.backward()
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("objective", ["adamae", "adversarial"])
def test_scores_move_to_the_patches_that_are_hard(objective: str) -> None:
    """Errors are large where a patch is bright; the network must find out from the pixels."""
    model = make(MaskConfig("learned", ratio=0.5, learned=LearnedMaskConfig(objective)))
    network, generator = model.mask_network, model.mask_generator
    assert network is not None
    bright = torch.zeros(6, 16, dtype=torch.bool)
    bright[:, [0, 3, 5, 10, 12, 15]] = True
    batch = images() * 0.1
    pixels = bright.view(-1, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    batch = torch.where(pixels, batch + 2.0, batch)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)

    def gap() -> float:
        with torch.no_grad():
            scores = network(batch).sigmoid()
        return float(scores[bright].mean() - scores[~bright].mean())

    start = gap()
    for epoch in range(60):
        mask = model.draw_mask(batch, keys(epoch))
        error = torch.where(bright, 1.0, 0.2).gather(1, mask.masked_ids)
        loss = generator.objective(network(batch), mask.masked_ids, error, None).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert gap() > start + 0.3
    # What that means for the masks: adamae shows the hard patches, adversarial hides them.
    flags = model.draw_mask(batch, keys(99)).is_masked
    hidden_bright = float(flags[bright].double().mean())
    assert hidden_bright < 0.4 if objective == "adamae" else hidden_bright > 0.7


def test_the_objectives_by_hand() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]])
    ids, error = torch.tensor([[1, 2]]), torch.tensor([[0.3, 0.1]])
    score = 1 / (1 + (-logits).exp())
    adamae = build_mask_generator(MaskConfig("learned"), None, (8, 8))
    share = score / score.sum()
    expected = -(0.3 * share[0, 1].log() + 0.1 * share[0, 2].log()) / 2
    torch.testing.assert_close(adamae.objective(logits, ids, error, None)[0], expected)
    adversarial = build_mask_generator(
        MaskConfig("learned", learned=LearnedMaskConfig("adversarial")), None, (8, 8)
    )
    expected = -(0.1 * score[0, 1].log() - 0.1 * score[0, 2].log()) / 2
    torch.testing.assert_close(adversarial.objective(logits, ids, error, None)[0], expected)
    padded = adversarial.objective(
        logits,
        torch.tensor([[1, 2, 0]]),
        torch.tensor([[0.3, 0.1, 9.0]]),
        torch.tensor([[True, True, False]]),
    )
    torch.testing.assert_close(padded[0], expected)


@pytest.mark.parametrize("sampling", ["gumbel", "topk"])
def test_high_scores_are_hidden_or_shown(sampling: str) -> None:
    logits = torch.full((200, 16), -4.0)
    logits[:, :4] = 4.0
    for objective, hidden in (("adamae", 12), ("adversarial", 4)):
        generator = build_mask_generator(
            MaskConfig("learned", ratio=hidden / 16, learned=LearnedMaskConfig(objective, sampling))
        )
        mask = generator(
            (4, 4),
            image_keys(0, 0, torch.arange(200)),
            images=torch.zeros(200, 1),
            network=lambda _: logits,
        )
        share = float(mask.is_masked[:, :4].double().mean())
        if objective == "adamae":
            assert share == 0.0 if sampling == "topk" else share < 0.15
        else:
            assert share == 1.0 if sampling == "topk" else share > 0.85


@pytest.mark.parametrize("regime", ["drop", "zero", "token"])
def test_every_parameter_gets_a_gradient(regime: str) -> None:
    model = make(MaskConfig("learned", ratio=(0.3, 0.8)), regime).train()
    model(images(), model.draw_mask(images(), keys())).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_in_evaluation_the_loss_is_the_reconstruction() -> None:
    model = make(MaskConfig("learned", ratio=0.5)).eval()
    output = model(images(), model.draw_mask(images(), keys()))
    assert output.loss is output.reconstruction


@pytest.mark.parametrize(
    ("kind", "settings", "part"),
    [
        (AttentionMaskConfig, {"hide": "some"}, "mask.attention.hide: 'some' is not one of"),
        (AttentionMaskConfig, {"randomness": -1.0}, "mask.attention.randomness: -1.0"),
        (LearnedMaskConfig, {"objective": "adios"}, "mask.learned.objective: 'adios' is not one"),
        (LearnedMaskConfig, {"sampling": "best"}, "mask.learned.sampling: 'best' is not one of"),
        (LearnedMaskConfig, {"width": 0}, "mask.learned.width: 0"),
    ],
)
def test_bad_settings_are_named(kind: Any, settings: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError) as caught:
        kind(**settings)
    assert part in str(caught.value)
