"""fio jobs: what is read from text and Python, what is refused and how, and whether the real fio reads the same."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.guest import fio_peer
from tests.guest.job_strategies import RW, jobs
from vblklab.errors import ConfigError, JobError
from vblklab.guest.fio_values import read_bytes, read_seconds
from vblklab.guest.job import Job, job, load_jobs, parse_jobs, render_jobs


def one(lines: str) -> Job:
    (made,) = parse_jobs(f"[x]\n{lines}\n")
    return made


def refusal(text: str) -> JobError:
    with pytest.raises(JobError) as caught:
        parse_jobs(text, "a.fio")
    return caught.value


def test_defaults_are_fios() -> None:
    made = one("")
    assert (made.rw, made.bs, made.iodepth, made.iodepth_batch, made.numjobs, made.rwmixread) == ("read", 4096, 1, 1, 1, 50)
    assert (made.size, made.offset, made.number_ios, made.runtime_ns, made.randseed, made.fsync) == (None, 0, None, None, 0x89, 0)
    assert (made.verify, made.serialize_overlap, made.bssplit) == (None, False, None)
    assert job() == Job()


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("4k", 4096), ("4K", 4096), ("4kb", 4096), ("4Ki", 4096), ("4KiB", 4000), ("1m", 1 << 20), ("1MiB", 10**6),
     ("2G", 2 << 30), ("1t", 1 << 40), ("1p", 1 << 50), ("0x1000", 4096), ("0X10", 16), ("512b", 512), ("+7", 7)],
)  # fmt: skip
def test_sizes_follow_fios_units(text: str, size: int) -> None:
    assert read_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "k", "1.5m", "4 k", "4x", "4kk", "-1", "0x", "0x10k", "1e3", "٣", "9" * 30, "(4*1024)", "4k,8k", "10%%"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(JobError, match="size="):
        job(size=text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10", 10),
        ("10s", 10),
        ("500ms", 0.5),
        ("500msec", 0.5),
        ("250us", 250e-6),
        ("7usec", 7e-6),
        ("2m", 120),
        ("1h", 3600),
        ("1D", 86400),
    ],
)
def test_times_follow_fios_units(text: str, seconds: float) -> None:
    assert read_seconds(text) == seconds
    assert job(runtime=text).runtime_ns == round(seconds * 1e9)


@pytest.mark.parametrize("value", ["", "2min", "s", "-1", "1.5", "10 s", -1, float("nan"), float("inf"), 1e300, 1e-9, 10**12, True, [1]])
def test_what_is_no_time_is_refused(value: Any) -> None:
    with pytest.raises(JobError, match="runtime"):
        job(runtime=value)


def test_runtime_0_is_no_limit() -> None:
    assert one("runtime=0").runtime_ns is None
    assert job(runtime=0.25).runtime_ns == 250_000_000


@pytest.mark.parametrize(
    ("text", "bs"),
    [("8k", 8192), ("4k,8k", (4096, 8192, 8192)), ("4k,8k,16k", (4096, 8192, 16384)), (",8k", (4096, 8192, 8192)),
     (",8k,", (4096, 8192, 4096)), ("8k,", (8192, 4096, 4096)), ("4k,,8k", (4096, 4096, 8192)), ("8k,8k,8k", 8192)],
)  # fmt: skip
def test_bs_has_a_size_per_direction(text: str, bs: Any) -> None:
    assert one(f"bs={text}").bs == bs


def test_an_empty_part_of_bs_keeps_what_was_set_before() -> None:
    (made,) = parse_jobs("[global]\nbs=16k\n[x]\nbs=,8k,\n")
    assert made.bs == (16384, 8192, 16384)


def test_bs_from_python_takes_numbers_and_tuples() -> None:
    assert job(bs=(512, 1024)).bs == (512, 1024, 1024)
    assert job(bs=(512, "1k", 2048)).bs == (512, 1024, 2048)
    assert job(blocksize="64k").bs == 65536


@pytest.mark.parametrize(
    ("text", "split"),
    [("512/40:4k/40:64k/20", ((512, 40), (4096, 40), (65536, 20))), ("4k/50:1k/:32k/", ((4096, 50), (1024, 25), (32768, 25))),
     ("4k:8k", ((4096, 50), (8192, 50))), ("4k/0:8k/50", ((4096, 50), (8192, 50))),
     ("4k/33:8k/33:16k/33", ((4096, 33), (8192, 33), (16384, 33))),
     ("4k", ((4096, 100),)), ("4k/30", ((4096, 100),))],
)  # fmt: skip
def test_bssplit_shares_what_is_left_evenly(text: str, split: Any) -> None:
    assert one(f"bssplit={text}").bssplit == (split, split, split)


def test_bssplit_is_per_direction_and_bs_fills_in() -> None:
    made = one("rw=rw\nbs=16k\nbssplit=,4k/50:8k/50,")
    assert made.split(0) == ((16384, 100),)
    assert made.split(1) == ((4096, 50), (8192, 50))
    assert made.split(2) == ((16384, 100),)
    assert made.block_sizes == (4096, 8192, 16384)
    assert one("bssplit=4k,8k").bssplit == (((4096, 100),), ((8192, 100),), ((8192, 100),))


@pytest.mark.parametrize(
    "text", ["4k/60:8k/60", "4k/101", "4k/50:1000/50", "4k::8k", "4k/x", "/50", "a,b,c,d", "4k,4k,4k,4k", ",", ":".join(["4k/1"] * 65)]
)
def test_bssplit_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(JobError, match="bssplit"):
        job(bssplit=text)


def test_aliases_of_fio_are_understood() -> None:
    made = one("readwrite=randrw\nblocksize=8k\nfileoffset=1m\niodepth=8\niodepth_batch_submit=4\ntimeout=3\nrwmixwrite=30")
    assert (made.rw, made.bs, made.offset, made.iodepth_batch, made.runtime, made.rwmixread) == ("randrw", 8192, 1 << 20, 4, 3, 70)
    assert one("rw=readwrite").rw == "rw"
    assert job(rwmixwrite=30).rwmixread == 70


def test_iodepth_batch_is_resolved_as_fio_does() -> None:
    assert one("iodepth=8\niodepth_batch=0").iodepth_batch == 8
    assert one("iodepth=8\niodepth_batch=99").iodepth_batch == 8
    assert one("iodepth=8").iodepth_batch == 1


def test_directions_and_sizes_that_a_job_uses() -> None:
    made = one("rw=randwrite\nbs=4k,8k,16k")
    assert (made.reads, made.writes, made.trims, made.random) == (False, True, False, True)
    assert (made.block_sizes, made.max_bs, made.min_bs) == ((8192,), 8192, 4096)
    assert one("rw=rw").directions == (0, 1)
    assert one("rw=randtrim").directions == (2,)


def test_globals_add_up_and_reach_only_later_sections() -> None:
    text = "[global]\nbs=8k\niodepth=2\n[a]\niodepth=4\n[global]\nrw=write\n[b]\n[globals too]\nbs=16k\n[c]\nrw=read"
    found = [(made.name, made.rw, made.bs, made.iodepth) for made in parse_jobs(text)]
    assert found == [("a", "read", 8192, 4), ("b", "write", 8192, 2), ("c", "read", 16384, 2)]


def test_the_last_of_equal_options_wins() -> None:
    assert one("bs=4k\nbs=8k\niodepth=3\niodepth=5") == one("bs=8k\niodepth=5")
    assert one("rwmixread=10\nrwmixwrite=10").rwmixread == 90


def test_comments_blanks_and_line_ends() -> None:
    text = "\ufeff# top\r\n; also\r\n\r\n  [x y]  ; name\r\n\t rw = randread # direction\r\n  bs=4k;8k\r\n\x00\r\n"
    assert parse_jobs(text) == (Job(name="x y", rw="randread", bs=4096),)


def test_options_are_named_in_fios_words() -> None:
    made = one("rw=randrw\nbs=4k,8k\nsize=30%\noffset=1m\niodepth=8\nruntime=1500ms\nverify=md5\nserialize_overlap=1\nnumber_ios=10k")
    assert made.options() == {
        "rw": "randrw", "bs": "4k,8k,8k", "size": "30%", "offset": "1m", "iodepth": "8", "number_ios": "10240",
        "runtime": "1500ms", "serialize_overlap": "1", "verify": "md5",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        ("ioengine=libaio", ["ioengine=libaio", "engine part"]),
        ("direct=1", ["direct=1", "iostack part"]),
        ("filename=/dev/vdb", ["filename=/dev/vdb", "disk part"]),
        ("group_reporting", ["group_reporting", "every clone and the total"]),
        ("time_based", ["time_based", "number_ios"]),
        ("include other.fio", ["include", "one file"]),
        ("bsrange=4k-8k", ["bsrange", "bssplit"]),
        ("iodeth=4", ["iodeth=4", "did you mean iodepth"]),
        ("zzz=4", ["zzz=4", "rw, bs, bssplit, size"]),
        ("BS=4k", ["BS=4k", "bs"]),
        ("bs=1000", ["bs=1000", "multiple of 512"]),
        ("bs=4KiB", ["bs=4KiB", "4000", "write 4k"]),
        ("bs=4k-8k", ["bs=4k-8k", "range", "bssplit"]),
        ("bs=4k:8k", ["bs=4k:8k", "range"]),
        ("bs=2g", ["bs=2g", "1 GiB"]),
        ("bs=0", ["bs=0"]),
        ("bs=,", ["bs=,", "empty"]),
        ("bs=4k,4k,4k,4k", ["4 parts"]),
        ("bs", ["bs needs a value"]),
        ("bs=", ["bs= needs a value"]),
        ("=4k", ["no option in front of ="]),
        ("bs=4k \\", ["backslash", "continuation"]),
        ("rw=readrandom", ["rw=readrandom", "randread"]),
        ("rw=rw:8k", ["rw=rw:8k"]),
        ("verify=crc32c", ["verify=crc32c", "crc32, md5, sha1, sha256, sha512"]),
        ("iodepth=0", ["iodepth=0"]),
        ("numjobs=0", ["numjobs=0"]),
        ("number_ios=0", ["number_ios=0", "no I/O"]),
        ("size=0", ["size=0", "rest of the disk"]),
        ("size=0%", ["size=0%"]),
        ("size=101%", ["size=101%", "whole disk"]),
        ("size=5.5%", ["size=5.5%"]),
        ("offset=100", ["offset=100", "multiple of 512"]),
        ("offset=100%", ["offset=100%", "nothing"]),
        ("rwmixread=101", ["rwmixread=101", "100"]),
        ("rwmixwrite=101", ["rwmixwrite=101", "100"]),
        ("serialize_overlap=2", ["serialize_overlap=2", "0 or 1"]),
        ("fsync=-1", ["fsync=-1"]),
        ("iodepth=3000000000", ["iodepth=3000000000", "larger"]),
        ("randseed=0xffffffffffffffff", ["randseed", "larger"]),
        ("name=a\x07b", ["name=a?b"]),
        ("io_size=1m", ["io_size", "number_ios"]),
    ],
)
def test_a_refusal_names_file_line_section_key_and_remedy(lines: str, wanted: list[str]) -> None:
    error = refusal(f"# a comment\n[x]\n{lines}\n")
    assert str(error).startswith("a.fio, line 3 [x]: ")
    assert error.remedy
    assert "\n" not in str(error)
    for part in wanted:
        assert part in str(error), str(error)


@pytest.mark.parametrize(
    ("text", "line", "wanted"),
    [
        ("[x]\nsize=4k\nrw=read\nbs=8k\n", 4, "size=4k is smaller than a block of 8k"),
        ("[x]\nbs=8k\nsize=4k\nrw=read\n", 3, "size=4k is smaller than a block of 8k"),
        ("[x]\nsize=8k\nbssplit=4k/50:64k/50\n", 3, "smaller than a block of 64k"),
        ("[global]\nverify=md5\n[x]\nrw=randtrim\n", 4, "verify=md5 with rw=randtrim"),
        ("[global]\nname=y\n[x]\n", 2, "stands in [global]"),
        ("[x]\nnumber_ios=100\nio_size=4k\n", 3, "io_size"),
    ],
)
def test_a_combination_is_blamed_on_the_line_that_made_it(text: str, line: int, wanted: str) -> None:
    error = refusal(text)
    assert f"line {line} [" in str(error)
    assert wanted in str(error)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", "no job section"),
        ("# nothing\n", "no job section"),
        ("[global]\nbs=4k\n", "no job section"),
        ("bs=4k\n[x]\n", "line 1: 'bs=4k' stands before the first [section]"),
        ("[x\nbs=4k\n", "line 1: section [x does not end in ]"),
        ("[a#b]\n", "does not end in ]"),
        ("[x] rw=read\n", "does not end in ]"),
        ("\n[]\n", "line 2: section [] is not a name"),
        ("[ ]\n", "is not a name"),
        (f"[{'n' * 251}]\n", "longer than 250 bytes"),
    ],
)
def test_a_file_without_proper_sections_is_refused(text: str, wanted: str) -> None:
    assert wanted in str(refusal(text))


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"bs": 1000}, "job 'job': bs=1000"),
        ({"name": "n", "ioengine": "sync"}, "job 'n': ioengine=sync"),
        ({"bs": 4096.0}, "bs=4096.0"),
        ({"bs": True}, "bs=True"),
        ({"bs": (1, 2, 3, 4)}, "4 parts"),
        ({"iodepth": "many"}, "iodepth=many"),
        ({"iodepth": 10**5000}, "iodepth=a number of"),
        ({"size": -5}, "size=-5 is negative"),
        ({"size": 512}, "size=512 is smaller than a block of 4k"),
        ({"bssplit": 4096}, "bssplit=4096"),
        ({"bssplit": ((1, 2), 3, 4)}, "bssplit"),
        ({"rw": 3}, "rw=3"),
        ({"name": ""}, "name="),
        ({"name": "global x"}, "rename"),
        ({"name": "a;b"}, "# and ;"),
        ({"verify": 7}, "verify=7"),
        ({"bs": 4096, "blocksize": 8192}, "second time"),
        ({"rwmixread": 1, "rwmixwrite": 1}, "second time"),
        ({"serialize_overlap": "yes"}, "serialize_overlap=yes"),
        ({"runtime": object()}, "runtime="),
    ],
)
def test_python_options_are_checked_alike(options: dict[str, Any], wanted: str) -> None:
    with pytest.raises(JobError) as caught:
        job(**options)
    assert wanted in str(caught.value)
    assert isinstance(caught.value, ConfigError)


def test_none_is_the_default() -> None:
    assert job(size=None, bs=None, verify=None, rw=None, runtime=None) == Job()


def test_a_job_checks_itself_too() -> None:
    with pytest.raises(JobError, match="iodepth=0"):
        Job(iodepth=0)
    assert Job(bs=(4096, 4096, 4096)).bs == 4096


def test_load_reads_a_file_and_names_it_in_errors(tmp_path: Path) -> None:
    path = tmp_path / "seq.fio"
    path.write_text("[seq]\nbs=64k\n")
    assert load_jobs(path) == load_jobs(str(path)) == (Job(name="seq", bs=65536),)
    path.write_text("[seq]\nbs=1\n")
    with pytest.raises(JobError, match=r"seq\.fio, line 2 \[seq\]: bs=1 "):
        load_jobs(path)


def test_load_refuses_what_is_no_job_file(tmp_path: Path) -> None:
    latin, big, fifo = tmp_path / "latin.fio", tmp_path / "big.fio", tmp_path / "fifo"
    latin.write_bytes(b"[x]\n# caf\xe9\n")
    big.write_bytes(b"#" * (1 << 20) + b"\n[x]\n")
    os.mkfifo(fifo)
    cases: list[tuple[Any, str]] = [
        (tmp_path, "is a directory"), (tmp_path / "none.fio", "No such file"), (latin, "line 2: byte 0xe9 is not UTF-8"),
        (big, "larger than 1 MiB"), (fifo, "not a regular file"), ("a\0b", "a?b"), (17.5, "not the path"), (None, "not the path"),
    ]  # fmt: skip
    for path, wanted in cases:
        with pytest.raises(JobError) as caught:
            load_jobs(path)
        assert wanted in str(caught.value)


def test_render_puts_extras_into_global() -> None:
    text = render_jobs(
        [job(name="a", rw="write"), job(name="b")], ioengine="io_uring", direct=True, group_reporting=None, filename="/dev/vdb"
    )
    assert text.startswith("[global]\nioengine=io_uring\ndirect=1\ngroup_reporting\nfilename=/dev/vdb\n\n[a]\nrw=write\nbs=4k\n\n[b]\n")


@pytest.mark.parametrize("extra", [{"filename": "a#b"}, {"filename": "a\nb"}, {"filename": ""}, {"no-dash": 1}])
def test_render_refuses_extras_that_a_file_cannot_hold(extra: dict[str, Any]) -> None:
    with pytest.raises(JobError, match="global option"):
        render_jobs([job()], **extra)


def test_render_needs_a_job() -> None:
    with pytest.raises(JobError):
        render_jobs([], direct=1)


@given(st.lists(jobs(), min_size=1, max_size=4))
def test_rendered_jobs_parse_to_themselves(made: list[Job]) -> None:
    assert parse_jobs(render_jobs(made)) == tuple(made)


@given(jobs())
def test_options_make_the_same_job_again(made: Job) -> None:
    assert job(name=made.name, **made.options()) == made


_WORDS = st.sampled_from(
    ["[x]", "[global]", "[", "]", "rw", "=", "randrw", "bs", "4k", ",", "/", ":", "%", "50", "bssplit", "size", "0x", "include a", "#",
     ";", "\\", "\n", " ", "verify", "md5", "runtime", "10ms", "name", "-", "\r", "\x00", "٣", "\u3000", "iodepth",
     "999999999999999999999", "ioengine"]
)  # fmt: skip


@given(st.text() | st.lists(_WORDS | st.text(max_size=3), max_size=30).map("".join))
@settings(max_examples=400)
def test_any_text_is_jobs_or_a_joberror(text: str) -> None:
    for candidate in (text, "[x]\n" + text):
        try:
            made = parse_jobs(candidate)
        except JobError as error:
            assert "\n" not in str(error)
        else:
            assert parse_jobs(render_jobs(made)) == made


_ANY = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.tuples(st.integers(), st.integers())
    | st.binary(max_size=3)
)


@given(st.dictionaries(st.sampled_from([*Job.__dataclass_fields__, "rwmixwrite", "blocksize", "direct"]), _ANY, max_size=4))
@settings(max_examples=300)
def test_any_python_values_are_a_job_or_a_joberror(options: dict[str, Any]) -> None:
    with contextlib.suppress(JobError):
        job(**options)


# -- the real fio --


@pytest.mark.fio
@settings(max_examples=15)
@given(st.lists(jobs(), min_size=20, max_size=20))
def test_fio_accepts_what_is_rendered(tmp_path_factory: pytest.TempPathFactory, made: list[Job]) -> None:
    path = tmp_path_factory.mktemp("render") / "jobs.fio"
    path.write_text(render_jobs(made, ioengine="null", filename="x"))
    assert fio_peer.accepts(path) == ""


@pytest.mark.fio
def test_fio_accepts_every_direction_and_method(tmp_path: Path) -> None:
    path = tmp_path / "all.fio"
    made = [
        job(name=f"{rw} {verify}", rw=rw, verify=verify)
        for rw in RW
        for verify in ("crc32", "md5", "sha1", "sha256", "sha512")
        if "trim" not in rw
    ]
    path.write_text(render_jobs(made, ioengine="null", size="1m"))
    assert fio_peer.accepts(path) == ""


@pytest.mark.fio
@pytest.mark.parametrize(
    ("option", "texts"),
    [
        ("size", ["4096", "4k", "4K", "4kb", "4Ki", "4KiB", "4kib", "1m", "1MiB", "3Mi", "2G", "1t", "1P", "0x1000", "0X20", "512b", "+7"]),
        ("iodepth", ["1", "1k", "0x20"]),
        ("number_ios", ["10k", "10KiB", "7"]),
        ("randseed", ["0x89", "137", "9223372036854775807"]),
    ],
)
def test_fio_reads_the_same_numbers(option: str, texts: list[str]) -> None:
    assert [fio_peer.reads_as(option, text) for text in texts] == [[read_bytes(text)] for text in texts]


@pytest.mark.fio
def test_fio_reads_the_same_times() -> None:
    texts = ["10", "10s", "500ms", "500msec", "250us", "7usec", "2m", "1h", "1D", "1500ms"]
    assert [fio_peer.reads_as("runtime", text) for text in texts] == [[round(read_seconds(text) * 1e6)] for text in texts]


@pytest.mark.fio
def test_fio_inherits_and_overrides_alike(tmp_path: Path) -> None:
    text = (
        "[global]\nbs=16k\nsize=64k\n[a]\nbs=,8k,\n[b]\nbs=,8k,\nrw=write\n[c]\nbs=,8k,\nrw=trim\n[global]\nsize=128k\nbs=8k,\n[d]\n[e]\nrw=write\n"
        "[global]\nbssplit=,4k/50:4k/50,\n[f]\nrw=write\n[g]\nbssplit=8k,\nrw=write\nbs=64k\n[h]\nbs=64k\n[i]\nbs=4k\nbs=32k\nsize=32k\nrw=trim\n"
        "[globally]\nsize=96k\n[j]\nreadwrite=read\nblocksize=32k\n"
    )
    path = tmp_path / "inherit.fio"
    path.write_text(text.replace("[global]", "[global]\nioengine=null", 1))
    found = [fio_peer.totals(entry) for entry in fio_peer.report(path)["jobs"]]
    expected = []
    for made in parse_jobs(text):
        assert isinstance(made.size, int)
        (direction,), bs = made.directions, made.max_bs
        expected.append([(made.size // bs, made.size) if at == direction else (0, 0) for at in range(3)])
    assert found == expected


@pytest.mark.fio
@pytest.mark.parametrize("lines", ["rwmixread=101", "iodepth=0", "serialize_overlap", "bs=", "BS=4k", "nonsense=1", "rw=readrandom"])
def test_fio_refuses_these_too(tmp_path: Path, lines: str) -> None:
    path = tmp_path / "bad.fio"
    path.write_text(f"[x]\nioengine=null\nsize=1m\n{lines}\n")
    assert fio_peer.accepts(path)
    refusal(f"[x]\n{lines}\n")
