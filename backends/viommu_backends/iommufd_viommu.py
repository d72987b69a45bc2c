"""The kernel's vIOMMUs: parts of a host IOMMU that a guest drives itself.

An IOMMU that can nest page tables may give a guest a part of its own. The objects
for it, in the order in which they are made, and each busy while there is one
that was made of it:

    page table (nest parent) ─▶ vIOMMU ─┬▶ device, by the number that the guest knows it by
                                        ├▶ page table of the guest
                                        ├▶ queue that the hardware reads from guest memory
                                        └▶ events, as the hardware would report them to a guest

Source: ``<linux/iommufd.h>``, ``drivers/iommu/iommufd/{viommu,eventq}.c`` (Linux 6.13 and
later); an older kernel answers ENOTTY.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final, NamedTuple

from viommu.errors import BackendError
from viommu.spec import iommufd as spec
from viommu.spec.iommufd import Ioctl
from viommu_backends.iommufd_context import address_of
from viommu_backends.kernel import ask

if TYPE_CHECKING:
    from viommu_backends.iommufd_context import Iommufd

__all__ = ["Vevent", "VeventQueue", "Viommu"]

_EVENTS_AT_ONCE: Final = 64


class Viommu:
    """A vIOMMU of ``context``; ``number`` is its id there.

    Args:
        context: The context that everything is in.
        kind: The driver, a :class:`~viommu.spec.iommufd.ViommuType`.
        device: The id of a device; its IOMMU is the one that a part is taken of.
        parent: The id of a page table that is a nest parent: guest memory by GPA.
        data: The driver's own structure, if it has one: what it answers is written into it.

    Raises:
        BackendError: ENOENT, no such device or page table; EINVAL, the page table is
            no nest parent, or the driver doesn't take ``data``; EOPNOTSUPP, the
            device's IOMMU isn't one of that kind.
    """

    def __init__(
        self, context: Iommufd, kind: int, device: int, parent: int, data: bytearray | None = None
    ) -> None:
        data = bytearray() if data is None else data
        argument = bytearray(
            spec.VIOMMU_ALLOC.pack(
                spec.VIOMMU_ALLOC.size, 0, kind, device, parent, 0,
                len(data), 0, address_of(data),
            )
        )  # fmt: skip
        what = f"allocating a vIOMMU of kind {kind:#x} for device {device}"
        ask(context.fileno(), Ioctl.VIOMMU_ALLOC, argument, what)
        self.number: int = spec.VIOMMU_ALLOC.unpack(argument)[5]
        self._context = context

    def alloc_device(self, device: int, virtual_id: int) -> int:
        """Say by which number the guest knows a device; return the id of what says so.

        Destroy it before the device: an id whose device has gone first is lost
        until the context is closed.

        Raises:
            BackendError: ENOENT, no such device; EEXIST, the device or the number is
                in use; EINVAL, the device is behind another IOMMU.
        """
        argument = bytearray(
            spec.VDEVICE_ALLOC.pack(
                spec.VDEVICE_ALLOC.size, self.number, device, 0, virtual_id
            )
        )  # fmt: skip
        what = f"device {device} as {virtual_id:#x} of vIOMMU {self.number}"
        ask(self._context.fileno(), Ioctl.VDEVICE_ALLOC, argument, what)
        number: int = spec.VDEVICE_ALLOC.unpack(argument)[3]
        return number

    def alloc_queue(self, kind: int, index: int, iova: int, size: int) -> int:
        """Have the hardware read its queue ``index`` at ``iova``; return the queue's id.

        ``iova`` is one of the nest parent's, a GPA. Its pages are pinned, and can't be
        unmapped (EBUSY), until the queue is destroyed. Queues come in the order of
        their index and go in the opposite one.

        Raises:
            BackendError: ENOENT, some of it isn't mapped; EFAULT, it isn't contiguous in
                the host's memory; EINVAL, no bytes or no such index; EEXIST, the
                index is in use; EIO, the one before isn't; EOVERFLOW, it passes the
                end of the address space; ERANGE or ENOMEM, it is too large; EOPNOTSUPP, this
                vIOMMU has no such queues.
        """
        argument = bytearray(
            spec.HW_QUEUE_ALLOC.pack(
                spec.HW_QUEUE_ALLOC.size, 0, self.number, kind, index, 0, iova, size
            )
        )  # fmt: skip
        what = f"queue {index} of vIOMMU {self.number} at [{iova:#x}, {iova + size:#x})"
        ask(self._context.fileno(), Ioctl.HW_QUEUE_ALLOC, argument, what)
        number: int = spec.HW_QUEUE_ALLOC.unpack(argument)[5]
        return number

    def alloc_events(self, kind: int, depth: int, size: int) -> VeventQueue:
        """Return a queue for events of one ``kind``; it holds ``depth`` that weren't read.

        Args:
            kind: What is reported, a :class:`~viommu.spec.iommufd.VeventqType`.
            depth: How many events are kept; those that come then are lost, and counted.
            size: How large an event of that kind is, without its header.

        Raises:
            BackendError: EEXIST, there is a queue for that kind; EINVAL, ``depth``
                is 0 or more than 2**19; EOPNOTSUPP, ``kind`` is 0.
        """
        argument = bytearray(
            spec.VEVENTQ_ALLOC.pack(
                spec.VEVENTQ_ALLOC.size, 0, self.number, kind, depth, 0, 0, 0
            )
        )  # fmt: skip
        what = f"events of kind {kind:#x} and vIOMMU {self.number}, {depth} deep"
        ask(self._context.fileno(), Ioctl.VEVENTQ_ALLOC, argument, what)
        *_, number, fd, _ = spec.VEVENTQ_ALLOC.unpack(argument)
        return VeventQueue(self._context, number, fd, size)

    def destroy(self) -> None:
        """Destroy it.

        Raises:
            BackendError: EBUSY, there is something that was made of it, or its memory
                is mapped; ENOENT, it is destroyed already.
        """
        self._context.destroy(self.number)


class Vevent(NamedTuple):
    """An event, and how many the queue has lost since the one before.

    ``data`` is ``None`` when nothing came after those that were lost: then the kernel tells
    only that there were some.
    """

    sequence: int
    lost: int
    data: bytes | None


class VeventQueue:
    """Events of one vIOMMU, made by :meth:`Viommu.alloc_events`; readable when there are some."""

    def __init__(self, context: Iommufd, number: int, fd: int, size: int) -> None:
        self.number = number
        self._context = context
        self._fd = fd
        self._size = size
        self._next = 0  # the sequence number that follows what was read

    def fileno(self) -> int:
        """Return the fd, -1 once closed."""
        return self._fd

    def read(self) -> list[Vevent]:
        """Return events, oldest first; none if there are none: this never waits.

        It may leave some; the fd stays readable then.

        Raises:
            BackendError: EPROTO, events have another size than the queue was told;
                EBADF, it is closed.
        """
        what = f"reading events of queue {self.number}"
        if self._fd < 0:
            raise BackendError(errno.EBADF, what)
        try:
            raw = os.read(self._fd, _EVENTS_AT_ONCE * (spec.VEVENT_HEADER.size + self._size))
        except OSError as error:
            raise BackendError(error.errno or 0, what) from error
        return self._parse(memoryview(raw))

    def close(self) -> None:
        """Close the queue and destroy it; closing twice is harmless."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        os.close(fd)
        if self._context.fileno() >= 0:  # else it has gone with the context
            self._context.destroy(self.number)

    def _parse(self, raw: memoryview) -> list[Vevent]:
        events = []
        while raw:
            if len(raw) < spec.VEVENT_HEADER.size:
                raise BackendError(errno.EPROTO, f"{len(raw)} bytes are no header of an event")
            flags, sequence = spec.VEVENT_HEADER.unpack_from(raw)
            raw = raw[spec.VEVENT_HEADER.size :]
            lost = (sequence - self._next) % spec.VEVENT_SEQUENCES
            data = None
            if flags & spec.VEVENTQ_FLAG_LOST_EVENTS:
                lost += 1  # this one itself
            elif len(raw) < self._size:
                raise BackendError(errno.EPROTO, f"{len(raw)} bytes are no event of {self._size}")
            else:
                data, raw = bytes(raw[: self._size]), raw[self._size :]
            self._next = (sequence + 1) % spec.VEVENT_SEQUENCES
            events.append(Vevent(sequence, lost, data))
        return events
