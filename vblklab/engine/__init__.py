"""How the device reaches the host kernel."""

from .background import IoUring, Threads
from .engines import Simulated, Sync
from .mapped import Mapped

__all__ = ["ENGINES", "IoUring", "Mapped", "Simulated", "Sync", "Threads"]

ENGINES = {"simulated": Simulated, "sync": Sync, "threads": Threads, "mmap": Mapped, "io_uring": IoUring}
"""The engines by the names that a terminal uses."""
