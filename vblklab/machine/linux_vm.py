"""A recipe whose guest side is a real Linux: the real fio runs the recipe's job on our device, or on QEMU's."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..peer import QemuDisk, VhostUserDisk
from ..peer.ftrace import PATH_EVENTS, PATH_KPROBES, Ftrace
from ..spec.virtio_blk_zoned import ZoneModel
from ..trace.recording import GuestRecording
from ..trace.run import Run
from .base import Recipe, fresh_device, host_provenance, not_simulated, real_engine
from .guest_run import GuestRun
from .serve import Served, serve

if TYPE_CHECKING:
    from .vhost_user import VhostUserMachine

__all__ = ["LinuxVm"]

_QUEUE_MOST = 128
_QEMU_EVENTS = ("virtio_queue_notify", "virtio_blk_*", "virtio_notify", "virtio_notify_irqfd", "blk_co_preadv", "blk_co_pwritev")


class LinuxVm:
    """A booted Linux with the recipe's disk as /dev/vda.  ``guest`` takes commands, ``run()`` runs the job, also more than once."""

    def __init__(self, machine: VhostUserMachine, recipe: Recipe) -> None:
        if machine.iolog:
            raise ConfigError("VhostUserMachine iolog=True with a real guest", "the real fio does not tell its I/Os; leave iolog out")
        self.machine = machine
        self.recipe = recipe
        self.served: Served | None = None
        self._host: Any = None
        self.guest: Any = None
        self._last: GuestRun | None = None
        try:
            disk = self._disk()
            guest = recipe.guest
            if self._traced and isinstance(disk, QemuDisk):
                guest = replace(guest, trace=(*guest.trace, *_QEMU_EVENTS))
            self.guest = guest.boot([disk])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> LinuxVm:
        return self

    def __exit__(self, *what: object) -> None:
        self.close()

    def _disk(self) -> Any:
        """The guest's disk: our device in a process of its own, a back-end that is somebody else's, or QEMU's own device."""
        recipe, machine = self.recipe, self.machine
        size = min(recipe.queue.size, _QUEUE_MOST)
        host = recipe.host
        if host is not None:
            if recipe.queue.packed:
                what = f"queue={recipe.queue!r} with host={host!r}"
                raise ConfigError(what, "only our device offers a guest packed rings here: leave host out")
            if not hasattr(host, "start"):
                return host
            self._host = host.start()
            return VhostUserDisk(self._host.socket, queues=getattr(host, "queues", 1), queue_size=size)
        device = fresh_device(recipe, 1)
        zones = getattr(device, "zones", None)
        if zones is not None and zones.model is ZoneModel.HM:
            raise ConfigError(
                f"zones={zones!r} for a real guest",
                "its QEMU does not pass VIRTIO_BLK_F_ZONED on: use model='host-aware', or our own driver (guest=None)",
            )
        self.served = serve(device, recipe.disk, engine=real_engine(recipe), poll_us=machine.poll_us, trace=machine.trace)
        return VhostUserDisk(self.served.socket, queues=device.num_queues, queue_size=size, packed=recipe.queue.packed)

    @property
    def _traced(self) -> bool:
        """Whether both sides of a run can be recorded: of a back-end elsewhere nothing is seen."""
        return bool(self.machine.trace) and self._host is None

    # -- running -----------------------------------------------------------------------------------------------------------------

    def run(self, *, progress: Callable[[int, int | None], None] | None = None) -> Run:
        """Run the recipe's job with the real fio; a GuestCommandFailed if fio fails.

        With the machine's ``trace`` (the default) the guest's ftrace and the device's trace points are recorded around it and joined:
        the times then contain what recording costs.
        """
        served, guest = self.served, self.guest
        before = served.counters() if served is not None else {}
        if served is not None:
            served.take_log()
        said = len(guest.qemu_trace) if self._traced and served is None else 0
        tracing = guest.ftrace(PATH_EVENTS, PATH_KPROBES) if self._traced else nullcontext()
        ahead = _realtime_ahead_ns()
        with tracing as ftrace:
            result = guest.fio(self.recipe.app)
        after = served.counters() if served is not None else {}
        recording = self._recording(ftrace, guest.qemu_trace[said:] if said else "", ahead) if ftrace is not None else None
        counters: dict[str, int] = {name: after[name] - before[name] for name in ("kicks", "notifies") if name in after}
        self._last = GuestRun(self._title(), result, recording, self._provenance(result), self.recipe.describe(), self._notes(), counters)
        run = self._last.run("L3 real Linux guest")
        if progress is not None:
            progress(run.ios, run.ios)
        return run

    def _recording(self, ftrace: Ftrace, qemu_log: str, ahead: int) -> GuestRecording:
        numbers = self.guest.run("cat /sys/block/vda/dev").output.strip().replace(":", ",")
        pairs = tuple((pair.before_ns, pair.guest, pair.after_ns) for pair in ftrace.pairs)
        log = tuple(self.served.take_log()) if self.served is not None else ()
        return GuestRecording(ftrace.text, numbers, pairs, log, qemu_log, ahead)

    def save(self, path: str | Path) -> None:
        """Write the last run, with its recordings, to a file for ``vb.recorded(path)``."""
        if self._last is None:
            raise ConfigError("nothing has run yet", "call run() first")
        self._last.save(path)

    # -- what a figure must say --------------------------------------------------------------------------------------------------

    def _title(self) -> str:
        host = self.recipe.host
        if isinstance(host, QemuDisk):
            whose = "QEMU's device" + (" with an iothread" if host.iothread else "")
        else:
            whose = "our device" if host is None else repr(host).partition("(")[0]
        return f"Linux {self.guest.kernel.partition('-')[0]} on {whose}"

    def _provenance(self, result: dict[str, Any]) -> dict[str, str]:
        tcg = self.guest.accel == "tcg"
        return {
            "machine": repr(self.machine),
            "rung": "L3 real Linux guest",
            "guest": f"Linux {self.guest.kernel}, {self.recipe.guest!r}",
            "kvm": "QEMU's TCG: the guest's times are emulated" if tcg else "KVM",
            "application": str(result.get("fio version", "fio")),
            "cost table": "none: times are measured",
            "seed": "none",
        } | host_provenance()

    def _notes(self) -> list[str]:
        notes = [
            f"guest: the real fio, block layer and virtio_blk of Linux {self.guest.kernel} in place of ours",
            "transport: virtio-pci by QEMU"
            + ("" if isinstance(self.recipe.host, QemuDisk) else "; vhost-user carries the rings to the device"),
        ]
        if self.recipe.host is not None:
            notes.append(f"device, engine and disk: {self.recipe.host!r} in place of the recipe's")
            if self._host is not None and self.machine.trace:
                notes.append("steps: a back-end elsewhere shows no trace points, so no step is timed")
        else:
            notes += not_simulated(self.recipe)
        if self.guest.accel == "tcg":
            notes.append("QEMU emulates the guest's instructions: times inside the guest say nothing about real hardware")
        return notes

    def explain(self) -> list[str]:
        """Which path the device's requests take, and why."""
        return [f"the path of {self.recipe.host!r} is its own"] if self.served is None else self.served.explain()

    def resize(self, size: int) -> None:
        """Give the disk another size in bytes; the device tells the driver."""
        if self.served is None:
            raise ConfigError(f"host={self.recipe.host!r} cannot be resized from here", "resize it with its own tools")
        self.served.resize(size)

    def close(self) -> None:
        """End the guest, then the device; a second call does nothing."""
        for part in (self.guest, self.served, self._host):
            if part is not None:
                part.close()
        self.guest = self.served = self._host = None


def _realtime_ahead_ns() -> int:
    """CLOCK_REALTIME minus the clock of ``perf_counter_ns``, from the tightest of some readings."""
    best: tuple[int, int] | None = None
    for _ in range(20):
        before, now, after = time.perf_counter_ns(), time.time_ns(), time.perf_counter_ns()
        if best is None or after - before < best[0]:
            best = after - before, now - (before + after) // 2
    assert best is not None
    return best[1]
