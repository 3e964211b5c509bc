"""The NVIDIA targets on a machine without a GPU: what they say, child processes that fail, caches, power modes.

`nvpmodel` is a stand-in here that prints the documented text: it is what decides about modes, and no Jetson is at hand.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import small
from edgeprune.profilers import cuda_driver, gpu_state, timing, trt_cache, trt_reports, trtexec
from edgeprune.profilers.child import Child, ChildError
from edgeprune.profilers.trt_names import MIXED, Names
from edgeprune.profilers.trt_worker import share_of_layer
from sshd import Server
from test_nvidia_reports import fixture

from edgeprune import boards, cli, target
from edgeprune.agent import Agent, local_program
from edgeprune.errors import AgentError, ConfigError, TargetError
from edgeprune.link import Process
from edgeprune.store import key
from edgeprune.target import fingerprint_of

OPENING = {
    "precision": "f16", "device": 0, "backend": "auto", "tf32": False, "dla": -1, "external_tactics": True,
    "workspace_mib": 256, "power_mode": "",
}  # fmt: skip

# ---- no driver -----------------------------------------------------------------------------------------------


def test_without_a_driver_the_target_says_what_is_missing() -> None:
    with pytest.raises(TargetError, match=r"this machine has no NVIDIA driver .*sudo apt install nvidia-jetpack"):
        target.open_target("nano", {"nano": {"kind": "jetson"}})


@pytest.mark.parametrize("backend", ["python", "trtexec"])
def test_a_back_end_that_is_asked_for_says_what_is_missing(backend: str) -> None:
    with pytest.raises(
        TargetError, match=r"no NVIDIA driver|there is no TensorRT: trtexec was asked for, and no trtexec"
    ):
        target.open_target("nano", {"nano": {"kind": "jetson", "backend": backend}})


def test_a_key_that_the_kind_does_not_have_is_refused_with_those_it_has() -> None:
    with pytest.raises(ConfigError, match=r"\[target.nano\]: unknown key fp16 \(allowed for jetson: kind, precision"):
        target.check_options("nano", {"kind": "jetson", "fp16": True})


def test_the_steps_of_a_check_end_at_the_first_thing_that_is_missing() -> None:
    steps = boards.walk("nano", {"kind": "jetson"})
    with pytest.raises(TargetError, match=r"this machine: driver: driver failed on the device: .*no NVIDIA driver"):
        next(steps)


@pytest.mark.ssh
def test_the_steps_of_a_check_lead_over_ssh_to_the_driver(tmp_path: Path) -> None:
    server = Server(tmp_path)
    try:
        section = {"kind": "jetson", "host": "board", "ssh_config": str(server.config)}
        seen: list[tuple[str, str]] = []
        with pytest.raises(TargetError, match=r"board: driver: .*no NVIDIA driver .*sudo apt install nvidia-jetpack"):
            seen.extend(boards.walk("nano", section))  # keeps those before the error
        assert [name for name, _ in seen] == ["ssh", "python3", "disk", "clock"]
    finally:
        server.stop()


def test_a_power_mode_is_asked_for_on_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = small.make(folder)
    path.write_text(path.read_text() + '\n[target.nano]\nkind = "jetson"\n')
    assert cli.run(["profile", "--target", "nano", "--power-mode", "MAXN"]) == 3
    assert "nvpmodel says no power mode here: it can only be switched on a Jetson" in capsys.readouterr().err


# ---- children ------------------------------------------------------------------------------------------------


def ignore(event: Any) -> None:
    pass


def test_a_child_that_is_killed_is_told_with_its_signal_and_so_is_every_later_call() -> None:
    child = Child("trt_worker", "TensorRT's process")
    threading.Timer(0.5, os.kill, (child._process.pid, signal.SIGKILL)).start()
    child._process.wait()
    for _ in range(2):
        with pytest.raises(ChildError, match=r"TensorRT's process ended \(signal 9\); last messages: "):
            child.call("layers", ignore, 30, path="x")
    child.close()


def test_a_child_that_hangs_is_stopped_after_a_while() -> None:
    child = Child("trt_worker", "TensorRT's process")
    os.kill(child._process.pid, signal.SIGSTOP)
    with pytest.raises(ChildError, match="TensorRT's process did not answer in time and was stopped"):
        child.call("layers", ignore, 0.5, path="x")
    assert child._process.poll() == -signal.SIGKILL
    child.close()


def test_a_child_ends_with_its_parent() -> None:
    code = (
        "import sys; from edgeprune.profilers.child import Child; c = Child('trt_worker', 'it'); "
        "print(c._process.pid, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    until(lambda: not Path(f"/proc/{child}/cmdline").exists() or not Path(f"/proc/{child}/cmdline").read_bytes())


def until(holds: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (2, "the GPU is out of memory; end other programs on it, or use a smaller batch"),
        (100, "the driver finds no GPU"),
        (209, "it was built for another one"),
        (12345, "see CUresult"),
    ],
)
def test_what_the_driver_refuses_is_told_with_its_number_and_in_words(code: int, words: str) -> None:
    error = cuda_driver.explained("cuMemAlloc_v2", code)
    assert error.code == code
    assert str(error).startswith(f"cuMemAlloc_v2 failed (CUDA error {code}): ")
    assert words in str(error)


# ---- engines that are kept -----------------------------------------------------------------------------------

FACTS = {"runtime": "tensorrt 8.6.0", "gpu": "Orin", "precision": "f16", "power_mode": "MAXN (0)", "dla": -1}


@pytest.mark.parametrize("fact", list(FACTS))
def test_an_engine_serves_only_what_it_was_built_for(fact: str) -> None:
    assert trt_cache.key(b"net", FACTS) == trt_cache.key(b"net", dict(reversed(FACTS.items())))
    assert trt_cache.key(b"net", {**FACTS, fact: "another"}) != trt_cache.key(b"net", FACTS)
    assert trt_cache.key(b"another", FACTS) != trt_cache.key(b"net", FACTS)


def test_a_damaged_engine_is_forgotten(tmp_path: Path) -> None:
    cache = trt_cache.Cache(str(tmp_path))
    cache.put("a", b"engine" * 100)
    assert cache.get("a") == b"engine" * 100
    path = Path(cache.path("a"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert cache.get("a") is None
    assert not path.exists()


def test_the_engines_that_were_used_longest_ago_make_room(tmp_path: Path) -> None:
    cache = trt_cache.Cache(str(tmp_path), limit_bytes=3000)
    for at, name in enumerate("abc"):
        cache.put(name, bytes(1000))
        os.utime(cache.path(name), (at, at))
    assert cache.get("a") is not None  # now it is used again
    cache.put("d", bytes(1000))
    assert [name for name in "abcd" if Path(cache.path(name)).exists()] == ["a", "c", "d"]


def test_a_full_disk_costs_an_engine_and_nothing_else(small_disk: Path) -> None:
    cache = trt_cache.Cache(str(small_disk / "engines"))
    cache.put("small", b"engine")
    cache.put("large", bytes(8 << 20))
    assert cache.get("large") is None
    assert cache.get("small") == b"engine"
    assert [path.name for path in (small_disk / "engines").iterdir()] == ["small.plan"]


# ---- a layer's share of an engine ----------------------------------------------------------------------------

AROUND = ["before/Conv", "layer/Conv", "layer/Relu", "after/Conv"]


def test_a_layer_gets_its_share_without_neighbours_and_reformats() -> None:
    rows = [
        ("before/Conv", 1.0),
        ("Reformatting CopyNode for x", 2.0),
        ("layer/Conv + layer/Relu", 3.0),
        ("after/Conv", 2.0),
    ]
    assert share_of_layer(rows, {}, AROUND, last=False) == 3 / 8


@pytest.mark.parametrize("fused", ["before/Conv + layer/Conv", "{ForeignNode[layer/Conv...after/Conv]}", "(Unnamed)"])
def test_a_layer_that_cannot_be_told_from_its_neighbours_is_measured_alone(fused: str) -> None:
    rows = [(fused, 3.0), ("layer/Relu", 1.0)]
    assert Names(AROUND).owner(fused) in (MIXED, "(not attributed)")
    assert share_of_layer(rows, {}, AROUND, last=False) is None
    assert share_of_layer([*rows, ("Reformatting CopyNode", 1.0)], {}, AROUND, last=True) == 4 / 5


def test_an_engine_whose_layers_take_no_time_has_no_share() -> None:
    assert share_of_layer([("layer/Conv", 0.0)], {}, AROUND, last=True) is None


def test_things_that_time_themselves_are_visited_until_sure_or_late() -> None:
    visits: list[int] = []

    def steady() -> tuple[float, bool, int]:
        visits.append(1)
        return 0.002, True, 6

    found = timing.visited_in_turn([steady], 7, 60, 0.01, 10.0)[0]
    assert found["median_ms"] == 2.0
    assert found["runs"] == 42
    assert len(visits) == 7
    timing.scale(found, 0.25)
    assert (found["median_ms"], found["samples_ms"][0]) == (0.5, 0.5)


# ---- trtexec -------------------------------------------------------------------------------------------------

WISH = {"device": 0, "precision": "f16", "tf32": False, "dla": -1, "external_tactics": True, "workspace_mib": 512}


def command(help_text: str, **wish: Any) -> list[str]:
    return trtexec.build_command("trtexec", trt_reports.flags(help_text), {**WISH, **wish}, "n.onnx", "e", "cache")


def test_trtexec_is_called_by_the_options_that_it_lists() -> None:
    old, new = fixture("help-8.5.txt"), fixture("help-11.txt")
    assert {"--buildOnly", "--fp16", "--noTF32", "--memPoolSize=workspace:512"} <= set(command(old))
    assert "--int8" in command(old, precision="int8")
    assert {"--skipInference", "--stronglyTyped", "--timingCacheFile=cache"} <= set(command(new))
    assert not {"--fp16", "--int8", "--buildOnly"} & set(command(new, precision="int8"))
    assert "--noTF32" not in command(old, tf32=True)
    assert {"--useDLACore=1", "--allowGPUFallback"} <= set(command(old, dla=1))
    with pytest.raises(ChildError, match="DLA core 1 was asked for, and this trtexec has no --useDLACore"):
        command(new, dla=1)


def test_trtexec_always_measures_by_the_same_protocol() -> None:
    asked = trtexec.measure_command("trtexec", "e", 0, "out", 5, 100)
    assert {"--useCudaGraph", "--noDataTransfers", "--useSpinWait", "--separateProfileRun"} <= set(asked)
    flags = trt_reports.flags(fixture("help-8.5.txt"))
    assert {option[2:].partition("=")[0] for option in asked[1:]} <= flags


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("[TensorRT v8502]", "8.5.2"),
        ("x [TensorRT v100300] [b1] #", "10.3.0"),
        ("[TensorRT v110401]", "11.4.1"),
        ("", ""),
    ],
)
def test_trtexecs_version_is_read_from_what_it_prints(text: str, version: str) -> None:
    assert trtexec.version(text) == version


# ---- state ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("1980, 41, 0x0000000000000001", (1980.0, 41.0, 1)),
        ("1200, 88, 0x0000000000000068", (1200.0, 88.0, 0x68)),
        ("[N/A], [N/A], [N/A]", (0.0, 0.0, 0)),
        ("", (0.0, 0.0, 0)),
    ],
)
def test_nvidia_smi_tells_clock_heat_and_why_it_is_slowed_down(line: str, found: tuple[float, float, int]) -> None:
    assert gpu_state.smi(line) == found


def test_tables_of_two_power_modes_never_mix() -> None:
    machine = {"processor": "Orin", "runtime": "tensorrt 8.5.2", "model": "", "python": "3.8"}
    one, two = (fingerprint_of("jetson", "f16", 1, {**machine, "power_mode": m}) for m in ("MAXN (0)", "15W (2)"))
    assert key(one) != key(two)


# ---- power modes ---------------------------------------------------------------------------------------------

NVPMODEL = """#!/bin/sh
case $1 in
  -q) echo "NVPM WARN: fan mode is not set!"; echo "NV Power Mode: MODE_$(cat {mode})"; cat {mode} ;;
  -m) if [ "$2" = 7 ]; then echo "NVPM WARN: Reboot required for changing to this power mode: 7"; exit 0; fi
      if [ "$2" = 8 ]; then echo "NVPM ERROR: not permitted"; exit 1; fi
      echo "$2" > {mode} ;;
esac
"""


class Jetson:
    """A home folder, and an nvpmodel that keeps its mode in a file."""

    def __init__(self, folder: Path) -> None:
        self.mode, self.home = folder / "mode", folder
        self.mode.write_text("0\n")
        (folder / "nvpmodel").write_text(NVPMODEL.format(mode=self.mode))
        (folder / "nvpmodel").chmod(0o755)
        self.environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder)}

    @property
    def now(self) -> int:
        return int(self.mode.read_text() or "-1")

    @property
    def note(self) -> Path:
        return self.home / ".cache/edgeprune/power-mode"

    def switched(self, wanted: str) -> subprocess.Popen[bytes]:
        """A process that has switched, waits, and puts the mode back at its end."""
        code = (
            "import sys; from edgeprune.profilers.power import Switched; s = Switched(sys.argv[1]); "
            "print('on', flush=True); sys.stdin.read(); s.close()"
        )
        return subprocess.Popen(
            [sys.executable, "-c", code, wanted], env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip


@pytest.fixture
def jetson(tmp_path: Path) -> Jetson:
    return Jetson(tmp_path)


def began(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == b"on\n"


def test_a_power_mode_is_put_back_at_the_end(jetson: Jetson) -> None:
    process = jetson.switched("2")
    began(process)
    assert jetson.now == 2
    process.communicate(b"")
    assert jetson.now == 0
    assert not jetson.note.exists()


def test_a_power_mode_is_put_back_when_the_program_is_killed(jetson: Jetson) -> None:
    process = jetson.switched("2")
    began(process)
    process.kill()
    process.communicate()
    until(lambda: jetson.now == 0 and not jetson.note.exists())


def test_a_power_mode_that_outlived_a_reboot_is_put_back_by_the_next_session(jetson: Jetson) -> None:
    jetson.note.parent.mkdir(parents=True)
    jetson.note.write_text("0\n")
    jetson.mode.write_text("2\n")
    process = jetson.switched("2")
    began(process)
    assert jetson.now == 2
    process.communicate(b"")
    assert jetson.now == 0


def test_a_session_waits_until_the_one_before_has_put_its_mode_back(jetson: Jetson) -> None:
    first = jetson.switched("2")
    began(first)
    second = jetson.switched("3")
    time.sleep(0.5)
    assert jetson.now == 2
    first.communicate(b"")
    began(second)
    assert jetson.now == 3
    second.communicate(b"")
    assert jetson.now == 0


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("7", "power mode 7 needs a reboot; switch to it by hand: sudo nvpmodel -m 7"),
        ("8", r"power mode 8 could not be set \(NVPM ERROR: not permitted\); allow it without a password in sudoers"),
        ("TURBO", "there is no power mode TURBO here; there are: none that can be read from /etc/nvpmodel.conf"),
    ],
)
def test_a_power_mode_that_cannot_be_set_is_an_error_and_nothing_changes(
    jetson: Jetson, wanted: str, message: str
) -> None:
    agent = Agent(lambda: Process([sys.executable, "-u", str(local_program()), "tensorrt"], jetson.environment))
    opening = {**OPENING, "power_mode": wanted}
    with agent, pytest.raises(AgentError, match=message):
        agent.call("open", 60, **opening)
    until(lambda: jetson.now == 0)


def test_the_device_program_puts_the_mode_back_when_it_finds_no_gpu(jetson: Jetson) -> None:
    agent = Agent(lambda: Process([sys.executable, "-u", str(local_program()), "tensorrt"], jetson.environment))
    opening = {**OPENING, "power_mode": "2"}
    with agent, pytest.raises(AgentError, match="no NVIDIA driver"):
        agent.call("open", 60, **opening)
    until(lambda: jetson.now == 0 and not jetson.note.exists())


def test_the_power_mode_without_being_asked_is_never_touched(jetson: Jetson) -> None:
    jetson.mode.write_text("5\n")
    before = jetson.mode.stat().st_mtime_ns
    agent = Agent(lambda: Process([sys.executable, "-u", str(local_program()), "tensorrt"], jetson.environment))
    opening = {**OPENING, "power_mode": ""}
    with agent, pytest.raises(AgentError, match="no NVIDIA driver"):
        agent.call("open", 60, **opening)
    assert jetson.mode.stat().st_mtime_ns == before
