"""The run folder: lock, log, checkpoints, and what makes a resume exact."""
