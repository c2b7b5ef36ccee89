"""virtio-pci, modern: the driver's side, as Linux's virtio_pci_modern_dev.c and virtio_pci_common.c.  VIRTIO 1.4 §4.1."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from ..errors import ConfigError, VirtioError
from ..ring import PackedLayout, SplitLayout
from ..spec.pci import (
    BAR_FLAGS,
    CAP_LIST_ID,
    CAP_LIST_NEXT,
    HEADER_BYTES,
    MEM_TYPE_MASK,
    MSI_ADDRESS,
    MSI_DEST_SHIFT,
    MSIX_BIR,
    MSIX_ENTRY_BYTES,
    MSIX_MASKED,
    MSIX_VECTORS_MAX,
    NUM_BARS,
    BarBits,
    CapId,
    Cfg,
    Command,
    MsixCap,
    MsixEntry,
    MsixFlags,
    PciStatus,
)
from ..spec.virtio import DEVICE_ID_BLOCK, Feature
from ..spec.virtio_mmio import Interrupt
from ..spec.virtio_pci import (
    COMMON_1_0_BYTES,
    COMMON_WIDTH,
    DEVICE_ID_BASE,
    NO_VECTOR,
    NOTIFY_CAP_MULT,
    TRANSITIONAL_BLOCK,
    VENDOR,
    Cap,
    CapType,
    Common,
)
from .face import DriverSide

__all__ = ["Pci", "PciBus", "PciTransport"]

Steps = Generator[Any, int, Any]
CONFIG_VECTOR, SHARED_VECTOR = 0, 1  # Linux: VP_MSIX_CONFIG_VECTOR, VP_MSIX_VQ_VECTOR
_IRQ_FIRST, _IRQ_LAST = 0x31, 0xEB
"""The processor's vectors that the guest gives to messages, from each vCPU's own supply; which ones is its own business."""
_KINDS = {int(kind) for kind in CapType}
_LIST_MAX = 48  # Linux: PCI_FIND_CAP_TTL
_WINDOW, _WIDE_WINDOW = 0xC0000000, 0x380000000000
"""Where the guest puts regions; those that may lie above 4 GiB go to the second."""


@dataclass(frozen=True)
class Pci:
    """The ``transport`` part: virtio-pci.

    ``vectors`` is the size of the MSI-X table; None is one a queue and one for the configuration, 0 is no MSI-X (what a guest
    has with the kernel's ``pci=nomsi``, and what ``Kvm(call="intx")`` takes).  Linux needs at least 2 to use any.
    ``notif_config_data`` offers VIRTIO_F_NOTIF_CONFIG_DATA: the doorbell's value is one that the device chose.
    """

    vectors: int | None = None
    notif_config_data: bool = False

    def __post_init__(self) -> None:
        if self.vectors is not None and (not isinstance(self.vectors, int) or not 0 <= self.vectors <= MSIX_VECTORS_MAX):
            raise ConfigError(f"pci vectors={self.vectors!r}", f"use 0 to {MSIX_VECTORS_MAX}, or None for one a queue and one more")


class PciBus(Protocol):
    """How the driver reaches the function: configuration space by offset, its regions by their address in memory.

    ``notify`` is the store of 2 bytes, or 4 with NOTIFICATION_DATA, to a queue's notify address; machines treat it in a way of its own.
    """

    def config_read(self, offset: int, size: int) -> Steps: ...

    def config_write(self, offset: int, value: int, size: int) -> Steps: ...

    def read(self, gpa: int, size: int = 4) -> Steps: ...

    def write(self, gpa: int, value: int, size: int = 4) -> Steps: ...

    def notify(self, queue: int, gpa: int, value: int, size: int = 2) -> Steps: ...


class _Structure(NamedTuple):
    """A virtio structure that a capability points to: its address and length."""

    gpa: int
    length: int


class PciTransport(DriverSide):
    """The driver side.  ``vcpu_of`` says which vCPU takes the messages of a queue; None means all go to vCPU 0.  A guest that
    cannot reach addresses ``above_4g`` puts wide regions below.

    After ``find_vqs`` ``vectors`` has the number of MSI-X vectors in use: one a queue and one for the configuration, 2 (the queues
    share one), or 0 (the line).
    """

    features = int(Feature.NOTIF_CONFIG_DATA)

    def __init__(self, bus: PciBus, vcpu_of: Callable[[int], int] | None = None, *, above_4g: bool = True) -> None:
        self.bus = bus
        self._above_4g = above_4g
        self.vectors = 0
        self._vcpu_of = vcpu_of or (lambda queue: 0)
        self._bars: dict[int, tuple[int, int]] = {}  # number → address, size
        self._caps: dict[CapType, int] = {}
        self._msix_at = 0
        self._per_queue = False
        self._config_data = False
        self._doorbells: dict[int, tuple[int, int]] = {}
        self._irqs: dict[tuple[int, int], int] = {}
        self._queues: Sequence[int] = ()

    # -- the bus: regions, capabilities ------------------------------------------------------------------------------------

    def probe(self, device_id: int) -> Steps:
        """``virtio_pci_probe()``: identify the function, place its regions, find the structures; raises VirtioError (§4.1.5.1.1)."""
        vendor = yield from self.bus.config_read(Cfg.VENDOR_ID, 2)
        device = yield from self.bus.config_read(Cfg.DEVICE_ID, 2)
        ours = (DEVICE_ID_BASE + device_id, TRANSITIONAL_BLOCK if device_id == DEVICE_ID_BLOCK else None)
        if vendor != VENDOR or device not in ours:
            raise VirtioError(f"PCI {vendor:04x}:{device:04x}, expected {VENDOR:04x}:{DEVICE_ID_BASE + device_id:04x}", "4.1.2")
        if not self._bars:
            yield from self._place_regions()
        yield from self._walk_capabilities()
        if CapType.COMMON_CFG not in self._caps:
            raise VirtioError("no common configuration among the capabilities: a legacy device", "4.1.5.1.1.1")
        missing = [kind.name for kind in (CapType.ISR_CFG, CapType.NOTIFY_CFG) if kind not in self._caps]
        if missing:
            raise VirtioError(f"no {' and no '.join(missing)} among the capabilities", "4.1.4")
        self._common = (yield from self._map(CapType.COMMON_CFG, COMMON_1_0_BYTES, 4)).gpa
        self._isr = (yield from self._map(CapType.ISR_CFG, 1, 1)).gpa
        self._notify = yield from self._map(CapType.NOTIFY_CFG, 2, 2)
        self._multiplier = yield from self.bus.config_read(self._caps[CapType.NOTIFY_CFG] + NOTIFY_CAP_MULT, 4)
        self._device = (yield from self._map(CapType.DEVICE_CFG, 1, 4)) if CapType.DEVICE_CFG in self._caps else _Structure(0, 0)

    def _place_regions(self) -> Steps:
        """What the guest's PCI core does: learn each region's size by storing all ones, give it an address, switch decoding on."""
        bus = self.bus
        command = yield from bus.config_read(Cfg.COMMAND, 2)
        yield from bus.config_write(Cfg.COMMAND, command & ~int(Command.MEMORY | Command.MASTER), 2)
        free = {False: _WINDOW, True: _WIDE_WINDOW}
        number = 0
        while number < NUM_BARS:
            at = Cfg.BASE_ADDRESS_0 + 4 * number
            flags = (yield from bus.config_read(at, 4)) & BAR_FLAGS
            wide = not flags & BarBits.SPACE_IO and flags & MEM_TYPE_MASK == BarBits.MEM_TYPE_64 and number + 1 < NUM_BARS
            registers = (at, at + 4) if wide else (at,)
            read = 0
            for shift, register in enumerate(registers):
                yield from bus.config_write(register, 0xFFFFFFFF, 4)
                read |= (yield from bus.config_read(register, 4)) << 32 * shift
            bits = 64 if wide else 32
            size = ((1 << bits) - (read & ~BAR_FLAGS)) & (1 << bits) - 1
            if size and not flags & BarBits.SPACE_IO:
                if size & (size - 1):
                    raise VirtioError(f"base address register {number} reads {read:#x} after all ones: no power of two", "4.1")
                high = wide and self._above_4g
                gpa = (free[high] + size - 1) & ~(size - 1)
                free[high] = gpa + size
                self._bars[number] = gpa, size
                for shift, register in enumerate(registers):
                    yield from bus.config_write(register, gpa >> 32 * shift & 0xFFFFFFFF, 4)
            number += len(registers)
        yield from bus.config_write(Cfg.COMMAND, command | int(Command.MEMORY | Command.MASTER), 2)

    def _walk_capabilities(self) -> Steps:
        """The first virtio capability of each type that lies in a region we have, and MSI-X; others are passed over (§4.1.4.1)."""
        bus = self.bus
        self._caps, self._msix_at = {}, 0
        if not (yield from bus.config_read(Cfg.STATUS, 2)) & PciStatus.CAP_LIST:
            return
        at = (yield from bus.config_read(Cfg.CAPABILITY_LIST, 1)) & ~3
        for _ in range(_LIST_MAX):  # a list that bites its tail must end too
            if at < HEADER_BYTES:
                return
            identifier = yield from bus.config_read(at + CAP_LIST_ID, 1)
            if identifier == CapId.MSIX and not self._msix_at:
                self._msix_at = at
            elif identifier == CapId.VNDR:
                kind = yield from bus.config_read(at + Cap.CFG_TYPE, 1)
                bar = yield from bus.config_read(at + Cap.BAR, 1)
                if kind in _KINDS and bar in self._bars:
                    self._caps.setdefault(CapType(kind), at)
            at = (yield from bus.config_read(at + CAP_LIST_NEXT, 1)) & ~3

    def _map(self, kind: CapType, least: int, align: int) -> Generator[Any, int, _Structure]:
        """``vp_modern_map_capability()``: where a structure lies, if it is long enough, aligned and inside its region."""
        at = self._caps[kind]
        bar = yield from self.bus.config_read(at + Cap.BAR, 1)
        offset = yield from self.bus.config_read(at + Cap.OFFSET, 4)
        length = yield from self.bus.config_read(at + Cap.LENGTH, 4)
        gpa, size = self._bars.get(bar, (0, 0))
        if length < least:
            raise VirtioError(f"{kind.name} has {length} bytes, at least {least} are needed", "4.1.4")
        if offset % align:
            raise VirtioError(f"{kind.name} lies at offset {offset:#x}, not aligned to {align}", "4.1.4")
        if offset + least > size:
            raise VirtioError(f"{kind.name} lies at offset {offset:#x} of a region of {size:#x} bytes", "4.1.4")
        return _Structure(gpa + offset, min(length, size - offset))

    # -- the common configuration --------------------------------------------------------------------------------------------

    def _get(self, field: Common) -> Steps:
        return self.bus.read(self._common + field, COMMON_WIDTH[field])

    def _set(self, field: Common, value: int) -> Steps:
        return self.bus.write(self._common + field, value, COMMON_WIDTH[field])

    def status(self) -> Steps:
        """The device status."""
        return self._get(Common.DEVICE_STATUS)

    def _write_status(self, bits: int) -> Steps:
        return self._set(Common.DEVICE_STATUS, bits)

    def device_features(self) -> Steps:
        """All 64 offered feature bits."""
        bits = 0
        for sel in (0, 1):
            yield from self._set(Common.DEVICE_FEATURE_SELECT, sel)
            bits |= (yield from self._get(Common.DEVICE_FEATURE)) << (32 * sel)
        return bits

    def _write_features(self, features: int) -> Steps:
        self._config_data = bool(features & Feature.NOTIF_CONFIG_DATA)
        for sel in (0, 1):
            yield from self._set(Common.DRIVER_FEATURE_SELECT, sel)
            yield from self._set(Common.DRIVER_FEATURE, (features >> (32 * sel)) & 0xFFFFFFFF)

    def queue_size_max(self, queue: int) -> Steps:
        """The largest size of ``queue``, 0 if there is no such queue."""
        if queue >= (yield from self._get(Common.NUM_QUEUES)):
            return 0
        yield from self._set(Common.QUEUE_SELECT, queue)
        return (yield from self._get(Common.QUEUE_SIZE))

    def _generation(self) -> Steps:
        return self._get(Common.CONFIG_GENERATION)

    def _read_config(self, offset: int, size: int) -> Steps:
        return self.bus.read(self._field(offset, size), size)

    def _write_config(self, offset: int, value: int, size: int) -> Steps:
        return self.bus.write(self._field(offset, size), value, size)

    def _field(self, offset: int, size: int) -> int:
        if offset + size > self._device.length:
            raise VirtioError(f"the device configuration has {self._device.length} bytes, {offset + size} are needed", "4.1.4.6")
        return self._device.gpa + offset

    # -- queues and their vectors ------------------------------------------------------------------------------------------

    def find_vqs(self, layouts: Sequence[SplitLayout | PackedLayout], *, polled: bool = False) -> Steps:
        """``vp_find_vqs()``: a vector a queue, else one for all queues, else the line; ``polled`` queues have no interrupt."""
        self._queues = range(len(layouts))
        for per_queue in (True, False):
            vectors = 1 + (0 if polled else len(layouts)) if per_queue else 2
            if (yield from self._try_msix(layouts, vectors, per_queue, polled)):
                break
        else:
            self.vectors = 0
            for queue, layout in enumerate(layouts):
                yield from self._describe(queue, layout)
        for queue in self._queues:
            yield from self._set(Common.QUEUE_SELECT, queue)
            yield from self._set(Common.QUEUE_ENABLE, 1)

    def setup_queue(self, queue: int, layout: SplitLayout | PackedLayout) -> Steps:
        """One queue by itself, with the vector it had: to use it again after it was reset."""
        yield from self._describe(queue, layout)
        if self.vectors and not (yield from self._queue_vector(queue, self._vector_of(queue))):
            raise VirtioError(f"queue {queue} does not get its vector again", "4.1.5.1.2")
        yield from self._set(Common.QUEUE_ENABLE, 1)

    def reset_queue(self, queue: int) -> Steps:
        """Reset one queue and wait until the device has let go of it: ``vp_modern_set_queue_reset()``, queue_reset reads 0 (§4.1.4.3.2)."""
        yield from self._set(Common.QUEUE_SELECT, queue)
        yield from self._set(Common.QUEUE_RESET, 1)
        while (yield from self._get(Common.QUEUE_RESET)):
            pass

    def _describe(self, queue: int, layout: SplitLayout | PackedLayout) -> Steps:
        """``setup_vq()``: size, addresses, and where its doorbell is."""
        yield from self._set(Common.QUEUE_SELECT, queue)
        if (yield from self._get(Common.QUEUE_ENABLE)):
            raise VirtioError(f"queue {queue} is already in use", "4.1.5.1.3")
        yield from self._set(Common.QUEUE_SIZE, layout.size)
        for low, high, gpa in (
            (Common.QUEUE_DESC_LO, Common.QUEUE_DESC_HI, layout.desc),
            (Common.QUEUE_DRIVER_LO, Common.QUEUE_DRIVER_HI, layout.avail),
            (Common.QUEUE_DEVICE_LO, Common.QUEUE_DEVICE_HI, layout.used),
        ):
            yield from self._set(low, gpa & 0xFFFFFFFF)
            yield from self._set(high, gpa >> 32)
        offset = (yield from self._get(Common.QUEUE_NOTIFY_OFF)) * self._multiplier
        if offset + 2 > self._notify.length:
            raise VirtioError(f"queue {queue} has its doorbell at {offset:#x} of {self._notify.length:#x} bytes", "4.1.4.4")
        value = (yield from self._get(Common.QUEUE_NOTIF_CONFIG_DATA)) if self._config_data else queue
        self._doorbells[queue] = self._notify.gpa + offset, value

    def _vector_of(self, queue: int) -> int:
        return 1 + queue if self._per_queue else SHARED_VECTOR

    def _queue_vector(self, queue: int, vector: int) -> Generator[Any, int, bool]:
        """``vp_modern_queue_vector()``: write it and read it back; False if the device had no room for it."""
        yield from self._set(Common.QUEUE_SELECT, queue)
        yield from self._set(Common.QUEUE_MSIX_VECTOR, vector)
        read: int = yield from self._get(Common.QUEUE_MSIX_VECTOR)
        return read == vector

    def _try_msix(
        self, layouts: Sequence[SplitLayout | PackedLayout], vectors: int, per_queue: bool, polled: bool
    ) -> Generator[Any, int, bool]:
        """One of the ways to use MSI-X; False if the table or the device has no room for it, and then it is off."""
        if not self._msix_at or vectors > ((yield from self._flags()) & MsixFlags.QSIZE) + 1:
            return False
        self._per_queue = per_queue
        targets = [self._vcpu_of(vector - 1) if per_queue and vector else 0 for vector in range(vectors)]
        if max(targets.count(vcpu) for vcpu in set(targets)) > _IRQ_LAST - _IRQ_FIRST:
            return False
        yield from self._enable_msix(targets)
        yield from self._set(Common.CONFIG_MSIX_VECTOR, CONFIG_VECTOR)
        fits = (yield from self._get(Common.CONFIG_MSIX_VECTOR)) == CONFIG_VECTOR
        for queue, layout in enumerate(layouts):
            if fits:
                yield from self._describe(queue, layout)
                fits = yield from self._queue_vector(queue, NO_VECTOR if polled else self._vector_of(queue))
        if fits:
            self.vectors = vectors
            return True
        for queue in self._queues:
            yield from self._queue_vector(queue, NO_VECTOR)
        yield from self._set(Common.CONFIG_MSIX_VECTOR, NO_VECTOR)
        yield from self._disable_msix()
        return False

    def _flags(self) -> Steps:
        return self.bus.config_read(self._msix_at + MsixCap.FLAGS, 2)

    def _enable_msix(self, targets: list[int]) -> Steps:
        """``pci_enable_msix_range()``: under the mask for all, write a message into each entry and lift its own mask."""
        bus = self.bus
        command = yield from bus.config_read(Cfg.COMMAND, 2)
        yield from bus.config_write(Cfg.COMMAND, command | int(Command.INTX_DISABLE), 2)
        flags = (yield from self._flags()) & ~int(MsixFlags.ENABLE | MsixFlags.MASKALL)
        yield from bus.config_write(self._msix_at + MsixCap.FLAGS, flags | int(MsixFlags.ENABLE | MsixFlags.MASKALL), 2)
        table = yield from bus.config_read(self._msix_at + MsixCap.TABLE, 4)
        if table & MSIX_BIR not in self._bars:
            raise VirtioError(f"the MSI-X table lies in region {table & MSIX_BIR}, which the function does not have", "4.1.5.1.2")
        base = self._bars[table & MSIX_BIR][0] + (table & ~MSIX_BIR)
        self._irqs.clear()
        for vector, vcpu in enumerate(targets):
            irq = _IRQ_FIRST + targets[:vector].count(vcpu)
            self._irqs[vcpu, irq] = vector
            entry = base + vector * MSIX_ENTRY_BYTES
            yield from bus.write(entry + MsixEntry.VECTOR_CTRL, MSIX_MASKED)
            yield from bus.write(entry + MsixEntry.LOWER_ADDR, MSI_ADDRESS | vcpu << MSI_DEST_SHIFT)
            yield from bus.write(entry + MsixEntry.UPPER_ADDR, 0)
            yield from bus.write(entry + MsixEntry.DATA, irq)
            yield from bus.write(entry + MsixEntry.VECTOR_CTRL, 0)
        yield from bus.config_write(self._msix_at + MsixCap.FLAGS, flags | int(MsixFlags.ENABLE), 2)

    def _disable_msix(self) -> Steps:
        bus = self.bus
        flags = yield from self._flags()
        yield from bus.config_write(self._msix_at + MsixCap.FLAGS, flags & ~int(MsixFlags.ENABLE | MsixFlags.MASKALL), 2)
        command = yield from bus.config_read(Cfg.COMMAND, 2)
        yield from bus.config_write(Cfg.COMMAND, command & ~int(Command.INTX_DISABLE), 2)

    # -- the data path -------------------------------------------------------------------------------------------------------

    def notify(self, queue: int, data: int | None = None) -> Steps:
        """``vp_notify()``: store the queue's number, or what the device gave for it, to the queue's own address (§4.1.5.2).

        With ``data`` (NOTIFICATION_DATA) it is a store of 4 bytes, ``data`` in the upper half: ``vp_notify_with_data()``.
        """
        gpa, value = self._doorbells[queue]
        return self.bus.notify(queue, gpa, value) if data is None else self.bus.notify(queue, gpa, data << 16 | value, 4)

    @property
    def doorbells(self) -> dict[int, tuple[int, int]]:
        """Queue → the address of its doorbell and the value stored there."""
        return dict(self._doorbells)

    @property
    def isr_gpa(self) -> int:
        """The address of the ISR status."""
        return self._isr

    def vector_of_irq(self, vcpu: int, irq: int) -> int:
        """Which MSI-X vector the guest gave this vector of the processor ``vcpu`` to."""
        return self._irqs.get((vcpu, irq), CONFIG_VECTOR)

    def interrupt(self, vector: int = 0) -> Generator[Any, int, tuple[bool, Sequence[int]]]:
        """The handler of a message, which touches no register, or of the line, which reads the ISR status (§4.1.5.3, §4.1.5.4).

        ``vector`` is the MSI-X vector.  Returns whether the configuration changed, and the queues to look at.
        """
        if not self.vectors:
            yield ("vp_interrupt",)
            causes = yield from self.bus.read(self._isr, 1)
            return bool(causes & Interrupt.CONFIG), self._queues if causes else ()
        if vector == CONFIG_VECTOR:
            yield ("vp_config_changed",)
            return True, ()
        if self._per_queue:
            yield ("guest:irq_handler_entry", vector, vector - 1)
            return False, (vector - 1,)
        yield ("vp_vring_interrupt",)
        return False, self._queues
