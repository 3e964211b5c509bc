"""Shared by all tests: measurements go to a folder of their own, one thread, and torchvision imports on CPU torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sshd import Server

from edgeprune.host import Ssh

os.environ["EDGEPRUNE_HOME"] = tempfile.mkdtemp(prefix="edgeprune-tests-")
os.environ["EDGEPRUNE_PATIENCE_S"] = "0"  # tests run side by side: the device does not become calm while they last
torch.set_num_threads(1)

# torchvision's wheel is built for CUDA; on a CPU build of torch its operators have to be declared before it imports
_OPERATORS = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _OPERATORS.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An ssh server on this machine."""
    server = Server(tmp_path_factory.mktemp("sshd"))
    yield server
    server.stop()


@pytest.fixture
def board(server: Server, tmp_path: Path) -> Iterator[Ssh]:
    """This machine as a board behind that server."""
    host = Ssh("board", server.config, str(tmp_path / "a cache"))
    yield host
    host.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 2 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mount)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small file system can only be mounted as root")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)
