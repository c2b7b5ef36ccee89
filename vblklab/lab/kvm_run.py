"""A recipe on real KVM; where there is none, a recorded run or the simulator, with a line that says so."""

from __future__ import annotations

from typing import Any

from ..errors import NotHere
from ..machine.guest_run import recorded
from ..machine.kvm import KvmMachine
from ..machine.sim import SimMachine
from ..trace.run import Run

__all__ = ["kvm_run"]

_said: set[str] = set()


def kvm_run(recipe: Any, *, recording: str | None = None, **options: Any) -> Run:
    """Run a recipe on a real vCPU; ``options`` are KvmMachine's.

    Where this machine has no KVM, or lacks what an option needs, says so in one line, once.  Then ``recording`` names the recorded run
    that answers; without one the recipe is simulated.  The run and its figures are marked recorded or simulated.
    """
    try:
        run: Run = recipe.run(KvmMachine(**options))
    except NotHere as missing:
        instead = "A recording answers." if recording is not None else "The simulator stands in."
        if (text := f"{missing}\n{instead}") not in _said:
            _said.add(text)
            print(text)
        run = recorded(recording) if recording is not None else recipe.run(SimMachine())
    return run
