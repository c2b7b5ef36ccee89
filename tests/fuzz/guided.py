"""The same targets under a coverage-guided fuzzer, where there is one: ``python -m tests.fuzz.guided ring -runs=20000``.

Needs atheris, which is no dependency.  Options behind the target's name are libFuzzer's.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["vblklab.ring", "vblklab.device", "vblklab.transport", "vblklab.engine", "vblklab.memory"]):
    from tests.fuzz.targets import TARGETS, allowed_cpu


def main(arguments: list[str]) -> None:
    """Fuzz the named target until libFuzzer's options say that it is enough; an input that fails ends the process."""
    target = TARGETS[arguments[1]]

    def one_input(data: bytes) -> None:
        with allowed_cpu():
            target(data)

    atheris.Setup([arguments[0], *arguments[2:]], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv)
