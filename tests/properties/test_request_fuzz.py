"""Bytes that no driver would send: the device answers or gives them back, and stays in order."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from tests.conformance.rig import READABLE, Rig, attach, detach, map_, probe, unmap
from viommu.device import IommuConfig, Limits, Parked
from viommu.domain import X86_MSI_WINDOW
from viommu.spec import virtio_iommu as spec

if TYPE_CHECKING:
    from collections.abc import Callable

ENDPOINTS = (0, 1, 0x30, 0xFFFFFFFF)
LAST = (1 << 64) - 1
# Addresses where arithmetic goes wrong, if it does.
EDGES = (
    0, 1, 0xFFF, 0x1000, 0x1FFF, 0x2000, 0xFEDFFFFF, 0xFEE00000, 0xFEEFFFFF, 0xFEF00000,
    (1 << 48) - 1, 1 << 48, 1 << 63, (1 << 63) - 1, LAST - 0x1000, LAST - 0xFFF, LAST - 1, LAST,
)  # fmt: skip


def addresses(rng: random.Random) -> tuple[int, int]:
    """Return two addresses, in order more often than not."""
    pair = [rng.choice(EDGES) if rng.random() < 0.7 else rng.getrandbits(64) for _ in range(2)]
    return tuple(sorted(pair) if rng.random() < 0.9 else pair)  # type: ignore[return-value]


def request(rng: random.Random) -> bytes:
    """Return a request that is nearly right."""
    endpoint = rng.choice(ENDPOINTS) if rng.random() < 0.9 else rng.getrandbits(32)
    domain = rng.randrange(4) if rng.random() < 0.9 else rng.getrandbits(32)
    first, last = addresses(rng)
    flags = rng.randrange(8) if rng.random() < 0.9 else rng.getrandbits(32)
    kinds: tuple[Callable[[], bytes], ...] = (
        lambda: attach(domain, endpoint, flags=flags & 1),
        lambda: attach(domain, endpoint, flags=flags, reserved=rng.randbytes(4)),
        lambda: detach(domain, endpoint, reserved=rng.randbytes(8)),
        lambda: map_(domain, first, last, rng.choice(EDGES), flags=flags),
        lambda: map_(domain, first & ~0xFFF, last | 0xFFF, 0, flags=flags),
        lambda: unmap(domain, first, last, reserved=rng.randbytes(4)),
        lambda: probe(endpoint, reserved=rng.randbytes(64)),
    )
    return rng.choice(kinds)()


def fuzzed(rng: random.Random) -> bytes:
    """Return a request: nearly right, damaged, cut short or prolonged, or noise."""
    match rng.randrange(5):
        case 0:
            return rng.randbytes(rng.choice([0, 1, 4, 20, 28, 36, 72, 200]))
        case 1:
            kind = rng.choice(sorted(READABLE))
            return bytes([kind]) + rng.randbytes(rng.randrange(100))
        case 2:
            data = bytearray(request(rng))
            data[rng.randrange(len(data))] = rng.getrandbits(8)
            return bytes(data)
        case 3:
            data = bytearray(request(rng))
            return bytes(data[: rng.randrange(len(data))])
        case _:
            return request(rng) + rng.randbytes(rng.choice([0, 0, 1, 64]))


@pytest.mark.parametrize("input_end", [1 << 48, 1 << 64])
@pytest.mark.parametrize("seed", range(5))
def test_a_thousand_requests_leave_the_device_in_order(seed: int, input_end: int) -> None:
    rng = random.Random(seed)
    rig = Rig(
        IommuConfig(
            input_range=(0, input_end),
            boot_bypass=bool(seed & 1),
            limits=Limits(domains=3, mappings=20, mappings_per_domain=10),
        )
    )
    for endpoint in ENDPOINTS:
        rig.add(endpoint, () if input_end == 1 << 64 else (X86_MSI_WINDOW,))
    statuses = set()
    for _ in range(1000):
        data = fuzzed(rng)
        before = rig.snapshot()
        room = rng.choice([0, 3, 4, 5, 515, 516, 516, 600])
        answer = rig.iommu.handle(data, room)
        assert not isinstance(answer, Parked)  # nothing is exported
        statuses.add(rig.judge(data, room, answer, before).status)
        if rng.random() < 0.005:
            rig.iommu.reset()
            rig.check()
    assert rig.iommu.mappings <= 20
    assert len(rig.iommu.domains) <= 3
    assert statuses >= {None, spec.Status.OK, spec.Status.INVAL, spec.Status.NOENT}


@pytest.mark.parametrize("seed", range(3))
def test_config_writes_of_any_bytes_are_harmless(seed: int) -> None:
    rng = random.Random(seed)
    rig = Rig(IommuConfig())
    rig.add(0)
    before = rig.iommu.config_bytes()
    for _ in range(300):
        offset = rng.randrange(64)
        rig.iommu.write_config(offset, rng.randbytes(rng.choice([1, 2, 4, 8])))
        rig.check()
        now = rig.iommu.config_bytes()
        assert now[:36] + now[37:] == before[:36] + before[37:]
        assert now[36] in {0, 1}
