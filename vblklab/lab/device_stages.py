"""Chapter 01's main exercise: a device from an empty class, in nine stages, each judged on the bench by what a driver would see.

A stage is judged only when those before it hold, so a hint is always about the first thing that is missing.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Sequence
from typing import Any

from ..device import EmptyDevice
from ..errors import VblkError
from ..spec.virtio import Feature
from ..spec.virtio_blk import BlkFeature, BlkStatus, ReqType
from .bench import Answer, Bench
from .careful import call, is_open
from .check import Verdict, Wrong, question, right, wrong

_SECTOR = 512
_SECTORS = 2048
_OK, _IOERR, _UNSUPP = int(BlkStatus.OK), int(BlkStatus.IOERR), int(BlkStatus.UNSUPP)
_IN, _OUT, _FLUSH, _GET_ID = int(ReqType.IN), int(ReqType.OUT), int(ReqType.FLUSH), int(ReqType.GET_ID)
_OTHER_DEVICES = {1: "a network card", 3: "a console", 4: "a source of random numbers", 5: "a memory balloon", 8: "a SCSI host"}
_WITH_A_FIELD = BlkFeature.SIZE_MAX | BlkFeature.SEG_MAX | BlkFeature.BLK_SIZE | BlkFeature.TOPOLOGY | BlkFeature.MQ | BlkFeature.CONFIG_WCE
_SERVED = int(Feature.VERSION_1 | Feature.EVENT_IDX | Feature.INDIRECT_DESC | BlkFeature.FLUSH)


class _Open(Wrong):
    """This stage is not answered yet."""


def _sector(number: int) -> bytes:
    """What the bench's disk holds in this sector."""
    return random.Random(number).randbytes(_SECTOR)


def _on_the_bench(device: Any) -> Bench:
    """A fresh bench with this device and a disk full of known sectors."""
    if not (isinstance(device, type) and issubclass(device, EmptyDevice)):
        raise Wrong("Give the class itself: `MyDevice`, which begins as `class MyDevice(vb.EmptyDevice)`.")
    bench: Bench = call(lambda: Bench(device, sectors=_SECTORS))
    bench.disk.bytes[:] = b"".join(map(_sector, range(_SECTORS)))
    return bench


def _running(device: Any) -> Bench:
    bench = _on_the_bench(device)
    _asked(bench.handshake)
    return bench


def _asked(work: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Let the device work; what a package error says is a hint too."""

    def careful() -> Any:
        try:
            return work(*arguments, **options)
        except VblkError as error:
            if "returned Ellipsis" in str(error):
                raise _Open from None
            raise Wrong(f"{str(error)[:1].upper()}{str(error)[1:]}.") from None

    return call(careful)


def _method(bench: Bench, name: str) -> Any:
    method = getattr(bench.device, name, None)
    if method is None:
        raise Wrong(f"Your device has no method `{name}` yet: run the cell that adds it to the class.")
    if is_open(method):
        raise _Open
    return method


def _status(answer: Answer, want: int, what: str) -> None:
    if answer.status == want:
        return
    if answer.status == 0xAA:
        raise Wrong(f"{what}: the status byte was not written. The driver would read whatever lay there.")
    names = {_OK: "OK", _IOERR: "IOERR", _UNSUPP: "UNSUPP"}
    raise Wrong(f"{what}: the status byte is {answer.status}, and {want} ({names[want]}) is right.")


def _length(answer: Answer, want: int, what: str) -> None:
    if answer.written == want:
        return
    if answer.written == want - 1:
        raise Wrong(f"{what}: the used length is {answer.written}. The status byte was written as well: count it.")
    if answer.written == want + 16:
        raise Wrong(f"{what}: the used length is {answer.written}. The header was only read: do not count it.")
    raise Wrong(f"{what}: the used length is {answer.written}, and {want} bytes were written without a gap.")


# -- what a driver learns before the first request ---------------------------------------------------------------------------


def _identity(device: Any) -> str:
    bench = _on_the_bench(device)
    number = bench.device.device_id
    if number is ...:
        raise _Open
    if isinstance(number, bool) or not isinstance(number, int):
        raise Wrong("`device_id` is a whole number.")
    if number == 0:
        raise Wrong("0 is the number for 'nothing here': a driver looks no further.")
    if number != 2:
        raise Wrong(f"{number} is {_OTHER_DEVICES.get(number, 'not a block device')}: another driver would come.")
    return "The register DeviceID reads 2, so the block driver comes and goes on to the features."


def _features(device: Any) -> str:
    bench = _on_the_bench(device)
    _method(bench, "features")
    bits = call(bench.device.features)
    if bits is ...:
        raise _Open
    if isinstance(bits, bool) or not isinstance(bits, int) or bits < 0:
        raise Wrong("`features()` returns a whole number whose bits are the features.")
    if bits == 32:
        raise Wrong("32 is the number of the bit. The number that has only this bit set is `1 << 32`.")
    if not bits & Feature.VERSION_1:
        hint = "a driver of today finds VERSION_1 missing and gives up with FAILED"
        raise Wrong(f"Bit 32 is not set: {hint}.")
    if bits & int(_WITH_A_FIELD):
        names = ", ".join(str(bit.name) for bit in BlkFeature if bits & bit & _WITH_A_FIELD)
        raise Wrong(f"You offer {names}. That promises a field in configuration space which your device will not have.")
    if extra := bits & ~_SERVED:
        raise Wrong(f"You offer bit {extra.bit_length() - 1} too. Offer only what your device can do: the driver may use it.")
    if not _asked(bench.handshake) & 8:
        raise Wrong("The device refused its own features: FEATURES_OK reads back as 0.")
    return "The driver accepts, sets FEATURES_OK and reads it back: still set."


def _config(device: Any) -> str:
    bench = _on_the_bench(device)
    _method(bench, "read_config")
    for sectors in (_SECTORS, 3, (1 << 32) + 7):
        bench.device.resize(sectors)
        data = call(bench.device.read_config)
        if data is ...:
            raise _Open
        if not isinstance(data, (bytes, bytearray)):
            raise Wrong(f"Configuration space is `bytes`; this is a {type(data).__name__}.")
        _capacity(bytes(data), sectors)
    return "The driver reads the size of the disk, and reads it again when it changes."


def _capacity(data: bytes, sectors: int) -> None:
    if len(data) < 8:
        raise Wrong(f"There are {len(data)} bytes, and `capacity` alone has 8: a disk may have more than 2³² sectors.")
    if data[:8] == sectors.to_bytes(8, "big"):
        raise Wrong("The number is right and its bytes are in the wrong order: virtio is little-endian everywhere.")
    got = int.from_bytes(data[:8], "little")
    if got == sectors * _SECTOR:
        raise Wrong("That is the size in bytes. The field counts sectors of 512 bytes.")
    if got != sectors:
        changed = " Read the size each time you are asked: it may change." if got == _SECTORS else ""
        raise Wrong(f"The disk has {sectors:,} sectors, and a driver would read {got:,}.{changed}")


# -- the end of a request ----------------------------------------------------------------------------------------------------


def _finish(device: Any) -> str:
    bench = _on_the_bench(device)
    finish = _method(bench, "finish")
    cases = (
        ((1,), _OK, 1, "A write that went well"),
        ((_SECTOR, 1), _OK, _SECTOR + 1, "A read of 512 bytes that went well"),
        ((300, 724, 1), _OK, 1025, "A read of 1,024 bytes in two parts"),
        ((1,), _UNSUPP, 1, "A request that is not known"),
        ((_SECTOR, 1), _IOERR, 0, "A read that failed"),
    )
    for sizes, status, want, what in cases:
        parts = [bytearray(b"\xaa" * size) for size in sizes]
        written = call(finish, [memoryview(part) for part in parts], status)
        if written is ...:
            raise _Open
        _ended(parts, status, what)
        if isinstance(written, bool) or not isinstance(written, int):
            raise Wrong(f"{what}: `finish` returned {written!r}. Return the used length, a whole number.")
        if want == 0 and written == 1:
            raise Wrong(f"{what}: you count 1 byte. Counting starts at the first writable byte, and that is data which was not written.")
        if want == 0 and written:
            raise Wrong(f"{what}: you count {written} bytes, but the data was not written. Without it nothing before the gap is left: 0.")
        _length(Answer(written, [bytes(part) for part in parts]), want, what)
    return "The status byte tells how it ended, the used length how far the driver may trust its memory."


def _ended(parts: Sequence[bytearray], status: int, what: str) -> None:
    """Whether the status byte, and nothing else, was written."""
    if parts[-1][-1] != status:
        if parts[0][0] == status and len(parts) > 1:
            raise Wrong(f"{what}: the status is in the first byte, which is data. The last writable byte is its place.")
        raise Wrong(f"{what}: the last writable byte should be {status} and is {parts[-1][-1]:#x}.")
    if any(byte != 0xAA for part in parts for byte in part[: len(part) - (part is parts[-1])]):
        raise Wrong(f"{what}: `finish` wrote more than the status byte. The data is not its own.")


# -- the requests ------------------------------------------------------------------------------------------------------------


def _served(bench: Bench, name: str, kind: int, sector: int, data: bytes | int = 0, pieces: int = 1) -> Answer:
    """One request of a stage; ``name`` is the method that answers it."""
    method = _method(bench, name)
    if not inspect.isgeneratorfunction(getattr(method, "__func__", method)):
        raise Wrong(f"`{name}` never waits for the disk: `yield from self.disk_{name}(…)` does. Without `yield from` nothing happens.")
    before = len(bench.disk.calls)
    answer: Answer = _asked(bench.block, kind, sector, data, pieces)
    if not any(call[0] == name for call in bench.disk.calls[before:]):
        length = data if isinstance(data, int) else len(data)
        if hasattr(bench.device, "outside") and kind != _FLUSH and call(bench.device.outside, sector, length):
            raise Wrong(f"`outside` refuses {length:,} bytes at sector {sector}, and the disk has {_SECTORS:,} sectors.")
        raise Wrong(f"The request ended, but nobody asked the disk: `yield from self.disk_{name}(…)`.")
    return answer


def _read(device: Any) -> str:
    bench = _running(device)
    for sector, sectors, pieces in ((3, 1, 1), (40, 2, 2)):
        what = f"A read of {sectors * _SECTOR:,} bytes at sector {sector}" + (f" in {pieces} parts" if pieces > 1 else "")
        answer = _served(bench, "read", _IN, sector, sectors * _SECTOR, pieces)
        _, offset, length = bench.disk.calls[-1]
        want = b"".join(map(_sector, range(sector, sector + sectors)))
        if length == len(want) + 1:
            raise Wrong(f"{what}: you asked the disk for {length:,} bytes. The last writable byte is the status byte's place.")
        if length < len(want):
            raise Wrong(f"{what}: only {length:,} bytes were asked for. The data may come in several parts: give all of them.")
        if offset == sector * _SECTOR * _SECTOR:
            raise Wrong(f"{what}: `disk_read` counts in sectors, as the header does. No factor of 512 is needed.")
        if b"".join(answer.parts[:-1]) != want:
            raise Wrong(f"{what}: the data is not that of sector {sector}. You read at sector {offset // _SECTOR}.")
        _status(answer, _OK, what)
        _length(answer, len(want) + 1, what)
    return "The data lies in the guest's memory, then the status byte, then the used element says so."


def _write(device: Any) -> str:
    bench = _running(device)
    for sector, data, pieces in ((5, b"w" * _SECTOR, 1), (60, bytes(range(256)) * 4, 2)):
        what = f"A write of {len(data):,} bytes at sector {sector}" + (f" in {pieces} parts" if pieces > 1 else "")
        answer = _served(bench, "write", _OUT, sector, data, pieces)
        _, offset, length = bench.disk.calls[-1]
        if length == len(data) + 16:
            raise Wrong(f"{what}: {length:,} bytes went to the disk. The first readable part is the header: leave it out.")
        if length < len(data):
            raise Wrong(f"{what}: only {length:,} bytes went to the disk. The data may come in several parts: give all of them.")
        if bytes(bench.disk.bytes[sector * _SECTOR : sector * _SECTOR + len(data)]) != data:
            raise Wrong(f"{what}: it went to sector {offset // _SECTOR}.")
        _status(answer, _OK, what)
        _length(answer, 1, what)
    return "Only one byte was written into the guest's memory: the status. So the used length is 1."


def _flush(device: Any) -> str:
    bench = _running(device)
    answer = _served(bench, "flush", _FLUSH, 0)
    _status(answer, _OK, "A flush")
    _length(answer, 1, "A flush")
    if not bench.offered() & BlkFeature.FLUSH:
        raise Wrong("It works, and no driver will ever ask: your device does not offer FLUSH (bit 9). Add the bit to `features`.")
    return "An fsync in the guest now reaches the disk."


# -- what a device must refuse -------------------------------------------------------------------------------------------------


def _bounds(device: Any) -> str:
    bench = _running(device)
    last = _SECTORS - 1
    for kind, verb in ((_IN, "read"), (_OUT, "write")):
        data = _SECTOR if kind == _IN else b"b" * _SECTOR
        _status(_asked(bench.block, kind, last, data), _OK, f"A {verb} of the last sector, {last}")
        cases = (
            (_SECTORS, 1, "the first sector behind the end"),
            (last, 2, "two sectors, of which one is behind the end"),
            ((1 << 64) - 1, 1, "sector 2⁶⁴ - 1"),
        )
        for sector, count, where in cases:
            _refused(bench, kind, sector, count * _SECTOR, f"A {verb} of {where}")
        _refused(bench, kind, 0, 100, f"A {verb} of 100 bytes, which is not a whole sector")
    return "Nothing outside the disk is touched, whatever a driver asks for."


def _refused(bench: Bench, kind: int, sector: int, length: int, what: str) -> None:
    before = len(bench.disk.calls)
    try:
        answer = _asked(bench.block, kind, sector, length if kind == _IN else b"b" * length)
    except Wrong as hint:
        if len(bench.disk.calls) > before or "OverflowError" in str(hint):
            raise Wrong(f"{what}: it reached the disk, and the disk raised an error. Refuse it before.") from None
        raise
    if len(bench.disk.calls) > before:
        raise Wrong(f"{what}: it reached the disk. Compare sector and length with `self.capacity_sectors` first.")
    _status(answer, _IOERR, what)


def _errors(device: Any) -> str:
    bench = _running(device)
    for kind in (_GET_ID, 99):
        for size in (0, 20):
            what = f"A request of type {kind}" + (f" with {size} bytes to fill" if size else "")
            answer = _asked(bench.block, kind, 0, size)
            _status(answer, _UNSUPP, what)
            _length(answer, 0 if size else 1, what)
    bench.disk.bad_sectors = {7}
    for kind, data, verb, want in ((_IN, _SECTOR, "read", 0), (_OUT, b"e" * _SECTOR, "write", 1)):
        what = f"A {verb} of a bad sector"
        try:
            answer = _asked(bench.block, kind, 7, data)
        except Wrong as hint:
            if "OSError" in str(hint):
                raise Wrong(
                    f"{what}: the disk raised `OSError`, and it went up through your device. Catch it, and end with IOERR."
                ) from None
            raise
        _status(answer, _IOERR, what)
        _length(answer, want, what)
    _status(_asked(bench.block, _IN, 8, _SECTOR), _OK, "A read after the one that failed")
    return "A failed request is a status byte, not the end of the device."


def _whole(device: Any) -> str:
    """Three hundred random requests against a model of a disk, with a reset in the middle."""
    bench = _running(device)
    chance = random.Random(1)
    disk = bytearray(bench.disk.bytes)
    for turn in range(300):
        if turn == 150 and _asked(bench.handshake) != 15:
            raise Wrong("After a reset the handshake does not come to its end again.")
        sector, sectors = chance.randrange(_SECTORS - 8), chance.randrange(1, 9)
        at, end = sector * _SECTOR, (sector + sectors) * _SECTOR
        what = f"Request {turn} of 300, {sectors} sectors at {sector}"
        if chance.random() < 0.5:
            data = chance.randbytes(end - at)
            disk[at:end] = data
            answer = _asked(bench.block, _OUT, sector, data, chance.randrange(1, 4))
        else:
            answer = _asked(bench.block, _IN, sector, end - at, chance.randrange(1, 4))
            if b"".join(answer.parts[:-1]) != disk[at:end]:
                raise Wrong(f"{what}: the data is not what was written there.")
        _status(answer, _OK, what)
    if bytes(bench.disk.bytes) != disk:
        raise Wrong("After 300 requests the disk does not hold what was written.")
    return "Nine stages, 300 random requests and a reset: this is a virtio-blk device."


_STAGES: tuple[Callable[[Any], str], ...] = (_identity, _features, _config, _finish, _read, _write, _flush, _bounds, _errors, _whole)
_ASKS = (
    "What kind of device is it?",
    "Which features does it offer?",
    "What stands in its configuration space?",
    "How does a request end?",
    "How is a read served?",
    "How is a write served?",
    "How is a flush served?",
    "Which requests lie outside the disk?",
    "What if the disk fails?",
    "Is the device whole?",
)


_READ_STAGE, _BOUNDS_STAGE = _STAGES.index(_read), _STAGES.index(_bounds)


def _bounds_are_open(device: Any) -> bool:
    """Three dots are true: an open ``outside`` refuses everything, which would look like a mistake of an earlier stage."""
    outside = getattr(_on_the_bench(device).device, "outside", None)
    return outside is not None and call(outside, 0, _SECTOR) is ...


def _judge(device: Any, upto: int) -> Verdict:
    praise = ""
    for number, stage in enumerate(_STAGES[: upto + 1]):
        earlier = f"First an earlier stage. {_ASKS[number]} " if number < upto else ""
        try:
            if number == _READ_STAGE and _bounds_are_open(device):
                earlier = "" if upto == _BOUNDS_STAGE else f"First an earlier stage. {_ASKS[_BOUNDS_STAGE]} "
                raise _Open
            praise = stage(device)
        except _Open:
            return Verdict("open", f"{earlier or _ASKS[upto] + ' '}Put your code in the place of the three dots, then run the cell again.")
        except Wrong as hint:
            return wrong(f"{earlier}{hint}")
    return right(praise)


def _declare(number: int, name: str) -> None:
    def judge(device: Any) -> Verdict:
        return _judge(device, number)

    judge.__name__ = name
    question("01", _ASKS[number])(judge)


for _number, _name in enumerate(("identity", "features", "config", "finish", "read", "write", "flush", "bounds", "errors")):
    _declare(_number, f"device_{_name}")
_declare(9, "device")
