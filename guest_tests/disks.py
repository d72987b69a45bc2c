"""The same disk in every place where a device can be: four of them in one machine.

In viommu's process; in a process of its own, through an export session; and as a stand-alone
vfio-user device behind the interposer, which shares guest memory with it, or does not.
"""

from __future__ import annotations

import contextlib
import signal
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from guest_tests.lab.server import ViommuDevice
from guest_tests.rig import DISK, DISK_SIZE, Rig
from viommu.control import ControlClient

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

    from guest_tests.lab.kernels import Kernel
    from guest_tests.rig import Lab, Mode

__all__ = ["BY_MESSAGE", "DISKS", "INSIDE", "OWN", "PROWLER", "REMOTE", "SHARED", "DiskRig", "Maps"]

INSIDE, OWN, SHARED, BY_MESSAGE = DISK, "00:11.0", "00:12.0", "00:13.0"
PROWLER: Final = "00:14.0"
REMOTE: Final = (SHARED, BY_MESSAGE)
DISKS: Final = {
    "inside": INSIDE,
    "own process": OWN,
    "vfio-user, shared": SHARED,
    "vfio-user, by message": BY_MESSAGE,
}

_SETTLE_SECONDS: Final = 60.0


class Maps(NamedTuple):
    """What the device's process says (IOVA, size, offset, access), and what viommu says."""

    device: list[list[Any]]
    domain: dict[str, Any]
    endpoint: dict[str, Any]


class DiskRig(Rig):
    """A server, four disks, two ``edu`` and a hostile device; a guest with two CPUs.

    The first ``edu`` is in a process of its own, like one of the disks. Two disks and the
    hostile device are served by processes that we start.
    """

    def __init__(self, lab: Lab, kernel: Kernel, mode: Mode, directory: Path) -> None:
        self.images = {INSIDE: directory / "disk.img"}
        for bdf in (OWN, *REMOTE):
            self.images[bdf] = directory / f"disk-{bdf}.img"
            with self.images[bdf].open("wb") as image:
                image.truncate(DISK_SIZE)
        self._directory = directory
        self.devices: dict[str, ViommuDevice] = {}
        more = {
            OWN: f"blk,path={self.images[OWN]},process=own",
            SHARED: f"vfio-user,socket={self._socket(SHARED)},memory=shared",
            BY_MESSAGE: f"vfio-user,socket={self._socket(BY_MESSAGE)},memory=message",
            PROWLER: f"vfio-user,socket={self._socket(PROWLER)},memory=message",
        }
        mode = mode._replace(smp=2)
        try:
            for bdf in (*REMOTE, PROWLER):
                self.start_device(bdf)
            super().__init__(lab, kernel, mode, directory, edu="edu,process=own", more=more)
        except BaseException:
            self.stop_devices()
            raise

    def start_device(self, bdf: str) -> None:
        """Start the process of a stand-alone device."""
        image = self.images.get(bdf)
        description = f"blk,path={image}" if image else "guest_tests.prowler:KIND"
        socket = self._socket(bdf)
        self.devices[bdf] = ViommuDevice(description, socket, "--control", f"{socket}.control")

    def stop_devices(self) -> None:
        """End the processes of the stand-alone devices."""
        for device in self.devices.values():
            device.stop()

    def maps(self, bdf: str) -> Maps:
        """Ask for the maps of a stand-alone disk, and for what its guest has mapped just then.

        The guest may go on meanwhile: answers that are not of the same moment are dropped.
        """
        deadline = time.monotonic() + _SETTLE_SECONDS
        with ControlClient(f"{self._socket(bdf)}.control") as control:
            while time.monotonic() < deadline:
                before = self.wait_until("nothing waits", _is_at_rest)
                device: dict[str, Any] = control.snapshot()
                after = self.server.snapshot()
                if _is_at_rest(after) and _requests(before) == _requests(after):
                    return Maps(device["maps"], _domain(after, bdf), _endpoint(after, bdf))
        raise TimeoutError(f"the guest is never still for a moment: {after}")

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop the guest, wherever it is."""
        self.vm.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.vm.process.send_signal(signal.SIGCONT)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End everything, the devices last."""
        super().__exit__(kind, error, traceback)
        self.stop_devices()

    def _socket(self, bdf: str) -> Path:
        return self._directory / f"device-{bdf}.sock"


def _endpoint(snapshot: dict[str, Any], bdf: str) -> dict[str, Any]:
    return next(one for one in snapshot["endpoints"] if one["bdf"] == bdf)


def _domain(snapshot: dict[str, Any], bdf: str) -> dict[str, Any]:
    number = _endpoint(snapshot, bdf)["domain"]
    return next(one for one in snapshot["domains"] if one["id"] == number)


def _requests(snapshot: dict[str, Any]) -> int:
    return int(snapshot["iommu"]["counters"]["requests"])


def _is_at_rest(snapshot: dict[str, Any]) -> bool:
    """Whether every request of the guest is answered, and every order to a device."""
    devices = [one.get("device", {}) for one in snapshot["endpoints"]]
    return not snapshot["iommu"]["waiting"] and not any(one.get("unanswered") for one in devices)
