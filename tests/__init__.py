"""The suite of vblklab; the folders mirror the package."""
