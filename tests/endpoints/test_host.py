"""Kinds of endpoints that come from other packages: how they are found, and what may be wrong."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING

import pytest

from tests.endpoints import host_kind
from tests.endpoints.rig import make_rig
from viommu.endpoints import registry
from viommu.endpoints.host import ENTRY_POINTS
from viommu.endpoints.registry import endpoint_kinds, find_kind, make_endpoint, parse_endpoint
from viommu.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

Offer = dict[str, str]


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Callable[[Offer], None]:
    """A function that has these entry points installed, and no others."""

    def install(offered: Offer) -> None:
        def entries(*, group: str) -> list[EntryPoint]:
            assert group == ENTRY_POINTS
            return [EntryPoint(name, value, group) for name, value in offered.items()]

        monkeypatch.setattr(registry, "entry_points", entries)

    return install


def test_a_kind_of_another_package_is_found_and_parsed(offer: Callable[[Offer], None]) -> None:
    offer({"dev": "tests.endpoints.host_kind:KIND"})

    assert find_kind("dev") is host_kind.KIND
    assert parse_endpoint("dev,bits=40") == ("dev", {"bits": 40})
    assert list(endpoint_kinds()) == ["edu", "blk", "external", "dev"]


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("floppy", "no endpoint is called 'floppy': there are bad, blk, dev, edu"),
        ("dev", r"dev needs bits=\.\.\. \(how many"),
        ("dev,bits=many", "bits=many: expected a number"),
        ("bad", r"bad \(tests\.endpoints\.nowhere:KIND\) can't be loaded: No module"),
        ("bad,x=y", "can't be loaded"),
    ],
)
def test_mistakes_are_explained(
    offer: Callable[[Offer], None], description: str, message: str
) -> None:
    offer({"dev": "tests.endpoints.host_kind:KIND", "bad": "tests.endpoints.nowhere:KIND"})

    with pytest.raises(UsageError, match=message):
        parse_endpoint(description)


def test_what_is_no_kind_is_refused(offer: Callable[[Offer], None]) -> None:
    offer({"odd": "tests.endpoints.host_kind:NO_KIND"})

    with pytest.raises(UsageError, match="is 'no kind', which is no HostKind"):
        find_kind("odd")


def test_a_kind_that_can_not_be_loaded_does_not_hide_the_others(
    offer: Callable[[Offer], None],
) -> None:
    offer({"bad": "tests.endpoints.nowhere:KIND", "dev": "tests.endpoints.host_kind:KIND"})

    assert list(endpoint_kinds()) == ["edu", "blk", "external", "dev"]


def test_a_kind_of_ours_can_not_be_replaced(offer: Callable[[Offer], None]) -> None:
    offer({"edu": "tests.endpoints.host_kind:KIND"})

    assert find_kind("edu") is registry.KINDS["edu"]
    assert endpoint_kinds()["edu"] is registry.KINDS["edu"]


def test_a_device_of_the_host_is_not_made(offer: Callable[[Offer], None]) -> None:
    offer({"dev": "tests.endpoints.host_kind:KIND"})

    with make_rig() as rig, pytest.raises(UsageError, match="can't be emulated"):
        make_endpoint("dev,bits=40", "00:06.0", rig.memory, rig.dma, rig.loop)
