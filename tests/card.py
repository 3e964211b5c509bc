"""A memory card for the emulated board that fails and slows down on request: a block device over NBD, served from here.

What the board sees is what a real card that wears out gives: its kernel gets an error for a read or a write, or waits.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import threading
import time
from pathlib import Path
from typing import IO

READ, WRITE, FLUSH = 0, 1, 3  # the protocol's numbers: github.com/NetworkBlockDevice/nbd, doc/proto.md
EXPORT_NAME, GO = 1, 7
OPTION, REPLY, REQUEST, ANSWER = b"IHAVEOPT", 0x3E889045565A9, 0x25609513, 0x67446698
ACKNOWLEDGED, INFORMATION, UNSUPPORTED = 1, 3, 0x80000001
FLAGS = 1 | 4  # there are flags; it can flush
EIO = 5


class Card:
    """An ext4 file system with a journal, all of it the board's user's.

    `failing` holds what ends with an I/O error: READ, WRITE, FLUSH. `rate_bytes_s` slows reads and writes down; 0 does
    not. `errors` counts what has failed.
    """

    def __init__(self, folder: Path, size_mb: int = 48) -> None:
        self.failing: set[int] = set()
        self.rate_bytes_s, self.errors = 0, 0
        self._image = folder / "card.img"
        owner = ["-E", "root_owner=1000:1000,lazy_itable_init=0,lazy_journal_init=0"]
        command = ["mke2fs", "-q", "-t", "ext4", *owner, str(self._image), f"{size_mb}M"]
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PATH": path})
        self.path = folder / "card"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                board, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._attend, args=(board,), daemon=True).start()

    def _attend(self, board: socket.socket) -> None:
        with (
            contextlib.suppress(ConnectionError),  # the board was switched off
            board,
            board.makefile("rb") as lines,
            self._image.open("r+b") as image,
        ):
            board.sendall(b"NBDMAGIC" + OPTION + struct.pack(">H", 1))
            lines.read(4)
            if self._agreed(board, lines):
                while head := lines.read(28):
                    self._answer(board, lines, image, *struct.unpack(">IHHQQI", head))

    def _agreed(self, board: socket.socket, lines: IO[bytes]) -> bool:
        """Refuse every option but those that begin the transmission."""
        size_bytes = self._image.stat().st_size
        while head := lines.read(16):
            _, option, length = struct.unpack(">8sII", head)
            lines.read(length)
            if option == EXPORT_NAME:
                board.sendall(struct.pack(">QH", size_bytes, FLAGS) + bytes(124))
                return True
            if option == GO:
                about = struct.pack(">HQH", 0, size_bytes, FLAGS)
                board.sendall(struct.pack(">QIII", REPLY, option, INFORMATION, len(about)) + about)
                board.sendall(struct.pack(">QIII", REPLY, option, ACKNOWLEDGED, 0))
                return True
            board.sendall(struct.pack(">QIII", REPLY, option, UNSUPPORTED, 0))
        return False

    def _answer(
        self, board: socket.socket, lines: IO[bytes], image: IO[bytes], magic: int, flags: int, kind: int, handle: int,
        offset: int, length: int,
    ) -> None:  # fmt: skip
        assert magic == REQUEST
        content = lines.read(length) if kind == WRITE else b""
        if self.rate_bytes_s:
            time.sleep(length / self.rate_bytes_s)
        fails = kind in self.failing
        self.errors += fails
        found = b""
        if not fails:
            image.seek(offset)
            if kind == WRITE:
                image.write(content)
            elif kind == READ:
                found = image.read(length)
        board.sendall(struct.pack(">IIQ", ANSWER, EIO if fails else 0, handle) + found)
