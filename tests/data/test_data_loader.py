"""Batches are a function of seed, step and images: not of workers, processes or a resume."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mim.core.config import DataConfig
from mim.core.errors import UserError
from mim.data import (
    Batch,
    ImageSource,
    Subset,
    eval_loader,
    open_source,
    steps_per_epoch,
    train_loader,
)

CONFIG = DataConfig(source="digits", image_size=8, channels=1, batch_size=16)


@pytest.fixture(scope="module")
def source() -> ImageSource:
    return Subset(open_source(CONFIG, "train"), range(70))  # 4 steps an epoch, 6 images left over


def same(left: Iterable[Batch], right: Iterable[Batch]) -> None:
    pairs = list(zip(left, right, strict=True))
    assert pairs
    for a, b in pairs:
        assert (a.step, a.epoch) == (b.step, b.epoch)
        for name in ("images", "labels", "sample_ids"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


def rows(batches: Iterable[Batch]) -> dict[tuple[int, int], torch.Tensor]:
    """(epoch, sample id) -> image."""
    return {
        (batch.epoch, sample): image
        for batch in batches
        for sample, image in zip(batch.sample_ids.tolist(), batch.images, strict=True)
    }


def test_workers_change_nothing(source: ImageSource) -> None:
    alone = train_loader(source, CONFIG, 0, start_step=0, total_steps=9)
    two = replace(CONFIG, workers=2)
    shared = train_loader(source, two, 0, start_step=0, total_steps=9)
    same(alone, shared)
    evaluated = eval_loader(source, two, batch_size=9)
    same(eval_loader(source, CONFIG, batch_size=9), evaluated)
    same(eval_loader(source, CONFIG, batch_size=9), evaluated)  # persistent workers, second pass


def test_spawned_workers_change_nothing(source: ImageSource) -> None:
    alone = train_loader(source, CONFIG, 0, start_step=3, total_steps=5)
    one = replace(CONFIG, workers=1)
    spawned = train_loader(source, one, 0, start_step=3, total_steps=5)
    spawned._loader.multiprocessing_context = "spawn"
    same(alone, spawned)


def test_starting_late_equals_going_on(source: ImageSource) -> None:
    whole = list(train_loader(source, CONFIG, 0, start_step=0, total_steps=11))
    assert [batch.step for batch in whole] == list(range(11))
    assert [batch.epoch for batch in whole] == [0] * 4 + [1] * 4 + [2] * 3
    for start in (3, 4, 6):
        same(whole[start:], train_loader(source, CONFIG, 0, start_step=start, total_steps=11))
    assert not list(train_loader(source, CONFIG, 0, start_step=11, total_steps=11))


def test_skipped_steps_are_not_read(source: ImageSource) -> None:
    read: list[int] = []

    class Watched(Subset):
        def image(self, index: int) -> Image.Image:
            read.append(index)
            return source.image(index)  # type: ignore[return-value]

    loader = train_loader(Watched(source, range(70)), CONFIG, 0, start_step=7, total_steps=8)
    (batch,) = loader
    assert source.sample_ids[read].tolist() == batch.sample_ids.tolist()


@pytest.mark.parametrize("world", [2, 4])
def test_the_ranks_together_are_the_one_process(source: ImageSource, world: int) -> None:
    one = train_loader(source, CONFIG, 0, start_step=2, total_steps=7)
    ranks = [
        train_loader(source, CONFIG, 0, start_step=2, total_steps=7, rank=rank, world=world)
        for rank in range(world)
    ]
    for whole, *parts in zip(one, *ranks, strict=True):
        assert all(len(part) == 16 // world for part in parts)
        for name in ("images", "labels", "sample_ids"):
            joined = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(joined, getattr(whole, name)), name


def test_an_image_is_cut_alike_in_any_batch_split_and_any_order(source: ImageSource) -> None:
    small = rows(train_loader(source, CONFIG, 0, start_step=0, total_steps=8))
    large = replace(CONFIG, batch_size=35)
    whole = rows(train_loader(source, large, 0, start_step=0, total_steps=4))
    # The same ids at other positions come in another order, and must be cut the same.
    turned = Subset(source, list(reversed(range(70))))
    other = rows(train_loader(turned, large, 0, start_step=0, total_steps=4))
    assert len(whole) == len(other) == 140
    assert small.keys() < whole.keys()
    assert all(torch.equal(image, whole[key]) for key, image in small.items())
    assert all(torch.equal(image, whole[key]) for key, image in other.items())


def test_a_batch_beyond_what_is_decoded_at_once(source: ImageSource) -> None:
    assert len(source) > 64
    whole = rows(
        train_loader(source, replace(CONFIG, batch_size=70), 0, start_step=0, total_steps=1)
    )
    small = rows(
        train_loader(source, replace(CONFIG, batch_size=7), 0, start_step=0, total_steps=10)
    )
    assert small.keys() == whole.keys()
    assert all(torch.equal(image, whole[key]) for key, image in small.items())


def test_an_epoch_shows_each_image_once_in_a_new_order(source: ImageSource) -> None:
    config = replace(CONFIG, batch_size=35)
    batches = list(train_loader(source, config, 0, start_step=0, total_steps=4))
    epochs = [torch.cat([b.sample_ids for b in batches[i : i + 2]]) for i in (0, 2)]
    for ids in epochs:
        assert torch.equal(ids.sort().values, source.sample_ids.sort().values)
    assert not torch.equal(epochs[0], epochs[1])
    (reseeded,) = train_loader(source, config, 1, start_step=0, total_steps=1)
    assert not torch.equal(reseeded.sample_ids, batches[0].sample_ids)
    first, second = rows(batches[:2]), rows(batches[2:])
    changed = [not torch.equal(first[0, i], second[1, i]) for i in source.sample_ids.tolist()]
    assert sum(changed) > 60  # each epoch cuts anew


def test_labels_stay_with_their_images(source: ImageSource) -> None:
    truth = dict(zip(source.sample_ids.tolist(), source.labels.tolist(), strict=True))  # type: ignore[union-attr]
    for batch in train_loader(source, CONFIG, 0, start_step=0, total_steps=4):
        assert batch.labels is not None
        assert batch.labels.tolist() == [truth[i] for i in batch.sample_ids.tolist()]


def test_the_global_generator_is_left_alone(source: ImageSource) -> None:
    config = replace(CONFIG, workers=1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    list(train_loader(source, config, 0, start_step=0, total_steps=2))
    list(eval_loader(source, CONFIG))
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # type: ignore[index]


@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_gives_every_image_once_in_order(source: ImageSource, world: int) -> None:
    batches = [
        batch for rank in range(world) for batch in eval_loader(source, CONFIG, 16, rank, world)
    ]
    assert torch.equal(torch.cat([b.sample_ids for b in batches]), source.sample_ids)
    images = torch.cat([b.images for b in batches])
    expected = np.stack([np.asarray(source.image(i)) for i in range(70)])
    assert np.array_equal(images[:, 0].numpy(), expected)
    assert {b.epoch for b in batches} == {-1}


def test_evaluation_of_chosen_images(source: ImageSource) -> None:
    chosen = [9, 3, 3, 60]
    (batch,) = eval_loader(source, CONFIG, indices=chosen)
    assert torch.equal(batch.sample_ids, source.sample_ids[chosen])
    assert not list(eval_loader(source, CONFIG, indices=[]))
    # More processes than images: the surplus has nothing to do.
    shares = [list(eval_loader(source, CONFIG, 4, rank, 3, indices=[5, 6])) for rank in range(3)]
    assert [len(share) for share in shares] == [1, 1, 0]


def test_batch_sizes_that_cannot_be(source: ImageSource) -> None:
    assert steps_per_epoch(source, CONFIG) == 4
    with pytest.raises(UserError, match=r"data\.batch_size: 71 is more than the 70 training"):
        steps_per_epoch(source, replace(CONFIG, batch_size=71))
    with pytest.raises(UserError, match=r"data\.batch_size: 16 does not divide among 3"):
        train_loader(source, CONFIG, 0, start_step=0, total_steps=1, world=3)


def test_a_source_without_labels(source: ImageSource) -> None:
    bare = Subset(source, range(70))
    bare.labels = None
    (batch,) = train_loader(bare, CONFIG, 0, start_step=0, total_steps=1)
    assert batch.labels is None
    assert batch.to("cpu").labels is None


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_one_clear_line_from_any_worker(tmp_path: Path, workers: int) -> None:
    for i in range(4):
        (tmp_path / "train" / "cat").mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "train" / "cat" / f"{i}.png")
    broken = tmp_path / "train" / "cat" / "2.png"
    broken.write_bytes(broken.read_bytes()[:3000])  # the header is whole: opening succeeds
    (tmp_path / "val" / "cat").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "val" / "cat" / "0.png")
    config = DataConfig(source="imagefolder", path=str(tmp_path), image_size=32, batch_size=4)
    config = replace(config, workers=workers)
    loader = train_loader(open_source(config, "train"), config, 0, start_step=0, total_steps=3)
    with pytest.raises(UserError) as caught:
        list(loader)
    assert "train/cat/2.png (image file is truncated" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_batches_move_as_a_whole(source: ImageSource) -> None:
    (batch,) = train_loader(source, CONFIG, 0, start_step=5, total_steps=6)
    moved = batch.to("meta", non_blocking=True)
    assert {moved.images.device.type, moved.sample_ids.device.type} == {"meta"}
    assert moved.labels is not None and moved.labels.device.type == "meta"
    assert (moved.epoch, moved.step, len(moved)) == (1, 5, 16)


def test_a_batch_is_the_same_after_its_way_from_a_worker(source: ImageSource) -> None:
    whole = next(iter(train_loader(source, CONFIG, 1, start_step=3, total_steps=4)))
    for batch in (replace(whole, weight=torch.rand(len(whole))), replace(whole, labels=None)):
        sent = pickle.loads(pickle.dumps(batch))
        for field in fields(batch):
            one, other = getattr(batch, field.name), getattr(sent, field.name)
            if isinstance(one, torch.Tensor):
                assert isinstance(other, torch.Tensor) and one.dtype == other.dtype
                assert torch.equal(one, other), field.name
            else:
                assert one == other, field.name
        sent.sample_ids += 1  # its own memory
        assert not torch.equal(sent.sample_ids, batch.sample_ids)
