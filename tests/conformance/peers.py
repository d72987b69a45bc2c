"""What three other implementations do, row by row: facts read in their sources, not run.

Versions read: QEMU 9.2 development (2024-11), crosvm f1e797a (2026-08-21), Cloud
Hypervisor ae44c29 (2026-08-22). Later versions may differ.
"""

from __future__ import annotations

from typing import NamedTuple

from tests.conformance.rows import ROWS

__all__ = ["PEERS", "Peers"]


class Peers(NamedTuple):
    """A cell each: "yes", "no: how", "partly: how", or why it does not apply."""

    qemu: str
    crosvm: str
    cloud_hypervisor: str


_ALL_FOLLOW = Peers("yes", "yes", "yes")
_NO_EVENT_QUEUE = "no event queue"
_NOT_COMPARED = "no: never compared"

PEERS = {
    "FB1": _ALL_FOLLOW,
    "FB2": Peers("yes (since 7.0)", "offers neither", "yes"),
    "FB3": Peers("yes", "offers neither", "yes"),
    "CF1": _ALL_FOLLOW,
    "CF2": Peers(
        "yes",
        "no bypass",
        "no: the field reads 0 while unattached endpoints are mapped one to one at boot, and only "
        "emulated ones obey it",
    ),
    "CF3": Peers("yes", "no bypass", "partly: sticky, but lost over snapshot and restore"),
    "CF4": Peers(
        "yes: any other write breaks the device until reset",
        "no bypass",
        "yes: takes the lowest bit",
    ),
    "IN1": Peers(
        "yes",
        "partly: cannot be reset at all",
        "no: endpoints, domains and host maps survive",
    ),
    "OP1": Peers("yes, but MAP says OK when VFIO refused", "yes", "yes"),
    "OP2": Peers("no: writes UNSUPP, length 4", "yes", "yes (since 2026-05)"),
    "OP3": _ALL_FOLLOW,
    "OP4": Peers(
        "yes",
        "yes, one documented leak within a VFIO group",
        "no: see CF2",
    ),
    "OP5": Peers(
        "no: the device breaks and the buffers never come back",
        "yes",
        "yes (since 2026-05; before, one bad request ended the worker)",
    ),
    "OP6": Peers("no: never checked", "no: never checked", "yes"),
    "AT1": Peers("no: not checked", "yes", "yes"),
    "AT2": Peers(
        "yes, but bypass is taken without being negotiated",
        "yes: every flag is refused",
        "yes, but bypass is taken without being negotiated",
    ),
    "AT3": Peers("yes", "yes", "no: any number is accepted, without a limit"),
    "AT4": Peers(
        "yes: replays",
        "no: the second endpoint's mapper replaces the first's, nothing is replayed",
        "yes: replays",
    ),
    "AT5": Peers(
        "no: detaches first; a sole member's domain is made anew with the other flag",
        "no bypass",
        "yes",
    ),
    "AT6": Peers(
        "yes",
        "partly: a sole endpoint only; a VFIO endpoint can be attached once in its life",
        "yes",
    ),
    "AT6'": Peers(
        "no: a sole member loses all mappings",
        "no: mappings are dropped, or UNSUPP with VFIO",
        "no: maps again, fails with EEXIST and length 0",
    ),
    "AT7": Peers(_NOT_COMPARED, _NOT_COMPARED, _NOT_COMPARED),
    "AT8": Peers("yes", "yes", "no: a failed replay leaves the endpoint half mapped"),
    "DE1": _ALL_FOLLOW,
    "DE2": Peers("partly: NOENT for one that was never attached too", "yes", "no: never"),
    "DE3": Peers("yes", "no: the request's domain is ignored", "no: see DE4"),
    "DE4": Peers(
        "yes",
        "partly: UNSUPP unless it is the sole endpoint and emulated",
        "no: with a wrong domain the endpoint keeps access to its own mappings",
    ),
    "MA1": Peers(
        "no: not checked",
        "yes, but an end of 2**64 - 1 aborts the process",
        "yes",
    ),
    "MA2": _ALL_FOLLOW,
    "MA3": Peers("yes", "yes", "yes, but takes MMIO without offering it"),
    "MA4": _ALL_FOLLOW,
    "MA5": Peers("yes", "no bypass", "yes"),
    "MA6": Peers("yes", "yes", "no: flags are dropped, all is mapped to read and write"),
    "MA7": Peers("no: an inverted range is stored", "INVAL (for equal ends too)", "RANGE"),
    "MA8": Peers("no", "no", "no"),
    "MA9": Peers("yes", "no: aborts, or DEVERR", "RANGE, as for any mapping of the last byte"),
    "UN1": Peers("ignores", "ignores", "ignores"),
    "UN2": _ALL_FOLLOW,
    "UN3": Peers("yes", "no bypass", "yes"),
    "UN4": Peers(
        "no: whole mappings are removed before the split is found",
        "yes when emulated, length 0 with VFIO",
        "yes, at a cost that grows with all mappings",
    ),
    "UN5": Peers(
        "yes",
        "yes when emulated, length 0 with VFIO",
        "yes when emulated, length 0 with VFIO",
    ),
    "UN6": Peers("yes", "no: aborts on the full and on an inverted range", "RANGE"),
    "PR1": _ALL_FOLLOW,
    "PR2": Peers("yes", "yes", "no"),
    "PR3": Peers("offered", "yes where not offered (outside x86)", "offered"),
    "PR4": _ALL_FOLLOW,
    "PR5": _ALL_FOLLOW,
    "PR6": _ALL_FOLLOW,
    "PR7": Peers(
        "no: properties cut short under a DEVERR; before 9.1 an abort",
        "yes, INVAL and zeroes",
        "no: length 0",
    ),
    "PR8": Peers("yes (512 bytes)", "yes", "exactly 24 bytes, whatever the buffer"),
    "RM1": Peers("yes", "one fixed region", "one region"),
    "RM2": Peers("yes", "one fixed region", "one region"),
    "RM3": Peers("yes: overlaps are resolved", "one fixed region", "one region"),
    "RM5": Peers("MSI one to one, others fault", "unknown", "unknown"),
    "FR1": Peers("yes", _NO_EVENT_QUEUE, _NO_EVENT_QUEUE),
    "FR2": Peers("yes", _NO_EVENT_QUEUE, _NO_EVENT_QUEUE),
    "FR3": Peers("yes", _NO_EVENT_QUEUE, _NO_EVENT_QUEUE),
    "FR4": Peers(
        "address always; the kind of access only when the protection was wrong",
        _NO_EVENT_QUEUE,
        _NO_EVENT_QUEUE,
    ),
    "FR5": Peers("breaks the device", _NO_EVENT_QUEUE, _NO_EVENT_QUEUE),
    "MF1": Peers(
        "yes",
        "yes",
        "no: wants one readable and one writable descriptor",
    ),
    "XC1": Peers("yes", "yes", "no: length 0 with every rejection, so Linux sees success"),
    "XC2": Peers("perhaps not: looks up two bytes at once", "yes", "yes"),
}

if PEERS.keys() != ROWS.keys():
    raise RuntimeError(f"rows without peers, or peers without row: {PEERS.keys() ^ ROWS.keys()}")
