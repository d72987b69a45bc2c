"""Exceptions, by whose fault it is.

* :exc:`ViommuError`
    * :exc:`GuestError` - the guest asked for what it may not have; carries the reply's status
    * :exc:`TranslationFault` - an endpoint touched what is not mapped
    * :exc:`RingError` - the guest broke a virtqueue; the device needs a reset
    * :exc:`GuestMemoryError` - a guest physical address that is not memory, or not writable
        * :exc:`NotMappable` - memory that can be read and written, but there are no views of it
    * :exc:`PeerError` - a vfio-user peer (VMM or device) broke the protocol; carries an errno
        * :exc:`MemoryNotShared` - the VMM's guest memory can't be shared with us
    * :exc:`ExportError` - a client misused its export session
        * :exc:`SessionFaulted` - exported memory was unmapped; release, then start a new session
    * :exc:`BackendError` - the host refused; carries its errno
    * :exc:`UsageError` - the caller of this library made a mistake (also a :exc:`ValueError`)
    * :exc:`InternalError` - our own invariants are broken; file a bug

:func:`status_of` is the one place where an exception becomes ``VIRTIO_IOMMU_S_*``.
Every message shows the offending value.
"""

from __future__ import annotations

import enum
import errno
import os

from viommu.spec import virtio_iommu as spec

__all__ = [
    "Access",
    "BackendError",
    "ExportError",
    "GuestError",
    "GuestMemoryError",
    "InternalError",
    "MemoryNotShared",
    "NotMappable",
    "PeerError",
    "RingError",
    "SessionFaulted",
    "TranslationFault",
    "UsageError",
    "ViommuError",
    "status_of",
]


class Access(enum.Flag):
    """What a DMA wants to do with memory, and what a mapping lets it do."""

    NONE = 0
    READ = 1
    WRITE = 2

    @property
    def letters(self) -> str:
        """The same as ``rw``, ``r-``, ``-w`` or ``--``."""
        return ("r" if Access.READ in self else "-") + ("w" if Access.WRITE in self else "-")


class ViommuError(Exception):
    """The parent of every exception of this package."""


class GuestError(ViommuError):
    """A virtio-iommu request that is refused with a status other than OK.

    Nothing has changed when it is raised.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class TranslationFault(ViommuError):
    """An endpoint touched an IOVA that is not mapped, or not with that protection.

    ``iova`` is the first faulting address, ``access`` what was attempted and
    ``reason`` one of ``VIRTIO_IOMMU_FAULT_R_*``.
    """

    def __init__(self, iova: int, access: Access, reason: int = spec.FaultReason.MAPPING) -> None:
        super().__init__(iova, access, reason)
        self.iova = iova
        self.access = access
        self.reason = reason

    def __str__(self) -> str:
        """Say which access, where and why."""
        reason = spec.FaultReason(self.reason).name.lower()
        kind = "+".join(a.name.lower() for a in Access if a in self.access and a.name) or "access"
        return f"{kind} at IOVA {self.iova:#x} faulted: {reason}"


class RingError(ViommuError):
    """The driver made a virtqueue unusable: the device must set DEVICE_NEEDS_RESET."""


class GuestMemoryError(ViommuError):
    """A guest physical range that is not (all) memory, or is read-only and was to be written."""

    def __init__(self, gpa: int, size: int, why: str) -> None:
        super().__init__(f"guest memory [{gpa:#x}, {gpa + size:#x}): {why}")
        self.gpa = gpa
        self.size = size


class NotMappable(GuestMemoryError):
    """Guest memory that is read and written by messages: it can be copied, but not viewed."""


class PeerError(ViommuError):
    """A vfio-user peer broke the protocol or asked for what it can't have.

    ``errno`` is what an error reply carries (``VFIO_USER`` header, ``error`` field).
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.errno = number


class MemoryNotShared(PeerError):
    """Guest memory comes without a file, or with a private copy of one."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.EINVAL, message)


class ExportError(ViommuError):
    """A client released what it doesn't hold, or exported outside a session."""


class SessionFaulted(ExportError):
    """An IOMMU fault ended this export session; release everything, then start another."""


class BackendError(ViommuError):
    """The host refused an operation; ``errno`` is the kernel's."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(f"{message}: {os.strerror(number)}")
        self.errno = number


class UsageError(ViommuError, ValueError):
    """The caller of this library passed something that can't work."""


class InternalError(ViommuError):
    """This should never happen: please file a bug. Invariants may be void."""


def status_of(error: ViommuError) -> int:
    """Return the ``VIRTIO_IOMMU_S_*`` that reports ``error`` to the guest.

    Source: virtio 1.2, 5.13.6 "Device operations" (status codes).
    """
    match error:
        case GuestError():
            return error.status
        case BackendError(errno=errno.ENOMEM | errno.ENOSPC | errno.EDQUOT):
            return spec.Status.NOMEM
        case BackendError(errno=errno.EFAULT):
            return spec.Status.FAULT
        case BackendError():
            return spec.Status.DEVERR
        case GuestMemoryError() | TranslationFault():
            return spec.Status.FAULT
        case _:
            return spec.Status.DEVERR
