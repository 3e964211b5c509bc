"""The board's root file system: Debian's own arm64 packages, unpacked without running anything of them, and wheels."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = (
    "base-files", "libc-bin", "python3-minimal", "libpython3-stdlib", "openssh-server", "openssh-sftp-server", "bash",
    "dash", "coreutils", "findutils", "grep", "sed", "procps", "hostname", "libstdc++6", "libgomp1", "busybox-static",
    "iproute2",
)  # fmt: skip
WHEELS = ("ai-edge-litert==2.3.0", "numpy==2.2.6")
GLIBC = range(17, 37)  # wheels' tags that Debian 12 can load
LEFT_OUT = re.compile(r"perl|libperl|usrmerge|lib.*-perl$|adduser|debconf|dpkg$|ucf|login|passwd|krb5|libpam-runtime")
DROPPED = ("doc", "man", "locale")
PASSWD = """\
root:x:0:0:root:/root:/bin/bash
sshd:x:101:65534::/run/sshd:/usr/sbin/nologin
nobody:x:65534:65534::/nonexistent:/usr/sbin/nologin
pi:x:1000:1000::/home/pi:/bin/bash
"""
GROUP = "root:x:0:\ntty:x:5:\nutmp:x:43:\nnogroup:x:65534:\npi:x:1000:\n"
SHADOW = "".join(f"{name}:*:19000:0:99999:7:::\n" for name in ("root", "sshd", "pi"))
SSHD = """\
HostKey /etc/ssh/ssh_host_ed25519_key
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
UseDNS no
PrintMotd no
PidFile none
PermitRootLogin prohibit-password
Subsystem sftp /usr/lib/openssh/sftp-server
"""
INITTAB = "::sysinit:/etc/rcS\n::respawn:/usr/sbin/sshd -D -e\n::shutdown:/bin/busybox umount -a -r\n"
START = """\
#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc; $b mount -t sysfs sysfs /sys
$b mkdir -p /dev/pts /dev/shm; $b mount -t devpts -o gid=5,mode=620 devpts /dev/pts; $b mount -t tmpfs tmpfs /dev/shm
$b mount -t tmpfs -o mode=755 tmpfs /run; $b mkdir -p /run/sshd; $b mount -t tmpfs -o mode=1777 tmpfs /tmp
$b hostname board; $b ip link set lo up; $b ip link set eth0 up
$b ip addr add 10.0.2.15/24 dev eth0; $b ip route add default via 10.0.2.2
"""


def build(folder: Path, keys: Path) -> None:
    """Make the file system in `folder`, with the public keys that may log in and the host key from `keys`."""
    apt = Apt(folder.with_name("apt"))
    folder.mkdir()
    for deb in apt.fetch(PACKAGES):
        if not LEFT_OUT.match(deb.name):
            unpack(deb, folder)
    version = min(p.name for p in (folder / "usr/bin").glob("python3.[0-9]*"))
    for link, target in (("usr/bin/python3", version), ("bin/sh", "dash"), ("bin/busybox", "../usr/bin/busybox")):
        if not (folder / link).exists():
            (folder / link).symlink_to(target)
    _settings(folder, keys)
    _wheels(folder / "usr/local/lib" / version / "dist-packages", version.removeprefix("python"))
    _compile(folder, version)


def unpack(deb: Path, folder: Path) -> None:
    """The files of a package, none of its scripts; what another package put there stays."""
    tar = ["tar", "-C", str(folder), "-x", "-k", "--keep-directory-symlink"]
    tar += [f"--exclude=./usr/share/{name}/*" for name in DROPPED]
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE) as files:
        subprocess.run(tar, stdin=files.stdout, stderr=subprocess.DEVNULL, check=False)  # -k complains of what stays
    if files.returncode:
        sys.exit(f"{deb} cannot be unpacked; delete it and try again")


def _settings(folder: Path, keys: Path) -> None:
    """What the packages' scripts would have made."""
    for name in ("root/.ssh", "home/pi/.ssh", "run/sshd", "proc", "sys", "dev", "tmp", "etc/ssh", "sbin"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    texts = {
        "etc/passwd": PASSWD, "etc/group": GROUP, "etc/shadow": SHADOW, "etc/hostname": "board\n",
        "etc/hosts": "127.0.0.1 localhost board\n", "etc/ssh/sshd_config": SSHD, "etc/inittab": INITTAB,
        "etc/rcS": START, "etc/ssh/ssh_host_ed25519_key": (keys / "host").read_text(),
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_text(text)
    for name in ("etc/shadow", "etc/ssh/ssh_host_ed25519_key"):
        (folder / name).chmod(0o600)
    (folder / "etc/rcS").chmod(0o755)
    (folder / "tmp").chmod(0o1777)
    for name in ("init", "reboot", "poweroff"):
        (folder / "sbin" / name).unlink(missing_ok=True)
        (folder / "sbin" / name).symlink_to("/bin/busybox")
    for home, user in (("root", 0), ("home/pi", 1000)):
        (folder / home / ".ssh/authorized_keys").write_text((keys / "user.pub").read_text())
        for path in (folder / home, folder / home / ".ssh", folder / home / ".ssh/authorized_keys"):
            path.chmod(0o600 if path.name == "authorized_keys" else 0o700)
            os.chown(path, user, user)


def _wheels(folder: Path, version: str) -> None:
    tags = ["manylinux2014_aarch64", *(f"manylinux_2_{minor}_aarch64" for minor in GLIBC)]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    command += ["--no-warn-conflicts"]  # with what this machine's own Python has
    command += ["--root-user-action=ignore", "--only-binary=:all:", "--implementation=cp", "--python-version", version]
    command += [f"--platform={tag}" for tag in tags]
    subprocess.run([*command, "--target", str(folder), *WHEELS], check=True)


def _compile(folder: Path, version: str) -> None:
    """Byte-code is the same on every processor, so it is made here when this machine has that Python."""
    python = shutil.which(version) or sys.executable
    probe = "import sys; print('python%d.%d' % sys.version_info[:2])"
    if subprocess.run([python, "-c", probe], capture_output=True, text=True, check=True).stdout.strip() == version:
        parts = [folder / "usr/lib" / version, folder / "usr/local/lib" / version]
        command = [python, "-m", "compileall", "-qq", "-j0", "--invalidation-mode", "unchecked-hash", "-s", str(folder)]
        subprocess.run([*command, "-p", "/", *map(str, parts)], check=False)


class Apt:
    """This machine's own package sources, for arm64, with a state of their own: nothing of this machine changes."""

    def __init__(self, folder: Path) -> None:
        self.debs = folder / "debs"
        for name in ("lists/partial", "cache", "debs/partial"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "status").touch()
        (folder / "board.sources").write_text(_sources())
        settings = {
            "APT::Architecture": "arm64", "APT::Architectures": "arm64", "Dir::State::lists": f"{folder}/lists/",
            "Dir::State::status": f"{folder}/status", "Dir::Cache": f"{folder}/cache",
            "Dir::Cache::archives": f"{self.debs}/", "Dir::Etc::sourcelist": f"{folder}/board.sources",
            "Dir::Etc::sourceparts": "-", "APT::Install-Recommends": "false", "APT::Sandbox::User": "root",
            "Debug::NoLocking": "true", "APT::Keep-Downloaded-Packages": "true",
        }  # fmt: skip
        self._options = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
        self._run("apt-get", "-q", "update")

    def fetch(self, packages: tuple[str, ...]) -> list[Path]:
        """Download packages with all that they need; base-files comes first."""
        self._run("apt-get", "-q", "-y", "--download-only", "install", *packages)
        steps = self._run("apt-get", "-q", "-y", "-s", "install", *packages)
        found = sorted(set(re.findall(r"^Inst (\S+) \((\S+)", steps, re.M)), key=lambda f: (f[0] != "base-files", f))
        return [self._deb(name, version) for name, version in found]

    def kernel(self) -> Path:
        """Download the kernel that the cloud image depends on."""
        said = self._run("apt-cache", "depends", "linux-image-cloud-arm64")
        name = re.search(r"Depends: (linux-image-\S+)", said)
        if name is None:
            sys.exit("this machine's package sources have no linux-image-cloud-arm64; they must be Debian's")
        self._run("apt-get", "-q", "-y", "--download-only", "--reinstall", "install", name[1])
        return max(self.debs.glob(f"{name[1]}_*.deb"), key=lambda p: p.stat().st_mtime)

    def _deb(self, name: str, version: str) -> Path:
        found = list(self.debs.glob(f"{name}_{version.replace(':', '%3a')}_*.deb"))
        if not found:
            sys.exit(f"apt did not fetch {name} {version} into {self.debs}; delete that folder and try again")
        return found[0]

    def _run(self, program: str, *arguments: str) -> str:
        done = subprocess.run([program, *self._options, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{program} {' '.join(arguments)} failed:\n{done.stderr or done.stdout}")
        return done.stdout


def _sources() -> str:
    """The configured sources of this very release, without their architectures."""
    release = dict(re.findall(r'^(\w+)="?([^"\n]*)', Path("/etc/os-release").read_text(), re.M))
    name = release.get("VERSION_CODENAME", "")
    found = []
    for path in (Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))):
        text = path.read_text() if path.is_file() else ""
        stanzas = re.split(r"\n\s*\n", text) if path.suffix == ".sources" else list(map(_stanza, text.splitlines()))
        for stanza in stanzas:
            lines = [li for li in stanza.splitlines() if not re.match(r"#|Architectures:", li)]
            suites = re.search(r"^Suites:(.*)", "\n".join(lines), re.M)
            if suites and any(s.partition("-")[0] == name for s in suites[1].split()):
                found.append("\n".join(lines).strip() + "\n")
    if release.get("ID") != "debian" or not found:
        sys.exit("the board is built from Debian's packages: run this on Debian 12 with package sources configured")
    return "\n".join(found)


def _stanza(line: str) -> str:
    """A one-line entry of sources.list as a stanza; "" for anything else."""
    entry = re.match(r"\s*deb\s+(?:\[([^\]]*)\]\s+)?(\S+)\s+(\S+)\s+(.+)", line)
    if entry is None:
        return ""
    signed = re.search(r"signed-by=(\S+)", entry[1] or "")
    key = f"\nSigned-By: {signed[1]}" if signed else ""
    return f"Types: deb\nURIs: {entry[2]}\nSuites: {entry[3]}\nComponents: {entry[4]}{key}"


def new_folder(beside: Path) -> Path:
    """A folder next to a path, to be renamed to it."""
    return Path(tempfile.mkdtemp(prefix=f".{beside.name}-", dir=beside.parent))
