"""Several boards side by side: two emulated ones, a process for each, one project, one folder of measurements."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import boardnet
import pytest
import small
from emulated import Board, works

from edgeprune import cli
from edgeprune.host import Ssh

pytestmark = [pytest.mark.board, pytest.mark.slow]
NAMES = ("east", "west")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An ssh configuration with both boards in it."""
    folder = tmp_path_factory.mktemp("boards")
    boards = [Board(folder / name) for name in NAMES]
    texts = [b.config.read_text().replace("Host board", f"Host {n}") for n, b in zip(NAMES, boards, strict=True)]
    (folder / "ssh_config").write_text("".join(t.replace("board-root", "root") for t in texts))
    yield folder / "ssh_config"
    for board in boards:
        board.act("stop")


def test_two_processes_fill_one_table_and_compress_for_two_boards_at_once_then_both_are_flashed(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    boardnet.make(tmp_path)
    for name in NAMES:
        assert cli.run(["targets", "add", name, "--host", name, "--ssh-config", str(config)]) == 0
    environment = {"EDGEPRUNE_HOME": str(tmp_path / "home")}
    both = [
        small.command("compress", "--target", name, "--json", "--quiet", cwd=tmp_path, environment=environment)
        for name in NAMES
    ]
    found = [process.communicate(timeout=900) for process in both]
    assert [process.returncode for process in both] == [0, 0], found
    runs = sorted(path.parent for path in (tmp_path / "runs").glob("*/verify.json"))
    assert len(runs) == 2
    medians = [json.loads((run / "verify.json").read_text())["pruned"]["latency"]["median_ms"] for run in runs]
    budgets = [json.loads((run / "verify.json").read_text())["dense"]["latency"]["median_ms"] / 1.5 for run in runs]
    assert all(median <= budget for median, budget in zip(medians, budgets, strict=True))
    with sqlite3.connect(tmp_path / "home" / "latency.sqlite") as table:
        assert table.execute("pragma integrity_check").fetchone() == ("ok",)
    to = ",".join(f"{name}:models/net" for name in NAMES)
    flash = small.command("flash", "--target", "east", "--to", to, "--json", cwd=tmp_path, environment=environment)
    out, err = flash.communicate(timeout=300)
    assert flash.returncode == 0, err
    assert len(json.loads(out)["places"]) == 2
    for name in NAMES:
        host = Ssh(name, config)
        try:
            assert works(host, "models/net")
        finally:
            host.close()
