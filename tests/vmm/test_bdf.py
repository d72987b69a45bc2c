from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viommu.errors import UsageError
from viommu.vmm.bdf import Bdf


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("00:05.0", Bdf(0, 5, 0)),
        ("0000:00:05.0", Bdf(0, 5, 0)),
        ("ff:1f.7", Bdf(255, 31, 7)),
        ("FF:1F.7", Bdf(255, 31, 7)),
        ("0:5.0", Bdf(0, 5, 0)),
    ],
)
def test_parse(text: str, expected: Bdf) -> None:
    assert Bdf.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a PCI address"),
        ("00:05", "not a PCI address"),
        ("00.05.0", "not a PCI address"),
        ("00:05.0 ", "not a PCI address"),
        ("100:05.0:1", "not a PCI address"),
        ("-1:05.0", "not a PCI address"),
        ("00:0\N{ARABIC-INDIC DIGIT FIVE}.0", "not a PCI address"),
        ("0001:00:05.0", "only segment 0000"),
        ("00:20.0", "device numbers end at 1f"),
        ("00:05.8", "function numbers end at 7"),
        ("00:05.10", "function numbers end at 7"),
    ],
)
def test_parse_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        Bdf.parse(text)

    assert repr(text) in str(caught.value)


@given(st.integers(0, 0xFFFF))
def test_number_and_text_are_the_same_address(number: int) -> None:
    bdf = Bdf.from_number(number)

    assert bdf.number == number
    assert Bdf.parse(str(bdf)) == bdf


def test_text_is_lspcis() -> None:
    assert str(Bdf(0, 0x1D, 7)) == "00:1d.7"
    assert Bdf(1, 2, 3).number == 0x113
