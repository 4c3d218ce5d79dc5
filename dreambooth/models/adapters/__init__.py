"""LoKr and LoHa adapters (factors.py, layers.py), and the choice of the layers and ranks of adapters (selection.py)."""
