"""The standard as a naive model: lists and loops over pages, no interval map, no mapper.

A method named after a request returns the statuses with which the device may refuse
it, one for each rule that it breaks; the empty set means that it must succeed, and
then the model has carried it out. Ends are inclusive, as on the wire.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from viommu.spec import virtio_iommu as spec
from viommu.spec.virtio_iommu import Status

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Mapped", "SpecModel"]

_RW = spec.MAP_F_READ | spec.MAP_F_WRITE


class Mapped(NamedTuple):
    """What one MAP made: ``[first, last]``."""

    first: int
    last: int
    phys: int
    flags: int


class _Domain:
    def __init__(self, *, bypass: bool) -> None:
        self.bypass = bypass
        self.mapped: list[Mapped] = []


class SpecModel:
    """Which endpoint is in which domain, and what is mapped there.

    Args:
        granule: In bytes.
        input_range: First and last IOVA.
        max_domains: Beyond, ATTACH gets NOMEM.
        max_mappings: In all domains together; beyond, MAP gets NOMEM.
        groups: Endpoints that the host can't tell apart, all endpoints in all.
        reserved: The reserved ranges of endpoints that have some.
    """

    def __init__(
        self,
        *,
        granule: int,
        input_range: tuple[int, int],
        max_domains: int,
        max_mappings: int,
        groups: list[list[int]],
        reserved: Mapping[int, tuple[tuple[int, int], ...]],
    ) -> None:
        self.granule = granule
        self.input_range = input_range
        self.max_domains = max_domains
        self.max_mappings = max_mappings
        self.mates = {endpoint: group for group in groups for endpoint in group}
        self.reserved = {endpoint: reserved.get(endpoint, ()) for endpoint in self.mates}
        self.bypass = False
        self.domains: dict[int, _Domain] = {}
        self.domain_of: dict[int, int] = {}

    def attach(self, domain: int, endpoint: int, flags: int, reserved: int) -> set[Status]:
        """ATTACH, 5.13.6.3."""
        refusals = set()
        if reserved or flags & ~spec.ATTACH_F_BYPASS:
            refusals.add(Status.INVAL)
        if endpoint not in self.mates:
            return refusals | {Status.NOENT}
        bypass = bool(flags & spec.ATTACH_F_BYPASS)
        there = self.domains.get(domain)
        now = self.domain_of.get(endpoint)
        if there is not None and there.bypass != bypass:
            refusals.add(Status.INVAL)
        if now != domain:
            if there is None and len(self.domains) - self._is_alone(endpoint) >= self.max_domains:
                refusals.add(Status.NOMEM)
            if not bypass and any(
                self.reserved[member] != self.reserved[endpoint] for member in self._in(domain)
            ):
                refusals.add(Status.UNSUPP)
            # Who is in no domain can only join the mates; who is with them takes them along.
            if now is None and any(
                self.domain_of.get(mate, domain) != domain for mate in self.mates[endpoint]
            ):
                refusals.add(Status.UNSUPP)
        if not refusals and now != domain:
            moving = {mate for mate in self.mates[endpoint] if now is not None}
            moving = {mate for mate in moving if mate in self.domain_of} | {endpoint}
            for member in moving:
                self._leave(member)
            self.domains.setdefault(domain, _Domain(bypass=bypass))
            self.domain_of.update(dict.fromkeys(moving, domain))
        return refusals

    def detach(self, domain: int, endpoint: int) -> set[Status]:
        """DETACH, 5.13.6.4."""
        if endpoint not in self.mates:
            return {Status.NOENT}
        refusals = set()
        if self.domain_of.get(endpoint) != domain:
            refusals.add(Status.INVAL)
        elif any(mate in self.domain_of for mate in self.mates[endpoint] if mate != endpoint):
            refusals.add(Status.UNSUPP)
        if not refusals:
            self._leave(endpoint)
        return refusals

    def map(self, domain: int, first: int, last: int, phys: int, flags: int) -> set[Status]:
        """MAP, 5.13.6.5."""
        refusals = self._range_refusals(domain, first, last)
        if flags & ~(_RW | spec.MAP_F_MMIO):
            refusals.add(Status.INVAL)
        if any(value % self.granule for value in (first, last + 1, phys)):
            refusals.add(Status.RANGE)
        if phys + last - first >= 1 << 64:
            refusals.add(Status.RANGE)
        there = self.domains.get(domain)
        if there is None:
            return refusals
        taken = [(each.first, each.last) for each in there.mapped]
        for member in self._in(domain):
            taken += self.reserved[member]
        if any(first <= high and low <= last for low, high in taken):
            refusals.add(Status.INVAL)
        if sum(len(each.mapped) for each in self.domains.values()) >= self.max_mappings:
            refusals.add(Status.NOMEM)
        if not refusals:
            there.mapped.append(Mapped(first, last, phys, flags))
        return refusals

    def unmap(self, domain: int, first: int, last: int) -> set[Status]:
        """UNMAP, 5.13.6.6."""
        refusals = self._range_refusals(domain, first, last)
        there = self.domains.get(domain)
        if there is None:
            return refusals
        touched = [each for each in there.mapped if each.first <= last and first <= each.last]
        if any(each.first < first or each.last > last for each in touched):
            refusals.add(Status.RANGE)
        if not refusals:
            there.mapped = [each for each in there.mapped if each not in touched]
        return refusals

    def probe(self, endpoint: int) -> set[Status]:
        """PROBE, 5.13.6.7."""
        return set() if endpoint in self.mates else {Status.NOENT}

    def reset(self) -> None:
        """Device reset, 5.13.5."""
        self.domains.clear()
        self.domain_of.clear()

    def seen_by(self, endpoint: int) -> list[Mapped] | None:
        """Return what the endpoint's mapper must hold, by rising address; ``None``: identity.

        Endpoints that can't be told apart see what any of them was attached to.
        """
        attached = {self.domain_of[mate] for mate in self.mates[endpoint] if mate in self.domain_of}
        if not attached:
            return None if self.bypass else []
        (domain,) = attached
        there = self.domains[domain]
        return None if there.bypass else sorted(there.mapped)

    def translate(self, endpoint: int, address: int) -> tuple[int, int] | None:
        """Return (guest physical address, READ and WRITE flags); ``None``: it must fault."""
        mapped = self.seen_by(endpoint)
        if mapped is None:
            reserved = any(low <= address <= high for low, high in self.reserved[endpoint])
            return None if reserved else (address, _RW)
        for each in mapped:
            if each.first <= address <= each.last:
                return each.phys + address - each.first, each.flags & _RW
        return None

    def _in(self, domain: int) -> list[int]:
        return [endpoint for endpoint, there in self.domain_of.items() if there == domain]

    def _is_alone(self, endpoint: int) -> bool:
        """Return whether only mates of ``endpoint`` are in its domain."""
        now = self.domain_of.get(endpoint)
        return now is not None and set(self._in(now)) <= set(self.mates[endpoint])

    def _leave(self, endpoint: int) -> None:
        old = self.domain_of.pop(endpoint, None)
        if old is not None and not self._in(old):
            del self.domains[old]

    def _range_refusals(self, domain: int, first: int, last: int) -> set[Status]:
        refusals = set()
        there = self.domains.get(domain)
        if there is None:
            refusals.add(Status.NOENT)
        elif there.bypass:
            refusals.add(Status.INVAL)
        if last < first:
            refusals |= {Status.INVAL, Status.RANGE}
        if first < self.input_range[0] or last > self.input_range[1]:
            refusals.add(Status.RANGE)
        return refusals
