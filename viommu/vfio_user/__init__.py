"""vfio-user: devices served to, and used from, other processes over UNIX sockets."""

from viommu.vfio_user.client import Client
from viommu.vfio_user.irqs import IrqLines
from viommu.vfio_user.loop_client import ClientLimits, LoopClient, dial, wait
from viommu.vfio_user.requests import DeviceInfo, Request
from viommu.vfio_user.served import IrqInfo, RegionInfo, ServedDevice
from viommu.vfio_user.server import Server
from viommu.vfio_user.session import ServerLimits

__all__ = [
    "Client",
    "ClientLimits",
    "DeviceInfo",
    "IrqInfo",
    "IrqLines",
    "LoopClient",
    "RegionInfo",
    "Request",
    "ServedDevice",
    "Server",
    "ServerLimits",
    "dial",
    "wait",
]
