"""The back-end's half of a vhost-user connection, as a state machine without a socket.

``take(message)`` begins a message and ``answer(result)`` goes on with it; both return the next event that the owner has to carry
out, or None when the message is dealt with.  Replies are left in ``outgoing``; who sends them closes their file descriptors.  A
VhostUserError out of either ends the connection; ``refused`` says what the front-end is told of it first.

Source: QEMU's docs/interop/vhost-user.rst; ring states are its section "Ring states".
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from ..errors import VhostUserError
from ..spec.vhost_user import (
    CONFIG_HEAD,
    F_PROTOCOL_FEATURES,
    INFLIGHT,
    INFLIGHT_PACKED,
    MAX_CONFIG,
    MAX_REGIONS,
    MAX_SLOTS,
    MEM_REGION,
    MEM_SINGLE_HEAD,
    MEM_TABLE_HEAD,
    U64,
    VRING_ADDR,
    VRING_IDX_MASK,
    VRING_NO_FD,
    VRING_STATE,
    FrontendReq,
    ProtocolFeature,
)
from ..spec.virtio import Feature, Status
from .codec import SPOKEN, Message, name_of
from .effects import (
    AnswerInflight,
    Effect,
    Region,
    ResetDevice,
    SetChannel,
    SetFeatures,
    SetInflight,
    SetMemory,
    SetNotifier,
    StartRing,
    StopRing,
    WriteConfig,
    check_regions,
)

__all__ = ["BackEnd", "ConfigDevice", "Vring"]


class ConfigDevice(Protocol):
    """What the connection itself asks of the device."""

    num_queues: int
    queue_size_max: int

    def features(self) -> int: ...

    def accepts(self, features: int) -> bool: ...

    def read_config(self) -> bytes: ...


@dataclass(slots=True)
class Vring:
    """What the front-end has said about one ring.  Addresses are the front-end's own."""

    size: int = 0
    base: int = 0
    desc: int = 0
    avail: int = 0
    used: int = 0
    placed: bool = False
    started: bool = False  # SET_VRING_KICK came
    enabled: bool = False
    running: bool = False


Handling = Generator[Effect, Any, "bytes | Message | None"]
"""Returns the answer's payload, or a whole answer if it has a file descriptor, or None if the message has no answer of its own."""


@dataclass(frozen=True, slots=True)
class _Rule:
    """How a message must look: payload bytes (None: the handler checks), fds, the protocol feature it belongs to."""

    handler: Callable[[BackEnd, Message], Handling]
    size: int | None = 0
    fds: tuple[int, ...] = (0,)
    needs: int = 0


class BackEnd:
    """One connection, from the first message to the last.

    ``outgoing`` are replies to send, whose file descriptors are to be closed once they are sent; ``discarded`` are file descriptors
    that nobody took.
    """

    extra_features = int(Feature.RING_RESET)

    def __init__(self, device: ConfigDevice) -> None:
        self.device = device
        self.vrings = [Vring() for _ in range(device.num_queues)]
        self.outgoing: list[Message] = []
        self.discarded: list[int] = []
        self.regions: tuple[Region, ...] = ()
        self.protocol = 0
        self.features = 0
        self.acked = False  # SET_FEATURES came
        self.status = 0
        self.seen: set[int] = set()  # requests that came, for the record
        self._handling: Handling | None = None
        self._message = Message(0)

    # -- the message in hand -----------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a message waits for an answer; the next one must wait."""
        return self._handling is not None

    def take(self, message: Message) -> Effect | None:
        """Begin a message; the first event, or None if there is nothing to carry out.  Raises VhostUserError."""
        assert self._handling is None
        self._message = message
        self.seen.add(message.request)
        try:
            rule = _RULES.get(message.request)
            if rule is None:
                if not (message.need_reply and self.protocol & ProtocolFeature.REPLY_ACK):
                    raise VhostUserError(f"{name_of(message.request)} is not a message this back-end knows")
                self.discarded += message.fds
                self._send(U64.pack(1))
                return None
            self._check(message, rule)
        except VhostUserError:
            self.discarded += message.fds
            raise
        self._handling = rule.handler(self, message)
        return self._go(None)

    def answer(self, result: Any = None) -> Effect | None:
        """Go on with the message after its event was carried out."""
        return self._go(result)

    def refused(self) -> None:
        """The message in hand failed and the connection will end: say so if the front-end waits for a reply."""
        self._handling = None
        if self._message.need_reply and self.protocol & ProtocolFeature.REPLY_ACK:
            self._send(U64.pack(1))

    def _go(self, result: Any) -> Effect | None:
        assert self._handling is not None
        try:
            return self._handling.send(result)
        except StopIteration as end:
            self._handling = None
            answer: bytes | Message | None = end.value
            if isinstance(answer, Message):
                self.outgoing.append(answer)
            elif answer is not None:
                self._send(answer)
            elif self._message.need_reply and self.protocol & ProtocolFeature.REPLY_ACK:
                self._send(U64.pack(0))
            return None

    def _send(self, payload: bytes, fds: tuple[int, ...] = ()) -> None:
        self.outgoing.append(Message(self._message.request, payload, fds, reply=True))

    def _check(self, message: Message, rule: _Rule) -> None:
        name = name_of(message.request)
        if message.reply:
            raise VhostUserError(f"{name} came with the reply flag from the front-end")
        if rule.needs and not self.protocol & rule.needs:
            raise VhostUserError(f"{name} without the protocol feature {ProtocolFeature(rule.needs).name}")
        if rule.size is not None and len(message.payload) != rule.size:
            raise VhostUserError(f"{name} has {len(message.payload)} bytes of payload, not {rule.size}")
        if len(message.fds) not in rule.fds:
            wanted = " or ".join(map(str, rule.fds)) if len(rule.fds) <= 2 else f"at most {rule.fds[-1]}"
            raise VhostUserError(f"{name} came with {len(message.fds)} file descriptors, not {wanted}")

    def _vring(self, number: int, message: Message) -> Vring:
        if number >= len(self.vrings):
            self.discarded += message.fds
            raise VhostUserError(f"{name_of(message.request)} names ring {number}, the device has {len(self.vrings)}")
        return self.vrings[number]

    # -- features ----------------------------------------------------------------------------------------------------------------

    def _get_features(self, message: Message) -> Handling:
        return U64.pack(self.device.features() | self.extra_features | F_PROTOCOL_FEATURES)
        yield

    def _set_features(self, message: Message) -> Handling:
        (bits,) = U64.unpack(message.payload)
        unknown = bits & ~(self.device.features() | self.extra_features | F_PROTOCOL_FEATURES)
        if unknown:
            raise VhostUserError(f"SET_FEATURES has bits that were not offered: {unknown:#x}")
        if any(vring.running for vring in self.vrings) and bits != self.features:
            raise VhostUserError(f"SET_FEATURES {bits:#x} while rings run with {self.features:#x}")
        if not self.device.accepts(bits & ~F_PROTOCOL_FEATURES):
            raise VhostUserError(f"the device does not work with the features {bits:#x}")
        self.features = bits
        self.acked = True
        yield SetFeatures(bits & ~F_PROTOCOL_FEATURES)
        for number in range(len(self.vrings)):
            yield from self._settle(number)  # without F_PROTOCOL_FEATURES rings are enabled
        return None

    @property
    def _spoken(self) -> int:
        """The protocol's features; the record of what is in flight is a split ring's."""
        packed = self.device.features() & Feature.RING_PACKED
        return int(SPOKEN & ~_P.INFLIGHT_SHMFD if packed else SPOKEN)

    def _get_protocol_features(self, message: Message) -> Handling:
        return U64.pack(self._spoken)
        yield

    def _set_protocol_features(self, message: Message) -> Handling:
        (bits,) = U64.unpack(message.payload)
        if bits & ~self._spoken:
            raise VhostUserError(f"SET_PROTOCOL_FEATURES has bits that were not offered: {bits & ~self._spoken:#x}")
        self.protocol = bits
        return None
        yield

    def _get_queue_num(self, message: Message) -> Handling:
        return U64.pack(len(self.vrings))
        yield

    def _set_owner(self, message: Message) -> Handling:
        return None
        yield

    # -- memory ------------------------------------------------------------------------------------------------------------------

    def _set_mem_table(self, message: Message) -> Handling:
        if len(message.payload) < MEM_TABLE_HEAD.size:
            self._refuse(message, f"SET_MEM_TABLE has {len(message.payload)} bytes of payload, fewer than its head")
        count, _ = MEM_TABLE_HEAD.unpack_from(message.payload)
        if not 1 <= count <= MAX_REGIONS:
            self._refuse(message, f"SET_MEM_TABLE has {count} regions, 1 to {MAX_REGIONS} are allowed")
        if len(message.payload) != MEM_TABLE_HEAD.size + count * MEM_REGION.size or len(message.fds) != count:
            what = f"{len(message.payload)} bytes and {len(message.fds)} file descriptors for {count} regions"
            self._refuse(message, f"SET_MEM_TABLE has {what}")
        regions = []
        for i, fd in enumerate(message.fds):
            gpa, size, user, offset = MEM_REGION.unpack_from(message.payload, MEM_TABLE_HEAD.size + i * MEM_REGION.size)
            regions.append(Region(gpa, size, user, offset, fd))
        yield from self._use_memory(tuple(regions), message)
        return None

    def _add_mem_reg(self, message: Message) -> Handling:
        gpa, size, user, offset = MEM_REGION.unpack_from(message.payload, MEM_SINGLE_HEAD.size)
        region = Region(gpa, size, user, offset, message.fds[0])
        if len(self.regions) >= MAX_SLOTS:
            self._refuse(message, f"ADD_MEM_REG beyond {MAX_SLOTS} regions")
        yield from self._use_memory((*self.regions, region), message)
        return None

    def _rem_mem_reg(self, message: Message) -> Handling:
        self.discarded += message.fds
        gone = MEM_REGION.unpack_from(message.payload, MEM_SINGLE_HEAD.size)[:3]
        left = tuple(region for region in self.regions if region.place != gone)
        if len(left) == len(self.regions):
            raise VhostUserError(f"REM_MEM_REG of a region that is not there: {gone[0]:#x}+{gone[1]:#x}")
        yield from self._use_memory(left, message)
        return None

    def _use_memory(self, regions: tuple[Region, ...], message: Message) -> Handling:
        try:
            check_regions(regions)
        except VhostUserError:
            if message.request != FrontendReq.REM_MEM_REG:
                self.discarded += message.fds
            raise
        yield SetMemory(regions)
        self.regions = tuple(Region(r.gpa, r.size, r.user, r.offset, -1) for r in regions)
        return None

    def _get_max_mem_slots(self, message: Message) -> Handling:
        return U64.pack(MAX_SLOTS)
        yield

    def _refuse(self, message: Message, why: str) -> NoReturn:
        self.discarded += message.fds
        raise VhostUserError(why)

    # -- rings -------------------------------------------------------------------------------------------------------------------

    def _stopped_vring(self, number: int, message: Message) -> Vring:
        vring = self._vring(number, message)
        if vring.running:
            raise VhostUserError(f"{name_of(message.request)} while ring {number} runs")
        return vring

    def _set_vring_num(self, message: Message) -> Handling:
        number, size = VRING_STATE.unpack(message.payload)
        vring = self._stopped_vring(number, message)
        most = self.device.queue_size_max
        if not 1 <= size <= most or (size & (size - 1) and not self.features & Feature.RING_PACKED):
            raise VhostUserError(f"SET_VRING_NUM gives ring {number} {size} entries, a power of two up to {most} is needed")
        vring.size = size
        return None
        yield

    def _set_vring_addr(self, message: Message) -> Handling:
        number, _, desc, used, avail, _ = VRING_ADDR.unpack(message.payload)
        vring = self._vring(number, message)
        if vring.running and (desc, used, avail) != (vring.desc, vring.used, vring.avail):
            raise VhostUserError(f"SET_VRING_ADDR moves ring {number} while it runs")
        vring.desc, vring.used, vring.avail, vring.placed = desc, used, avail, True
        return None
        yield

    def _set_vring_base(self, message: Message) -> Handling:
        number, base = VRING_STATE.unpack(message.payload)
        vring = self._stopped_vring(number, message)
        if base > 0xFFFF and not self.features & Feature.RING_PACKED:
            raise VhostUserError(f"SET_VRING_BASE gives ring {number} the index {base:#x}, a split ring has 16 bits")
        vring.base = base
        return None
        yield

    def _get_vring_base(self, message: Message) -> Handling:
        number, _ = VRING_STATE.unpack(message.payload)
        vring = self._vring(number, message)
        vring.started = False
        yield from self._settle(number)
        for which in ("kick", "call"):
            yield SetNotifier(which, number, None)
        return VRING_STATE.pack(number, vring.base)

    def _set_notifier(self, message: Message) -> Handling:
        which = {FrontendReq.SET_VRING_KICK: "kick", FrontendReq.SET_VRING_CALL: "call"}.get(FrontendReq(message.request), "err")
        (value,) = U64.unpack(message.payload)
        number, no_fd = value & VRING_IDX_MASK, bool(value & VRING_NO_FD)
        vring = self._vring(number, message)
        if len(message.fds) != (not no_fd):
            self._refuse(message, f"{name_of(message.request)} with {len(message.fds)} file descriptors and flags {value & ~0xFF:#x}")
        yield SetNotifier(which, number, None if no_fd else message.fds[0])
        if which == "kick":
            vring.started = True
            yield from self._settle(number)
        return None

    def _set_vring_enable(self, message: Message) -> Handling:
        number, enable = VRING_STATE.unpack(message.payload)
        vring = self._vring(number, message)
        if not self.features & F_PROTOCOL_FEATURES:
            raise VhostUserError("SET_VRING_ENABLE without VHOST_USER_F_PROTOCOL_FEATURES")
        if enable > 1:
            raise VhostUserError(f"SET_VRING_ENABLE with {enable}, 0 or 1 is needed")
        vring.enabled = bool(enable)
        yield from self._settle(number)
        return None

    def _settle(self, number: int) -> Handling:
        """Start or stop a ring as its state asks.  Without protocol features a ring is enabled from the start."""
        vring = self.vrings[number]
        run = vring.started and (vring.enabled or not self.features & F_PROTOCOL_FEATURES)
        if run and not vring.running:
            self._ready(number, vring)
            yield StartRing(number)
            vring.running = True
        elif vring.running and not run:
            vring.base = yield StopRing(number)
            vring.running = False
        return None

    def _ready(self, number: int, vring: Vring) -> None:
        """Whether all was said that a ring needs to run."""
        missing = [
            name
            for name, there in (
                ("SET_FEATURES", self.acked),
                ("a memory table", bool(self.regions)),
                ("SET_VRING_NUM", vring.size),
                ("SET_VRING_ADDR", vring.placed),
            )
            if not there
        ]
        if missing:
            raise VhostUserError(f"ring {number} is started without {' and '.join(missing)}")
        if not self.features & Feature.VERSION_1:
            raise VhostUserError(f"ring {number} is started without VIRTIO_F_VERSION_1", "this device has no legacy interface")

    def _stop_all(self) -> Handling:
        for number, vring in enumerate(self.vrings):
            vring.started = vring.enabled = False
            yield from self._settle(number)
        return None

    # -- the rest ----------------------------------------------------------------------------------------------------------------

    def _get_config(self, message: Message) -> Handling:
        try:
            offset, size, _ = self._config(message)
        except VhostUserError:
            return b""  # this message has its own way to say no
        config = self.device.read_config().ljust(MAX_CONFIG, b"\0")
        return CONFIG_HEAD.pack(offset, size, 0) + config[offset : offset + size]
        yield

    def _set_config(self, message: Message) -> Handling:
        offset, _, data = self._config(message)
        yield WriteConfig(offset, data)
        return None

    def _config(self, message: Message) -> tuple[int, int, bytes]:
        name = name_of(message.request)
        if len(message.payload) < CONFIG_HEAD.size:
            raise VhostUserError(f"{name} has {len(message.payload)} bytes of payload, fewer than its head")
        offset, size, _ = CONFIG_HEAD.unpack_from(message.payload)
        data = message.payload[CONFIG_HEAD.size :]
        if offset + size > MAX_CONFIG or len(data) != size:
            raise VhostUserError(f"{name} of {size} bytes at {offset} with {len(data)} bytes of data, space is {MAX_CONFIG} bytes")
        return offset, size, data

    def _set_backend_req_fd(self, message: Message) -> Handling:
        yield SetChannel(message.fds[0])
        return None

    def _inflight(self, message: Message) -> tuple[int, int, int, int]:
        """(bytes, offset, queues, queue size), padded as QEMU sends it or packed."""
        for form in (INFLIGHT, INFLIGHT_PACKED):
            if len(message.payload) == form.size:
                length, offset, queues, size = form.unpack(message.payload)
                return length, offset, queues, size
        return self._refuse(message, f"{name_of(message.request)} has {len(message.payload)} bytes of payload, not {INFLIGHT.size}")

    def _get_inflight_fd(self, message: Message) -> Handling:
        _, _, queues, size = self._inflight(message)
        if not 1 <= queues <= len(self.vrings) or not 1 <= size <= self.device.queue_size_max:
            raise VhostUserError(f"GET_INFLIGHT_FD for {queues} rings of {size} entries, the device has {len(self.vrings)}")
        fd, length, offset = yield AnswerInflight(queues, size)
        form = INFLIGHT if len(message.payload) == INFLIGHT.size else INFLIGHT_PACKED
        return Message(message.request, form.pack(length, offset, queues, size), (fd,), reply=True)

    def _set_inflight_fd(self, message: Message) -> Handling:
        length, offset, queues, size = self._inflight(message)
        if not 1 <= queues <= len(self.vrings) or not 1 <= size <= self.device.queue_size_max or any(v.running for v in self.vrings):
            self._refuse(message, f"SET_INFLIGHT_FD for {queues} rings of {size} entries, the device has {len(self.vrings)}, stopped")
        yield SetInflight(message.fds[0], length, offset, queues, size)
        return None

    def _reset_owner(self, message: Message) -> Handling:
        yield from self._stop_all()
        return None

    def _reset_device(self, message: Message) -> Handling:
        yield from self._reset()
        return None

    def _reset(self) -> Handling:
        """The device's initial state: features are to be set again.  What belongs to the connection stays."""
        yield from self._stop_all()
        self.status = 0
        self.acked = False
        self.features &= F_PROTOCOL_FEATURES
        yield ResetDevice()
        return None

    def _set_status(self, message: Message) -> Handling:
        (status,) = U64.unpack(message.payload)
        if status > 0xFF:
            raise VhostUserError(f"SET_STATUS {status:#x}, a device status has 8 bits")
        if not status:
            yield from self._reset()
        elif status & Status.FEATURES_OK and not (self.acked and self.features & Feature.VERSION_1):
            status &= ~Status.FEATURES_OK
        self.status = status
        return None

    def _get_status(self, message: Message) -> Handling:
        return U64.pack(self.status)
        yield


_B, _P, _R = BackEnd, ProtocolFeature, _Rule
_RULES: dict[int, _Rule] = {
    FrontendReq.GET_FEATURES: _R(_B._get_features),
    FrontendReq.SET_FEATURES: _R(_B._set_features, U64.size),
    FrontendReq.SET_OWNER: _R(_B._set_owner),
    FrontendReq.RESET_OWNER: _R(_B._reset_owner),
    FrontendReq.SET_MEM_TABLE: _R(_B._set_mem_table, None, tuple(range(MAX_REGIONS + 1))),
    FrontendReq.SET_VRING_NUM: _R(_B._set_vring_num, VRING_STATE.size),
    FrontendReq.SET_VRING_ADDR: _R(_B._set_vring_addr, VRING_ADDR.size),
    FrontendReq.SET_VRING_BASE: _R(_B._set_vring_base, VRING_STATE.size),
    FrontendReq.GET_VRING_BASE: _R(_B._get_vring_base, VRING_STATE.size),
    FrontendReq.SET_VRING_KICK: _R(_B._set_notifier, U64.size, (0, 1)),
    FrontendReq.SET_VRING_CALL: _R(_B._set_notifier, U64.size, (0, 1)),
    FrontendReq.SET_VRING_ERR: _R(_B._set_notifier, U64.size, (0, 1)),
    FrontendReq.GET_PROTOCOL_FEATURES: _R(_B._get_protocol_features),
    FrontendReq.SET_PROTOCOL_FEATURES: _R(_B._set_protocol_features, U64.size),
    FrontendReq.GET_QUEUE_NUM: _R(_B._get_queue_num, needs=_P.MQ),
    FrontendReq.SET_VRING_ENABLE: _R(_B._set_vring_enable, VRING_STATE.size),
    FrontendReq.SET_BACKEND_REQ_FD: _R(_B._set_backend_req_fd, fds=(1,), needs=_P.BACKEND_REQ),
    FrontendReq.GET_CONFIG: _R(_B._get_config, None, needs=_P.CONFIG),
    FrontendReq.SET_CONFIG: _R(_B._set_config, None, needs=_P.CONFIG),
    FrontendReq.GET_INFLIGHT_FD: _R(_B._get_inflight_fd, None, needs=_P.INFLIGHT_SHMFD),
    FrontendReq.SET_INFLIGHT_FD: _R(_B._set_inflight_fd, None, (1,), needs=_P.INFLIGHT_SHMFD),
    FrontendReq.RESET_DEVICE: _R(_B._reset_device, needs=_P.RESET_DEVICE),
    FrontendReq.GET_MAX_MEM_SLOTS: _R(_B._get_max_mem_slots, needs=_P.CONFIGURE_MEM_SLOTS),
    FrontendReq.ADD_MEM_REG: _R(_B._add_mem_reg, MEM_SINGLE_HEAD.size + MEM_REGION.size, (1,), needs=_P.CONFIGURE_MEM_SLOTS),
    FrontendReq.REM_MEM_REG: _R(_B._rem_mem_reg, MEM_SINGLE_HEAD.size + MEM_REGION.size, (0, 1), needs=_P.CONFIGURE_MEM_SLOTS),
    FrontendReq.SET_STATUS: _R(_B._set_status, U64.size, needs=_P.STATUS),
    FrontendReq.GET_STATUS: _R(_B._get_status, needs=_P.STATUS),
}
