"""vblklab: the path of one virtio-blk I/O through a virtual machine, as objects that you can run, swap, break and measure.

>>> import vblklab as vb
>>> p = vb.Pipeline(app=vb.Fio(rw="randread", bs=4096, iodepth=4, number_ios=1000))
>>> run = p.run(vb.SimMachine())
>>> run.waterfall()                                                                                # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .device import EmptyDevice, VirtioBlkDevice, Zones
    from .disk import ImageFile, Nvme, Ram, VolatileCache
    from .engine import IoUring, Mapped, Simulated, Sync, Threads
    from .errors import (
        BadAddress,
        ConfigError,
        DeviceDied,
        DiskError,
        JobError,
        NotHere,
        QueueFull,
        Stalled,
        TraceError,
        VblkError,
        VhostUserError,
        VirtioError,
    )
    from .events import EVENTS, STEPS, WAIT, Wait, event
    from .guest.empty import EmptyDriver
    from .guest.fio import Fio
    from .guest.virtio_blk import VirtioBlkDriver
    from .interleave import schedules
    from .iostack import IOStack
    from .kvm import BareGuest, Kvm
    from .lab.bench import Bench, registers
    from .lab.calibrate import calibrate
    from .lab.chapter_08 import linux_on, linux_run, scratch_image
    from .lab.check import check
    from .lab.doctor import doctor
    from .lab.driver_bench import probe_log
    from .lab.kvm_run import kvm_run
    from .lab.predict import predict
    from .lab.trap import Trap
    from .lab.words import words
    from .lab.zoo import zoo
    from .machine.costs import CostTable
    from .machine.guest_run import recorded
    from .machine.kvm import KvmMachine
    from .machine.live import LiveMachine
    from .machine.serve import serve
    from .machine.sim import SimMachine
    from .machine.vhost_user import VhostUserBackend, VhostUserMachine
    from .peer import LinuxGuest, QemuDisk
    from .peer.storage_daemon import StorageDaemon
    from .pipeline import Packed, Pipeline, Split
    from .trace.film import Film, film
    from .trace.gaps import between
    from .trace.imported import read_trace
    from .trace.run import Run
    from .transport import Mmio, Pci
    from .view import compare, explore, export, lanes, latency, path_map, spread, sweep, waterfall

_WHERE = {
    "BadAddress": "errors",
    "BareGuest": "kvm",
    "Bench": "lab.bench",
    "ConfigError": "errors",
    "CostTable": "machine.costs",
    "DeviceDied": "errors",
    "DiskError": "errors",
    "EVENTS": "events",
    "EmptyDevice": "device",
    "EmptyDriver": "guest.empty",
    "Film": "trace.film",
    "Fio": "guest.fio",
    "IOStack": "iostack",
    "IoUring": "engine",
    "ImageFile": "disk",
    "JobError": "errors",
    "KvmError": "errors",
    "KvmExit": "errors",
    "KvmMachine": "machine.kvm",
    "Kvm": "kvm",
    "LinuxGuest": "peer",
    "LiveMachine": "machine.live",
    "Mapped": "engine",
    "Mmio": "transport",
    "NotHere": "errors",
    "Nvme": "disk",
    "Packed": "pipeline",
    "Pci": "transport",
    "Pipeline": "pipeline",
    "QemuDisk": "peer",
    "QueueFull": "errors",
    "Ram": "disk",
    "Run": "trace.run",
    "STEPS": "events",
    "SimMachine": "machine.sim",
    "Simulated": "engine",
    "Split": "pipeline",
    "Stalled": "errors",
    "TraceError": "errors",
    "Trap": "lab.trap",
    "StorageDaemon": "peer.storage_daemon",
    "Sync": "engine",
    "Threads": "engine",
    "VblkError": "errors",
    "VhostUserBackend": "machine.vhost_user",
    "VhostUserError": "errors",
    "VhostUserMachine": "machine.vhost_user",
    "VirtioBlkDevice": "device",
    "VirtioBlkDriver": "guest.virtio_blk",
    "VirtioError": "errors",
    "VolatileCache": "disk",
    "WAIT": "events",
    "Wait": "events",
    "Zones": "device",
    "between": "trace.gaps",
    "calibrate": "lab.calibrate",
    "check": "lab.check",
    "compare": "view",
    "doctor": "lab.doctor",
    "event": "events",
    "explore": "view",
    "export": "view",
    "film": "trace.film",
    "kvm_run": "lab.kvm_run",
    "lanes": "view",
    "latency": "view",
    "linux_on": "lab.chapter_08",
    "linux_run": "lab.chapter_08",
    "path_map": "view",
    "predict": "lab.predict",
    "probe_log": "lab.driver_bench",
    "read_trace": "trace.imported",
    "recorded": "machine.guest_run",
    "registers": "lab.bench",
    "scratch_image": "lab.chapter_08",
    "schedules": "interleave",
    "serve": "machine.serve",
    "spread": "view",
    "sweep": "view",
    "waterfall": "view",
    "words": "lab.words",
    "zoo": "lab.zoo",
}
__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    """Public names load their module when they are first used, so that ``import vblklab`` is quick."""
    if name not in _WHERE:
        raise AttributeError(f"module 'vblklab' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
