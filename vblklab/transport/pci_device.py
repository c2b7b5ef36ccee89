"""virtio-pci, modern: the device's side.  VIRTIO 1.4 §4.1.  The regions lie as QEMU's virtio-pci has them."""

from __future__ import annotations

from collections.abc import Callable

from ..memory import GuestMemory
from ..spec.pci import (
    CLASS_STORAGE_SCSI,
    MSIX_CAP_BYTES,
    CapId,
    Cfg,
    Command,
    MsixCap,
    MsixFlags,
)
from ..spec.virtio import Feature, Status
from ..spec.virtio_mmio import Interrupt
from ..spec.virtio_pci import (
    CAP_BYTES,
    COMMON_BYTES,
    COMMON_WIDTH,
    DEVICE_ID_BASE,
    NO_VECTOR,
    NOTIFY_CAP_BYTES,
    PCI_CFG_CAP_BYTES,
    PCI_CFG_DATA,
    VENDOR,
    Cap,
    CapType,
    Common,
)
from .device_side import DeviceSide, QueueRegisters, RegisterDevice
from .msix import Message, Msix
from .pci_config import Bar, PciConfig, all_ones

__all__ = ["PciRegisters"]

REVISION = 1  # a non-transitional device has 1 or more: §4.1.2.1
SUBSYSTEM = 0x1100  # QEMU's; a non-transitional device has 0x40 or more
MSIX_BAR, VIRTIO_BAR = 1, 4
COMMON_AT, ISR_AT, DEVICE_AT, NOTIFY_AT = 0x0000, 0x1000, 0x2000, 0x3000
_REGION = 0x1000
_VRING, _CONFIG = int(Interrupt.VRING), int(Interrupt.CONFIG)  # the ISR status has the same bits: §4.1.4.5
_CONFIG_DATA = 0x8000
"""What queue_notif_config_data adds to a queue's number: the driver must take it from the register, not guess it."""

_LOW = {Common.QUEUE_DESC_LO: "desc", Common.QUEUE_DRIVER_LO: "avail", Common.QUEUE_DEVICE_LO: "used"}
_HIGH = {Common.QUEUE_DESC_HI: "desc", Common.QUEUE_DRIVER_HI: "avail", Common.QUEUE_DEVICE_HI: "used"}


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


class _PciQueue(QueueRegisters):
    """A queue's registers on PCI."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.vector = NO_VECTOR


class PciRegisters(DeviceSide):
    """One PCI function.  ``config_read`` and ``config_write`` reach configuration space, ``read`` and ``write`` memory by address.

    ``vectors`` is the size of the MSI-X table, 0 for a function without one; None is one for each queue and one for the
    configuration, as QEMU does.  The machine sets ``on_notify``, ``on_message`` (a message goes out that no call of ``signal``
    returned) and ``on_interrupt`` (look at ``line``).
    """

    def __init__(
        self,
        memory: GuestMemory,
        device: RegisterDevice,
        *,
        vectors: int | None = None,
        notif_config_data: bool = False,
        notify_off_multiplier: int = 4,
    ) -> None:
        vectors = device.num_queues + 1 if vectors is None else vectors
        self.msix = Msix(vectors) if vectors else None
        self._extra = int(Feature.NOTIF_CONFIG_DATA) if notif_config_data else 0
        self._multiplier = notify_off_multiplier
        self._generation_shown = self._generation_seen = 0
        super().__init__(memory, device)
        self.config = PciConfig(
            vendor=VENDOR,
            device=DEVICE_ID_BASE + device.device_id,
            class_device=CLASS_STORAGE_SCSI,
            revision=REVISION,
            subsystem_vendor=VENDOR,
            subsystem=SUBSYSTEM,
        )
        self._lay_out()

    def _lay_out(self) -> None:
        """Regions and capabilities."""
        config, notify_bytes = self.config, max(4, self._multiplier * len(self._queues))
        if self.msix is not None:
            config.add_bar(Bar(MSIX_BAR, self.msix.region_bytes, self.msix))
            body = (self.msix.vectors - 1).to_bytes(2, "little") + bytes((MSIX_BAR, 0, 0, 0))
            body += (self.msix.pba_offset | MSIX_BAR).to_bytes(4, "little")
            writable = int(MsixFlags.ENABLE | MsixFlags.MASKALL).to_bytes(2, "little")
            self._msix_at = config.add_capability(CapId.MSIX, body, writable)
            assert len(body) + 2 == MSIX_CAP_BYTES
        config.add_bar(Bar(VIRTIO_BAR, _power_of_two(NOTIFY_AT + notify_bytes), _Regions(self), wide=True))
        for kind, at, length in (
            (CapType.COMMON_CFG, COMMON_AT, COMMON_BYTES),
            (CapType.ISR_CFG, ISR_AT, 1),
            (CapType.DEVICE_CFG, DEVICE_AT, _REGION),
        ):
            self._capability(kind, VIRTIO_BAR, at, length)
        multiplier = self._multiplier.to_bytes(4, "little")
        self._capability(CapType.NOTIFY_CFG, VIRTIO_BAR, NOTIFY_AT, notify_bytes, NOTIFY_CAP_BYTES, multiplier)
        self._window_at = self._capability(CapType.PCI_CFG, 0, 0, 0, PCI_CFG_CAP_BYTES, bytes(4), writable=True)

    def _capability(
        self, kind: CapType, bar: int, at: int, length: int, size: int = CAP_BYTES, extra: bytes = b"", writable: bool = False
    ) -> int:
        body = bytes((size, kind, bar, 0, 0, 0)) + at.to_bytes(4, "little") + length.to_bytes(4, "little") + extra
        mask = b"\0\0\xff\0\0\0" + b"\xff" * (size - Cap.OFFSET) if writable else b""
        return self.config.add_capability(CapId.VNDR, body, mask)

    # -- state -----------------------------------------------------------------------------------------------------------

    def _clear(self) -> None:
        self._config_vector = NO_VECTOR
        if self.msix is not None:
            self.msix.forget()
        super()._clear()

    def _new_queue(self) -> _PciQueue:
        return _PciQueue(self.device.queue_size_max)

    def _offered(self) -> int:
        return self.device.features() | self._extra

    @property
    def msix_enabled(self) -> bool:
        """Whether interrupts are messages."""
        return self.msix is not None and self.msix.enabled

    @property
    def line(self) -> bool:
        """The level of INTA#: high while ISR bits are set, MSI-X is off and the line is not disabled (§4.1.4.5.1)."""
        return bool(self.interrupt.read()) and not self.msix_enabled and not self.config.command & Command.INTX_DISABLE

    # -- interrupts ------------------------------------------------------------------------------------------------------

    def signal(self, queue: int) -> Message | None:
        """The used buffer notification of ``queue``: with MSI-X the message to send now, None if it is masked or has no vector.

        Without MSI-X the ISR bit is set and the answer is None; ``line`` says the level.
        """
        msix = self.msix
        if msix is None or not msix.enabled:
            self.interrupt.set(_VRING)
            return None
        vector = self._queues[queue].vector
        return None if vector == NO_VECTOR else msix.signal(vector)

    def _notify_config(self) -> None:
        if not self.status & Status.DRIVER_OK:
            return
        self.interrupt.set(_CONFIG)  # before the notification, with MSI-X too: §4.1.4.5.1
        if self.msix is None or not self.msix.enabled:
            self.on_interrupt()
        elif self._config_vector != NO_VECTOR:
            message = self.msix.signal(self._config_vector)
            if message is not None:
                self.msix.on_message(message)

    @property
    def on_message(self) -> Callable[[Message], None]:
        """Takes messages that go out by themselves: configuration changes, and what was pending when its mask was lifted."""
        assert self.msix is not None
        return self.msix.on_message

    @on_message.setter
    def on_message(self, send: Callable[[Message], None]) -> None:
        if self.msix is not None:
            self.msix.on_message = send

    def _map(self, old: int, new: int) -> int:
        """Another vector for an event: what it reads afterwards (§4.1.5.1.2)."""
        if self.msix is None:
            return NO_VECTOR
        vector = new if new < self.msix.vectors else NO_VECTOR
        if old not in (vector, NO_VECTOR) and [self._config_vector, *(q.vector for q in self._queues)].count(old) == 1:
            self.msix.forget(old)
        return vector

    # -- accesses --------------------------------------------------------------------------------------------------------

    def config_read(self, offset: int, size: int) -> int:
        """A read of configuration space; one of the window's data reads what the window stands on (§4.1.4.9)."""
        if Cfg.COMMAND <= offset < Cfg.REVISION_ID:
            self.config.show_interrupt(bool(self.interrupt.read()) and not self.msix_enabled)
        if self._in_window(offset, size):
            found = self._window()
            if found is not None:
                bar, at, length = found
                self.config.put(self._window_at + PCI_CFG_DATA, bar.access.read(at, length), length)
        return self.config.read(offset, size)

    def config_write(self, offset: int, value: int, size: int) -> None:
        """A store to configuration space, with what it sets off."""
        self.config.write(offset, value, size)
        if not self.config.fits(offset, size):
            return
        if self._in_window(offset, size):
            found = self._window()
            if found is not None:
                bar, at, length = found
                data = self.config.read(self._window_at + PCI_CFG_DATA, 4)
                bar.access.write(at, data & all_ones(length), length)
        if self.msix is not None:
            flags = self.config.read(self._msix_at + MsixCap.FLAGS, 2)
            self.msix.control(flags, master=bool(self.config.command & Command.MASTER))
        if Cfg.COMMAND <= offset < Cfg.STATUS and self.line:
            self.on_interrupt()

    def _in_window(self, offset: int, size: int) -> bool:
        start = self._window_at + PCI_CFG_DATA
        return offset < start + 4 and start < offset + size and self.config.fits(offset, size)

    def _window(self) -> tuple[Bar, int, int] | None:
        """Where the window stands: region, offset, width; None if that is nowhere."""
        at = self._window_at
        length = self.config.read(at + Cap.LENGTH, 4)
        start = self.config.read(at + Cap.OFFSET, 4)
        bar = self.config.bars.get(self.config.read(at + Cap.BAR, 1))
        if bar is None or length not in (1, 2, 4) or start % length or start + length > bar.size:
            return None
        return bar, start, length

    def read(self, gpa: int, size: int = 4) -> int:
        """A read of memory; all ones where no region answers."""
        found = self.config.find(gpa, size)
        return all_ones(size) if found is None else found[0].access.read(found[1], size)

    def write(self, gpa: int, value: int, size: int = 4) -> None:
        """A store to memory."""
        found = self.config.find(gpa, size)
        if found is not None:
            found[0].access.write(found[1], value, size)

    # -- the regions of the virtio BAR -----------------------------------------------------------------------------------

    def _read_common(self, offset: int, size: int) -> int:
        """A field of the common configuration, by an access of its width; others read 0."""
        if COMMON_WIDTH.get(offset) != size:  # type: ignore[call-overload]
            return 0
        match offset:
            case Common.DEVICE_FEATURE_SELECT:
                return self._device_sel
            case Common.DEVICE_FEATURE:
                return self._read_features()
            case Common.DRIVER_FEATURE_SELECT:
                return self._driver_sel
            case Common.DRIVER_FEATURE:
                return self._driver_features >> 32 * self._driver_sel & 0xFFFFFFFF if self._driver_sel < 2 else 0
            case Common.CONFIG_MSIX_VECTOR:
                return self._config_vector
            case Common.NUM_QUEUES:
                return len(self._queues)
            case Common.DEVICE_STATUS:
                return self.status
            case Common.CONFIG_GENERATION:
                return self._show_generation()
            case Common.QUEUE_SELECT:
                return self._queue_sel
        return self._read_queue(offset)

    def _read_queue(self, offset: int) -> int:
        """A field of the selected queue; 0 where there is none, but NO_VECTOR for its vector."""
        queue: _PciQueue | None = self._queue
        if queue is None:
            return NO_VECTOR if offset == Common.QUEUE_MSIX_VECTOR else 0
        match offset:
            case Common.QUEUE_SIZE:
                size = queue.size
                return size if self._driver_features & Feature.RING_PACKED or not size else 1 << size.bit_length() - 1
            case Common.QUEUE_MSIX_VECTOR:
                return queue.vector
            case Common.QUEUE_ENABLE:
                return int(queue.ready)
            case Common.QUEUE_NOTIFY_OFF:
                return self._queue_sel if self._multiplier else 0
            case Common.QUEUE_RESET:
                return int(queue.resetting)
            case Common.QUEUE_NOTIF_CONFIG_DATA:
                return self._queue_sel | _CONFIG_DATA if self._driver_features & Feature.NOTIF_CONFIG_DATA else 0
        if offset in _LOW:
            return queue.addr[_LOW[Common(offset)]] & 0xFFFFFFFF
        return queue.addr[_HIGH[Common(offset)]] >> 32 if offset in _HIGH else 0

    def _write_common(self, offset: int, value: int, size: int) -> None:
        """A store to the common configuration; one that is read-only or of another width is ignored."""
        if COMMON_WIDTH.get(offset) != size:  # type: ignore[call-overload]
            return
        match offset:
            case Common.DEVICE_FEATURE_SELECT:
                self._device_sel = value
            case Common.DRIVER_FEATURE_SELECT:
                self._driver_sel = value
            case Common.DRIVER_FEATURE:
                self._write_features(value)
            case Common.CONFIG_MSIX_VECTOR:
                self._config_vector = self._map(self._config_vector, value)
            case Common.DEVICE_STATUS:
                self._write_status(value)
            case Common.QUEUE_SELECT:
                self._queue_sel = value
            case _:
                self._write_queue(offset, value)

    def _write_queue(self, offset: int, value: int) -> None:
        queue: _PciQueue | None = self._queue
        if queue is None:
            return
        if offset == Common.QUEUE_RESET:
            if value == 1:
                self._reset_queue()
        elif queue.resetting:
            return
        elif offset == Common.QUEUE_MSIX_VECTOR:
            queue.vector = self._map(queue.vector, value)
        elif queue.ready:
            return  # a queue in use cannot be moved, and 0 does not stop it: §4.1.4.3.2
        elif offset == Common.QUEUE_ENABLE:
            if value == 1:
                self._enable_queue()
        elif offset == Common.QUEUE_SIZE:
            whole = bool(self._driver_features & Feature.RING_PACKED) or not value & (value - 1)
            if whole and value <= self.device.queue_size_max:
                queue.size = value
        elif offset in _LOW:
            queue.set_low(_LOW[Common(offset)], value)
        elif offset in _HIGH:
            queue.set_high(_HIGH[Common(offset)], value)

    def _show_generation(self) -> int:
        """Eight bits that differ whenever the configuration changed since it was last looked at, however often it did."""
        if self._generation_seen != self.generation:
            self._generation_seen = self.generation
            self._generation_shown = (self._generation_shown + 1) & 0xFF
        return self._generation_shown

    def _read_isr(self) -> int:
        """The causes; reading clears them and so lowers the line (§4.1.4.5)."""
        bits = self.interrupt.read()
        self.interrupt.ack(bits)
        return bits

    def _write_notify(self, offset: int, value: int, size: int) -> None:
        """The doorbell: 16 bits, or 32 with NOTIFICATION_DATA.  The address says the queue; the value does where all share one."""
        if size not in (2, 4) or not self.config.command & Command.MASTER:
            return
        queue, rest = divmod(offset, self._multiplier) if self._multiplier else (value & 0xFFFF & ~self._config_bits, offset)
        if not rest:
            told = size == 4 and self._driver_features & Feature.NOTIFICATION_DATA
            self._notified(queue, value >> 16 if told else None)

    @property
    def _config_bits(self) -> int:
        return _CONFIG_DATA if self._driver_features & Feature.NOTIF_CONFIG_DATA else 0


class _Regions:
    """What lies behind the virtio BAR, region by region."""

    def __init__(self, registers: PciRegisters) -> None:
        self._registers = registers

    def read(self, offset: int, size: int) -> int:
        registers = self._registers
        if offset < ISR_AT:
            return registers._read_common(offset, size)
        if offset < DEVICE_AT:
            return registers._read_isr() if offset == ISR_AT else 0
        if offset < NOTIFY_AT:
            registers._show_generation()
            start = offset - DEVICE_AT
            return int.from_bytes(registers.device.read_config()[start : start + size], "little")
        return 0

    def write(self, offset: int, value: int, size: int) -> None:
        registers = self._registers
        if offset < ISR_AT:
            registers._write_common(offset, value, size)
        elif DEVICE_AT <= offset < NOTIFY_AT:
            registers.device.write_config(offset - DEVICE_AT, value.to_bytes(size, "little"))
        elif offset >= NOTIFY_AT:
            registers._write_notify(offset - NOTIFY_AT, value, size)
