from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viommu.errors import UsageError
from viommu.pci import Capability, ConfigSpace, Identity
from viommu.spec import pci as spec

IDENTITY = Identity(0x1AF4, 0x1057, 0x080600, 1, 0x1AF4, 0x1234)


def config() -> ConfigSpace:
    return ConfigSpace(IDENTITY)


def test_the_header_says_who_it_is() -> None:
    header = spec.Header.from_buffer_copy(config().read(0, 64))
    assert (header.vendor_id, header.device_id, header.revision_id) == (0x1AF4, 0x1057, 1)
    assert (header.base_class, header.subclass, header.prog_if) == (0x08, 0x06, 0x00)
    assert (header.subsystem_vendor_id, header.subsystem_id) == (0x1AF4, 0x1234)
    assert header.header_type == header.interrupt_pin == header.command == header.status == 0


def test_it_can_be_read_in_one_go() -> None:
    assert len(config().read(0, 4096)) == 4096


@given(
    writes=st.lists(st.tuples(st.integers(0, 0x3F), st.binary(min_size=1, max_size=8)), max_size=20)
)
def test_nothing_but_the_writable_bits_ever_changes(writes: list[tuple[int, bytes]]) -> None:
    space = config()
    before = space.read(0, 64)
    for offset, data in writes:
        space.write(offset, data)
    after = spec.Header.from_buffer_copy(space.read(0, 64))
    assert after.command & ~0x0546 == 0
    changed = {i for i in range(64) if space.read(i, 1) != before[i : i + 1]}
    assert changed <= {spec.COMMAND, spec.COMMAND + 1, spec.CACHE_LINE_SIZE, spec.INTERRUPT_LINE}


def test_the_rom_bar_reads_as_zero_whatever_is_written() -> None:
    # Otherwise QEMU believes in a ROM.
    space = config()
    space.write(spec.ROM_ADDRESS, b"\x00\xf8\xff\xff")
    assert space.read(spec.ROM_ADDRESS, 4) == bytes(4)


def test_a_write_over_command_and_status_changes_both_as_each_allows() -> None:
    space = config()
    space.store(spec.STATUS, (0x8010).to_bytes(2, "little"))
    space.write(spec.COMMAND, b"\x06\x00\x00\x80")  # write one to clear the parity error
    assert space.u16(spec.COMMAND) == 0x0006
    assert space.u16(spec.STATUS) == 0x0010


@pytest.mark.parametrize(("offset", "data"), [(4094, b"\xff" * 8), (5000, b"\xff"), (4096, b"\0")])
def test_accesses_beyond_the_end_are_harmless(offset: int, data: bytes) -> None:
    space = config()
    before = space.read(0, 4096)
    space.write(offset, data)
    assert space.read(0, 4096) == before
    assert space.read(offset, 8)[-2:] == bytes(2)
    assert len(space.read(offset, 8)) == 8


def test_capabilities_form_a_chain() -> None:
    space = config()
    assert space.u16(spec.STATUS) & spec.STATUS_CAP_LIST == 0
    first = space.add_capability(Capability(0x09, b"abc", writable=b"\0\xff"))
    second = space.add_capability(Capability(0x05, b"xyzw", clear_on_one=b"\x01"))
    assert (first, second) == (0x40, 0x48)
    assert space.u16(spec.STATUS) & spec.STATUS_CAP_LIST
    assert space.read(spec.CAPABILITY_LIST, 1) == bytes([first])
    assert space.read(first, 8) == bytes([0x09, second]) + b"abc\0\0\0"
    assert space.read(second, 6) == bytes([0x05, 0]) + b"xyzw"
    space.write(first, b"\x77" * 8)
    assert space.read(first, 8) == bytes([0x09, second]) + b"a\x77c\0\0\0"
    space.write(second + 2, b"\x01")
    assert space.read(second + 2, 1) == b"x"  # 0x78 has no bit 0 to clear
    space.reset()
    assert space.read(first, 8) == bytes([0x09, second]) + b"abc\0\0\0"
    assert space.u16(spec.STATUS) & spec.STATUS_CAP_LIST


def test_capabilities_must_fit_the_first_256_bytes() -> None:
    space = config()
    space.add_capability(Capability(0x09, bytes(190)))
    with pytest.raises(UsageError, match="no room for capability 0x5 at 0x100"):
        space.add_capability(Capability(0x05, b"x"))


def test_definitions_must_fit_configuration_space() -> None:
    with pytest.raises(UsageError, match="beyond configuration space"):
        config().define(4094, b"xyz")


def test_hooks_run_when_their_bytes_are_touched() -> None:
    space = config()
    calls: list[str] = []
    space.define(0x80, bytes(4), writable=b"\xff" * 4)
    space.after_write(0x80, 4, lambda: calls.append(f"write {space.u32(0x80):x}"))
    space.before_read(0x80, 4, lambda: calls.append("read"))

    space.write(0x7E, b"\xaa\xbb")
    space.write(0x84, b"\xaa")
    space.read(0x7E, 8)
    space.read(0, 4096)
    assert calls == []
    space.write(0x7E, b"\xaa\xbb\xcc")
    space.write(0x83, b"\x01\x02")
    space.read(0x80, 4)
    space.read(0x82, 1)
    assert calls == ["write cc", "write 10000cc", "read", "read"]
