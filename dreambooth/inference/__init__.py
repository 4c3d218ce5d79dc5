"""Drawing with finished models: generate_images.py, the models (model_sources.py) and LoRAs (loras.py) it draws with,
and what is recorded in a PNG file (png_metadata.py).

May import evaluation and the folders to its left.
"""
