from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from viommu.cli.iova_picture import FaultMark, Piece, PieceKind, about, draw, segments

END = 64

KINDS = st.sampled_from([PieceKind.RESERVED, PieceKind.MAPPED, PieceKind.EXPORTED])
PIECES = st.lists(
    st.tuples(st.integers(0, END - 1), st.integers(1, END), KINDS).map(
        lambda t: Piece(t[0], min(t[0] + t[1], END), t[2], "note")
    ),
    max_size=8,
)
FAULTS = st.lists(st.integers(0, END - 1).map(lambda a: FaultMark(a, "read")), max_size=4)


@given(PIECES, FAULTS)
def test_boxes_cover_the_space_and_show_what_is_on_top(
    pieces: list[Piece], faults: list[FaultMark]
) -> None:
    boxes = list(segments(pieces, faults, END))

    assert [box.start for box in boxes] == [0, *(box.end for box in boxes[:-1])]
    assert boxes[-1].end == END
    for address in range(END):
        box = next(box for box in boxes if box.start <= address < box.end)
        kinds = [piece.kind for piece in pieces if piece.start <= address < piece.end]
        assert box.kind == max(kinds, default=PieceKind.FREE)
    assert sorted(fault for box in boxes for fault in box.faults) == sorted(faults)


def test_what_lies_beyond_the_end_is_left_out() -> None:
    (box,) = segments([Piece(70, 80, PieceKind.RESERVED, "msi")], [], END)

    assert (box.start, box.end, box.kind) == (0, END, PieceKind.FREE)


def picture(*, ascii_only: bool) -> list[str]:
    pieces = [
        Piece(0x1000, 0x4000, PieceKind.MAPPED, "ring"),
        Piece(0x2000, 0x3000, PieceKind.EXPORTED, "held by edu"),
        Piece(0x8000, 0x9000, PieceKind.RESERVED, "MSI window"),
    ]
    boxes = list(segments(pieces, [FaultMark(0x5008, "write blocked")], 0x10000))
    return [line.plain for line in draw(boxes, ascii_only=ascii_only)]


def test_picture() -> None:
    assert picture(ascii_only=False) == [
        " 0x00000 ┌────────────┐",
        "         │            │ not mapped, 4 KiB",
        " 0x01000 ├────────────┤",
        "         │████████████│ ring",
        " 0x02000 ├────────────┤",
        "         │▒▒▒▒▒▒▒▒▒▒▒▒│ held by edu",
        " 0x03000 ├────────────┤",
        "         │████████████│ (the rest of it)",
        " 0x04000 ├────────────┤",
        "         │            │ ✘ 0x5008 write blocked",
        "         │            │ not mapped, 16 KiB",
        " 0x08000 ├────────────┤",
        "         │▚▚▚▚▚▚▚▚▚▚▚▚│ MSI window",
        " 0x09000 ├────────────┤",
        "         │            │ not mapped, 28 KiB",
        " 0x10000 └────────────┘",
    ]


def test_picture_in_ascii() -> None:
    lines = picture(ascii_only=True)

    assert all(line.isascii() for line in lines)
    assert lines[9] == "         |            | ! 0x5008 write blocked"
    assert len(lines) == len(picture(ascii_only=False))


def test_no_box_is_no_picture() -> None:
    assert list(draw([])) == []


def test_sizes_for_the_eye() -> None:
    sizes = [0, 1023, 1024, 4096, 1536, 0xFEE00000, 1 << 39, 1 << 64, 1 << 75]

    assert [about(size) for size in sizes] == [
        "0 bytes",
        "1023 bytes",
        "1 KiB",
        "4 KiB",
        "1.5 KiB",
        "4 GiB",
        "512 GiB",
        "16 EiB",
        "32768 EiB",
    ]
