"""A virtio-blk device behind a vhost-user socket: the loop that serves one front-end after another."""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections.abc import Callable, Generator
from typing import Any

from ..device import VirtioBlkDevice
from ..disk import Store
from ..errors import BadAddress, VblkError, VhostUserError, VirtioError
from ..ring import PackedDevice, PackedLayout, SplitDevice, SplitLayout
from ..spec.vhost_user import BackendReq, ProtocolFeature
from ..spec.virtio import Feature, Status
from ..vhost.back_end import BackEnd
from ..vhost.channel import Channel, Closed, close_all
from ..vhost.codec import Message
from ..vhost.effects import (
    AnswerInflight,
    Effect,
    ResetDevice,
    SetChannel,
    SetFeatures,
    SetInflight,
    SetMemory,
    SetNotifier,
    StartRing,
    StopRing,
    WriteConfig,
)
from ..vhost.guard import Guard
from ..vhost.inflight import InflightQueue, region_bytes
from ..vhost.memory_table import MemoryTable, map_shared
from .live_device import fence, run_device
from .loop import LiveLoop

__all__ = ["VhostServer"]

Steps = Generator[Any, int, Any]
_PATIENCE_S = 5.0
"""How long a front-end may leave a message half sent or an answer unread."""
_AT_ONCE = 16
"""Messages taken before the rest of the loop has its turn."""
_LATER = object()
_ONE = b"\1\0\0\0\0\0\0\0"


class VhostServer:
    """Serves ``device`` over ``store`` on a listening socket.  ``turn`` until ``stopped``, then ``close``; one thread.

    ``log`` takes one line for each connection that begins or ends.  ``poll_us`` looks for work that long before sleeping.
    """

    def __init__(
        self,
        device: VirtioBlkDevice,
        engine: Any,
        store: Store,
        listener: socket.socket,
        *,
        poll_us: float = 0,
        trace: bool = False,
        path: str = "auto",
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.device, self.engine, self.store = device, engine, store
        device.num_queues = device.num_queues or 1
        device.in_order = device.ring_reset = device.notification_data = False
        self.log = log
        self.stopped = False
        self.loop = LiveLoop("device:epoll_wait", trace=trace, first_number=1000)
        self.loop.spin_ns = int(poll_us * 1000)
        self._listener = listener
        self._session: _Session | None = None
        self._leaving = False  # a connection ended and the device still works for it
        self.counts = dict.fromkeys(("connections", "kicks", "notifies", "requests", "queue errors"), 0)
        run_device(self.loop, device, engine, store, self._notify)
        device.on_reset_done = self._reset_done
        device.on_needs_reset = self._broken
        device.on_config_changed = self._config_changed
        self._explanation = self._choose_path(path, trace)
        listener.setblocking(False)
        self.loop.watch(listener.fileno(), self._accept)

    def _choose_path(self, path: str, trace: bool) -> list[str]:
        if trace:
            return ["plain path: trace points are recorded"]
        if path == "plain":
            return ["plain path: asked for"]
        self.device.batch_path(self._call, fast="auto" if path == "auto" else "off")
        return self.device.explain()

    # -- running -----------------------------------------------------------------------------------------------------------------

    def turn(self, timeout_s: float = 1.0) -> None:
        """Run what is ready, sleep at most ``timeout_s`` if nothing is."""
        session = self._session
        polled = session is not None and session.polled
        self.loop.spin = self._look if session is not None and (polled or self.loop.spin_ns) else None
        self.loop.turn(0.0 if polled else timeout_s)
        if session is not None and session is self._session:
            session.look()

    def _look(self) -> bool:
        """Look at the rings; if there is nothing, a driver that waits for this CPU is to have it."""
        found = self.device.poll_queues()
        if not found:
            os.sched_yield()
        return found

    def stop(self) -> None:
        """End after this turn."""
        self.stopped = True

    def close(self) -> None:
        """End the connection and give everything back."""
        if self._session is not None:
            self._session.close()
            self._session = None
        self.loop.close()
        self._listener.close()
        self.engine.close()
        self.store.close()

    def resize(self, size: int) -> None:
        """Another size for the disk, in bytes; the guest is told (§5.2.4)."""
        self.device.check_resize()
        self.store.resize(size)
        self.device.resize(size >> 9)

    def look_at_size(self) -> None:
        """The image may have grown or shrunk meanwhile: serve what it has now."""
        size = self.store.current_size()
        if size != self.store.size and self.device.zoned is None:
            self.log(f"the image has {size:,} bytes now")
            self.store.size = size
            self.device.resize(size >> 9)

    def explain(self) -> list[str]:
        """Which path the device's requests take, and why."""
        return list(self._explanation)

    def counters(self) -> dict[str, int]:
        """What was served so far."""
        if self._session is not None:
            self._session.count()
        return dict(self.counts)

    # -- one connection after another --------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        if self._session is not None or self._leaving:
            return
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        sock.setblocking(False)
        self.counts["connections"] += 1
        self.loop.unwatch(self._listener.fileno())  # one front-end at a time; the next waits in the backlog
        self._session = _Session(self, Channel(sock))
        self.log("a front-end connected")

    def over(self, reason: str) -> None:
        """The connection ended: let the device finish, then take the next one."""
        session, self._session = self._session, None
        if session is None:
            return
        self.log(f"the connection ended: {reason}")
        session.close()
        self._leaving = True
        self.device.reset()

    def _reset_done(self) -> None:
        if self._leaving:
            self._leaving = False
            self.loop.watch(self._listener.fileno(), self._accept)
        elif self._session is not None:
            self._session.reset_done()

    # -- what the device does ----------------------------------------------------------------------------------------------------

    def _notify(self, queue: int) -> Steps:
        """``virtio_notify()``: the call eventfd; what the front-end makes of it is not seen here."""
        yield ("virtio_notify_irqfd", queue)
        self._call(queue)
        yield ("kvm_set_irq", queue, 1)

    def _call(self, queue: int) -> None:
        """Write the call eventfd, if there is one."""
        self.counts["notifies"] += 1
        call = self._session.fds["call"].get(queue) if self._session is not None else None
        if call is not None:
            call.signal()

    def _broken(self, error: VirtioError) -> None:
        """The queues stop; their error eventfds say so, and DEVICE_NEEDS_RESET to a front-end that asks for the status."""
        self.counts["queue errors"] += 1
        self.log(f"the device stops its queues: {error}")
        if self._session is not None:
            self._session.broken()

    def _config_changed(self) -> None:
        if self._session is not None:
            self._session.config_changed()


class _Eventfd:
    """A file descriptor that the front-end gave for a notification.  Whether it blocks is in the front-end's hands: ask first."""

    def __init__(self, fd: int, event: int) -> None:
        self.fd = fd
        poll = select.poll()
        poll.register(fd, event)
        self._ready = poll.poll

    def signal(self) -> None:
        """Write it.  If its counter is full it is signalled; if it is no eventfd after all, nobody can be told."""
        try:
            if self._ready(0):
                os.write(self.fd, _ONE)
        except OSError:
            pass

    def take(self) -> bool:
        """Empty it; False if it is empty.  Raises OSError or EOFError if it is no eventfd and no pipe that somebody writes."""
        if not self._ready(0):
            return False
        if not os.read(self.fd, 8):
            raise EOFError
        return True

    def close(self) -> None:
        os.close(self.fd)


class _Session:
    """One connection: carries out what the back-end's state machine asks."""

    def __init__(self, server: VhostServer, channel: Channel) -> None:
        self.server = server
        self.device = server.device
        self.loop = server.loop
        self.channel = channel
        self.back_end = BackEnd(server.device)
        self.table = MemoryTable(fence)
        self.rings: dict[int, SplitDevice] = {}
        self.fds: dict[str, dict[int, _Eventfd]] = {"kick": {}, "call": {}, "err": {}}
        self._inflight: memoryview | None = None
        self._inflight_size = 0
        self._inflight_guard: Guard | None = None
        self._not_mapped: list[int] = []  # fds of a memory table that waits for the rings to stop
        self._own: Channel | None = None  # the back-end's own channel
        self._since: float | None = None  # when the front-end last owed us something
        self._counted: dict[int, int] = {}
        self._closed = False
        self._watching = False
        self._watch(True)

    @property
    def polled(self) -> bool:
        """Whether a ring has no kick eventfd and must be looked at."""
        return any(ring not in self.fds["kick"] for ring in self.rings)

    # -- the socket --------------------------------------------------------------------------------------------------------------

    def _watch(self, on: bool) -> None:
        """Read the next message only when the one before is dealt with."""
        if on and not self._watching:
            self.loop.watch(self.channel.fileno(), self._readable)
        elif self._watching and not on:
            self.loop.unwatch(self.channel.fileno())
        self._watching = on

    def _readable(self) -> None:
        try:
            for _ in range(_AT_ONCE):
                if self._closed or self.back_end.busy:
                    return
                if not self.channel.flush():
                    self._watch(False)  # it reads nothing, so nothing more of it is read
                    return
                message = self.channel.receive()
                if message is None:
                    return
                self._carry_out(self.back_end.take, message)
        except Closed as end:
            self.server.over(end.what)
        except (VhostUserError, VirtioError, OSError) as error:
            self._refuse(error)

    def _carry_out(self, go: Callable[[Any], Effect | None], argument: Any) -> None:
        """Effects until the message is dealt with or one of them takes its time."""
        back_end = self.back_end
        effect = go(argument)
        while effect is not None:
            result = self._apply(effect)
            if result is _LATER:
                self._watch(False)
                return
            effect = back_end.answer(result)
        self._flush()

    def _resume(self, result: Any) -> None:
        """An effect that took its time is done."""
        try:
            self._carry_out(self.back_end.answer, result)
        except (VhostUserError, VirtioError, OSError) as error:
            self._refuse(error)
            return
        if not self.back_end.busy and not self._closed:
            self._watch(True)

    def _flush(self) -> None:
        back_end = self.back_end
        close_all(back_end.discarded)
        back_end.discarded.clear()
        while back_end.outgoing:
            self.channel.send(back_end.outgoing.pop(0), close=True)

    def _refuse(self, error: Exception) -> None:
        """A message that cannot be carried out: answer it if an answer is awaited, then end the connection."""
        self.back_end.refused()
        try:
            self._flush()
        except VhostUserError:
            pass
        self.server.over(str(error))

    def look(self) -> None:
        """Once a turn: a front-end that owes us something for too long, or took its memory away."""
        if self._closed:
            return
        self.count()
        gone = "memory" if self.table.broken else "in-flight" if self._inflight_guard is not None and self._inflight_guard.broken else ""
        if gone:
            self.server.over(f"the front-end's {gone} file shrank under its mapping")
            return
        try:
            if self.channel.unsent and self.channel.flush() and not self.back_end.busy:
                self._watch(True)
            if self._own is not None and self._own.unsent:
                self._own.flush()
        except VhostUserError as error:
            self.server.over(str(error))
            return
        if not (self.channel.unsent or self.channel.decoder.partial):
            self._since = None
            return
        now = time.monotonic()
        self._since = self._since or now
        if now - self._since > _PATIENCE_S:
            self.server.over(f"the front-end left a message half {'read' if self.channel.unsent else 'sent'} for {_PATIENCE_S:g} s")

    # -- effects -----------------------------------------------------------------------------------------------------------------

    def _apply(self, effect: Effect) -> Any:
        match effect:
            case SetNotifier():
                self._set_notifier(effect)
            case SetFeatures():
                self.device.negotiated(effect.features)
            case SetMemory():
                return self._set_memory(effect)
            case StartRing():
                self._start_ring(effect.ring)
            case StopRing():
                return self._stop_ring(effect.ring)
            case WriteConfig():
                self.device.write_config(effect.offset, effect.data)
            case AnswerInflight():
                return self._answer_inflight(effect)
            case SetInflight():
                try:
                    what = f"in-flight region of {effect.size} bytes"
                    self._inflight, self._inflight_guard = map_shared(effect.fd, effect.size, effect.offset, what)
                finally:
                    os.close(effect.fd)
                self._inflight_size = effect.queue_size
            case SetChannel():
                self._set_channel(effect.fd)
            case ResetDevice():
                self.device.reset()
                return _LATER
        return None

    def reset_done(self) -> None:
        """The device let go of everything after RESET_DEVICE or Status 0."""
        self._resume(None)

    def _set_notifier(self, effect: SetNotifier) -> None:
        fds = self.fds[effect.which]
        old = fds.pop(effect.ring, None)
        if old is not None:
            if effect.which == "kick":
                self.loop.unwatch(old.fd)
            old.close()
        if effect.fd is not None:
            kick = effect.which == "kick"
            fds[effect.ring] = _Eventfd(effect.fd, select.POLLIN if kick else select.POLLOUT)
            try:
                if kick:
                    self.loop.watch(effect.fd, lambda: self._kick(effect.ring))
            except OSError as error:  # a file that cannot be polled
                raise VhostUserError(f"the kick file descriptor of ring {effect.ring} cannot be used: {error.strerror}") from None

    def _kick(self, ring: int) -> None:
        try:
            if not self.fds["kick"][ring].take():
                return
        except EOFError:
            self._refuse(VhostUserError(f"the kick file descriptor of ring {ring} was closed by the other end"))
            return
        except OSError as error:
            self._refuse(VhostUserError(f"the kick file descriptor of ring {ring} cannot be used: {error.strerror}"))
            return
        self.server.counts["kicks"] += 1
        if ring in self.rings:
            self.device.kick(ring)

    def _start_ring(self, number: int) -> None:
        vring = self.back_end.vrings[number]
        memory, gpa = self.table.memory, self.table.gpa
        if memory is None:
            raise VhostUserError(f"ring {number} runs without a memory table")
        features = self.back_end.features
        size = vring.size
        packed = features & Feature.RING_PACKED
        lengths = PackedLayout(size, 0, 0, 0).areas() if packed else SplitLayout(size, 0, 0, 0).areas()
        try:
            desc, avail, used = (gpa(at, area[1]) for at, area in zip((vring.desc, vring.avail, vring.used), lengths, strict=True))
        except BadAddress as error:
            raise VhostUserError(f"ring {number} lies outside the memory table: {error.what}") from None
        options: dict[str, Any] = dict(
            number=number,
            event_idx=bool(features & Feature.EVENT_IDX),
            indirect=bool(features & Feature.INDIRECT_DESC),
            chain_max=self.device.chain_max,
        )
        if packed:
            self._add_ring(number, PackedDevice(memory, PackedLayout(size, desc, avail, used), **options, state=vring.base))
            return
        layout = SplitLayout(size, desc, avail, used)
        (used_idx,) = struct.unpack("<H", memory.read(layout.used + 2, 2))
        inflight, heads, base = None, [], vring.base
        if self._inflight is not None:
            if size > self._inflight_size:
                raise VhostUserError(f"ring {number} of {size} entries is larger than the in-flight region's {self._inflight_size}")
            inflight = InflightQueue(self._inflight, number, self._inflight_size)
            heads = inflight.recover(used_idx)
            base = (used_idx + len(heads)) & 0xFFFF
        ring = SplitDevice(memory, layout, **options, last_avail_idx=base, used_idx=used_idx, inflight=inflight)
        self._add_ring(number, ring, heads)

    def _add_ring(self, number: int, ring: Any, resubmit: list[int] | None = None) -> None:
        self.rings[number] = ring
        self._counted[number] = ring.completed
        self.device.start_queue(number, ring, resubmit=resubmit or ())

    def _stop_ring(self, number: int) -> Any:
        ring = self.rings[number]

        def stopped() -> None:
            if self._closed:
                return
            self.count()
            del self.rings[number]
            self._resume(ring.state)

        self.device.stop_queue(number, stopped)
        return _LATER

    def _set_memory(self, effect: SetMemory) -> Any:
        """Rings that run are stopped, and go on where they stood in the new memory."""
        running = list(self.rings)
        if not running:
            self.table.set(effect.regions)
            return None
        left = set(running)
        self._not_mapped = [region.fd for region in effect.regions if region.fd >= 0]

        def stopped(number: int) -> None:
            if self._closed:
                return
            self.count()
            self.back_end.vrings[number].base = self.rings.pop(number).state
            left.discard(number)
            if left:
                return
            self._not_mapped = []
            try:
                self.table.set(effect.regions)
                for one in running:
                    self._start_ring(one)
            except VblkError as error:
                self._refuse(error)
                return
            self._resume(None)

        for number in running:
            self.device.stop_queue(number, lambda number=number: stopped(number))  # type: ignore[misc]
        return _LATER

    def _answer_inflight(self, effect: AnswerInflight) -> tuple[int, int, int]:
        length = region_bytes(effect.queues, effect.queue_size)
        fd = os.memfd_create("vblklab-inflight")
        os.ftruncate(fd, length)
        return fd, length, 0

    # -- the back-end's own channel ----------------------------------------------------------------------------------------------

    def _set_channel(self, fd: int) -> None:
        self._close_own()
        try:
            sock = socket.socket(fileno=fd)
        except OSError as error:
            os.close(fd)
            raise VhostUserError(f"SET_BACKEND_REQ_FD gives no socket: {error.strerror}") from None
        sock.setblocking(False)
        self._own = Channel(sock)
        self.loop.watch(sock.fileno(), self._own_readable)

    def _own_readable(self) -> None:
        """Answers of the front-end on our channel."""
        assert self._own is not None
        try:
            for _ in range(_AT_ONCE):
                message = self._own.receive()
                if message is None:
                    return
                close_all(message.fds)
        except VhostUserError:
            self._close_own()

    def _close_own(self) -> None:
        if self._own is not None:
            self.loop.unwatch(self._own.fileno())
            self._own.close()
            self._own = None

    def config_changed(self) -> None:
        """CONFIG_CHANGE_MSG, where the front-end gave us a channel."""
        wanted = ProtocolFeature.BACKEND_REQ | ProtocolFeature.CONFIG
        if self._own is None or self.back_end.protocol & wanted != wanted:
            self.server.log("the configuration changed and this front-end cannot be told: it gave the back-end no channel")
            return
        try:
            if not self._own.unsent:  # else it has not read of the change before: one tells of both
                self._own.send(Message(BackendReq.CONFIG_CHANGE_MSG))
        except VhostUserError as error:
            self.server.log(f"the configuration changed and the front-end could not be told: {error}")

    def broken(self) -> None:
        """The device found a ring that breaks the specification."""
        self.back_end.status |= Status.NEEDS_RESET
        for eventfd in self.fds["err"].values():
            eventfd.signal()

    # -- the end -----------------------------------------------------------------------------------------------------------------

    def count(self) -> None:
        """Add what the used rings moved since the last count."""
        for number, ring in self.rings.items():
            self.server.counts["requests"] += (ring.completed - self._counted[number]) & 0xFFFF
            self._counted[number] = ring.completed

    def close(self) -> None:
        """Close every descriptor of this connection."""
        self.count()
        self._closed = True
        self._watch(False)
        self.channel.close()
        close_all(self.back_end.discarded)
        close_all(self._not_mapped)
        self._close_own()
        for which, fds in self.fds.items():
            for eventfd in fds.values():
                if which == "kick":
                    self.loop.unwatch(eventfd.fd)
                eventfd.close()
            fds.clear()
        self.rings.clear()
