"""The specimens.  Each is the package's own part with one mistake; its docstring is the story."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, NamedTuple

from ...device import BlkRequest, VirtioBlkDevice
from ...ring import Chain, PackedDevice, SplitDevice, SplitDriver
from ...transport import MmioTransport

__all__ = ["SPECIMENS", "Specimen"]

Steps = Generator[Any, int, Any]
_NO_RECORD = "no single public record: a mistake of many first drivers and devices"


class Specimen(NamedTuple):
    """``part`` says where a pipeline or the explorer takes the class; ``judge`` names the scenario that tries it."""

    name: str
    cls: type[Any]
    part: str
    judge: str
    section: str
    reference: str


class NoAcknowledge(MmioTransport):
    """The handler never acknowledges. It reads InterruptStatus, looks at the ring and returns. The line is level-triggered, so it stays
    high, and the vCPU takes the same interrupt again and again.
    """

    def interrupt(self, vector: int = 0) -> Steps:
        yield ("vm_interrupt",)
        causes = yield from self.bus.read(0x060)
        return bool(causes & 2), self._queues if causes & 1 else ()


class TornConfig(MmioTransport):
    """Configuration space is read once. A field of 64 bits takes two accesses, and the device may change it between them. Without a look
    at ConfigGeneration before and after, the driver gets a number that never was.
    """

    def read_config(self, offset: int, length: int) -> Steps:
        data = b""
        while len(data) < length:
            step = min(4, length - len(data))
            value = yield from self.bus.read(0x100 + offset + len(data), step)
            data += value.to_bytes(step, "little")
        return data


class ThreeDescriptors(VirtioBlkDevice):
    """A request is taken for exactly three descriptors. Header, data, status: that is what most drivers send most of the time. With data
    in several pieces the second piece is taken for something else, and the request comes back with too little data.
    """

    def parse(self, queue: Any, chain: Chain) -> BlkRequest:
        request = super().parse(queue, chain)
        del request.data[1:]
        request.length = sum(map(len, request.data))
        return request


class UsedLength(VirtioBlkDevice):
    """The used length forgets the status byte. The device writes the data and one byte more, and counts only the data. Drivers that look
    at the length take the request for cut short.
    """

    def used_length(self, request: BlkRequest) -> int:
        return request.written


class StatusFirst(VirtioBlkDevice):
    """The request ends before its data is there. The status byte and the used element are written at once, and the disk is asked
    afterwards. It looks fast, and on a lucky schedule the data arrives in time.
    """

    def submit(self, request: BlkRequest) -> Steps:
        if request.type != 0:
            yield from super().submit(request)
            return
        request.written = request.length
        yield from self.end(request, 0)
        self.engine.store.readv(request.sector << 9, request.data)  # type: ignore[attr-defined]


class Equality(SplitDevice):
    """The event word is compared for equality. The driver asked to be told of one entry. If used.idx has already run past it, the two
    are never equal again, and the interrupt that the driver waits for does not come.
    """

    def should_notify(self) -> bool:
        self.fence()
        return bool(self._avail[self._used_event_at] == (self._flushed_idx - 1) & 0xFFFF)


class HonoursFlag(SplitDevice):
    """NO_INTERRUPT is honoured although EVENT_IDX was negotiated. With event words the flags mean nothing and may hold anything. A
    device that still looks at them is silent for ever on some drivers.
    """

    def should_notify(self) -> bool:
        return super().should_notify() and not self._avail[0] & 1


class NoFenceBeforeEvent(SplitDevice):
    """There is no fence between used.idx and used_event. The CPU may read the driver's event word before its own store of used.idx is
    visible. Both sides then see old values, and nobody tells the driver.
    """

    def should_notify(self) -> bool:
        new, old, valid = self._flushed_idx, self._signalled_idx, self._signalled_valid
        self._signalled_idx, self._signalled_valid = new, True
        event = self._avail[self._used_event_at]
        return not valid or (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF


class NoFenceBeforeLook(SplitDevice):
    """There is no fence between avail_event and the second look. The device asks for kicks and looks at avail.idx again, but its request
    may still be in the store buffer when the driver decides that no kick is wanted.
    """

    def recheck(self) -> bool:
        return self.empty()


class WrapsEarly(SplitDevice):
    """used.idx wraps at the queue size. The slot is idx modulo size, and it is tempting to keep the index itself modulo size. After one
    lap the driver sees an index that went backwards.
    """

    def flush(self) -> int:
        self.used_idx %= self.size
        return super().flush()


class Unbounded(SplitDevice):
    """A guest may have more requests in flight than the queue has entries. A driver that offers the same buffer again and again without
    waiting makes the device keep a record of each, until the host's memory is gone.
    """

    def pop(self) -> Chain | None:
        kept, self.in_flight = self.in_flight, 0
        try:
            chain = super().pop()
        finally:
            self.in_flight += kept
        return chain


class FlagsFirst(PackedDevice):
    """The flags of a used descriptor are written before its id and length. The flags are what the driver waits for. It finds them, reads
    the rest, and gets the id and length of something else.
    """

    def fill(self, chain: Chain, written: int) -> None:
        at = self.used_idx % self.size * 16
        before = bytes(self._ring[at : at + 14])
        super().fill(chain, written)
        self._body = at, bytes(self._ring[at : at + 14])
        self._ring[at : at + 14] = before
        self._count = super().flush()

    def flush(self) -> int:
        at, body = self._body
        self._ring[at : at + 14] = body
        return self._count


class UsedEventForgotten(SplitDriver):
    """The driver never moves used_event. It asks once, for the first entry, and then believes that interrupts are on. The device keeps
    to what it was asked, and is silent from then on.
    """

    def enable_cb(self) -> None:
        self.callbacks = True

    def get_buf(self) -> tuple[object, int] | None:
        callbacks, self.callbacks = self.callbacks, False
        try:
            return super().get_buf()
        finally:
            self.callbacks = callbacks


SPECIMENS = (
    Specimen("no-acknowledge", NoAcknowledge, "transport", "one buffer", "4.2.3.4", _NO_RECORD),
    Specimen("torn-config", TornConfig, "transport", "torn config", "2.5.1", _NO_RECORD),
    Specimen("three-descriptors", ThreeDescriptors, "device", "framing", "2.7.4.1", "sysprog21/kvm-host pull request 51"),
    Specimen("used-length", UsedLength, "device", "used length", "2.7.8.2", "firecracker-microvm/firecracker pull request 2379"),
    Specimen("status-before-data", StatusFirst, "device", "one buffer", "5.2.6", _NO_RECORD),
    Specimen("equality", Equality, "device_half", "batch", "2.7.7.2", "lkl/linux pull request 148"),
    Specimen("honours-the-flag", HonoursFlag, "device_half", "flag", "2.7.7.2", _NO_RECORD),
    Specimen("no-fence-before-event", NoFenceBeforeEvent, "device_half", "schedules", "2.7.7.2", "spdk/spdk issue 3178"),
    Specimen(
        "no-fence-before-look",
        NoFenceBeforeLook,
        "device_half",
        "schedules",
        "2.7.10",
        "cloud-hypervisor/cloud-hypervisor pull request 2179",
    ),
    Specimen("wraps-at-size", WrapsEarly, "device_half", "laps", "2.7.8", _NO_RECORD),
    Specimen("unbounded", Unbounded, "device_half", "flood", "2.7.13", "CVE-2016-5403 (QEMU, virtqueue_pop)"),
    Specimen("flags-first", FlagsFirst, "device_half", "schedules", "2.8.21.2", "sysprog21/kvm-host pull request 50"),
    Specimen("used-event-forgotten", UsedEventForgotten, "driver_half", "schedules", "2.7.7.1", "rcore-os/virtio-drivers pull request 121"),
)
