"""How long ``import vblklab`` takes in a fresh interpreter, beyond starting Python.  `python bench/bench_import.py`"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time


def seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def main() -> None:
    pairs = [(seconds("import vblklab"), seconds("pass")) for _ in range(9)]
    print(f"import vblklab: {statistics.median(a - b for a, b in pairs) * 1e3:.0f} ms (goal: under 300)")
    pairs = [(seconds("import vblklab as vb; vb.Pipeline; vb.SimMachine"), seconds("pass")) for _ in range(9)]
    print(f"with Pipeline and SimMachine: {statistics.median(a - b for a, b in pairs) * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
