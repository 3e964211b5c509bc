"""Switch a Jetson's power mode because a user asked for it, and put the old one back, whatever happens meanwhile.

A guard process waits for the end of this one and then sets the old mode. A mode survives a reboot, so the old one is
also written down: the next switch knows what to go back to.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import subprocess
import time

from . import jetson

MODES = "/etc/nvpmodel.conf"
NOTE = "~/.cache/edgeprune/power-mode"  # the number to go back to, while another mode is set
SET_S, WAIT_S, POLL_S = 60.0, 90.0, 0.2


class ModeError(RuntimeError):
    """A power mode that cannot be switched to; the message says what to do."""


class Switched:
    """A power mode that holds until `close`, or until this process is gone.

    Args:
        wanted: its name or number.
        modes: the file that lists them.
    Raises:
        ModeError: there is no such mode, no permission, or it would take a reboot.
    """

    def __init__(self, wanted: str, modes: str = MODES) -> None:
        note = os.path.expanduser(NOTE)
        os.makedirs(os.path.dirname(note), exist_ok=True)
        lock = _locked(note + ".lock")
        try:
            before = jetson.power_mode(jetson.said(["nvpmodel", "-q"]))
            if before is None:
                raise ModeError("nvpmodel says no power mode here: it can only be switched on a Jetson")
            number = _number(wanted, modes)
            self._guard = _guarded(_noted(note, before[1]), note, lock)
        finally:
            os.close(lock)  # the guard holds it until the old mode is back
        if number != before[1]:
            try:
                _set(number)
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Put the old mode back."""
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        self._guard.wait(timeout=SET_S)


def _locked(path: str) -> int:
    """Wait until the guard of an earlier session has done its work."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(handle)
                raise ModeError("another session on this board holds its power mode; wait until it has ended") from None
        time.sleep(POLL_S)


def _noted(note: str, now: int) -> int:
    """The mode to go back to: the one that an interrupted session came from, or the current one."""
    try:
        with open(note, encoding="ascii") as stream:
            return int(stream.read(jetson.DIGITS))
    except (OSError, ValueError):
        with open(note + ".next", "w", encoding="ascii") as stream:
            stream.write("%d\n" % now)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(note + ".next", note)
        return now


def _guarded(back: int, note: str, lock: int) -> subprocess.Popen[bytes]:
    restore = " ".join(map(shlex.quote, _command(back)))
    script = "cat >/dev/null; %s >/dev/null 2>&1 </dev/null && rm -f %s" % (restore, shlex.quote(note))
    return subprocess.Popen(
        ["sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        pass_fds=(lock,), start_new_session=True,
    )  # fmt: skip


def _number(wanted: str, modes: str) -> int:
    known = jetson.power_modes(jetson.read(modes))
    number = int(wanted[: jetson.DIGITS]) if wanted.isdigit() else known.get(wanted, known.get(wanted.upper()))
    if number is None or (known and number not in known.values()):
        listed = ", ".join("%s (%d)" % pair for pair in known.items()) or "none that can be read from " + modes
        raise ModeError("there is no power mode %s here; there are: %s" % (wanted, listed))
    return number


def _set(number: int) -> None:
    done = subprocess.run(
        _command(number), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=SET_S,
        check=False,
    )  # fmt: skip
    text = done.stdout.decode("utf-8", "replace").strip()
    now = jetson.power_mode(jetson.said(["nvpmodel", "-q"]))
    if now is not None and now[1] == number:
        return
    if "reboot" in text.lower():
        raise ModeError("power mode %d needs a reboot; switch to it by hand: sudo nvpmodel -m %d" % (number, number))
    raise ModeError(
        "power mode %d could not be set (%s); allow it without a password in sudoers, or switch by hand: "
        "sudo nvpmodel -m %d" % (number, text.replace("\n", " | ")[-300:] or "nvpmodel said nothing", number)
    )


def _command(number: int) -> list[str]:
    return jetson.as_root([jetson.tool("nvpmodel") or "nvpmodel", "-m", str(number)])
