from __future__ import annotations

import pytest

from viommu.errors import UsageError
from viommu.memory.counted import Counted


class Thing(Counted):
    def __init__(self) -> None:
        super().__init__()
        self.freed = 0

    def _free(self) -> None:
        self.freed += 1

    def __str__(self) -> str:
        return "the thing"


def test_the_last_use_frees_once() -> None:
    thing = Thing()
    assert thing.retain() is thing
    with thing.retain():
        assert thing.uses == 3
    thing.close()
    assert (thing.uses, thing.freed) == (1, 0)

    thing.close()

    assert (thing.uses, thing.freed) == (0, 1)


def test_what_is_freed_is_not_used_again() -> None:
    thing = Thing()
    thing.close()
    with pytest.raises(UsageError, match="the thing is closed"):
        thing.retain()
    with pytest.raises(UsageError, match="the thing was closed more often"):
        thing.close()
    assert thing.freed == 1
