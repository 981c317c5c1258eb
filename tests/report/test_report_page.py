"""The report of made-up comparisons: what it says, what it holds, what it must not hold."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mim.errors import UserError
from mim.report import write_report
from mim.report.collect import axis_labels, read_comparison
from mim.report.figures import mean_curve, reconstructions, styles
from mim.report.finding import findings
from mim.report.tables import (
    comparison_table,
    difference_table,
    evaluation_measures,
    margin,
    margin_table,
)

Write = Callable[..., Path]
REGIMES = {"model.regime.name": ["drop", "zero"], "seed": [0, 1, 2]}


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data


def report(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def by_regime(values: dict[str, list[float]]) -> Callable[[dict[str, Any], int], float]:
    return lambda axes, seed: values[axes["model.regime.name"]][seed]


def first_finding(folder: Path) -> str:
    finding = findings(read_comparison(folder))[0]
    return f"{finding.text} {finding.basis}"


def test_page_loads_nothing_and_runs_nothing(fake_comparison: Write) -> None:
    folder = fake_comparison()
    page = report(folder)
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "embed")
        for name in ("src", "href", "srcset", "poster", "action"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
    content = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"@import|url\(|https?://", content)


def test_every_picture_has_words(fake_comparison: Write) -> None:
    pictures = [attributes for tag, attributes in report(fake_comparison()).tags if tag == "img"]
    # 6 images x (original, masked, 3 x 2), 2 evaluations x 2 costs, 2 losses.
    assert len(pictures) == 6 * 8 + 4 + 2
    assert all(len(picture["alt"]) > 10 for picture in pictures)
    assert any("zero ends at" in picture["alt"] for picture in pictures)


def test_hostile_names_are_text(fake_comparison: Write) -> None:
    evil = '<img src="http://x.test/a.png" onerror=alert(1)>'
    folder = fake_comparison(
        name="<script>alert(1)</script>",
        axes={"model.regime.name": [evil, "_$\\frac{$", "a|b"], "seed": [0, 1]},
        failed=("regime=a|b,seed=1",),
        error=evil,
        command=f"mim compare {evil} ```",
    )
    page = report(folder)
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert all(
        attributes["src"].startswith("data:") for tag, attributes in page.tags if tag == "img"
    )
    assert "<script>alert(1)</script>" in page.text and evil in page.text
    text = (folder / "report.md").read_text(encoding="utf-8")
    outside_code = text.split("````")[0]
    assert "<script>" not in re.sub(r"\\<", "", outside_code)
    assert r"a\|b" in outside_code
    with (folder / "results.csv").open(newline="") as file:
        assert next(csv.DictReader(file))["model.regime.name"] == evil


def test_interval_that_leaves_out_zero_names_who_is_ahead(fake_comparison: Write) -> None:
    values = {"drop": [0.90, 0.91, 0.92], "zero": [0.93, 0.942, 0.95]}
    folder = fake_comparison(axes=REGIMES, linear=by_regime(values))
    text = first_finding(folder)
    # Differences 3.0, 3.2, 3.0 points: mean 3.067, sd 0.11547, half 4.302653 * sd / sqrt(3).
    assert text.startswith("zero is ahead with 94.1")
    assert "drop (+3.1 points, 2.8 to 3.4)" in text and "n\u00a0=\u00a03" in text
    assert "no difference shown" not in text.lower()


def test_interval_that_contains_zero_shows_no_difference(fake_comparison: Write) -> None:
    values = {"drop": [0.90, 0.95, 0.92], "zero": [0.94, 0.93, 0.95]}
    text = first_finding(fake_comparison(axes=REGIMES, linear=by_regime(values)))
    assert text.startswith("No difference shown between zero")
    assert "ahead" not in text


def test_one_seed_shows_no_difference(fake_comparison: Write) -> None:
    axes = {"model.regime.name": ["drop", "zero"], "seed": [0]}
    values = {"drop": [0.5], "zero": [0.99]}
    folder = fake_comparison(axes=axes, linear=by_regime(values))
    text = first_finding(folder)
    assert text.startswith("No difference shown between zero") and "n = 1" in text
    assert "beat" not in text
    table = difference_table(read_comparison(folder))
    assert table is not None
    assert [cell.note for cell in table.rows[0].cells[1:]] == ["n = 1"] * 5
    assert not any(cell.strong for cell in table.rows[0].cells)
    assert "±" not in comparison_table(read_comparison(folder)).rows[0].cells[4].text


def test_lower_loss_is_ahead(fake_comparison: Write) -> None:
    texts = {item.title: item.text for item in findings(read_comparison(fake_comparison()))}
    assert texts["Held-out loss"].startswith("drop is ahead")
    assert texts["Cost"].startswith("drop takes the least training FLOPs; zero 2.29 times")


def test_references_are_beaten_or_not(fake_comparison: Write) -> None:
    # Untrained reaches 0.76, 0.764, 0.768; raw pixels 0.872.
    values = {"drop": [0.860, 0.861, 0.862], "zero": [0.76, 0.77, 0.76]}
    folder = fake_comparison(axes=REGIMES, linear=by_regime(values))
    text = first_finding(folder)
    assert "Shown to beat its untrained self: drop (+9.7 points" in text
    assert "no difference shown from its untrained self: zero" in text
    assert "Shown to fall short of raw pixels: drop (\u22121.1 points" in text


def test_raw_pixels_are_compared_with_every_seed(fake_comparison: Write) -> None:
    values = {"drop": [0.882, 0.892, 0.902], "zero": [0.9, 0.9, 0.9]}
    comparison = read_comparison(fake_comparison(axes=REGIMES, linear=by_regime(values)))
    measure = evaluation_measures(comparison)[0]
    paired = margin(comparison, comparison.groups[0], "pixels", measure)
    assert paired is not None and paired.n == 3
    assert paired.mean == pytest.approx(0.02)


def test_table_holds_mean_spread_and_references(fake_comparison: Write) -> None:
    values = {"drop": [0.90, 0.92, 0.91], "zero": [0.9, 0.9, 0.9]}
    table = comparison_table(
        read_comparison(fake_comparison(axes=REGIMES, linear=by_regime(values)))
    )
    heads = [(column.section, column.label) for column in table.columns]
    rows = {row.cells[0].text: [cell.text for cell in row.cells] for row in table.rows}
    assert list(rows) == ["drop", "zero", "untrained encoder", "raw pixels"]
    linear = heads.index(("Linear probe", "accuracy (%)"))
    assert rows["drop"][linear] == "91.0\u00a0±\u00a01.0"
    assert rows["raw pixels"][linear] == "87.2"
    assert rows["drop"][1] == "3" and rows["raw pixels"][1] == "1"
    assert rows["drop"][heads.index(("On this machine", "peak memory (MiB)"))] == "\u2013"
    assert rows["drop"][heads.index(("Per image", "forward GFLOPs"))] == "0.0224"
    assert rows["untrained encoder"][heads.index(("Per image", "forward GFLOPs"))] == "\u2013"


def test_failed_runs_are_shown_and_not_averaged(fake_comparison: Write) -> None:
    values = {"drop": [0.90, 0.92, 0.91], "zero": [0.9, 0.9, 0.9]}
    folder = fake_comparison(
        axes=REGIMES, failed=("regime=drop,seed=1",), linear=by_regime(values), error="it blew up"
    )
    row = comparison_table(read_comparison(folder)).rows[0]
    assert row.cells[1].text == "2 of 3"
    assert row.cells[4].text.startswith("90.5")
    page = report(folder)
    assert "it blew up" in page.text and "regime=drop,seed=1" in page.text
    assert "it blew up" in (folder / "report.md").read_text(encoding="utf-8")


def test_all_runs_failed_or_missing(fake_comparison: Write) -> None:
    folder = fake_comparison(axes={"seed": [0, 1]}, failed=("seed=0",))
    (folder / "seed=1" / "result.json").unlink()
    text = report(folder).text
    assert "No run of this comparison has finished." in text
    assert "no result.json" in text


def test_csv_columns_and_rows(fake_comparison: Write) -> None:
    folder = fake_comparison(failed=("regime=zero,seed=2",))
    write_report(folder)
    with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    columns = list(reader.fieldnames or [])
    assert columns[:6] == ["run", "model.regime.name", "seed", "kind", "train_loss", "val_loss"]
    assert columns[6:10] == [
        "linear.accuracy",
        "linear.accuracy_10_per_class",
        "linear.accuracy_10_per_class_std",
        "knn.accuracy",
    ]
    assert len(columns) == len(set(columns))
    assert [row["kind"] for row in rows] == ["run"] * 9 + ["untrained"] * 3 + ["pixels"]
    stored = json.loads((folder / "regime=zero,seed=1" / "result.json").read_text())
    row = next(row for row in rows if row["run"] == "regime=zero,seed=1")
    assert float(row["linear.accuracy"]) == stored["evaluations"]["linear"]["accuracy"]
    assert row["peak_memory_bytes"] == ""
    # 64 images a step, 1400 steps.
    flops = stored["flops_forward"] + stored["flops_backward"]
    assert float(row["train_flops"]) == flops * 64 * 1400
    failed = next(row for row in rows if row["run"] == "regime=zero,seed=2")
    assert failed["status"] == "failed" and failed["linear.accuracy"] == ""


def test_pairs_differ_in_one_axis(fake_comparison: Write) -> None:
    axes = {"model.regime.name": ["drop", "zero"], "mask.ratio": [0.5, 0.75], "seed": [0, 1]}
    folder = fake_comparison(axes=axes)
    table = difference_table(read_comparison(folder))
    assert table is not None
    names = [(row.cells[0].text, row.cells[0].note) for row in table.rows]
    assert names == [
        ("regime: zero \u2212 drop", "mask ratio 0.5"),
        ("regime: zero \u2212 drop", "mask ratio 0.75"),
        ("mask ratio: 0.75 \u2212 0.5", "regime drop"),
        ("mask ratio: 0.75 \u2212 0.5", "regime zero"),
    ]
    # Losses under other masks do not measure the same thing.
    assert [row.cells[1].note == "not comparable" for row in table.rows] == [False] * 2 + [True] * 2
    assert "drop · mask ratio 0.5" in report(folder).text
    looks = styles(read_comparison(folder))
    assert looks["drop · mask ratio 0.5"].colour == looks["drop · mask ratio 0.75"].colour
    assert looks["drop · mask ratio 0.5"].line != looks["drop · mask ratio 0.75"].line


def test_other_targets_make_losses_incomparable(fake_comparison: Write) -> None:
    axes = {"model.target.name": ["pixels", "normalized_pixels"], "seed": [0, 1]}
    texts = {
        item.title: item.text for item in findings(read_comparison(fake_comparison(axes=axes)))
    }
    assert "not comparable" in texts["Loss"] and "Held-out loss" not in texts


def test_unlabelled_data(fake_comparison: Write) -> None:
    folder = fake_comparison(labelled=False, references=False)
    text = report(folder).text
    assert "No evaluation was run" in text
    assert "untrained encoder" in text and "raw pixels" in text
    assert margin_table(read_comparison(folder)) is None


def test_single_run(fake_comparison: Write) -> None:
    folder = fake_comparison(axes={"seed": [0]})
    text = first_finding(folder)
    assert text.startswith("drop reaches 9") and "(n = 1)" in text
    assert difference_table(read_comparison(folder)) is None
    report(folder)


def test_reconstructions_share_originals_and_masks(fake_comparison: Write) -> None:
    tiles = reconstructions(read_comparison(fake_comparison()))
    assert tiles is not None
    assert tiles.groups[0].columns == ("original", "masked")
    assert [group.label for group in tiles.groups] == ["", "drop", "zero", "token"]
    assert "same images under the same masks; seed 0" in tiles.caption
    assert tiles.rows[0][2].alt == "Image 1, drop, prediction"
    assert tiles.rows[0][2].source != tiles.rows[0][4].source


def test_other_masks_are_shown_by_group(fake_comparison: Write) -> None:
    axes = {"mask.ratio": [0.5, 0.75], "seed": [0]}
    tiles = reconstructions(read_comparison(fake_comparison(axes=axes, channels=3)))
    assert tiles is not None
    assert tiles.groups[0].columns == ("original",)
    assert tiles.groups[1].columns == ("masked", "prediction", "with visible patches")
    assert "same masks" not in tiles.caption


def test_curves_average_common_steps_and_keep_the_later_line(fake_comparison: Write) -> None:
    folder = fake_comparison(axes={"seed": [0, 1]})
    for seed, lines in enumerate(([(1, 4.0), (2, 9.0), (2, 2.0)], [(1, 2.0), (2, 1.0), (3, 7.0)])):
        text = "".join(
            json.dumps({"step": step, "epoch": step / 2, "loss": loss}) + "\n"
            for step, loss in lines
        )
        # A killed writer leaves the beginning of a line.
        (folder / f"seed={seed}" / "metrics.jsonl").write_text(text + '{"step": 4, "ep')
    curve = mean_curve(read_comparison(folder).groups[0], "loss")
    assert curve is not None
    epochs, mean, spread, n = curve
    np.testing.assert_allclose(epochs, [0.5, 1.0])
    np.testing.assert_allclose(mean, [3.0, 1.5])
    assert spread is not None and n == 2
    np.testing.assert_allclose(spread, [np.sqrt(2), np.sqrt(0.5)])


def test_unequal_environments_and_data_are_warned_of(fake_comparison: Write) -> None:
    folder = fake_comparison(metrics=False)
    path = folder / "regime=drop,seed=0" / "result.json"
    result = json.loads(path.read_text())
    assert "Warning" not in report(folder).text
    result["environment"]["device"] = "cuda"
    result["data"]["fingerprint"] = "0"
    path.write_text(json.dumps(result))
    text = report(folder).text
    assert "fingerprints differ" in text and "do not compare their speed" in text
    assert "cuda (1 of 9 runs)" in text


def test_axis_labels() -> None:
    keys = ["model.regime.name", "mask.ratio", "optim.base_lr", "model.regime.zero.at", "seed"]
    assert list(axis_labels(keys).values()) == [
        "regime",
        "mask ratio",
        "base lr",
        "zero at",
        "seed",
    ]
    assert axis_labels(["model.a.name", "other.a.name"])["model.a.name"] == "model.a.name"


def test_bad_folders_are_one_clear_line(fake_comparison: Write, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a comparison folder"):
        write_report(tmp_path)
    folder = fake_comparison(metrics=False)
    path = folder / "regime=drop,seed=0" / "result.json"
    content = path.read_text()
    path.write_text(content[:50])
    with pytest.raises(UserError, match="cannot be read as JSON"):
        write_report(folder)
    path.write_text(content.replace('"format": 1', '"format": 2'))
    with pytest.raises(UserError, match="format: 2"):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_writing_again_gives_the_same_bytes_and_leaves_nothing_else(fake_comparison: Write) -> None:
    folder = fake_comparison()
    names = ("report.html", "report.md", "results.csv")
    before = {path.name for path in folder.iterdir()}
    write_report(folder)
    first = [(folder / name).read_bytes() for name in names]
    write_report(folder)
    assert [(folder / name).read_bytes() for name in names] == first
    assert {path.name for path in folder.iterdir()} == before | set(names)


def test_a_write_that_fails_leaves_the_old_report(
    fake_comparison: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fake_comparison(axes={"seed": [0]}, metrics=False)
    write_report(folder)
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    (folder / "seed=0" / "result.json").unlink()  # the next report would say something else

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError, match="cannot be written"):
        write_report(folder)
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
