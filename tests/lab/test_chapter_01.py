"""Chapter 01's checks: right answers, and half-right ones with the hint that helps with just that mistake."""

from __future__ import annotations

import struct
import sys
from collections.abc import Generator
from typing import Any

import pytest

import vblklab as vb
from vblklab.lab.bench import Bench
from vblklab.lab.check import Verdict

Steps = Generator[Any, int, Any]


def parse_header(header: Any) -> tuple[int, int]:
    kind, _, sector = struct.unpack("<IIQ", header)
    return kind, sector


class Right(vb.EmptyDevice):
    device_id = 2

    def features(self) -> int:
        return 1 << 32 | 1 << 9

    def read_config(self) -> bytes:
        return self.capacity_sectors.to_bytes(8, "little")

    def finish(self, writable: list[memoryview], status: int) -> int:
        writable[-1][-1] = status
        if status == 0:
            return sum(map(len, writable))
        return int(len(writable) == 1)

    def read(self, sector: int, readable: list[memoryview], writable: list[memoryview]) -> Steps:
        yield from self.disk_read(sector, writable[:-1])
        return self.finish(writable, 0)

    def write(self, sector: int, readable: list[memoryview], writable: list[memoryview]) -> Steps:
        yield from self.disk_write(sector, readable[1:])
        return self.finish(writable, 0)

    def flush(self, sector: int, readable: list[memoryview], writable: list[memoryview]) -> Steps:
        yield from self.disk_flush()
        return self.finish(writable, 0)

    def outside(self, sector: int, length: int) -> bool:
        return length % 512 != 0 or sector + length // 512 > self.capacity_sectors

    def serve(self, readable: list[memoryview], writable: list[memoryview]) -> Steps:
        kind, sector = parse_header(readable[0])
        data = readable[1:] if kind == 1 else writable[:-1]
        if kind in (0, 1) and self.outside(sector, sum(map(len, data))):
            return self.finish(writable, 1)
        try:
            if kind in (0, 1, 4):
                work = {0: self.read, 1: self.write, 4: self.flush}[kind]
                return (yield from work(sector, readable, writable))
        except OSError:
            return self.finish(writable, 1)
        return self.finish(writable, 2)


STAGES = ("identity", "features", "config", "finish", "read", "write", "flush", "bounds", "errors")
NAMES = [*(f"device_{stage}" for stage in STAGES), "device"]


def judged(name: str, **changed: Any) -> Verdict:
    verdict: Verdict = getattr(vb.check, name)(type("MyDevice", (Right,), changed))
    return verdict


@pytest.mark.parametrize("name", NAMES)
def test_the_right_device_passes_every_stage(name: str) -> None:
    assert judged(name).ok


@pytest.mark.parametrize("name", NAMES)
def test_the_packages_own_device_is_not_the_learners(name: str) -> None:
    assert "Give the class itself" in getattr(vb.check, name)(vb.VirtioBlkDevice).text


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_class_is_told_what_comes_first(name: str) -> None:
    verdict = getattr(vb.check, name)(vb.EmptyDevice)
    assert verdict.state == "wrong"
    assert "'nothing here'" in verdict.text
    assert ("First an earlier stage. What kind of device is it?" in verdict.text) == (name != "device_identity")


def dots(self: Any, *_: Any) -> Any: ...


def nothing(self: Any, *_: Any) -> Any:
    return ...


OPEN = {
    "device_identity": {"device_id": ...},
    "device_features": {"features": nothing},
    "device_config": {"read_config": nothing},
    "device_finish": {"finish": dots},
    "device_read": {"read": dots},
    "device_write": {"write": dots},
    "device_flush": {"flush": dots},
    "device_bounds": {"outside": nothing},
}


@pytest.mark.parametrize("name", OPEN)
def test_three_dots_are_open_and_not_wrong(name: str) -> None:
    assert judged(name, **OPEN[name]).state == "open"
    assert judged("device", **OPEN[name]).text.startswith("First an earlier stage.")


def ends_open(self: Any, readable: Any, writable: Any) -> Steps:
    try:
        return (yield from Right.serve(self, readable, writable))
    finally:
        if parse_header(readable[0])[0] == 8:
            return ...  # noqa: B012 - what the skeleton's last line does


def test_three_dots_at_the_end_of_serve_are_open() -> None:
    assert judged("device_errors", serve=ends_open).state == "open"


def test_the_checks_leave_the_tracer_as_it_was() -> None:
    before = sys.gettrace()
    judged("device_features", features=lambda self: 1 // 0)
    assert sys.gettrace() is before


def forever(self: Any, *_: Any) -> Any:
    while True:
        try:
            pass
        except Exception:
            pass


def waits_forever(self: Any, *_: Any) -> Steps:
    while True:
        yield ("virtqueue_pop", 0)


def reads(parts: Any, factor: int = 1, length: Any = None) -> Any:
    def read(self: Any, sector: int, readable: Any, writable: Any) -> Steps:
        yield from self.disk_read(sector * factor, parts(writable))
        done = self.finish(writable, 0)
        return done if length is None else length(done)

    return read


def writes(parts: Any, factor: int = 1, status: int | None = 0) -> Any:
    def write(self: Any, sector: int, readable: Any, writable: Any) -> Steps:
        yield from self.disk_write(sector * factor, parts(readable))
        return 1 if status is None else self.finish(writable, status)

    return write


def reads_without_yield(self: Any, sector: int, readable: Any, writable: Any) -> int:
    self.disk_read(sector, writable[:-1])
    return self.finish(writable, 0)  # type: ignore[no-any-return]


def says_flushed(self: Any, sector: int, readable: Any, writable: Any) -> Steps:
    return self.finish(writable, 0)
    yield


def finish(status_at: Any = None, length: Any = None) -> Any:
    def changed(self: Any, writable: Any, status: int) -> Any:
        (status_at or (lambda parts, byte: parts[-1].__setitem__(-1, byte)))(writable, status)
        right = sum(map(len, writable)) if status == 0 else int(len(writable) == 1)
        return right if length is None else length(writable, status, right)

    return changed


def ignores_bad_sectors(self: Any, readable: Any, writable: Any) -> Steps:
    kind, sector = parse_header(readable[0])
    data = readable[1:] if kind == 1 else writable[:-1]
    if kind > 1 or self.outside(sector, sum(map(len, data))):
        return (yield from Right.serve(self, readable, writable))
    work = self.write if kind else self.read
    return (yield from work(sector, readable, writable))


def unknown_is_ok(self: Any, readable: Any, writable: Any) -> Steps:
    if parse_header(readable[0])[0] > 4:
        return self.finish(writable, 0)
    return (yield from Right.serve(self, readable, writable))


def fills(parts: Any, byte: int) -> None:
    for part in parts:
        part[:] = bytes([byte]) * len(part)


HALF_RIGHT: list[tuple[str, dict[str, Any], str]] = [
    ("device_identity", {"device_id": 1}, "a network card"),
    ("device_identity", {"device_id": 99}, "not a block device"),
    ("device_identity", {"device_id": "2"}, "whole number"),
    ("device_features", {"features": lambda self: 32}, "number of the bit"),
    ("device_features", {"features": lambda self: 1 << 9}, "VERSION_1 missing"),
    ("device_features", {"features": lambda self: 1 << 32 | 1 << 2}, "You offer SEG_MAX"),
    ("device_features", {"features": lambda self: 1 << 32 | 1 << 5}, "You offer bit 5"),
    ("device_features", {"features": lambda self: "VERSION_1"}, "whole number whose bits"),
    ("device_features", {"features": lambda self: 1 // 0}, "ZeroDivisionError"),
    ("device_features", {"features": forever}, "does not come to an end"),
    ("device_features", {"features": lambda self: 1 << 32, "accepts": lambda self, features: False}, "refused its own"),
    ("device_config", {"read_config": lambda self: self.capacity_sectors}, "this is a int"),
    ("device_config", {"read_config": lambda self: b"\0\x08\0\0"}, "alone has 8"),
    ("device_config", {"read_config": lambda self: self.capacity_sectors.to_bytes(8, "big")}, "wrong order"),
    ("device_config", {"read_config": lambda self: (512 * self.capacity_sectors).to_bytes(8, "little")}, "size in bytes"),
    ("device_config", {"read_config": lambda self: (2048).to_bytes(8, "little")}, "it may change"),
    ("device_config", {"read_config": lambda self: (self.capacity_sectors & 0xFFFFFFFF).to_bytes(8, "little")}, "would read 7"),
    ("device_finish", {"finish": finish(lambda parts, byte: None)}, "should be 0 and is 0xaa"),
    ("device_finish", {"finish": finish(lambda parts, byte: parts[0].__setitem__(0, byte))}, "status is in the first byte"),
    ("device_finish", {"finish": finish(fills)}, "wrote more than the status byte"),
    ("device_finish", {"finish": finish(length=lambda parts, status, right: None)}, "returned None"),
    ("device_finish", {"finish": finish(length=lambda parts, status, right: right - (right > 1))}, "count it"),
    ("device_finish", {"finish": finish(length=lambda parts, status, right: right or 1)}, "you count 1 byte"),
    ("device_finish", {"finish": finish(length=lambda parts, status, right: sum(map(len, parts)))}, "nothing before the gap"),
    ("device_finish", {"finish": finish(length=lambda parts, status, right: right + 16)}, "do not count it"),
    ("device_read", {"read": reads(lambda parts: parts)}, "status byte's place"),
    ("device_read", {"read": reads(lambda parts: parts[:1])}, "several parts"),
    ("device_read", {"read": reads(lambda parts: parts[:-1], factor=512)}, "No factor of 512"),
    ("device_read", {"read": reads(lambda parts: parts[1:2])}, "only 1 bytes"),
    ("device_read", {"read": reads(lambda parts: parts[-2::-1])}, "not that of sector"),
    ("device_read", {"read": reads(lambda parts: parts[:-1], length=lambda done: done - 1)}, "count it"),
    ("device_read", {"read": reads_without_yield}, "Without `yield from` nothing happens"),
    ("device_read", {"read": waits_forever}, "trace points"),
    ("device_read", {"read": says_flushed}, "nobody asked the disk"),
    ("device_write", {"write": writes(lambda parts: parts)}, "the header: leave it out"),
    ("device_write", {"write": writes(lambda parts: parts[1:2])}, "several parts"),
    ("device_write", {"write": writes(lambda parts: parts[1:], factor=2)}, "it went to sector 10"),
    ("device_write", {"write": writes(lambda parts: parts[1:], status=None)}, "status byte was not written"),
    ("device_write", {"write": writes(lambda parts: parts[1:], status=1)}, "0 (OK) is right"),
    ("device_flush", {"flush": says_flushed}, "nobody asked the disk"),
    ("device_flush", {"features": lambda self: 1 << 32}, "no driver will ever ask"),
    ("device_bounds", {"outside": lambda self, sector, length: False}, "it reached the disk"),
    ("device_bounds", {"outside": lambda self, sector, length: sector >= self.capacity_sectors}, "two sectors"),
    ("device_bounds", {"outside": lambda self, sector, length: sector + length // 512 >= self.capacity_sectors}, "last sector, 2047"),
    ("device_bounds", {"outside": lambda self, sector, length: True}, "`outside` refuses 512 bytes at sector 3"),
    ("device_bounds", {"outside": lambda self, sector, length: sector + length // 512 > self.capacity_sectors}, "not a whole sector"),
    ("device_errors", {"serve": ignores_bad_sectors}, "went up through your device"),
    ("device_errors", {"serve": unknown_is_ok}, "2 (UNSUPP) is right"),
]


@pytest.mark.parametrize(("name", "changed", "hint"), HALF_RIGHT)
def test_a_half_right_device_gets_the_hint_for_its_mistake(name: str, changed: dict[str, Any], hint: str) -> None:
    verdict = judged(name, **changed)
    assert verdict.state == "wrong"
    assert hint in verdict.text
    assert "\n" not in str(verdict)


def test_a_missing_method_is_named() -> None:
    class Started(vb.EmptyDevice):
        device_id = 2
        features = Right.features
        read_config = Right.read_config

    assert "no method `finish` yet" in vb.check.device_finish(Started).text


def test_a_device_that_forgets_after_a_reset_is_found() -> None:
    class Once(Right):
        def reset(self) -> None:
            self.features = lambda: 0  # type: ignore[method-assign]
            super().reset()

    assert "After a reset" in vb.check.device(Once).text


# -- the small questions ---------------------------------------------------------------------------------------------------------


def test_magic_takes_the_letters() -> None:
    assert vb.check.magic("virt").ok
    assert "from the wrong end" in vb.check.magic("triv").text
    assert "lowest first" in vb.check.magic("vblk").text


def test_status_is_read_from_the_bench() -> None:
    bench = Bench()
    bench.write("Status", 3)
    bench.write("DriverFeaturesSel", 0)
    bench.write("DriverFeatures", 1 << 5)
    bench.write("Status", 11)
    assert vb.check.predict_status(3).reveal(bench).ok
    assert "left out the bit" in vb.check.predict_status(11).reveal(bench).text
    assert "were accepted" in vb.check.predict_status(3).reveal(_booted()).text
    assert "Give the bench" in vb.check.predict_status(3).reveal(3).text


def _booted() -> Bench:
    bench = Bench()
    bench.handshake()
    return bench


def read_capacity(bench: Any) -> int:
    while True:
        before = bench.read("ConfigGeneration")
        low, high = bench.read(0x100), bench.read(0x104)
        if bench.read("ConfigGeneration") == before:
            return int(high << 32 | low)


def once_again(bench: Any) -> Any:
    before = bench.read(0x0FC)
    value = bench.read(0x104) << 32 | bench.read(0x100)
    return value if bench.read(0x0FC) == before else bench.read(0x104) << 32 | bench.read(0x100)


def looks_late(bench: Any) -> Any:
    while True:
        low = bench.read(0x100)
        before = bench.read(0x0FC)
        high = bench.read(0x104)
        if bench.read(0x0FC) == before:
            return high << 32 | low


def never_content(bench: Any) -> Any:
    while True:
        bench.read(0x100)


def test_a_capacity_that_is_never_torn() -> None:
    assert vb.check.read_capacity(read_capacity).ok


@pytest.mark.parametrize(
    ("function", "hint"),
    [
        (lambda bench: bench.read(0x104) << 32 | bench.read(0x100), "Read ConfigGeneration before and after"),
        (lambda bench: (bench.read(0x0FC) and 0) + (bench.read(0x104) << 32 | bench.read(0x100)), "generation once"),
        (lambda bench: bench.read(0x100), "both halves"),
        (lambda bench: bench.read(0x100) << 32 | bench.read(0x104), "does not change"),
        (once_again, "Repeat until nothing changed"),
        (looks_late, "must come before both halves"),
        (never_content, "reads on and on"),
        (forever, "does not come to an end"),
        (lambda bench: bench.read("Capacity"), "ConfigError"),
        (2048, "function itself"),
    ],
)
def test_a_half_right_capacity_gets_its_hint(function: Any, hint: str) -> None:
    verdict = vb.check.read_capacity(function)
    assert verdict.state == "wrong"
    assert hint in verdict.text


def test_a_header_is_type_and_sector() -> None:
    assert vb.check.parse_header(parse_header).ok
    assert vb.check.parse_header(dots).state == vb.check.read_capacity(dots).state == "open"
    assert vb.check.parse_header(lambda header: ...).state == vb.check.read_capacity(lambda bench: ...).state == "open"


@pytest.mark.parametrize(
    ("function", "hint"),
    [
        (lambda h: struct.unpack("<IIQ", h), "four bytes in the middle"),
        (lambda h: struct.unpack("<IIQ", h)[::-2], "other order"),
        (lambda h: struct.unpack(">IIQ", h)[::2], "little-endian"),
        (lambda h: struct.unpack("<IQ4x", h), "begins at byte 8"),
        (lambda h: struct.unpack("=IQ4x", h), "begins at byte 8"),
        (lambda h: struct.unpack("<I4xI4x", h), "read 32 of them"),
        (lambda h: (parse_header(h)[0], 512 * parse_header(h)[1]), "not in bytes"),
        (lambda h: (7, parse_header(h)[1]), "the type is not right"),
        (lambda h: struct.unpack("<IQ", h), "error"),
        (lambda h: 5, "Return two numbers"),
    ],
)
def test_a_half_right_header_gets_its_hint(function: Any, hint: str) -> None:
    verdict = vb.check.parse_header(function)
    assert verdict.state == "wrong"
    assert hint in verdict.text


def test_reset_reads_back_as_it_was() -> None:
    assert vb.check.predict_reset(15).reveal(15).ok
    assert "then waits until it reads 0" in vb.check.predict_reset(0).reveal(15).text
    assert "as before" in vb.check.predict_reset(8).reveal(15).text
    assert "nothing was in flight" in vb.check.predict_reset(15).reveal(0).text


def test_one_at_a_time_is_judged_from_the_runs() -> None:
    def run(depth: int, device: Any) -> Any:
        app = vb.Fio(rw="randread", bs=4096, iodepth=depth, number_ios=300)
        return vb.Pipeline(app=app, device=device).run(vb.SimMachine())

    one, many = run(1, Right), run(32, Right)
    truth = many.iops / one.iops
    assert 1.5 < truth < 4
    assert vb.check.predict_one_at_a_time(truth).reveal(one, many).ok
    assert "never has more than one request" in vb.check.predict_one_at_a_time(32).reveal(one, many).text
    assert vb.check.predict_one_at_a_time(9).reveal(run(1, vb.VirtioBlkDevice), run(32, vb.VirtioBlkDevice)).ok
    assert vb.check.where_it_waits("D4", many).ok
    assert "Another bar" in vb.check.where_it_waits("D5", many).text
    assert "the one step" in vb.check.where_it_waits("D4, D5", many).text
