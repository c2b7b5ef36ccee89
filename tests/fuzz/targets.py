"""Rings and registers as a driver or a device gone mad may leave them, each from a string of bytes.

``TARGETS[name](data)`` plays one input.  Whatever the bytes are, the package may refuse with its typed errors and nothing else, comes to
an end within a second of processor time, and leaves what lies around guest memory alone.  ``data`` says first which system it is, then
what is done to it; so a coverage-guided fuzzer finds its way, and random bytes do too.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import vblklab as vb
from tests.support import WRITE, Board, Trampoline
from tests.transport.pci_board import WINDOWS, PciBoard, place
from vblklab.device import VirtioBlkDevice
from vblklab.disk.store import RamStore
from vblklab.engine import Sync
from vblklab.engine.compiled import compiled_missing
from vblklab.memory import GuestMemory, GuestPages
from vblklab.ring import PackedDevice, PackedDriver, SplitDevice, SplitDriver
from vblklab.spec.virtio import Feature

__all__ = ["TARGETS", "Hang", "Tape", "allowed_cpu"]

GUARD, MEMORY, DISK = 1 << 12, 1 << 15, 1 << 13
_GUARD = b"\xc5" * GUARD
RINGS, REQUESTS = 0x1000, 0x4000
"""Where rings with their tables and the bytes of requests lie."""
_FIELDS = [(0, 8), (8, 4), (8, 4), (12, 2), (12, 2), (12, 2), (14, 2), (14, 2)]
"""Of a descriptor: offset, bytes."""
_EDGES = [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 48, 127, 128, 255, 511, 512, 513, MEMORY - 1, MEMORY, 0x7FFF, 0x8000, 0xFFFF]
_EDGES += [1 << 31, (1 << 32) - 16, (1 << 32) - 1, 1 << 55, (1 << 63) - 1, 1 << 63, (1 << 64) - 512, (1 << 64) - 1]
_KINDS = [0, 1, 0, 1, 4, 8, 10, 11, 13, 14, 15, 16, 18, 20, 22, 24, 26, 77]


class Hang(BaseException):
    """One input took more than a second of processor time."""


@contextmanager
def allowed_cpu(seconds: float = 1.0) -> Iterator[None]:
    """Raise Hang after so much time of this process's own, however busy the machine is."""

    def late(*_: Any) -> None:
        raise Hang(f"still at it after {seconds:g} s of processor time")

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


class Tape:
    """The bytes of an input as choices; behind its end everything is 0."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def ended(self) -> bool:
        return self._at >= len(self._data)

    def number(self, size: int = 1) -> int:
        """A number of ``size`` bytes."""
        self._at += size
        return int.from_bytes(self._data[self._at - size : self._at], "little")

    def below(self, limit: int) -> int:
        return self.number(1 + (limit > 256)) % limit

    def of(self, choices: Any) -> Any:
        return choices[self.below(len(choices))]

    def value(self) -> int:
        """A number that something may go wrong with: small, an edge, or any."""
        how = self.number()
        if how < 96:
            return how % 24
        return int(_EDGES[how % len(_EDGES)]) if how < 224 else self.number(8)


class Guarded:
    """Guest memory in one region or in two with a hole between them, inside a buffer whose other bytes must stay."""

    def __init__(self, base: int, hole: int) -> None:
        self._whole = bytearray(_GUARD + bytes(MEMORY) + _GUARD)
        inside = memoryview(self._whole)[GUARD:-GUARD]
        cut = REQUESTS + 0x1000
        regions = [(base, inside[:cut]), (base + cut + hole, inside[cut:])] if hole else [(base, inside)]
        self.memory = GuestMemory.of_regions(regions)
        self.inside = inside

    def check(self) -> None:
        """Nobody wrote outside."""
        assert self._whole[:GUARD] == _GUARD and self._whole[-GUARD:] == _GUARD, "bytes outside guest memory were written"


# -- a device and a ring that its driver spoils ---------------------------------------------------------------------------------


def _device(features: int, zones: int) -> VirtioBlkDevice:
    options: dict[str, Any] = dict(seg_max=6, max_discard_seg=2, secure_erase=True, lifetime=(1, 2, 3))
    if zones:
        options["zones"] = vb.Zones(zone_sectors=4, conventional=1, model="host-managed" if zones == 1 else "host-aware")
    return VirtioBlkDevice(in_order=bool(features & Feature.IN_ORDER), packed=bool(features & Feature.RING_PACKED), **options)


class Bench:
    """A virtio-blk device over one ring, whose driver half is the package's own: it lays good requests, which are then spoilt."""

    def __init__(self, tape: Tape, path: str = "plain") -> None:
        bits = tape.number()
        packed, in_order = bool(bits & 1) and path == "plain", bool(bits & 2) and path == "plain"
        features = int(Feature.VERSION_1 | vb.VirtioBlkDriver.FEATURES) & ~int(Feature.EVENT_IDX | Feature.IN_ORDER)
        features |= Feature.EVENT_IDX * bool(bits & 4) | Feature.IN_ORDER * in_order | Feature.RING_PACKED * packed
        base = 1 << 32 if bits & 16 else 0
        self.guest = Guarded(base, 0x10000 if bits & 32 and path == "plain" else 0)
        memory, size = self.guest.memory, tape.of([8, 4, 2, 16] if not packed else [8, 5, 3, 16])
        self.base, self.memory = base, memory
        common: dict[str, Any] = dict(event_idx=bool(bits & 4), in_order=in_order)
        half: Any = PackedDriver if packed else SplitDriver
        self.driver = half.alloc(GuestPages(memory, base + RINGS), size, **common, indirect_segments=8 if bits & 8 else 0)
        device = self.device = _device(features, bits >> 6 if path == "plain" else 0)
        self.store = RamStore(DISK)
        engine = Sync()
        self.machine = Trampoline(device.run())
        engine.attach(None, self.store, self.machine.notify)
        device.attach(engine, DISK >> 9, read_only=False, notify=self._notify, wake=self.machine.notify)
        if path != "plain":
            device.batch_path(lambda queue: None, fast=path)
            assert device.explain()[0].startswith("batch path"), device.explain()
        self.ring: Any = (PackedDevice if packed else SplitDevice)(
            memory, self.driver.layout, **common, indirect=True, chain_max=device.chain_max
        )
        if not packed:
            self._start_at(tape.of([0, 65535, 65530, 32767]))
        device.start(features, {0: self.ring})
        self.machine.run()

    def _notify(self, queue: int) -> Any:
        yield ("virtio_notify", queue)

    def _start_at(self, idx: int) -> None:
        for half in (self.driver, self.ring):
            for name in vars(half):
                if name.endswith("_idx") and name != "event_idx":
                    setattr(half, name, idx)
        self.driver._avail[1] = self.driver._used16[1] = idx

    def lay(self, tape: Tape, number: int) -> None:
        """One request of any kind and framing, published or not."""
        at = self.base + REQUESTS + 0x200 * number
        kind, sector, pieces = tape.of(_KINDS), tape.below(20), tape.below(4)
        self.memory.write(at, kind.to_bytes(4, "little") + bytes(4) + sector.to_bytes(8, "little"))
        length = tape.of([512, 8, 16, 20, 64, 300])
        data = [(at + 32 + 16 * i, length) for i in range(pieces)]
        writes = kind in (0, 8, 10, 15, 16)
        try:
            self.driver.add_sgs([(at, 16)] + ([] if writes else data), (data if writes else []) + [(at + 16, 1)], number)
        except (vb.QueueFull, vb.ConfigError):
            return
        self.driver.publish()

    def spoil(self, tape: Tape) -> None:
        """Change a field of a descriptor, in the ring or in a table, or some bytes of a ring, a request, or of anything."""
        layout, where = self.driver.layout, tape.below(8)
        if where < 4:
            slot, (offset, size) = tape.below(layout.size), tape.of(_FIELDS)
            if where < 2 or not self.driver.indirect_segments:
                gpa = layout.desc + 16 * slot
            else:
                gpa = self.driver._tables + 128 * slot + 16 * tape.below(4)
        else:
            start, length = [*layout.areas()[1:], (self.base + REQUESTS, 0x800), (self.base + RINGS, MEMORY - RINGS)][where - 4]
            gpa, size = start, tape.of([1, 2, 4, 8])
            offset = tape.below(max(1, length - size + 1)) // size * size
        value = tape.value() & (1 << 8 * size) - 1
        try:
            self.memory.write(gpa + offset, value.to_bytes(size, "little"))
        except vb.BadAddress:
            pass  # over the edge of a region

    def play(self, tape: Tape) -> None:
        """Rounds of requests, mischief, kicks and completions, as long as the bytes last."""
        for _ in range(6):
            for number in range(1 + tape.below(4)):
                self.lay(tape, number)
            for _ in range(tape.below(5)):
                self.spoil(tape)
            self.device.kick(0)
            self.machine.run(20_000)
            try:
                while self.driver.get_buf() is not None:
                    pass
            except vb.VirtioError:
                return
            if tape.ended or self.device.broken is not None:
                return


def _bench(path: str) -> Callable[[bytes], None]:
    def play(data: bytes) -> None:
        tape = Tape(data)
        bench = Bench(tape, path)
        bench.play(tape)
        bench.guest.check()
        assert 0 <= bench.ring.in_flight <= bench.ring.size
        error = bench.device.broken
        assert error is None or isinstance(error, vb.VirtioError)

    return play


# -- a driver's half and a device that lies -----------------------------------------------------------------------------------


def used(data: bytes) -> None:
    """A device gone mad: it uses some buffers, and anything in the areas that it may write, or in all, is changed."""
    tape = Tape(data)
    bench = Bench(tape)
    driver, ring = bench.driver, bench.ring
    out: set[int] = set()
    free = list(range(8))
    for _ in range(40):
        if tape.ended:
            break
        match tape.below(6):
            case 0 | 1 if free:
                at = bench.base + REQUESTS + 0x100 * free[-1]
                try:
                    driver.add_sgs([(at, 16)], [(at + 16, 1 + tape.below(64))] * (1 + tape.below(2)), free[-1])
                except (vb.QueueFull, vb.ConfigError):
                    continue
                out.add(free.pop())
                driver.publish()
                driver.kick_prepare()
            case 2:
                try:
                    if (chain := ring.pop()) is not None:
                        ring.fill(chain, tape.below(80))
                        ring.flush()
                        ring.should_notify()
                except vb.VirtioError:
                    pass
            case 3:
                bench.spoil(tape)
            case 4:
                (driver.disable_cb if tape.below(2) else driver.enable_cb)()
                driver.enable_cb_check()
            case _:
                try:
                    got = driver.get_buf()
                except vb.VirtioError:
                    assert driver.broken is not None and driver.get_buf() is None
                    break
                if got is not None:
                    out.remove(got[0])  # returned once, and only what was given
                    assert 0 <= got[1] <= 2 * 64
                    free.append(got[0])
    left = driver.detach_unused_bufs()
    assert set(left) == out and len(left) == len(out)
    bench.guest.check()


# -- registers ------------------------------------------------------------------------------------------------------------------

_MMIO = [*range(0, 0x104, 4), 0x44, 0x50, 0x70, 0x70, 0x70, 0xC0, 0x108, 0x120, 0x140, 0x160]
_ON = int(Feature.VERSION_1 | Feature.EVENT_IDX | Feature.INDIRECT_DESC | Feature.RING_RESET | Feature.NOTIFICATION_DATA)


class _Registers:
    """A board whose registers are stored to in any order; steps that make sense are among them, or nothing would ever start."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        bits = tape.number()
        self.guest = Guarded(0, 0)
        device = VirtioBlkDevice(packed=bool(bits & 2), ring_reset=True, notification_data=bool(bits & 4), in_order=bool(bits & 8))
        common: dict[str, Any] = dict(queues=2, memory=self.guest.memory, store=RamStore(DISK))
        self.pci = bool(bits & 1)
        if self.pci:
            options = {"vectors": [None, 0, 1, 2][bits >> 4 & 3], "notify_off_multiplier": 4 * (bits >> 6 & 1), "notif_config_data": True}
            self.board: Any = PciBoard(device, options=options, **common)
        else:
            self.board = Board(device, **common)

    def play(self) -> None:
        for _ in range(60):
            if self.tape.ended:
                break
            self._step()
            self.board.machine.run(20_000)
        self.guest.check()

    def starts(self) -> None:
        """A driver that knows nothing of what was before can use the device."""
        board = self.board
        board.data_at = REQUESTS
        if self.pci:
            place(board.regs)
            board.regs.config_write(next(iter(_msix(board.regs)), 0x3C), 0, 2)
        board.memory.view(0, MEMORY)[:] = bytes(MEMORY)
        board.boot(_ON & board.offered() & ~int(Feature.NOTIFICATION_DATA))
        assert board.works(0) and board.works(1)

    def _step(self) -> None:
        tape, board = self.tape, self.board
        match tape.below(16):
            case 0:
                board.set_status([0, 1, 3, 11, 15, 128, 255, 64][tape.below(8)])
            case 1:
                board.accept((_ON | Feature.RING_PACKED * (tape.below(4) == 0)) & board.offered() if tape.below(8) else tape.number(8))
            case 2:
                ring = RINGS + 0x800 * tape.below(2)
                board.queue(tape.below(3), _Place(tape.of([8, 4, 16, 3]), ring))
            case 3:
                board.doorbell(tape.below(4))
            case 4 | 5:
                board.memory.write(RINGS + 4 * tape.below(0x400), tape.value().to_bytes(8, "little"))
            case 6:
                at = REQUESTS
                board.memory.write(at, bytes((tape.below(3), 0, 0, 0)) + bytes(12))
                for slot, (gpa, length, flags) in enumerate([(at, 16, 1), (at + 32, 512, 1 | WRITE), (at + 16, 1, WRITE)]):
                    entry = gpa.to_bytes(8, "little") + length.to_bytes(4, "little") + flags.to_bytes(2, "little")
                    board.memory.write(RINGS + 16 * slot, entry + (slot + 1).to_bytes(2, "little"))
                board.memory.write(RINGS + 16 * 8 + 2, (1 + tape.below(2)).to_bytes(2, "little"))
            case _:
                self._access()

    def _access(self) -> None:
        tape, regs = self.tape, self.board.regs
        size = tape.of([4, 4, 1, 2, 8])
        value = tape.value() & (1 << 8 * size) - 1
        if not self.pci:
            offset = tape.of(_MMIO) if tape.below(8) else tape.number(2)
            regs.write(offset, value, size)
            assert 0 <= regs.read(offset, size) < 1 << 8 * size
            return
        where = tape.below(8)
        if where < 2:
            offset = tape.below(0x104)
            regs.config_write(offset, value, size)
            assert 0 <= regs.config_read(offset, size) < 1 << 8 * size
            return
        gpa = WINDOWS[1] + tape.below(0x1000) if where == 2 else WINDOWS[4] + [0, 0, 0, 0x1000, 0x2000, 0x3000][where - 2] + tape.below(72)
        regs.write(gpa, value, size)
        assert 0 <= regs.read(gpa, size) < 1 << 8 * size


class _Place:
    """Where a ring lies, for ``Board.queue``; nothing is written."""

    def __init__(self, size: int, at: int) -> None:
        self.size = size
        self.desc_at, self.avail_at, self.used_at = at, at + 16 * size, (at + 16 * size + 6 + 2 * size + 3) & ~3


def _msix(regs: Any) -> list[int]:
    """Where MSI-X's Message Control is, if there is one."""
    at, seen = regs.config_read(0x34, 1), []
    while at:
        if regs.config_read(at, 1) == 0x11:
            seen.append(at + 2)
        at = regs.config_read(at + 1, 1)
    return seen


def registers(data: bytes) -> None:
    """A sequence of accesses to virtio-mmio or virtio-pci, with rings that are good or not; then, for some, a driver starts it."""
    played = _Registers(Tape(data))
    played.play()
    if len(data) % 4 == 0:
        played.starts()


@cache
def _targets() -> dict[str, Callable[[bytes], None]]:
    found = {"ring": _bench("plain"), "batch": _bench("off"), "used": used, "registers": registers}
    if not compiled_missing():
        found["compiled"] = _bench("auto")
    return found


TARGETS = _targets()
"""Name → a function that plays one input."""
