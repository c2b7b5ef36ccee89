"""Surviving a file that shrinks under its mapping.

Touching a page behind the end of a mapped file raises SIGBUS, which ends the process.  Here a handler puts zeroed private pages
in the place of what is gone and marks the mapping as broken; the access that faulted goes on and its owner looks at ``broken``.
The fault is synchronous, in a load or store that holds no lock, so the handler may run Python.  Linux only.
"""

from __future__ import annotations

import ctypes
import mmap
import signal
import sys
import threading
import weakref
from functools import cache
from typing import Any

__all__ = ["Guard", "protect"]

_PAGE = mmap.PAGESIZE
_SI_ADDR = 16  # siginfo_t.si_addr on 64-bit Linux
_SA_SIGINFO = 4
_MAP_FIXED = 0x10


class _SigAction(ctypes.Structure):
    """glibc's and musl's ``struct sigaction`` on 64-bit Linux."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_uint64 * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class Guard:
    """One protected mapping.  ``broken`` is True once a page of it was found gone; ``flag[0]`` says so to compiled code."""

    __slots__ = ("__weakref__", "end", "flag", "start")

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self.flag = bytearray(1)

    @property
    def broken(self) -> bool:
        return self.flag[0] != 0


class _Watch:
    """The process's handler and the ranges it answers for."""

    def __init__(self) -> None:
        self.guards: list[Guard] = []
        self.lock = threading.Lock()
        libc = ctypes.CDLL(None, use_errno=True)
        self._sigaction = libc.sigaction
        self._mmap = libc.mmap
        self._mmap.restype = ctypes.c_void_p
        self._mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
        self._before = _SigAction()
        self._handler = _Handler(self._fault)

    def install(self) -> None:
        """Be the process's handler, also where another, such as faulthandler's, came after us."""
        address = ctypes.cast(self._handler, ctypes.c_void_p)
        now = _SigAction()
        self._sigaction(signal.SIGBUS, None, ctypes.byref(now))
        if now.handler != address.value:
            self._before = now
            self._sigaction(signal.SIGBUS, ctypes.byref(_SigAction(address, flags=_SA_SIGINFO)), None)

    def _fault(self, number: int, info: Any, context: Any) -> None:
        address = ctypes.c_uint64.from_address(info + _SI_ADDR).value
        for guard in self.guards:
            if guard.start <= address < guard.end:
                page = address & -_PAGE
                flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
                if self._mmap(page, guard.end - page, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) == page:
                    guard.flag[0] = 1
                    return
        self._sigaction(signal.SIGBUS, ctypes.byref(self._before), None)  # not ours: the access faults again, as without us


@cache
def _watch() -> _Watch:
    return _Watch()


def protect(mapping: mmap.mmap) -> Guard:
    """Guard ``mapping`` for as long as it exists."""
    size = len(mapping)
    start = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    guard = Guard(start, (start + size + _PAGE - 1) & -_PAGE)
    if sys.platform != "linux" or sys.maxsize < 1 << 32:
        return guard
    watch = _watch()
    with watch.lock:
        watch.install()
        watch.guards = [*watch.guards, guard]

    def forget() -> None:
        with watch.lock:
            watch.guards = [other for other in watch.guards if other is not guard]

    weakref.finalize(mapping, forget)
    return guard
