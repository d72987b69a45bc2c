"""A disk behind viommu: what the guest writes is what the host finds in the image."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from guest_tests.rig import DISK

if TYPE_CHECKING:
    from guest_tests.rig import Rig

FILE_SYSTEM_MEGABYTES = 48
RAW_OFFSET = 50 << 20
RAW_SIZE = (4 << 20) + 4096
FILES = {"empty": 0, "one": 1, "page": 4096, "odd/size": 1_234_567, "odd/large": 8 << 20}


def test_a_file_system_is_made_filled_unmounted_and_found_whole_by_the_host(guest: Rig) -> None:
    guest.call("disk.make", bdf=DISK, megabytes=FILE_SYSTEM_MEGABYTES)
    written = guest.call("disk.fill", bdf=DISK, files=FILES)

    assert guest.call("disk.sums", bdf=DISK) == written
    guest.call("disk.check", bdf=DISK)

    userland = guest.lab.userland
    image = str(guest.disk)
    userland.run("usr/sbin/e2fsck", "-f", "-n", image)  # raises when it finds something
    for name, digest in written.items():
        copy = guest.disk.with_name("copy")
        userland.run("usr/sbin/debugfs", "-R", f'dump "/{name}" "{copy}"', image)
        assert hashlib.sha256(copy.read_bytes()).hexdigest() == digest, name
        copy.unlink()


def test_raw_sectors_arrive_where_they_were_written(guest: Rig) -> None:
    digest = guest.call("disk.write_raw", bdf=DISK, offset=RAW_OFFSET, count=RAW_SIZE)

    with guest.disk.open("rb") as image:
        image.seek(RAW_OFFSET)
        found = image.read(RAW_SIZE)
    assert hashlib.sha256(found).hexdigest() == digest


def test_the_guest_sees_the_size_of_the_image(guest: Rig) -> None:
    assert guest.call("disk.size", bdf=DISK) == guest.disk.stat().st_size
