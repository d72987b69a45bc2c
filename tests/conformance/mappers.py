"""Memory mappers that remember what they hold, and fail, or answer, when they are told to."""

from __future__ import annotations

import errno
from dataclasses import dataclass

from viommu.basic import DEFAULT_PAGE_SIZES, BasicMemoryMapper
from viommu.errors import BackendError
from viommu.events import Event
from viommu.iova import ADDRESS_SPACE_END
from viommu.mapper import AddMapResult, MappingInfo, RemoveMapResult

__all__ = ["FaultyMapper", "LaterMapper", "Question"]


class FaultyMapper(BasicMemoryMapper):
    """A BasicMemoryMapper with a host that refuses when told to, as VFIO may.

    It asserts what its caller owes it by contract, and keeps in ``held`` what it was
    told to hold, apart from the interval map under test.
    """

    def __init__(self, *, detachable: bool = True, page_sizes: int = DEFAULT_PAGE_SIZES) -> None:
        super().__init__(page_sizes=page_sizes)
        self.held: dict[int, MappingInfo] = {}
        self.adds = 0
        self.removes = 0
        self.refusals = 0
        self._granule = page_sizes & -page_sizes
        self._detachable = detachable
        self._reserved: list[tuple[int, int]] = []
        self._refuse: dict[str, tuple[int, int]] = {}

    def fail_add(self, nth: int = 1, number: int = errno.EIO) -> None:
        """Refuse the ``nth`` ``add_map`` from now, once, with errno ``number``."""
        self._refuse["add"] = self.adds + nth, number

    def fail_remove(self, nth: int = 1, number: int = errno.EIO) -> None:
        """Refuse the ``nth`` ``remove_map`` from now, once, with errno ``number``."""
        self._refuse["remove"] = self.removes + nth, number

    def fail_nothing(self) -> None:
        """Take back what is still to be refused."""
        self._refuse.clear()

    def reserve(self, iova: int, size: int) -> None:
        """Keep a range to the host, as a VFIO container does: mapping it is an overlap."""
        self._reserved.append((iova, iova + size))

    def add_map(self, mapping: MappingInfo) -> AddMapResult:
        """Add one mapping, or refuse as told."""
        self._check_range(mapping.iova, mapping.size)
        assert not mapping.gpa & (self._granule - 1)
        self.adds += 1
        self._refuse_if_told("add", self.adds)
        end = mapping.iova + mapping.size
        if any(mapping.iova < high and low < end for low, high in self._reserved):
            return AddMapResult.OVERLAP_FAILURE
        result = super().add_map(mapping)
        if result is AddMapResult.OK:
            self.held[mapping.iova] = mapping
        return result

    def remove_map(self, iova_start: int, size: int) -> RemoveMapResult:
        """Remove mappings, or refuse as told."""
        self._check_range(iova_start, size)
        self.removes += 1
        self._refuse_if_told("remove", self.removes)
        result = super().remove_map(iova_start, size)
        if result.ok:
            end = iova_start + size
            self.held = {i: m for i, m in self.held.items() if not iova_start <= i < end}
        return result

    def supports_detach(self) -> bool:
        """Return what the constructor was told."""
        return self._detachable

    def reset_domain(self) -> Event | None:
        """Remove every mapping."""
        assert self._detachable
        self.held = {}
        return super().reset_domain()

    def _check_range(self, iova: int, size: int) -> None:
        assert size > 0
        assert iova + size <= ADDRESS_SPACE_END
        assert not (iova | size) & (self._granule - 1), f"unaligned: {iova:#x} (+{size:#x})"

    def _refuse_if_told(self, call: str, count: int) -> None:
        due, number = self._refuse.get(call, (0, 0))
        if due == count:
            self.refusals += 1
            raise BackendError(number, f"{call} number {count}")


@dataclass
class Question:
    """What a host was asked and has not answered: to map, or else to unmap."""

    mapping: MappingInfo
    is_map: bool
    withdrawn: bool = False


class LaterMapper(FaultyMapper):
    """A :class:`~viommu.mapper.DeferredMapper` whose host answers when :meth:`answer` says so.

    The host works in order and answers in any: ``host`` is what it has, by IOVA.
    It asserts that nothing overlaps there, and that it is asked to unmap only what it has.
    """

    def __init__(self, *, page_sizes: int = DEFAULT_PAGE_SIZES) -> None:
        super().__init__(page_sizes=page_sizes)
        self.host: dict[int, MappingInfo] = {}
        self.questions: list[Question] = []
        self.dead = False
        self._event: Event | None = None
        self._refusal: BackendError | None = None

    def add_map(self, mapping: MappingInfo) -> AddMapResult:
        """Add one mapping, and ask the host for it."""
        result = super().add_map(mapping)
        if result is AddMapResult.OK and not self.dead:
            end = mapping.iova + mapping.size
            assert not any(
                m.iova < end and mapping.iova < m.iova + m.size for m in self.host.values()
            )
            self.host[mapping.iova] = mapping
            self.questions.append(Question(mapping, is_map=True))
        return result

    def remove_map(self, iova_start: int, size: int) -> RemoveMapResult:
        """Remove mappings, and ask the host to."""
        before = self.mappings()
        result = super().remove_map(iova_start, size)
        self._withdraw(before)
        return result

    def reset_domain(self) -> Event | None:
        """Remove every mapping, and ask the host to."""
        before = self.mappings()
        resolution = super().reset_domain()
        self._withdraw(before)
        return resolution

    def unsettled(self) -> Event | None:
        """Return an event for the last answer, if one is outstanding."""
        if not self.questions:
            return None
        if self._event is None or self._event.fileno() < 0:
            self._event = Event()
        return self._event

    def take_refusal(self) -> BackendError | None:
        """Return the first refusal."""
        refusal, self._refusal = self._refusal, None
        return refusal

    # The host

    def answer(self, index: int = 0, refuse: int = 0) -> None:
        """Answer one question, with the errno ``refuse`` unless that is 0."""
        question = self.questions.pop(index)
        if refuse and question.is_map and not question.withdrawn:
            del self.host[question.mapping.iova]
            self._refusal = self._refusal or BackendError(refuse, f"map {question.mapping}")
        self._fire()

    def die(self) -> None:
        """Have nothing, and answer everything at once, from now on."""
        self.dead = True
        self.host.clear()
        self.questions.clear()
        self._fire()

    def _fire(self) -> None:
        if not self.questions and self._event is not None:
            if self._event.fileno() >= 0:
                self._event.signal()
            self._event = None

    def _withdraw(self, before: list[MappingInfo]) -> None:
        left = set(self.mappings())
        for mapping in before:
            if mapping in left or self.host.get(mapping.iova) != mapping:
                continue  # refused, or the host is dead
            del self.host[mapping.iova]
            for question in self.questions:
                if question.is_map and question.mapping == mapping:
                    question.withdrawn = True
            self.questions.append(Question(mapping, is_map=False))
