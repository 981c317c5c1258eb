"""The page of the study says what its runs measured, by the rule that it states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import study
from mim.compare.sequential import SeedRule

ROWS = study.read(study.RESULTS.read_text())
CONFIG, SHORT, LONG, TINY = (
    yaml.safe_load((study.ROOT / "configs" / "study" / f"{name}.yaml").read_text())
    for name in ("cifar10", "short", "long", "tiny")
)


def test_every_table_is_drawn_from_the_results() -> None:
    pages = [page.read_text() for page in study.PAGES]
    assert [study.draw(page, ROWS) for page in pages] == pages
    assert all(any(f"<!-- {name} -->" in page for page in pages) for name in study.TABLES)


@pytest.mark.parametrize(
    ("piece", "configs"), [("tune", [CONFIG, SHORT, LONG]), ("tiny-tune", [TINY])]
)
def test_each_rate_is_the_one_that_the_rule_takes(piece: str, configs: list[Any]) -> None:
    chosen = study.chosen_rates(ROWS, piece)
    for name, settings in (item for config in configs for item in config["variants"].items()):
        assert settings["optim.base_lr"] == chosen[name.partition(", FLOPs")[0]], name


def test_the_rule_is_that_of_the_comparison() -> None:
    assert pytest.approx(CONFIG["margin"] / 100) == study.MARGIN
    assert SeedRule(**CONFIG["seeds"]) == study.RULE
    assert study.PRIMARY.startswith(CONFIG["primary"])


def test_a_difference_of_known_size_gets_its_verdict() -> None:
    """Two groups 5 points apart with a residual of nothing but a tenth of a point."""
    rows = [
        {
            "piece": "cifar10",
            "kind": "run",
            "variant": group,
            "seed": str(seed),
            study.PRIMARY: str(value + 0.001 * up),
        }
        for group, value, noise in [("a", 0.40, "0101"), ("b", 0.45, "1001"), ("c", 0.4505, "0110")]
        for seed, up in enumerate(map(int, noise))
    ]
    lines = study.differences(rows).splitlines()[2:]
    assert [line.rsplit("| ", 1)[1].removesuffix(" |") for line in lines] == [
        "a difference",
        "a difference",
        "as good within 1.5 points",
    ]


@pytest.mark.parametrize("piece", ["cifar10", "tiny"])
def test_equal_flops_are_equal(piece: str) -> None:
    spent = {
        row["variant"]: float(row["train_flops"])
        for row in ROWS
        if row["piece"] == piece and row["kind"] == "run"
    }
    assert spent["drop, FLOPs of token"] == pytest.approx(spent["token"], rel=1e-3)


def test_a_run_made_again_replaces_its_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it did not measure stays, and a run without the primary measure changes nothing."""
    before = [row for row in ROWS if row["piece"] == "cifar10"]
    assert study.read(study.gather([], before)) == before
    again, unmeasured = dict(before[0]), dict(before[1])
    again |= {study.PRIMARY: "0.5", "finetune.accuracy": ""}
    unmeasured |= {study.PRIMARY: "", "knn.accuracy": "0.9"}
    columns = [key for key in again if key != "piece"]
    table = [columns, *([row[key] for key in columns] for row in (again, unmeasured))]
    text = "\n".join(",".join(f'"{cell}"' for cell in line) for line in table)
    monkeypatch.setattr(study, "read_comparison", str)
    monkeypatch.setattr(study, "results_csv", lambda comparison: text)
    kept = study.read(study.gather([Path("cifar10")], before))
    assert kept == [{**before[0], study.PRIMARY: "0.5"}, *before[1:]]
