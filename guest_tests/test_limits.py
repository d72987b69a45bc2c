"""A guest that wants more than it may have: refused, and still served."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guest_tests.rig import EDU, Mode, Rig

if TYPE_CHECKING:
    from pathlib import Path

    from guest_tests.lab.kernels import Kernel
    from guest_tests.rig import Lab

MAPPINGS = 64
# Linux commits 00271ca5 and 6f01a732: since then nobody looks at the status of a MAP.
ASYNCHRONOUS_SINCE = (6, 8)


def test_a_mapping_too_many(lab: Lab, kernel: Kernel, tmp_path: Path) -> None:
    mode = Mode(options=("--limit", f"mappings_per_domain={MAPPINGS}"))
    with Rig(lab, kernel, mode, tmp_path) as rig:
        refused = rig.server.snapshot()["iommu"]["counters"]["refused"]
        outcome = rig.call("dma.exhaust", bdf=EDU, limit=MAPPINGS)

        assert rig.server.snapshot()["iommu"]["counters"]["refused"] > refused
        assert outcome["last allowed"] == "ok"
        if kernel.release_at_least(*ASYNCHRONOUS_SINCE):
            assert outcome["one more"] == "translation fault"
        else:
            assert outcome["one more"] == "Cannot allocate memory"
        assert outcome["after an unmap"] == "ok"
