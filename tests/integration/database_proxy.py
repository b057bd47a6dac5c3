"""A TCP proxy before a MongoDB server that can be cut, or stop at a chosen command.

It reads the wire protocol just far enough to know each command's name and collection,
so that a fault hits a launch exactly before, during or after it commits its result.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from dataclasses import dataclass, field
from typing import Literal

Moment = Literal["before", "during", "after"]
_WRITES = frozenset({"insert", "update", "delete", "findAndModify", "findandmodify"})
_OP_MSG = 2013


@dataclass
class Trap:
    """Where to stop: at the n-th write to a collection, before or after the server."""

    collection: str
    moment: Moment = "before"
    nth: int = 1
    seen: int = 0
    lost: bool = False
    hit: threading.Event = field(default_factory=threading.Event)
    free: threading.Event = field(default_factory=threading.Event)


class DatabaseProxy:
    """Forward connections to a server; a context manager.

    Attributes
    ----------
    port
        Of this machine, the same before and after a cut.
    commands
        Names of commands and their collections, as they came.
    cuts
        How many connections were broken.
    """

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._trap: Trap | None = None
        self._listener: socket.socket | None = None
        self._ended = False
        self.port = 0
        self.commands: list[tuple[str, str]] = []
        self.cuts = 0

    def __enter__(self) -> DatabaseProxy:
        self.restore()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self.cut()

    def restore(self) -> None:
        """Take connections (again)."""
        if self._listener is not None or self._ended:
            return
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(64)
        self.port = listener.getsockname()[1]
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def cut(self) -> None:
        """Break all connections and refuse new ones, like a server that is gone."""
        with self._lock:
            listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        with self._lock:
            sockets, self._open = self._open, set()
            self.cuts += len(sockets) // 2
        for one in sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        if self._trap is not None:
            self._trap.free.set()

    def set_trap(self, trap: Trap | None) -> None:
        """Stop the next connection that does what the trap waits for."""
        if self._trap is not None:
            self._trap.free.set()
        self._trap = trap

    def drop(self) -> None:
        """Let what is held be lost, as the last words of a process that died."""
        if self._trap is not None:
            self._trap.lost = True
        self.set_trap(None)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self._target)
            except OSError:
                client.close()
                continue
            with self._lock:
                alive = self._listener is listener  # else it was cut meanwhile
                if alive:
                    self._open |= {client, server}
            if not alive:
                client.close()
                server.close()
                continue
            caught: list[Trap] = []
            for source, target, to_server in (
                (client, server, True),
                (server, client, False),
            ):
                threading.Thread(
                    target=self._forward,
                    args=(source, target, to_server, caught),
                    daemon=True,
                ).start()

    @staticmethod
    def cut_pair(*sockets: socket.socket) -> None:
        """Break one connection."""
        for one in sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _forward(
        self,
        source: socket.socket,
        target: socket.socket,
        to_server: bool,
        caught: list[Trap],
    ) -> None:
        try:
            while message := _message(source):
                if to_server:
                    trap = self._trap_for(message)
                    if trap is not None and trap.moment == "before":
                        trap.hit.set()
                        trap.free.wait()
                        if trap.lost or source not in self._open:
                            return
                    elif trap is not None:
                        caught.append(trap)
                    target.sendall(message)
                    continue
                if not caught:
                    target.sendall(message)
                    continue
                trap = caught.pop()
                if trap.moment == "after":
                    target.sendall(message)
                trap.hit.set()
                trap.free.wait()
                if trap.moment == "during" and source in self._open:
                    target.sendall(message)
        except OSError:
            pass
        finally:
            self.cut_pair(source, target)
            with self._lock:
                self._open -= {source, target}
            source.close()  # the other thread of the connection closes the other

    def _trap_for(self, message: bytes) -> Trap | None:
        command = _command(message)
        if command is None:
            return None
        self.commands.append(command)
        trap = self._trap
        if (
            trap is None
            or trap.hit.is_set()
            or command[0] not in _WRITES
            or command[1] != trap.collection
        ):
            return None
        with self._lock:
            trap.seen += 1
            return trap if trap.seen == trap.nth else None


def _message(source: socket.socket) -> bytes:
    head = _exactly(source, 4)
    if len(head) < 4:
        return b""
    length = struct.unpack("<i", head)[0]
    return head + _exactly(source, length - 4)


def _exactly(source: socket.socket, count: int) -> bytes:
    parts = b""
    while len(parts) < count:
        part = source.recv(min(count - len(parts), 1 << 20))
        if not part:
            return b""
        parts += part
    return parts


def _command(message: bytes) -> tuple[str, str] | None:
    """Return name and collection of an OP_MSG; its body comes first, uncompressed."""
    if len(message) < 30 or struct.unpack_from("<i", message, 12)[0] != _OP_MSG:
        return None
    if message[20] != 0 or message[25] != 2:  # no body first, or its value no text
        return None
    end = message.index(b"\0", 26)
    (size,) = struct.unpack_from("<i", message, end + 1)
    return message[26:end].decode(), message[end + 5 : end + 4 + size].decode()
