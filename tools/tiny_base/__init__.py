"""The recipe of the shipped base: `python -m tools.tiny_base`, see README.md beside this file."""
