"""A driver's view of a PCI function behind a vfio-user client: registers and interrupts."""

from __future__ import annotations

import contextlib
import select
import time
from typing import TYPE_CHECKING, Self

from viommu.errors import PeerError, UsageError
from viommu.events import Event
from viommu.spec import pci, vfio

if TYPE_CHECKING:
    from collections.abc import Callable

    from viommu.vfio_user.client import Client

__all__ = ["PciDriver", "wait_for"]


class PciDriver:
    """Configuration space, BARs and message signalled interrupts of one function.

    The client stays the caller's. :meth:`close` leaves the function without bus
    mastering and interrupts.
    """

    def __init__(self, client: Client) -> None:
        self.client = client
        self._vectors: dict[int, list[Event]] = {}  # by kind of interrupt

    def config_read(self, offset: int, size: int) -> int:
        """Read a register of configuration space."""
        data = self.client.region_read(vfio.PCI_CONFIG_REGION_INDEX, offset, size)
        return int.from_bytes(data, "little")

    def config_write(self, offset: int, value: int, size: int) -> None:
        """Write a register of configuration space."""
        data = value.to_bytes(size, "little")
        self.client.region_write(vfio.PCI_CONFIG_REGION_INDEX, offset, data)

    def capabilities(self, cap_id: int) -> list[int]:
        """Return the offsets of every capability with this id, in order of the chain.

        Raises:
            UsageError: The chain has a loop or leaves configuration space.
        """
        config = self.client.region_read(
            vfio.PCI_CONFIG_REGION_INDEX, 0, pci.LEGACY_CONFIG_SPACE_SIZE
        )
        found = []
        seen = set()
        at = config[pci.CAPABILITY_LIST] & ~3
        while at:
            if at in seen or at < pci.HEADER_SIZE:
                raise UsageError(f"the capability chain is broken at {at:#x}")
            seen.add(at)
            if config[at] == cap_id:
                found.append(at)
            at = config[at + 1] & ~3
        return found

    def capability(self, cap_id: int) -> int:
        """Return the offset of the first capability with this id.

        Raises:
            UsageError: There is none.
        """
        found = self.capabilities(cap_id)
        if not found:
            raise UsageError(f"the function has no capability {cap_id:#x}")
        return found[0]

    def read(self, bar: int, offset: int, size: int) -> int:
        """Read a register of a BAR."""
        return int.from_bytes(self.client.region_read(bar, offset, size), "little")

    def write(self, bar: int, offset: int, value: int, size: int, *, posted: bool = False) -> None:
        """Write a register of a BAR; ``posted`` does not wait for the device, as on a bus."""
        self.client.region_write(bar, offset, value.to_bytes(size, "little"), posted=posted)

    def set_bus_master(self, *, enabled: bool = True) -> None:
        """Allow or forbid DMA; memory decoding is on in either case."""
        command = pci.COMMAND_MEMORY | (pci.COMMAND_MASTER if enabled else 0)
        self.config_write(pci.COMMAND, command, 2)

    def reset_function(self) -> None:
        """Perform a function level reset; configuration space is reset as well."""
        register = self.capability(pci.CAP_ID_EXPRESS) + pci.EXP_DEVCTL
        self.config_write(register, self.config_read(register, 2) | pci.EXP_DEVCTL_FLR, 2)

    def enable_msi(self) -> Event:
        """Switch MSI on and return the event of its first vector."""
        (event,) = self._assign(vfio.PCI_MSI_IRQ_INDEX, 1)
        register = self.capability(pci.CAP_ID_MSI) + 2
        self.config_write(register, self.config_read(register, 2) | pci.MSI_CTRL_ENABLE, 2)
        return event

    def enable_msix(self) -> list[Event]:
        """Switch MSI-X on and return an event for every vector."""
        events = self._assign(
            vfio.PCI_MSIX_IRQ_INDEX, self.client.irq_info(vfio.PCI_MSIX_IRQ_INDEX).count
        )
        register = self.capability(pci.CAP_ID_MSIX) + 2
        self.config_write(register, pci.MSIX_CTRL_ENABLE, 2)
        return events

    def close(self) -> None:
        """Stop DMA and interrupts, as far as the device is still there."""
        with contextlib.suppress(PeerError):
            self.set_bus_master(enabled=False)
            for kind in self._vectors:
                self.client.disable_irqs(kind)
        for events in self._vectors.values():
            for event in events:
                event.close()
        self._vectors.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _assign(self, kind: int, count: int) -> list[Event]:
        if kind not in self._vectors:
            self._vectors[kind] = [Event() for _ in range(count)]
            self.client.assign_irqs(kind, 0, [event.fileno() for event in self._vectors[kind]])
        return self._vectors[kind]


def wait_for(event: Event, done: Callable[[], bool], timeout: float, what: str) -> None:
    """Wait until ``done()``, which is asked at once and after each signal of ``event``.

    Raises:
        TimeoutError: Not within ``timeout`` seconds; the message names ``what``.
    """
    deadline = time.monotonic() + timeout
    poll = select.poll()
    poll.register(event.fileno(), select.POLLIN)
    while not done():
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"no {what} within {timeout} s")
        poll.poll(left * 1000)
        event.clear()
