"""How fio writes values: sizes, percentages, times, block sizes and splits, read and written back.

Every reader takes what a job file holds (text) or what Python gives (numbers) and raises Fault with a reason.  The rules were
measured on fio 3.33 with its default kb_base=1024; what fio reads by guessing (``1.5g`` as 1 byte) is refused here.
"""

from __future__ import annotations

import math
import operator
import re
from dataclasses import dataclass

__all__ = [
    "READ",
    "TRIM",
    "WRITE",
    "BlockSize",
    "Fault",
    "Percent",
    "Split",
    "bytes_text",
    "read_bool",
    "read_bs",
    "read_bssplit",
    "read_bytes",
    "read_count",
    "read_seconds",
    "read_size",
    "seconds_text",
    "split_text",
]

READ, WRITE, TRIM = 0, 1, 2

BlockSize = int | tuple[int, int, int]
Split = tuple[tuple[int, int], ...]
"""(bytes, percent) pairs of one direction; empty where ``bs`` holds."""

_UNIT = re.compile(r"([kmgtp])(i?b?)", re.IGNORECASE)
_NUMBER = re.compile(r"\+?([0-9]{1,20})([a-z%]*)", re.IGNORECASE)
_HEX = re.compile(r"0x([0-9a-f]{1,16})", re.IGNORECASE)
_POWER = {"k": 1, "m": 2, "g": 3, "t": 4, "p": 5}
_TIME_US = {
    "": 1_000_000, "us": 1, "usec": 1, "ms": 1000, "msec": 1000, "s": 10**6, "m": 60 * 10**6, "h": 3600 * 10**6, "d": 86400 * 10**6,
}  # fmt: skip
_LONGEST_S = 10**9
_LARGEST = 2**63 - 1
_LARGEST_COUNT = 2**31 - 1


class Fault(Exception):
    """Why a value cannot be, what to do instead, and which options are to blame; job.py adds the place."""

    def __init__(self, why: str, remedy: str = "", *, keys: tuple[str, ...] = ()) -> None:
        super().__init__(why)
        self.why = why
        self.remedy = remedy
        self.keys = keys


@dataclass(frozen=True, slots=True)
class Percent:
    """A share of the disk, as in ``size=30%``."""

    value: int

    def of(self, total: int) -> int:
        """The share of ``total``, rounded down."""
        return total * self.value // 100

    def __str__(self) -> str:
        return f"{self.value}%"


def read_bytes(value: object, what: str = "size") -> int:
    """A number of bytes: ``4096``, ``4k``, ``4Ki``, ``4kb``, ``0x1000``.  As in fio ``4KiB`` is 4000: kb_base=1024 swaps them."""
    if isinstance(value, str):
        return _bytes_of(value.strip(), what)
    return _integer(value, what, _LARGEST)


def _bytes_of(text: str, what: str) -> int:
    if found := _HEX.fullmatch(text):
        return _within(int(found[1], 16), _LARGEST)
    found = _NUMBER.fullmatch(text)
    if not found:
        raise Fault(f"is not a {what}", "write a whole number with an optional unit: 4096, 4k, 1m, 2g, 0x1000")
    number, unit = int(found[1]), found[2].lower()
    if unit in ("", "b"):
        return _within(number, _LARGEST)
    parts = _UNIT.fullmatch(unit)
    if not parts:
        raise Fault(f"is not a {what}: {found[2]!r} is not a unit", "units are k, m, g, t, p, each 1024 times the last")
    base = 1000 if parts[2] == "ib" else 1024
    return _within(number * base ** _POWER[parts[1]], _LARGEST)


def _within(number: int, largest: int) -> int:
    if number > largest:
        raise Fault(f"is larger than {largest}", "give a smaller number")
    return number


def _integer(value: object, what: str, largest: int) -> int:
    if isinstance(value, bool):
        raise Fault(f"is not a {what}", "give a number")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise Fault(f"is not a {what}", "give a whole number, or text as fio writes it") from None
    if number < 0:
        raise Fault("is negative", "give 0 or more")
    return _within(number, largest)


def read_count(value: object, largest: int = _LARGEST_COUNT) -> int:
    """A plain number; fio takes size units here too (``number_ios=10k`` is 10240)."""
    return _within(read_bytes(value, "number"), largest)


def read_size(value: object) -> int | Percent:
    """Bytes, or a percentage of the disk from 0 to 100."""
    if isinstance(value, Percent):
        percent = _integer(value.value, "percentage", _LARGEST)
    elif isinstance(value, str) and value.strip().endswith("%"):
        found = _NUMBER.fullmatch(value.strip())
        if not found or found[2] != "%":
            raise Fault("is not a percentage", "write a whole number from 0% to 100%")
        percent = int(found[1])
    else:
        return read_bytes(value)
    if percent > 100:
        raise Fault("is more than the whole disk", "give at most 100%")
    return Percent(percent)


def read_seconds(value: object) -> float:
    """Seconds: ``10``, ``10s``, ``500ms``, ``250us``, ``2m``, ``1h``, ``1d``; from Python also a float.  Exact to 1 µs."""
    if isinstance(value, str):
        found = _NUMBER.fullmatch(value.strip())
        unit = _TIME_US.get(found[2].lower()) if found else None
        if not found or unit is None:
            raise Fault("is not a time", "write 10, 10s, 500ms, 250us, 2m, 1h or 1d; a number alone is in seconds")
        microseconds = int(found[1]) * unit
    elif isinstance(value, float):
        if not math.isfinite(value) or value < 0:
            raise Fault("is not a time", "give seconds, 0 or more")
        if value > _LONGEST_S:
            raise Fault(f"is longer than {_LONGEST_S} s", "give a shorter time")
        microseconds = round(value * 1e6)
        if value and not microseconds:
            raise Fault("is shorter than 1 µs", "give a longer time, in seconds")
    else:
        microseconds = _integer(value, "time", _LONGEST_S) * 10**6
    if microseconds > _LONGEST_S * 10**6:
        raise Fault(f"is longer than {_LONGEST_S} s", "give a shorter time")
    return microseconds / 1e6


def read_bool(value: object) -> bool:
    """``0`` or ``1``; from Python also a bool."""
    text = str(int(value)) if isinstance(value, bool | int) else value.strip() if isinstance(value, str) else ""
    if text not in ("0", "1"):
        raise Fault("is neither 0 nor 1", "give 0 or 1")
    return text == "1"


def read_bs(value: object, before: BlockSize) -> BlockSize:
    """``4k`` for all directions, ``read,write,trim``, ``read,write`` (trim like write); an empty part keeps ``before``."""
    old = before if isinstance(before, tuple) else (before,) * 3
    if isinstance(value, list | tuple):
        parts: list[object] = list(value)
    elif isinstance(value, str):
        parts = list(value.split(","))
    else:
        parts = [value]
    if not 1 <= len(parts) <= 3:
        raise Fault(f"has {len(parts)} parts", "give one size, or read,write,trim")
    if all(_empty(part) for part in parts):
        raise Fault("is empty", "give a block size such as 4k")
    sizes = [old[at] if _empty(part) else _block(part) for at, part in enumerate(parts)]
    # a trailing comma is an empty last part: it ends the list without handing the last size on
    if len(parts) == 2 and _empty(parts[1]):
        sizes[1:] = old[1:]
    elif len(sizes) < 3:
        sizes += [sizes[-1]] * (3 - len(sizes))
    return sizes[0] if sizes[0] == sizes[1] == sizes[2] else (sizes[0], sizes[1], sizes[2])


def _empty(part: object) -> bool:
    return isinstance(part, str) and not part.strip()


_LARGEST_BLOCK = 1 << 30


def _block(value: object) -> int:
    if isinstance(value, str) and re.search(r"[0-9a-z][:-]", value, re.IGNORECASE):
        raise Fault("looks like a range", "vblklab has no block size ranges; use bssplit, such as 4k/50:8k/50")
    size = read_bytes(value, "block size")
    if size % 512 or not size:
        text = value.strip().lower() if isinstance(value, str) else ""
        hint = f"; fio reads {text} as powers of 1000, write {text[:-2]}" if text.endswith("ib") else ""
        raise Fault(f"is {size} bytes, which is not a multiple of 512", f"a disk moves whole sectors of 512 bytes{hint}")
    if size > _LARGEST_BLOCK:
        raise Fault(f"is {size} bytes, more than 1 GiB", "give a smaller block size")
    return size


def read_bssplit(value: object, before: tuple[Split, Split, Split]) -> tuple[Split, Split, Split]:
    """``512/40:4k/60``, or up to three such lists for read,write,trim; an empty list keeps ``before``, as fio does.

    An entry without a percentage (or with 0) gets an even share of what the others leave.
    """
    if isinstance(value, tuple) and len(value) == 3 and all(isinstance(one, tuple) for one in value):
        text = ",".join(":".join(f"{bs}/{percent}" for bs, percent in _pairs(one)) for one in value)
    elif isinstance(value, str):
        text = value
    else:
        raise Fault("is not a block size split", "write it as fio does: 512/40:4k/60")
    parts = text.split(",")
    if len(parts) > 3:
        raise Fault(f"has {len(parts)} parts", "give one list of sizes, or read,write,trim")
    splits = [_split(part) or before[at] for at, part in enumerate(parts)]
    splits += [_split(parts[-1]) or before[at] for at in range(len(splits), 3)]
    if not any(part.strip() for part in parts) and isinstance(value, str):
        raise Fault("is empty", "give sizes with their percentages: 512/40:4k/60")
    return splits[0], splits[1], splits[2]


def _pairs(one: tuple[object, ...]) -> list[tuple[object, object]]:
    pairs = []
    for pair in one:
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise Fault("is not a block size split", "write it as fio does: 512/40:4k/60")
        pairs.append((pair[0], pair[1]))
    return pairs


def _split(text: str) -> Split:
    if not text.strip():
        return ()
    sizes, shares = [], []
    for entry in text.split(":"):
        size, _, share = entry.partition("/")
        sizes.append(_block(size))
        shares.append(read_bytes(share, "percentage") if share.strip() else 0)
    if len(sizes) > 64:
        raise Fault(f"has {len(sizes)} sizes", "give at most 64")
    total, missing = sum(shares), shares.count(0)
    if total > 100:
        raise Fault(f"has percentages that add up to {total}", "let them add up to 100, or leave one empty to take the rest")
    if len(sizes) == 1:
        return ((sizes[0], 100),)
    even = (100 - total) // missing if missing else 0
    return tuple((size, share or even) for size, share in zip(sizes, shares, strict=True))


def bytes_text(size: int) -> str:
    """The shortest fio spelling of a number of bytes: ``4k`` for 4096."""
    for unit in "gmk":
        factor = int(1024 ** _POWER[unit])
        if size and not size % factor:
            return f"{size // factor}{unit}"
    return str(size)


def seconds_text(seconds: float) -> str:
    """fio's spelling of a time: whole seconds as ``10``, others in ms or us."""
    microseconds = round(seconds * 1e6)
    for unit, factor in (("", 1_000_000), ("ms", 1000)):
        if not microseconds % factor:
            return f"{microseconds // factor}{unit}"
    return f"{microseconds}us"


def split_text(splits: tuple[Split, Split, Split]) -> str:
    """fio's spelling of ``bssplit``."""
    texts = [":".join(f"{bytes_text(size)}/{percent}" for size, percent in one) for one in splits]
    return texts[0] if texts[0] == texts[1] == texts[2] else ",".join(texts)
