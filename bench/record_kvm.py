"""Record KvmMachine with the host kernel's trace, for machines without KVM: ``sudo python bench/record_kvm.py``.

Writes data/recorded/kvm-*.run.gz: 4 KiB random reads at iodepth 1 from an image past the page cache, for two wirings.  Of ten runs that one
is kept in which most I/Os needed a kick, so that there are doorbells to look at.
"""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import vblklab as vb

FOLDER = Path(__file__).resolve().parent.parent / "data" / "recorded"
SIZE = 64 << 20
IOS, TRIES = 300, 10


def main() -> None:
    with TemporaryDirectory(dir=Path.cwd(), prefix="vblk-bench-") as folder:
        os.chdir(folder)  # the image's name without a place: it is in the recording
        Path("disk.img").write_bytes(os.urandom(SIZE))
        for kick, call in (("ioeventfd", "irqfd"), ("mmio-exit", "intx")):
            app = vb.Fio(rw="randread", bs=4096, iodepth=1, number_ios=IOS, size=SIZE)
            recipe = vb.Pipeline(app=app, kvm=vb.Kvm(kick=kick, call=call), disk=vb.ImageFile("disk.img", cache="none"))
            machine = vb.KvmMachine(kernel_trace=True)
            path = FOLDER / f"kvm-{kick}-{call}-d1.run.gz"
            most = -1
            for _ in range(TRIES):
                vm = recipe.boot(machine)
                run = vm.run()
                if run.counters["kicks"] > most:  # a device that still looks needs no kick
                    most = run.counters["kicks"]
                    vm.save(path)
            print(f"{path.name}: {path.stat().st_size:,} bytes, {most} kicks, of the last try {run.provenance['kernel trace']}")
        os.chdir(FOLDER)


if __name__ == "__main__":
    main()
