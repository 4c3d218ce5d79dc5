"""Layers with a LoRA (lora_linear.py), LoKr and LoHa (factors.py, layers.py), and their choice (selection.py)."""
