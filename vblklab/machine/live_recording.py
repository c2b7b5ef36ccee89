"""A live run in a file: ``vm.save(path)`` writes its log, ``vb.recorded(path)`` reads it anew and gives the Run."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..trace.fio_json import fio_json
from ..trace.run import Run
from .live_log import LiveLog

__all__ = ["FORM", "LiveRecording"]

FORM = 2


@dataclass(frozen=True)
class LiveRecording:
    """The Run without what its log says again, and the log."""

    about: dict[str, Any]
    log: LiveLog

    @classmethod
    def of(cls, run: Run, log: LiveLog) -> LiveRecording:
        """What is kept of a run that has just ended."""
        names = ("title", "provenance", "recipe", "notes", "counters", "duration_ns", "interrupted", "step_kinds")
        about = {name: getattr(run, name) for name in names}
        return cls(about | {"fio": fio_json(run)}, log)

    def run(self, rung: str, job_stats: Any) -> Run:
        """The Run again: its steps are found anew."""
        about = {"step_kinds": {}} | self.about
        correlator = self.log.correlate()
        about["provenance"] = about["provenance"] | {"rung": f"{rung}, {about['provenance']['rung']}"}
        return Run(
            rung=rung,
            simulated=False,
            jobs=job_stats(about.pop("fio")),
            rows=correlator.rows,
            durations=correlator.durations,
            trace=self.log.trace(),
            split=self.log.split(correlator),
            **about,
        )

    def save(self, path: str | Path) -> None:
        """Write it as compressed JSON; each time is the difference to the one before."""
        entries, before = [], 0
        for t, number, ev in self.log.entries:
            entries.append([t - before, number, *ev])
            before = t
        log = {"names": self.log.names, "threads": self.log.threads, "kernel": self.log.kernel, "entries": entries}
        log |= {"whole_ns": self.log.whole_ns} if self.log.whole_ns is not None else {}
        text = json.dumps({"form": FORM, "about": self.about, "log": log}, separators=(",", ":"))
        Path(path).write_bytes(gzip.compress(text.encode(), mtime=0))

    @classmethod
    def of_json(cls, kept: dict[str, Any]) -> LiveRecording:
        """What ``save`` wrote; KeyError, TypeError or ValueError for anything else."""
        entries, t = [], 0
        for step, number, key, *args in kept["log"]["entries"]:
            t += int(step)
            entries.append((t, int(number), (str(key), *map(int, args))))
        log = kept["log"]
        names = {int(number): str(name) for number, name in log["names"].items()}
        whole_ns = int(log["whole_ns"]) if "whole_ns" in log else None
        return cls(dict(kept["about"]), LiveLog(entries, names, bool(log["threads"]), bool(log["kernel"]), whole_ns))
