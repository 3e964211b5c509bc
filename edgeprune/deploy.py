"""Install models on a device and take them back. What happens there is `profilers/deploy.py`, on this machine too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import files as disk
from .errors import DeployError, EdgepruneError, LinkError
from .host import Host
from .profilers.history import Version
from .records import Receipt

SILENCE_S = 900.0  # a slow card may take this long over one step
LOCK_S = 30.0


def install(
    host: Host,
    files: Mapping[str, Path],
    manifest: Mapping[str, Any],
    folder: str,
    keep: int = 5,
    service: str = "",
    lock_timeout_s: float = LOCK_S,
) -> Receipt:
    """Send a model to a host, test it there, and make it current; the receipt names what was before.

    Args:
        host: the device.
        files: name in the version's folder -> the file to send.
        manifest: what else is to be known about the model, as JSON values; `smoke` says how it is tested there.
        folder: on the device, from its user's home; made when it does not exist.
        keep: how many of the newest versions stay; the one a rollback would go to stays in any case.
        service: a command that restarts the model's user there, run after the switch; the smoke test runs again after
            it, and when either fails the version before is current again, and restarted.
        lock_timeout_s: how long to wait for another install in that folder.
    Raises:
        DeployError: `current` there is what it was. TargetError: the host cannot be reached or lacks something.
    """
    for name, path in files.items():
        if not path.is_file():
            raise DeployError(f"{path}, to be installed as {name}, is not a file; export the model again")
    sent: dict[str, str] = {}
    try:
        reply = _sent_and_installed(host, files, manifest, folder, keep, service, lock_timeout_s, sent)
    except LinkError:
        raise  # what was sent stays for the next attempt
    except EdgepruneError:
        _drop(host, sent)
        raise
    _drop(host, sent)
    return Receipt(**reply)


def _sent_and_installed(
    host: Host, files: Mapping[str, Path], manifest: Mapping[str, Any], folder: str, keep: int, service: str,
    lock_timeout_s: float, sent: dict[str, str],
) -> dict[str, str]:  # fmt: skip
    with host.start("installer") as agent:
        agent.call("room", SILENCE_S, folder=folder, size_bytes=sum(path.stat().st_size for path in files.values()))
        for name, path in files.items():
            sent[name] = host.put(path)
        installed: dict[str, str] = agent.call(
            "install", SILENCE_S, folder=folder, files=sent, manifest=disk.plain(dict(manifest)), keep=keep,
            service=service, linked=host.copies, lock_timeout_s=lock_timeout_s,
        )  # fmt: skip
        return installed


def _drop(host: Host, sent: Mapping[str, str]) -> None:
    for copy in sent.values():
        host.drop(copy)


def rollback(host: Host, folder: str, service: str = "", lock_timeout_s: float = LOCK_S) -> Receipt:
    """Make the version current that was before this one; `previous` in the receipt is the one that was left.

    Raises:
        DeployError: nothing to go back to, or it is damaged or fails its smoke test; `current` is what it was.
    """
    with host.start("installer") as agent:
        reply = agent.call("rollback", SILENCE_S, folder=folder, service=service, lock_timeout_s=lock_timeout_s)
    return Receipt(**reply)


def versions(host: Host, folder: str) -> tuple[Version, ...]:
    """What is installed, newest first, without waiting for a running install."""
    with host.start("installer") as agent:
        return tuple(Version(**version) for version in agent.call("versions", SILENCE_S, folder=folder))
