"""Measurements: speed, memory and error, the compiled kernels, trials of complete runs."""

import tritium

tritium.require("tritium.bench", "bench", "matplotlib", "rich", "tyro")
