"""The verbs that read run folders: runs, diff, doctor, completion; and what compare shows."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mim.core import progress
from mim.core.errors import UserError
from mim.core.settings import load_config
from mim.report import read_comparison
from mim.report.overview import as_json, closing_table, overview, training_left
from mim.report.runs import diff_runs, find_runs, read_run
from mim.training.doctor import Check, _products, examine

Write = Callable[..., Path]
Mim = Callable[..., Any]
AXES = {"model.regime.name": ["drop", "zero"], "seed": [0, 1]}


@pytest.fixture
def folder(fake_comparison: Write) -> Path:
    return fake_comparison(axes=AXES, failed=("regime=zero,seed=1",), error="[red]it[/] blew up")


def names(folder: Path, *where: str) -> list[str]:
    return [run.folder.name for run in find_runs(folder, where)]


def test_runs_are_found_and_filtered(folder: Path) -> None:
    everything = names(folder.parent)
    assert len(everything) == 7 and everything == sorted(everything)
    assert names(folder, "model.regime.name=zero", "kind=run") == [
        "regime=zero,seed=0",
        "regime=zero,seed=1",
    ]
    assert names(folder, "status=failed") == ["regime=zero,seed=1"]
    assert names(folder, "status!=failed", "kind=run", "seed=1") == ["regime=drop,seed=1"]
    # Raw pixels reach 0.872, the untrained encoders less.
    assert names(folder, "linear.accuracy>=0.872", "linear.accuracy<=0.872") == ["pixels"]
    assert names(folder, "linear.accuracy<0.8") == ["untrained,seed=0", "untrained,seed=1"]
    assert names(folder, "environment.device=cpu", "seed=0", "kind=run") == [
        "regime=drop,seed=0",
        "regime=zero,seed=0",
    ]


def test_mistakes_in_filters_are_one_line(folder: Path, tmp_path: Path, mim: Mim) -> None:
    for args, message in (
        (("runs", tmp_path / "none"), "is no folder"),
        (("runs", folder, "--where", "seed"), "has not the form KEY=VALUE"),
        (("runs", folder, "--where", "sed=1"), "did you mean 'seed'"),
        (("runs", folder, "--where", "model.regime.name>1"), "has no order"),
        (("runs", folder, "--show", "mask.ration"), "did you mean 'mask.ratio'"),
        (("diff", folder, folder / "pixels"), "is no run folder"),
        (("completion", "dos"), "invalid choice: 'dos'"),
    ):
        outcome = mim(*args)
        assert outcome.code == 2 and message in outcome.line, args


def test_runs_in_a_pipe_are_lines_with_tabs(folder: Path, mim: Mim) -> None:
    outcome = mim("runs", folder, "--where", "kind=run", "--show", "mask.name", "data.batch_size")
    lines = [line.split("\t") for line in outcome.out.splitlines()]
    assert outcome.code == 0 and "\x1b" not in outcome.out
    assert lines[0][:6] == ["run", "state", "regime", "mask", "ratio", "seed"]
    assert all(len(line) == len(lines[0]) for line in lines) and len(lines) == 5
    assert lines[4][0] == "regime=zero,seed=1" and lines[4][-1] == "[red]it[/] blew up"
    assert [line[-2] for line in lines[1:]] == ["64"] * 4
    found = json.loads(mim("runs", folder, "--json", "-").out)
    assert len(found) == 7
    assert {run["status"] for run in found} == {"finished", "failed"}
    assert all("linear.accuracy" in run["measures"] for run in found if run["status"] != "failed")


def test_diff_says_what_differs_and_by_how_much(folder: Path, mim: Mim, tmp_path: Path) -> None:
    first, second = (read_run(folder / f"regime={name},seed=0") for name in ("drop", "zero"))
    found = {(item.section, item.key): item for item in diff_runs(first, second)}
    regime = found["config", "model.regime.name"]
    assert (regime.first, regime.second, regime.change) == ("drop", "zero", None)
    assert [key for section, key in found if section == "config"] == ["model.regime.name"]
    tokens = found["result", "encoder_tokens"]
    assert (tokens.first, tokens.second, tokens.change) == (13.0, 50.0, 37.0)
    assert ("data", "fingerprint") not in found
    assert diff_runs(first, first) == []
    outcome = mim("diff", first.folder, second.folder, "--json", tmp_path / "new" / "diff.json")
    assert "config\tmodel.regime.name\tdrop\tzero\t" in outcome.out
    stored = json.loads((tmp_path / "new" / "diff.json").read_text())
    assert len(stored) == len(found)


def test_doctor_names_what_to_set(tmp_path: Path, mim: Mim, monkeypatch: Any) -> None:
    outcome = mim("doctor", "--quick", "--output", tmp_path, "--json", "-")
    checks = {check["name"]: check for check in json.loads(outcome.out)}
    assert outcome.code == 0
    assert checks["torch"]["state"] == "ok" and checks["disk"]["state"] == "ok"
    config = load_config(None, {"train.precision": "fp16"})

    def metadata_of(wanted: str) -> list[Check]:
        monkeypatch.setattr("mim.training.doctor.metadata.requires", lambda name: [wanted])
        return [
            c for c in examine(config, tmp_path / "a" / "b", quick=True) if c.state == "problem"
        ]

    import torch

    no_gpu = [] if torch.cuda.is_available() else ["train.precision"]
    assert [check.name for check in metadata_of("numpy>=1")] == no_gpu
    old = metadata_of("numpy>=999")[0]
    assert (old.name, old.advice) == ("numpy", "pip install 'numpy>=999'")
    absent = metadata_of("no-such-package")[0]
    assert absent.found == "not installed"


def test_doctor_times_the_loader(tmp_path: Path, monkeypatch: Any, tiny: Any) -> None:
    rates = {0: 100.0, 2: 300.0}
    monkeypatch.setattr("mim.training.doctor.os.cpu_count", lambda: 2)
    monkeypatch.setattr("mim.training.doctor._seconds", lambda *_: 1.0)
    monkeypatch.setattr(
        "mim.training.doctor._images_per_second", lambda _, data: rates[data.workers]
    )
    checks = {check.name: check for check in examine(load_config(tiny()), tmp_path)}
    assert checks["loader"].advice == "data.workers: 2" and checks["loader"].state == "warning"
    assert "100 images/s with 0 workers, 300 images/s with 2 workers" in checks["loader"].found
    rates[2] = 120.0
    checks = {check.name: check for check in examine(load_config(tiny()), tmp_path)}
    assert checks["loader"].advice == "" and checks["loader"].state == "ok"


@pytest.mark.parametrize(
    "kind, prefers, seconds, advice",
    [
        ("auto", True, (2.0, 1.0), ""),
        ("auto", False, (2.0, 1.0), "train.linear: onednn, and time it with mim bench step"),
        ("auto", True, (1.0, 2.0), "train.linear: torch, and time it with mim bench step"),
        ("onednn", False, (1.0, 2.0), "train.linear: torch, and time it with mim bench step"),
        ("torch", True, (1.2, 1.0), ""),
    ],
)
def test_doctor_times_linear_layers_both_ways(
    kind: str, prefers: bool, seconds: tuple[float, float], advice: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr("mim.training.doctor.torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("mim.training.doctor.has_onednn", lambda: True)
    monkeypatch.setattr("mim.core.cpu.linear.has_onednn", lambda: True)
    monkeypatch.setattr("mim.core.cpu.linear.mkl_lacks_avx512", lambda: prefers)
    told = iter((*seconds, 0.5))  # by torch, by oneDNN, in bfloat16
    monkeypatch.setattr("mim.training.doctor._seconds", lambda *_: next(told))
    linear, precision = _products(load_config(None, {"train.linear": kind}))
    assert (linear.advice, linear.state) == (advice, "warning" if advice else "ok")
    assert f"are {seconds[0] / seconds[1]:.1f} times as fast by oneDNN" in linear.found
    taken = seconds[1] if f"{kind} takes onednn" in linear.found else seconds[0]
    assert f"{taken / 0.5:.1f} times as fast in bfloat16" in precision.found


def test_doctor_reads_real_batches(tiny: Any) -> None:
    from mim.data import open_source
    from mim.training.doctor import _images_per_second

    config = load_config(tiny())
    assert _images_per_second(open_source(config.data, "train"), config.data) > 10


def test_completion_knows_verbs_and_settings(mim: Mim, tmp_path: Path) -> None:
    pytest.importorskip("shtab")
    outcome = mim("completion", "bash")
    script = tmp_path / "mim.bash"
    script.write_text(outcome.out)
    asked = (
        "source {script}; COMP_WORDS=({words}); COMP_CWORD={last}; _shtab_mim; "
        'echo "${{COMPREPLY[@]}}"'
    )

    def complete(*words: str) -> list[str]:
        text = asked.format(
            script=script, words=" ".join(f"'{w}'" for w in ("mim", *words)), last=len(words)
        )
        done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, timeout=60)
        return done.stdout.split()

    assert complete("com") == ["compare", "completion"]
    assert "--mask.ratio" in complete("pretrain", "--mask.r")
    assert "--base.mask.ratio" in complete("compare", "--base.mask.r")
    assert "--show" in complete("compare", "--sh")
    assert complete("visualize", "--gen") == ["--generators"]
    assert complete("bench", "step", "--ro") == ["--rounds"]
    assert "--data.path" in complete("data", "stats", "--data.pa")


def test_overview_tells_the_states(folder: Path) -> None:
    (folder / "regime=drop,seed=1" / "result.json").unlink()

    def shown(active: str, terminal: bool) -> str:
        stream = io.StringIO()
        system = "standard" if terminal else None
        console = Console(file=stream, width=140, force_terminal=terminal, color_system=system)
        console.print(overview(read_comparison(folder), {active}))
        return stream.getvalue()

    text = shown("regime=drop,seed=0", terminal=False)
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert "evaluating" in lines["regime=drop,seed=0"]
    assert "waiting" in lines["regime=drop,seed=1"]
    assert "failed" in lines["regime=zero,seed=1"]
    assert "[red]it[/] blew up" in lines["regime=zero,seed=1"], "a reason is text, not markup"
    assert "4 of 7 done" in text and "\x1b" not in text
    assert "\x1b[" in shown("", terminal=True)


def test_time_left_is_estimated_from_what_is_known(folder: Path) -> None:
    # Runs of drop and zero took 0.35 and 0.8 times 61.3 seconds, plus a second a seed.
    assert training_left(read_comparison(folder)) == 0, "a failed run will not train"
    zero = folder / "regime=zero,seed=1"
    (zero / "result.json").unlink()
    plan = json.loads((folder / "comparison.json").read_text())
    axes = {"model.regime.name": "zero", "seed": 1}
    plan["planned"] = [{"folder": zero.name, "kind": "run", "axes": axes, "seed": 1}]
    (folder / "comparison.json").write_text(json.dumps(plan))
    assert training_left(read_comparison(folder)) == pytest.approx(0.8 * 61.3)
    grid = overview(read_comparison(folder))
    assert "about 0:49 left" in str(grid.title)
    for path in folder.glob("regime=*/result.json"):  # each was evaluated in 10 seconds
        path.write_text(json.dumps({**json.loads(path.read_text()), "seconds": {"evaluate": 10}}))
    assert training_left(read_comparison(folder)) == pytest.approx(0.8 * 61.3 + 10)
    pixels = {"folder": "pixels", "kind": "pixels", "axes": {}, "seed": 0}
    waiting = json.dumps(plan | {"planned": [*plan["planned"], pixels]})
    (folder / "comparison.json").write_text(waiting)
    measured = (folder / "pixels/result.json").rename(folder / "measured.json")
    assert training_left(read_comparison(folder)) == pytest.approx(0.8 * 61.3 + 20)
    measured.rename(folder / "pixels/result.json")
    # Half way, at 100 images a second: 700 steps of 64 images are left.
    settings = "train: {epochs: 20}\ndata: {batch_size: 64}\n"
    (zero / "config.yaml").write_text(settings)
    line = {"step": 700, "epoch": 10, "loss": 0.5, "images_per_second": 100}
    (zero / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert training_left(read_comparison(folder)) == pytest.approx(448 + 10)
    # Nothing of its own group is known: it is taken for what the running one will need in all.
    (folder / "regime=drop,seed=0" / "result.json").unlink()
    (folder / "regime=drop,seed=1" / "result.json").unlink()
    (folder / "regime=zero,seed=0" / "result.json").unlink()
    for seed in (0, 1):
        axes = {"model.regime.name": "drop", "seed": seed}
        name = f"regime=drop,seed={seed}"
        plan["planned"].append({"folder": name, "kind": "run", "axes": axes, "seed": seed})
    (folder / "comparison.json").write_text(json.dumps(plan))
    assert training_left(read_comparison(folder)) == pytest.approx(448 + 2 * 896)


def test_closing_table_and_json(folder: Path) -> None:
    comparison = read_comparison(folder)
    heads, rows = closing_table(comparison)
    assert heads[:3] == ["Encoder", "n", "held-out loss"] and heads[-1].startswith("wall time")
    assert [row[0] for row in rows] == ["drop", "zero", "untrained encoder", "raw pixels"]
    assert rows[1][1] == "1 of 2"
    content = json.loads(json.dumps(as_json(comparison, folder / "report.html")))
    states = {run["name"]: (run["status"], run["reason"]) for run in content["runs"]}
    assert states["regime=zero,seed=1"] == ("failed", "[red]it[/] blew up")
    assert content["runs"][0]["measures"]["linear.accuracy"] > 0.9


def test_unknown_ways_to_show_are_refused(mim: Mim, tmp_path: Path) -> None:
    outcome = mim("compare", "--output", tmp_path / "cmp", "--show", "loud")
    assert outcome.code == 2 and "auto, live, plain, quiet" in outcome.line
    assert not (tmp_path / "cmp").exists()
    with pytest.raises(UserError, match="no run folder"):
        read_run(tmp_path)


def test_a_stage_is_told_in_lines_and_not_to_those_who_asked_for_quiet(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_silent", False)
    progress.stage("seed=0  evaluating: [knn]")
    assert capfd.readouterr() == ("", "seed=0  evaluating: [knn]\n")
    progress.silence()
    progress.stage("seed=0  evaluating: knn")
    assert capfd.readouterr() == ("", "")
