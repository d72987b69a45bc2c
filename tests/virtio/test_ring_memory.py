from __future__ import annotations

import pytest

from viommu.errors import GuestMemoryError, NotMappable
from viommu.testing.ring import PieceMemory
from viommu.virtio.ring_memory import one_view, words


class CopiedMemory(PieceMemory):
    """Memory without views, which tells of every access."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.accesses: list[tuple[str, int, int]] = []

    def views(self, address: int, size: int, *, write: bool) -> list[memoryview]:
        super().views(address, size, write=write)
        raise NotMappable(address, size, "copied only")

    def read(self, address: int, size: int) -> bytes:
        self.accesses.append(("read", address, size))
        return b"".join(super().views(address, size, write=False))

    def write(self, address: int, data: bytes | memoryview) -> None:
        self.accesses.append(("write", address, len(data)))
        (view,) = super().views(address, len(data), write=True)
        view[:] = data


@pytest.mark.parametrize("cuts", [(), (8,), (4, 8, 12, 16, 20)])
def test_words_are_loaded_and_stored_wherever_they_lie(cuts: tuple[int, ...]) -> None:
    memory = PieceMemory(32, cuts)
    shorts = words(memory, 4, 16, "H", write=True)
    longs = words(memory, 4, 16, "I", write=False)
    for index in range(8):
        shorts[index] = 0x1000 + index
    assert [shorts[index] for index in range(8)] == list(range(0x1000, 0x1008))
    assert [longs[index] for index in range(4)] == [
        0x1000 + index | 0x1001 + index << 16 for index in range(0, 8, 2)
    ]
    assert memory.read(0, 4) == memory.read(20, 4) == bytes(4)


def test_one_piece_is_a_plain_memoryview() -> None:
    # One index operation of a memoryview is one machine load or store.
    assert isinstance(words(PieceMemory(32), 0, 16, "H", write=True), memoryview)


@pytest.mark.parametrize(("cut", "kind"), [(5, "H"), (6, "I"), (7, "I")])
def test_a_split_word_is_refused(cut: int, kind: str) -> None:
    with pytest.raises(GuestMemoryError, match="split inside a"):
        words(PieceMemory(32, [cut]), 0, 16, kind, write=True)  # type: ignore[arg-type]


def test_what_is_no_memory_is_refused() -> None:
    with pytest.raises(GuestMemoryError, match="not \\(all\\) memory"):
        words(PieceMemory(32), 24, 16, "H", write=True)


def test_words_of_memory_without_views_are_read_and_written_one_by_one() -> None:
    memory = CopiedMemory(32)
    shorts = words(memory, 4, 16, "H", write=True)
    longs = words(memory, 4, 16, "I", write=True)
    assert memory.accesses == []
    longs[1] = 0x1234_5678
    assert (shorts[2], shorts[3]) == (0x5678, 0x1234)
    shorts[3] = 0xABCD
    assert longs[1] == 0xABCD_5678
    assert memory.accesses == [
        ("write", 8, 4),
        ("read", 8, 2),
        ("read", 10, 2),
        ("write", 10, 2),
        ("read", 8, 4),
    ]


def test_a_table_has_one_view_or_none() -> None:
    memory = PieceMemory(32)
    memory.write(4, b"table")
    view = one_view(memory, 4, 5)
    assert view is not None
    assert bytes(view) == b"table"
    assert one_view(PieceMemory(32, (8,)), 4, 8) is None
    assert one_view(CopiedMemory(32), 4, 8) is None
    with pytest.raises(GuestMemoryError):
        one_view(memory, 30, 4)
