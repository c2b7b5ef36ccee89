"""Which I/Os a job does: how many, where, in what order; the real fio does the same where it is not random."""

from __future__ import annotations

from collections import Counter
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.guest import fio_peer
from tests.guest.job_strategies import jobs
from vblklab.errors import JobError
from vblklab.guest import workload
from vblklab.guest.job import Job, Percent, job, render_jobs
from vblklab.guest.workload import READ, TRIM, WRITE, Workload

DISK = 1 << 24
Io = tuple[int, int, int]


def ios(disk: int = DISK, clone: int = 0, **options: Any) -> list[Io]:
    return list(Workload(job(**options), clone, disk))


def test_sequential_reads_cover_the_region_in_order() -> None:
    assert ios(rw="read", bs="4k", size="16k", offset="8k") == [(READ, 8192 + at, 4096) for at in range(0, 16384, 4096)]


def test_size_defaults_to_the_rest_of_the_disk() -> None:
    found = ios(rw="trim", bs="64k", offset="1m")
    assert found[0] == (TRIM, 1 << 20, 65536)
    assert found[-1] == (TRIM, DISK - 65536, 65536)
    assert len(found) == (DISK - (1 << 20)) // 65536


def test_next_gives_none_at_the_end_and_shares_with_iter() -> None:
    work = Workload(job(size="16k"), 0, DISK)
    assert work.next() == (READ, 0, 4096)
    assert next(iter(work)) == (READ, 4096, 4096)
    assert len(list(work)) == 2
    assert work.next() is None
    assert work.next() is None


def test_number_ios_goes_around_the_region() -> None:
    assert [offset for _, offset, _ in ios(rw="write", size="12k", number_ios=7)] == [0, 4096, 8192, 0, 4096, 8192, 0]
    assert len(ios(rw="randread", size="16k", number_ios=1000)) == 1000
    assert len(ios(rw="randread", size="16m", number_ios=3)) == 3


def test_a_tail_smaller_than_a_block_is_left_out() -> None:
    assert ios(size="10k") == [(READ, 0, 4096), (READ, 4096, 4096)]
    assert [offset for _, offset, _ in ios(size="10k", number_ios=3)] == [0, 4096, 0]


def test_each_direction_has_its_own_position() -> None:
    found = ios(rw="rw", bs="4k,8k", size="1m", number_ios=400, rwmixread=30)
    for op, bs in ((READ, 4096), (WRITE, 8192)):
        mine = [io for io in found if io[0] == op]
        assert mine == [(op, at * bs % (1 << 20), bs) for at in range(len(mine))]


@pytest.mark.parametrize(("percent", "low", "high"), [(0, 0, 0), (100, 4000, 4000), (70, 2700, 2900)])
def test_rwmixread_is_the_share_of_reads(percent: int, low: int, high: int) -> None:
    reads = sum(op == READ for op, _, _ in ios(rw="randrw", rwmixread=percent, number_ios=4000))
    assert low <= reads <= high


def test_random_offsets_are_uniform_over_the_blocks() -> None:
    counts = Counter(offset for _, offset, _ in ios(rw="randread", size="64k", offset="4k", number_ios=16_000))
    assert set(counts) == {4096 + at for at in range(0, 65536, 4096)}
    assert all(850 < count < 1150 for count in counts.values())


def test_random_offsets_are_aligned_to_the_smallest_size() -> None:
    found = ios(rw="randwrite", bssplit="1k/50:8k/50", size="16k", number_ios=2000)
    assert {offset for _, offset, length in found if length == 8192} == set(range(0, 8193, 1024))
    assert {offset for _, offset, length in found if length == 1024} == set(range(0, 16384, 1024))


def test_bssplit_mixes_sizes_by_their_shares() -> None:
    counts = Counter(length for _, _, length in ios(rw="randread", bssplit="512/40:4k/40:64k/20", number_ios=10_000))
    assert all(abs(counts[size] - share * 100) < 200 for size, share in ((512, 40), (4096, 40), (65536, 20)))


def test_what_percentages_leave_goes_to_the_largest_share() -> None:
    counts = Counter(length for _, _, length in ios(rw="randread", bssplit="8k/50:4k/30", number_ios=10_000))
    assert abs(counts[8192] - 7000) < 200


def test_sequential_ios_of_many_sizes_follow_each_other() -> None:
    found = ios(rw="write", bssplit="512/40:4k/40:64k/20", size="256k", number_ios=1000)
    position = 0
    for _, offset, length in found:
        if position + length > 256 << 10:
            position = 0
        assert offset == position
        position += length


def test_size_bounds_the_bytes_done() -> None:
    found = ios(rw="randrw", bssplit="4k/50:12k/50", size="1m")
    assert (1 << 20) - 12288 < sum(length for _, _, length in found) <= 1 << 20


def test_clones_work_at_increments() -> None:
    options: dict[str, Any] = {"size": "64k", "offset": "1m", "offset_increment": "128k", "numjobs": 3}
    starts = [ios(clone=clone, **options)[0][1] for clone in range(3)]
    assert starts == [1 << 20, (1 << 20) + (128 << 10), (1 << 20) + (256 << 10)]


def test_same_options_give_the_same_ios_and_others_do_not() -> None:
    options: dict[str, Any] = {"rw": "randrw", "bssplit": "4k/50:8k/50", "number_ios": 500, "numjobs": 2}
    first = ios(**options)
    assert ios(**options) == first
    assert ios(clone=1, **options) != first
    assert ios(randseed=7, **options) != first
    assert ios(name="other", **options) != first


def test_ios_are_fixed_across_versions() -> None:
    found = ios(rw="randrw", bssplit="512/50:4k/50", size="1m", number_ios=5)
    assert found == FIRST_FIVE


FIRST_FIVE: list[Io] = [(1, 669184, 4096), (0, 315904, 512), (0, 56320, 512), (0, 839168, 512), (0, 803840, 512)]


def test_ios_do_not_depend_on_how_they_are_precomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"rw": "rw", "bssplit": "512/30:4k/70", "size": "1m", "number_ios": 3000}
    before = ios(**options), ios(rw="randread", size="8m")
    monkeypatch.setattr(workload, "_CHUNK_FIRST", 1)
    monkeypatch.setattr(workload, "_CHUNK_LARGEST", 7)
    assert (ios(**options), ios(rw="randread", size="8m")) == before


@given(jobs(), st.integers(1, 1 << 16).map(lambda sectors: sectors * 512))
@settings(max_examples=300)
def test_every_io_is_inside_the_region_on_the_disk(made: Job, disk: int) -> None:
    try:
        work = Workload(made, made.numjobs - 1, disk)
    except JobError as error:
        assert repr(made.name) in str(error)
        return
    assert 0 <= work.start <= work.start + work.region <= disk
    seen = list(islice(work, 300))
    assert seen
    for op, offset, length in seen:
        assert op in made.directions
        assert length in [size for size, _ in made.split(op)]
        assert offset % 512 == 0
        assert work.start <= offset <= offset + length <= work.start + work.region
    if made.number_ios is None:
        assert max(accumulate(length for _, _, length in seen)) <= work.region
    else:
        assert len(seen) == min(300, made.number_ios)


@pytest.mark.parametrize(
    ("options", "clone", "wanted"),
    [
        ({"size": "32m"}, 0, ["'job', clone 0", "size=32m", str(DISK)]),
        ({"size": "4m", "offset": "14m"}, 0, ["offset 14680064", "18874368"]),
        ({"offset": "16m"}, 0, ["the rest of the disk", "offset 16777216"]),
        ({"offset": "8m", "offset_increment": "8m", "numjobs": 2}, 1, ["clone 1"]),
        ({"bs": "8k", "size": "1%", "offset": "99%"}, 2, ["numjobs=1"]),
        ({"bs": "1m", "size": "1%"}, 0, ["size=1%", "blocks of up to 1048576"]),
    ],
)
def test_a_region_off_the_disk_is_refused_with_its_numbers(options: dict[str, Any], clone: int, wanted: list[str]) -> None:
    with pytest.raises(JobError) as caught:
        Workload(job(**options), clone, DISK)
    for part in wanted:
        assert part in str(caught.value)


# -- the real fio --


def _file(tmp_path: Path, size: int) -> Path:
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(size)
    return path


@pytest.mark.fio
@pytest.mark.parametrize(
    "options",
    [
        {"size": "30%", "offset": "10%"},
        {"size": "100%", "offset": "33%"},
        {"rw": "write", "offset": "12k"},
        {"bs": "8k", "offset": 512, "size": "50%"},
        {"bs": "64k", "offset": "85%"},
        {"bs": "8k,4k", "size": "8%", "offset": "1%"},
        {"bs": "4k", "size": "64k", "offset": "8k", "number_ios": 3},
        {"bs": "4k", "size": "16k", "offset": "8k", "number_ios": 11},
        {"rw": "write", "size": "25%", "number_ios": 200},
        {},
    ],
)
def test_fio_reads_and_writes_the_same_offsets(tmp_path: Path, options: dict[str, Any]) -> None:
    disk, made = 1_024_000, job(**options)
    path = tmp_path / "job.fio"
    path.write_text(render_jobs([made], ioengine="psync", filename=_file(tmp_path, disk), write_iolog=tmp_path / "io.log"))
    fio_peer.report(path, cwd=tmp_path)
    assert fio_peer.iolog(tmp_path / "io.log") == list(Workload(made, 0, disk))


@pytest.mark.fio
def test_fio_gives_clones_the_same_regions(tmp_path: Path) -> None:
    disk, made = 1_024_000, job(size="64k", offset="8k", offset_increment="15%", numjobs=3)
    path = tmp_path / "job.fio"
    path.write_text(render_jobs([made], ioengine="psync", filename=_file(tmp_path, disk), write_iolog=tmp_path / "io.log", thread=1))
    entries = fio_peer.report(path, cwd=tmp_path)["jobs"]
    assert [fio_peer.totals(entry)[READ] for entry in entries] == [(16, 65536)] * 3
    # the clones share one log, in which lines may get lost
    seen = set(fio_peer.iolog(tmp_path / "io.log"))
    assert seen
    assert seen <= {io for clone in range(3) for io in Workload(made, clone, disk)}


@pytest.mark.fio
def test_fio_positions_each_direction_alike(tmp_path: Path) -> None:
    disk, made = 1_024_000, job(rw="rw", bs="4k,8k", size="400k", number_ios=30, rwmixread=60)
    path = tmp_path / "job.fio"
    path.write_text(render_jobs([made], ioengine="psync", filename=_file(tmp_path, disk), write_iolog=tmp_path / "io.log"))
    fio_peer.report(path, cwd=tmp_path)
    theirs, ours = fio_peer.iolog(tmp_path / "io.log"), list(Workload(made, 0, disk))
    assert len(theirs) == len(ours) == 30
    for op in (READ, WRITE):
        pairs = zip([io for io in theirs if io[0] == op], [io for io in ours if io[0] == op], strict=False)
        assert all(one == other for one, other in pairs)


@pytest.mark.fio
def test_fio_does_as_many_ios(tmp_path: Path) -> None:
    made = [
        job(name=f"{rw} {number}", rw=rw, bs=bs, size="1m", number_ios=number)
        for rw in ("read", "write", "trim", "randread", "randwrite", "randtrim", "randrw")
        for number, bs in ((None, "4k"), (7, "4k"), (300, "16k"), (513, "4k"))
    ]
    path = tmp_path / "jobs.fio"
    path.write_text(render_jobs(made, ioengine="null", norandommap=1))
    for entry, one in zip(fio_peer.report(path)["jobs"], made, strict=True):
        found = fio_peer.totals(entry)
        ours = list(Workload(one, 0, DISK))
        assert sum(count for count, _ in found) == len(ours), one
        assert sum(total for _, total in found) == sum(length for _, _, length in ours), one


def test_percent_of_is_rounded_down() -> None:
    assert Percent(33).of(100_001) == 33_000
