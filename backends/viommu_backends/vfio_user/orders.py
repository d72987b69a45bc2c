"""What a device is asked, one after the other, and whether it has answered all of it."""

from __future__ import annotations

import errno
from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

from viommu.deferred import Deferred
from viommu.errors import BackendError, PeerError, ViommuError
from viommu.events import Event

if TYPE_CHECKING:
    from collections.abc import Callable

    from viommu.loop import Loop, Timer
    from viommu.vfio_user.loop_client import LoopClient
    from viommu.vfio_user.requests import Request

__all__ = ["Order", "OrderQueue"]

# Seconds until a connection that is full of other people's requests is tried again.
_PAUSE: Final = 0.01
# Answers a second that a device must give which has been asked for a lot: a guest's
# CPU waits for all of them.
_PACE: Final = 100


class Order(Protocol):
    """One command for the device."""

    @property
    def barrier(self) -> bool:
        """Whether it waits for all answers to those before it, and those behind it for its own."""

    def request(self) -> Request[Any] | None:
        """Return what to send, now that it is its turn; ``None``: there is no need any more."""

    def done(self, answer: Any) -> None:
        """Take the answer."""

    def refused(self, error: ViommuError) -> None:
        """Take a refusal, after which the connection goes on."""


class OrderQueue:
    """Sends orders in order, ``window`` at a time; what has not been sent can be cancelled.

    A device has ``patience`` seconds for an answer. One that breaks off, or does not
    answer, has nothing left to answer: the queue is empty then. ``cut_off`` is called
    when it has to be disconnected for what the connection does not know of.

    Nothing is called back, and nothing is sent, before control is back in the loop.
    """

    def __init__(
        self, loop: Loop, *, patience: float, cut_off: Callable[[PeerError], None]
    ) -> None:
        #: How many orders were answered.
        self.answered = 0
        #: How many may wait for their answers at a time.
        self.window = 1
        self._loop = loop
        self._patience = patience
        self._cut_off = cut_off
        self._client: LoopClient | None = None
        self._backlog: OrderedDict[Order, None] = OrderedDict()
        self._unanswered = 0
        self._barrier: Order | None = None
        self._scheduled = False
        self._pause: Timer | None = None
        # Made while it can be refused, kept until somebody asks for it.
        self._event: Event | None = None
        self._wanted = False
        self._settled: Deferred[None] | None = None
        self._pace: Timer | None = None
        # What must have been answered, or cancelled, when the pace is looked at.
        self._asked = self._finished = self._due = self._answered_then = 0

    def __len__(self) -> int:
        """Return how many orders are not answered, sent or not."""
        return len(self._backlog) + self._unanswered

    @property
    def connected(self) -> bool:
        """Whether there is a device to give orders to."""
        return self._client is not None

    def connect(self, client: LoopClient, window: int) -> None:
        """Give orders to ``client`` from now on; none is open."""
        self._client = client
        self.window = window

    def disconnect(self) -> None:
        """Forget the device: it answers nothing any more."""
        self._client = None
        self._finished = self._asked
        self._backlog.clear()
        self._unanswered = 0
        self._barrier = None
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        self._check_settled()

    def close(self) -> None:
        """Disconnect for good; closing twice is harmless."""
        self.disconnect()
        if self._event is not None and not self._wanted:
            self._event.close()
            self._event = None

    def prepare(self) -> None:
        """Make sure that :meth:`unsettled` can be called after an order that is still to come.

        Raises:
            BackendError: EMFILE, this process may open no more file descriptors.
        """
        if self._client is not None and self._event is None:
            try:
                self._event = Event()
            except OSError as error:
                raise BackendError(error.errno or errno.EMFILE, "no event to wait for") from error

    def add(self, order: Order) -> None:
        """Send an order, after all those before it. Without a device it is forgotten."""
        if self._client is None:
            return
        try:
            self.prepare()
        except BackendError as error:
            # Nobody could wait for it.
            self._cut_off(PeerError(error.errno, str(error)))
            return
        self._backlog[order] = None
        self._asked += 1
        if self._pace is None:
            self._watch_pace()
        self._schedule()

    def cancel(self, order: Order) -> bool:
        """Forget an order that has not been sent; return whether that was so."""
        if order not in self._backlog:
            return False
        del self._backlog[order]
        self._finished += 1
        self._schedule()  # it may have been the last one
        return True

    def unsettled(self) -> Event | None:
        """Return an event for the moment at which every order is answered; ``None``: it is now.

        It is the same event until then. The caller closes it.
        """
        if not len(self):
            return None
        if self._event is None or self._event.fileno() < 0:  # closed by whoever asked before
            self._event = Event()
        self._wanted = True
        return self._event

    def settled(self) -> Deferred[None] | None:
        """Return the same as a result to come."""
        if not len(self):
            return None
        if self._settled is None:
            self._settled = Deferred()
        return self._settled

    def flush(self) -> None:
        """Send what can be sent, now."""
        while (
            self._client is not None
            and self._backlog
            and self._barrier is None
            and self._unanswered < self.window
        ):
            order = next(iter(self._backlog))
            if order.barrier and self._unanswered:
                break
            del self._backlog[order]
            request = order.request()
            if request is None:
                self._finished += 1
            elif not self._send(self._client, order, request):
                break
        self._check_settled()

    def _send(self, client: LoopClient, order: Order, request: Request[Any]) -> bool:
        """Send an order; return whether more can be sent."""
        answer = client.submit(request, timeout=self._patience)
        if _is_refused_for_want_of_room(answer):
            self._backlog[order] = None
            self._backlog.move_to_end(order, last=False)
            if self._pause is None:
                self._pause = self._loop.call_later(_PAUSE, self._try_again)
            return False
        self._unanswered += 1
        if order.barrier:
            self._barrier = order
        answer.then(partial(self._answered, client, order))
        return True

    def _try_again(self) -> None:
        self._pause = None
        self.flush()

    def _answered(self, client: LoopClient, order: Order, answer: Deferred[Any]) -> None:
        if client is not self._client:
            return
        if client.closed:
            # Whoever owns it is told too, and may have been told before.
            self.disconnect()
            return
        self._unanswered -= 1
        self._finished += 1
        self.answered += 1
        if self._barrier is order:
            self._barrier = None
        try:
            value = answer.result()
        except ViommuError as error:
            order.refused(error)
        else:
            order.done(value)
        self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        self._scheduled = False
        self.flush()

    def _check_settled(self) -> None:
        if len(self):
            return
        if self._pace is not None:
            self._pace.cancel()
            self._pace = None
        if self._event is not None and self._wanted:
            event, self._event, self._wanted = self._event, None, False
            if event.fileno() >= 0:
                event.signal()
        if self._settled is not None:
            settled, self._settled = self._settled, None
            settled.resolve(None)

    def _watch_pace(self) -> None:
        self._due, self._answered_then = self._asked, self.answered
        self._pace = self._loop.call_later(self._patience, self._check_pace)

    def _check_pace(self) -> None:
        """Cut off a device that answers so slowly that a guest would wait for long."""
        answered = self.answered - self._answered_then
        if self._finished < self._due and answered < self._patience * _PACE:
            self._pace = None
            why = f"{answered} answers in {self._patience} s, {len(self)} are still to come"
            self._cut_off(PeerError(errno.ETIMEDOUT, f"the device is too slow: {why}"))
        else:
            self._watch_pace()


def _is_refused_for_want_of_room(answer: Deferred[Any]) -> bool:
    """Return whether so much is under way already that a request was not taken."""
    number = None
    if answer.done:
        try:
            answer.result()
        except PeerError as error:
            number = error.errno
        except ViommuError:
            pass
    return number == errno.ENOBUFS
