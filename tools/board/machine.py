"""The running board: qemu with a clock that counts instructions, its disk, its network and its power."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

BOOT_S = 180
TICKS = 10**9  # a second: of the counter that programs read the time from, one an instruction
CONFIG = """\
Host board board-root
  HostName 127.0.0.1
  Port {port}
  HostKeyAlias edgeprune-board
  IdentityFile {keys}/user
  IdentitiesOnly yes
  UserKnownHostsFile {keys}/known_hosts
  GlobalKnownHostsFile /dev/null
  StrictHostKeyChecking yes
  BatchMode yes
  ConnectTimeout 60
Host board-root
  User root
Host board
  User pi
"""
FAILING = """\
[set-state]
event = "pwritev"
state = "1"
new_state = "2"
[inject-error]
event = "pwritev"
state = "2"
errno = "5"
once = "off"
"""


class Machine:
    """One board with a state of its own: the folder holds its disk, its settings and its process id.

    Args:
        built: the folder that `tools/arm_board build` made.
        state: of this board.
    """

    def __init__(self, built: Path, state: Path) -> None:
        self.built, self.state = built, state
        self.config = state / "ssh_config"

    def start(self, settings: dict[str, Any]) -> None:
        """A new disk, and power."""
        self.stop(signal.SIGKILL)
        shutil.rmtree(self.state, ignore_errors=True)
        self.state.mkdir(parents=True)
        subprocess.run(
            ["cp", "--sparse=always", "--reflink=auto", self.built / "disk.img", self.state / "disk.img"], check=True
        )
        settings = {**settings, "port": settings["port"] or free_port()}
        (self.state / "settings.json").write_text(json.dumps(settings))
        (self.state / "fail.conf").write_text(FAILING)
        self.config.write_text(CONFIG.format(port=settings["port"], keys=self.built / "keys"))
        self.power_on()

    def power_on(self) -> None:
        """Boot the disk as it is, and wait until sshd answers."""
        if self.pid() == 0:
            log = (self.state / "log").open("wb")
            process = subprocess.Popen(
                self._command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
            (self.state / "pid").write_text(str(process.pid))
            time.sleep(0.2)  # until its command line can be read
        self._wait()

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """SIGKILL is a power cut: what the board had not synced is lost."""
        pid = self.pid()
        if pid:
            os.kill(pid, how)
        deadline = time.monotonic() + 10
        while self.pid():
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        (self.state / "pid").unlink(missing_ok=True)

    def pid(self) -> int:
        """Of the running board; 0 when it is off."""
        with suppress(OSError, ValueError):
            pid = int((self.state / "pid").read_text())
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
            if str(self.state) in Path(f"/proc/{pid}/cmdline").read_text():
                return pid
        return 0

    def tell(self, command: str, **arguments: Any) -> Any:
        """A command of qemu's machine protocol."""
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(60)
            control.connect(os.path.relpath(self.state / "qmp"))  # names of sockets are short
            lines = control.makefile("rw")
            lines.readline()
            for request in ({"execute": "qmp_capabilities"}, {"execute": command, "arguments": arguments}):
                lines.write(json.dumps(request) + "\n")
                lines.flush()
                reply = json.loads(lines.readline())
                while "event" in reply:
                    reply = json.loads(lines.readline())
            if "error" in reply:
                sys.exit(f"the board refused {command}: {reply['error']}")
            return reply["return"]

    def _command(self) -> list[str]:
        settings = json.loads((self.state / "settings.json").read_text())
        drive = f"file={self.state}/disk.img,if=none,format=raw,id=d,cache=writeback"
        if settings["bad_disk"]:
            drive = drive.replace("file=", f"file=blkdebug:{self.state}/fail.conf:") + ",werror=report"
        if settings["slow_disk"]:
            drive += f",throttling.bps-write={settings['slow_disk']}"
        return [
            *("qemu-system-aarch64", "-M", "virt", "-cpu", f"{settings['cpu']},cntfrq={TICKS}"),
            *("-m", str(settings["memory_mb"]), "-icount", "shift=0,sleep=on"),
            *("-nographic", "-nodefaults", "-no-user-config"),
            *("-kernel", f"{self.built}/vmlinuz", "-initrd", f"{self.built}/initrd.gz"),
            *("-append", "console=ttyAMA0 quiet panic=-1 mitigations=off nokaslr"),
            *(self._card(settings["card"]) if settings["card"] else ()),
            *("-drive", drive, "-device", "virtio-blk-device,drive=d"),  # the last one is the board's first
            *("-object", "rng-random,filename=/dev/urandom,id=r", "-device", "virtio-rng-device,rng=r"),
            *("-netdev", f"user,id=n,restrict=on,hostfwd=tcp:127.0.0.1:{settings['port']}-:22"),
            *("-device", "virtio-net-device,netdev=n,id=nic"),
            *("-serial", f"file:{self.state}/console.log", "-qmp", f"unix:{self.state}/qmp,server=on,wait=off"),
        ]

    def _card(self, path: str) -> Sequence[str]:
        """The second disk, /dev/vdb; its errors are the board's to handle."""
        drive = f"file={path},if=none,format=raw,id=c,cache=writeback,werror=report,rerror=report"
        return "-drive", drive, "-device", "virtio-blk-device,drive=c"

    def _wait(self) -> None:
        port = json.loads((self.state / "settings.json").read_text())["port"]
        deadline = time.monotonic() + BOOT_S
        while not _greets(port):
            if not self.pid():
                sys.exit(f"the board went off: {(self.state / 'log').read_text()}")
            if time.monotonic() > deadline:
                sys.exit(f"no ssh server answers after {BOOT_S} s: {(self.state / 'console.log').read_text()[-2000:]}")
            time.sleep(0.1)


def _greets(port: int) -> bool:
    """Does an ssh server say its name?"""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as link:
        link.settimeout(5)
        return link.recv(4) == b"SSH-"
    return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
