"""LinuxGuest: a stock Linux kernel under QEMU, with our disks and a way to run commands in it.  Rung L3."""

from __future__ import annotations

import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import ConfigError, GuestDied, GuestTimeout, NotHere
from .disks import GuestDisk
from .initramfs import initramfs
from .kernels import Kernel, find_kernel
from .process import Printing
from .programs import find_programs
from .qemu import ACCELS, Qemu, find_qemu, kvm_refused, remembered
from .vm import GuestVm, Listener

__all__ = ["LinuxGuest"]

_TRIAL_S = 30.0


@dataclass(frozen=True)
class LinuxGuest:
    """A recipe's guest side that is a real one: a Linux kernel with its own virtio_blk, booted by QEMU.

    ``kernel`` is ``auto``, ``cloud`` or ``generic`` (Debian's kinds), the beginning of a release or the path of a bzImage; ``modules`` are
    loaded besides the usual ones; ``cmdline`` is added to the kernel's.  ``accel`` is ``auto`` (KVM where it boots a stock kernel, else
    TCG), ``kvm`` or ``tcg``.  ``trace`` names QEMU trace events, patterns too; ``qemu_arguments`` go to QEMU as they are.

    >>> LinuxGuest(smp=4, memory_mb=1024)
    LinuxGuest(memory_mb=1024, smp=4)
    """

    kernel: str = "auto"
    memory_mb: int = 512
    smp: int = 2
    accel: str = "auto"
    machine: str = "q35"
    cmdline: str = ""
    modules: tuple[str, ...] = ()
    trace: tuple[str, ...] = ()
    boot_timeout_s: float = 120.0
    qemu: str = "qemu-system-x86_64"
    qemu_arguments: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("modules", "trace", "qemu_arguments"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise ConfigError(f"LinuxGuest {name}={value!r}", "give a tuple or list of texts")
            object.__setattr__(self, name, tuple(value))
        if self.accel not in ACCELS:
            raise ConfigError(f"LinuxGuest accel={self.accel!r}", f"use one of {', '.join(ACCELS)}")
        if not 256 <= self.memory_mb <= 1 << 20:
            raise ConfigError(f"LinuxGuest memory_mb={self.memory_mb}", "give 256 or more: the guest's programs take 90 of them")
        if not 1 <= self.smp <= 255 or self.boot_timeout_s <= 0:
            raise ConfigError(f"LinuxGuest smp={self.smp}, boot_timeout_s={self.boot_timeout_s}", "smp is 1 to 255, the time above 0")

    def __repr__(self) -> str:
        shown = [
            f"{name}={getattr(self, name)!r}" for name, field in self.__dataclass_fields__.items() if getattr(self, name) != field.default
        ]
        return f"LinuxGuest({', '.join(shown)})"

    def boot(
        self,
        disks: Sequence[GuestDisk] = (),
        *,
        console: Callable[[str], object] | None = None,
        progress: Callable[[float, str], object] | None = None,
    ) -> GuestVm:
        """Start QEMU with ``disks`` as /dev/vda, /dev/vdb …, and return when the guest takes commands.

        ``console(text)`` is called with all that the guest prints, ``progress(fraction, what)`` at each milestone of the boot, both from
        another thread.  Raises NotHere for what this machine lacks, ConfigError for disks that cannot be, GuestDied if QEMU or the kernel
        gives up, GuestTimeout after ``boot_timeout_s``.
        """
        if sys.platform != "linux":
            raise NotHere(f"a real guest needs Linux (this is {sys.platform})", "every lab can be finished on rung L0")
        qemu, kernel = find_qemu(self.qemu), find_kernel(self.kernel)
        for disk in disks:
            disk.check()
        initrd = initramfs(kernel, find_programs(), self.modules)
        accel = self._accel(qemu)
        return self._start(qemu, kernel, initrd, accel, disks, Listener(console, progress))

    def _accel(self, qemu: Qemu) -> str:
        if self.accel != "auto":
            return self.accel
        return "kvm" if not kvm_refused() and remembered(qemu, self._boots_under_kvm) else "tcg"

    def _boots_under_kvm(self) -> bool:
        with suppress(GuestDied, GuestTimeout):
            trial = replace(self, accel="kvm", trace=(), qemu_arguments=(), smp=1, boot_timeout_s=min(_TRIAL_S, self.boot_timeout_s))
            trial.boot().close()
            return True
        return False

    def _start(self, qemu: Qemu, kernel: Kernel, initrd: Path, accel: str, disks: Sequence[GuestDisk], listener: Listener) -> GuestVm:
        with ExitStack() as undo:
            ours, theirs = zip(*(socket.socketpair() for _ in range(3)), strict=True)
            for end in (*ours, *theirs):
                undo.callback(end.close)
            folder = Path(tempfile.mkdtemp(prefix="vblklab-guest-"))
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
            fds = tuple(end.fileno() for end in theirs)
            arguments = qemu.arguments(
                machine=self.machine,
                accel=accel,
                memory_mb=self.memory_mb,
                smp=self.smp,
                kernel=kernel.image,
                initrd=initrd,
                cmdline=self._command_line(accel),
                fds=(fds[0], fds[1], fds[2]),
            )
            for number, disk in enumerate(disks):
                arguments += disk.arguments(number, qemu.version)
            arguments += [*qemu.tracing(self.trace, folder / "trace.log"), *self.qemu_arguments]
            process = Printing(arguments, ours[0], fds, listener)
            for end in theirs:
                end.close()
            vm = GuestVm(process, ours[1], ours[2], folder, kernel=kernel.release, accel=accel)
            undo.pop_all()
        try:
            vm.wait_for_agent(self.boot_timeout_s)
        except BaseException:
            vm.close()
            raise
        listener.ready()
        return vm

    def _command_line(self, accel: str) -> str:
        # Under TCG all vCPUs read the host's counter; Linux cannot know, and would fall back to the slow HPET.  And it would panic
        # ("IO-APIC + timer doesn't work!") where a busy host lets no timer interrupt in while the kernel waits for some.
        clock = "tsc=reliable no_timer_check " if accel == "tcg" else ""
        return f"console=ttyS0 rdinit=/init panic=-1 {clock}{self.cmdline}".strip()
