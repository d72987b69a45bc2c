"""Configuration spaces of others: what they say, right or wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viommu.pci.layout import BarPlace, ConfigLayout, mappable_areas, overlay
from viommu.spec import pci, vfio
from viommu.vfio_user import RegionInfo

READ_WRITE = vfio.REGION_INFO_FLAG_READ | vfio.REGION_INFO_FLAG_WRITE
MAPPABLE = READ_WRITE | vfio.REGION_INFO_FLAG_MMAP


def config_space(*capabilities: tuple[int, int, bytes]) -> bytearray:
    """A configuration space with these (offset, id, body) as its chain."""
    config = bytearray(pci.LEGACY_CONFIG_SPACE_SIZE)
    link = pci.CAPABILITY_LIST
    for at, cap_id, body in capabilities:
        config[pci.STATUS] |= pci.STATUS_CAP_LIST
        config[link] = at
        config[at] = cap_id
        config[at + 2 : at + 2 + len(body)] = body
        link = at + 1
    return config


EXPRESS = bytes(2) + pci.EXP_DEVCAP_FLR.to_bytes(4, "little")


def test_capabilities_in_the_order_of_the_chain() -> None:
    layout = ConfigLayout(config_space((0x80, 9, b""), (0x40, 1, b""), (0xFC, 9, b"")))

    assert layout.capabilities == ((9, 0x80), (1, 0x40), (9, 0xFC))
    assert layout.find(9) == 0x80
    assert layout.find_all(9) == [0x80, 0xFC]
    assert layout.find(5) is None


def test_without_the_status_bit_there_is_no_chain() -> None:
    config = config_space((0x40, 1, b""))
    config[pci.STATUS] = 0

    assert ConfigLayout(config).capabilities == ()


def test_a_chain_that_is_a_ring_ends() -> None:
    config = config_space((0x40, 1, b""), (0x50, 9, b""))
    config[0x51] = 0x43  # the low bits mean nothing

    assert ConfigLayout(config).capabilities == ((1, 0x40), (9, 0x50))


@pytest.mark.parametrize(
    ("capability", "offset", "data", "asks"),
    [
        ((0x40, pci.CAP_ID_EXPRESS, EXPRESS), 0x40 + pci.EXP_DEVCTL, b"\0\x80", True),
        ((0x40, pci.CAP_ID_EXPRESS, EXPRESS), 0x40 + pci.EXP_DEVCTL + 1, b"\x80", True),
        ((0x40, pci.CAP_ID_EXPRESS, EXPRESS), 0x40 + pci.EXP_DEVCTL, b"\x80", False),
        ((0x40, pci.CAP_ID_EXPRESS, EXPRESS), 0x40 + pci.EXP_DEVCTL, b"\xff\x7f", False),
        ((0x40, pci.CAP_ID_EXPRESS, bytes(6)), 0x40 + pci.EXP_DEVCTL, b"\0\x80", False),
        ((0x40, pci.CAP_ID_AF, bytes([6, 3])), 0x40 + pci.AF_CTRL, b"\1", True),
        ((0x40, pci.CAP_ID_AF, bytes([6, 3])), 0x40 + pci.AF_CTRL, b"\2", False),
        ((0x40, pci.CAP_ID_AF, bytes([6, 0])), 0x40 + pci.AF_CTRL, b"\1", False),
        ((0x40, pci.CAP_ID_VENDOR, EXPRESS), 0x40 + pci.EXP_DEVCTL, b"\0\x80", False),
    ],
)
def test_which_write_resets(
    capability: tuple[int, int, bytes], offset: int, data: bytes, asks: bool
) -> None:
    assert ConfigLayout(config_space(capability)).asks_for_reset(offset, data) is asks


def test_where_msix_is() -> None:
    body = pci.MSIX.pack(64, 0x2000 | 4, 0x3000 | 1)

    layout = ConfigLayout(config_space((0x40, pci.CAP_ID_MSIX, body)))

    assert layout.msix == (BarPlace(4, 0x2000, 0x2000 + 65 * 16), BarPlace(1, 0x3000, 0x3010))
    assert ConfigLayout(config_space((0xFC, pci.CAP_ID_MSIX, b""))).msix == ()


def test_layouts_are_compared_by_what_they_say() -> None:
    one, same = (ConfigLayout(config_space((0x40, pci.CAP_ID_EXPRESS, EXPRESS))) for _ in range(2))

    assert one == same
    assert one != ConfigLayout(config_space((0x50, pci.CAP_ID_EXPRESS, EXPRESS)))
    assert one != ConfigLayout(config_space((0x40, pci.CAP_ID_EXPRESS, bytes(6))))
    assert one != EXPRESS
    assert repr(one) == "[0x10 at 0x40]"


@given(st.binary(min_size=256, max_size=256))
def test_no_configuration_space_is_too_wrong(config: bytes) -> None:
    layout = ConfigLayout(config)

    assert len(layout.capabilities) <= 48
    assert all(0 <= at < 256 for at in layout.reset_bits)


@pytest.mark.parametrize(
    ("size", "flags", "areas", "taken", "expected"),
    [
        (0x8000, MAPPABLE, (), [], [(0, 0x8000)]),
        (0x8000, READ_WRITE, (), [], []),
        (0x8000, MAPPABLE, (), [BarPlace(1, 0, 0x8000)], [(0, 0x8000)]),
        (0x8000, MAPPABLE, (), [BarPlace(0, 0x2000, 0x2080)], [(0, 0x2000), (0x3000, 0x5000)]),
        (0x8000, MAPPABLE, (), [BarPlace(0, 0x0, 0x10)], [(0x1000, 0x7000)]),
        (0x8000, MAPPABLE, (), [BarPlace(0, 0x7FF8, 0x8000)], [(0, 0x7000)]),
        (0x8000, MAPPABLE, (), [BarPlace(0, 0x1FF0, 0x2010)], [(0, 0x1000), (0x3000, 0x5000)]),
        (0x1000, MAPPABLE, (), [BarPlace(0, 0x800, 0x900)], []),
        (0x100, MAPPABLE, (), [], []),
        (0x1100, MAPPABLE, (), [], [(0, 0x1000)]),
        (0x8000, MAPPABLE, ((0x4000, 0x4000), (0, 0x1000)), [], [(0, 0x1000), (0x4000, 0x4000)]),
        (0x8000, MAPPABLE, ((0x800, 0x2000),), [], [(0x1000, 0x1000)]),
        (
            0x8000,
            MAPPABLE,
            ((0, 0x8000),),
            [BarPlace(0, 0x2000, 0x2080), BarPlace(0, 0x3000, 0x3008)],
            [(0, 0x2000), (0x4000, 0x4000)],
        ),
    ],
)
def test_what_can_be_mapped(
    size: int,
    flags: int,
    areas: tuple[tuple[int, int], ...],
    taken: list[BarPlace],
    expected: list[tuple[int, int]],
) -> None:
    region = RegionInfo(size, flags, areas=areas)

    assert list(mappable_areas(0, region, taken)) == expected


@pytest.mark.parametrize(
    ("at", "data", "expected"),
    [
        (0x10, b"ab", b"ab.."),
        (0x0F, b"ab", b"b..."),
        (0x13, b"ab", b"...a"),
        (0x0E, b"ab", b"...."),
        (0x14, b"ab", b"...."),
        (0x0F, b"abcdef", b"bcde"),
    ],
)
def test_an_overlay_covers_what_is_there(at: int, data: bytes, expected: bytes) -> None:
    target = bytearray(b"....")

    overlay(target, 0x10, at, data)

    assert target == expected
