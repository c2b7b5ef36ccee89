"""The packed virtqueue: its bytes by hand, every order of steps against the model of split rings, and drivers and devices that lie."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import initialize

import vblklab as vb
from tests.ring.test_split_properties import Buffer, Ring, play
from tests.support import gpa_of
from vblklab.memory import GuestMemory, GuestPages
from vblklab.ring import PackedDevice, PackedDriver, PackedLayout

NEXT, WRITE, INDIRECT, AVAIL, USED = 1, 2, 4, 1 << 7, 1 << 15
MEMORY = 1 << 17


def halves(
    size: int, start: int = 0, *, event_idx: bool = True, in_order: bool = False, indirect: int = 0
) -> tuple[PackedDriver, PackedDevice]:
    """Both halves over one memory, all positions at ``start``, where every descriptor of the laps before was used."""
    memory = GuestMemory(bytearray(MEMORY))
    common: dict[str, Any] = dict(event_idx=event_idx, in_order=in_order)
    driver = PackedDriver.alloc(GuestPages(memory, 0x1000), size, **common, indirect_segments=indirect)
    device = PackedDevice(memory, driver.layout, **common, indirect=bool(indirect), chain_max=indirect)
    for position in range(max(0, start - size), start):
        flags = 0 if position // size & 1 else AVAIL | USED
        memory.write(driver.layout.desc + 16 * (position % size), struct.pack("<QIHH", 0, 0, 0, flags))
    for half, names in ((driver, "_next _published _kicked _last_used"), (device, "last_avail_idx used_idx _flushed _signalled")):
        for name in names.split():
            setattr(half, name, start)
    device.set_notification(True)
    driver.enable_cb()
    return driver, device


def desc(driver: PackedDriver, slot: int) -> tuple[int, int, int, int]:
    found: tuple[int, int, int, int] = struct.unpack("<QIHH", driver._memory.read(driver.layout.desc + 16 * slot, 16))
    return found


# -- every order of steps ------------------------------------------------------------------------------------------------------------


class Packed(Ring):
    """The model of split rings, with what a packed ring is in its place: an index counts descriptors."""

    @initialize(size=st.sampled_from([1, 2, 3, 4, 5, 8]), start=st.sampled_from([0, 1, 7, 8, 9, 1000]))
    def begin(self, size: int, start: int) -> None:
        self.prepare(size, start)

    def make(self) -> None:
        options: dict[str, Any] = dict(event_idx=self.event_idx, in_order=self.in_order, indirect=self.segments)
        self.driver, self.device = halves(self.size, self.start, **options)  # type: ignore[assignment]
        self.memory = self.driver._memory

    def steps(self, buffers: list[Buffer]) -> int:
        return sum(buffer.slots for buffer in buffers)

    def _asked(self, gpa: int, old: int, new: int) -> bool:
        word, flags = struct.unpack("<HH", self.memory.read(gpa, 4))
        if flags == 2:
            assert self.event_idx
            near = range(max(old, new - self.size), new)
            return any((position % self.size, not position // self.size & 1) == (word & 0x7FFF, bool(word >> 15)) for position in near)
        return flags == 0 and old != new

    def kick_expected(self) -> bool:
        return self._asked(self.driver.layout.used, self.kicked_idx, self.avail_idx)

    def interrupt_expected(self) -> bool:
        return self._asked(self.driver.layout.avail, self.told_idx, self.used_idx)

    def check_words(self) -> None:
        """The descriptor at each side's position says whether there is something for it."""
        for position, waiting, bits in (
            (self.device.last_avail_idx, self.offered, (AVAIL, USED)),  # in even laps, in odd laps
            (self.driver._last_used, self.used, (AVAIL | USED, 0)),  # type: ignore[attr-defined]
        ):
            flags = desc(self.driver, position % self.size)[3] & (AVAIL | USED)  # type: ignore[arg-type]
            if self.in_order and waiting is self.used:
                assert self.driver.more_used() == bool(waiting), "within a batch no descriptor says so"
            elif waiting or bits[0] == AVAIL:
                assert (flags == bits[position // self.size & 1]) == bool(waiting)


@pytest.mark.parametrize("event_idx", [True, False], ids=["event_idx", "flags"])
@pytest.mark.parametrize("segments", [0, 2, 10], ids=["direct", "indirect 2", "indirect 10"])
def test_every_buffer_comes_back_once_and_no_notification_is_lost(segments: int, event_idx: bool) -> None:
    play(Packed, event_idx, segments)


@pytest.mark.clause("BASIC-DEV-036")
@pytest.mark.parametrize(("segments", "event_idx"), [(0, True), (10, False)], ids=["direct-event_idx", "indirect 10-flags"])
def test_in_order_every_buffer_comes_back_in_the_order_it_was_offered(segments: int, event_idx: bool) -> None:
    play(Packed, event_idx, segments, in_order=True)


# -- bytes ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.clause("PACKED-DEV-006", "PACKED-DRV-014")
def test_the_bytes_of_two_laps() -> None:
    """§2.8: AVAIL and USED of each lap, the id in every descriptor of a list, the first flags last, used descriptors in their place."""
    driver, device = halves(4)
    first = driver.add_sgs([(0x8000, 16)], [(0x9000, 512), (0xA000, 1)], "a")
    assert desc(driver, 0)[3] & (AVAIL | USED) == 0, "not published"
    assert desc(driver, 1) == (0x9000, 512, first, NEXT | WRITE | AVAIL) and desc(driver, 2) == (0xA000, 1, first, WRITE | AVAIL)
    assert device.pop() is None
    driver.publish()
    assert desc(driver, 0) == (0x8000, 16, first, NEXT | AVAIL)
    chain = device.pop()
    assert chain is not None and chain.head == first and device.pop() is None
    device.fill(chain, 513)
    assert driver.get_buf() is None, "not flushed"
    device.flush()
    assert desc(driver, 0)[1:] == (513, first, WRITE | AVAIL | USED)
    assert driver.get_buf() == ("a", 513)
    second = driver.add_sgs([(0x8000, 16)], [(0x9000, 1)], "b")  # slots 3 and, in the next lap, 0
    driver.publish()
    assert desc(driver, 3) == (0x8000, 16, second, NEXT | AVAIL) and desc(driver, 0) == (0x9000, 1, second, WRITE | USED)
    chain = device.pop()
    assert chain is not None
    device.fill(chain, 0)
    device.flush()
    assert desc(driver, 3)[1:] == (0, second, AVAIL | USED)
    third = driver.add_sgs([(0x8000, 16)], [], "c")
    driver.publish()
    assert driver.get_buf() == ("b", 0)
    assert desc(driver, 1) == (0x8000, 16, third, USED)
    chain = device.pop()
    assert chain is not None
    device.fill(chain, 0)
    device.flush()
    assert desc(driver, 1)[1:] == (0, third, 0), "both bits are the wrap counter, now 0"


@pytest.mark.clause("PACKED-DRV-016")
def test_an_indirect_table_has_no_flag_but_write() -> None:
    driver, device = halves(2, indirect=4)
    number = driver.add_sgs([(0x8000, 16)], [(0x9000, 512), (0xA000, 1)], "a")
    driver.publish()
    table, length, named, flags = desc(driver, 0)
    assert (length, named, flags) == (48, number, INDIRECT | AVAIL)
    entries = [struct.unpack("<QIHH", driver._memory.read(table + 16 * i, 16)) for i in range(3)]
    assert [(e[0], e[1], e[3]) for e in entries] == [(0x8000, 16, 0), (0x9000, 512, WRITE), (0xA000, 1, WRITE)]
    chain = device.pop()
    assert chain is not None and [len(view) for view in chain.writable] == [512, 1]


def test_event_words_name_the_next_descriptor_and_its_wrap_counter() -> None:
    driver, device = halves(4, start=6)
    assert driver._memory.read(driver.layout.avail, 4) == driver._memory.read(driver.layout.used, 4) == struct.pack("<HH", 2, 2)
    driver.disable_cb()
    device.set_notification(False)
    assert driver._memory.read(driver.layout.avail, 4)[2:] == driver._memory.read(driver.layout.used, 4)[2:] == b"\1\0"
    plain, _ = halves(4, event_idx=False)
    assert plain._memory.read(plain.layout.avail, 4) == bytes(4)


@pytest.mark.parametrize("size", [1, 3, 100, 32768])
def test_any_size_up_to_32768_is_one(size: int) -> None:
    assert vb.Packed(size).size == size


@pytest.mark.parametrize("size", [0, -1, 32769, 2.5, True])
def test_other_sizes_are_refused(size: Any) -> None:
    with pytest.raises(vb.ConfigError, match="1 to 32768"):
        vb.Packed(size)


@pytest.mark.parametrize(("field", "value"), [("desc", 0x1008), ("avail", 0x3002), ("used", 0x3001), ("size", 0), ("desc", 1 << 40)])
def test_a_layout_that_cannot_be_is_refused(field: str, value: int) -> None:
    layout = PackedLayout(8, 0x1000, 0x2000, 0x2004)._replace(**{field: value})
    with pytest.raises(vb.VirtioError):
        PackedDevice(GuestMemory(bytearray(MEMORY)), layout)


# -- drivers that lie ----------------------------------------------------------------------------------------------------------------

LIES: dict[str, tuple[list[tuple[int, int, int, int]], str]] = {
    "a list longer than the ring": ([(0x8000, 16, 0, NEXT)] * 4, "longer than the ring"),
    "an id out of range": ([(0x8000, 16, 4, 0)], "buffer id 4"),
    "memory that is not": ([(1 << 40, 16, 0, 0)], "outside memory"),
    "an address that wraps": ([((1 << 64) - 8, 16, 0, 0)], "outside memory"),
    "no length": ([(0x8000, 0, 0, 0)], "zero-length"),
    "readable behind writable": ([(0x8000, 16, 0, NEXT | WRITE), (0x9000, 16, 0, 0)], "behind"),
    "indirect and next": ([(0x8000, 16, 0, INDIRECT | NEXT), (0x9000, 16, 0, 0)], "indirect"),
    "indirect behind others": ([(0x8000, 16, 0, NEXT), (0x9000, 16, 0, INDIRECT)], "indirect"),
    "an odd table": ([(0x8000, 20, 0, INDIRECT)], "no multiple"),
    "an empty table": ([(0x8000, 0, 0, INDIRECT)], "no multiple"),
    "a table too long": ([(0x8000, 16 * 200, 0, INDIRECT)], "at most"),
    "a table that is not": ([(1 << 40, 32, 0, INDIRECT)], "outside memory"),
    "a table in a table": ([(0x8000, 16, 0, INDIRECT)], "inside an indirect"),
}


@pytest.mark.parametrize("what", LIES)
@pytest.mark.parametrize("start", [0, 6])
def test_a_lie_of_the_driver_is_an_error_and_changes_nothing(what: str, start: int) -> None:
    driver, device = halves(4, start, indirect=8)
    memory = driver._memory
    memory.write(0x8000, struct.pack("<QIHH", 0x9000, 16, 0, INDIRECT))
    descriptors, says = LIES[what]
    for i, (gpa, length, number, flags) in enumerate(descriptors):
        bits = USED if (start + i) // 4 & 1 else AVAIL
        memory.write(driver.layout.desc + 16 * ((start + i) % 4), struct.pack("<QIHH", gpa, length, number, flags | bits))
    before = bytes(memory.bytes)
    for _ in range(2):
        with pytest.raises(vb.VirtioError, match=says):
            device.pop()
    assert bytes(memory.bytes) == before and device.in_flight == 0


def test_an_id_or_a_slot_offered_twice_is_an_error() -> None:
    for ids, says in (((0, 0), "in flight already"), ((0, 1, 2, 3, 0), "in flight already")):
        driver, device = halves(4)
        for position, number in enumerate(ids):
            flags = USED if position // 4 & 1 else AVAIL
            driver._memory.write(driver.layout.desc + 16 * (position % 4), struct.pack("<QIHH", 0x8000, 16, number, flags))
            if position < len(ids) - 1:
                assert device.pop() is not None
        with pytest.raises(vb.VirtioError, match=says):
            device.pop()


@pytest.mark.parametrize(("number", "length", "says"), [(3, 0, "not in flight"), (9, 0, "not in flight"), (0, 514, "514 is more than")])
def test_a_lie_of_the_device_breaks_the_driver(number: int, length: int, says: str) -> None:
    driver, _ = halves(4)
    driver.add_sgs([(0x8000, 16)], [(0x9000, 512), (0xA000, 1)], "a")
    driver.publish()
    driver._memory.write(driver.layout.desc, struct.pack("<QIHH", 0, length, number, AVAIL | USED))
    with pytest.raises(vb.VirtioError, match=says):
        driver.get_buf()
    assert driver.broken is not None and driver.get_buf() is None


@given(ring=st.binary(min_size=64, max_size=64), events=st.binary(min_size=4, max_size=4), start=st.integers(0, 20))
def test_any_bytes_are_a_buffer_or_an_error(ring: bytes, events: bytes, start: int) -> None:
    driver, device = halves(4, start, indirect=8)
    memory = driver._memory
    memory.write(driver.layout.desc, ring)
    memory.write(driver.layout.avail, events)
    try:
        for _ in range(8):
            chain = device.pop()
            if chain is None:
                break
            for view in (*chain.readable, *chain.writable):
                gpa, length = gpa_of(memory, view)
                assert gpa >= 0 and gpa + length <= MEMORY
            device.fill(chain, 0)
            device.flush()
            device.should_notify()
    except vb.VirtioError:
        pass


# -- in a recipe ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", [vb.SimMachine(), vb.SimMachine(seed=5, interleave="random"), vb.LiveMachine()], ids=repr)
@pytest.mark.parametrize(("size", "options"), [(128, {}), (7, {"event_idx": False}), (128, {"indirect": False}), (5, {})])
def test_the_queue_is_the_only_thing_that_changes(machine: Any, size: int, options: dict[str, Any]) -> None:
    app = vb.Fio(rw="randrw", bssplit="512/40:4k/50:64k/10", iodepth=16, numjobs=2, number_ios=200, size=4 << 20, verify="crc32")
    recipe = vb.Pipeline(app=app, device=vb.VirtioBlkDevice(queues=2, **options), disk=vb.Ram(8 << 20), kvm=vb.Kvm(vcpus=2))
    split, packed = recipe.run(machine), recipe.replace(queue=vb.Packed(size)).run(machine)
    assert (packed.ios, packed.bytes, packed.errors, packed.mismatches) == (split.ios, split.bytes, 0, 0)


def test_what_cannot_be_packed_is_refused() -> None:
    recipe = vb.Pipeline(queue=vb.Packed(64))
    with pytest.raises(vb.ConfigError, match="no IN_ORDER here"):
        recipe.replace(queue=vb.Packed(64, in_order=True)).boot(vb.VhostUserMachine())
    vm = recipe.boot(vb.SimMachine())
    with pytest.raises(vb.ConfigError, match="ring view"):
        vm.ring()
    assert recipe.set("queue=split").queue == vb.Split(64) and recipe.set("queue=32").queue == vb.Packed(32)
    assert vb.Pipeline().set("queue=packed").queue == vb.Packed(256)


def test_a_learners_device_that_raises_fails_one_request_and_serves_the_others() -> None:
    shown: list[BaseException] = []

    class Broken(vb.VirtioBlkDevice):
        def parse(self, queue: Any, chain: Any) -> Any:
            request = super().parse(queue, chain)
            if request.sector == 8:
                raise ZeroDivisionError("a slip")
            return request

    app = vb.Fio(rw="read", bs=4096, size=65536, number_ios=16, iodepth=4)
    vm = vb.Pipeline(app=app, device=Broken, queue=vb.Packed(16)).boot(vb.SimMachine())
    vm.device.on_exception = shown.append
    run = vm.run()
    assert run.ios == 16 and run.errors == 1 and len(shown) == 1
