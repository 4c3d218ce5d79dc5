"""Generation of pictures with finished models (generate_images.py): finding the model (model_sources.py) and the LoRAs
(loras.py), and the metadata of PNG files (png_metadata.py).

May import evaluation and the folders that evaluation may import.
"""
