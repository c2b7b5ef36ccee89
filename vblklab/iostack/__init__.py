"""The block layer, used by the guest (steps D2, U6, U7) and by the host (steps D6, U2)."""

from .blkmq import Bio, BlockDriver, IOStack, Limits, Op, Plug, Request

__all__ = ["Bio", "BlockDriver", "IOStack", "Limits", "Op", "Plug", "Request"]
