from __future__ import annotations

from viommu.ipc.rate import RateLimit


def test_a_burst_then_the_rate() -> None:
    now = 5.0
    limit = RateLimit(2, lambda: now)

    assert [limit.allows() for _ in range(3)] == [True, True, False]
    now += 0.5
    assert [limit.allows() for _ in range(2)] == [True, False]
    now += 100
    assert [limit.allows() for _ in range(3)] == [True, True, False]
