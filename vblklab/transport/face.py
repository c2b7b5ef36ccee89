"""The driver's face of a transport: what a virtio driver asks of it, whichever it is.  Linux: ``struct virtio_config_ops``."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol

from ..errors import VirtioError
from ..ring import PackedLayout, SplitLayout
from ..spec.virtio import Status

__all__ = ["DriverSide", "Transport"]

Steps = Generator[Any, int, Any]


class Transport(Protocol):
    """Every method is a walk over registers or messages; errors of the device are raised as VirtioError.

    ``features`` are feature bits that the transport understands by itself, whatever the driver does.
    """

    features: int

    def probe(self, device_id: int) -> Steps: ...

    def status(self) -> Steps: ...

    def add_status(self, bits: int) -> Steps: ...

    def reset(self, overtaken: Callable[[], bool] = ...) -> Steps: ...

    def device_features(self) -> Steps: ...

    def accept_features(self, features: int) -> Steps: ...

    def queue_size_max(self, queue: int) -> Steps: ...

    def setup_queue(self, queue: int, layout: SplitLayout | PackedLayout) -> Steps: ...

    def reset_queue(self, queue: int) -> Steps: ...

    def find_vqs(self, layouts: Sequence[SplitLayout | PackedLayout], *, polled: bool = False) -> Steps: ...

    def interrupt(self, vector: int = 0) -> Generator[Any, int, tuple[bool, Sequence[int]]]: ...

    def notify(self, queue: int, data: int | None = None) -> Steps: ...

    def read_config(self, offset: int, length: int) -> Steps: ...

    def write_config(self, offset: int, data: bytes) -> Steps: ...


def _never() -> bool:
    return False


class DriverSide:
    """What a driver does through registers, whichever they are; a transport says how each is reached."""

    features = 0

    def status(self) -> Steps:
        """The device status."""
        raise NotImplementedError

    def _write_status(self, bits: int) -> Steps:
        raise NotImplementedError

    def _write_features(self, features: int) -> Steps:
        raise NotImplementedError

    def _generation(self) -> Steps:
        raise NotImplementedError

    def _read_config(self, offset: int, size: int) -> Steps:
        raise NotImplementedError

    def _write_config(self, offset: int, value: int, size: int) -> Steps:
        raise NotImplementedError

    def add_status(self, bits: int) -> Steps:
        """Set more status bits; returns the status read back."""
        old = yield from self.status()
        yield from self._write_status(old | bits)
        return (yield from self.status())

    def reset(self, overtaken: Callable[[], bool] = _never) -> Steps:
        """Write 0 and wait until the device has let go of guest memory (the status reads 0), or another reset has ``overtaken`` this."""
        yield from self._write_status(0)
        while (yield from self.status()) and not overtaken():
            pass

    def accept_features(self, features: int) -> Steps:
        """Write the accepted features, set FEATURES_OK and re-read it; raises VirtioError if refused (§3.1.1 steps 4 to 6)."""
        yield from self._write_features(features)
        status = yield from self.add_status(Status.FEATURES_OK)
        if not status & Status.FEATURES_OK:
            raise VirtioError(f"the device refuses the features {features:#x}: FEATURES_OK reads back as 0", "3.1.1")

    def read_config(self, offset: int, length: int) -> Steps:
        """A field of ``length`` bytes by accesses of its width, 64 bits by two, from one generation (§2.5.1)."""
        while True:
            before = yield from self._generation()
            data = bytearray()
            while len(data) < length:
                left = length - len(data)
                step = 4 if left >= 4 else 2 if left >= 2 else 1
                value = yield from self._read_config(offset + len(data), step)
                data += value.to_bytes(step, "little")
            if (yield from self._generation()) == before:
                return bytes(data)

    def write_config(self, offset: int, data: bytes) -> Steps:
        """Store bytes in configuration space, one access for 1, 2 or 4 of them."""
        yield from self._write_config(offset, int.from_bytes(data, "little"), len(data))
