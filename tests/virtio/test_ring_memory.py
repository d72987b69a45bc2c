from __future__ import annotations

import pytest

from viommu.errors import GuestMemoryError
from viommu.testing.ring import PieceMemory
from viommu.virtio.ring_memory import words


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
