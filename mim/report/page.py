"""Put a comparison's tables, figures and findings on one page, and write it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from importlib import resources
from itertools import combinations, starmap
from pathlib import Path
from typing import TypeVar

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from mim.core.errors import UserError
from mim.core.files import write_bytes_atomic
from mim.core.fingerprints import same_images
from mim.report import disagreement, figures, interactive, layers, robustness, tables
from mim.report.charts import Chart, Drawing, Forest, HeatMap, forests, loss_charts
from mim.report.collect import (
    Comparison,
    axis_labels,
    read_comparison,
    same_task,
    show_value,
    without_seed,
)
from mim.report.curves import frontier_charts, quality_charts, scaling_charts
from mim.report.finding import finding
from mim.report.gallery import gallery
from mim.report.interactions import interaction_maps, interaction_table
from mim.report.recipe import recipe_table
from mim.report.statistics import MOST_PAIRED, Analysis, analyse
from mim.report.tables import Table
from mim.report.tiles import reconstructions, viewer
from mim.report.tuning import tuning_charts, tuning_table

D = TypeVar("D", Chart, Forest, HeatMap)


def write_report(folder: Path, columns: Sequence[str] = ()) -> Path:
    """Write the report of a comparison into its folder.

    ``report.html``, ``report.md``, ``results.csv``; ``tables/`` with each table as ``.tex``,
    ``.csv`` and ``.md``; ``figures/`` with each chart as ``.svg``, ``.png`` and ``.pdf``. Nothing
    is written before all are ready, and each file is replaced as a whole.

    Args:
        folder: holds ``comparison.json`` and the run folders that it names.
        columns: measures of ``tables/chosen``, one more table, in this order.

    Returns:
        The path of ``report.html``.

    Raises:
        UserError: if the folder is no comparison, a file in it cannot be read, it cannot be
            written to, or there is no such measure.
    """
    folder = Path(folder)
    report = Report(read_comparison(folder), columns)
    contents: dict[str, str | bytes] = {
        "results.csv": tables.results_csv(report.comparison),
        "report.md": report_markdown(report),
    }
    for _, table in report.tables:
        for form, write in _TABLE_FORMS.items():
            contents[f"tables/{table.key}.{form}"] = write(table)
    stills = {}
    for chart in report.figures:
        drawn = figures.draw(chart, figures.FORMATS)
        stills[chart.key] = drawn["svg"]
        contents |= {f"figures/{chart.key}.{form}": content for form, content in drawn.items()}
    # Last, so that the page never appears before the files it links to.
    contents["report.html"] = report_html(report, stills=stills)
    for name, written in contents.items():
        content = written.encode() if isinstance(written, str) else written
        try:
            (folder / name).parent.mkdir(exist_ok=True)
            write_bytes_atomic(folder / name, content)
        except OSError as error:
            reason = f"cannot be written ({error.strerror})"
            raise UserError(f"{folder / name}: {reason}") from error
    return folder / "report.html"


class Report:
    """A comparison and all that its page is made of, each worked out once."""

    def __init__(self, comparison: Comparison, columns: Sequence[str] = ()) -> None:
        self.comparison = comparison
        self.chosen = tables.chosen_measures(comparison, columns)
        self.few = tables.drawn(comparison)
        self.analyses = analyse(comparison)
        self.finding = finding(comparison, self.analyses)
        self.forests = forests(comparison, self.analyses)
        self.heat_maps = interaction_maps(comparison, self.analyses)
        frontier = frontier_charts(self.few, self.analyses)
        self.panels: dict[str, list[Chart]] = {
            "frontier": frontier,
            "scaling": scaling_charts(self.few, self.analyses),
            "curves": loss_charts(self.few),
            "quality": [] if frontier else quality_charts(self.few),
            "robustness": robustness.robustness_charts(self.few),
            "tuning": tuning_charts(self.few),
        }
        self.charts = [chart for charts in self.panels.values() for chart in charts]

    @property
    def figures(self) -> list[Drawing]:
        """All that is drawn."""
        return [*self.forests, *self.charts, *self.heat_maps]

    @cached_property
    def tables(self) -> list[tuple[str, Table]]:
        """(heading, table) of those that have rows."""
        comparison, analyses = self.comparison, self.analyses
        found = [
            ("Results", tables.comparison_table(comparison, analyses)),
            ("Chosen columns", tables.means_table(comparison, self.chosen, analyses, "chosen")),
            ("Loss and cost", tables.cost_table(comparison, analyses)),
            ("Runs without a result", tables.failures_table(comparison)),
            ("Worth of pre-training", tables.margin_table(comparison, analyses)),
            ("Differences", tables.difference_table(comparison, analyses)),
            ("Interactions", interaction_table(comparison, analyses)),
            ("Tuning", tuning_table(comparison)),
            ("Classes", disagreement.class_table(comparison, analyses)),
            ("Images", disagreement.image_table(comparison, analyses)),
            ("Robustness", robustness.robustness_table(comparison)),
            ("Layers", layers.layers_table(comparison)),
            ("Likeness of the encoders", layers.alignment_table(self.few)),
            ("Recipes", recipe_table(comparison)),
            ("Settings", tables.settings_table(comparison)),
            ("Data and environment", tables.facts_table(comparison)),
        ]
        return [
            (title, table)
            for title, table in found
            if table.rows and (self.chosen or table.key != "chosen")
        ]


_TABLE_FORMS: dict[str, Callable[[Table], str]] = {
    "tex": tables.latex,
    "csv": tables.table_csv,
    "md": lambda table: tables.markdown(table) + "\n",
}
_BUDGETS = {"steps": "steps", "flops": "training FLOPs", "seconds": "seconds of training"}
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


def report_html(
    report: Report, live: bool = False, stills: Mapping[str, bytes] | None = None
) -> str:
    """The page: one file that loads nothing.

    Its scripts are its own and plotly's, named by their hashes in the page's security policy, so
    that no other can run.

    Args:
        report: what it shows.
        live: whether the page asks its server for news and renews itself.
        stills: the charts as SVG, by key, where they are drawn already.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    comparison, few, charts = report.comparison, report.few, report.charts
    drawn = stills or {chart.key: figures.draw(chart, ("svg",))["svg"] for chart in report.figures}

    def pictures(shown: Iterable[D]) -> list[tuple[D, figures.Picture]]:
        uris = ((chart, figures.data_uri("image/svg+xml", drawn[chart.key])) for chart in shown)
        return [(chart, figures.Picture(uri, chart.alt)) for chart, uri in uris]

    plotly = interactive.plotly_script() if charts else ""
    scripts = [script for script in (plotly, _asset("report.js")) if script]
    if live:
        scripts.append(_asset("live.js"))
    shown, left_out = gallery(comparison)
    seen = viewer(few)
    data = {"charts": {c.key: interactive.plotly_figure(c) for c in charts}, "viewer": seen}
    return environment.from_string(_asset("template.html")).render(
        comparison=comparison,
        summary=summary_line(comparison),
        finding=report.finding,
        forests=pictures(report.forests),
        has_primary=any(each.primary and each.verdicts for each in report.analyses),
        tables=defaultdict(lambda: None, {table.key: table for _, table in report.tables}),
        runs_table=tables.runs_table(comparison) if live else None,
        downloads=_downloads,
        notes=notes(comparison, report.analyses),
        warnings=warnings(comparison, report.analyses),
        disagreement=disagreement.disagreement(comparison, report.analyses),
        tiles=reconstructions(few),
        viewer=seen,
        heat_maps=pictures(report.heat_maps),
        panels_of={name: pictures(shown) for name, shown in report.panels.items()},
        gallery=shown,
        left_out=[path.relative_to(comparison.folder) for path in left_out],
        configs=configs(few),
        base_config=json.dumps(comparison.base, indent=2, ensure_ascii=False),
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


def report_markdown(report: Report) -> str:
    """The page's text and tables in Markdown; the figures stand in the HTML page."""
    escape, comparison = tables.escape_markdown, report.comparison
    said = report.finding
    parts = [f"# {escape(comparison.name)}", escape(summary_line(comparison)), "## Finding"]
    parts += [f"**{escape(said.sentence)}**", *map(escape, filter(None, (said.basis, *said.more)))]
    warned = warnings(comparison, report.analyses)
    parts += [f"**Warning.** {escape(warning)}" for warning in warned]
    for title, table in report.tables:
        parts += [f"## {title}", f"{table.caption}.", tables.markdown(table)]
    noted = notes(comparison, report.analyses)
    parts += ["## How to read it", "\n".join(f"- {escape(note)}" for note in noted)]
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


def notes(comparison: Comparison, analyses: Sequence[Analysis]) -> list[str]:
    """What a reader must know to read the tables right."""
    found = [
        "± is the sample standard deviation over seeds, n the number of finished runs. A dash "
        "stands for what was not measured.",
        "Runs with the same seed share their initial weights, order of data, augmentation and "
        "masks, so differences are paired by seed. Fewer than three seeds give no interval.",
        *_on_intervals(analyses),
        "The untrained encoder is the same architecture at its initial weights; raw pixels are "
        "the images themselves. Both are evaluated like the pre-trained encoders, on full images.",
        "FLOPs are of one training image; training compute multiplies forward and backward by "
        "the images seen. Images/s and wall time hold for the machine named below.",
    ]
    if any("_per_class" in key for key in comparison.evaluation_keys):
        found.append(
            "Few-shot accuracies are means over several draws of the labelled images. The draws "
            "are the same for every run, and their spread is part of the interval where runs have "
            "kept their answers."
        )
    whole = [key.partition(".")[0] for key in comparison.evaluation_keys if ".chosen_last" in key]
    if whole:
        found.append(
            f"{', '.join(dict.fromkeys(whole))} learnt from all of train (held_out 0): the last "
            "epoch is measured, and nothing was chosen."
        )
    budget = comparison.rules.get("budget", "epochs")
    if budget != "epochs":
        of = comparison.rules.get("budget_of") or "the first value of each axis"
        found.append(
            f"Groups have equal {_BUDGETS[budget]}, those of {of} (at each length): the steps of "
            "every other group, and its schedules, follow from what its step costs."
        )
    varied = [values for values in without_seed(comparison.axes).values() if len(values) > 1]
    if comparison.rules.get("seeds") and len(varied) > 1:
        found.append(
            "Interactions are not shown: seeds were added until the differences were decided, and "
            "the interval of a difference of differences would not hold under that rule."
        )
    if any(run.shared for run in comparison.runs):
        found.append(
            "A longer run begins with the steps of a shorter one up to its cool-down, as a run "
            "trained alone would; its compute and wall time count them."
        )
    if comparison.rules.get("tune"):
        found.append(
            "Settings under Tuning were chosen for each group before, with the same work for each, "
            "on other seeds and on a part of the training images; no test image was read for it."
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
    if any(len(values) > MOST_PAIRED for values in without_seed(comparison.axes).values()):
        found.append(
            f"Of an axis with more than {MOST_PAIRED} values, each is set against the first "
            "alone; results.csv holds what other differences are made of."
        )
    if not same_task(comparison.groups):
        found.append(
            "Losses of different targets, mask ratios, data or patch sizes do not measure the "
            "same thing: compare them only between encoders that share all of these."
        )
    return found


def _on_intervals(analyses: Sequence[Analysis]) -> list[str]:
    """How the intervals were made, as far as there are any."""
    primary = next((each for each in analyses if each.primary and each.verdicts), None)
    if primary is None:
        return []
    found = [
        f"{primary.measure.plain} is the primary measure and decides. Its intervals hold with 95% "
        "for all differences at once. All other measures are secondary: their intervals stand by "
        "themselves, and a difference counts as shown after Holm's correction over all of them."
    ]
    margin = primary.measure.number(primary.margin).removesuffix(".0")
    found.append(
        f"As good: two one-sided tests show the difference to lie within {margin} points (the "
        "shaded band), at 5%, which is the 90% interval and not the 95% one. Undecided: neither "
        "that nor a difference was shown; beside it stands the smallest true difference that this "
        "design shows in 80% of comparisons, and how many more seeds would decide, were the "
        "difference seen the true one."
    )
    if primary.pooled:
        found.append(
            "The standard error is pooled over all groups: the residual of the table of groups and "
            "seeds."
        )
    elif primary.pooled is False:
        found.append(
            "The groups clearly spread unequally over seeds, so that no spread is pooled: each "
            "difference has its own, and Bonferroni's correction."
        )
    if primary.images:
        found.append(
            "The thick interval speaks of these test images and new seeds, and verdicts rest on "
            "it; the thin one of new images too, by the crossed model of seeds and images."
        )
    if primary.looks:
        found.append(
            f"Seeds were added until decided: {primary.looks} looks were taken, and the intervals "
            "hold at all of them at once."
        )
    return found


def warnings(comparison: Comparison, analyses: Sequence[Analysis] = ()) -> list[str]:
    """What makes the comparison less than fair or complete."""
    runs = [run for run in comparison.runs if run.kind == "run"]
    found = list(dict.fromkeys(each.mixed for each in analyses if each.mixed))
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
