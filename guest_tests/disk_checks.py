"""What holds for a disk wherever its device is: what the guest writes the host finds."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from guest_tests.rig import Rig

__all__ = ["check_file_system", "check_raw_sectors", "check_size"]

_FILE_SYSTEM_MEGABYTES = 48
_RAW_OFFSET = 50 << 20
_RAW_SIZE = (4 << 20) + 4096
_FILES = {"empty": 0, "one": 1, "page": 4096, "odd/size": 1_234_567, "odd/large": 8 << 20}


def check_file_system(rig: Rig, bdf: str, image: Path) -> None:
    """Have the guest make and fill a file system; it and the host find everything whole."""
    rig.call("disk.make", bdf=bdf, megabytes=_FILE_SYSTEM_MEGABYTES)
    written = rig.call("disk.fill", bdf=bdf, files=_FILES)

    assert rig.call("disk.sums", bdf=bdf) == written
    rig.call("disk.check", bdf=bdf)

    userland = rig.lab.userland
    userland.run("usr/sbin/e2fsck", "-f", "-n", str(image))  # raises when it finds something
    for name, digest in written.items():
        copy = image.with_name("copy")
        userland.run("usr/sbin/debugfs", "-R", f'dump "/{name}" "{copy}"', str(image))
        assert hashlib.sha256(copy.read_bytes()).hexdigest() == digest, name
        copy.unlink()


def check_raw_sectors(rig: Rig, bdf: str, image: Path) -> None:
    """Have the guest write behind the file system; the host finds it there."""
    digest = rig.call("disk.write_raw", bdf=bdf, offset=_RAW_OFFSET, count=_RAW_SIZE)

    with image.open("rb") as file:
        file.seek(_RAW_OFFSET)
        found = file.read(_RAW_SIZE)
    assert hashlib.sha256(found).hexdigest() == digest


def check_size(rig: Rig, bdf: str, image: Path) -> None:
    """Have the guest say how large its disk is."""
    assert rig.call("disk.size", bdf=bdf) == image.stat().st_size
