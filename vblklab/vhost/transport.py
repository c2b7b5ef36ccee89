"""A vhost-user connection as the driver's transport: the same face as virtio-mmio's, with messages below it.

The front-end plays QEMU's part: what a driver stores in registers is kept here and told to the back-end when DRIVER_OK starts
the rings (``vhost_dev_start()``), and a reset stops them again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from typing import Any

from ..errors import VblkError, VhostUserError, VirtioError
from ..ring import PackedLayout, SplitLayout
from ..spec.vhost_user import F_PROTOCOL_FEATURES, ProtocolFeature
from ..spec.virtio import Feature, Status
from ..spec.virtio_blk import BlkFeature
from ..spec.virtio_mmio import Interrupt
from ..transport import InterruptStatus
from .channel import Channel, drive
from .effects import Region
from .front_end import FrontEnd, Talk

__all__ = ["NOT_FOR_DRIVERS", "VhostUserTransport"]

Steps = Generator[Any, int, Any]
_FLAGS = getattr(os, "EFD_NONBLOCK", 0) | getattr(os, "EFD_CLOEXEC", 0)


NOT_FOR_DRIVERS = (Feature.RING_RESET, Feature.NOTIFICATION_DATA)
"""What a driver above a connection is not offered: an eventfd has no room for data, and one ring is not reset through registers."""
_PACKED_START = 1 << 15 | 1 << 31  # both wrap counters of a packed ring begin at 1


class VhostUserTransport:
    """The driver's way to a vhost-user device.

    ``regions`` are the guest's memory; ``polled`` gives the rings no call eventfd; ``watch_call(fd)`` is told of each eventfd on
    which the device will interrupt.  VhostUserError where the back-end breaks the protocol.
    """

    features = 0

    def __init__(
        self, channel: Channel, regions: tuple[Region, ...], *, polled: bool, watch_call: Callable[[int, int], None], queue_size: int
    ) -> None:
        self.channel = channel
        self.front_end = FrontEnd()
        self.causes = InterruptStatus()
        self._kicks: dict[int, int] = {}
        self._regions = regions
        self._polled = polled
        self._watch_call = watch_call
        self._queue_size = queue_size
        self._layouts: dict[int, SplitLayout | PackedLayout] = {}
        self._running: set[int] = set()
        self._eventfds: list[int] = []
        self._status = 0
        self._features = 0
        self._told_memory = False
        self.offered = self._talk(self.front_end.negotiate())

    def _talk(self, talk: Talk) -> Any:
        return drive(self.channel, self.front_end, talk)

    # -- the face of a transport ------------------------------------------------------------------------------------------------

    def probe(self, device_id: int) -> Steps:
        """vhost-user does not say what device it is: whoever gave the socket's path says so."""
        if not self.offered & Feature.VERSION_1:
            raise VirtioError("the back-end does not offer VIRTIO_F_VERSION_1", "6.1")
        if not self.front_end.has(ProtocolFeature.CONFIG):
            raise VhostUserError("the back-end has no configuration space (protocol feature CONFIG)", "use a vhost-user-blk back-end")
        return
        yield

    def status(self) -> Steps:
        """The device status, from the back-end where it keeps one."""
        if self.front_end.has(ProtocolFeature.STATUS):
            return self._talk(self.front_end.get_status())
        return self._status
        yield

    def add_status(self, bits: int) -> Steps:
        """Set more status bits; DRIVER_OK starts the rings."""
        self._status |= bits
        if bits & Status.DRIVER_OK:
            self._start()
        if self.front_end.has(ProtocolFeature.STATUS):
            self._talk(self.front_end.set_status(self._status))
        return (yield from self.status())

    def reset(self, overtaken: Callable[[], bool] = lambda: False) -> Steps:
        """Stop the rings; the device forgets its state where the protocol has a message for it."""
        front_end = self.front_end
        for ring in sorted(self._running):
            if front_end.offered & F_PROTOCOL_FEATURES:
                self._talk(front_end.enable_ring(ring, False))
            self._talk(front_end.stop_ring(ring))
        self._running.clear()
        self._layouts.clear()
        if front_end.has(ProtocolFeature.STATUS):
            self._talk(front_end.set_status(0))
        elif front_end.has(ProtocolFeature.RESET_DEVICE):
            self._talk(front_end.reset_device())
        self._status = 0
        return
        yield

    def device_features(self) -> Steps:
        """The features the device offers; the number of queues is what the back-end says it has."""
        bits = self.offered & ~int(NOT_FOR_DRIVERS[0] | NOT_FOR_DRIVERS[1])
        return bits if self.front_end.queues > 1 else bits & ~int(BlkFeature.MQ)
        yield

    def accept_features(self, features: int) -> Steps:
        """SET_FEATURES, and FEATURES_OK where the back-end keeps a status."""
        self._features = features
        self._talk(self.front_end.set_features(features))
        status = yield from self.add_status(Status.FEATURES_OK)
        if not status & Status.FEATURES_OK:
            raise VirtioError(f"the device refuses the features {features:#x}: FEATURES_OK reads back as 0", "3.1.1")

    def queue_size_max(self, queue: int) -> Steps:
        """vhost-user leaves the size to the front-end; 0 where the back-end has no such queue."""
        return self._queue_size if queue < self.front_end.queues else 0
        yield

    def reset_queue(self, queue: int) -> Steps:
        """There is no message that resets one ring and leaves the device as it is."""
        raise VirtioError(f"queue {queue} cannot be reset by itself over vhost-user", "2.6.1")
        yield

    def setup_queue(self, queue: int, layout: SplitLayout | PackedLayout) -> Steps:
        """Remember where the ring lies; it starts with DRIVER_OK."""
        self._layouts[queue] = layout
        return
        yield

    def find_vqs(self, layouts: Sequence[SplitLayout | PackedLayout], *, polled: bool = False) -> Steps:
        """Remember where queues 0, 1, … lie."""
        for queue, layout in enumerate(layouts):
            yield from self.setup_queue(queue, layout)

    def interrupt(self, vector: int = 0) -> Generator[Any, int, tuple[bool, Sequence[int]]]:
        """What the calls and the back-end's own messages were about; a call does not say of which ring it is."""
        yield ("vm_interrupt",)
        causes = self.causes.read()
        self.causes.ack(causes)
        return bool(causes & Interrupt.CONFIG), tuple(self._layouts) if causes & Interrupt.VRING else ()

    def notify(self, queue: int, data: int | None = None) -> Steps:
        """The doorbell is the ring's kick eventfd."""
        yield ("vm_notify", queue)
        os.eventfd_write(self._kicks[queue], 1)

    def read_config(self, offset: int, length: int) -> Steps:
        """A field of configuration space, read with all before it: libvhost-user ignores the offset of GET_CONFIG."""
        data: bytes = self._talk(self.front_end.read_config(0, offset + length))
        return data[offset:]
        yield

    def write_config(self, offset: int, data: bytes) -> Steps:
        """Store bytes in configuration space."""
        self._talk(self.front_end.write_config(offset, data))
        return
        yield

    # -- rings and notifications -------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        front_end = self.front_end
        if not self._told_memory:
            self._talk(front_end.set_memory(self._regions))
            self._told_memory = True
        for queue, layout in self._layouts.items():
            kick = self._kicks.get(queue)
            if kick is None:
                kick = self._kicks[queue] = self._eventfd()
            call = None if self._polled else self._eventfd()
            if call is not None:
                self._watch_call(queue, call)
            user = self._regions[0].user - self._regions[0].gpa
            base = _PACKED_START if self._features & Feature.RING_PACKED else 0
            self._talk(
                front_end.start_ring(
                    queue, layout.size, base, layout.desc + user, layout.avail + user, layout.used + user, kick=kick, call=call, err=None
                )
            )
            self._running.add(queue)

    def _eventfd(self) -> int:
        fd = os.eventfd(0, _FLAGS)
        self._eventfds.append(fd)
        return fd

    def interrupted(self) -> None:
        """A call eventfd was written."""
        self.causes.set(Interrupt.VRING)

    def backend_said(self, own: Channel) -> None:
        """Something came on the back-end's own channel; a configuration change becomes an interrupt."""
        while (message := own.receive()) is not None:
            name, answer = self.front_end.backend_said(message)
            for fd in message.fds:
                os.close(fd)
            if answer is not None:
                own.send(answer)
            if name == "CONFIG_CHANGE_MSG":
                self.causes.set(Interrupt.CONFIG)

    def close(self) -> None:
        """Stop the rings so that the back-end lets go of memory, then hang up."""
        try:
            for ring in sorted(self._running):
                self._talk(self.front_end.stop_ring(ring))
        except (VblkError, OSError):
            pass  # it is gone, which serves as well
        self._running.clear()
        self.channel.close()
        for fd in self._eventfds:
            os.close(fd)
        self._eventfds.clear()
