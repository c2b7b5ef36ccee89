"""The packed virtqueue: VIRTIO 1.4 §2.8.  One ring of descriptors that both sides write; both halves are sans-I/O, as for split rings.

A descriptor is available when its AVAIL bit is the driver's wrap counter and its USED bit is not, and used when both are the device's.
Whoever publishes a batch writes the flags of its first descriptor last: the other side stops there, so all of it appears at once::

    driver.add_sgs(...)            all but one flags word   device.fill(...)               all but one flags word
    yield "virtqueue_add_sgs"                               yield "virtqueue_fill"
    driver.publish()               that flags word          device.flush()                 that flags word
    yield "virtqueue_kick_prepare"                          yield "virtqueue_flush"
    driver.kick_prepare()          fence, device's event    device.should_notify()         fence, driver's event

Positions count descriptors from the start and never wrap here; ``position % size`` is the slot, and the wrap counter is 1 in even laps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..errors import ConfigError, QueueFull, VirtioError
from ..memory import GuestMemory, GuestPages, Segment
from ..spec.virtio_ring import (
    DESC_ALIGN,
    DESC_BYTES,
    EVENT_ALIGN,
    EVENT_DESC,
    EVENT_DISABLE,
    EVENT_ENABLE,
    MAX_SIZE,
    PACKED_AVAIL,
    PACKED_DESC,
    PACKED_EVENT,
    PACKED_USED,
)
from .in_order import Offered, Taken
from .split import Chain

__all__ = ["PackedDevice", "PackedDriver", "PackedLayout", "check_packed_size"]

_Pieces = list[tuple[int, int, int]]  # gpa, bytes, flags
_NEXT, _WRITE, _INDIRECT = 1, 2, 4
_BITS = PACKED_AVAIL | PACKED_USED
_pack, _unpack = PACKED_DESC.pack_into, PACKED_DESC.unpack_from


def check_packed_size(size: int) -> int:
    """``size`` if it is 1 to 32768, else ConfigError (§2.8: it need not be a power of two)."""
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= MAX_SIZE:
        raise ConfigError(f"queue size {size!r}", f"a packed virtqueue takes 1 to {MAX_SIZE}")
    return size


class PackedLayout(NamedTuple):
    """Where a packed virtqueue lies: its size and the addresses of the ring, the driver's and the device's event suppression.

    The fields have the names of a split ring's areas, because transports tell all three by the same registers.
    """

    size: int
    desc: int
    avail: int
    used: int

    @classmethod
    def alloc(cls, pages: GuestPages, size: int) -> PackedLayout:
        """A fresh, zeroed ring from the guest's allocator."""
        check_packed_size(size)
        event = PACKED_EVENT.size
        layout = cls(size, pages.alloc(DESC_BYTES * size, DESC_ALIGN), pages.alloc(event, EVENT_ALIGN), pages.alloc(event, EVENT_ALIGN))
        layout.clear(pages.memory)
        return layout

    def clear(self, memory: GuestMemory) -> None:
        """Zero all three areas."""
        for gpa, length in self.areas():
            memory.view(gpa, length)[:] = bytes(length)

    def areas(self) -> tuple[Segment, Segment, Segment]:
        """(gpa, bytes) of the ring, the driver's and the device's event suppression."""
        return (self.desc, DESC_BYTES * self.size), (self.avail, PACKED_EVENT.size), (self.used, PACKED_EVENT.size)

    def check(self, memory: GuestMemory) -> None:
        """Raise VirtioError unless size, alignment and range are what §2.8 asks for."""
        if not 1 <= self.size <= MAX_SIZE:
            raise VirtioError(f"queue size {self.size} is not 1 to {MAX_SIZE}", "2.8")
        places = ("descriptor ring", self.desc, 16), ("driver event suppression", self.avail, 4), ("device event suppression", self.used, 4)
        for name, gpa, align in places:
            if gpa % align:
                raise VirtioError(f"{name} at {gpa:#x} is not aligned to {align}", "2.8")
        for gpa, length in self.areas():
            memory.view(gpa, length)


class _Half:
    """What both halves share: the ring as words, wrap counters, event words."""

    def __init__(self, memory: GuestMemory, layout: PackedLayout, event_idx: bool) -> None:
        self.layout = layout
        self.size = layout.size
        self.event_idx = event_idx
        self.fence = memory.fence
        self._memory = memory
        self._see(memory.view(layout.desc, DESC_BYTES * layout.size), *(memory.view(at, 4) for at in (layout.avail, layout.used)))

    def _see(self, ring: memoryview, driver_event: memoryview, device_event: memoryview) -> None:
        self._ring = ring
        self._words = ring.cast("H")  # the flags of slot i are word 8 i + 7
        self._events = driver_event.cast("I"), device_event.cast("I")  # an event is read whole: its two words belong together
        self._driver_event = driver_event.cast("H")
        self._device_event = device_event.cast("H")

    def _available(self, position: int) -> int:
        """The AVAIL and USED bits of a descriptor that the driver has just made available at ``position``."""
        return PACKED_USED if position // self.size & 1 else PACKED_AVAIL

    def _used(self, position: int) -> int:
        """The AVAIL and USED bits of a descriptor that the device has just used at ``position``."""
        return 0 if position // self.size & 1 else _BITS

    def _off_wrap(self, position: int) -> int:
        """``position`` as an event word: offset and wrap counter."""
        lap, offset = divmod(position, self.size)
        return offset | (not lap & 1) << 15

    def _wants(self, event: int, new: int, old: int) -> bool:
        """Whether the other side asked to be told of a step from ``old`` to ``new`` (§2.8.10, §2.8.13); a fence lies before."""
        flags, offset = event >> 16 & 3, event & 0x7FFF
        if flags == EVENT_DESC and self.event_idx:
            lap = new // self.size
            if (event >> 15 & 1) != (not lap & 1):
                lap -= 1
            return old <= lap * self.size + offset < new
        return flags != EVENT_DISABLE and new != old

    def _ask(self, event: memoryview, position: int) -> None:
        """Ask the other side to tell of the descriptor at ``position``; offset before flags."""
        if self.event_idx:
            event[0] = self._off_wrap(position)
            event[1] = EVENT_DESC
        else:
            event[1] = EVENT_ENABLE


def _too_long(written: int, writable: int, number: int) -> str:
    return f"used length {written} is more than the {writable} writable bytes of buffer {number}"


class PackedDriver(_Half):
    """The driver half; the interface is that of ``SplitDriver``."""

    def __init__(
        self,
        memory: GuestMemory,
        layout: PackedLayout,
        *,
        event_idx: bool = True,
        in_order: bool = False,
        indirect_tables: int = 0,
        indirect_segments: int = 0,
    ) -> None:
        super().__init__(memory, layout, event_idx)
        self.in_order = in_order
        size = layout.size
        self._tables = indirect_tables
        self.indirect_segments = indirect_segments
        self._table_bytes = indirect_segments * DESC_BYTES
        self._next = 0  # position of the next descriptor to make available
        self._published = self._kicked = 0
        self._held: tuple[int, int] | None = None  # slot and flags of the first descriptor that is not published
        self._last_used = 0
        self.callbacks = True
        self.broken: VirtioError | None = None
        self._slots: list[int] = [0] * size  # of a buffer in flight by its id: how many descriptors it takes
        self._writable: list[int] = [0] * size
        self._forget()
        self._ask(self._driver_event, 0)

    def _forget(self) -> None:
        """No buffer is in flight."""
        size = self.size
        self._tokens: list[object | None] = [None] * size
        self._ids = list(range(size - 1, -1, -1))
        self._free = size
        self._order = Offered() if self.in_order else None

    @classmethod
    def alloc(
        cls, pages: GuestPages, size: int, *, event_idx: bool = True, in_order: bool = False, indirect_segments: int = 0
    ) -> PackedDriver:
        """A ring with its memory, and one indirect table per slot if ``indirect_segments`` is given."""
        layout = PackedLayout.alloc(pages, size)
        tables = pages.alloc(size * indirect_segments * DESC_BYTES, DESC_ALIGN) if indirect_segments else 0
        options = dict(indirect_tables=tables, indirect_segments=indirect_segments)
        return cls(pages.memory, layout, event_idx=event_idx, in_order=in_order, **options)

    def renew(self, *, event_idx: bool, in_order: bool = False) -> PackedDriver:
        """The same memory as a new ring, for use after a reset; this half keeps a copy of its own, as ``SplitDriver.renew``."""
        self._see(*(memoryview(bytearray(view.cast("B"))) for view in (self._ring, self._driver_event, self._device_event)))
        self.layout.clear(self._memory)
        options = dict(indirect_tables=self._tables, indirect_segments=self.indirect_segments)
        return PackedDriver(self._memory, self.layout, event_idx=event_idx, in_order=in_order, **options)

    @property
    def num_free(self) -> int:
        """Descriptors that are free now."""
        return self._free

    def add_sgs(self, readable: Sequence[Segment], writable: Sequence[Segment], token: object) -> int:
        """Write one buffer's descriptors and return its id; raises QueueFull if it does not fit now.

        The device does not see it before ``publish`` (§2.8.21).  ``token`` must not be None.
        """
        count = len(readable) + len(writable)
        pieces = [(gpa, length, 0) for gpa, length in readable] + [(gpa, length, _WRITE) for gpa, length in writable]
        if 1 < count <= self.indirect_segments and self._free:
            table = self._tables + self._ids[-1] * self._table_bytes
            view = self._memory.view(table, count * DESC_BYTES)
            for i, (gpa, length, flags) in enumerate(pieces):
                _pack(view, i * DESC_BYTES, gpa, length, 0, flags)
            pieces = [(table, count * DESC_BYTES, _INDIRECT)]
        elif not count:
            raise ConfigError("a buffer without a segment", "give at least one (gpa, length)")
        elif count > self._free:
            if count > self.size and count > self.indirect_segments:
                raise ConfigError(f"a buffer of {count} segments on a queue of {self.size}", "use a larger queue or INDIRECT_DESC")
            raise QueueFull(f"{count} descriptors wanted, {self._free} free", "take completed buffers with get_buf()")
        number = self._ids.pop()
        self._place(pieces, number)
        self._tokens[number] = token
        self._writable[number] = sum(length for _, length in writable)
        if self._order is not None:
            self._order.ids.append(number)
        return number

    def _place(self, pieces: Sequence[tuple[int, int, int]], number: int) -> None:
        """Put descriptors at the next positions, the first one's flags last or, in a batch that is not published, not at all."""
        size, first = self.size, self._next
        last = len(pieces) - 1
        for i in range(last, -1, -1):
            gpa, length, flags = pieces[i]
            slot = (first + i) % size
            flags |= self._available(first + i) | (_NEXT if i < last else 0)
            if i or self._held is not None:
                _pack(self._ring, slot * DESC_BYTES, gpa, length, number, flags)
            else:
                self._held = slot, flags
                _pack(self._ring, slot * DESC_BYTES, gpa, length, number, self._words[8 * slot + 7])
        self._next = first + len(pieces)
        self._slots[number] = len(pieces)
        self._free -= len(pieces)

    def publish(self) -> None:
        """Show the device all that was added, with one store of a flags word (x86 keeps the order of stores)."""
        if self._held is not None and self.broken is None:
            slot, flags = self._held
            self._words[8 * slot + 7] = flags
            self._held = None
            self._published = self._next

    def kick_prepare(self) -> bool:
        """Whether the device wants a kick for what was published since the last call: ``virtqueue_kick_prepare()``, §2.8.21.3."""
        self.fence()
        new, old = self._published, self._kicked
        self._kicked = new
        return self._wants(self._events[1][0], new, old)

    def next_avail(self) -> int:
        """What a notification with data says: offset and wrap counter of the next descriptor to be offered (NOTIFICATION_DATA, §2.9)."""
        return self._off_wrap(self._published)

    def get_buf(self) -> tuple[object, int] | None:
        """(token, bytes written by the device) of the next used buffer, or None.  Raises VirtioError if the device lies."""
        position = self._last_used
        if self.broken is not None or not self.more_used():
            return None
        if self._order is None:
            _, written, number, _ = _unpack(self._ring, position % self.size * DESC_BYTES)
        else:
            number, written = self._next_in_order(self._order, position)
        token = self._tokens[number] if number < self.size else None
        if token is None:
            raise self._break(f"used descriptor names buffer {number}, which is not in flight", "2.8.8")
        if written > self._writable[number]:
            raise self._break(_too_long(written, self._writable[number], number), "2.8.8")
        self._tokens[number] = None
        self._ids.append(number)
        self._free += self._slots[number]
        self._last_used = position = position + self._slots[number]
        if self.callbacks and self.event_idx:
            self._driver_event[0] = self._off_wrap(position)
        return token, written

    def _next_in_order(self, order: Offered, position: int) -> tuple[int, int]:
        """The next used buffer: one of the batch that is being returned, or the first of the next batch (§2.8.9)."""
        if not order.left:
            _, written, number, _ = _unpack(self._ring, position % self.size * DESC_BYTES)
            count = order.batch(number, written)
            if not count:
                raise self._break(f"used descriptor names buffer {number}, which is not in flight", "2.8.8")
            if position + sum(self._slots[order.ids[i]] for i in range(count)) > self._published:
                raise self._break(f"used descriptor stands for {count} buffers, more than were made available", "2.8.9")
            if written > self._writable[number]:  # said of the whole batch, before any of it is returned
                raise self._break(_too_long(written, self._writable[number], number), "2.8.8")
        return order.next(self._writable)

    def _break(self, what: str, section: str) -> VirtioError:
        self.broken = VirtioError(what, section)
        return self.broken

    def more_used(self) -> bool:
        """Whether a used buffer waits; one load of a flags word, none within a batch."""
        position = self._last_used
        if self._order is not None and self._order.left:
            return True
        if position >= self._published:
            return False  # nothing is in flight: an old lap's bits mean nothing
        return self._words[8 * (position % self.size) + 7] & _BITS == self._used(position)

    def disable_cb(self) -> None:
        """Ask for no interrupts: ``virtqueue_disable_cb()``."""
        self.callbacks = False
        self._driver_event[1] = EVENT_DISABLE

    def enable_cb(self) -> None:
        """Ask for an interrupt for the next used buffer.  Then fence and look again with ``enable_cb_check``."""
        self.callbacks = True
        self._ask(self._driver_event, self._last_used)

    def enable_cb_check(self) -> bool:
        """True if no used buffer slipped in while callbacks were off; call after ``enable_cb`` and a trace point."""
        self.fence()
        return not self.more_used()

    def detach_unused_bufs(self) -> list[object]:
        """The tokens still in flight; for use after a reset, when the device will never return them."""
        numbers = range(self.size) if self._order is None else self._order.ids
        tokens = [token for number in numbers if (token := self._tokens[number]) is not None]
        self._forget()
        return tokens


class PackedDevice(_Half):
    """The device half; the interface is that of ``SplitDevice``, whose record of buffers in flight it does not have.

    ``state`` is where a ring goes on that another device served before and left with nothing in flight: two offsets of 15 bits, what is
    available next and, in the upper half, what is used next, each with its wrap counter.  ``completed`` counts the buffers used.
    """

    def __init__(
        self,
        memory: GuestMemory,
        layout: PackedLayout,
        *,
        number: int = 0,
        event_idx: bool = True,
        indirect: bool = True,
        in_order: bool = False,
        chain_max: int = 0,
        state: int = 1 << 15 | 1 << 31,
    ) -> None:
        layout.check(memory)
        super().__init__(memory, layout, event_idx)
        self.number = number
        self.indirect = indirect
        self.in_order = in_order
        self._order = Taken() if in_order else None
        self._batch_at: int | None = None  # position of the used descriptor of the batch that goes on
        self._key = number << 16
        self._chain_max = max(chain_max, layout.size)
        avail, used = self._position(state & 0xFFFF), self._position(state >> 16)
        self.last_avail_idx = avail if avail >= used else avail + 2 * layout.size  # the position that is looked at next
        self.used_idx = self._flushed = self._signalled = used
        self._held: tuple[int, int] | None = None
        self._filled = 0
        self.completed = 0
        self._where: dict[int, tuple[_Pieces, int]] = {}  # of a buffer in flight by its id: what it is, how many descriptors it takes
        self._taken = 0  # descriptors in flight
        self._last_id = 0
        self.notification = True
        self.in_flight = 0
        self.abandoned = False
        self._ask(self._device_event, self.last_avail_idx)

    def _position(self, word: int) -> int:
        """The first position with this offset and wrap counter; raises VirtioError if the ring has no such offset."""
        offset = word & 0x7FFF
        if offset >= self.size:
            raise VirtioError(f"a ring of {self.size} entries begins at {offset}", "2.8")
        return offset + (0 if word >> 15 else self.size)

    @property
    def state(self) -> int:
        """Where the device stands, both offsets with their wrap counters: what vhost-user's vring base is for a packed ring."""
        return self._off_wrap(self.last_avail_idx) | self._off_wrap(self.used_idx) << 16

    def empty(self) -> bool:
        """Whether the driver has published nothing new; one load of a flags word."""
        position = self.last_avail_idx
        return self._words[8 * (position % self.size) + 7] & _BITS != self._available(position)

    def notified(self, next_avail: int) -> None:
        """A notification told how far the driver is (NOTIFICATION_DATA, §2.9): nothing that the descriptors do not say themselves."""

    def pop(self) -> Chain | None:
        """The next available buffer with its segments mapped, or None.

        Raises VirtioError on a list longer than the ring, an id out of range or in flight, a bad, nested or chained indirect table, a
        zero-length or unmapped segment, or a readable segment behind a writable one.
        """
        if self.empty():
            return None
        position = self.last_avail_idx
        head, pieces, count = self._read(position)
        chain = self._chain(head, pieces)
        if head in self._where:
            raise VirtioError(f"buffer id {head} is in flight already", "2.8.6")
        if self._taken + count > self.size:
            raise VirtioError(f"{self._taken + count} descriptors in flight on a ring of {self.size}: one was offered twice", "2.8.21")
        self._where[head] = pieces, count
        self._taken += count
        self._last_id = head
        if self._order is not None:
            self._order.popped(head)
        self.last_avail_idx = position + count
        self.in_flight += 1
        if self.event_idx and self.notification:
            self._device_event[0] = self._off_wrap(position + count)
        return chain

    def last_popped(self) -> Chain:
        """The buffer of the last ``pop`` once more, for an owner that lost it; nothing is counted."""
        return self.map_chain(self._last_id)

    def map_chain(self, head: int) -> Chain:
        """The buffer in flight with this id, its segments mapped again; nothing is counted.  Raises as ``pop`` does."""
        return self._chain(head, self._where[head][0])

    def detach(self, chain: Chain) -> None:
        """Forget a popped buffer that will not be returned: ``virtqueue_detach_element()``."""
        self._taken -= self._where.pop(chain.head)[1]
        if self._order is not None:
            self._order.detach(chain.head)
        self.in_flight -= 1

    def abandon(self) -> None:
        """The driver resets this queue: what is filled and not published is forgotten, each buffer still held ends with ``detach``."""
        self.abandoned = True
        self.in_flight -= self._filled + (self._order.waiting if self._order is not None else 0)
        self._filled = 0
        self._order = self._held = None

    def _read(self, position: int) -> tuple[int, _Pieces, int]:
        """The buffer at a position: its id, its segments, how many descriptors it takes.  Each descriptor is read once."""
        size, count = self.size, 0
        pieces: _Pieces = []
        while True:
            gpa, length, number, flags = _unpack(self._ring, (position + count) % size * DESC_BYTES)
            pieces.append((gpa, length, flags))
            count += 1
            if flags & _INDIRECT and (flags & _NEXT or count > 1):
                raise VirtioError("an indirect descriptor in a list of others", "2.8.19")
            if not flags & _NEXT:
                break
            if count == size:
                raise VirtioError(f"a list longer than the ring ({size})", "2.8.16")
        if number >= size:
            raise VirtioError(f"buffer id {number}, the ring has {size}", "2.8.6")
        return number, self._table(gpa, length) if flags & _INDIRECT else pieces, count

    def _chain(self, number: int, pieces: _Pieces) -> Chain:
        chain = Chain(number, self._key | number)
        for gpa, length, flags in pieces:
            self._map(chain, gpa, length, flags)
        return chain

    def _table(self, table: int, length: int) -> _Pieces:
        if not self.indirect:
            raise VirtioError("an indirect descriptor, but INDIRECT_DESC was not negotiated", "2.8.19")
        if not length or length % DESC_BYTES:
            raise VirtioError(f"indirect table of {length} bytes, no multiple of 16", "2.8.7")
        entries = length // DESC_BYTES
        if entries > self._chain_max:
            raise VirtioError(f"indirect table of {entries} entries, at most {self._chain_max} are taken", "2.8.19")
        copied = b"".join(self._memory.views(table, length))  # read once
        pieces = []
        for at in range(0, length, DESC_BYTES):
            gpa, size, _, flags = _unpack(copied, at)
            if flags & _INDIRECT:
                raise VirtioError("an indirect table inside an indirect table", "2.8.19")
            pieces.append((gpa, size, flags))
        return pieces

    def _map(self, chain: Chain, gpa: int, length: int, flags: int) -> None:
        if not length:
            raise VirtioError(f"a zero-length descriptor at {gpa:#x}", "2.8.5")
        if flags & _WRITE:
            chain.writable += self._memory.views(gpa, length)
        elif chain.writable:
            raise VirtioError("a device-readable descriptor behind a device-writable one", "2.8.16")
        else:
            chain.readable += self._memory.views(gpa, length)

    def fill(self, chain: Chain, written: int) -> None:
        """Write the next used descriptor; nothing is published before ``flush``: ``virtqueue_fill()``."""
        if self._order is None:
            self._fill(self.used_idx, chain.head, written)
            return
        for head, length, whole in self._order.ended(chain.head, written, written == sum(map(len, chain.writable))):
            at = self.used_idx if self._batch_at is None else self._batch_at
            self._fill(at, head, length)
            self._batch_at = at if whole else None

    def _fill(self, position: int, head: int, written: int) -> None:
        """The used descriptor at ``position``, in a batch once more for each buffer that joins it."""
        count = self._where.pop(head)[1]
        slot = position % self.size
        flags = self._used(position) | (_WRITE if written else 0)
        if self._held is None or position == self._flushed:
            self._held = slot, flags
            flags = self._words[8 * slot + 7]
        gpa, _, _, _ = _unpack(self._ring, slot * DESC_BYTES)
        _pack(self._ring, slot * DESC_BYTES, gpa, written, head, flags)
        self.used_idx += count
        self._taken -= count
        self._filled += 1

    def flush(self) -> int:
        """Publish all that was filled with one store of a flags word; returns how many buffers: ``virtqueue_flush()``."""
        count, self._filled = self._filled, 0
        self.completed += count
        self._batch_at = None
        if self._held is not None:
            slot, flags = self._held
            self._words[8 * slot + 7] = flags
            self._held = None
        self._flushed = self.used_idx
        self.in_flight -= count
        return count

    def should_notify(self) -> bool:
        """Whether the driver wants an interrupt for what was flushed since the last call (§2.8.13)."""
        self.fence()
        new, old = self._flushed, self._signalled
        self._signalled = new
        return self._wants(self._events[0][0], new, old)

    def set_notification(self, enable: bool) -> None:
        """Ask for kicks or for none: ``virtio_queue_set_notification()``.  After enabling, look again with ``recheck``."""
        self.notification = enable
        if enable:
            self._ask(self._device_event, self.last_avail_idx)
        else:
            self._device_event[1] = EVENT_DISABLE

    def recheck(self) -> bool:
        """True if nothing slipped in while kicks were off; call after enabling and a trace point."""
        self.fence()
        return self.empty()
