"""A comparison in miniature through the command line; what happens when a part of it fails."""

from __future__ import annotations

import csv
import json
import multiprocessing
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mim.cli.main import main
from mim.compare.runner import SERVER_MODULES, plan, read_compare_config
from mim.core.errors import UserError
from mim.training import checkpoint

Mim = Callable[..., Any]

PROBES = {
    "knn": {"k": [5], "few_shot": [], "temperature": [0.1]},
    "linear": {"strengths": [0.01], "few_shot": [5], "draws": 2, "few_shot_strengths": [0.1]},
}
REGIMES = ("drop", "zero", "token")
SLOW = """
import time
import mim.training.pretrain

real = mim.training.pretrain.image_keys

def slow(*args, **kwargs):
    time.sleep(0.1)
    return real(*args, **kwargs)

mim.training.pretrain.image_keys = slow
"""


@pytest.fixture
def write(tmp_path: Path, tiny_tree: Callable[..., dict[str, Any]]) -> Callable[..., Path]:
    def write(
        axes: Mapping[str, Any],
        base: Mapping[str, Any] | None = None,
        evaluations: Mapping[str, Any] | None = None,
    ) -> Path:
        path = tmp_path / "compare.yaml"
        content = {
            "output": str(tmp_path / "cmp"),
            "name": "in miniature",
            "axes": dict(axes),
            "evaluations": dict(PROBES if evaluations is None else evaluations),
            "base": tiny_tree({"train.max_steps": 3, **(base or {})}),
        }
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write


def stamps(folder: Path) -> dict[str, int]:
    """When each file of the runs was written."""
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file() and (folder / path.relative_to(folder).parts[0] / "result.json").is_file()
    }


def results(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/result.json")}


def test_three_regimes_and_two_seeds(tmp_path: Path, mim: Mim, write: Callable[..., Path]) -> None:
    config = write({"model.regime.name": list(REGIMES), "seed": [0, 1]})
    folder = tmp_path / "cmp"
    outcome = mim("compare", "--config", config)
    assert outcome.code == 0, outcome.err
    assert str(folder / "report.html") in outcome.out

    with (folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) >= {"run", "model.regime.name", "seed", "val_loss", "train_loss"}
    assert set(rows[0]) >= {"encoder_tokens", "flops_forward", "images_per_second", "wall_seconds"}
    assert any(column.startswith("linear.") for column in rows[0])
    assert any(column.startswith("knn.") for column in rows[0])
    trained = [row for row in rows if row["model.regime.name"]]
    assert {(row["model.regime.name"], row["seed"]) for row in trained} == {
        (regime, seed) for regime in REGIMES for seed in "01"
    }
    assert len(rows) - len(trained) == 3, "untrained for each seed, pixels once"
    page = (folder / "report.html").read_text()
    assert "in miniature" in page and "data:image/" in page and "raw pixels" in page
    assert "in miniature" in (folder / "report.md").read_text()

    found = results(folder)
    assert len(found) == 9
    assert {result["status"] for result in found.values()} == {"finished"}
    drop, zero, token = (found[f"regime={regime},seed=0"] for regime in REGIMES)
    # drop and zero are the same function of the visible patches; drop pays for 5 tokens, not 17.
    assert (drop["encoder_tokens"], token["encoder_tokens"]) == (5, 17)
    assert drop["flops_forward"] < zero["flops_forward"] <= token["flops_forward"]
    assert len({result["data"]["fingerprint"] for result in (drop, zero, token)}) == 1
    assert found["untrained,seed=0"]["evaluations"] != found["untrained,seed=1"]["evaluations"]

    # A second call does nothing.
    before = stamps(folder)
    outcome = mim("compare", "--config", config)
    assert outcome.code == 0
    assert outcome.err.count(": done") == 9
    assert stamps(folder) == before
    (folder / "report.html").unlink()
    assert mim("report", folder).code == 0
    assert (folder / "report.html").is_file()
    assert stamps(folder) == before
    # Other settings train nothing, and evaluations that are no longer named are kept.
    axes = {"model.regime.name": list(REGIMES), "seed": [0, 1]}
    write(axes, evaluations={"knn": PROBES["knn"] | {"k": [3]}})
    outcome = mim("compare", "--config", config)
    assert outcome.code == 0 and outcome.err.count(": evaluate") == 9
    assert outcome.err.count(": knn is measured again: other settings") == 9
    assert "linear is measured" not in outcome.err
    changed = {name for name, stamp in stamps(folder).items() if before[name] != stamp}
    assert {name.rpartition("/")[2] for name in changed} <= {
        "result.json",
        "config.yaml",
        "predictions.npz",
    }
    again = results(folder)
    assert all(
        again[run]["evaluations"]["linear"] == found[run]["evaluations"]["linear"] for run in found
    )
    assert all(again[run]["evaluation_settings"]["knn"]["k"] == [3] for run in found)

    # Another value is another comparison; nothing is lost.
    before = stamps(folder)
    outcome = mim("compare", "--config", config, "--base.mask.ratio", "0.5")
    assert outcome.code == 2
    assert "mask.ratio was 0.75 and is 0.5" in outcome.line
    assert stamps(folder) == before


def test_all_regimes_start_from_the_same_weights(write: Callable[..., Path]) -> None:
    from mim.model import build_model

    config = write({"model.regime.name": list(REGIMES), "seed": [0, 1]})
    planned = plan(read_compare_config(["--config", str(config)]))
    models = {item.folder: build_model(item.config) for item in planned if item.kind == "run"}
    for seed in (0, 1):
        states = [models[f"regime={regime},seed={seed}"].state_dict() for regime in REGIMES]
        for other in states[1:]:
            shared = states[0].keys() & other.keys()
            assert {name for name in shared if name.startswith("backbone.")}
            assert {name for name in shared if name.startswith("decoder.")}
            assert all(torch.equal(states[0][name], other[name]) for name in shared)
    name = "backbone.blocks.0.attn.qkv.weight"
    one, two = (models[f"regime=drop,seed={seed}"].state_dict()[name] for seed in (0, 1))
    assert not torch.equal(one, two)
    (reference,) = (item for item in planned if item.folder == "untrained,seed=0")
    from mim.evaluate import untrained_encoder

    vit = untrained_encoder(reference.config).vit
    assert vit is not None
    start = models["regime=token,seed=0"].backbone.state_dict()
    assert all(torch.equal(value, start[name]) for name, value in vit.state_dict().items())


def test_a_failed_run_does_not_stop_the_others(
    tmp_path: Path, mim: Mim, write: Callable[..., Path]
) -> None:
    folder = tmp_path / "cmp"
    evaluations = {"knn": PROBES["knn"]}
    config = write({"optim.base_lr": [1e30, 1e-3]}, evaluations=evaluations)
    outcome = mim("compare", "--config", config)
    assert outcome.code == 1
    assert "Traceback" not in outcome.err
    assert "1 of 4 failed" in outcome.err and "base_lr=1e+30" not in outcome.out
    found = {result["axes"].get("optim.base_lr"): result for result in results(folder).values()}
    assert found[1e30]["status"] == "failed" and "loss is" in found[1e30]["error"]
    assert found[1e-3]["status"] == "finished"
    assert "loss is" in (folder / "report.md").read_text()
    before = stamps(folder)
    assert mim("compare", "--config", config).code == 1, "it is tried again"
    good = {name: stamp for name, stamp in before.items() if "1e_30" not in name}
    assert good.items() <= stamps(folder).items()


def test_an_evaluation_that_fails_after_training_loses_no_training(
    tmp_path: Path, mim: Mim, write: Callable[..., Path]
) -> None:
    plugin = tmp_path / "flaky.py"
    plugin.write_text(
        "from pathlib import Path\n"
        "from mim.evaluate.base import EVALUATIONS\n"
        "from mim.evaluate.probes.knn import Knn\n"
        "from mim.masks.generators import MASKS, RandomMask\n"
        "@MASKS.register('mine')\n"
        "class Mine(RandomMask):\n"
        "    pass\n"
        "@EVALUATIONS.register('flaky')\n"
        "class Flaky(Knn):\n"
        "    def run(self, train, val):\n"
        f"        if not Path({str(tmp_path / 'mended')!r}).exists():\n"
        "            raise RuntimeError('flaky')\n"
        "        return super().run(train, val)\n"
    )
    folder, run = tmp_path / "cmp", tmp_path / "cmp" / "regime=drop"
    base = {"plugins": [str(plugin)], "mask.name": "mine"}
    config = write({"model.regime.name": ["drop"]}, base, {"flaky": PROBES["knn"]})
    assert mim("compare", "--config", config).code == 1
    result = checkpoint.read_result(run)
    assert result["status"] == "failed" and "RuntimeError: flaky" in result["error"]
    weights = (run / "checkpoints" / "step_00000003.pt").stat().st_mtime_ns
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (tmp_path / "mended").touch()
    assert mim("compare", "--config", config).code == 0
    result = checkpoint.read_result(run)
    assert (run / "checkpoints" / "step_00000003.pt").stat().st_mtime_ns == weights
    assert result["train_loss"] == losses[-2]["loss"]
    assert result["val_loss"] == losses[-1]["val_loss"]
    assert result["evaluations"]["flaky"]
    assert folder.joinpath("report.html").is_file()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_interrupted_comparison_goes_on(
    number: signal.Signals, tmp_path: Path, mim: Mim, write: Callable[..., Path]
) -> None:
    plugin = tmp_path / "slow.py"
    plugin.write_text(SLOW)
    folder = tmp_path / "cmp"
    base = {"train.max_steps": 25, "train.checkpoint_every": 0.08, "train.log_every": 1}
    axes, evaluations = {"seed": [0]}, {"knn": PROBES["knn"]}
    config = write(axes, {**base, "plugins": [str(plugin)]}, evaluations)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SERVER_MODULES)
    process = context.Process(target=main, args=(["compare", "--config", str(config)],))
    process.start()
    run = folder / "seed=0"
    end = time.monotonic() + 120
    while not checkpoint.checkpoints(run):
        assert process.is_alive() and time.monotonic() < end
        time.sleep(0.05)
    assert process.pid is not None
    if number == signal.SIGKILL:
        process.kill()
    else:
        process.terminate()
    process.join(60)
    # The run itself is another process: it saves and stops, and nobody else writes there.
    sizes = [-1, (run / "metrics.jsonl").stat().st_size]
    while sizes[-1] != sizes[-2]:
        time.sleep(0.6)
        sizes.append((run / "metrics.jsonl").stat().st_size)
        assert len(sizes) < 6, "it still trains"
    saved = checkpoint.read_checkpoint(checkpoint.checkpoints(run)[-1])["step"]
    assert 0 < saved < 25
    assert not (run / "result.json").exists()

    config = write(axes, base, evaluations)
    assert mim("compare", "--config", config).code == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 26))
    assert results(folder)["seed=0"]["steps"] == 25


@pytest.mark.parametrize(
    "axes, message",
    [
        ({"model.regime.nam": ["drop"]}, "did you mean 'model.regime.name'"),
        ({"output": ["a", "b"]}, "cannot vary"),
        ({"mask.ratio": 0.5}, "axes"),
        ({"mask.ratio": []}, "must be a list"),
        ({"seed": [1, 1]}, "names a value twice"),
        ({"mask.ratio": [0.5, 1.5]}, "mask.ratio: 1.5 must lie between 0 and 1"),
        ({"model.decoder.name": ["transformer", "linear"]}, "linear"),
        ({"model.regime.name": ["drop", "hide"]}, "'hide' is not one of drop, token, zero"),
        ({"model.backbone_args.patch_size": [2, 3]}, "patch"),
    ],
)
def test_bad_axes_stop_before_any_training(
    axes: dict[str, Any], message: str, tmp_path: Path, mim: Mim, write: Callable[..., Path]
) -> None:
    outcome = mim("compare", "--config", write(axes))
    assert outcome.code == 2
    assert message in outcome.line
    folder = tmp_path / "cmp"
    assert not folder.exists() or not list(folder.iterdir())


@pytest.mark.parametrize(
    "evaluations, message",
    [
        ({"kn": {}}, "did you mean 'knn'"),
        ({"knn": {"kk": 3}}, "kk"),
        ({"linear": {"pool": "max"}}, "evaluations.linear.pool"),
        ({"linear": 3}, "evaluations.linear: 3 must be a mapping"),
        ({"robustness": {"classifier": "finetune"}}, "needs a fine-tuned classifier"),
    ],
)
def test_bad_evaluations_stop_before_any_training(
    evaluations: dict[str, Any], message: str, tmp_path: Path, mim: Mim, write: Callable[..., Path]
) -> None:
    config = write({"seed": [0]}, evaluations=evaluations)
    for more in ((), ("--plan",)):
        outcome = mim("compare", "--config", config, *more)
        assert outcome.code == 2
        assert message in outcome.line
        assert not list((tmp_path / "cmp").iterdir())


@pytest.mark.parametrize(
    "setting, message",
    [
        (("--primary", "knn.acuracy"), "'knn.acuracy' is not one of knn.accuracy (did you mean"),
        (("--primary", "linear.accuracy_7_per_class"), "linear.accuracy_5_per_class"),
        (("--against", "drp"), "against: 'drp' is not one of drop, token"),
        (("--budget_of", "drp"), "budget_of: 'drp' is not one of drop, token"),
        (
            (
                "--against",
                "drop",
                "--axes",
                json.dumps({"model.regime.name": ["drop"], "mask.ratio": [0.5, 0.6]}),
            ),
            "against: 'drop' is the value of 2 groups",
        ),
        (
            ("--primary", "linear.accuracy_5_per_class", "--seeds", json.dumps({"most": 4})),
            "name axes.seed",
        ),
    ],
)
def test_names_of_measures_and_groups_are_checked_by_the_plan(
    setting: tuple[str, ...], message: str, mim: Mim, write: Callable[..., Path]
) -> None:
    config = write({"model.regime.name": ["drop", "token"]})
    outcome = mim("compare", "--config", config, "--plan", *setting)
    assert outcome.code == 2
    assert message in outcome.line


def test_the_plan(tmp_path: Path, write: Callable[..., Path]) -> None:
    axes = {
        "model.regime.name": ["drop", "token"],
        "model.backbone_args.depth": [1, 2],
        "mask.ratio": [0.5, [0.25, 0.75]],
        "seed": [0, 1],
    }
    planned = plan(read_compare_config(["--config", str(write(axes))]))
    runs = [item for item in planned if item.kind == "run"]
    assert len(runs) == 16 and len({item.folder for item in planned}) == len(planned)
    assert runs[0].folder == "regime=drop,depth=1,ratio=0.5,seed=0"
    assert runs[2].config.mask.ratio == (0.25, 0.75)
    assert {item.config.model.backbone_args["depth"] for item in runs} == {1, 2}
    assert all(item.config.output == str(tmp_path / "cmp" / item.folder) for item in planned)
    assert all(item.config.resume == "auto" for item in runs)
    # References: the encoder and the seed count, regime and ratio do not.
    untrained = [item.axes for item in planned if item.kind == "untrained"]
    assert untrained == [
        {"model.backbone_args.depth": depth, "seed": seed} for depth in (1, 2) for seed in (0, 1)
    ]
    assert [item.axes for item in planned if item.kind == "pixels"] == [{}]
    nothing = plan(read_compare_config(["--config", str(write(axes, evaluations={}))]))
    assert {item.kind for item in nothing} == {"run"}, "no evaluation, no reference to evaluate"


VARIANTS = {
    "zero, read": {"model.regime.name": "zero", "model.regime.zero.attend_mask": False},
    "zero": {"model.regime.name": "zero"},
    "token": {"model.regime.name": "token"},
}


def with_variants(path: Path, variants: Any) -> Path:
    content = yaml.safe_load(path.read_text()) | {"variants": variants}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_variants_are_settings_that_change_together(write: Callable[..., Path]) -> None:
    path = with_variants(write({"seed": [0, 1]}), VARIANTS)
    planned = plan(read_compare_config(["--config", str(path)]))
    runs = [item for item in planned if item.kind == "run"]
    assert [item.folder for item in runs[:3]] == [
        "variant=zero__read,seed=0",
        "variant=zero__read,seed=1",
        "variant=zero,seed=0",
    ]
    regimes = [(r.config.model.regime.name, r.config.model.regime.zero.attend_mask) for r in runs]
    assert regimes[::2] == [("zero", False), ("zero", True), ("token", True)]
    # The encoder is the same in all: one reference a seed.
    assert [item.axes for item in planned if item.kind == "untrained"] == [{"seed": 0}, {"seed": 1}]
    deeper = {"one": {"model.backbone_args.depth": 1}, "two": {"model.backbone_args.depth": 2}}
    planned = plan(read_compare_config(["--config", str(with_variants(path, deeper))]))
    assert [item.axes for item in planned if item.kind == "untrained"] == [
        {"variant": name, "seed": seed} for name in deeper for seed in (0, 1)
    ]
    assert [item.axes for item in planned if item.kind == "pixels"] == [{}]


def test_variants_in_the_report(tmp_path: Path, mim: Mim, write: Callable[..., Path]) -> None:
    path = with_variants(write({"seed": [0]}, evaluations={}), VARIANTS)
    assert mim("compare", "--config", path).code == 0
    with (tmp_path / "cmp" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == list(VARIANTS)
    report = (tmp_path / "cmp" / "report.md").read_text()
    assert "| zero, read | model.regime.zero.attend\\_mask | true | false |" in report
    # Called again, nothing is trained; a changed variant is not silently reused.
    assert "done" in mim("compare", "--config", path).err
    changed = VARIANTS | {"token": {"model.regime.name": "drop"}}
    outcome = mim("compare", "--config", with_variants(path, changed))
    assert outcome.code == 2 and "model.regime.name" in outcome.line


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ({"a": {"mask.ration": 0.5}}, "did you mean 'mask.ratio'"),
        ({"a": {"seed": 3}}, "variants.a: 'seed' is an axis already"),
        ({"a": {"output": "x"}}, "each run has its own folder"),
        ({"a": {"mask.ratio": 1.5}}, "mask.ratio: 1.5"),
    ],
    ids=str,
)
def test_bad_variants_are_named(
    variants: Any, message: str, mim: Mim, write: Callable[..., Path]
) -> None:
    outcome = mim("compare", "--config", with_variants(write({"seed": [0]}), variants))
    assert outcome.code == 2
    assert message in outcome.line


def test_long_labels_fit_a_file_system(write: Callable[..., Path]) -> None:
    values = [f"/a/long/path/{'x' * 150}/{name}" for name in "ab"]
    planned = plan(
        read_compare_config(["--config", str(write({"data.path": values}, evaluations={}))])
    )
    names = [item.folder for item in planned]
    assert len(set(names)) == 2 and all(len(name) < 130 and "/" not in name for name in names)


def test_runs_that_would_share_a_folder_are_refused(write: Callable[..., Path]) -> None:
    config = write({"log.project": ["a b", "a_b"]})
    with pytest.raises(UserError, match="share a folder"):
        plan(read_compare_config(["--config", str(config)]))


def test_changed_images_are_noticed(tmp_path: Path, write: Callable[..., Path]) -> None:
    """Runs that are there were over the images that were there: others are refused."""
    from dataclasses import replace

    from mim.compare import plan as planning
    from mim.compare import runner as compare
    from mim.core.files import write_text_atomic
    from mim.core.settings import to_yaml

    config = read_compare_config(["--config", str(write({"seed": [0, 1]}, evaluations={}))])
    held = planning.hold_to_images(plan(config), config.evaluations)
    prints = {item.config.data.fingerprint for item in held}
    assert len(prints) == 1 and None not in prints  # every run is held to the same images
    run = Path(held[0].config.output)
    run.mkdir(parents=True)
    for fingerprint, fits in ((None, True), (*prints, True), ("of other images", False)):
        data = replace(held[0].config.data, fingerprint=fingerprint)
        write_text_atomic(run / "config.yaml", to_yaml(replace(held[0].config, data=data)))
        if fits:
            assert compare._state(held[0], {}, {}, {}).todo == "train"
        else:
            with pytest.raises(UserError, match="holds a run over other images"):
                compare._state(held[0], {}, {}, {})
    wanted = replace(config.base, data=replace(config.base.data, fingerprint="of other images"))
    with pytest.raises(UserError, match=r"^data\.fingerprint: 'of other images' asks for other"):
        asked = replace(config, base=wanted)
        planning.hold_to_images(plan(asked), asked.evaluations)
