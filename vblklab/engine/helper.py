"""The thread that takes a part of large reads: started by the first that another waits behind, asleep while there are none."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

__all__ = ["Helper"]


class Helper:
    """At most one thread beside the one that serves the rings; that one alone may call this, and must not be in a read meanwhile."""

    def __init__(self, loop: Callable[[int], int]) -> None:
        self._loop = loop
        self._words: Any = None
        self._thread: threading.Thread | None = None
        self._fd = -1

    @property
    def useful(self) -> bool:
        """Whether there is a second CPU to run on."""
        return len(os.sched_getaffinity(0)) > 1

    def start(self) -> int:
        """The address of the words that it shares with the ring's thread; 0 where it is of no use."""
        if self._thread is not None:
            return int(self._words.ctypes.data)
        if not self.useful:
            return 0
        import numpy as np

        from . import share

        words = np.zeros(share.WORDS + 8, np.int64)
        self._words = words = words[-words.ctypes.data % 64 // 8 :]  # on a line of the cache
        place = int(words.ctypes.data)
        thread = threading.Thread(target=self._loop, args=(place,), name="vblklab large reads", daemon=True)
        try:
            self._fd = words[share.EVENT_FD] = os.eventfd(0, os.EFD_CLOEXEC)
        except OSError:  # no file descriptor is left: reads go on without help
            return 0
        try:
            thread.start()
        except RuntimeError:  # nor a thread
            os.close(self._fd)
            return 0
        self._thread = thread
        return place

    def close(self) -> None:
        """End the thread and wait for it."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        from . import share

        self._words[share.STOP] = 1
        os.eventfd_write(self._fd, 1)
        thread.join()
        os.close(self._fd)
