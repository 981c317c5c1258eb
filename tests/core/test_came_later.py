"""A setting with a new default that came later: an old run means what it meant."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mim.core.fields import Settings, add_block
from mim.core.settings import read_tree, to_yaml


@dataclass(frozen=True)
class One(Settings, where="part.one"):
    sharp: bool = field(default=True, metadata={"before": False})


@dataclass(frozen=True)
class Other(Settings, where="part.other"):
    sharp: bool = field(default=True, metadata={"before": False})


@dataclass(frozen=True)
class Part(Settings, where="part"):
    name: str = "one"


add_block(Part, "one", One)
add_block(Part, "other", Other)


@dataclass(frozen=True)
class Run(Settings):
    output: str = "none"
    resume: str = "never"
    size: float = field(default=0.5, metadata={"before": 1.0})
    part: Part = field(default_factory=Part)


OLD = "output: {}\nresume: never\npart:\n  name: one\n"
BEFORE, TODAY = (1.0, False, True), (0.5, True, True)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    (tmp_path / "checkpoints").mkdir()
    file = tmp_path / "config.yaml"
    file.write_text(OLD.format(tmp_path))
    return file


def settings_of(run: Any) -> tuple[float, bool, bool]:
    return run.size, run.part.one.sharp, run.part.other.sharp


def test_the_config_of_an_old_run(old: Path) -> None:
    assert settings_of(read_tree(Run, [old])) == BEFORE


def test_what_a_user_states_holds(old: Path) -> None:
    stated = {"size": 0.7, "part.one.sharp": True}
    assert settings_of(read_tree(Run, [old], stated)) == (0.7, True, True)


def test_a_config_that_a_user_writes_has_the_default_of_today(old: Path, tmp_path: Path) -> None:
    own = tmp_path / "own" / "config.yaml"
    own.parent.mkdir()
    own.write_text(old.read_text())
    assert settings_of(read_tree(Run, [own])) == TODAY
    # ... but where it goes on with an old run, unless it says otherwise.
    assert settings_of(read_tree(Run, [own], {"resume": "auto"})) == BEFORE
    stated = {"resume": "auto", "size": 0.5}
    assert settings_of(read_tree(Run, [own], stated)) == (0.5, False, True)


def test_a_run_of_today_says_all_of_it(old: Path) -> None:
    old.write_text(to_yaml(read_tree(Run, [], {"output": str(old.parent)})))
    assert settings_of(read_tree(Run, [old])) == TODAY
    assert settings_of(read_tree(Run, [], {"output": str(old.parent), "resume": "auto"})) == TODAY


def test_a_component_that_an_old_run_does_not_use_keeps_its_default(old: Path) -> None:
    old.write_text(old.read_text().replace("name: one", "name: other"))
    assert settings_of(read_tree(Run, [old])) == (1.0, True, False)
