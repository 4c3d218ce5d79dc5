"""Creates the tiny base model that ships with the package: `python -m tools.tiny_base`. See README.md here."""
