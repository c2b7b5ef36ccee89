"""Chapter 08: a real Linux on a device from a notebook's cell; where there is no QEMU, a recording answers in its place."""

from __future__ import annotations

import atexit
import contextlib
import gzip
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .._data import DATA
from ..device import VirtioBlkDevice
from ..errors import ConfigError, GuestCommandFailed, GuestTimeout, NotHere
from ..peer import LinuxGuest
from ..trace.run import Run
from .answers import number, one_of
from .check import Verdict, prediction, question, right, wrong

__all__ = ["LinuxOn", "linux_on", "linux_run", "scratch_image"]

RECORDING = "recorded/chapter_08.json.gz"
_WHOSE = one_of(ours="python our mine", qemu="c qemus")
_ANSWER = one_of(yes="y survives lives", no="n dies panics")


def linux_on(
    device: Any = None,
    disk: Any = None,
    *,
    console: bool = False,
    recording: str | Path | None = None,
    boot_timeout_s: float = LinuxGuest.boot_timeout_s,
) -> LinuxOn:
    """Boot a stock Linux whose /dev/vda is ``device``, served from a process of its own over ``disk``.

    ``console=True`` shows what the kernel prints, as it comes.  Where this machine has no QEMU or no kernel for it, or the guest has not
    booted after ``boot_timeout_s``, says so in one line and answers from a recording of the same commands; NotHere for a device without.
    """
    guest = LinuxGuest(boot_timeout_s=boot_timeout_s)
    return LinuxOn(VirtioBlkDevice if device is None else device, disk, Path(recording or DATA / RECORDING), guest, console)


def linux_run(recipe: Any, recording: str) -> Any:
    """Boot a recipe with a real guest and run its job; the recorded run of that name where no guest boots here in time, and says so."""
    from ..machine.guest_run import recorded
    from ..machine.vhost_user import VhostUserMachine

    if LinuxOn._open is not None:
        LinuxOn._open.close()
    try:
        with _up_in_time():
            vm = recipe.boot(VhostUserMachine())
    except NotHere as missing:
        run = recorded(recording)
        LinuxOn.say_missing(missing, f"{run.title}, {run.provenance['date'][:10]}")
        return run
    with vm:
        return vm.run()


@contextlib.contextmanager
def _up_in_time() -> Iterator[None]:
    """A guest that takes too long to boot is one that this machine does not have."""
    try:
        yield
    except GuestTimeout as slow:
        raise NotHere(slow.what, f"{slow.remedy}; run the cell again when this machine has less to do") from None


def scratch_image(size: int) -> str:
    """The path of a fresh image of ``size`` zero bytes, which goes when this Python ends."""
    folder = tempfile.mkdtemp(prefix="vblk-image-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder, "disk.img")
    with path.open("wb") as file:
        file.truncate(size)
    return str(path)


class LinuxOn:
    """A guest and the device below it, real or recorded (``real`` says which).  ``close()`` ends both; so does the next one."""

    _open: LinuxOn | None = None
    _said_missing = ""
    transcripts: dict[str, list[dict[str, Any]]] = {}  # noqa: RUF012 - what was asked in this process, for a new recording

    def __init__(self, device: Any, disk: Any, recording: Path, guest: LinuxGuest, console: bool = False) -> None:
        if LinuxOn._open is not None:
            LinuxOn._open.close()
        self.name = device.__name__ if isinstance(device, type) else repr(device)
        self._asked = self.transcripts.setdefault(self.name, [])
        self._replay: list[dict[str, Any]] | None = None
        self._at = -1
        self.guest: Any
        self.served: Any
        self.guest = self.served = None
        try:
            with _up_in_time():
                self._boot(device, disk, guest, console)
            self.provenance = f"{self.run('uname -r').strip()} under QEMU ({self.guest.accel}), now"
        except NotHere as missing:
            self.close()
            self._read(recording, missing)
        LinuxOn._open = self

    def _boot(self, device: Any, disk: Any, guest: LinuxGuest, console: bool) -> None:
        from ..machine.serve import serve
        from ..peer import VhostUserDisk

        self.served = serve(device, disk, show=_show)
        bar = _Bar()
        try:
            shown: dict[str, Any] = {"console": _print} if console else {"progress": bar}
            self.guest = guest.boot([VhostUserDisk(self.served.socket)], **shown)
        except BaseException:
            bar.end()
            self.served.close()
            raise

    def _read(self, recording: Path, missing: NotHere) -> None:
        try:
            kept = json.loads(gzip.decompress(recording.read_bytes()))
            self._replay = list(kept["sessions"][self.name])
        except (OSError, ValueError, KeyError):
            raise missing from None
        self.provenance = f"recorded: {kept['provenance']}"
        self.say_missing(missing, self.provenance)

    @classmethod
    def say_missing(cls, missing: NotHere, instead: str) -> None:
        """Once what this machine lacks, and each time what answers in its place."""
        if cls._said_missing != str(missing):
            cls._said_missing = str(missing)
            print(missing)
        print(f"A recording answers. {instead}")

    @property
    def real(self) -> bool:
        """Whether a guest runs."""
        return self._replay is None

    def __repr__(self) -> str:
        return f"<Linux on {self.name}: {self.provenance}>"

    def _answer(self, kind: str, what: str, ask: Any) -> Any:
        """The answer of the guest, written down; or the recorded one."""
        if self._replay is None:
            before = len(self.served.exceptions)
            answer = ask()
            self._asked.append({"kind": kind, "what": what, "answer": answer})
            if told := self.served.exceptions[before:]:
                self._asked[-1]["told"] = [_without_paths(text) for text in told]
            return answer
        fits = [at for at, each in enumerate(self._replay) if each["kind"] == kind and each["what"] == what]
        if fits:  # the next one in the chapter's order, or the last again: cells may run twice
            self._at = next((at for at in fits if at > self._at), fits[-1])
            for text in self._replay[self._at].get("told", ()):
                _show(text)
            return self._replay[self._at]["answer"]
        raise NotHere(
            f"the recording has no answer to {what!r}", "it knows the chapter's own commands, in their order; `make guest` brings a guest"
        )

    def run(self, command: str) -> str:
        """What a shell command in the guest printed; its exit status, if that is not 0, on a last line."""

        def ask() -> str:
            done = self.guest.run(command, timeout_s=120, check=False)
            text = done.output if not done.output or done.output.endswith("\n") else done.output + "\n"
            return str(text) + (f"(exit status {done.status})\n" if done.status else "")

        output: str = self._answer("run", command, ask)
        return output

    def fio(self, job: Any, during: Any = None) -> dict[str, float]:
        """Run a job of ours with the real fio: I/Os, errors, IOPS, completion latency in µs.  ``during()`` is called while it runs."""
        from concurrent.futures import ThreadPoolExecutor

        def ask() -> dict[str, float]:
            with ThreadPoolExecutor(1) as pool:
                future = pool.submit(self.guest.fio, job)
                if during is not None:
                    during()
                return _summary(future.result())

        answer: dict[str, float] = self._answer("fio", repr(job), ask)
        return answer

    def counters(self) -> dict[str, int]:
        """What the device served so far: requests, kicks, notifies."""
        counts: dict[str, int] = self._answer("counters", "", self._counters)
        return counts

    def _counters(self) -> dict[str, int]:
        counts: dict[str, int] = self.served.counters()
        return counts

    def kill(self) -> None:
        """End the device's process with SIGKILL, and start another in its place."""
        if self.real:
            self.served.kill()
            self.served.start()

    def resize(self, size: int) -> None:
        """Give the disk another size in bytes."""
        if self.real:
            self.served.resize(size)

    def close(self) -> None:
        """End the guest and the device."""
        for part in (self.guest, self.served):
            if part is not None:
                part.close()
        if LinuxOn._open is self:
            LinuxOn._open = None


def _show(text: str) -> None:
    """A device's traceback, in the notebook."""
    print(f"the device raised, and its request failed with IOERR:\n{text}", file=sys.stdout, flush=True)


def _without_paths(text: str) -> str:
    """A traceback as it would be from anywhere."""
    return text.replace(f"{Path(__file__).parent.parent.parent}{os.sep}", "")


def _print(text: str) -> None:
    with contextlib.suppress(ValueError, OSError):
        print(text, end="", flush=True)


class _Bar:
    """The boot's milestones as a line that grows."""

    def __init__(self) -> None:
        self._shown = ""

    def __call__(self, fraction: float, what: str) -> None:
        line = f"boot {fraction:4.0%} {what}"
        with contextlib.suppress(ValueError, OSError):
            print(f"\r{line:<{len(self._shown)}}", end="", flush=True)
        self._shown = line
        if fraction >= 1:
            self.end()

    def end(self) -> None:
        """What is printed next stands on a line of its own."""
        if self._shown:
            _print("\n")
        self._shown = ""


def _summary(result: dict[str, Any]) -> dict[str, float]:
    jobs = result["jobs"]
    sides = [job[side] for job in jobs for side in ("read", "write") if job[side]["total_ios"]]
    ios = sum(side["total_ios"] for side in sides)
    if not ios:
        raise GuestCommandFailed("fio did no I/O", "give the job number_ios or a size")
    return {
        "ios": ios,
        "errors": sum(job["error"] for job in jobs) + sum(job.get("total_err", 0) for job in jobs),
        "iops": round(sum(side["iops"] for side in sides), 1),
        "clat_mean_us": round(sum(side["clat_ns"]["mean"] * side["total_ios"] for side in sides) / ios / 1000, 1),
    }


# -- questions ---------------------------------------------------------------------------------------------------------------


@question("08", "How many bytes has the guest's disk?")
def disk_bytes(size: Any, linux: Any) -> Verdict:
    answer = number(size, "bytes")
    truth = int(_session(linux).run("cat /sys/block/vda/size")) * 512
    if answer == truth:
        return right("The driver read `capacity` from the device's configuration space, in sectors of 512 bytes.")
    if answer * 512 == truth or answer * 1024 == truth:
        return wrong("That is the number in another unit: /proc/partitions counts blocks of 1,024 bytes.")
    return wrong("Look at the line of `vda` in /proc/partitions; its blocks have 1,024 bytes each.")


@prediction("08", "Will the guest live when its device raises an exception?", read=_ANSWER)
def predict_exception(guess: str, linux: Any) -> Verdict:
    session = _session(linux)
    lives = "alive" in session.run("echo alive")
    why = "It lives: the request ended with VIRTIO_BLK_S_IOERR, and to Linux that is a disk with a bad sector."
    if not lives:
        return wrong("This guest does not answer any more.")
    return right(why) if guess == "yes" else wrong(why)


@prediction("08", "For how many of the four broken devices will Linux log an error?", read=number)
def predict_bugs(guess: float, logged: Any) -> Verdict:
    try:
        told = [name for name, text in logged.items() if int(str(text).split()[0])]
    except (AttributeError, ValueError, IndexError):
        raise ConfigError("these are no counts of log lines", "give the `logged` that the cells above filled") from None
    if len(logged) < 4:
        return wrong(f"Only {', '.join(logged) or 'none'} ran so far: run the cells above, all four.")
    why = f"Linux logged an error for {', '.join(told) or 'none of them'}. A wrong answer that comes in good order looks like a right one."
    return right(why) if guess == len(told) else wrong(why)


@prediction("08", "How many errors will fio see when the device is killed under it?", read=number)
def predict_kill(guess: float, result: Any) -> Verdict:
    if not isinstance(result, dict) or "errors" not in result:
        raise ConfigError("this is no result of fio", "give what `linux.fio(...)` returned")
    counted = f"fio counted {result['errors']:,.0f} errors in {result['ios']:,.0f} I/Os"
    why = f"{counted}: QEMU waited, and the next process took up what was in flight."
    return right(why) if guess == result["errors"] else wrong(why)


@prediction("08", "Whose device does its own work, D5 and U3, in less time: ours or QEMU's?", read=_WHOSE)
def predict_steps(guess: str, ours: Any, qemus: Any) -> Verdict:
    work = []
    for run in (ours, qemus):
        steps = {stat.step: stat for stat in run.steps} if isinstance(run, Run) else {}
        if not steps or not steps["D5"].count:
            raise ConfigError("these are no runs with timed steps", "give the two that vb.linux_run() returned, ours first")
        work.append((steps["D5"].p50_ns + steps["U3"].p50_ns) / 1000)
    quicker = "ours" if work[0] < work[1] else "qemu"
    why = f"In the middle of all I/Os ours took {work[0]:.1f} µs for the two steps, QEMU's {work[1]:.1f} µs."
    return right(why) if guess == quicker else wrong(why)


def _session(linux: Any) -> Any:
    if not isinstance(linux, LinuxOn):
        raise ConfigError(f"{linux!r} is no guest", "give what vb.linux_on() returned")
    return linux
