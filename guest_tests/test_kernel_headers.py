"""Structures and numbers as the newest kernel of the lab declares them, by a C compiler.

The headers that are installed may be older than what they are compared with.
"""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING

import pytest

from guest_tests.l1 import mock
from guest_tests.lab.bundles import fetch
from guest_tests.lab.manifest import SOURCE_7_2
from tests.spec import test_iommufd as iommufd
from tests.spec import test_vfio_host as vfio
from tests.spec.c_header import c_constants, c_layout

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow  # the source is fetched for that lane

MOCK_H = "iommufd_test.h"
UAPI = ("iommufd.h", "vfio.h", "stddef.h")
# What the kernel's own scripts/headers_install.sh takes out.
PRIVATE = re.compile(r"\b__user\b|^#include <linux/compiler.*>$", re.MULTILINE)

# in the union of struct iommu_test_cmd, from its start
COMMANDS = {
    "mock_domain": (mock.MOCK_DOMAIN, ["out_stdev_id", "out_hwpt_id", "out_idev_id"]),
    "mock_domain_replace": (mock.MOCK_DOMAIN_REPLACE, ["pt_id"]),
    "create_access": (mock.CREATE_ACCESS, ["out_access_fd", "flags"]),
    "access_rw": (mock.ACCESS_RW, ["iova", "length", "uptr", "flags"]),
    "trigger_vevent": (mock.TRIGGER_VEVENT, ["dev_id"]),
}
MOCK = {
    "iommu_viommu_selftest": (
        mock.VIOMMU_SELFTEST,
        ["in_data", "out_data", "out_mmap_offset", "out_mmap_length"],
    ),
    "iommu_hwpt_selftest": (mock.HWPT_SELFTEST, ["iotlb", "pagetable_type"]),
    "iommu_viommu_event_selftest": (mock.EVENT, ["virt_id"]),
}
MOCK_CONSTANTS = {
    "IOMMU_TEST_CMD": mock.TEST_CMD,
    "sizeof(struct iommu_test_cmd)": mock.TEST_CMD_SIZE,
    **{f"IOMMU_TEST_OP_{operation.name}": int(operation) for operation in mock.TestOp},
    "MOCK_APERTURE_START": mock.MOCK_APERTURE[0],
    "MOCK_APERTURE_LAST": mock.MOCK_APERTURE[1] - 1,
    "MOCK_ACCESS_RW_WRITE": mock.ACCESS_RW_WRITE,
    "IOMMU_HWPT_DATA_SELFTEST": mock.HWPT_DATA,
    "IOMMU_TEST_IOTLB_DEFAULT": mock.IOTLB,
    "IOMMU_VIOMMU_TYPE_SELFTEST": mock.VIOMMU,
    "IOMMU_HW_QUEUE_TYPE_SELFTEST": mock.QUEUES,
    "IOMMU_TEST_HW_QUEUE_MAX": mock.QUEUE_COUNT,
    "IOMMU_VEVENTQ_TYPE_SELFTEST": mock.EVENTS,
}


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of the headers of Linux 7.2."""
    (archive,) = fetch([SOURCE_7_2])[SOURCE_7_2.name].glob("usr/src/*.tar.xz")
    tree = tmp_path_factory.mktemp("tree")
    wanted = [f"*/include/uapi/linux/{name}" for name in UAPI]
    wanted.append(f"*/drivers/iommu/iommufd/{MOCK_H}")
    command = ["tar", "-xf", str(archive), "-C", str(tree), "--strip-components=1", "--wildcards"]
    subprocess.run([*command, *wanted], check=True, timeout=300)
    directory = tmp_path_factory.mktemp("include")
    (directory / "linux").mkdir()
    for path in tree.rglob("*.h"):
        target = directory / (path.name if path.name == MOCK_H else f"linux/{path.name}")
        target.write_text(PRIVATE.sub("", path.read_text()))
    return directory


def test_structures_of_iommufd(headers: Path) -> None:
    for codec, name, fields in iommufd.LAYOUTS:
        struct = f"struct {name}"
        assert c_layout(iommufd.IOMMUFD_H, struct, list(fields), headers) == fields, name
        size = c_constants(iommufd.IOMMUFD_H, [f"sizeof({struct})"], headers)
        assert size == {f"sizeof({struct})": codec.size}


def test_structures_of_vfio(headers: Path) -> None:
    for _, name, fields, _ in vfio.TABLE:
        assert c_layout(vfio.VFIO_H, name, list(fields), headers) == fields, name


@pytest.mark.parametrize(
    ("header", "constants"),
    [(iommufd.IOMMUFD_H, iommufd.CONSTANTS), (vfio.VFIO_H, vfio.CONSTANTS)],
    ids=["iommufd", "vfio"],
)
def test_constants(headers: Path, header: str, constants: dict[str, int]) -> None:
    assert c_constants(header, list(constants), headers) == constants


def test_the_selftest_of_iommufd(headers: Path) -> None:
    for name, (codec, fields) in MOCK.items():
        found = c_layout(MOCK_H, f"struct {name}", fields, headers)
        assert found == iommufd.layout_of(codec, fields), name
    for name, (codec, fields) in COMMANDS.items():
        paths = [f"{name}.{field}" for field in fields]
        found = c_layout(MOCK_H, "struct iommu_test_cmd", paths, headers)
        expected = iommufd.layout_of(codec, paths, mock.HEAD.size)
        assert found == expected, name


def test_numbers_of_the_selftest(headers: Path) -> None:
    found = c_constants(MOCK_H, list(MOCK_CONSTANTS), headers)
    assert found == MOCK_CONSTANTS
