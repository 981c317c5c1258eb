"""Two hosts, as network namespaces of this machine: one is cut off in the middle."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mim.training import checkpoint

Mim = Callable[..., Any]
Tiny = Callable[..., Path]
LAUNCH = Path(__file__).resolve().parents[2] / "scripts" / "launch"
pytestmark = pytest.mark.slow  # each process imports the libraries

TIMEOUT = 4.0
# Rank 1 says when it is in its third step, and waits there for the cable to be cut.
PLUGIN = """
import os, time
from pathlib import Path
import mim.training.pretrain

keys, calls, mark = mim.training.pretrain.image_keys, 0, Path({mark!r})

def noted(*args, **kwargs):
    global calls
    calls += 1
    if calls == 3 and os.environ["RANK"] == "1" and not mark.exists():
        mark.touch()
        while not mark.with_name("cut").exists():
            time.sleep(0.01)
    return keys(*args, **kwargs)

mim.training.pretrain.image_keys = noted
"""


@dataclass(frozen=True)
class Hosts:
    """Two namespaces joined by a cable.

    Attributes:
        names: of the namespaces.
        address: of the first.
        cable: the device in each.
    """

    names: tuple[str, str]
    address: str
    cable: str

    def plug(self, state: str) -> None:
        """Pull the second host's cable (down), or put it back (up)."""
        ip("-n", self.names[1], "link", "set", self.cable, state)


def ip(*args: str) -> None:
    done = subprocess.run(["ip", *args], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no network namespaces here: ip {' '.join(args)}: {done.stderr.strip()}")


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if sys.platform != "linux" or shutil.which("ip") is None:
        pytest.skip("needs Linux and ip")
    first, second = (f"mim{os.getpid()}{letter}" for letter in "ab")
    try:
        for name in (first, second):
            ip("netns", "add", name)
        ip("-n", first, "link", "add", "cable", "type", "veth", "peer", "cable", "netns", second)
        for name, address in ((first, "10.77.0.1/24"), (second, "10.77.0.2/24")):
            ip("-n", name, "addr", "add", address, "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield Hosts((first, second), "10.77.0.1", "cable")
    finally:
        for name in (first, second):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.fixture
def launcher(tmp_path: Path, hosts: Hosts) -> Callable[..., subprocess.Popen[str]]:
    """Starts hosts.sh or torchrun.sh over both hosts."""
    connect = tmp_path / "connect"
    connect.write_text('#!/bin/sh\nexec ip netns exec "$1" bash -c "$2"\n')
    connect.chmod(connect.stat().st_mode | stat.S_IXUSR)
    listed = tmp_path / "hosts.txt"
    listed.write_text("# name, processes\n" + "".join(f"{name} 1\n" for name in hosts.names))
    both = tmp_path / "torchrun.sh"
    both.write_text(
        "#!/bin/bash\npids=()\n"
        + "".join(
            f"NODE_RANK={rank} ip netns exec {name} bash {LAUNCH / 'torchrun.sh'} "
            f'"$@" 2> {tmp_path}/node_{rank} &\npids+=($!)\n'
            for rank, name in enumerate(hosts.names)
        )
        + 'result=0; for pid in "${pids[@]}"; do wait "$pid" || result=$?; done\n'
        + f"cat {tmp_path}/node_* >&2; exit $result\n"
    )

    def start(how: str, args: list[object]) -> subprocess.Popen[str]:
        env = {
            **os.environ,
            "MIM_SSH": str(connect),
            "MASTER_ADDR": hosts.address,
            "GLOO_SOCKET_IFNAME": hosts.cable,
            "ACCELERATE_USE_CPU": "true",
            "NODES": "2",
            "PROCESSES": "1",
        }
        env |= {"PYTHONPATH": str(LAUNCH.parents[1]), "PATH": path_with_python()}
        begin = [LAUNCH / "hosts.sh", listed] if how == "hosts" else [both]
        command = ["bash", *map(str, [*begin, *args])]
        return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)

    return start


def path_with_python() -> str:
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def losses(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


# torchrun has a code of its own for whatever ended its processes.
@pytest.mark.parametrize(("how", "code"), [("hosts", 75), ("torchrun", 1)])
def test_a_host_that_is_cut_off(
    how: str,
    code: int,
    tmp_path: Path,
    mim: Mim,
    tiny: Tiny,
    hosts: Hosts,
    launcher: Callable[..., subprocess.Popen[str]],
    outcomes: list[tuple[str, str, str]],
    ended_after: Callable[[str, float], None],
) -> None:
    plugin, mark = tmp_path / "plugin.py", tmp_path / "mark"
    plugin.write_text(PLUGIN.format(mark=str(mark)))
    changes = {"train.timeout": 60.0, "train.log_every": 1, "train.checkpoint_every": 0.04}
    config = tiny(changes)
    alone, run = tmp_path / "alone", tmp_path / "run"
    assert mim("pretrain", "--config", config, "--output", alone).code == 0
    args = ["--config", config, "--output", run, "--plugins", f"[{plugin}]"]

    process = launcher(how, [*args, "--train.timeout", TIMEOUT])
    until(mark.exists, process)
    hosts.plug("down")
    began = time.monotonic()
    mark.with_name("cut").touch()
    _, told = process.communicate(timeout=100)
    seconds = time.monotonic() - began
    ended_after(f"is on a host that is cut off ({how}): both", seconds)
    assert process.returncode == code, told
    assert "Traceback (most recent call last)" not in told or how == "torchrun"
    assert "mim: error: rank 0: rank 1 on " in told and "no longer answers" in told, told
    assert f"mim: error: rank 1: nobody answers at {hosts.address}:" in told, told
    if how == "hosts":
        assert seconds < TIMEOUT + 30  # of which 10 are asked for; the rest is for a busy machine
    outcomes.append(("host cut off", f"{how}: both ended after {seconds:.1f} s", "told"))
    state, passed_over = checkpoint.newest_checkpoint(run)
    assert state is not None and state["step"] == 2 and not passed_over

    hosts.plug("up")
    process = launcher(how, args)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 0, told
    assert losses(run) == pytest.approx(losses(alone), abs=1e-5) and len(losses(run)) == 6
    assert checkpoint.read_result(run)["environment"]["processes"] == 2


def until(true: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.01)
