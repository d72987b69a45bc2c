"""Devices that reach memory only through the IOMMU, and the registry that makes them."""

__all__: list[str] = []
