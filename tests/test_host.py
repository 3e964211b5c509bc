"""The link to another machine, over a real ssh server on this one: files, programs, and what is said when it fails."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest
import torch
from sshd import PATH, Server, free_port
from torch import nn

from edgeprune import measure, store, widths
from edgeprune.errors import AgentError, LinkError, RuntimeMissing, TargetError
from edgeprune.graph import trace
from edgeprune.host import Here, Ssh
from edgeprune.target import open_target

pytestmark = pytest.mark.ssh


def made(path: Path, size_bytes: int) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(os.urandom(size_bytes))
    return path


def test_a_file_arrives_whole_and_is_not_sent_twice(board: Ssh, tmp_path: Path) -> None:
    path = made(tmp_path / "it's a $model.bin", 3_000_000)
    there = Path(board.put(path))
    assert there.read_bytes() == path.read_bytes()
    written = there.stat().st_ino, there.stat().st_mtime_ns
    assert board.put(path) == str(there)
    assert (there.stat().st_ino, there.stat().st_mtime_ns) == written
    assert there.name == path.name
    assert str(tmp_path / "a cache") in str(there)


def test_what_broke_off_goes_on_where_it_was(board: Ssh, tmp_path: Path) -> None:
    path = made(tmp_path / "model.bin", 1_000_000)
    there = Path(board.put(path))
    part = there.with_name(there.name + ".part")
    there.rename(part)
    os.truncate(part, 400_000)
    inode = part.stat().st_ino
    assert board.put(path) == str(there)
    assert there.read_bytes() == path.read_bytes()
    assert there.stat().st_ino == inode


def test_a_remnant_that_is_wrong_is_found_by_the_checksum_and_sent_anew(board: Ssh, tmp_path: Path) -> None:
    path = made(tmp_path / "model.bin", 100_000)
    there = Path(board.put(path))
    part = there.with_name(there.name + ".part")
    there.unlink()
    part.write_bytes(bytes(50_000))  # what a power cut makes of what was not synced
    assert board.put(path) == str(there)
    assert there.read_bytes() == path.read_bytes()


def test_a_file_that_was_damaged_on_the_device_is_sent_again(board: Ssh, tmp_path: Path) -> None:
    path = made(tmp_path / "model.bin", 1000)
    there = Path(board.put(path))
    there.write_bytes(bytes(1000))
    assert board.put(path) == str(there)
    assert there.read_bytes() == path.read_bytes()


def test_a_file_comes_back_as_it_is(board: Ssh, tmp_path: Path) -> None:
    for size_bytes in (0, 1, 300_000):
        content = made(tmp_path / "there.bin", size_bytes).read_bytes()
        board.get(str(tmp_path / "there.bin"), tmp_path / "here.bin")
        assert (tmp_path / "here.bin").read_bytes() == content
    with pytest.raises(TargetError, match=r"board refused a file: /nowhere: No such file"):
        board.get("/nowhere", tmp_path / "here.bin")
    assert board.put(made(tmp_path / "next.bin", 10))  # the link is still good


def test_arguments_reach_a_program_as_they_are(board: Ssh) -> None:
    arguments = ["it's", "two words", "$HOME", "*", "a;b", "", "ü\n"]
    assert board.run(["printf", "%s|", *arguments], 30) == "|".join(arguments) + "|"
    with pytest.raises(TargetError, match=r"sh -c 'echo no >&2; exit 3' on board failed \(exit status 3\): no"):
        board.run(["sh", "-c", "echo no >&2; exit 3"], 30)
    with pytest.raises(TargetError, match=r"sleep 60 on board did not end within 0.5 s"):
        board.run(["sleep", "60"], 0.5)


def test_everything_goes_through_one_connection(server: Server, board: Ssh, tmp_path: Path) -> None:
    def accepted() -> int:
        return (server.folder / "log").read_text().count("Accepted publickey")

    before = accepted()
    board.put(made(tmp_path / "a.bin", 10))
    board.run(["true"], 30)
    board.start("openvino").close()
    assert accepted() == before + 1


def test_nothing_stays_after_the_end(board: Ssh, tmp_path: Path) -> None:
    agent = board.start("openvino")
    place = Path(board.place("output.npy"))
    place.write_bytes(b"x")
    assert subprocess.run(["pgrep", "-f", board._session], capture_output=True, check=False).stdout
    agent.close()
    board.close()
    assert not place.parent.exists()
    assert not board._sockets.exists()
    found = subprocess.run(["pgrep", "-fa", f"{board._session}|{board._sockets}"], capture_output=True, check=False)
    assert found.stdout == b""


def test_a_jump_host_is_gone_through(server: Server, tmp_path: Path) -> None:
    gate = Server(emptied(tmp_path / "gate"))
    host = Ssh("board", through(server, gate.config), str(tmp_path / "cache"))
    try:
        there = Path(host.put(made(tmp_path / "model.bin", 300_000)))
        assert there.read_bytes() == (tmp_path / "model.bin").read_bytes()
        with host.start("tflite") as agent:
            assert agent.call("open", 60, threads=1, xnnpack=True)["machine"]["runtime"].startswith("ai_edge_litert")
    finally:
        host.close()
        gate.stop()
    assert (gate.folder / "log").read_text().count("Accepted publickey") == 1


def test_a_jump_host_that_refuses_is_named_and_not_the_board(server: Server, tmp_path: Path) -> None:
    gate = Server(emptied(tmp_path / "gate"))
    try:
        text = refused(Ssh("board", through(server, gate.configured("denied", key="stranger"))))
        assert re.match(r"\S+@127\.0\.0\.1, a jump host before board, refuses this user's keys", text)
        assert re.search(r"ssh-copy-id \S+@127\.0\.0\.1$", text)
    finally:
        gate.stop()


def through(server: Server, gate: Path) -> Path:
    """A configuration in which the board is behind another host."""
    text = gate.read_text().replace("Host board", "Host gate")
    return server.configured("through", more=f"  ProxyJump gate\n{text}")


# ---- the device program over the link ------------------------------------------------------------------------


def test_a_login_shell_that_talks_disturbs_nothing(tmp_path: Path) -> None:
    talking = Server(emptied(tmp_path / "sshd"), greeting="Welcome!\\n3\\n\\nhave fun\\n")
    host = Ssh("board", talking.config, str(tmp_path / "cache"))
    try:
        with host.start("openvino") as agent:
            assert agent.call("state", 30)["load"] >= 0
    finally:
        host.close()
        talking.stop()


def test_a_program_whose_link_broke_is_started_again_and_opened_again(server: Server, board: Ssh) -> None:
    with board.start("openvino") as agent:
        opened = agent.call("open", 60, threads=1, precision="f32")
        cut = board._link
        assert cut is not None
        cut._process.kill()
        cut._process.wait()
        assert agent.call("state", 60)["load"] >= 0
        assert agent.call("open", 60, threads=1, precision="f32")["machine"] == opened["machine"]


def test_an_ssh_that_is_killed_in_the_middle_of_a_profile_costs_only_time(server: Server, tmp_path: Path) -> None:
    graph = trace(nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)), torch.randn(1, 3, 12, 12))
    choices = widths.candidates(graph.groups, 0.1)
    entries = store.Store(tmp_path / "latency.sqlite")
    killers = []

    def after_the_first_batch(done: int, of: int) -> None:
        if not killers:
            killers.append(threading.Timer(0.1, cut._process.kill))
            killers[0].start()

    sections = {"pi": {"kind": "tflite", "host": "board", "ssh_config": str(server.config)}}
    with closing(entries), closing(open_target("pi", sections)) as target:
        host = target.host
        assert isinstance(host, Ssh)
        cut = host._link
        assert cut is not None
        _, filled = measure.fill(measure.timed(graph.layers, target), choices, target, entries, after_the_first_batch)
        assert cut.status() is not None
        assert host._link is not cut
        assert filled.measured == filled.entries == len(entries.entries(target.fingerprint())) - 1  # the sentinel


def test_a_program_that_is_killed_is_no_broken_link(board: Ssh) -> None:
    with board.start("openvino") as agent:
        agent.call("open", 60, threads=1, precision="f32")
        subprocess.run(["pkill", "-KILL", "-f", rf"openvino {board._session}-openvino$"], check=True)
        with pytest.raises(AgentError, match=r"the program on the device ended \(exit status 137\)"):
            agent.call("state", 60)


def test_what_a_broken_link_left_running_is_ended(board: Ssh) -> None:
    left = board.start("openvino")
    with board.start("openvino") as agent:
        assert agent.call("state", 30)["load"] >= 0
        with pytest.raises(AgentError, match="exit status 137"):
            left.call("state", 30)


# ---- the state of a board ------------------------------------------------------------------------------------


def test_a_raspberry_pi_says_what_slows_it_down(tmp_path: Path) -> None:
    tool = emptied(tmp_path / "tools") / "vcgencmd"
    tool.write_text("#!/bin/sh\necho throttled=0x50005\n")
    tool.chmod(0o755)
    pi = Server(emptied(tmp_path / "sshd"), path=f"{tool.parent}:{PATH}")
    host = Ssh("board", pi.config, str(tmp_path / "cache"))
    try:
        with host.start("openvino") as agent:
            hot = agent.call("state", 30)
            tool.write_text("#!/bin/sh\necho throttled=0x50000\n")  # it was, since it was switched on
            cool = agent.call("state", 30)
    finally:
        host.close()
        pi.stop()
    assert (hot["throttled"], cool["throttled"]) == (True, False)
    assert {"throttled: too low a voltage", "throttled: slowed down"} <= set(hot["notes"])
    assert not [note for note in cool["notes"] if "throttled" in note]
    assert hot["memory_mb"] > 0


# ---- what is said --------------------------------------------------------------------------------------------


def refused(host: Ssh) -> str:
    try:
        with pytest.raises(TargetError) as caught:
            host.run(["true"], 30)
    finally:
        host.close()
    return str(caught.value)


def test_a_host_that_does_not_answer(server: Server, tmp_path: Path) -> None:
    config = server.configured("closed", port=free_port())
    host = Ssh("board", config)
    try:
        with pytest.raises(LinkError, match=r"board cannot be reached: .*Connection refused; check that it is on"):
            host.put(made(tmp_path / "a.bin", 1))
    finally:
        host.close()


def test_a_name_that_does_not_resolve(server: Server) -> None:
    text = refused(Ssh("pi@no-such-board.invalid", server.config))
    assert "pi@no-such-board.invalid is no name that this machine can resolve" in text


def test_another_host_key(server: Server) -> None:
    public = " ".join((server.folder / "stranger.pub").read_text().split()[:2])
    (server.folder / "wrong").write_text(f"[127.0.0.1]:{server.port} {public}\n")
    text = refused(Ssh("board", server.configured("changed", known="wrong")))
    assert "board shows another host key" in text
    assert "ssh-keygen -R board" in text


def test_an_unknown_host_key(server: Server) -> None:
    text = refused(Ssh("board", server.configured("unknown", known="nothing")))
    assert "host key is not known yet; connect once by hand, compare the fingerprint" in text


def test_a_key_that_is_refused(server: Server) -> None:
    text = refused(Ssh("board", server.configured("denied", key="stranger")))
    assert text.startswith("board refuses this user's keys")
    assert "ssh-copy-id board" in text


def test_a_board_that_wants_a_password_is_told_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even one that a program would answer for the user: it would be the wrong one again and again."""
    locked = Server(emptied(tmp_path / "sshd"), passwords=True)
    asked = made(tmp_path / "askpass", 0)
    asked.write_text(f"#!/bin/sh\ntouch {tmp_path}/asked; echo wrong\n")
    asked.chmod(0o755)
    monkeypatch.setenv("SSH_ASKPASS", str(asked))
    monkeypatch.setenv("SSH_ASKPASS_REQUIRE", "force")
    try:
        text = refused(Ssh("board", locked.configured("denied", key="stranger")))
    finally:
        locked.stop()
    assert text.startswith("board refuses this user's keys (edgeprune never asks for a password); give it one with")
    assert not (tmp_path / "asked").exists()


def test_no_host_may_look_like_an_option() -> None:
    with pytest.raises(TargetError, match=r"'-oProxyCommand=x' is no host; write it as ssh takes it"):
        Ssh("-oProxyCommand=x")


def programs(tmp_path: Path) -> Path:
    """A folder with what every machine has."""
    folder = emptied(tmp_path / "bin")
    for name in ("sh", "cat"):
        (folder / name).symlink_to(str(shutil.which(name)))
    return folder


def emptied(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_a_machine_without_python(tmp_path: Path) -> None:
    limited = Server(emptied(tmp_path / "sshd"), path=str(programs(tmp_path)))
    host = Ssh("board", limited.config, str(tmp_path / "cache"))
    try:
        with pytest.raises(TargetError, match="board has no python3; install it there: sudo apt install python3"):
            host.start("openvino")
    finally:
        host.close()
        limited.stop()


def test_a_machine_without_numpy(tmp_path: Path) -> None:
    path = programs(tmp_path)
    (path / "python3").write_text(f'#!/bin/sh\nexec {os.path.realpath(sys.executable)} -IS "$@"\n')
    (path / "python3").chmod(0o755)
    limited = Server(emptied(tmp_path / "sshd"), path=str(path))
    host = Ssh("board", limited.config, str(tmp_path / "cache"))
    try:
        with pytest.raises(RuntimeMissing, match=r"openvino: No module named 'numpy'; install it there: sudo apt"):
            host.start("openvino")
    finally:
        host.close()
        limited.stop()


def test_a_folder_that_may_not_be_written(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    host = Ssh("board", server.config, str(tmp_path / "file" / "cache"))
    try:
        with pytest.raises(TargetError, match=r"files cannot be sent to board: Not a directory \(.*file/cache\)"):
            host.put(made(tmp_path / "a.bin", 1))
    finally:
        host.close()


def test_a_full_disk(board: Ssh, server: Server, small_disk: Path, tmp_path: Path) -> None:
    host = Ssh("board", server.config, str(small_disk / "cache"))
    try:
        with pytest.raises(
            TargetError, match=r"model.bin does not fit into .*: 9,?\d+ bytes are needed and \d+ are free"
        ):
            host.put(made(tmp_path / "model.bin", 5_000_000))
        assert list((small_disk / "cache").rglob("*model*")) == []
    finally:
        host.close()


# ---- this machine --------------------------------------------------------------------------------------------


def test_here_uses_files_where_they_are(tmp_path: Path) -> None:
    here = Here()
    path = made(tmp_path / "model.bin", 10)
    assert here.put(path) == str(path)
    assert here.run(["printf", "%s", "a b"], 10) == "a b"
    place = Path(here.place("out.bin"))
    place.write_bytes(b"1")
    here.get(str(place), tmp_path / "copy.bin")
    here.close()
    assert (tmp_path / "copy.bin").read_bytes() == b"1"
    assert not place.exists()
