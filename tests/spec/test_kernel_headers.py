"""The kernel's own headers judge the numbers and structures in ``vblklab.spec``."""

from __future__ import annotations

import re
import shutil
import subprocess
from enum import IntFlag
from functools import cache
from pathlib import Path

import pytest

from vblklab.spec import SECTOR_BYTES, pci, virtio, virtio_blk, virtio_blk_zoned, virtio_mmio, virtio_pci, virtio_ring

HEADERS = Path("/usr/include/linux")
NAMES = ("virtio_blk.h", "virtio_config.h", "virtio_ids.h", "virtio_mmio.h", "virtio_ring.h", "virtio_pci.h", "pci_regs.h")
ABSENT = [name for name in NAMES if not (HEADERS / name).exists()]
COMPILER = shutil.which("cc") or shutil.which("gcc")
pytestmark = pytest.mark.skipif(bool(ABSENT), reason=f"no {', '.join(ABSENT)} here; on Debian: apt install linux-libc-dev")

_DEFINE = re.compile(r"^#define[ \t]+(\w+)[ \t]+(.+?)[ \t]*(?:/\*.*)?$", re.MULTILINE)


@cache
def defines() -> dict[str, int]:
    """name → value of every #define in the headers that is a number, or another define's name."""
    texts = {}
    for name in NAMES:
        texts |= dict(_DEFINE.findall((HEADERS / name).read_text(encoding="utf-8")))
    values: dict[str, int] = {}
    for name, text in texts.items():
        text = texts.get(text, text)  # noqa: PLW2901
        if found := re.fullmatch(r"\(?1U?L* *<< *(\d+)\)?", text):
            values[name] = 1 << int(found[1])
        elif re.fullmatch(r"\(?(0x[0-9a-fA-F]+|\d+)[uUlL]*\)?", text):
            values[name] = int(text.strip("()").rstrip("uUlL"), 0)
    return values


def bit(name: str) -> int:
    return 1 << defines()[name]


def test_the_parser_reads_the_headers() -> None:
    assert len(defines()) > 100
    assert defines()["VIRTIO_MMIO_CONFIG"] == 0x100
    assert defines()["VRING_DESC_F_INDIRECT"] == 4


# What a newer specification has than these headers, and what this name is called there.
RESERVED = {"INDIRECT_DESC": "VIRTIO_RING_F_INDIRECT_DESC", "EVENT_IDX": "VIRTIO_RING_F_EVENT_IDX"}
NEWER = {"NOTIF_CONFIG_DATA"}


@pytest.mark.parametrize("feature", virtio.Feature, ids=lambda feature: feature.name)
def test_a_reserved_feature_is_the_kernels(feature: virtio.Feature) -> None:
    name = RESERVED.get(feature.name or "", f"VIRTIO_F_{feature.name}")
    if name not in defines() and feature.name in NEWER | {"NOTIFICATION_DATA", "RING_RESET", "IN_ORDER"}:
        pytest.skip(f"these headers are older than {name}")
    assert feature == bit(name)


@pytest.mark.parametrize("status", virtio.Status, ids=lambda status: status.name)
def test_a_status_bit_is_the_kernels(status: virtio.Status) -> None:
    assert status == defines()[f"VIRTIO_CONFIG_S_{status.name}"]


def test_the_device_id_is_the_kernels() -> None:
    assert defines()["VIRTIO_ID_BLOCK"] == virtio.DEVICE_ID_BLOCK


LINUX_LACKS = {"LIFETIME", "GET_LIFETIME"}
"""Linux' driver does not ask for it, so its header (6.1 and 6.12) has no name for it."""


def _in_these_headers(name: str) -> str:
    """The name, unless these headers are older than zoned disks (Linux 6.3)."""
    if "ZONE" in name and name not in defines():
        pytest.skip(f"these headers are older than {name}")
    return name


@pytest.mark.parametrize("feature", virtio_blk.BlkFeature, ids=lambda feature: feature.name)
def test_a_block_feature_is_the_kernels(feature: virtio_blk.BlkFeature) -> None:
    if feature.name in LINUX_LACKS:
        pytest.skip(f"Linux has no name for {feature.name}")
    _in_these_headers(f"VIRTIO_BLK_F_{feature.name}")
    assert feature == bit(f"VIRTIO_BLK_F_{feature.name}")


@pytest.mark.parametrize("kind", virtio_blk.ReqType, ids=lambda kind: kind.name)
def test_a_request_type_is_the_kernels(kind: virtio_blk.ReqType) -> None:
    if kind.name in LINUX_LACKS:
        pytest.skip(f"Linux has no name for {kind.name}")
    assert kind == defines()[_in_these_headers(f"VIRTIO_BLK_T_{kind.name}")]


@pytest.mark.parametrize("status", virtio_blk.BlkStatus, ids=lambda status: status.name)
def test_a_status_byte_is_the_kernels(status: virtio_blk.BlkStatus) -> None:
    assert status == defines()[_in_these_headers(f"VIRTIO_BLK_S_{status.name}")]


ZONED = {"ZoneModel": "Z", "ZoneType": "ZT", "ZoneState": "ZS"}


@pytest.mark.parametrize("name", ZONED)
def test_the_zone_numbers_are_the_kernels(name: str) -> None:
    _in_these_headers("VIRTIO_BLK_F_ZONED")
    for member in getattr(virtio_blk_zoned, name):
        assert member == defines()[f"VIRTIO_BLK_{ZONED[name]}_{member.name}"]


def test_the_constants_of_a_request_are_the_kernels() -> None:
    assert defines()["VIRTIO_BLK_ID_BYTES"] == virtio_blk.ID_BYTES
    assert defines()["VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP"] == virtio_blk.WRITE_ZEROES_UNMAP
    assert SECTOR_BYTES == 512


# Registers whose name changed in the specification.
RENAMED = {
    "QUEUE_SIZE_MAX": "QUEUE_NUM_MAX",
    "QUEUE_SIZE": "QUEUE_NUM",
    "QUEUE_DRIVER_LOW": "QUEUE_AVAIL_LOW",
    "QUEUE_DRIVER_HIGH": "QUEUE_AVAIL_HIGH",
    "QUEUE_DEVICE_LOW": "QUEUE_USED_LOW",
    "QUEUE_DEVICE_HIGH": "QUEUE_USED_HIGH",
}
NOT_IN_LINUX = {"QUEUE_RESET"}


@pytest.mark.parametrize("reg", virtio_mmio.Reg, ids=lambda reg: reg.name)
def test_a_register_is_where_the_kernel_has_it(reg: virtio_mmio.Reg) -> None:
    name = f"VIRTIO_MMIO_{RENAMED.get(reg.name, reg.name)}"
    if name not in defines() and reg.name in NOT_IN_LINUX:
        pytest.skip("Linux has no name for this register")
    assert reg == defines()[name]


def test_interrupt_bits_are_the_kernels() -> None:
    assert {bit.name: int(bit) for bit in virtio_mmio.Interrupt} == {
        name: defines()[f"VIRTIO_MMIO_INT_{name}"] for name in ("VRING", "CONFIG")
    }


@pytest.mark.parametrize(
    ("ours", "name"),
    [
        *[(flag, f"VRING_DESC_F_{flag.name}") for flag in virtio_ring.DescFlag],
        (virtio_ring.AVAIL_NO_INTERRUPT, "VRING_AVAIL_F_NO_INTERRUPT"),
        (virtio_ring.USED_NO_NOTIFY, "VRING_USED_F_NO_NOTIFY"),
        (virtio_ring.DESC_ALIGN, "VRING_DESC_ALIGN_SIZE"),
        (virtio_ring.AVAIL_ALIGN, "VRING_AVAIL_ALIGN_SIZE"),
        (virtio_ring.USED_ALIGN, "VRING_USED_ALIGN_SIZE"),
        (virtio_ring.PACKED_AVAIL.bit_length() - 1, "VRING_PACKED_DESC_F_AVAIL"),
        (virtio_ring.PACKED_USED.bit_length() - 1, "VRING_PACKED_DESC_F_USED"),
        (virtio_ring.EVENT_ENABLE, "VRING_PACKED_EVENT_FLAG_ENABLE"),
        (virtio_ring.EVENT_DISABLE, "VRING_PACKED_EVENT_FLAG_DISABLE"),
        (virtio_ring.EVENT_DESC, "VRING_PACKED_EVENT_FLAG_DESC"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_ring_constant_is_the_kernels(ours: int | IntFlag, name: str) -> None:
    assert ours == defines()[name]


# PCI and virtio-pci: our number and the header's name of it
PCI_NAMES = [
    *[(reg, f"PCI_{reg.name}") for reg in pci.Cfg],
    *[(bit, f"PCI_COMMAND_{bit.name}") for bit in pci.Command],
    *[(bit, f"PCI_STATUS_{bit.name}") for bit in pci.PciStatus],
    *[(bit, f"PCI_BASE_ADDRESS_{bit.name}") for bit in pci.BarBits],
    *[(cap, f"PCI_CAP_ID_{cap.name}") for cap in pci.CapId],
    *[(offset, f"PCI_MSIX_{offset.name}") for offset in pci.MsixCap],
    *[(bit, f"PCI_MSIX_FLAGS_{bit.name}") for bit in pci.MsixFlags],
    *[(offset, f"PCI_MSIX_ENTRY_{offset.name}") for offset in pci.MsixEntry],
    (pci.HEADER_BYTES, "PCI_STD_HEADER_SIZEOF"),
    (pci.CONFIG_BYTES, "PCI_CFG_SPACE_SIZE"),
    (pci.NUM_BARS, "PCI_STD_NUM_BARS"),
    (pci.MEM_TYPE_MASK, "PCI_BASE_ADDRESS_MEM_TYPE_MASK"),
    (pci.CAP_LIST_ID, "PCI_CAP_LIST_ID"),
    (pci.CAP_LIST_NEXT, "PCI_CAP_LIST_NEXT"),
    (pci.MSIX_CAP_BYTES, "PCI_CAP_MSIX_SIZEOF"),
    (pci.MSIX_BIR, "PCI_MSIX_TABLE_BIR"),
    (pci.MSIX_ENTRY_BYTES, "PCI_MSIX_ENTRY_SIZE"),
    (pci.MSIX_MASKED, "PCI_MSIX_ENTRY_CTRL_MASKBIT"),
    (virtio_pci.NO_VECTOR, "VIRTIO_MSI_NO_VECTOR"),
    *[(kind, f"VIRTIO_PCI_CAP_{kind.name}") for kind in virtio_pci.CapType],
    *[(offset, f"VIRTIO_PCI_CAP_{offset.name}") for offset in virtio_pci.Cap],
    (virtio_pci.NOTIFY_CAP_MULT, "VIRTIO_PCI_NOTIFY_CAP_MULT"),
]


@pytest.mark.parametrize(("ours", "name"), PCI_NAMES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_pci_constant_is_the_kernels(ours: int, name: str) -> None:
    assert ours == defines()[name]


# our name of a field of the common configuration → the C member; older headers lack the last ones
COMMON = {
    "DEVICE_FEATURE_SELECT": "device_feature_select",
    "DEVICE_FEATURE": "device_feature",
    "DRIVER_FEATURE_SELECT": "guest_feature_select",
    "DRIVER_FEATURE": "guest_feature",
    "CONFIG_MSIX_VECTOR": "msix_config",
    "NUM_QUEUES": "num_queues",
    "DEVICE_STATUS": "device_status",
    "CONFIG_GENERATION": "config_generation",
    "QUEUE_SELECT": "queue_select",
    "QUEUE_SIZE": "queue_size",
    "QUEUE_MSIX_VECTOR": "queue_msix_vector",
    "QUEUE_ENABLE": "queue_enable",
    "QUEUE_NOTIFY_OFF": "queue_notify_off",
    "QUEUE_DESC_LO": "queue_desc_lo",
    "QUEUE_DESC_HI": "queue_desc_hi",
    "QUEUE_DRIVER_LO": "queue_avail_lo",
    "QUEUE_DRIVER_HI": "queue_avail_hi",
    "QUEUE_DEVICE_LO": "queue_used_lo",
    "QUEUE_DEVICE_HI": "queue_used_hi",
}
COMMON_BY_DEFINE = {
    "QUEUE_NOTIF_CONFIG_DATA": "VIRTIO_PCI_COMMON_Q_NDATA",
    "QUEUE_RESET": "VIRTIO_PCI_COMMON_Q_RESET",
    "ADMIN_QUEUE_INDEX": "VIRTIO_PCI_COMMON_ADM_Q_IDX",
    "ADMIN_QUEUE_NUM": "VIRTIO_PCI_COMMON_ADM_Q_NUM",
}


def test_every_field_of_the_common_configuration_is_judged() -> None:
    assert {field.name for field in virtio_pci.Common} == {*COMMON, *COMMON_BY_DEFINE}


@pytest.mark.parametrize("name", COMMON_BY_DEFINE)
def test_a_newer_field_of_the_common_configuration_is_the_kernels(name: str) -> None:
    if COMMON_BY_DEFINE[name] not in defines():
        pytest.skip(f"these headers are older than {COMMON_BY_DEFINE[name]}")
    assert virtio_pci.Common[name] == defines()[COMMON_BY_DEFINE[name]]
    assert virtio_pci.COMMON_WIDTH[virtio_pci.Common[name]] == 2


# -- structures, by a compiler -----------------------------------------------------------------------------------------------

# our name of a configuration field → the C member and its bytes
CONFIG = {
    "capacity": ("capacity", 8),
    "size_max": ("size_max", 4),
    "seg_max": ("seg_max", 4),
    "geometry": ("geometry", 4),
    "blk_size": ("blk_size", 4),
    "physical_block_exp": ("physical_block_exp", 1),
    "alignment_offset": ("alignment_offset", 1),
    "min_io_size": ("min_io_size", 2),
    "opt_io_size": ("opt_io_size", 4),
    "writeback": ("wce", 1),
    "num_queues": ("num_queues", 2),
    "max_discard_sectors": ("max_discard_sectors", 4),
    "max_discard_seg": ("max_discard_seg", 4),
    "discard_sector_alignment": ("discard_sector_alignment", 4),
    "max_write_zeroes_sectors": ("max_write_zeroes_sectors", 4),
    "max_write_zeroes_seg": ("max_write_zeroes_seg", 4),
    "write_zeroes_may_unmap": ("write_zeroes_may_unmap", 1),
    "max_secure_erase_sectors": ("max_secure_erase_sectors", 4),
    "max_secure_erase_seg": ("max_secure_erase_seg", 4),
    "secure_erase_sector_alignment": ("secure_erase_sector_alignment", 4),
}
ZONED_CONFIG = ("zone_sectors", "max_open_zones", "max_active_zones", "max_append_sectors", "write_granularity", "model")
ZONED_STRUCTS = {
    "struct virtio_blk_zone_descriptor": ("z_cap", "z_start", "z_wp", "z_type", "z_state"),
    "struct virtio_blk_zone_report": ("nr_zones",),
}
STRUCTS = {
    "struct vring_desc": ("addr", "len", "flags", "next"),
    "struct vring_used_elem": ("id", "len"),
    "struct virtio_blk_outhdr": ("type", "ioprio", "sector"),
    "struct virtio_blk_discard_write_zeroes": ("sector", "num_sectors", "flags"),
}


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, int]]:
    """ "struct x.member" → (offset, bytes), "struct x" → (0, bytes), and the ring's areas for 256 entries, by the C compiler."""
    if COMPILER is None:
        pytest.skip("no C compiler here; on Debian: apt install gcc")
    folder = tmp_path_factory.mktemp("layout")
    members = [(struct, member) for struct, names in STRUCTS.items() for member in names]
    members += [("struct virtio_pci_common_cfg", member) for member in COMMON.values()]
    members += [("struct virtio_pci_notify_cap", "notify_off_multiplier"), ("struct virtio_pci_cfg_cap", "pci_cfg_data")]
    members += [("struct virtio_blk_config", member) for member, _ in CONFIG.values()]
    zoned = ZONED_STRUCTS if "VIRTIO_BLK_F_ZONED" in defines() else {}
    members += [(struct, member) for struct, names in zoned.items() for member in names]
    members += [("struct virtio_blk_config", f"zoned.{member}") for member in ZONED_CONFIG if zoned]
    lines = [f'#include "{HEADERS / name}"' for name in NAMES] + ["#include <stdio.h>", "#include <stddef.h>", "int main(void) {"]
    for struct, member in members:
        lines.append(f'printf("{struct}.{member} %zu %zu\\n", offsetof({struct}, {member}), sizeof((({struct} *)0)->{member}));')
    sized = ["struct virtio_blk_config", *(f"struct virtio_pci_{name}" for name in ("cap", "notify_cap", "cfg_cap"))]
    for struct in [*STRUCTS, *zoned, *sized]:
        lines.append(f'printf("{struct} 0 %zu\\n", sizeof({struct}));')
    lines += [
        "static char memory[65536] __attribute__((aligned(4096))); struct vring r; vring_init(&r, 256, memory, 4096);",
        'printf("areas %zu %zu\\n", (size_t)((char *)r.avail - memory), (size_t)((char *)r.used - memory));',
        'printf("used_event %zu 2\\n", (size_t)((char *)&vring_used_event(&r) - (char *)r.avail));',
        'printf("avail_event %zu 2\\n", (size_t)((char *)&vring_avail_event(&r) - (char *)r.used));',
        "for (unsigned e = 0; e < 5; e++) for (unsigned n = 0; n < 5; n++) for (unsigned o = 0; o < 5; o++)",
        'printf("need_event.%u.%u.%u 0 %d\\n", e, n, o, vring_need_event(e + 65534, n + 65534, o + 65534));',
        "return 0; }",
    ]
    source, program = folder / "layout.c", folder / "layout"
    source.write_text("\n".join(lines), encoding="utf-8")
    built = subprocess.run([COMPILER, "-o", str(program), str(source)], capture_output=True, text=True)
    if built.returncode:
        pytest.skip(f"the C compiler does not take these headers: {built.stderr.splitlines()[:1]}")
    said = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    return {name: (int(at), int(size)) for name, at, size in (line.rsplit(" ", 2) for line in said.splitlines())}


@pytest.mark.parametrize(
    ("ours", "struct"),
    [
        (virtio_ring.DESC, "struct vring_desc"),
        (virtio_ring.USED_ELEM, "struct vring_used_elem"),
        (virtio_blk.REQ_HEADER, "struct virtio_blk_outhdr"),
        (virtio_blk.DISCARD_SEG, "struct virtio_blk_discard_write_zeroes"),
        (virtio_blk_zoned.ZONE_DESC, "struct virtio_blk_zone_descriptor"),
        (virtio_blk_zoned.ZONE_REPORT, "struct virtio_blk_zone_report"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_structure_has_the_compilers_offsets(layout: dict[str, tuple[int, int]], ours: object, struct: str) -> None:
    names = (STRUCTS | ZONED_STRUCTS)[struct]
    if struct in ZONED_STRUCTS:
        _in_these_headers("VIRTIO_BLK_F_ZONED")
    assert ours.size == layout[struct][1]  # type: ignore[attr-defined]
    for position, member in enumerate(names):
        offset, size = layout[f"{struct}.{member}"]
        values = [0] * len(names)
        values[position] = 1 << (8 * size - 1) | 1  # the lowest and the highest bit of this member
        expected = bytearray(ours.size)  # type: ignore[attr-defined]
        expected[offset : offset + size] = values[position].to_bytes(size, "little")
        assert ours.pack(*values) == expected, member  # type: ignore[attr-defined]


def test_the_packed_sizes_are_the_structures_own() -> None:
    assert virtio_ring.DESC.size == virtio_ring.DESC_BYTES
    assert virtio_blk.REQ_HEADER.size == virtio_blk.REQ_HEADER_BYTES
    assert virtio_blk.DISCARD_SEG.size == virtio_blk.DISCARD_SEG_BYTES


def test_the_configuration_space_has_the_compilers_offsets(layout: dict[str, tuple[int, int]]) -> None:
    assert {*CONFIG, *ZONED_CONFIG} == set(virtio_blk.CONFIG_OFFSETS)
    for name, (member, size) in CONFIG.items():
        assert layout[f"struct virtio_blk_config.{member}"] == (virtio_blk.CONFIG_OFFSETS[name], size), name
    last, (member, size) = list(CONFIG.items())[-1]
    assert virtio_blk.CONFIG_OFFSETS[last] + size <= virtio_blk.CONFIG_BYTES_SECURE_ERASE <= layout["struct virtio_blk_config"][1]
    assert layout["struct virtio_blk_config.max_secure_erase_sectors"][0] == virtio_blk.CONFIG_BYTES


def test_the_zoned_configuration_has_the_compilers_offsets(layout: dict[str, tuple[int, int]]) -> None:
    _in_these_headers("VIRTIO_BLK_F_ZONED")
    for name in ZONED_CONFIG:
        size = 1 if name == "model" else 4
        assert layout[f"struct virtio_blk_config.zoned.{name}"] == (virtio_blk.CONFIG_OFFSETS[name], size), name
    assert layout["struct virtio_blk_config"][1] == virtio_blk.CONFIG_BYTES_ZONED
    assert layout["struct virtio_blk_config.zoned.zone_sectors"][0] == virtio_blk.CONFIG_BYTES_SECURE_ERASE


def test_the_structures_of_virtio_pci_have_the_compilers_offsets(layout: dict[str, tuple[int, int]]) -> None:
    for name, member in COMMON.items():
        field = virtio_pci.Common[name]
        assert layout[f"struct virtio_pci_common_cfg.{member}"] == (field, virtio_pci.COMMON_WIDTH[field]), name
    assert layout["struct virtio_pci_cap"][1] == virtio_pci.CAP_BYTES
    assert layout["struct virtio_pci_notify_cap"][1] == virtio_pci.NOTIFY_CAP_BYTES
    assert layout["struct virtio_pci_cfg_cap"][1] == virtio_pci.PCI_CFG_CAP_BYTES
    assert layout["struct virtio_pci_cfg_cap.pci_cfg_data"] == (virtio_pci.PCI_CFG_DATA, 4)
    last = virtio_pci.Common.QUEUE_DEVICE_HI
    assert last + virtio_pci.COMMON_WIDTH[last] == virtio_pci.COMMON_1_0_BYTES


def test_the_rings_areas_have_the_compilers_sizes(layout: dict[str, tuple[int, int]]) -> None:
    assert virtio_ring.desc_table_bytes(256) == layout["areas"][0]
    assert virtio_ring.avail_ring_bytes(256) == layout["used_event"][0] + 2
    assert virtio_ring.used_ring_bytes(256) == layout["avail_event"][0] + 2


def test_need_event_is_the_headers_own(layout: dict[str, tuple[int, int]]) -> None:
    from vblklab.ring import need_event

    near = [(value + 65534) & 0xFFFF for value in range(5)]
    for e, event in enumerate(near):
        for n, new in enumerate(near):
            for o, old in enumerate(near):
                assert need_event(event, new, old) == bool(layout[f"need_event.{e}.{n}.{o}"][1]), (event, new, old)
