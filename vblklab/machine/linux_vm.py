"""A recipe whose guest side is a real Linux: the real fio runs the recipe's job on our device, or on QEMU's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..peer import VhostUserDisk
from ..stats import DirStat, Histogram, JobStat
from ..trace.correlate import Correlator
from ..trace.run import Run
from .base import Recipe, build_run, fresh, not_simulated, real_engine
from .serve import Served, serve

if TYPE_CHECKING:
    from .vhost_user import VhostUserMachine

__all__ = ["LinuxVm", "job_stats"]

_QUEUE_MOST = 128


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
        try:
            disk = self._disk()
            self.guest = recipe.guest.boot([disk])
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
            if not hasattr(host, "start"):
                return host
            self._host = host.start()
            return VhostUserDisk(self._host.socket, queues=getattr(host, "queues", 1), queue_size=size)
        device = fresh(recipe.device)
        device.num_queues = device.num_queues or 1
        self.served = serve(device, recipe.disk, engine=real_engine(recipe), poll_us=machine.poll_us)
        return VhostUserDisk(self.served.socket, queues=device.num_queues, queue_size=size)

    def run(self, *, progress: Callable[[int, int | None], None] | None = None) -> Run:
        """Run the recipe's job with the real fio; a GuestCommandFailed if fio fails."""
        before = self.served.counters() if self.served is not None else {}
        result = self.guest.fio(self.recipe.app)
        after = self.served.counters() if self.served is not None else {}
        jobs = job_stats(result)
        ios = sum(one.ios for job in jobs for one in (job.read, job.write, job.trim))
        if progress is not None:
            progress(ios, ios)
        return build_run(
            title=f"VhostUserMachine · Linux {self.guest.kernel} on {self._whose()}",
            rung="L3 real Linux guest",
            simulated=False,
            provenance={
                "machine": repr(self.machine),
                "rung": "L3 real Linux guest",
                "guest": f"Linux {self.guest.kernel}, {self.recipe.guest!r}",
                "kvm": "QEMU's TCG: the guest's times are emulated" if self.guest.accel == "tcg" else "KVM",
                "application": str(result.get("fio version", "fio")),
                "cost table": "none: times are measured by fio in the guest",
                "seed": "none",
                "tracing": "off: steps are not timed in this run",
            },
            recipe=self.recipe,
            notes=self._notes(),
            jobs=jobs,
            correlator=Correlator(),
            counters={name: after[name] - before[name] for name in ("kicks", "notifies") if name in after},
            trace=None,
        )

    def explain(self) -> list[str]:
        """Which path the device's requests take, and why."""
        return [f"the path of {self.recipe.host!r} is its own"] if self.served is None else self.served.explain()

    def _whose(self) -> str:
        return "our device" if self.recipe.host is None else type(self.recipe.host).__name__

    def _notes(self) -> list[str]:
        notes = [
            f"guest: the real fio, block layer and virtio_blk of Linux {self.guest.kernel} in place of ours",
            "transport: virtio-pci by QEMU; vhost-user carries the rings to the device",
        ]
        if self.recipe.host is not None:
            notes.append(f"device, engine and disk: {self.recipe.host!r} in place of the recipe's")
        else:
            notes += not_simulated(self.recipe)
        if self.guest.accel == "tcg":
            notes.append("QEMU emulates the guest's instructions: times inside the guest say nothing about real hardware")
        return notes

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


def job_stats(result: dict[str, Any]) -> list[JobStat]:
    """The jobs of fio's json+ output as ours."""
    stats = []
    for number, job in enumerate(result["jobs"]):
        stat = JobStat(str(job["jobname"]), number, {k: str(v) for k, v in job.get("job options", {}).items()})
        stat.error = int(job["error"])
        for name in ("read", "write", "trim"):
            _direction(getattr(stat, name), job[name])
        stat.end_ns = max(int(job[name]["runtime"]) for name in ("read", "write", "trim")) * 1_000_000
        stats.append(stat)
    return stats


def _direction(into: DirStat, side: dict[str, Any]) -> None:
    into.ios, into.bytes = int(side["total_ios"]), int(side["io_bytes"])
    into.short_ios, into.drop_ios = int(side.get("short_ios", 0)), int(side.get("drop_ios", 0))
    into.clat = Histogram.of_bins(side["clat_ns"])
