"""What a back-end's connection asks its owner to carry out: memory to map, rings to start and stop, eventfds to take."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from ..errors import VhostUserError

__all__ = [
    "AnswerInflight",
    "Effect",
    "Region",
    "ResetDevice",
    "SetChannel",
    "SetFeatures",
    "SetInflight",
    "SetMemory",
    "SetNotifier",
    "StartRing",
    "StopRing",
    "WriteConfig",
    "check_regions",
]


@dataclass(frozen=True, slots=True)
class Region:
    """A piece of guest memory: guest-physical address, bytes, the front-end's own address of it, and where it lies in ``fd``."""

    gpa: int
    size: int
    user: int
    offset: int
    fd: int  # -1: mapped already

    @property
    def place(self) -> tuple[int, int, int]:
        """What identifies a region on the wire."""
        return self.gpa, self.size, self.user


@dataclass(frozen=True, slots=True)
class Effect:
    """Something the owner of the connection has to carry out."""


@dataclass(frozen=True, slots=True)
class SetFeatures(Effect):
    """The driver's features are known."""

    features: int


@dataclass(frozen=True, slots=True)
class SetMemory(Effect):
    """The whole memory table.  New regions carry a file descriptor that the owner takes."""

    regions: tuple[Region, ...]


@dataclass(frozen=True, slots=True)
class SetNotifier(Effect):
    """A kick, call or error eventfd for a ring (``which``); None: there is none, the other side polls.  The owner takes the fd."""

    which: str
    ring: int
    fd: int | None


@dataclass(frozen=True, slots=True)
class StartRing(Effect):
    """Serve this ring from ``vrings[ring].base`` on."""

    ring: int


@dataclass(frozen=True, slots=True)
class StopRing(Effect):
    """Take nothing more from this ring, finish what is in flight, then answer with the next available index."""

    ring: int


@dataclass(frozen=True, slots=True)
class WriteConfig(Effect):
    """The driver stored bytes in configuration space."""

    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class AnswerInflight(Effect):
    """Make an in-flight region; answer with (fd, bytes, offset)."""

    queues: int
    queue_size: int


@dataclass(frozen=True, slots=True)
class SetInflight(Effect):
    """Keep what is in flight in this region.  The owner takes the fd."""

    fd: int
    size: int
    offset: int
    queues: int
    queue_size: int


@dataclass(frozen=True, slots=True)
class SetChannel(Effect):
    """The back-end's own channel.  The owner takes the fd."""

    fd: int


@dataclass(frozen=True, slots=True)
class ResetDevice(Effect):
    """The device's state takes its initial values; all rings are stopped already."""


def check_regions(regions: tuple[Region, ...]) -> None:
    """Raise VhostUserError unless each region has a size, does not wrap, and none overlaps another, in either address space."""
    for region in regions:
        if not region.size or any(start + region.size > 1 << 64 for start in (region.gpa, region.user, region.offset)):
            raise VhostUserError(f"memory region {region.gpa:#x}+{region.size:#x} is empty or wraps around")
    for what, ranges in (
        ("guest-physical", sorted((r.gpa, r.gpa + r.size) for r in regions)),
        ("user", sorted((r.user, r.user + r.size) for r in regions)),
    ):
        for (_, end), (start, _) in pairwise(ranges):
            if end > start:
                raise VhostUserError(f"memory regions overlap at {what} address {start:#x}")
