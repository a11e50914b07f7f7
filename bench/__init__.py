"""Measurements: what the kernels compile to, and how fast they run."""
