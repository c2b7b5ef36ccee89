"""A cost table whose every row is another number, so that a sum says which rows are in it."""

from __future__ import annotations

from vblklab.events import EVENTS
from vblklab.machine.costs import Cost, CostTable

LAST_OF_A_GROUP_ONLY = ("block_bio_queue", "virtio_queue_rq", "virtqueue_pop", "virtio_blk_rw_complete", "virtio_blk_req_complete")
LAST_OF_A_GROUP_ONLY += ("vring_interrupt", "block_rq_complete")


def known_table(machine: str, *, together: bool = False) -> CostTable:
    """Rows of ``machine`` (kvm, live): 1,000 ns and more for every trace point and wake-up, 4 bytes a ns for memory.

    ``together``: points that a live machine yields as one have their whole cost in the last of them, as a calibration finds it.
    """
    ns: dict[str, float] = {key: 1_000.0 + 7 * number for number, key in enumerate(EVENTS)}
    if together:
        ns |= dict.fromkeys((*LAST_OF_A_GROUP_ONLY, "host:sys_enter_preadv64", "kvm_set_irq"), 0.0)
    ns |= {"wake:device": 20_011.0, "wake:vcpu-idle": 30_013.0, "wake:task": 2_017.0, "wake:vcpu-busy": 0.0, "wake:main-loop": 9_001.0}
    ns |= {"store:ram:read_ns": 5_003.0, "store:ram:write_ns": 6_007.0}
    ns |= {"store:ram:read_bytes_per_us": 4_000.0, "store:ram:write_bytes_per_us": 2_000.0}
    rows = {f"{machine}/{key}": Cost(value, "made for a test", "measured", value - 1, value + 1, 3) for key, value in ns.items()}
    return CostTable("made for a test", dict(CostTable.load()) | rows, {"cpu": "none", "date": "today"})
