"""A whole run on an accelerator: where it waits, and how often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mim import load_config
from mim.training.pretrain import pretrain
from tests.accelerator.pretend import Pretend

LINE = {  # of the curves
    "mim/training/trainer.py Trainer._read": 1,
    "mim/training/online.py OnlineProbe.metrics": 1,
}


@pytest.fixture
def run(tiny: Callable[..., Path], tmp_path: Path, noted: Pretend) -> Callable[..., Counter[str]]:
    """Pre-trains; gives how often each place waited."""

    def call(steps: int, **changes: Any) -> Counter[str]:
        base = {"data.workers": 0, "data.batch_size": 16, "train.max_steps": steps}
        base |= {"train.ema_decay": 0.9, "online_probe.enabled": True}
        path = tiny({**base, **{k.replace("__", "."): v for k, v in changes.items()}})
        noted.waits.clear()
        pretrain(
            load_config(path, {"output": str(tmp_path / f"run{len(list(tmp_path.iterdir()))}")})
        )
        return noted.places

    return call


def test_more_steps_wait_for_lines_of_the_curves_alone(run: Callable[..., Counter[str]]) -> None:
    few, many = run(4, train__log_every=4), run(12, train__log_every=4)
    more = Counter({place: count - few[place] for place, count in many.items()})
    assert +more == Counter({place: 2 * count for place, count in LINE.items()})
    assert not -more


def test_a_checkpoint_waits_for_what_it_holds(run: Callable[..., Counter[str]]) -> None:
    """One look at the losses, one at the weights, and the copies that are written."""
    one = run(8, train__log_every=100)
    more = run(8, train__log_every=100, train__checkpoint_every=0.04)
    extra = Counter({place: count - one[place] for place, count in more.items()})
    places = {place for place, count in extra.items() if count}
    assert places == {
        "mim/training/trainer.py Trainer._read",
        "mim/training/nonfinite.py Watch.check_weights",
        "mim/training/online.py OnlineProbe.state_dict",
        "mim/training/checkpoint.py save_checkpoint.<locals>.write",
    }, extra
    assert extra["mim/training/nonfinite.py Watch.check_weights"] == 1
