"""Training on many GPUs, predicted: memory, bytes communicated, time; and counted on few ranks."""
