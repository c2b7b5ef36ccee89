"""Every schedule of a small driver and device: is anything ever lost?"""

from __future__ import annotations

from typing import Any

from ..device import VirtioBlkDevice
from ..errors import ConfigError
from ..guest.virtio_blk import VirtioBlkDriver
from ..ring import PackedDevice, PackedDriver, SplitDevice, SplitDriver
from ..transport import MmioTransport
from .removals import REMOVALS, Removal, removal
from .result import Frame, Replay, Schedules, Step
from .search import search
from .system import Setup, Violation

__all__ = ["REMOVALS", "Frame", "Removal", "Replay", "Schedules", "Step", "Violation", "schedules"]

_MOST_BUFFERS, _MOST_SIZE = 4, 8


def schedules(
    *,
    queue: Any,
    buffers: int = 2,
    event_idx: bool = True,
    indirect: bool = True,
    without: str | None = None,
    driver: type[Any] = VirtioBlkDriver,
    device: type[Any] = VirtioBlkDevice,
    driver_half: type[Any] | None = None,
    device_half: type[Any] | None = None,
    transport: type[Any] = MmioTransport,
    most_states: int = 100_000,
) -> Schedules:
    """Run ``buffers`` requests through driver and device in every order that their trace points and x86's store buffers allow.

    ``queue`` is ``vb.Split(2)`` or ``vb.Packed(2)``, at most 8 entries; without ``indirect`` a request takes three of them.
    ``without`` takes one thing away that the specification asks for: a name in ``REMOVALS``.  ``driver``, ``device``,
    ``driver_half``, ``device_half`` and ``transport`` are classes: the package's own, or a subclass of a learner's.
    """
    size = getattr(queue, "size", None)
    if not hasattr(queue, "packed") or not isinstance(size, int):
        raise ConfigError(f"queue={queue!r}", "give vb.Split(2) or vb.Packed(2)")
    if size > _MOST_SIZE:
        raise ConfigError(f"queue={queue!r} is too large to try every schedule", f"use at most {_MOST_SIZE} entries")
    if not isinstance(buffers, int) or isinstance(buffers, bool) or not 1 <= buffers <= _MOST_BUFFERS:
        raise ConfigError(f"buffers={buffers!r}", f"use 1 to {_MOST_BUFFERS}")
    if not indirect and size < 3:
        raise ConfigError(f"queue={queue!r} with indirect=False", "a request then takes three descriptors: use at least 4 (packed: 3)")
    halves = {
        "driver": driver_half or (PackedDriver if queue.packed else SplitDriver),
        "device": device_half or (PackedDevice if queue.packed else SplitDevice),
    }
    what = f"{buffers} buffer{'s' * (buffers > 1)} on {queue!r}, EVENT_IDX {'on' if event_idx else 'off'}"
    what += "" if indirect else ", INDIRECT off"
    if without is not None:
        away = removal(without)
        halves[away.half] = away.remove(halves[away.half])
        what += f", without the {away.name}"
    setup = Setup(
        queue=queue,
        buffers=buffers,
        event_idx=event_idx,
        indirect=indirect,
        driver=driver,
        device=device,
        transport=transport,
        driver_half=halves["driver"],
        device_half=halves["device"],
    )
    return Schedules(setup, what, search(setup, most_states))
