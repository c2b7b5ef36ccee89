"""Record a real guest for machines without one: ``python bench/record_guest.py``; writes data/recorded/linux-*.run.gz.

The same job on our device, on QEMU's, and on QEMU's with an iothread; 4 KiB random reads from an image in the page cache.
"""

from __future__ import annotations

import os
from pathlib import Path

import vblklab as vb

FOLDER = Path(__file__).resolve().parent.parent / "data" / "recorded"
SIZE = 64 << 20
IOS = 300


def main() -> None:
    image = "disk.img"  # a name without a place: it is in the recording
    os.chdir(Path(vb.scratch_image(SIZE)).parent)
    Path(image).write_bytes(bytes(SIZE))
    for device, host in (
        ("ours", None),
        ("qemu", vb.QemuDisk(image)),
        ("qemu-iothread", vb.QemuDisk(image, iothread=True)),
    ):
        for depth in (1, 8) if host is None else (1,):
            app = vb.Fio(rw="randread", bs=4096, iodepth=depth, number_ios=IOS, size=SIZE)
            recipe = vb.Pipeline(app=app, guest=vb.LinuxGuest(), disk=vb.ImageFile(image), host=host)
            with recipe.boot(vb.VhostUserMachine()) as vm:
                vm.run()  # once to warm up
                run = vm.run()
                path = FOLDER / f"linux-{device}-d{depth}.run.gz"
                vm.save(path)
            print(f"{path.name}: {path.stat().st_size:,} bytes, {len(run.rows)} of {run.ios} I/Os; {run.provenance['clock']}")


if __name__ == "__main__":
    main()
