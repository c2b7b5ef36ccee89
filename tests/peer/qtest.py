"""QEMU's own virtio-blk-pci, driven register by register over the qtest protocol: no guest runs, the test is the processor."""

from __future__ import annotations

import mmap
import os
import socket
import subprocess
from collections.abc import Generator
from pathlib import Path
from typing import Any

from vblklab.memory import GuestMemory

Steps = Generator[Any, int, Any]
RAM_BYTES = 32 << 20
SLOT = 4
_ADDRESS, _DATA = 0xCF8, 0xCFC


class QemuDevice:
    """QEMU with one virtio-blk-pci and no guest; a bus for ``PciTransport``.  ``memory`` is its RAM, shared."""

    def __init__(self, folder: Path, options: str = "", disk_bytes: int = 8 << 20) -> None:
        """``options`` are virtio-blk-pci's, as on QEMU's command line."""
        self.image = folder / "disk.img"
        self.image.write_bytes(bytes(disk_bytes))
        ram = folder / "ram"
        ram.write_bytes(b"")
        os.truncate(ram, RAM_BYTES)
        halt = folder / "halt.bin"
        halt.write_bytes(b"\xf4" * (64 << 10))  # a firmware whose first instruction stops the processor for good
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(folder / "qtest"))
        listener.listen(1)
        listener.settimeout(30)
        self.log = folder / "qemu.log"
        command = ["qemu-system-x86_64", "-nodefaults", "-display", "none", "-machine", "pc,accel=tcg,memory-backend=ram", "-m", "32M"]
        command += ["-bios", str(halt)]
        command += ["-object", f"memory-backend-file,id=ram,size=32M,mem-path={ram},share=on"]
        command += [
            "-blockdev",
            f"driver=file,filename={self.image},node-name=disk",
            "-qtest",
            f"unix:{folder / 'qtest'}",
            "-qtest-log",
            "/dev/null",
        ]
        command += ["-device", f"virtio-blk-pci,drive=disk,addr={SLOT:02x}.0{',' if options else ''}{options}"]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            self._socket = listener.accept()[0]
        except TimeoutError:
            self._process.kill()
            self._process.wait()
            raise AssertionError(self.log.read_text()) from None
        finally:
            listener.close()
        self._socket.settimeout(30)
        self._answers = self._socket.makefile("r", encoding="ascii")
        with ram.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), RAM_BYTES)
        self.memory = GuestMemory(memoryview(self._map))
        self.doorbells: list[tuple[int, int, int]] = []

    def close(self) -> None:
        """End QEMU."""
        self._answers.close()
        self._socket.close()
        self._process.terminate()
        self._process.wait(30)

    def ask(self, line: str) -> int:
        """One command of the protocol; the number in its answer, 0 if there is none."""
        self._socket.sendall(line.encode() + b"\n")
        while not (said := self._answers.readline()).startswith("OK"):
            assert said.startswith("IRQ"), f"{line}: {said!r}; {self.log.read_text()}"
        words = said.split()
        return int(words[1], 0) if len(words) > 1 else 0

    # configuration space, by the two ports
    def _select(self, offset: int) -> int:
        self.ask(f"outl {_ADDRESS:#x} {0x80000000 | SLOT << 11 | offset & 0xFC:#x}")
        return _DATA + offset % 4

    def peek(self, offset: int, size: int) -> int:
        return self.ask(f"in{'bwl'[size // 2]} {self._select(offset):#x}")

    def poke(self, offset: int, value: int, size: int) -> None:
        self.ask(f"out{'bwl'[size // 2]} {self._select(offset):#x} {value:#x}")

    # the bus of a driver
    def config_read(self, offset: int, size: int) -> Steps:
        return self.peek(offset, size)
        yield

    def config_write(self, offset: int, value: int, size: int) -> Steps:
        self.poke(offset, value, size)
        return
        yield

    def load(self, gpa: int, size: int = 4) -> int:
        return self.ask(f"read{'bwlq'[size.bit_length() - 1]} {gpa:#x}")

    def store(self, gpa: int, value: int, size: int = 4) -> None:
        self.ask(f"write{'bwlq'[size.bit_length() - 1]} {gpa:#x} {value:#x}")

    def read(self, gpa: int, size: int = 4) -> Steps:
        return self.load(gpa, size)
        yield

    def write(self, gpa: int, value: int, size: int = 4) -> Steps:
        self.store(gpa, value, size)
        return
        yield

    def notify(self, queue: int, gpa: int, value: int) -> Steps:
        self.doorbells.append((queue, gpa, value))
        self.store(gpa, value, 2)
        return
        yield
