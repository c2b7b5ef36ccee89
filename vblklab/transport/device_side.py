"""What the device side of every transport has: status, features, queues, reset.  VIRTIO 1.4 §2.1, §2.2, §2.4, §3.1.

A register file (virtio-mmio, virtio-pci) derives from ``DeviceSide`` and gives its registers their addresses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from ..errors import BadAddress, VirtioError
from ..memory import GuestMemory
from ..ring import PackedDevice, PackedLayout, SplitDevice, SplitLayout
from ..spec.virtio import Feature, Status
from ..spec.virtio_mmio import Interrupt

__all__ = ["DeviceSide", "InterruptStatus", "QueueRegisters", "RegisterDevice"]

_DRIVER_OK = int(Status.DRIVER_OK)
_DRIVER_BITS = int(Status.ACKNOWLEDGE | Status.DRIVER | Status.DRIVER_OK | Status.FEATURES_OK | Status.FAILED)


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

    def start_queue(self, number: int, ring: SplitDevice) -> None: ...

    def reset_queue(self, number: int, done: Callable[[], None]) -> None: ...

    def reset(self) -> None: ...


class InterruptStatus:
    """Causes of interrupt: the device sets bits, the driver acknowledges them (§4.2.2; on PCI the ISR status, §4.1.4.5)."""

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


class QueueRegisters:
    """What the driver wrote about one queue."""

    def __init__(self) -> None:
        self.size = 0
        self.ready = False
        self.resetting = False  # RING_RESET: the driver asked, and the device has not let go yet
        self.was_reset = False  # it has: the queue may be used again while the device runs
        self.addr = {"desc": 0, "avail": 0, "used": 0}

    def set_low(self, name: str, value: int) -> None:
        """The low 32 bits of the address of ``desc``, ``avail`` or ``used``."""
        self.addr[name] = self.addr[name] & ~0xFFFFFFFF | value

    def set_high(self, name: str, value: int) -> None:
        """The high 32 bits of an address."""
        self.addr[name] = self.addr[name] & 0xFFFFFFFF | value << 32


class DeviceSide:
    """The state that a driver reaches through registers, whichever they are.

    The machine sets ``on_notify``, ``on_interrupt`` (a cause was added to ``interrupt``) and may replace ``interrupt``.
    A reset with I/O in flight is asynchronous: the status keeps its value until the device calls ``reset_done`` (§2.4: the driver
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
        """Registers take their initial values."""
        self.status: int = 0
        self._resetting = False
        self._device_sel = self._driver_sel = self._queue_sel = 0
        self._driver_features = 0
        self._queues = [self._new_queue() for _ in range(self.device.num_queues)]
        self._live: dict[int, SplitDevice] = {}

    def _new_queue(self) -> Any:
        return QueueRegisters()

    def _offered(self) -> int:
        """The features of the device, and what the transport adds."""
        return self.device.features()

    @property
    def driver_features(self) -> int:
        """The features the driver accepted."""
        return self._driver_features

    # -- registers that both transports have ---------------------------------------------------------------------------------

    @property
    def _queue(self) -> Any:
        """The selected queue, None if there is no such queue."""
        return self._queues[self._queue_sel] if self._queue_sel < len(self._queues) else None

    def _notified(self, queue: int, data: int | None = None) -> None:
        """The driver's available buffer notification; before DRIVER_OK and during a reset there is nothing to notify.

        ``data`` is what came with it (NOTIFICATION_DATA): how far the driver is in the ring.
        """
        if queue < len(self._queues) and self.status & _DRIVER_OK and not self._resetting:
            if data is not None and queue in self._live:
                self._live[queue].notified(data)
            self.on_notify(queue)

    def _read_features(self) -> int:
        """32 bits of the offered features, as selected."""
        return (self._offered() >> (32 * self._device_sel)) & 0xFFFFFFFF if self._device_sel < 2 else 0

    def _write_features(self, value: int) -> None:
        """32 bits of the accepted features, as selected; fixed once FEATURES_OK is set."""
        if self._driver_sel < 2 and not self.status & Status.FEATURES_OK:
            shift = 32 * self._driver_sel
            self._driver_features = self._driver_features & ~(0xFFFFFFFF << shift) | value << shift

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
        return not driver & ~self._offered() and bool(driver & Feature.VERSION_1) and self.device.accepts(driver)

    # -- one queue (RING_RESET) ----------------------------------------------------------------------------------------------

    def _reset_queue(self) -> None:
        """Reset the selected queue: it reads as being reset until nothing of it is in flight, then as it did at first (§2.6.1)."""
        number, queue = self._queue_sel, self._queue
        if not self._driver_features & Feature.RING_RESET or self._resetting or not queue.ready or queue.resetting:
            return

        def done() -> None:
            if self._queues[number] is queue:  # the device was not reset meanwhile
                self._queues[number] = self._new_queue()
                self._queues[number].was_reset = True

        queue.resetting = True
        if number in self._live:
            self.device.reset_queue(number, done)
        else:
            done()

    def _enable_queue(self) -> None:
        """The selected queue is ready; after a reset of its own it is served from now on (§2.6.2)."""
        number, queue = self._queue_sel, self._queue
        queue.ready = True
        if not queue.was_reset or not self.status & _DRIVER_OK or self._resetting:
            return
        queue.was_reset = False
        try:
            half = self._device_half(number, queue)
        except (VirtioError, BadAddress) as error:
            self.needs_reset(error)
            return
        self.device.start_queue(number, half)

    # -- start, reset, trouble -----------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """DRIVER_OK: build the device halves of the ready queues, or ask for a reset if they cannot be."""
        if not self.status & Status.FEATURES_OK:
            self.needs_reset(VirtioError("DRIVER_OK without FEATURES_OK", "3.1.1"))
            return
        try:
            queues = {number: self._device_half(number, q) for number, q in enumerate(self._queues) if q.ready}
        except (VirtioError, BadAddress) as error:
            self.needs_reset(error)
            return
        self._live = queues
        self.device.start(self._driver_features, queues)

    def _device_half(self, number: int, q: QueueRegisters) -> Any:
        """The device's half of a queue as the driver described it; raises VirtioError or BadAddress."""
        features = self._driver_features
        if q.size > self.device.queue_size_max:
            raise VirtioError(f"queue {number} of {q.size} entries, at most {self.device.queue_size_max}", "4.2.2")
        options: dict[str, Any] = dict(
            number=number,
            event_idx=bool(features & Feature.EVENT_IDX),
            indirect=bool(features & Feature.INDIRECT_DESC),
            in_order=bool(features & Feature.IN_ORDER),
            chain_max=getattr(self.device, "chain_max", 0),
        )
        if features & Feature.RING_PACKED:
            return PackedDevice(self.memory, PackedLayout(q.size, **q.addr), **options)
        return SplitDevice(self.memory, SplitLayout(q.size, **q.addr), **options)

    def reset_done(self) -> None:
        """The device has let go of guest memory: registers take their initial values, Status reads 0."""
        self.interrupt.ack(0xFFFFFFFF)
        self.error = None
        self._clear()

    def needs_reset(self, error: VirtioError) -> None:
        """DEVICE_NEEDS_RESET, with a configuration change notification if the driver is running (§2.1.2)."""
        self.error = error
        self.status |= int(Status.NEEDS_RESET)
        self._notify_config()

    def config_changed(self) -> None:
        """The device changed its configuration space: next generation and a notification (§2.5)."""
        self.generation += 1
        self._notify_config()

    def _notify_config(self) -> None:
        """A configuration change notification, if the driver is running."""
        if self.status & Status.DRIVER_OK:
            self.interrupt.set(Interrupt.CONFIG)
            self.on_interrupt()
