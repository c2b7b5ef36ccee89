"""The real programs that judge vblklab: where they are on this machine and, when they are not, what to say.

``why_not(marker)`` is what ``conftest.py`` asks for a test marked ``cc``, ``chromium``, ``fio``, ``guest``, ``kvm``,
``numba`` or ``qemu``.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from functools import cache

__all__ = ["MARKERS", "PROGRAMS", "chromium", "why_not"]

# marker -> (the programs that are all needed, the Debian packages that hold them)
PROGRAMS: dict[str, tuple[tuple[str, ...], str]] = {
    "cc": (("cc",), "gcc libc6-dev"),
    "fio": (("fio",), "fio"),
    "qemu": (("qemu-system-x86_64", "qemu-img", "qemu-storage-daemon"), "qemu-system-x86 qemu-utils"),
}
MARKERS = (*PROGRAMS, "chromium", "guest", "kvm", "numba")

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_MAC_CHROME = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
_KVM_GET_API_VERSION, _KVM_CREATE_VM, _KVM_API = 0xAE00, 0xAE01, 12


@cache
def chromium() -> str | None:
    """The browser to drive: ``$CHROMIUM``, else the first one found."""
    if named := os.environ.get("CHROMIUM"):
        return shutil.which(named)
    return next(filter(None, map(shutil.which, (*_BROWSERS, _MAC_CHROME))), None)


@cache
def why_not(marker: str) -> str | None:
    """One line that says what ``marker`` lacks on this machine and what would bring it, or None if nothing."""
    if marker == "kvm":
        return _why_no_kvm()
    if marker == "chromium":
        return None if chromium() else "chromium: no Chromium or Chrome here; on Debian: apt install chromium (or set CHROMIUM=/path)"
    if marker == "guest":
        return why_not("qemu") or _why_no_guest()
    if marker == "numba":
        from vblklab.engine.compiled import compiled_missing

        return compiled_missing() or None
    programs, packages = PROGRAMS[marker]
    absent = [name for name in programs if shutil.which(name) is None]
    return f"{marker}: no {', '.join(absent)} here; on Debian: apt install {packages}" if absent else None


def _why_no_kvm() -> str | None:
    try:
        kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        advice = "add yourself to the group kvm" if error.errno == errno.EACCES else "the host must offer (nested) virtualisation"
        return f"kvm: /dev/kvm: {os.strerror(error.errno or 0)}; {advice}"
    try:
        version = fcntl.ioctl(kvm, _KVM_GET_API_VERSION, 0)
        os.close(fcntl.ioctl(kvm, _KVM_CREATE_VM, 0))
    except OSError as error:
        return f"kvm: /dev/kvm opens, but makes no virtual machine: {os.strerror(error.errno or 0)}"
    finally:
        os.close(kvm)
    return None if version == _KVM_API else f"kvm: API version {version}, not {_KVM_API}"


def _why_no_guest() -> str | None:
    from vblklab.errors import NotHere
    from vblklab.peer.kernels import find_kernel
    from vblklab.peer.programs import find_programs

    try:
        find_kernel()
        find_programs()
    except NotHere as missing:
        return f"guest: {missing}"
    return None
