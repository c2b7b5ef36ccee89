"""The errors of vblklab: typed, one sentence, naming the thing, its value and the remedy."""

from __future__ import annotations

__all__ = [
    "BadAddress",
    "ConfigError",
    "DeviceDied",
    "DiskError",
    "GuestCommandFailed",
    "GuestDied",
    "GuestError",
    "GuestTimeout",
    "JobError",
    "KvmError",
    "KvmExit",
    "NotHere",
    "QueueFull",
    "Stalled",
    "TraceError",
    "VblkError",
    "VhostUserError",
    "VirtioError",
]


class VblkError(Exception):
    """The base of all. ``remedy`` says what to do; a notebook shows one line instead of a page of traceback."""

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(f"{what}: {remedy}" if remedy else what)
        self.what = what
        self.remedy = remedy

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


class ConfigError(VblkError):
    """A recipe, part or option that cannot be: unknown name, wrong value, impossible combination."""


class JobError(ConfigError):
    """A fio job file or option that is not understood; names section, key and line."""


class DiskError(VblkError):
    """A disk image that cannot be opened or used."""


class NotHere(VblkError):
    """This machine lacks what was asked for; the remedy names the rung that is left."""


class VirtioError(VblkError):
    """The peer broke the specification. ``section`` is the place in the specification."""

    def __init__(self, what: str, section: str = "") -> None:
        super().__init__(what if not section else f"{what} (VIRTIO 1.4 §{section})")
        self.section = section


class BadAddress(VirtioError):
    """A guest-physical range that is not memory."""

    def __init__(self, gpa: int, length: int, section: str = "2.7.5") -> None:
        super().__init__(f"guest-physical range {gpa:#x}+{length:#x} is outside memory", section)
        self.gpa = gpa
        self.length = length


class VhostUserError(VblkError):
    """The other end of a vhost-user connection broke the protocol, or went away; the connection is over."""


class QueueFull(VblkError):
    """No free descriptors now; try again after a completion."""


class DeviceDied(VblkError):
    """The device's thread or process ended while the driver still needed it.  ``traceback`` is the device's own, if it sent one."""

    traceback = ""

    def _render_traceback_(self) -> list[str]:
        return [*super()._render_traceback_(), *self.traceback.splitlines()]


class Stalled(VblkError):
    """I/O is in flight and nothing is left that could complete it: a notification or a buffer was lost."""


class TraceError(VblkError):
    """A recorded trace that cannot be read, or that contradicts itself; names the line or the moment."""


class KvmError(VblkError):
    """An ioctl of KVM failed with ``errno``."""

    def __init__(self, ioctl: str, errno: int, words: str, remedy: str = "") -> None:
        super().__init__(f"{ioctl} failed with errno {errno} ({words})", remedy or "vb.doctor() says what this machine's KVM can do")
        self.ioctl = ioctl
        self.errno = errno


class KvmExit(VblkError):
    """A vCPU stopped for a reason that nobody can serve.

    ``reason`` is the exit's name, ``registers`` are the vCPU's, ``code`` the bytes at rip (none if rip is outside memory).
    """

    def __init__(self, reason: str, registers: dict[str, int], code: bytes) -> None:
        text = " ".join(f"{name}={value:#x}" for name, value in registers.items())
        super().__init__(f"the vCPU stopped: {reason}, {text}, bytes at rip: {code.hex(' ') or 'none'}")
        self.reason = reason
        self.registers = registers
        self.code = code


_SHOWN = 4


class GuestError(VblkError):
    """Something in a real guest went wrong.  ``output`` is the end of its console, or what the command in question printed.

    A notebook shows the last lines of it.
    """

    def __init__(self, what: str, remedy: str = "", output: str = "") -> None:
        super().__init__(what, remedy)
        self.output = output

    def _render_traceback_(self) -> list[str]:
        lines = [line for line in self.output.splitlines() if line.strip()]
        whose = [f"the last {_SHOWN} of {len(lines)} lines (sys.last_value.output has all):"] if len(lines) > _SHOWN else []
        return [*super()._render_traceback_(), *whose, *lines[-_SHOWN:]]


class GuestDied(GuestError):
    """The guest ended by itself: its kernel panicked, or QEMU gave up."""


class GuestTimeout(GuestError):
    """The guest's boot, or a command in it, took longer than it was given; after a command's timeout the guest takes the next one."""


class GuestCommandFailed(GuestError):
    """A command in the guest ended with a ``status`` other than 0."""

    status = 0
