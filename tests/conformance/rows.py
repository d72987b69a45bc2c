"""Every statement about a virtio-iommu device that this suite tests, as data.

The clause is the standard's meaning in our own words; "expected" is what this
device does where the standard leaves a choice. Sections are those of virtio 1.2.
A row's id is the group (feature bits, config, ATTACH, ...) and an ordinal.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

__all__ = ["ROWS", "Kind", "Row"]


class Kind(enum.Enum):
    """What a row needs before it counts as tested."""

    CHECK = "check"  # seen to accept and seen to reject, in one run
    STATEMENT = "statement"  # seen to hold; nothing can be rejected


class Row(NamedTuple):
    """One statement."""

    id: str
    section: str
    kind: Kind
    clause: str
    expected: str

    @property
    def slug(self) -> str:
        """The id as it appears in the name of a test."""
        return self.id.replace("'", "_prime")


_C = Kind.CHECK
_S = Kind.STATEMENT

_TABLE = (
    Row("FB1", "5.13.3.2", _S, "Map and unmap requests are offered.", "MAP_UNMAP is offered"),
    Row(
        "FB2",
        "5.13.3.2",
        _S,
        "A new device leaves the old BYPASS bit out.",
        "BYPASS_CONFIG is offered, BYPASS is not",
    ),
    Row("FB3", "5.13.3.2", _S, "The two bypass bits exclude each other.", "never both"),
    Row(
        "CF1",
        "5.13.4.2",
        _C,
        "The page size mask has at least one bit.",
        "a configuration with mask 0 is refused when the device is built",
    ),
    Row(
        "CF2",
        "5.13.4.2, 5.13.6",
        _C,
        "An endpoint without a domain is in bypass exactly when the bypass field reads 1, "
        "whatever the driver negotiated.",
        "field and behaviour agree, at boot and after each write",
    ),
    Row(
        "CF3",
        "5.13.4.2",
        _S,
        "The bypass field outlives a device reset; a system reset restores its first value.",
        "sticky, then restored",
    ),
    Row(
        "CF4",
        "5.13.4.2",
        _C,
        "The bypass field never reads as anything but 0 or 1.",
        "writes of 0 and 1 take effect; no other write changes what is read to a third value",
    ),
    Row(
        "IN1",
        "5.13.5",
        _S,
        "A device reset leaves no endpoint attached.",
        "all domains are dropped and every mapper is emptied",
    ),
    Row(
        "OP1",
        "5.13.6.2",
        _C,
        "A request that succeeded says OK.",
        "OK when every mapper did the work, another status when one refused",
    ),
    Row(
        "OP2",
        "5.13.6.2",
        _C,
        "A request of unknown type is given back untouched.",
        "used length 0 for every unknown type, a status for every known one",
    ),
    Row(
        "OP3",
        "5.13.6.2",
        _S,
        "Reserved bytes of the head are ignored, those of the tail are written as zero.",
        "any head padding is accepted; tail padding is zero in every reply",
    ),
    Row(
        "OP4",
        "5.13.6.2",
        _C,
        "An endpoint that has no domain and is not in bypass cannot reach guest memory.",
        "the access is blocked and can be reported",
    ),
    Row(
        "OP5",
        "5.13.6",
        _C,
        "A request too short to be understood, or without room for its status, is given back "
        "untouched.",
        "used length 0, and the buffers do come back",
    ),
    Row(
        "OP6",
        "5.13.6",
        _C,
        "Mapping requests that leave the input range fail.",
        "RANGE for MAP and UNMAP, at both ends",
    ),
    Row("AT1", "5.13.6.3.2", _C, "Reserved bytes of ATTACH are zero.", "INVAL"),
    Row("AT2", "5.13.6.3.2", _C, "ATTACH carries known flags only.", "INVAL"),
    Row("AT3", "5.13.6.3.2", _C, "The endpoint of an ATTACH exists.", "NOENT"),
    Row(
        "AT4",
        "5.13.6.3.2",
        _C,
        "A second endpoint may join a domain, or is refused as a whole.",
        "it joins and sees every mapping; a mapper that cannot take them leaves nothing behind",
    ),
    Row(
        "AT5",
        "5.13.6.3.2",
        _C,
        "The bypass flag agrees with the domain that exists already.",
        "INVAL without side effect, for the domain's only member too",
    ),
    Row(
        "AT6",
        "5.13.6.3.2",
        _C,
        "ATTACH moves an endpoint out of another domain, or says UNSUPP.",
        "it moves; UNSUPP when its mapper cannot leave a domain",
    ),
    Row(
        "AT6'",
        "5.13.6.3.2",
        _S,
        "(unsaid by the standard) ATTACH to the domain the endpoint is in already.",
        "OK, and nothing changes",
    ),
    Row(
        "AT7",
        "5.13.6.3.2",
        _C,
        "An endpoint whose properties do not fit those of the domain's other endpoints is refused.",
        "UNSUPP when its reserved regions are others than theirs",
    ),
    Row(
        "AT8",
        "5.13.6.3.2",
        _C,
        "An ATTACH that is not rejected attaches.",
        "all or nothing: a host failure at any step leaves the endpoint where it was",
    ),
    Row("DE1", "5.13.6.4.2", _S, "Reserved bytes of DETACH are ignored.", "ignored"),
    Row(
        "DE2",
        "5.13.6.4.2",
        _C,
        "The endpoint of a DETACH exists.",
        "NOENT for an unknown endpoint only, not for a known one that is unattached",
    ),
    Row(
        "DE3",
        "5.13.6.4.2",
        _C,
        "DETACH names the domain that the endpoint is in.",
        "INVAL without side effect",
    ),
    Row(
        "DE4",
        "5.13.6.4.2",
        _C,
        "After DETACH no mapping of the domain can be used by the endpoint.",
        "revoked before the reply; the reply waits for memory in use",
    ),
    Row(
        "MA1",
        "5.13.6.5.2",
        _C,
        "Both starts and the byte after the end are multiples of the granule.",
        "RANGE",
    ),
    Row("MA2", "5.13.6.5.2", _C, "No mapping exists in the range of a MAP.", "INVAL"),
    Row("MA3", "5.13.6.5.2", _C, "MAP carries known flags only.", "INVAL"),
    Row("MA4", "5.13.6.5.2", _C, "The domain of a MAP exists.", "NOENT"),
    Row("MA5", "5.13.6.5.2", _C, "The domain of a MAP is not a bypass domain.", "INVAL"),
    Row(
        "MA6",
        "5.13.6.5.2",
        _C,
        "Nothing is written through a mapping that lacks the write flag.",
        "the export is refused; likewise reads without the read flag",
    ),
    Row(
        "MA7",
        "5.13.6.5.1",
        _C,
        "(a driver's duty) The end of a MAP lies after its start.",
        "INVAL or RANGE when inverted",
    ),
    Row("MA8", "5.13.6.8.1", _C, "MAP stays clear of reserved regions.", "INVAL"),
    Row(
        "MA9",
        "5.13.6.5",
        _C,
        "Without an input range all of 2**64 bytes may be one mapping.",
        "OK when the physical range fits too, else RANGE or INVAL",
    ),
    Row("UN1", "5.13.6.6.2", _S, "Reserved bytes of UNMAP may be refused.", "ignored"),
    Row("UN2", "5.13.6.6.2", _C, "The domain of an UNMAP exists.", "NOENT"),
    Row("UN3", "5.13.6.6.2", _C, "The domain of an UNMAP is not a bypass domain.", "INVAL"),
    Row(
        "UN4",
        "5.13.6.6.2",
        _C,
        "UNMAP splits no mapping.",
        "RANGE, and none of the other mappings in the range is removed",
    ),
    Row(
        "UN5",
        "5.13.6.6.2",
        _S,
        "An UNMAP over gaps, or over nothing, removes what there is and succeeds.",
        "OK",
    ),
    Row(
        "UN6",
        "5.13.6.6",
        _C,
        "The arithmetic of UNMAP holds over 64 bits.",
        "[0, 2**64 - 1] is OK, an inverted range is INVAL or RANGE",
    ),
    Row("PR1", "5.13.6.7.2", _S, "Reserved bytes of PROBE are ignored.", "ignored"),
    Row("PR2", "5.13.6.7.2", _C, "The endpoint of a PROBE exists.", "NOENT"),
    Row(
        "PR3",
        "5.13.6.7.2",
        _S,
        "Without the feature a PROBE is given back untouched.",
        "PROBE is offered, and answered with properties and status",
    ),
    Row("PR4", "5.13.6.7.2", _S, "Reserved bits of a property are zero.", "zero"),
    Row("PR5", "5.13.6.7.2", _S, "A property's length leaves its header out.", "20 for RESV_MEM"),
    Row("PR6", "5.13.6.7.2", _S, "A property follows the one before without a gap.", "contiguous"),
    Row(
        "PR7",
        "5.13.6.7.2",
        _C,
        "A buffer smaller than the probe size gets no property.",
        "INVAL, with the status in the last four bytes of the buffer",
    ),
    Row("PR8", "5.13.6.7.2", _S, "What properties leave of the probe size is zero.", "zero"),
    Row("RM1", "5.13.6.8.1", _S, "Reserved bytes of RESV_MEM are zero.", "zero"),
    Row(
        "RM2",
        "5.13.6.8.1",
        _C,
        "An endpoint has one MSI region at the most.",
        "a second one is refused when the endpoint is added",
    ),
    Row(
        "RM3",
        "5.13.6.8.1",
        _C,
        "Reserved regions of an endpoint do not overlap.",
        "an overlap is refused when the endpoint is added",
    ),
    Row(
        "RM5",
        "5.13.6.8.1",
        _S,
        "What an endpoint does in a reserved region affects nobody else.",
        "never guest memory, neither through a mapping nor in bypass",
    ),
    Row("FR1", "5.13.6.9.2", _S, "Reserved bytes of a fault report are zero.", "zero"),
    Row("FR2", "5.13.6.9.2", _S, "Undefined flags of a fault report are zero.", "zero"),
    Row("FR3", "5.13.6.9.2", _S, "A fault report names a valid endpoint.", "the one that strayed"),
    Row(
        "FR4",
        "5.13.6.9.2",
        _S,
        "A fault report may leave the address out.",
        "given, with its flag, the kind of access and the reason",
    ),
    Row(
        "FR5",
        "5.13.6.9.2",
        _C,
        "A report is not spread over several buffers when one is too small.",
        "the small buffer comes back with length 0, the report waits for one that fits or is lost",
    ),
    Row(
        "MF1",
        "2.7.4.1",
        _S,
        "Nothing depends on how a request is cut into descriptors.",
        "scattered byte by byte, it gets the same reply",
    ),
    Row(
        "XC1",
        "5.13.6.1",
        _S,
        "(cross-cutting) A driver takes used length 0 for a failure; Linux takes it for success.",
        "every rejected request of a known type has its status and a used length that covers it",
    ),
    Row(
        "XC2",
        "5.13.6.5",
        _S,
        "(cross-cutting) An access at the last byte of a mapping uses that mapping, also when its "
        "neighbour is mapped elsewhere.",
        "translated byte by byte at both sides of the seam",
    ),
)

ROWS = {row.id: row for row in _TABLE}
