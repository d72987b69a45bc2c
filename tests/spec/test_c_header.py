from __future__ import annotations

import pytest

from tests.spec import c_header
from tests.spec.c_header import c_constants, c_layout


def test_layout_and_constants_of_a_known_header() -> None:
    layout = c_layout("linux/virtio_ring.h", "struct vring_desc", ["addr", "next"])
    constants = c_constants(
        "linux/virtio_ring.h", ["VRING_DESC_F_INDIRECT", "sizeof(struct vring_desc)"]
    )
    if layout is None or constants is None:
        pytest.skip("no C compiler, or no kernel headers")
    assert layout == {"addr": (0, 8), "next": (14, 2)}
    assert constants == {"VRING_DESC_F_INDIRECT": 4, "sizeof(struct vring_desc)": 16}


def test_a_misspelt_field_or_constant_is_no_silent_pass() -> None:
    if c_layout("linux/virtio_ring.h", "struct vring_desc", []) is None:
        pytest.skip("no C compiler, or no kernel headers")
    with pytest.raises(AssertionError, match="adress"):
        c_layout("linux/virtio_ring.h", "struct vring_desc", ["adress"])
    with pytest.raises(AssertionError, match="VRING_NOPE"):
        c_constants("linux/virtio_ring.h", ["VRING_NOPE"])


@pytest.mark.parametrize("header", ["linux/no_such_header_of_ours.h"])
def test_a_missing_header_answers_none(header: str) -> None:
    assert c_layout(header, "struct vring_desc", []) is None
    assert c_constants(header, ["VRING_DESC_F_NEXT"]) is None


def test_a_missing_compiler_answers_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    c_header._evaluate.cache_clear()
    assert c_layout("linux/virtio_ring.h", "struct vring_desc", []) is None
    c_header._evaluate.cache_clear()
