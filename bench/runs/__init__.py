"""Trials of whole training runs."""
