"""Emulated ARM boards for tests: started, hit by faults, and looked into."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import models

from edgeprune import deploy, measure
from edgeprune.host import Ssh
from edgeprune.target import Target

ARM_BOARD = Path(__file__).resolve().parent.parent / "tools" / "arm_board"


class Board:
    """An emulated board of its own."""

    def __init__(self, folder: Path, *options: str) -> None:
        self._state = folder
        self.config = Path(self.act("start", *options).strip())

    def act(self, action: str, *options: str) -> str:
        command = [sys.executable, str(ARM_BOARD), action, "--state", str(self._state), *options]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, timeout=600)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def as_root(self, command: str) -> str:
        ssh = ["ssh", "-F", str(self.config), "board-root", command]
        return subprocess.run(ssh, capture_output=True, text=True, check=True, timeout=120).stdout


def layers(target: Target, count: int) -> list[float]:
    batch = [measure.SENTINEL] * count
    return [timing.median_ms for timing in target.time(batch, 3, 60, 0.01, 1.0)]


def during(delay_s: float, *acts: Callable[[], object]) -> threading.Thread:
    """Acts that begin while something else runs."""

    def run() -> None:
        time.sleep(delay_s)
        for act in acts:
            act()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def installed(host: Ssh, tmp_path: Path, step: str, size_bytes: int = 200_000, folder: str = "models/faults") -> str:
    return deploy.install(host, *models.package(tmp_path, step, size_bytes), folder).version


def works(host: Ssh, folder: str = "models/faults") -> bool:
    """Does `current` lead to a model that answers as recorded? By the smoke test, in a process of its own there."""
    program = host.run(["sh", "-c", "ls -t .cache/edgeprune/*/edgeprune-*.pyz"], 60).split()[0]
    code = "import sys; sys.path.insert(0, sys.argv[1]); from device import smoke; sys.exit(smoke.main(sys.argv[2]))"
    host.run(["python3", "-c", code, program, f"{folder}/current"], 120)
    return True
