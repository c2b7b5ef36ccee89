"""One run of fio in a real guest, live or from a file: ``vb.recorded(name)`` is rung L1, for machines without a guest or KVM."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .._data import DATA
from ..errors import ConfigError, TraceError
from ..events import STEPS
from ..stats import DirStat, Histogram, JobStat
from ..trace.correlate import Correlator
from ..trace.guest import Joined
from ..trace.recording import GuestRecording
from ..trace.run import Run
from .live_recording import FORM as LIVE_FORM
from .live_recording import LiveRecording

__all__ = ["GuestRun", "job_stats", "recorded", "recordings"]

_FOLDER, _FORM, _RUNG = "recorded", 1, "L1 recorded"
_TRACE_KEPT = 50_000
_GUEST_STEPS = ("D1", "D2", "D3", "D4", "U5", "U6", "U7")
_DEVICE_STEPS = ("D5", "U3", "U4")


@dataclass(frozen=True)
class GuestRun:
    """All that a Run is made of, as it was taken down."""

    title: str
    fio: dict[str, Any]
    recording: GuestRecording | None
    provenance: dict[str, str]
    recipe: dict[str, str]
    notes: list[str]
    counters: dict[str, int]

    def run(self, rung: str) -> Run:
        """The Run, with its steps if both sides were recorded."""
        jobs = job_stats(self.fio)
        correlator = Correlator()
        notes = list(self.notes)
        provenance = self.provenance | {"rung": rung, "tracing": "off: steps are not timed in this run"}
        joined: Joined | None = None
        if self.recording is not None:
            text, joined = self.recording.read()
            correlator.take(joined.rows)
            lost = f", {text.lost:,} lost" if text.lost else ""
            provenance["tracing"] = (
                f"{len(text.records):,} entries of the guest's ftrace{lost}; steps of {len(joined.rows):,} of {joined.ios:,} I/Os; "
                "what recording costs is in the times"
            )
            provenance["clock"] = str(joined.clock)
            if unseen := [step.name for step, seen in zip(STEPS, np.any(np.array(joined.rows)[:, :-1], axis=0), strict=True) if not seen]:
                notes.append(f"steps {', '.join(unseen)}: neither recording sees where they begin; their time is in the step before")
        return Run(
            title=self.title,
            rung=rung,
            simulated=False,
            provenance=provenance,
            recipe=self.recipe,
            notes=notes,
            jobs=jobs,
            counters=self.counters,
            rows=correlator.rows,
            durations=correlator.durations,
            duration_ns=max((job.end_ns for job in jobs), default=0),
            trace=joined.events[:_TRACE_KEPT] if joined is not None else None,
            step_kinds=self._kinds() if joined is not None else {},
        )

    def _kinds(self) -> dict[str, str]:
        guest = "emulated" if "TCG" in self.provenance.get("kvm", "") else "kernel/hardware"
        device = "qemu" if self.recording is not None and self.recording.qemu_log else "python"
        kinds = dict.fromkeys((step.name for step in STEPS), "kernel/hardware")
        return kinds | dict.fromkeys(_GUEST_STEPS, guest) | dict.fromkeys(_DEVICE_STEPS, device)

    def save(self, path: str | Path) -> None:
        """Write it as compressed JSON."""
        recording = self.recording.only_the_disk().as_json() if self.recording is not None else None
        kept = {**vars(self), "recording": recording, "form": _FORM}
        Path(path).write_bytes(gzip.compress(json.dumps(kept).encode(), mtime=0))

    @classmethod
    def of_json(cls, kept: dict[str, Any]) -> GuestRun:
        """What ``save`` wrote; KeyError, TypeError or ValueError for anything else."""
        recording = kept.pop("recording")
        return cls(recording=None if recording is None else GuestRecording.of_json(recording), **kept)

    @classmethod
    def load(cls, path: Path) -> GuestRun:
        """Read what ``save`` wrote; TraceError for anything else."""
        run = _load(path)
        if not isinstance(run, cls):
            raise TraceError(f"recording {str(path)!r} is no guest's", "vb.recorded() reads it")
        return run


def _load(path: Path) -> GuestRun | LiveRecording:
    try:
        kept = json.loads(gzip.decompress(path.read_bytes()))
        form = kept.pop("form")
        if form == LIVE_FORM:
            return LiveRecording.of_json(kept)
        if form != _FORM:
            raise ValueError("another form")
        return GuestRun.of_json(kept)
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
        raise TraceError(f"recording {str(path)!r} cannot be read: {why}", "give a file that a machine's save() wrote") from None


def recordings() -> dict[str, Path]:
    """The package's own recordings: name to file."""
    return {path.name.removesuffix(".run.gz"): path for path in sorted((DATA / _FOLDER).glob("*.run.gz"))}


def recorded(name: str | Path) -> Run:
    """A run that was recorded on another machine (rung L1): one of vblklab's own by name, or what a machine's ``save()`` wrote by path.

    ConfigError lists the names for one that is not there.
    """
    own = recordings()
    path = own.get(str(name), Path(name))
    if not path.is_file():
        raise ConfigError(f"no recording {str(name)!r}", f"there are {', '.join(own)}, or give the path of a file")
    recording = _load(path)
    return recording.run(_RUNG, job_stats) if isinstance(recording, LiveRecording) else recording.run(_RUNG)


def job_stats(result: Mapping[str, Any]) -> list[JobStat]:
    """The jobs of fio's json+ output as ours."""
    stats = []
    for number, job in enumerate(result["jobs"]):
        stat = JobStat(str(job["jobname"]), number, {k: str(v) for k, v in job.get("job options", {}).items()})
        stat.error = int(job["error"])
        for name in ("read", "write", "trim"):
            _direction(getattr(stat, name), job[name])
        stat.end_ns = max(int(job[name]["runtime"]) for name in ("read", "write", "trim")) * 1_000_000
        stats.append(stat)
    return stats


def _direction(into: DirStat, side: dict[str, Any]) -> None:
    into.ios, into.bytes = int(side["total_ios"]), int(side["io_bytes"])
    into.short_ios, into.drop_ios = int(side.get("short_ios", 0)), int(side.get("drop_ios", 0))
    into.clat = Histogram.of_bins(side["clat_ns"])
