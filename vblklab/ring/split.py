"""The split virtqueue: VIRTIO 1.4 §2.7.  Both halves are sans-I/O and trust nothing the other side wrote.

Neither half yields.  Wherever the specification fixes the order of two accesses to shared memory, the halves offer two
calls, and the part that owns the half puts a trace point between them::

    driver.add_sgs(...)            descriptors, ring entry  device.fill(...)               used element
    yield "virtqueue_add_sgs"                               yield "virtqueue_fill"
    driver.publish()               avail.idx                device.flush()                 used.idx
    yield "virtqueue_kick_prepare"                          yield "virtqueue_flush"
    driver.kick_prepare()          fence, avail_event       device.should_notify()         fence, used_event
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import cache
from struct import Struct
from typing import NamedTuple, Protocol

from ..errors import ConfigError, QueueFull, VirtioError
from ..memory import GuestMemory, GuestPages, Segment
from ..spec.virtio_ring import (
    AVAIL_ALIGN,
    AVAIL_NO_INTERRUPT,
    DESC,
    DESC_ALIGN,
    DESC_BYTES,
    DESC_TABLE_OF_THREE,
    MAX_SIZE,
    USED_ALIGN,
    USED_ELEM,
    USED_NO_NOTIFY,
    avail_ring_bytes,
    desc_table_bytes,
    used_ring_bytes,
)
from .in_order import Offered, Taken

__all__ = ["Chain", "Inflight", "SplitDevice", "SplitDriver", "SplitLayout", "check_queue_size", "need_event"]

_NEXT, _WRITE, _INDIRECT = 1, 2, 4
_pack_desc, _unpack_desc = DESC.pack_into, DESC.unpack_from
_pack_used, _unpack_used = USED_ELEM.pack_into, USED_ELEM.unpack_from


def need_event(event: int, new: int, old: int) -> bool:
    """True if ``event`` lies in [old, new) modulo 2**16: ``vring_need_event()``, §2.7.7.2 and §2.7.10."""
    return ((new - event - 1) & 0xFFFF) < ((new - old) & 0xFFFF)


def check_queue_size(size: int) -> int:
    """``size`` if it is a power of two up to 32768, else ConfigError (§2.7)."""
    if not isinstance(size, int) or not 1 <= size <= MAX_SIZE or size & (size - 1):
        raise ConfigError(f"queue size {size!r}", f"a split virtqueue takes a power of two from 1 to {MAX_SIZE}")
    return size


class SplitLayout(NamedTuple):
    """Where a split virtqueue lies: its size in entries and three guest-physical addresses."""

    size: int
    desc: int
    avail: int
    used: int

    @classmethod
    def alloc(cls, pages: GuestPages, size: int) -> SplitLayout:
        """Fresh, zeroed rings from the guest's allocator."""
        check_queue_size(size)
        layout = cls(
            size,
            pages.alloc(desc_table_bytes(size), DESC_ALIGN),
            pages.alloc(avail_ring_bytes(size), AVAIL_ALIGN),
            pages.alloc(used_ring_bytes(size), USED_ALIGN),
        )
        layout.clear(pages.memory)
        return layout

    def clear(self, memory: GuestMemory) -> None:
        """Zero all three areas, as a driver must before it hands them to a device."""
        for gpa, length in self.areas():
            memory.view(gpa, length)[:] = bytes(length)

    def areas(self) -> tuple[Segment, Segment, Segment]:
        """(gpa, bytes) of descriptor table, available ring and used ring."""
        size = self.size
        return (
            (self.desc, desc_table_bytes(size)),
            (self.avail, avail_ring_bytes(size)),
            (self.used, used_ring_bytes(size)),
        )

    def check(self, memory: GuestMemory) -> None:
        """Raise VirtioError unless size, alignment and range are what §2.7 asks for."""
        if not 1 <= self.size <= MAX_SIZE or self.size & (self.size - 1):
            raise VirtioError(f"queue size {self.size} is no power of two up to {MAX_SIZE}", "2.7")
        for name, gpa, align in (("descriptor table", self.desc, 16), ("available ring", self.avail, 2), ("used ring", self.used, 4)):
            if gpa % align:
                raise VirtioError(f"{name} at {gpa:#x} is not aligned to {align}", "2.7")
        for gpa, length in self.areas():
            memory.view(gpa, length)


_KEPT = 130
"""Entries of the longest table whose structure is kept: the driver chooses the lengths, and must not choose how much is kept."""


def _table(entries: int) -> Struct:
    """A whole indirect table as one structure."""
    return _kept_table(entries) if entries <= _KEPT else Struct("<" + "QIHH" * entries)


@cache
def _kept_table(entries: int) -> Struct:
    return Struct("<" + "QIHH" * entries)


_TABLES = [_table(entries) for entries in range(10)]
_unpack_three = DESC_TABLE_OF_THREE.unpack_from


def _too_long(written: int, writable: int, head: int) -> str:
    return f"used length {written} is more than the {writable} writable bytes of descriptor {head}"


class SplitDriver:
    """The driver half, in Linux's words (``virtqueue_add_sgs()``, ``virtqueue_get_buf()`` …).

    A buffer is a list of device-readable segments followed by a list of device-writable ones; ``token`` comes back from
    ``get_buf``.  With ``indirect_segments`` > 0 (VIRTIO_F_INDIRECT_DESC) a buffer of up to so many segments takes one slot.
    With ``in_order`` (VIRTIO_F_IN_ORDER) descriptors are taken in the table's order, and a used element may stand for a batch.
    """

    def __init__(
        self,
        memory: GuestMemory,
        layout: SplitLayout,
        *,
        event_idx: bool = True,
        in_order: bool = False,
        indirect_tables: int = 0,
        indirect_segments: int = 0,
    ) -> None:
        size = layout.size
        self.layout = layout
        self.size = size
        self.event_idx = event_idx
        self.in_order = in_order
        self.fence = memory.fence
        self._mask = size - 1
        self._desc = memory.view(layout.desc, desc_table_bytes(size))
        self._avail = memory.view(layout.avail, avail_ring_bytes(size)).cast("H")
        used = memory.view(layout.used, used_ring_bytes(size))
        self._used = used
        self._used16 = used.cast("H")
        self._used_event_at = 2 + size
        self._avail_event_at = 2 + 4 * size
        self._memory = memory
        self._tables = indirect_tables
        self.indirect_segments = indirect_segments
        self._table_bytes = indirect_segments * DESC_BYTES
        self._tables_view = memory.view(indirect_tables if indirect_segments else layout.desc, size * self._table_bytes)
        self.avail_idx = 0
        self.last_used_idx = 0
        self._published_idx = 0
        self._kicked_idx = 0
        self.callbacks = True
        self.broken: VirtioError | None = None
        self._writable: list[int] = [0] * size
        self._forget()
        if not event_idx:
            self._avail[0] = 0

    def _forget(self) -> None:
        """No buffer is in flight."""
        size = self.size
        self._tokens: list[object | None] = [None] * size
        self._chains: dict[int, list[int]] = {}  # head → slots, of buffers that take more than one
        self._free: list[int] = list(range(size - 1, -1, -1))  # the next one last
        self._order = None
        if self.in_order:
            self._order = Offered()
            self._free = deque(self._free)  # type: ignore[assignment]  # what comes back in order goes to the far end

    @classmethod
    def alloc(
        cls, pages: GuestPages, size: int, *, event_idx: bool = True, in_order: bool = False, indirect_segments: int = 0
    ) -> SplitDriver:
        """A ring with its memory, and one indirect table per slot if ``indirect_segments`` is given."""
        layout = SplitLayout.alloc(pages, size)
        tables = pages.alloc(size * indirect_segments * DESC_BYTES, DESC_ALIGN) if indirect_segments else 0
        options = dict(indirect_tables=tables, indirect_segments=indirect_segments)
        return cls(pages.memory, layout, event_idx=event_idx, in_order=in_order, **options)

    def renew(self, *, event_idx: bool, in_order: bool = False) -> SplitDriver:
        """The same memory as a new ring, for use after a reset; this half must be broken, so that it writes nothing any more.

        It keeps a copy of its own, so that a context which still stands inside it cannot reach the new ring.
        """
        self._avail = memoryview(bytearray(self._avail)).cast("H")
        self._used = used = memoryview(bytearray(self._used))
        self._used16 = used.cast("H")
        self.layout.clear(self._memory)
        options = dict(indirect_tables=self._tables, indirect_segments=self.indirect_segments)
        return SplitDriver(self._memory, self.layout, event_idx=event_idx, in_order=in_order, **options)

    @property
    def num_free(self) -> int:
        """Descriptors that are free now."""
        return len(self._free)

    def add_sgs(self, readable: Sequence[Segment], writable: Sequence[Segment], token: object) -> int:
        """Write one buffer's descriptors and ring entry and return its head; raises QueueFull if it does not fit now.

        The device does not see it before ``publish`` (§2.7.13).  ``token`` must not be None.
        """
        split = len(readable)
        count = split + len(writable)
        free = self._free
        if 1 < count <= self.indirect_segments and free:
            head = free.pop()
            at = head * self._table_bytes
            fields: list[int] = []
            link = 1
            for gpa, length in readable:
                fields += (gpa, length, 1, link)
                link += 1
            total = 0
            for gpa, length in writable:
                fields += (gpa, length, 3, link)
                total += length
                link += 1
            fields[-2] ^= 1
            fields[-1] = 0
            (_TABLES[count] if count < 10 else _table(count)).pack_into(self._tables_view, at, *fields)
            _pack_desc(self._desc, head << 4, self._tables + at, count << 4, 4, 0)
        else:
            head = self._add_direct(readable, writable, count, split)
            total = 0
            for _, length in writable:
                total += length
        self._tokens[head] = token
        self._writable[head] = total
        if self._order is not None:
            self._order.ids.append(head)
        idx = self.avail_idx
        self._avail[2 + (idx & self._mask)] = head
        self.avail_idx = (idx + 1) & 0xFFFF
        return head

    def _add_direct(self, readable: Sequence[Segment], writable: Sequence[Segment], count: int, split: int) -> int:
        """The buffer as a chain in the descriptor table itself."""
        free = self._free
        if count > len(free) or not count:
            if not count:
                raise ConfigError("a buffer without a segment", "give at least one (gpa, length)")
            if count > self.size and count > self.indirect_segments:
                raise ConfigError(f"a buffer of {count} segments on a queue of {self.size}", "use a larger queue or INDIRECT_DESC")
            raise QueueFull(f"{count} descriptors wanted, {len(free)} free", "take completed buffers with get_buf()")
        if self.in_order:
            slots = [free.pop() for _ in range(count)]
        else:
            slots = free[-count:][::-1]
            del free[-count:]
        last = count - 1
        for i, (gpa, length) in enumerate((*readable, *writable)):
            flags = (_WRITE if i >= split else 0) | (_NEXT if i < last else 0)
            _pack_desc(self._desc, slots[i] << 4, gpa, length, flags, slots[i + 1] if i < last else 0)
        if count > 1:
            self._chains[slots[0]] = slots
        return slots[0]

    def publish(self) -> None:
        """Show the device all that was added, with one store of ``avail.idx`` (x86 keeps the order of stores)."""
        if self.broken is None:  # else the memory may belong to the ring's successor already
            self._avail[1] = self._published_idx = self.avail_idx

    def kick_prepare(self) -> bool:
        """Whether the device wants a kick for what was published since the last call: ``virtqueue_kick_prepare()``, §2.7.13.4.

        Fences first, so that the device sees ``avail.idx`` before this side reads its event word.
        """
        self.fence()
        new, old = self._published_idx, self._kicked_idx  # another context may have added what it has not published yet
        self._kicked_idx = new
        if self.event_idx:
            return ((new - self._used16[self._avail_event_at] - 1) & 0xFFFF) < ((new - old) & 0xFFFF)  # need_event()
        return new != old and not self._used16[0] & USED_NO_NOTIFY

    def next_avail(self) -> int:
        """What a notification with data says: the index of the next buffer to be offered (NOTIFICATION_DATA, §2.9)."""
        return self._published_idx

    def get_buf(self) -> tuple[object, int] | None:
        """(token, bytes written by the device) of the next used buffer, or None.  Raises VirtioError if the device lies."""
        last = self.last_used_idx
        if self.broken is not None or self._used16[1] == last:
            return None
        if self._order is None:
            head, written = _unpack_used(self._used, 4 + 8 * (last & self._mask))
        else:
            head, written = self._next_in_order(self._order, last)
        token = self._tokens[head] if head < self.size else None
        if token is None:
            raise self._break(f"used element names descriptor {head}, which is not the head of a buffer in flight", "2.7.8")
        if written > self._writable[head]:
            raise self._break(_too_long(written, self._writable[head], head), "2.7.8.2")
        self._tokens[head] = None
        if self._order is not None:
            self._free.extendleft(self._chains.pop(head, (head,)))  # type: ignore[attr-defined]
        elif head in self._chains:
            self._free.extend(reversed(self._chains.pop(head)))
        else:
            self._free.append(head)
        self.last_used_idx = last = (last + 1) & 0xFFFF
        if self.callbacks and self.event_idx:
            self._avail[self._used_event_at] = last
        return token, written

    def _next_in_order(self, order: Offered, last: int) -> tuple[int, int]:
        """The next used buffer: one of the batch that is being returned, or the first of the next batch (§2.7.9)."""
        if not order.left:
            head, written = _unpack_used(self._used, 4 + 8 * (last & self._mask))
            count = order.batch(head, written)
            if not count:
                raise self._break(f"used element names descriptor {head}, which is not the head of a buffer in flight", "2.7.8")
            if count > (self._used16[1] - last) & 0xFFFF:
                raise self._break(f"used element stands for {count} buffers, more than used.idx was moved by", "2.7.9")
            if written > self._writable[head]:  # said of the whole batch, before any of it is returned
                raise self._break(_too_long(written, self._writable[head], head), "2.7.8.2")
        return order.next(self._writable)

    def _break(self, what: str, section: str) -> VirtioError:
        self.broken = VirtioError(what, section)
        return self.broken

    def more_used(self) -> bool:
        """Whether a used buffer waits; one load of ``used.idx``."""
        return self._used16[1] != self.last_used_idx

    def disable_cb(self) -> None:
        """Ask for no interrupts: ``virtqueue_disable_cb()``.  A hint; the device may still send one (§2.7.7)."""
        self.callbacks = False
        if self.event_idx:
            self._avail[self._used_event_at] = (self.last_used_idx - 1) & 0xFFFF  # half a turn away: never reached first
        else:
            self._avail[0] = AVAIL_NO_INTERRUPT

    def enable_cb(self) -> None:
        """Ask for an interrupt for the next used buffer.  Then fence and look again with ``enable_cb_check``."""
        self.callbacks = True
        if self.event_idx:
            self._avail[self._used_event_at] = self.last_used_idx
        else:
            self._avail[0] = 0

    def enable_cb_check(self) -> bool:
        """True if no used buffer slipped in while callbacks were off; call after ``enable_cb`` and a trace point (§2.7.14)."""
        self.fence()
        return self._used16[1] == self.last_used_idx

    def detach_unused_bufs(self) -> list[object]:
        """The tokens still in flight; for use after a reset, when the device will never return them."""
        heads = range(self.size) if self._order is None else self._order.ids
        tokens = [token for head in heads if (token := self._tokens[head]) is not None]
        self._forget()
        return tokens


class Chain:
    """A buffer as the device sees it: ``readable`` and ``writable`` views of guest memory, already range-checked.

    ``key`` is queue << 16 | head, the ``vq_head`` of trace points.
    """

    __slots__ = ("head", "key", "readable", "writable")

    def __init__(self, head: int, key: int) -> None:
        self.head = head
        self.key = key
        self.readable: list[memoryview] = []
        self.writable: list[memoryview] = []


class Inflight(Protocol):
    """A record of the heads in flight that outlives the device's process, such as vhost-user's in-flight region."""

    def popped(self, head: int) -> None:
        """The device took the buffer at ``head``."""

    def filled(self, head: int) -> None:
        """Its used element is written, ``used.idx`` is not."""

    def flushed(self, used_idx: int) -> None:
        """``used.idx`` was stored: everything filled before is the driver's again."""


class SplitDevice:
    """The device half, in QEMU's words (``virtqueue_pop()``, ``virtqueue_push()``, ``virtio_should_notify()`` …).

    Every call may raise VirtioError when the driver broke the specification; the device then sets DEVICE_NEEDS_RESET.
    ``last_avail_idx`` and ``used_idx`` (both run freely modulo 2**16) are where a ring goes on that another device served
    before; buffers between them that are still in flight come back through ``resubmit``.  With ``in_order`` (VIRTIO_F_IN_ORDER)
    a buffer that is filled before its turn waits for those before it, and one used element stands for all that can be used.
    """

    def __init__(
        self,
        memory: GuestMemory,
        layout: SplitLayout,
        *,
        number: int = 0,
        event_idx: bool = True,
        indirect: bool = True,
        in_order: bool = False,
        chain_max: int = 0,
        last_avail_idx: int = 0,
        used_idx: int = 0,
        inflight: Inflight | None = None,
    ) -> None:
        layout.check(memory)
        size = layout.size
        self.inflight = inflight
        self.number = number
        self.layout = layout
        self.size = size
        self.event_idx = event_idx
        self.indirect = indirect
        self.in_order = in_order
        self._order = Taken() if in_order else None
        self._batch_at: int | None = None  # index of the used element of the batch that goes on
        self.fence = memory.fence
        self._key = number << 16
        self._mask = size - 1
        self._chain_max = max(chain_max, size)
        self._threes = indirect and self._chain_max >= 3
        self._memory = memory
        self._bytes = memory.bytes
        self._base = memory.base
        self._end = memory.base + memory.size
        self._desc = memory.view(layout.desc, desc_table_bytes(size))
        self._avail = memory.view(layout.avail, avail_ring_bytes(size)).cast("H")
        self._used = memory.view(layout.used, used_ring_bytes(size))
        self._used16 = self._used.cast("H")
        self._used_event_at = 2 + size
        self._avail_event_at = 2 + 4 * size
        self.last_avail_idx = self._shadow_avail_idx = last_avail_idx & 0xFFFF
        self.used_idx = self._flushed_idx = self._signalled_idx = used_idx & 0xFFFF
        self._signalled_valid = False
        self.notification = True
        self.in_flight = 0
        self.abandoned = False

    @property
    def state(self) -> int:
        """Where the device stands, ``last_avail_idx``: what vhost-user's vring base is for a split ring."""
        return self.last_avail_idx

    @property
    def completed(self) -> int:
        """Buffers used so far, modulo 2**16."""
        return self.used_idx

    def empty(self) -> bool:
        """Whether the driver has published nothing new; one load of ``avail.idx`` if the last look is used up."""
        if self._shadow_avail_idx != self.last_avail_idx:
            return False
        self._shadow_avail_idx = idx = self._avail[1]
        return idx == self.last_avail_idx

    def notified(self, next_avail: int) -> None:
        """A notification told what avail.idx is (NOTIFICATION_DATA, §2.9): one load less, if it is news and can be."""
        last = self.last_avail_idx
        if (self._shadow_avail_idx - last) & 0xFFFF < (next_avail - last) & 0xFFFF <= self.size:
            self._shadow_avail_idx = next_avail

    def pop(self) -> Chain | None:
        """The next available buffer with its segments mapped, or None.

        Raises VirtioError on a jump of ``avail.idx`` by more than the queue size, a head or next out of range, a loop, a
        bad or nested indirect table, a zero-length or unmapped segment, or a readable segment behind a writable one.
        """
        last = self.last_avail_idx
        shadow = self._shadow_avail_idx
        if shadow == last:
            self._shadow_avail_idx = shadow = self._avail[1]
            if shadow == last:
                return None
        waiting = (shadow - last) & 0xFFFF
        if waiting > self.size:
            raise VirtioError(f"avail.idx jumped from {last} to {shadow}, more than the queue size {self.size}", "2.7.6")
        if self.in_flight >= self.size:
            raise VirtioError(f"{self.in_flight + 1} buffers in flight on a queue of {self.size}: a head was offered twice", "2.7.13")
        chain = self.map_chain(self._avail[2 + (last & self._mask)])
        self.last_avail_idx = last = (last + 1) & 0xFFFF
        self.in_flight += 1
        if self._order is not None:
            self._order.popped(chain.head)
        if self.inflight is not None:
            self.inflight.popped(chain.head)
        if self.event_idx and self.notification:
            self._used16[self._avail_event_at] = last
        return chain

    def resubmit(self, head: int) -> Chain:
        """The buffer at ``head`` again, which an earlier device took and did not return; it counts as in flight."""
        if self.in_flight >= self.size:
            raise VirtioError(f"{self.in_flight + 1} buffers in flight on a queue of {self.size}: a head was offered twice", "2.7.13")
        chain = self.map_chain(head)
        self.in_flight += 1
        if self._order is not None:
            self._order.popped(head)
        if self.inflight is not None:
            self.inflight.popped(head)
        return chain

    def last_popped(self) -> Chain:
        """The buffer of the last ``pop`` once more, for an owner that lost it; nothing is counted."""
        return self.map_chain(self._avail[2 + ((self.last_avail_idx - 1) & self._mask)])

    def detach(self, chain: Chain) -> None:
        """Forget a popped buffer that will not be returned: ``virtqueue_detach_element()``."""
        if self._order is not None:
            self._order.detach(chain.head)
        self.in_flight -= 1

    def abandon(self) -> None:
        """The driver resets this queue: what is filled and not published is forgotten, each buffer still held ends with ``detach``."""
        self.abandoned = True
        self.in_flight -= ((self.used_idx - self._flushed_idx) & 0xFFFF) + (self._order.waiting if self._order is not None else 0)
        self.used_idx = self._flushed_idx
        self._order = None

    def map_chain(self, head: int) -> Chain:
        """The buffer at ``head`` with its segments mapped; nothing is counted.  Raises as ``pop`` does."""
        if head >= self.size:
            raise VirtioError(f"available ring names descriptor {head}, the queue has {self.size}", "2.7.6")
        chain = Chain(head, self._key | head)
        gpa, length, flags, link = _unpack_desc(self._desc, head << 4)
        if flags & 4:
            if length != 48 or not self._take_three(chain, gpa, flags):
                self._walk_indirect(chain, gpa, length, flags)
        else:
            self._walk(chain, gpa, length, flags, link)
        return chain

    def _take_three(self, chain: Chain, table: int, flags: int) -> bool:
        """The table that Linux sends most, header, one data segment and status in order, in one look; False if it is another."""
        base, limit = self._base, self._end
        if flags != 4 or not self._threes or table < base or table + 48 > limit:
            return False
        memory = self._bytes
        a0, l0, f0, n0, a1, l1, f1, n1, a2, l2, f2, _ = _unpack_three(memory, table - base)  # read once
        if f0 != 1 or n0 != 1 or n1 != 2 or f2 != 2 or not (l0 and l1 and l2) or a0 < base or a1 < base or a2 < base:
            return False
        e0, e1, e2 = a0 + l0, a1 + l1, a2 + l2
        if e0 > limit or e1 > limit or e2 > limit:
            return False
        if f1 == 3:
            chain.readable.append(memory[a0 - base : e0 - base])
            chain.writable += (memory[a1 - base : e1 - base], memory[a2 - base : e2 - base])
        elif f1 == 1:
            chain.readable += (memory[a0 - base : e0 - base], memory[a1 - base : e1 - base])
            chain.writable.append(memory[a2 - base : e2 - base])
        else:
            return False
        return True

    def _walk(self, chain: Chain, gpa: int, length: int, flags: int, link: int) -> None:
        """Follow a chain in the descriptor table; it may end in one indirect table (§2.7.5.3.1 forbids more after it)."""
        readable, writable = chain.readable, chain.writable
        left = self.size
        while True:
            if flags & _INDIRECT:
                self._walk_indirect(chain, gpa, length, flags)
                return
            self._map(readable, writable, gpa, length, flags)
            if not flags & _NEXT:
                return
            left -= 1
            if not left:
                raise VirtioError(f"descriptor chain from {chain.head} is longer than the queue ({self.size}): a loop", "2.7.5")
            if link >= self.size:
                raise VirtioError(f"descriptor.next {link}, the queue has {self.size}", "2.7.5")
            gpa, length, flags, link = _unpack_desc(self._desc, link * DESC_BYTES)

    def _walk_indirect(self, chain: Chain, table: int, table_bytes: int, flags: int) -> None:
        if not self.indirect:
            raise VirtioError("an indirect descriptor, but INDIRECT_DESC was not negotiated", "2.7.5.3.1")
        if flags & _NEXT:
            raise VirtioError("a descriptor with both INDIRECT and NEXT", "2.7.5.3.1")
        if table_bytes == 0 or table_bytes % DESC_BYTES:
            raise VirtioError(f"indirect table of {table_bytes} bytes, no multiple of 16", "2.7.5.3")
        entries = table_bytes // DESC_BYTES
        if entries > self._chain_max:
            # §2.7.5.3.1 bounds a chain by the queue size; Linux has always sent up to seg_max + 2, so the owner sets the bound.
            raise VirtioError(f"indirect table of {entries} entries, at most {self._chain_max} are taken", "2.7.5.3.1")
        start = table - self._base
        source: bytes | memoryview = self._bytes
        if start < 0 or table + table_bytes > self._end:
            start, source = 0, self._elsewhere(table, table_bytes)
        copied = (_TABLES[entries] if entries < 10 else _table(entries)).unpack_from(source, start)  # read once
        readable, writable, memory, base, limit = chain.readable, chain.writable, self._bytes, self._base, self._end
        at = 0
        for _ in range(entries):
            gpa, length, flags, link = copied[at : at + 4]
            end = gpa + length
            if flags & _INDIRECT or not length or gpa < base or end > limit or (writable and not flags & _WRITE):
                if flags & _INDIRECT:
                    raise VirtioError("an indirect table inside an indirect table", "2.7.5.3.1")
                self._map(readable, writable, gpa, length, flags)  # in another region, or says which rule it breaks
            elif flags & _WRITE:
                writable.append(memory[gpa - base : end - base])
            else:
                readable.append(memory[gpa - base : end - base])
            if not flags & _NEXT:
                return
            if link >= entries:
                raise VirtioError(f"indirect descriptor.next {link}, the table has {entries}", "2.7.5.3")
            at = link * 4
        raise VirtioError(f"indirect chain is longer than its table ({entries}): a loop", "2.7.5.3")

    def _map(self, readable: list[memoryview], writable: list[memoryview], gpa: int, length: int, flags: int) -> None:
        if length == 0:
            raise VirtioError(f"a zero-length descriptor at {gpa:#x}", "2.7.5")
        if flags & _WRITE:
            writable += self._memory.views(gpa, length)
        elif writable:
            raise VirtioError("a device-readable descriptor behind a device-writable one", "2.7.4.2")
        else:
            readable += self._memory.views(gpa, length)

    def _elsewhere(self, gpa: int, length: int) -> bytes | memoryview:
        """Bytes outside the largest region, for a table to be read from."""
        views = self._memory.views(gpa, length)
        return views[0] if len(views) == 1 else b"".join(views)

    def fill(self, chain: Chain, written: int) -> None:
        """Write the next used element; nothing is published before ``flush``: ``virtqueue_fill()``."""
        if self._order is not None:
            self._fill_in_order(self._order, chain, written)
            return
        idx = self.used_idx
        _pack_used(self._used, 4 + 8 * (idx & self._mask), chain.head, written)
        self.used_idx = (idx + 1) & 0xFFFF
        if self.inflight is not None:
            self.inflight.filled(chain.head)

    def _fill_in_order(self, order: Taken, chain: Chain, written: int) -> None:
        """The used element of a batch is written again for each buffer that joins it, until ``flush`` shows it (§2.7.9)."""
        for head, length, whole in order.ended(chain.head, written, written == sum(map(len, chain.writable))):
            at = self.used_idx if self._batch_at is None else self._batch_at
            _pack_used(self._used, 4 + 8 * (at & self._mask), head, length)
            self._batch_at = at if whole else None
            self.used_idx = (self.used_idx + 1) & 0xFFFF
            if self.inflight is not None:
                self.inflight.filled(head)

    def flush(self) -> int:
        """Publish all filled elements with one store of ``used.idx``; returns how many: ``virtqueue_flush()``."""
        new = self.used_idx
        count = (new - self._flushed_idx) & 0xFFFF
        self._flushed_idx = new
        self._batch_at = None
        self.in_flight -= count
        self._used16[1] = new
        if self.inflight is not None:
            self.inflight.flushed(new)
        return count

    def should_notify(self) -> bool:
        """Whether the driver wants an interrupt for what was flushed since the last call that returned True (§2.7.7.2)."""
        self.fence()
        new, old, valid = self._flushed_idx, self._signalled_idx, self._signalled_valid
        if self._order is not None and new == old:
            return False  # all that was filled waits for its turn
        self._signalled_idx = new
        if not self.event_idx:
            return not self._avail[0] & AVAIL_NO_INTERRUPT
        self._signalled_valid = True
        return not valid or ((new - self._avail[self._used_event_at] - 1) & 0xFFFF) < ((new - old) & 0xFFFF)  # need_event()

    def set_notification(self, enable: bool) -> None:
        """Ask for kicks or for none: ``virtio_queue_set_notification()``.  After enabling, look again with ``recheck``."""
        self.notification = enable
        if self.event_idx:
            if enable:
                self._used16[self._avail_event_at] = self._shadow_avail_idx
        else:
            self._used16[0] = 0 if enable else USED_NO_NOTIFY

    def recheck(self) -> bool:
        """True if nothing slipped in while kicks were off; call after enabling and a trace point (§2.7.10)."""
        self.fence()
        return self.empty()
