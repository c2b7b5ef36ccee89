"""virtio-mmio, version 2: the device's register file and the driver's face to it.  VIRTIO 1.4 §4.2."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import BadAddress, VirtioError
from ..memory import GuestMemory
from ..ring import PackedDevice, PackedLayout, SplitDevice, SplitLayout
from ..spec.virtio import Feature, Status
from ..spec.virtio_mmio import MAGIC, VENDOR, VERSION_2, Interrupt, Reg

__all__ = ["Bus", "InterruptStatus", "Mmio", "MmioRegisters", "MmioTransport", "RegisterDevice"]

Steps = Generator[Any, int, Any]
# Plain ints for the registers of the data path: comparing enum members is slow in CPython.
_QUEUE_NOTIFY, _INTERRUPT_STATUS, _INTERRUPT_ACK, _CONFIG = (
    int(reg) for reg in (Reg.QUEUE_NOTIFY, Reg.INTERRUPT_STATUS, Reg.INTERRUPT_ACK, Reg.CONFIG)
)
_DRIVER_OK = int(Status.DRIVER_OK)
_DRIVER_BITS = int(Status.ACKNOWLEDGE | Status.DRIVER | Status.DRIVER_OK | Status.FEATURES_OK | Status.FAILED)


@dataclass(frozen=True)
class Mmio:
    """The ``transport`` part of a recipe: virtio-mmio with one interrupt line."""


class Bus(Protocol):
    """How the driver reaches registers: a trap, a mailbox, a function call.  Accesses are 1, 2 or 4 bytes wide.

    ``notify`` is the store to QueueNotify, ``vm_notify()``: the one access that machines treat in a way of its own.
    """

    def notify(self, queue: int) -> Steps: ...

    def read(self, offset: int, size: int = 4) -> Steps: ...

    def write(self, offset: int, value: int, size: int = 4) -> Steps: ...


class RegisterDevice(Protocol):
    """What a register file needs of the device behind it."""

    device_id: int
    num_queues: int
    queue_size_max: int
    driver_features: int  # set when FEATURES_OK is accepted: configuration space may be written from then on

    def features(self) -> int: ...

    def accepts(self, features: int) -> bool: ...

    def read_config(self) -> bytes: ...

    def write_config(self, offset: int, data: bytes) -> None: ...

    def start(self, features: int, queues: dict[int, SplitDevice]) -> None: ...

    def reset(self) -> None: ...


class InterruptStatus:
    """The InterruptStatus register: the device sets bits, the driver acknowledges them (§4.2.2)."""

    def __init__(self) -> None:
        self._bits = 0

    def set(self, bits: int) -> None:
        """Device side: these causes are pending."""
        self._bits |= bits

    def read(self) -> int:
        """Driver side: the causes that are pending."""
        return self._bits

    def ack(self, bits: int) -> None:
        """Driver side: these causes are being handled."""
        self._bits &= ~bits


class _QueueRegisters:
    """What the driver wrote about one queue."""

    def __init__(self) -> None:
        self.size = 0
        self.ready = False
        self.addr = {"desc": 0, "avail": 0, "used": 0}


_LOW = {Reg.QUEUE_DESC_LOW: "desc", Reg.QUEUE_DRIVER_LOW: "avail", Reg.QUEUE_DEVICE_LOW: "used"}
_HIGH = {Reg.QUEUE_DESC_HIGH: "desc", Reg.QUEUE_DRIVER_HIGH: "avail", Reg.QUEUE_DEVICE_HIGH: "used"}


class MmioRegisters:
    """The device side.  Plain reads and writes; QueueNotify is delivered to ``on_notify(queue)``.

    The machine sets ``on_notify``, ``on_interrupt`` (the line's level may have changed) and may replace ``interrupt``.
    A reset with I/O in flight is asynchronous: Status keeps its value until the device calls ``reset_done`` (§2.4: the driver
    waits until it reads 0).
    """

    def __init__(self, memory: GuestMemory, device: RegisterDevice) -> None:
        self.memory = memory
        self.device = device
        self.interrupt = InterruptStatus()
        self.on_notify: Callable[[int], None] = lambda queue: None
        self.on_interrupt: Callable[[], None] = lambda: None
        self.generation = 0
        self.error: VirtioError | None = None
        self._clear()

    def _clear(self) -> None:
        self.status: int = 0
        self._resetting = False
        self._device_sel = self._driver_sel = self._queue_sel = 0
        self._driver_features = 0
        self._queues = [_QueueRegisters() for _ in range(self.device.num_queues)]
        self._live: dict[int, SplitDevice] = {}

    @property
    def driver_features(self) -> int:
        """The features the driver accepted."""
        return self._driver_features

    def read(self, offset: int, size: int = 4) -> int:
        """What the driver sees at ``offset``.  Registers answer 32-bit reads only; others and unknown ones read 0 (§4.2.2.2)."""
        if offset == _INTERRUPT_STATUS and size == 4:
            return self.interrupt.read()
        if offset >= _CONFIG:
            start = offset - _CONFIG
            return int.from_bytes(self.device.read_config()[start : start + size], "little")
        if size != 4:
            return 0
        queue = self._queues[self._queue_sel] if self._queue_sel < len(self._queues) else None
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
                return (self.device.features() >> (32 * self._device_sel)) & 0xFFFFFFFF if self._device_sel < 2 else 0
            case Reg.QUEUE_SIZE_MAX:
                return self.device.queue_size_max if queue is not None else 0
            case Reg.QUEUE_READY:
                return int(queue is not None and queue.ready)
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
            if value < len(self._queues) and self.status & _DRIVER_OK and not self._resetting:
                self.on_notify(value)
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
                if self._driver_sel < 2 and not self.status & Status.FEATURES_OK:
                    shift = 32 * self._driver_sel
                    self._driver_features = self._driver_features & ~(0xFFFFFFFF << shift) | value << shift
            case Reg.QUEUE_SEL:
                self._queue_sel = value
            case _:
                self._write_queue(offset, value)

    def _write_queue(self, offset: int, value: int) -> None:
        if self._queue_sel >= len(self._queues):
            return
        queue = self._queues[self._queue_sel]
        if offset == Reg.QUEUE_READY:
            queue.ready = bool(value & 1)
            if not queue.ready:
                self._live.pop(self._queue_sel, None)  # the device holds the same dict and leaves the ring alone: §4.2.2.1
        elif queue.ready:
            return  # a queue in use cannot be moved: §4.2.2.2
        elif offset == Reg.QUEUE_SIZE:
            queue.size = value
        elif offset in _LOW:
            name = _LOW[Reg(offset)]
            queue.addr[name] = queue.addr[name] & ~0xFFFFFFFF | value
        elif offset in _HIGH:
            name = _HIGH[Reg(offset)]
            queue.addr[name] = queue.addr[name] & 0xFFFFFFFF | value << 32

    def _write_status(self, value: int) -> None:
        if value == 0:
            if not self.status:
                self._clear()  # nothing runs; a reset still to come while Status reads 0 would wipe out what the driver does next
            elif not self._resetting:
                self._resetting = True
                self.device.reset()
            return
        if self._resetting:
            return
        old = self.status
        new = value & _DRIVER_BITS  # SUSPEND is not offered and NEEDS_RESET not the driver's
        if new & Status.FEATURES_OK and not old & Status.FEATURES_OK and not self._features_fit():
            new &= ~Status.FEATURES_OK  # the driver re-reads Status and finds its subset refused: §3.1.1
        elif new & Status.FEATURES_OK:
            self.device.driver_features = self._driver_features
        self.status = int(old | new)
        if new & Status.DRIVER_OK and not old & Status.DRIVER_OK:
            self._start()

    def _features_fit(self) -> bool:
        driver = self._driver_features
        return not driver & ~self.device.features() and bool(driver & Feature.VERSION_1) and self.device.accepts(driver)

    def _start(self) -> None:
        """DRIVER_OK: build the device halves of the ready queues, or ask for a reset if they cannot be."""
        features = self._driver_features
        event_idx, indirect = bool(features & Feature.EVENT_IDX), bool(features & Feature.INDIRECT_DESC)
        if not self.status & Status.FEATURES_OK:
            self.needs_reset(VirtioError("DRIVER_OK without FEATURES_OK", "3.1.1"))
            return
        queues: dict[int, Any] = {}
        packed = features & Feature.RING_PACKED
        try:
            for number, q in enumerate(self._queues):
                if not q.ready:
                    continue
                if q.size > self.device.queue_size_max:
                    raise VirtioError(f"queue {number} of {q.size} entries, at most {self.device.queue_size_max}", "4.2.2")
                bound = getattr(self.device, "chain_max", 0)
                options: dict[str, Any] = dict(number=number, event_idx=event_idx, indirect=indirect, chain_max=bound)
                if packed:
                    queues[number] = PackedDevice(self.memory, PackedLayout(q.size, **q.addr), **options)
                else:
                    queues[number] = SplitDevice(self.memory, SplitLayout(q.size, **q.addr), **options)
        except (VirtioError, BadAddress) as error:
            self.needs_reset(error)
            return
        self._live = queues
        self.device.start(features, queues)

    def reset_done(self) -> None:
        """The device has let go of guest memory: registers take their initial values, Status reads 0."""
        self.interrupt.ack(0xFFFFFFFF)
        self.error = None
        self._clear()

    def needs_reset(self, error: VirtioError) -> None:
        """DEVICE_NEEDS_RESET, with a configuration change notification if the driver is running (§2.1.2)."""
        self.error = error
        self.status |= int(Status.NEEDS_RESET)
        if self.status & Status.DRIVER_OK:
            self.interrupt.set(Interrupt.CONFIG)
            self.on_interrupt()

    def config_changed(self) -> None:
        """The device changed its configuration space: next generation and a notification (§2.5, §4.2.2)."""
        self.generation += 1
        if self.status & Status.DRIVER_OK:
            self.interrupt.set(Interrupt.CONFIG)
            self.on_interrupt()


class MmioTransport:
    """The driver side: the accesses of Linux's virtio_mmio.c, each a walk over ``bus``.."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus

    def probe(self, device_id: int) -> Steps:
        """Check magic, version and device type (§4.2.3.1.1); raises VirtioError."""
        for offset, want, what in (
            (Reg.MAGIC_VALUE, MAGIC, "MagicValue"),
            (Reg.VERSION, VERSION_2, "Version"),
            (Reg.DEVICE_ID, device_id, "DeviceID"),
        ):
            value = yield from self.bus.read(offset)
            if value != want:
                raise VirtioError(f"{what} reads {value:#x}, expected {want:#x}", "4.2.3.1.1")

    def status(self) -> Steps:
        """The device status."""
        return (yield from self.bus.read(Reg.STATUS))

    def add_status(self, bits: int) -> Steps:
        """Set more status bits; returns the status read back."""
        old = yield from self.bus.read(Reg.STATUS)
        yield from self.bus.write(Reg.STATUS, old | bits)
        return (yield from self.bus.read(Reg.STATUS))

    def reset(self) -> Steps:
        """Write 0 and wait until the device has let go of guest memory (Status reads 0)."""
        yield from self.bus.write(Reg.STATUS, 0)
        while (yield from self.bus.read(Reg.STATUS)):
            pass

    def device_features(self) -> Steps:
        """All 64 offered feature bits."""
        bits = 0
        for sel in (0, 1):
            yield from self.bus.write(Reg.DEVICE_FEATURES_SEL, sel)
            bits |= (yield from self.bus.read(Reg.DEVICE_FEATURES)) << (32 * sel)
        return bits

    def accept_features(self, features: int) -> Steps:
        """Write the accepted features, set FEATURES_OK and re-read it; raises VirtioError if refused (§3.1.1 steps 4 to 6)."""
        for sel in (0, 1):
            yield from self.bus.write(Reg.DRIVER_FEATURES_SEL, sel)
            yield from self.bus.write(Reg.DRIVER_FEATURES, (features >> (32 * sel)) & 0xFFFFFFFF)
        status = yield from self.add_status(Status.FEATURES_OK)
        if not status & Status.FEATURES_OK:
            raise VirtioError(f"the device refuses the features {features:#x}: FEATURES_OK reads back as 0", "3.1.1")

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

    def read_config(self, offset: int, length: int) -> Steps:
        """A field of ``length`` bytes by accesses of its width, 64 bits by two (§4.2.2.2), from one generation (§2.5.1)."""
        while True:
            before = yield from self.bus.read(Reg.CONFIG_GENERATION)
            data = bytearray()
            while len(data) < length:
                left = length - len(data)
                step = 4 if left >= 4 else 2 if left >= 2 else 1
                value = yield from self.bus.read(Reg.CONFIG + offset + len(data), step)
                data += value.to_bytes(step, "little")
            if (yield from self.bus.read(Reg.CONFIG_GENERATION)) == before:
                return bytes(data)

    def write_config(self, offset: int, data: bytes) -> Steps:
        """Store bytes in configuration space, one access for 1, 2 or 4 of them."""
        yield from self.bus.write(Reg.CONFIG + offset, int.from_bytes(data, "little"), len(data))
