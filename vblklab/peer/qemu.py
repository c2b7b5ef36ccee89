"""QEMU: which one is here, whether KVM boots a stock kernel here, and the arguments that every guest shares."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..errors import ConfigError, NotHere
from .folders import cache_folder, write_atomically

__all__ = ["ACCELS", "AGENT_PORT", "KILL_PORT", "Qemu", "find_qemu", "kvm_refused", "remembered"]

ACCELS = ("auto", "kvm", "tcg")
AGENT_PORT, KILL_PORT = "vblklab.agent", "vblklab.kill"
_MACHINES = ("q35", "pc")


@dataclass(frozen=True)
class Qemu:
    """A QEMU program and its version."""

    path: str
    version: tuple[int, ...]

    def arguments(
        self, *, machine: str, accel: str, memory_mb: int, smp: int, kernel: Path, initrd: Path, cmdline: str, fds: tuple[int, int, int]
    ) -> list[str]:
        """Everything but the disks; ``fds`` are the theirs-ends of the console, the agent's port and the kill port."""
        if machine not in _MACHINES:
            raise ConfigError(f"machine={machine!r}", f"use {' or '.join(_MACHINES)}")
        cpu, speed = ("host", ["kvm"]) if accel == "kvm" else ("max", ["tcg,thread=multi"])
        console, agent, killer = fds
        return [
            *(self.path, "-name", "vblklab", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-object", f"memory-backend-memfd,id=memory,size={memory_mb}M,share=on"),  # vhost-user hands this memory to the device
            *("-machine", f"{machine},memory-backend=memory", "-m", f"{memory_mb}M", "-smp", str(smp), "-cpu", cpu, "-accel", *speed),
            *("-kernel", str(kernel), "-initrd", str(initrd), "-append", cmdline),
            *("-chardev", f"socket,id=console,fd={console}", "-serial", "chardev:console"),
            *("-chardev", f"socket,id=agent,fd={agent}", "-chardev", f"socket,id=kill,fd={killer}"),
            *("-device", "virtio-serial-pci,id=ports,addr=0x1e"),
            *("-device", f"virtserialport,bus=ports.0,chardev=agent,name={AGENT_PORT}"),
            *("-device", f"virtserialport,bus=ports.0,chardev=kill,name={KILL_PORT}"),
        ]

    def tracing(self, events: tuple[str, ...], log: Path) -> list[str]:
        """Arguments that write trace events, names or patterns with ``*``, to ``log``, each line as ``pid@seconds.microseconds:name …``."""
        known = _trace_events(self.path)
        for event in events:
            pattern = re.compile(re.escape(event).replace(r"\*", ".*"))
            if not any(map(pattern.fullmatch, known)):
                version = ".".join(map(str, self.version))
                raise ConfigError(f"QEMU {version} has no trace event {event!r}", "see qemu-system-x86_64 -trace help")
        enabled = [word for event in events for word in ("-trace", f"enable={event}")]
        return [*enabled, "-D", str(log), "-msg", "timestamp=on"] if events else []


def find_qemu(name: str = "qemu-system-x86_64") -> Qemu:
    """The program of that name or path; NotHere with the package that brings it."""
    path = shutil.which(name)
    if path is None:
        raise NotHere(f"no program {name} here, which runs a real guest", "on Debian: apt install qemu-system-x86")
    return Qemu(path, _version(path))


@lru_cache
def _version(path: str) -> tuple[int, ...]:
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"\d+(\.\d+)+", said)
    if found is None:
        raise ConfigError(f"{path} does not say its version", "give a QEMU")
    return tuple(map(int, found[0].split(".")))


@lru_cache
def _trace_events(path: str) -> frozenset[str]:
    return frozenset(subprocess.run([path, "-trace", "help"], capture_output=True, text=True, check=True).stdout.split())


def kvm_refused(device: str = "/dev/kvm", modules: str = "/sys/module") -> str:
    """Why KVM would not boot a stock kernel here, as far as one sees from outside; nothing if it may."""
    if not os.access(device, os.R_OK | os.W_OK):
        return f"{device} is not there for you"
    if Path(modules, "kvm_pvm").is_dir():
        return "this KVM (kvm_pvm) emulates a guest's kernel code and does not boot a stock kernel"
    return ""


def remembered(qemu: Qemu, trial: Callable[[], bool]) -> bool:
    """Whether a stock kernel boots under this host's KVM: ``trial()``'s answer, asked once per host kernel and QEMU."""
    path = cache_folder() / "kvm.json"
    here = f"{platform.release()} {platform.node()} {'.'.join(map(str, qemu.version))}"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(known, dict) and isinstance(known.get(here), bool):
            return bool(known[here])
    except (OSError, ValueError):
        known = {}
    answer = trial()
    write_atomically(path, [json.dumps({here: answer}).encode()])
    return answer
