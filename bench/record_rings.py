"""Record doorbells of a bare vCPU, for machines without KVM: ``python bench/record_rings.py``.

Writes data/recorded/trap_rings.json.gz: the time of each of 2,000 stores that leave to user space, and of 2,000 that an ioeventfd answers.
"""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import vblklab as vb
from vblklab.machine.base import host_provenance

PATH = Path(__file__).resolve().parent.parent / "data" / "recorded" / "trap_rings.json.gz"
TIMES = 2000


def main() -> None:
    trap = vb.Trap()
    slow = trap.ring(TIMES)
    trap.ioeventfd(0x50)
    fast = trap.ring(TIMES)
    facts = host_provenance()
    load = f"load {os.getloadavg()[0]:.1f}"
    host = [facts["cpu"], facts["host"], f"kernel {facts['kernel']}", facts["python"]]
    where = ", ".join([trap.provenance, *host, load, facts["date"][:10]])
    trap.close()
    PATH.write_bytes(gzip.compress(json.dumps({"provenance": where, "exit": slow, "ioeventfd": fast}).encode(), mtime=0))
    print(f"{PATH.name}: {PATH.stat().st_size:,} bytes, {where}")


if __name__ == "__main__":
    main()
