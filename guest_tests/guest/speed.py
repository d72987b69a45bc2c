"""What an IOMMU costs a driver in user space: one page mapped and unmapped, over and over."""

from __future__ import annotations

import time

from guest_tests.guest.vfio import Container, Memory

__all__ = ["map_and_unmap"]

_PAGE = 4096
_IOVA = 0x1000000


def map_and_unmap(bdf: str, rounds: int, pairs: int) -> list[float]:
    """Return the seconds that a MAP and an UNMAP of one page took, the mean of each round."""
    memory = Memory(_PAGE)
    memory[:] = bytes(_PAGE)
    means = []
    with Container(bdf) as container:
        for _ in range(rounds):
            start = time.monotonic()
            for page in range(pairs):
                container.map(_IOVA + page % 64 * _PAGE, memory)
                container.unmap(_IOVA + page % 64 * _PAGE, _PAGE)
            means.append((time.monotonic() - start) / pairs)
    return means
