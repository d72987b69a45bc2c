from __future__ import annotations

import pytest

from viommu.virtio import fence


@pytest.mark.parametrize("weakly_ordered", [False, True])
def test_a_fence_leaves_its_lock_free(
    weakly_ordered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A lock left taken would hang the next fence, and so the device.
    rounds = []
    acquire = fence._acquire
    monkeypatch.setattr(fence, "WEAKLY_ORDERED", weakly_ordered)
    monkeypatch.setattr(fence, "_acquire", lambda: rounds.append(acquire(blocking=False)))
    fence.full_fence()
    assert rounds == [True] * (2 if weakly_ordered else 1)
    assert not fence._lock.locked()
