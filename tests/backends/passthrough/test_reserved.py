from __future__ import annotations

import pytest

from viommu.domain import X86_MSI_WINDOW, ReservedRegion, sorted_reserved
from viommu.spec.virtio_iommu import ReservedKind
from viommu_backends.passthrough.reserved import reserved_for_guest

MSI = X86_MSI_WINDOW
TOP = 1 << 39
PLAIN = ReservedRegion(0xBF800000, 0xC0000000)
RANGES = [(0, MSI.start), (MSI.end, TOP)]


@pytest.mark.parametrize(
    ("regions", "ranges", "expected"),
    [
        ([MSI], RANGES, [MSI]),
        ([], [(0, TOP)], [MSI]),
        ([], RANGES, [MSI]),
        ([MSI], [], [MSI]),
        ([MSI, PLAIN], [(0, PLAIN.start), (PLAIN.end, MSI.start), (MSI.end, TOP)], [PLAIN, MSI]),
        # A gap that sysfs doesn't explain.
        ([MSI], [(0, 0x1000), (0x3000, MSI.start), (MSI.end, TOP)], [(0x1000, 0x3000, 0), MSI]),
        # A gap around the window: what is left of it on either side.
        (
            [MSI],
            [(0, 0xFEDF0000), (0xFEF10000, TOP)],
            [(0xFEDF0000, MSI.start, 0), MSI, (MSI.end, 0xFEF10000, 0)],
        ),
        # Another place for MSIs, as on Arm: there is no second one.
        (
            [ReservedRegion(0x08000000, 0x08100000, ReservedKind.MSI)],
            [(0, TOP)],
            [(0x08000000, 0x08100000, 1)],
        ),
        (
            [MSI, ReservedRegion(0x08000000, 0x08100000, ReservedKind.MSI)],
            [],
            [(0x08000000, 0x08100000, 0), MSI],
        ),
        # Regions that overlap.
        ([ReservedRegion(0xFEE80000, 0xFF000000), MSI], [], [MSI, (MSI.end, 0xFF000000, 0)]),
        ([PLAIN, PLAIN._replace(end=PLAIN.end - 1), MSI], [], [PLAIN, MSI]),
    ],
)
def test_what_a_guest_is_told(
    regions: list[ReservedRegion],
    ranges: list[tuple[int, int]],
    expected: list[tuple[int, int, int]],
) -> None:
    told = reserved_for_guest(regions, ranges)

    assert list(told) == expected
    assert sorted_reserved(told) == told
