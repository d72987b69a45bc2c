"""The connection to a device in another process: made, lost, and made again."""

from __future__ import annotations

import enum
import errno
from typing import TYPE_CHECKING, Final, Protocol

from viommu.deferred import Deferred
from viommu.endpoints.remote.description import read_description
from viommu.errors import PeerError, ViommuError
from viommu.vfio_user.loop_client import LoopClient

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from viommu.endpoints.remote.description import Description
    from viommu.loop import Loop, Timer
    from viommu.vfio_user.dma_service import DmaPort
    from viommu.vfio_user.protocol import Capabilities

__all__ = ["DeviceLink", "LinkOwner", "LinkState"]

_FIRST_PAUSE: Final = 1.0  # seconds
_LAST_PAUSE: Final = 30.0


class LinkState(enum.Enum):
    """Whether there is a device."""

    DEAD = "dead"
    CONNECTING = "connecting"
    ALIVE = "alive"
    CLOSED = "closed"


class LinkOwner(Protocol):
    """Whose link it is; called from the loop, or from what the owner itself called."""

    def accept(self, client: LoopClient, description: Description) -> Deferred[None]:
        """Take a device into service; done, with or without success, when it can be used.

        Raises:
            ViommuError: It is not the one that is wanted; ``description`` is closed.
        """

    def alive(self) -> None:
        """The device that was accepted last can be used."""

    def lost(self, why: PeerError) -> None:
        """The device that was accepted last has gone, whether it could be used yet or not."""

    def failed(self, why: ViommuError) -> None:
        """An attempt has ended without a device."""


class DeviceLink:
    """Connects with ``dial``, which returns a connected socket, or raises a ViommuError.

    An attempt may take ``connect_timeout`` seconds altogether, and every request
    ``timeout``. ``port`` and ``offers`` are what a client has for the device, see
    :class:`~viommu.vfio_user.loop_client.LoopClient`.
    """

    def __init__(
        self,
        loop: Loop,
        dial: Callable[[], socket.socket],
        owner: LinkOwner,
        *,
        port: DmaPort | None,
        offers: Capabilities | None,
        timeout: float,
        connect_timeout: float,
    ) -> None:
        self.state = LinkState.DEAD
        self._loop = loop
        self._dial = dial
        self._owner = owner
        self._port = port
        self._offers = offers
        self._timeout = timeout
        self._connect_timeout = connect_timeout
        self._client: LoopClient | None = None
        self._accepted = False
        self._attempt: Deferred[ViommuError | None] | None = None
        self._deadline: Timer | None = None
        self._retry: Timer | None = None
        self._pause = _FIRST_PAUSE

    @property
    def client(self) -> LoopClient | None:
        """What reaches the device; ``None`` unless it can be used."""
        client = self._client if self.state is LinkState.ALIVE else None
        if client is not None and client.ended is not None:
            self._fail(client.ended)  # somebody else who has it found out first
            return None
        return client

    def open(self) -> Deferred[ViommuError | None]:
        """Try to get a device; gives ``None`` once it can be used, or else why there is none.

        There is one attempt at a time: who asks meanwhile shares it.
        """
        if self._attempt is not None:
            return self._attempt
        attempt: Deferred[ViommuError | None] = Deferred()
        if self.state is not LinkState.DEAD:
            attempt.resolve(None)
            return attempt
        self._stop_retrying()
        self._attempt = attempt
        self.state = LinkState.CONNECTING
        try:
            sock = self._dial()
        except ViommuError as error:
            self._fail(error)
            return attempt

        def ended(why: PeerError) -> None:
            if self._client is client:
                self._fail(why)

        client = self._client = LoopClient(
            self._loop,
            sock,
            # What takes longer while it is made is ended by the deadline.
            timeout=max(self._timeout, self._connect_timeout),
            memory=self._port,
            offers=self._offers,
            on_closed=ended,
        )
        self._deadline = self._loop.call_later(self._connect_timeout, self._too_late)
        read_description(client).then(lambda answer: self._described(client, answer))
        return attempt

    def keep_trying(self) -> None:
        """Try again later, and again with growing pauses, until there is a device."""
        if self.state is LinkState.DEAD and self._retry is None:
            self._retry = self._loop.call_later(self._pause, self._try_again)
            self._pause = min(2 * self._pause, _LAST_PAUSE)

    def hang_up(self, why: PeerError) -> None:
        """Give up a device that can't be gone on with; it is lost."""
        if self._client is not None:
            self._client.close()
            self._fail(why)

    def close(self) -> None:
        """Disconnect, for good; closing twice is harmless."""
        self._stop_retrying()
        self.hang_up(PeerError(errno.ENOTCONN, "the link is closed"))
        self.state = LinkState.CLOSED
        self._stop_retrying()

    def _described(self, client: LoopClient, answer: Deferred[Description]) -> None:
        try:
            description = answer.result()
        except ViommuError as error:
            if not client.closed:  # otherwise that is what ends the attempt
                client.close()
                self._fail(error)
            return
        try:
            ready = self._owner.accept(client, description)
        except ViommuError as error:
            client.close()
            self._fail(error)
            return
        self._accepted = True
        if client.ended is not None:
            self._fail(client.ended)
        else:
            ready.then(lambda _: self._ready(client))

    def _ready(self, client: LoopClient) -> None:
        if client.closed:
            return
        client.timeout = self._timeout
        self.state = LinkState.ALIVE
        self._pause = _FIRST_PAUSE
        self._owner.alive()
        self._finish(None)

    def _too_late(self) -> None:
        self.hang_up(
            PeerError(errno.ETIMEDOUT, f"it was not ready within {self._connect_timeout} s")
        )

    def _fail(self, why: ViommuError) -> None:
        """There is no device any more, or there has never been."""
        accepted, self._accepted = self._accepted, False
        self._client = None
        self.state = LinkState.DEAD
        if accepted:
            self._owner.lost(_as_peer_error(why))
        if self._attempt is not None:
            self._owner.failed(why)
            self._finish(why)

    def _finish(self, why: ViommuError | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            attempt.resolve(why)

    def _try_again(self) -> None:
        self._retry = None
        self.open()

    def _stop_retrying(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None


def _as_peer_error(error: ViommuError) -> PeerError:
    return error if isinstance(error, PeerError) else PeerError(errno.EPROTO, str(error))
