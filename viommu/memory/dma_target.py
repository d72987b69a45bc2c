"""Who must know where guest memory is: the contract between the region manager and a DMA target.

A DMA target is an IOMMU, or part of one, that maps guest physical addresses one
to one (an endpoint in bypass). It is told of every piece of memory as it comes
and goes, device memory (BARs) included, so that devices reach one another too.

Source: OpenVMM's ``DmaTarget``. Ranges are half-open ranges of guest physical addresses.
"""

from __future__ import annotations

import enum
import errno
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, Self, runtime_checkable

from viommu.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Callable

    from viommu.deferred import Deferred
    from viommu.memory.backing import FileBacking

__all__ = [
    "EVERYWHERE",
    "AddressRange",
    "DeferredTarget",
    "DmaNeeds",
    "DmaRegistration",
    "DmaTarget",
    "FileMissingError",
    "HostAddressMissingError",
    "MemoryKind",
    "require_file",
    "require_host_va",
]


class AddressRange(NamedTuple):
    """The half-open range ``[start, end)``."""

    start: int
    end: int

    @property
    def size(self) -> int:
        """Return the number of bytes."""
        return self.end - self.start

    def holds(self, other: AddressRange) -> bool:
        """Return whether all of ``other`` is inside."""
        return self.start <= other.start and other.end <= self.end

    def meets(self, other: AddressRange) -> bool:
        """Return whether some address is in both."""
        return self.start < other.end and other.start < self.end

    def __str__(self) -> str:
        return f"[{self.start:#x}, {self.end:#x})"


#: The whole space of guest physical addresses.
EVERYWHERE: Final = AddressRange(0, 1 << 64)


class MemoryKind(enum.Enum):
    """What is mapped, and so how bad it is when a target can't map it."""

    #: Memory of the guest: without it, a device would fail at random. Fatal.
    RAM = "ram"
    #: Registers or memory of a device. Few devices ever reach for one another,
    #: and not every IOMMU can map them (a BAR outside its aperture). Tolerated.
    DEVICE = "device"


class DmaNeeds(enum.Flag):
    """What a target can't do without."""

    NONE = 0
    #: A host virtual address (VFIO type1, which pins what is mapped there).
    HOST_VA = 1
    #: A file (an iommufd that maps files only, a device in another process).
    #: Private memory and such a target exclude one another.
    FILE = 2


class HostAddressMissingError(BackendError):
    """A DMA target that needs a host virtual address was given none."""

    def __init__(self, where: AddressRange) -> None:
        super().__init__(errno.EFAULT, f"{where} has no host virtual address")


class FileMissingError(BackendError):
    """A DMA target that needs a file meets memory that has none."""

    def __init__(self, what: str) -> None:
        super().__init__(errno.EOPNOTSUPP, f"{what}: private memory, where a file is needed")


def require_host_va(where: AddressRange, host_va: int | None) -> int:
    """Return ``host_va``; for targets, so that a missing one is an error and no crash.

    Raises:
        HostAddressMissingError: There is none.
    """
    if host_va is None:
        raise HostAddressMissingError(where)
    return host_va


def require_file(where: AddressRange, mappable: FileBacking | None) -> FileBacking:
    """Return ``mappable``; for targets that map files.

    Raises:
        FileMissingError: There is none.
    """
    if mappable is None:
        raise FileMissingError(str(where))
    return mappable


@runtime_checkable
class DmaTarget(Protocol):
    """An address space that follows guest memory, with IOVA equal to GPA.

    What the region manager promises: calls come one at a time. Ranges are
    multiples of the host's page size and below ``2**64``. Nothing is mapped over
    what is mapped. Memory is backed and ``host_va`` stays valid until the unmap
    of it has succeeded, however long that takes.

    What a target promises: it does not call the region manager. A call that
    raises has changed nothing, except an unmap of more than one mapping, which
    may have removed some of them. What a target can't map it says with an
    exception, for device memory too: to tolerate it is the caller's.
    """

    def map_dma(
        self,
        where: AddressRange,
        /,
        *,
        host_va: int | None,
        mappable: FileBacking | None,
        file_offset: int,
        writable: bool,
        kind: MemoryKind,
    ) -> None:
        """Map ``where`` to the memory that is at ``host_va``, and in ``mappable``.

        Args:
            where: Guest physical addresses, which are the IOVAs as well.
            host_va: Where the memory is in this process. ``None`` unless this target
                was registered as in need of it, and where it could not be had.
            mappable: The file that holds the memory; ``None`` if it is private.
                A target that keeps the file retains it, or duplicates its descriptor.
            file_offset: Where in that file ``where`` starts, in bytes.
            writable: Whether devices may write; they may always read.
            kind: Memory of the guest, or of a device.

        Raises:
            BackendError: The host refused, or what this target needs is missing;
                nothing was mapped.
        """

    def unmap_dma(self, where: AddressRange, /) -> None:
        """Remove every mapping inside ``where``.

        The range covers whole mappings: it never splits one. It may cover many,
        and it may contain gaps, also nothing but a gap; that is not an error.
        On return no device reaches the memory any more.

        Raises:
            BackendError: The host refused. Asked for exactly one mapping, this
                says that it is still there as a whole.
        """


@runtime_checkable
class DeferredTarget(DmaTarget, Protocol):
    """A target whose host answers later: a device in another process, say.

    What it is told it passes on, and devices may reach what it was told to unmap until
    the host has answered. So it can't do with host virtual addresses, which may be those
    of something else by then. A host that does not let go must be cut off by the target.
    """

    def settled(self) -> Deferred[None] | None:
        """Return what is done when the host has answered everything; ``None``: it has."""


class DmaRegistration:
    """A target's subscription; a context manager that releases it.

    As long as it is held the target is told of every change.
    """

    def __init__(self, name: str, release: Callable[[], None]) -> None:
        self.name = name
        self._release = release

    def release(self) -> None:
        """Unmap everything from the target and tell it nothing more.

        To release again is harmless, and tries again what the target refused.

        Raises:
            BackendError: The target can't unmap some of it. It gets no updates,
                but that memory stays where it is until a later call succeeds.
        """
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()
