"""virtio-mmio, version 2: the device's register file and the driver's face to it.  VIRTIO 1.4 §4.2."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import VirtioError
from ..ring import PackedLayout, SplitLayout
from ..spec.virtio import Feature
from ..spec.virtio_mmio import MAGIC, VENDOR, VERSION_2, Interrupt, Reg
from .device_side import DeviceSide
from .face import DriverSide

__all__ = ["Bus", "Mmio", "MmioRegisters", "MmioTransport"]

Steps = Generator[Any, int, Any]
# Plain ints for the registers of the data path: comparing enum members is slow in CPython.
_QUEUE_NOTIFY, _INTERRUPT_STATUS, _INTERRUPT_ACK, _CONFIG = (
    int(reg) for reg in (Reg.QUEUE_NOTIFY, Reg.INTERRUPT_STATUS, Reg.INTERRUPT_ACK, Reg.CONFIG)
)
_DATA = int(Feature.NOTIFICATION_DATA)
_CAUSES = int(Interrupt.VRING | Interrupt.CONFIG)


@dataclass(frozen=True)
class Mmio:
    """The ``transport`` part of a recipe: virtio-mmio with one interrupt line."""


class Bus(Protocol):
    """How the driver reaches registers: a trap, a mailbox, a function call.  Accesses are 1, 2 or 4 bytes wide.

    ``notify`` is the store to QueueNotify, ``vm_notify()``: the one access that machines treat in a way of its own.  With ``data``
    (NOTIFICATION_DATA) that is the upper half of what is stored; a bus whose doorbell is an eventfd has no room for it.
    """

    def notify(self, queue: int, data: int | None = None) -> Steps: ...

    def read(self, offset: int, size: int = 4) -> Steps: ...

    def write(self, offset: int, value: int, size: int = 4) -> Steps: ...


_LOW = {Reg.QUEUE_DESC_LOW: "desc", Reg.QUEUE_DRIVER_LOW: "avail", Reg.QUEUE_DEVICE_LOW: "used"}
_HIGH = {Reg.QUEUE_DESC_HIGH: "desc", Reg.QUEUE_DRIVER_HIGH: "avail", Reg.QUEUE_DEVICE_HIGH: "used"}


class MmioRegisters(DeviceSide):
    """The device side.  Plain reads and writes; QueueNotify is delivered to ``on_notify(queue)``."""

    def read(self, offset: int, size: int = 4) -> int:
        """What the driver sees at ``offset``.  Registers answer 32-bit reads only; others and unknown ones read 0 (§4.2.2.2)."""
        if offset == _INTERRUPT_STATUS and size == 4:
            return self.interrupt.read()
        if offset >= _CONFIG:
            start = offset - _CONFIG
            return int.from_bytes(self.device.read_config()[start : start + size], "little")
        if size != 4:
            return 0
        queue = self._queue
        match offset:
            case Reg.MAGIC_VALUE:
                return MAGIC
            case Reg.VERSION:
                return VERSION_2
            case Reg.DEVICE_ID:
                return self.device.device_id
            case Reg.VENDOR_ID:
                return VENDOR
            case Reg.DEVICE_FEATURES:
                return self._read_features()
            case Reg.QUEUE_SIZE_MAX:
                return self.device.queue_size_max if queue is not None else 0
            case Reg.QUEUE_READY:
                return int(queue is not None and queue.ready)
            case Reg.QUEUE_RESET:
                return int(queue is not None and queue.resetting)
            case Reg.STATUS:
                return self.status
            case Reg.CONFIG_GENERATION:
                return self.generation & 0xFFFFFFFF
            case Reg.SHM_LEN_LOW | Reg.SHM_LEN_HIGH | Reg.SHM_BASE_LOW | Reg.SHM_BASE_HIGH:
                return 0xFFFFFFFF  # no shared memory region: §4.2.2
        return 0

    def write(self, offset: int, value: int, size: int = 4) -> None:
        """The driver stores ``value``.  A store that the specification gives no meaning is ignored."""
        if offset == _QUEUE_NOTIFY and size == 4:
            if self._driver_features & _DATA:
                self._notified(value & 0xFFFF, value >> 16)
            else:
                self._notified(value)
            return
        if offset == _INTERRUPT_ACK and size == 4:
            self.interrupt.ack(value)
            return
        if offset >= _CONFIG:
            self.device.write_config(offset - _CONFIG, value.to_bytes(size, "little"))
            return
        if size != 4:
            return
        match offset:
            case Reg.STATUS:
                self._write_status(value)
            case Reg.DEVICE_FEATURES_SEL:
                self._device_sel = value
            case Reg.DRIVER_FEATURES_SEL:
                self._driver_sel = value
            case Reg.DRIVER_FEATURES:
                self._write_features(value)
            case Reg.QUEUE_SEL:
                self._queue_sel = value
            case _:
                self._write_queue(offset, value)

    def _write_queue(self, offset: int, value: int) -> None:
        queue = self._queue
        if queue is None:
            return
        if offset == Reg.QUEUE_RESET:
            if value == 1:
                self._reset_queue()
        elif queue.resetting:
            return
        elif offset == Reg.QUEUE_READY:
            if value & 1 and not queue.ready:
                self._enable_queue()
            elif not value & 1:
                queue.ready = False
                self._live.pop(self._queue_sel, None)  # the device holds the same dict and leaves the ring alone: §4.2.2.1
        elif queue.ready:
            return  # a queue in use cannot be moved: §4.2.2.2
        elif offset == Reg.QUEUE_SIZE:
            queue.size = value
        elif offset in _LOW:
            queue.set_low(_LOW[Reg(offset)], value)
        elif offset in _HIGH:
            queue.set_high(_HIGH[Reg(offset)], value)


class MmioTransport(DriverSide):
    """The driver side: the accesses of Linux's virtio_mmio.c, each a walk over ``bus``."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self._queues: Sequence[int] = ()

    def probe(self, device_id: int) -> Steps:
        """Check magic, version and device type (§4.2.3.1.1); raises VirtioError.  True if DeviceID 0 says that there is no device."""
        for offset, want, what in (
            (Reg.MAGIC_VALUE, MAGIC, "MagicValue"),
            (Reg.VERSION, VERSION_2, "Version"),
            (Reg.DEVICE_ID, device_id, "DeviceID"),
        ):
            value = yield from self.bus.read(offset)
            if offset == Reg.DEVICE_ID and not value:
                return True  # a placeholder, which is no error: §4.2.2.2
            if value != want:
                raise VirtioError(f"{what} reads {value:#x}, expected {want:#x}", "4.2.3.1.1")
        return False

    def status(self) -> Steps:
        """The device status."""
        return self.bus.read(Reg.STATUS)

    def _write_status(self, bits: int) -> Steps:
        return self.bus.write(Reg.STATUS, bits)

    def device_features(self) -> Steps:
        """All 64 offered feature bits."""
        bits = 0
        for sel in (0, 1):
            yield from self.bus.write(Reg.DEVICE_FEATURES_SEL, sel)
            bits |= (yield from self.bus.read(Reg.DEVICE_FEATURES)) << (32 * sel)
        return bits

    def _write_features(self, features: int) -> Steps:
        for sel in (0, 1):
            yield from self.bus.write(Reg.DRIVER_FEATURES_SEL, sel)
            yield from self.bus.write(Reg.DRIVER_FEATURES, (features >> (32 * sel)) & 0xFFFFFFFF)

    def queue_size_max(self, queue: int) -> Steps:
        """The largest size of ``queue``, 0 if there is no such queue."""
        yield from self.bus.write(Reg.QUEUE_SEL, queue)
        return (yield from self.bus.read(Reg.QUEUE_SIZE_MAX))

    def setup_queue(self, queue: int, layout: SplitLayout | PackedLayout) -> Steps:
        """Tell the device where ``queue`` lies and make it ready (§4.2.3.2)."""
        bus = self.bus
        yield from bus.write(Reg.QUEUE_SEL, queue)
        if (yield from bus.read(Reg.QUEUE_READY)):
            raise VirtioError(f"queue {queue} is already in use", "4.2.3.2")
        yield from bus.write(Reg.QUEUE_SIZE, layout.size)
        for low, gpa in ((Reg.QUEUE_DESC_LOW, layout.desc), (Reg.QUEUE_DRIVER_LOW, layout.avail), (Reg.QUEUE_DEVICE_LOW, layout.used)):
            yield from bus.write(low, gpa & 0xFFFFFFFF)
            yield from bus.write(low + 4, gpa >> 32)
        yield from bus.write(Reg.QUEUE_READY, 1)

    def reset_queue(self, queue: int) -> Steps:
        """Reset one queue and wait until the device has let go of it: QueueReset reads 0 (§4.2.2.2)."""
        yield from self.bus.write(Reg.QUEUE_SEL, queue)
        yield from self.bus.write(Reg.QUEUE_RESET, 1)
        while (yield from self.bus.read(Reg.QUEUE_RESET)):
            pass

    def find_vqs(self, layouts: Sequence[SplitLayout | PackedLayout], *, polled: bool = False) -> Steps:
        """``vm_find_vqs()``: set queues 0, 1, … up; the one interrupt line serves them all, ``polled`` ones too."""
        for queue, layout in enumerate(layouts):
            yield from self.setup_queue(queue, layout)
        self._queues = range(len(layouts))

    def interrupt(self, vector: int = 0) -> Generator[Any, int, tuple[bool, Sequence[int]]]:
        """``vm_interrupt()``: read and acknowledge the causes before they are handled (§4.2.3.4).

        Returns whether the configuration changed, and the queues to look at.  There is one line: ``vector`` says nothing.
        """
        yield ("vm_interrupt",)
        causes = (yield from self.bus.read(_INTERRUPT_STATUS)) & _CAUSES
        if causes:
            yield from self.bus.write(_INTERRUPT_ACK, causes)
        return bool(causes & Interrupt.CONFIG), self._queues if causes & Interrupt.VRING else ()

    def notify(self, queue: int, data: int | None = None) -> Steps:
        """``vm_notify()``, with ``data`` ``vm_notify_with_data()``: the available buffer notification."""
        return self.bus.notify(queue) if data is None else self.bus.notify(queue, data)

    def _generation(self) -> Steps:
        return self.bus.read(Reg.CONFIG_GENERATION)

    def _read_config(self, offset: int, size: int) -> Steps:
        return self.bus.read(Reg.CONFIG + offset, size)

    def _write_config(self, offset: int, value: int, size: int) -> Steps:
        return self.bus.write(Reg.CONFIG + offset, value, size)
