"""One client's conversation with a device: a message in, at most one reply out. No sockets.

Errors are those that libvfio-user answers, see the tests. A message is validated
as a whole before the device or guest memory see any of it. The reply may come
later: when the device, or who holds guest memory, has to be waited for.
"""

from __future__ import annotations

import errno
import logging
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, TypeVar

from viommu.deferred import Deferred
from viommu.errors import InternalError, MemoryNotShared, PeerError, ViommuError
from viommu.memory import MessageMemory
from viommu.spec import vfio
from viommu.spec import vfio_user as spec
from viommu.spec.vfio_user import Command
from viommu.spec.vfio_user_iommufd import IommufdCommand
from viommu.vfio_user.connection import close_fds
from viommu.vfio_user.ioas_commands import IoasCommands
from viommu.vfio_user.ioas_table import IoasTable
from viommu.vfio_user.irqs import IrqLines
from viommu.vfio_user.protocol import (
    Capabilities,
    Message,
    MessageSizeError,
    command_message,
    errno_of,
    error_reply,
    negotiate,
    reply_message,
)
from viommu.vfio_user.region_info import encode_region_info
from viommu.vfio_user.sharing import (
    SharingProbe,
    Verdict,
    look_at_peer,
    why_out_of_reach,
    why_private,
)

if TYPE_CHECKING:
    import struct
    from collections.abc import Callable

    from viommu.memory import GuestMemory, MappedFiles
    from viommu.vfio_user.ioas_table import IoasLimits
    from viommu.vfio_user.message_port import MessagePort
    from viommu.vfio_user.served import IrqInfo, RegionInfo, ServedDevice

__all__ = ["Answer", "Later", "Result", "ServerLimits", "Session", "SessionCounters", "after"]

T = TypeVar("T")

_LOG: Final = logging.getLogger("viommu.vfio_user")

_MAX_ARGSZ: Final = 1 << 20  # libvfio-user's bound on the replies it builds
_DMA_MAP_FLAGS: Final = (
    spec.DMA_MAP_F_READ | spec.DMA_MAP_F_WRITE | spec.DMA_MAP_F_MMAP | spec.DMA_MAP_F_FILE_IO
)


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What a client can make a server hold or wait for; sizes in bytes, times in seconds."""

    max_message: int = spec.MAX_MESSAGE
    max_data_transfer: int = spec.MAX_DATA_TRANSFER
    max_msg_fds: int = 8
    max_dma_size: int = 8 << 40
    #: A client that has not said which version it speaks by then is dropped.
    negotiation_time: float = 10.0
    #: After that long a client may have forgotten what it asked; QEMU does after 5 s.
    reply_time: float = 4.5
    #: How long a device waits for memory that the client reads and writes for it.
    dma_time: float = 5.0
    #: How many posted writes may be under way in the device at once.
    open_posted: int = 64
    #: How many messages are handled before other sockets get their turn.
    messages_per_turn: int = 64
    #: How many refused messages of one client are logged.
    logged_refusals: int = 16
    #: What a client may make of the iommufd commands; without, it is not offered them.
    iommufd: IoasLimits | None = None


@dataclass(slots=True)
class SessionCounters:
    """What has happened; the counts go on across clients."""

    messages: int = 0
    posted: int = 0
    refused: int = 0
    dma_maps: int = 0
    dma_unmaps: int = 0
    resets: int = 0
    #: Replies that came too late to be sent as they are.
    withheld: int = 0
    internal_errors: int = 0


class Answer(NamedTuple):
    """What to send: ``data`` in one go with ``fds``, which stay the device's.

    ``then`` is left to be done in the next turn, before the next message: see
    :meth:`Session.follow_up`.
    """

    data: bytes
    fds: tuple[int, ...] = ()
    hang_up: bool = False
    then: Callable[[], Deferred[None] | None] | None = None


class Result(NamedTuple):
    """What a command brought: the payload of its reply; the rest is as in :class:`Answer`."""

    payload: bytes = b""
    fds: tuple[int, ...] = ()
    then: Callable[[], Deferred[None] | None] | None = None


class Later(NamedTuple, Generic[T]):
    """What a command will bring: what ``finish`` makes of the value once it is there."""

    value: Deferred[T]
    finish: Callable[[T], Result]


def after(value: T | Deferred[T], finish: Callable[[T], Result]) -> Result | Later[T]:
    """Return what ``finish`` makes of ``value``: now, or when it is there."""
    return Later(value, finish) if isinstance(value, Deferred) else finish(value)


class Session:
    """Serves ``device`` to one client, from its VERSION to its departure.

    ``peer`` is the client's process, 0 if unknown. ``refuse`` is told, once,
    why the client's memory can't be used.
    """

    def __init__(
        self,
        device: ServedDevice,
        files: MappedFiles,
        limits: ServerLimits,
        counters: SessionCounters,
        *,
        peer: int = 0,
        refuse: Callable[[str], None],
    ) -> None:
        self.ready = False
        self.capabilities = Capabilities()
        #: How the client is asked for memory, if it is one that can be asked at any time.
        self.port: MessagePort | None = None
        self._device = device
        self._memory = device.memory
        self._files = files
        self._limits = limits
        self._counters = counters
        self._peer = peer
        self._refuse = refuse
        self._refusals = 0
        self._was_late = False
        self._regions: list[RegionInfo] = []
        self._irqs: list[IrqInfo] = []
        self._lines = IrqLines(())
        self._probe = SharingProbe(device.memory, enabled=False)
        self._next_id = 0
        self._reading: tuple[int, int, int] | None = None  # id, address, size
        self._open_posted = 0
        self._asked: MessageMemory | None = None  # some of which the client is asked for
        self._ioas: IoasCommands | None = None  # negotiated, then
        self._handlers: dict[int, Callable[[Message], Result | Later[Any]]] = {
            Command.DMA_MAP: self._dma_map,
            Command.DMA_UNMAP: self._dma_unmap,
            Command.DEVICE_GET_INFO: self._get_info,
            Command.DEVICE_GET_REGION_INFO: self._get_region_info,
            Command.DEVICE_GET_REGION_IO_FDS: self._get_region_io_fds,
            Command.DEVICE_GET_IRQ_INFO: self._get_irq_info,
            Command.DEVICE_SET_IRQS: self._set_irqs,
            Command.REGION_READ: self._region_read,
            Command.REGION_WRITE: self._region_write,
            Command.DEVICE_RESET: self._reset,
        }

    def handle(self, message: Message) -> Answer | Deferred[Answer | None] | None:
        """Do what a message asks; its file descriptors are kept or closed.

        ``None``: the client expects no reply, and one would break its stream.
        A deferred answer, which never comes once the session is closed, must be
        waited for before the next message is handled.
        """
        self._counters.messages += 1
        try:
            if message.kind == spec.F_TYPE_REPLY and self._reading is not None:
                taken = self._attempt(message.command, partial(self._take_reply, message))
                return self._answer(message, taken) if isinstance(taken, int) else taken
            result = self._attempt(message.command, partial(self._dispatch, message))
        finally:
            close_fds(message.fds)
        if isinstance(result, Later):
            return self._wait(message, result)
        return self._answer(message, result)

    def reject(self, error: MessageSizeError) -> Answer:
        """Answer a message whose header is impossible."""
        message = error.message
        close_fds(message.fds)
        self._counters.messages += 1
        data = error_reply(message, self._refused(message.command, error))
        return Answer(b"" if message.no_reply else data, hang_up=error.lost or not self.ready)

    def follow_up(self, answer: Answer) -> Deferred[None] | None:
        """Do what is left to be done behind an answer; nobody hears of it when that fails.

        A result, which never comes once the session is closed, must be waited for
        before the next message is handled.
        """
        act = answer.then
        done = None if act is None else self._attempt(Command.REGION_WRITE, act)
        if not isinstance(done, Deferred):
            return None
        concluded: Deferred[None] = Deferred()

        def conclude(value: Deferred[None]) -> None:
            if self.ready:
                self._attempt(Command.REGION_WRITE, value.result)
                concluded.resolve(None)

        done.then(conclude)
        return concluded

    def withhold(self, message: Message, answer: Answer) -> Answer:
        """Return what to send instead of an answer that comes too late.

        A client that has forgotten its request would take the payload for the next
        message. It ignores a header, and one that still waits learns of a failure.
        """
        if not self.capabilities.forgets or len(answer.data) <= spec.HEADER_SIZE:
            return answer
        self._counters.withheld += 1
        if not self._was_late:
            self._was_late = True
            name, limit = self._device.name, self._limits.reply_time
            _LOG.warning("%s: a reply took more than %s s and was withheld", name, limit)
        return answer._replace(data=error_reply(message, errno.ETIMEDOUT), fds=())

    def suspect_memory(self, gpa: int | None = None) -> None:
        """Have guest memory (the page at ``gpa``) compared with what the client sees."""
        self._probe.suspect(gpa)

    def next_command(self) -> bytes | None:
        """Return a command to send to the client when all its commands are answered."""
        if not self.ready or (wanted := self._probe.next_read()) is None:
            return None
        ident = self.fresh_id()
        self._reading = (ident, *wanted)
        return command_message(ident, Command.DMA_READ, spec.DMA_ACCESS.pack(*wanted))

    def fresh_id(self) -> int:
        """Return an id for a command to send to the client."""
        ident = self._next_id
        self._next_id = (ident + 1) & 0xFFFF
        return ident

    def close(self) -> None:
        """The client has gone: quiesce the device, then drop memory and interrupts."""
        connected, self.ready = self.ready, False
        try:
            if connected:
                self._device.disconnect()
        except Exception:  # noqa: BLE001 - see _defect
            self._defect()
        finally:
            if self._asked is not None:
                self._asked.port = None
            self._memory.close()
            if self._ioas is not None:
                self._ioas.table.close()
            self._lines.close()

    def _attempt(self, command: int, act: Callable[[], T]) -> T | int:
        """Return what ``act`` returns, or the errno that says why it failed."""
        try:
            return act()
        except ViommuError as error:
            return self._refused(command, error)
        except Exception:  # noqa: BLE001 - see _defect
            self._defect()
            return errno.EIO

    def _answer(self, message: Message, result: Result | int) -> Answer | None:
        """Return the answer to a message that brought ``result``, or failed with an errno."""
        # A failed negotiation ends the connection.
        hang_up = isinstance(result, int) and not self.ready
        if message.no_reply:
            self._counters.posted += 1
            return Answer(b"", hang_up=True) if hang_up else None
        if isinstance(result, int):
            return Answer(error_reply(message, result), hang_up=hang_up)
        return Answer(reply_message(message, result.payload), result.fds, then=result.then)

    def _wait(self, message: Message, later: Later[Any]) -> Answer | Deferred[Answer | None] | None:
        """Return the answer to a message whose result is not there yet."""
        message.payload = b""  # done with; it may be a megabyte
        answer: Deferred[Answer | None] = Deferred()
        posted = message.no_reply and message.command == Command.REGION_WRITE
        self._open_posted += posted

        def conclude(value: Deferred[Any]) -> None:
            self._open_posted -= posted
            if self.ready:  # otherwise nobody waits any more
                result = self._attempt(message.command, lambda: later.finish(value.result()))
                answer.resolve(self._answer(message, result))

        later.value.then(conclude)
        if answer.done:
            return answer.result()
        # Posted writes go on to the device one behind the other, as far as it keeps up.
        if posted and self._open_posted < self._limits.open_posted:
            return None
        return answer

    def _refused(self, command: int, error: ViommuError) -> int:
        self._counters.refused += 1
        self._refusals += 1
        # Memory that can't be used has been told of through ``refuse``.
        told = isinstance(error, MemoryNotShared)
        if self._refusals <= self._limits.logged_refusals and not told:
            # The text, not the error: a log that keeps records must not keep guest memory mapped.
            name, why = self._device.name, str(error)
            _LOG.warning("%s: command %d refused: %s", name, command, why)
        return errno_of(error)

    def _defect(self) -> None:
        """Note a defect of ours: met by one client, it must not take the other devices down."""
        self._counters.internal_errors += 1
        _LOG.exception("%s: internal error, please report it", self._device.name)

    def _dispatch(self, message: Message) -> Result | Later[Any]:
        if message.kind != spec.F_TYPE_COMMAND:
            raise _invalid(f"a message of type {message.kind} is not expected")
        if message.truncated:
            raise _invalid("file descriptors were lost: too many in a message, or open here")
        if not self.ready:
            return self._version(message)
        handler = self._handlers.get(message.command)
        if handler is None:
            raise _invalid(f"command {message.command} is not known here")
        return handler(message)

    def _version(self, message: Message) -> Result:
        if message.command != Command.VERSION:
            raise _invalid(f"command {message.command} came before the version")
        limits = self._limits
        extended = limits.iommufd is not None
        ours = Capabilities(
            limits.max_msg_fds, limits.max_data_transfer, iommufd=extended, fixed_iova=extended
        )
        self.capabilities, payload = negotiate(message.payload, ours)
        device = self._device
        self._regions = [device.region_info(i) for i in range(device.num_regions)]
        self._irqs = [device.irq_info(i) for i in range(device.num_irqs)]
        self._lines = IrqLines([info.count for info in self._irqs])
        theirs = self.capabilities
        # Who has the iommufd commands knows what to share; IOVAs of ours mean nothing there.
        self._probe = SharingProbe(self._memory, enabled=theirs.serves_dma and not theirs.iommufd)
        if limits.iommufd is not None and theirs.iommufd:
            table = IoasTable(self._memory, limits.iommufd)
            self._ioas = IoasCommands(table, self._files, fixed_iova=theirs.fixed_iova)
            handler = partial(self._iommufd, self._ioas)
            self._handlers |= dict.fromkeys(IommufdCommand, handler)
        self._open_port()
        device.connect(self._lines)
        self.ready = True
        return Result(payload)

    def _open_port(self) -> None:
        """Let memory be reached by messages, if both sides are made for that."""
        theirs, memory, port = self.capabilities, self._memory, self.port
        if isinstance(memory, MessageMemory) and theirs.message_dma and port is not None:
            port.max_transfer = min(port.max_transfer, max(1, theirs.max_data_xfer_size))
            memory.port = port
            self._asked = memory

    def _dma_map(self, message: Message) -> Result:
        argsz, flags, offset, gpa, size = _unpack(message, spec.DMA_MAP)
        _check_argsz(argsz, spec.DMA_MAP.size)
        if flags & ~_DMA_MAP_FLAGS:
            raise _invalid(f"flags {flags:#x} are not known")
        if flags & (spec.DMA_MAP_F_MMAP | spec.DMA_MAP_F_FILE_IO) and not message.fds:
            raise _invalid(f"flags {flags:#x} need a file descriptor")
        if flags & spec.DMA_MAP_F_FILE_IO and not flags & spec.DMA_MAP_F_MMAP:
            raise PeerError(errno.ENOTSUP, "memory is mapped here, not read and written by file")
        if gpa + size > 1 << 64:
            raise _invalid(f"region of {size:#x} bytes at {gpa:#x} passes the end of the space")
        if size > self._limits.max_dma_size:
            limit = self._limits.max_dma_size
            raise PeerError(errno.ENOSPC, f"region of {size:#x} bytes is larger than {limit:#x}")
        readable, writable = bool(flags & spec.DMA_MAP_F_READ), bool(flags & spec.DMA_MAP_F_WRITE)
        if not size:  # maps nothing, and is not an error to libvfio-user
            return Result()
        file = None
        if message.fds:
            file = self._files.get(message.fds[0], offset, size, writable=writable)
        try:
            self._told_memory.map(
                gpa, size, readable=readable, writable=writable, file=file, offset=offset
            )
        except ViommuError:
            if file is not None:
                file.close()
            raise
        self._counters.dma_maps += 1
        return Result()

    def _dma_unmap(self, message: Message) -> Result | Later[None]:
        argsz, flags, gpa, size = _unpack(message, spec.DMA_UNMAP)
        _check_argsz(argsz, spec.DMA_UNMAP.size)
        if argsz > _MAX_ARGSZ:
            raise _invalid(f"argsz {argsz} is more than {_MAX_ARGSZ}")
        if flags & ~spec.DMA_UNMAP_F_ALL:  # nobody can ask for a dirty bitmap
            raise _invalid(f"flags {flags:#x} are not known")
        if flags:
            if gpa or size:
                raise _invalid(f"everything, but also [{gpa:#x}, {gpa + size:#x})")
            released = self._told_memory.unmap_all()
        else:
            released = self._told_memory.unmap(gpa, size)
        self._counters.dma_unmaps += 1
        echo = message.payload[: spec.DMA_UNMAP.size]
        return after(released, lambda _: Result(echo))

    @property
    def _told_memory(self) -> GuestMemory:
        """Where DMA_MAP goes: what the device sees, unless it is attached to an IOAS."""
        return self._memory if self._ioas is None else self._ioas.table.legacy

    def _iommufd(self, commands: IoasCommands, message: Message) -> Result | Later[Any]:
        return after(commands.handle(message), lambda payload: Result(payload or b""))

    def _get_info(self, message: Message) -> Result:
        argsz, *_ = _unpack(message, spec.DEVICE_INFO)
        _check_argsz(argsz, spec.DEVICE_INFO.size)
        self._check_memory()
        flags = vfio.DEVICE_FLAGS_PCI | vfio.DEVICE_FLAGS_RESET
        counts = len(self._regions), len(self._irqs)
        return Result(spec.DEVICE_INFO.pack(spec.DEVICE_INFO.size, flags, *counts))

    def _check_memory(self) -> None:
        """Refuse a client whose RAM is out of reach: QEMU has mapped all of it by GET_INFO."""
        regions = self._memory.regions()
        why = why_out_of_reach(regions) if self._asked is None else None
        if why is None and regions and self._probe.verdict is Verdict.UNKNOWN:
            self._probe.verdict = look_at_peer(self._peer, regions)
            self._peer = 0  # one look a client: the answer may be long
        if self._probe.verdict is Verdict.PRIVATE:
            why = why_private()
        if why is not None:
            self._refuse(why)
            raise MemoryNotShared(why)

    def _get_region_info(self, message: Message) -> Result:
        argsz, _, index, *_ = _unpack(message, vfio.REGION_INFO)
        _check_argsz(argsz, vfio.REGION_INFO.size)
        info = self._region(index)
        payload, complete = encode_region_info(info, index, argsz)
        return Result(payload, () if info.fd is None or not complete else (info.fd,))

    def _get_region_io_fds(self, message: Message) -> Result:
        argsz, flags, index, count = _unpack(message, spec.REGION_IO_FDS)
        _check_argsz(argsz, spec.REGION_IO_FDS.size)
        if argsz > _MAX_ARGSZ or flags or count:
            raise _invalid(f"argsz {argsz}, flags {flags:#x}, count {count}")
        if not self._region(index).size:
            raise _invalid(f"region {index} isn't there")
        return Result(spec.REGION_IO_FDS.pack(spec.REGION_IO_FDS.size, 0, index, 0))

    def _get_irq_info(self, message: Message) -> Result:
        argsz, _, index, _ = _unpack(message, vfio.IRQ_INFO)
        _check_argsz(argsz, vfio.IRQ_INFO.size)
        if index >= len(self._irqs):
            raise _invalid(f"interrupt index {index} is not below {len(self._irqs)}")
        info = self._irqs[index]
        return Result(vfio.IRQ_INFO.pack(vfio.IRQ_INFO.size, info.flags, index, info.count))

    def _set_irqs(self, message: Message) -> Result:
        self._lines.set_irqs(message.payload, message.fds)
        return Result()

    def _region_read(self, message: Message) -> Result | Later[bytes]:
        offset, region, count = _unpack(message, spec.REGION_ACCESS)
        self._check_access(offset, region, count)
        head = message.payload[: spec.REGION_ACCESS.size]

        def finish(data: bytes) -> Result:
            if len(data) != count:
                raise InternalError(f"{len(data)} bytes were read instead of {count}")
            return Result(head + data)

        return after(self._device.region_read(region, offset, count) if count else b"", finish)

    def _region_write(self, message: Message) -> Result | Later[None]:
        offset, region, count = _unpack(message, spec.REGION_ACCESS)
        data = message.payload[spec.REGION_ACCESS.size :]
        if len(data) != count:
            raise _invalid(f"{len(data)} bytes of data where {count} were announced")
        self._check_access(offset, region, count)
        if region < vfio.PCI_NUM_BARS:
            self._probe.touched()
        head = message.payload[: spec.REGION_ACCESS.size]
        if not count:
            return Result(head)
        write = partial(self._device.region_write, region, offset, data)
        if self._asked is not None and not message.no_reply:
            # It may start DMA, for which the client is asked: it must not wait for us then.
            return Result(head, then=write)
        return after(write(), lambda _: Result(head))

    def _check_access(self, offset: int, region: int, count: int) -> None:
        size = self._region(region).size
        if not size or offset + count > size:
            raise _invalid(f"[{offset:#x}, {offset + count:#x}) of region {region}, size {size:#x}")
        if count > self._limits.max_data_transfer:
            raise _invalid(f"{count} bytes are more than {self._limits.max_data_transfer}")

    def _reset(self, _message: Message) -> Result | Later[None]:
        self._counters.resets += 1
        return after(self._device.reset(), lambda _: Result())

    def _region(self, index: int) -> RegionInfo:
        if index >= len(self._regions):
            raise _invalid(f"region {index} is not below {len(self._regions)}")
        return self._regions[index]

    def _take_reply(self, message: Message) -> Answer | None:
        """Take the reply to our DMA_READ, the only command that is ever sent."""
        assert self._reading is not None  # noqa: S101 - the caller looked
        ident, gpa, size = self._reading
        if message.id != ident or message.command != Command.DMA_READ:
            raise _invalid(f"a reply to message {message.id}, which was not sent")
        self._reading = None
        data = None
        head = spec.DMA_ACCESS.pack(gpa, size)
        if not message.flags & spec.F_ERROR and message.payload.startswith(head):
            data = message.payload[len(head) :]
        if self._probe.answer(data) is not Verdict.PRIVATE:
            return None
        self._refuse(why_private())
        return Answer(b"", hang_up=True)


def _unpack(message: Message, codec: struct.Struct) -> tuple[int, ...]:
    if len(message.payload) < codec.size:
        raise _invalid(f"{len(message.payload)} bytes of payload, {codec.size} are needed")
    return codec.unpack_from(message.payload)


def _check_argsz(argsz: int, least: int) -> None:
    if argsz < least:
        raise _invalid(f"argsz {argsz} is less than {least}")


def _invalid(why: str) -> PeerError:
    return PeerError(errno.EINVAL, why)
