"""A disk behind viommu: what the guest writes is what the host finds in the image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guest_tests.disk_checks import check_file_system, check_raw_sectors, check_size
from guest_tests.rig import DISK

if TYPE_CHECKING:
    from guest_tests.rig import Rig


def test_a_file_system_is_made_filled_unmounted_and_found_whole_by_the_host(guest: Rig) -> None:
    check_file_system(guest, DISK, guest.disk)


def test_raw_sectors_arrive_where_they_were_written(guest: Rig) -> None:
    check_raw_sectors(guest, DISK, guest.disk)


def test_the_guest_sees_the_size_of_the_image(guest: Rig) -> None:
    check_size(guest, DISK, guest.disk)
