"""The real fio as a judge: what it makes of job files and options, and which I/Os it then does."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any


def fio(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """fio's result, whatever its exit status."""
    return subprocess.run(["fio", *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=120)


def accepts(path: Path) -> str:
    """What fio has against a job file; empty if it parses."""
    done = fio("--parse-only", path)
    return "" if not done.returncode else done.stderr + done.stdout


def report(*arguments: str | Path, cwd: Path | None = None) -> dict[str, Any]:
    """fio's json+ report of a run."""
    done = fio("--output-format=json+", *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr + done.stdout
    out: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    return out


def totals(job: dict[str, Any]) -> list[tuple[int, int]]:
    """(I/Os, bytes) read, written and trimmed by one entry of a report's jobs."""
    return [(job[name]["total_ios"], job[name]["io_bytes"]) for name in ("read", "write", "trim")]


def reads_as(option: str, value: str) -> list[int]:
    """The numbers that fio's parser makes of ``option=value``, one per part."""
    done = fio("--parse-only", "--debug=parse", "--name=x", f"--{option}={value}")
    found, wanted = [], False
    for line in done.stdout.splitlines():
        if "handle_option=" in line:
            wanted = f"handle_option={option}," in line
        elif wanted and (number := re.search(r"ret=0, out=(\d+)", line)):
            found.append(int(number[1]))
    return found


def iolog(path: Path) -> list[tuple[int, int, int]]:
    """(op, offset, length) of every I/O in a log of fio's write_iolog, in order."""
    ops = {"read": 0, "write": 1, "trim": 2}
    lines = [line.split() for line in path.read_text().splitlines()]
    return [(ops[parts[2]], int(parts[3]), int(parts[4])) for parts in lines if len(parts) == 5 and parts[2] in ops]
