"""One client of an endpoint's export sessions, whose socket is already connected."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from viommu.errors import PeerError
from viommu.ipc.conversation import Conversation
from viommu.ipc.hold import HoldWatch, Measure
from viommu.ipc.packets import PacketSocket
from viommu.ipc.protocol import MAX_PACKET

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from viommu.events import Event
    from viommu.ipc.conversation import ConversationSetup
    from viommu.ipc.hold import HoldPolicy
    from viommu.ipc.peer import PeerProcess
    from viommu.loop import Loop

__all__ = ["ServedClient"]

_log: Final = logging.getLogger("viommu.ipc")

_SHOWN: Final = 256  # exports in a description


class ServedClient:
    """The client ``process`` on ``sock``; both are owned. Driven by ``loop``, it never blocks.

    Requests are handled in order; while the client does not read its answers, no more are
    read from it. A client that closes its end, or ends, has released everything.

    One that breaks the protocol is told to let go and hears nothing more, but what it
    holds stays held until it has closed its end: it may be writing there at this moment.
    If it takes too long, as if it keeps what the guest has taken back, ``policy`` says
    what is done. ``on_gone`` is told why the client is not served any more, when all it
    held has been released.
    """

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        process: PeerProcess,
        setup: ConversationSetup,
        *,
        name: str,
        policy: HoldPolicy,
        on_gone: Callable[[str], None],
    ) -> None:
        self.closed = False
        self.process = process
        self._loop = loop
        self._name = name
        self._limits = setup.limits
        self._on_gone = on_gone
        self._connected_at = loop.clock()
        #: Why the client was told to let go of everything, if it was.
        self._ending = ""
        self._killed = False
        self._packets = PacketSocket(sock)
        self._fault: Event | None = None
        self._watch = HoldWatch(loop, policy, self._overdue)
        self._conversation = Conversation(setup, loop.clock, self._session_changed)
        self._deadline = loop.call_later(self._limits.hello_time, self._too_late)
        self._memory = setup.memory
        self._noting = False
        setup.memory.watch(self._memory_changed)
        loop.on_readable(self._packets, self._serve)

    @property
    def hung_up(self) -> bool:
        """Whether the client has closed its end; what it sent may still be unread."""
        return self._packets.hung_up

    @property
    def farewell(self) -> str:
        """Why the client leaves, in its own words; empty if it did not say."""
        return self._conversation.farewell

    def finish_departed(self) -> None:
        """Handle the last requests of the client if it has hung up, and let it go."""
        while not (self.closed or self._killed) and self.hung_up:
            if self._ending or self._packets.backlog:
                self._gone("closed by the client")
            else:
                self._serve()

    def describe(self) -> dict[str, object]:
        """Return who it is, what it holds and since when, and what it is waited for."""
        now = self._loop.clock()
        conversation = self._conversation
        return {
            "pid": self.process.pid,
            "uid": self.process.uid,
            "connected": now - self._connected_at,
            "session": "ending" if self._ending else conversation.state,
            "exports": conversation.holds,
            "bytes": conversation.held_bytes,
            "holds": [
                [iova, size, times, now - since]
                for (iova, size), (times, since) in conversation.oldest(_SHOWN)
            ],
            "waited for": self._watch.waited,
            "killed": self._killed,
        }

    def close(self, why: str) -> None:
        """Release all that the client holds and disconnect it; closing twice is harmless."""
        if self.closed:
            return
        self.closed = True
        _log.info("%s: %s is served no more: %s", self._name, self.process, why)
        self._deadline.cancel()
        self._watch.stop()
        self._memory.unwatch(self._memory_changed)
        self._loop.forget(self._packets)
        self._packets.close()
        self._conversation.close()
        if self.process.fileno() >= 0:
            self._loop.forget(self.process)
        self.process.close()

    def _gone(self, why: str) -> None:
        if self._killed:
            # Its end is what counts, and not that of the connection, which may be earlier.
            self._loop.forget(self._packets)
        else:
            self._finish(why)

    def _finish(self, why: str) -> None:
        if self.farewell:
            why = f"{why} ({self.farewell})"
        self.close(why)
        self._on_gone(why)

    # -- requests

    def _serve(self) -> None:
        """Handle the requests that have arrived, up to a turn's worth of them or of answers."""
        answered = 0
        for _ in range(self._limits.messages_per_turn):
            if self._packets.backlog or answered > MAX_PACKET:
                return
            try:
                data = self._packets.receive()
                if data is None:
                    return
                packets = self._conversation.handle(data)
                answered += sum(len(packet.data) for packet in packets)
                self._packets.send(packets)
            except EOFError as error:
                self._gone(str(error))
                return
            except PeerError as error:
                self._hang_up(str(error))
                return
            self._pause_unless_read()
            if not self._conversation.holds:
                self._watch.stop()

    def _pause_unless_read(self) -> None:
        if self._packets.backlog:
            # A client that doesn't read is not read from: the answers to one request wait.
            self._loop.on_readable(self._packets, None)
            self._loop.on_hang_up(self._packets, self._left)
            self._loop.on_writable(self._packets, self._flush)

    def _flush(self) -> None:
        try:
            self._packets.flush()
        except EOFError as error:
            self._gone(str(error))
            return
        except PeerError as error:
            self._hang_up(str(error))
            return
        if not self._packets.backlog:
            self._loop.forget(self._packets)
            self._loop.on_readable(self._packets, self._serve)

    def _memory_changed(self) -> None:
        if not self._noting:
            self._noting = True
            self._loop.call_soon(self._note_memory)

    def _note_memory(self) -> None:
        """Tell the client that guest memory has changed, if it has looked at it before."""
        self._noting = False
        if self.closed or self._ending:
            return
        try:
            self._packets.send(self._conversation.memory_changed())
        except EOFError as error:
            self._gone(str(error))
        except PeerError as error:
            self._hang_up(str(error))
        else:
            self._pause_unless_read()

    def _too_late(self) -> None:
        if not self._conversation.greeted:
            self._hang_up("it said nothing in time")

    # -- letting go

    def _session_changed(self, event: Event | None) -> None:
        """Watch the fault event of the session that begins; the one before it ends now."""
        if self._fault is not None:
            self._loop.forget(self._fault)
        self._fault = event
        if event is not None:
            self._loop.on_readable(event, self._faulted)

    def _faulted(self) -> None:
        """The guest has taken back what the client holds."""
        self._conversation.end_session()
        if self._conversation.holds:
            self._watch.start()

    def _hang_up(self, why: str) -> None:
        """Serve the client no more; what it holds is released when it has let go."""
        if self.closed or self._ending:
            return
        if not self._conversation.holds:
            _log.warning("%s: %s is disconnected: %s", self._name, self.process, why)
            self._gone(why)
            return
        _log.warning(
            "%s: %s is told to let go of %d exports: %s",
            self._name, self.process, self._conversation.holds, why,
        )  # fmt: skip
        self._ending = why
        self._conversation.end_session()
        self._packets.say_no_more()
        self._loop.forget(self._packets)
        self._loop.on_hang_up(self._packets, self._left)
        self._watch.start()

    def _left(self) -> None:
        self._gone(self._ending or "closed by the client")

    def _overdue(self, waited: float) -> None:
        """Do what the policy says about a client that has not let go."""
        measure = self._watch.policy.measure
        if measure is Measure.KILL and not self._killed and self.process.kill():
            self._killed = True
            self._loop.on_readable(self.process, self._ended)
        _log.warning(
            "%s: %s has not let go of %d exports for %.1f s%s",
            self._name, self.process, self._conversation.holds, waited,
            ": it is killed" if self._killed else "",
        )  # fmt: skip

    def _ended(self) -> None:
        if not self.hung_up:
            _log.warning(
                "%s: %s has ended, but another has its connection, and may use guest memory",
                self._name, self.process,
            )  # fmt: skip
        self._finish("it was killed because it did not let go")
