"""Flashing over a real ssh server on this machine: whatever breaks, `current` leads to a model that works."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import models
import pytest
from faults import Proxy
from sshd import Server

from edgeprune import deploy, flashing
from edgeprune.errors import DeployError, EdgepruneError, TargetError, UsageError
from edgeprune.flashing import Place
from edgeprune.host import Ssh

KILLS = (6, pytest.param(20, marks=pytest.mark.slow))
MOMENTS = (6, pytest.param(24, marks=pytest.mark.slow))

pytestmark = pytest.mark.ssh


@pytest.fixture
def proxied(server: Server, tmp_path: Path) -> Iterator[tuple[Ssh, Proxy]]:
    proxy = Proxy(server.port)
    host = Ssh("board", server.configured("proxied", port=proxy.port), str(tmp_path / "a cache"))
    yield host, proxy
    host.close()
    proxy.close()


def put(host: Ssh, tmp_path: Path, step: str, **options: object) -> str:
    files, manifest = models.package(tmp_path, step)
    return deploy.install(host, files, manifest, str(tmp_path / "installed"), **options).version  # type: ignore[arg-type]


def works(version: Path) -> bool:
    """The smoke test, in a process of its own."""
    program = "import sys; from edgeprune.profilers import smoke; sys.exit(smoke.main(sys.argv[1]))"
    return subprocess.run([sys.executable, "-c", program, str(version)], check=False).returncode == 0


def test_a_model_is_installed_listed_and_taken_back_over_the_link(board: Ssh, tmp_path: Path) -> None:
    folder = tmp_path / "installed"
    first, second = put(board, tmp_path, "A"), put(board, tmp_path, "B")
    assert (folder / "current").resolve() == folder / "versions" / second
    assert [v.name for v in deploy.versions(board, str(folder))] == [second, first]
    assert deploy.rollback(board, str(folder)).version == first
    assert (folder / "current").resolve() == folder / "versions" / first
    assert works(folder / "current")
    assert not list((tmp_path / "a cache").rglob("weights.bin"))  # a small disk holds the model once


def test_a_model_that_answers_wrongly_there_is_not_made_current(board: Ssh, tmp_path: Path) -> None:
    put(board, tmp_path, "A")
    files, manifest = models.package(tmp_path, "B", wrong=True)
    with pytest.raises(DeployError, match=r"failed its smoke test .* with a difference of 0\.\d+ of the largest"):
        deploy.install(board, files, manifest, str(tmp_path / "installed"))
    assert os.readlink(tmp_path / "installed" / "current").startswith("versions/0001-")


def test_a_model_that_the_runtime_there_cannot_load_is_not_made_current(board: Ssh, tmp_path: Path) -> None:
    put(board, tmp_path, "A")
    files, manifest = models.package(tmp_path, "B")
    files["model.tflite"].write_bytes(b"TFL3" + bytes(1000))
    with pytest.raises(DeployError, match=r"failed its smoke test .*exit status .*; check the runtime"):
        deploy.install(board, files, manifest, str(tmp_path / "installed"))
    assert os.readlink(tmp_path / "installed" / "current").startswith("versions/0001-")


def test_too_little_room_is_said_before_anything_is_sent(board: Ssh, small_disk: Path, tmp_path: Path) -> None:
    files, manifest = models.package(tmp_path, "A", 3_000_000)
    with pytest.raises(DeployError, match=r"not enough space in .*/installed: [\d,]+ bytes are needed"):
        deploy.install(board, files, manifest, str(small_disk / "installed"))
    assert not list((tmp_path / "a cache").rglob("weights.bin"))


# ---- the service ---------------------------------------------------------------------------------------------


def test_the_service_is_restarted_on_the_new_version(board: Ssh, tmp_path: Path) -> None:
    note = f"sh -c 'readlink {tmp_path}/installed/current >> {tmp_path}/restarts'"
    first, second = (put(board, tmp_path, step, service=note) for step in "AB")
    assert (tmp_path / "restarts").read_text().split() == [f"versions/{first}", f"versions/{second}"]


def test_a_service_that_does_not_come_back_takes_the_version_back(board: Ssh, tmp_path: Path) -> None:
    service = tmp_path / "restart"
    service.write_text(f"#!/bin/sh\nreadlink {tmp_path}/installed/current >> {tmp_path}/restarts\n")
    service.chmod(0o755)
    first = put(board, tmp_path, "A", service=str(service))
    service.write_text(service.read_text() + f"grep -q '{first}' {tmp_path}/installed/history.json && exit 4\n")
    message = rf"failed in .* after the service was restarted .*ended with status 4: .*`current` leads to {first}"
    with pytest.raises(DeployError, match=message):
        put(board, tmp_path, "B", service=str(service))
    assert os.readlink(tmp_path / "installed" / "current") == f"versions/{first}"
    assert os.listdir(tmp_path / "installed" / "versions") == [first]
    assert (tmp_path / "restarts").read_text().split()[-1] == f"versions/{first}"  # the old one runs again


def test_a_model_that_fails_once_its_service_runs_is_taken_back(board: Ssh, tmp_path: Path) -> None:
    first = put(board, tmp_path, "A")
    current = tmp_path / "installed" / "current"
    damage = f"sh -c 'case $(readlink {current}) in */0002*) truncate -s 9 {current}/model.tflite;; esac'"
    with pytest.raises(DeployError, match=r"after the service was restarted .*was taken back"):
        put(board, tmp_path, "B", service=damage)
    assert os.readlink(tmp_path / "installed" / "current") == f"versions/{first}"
    assert works(tmp_path / "installed" / "current")


def test_a_first_version_whose_service_fails_leaves_nothing_current(board: Ssh, tmp_path: Path) -> None:
    with pytest.raises(DeployError, match=r"was taken back; there is no current version yet"):
        put(board, tmp_path, "A", service="false")
    assert not os.path.lexists(tmp_path / "installed" / "current")
    assert put(board, tmp_path, "A")


# ---- several devices -----------------------------------------------------------------------------------------


class Device:
    """What flashing needs of a target."""

    def __init__(self, host: Ssh) -> None:
        self.host = host


def test_places_are_folders_here_or_on_hosts() -> None:
    assert flashing.places(["deployed", "pi@a:/opt/m,b:models/x"]) == [
        Place("", "deployed"),
        Place("pi@a", "/opt/m"),
        Place("b", "models/x"),
    ]
    assert flashing.places(["./odd:name"]) == [Place("", "./odd:name")]
    for wrong in ("", "a,,b", "pi@a:"):
        with pytest.raises(UsageError, match=r"is no place to install; write FOLDER or HOST:FOLDER"):
            flashing.places([wrong])


def test_a_fleet_stops_at_the_first_device_that_fails(board: Ssh, tmp_path: Path) -> None:
    files, manifest = models.package(tmp_path, "A")
    (tmp_path / "file").touch()
    where = [Place("board", str(tmp_path / name / "m")) for name in ("one", "file", "three")]
    message = (
        rf"board:{tmp_path}/file/m: .*Done before it: board:{tmp_path}/one/m; not touched: board:{tmp_path}/three/m"
    )
    with pytest.raises(DeployError, match=message):
        flashing.everywhere(Device(board), where, lambda h, f: deploy.install(h, files, manifest, f))  # type: ignore[arg-type]
    assert works(tmp_path / "one" / "m" / "current")
    assert not (tmp_path / "three").exists()


def test_two_hosts_that_flash_the_same_folder_take_turns(server: Server, tmp_path: Path) -> None:
    found = {}

    def flash(step: str) -> None:
        host = Ssh("board", server.config, str(tmp_path / "a cache"))
        try:
            found[step] = put(host, tmp_path, step)
        finally:
            host.close()

    others = [threading.Thread(target=flash, args=(step,)) for step in "AB"]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert sorted(name[:4] for name in found.values()) == ["0001", "0002"]
    assert (tmp_path / "installed" / "current").resolve().name == max(found.values())
    assert works(tmp_path / "installed" / "current")


# ---- a link that breaks, a host that dies --------------------------------------------------------------------


def test_a_link_that_breaks_in_the_middle_of_an_upload_sends_the_rest(
    proxied: tuple[Ssh, Proxy], tmp_path: Path
) -> None:
    host, proxy = proxied
    path = tmp_path / "model.bin"
    path.write_bytes(random.Random(0).randbytes(3_000_000))
    host.connect()
    proxy.reset()
    proxy.cut_after = 1_500_000
    there = Path(host.put(path))
    assert there.read_bytes() == path.read_bytes()
    assert proxy.cuts == 1


@pytest.mark.parametrize("seed", range(4))
def test_a_link_that_breaks_anywhere_in_a_flash_ends_with_the_new_version(
    proxied: tuple[Ssh, Proxy], tmp_path: Path, seed: int
) -> None:
    host, proxy = proxied
    put(host, tmp_path, "A")
    host._drop()
    proxy.cut_after = random.Random(seed).randrange(8_000, 215_000)
    version = put(host, tmp_path, "B")
    assert proxy.cuts == 1
    assert (tmp_path / "installed" / "current").resolve().name == version
    assert works(tmp_path / "installed" / "current")


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_link_that_breaks_at_the_switch_ends_with_the_new_version(
    proxied: tuple[Ssh, Proxy], tmp_path: Path, moment: str
) -> None:
    """As soon as the new version has its name, before it is current; and as soon as it is current."""
    host, proxy = proxied
    put(host, tmp_path, "A")
    folder = tmp_path / "installed"

    def breaks() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            found = next(iter((folder / "versions").glob("0002-*")), None)
            if found is not None and (moment == "before" or (folder / "current").resolve() == found):
                proxy.reset()
                return

    other = threading.Thread(target=breaks)
    other.start()
    version = put(host, tmp_path, "B")
    other.join()
    assert proxy.resets == 1
    assert (folder / "current").resolve().name == version
    assert works(folder / "current")
    assert {v.name for v in deploy.versions(host, str(folder))} == set(os.listdir(folder / "versions"))


@pytest.mark.parametrize("use", ["start", "put", "drop"])
def test_a_board_that_is_away_for_some_seconds_is_waited_for(
    proxied: tuple[Ssh, Proxy], tmp_path: Path, use: str
) -> None:
    host, proxy = proxied
    path = models.package(tmp_path, "A")[0]["weights.bin"]
    there = Path(host.put(path))
    there.unlink()
    proxy.refusing = True
    proxy.reset()
    back = threading.Timer(4.0, lambda: setattr(proxy, "refusing", False))
    back.start()
    if use == "start":
        host.start("installer").close()
    elif use == "put":
        assert Path(host.put(path)).read_bytes() == path.read_bytes()
    else:
        host.drop(str(there))
        assert not there.parent.exists()
    assert not proxy.refusing
    back.join()


def test_a_slow_link_only_takes_longer(proxied: tuple[Ssh, Proxy], tmp_path: Path) -> None:
    host, proxy = proxied
    proxy.delay_s = 0.1
    assert put(host, tmp_path, "A").startswith("0001-")


@pytest.mark.slow
def test_a_host_that_stops_answering_is_given_up(
    proxied: tuple[Ssh, Proxy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, proxy = proxied
    put(host, tmp_path, "A")
    monkeypatch.setattr("edgeprune.host.PATIENCE_S", 1.0)
    proxy.stalled = True
    began = time.monotonic()
    with pytest.raises(TargetError, match=r"the link to the device broke|cannot be reached"):
        host.put(models.package(tmp_path, "B")[0]["weights.bin"])
    assert time.monotonic() - began < 120
    proxy.stalled = False
    assert put(host, tmp_path, "B").startswith("0002-")


def flash_for_ever(config: Path, tmp_path: Path, seed: int) -> None:
    host = Ssh("board", config, str(tmp_path / "a cache"))
    choice = random.Random(seed)
    while True:
        put(host, tmp_path, choice.choice("ABC"))


@pytest.mark.slow
@pytest.mark.parametrize("kills", KILLS)
def test_a_host_that_is_killed_at_any_moment_leaves_a_model_that_works(
    server: Server, board: Ssh, tmp_path: Path, kills: int
) -> None:
    put(board, tmp_path, "A")
    for seed in range(kills):
        host = multiprocessing.get_context("fork").Process(target=flash_for_ever, args=(server.config, tmp_path, seed))
        host.start()
        time.sleep(random.Random(seed).uniform(0.3, 2.5))
        assert host.pid is not None
        os.kill(host.pid, signal.SIGKILL)
        host.join()
        assert works(tmp_path / "installed" / "current")
    version = put(board, tmp_path, "Z")  # what a killed host had begun is out of the way
    assert (tmp_path / "installed" / "current").resolve().name == version
    listed = {v.name for v in deploy.versions(board, str(tmp_path / "installed"))}
    assert set(os.listdir(tmp_path / "installed" / "versions")) == listed


# ---- the device's disk ---------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB, of which a model takes a fifth while it is installed."""
    mount = tmp_path / "disk"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(mount)], check=True)
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def fill(disk: Path, after_s: float) -> None:
    time.sleep(after_s)
    with (disk / "filler").open("wb") as stream, contextlib.suppress(OSError):
        while True:
            os.posix_fallocate(stream.fileno(), os.fstat(stream.fileno()).st_size, 4096)


@pytest.mark.slow
@pytest.mark.parametrize("moments", MOMENTS)
def test_a_disk_that_fills_up_at_any_moment_keeps_a_model_that_works(
    server: Server, disk: Path, tmp_path: Path, moments: int
) -> None:
    host = Ssh("board", server.config, str(disk / "cache"))
    folder, failures = disk / "installed", []
    try:
        deploy.install(host, *models.package(tmp_path, "A"), str(folder))
        for moment in range(moments):
            other = threading.Thread(target=fill, args=(disk, 1.8 * moment / moments))
            other.start()
            try:
                deploy.install(host, *models.package(tmp_path, f"{moment}", 4_000_000), str(folder), keep=1)
            except EdgepruneError as error:
                failures.append(str(error))
            other.join()
            assert works(folder / "current")
            (disk / "filler").unlink()
        deploy.install(host, *models.package(tmp_path, "Z", 4_000_000), str(folder), keep=1)
    finally:
        host.close()
    assert failures, "the disk never filled up while something was installed"
    assert all("make room" in text or "delete something" in text for text in failures), failures
