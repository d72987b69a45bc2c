"""A vfio-user client that waits in the loop: every request is answered later, none blocks."""

from __future__ import annotations

import errno
import os
import socket
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, TypeVar

from viommu.deferred import Deferred
from viommu.errors import PeerError, UsageError, ViommuError
from viommu.spec import vfio
from viommu.spec import vfio_user as spec
from viommu.vfio_user import requests
from viommu.vfio_user.connection import close_fds, copy_fds
from viommu.vfio_user.dma_service import DmaService
from viommu.vfio_user.link import Link
from viommu.vfio_user.outstanding import Outstanding
from viommu.vfio_user.protocol import Capabilities, command_message

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from viommu.loop import Loop, Timer
    from viommu.vfio_user.dma_service import DmaPort
    from viommu.vfio_user.protocol import Message
    from viommu.vfio_user.requests import Agreement, IoFdsReply, RegionReply, Request
    from viommu.vfio_user.served import RegionInfo

__all__ = ["ClientLimits", "LoopClient", "default_offers", "dial", "wait"]

T = TypeVar("T")
_R = TypeVar("_R", bound="_Measured")

_MAX_DMA_MAPS: Final = 65535
_PAGE: Final = 4096
_FOR_EVER: Final = float("inf")
_CATCHING_UP: Final = 1.0  # seconds for what has arrived while the loop was busy


@dataclass(frozen=True, slots=True)
class ClientLimits:
    """What a device that doesn't answer, or doesn't read, can make its client hold."""

    #: How many requests wait for their reply.
    max_outstanding: int = 16384
    #: How many file descriptors go with these: the kernel counts those that were not
    #: received against all processes of a user, and refuses more than one may open.
    max_fds: int = 128
    #: How many bytes of requests wait to be read.
    max_queued_bytes: int = 4 << 20
    #: How many messages, or bytes of them, are handled before other sockets get their turn.
    messages_per_turn: int = 64
    bytes_per_turn: int = 1 << 20


def dial(path: Path) -> socket.socket:
    """Connect to the device that listens at ``path``, without waiting.

    Raises:
        PeerError: Nobody listens there (ENOENT, ECONNREFUSED), or too many wait (EAGAIN).
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.connect(os.fspath(path))
    except OSError as error:
        sock.close()
        number = error.errno or errno.ENAMETOOLONG  # what Python says itself has none
        raise PeerError(number, f"can't connect to {path}: {error}") from error
    return sock


def wait(loop: Loop, deferred: Deferred[T], timeout: float = _FOR_EVER) -> T:
    """Turn ``loop`` until ``deferred`` is done, and return its value.

    For code that runs before the loop does, never for a callback of the loop.

    Raises:
        ViommuError: The error that was given instead of a value.
        PeerError: ETIMEDOUT, it isn't done after ``timeout`` seconds.
    """
    deadline = loop.clock() + timeout
    while not deferred.done:
        left = deadline - loop.clock()
        if left <= 0:
            raise PeerError(errno.ETIMEDOUT, f"no answer within {timeout} s")
        loop.turn(None if left == _FOR_EVER else left)
    return deferred.result()


class _Early(NamedTuple):
    """A request from before the version was agreed upon, whose fds are ours.

    ``deferred`` is ``None`` if it is posted.
    """

    request: Request[Any]
    deferred: Deferred[Any] | None
    timeout: float


class _Measured(Protocol):
    """An answer that says how many bytes all of it needs."""

    @property
    def argsz(self) -> int: ...


class LoopClient:
    """Uses the device behind ``sock``, a connected socket that becomes the client's own.

    It negotiates at once; what is submitted before :attr:`negotiated` waits for that.
    Requests are pipelined, and every one is done when its reply comes, in whatever
    order. The device may ask for ``memory`` at any moment; without, that is refused.

    An error reply refuses one request with its errno, and the connection goes on. A
    device that doesn't answer within ``timeout`` seconds (ETIMEDOUT; ``math.inf`` waits
    for ever), that goes away (ECONNRESET) or that answers nonsense (EPROTO) ends it:
    every request is refused with that, then ``on_closed`` is called, once, from the
    loop. So does one that refuses to negotiate, with its errno. From then on requests
    are refused with ENOTCONN. :meth:`close` ends it too, but doesn't call ``on_closed``.

    No method raises for what the device does, and none waits for it.
    """

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        *,
        timeout: float = 5.0,
        memory: DmaPort | None = None,
        offers: Capabilities | None = None,
        limits: ClientLimits | None = None,
        on_closed: Callable[[PeerError], None] | None = None,
    ) -> None:
        self.timeout = timeout
        #: Done when requests can be sent; refused with why they never will be.
        self.negotiated: Deferred[None] = Deferred()
        #: The minor version that is spoken, and what the device can take of what we offer.
        self.minor = 0
        self.capabilities = Capabilities()
        #: Why there is no connection any more.
        self.ended: PeerError | None = None
        self._loop = loop
        self._limits = limits or ClientLimits()
        self._on_closed = on_closed
        offers = offers or default_offers(serves=memory is not None)
        #: What the device has asked of our memory, counted.
        self.dma = DmaService(memory, offers.max_data_xfer_size)
        data = max(spec.MAX_DATA_TRANSFER, offers.max_data_xfer_size)
        self._max_message = spec.MAX_MESSAGE - spec.MAX_DATA_TRANSFER + data
        self._link = self._connect(sock, self._take)
        #: The second socket, on which the device asks, when it wants one.
        self._twin: Link | None = None
        self._outstanding = Outstanding()
        self._early: deque[_Early] = deque()
        self._early_bytes = self._early_fds = 0
        self._timer: Timer | None = None
        self._overdue_since: float | None = None
        self._agreed = False
        answer: Deferred[Agreement] = Deferred()
        answer.then(self._agree)
        self._send(requests.version(spec.VERSION_MINOR, offers), answer, timeout)

    @property
    def closed(self) -> bool:
        """Return whether there is no connection any more."""
        return self.ended is not None

    @property
    def outstanding(self) -> int:
        """Return how many requests wait for their reply, or to be sent."""
        return len(self._outstanding) + len(self._early)

    @property
    def sending(self) -> bool:
        """Return whether the loop has still to send something, or to find that it can't."""
        return self._link.sending or (self._twin is not None and self._twin.sending)

    def fileno(self) -> int:
        """Return the socket's file descriptor, -1 once closed."""
        return self._link.fileno()

    def has_room_for(self, request: Request[Any]) -> bool:
        """Return whether a request would not be refused with ENOBUFS now."""
        return not self._is_full(request)

    def submit(self, request: Request[T], *, timeout: float | None = None) -> Deferred[T]:
        """Send a request; it is done when its reply has come.

        Its file descriptors may be closed as soon as this returns. It may be refused
        at once: ENOTCONN (closed), ENOBUFS (as much as the limits allow is under way
        already; there is room again when something is answered), EMFILE (no file
        descriptor left here), or a UsageError (more than the device takes).
        """
        deferred: Deferred[T] = Deferred()
        error = self._enqueue(request, deferred, self.timeout if timeout is None else timeout)
        if error is not None:
            deferred.refuse(error)
        return deferred

    def post(self, request: Request[Any]) -> ViommuError | None:
        """Send a request that is not answered, not even when it fails.

        Returns why it was not sent at all, as :meth:`submit` refuses; ``None``: it was.
        File descriptors can't be posted: nothing says when they have been received.
        """
        if request.fds:
            return UsageError(f"{len(request.fds)} file descriptors can't be posted")
        return self._enqueue(request, None, 0)

    def region_info(self, index: int) -> Deferred[RegionInfo]:
        """Ask about a region, again if the whole answer needs more room.

        A file descriptor in the answer is the receiver's to close.
        """
        info: Deferred[RegionInfo] = Deferred()

        def found(answer: Deferred[RegionReply]) -> None:
            try:
                info.resolve(answer.result().info)
            except ViommuError as error:
                info.refuse(error)

        whole = self._whole(lambda argsz: requests.region_info(index, argsz), vfio.REGION_INFO.size)
        whole.then(found)
        return info

    def region_io_fds(self, index: int) -> Deferred[IoFdsReply]:
        """Ask which parts of a region have file descriptors; those are the receiver's to close."""
        return self._whole(
            lambda argsz: requests.region_io_fds(index, argsz), spec.REGION_IO_FDS.size
        )

    def close(self) -> None:
        """End the connection, as its owner; what is outstanding is refused with ENOTCONN."""
        self._end(errno.ENOTCONN, "the connection is closed")

    def give_up(self, why: PeerError) -> None:
        """End the connection with a device that can't be gone on with.

        What is outstanding is refused with ``why``, of which ``on_closed`` is told.
        """
        if self._end(why.errno, str(why)) and self._on_closed is not None:
            self._loop.call_soon(partial(self._on_closed, why))

    # --- what goes out

    def _enqueue(
        self, request: Request[Any], deferred: Deferred[Any] | None, timeout: float
    ) -> ViommuError | None:
        """Send a request now or later; return why it can't be."""
        if (refusal := self._not_open()) is not None:
            return refusal
        if self._is_full(request):
            waiting = f"{self.outstanding} requests and {self._queued_bytes} bytes"
            return PeerError(errno.ENOBUFS, f"{waiting} are under way already")
        if not self._agreed:
            return self._keep(request, deferred, timeout)
        return self._send(request, deferred, timeout)

    def _not_open(self) -> PeerError | None:
        return PeerError(errno.ENOTCONN, "the connection is closed") if self.closed else None

    def _is_full(self, request: Request[Any]) -> bool:
        limits, fds = self._limits, self._outstanding.fds + self._early_fds
        return (
            self.outstanding >= limits.max_outstanding
            or self._queued_bytes + len(request.payload) > limits.max_queued_bytes
            or fds + len(request.fds) > limits.max_fds
        )

    @property
    def _queued_bytes(self) -> int:
        return self._link.queued_bytes + self._early_bytes

    def _keep(
        self, request: Request[Any], deferred: Deferred[Any] | None, timeout: float
    ) -> PeerError | None:
        try:
            fds = copy_fds(request.fds)
        except OSError as error:
            return PeerError(error.errno or errno.EMFILE, f"a request can't wait: {error}")
        self._early.append(_Early(request._replace(fds=tuple(fds)), deferred, timeout))
        self._early_bytes += len(request.payload)
        self._early_fds += len(fds)
        return None

    def _agree(self, answer: Deferred[Agreement]) -> None:
        """Take the answer to VERSION, and send what has waited for it."""
        try:
            self.minor, self.capabilities, twin = answer.result()
            if twin is not None:
                self._twin = self._connect(_socket(twin), self._take_from_twin)
        except PeerError as error:
            self._fail(error)
            return
        self._agreed = True
        early, self._early = self._early, deque()
        self._early_bytes = self._early_fds = 0
        for request, deferred, timeout in early:
            # Whoever is told of a refusal may have closed us.
            refusal = self._not_open() or self._send(request, deferred, timeout)
            close_fds(list(request.fds))
            if refusal is not None and deferred is not None:
                deferred.refuse(refusal)
        if not self.closed:
            self.negotiated.resolve(None)

    def _send(
        self, request: Request[Any], deferred: Deferred[Any] | None, timeout: float
    ) -> ViommuError | None:
        """Send a request, or return why the device can't take it."""
        try:
            request.check(self.capabilities)
        except UsageError as error:
            return error
        posted = deferred is None
        if deferred is None:
            ident = self._outstanding.fresh_id()
        else:
            deadline = self._loop.clock() + timeout
            ident = self._outstanding.add(request, deferred, deadline)
            self._watch(deadline)
        data = command_message(ident, request.command, request.payload, no_reply=posted)
        self._link.send(data, request.fds)
        return None

    # --- what comes in

    def _connect(self, sock: socket.socket, take: Callable[[Message], bool]) -> Link:
        limits = self._limits
        return Link(
            self._loop,
            sock,
            take=take,
            lost=self._fail,
            max_message=self._max_message,
            # More than requests can make of it are answers that the device has asked for.
            max_queued=limits.max_queued_bytes + self._max_message,
            messages_per_turn=limits.messages_per_turn,
            bytes_per_turn=limits.bytes_per_turn,
        )

    def _take(self, message: Message) -> bool:
        if message.kind == spec.F_TYPE_COMMAND:
            self._serve(message, self._link)
            return True
        try:
            tell = self._outstanding.take(message)
        except PeerError as error:
            self._fail(error)
            return False
        tell()
        return len(self._outstanding) > 0

    def _take_from_twin(self, message: Message) -> bool:
        if message.kind != spec.F_TYPE_COMMAND or self._twin is None:
            self._fail(
                PeerError(errno.EPROTO, f"a message of type {message.kind} on the twin socket")
            )
            return False
        self._serve(message, self._twin)
        return True

    def _serve(self, message: Message, link: Link) -> None:
        reply = self.dma.answer(message)
        if reply is not None:
            link.send(reply)

    def _whole(self, ask: Callable[[int], Request[_R]], argsz: int) -> Deferred[_R]:
        """Ask with room for ``argsz`` bytes, and once more if the answer needs more."""
        whole: Deferred[_R] = Deferred()
        again = True

        def answered(answer: Deferred[_R]) -> None:
            nonlocal argsz, again
            try:
                reply = answer.result()
            except ViommuError as error:
                whole.refuse(error)
                return
            if reply.argsz <= argsz:
                whole.resolve(reply)
            elif again and reply.argsz <= spec.MAX_DATA_TRANSFER:
                argsz, again = reply.argsz, False
                self.submit(ask(argsz)).then(answered)
            else:
                why = f"the answer needs {reply.argsz} bytes, {argsz} were accepted"
                self._fail(PeerError(errno.EPROTO, why))
                whole.refuse(PeerError(errno.EPROTO, why))

        self.submit(ask(argsz)).then(answered)
        return whole

    # --- how it ends

    def _watch(self, deadline: float) -> None:
        """Be called at ``deadline``, or before."""
        if deadline == _FOR_EVER:
            return
        if self._timer is not None:
            if self._timer.when <= deadline:
                return
            self._timer.cancel()
        self._timer = self._loop.call_later(deadline - self._loop.clock(), self._too_late)

    def _too_late(self) -> None:
        self._timer = None
        self._look_at_deadlines()

    def _look_at_deadlines(self) -> None:
        deadline, now = self._outstanding.deadline(), self._loop.clock()
        if deadline is None or now < deadline:
            self._overdue_since = None
            self._watch(_FOR_EVER if deadline is None else deadline)
            return
        if self._overdue_since is None:
            self._overdue_since = now
        if self._link.unread and now < self._overdue_since + _CATCHING_UP:
            # Others may have kept the loop busy, and the reply be there.
            self._loop.call_soon(self._look_at_deadlines)
        else:
            self._fail(PeerError(errno.ETIMEDOUT, "the server has not answered in time"))

    def _fail(self, why: PeerError) -> None:
        if self._end(why.errno, str(why)) and self._on_closed is not None:
            self._on_closed(why)

    def _end(self, number: int, why: str) -> bool:
        """Close everything and refuse what waits; return whether it was open."""
        if self.closed:
            return False
        self.ended = PeerError(number, why)
        if self._timer is not None:
            self._timer.cancel()
        self._link.close()
        if self._twin is not None:
            self._twin.close()
        early, self._early = self._early, deque()
        self._outstanding.refuse_all(number, why)
        for request, deferred, _ in early:
            close_fds(list(request.fds))
            if deferred is not None:
                deferred.refuse(PeerError(number, why))
        if not self.negotiated.done:
            self.negotiated.refuse(PeerError(number, why))
        return True


def _socket(fd: int) -> socket.socket:
    """Return the socket that ``fd``, which a peer has sent and which is owned, should be."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        close_fds([fd])
        raise PeerError(errno.EPROTO, f"the twin socket is none: {error}") from error
    if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
        sock.close()
        raise PeerError(errno.EPROTO, f"the twin socket is of {sock.family!r}, {sock.type!r}")
    return sock


def default_offers(*, serves: bool) -> Capabilities:
    """Return what a client offers that says nothing else; ``serves``: it serves DMA."""
    # That DMA is served has no capability in the specification: send what QEMU sends,
    # which does, and what says that it is served whatever else we wait for.
    if serves:
        return Capabilities(
            requests.MAX_REPLY_FDS,
            max_dma_maps=_MAX_DMA_MAPS,
            pgsizes=_PAGE,
            write_multiple=True,
            twin_socket=True,
            message_dma=True,
        )
    return Capabilities(requests.MAX_REPLY_FDS, write_multiple=True)
