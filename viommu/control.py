"""The control socket of a running server: ask for a snapshot, get it as JSON.

One JSON object a line in both directions over a UNIX stream socket, readable by
its owner only. A request is ``{"command": "snapshot"}``; a reply has ``ok``, and
``snapshot`` or ``error``. Nothing can be changed over it. A client can neither
block the server nor make it hold more than one request and one reply for it.
"""

from __future__ import annotations

import errno
import json
import socket
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from viommu.errors import PeerError, UsageError

if TYPE_CHECKING:
    import os
    from collections.abc import Callable
    from pathlib import Path

    from viommu.loop import Loop

__all__ = ["SOCKET_NAME", "ControlClient", "ControlLimits", "ControlServer"]

SOCKET_NAME: Final = "control.sock"
"""The file name of the control socket in a server's directory."""

_RETRY_ACCEPT: Final = 1.0  # seconds, when the process or the host has no fd left
_CHUNK: Final = 1 << 16


class ControlLimits(NamedTuple):
    """What clients of one server may use.

    ``clients`` at once (one more displaces the client that was silent longest),
    bytes of a ``request`` and of a ``reply``.
    """

    clients: int = 8
    request: int = 4096
    reply: int = 64 << 20


class ControlServer:
    """Answers requests on the socket at ``path``, from the loop.

    ``snapshot`` returns something that :func:`json.dumps` takes. The socket
    listens when the constructor returns and is removed by :meth:`close`; one that
    a dead server has left there is replaced.

    Raises:
        UsageError: The path can't be bound.
    """

    def __init__(
        self,
        loop: Loop,
        path: Path,
        snapshot: Callable[[], dict[str, object]],
        limits: ControlLimits | None = None,
    ) -> None:
        self._loop = loop
        self._path = path
        self._snapshot = snapshot
        self._limits = limits or ControlLimits()
        self._clients: list[_Connection] = []  # the longest silent first
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            _remove_stale(path)
            self._socket.bind(str(path))
            path.chmod(0o600)
            self._socket.listen()
        except OSError as error:
            self._socket.close()
            raise UsageError(f"can't listen on the control socket {path}: {error}") from error
        loop.on_readable(self._socket, self._accept)

    def close(self) -> None:
        """Drop every client and remove the socket; closing twice is harmless."""
        if self._socket.fileno() < 0:
            return
        self._loop.forget(self._socket)
        self._socket.close()
        self._path.unlink(missing_ok=True)
        for client in self._clients[:]:
            self._drop(client)

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            if error.errno not in {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}:
                raise
            # The caller stays in the queue and the socket readable: look again later.
            self._loop.on_readable(self._socket, None)
            self._loop.call_later(_RETRY_ACCEPT, self._accept_again)
            return
        connection.setblocking(False)
        if len(self._clients) >= self._limits.clients:
            self._drop(self._clients[0])
        client = _Connection(connection)
        self._clients.append(client)
        self._loop.on_readable(connection, lambda: self._receive(client))

    def _accept_again(self) -> None:
        if self._socket.fileno() >= 0:
            self._loop.on_readable(self._socket, self._accept)

    def _receive(self, client: _Connection) -> None:
        try:
            data = client.socket.recv(self._limits.request)
        except BlockingIOError:
            return
        except OSError:  # whatever it was, this client is gone
            data = b""
        if not data:
            self._drop(client)
            return
        self._clients.remove(client)
        self._clients.append(client)
        client.input += data
        self._serve(client)

    def _serve(self, client: _Connection) -> None:
        """Answer one request, if it has arrived; the next one has to wait for its turn."""
        line, newline, rest = client.input.partition(b"\n")
        if not newline and len(line) <= self._limits.request:
            self._loop.on_readable(client.socket, lambda: self._receive(client))
            return
        client.input = rest
        client.output = memoryview(self._answer(bytes(line)))
        if self._send(client):
            # A snapshot takes time, and a client may ask for a hundred in one message.
            self._loop.on_readable(client.socket, None)
            self._loop.call_soon(lambda: self._go_on(client))

    def _go_on(self, client: _Connection) -> None:
        if client in self._clients:
            self._serve(client)

    def _send(self, client: _Connection) -> bool:
        """Send what fits; return whether the client may ask again."""
        try:
            sent = client.socket.send(client.output)
        except BlockingIOError:
            sent = 0
        except OSError:  # as above
            self._drop(client)
            return False
        client.output = client.output[sent:]
        if client.output:
            # Until it has read this reply, nothing more is read from it.
            self._loop.on_readable(client.socket, None)
            self._loop.on_writable(client.socket, lambda: self._send_more(client))
            return False
        return True

    def _send_more(self, client: _Connection) -> None:
        if self._send(client):
            self._loop.on_writable(client.socket, None)
            self._serve(client)

    def _answer(self, line: bytes) -> bytes:
        if len(line) > self._limits.request:
            return _error(f"a request has at most {self._limits.request} bytes")
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            return _error("the request is not JSON")
        command = request.get("command") if isinstance(request, dict) else None
        if command != "snapshot":
            return _error('the only command is {"command": "snapshot"}')
        reply = json.dumps({"ok": True, "snapshot": self._snapshot()}).encode() + b"\n"
        if len(reply) > self._limits.reply:
            return _error(f"the snapshot has {len(reply)} bytes, more than can be sent")
        return reply

    def _drop(self, client: _Connection) -> None:
        self._clients.remove(client)
        self._loop.forget(client.socket)
        client.socket.close()


class _Connection:
    """One client: its socket, what it has sent and what it has not read yet."""

    __slots__ = ("input", "output", "socket")

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.input = bytearray()
        self.output = memoryview(b"")


def _remove_stale(path: Path) -> None:
    """Remove the socket of a server that has died."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            if path.is_socket():
                path.unlink(missing_ok=True)
        except OSError:
            pass  # there is none, or one that is in use: bind() says so


def _error(message: str) -> bytes:
    return json.dumps({"ok": False, "error": message}).encode() + b"\n"


class ControlClient:
    """A blocking client of the control socket at ``path``; a context manager.

    Raises:
        OSError: Nobody listens there.
    """

    def __init__(self, path: str | os.PathLike[str], timeout: float = 10.0) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout)
        try:
            self._socket.connect(str(path))
        except BaseException:
            self._socket.close()
            raise

    def snapshot(self) -> dict[str, object]:
        """Return the state of the server.

        Raises:
            PeerError: It went away, took too long, or sent no snapshot.
        """
        reply = bytearray()
        try:
            self._socket.sendall(b'{"command": "snapshot"}\n')
            while not reply.endswith(b"\n"):
                data = self._socket.recv(_CHUNK)
                if not data:
                    raise PeerError(errno.EPIPE, f"the server at {self._path} went away")
                reply += data
                if len(reply) > ControlLimits().reply:
                    raise PeerError(errno.E2BIG, f"the server at {self._path} sends no end")
        except OSError as error:
            raise PeerError(
                error.errno or errno.ETIMEDOUT,
                f"the server at {self._path} can't be asked: {error}",
            ) from error
        try:
            answer = json.loads(reply)
            found = answer["snapshot"] if answer["ok"] else answer["error"]
        except (ValueError, KeyError, TypeError) as error:
            raise PeerError(
                errno.EPROTO, f"the server at {self._path} sent {bytes(reply[:80])!r}"
            ) from error
        if not isinstance(found, dict):
            raise PeerError(errno.EPROTO, f"the server at {self._path} refused: {found}")
        return found

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
