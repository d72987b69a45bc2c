"""VirtioIommu beyond the conformance table: set-up, resets, faults, limits, parking.

What the standard says of each request is in ``tests/conformance``.
"""

import errno

import pytest

from viommu.basic import BasicMemoryMapper
from viommu.device import IommuConfig, Limits, Parked, VirtioIommu
from viommu.domain import X86_MSI_WINDOW, DomainKind, ReservedRegion
from viommu.errors import Access, BackendError, InternalError, TranslationFault, UsageError
from viommu.events import Event
from viommu.mapper import AddMapResult, MappingInfo
from viommu.spec import virtio_iommu as spec
from viommu.spec.virtio_iommu import FaultReason, Feature, RequestType, Status

PAGE = 0x1000
RW = spec.MAP_F_READ | spec.MAP_F_WRITE


def attach(domain: int, endpoint: int, flags: int = 0) -> bytes:
    return spec.ATTACH.pack(RequestType.ATTACH, domain, endpoint, flags, 0)


def detach(domain: int, endpoint: int) -> bytes:
    return spec.DETACH.pack(RequestType.DETACH, domain, endpoint)


def map_pages(domain: int, page: int, count: int = 1, gpa: int = 0x100000) -> bytes:
    start = page * PAGE
    return spec.MAP.pack(RequestType.MAP, domain, start, start + count * PAGE - 1, gpa, RW)


def unmap_pages(domain: int, page: int, count: int = 1) -> bytes:
    start = page * PAGE
    return spec.UNMAP.pack(RequestType.UNMAP, domain, start, start + count * PAGE - 1)


class World:
    """A device with three endpoints; 1 and 2 share a mapper, as a host's group does."""

    def __init__(self, config: IommuConfig | None = None) -> None:
        self.device = VirtioIommu(config)
        self.shared = BasicMemoryMapper()
        self.alone = BasicMemoryMapper()
        self.device.add_endpoint(1, self.shared)
        self.device.add_endpoint(2, self.shared)
        self.device.add_endpoint(3, self.alone)

    def ask(self, request: bytes) -> int | Parked:
        reply = self.device.handle(request, spec.TAIL_SIZE)
        self.device._check()
        if isinstance(reply, Parked):
            return reply
        assert reply[1:] == bytes(3)
        return reply[0]


@pytest.fixture
def world() -> World:
    return World()


# -- set-up --


@pytest.mark.parametrize("number", [1, -1, 1 << 32])
def test_an_endpoint_id_is_a_free_32_bit_number(world: World, number: int) -> None:
    with pytest.raises(UsageError, match="endpoint id"):
        world.device.add_endpoint(number, BasicMemoryMapper())


def test_a_mapper_must_map_the_granule(world: World) -> None:
    with pytest.raises(UsageError, match="0x200000"):
        world.device.add_endpoint(9, BasicMemoryMapper(page_sizes=0x200000))
    assert 9 not in world.device.endpoints


def test_reserved_regions_must_fit_into_a_probe(world: World) -> None:
    many = [ReservedRegion(i * PAGE, (i + 1) * PAGE) for i in range(22)]

    with pytest.raises(UsageError, match="22 reserved regions"):
        world.device.add_endpoint(9, BasicMemoryMapper(), reserved=many)
    world.device._check()


def test_an_endpoint_of_a_host_that_refuses_bypass_is_not_added() -> None:
    class Refusing(BasicMemoryMapper):
        def add_map(self, mapping: MappingInfo) -> AddMapResult:
            raise BackendError(errno.EINVAL, f"map {mapping}")

    device = VirtioIommu(IommuConfig(boot_bypass=True))

    with pytest.raises(BackendError):
        device.add_endpoint(1, Refusing())
    assert device.endpoints == {}
    device._check()


# -- endpoints that share an address space --


def test_group_mates_can_join_one_domain(world: World) -> None:
    assert world.ask(attach(7, 1)) == Status.OK
    assert world.ask(map_pages(7, 0)) == Status.OK
    assert world.ask(attach(7, 2)) == Status.OK
    assert len(world.shared.mappings()) == 1


def test_group_mates_can_not_be_in_two_domains(world: World) -> None:
    world.ask(attach(7, 1))

    assert world.ask(attach(8, 2)) == Status.UNSUPP
    assert world.device.endpoints[2].domain is None
    assert set(world.device.domains) == {7}


def test_a_group_mate_does_not_leave_while_another_stays(world: World) -> None:
    world.ask(attach(7, 1))
    world.ask(attach(7, 2))

    assert world.ask(detach(7, 1)) == Status.UNSUPP
    assert set(world.device.domains[7].endpoints) == {1, 2}


def test_group_mates_move_together(world: World) -> None:
    world.ask(attach(7, 1))
    world.ask(attach(7, 2))
    world.ask(map_pages(7, 0))

    assert world.ask(attach(8, 1)) == Status.OK

    assert set(world.device.domains) == {8}
    assert set(world.device.domains[8].endpoints) == {1, 2}
    assert world.shared.mappings() == []
    assert world.ask(attach(8, 2)) == Status.OK
    assert world.ask(detach(8, 2)) == Status.UNSUPP


def test_a_lone_member_of_a_group_moves(world: World) -> None:
    world.ask(attach(7, 1))

    assert world.ask(attach(8, 1)) == Status.OK
    assert world.ask(detach(8, 1)) == Status.OK
    assert world.device.domains == {}


# -- limits --


def limited(**limits: int) -> World:
    return World(IommuConfig(limits=Limits(**limits)))


def test_domains_are_limited_but_a_move_of_the_last_endpoint_is_not() -> None:
    world = limited(domains=1)

    assert world.ask(attach(7, 1)) == Status.OK
    assert world.ask(attach(8, 3)) == Status.NOMEM
    assert world.ask(attach(8, 1)) == Status.OK
    assert set(world.device.domains) == {8}


def test_mappings_are_limited_for_each_domain_and_in_all() -> None:
    world = limited(mappings_per_domain=2, mappings=3)
    world.ask(attach(7, 1))
    world.ask(attach(8, 3))

    assert [world.ask(map_pages(7, page)) for page in range(3)] == [
        Status.OK,
        Status.OK,
        Status.NOMEM,
    ]
    assert [world.ask(map_pages(8, page)) for page in range(2)] == [Status.OK, Status.NOMEM]
    assert world.ask(unmap_pages(7, 0)) == Status.OK
    assert world.ask(map_pages(8, 1)) == Status.OK
    assert world.ask(detach(8, 3)) == Status.OK
    assert world.device.mappings == 1


# -- resets and bypass --


def test_reset_forgets_domains_and_keeps_bypass(world: World) -> None:
    world.device.write_config(36, b"\1")
    world.ask(attach(7, 1))
    world.ask(map_pages(7, 0))

    assert world.device.reset() == []

    world.device._check()
    assert world.device.domains == {}
    assert world.device.mappings == 0
    assert world.device.bypass
    assert world.device.endpoints[1].kind is DomainKind.BYPASS


def test_a_system_reset_restores_bypass(world: World) -> None:
    world.device.write_config(36, b"\1")

    world.device.system_reset()

    assert not world.device.bypass
    assert world.device.endpoints[3].kind is DomainKind.BLOCKED
    world.device._check()


def test_a_reset_returns_what_to_wait_for(world: World) -> None:
    world.ask(attach(7, 3))
    world.ask(map_pages(7, 0))
    fault = world.alone.start_export_session()
    world.alone.export(0, 8)

    (wait,) = world.device.reset()

    assert fault.is_set()
    assert not wait.is_set()
    world.alone.release(0, 8)
    assert wait.is_set()
    fault.close()


def test_bypass_is_written_only_when_negotiated(world: World) -> None:
    world.device.accept_features(1 << Feature.MAP_UNMAP)
    world.device.write_config(36, b"\1")
    assert not world.device.bypass
    assert world.ask(attach(7, 1, spec.ATTACH_F_BYPASS)) == Status.INVAL


@pytest.mark.parametrize(
    ("offset", "data", "bypass"),
    [
        (36, b"\1", True),
        (36, b"\1\0\0\0", True),
        (32, bytes(4) + b"\1", True),
        (37, b"\1", False),
        (0, b"\1" * 8, False),
        (36, b"\2", False),
        (36, b"\xff", False),
    ],
)
def test_config_writes(world: World, offset: int, data: bytes, bypass: bool) -> None:
    before = world.device.config_bytes()

    world.device.write_config(offset, data)

    assert world.device.bypass is bypass
    after = world.device.config_bytes()
    assert after[:36] == before[:36]
    assert after[36:] == bytes((bypass, 0, 0, 0))


def test_a_mapper_that_fails_to_leave_at_reset_is_out_of_order() -> None:
    class Stuck(BasicMemoryMapper):
        def reset_domain(self) -> Event | None:
            raise BackendError(errno.EIO, "detach")

    device = VirtioIommu()
    device.add_endpoint(1, Stuck())
    device.handle(attach(7, 1), 4)
    device.handle(map_pages(7, 0), 4)

    assert device.reset() == []
    reply = device.handle(attach(7, 1), 4)
    assert isinstance(reply, bytes)
    assert reply[0] == Status.DEVERR


# -- parking --


def test_an_unmap_of_exported_memory_is_parked(world: World) -> None:
    world.ask(attach(7, 3))
    world.ask(map_pages(7, 0, 4))
    fault = world.alone.start_export_session()
    world.alone.export(0, 8)

    parked = world.ask(unmap_pages(7, 0, 4))

    assert isinstance(parked, Parked)
    assert parked.reply == bytes(4)
    assert [e.is_set() for e in parked.events] == [False]
    world.alone.release(0, 8)
    assert [e.is_set() for e in parked.events] == [True]
    fault.close()


@pytest.mark.parametrize("request_", [detach(7, 3), attach(8, 3)])
def test_leaving_a_domain_with_exported_memory_is_parked(world: World, request_: bytes) -> None:
    world.ask(attach(7, 3))
    world.ask(map_pages(7, 0))
    fault = world.alone.start_export_session()
    world.alone.export(0, 8)

    parked = world.ask(request_)

    assert isinstance(parked, Parked)
    world.alone.release(0, 8)
    fault.close()


# -- faults --


def test_no_fault_is_given_out_before_the_first_request(world: World) -> None:
    calls: list[int] = []
    world.device.on_fault(lambda: calls.append(1))
    world.device.report_fault(3, TranslationFault(0x1234, Access.WRITE))

    assert calls == [1]
    assert world.device.take_fault() is None
    world.ask(attach(7, 3))
    report = world.device.take_fault()
    assert report == spec.FAULT.pack(
        FaultReason.DOMAIN, spec.FAULT_F_WRITE | spec.FAULT_F_ADDRESS, 3, 0x1234
    )
    assert world.device.take_fault() is None


@pytest.mark.parametrize(
    ("endpoint", "access", "reason", "flags"),
    [
        (3, Access.READ, FaultReason.MAPPING, spec.FAULT_F_READ),
        (3, Access.READ | Access.WRITE, FaultReason.MAPPING, RW),
        (1, Access.WRITE, FaultReason.DOMAIN, spec.FAULT_F_WRITE),
        (99, Access.READ, FaultReason.UNKNOWN, spec.FAULT_F_READ),
    ],
)
def test_a_report_says_who_where_and_why(
    world: World, endpoint: int, access: Access, reason: int, flags: int
) -> None:
    world.ask(attach(7, 3))

    world.device.report_fault(endpoint, TranslationFault(0xABC, access))

    assert world.device.take_fault() == spec.FAULT.pack(
        reason, flags | spec.FAULT_F_ADDRESS, endpoint, 0xABC
    )


def test_reports_that_nobody_takes_are_counted_not_kept() -> None:
    world = limited(pending_faults=2)
    world.ask(attach(7, 3))
    for address in range(5):
        world.device.report_fault(3, TranslationFault(address, Access.READ))

    assert world.device.faults == 5
    assert world.device.faults_dropped == 3
    first = world.device.take_fault()
    assert first is not None
    assert spec.FAULT.unpack(first)[-1] == 0


def test_reset_drops_reports_of_the_driver_before(world: World) -> None:
    world.ask(attach(7, 3))
    world.device.report_fault(3, TranslationFault(0, Access.READ))
    world.device.reset()
    world.ask(attach(7, 3))

    assert world.device.take_fault() is None


def test_the_msi_window_is_reserved_by_default(world: World) -> None:
    assert world.device.endpoints[1].reserved == (X86_MSI_WINDOW,)


@pytest.mark.parametrize("damage", ["count", "group", "endpoint", "empty"])
def test_check_finds_damage(world: World, damage: str) -> None:
    world.ask(attach(7, 3))
    device = world.device
    match damage:
        case "count":
            device.mappings = 1
        case "group":
            device.endpoints[1].group.domain.groups.clear()
        case "endpoint":
            device.endpoints[1].domain = device.domains[7]
        case _:
            device.domains[7].endpoints.clear()

    with pytest.raises(InternalError):
        device._check()
