"""One PCI function: configuration space, BARs, interrupts, power, resets.

It implements :class:`~viommu.vfio_user.served.ServedDevice`. What kills or
confuses a VMM is avoided here: every access has an answer, unused regions have
size 0, and the interrupt pin is 0.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from viommu.errors import UsageError
from viommu.pci.capabilities import express_endpoint, power_management
from viommu.pci.config_space import ConfigSpace
from viommu.pci.msi import Msi, Msix, MsixBar
from viommu.spec import pci as spec
from viommu.spec import vfio
from viommu.vfio_user.served import IrqInfo, RegionInfo

if TYPE_CHECKING:
    from viommu.memory import GuestMemory
    from viommu.pci.config_space import Identity

__all__ = ["BarHandler", "InterruptLines", "PciFunction", "ResetKind"]

_READ_WRITE: Final = vfio.REGION_INFO_FLAG_READ | vfio.REGION_INFO_FLAG_WRITE
_MIN_BAR: Final = 16


class ResetKind(enum.Enum):
    """Who resets a function, from the smallest to the largest reset.

    ``DRIVER`` is a register of the device itself; configuration space stays as
    it is. ``FLR`` is a function level reset. ``SYSTEM`` comes from the VMM when
    the machine is reset. ``DISCONNECT`` means that the VMM is gone: what follows
    is a machine that was just switched on, or nothing.
    """

    DRIVER = "driver"
    FLR = "flr"
    SYSTEM = "system"
    DISCONNECT = "disconnect"


class BarHandler(Protocol):
    """What is behind a BAR. Accesses have any width and alignment, and lie inside."""

    def read(self, offset: int, count: int, /) -> bytes:
        """Return exactly ``count`` bytes; never raises for anything a guest does."""

    def write(self, offset: int, data: bytes, /) -> None:
        """Store ``data``; never raises for anything a guest does."""


class InterruptLines(Protocol):
    """The eventfds of a client; :class:`~viommu.vfio_user.irqs.IrqLines` is one."""

    def trigger(self, index: int, vector: int, /) -> bool:
        """Raise an interrupt; return whether anybody was told."""


class _Bar(NamedTuple):
    size: int
    handler: BarHandler


class PciFunction:
    """A PCI Express function with power management and function level reset.

    A subclass adds BARs and interrupts in its constructor and overrides the
    ``on_`` methods. To notice a write to one of its own capabilities it uses
    ``config.after_write``.

    Args:
        name: What messages call the function.
        memory: Guest memory, which the server fills.
        identity: Vendor, device, class.
    """

    num_regions: Final = vfio.PCI_NUM_REGIONS
    num_irqs: Final = vfio.PCI_NUM_IRQS

    def __init__(self, name: str, memory: GuestMemory, identity: Identity) -> None:
        self.name = name
        self.memory = memory
        self.config = ConfigSpace(identity)
        self._bars: list[_Bar | None] = [None] * spec.NUM_BARS
        self._bars_taken: set[int] = set()  # with the upper halves of 64-bit BARs
        self._msi: Msi | None = None
        self._msix: Msix | None = None
        self._irqs: InterruptLines | None = None
        self._bus_master = False
        self._power_state = spec.PM_STATE_D0
        self._pm = self.config.add_capability(power_management())
        self._express = self.config.add_capability(express_endpoint())
        self.config.after_write(spec.COMMAND, 2, self._update_bus_master)
        self.config.after_write(self._pm + spec.PM_CTRL, 2, self._power_changed)
        self.config.after_write(self._express + spec.EXP_DEVCTL, 2, self._control_changed)

    # What subclasses override.

    def on_bus_master(self, *, enabled: bool) -> None:
        """DMA and interrupts were allowed or forbidden (COMMAND, or the power state)."""

    def on_reset(self, kind: ResetKind) -> None:
        """Forget everything; configuration space is already reset and DMA forbidden."""

    def close(self) -> None:
        """Give back what outlives every reset, such as files; the function is used no more."""

    # What subclasses call.

    @property
    def bus_master(self) -> bool:
        """Whether the function may do DMA and raise interrupts."""
        return self._bus_master

    def add_bar(
        self,
        index: int,
        size: int,
        handler: BarHandler,
        *,
        prefetchable: bool = False,
        bits64: bool = False,
    ) -> None:
        """Add a memory BAR; one with 64 bits takes the next index as well.

        Raises:
            UsageError: The index is taken, or the size is no power of two above 15.
        """
        if size < _MIN_BAR or size & (size - 1) or (size >> 32 and not bits64):
            raise UsageError(f"BAR {index} can't have {size:#x} bytes")
        indices = (index, index + 1) if bits64 else (index,)
        if indices[-1] >= spec.NUM_BARS or not self._bars_taken.isdisjoint(indices):
            raise UsageError(f"BAR {index} is taken or does not exist")
        flags = (spec.BAR_PREFETCH if prefetchable else 0) | (spec.BAR_MEM_64 if bits64 else 0)
        mask = -size & (1 << 32 * len(indices)) - 1
        offset = spec.BASE_ADDRESS_0 + 4 * index
        width = 4 * len(indices)
        self.config.define(
            offset, flags.to_bytes(width, "little"), writable=mask.to_bytes(width, "little")
        )
        self._bars[index] = _Bar(size, handler)
        self._bars_taken.update(indices)

    def add_msi(self, vectors: int) -> None:
        """Add MSI; see :class:`~viommu.pci.msi.Msi`."""
        self._msi = Msi(self.config, vectors)

    def add_msix(self, vectors: int, bar: int) -> None:
        """Add MSI-X with its table in a BAR of its own; see :class:`~viommu.pci.msi.Msix`."""
        self._msix = Msix(self.config, vectors, bar)
        self.add_bar(bar, self._msix.bar_size, MsixBar())

    @property
    def msix_enabled(self) -> bool:
        """Whether the driver has switched MSI-X on."""
        return self._msix is not None and self._msix.enabled

    def raise_msi(self, vector: int) -> None:
        """Raise an MSI vector, if it is on; a message is a write, so it needs the bus."""
        if self._msi and self._irqs and self._bus_master and self._msi.allows(vector):
            self._irqs.trigger(vfio.PCI_MSI_IRQ_INDEX, vector)

    def raise_msix(self, vector: int) -> None:
        """Raise an MSI-X vector, if it is on; a message is a write, so it needs the bus."""
        if self._msix and self._irqs and self._bus_master and self._msix.allows(vector):
            self._irqs.trigger(vfio.PCI_MSIX_IRQ_INDEX, vector)

    def bar_size(self, index: int) -> int:
        """Return the size of a BAR in bytes; 0 when there is none of that index."""
        bar = self._bars[index] if 0 <= index < spec.NUM_BARS else None
        return 0 if bar is None else bar.size

    # ServedDevice.

    def region_info(self, index: int) -> RegionInfo:
        """Describe a BAR or configuration space; the rest is not there."""
        if index == vfio.PCI_CONFIG_REGION_INDEX:
            return RegionInfo(spec.CONFIG_SPACE_SIZE, _READ_WRITE)
        size = self.bar_size(index)
        return RegionInfo(size, _READ_WRITE if size else 0)

    def irq_info(self, index: int) -> IrqInfo:
        """Describe one kind of interrupt.

        The error and request interrupts are there because QEMU warns when they are not;
        nothing here raises them.
        """
        counts = {
            vfio.PCI_MSI_IRQ_INDEX: self._msi.vectors if self._msi else 0,
            vfio.PCI_MSIX_IRQ_INDEX: self._msix.vectors if self._msix else 0,
            vfio.PCI_ERR_IRQ_INDEX: 1,
            vfio.PCI_REQ_IRQ_INDEX: 1,
        }
        count = counts.get(index, 0)
        return IrqInfo(count, vfio.IRQ_INFO_EVENTFD if count else 0)

    def region_read(self, index: int, offset: int, count: int) -> bytes:
        """Read a BAR or configuration space."""
        if index == vfio.PCI_CONFIG_REGION_INDEX:
            return self.config.read(offset, count)
        bar = self._reachable(index)
        return b"\xff" * count if bar is None else bar.handler.read(offset, count)

    def region_write(self, index: int, offset: int, data: bytes) -> None:
        """Write a BAR or configuration space."""
        if index == vfio.PCI_CONFIG_REGION_INDEX:
            self.config.write(offset, data)
        elif bar := self._reachable(index):
            bar.handler.write(offset, data)

    def connect(self, irqs: InterruptLines) -> None:
        """Serve a VMM that has just come."""
        self._irqs = irqs

    def disconnect(self) -> None:
        """Be as after power-on: the VMM has gone, and its memory goes next."""
        self._reset(ResetKind.DISCONNECT)
        self._irqs = None

    def reset(self) -> None:
        """Perform a system reset; guest memory and the eventfds stay."""
        self._reset(ResetKind.SYSTEM)

    # Inside.

    def _reachable(self, index: int) -> _Bar | None:
        """Return a BAR, unless it is not there or the function sleeps (D3hot)."""
        bar = self._bars[index] if index < spec.NUM_BARS else None
        return bar if self._power_state == spec.PM_STATE_D0 else None

    def _power_changed(self) -> None:
        state = self.config.u16(self._pm + spec.PM_CTRL) & spec.PM_CTRL_STATE
        if state in {spec.PM_STATE_D0, spec.PM_STATE_D3HOT}:
            self._power_state = state
        else:
            # D1 and D2 are not supported: a write of them is dropped (PM 1.2, 3.2.4).
            ctrl = spec.PM_CTRL_NO_SOFT_RESET | self._power_state
            self.config.store(self._pm + spec.PM_CTRL, ctrl.to_bytes(2, "little"))
        self._update_bus_master()

    def _update_bus_master(self) -> None:
        """Follow COMMAND.BUS_MASTER; a function that sleeps does no DMA either."""
        command = self.config.u16(spec.COMMAND)
        enabled = bool(command & spec.COMMAND_MASTER) and self._power_state == spec.PM_STATE_D0
        if enabled != self._bus_master:
            self._bus_master = enabled
            self.on_bus_master(enabled=enabled)

    def _control_changed(self) -> None:
        """Perform a function level reset when asked; the bit that asks reads as zero."""
        if self.config.u16(self._express + spec.EXP_DEVCTL) & spec.EXP_DEVCTL_FLR:
            self._reset(ResetKind.FLR)

    def _reset(self, kind: ResetKind) -> None:
        self.config.reset()
        self._power_state = spec.PM_STATE_D0
        self._update_bus_master()
        self.on_reset(kind)
