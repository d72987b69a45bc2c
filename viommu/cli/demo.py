"""``viommu demo``: a guest's drivers in Python, the real server, and what each step means."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click
from rich.text import Text

from viommu.cli.console import make_console
from viommu.cli.demo_server import DemoServer
from viommu.cli.exit_codes import CliError, ExitCode
from viommu.cli.iova_picture import FaultMark, Piece, PieceKind, about, draw, segments
from viommu.cli.lanes import Lane
from viommu.cli.timeline import Actor, ClaimError, Mark, Timeline
from viommu.endpoints.edu_registers import IDENTIFICATION, Register, Result
from viommu.errors import Access, ViommuError
from viommu.spec import virtio_blk
from viommu.spec import virtio_iommu as spec
from viommu.spec.virtio_iommu import FaultReason, Status
from viommu.testing.blk_driver import BlkDriver, BlkError
from viommu.testing.edu_driver import EduDriver
from viommu.testing.guest_ram import PAGE, GuestRam
from viommu.testing.iommu_driver import (
    FaultReport,
    IommuDriver,
    MappedDma,
    Reserved,
    map_request,
    unmap_request,
)
from viommu.vfio_user.client import Client
from viommu.vmm import Bdf, parse_viot, socket_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from viommu.testing.guest_ram import DmaBuffer
    from viommu.virtio.ring_memory import RingMemory

__all__ = ["demo"]

GUEST: Final = Actor("guest", "bold cyan")
SERVER: Final = Actor("viommu", "bold green")
EDU: Final = Actor("edu", "bold magenta")
DISK: Final = Actor("disk", "bold blue")
HOST: Final = Actor("host", "bold")

IOMMU_AT: Final = Bdf(0, 5, 0)
EDU_AT: Final = Bdf(0, 6, 0)
DISK_AT: Final = Bdf(0, 7, 0)

DISK_DOMAIN: Final = 1
EDU_DOMAIN: Final = 2
DISK_SPACE: Final = 0x10_0000  # where the IOVAs of the disk's driver begin
SOURCE: Final = 0x40_0000  # the IOVAs of edu's two pages
TARGET: Final = 0x50_0000
STRAY: Final = 0xDEA_D000

DISK_SIZE: Final = 1 << 20
TRANSFER: Final = 64 << 10
SECTOR: Final = 128
RAM_SIZE: Final = 32 << 20
HOLD_MS: Final = 400
UNMAP_AFTER: Final = 0.08  # seconds into the hold
READ_UNTIL: Final = 0.24

TITLE: Final = "A virtio-iommu between devices and memory"


@click.command()
def demo() -> int:
    """Show what a virtio-iommu does, without a virtual machine.

    Starts `viommu serve` and drives it over its sockets with a guest's drivers
    written in Python: attach, map, disk I/O, stray accesses, an unmap while a
    device holds the memory, detach. Everything that is shown is verified; exit
    code 1 when something that is claimed did not happen.
    """
    console = make_console()
    timeline = Timeline(console)
    with tempfile.TemporaryDirectory(prefix="viommu-demo-") as home:
        play(timeline, Path(home))
    console.print()
    console.print(
        Text(
            f"{timeline.claims} claims verified in {timeline.now():.1f} s. "
            "Next: `viommu serve --help` has a virtual machine to copy.",
            style="bold green",
        ),
        width=timeline.width,
    )
    return ExitCode.OK


def play(timeline: Timeline, home: Path) -> None:
    """Play every scene, with the server and its disk in ``home``.

    Raises:
        CliError: Something that is claimed did not happen.
    """
    disk = home / "disk.img"
    disk.write_bytes(bytes(DISK_SIZE))
    timeline.picture(TITLE, _cast(ascii_only=timeline.ascii_only))
    timeline.chapter(
        "A server, and a guest that finds it",
        "`viommu serve` runs as a process of its own. Each PCI function has a socket; over it a "
        "virtual machine monitor, here this process, speaks vfio-user and shares guest memory as "
        "a file descriptor. An ACPI table, the VIOT, tells the guest what is behind the IOMMU.",
    )
    server = DemoServer(
        home / "run",
        [
            *("--iommu", str(IOMMU_AT), "--endpoint", f"{EDU_AT}=edu"),
            *("--endpoint", f"{DISK_AT}=blk,path={disk}"),
        ],
    )
    with server:
        try:
            with timeline.step(HOST, "start `viommu serve`: an edu, a disk") as step:
                step.done(f"ready, process {server.start()}")
            _scenes(timeline, server, disk)
        except (ClaimError, ViommuError, BlkError, TimeoutError) as error:
            said = f"; the server said: {server.log}" if server.log else ""
            raise CliError(
                f"the demo failed: {error}{said}; please report it with `viommu doctor`"
            ) from error


def _cast(*, ascii_only: bool) -> Iterator[Text]:
    """Yield the lines that say who plays: drivers on the left, the server on the right."""
    line, arrow = ("-", "->") if ascii_only else ("─", "─▶")
    yield Text(f"{'this process':<29}process `viommu serve`")
    for driver, means, bdf, actor, does in (
        ("virtio-iommu driver", "requests", IOMMU_AT, SERVER, "decides what devices may reach"),
        ("virtio-blk driver", "requests", DISK_AT, DISK, "does DMA, if it may"),
        ("edu driver", "registers", EDU_AT, EDU, "does DMA, if it may"),
    ):
        yield Text.assemble(
            (f"{driver:<20}", GUEST.style),
            (f"{line} {means} {line * (9 - len(means))}{arrow} ", "dim"),
            f"{bdf} ",
            (f"{actor.name:<7}", actor.style),
            does,
        )


def _scenes(timeline: Timeline, server: DemoServer, disk: Path) -> None:
    with contextlib.ExitStack() as stack:
        scene = _Scene(timeline, server, stack)
        scene.find()
        scene.probe()
        scene.nothing_attached()
        scene.map_the_disk()
        scene.read_and_write(disk)
        scene.stray()
        scene.unmap_in_flight()
        scene.detach()
    with timeline.step(HOST, "SIGTERM to the server") as step:
        code = server.stop()
        timeline.claim(code == 0, f"the server ends cleanly, not with exit code {code}")
        timeline.claim(not server.directory.exists(), "the server removes what it made")
        step.done("exit code 0, nothing is left")


class _Blocked(NamedTuple):
    """An access that must be blocked, and what the guest must be told about it."""

    actor: Actor
    what: str
    access: Callable[[], bool]  # whether it was blocked, as the device sees it
    report: FaultReport


class _Scene:
    """The guest: memory, drivers, and what it has seen. Scenes are played in order."""

    def __init__(self, timeline: Timeline, server: DemoServer, stack: contextlib.ExitStack) -> None:
        self._timeline = timeline
        self._server = server
        self._stack = stack
        self._claim = timeline.claim
        self._reports = 0
        self._ram = stack.enter_context(GuestRam(RAM_SIZE))
        self._clients: dict[Bdf, Client] = {}
        self._reserved: list[Reserved] = []
        self._faults: list[tuple[int, FaultMark]] = []  # with the endpoint
        self._labels: dict[int, str] = {}
        self._pages: dict[int, int] = {}  # IOVA to GPA

    # -- scenes -------------------------------------------------------------

    def find(self) -> None:
        """Read the VIOT, connect, and start the driver of the IOMMU."""
        with self._timeline.step(GUEST, "read the VIOT from the firmware") as step:
            table = parse_viot((self._server.directory / "viot.aml").read_bytes())
            self._claim(not table.problems, f"the VIOT is in order: {table.problems}")
            self._claim(table.iommus == [IOMMU_AT], "the VIOT names the IOMMU")
            found = {EDU_AT: EDU_AT.number, DISK_AT: DISK_AT.number}
            self._claim(table.endpoints == found, "the VIOT names both endpoints")
            step.done(", ".join(f"{bdf} is endpoint {id_:#x}" for bdf, id_ in found.items()))
        with self._timeline.step(GUEST, "connect to three sockets, share memory") as step:
            for bdf in (IOMMU_AT, EDU_AT, DISK_AT):
                self._clients[bdf] = self._connect(bdf)
            step.done(f"{about(RAM_SIZE)} as a memfd, seen by all")
        with self._timeline.step(GUEST, "start the virtio-iommu driver") as step:
            self._iommu = self._stack.enter_context(IommuDriver(self._clients[IOMMU_AT], self._ram))
            config = self._iommu.config
            self._end = config.input_range.end + 1
            pages = (1 << bit for bit in range(64) if config.page_size_mask >> bit & 1)
            self._claim(config.bypass == 0, "endpoints are not in bypass at boot")
            bits = self._end.bit_length() - 1
            step.done(f"pages of {', '.join(map(about, pages))}; IOVAs of {bits} bits")
        with self._timeline.step(GUEST, "start the driver of edu") as step:
            self._edu = self._stack.enter_context(EduDriver(self._clients[EDU_AT]))
            step.done("a device with a DMA engine")

    def probe(self) -> None:
        """Ask what can't be mapped."""
        self._timeline.chapter(
            "PROBE: what can't be mapped",
            "On x86 a write to 0xfee00000 and the megabyte behind it is an interrupt, never a "
            "memory access. The guest asks, and leaves that window alone.",
        )
        with self._timeline.step(GUEST, f"PROBE endpoint {DISK_AT.number:#x}") as step:
            status, self._reserved = self._iommu.probe(DISK_AT.number)
            self._expect(status, Status.OK, "PROBE")
            window = Reserved(0xFEE00000, 0xFEF00000, spec.ReservedKind.MSI)
            self._claim(self._reserved == [window], "PROBE reports the MSI window")
            step.done(f"[{window.start:#x}, {window.end:#x}): interrupts")

    def nothing_attached(self) -> None:
        """Let edu write before anybody attached it."""
        self._timeline.chapter(
            "Before ATTACH: nothing gets through",
            "An endpoint that the guest has not attached to a domain is blocked. edu tries to "
            "write to memory all the same. The device sees an error, the guest a fault report.",
        )
        canary = self._ram.pages.allocate(PAGE)
        self._ram.memory.write(canary, b"untouched")
        self._blocked(
            _Blocked(
                EDU,
                f"write 4 KiB at {canary:#x}",
                lambda: self._edu.write_memory(canary, PAGE) == Result.TRANSLATION_FAULT,
                self._report(EDU_AT, canary, Access.WRITE, FaultReason.DOMAIN),
            )
        )
        self._claim(self._ram.memory.read(canary, 9) == b"untouched", "memory is as it was")
        # This one was at no IOVA: it has no place in a picture.
        self._faults.clear()

    def map_the_disk(self) -> None:
        """Attach the disk, map its rings and buffers, and start its driver."""
        self._timeline.chapter(
            "ATTACH and MAP: a domain of its own",
            "A domain is an address space for devices. The guest puts the disk into domain "
            f"{DISK_DOMAIN}, then maps exactly what the disk needs: its ring, a page for "
            "requests, a buffer. Addresses in there are IOVAs; the IOMMU turns them into guest "
            "physical addresses (GPAs).",
        )
        self._attach(DISK_AT, DISK_DOMAIN)
        self._space = _Labelled(MappedDma(self._iommu, DISK_DOMAIN, DISK_SPACE), self._labels)
        with self._timeline.step(GUEST, "MAP and start the virtio-blk driver") as step:
            self._space.names = ["the disk's ring", "its request page"]
            self._disk = self._stack.enter_context(BlkDriver(self._clients[DISK_AT], self._space))
            self._space.names = ["the disk's buffer"]
            self._buffer = self._space.allocate(TRANSFER)
            self._claim(
                self._disk.capacity * virtio_blk.SECTOR_SIZE == DISK_SIZE, "the disk has its size"
            )
            step.done(f"3 mappings; a disk of {about(DISK_SIZE)}")
        with self._timeline.step(GUEST, "MAP over the interrupt window") as step:
            window = self._reserved[0]
            status = self._iommu.map(DISK_DOMAIN, window.start, 0, PAGE)
            self._expect(status, Status.INVAL, "MAP over a reserved region")
            step.done("refused: INVAL", Mark.BLOCKED)
        self._picture(DISK_AT, DISK_DOMAIN)

    def read_and_write(self, image: Path) -> None:
        """Write to the disk, look at its file, and read back."""
        self._timeline.chapter(
            "Disk I/O through the IOMMU",
            "The disk takes requests from a ring and moves data, all at IOVAs. The bytes are "
            "compared three times: in the guest, in the file on the host, and read back.",
        )
        data = b"".join(hashlib.sha256(bytes([n % 256, n // 256])).digest() for n in range(2048))
        digest = hashlib.sha256(data).hexdigest()[:12]
        address = self._buffer.address
        with self._timeline.step(DISK, f"write {about(TRANSFER)} from {address:#x}") as step:
            self._space.memory.write(address, data)
            begin = time.monotonic()
            status = self._disk.request(
                virtio_blk.RequestType.OUT, SECTOR, readable=[(address, TRANSFER)]
            )
            self._disk.flush()
            spent = time.monotonic() - begin
            self._claim(status == virtio_blk.Status.OK, f"the disk writes, not status {status}")
            step.done(f"{spent * 1e3:.1f} ms, SHA-256 {digest}...")
        with self._timeline.step(HOST, "look into the file of the disk") as step:
            offset = SECTOR * virtio_blk.SECTOR_SIZE
            self._claim(
                image.read_bytes()[offset : offset + TRANSFER] == data, "the file has the bytes"
            )
            step.done(f"the same bytes at offset {offset}")
        with self._timeline.step(DISK, f"read them back to {address:#x}") as step:
            self._space.memory.write(address, bytes(TRANSFER))
            self._claim(self._read_disk() == virtio_blk.Status.OK, "the disk reads")
            self._claim(self._space.memory.read(address, TRANSFER) == data, "the bytes are back")
            step.done("equal, byte for byte")

    def stray(self) -> None:
        """Give edu two pages and let it touch more."""
        self._timeline.chapter(
            "Stray accesses: blocked, and reported",
            f"edu gets domain {EDU_DOMAIN} with two pages: one to read, one to read and write. "
            "Whatever else it touches is stopped, and the event queue tells the guest which "
            "endpoint did what at which address. The disk's domain is another world.",
        )
        self._attach(EDU_AT, EDU_DOMAIN)
        self._map_page(SOURCE, Access.READ, "edu's source")
        self._map_page(TARGET, Access.READ | Access.WRITE, "edu's target")
        with self._timeline.step(EDU, f"copy {SOURCE:#x} to {TARGET:#x}") as step:
            text = b"moved by DMA, at addresses that only edu's domain has"
            self._ram.memory.write(self._pages[SOURCE], text)
            results = (
                self._edu.read_memory(SOURCE, PAGE),
                self._edu.write_memory(TARGET, PAGE),
            )
            self._claim(results == (Result.OK, Result.OK), f"edu copies, not {results}")
            moved = self._ram.memory.read(self._pages[TARGET], len(text))
            self._claim(moved == text, "the copy is equal")
            step.done("equal")
        self._blocked(
            _Blocked(
                EDU,
                f"write to {SOURCE:#x}, mapped for reading",
                lambda: self._edu.write_memory(SOURCE, PAGE) == Result.TRANSLATION_FAULT,
                self._report(EDU_AT, SOURCE, Access.WRITE),
            )
        )
        self._blocked(
            _Blocked(
                EDU,
                f"read at {STRAY:#x}, not mapped",
                lambda: self._edu.read_memory(STRAY, 64) == Result.TRANSLATION_FAULT,
                self._report(EDU_AT, STRAY, Access.READ),
            )
        )
        self._blocked(
            _Blocked(
                EDU,
                f"read at {self._buffer.address:#x}, the disk's buffer",
                lambda: self._edu.read_memory(self._buffer.address, 64) == Result.TRANSLATION_FAULT,
                self._report(EDU_AT, self._buffer.address, Access.READ),
            )
        )
        self._blocked(
            _Blocked(
                DISK,
                f"read a sector into {STRAY:#x}, not mapped",
                lambda: (
                    self._disk.request(virtio_blk.RequestType.IN, SECTOR, writable=[(STRAY, 512)])
                    == virtio_blk.Status.IOERR
                ),
                self._report(DISK_AT, STRAY, Access.WRITE),
            )
        )
        with self._timeline.step(DISK, "read again, into its buffer") as step:
            self._claim(self._read_disk() == virtio_blk.Status.OK, "the disk goes on")
            step.done("OK: only the stray access failed")
        self._picture(EDU_AT, EDU_DOMAIN)

    def unmap_in_flight(self) -> None:
        """Unmap a page while edu holds it."""
        self._timeline.chapter(
            "UNMAP meets a DMA in flight",
            f"edu starts a write and holds its page for {HOLD_MS} ms: the page is exported. The "
            "guest unmaps it meanwhile. When it is told that the page is its own again, that must "
            "be true, so the reply waits until edu has let go. Requests behind it wait, too; "
            "everything else goes on.",
        )
        self._edu.hold(HOLD_MS)
        self._ram.memory.write(self._pages[TARGET], bytes(PAGE))
        begun = time.monotonic()
        self._edu.start_write(TARGET, PAGE)
        held = self._server.snapshot()
        exports = next(e for e in held["endpoints"] if e["bdf"] == str(EDU_AT))["held"]
        self._claim(exports == [[TARGET, PAGE, 1]], f"the page is exported once: {exports}")

        statuses = self._read_until(begun + UNMAP_AFTER)
        sent = time.monotonic()
        unmap, behind = self._iommu.submit(
            unmap_request(EDU_DOMAIN, TARGET, PAGE),
            map_request(EDU_DOMAIN, STRAY, self._pages[TARGET], PAGE, Access.READ),
        )
        statuses += self._read_until(begun + READ_UNTIL)
        read = time.monotonic()
        self._claim(self._edu.read(Register.ID) == IDENTIFICATION, "edu's registers answer")
        waiting = self._server.snapshot()["iommu"]["waiting"]
        early = self._iommu.is_done(unmap) or self._iommu.is_done(behind)

        reply = self._iommu.wait(unmap)
        replied = time.monotonic()
        after = self._iommu.wait(behind)
        self._claim(self._edu.wait() == Result.OK, "the held transfer ends well")
        exported, faulted, released = (moment / 1e9 for moment in self._edu.times)
        self._claim(waiting == 1 and not early, "UNMAP and the MAP behind it wait")
        self._claim(set(statuses) == {virtio_blk.Status.OK}, "the disk reads on")
        self._claim(read < released, "the disk was read while edu held the page")
        self._claim(sent <= faulted <= released <= replied, "the reply comes after the release")
        self._claim(released - exported >= HOLD_MS / 1e3, f"edu held the page for {HOLD_MS} ms")
        self._expect(reply.status, Status.OK, "UNMAP")
        self._expect(after.status, Status.OK, "the MAP behind it")
        moved = self._ram.memory.read(self._pages[TARGET], 12)
        self._claim(moved == b"moved by DMA", "the data was there before the reply")

        late, held_for = (replied - released) * 1e3, (released - exported) * 1e3
        for moment, actor, what, result, mark in (
            (exported, EDU, f"export {TARGET:#x}, start writing", "holds the page", Mark.OK),
            (sent, GUEST, f"UNMAP {TARGET:#x}, and a MAP behind it", "sent", Mark.OK),
            (faulted, SERVER, "tell edu that the page goes away", "UNMAP waits", Mark.WAITED),
            (read, DISK, "read, again and again, until now", f"{len(statuses)} reads", Mark.OK),
            (released, EDU, "finish, release the page", f"held it {held_for:.1f} ms", Mark.OK),
            (
                replied,
                SERVER,
                "reply to UNMAP, then to the MAP",
                f"OK, {late:.1f} ms later",
                Mark.OK,
            ),
        ):
            self._timeline.row(self._timeline.at(moment), actor, what, result, mark)
        self._timeline.lanes(
            "Who was busy when:",
            [
                Lane(EDU.name, EDU.style, exported, released, "holds the page"),
                Lane(GUEST.name, GUEST.style, sent, replied, "waits for UNMAP"),
                Lane(DISK.name, DISK.style, begun, read, "reads"),
            ],
        )
        self._timeline.picture(
            f"Domain {EDU_DOMAIN} while edu held the page:", self._draw(EDU_AT, EDU_DOMAIN, held)
        )
        self._edu.hold(0)
        self._blocked(
            _Blocked(
                EDU,
                f"write to {TARGET:#x} once more",
                lambda: self._edu.write_memory(TARGET, PAGE) == Result.TRANSLATION_FAULT,
                self._report(EDU_AT, TARGET, Access.WRITE),
            )
        )

    def detach(self) -> None:
        """Take both endpoints out of their domains, and compare the server's counters."""
        self._timeline.chapter(
            "DETACH: the end of a domain",
            "With its last endpoint a domain and its mappings are gone, and the endpoints are "
            "blocked again. The server's own counters (`viommu inspect`) tell the same story.",
        )
        reports = self._reports
        self._disk.close()
        for bdf, domain in ((DISK_AT, DISK_DOMAIN), (EDU_AT, EDU_DOMAIN)):
            with self._timeline.step(GUEST, f"DETACH {bdf} from domain {domain}") as step:
                self._expect(self._iommu.detach(domain, bdf.number), Status.OK, "DETACH")
                step.done("OK")
        self._blocked(
            _Blocked(
                EDU,
                f"read at {SOURCE:#x}, mapped a moment ago",
                lambda: self._edu.read_memory(SOURCE, 64) == Result.TRANSLATION_FAULT,
                self._report(EDU_AT, SOURCE, Access.READ, FaultReason.DOMAIN),
            )
        )
        with self._timeline.step(HOST, "look at the server's counters") as step:
            snapshot = self._server.snapshot()
            counters = snapshot["iommu"]["counters"]
            self._claim(snapshot["domains"] == [], "no domain is left")
            self._claim(counters["parked"] == 1, f"one request waited: {counters}")
            self._claim(counters["faults"] == self._reports > reports, f"all faults: {counters}")
            self._claim(self._iommu.faults() == [], "no fault report is left over")
            step.done(f"{counters['requests']} requests, {counters['faults']} faults, 1 waited")

    # -- what scenes are made of ----------------------------------------------

    def _connect(self, bdf: Bdf) -> Client:
        client = self._stack.enter_context(Client(self._server.directory / socket_name(bdf)))
        self._ram.give(client)
        return client

    def _expect(self, status: int | None, wanted: Status, what: str) -> None:
        self._claim(status == wanted, f"{what} is answered with {wanted.name}, not {status}")

    def _attach(self, bdf: Bdf, domain: int) -> None:
        with self._timeline.step(GUEST, f"ATTACH {bdf} to domain {domain}") as step:
            self._expect(self._iommu.attach(domain, bdf.number), Status.OK, "ATTACH")
            step.done("OK")

    def _map_page(self, iova: int, access: Access, label: str) -> None:
        gpa = self._ram.pages.allocate(PAGE)
        self._pages[iova] = gpa
        self._labels[iova] = label
        kind = "read and write" if Access.WRITE in access else "read only"
        with self._timeline.step(GUEST, f"MAP {iova:#x} to GPA {gpa:#x}, {kind}") as step:
            self._expect(self._iommu.map(EDU_DOMAIN, iova, gpa, PAGE, access), Status.OK, "MAP")
            step.done("OK")

    def _read_disk(self) -> int | None:
        return self._disk.request(
            virtio_blk.RequestType.IN, SECTOR, writable=[(self._buffer.address, TRANSFER)]
        )

    def _read_until(self, moment: float) -> list[int | None]:
        statuses = [self._read_disk()]
        while time.monotonic() < moment:
            statuses.append(self._read_disk())
        return statuses

    def _report(
        self, bdf: Bdf, address: int, access: Access, reason: int = FaultReason.MAPPING
    ) -> FaultReport:
        flags = spec.FAULT_F_WRITE if Access.WRITE in access else spec.FAULT_F_READ
        return FaultReport(reason, flags | spec.FAULT_F_ADDRESS, bdf.number, address)

    def _blocked(self, attempt: _Blocked) -> None:
        """Have a device try, see that it is blocked, and read the fault report."""
        with self._timeline.step(attempt.actor, attempt.what) as step:
            self._claim(attempt.access(), f"{attempt.what}: the device sees an error")
            step.done("blocked, the device sees an error", Mark.BLOCKED)
        wanted = attempt.report
        with self._timeline.step(GUEST, "take the fault report") as step:
            report = self._iommu.next_fault()
            self._claim(report == wanted, f"the report is {wanted}, not {report}")
            kind = "write" if report.flags & spec.FAULT_F_WRITE else "read"
            reason = FaultReason(report.reason).name.lower()
            step.done(
                f"endpoint {report.endpoint:#x}, {kind} at {report.address:#x}, reason {reason}"
            )
            self._reports += 1
            self._faults.append((report.endpoint, FaultMark(report.address, f"{kind} blocked")))

    def _picture(self, bdf: Bdf, domain: int) -> None:
        title = f"The IOVA space of domain {domain}, {bdf}:"
        self._timeline.picture(title, self._draw(bdf, domain, self._server.snapshot()))

    def _draw(self, bdf: Bdf, domain: int, snapshot: dict[str, Any]) -> Iterator[Text]:
        """Draw a domain as the server's snapshot has it, with the faults of one endpoint."""
        found = next(d for d in snapshot["domains"] if d["id"] == domain)
        pieces = [
            Piece(start, start + size, PieceKind.MAPPED, self._mapped(start, gpa, size, access))
            for start, size, gpa, access in found["ranges"]
        ]
        endpoint = next(e for e in snapshot["endpoints"] if e["bdf"] == str(bdf))
        pieces += (
            Piece(start, start + size, PieceKind.EXPORTED, f"exported: {bdf} holds it")
            for start, size, _ in endpoint["held"]
        )
        pieces += (
            Piece(region.start, region.end, PieceKind.RESERVED, "reserved: interrupts (MSI)")
            for region in self._reserved
        )
        faults = [fault for number, fault in self._faults if number == bdf.number]
        boxes = list(segments(pieces, faults, self._end))
        return draw(boxes, ascii_only=self._timeline.ascii_only)

    def _mapped(self, iova: int, gpa: int, size: int, access: str) -> str:
        label = self._labels.get(iova, "a mapping")
        return f"{label}: {about(size)} at GPA {gpa:#x}, {access}"


class _Labelled:
    """Mapped DMA memory that gives each buffer its name for the picture."""

    def __init__(self, dma: MappedDma, labels: dict[int, str]) -> None:
        self._dma = dma
        self._labels = labels
        self.names: Sequence[str] = ()

    @property
    def memory(self) -> RingMemory:
        """The buffers' contents, by IOVA."""
        return self._dma.memory

    def allocate(self, size: int) -> DmaBuffer:
        """Return a mapped buffer, which gets the first of :attr:`names`."""
        buffer = self._dma.allocate(size)
        self._labels[buffer.address], *self.names = self.names or ["a buffer"]
        return buffer

    def free(self, buffer: DmaBuffer) -> None:
        """Unmap a buffer."""
        self._dma.free(buffer)
