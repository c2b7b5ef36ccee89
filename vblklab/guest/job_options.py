"""The options of a vblklab job: how each is read and written, fio's aliases for them, and what takes the place of others."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from ..errors import JobError
from .fio_values import (
    READ,
    TRIM,
    WRITE,
    BlockSize,
    Fault,
    Percent,
    Split,
    bytes_text,
    read_bool,
    read_bs,
    read_bssplit,
    read_count,
    read_seconds,
    read_size,
    seconds_text,
    split_text,
)

__all__ = ["ALIASES", "DIRECTIONS", "READERS", "WRITERS", "job_error", "read_name", "read_percentage", "shown", "unknown"]

DIRECTIONS = {"read": (READ,), "write": (WRITE,), "trim": (TRIM,), "rw": (READ, WRITE)}
_RW = (*DIRECTIONS, *(f"rand{name}" for name in DIRECTIONS))
_VERIFY = ("crc32", "md5", "sha1", "sha256", "sha512")
_NO_SPLIT: tuple[Split, Split, Split] = ((), (), ())


def _read_rw(value: object, _: object) -> str:
    text = value.strip() if isinstance(value, str) else ""
    text = {"readwrite": "rw"}.get(text, text)
    if text not in _RW:
        raise Fault("is not a direction that vblklab has", f"use one of {', '.join((*_RW, 'readwrite'))}")
    return text


def read_name(value: object, _: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise Fault("is not a name", "give the job a name")
    name = value.strip()
    if not name.isprintable() or "#" in name or ";" in name:
        raise Fault("has a character that a job file cannot hold", "use printable characters other than # and ;")
    if len(name.encode("utf-8", "replace")) > 250:
        raise Fault("is longer than 250 bytes", "give a shorter name")
    if name.startswith("global"):
        raise Fault("starts with global, which fio takes for defaults of the jobs that follow", "rename the job")
    return name


def _read_verify(value: object, _: object) -> str | None:
    text = "0" if value is None else value.strip() if isinstance(value, str) else str(value)
    if text == "0":
        return None
    if text not in _VERIFY:
        raise Fault("is not a verify method that vblklab has", f"use one of 0, {', '.join(_VERIFY)}")
    return text


def _read_end(value: object, _: object) -> int | Percent | None:
    size = None if value is None else read_size(value)
    if size in (0, Percent(0)):
        raise Fault("leaves nothing to do", "leave size out to use the rest of the disk")
    return size


def _read_start(value: object, _: object) -> int | Percent:
    start = read_size(value)
    if isinstance(start, Percent):
        return start if start.value else 0
    if start % 512:
        raise Fault(f"is {start} bytes, which is not a multiple of 512", "a disk moves whole sectors of 512 bytes")
    return start


def _read_number_ios(value: object, _: object) -> int | None:
    if value is None:
        return None
    number = read_count(value, 2**63 - 1)
    if not number:
        raise Fault("asks for no I/O at all", "give 1 or more, or leave it out to do all of size")
    return number


def _read_runtime(value: object, _: object) -> float | None:
    return None if value is None else read_seconds(value) or None


def _read_bssplit(value: object, before: tuple[Split, Split, Split] | None) -> tuple[Split, Split, Split] | None:
    if value is None:
        return None
    splits = read_bssplit(value, before or _NO_SPLIT)
    return splits if any(splits) else None


def read_percentage(value: object, _: object) -> int:
    return read_count(value, 100)


def _read_seed(value: object, _: object) -> int:
    return read_count(value, 2**63 - 1)


def _positive(value: object, _: object) -> int:
    number = read_count(value)
    if not number:
        raise Fault("is 0", "give 1 or more")
    return number


def _count(value: object, _: object) -> int:
    return read_count(value)


READERS: dict[str, Callable[[Any, Any], Any]] = {
    "name": read_name,
    "rw": _read_rw,
    "bs": read_bs,
    "bssplit": _read_bssplit,
    "size": _read_end,
    "offset": _read_start,
    "offset_increment": _read_start,
    "iodepth": _positive,
    "iodepth_batch": _count,
    "numjobs": _positive,
    "number_ios": _read_number_ios,
    "runtime": _read_runtime,
    "rwmixread": read_percentage,
    "randseed": _read_seed,
    "fsync": _count,
    "serialize_overlap": lambda value, _: read_bool(value),
    "verify": _read_verify,
}


def _size_text(value: int | Percent) -> str:
    return str(value) if isinstance(value, Percent) else bytes_text(value)


def _bs_text(value: BlockSize) -> str:
    return bytes_text(value) if isinstance(value, int) else ",".join(bytes_text(size) for size in value)


WRITERS: dict[str, Callable[[Any], str]] = {
    **dict.fromkeys(READERS, str),
    "bs": _bs_text,
    "bssplit": split_text,
    "size": _size_text,
    "offset": _size_text,
    "offset_increment": _size_text,
    "runtime": seconds_text,
    "serialize_overlap": lambda value: str(int(value)),
}
del WRITERS["name"]

ALIASES = {
    "readwrite": "rw",
    "blocksize": "bs",
    "fileoffset": "offset",
    "iodepth_batch_submit": "iodepth_batch",
    "timeout": "runtime",
}
_SUPPORTED = (*READERS, "rwmixwrite", *ALIASES)

_REGION = "the whole disk is the file; use size and offset"
_AMOUNT = "size or number_ios says how much is done"
_ENGINE = "the recipe's engine part says how the device reaches the host"
_DISK = "the recipe's disk part is what is read and written"
_CACHE = "the recipe's iostack part is the path from the application to the driver"
_TOGETHER = "all sections of a file run at the same time; give each its own run"
_FAST = "a job runs as fast as the path lets it; lower iodepth to load it less"
_STATS = "the Run always records latencies and percentiles"
_REPEAT = "a run always repeats; randseed chooses another"
_CHECKS = "verify=METHOD reads back and checks what the job wrote"
_ELSEWHERE = {
    **dict.fromkeys(("ioengine", "fixedbufs", "registerfiles", "sqthread_poll", "nonvectored", "thread", "userspace_reap"), _ENGINE),
    **dict.fromkeys(("filename", "directory", "filename_format", "opendir", "create_on_open", "fallocate", "unlink"), _DISK),
    **dict.fromkeys(("direct", "buffered", "invalidate", "sync", "fsync_on_close", "end_fsync", "fdatasync", "ioscheduler"), _CACHE),
    **dict.fromkeys(("filesize", "nrfiles", "openfiles", "file_service_type", "zonemode", "zonesize", "zonerange"), _REGION),
    **dict.fromkeys(("io_size", "io_limit", "loops", "time_based", "fill_device"), f"{_AMOUNT}, runtime only cuts it short"),
    **dict.fromkeys(("stonewall", "wait_for", "wait_for_previous", "startdelay", "new_group"), _TOGETHER),
    **dict.fromkeys(("rate", "rate_iops", "rate_min", "thinktime", "thinktime_blocks", "latency_target", "rate_process"), _FAST),
    **dict.fromkeys(("percentile_list", "clat_percentiles", "lat_percentiles", "slat_percentiles", "disable_lat"), _STATS),
    **dict.fromkeys(("write_bw_log", "write_lat_log", "write_iops_log", "log_avg_msec"), _STATS),
    **dict.fromkeys(("group_reporting", "unified_rw_reporting"), "the Run has every clone and the total"),
    **dict.fromkeys(("do_verify", "verify_fatal", "verify_backlog", "verify_pattern", "verify_interval", "verify_async"), _CHECKS),
    **dict.fromkeys(("randrepeat", "allrandrepeat", "random_generator"), _REPEAT),
    **dict.fromkeys(("norandommap", "softrandommap", "random_distribution"), "random offsets are uniform, without a map of what was done"),
    **dict.fromkeys(("bsrange", "blocksize_range", "bs_unaligned", "blockalign", "ba"), "bssplit mixes block sizes"),
    **dict.fromkeys(("iodepth_low", "iodepth_batch_complete", "iodepth_batch_complete_min"), "completions are reaped as they come"),
    **dict.fromkeys(("cpus_allowed", "cpumask", "numa_cpu_nodes", "cpus_allowed_policy"), "the machine says which CPU a task runs on"),
    **dict.fromkeys(("buffer_pattern", "refill_buffers", "zero_buffers", "buffer_compress_percentage"), "writes carry seeded noise"),
    "hipri": "the recipe's driver part polls with poll=True",
    "ramp_time": "drop the first I/Os when you look at the Run",
    "kb_base": "units are fio's default, kb_base=1024",
    "description": "write a comment instead",
    "include": "put all sections into one file",
    "read_iolog": "vblklab replays traces with a trace importer, not with a job file",
}


def unknown(key: str) -> Fault:
    if key in _ELSEWHERE:
        return Fault("is not an option of a vblklab job", f"{_ELSEWHERE[key]}; a job has {', '.join(READERS)}")
    near = difflib.get_close_matches(key, _SUPPORTED, 1)
    guess = f"did you mean {near[0]}? " if near else ""
    return Fault("is not an option of a vblklab job", f"{guess}a job has {', '.join(READERS)}")


def shown(value: object, longest: int = 60) -> str:
    if isinstance(value, int) and value.bit_length() > 128:
        value = f"a number of {value.bit_length()} bits"
    text = str(value)
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def job_error(where: str, key: str, value: object, fault: Fault) -> JobError:
    if not key:
        what = fault.why
    elif value is None:
        what = f"{shown(key)} {fault.why}"
    else:
        what = f"{shown(key)}={shown(value)} {fault.why}"
    return JobError(f"{where}: {what}", fault.remedy)
