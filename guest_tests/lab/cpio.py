"""A cpio archive in the ``newc`` format, the one Linux unpacks as its first root file system.

Source: Linux, Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["archive"]

_ALIGNMENT = 4
_CONSOLE = (5, 1)


def archive(tree: Path) -> bytes:
    """Return ``tree`` as an archive, with ``/dev/console`` added. Same tree, same bytes.

    Directories, regular files (the executable bit is kept) and symbolic links.
    """
    entries = [("dev", stat.S_IFDIR | 0o755, b"", (0, 0))]
    entries.append(("dev/console", stat.S_IFCHR | 0o600, b"", _CONSOLE))
    for path in sorted(tree.rglob("*")):
        name = str(path.relative_to(tree))
        if path.is_symlink():
            entries.append((name, stat.S_IFLNK | 0o777, bytes(path.readlink()), (0, 0)))
        elif path.is_dir():
            entries.append((name, stat.S_IFDIR | 0o755, b"", (0, 0)))
        else:
            mode = 0o755 if path.stat().st_mode & stat.S_IXUSR else 0o644
            entries.append((name, stat.S_IFREG | mode, path.read_bytes(), (0, 0)))
    entries.append(("TRAILER!!!", 0, b"", (0, 0)))
    output = bytearray()
    for number, (name, mode, data, device) in enumerate(entries, start=1):
        encoded = name.encode() + b"\0"
        fields = (
            number,  # inode
            mode,
            0,  # uid
            0,  # gid
            2 if stat.S_ISDIR(mode) else 1,  # links
            0,  # modification time
            len(data),
            0,  # device that holds the archive, major
            0,  # and minor
            *device,
            len(encoded),
            0,  # checksum, unused in this format
        )
        output += b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        output += bytes(-len(output) % _ALIGNMENT)
        output += data
        output += bytes(-len(output) % _ALIGNMENT)
    return bytes(output)
