"""A TCP proxy on 127.0.0.1 that misbehaves on request: put it between ssh and the board."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time

CHUNK = 16384


class Proxy:
    """Forwards to a port of this machine.

    `delay_s` holds every chunk back; `stalled` stops all bytes; `cut_after` resets a connection once that many bytes
    have gone towards the board, one time; `refusing` closes new connections at once.
    """

    def __init__(self, port: int) -> None:
        self._upstream = port
        self.delay_s, self.stalled, self.refusing = 0.0, False, False
        self.cut_after: int | None = None
        self.cuts = self.resets = 0
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def reset(self) -> None:
        """Reset every connection now; counted when there was one."""
        pairs = list(self._pairs)
        self.resets += bool(pairs)
        for pair in pairs:
            self._drop(pair)

    def close(self) -> None:
        self._listener.close()
        self.reset()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.refusing:
                client.close()
                continue
            with contextlib.suppress(OSError):
                pair = (client, socket.create_connection(("127.0.0.1", self._upstream)))
                self._pairs.add(pair)
                for source, sink, counted in ((pair[0], pair[1], True), (pair[1], pair[0], False)):
                    threading.Thread(target=self._pump, args=(source, sink, pair, counted), daemon=True).start()

    def _pump(
        self, source: socket.socket, sink: socket.socket, pair: tuple[socket.socket, socket.socket], counted: bool
    ) -> None:
        sent = 0
        with contextlib.suppress(OSError):
            while data := source.recv(CHUNK):
                while self.stalled:
                    time.sleep(0.02)
                time.sleep(self.delay_s)
                sent += len(data)
                if counted and self.cut_after is not None and sent >= self.cut_after:
                    self.cut_after = None
                    self.cuts += 1
                    break
                sink.sendall(data)
        self._drop(pair)

    def _drop(self, pair: tuple[socket.socket, socket.socket]) -> None:
        self._pairs.discard(pair)
        for end in pair:
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.shutdown(socket.SHUT_RDWR)
            end.close()
