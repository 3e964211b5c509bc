"""Install models on this device for a host: uploaded files in, a tested version out (see `deploy`).

The smoke test runs in a process of its own, and so does the command that restarts the model's user.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import deploy
from .history import DeployError

SMOKE_S, SERVICE_S = 300.0, 120.0
EVENT_S = 15.0  # the host hears this often that the smoke test still runs
TRY = "import sys; sys.path.insert(0, sys.argv[1]); from device import smoke; sys.exit(smoke.main(sys.argv[2]))"


class Program:
    """The calls of the device program: `room` before anything is sent, then `install`; `rollback` and `versions`."""

    finishes = True  # what has begun, also when the host is gone: a service is not left with half a restart

    def calls(self) -> dict[str, Callable[..., Any]]:
        return {"room": self.room, "install": self.install, "rollback": self.rollback, "versions": self.versions}

    def room(self, event: Callable[[Any], None], folder: str, size_bytes: int) -> dict[str, Any]:
        """Refuse early what cannot be installed: no space, or no folder that can be written."""
        path = _absolute(folder)
        with deploy.explained("installing into", path):
            deploy.prepare(path)
            deploy.check_space(path, size_bytes)
        return {"folder": str(path)}

    def install(
        self, event: Callable[[Any], None], folder: str, files: dict[str, str], manifest: dict[str, Any],
        keep: int, service: str, linked: bool, lock_timeout_s: float,
    ) -> dict[str, str]:  # fmt: skip
        """Install uploaded files; see the function of this name."""
        sources = {name: Path(path) for name, path in files.items()}
        restart = _service(service)
        return deploy.install(
            sources, manifest, _absolute(folder), _smoke(event), keep, lock_timeout_s, restart=restart, linked=linked
        )

    def rollback(
        self, event: Callable[[Any], None], folder: str, service: str, lock_timeout_s: float
    ) -> dict[str, str]:
        return deploy.rollback(_absolute(folder), _smoke(event), lock_timeout_s, restart=_service(service))

    def versions(self, event: Callable[[Any], None], folder: str) -> list[dict[str, Any]]:
        return [asdict(version) for version in deploy.versions(_absolute(folder))]


def _absolute(folder: str) -> Path:
    return Path(folder).expanduser().absolute()


def _smoke(event: Callable[[Any], None]) -> Callable[[Path], None]:
    """The smoke test in a process of its own, for a runtime may abort or hang on a model that it cannot load."""

    def smoke(version: Path) -> None:
        command = [sys.executable, "-c", TRY, str(Path(__file__).resolve().parent.parent), str(version)]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2, stderr=subprocess.PIPE) as process:
            said = _ended(process, SMOKE_S, event)
        if process.returncode:
            words = said.decode("utf-8", "replace").strip().splitlines() or ["it said nothing"]
            raise DeployError(f"exit status {process.returncode}: {words[-1]}")

    return smoke


def _ended(process: subprocess.Popen[bytes], timeout_s: float, event: Callable[[Any], None]) -> bytes:
    """What a process said until its end; it is killed when that does not come."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return process.communicate(timeout=EVENT_S)[1]
        except subprocess.TimeoutExpired:
            with suppress(OSError):  # the host may be gone
                event({"testing": process.pid})
        if time.monotonic() > deadline:
            process.kill()
            process.communicate()
            raise DeployError(f"it did not end within {timeout_s:g} s")


def _service(command: str) -> Callable[[], None] | None:
    arguments = shlex.split(command)
    if not arguments:
        return None

    def restart() -> None:
        try:
            subprocess.run(
                arguments, stdin=subprocess.DEVNULL, stdout=2, stderr=subprocess.PIPE, timeout=SERVICE_S, check=True
            )
        except subprocess.CalledProcessError as error:
            said = error.stderr.decode("utf-8", "replace").strip()
            raise DeployError(f"{command} ended with status {error.returncode}: {said or 'it said nothing'}") from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DeployError(f"{command}: {error}") from error

    return restart
