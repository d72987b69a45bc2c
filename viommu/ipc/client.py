"""The client's side of an export session, for a process that may wait."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections import Counter
from typing import TYPE_CHECKING, Final, ParamSpec, Self, TypeVar

from viommu.errors import ExportError, PeerError, TranslationFault, UsageError
from viommu.ipc import protocol
from viommu.ipc.fault_line import FaultEvent
from viommu.ipc.memory_table import MemoryListing
from viommu.ipc.protocol import Kind, Reply
from viommu.memory import GuestMemory, MappedFiles
from viommu.vfio_user.connection import close_fds, receive, send

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from viommu.events import Event
    from viommu.mapper import MemRegion

__all__ = ["ExportClient"]

_P = ParamSpec("_P")
_T = TypeVar("_T")

_TRIES: Final = 100  # to read a list of guest memory that changes meanwhile


class ExportClient:
    """Uses an endpoint's memory from another process; a context manager that lets go of all.

    Satisfies :class:`~viommu.mapper.Exporter`, so that
    :class:`~viommu.endpoints.dma.EndpointDma` over it, with :attr:`memory`, is what it is
    in the server's process; :meth:`report_fault` is where its reports go. Calls wait for
    their answer, at most ``timeout`` seconds; only :meth:`release` waits for nothing.

    ``where`` is the path of an export socket, or a connected one, which is owned then. A
    connection that breaks (the server is gone, does not answer, answers nonsense) is
    closed: everything is released then, and every call but :meth:`release` raises
    ExportError. ``on_lost`` is told why, once, before the socket is closed.

    Between calls the socket is readable when the server has something to say:
    :meth:`attend` to it then, from a loop or now and then, or memory that the guest has
    given up stays in use here until the next :meth:`export`.

    Raises:
        PeerError: Nobody listens there, nobody answers, or in another language.
    """

    def __init__(
        self,
        where: Path | socket.socket,
        *,
        timeout: float = 10.0,
        on_lost: Callable[[str], None] | None = None,
    ) -> None:
        self.timeout = timeout
        #: Guest memory as the server knew it when it was last asked.
        self.memory = GuestMemory()
        self._files = MappedFiles()
        self._on_lost = on_lost
        self._held: Counter[tuple[int, int]] = Counter()
        self._next_id = 1
        self._generation: int | None = None  # of the server's memory when it was listed
        self._socket = where if isinstance(where, socket.socket) else _connect(where, timeout)
        try:
            #: The version that the server speaks, and what it lets a client hold.
            self.server = self._greet()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connection, which releases everything; closing twice is harmless."""
        self._socket.close()
        self._held.clear()
        self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def fileno(self) -> int:
        """Return the socket's fd, -1 once closed; readable between calls: :meth:`attend` to it."""
        return self._socket.fileno()

    @property
    def held(self) -> int:
        """How many exports are held."""
        return self._held.total()

    def start_export_session(self) -> Event:
        """Start a session; see :meth:`viommu.mapper.Exporter.start_export_session`.

        The event is readable, too, when the server is gone.
        """
        _, fds = self._ask(Kind.START, max_fds=1)
        if len(fds) != 1:
            close_fds(fds)
            raise self._broken(f"a session with {len(fds)} events")
        return FaultEvent(fds[0])

    def export(self, iova: int, size: int) -> list[MemRegion]:
        """Export a range; see :meth:`viommu.mapper.Exporter.export`.

        When this returns, :attr:`memory` has what the regions lead to.
        """
        if not 0 <= iova < 1 << 64 or not 0 < size < 1 << 64:
            raise UsageError(f"export of {size} bytes at {iova:#x}")
        reply, fds = self._ask(Kind.EXPORT, protocol.RANGE.pack(iova, size))
        close_fds(fds)
        regions, generation, left = self._decode(protocol.decode_regions, reply.body)
        while left:
            more, generation, now_left = self._more_regions(reply)
            if now_left >= left or not more:
                raise self._broken(f"{now_left} regions to come behind {left}")
            regions, left = regions + more, now_left
        self._held[iova, size] += 1
        if generation != self._generation:
            try:
                self.refresh_memory()
            except ExportError:
                self.release(iova, size)
                raise
        return regions

    def release(self, iova: int, size: int) -> None:
        """Release one export; see :meth:`viommu.mapper.Exporter.release`.

        It is on its way when this returns. Nothing is to be released, and nothing raised,
        once the connection is closed.
        """
        if self.fileno() < 0:
            return
        if not self._held[iova, size]:
            del self._held[iova, size]
            raise ExportError(f"[{iova:#x}, {iova + size:#x}) is not exported")
        self._held[iova, size] -= 1
        if not self._held[iova, size]:
            del self._held[iova, size]
        self._tell(Kind.RELEASE, protocol.RANGE.pack(iova, size))

    def report_fault(self, fault: TranslationFault) -> None:
        """Have the guest told of a fault; the server looks whether it is one, and not too many."""
        if self.fileno() >= 0 and fault.iova < 1 << 64:
            self._tell(Kind.REPORT, protocol.REPORT.pack(fault.iova, fault.access.value, 0))

    def leave(self, why: str) -> None:
        """Say why this process ends, for the server's log, and close the connection."""
        if self.fileno() >= 0:
            self._tell(Kind.LEAVE, protocol.encode_text(why))
        self.close()

    def refresh_memory(self) -> None:
        """Make :attr:`memory` what the server knows now.

        Raises:
            ExportError: It can't be mapped here, or the connection broke.
        """
        for _ in range(_TRIES):
            with MemoryListing() as listing:
                generation = self._list_memory(listing)
                if generation is not None:
                    self._generation = None  # unless all goes well
                    listing.apply(self.memory, self._files)
                    self._generation = generation
                    return
        raise ExportError(f"guest memory has changed {_TRIES} times while it was listed")

    def attend(self) -> None:
        """Take note of what the server says unasked; :attr:`memory` is up to date then.

        Raises:
            ExportError: The server is gone, or :attr:`memory` can't be mapped here.
        """
        if self.fileno() < 0:
            return
        self._socket.settimeout(0)
        try:
            while True:
                reply, _ = self._receive_packet(0)
                if not reply.is_note:
                    raise self._broken(f"{reply.kind.name} {reply.ident}, which was not asked for")
                self._generation = None
        except BlockingIOError:
            pass
        if self._generation is None:
            self.refresh_memory()

    def _list_memory(self, listing: MemoryListing) -> int | None:
        """Read all pages; return their generation, ``None`` if they don't belong together."""
        first: int | None = None
        while True:
            page = protocol.FIRST.pack(len(listing))
            reply, fds = self._ask(Kind.MEMORY, page, max_fds=protocol.MAX_FDS)
            try:
                spans, generation, left = self._decode(protocol.decode_spans, reply.body, len(fds))
                if first is None:
                    first = generation
                elif first != generation:
                    return None
                if left and not spans:
                    raise self._broken(f"a list without {left} pieces of memory")
                listing.add(spans, fds)
            finally:
                close_fds(fds)
            if not left:
                return generation

    # -- packets

    def _greet(self) -> protocol.Welcome:
        hello = protocol.HELLO.pack(protocol.TAG, *protocol.VERSION)
        try:
            reply, fds = self._ask(Kind.HELLO, hello)
            close_fds(fds)
            return protocol.decode_welcome(reply.body)
        except (ExportError, PeerError) as error:
            number = error.errno if isinstance(error, PeerError) else errno.ECONNREFUSED
            raise PeerError(number, f"no export session here: {error}") from error

    def _ask(self, kind: Kind, body: bytes = b"", *, max_fds: int = 0) -> tuple[Reply, list[int]]:
        """Send a request and return its answer, with file descriptors that are the caller's.

        Raises:
            ExportError, TranslationFault, UsageError: It was refused.
            ExportError: The connection is, or had to be, closed.
        """
        ident = self._next_id
        self._next_id = ident % 0xFFFF_FFFF + 1
        self._send(protocol.encode_request(kind, ident, body))
        reply, fds = self._receive(kind, ident, max_fds)
        if reply.error:
            close_fds(fds)
            raise self._decode(protocol.error_of, reply)
        return reply, fds

    def _more_regions(self, first: Reply) -> tuple[list[MemRegion], int, int]:
        reply, fds = self._receive(first.kind, first.ident, 0)
        close_fds(fds)
        return self._decode(protocol.decode_regions, reply.body)

    def _tell(self, kind: Kind, body: bytes) -> None:
        """Send what is not answered; a connection that breaks over it is closed and no error."""
        with contextlib.suppress(ExportError):  # whoever asks for something next is told
            self._send(protocol.encode_request(kind, 0, body))

    def _send(self, data: bytes) -> None:
        if self.fileno() < 0:
            raise ExportError("the connection to the server is closed")
        self._socket.settimeout(self.timeout)
        try:
            send(self._socket, data)
        except TimeoutError as error:
            raise self._broken(f"it does not read for {self.timeout} s") from error
        except OSError as error:
            raise self._broken(str(error)) from error

    def _receive(self, kind: Kind, ident: int, max_fds: int) -> tuple[Reply, list[int]]:
        """Return the answer to a request; what comes before it was not asked for."""
        self._socket.settimeout(self.timeout)
        while True:
            try:
                reply, fds = self._receive_packet(max_fds)
            except TimeoutError as error:
                raise self._broken(f"no answer for {self.timeout} s") from error
            if reply.is_note:
                self._generation = None
            elif (reply.kind, reply.ident) == (kind, ident):
                return reply, fds
            else:
                close_fds(fds)
                raise self._broken(f"an answer to {reply.kind.name} {reply.ident}")

    def _receive_packet(self, max_fds: int) -> tuple[Reply, list[int]]:
        """Return a packet and its file descriptors; raises TimeoutError and BlockingIOError."""
        try:
            data, fds, truncated = receive(self._socket, protocol.MAX_PACKET + 1, max_fds)
        except (TimeoutError, BlockingIOError):
            raise
        except OSError as error:
            raise self._broken(str(error)) from error
        if not data:
            raise self._broken("it has closed the connection")
        try:
            reply = self._decode(protocol.decode_reply, data)
        except ExportError:
            close_fds(fds)
            raise
        if truncated or len(fds) > max_fds:
            close_fds(fds)
            raise self._broken(f"{len(fds)} file descriptors with {reply.kind.name}, or some lost")
        return reply, fds

    def _decode(self, decode: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Decode what the server sent; nonsense ends the connection."""
        try:
            return decode(*args, **kwargs)
        except PeerError as error:
            raise self._broken(str(error)) from error

    def _broken(self, why: str) -> ExportError:
        """Close the connection; return the error that says why."""
        if self.fileno() >= 0:
            if self._on_lost is not None:
                self._on_lost(why)
            self._socket.close()
        return ExportError(f"the server of the export session is gone: {why}")


def _connect(path: Path, timeout: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.settimeout(timeout)
        sock.connect(os.fspath(path))
    except OSError as error:
        sock.close()
        number = error.errno or errno.ETIMEDOUT
        raise PeerError(number, f"can't connect to {path}: {error}") from error
    return sock
