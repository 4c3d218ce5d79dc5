"""The configuration of a run: dataclasses (schema.py and one file per group), Hydra's border (compose.py), rules
(validation.py) and the resolved run (recipe.py). May import `errors` and `utils`.
"""
