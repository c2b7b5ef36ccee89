"""The capability probe: on which rungs of the ladder this machine stands, why, and how to gain the others.

A rung is available when this version of vblklab can run on it here and now.
"""

from __future__ import annotations

import html
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from .._version import __version__
from ..kvm import host as kvm_host
from ..machine.guest_run import recordings
from ..machine.live import live_missing
from ..peer.tracefs import tracing_missing

__all__ = ["Capabilities", "Finding", "Rung", "capabilities", "doctor"]

PACKAGES = ("numpy", "plotly", "jupyterlab", "ipywidgets", "anywidget", "kaleido", "cloudpickle", "tqdm")
_SIGNS = {True: ("✓", "#1a8a5c"), False: ("–", "#8a6d1a")}


@dataclass(frozen=True)
class Finding:
    """Something that vblklab can use here, or not: ``why`` says what was found, ``gain`` how to get what is missing."""

    name: str
    available: bool
    why: str
    gain: str = ""

    @property
    def line(self) -> str:
        """All of it in one line."""
        return f"{self.why}{self.gain and f'. To gain it: {self.gain}'}"


@dataclass(frozen=True)
class Rung(Finding):
    """One rung of the ladder, ``name`` L0 to L4."""

    title: str = ""


class Capabilities(list[Rung]):
    """The rungs from L0 to L4; ``tools`` are the programs beside them, ``system`` is what all of it runs on."""

    def __init__(self, rungs: list[Rung], tools: list[Finding], system: str) -> None:
        super().__init__(rungs)
        self.tools = tools
        self.system = system

    @property
    def verdict(self) -> str:
        """Which rungs are left, in one sentence."""
        here = [f"{rung.name} ({rung.title})" for rung in self if rung.available]
        *most, last = here or ["no rung"]
        return f"This machine offers {', '.join(most)}{' and ' if most else ''}{last}. Every lab can be finished on L0."

    def _lines(self) -> Iterator[tuple[Finding, str, str]]:
        for rung in self:
            yield rung, rung.name, rung.title
        for tool in self.tools:
            yield tool, "", tool.name

    def text(self, columns: int = 100) -> str:
        """Lines for a terminal that wide."""
        width = max(len(title) for _, _, title in self._lines())
        lines = textwrap.wrap(self.system, columns)
        for finding, name, title in self._lines():
            front = f"  {_SIGNS[finding.available][0]} {name:2}  {title:{width}}  "
            lines += [""] * (finding is self[0] or finding is self.tools[0])
            lines += textwrap.wrap(
                front + finding.line, max(columns, len(front) + 30), subsequent_indent=" " * len(front), break_on_hyphens=False
            )
        return "\n".join([*lines, "", *textwrap.wrap(self.verdict, columns)])

    def __str__(self) -> str:
        return self.text()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        cell = 'style="text-align:left;vertical-align:top;padding:3px 12px 3px 4px"'
        rows = []
        for finding, name, title in self._lines():
            sign, colour = _SIGNS[finding.available]
            rows.append(
                f'<tr><td {cell}><b style="color:{colour}">{sign}</b></td><td {cell}><b>{name}</b></td>'
                f'<td {cell[:-1]};white-space:nowrap">{html.escape(title)}</td>'
                f"<td {cell}>{html.escape(finding.line)}</td></tr>"
            )
        return f"<div>{html.escape(self.system)}</div><table>{''.join(rows)}</table><div>{html.escape(self.verdict)}</div>"


def capabilities() -> Capabilities:
    """Look at this machine and say which rungs it offers: ``vb.doctor()``."""
    rungs = [_simulated(), _recorded(), _live(), _guest(), _kvm()]
    return Capabilities(rungs, [_pictures(), _fio(), _tracefs()], _system())


doctor = capabilities
"""The name under which the package exports it."""


def _system() -> str:
    host = f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} CPUs"
    packages = ", ".join(f"{name} {_version(name) or 'missing'}" for name in PACKAGES)
    return f"vblklab {__version__} on {platform.python_implementation()} {platform.python_version()}, {host}; {packages}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


# -- the rungs ---------------------------------------------------------------------------------------------------------------


def _simulated() -> Rung:
    if sys.byteorder != "little":
        return Rung("L0", False, "this host is big-endian", "a little-endian host: x86-64, arm64, riscv64", title="simulated")
    return Rung("L0", True, "SimMachine needs nothing but Python and numpy", title="simulated")


def _recorded() -> Rung:
    names = recordings()
    title = "recorded traces"
    if not names:  # pragma: no cover - they are files of the package
        return Rung("L1", False, "the package's recordings are missing", "install vblklab again", title=title)
    return Rung("L1", True, f"vb.recorded() shows real guests and real KVM that were recorded elsewhere: {', '.join(names)}", title=title)


def _live() -> Rung:
    title = "live"
    missing = live_missing()
    if missing:
        return Rung("L2", False, missing, "Linux and a Python with os.eventfd and os.memfd_create", title=title)
    try:
        for fd in (os.eventfd(0, os.EFD_CLOEXEC), os.memfd_create("vblklab-doctor")):
            os.close(fd)
    except OSError as error:
        why = f"the kernel refuses eventfd or memfd ({os.strerror(error.errno or 0)})"
        return Rung("L2", False, why, "allow eventfd2 and memfd_create in this container's seccomp profile", title=title)
    if not _version("cloudpickle"):
        why = "eventfd and memfd work, but cloudpickle is missing, so only LiveMachine(device='thread') runs"
        return Rung("L2", True, why, "pip install cloudpickle", title=title)
    return Rung("L2", True, "Linux with eventfd and memfd: driver and device in two processes or threads", title=title)


def _guest() -> Rung:
    from ..errors import NotHere
    from ..peer.kernels import find_kernel
    from ..peer.programs import find_programs

    title = "real Linux guest"
    if live_missing():
        return Rung("L3", False, "our device can serve a guest only where the live machine works", "what L2 needs", title=title)
    found = {name: _program(name) for name in ("qemu-system-x86_64", "qemu-storage-daemon")}
    why = ", ".join(f"{name} {version or 'is missing'}" for name, version in found.items())
    if not all(found.values()):
        return Rung("L3", False, why, "apt install qemu-system-x86", title=title)
    try:
        kernel = find_kernel()
        find_programs()
    except NotHere as missing:
        return Rung("L3", False, f"{why}; {missing.what}", missing.remedy, title=title)
    return Rung("L3", True, f"Linux {kernel.release} for a guest; {why}", title=title)


def _kvm(device: str = kvm_host.DEVICE, modules: str = kvm_host.MODULES) -> Rung:
    title = "real KVM"
    if live_missing():
        return Rung("L4", False, "a real trap needs what the live machine needs", "what L2 needs", title=title)
    works, why, gain = kvm_host.found(device, modules)
    return Rung("L4", works, f"KvmMachine: {why}" if works else why, gain, title=title)


# -- the programs beside the ladder ------------------------------------------------------------------------------------------


def _pictures() -> Finding:
    """What kaleido will draw PNG, SVG and PDF with."""
    browser = _browser()
    name = "Chrome or Chromium"
    if browser and _version("kaleido"):
        return Finding(name, True, f"{browser}: export() writes PNG, SVG and PDF")
    if browser:
        return Finding(name, False, "kaleido is missing: export() writes only HTML and CSV", "pip install kaleido")
    return Finding(name, False, "not here: export() writes only HTML and CSV", "apt install chromium")


def _browser() -> str:
    try:
        from choreographer.browsers.chromium import Chromium

        found = Chromium.find_browser(skip_local=False) or ""
    except (ImportError, AttributeError, TypeError):  # another release of kaleido's helper
        names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
        found = next(filter(None, map(shutil.which, names)), "")
    return str(found) if found and os.access(found, os.X_OK) else ""


def _fio() -> Finding:
    version = _program("fio")
    if version:
        return Finding("fio", True, f"{version}; only the tests ask it, jobs run without it")
    return Finding("fio", False, "not here; only the tests ask it, jobs run without it", "apt install fio")


def _tracefs(mounts: str = "/proc/mounts") -> Finding:
    """Whether the host's kernel can be traced beside a run."""
    name = "kernel trace"
    what, remedy = tracing_missing(mounts)
    if what:
        return Finding(name, False, f"{what}; runs work without kernel_trace, vb.recorded() has two with it", remedy)
    return Finding(name, True, "KvmMachine(kernel_trace=True) records kvm, block and irq events in an instance of tracefs of its own")


def _program(name: str) -> str:
    """The version that a program says it is, "" without the program."""
    path = shutil.which(name)
    if path is None:
        return ""
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = re.search(r"\d+(\.\d+)+", said)
    return found[0] if found else "of unknown version"
