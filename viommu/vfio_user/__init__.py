"""vfio-user: devices served to, and used from, other processes over UNIX sockets."""

from viommu.vfio_user.irqs import IrqLines
from viommu.vfio_user.served import IrqInfo, RegionInfo, ServedDevice

__all__ = ["IrqInfo", "IrqLines", "RegionInfo", "ServedDevice"]
