"""Measurements: what the kernels compile to, and how fast they run."""

import tritium

tritium.require("tritium.bench", "bench", "matplotlib", "rich", "tyro")
