"""Numbers of the nearest codebook entry, by hand, and codebooks that cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mim.core.errors import UserError
from mim.model.targets import Target
from mim.model.targets.codes import CodesSettings

Make = Callable[..., Target]
ENTRIES = torch.tensor([[0.0, 0, 0, 0], [4, 6, 8, 10], [-1, 1, -1, 1]])
IMAGE = torch.tensor([[0.0, 1, 4, 6], [1, 0, 8, 9], [5, 5, -1, 1], [5, 5, -1, 2]])[None, None]


@pytest.fixture
def book(tmp_path: Path) -> Callable[[Tensor], str]:
    def write(entries: Tensor, name: str = "codebook") -> str:
        path = tmp_path / "codes.safetensors"
        save_file({name: entries}, path)
        return str(path)

    return write


def test_the_nearest_entry_by_hand(make: Make, book: Any) -> None:
    target = make("codes", codes=CodesSettings(codebook=book(ENTRIES)))
    assert target.dim == 3
    # Patches [0 1 1 0], [4 6 8 9], [5 5 5 5], [-1 1 -1 2]; the third: 100 from 0, 35 from entry 1.
    assert target(IMAGE).tolist() == [[[0], [1], [1], [2]]]
    assert target.at(IMAGE, torch.tensor([[3, 1]])).tolist() == [[[2], [1]]]


def test_each_patch_may_be_normalised_first(make: Make, book: Any) -> None:
    units = torch.tensor([[-1.5, 0, 0, 1.5], [1.0, 0, 0, -1], [1, -1, -1, 1]])
    settings = CodesSettings(codebook=book(units), of="normalized_pixels")
    images = torch.tensor([[0.0, 5, 9, 0], [5, 10, 0, 9]]).repeat(2, 1)[None, None]
    assert make("codes", codes=settings)(images).flatten().tolist() == [0, 2, 0, 2]


def test_features_of_a_frozen_model_have_entries_too(make: Make, book: Any, images_of: Any) -> None:
    args = {"patch_size": 2, "embed_dim": 12, "depth": 1, "num_heads": 2}
    model: dict[str, Any] = {"backbone_args": args}
    plain = make("features", channels=3, features={**model})
    images = images_of(plain).float()
    tokens = plain(images).flatten(0, 1)  # (8, 12)
    settings = CodesSettings(**model, codebook=book(tokens.contiguous()), of="features")
    target = make("codes", channels=3, codes=settings)
    assert target(images).flatten().tolist() == list(range(8))


def test_the_loss_is_the_cross_entropy(make: Make, book: Any) -> None:
    target = make("codes", codes=CodesSettings(codebook=book(ENTRIES)))
    logits = torch.tensor([[2.0, 0, -1], [0.5, 1, 3]]).double()
    numbers = torch.tensor([[0], [1]])
    expected = torch.nn.functional.cross_entropy(logits, numbers[:, 0], reduction="none")
    torch.testing.assert_close(target.distance(logits, numbers), expected, rtol=0, atol=1e-12)


def test_a_prediction_shows_its_entry(make: Make, book: Any) -> None:
    target = make("codes", codes=CodesSettings(codebook=book(ENTRIES)))
    logits = torch.eye(3)[torch.tensor([1, 2, 0, 0])][None]
    assert torch.equal(target.to_pixels(logits, IMAGE)[0], ENTRIES[[1, 2, 0, 0]])
    numbers = target(IMAGE)
    assert torch.equal(target.to_pixels(numbers, IMAGE, numbers)[0], ENTRIES[[0, 1, 1, 2]])


@pytest.mark.parametrize(
    ("entries", "name", "message"),
    [
        (torch.zeros(3, 5), "codebook", "has entries of 5 values where a patch has 4"),
        (torch.zeros(3), "codebook", "must hold one finite matrix named codebook"),
        (torch.full((3, 4), float("nan")), "codebook", "must hold one finite matrix"),
        (ENTRIES, "centres", "must hold one finite matrix named codebook"),
    ],
)
def test_a_file_that_holds_no_codebook_is_refused(
    entries: Tensor, name: str, message: str, make: Make, book: Any
) -> None:
    with pytest.raises(UserError, match=rf"model\.target\.codes\.codebook: .*{message}"):
        make("codes", codes=CodesSettings(codebook=book(entries, name)))


def test_no_file_is_refused(make: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"codes\.codebook: None must be given"):
        make("codes")
    with pytest.raises(UserError, match="does not exist"):
        make("codes", codes=CodesSettings(codebook=str(tmp_path / "none")))
    (tmp_path / "text").write_text("no weights")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        make("codes", codes=CodesSettings(codebook=str(tmp_path / "text")))
