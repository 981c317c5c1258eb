"""Step time and memory on many processes: the model of it by hand, and beside real processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.ranks import hidden_share
from benchmarks.scale import (
    Machine,
    Work,
    bench_scale,
    buckets_of,
    count_work,
    exchange_seconds,
    exposed_seconds,
    predict,
    sharded_seconds,
)
from mim import build_model, load_config

Captured = pytest.CaptureFixture[str]
Tiny = Callable[..., Path]
PLAIN = Machine(
    matrix_rate=1e9, utilisation=1.0, memory=1e9, memory_rate=1e9, node=4, node_rate=100.0,
    network_rate=10.0, link_share=1.0, latency=0.0,
)  # fmt: skip


def test_exchanges_by_hand() -> None:
    def seconds(gpus: int, both_ways: bool = True) -> float:
        return exchange_seconds(800.0, gpus, PLAIN, both_ways=both_ways)

    assert seconds(1) == 0
    assert seconds(2) == pytest.approx(2 * 400 / 100)  # half of the bytes, there and back
    assert seconds(4) == pytest.approx(2 * 600 / 100)
    assert seconds(4, both_ways=False) == pytest.approx(600 / 100)
    # Two nodes: as within one, and a quarter of the bytes of each GPU, half of it, between them.
    assert seconds(8) == pytest.approx(2 * (600 / 100 + 200 / 2 / 10))


def test_what_the_backward_pass_hides_by_hand() -> None:
    assert exposed_seconds([(1.0, 0.2), (1.0, 0.5), (1.0, 1.0)], 10.0) == 1.0, "the last alone"
    assert exposed_seconds([(4.0, 0.5), (4.0, 0.6), (4.0, 1.0)], 10.0) == 7.0, "one at a time"
    assert exposed_seconds([(1.0, 0.1)], 10.0) == 0.0


def test_buckets_hold_all_weights_in_order() -> None:
    mib = 2**20
    work = Work((30 * mib, 10 * mib), (2 * mib, 10 * mib), 1, 2, 0.4, 0.0, 0.0, 0)
    found = buckets_of(work)
    assert [size // mib for size, _ in found] == [2, 40, 10]
    assert [ready for _, ready in found] == pytest.approx([0.4 / 6, 0.4 + 0.6 * 0.75, 1.0])
    assert sum(size for size, _ in found) == work.weight_bytes


def test_predictions_by_hand() -> None:
    work = Work((400,), (400,), 10**9, 2 * 10**9, 0.5, 50.0, 100.0, 10)
    one = predict(work, PLAIN, 1, 4, "ddp")
    assert (one["forward"], one["backward"], one["exchange"]) == (4.0, 8.0, 0.0)
    assert one["step"] == pytest.approx(12 + 7 * 800 / 1e9)
    assert one["memory"] == 3 * 800 + 4 * 10 + max(4 * 50 + 100, 800)
    many = predict(work, PLAIN, 8, 4, "ddp")
    assert many["exposed"] == pytest.approx(many["exchange"]), "one bucket, ready at the end"
    assert many["images_per_second"] == pytest.approx(32 / many["step"])
    shards = predict(work, PLAIN, 8, 4, "fsdp")
    assert shards["exchange"] == pytest.approx(many["exchange"]), "gathered, then reduced"
    assert shards["state"] == 3 * 800 / 8


def test_weights_in_16_bits_by_hand(tiny: Tiny) -> None:
    """Half as many bytes to send; 10 bytes a weight to keep, and DDP's copy of its gradient."""
    wide = load_config(tiny({"train.precision": "bf16"}))
    narrow = load_config(tiny({"train.precision": "bf16", "train.weights": "bf16"}))
    one, two = count_work(wide), count_work(narrow)
    count = one.weight_bytes // 4
    assert two.weight_bytes == 2 * count and two.encoder_blocks[0] * 2 == one.encoder_blocks[0]
    assert two.saved_per_step < one.saved_per_step, "no weight is cast"
    states = [predict(work, PLAIN, 8, 4, "ddp")["state"] for work in (one, two)]
    assert states == [16 * count, 12 * count]
    assert predict(two, PLAIN, 8, 4, "fsdp")["state"] == 10 * count / 8
    assert predict(two, PLAIN, 1, 4, "ddp")["optimizer"] == pytest.approx(106 * count / 1e9)
    assert bench_scale(narrow, PLAIN, [1])["weights"] == bench_scale(wide, PLAIN, [1])["weights"]


def test_blocks_gathered_one_by_one_by_hand() -> None:
    """Gathers of 1, 1 and 2 s; passes of 1, 1, 2 and of 4, 2, 2 s."""
    work = Work((400,), (400,), 1, 1, 0.5, 50.0, 100.0, 10, (200, 200), (400,))
    # Forward: 0-1 gather, 1-2, 2-3 work, 3-4 wait for the second half of 2 s, 4-6. Backward: 6-8
    # gather, 8-12 and 12-14 work, 14-15 wait behind the first block's gradients, 15-17, 17-18 send.
    assert sharded_seconds(work, PLAIN, 2, 4.0, 8.0) == (12.0, 6.0)
    whole = Work((800,), (), 1, 1, 0.0, 0.0, 0.0, 0)
    assert sharded_seconds(whole, PLAIN, 2, 4.0, 8.0) == (8.0, 8.0), "in one piece nothing hides"
    fast = replace(PLAIN, node_rate=100e6)
    assert sharded_seconds(work, fast, 2, 4.0, 8.0)[1] < 1e-4
    # A tenth of the weights stands in no block, and a linear decoder has none.
    some = Work((400,), (40,), 1, 1, 0.5, 0.0, 0.0, 0, (400,))
    exchange, waits = sharded_seconds(some, PLAIN, 2, 4.0, 8.0)
    assert exchange == pytest.approx(2 * 0.2 + 3 * 2)
    # 0.2 and 2 s before the first work; gathered anew while the head, half of each pass, is at
    # work; sent after the last work.
    assert waits == pytest.approx(0.2 + 2 + 2 + 0.2)


def test_peaks_by_hand() -> None:
    work = Work((400,), (400,), 10**9, 2 * 10**9, 0.5, 50.0, 100.0, 10, (100, 150), (350,))
    shards = predict(work, PLAIN, 8, 4, "fsdp")
    state, inputs, rest = 3 * 800 / 8, 40, 200
    assert shards["memory"] == state + inputs + rest + max(300 + 4 * 350, 400 + 100)


def test_a_step_is_counted_on_the_model(tiny: Tiny) -> None:
    config = load_config(tiny({"model.regime.name": "token", "model.backbone_args.depth": 3}))
    work = count_work(config)
    model = build_model(config)
    assert work.weight_bytes == sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    assert 0 < work.decoder_share < 1 and work.flops_backward > work.flops_forward
    deeper = load_config(tiny({"model.regime.name": "token", "model.backbone_args.depth": 5}))
    more = (count_work(deeper).saved_per_image - work.saved_per_image) / 2
    # A block of width 16 on 17 tokens keeps at least its input, two norms', q, k, v, attention's
    # and its projection's, and four times the width before and after the activation.
    assert 14 <= more / (17 * 16 * 4) <= 26
    drop = load_config(tiny({"model.backbone_args.depth": 5}))
    fewer = (count_work(drop).saved_per_image - count_work(load_config(tiny())).saved_per_image) / 4
    assert fewer / more == pytest.approx(5 / 17, rel=0.1)


def test_shares_of_spans_by_hand() -> None:
    assert hidden_share([(0, 10), (5, 20)], [(-5, 5), (15, 16), (15, 30)]) == 0.5
    assert hidden_share([], [(0, 1)]) == 0.0 and hidden_share([(0, 1)], []) == 0.0


def test_predicted_on_the_command_line(tmp_path: Path, tiny: Tiny, capsys: Captured) -> None:
    numbers = tmp_path / "numbers.json"
    call = ["scale", "--config", str(tiny()), "--images", "32", "--json", str(numbers)]
    machine = ["network_rate=25e9", "utilisation=0.5"]
    assert main([*call, "--gpus", "1,8,16", "--machine", *machine]) == 0
    figures = json.loads(numbers.read_text())
    assert figures["machine"]["network_rate"] == 25e9 and figures["machine"]["node"] == 8
    kinds = [(row["gpus"], row["how"]) for row in figures["rows"]]
    assert kinds == [(1, "ddp"), (8, "ddp"), (8, "fsdp"), (16, "ddp"), (16, "fsdp")]
    assert all(0 < row["efficiency"] <= 1 for row in figures["rows"])
    table = capsys.readouterr().out
    assert table.startswith("Predicted, not measured.") and "| 16 | FSDP2 |" in table
    for wrong, said in (
        (("--gpus", "12"), "whole nodes"),
        (("--images", "0"), "at least 1"),
        (("--machine", "speed=3"), "link_share"),
        (("--machine", "utilisation=45"), "1 at most"),
        (("--machine", "node=some"), "KEY=NUMBER"),
        (("--check", "1"), "at least 2"),
    ):
        assert main([*call, *wrong]) == 2
        assert said in capsys.readouterr().err, wrong


def test_two_processes_exchange_while_they_compute(
    tmp_path: Path, tiny: Tiny, capsys: Captured
) -> None:
    """1.6 million weights are a bucket of 1 MiB and one of the rest; the first goes early."""
    changes = {"model.backbone_args": {"patch_size": 2, "embed_dim": 128, "depth": 8}}
    numbers = tmp_path / "numbers.json"
    call = ["scale", "--config", str(tiny(changes)), "--check", "2", "--rounds", "3"]
    assert main([*call, "--json", str(numbers), "--model.backbone_args.num_heads", "2"]) == 0
    table = capsys.readouterr().out
    found = json.loads(numbers.read_text())
    assert found["hidden_share"] > 0, "no all-reduce ran while gradients were computed"
    assert found["memory"]["predicted"] == pytest.approx(found["memory"]["measured"], rel=0.15)
    for how in ("ddp", "fsdp"):
        assert found[how]["predicted"] <= found[how]["predicted_exposed"]
        assert found[how]["measured"] > 0 and how[:4].upper() in table
    assert torch.distributed.is_initialized() is False
