from __future__ import annotations

import pytest

from viommu.cli.parameters import (
    EndpointArgument,
    parse_endpoint,
    parse_page_sizes,
    parse_size,
)
from viommu.errors import UsageError
from viommu.vmm import Bdf


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4K", 4096),
        ("4k", 4096),
        ("4KiB", 4096),
        ("512M", 512 << 20),
        ("2G", 2 << 30),
        ("1TB", 1 << 40),
        ("18446744073709551615", (1 << 64) - 1),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "M", "-1", "1.5G", "0x1000", "512 M", "1P", "\N{ARABIC-INDIC DIGIT ONE}K"]
)
def test_no_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size: write"):
        parse_size(text)


def test_a_size_beyond_64_bits() -> None:
    with pytest.raises(UsageError, match="16777216T' is more than"):
        parse_size("16777216T")


@pytest.mark.parametrize(
    ("text", "mask"), [("4K", 0x1000), ("4K,2M,1G", 0x40201000), ("2M,4K,4K", 0x201000), ("1", 1)]
)
def test_page_sizes(text: str, mask: int) -> None:
    assert parse_page_sizes(text) == mask


@pytest.mark.parametrize(
    ("text", "message"),
    [("3K", "'3K' is not a power"), ("0", "'0' is not"), ("4K,", "is not a size"), ("", "size")],
)
def test_no_page_sizes(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_page_sizes(text)


def test_endpoints() -> None:
    assert parse_endpoint("00:07.0=blk,path=a=b") == EndpointArgument(Bdf(0, 7, 0), "blk,path=a=b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("edu", "is not an endpoint: write"),
        ("00:06.0=", "is not an endpoint"),
        ("edu=00:06.0", "'edu' is not a PCI address"),
    ],
)
def test_no_endpoints(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_endpoint(text)
