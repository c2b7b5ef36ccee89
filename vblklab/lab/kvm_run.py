"""A recipe on real KVM, or, where there is none, on the simulator with a line that says so."""

from __future__ import annotations

from typing import Any

from ..errors import NotHere
from ..machine.kvm import KvmMachine
from ..machine.sim import SimMachine
from ..trace.run import Run

__all__ = ["kvm_run"]

_said: set[str] = set()


def kvm_run(recipe: Any, *, idle: str = "hlt") -> Run:
    """Run a recipe on a real vCPU (``idle``: how it waits, "hlt" or "poll").

    Where this machine has no KVM, says so once in one line and simulates; the run and its figures are marked simulated.
    """
    try:
        run: Run = recipe.run(KvmMachine(idle=idle))
    except NotHere as missing:
        if str(missing) not in _said:
            _said.add(str(missing))
            print(f"{missing}\nThe simulator stands in.")
        run = recipe.run(SimMachine())
    return run
