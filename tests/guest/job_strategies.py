"""Generated jobs: every option, within what makes sense together."""

from __future__ import annotations

from hypothesis import strategies as st

from vblklab.guest.job import Job, Percent

BLOCKS = st.integers(1, 64).map(lambda n: n * 512)
RW = ("read", "write", "trim", "rw", "randread", "randwrite", "randtrim", "randrw")


def _split(sizes: list[int], shares: list[int]) -> tuple[tuple[int, int], ...]:
    total = sum(shares[: len(sizes)])
    scaled = [max(1, share * 100 // total) for share in shares[: len(sizes)]]
    while sum(scaled) > 100:
        scaled[scaled.index(max(scaled))] -= 1
    return tuple(zip(sizes, scaled, strict=True)) if len(sizes) > 1 else ((sizes[0], 100),)


_SPLIT = st.lists(BLOCKS, min_size=1, max_size=5).flatmap(
    lambda sizes: st.lists(st.integers(1, 99), min_size=len(sizes), max_size=len(sizes)).map(lambda shares: _split(sizes, shares))
)
_NAME = st.text("abcXYZ019 _-.:/[]é", min_size=1, max_size=12).map(str.strip).filter(lambda name: name and not name.startswith("global"))


@st.composite
def jobs(draw: st.DrawFn, rw: tuple[str, ...] = RW) -> Job:
    """Any job."""
    direction = draw(st.sampled_from(rw))
    return Job(
        name=draw(_NAME),
        rw=direction,
        bs=draw(BLOCKS | st.tuples(BLOCKS, BLOCKS, BLOCKS)),
        bssplit=draw(st.none() | st.tuples(_SPLIT | st.just(()), _SPLIT | st.just(()), _SPLIT | st.just(()))),
        size=draw(st.none() | st.integers(1 << 15, 1 << 40) | st.integers(1, 100).map(Percent)),
        offset=draw(st.integers(0, 1 << 20).map(lambda n: n * 512) | st.integers(0, 99).map(Percent)),
        offset_increment=draw(st.integers(0, 1 << 20).map(lambda n: n * 512) | st.integers(0, 50).map(Percent)),
        iodepth=draw(st.integers(1, 256)),
        iodepth_batch=draw(st.integers(0, 256)),
        numjobs=draw(st.integers(1, 4)),
        number_ios=draw(st.none() | st.integers(1, 1 << 30)),
        runtime=draw(st.none() | st.integers(1, 10**12).map(lambda us: us / 1e6)),
        rwmixread=draw(st.integers(0, 100)),
        randseed=draw(st.integers(0, 2**63 - 1)),
        fsync=draw(st.integers(0, 100)),
        serialize_overlap=draw(st.booleans()),
        verify=None if "trim" in direction else draw(st.sampled_from([None, "crc32", "md5", "sha1", "sha256", "sha512"])),
    )
