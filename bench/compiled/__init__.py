"""The static gate: what the kernels compile to, without a GPU."""
