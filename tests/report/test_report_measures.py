"""What an evaluation chose is no quality: it stays out of the table and in the CSV."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from mim.report import read_comparison
from mim.report.tables import evaluation_measures, results_csv


def test_chosen_settings_are_no_columns_of_the_table(fake_comparison: Callable[..., Path]) -> None:
    folder = fake_comparison()
    for path in folder.glob("*/result.json"):
        result = json.loads(path.read_text())
        for numbers in result.get("evaluations", {}).values():
            numbers |= {"chosen_k": 5, "converged": 1.0, "mean_strength_10_per_class": 0.1}
        path.write_text(json.dumps(result))
    comparison = read_comparison(folder)
    heads = {measure.key for measure in evaluation_measures(comparison)}
    assert heads and not any("chosen" in h or "converged" in h or "mean_" in h for h in heads)
    assert "linear.chosen_k" in results_csv(comparison).splitlines()[0]
