"""``python -m vblklab``: the same as ``vblk``."""

from .cli import main

raise SystemExit(main())
