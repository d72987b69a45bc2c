"""A virtio-iommu that runs in a process of its own and plugs into a real VMM."""

from viommu._version import __version__

__all__ = ["__version__"]
