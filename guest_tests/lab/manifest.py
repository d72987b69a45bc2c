"""What the lab takes from Debian's archive.

Versions are not pinned: the archive keeps only the newest of a release. They are resolved
when a bundle is fetched and recorded beside it (``RESOLVED.json``), with checksums.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["BUNDLES", "GUEST", "KERNELS", "KERNEL_L1", "QEMU", "SOURCE_6_1", "SOURCE_7_2", "Bundle"]

_TRIXIE = ("trixie", "trixie-backports")


class Bundle(NamedTuple):
    """Packages that are fetched and unpacked together.

    ``packages`` are installed from ``release``, one of ``suites``, with their dependencies.
    ``prefer`` is a regular expression: when package names match, the newest of them is taken
    instead. ``fetch`` (likewise) says which of the dependencies are downloaded and ``keep``
    (globs) which of their files are kept.
    """

    name: str
    suites: tuple[str, ...]
    release: str
    packages: tuple[str, ...]
    keep: tuple[str, ...]
    prefer: str = ""
    fetch: str = r".*"


QEMU = Bundle(
    name="qemu",
    suites=_TRIXIE,
    release="trixie-backports",
    packages=("qemu-system-x86",),
    keep=(
        "usr/bin/qemu-system-x86_64",
        "usr/lib/x86_64-linux-gnu/*.so*",
        "usr/share/qemu/*.bin",
        "usr/share/qemu/*.rom",
        "usr/share/seabios/*.bin",
    ),
)

GUEST = Bundle(
    name="guest",
    suites=_TRIXIE,
    release="trixie",
    packages=("busybox-static", "python3.13-minimal", "libpython3.13-stdlib", "e2fsprogs"),
    keep=(
        "usr/bin/busybox",
        "usr/bin/python3.13",
        "usr/sbin/mke2fs",
        "usr/sbin/e2fsck",
        "usr/sbin/debugfs",
        "usr/lib/python3.13/*",
        "usr/lib/x86_64-linux-gnu/*.so*",
        "etc/mke2fs.conf",
    ),
)

_KERNEL_PARTS = r"linux-(image|binary|modules|base)-\d.*"
_KERNEL_FILES = ("boot/vmlinuz-*", "usr/lib/modules/*")

KERNELS = {
    "6.12": Bundle(
        name="kernel-6.12",
        suites=_TRIXIE,
        release="trixie",
        packages=("linux-image-cloud-amd64",),
        prefer=r"linux-image-6\.12\.\d+\S*-cloud-amd64",
        fetch=_KERNEL_PARTS,
        keep=_KERNEL_FILES,
    ),
    "7.2": Bundle(
        name="kernel-7.2",
        suites=_TRIXIE,
        release="trixie-backports",
        packages=("linux-image-cloud-amd64",),
        prefer=r"linux-image-7\.2\.\d+\S*-cloud-amd64",
        fetch=_KERNEL_PARTS,
        keep=_KERNEL_FILES,
    ),
}

SOURCE_6_1 = Bundle(
    name="source-6.1",
    suites=("bookworm",),
    release="bookworm",
    packages=("linux-source-6.1",),
    fetch=r"linux-source-6\.1",
    keep=("usr/src/linux-source-6.1.tar.xz",),
)

SOURCE_7_2 = Bundle(
    name="source-7.2",
    suites=_TRIXIE,
    release="trixie-backports",
    packages=("linux-source-7.2",),
    fetch=r"linux-source-7\.2",
    keep=("usr/src/linux-source-7.2.tar.xz",),
)

# The kernel of a machine that is a host itself. Debian's kernels for clouds lack the file system
# of its root (9p); most of what this one has instead is of no use.
KERNEL_L1 = Bundle(
    name="kernel-6.12-l1",
    suites=_TRIXIE,
    release="trixie",
    packages=("linux-image-amd64",),
    prefer=r"linux-image-6\.12\.\d+\+deb13-amd64",
    fetch=_KERNEL_PARTS,
    keep=(
        "boot/vmlinuz-*",
        "usr/lib/modules/*/modules.builtin",
        "usr/lib/modules/*/kernel/drivers/vfio",
        "usr/lib/modules/*/kernel/drivers/virtio",
        "usr/lib/modules/*/kernel/fs/9p",
        "usr/lib/modules/*/kernel/fs/netfs",
        "usr/lib/modules/*/kernel/fs/overlayfs",
        "usr/lib/modules/*/kernel/net/9p",
        "usr/lib/modules/*/kernel/virt",
    ),
)

BUNDLES = {
    bundle.name: bundle
    for bundle in (QEMU, GUEST, *KERNELS.values(), SOURCE_6_1, SOURCE_7_2, KERNEL_L1)
}
