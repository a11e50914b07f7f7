"""Short scripts to learn from: `python -m examples.NAME`; examples/README.md shows them."""
