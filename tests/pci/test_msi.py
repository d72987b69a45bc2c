from __future__ import annotations

import pytest

from viommu.errors import UsageError
from viommu.pci import ConfigSpace, Identity
from viommu.pci.msi import Msi, Msix, MsixBar
from viommu.spec import pci as spec

CAP = 0x40


def config() -> ConfigSpace:
    return ConfigSpace(Identity(1, 2, 3))


@pytest.mark.parametrize("vectors", [1, 2, 32])
def test_msi_gives_no_more_vectors_than_the_driver_enabled(vectors: int) -> None:
    space = config()
    msi = Msi(space, vectors)
    assert not msi.allows(0)
    for exponent in range(8):
        ctrl = spec.MSI_CTRL_ENABLE | exponent << 4
        space.write(CAP + 2, ctrl.to_bytes(2, "little"))
        granted = min(vectors, 1 << exponent)
        assert [msi.allows(v) for v in range(33)] == [v < granted for v in range(33)]
    assert not msi.allows(-1)
    space.write(CAP + 2, b"\0\0")
    assert not msi.allows(0)


def test_msi_capability_is_64_bits_wide() -> None:
    space = config()
    Msi(space, 4)
    cap = spec.MsiCap.from_buffer_copy(space.read(CAP, 16))
    assert cap.cap_id == 0x05
    assert cap.ctrl == spec.MSI_CTRL_64BIT | 2 << 1
    space.write(CAP + 2, b"\xff" * 12)
    cap = spec.MsiCap.from_buffer_copy(space.read(CAP, 16))
    assert cap.ctrl == spec.MSI_CTRL_64BIT | 2 << 1 | 0x70 | 1
    assert (cap.address_lo, cap.address_hi, cap.data) == (0xFFFFFFFC, 0xFFFFFFFF, 0xFFFF)


@pytest.mark.parametrize(
    ("vectors", "bar_size"),
    [(1, 4096), (3, 4096), (128, 4096), (129, 8192), (2048, 65536)],
)
def test_msix_table_and_pending_bits_share_a_bar_without_overlap(
    vectors: int, bar_size: int
) -> None:
    space = config()
    msix = Msix(space, vectors, bar=1)
    cap = spec.MsixCap.from_buffer_copy(space.read(CAP, 12))
    assert cap.cap_id == 0x11
    assert cap.ctrl & 0x7FF == vectors - 1
    assert cap.table == 1
    assert cap.pba & 7 == 1
    pba = cap.pba & ~7
    assert vectors * 16 <= pba
    assert pba + (vectors + 63) // 64 * 8 <= msix.bar_size == bar_size


def test_msix_vectors_exist_and_are_switched_on_together() -> None:
    space = config()
    msix = Msix(space, 3, bar=1)
    assert not msix.allows(0)
    space.write(CAP + 2, b"\xff\xff")
    assert space.u16(CAP + 2) == spec.MSIX_CTRL_ENABLE | spec.MSIX_CTRL_MASK_ALL | 2
    assert msix.enabled
    assert [msix.allows(v) for v in (-1, 0, 2, 3)] == [False, True, True, False]


@pytest.mark.parametrize("vectors", [0, 3, 64])
def test_msi_refuses_odd_numbers_of_vectors(vectors: int) -> None:
    with pytest.raises(UsageError, match=str(vectors)):
        Msi(config(), vectors)


@pytest.mark.parametrize("vectors", [0, 2049])
def test_msix_refuses_impossible_numbers_of_vectors(vectors: int) -> None:
    with pytest.raises(UsageError, match=str(vectors)):
        Msix(config(), vectors, bar=1)


def test_nothing_is_pending_in_the_bar() -> None:
    bar = MsixBar()
    bar.write(0, b"\xff" * 16)
    assert bar.read(0, 16) == bytes(16)
