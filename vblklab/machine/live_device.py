"""The device's half of a live machine: a thread or a process of its own, with the register file and a real store.

It talks to the driver's half through shared memory, eventfds and two sockets: ``mmio`` carries register accesses, ``control``
carries the start-up message, errors with their traceback, and at the end the log.
"""

from __future__ import annotations

import os
import pickle
import socket
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Generator
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import Any

from ..device import VirtioBlkDevice
from ..disk import Disk, Store
from ..errors import ConfigError, DeviceDied, VblkError
from ..events import WAIT
from ..memory import GuestMemory
from ..transport import Mmio, Pci
from .live_bus import ACCESS, answer, device_end
from .loop import LiveLoop

__all__ = [
    "Fds",
    "Setup",
    "child_setup",
    "device_died",
    "device_main",
    "fence",
    "recv_message",
    "run_device",
    "send_message",
    "short_turns",
    "start_child",
]

Steps = Generator[Any, int, Any]
_lock = threading.Lock()


def fence() -> None:
    """A full barrier: taking a lock is one atomic read-modify-write on every machine that CPython runs on."""
    _lock.acquire()
    _lock.release()


@dataclass(frozen=True)
class Fds:
    """What both halves share, as file descriptors.  ``memory`` and ``words`` are memfds, ``kicks`` and ``calls`` eventfds."""

    memory: int
    words: int
    kicks: tuple[int, ...]
    calls: tuple[int, ...]  # the line, then one for each MSI-X vector
    mmio: int
    control: int

    def all(self) -> tuple[int, ...]:
        return (self.memory, self.words, *self.kicks, *self.calls, self.mmio, self.control)


@dataclass(frozen=True)
class Setup:
    """The start-up message: parts by value, everything else as numbers."""

    device: VirtioBlkDevice
    engine: Any
    disk: Disk
    memory_bytes: int
    fds: Fds
    trace: bool
    spin_ns: int
    fast: str
    scratch: bool  # a disk without a file lives in the device's memory
    transport: Mmio | Pci
    vectors: int | None
    irqfd: bool = True  # writing ``fds.calls`` is the interrupt; else somebody who reads them raises it


def send_message(sock: socket.socket, message: Any) -> None:
    """One pickled message with its length before it."""
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    sock.sendall(struct.pack("<Q", len(data)) + data)


def recv_message(sock: socket.socket) -> Any:
    """The next message; EOFError if the other side is gone."""
    (length,) = struct.unpack("<Q", _exactly(sock, 8))
    return pickle.loads(_exactly(sock, length))


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = sock.recv(min(count - len(data), 1 << 20))
        if not part:
            raise EOFError("the other side closed the control socket")
        data += part
    return bytes(data)


def device_main(setup: Setup) -> None:
    """Serve until the driver's half says stop or goes away; every failure is reported on the control socket."""
    fds = setup.fds
    control = socket.socket(fileno=os.dup(fds.control))
    try:
        with control:
            try:
                _serve(setup, control)
            except BaseException as error:
                text = traceback.format_exc()
                try:
                    send_message(control, ("error", _portable(error), text))
                except OSError:
                    pass  # nobody is left to tell
    finally:
        if threading.current_thread() is threading.main_thread():
            sys.stdout.flush()


def device_died(error: BaseException) -> DeviceDied:
    """What the caller is told of an error in the device's own code."""
    return DeviceDied(f"the device raised {type(error).__name__}: {error}", "correct the device class; its traceback is in .traceback")


def _portable(error: BaseException) -> BaseException:
    """The error itself if the other side can unpickle it, else its words."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return device_died(error)
    return error


def _serve(setup: Setup, control: socket.socket) -> None:
    fds = setup.fds
    store = setup.disk.open()
    loop = LiveLoop("device:epoll_wait", trace=setup.trace, first_number=1000)
    mmio = socket.socket(fileno=os.dup(fds.mmio))
    try:
        words = shared(fds.words, 4096).cast("I")
        memory = GuestMemory(shared(fds.memory, setup.memory_bytes), fence=fence)
        device, engine = setup.device, setup.engine
        wire = device_end(setup.transport, setup.vectors, memory, device, fds.calls, words, irqfd=setup.irqfd)
        registers = wire.registers
        notifies = 0

        def notify(queue: int) -> Steps:
            nonlocal notifies
            notifies += 1
            yield from wire.notify(queue)

        run_device(loop, device, engine, store, notify)
        device.on_reset_done = wire.reset_done
        device.on_needs_reset = registers.needs_reset
        device.on_config_changed = registers.config_changed
        registers.on_notify = device.kick
        kicked = [0] * len(fds.kicks)

        def kick(number: int) -> None:
            count = _eventfd_count(fds.kicks[number])
            if count:
                kicked[number] += count
                device.kick(number)

        for number, fd in enumerate(fds.kicks):
            loop.watch(fd, lambda number=number: kick(number))  # type: ignore[misc]

        running = True

        def access() -> None:
            nonlocal running
            data = mmio.recv(ACCESS.size)
            if not data:
                running = False
                return
            mmio.send(answer(registers, data))

        def command() -> None:
            nonlocal running
            try:
                message = recv_message(control)
            except (EOFError, ConnectionError):
                running = False
                return
            if message[0] == "stop":
                running = False
                engine_left = engine.in_flight
                counters = {
                    "notifies": notifies,
                    "interrupts_suppressed": device.notify_decisions - notifies,
                    "eventfd_kicks": sum(kicked) + sum(map(_eventfd_count, fds.kicks)),
                }
                send_message(control, ("result", loop.log, counters, engine_left))
            elif message[0] == "resize":
                try:
                    device.check_resize()
                    store.resize(message[1])
                except VblkError as error:
                    send_message(control, ("error", error, ""))
                    return
                device.resize(message[1] >> 9)
                send_message(control, ("ok",))

        loop.watch(mmio.fileno(), access)
        loop.watch(control.fileno(), command)

        def call(queue: int) -> None:
            nonlocal notifies
            notifies += 1
            wire.call(queue)

        if setup.trace:
            explanation = ["plain path: trace points are recorded; LiveMachine(trace=False) measures without them"]
        else:
            device.batch_path(call, fast=setup.fast)
            explanation = device.explain()
        if setup.spin_ns:
            loop.spin_ns = setup.spin_ns
            loop.spin = device.poll_queues
        send_message(control, ("ready", store.size, store.read_only, explanation))
        while running:
            loop.turn(1.0)
    finally:
        loop.close()
        mmio.shutdown(socket.SHUT_RDWR)  # a thread's end is open on the other side too, which must not wait for an answer
        mmio.close()
        setup.engine.close()
        store.close()


def _eventfd_count(fd: int) -> int:
    """What was added to the eventfd since it was last read, 0 if nothing."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def run_device(loop: LiveLoop, device: VirtioBlkDevice, engine: Any, store: Store, notify: Callable[[int], Steps]) -> None:
    """Put a device with what lies below it into a loop, as its iothread; the loop may poll it."""

    def run() -> Steps:
        yield WAIT
        yield from device.run()

    context = loop.add("iothread", run())
    engine.attach(None, store, context.notify)
    device.attach(engine, store.size >> 9, read_only=store.read_only, notify=notify, wake=context.notify)
    if engine.event_fd is not None:
        loop.watch_eventfd(engine.event_fd, context.notify)
    loop.spin_begin, loop.spin_end = device.poll_begin, device.poll_end


_SHORT_TURN_S = 1e-4
_short_turns = {"users": 0, "before": 0.0}
_short_turns_lock = threading.Lock()


def short_turns() -> Callable[[], None]:
    """Let threads of this interpreter hand its lock over every 0.1 ms, not every 5 ms, until the returned function is called.

    A thread that polls gives the lock up only when it is asked to, and the other needs it after every system call.
    """
    with _short_turns_lock:
        if not _short_turns["users"]:
            _short_turns["before"] = sys.getswitchinterval()
            sys.setswitchinterval(min(_SHORT_TURN_S, _short_turns["before"]))
        _short_turns["users"] += 1

    def end() -> None:
        with _short_turns_lock:
            _short_turns["users"] -= 1
            if not _short_turns["users"]:
                sys.setswitchinterval(_short_turns["before"])

    return end


_UNTRACKED: Any = {"trackfd": False} if sys.version_info >= (3, 13) else {}


def shared(fd: int, length: int) -> memoryview:
    """A shared mapping of a file.  It may be looked at after its machine's end, so where Python can it keeps no descriptor open."""
    return memoryview(mmap(fd, length, **_UNTRACKED))


def start_child(
    module: str, control: socket.socket, number: int, setup: Any, pass_fds: tuple[int, ...], *, what: str, remedy: str
) -> subprocess.Popen[bytes]:
    """Run ``module`` in a fresh interpreter and send it ``setup`` by value, classes from a notebook's cell too.

    ``number`` is the child's end of ``control``.  Ctrl-C is for this process, which ends the child in order.
    """
    import cloudpickle

    try:
        payload = cloudpickle.dumps(setup)
    except Exception as error:
        raise ConfigError(f"{what} cannot travel to another process: {type(error).__name__}: {error}", remedy) from None
    package_parent = str(Path(__file__).resolve().parent.parent.parent)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([package_parent, *filter(None, [os.environ.get("PYTHONPATH")])])}
    command = [sys.executable, "-m", module, str(number)]
    child = subprocess.Popen(command, pass_fds=pass_fds, stdin=subprocess.DEVNULL, start_new_session=True, env=env)
    send_message(control, (sys.path, payload))
    return child


def child_setup(argv: list[str], refuse: Callable[[Exception], tuple[Any, ...]]) -> Any:
    """In the child: what ``start_child`` sent; None if it is gone, or if ``refuse``'s message told it that this cannot be made here."""
    control = socket.socket(fileno=int(argv[0]))
    try:
        path, payload = recv_message(control)
    except EOFError:
        return None
    sys.path[:] = path
    try:
        setup = pickle.loads(payload)
    except Exception as error:
        send_message(control, refuse(error))
        return None
    control.detach()
    return setup


if __name__ == "__main__":
    _setup = child_setup(sys.argv[1:], lambda error: ("error", _portable(error), traceback.format_exc()))
    if _setup is not None:
        device_main(_setup)
