"""A real OpenSSH server on 127.0.0.1 with keys of its own, started as a child, and ssh configurations for it."""

from __future__ import annotations

import getpass
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

SERVER = shutil.which("sshd") or "/usr/sbin/sshd"
PATH = f"{Path(sys.executable).parent}:/usr/bin:/bin"
NEEDED = "tests of the link need a real ssh server: sudo apt install openssh-server openssh-client"


class Server:
    """Accepts one key for this user. `config` is an ssh configuration in which it is called `board`.

    Args:
        folder: of its keys and settings.
        path: where its programs are found.
        greeting: what its login shell prints.
        passwords: are they accepted too?
    """

    def __init__(self, folder: Path, path: str = PATH, greeting: str = "", passwords: bool = False) -> None:
        assert Path(SERVER).exists(), NEEDED
        self.folder, self.port = folder, free_port()
        for name in ("host", "user", "stranger"):
            subprocess.run(["ssh-keygen", "-qt", "ed25519", "-N", "", "-f", folder / name], check=True)
        self._settings = folder / "sshd_config"
        self._settings.write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nPidFile none\nUsePAM no\n"
            f"AuthorizedKeysFile {folder}/user.pub\nStrictModes no\nKbdInteractiveAuthentication no\n"
            f"PasswordAuthentication {'yes' if passwords else 'no'}\n"
            f"PermitRootLogin {'yes' if passwords else 'prohibit-password'}\n"
            f"ForceCommand printf '{greeting}'; PATH={path} PYTHONDONTWRITEBYTECODE=1 exec {shutil.which('sh')} -c "
            '"$SSH_ORIGINAL_COMMAND"\n'
        )
        public = " ".join((folder / "host.pub").read_text().split()[:2])
        (folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {public}\n")
        self.config = self.configured("config")
        self.start()

    def configured(
        self, name: str, key: str = "user", known: str = "known_hosts", port: int = 0, more: str = ""
    ) -> Path:
        path = self.folder / name
        path.write_text(
            f"Host board\n  HostName 127.0.0.1\n  Port {port or self.port}\n  User {getpass.getuser()}\n"
            f"  HostKeyAlias [127.0.0.1]:{self.port}\n  IdentityFile {self.folder}/{key}\n  IdentitiesOnly yes\n"
            f"  UserKnownHostsFile {self.folder}/{known}\n  GlobalKnownHostsFile /dev/null\n{more}"
        )
        return path

    def start(self) -> None:
        if Path("/run").is_dir() and getpass.getuser() == "root":
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        log = (self.folder / "log").open("ab")
        self.process = subprocess.Popen([SERVER, "-D", "-e", "-f", str(self._settings)], stderr=log)
        log.close()
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert self.process.poll() is None, (self.folder / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def stop(self) -> None:
        """The listener and every connection."""
        subprocess.run(["pkill", "-KILL", "-P", str(self.process.pid)], check=False)
        self.process.kill()
        self.process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
