from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viommu.errors import PeerError
from viommu.spec import vfio
from viommu.vfio_user import RegionInfo
from viommu.vfio_user.region_info import decode_region_info, encode_region_info

U64 = st.integers(0, 2**64 - 1)
FLAGS = st.integers(0, 7)


@given(
    st.builds(
        RegionInfo, U64, FLAGS, st.none(), U64, st.lists(st.tuples(U64, U64), max_size=4).map(tuple)
    ),
    st.integers(0, 8),
)
def test_what_is_encoded_is_decoded(info: RegionInfo, index: int) -> None:
    whole = 32 + (16 + 16 * len(info.areas) if info.areas else 0)
    payload, complete = encode_region_info(info, index, whole)
    assert complete
    assert len(payload) == whole
    assert decode_region_info(payload, index) == (whole, info)
    if info.areas:
        payload, complete = encode_region_info(info, index, whole - 1)
        assert not complete
        assert decode_region_info(payload, index) == (whole, info._replace(areas=()))


def answer(
    *, flags: int = vfio.REGION_INFO_FLAG_CAPS, index: int = 0, cap_offset: int = 32, caps: bytes
) -> bytes:
    return vfio.REGION_INFO.pack(32 + len(caps), flags, index, cap_offset, 0, 0) + caps


@pytest.mark.parametrize(
    "payload",
    [
        bytes(31),
        answer(index=1, caps=b""),
        answer(cap_offset=33, caps=bytes(8)),
        answer(cap_offset=2**32 - 1, caps=bytes(8)),
        answer(caps=vfio.CAP_HEADER.pack(9, 1, 32)),
        answer(caps=vfio.CAP_HEADER.pack(9, 1, 40) + vfio.CAP_HEADER.pack(9, 1, 32)),
        answer(caps=vfio.SPARSE_MMAP.pack(1, 1, 0, 1, 0)),
        answer(caps=vfio.SPARSE_MMAP.pack(1, 1, 0, 2**32 - 1, 0) + bytes(16)),
        answer(caps=vfio.CAP_HEADER.pack(1, 1, 0)),
    ],
    ids=[
        "short",
        "another region",
        "capability across the end",
        "capability far away",
        "endless chain",
        "circle",
        "areas missing",
        "too many areas",
        "half a capability",
    ],
)
def test_nonsense_is_told(payload: bytes) -> None:
    with pytest.raises(PeerError) as caught:
        decode_region_info(payload, 0)
    assert caught.value.errno == errno.EPROTO


def test_unknown_capabilities_are_passed_over() -> None:
    caps = vfio.CAP_HEADER.pack(16, 1, 40) + vfio.SPARSE_MMAP.pack(1, 1, 0, 1, 0)
    caps += vfio.SPARSE_MMAP_AREA.pack(4096, 8192)
    assert decode_region_info(answer(caps=caps), 0)[1].areas == ((4096, 8192),)


def test_capabilities_need_their_flag() -> None:
    caps = vfio.SPARSE_MMAP.pack(1, 1, 0, 0, 0)
    assert decode_region_info(answer(flags=3, caps=caps), 0)[1] == RegionInfo(0, 3)
