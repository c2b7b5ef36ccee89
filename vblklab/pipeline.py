"""A Pipeline: a frozen recipe of parts with three sides, guest, wire and host."""

from __future__ import annotations

import dataclasses
import functools
import html
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .device import VirtioBlkDevice
from .disk import ImageFile, Nvme, Ram
from .engine import ENGINES
from .errors import ConfigError
from .guest.fio import Fio
from .guest.virtio_blk import VirtioBlkDriver
from .iostack import IOStack
from .kvm import BareGuest, Kvm
from .ring.packed import check_packed_size
from .ring.split import check_queue_size
from .transport import Mmio, Pci

__all__ = ["Packed", "Pipeline", "Split"]


@dataclass(frozen=True)
class Split:
    """The ``queue`` part: split virtqueues of ``size`` entries; with ``in_order`` the device offers VIRTIO_F_IN_ORDER."""

    size: int = 256
    in_order: bool = False
    packed = False

    def __post_init__(self) -> None:
        check_queue_size(self.size)

    def __repr__(self) -> str:
        return f"Split(size={self.size}{', in_order=True' * self.in_order})"


@dataclass(frozen=True)
class Packed:
    """The ``queue`` part: packed virtqueues of ``size`` descriptors; the device then offers VIRTIO_F_RING_PACKED.

    With ``in_order`` it offers VIRTIO_F_IN_ORDER too.
    """

    size: int = 256
    in_order: bool = False
    packed = True

    def __post_init__(self) -> None:
        check_packed_size(self.size)

    def __repr__(self) -> str:
        return f"Packed(size={self.size}{', in_order=True' * self.in_order})"


_PARTS: dict[str, tuple[str, tuple[str, ...], str]] = {
    # part: side, methods or attributes it must have (one|another), an example
    "app": ("guest", ("start", "clones"), 'vb.Fio(rw="randread", iodepth=8)'),
    "iostack": ("guest", ("submit_bio",), "vb.IOStack()"),
    "driver": ("guest", ("probe", "queue_rq"), "vb.VirtioBlkDriver()"),
    "queue": ("wire", ("size", "packed"), "vb.Split(256) or vb.Packed(256)"),
    "transport": ("wire", (), "vb.Mmio() or vb.Pci()"),
    "kvm": ("wire", ("kick", "call"), 'vb.Kvm(kick="ioeventfd", call="irqfd")'),
    "device": ("host", ("run", "handle_output"), "vb.VirtioBlkDevice()"),
    "engine": ("host", ("submit", "reap"), "vb.Simulated() or vb.Sync()"),
    "host_iostack": ("host", ("submit_bio",), "vb.IOStack()"),
    "disk": ("host", ("open", "drive"), 'vb.Nvme(), vb.Ram(64 << 20) or vb.ImageFile("disk.img")'),
    "guest": ("guest", ("boot|kind",), "vb.LinuxGuest() or vb.BareGuest(), or None for our own guest"),
    "host": ("host", ("start|arguments",), 'vb.StorageDaemon("disk.img"), or None for our own device'),
}
_SIDES = ("guest", "host")
"""Parts that put a real system in the place of a whole side; None is ours."""
_RUNS_ON = {BareGuest.kind: "vb.KvmMachine()"}
"""The machine of a kind of side that VhostUserMachine does not run."""


_Class = TypeVar("_Class", bound=type)


def _names_parts(cls: _Class) -> _Class:
    """An unknown part name given to the class is the same typed error as one given to ``replace``."""
    init = vars(cls)["__init__"]

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **parts: Any) -> None:
        _check_names(parts)
        init(self, *args, **parts)

    setattr(cls, "__init__", checked)  # noqa: B010
    return cls


def _check_names(parts: Iterable[str]) -> None:
    for name in parts:
        if name not in _PARTS:
            raise ConfigError(f"no part {name!r}", f"the parts are {', '.join(_PARTS)}")


@_names_parts
@dataclass(frozen=True)
class Pipeline:
    """Everything between an application and a disk.  ``boot(machine)`` builds it fresh, ``replace`` gives another recipe.

    A behaviour (device, driver, iostack, engine) is given as an instance or as a class; ``engine=None`` is the machine's own.
    """

    app: Any = field(default_factory=lambda: Fio(rw="randread", bs=4096, number_ios=1000))
    iostack: Any = field(default_factory=IOStack)
    driver: Any = VirtioBlkDriver
    queue: Any = field(default_factory=Split)
    transport: Any = field(default_factory=Mmio)
    kvm: Any = field(default_factory=Kvm)
    device: Any = VirtioBlkDevice
    engine: Any = None
    host_iostack: Any = field(default_factory=IOStack)
    disk: Any = field(default_factory=Nvme)
    guest: Any = None
    host: Any = None

    def __post_init__(self) -> None:
        for name, (_, needs, example) in _PARTS.items():
            part = getattr(self, name)
            if part is None and (name == "engine" or name in _SIDES):
                continue
            if isinstance(part, type) and name in ("app", "queue", "transport", "kvm", "disk", *_SIDES):
                raise ConfigError(f"{name}={part.__name__} is a class, not a {name}", f"give for example {example}")
            missing = [need for need in needs if not any(hasattr(part, one) for one in need.split("|"))]
            if missing or (name == "transport" and not isinstance(part, (Mmio, Pci))):
                raise ConfigError(f"{name}={part!r} is not a {name}", f"give for example {example}")

    def replace(self, **parts: Any) -> Pipeline:
        """Another recipe with these parts exchanged; an unknown part name is a ConfigError."""
        _check_names(parts)
        return dataclasses.replace(self, **parts)

    def set(self, assignment: str) -> Pipeline:
        """Exchange a part by text, as ``vblk run --set`` does: ``kvm.kick=mmio-exit``, ``disk=disk.img``, ``queue=128``."""
        return _set(self, assignment)

    def boot(self, machine: Any) -> Any:
        """A machine standing before the first I/O; raises a typed error for what it cannot honour."""
        if isinstance(machine, type):
            machine = machine()
        if not hasattr(machine, "boot"):
            raise ConfigError(f"machine={machine!r} is not a machine", "give for example vb.SimMachine() or vb.LiveMachine()")
        for side in _SIDES:
            part = getattr(self, side)
            kind = getattr(part, "kind", side)
            if part is not None and kind not in getattr(machine, "real_sides", ()):
                where = _RUNS_ON.get(kind, "vb.VhostUserMachine()")
                raise ConfigError(f"{side}={_text(part)} on {machine!r}", f"a real {kind} needs {where}; replace({side}=None) is ours")
        return machine.boot(self)

    def run(self, machine: Any, **options: Any) -> Any:
        """Boot and run to the end: ``boot(machine).run()``."""
        return self.boot(machine).run(**options)

    def describe(self) -> dict[str, str]:
        """Part → how it was given."""
        return {name: _text(getattr(self, name)) for name in self._told()}

    def _told(self) -> list[str]:
        """The parts worth telling: a side only if it is a real system."""
        return [name for name in _PARTS if name not in _SIDES or getattr(self, name) is not None]

    def __repr__(self) -> str:
        lines = [f"    {name:13}{_text(getattr(self, name))}" for name in self._told()]
        return "Pipeline(\n" + "\n".join(lines) + "\n)"

    def _repr_html_(self) -> str:
        left, rows = 'style="text-align:left"', []
        for name in self._told():
            side = _PARTS[name][0]
            part = html.escape(_text(getattr(self, name)))
            rows.append(f"<tr><td {left}>{side}</td><td {left}><b>{name}</b></td><td {left}><code>{part}</code></td></tr>")
        return f"<table>{''.join(rows)}</table>"


def _text(part: Any) -> str:
    if part is None:
        return "the machine's own"
    return part.__name__ if isinstance(part, type) else repr(part)


# -- parts by text -----------------------------------------------------------------------------------------------------------


def _value(text: str) -> Any:
    lowered = text.lower()
    if lowered in ("true", "yes", "on", "false", "no", "off"):
        return lowered in ("true", "yes", "on")
    if lowered == "none":
        return None
    for convert in (lambda t: int(t, 0), float):
        try:
            return convert(text)
        except ValueError:
            continue
    units = {"k": 10, "m": 20, "g": 30}
    if text[:-1].isdigit() and lowered[-1] in units:
        return int(text[:-1]) << units[lowered[-1]]
    return text


def _disk_of(text: str) -> Any:
    names = {"nvme": Nvme, "ram": Ram}
    return names[text]() if text in names else ImageFile(text)


def _set(pipeline: Pipeline, assignment: str) -> Pipeline:
    name, equals, text = assignment.partition("=")
    part, _, option = name.strip().partition(".")
    text = text.strip()
    if not equals:
        raise ConfigError(f"--set {assignment!r}", "write part=value or part.option=value")
    if part not in _PARTS:
        raise ConfigError(f"no part {part!r}", f"the parts are {', '.join(_PARTS)}")
    if part == "app":
        raise ConfigError("the application comes from the job file", "change the job file")
    if option:
        return pipeline.replace(**{part: _with_option(part, getattr(pipeline, part), option, text)})
    if part == "disk":
        return pipeline.replace(disk=_disk_of(text))
    if part == "queue" and text.isdigit():
        return pipeline.replace(queue=dataclasses.replace(pipeline.queue, size=int(text)))
    if part == "queue" and text in ("split", "packed"):
        kept = {name: value for name, value in vars(pipeline.queue).items() if name in ("size", "in_order")}
        return pipeline.replace(queue={"split": Split, "packed": Packed}[text](**kept))
    if part == "transport" and text in _TRANSPORTS:
        return pipeline.replace(transport=_TRANSPORTS[text]())
    if part == "guest" and text in ("bare", "none"):
        return pipeline.replace(guest=BareGuest() if text == "bare" else None)
    if part == "engine":
        if text not in ENGINES:
            raise ConfigError(f"no engine {text!r}", f"choose one of {', '.join(ENGINES)}")
        return pipeline.replace(engine=ENGINES[text]())
    raise ConfigError(f"part {part!r} takes no plain value", f"write {part}.option=value; for example {_PARTS[part][2]}")


_TRANSPORTS: dict[str, Any] = {"mmio": Mmio, "pci": Pci}

# Options that an instance keeps under another name than its constructor's.
_KEPT_AS = {("device", "queues"): "num_queues", ("driver", "features"): "allowed", ("driver", "queues"): "max_queues"}


def _with_option(part: str, old: Any, option: str, text: str) -> Any:
    import inspect

    if old is None:
        raise ConfigError(f"{part} has no option {option!r}", f"the machine chooses it; for example {_PARTS[part][2]}")
    cls = old if isinstance(old, type) else type(old)
    known = {name: p for name, p in inspect.signature(cls).parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    if option not in known:
        raise ConfigError(f"{part} has no option {option!r}", f"it has {', '.join(known) or 'none'}")
    value = _typed(f"{part}.{option}", text, str(known[option].annotation))
    if dataclasses.is_dataclass(old) and not isinstance(old, type):
        return dataclasses.replace(old, **{option: value})
    kept = {}
    if not isinstance(old, type):
        names = {name: _KEPT_AS.get((part, name), name) for name in known}
        kept = {name: getattr(old, attribute) for name, attribute in names.items() if hasattr(old, attribute)}
        if part == "device":
            kept["queues"] = old.num_queues or None
    try:
        return cls(**(kept | {option: value}))
    except TypeError as error:
        raise ConfigError(f"{part}.{option}={value!r}: {error}", f"for example {_PARTS[part][2]}") from None


def _typed(name: str, text: str, annotation: str) -> Any:
    """The text as the option's type; an option without a plain type takes what the text looks like."""
    if annotation == "str":
        return text
    value = _value(text)
    types = {"bool": bool, "int": int, "float": (int, float)}
    plain, _, rest = annotation.partition(" | ")
    if plain not in types or rest not in ("", "None") or (value is None and rest):
        return value
    if not isinstance(value, types[plain]) or (isinstance(value, bool) and plain != "bool"):  # type: ignore[arg-type]
        raise ConfigError(f"{name}={text!r}", {"bool": "use yes or no", "int": "give a whole number", "float": "give a number"}[plain])
    return value
