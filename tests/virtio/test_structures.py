from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.virtio.harness import EchoDevice
from viommu.memory import GuestMemory
from viommu.pci.layout import ConfigLayout
from viommu.spec import pci, vfio
from viommu.spec import virtio_pci as spec
from viommu.spec.virtio_pci import CfgType
from viommu.virtio.pci import VirtioPciFunction
from viommu.virtio.structures import Structure, find_structures, find_virtio, is_disk


def vendor(kind: int, bar: int, offset: int, length: int, size: int = 16) -> bytes:
    return bytes([pci.CAP_ID_VENDOR, 0]) + spec.CAP_BODY.pack(size, kind, bar, 0, offset, length)


def test_those_of_our_own_devices() -> None:
    function = VirtioPciFunction("echo", GuestMemory(), EchoDevice())
    config = function.region_read(vfio.PCI_CONFIG_REGION_INDEX, 0, 256)

    found = find_structures(config, ConfigLayout(config).find_all(pci.CAP_ID_VENDOR))

    assert found == {
        CfgType.COMMON: Structure(0, 0x0000, 60),
        CfgType.ISR: Structure(0, 0x1000, 0x1001),
        CfgType.DEVICE: Structure(0, 0x2000, 0x2006),
        CfgType.NOTIFY: Structure(0, 0x3000, 0x3008),
    }


@pytest.mark.parametrize(
    ("ids", "virtio", "disk"),
    [
        (0x10421AF4, True, True),
        (0x10011AF4, True, True),
        (0x106A1AF4, True, False),
        (0x10421AF5, False, False),
    ],
)
def test_what_a_device_is(ids: int, virtio: bool, disk: bool) -> None:
    function = VirtioPciFunction("echo", GuestMemory(), EchoDevice())
    config = function.region_read(vfio.PCI_CONFIG_REGION_INDEX, 0, 256)
    config = ids.to_bytes(4, "little") + config[4:]

    assert bool(find_virtio(config)) is virtio
    assert is_disk(config) is disk


@pytest.mark.parametrize(
    ("capability", "found"),
    [
        (vendor(CfgType.COMMON, 4, 0x100, 56), {CfgType.COMMON: Structure(4, 0x100, 0x138)}),
        (vendor(CfgType.COMMON, 6, 0, 56), {}),
        (vendor(CfgType.COMMON, 0, 0, 0), {}),
        (vendor(CfgType.COMMON, 0, 0, 56, size=15), {}),
        (vendor(CfgType.PCI, 0, 0, 4), {}),
        (vendor(CfgType.SHARED_MEMORY, 2, 0, 0x1000), {}),
        (vendor(0xEE, 0, 0, 56), {}),
    ],
)
def test_what_counts(capability: bytes, found: dict[CfgType, Structure]) -> None:
    assert find_structures(bytes(64) + capability, [64]) == found


def test_the_first_of_a_kind_is_the_one_that_drivers_use() -> None:
    config = vendor(CfgType.ISR, 1, 0, 1) + vendor(CfgType.ISR, 2, 0, 1)

    assert find_structures(config, [0, 16]) == {CfgType.ISR: Structure(1, 0, 1)}


def test_a_capability_at_the_very_end_is_none() -> None:
    assert find_structures(vendor(CfgType.ISR, 1, 0, 1), [4]) == {}


@given(st.binary(min_size=256, max_size=256), st.lists(st.integers(64, 255), max_size=8))
def test_any_bytes_will_do(config: bytes, at: list[int]) -> None:
    for structure in find_structures(config, at).values():
        assert structure.bar < 6
        assert structure.start < structure.end


@pytest.mark.parametrize(
    ("bar", "offset", "size", "expected"),
    [
        (2, 0x100, 4, 0),
        (2, 0x10C, 4, 12),
        (2, 0x10D, 4, None),
        (2, 0xFF, 4, None),
        (1, 0x100, 4, None),
    ],
)
def test_where_an_access_is_inside(bar: int, offset: int, size: int, expected: int | None) -> None:
    assert Structure(2, 0x100, 0x110).offset_of(bar, offset, size) == expected
