"""Tests that run inside a virtual machine that is a host of its own ("L1").

Its kernel has VFIO and iommufd, its devices stand behind an emulated IOMMU (VT-d),
and its root file system is that of the machine that runs it.
"""
