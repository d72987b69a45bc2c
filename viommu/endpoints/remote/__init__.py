"""Devices in other processes, reached by vfio-user, as endpoints of this one."""

from viommu.endpoints.remote.companions import AccessFilter, Afterlife, LinkWatcher
from viommu.endpoints.remote.function import RemoteFunction

__all__ = ["AccessFilter", "Afterlife", "LinkWatcher", "RemoteFunction"]
