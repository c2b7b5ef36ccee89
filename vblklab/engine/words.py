"""Loads, stores and calls of libc for compiled code, which knows memory by its addresses.  Imported only where numba is.

``load…`` and ``store…`` are for memory of the loop's own or not yet published; ``load_shared…`` and ``publish…`` are one access, ordered
as acquire and release, for words that another thread or process touches at the same time.
"""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

__all__ = [
    "add_shared64",
    "clock_gettime",
    "exchanged64",
    "fence",
    "load8",
    "load16",
    "load32",
    "load64",
    "load_shared16",
    "load_shared64",
    "memmove",
    "pause",
    "pread",
    "preadv",
    "publish8",
    "publish16",
    "publish64",
    "pwrite",
    "pwritev",
    "read",
    "sched_yield",
    "store8",
    "store32",
    "store64",
    "write",
]

_i64 = ir.IntType(64)


def _load(bits: int, *, shared: bool) -> Any:
    """A load of ``bits`` from an address; ``shared``: one access, ordered before what follows."""

    @intrinsic
    def load(_: Any, address: Any) -> Any:
        def generate(__: Any, builder: Any, ___: Any, args: Any) -> Any:
            place = builder.inttoptr(args[0], ir.IntType(bits).as_pointer())
            value = builder.load_atomic(place, "acquire", bits // 8) if shared else builder.load(place, align=1)
            return value if bits == 64 else builder.zext(value, _i64)

        return types.int64(types.int64), generate

    return load


def _store(bits: int, *, shared: bool) -> Any:
    """A store of ``bits`` to an address; ``shared``: one access, ordered behind what came before."""

    @intrinsic
    def store(_: Any, address: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, __: Any, args: Any) -> Any:
            kind = ir.IntType(bits)
            value = args[1] if bits == 64 else builder.trunc(args[1], kind)
            place = builder.inttoptr(args[0], kind.as_pointer())
            if shared:
                builder.store_atomic(value, place, "release", bits // 8)
            else:
                builder.store(value, place, align=1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return store


@intrinsic
def pause(_: Any) -> Any:
    """Tell the core that this is a spin loop."""

    def generate(context: Any, builder: Any, __: Any, ___: Any) -> Any:
        if platform.machine() == "x86_64":
            builder.call(builder.module.declare_intrinsic("llvm.x86.sse2.pause", (), ir.FunctionType(ir.VoidType(), [])), [])
        else:
            kind = ir.FunctionType(ir.VoidType(), [ir.IntType(32)])
            builder.call(builder.module.declare_intrinsic("llvm.aarch64.hint", (), kind), [ir.Constant(ir.IntType(32), 1)])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def fence(_: Any) -> Any:
    """Between this side's last store and its next load."""

    def generate(context: Any, builder: Any, __: Any, ___: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def exchanged64(_: Any, address: Any, expected: Any, value: Any) -> Any:
    """Store ``value`` if ``expected`` is still there, as one access; 1 if it was."""

    def generate(__: Any, builder: Any, ___: Any, args: Any) -> Any:
        place = builder.inttoptr(args[0], _i64.as_pointer())
        found = builder.cmpxchg(place, args[1], args[2], "seq_cst", "seq_cst")
        return builder.zext(builder.extract_value(found, 1), _i64)

    return types.int64(types.int64, types.int64, types.int64), generate


@intrinsic
def add_shared64(_: Any, address: Any, value: Any) -> Any:
    """Add to a word that both threads change; what was there before."""

    def generate(__: Any, builder: Any, ___: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", builder.inttoptr(args[0], _i64.as_pointer()), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


load8, load16, load32, load64 = (_load(bits, shared=False) for bits in (8, 16, 32, 64))
load_shared16, load_shared64 = _load(16, shared=True), _load(64, shared=True)
store8, store32 = _store(8, shared=False), _store(32, shared=False)
store64 = _store(64, shared=False)
publish8, publish16, publish64 = (_store(bits, shared=True) for bits in (8, 16, 64))
_size_t = types.uint64
pread = types.ExternalFunction("pread", types.int64(types.int32, types.int64, _size_t, types.int64))
pwrite = types.ExternalFunction("pwrite", types.int64(types.int32, types.int64, _size_t, types.int64))
preadv = types.ExternalFunction("preadv", types.int64(types.int32, types.int64, types.int32, types.int64))
pwritev = types.ExternalFunction("pwritev", types.int64(types.int32, types.int64, types.int32, types.int64))
memmove = types.ExternalFunction("memmove", types.int64(types.int64, types.int64, _size_t))
read = types.ExternalFunction("read", types.int64(types.int32, types.int64, _size_t))
write = types.ExternalFunction("write", types.int64(types.int32, types.int64, _size_t))
sched_yield = types.ExternalFunction("sched_yield", types.int32())
clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.int64))
