"""Reading what ``blkparse`` prints of a block device, or ftrace's own ``blk`` tracer with the option blk_classic."""

from __future__ import annotations

import re

from ..errors import TraceError
from .ftrace import Record, ticks

__all__ = ["BLKPARSE_LINE", "read_blkparse"]

BLKPARSE_LINE = re.compile(
    r"\s*(?P<dev>\d+,\d+)\s+(?P<cpu>\d+)\s+(?:\d+\s+)?(?P<time>\d+\.\d+)\s+(?P<pid>\d+)\s+(?P<action>[A-Za-z]{1,2})\s+(?P<rest>\S.*)"
)
ACTIONS = {  # blkparse's letter: the trace event that is the same moment
    "Q": "block_bio_queue",
    "G": "block_getrq",
    "I": "block_rq_insert",
    "D": "block_rq_issue",
    "C": "block_rq_complete",
    "M": "block_bio_backmerge",
    "F": "block_bio_frontmerge",
    "X": "block_split",
    "R": "block_rq_requeue",
    "P": "block_plug",
    "U": "block_unplug",
    "UT": "block_unplug",
    "A": "block_bio_remap",
    "B": "block_bio_bounce",
    "S": "block_sleeprq",
    "m": "message",
}
_SECTORS = re.compile(r"(?P<rwbs>[A-Z]+)\s+(?:\d+\s+)?(?:\([^)]*\)\s+)?(?P<sector>\d+)(?: \+ (?P<nr>\d+)| / (?P<new>\d+))?(?: .*)?$")
_RWBS = re.compile(r"(?P<rwbs>[A-Z]+)\s+\[")
_BY = re.compile(r"\[([^\]]*)\](?: \d+)?\s*$")
_SUMMARY = re.compile(r"(CPU\d+|Total|Throughput|Events|Skips)\b.*|\s+(Reads|Writes|Read|Write|PC|IO|Time|Merges|Unplugs|Allocations)\b.*")
_NOTHING = re.compile(r"\s*(#.*)?")
_NEEDS_SECTOR = frozenset("QGIDCMFX")
_HOW = "give the text that blkparse prints in its usual format"


def read_blkparse(text: str) -> list[Record]:
    """The records, in the order of their times; TraceError names the first line that is none.

    An empty flush names no sector: its arguments are dev and rwbs only.
    """
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        found = BLKPARSE_LINE.match(line)
        if found is None:
            if _SUMMARY.fullmatch(line) or _NOTHING.fullmatch(line):
                continue
            raise _wrong(number, line)
        action, rest = found["action"], found["rest"]
        args: dict[str, int | str] = {"dev": found["dev"]}
        if action not in ACTIONS:
            raise _wrong(number, line)
        by = _BY.search(rest)
        args["by"] = by[1] if by else ""
        if sectors := _SECTORS.match(rest):
            args |= {"rwbs": sectors["rwbs"], "sector": int(sectors["sector"]), "nr_sector": int(sectors["nr"] or 0)}
            if sectors["new"]:
                args["new_sector"] = int(sectors["new"])
        elif (flags := _RWBS.match(rest)) and "F" in flags["rwbs"]:
            args["rwbs"] = flags["rwbs"]
        elif action in _NEEDS_SECTOR:
            raise _wrong(number, line)
        task = str(args["by"]) if not str(args["by"]).lstrip("-").isdigit() else ""
        records.append(Record(ticks(found["time"]), int(found["cpu"]), task, int(found["pid"]), ACTIONS[action], args))
    if not records:
        raise TraceError("this trace has no entry", _HOW)
    records.sort(key=lambda record: record.t_ns)
    return records


def _wrong(number: int, line: str) -> TraceError:
    return TraceError(f"line {number} is no entry of blkparse: {line[:80]!r}", _HOW)
