from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.ipc.rig import Rig, make_rig

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def rig() -> Iterator[Rig]:
    with make_rig() as rig:
        yield rig
