"""Where a device program runs and where its files lie: this machine, or another one over the user's own ssh."""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Protocol, TypeVar

from . import files
from .agent import Agent, first_object, local_program, next_object
from .errors import AgentError, LinkError, TargetError
from .link import STDERR_LINES, Process

FOLDER = "~/.cache/edgeprune"  # on a device
CONNECT_S, ANSWER_S = 30, 120.0
PATIENCE_S = 180.0  # a board that lost its power is back within it
SLOW_BYTES_S = 100_000  # a card that writes, or reads back, fewer bytes a second hangs
BLOCK = 1 << 18
LOST = 255  # ssh's own exit status
NO_COMMAND = 127  # a shell's
MARK = "edgeprune: connected"
T = TypeVar("T")


class Host(Protocol):
    """A machine with Python. Close it when done: nothing stays running there."""

    name: str
    copies: bool  # what `put` returns is a copy that belongs to edgeprune

    def start(self, runtime: str, beside: str = "") -> Agent:
        """Start the device program for a runtime; `beside` names a second one that runs at the same time.

        Raises TargetError that says what is missing.
        """

    def put(self, path: Path) -> str:
        """Make a file's content available there and return its path; what is there already is not sent again."""

    def drop(self, remote: str) -> None:
        """Delete the copy that `put` made."""

    def place(self, name: str) -> str:
        """A path there for a file that a program there will write; gone after `close`."""

    def get(self, remote: str, local: Path) -> None:
        """Copy a file from there."""

    def run(self, arguments: Sequence[str], timeout_s: float) -> str:
        """Run a program there and return what it prints; raises TargetError when it fails."""

    def close(self) -> None: ...


class Here:
    """This machine: files are used where they are."""

    name = "this machine"
    copies = False

    def __init__(self) -> None:
        self._folder: Path | None = None

    def start(self, runtime: str, beside: str = "") -> Agent:
        return Agent.local(runtime)

    def put(self, path: Path) -> str:
        return str(path.absolute())

    def drop(self, remote: str) -> None:
        pass

    def place(self, name: str) -> str:
        self._folder = self._folder or Path(tempfile.mkdtemp(prefix="edgeprune-run-"))
        return str(self._folder / name)

    def get(self, remote: str, local: Path) -> None:
        with files.writing(local) as beside:
            shutil.copyfile(remote, beside)

    def run(self, arguments: Sequence[str], timeout_s: float) -> str:
        return _ran(list(arguments), arguments, self.name, timeout_s)

    def close(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


class Ssh:
    """A machine behind the user's own ssh: their configuration, keys, jump hosts and known hosts; one connection.

    The connection is a child process that ends with this one. When it breaks, the next use makes another, and files go
    on from where they were.

    Args:
        destination: as ssh takes it: a name of its configuration, user@host, or ssh://user@host:port.
        config: a file to use in the place of ~/.ssh/config.
        folder: on the device, for the device program and files.
    """

    copies = True

    def __init__(self, destination: str, config: Path | None = None, folder: str = FOLDER) -> None:
        if not destination or destination.startswith("-") or not destination.isprintable():
            raise TargetError(f"{destination!r} is no host; write it as ssh takes it: pi@raspberrypi.local")
        self.name, self.config, self._folder = destination, config, folder
        self._session = secrets.token_hex(8)
        # sockets have short names, and no other user may come near this one
        self._sockets = Path(tempfile.mkdtemp(prefix="edgeprune-ssh-", dir="/tmp"))
        self._options = [
            *([] if config is None else ["-F", str(config)]),
            *(f"-oControlPath={self._sockets}/link", "-oBatchMode=yes", f"-oConnectTimeout={CONNECT_S}"),
            *("-oServerAliveInterval=5", "-oServerAliveCountMax=4", "-oControlPersist=no", "-oLogLevel=INFO"),
            *("-oClearAllForwardings=yes", "-oRemoteCommand=none", "-oPermitLocalCommand=no", "-T"),
        ]
        self._link: Process | None = None
        self._store: Process | None = None
        self._root = ""  # the folder's absolute path there
        self._reached = False  # ever

    def connect(self) -> None:
        """Make the connection if it is not there.

        Raises:
            LinkError: the host cannot be reached now; TargetError: it refuses, or is not who it was.
        """
        if self._link is not None and self._link.status() is None:
            return
        if shutil.which("ssh") is None:
            raise TargetError("this machine has no ssh program; install it: sudo apt install openssh-client")
        self._drop()
        self._link = Process(self._command(f"echo {shlex.quote(MARK)}; exec cat", master=True), link_status=LOST)
        deadline_s = time.monotonic() + CONNECT_S + ANSWER_S
        try:
            while self._link.read(deadline_s).strip() != MARK:
                pass  # what a login shell prints
            self._reached = True
        except TargetError as error:
            said = self._link.last_words(STDERR_LINES)
            self._drop()
            raise explained(self.name, said) from error

    def start(self, runtime: str, beside: str = "") -> Agent:
        return self._patiently(lambda: Agent(lambda: self._begin(runtime, beside), PATIENCE_S))

    def _begin(self, runtime: str, beside: str) -> Process:
        program = self.put(local_program())
        return self._python(["-u", program, runtime, f"{self._session}-{runtime}{beside}"])

    def put(self, path: Path) -> str:
        """Send a file. A link that breaks meanwhile is made again, and the rest sent; the checksum decides."""
        wanted = {"name": path.name, "size_bytes": path.stat().st_size, "sha256": files.sha256(path)}

        def attempt() -> str:
            found = self._put(path, wanted) or self._put(path, wanted)
            if not found:
                raise TargetError(f"{path.name} arrives damaged at {self.name}: its disk is faulty, or {path} changes")
            return found

        return self._patiently(attempt)

    def _patiently(self, attempt: Callable[[], T]) -> T:
        """Again when the link breaks: a host that was reached once comes back."""
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                return attempt()
            except LinkError:
                if not self._reached or time.monotonic() > deadline_s:
                    raise
                time.sleep(1.0)

    def _put(self, path: Path, wanted: dict[str, Any]) -> str:
        """The path there; "" when it arrived damaged: then what went before was not what it seemed, and is deleted."""
        store = self._opened_store()
        slow_s = 2 * wanted["size_bytes"] / SLOW_BYTES_S
        reply = self._ask(store, wanted, ANSWER_S + slow_s)
        if "offset" in reply:
            with path.open("rb") as stream:
                stream.seek(reply["offset"])
                while block := stream.read(BLOCK):
                    try:
                        store.send(block)
                    except AgentError:
                        break  # its reply says why it takes no more
            reply = self._heard(store, f"{path.name} could not be sent to {self.name}", ANSWER_S + slow_s)
        return str(reply["path"])

    def drop(self, remote: str) -> None:
        self._patiently(lambda: self._ask(self._opened_store(), {"remove": str(Path(remote).parent)}))

    def place(self, name: str) -> str:
        self._opened_store()
        return f"{self._root}/{self._session}/{name}"

    def get(self, remote: str, local: Path) -> None:
        self._patiently(lambda: self._get(remote, local))

    def _get(self, remote: str, local: Path) -> None:
        store = self._opened_store()
        reply = self._ask(store, {"get": remote})
        left = reply["size_bytes"] + 1  # and a newline
        with files.writing(local) as beside:
            with beside.open("wb") as stream:
                while left:
                    piece = store.receive(time.monotonic() + ANSWER_S)
                    left -= len(piece)
                    stream.write(piece if left else piece[:-1])
            if files.sha256(beside) != reply["sha256"]:
                raise TargetError(f"{remote} came from {self.name} damaged; try again")

    def run(self, arguments: Sequence[str], timeout_s: float) -> str:
        self.connect()
        command = self._command(_guarded(arguments))
        return _ran(command, arguments, self.name, timeout_s)

    def close(self) -> None:
        with contextlib.suppress(TargetError):
            if self._store is not None and self._link is not None and self._link.status() is None:
                self._ask(self._store, {"remove": f"{self._root}/{self._session}"})
        self._drop()
        shutil.rmtree(self._sockets, ignore_errors=True)

    # ---- inside ----------------------------------------------------------------------------------------------

    def _command(self, remote: str, master: bool = False) -> list[str]:
        return ["ssh", *self._options, f"-oControlMaster={'yes' if master else 'no'}", "--", self.name, remote]

    def _python(self, arguments: Sequence[str]) -> Process:
        self.connect()
        return Process(self._command(_guarded(["python3", *arguments])), link_status=LOST)

    def _opened_store(self) -> Process:
        """The program that takes and gives files, running."""
        if self._store is not None and self._store.status() is None:
            return self._store
        if self._store is not None:
            self._store.close()
        source = (resources.files("edgeprune.profilers") / "storage.py").read_text(encoding="utf-8")
        store = self._python(["-c", source, self._folder])
        self._store = store
        self._root = self._heard(store, f"files cannot be sent to {self.name}", ANSWER_S, first_object)["folder"]
        self._ask(store, {"make": f"{self._root}/{self._session}"})
        return store

    def _ask(self, store: Process, request: dict[str, Any], timeout_s: float = ANSWER_S) -> dict[str, Any]:
        store.write(json.dumps(request))
        return self._heard(store, f"{self.name} refused a file", timeout_s)

    def _heard(
        self,
        store: Process,
        problem: str,
        timeout_s: float,
        read: Callable[[Process, float], dict[str, Any]] = next_object,
    ) -> dict[str, Any]:
        try:
            reply = read(store, time.monotonic() + timeout_s)
        except AgentError as error:
            status = store.status()
            store.close()
            raise self.without_python() if status == NO_COMMAND else error from error
        if "error" in reply:
            raise TargetError(f"{problem}: {reply['error']}")
        return reply

    def without_python(self) -> TargetError:
        """What to say when there is none."""
        return TargetError(f"{self.name} has no python3; install it there: sudo apt install python3 python3-numpy")

    def _drop(self) -> None:
        for process in (self._store, self._link):
            if process is not None:
                process.close()
        self._store = self._link = None


def reach(destination: str, like: Host) -> Host:
    """Another machine, with the same ssh configuration as one that is known."""
    return Ssh(destination, like.config if isinstance(like, Ssh) else None)


def explained(name: str, text: str) -> TargetError:
    """What ssh said about a host, with what to do next; LinkError where trying again can help."""
    # "UNKNOWN port 65535" is what ssh calls the end of a way through another host
    if jump := re.search(r"(?s)(\S+): Permission denied.*UNKNOWN port 65535", text):
        return TargetError(
            f"{jump[1]}, a jump host before {name}, refuses this user's keys (edgeprune never asks for a password); "
            f"give it one with: ssh-copy-id {jump[1]}"
        )
    bare = re.sub(r"^(ssh://)?([^@/]*@)?", "", name)
    if "IDENTIFICATION HAS CHANGED" in text:
        return TargetError(
            f"{name} shows another host key than the one that is known for it: another machine answers, or it was "
            f"installed anew. If you know that it was, forget the old key with: ssh-keygen -R {bare}"
        )
    if "Host key verification failed" in text:
        return TargetError(
            f"{name}'s host key is not known yet; connect once by hand, compare the fingerprint that it shows, and "
            f"accept it: ssh {name}"
        )
    if "Permission denied" in text or "Too many authentication failures" in text:
        return TargetError(
            f"{name} refuses this user's keys (edgeprune never asks for a password); give it one with: "
            f"ssh-copy-id {name}"
        )
    if "Could not resolve" in text:
        return LinkError(f"{name} is no name that this machine can resolve; check it, or use the board's IP address")
    if "account is currently not available" in text:
        return TargetError(f"{name} lets this user log in but run nothing: {text}")
    return LinkError(f"{name} cannot be reached: {text}; check that it is on, in this network, and runs an ssh server")


def _guarded(arguments: Sequence[str]) -> str:
    """One word for the login shell, whichever it is. A program killed by a signal must not look like a broken link."""
    return shlex.join(["sh", "-c", f"{shlex.join(arguments)}; exit $?"])


def _ran(command: list[str], arguments: Sequence[str], name: str, timeout_s: float) -> str:
    try:
        done = subprocess.run(command, capture_output=True, timeout=timeout_s, check=False, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise TargetError(f"{shlex.join(arguments)} on {name} did not end within {timeout_s:g} s") from None
    except OSError as error:
        raise TargetError(f"{command[0]} could not be started: {error}") from error
    said = done.stderr.decode("utf-8", "replace").strip()
    if done.returncode == LOST and command[0] == "ssh":
        raise explained(name, said)
    if done.returncode:
        raise TargetError(f"{shlex.join(arguments)} on {name} failed (exit status {done.returncode}): {said}")
    return done.stdout.decode("utf-8", "replace")
