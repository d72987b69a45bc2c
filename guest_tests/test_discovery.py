"""What an unmodified kernel finds: the IOMMU as configured, and the functions behind it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from guest_tests.rig import DISK, EDU, IOMMU, OTHER_EDU, endpoint_id

if TYPE_CHECKING:
    from guest_tests.rig import Rig

ENDPOINTS = (EDU, DISK, OTHER_EDU)
# Linux commit 6f01a732, "iommu/virtio: Add ops->flush_iotlb_all and enable deferred flush".
LAZY_SINCE = (6, 8)


def test_the_driver_binds_with_range_and_pages_as_configured(guest: Rig) -> None:
    log = guest.call("system.kernel_log")
    said = [line.split(": ", 1)[1] for line in log if re.match(r"virtio_iommu virtio\d+: ", line)]

    assert f"input address: {guest.mode.input_bits} bits" in said
    assert f"page mask: {guest.mode.page_mask:#x}" in said
    assert guest.call("pci.driver", bdf=IOMMU) == "virtio-pci"


def test_each_endpoint_is_alone_in_a_group_of_the_kind_asked_for(guest: Rig) -> None:
    for bdf in (EDU, OTHER_EDU):
        guest.call("pci.bind", bdf=bdf, name="vfio-pci")  # 6.12 gives it a group only then
    groups = {bdf: guest.call("pci.group", bdf=bdf) for bdf in ENDPOINTS}

    expected = guest.mode.group_type
    if expected == "DMA-FQ" and not guest.kernel.release_at_least(*LAZY_SINCE):
        expected = "DMA"

    assert len(set(groups.values())) == len(ENDPOINTS), groups
    for bdf in ENDPOINTS:
        assert guest.call("pci.group_members", bdf=bdf) == [bdf]
        assert guest.call("pci.group_type", bdf=bdf) == expected


@pytest.mark.parametrize("bdf", ENDPOINTS)
def test_reserved_regions_are_those_of_probe(guest: Rig, bdf: str) -> None:
    if bdf != DISK:
        guest.call("pci.bind", bdf=bdf, name="vfio-pci")

    assert guest.call("pci.reserved_regions", bdf=bdf) == [[0xFEE00000, 0xFEEFFFFF, "msi"]]


def test_the_disk_is_in_a_domain_of_the_kind_asked_for(guest: Rig) -> None:
    endpoint = guest.endpoint(DISK)
    domain = next(d for d in guest.server.snapshot()["domains"] if d["id"] == endpoint["domain"])
    number = str(endpoint_id(DISK))

    assert endpoint["id"] == endpoint_id(DISK)
    if guest.mode.group_type == "identity":
        assert domain["kind"] == "bypass"
        assert number in domain["endpoints"]  # newer kernels have one such domain for all
    else:
        assert domain["kind"] == "translating"
        assert domain["endpoints"] == [number]
