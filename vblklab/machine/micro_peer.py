"""The other process of a calibration: ``python -m vblklab.machine.micro_peer KICK CALL MEMORY CPU WORK_NS``.

It sleeps on the eventfd KICK, notes when it is awake, works for WORK_NS as a device would, and writes the eventfd CALL.  Its
stamps (perf_counter_ns: awake, before the write, after it; then the number of the turn) lie in MEMORY, a memfd.  A count of STOP, or
ten seconds without a kick, end it.  CPU is -1 for any.
"""

from __future__ import annotations

import os
import select
import sys
import time
from mmap import mmap

__all__ = ["STOP", "serve"]

STOP = 1 << 20
_LONGEST_S = 10.0


def serve(kick: int, call: int, memory: int, cpu: int, work_ns: int) -> None:
    """Answer kicks until told to stop."""
    clock = time.perf_counter_ns
    if cpu >= 0:
        os.sched_setaffinity(0, {cpu})
    with mmap(memory, 4096) as page, memoryview(page) as view, view.cast("q") as words, select.epoll() as epoll:
        epoll.register(kick, select.EPOLLIN)
        words[3] = turn = 0
        os.eventfd_write(call, 1)  # ready
        while epoll.poll(_LONGEST_S):
            awake = clock()
            if os.eventfd_read(kick) >= STOP:
                return
            until = awake + work_ns
            while clock() < until:
                pass
            turn += 1
            words[0] = awake
            words[1] = clock()
            os.eventfd_write(call, 1)
            words[2] = clock()
            words[3] = turn


if __name__ == "__main__":
    serve(*map(int, sys.argv[1:6]))
