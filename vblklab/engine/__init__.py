"""How the device reaches the host kernel."""

from .background import IoUring, Threads
from .engines import Simulated, Sync
from .mapped import Mapped

__all__ = ["IoUring", "Mapped", "Simulated", "Sync", "Threads"]
