from __future__ import annotations

from viommu.pci import ConfigSpace, Identity
from viommu.pci.capabilities import express_endpoint, power_management
from viommu.spec import pci as spec


def config() -> ConfigSpace:
    return ConfigSpace(Identity(1, 2, 3))


def test_power_management_keeps_state_over_sleep() -> None:
    space = config()
    at = space.add_capability(power_management())
    pm = spec.PmCap.from_buffer_copy(space.read(at, 8))
    assert pm.cap_id == 0x01
    assert pm.pmc == 3  # version 3; no D1, no D2, no PME
    assert pm.ctrl == spec.PM_CTRL_NO_SOFT_RESET
    space.write(at + spec.PM_CTRL, b"\xff\xff")
    assert space.u16(at + spec.PM_CTRL) == spec.PM_CTRL_NO_SOFT_RESET | spec.PM_STATE_D3HOT


def test_express_endpoint_can_be_reset_by_itself() -> None:
    space = config()
    at = space.add_capability(express_endpoint())
    cap = spec.ExpressCap.from_buffer_copy(space.read(at, 60))
    assert cap.cap_id == 0x10
    assert cap.flags == 2  # version 2, endpoint, no slot
    assert cap.devcap & spec.EXP_DEVCAP_FLR
    assert cap.lnkcap & 0x3F == cap.lnksta & 0x3F == 0x11  # 2.5 GT/s, one lane
    assert cap.lnkcap2 == 0b10
    assert cap.devctl == 0x2010


def test_express_registers_take_writes_as_they_should() -> None:
    space = config()
    at = space.add_capability(express_endpoint())
    before = spec.ExpressCap.from_buffer_copy(space.read(at, 60))
    space.store(at + spec.EXP_DEVSTA, b"\x2f\x00")
    space.write(at + 2, b"\xff" * 58)
    after = spec.ExpressCap.from_buffer_copy(space.read(at, 60))
    assert (after.devctl, after.lnkctl, after.devctl2, after.lnkctl2) == (0xFFFF,) * 4
    assert after.devsta == 0x20  # errors cleared, transactions pending is not an error
    for name in ("flags", "devcap", "lnkcap", "lnksta", "devcap2", "lnkcap2"):
        assert getattr(after, name) == getattr(before, name)
