"""Imports point one way, and below the machine there is no clock, thread, socket or file descriptor."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "vblklab"

# Low to high. A module imports from its own level and from lower ones; inside a level the rooms must not form a circle.
# A room is a folder of the package or a single module; "vblklab" is the package's own __init__.
LEVELS: tuple[frozenset[str], ...] = (
    frozenset({"spec", "events", "errors", "stats", "_data", "_version"}),
    frozenset({"memory"}),
    frozenset({"ring"}),
    frozenset({"transport", "iostack", "device", "guest"}),
    frozenset({"engine", "disk", "kvm", "vhost", "peer"}),
    frozenset({"trace"}),
    frozenset({"machine", "interleave"}),
    frozenset({"pipeline"}),
    frozenset({"view"}),
    frozenset({"lab"}),
    frozenset({"cli_calibrate", "cli_serve", "cli_ring"}),
    frozenset({"cli", "vblklab", "__main__"}),
)

# The only imports that may point up, and only inside a function: (module, room). Runs and films draw themselves: run.waterfall().
LAZY_UP = {("trace/run.py", "view"), ("trace/film.py", "view")}

# Sans-I/O: these rooms import none of these, wherever in the file, except in a file of this name.
SANS_IO_ROOMS = {"spec", "events", "errors", "stats", "memory", "ring", "transport", "iostack", "device", "guest", "vhost"}
IO_MODULES = {"asyncio", "concurrent", "fcntl", "logging", "multiprocessing", "select", "selectors", "signal", "socket", "subprocess"}
IO_MODULES |= {"os", "threading", "time"}
OS_NAMES_OF_FILES = {"PathLike", "fspath", "path", "stat"}  # these may be used of os: they name a file and open none
IO_FILES = {"vhost/channel.py", "vhost/guard.py", "vhost/memory_table.py", "vhost/transport.py"}
"""The files of a sans-I/O room that own what it has of sockets, mappings and eventfds."""

# What draws or talks to a notebook stays out of everything below.
DRAWING_ROOMS = {"view", "lab", "cli", "__main__"}
DRAWING_MODULES = {"anywidget", "ipywidgets", "IPython", "kaleido", "plotly", "traitlets"}


class Import(NamedTuple):
    """One import of one name, as ``module.py:line``."""

    file: str
    line: int
    target: str  # absolute dotted name
    lazy: bool  # inside a function

    def __str__(self) -> str:
        return f"vblklab/{self.file}:{self.line} imports {self.target}"


def imports_of(source: str, file: str) -> Iterator[Import]:
    """Every import in ``source``, the text of ``vblklab/<file>``; relative ones are made absolute."""
    parents = ("vblklab", *Path(file).parts[:-1])

    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name != "os" or name.asname:
                    yield Import(file, node.lineno, name.name, lazy)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            yield Import(file, node.lineno, f"os.{node.attr}", lazy)  # what is used of os counts, not that it is imported
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [node.module])]) if node.level else node.module
            for name in node.names:
                yield Import(file, node.lineno, f"{base}.{name.name}", lazy)
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    yield from walk(ast.parse(source), False)


def room_of(file: str) -> str:
    """The room that ``file`` (relative to the package) belongs to."""
    first = Path(file).parts[0]
    return "vblklab" if first == "__init__.py" else first.removesuffix(".py")


def room_imported(target: str) -> str | None:
    """The room that an import reaches, None outside the package. ``from vblklab import Pipeline`` reaches "vblklab"."""
    parts = target.split(".")
    if parts[0] != "vblklab":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in LEVEL else "vblklab"


LEVEL = {room: height for height, rooms in enumerate(LEVELS) for room in rooms}


def _names_a_file(target: str) -> bool:
    parts = target.split(".")
    return parts[0] == "os" and len(parts) > 1 and parts[1] in OS_NAMES_OF_FILES


def complaints(imports: list[Import]) -> list[str]:
    """What is wrong with these imports, one line each."""
    wrong = []
    for each in imports:
        room, top, other = room_of(each.file), each.target.split(".")[0], room_imported(each.target)
        if other is not None and LEVEL[other] > LEVEL[room] and not (each.lazy and (each.file, other) in LAZY_UP):
            wrong.append(f"{each}: {room} lies below {other}")
        if room in SANS_IO_ROOMS and top in IO_MODULES and not _names_a_file(each.target) and each.file not in IO_FILES:
            wrong.append(f"{each}: {room} is sans-I/O; that belongs in engine, disk, kvm, machine or one of {sorted(IO_FILES)}")
        if room not in DRAWING_ROOMS and top in DRAWING_MODULES:
            wrong.append(f"{each}: only {', '.join(sorted(DRAWING_ROOMS))} draw")
    return wrong


def circles(imports: list[Import]) -> list[str]:
    """Rooms of one level that import each other in a circle."""
    edges: dict[str, set[str]] = {}
    for each in imports:
        room, other = room_of(each.file), room_imported(each.target)
        if other not in (None, room) and not each.lazy:
            edges.setdefault(room, set()).add(str(other))

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = list(edges.get(start, ()))
        while todo:
            if (room := todo.pop()) not in seen:
                seen.add(room)
                todo += edges.get(room, ())
        return seen

    return sorted(room for room in edges if room in reached(room))


def package_files() -> list[str]:
    return sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@pytest.fixture(scope="module")
def package_imports() -> list[Import]:
    return [each for file in package_files() for each in imports_of((PACKAGE / file).read_text(encoding="utf-8"), file)]


def test_every_room_has_a_place_in_the_order() -> None:
    assert {room_of(file) for file in package_files()} <= LEVEL.keys(), "a new room: give it its place in LEVELS"


def test_imports_point_one_way(package_imports: list[Import]) -> None:
    assert not (wrong := complaints(package_imports)), "\n".join(wrong)


def test_rooms_form_no_circle(package_imports: list[Import]) -> None:
    lower = [each for each in package_imports if room_of(each.file) not in LEVELS[-1]]  # cli and __init__ may meet
    assert circles(lower) == []


@pytest.mark.parametrize(
    ("file", "source", "wrong"),
    [
        ("ring/split.py", "from ..memory import GuestMemory", 0),
        ("ring/split.py", "from ..device import VirtioBlkDevice", 1),
        ("ring/split.py", "from .. import machine", 1),
        ("ring/split.py", "import vblklab.machine.sim", 1),
        ("ring/split.py", "from vblklab import Pipeline", 1),
        ("ring/split.py", "def f():\n    from ..machine import Sim", 1),
        ("trace/run.py", "def f():\n    from ..view import waterfall", 0),
        ("trace/run.py", "from ..view import waterfall", 1),
        ("trace/stats.py", "def f():\n    from ..view import waterfall", 1),
        ("trace/run.py", "from ..machine import Sim", 1),
        ("machine/sim.py", "from ..trace.run import Run\nimport time, threading, socket", 0),
        ("memory.py", "import time", 1),
        ("device/virtio_blk.py", "def f():\n    from os import eventfd", 1),
        ("device/virtio_blk.py", "import os\ndef f():\n    os.eventfd(0)", 1),
        ("guest/job.py", "import os\ndef f(path: os.PathLike): os.fspath(path)", 0),
        ("vhost/frontend.py", "import socket", 1),
        ("vhost/channel.py", "import socket", 0),
        ("disk/store.py", "import os", 0),
        ("pipeline.py", "import plotly.graph_objects as go", 1),
        ("view/style.py", "import plotly.graph_objects as go", 0),
        ("cli.py", "import vblklab as vb", 0),
    ],
)
def test_the_rules_tell_right_from_wrong(file: str, source: str, wrong: int) -> None:
    assert len(complaints(list(imports_of(source, file)))) == wrong


def test_a_circle_inside_a_level_is_found() -> None:
    sources = {"guest/a.py": "from ..device import x", "device/b.py": "from ..iostack import y", "iostack/c.py": "from ..guest import z"}
    assert circles([each for file, text in sources.items() for each in imports_of(text, file)]) == ["device", "guest", "iostack"]
