"""RingView: what it says about a ring is what lies in memory, whatever lies there."""

from __future__ import annotations

import re
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vblklab as vb
from vblklab.memory import GuestMemory, GuestPages
from vblklab.ring import SplitDevice, SplitDriver, SplitLayout
from vblklab.ring.dump import RingView

READ = ([(0x9000, 16)], [(0xA000, 4096), (0x9010, 1)])


class Queue:
    """Both halves over one memory, and the view of it."""

    def __init__(self, size: int = 8, indirect_segments: int = 4, start: int = 0) -> None:
        self.memory = GuestMemory(bytearray(1 << 16))
        pages = GuestPages(self.memory, 0x1000)
        self.driver = SplitDriver.alloc(pages, size, indirect_segments=indirect_segments)
        self.layout = self.driver.layout
        self.device = SplitDevice(self.memory, self.layout)
        for at in (self.layout.avail + 2, self.layout.used + 2):
            self.memory.write(at, start.to_bytes(2, "little"))
        self.driver.avail_idx = self.driver.last_used_idx = self.driver._kicked_idx = start
        for name in ("last_avail_idx", "_shadow_avail_idx", "used_idx", "_flushed_idx"):
            setattr(self.device, name, start)

    def view(self) -> RingView:
        return RingView(self.memory, self.layout)

    def request(self) -> None:
        self.driver.add_sgs(*READ, token="read")
        self.driver.publish()

    def serve(self) -> None:
        chain = self.device.pop()
        assert chain is not None
        self.device.fill(chain, 4097)
        self.device.flush()
        self.driver.get_buf()


@pytest.fixture
def queue() -> Queue:
    return Queue()


def marked(view: RingView) -> list[str]:
    """The values that the text marks as changed."""
    return re.findall(r"(\S+)\*", str(view).partition("\n")[2])


# -- values ------------------------------------------------------------------------------------------------------------------


def test_a_fresh_ring_is_all_zeroes(queue: Queue) -> None:
    view = queue.view()
    assert view.written == []
    assert view.avail == (0, 0, [0] * 8, 0)
    assert view.used == (0, 0, [(0, 0)] * 8, 0)
    assert "no buffers with the device" in str(view)


def test_values_are_those_in_memory(queue: Queue) -> None:
    queue.request()
    queue.request()
    queue.serve()
    view, layout = queue.view(), queue.layout
    data = bytes(queue.memory.bytes)
    assert [view.desc(slot) for slot in range(8)] == list(struct.iter_unpack("<QIHH", data[layout.desc : layout.desc + 128]))
    assert (view.avail.flags, view.avail.idx, *view.avail.ring, view.avail.used_event) == struct.unpack_from("<11H", data, layout.avail)
    flags, idx, *elements, event = struct.unpack_from("<2H16IH", data, layout.used)
    assert view.used == (flags, idx, list(zip(elements[::2], elements[1::2], strict=True)), event)
    assert view.in_flight == 1


def test_an_indirect_table_is_followed(queue: Queue) -> None:
    queue.request()
    view = queue.view()
    assert view.desc(0).flag_names == "INDIRECT"
    assert view.table(0) == [(0x9000, 16, 1, 1), (0xA000, 4096, 3, 2), (0x9010, 1, 2, 0)]
    assert [entry.flag_names for entry in view.table(0)] == ["NEXT", "NEXT WRITE", "WRITE"]
    assert view.table(1) == []
    rows = [" ".join(line.split()) for line in str(view).splitlines()]
    assert "0.1 0xa000 4096 NEXT WRITE 2 device writes" in rows


def test_a_direct_chain_takes_its_slots() -> None:
    queue = Queue(indirect_segments=0)
    queue.request()
    view = queue.view()
    assert view.written == [0, 1, 2]
    assert [view.desc(slot).next for slot in view.written] == [1, 2, 0]


def test_suppression_flags_are_named(queue: Queue) -> None:
    queue.memory.write(queue.layout.avail, b"\1\0")
    queue.memory.write(queue.layout.used, b"\1\0")
    text = str(queue.view())
    assert "flags 1 NO_INTERRUPT   idx 0" in text
    assert "flags 1 NO_NOTIFY   idx 0" in text


def test_a_view_keeps_its_moment(queue: Queue) -> None:
    view = queue.view()
    before = str(view)
    queue.request()
    assert str(view) == before
    assert view.avail.idx == 0


def test_a_slot_outside_the_queue_is_refused(queue: Queue) -> None:
    with pytest.raises(vb.ConfigError, match="slots 0 to 7"):
        queue.view().desc(8)


# -- what changed ------------------------------------------------------------------------------------------------------------


def test_nothing_is_marked_without_an_earlier_view(queue: Queue) -> None:
    queue.request()
    view = queue.view()
    assert "*" not in str(view)
    assert "background" not in view._repr_html_()


def test_nothing_is_marked_when_nothing_changed(queue: Queue) -> None:
    queue.request()
    assert marked(queue.view().diff(queue.view())) == []


def test_publishing_changes_the_available_index_alone(queue: Queue) -> None:
    queue.driver.add_sgs(*READ, token="read")
    before = queue.view()
    queue.driver.publish()
    assert marked(queue.view().diff(before)) == ["1"]
    assert "idx 1*" in str(queue.view().diff(before))


def test_what_the_device_writes_is_marked(queue: Queue) -> None:
    queue.request()
    before = queue.view()
    chain = queue.device.pop()
    assert chain is not None
    assert "avail_event 1*" in str(queue.view().diff(before))
    chain_done = queue.view()
    queue.memory.write(0x9010, b"\0")
    queue.device.fill(chain, 4097)
    assert marked(queue.view().diff(chain_done)) == ["4097"], "filled, but used.idx has not moved"
    queue.device.flush()
    assert marked(queue.view().diff(chain_done)) == ["1", "4097"]


def test_a_change_far_from_the_index_is_shown() -> None:
    queue = Queue(size=64)
    before = queue.view()
    queue.memory.write(queue.layout.used + 4 + 8 * 40, struct.pack("<II", 77, 88))
    rows = [line.split() for line in str(queue.view().diff(before)).splitlines()]
    assert ["40", "77*", "88*"] in rows


def test_html_colours_what_text_marks(queue: Queue) -> None:
    queue.request()
    before = queue.view()
    queue.serve()
    view = queue.view().diff(before)
    legend, *coloured = re.findall(r'<span style="[^"]*background[^>]*>([^<]*)</span>', view._repr_html_())
    assert legend == "coloured"
    assert coloured == marked(view) == ["1", "1", "1", "4097"], "used_event, used.idx, avail_event, len"
    assert view._repr_html_().count("<span") > len(coloured) + 1


def test_a_diff_keeps_no_chain_of_earlier_views(queue: Queue) -> None:
    view = queue.view()
    for _ in range(3):
        view = queue.view().diff(view)
    assert set(vars(view)) == {"layout", "queue", "_now", "_before"}
    assert len(view._before or ()) == 2


@pytest.mark.parametrize("earlier", [None, "text", Queue(size=16).view()])
def test_only_two_views_of_one_queue_are_compared(queue: Queue, earlier: object) -> None:
    with pytest.raises(vb.ConfigError, match="diff"):
        queue.view().diff(earlier)  # type: ignore[arg-type]


# -- rings that wrap, are full, are long, are broken ---------------------------------------------------------------------------


def test_the_newest_entries_are_shown_across_the_wrap() -> None:
    queue = Queue(start=65533)
    for _ in range(5):
        queue.request()
        queue.serve()
    view = queue.view()
    assert (view.avail.idx, view.used.idx, view.in_flight) == (2, 2, 0)
    used = str(view).partition("used ring")[2].splitlines()
    assert [line.split()[0] for line in used[3:]] == ["5", "6", "7", "0", "1", "2"]
    assert "not published" in used[-1]


def test_a_full_ring_shows_every_slot_once() -> None:
    queue = Queue(size=4)
    for _ in range(4):
        queue.request()
    slots = [
        line.split()[0] for line in str(queue.view()).partition("available ring")[2].partition("used ring")[0].splitlines()[3:] if line
    ]
    assert sorted(slots) == ["0", "1", "2", "3"]
    assert queue.view().in_flight == 4


def test_a_queue_of_one_entry_is_shown() -> None:
    queue = Queue(size=1)
    queue.request()
    assert "1 buffer with the device" in str(queue.view())


def test_long_tables_and_rings_are_cut_and_say_so() -> None:
    queue = Queue(size=64, indirect_segments=0)
    for _ in range(20):
        queue.request()
    text = str(queue.view())
    assert "60 of 64 entries written" in text
    assert "… and 44 more" in text
    assert len(text.splitlines()) < 50


def test_an_index_that_ran_away_is_named(queue: Queue) -> None:
    queue.memory.write(queue.layout.avail + 2, struct.pack("<H", 500))
    assert "avail.idx is 500 ahead of used.idx, more than fit: one side is broken" in str(queue.view())


@pytest.mark.parametrize(
    ("desc", "words"),
    [
        ((0xFFFF_FFFF_FFFF_FFF0, 64, 0, 0), "outside memory"),
        ((0x4000, 0xFFFF_FFFF, 4, 0), "outside memory"),
        ((0x4000, 30, 4, 0), "a table of 1 and 14 bytes"),
        ((0x4000, 0, 4, 0), "a table of 0"),
        ((0x4000, 16, 0xFFF0, 9), "0xfff0?"),
        ((0x4000, 4096 * 8, 4, 0), "and 2,028 more"),
    ],
)
def test_a_broken_descriptor_is_shown_as_it_is(queue: Queue, desc: tuple[int, int, int, int], words: str) -> None:
    queue.memory.write(queue.layout.desc + 16, struct.pack("<QIHH", *desc))
    assert words in str(queue.view())
    assert words in queue.view()._repr_html_()
    assert queue.view().desc(1) == desc


def test_a_table_in_a_table_is_not_followed(queue: Queue) -> None:
    queue.memory.write(queue.layout.desc, struct.pack("<QIHH", 0x4000, 16, 4, 0))
    queue.memory.write(0x4000, struct.pack("<QIHH", 0x4000, 16, 4, 0))
    assert str(queue.view()).count("a table in a table") == 1


@settings(max_examples=60)
@given(rings=st.binary(min_size=400, max_size=400), size=st.sampled_from([1, 2, 8]), again=st.binary(min_size=400, max_size=400))
def test_any_bytes_can_be_looked_at(rings: bytes, size: int, again: bytes) -> None:
    memory = GuestMemory(bytearray(4096), base=0x100)
    layout = SplitLayout(size, 0x100, 0x100 + 16 * size, 0x200 + 16 * size)
    memory.write(0x100, rings)
    before = RingView(memory, layout)
    memory.write(0x100, again)
    view = RingView(memory, layout).diff(before)
    for text in (str(before), str(view), view._repr_html_()):
        assert len(text) < 100_000
    words = re.findall(r"^  flags (\d+)(\*?) .*  idx (\d+)(\*?)  .*_event (\d+)(\*?)$", str(view), flags=re.MULTILINE)
    for found, (old, new) in zip(words, ((before.avail, view.avail), (before.used, view.used)), strict=True):
        values = [new[0], new[1], new[3]]
        assert [int(text) for text in found[::2]] == values
        assert [mark == "*" for mark in found[1::2]] == [a != b for a, b in zip((old[0], old[1], old[3]), values, strict=True)]


def test_rings_outside_memory_are_refused(queue: Queue) -> None:
    with pytest.raises(vb.VirtioError):
        RingView(queue.memory, SplitLayout(8, 0x1000, 0xFFFF0, 0x2000))


# -- bytes -------------------------------------------------------------------------------------------------------------------


def test_hex_shows_bytes_and_marks_those_that_changed(queue: Queue) -> None:
    queue.memory.write(0x9000, bytes(range(0x41, 0x41 + 20)))
    before = queue.view()
    queue.memory.write(0x9002, b"<")
    dump = queue.view().diff(before).hex(0x9000, 20)
    first, second = str(dump).splitlines()
    assert first.startswith("0x00009000  41  42  3c* 44  ")
    assert first.endswith(" AB<DEFGHIJKLMNOP")
    assert second.split() == ["0x00009010", "51", "52", "53", "54", "QRST"]
    assert "AB&lt;DE" in dump._repr_html_()
    assert dump._repr_html_().count("background") == 1
    assert dump.data == bytes(queue.memory.view(0x9000, 20))


def test_hex_outside_memory_is_refused(queue: Queue) -> None:
    with pytest.raises(vb.BadAddress):
        queue.view().hex(0xFFFF, 2)


# -- on a machine ------------------------------------------------------------------------------------------------------------


def test_a_stepped_machine_shows_its_ring_change() -> None:
    vm = vb.Pipeline(app=vb.Fio(rw="randread", number_ios=1)).boot(vb.SimMachine())
    vm.step_until("virtqueue_add_sgs")
    before = vm.ring()
    assert (before.in_flight, before.desc(0).flag_names) == (0, "INDIRECT")
    vm.step_until("virtqueue_kick_prepare")
    published = vm.ring()
    assert marked(published.diff(before)) == ["1"]
    vm.step_until("virtqueue_flush")
    assert marked(vm.ring().diff(published)) == ["1", "1", "4097"]
    assert vm.ring().used.ring[0] == (0, 4097)
    vm.close()


@pytest.mark.parametrize("queue", [-1, 2, "0", None])
def test_a_machine_names_its_queues_when_asked_for_another(queue: object) -> None:
    vm = vb.Pipeline(app=vb.Fio(rw="randread", number_ios=1, numjobs=2)).boot(vb.SimMachine())
    assert vm.ring(1).queue == 1
    with pytest.raises(vb.ConfigError, match=r"no queue .*: this machine's queues are 0 to 1"):
        vm.ring(queue)  # type: ignore[arg-type]
    vm.close()
