"""Output layers that the tests of the losses draw."""

import torch


def layer(T, D, V, device="cpu", dtype=torch.float32):
    """Return a hidden state `[T, D]`, a weight `[V, D]` and a bias `[V]`."""
    hidden = torch.randn(T, D, device=device).to(dtype)
    weight = (torch.randn(V, D, device=device) / D**0.5).to(dtype)
    return hidden, weight, torch.randn(V, device=device).to(dtype)
