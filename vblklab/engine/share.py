"""Large reads shared by two threads, compiled: the copy is cut into chunks, and whoever is free takes the next one.

The thread that serves the ring publishes a read's chunks with one word, takes chunks itself and waits only for those that the other
thread has begun; so a read is over when ``move`` returns, and a helper that sleeps or was put aside holds nothing up.  Both work on an
array of words whose address they know; ``helper.py`` owns it and the thread.  Imported only where numba is.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .words import (
    add_shared64,
    clock_gettime,
    exchanged64,
    fence,
    load64,
    load_shared64,
    memmove,
    pause,
    pread,
    preadv,
    publish64,
    read,
    sched_yield,
    store64,
    write,
)

__all__ = ["EVENT_FD", "LEAST", "STOP", "WORDS", "assist", "awake", "move"]

LEAST = 64 << 10
"""Bytes from which on a read is shared: half of it is worth more than what the two threads say to each other."""
CHUNK = 64 << 10
"""Most bytes that one thread takes at a time: none waits long for the other's last one."""
_MOST = 64  # chunks of one read; a read of more than 4 MiB has larger ones
_SEGMENTS = 256 + _MOST  # of all chunks: those of the buffer, some of them cut in two
SPIN_NS = 100_000
"""How long the helper looks for the next read before it sleeps: longer than the ring's thread needs between two batches."""

# Places in the shared words.  Each line of the cache has one writer at a time: both threads, the helper, the ring's thread.
CLAIM, DONE, FAILED = 0, 8, 9
ASLEEP, _CLOCK, _BUFFER = 16, 24, 26
STOP, EVENT_FD, _ONE, FD, IMAGE, CHUNKS = 32, 33, 34, 35, 36, 40
_IOV = CHUNKS + 4 * _MOST
WORDS = _IOV + 2 * _SEGMENTS
_CLOCK_MONOTONIC = 1


@njit
def _now(share: int) -> int:
    clock_gettime(np.int32(_CLOCK_MONOTONIC), share + 8 * _CLOCK)
    return load64(share + 8 * _CLOCK) * 1_000_000_000 + load64(share + 8 * _CLOCK + 8)  # type: ignore[no-any-return]


@njit
def _cut(share: int, iov: int, segments: int, at: int, length: int) -> int:
    """Describe the chunks (address of iovec, entries, offset, bytes) of ``length`` bytes at ``at``; how many there are."""
    each = max(min(CHUNK, (length // 2 + 4095) & ~4095), ((length + _MOST - 1) // _MOST + 4095) & ~4095)
    chunks, entries, room, segment, used = 0, 0, 0, 0, 0
    while segment < segments:
        place = share + 8 * (CHUNKS + 4 * chunks)
        if not room:
            room = min(each, length)
            store64(place, share + 8 * (_IOV + 2 * entries))
            store64(place + 8, 0)
            store64(place + 16, at)
            store64(place + 24, room)
        left = load64(iov + 16 * segment + 8) - used
        step = min(left, room)
        entry = share + 8 * (_IOV + 2 * entries)
        store64(entry, load64(iov + 16 * segment) + used)
        store64(entry + 8, step)
        store64(place + 8, load64(place + 8) + 1)
        entries += 1
        used += step
        room -= step
        length -= step
        at += step
        if step == left:
            segment += 1
            used = 0
        if not room:
            chunks += 1
    return chunks


@njit
def _claim(share: int) -> int:
    """A chunk that is this thread's from here on, or -1.

    The word holds how many are not yet taken and, above that, the number of the read, so that a thread which was put aside
    meanwhile takes nothing of another read by mistake.
    """
    while True:
        word = load_shared64(share + 8 * CLAIM)
        left = word & 0xFFFF
        if not left:
            return -1
        if exchanged64(share + 8 * CLAIM, word, word - 1):
            return left - 1  # type: ignore[no-any-return]


@njit
def _copy(share: int, chunk: int) -> bool:
    """One chunk from the disk into the guest's memory; whether all of it went."""
    place = share + 8 * (CHUNKS + 4 * chunk)
    iov, entries, at, length = load64(place), load64(place + 8), load64(place + 16), load64(place + 24)
    image = load64(share + 8 * IMAGE)
    if image:
        for i in range(entries):
            step = load64(iov + 16 * i + 8)
            memmove(load64(iov + 16 * i), image + at, step)
            at += step
        return True
    fd = np.int32(load64(share + 8 * FD))
    if entries == 1:
        return pread(fd, load64(iov), length, at) == length  # type: ignore[no-any-return]
    return preadv(fd, iov, np.int32(entries), at) == length  # type: ignore[no-any-return]


@njit
def awake(share: int) -> bool:
    """Whether the helper would take a chunk at once."""
    return not load_shared64(share + 8 * ASLEEP)


@njit
def move(share: int, fd: int, image: int, iov: int, segments: int, at: int, length: int) -> bool:
    """Read ``length`` bytes at ``at`` into the segments, with the helper, who is woken if it sleeps; whether all of it went."""
    chunks = _cut(share, iov, segments, at, length)
    store64(share + 8 * FD, fd)
    store64(share + 8 * IMAGE, image)
    store64(share + 8 * DONE, 0)
    store64(share + 8 * FAILED, 0)
    publish64(share + 8 * CLAIM, (((load64(share + 8 * CLAIM) >> 16) + 1) << 16) + chunks)
    fence()
    if load_shared64(share + 8 * ASLEEP):
        publish64(share + 8 * ASLEEP, 0)
        store64(share + 8 * _ONE, 1)
        write(np.int32(load64(share + 8 * EVENT_FD)), share + 8 * _ONE, 8)
    whole = True
    chunk = _claim(share)
    while chunk >= 0:
        if not _copy(share, chunk):
            whole = False
        chunks -= 1
        chunk = _claim(share)
    turns = 0
    while load_shared64(share + 8 * DONE) != chunks:
        pause()
        turns += 1
        if not turns & 1023:
            sched_yield()
    return whole and not load_shared64(share + 8 * FAILED)


def assist(share: int) -> int:
    """The helper: take chunks until STOP, look for more for a while, then sleep until the event fd is written."""
    until = _now(share) + SPIN_NS
    buffer = share + 8 * _BUFFER
    while not load_shared64(share + 8 * STOP):
        chunk = _claim(share)
        if chunk >= 0:
            while chunk >= 0:
                if not _copy(share, chunk):
                    publish64(share + 8 * FAILED, 1)
                add_shared64(share + 8 * DONE, 1)
                chunk = _claim(share)
            until = _now(share) + SPIN_NS
            continue
        for _ in range(32):
            pause()
        if _now(share) < until:
            sched_yield()
            continue
        publish64(share + 8 * ASLEEP, 1)
        fence()
        if load_shared64(share + 8 * CLAIM) & 0xFFFF == 0 and not load_shared64(share + 8 * STOP):
            read(np.int32(load64(share + 8 * EVENT_FD)), buffer, 8)
        publish64(share + 8 * ASLEEP, 0)
        until = _now(share) + SPIN_NS
    return 0
