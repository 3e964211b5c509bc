"""What the board boots: Debian's arm64 kernel, an initial RAM disk with the few drivers it needs, and its disk."""

from __future__ import annotations

import gzip
import lzma
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

from .rootfs import Apt

DRIVERS = ("virtio_mmio", "virtio_blk", "virtio_net", "virtio_rng", "ext4", "sch_netem")
INIT = """\
#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc; $b mount -t sysfs sysfs /sys; $b mount -t devtmpfs dev /dev
while read module; do $b insmod /modules/$module; done < /modules/order
i=0; while [ ! -b /dev/vda ] && [ $i -lt 100 ]; do $b usleep 50000; i=$((i+1)); done
$b mount -t ext4 -o rw /dev/vda /root || { echo no root file system; $b poweroff -f; }
$b mount --move /dev /root/dev; $b umount /sys; $b umount /proc
exec $b switch_root /root /sbin/init
"""


def build(folder: Path, rootfs: Path) -> None:
    """Write vmlinuz, initrd.gz and disk.img into `folder`."""
    with tempfile.TemporaryDirectory(dir=folder) as unpacked:
        kernel = Path(unpacked)
        subprocess.run(["dpkg-deb", "-x", str(Apt(folder / "apt").kernel()), unpacked], check=True)
        (folder / "initrd.gz").write_bytes(_initrd(kernel, (rootfs / "bin/busybox").read_bytes()))
        shutil.copyfile(next((kernel / "boot").glob("vmlinuz-*")), folder / "vmlinuz")


def make_disk(path: Path, rootfs: Path, size_mb: int) -> None:
    command = ["mke2fs", "-q", "-t", "ext4", "-F", "-L", "board", "-d", str(rootfs), str(path), f"{size_mb}M"]
    program = shutil.which("mke2fs") or "/sbin/mke2fs"
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the board's disk of {size_mb} MB could not be made: {done.stderr}")


def _initrd(kernel: Path, busybox: bytes) -> bytes:
    modules = {re.sub(r"\.ko.*", "", p.name).replace("-", "_"): p for p in kernel.rglob("*.ko*")}
    contents: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in contents or name not in modules:
            return  # built in
        path = modules[name]
        content = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        needed = re.search(rb"\0depends=([^\0]*)\0", content)
        for other in needed[1].decode().split(",") if needed else ():
            add(other.replace("-", "_"))
        contents[name] = content

    for driver in DRIVERS:
        add(driver)
    files = {f"modules/{name}.ko": (0o644, content) for name, content in contents.items()}
    files["modules/order"] = (0o644, "".join(f"{name}.ko\n" for name in contents).encode())
    files |= {"init": (0o755, INIT.encode()), "bin/busybox": (0o755, busybox)}
    return gzip.compress(_archive(files), 6)


def _archive(files: dict[str, tuple[int, bytes]]) -> bytes:
    """A cpio archive in the "newc" format of the kernel's initramfs document, with a console device."""
    parts: list[bytes] = []

    def put(name: str, mode: int, content: bytes = b"", major: int = 0, minor: int = 0) -> None:
        encoded = name.encode() + b"\0"
        fields = (len(parts) + 1, mode, 0, 0, 1, 0, len(content), 0, 0, major, minor, len(encoded), 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        parts.append(head + b"\0" * (-len(head) % 4) + content + b"\0" * (-len(content) % 4))

    for folder in ("bin", "modules", "dev", "proc", "sys", "root"):
        put(folder, stat.S_IFDIR | 0o755)
    for name, (mode, content) in sorted(files.items()):
        put(name, stat.S_IFREG | mode, content)
    put("dev/console", stat.S_IFCHR | 0o600, major=5, minor=1)
    put("TRAILER!!!", 0)
    return b"".join(parts)
