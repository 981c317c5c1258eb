"""The command line: help, and every mistake in one line with exit code 2 and nothing lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from mim.cli.main import VERBS, main
from mim.training import checkpoint

Mim = Callable[..., Any]
Tiny = Callable[..., Path]


def test_help_lists_the_verbs(mim: Mim) -> None:
    outcome = mim("--help")
    assert outcome.code == 0 and not outcome.err
    for verb in ("pretrain", "evaluate", "compare", "report", "visualize", "bench", "export"):
        assert verb in VERBS
        assert f"  {verb} " in outcome.out
    assert mim().code == 2
    assert mim("--version").out.startswith("mim ")


@pytest.mark.parametrize(
    "verb, words",
    [
        ("pretrain", ["--config", "--mask.ratio", "Share of the patches that is hidden"]),
        ("compare", ["--axes", "--base.mask.ratio", "every combination is a run"]),
        ("evaluate", ["RUN", "--json", "@CHECKPOINT_FILE"]),
        ("report", ["folder"]),
        ("visualize", ["masks", "reconstruct", "attention", "--generators", "--ratios"]),
        ("bench", ["step", "grow", "data", "regime"]),
        ("export", ["--to", "--output"]),
    ],
)
def test_help_of_a_verb(verb: str, words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0
    out = " ".join(capfd.readouterr().out.split())
    assert all(word in out for word in words), out


def test_print_config_is_a_config(
    tmp_path: Path, tiny: Tiny, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["pretrain", "--config", str(tiny()), "--mask.ratio", "0.5", "--print_config"])
    assert end.value.code == 0
    printed = yaml.safe_load(capfd.readouterr().out)
    assert printed["mask"]["ratio"] == 0.5 and printed["data"]["source"] == "digits"


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from mim.cli.main import main; main(['--help']); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


# A value, and what the line must say.
BAD_SETTINGS = [
    ({"mask.ratio": 0.0}, "mask.ratio: 0.0 must lie between 0 and 1"),
    ({"mask.ratio": 1.0}, "mask.ratio: 1.0 must lie between 0 and 1"),
    ({"mask.ratio": -0.5}, "mask.ratio"),
    ({"mask.ratio": [0.8, 0.4]}, "mask.ratio"),
    ({"mask.ratio": "half"}, "mask.ratio"),
    ({"mask.name": "blok"}, "mask.name: 'blok' is not one of"),
    ({"model.backbone_args.patch_size": 3}, "patch"),
    ({"model.backbone": "vit_tyni_patch16_224"}, "vit_tiny_patch16_224"),
    ({"model.backbone": "resnet18"}, "resnet18"),
    ({"model.backbone_args.no_such": 3}, "no_such"),
    ({"model.decoder.name": "linear"}, "linear"),
    ({"model.regime.name": "dorp"}, "did you mean 'drop'"),
    ({"model.regime.zero.at": "pixel"}, "did you mean 'pixels'"),
    ({"model.target.name": "pixel"}, "did you mean 'pixels'"),
    ({"data.source": "digit"}, "did you mean 'digits'"),
    ({"data.source": "torchvision/NoSuch"}, "NoSuch"),
    ({"data.source": "imagefolder"}, "data.path"),
    ({"data.source": "imagefolder", "data.path": "/no/such/folder"}, "/no/such/folder"),
    ({"data.batch_size": 5000}, "data.batch_size: 5000 is more than the 1617"),
    ({"data.channels": 7}, "data.channels: 7"),
    ({"train.accumulate": 65}, "data.batch_size: 64 must be at least"),
    ({"train.precision": "int8"}, "train.precision: 'int8' is not one of"),
    ({"train.epochs": "many"}, "epochs"),
    ({"maks.ratio": 0.5}, "maks"),
    ({"mask.ratoi": 0.5}, "ratoi"),
    ({"seed": -1}, "seed: -1"),
    ({"plugins": ["no_such_module_here"]}, "no_such_module_here"),
]


@pytest.mark.parametrize("way", ["yaml", "command line"])
@pytest.mark.parametrize("bad, message", BAD_SETTINGS)
def test_a_bad_setting_is_one_line(
    bad: dict[str, Any], message: str, way: str, tmp_path: Path, mim: Mim, tiny: Tiny
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    if way == "yaml":
        args = ["--config", tiny(bad)]
    else:
        args = ["--config", tiny(), *(f"--{key}={json.dumps(v)}" for key, v in bad.items())]
        args = [str(arg).replace('="', "=").removesuffix('"') for arg in args]
    outcome = mim("pretrain", *args, "--output", run)
    assert outcome.code == 2
    assert outcome.line.startswith("mim: error: ")
    assert message in outcome.line
    assert len(outcome.line) < 1500
    assert (run / "notes.txt").read_text() == "mine"
    assert [path.name for path in run.iterdir()] == ["notes.txt"], "before any training"


def test_bad_config_files(tmp_path: Path, mim: Mim) -> None:
    missing = tmp_path / "none.yaml"
    assert "is not a file" in expect(mim("pretrain", "--config", missing), 2)
    assert "is not a file" in expect(mim("compare", "--config", missing), 2)
    assert "is not a file" in expect(mim("pretrain", "--config", tmp_path), 2)
    broken = tmp_path / "broken.yaml"
    for text in ("mask: {ratio: 0.5", "a: b: c", "mask:\n\t ratio: 1", "\x00"):
        broken.write_text(text)
        assert "broken.yaml cannot be read" in expect(mim("pretrain", "--config", broken), 2)
    for text in ("", "- 1\n- 2\n", "hello"):
        broken.write_text(text)
        assert "holds no mapping" in expect(mim("pretrain", "--config", broken), 2)
    broken.write_bytes(b"\xff\xfe\x00\x81")
    expect(mim("pretrain", "--config", broken), 2)
    for text, key in (("mask: 3", "mask: 3"), ("model: {regime: [1]}", "model.regime: [1]")):
        broken.write_text(text)
        assert f"{key} must be a mapping" in expect(mim("pretrain", "--config", broken), 2)
    broken.write_text("base: {data: }")
    assert "base.data: None must be" in expect(mim("compare", "--config", broken), 2)
    expect(mim("pretrain", "--config"), 2)


def expect(outcome: Any, code: int) -> str:
    assert outcome.code == code, outcome
    line: str = outcome.line
    return line


def test_bad_verbs_and_arguments(tmp_path: Path, mim: Mim) -> None:
    assert "did you mean 'pretrain'" in expect(mim("pretrian"), 2)
    assert "--no-such" in expect(mim("report", tmp_path, "--no-such"), 2)
    assert "required" in expect(mim("export", tmp_path), 2)
    assert "invalid choice" in expect(mim("visualize", "maps", tmp_path), 2)
    assert "positional" in expect(mim("pretrain", "positional"), 2)


def image_folder(path: Path, classes: dict[str, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (10, 10, 3), dtype=np.uint8)
    for name, count in classes.items():
        folder = path / "train" / name
        folder.mkdir(parents=True)
        for number in range(count):
            Image.fromarray(pixels + number).save(folder / f"{number:03d}.png")


FOLDER = {"data.source": "imagefolder", "data.batch_size": 8, "data.channels": 3}


def test_faults_of_an_image_folder(tmp_path: Path, mim: Mim, tiny: Tiny) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    image_folder(data, {"cats": 9, "dogs": 9})
    args = ("pretrain", "--config", tiny({**FOLDER, "data.path": str(data)}), "--output", run)
    (data / "train" / "empty").mkdir()
    assert "empty" in expect(mim(*args), 2)
    (data / "train" / "empty").rmdir()
    # Of so few images one may be unreadable, two are too many.
    victims = [data / "train" / "cats" / name for name in ("003.png", "004.png")]
    content = [victim.read_bytes() for victim in victims]
    for victim in victims:
        victim.write_bytes(b"no image")
    assert "003.png" in expect(mim(*args), 2)
    assert not list(run.glob("checkpoints/*")) and not (run / "metrics.jsonl").exists()
    # A header that is good and pixels that are not: seen when it is decoded, also in a worker.
    for victim, whole in zip(victims, content, strict=True):
        victim.write_bytes(whole[: len(whole) // 2])
    for workers in (0, 2):
        again = mim(*args[:-1], tmp_path / f"run{workers}", "--data.workers", workers)
        assert "003.png" in expect(again, 2)
    victims[0].write_bytes(content[0])
    assert mim(*args).code == 0


def test_labels_missing_for_an_evaluation(tmp_path: Path, mim: Mim, tiny: Tiny) -> None:
    plugin, run = tmp_path / "unlabelled.py", tmp_path / "run"
    plugin.write_text(
        "from mim.data import SOURCES\n"
        "from mim.data.sources.embedded import Digits\n"
        "@SOURCES.register('unlabelled')\n"
        "class Unlabelled(Digits):\n"
        "    def __init__(self, config, split):\n"
        "        super().__init__(config, split)\n"
        "        self.labels, self.classes = None, []\n"
    )
    config = tiny({"data.source": "unlabelled", "plugins": [str(plugin)]})
    assert mim("pretrain", "--config", config, "--output", run).code == 0
    before = (run / "result.json").read_text()
    assert "label" in expect(mim("evaluate", "knn", run), 2)
    assert "label" in expect(mim("evaluate", "linear", run), 2)
    assert (run / "result.json").read_text() == before
    # A comparison says so before it trains.
    compare = tmp_path / "compare.yaml"
    tree = {"output": str(tmp_path / "cmp"), "base": yaml.safe_load(config.read_text())}
    compare.write_text(yaml.safe_dump(tree))
    assert "label" in expect(mim("compare", "--config", compare), 2)
    assert not list((tmp_path / "cmp").iterdir())


def unwritable(tmp_path: Path) -> list[Path]:
    (tmp_path / "file").write_text("mine")
    return [tmp_path / "file" / "run", tmp_path / "file", Path("/proc/mim/run")]


def test_an_unwritable_output(tmp_path: Path, mim: Mim, tiny: Tiny) -> None:
    run = tmp_path / "run"
    assert mim("pretrain", "--config", tiny(), "--output", run).code == 0
    for place in unwritable(tmp_path):
        line = expect(mim("pretrain", "--config", tiny(), "--output", place), 2)
        assert line.startswith("mim: error: output: cannot write to") and str(place) in line
        assert str(place) in expect(mim("compare", "--output", place), 2)
        exported = place / "encoder.safetensors"
        assert "--output" in expect(mim("export", run, "--output", exported), 2)
        picture = place / "masks.png"
        assert "--output" in expect(mim("visualize", "masks", run, "--output", picture), 2)
        assert "--json" in expect(mim("evaluate", "knn", run, "--json", place / "a.json"), 2)
        bench = ("bench", "step", "--config", tiny(), "--json", place / "a.json")
        assert "--json" in expect(mim(*bench), 2)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_resume_from_another_model(tmp_path: Path, mim: Mim, tiny: Tiny) -> None:
    run = tmp_path / "run"
    args = ("pretrain", "--config", tiny(), "--output", run)
    assert mim(*args).code == 0
    (run / "result.json").unlink()  # as if it had been killed
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for change in (
        "--model.backbone_args.depth=2",
        "--model.regime.name=token",
        "--model.decoder.transformer.width=32",
        "--data.source=mnist5k",
        "--optim.base_lr=1",
    ):
        line = expect(mim(*args, "--resume", "auto", change), 2)
        assert change.partition("=")[0].strip("-") in line and "Choose another output" in line
        assert f"--config {run / 'config.yaml'} --resume auto" in line
    path = checkpoint.checkpoints(run)[-1]
    path.write_bytes(before[path][:1000])
    assert "no sound checkpoint" in expect(mim(*args, "--resume", "auto"), 2)
    assert path.name in expect(mim(*args, "--resume", "auto"), 2)
    path.write_bytes(before[path])
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_what_is_no_run(tmp_path: Path, mim: Mim, tiny: Tiny) -> None:
    assert "no config.yaml" in expect(mim("visualize", "reconstruct", tmp_path), 2)
    assert "no config.yaml" in expect(
        mim("export", tmp_path, "--output", tmp_path / "e.safetensors"), 2
    )
    assert "no config.yaml" in expect(mim("evaluate", "knn", tmp_path), 2)
    assert "comparison.json" in expect(mim("report", tmp_path), 2)
    assert "no run folder" in expect(mim("evaluate", "knn", tmp_path / "none"), 2)
    assert "did you mean 'knn'" in expect(mim("evaluate", "kn", tmp_path), 2)
    assert "--set" in expect(mim("evaluate", "knn", tmp_path, "--set", "k"), 2)
    assert "--timeout" in expect(mim("evaluate", "knn", tmp_path, "--timeout", 0), 2)
    assert "--images" in expect(mim("visualize", "masks", tmp_path, "--images", 0), 2)
    assert ".safetensors" in expect(mim("export", tmp_path, "--output", tmp_path / "e.pt"), 2)
    assert "regimes" in expect(mim("bench", "step", "--config", tiny(), "--regimes", "x"), 2)
    assert "at least 1" in expect(mim("bench", "step", "--config", tiny(), "--rounds", 0), 2)
    assert "not a run folder" in expect(mim("visualize", "reconstruct", tiny()), 2)
    assert "not a run folder" in expect(mim("visualize", "attention", tiny()), 2)
    for what, options in {
        "masks": ("--indices", 3),
        "attention": ("--ratios", 0.5),
        "algebra": ("--json", tmp_path / "x.json"),
    }.items():
        message = f"{options[0]}: has no meaning for visualize {what}"
        assert message in expect(mim("visualize", what, tiny(), *options), 2)
    for option in ("--output", "--json"):
        assert "is a folder" in expect(mim("visualize", "masks", tiny(), option, tmp_path), 2)
    line = expect(mim("visualize", "reconstruct", tiny(), "--indices", "1.5"), 2)
    assert "--indices: '1.5' is no list of whole numbers" in line
    wrong = {
        ("--ratios", "half"): "--ratios: 'half' is no list of numbers",
        ("--generators", "blok"): "did you mean 'block'",
        ("--ratios", "1.5"): "no generator fits; mask.ratio: 1.5",
        ("--generators", "file"): "mask.file.path",
    }
    for options, message in wrong.items():
        assert message in expect(mim("visualize", "masks", tiny(), *options), 2)


def test_masks_from_files_are_asked_for_before_training_and_not_after(
    tmp_path: Path, mim: Mim, tiny: Tiny
) -> None:
    rng = np.random.default_rng(0)
    for part, count in (("train", 5), ("val", 2)):
        for index in range(count):
            for kind in ("cat", "dog"):
                image = tmp_path / "data" / part / kind / f"{index}.png"
                image.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(image)
                mask = tmp_path / "masks" / part / kind / f"{index}.npy"
                mask.parent.mkdir(parents=True, exist_ok=True)
                np.save(mask, np.eye(4, dtype=bool))
    changes = {
        "data.source": "imagefolder",
        "data.path": str(tmp_path / "data"),
        "data.batch_size": 4,
        "data.augment": "none",
        "mask.name": "file",
        "mask.file.path": str(tmp_path / "masks"),
        "train.max_steps": 2,
    }
    run, gone = tmp_path / "run", tmp_path / "masks" / "train" / "dog" / "3.npy"
    gone.rename(tmp_path / "aside.npy")
    line = expect(mim("pretrain", "--config", tiny(changes), "--output", run), 2)
    assert "mask.file.path" in line and "1 of 10 images" in line and "train/dog/3.png" in line
    assert not (run / "config.yaml").exists()
    (tmp_path / "aside.npy").rename(gone)
    assert mim("pretrain", "--config", tiny(changes), "--output", run).code == 0
    # What was trained needs no masks any more.
    (tmp_path / "masks").rename(tmp_path / "elsewhere")
    assert mim("export", run, "--output", tmp_path / "encoder.safetensors").code == 0
    settings = ("--set", "k=[1]", "few_shot=[]", "temperature=[0.1]")
    assert mim("evaluate", "knn", run, *settings).code == 0


def test_the_other_verbs_work(tmp_path: Path, mim: Mim, tiny: Tiny) -> None:
    run = tmp_path / "run"
    assert mim("pretrain", "--config", tiny({"mask.ratio": 0.5}), "--output", run).code == 0
    before = checkpoint.read_result(run)

    # evaluate: numbers in the result, next to what was there.
    settings = ("--set", "k=[5]", "few_shot=[]", "temperature=[0.1]")
    numbers = tmp_path / "new" / "numbers.json"
    outcome = mim("evaluate", "knn", run, "--json", numbers, *settings)
    assert outcome.code == 0 and "k-NN, accuracy (%)\t" in outcome.out
    result = checkpoint.read_result(run)
    assert before.items() <= result.items()
    assert json.loads(numbers.read_text())[str(run)]["knn"] == result["evaluations"]["knn"]
    file = run / "encoder.safetensors"
    others = ("untrained", "pixels", f"vit_tiny_patch16_224@{file}")
    outcome = mim("evaluate", "knn", *others, "--like", run, "--json", numbers, *settings)
    assert outcome.code == 0, outcome.err
    found = json.loads(numbers.read_text())
    assert found[others[2]]["knn"] == result["evaluations"]["knn"], "the same weights"
    assert found["untrained"]["knn"] != found["pixels"]["knn"]

    # visualize: see tests/training/test_visualize.py for what is drawn.
    sheet, statistics = tmp_path / "new" / "masks.png", tmp_path / "new" / "masks.json"
    chosen = ("--generators", "random,column", "--ratios", "0.5,0.75", "--json", statistics)
    assert mim("visualize", "masks", run, *chosen, "--output", sheet).code == 0
    assert Image.open(sheet).format == "PNG"
    rows = json.loads(statistics.read_text())["masks"]
    names = [(row["generator"], row["ratio"], row["ratio_mean"]) for row in rows]
    assert names == [(n, r, r) for n in ("random", "column") for r in (0.5, 0.75)]
    assert mim("visualize", "masks", tiny(), "--images", 1).code == 0
    assert (tmp_path / "masks.png").is_file()
    assert mim("visualize", "reconstruct", run, "--images", 2).code == 0
    assert mim("visualize", "attention", run, "--indices", "3,5").code == 0
    assert mim("visualize", "algebra", run).code == 0 and (run / "algebra.png").is_file()
    assert (run / "reconstruct.png").is_file() and (run / "attention.png").is_file()

    # bench: a row a regime.
    outcome = mim(
        "bench", "step", "--config", tiny(), "--rounds", 1, "--steps", 1, "--data.batch_size", 4,
        "--regimes", "drop,token", "--json", numbers,
    )  # fmt: skip
    assert outcome.code == 0 and "| drop |" in outcome.out and "| token |" in outcome.out
    figures = json.loads(numbers.read_text())
    assert figures["batch_size"] == 4 and set(figures["regimes"]) == {"drop", "token"}
    tokens = {name: row["encoder_tokens"] for name, row in figures["regimes"].items()}
    assert tokens == {"drop": 5, "token": 17}
    for row in figures["regimes"].values():
        assert row["slowest"] <= row["images_per_second"] <= row["fastest"]


@pytest.mark.slow
def test_as_a_command_of_its_own(tmp_path: Path, tiny: Tiny) -> None:
    def call(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mim", *args]
        return subprocess.run(
            command, cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, timeout=240
        )

    done = call("pretrain", "--config", str(tiny()), "--output", "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("run: 6 steps")
    done = call("pretrain", "--config", str(tiny()), "--output", "run", "--mask.ratio", "2")
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mim", "recipes"]
    gone, output = os.pipe()
    os.close(gone)
    ended = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(output)
    assert ended.returncode == 128 + signal.SIGPIPE
    assert ended.stderr == ""
