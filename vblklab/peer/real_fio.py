"""Our fio jobs, run by the real fio in a guest."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..errors import GuestCommandFailed, JobError, NotHere
from ..guest.fio import Fio
from ..guest.job import Job, load_jobs, parse_jobs, render_jobs
from .folders import SET_UP

__all__ = ["job_text", "run_fio"]

_JOB, _RESULT = "/tmp/vblk.fio", "/tmp/vblk.json"


class _Completed(Protocol):
    @property
    def status(self) -> int: ...
    @property
    def output(self) -> str: ...


class _Guest(Protocol):
    def run(self, command: str, *, input: bytes = ..., timeout_s: float | None = ..., check: bool = ...) -> _Completed: ...
    def put(self, data: bytes | Path, path: str) -> None: ...
    def get(self, path: str) -> bytes: ...


def job_text(job: Fio | Job | Sequence[Job] | str | Path, filename: str, extra: Mapping[str, object]) -> str:
    """The job file for the real fio; ``job`` is one of ours, a job file's text (with a line break or [) or its path."""
    match job:
        case Fio():
            jobs = job.jobs
        case Job():
            jobs = (job,)
        case str() if "\n" in job or job.lstrip().startswith("["):
            jobs = parse_jobs(job)
        case str() | Path():
            jobs = load_jobs(job)
        case _:
            jobs = tuple(job)
            if not all(isinstance(one, Job) for one in jobs):
                raise JobError(f"{job!r} is not a fio job", "give a vb.Fio, a job file's text or its path")
    return render_jobs(jobs, **{"ioengine": "libaio", "direct": 1, "thread": 1, "filename": filename, **extra})


def run_fio(
    guest: _Guest, job: Fio | Job | Sequence[Job] | str | Path, *, filename: str, timeout_s: float | None, extra: Mapping[str, object]
) -> dict[str, Any]:
    """Run ``job`` and parse its JSON+ output; see ``GuestVm.fio``."""
    guest.put(job_text(job, filename, extra).encode(), _JOB)
    command = f"command -v fio >/dev/null || exit 127; rm -f {_RESULT}; fio --output-format=json+ --output={_RESULT} {_JOB}"
    done = guest.run(command, timeout_s=timeout_s, check=False)
    if done.status == 127:
        raise NotHere("the guest has no fio", SET_UP)
    text = "" if guest.run(f"test -s {_RESULT}", check=False).status else guest.get(_RESULT).decode("utf-8", "replace")
    result = _parsed(text)
    wrong = [f"job {one['jobname']!r} ended with error {one['error']}" for one in (result or {}).get("jobs", ()) if one.get("error")]
    if done.status or wrong or result is None:
        said = [line for line in (done.output + text[: max(text.find("{"), 0)]).splitlines() if line.startswith(("fio:", "verify:"))]
        why = "; ".join([*said[:2], *wrong[:1]]) or next(iter(done.output.strip().splitlines()[-1:]), "it printed nothing")
        error = GuestCommandFailed(f"fio in the guest failed with status {done.status}", why, done.output + text[:2000] * (result is None))
        error.status = done.status
        raise error
    return result


def _parsed(text: str) -> dict[str, Any] | None:
    """fio may print complaints before the JSON text."""
    try:
        found = json.loads(text[text.index("{") :])
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
