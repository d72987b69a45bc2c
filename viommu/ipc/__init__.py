"""Export sessions for clients in other processes."""

from viommu.ipc.client import ExportClient
from viommu.ipc.server import ExportServer

__all__ = ["ExportClient", "ExportServer"]
