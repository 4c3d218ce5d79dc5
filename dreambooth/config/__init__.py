"""The configuration of a run: dataclasses (schema.py and one file per group), their creation from
Hydra's configuration (compose.py), rules between groups (validation.py) and the resolved run (recipe.py).

May import `errors` and `utils`.
"""
