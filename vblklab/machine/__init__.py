"""Machines run the contexts of a pipeline: simulated time, or live."""
