"""The commands of a vfio-user client, without I/O: what to send, and what the reply means.

Source: QEMU, ``docs/interop/vfio-user.rst``, and libvfio-user where that goes
further. A reply is taken as far as QEMU takes it: what nobody looks at may be left
out, or be as long as the request. What is looked at has exactly the size that was
asked for; everything else is nonsense and ends the connection. A number that no
message can hold is a UsageError.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from viommu.errors import PeerError, UsageError
from viommu.spec import vfio
from viommu.spec import vfio_user as spec
from viommu.spec.vfio_user import Command
from viommu.vfio_user.protocol import Capabilities, decode_version, encode_version
from viommu.vfio_user.region_info import decode_region_info
from viommu.vfio_user.request import Request, at_most, exactly, nonsense, order, pack
from viommu.vfio_user.served import IrqInfo, RegionInfo

if TYPE_CHECKING:
    from collections.abc import Sequence

    from viommu.vfio_user.protocol import Message

__all__ = [
    "MAX_REPLY_FDS",
    "Agreement",
    "DeviceInfo",
    "FeatureReply",
    "IoFd",
    "IoFdsReply",
    "RegionReply",
    "RegionWrite",
    "Request",
    "device_feature",
    "device_info",
    "dma_map",
    "dma_unmap",
    "dma_unmap_all",
    "irq_info",
    "mig_data_read",
    "mig_data_write",
    "region_info",
    "region_io_fds",
    "region_read",
    "region_write",
    "region_write_multi",
    "reset",
    "set_irqs",
    "version",
]

MAX_REPLY_FDS: Final = 16  # what a client announces, and as many as one message can bring


class Agreement(NamedTuple):
    """What was agreed upon; a socket on which the device asks is the receiver's."""

    minor: int
    capabilities: Capabilities
    twin: int | None = None


class DeviceInfo(NamedTuple):
    """``VFIO_DEVICE_FLAGS_*``, and how many regions and kinds of interrupt there are."""

    flags: int
    num_regions: int
    num_irqs: int


class RegionReply(NamedTuple):
    """What a region is; when ``argsz`` is more than was accepted, areas and file are missing.

    A file descriptor in ``info`` is the receiver's to close.
    """

    argsz: int
    info: RegionInfo


class IoFd(NamedTuple):
    """A part of a region, of which a file descriptor tells, or that it serves.

    ``kind`` is an :class:`~viommu.spec.vfio_user.IoFdType`; ``fd`` and ``shadow_fd``
    are indices into the file descriptors of the reply. ``data`` is what a write must
    match (ioeventfd), or what its user is told (ioregionfd).
    """

    offset: int
    size: int
    kind: int
    flags: int
    data: int
    fd: int | None = None
    shadow_fd: int | None = None
    shadow_offset: int = 0


class IoFdsReply(NamedTuple):
    """The parts of a region with a file descriptor of their own; ``fds`` are the receiver's.

    When ``argsz`` is more than was accepted, parts and file descriptors are missing.
    """

    argsz: int
    parts: tuple[IoFd, ...]
    fds: tuple[int, ...]


class RegionWrite(NamedTuple):
    """One of several writes in a message, of at most 8 bytes."""

    region: int
    offset: int
    data: bytes


class FeatureReply(NamedTuple):
    """What DEVICE_FEATURE answered: the size it needs, the flags of the request, the data."""

    argsz: int
    flags: int
    data: bytes


def version(minor: int, ours: Capabilities) -> Request[Agreement]:
    """Propose a version, and say what we can take; the answer is what is spoken."""

    def decode(message: Message) -> Agreement:
        try:
            chosen, theirs = decode_version(message.payload)
        except PeerError as error:
            raise nonsense(f"the server's answer: {error}") from error
        if chosen > minor:
            raise nonsense(f"version {spec.VERSION_MAJOR}.{chosen} was not offered")
        agreed = theirs.within(ours)
        if not agreed.twin_socket:
            return Agreement(chosen, agreed)
        if agreed.twin_fd_index >= len(message.fds):
            raise nonsense(f"file descriptor {agreed.twin_fd_index} of {len(message.fds)}")
        return Agreement(chosen, agreed, message.fds.pop(agreed.twin_fd_index))

    payload = encode_version(minor, ours)
    return Request(Command.VERSION, payload, decode, max_fds=1 if ours.twin_socket else 0)


def dma_map(
    gpa: int,
    size: int,
    *,
    fd: int | None = None,
    offset: int = 0,
    readable: bool = True,
    writable: bool = True,
) -> Request[None]:
    """Give the device memory: ``[gpa, gpa + size)`` is the file ``fd`` from ``offset`` on.

    Without ``fd`` the device knows of the memory, but can't map it.
    """
    flags = (spec.DMA_MAP_F_READ if readable else 0) | (spec.DMA_MAP_F_WRITE if writable else 0)
    payload = pack(spec.DMA_MAP, spec.DMA_MAP.size, flags, offset, gpa, size)
    return order(Command.DMA_MAP, payload, () if fd is None else (fd,))


def dma_unmap(gpa: int, size: int) -> Request[None]:
    """Take back what one :func:`dma_map` gave."""
    return order(Command.DMA_UNMAP, pack(spec.DMA_UNMAP, spec.DMA_UNMAP.size, 0, gpa, size))


def dma_unmap_all() -> Request[None]:
    """Take back all memory."""
    flags = spec.DMA_UNMAP_F_ALL
    return order(Command.DMA_UNMAP, pack(spec.DMA_UNMAP, spec.DMA_UNMAP.size, flags, 0, 0))


def device_info() -> Request[DeviceInfo]:
    """Ask what kind of device it is."""

    def decode(message: Message) -> DeviceInfo:
        _, flags, regions, irqs = spec.DEVICE_INFO.unpack(exactly(message, spec.DEVICE_INFO.size))
        return DeviceInfo(flags, regions, irqs)

    payload = pack(spec.DEVICE_INFO, spec.DEVICE_INFO.size, 0, 0, 0)
    return Request(Command.DEVICE_GET_INFO, payload, decode)


def region_info(index: int, argsz: int = vfio.REGION_INFO.size) -> Request[RegionReply]:
    """Ask about a region, of whose description ``argsz`` bytes are accepted."""

    def decode(message: Message) -> RegionReply:
        needed, info = decode_region_info(at_most(message, argsz), index)
        fd = message.fds.pop() if message.fds and needed <= argsz else None
        return RegionReply(needed, info._replace(fd=fd))

    payload = pack(vfio.REGION_INFO, argsz, 0, index, 0, 0, 0)
    return Request(Command.DEVICE_GET_REGION_INFO, payload, decode, max_fds=1)


def region_io_fds(index: int, argsz: int = spec.REGION_IO_FDS.size) -> Request[IoFdsReply]:
    """Ask which parts of a region have a file descriptor; ``argsz`` bytes are accepted.

    Both layouts of the answer are understood, that of the specification and
    libvfio-user's, which is longer.
    """

    def decode(message: Message) -> IoFdsReply:
        payload = at_most(message, argsz)
        if len(payload) < spec.REGION_IO_FDS.size:
            raise nonsense(f"{len(payload)} bytes on a region's file descriptors")
        needed, _, number, count = spec.REGION_IO_FDS.unpack_from(payload)
        if number != index:
            raise nonsense(f"file descriptors of region {number} instead of {index}")
        parts = _io_fds(payload[spec.REGION_IO_FDS.size :], count, len(message.fds))
        # There are none, or they don't fit: who asks again drops what came with this answer.
        if not parts or needed > argsz:
            return IoFdsReply(needed, (), ())
        fds = tuple(message.fds)
        message.fds.clear()
        return IoFdsReply(needed, parts, fds)

    payload = pack(spec.REGION_IO_FDS, argsz, 0, index, 0)
    return Request(Command.DEVICE_GET_REGION_IO_FDS, payload, decode, max_fds=MAX_REPLY_FDS)


def irq_info(index: int) -> Request[IrqInfo]:
    """Ask about a kind of interrupt."""

    def decode(message: Message) -> IrqInfo:
        _, flags, _, count = vfio.IRQ_INFO.unpack(exactly(message, vfio.IRQ_INFO.size))
        return IrqInfo(count, flags)

    payload = pack(vfio.IRQ_INFO, vfio.IRQ_INFO.size, 0, index, 0)
    return Request(Command.DEVICE_GET_IRQ_INFO, payload, decode)


def set_irqs(
    index: int,
    flags: int,
    start: int,
    count: int,
    *,
    bools: bytes = b"",
    fds: Sequence[int] = (),
) -> Request[None]:
    """Set interrupts up, or trigger them; ``flags`` are ``VFIO_IRQ_SET_*``."""
    argsz = vfio.IRQ_SET.size + len(bools)
    payload = pack(vfio.IRQ_SET, argsz, flags, index, start, count) + bools
    return order(Command.DEVICE_SET_IRQS, payload, tuple(fds))


def region_read(region: int, offset: int, count: int) -> Request[bytes]:
    """Read ``count`` bytes."""
    size = spec.REGION_ACCESS.size

    def decode(message: Message) -> bytes:
        payload = exactly(message, size + count)
        if spec.REGION_ACCESS.unpack_from(payload)[2] != count:
            raise nonsense(f"{payload[:size].hex(' ')} with {count} bytes of data")
        return payload[size:]

    head = pack(spec.REGION_ACCESS, offset, region, count)
    return Request(Command.REGION_READ, head, decode, transfer=count)


def region_write(region: int, offset: int, data: bytes) -> Request[None]:
    """Write ``data``."""
    payload = pack(spec.REGION_ACCESS, offset, region, len(data)) + data
    return order(Command.REGION_WRITE, payload, transfer=len(data))


def region_write_multi(writes: Sequence[RegionWrite]) -> Request[None]:
    """Do several small writes, in their order.

    Raises:
        UsageError: One has more than 8 bytes.
    """
    parts = [pack(spec.MULTI_WRITES, len(writes))]
    for region, offset, data in writes:
        if len(data) > spec.MULTI_WRITE_DATA:
            raise UsageError(f"{len(data)} bytes in one of several writes")
        parts.append(pack(spec.MULTI_WRITE, offset, region, len(data), data))
    payload = b"".join(parts)

    def decode(message: Message) -> None:
        (done,) = spec.MULTI_WRITES.unpack(exactly(message, spec.MULTI_WRITES.size))
        if done != len(writes):
            raise nonsense(f"{done} writes were done instead of {len(writes)}")

    return Request(
        Command.REGION_WRITE_MULTI,
        payload,
        decode,
        transfer=len(payload),
        needs="write_multiple",
    )


def reset() -> Request[None]:
    """Reset the device."""
    return order(Command.DEVICE_RESET, b"")


def device_feature(
    flags: int, data: bytes = b"", argsz: int | None = None
) -> Request[FeatureReply]:
    """Get, set or probe a feature; ``flags`` are ``VFIO_DEVICE_FEATURE_*`` and its number.

    ``argsz`` bytes are accepted as the answer, by default as many as are sent.
    """
    size = spec.DEVICE_FEATURE.size
    accepted = size + len(data) if argsz is None else argsz

    def decode(message: Message) -> FeatureReply:
        payload = at_most(message, accepted)
        if len(payload) < size:
            raise nonsense(f"{len(payload)} bytes on a feature")
        needed, theirs = spec.DEVICE_FEATURE.unpack_from(payload)
        if theirs != flags:
            raise nonsense(f"flags {theirs:#x} instead of {flags:#x}")
        return FeatureReply(needed, theirs, payload[size:])

    payload = pack(spec.DEVICE_FEATURE, accepted, flags) + data
    transfer = max(accepted - size, len(data))
    return Request(Command.DEVICE_FEATURE, payload, decode, transfer=transfer)


def mig_data_read(size: int) -> Request[bytes]:
    """Read at most ``size`` bytes of the state of a device that is being saved."""
    head = spec.MIG_DATA.size

    def decode(message: Message) -> bytes:
        payload = at_most(message, head + size)
        if len(payload) < head:
            raise nonsense(f"{len(payload)} bytes with migration data")
        # libvfio-user sends as much as was asked for, whatever there is.
        there = spec.MIG_DATA.unpack_from(payload)[1]
        if there > len(payload) - head:
            raise nonsense(f"{there} bytes of migration data in {len(payload)}")
        return payload[head : head + there]

    payload = pack(spec.MIG_DATA, head + size, size)
    return Request(Command.MIG_DATA_READ, payload, decode, transfer=size)


def mig_data_write(data: bytes) -> Request[None]:
    """Write a piece of the state of a device that is being restored."""
    payload = pack(spec.MIG_DATA, spec.MIG_DATA.size + len(data), len(data)) + data
    return order(Command.MIG_DATA_WRITE, payload, transfer=len(data))


def _io_fds(data: bytes, count: int, fds: int) -> tuple[IoFd, ...]:
    """Decode the parts of a region; ``fds`` file descriptors came with them."""

    def known(index: int) -> int | None:
        if index == spec.IO_FD_NONE:
            return None
        if index >= fds:
            raise nonsense(f"file descriptor {index} of {fds}")
        return index

    parts = []
    if data and len(data) == count * spec.SUB_REGION.size:
        for offset, size, fd, kind, flags, _, last in spec.SUB_REGION.iter_unpack(data):
            parts.append(IoFd(offset, size, kind, flags, last, known(fd)))
    elif data and len(data) == count * spec.SHADOW_SUB_REGION.size:
        for row in spec.SHADOW_SUB_REGION.iter_unpack(data):
            offset, size, fd, kind, flags, shadow, middle, last = row
            if kind == spec.IoFdType.IOEVENTFD_SHADOW:
                part = IoFd(offset, size, kind, flags, last, known(fd), known(shadow), middle)
            else:
                # An ioregionfd has its data where the specification has it.
                last = middle if kind == spec.IoFdType.IOREGIONFD else last
                part = IoFd(offset, size, kind, flags, last, known(fd))
            parts.append(part)
    elif data:
        raise nonsense(f"{count} parts of a region in {len(data)} bytes")
    return tuple(parts)
