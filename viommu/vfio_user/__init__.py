"""vfio-user: devices served to, and used from, other processes over UNIX sockets."""

from viommu.vfio_user.client import Client, DeviceInfo
from viommu.vfio_user.irqs import IrqLines
from viommu.vfio_user.served import IrqInfo, RegionInfo, ServedDevice
from viommu.vfio_user.server import Server
from viommu.vfio_user.session import ServerLimits

__all__ = [
    "Client",
    "DeviceInfo",
    "IrqInfo",
    "IrqLines",
    "RegionInfo",
    "ServedDevice",
    "Server",
    "ServerLimits",
]
