"""The evidence that takes long: `make proof` measures and writes docs/proof.md."""
