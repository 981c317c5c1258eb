"""Put a comparison's tables, figures and findings on one page, and write it."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import resources
from itertools import combinations, starmap
from pathlib import Path

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from mim.core.errors import UserError
from mim.core.fingerprints import same_images
from mim.report import figures, interactive, layers, robustness, tables
from mim.report.charts import Chart, loss_charts, quality_charts, robustness_charts
from mim.report.collect import Comparison, axis_labels, read_comparison, same_task, show_value
from mim.report.finding import Finding, finding, findings
from mim.report.gallery import gallery
from mim.report.tables import Table
from mim.report.tiles import reconstructions, viewer


def write_report(folder: Path) -> Path:
    """Write the report of a comparison into its folder.

    ``report.html``, ``report.md``, ``results.csv``; ``tables/`` with each table as ``.tex``,
    ``.csv`` and ``.md``; ``figures/`` with each chart as ``.svg``, ``.png`` and
    ``.pdf``. Each file appears
    whole or not at all; nothing is written before all are ready.

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
    contents: dict[str, str | bytes] = {
        "results.csv": tables.results_csv(comparison),
        "report.md": report_markdown(comparison),
    }
    for _, table in _tables(comparison):
        for form, write in _TABLE_FORMS.items():
            contents[f"tables/{table.key}.{form}"] = write(table)
    stills = {}
    for chart in _charts(comparison):
        drawn = figures.draw(chart, figures.FORMATS)
        stills[chart.key] = drawn["svg"]
        contents |= {f"figures/{chart.key}.{form}": content for form, content in drawn.items()}
    # Last: who sees the page finds the others.
    contents["report.html"] = report_html(comparison, stills=stills)
    for name, written in contents.items():
        _write(folder / name, written)
    return folder / "report.html"


_TABLE_FORMS: dict[str, Callable[[Table], str]] = {
    "tex": tables.latex,
    "csv": tables.table_csv,
    "md": lambda table: tables.markdown(table) + "\n",
}
_TEXT_KINDS = {"tex": "text/x-tex", "csv": "text/csv", "md": "text/markdown"}


def _downloads(table: Table) -> list[dict[str, str]]:
    """The exports of a table, inside the page."""
    return [
        {
            "name": f"{table.key}.{form}",
            "label": {"tex": "LaTeX", "csv": "CSV", "md": "Markdown"}[form],
            "source": figures.data_uri(_TEXT_KINDS[form], write(table).encode()),
        }
        for form, write in _TABLE_FORMS.items()
    ]


def _charts(comparison: Comparison) -> list[Chart]:
    comparison = tables.drawn(comparison)
    return [
        *loss_charts(comparison),
        *quality_charts(comparison),
        *robustness_charts(comparison),
    ]


def report_html(
    comparison: Comparison, live: bool = False, stills: Mapping[str, bytes] | None = None
) -> str:
    """The page: one file that loads nothing.

    Its scripts are its own and plotly's, named by their hashes in the page's security policy, so
    that no other can run.

    Args:
        comparison: what it shows.
        live: whether the page asks its server for news and renews itself.
        stills: the charts as SVG, by key, where they are drawn already.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    charts, few = _charts(comparison), tables.drawn(comparison)
    if stills is None:
        stills = {chart.key: figures.draw(chart, ("svg",))["svg"] for chart in charts}
    pictures = {
        chart.key: figures.Picture(figures.data_uri("image/svg+xml", stills[chart.key]), chart.alt)
        for chart in charts
    }
    plotly = interactive.plotly_script() if charts else ""
    scripts = [script for script in (plotly, _asset("report.js")) if script]
    if live:
        scripts.append(_asset("live.js"))
    shown, left_out = gallery(comparison)
    data = {
        "charts": {chart.key: interactive.plotly_figure(chart) for chart in charts},
        "viewer": viewer(few),
    }
    return environment.from_string(_asset("template.html")).render(
        comparison=comparison,
        summary=summary_line(comparison),
        finding=finding(comparison),
        findings=findings(comparison),
        runs_table=tables.runs_table(comparison) if live else None,
        comparison_table=tables.comparison_table(comparison),
        difference_table=tables.difference_table(comparison),
        margin_table=tables.margin_table(comparison),
        layers_table=layers.layers_table(comparison),
        robustness_table=robustness.robustness_table(comparison),
        alignment_table=layers.alignment_table(few),
        settings_table=tables.settings_table(comparison),
        facts_table=tables.facts_table(comparison),
        failures_table=tables.failures_table(comparison),
        downloads=_downloads,
        notes=notes(comparison),
        warnings=warnings(comparison),
        tiles=reconstructions(few),
        viewer=data["viewer"],
        curves=[(c, pictures[c.key]) for c in charts if c.lines and c.key != "robustness"],
        robustness=[(c, pictures[c.key]) for c in charts if c.key == "robustness"],
        quality=[(chart, pictures[chart.key]) for chart in charts if chart.clouds],
        gallery=shown,
        left_out=[path.relative_to(comparison.folder) for path in left_out],
        configs=configs(few),
        base_config=tables.base_config_text(comparison),
        style=Markup(_asset("report.css")),
        scripts=[Markup(script) for script in scripts],
        policy=_policy(scripts, live),
        data=Markup(_json(data)),
        interactive=bool(plotly),
        live=live,
    )


def configs(comparison: Comparison) -> list[tuple[str, str]]:
    """(label, YAML) of each group: the exact config of its first run."""
    return [
        (group.label, yaml.safe_dump(group.config, sort_keys=False, allow_unicode=True))
        for group in comparison.groups
        if group.config
    ]


def _asset(name: str) -> str:
    return resources.files("mim.report").joinpath(name).read_text(encoding="utf-8")


def _policy(scripts: list[str], live: bool) -> str:
    """A content security policy under which these scripts run and nothing is loaded."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in scripts
    )
    connect = "connect-src 'self'; " if live else ""
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
        f"{connect}img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _json(data: object) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _tables(comparison: Comparison) -> list[tuple[str, Table]]:
    """(heading, table) of all that have rows."""
    found = [
        ("Results", tables.comparison_table(comparison)),
        ("Runs without a result", tables.failures_table(comparison)),
        ("Worth of pre-training", tables.margin_table(comparison)),
        ("Paired differences", tables.difference_table(comparison)),
        ("Robustness", robustness.robustness_table(comparison)),
        ("Layers", layers.layers_table(comparison)),
        ("Likeness of the encoders", layers.alignment_table(tables.drawn(comparison))),
        ("Settings", tables.settings_table(comparison)),
        ("Data and environment", tables.facts_table(comparison)),
    ]
    return [(title, table) for title, table in found if table is not None]


def report_markdown(comparison: Comparison) -> str:
    """The page's text and tables in Markdown; the figures stand in the HTML page."""
    escape = tables.escape_markdown
    parts = [f"# {escape(comparison.name)}", escape(summary_line(comparison)), "## Finding"]
    parts.append(_markdown_finding(finding(comparison)))
    parts += [f"**Warning.** {escape(warning)}" for warning in warnings(comparison)]
    for title, table in _tables(comparison):
        parts += [f"## {title}", f"{table.caption}.", tables.markdown(table)]
    parts += ["## Measure by measure", *map(_markdown_finding, findings(comparison))]
    parts += ["## How to read it", "\n".join(f"- {escape(note)}" for note in notes(comparison))]
    if comparison.command:
        longest = max(map(len, re.findall("`+", comparison.command)), default=0)
        fence = "`" * max(3, longest + 1)
        parts += ["## Run it again", f"{fence}sh\n{comparison.command}\n{fence}"]
    parts.append("The figures are in [report.html](report.html) and in `figures/`.")
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
    if "robustness.mean_error" in comparison.evaluation_keys:
        found.append(
            "Robustness: the mean error is over corruptions and severities and is not normalised; "
            "mCE is relative to a baseline's errors, 100% being the baseline. Corruptions are made "
            "on the fly unless a folder of them was given, so only the latter compare with papers."
        )
    shown, total = len(tables.drawn(comparison).groups), len(comparison.groups)
    if shown < total:
        found.append(
            f"Charts, pictures, configs and the likeness of encoders show the {shown} groups of "
            f"{total} with the best mean of the first measure; tables and results.csv hold all."
        )
    axes = {key: values for key, values in comparison.axes.items() if key != "seed"}
    if any(len(values) > tables.MOST_PAIRED for values in axes.values()):
        found.append(
            f"Of an axis with more than {tables.MOST_PAIRED} values, each is set against the first "
            "alone; results.csv holds what other differences are made of."
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
    differ = not all(starmap(same_images, combinations(sorted(prints), 2)))
    if differ and not varies_data:
        found.append("The runs did not see the same data: their fingerprints differ.")
    machines = {str(sorted(run.environment.items())) for run in runs if run.environment}
    if len(machines) > 1:
        found.append(
            "The runs did not share one environment: do not compare their speed, memory or time."
        )
    return found


def _markdown_finding(said: Finding) -> str:
    escape = tables.escape_markdown
    basis = f" {escape(said.basis)}" if said.basis else ""
    return f"**{escape(said.title)}.** {escape(said.text)}{basis}"


def _write(path: Path, content: str | bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(exist_ok=True)
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
