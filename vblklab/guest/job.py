"""fio jobs: what a job file or Python keywords ask for, checked, with fio's names, defaults and meanings (fio's HOWTO).

    parse_jobs("[seq]\\nrw=read\\nbs=64k\\n")     load_jobs("job.fio")     job(rw="randread", bs="4k", iodepth=32)

A Job says what is read and written.  Where and through what (fio's ioengine, filename, direct …) is the recipe's business.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from ..errors import JobError
from .fio_values import READ, TRIM, WRITE, BlockSize, Fault, Percent, Split, bytes_text, read_bytes
from .job_options import ALIASES, DIRECTIONS, READERS, WRITERS, job_error, read_name, read_percentage, shown, unknown

__all__ = ["Job", "Percent", "job", "load_jobs", "parse_jobs", "render_jobs"]

_LARGEST_FILE = 1 << 20


@dataclass(frozen=True, slots=True)
class Job:
    """One job section.  Raises JobError for values and combinations that make no sense.

    Fields carry fio's names.  ``bs`` is bytes, or (read, write, trim) bytes; ``bssplit`` is, per direction, (bytes, percent) pairs,
    () where ``bs`` holds; ``size``, ``offset`` and ``offset_increment`` are bytes or a Percent of the disk, ``size=None`` is the rest of
    the disk.  A clone does ``number_ios`` I/Os, going around its region as often as it takes, or else ``size`` bytes; fio alone would stop
    after ``size`` bytes in both cases, so ``render_jobs`` gives it an io_size.  ``runtime`` is in seconds and, like fio's without
    time_based, only cuts short.  ``iodepth_batch`` is kept as fio resolves it: 0 and more than iodepth mean iodepth.

    >>> job(rw="randrw", bs="4k,8k", size="1m").options()
    {'rw': 'randrw', 'bs': '4k,8k,8k', 'size': '1m'}
    """

    name: str = "job"
    rw: str = "read"
    bs: BlockSize = 4096
    bssplit: tuple[Split, Split, Split] | None = None
    size: int | Percent | None = None
    offset: int | Percent = 0
    offset_increment: int | Percent = 0
    iodepth: int = 1
    iodepth_batch: int = 1
    numjobs: int = 1
    number_ios: int | None = None
    runtime: float | None = None
    rwmixread: int = 50
    randseed: int = 0x89
    fsync: int = 0
    serialize_overlap: bool = False
    verify: str | None = None

    def __post_init__(self) -> None:
        where = f"job {shown(self.name)!r}"
        for key, read in READERS.items():
            try:
                value = read(getattr(self, key), _DEFAULTS[key])
            except Fault as fault:
                raise job_error(where, key, getattr(self, key), fault) from None
            object.__setattr__(self, key, value)
        object.__setattr__(self, "iodepth_batch", min(self.iodepth_batch or self.iodepth, self.iodepth))
        try:
            _combine(self)
        except Fault as fault:
            raise job_error(where, "", None, fault) from None

    @property
    def runtime_ns(self) -> int | None:
        """The limit in ns; None without one."""
        return None if self.runtime is None else round(self.runtime * 1e6) * 1000

    @property
    def random(self) -> bool:
        """Whether offsets are random."""
        return self.rw.startswith("rand")

    @property
    def directions(self) -> tuple[int, ...]:
        """The operations that the job issues: READ 0, WRITE 1, TRIM 2."""
        return DIRECTIONS[self.rw.removeprefix("rand")]

    @property
    def reads(self) -> bool:
        """Whether the job reads."""
        return READ in self.directions

    @property
    def writes(self) -> bool:
        """Whether the job writes."""
        return WRITE in self.directions

    @property
    def trims(self) -> bool:
        """Whether the job discards."""
        return TRIM in self.directions

    def split(self, direction: int) -> Split:
        """(bytes, percent) of every block size of one direction."""
        if self.bssplit is not None and self.bssplit[direction]:
            return self.bssplit[direction]
        return ((self.bs[direction] if isinstance(self.bs, tuple) else self.bs, 100),)

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Every block size that the job uses, ascending, in bytes."""
        return tuple(sorted({size for direction in self.directions for size, _ in self.split(direction)}))

    @property
    def min_bs(self) -> int:
        """The smallest block size of all three directions, used or not: what fio rounds percentages to."""
        return min(size for direction in (READ, WRITE, TRIM) for size, _ in self.split(direction))

    @property
    def max_bs(self) -> int:
        """The largest block size that the job uses, in bytes."""
        return self.block_sizes[-1]

    def options(self) -> dict[str, str]:
        """The job's options as fio writes them, without the name: rw and bs always, the others where they differ from the default."""
        out = {}
        for key, write in WRITERS.items():
            value = getattr(self, key)
            if key in ("rw", "bs") or value != _DEFAULTS[key]:
                out[key] = write(value)
        return out


_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(Job)}


def _combine(one: Job) -> None:
    """Refuse what cannot be together; raises Fault naming the keys."""
    bs_key = "bssplit" if one.bssplit is not None else "bs"
    if isinstance(one.size, int) and one.size < one.max_bs:
        what = f"size={bytes_text(one.size)} is smaller than a block of {bytes_text(one.max_bs)}"
        raise Fault(what, "enlarge size", keys=("size", bs_key))
    if one.offset == Percent(100):
        raise Fault("offset=100% leaves nothing of the disk", "give a smaller offset", keys=("offset",))
    if one.verify and one.trims:
        raise Fault(
            f"verify={one.verify} with rw={one.rw}: what is discarded has no contents to check",
            "leave verify out, or use a direction that writes",
            keys=("verify", "rw"),
        )


class _Setting(NamedTuple):
    value: Any
    line: int


class _Section:
    """A section while it is read: what is set so far, and where."""

    def __init__(self, source: str, name: str, line: int, inherited: dict[str, _Setting]) -> None:
        self.source = source
        self.name = name
        self.line = line
        self.settings = dict(inherited)

    def where(self, line: int) -> str:
        return f"{self.source}, line {line} [{self.name}]"

    def put(self, text: str, line: int) -> None:
        key, equals, value = (part.strip(_BLANK) for part in text.partition("="))
        name = ALIASES.get(key, key)
        try:
            if not key:
                raise Fault("has no option in front of =", "write option=value")
            if name == "rwmixwrite":
                self._need(equals, value)
                self.settings["rwmixread"] = _Setting(100 - read_percentage(value, 50), line)
                return
            if name == "io_size":
                self._need(equals, value)
                self.settings[name] = _Setting(read_bytes(value), line)
                return
            if name not in READERS:
                raise unknown("include" if re.match(r"include\s", key) else key)
            if name == "name" and self.name.startswith("global"):
                raise Fault("stands in [global]", "name each job by its [section]")
            self._need(equals, value)
            old = self.settings[name].value if name in self.settings else _DEFAULTS[name]
            self.settings[name] = _Setting(READERS[name](value, old), line)
        except Fault as fault:
            raise job_error(self.where(line), key, value if equals else None, fault) from None

    @staticmethod
    def _need(equals: str, value: str) -> None:
        if not equals or not value:
            raise Fault("needs a value", "write option=value")
        if value.endswith("\\"):
            raise Fault("ends in a backslash", "fio has no continuation lines; write the value on one line")

    def job(self) -> Job:
        """The section's job; combinations are blamed on the line that set them last."""
        values = {"name": self.name, **{key: setting.value for key, setting in self.settings.items()}}
        io_size = values.pop("io_size", None)
        try:
            made = Job(**values)
        except JobError as error:
            if not isinstance(fault := error.__context__, Fault):
                raise
            lines = [self.settings[key].line for key in fault.keys if key in self.settings]
            raise job_error(self.where(max(lines, default=self.line)), "", None, fault) from None
        if io_size is not None and (made.number_ios is None or io_size < made.number_ios * made.max_bs):
            raise job_error(self.where(self.settings["io_size"].line), "io_size", io_size, unknown("io_size"))
        return made


_BLANK = "".join(map(chr, range(33))) + "\x7f"


def parse_jobs(text: str, source: str = "job file") -> tuple[Job, ...]:
    """The jobs of a job file's text, in order; ``source`` names it in errors.

    [global] sets defaults for the sections after it, also repeatedly; the last of equal options wins; # and ; start a comment.
    Raises JobError, and nothing else, for any text that it does not understand.
    """
    jobs: list[Job] = []
    inherited: dict[str, _Setting] = {}
    section: _Section | None = None

    def close() -> None:
        nonlocal inherited
        if section is None:
            return
        if section.name.startswith("global"):
            inherited = section.settings
        else:
            jobs.append(section.job())

    for number, raw in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        line = re.split("[#;]", raw, maxsplit=1)[0].strip(_BLANK)
        if not line:
            continue
        if line.startswith("["):
            close()
            section = _open(line, source, number, inherited)
        elif section is None:
            raise JobError(f"{source}, line {number}: {shown(line)!r} stands before the first [section]", "start a job with [name]")
        else:
            section.put(line, number)
    close()
    if not jobs:
        raise JobError(f"{source}: no job section", "add one: [name] and below it options such as rw=randread")
    return tuple(jobs)


def _open(line: str, source: str, number: int, inherited: dict[str, _Setting]) -> _Section:
    name = line[1:-1].strip()
    try:
        if not line.endswith("]"):
            raise Fault("does not end in ]", "write [name] alone on its line, without # and ;")
        if not name.startswith("global"):
            name = read_name(name, "")
    except Fault as fault:
        raise JobError(f"{source}, line {number}: section {shown(line)} {fault.why}", fault.remedy) from None
    return _Section(source, name, number, inherited)


def load_jobs(path: str | os.PathLike[str]) -> tuple[Job, ...]:
    """The jobs of a job file (UTF-8, at most 1 MiB).  Raises JobError naming file, line and key."""
    label = shown(os.fspath(path), 4096) if isinstance(path, str | os.PathLike) else repr(path)
    try:
        if stat.S_ISDIR(mode := os.stat(path).st_mode):
            raise JobError(f"job file {label} is a directory", "give the path of a job file")
        if not stat.S_ISREG(mode):
            raise JobError(f"job file {label} is not a regular file", "give the path of a job file")
        with open(path, "rb") as file:
            data = file.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise JobError(f"job file {label} cannot be read: {error.strerror or error}", "check the path") from None
    except (TypeError, ValueError) as error:
        raise JobError(f"{label} is not the path of a job file: {error}", "give a path") from None
    if len(data) > _LARGEST_FILE:
        raise JobError(f"job file {label} is larger than 1 MiB", "is this a job file?")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        what = f"job file {label}, line {line}: byte {data[error.start]:#04x} is not UTF-8"
        raise JobError(what, "save the file as UTF-8 text") from None
    return parse_jobs(text, label)


def job(**options: Any) -> Job:
    """One job from Python: fio's option names (aliases too), values as numbers or as fio writes them; None is the default.

    >>> job(rw="randread", bs="4k", iodepth=32, number_ios=10_000).max_bs
    4096
    """
    where = f"job {shown(options.get('name') or 'job')!r}"
    values: dict[str, Any] = {}
    for key, value in options.items():
        name = ALIASES.get(key, "rwmixread" if key == "rwmixwrite" else key)
        try:
            if name not in READERS:
                raise unknown(key)
            if name in values:
                raise Fault(f"sets {name} a second time", "give one of the two")
            if value is None:
                values[name] = _DEFAULTS[name]
            else:
                values[name] = READERS[name](value, _DEFAULTS[name])
                if key == "rwmixwrite":
                    values[name] = 100 - values[name]
        except Fault as fault:
            raise job_error(where, key, value, fault) from None
    return Job(**values)


def render_jobs(jobs: Iterable[Job], /, **global_extra: object) -> str:
    """A job file's text for the real fio; ``global_extra`` are fio's own options for its [global] section (True is 1, None a flag).

    Without extras ``parse_jobs`` gives the same jobs back.  A job with number_ios also gets the io_size that lets the real fio do as many.
    The real fio draws random offsets from a map unless given ``norandommap=1``; with that, randrw and verify, fio 3.33 itself reports
    mismatches where there are none.

    >>> print(render_jobs([job(name="r", rw="randread")], ioengine="libaio", filename="/dev/vdb", group_reporting=None))
    [global]
    ioengine=libaio
    filename=/dev/vdb
    group_reporting
    <BLANKLINE>
    [r]
    rw=randread
    bs=4k
    <BLANKLINE>
    """
    sections = [[f"[{one.name}]", *(f"{key}={value}" for key, value in _fio_options(one)), ""] for one in jobs]
    if not sections:
        raise JobError("no job to write", "give at least one Job")
    if global_extra:
        sections.insert(0, ["[global]", *(_extra(key, value) for key, value in global_extra.items()), ""])
    return "\n".join(line for section in sections for line in section)


def _fio_options(one: Job) -> list[tuple[str, str]]:
    options = list(one.options().items())
    if one.number_ios is not None:
        options.append(("io_size", bytes_text(one.number_ios * one.max_bs)))
    return options


def _extra(key: str, value: object) -> str:
    text = str(int(value)) if isinstance(value, bool) else str(value)
    if not re.fullmatch("[a-z0-9_]+", key) or (value is not None and (not text.strip() or re.search(r"[#;\n\r\0]", text))):
        raise JobError(f"global option {shown(key)}={shown(text)} cannot stand in a job file", "use one line without # and ;")
    return key if value is None else f"{key}={text}"
