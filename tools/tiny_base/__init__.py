"""Makes the tiny base model that ships with the package: `python -m tools.tiny_base`; see README.md in this folder."""
