from __future__ import annotations

import pytest

from viommu.errors import UsageError
from viommu.vmm.bdf import Bdf
from viommu.vmm.topology import check_topology


def check(iommu: str, *endpoints: str) -> None:
    check_topology(Bdf.parse(iommu), [Bdf.parse(endpoint) for endpoint in endpoints])


@pytest.mark.parametrize(
    "addresses",
    [
        ["00:05.0"],
        ["00:05.0", "00:06.0", "00:07.0"],
        ["00:05.0", "00:06.0", "00:06.7"],
        ["00:05.1", "00:05.0"],
        ["00:01.0", "00:1e.0"],
    ],
    ids=" ".join,
)
def test_accepted(addresses: list[str]) -> None:
    check(*addresses)


@pytest.mark.parametrize(
    ("addresses", "message"),
    [
        (["00:05.0", "00:05.0"], "00:05.0 is both the IOMMU and an endpoint"),
        (["00:05.0", "00:06.0", "00:06.0"], "00:06.0 is given to two endpoints"),
        (["01:05.0"], "01:05.0: only bus 00.*choose 00:05.0"),
        (["00:05.0", "02:06.0"], "02:06.0: only bus 00"),
        (["00:00.0"], "00:00.0: q35 has the host bridge there"),
        (["00:05.0", "00:1f.1"], "00:1f.1: q35 has the LPC"),
        (["00:05.0", "00:06.1"], "00:06.1: the device needs a function 0, .* at 00:06.0"),
        (["00:05.3"], "00:05.3: the device needs a function 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused(addresses: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check(*addresses)
