"""The kernel's vhost headers judge the structures that vhost-user took from them; sizes and places, asked of the C compiler."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from vblklab.spec import vhost_user as spec

HEADER = Path("/usr/include/linux/vhost_types.h")
COMPILER = shutil.which("cc") or shutil.which("gcc")
pytestmark = pytest.mark.skipif(
    not HEADER.exists() or COMPILER is None,
    reason="no linux/vhost_types.h or no C compiler here; on Debian: apt install gcc linux-libc-dev",
)

# Our structure, its C name, and its fields in our order.
STRUCTS = {
    "vhost_vring_state": (spec.VRING_STATE, ("index", "num")),
    "vhost_vring_addr": (spec.VRING_ADDR, ("index", "flags", "desc_user_addr", "used_user_addr", "avail_user_addr", "log_guest_addr")),
    # Where the kernel has padding, vhost-user has the mmap offset.
    "vhost_memory_region": (spec.MEM_REGION, ("guest_phys_addr", "memory_size", "userspace_addr", "flags_padding")),
    "vhost_memory": (spec.MEM_TABLE_HEAD, ("nregions", "padding")),
}
# The in-flight region as docs/interop/vhost-user.rst declares it, and the message that carries it.
PROTOCOL = """
typedef struct { uint64_t mmap_size, mmap_offset; uint16_t num_queues, queue_size; } Inflight;
typedef struct { uint8_t inflight; uint8_t padding[5]; uint16_t next; uint64_t counter; } DescStateSplit;
typedef struct { uint64_t features; uint16_t version, desc_num, last_batch_head, used_idx; DescStateSplit desc[]; } QueueRegionSplit;
"""


def ask_c(folder: Path, expressions: list[str]) -> list[int]:
    source, program = folder / "ask.c", folder / "ask"
    lines = "".join(f'printf("%zu\\n", (size_t)({expression}));' for expression in expressions)
    source.write_text(
        "#include <stdio.h>\n#include <stddef.h>\n#include <stdint.h>\n#include <linux/vhost_types.h>\n"
        + f"{PROTOCOL} int main(void) {{ {lines} return 0; }}"
    )
    subprocess.run([str(COMPILER), "-o", program, source], check=True)
    return [int(line) for line in subprocess.run([program], check=True, capture_output=True).stdout.split()]


def test_structures_are_the_kernels(tmp_path: Path) -> None:
    expressions, wanted = [], []
    for name, (ours, fields) in STRUCTS.items():
        codes = ours.format.lstrip("<")
        expressions.append(f"sizeof(struct {name})")
        wanted.append(ours.size)
        for i, field in enumerate(fields):
            expressions.append(f"offsetof(struct {name}, {field})")
            wanted.append(struct.calcsize("<" + codes[:i]))
        assert len(fields) == len(codes)
    assert ask_c(tmp_path, expressions) == wanted


def test_the_inflight_region_is_the_documents(tmp_path: Path) -> None:
    from vblklab.vhost import inflight

    got = ask_c(
        tmp_path,
        [
            "sizeof(Inflight)",
            "offsetof(Inflight, queue_size) + 2",
            "sizeof(DescStateSplit)",
            "offsetof(DescStateSplit, next) / 2",
            "offsetof(DescStateSplit, counter) / 8",
            "sizeof(QueueRegionSplit)",
            "offsetof(QueueRegionSplit, version) / 2",
            "offsetof(QueueRegionSplit, desc_num) / 2",
            "offsetof(QueueRegionSplit, last_batch_head) / 2",
            "offsetof(QueueRegionSplit, used_idx) / 2",
        ],
    )
    assert got == [
        *(spec.INFLIGHT.size, spec.INFLIGHT_PACKED.size),
        *(spec.INFLIGHT_DESC_BYTES, inflight._NEXT, inflight._COUNTER),
        *(spec.INFLIGHT_QUEUE_BYTES, inflight._VERSION, inflight._DESC_NUM, inflight._LAST_BATCH_HEAD, inflight._USED_IDX),
    ]
