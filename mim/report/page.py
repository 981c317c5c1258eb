"""Put a comparison's tables, figures and findings on one page, and write it."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from mim.errors import UserError
from mim.report import figures, tables
from mim.report.collect import Comparison, axis_labels, read_comparison, same_task, show_value
from mim.report.finding import Finding, findings


def write_report(folder: Path) -> Path:
    """Write ``report.html``, ``report.md`` and ``results.csv`` into a comparison folder.

    Each file appears whole or not at all; nothing is written before all three are ready.

    Args:
        folder: holds ``comparison.json`` and the run folders that it names.

    Returns:
        The path of ``report.html``.

    Raises:
        UserError: if the folder is no comparison, a file in it cannot be read, or it cannot be
            written to.
    """
    folder = Path(folder)
    comparison = read_comparison(folder)
    contents = {
        "results.csv": tables.results_csv(comparison),
        "report.md": report_markdown(comparison),
        "report.html": report_html(comparison),
    }
    for name, content in contents.items():
        _write(folder / name, content)
    return folder / "report.html"


def report_html(comparison: Comparison) -> str:
    """The page: one file, without scripts, that loads nothing."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = resources.files("mim.report").joinpath("template.html").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        comparison=comparison,
        summary=summary_line(comparison),
        findings=findings(comparison),
        comparison_table=tables.comparison_table(comparison),
        difference_table=tables.difference_table(comparison),
        margin_table=tables.margin_table(comparison),
        settings_table=tables.settings_table(comparison),
        facts_table=tables.facts_table(comparison),
        failures_table=tables.failures_table(comparison),
        notes=notes(comparison),
        warnings=warnings(comparison),
        tiles=figures.reconstructions(comparison),
        curves=figures.loss_curves(comparison),
        quality=figures.quality_against_compute(comparison),
        base_config=tables.base_config_text(comparison),
    )


def report_markdown(comparison: Comparison) -> str:
    """The page's text and tables in Markdown; the figures stand in the HTML page."""
    escape = tables.escape_markdown
    parts = [f"# {escape(comparison.name)}", escape(summary_line(comparison)), "## Finding"]
    parts += [_markdown_finding(finding) for finding in findings(comparison)]
    parts += [f"**Warning.** {escape(warning)}" for warning in warnings(comparison)]
    sections = [
        ("Results", tables.comparison_table(comparison)),
        ("Failed runs", tables.failures_table(comparison)),
        ("Worth of pre-training", tables.margin_table(comparison)),
        ("Paired differences", tables.difference_table(comparison)),
        ("Settings", tables.settings_table(comparison)),
        ("Data and environment", tables.facts_table(comparison)),
    ]
    for title, table in sections:
        if table is not None:
            parts += [f"## {title}", f"{table.caption}.", tables.markdown(table)]
    parts += ["## How to read it", "\n".join(f"- {escape(note)}" for note in notes(comparison))]
    if comparison.command:
        longest = max(map(len, re.findall("`+", comparison.command)), default=0)
        fence = "`" * max(3, longest + 1)
        parts += ["## Run it again", f"{fence}sh\n{comparison.command}\n{fence}"]
    parts.append("The figures are in [report.html](report.html).")
    return "\n\n".join(parts) + "\n"


def summary_line(comparison: Comparison) -> str:
    """What was compared, in one line."""
    runs = [run for run in comparison.runs if run.kind == "run"]
    finished = sum(run.finished for run in runs)
    axes = axis_labels(comparison.axes)
    values = [
        f"{axes[key]}: {', '.join(show_value(value) for value in values)}"
        for key, values in comparison.axes.items()
    ]
    count = f"{finished} of {len(runs)} runs finished"
    return f"{'; '.join(values)}. {count}." if values else f"{count}."


def notes(comparison: Comparison) -> list[str]:
    """What a reader must know to read the tables right."""
    found = [
        "± is the sample standard deviation over seeds, n the number of finished runs. A dash "
        "stands for what was not measured.",
        "Runs with the same seed share their initial weights, order of data, augmentation and "
        "masks, so differences are paired by seed. Intervals are 95% Student t intervals of the "
        "mean paired difference, not adjusted for the number of comparisons; a difference counts "
        "as shown when its interval leaves out 0 (bold). One seed gives no interval.",
        "The untrained encoder is the same architecture at its initial weights; raw pixels are "
        "the images themselves. Both are evaluated like the pre-trained encoders, on full images.",
        "FLOPs are of one training image; training compute multiplies forward and backward by "
        "the images seen. Images/s and wall time hold for the machine named below.",
    ]
    if any("_per_class" in key for key in comparison.evaluation_keys):
        found.append(
            "Few-shot accuracies are means over several draws of the labelled images; their "
            "spread over draws is in results.csv."
        )
    if not same_task(comparison.groups):
        found.append(
            "Losses of different targets, mask ratios, data or patch sizes do not measure the "
            "same thing: compare them only between encoders that share all of these."
        )
    return found


def warnings(comparison: Comparison) -> list[str]:
    """What makes the comparison less than fair or complete."""
    runs = [run for run in comparison.runs if run.kind == "run"]
    found = []
    unfinished = [run for run in comparison.runs if not run.finished]
    if unfinished:
        found.append(
            f"{len(unfinished)} of {len(comparison.runs)} runs and references have no result; "
            "the means are of the others."
        )
    varies_data = any(key.startswith("data") for key in comparison.axes)
    prints = {str(run.data["fingerprint"]) for run in runs if "fingerprint" in run.data}
    if len(prints) > 1 and not varies_data:
        found.append("The runs did not see the same data: their fingerprints differ.")
    machines = {str(sorted(run.environment.items())) for run in runs if run.environment}
    if len(machines) > 1:
        found.append(
            "The runs did not share one environment: do not compare their speed, memory or time."
        )
    return found


def _markdown_finding(finding: Finding) -> str:
    escape = tables.escape_markdown
    basis = f" {escape(finding.basis)}" if finding.basis else ""
    return f"**{escape(finding.title)}.** {escape(finding.text)}{basis}"


def _write(path: Path, content: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_text(content, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
