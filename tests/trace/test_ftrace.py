"""ftrace's and QEMU's own texts: real lines of several kernels and tools, and texts that are cut or something else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vblklab as vb
from vblklab._data import DATA
from vblklab.machine.guest_run import GuestRun
from vblklab.trace.ftrace import read_ftrace
from vblklab.trace.qemu_log import read_qemu_log

LINES = {
    "             fio-179     [001] .....    14.050361: block_bio_queue: 254,0 R 81200 + 8 [fio]": (
        (14050361000, 1, "fio", 179, "block_bio_queue"),
        {"dev": "254,0", "rwbs": "R", "sector": 81200, "nr_sector": 8},
    ),
    "          <idle>-0       [001] d.h2.    14.050532: block_rq_complete: 254,0 WS () 520 + 16 [-5]": (
        (14050532000, 1, "<idle>", 0, "block_rq_complete"),
        {"rwbs": "WS", "sector": 520, "nr_sector": 16, "by": "-5"},
    ),
    " kworker/u4:1-33  (     33) [000] ...1    1.000001: block_rq_issue: 8,16 FF 0 () 0 + 0 none,0,0 [kworker/u4:1]": (
        (1000001000, 0, "kworker/u4:1", 33, "block_rq_issue"),
        {"dev": "8,16", "rwbs": "FF", "sector": 0, "nr_sector": 0, "bytes": 0},
    ),
    "             fio-1234  [003]  9123.456789012: block_split: 259,0 WS 2048 / 2304 [fio]": (
        (9123456789012, 3, "fio", 1234, "block_split"),
        {"sector": 2048, "new_sector": 2304},
    ),
    "    my prog-x-77     [002] d..1. 78560769171: virtqueue_add_sgs: (virtqueue_add_sgs+0x0/0xd0 [virtio_ring]) vq=0xff27 data=0xff31": (
        (78560769171, 2, "my prog-x", 77, "virtqueue_add_sgs"),
        {"vq": 0xFF27, "data": 0xFF31},
    ),
    "             fio-179     [001] .....    14.050301: sys_io_submit(ctx_id: 7f1ca1b2c000, nr: 8, iocbpp: 55d0a8f3c2a0)": (
        (14050301000, 1, "fio", 179, "sys_enter_io_submit"),
        {"ctx_id": 0x7F1CA1B2C000, "nr": 8},
    ),
    "             fio-179     [001] .....    14.050301: sys_io_getevents -> 0x3": (
        (14050301000, 1, "fio", 179, "sys_exit_io_getevents"),
        {"ret": 3},
    ),
    "             fio-179     [001] .....    14.050301: sys_io_getevents -> 0xfffffffffffffffc": (
        (14050301000, 1, "fio", 179, "sys_exit_io_getevents"),
        {"ret": -4},
    ),
}


@pytest.mark.parametrize("line", LINES)
def test_a_line_is_read(line: str) -> None:
    head, args = LINES[line]
    text = read_ftrace(f"# tracer: nop\n#\ncpus=4\nCPU 2 is empty\n{line}\n")
    (record,) = text.records
    assert tuple(record[:5]) == head and args.items() <= record.args.items() and not text.lost


GOOD = next(iter(LINES))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no entry"),
        ("# tracer: nop\n#\n", "no entry"),
        (f"{GOOD}\nhello\n", "line 2 of the trace is no ftrace entry: 'hello'"),
        (f"{GOOD}\n{GOOD[:-14]}\n", "line 2 of the trace is no ftrace entry"),
        (f"{GOOD}\n{GOOD}", "line 2 of the trace ends in the middle"),
        ("254,0 1 1 0.000000000 123 Q R 8 + 8 [fio]\n", "line 1"),
        (GOOD.replace("254,0 R", "254,0") + "\n", "line 1"),
    ],
)
def test_what_is_no_trace_is_named_by_its_line(text: str, says: str) -> None:
    with pytest.raises(vb.TraceError, match=says):
        read_ftrace(text)


@pytest.mark.parametrize(
    "text",
    [
        f"# entries-in-buffer/entries-written: 100/142   #P:2\n{GOOD}\n",
        f"CPU:1 [LOST 42 EVENTS]\n{GOOD}\n",
        f"{GOOD}\nCPU:0 [LOST 40 EVENTS]\n{GOOD}\nCPU:1 [LOST 2 EVENTS]\n",
    ],
)
def test_lost_entries_are_counted(text: str) -> None:
    assert read_ftrace(text).lost == 42


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    for read in (read_ftrace, read_qemu_log):
        try:
            read(text)  # type: ignore[operator]
        except vb.TraceError:
            pass


@given(st.integers(0, 40_000), st.binary(max_size=3))
def test_a_real_recording_that_is_damaged_is_read_or_refused(at: int, bytes_in: bytes) -> None:
    recording = GuestRun.load(DATA / "recorded" / "linux-qemu-d1.run.gz").recording
    assert recording is not None
    text = recording.ftrace[:40_000]
    try:
        read_ftrace(text[:at] + bytes_in.decode("latin-1") + text[at + len(bytes_in) :])
    except vb.TraceError as error:
        assert "line " in str(error)


LOG = """qemu-system-x86_64: warning: something
21844@1795434671.838552:virtio_blk_handle_read vdev 0x55b0352fbfe0 req 0x7f72cc004ef0 sector 7904 nsectors 8
21844@1795434671.838553:blk_co_preadv blk 0x55b035 bs 0x55b036 offset 4046848 bytes 4096 flags 0x0
"""


def test_qemus_log_is_read() -> None:
    first, second = read_qemu_log(LOG)
    assert first.t_ns == 1795434671838552000 and first.name == "virtio_blk_handle_read" and first.args["sector"] == 7904
    assert second.args["offset"] == 7904 * 512 and second.args["bytes"] == 4096


@pytest.mark.parametrize("text", ["", "hello\n", LOG + "21844@179543467"])
def test_a_log_without_events_or_with_a_cut_one_is_refused(text: str) -> None:
    with pytest.raises(vb.TraceError, match="log"):
        read_qemu_log(text)
