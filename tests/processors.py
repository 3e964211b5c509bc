"""ARM processors without a board around them: device programs run there, one process each; files are this machine's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from edgeprune.agent import Agent, local_program
from edgeprune.host import Here
from edgeprune.link import Process

TOOLS = Path(__file__).resolve().parent.parent / "tools"
CPUINFO = """\
processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd08
CPU revision\t: 3
"""
# the runtime reads these two, and takes this machine's for an ARM's
RUN = 'mount --bind "$1" /proc/cpuinfo && mount --bind "$2" /sys && shift 2 && exec "$@"'


class Processor(Here):
    """An ARM processor, as qemu knows it, with the programs of the emulated board."""

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__()
        subprocess.run([sys.executable, TOOLS / "arm_board", "build"], check=True)
        built = Path(os.environ.get("EDGEPRUNE_BOARD") or Path.home() / ".cache/edgeprune-board")
        root = built.absolute() / "rootfs"
        python = max((root / "usr/bin").glob("python3.[0-9]*"))
        self._environment = {
            **os.environ,
            "PYTHONHOME": f"{root}/usr",
            "PYTHONPATH": f"{root}/usr/local/lib/{python.name}/dist-packages",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        cpus = folder / "sys/devices/system/cpu"
        cpus.mkdir(parents=True)
        for file, text in (("possible", "0"), ("present", "0"), ("online", "0"), ("kernel_max", "255")):
            (cpus / file).write_text(text + "\n")
        (folder / "cpuinfo").write_text(CPUINFO)
        seen = [str(folder / "cpuinfo"), str(folder / "sys")]
        emulator = ["qemu-aarch64", "-cpu", name, "-L", str(root), str(python), "-S", "-u"]
        self._command = ["unshare", "--mount", "sh", "-c", RUN, "sh", *seen, *emulator]

    def start(self, runtime: str, beside: str = "") -> Agent:
        command = [*self._command, str(local_program()), runtime]
        return Agent(lambda: Process(command, self._environment))
