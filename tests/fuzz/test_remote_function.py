"""A device in another process that lies, dies and comes back, while a VMM does what it likes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.endpoints.remote.conftest import Rig
from tests.endpoints.remote.scripted import CONFIG, FLR, MSIX, MSIX_CAP, READ_WRITE
from viommu.deferred import Deferred
from viommu.errors import PeerError
from viommu.memory import GuestMemory
from viommu.spec import pci, vfio, virtio_pci
from viommu.spec import vfio_user as spec
from viommu.vfio_user import RegionInfo
from viommu.virtio.behind_iommu import BehindIommu
from viommu.virtio.undertaker import Undertaker

if TYPE_CHECKING:
    from tests.endpoints.remote.scripted import Scripted
    from viommu.vfio_user.protocol import Message

EXAMPLES: Final = 300
COMMON, ISR, DEVICE, NOTIFY = 0, 0x1000, 0x2000, 0x3000


class Nothing(GuestMemory):
    """Memory of a dead device that nobody has."""

    def drop_views(self) -> None:
        pass

    def leave(self) -> None:
        pass


def disk() -> Rig:
    """A rig whose device is a virtio disk, so that its undertaker has something to do."""
    rig = Rig(access_filter=BehindIommu())
    shape = rig.stage.shape
    shape.regions[4] = RegionInfo(0x4000, READ_WRITE)
    shape.put(pci.VENDOR_ID, 0x10421AF4, 4)
    shape.config[MSIX_CAP + 1] = 0xA0
    at = 0xA0
    for kind, offset, size in ((1, COMMON, 60), (3, ISR, 1), (4, DEVICE, 64), (2, NOTIFY, 4)):
        shape.config[at] = pci.CAP_ID_VENDOR
        shape.config[at + 1] = at + 16 if kind != 2 else 0
        body = virtio_pci.CAP_BODY.pack(16, kind, 4, 0, offset, size)
        shape.config[at + 2 : at + 16] = body
        at += 16
    rig.ghost = Undertaker("disk", Nothing(), rig.loop)  # type: ignore[assignment]
    return rig


LIES = st.one_of(
    st.just(None),
    st.tuples(st.just("id"), st.integers(0, 0xFFFF)),
    st.tuples(st.just("command"), st.integers(0, 30)),
    st.tuples(st.just("flags"), st.integers(0, 0xFF)),
    st.tuples(st.just("error"), st.integers(0, 2**32 - 1)),
    st.tuples(st.just("cut"), st.integers(0, 64)),
    st.tuples(st.just("payload"), st.binary(max_size=64)),
    st.tuples(st.just("patch"), st.tuples(st.integers(0, 64), st.binary(min_size=1, max_size=8))),
    st.tuples(st.just("ask"), st.tuples(st.integers(0, 30), st.binary(max_size=40))),
    st.tuples(st.just("mute"), st.none()),
)


def falsified(message: Message, reply: bytes, lie: tuple[str, Any]) -> bytes:
    """A reply with something wrong in it; its length is right, or the client would just wait."""
    ident, command, _, flags, error = spec.HEADER.unpack_from(reply)
    payload = reply[spec.HEADER_SIZE :]
    how, what = lie
    match how:
        case "id":
            ident = what
        case "command":
            command = what
        case "flags":
            flags = what
        case "error":
            flags, error = flags | spec.F_ERROR, what
        case "cut":
            payload = payload[:what]
        case "payload":
            payload = what
        case "patch":
            at, data = what
            payload = (payload[:at] + data + payload[at + len(data) :])[: len(payload)]
        case "ask":
            asked: bytes = what[1]
            size = spec.HEADER_SIZE + len(asked)
            return spec.HEADER.pack(7, what[0], size, 0, 0) + asked + reply
        case _:
            return b""
    size = spec.HEADER_SIZE + len(payload)
    return spec.HEADER.pack(ident, command, size, flags, error) + payload


STEPS = st.one_of(
    st.tuples(st.just("read"), st.sampled_from([0, 2, 4, CONFIG]), st.integers(0, 0x200)),
    st.tuples(st.just("write"), st.sampled_from([0, 2, 4, CONFIG]), st.integers(0, 0x200)),
    st.tuples(st.just("status"), st.integers(0, 255), st.none()),
    st.tuples(st.just("flr"), st.none(), st.none()),
    st.tuples(st.just("reset"), st.none(), st.none()),
    st.tuples(st.just("irq"), st.integers(0, 7), st.booleans()),
    st.tuples(st.just("vmm"), st.none(), st.none()),
    st.tuples(st.just("die"), st.booleans(), st.none()),
    st.tuples(st.just("lie"), LIES, st.none()),
    st.tuples(st.just("time"), st.sampled_from([0.0, 0.5, 5.0, 40.0]), st.none()),
)


class World:
    """The rig, and everything that was asked of it."""

    def __init__(self) -> None:
        self.rig = disk()
        self.lie: tuple[str, Any] | None = None
        self.open: list[Deferred[Any]] = []
        self.rig.stage.prepare = self.prepare
        self.rig.start()

    def prepare(self, device: Scripted) -> None:
        def lie(message: Message, reply: bytes) -> bytes:
            return reply if self.lie is None else falsified(message, reply, self.lie)

        device.lie = lie

    def keep(self, answer: object) -> None:
        if isinstance(answer, Deferred):
            self.open.append(answer)
        else:
            assert answer is None or isinstance(answer, bytes)

    def do(self, step: tuple[str, Any, Any]) -> None:
        rig, function = self.rig, self.rig.function
        what, first, second = step
        match what:
            case "read":
                self.keep(function.region_read(first, second, 4))
            case "write":
                self.keep(function.region_write(first, second, b"\xa5\5\0\0"))
            case "status":
                self.keep(function.region_write(4, COMMON + 20, bytes([first])))
            case "flr":
                self.keep(function.region_write(CONFIG, *FLR))
            case "reset":
                self.keep(function.reset())
            case "irq" if rig.lines is not None:
                flags = vfio.IRQ_SET_DATA_EVENTFD | vfio.IRQ_SET_ACTION_TRIGGER
                fds = [os.dup(rig.eventfd())] if second else []
                rig.lines.set_irqs(vfio.IRQ_SET.pack(20, flags, MSIX, first, 1), fds)
            case "vmm" if rig.lines is not None:
                rig.disconnect()
            case "vmm":
                try:
                    rig.connect()
                except PeerError:
                    assert function.dead is not None
                    rig.lines = None
            case "die":
                rig.stage.device.die()
                rig.stage.absent = PeerError(111, "nobody is there") if first else None
            case "lie":
                self.lie = first
            case "time":
                rig.turn(first)
            case _:
                pass
        rig.turn()

    def settle(self) -> None:
        """Everything is answered in the end, and an honest device is taken after a reset."""
        self.lie = None
        self.rig.stage.absent = None
        self.rig.turn(5)
        self.rig.turn(5)
        assert all(answer.done for answer in self.open)
        for answer in self.open:
            answer.result()
        self.rig.function.reset()
        self.rig.turn(40)
        self.rig.function.reset()
        self.rig.turn()
        assert self.rig.function.dead is None
        self.keep(self.rig.function.region_read(CONFIG, 0, 4))
        self.rig.turn()
        assert self.open[-1].result() == b"\xf4\x1a\x42\x10"

    def close(self) -> None:
        self.rig.function.close()
        self.rig.close()


@settings(max_examples=EXAMPLES)
@given(st.lists(STEPS, max_size=25))
def test_nothing_raises_nothing_hangs_and_an_honest_device_is_taken_again(
    steps: list[tuple[str, Any, Any]],
) -> None:
    world = World()
    try:
        for step in steps:
            world.do(step)
        world.settle()
    finally:
        world.close()
