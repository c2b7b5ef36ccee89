"""How far a prediction is off: model and measurement of jobs at queue depth 1, for both kicks, on the machines that work here.

The model is calibrated on another job and the other kick: see `vb.predict`.  `python bench/bench_predict.py [--rounds N] [--steps]`
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import vblklab as vb
from vblklab.kvm import host
from vblklab.lab.predict import Prediction

IOS = 600


def jobs(image: Path) -> dict[str, vb.Pipeline]:
    """None of them has a block size that a calibration uses."""

    def job(rw: str, bs: int, disk: Any) -> vb.Pipeline:
        return vb.Pipeline(app=vb.Fio(rw=rw, bs=bs, number_ios=IOS, size="16m"), disk=disk)

    return {
        "4 KiB randread, memory": job("randread", 4096, vb.Ram()),
        "16 KiB randwrite, memory": job("randwrite", 16384, vb.Ram()),
        "4 KiB randread, file": job("randread", 4096, vb.ImageFile(str(image))),
    }


def line(machine: Any, kick: str, name: str, report: Prediction) -> str:
    one = report.total
    rule = "within 15 %" if abs(one.error) <= 0.15 else "inside p25 to p75" if one.inside else "missed"
    times = f"{one.model_ns / 1e3:8.1f} {one.measured_ns / 1e3:9.1f} {one.p25_ns / 1e3:8.1f} {one.p75_ns / 1e3:8.1f}"
    return f"{type(machine).__name__:11} {kick:10} {name:25} {times} {one.error:+7.1%}  {rule:18} load {os.getloadavg()[0]:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4, help="turns of calibration and job (default 4)")
    parser.add_argument("--steps", action="store_true", help="print each report with its steps")
    args = parser.parse_args()
    works, why, gain = host.found()
    machines = [vb.LiveMachine(), *([vb.KvmMachine()] if works else [])]
    if not works:
        print(f"no KVM here: {why}; {gain}")
    print(f"{host.flavour()}; {os.cpu_count()} CPUs; µs an I/O, {args.rounds} turns of {IOS:,} I/Os with the calibration between them")
    print(f"{'':48} {'model':>8} {'measured':>9} {'p25':>8} {'p75':>8} {'error':>7}")
    met = []
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder, "disk.img")
        image.write_bytes(os.urandom(16 << 20))
        for machine in machines:
            for kick in ("ioeventfd", "mmio-exit"):
                for name, recipe in jobs(image).items():
                    report = vb.predict(recipe.replace(kvm=vb.Kvm(kick=kick)), machine, rounds=args.rounds, progress=False)
                    print(line(machine, kick, name, report), flush=True)
                    met.append(report.met)
                    if args.steps:
                        print(report.text())
    print(f"{sum(met)} of {len(met)} hold")


if __name__ == "__main__":
    main()
