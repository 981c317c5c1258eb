"""The report of made-up comparisons: what it says, what it holds, what it must not hold."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import math
import os
import re
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from scipy import stats

from mim.compare.statistics import holm
from mim.core.errors import UserError
from mim.report import write_report
from mim.report.charts import loss_charts, mean_curve, styles
from mim.report.collect import axis_labels, read_comparison
from mim.report.curves import quality_charts
from mim.report.figures import FORMATS
from mim.report.finding import Finding, finding
from mim.report.measures import Measure, evaluation_measures, summarize
from mim.report.page import Report, report_html, report_markdown
from mim.report.statistics import against_references, analyse
from mim.report.tables import (
    Table,
    comparison_table,
    cost_table,
    difference_table,
    latex,
    margin_table,
    markdown,
    results_csv,
    table_csv,
)
from mim.report.tiles import _most_telling, reconstructions, viewer

Write = Callable[..., Path]
REGIMES = {"model.regime.name": ["drop", "zero"], "seed": [0, 1, 2]}


class Page(HTMLParser):
    """Tags with their attributes, the scripts, and the text of the rest."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open = ""
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.scripts: list[tuple[dict[str, str], str]] = []
        self.text = ""
        self.feed(content)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        self.open = tag
        if tag == "script":
            self.scripts.append((self.tags[-1][1], ""))

    def handle_endtag(self, tag: str) -> None:
        self.open = ""

    def handle_data(self, data: str) -> None:
        if self.open == "script":
            attributes, before = self.scripts[-1]
            self.scripts[-1] = (attributes, before + data)
        elif self.open != "style":
            self.text += data


@pytest.fixture(autouse=True)
def without_plotly(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most tests need no 5 MB of script on each page."""
    if "plotly" not in request.node.name:
        monkeypatch.setattr("mim.report.interactive.plotly_script", lambda: "")


def html_of(folder: Path, live: bool = False) -> str:
    return report_html(Report(read_comparison(folder)), live=live)


def report(folder: Path) -> Page:
    return Page(html_of(folder))


def by_regime(values: dict[str, list[float]]) -> Callable[[dict[str, Any], int], float]:
    return lambda axes, seed: values[axes["model.regime.name"]][seed]


def table_of(make: Callable[..., Table], folder: Path) -> Table:
    comparison = read_comparison(folder)
    return make(comparison, analyse(comparison))


def finding_of(folder: Path) -> Finding:
    comparison = read_comparison(folder)
    return finding(comparison, analyse(comparison))


def text_of(found: Finding) -> str:
    return " ".join([found.sentence, found.basis, *found.more])


def test_page_loads_nothing_and_runs_only_its_own_scripts(fake_comparison: Write) -> None:
    folder = fake_comparison()
    content = html_of(folder)
    page = Page(content)
    for tag, attributes in page.tags:
        assert tag not in ("iframe", "object", "embed", "base", "form")
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "srcset", "poster", "action"):
            assert attributes.get(name, "#").startswith(("data:", "#")), (tag, attributes)
    assert not re.search(r"@import|url\(|https?://", content)
    (policy,) = (tag["content"] for _, tag in page.tags if "http-equiv" in tag)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "connect-src" not in policy and "*" not in policy, "only a live page asks its server"
    live = html_of(folder, live=True)
    assert "; connect-src 'self'; " in live.replace("&#39;", "'")
    runs = [text for attributes, text in page.scripts if attributes.get("type") is None]
    assert len(runs) == 1
    for text in runs:
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy


def test_plotly_stands_inside_the_page_and_is_named_by_its_hash(fake_comparison: Write) -> None:
    pytest.importorskip("plotly")
    content = html_of(fake_comparison(axes={"seed": [0]}))
    page = Page(content)
    policy = next(tag["content"] for _, tag in page.tags if "http-equiv" in tag)
    runs = [text for attributes, text in page.scripts if attributes.get("type") is None]
    assert len(runs) == 2 and "Plotly" in runs[0]
    for text in runs:
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy


def test_every_picture_has_words(fake_comparison: Write) -> None:
    pictures = [attributes for tag, attributes in report(fake_comparison()).tags if tag == "img"]
    # 6 images x (original, masked, 3 x 2), 2 evaluations x 2 costs, 2 losses; differences by 3
    # qualities and 2 losses.
    assert len(pictures) == 6 * 8 + 4 + 2 + 5
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
    write_report(folder)
    assert [attributes.get("type") for attributes, _ in page.scripts] == ["application/json", None]
    assert "<" not in page.scripts[0][1]
    charts = json.loads(page.scripts[0][1])["charts"]
    assert charts["training_loss"]["data"][1]["name"] == evil.replace("<", "&lt;").replace(
        ">", "&gt;"
    )
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


def test_interval_that_leaves_out_zero_names_who_is_better(fake_comparison: Write) -> None:
    values = {"drop": [0.90, 0.91, 0.92], "zero": [0.93, 0.942, 0.95]}
    found = finding_of(fake_comparison(axes=REGIMES, linear=by_regime(values)))
    # Differences 3.0, 3.2, 3.0 points: mean 3.067, sd 0.11547, half 4.302653 * sd / sqrt(3).
    assert found.sentence == (
        "By linear probe accuracy, zero (94.1\u00a0±\u00a01.0\u00a0%) is better than drop "
        "(+3.1 points, 2.8 to 3.4)."
    )
    assert "n\u00a0=\u00a03 seeds" in found.basis


def test_interval_that_contains_zero_is_undecided_and_says_what_would_decide(
    fake_comparison: Write,
) -> None:
    values = {"drop": [0.90, 0.95, 0.92], "zero": [0.94, 0.93, 0.95]}
    folder = fake_comparison(axes=REGIMES, linear=by_regime(values))
    found = finding_of(folder)
    # Differences 4, -2, 3 points: sd 3.2146, error 1.8559. With two degrees of freedom the
    # noncentral t passes 4.302653 in 80 % of cases for a shift of 6.6.
    (verdict,) = analyse(read_comparison(folder))[0].verdicts
    assert verdict.smallest is not None
    assert "it is undecided whether zero" in found.sentence and "better" not in found.sentence
    smallest = float(re.findall(r"3 seeds show ([\d.]+) points", found.sentence)[0])
    error = 0.018559
    power = stats.nct.sf(4.302653, 2, verdict.smallest / error)
    assert power == pytest.approx(0.8, abs=0.002)
    assert smallest == pytest.approx(100 * verdict.smallest, abs=0.05)
    more = int(re.findall(r"about (\d+) more", found.sentence)[0])
    assert verdict.needed == 3 + more


def test_groups_that_are_close_are_as_good_as_each_other(fake_comparison: Write) -> None:
    values = {"drop": [0.900, 0.912, 0.905], "zero": [0.901, 0.911, 0.906]}
    folder = fake_comparison(axes=REGIMES, linear=by_regime(values))
    assert "is as good as, within 1 point, drop (+0.0 points" in finding_of(folder).sentence
    path = folder / "comparison.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"margin": 0.05}))
    assert "undecided" in finding_of(folder).sentence


def test_sentence_and_table_judge_a_pair_alike(fake_comparison: Write) -> None:
    """Of three pairs one is as good by its own p-value of equality, and not by Holm's."""
    noise = 0.00306 * np.array([[1, -1, 0], [-1, 0, 1], [0, 1, -1]]) / math.sqrt(6 / 4)
    means = {"drop": 0.80, "zero": 0.80, "token": 0.80 - 0.00385}
    shift = np.array([0.01, -0.02, 0.03])
    values = {name: list(m + shift + e) for (name, m), e in zip(means.items(), noise, strict=True)}
    axes = {**REGIMES, "model.regime.name": list(means)}
    folder = fake_comparison(axes=axes, linear=by_regime(values))
    first = analyse(read_comparison(folder))[0]
    kinds = {frozenset(verdict.key): verdict.kind for verdict in first.verdicts}
    assert all(kinds[frozenset(verdict.key)] == verdict.kind for verdict in first.best)
    assert kinds[frozenset(("drop", "token"))] == "undecided"
    p_values = [v.found.p_equal(0.01) for v in first.verdicts]
    assert [v.p_equal for v in first.verdicts] == pytest.approx(holm(p_values))
    assert p_values[1] < 0.05 < holm(p_values)[1]


def test_few_shot_draws_are_part_of_what_pre_training_is_worth(fake_comparison: Write) -> None:
    """Draws that differ by 10 points make one of 3 points uncertain, whatever the seeds say."""
    values = {"drop": [0.79, 0.796, 0.799], "zero": [0.76, 0.77, 0.76]}
    folder = fake_comparison(axes=REGIMES, linear=by_regime(values))
    reach = []
    for spread in (0, 30):
        for run in sorted(folder.glob("*/result.json")):
            right = round(100 * json.loads(run.read_text())["evaluations"]["linear"]["accuracy"])
            own = spread * (1 if "drop" in run.parent.name else -1)
            rows = [np.arange(100) < right + d * own for d in (-1, 0, 1)]
            arrays = {"linear/sample_ids": np.arange(100), "linear/accuracy": np.stack(rows)}
            np.savez(run.with_name("predictions.npz"), **arrays)
        comparison = read_comparison(folder)
        (_, found), _ = against_references(comparison, analyse(comparison)[0], "untrained")
        assert found is not None and found.high is not None
        reach.append(found.high - found.mean)
    assert reach[1] > 3 * reach[0]


def test_one_seed_shows_no_difference(fake_comparison: Write) -> None:
    axes = {"model.regime.name": ["drop", "zero"], "seed": [0]}
    values = {"drop": [0.5], "zero": [0.99]}
    folder = fake_comparison(axes=axes, linear=by_regime(values))
    text = text_of(finding_of(folder))
    assert "zero (99.0\u00a0%) has the highest mean; 1 seed gives no interval" in text
    assert "better" not in text
    table = table_of(difference_table, folder)
    assert [cell.note for cell in table.rows[0].cells[1:]] == ["n = 1, no interval"] * 5
    assert not any(cell.strong for cell in table.rows[0].cells)
    assert "±" not in table_of(comparison_table, folder).rows[0].cells[2].text


def test_equal_means_are_shared(fake_comparison: Write) -> None:
    values = {"drop": [0.31, 0.31], "zero": [0.28, 0.34]}
    axes = {"model.regime.name": ["drop", "zero"], "seed": [0, 1]}
    text = finding_of(fake_comparison(axes=axes, linear=by_regime(values))).sentence
    assert "shares the highest mean; 2 seeds give no interval" in text


def test_references_are_beaten_or_not(fake_comparison: Write) -> None:
    # Untrained reaches 0.76, 0.764, 0.768; raw pixels 0.872.
    values = {"drop": [0.860, 0.861, 0.862], "zero": [0.76, 0.77, 0.76]}
    folder = fake_comparison(axes=REGIMES, linear=by_regime(values))
    text = text_of(finding_of(folder))
    assert "1 of 2 encoders are shown to beat their untrained selves; no difference" in text
    assert "0 of 2 encoders are shown to beat raw pixels, 2 to fall short of it." in text


def test_raw_pixels_are_compared_with_every_seed(fake_comparison: Write) -> None:
    values = {"drop": [0.882, 0.892, 0.902], "zero": [0.9, 0.9, 0.9]}
    comparison = read_comparison(fake_comparison(axes=REGIMES, linear=by_regime(values)))
    (_, paired), _ = against_references(comparison, analyse(comparison)[0], "pixels")
    assert paired is not None and paired.n == 3
    assert paired.mean == pytest.approx(0.02)


def test_table_holds_mean_spread_and_references(fake_comparison: Write) -> None:
    values = {"drop": [0.90, 0.92, 0.91], "zero": [0.9, 0.9, 0.9]}
    folder = fake_comparison(axes=REGIMES, linear=by_regime(values))
    table = table_of(comparison_table, folder)
    heads = [(column.section, column.label) for column in table.columns]
    rows = {row.cells[0].text: [cell.text for cell in row.cells] for row in table.rows}
    assert list(rows) == ["drop", "zero", "untrained encoder", "raw pixels"]
    linear = heads.index(("Linear probe", "accuracy (%)"))
    assert rows["drop"][linear] == "91.0\u00a0±\u00a01.0"
    assert rows["raw pixels"][linear] == "87.2"
    assert rows["drop"][1] == "3" and rows["raw pixels"][1] == "1"
    table = table_of(cost_table, folder)
    heads = [(column.section, column.label) for column in table.columns]
    rows = {row.cells[0].text: [cell.text for cell in row.cells] for row in table.rows}
    assert list(rows) == ["drop", "zero"], "references cost nothing"
    assert rows["drop"][heads.index(("On this machine", "peak memory (MiB)"))] == "\u2013"
    assert rows["drop"][heads.index(("Per image", "forward GFLOPs"))] == "0.0224"


def test_failed_runs_are_shown_and_not_averaged(fake_comparison: Write) -> None:
    values = {"drop": [0.90, 0.92, 0.91], "zero": [0.9, 0.9, 0.9]}
    folder = fake_comparison(
        axes=REGIMES, failed=("regime=drop,seed=1",), linear=by_regime(values), error="it blew up"
    )
    row = table_of(comparison_table, folder).rows[0]
    assert row.cells[1].text == "2 of 3"
    assert row.cells[2].text.startswith("90.5")
    page = report(folder)
    write_report(folder)
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
    table = table_of(difference_table, folder)
    assert [row.cells[0].text for row in table.rows] == [
        "zero \u2212 drop (mask ratio 0.5)",
        "zero \u2212 drop (mask ratio 0.75)",
        "mask ratio 0.75 \u2212 0.5 (regime drop)",
        "mask ratio 0.75 \u2212 0.5 (regime zero)",
    ]
    # Losses under other masks do not measure the same thing.
    assert [row.cells[-1].text == "\u2013" for row in table.rows] == [False] * 2 + [True] * 2
    assert "drop · mask ratio 0.5" in report(folder).text
    looks = styles(read_comparison(folder))
    assert looks["drop · mask ratio 0.5"].colour == looks["drop · mask ratio 0.75"].colour
    assert looks["drop · mask ratio 0.5"].line != looks["drop · mask ratio 0.75"].line


def test_other_targets_make_losses_incomparable(fake_comparison: Write) -> None:
    axes = {"model.target.name": ["pixels", "normalized_pixels"], "seed": [0, 1, 2]}
    comparison = read_comparison(fake_comparison(axes=axes))
    assert not any(each.measure.section == "Loss" for each in analyse(comparison))
    assert not any(
        cell.strong
        for row in cost_table(comparison, analyse(comparison)).rows
        for cell in row.cells
    )


def test_unlabelled_data(fake_comparison: Write) -> None:
    folder = fake_comparison(labelled=False, references=False)
    text = report(folder).text
    assert "No evaluation was run" in text
    assert "untrained encoder" in text and "raw pixels" in text
    assert not table_of(margin_table, folder).rows


def test_single_run(fake_comparison: Write) -> None:
    folder = fake_comparison(axes={"seed": [0]})
    text = finding_of(folder).sentence
    assert text.startswith("By linear probe accuracy: drop 9") and "nothing to compare" in text
    assert not table_of(difference_table, folder).rows
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


def test_many_encoders_stand_in_bands(fake_comparison: Write) -> None:
    axes = {"model.regime.name": [f"r{number}" for number in range(7)], "seed": [0]}
    folder = fake_comparison(axes=axes)
    tiles = reconstructions(read_comparison(folder))
    assert tiles is not None
    labels = [[group.label for group in band.groups] for band in tiles.bands]
    assert labels == [["", "r0", "r1", "r2"], ["", "r3", "r4", "r5"], ["", "r6"]]
    for band in tiles.bands:
        assert [row[:2] for row in band.rows] == [row[:2] for row in tiles.rows], "the shared ones"
    own = [sum((band.rows[0][2:] for band in tiles.bands), ())]
    assert own == [tiles.rows[0][2:]], "each once, in their order"
    assert [name for name, tag in report(folder).tags if tag.get("class") == "tiles"] == [
        "table"
    ] * 3


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
    path = folder / "comparison.json"
    content = path.read_text()
    path.write_text(content[:50])
    with pytest.raises(UserError, match="cannot be read as JSON"):
        write_report(folder)
    path.write_text(content.replace('"format": 1', '"format": 2'))
    with pytest.raises(UserError, match="format: 2"):
        write_report(folder)
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize("damaged", [b"\xff\xfe\x00\n", b"[1]\n"])
def test_damaged_metrics_are_one_clear_line(fake_comparison: Write, damaged: bytes) -> None:
    folder = fake_comparison(axes={"seed": [0]})
    (folder / "seed=0" / "metrics.jsonl").write_bytes(damaged)
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 1 is not JSON"):
        write_report(folder)


ODD = {
    "torn": ('{"format": 1, "status": "fini', "cannot be read"),
    "empty": ("", "cannot be read"),
    "a list": ("[1]", "JSON object"),
    "of a later version": ('{"format": 2, "status": "finished"}', "format: 2"),
    "no mapping": ('{"format": 1, "status": "finished", "evaluations": {"knn": 3}}', "writes"),
    "of no kind": ('{"format": 1, "status": "finished", "kind": "x"}', "kind: 'x'"),
    "no seed": ('{"format": 1, "status": "finished", "seed": [1]}', "writes"),
}


@pytest.mark.parametrize("odd", ODD)
def test_one_run_that_cannot_be_read_is_a_line_of_the_report(
    odd: str, fake_comparison: Write
) -> None:
    folder = fake_comparison(axes={"seed": [0, 1, 2]}, metrics=False)
    content, said = ODD[odd]
    (folder / "seed=0" / "result.json").write_text(content)
    write_report(folder)
    (line,) = [t for t in (folder / "report.md").read_text().splitlines() if "unreadable" in t]
    assert "seed=0" in line and said in line


def test_evaluations_of_a_run_that_goes_on_do_not_make_it_finished(fake_comparison: Write) -> None:
    folder = fake_comparison(axes={"seed": [0, 1]}, metrics=False)
    numbers = {"evaluations": {"knn": {"accuracy": 0.5}}}
    for content in (numbers, numbers | {"format": 1, "status": "unfinished"}):
        (folder / "seed=0" / "result.json").write_text(json.dumps({"format": 1} | content))
        (run,) = [run for run in read_comparison(folder).runs if run.name == "seed=0"]
        assert run.status == "waiting" and not run.finished
        assert run.measures == {"knn.accuracy": 0.5}


def test_writing_again_gives_the_same_bytes_and_leaves_nothing_else(
    fake_comparison: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mim.report.figures.FORMATS", FORMATS)
    axes = {"model.regime.name": ["drop", "zero"], "seed": [0]}
    folder = fake_comparison(axes=axes)
    before = {path for path in folder.rglob("*") if path.is_file()}
    write_report(folder)
    new = sorted({path for path in folder.rglob("*") if path.is_file()} - before)
    first = [path.read_bytes() for path in new]
    write_report(folder)
    assert [path.read_bytes() for path in new] == first
    assert {path for path in folder.rglob("*") if path.is_file()} == before | set(new)
    names = [path.relative_to(folder).as_posix() for path in new]
    charts = [
        "forest_knn_accuracy",
        "forest_linear_accuracy",
        "forest_linear_accuracy_10_per_class",
        "forest_train_loss",
        "forest_val_loss",
        "held_out_loss",
        "knn_accuracy_against_train_flops",
        "knn_accuracy_against_wall_seconds",
        "linear_accuracy_against_train_flops",
        "linear_accuracy_against_wall_seconds",
        "training_loss",
    ]
    tables = ["cost", "differences", "facts", "margins", "recipes", "results", "settings"]
    expected = [f"figures/{name}.{form}" for name in charts for form in ("pdf", "png", "svg")]
    expected += ["report.html", "report.md", "results.csv"]
    expected += [f"tables/{name}.{form}" for name in tables for form in ("csv", "md", "tex")]
    assert names == expected


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


def bold(folder: Path, column: tuple[str, str] = ("Linear probe", "accuracy (%)")) -> list[str]:
    table = table_of(comparison_table, folder)
    place = [(head.section, head.label) for head in table.columns].index(column)
    return [row.cells[0].text for row in table.rows if row.cells[place].strong]


def test_bold_only_where_every_interval_supports_it(fake_comparison: Write, tmp_path: Path) -> None:
    # Raw pixels reach 87.2, the untrained encoders 76.0 to 76.8.
    ahead = {"drop": [0.90, 0.91, 0.92], "zero": [0.93, 0.942, 0.95]}
    overlap = {"drop": [0.90, 0.95, 0.92], "zero": [0.94, 0.93, 0.95]}
    below = {"drop": [0.80, 0.81, 0.82], "zero": [0.83, 0.842, 0.85]}
    for name, values, expected in (
        ("ahead", ahead, ["zero"]),
        ("overlap", overlap, []),
        ("below", below, []),  # raw pixels are ahead of both
    ):
        folder = fake_comparison(axes=REGIMES, linear=by_regime(values), folder=tmp_path / name)
        assert bold(folder) == expected, name
    one = {"model.regime.name": ["drop", "zero"], "seed": [0]}
    folder = fake_comparison(axes=one, linear=by_regime(ahead), folder=tmp_path / "one")
    assert bold(folder) == [], "one seed gives no interval"
    # Less is better: drop's held-out loss is the lowest, by the same amount in each seed.
    costs = table_of(cost_table, tmp_path / "ahead")
    place = [column.label for column in costs.columns].index("held-out loss")
    assert [row.cells[0].text for row in costs.rows if row.cells[place].strong] == ["drop"]


def test_cells_carry_what_they_are_sorted_by(fake_comparison: Write) -> None:
    values = {"drop": [0.90, 0.92, 0.91], "zero": [0.9, 0.9, 0.9]}
    table = table_of(comparison_table, fake_comparison(axes=REGIMES, linear=by_regime(values)))
    place = [column.section for column in table.columns].index("Linear probe")
    means = [row.cells[place].value for row in table.rows]
    assert means == pytest.approx([0.91, 0.9, 0.764, 0.872])


def test_exports_hold_the_same_cells(fake_comparison: Write) -> None:
    evil = "a&b_50%{x}~^\\#$|`"
    axes = {"model.regime.name": ["drop", evil], "seed": [0, 1, 2]}
    table = table_of(comparison_table, fake_comparison(axes=axes))
    rows = list(csv.reader(io.StringIO(table_csv(table))))
    assert rows[0][:3] == ["Encoder", "n", "Linear probe: accuracy (%)"]
    assert [row[0] for row in rows[1:]] == ["drop", evil, "untrained encoder", "raw pixels"]
    text = latex(table)
    assert (
        r"a\&b\_50\%\{x\}\textasciitilde{}\textasciicircum{}\textbackslash{}\#\$\textbar{}"
        r"\textasciigrave{} & 3 &"
    ) in text
    assert r"$\pm$" in text and "\u00b1" not in text and "\u2212" not in text
    body = text[text.index("\\toprule") :]
    lines = [line for line in body.splitlines() if line.endswith("\\\\")]
    spans = [int(n) - 1 for n in re.findall(r"multicolumn{(\d+)}", lines[0])]
    # Each row has as many cells as there are columns.
    assert len(re.findall(r"(?<!\\)&", lines[0])) + sum(spans) == len(table.columns) - 1
    for line in lines[1:]:
        assert len(re.findall(r"(?<!\\)&", line)) == len(table.columns) - 1, line
    assert len(markdown(table).splitlines()) == len(table.rows) + 2


def test_page_offers_the_exports(fake_comparison: Write) -> None:
    page = report(fake_comparison())
    files = {tag["download"]: tag["href"] for _, tag in page.tags if "download" in tag}
    assert {"results.tex", "results.csv", "results.md", "differences.tex"} <= set(files)
    content = base64.b64decode(files["results.md"].partition(",")[2]).decode()
    assert content.startswith("| Encoder | n |")


def ratio_file(run: Path, ratios: tuple[float, ...]) -> dict[str, np.ndarray]:
    """More predictions, as a run leaves them: a flat gray of its own for each ratio."""
    with np.load(run / "reconstructions.npz") as file:
        shape, grid = file["prediction"].shape, file["is_masked"].shape
    arrays = {
        "ratio": np.array(ratios),
        "prediction": np.stack([np.full(shape, round(200 * ratio), np.uint8) for ratio in ratios]),
        "is_masked": np.stack(
            [np.arange(np.prod(grid)).reshape(grid) % 100 < 100 * ratio for ratio in ratios]
        ),
    }
    np.savez(run / "reconstructions_ratios.npz", **arrays)
    return arrays


def test_viewer_holds_every_ratio_of_every_group(fake_comparison: Write) -> None:
    folder = fake_comparison(channels=3)
    runs = [folder / f"regime={name},seed=0" for name in ("drop", "zero")]
    for run in runs:
        arrays = ratio_file(run, (0.25, 0.5))
    shown = viewer(read_comparison(folder))
    assert shown is not None
    # 37 of 49 patches are hidden in training.
    assert shown["ratios"] == [0.25, 0.5, 0.76] and shown["start"] == 2
    drop, _, token = shown["groups"]
    assert [group["label"] for group in shown["groups"]] == ["drop", "zero", "token"]
    assert drop["row"] == [0, 1, 2] and token["row"] == [None, None, 0]
    assert token["mask"][:2] == [None, None] and drop["mask"][2] == token["mask"][2]
    sheet = Image.open(io.BytesIO(base64.b64decode(drop["sheet"].partition(",")[2])))
    assert sheet.size == (28 * shown["count"], 28 * 3)
    with np.load(runs[0] / "reconstructions.npz") as file:
        own = file["prediction"]
    pixels = np.asarray(sheet)
    assert (pixels[:28] == 50).all() and (pixels[28:56] == 100).all()
    np.testing.assert_array_equal(pixels[56:, 28:56], own[1])
    for image in range(shown["count"]):
        text = shown["masks"][drop["mask"][1][image]]
        assert text == "".join("01"[int(bit)] for bit in arrays["is_masked"][1, image].ravel())


def test_the_viewer_begins_with_an_image_on_which_something_is_seen() -> None:
    rng = np.random.default_rng(0)
    images = np.full((4, 32, 32, 3), 128, np.uint8)
    images[1] = rng.integers(0, 256, images[1].shape)  # noise
    images[2, :, 16:] = (250, 200, 20)
    images[3] = np.linspace(118, 138, 32).astype(np.uint8)[:, None]
    assert _most_telling(images) == 2


def test_viewer_needs_the_same_images(fake_comparison: Write) -> None:
    folder = fake_comparison()
    path = folder / "regime=zero,seed=0" / "reconstructions.npz"
    with np.load(path) as file:
        arrays = {key: file[key] for key in file}
    np.savez(path, **arrays | {"original": arrays["original"][::-1]})
    assert viewer(read_comparison(folder)) is None
    assert reconstructions(read_comparison(folder)) is not None


def test_thirty_runs_of_large_images_stay_below_ten_megabytes_with_plotly(
    fake_comparison: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = {"mask.ratio": [round(0.5 + 0.01 * place, 2) for place in range(30)], "seed": [0]}
    folder = fake_comparison(axes=axes, metrics=False)
    rng = np.random.default_rng(0)
    # Noise over a gradient: harder to compress than photographs.
    image = np.linspace(0, 160, 224)[None, :, None] + rng.normal(40, 12, (224, 224, 3))
    image = image.clip(0, 255).astype(np.uint8)
    arrays = dict.fromkeys(("original", "masked", "prediction", "composite"), np.stack([image] * 8))
    is_masked = rng.random((8, 14, 14)) < 0.75
    for run in folder.iterdir():
        if run.name.startswith("mask"):
            np.savez(run / "reconstructions.npz", **arrays, is_masked=is_masked)
            more = {"prediction": np.stack([arrays["prediction"]] * 4)}
            more |= {"ratio": np.array([0.25, 0.5, 0.7, 0.9])}
            more |= {"is_masked": rng.random((4, 8, 14, 14)) < 0.5}
            np.savez(run / "reconstructions_ratios.npz", **more)
    page = html_of(folder)
    assert "data:image/jpeg" in page
    assert 4e6 < len(page.encode()) < 10e6


def test_runs_on_their_way_are_told_from_waiting_and_stopped_ones(fake_comparison: Write) -> None:
    folder = fake_comparison(axes=REGIMES)
    names = [f"regime={regime},seed={seed}" for regime in ("drop", "zero") for seed in range(3)]
    path = folder / "comparison.json"
    content = json.loads(path.read_text())
    content["planned"] = [
        {"folder": name, "kind": "run", "seed": int(name[-1]),
         "axes": {"model.regime.name": name[7:11], "seed": int(name[-1])}}
        for name in names
    ]  # fmt: skip
    path.write_text(json.dumps(content))
    running, stopped, waiting = (folder / name for name in names[3:])
    for run in (running, stopped, waiting):
        (run / "result.json").unlink()
        config = {"train": {"epochs": 20, "max_steps": None}, "data": {"batch_size": 64}}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        lines = (run / "metrics.jsonl").read_text().splitlines()[:75]  # 70 and 5 held-out
        lines[73] = json.dumps(json.loads(lines[73]) | {"images_per_second": 640.0})
        (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 9')
    (waiting / "config.yaml").unlink()
    (waiting / "metrics.jsonl").unlink()
    old = time.time() - 3600
    for name in ("config.yaml", "metrics.jsonl"):
        os.utime(stopped / name, (old, old))
    runs = {run.name: run for run in read_comparison(folder).runs}
    states = [runs[name].status for name in names]
    assert states == ["finished"] * 3 + ["running", "stopped", "waiting"]
    progress = runs[names[3]].progress
    assert progress is not None
    # 70 steps an epoch, 20 epochs; 640 images a second are 10 steps of 64.
    assert (progress.step, progress.total) == (700, 1400)
    assert progress.seconds_left == pytest.approx(70)
    assert runs[names[3]].error == "at step 700 of 1400, 1:10 left"
    rows = table_of(comparison_table, folder).rows
    assert [row.cells[1].text for row in rows[:2]] == ["3", "0 of 3"]
    page = report(folder)
    assert "at step 700 of 1400, 1:10 left" in page.text
    assert "nothing written for 10 minutes" in page.text
    # While no run of a group has finished, its curves are of those on their way.
    (chart, _) = loss_charts(read_comparison(folder))
    assert [line.label for line in chart.lines] == ["drop", "zero"]


def test_figures_of_runs_are_shown_while_there_is_room(
    fake_comparison: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fake_comparison(axes={"seed": [0, 1]}, metrics=False)
    places = {
        "seed=1/figures/head_distance.png": "blue",
        "seed=0/attention.png": "red",
        "seed=0/analysis/layers.png": "green",
        "seed=0/pictures/segment.png": "black",
        "seed=0/pictures/detect.png": "white",
        "seed=0/pictures/step_00000100.png": "gray",  # the viewer shows those
    }
    for name, colour in places.items():
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), colour).save(folder / name)
    tags = [tag for name, tag in report(folder).tags if name == "img"][-5:]
    assert [tag["alt"] for tag in tags] == [
        "Figure of the run seed=0: what its tokens attend to",
        "Figure of the run seed=0: what each layer holds",
        "Figure of the run seed=0: segmentation",
        "Figure of the run seed=0: detection",
        "Figure of the run seed=1: head distance",
    ]
    for tag, colour in zip(
        tags, [(255, 0, 0), (0, 128, 0), 0, (255,) * 3, (0, 0, 255)], strict=True
    ):
        head, _, content = tag["src"].partition(",")
        with Image.open(io.BytesIO(base64.b64decode(content))) as picture:
            assert head == f"data:image/{str(picture.format).lower()};base64"
            seen = np.array(picture.convert("RGB"))[15, 20]
        assert np.abs(seen.astype(int) - colour).max() <= 2
    monkeypatch.setattr("mim.report.gallery._BYTES", 150)
    assert re.search("More than fits here: .*seed=1/figures/head_distance.png", report(folder).text)
    (folder / "seed=0" / "attention.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"attention\.png: is no picture"):
        report(folder)


def test_photographs_are_kept_as_jpeg(fake_comparison: Write) -> None:
    folder = fake_comparison(axes={"seed": [0]}, metrics=False)
    (folder / "seed=0" / "pictures").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "seed=0" / "pictures" / "segment.png")
    sources = [tag["src"] for name, tag in report(folder).tags if name == "img"]
    assert sources[-1].startswith("data:image/jpeg;base64,")


def test_the_page_begins_with_one_sentence_and_its_figure(fake_comparison: Write) -> None:
    values = {"drop": [0.90, 0.91, 0.92], "zero": [0.93, 0.942, 0.95], "token": [0.88, 0.89, 0.901]}
    axes = {**REGIMES, "model.regime.name": ["drop", "zero", "token"]}
    folder = fake_comparison(axes=axes, linear=by_regime(values))
    html = html_of(folder)
    section = html.partition('<section class="finding"')[2].partition("</section>")[0]
    assert section.count('class="lead"') == 1
    text = re.sub("<.*?>", "", section)
    # By hand: the residuals of the two-way table have the sum of squares 0.1089 (points squared)
    # and 4 degrees of freedom, so that every pair has the error sd sqrt(2 / 3) and Tukey's range
    # 5.040 / sqrt(2) for three groups.
    table = np.array([values[name] for name in ("drop", "zero", "token")]) * 100
    rest = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    half = 5.040 / math.sqrt(2) * math.sqrt(np.square(rest).sum() / 4) * math.sqrt(2 / 3)
    mean = (table[1] - table[0]).mean()
    assert f"drop (+{mean:.1f} points, {mean - half:.1f} to {mean + half:.1f})" in text
    assert "zero (94.1" in text and "is better than drop" in text and "all pairs at once" in text
    after = html.partition("</section>")[2]
    assert after.index('class="forest"') < after.index("<h2")
    # Untrained: 0.76, 0.764, 0.768. Means of the differences: 14.6, 17.67, 12.63.
    assert "Each encoder beats its untrained self (+12.6 to +17.7 points)." in html
    assert "Training FLOPs: token takes 2.86 times as much as drop" in html
    assert "Measure by measure" not in report_markdown(Report(read_comparison(folder)))


def test_secondary_measures_carry_holms_correction(fake_comparison: Write) -> None:
    values = {"drop": [0.90, 0.91, 0.92], "zero": [0.93, 0.942, 0.95]}
    comparison = read_comparison(fake_comparison(axes=REGIMES, linear=by_regime(values)))
    first, *others = analyse(comparison)
    assert first.primary and not any(each.primary for each in others)
    raw = [
        stats.ttest_rel(*(list(g.values(each.measure.key).values()) for g in comparison.groups))
        for each in others
    ]
    expected = [p < 0.05 for p in holm([float(test.pvalue) for test in raw])]
    assert [each.verdicts[0].kind == "difference" for each in others] == expected
    # The k-NN accuracy is the linear one less a constant here: p = 0.0005, times four.
    assert expected[:2] == [True, True]


def test_the_config_may_name_the_measure_and_the_group_that_decide(fake_comparison: Write) -> None:
    axes = {**REGIMES, "model.regime.name": ["drop", "zero", "token"]}
    folder = fake_comparison(axes=axes)
    path = folder / "comparison.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"primary": "knn", "against": "token"}))
    first = analyse(read_comparison(folder))[0]
    assert first.measure.key == "knn.accuracy" and first.family.kind == "reference"
    assert [verdict.key for verdict in first.verdicts] == [("drop", "token"), ("zero", "token")]
    assert finding_of(folder).sentence.startswith("By k-NN accuracy, token (")
    path.write_text(json.dumps(content | {"primary": "nothing"}))
    with pytest.raises(UserError, match="primary: 'nothing'"):
        analyse(read_comparison(folder))


def test_columns_of_two_protocols_are_not_compared(fake_comparison: Write) -> None:
    values = {"drop": [0.90, 0.91, 0.92], "zero": [0.93, 0.942, 0.95]}
    folder = fake_comparison(axes=REGIMES, linear=by_regime(values))
    for run in folder.glob("regime=*"):
        path = run / "result.json"
        content = json.loads(path.read_text())
        digest = "aa" if "seed=1" in run.name else "bb"
        content["protocols"] = {"linear": {"protocol": digest}, "knn": {"protocol": "cc"}}
        path.write_text(json.dumps(content))
    first, *others = analyse(read_comparison(folder))
    assert "2 protocols" in first.mixed and not first.verdicts
    assert any(each.measure.key == "knn.accuracy" and each.verdicts for each in others)
    text = report(folder).text
    assert "is not compared" not in text and "its columns are not compared" in text
    assert bold(folder) == []


def answers(folder: Path, right: Callable[[str, int], np.ndarray]) -> None:
    """Writes what each run answered."""
    for run in folder.glob("regime=*"):
        regime, seed = run.name[7:].split(",seed=")
        values = right(regime, int(seed))
        labels = np.arange(len(values)) % 4
        np.savez(run / "predictions.npz", **{
            "linear/sample_ids": np.arange(len(values)), "linear/labels": labels,
            "linear/accuracy": values,
        })  # fmt: skip


def test_both_populations_have_their_interval(fake_comparison: Write) -> None:
    rng = np.random.default_rng(0)
    easy = rng.random(400) < 0.9
    flipped = {regime: easy ^ (rng.random(400) < 0.1) for regime in ("drop", "zero")}

    def right(regime: str, seed: int) -> np.ndarray:
        noise = np.random.default_rng([seed, len(regime)]).random(400) < 0.02
        return np.asarray(flipped[regime] ^ noise)

    def linear(axes: dict[str, Any], seed: int) -> float:
        return float(right(axes["model.regime.name"], seed).mean())

    folder = fake_comparison(axes=REGIMES, linear=linear)
    answers(folder, right)
    first = analyse(read_comparison(folder))[0]
    found = first.verdicts[0].found
    assert first.images == 400 and found.wide is not None and found.low is not None
    # By hand: MS_image - MS_both of the table (3, 400) of differences, over 3 * 400.
    each = np.stack([right("zero", s).astype(float) - right("drop", s) for s in range(3)])
    rest = each - each.mean(0) - each.mean(1, keepdims=True) + each.mean()
    own = 3 * np.square(each.mean(0) - each.mean()).sum() / 399
    added = (own - np.square(rest).sum() / (2 * 399)) / (3 * 400)
    assert added > 0 and found.error is not None
    assert found.wide[1] - found.mean < 4.31 * math.sqrt(found.error**2 + added)
    assert found.wide[0] < found.low, "for new images it is wider here"
    assert "For new images the interval" in finding_of(folder).basis


def test_the_images_on_which_encoders_disagree(fake_comparison: Write) -> None:
    def right(regime: str, seed: int) -> np.ndarray:
        values = np.arange(8) % 4 != 1  # class 1 is answered wrong
        values[5] = regime == "zero"
        return values

    folder = fake_comparison(axes=REGIMES)
    answers(folder, right)
    np.savez(
        folder / "disagreement.npz", evaluation="linear", sample_ids=np.array([5]),
        images=np.full((1, 8, 8, 3), 7, np.uint8), classes=np.array(["a", "dog", "c", "d"]),
    )  # fmt: skip
    page = report(folder)
    tag = next(tag for name, tag in page.tags if tag.get("alt", "").startswith("Test image 5"))
    assert tag["alt"] == "Test image 5, dog: right by drop 0 of 3, zero 3 of 3 seeds"
    table = dict(Report(read_comparison(folder)).tables)["Classes"]
    assert [cell.text for cell in table.rows[0].cells] == [
        "dog", "2", "0.0", "50.0", "drop \u2212 zero: \u221250.0"
    ]  # fmt: skip


def test_raw_pixels_far_below_do_not_squeeze_the_axis(fake_comparison: Write) -> None:
    values = {"drop": [0.960, 0.961, 0.962], "zero": [0.970, 0.972, 0.971]}
    folder = fake_comparison(axes=REGIMES, linear=by_regime(values))
    chart = quality_charts(read_comparison(folder))[0]
    assert chart.y_limits is not None and chart.y_limits[0] > 95
    labels = [level.label for level in chart.levels]
    assert "raw pixels: 87.2 (below)" in labels
    assert not any(chart.is_inside(level) for level in chart.levels)


def test_a_row_is_told_in_words(fake_comparison: Write) -> None:
    table = dict(Report(read_comparison(fake_comparison(axes=REGIMES))).tables)["Recipes"]
    assert table.rows[1].cells[1].text == (
        "vit_tiny_patch16_224 (patch 4) under the regime zero; random masks hide 75 % of the "
        "patches; normalized pixels are predicted; trained for 20 epochs, 64 images a step; on "
        "mnist5k at 28 pixels."
    )


def test_predictions_of_grey_images_have_no_tint(fake_comparison: Write) -> None:
    folder = fake_comparison(axes={"seed": [0]}, channels=3)
    path = folder / "seed=0" / "reconstructions.npz"
    with np.load(path) as file:
        arrays = dict(file)
    arrays["original"][0] = arrays["original"][0][..., :1]
    np.savez(path, **arrays)
    shown = reconstructions(read_comparison(folder))
    assert shown is not None
    tinted = []
    for row in shown.rows[:2]:
        content = base64.b64decode(row[-2].source.partition(",")[2])
        pixels = np.array(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)
        tinted.append(bool((pixels.max(-1) - pixels.min(-1)).max() > 3))
    assert tinted == [False, True]


def test_summary_uses_the_sample_standard_deviation() -> None:
    summary, one = summarize([1.0, 2.0, 6.0]), summarize([4.0])
    assert summary is not None and one is not None
    assert (summary.mean, summary.n) == (3.0, 3)
    assert summary.sd == pytest.approx(math.sqrt(7.0))  # (4 + 1 + 9) / 2
    assert one.sd is None and one.n == 1
    assert summarize([]) is None


def test_chosen_settings_are_no_columns_of_the_table(fake_comparison: Write) -> None:
    folder = fake_comparison(metrics=False)
    for path in folder.glob("*/result.json"):
        result = json.loads(path.read_text())
        for numbers in result.get("evaluations", {}).values():
            numbers |= {"chosen_k": 5, "converged": 1.0, "mean_strength_10_per_class": 0.1}
        path.write_text(json.dumps(result))
    comparison = read_comparison(folder)
    heads = {measure.key for measure in evaluation_measures(comparison)}
    assert heads and not any("chosen" in h or "converged" in h or "mean_" in h for h in heads)
    assert "linear.chosen_k" in results_csv(comparison).splitlines()[0]


def test_every_group_has_a_look_of_its_own(fake_comparison: Write) -> None:
    names = [f"generator_{letter}" for letter in "abcdefghij"]
    axes = {"mask.name": names, "seed": [0]}
    looks = styles(read_comparison(fake_comparison(axes=axes, metrics=False))).values()
    assert len({(look.colour, look.marker) for look in looks}) == 10, "points"
    assert len({(look.colour, look.line) for look in looks}) == 10, "curves without markers"
    assert len({look.colour for look in list(looks)[:6]}) == 6


def test_an_interval_says_on_which_side_of_zero_it_lies() -> None:
    points = Measure("linear.accuracy", "Linear probe", "accuracy", 100.0, "%")
    assert points.interval(0.0002, 0.0238) == "0.02 to 2.38"
    assert points.interval(-0.0002, 0.0242) == "\u22120.02 to 2.42"
    assert points.interval(0.003, 0.021) == "0.3 to 2.1"
    assert points.interval(0.0, 0.0) == "0.0 to 0.0", "an end that is 0 says so"
    assert points.interval(1e-12, 0.5) == "0.0000 to 50.0000", "it ends somewhere"


def test_losses_that_nobody_may_compare_have_no_columns(fake_comparison: Write) -> None:
    axes = {"model.target.name": ["pixels", "normalized_pixels"], "seed": [0, 1]}
    table = table_of(difference_table, fake_comparison(axes=axes))
    assert {column.section for column in table.columns} == {"", "Linear probe", "k-NN"}


@pytest.mark.parametrize(
    "evil", ["=1+1", "@SUM(A1)", "+cmd|' /C calc'!A0", "-1+HYPERLINK(A1)", "\t=1", "-1 +x|y!z"]
)
def test_no_cell_of_a_csv_is_a_formula(evil: str, fake_comparison: Write) -> None:
    axes: dict[str, list[Any]] = {"model.regime.name": [evil, "drop"], "seed": [0, 1]}
    folder = fake_comparison(axes=axes, metrics=False)
    write_report(folder)
    cells = 0
    for path in (folder / "results.csv", *(folder / "tables").glob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            for cell in (cell for row in csv.reader(file) for cell in row):
                cells += cell == f"'{evil}"
                assert not cell.startswith(("=", "@", "\t")), (path, cell)
                assert cell[:1] not in "+-" or not cell or "x" not in cell, (path, cell)
    assert cells
