"""Memory of a training step: predicted, planned, and retried with less."""
