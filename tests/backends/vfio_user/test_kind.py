from __future__ import annotations

from pathlib import Path

import pytest

from viommu.endpoints.host import HostKind
from viommu.endpoints.registry import find_kind, parse_endpoint
from viommu.errors import UsageError
from viommu_backends.vfio_user.endpoint import VfioUserOptions
from viommu_backends.vfio_user.kind import VFIO_USER


def test_it_is_found_by_its_name() -> None:
    found = find_kind("vfio-user")

    assert isinstance(found, HostKind)
    assert found.help == VFIO_USER.help


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("socket=/x", VfioUserOptions(Path("/x"))),
        ("socket=/x,memory=message", VfioUserOptions(Path("/x"), "message")),
        ("socket=/x,memory=shared,timeout=0.5", VfioUserOptions(Path("/x"), "shared", 0.5)),
        ("socket=/x,mappable=off", VfioUserOptions(Path("/x"), mappable=False)),
        ("socket=/x,mappable=on,timeout=60", VfioUserOptions(Path("/x"), timeout=60.0)),
    ],
)
def test_its_options(words: str, options: VfioUserOptions) -> None:
    name, parsed = parse_endpoint(f"vfio-user,{words}")

    assert name == "vfio-user"
    assert VfioUserOptions(**parsed) == options


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("memory=shared", "vfio-user needs socket="),
        ("socket=/x,memory=private", "expected shared or message"),
        ("socket=/x,timeout=0", "expected seconds, more than 0 and up to 3600"),
        ("socket=/x,timeout=never", "expected seconds"),
        ("socket=/x,timeout=nan", "expected seconds"),
        ("socket=/x,timeout=3601", "expected seconds"),
        ("socket=/x,mappable=yes", "expected on or off"),
    ],
)
def test_mistakes_in_them(words: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        parse_endpoint(f"vfio-user,{words}")
