"""Training data: photos (photos.py), captions, masks, buckets, class images (class_images.py) and batches (batches.py).

Imports only from errors, utils, config, runtime, storage, models and optim.
"""
