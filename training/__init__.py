"""Training of the model: steps, memory plans, checkpoints, recovery and monitoring."""

import tritium

tritium.require("tritium.training", "train", "matplotlib", "rich", "tyro")
