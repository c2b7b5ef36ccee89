"""Both halves of the split ring against each other near the index wrap, and the device half against hostile drivers."""

from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vblklab as vb
from vblklab.iostack import Bio
from vblklab.memory import GuestMemory, GuestPages
from vblklab.ring import SplitDevice, SplitDriver, SplitLayout, need_event
from vblklab.spec.virtio import Status
from vblklab.spec.virtio_ring import DESC

NEXT, WRITE, INDIRECT = 1, 2, 4


def pair(size: int, start: int, *, event_idx: bool, indirect: bool) -> tuple[GuestMemory, GuestPages, SplitDriver, SplitDevice]:
    """Two halves over one memory whose indices stand at ``start``."""
    memory = GuestMemory(bytearray(1 << 20))
    pages = GuestPages(memory, 0x1000)
    driver = SplitDriver.alloc(pages, size, event_idx=event_idx, indirect_segments=8 if indirect else 0)
    device = SplitDevice(memory, driver.layout, event_idx=event_idx, indirect=indirect, chain_max=10)
    driver._avail[1] = driver._used16[1] = start
    driver.avail_idx = driver.last_used_idx = driver._kicked_idx = start
    device.last_avail_idx = device._shadow_avail_idx = device.used_idx = device._flushed_idx = device._signalled_idx = start
    if event_idx:
        driver._avail[2 + size] = start
        driver._used16[2 + 4 * size] = start
    return memory, pages, driver, device


@given(event=st.integers(0, 65535), old=st.integers(0, 65535), count=st.integers(0, 65535))
def test_2_7_10_need_event_is_membership_in_the_half_open_window(event: int, old: int, count: int) -> None:
    new = (old + count) & 0xFFFF
    assert need_event(event, new, old) == ((event - old) & 0xFFFF < count)


@given(seed=st.integers(0, 2**32), size=st.sampled_from([1, 2, 4, 16]), event_idx=st.booleans(), indirect=st.booleans())
def test_every_buffer_comes_back_once_with_its_bytes(seed: int, size: int, event_idx: bool, indirect: bool) -> None:
    rng = random.Random(seed)
    _, pages, driver, device = pair(size, -rng.randrange(40) & 0xFFFF, event_idx=event_idx, indirect=indirect)
    area = pages.alloc(64 * 64)
    free = list(range(64))
    waiting: dict[int, list[int]] = {}
    popped: deque[object] = deque()
    returned = []
    for _ in range(300):
        match rng.randrange(4):
            case 0:
                if not free:
                    continue
                token = free.pop()
                out, into = rng.randrange(3), rng.randrange(3)
                if out + into == 0 or (not indirect and out + into > size):
                    free.append(token)
                    continue
                segments = [(area + token * 64 + 8 * i, rng.randrange(1, 9)) for i in range(out + into)]
                try:
                    driver.add_sgs(segments[:out], segments[out:], token)
                except vb.QueueFull:
                    free.append(token)
                    continue
                waiting[token] = [length for _, length in segments[out:]]
                driver.publish()
                driver.kick_prepare()
            case 1:
                if (chain := device.pop()) is not None:
                    popped.append(chain)
            case 2:
                if popped:
                    popped.rotate(rng.randrange(len(popped)))  # used in any order
                    chain = popped.popleft()
                    device.fill(chain, sum(map(len, chain.writable)))
                    device.flush()
                    device.should_notify()
            case 3:
                if (got := driver.get_buf()) is not None:
                    token, written = got
                    assert written == sum(waiting.pop(token))
                    free.append(token)
                    returned.append(token)
    while (chain := device.pop()) is not None or popped:
        popped.append(chain) if chain else None
        one = popped.popleft()
        device.fill(one, 0)
        device.flush()
    while (got := driver.get_buf()) is not None:
        waiting.pop(got[0])
    assert not waiting and driver.num_free == size


class Scribe:
    """A driver by hand: writes what it is told into the ring."""

    def __init__(self, size: int = 8, *, indirect: bool = True) -> None:
        self.memory = GuestMemory(bytearray(1 << 16))
        self.layout = SplitLayout.alloc(GuestPages(self.memory, 0x1000), size)
        self.device = SplitDevice(self.memory, self.layout, indirect=indirect)

    def desc(self, slot: int, gpa: int, length: int, flags: int, link: int = 0) -> None:
        self.memory.write(self.layout.desc + 16 * slot, DESC.pack(gpa, length, flags, link))

    def offer(self, head: int, idx: int = 1) -> None:
        self.memory.write(self.layout.avail + 2, idx.to_bytes(2, "little") + head.to_bytes(2, "little"))


def _hostile() -> dict[str, object]:
    def table(scribe: Scribe, *entries: tuple[int, int, int, int], length: int | None = None, flags: int = INDIRECT) -> None:
        for i, entry in enumerate(entries):
            scribe.memory.write(0x8000 + 16 * i, DESC.pack(*entry))
        scribe.desc(0, 0x8000, 16 * len(entries) if length is None else length, flags)
        scribe.offer(0)

    return {
        "2.7.5: a loop": lambda s: (s.desc(0, 0x9000, 16, NEXT, 1), s.desc(1, 0x9000, 16, NEXT, 0), s.offer(0)),
        "2.7.5: next out of range": lambda s: (s.desc(0, 0x9000, 16, NEXT, 8), s.offer(0)),
        "2.7.5: outside memory": lambda s: (s.desc(0, 0xFFF0, 17, 0), s.offer(0)),
        "2.7.5: wraps 2**64": lambda s: (s.desc(0, 2**64 - 8, 16, 0), s.offer(0)),
        "2.7.5: zero length": lambda s: (s.desc(0, 0x9000, 0, 0), s.offer(0)),
        "2.7.4.2: readable after writable": lambda s: (s.desc(0, 0x9000, 1, WRITE | NEXT, 1), s.desc(1, 0x9000, 1, 0), s.offer(0)),
        "2.7.6: head out of range": lambda s: s.offer(8),
        "2.7.6: avail.idx jumps": lambda s: s.offer(0, 9),
        "2.7.5.3: table length": lambda s: table(s, (0x9000, 16, 0, 0), length=17),
        "2.7.5.3: empty table": lambda s: table(s, length=0),
        "2.7.5.3.1: nested": lambda s: table(s, (0x9000, 16, INDIRECT, 0)),
        "2.7.5.3.1: NEXT with INDIRECT": lambda s: table(s, (0x9000, 16, 0, 0), flags=INDIRECT | NEXT),
        "2.7.5.3: loop in the table": lambda s: table(s, (0x9000, 16, NEXT, 1), (0x9000, 16, NEXT, 0)),
        "2.7.5.3: next beyond the table": lambda s: table(s, (0x9000, 16, NEXT, 7)),
        "2.7.5.3: segment outside memory": lambda s: table(s, (0x9000, 16, NEXT, 1), (0xFFFF, 16, WRITE | NEXT, 2), (0x9000, 1, WRITE, 0)),
        "2.7.5.3: table outside memory": lambda s: (s.desc(0, 0xFFF8, 48, INDIRECT), s.offer(0)),
        "2.7.5.3.1: table too long": lambda s: table(s, *[(0x9000, 16, NEXT, i + 1) for i in range(9)]),
    }


@pytest.mark.parametrize("case", _hostile())
def test_pop_refuses(case: str) -> None:
    scribe = Scribe()
    _hostile()[case](scribe)  # type: ignore[operator]
    with pytest.raises(vb.VirtioError):
        scribe.device.pop()


def test_2_7_5_3_1_pop_refuses_an_indirect_table_that_was_not_negotiated() -> None:
    scribe = Scribe(indirect=False)
    scribe.desc(0, 0x9000, 48, INDIRECT)
    scribe.offer(0)
    with pytest.raises(vb.VirtioError):
        scribe.device.pop()


@given(garbage=st.binary(min_size=400, max_size=400), idx=st.integers(0, 65535))
def test_garbage_in_the_ring_is_a_buffer_or_a_typed_error(garbage: bytes, idx: int) -> None:
    scribe = Scribe()
    scribe.memory.write(0x1000, garbage)
    scribe.memory.write(scribe.layout.avail + 2, idx.to_bytes(2, "little"))
    for _ in range(10):
        try:
            chain = scribe.device.pop()
        except vb.VirtioError:
            return
        if chain is None:
            return


@pytest.mark.parametrize(("head", "length"), [(9, 0), (3, 0), (0, 5000)], ids=["out of range", "not in flight", "longer than writable"])
def test_2_7_8_the_driver_breaks_on_a_lying_used_element(head: int, length: int) -> None:
    memory, pages, driver, _ = pair(8, 0, event_idx=True, indirect=False)
    driver.add_sgs([], [(pages.alloc(16), 16)], "token")
    driver.publish()
    memory.write(driver.layout.used + 2, (1).to_bytes(2, "little") + head.to_bytes(4, "little") + length.to_bytes(4, "little"))
    with pytest.raises(vb.VirtioError):
        driver.get_buf()
    assert driver.broken is not None


@pytest.mark.parametrize("what", ["loop", "short header", "no status"])
def test_2_1_2_a_hostile_ring_sets_needs_reset_and_a_restart_serves_again(what: str) -> None:
    vm = vb.Pipeline(app=vb.Fio(rw="read", bs=4096, number_ios=1)).boot(vb.SimMachine())
    while vm.step() is not None:
        pass
    layout = vm.driver.queues[0].layout
    entries = {
        "loop": [(0x9000, 16, NEXT, 0)],
        "short header": [(0x9000, 8, NEXT, 1), (0x9000, 1, WRITE, 0)],
        "no status": [(0x9000, 16, 0, 0)],
    }[what]
    for slot, entry in enumerate(entries):
        vm.memory.write(layout.desc + 16 * slot, DESC.pack(*entry))
    vm.memory.write(layout.avail + 2, (2).to_bytes(2, "little") + bytes(4))
    vm.device.kick(0)
    seen = 0
    for _ in range(50):
        vm.scheduler.run(1)
        seen |= int(vm.device_status)
    assert seen & Status.NEEDS_RESET
    vm.task(vm.driver.restart())
    assert vm.device_status == Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK
    ended: list[Bio] = []
    bio = Bio(0, 0, 512, [(vm.pages.alloc(512), 512)], 1, 0, ended.append)
    vm.task(vm.iostack.submit_bio(bio, None, lambda: None))
    while not ended:
        vm.scheduler.run(1)
    assert ended[0].status == 0
