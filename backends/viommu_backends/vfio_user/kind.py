"""The kind of endpoint ``vfio-user``, as an entry point of viommu."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from viommu.endpoints.host import HostKind
from viommu.endpoints.options import Option, read_seconds, read_switch
from viommu.errors import UsageError
from viommu_backends.vfio_user.endpoint import VfioUserEndpoint, VfioUserOptions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from viommu.endpoints.host import HostPlace

__all__ = ["VFIO_USER", "VfioUserDevices"]


class VfioUserDevices:
    """Implements :class:`~viommu.endpoints.host.HostDevices`: each device is by itself."""

    def open(self, place: HostPlace, options: Mapping[str, Any]) -> VfioUserEndpoint:
        """Connect to the device at ``socket``.

        Raises:
            UsageError: Nobody listens there.
            BackendError: Whoever listens there is no device that can be used.
        """
        return VfioUserEndpoint(place, VfioUserOptions(**options))

    def close(self) -> None:
        """Close what devices share: nothing."""


def _memory(value: str) -> str:
    """Read how a device gets at guest memory."""
    if value not in {"shared", "message"}:
        raise UsageError("expected shared or message")
    return value


VFIO_USER: Final = HostKind(
    "a device that another process serves over vfio-user",
    {
        "socket": Option(Path, "where it listens", required=True),
        "memory": Option(
            _memory,
            "shared: it gets file descriptors of guest memory, fast, and is trusted to use only"
            " what it was told (default); message: it asks us for every byte, and is checked",
        ),
        "timeout": Option(read_seconds, "what an answer may take, seconds (4; QEMU waits for 5)"),
        "mappable": Option(
            read_switch,
            "off: the VMM maps no BAR of it, so a device that starts again is taken at once",
        ),
    },
    VfioUserDevices,
)
