"""VhostUserMachine: our driver or a real guest's on one side, our device or QEMU's on the other, vhost-user between them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, DeviceDied, NotHere, VblkError, VhostUserError
from ..kvm import check_wire
from ..transport import Pci
from ..vhost.channel import Channel, connect
from ..vhost.effects import Region
from ..vhost.transport import NOT_FOR_DRIVERS, VhostUserTransport
from .base import Recipe, default_vcpus, fresh_device, memory_bytes, not_simulated, real_engine
from .live import LiveMachine, LiveVm, live_missing
from .live_bus import interrupts
from .serve import Served, serve

__all__ = ["VhostUserBackend", "VhostUserMachine", "VhostUserVm"]

_USER = 0x7F0000000000
"""Where the front-end says its memory lies; any address does, the back-end only takes differences."""


@dataclass(frozen=True)
class VhostUserBackend:
    """A ``host`` side: whatever vhost-user-blk back-end listens at ``socket``."""

    socket: str

    def start(self) -> VhostUserBackend:
        """It runs already."""
        return self

    def close(self) -> None:
        """It is somebody else's."""


class VhostUserMachine(LiveMachine):
    """Runs recipes over vhost-user.

    With ``guest=None`` our driver is the front-end; its back-end is our device in a process of its own, or the recipe's ``host``
    (``vb.StorageDaemon(image)``, ``vb.VhostUserBackend(socket)``).  With ``guest=vb.LinuxGuest()`` a real Linux runs the job with the
    real fio.  ``poll_us`` lets our device look for work that long before it sleeps; ``stall_s`` is how long no I/O may complete.
    """

    real_sides = ("guest", "host")

    def __init__(self, *, poll_us: float = 0, trace: bool = True, stall_s: float = 20.0, iolog: bool = False) -> None:
        super().__init__(poll_us=poll_us, trace=trace, stall_s=stall_s, iolog=iolog)

    def __repr__(self) -> str:
        return f"VhostUserMachine({f'poll_us={self.poll_us:g}' if self.poll_us else ''})"

    def boot(self, recipe: Recipe) -> Any:
        """Connect both sides and stand before the first I/O."""
        missing = live_missing()
        if missing:
            raise NotHere(missing)
        if getattr(recipe.queue, "in_order", False):
            raise ConfigError(f"queue={recipe.queue!r} on {self!r}", "vhost-user rings have no IN_ORDER here: leave in_order out")
        if recipe.guest is not None:
            from .linux_vm import LinuxVm

            return LinuxVm(self, recipe)
        return VhostUserVm(self, recipe)


class VhostUserVm(LiveVm):
    """Our guest, with a vhost-user back-end below it."""

    transport: VhostUserTransport  # type: ignore[assignment]

    def _build(self) -> None:
        recipe, machine = self.recipe, self.machine
        check_wire(recipe.kvm, recipe.transport)
        host = recipe.host
        device = fresh_device(recipe, default_vcpus(recipe))
        self._served: Served | None = None
        if host is None:
            self._served = self._serve(device)
            path = self._served.socket
            self._explanation = self._served.explain()
        elif not hasattr(host, "start"):
            remedy = "it is part of QEMU: add guest=vb.LinuxGuest(), or drive QEMU's device with host=vb.StorageDaemon(image)"
            raise ConfigError(f"host={host!r} without a real guest", remedy)
        else:
            self._explanation = [f"the path of {host!r} is its own"]
            running = host.start()
            self._closers.append(running.close)
            path = running.socket
        self._host = host
        self._note(device)
        size = memory_bytes(recipe, device.num_queues, device.seg_max, recipe.queue.size)
        fd = os.memfd_create("vblklab-guest", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        self._closers.append(lambda: os.close(fd))
        os.ftruncate(fd, size)
        self._build_guest(fd, size)
        channel = Channel(connect(path, machine.stall_s))
        regions = (Region(0, size, _USER, 0, fd),)
        try:
            self.transport = VhostUserTransport(
                channel, regions, polled=self.driver.poll, watch_call=self._watch_call, queue_size=recipe.queue.size
            )
        except BaseException:
            channel.close()
            raise
        self._closers.append(self.transport.close)
        self.driver.attach(self.pages, self.transport, self.iostack, queue_size=recipe.queue.size, packed=recipe.queue.packed)
        self._irq = self.loop.add("guest irq", interrupts(self.driver.interrupt, self.transport.causes))
        self._channel = channel
        self.loop.watch(channel.fileno(), self._from_device)

    def _serve(self, device: Any) -> Served:
        recipe, machine = self.recipe, self.machine
        served = serve(device, recipe.disk, engine=real_engine(recipe), poll_us=machine.poll_us, trace=machine.trace)
        self._closers.append(served.close)
        return served

    def _note(self, device: Any) -> None:
        notes = self.notes
        pci = isinstance(self.recipe.transport, Pci)
        what = "virtio-pci; there are no vectors, and no registers" if pci else "virtio-mmio; there are no registers"
        notes.append(f"transport: a vhost-user connection in place of {what} to trap")
        notes.append("kick and call: eventfds; this machine has no trap and nothing is injected")
        if self._host is not None:
            notes.append(f"device, engine and disk: {self._host!r} in place of the recipe's; its trace points cannot be seen from here")
        else:
            notes += not_simulated(self.recipe)
            for bit in NOT_FOR_DRIVERS:
                if device.features() & bit:
                    notes.append(f"device: {bit.name} is not offered to the driver, a vhost-user connection has no room for it")

    def _watch_call(self, queue: int, fd: int) -> None:
        def called() -> None:
            self.transport.interrupted()
            self._irq.notify()

        self.loop.watch_eventfd(fd, called)

    # -- the other end -----------------------------------------------------------------------------------------------------------

    def _from_device(self) -> None:
        """The connection is readable although nothing was asked: it has ended."""
        try:
            message = self._channel.receive()
            what = "the back-end sent an answer that nobody asked for" if message is not None else ""
        except (VhostUserError, OSError) as error:
            what = str(error)
        if what:
            self.loop.unwatch(self._channel.fileno())
            text = "\n".join(self._served.exceptions) if self._served is not None else ""
            died = DeviceDied(f"the vhost-user back-end is gone: {what}", "boot the recipe again")
            died.traceback = text
            self._error = died

    def _finish_device(self) -> None:
        if self._served is None:
            self._result = (None, {})
            return
        counts = self._served.counters()
        self._result = (self._served.take_log(), {"notifies": counts["notifies"]})

    def _resize_device(self, size: int) -> None:
        if self._served is None:
            raise VblkError(f"{self._host!r} cannot be resized from here", "resize it with its own tools")
        self._served.resize(size)

    def _title(self) -> str:
        return f"VhostUserMachine (live) · our driver, {'our device' if self._host is None else type(self._host).__name__}"

    def _peers(self) -> dict[str, str]:
        return {"back-end": "our device, vhost-user" if self._host is None else repr(self._host)}
