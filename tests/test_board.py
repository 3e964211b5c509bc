"""The whole job on an ARM board: real aarch64, real ssh, and a clock that counts instructions, so figures are exact.

Its milliseconds are those of the emulator, not of any board.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import boardnet
import models
import numpy as np
import pytest
from emulated import Board, during, installed, layers, works

from edgeprune import cli, deploy, measure
from edgeprune.agent import local_program
from edgeprune.errors import DeployError, LinkError, TargetError
from edgeprune.host import Ssh
from edgeprune.records import Artifact
from edgeprune.target import Target, open_target

pytestmark = pytest.mark.board
SAME = 1e-3
# instructions, one a nanosecond: a layer's run and the empty one that is taken off it take up to 19 more or less in
# another process, by where things lie in memory; neither fixed addresses nor a fixed seed of hashes change that
STRAY_MS = 38e-6
PEAK = """
import json, resource, subprocess, sys
time = {"items": [{"model": sys.argv[2]}], "least": 1, "most": 1, "interval": 1.0, "budget_s": 0.0}
calls = {"open": {"threads": 1, "xnnpack": True}, "time": time}
pipe = subprocess.PIPE
program = subprocess.Popen(["python3", "-u", sys.argv[1], "tflite"], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
for call, arguments in calls.items():
    program.stdin.write(json.dumps({"id": call, "call": call, "arguments": arguments}).encode() + b"\\n")
    program.stdin.flush()
    while b'"result"' not in program.stdout.readline():
        pass
program.communicate()
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
FILL = """
import errno, os
handle = os.open("filler", os.O_CREAT | os.O_WRONLY)
for step in (1 << 24, 1 << 20, 1 << 12):
    try:
        while True:
            os.posix_fallocate(handle, os.fstat(handle).st_size, step)
    except OSError as error:
        assert error.errno == errno.ENOSPC
"""


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    board = Board(tmp_path_factory.mktemp("board") / "run")
    yield board
    board.act("stop")


@pytest.fixture
def host(board: Board) -> Iterator[Ssh]:
    host = Ssh("board", board.config)
    yield host
    host.close()


@pytest.fixture
def target(board: Board) -> Iterator[Target]:
    sections = {"pi": {"kind": "tflite", "host": "board", "ssh_config": str(board.config)}}
    with contextlib.closing(open_target("pi", sections)) as opened:
        yield opened


@pytest.fixture(scope="module", autouse=True)
def _few_visits() -> Iterator[None]:
    """This clock has no noise to average out, and the emulator is slow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "VISITS", (3, 60))
        patch.setattr(measure, "NETWORK_VISITS", (5, 200))
        yield


@pytest.fixture(scope="module")
def project(board: Board, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose target is the board."""
    folder = tmp_path_factory.mktemp("project")
    path = boardnet.make(folder)
    before = path.read_text()
    assert cli.run(["targets", "add", "pi", "--host", "board", "--ssh-config", str(board.config), "-p", str(path)]) == 0
    assert path.read_text().startswith(before)
    return folder


@pytest.fixture
def inside(project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    monkeypatch.chdir(project)
    monkeypatch.setenv("EDGEPRUNE_HOME", str(project / "home"))
    return project


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capsys.readouterr()
    status = cli.run([*arguments, "--json"])
    out, err = capsys.readouterr()
    assert status == 0, err
    return json.loads(out)


# ---- the job, in order ---------------------------------------------------------------------------------------


def test_the_chain_to_the_board_is_whole(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "targets", "check", "pi")
    assert list(found) == ["ssh", "python3", "disk", "clock", "runtime", "device", "governor", "state"]
    assert found["runtime"] == "ai_edge_litert 2.3.0, f32, 1 thread"
    assert found["clock"] == "right"
    assert re.fullmatch(r"linux,dummy-virt, 1 cores, \d+ MB of memory free", found["device"])


def test_the_table_predicts_whole_networks_within_one_percent(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "profile", "--check", "4", "--quiet")
    assert found["filled"]["entries"] > 50
    assert found["filled"]["notes"] == []
    errors = np.array(found["check"]["predicted_ms"]) / np.array(found["check"]["measured_ms"]) - 1
    assert float(np.median(np.abs(errors))) <= 0.01
    assert found["check"]["rank_correlation"] == 1.0


@pytest.mark.slow
def test_a_second_profile_gives_the_same_table(
    inside: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = []
    for home in ("home", "second"):
        monkeypatch.setenv("EDGEPRUNE_HOME", str(inside / home))
        answer(capsys, "profile", "--quiet")
        assert cli.run(["table", "export", f"{home}.json"]) == 0
        table = json.loads(Path(f"{home}.json").read_text())
        entries.append({json.dumps(e["layer"]): e["timing"]["median_ms"] for e in table["entries"]})
    assert entries[0].keys() == entries[1].keys()
    moved = {layer: abs(entries[1][layer] - ms) / max(SAME * ms, STRAY_MS) for layer, ms in entries[0].items()}
    assert max(moved.values()) <= 1.0


def test_an_accepted_plan_measures_at_or_under_its_budget(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer(capsys, "compress", "--quiet")  # its exit status is 0: the accepted plan meets its budget
    report = json.loads(Path("runs/001/verify.json").read_text())
    dense, pruned = (report[name]["latency"]["median_ms"] for name in ("dense", "pruned"))
    assert pruned <= dense / 1.5
    assert abs(report["predicted_ms"] / pruned - 1) <= 0.01
    assert report["pruned"]["agreement"]["max_difference"] <= 1e-3
    assert report["pruned"]["accuracy"]["total"] > 80
    assert report["fingerprint"]["device"] == "linux,dummy-virt"


@pytest.mark.slow
def test_an_accepted_plan_in_int8_measures_at_or_under_its_budget(
    inside: Path, board: Board, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--host", "board", "--ssh-config", str(board.config), "--precision", "int8"]
    assert cli.run(["targets", "add", "pi8", *more]) == 0
    found = answer(capsys, "compress", "--target", "pi8", "--quiet")
    assert all(check["passed"] for check in found["checks"])
    dense, pruned = (found["report"][name]["latency"]["median_ms"] for name in ("dense", "pruned"))
    assert pruned <= dense / 1.5
    assert found["report"]["fingerprint"]["precision"] == "int8"


def test_the_network_is_installed_and_answers_with_the_boards_own_runtime(
    inside: Path, host: Ssh, capsys: pytest.CaptureFixture[str]
) -> None:
    receipt = answer(capsys, "flash", "--to", "models/digits", "--service", "touch models/restarted")
    assert receipt["folder"] == "/home/pi/models/digits"
    listed = answer(capsys, "flash", "--list", "--to", "models/digits")["versions"]
    assert [v["name"] for v in listed] == [receipt["version"]]
    current = f"{receipt['folder']}/current"
    host.run(["test", "-e", "models/restarted"], 60)
    host.run(["python3", f"{current}/run.py", f"{current}/smoke_inputs.npy", "outputs.npy"], 120)
    for name in ("outputs.npy", f"{current}/smoke_outputs.npy"):
        host.get(f"/home/pi/{name}" if "/" not in name else name, inside / Path(name).name)
    found, recorded = np.load(inside / "outputs.npy"), np.load(inside / "smoke_outputs.npy")
    assert np.abs(found - recorded).max() <= 1e-3 * np.abs(recorded).max()


def test_the_peak_memory_in_the_report_is_what_the_kernel_counts_of_such_a_program(inside: Path, host: Ssh) -> None:
    report = json.loads(Path("runs/001/verify.json").read_text())
    program, model = host.put(local_program()), host.put(inside / "runs/001/artifact/model.tflite")
    counted_bytes = 1024 * int(host.run(["python3", "-c", PEAK, program, model], 120))
    assert report["pruned"]["peak_memory_bytes"] == pytest.approx(counted_bytes, rel=0.05)
    assert report["dense"]["peak_memory_bytes"] == pytest.approx(counted_bytes, rel=0.05)  # next to Python, it is small


# ---- faults --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("fault", [("power-cut", "power-on"), ("reset",)])
def test_a_power_cut_or_a_reboot_in_the_middle_of_a_profile_costs_only_time(
    board: Board, target: Target, fault: tuple[str, ...]
) -> None:
    before = layers(target, 1)
    cut = during(0.5, *(partial(board.act, action) for action in fault))
    after = layers(target, 12)
    cut.join()
    assert max(abs(np.array(after) / before[0] - 1)) <= 0.01


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fault", [("power-cut", "power-on"), ("reset",)])
def test_a_power_cut_or_a_reboot_in_the_middle_of_a_flash_leaves_a_model_that_works(
    board: Board, host: Ssh, tmp_path: Path, seed: int, fault: tuple[str, ...]
) -> None:
    installed(host, tmp_path, f"A{seed}{fault[0]}")
    cut = during(random.Random(seed).uniform(0.5, 4.0), *(partial(board.act, action) for action in fault))
    version = installed(host, tmp_path, f"B{seed}{fault[0]}", 4_000_000)
    cut.join()
    assert works(host)
    assert deploy.versions(host, "models/faults")[0].name == version


@pytest.mark.slow
def test_a_power_cut_right_after_a_flash_takes_nothing_of_it(board: Board, host: Ssh, tmp_path: Path) -> None:
    version = installed(host, tmp_path, "kept", 2_000_000, folder="models/kept")
    board.act("power-cut")
    board.act("power-on")
    assert deploy.versions(host, "models/kept")[0].name == version
    assert works(host, "models/kept")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_power_cut_in_a_flash_that_nobody_goes_on_with_leaves_a_model_that_works(
    board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    with contextlib.closing(Ssh("board", board.config)) as host:
        installed(host, tmp_path, f"C{seed}", folder="models/left")
        monkeypatch.setattr("edgeprune.host.PATIENCE_S", 0.0)
        cut = during(random.Random(seed).uniform(0.5, 4.0), lambda: board.act("power-cut"))
        with contextlib.suppress(LinkError):
            installed(host, tmp_path, f"D{seed}", 2_000_000, folder="models/left")
        cut.join()
    board.act("power-on")
    with contextlib.closing(Ssh("board", board.config)) as host:
        assert works(host, "models/left")


def test_a_program_that_takes_all_memory_is_named_and_the_board_lives_on(host: Ssh) -> None:
    with pytest.raises(TargetError, match=r"on board failed \(exit status 137\)"):
        host.run(["python3", "-c", "x = [b'x' * (1 << 26) for _ in range(64)]"], 300)
    assert host.run(["echo", "alive"], 60) == "alive\n"


@pytest.mark.slow
def test_a_clock_that_jumps_changes_no_latency_and_no_install(
    board: Board, host: Ssh, target: Target, tmp_path: Path
) -> None:
    before = layers(target, 1)
    jump = during(0.3, lambda: board.as_root("date -s '2001-01-01'"))
    after = layers(target, 6)
    jump.join()
    assert max(abs(np.array(after) / before[0] - 1)) <= 0.01
    first = installed(host, tmp_path, "past")
    board.as_root(f"date -s @{int(time.time())}")
    assert installed(host, tmp_path, "present") > first


def test_a_folder_that_pi_may_not_write_is_refused_before_anything_is_sent(host: Ssh, tmp_path: Path) -> None:
    with pytest.raises(DeployError, match=r"installing into /opt/m failed: .*Permission denied.*; check the path"):
        deploy.install(host, *models.package(tmp_path, "A"), "/opt/m")


def test_a_file_system_that_is_read_only_is_refused(board: Board, host: Ssh, tmp_path: Path) -> None:
    board.as_root("mkdir -p /home/pi/ro && busybox mount -t tmpfs -o ro tmpfs /home/pi/ro")
    with pytest.raises(DeployError, match=r"failed: .*Read-only file system.*; check the path"):
        deploy.install(host, *models.package(tmp_path, "A"), "ro/m")


def test_a_model_is_timed_by_the_path_that_layers_are_timed_by(target: Target, tmp_path: Path) -> None:
    files, _ = models.package(tmp_path, "A")
    artifact = Artifact(str(files["model.tflite"]), (), "", 0, "tflite", "f32")
    first, second = target.time([artifact, artifact], 5, 5, 0.0, 5.0)
    assert abs(first.median_ms / second.median_ms - 1) <= 0.02


# ---- a full card, a bad network --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_card_that_is_full_is_said_and_what_is_installed_works_on(
    board: Board, host: Ssh, target: Target, tmp_path: Path
) -> None:
    before = layers(target, 1)
    first, second = (installed(host, tmp_path, step, folder="models/full") for step in ("A", "B"))
    host.run(["python3", "-c", FILL], 120)
    try:
        with pytest.raises((DeployError, TargetError), match=r"make room|delete something"):
            installed(host, tmp_path, "C", folder="models/full")
        with pytest.raises(TargetError, match=r"make room on the device, then try again"):
            host.put(models.package(tmp_path, "D")[0]["weights.bin"])
        with (
            contextlib.closing(Ssh("board", board.config, "elsewhere")) as new,
            pytest.raises(TargetError, match=r"No space left on device.*make room on the device"),
        ):
            new.start("tflite")  # the device program itself finds no room
        with contextlib.suppress(DeployError):
            deploy.rollback(host, "models/full")
        assert deploy.versions(host, "models/full")[0].name == second
        assert works(host, "models/full")
        assert layers(target, 1) == pytest.approx(before, rel=0.01)  # measuring needs no room
    finally:
        host.run(["rm", "filler"], 60)
    assert installed(host, tmp_path, "C", folder="models/full") > second > first


@pytest.mark.slow
def test_packets_that_are_lost_and_late_only_cost_time(board: Board, target: Target, tmp_path: Path) -> None:
    """The board's kernel holds every packet that it sends for 300 ms and drops one in thirty."""
    before = layers(target, 1)
    board.as_root("tc qdisc add dev eth0 root netem delay 300ms loss 3%")
    try:
        sections = {"pi": {"kind": "tflite", "host": "board", "ssh_config": str(board.config)}}
        with contextlib.closing(open_target("pi", sections)) as far:
            assert layers(far, 3) == pytest.approx([before[0]] * 3, rel=0.01)
            assert isinstance(far.host, Ssh)
            version = installed(far.host, tmp_path, "far", folder="models/far")
            assert works(far.host, "models/far")
            assert deploy.versions(far.host, "models/far")[0].name == version
        counted = board.as_root("tc -s qdisc show dev eth0")
    finally:
        board.as_root("tc qdisc del dev eth0 root")
    dropped = re.search(r"dropped (\d+)", counted)
    assert dropped is not None
    assert int(dropped[1]) > 0


@pytest.mark.slow
def test_a_cable_that_is_out_for_longer_than_the_link_lives_only_costs_time(
    board: Board, host: Ssh, target: Target, tmp_path: Path
) -> None:
    before = layers(target, 1)
    installed(host, tmp_path, "A", folder="models/cable")
    out = during(0.5, lambda: board.act("unplug"), lambda: time.sleep(40), lambda: board.act("plug"))
    after = layers(target, 12)
    version = installed(host, tmp_path, "B", 2_000_000, folder="models/cable")
    out.join()
    assert max(abs(np.array(after) / before[0] - 1)) <= 0.01
    assert deploy.versions(host, "models/cable")[0].name == version
    assert works(host, "models/cable")
