"""How the device reaches the host kernel."""

from .engines import Simulated, Sync

__all__ = ["Simulated", "Sync"]
