"""Memory cards that wear out: errors and slowness of a disk that a real kernel meets, on the emulated board."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from pathlib import Path

import models
import pytest
from card import FLUSH, READ, WRITE, Card
from emulated import Board, during, installed, works

from edgeprune import deploy
from edgeprune.errors import DeployError, EdgepruneError, TargetError
from edgeprune.host import Ssh

pytestmark = [pytest.mark.board, pytest.mark.slow]
FOLDER = "card/model"
MOMENTS = 8


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Card]:
    card = Card(tmp_path_factory.mktemp("card"))
    yield card
    card.close()


@pytest.fixture(scope="module")
def board(card: Card, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    board = Board(tmp_path_factory.mktemp("board") / "run", "--card", f"nbd:unix:{card.path}")
    board.as_root("mkdir -p /home/pi/card && busybox mount -t ext4 /dev/vdb /home/pi/card")
    yield board
    board.act("stop")


@pytest.fixture
def host(board: Board, card: Card) -> Iterator[Ssh]:
    host = Ssh("board", board.config)
    yield host
    card.failing, card.rate_bytes_s = set(), 0
    host.close()


def again(board: Board) -> None:
    """Take the card out and put it back: what is read from now on is what is on it."""
    board.as_root("busybox umount /home/pi/card && busybox mount -t ext4 /dev/vdb /home/pi/card")


def test_io_errors_at_any_moment_of_a_flash_leave_a_model_that_works(
    board: Board, card: Card, host: Ssh, tmp_path: Path
) -> None:
    installed(host, tmp_path, "A", folder=FOLDER)
    failures = []
    for moment in range(MOMENTS):
        fault = during(random.Random(moment).uniform(0.0, 3.0), lambda: card.failing.update({WRITE, FLUSH}))
        try:
            deploy.install(host, *_package(tmp_path, f"B{moment}"), FOLDER, keep=1)
        except EdgepruneError as error:
            failures.append(str(error))
        fault.join()
        card.failing.clear()
        again(board)
        assert works(host, FOLDER)
    assert card.errors
    assert failures, "nothing was installed while the card failed"
    assert all("Input/output error" in text or "Read-only file system" in text for text in failures), failures
    version = installed(host, tmp_path, "Z", folder=FOLDER)
    again(board)
    assert deploy.versions(host, FOLDER)[0].name == version
    assert works(host, FOLDER)


def _package(tmp_path: Path, step: str) -> tuple[dict[str, Path], dict[str, object]]:
    return models.package(tmp_path, step, 2_000_000)


def test_a_version_that_can_no_longer_be_read_is_not_gone_back_to(
    board: Board, card: Card, host: Ssh, tmp_path: Path
) -> None:
    first, second = (installed(host, tmp_path, step, folder=FOLDER) for step in ("C", "D"))
    again(board)
    assert [v.name for v in deploy.versions(host, FOLDER)][:2] == [second, first]  # the folders are in memory now
    host.run(["cat", f"{FOLDER}/versions/{first}/manifest.json"], 60)
    card.failing.add(READ)
    with pytest.raises(DeployError, match=rf"cannot roll back to {first} in .*, it is damaged: .*Input/output error"):
        deploy.rollback(host, FOLDER)
    card.failing.clear()
    again(board)
    assert deploy.versions(host, FOLDER)[0].current
    assert works(host, FOLDER)


def test_a_card_that_fails_under_an_upload_is_named(board: Board, card: Card, tmp_path: Path) -> None:
    host = Ssh("board", board.config, "card/cache")
    with contextlib.closing(host):
        host.connect()
        host.put(_package(tmp_path, "small")[0]["model.tflite"])
        card.failing.update({WRITE, FLUSH})
        with pytest.raises(TargetError, match=r"Input/output error.*; the disk under /home/pi/card/cache is faulty"):
            host.put(_package(tmp_path, "E")[0]["weights.bin"])
    card.failing.clear()
    again(board)
    with contextlib.closing(Ssh("board", board.config, "card/cache")) as host:
        path = _package(tmp_path, "E")[0]["weights.bin"]
        host.get(host.put(path), tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == path.read_bytes()


def test_a_slow_card_is_given_time_by_the_size_of_the_file(
    board: Board, card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeprune.host.ANSWER_S", 4.0)
    with contextlib.closing(Ssh("board", board.config, "card/cache")) as host:
        host.put(_package(tmp_path, "small")[0]["model.tflite"])
        card.rate_bytes_s = 200_000
        began = time.monotonic()
        path = _package(tmp_path, "F")[0]["weights.bin"]
        there = host.put(path)
        assert time.monotonic() - began > 8.0  # it was slow: the card cannot have taken it before
        card.rate_bytes_s = 0
        host.get(there, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == path.read_bytes()
