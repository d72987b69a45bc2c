"""A host device's interrupts: the client's eventfds, signalled by the kernel itself.

Source: ``drivers/vfio/pci/vfio_pci_intrs.c``.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final, Protocol

from viommu.errors import BackendError
from viommu.spec import vfio
from viommu.vfio_user import IrqInfo

if TYPE_CHECKING:
    from collections.abc import Sequence

    from viommu.vfio_user import IrqLines
    from viommu_backends.vfio_device import HostIrq

__all__ = ["KernelIrqs"]

_log: Final = logging.getLogger(__name__)

_ASSIGN: Final = vfio.IRQ_SET_DATA_EVENTFD | vfio.IRQ_SET_ACTION_TRIGGER
_DISABLE: Final = vfio.IRQ_SET_DATA_NONE | vfio.IRQ_SET_ACTION_TRIGGER

# INTx needs somebody who masks and unmasks; the request to give the device back is ours.
_KERNEL_S: Final = (vfio.PCI_MSI_IRQ_INDEX, vfio.PCI_MSIX_IRQ_INDEX, vfio.PCI_ERR_IRQ_INDEX)


class _Device(Protocol):
    """What is used of a :class:`~viommu_backends.vfio_device.VfioDevice`."""

    name: str
    irqs: list[HostIrq]

    def set_irqs(
        self, flags: int, index: int, start: int, count: int, fds: Sequence[int] = ()
    ) -> None:
        """Tell the kernel whom to signal."""


class KernelIrqs:
    """Follows a client's :class:`~viommu.vfio_user.irqs.IrqLines`."""

    def __init__(self, device: _Device) -> None:
        self._device = device
        self._lines: IrqLines | None = None
        self._vectors: dict[int, int] = {}  # how many the kernel has of each kind

    def info(self, index: int) -> IrqInfo:
        """Describe one kind of interrupt to a client.

        Error and request are there even if the host has none: QEMU warns when they are not.
        """
        if index in (vfio.PCI_MSI_IRQ_INDEX, vfio.PCI_MSIX_IRQ_INDEX):
            count = self._host(index).count
        else:
            count = int(index in (vfio.PCI_ERR_IRQ_INDEX, vfio.PCI_REQ_IRQ_INDEX))
        return IrqInfo(count, vfio.IRQ_INFO_EVENTFD if count else 0)

    def follow(self, lines: IrqLines) -> None:
        """Give the kernel what this client gives."""
        self._lines = lines
        lines.on_change(self._changed)

    def leave(self) -> None:
        """Have nobody signalled any more, and follow nobody."""
        if self._lines is not None:
            self._lines.on_change(None)
            self._lines = None
        for index in list(self._vectors):
            self._disable(index)

    def _changed(self, index: int, start: int, fds: Sequence[int]) -> None:
        if index not in _KERNEL_S or not self._host(index).count:
            return
        if not fds:
            self._disable(index)
            return
        known = self._vectors.get(index, 0)
        end = start + len(fds)
        if known and end > known and self._host(index).flags & vfio.IRQ_INFO_NORESIZE:
            self._enlarge(index, start, fds)
        else:
            self._device.set_irqs(_ASSIGN, index, start, len(fds), fds)
        self._vectors[index] = max(known, end)

    def _enlarge(self, index: int, start: int, fds: Sequence[int]) -> None:
        """Switch off and on again, with more vectors: this kernel can't add one to those it has."""
        before = self._lines.fds(index) if self._lines is not None else []
        wanted = before + [-1] * (start + len(fds) - len(before))
        wanted[start : start + len(fds)] = fds
        self._disable(index)
        try:
            self._device.set_irqs(_ASSIGN, index, 0, len(wanted), wanted)
        except BackendError:
            if before:
                self._device.set_irqs(_ASSIGN, index, 0, len(before), before)
                self._vectors[index] = len(before)
            raise

    def _disable(self, index: int) -> None:
        if self._vectors.pop(index, 0):
            try:
                self._device.set_irqs(_DISABLE, index, 0, 0)
            except BackendError as error:
                _log.warning("interrupts can't be switched off: %s", error)

    def _host(self, index: int) -> HostIrq:
        return self._device.irqs[index]
