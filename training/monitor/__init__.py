"""Monitoring of a run: progress display, plots, layer statistics, samples, trackers."""
